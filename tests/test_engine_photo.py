"Photos in every form that `Photo` takes, upright, as Pillow opens them; and what it says of the rest."
import numpy as np
import pytest
from PIL import Image, ImageOps

from resnet_fastai.engine.files import PhotoError
from resnet_fastai.engine.photo import open_photo, Photo


@pytest.fixture
def turned(tmp_path):
    "40×30 with a red top left corner, stored with the note that it has to be turned a quarter to the right"
    img, exif = Image.new('RGB', (40, 30)), Image.Exif()
    img.putpixel((0, 0), (255, 0, 0))
    exif[0x0112] = 6
    img.save(tmp_path/'turned.png', exif=exif)
    return tmp_path/'turned.png'


def test_a_photo_stands_upright(turned):
    assert open_photo(turned).size == Photo(turned).size == open_photo(turned.read_bytes()).size == (30, 40)
    assert open_photo(turned).getpixel((29, 0)) == (255, 0, 0)                                   # the corner is at the top right now


def test_arrays_and_grey_images():
    assert open_photo(Image.new('L', (3, 2), 7)).getpixel((0, 0)) == (7, 7, 7)
    rgb = np.random.default_rng(0).integers(0, 256, (6, 5, 4), np.uint8)
    for given, expected in ((rgb[..., :3], rgb[..., :3]), (rgb[..., 2::-1], rgb[..., 2::-1]), (rgb[..., 0], rgb[..., [0, 0, 0]])):
        assert np.array_equal(np.array(open_photo(given)), expected)
    assert np.array_equal(np.array(open_photo(rgb)), np.array(open_photo(Image.fromarray(rgb, 'RGBA'))))


rgb = np.zeros((6, 5, 4), np.uint8)


@pytest.mark.parametrize('wrong,says', [
    (b'<html>', 'these bytes cannot be read as a photo: not an image, or damaged'), (3, 'this int is not a photo; pass a path, a URL'),
    (rgb[..., :3]/255, 'holds float64; uint8 from 0 to 255 is needed'), *((w, '(height, width, 3) is needed') for w in (rgb[None], rgb[..., :2], rgb[:0], rgb.T)),
    (Image.new('L', (301, 1)), '301×1 pixels: a strip'), ('ftp://example.com/1.jpg', 'starts with neither http:// nor https://'),
    ('http://127.0.0.1:1/1.jpg', 'http://127.0.0.1:1/1.jpg cannot be fetched')], ids=lambda w: w[:30] if isinstance(w, str) else None)
def test_what_is_no_photo(wrong, says):
    with pytest.raises(PhotoError) as e: open_photo(wrong)
    assert says in str(e.value)


def test_a_strip_at_the_limit_is_a_photo(): assert open_photo(Image.new('L', (300, 1))).size == (300, 1)


def test_files_that_are_no_photos_are_named(turned, tmp_path):
    (tmp_path/'cut.png').write_bytes(turned.read_bytes()[:60])
    for name, says in (('cut.png', r"cut\.png' cannot be read as a photo"), ('gone.png', r"gone\.png' does not exist")):
        with pytest.raises(PhotoError, match=says): open_photo(tmp_path/name)
    with pytest.raises(PhotoError, match='is a folder, not a photo'): open_photo(tmp_path)


@pytest.fixture(scope='module')
def wide():
    img = Image.linear_gradient('L').resize((1601, 1203)).convert('RGB')
    img.paste('orange', (300, 200, 900, 1000))
    return img


def test_jpegs_are_decoded_no_finer_than_needed(wide, tmp_path):
    wide.save(tmp_path/'wide.jpg', quality=90)
    assert np.array_equal(np.array(open_photo(tmp_path/'wide.jpg')), np.array(Image.open(tmp_path/'wide.jpg')))
    scales = {side: Photo(tmp_path/'wide.jpg').pixels(side) for side in (50, 100, 101, 267, 268, 534, 535, 2000)}       # the short side is 1203
    assert {side: f for side, (_, f) in scales.items()} == {50: 8, 100: 8, 101: 4, 267: 4, 268: 2, 534: 2, 535: 1, 2000: 1}
    assert scales[100][0].shape == (3, 151, 201) and scales[2000][0].shape == (3, 1203, 1601)


@pytest.mark.parametrize('orientation', range(1, 9))
def test_every_orientation_is_pillows(wide, tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    wide.resize((161, 121)).save(tmp_path/'o.jpg', exif=exif)
    upright = ImageOps.exif_transpose(Image.open(tmp_path/'o.jpg'))
    assert np.array_equal(np.array(open_photo(tmp_path/'o.jpg')), np.array(upright)) and Photo(tmp_path/'o.jpg').size == upright.size


def test_a_jpeg_that_is_cut_short(wide, tmp_path):
    wide.save(tmp_path/'wide.jpg', quality=90)
    (tmp_path/'cut.jpg').write_bytes((tmp_path/'wide.jpg').read_bytes()[:9000])
    for side in (None, 100):
        with pytest.raises(PhotoError, match=r"cut\.jpg' is cut short"): Photo(tmp_path/'cut.jpg').pixels(side)
