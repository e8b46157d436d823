"""Updates from a graph are the updates: everything a run leaves behind agrees to the bit with a run without one.

`TapeGraph` stands for the GPU: it records operations, computes nothing meanwhile, and executes them again on the same memory."""
import random
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelEpochException, CancelTrainException
from fastai.callback.schedule import ParamScheduler, SchedCos
from fastai.callback.training import GradientClip
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.optimizer import SGD, Adam
from fastai.torch_core import set_seed
from torch import nn

from resnet_fastai.engine import cuda_graph
from resnet_fastai.engine.checkpoint import Checkpoint, read_checkpoint
from resnet_fastai.engine.cuda_graph import CudaGraph, TapeGraph
from resnet_fastai.engine.foreach import foreach_step
from resnet_fastai.engine.finite import LossError
from resnet_fastai.training import MultiStepLR, WarmUp, caffe_sgd, resnet_learner

sys.path.insert(0, str(Path(__file__).parents[1]/'nbs'/'experiments'))
import cifar10  # noqa: E402

bs = 16


@pytest.fixture(autouse=True)
def one_thread():
    was = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(was)


def noise(n):
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, 32, 32), generator=g, dtype=torch.uint8), torch.randint(0, 10, (n,), generator=g)


class Plain(DataLoader):
    "Ready batches of pixels that a random crop has moved; the last one may be smaller"
    def create_item(self, i): return i
    def create_batch(self, idxs):
        x, y = self.dataset
        return torch.roll(x[idxs], int(torch.randint(5, ())), 3).float()/255 - .5, y[idxs]


def loaders(kind, n=bs*11 + 5):
    if kind == 'cifar': return cifar10.cifar_dls(dict(train=noise(n), test=noise(32), classes=list('abcdefghij')), bs, device='cpu')
    dls = DataLoaders(*(Plain(noise(m), bs=bs, n=m, shuffle=s, num_workers=0, device='cpu') for m, s in ((n, True), (32, False))))
    dls.vocab = dls.labels = list('abcdefghij')
    return dls


def learner(graphed, kind='cifar', cbs=(), look=7, **kw):
    dls = loaders(kind)
    set_seed(0)
    for dl in dls.loaders: dl.rng.seed(0)
    graph = [CudaGraph(look_every=look, graph=TapeGraph)] if graphed else []
    how = dict(lr=.1, precision='fp32', channels_last=False, schedule=MultiStepLR(updates=(9, 20), factor=10))
    return resnet_learner(dls, 'cifar_resnet8', bs=bs, cbs=[*graph, *cbs], **how | kw)


def fit(learn, epochs=3, resume=False):
    with learn.no_bar(), learn.no_logging(): (learn.resume if resume else learn.fit)(epochs)
    return learn


def left(learn):
    "All that a run leaves behind"
    rec = learn.recorder
    rows = [{k: v for k, v in r.items() if k != 'seconds'} for r in learn.history.rows]
    return dict(weights=dict(learn.model.state_dict()), momentum=[s['grad_avg'] for s in learn.opt.state.values()], rows=rows,
                losses=torch.stack(rec.losses), lrs=rec.lrs, iters=list(rec.iters), values=[list(v) for v in rec.values], lr=learn.lr,
                drops=[{k: d[k] for k in ('epoch', 'old', 'new')} for cb in learn.cbs for d in getattr(cb, 'drops', [])],
                counters=(learn.train_iter, learn.pct_train), rng=[torch.rand(3), random.random(), np.random.rand(2)])


def same(a, b):
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    if torch.is_tensor(a): return torch.equal(a, b)
    return np.array_equal(a, b) or a != a and b != b              # NaN: what an epoch that was cut short has not measured


def differences(a, b): return [k for k in a if not same(a[k], b[k])]


@pytest.mark.parametrize('kind', ['cifar', 'plain'])
@pytest.mark.parametrize('how', [{}, dict(precision='bf16', channels_last=True), dict(opt_func=caffe_sgd), dict(decay='all')],
                         ids=['fp32', 'bf16', 'caffe', 'decay'])
def test_a_run_from_the_graph_is_the_run(kind, how, capsys):
    eager, graphed = (left(fit(learner(g, kind, **how))) for g in (False, True))
    assert not differences(eager, graphed) and 'without' not in capsys.readouterr().out


def test_almost_all_updates_are_replays_and_each_rate_is_captured_once():
    learn = fit(learner(True))
    assert learn.cuda_graph.count == dict(captures=3, replays=33 - 3)                # 3 warm up; the rate falls twice
    learn = fit(learner(True, 'plain'))
    assert learn.cuda_graph.count == dict(captures=3, replays=36 - 3 - 3)            # and three last batches are smaller


def test_a_graph_that_is_not_captured_anew_would_be_noticed(monkeypatch):
    "The stand-in is as stubborn as a GPU: an old rate stays in it"
    eager = left(fit(learner(False)))
    own = cuda_graph._Updates.capture
    monkeypatch.setattr(cuda_graph._Updates, 'capture', lambda self, key, b: True if self.graph else own(self, key, b))
    assert 'weights' in differences(eager, left(fit(learner(True))))


def test_photos_are_augmented_anew_in_every_replay():
    crops = []

    class Watch(Callback):
        order, on_graph, run_valid = 99, 'replay', False
        def after_batch(self): crops.append(self.xb[0].clone())
    fit(learner(True, cbs=[Watch()]), 1)
    assert len(crops) == 11 and len({c.numpy().tobytes() for c in crops}) == 11


@pytest.mark.parametrize('every', [4, 5])
def test_a_run_goes_on_from_a_checkpoint_between_replays(tmp_path, every):
    class Stop(Callback):
        order, on_graph = 200, 'replay'
        def after_batch(self):
            if self.train_iter == 18: self.learn.stopping = True
    untouched = left(fit(learner(False)))
    stopped = learner(True, cbs=[Checkpoint(tmp_path, every=every), Stop()])
    with pytest.raises(KeyboardInterrupt), stopped.no_bar(), stopped.no_logging(): stopped.fit(3)
    assert 'one_batch' not in vars(stopped) and not stopped.dls.train.raw
    resumed = fit(learner(True, cbs=[Checkpoint(tmp_path, every=every)]), 3, resume=True)
    assert resumed.cuda_graph.count['replays'] == 33 - 18 - 3
    assert not differences(untouched, left(resumed))


def test_a_checkpoint_has_the_records_up_to_its_update(tmp_path):
    saved = []

    class Look(Callback):
        order, on_graph = 150, 'replay'
        def after_batch(self):
            if self.training and self.train_iter == 8: saved.append(read_checkpoint(self.checkpoint.newest()))
    fit(learner(True, cbs=[Checkpoint(tmp_path, every=8), Look()], look=50), 1)
    assert len(saved[0]['recorder']['losses']) == len(saved[0]['recorder']['lrs']) == 8 and saved[0]['ranks'][0]['counts']['seen'] == 8*bs


def test_weights_and_momentum_that_are_exchanged_between_epochs_count(tmp_path):
    class Exchange(Callback):
        def after_epoch(self):
            if self.epoch: return
            for s in self.opt.state.values(): s['grad_avg'] = s['grad_avg']*.5
    eager, graphed = (left(fit(learner(g, cbs=[Exchange()]))) for g in (False, True))
    assert not differences(eager, graphed)


def test_a_second_fit_and_a_validation_in_between():
    ends = []
    for graphed in (False, True):
        learn = fit(learner(graphed), 2)
        with learn.no_bar(): learn.validate()
        ends.append(left(fit(learn, 1)))
    assert not differences(*ends)


def test_an_epoch_that_a_callback_ends_early():
    class Short(Callback):
        order, on_graph, run_valid = 90, 'replay', False
        def after_batch(self):
            if self.iter == 6 and self.epoch < 2: raise (CancelTrainException, CancelEpochException)[self.epoch]()
    ends = []
    for graphed in (False, True):
        learn = fit(learner(graphed, cbs=[Short()]))
        ends.append({k: v for k, v in left(learn).items() if k != 'rows'})
    assert not differences(*ends)


def test_the_warm_up_ends_with_the_same_update():
    eager, graphed = (left(fit(learner(g, cbs=[WarmUp(.01, until=.9, window=5)]), 2)) for g in (False, True))
    assert .1 in graphed['lrs'] and .01 in graphed['lrs'] and not differences(eager, graphed)


def test_a_loss_that_is_no_number_is_found_at_the_next_look():
    class Spoil(Callback):
        order, on_graph = 150, 'replay'
        def after_batch(self):
            if self.training and self.iter == 5: self.model.fc.weight.data.fill_(float('inf'))
    for graphed in (False, True):
        learn = learner(graphed, cbs=[Spoil()], look=4)
        with pytest.raises(LossError, match='the loss is (nan|inf) in epoch 0, training batch 6'): fit(learn)
        assert len(learn.recorder.losses) == 6 and 'one_batch' not in vars(learn)


def test_losses_are_looked_at_every_so_many_updates(monkeypatch):
    looks, own = [], cuda_graph._Updates.flush
    def flush(self): looks.append(len(self.pending)); own(self)
    monkeypatch.setattr(cuda_graph._Updates, 'flush', flush)
    fit(learner(True, look=7, schedule=MultiStepLR(updates=(1000,))), 2)
    assert [n for n in looks if n] == [7, 1, 7, 4]              # 3 warm up, 8 left; 11


class Unknown(Callback):
    def after_pred(self): pass


class Odd(Callback):
    on_graph = 'replay'
    def after_loss(self): pass


@pytest.mark.parametrize('how, reason', [
    (dict(cbs=[GradientClip(1.)]), 'GradientClip works on each batch'),
    (dict(cbs=[ParamScheduler(dict(lr=SchedCos(.1, .01)))]), 'ParamScheduler works on each batch'),
    (dict(cbs=[Unknown()]), 'Unknown works on each batch (after_pred)'),
    (dict(cbs=[Odd()]), 'Odd works on each batch (after_loss)'),
    (dict(opt_func=Adam), 'the optimizer counts for itself (step)'),
    (dict(precision='fp16'), 'fp16 decides'),
    (dict(bs=32), 'an update has 32 photos, and a batch 16')])
def test_what_cannot_be_captured_trains_as_usual_and_says_why(how, reason, capsys):
    how = dict(how)
    size = how.pop('bs', bs)
    def made(graphed):
        dls = loaders('cifar', 64)
        set_seed(0)
        for dl in dls.loaders: dl.rng.seed(0)
        cbs = [*([CudaGraph(graph=TapeGraph)] if graphed else []), *how.get('cbs', ())]
        return resnet_learner(dls, 'cifar_resnet8', bs=size, lr=.01, cbs=cbs, schedule=MultiStepLR(epochs=(9,)), channels_last=False,
                              **dict(precision='fp32') | {k: v for k, v in how.items() if k != 'cbs'})
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        eager, graphed = (fit(made(g), 1) for g in (False, True))
    assert capsys.readouterr().out.count(f'training without a CUDA graph: {reason}') == 1
    assert graphed.cuda_graph.count['replays'] == 0
    assert same(dict(eager.model.state_dict()), dict(graphed.model.state_dict()))


def test_hooks_are_refused(capsys):
    hooked = learner(True)
    hooked.model.conv1.register_forward_hook(lambda *_: None)
    fit(hooked, 1)
    assert 'the network has hooks' in capsys.readouterr().out


def test_a_compiled_network_is_captured():
    def run(graphed):
        learn = learner(graphed)
        learn.model.compile(backend='aot_eager')
        return fit(learn, 2)
    eager, graphed = run(False), run(True)
    assert graphed.cuda_graph.count['replays'] > 2 and graphed.cuda_graph.reason is None
    assert same(dict(eager.model.state_dict()), dict(graphed.model.state_dict()))


def test_on_the_processor_a_cuda_graph_is_refused_with_the_reason(capsys):
    learn = fit(resnet_learner(loaders('cifar'), 'cifar_resnet8', bs=bs, cbs=[CudaGraph()]), 1)
    assert 'training without a CUDA graph: the network is on cpu, and CUDA graphs need a GPU' in capsys.readouterr().out and len(learn.history.rows) == 1


def test_a_capture_that_fails_costs_nothing_but_the_speed(monkeypatch, capsys):
    class Net(nn.Module):
        def forward(self, x): return x*(1 if self.training and float(x.sum()) else 1)            # waits for the device
    ends = []
    for graphed in (False, True):
        learn = learner(graphed)
        learn.model.append(Net())
        ends.append(left(fit(learn)))
    assert not differences(*ends)
    assert capsys.readouterr().out.count('training without a CUDA graph: it cannot be captured: aten._local_scalar_dense') == 1


def test_hyperparameters_that_never_rest_are_not_captured_for_ever(capsys):
    class Restless(Callback):
        order, on_graph, run_valid = 90, 'replay', False
        def after_batch(self): self.opt.set_hyper('mom', .9 - self.train_iter*1e-3)
    eager, graphed = left(fit(learner(False, cbs=[Restless()]))), learner(True, cbs=[Restless()])
    assert not differences(eager, left(fit(graphed))) and graphed.cuda_graph.count['captures'] <= 6
    assert 'the hyperparameters change with nearly every update' in capsys.readouterr().out


def test_the_foreach_step_is_the_step():
    def parts():
        torch.manual_seed(1)
        ps = [nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(2))]
        opt = SGD([ps[:2], ps[2:]], lr=[.1, .02], mom=.9, wd=1e-2, decouple_wd=False)
        opt.state[ps[1]]['do_wd'] = False
        return ps, opt
    (a, one), (b, two) = parts(), parts()
    for i in range(4):
        for p, q in zip(a, b):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
            q.grad = p.grad.clone()
        if i == 2: a[2].grad = b[2].grad = None
        one.step(), foreach_step(two)
    assert all(torch.equal(p, q) for p, q in zip(a, b))
    assert all(torch.equal(one.state[p]['grad_avg'], two.state[q]['grad_avg']) for p, q in zip(a, b))


def test_the_stand_in_records_and_computes_nothing_meanwhile():
    x, w, total = torch.ones(3), torch.ones(3, requires_grad=True), torch.zeros(())
    made = []
    def f():
        loss = (w*x).sum() + torch.rand(())
        loss.backward()
        total.add_(loss.detach())
        w.data.sub_(w.grad, alpha=.5)
        made.append(loss.detach())
    torch.manual_seed(0)
    graph = TapeGraph()
    graph.capture(f)
    assert total == 0 and torch.equal(w.data, torch.ones(3)) and made[0].isnan()
    x.fill_(2.)
    graph.replay(), graph.replay()
    torch.manual_seed(0)
    draws = torch.rand(()) + torch.rand(())
    assert len(made) == 1 and torch.equal(w.data, torch.full((3,), -1.)) and torch.isclose(total, 6. + 0. + draws)
    with pytest.raises(RuntimeError, match='not permitted'): TapeGraph().capture(lambda: x.sum().item())
