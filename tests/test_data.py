"Batches of lesson 3: which photos, which targets, which pixels."
import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF

import answers
from resnet_fastai.data import demo_data, LabelMap, read_stats, resnet_dls
from resnet_fastai.engine.demo_photos import draw_photo
from resnet_fastai.engine.files import PhotoError
from resnet_fastai.engine.ids import photo_ids
from resnet_fastai.engine.layout import PhotoList
from resnet_fastai.engine.loader import PhotoDL
from resnet_fastai.engine.photo import open_photo


@pytest.fixture(scope='module')
def demo(tmp_path_factory): return demo_data(tmp_path_factory.mktemp('data')/'demo', sizes=dict(train=24, val=16, test=8))


# ── The first reading of all photos ──────────────────────────────────────────────────────────────────────────────────────────

def test_what_is_kept_of_the_first_reading_hides_nothing(tmp_path):
    imgs = [draw_photo('bricks', np.random.default_rng(i)) for i in range(2)]
    for i, im in enumerate(imgs): im.save(tmp_path/f'{i}.png')
    (tmp_path/'9.png').write_text('not a photo')
    photos = dict(train=PhotoList(tmp_path, [b'0.png', b'9.png']), val=PhotoList(tmp_path, [b'1.png']), test=PhotoList(tmp_path, []))
    with pytest.raises(PhotoError, match=r'\(1 of 3 photos\)'): read_stats(photos)
    for _ in 'first reading', 'kept':
        stats, good = read_stats(photos, on_bad='skip')
        assert {s: list(ps) for s, ps in good.items()} == dict(train=[tmp_path/'0.png'], val=[tmp_path/'1.png'], test=[])
        np.testing.assert_allclose(stats.mean, np.array(imgs[0]).reshape(-1, 3).mean(0)/255, atol=1e-12)     # of the training photos alone
    with pytest.raises(PhotoError, match=r'\(1 of 3 photos\)'): read_stats(photos)


# ── Batches ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.paper('3.4-mean')
def test_validation_is_the_centre_crop_less_the_mean(demo):
    dls = resnet_dls(*demo, micro_bs=8, size=64, num_workers=0)
    x, y = dls.valid.one_batch()
    first = open_photo(dls.photos['val'][0])
    crop = np.array(TF.center_crop(TF.resize(first, 73), 64))/255 - dls.stats.mean
    assert abs(x[0].permute(1, 2, 0).numpy() - crop).max() < 2.1/255                            # a grey level or two of rounding
    assert x.shape == (8, 3, 64, 64) and x.dtype == torch.float32
    assert y.tolist() == [dls.labels.encoding[dls.labels(p)] for p in dls.photos['val'][:8]]


def test_wide_crops_see_most_of_the_photo(demo):
    "Short sides of 33 to 48 for crops of 32, in training and in validation; the batches are those of the same numbers given"
    def batches(**kwargs):
        torch.manual_seed(1)
        dls = resnet_dls(*demo, size=32, num_workers=0, lighting=0, **kwargs)
        crop = next(t for t in dls.after_item.fs if hasattr(t, 'min_side'))
        return (crop.min_side, crop.max_side), dls.valid.one_batch()[0]
    wide, given, paper = batches(augment='wide'), batches(min_side=33, max_side=48), batches()
    assert wide[0] == given[0] == (33, 48) and paper[0] == (37, 69)
    assert torch.equal(wide[1], given[1]) and not torch.equal(wide[1], paper[1])
    assert batches(augment='wide', max_side=40)[0] == (33, 40) and batches(augment='wide', min_side=60)[0] == (60, 60)
    with pytest.raises(ValueError, match="augment is 'large'; it must be one of 'paper', 'wide'"): batches(augment='large')


def test_targets_are_the_users_indices(demo):
    dls = resnet_dls(*demo, micro_bs=8, size=64, num_workers=0)
    assert [dls.vocab[i] for i in (101, 999)] == ['stripes', 'mesh'] and len(dls.vocab) == 1000
    assert set(dls.train.one_batch()[1].tolist()) <= set(dls.labels.encoding.values())


@pytest.mark.parametrize('bs,batches', [(23, 2), (20, 2), (8, 3)])
def test_no_photo_is_alone_in_a_batch(demo, bs, batches):
    dls = resnet_dls(*demo, micro_bs=bs, size=64, num_workers=0)
    sizes = [len(y) for _, y in dls.train]
    assert len(sizes) == len(dls.train) == batches and sum(sizes) == 24 and 1 < min(sizes) and max(sizes) <= bs


def test_the_answers_of_the_lesson_are_true():
    assert answers.run('03_data.ipynb', dict(photo_ids=photo_ids, LabelMap=LabelMap, PhotoDL=PhotoDL)) == 4
