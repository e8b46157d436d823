"Photos in shards: the same order, crops, labels and messages as from files; packing that survives a kill; servers that fail."
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import tarfile
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.torch_core import set_seed
from PIL import Image
from typer.testing import CliRunner

from patience import still
from range_server import RangeServer
from resnet_fastai.augment import ColorStats
from resnet_fastai.core import ResNet
from resnet_fastai.data import demo_data, LabelMap, read_photos, resnet_dls
from resnet_fastai.engine import ranges
from resnet_fastai.engine.demo_photos import draw_photo
from resnet_fastai.engine.fetch import resolve_data
from resnet_fastai.engine.files import DataError, PhotoError, write_json
from resnet_fastai.engine.layout import folder_photos, list_photos, split_photos, splits
from resnet_fastai.engine.lock import lock_folder, unlock_folder
from resnet_fastai.engine.photo import Photo
from resnet_fastai.engine.shards import open_shards, read_header, Shards, write_index
from resnet_fastai.engine.survey import survey_file
from resnet_fastai.inference import evaluate
from resnet_fastai.practice import shards as pack
from resnet_fastai.practice.cli import app
from resnet_fastai.practice.shards import pack_photos, verify_shards
from resnet_fastai.practice.predict_folder import predict_folder
from resnet_fastai.practice.prepare import check_data, shrink_photos

pytestmark = pytest.mark.usefixtures('one_thread')
stats = ColorStats([.5, .4, .3], [.2, .02, .005], np.eye(3))
small = dict(size=32, micro_bs=8, device='cpu', num_workers=0)


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    "Drawn photos, some with names that a tar for WebDataset must not repeat"
    paths = demo_data(tmp_path_factory.mktemp('shards')/'photos', sizes=dict(train=30, val=12, test=5))
    train, labels = paths.data_path/'train', json.loads(paths.label_path.read_text())
    first = sorted(p for p in train.iterdir())[:4]
    for p, name in zip(first, ('b.c/1.2.jpg', 'b.c/1.3.JPEG', 'é ü/x.jpg', 'deep/er/y.png')):
        (train/name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith('png'): Image.open(p).save(train/name); p.unlink()
        else: p.rename(train/name)
        labels[f'train/{name}'] = labels.pop(p.stem)
    write_json(paths.label_path, labels)
    return paths


@pytest.fixture(scope='module')
def packed(drawn, tmp_path_factory):
    return pack_photos(drawn.data_path, tmp_path_factory.mktemp('packed')/'shards', shard_mb=1, num_workers=0,
                       label_path=drawn.label_path, label_encoding=drawn.label_encoding)


@pytest.fixture
def tiny_shards(monkeypatch):
    "Shards of 30 kB, so that a few photos make several"
    write = pack._write_shards
    monkeypatch.setattr(pack, '_write_shards', lambda p, l, o, dest, most, *more: write(p, l, o, dest, 30_000, *more))


@pytest.fixture
def copy(packed, tmp_path): return Path(shutil.copytree(packed, tmp_path/'copy'))


@pytest.fixture
def at_once(monkeypatch): monkeypatch.setattr(ranges, 'waits', (0, 0, 0, 0))


def below(paths, root): return [os.path.relpath(p, root) for p in paths]
def files(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


# ── The same photos ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_order_names_labels_and_bytes_are_those_of_the_files(drawn, packed):
    root, labels = drawn.data_path, LabelMap(*drawn[1:])
    ours, theirs = split_photos(packed), split_photos(root)
    for s in splits:
        assert below(ours[s], packed) == below(theirs[s], root) and np.array_equal(ours[s].names, theirs[s].names)
        assert labels.match(ours[s], 0) == labels.match(theirs[s], 0)
        for p, q in zip(ours[s], theirs[s]): assert Photo(p).data == q.read_bytes() and Photo(p).size == Photo(q).size
    assert below(list_photos(packed), packed) == below(list_photos(root), root) == below(folder_photos(packed), packed)
    some = (ours['train'] + ours['val'])[np.array([40, 3, 0])]
    assert below(some, packed) == below((theirs['train'] + theirs['val'])[[40, 3, 0]], root) and below(some[1:], packed) == below(some, packed)[1:]
    assert not some.look_up(labels.find_id, labels.labels, labels.encoding) and [p.label for p in some] == [labels(p) for p in some.unlabelled()]
    assert (packed/'labels.json').read_bytes() == drawn.label_path.read_bytes()


def test_python_reads_the_tars_and_the_index_is_where_it_says(drawn, packed):
    shards, found = Shards(packed), {}
    for k, (name, size, _) in enumerate(shards.header['shards']):
        assert size == (packed/name).stat().st_size <= 1 << 20
        with tarfile.open(packed/name) as t:
            members = t.getmembers()
            for m in members: assert m.isfile() and m.name.count('.') == 1
            about = {m.name.split('.')[0]: json.load(t.extractfile(m)) for m in members if m.name.endswith('.json')}
            for m in members:
                key, suffix = m.name.split('.')
                if suffix in ('jpg', 'png'): found[about[key]['name']] = t.extractfile(m).read(), name.split('-')[0], int(shards.starts[k])*512 + m.offset_data
                if suffix == 'cls': assert t.extractfile(m).read() == str(json.loads(drawn.label_encoding.read_text())[about[key]['label']]).encode()
    assert {name: data for name, (data, _, _) in found.items()} == {n: b for n, b in files(drawn.data_path).items() if not n.endswith('.json')}
    assert all(name.startswith(split) for name, (_, split, _) in found.items())
    assert shards.columns[0].tolist() == [found[n.decode()][2]//512 for n in shards.names(range(len(shards)))]


def test_webdataset_reads_the_tars(drawn, packed):
    wds = pytest.importorskip('webdataset')
    encoding, labels, n = json.loads(drawn.label_encoding.read_text()), LabelMap(*drawn[1:]), 0
    for sample in wds.WebDataset(sorted(map(str, packed.glob('train-*.tar'))), shardshuffle=False).decode('pil'):
        image, cls, about = sample.get('jpg', sample.get('png')), sample['cls'], sample['json']
        assert image.size == Image.open(drawn.data_path/about['name']).size and cls == encoding[labels(Path(about['name']))]
        n += 1
    assert n == len(split_photos(drawn.data_path)['train'])


def batches(paths, **kw):
    set_seed(3)
    dls = resnet_dls(*paths, **small | dict(stats=stats) | kw)
    return [b for _ in range(2) for dl in dls for b in dl]


@pytest.mark.parametrize('num_workers', [0, 2])
def test_batches_are_the_same_to_the_bit(num_workers, drawn, packed):
    theirs, ours = batches(drawn, num_workers=num_workers), batches(drawn._replace(data_path=packed), num_workers=num_workers)
    assert len(ours) == len(theirs) > 8
    for (x, y), (u, v) in zip(ours, theirs): assert torch.equal(x, u) and torch.equal(y, v)


def test_training_evaluation_and_predictions_are_the_same(drawn, packed, tmp_path):
    at, models = {'files': drawn.data_path, 'shards': packed}, {}
    for name, root in at.items():
        models[name] = m = ResNet(root, *drawn[1:], arch='cifar_resnet8', size=32, bs=8, micro_bs=8, num_workers=0, device='cpu', precision='fp32',
                                  run_folder=tmp_path/'run')
        with m.learn.no_bar(), m.learn.no_logging(): m.fit(1 + (name == 'shards'), resume=name == 'shards')           # files first, shards go on
    whole = ResNet(drawn.data_path, *drawn[1:], arch='cifar_resnet8', size=32, bs=8, micro_bs=8, num_workers=0, device='cpu', precision='fp32')
    with whole.learn.no_bar(), whole.learn.no_logging(): whole.fit(2)
    m = models['shards']
    for a, b in zip(m.net.state_dict().values(), whole.net.state_dict().values()): assert torch.equal(a, b)
    assert np.array_equal(m.stats.mean, whole.stats.mean) and m.history.valid_loss.tolist() == whole.history.valid_loss.tolist()
    for kw in (dict(), dict(data_path=packed, label_path=drawn.label_path)):
        assert evaluate(m, 'val', '1crop', num_workers=0, **kw).equals(evaluate(whole, 'val', '1crop', num_workers=0))
    ours, theirs = (predict_folder(whole, root, protocol='1crop', num_workers=0) for root in (packed, drawn.data_path))
    assert ours.equals(theirs) and len(ours) == 47
    assert np.array_equal(whole.predict(packed, protocol='1crop'), whole.predict(drawn.data_path, protocol='1crop'))
    assert len(pickle.loads(pickle.dumps(m.learn.dls.new_empty())).photos['train']) == 0 and b'shards' not in pickle.dumps(m.learn.dls.new_empty().photos['val'][:0].names)


def test_what_is_wrong_is_said_as_of_files(drawn, tmp_path):
    bad = drawn._replace(data_path=Path(shutil.copytree(drawn.data_path, tmp_path/'bad')))
    first, second, *_ = sorted((bad.data_path/'val').iterdir())
    first.write_bytes(first.read_bytes()[:-300])
    second.write_text('no photo')
    (bad.data_path/'train'/'stranger.jpg').write_bytes(sorted((bad.data_path/'test').iterdir())[0].read_bytes())
    shards = pack_photos(bad.data_path, tmp_path/'shards', num_workers=0)
    theirs, ours = (check_data(root, *bad[1:], num_workers=0) for root in (bad.data_path, shards))
    assert ours.equals(theirs) and {'truncated', 'unreadable', 'no label', 'same photo in two splits'} == set(ours.problem)
    said = []
    for root in (bad.data_path, shards):
        with pytest.raises(DataError) as e: read_photos(root, LabelMap(*bad[1:]), num_workers=0)
        said.append(str(e.value).replace(str(root), ''))
    assert said[0] == said[1]
    (bad.data_path/'train'/'stranger.jpg').unlink()
    shards = pack_photos(bad.data_path, tmp_path/'again', num_workers=0)
    (_, kept, found), (_, files_kept, file_stats) = (read_photos(r, LabelMap(*bad[1:]), on_bad='skip', num_workers=0) for r in (shards, bad.data_path))
    assert len(kept['val']) == 10 and below(kept['val'], shards) == below(files_kept['val'], bad.data_path) and np.array_equal(found.eigvec, file_stats.eigvec)


def test_a_folder_without_splits(drawn, tmp_path):
    for name in ('z.jpg', 'a.b/2.jpg', 'a.jpg'):
        (tmp_path/'flat'/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(next((drawn.data_path/'test').iterdir()), tmp_path/'flat'/name)
    shards = pack_photos(tmp_path/'flat', tmp_path/'shards', num_workers=0)
    assert below(list_photos(shards), shards) == below(list_photos(tmp_path/'flat'), tmp_path/'flat') == ['a.b/2.jpg', 'a.jpg', 'z.jpg']
    with pytest.raises(DataError, match=r'has no photos of train/; its shards hold a\.b/'): split_photos(shards)
    again = pack_photos(shards, tmp_path/'repacked', shard_mb=2, num_workers=0)                 # from shards to shards
    assert files(again)['photos-000000.tar'] == files(shards)['photos-000000.tar']
    with pytest.raises(DataError, match='holds shards; pack_photos'): shrink_photos(shards, tmp_path/'small')


def test_the_survey_is_kept_for_files_and_for_shards_wherever_they_are(drawn, packed, copy):
    assert survey_file(split_photos(packed)['train']) == survey_file(split_photos(copy)['train']) != survey_file(split_photos(copy)['val'])
    photos = split_photos(drawn.data_path)['train']
    assert survey_file(photos) == survey_file(list(photos)) == survey_file(list(photos.texts()))


# ── Processes ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def read_many(photos, seed):
    rng = random.Random(seed)
    for _ in range(300): assert Photo(photos[rng.randrange(len(photos))]).data[:2] in (b'\xff\xd8', b'\x89P')      # the checksum has been compared


def test_processes_and_threads_share_the_open_files(packed):
    photos = split_photos(packed)['train']
    read_many(photos, 0)                                                                          # the parent has opened them
    workers = [multiprocessing.get_context('fork').Process(target=read_many, args=(photos, s)) for s in (1, 2)]
    threads = [threading.Thread(target=read_many, args=(photos, s)) for s in (3, 4)]
    for w in workers + threads: w.start()
    read_many(photos, 5)
    for w in workers + threads: w.join()
    assert [w.exitcode for w in workers] == [0, 0]


def test_a_spawned_process_opens_them_anew(packed):
    photos = split_photos(packed)['train']
    path = photos[3]
    path.label = 'x'
    twin = pickle.loads(pickle.dumps(path))
    assert twin == path and twin.label == 'x' and twin.source.shards is not path.source.shards and twin.source.read() == path.source.read()
    with multiprocessing.get_context('spawn').Pool(1) as pool: assert pool.map(len, [photos[:4]]) == [4] and pool.apply(path.source.read) == path.source.read()


def test_more_shards_than_files_that_may_be_open(drawn, tmp_path, tiny_shards):
    shards = Shards(pack_photos(drawn.data_path, tmp_path/'shards', num_workers=0))
    assert len(shards.header['shards']) > 5
    shards.tars.most = 2
    data = [bytes(shards.read(row)) for row in range(len(shards))]
    assert len(shards.tars.files) == 2 and data == [(drawn.data_path/os.fsdecode(n)).read_bytes() for n in shards.names(range(len(shards)))]


# ── Packing ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_a_kill_leaves_whole_shards_and_the_next_call_goes_on(drawn, tmp_path, tiny_shards):
    untouched, dest = pack_photos(drawn.data_path, tmp_path/'untouched', num_workers=0), tmp_path/'killed'
    for after in (17, 11):                                                                        # photos until the kill
        if (pid := os.fork()) == 0:
            add, n = pack._Writer.add, [0]
            def dying(self, *args):
                add(self, *args)
                n[0] += 1
                if n[0] == after: os.kill(os.getpid(), signal.SIGKILL)
            pack._Writer.add = dying
            pack_photos(drawn.data_path, dest, num_workers=2)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        whole = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in dest.glob('*.tar')}
        assert whole and not (dest/'shards.json').exists() and open_shards(dest) is None
        for name in whole: assert (dest/name).read_bytes() == (untouched/name).read_bytes()
    assert pack_photos(drawn.data_path, dest, num_workers=2) == dest and files(dest) == files(untouched)
    assert {name: (dest/name).stat().st_ino for name in whole} == {name: ino for name, (ino, _) in whole.items()}
    before = {p: p.stat().st_mtime_ns for p in dest.iterdir()}
    pack_photos(drawn.data_path, dest, num_workers=0)                                             # all is done
    assert before == {p: p.stat().st_mtime_ns for p in dest.iterdir()}


def test_what_packing_refuses(drawn, packed, tmp_path):
    root = drawn.data_path
    for kw, says in ((dict(shard_mb=2), 'packed from other photos, or in another way .*shard_mb'), (dict(shard_mb=1, short_side=30), 'short_side'),
                     (dict(shard_mb=0), 'shard_mb is 0'), (dict(short_side=.5), 'short_side is 0.5'), (dict(label_path=drawn.label_path), 'belong together')):
        with pytest.raises(DataError, match=says): pack_photos(root, packed, **kw)
    with pytest.raises(DataError, match='lies inside'): pack_photos(root, root/'shards')
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine/letter.txt').write_text('dear')
    with pytest.raises(DataError, match='exists already and is not touched'): pack_photos(root, tmp_path/'mine')
    assert files(tmp_path/'mine') == {'letter.txt': b'dear'}
    (tmp_path/'none').mkdir()
    with pytest.raises(DataError, match='holds no photos'): pack_photos(tmp_path/'none', tmp_path/'new')
    with pytest.raises(DataError, match='holds no shards.json'): verify_shards(tmp_path/'none')
    (tmp_path/'begun/.packing').mkdir(parents=True)
    lock_folder(tmp_path/'begun/.packing')
    try:
        with pytest.raises(DataError, match='is in use by'): pack_photos(root, tmp_path/'begun')
    finally: unlock_folder(tmp_path/'begun/.packing')


def test_shrinking_in_the_same_pass_gives_the_bytes_of_shrink_photos(tmp_path):
    big = tmp_path/'big'
    for i, name in enumerate(('train/a.jpg', 'train/b.JPG', 'train/c.png', 'val/d.jpg')):
        (big/name).parent.mkdir(parents=True, exist_ok=True)
        draw_photo('weave', np.random.default_rng(i)).resize((200, 150) if i else (60, 40)).save(big/name)
    (big/'val/broken.jpg').write_text('no photo')
    small, shards = shrink_photos(big, tmp_path/'small', short_side=64, num_workers=0), pack_photos(big, tmp_path/'shards', short_side=64, num_workers=2)
    assert {os.path.relpath(p, shards): bytes(p.source.read()) for p in list_photos(shards)} == {n: b for n, b in files(small).items() if not n.endswith('.json')}
    assert Photo(shards and list_photos(shards)[1]).size == (85, 64)


# ── Damage ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_a_damaged_photo_is_named_with_its_shard_and_the_others_are_read(copy):
    photos = split_photos(copy)['train']
    shards, row = photos.shards, photos.rows[5]
    at = int(shards.columns[0,row] - shards.starts[[n for n, _, _ in shards.header['shards']].index('train-000000.tar')])*512
    with open(copy/'train-000000.tar', 'rb+') as f: f.seek(at + 40); byte = f.read(1)[0]; f.seek(at + 40); f.write(bytes([byte ^ 4]))
    with pytest.raises(PhotoError, match=rf"{photos[5].name}' is damaged in train-000000.tar") as e: Photo(photos[5])
    assert str(copy) in str(e.value)
    for i in (0, 4, 6, 29): Photo(photos[i])
    assert verify_shards(copy, num_workers=0) == [f'{copy}/train-000000.tar is damaged: its SHA-256 is another']
    if shutil.which('sha256sum'):
        said = subprocess.run(['sha256sum', '-c', 'SHA256SUMS'], cwd=copy, capture_output=True, text=True, env=os.environ | dict(LC_ALL='C')).stdout
        assert sorted(said.split('\n')) == ['', 'test-000000.tar: OK', 'train-000000.tar: FAILED', 'val-000000.tar: OK']


def damage(shards, row):
    "Change a byte of a photo in its tar file; the file's name"
    at = int(shards.columns[0,row])
    k = int(np.searchsorted(shards.starts, at, 'right')) - 1
    with open(name := Path(shards.folder)/shards.header['shards'][k][0], 'rb+') as f:
        f.seek((at - int(shards.starts[k]))*512 + 40)
        byte = f.read(1)[0]
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte ^ 4]))
    return name.name


def test_a_damaged_photo_is_left_out_like_one_in_a_folder(copy, drawn, tmp_path, monkeypatch):
    "The others and their colours are the same"
    monkeypatch.setattr('resnet_fastai.data.kept_survey', lambda file, photos: None)
    found, files = split_photos(copy), drawn._replace(data_path=Path(shutil.copytree(drawn.data_path, tmp_path/'files')))
    for split, i in ('train', 4), ('val', 2):
        path = found[split][i]
        name = damage(path.source.shards, path.source.row)
        (p := files.data_path/os.path.relpath(path, copy)).write_bytes(p.read_bytes()[:100])
        with pytest.raises(PhotoError, match=rf"{path.name}' is damaged in {name}"): Photo(path)
    args = dict(on_bad='skip', num_workers=0)
    (_, ours, colours), (_, theirs, file_colours) = (read_photos(root, LabelMap(*drawn[1:]), **args) for root in (copy, files.data_path))
    for s in ('train', 'val'): assert below(ours[s], copy) == below(theirs[s], files.data_path) and len(ours[s]) == len(found[s]) - 1
    assert np.array_equal(colours.eigvec, file_colours.eigvec) and colours.n_photos == file_colours.n_photos == 29
    with pytest.raises(PhotoError, match='is damaged in (train|val)-000000.tar'): read_photos(copy, LabelMap(*drawn[1:]), num_workers=0)
    said = check_data(copy, *drawn[1:], num_workers=0)
    assert sum('is damaged in' in str(d) for d in said.to_numpy().ravel()) == 2


def test_a_shard_that_is_cut_while_it_is_open(copy):
    "The photo that is gone is named, with the shard"
    photos = split_photos(copy)['train']
    Photo(photos[0])
    os.truncate(copy/'train-000000.tar', 20_480)
    gone = max(range(30), key=lambda i: photos.shards.columns[0,photos.rows[i]])
    with pytest.raises(PhotoError, match=rf"{photos[gone].name}' is damaged in train-000000.tar"): Photo(photos[gone])


def test_a_photo_that_is_damaged_after_the_first_epoch_ends_a_training_in_a_sentence(copy, drawn):
    model = ResNet(copy, *drawn[1:], arch='cifar_resnet8', size=32, bs=8, micro_bs=8, num_workers=1, device='cpu', stats=stats)
    path = split_photos(copy)['train'][7]
    name = damage(path.source.shards, path.source.row)
    with model.learn.no_bar(), model.learn.no_logging(), pytest.raises(PhotoError) as e: model.fit(1)
    assert f"{path.name}' is damaged in {name}" in str(e.value) and '\n' not in str(e.value)


def test_a_shard_that_is_not_whole_stops_a_run_and_is_no_bad_photo(copy, drawn, monkeypatch):
    monkeypatch.setattr('resnet_fastai.data.kept_survey', lambda file, photos: None)
    with open(copy/'val-000000.tar', 'ab') as f: f.truncate(5120)
    os.unlink(copy/'test-000000.tar')
    photos = split_photos(copy)
    for split, says in ('val', r'val-000000.tar has 5,120 bytes, not the [\d,]+ of the index'), ('test', 'test-000000.tar cannot be opened'):
        with pytest.raises(DataError, match=says) as e: Photo(photos[split][0])
        assert not isinstance(e.value, PhotoError)
    with pytest.raises(DataError, match='val-000000.tar has'): read_photos(copy, LabelMap(*drawn[1:]), on_bad='skip', num_workers=0)
    assert len(verify_shards(copy, num_workers=0)) == 2


def test_an_index_that_is_not_its_own(copy):
    with open(copy/'shards.index', 'rb+') as f: f.write(b'x')
    with pytest.raises(DataError, match='shards.index does not belong to the shards.json beside it'): split_photos(copy)
    (copy/'shards.index').unlink()
    with pytest.raises(DataError, match='shards.index cannot be read: No such file'): split_photos(copy)


good = dict(format='resnet_fastai shards, 1', photos=2, width=3, index='0'*64, runs=[['a/', 0]], shards=[['a.tar', 5, '0'*64]])


def test_an_index_of_another_version(copy):
    header = json.loads((copy/'shards.json').read_text())
    write_json(copy/'shards.json', header | dict(format='resnet_fastai shards, 7'))
    for act in (split_photos, list_photos, verify_shards, lambda folder: resnet_dls(folder, copy/'labels.json', copy/'encoding.json', **small)):
        with pytest.raises(DataError, match="shards.json says 'resnet_fastai shards, 7'; this version of resnet_fastai reads .*pack the photos again"): act(copy)


@pytest.mark.parametrize('change', [dict(photos=-1), dict(photos='2'), dict(photos=True), dict(width=0), dict(runs=[]), dict(runs=[['a/', 1]]), dict(runs=[['a/', 0], ['b/', 2]]),
                                    dict(runs=3), dict(shards=[['../a.tar', 5, '0'*64]]), dict(shards=[['a.tar', 5]]), dict(format='another, 2'), dict(format=None)])
def test_a_header_that_nobody_has_written(change):
    assert read_header(json.dumps(good).encode(), 'x')['photos'] == 2
    with pytest.raises(DataError, match='^x '): read_header(json.dumps(good | change).encode(), 'x')
    for text in (b'', b'[1]', b'{', b'\xff', json.dumps({k: v for k, v in good.items() if k not in change}).encode()):
        with pytest.raises(DataError, match='^x is not as'): read_header(text, 'x')


# ── A large index ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_an_index_of_many_photos_is_small(tmp_path, n=100_000):
    names = sorted(f'train/n{10_000_000 + i//1300:08}/n{10_000_000 + i//1300:08}_{i}.JPEG'.encode() for i in range(n))
    columns = np.stack([np.arange(n)*220, np.full(n, 110_000), np.arange(n)])
    write_index(tmp_path, [['train-000000.tar', 220*512*n, '0'*64]], names, columns, {})
    tracemalloc.start()
    try:
        photos = split_photos(tmp_path, ('train',))['train']
        assert tracemalloc.get_traced_memory()[1] < 60e6*n/1.28e6/2                              # of its own
    finally: tracemalloc.stop()
    assert (tmp_path/'shards.index').stat().st_size < 60e6*n/1.28e6                               # and what all processes share
    assert [os.fsencode(os.path.relpath(photos[i], tmp_path)) for i in (0, 77_777, n - 1)] == [names[i] for i in (0, 77_777, n - 1)]
    assert list(photos.names) == names


# ── Over HTTP ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture
def serve(request, packed):
    "serve(**kw): the shards on a server of this machine"
    def start(**kw):
        server = RangeServer(packed, **kw)
        request.addfinalizer(lambda: server.__exit__())
        return server
    return start


def test_batches_over_http_from_a_server_that_fails_and_recovers(drawn, serve, at_once):
    faults = ['busy', 'reset', 'short', 'changed', 'elsewhere']
    server = serve(plan=lambda name, n, k: 'moved' if k % 7 == 0 and not name.startswith('moved') else faults[k % 5] if n < 3 and k % 3 else None)
    ours, theirs = batches(drawn._replace(data_path=server.url)), batches(drawn)
    assert len(ours) == len(theirs) and all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(ours, theirs))
    assert sum(name == 'shards.index' for name, _ in server.asked) == 1
    assert resolve_data(server.url) == resolve_data(server.url) and sum(name == 'shards.index' for name, _ in server.asked) == 1       # kept


def test_worker_processes_have_connections_of_their_own(drawn, serve):
    url = serve().url
    Photo(list_photos(resolve_data(url))[0])                                                      # the parent has one
    ours, theirs = batches(drawn._replace(data_path=url), num_workers=2), batches(drawn, num_workers=2)
    assert all(torch.equal(x, u) for (x, _), (u, _) in zip(ours, theirs))


def test_photos_are_asked_for_side_by_side(drawn, serve, monkeypatch):
    together, held = threading.Barrier(8, timeout=still), []                                      # eight requests at once, or none is answered
    monkeypatch.setattr(ranges, 'patience', still)
    server = serve(plan=lambda name, n, k: 'hold' if held and k <= held[0] + 16 else None)
    server.hold = together.wait
    dls = resnet_dls(server.url, *drawn[1:], **small | dict(stats=stats))
    held.append(len(server.asked))
    assert sum(len(y) for _, y in dls.train) == 30 and not together.broken


@pytest.mark.parametrize('fault, says, requests', [
    ('busy', r'train-000000.tar \(bytes .*\) cannot be read: the server answered 503 Service Unavailable; given up after 5 attempts', 5),
    ('reset', r'train-000000.tar \(bytes .*\) cannot be read: .*; given up after 5 attempts', 5),
    ('short', 'it broke off; given up after 5', 5), ('elsewhere', 'another part of it; given up after 5', 5),
    ('gone', 'train-000000.tar cannot be read: the server answered 404', 1), ('whole', 'train-000000.tar: this server sends whole files, and shards need range', 1),
    ('longer', r'train-000000.tar has [\d,]+ bytes, not the [\d,]+ of the index', 1), ('changed', 'its checksum is wrong: .*; given up after 5', 5)])
def test_a_server_that_does_not_recover(fault, says, requests, serve, at_once):
    server = serve(plan=lambda name, n, k: fault if name.endswith('.tar') else None)
    photo = split_photos(resolve_data(server.url))['train'][0]
    server.asked.clear()
    with pytest.raises(DataError, match=says) as e: Photo(photo)
    assert isinstance(e.value, PhotoError) == (fault == 'changed') and len(server.asked) == requests and f'127.0.0.1:{server.server_port}' in str(e.value)


def test_a_server_that_is_too_slow_or_gone(serve, at_once, monkeypatch):
    server = serve(latency=.3)
    photo = split_photos(resolve_data(server.url))['train'][0]
    monkeypatch.setattr(ranges, 'patience', .05)
    monkeypatch.setattr(ranges, 'waits', (0,))
    with pytest.raises(DataError, match='train-000000.tar .* cannot be read: it takes too long; given up after 2 attempts'): Photo(photo)
    server.shutdown(), server.server_close()
    with pytest.raises(DataError, match='train-000000.tar .* cannot be read: .*refused'): Photo(photo)


def test_a_failing_server_ends_a_training_in_a_sentence_and_is_no_bad_photo(drawn, serve, at_once, monkeypatch):
    monkeypatch.setattr('resnet_fastai.data.kept_survey', lambda file, photos: None)
    down = []
    server = serve(plan=lambda name, n, k: 'busy' if down and name.endswith('.tar') else None)
    model = ResNet(server.url, *drawn[1:], arch='cifar_resnet8', size=32, bs=8, micro_bs=8, num_workers=1, device='cpu', stats=stats)
    down.append(1)
    with model.learn.no_bar(), model.learn.no_logging(), pytest.raises(DataError) as e: model.fit(1)
    assert '503' in str(e.value) and '\n' not in str(e.value) and not isinstance(e.value, PhotoError)
    with pytest.raises(DataError, match='503'): read_photos(server.url, LabelMap(*drawn[1:]), on_bad='skip')


def test_addresses(serve, at_once, tmp_path):
    server = serve()
    assert ranges.RangeReader(server.url + '?key=1#x').url('a.tar') == server.url + 'a.tar?key=1'
    photos = split_photos(resolve_data(server.url + '?key=secret'))['val']
    assert Photo(photos[0]).name == f"'{server.url}{os.fsdecode(photos.names[0])}'" and repr(photos) == f'ShardList(12 photos in {server.url[:-1]})'
    with pytest.raises(DataError, match='shards.json cannot be read: the server answered 404'): resolve_data(server.url + 'nowhere/')
    with pytest.raises(DataError, match='nor a folder of shards, whose address ends in /'): resolve_data(server.url + 'nowhere')
    with RangeServer(tmp_path) as other:
        (tmp_path/'shards.json').write_text('<html>')
        with pytest.raises(DataError, match='shards.json is not as pack_photos writes it'): resolve_data(other.url)


# ── The shell ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_the_command(drawn, tmp_path):
    def says(*args):
        done = CliRunner().invoke(app, [*map(str, args)])
        return done.exit_code, done.stdout or done.stderr
    code, said = says('pack', drawn.data_path, tmp_path/'shards', '--shard-mb', 1, '--json')
    assert code == 0 and json.loads(said) == dict(folder=str(tmp_path/'shards'), photos=47, shards=3)
    one, other = (json.loads(says('stats', root, '--json')[1]) for root in (drawn.data_path, tmp_path/'shards'))
    assert one == other and one['n_photos'] == 30
    code, said = says('pack', drawn.data_path, tmp_path/'shards', '--shard-mb', 2)
    assert code == 1 and 'error: ' in said and 'name another folder' in said
