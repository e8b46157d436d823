"Photographs that people took: crops beside torchvision's, colours beside numpy's, class folders to predictions."
import json

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from PIL import Image

from resnet_fastai.augment import ColorStats, ScaleJitterCrop
from resnet_fastai.core import ResNet
from resnet_fastai.data import from_folders
from resnet_fastai.engine.layout import list_photos
from resnet_fastai.inference import evaluate, fifty_crop


@pytest.mark.paper('3.4-ten-crop', '3.4-scales')
def test_fifty_crops_are_torchvisions(photos):
    to_tensor = T.ToTensor()
    shapes = set()
    for p in list_photos(photos)[:12]:
        img = Image.open(p).convert('RGB')
        shapes.add(np.sign(img.width - img.height))
        theirs = [to_tensor(c) for s in (224, 256, 384, 480, 640) for c in T.TenCrop(224)(T.Resize(s)(img))]
        assert torch.equal(fifty_crop(p), torch.stack(theirs)), p
    assert len(shapes) > 1


def test_validation_crop_is_torchvisions(photos):
    tfm, theirs = ScaleJitterCrop(), T.Compose([T.Resize(256), T.CenterCrop(224)])
    for p in list_photos(photos):
        img = Image.open(p).convert('RGB')
        assert np.array_equal(tfm(img, split_idx=1), theirs(img)), p


@pytest.mark.paper('3.4-colour')
@pytest.mark.parametrize('num_workers', [0, 2])
def test_colour_terms_are_numpys(photos, num_workers):
    paths = list_photos(photos)
    pixels = np.concatenate([np.asarray(Image.open(p).convert('RGB')).reshape(-1, 3) for p in paths])/255
    stats = ColorStats.fit(paths, num_workers=num_workers)
    np.testing.assert_allclose(stats.mean, pixels.mean(0), atol=1e-9)
    np.testing.assert_allclose(stats.eigvec @ np.diag(stats.eigval) @ stats.eigvec.T, np.cov(pixels.T, bias=True), atol=1e-9)


def test_class_folders_to_predictions(clothing, tmp_path):
    paths = from_folders(clothing, tmp_path/'laid_out')
    classes = sorted(p.name for p in (clothing/'train').iterdir())
    assert json.loads(paths.label_encoding.read_text()) == {c: i for i, c in enumerate(classes)}
    model = ResNet(*paths, arch='resnet18', size=32, bs=32, n_out=10)
    assert [len(model.learn.dls.photos[s]) for s in ('train', 'val', 'test')] == [400, 120, 120]
    for p in model.learn.dls.photos['test']: assert model.labels(p) == p.parent.name
    history = model.fit(2)
    assert history.valid_loss.notna().all() and len(evaluate(model, protocol='1crop')) == 1
    assert model.predict(model.learn.dls.photos['test'][0]).shape == (10,)
