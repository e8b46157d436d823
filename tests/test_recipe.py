"What moves the rate, what decays, and what a run writes down about itself."
import random
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.imports import noop
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from resnet_fastai.core import ResNet
from resnet_fastai.data import demo_data
from resnet_fastai.engine.files import DataError
from resnet_fastai.training import (
    Accumulate, History, PlateauLR, MultiStepLR, WarmUp, caffe_sgd, paper_sgd, plot_history, resnet_learner)

settings = dict(arch='cifar_resnet8', size=32, bs=8, micro_bs=4, num_workers=0)


@pytest.fixture(scope='module')
def photos(tmp_path_factory): return demo_data(tmp_path_factory.mktemp('photos')/'drawn', sizes=dict(train=44, val=12, test=4))


def fitted(photos, epochs=2, **kw):
    m = ResNet(*photos, **settings | kw)
    with m.learn.no_bar(), m.learn.no_logging(): m.fit(epochs)
    return m


# ---- the plateau beside torch's scheduler

def our_rates(losses, **kw):
    "The rate after each epoch: the callback on a learner that is only its values"
    cb, rates = PlateauLR(**kw), []
    cb.learn = SimpleNamespace(opt=paper_sgd([torch.zeros(1)], lr=.1), logger=noop, epoch=0, lr=.1, cbs=[],
                               recorder=SimpleNamespace(metric_names=['epoch', 'train_loss', 'valid_loss', 'time'], values=[], add_time=True,
                                                        cancel_valid=False))
    cb.before_fit()
    for loss in losses:
        cb.learn.recorder.values.append([0., loss])
        cb.before_epoch(); cb.before_train(); cb.after_epoch()
        rates.append(cb.learn.opt.hypers[-1]['lr'])
    return rates, cb


def torch_rates(losses, patience, min_delta, factor, cooldown, min_lr):
    opt = torch.optim.SGD([torch.zeros(1)], lr=.1)
    plateau = lr_scheduler.ReduceLROnPlateau(opt, factor=1/factor, patience=patience, threshold=min_delta, threshold_mode='abs', cooldown=cooldown,
                                min_lr=min_lr, eps=0)
    rates = []
    for loss in losses:
        plateau.step(loss)
        rates.append(opt.param_groups[0]['lr'])
    return rates


def draw_losses(rng):
    n = rng.randint(6, 40)
    return [rng.choice([rng.randint(0, 8)/8, 1 - i/n, float('nan'), .5, rng.random()]) for i in range(n)]


@pytest.mark.paper('3.4-plateau')
def test_a_thousand_sequences_fall_as_torchs_do():
    rng, drops = random.Random(0), 0
    for _ in range(1000):
        losses = draw_losses(rng)
        kw = dict(patience=rng.randint(0, 5), min_delta=rng.choice([0, 1e-4, .125, .3]), factor=rng.choice([2, 10, 5]),
                  cooldown=rng.randint(0, 5), min_lr=rng.choice([0, 0, .003, .05, .2]))
        ours, cb = our_rates(losses, **kw)
        np.testing.assert_allclose(np.log10(ours), np.log10(torch_rates(losses, **kw)), atol=1e-6, err_msg=f'{kw} {losses}')
        assert len(cb.drops) == (np.diff([.1, *ours]) < 0).sum()
        drops += len(cb.drops)
    assert drops > 2000


@pytest.mark.paper('3.4-plateau')
@pytest.mark.parametrize('monitor', ['train_loss', 'valid_loss', 'top1_error'])
def test_any_value_can_be_monitored_and_drops_are_logged(photos, monitor, capsys):
    m = ResNet(*photos, **settings, schedule=PlateauLR(monitor, patience=0, min_delta=10, cooldown=1))
    with m.learn.no_bar(): m.fit(2); m.fit(2)
    drops = m.learn.plateau_lr.drops
    assert [d['epoch'] for d in drops] == [1, 3] and [d['new'] for d in drops] == pytest.approx([.0003125, .00003125])
    assert all(f"{monitor} is {m.history[monitor][d['epoch']]:.4g}" in d['why'] for d in drops)
    assert f"epoch 1: {drops[0]['why']}; rate 0.003125 → 0.0003125" in capsys.readouterr().out


# ---- steps and warm-up

def batch_rates(cb, epochs, n=24, micro_bs=4, bs=8):
    "The rate that each micro-batch was used with, over two fits"
    torch.manual_seed(0)
    dl, found = DataLoader(TensorDataset(torch.randn(n, 5), torch.randint(0, 3, (n,))), batch_size=micro_bs), []
    class Note(Callback):
        order = 0
        def before_backward(self): found.append(self.opt.hypers[-1]['lr'])
    learn = Learner(DataLoaders(dl, dl, device='cpu'), nn.Linear(5, 3), loss_func=CrossEntropyLossFlat(), opt_func=paper_sgd, lr=.1,
                    cbs=[Accumulate(bs), History(), cb, Note()])
    with learn.no_bar(), learn.no_logging(): learn.fit(1); learn.fit(epochs-1)
    return found


@pytest.mark.paper('4.2-rate')
@pytest.mark.parametrize('unit,at', [('updates', (1,)), ('updates', (2, 4, 5)), ('updates', (3, 9)), ('epochs', (1, 2)), ('epochs', (3,))])
def test_steps_are_torchs_milestones(unit, at):
    ours = batch_rates(MultiStepLR(**{unit: at}), 4)
    opt, theirs = torch.optim.SGD([torch.zeros(1)], lr=.1), []
    steps = lr_scheduler.MultiStepLR(opt, [a*(3 if unit == 'epochs' else 1) for a in at], gamma=.1)
    for i in range(24):                                    # 3 updates of 2 micro-batches in each epoch
        theirs.append(opt.param_groups[0]['lr'])
        if i % 2: opt.step(); steps.step()
    np.testing.assert_allclose(ours, theirs)


def test_steps_go_on_after_resuming(photos, tmp_path):
    kw = dict(run_folder=tmp_path/'run', every=1)
    fitted(photos, 1, schedule=MultiStepLR(updates=(3, 8)), **kw)
    m = ResNet(*photos, **settings, schedule=MultiStepLR(updates=(3, 8)), **kw)
    with m.learn.no_bar(), m.learn.no_logging(): m.fit(2, resume=True)
    assert m.learn.recorder.lrs == fitted(photos, 2, schedule=MultiStepLR(updates=(3, 8))).learn.recorder.lrs
    assert m.learn.multi_step_lr.done == 12 and len({*m.learn.recorder.lrs}) == 3


@pytest.mark.paper('4.2-warm-up')
def test_the_warm_up_ends_with_the_error(photos, tmp_path):
    m = fitted(photos, 2, cbs=[WarmUp(lr=.001, until=1.1, window=5)], lr=.01)
    assert m.learn.recorder.lrs == [.001]*5 + [.01]*17      # any error is below 1.1: it ends with the first full window
    assert {*fitted(photos, 2, cbs=[WarmUp(lr=.001, until=0., window=5)], lr=.01).learn.recorder.lrs} == {.001}
    fitted(photos, 1, cbs=[WarmUp(lr=.001, until=1.1, window=15)], lr=.01, run_folder=tmp_path/'run')
    m = ResNet(*photos, **settings, cbs=[WarmUp(lr=.001, until=1.1, window=15)], lr=.01, run_folder=tmp_path/'run')
    with m.learn.no_bar(), m.learn.no_logging(): m.fit(2, resume=True)
    assert m.learn.recorder.lrs == [.001]*15 + [.01]*7


# ---- decay and momentum

def decayed(photos, decay):
    "Which tensors a step moves whose gradients are all zero"
    m = ResNet(*photos, **settings, decay=decay)
    m.learn.create_opt()
    m.learn.opt.set_hypers(lr=1., wd=.5)
    for p in m.net.parameters(): p.data += 1; p.grad = torch.zeros_like(p)
    was = {n: p.detach().clone() for n, p in m.net.named_parameters()}
    m.learn.opt.step()
    return {n for n, p in m.net.named_parameters() if not torch.equal(p, was[n])}, set(was)


@pytest.mark.paper('3.4-decay')
def test_what_decays_has_a_name(photos):
    found = {d: decayed(photos, d)[0] for d in ('all', 'conv_fc', 'weights')}
    every = decayed(photos, 'all')[1]
    assert found['all'] == every
    assert found['conv_fc'] == {n for n in every if 'conv' in n or n.startswith('fc.')}
    assert found['weights'] == found['conv_fc'] - {'fc.bias'} and found['weights'] == decayed(photos, 'weights')[0]
    with pytest.raises(DataError, match="decay is 'bn'"): ResNet(*photos, **settings, decay='bn')


def test_caffes_momentum(photos):
    m = fitted(photos, 2, opt_func=caffe_sgd, schedule=MultiStepLR(epochs=(1,)))
    same_rate, paper = fitted(photos, 1, opt_func=caffe_sgd), fitted(photos, 1)
    for a, b in zip(same_rate.net.parameters(), paper.net.parameters()): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    paper = fitted(photos, 2, schedule=MultiStepLR(epochs=(1,)))
    gone = [(a - b).abs().max().item() for a, b in zip(m.net.parameters(), paper.net.parameters())]
    assert max(gone) > 1e-4 and m.learn.opt.hypers[0]['mom'] == .9 and m.learn.opt.hypers[0]['wd'] == 1e-4


def test_half_an_update_does_not_reach_the_next_fit(photos):
    "A run that breaks off between micro-batches leaves gradients; the next fit does not begin with them"
    m = ResNet(*photos, **settings)
    with m.learn.no_bar(), m.learn.no_logging():
        m.learn.create_opt()
        m.learn('before_fit'); m.learn.epoch = 0
        b = m.learn.dls.train.one_batch()
        m.learn.loss_func(m.net(b[0]), b[1]).backward()
        assert any(p.grad.abs().max() > 0 for p in m.net.parameters())
        m.learn('before_train')
    assert not any(p.grad.abs().max() > 0 for p in m.net.parameters())


# ---- what is written down

def test_history_and_recorder_agree(photos):
    m = fitted(photos, 2, patience=0, min_delta=10)
    with m.learn.no_bar(), m.learn.no_logging(): m.fit(2)
    rec, df = m.learn.recorder, m.history
    assert df[rec.metric_names[1:-1]].values.tolist() == [list(v) for v in rec.values]
    assert df.lr.tolist() == [rec.lrs[n-1] for n in rec.iters] and df.lr.nunique() > 1
    assert rec.iters == [11, 22, 33, 44] and len(rec.losses) == len(rec.lrs) == 44
    assert df.train_loss.tolist() == [float(rec.losses[n-1]) for n in rec.iters]


def test_the_training_error_counts_every_photo_once(photos):
    wrong = []
    class Count(Callback):
        def after_pred(self):
            if self.training: wrong.append((self.pred.argmax(1) != self.yb[0]).tolist())
    m = fitted(photos, 3, cbs=[Count()], lr=.05)
    rows = [sum(wrong[i:i+11], []) for i in (0, 11, 22)]
    assert [len(r) for r in rows] == [44]*3 and m.history.train_error.tolist() == [sum(r)/44 for r in rows]


def test_the_runs_folder_tells_the_history(photos, tmp_path):
    m = fitted(photos, 3, run_folder=tmp_path/'run')
    read = pd.read_csv(tmp_path/'run'/'history.csv')
    pd.testing.assert_frame_equal(read, m.history, check_exact=True)


def test_the_history_file_grows_by_the_epoch(photos, tmp_path):
    lines = []
    class Look(Callback):
        order = 101
        def after_epoch(self): lines.append((tmp_path/'run'/'history.csv').read_text().splitlines())
    fitted(photos, 3, run_folder=tmp_path/'run', cbs=[Look()])
    assert [len(x) for x in lines] == [2, 3, 4] and lines[2][:3] == lines[1]


def seen_by_the_colour_blind(hex_color):
    "Linear RGB as deuteranopes see it (Viénot, Brettel and Mollon 1999)"
    rgb = np.array([int(hex_color[i:i+2], 16)/255 for i in (1, 3, 5)])**2.2
    return np.array([[.29275, .70725, 0], [.29275, .70725, 0], [-.02234, .02234, 1]]) @ rgb


def test_the_curves_of_figure_4(photos):
    df = fitted(photos, 4, patience=0, min_delta=10).history
    fig = plot_history(df)
    loss, error = fig.axes
    lines = {line.get_label(): line for ax in (loss, error) for line in ax.lines}
    for name in ('train_loss', 'valid_loss', 'train_error', 'top1_error', 'top5_error'):
        line = lines[name.replace('_', ' ')]
        np.testing.assert_array_equal(line.get_xydata(), df[['epoch', name]])
    assert lines['train error'].get_linewidth() < lines['top1 error'].get_linewidth()
    marked = [line.get_xdata()[0] for line in error.lines if line.get_linestyle() == ':']
    assert marked == [e - .5 for e in df.epoch[1:] if df.lr[e] < df.lr[e-1]] and marked
    colors = [seen_by_the_colour_blind(lines[n].get_color()) for n in ('train error', 'top1 error', 'top5 error')]
    assert min(np.abs(a - b).max() for i, a in enumerate(colors) for b in colors[:i]) > .1
    plt.close('all')


def test_tensorboard_writes_its_file(photos, tmp_path):
    pytest.importorskip('tensorboard', reason='tensorboard is not installed')
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    fitted(photos, 2, cbs=[TensorBoardCallback(log_dir=tmp_path/'tb', trace_model=False, log_preds=False)], run_folder=tmp_path/'run')
    assert list((tmp_path/'tb').glob('events.out.tfevents*'))
    events = EventAccumulator(str(tmp_path/'tb'))
    events.Reload()
    assert {'train_loss', 'valid_loss', 'top1_error', 'lr_0'} <= {*events.Tags()['scalars']}
    assert [e.value for e in events.Scalars('valid_loss')] == pytest.approx(pd.read_csv(tmp_path/'run'/'history.csv').valid_loss.tolist())


# ---- fewer bits

def forward_dtypes(photos, **kw):
    "The dtypes of what each kind of layer puts out, and of the loss"
    found = {}
    class Look(Callback):
        order = 80
        def before_fit(self):
            def note(m, _, out): found.setdefault(type(m).__name__, set()).add(out.dtype)
            self.hooks = [m.register_forward_hook(note) for m in self.model.modules()]
        def after_loss(self): found.setdefault('loss', set()).add(self.loss.dtype)
        def after_fit(self): [h.remove() for h in self.hooks]
    return found, fitted(photos, 2, cbs=[Look()], **kw)


@pytest.mark.parametrize('precision,dtype', [('fp32', torch.float32), ('bf16', torch.bfloat16), ('fp16', torch.float16)])
def test_convolutions_in_fewer_bits(photos, precision, dtype):
    found, m = forward_dtypes(photos, precision=precision, channels_last=precision == 'bf16', lr=.02)
    assert found['Conv2d'] == {dtype} and found['loss'] == {torch.float32}
    assert {v.dtype for v in m.net.state_dict().values() if v.is_floating_point()} == {torch.float32}
    assert {s['grad_avg'].dtype for s in m.learn.opt.state.values() if 'grad_avg' in s} == {torch.float32}
    plain = fitted(photos, 2, lr=.02)
    np.testing.assert_allclose(m.history.valid_loss, plain.history.valid_loss, atol=.1)
    assert not torch.is_autocast_enabled('cpu')
    if precision == 'bf16': assert m.net.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_an_update_that_overflows_is_left_out(photos):
    "fp16: infinite gradients reach no weight, and the next update is scaled less"
    seen = []
    class Overflow(Callback):
        order = -11.5                                      # after the micro-batches are together, before the scaler looks
        def after_backward(self):
            self.model.fc.bias.grad.fill_(float('inf') if len(seen) == 1 else 0.)
            self.was = self.model.conv1.weight.detach().clone()
        def after_batch(self):
            if self.training and self.between_updates: seen.append((self.learn.scaler.get_scale(), torch.equal(self.was, self.model.conv1.weight)))
    fitted(photos, 1, precision='fp16', cbs=[Overflow()])
    scales, still = zip(*seen)
    assert list(still) == [False, True] + [False]*4 and scales[1] == scales[0]/2 == scales[-1]


@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_fewer_bits_resume(photos, tmp_path, precision):
    kw = dict(precision=precision, run_folder=tmp_path/'run')
    fitted(photos, 1, **kw)
    m = ResNet(*photos, **settings, **kw)
    with m.learn.no_bar(), m.learn.no_logging(): m.fit(2, resume=True)
    whole = fitted(photos, 2, precision=precision)
    assert all(torch.equal(v, whole.net.state_dict()[k]) for k, v in m.net.state_dict().items())
    m = ResNet(*photos, **settings, precision='fp32', run_folder=tmp_path/'run')
    with pytest.raises(DataError, match='another network.*precision'): m.fit(2, resume=True)


def test_an_interrupted_forward_pass_leaves_no_autocast(photos):
    class Break(Callback):
        def before_fit(self): self.hook = self.model.fc.register_forward_pre_hook(lambda *_: 1/0)
    m = ResNet(*photos, **settings, precision='bf16', cbs=[Break()])
    with m.learn.no_bar(), pytest.raises(ZeroDivisionError): m.fit(1)
    assert not torch.is_autocast_enabled('cpu')


def test_a_long_run_keeps_its_losses_side_by_side_in_memory():
    "230 updates: those of each hundred, and the rest, share one block; alone each would split a large free one"
    x = torch.randn(230*2, 3, 8, 8)
    dls = DataLoaders.from_dsets(list(zip(x, torch.arange(460) % 10)), list(zip(x[:4], torch.arange(4))), bs=2, device='cpu', num_workers=0, shuffle=True)
    dls.vocab = list(range(10))
    learn, seen = resnet_learner(dls, 'cifar_resnet8', bs=2, lr=1e-3, precision='fp32'), []
    class Keep(Callback):
        order = 99
        def after_batch(self):
            if self.training: seen.append(float(self.recorder.losses[-1]))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[Keep()])
    losses = learn.recorder.losses
    assert [float(v) for v in losses] == seen and len(seen) == 230 and all(v.ndim == 0 for v in losses)
    assert len({v.untyped_storage().data_ptr() for v in losses}) == 3
