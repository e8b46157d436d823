"Photos as iPhones keep them. The oracle is Pillow, reading the same picture from a PNG."
import io
import sys

import numpy as np
import pytest
from PIL import Image, ImageOps

from resnet_fastai.data import from_folders, resnet_dls
from resnet_fastai.engine import photo
from resnet_fastai.engine.demo_photos import draw_photo
from resnet_fastai.engine.files import PhotoError
from resnet_fastai.engine.photo import Photo, open_photo
from resnet_fastai.practice.prepare import check_data


def drawn(label='bricks', seed=0): return draw_photo(label, np.random.default_rng(seed)).resize((96, 64))


def heic(img, **how):
    "The bytes of a HEIC file; encoding needs no opener of Pillow's"
    pillow_heif = pytest.importorskip('pillow_heif', reason="needs pillow-heif: pip install -e '.[heic]'")
    out = io.BytesIO()
    pillow_heif.from_pillow(img).save(out, quality=95, **how)
    return out.getvalue()


@pytest.mark.parametrize('orientation', range(1, 9))
def test_a_photo_is_upright_and_has_its_colours(orientation):
    img, exif, png = Image.new('RGB', (96, 64), (255, 140, 0)), Image.Exif(), io.BytesIO()
    img.paste((0, 0, 255), (0, 0, 32, 16))                              # no two of the eight look alike
    exif[0x0112] = orientation
    img.save(png, 'PNG', exif=exif)
    expected = ImageOps.exif_transpose(Image.open(png)).convert('RGB')
    data = heic(img, exif=exif.tobytes())
    assert Photo(data).size == open_photo(data).size == expected.size
    assert np.abs(np.asarray(open_photo(data)).astype(int) - np.asarray(expected)).mean() < 4


def test_what_is_cut_short_is_refused():
    data = heic(drawn())
    for at in range(12, len(data), max(1, len(data)//40)):
        with pytest.raises(PhotoError, match='cannot be read as a photo'): open_photo(data[:at])


def test_the_limit_of_pixels_holds(monkeypatch):
    data = heic(drawn())
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 96*64//2 - 1)
    with pytest.raises(PhotoError, match='these bytes are too large to be a photo'): open_photo(data)


def test_a_folder_of_them_is_checked_and_trained_on(tmp_path):
    for label in ('dots', 'rings'):
        (tmp_path/'heap'/label).mkdir(parents=True)
        for i in range(8): (tmp_path/'heap'/label/f'IMG_{i}.HEIC').write_bytes(heic(drawn(label, i)))
    paths = from_folders(tmp_path/'heap', tmp_path/'laid')
    assert not len(check_data(*paths))
    x, y = resnet_dls(*paths, size=32, micro_bs=4, num_workers=0, n_out=None).one_batch()
    assert tuple(x.shape) == (4, 3, 32, 32) and set(y.tolist()) <= {0, 1}


@pytest.mark.parametrize('name', ['a.heic', 'b.HEIF', 'c.JPG', "it's \"one\".heic", 'd.png'])
def test_what_is_missing_is_named_whatever_the_file_is_called(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, 'pillow_heif', None)
    monkeypatch.setattr(photo, '_heic_opener', lambda: None)
    (tmp_path/name).write_bytes(b'\0\0\0\x18ftypheic\0\0\0\0mif1heic' + bytes(2000))
    with monkeypatch.context() as m:                                    # as if no other test had taught Pillow to read it
        for of_pillow in (Image.OPEN, Image.ID): m.setattr(Image, 'OPEN' if of_pillow is Image.OPEN else 'ID', without_heif(of_pillow))
        with pytest.raises(PhotoError, match=r'HEIC file.*pip install "resnet_fastai\[heic\]"'): open_photo(tmp_path/name)
    (tmp_path/name).write_bytes(b'no picture at all')
    with pytest.raises(PhotoError, match='not an image, or damaged'): open_photo(tmp_path/name)


def without_heif(known):
    if isinstance(known, dict): return {k: v for k, v in known.items() if k != 'HEIF'}
    return [k for k in known if k != 'HEIF']
