"Scale, place, mirroring, colour statistics and lighting of lesson 2: beside torchvision, beside numpy, and by their distributions."
import random

import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from fastai.torch_core import TensorImage, set_seed
from PIL import Image

import answers
from resnet_fastai.augment import (ColorStats, five_boxes, in_proportion, jitter_sides, PCALighting, PhotoNormalize, random_box, resize_short,
                                   ScaleJitterCrop)
from resnet_fastai.engine.demo_photos import draw_photo
from resnet_fastai.engine.fast_crop import short_size
from resnet_fastai.engine.files import DataError, PhotoError
from resnet_fastai.engine.layout import list_photos
from resnet_fastai.engine.photo import Photo
from resnet_fastai.engine.survey import color_moments

published = np.array([.2175, .0188, .0045])              # ImageNet's eigenvalues as widely published, RGB in [0,1]


def drawn_photo(texture, seed, size): return draw_photo(texture, np.random.default_rng(seed)).resize(size)


# ── Scale ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize('w,h', [(500, 375), (375, 500), (333, 333), (641, 97), (97, 641)])
def test_resize_is_torchvisions(w, h):
    img = drawn_photo('zigzag', 1, (w, h))
    for side in (64, 224, 256, 480): assert np.array_equal(np.array(resize_short(img, side)), np.array(TF.resize(img, side)))


def test_jitter_range_keeps_its_ratio_to_the_crop():
    assert jitter_sides(224) == (256, 480) and jitter_sides(112) == (128, 240)
    assert jitter_sides(64, max_side=100) == (73, 100) and jitter_sides(64, min_side=300) == (300, 300)
    assert in_proportion(640, 112) == 320


@pytest.mark.parametrize('bad', [dict(size=224, min_side=200), dict(size=64, max_side=70), dict(size=0)])
def test_a_crop_that_does_not_fit_is_refused(bad):
    with pytest.raises(DataError, match='does not hold'): jitter_sides(**bad)


# ── Place ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_five_boxes_are_torchvisions():
    img = drawn_photo('mesh', 3, (301, 260))
    for ours, theirs in zip(five_boxes(301, 260, 224), TF.five_crop(img, 224), strict=True):
        assert np.array_equal(np.array(img.crop(ours)), np.array(theirs))


def test_every_offset_is_drawn_and_equally_often():
    rng, counts = random.Random(0), {}
    for _ in range(5000): counts[box] = counts.get(box := random_box(14, 12, 10, rng), 0) + 1
    assert set(counts) == {(x, y, x+10, y+10) for x in range(5) for y in range(3)}             # the last ones included
    assert sum((n - 5000/15)**2/(5000/15) for n in counts.values()) < 36                       # χ², 14 degrees of freedom, p > .001


# ── ScaleJitterCrop ──────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.paper('3.4-crop')
@pytest.mark.parametrize('wh', [(500, 375), (301, 640), (256, 256)])
def test_crops_of_a_pil_image_and_of_a_photo(wh):
    tfm, img = ScaleJitterCrop(), drawn_photo('dots', 5, wh)
    theirs = T.Compose([T.Resize(256), T.CenterCrop(224)])(img)
    assert np.array_equal(np.array(tfm(img, split_idx=1)), np.array(theirs))
    assert tfm(img, split_idx=0).size == (224, 224) and tfm(Photo(img), split_idx=0).shape == (3, 224, 224)
    for i in range(10):
        tfm.rng.seed(i); plain = np.array(tfm(img, split_idx=0)).astype(int)
        tfm.rng.seed(i); fast = tfm(Photo(img), split_idx=0).permute(1, 2, 0).numpy()           # the same draws
        assert abs(fast - plain).max() <= 2


@pytest.mark.paper('3.4-scale', '3.4-crop')
def test_scale_place_and_mirror_image_are_uniform():
    tfm = ScaleJitterCrop()
    tfm.rng.seed(0); tfm.before_call(None, 0)
    sides, boxes, mirrored = zip(*(tfm.draw(500, 375) for _ in range(4000)))
    assert (min(sides), max(sides)) == (256, 480) and abs(np.mean(sides) - 368) < 5
    assert 1850 < sum(mirrored) < 2150
    places = [b[0]/(int(side*500/375) - 224) for side, b in zip(sides, boxes)]                 # 0: as far left as can be, 1: as far right
    counts = np.histogram(places, bins=10, range=(0, 1))[0]
    assert ((counts - 400)**2/400).sum() < 28                                                  # χ², 9 degrees of freedom, p > .001


def test_mirroring_is_exact_and_can_be_turned_off():
    img = drawn_photo('checks', 2, (256, 256))
    always, never = (ScaleJitterCrop(256, 256, 256, p_mirror=p) for p in (1, 0))
    assert np.array_equal(np.array(always(img, split_idx=0)), np.array(img)[:, ::-1])
    assert np.array_equal(always(Photo(img), split_idx=0).permute(1, 2, 0).numpy(), np.array(img)[:, ::-1])
    assert all(np.array_equal(np.array(never(img, split_idx=0)), np.array(img)) for _ in range(20))


# ── Colour statistics ────────────────────────────────────────────────────────────────────────────────────────────────────────

bricks = [draw_photo('bricks', np.random.default_rng(i)) for i in range(3)]
pixels = np.concatenate([np.array(im).reshape(-1, 3)/255 for im in bricks])


def test_axes_are_those_of_numpys_covariance():
    stats = ColorStats.from_moments(sum(map(color_moments, bricks)), 3)
    np.testing.assert_allclose(stats.eigvec @ np.diag(stats.eigval) @ stats.eigvec.T, np.cov(pixels.T, bias=True), atol=1e-12)
    np.testing.assert_allclose(((pixels - stats.mean) @ stats.eigvec).var(0), stats.eigval, atol=1e-12)       # an eigenvalue is a variance
    assert (np.diff(stats.eigval) <= 0).all() and all(v[abs(v).argmax()] > 0 for v in stats.eigvec.T)


def test_statistics_of_another_shape_are_refused():
    with pytest.raises(DataError, match=r'need shapes \(3,\), \(3,\) and \(3,3\), not \(1,\)'): ColorStats([.5], [1, 1, 1], np.eye(3))


@pytest.fixture
def folder(tmp_path):
    "Three photos in colour, and the first again in grey"
    for i, im in enumerate([*bricks, bricks[0].convert('L')]): im.save(tmp_path/f'{i}.png')
    return tmp_path


def test_fit_counts_every_pixel_of_colour_and_grey_photos(folder):
    grey = np.repeat(np.array(bricks[0].convert('L')).reshape(-1, 1), 3, 1)/255
    both, stats = np.concatenate([pixels, grey]), ColorStats.fit(list_photos(folder), num_workers=0)
    np.testing.assert_allclose(stats.mean, both.mean(0), atol=1e-12)
    np.testing.assert_allclose(stats.eigval, np.linalg.eigvalsh(np.cov(both.T, bias=True))[::-1], atol=1e-12)
    assert np.array_equal(ColorStats.fit(list_photos(folder), num_workers=2).eigval, stats.eigval)


def test_fit_names_photos_that_cannot_be_read(folder, capsys):
    (folder/'9.png').write_text('not a photo')
    says = r"9\.png' cannot be read as a photo: not an image, or damaged \(1 of 5 photos\)"
    with pytest.raises(PhotoError, match=says): ColorStats.fit(list_photos(folder))
    assert ColorStats.fit(list_photos(folder), on_bad='skip').n_photos == 4
    assert 'left out 1 of 5 photos that cannot be read' in capsys.readouterr().out
    with pytest.raises(PhotoError, match='there is none'): ColorStats.fit([])


def test_saved_statistics_come_back(tmp_path):
    stats = ColorStats.from_moments(sum(map(color_moments, bricks)), 3)
    stats.save(tmp_path/'stats.json')
    again = ColorStats.load(tmp_path/'stats.json')
    for name in ('mean', 'eigval', 'eigvec', 'n_photos'): assert np.array_equal(getattr(again, name), getattr(stats, name))


def test_a_file_without_statistics_is_named(tmp_path):
    (tmp_path/'other.json').write_text('{"mean": 3}')
    with pytest.raises(DataError, match=r'other\.json holds no colour statistics'): ColorStats.load(tmp_path/'other.json')
    with pytest.raises(DataError, match=r'none\.json cannot be read'): ColorStats.load(tmp_path/'none.json')


# ── Lighting and normalisation ───────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.paper('3.4-colour')
def test_shifts_have_the_size_that_the_formula_gives_them():
    "A rotation that is not symmetric: a transposed matrix would fail"
    axes = np.linalg.qr(np.array([[1, 2, 3], [1, -1, 5], [1, 0, -2.]]))[0]
    set_seed(7)
    along = PCALighting(ColorStats([.5]*3, published, axes)).shift(100_000).numpy() @ axes        # how far along each axis
    np.testing.assert_allclose(along.std(0)/(.1*published), np.ones(3), atol=.02)
    np.testing.assert_allclose(np.corrcoef(along.T), np.eye(3), atol=.02)
    np.testing.assert_allclose(along.mean(0), np.zeros(3), atol=3e-4)


@pytest.mark.paper('3.4-colour')
def test_one_shift_a_photo_in_training_only():
    light, x = PCALighting(ColorStats([.5]*3, published, np.eye(3))), TensorImage(torch.rand(4, 3, 8, 6))
    set_seed(1); a = light(x, split_idx=0)
    set_seed(1); b = light(x, split_idx=0)
    assert torch.equal(a, b) and torch.equal(light(x, split_idx=1), x)                            # repeatable
    moved = torch.Tensor(a - x).flatten(2)
    assert moved.std(2).max() < 1e-6 and len(set(moved[:, 0, 0].tolist())) == 4                   # one for a photo, another for the next


@pytest.mark.paper('3.4-mean')
def test_normalisation_is_division_lighting_and_mean():
    stats = ColorStats.from_moments(sum(map(color_moments, bricks)), 3)
    tfm, x = PhotoNormalize(stats), TensorImage(torch.randint(0, 256, (5, 3, 8, 6), dtype=torch.uint8))
    mean, close = torch.tensor(stats.mean, dtype=torch.float32)[:, None, None], lambda a, b: torch.allclose(torch.Tensor(a), torch.Tensor(b), atol=1e-6)
    assert close(tfm(x, split_idx=1), x/255 - mean)
    set_seed(4); lit = PCALighting(stats)(TensorImage(x/255), split_idx=0) - mean
    set_seed(4); assert close(tfm(x, split_idx=0), lit) and not close(lit, x/255 - mean)
    assert close(tfm.decode(tfm(x, split_idx=1)), x/255)
    assert x.dtype == torch.uint8 and close(PhotoNormalize(stats, std=0)(x, split_idx=0), x/255 - mean)


# ── The lesson's answers ─────────────────────────────────────────────────────────────────────────────────────────────────────

def test_the_answers_of_the_lesson_are_true():
    "Their values, and the crop of exercise 1 is ours"
    names = dict(Image=Image, random=random, short_size=short_size, ColorStats=ColorStats, color_moments=color_moments, photo=bricks[0])
    assert answers.run('02_augment.ipynb', names, 'def n_crops(') == 3
    for size in ((500, 375), (375, 500)):
        img = drawn_photo('rings', 4, size)
        for side in (256, 333, 480):
            resized = resize_short(img, side)
            theirs = names['my_crop'](img, side, rng=random.Random(side))
            assert np.array_equal(np.array(theirs), np.array(resized.crop(random_box(*resized.size, 224, random.Random(side)))))
