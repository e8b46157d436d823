"The recipe beside other people's code, and the properties that users rely on."
import json
import random

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

from whole_batches import trained_as_torch_does
from resnet_fastai.core import ResNet
from resnet_fastai.data import demo_data, resnet_dls
from resnet_fastai.training import PlateauLR, paper_sgd

small = dict(size=32, arch='resnet18', bs=8, num_workers=0)


def trained(paths, *epochs, **kw):
    "A small model after one or several fits; its seed is set when it is made"
    model = ResNet(*paths, **small | kw)
    for n in epochs: model.fit(n)
    return model


def assert_same(one, two):
    for (name, a), b in zip(one.net.state_dict().items(), two.net.state_dict().values()): assert torch.equal(a, b), name


class SayLoss(Callback):
    "Gives the epoch a validation loss of our choice"
    order = 55
    def __init__(self, losses): self.losses = iter(losses)
    def after_epoch(self): self.recorder.values[-1] = [0., next(self.losses)]


def rates(losses, cuts, **kw):
    "The learning rate after each epoch, over several fits"
    dl = DataLoader(TensorDataset(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long)))
    learn = Learner(DataLoaders(dl, dl, device='cpu'), nn.Linear(2, 2), loss_func=CrossEntropyLossFlat(), opt_func=paper_sgd, lr=.1,
                    cbs=[SayLoss(losses), PlateauLR(**kw)])
    found = []
    class Note(Callback):
        order = 70
        def after_epoch(self): found.append(self.opt.hypers[-1]['lr'])
    with learn.no_bar(), learn.no_logging(), learn.added_cbs(Note()):
        for n in np.diff([0, *cuts, len(losses)]): learn.fit(int(n))
    return found


def torch_rates(losses, patience, min_delta):
    opt = torch.optim.SGD([torch.zeros(1)], lr=.1)
    plateau = ReduceLROnPlateau(opt, factor=.1, patience=patience, threshold=min_delta, threshold_mode='abs', eps=0)
    found = []
    for loss in losses:
        plateau.step(loss)
        found.append(opt.param_groups[0]['lr'])
    return found


@pytest.mark.paper('3.4-plateau')
@pytest.mark.parametrize('seed', range(100))
def test_plateau_decides_as_torch_does(seed):
    rng = random.Random(seed)
    n = rng.randint(6, 24)
    losses = [rng.choice([rng.randint(0, 8)/8, 1 - i/n, float('nan') if rng.random() < .2 else .5]) for i in range(n)]
    kw = dict(patience=rng.randint(0, 4), min_delta=rng.choice([0, 1e-4, .125, .3]))
    cuts = sorted(rng.sample(range(1, n), rng.randint(0, 3)))
    np.testing.assert_allclose(np.log10(rates(losses, cuts, **kw)), np.log10(torch_rates(losses, **kw)), atol=1e-6)


def test_a_rate_given_to_fit_wins_over_the_plateau():
    dl = DataLoader(TensorDataset(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long)))
    learn = Learner(DataLoaders(dl, dl, device='cpu'), nn.Linear(2, 2), loss_func=CrossEntropyLossFlat(), opt_func=paper_sgd, lr=.1, cbs=PlateauLR())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, lr=.03)
    assert learn.opt.hypers[-1]['lr'] == .03


@pytest.mark.paper('3.4-batch', '3.4-momentum', '3.4-decay')
@pytest.mark.parametrize('n,bs,micro_bs', [(50, 16, 8), (37, 16, 4), (33, 32, 8), (5, 256, 2)])
def test_accumulated_updates_are_plain_updates(n, bs, micro_bs):
    trained_as_torch_does(n, bs, micro_bs, 4, nn.functional.cross_entropy, CrossEntropyLossFlat())


def test_permuting_the_encoding_permutes_the_outputs(drawn, tmp_path):
    "Same seed, other indices, and the output layer's rows in the new order: every probability moves with its label"
    photo = drawn.data_path/'test'/'test_00002.jpg'
    encoding = json.loads(drawn.label_encoding.read_text())
    labels = list(encoding)
    moved = dict(zip(labels, [encoding[label] for label in labels[3:] + labels[:3]]))
    (tmp_path/'moved.json').write_text(json.dumps(moved))
    perm = torch.arange(1000)
    for label in labels: perm[moved[label]] = encoding[label]
    kw = small | dict(lr=.02)
    one, two = ResNet(*drawn, **kw), ResNet(*drawn[:2], tmp_path/'moved.json', **kw)
    two.net.fc.weight.data, two.net.fc.bias.data = one.net.fc.weight.data[perm], one.net.fc.bias.data[perm]
    for model in (one, two):
        set_seed(1)
        model.learn.dls.train.rng = random.Random(1)
        model.fit(2)
    p, q = one.predict(photo), two.predict(photo)
    before, after = np.array([p[encoding[label]] for label in labels]), np.array([q[moved[label]] for label in labels])
    np.testing.assert_allclose(after, before, atol=2e-3)
    assert one.predict_n(photo, 1)[0][0] == two.predict_n(photo, 1)[0][0]
    unmoved = np.array([q[encoding[label]] for label in labels])
    assert abs(unmoved - before).max() > .1                      # the test would notice


def test_the_order_of_json_entries_is_nothing(drawn, tmp_path):
    shuffled = [tmp_path/'l.json', tmp_path/'e.json']
    for path, new in zip(drawn[1:], shuffled): new.write_text(json.dumps(dict(reversed(json.loads(path.read_text()).items()))))
    assert_same(trained(drawn, 1), trained((drawn[0], *shuffled), 1))


def test_renaming_photos_changes_nothing(drawn):
    "Names carry no label: with new names (in the same order) and the ids renamed alike, training is the same to the bit"
    one = trained(drawn, 1)
    labels = json.loads(drawn.label_path.read_text())
    for split in ('train', 'val', 'test'):
        for i, p in enumerate(sorted((drawn.data_path/split).iterdir())):
            labels[f'{split}-{i:03}'] = labels.pop(p.stem)
            p.rename(p.with_name(f'{split}-{i:03}.jpg'))
    drawn.label_path.write_text(json.dumps(labels))
    assert_same(one, trained(drawn, 1))


def test_two_fits_are_one(drawn):
    "Weights, momentum, rate, plateau and history of fit(2)+fit(2) are those of fit(4), to the bit"
    kw = dict(patience=0, min_delta=10)
    one, two = trained(drawn, 4, **kw), trained(drawn, 2, 2, **kw)
    assert_same(one, two)
    mom = [[s['grad_avg'] for s in m.learn.opt.state.values() if 'grad_avg' in s] for m in (one, two)]
    assert len(mom[0]) and all(torch.equal(a, b) for a, b in zip(*mom))
    pd_cols = ['epoch', 'train_loss', 'valid_loss', 'top1_error', 'top5_error', 'lr']
    assert one.history[pd_cols].equals(two.history[pd_cols])
    assert one.learn.plateau_lr.best == two.learn.plateau_lr.best and one.learn.plateau_lr.wait == two.learn.plateau_lr.wait
    assert one.history.lr.nunique() > 1


def test_a_first_reading_of_the_photos_draws_nothing_from_the_seed(tmp_path):
    "The second start, with the statistics kept, trains as the first did"
    paths = demo_data(tmp_path/'d', sizes=dict(train=16, val=8, test=4))
    seen = []
    for _ in range(2):
        set_seed(3)
        resnet_dls(*paths, micro_bs=8, size=32, num_workers=0)
        seen.append((torch.rand(1).item(), random.random(), np.random.rand()))
    assert seen[0] == seen[1]
