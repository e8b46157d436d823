"fastai's own callbacks beside this project's: what they see, and what they leave behind."
import warnings

import numpy as np
import pytest
import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback, CancelBatchException, FetchPredsCallback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback, TerminateOnNaNCallback
from fastai.callback.training import BnFreeze, GradientAccumulation, GradientClip, ShortEpochCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from resnet_fastai.data import DataError, demo_data, resnet_dls
from resnet_fastai.training import Accumulate, paper_sgd, resnet_learner

pytestmark = pytest.mark.usefixtures('one_thread')
precisions = ['fp32', 'bf16', 'fp16']
n, micro_bs = 20, 4
batches = {4: [4]*5, 8: [8, 8, 4], 256: [20]}                # an update of bs photos: how many each of an epoch has


@pytest.fixture(scope='module')
def dls(tmp_path_factory):
    photos = demo_data(tmp_path_factory.mktemp('photos')/'drawn', sizes=dict(train=n, val=8, test=2))
    return resnet_dls(*photos, micro_bs=micro_bs, size=16, n_out=1000, num_workers=0)


class Seen(Callback):
    "The gradients with which each update is made, after everybody has had his way with them, and whether 16 bits are on"
    order = 200
    def __init__(self): self.norms, self.autocast = [], []
    def after_pred(self): self.autocast.append(torch.is_autocast_enabled('cpu'))
    def before_step(self): self.norms.append(norm(self.model))


def norm(model): return torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()]).clone()


def learner(dls, bs=8, *cbs, **kw):
    set_seed(1)
    dls.train.rng.seed(1)
    return resnet_learner(dls, 'cifar_resnet8', bs=bs, lr=.01, cbs=[*cbs], **dict(precision='fp32') | kw)


def fit(learn, epochs=1, **kw):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, **kw)
    return learn


# ---- gradients

@pytest.mark.parametrize('precision', precisions)
@pytest.mark.parametrize('bs', batches)
def test_the_clipped_norm_is_that_of_the_update(dls, bs, precision):
    "One clip an update, of the whole update's gradients, as they are without scaling"
    clips = []
    class Clip(GradientClip):
        def before_step(self): clips.append(norm(self.model)); super().before_step()
    seen = Seen()
    fit(learner(dls, bs, Clip(.1), seen, precision=precision))
    assert len(clips) == len(seen.norms) == len(batches[bs])
    assert max(seen.norms) < .1*1.001 and min(seen.norms) > .09             # the gradients are longer than .1, and not 65536 times as long
    plain = Seen()
    fit(learner(dls, bs, plain))
    assert clips[0] == pytest.approx(plain.norms[0], rel=.03)


@pytest.mark.parametrize('order', [-5, 0, 50, 300])
def test_no_callback_sees_half_an_update(dls, order):
    "Whatever its order, and in fp16 too"
    found = []
    class Look(Callback):
        def before_step(self): found.append(norm(self.model))
        def after_step(self): found.append('step')
    Look.order = order
    whole = Seen()
    fit(learner(dls, 8, Look(), precision='fp16'))
    fit(learner(dls, 8, whole))
    assert found[1::2] == ['step']*3 and found[0] == pytest.approx(whole.norms[0], rel=.03)


@pytest.mark.parametrize('size,bs,micro_bs', [(50, 16, 8), (37, 16, 4), (5, 256, 2)])
def test_clipped_accumulated_updates_are_those_of_torch(size, bs, micro_bs):
    torch.manual_seed(size)
    x, y = torch.randn(size, 6), torch.randint(0, 4, (size,))
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
    theirs, ours, clipped = net(), net(), 0
    opt = torch.optim.SGD(theirs.parameters(), lr=.1, momentum=.9, weight_decay=1e-4)
    for _ in range(3):
        for xb, yb in zip(x.split(bs), y.split(bs)):
            opt.zero_grad()
            nn.functional.cross_entropy(theirs(xb), yb).backward()
            clipped += nn.utils.clip_grad_norm_(theirs.parameters(), .3).item() > .3
            opt.step()
    assert clipped
    dl = DataLoader(TensorDataset(x, y), batch_size=micro_bs)
    learn = Learner(DataLoaders(dl, dl, device='cpu'), ours, loss_func=CrossEntropyLossFlat(), opt_func=paper_sgd, lr=.1, wd_bn_bias=True,
                    cbs=[GradientClip(.3), Accumulate(bs)])
    fit(learn, 3)
    for a, b in zip(theirs.parameters(), ours.parameters()): torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_a_backward_pass_that_is_left_out_counts_no_photos():
    "Its photos have no part in the mean"
    class Skip(Callback):
        def before_backward(self):
            from fastai.callback.core import CancelBackwardException
            if self.iter == 1: raise CancelBackwardException()
    x, y, got = torch.randn(8, 3), torch.randint(0, 2, (8,)), []
    class Keep(Callback):
        order = 90
        def before_step(self): got.append(torch.cat([p.grad.flatten() for p in self.model.parameters()]).clone())
    dl, net = DataLoader(TensorDataset(x, y), batch_size=2), nn.Linear(3, 2)
    kept = torch.cat([x[:2], x[4:]]), torch.cat([y[:2], y[4:]])
    want = torch.autograd.grad(nn.functional.cross_entropy(net(kept[0]), kept[1]), net.parameters())
    fit(Learner(DataLoaders(dl, dl, device='cpu'), net, loss_func=CrossEntropyLossFlat(), opt_func=paper_sgd, lr=.1, cbs=[Skip(), Keep(), Accumulate(8)]))
    torch.testing.assert_close(got[0], torch.cat([g.flatten() for g in want]))


def test_accumulating_twice_is_refused(dls):
    with pytest.raises(DataError, match='GradientAccumulation would scale the gradients twice'): fit(learner(dls, 8, GradientAccumulation(8)))


@pytest.mark.parametrize('bs,micro_bs', [(12, 8), (4, 8)])
def test_a_loader_whose_batches_do_not_make_an_update(bs, micro_bs):
    dl = DataLoader(TensorDataset(torch.randn(24, 3), torch.randint(0, 2, (24,))), batch_size=micro_bs)
    learn = Learner(DataLoaders(dl, dl, device='cpu'), nn.Linear(3, 2), loss_func=CrossEntropyLossFlat(), opt_func=paper_sgd, cbs=Accumulate(bs))
    with pytest.raises(DataError, match=f"bs={bs} photos is no multiple of the loader's 8"): fit(learn)


# ---- 16 bits

@pytest.mark.parametrize('how', ['to_fp16', 'to_bf16', 'cbs'])
def test_fastais_ways_to_16_bits(dls, how):
    seen, found = Seen(), set()
    learn = learner(dls, 8, seen, GradientClip(.1), *([MixedPrecision('bf16')] if how == 'cbs' else []))
    if how != 'cbs': getattr(learn, how)()
    hook = learn.model.conv1.register_forward_hook(lambda m, i, o: found.add(o.dtype))
    before = weights(learn)
    fit(learn)
    want = torch.float16 if how == 'to_fp16' else torch.bfloat16
    assert found == {want} and not any(seen.autocast) and learn.spec['precision'] == ('fp16' if how == 'to_fp16' else 'bf16')
    assert .09 < min(seen.norms) <= max(seen.norms) < .1001 and not torch.equal(before, weights(learn))
    found.clear()
    fit(learn.to_fp32())
    hook.remove()
    assert found == {torch.float32} and 'precision' not in learn.spec


class Stop(BaseException): "As Ctrl-C: no Exception"


@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
@pytest.mark.parametrize('what', ['fit', 'get_preds', 'validate'])
def test_an_interrupted_forward_pass_leaves_32_bits(dls, what, precision):
    learn = learner(dls, precision=precision)
    def stop(*_): raise Stop
    hook = learn.model.fc.register_forward_pre_hook(stop)
    with learn.no_bar(), learn.no_logging(), pytest.raises(Stop): getattr(learn, what)(*[1][:what == 'fit'])
    hook.remove()
    assert not torch.is_autocast_enabled('cpu')
    assert learn.model.eval()(torch.zeros(1, 3, 16, 16)).dtype == torch.float32
    assert torch.isfinite(weights(fit(learn))).all()


@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_a_batch_that_is_cancelled_leaves_no_stale_weights(dls, precision):
    "Cancelled before or after the loss, it is all the same to what follows"
    def run(event):
        class Cancel(Callback): "At the third batch"
        def cancel(self):
            if self.training and self.iter == 2: raise CancelBatchException()
        setattr(Cancel, event, cancel)
        return fit(learner(dls, 4, Cancel(), seen := Seen(), precision=precision), 2), seen
    (one, seen), (two, _) = run('after_pred'), run('after_loss')
    assert torch.equal(weights(one), weights(two)) and not any(seen.autocast)


def test_a_scale_lasts_over_fits(dls):
    "fp16: two fits are one"
    def run(*epochs):
        learn = learner(dls, 8, precision='fp16')
        learn.add_cb(MixedPrecision('fp16', init_scale=2.**20, growth_interval=2))
        for k in epochs: fit(learn, k)
        return weights(learn), learn.precision.grad_scaler.get_scale()
    (one, scale), (two, other) = run(2), run(1, 1)
    assert torch.equal(one, two) and scale == other != 2.**20


# ---- every callback of fastai that has a part in training

everyone = dict(ShortEpoch=lambda: ShortEpochCallback(.5), GradientClip=lambda: GradientClip(.1), BnFreeze=BnFreeze, MixUp=MixUp, CutMix=CutMix,
                EarlyStopping=lambda: EarlyStoppingCallback(patience=5), SaveModel=SaveModelCallback, ReduceLR=ReduceLROnPlateau,
                TerminateOnNaN=TerminateOnNaNCallback, ChannelsLast=ChannelsLast, FetchPreds=FetchPredsCallback, CSVLogger=CSVLogger)


@pytest.mark.parametrize('precision', precisions)
@pytest.mark.parametrize('bs', batches)
@pytest.mark.parametrize('name', everyone)
def test_every_training_callback(dls, name, bs, precision, tmp_path, monkeypatch):
    "So many updates as the photos make, of finite gradients as long as they should be; a whole row of history; no 16 bits left on"
    monkeypatch.chdir(tmp_path)
    learn = learner(dls, bs, everyone[name](), seen := Seen(), precision=precision)
    learn.path = tmp_path
    before = weights(learn)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        fit(learn)
    updates = [k for k in np.cumsum(batches[bs]) if k <= 16] if name == 'ShortEpoch' else batches[bs]       # four of five batches
    assert len(seen.norms) == len(updates) and all(0 < s < (.1001 if name == 'GradientClip' else 100) for s in seen.norms)
    assert torch.isfinite(weights(learn)).all() and torch.equal(before, weights(learn)) == (not updates)
    row = learn.history.rows[-1]
    assert list(row)[:6] == ['epoch', 'train_loss', 'valid_loss', 'top1_error', 'top5_error', 'lr']
    assert 4 < row['train_loss'] < 10 and (name == 'ShortEpoch' or 4 < row['valid_loss'] < 10 and 0 <= row['top1_error'] <= 1)
    assert not any(seen.autocast) and not torch.is_autocast_enabled('cpu')
