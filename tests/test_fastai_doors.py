"fastai's own ways in and out: loaders over other photos, exported learners, other metrics and losses."
from types import SimpleNamespace

import pytest
import torch
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import IndexSplitter, get_image_files, parent_label
from fastai.learner import load_learner
from fastai.losses import CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat
from fastai.metrics import accuracy
from fastai.vision.augment import Resize
from fastai.vision.data import ImageBlock

from resnet_fastai.core import ResNet
from resnet_fastai.engine.distributed import ManyProcesses
from resnet_fastai.engine.files import DataError
from resnet_fastai.inference import evaluate, predict_probs
from resnet_fastai.training import resnet_learner

pytestmark = pytest.mark.usefixtures('one_thread')
small = dict(arch='cifar_resnet8', size=32, bs=8, num_workers=0)


@pytest.fixture
def model(drawn): return ResNet(*drawn, **small)


def test_loaders_over_other_photos(model, drawn):
    folder, photos = drawn.data_path/'test', model.learn.dls.photos['test']
    dls, files = model.learn.dls, get_image_files(drawn.data_path/'test').sorted()
    targets = [dls.labels.encoding[dls.labels(p)] for p in files]
    ways = [files, [str(f) for f in files], list(files), tuple(files), photos, folder, str(folder)]
    found = [model.learn.get_preds(dl=dls.test_dl(w)) for w in ways]
    for probs, _ in found: assert torch.equal(probs, found[0][0]) and len(probs) == 4
    for w in ways: assert model.learn.get_preds(dl=dls.test_dl(w, with_labels=True))[1].tolist() == targets
    for one in (files[1], str(files[1])): assert torch.allclose(model.learn.get_preds(dl=dls.test_dl(one))[0], found[0][0][1:2], atol=1e-5)
    assert dls.test_dl(files, bs=3, num_workers=0).bs == 3
    with pytest.raises(DataError, match='holds no photos'): dls.test_dl((drawn.data_path/'none').mkdir() or drawn.data_path/'none')


def test_an_exported_learner_still_predicts(model, drawn, tmp_path):
    learn, photo = model.learn, drawn.data_path/'test'/'test_00000.jpg'
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    expected = predict_probs(learn.model, photo, model.stats, 32)
    learn.export(tmp_path/'learner.pkl')
    loaded = load_learner(tmp_path/'learner.pkl')
    dls = loaded.dls
    assert (dls.size, dls.labels.encoding, dls.stats.mean.tolist()) == (32, model.labels.encoding, model.stats.mean.tolist())
    assert abs(predict_probs(loaded.model, photo, dls.stats, dls.size) - expected).max() < 1e-6
    assert len(loaded.get_preds(dl=dls.test_dl(drawn.data_path/'test'))[0]) == 4
    assert {len(p) for p in dls.photos.values()} == {0}                          # what it was trained on stays at home
    assert len(evaluate(loaded, data_path=drawn.data_path, label_path=drawn.label_path, protocol='1crop')) == 1


def plain_loaders(drawn, n_valid):
    for i, p in enumerate(sorted((drawn.data_path/'train').iterdir())):
        (new := drawn.data_path/'plain'/'ab'[i % 2]).mkdir(parents=True, exist_ok=True)
        p.rename(new/p.name)
    block = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label, splitter=IndexSplitter(range(n_valid)), item_tfms=Resize(32))
    return block.dataloaders(drawn.data_path/'plain', bs=4, num_workers=0)


def test_loaders_without_a_validation_set(drawn):
    dls = plain_loaders(drawn, 0)
    for none in (dls, DataLoaders(dls.train)):
        with pytest.raises(DataError, match='no validation photos'): resnet_learner(none, 'cifar_resnet8', bs=4)


def test_metrics_loss_and_path(model, drawn, tmp_path):
    learn = resnet_learner(model.learn.dls, 'cifar_resnet8', bs=8, metrics=accuracy, loss_func=LabelSmoothingCrossEntropyFlat(), path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert learn.path == tmp_path and isinstance(learn.loss_func, LabelSmoothingCrossEntropyFlat)
    row = learn.history.df.iloc[0]
    assert row.top1_error == pytest.approx(1 - row.accuracy)
    assert isinstance(resnet_learner(model.learn.dls, 'cifar_resnet8', bs=8).loss_func, CrossEntropyLossFlat)


def test_lr_find_in_several_processes_is_refused():
    many = ManyProcesses()
    many.learn = SimpleNamespace(lr_finder=object())
    with pytest.raises(DataError, match='lr_find runs in one process; start it without torchrun'): many.before_fit()


def test_predictions_by_worker_processes(drawn):
    "`get_preds` gives a loader its order from outside"
    ends = []
    for workers in (0, 1):
        learn = ResNet(*drawn, **small | dict(num_workers=workers)).learn
        with learn.no_bar(): ends.append(learn.get_preds()[0])
    assert torch.equal(*ends)
