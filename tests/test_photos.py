"""Photos as people have them: every kind of file, every name, and files that are not whole. What is expected comes from Pillow, from
how the picture was made, or from the plain way of doing it."""
import io
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.data.core import TfmdDL
from fastai.torch_core import set_seed
from PIL import Image, ImageOps, features

from resnet_fastai.augment import ColorStats, ScaleJitterCrop, five_boxes, random_box, resize_short
from resnet_fastai.engine.fast_crop import crop_photo, short_size
from resnet_fastai.data import labelled_photos, LabelMap, resnet_dls
from resnet_fastai.engine.demo_photos import draw_photo
from resnet_fastai.engine.files import DataError, LabelError, PhotoError
from resnet_fastai.engine.layout import list_photos
from resnet_fastai.engine.photo import Photo, open_photo

orange, blue = (255, 140, 0), (0, 0, 255)


@pytest.fixture
def picture():
    "Orange, 60 wide and 40 high, with a blue corner at the top left"
    img = Image.new('RGB', (60, 40), orange)
    img.paste(blue, (0, 0, 20, 20))
    return img


def saved(img, format, **kwargs):
    out = io.BytesIO()
    img.save(out, format, **kwargs)
    return out.getvalue()


def near(rgb, expected, most=6): return np.abs(np.subtract(rgb, expected)).max() <= most


def shows(data, size=(60, 40), corner=blue, middle=orange, most=6):
    rgb = open_photo(data)
    return (rgb.mode, rgb.size) == ('RGB', size) and near(rgb.getpixel((2, 2)), corner, most) and near(rgb.getpixel((size[0]//2, size[1]//2)), middle, most)


# ── Kinds of files ───────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize('how', [dict(format='PNG'), dict(format='BMP'), dict(format='TIFF'), dict(format='TIFF', compression='tiff_lzw'), dict(format='GIF'),
                                 dict(format='WEBP', lossless=True), dict(format='PPM'), dict(format='TGA'), dict(format='JPEG', quality=100, subsampling=0),
                                 dict(format='JPEG', quality=100, subsampling=0, progressive=True), dict(format='JPEG', quality=95), dict(format='MPO', quality=100),
                                 dict(format='AVIF', quality=100)], ids=lambda h: ' '.join(map(str, h.values())))
def test_everyday_formats(picture, how):
    if how['format'] == 'AVIF' and not features.check('avif'): pytest.skip('this Pillow cannot read AVIF')
    assert shows(saved(picture, **how), most=6 if how.get('subsampling') == 0 or how['format'] not in ('JPEG', 'MPO', 'AVIF') else 12)


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P'])
def test_what_is_transparent_becomes_white(picture, mode):
    clear = picture.convert('RGBA')
    clear.paste((9, 9, 9, 0), (0, 0, 20, 20))
    if mode == 'P': data = saved(picture.quantize(2), 'PNG', transparency=picture.quantize(2).getpixel((0, 0)))
    else: data = saved(clear.convert(mode), 'PNG')
    grey = round(.299*255 + .587*140)
    assert shows(data, corner=(255, 255, 255), middle=(grey,)*3 if mode == 'LA' else orange)


def test_half_transparent_is_mixed_with_white():
    assert near(open_photo(Image.new('RGBA', (4, 4), (255, 0, 0, 51))).getpixel((0, 0)), (255, 204, 204), 1)


@pytest.mark.parametrize('format', ['PNG', 'TIFF'])
@pytest.mark.parametrize('value', [0, 255, 256, 1000, 40000, 65535])
def test_sixteen_bits_are_scaled_and_not_clipped(format, value):
    assert open_photo(saved(Image.fromarray(np.full((5, 7), value, np.uint16)), format)).getpixel((0, 0)) == (value*255//65535,)*3 or \
           open_photo(saved(Image.fromarray(np.full((5, 7), value, np.uint16)), format)).getpixel((0, 0)) == (value >> 8,)*3


def test_pixels_whose_white_nobody_knows_are_refused():
    with pytest.raises(PhotoError, match='32-bit fractions'): open_photo(saved(Image.fromarray(np.random.rand(4, 4).astype(np.float32)), 'TIFF'))
    with pytest.raises(PhotoError, match='32 bits'): open_photo(saved(Image.fromarray(np.full((4, 4), 1 << 20, np.int32)), 'TIFF'))


def test_printers_colours(picture):
    "CMYK; and YCCK, which is the same file with another meaning of its four planes"
    cmyk = saved(picture.convert('CMYK'), 'JPEG', quality=100, subsampling=0)
    assert shows(cmyk, most=8)
    y, cb, cr = np.moveaxis(np.array(ImageOps.invert(picture).convert('YCbCr')), 2, 0)     # Adobe turns all values round
    planes = Image.merge('CMYK', [Image.fromarray(255 - p) for p in (y, cb, cr)] + [Image.new('L', picture.size, 0)])
    data = bytearray(saved(planes, 'JPEG', quality=100, subsampling=0))
    at = data.index(b'Adobe') + 11                                               # the byte that says how the planes were made: 0 CMYK, 2 YCCK
    assert data[at] == 0
    data[at] = 2
    assert np.array_equal(np.array(open_photo(bytes(data))), np.array(Image.open(io.BytesIO(bytes(data))).convert('RGB')))
    assert shows(bytes(data), most=8)


@pytest.mark.parametrize('format', ['GIF', 'WEBP', 'TIFF', 'PNG'])
def test_the_first_picture_of_several(picture, format):
    more = dict(save_all=True, append_images=[Image.new('RGB', (60, 40), 'black')]*2)
    assert shows(saved(picture, format, **more, **(dict(lossless=True) if format == 'WEBP' else {})))


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('size', [(60, 40), (1600, 1200)])
def test_exif_turns_pixels_and_size(picture, orientation, size):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for format in ('JPEG', 'PNG', 'WEBP', 'TIFF'):
        data = saved(picture.resize(size, 0), format, exif=exif)
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        assert np.array_equal(np.array(open_photo(data)), np.array(expected.convert('RGB'))) and Photo(data).size == expected.size
        if format == 'JPEG' and size[0] > 1000:                                  # also where the decoder shrinks
            rgb, f = Photo(data).pixels(100)
            assert f == 8 and rgb.shape[1:] == (expected.height//8, expected.width//8)
            small = np.array(expected.resize((expected.width//8, expected.height//8), Image.Resampling.BOX)).astype(int)
            assert np.abs(rgb.permute(1, 2, 0).numpy() - small).mean() < 3


@pytest.mark.parametrize('w,h', [(1, 1), (1, 300), (300, 1), (2, 3), (5000, 100), (100, 5000), (31, 4000)])
@pytest.mark.parametrize('format', ['PNG', 'JPEG'])
def test_narrow_and_tiny_photos_give_crops(w, h, format):
    x = np.linspace(0, 255, w)[None, :, None]*np.ones((h, 1, 3))
    data, tfm = saved(Image.fromarray(x.astype(np.uint8)), format), ScaleJitterCrop(32)
    for split_idx in (0, 0, 1): assert tfm(Photo(data), split_idx=split_idx).shape == (3, 32, 32)


# ── Files that are not whole ─────────────────────────────────────────────────────────────────────────────────────────────────

def damaged(data, rng):
    cut = rng.randrange(200, len(data) - 2)
    yield 'cut', data[:cut]
    yield 'cut, with an end mark put on', data[:cut].rstrip(b'\xff') + b'\xff\xd9'
    yield 'the rest is zeros', data[:cut] + bytes(len(data) - cut)


@pytest.mark.parametrize('progressive', [False, True])
def test_truncated_jpegs_are_never_silently_grey(photos, progressive):
    rng, found = random.Random(3), []
    for p in list_photos(photos)[:20]:
        whole = saved(Image.open(p).convert('RGB'), 'JPEG', quality=90, progressive=progressive)
        open_photo(whole)
        for what, data in damaged(whole, rng):
            for side in (None, 40):
                try: Photo(data).pixels(side)
                except PhotoError: continue
                found.append((p.name, what, side))
    allowed = [f for f in found if progressive and f[1] == 'cut, with an end mark put on']   # a progressive scan may end anywhere: all is there, coarser
    assert found == allowed, found


def test_thumbnails_end_mark_does_not_count(picture):
    exif = Image.Exif()
    data = saved(picture.resize((600, 400)), 'JPEG', exif=exif)
    thumb = saved(picture, 'JPEG')
    app1 = b'\xff\xe1' + (len(thumb) + 8).to_bytes(2, 'big') + b'Thumb\0' + thumb
    with_thumb = data[:2] + app1 + data[2:]
    assert open_photo(with_thumb).size == (600, 400)
    with pytest.raises(PhotoError, match='cut short'): open_photo(with_thumb[:-400])


def test_bytes_after_the_end_do_no_harm(picture):
    assert shows(saved(picture, 'JPEG', quality=100, subsampling=0) + b'\0'*1000 + b'trailer of some phone')


def test_a_photo_that_claims_too_many_pixels(picture, tmp_path, monkeypatch):
    picture.save(tmp_path/'bomb.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    with pytest.raises(PhotoError, match=r"bomb\.png' is too large to be a photo: .*2400 pixels.*MAX_IMAGE_PIXELS higher"): open_photo(tmp_path/'bomb.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 3000)
    assert open_photo(tmp_path/'bomb.png').size == (60, 40)


# ── The crop, made from a part ───────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.paper('3.4-scale')
def test_crops_equal_resize_all_then_crop_on_real_photos(photos):
    "Every scale from 256 to 480 and every corner, and a place inside: at most 2 grey levels in the mean, of every single crop"
    rng, paths, means = random.Random(0), list_photos(photos), []
    for side in range(256, 481):
        data = paths[side % len(paths)].read_bytes()
        whole, photo = open_photo(data), Photo(data)
        resized = np.asarray(resize_short(whole, side)).astype(np.int16)
        size = short_size(*whole.size, side)
        for box in five_boxes(*size, 224) + [random_box(*size, 224, rng)]:
            part = crop_photo(photo, side, box).permute(1, 2, 0).numpy()
            means.append(np.abs(part - resized[box[1]:box[3], box[0]:box[2]]).mean())
    assert len(means) == 225*6 and max(means) <= 2 and np.mean(means) < .5


def test_large_photos_that_the_decoder_shrinks(photos):
    for p in list_photos(photos)[::18]:
        data = saved(Image.open(p).convert('RGB').resize((4288, 3216), Image.Resampling.BICUBIC), 'JPEG', quality=90)
        whole = open_photo(data)
        for side, f in (256, 8), (268, 8), (269, 4), (480, 4):                    # 3216 is 8·1.5·268
            size, photo = short_size(*whole.size, side), Photo(data)
            resized = np.asarray(resize_short(whole, side)).astype(np.int16)
            assert photo.pixels(side)[1] == f
            for box in five_boxes(*size, 224):
                part = crop_photo(photo, side, box).permute(1, 2, 0).numpy()
                assert np.abs(part - resized[box[1]:box[3], box[0]:box[2]]).mean() <= 2


@pytest.mark.paper('3.4-crop')
def test_offsets_are_uniform():
    "A photo whose pixels say where they are: 40×30, crops of 20, no scaling; each of the 21×11 offsets equally likely"
    y, x = np.mgrid[:30, :40]
    photo = Photo(saved(Image.fromarray(np.stack([x*6, y*8, x*0], 2).astype(np.uint8)), 'PNG'))
    tfm, counts, mirrored = ScaleJitterCrop(20, min_side=30, max_side=30), np.zeros((21, 11)), 0
    tfm.rng.seed(5)
    n = 231*30
    for _ in range(n):
        crop = np.asarray(tfm(photo, split_idx=0))
        flipped = crop[0, 0, 0] > crop[0, 0, -1]
        mirrored += flipped
        counts[crop[0].min()//6, crop[1].min()//8] += 1
    assert ((counts - 30)**2/30).sum() < 310                                     # χ² with 230 degrees of freedom: p > .0003
    assert abs(mirrored/n - .5) < 4*(.25/n)**.5


def test_crops_do_not_depend_on_who_loads_them(drawn):
    def batches(num_workers):
        torch.manual_seed(1); random.seed(1); np.random.seed(1)
        dls = resnet_dls(*drawn, micro_bs=4, size=32, num_workers=num_workers, stats=ColorStats([.5]*3, [.2, .02, .004], np.eye(3)), lighting=0)
        return [[(x.clone(), y.clone()) for x, y in dl] for dl in (dls.train, dls.train, dls.valid)]
    zero, two, three = map(batches, (0, 2, 3))
    for a, b, c in zip(zero, two, three):
        for (x, y), *others in zip(a, b, c):
            for u, v in others: assert torch.equal(x, u) and torch.equal(y, v)
    assert not torch.equal(zero[0][0][0], zero[1][0][0])                         # the second epoch draws anew


# ── Names, links, labels ─────────────────────────────────────────────────────────────────────────────────────────────────────

names = ['plain.jpg', 'UPPER.JPG', 'with space.jpeg', "it's \"quoted\".png", 'ünïcødé 写真.webp', 'a.b.c.PNG', '-dash.bmp', 'percent%20.tif', 'no;semi&amp.gif']


def test_names_of_every_kind(tmp_path):
    labels = {}
    for split in ('train', 'val'):
        (tmp_path/'data'/split).mkdir(parents=True)
        for i, name in enumerate(names):
            draw_photo('dots', np.random.default_rng(i)).save(tmp_path/'data'/split/name)
            labels[f'{split}/{name}'] = str(i % 3)
    dls = resnet_dls(tmp_path/'data', labels, {'0': 5, '1': 6, '2': 7}, micro_bs=3, size=32, num_workers=0)
    assert sorted(p.name for p in dls.photos['train']) == sorted(names)
    xy = [(x.shape, y.tolist()) for x, y in dls.valid]
    assert sum((y for _, y in xy), []) == [5 + names.index(p.name) % 3 for p in dls.photos['val']]


def test_links_are_followed_and_circles_end(tmp_path, drawn):
    data = tmp_path/'linked'
    data.mkdir()
    os.symlink(drawn.data_path/'train', data/'train')                             # a folder elsewhere
    (data/'val').mkdir()
    for p in (drawn.data_path/'val').iterdir(): os.symlink(p, data/'val'/p.name)
    os.symlink(data/'val', data/'val'/'round')                                    # and in circles
    os.symlink('itself.jpg', data/'val'/'itself.jpg')
    with pytest.raises(LabelError, match='itself.jpg'): resnet_dls(data, *drawn[1:], size=32, num_workers=0)
    dls = resnet_dls(data, *drawn[1:], size=32, num_workers=0, on_bad='skip')
    assert (len(dls.photos['train']), len(dls.photos['val'])) == (16, 8)


def test_a_folder_that_may_not_be_read_is_named(tmp_path, drawn, monkeypatch):
    scandir = os.scandir
    def refuse(p):
        if str(p).endswith('secret'): raise PermissionError(13, 'Permission denied')
        return scandir(p)
    (drawn.data_path/'train'/'secret').mkdir()
    monkeypatch.setattr(os, 'scandir', refuse)
    with pytest.raises(DataError, match='secret cannot be searched for photos: Permission denied'): resnet_dls(*drawn, size=32)


def test_photos_without_labels_are_skipped_if_asked(drawn, capsys):
    for split in ('train', 'val'): shutil.copy(next((drawn.data_path/split).iterdir()), drawn.data_path/split/f'nobody-{split}.jpg')
    with pytest.raises(LabelError, match=r"has no label in labels.json \(2 of 26 photos"): resnet_dls(*drawn, size=32)
    dls = resnet_dls(*drawn, size=32, num_workers=0, on_bad='skip')
    assert 'left out 2 of 26 photos that have no label' in capsys.readouterr().out
    assert [len(dls.photos[s]) for s in ('train', 'val', 'test')] == [16, 8, 4]
    with pytest.raises(LabelError, match='names none'): resnet_dls(drawn.data_path, {'x': 'dots'}, drawn.label_encoding, size=32, on_bad='skip')


def test_labels_in_a_table(drawn):
    import json
    import pandas as pd
    labels, encoding = (json.loads(p.read_text()) for p in drawn[1:])
    table, index = pd.DataFrame(labels.items(), columns=['photo', 'label']), pd.DataFrame(encoding.items())
    a, b = (resnet_dls(drawn.data_path, *two, size=32, micro_bs=4, num_workers=0) for two in ((table, index), drawn[1:]))
    assert [y.tolist() for _, y in a.valid] == [y.tolist() for _, y in b.valid] and a.vocab == b.vocab


def test_a_lookup_at_once_is_the_lookup_one_by_one(tmp_path):
    "labelled_photos against asking for each photo, ids of every depth"
    rng, labels = random.Random(2), {}
    for i in range(60):
        p = tmp_path/'data'/('train' if i % 3 else 'val')/rng.choice(['', 'a', 'a/b', 'c.d'])/f'p{i}.{rng.choice(["jpg", "x.jpg", "PNG"])}'
        p.parent.mkdir(parents=True, exist_ok=True)
        p.touch()
        rel = p.relative_to(tmp_path/'data')
        labels[rng.choice([p.name, p.stem, str(rel), str(rel.with_suffix('')), str(Path(*rel.parts[1:]))])] = str(i)
    map_ = LabelMap(labels, {str(i): i for i in range(60)})
    for paths in labelled_photos(tmp_path/'data', map_).values():
        for p in paths: assert p.label == map_(Path(p)) == p.name.split('.')[0][1:]


# ── The rest of fastai ───────────────────────────────────────────────────────────────────────────────────────────────────────

def test_fastai_goes_on_working(drawn):
    import matplotlib.pyplot as plt
    from fastai.vision.all import ClassificationInterpretation
    from resnet_fastai.core import train
    learn = train(*drawn, epochs=1, arch='resnet18', size=32, bs=8, num_workers=0)
    dls, test = learn.dls, learn.dls.photos['test']
    encoding = [dls.labels.encoding[dls.labels(Path(p))] for p in test]
    probs, y = learn.get_preds(dl=dls.test_dl(test, with_labels=True))
    assert y.tolist() == encoding and probs.shape == (4, 1000)
    again, _ = learn.get_preds(dl=dls.test_dl([str(p) for p in test]))            # plain paths, as text
    assert torch.equal(probs, again)
    for image in (test[0], Path(test[0]), str(test[0]), test[0].read_bytes(), open_photo(test[0])):
        assert torch.allclose(learn.predict(image)[2], probs[0], atol=1e-4)
    interp = ClassificationInterpretation.from_learner(learn)
    assert set(interp.top_losses(8, items=True)[2]) == set(dls.photos['val'])
    interp.plot_top_losses(4, nrows=2)
    learn.show_results(max_n=4)
    dls.show_batch(max_n=4)
    dls.train_ds[0][0].show()
    plt.close('all')


# ---- crops that are drawn in a loader of somebody else's

@pytest.mark.parametrize('workers', [0, 2])
def test_crops_outside_photodl_are_new_in_each_epoch_and_worker(workers):
    "One photo, 24 times: with 2 workers and 2 epochs no two crops are alike; the same seed draws them again"
    photo = Photo(Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3)).astype(np.uint8)))
    class Items(list):
        split_idx = 0
        def __getitem__(self, i): return (photo, i)
    def drawn():
        set_seed(7)
        dl = TfmdDL(Items(range(24)), bs=4, num_workers=workers, after_item=[ScaleJitterCrop(16, min_side=24, max_side=60)])
        return [x.numpy().tobytes() for _ in range(2) for xs, _ in dl for x in xs]
    one, two = drawn(), drawn()
    assert len(one) == 48 and len({*one}) > 46 and one == two


def test_a_photodl_leaves_pythons_generator_alone(drawn):
    dls = resnet_dls(*drawn, micro_bs=4, size=16, num_workers=0)
    state = random.getstate()
    list(dls.train)
    assert random.getstate() == state
    tfm = next(t for t in dls.train.after_item.fs if isinstance(t, ScaleJitterCrop))
    assert tfm.rng is random


# ---- what is kept of a first look

def test_a_photo_that_could_not_be_read_is_tried_again(drawn, monkeypatch, tmp_path):
    "Neither the disk's error nor the advice that was followed is remembered; the others are not decoded again, and the colours are those of all"
    from resnet_fastai.engine import survey
    monkeypatch.setenv('FASTAI_HOME', str(tmp_path/'home'))
    asked, ill, right = [], {'train_00003.jpg', 'val_00001.jpg'}, Photo.pixels
    def pixels(self, *args):
        asked.append(Path(self.name.strip("'")).name)
        if asked[-1] in ill: raise PhotoError(f'{self.name} cannot be read: Input/output error')
        return right(self, *args)
    monkeypatch.setattr(survey.Photo, 'pixels', pixels)
    def found(**kw):
        asked.clear()
        dls = resnet_dls(*drawn, micro_bs=4, size=16, num_workers=0, **kw)
        if asked[-1:] == ['train_00000.jpg']: asked.pop()     # fastai looks at the first item
        return len(dls.train_ds), len(dls.valid_ds), dls.stats
    for _ in range(2):
        with pytest.raises(PhotoError, match='train_00003.jpg.*2 of 24 photos'): found()
    assert {*asked} == ill                                    # of the second time
    few = found(on_bad='skip')
    assert few[:2] == (15, 7) and {*asked} == ill
    ill.remove('val_00001.jpg')
    assert found(on_bad='skip')[:2] == (15, 8) and {*asked} == {'train_00003.jpg', 'val_00001.jpg'}
    ill.clear()
    whole = found()
    assert whole[:2] == (16, 8) and asked == ['train_00003.jpg'] and found()[:2] == (16, 8) and not asked
    theirs = ColorStats.fit([p for p in sorted((drawn.data_path/'train').iterdir())], num_workers=0)
    np.testing.assert_allclose(whole[2].mean, theirs.mean, rtol=1e-12)
    np.testing.assert_allclose(whole[2].eigval, theirs.eigval, rtol=1e-9)
    assert not np.allclose(few[2].mean, whole[2].mean, rtol=1e-6)
