"Classes of different sizes count the same in training: exactly, whatever the processes, the workers and the kills in between."
import json
import random
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.mixup import MixUp
from fastai.losses import CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat
from sklearn.metrics import balanced_accuracy_score
from sklearn.utils.class_weight import compute_class_weight

from resnet_fastai.core import ResNet
from resnet_fastai.data import DataError, demo_data, resnet_dls
from resnet_fastai.engine.balance import balanced_order, BalancedError, BalancedLoss, class_weights
from resnet_fastai.engine.finite import batch_names, LossError
from resnet_fastai.engine.layout import list_photos
from resnet_fastai.engine.scores import error_rows
from resnet_fastai.inference import predict_probs
from resnet_fastai.training import resnet_learner

settings = dict(arch='cifar_resnet8', size=32, bs=8, micro_bs=4, patience=0, min_delta=10, num_workers=0, precision='fp32')
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def uneven(tmp_path_factory):
    "Drawn photos of 24, 9, 4 and 1 a class for training, and of 8, 4, 2 and 2 for validation"
    folder = tmp_path_factory.mktemp('uneven')
    paths = demo_data(folder/'all', sizes=dict(train=200, val=80, test=2))
    labels, keep = json.loads(paths.label_path.read_text()), dict(zip(('dots', 'rings', 'checks', 'stripes'), ((24, 8), (9, 4), (4, 2), (1, 2))))
    for k, split in enumerate(('train', 'val')):
        seen = Counter()
        for p in list_photos(paths.data_path/split):
            label = labels[p.stem]
            seen[label] += 1
            if label not in keep or seen[label] > keep[label][k]: p.unlink(); del labels[p.stem]
    paths.label_path.write_text(json.dumps(labels))
    return paths


def fit(model, epochs=2, resume=False):
    with model.learn.no_bar(), model.learn.no_logging(): model.fit(epochs, resume=resume)
    return model


def equal(a, b): return all(torch.equal(x, y) for x, y in zip(a.net.state_dict().values(), b.net.state_dict().values()))


# ── Batches ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize('sizes', [(24, 9, 4, 1), (5,), (1000, 1), (3, 3, 3), (7, 1, 1, 1, 1)])
def test_each_class_comes_as_often_and_its_photos_take_turns(sizes):
    classes = np.random.default_rng(3).permutation(np.repeat(np.arange(len(sizes))*5, sizes))
    n, first = len(classes), balanced_order(classes, np.random.default_rng(1))
    assert len(first) == len(set(first.tolist())) == n                                        # each turn has its own number
    places = first % n
    by_class = np.bincount(classes[places])[::5]
    assert by_class.sum() == n and np.ptp(by_class) <= 1
    for c in set(classes.tolist()): assert np.ptp(np.bincount(places, minlength=n)[classes == c]) <= 1
    for place, count in Counter(places.tolist()).items(): assert sorted(first[places == place]//n) == list(range(count))
    assert (balanced_order(classes, np.random.default_rng(1)) == first).all()
    assert n == 5 or (balanced_order(classes, np.random.default_rng(2)) != first).any()


@pytest.mark.parametrize('workers', [1, 3])
def test_workers_change_nothing_and_every_turn_has_its_own_crop(uneven, workers):
    def epoch(n):
        dls = resnet_dls(*uneven, n_out=None, micro_bs=7, size=32, lighting=0, num_workers=n, device='cpu')
        dls.train.classes, dls.train.rng = dls.photos['train'].codes, random.Random(5)
        return [[(x.clone(), y.clone()) for x, y in dls.train] for _ in range(2)]
    alone, many = epoch(0), epoch(workers)
    for a, b in zip(sum(alone, []), sum(many, [])): assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    x, y = map(torch.cat, zip(*alone[0]))
    assert sorted(Counter(y.tolist()).values()) == [9, 9, 10, 10]                             # 38 photos
    assert all(len({xx.numpy().tobytes() for xx in x[y == c]}) == (y == c).sum() for c in y.unique())     # one photo, ten crops


@pytest.mark.parametrize('ranks', [2, 3])
def test_processes_share_the_order_of_one(uneven, ranks):
    def order(rank, n):
        dl = resnet_dls(*uneven, n_out=None, micro_bs=10, size=32, num_workers=0, device='cpu').train
        dl.classes, dl.rng, dl.rank, dl.world_size, dl.update = np.repeat([0, 1, 2], [30, 6, 2]), random.Random(5), rank, n, 10
        idxs = dl.get_idxs()
        return [sorted(part.tolist()) for part in np.split(idxs, np.cumsum(dl.shares)[:-1])]
    one, shared = order(0, 1), [order(r, ranks) for r in range(ranks)]
    assert [sorted(sum(parts, [])) for parts in zip(*shared)] == one


# ── The loss ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_weights_are_those_of_scikit_learn():
    y = np.repeat([0, 2, 5], [24, 9, 1])
    weights = class_weights(np.bincount(y, minlength=7))
    np.testing.assert_allclose(weights[[0, 2, 5]], compute_class_weight('balanced', classes=np.array([0, 2, 5]), y=y), rtol=1e-6)
    assert weights[[1, 3, 4, 6]].tolist() == [1]*4


@pytest.mark.parametrize('inner', [CrossEntropyLossFlat, lambda: LabelSmoothingCrossEntropyFlat(.1), torch.nn.CrossEntropyLoss])
def test_the_loss_adds_up_over_parts_and_is_plain_in_validation(inner):
    rng = torch.Generator().manual_seed(0)
    pred, targ, w = torch.randn(12, 4, generator=rng), torch.randint(4, (12,), generator=rng), torch.tensor([.5, 2., 1., 7.])
    loss, plain = BalancedLoss(inner(), w), inner()
    alone = torch.stack([plain(pred[i:i+1], targ[i:i+1])*w[targ[i]] for i in range(12)])
    torch.testing.assert_close(torch.as_tensor(loss(pred, targ)), alone.mean().as_subclass(torch.Tensor))
    torch.testing.assert_close(torch.as_tensor(loss(pred[:3], targ[:3])*3 + loss(pred[3:], targ[3:])*9)/12, alone.mean().as_subclass(torch.Tensor))
    with torch.no_grad(): assert loss(pred, targ) == plain(pred, targ)
    loss.reduction = 'none'
    with torch.no_grad(): torch.testing.assert_close(torch.as_tensor(loss(pred, targ)), torch.as_tensor(alone/w[targ]))
    if inner is CrossEntropyLossFlat:
        torch.testing.assert_close(alone.mean().as_subclass(torch.Tensor), F.cross_entropy(pred, targ, w, reduction='sum')/12)


def test_parts_of_a_batch_train_like_the_whole(uneven):
    def trained(micro_bs):
        m = ResNet(*uneven, **settings | dict(micro_bs=micro_bs), balance='loss', n_out=None, lighting=0)
        m.learn.add_cb(_NoBN())
        return fit(m, 1)
    a, b = trained(8), trained(4)
    for x, y in zip(a.net.parameters(), b.net.parameters()): torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-4)


class _NoBN(Callback):
    "BN in eval mode, so that a batch does not matter"
    order = 5
    def before_train(self):
        for m in self.model.modules():
            if isinstance(m, torch.nn.BatchNorm2d): m.eval()


def test_mixup_weighs_both_labels(uneven):
    m = ResNet(*uneven, **settings, balance='loss', n_out=None, cbs=MixUp())
    fit(m, 1)
    assert np.isfinite(m.history.train_loss).all() and isinstance(m.learn.loss_func, BalancedLoss)


# ── Runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

class StopAt(Callback):
    "End the fit after so many training batches"
    order = 99
    def __init__(self, n): self.n = n
    def after_batch(self):
        self.n -= self.training
        if self.n == 0: raise CancelFitException()


@pytest.mark.parametrize('kind', ['sampler', 'loss'])
def test_a_run_goes_on_to_the_bit(uneven, tmp_path, kind):
    made = lambda *cbs: ResNet(*uneven, **settings, balance=kind, n_out=None, run_folder=tmp_path/'run' if cbs else None, every=1, cbs=list(cbs))
    whole = fit(made())
    fit(made(StopAt(14)))                                                    # 10 batches an epoch: in the middle of the second
    resumed = fit(made(Callback()), resume=True)
    assert equal(whole, resumed)
    pd.testing.assert_frame_equal(whole.history.drop(columns='seconds'), resumed.history.drop(columns='seconds'))
    assert not equal(whole, fit(ResNet(*uneven, **settings, n_out=None)))
    other = ResNet(*uneven, **settings, n_out=None, run_folder=tmp_path/'run', balance=dict(sampler='loss', loss=None)[kind])
    with pytest.raises(DataError, match='belongs to a run with other callbacks: .*balance'): fit(other, resume=True)


@pytest.mark.parametrize('kind', ['sampler', 'loss'])
def test_history_and_table_say_what_it_did(uneven, kind, capsys):
    m = ResNet(*uneven, **settings, balance=kind, n_out=None)
    assert f"balance='{kind}': 4 classes of 1 to 24 photos" in capsys.readouterr().out
    assert m.learn.balance.table.error.isna().all()
    fit(m, 1)
    val = m.learn.dls.photos['val']
    probs = predict_probs(m.net, list(val), m.stats, m.size, protocol='1crop')
    y = np.array([m.labels.encoding[p.label] for p in val])
    expected = 1 - balanced_accuracy_score(y, probs.argmax(1))
    found = m.evaluate(split='val', protocol='1crop')
    assert m.history.balanced_error[0] == pytest.approx(expected) == found.balanced_error[0] and found.balanced_low[0] <= expected <= found.balanced_high[0]
    table = m.learn.balance.table.set_index('label')
    assert table.photos.to_dict() == dict(dots=24, rings=9, checks=4, stripes=1)
    assert table.error.mean() == pytest.approx(expected)
    column = 'turns' if kind == 'sampler' else 'weight'
    assert table[column].to_dict() == pytest.approx({label: 38/4/n for label, n in table.photos.items()})
    whole, per = m.evaluate(split='val', protocol='1crop'), m.evaluate(split='val', protocol='1crop', per_class=True)
    assert per.top1_error.mean() == pytest.approx(whole.balanced_error[0]) and 'balanced_error' not in per


def test_other_learners_over_the_same_loaders_draw_as_they_would(uneven):
    "The loader is balanced for the learner that asked, while it trains"
    dls = resnet_dls(*uneven, n_out=None, micro_bs=4, size=32, num_workers=0)
    class Tally(Callback):
        def before_fit(self): self.targets = Counter()
        def after_batch(self): self.targets.update(self.yb[0].tolist()*self.training)
    even, plain = (resnet_learner(dls, 'cifar_resnet8', bs=8, balance=kind, cbs=Tally()) for kind in ('sampler', None))
    for learn, expected in ((plain, [24, 9, 4, 1]), (even, [10, 10, 9, 9]), (plain, [24, 9, 4, 1]), (even, [10, 10, 9, 9])):
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        assert sorted(learn.tally.targets.values(), reverse=True) == expected


def test_a_batch_without_a_loss_is_named_also_where_photos_come_again(uneven):
    "Its names are the photos of its targets"
    found = []
    class Spoil(Callback):
        order = 4
        def after_loss(self):
            if self.training and self.iter == 7: self.learn.loss_grad = self.learn.loss = self.loss*float('nan')
            names = batch_names(self.dl, self.iter)
            found.append([self.dls.labels(n) for n in names] == [self.dls.vocab[int(i)] for i in self.yb[0]])
    with pytest.raises(LossError, match='training batch 7'): fit(ResNet(*uneven, **settings, balance='sampler', n_out=None, cbs=Spoil()))
    assert len(found) == 8 and all(found)


def test_the_interval_of_the_balanced_error_covers():
    "Of 2,000 samples 95 % of the intervals hold the true error, for classes of 40, 15 and 8 photos"
    rng, true, sizes = np.random.default_rng(0), np.array([.1, .3, .5]), [40, 15, 8]
    targ, held = np.repeat(np.arange(3), sizes), []
    for _ in range(2000):
        wrong = rng.random(len(targ)) < true[targ]
        row = next(error_rows('1crop', np.eye(3)[np.where(wrong, (targ + 1) % 3, targ)], targ))
        held.append(row['balanced_low'] <= true.mean() <= row['balanced_high'])
    assert .93 < np.mean(held) < .98


def test_what_cannot_be_balanced(uneven):
    with pytest.raises(ValueError, match="balance is 'weights'; it must be one of 'sampler', 'loss'"): ResNet(*uneven, **settings, balance='weights')
    dls = resnet_dls(*uneven, n_out=None, micro_bs=4, size=32, num_workers=0)
    del dls.photos
    with pytest.raises(DataError, match="balance='loss' needs to know the labels"): resnet_learner(dls, 'cifar_resnet8', balance='loss')


def test_a_metric_of_its_own(uneven):
    m = ResNet(*uneven, **settings, n_out=None, metrics=BalancedError())
    assert 'balanced_error' in fit(m, 1).history and 'balance' not in dir(m.learn)
