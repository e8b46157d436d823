"Crops of the test protocols beside torchvision's, the dense way window by window, and intervals by their definition."
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from fastai.torch_core import set_seed
from pandas.testing import assert_frame_equal
from torch import nn

from resnet_fastai.augment import ColorStats
from resnet_fastai.data import demo_data, resnet_dls
from resnet_fastai.engine.demo_photos import draw_photo
from resnet_fastai.engine.files import DataError
from resnet_fastai.engine.scores import wilson
from resnet_fastai.inference import (crop_boxes, crop_probs, dense_probs, evaluate, extract_crops, fifty_crop, paper_scales,
                                     predict_probs, protocol_boxes, ten_crop, unique_crops)
from resnet_fastai.model import build_net
from resnet_fastai.training import resnet_learner

pytestmark = pytest.mark.usefixtures('one_thread')
stats = ColorStats([.5, .4, .3], [.2, .02, .005], np.eye(3))
mean = torch.tensor(stats.mean).float()[:, None, None]


def drawn(label, seed, size=None):
    photo = draw_photo(label, np.random.default_rng(seed))
    return photo.resize(size) if size else photo


def with_statistics(net, size=64):
    with torch.no_grad(): net.train()(torch.rand(8, 3, size, size)*2 - 1)
    return net.eval()


@pytest.mark.parametrize('size', [(500, 375), (225, 400), (224, 224), (301, 300)])
def test_ten_crops_are_torchvisions(size):
    photo = drawn('bricks', 4, size)
    assert torch.equal(ten_crop(photo), torch.stack([TF.to_tensor(c) for c in T.TenCrop(224)(photo)]))


@pytest.mark.parametrize('size', [(500, 375), (375, 501), (300, 300)])
def test_fifty_crops_are_torchvisions_at_five_scales(size):
    photo = drawn('rings', 6, size)
    theirs = [TF.to_tensor(c) for s in (224, 256, 384, 480, 640) for c in T.TenCrop(224)(T.Resize(s)(photo))]
    assert torch.equal(fifty_crop(photo), torch.stack(theirs))


def test_scales_are_in_proportion():
    assert paper_scales() == (224, 256, 384, 480, 640) and paper_scales(112) == (112, 128, 192, 240, 320)
    assert fifty_crop(drawn('rings', 6), scales=(70, 100), size=64).shape == (20, 3, 64, 64)


def test_a_crop_that_does_not_fit():
    with pytest.raises(DataError, match='does not fit into a photo of 300×223'): ten_crop(drawn('bricks', 4, (300, 223)))
    with pytest.raises(DataError, match='does not fit into a photo of 150×100'): crop_boxes(300, 200, scales=(100,))


@pytest.mark.parametrize('size', [(500, 375), (375, 501), (300, 300), (224, 224)])
def test_boxes_cut_the_fifty_crops(size):
    photo = drawn('rings', 6, size)
    assert torch.equal(extract_crops(photo, crop_boxes(*size)).float()/255, fifty_crop(photo))


def test_unique_crops_average_to_the_same():
    once, share = unique_crops([protocol_boxes(p, 500, 375) for p in ('1crop', '10crop', '50crop')])
    assert len(once) == 46 and (share > 0).sum(1).tolist() == [1, 10, 46]
    torch.testing.assert_close(share.sum(1), torch.ones(3, dtype=torch.float64))
    photo = drawn('weave', 1, (500, 375))
    means = extract_crops(photo, once).double().mean((2, 3))/255
    torch.testing.assert_close(share[2]@means, fifty_crop(photo).double().mean((0, 2, 3)), atol=1e-7, rtol=0)
    torch.testing.assert_close(share[1]@means, fifty_crop(photo, scales=(256,)).double().mean((0, 2, 3)), atol=1e-7, rtol=0)
    assert unique_crops([crop_boxes(300, 300, scales=(224,))])[1].tolist() == [[.5, .5]]      # a square at its own size, and its mirror image


class Sums(nn.Module):
    "Logits: the sums of R, G and B over the photo, and a batch norm to tell eval mode from training mode"
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
    def forward(self, x): return self.bn(x).mean((2, 3))*9


def test_the_average_of_fifty_crops_by_hand():
    photo, net = drawn('rings', 6), Sums().train()
    logits = ((fifty_crop(photo, size=64).double().mean((2, 3)) - torch.tensor(stats.mean))*9/(1 + 1e-5)**.5).numpy()
    expected = (np.exp(logits)/np.exp(logits).sum(1, keepdims=True)).mean(0)
    for found in (predict_probs(net, photo, stats, size=64), predict_probs(net, photo, stats, size=64, bs=7),
                  crop_probs(net, fifty_crop(photo, size=64), stats, bs=8).mean(0).numpy()):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert net.training
    two = predict_probs(net, [photo, photo.rotate(90)], stats, size=64)
    assert two.shape == (2, 3) and two.dtype == np.float32
    np.testing.assert_allclose(two[0], expected, atol=1e-6)
    set_seed(0)
    assert 1e-5 < abs(predict_probs(net, photo, stats, size=64, lighting=True) - expected).max() < .02


@pytest.mark.parametrize('arch', ['resnet18', 'cifar_resnet8'])
def test_dense_at_the_size_of_the_crop_is_one_window(arch):
    net, x = with_statistics(build_net(arch, 5)), torch.rand(3, 3, 64, 64)
    with torch.no_grad(): ordinary = net(x - mean).softmax(1)
    torch.testing.assert_close(dense_probs(net, x, stats, 64), ordinary, atol=1e-5, rtol=0)
    torch.testing.assert_close(crop_probs(net, x, stats), ordinary, atol=1e-5, rtol=0)


def test_dense_slides_window_by_window():
    net, x = with_statistics(build_net('resnet18', 5)), torch.rand(1, 3, 128, 160)
    with torch.inference_mode():
        maps = net[:-3](x - mean)
        windows = [maps[0, :, i:i+2, j:j+2].mean((1, 2)) for i in range(maps.shape[2] - 1) for j in range(maps.shape[3] - 1)]
        one_by_one = torch.stack([net.fc(w).softmax(0) for w in windows])
    assert len(one_by_one) == 3*4
    torch.testing.assert_close(dense_probs(net, x, stats, 64)[0], one_by_one.mean(0), atol=1e-6, rtol=0)
    assert dense_probs(net, torch.rand(2, 3, 100, 130), stats, 64).shape == (2, 5)
    with pytest.raises(DataError, match='needs a network that ends in one global average'): dense_probs(Sums(), x, stats, 64)


def test_wilsons_interval_is_what_defines_it():
    low, high = wilson(8, 80)
    for p in (low, high): assert (.1 - p)**2 == pytest.approx(1.96**2*p*(1 - p)/80, abs=1e-12)          # |p̂ - p| = z·σ(p)
    assert wilson(0, 80)[0] == 0 and wilson(0, 80)[1] == pytest.approx(1.96**2/(80 + 1.96**2)) and wilson(80, 80)[1] == 1


@pytest.fixture(scope='module')
def learn(tmp_path_factory):
    set_seed(0)
    dls = resnet_dls(*demo_data(tmp_path_factory.mktemp('crops')/'demo', sizes=dict(train=96, val=32, test=32)), 16, size=48, num_workers=0)
    learn = resnet_learner(dls, 'cifar_resnet8', bs=16)
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    return learn


def test_evaluate(learn):
    errors, classes = evaluate(learn, protocol=['1crop', '10crop']), evaluate(learn, protocol='10crop', per_class=True)
    assert (classes.top1_error*classes.photos).sum()/classes.photos.sum() == pytest.approx(errors.top1_error[1])
    with learn.no_bar(): valid = learn.validate()[1]
    assert evaluate(learn, 'val', '1crop', precision='fp32').top1_error[0] == pytest.approx(valid)
    assert_frame_equal(evaluate(learn, 'val', '10crop'), evaluate(learn, 'val', ['1crop', '10crop'])[1:2].reset_index(drop=True))


def test_evaluate_a_loaded_model(learn):
    dls = learn.dls
    elsewhere = SimpleNamespace(learn=None, net=learn.model, stats=dls.stats, size=dls.size, labels=dls.labels)
    there = dict(data_path=dls.path, label_path=dls.path/'labels.json', protocol='1crop')
    assert_frame_equal(evaluate(elsewhere, **there), evaluate(learn, protocol='1crop'))
    with pytest.raises(DataError, match='pass data_path and label_path'): evaluate(elsewhere)


@pytest.mark.parametrize('kw, says', [(dict(protocol='3crop'), "must be one of '1crop', '10crop', '50crop', 'dense'"), (dict(average='median'), "must be one of 'probs', 'logits'"),
                                      (dict(split='tset'), "must be one of 'train', 'val', 'test'")])
def test_evaluate_refuses(learn, kw, says):
    with pytest.raises(DataError, match=says): evaluate(learn, **kw)


def test_a_split_of_another_folder_needs_a_name_that_exists(learn):
    where = dict(data_path=learn.dls.path, label_path=learn.dls.path/'labels.json')
    with pytest.raises(DataError, match="split is 'valid'; it must be one of 'train', 'val', 'test'"): evaluate(learn, 'valid', **where)


@pytest.mark.parametrize('what', ['a folder', 'loaders of fastai'])
def test_what_is_no_model_is_refused_in_words(learn, what):
    from fastai.vision.all import ImageDataLoaders, Resize
    def other():
        files = list(learn.dls.photos['train'][:8])
        dls = ImageDataLoaders.from_lists(learn.dls.path, files, [p.label for p in files], item_tfms=Resize(48), bs=4, num_workers=0,
                                           device='cpu', valid_pct=.5)
        return resnet_learner(dls, 'cifar_resnet8', bs=4)
    with pytest.raises(DataError, match='no ResNet, nor a learner over resnet_dls'): evaluate('runs/model' if what == 'a folder' else other())


def test_plain_crops_answer_the_same_each_time(learn):
    some = learn.dls.photos['test'][:2]
    spread = {lit: np.ptp([predict_probs(learn.model, some, learn.dls.stats, size=48, lighting=lit) for _ in range(2)], axis=0).max() for lit in (False, True)}
    assert spread[False] == 0 < spread[True]
