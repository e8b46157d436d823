"fastai's schedules beside a plateau, and a run that breaks off in one."
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.schedule import ParamScheduler, SchedCos, SchedLin
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import ShortEpochCallback
from fastai.torch_core import set_seed

from kill_and_resume import result, same
from resnet_fastai.data import DataError, demo_data, resnet_dls
from resnet_fastai.training import Checkpoint, MultiStepLR, PlateauLR, resnet_learner

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def photos(tmp_path_factory): return demo_data(tmp_path_factory.mktemp('photos')/'drawn', sizes=dict(train=12, val=4, test=2))


def halves(net): return [[*net.conv1.parameters(), *net.bn1.parameters()], [p for k, p in net.named_parameters() if k[:5] not in ('conv1', 'bn1.w', 'bn1.b')]]


def learner(photos, *cbs, schedule=None, groups=None, lr=.05):
    "Every epoch is a plateau; three updates an epoch"
    set_seed(3)
    learn = resnet_learner(resnet_dls(*photos, micro_bs=4, size=16, num_workers=0), 'cifar_resnet8', bs=4, lr=lr, patience=0, min_delta=10,
                           schedule=schedule, precision='fp32', cbs=[*cbs])
    if groups: learn.splitter = groups
    return learn


def quietly(learn, how, *args, **kw):
    with learn.no_bar(), learn.no_logging(): getattr(learn, how)(*args, **kw)
    return learn


def cosine(): return ParamScheduler({'lr': SchedCos(.08, .001), 'mom': SchedLin(.8, .95)})


def ways():
    "Each way of fastai's to fit three epochs on a schedule"
    return dict(fit_one_cycle=lambda learn: quietly(learn, 'fit_one_cycle', 3, .2), fit_one_cycle_own_rate=lambda learn: quietly(learn, 'fit_one_cycle', 3),
                fit_flat_cos=lambda learn: quietly(learn, 'fit_flat_cos', 3, np.float64(.1), pct_start=.4),
                fit_sgdr=lambda learn: quietly(learn, 'fit_sgdr', 2, 1, lr_max=.1),
                param_scheduler=lambda learn: quietly(learn, 'fit', 3, cbs=cosine()))


# ---- a schedule and a plateau

@pytest.mark.parametrize('schedule', [None, 'steps'])
@pytest.mark.parametrize('name', [*ways(), 'fine_tune', 'two_groups'])
def test_a_schedule_and_then_a_fit(photos, name, schedule):
    "The schedule runs as if there were no plateau; then the learner's own rate and momentum, and the plateau again"
    groups = halves if name in ('fine_tune', 'two_groups') else None
    fit = ways().get(name) or dict(fine_tune=lambda learn: quietly(learn, 'fine_tune', 2, .1),
                                   two_groups=lambda learn: quietly(learn, 'fit_one_cycle', 3, slice(.001, .1)))[name]
    steps = [MultiStepLR(epochs=(1, 2, 4)) if schedule else None for _ in 'ab']
    learn, free = (learner(photos, groups=groups, schedule=s) for s in steps)
    free.remove_cb(MultiStepLR if schedule else PlateauLR)
    for x in (learn, free): fit(x)
    drops = (learn.multi_step_lr if schedule else learn.plateau_lr).drops
    assert [float(a) for a in learn.recorder.lrs] == [float(a) for a in free.recorder.lrs] and len({*map(float, free.recorder.lrs)}) > 3
    assert drops == [] and learn.lr == .05 and type(learn.lr) is float and {h['mom'] for h in learn.opt.hypers} == {.9}
    epochs = len(learn.history.rows)
    quietly(learn, 'fit', 2)
    rates = learn.recorder.lrs[epochs*3:]
    assert rates[:3] == [.05]*3 and rates[3:] == pytest.approx([.005]*3) and type(learn.lr) is float and drops[0]['epoch'] == 3
    assert {h['mom'] for h in learn.opt.hypers} == {.9}
    quietly(learn, 'fit_one_cycle', 1, np.float32(.1))
    assert np.isfinite(learn.history.df.train_loss).all()


@pytest.mark.parametrize('lr', [np.float64(.04), np.float32(.04), torch.tensor(.04)])
def test_rates_of_other_kinds_of_numbers(photos, lr):
    learn = quietly(learner(photos, lr=lr), 'fit', 1)
    quietly(learn, 'fit', 1, lr=lr)
    learn.lr = lr
    quietly(learn, 'fit', 1)
    assert type(learn.lr) is float and learn.recorder.lrs[0] == pytest.approx(.04)


def test_two_groups_keep_their_ratio(photos):
    learn = quietly(learner(photos, groups=halves), 'fit', 2, lr=slice(.001, .1))
    assert [h['lr'] for h in learn.opt.hypers] == pytest.approx([.0001, .01])
    quietly(learn, 'fit', 1)
    assert learn.recorder.lrs[-3:] == pytest.approx([.01]*3)


# ---- a run that breaks off in a schedule

class Stop(BaseException): "Ends a run at once, as a kill does"


class At(Callback):
    "Ends the run after so many training batches"
    order = 101
    def __init__(self, n, error=Stop): self.n, self.error = n, error
    def after_batch(self):
        self.n -= self.training
        if self.n == 0 and self.training: raise self.error()


def everything(learn):
    "All that must agree, as it is now"
    momentum = [learn.opt.state[p].get('grad_avg', torch.zeros(0)) for p in learn.model.parameters()]
    return deepcopy(result(SimpleNamespace(learn=learn, net=learn.model)) | dict(momentum=momentum, hps=getattr(learn.recorder, 'hps', None), frozen=learn.opt.frozen_idx))


def differing(a, b): return [k for k in a if not same(a[k], b[k])]


@pytest.mark.parametrize('n', [1, 3, 8])
@pytest.mark.parametrize('name', ways())
def test_it_goes_on_to_the_same_bits(photos, tmp_path, name, n):
    "Broken off in any epoch or between two, resumed, and fitted on"
    fit = ways()[name]
    want = [everything(whole := fit(learner(photos))), everything(quietly(whole, 'fit', 2))]
    broken = learner(photos, Checkpoint(tmp_path/'run', every=1), At(n))
    with pytest.raises(Stop): fit(broken)
    again = learner(photos, Checkpoint(tmp_path/'run', every=1))
    quietly(again, 'resume', 3, **(dict(cbs=cosine()) if name == 'param_scheduler' else {}))
    assert not differing(want[0], everything(again))
    assert not differing(want[1], everything(quietly(again, 'fit', 2)))


def test_what_comes_after_a_whole_schedule_is_a_plain_fit(photos, tmp_path):
    whole = learner(photos)
    for how, k in (('fit_one_cycle', 2), ('fit', 2)): quietly(whole, how, k)
    want = everything(whole)
    quietly(learner(photos, Checkpoint(tmp_path/'run')), 'fit_one_cycle', 2)
    again = quietly(learner(photos, Checkpoint(tmp_path/'run')), 'resume', 4)
    keys = ['weights', 'momentum', 'history', 'lr', 'hypers', 'lrs', 'rng']
    got = everything(again)
    assert not [k for k in keys if not same(want[k], got[k])]


@pytest.mark.parametrize('n', [2, 3, 4, 8])
def test_fine_tuning_goes_on_to_the_same_bits(photos, tmp_path, n):
    "With a frozen body first, and with all of it afterwards"
    whole = quietly(learner(photos, groups=halves), 'fine_tune', 2, .1)
    want = everything(whole)
    broken = learner(photos, Checkpoint(tmp_path/'run', every=1), At(n), groups=halves)
    with pytest.raises(Stop): quietly(broken, 'fine_tune', 2, .1)
    again = learner(photos, Checkpoint(tmp_path/'run', every=1), groups=halves)
    if n <= 3:                                                # fine_tune's own second half
        quietly(again, 'resume', 1)
        assert again.opt.frozen_idx == 1 and not again.model.conv1.weight.requires_grad and again.model.bn1.weight.requires_grad
        again.unfreeze()
        quietly(again, 'fit_one_cycle', 2, slice(.05/100, .05), pct_start=.3, div=5.)
    else: quietly(again, 'resume', 3)
    assert not differing(want, everything(again)) and want['frozen'] == 0 and all(p.requires_grad for p in again.model.parameters())


@pytest.mark.parametrize('epochs,cbs,why', [(4, None, r'schedule ends when the run has had 3 epochs, not 4; resume\(3\)'), (2, None, 'not 2'),
                                            (3, None, 'on a schedule of lr and mom; pass the same ParamScheduler once more'),
                                            (3, lambda: ParamScheduler({'lr': SchedCos(.08, .001)}), 'pass the same'),
                                            (3, lambda: ParamScheduler({'lr': SchedCos(.08, .002), 'mom': SchedLin(.8, .95)}), 'pass the same')])
def test_another_schedule_is_refused(photos, tmp_path, epochs, cbs, why):
    with pytest.raises(Stop): quietly(learner(photos, Checkpoint(tmp_path/'run', every=1), At(4)), 'fit', 3, cbs=cosine())
    again = learner(photos, Checkpoint(tmp_path/'run'))
    with pytest.raises(DataError, match=f'run holds a run that broke off in fit of 3 epochs.*{why}'):
        quietly(again, 'resume', epochs, cbs=cbs and cbs())
    assert again.checkpoint.state is None and not again.history.rows


def test_a_schedule_among_the_learners_own_callbacks(photos, tmp_path):
    want = everything(quietly(learner(photos, cosine()), 'fit', 3))
    with pytest.raises(Stop): quietly(learner(photos, cosine(), Checkpoint(tmp_path/'run', every=1), At(4)), 'fit', 3)
    again = quietly(learner(photos, cosine(), Checkpoint(tmp_path/'run')), 'resume', 3)
    assert not differing(want, everything(again))


# ---- epochs and fits that somebody ends

def test_an_epoch_that_is_cut_short_keeps_its_values_apart(photos):
    learn = quietly(learner(photos, ShortEpochCallback(.5, short_valid=False)), 'fit', 2)
    names = learn.recorder.metric_names[1:-1]
    for row, values in zip(learn.history.rows, learn.recorder.values):
        assert [row[k] for k in names] == [float(v) for v in values] and row['valid_loss'] > 1 >= row['top5_error']
    loss, error, _ = learn.validate()
    assert learn.history.rows[-1]['valid_loss'] == pytest.approx(float(loss)) and learn.plateau_lr.best == learn.history.rows[0]['valid_loss']
    assert learn.history.rows[-1]['top1_error'] == pytest.approx(float(error)) and learn.history.rows[-1]['train_loss'] == learn.recorder.losses[-1]


def test_without_a_validation_loss_nothing_is_decided(photos, tmp_path):
    learn = quietly(learner(photos, Checkpoint(tmp_path/'run'), ShortEpochCallback(0.)), 'fit', 3)
    assert np.isnan(learn.history.df.valid_loss).all() and np.isfinite(learn.history.df.train_loss).all() and learn.lr == .05
    assert learn.plateau_lr.best == learn.checkpoint.best == float('inf') and not (tmp_path/'run'/'best.pt').exists()


@pytest.mark.parametrize('event', ['before_batch', 'after_batch', 'before_train', 'before_epoch'])
def test_an_epoch_that_is_cancelled(photos, tmp_path, event):
    from fastai.callback.core import CancelEpochException
    class Cancel(Callback):
        def cancel(self):
            if self.epoch == 1 and getattr(self, 'iter', 0) > (0 if 'batch' in event else -1): raise CancelEpochException()
    setattr(Cancel, event, Cancel.cancel)
    learn = quietly(learner(photos, Cancel(), Checkpoint(tmp_path/'run')), 'fit', 3)
    rows = learn.history.rows
    assert len(rows) == (3 if 'batch' in event else 2) and [r['epoch'] for r in rows] == [*range(len(rows))]
    if len(rows) == 3: assert np.isnan(rows[1]['valid_loss'])
    assert all(1 < rows[i]['valid_loss'] < 100 for i in (0, -1))


@pytest.mark.parametrize('order', [0, 49, 63])
def test_a_fit_that_ends_with_an_epoch_keeps_it(photos, tmp_path, order):
    "Whoever ends it, and before whom"
    class End(Callback):
        def after_epoch(self):
            if self.epoch == 1: raise CancelFitException()
    End.order = order
    learn = quietly(learner(photos, End(), Checkpoint(tmp_path/'run')), 'fit', 4)
    assert len(learn.history.rows) == 2 == len((tmp_path/'run'/'history.csv').read_text().splitlines()) - 1
    whole, again = quietly(learner(photos), 'fit', 3), quietly(learner(photos, Checkpoint(tmp_path/'run')), 'resume', 3)
    assert not [k for k in ('weights', 'history', 'lr') if not same(result(SimpleNamespace(learn=whole, net=whole.model))[k],
                                                                    result(SimpleNamespace(learn=again, net=again.model))[k])]


def test_early_stopping_and_the_best_model(photos, tmp_path):
    learn = learner(photos, EarlyStoppingCallback(min_delta=9, patience=2), SaveModelCallback(), Checkpoint(tmp_path/'run'))
    learn.path = tmp_path
    quietly(learn, 'fit', 9)
    assert len(learn.history.rows) == 3 == len((tmp_path/'run'/'history.csv').read_text().splitlines()) - 1
    best = learn.history.df.valid_loss.min()
    assert float(learn.validate()[0]) == pytest.approx(best) == learn.checkpoint.best


def test_the_count_of_an_early_stop_goes_on(photos, tmp_path):
    def stopping(*cbs): return learner(photos, EarlyStoppingCallback(min_delta=9, patience=4), Checkpoint(tmp_path/'run', every=1), *cbs)
    with pytest.raises(Stop): quietly(stopping(At(8)), 'fit', 9)
    assert len(quietly(stopping(), 'resume', 9).history.rows) == 5           # as without the pause: the first is the best, and four more


@pytest.mark.parametrize('order', [0, 60])
def test_a_fit_that_a_callback_ends_in_mid_epoch_goes_on(photos, tmp_path, order):
    whole = quietly(learner(photos), 'fit', 3)
    want, end = everything(whole), At(5, CancelFitException)
    end.order = order
    quietly(learner(photos, Checkpoint(tmp_path/'run'), end), 'fit', 3)
    again = quietly(learner(photos, Checkpoint(tmp_path/'run')), 'resume', 3)
    assert not differing(want, everything(again))
