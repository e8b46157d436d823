"A rate that rises with each update, as Goyal et al. (2017) warm up: their formula, what else sets rates, and resuming."
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback

from resnet_fastai.core import ResNet
from resnet_fastai.data import demo_data
from resnet_fastai.engine.files import DataError
from resnet_fastai.practice.distributed import GradualWarmUp
from resnet_fastai.training import MultiStepLR

pytestmark = pytest.mark.usefixtures('one_thread')
settings = dict(arch='cifar_resnet8', size=32, bs=8, micro_bs=4, num_workers=0, device='cpu', lr=.4)


@pytest.fixture(scope='module')
def photos(tmp_path_factory): return demo_data(tmp_path_factory.mktemp('warm')/'drawn', sizes=dict(train=44, val=8, test=2))      # 6 updates of 11 batches


class Stop(BaseException): "As a kill"


class At(Callback):
    order = 101
    def __init__(self, n): self.n = n
    def after_batch(self):
        self.n -= self.training
        if not self.n: raise Stop


def fit(photos, epochs, *cbs, resume=False, **kw):
    m = ResNet(*photos, **settings | kw, cbs=cbs)
    with m.learn.no_bar(), m.learn.no_logging(): m.fit(epochs, resume=resume)
    return m


def goyal(u, total, start, full): return full if u >= total else start + (full - start)*u/total


def test_each_update_adds_the_same(photos):
    m = fit(photos, 3, GradualWarmUp(epochs=2, start=.05))
    of_batch = [goyal(6*epoch + u, 12, .05, .4) for epoch in range(3) for u in range(6) for _ in range(2 if u < 5 else 1)]
    np.testing.assert_allclose(m.learn.recorder.lrs, of_batch, rtol=1e-12)
    assert m.learn.lr == .4 and m.learn.gradual_warm_up.done == 12
    with m.learn.no_bar(), m.learn.no_logging(): m.fit(1)
    assert {*m.learn.recorder.lrs[33:]} == {.4} and len(m.learn.recorder.lrs) == 44         # only once in a run


def test_it_goes_on_in_the_next_fit_and_falls_never(photos):
    m = fit(photos, 1, GradualWarmUp(epochs=1.5, start=9))               # a start above the learner's own rate
    assert {*m.learn.recorder.lrs} == {.4}
    m = fit(photos, 1, GradualWarmUp(epochs=1.5, start=0))
    with m.learn.no_bar(), m.learn.no_logging(): m.fit(1)
    np.testing.assert_allclose([m.learn.recorder.lrs[i] for epoch in (0, 11) for i in range(epoch, epoch + 11, 2)], [goyal(u, 9, 0, .4) for u in range(12)])


@pytest.mark.parametrize('schedule', [None, MultiStepLR(updates=(3,))])
def test_no_drop_meanwhile(photos, schedule):
    "A plateau that would drop after each epoch waits for its end; one that was given a time in it has none"
    m = fit(photos, 4, GradualWarmUp(epochs=2.5, start=.1), **drops if schedule is None else dict(schedule=schedule))
    assert m.learn.recorder.lrs[30:33] == [.4]*3                         # the whole rate from the middle of the third epoch on
    dropped = m.learn.plateau_lr.drops if schedule is None else schedule.drops
    assert [d['epoch'] for d in dropped] == ([2, 3] if schedule is None else [])


drops = dict(patience=0, min_delta=10)                                   # after each epoch but the first


@pytest.fixture(scope='module')
def whole(photos): return fit(photos, 3, GradualWarmUp(epochs=1.25), **drops)


@pytest.mark.parametrize('n', [3, 4, 11, 15])
def test_resumed_is_untouched(photos, whole, tmp_path, n):
    "In the middle of an update, between two, at an epoch's end, after the warm-up: to the bit, with the drops that follow"
    kw = dict(run_folder=tmp_path/'run', every=1) | drops
    with pytest.raises(Stop): fit(photos, 3, GradualWarmUp(epochs=1.25), At(n), **kw)
    again = fit(photos, 3, GradualWarmUp(epochs=1.25), resume=True, **kw)
    assert whole.learn.lr == again.learn.lr == pytest.approx(.004) and len(whole.learn.plateau_lr.drops) == 2
    assert again.learn.recorder.lrs == whole.learn.recorder.lrs
    for a, b in zip(whole.net.state_dict().values(), again.net.state_dict().values()): assert torch.equal(a, b)


def test_another_warm_up_is_another_run(photos, tmp_path):
    fit(photos, 1, GradualWarmUp(epochs=2), run_folder=tmp_path/'run')
    with pytest.raises(DataError): fit(photos, 2, GradualWarmUp(epochs=3), run_folder=tmp_path/'run', resume=True)


def test_what_it_refuses(photos):
    m = ResNet(*photos, **settings, cbs=GradualWarmUp())
    with m.learn.no_bar(), m.learn.no_logging(), pytest.raises(DataError, match='a schedule sets the rate already'): m.learn.fit_one_cycle(1, .1)
    for kw in (dict(epochs=0), dict(start=-1)):
        with pytest.raises(DataError, match='GradualWarmUp has epochs='): GradualWarmUp(**kw)
    suggested = m.learn.lr_find(num_it=5, stop_div=False, show_plot=False)
    assert suggested.valley > 0 and not m.learn.gradual_warm_up.done
