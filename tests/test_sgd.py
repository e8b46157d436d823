"The optimiser, the batch of several micro-batches, errors and schedules, beside PyTorch's and beside plain loops."
from functools import partial

import numpy as np
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from resnet_fastai.data import LabelMap, demo_data, resnet_dls
from resnet_fastai.engine.checkpoint import Checkpoint, get_rng, set_rng
from resnet_fastai.engine.files import DataError
from resnet_fastai.engine.finite import LossError
from resnet_fastai.training import (Accumulate, MultiStepLR, WarmUp, caffe_sgd, default_lr, paper_sgd, plot_history, resnet_learner, top1_error,
                                    top5_error)

pytestmark = pytest.mark.usefixtures('one_thread')


# --- The optimiser

def trajectory(make_opt, set_lr):
    "50 steps on a fixed sequence of batches, the rate ÷10 after 30"
    torch.manual_seed(0)
    net, data = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(50, 16, 6)
    opt = make_opt(list(net.parameters()))
    for i, x in enumerate(data):
        if i == 30: set_lr(opt, .01)
        net(x).pow(2).mean().backward()
        opt.step()
        opt.zero_grad()
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def torch_lr(opt, lr): opt.param_groups[0]['lr'] = lr
def fastai_lr(opt, lr): opt.set_hyper('lr', lr)


@pytest.mark.paper('3.4-momentum', '3.4-decay')
def test_sgd_is_torchs():
    theirs = trajectory(lambda ps: torch.optim.SGD(ps, lr=.1, momentum=.9, weight_decay=.01), torch_lr)
    torch.testing.assert_close(trajectory(lambda ps: paper_sgd(ps, lr=.1, wd=.01), fastai_lr), theirs, atol=1e-6, rtol=0)
    decoupled = trajectory(lambda ps: SGD(ps, lr=.1, mom=.9, wd=.01), fastai_lr)
    assert (decoupled - theirs).abs().max() > 1e-3                       # fastai's default is another optimiser
    assert {k: paper_sgd([torch.zeros(1)], lr=1).hypers[0][k] for k in ('mom', 'wd')} == dict(mom=.9, wd=1e-4)


def walk(opt_func, drop):
    "40 steps on w²"
    w, out = nn.Parameter(torch.ones(1, dtype=torch.float64)), []
    opt = opt_func([w], lr=.01, wd=.1)
    for i in range(40):
        if drop and i == 20: opt.set_hyper('lr', .001)
        (w**2).sum().backward()
        opt.step()
        opt.zero_grad()
        out.append(w.item())
    return out


def caffe_by_hand(drop):
    w, v, out = 1., 0., []
    for i in range(40):
        lr = .01 if i < 20 or not drop else .001
        v = .9*v + lr*(2*w + .1*w)
        w -= v
        out.append(w)
    return out


def test_caffes_velocity_has_the_rate_inside():
    for drop in (False, True): assert walk(caffe_sgd, drop) == pytest.approx(caffe_by_hand(drop), abs=1e-12)
    assert walk(caffe_sgd, False) == pytest.approx(walk(paper_sgd, False), abs=1e-12)        # a rate that stays: the same
    assert walk(caffe_sgd, True)[:20] == walk(caffe_sgd, False)[:20]
    assert abs(walk(caffe_sgd, True)[25] - walk(paper_sgd, True)[25]) > .05                  # after a drop: not the same


# --- Micro-batches

torch.manual_seed(0)
xs, ys = torch.randn(23, 5), torch.randint(0, 3, (23,))


def small_net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))


def weights(net): return torch.cat([p.detach().flatten() for p in net.parameters()])


def plain_loop(net, bs, epochs=3):
    opt = torch.optim.SGD(net.parameters(), lr=.1, momentum=.9)
    for _ in range(epochs):
        for x, y in zip(xs.split(bs), ys.split(bs)):
            nn.functional.cross_entropy(net(x), y).backward()
            opt.step()
            opt.zero_grad()
    return weights(net)


def accumulated(net, bs, micro_bs, epochs=3):
    dl = DataLoader(TensorDataset(xs, ys), batch_size=micro_bs)
    learn = Learner(DataLoaders(dl, dl, device='cpu'), net, loss_func=CrossEntropyLossFlat(), opt_func=partial(paper_sgd, wd=0.), lr=.1,
                    cbs=Accumulate(bs))
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs)
    return weights(net)


@pytest.mark.paper('3.4-batch')
@pytest.mark.parametrize('bs, micro_bs', [(8, 4), (8, 8), (12, 4), (64, 4), (4, 4)])
def test_micro_batches_make_the_update_of_one_batch(bs, micro_bs):
    "23 photos: the last micro-batch has 3, the last update fewer than bs"
    torch.testing.assert_close(accumulated(small_net(), bs, micro_bs), plain_loop(small_net(), bs), atol=1e-6, rtol=0)
    if bs == 8: assert (accumulated(small_net(), bs, micro_bs) - plain_loop(small_net(), 4)).abs().max() > 1e-3


# --- Errors, rate, schedules

@pytest.mark.paper('4.1-errors')
def test_errors():
    scores = torch.tensor([[9, 8, 7, 6, 5, 4.], [9, 8, 7, 6, 5, 4], [4, 5, 6, 7, 8, 9], [1, 2, 9, 3, 4, 5]])
    assert top1_error(scores, torch.tensor([0, 1, 5, 0])) == .5 and top5_error(scores, torch.tensor([5, 4, 0, 2])) == .5


@pytest.mark.paper('3.4-rate')
def test_the_rate_is_in_proportion(): assert (default_lr(256), default_lr(32)) == (.1, .0125)


def fit_rates(cb, epochs=4, bs=8):
    "The rate of each batch of two fits: 6 batches and 3 updates an epoch"
    dl = DataLoader(TensorDataset(xs, ys), batch_size=4)
    learn = Learner(DataLoaders(dl, dl, device='cpu'), small_net(), loss_func=CrossEntropyLossFlat(), opt_func=paper_sgd, lr=.1,
                    cbs=[Accumulate(bs), cb])
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs - 1)
        first = list(learn.recorder.lrs)
        learn.fit(1)
    return np.array(first + list(learn.recorder.lrs)).reshape(epochs, -1)


def test_multi_step():
    assert fit_rates(MultiStepLR(epochs=(1, 3)))[:, 0] == pytest.approx([.1, .01, .01, .001])
    rates = fit_rates(step := MultiStepLR(updates=(4, 11)))
    assert rates[[0, 1, 1, 1, 3, 3], [5, 0, 1, 2, 3, 4]] == pytest.approx([.1, .1, .1, .01, .01, .001])
    assert [(d['epoch'], d['why']) for d in step.drops] == [(1, '4 updates are done'), (0, '11 updates are done')]
    with pytest.raises(DataError, match=r'epochs=\(…\) or updates=\(…\)'): MultiStepLR()


def test_warm_up():
    set_seed(0)
    rates = fit_rates(warm := WarmUp(lr=.01, until=.7, window=8), epochs=8).ravel()
    n = (rates == .01).sum()
    assert 8 <= n < 48 and (rates[n:] == .1).all() and np.mean(warm.errors) < .7
    assert (fit_rates(WarmUp(lr=.01, until=0.)) == .01).all()            # no error is below 0


# --- The learner

@pytest.fixture(scope='module')
def demo(tmp_path_factory): return demo_data(tmp_path_factory.mktemp('sgd')/'demo', sizes=dict(train=48, val=16, test=8))


def learner(demo, *cbs, **kw):
    set_seed(5)
    return resnet_learner(resnet_dls(*demo, 8, size=32, num_workers=0), 'cifar_resnet8', bs=16, cbs=cbs, **dict(lr=.1, patience=0, min_delta=10) | kw)


def quietly(learn, method, *args):
    with learn.no_bar(), learn.no_logging(): getattr(learn, method)(*args)
    return learn


@pytest.fixture(scope='module')
def once(demo): return quietly(learner(demo), 'fit', 4)


cols = ['epoch', 'train_loss', 'valid_loss', 'top1_error', 'top5_error', 'lr']


def test_two_fits_are_one(demo, once):
    "Momentum, rate, the plateau's count, the order of the photos and the smoothed loss go on; a look at a learner leaves no trace"
    twice = learner(demo)
    for _ in range(2): quietly(twice, 'fit', 2)
    best = twice.plateau_lr.best, twice.plateau_lr.wait
    with twice.no_bar(): twice.validate(), twice.get_preds()
    assert (twice.plateau_lr.best, twice.plateau_lr.wait) == best
    assert torch.equal(weights(once.model), weights(twice.model)) and once.recorder.losses == twice.recorder.losses
    assert once.history.df[cols].values.tolist() == twice.history.df[cols].values.tolist()
    assert len(twice.recorder.lrs) == 4*6 and len(twice.recorder.values) == 4 and once.history.df.lr.nunique() > 1


def test_history_and_recorder_agree(once):
    rec, df = once.recorder, once.history.df
    names = rec.metric_names[1:-1]
    assert df[names].values.tolist() == [list(v) for v in rec.values] and df.epoch.tolist() == list(range(len(rec.values)))
    assert df.lr.tolist() == [rec.lrs[n-1] for n in rec.iters] and df.train_error.between(0, 1).all()
    assert df.train_loss.tolist() == pytest.approx([rec.losses[n-1].item() for n in rec.iters], abs=1e-7)


def test_plot_history(once):
    df = once.history.df
    fig = plot_history(df)
    assert [line.get_label() for line in fig.axes[1].lines[:3]] == ['train error', 'top1 error', 'top5 error']
    assert sum(line.get_linestyle() == ':' for line in fig.axes[0].lines) == (df.lr.diff() < 0).sum() > 0
    smooth = plot_history(df.assign(lr=.1*.8**np.arange(len(df))))       # no steps: a line for each epoch would hide the curves
    assert not any(line.get_linestyle() == ':' for line in smooth.axes[0].lines)
    plot_history(df.drop(columns=['train_error', 'top5_error']))         # a history of an older model, or of two classes
    for none in (df[:0], df[:0][[]]):                                    # of a network that nobody has trained
        with pytest.raises(DataError, match='no epoch yet'): plot_history(none)
    with pytest.raises(DataError, match="no column 'lr'"): plot_history(df.drop(columns='lr'))


def test_defaults(demo, once):
    assert once.opt.hypers[0]['mom'] == .9 and resnet_learner(once.dls, 'cifar_resnet8', bs=16).lr == default_lr(16)
    dls = resnet_dls(*demo, 8, size=32, num_workers=0)
    assert list(resnet_learner(dls, 'resnet18').metrics.attrgot('name')) == ['top1_error', 'top5_error']
    dls.labels = LabelMap({}, dict(cat=0, dog=1))
    assert list(resnet_learner(dls, 'resnet18').metrics.attrgot('name')) == ['top1_error']   # with two classes, top-5 says nothing
    bad = resnet_learner(dls, 'resnet18')
    bad.plateau_lr.monitor = 'acuracy'
    with pytest.raises(ValueError, match="monitors 'acuracy'; there is train_loss, valid_loss, top1_error"): bad.fit(1)


def test_bf16_changes_little(demo):
    full, half = (quietly(learner(demo, precision=p, lr=.02, channels_last=p == 'bf16'), 'fit', 2) for p in ('fp32', 'bf16'))
    assert {p.dtype for p in half.model.state_dict().values() if p.is_floating_point()} == {torch.float32}
    assert half.history.df.valid_loss.tolist() == pytest.approx(full.history.df.valid_loss.tolist(), abs=.1)
    assert 0 < (weights(half.model) - weights(full.model)).abs().max() < .05
    with pytest.raises(DataError, match="precision is 'fp8'"): learner(demo, precision='fp8')


def test_which_tensors_decay(demo):
    def decaying(decay):
        learn = learner(demo, decay=decay)
        learn.create_opt()
        return {n for n, p in learn.model.named_parameters() if learn.opt.state[p].get('do_wd', True)}
    every = {n for n, _ in learner(demo).model.named_parameters()}
    assert decaying('all') == every and every - decaying('conv_fc') == {n for n in every if 'bn' in n}
    assert decaying('conv_fc') - decaying('weights') == {'fc.bias'}
    with pytest.raises(DataError, match="'weights', 'conv_fc' or 'all'"): decaying('none')


def test_generators_come_back():
    def draw():
        import random
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(2).tolist()
    draw()                                                               # gauss and randn keep a second number for the next call
    state = get_rng()
    drawn = draw()
    assert draw() != drawn
    set_rng(state)
    assert draw() == drawn


def test_what_does_not_fit_is_refused(demo, once, tmp_path):
    quietly(learner(demo, Checkpoint(tmp_path/'run')), 'fit', 1)
    with pytest.raises(DataError, match='belongs to a run with another network'):
        resnet_learner(once.dls, 'cifar_resnet14', bs=16, lr=.1, patience=0, min_delta=10, cbs=Checkpoint(tmp_path/'run')).resume(4)
    with pytest.raises(DataError, match='holds a run already'): quietly(learner(demo, Checkpoint(tmp_path/'run')), 'fit', 1)
    with pytest.raises(DataError, match='no checkpoint can be written'): quietly(learner(demo, Checkpoint(demo.label_path/'run')), 'fit', 1)
    with pytest.raises(DataError, match='there is no folder to resume from'): learner(demo).resume(4)
    with pytest.raises(DataError, match='every is 0'): Checkpoint('run', every=0)
    with pytest.raises(DataError, match='keep is 0'): Checkpoint('run', keep=0)


def test_a_damaged_checkpoint_is_left_aside(demo, tmp_path, capsys):
    quietly(learner(demo, Checkpoint(tmp_path/'run')), 'fit', 2)
    Checkpoint(tmp_path/'run').newest().write_bytes(b'not whole')
    again = quietly(learner(demo, Checkpoint(tmp_path/'run')), 'resume', 3)
    assert 'going on from' in capsys.readouterr().out and len(again.history.rows) == 3


def test_a_rate_that_is_too_high(demo, tmp_path):
    wild = learner(demo, Checkpoint(tmp_path/'wild'), lr=1e30)
    with pytest.raises(LossError, match='train_0') as e: quietly(wild, 'fit', 4)
    assert 'the rate 1e+30' in str(e.value)
