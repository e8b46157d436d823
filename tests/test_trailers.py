"What stands behind a JPEG's picture is no concern of ours: motion photos, second pictures, anything. Pillow's reading is the oracle."
import io
import random
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from resnet_fastai.engine.demo_photos import draw_photo
from resnet_fastai.engine.files import PhotoError
from resnet_fastai.engine.photo import Photo, open_photo

rng = random.Random(0)


def jpeg(i=0, size=(300, 200), **how):
    out = io.BytesIO()
    draw_photo('bricks', np.random.default_rng(i)).resize(size).save(out, 'JPEG', **dict(quality=90) | how)
    return out.getvalue()


def movie(n=30_000): # what Android's motion photos carry
    return (struct.pack('>I4s4sI', 24, b'ftyp', b'mp42', 0) + b'isommp42' + struct.pack('>I4s', n + 8, b'mdat') + rng.randbytes(n)
            + struct.pack('>I4s', 8, b'moov') + b'MotionPhoto_Data')


def trailers():
    whole, end = jpeg(1), b'\xff\xd9'
    yield 'zeros', bytes(3000)
    yield 'text', b'trailer of some phone'
    yield 'a movie', movie()
    yield 'a scan header', b'\xff\xda\x00\x0c\x03'
    yield 'many scan headers', b'\xff\xda'*50
    yield 'an end, then a scan header', end + b'xx\xff\xda'
    yield 'a second picture', whole
    yield 'half a second picture', whole[:len(whole)//2]
    yield 'a second picture without its end', whole[:-2]
    yield 'the start of a picture', b'\xff\xd8'
    yield 'fill bytes', b'\xff'*99
    yield 'another end', end*3
    yield 'a Samsung trailer', b'\x00\x00\x01\x0a\x0e\x00\x00\x00Image_UTC_Data1700000000000SEFHk\x00\x00\x00SEFT'
    for i in range(40): yield f'random {i}', rng.randbytes(rng.randrange(1, 40_000))


@pytest.mark.parametrize('how', [dict(), dict(progressive=True), dict(subsampling=0, restart_marker_blocks=4), dict(optimize=True, exif=b'Exif\0\0' + bytes(99))],
                         ids=['baseline', 'progressive', 'restart markers', 'with EXIF'])
def test_trailers_change_nothing(how):
    whole = jpeg(**how)
    for what, trailer in trailers():
        data = whole + trailer
        with Image.open(io.BytesIO(data)) as img: expected = np.asarray(img.convert('RGB'))          # Pillow takes it; so must we
        assert np.array_equal(np.asarray(open_photo(data)), expected), what
        rgb, f = Photo(data).pixels(16)
        assert f == 8 and rgb.shape[1:] == (25, 38), what
        assert np.array_equal(rgb, Photo(whole).pixels(16)[0]), what


@pytest.mark.parametrize('progressive', [False, True])
def test_a_picture_that_is_cut_is_still_refused(progressive):
    whole = jpeg(progressive=progressive)
    for n in (1, 2, 3, 10, 500, len(whole)//2):
        for side in (None, 16):
            with pytest.raises(PhotoError, match='cut short'): Photo(whole[:-n]).pixels(side)


def test_a_thumbnail_is_not_the_picture():
    thumb, whole = jpeg(2, (60, 40)), jpeg()
    data = whole[:2] + b'\xff\xe1' + (len(thumb) + 8).to_bytes(2, 'big') + b'Thumb\0' + thumb + whole[2:]
    assert open_photo(data + movie()).size == (300, 200)
    for cut in (len(thumb) + 12, len(thumb) + 200, -2, -400):
        with pytest.raises(PhotoError): open_photo(data[:cut])


def test_several_pictures_in_one_file():
    "MPO, as cameras for two eyes and phones with a gain map write it: the first picture, also where the second is broken"
    out = io.BytesIO()
    first, second = (draw_photo('dots', np.random.default_rng(i)).resize((300, 200)) for i in (1, 2))
    first.save(out, 'MPO', save_all=True, append_images=[second], quality=95)
    data = out.getvalue()
    assert Image.open(io.BytesIO(data)).format == 'MPO'
    expected = np.asarray(Image.open(io.BytesIO(data)).convert('RGB'))
    for more in (data, data[:-300], data + b'\xff\xda', data + movie()): assert np.array_equal(np.asarray(open_photo(more)), expected)


# ── Orientations that are none ───────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.filterwarnings('ignore:Metadata Warning')
@pytest.mark.parametrize('format', ['JPEG', 'PNG', 'WEBP'])
@pytest.mark.parametrize('orientation', [0, 1, 6, 9, 13, 255, 65535, b'\x06', b'rotated', (6, 1)])
def test_orientations_that_are_none(format, orientation):
    "As Pillow reads them: 2 to 8 turn the picture, all else leaves it"
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation if isinstance(orientation, int) else 1
    more = exif.tobytes() if isinstance(orientation, int) else odd_exif(orientation)
    draw_photo('dots', np.random.default_rng(0)).resize((300, 200)).save(out, format, exif=more)
    data = out.getvalue()
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert('RGB')
    assert Photo(data).size == expected.size and np.array_equal(np.asarray(open_photo(data)), np.asarray(expected))
    if format == 'JPEG': assert Photo(data).pixels(16)[0].shape[1:] == ((38, 25) if expected.height == 300 else (25, 38))


def odd_exif(value):
    "EXIF whose orientation is of another kind than it should be: bytes, a text, or two numbers"
    kind, n, data = (7, len(value), value) if isinstance(value, bytes) and value[:1] < b' ' else (2, len(value), value) if isinstance(value, bytes) else (
        3, 2, struct.pack('<2H', *value))
    entry = struct.pack('<HHI', 0x0112, kind, n) + (data.ljust(4, b'\0') if len(data) <= 4 else struct.pack('<I', 26))
    return b'Exif\0\0' + b'II*\0\x08\0\0\0' + struct.pack('<H', 1) + entry + bytes(4) + (data if len(data) > 4 else b'')
