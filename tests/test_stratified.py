"A heap of photos becomes an honest test: every class alike, groups and copies whole, small classes named."
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resnet_fastai.data import DataError, from_folders, split_photos
from resnet_fastai.engine.stratified import copies, draw, draw_folds, name_keys, pieces
from resnet_fastai.practice.exports import from_export
from resnet_fastai.practice.tables import from_csv

splits = ('train', 'val', 'test')


def tree(root, *paths, same=()):
    "Photos, all different but those of `same`"
    for i, p in enumerate(paths):
        (root/p).parent.mkdir(parents=True, exist_ok=True)
        rgb = np.random.default_rng(0 if p in same else i+1).integers(0, 256, (24, 40, 3), dtype=np.uint8)
        Image.fromarray(rgb).save(root/p)
    return root


def heap(root, same=(), **amounts): return tree(root, *(f'{c}/{c}_{i}.png' for c, n in amounts.items() for i in range(n)), same=same)


def names(paths): return {s: {p.relative_to(paths.data_path/s).as_posix() for p in split_photos(paths.data_path)[s]} for s in splits}
def classes(names): return Counter(n.split('/')[0] for n in names)


# ── Drawing ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize('val,test', [(.2, 0), (.25, .25), (.3, .1), (.05, 0), (.5, .3)])
def test_every_class_gives_its_share(val, test):
    y = np.repeat(np.arange(4), [400, 200, 40, 200])
    found = draw(y, np.arange(len(y)), val, test, seed=3)
    for c in range(4):
        n, of = (y == c).sum(), Counter(found[y == c])
        assert abs(of['val'] - val*n) <= .025*n + 1 and abs(of['test'] - test*n) <= .025*n + 1, (c, of)


@pytest.mark.parametrize('seed', range(6))
def test_no_piece_is_cut_and_no_class_loses_its_last(seed):
    rng = np.random.default_rng(seed)
    y, piece = rng.integers(0, 6, 300), rng.integers(0, 60, 300)
    piece[:6], y[:6] = 1000 + np.arange(6), np.arange(6)
    y[0], y[6], piece[6] = 6, 7, 2000                                      # classes of one photo
    _, y = np.unique(y, return_inverse=True)
    found = draw(y, piece, .2, .1, seed)
    for p in set(piece.tolist()): assert len({*found[piece == p]}) == 1
    assert {*y[found == 'train']} == {*y} and abs((found == 'val').mean() - .2) < .06 and abs((found == 'test').mean() - .1) < .06
    assert (draw(y, piece, .2, .1, seed) == found).all() and (draw(y, piece, .2, .1, seed+1) != found).any()
    folds = draw_folds(y, piece, 5, 0, seed)
    assert (sum((f == 'val').astype(int) for f in folds) <= 1).all() and sum((f == 'val').sum() for f in folds) > 285
    for f in folds:
        assert {*y[f == 'train']} == {*y}
        for p in set(piece.tolist()): assert len({*f[piece == p]}) == 1


def test_pieces_are_joined_through_others():
    found = pieces(['a', 'a', None, 'b', None, 'c'], [1, None, 2, 2, None, 'a'])
    assert found[0] == found[1] and found[2] == found[3] and len(set(found.tolist())) == 4      # a key of one column is none of another


def test_the_draw_does_not_depend_on_how_classes_are_called():
    "Stratified as scikit-learn's shuffled splits without groups are: the shares of each class differ by one photo at the most"
    y = np.random.default_rng(1).choice(5, 500, p=[.5, .3, .1, .06, .04])
    parts = np.array([[(y[f == 'val'] == c).sum() for c in range(5)] for f in draw_folds(y, np.arange(500), 5)])
    assert (np.ptp(parts, axis=0) <= 1).all()


# ── Copies ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_copies_are_the_same_pixels_in_any_file(tmp_path):
    tree(tmp_path, 'a.png', 'b.png', 'c.png')
    a, turned = Image.open(tmp_path/'a.png'), Image.Exif()
    turned[0x0112] = 6
    a.save(tmp_path/'a.bmp')
    a.transpose(Image.Transpose.ROTATE_90).save(tmp_path/'turned.tiff', exif=turned)
    shutil.copy(tmp_path/'b.png', tmp_path/'b2.png')
    a.save(tmp_path/'lossy.jpg', quality=60)
    Image.new('RGB', (24, 41)).save(tmp_path/'other.png')
    (tmp_path/'broken.jpg').write_bytes(b'no photo')
    (tmp_path/'broken2.jpg').write_bytes(b'no photo')
    order = ['a.png', 'a.bmp', 'turned.tiff', 'b.png', 'b2.png', 'c.png', 'lossy.jpg', 'other.png', 'broken.jpg', 'broken2.jpg']
    key = dict(zip(order, copies([tmp_path/n for n in order], 0)))
    assert key['a.png'] == key['a.bmp'] == key['turned.tiff'] and key['b.png'] == key['b2.png'] and key['broken.jpg'] == key['broken2.jpg']
    assert len(set(key.values())) == 6 and key['other.png'] is None


# ── Class folders ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_class_folders_without_splits(tmp_path, capsys):
    same = ('cat/cat_0.png', 'cat/cat_5.png', 'dog/dog_3.png')
    src = heap(tmp_path/'src', cat=20, dog=10, emu=2, fox=1, same=same)
    got = names(from_folders(src, tmp_path/'dest'))
    said = capsys.readouterr().out
    assert sum(map(len, got.values())) == 33 and not got['test'] and {**classes(got['val'])}.keys() <= {'cat', 'dog', 'emu'}
    assert 3 <= classes(got['val'])['cat'] <= 5 and classes(got['val'])['dog'] in (1, 2, 3) and 'fox/fox_0.png' in got['train']
    assert sum(len({*same} & got[s]) == 3 for s in splits) == 1
    assert 'classes with one or two photos: emu (2), fox (1)' in said and 'without a validation photo: ' in said
    assert "2 photos are copies of others" in said and "copies with different labels: cat/cat_0.png is 'cat', dog/dog_3.png is not" in said
    assert names(from_folders(src, tmp_path/'again')) == got != names(from_folders(src, tmp_path/'other', seed=1))
    assert json.loads((tmp_path/'dest/encoding.json').read_text()) == dict(cat=0, dog=1, emu=2, fox=3)


def test_frames_of_a_scene_stay_together(tmp_path, capsys):
    frames = [f'{c}/scene{k:02}_{i}.png' for k, c in enumerate(['cat', 'dog']*8) for i in range(4)] + ['cat/alone.png']
    got = names(from_folders(tree(tmp_path/'src', *frames), tmp_path/'dest', val=.25, test=.25, group=r'scene(\d+)'))
    for k in range(16): assert len([s for s in splits if any(f'scene{k:02}' in n for n in got[s])]) == 1
    assert {s: len(got[s]) for s in ('val', 'test')} == dict(val=16, test=16) and '16 groups' in capsys.readouterr().out
    assert classes(got['val']) == classes(got['test']) == dict(cat=8, dog=8)


def test_five_folds(tmp_path):
    src = heap(tmp_path/'src', cat=10, dog=15)
    found = [names(p) for p in from_folders(src, tmp_path/'dest', folds=5)]
    assert len(found) == 5 and sorted(n for f in found for n in f['val']) == sorted(n for s in splits for n in found[0][s])
    for f in found: assert classes(f['val']) == dict(cat=2, dog=3) and len(f['train']) == 20
    assert sorted(p.name for p in (tmp_path/'dest').iterdir()) == [f'fold{k}' for k in range(1, 6)]


def test_only_training_folders_give_validation_photos(tmp_path):
    src = tree(tmp_path/'src', *(f'train/{c}/{i}.png' for c in ('cat', 'dog') for i in range(10)), 'test/cat/x.png')
    got = names(from_folders(src, tmp_path/'dest'))
    assert classes(got['val']) == dict(cat=2, dog=2) and got['test'] == {'cat/x.png'}
    with pytest.raises(DataError, match='has test photos already'): from_folders(src, tmp_path/'no', test=.1)
    assert not (tmp_path/'no').exists() and sorted(p.name for p in tmp_path.iterdir()) == ['dest', 'src']


@pytest.mark.parametrize('kind', ['zip', 'gztar'])
def test_an_archive_of_class_folders(tmp_path, kind):
    heap(tmp_path/'src/photos', cat=5, dog=5)
    (tmp_path/'src/__MACOSX').mkdir()
    made = lambda: Path(shutil.make_archive(str(tmp_path/'made'), kind, tmp_path/'src'))
    assert classes(names(from_folders(made(), tmp_path/'dest'))['val']) == dict(cat=1, dog=1)
    heap(tmp_path/'src/photos', cat=5, dog=5, emu=5)
    assert {*classes(names(from_folders(made(), tmp_path/'new'))['val'])} == {'cat', 'dog', 'emu'}           # the archive of now
    assert {*classes(names(from_folders(made().as_uri(), tmp_path/'url'))['val'])} == {'cat', 'dog', 'emu'}


@pytest.mark.parametrize('kwargs,says', [
    (dict(group='('), "'\\(' is no regular expression"), (dict(group='zebra'), "'zebra' matches none of the 20 names .* 'cat/cat_0.png'"),
    (dict(group='_'), 'no class with two photos that may lie in different splits'),
    (dict(folds=1), 'folds is 1'), (dict(folds=11), 'folds is 11, but no class'), (dict(val=0), 'val is 0'), (dict(val=.7, test=.3), 'leave photos to train on'),
    (dict(test='.1'), "test is '.1'")])
def test_what_cannot_be_drawn(tmp_path, kwargs, says):
    heap(tmp_path/'src', cat=10, dog=10)
    with pytest.raises(DataError, match=says): from_folders(tmp_path/'src', tmp_path/'dest', **kwargs)
    assert [p.name for p in tmp_path.iterdir()] == ['src']


@pytest.mark.parametrize('paths,kwargs,says', [
    (('Train_images/cat/1.png', 'val images/cat/2.png'), {}, 'look like splits; call them train/'),
    (('test/cat/1.png', 'cat/2.png'), {}, 'has no folder train/ or training/ beside test/'),
    (('photos/cat/1.png', 'photos/dog/2.png'), {}, 'one class folder, photos/, with cat, dog in it'),
    (('1.png', '2.png'), {}, 'lies in no class folder; .*in a CSV, which from_csv reads'),
    (('train/cat/1.png', 'train/dog/2.png', 'val/cat/3.png'), dict(folds=5), 'has its own val/, so that nothing is drawn; .*draw from .*train alone')])
def test_folders_that_mean_something_else(tmp_path, paths, kwargs, says):
    with pytest.raises(DataError, match=says): from_folders(tree(tmp_path/'src', *paths), tmp_path/'dest', **kwargs)
    assert not (tmp_path/'dest').exists()


# ── Tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture
def table(tmp_path):
    "A flat folder of 40 photos of 10 patients, and a CSV"
    tree(tmp_path/'flat', *(f'{i}.png' for i in range(40)))
    rows = [f'{i}.png,{"ill" if i % 3 else "well"},p{i//4}' for i in range(40)]
    (tmp_path/'flat/list.csv').write_text('\n'.join(['image,finding,patient_id', *rows]))
    return tmp_path/'flat/list.csv'


def test_patients_stay_in_one_split(table, tmp_path):
    got = names(from_csv(table, tmp_path/'dest', val=.2, test=.2, group='patient_id'))                       # and it is no column of labels
    patients = {s: {int(n.split('.')[0])//4 for n in got[s]} for s in splits}
    assert [len(patients[s]) for s in splits] == [6, 2, 2] and len(set.union(*patients.values())) == 10
    assert json.loads((tmp_path/'dest/encoding.json').read_text()) == dict(ill=0, well=1)
    found = [names(p) for p in from_csv(table, tmp_path/'folds', folds=5, group='patient_id')]
    assert sorted(n for f in found for n in f['val']) == sorted(f'{i}.png' for i in range(40))
    by_name = names(from_csv(table, tmp_path/'names', label_col='finding', group=r'^(\d)\d\.'))              # tens stay together
    for tens in '123': assert sum(any(n[0] == tens and len(n) == 6 for n in by_name[s]) for s in splits) == 1


def test_what_a_table_says_itself_is_not_drawn(table, tmp_path):
    table.write_text(table.read_text().replace('patient_id', 'split').replace(',p0', ',val').replace(',p', ',train#').replace('#', ''))
    text = '\n'.join(line if line[-1].isalpha() else line.rstrip('0123456789') for line in table.read_text().splitlines())
    table.write_text(text)
    assert len(names(from_csv(table, tmp_path/'own'))['val']) == 4
    with pytest.raises(DataError, match="which photos are for validation, in the column 'split'; leave out val="): from_csv(table, tmp_path/'dest', val=.2)


def test_a_name_that_is_neither_column_nor_pattern(table, tmp_path):
    with pytest.raises(DataError, match="group='patient' matches none of the 40 names"): from_csv(table, tmp_path/'dest', label_col='finding', group='patient')


def test_an_export_is_drawn_the_same_way(tmp_path):
    names_ = [f'scene{k}_{i}.png' for k in range(10) for i in range(3)]
    tree(tmp_path/'src', *names_)
    tasks = [dict(data=dict(image=f'/data/{n}'), annotations=[dict(result=[dict(type='choices', value=dict(choices=['cat' if int(n[5]) % 2 else 'dog']))])]) for n in names_]
    (tmp_path/'src/export.json').write_text(json.dumps(tasks))
    got = names(from_export(tmp_path/'src/export.json', tmp_path/'dest', group=r'scene\d+'))
    assert len(got['val']) == 6 and len({n.split('_')[0] for n in got['val']}) == 2 == len({int(n[5]) % 2 for n in got['val']})
    assert len(from_export(tmp_path/'src/export.json', tmp_path/'folds', folds=3)) == 3
    tree(tmp_path/'split', 'train/a.png', 'train/b.png', 'valid/c.png')
    for s, rows in dict(train='a.png,1,0\nb.png,0,1', valid='c.png,1,0').items(): (tmp_path/'split'/s/'_classes.csv').write_text(f'filename,x,y\n{rows}\n')
    with pytest.raises(DataError, match='has validation photos of its own, so that nothing is drawn'): from_export(tmp_path/'split', tmp_path/'no', val=.2)


def test_real_photos(clothing, tmp_path):
    got = names(from_folders(clothing/'train', tmp_path/'dest', test=.1))
    assert set(classes(got['val']).values()) == {8} and set(classes(got['test']).values()) == {4} and len(got['train']) == 280


def test_keys_are_the_groups_of_a_pattern():
    assert name_keys(['a1_x', 'a2_x', 'b'], r'([a-z])\d_(.)', 'here') == [('a', 'x'), ('a', 'x'), None]
    assert name_keys(['a1', 'b1', 'c2'], r'\d', 'here') == ['1', '1', '2']
