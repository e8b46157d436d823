"Photos of a folder, lists of them, class folders, archives and drawn photos."
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from fastcore.foundation import L
from PIL import Image

from resnet_fastai.data import demo_data, from_folders, LabelMap, resolve_data
from resnet_fastai.engine.files import DataError
from resnet_fastai.engine.layout import list_photos, photo_inputs, PhotoList, split_photos
from resnet_fastai.engine.photo import open_photo


def touch(root, *names):
    for name in names:
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        (root/name).write_text(name)


# ── Lists of photos ──────────────────────────────────────────────────────────────────────────────────────────────────────────

few = PhotoList('x', [b'b/1.jpg', 'é "2".jpg'.encode(), b'3.jpg'], [1, 0, -1], ('cat', 'dog'))


def test_a_list_of_photos_is_cut_and_joined_like_one():
    assert list(few) == [Path('x/b/1.jpg'), Path('x/é "2".jpg'), Path('x/3.jpg')] and [p.label for p in few] == ['dog', 'cat', None]
    assert [p.name for p in few[[2, 0]]] == ['3.jpg', '1.jpg'] and [p.label for p in few[1:] + few[:1]] == ['cat', None, 'dog']
    assert list(few[np.array([True, False, True])].texts()) == ['x/b/1.jpg', 'x/3.jpg'] and (len(few[[]]), few[-1].name) == (0, '3.jpg')
    assert LabelMap({}, {'cat': 0})(few[1]) == 'cat'                                             # not asked of the JSON file again


def test_what_somebody_wants_to_be_told_about(tmp_path):
    Image.new('RGB', (4, 3)).save(tmp_path/'1.png')
    assert photo_inputs(tmp_path/'1.png') == ([tmp_path/'1.png'], True) and photo_inputs(b'1') == ([b'1'], True)
    (tmp_path/'pair/b').mkdir(parents=True)
    for name in ('b/1.png', 'c.PNG'): shutil.copy(tmp_path/'1.png', tmp_path/'pair'/name)
    for folder in (tmp_path/'pair', str(tmp_path/'pair')): assert photo_inputs(folder) == ([tmp_path/'pair/b/1.png', tmp_path/'pair/c.PNG'], False)
    for some in (['a', b'b'], ('a', b'b'), L('a', b'b'), few): assert photo_inputs(some) == (some, False)
    for none in ([], few[:0]):
        with pytest.raises(DataError, match='there are no photos in this list'): photo_inputs(none)
    (tmp_path/'pair/d').mkdir()
    with pytest.raises(DataError, match='d holds no photos'): photo_inputs(tmp_path/'pair/d')


def test_splits_are_searched_to_the_bottom(tmp_path):
    touch(tmp_path, 'train/b/2.JPG', 'train/1.jpg', 'train/.hidden.jpg', 'train/notes.txt', 'valid/1.jpg')
    assert [p.relative_to(tmp_path).as_posix() for p in list_photos(tmp_path/'train')] == ['train/1.jpg', 'train/b/2.JPG']
    with pytest.raises(DataError, match='has no folder val/; it has train, valid; class folders become'): split_photos(tmp_path)
    (tmp_path/'val').mkdir()
    with pytest.raises(DataError, match=r'holds no photos .*to the bottom\)$'): split_photos(tmp_path)
    touch(tmp_path, 'val/a/1.CR2', 'val/2.dng', 'val/notes.txt')
    with pytest.raises(DataError, match='; .cr2 and .dng files hold what a camera'): split_photos(tmp_path)


# ── Class folders ────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture
def classes(tmp_path):
    touch(tmp_path/'classes', 'train/dog/1.jpg', 'train/cat/2.jpg', 'validation/cat/2.jpg', 'validation/dog/3.jpg', 'test/unknown.jpg')
    return tmp_path/'classes'


def test_class_folders_become_the_layout(classes, tmp_path):
    paths = from_folders(classes, tmp_path/'laid-out')
    assert json.loads(paths.label_encoding.read_text()) == {'cat': 0, 'dog': 1}
    assert (tmp_path/'laid-out/val/dog/3.jpg').samefile(classes/'validation/dog/3.jpg')          # linked, not copied
    found, labels = split_photos(paths.data_path), LabelMap(*paths[1:])
    assert [labels(p) for s in ('train', 'val') for p in found[s]] == ['cat', 'dog', 'cat', 'dog']
    assert len(set(labels.match(found['train'] + found['val']))) == 4


def test_class_folders_that_are_refused(classes, tmp_path):
    from_folders(classes, tmp_path/'laid-out')
    with pytest.raises(DataError, match='exists already and is not touched'): from_folders(classes, tmp_path/'laid-out')
    with pytest.raises(DataError, match='lies in no class folder'): from_folders(tmp_path/'laid-out/test', tmp_path/'new')
    assert not (tmp_path/'new').exists()


# ── Archives ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture
def zipped(tmp_path):
    "zipped(name, *members): the file URL of an archive that holds them"
    def make(name, *members):
        with zipfile.ZipFile(tmp_path/name, 'w') as z:
            for m in members: z.writestr(m, b'x')
        return (tmp_path/name).resolve().as_uri()
    return make


def test_an_archive_is_unpacked_once(zipped, tmp_path):
    good = zipped('good.zip', 'photos/train/1.jpg', 'photos/val/2.jpg')
    home = resolve_data(good, cache=tmp_path/'cache')
    assert [p.name for p in list_photos(home)] == ['1.jpg', '2.jpg']
    (tmp_path/'good.zip').unlink()
    assert resolve_data(good, cache=tmp_path/'cache') == home


def test_archives_and_addresses_that_are_refused(zipped, tmp_path):
    evil = zipped('evil.zip', '../evil', 'train/1.jpg')
    for source, says in ((evil, r"'\.\./evil' climbs out"), ('https://example.com/photos', 'does not name an archive'),
                         ('ftp://example.com/photos.zip', 'starts with neither'), (tmp_path/'nowhere', 'is not a folder'),
                         ((tmp_path/'no.tgz').resolve().as_uri(), 'cannot be fetched')):
        with pytest.raises(DataError, match=says): resolve_data(source, cache=tmp_path/'cache')
    assert not (tmp_path/'cache/evil').exists() and not (tmp_path/'evil').exists()
    assert not [p for p in (tmp_path/'cache').iterdir() if p.is_dir()]                           # nothing half unpacked is left


# ── Drawn photos ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_a_seed_fixes_every_byte_of_the_drawn_photos(tmp_path):
    one, two = (demo_data(tmp_path/n, sizes=dict(train=24, val=16, test=8)) for n in 'ab')
    names = [p.relative_to(one.data_path) for p in list_photos(one.data_path)]
    assert len(names) == 48 and all((one.data_path/n).read_bytes() == (two.data_path/n).read_bytes() for n in names)
    sizes = {open_photo(one.data_path/n).size for n in names}
    assert len(sizes) > 40 and any(w > h for w, h in sizes) and any(w < h for w, h in sizes)


def test_drawn_photos_touch_no_folder_that_is_there(classes):
    with pytest.raises(DataError, match='exists already'): demo_data(classes)
