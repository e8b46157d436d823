"Photos that are nearly the same are found across splits, and different ones are left alone."
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from resnet_fastai.data import demo_data, from_folders
from resnet_fastai.engine import near
from resnet_fastai.engine.layout import list_photos
from resnet_fastai.engine.photo import open_photo, Photo
from resnet_fastai.practice.prepare import check_data

root = Path(__file__).resolve().parent.parent


def landscape(seed, side=240):
    "Smooth noise: as much of each size of detail as photographs have"
    rng = np.random.default_rng(seed)
    layers = [np.asarray(Image.fromarray(rng.normal(size=(n, n)).astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC))/n**.5 for n in (3, 6, 12, 24, 60)]
    x = sum(layers)
    return Image.fromarray(((x - x.min())/np.ptp(x)*255).astype(np.uint8)).convert('RGB')


def small(*images): return np.stack([near.small_grey(im) for im in images])
def pairs(a, b): return {(i, j) for i, j, _ in near.near_pairs(a, b)}


def test_the_hash_is_that_of_the_cosine_transform():
    x = small(landscape(1))[0].astype(float)
    k, n = np.arange(8)[:, None], np.arange(16)[None]
    cos = np.cos(np.pi*(2*n + 1)*k/32)                                     # DCT-II by its formula
    low = (cos @ x @ cos.T).ravel()
    low[0] = 0
    assert (near.hash_bits(x[None].astype(np.uint8))[0] == np.where(low > np.median(low), 1, -1)).all()


def test_small_copies_are_area_averages():
    rgb = np.random.default_rng(0).integers(0, 256, (160, 320), dtype=np.uint8)
    expected = rgb.reshape(16, 10, 16, 20).mean((1, 3))
    assert abs(near.small_grey(Image.fromarray(rgb).convert('RGB')).astype(float) - expected).max() <= 1


def test_a_photo_and_its_pixels_have_the_same_copy(tmp_path):
    landscape(2).save(tmp_path/'a.jpg', quality=95)
    tensor = Photo(tmp_path/'a.jpg').pixels()[0]
    assert not isinstance(tensor, Image.Image) and (near.small_grey(tensor) == near.small_grey(open_photo(tmp_path/'a.jpg'))).all()


@pytest.mark.parametrize('edit', [
    lambda im: im.resize((50, 50)), lambda im: im.resize((300, 150)), lambda im: im.convert('L').convert('RGB'), lambda im: ImageEnhance.Contrast(im).enhance(.7),
    lambda im: im.transpose(Image.Transpose.FLIP_LEFT_RIGHT), lambda im: im.crop((2, 2, 238, 238))])
def test_edited_copies_are_found_and_others_are_not(edit):
    own = [landscape(i) for i in range(40)]
    assert pairs(small(*own), small(*map(edit, own))) == {(i, i) for i in range(40)}


def test_pairs_are_those_of_brute_force(monkeypatch):
    monkeypatch.setattr(near, 'least_likeness', .8)
    monkeypatch.setattr(near, 'most_bits', 16)
    base = [landscape(i) for i in range(12)]
    a, b = small(*base, *(Image.blend(base[0], base[k], .3) for k in range(1, 9))), small(*(Image.blend(base[k], base[0], .4) for k in range(9)))
    def like(x, y): return np.corrcoef(x.ravel().astype(float), y.ravel().astype(float))[0, 1]
    def bits(x, y): return (near.hash_bits(x[None]) != near.hash_bits(y[None])).sum()
    expected = {(i, j) for i, x in enumerate(a) for j, y in enumerate(b) for z in (y, y[:, ::-1]) if bits(x, z) <= 16 and like(x, z) >= .8}
    assert 10 < len(expected) < len(a)*len(b) and pairs(a, b) == expected
    assert {(i, j) for i, j, _ in near.near_pairs(a, b, most=3*len(b))} == expected


def test_plain_photos_are_like_nothing():
    plain = [Image.new('RGB', (40, 40), (c, c, c)) for c in (0, 90, 255)] + [Image.fromarray(np.full((64, 64), 99, np.uint8) + np.eye(64, dtype=np.uint8)).convert('RGB')]
    assert not pairs(small(*plain), small(*plain)) and not pairs(small(*plain)[:0], small(*plain))


def test_the_likest_of_an_earlier_split_is_told():
    a, b = landscape(1), landscape(2)
    splits = dict(train=small(a.crop((3, 3, 237, 237)), b, a), val=small(b.resize((99, 70))), test=small(landscape(3), a))
    assert [(s, j, o, i) for s, j, o, i, _ in near.nearest(splits)] == [('val', 0, 'train', 1), ('test', 1, 'train', 2)]


def test_check_data_tells_of_them(tmp_path):
    for k in range(8):
        for split in ('train', 'val'):
            (path := tmp_path/'src'/split/'ab'[k % 2]/f'{k}.jpg').parent.mkdir(parents=True, exist_ok=True)
            landscape(k + 50*(split == 'val')).save(path, quality=90)
    landscape(3).transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((100, 80)).save(tmp_path/'src/val/b/copy.png')
    found = check_data(*from_folders(tmp_path/'src', tmp_path/'dest'), num_workers=0)
    assert found.problem.tolist() == ['nearly the same photo in two splits'] and found.photo[0] == 'val/b/copy.png'
    assert found.detail[0].startswith('like train/b/3.jpg (0.9') or found.detail[0] == 'like train/b/3.jpg (1.00)'


def test_drawn_photos_raise_no_alarm(tmp_path):
    "Textures repeat themselves, more than photographs do"
    paths = demo_data(tmp_path/'drawn', sizes=dict(train=60, val=30, test=20))
    copies = small(*map(open_photo, list_photos(paths.data_path)))
    assert not {(i, j) for i, j in pairs(copies, copies) if i < j}


def test_real_photos_raise_no_alarm(photos):
    copies = small(*map(open_photo, list_photos(photos)))
    assert not {(i, j) for i, j in pairs(copies, copies) if i < j}


def test_what_was_measured_is_what_is_used():
    stored = json.loads((root/'nbs/experiments/results/near_duplicates.json').read_text())
    assert (stored['most_bits'], stored['least_likeness']) == (near.most_bits, near.least_likeness)
    assert stored['photographs']['pairs'] == stored['cifar10']['of_different_classes'] == 0 < stored['cifar10']['pairs']
