"""Before a long run: `check_data` on real files with several processes, and `shrink_photos` that is killed and goes on."""
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from resnet_fastai.augment import ColorStats
from resnet_fastai.core import train
from resnet_fastai.engine.files import DataError, LabelError
from resnet_fastai.engine.layout import list_photos
from resnet_fastai.engine.photo import open_photo
from resnet_fastai.practice.prepare import check_data, shrink_photos


def snapshot(folder): return {p.relative_to(folder): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob('*') if p.is_file()}


def test_whole_photos_have_no_problems(drawn, capsys):
    assert len(check_data(*drawn, num_workers=2)) == 0 and '28 photos read, 0 problems' in capsys.readouterr().out


def test_each_problem_is_found_and_nothing_is_changed(drawn, edit):
    train_, val = drawn.data_path/'train', drawn.data_path/'val'
    whole = (train_/'train_00000.jpg').read_bytes()
    (train_/'train_00001.jpg').write_bytes(whole[:-700])
    (val/'val_00001.jpg').write_bytes(b'GIF89a and nothing more')
    (val/'val_00002.jpg').write_bytes(whole)
    Image.new('RGB', (20, 300)).save(train_/'train_00002.jpg')
    (train_/'stranger.png').write_bytes(open(train_/'train_00003.jpg', 'rb').read() + b' ')
    (drawn.data_path/'test'/'secret.jpg').write_bytes(whole[:-2] + b'\0\xff\xd9')       # a test photo needs no label
    edit(drawn.label_path, lambda o: o | {'val_00003': 'heffalump', 'gone': 'dots', 'train_00004': 7})
    before = snapshot(drawn.data_path)
    found = check_data(*drawn, num_workers=2)
    assert snapshot(drawn.data_path) == before
    assert set(zip(found['problem'], found['split'], found['photo'])) == {
        ('truncated', 'train', 'train/train_00001.jpg'), ('unreadable', 'val', 'val/val_00001.jpg'), ('same photo in two splits', 'val', 'val/val_00002.jpg'),
        ('suspicious size', 'train', 'train/train_00002.jpg'), ('no label', 'train', 'train/stranger.png'), ('unknown label', 'val', 'val/val_00003.jpg'),
        ('unknown label', 'train', 'train/train_00004.jpg'), ('no photo', '', 'gone'), ('nearly the same photo in two splits', 'test', 'test/secret.jpg')}
    assert dict(zip(found['problem'], found['detail']))['same photo in two splits'] == 'also train/train_00000.jpg'


def test_ids_and_labels_that_can_be_meant_otherwise(drawn, edit):
    train_, val = drawn.data_path/'train', drawn.data_path/'val'
    (train_/'more').mkdir()
    (train_/'train_00006.jpg').rename(train_/'more'/'x.jpg')
    (val/'x.jpg').write_bytes((train_/'train_00007.jpg').read_bytes()[:-2] + b'  \xff\xd9')     # two photos called x
    (train_/'train_00006').write_bytes((train_/'train_00007.jpg').read_bytes())                   # the suffix got lost
    edit(drawn.label_path, lambda o: o | {'x': 'dots', 'train_00003': 'Dots'})
    found = check_data(*drawn, num_workers=0)
    assert sorted(found['problem']) == sorted(['duplicate id', 'no photo by its name', 'no photo', 'unknown label', 'labels alike',
                                                  'nearly the same photo in two splits'])
    with pytest.raises(DataError, match="'a' and 'b' the same index 0"): check_data(drawn.data_path, drawn.label_path, {'a': 0, 'b': 0})


def test_training_stops_or_skips(drawn, capsys):
    (drawn.data_path/'train'/'train_00001.jpg').write_bytes((drawn.data_path/'train'/'train_00001.jpg').read_bytes()[:500])
    (drawn.data_path/'train'/'nobody.jpg').write_bytes((drawn.data_path/'train'/'train_00002.jpg').read_bytes())
    small = dict(arch='resnet18', size=32, bs=8, num_workers=0)
    with pytest.raises(LabelError, match="'nobody.jpg' has no label"): train(*drawn, epochs=1, **small)
    learn = train(*drawn, epochs=1, on_bad='skip', **small)
    said = capsys.readouterr().out
    assert len(learn.dls.photos['train']) == 15 and 'left out 1 of 25 photos that have no label' in said and 'left out 1 of 24 photos that cannot be read' in said


@pytest.fixture
def large(tmp_path):
    "24 photos of 1.9 million pixels, in folders"
    rng = np.random.default_rng(0)
    for i in range(24):
        p = tmp_path/'large'/('train' if i % 4 else 'val')/f'c{i % 3}'/f'{i}.jpg'
        p.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((1600, 1200), Image.Resampling.BICUBIC).save(p, quality=90)
    return tmp_path/'large'


def pixels(folder): return {p.relative_to(folder): np.array(open_photo(p)) for p in list_photos(folder)}


def test_shrinking_goes_on_after_a_kill(large, tmp_path):
    before = snapshot(large)
    whole = pixels(shrink_photos(large, tmp_path/'at once', num_workers=0))
    code = f'from resnet_fastai.practice.prepare import shrink_photos; shrink_photos({str(large)!r}, {str(tmp_path/"small")!r}, num_workers=2)'
    job = subprocess.Popen([sys.executable, '-c', code], stdout=-1, stderr=-1, start_new_session=True)
    while job.poll() is None and len(list((tmp_path/'small').rglob('*.jpg'))) < 5: time.sleep(.005)
    with suppress(ProcessLookupError): os.killpg(job.pid, signal.SIGKILL)          # a quick one has ended
    job.wait()
    begun = list_photos(tmp_path/'small')
    for p in begun: assert np.array_equal(np.array(open_photo(p)), whole[p.relative_to(tmp_path/'small')])     # what is there is whole
    inodes = {p: p.stat().st_ino for p in begun}
    shrink_photos(large, tmp_path/'small', num_workers=2)
    again = pixels(tmp_path/'small')
    assert again.keys() == whole.keys() and all(np.array_equal(again[k], whole[k]) for k in whole)
    assert all(p.stat().st_ino == i for p, i in inodes.items()) and snapshot(large) == before                  # not done twice; the originals as they were
    for p in (tmp_path/'small').rglob('.*.jpg*'): p.unlink()                                                     # what the killed process was writing


def test_the_colours_stay(large, tmp_path):
    a, b = (ColorStats.fit(list_photos(f), num_workers=0) for f in (large, shrink_photos(large, tmp_path/'small', num_workers=0)))
    assert np.abs(a.mean - b.mean).max() < .002 and np.abs(a.eigval/b.eigval - 1).max() < .02


def test_large_photos_are_written_upright_and_the_rest_is_linked(large, tmp_path, capsys):
    turned, whole = Image.Exif(), Image.new('RGB', (1200, 900), 'green')
    turned[0x0112] = 6
    whole.save(large/'train'/'turned.JPG', exif=turned)
    whole.resize((640, 480)).save(large/'train'/'small.png')
    (large/'train'/'broken.jpg').write_text('no photo')
    (large/'labels.json').write_text('{}')
    small = shrink_photos(large, tmp_path/'small', num_workers=0)
    assert Image.open(small/'train'/'turned.JPG').size == (480, 640) and not Image.open(small/'train'/'turned.JPG').getexif().get(0x0112)
    assert all((small/name).samefile(large/name) for name in ('train/small.png', 'train/broken.jpg', 'labels.json'))
    assert "1 that cannot be read linked as they are (first: 'train/broken.jpg'" in capsys.readouterr().out


def test_links_that_lead_nowhere_stay_what_they_are(large, tmp_path, capsys):
    (large/'train'/'gone.jpg').symlink_to(tmp_path/'nowhere.jpg')
    for _ in range(2):
        small = shrink_photos(large, tmp_path/'small', num_workers=0)
        assert (small/'train'/'gone.jpg').is_symlink() and "1 that cannot be read linked as they are (first: 'train/gone.jpg' leads nowhere" in capsys.readouterr().out


def test_a_changed_photo_is_shrunk_anew(large, tmp_path):
    small = shrink_photos(large, tmp_path/'small', num_workers=0)
    first = list_photos(large)[0]
    Image.new('RGB', (1600, 1200), 'red').save(first)
    shrink_photos(large, small, num_workers=0)
    assert open_photo(small/first.relative_to(large)).getpixel((5, 5))[0] > 250


def test_a_small_photo_linked_from_the_originals_is_never_written_to(large, tmp_path):
    p = large/'train'/'tiny.jpg'
    Image.new('RGB', (100, 80)).save(p)
    small = shrink_photos(large, tmp_path/'small', num_workers=0)
    assert (small/'train'/'tiny.jpg').samefile(p)
    Image.new('RGB', (1000, 800), 'blue').save(tmp_path/'new.jpg')
    os.replace(tmp_path/'new.jpg', p)                                            # it was replaced by a large one
    data = p.read_bytes()
    shrink_photos(large, small, num_workers=0)
    assert p.read_bytes() == data and open_photo(small/'train'/'tiny.jpg').size == (600, 480)


def test_dest_is_not_somebody_elses(large, tmp_path):
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'letter.txt').write_text('dear')
    with pytest.raises(DataError, match='mine exists already and is not touched'): shrink_photos(large, tmp_path/'mine')
    with pytest.raises(DataError, match='lies inside'): shrink_photos(large, large/'small')
    shrink_photos(large, tmp_path/'small', num_workers=0)
    with pytest.raises(DataError, match='name another folder'): shrink_photos(large, tmp_path/'small', quality=50, num_workers=0)
