"What helps few photos: label smoothing, MixUp, CutMix, an average of the weights, early stopping; each against another implementation, and resumed to the bit."
import copy
import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.tracker import EarlyStoppingCallback
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat
from fastai.optimizer import SGD
from fastai.torch_core import set_seed

from kill_and_resume import result, same
from whole_batches import trained_as_torch_does
from resnet_fastai.core import ResNet, train
from resnet_fastai.data import demo_data, resnet_dls
from resnet_fastai.engine.balance import BalancedError, BalancedLoss
from resnet_fastai.engine.checkpoint import read_checkpoint
from resnet_fastai.engine.cuda_graph import TapeGraph, why_not
from resnet_fastai.engine.files import DataError
from resnet_fastai.engine.regularise import EarlyStopping, EMA, SmoothedLoss
from resnet_fastai.training import Checkpoint, PlateauLR, resnet_learner

pytestmark = pytest.mark.usefixtures('one_thread')
settings = dict(arch='cifar_resnet8', size=32, bs=8, micro_bs=4, num_workers=0, precision='fp32', n_out=None)
F = torch.nn.functional


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "Drawn photos whose labels have the indices from 0 to 7"
    paths = demo_data(tmp_path_factory.mktemp('photos')/'drawn', sizes=dict(train=28, val=12, test=4))
    paths.label_encoding.write_text(json.dumps({label: i for i, label in enumerate(json.loads(paths.label_encoding.read_text()))}))
    return paths


@pytest.fixture(scope='module')
def dls(photos): return resnet_dls(*photos, micro_bs=4, size=32, n_out=None, num_workers=0)


def fit(model, epochs=2, **kw):
    with model.learn.no_bar(), model.learn.no_logging(): model.fit(epochs, **kw)
    return model


def weights(net): return {k: v.detach().clone() for k, v in net.state_dict().items()}
def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ── Label smoothing ──────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize('size,bs,micro_bs', [(50, 16, 8), (37, 16, 4)])
def test_smoothed_updates_are_those_of_torch(size, bs, micro_bs):
    "Micro-batches come to what torch makes of whole batches with its own loss"
    learn, x, y = trained_as_torch_does(size, bs, micro_bs, 3, torch.nn.CrossEntropyLoss(label_smoothing=.1), SmoothedLoss(.1))
    with torch.no_grad(): plain = F.cross_entropy(learn.model(x), y).item()
    assert learn.recorder.values[-1][1] == pytest.approx(plain, rel=1e-5)          # validation is not smoothed


@pytest.mark.parametrize('reduction', ['mean', 'none'])
def test_the_smoothed_loss_is_fastais_and_spreads_over_labels_alone(reduction):
    rng = torch.Generator().manual_seed(0)
    pred, targ = torch.randn(9, 7, generator=rng), torch.tensor([1, 4, 6, 1, 1, 4, 6, 6, 4])
    loss, fastais = SmoothedLoss(.3), LabelSmoothingCrossEntropyFlat(eps=.3)
    loss.reduction = fastais.reduction = reduction
    torch.testing.assert_close(torch.Tensor(loss(pred, targ)), torch.Tensor(fastais(pred, targ)))
    some = SmoothedLoss(.3, [1, 4, 6])
    some.reduction = reduction
    soft = torch.zeros(9, 7)                                                       # by hand: the distribution that is asked for
    for row, t in zip(soft, targ): row[[1, 4, 6]] = .1; row[t] += .7
    by_hand = F.cross_entropy(pred, soft, reduction=reduction)
    torch.testing.assert_close(torch.Tensor(some(pred, targ)), by_hand)


def test_outputs_without_a_label_get_no_share(photos):
    "Of 1000 outputs eight have a label"
    of = lambda n_out: ResNet(*photos, **settings | dict(n_out=n_out), label_smoothing=.1).learn.loss_func
    assert of(1000).outputs.tolist() == list(range(8)) and of(None).outputs is None


def test_balanced_classes_are_smoothed_too():
    rng = torch.Generator().manual_seed(0)
    pred, targ, w = torch.randn(12, 4, generator=rng), torch.randint(4, (12,), generator=rng), torch.tensor([.5, 2., 1., 7.])
    expected = (F.cross_entropy(pred, targ, label_smoothing=.1, reduction='none')*w[targ]).mean()
    torch.testing.assert_close(torch.Tensor(BalancedLoss(SmoothedLoss(.1), w)(pred, targ)), expected)


# ── MixUp and CutMix ─────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize('smooth', [0, .1])
@pytest.mark.parametrize('name,theirs', [('mixup', MixUp), ('cutmix', CutMix)])
def test_mixing_is_fastais(photos, name, theirs, smooth):
    "fastai's own learner and callback with batches of the micro-batch's size: the same losses and weights, to the bit"
    ours = ResNet(*photos, **settings | dict(bs=4), lr=.002, **{name: .4}, label_smoothing=smooth, channels_last=False)
    loss = LabelSmoothingCrossEntropyFlat(eps=smooth) if smooth else CrossEntropyLossFlat()
    other = Learner(ours.learn.dls, copy.deepcopy(ours.net), loss_func=loss, lr=.002, wd_bn_bias=False, cbs=theirs(.4),
                    opt_func=partial(SGD, mom=.9, wd=1e-4, decouple_wd=False))
    found = []
    for learn in (ours.learn, other):
        set_seed(5)
        for dl in learn.dls.loaders: dl.rng.seed(0)
        with learn.no_bar(), learn.no_logging(): learn.fit(2)
        found.append((torch.stack(list(learn.recorder.losses)), torch.cat([p.detach().flatten() for p in learn.model.parameters()])))
    for a, b in zip(*found): torch.testing.assert_close(torch.Tensor(a), torch.Tensor(b), atol=0 if not smooth else 1e-5, rtol=0 if not smooth else 1e-4)


@pytest.mark.parametrize('name', ['mixup', 'cutmix'])
def test_figures_beside_mixed_photos(photos, name):
    "Validation sees whole photos and plain losses; the loss function is the learner's own again"
    m = fit(ResNet(*photos, **settings, **{name: 1.}, label_smoothing=.1), 2)
    loss, row = m.learn.loss_func, m.history.iloc[-1]
    with m.learn.no_bar(): probs, targ = m.learn.get_preds()
    assert isinstance(loss, SmoothedLoss)
    assert row.valid_loss == pytest.approx(-probs.gather(1, targ[:, None]).log().mean().item(), rel=1e-4)
    assert row.top1_error == pytest.approx((probs.argmax(1) != targ).float().mean().item())
    assert 0 <= row.train_error <= 1 and np.isfinite(row.train_loss)


def test_the_loss_comes_back_whatever_ends_the_fit(photos):
    class Boom(Callback):
        def after_batch(self):
            if self.training and self.iter == 1: raise RuntimeError('boom')
    m = ResNet(*photos, **settings, mixup=.4, cbs=Boom())
    own = m.learn.loss_func
    with pytest.raises(RuntimeError, match='boom'): fit(m)
    assert m.learn.loss_func is own
    m.learn.remove_cb(Boom)
    assert len(fit(m, 1).history) == 1


# ── The average ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

class Diary(Callback):
    "The weights after each update, and those that validation sees"
    order = 90
    def __init__(self): self.after, self.seen = [], []
    def after_step(self): self.after.append(weights(self.model))
    def after_validate(self): self.seen.append(weights(self.model))


def brute_force(history, decay):
    "The weighted mean over the list of all weights"
    share = [1.]
    for n in range(1, len(history)):
        d = min(decay, (1 + n)/(10 + n))
        share = [s*d for s in share] + [1 - d]
    return {k: sum(s*w[k].double() for s, w in zip(share, history)) for k, v in history[0].items() if v.is_floating_point()}


@pytest.mark.parametrize('decay', [.3, .999])
def test_the_average_is_that_of_the_list(photos, decay):
    "In validation, after the fit, in predictions and in what is saved; the training itself goes on as without it"
    a, b = Diary(), Diary()
    m, plain = ResNet(*photos, **settings, lighting=0, cbs=[a], lr=.05, ema=decay), ResNet(*photos, **settings, lighting=0, cbs=[b], lr=.05)
    fit(m, 2), fit(plain, 2)
    assert len(a.after) == 8 and all(equal(x, y) for x, y in zip(a.after, b.after))
    for n, seen in zip((4, 8), a.seen):
        for k, v in brute_force(a.after[:n], decay).items(): torch.testing.assert_close(seen[k], v.float(), atol=1e-6, rtol=1e-5)
    assert equal(weights(m.net), a.seen[-1]) and not equal(weights(m.net), b.seen[-1]) and equal(b.after[-1], b.seen[-1])
    fit(m, 1), fit(plain, 1)                                                       # trained on: from the weights, not from the average
    assert all(equal(x, y) for x, y in zip(a.after, b.after)) and len(a.after) == 12
    m.learn.validate()
    assert equal(weights(m.net), a.seen[-1])


def test_the_average_is_saved_and_kept_in_best(photos, tmp_path):
    m = ResNet(*photos, **settings, ema=.9, lr=.05, run_folder=tmp_path/'run', keep=None, cbs=[diary := Diary()])
    fit(m, 3, restore_best=True)
    best = m.history.valid_loss.idxmin()
    assert equal(weights(m.net), diary.seen[best]) and m.learn.restored == best
    loaded = ResNet.load(m.save(tmp_path/'model'), device='cpu')
    assert all(torch.equal(v, loaded.net.state_dict()[k]) for k, v in weights(m.net).items())
    diary.after.clear()
    start = weights(m.net)
    m.learn.opt.clear_state()
    m.learn.remove_cb(Checkpoint)
    m.learn.lr = 0.
    fit(m, 1)                                                                      # weights from outside are the ones to train
    assert all(torch.equal(start[k], v) for k, v in diary.after[0].items() if k.endswith('weight') and v.ndim > 1)


def test_lr_find_and_predictions_leave_the_average_alone(photos):
    m = fit(ResNet(*photos, **settings, ema=.9), 1)
    kept = weights(m.net)
    with m.learn.no_bar(): m.learn.get_preds()
    with m.learn.no_bar(), m.learn.no_logging(): m.learn.lr_find(num_it=5, show_plot=False, suggest_funcs=())
    assert equal(kept, weights(m.net)) and m.learn.ema.updates == 4


# ── Early stopping ───────────────────────────────────────────────────────────────────────────────────────────────────────────

class Says(Callback):
    "Puts losses of the test's own in the place of what validation found"
    order = 49
    def __init__(self, values): self.values = values
    def after_validate(self):
        if self.learn.epoch < len(self.values): self.recorder.loss.total, self.recorder.loss.count = self.values[self.learn.epoch], 1


losses = [3., 2., 2.5, 1.9, 1.9, 2., 2.1, 1.]


@pytest.mark.parametrize('patience', [2, 3])
def test_it_ends_when_fastais_does(photos, dls, patience):
    ours = ResNet(*photos, **settings, cbs=Says(losses), early_stopping=patience, lr=0.)
    fit(ours, 8)
    theirs = Learner(dls, copy.deepcopy(ours.net), loss_func=CrossEntropyLossFlat(), cbs=[Says(losses), EarlyStoppingCallback(patience=patience)], lr=0.)
    with theirs.no_bar(), theirs.no_logging(): theirs.fit(8)
    assert ours.history.valid_loss.tolist() == losses[:len(theirs.recorder.values)] and len(ours.history) == {2: 6, 3: 7}[patience]
    n = len(ours.history)
    ours.learn.validate()
    with ours.learn.no_bar(): fit_again = ours.fit(1)
    assert len(fit_again) == n + 1                                                 # each fit counts anew


def test_the_head_and_the_rest_count_apart(photos, tmp_path):
    start = fit(ResNet(*photos, **settings), 1)
    m = start.on(*photos, **{k: v for k, v in settings.items() if k != 'arch'}, early_stopping=1, cbs=Says([2., 3., 9.]), run_folder=tmp_path/'run')
    with m.learn.no_bar(), m.learn.no_logging(): m.fine_tune(3, freeze_epochs=3)
    assert m.history.valid_loss.tolist() == [2., 3.]*2
    again = start.on(*photos, **{k: v for k, v in settings.items() if k != 'arch'}, early_stopping=1, cbs=Says([2., 3., 9.]), run_folder=tmp_path/'run')
    with again.learn.no_bar(), again.learn.no_logging(): again.fine_tune(3, freeze_epochs=3, resume=True)
    assert len(again.history) == 4 and equal(weights(m.net), weights(again.net))  # it had ended, and has ended


# ── Runs that break off ──────────────────────────────────────────────────────────────────────────────────────────────────────

everything = dict(label_smoothing=.1, ema=.9, early_stopping=2)
ways = {'fit': (lambda m, resume: m.fit(3, resume=resume), dict(mixup=.4, patience=0, min_delta=10)),
        'one_cycle': (lambda m, resume: m.fit(3, resume=resume), dict(cutmix=1., schedule='one_cycle')),
        'fine_tune': (lambda m, resume: m.fine_tune(1, freeze_epochs=2, lr=.05, resume=resume), dict(mixup=.4))}


def ends(model):
    "All that must agree"
    learn, ema, stop = model.learn, model.learn.ema, model.learn.early_stopping
    return result(model) | dict(momentum=[learn.opt.state[p].get('grad_avg') for p, *_ in learn.opt.all_params()], average=[ema.updates, ema.shown, *ema.other], stopping=[stop.best, stop.wait], trains=[p.requires_grad for p in model.net.parameters()])


@pytest.mark.parametrize('way', ways)
def test_a_run_goes_on_from_every_third_update_to_the_bit(way, photos, tmp_path):
    "Broken off after any update, in a frozen epoch too, or between epochs; nothing but the folder is left"
    run, kw = ways[way]
    begun = fit(ResNet(*photos, **settings), 1) if way == 'fine_tune' else None
    args = {k: v for k, v in settings.items() if begun is None or k != 'arch'} | everything | kw
    def make(**more):
        set_seed(3)
        return begun.on(*photos, **args, **more) if begun else ResNet(*photos, **args, **more)
    def quietly(m, resume):
        with m.learn.no_bar(), m.learn.no_logging(): run(m, resume)
        return m
    whole = quietly(make(run_folder=tmp_path/'whole', every=1, keep=None), False)
    expected, files = ends(whole), sorted((tmp_path/'whole').glob('checkpoint-*.pt'))
    assert len(files) == 12 + 3
    for file in files[1::3] + files[-1:]:
        (folder := tmp_path/file.stem).mkdir()
        shutil.copy(file, folder)
        again = make(run_folder=folder)
        torch.manual_seed(11)                                                      # what a new process has drawn so far is anybody's guess
        found = ends(quietly(again, True))
        over = {'hypers', 'lr'} if file == files[-1] else set()                    # nothing is left to do: the next fit sets the rate
        assert [k for k in expected if k not in over and not same(found[k], expected[k])] == [], file.name


def test_fastais_own_mixup_resumes_too(photos, tmp_path):
    make = lambda **kw: ResNet(*photos, **settings, cbs=MixUp(.4), **kw)
    whole = fit(make(), 2)
    fit(make(run_folder=tmp_path/'run'), 1)
    assert equal(weights(whole.net), weights(fit(make(run_folder=tmp_path/'run'), 2, resume=True).net))


class Stop(Callback):
    "Ends the fit after so many batches of training or validation, as Ctrl-C does"
    order = 99
    def __init__(self, n, training): self.n, self.when = n, training
    def after_batch(self):
        self.n -= self.training == self.when
        if self.n == 0 and self.training == self.when: raise CancelFitException()


@pytest.mark.parametrize('n,training', [(9, True), (2, False)])
def test_stopped_in_training_or_validation_and_on(photos, tmp_path, n, training):
    "In validation the network has the average, in training it has not; in the same session or in another, the end is the same"
    make = lambda *cbs, **kw: ResNet(*photos, **settings, **everything, mixup=.4, cbs=[*cbs], **kw)
    whole = ends(fit(make(), 3))
    m = make(Stop(n, training), run_folder=tmp_path/'run', every=2)
    with m.learn.no_bar(), m.learn.no_logging(): m.learn.fit(3)
    assert m.learn.ema.shown
    shutil.copytree(tmp_path/'run', tmp_path/'moved')
    found = [ends(fit(make(run_folder=tmp_path/'moved'), 3, resume=True))]
    m.learn.remove_cb(Stop)
    for found in (*found, ends(fit(m, 3, resume=True))): assert [k for k in whole if not same(found[k], whole[k])] == []


def test_a_run_that_ended_early_has_ended(photos, tmp_path):
    make = lambda **kw: ResNet(*photos, **settings, cbs=Says(losses), **dict(early_stopping=2) | kw, run_folder=tmp_path/'run')
    m = fit(make(), 8)
    again = make()
    with again.learn.no_bar(): again.fit(8, resume=True)
    assert len(again.history) == 6 and equal(weights(m.net), weights(again.net))
    assert len(fit(make(early_stopping=3), 8, resume=True).history) == 7           # more patience goes on where it had ended
    assert len(fit(make(early_stopping=None), 8, resume=True).history) == 8


@pytest.mark.parametrize('kw,says', [(dict(mixup=.2), "'mixup': 'alpha': 0.4, you have 'mixup': 'alpha': 0.2"), (dict(mixup=0), "other callbacks"),
                                     (dict(ema=.99), "'ema': 'decay': 0.9, you have 'ema': 'decay': 0.99"), (dict(ema=0), 'other callbacks'),
                                     (dict(label_smoothing=.2), 'another loss function'), (dict(label_smoothing=0), 'another loss function')])
def test_other_arguments_are_refused(photos, tmp_path, kw, says):
    make = lambda **more: ResNet(*photos, **settings, **dict(mixup=.4, ema=.9, label_smoothing=.1) | more, run_folder=tmp_path/'run')
    fit(make(), 1)
    with pytest.raises(DataError, match=says): fit(make(**kw), 2, resume=True)


# ── What is asked for wrongly ────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize('kw,says', [(dict(mixup=.4, cutmix=1.), 'pass one of the two'), (dict(mixup=True), 'mixup is True; it must be a number from 0'),
                                     (dict(mixup=-1), 'mixup is -1'), (dict(label_smoothing=1), r'label_smoothing is 1; .* below 1, such as 0\.1'),
                                     (dict(ema='yes'), "ema is 'yes'"), (dict(ema=1.), r'ema is 1\.0; .* such as 0\.999'), (dict(early_stopping=0), 'early_stopping is 0'),
                                     (dict(label_smoothing=.1, loss_func=CrossEntropyLossFlat()), 'loss_func of your own'),
                                     (dict(loss_func='mse'), "loss_func is 'mse'; pass a function")])
def test_sentences(dls, kw, says):
    with pytest.raises(DataError, match=says): resnet_learner(dls, 'cifar_resnet8', bs=8, **kw)


def test_an_exported_learner_has_the_average(photos, tmp_path):
    m = fit(ResNet(*photos, **settings, label_smoothing=.1, mixup=.4, ema=.9), 1)
    m.learn.export(tmp_path/'learner.pkl')
    loaded = load_learner(tmp_path/'learner.pkl')
    assert equal(weights(loaded.model), weights(m.net)) and loaded.loss_func.share == .1


@pytest.mark.parametrize('kw', [dict(ema=.9), dict(mixup=.4)])
def test_a_cuda_graph_is_refused_with_the_reason(dls, kw):
    learn = resnet_learner(dls, 'cifar_resnet8', bs=4, precision='fp32', **kw)
    learn.create_opt()
    assert 'works on each batch (before_batch)' in why_not(learn, TapeGraph)


def test_nothing_to_mix_with(photos):
    m = ResNet(*photos, **settings | dict(micro_bs=1), cutmix=1.)
    with pytest.raises(DataError, match='cutmix mixes the photos of a micro-batch'): fit(m, 1)


def test_off_is_off(photos):
    "Without these arguments, and with all of them off, the run is the paper's"
    a, b = fit(ResNet(*photos, **settings)), fit(ResNet(*photos, **settings, label_smoothing=0, mixup=0, cutmix=None, ema=0., early_stopping=None))
    assert equal(weights(a.net), weights(b.net)) and isinstance(b.learn.loss_func, CrossEntropyLossFlat)


# ── Other values to go by ────────────────────────────────────────────────────────────────────────────────────────────────────

class Errors(Callback):
    "Balanced errors of the test's own"
    order = 49
    def __init__(self, values): self.values = values
    def after_validate(self):
        cb = next(m for m in self.learn.metrics if isinstance(m, BalancedError))
        cb.seen, cb.wrong = torch.tensor([10.]), torch.tensor([10*self.values[self.learn.epoch]])


def test_the_balanced_error_decides(photos, tmp_path):
    "Checkpoint, PlateauLR and EarlyStopping go by it, and not by the loss"
    values, spoken = [.5, .3, .4, .45, .2], [5., 4., 3., 2., 1.]
    cbs = [Says(spoken), Errors(values), Checkpoint(tmp_path/'run', monitor='balanced_error', keep=None), EarlyStopping(2, monitor='balanced_error')]
    m = ResNet(*photos, **settings, balance='loss', schedule=PlateauLR('balanced_error', patience=1, min_delta=.05), cbs=cbs, lr=.01)
    fit(m, 5, restore_best=True)
    assert m.history.balanced_error.tolist() == pytest.approx(values[:4]) and m.history.valid_loss.tolist() == spoken[:4]
    assert m.learn.restored == 1 and equal(read_checkpoint(tmp_path/'run'/'checkpoint-000000014-epoch.pt')['model'], weights(m.net))
    assert [d['epoch'] for d in m.learn.plateau_lr.drops] == [3] and 'balanced_error is 0.45' in m.learn.plateau_lr.drops[0]['why']


def test_a_value_that_is_not_there(photos, tmp_path):
    m = ResNet(*photos, **settings, cbs=Checkpoint(tmp_path/'run', monitor='balanced_error'))
    with pytest.raises(DataError, match="Checkpoint monitors 'balanced_error'; there is train_loss, valid_loss, top1_error"): fit(m, 1)
    m = ResNet(*photos, **settings, schedule=PlateauLR('balanced_error'))
    with pytest.raises(ValueError, match="PlateauLR monitors 'balanced_error'; there is train_loss"): fit(m, 1)
    m = ResNet(*photos, **settings, cbs=EarlyStopping(monitor='balanced_error'))
    with pytest.raises(DataError, match="EarlyStopping monitors 'balanced_error'; there is epoch, train_loss"): fit(m, 1)


def test_train_takes_them_too(photos):
    learn = train(*photos, epochs=1, **settings, mixup=.4, label_smoothing=.1, ema=.9, early_stopping=1)
    assert {'mixup', 'ema', 'early_stopping'} <= {cb.name for cb in learn.cbs} and isinstance(learn.loss_func, SmoothedLoss) and isinstance(learn.ema, EMA)


def test_the_card_says_what_helped(photos, tmp_path):
    m = fit(ResNet(*photos, **settings, mixup=.4, label_smoothing=.1, ema=.9, early_stopping=3, balance='loss'), 1)
    m.save(tmp_path/'m')
    told = json.loads((tmp_path/'m'/'config.json').read_text())['training']['beyond']
    assert told == dict(label_smoothing=.1, mixup=.4, ema=.9, early_stopping=3, balance='loss')
    card = (tmp_path/'m'/'README.md').read_text().replace('&#46;', '.').replace('&#61;', '=').replace('\\', '')
    assert 'beyond the paper' in card and 'mixup=0.4' in card
    assert ResNet.load(tmp_path/'m').trained.training['beyond'] == told
    plain = fit(ResNet(*photos, **settings), 1).save(tmp_path/'plain')
    assert 'beyond' not in json.loads((plain/'config.json').read_text())['training']
