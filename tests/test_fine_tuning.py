"Fine-tuning: groups by stage, BN of frozen layers, fastai's own fine_tune as the reference, and runs that break off while layers are frozen."
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from fastai.torch_core import set_seed

from resnet_fastai.core import ResNet
from resnet_fastai.data import demo_data, resnet_dls
from resnet_fastai.engine.files import DataError
from resnet_fastai.engine.fine_tuning import stage_groups
from resnet_fastai.model import build_net
from resnet_fastai.training import resnet_learner

pytestmark = pytest.mark.usefixtures('one_thread')
SETTINGS = dict(size=32, bs=8, micro_bs=4, num_workers=0)
BNS = torch.nn.BatchNorm2d


@pytest.fixture(scope='module')
def paths(tmp_path_factory): return demo_data(tmp_path_factory.mktemp('tuned')/'drawn', sizes=dict(train=28, val=12, test=4))


@pytest.fixture(scope='module')
def begun(paths):
    "A state dict that something has been learned with"
    model = ResNet(*paths, arch='cifar_resnet8', **SETTINGS)
    quietly(model, lambda m: m.fit(1))
    return model


def quietly(model, f):
    with model.learn.no_bar(), model.learn.no_logging(): return f(model)


def copied(net): return {k: v.detach().clone() for k, v in net.state_dict().items()}


def changed(a, b): return {k for k in a if not torch.equal(a[k], b[k])}


# ── Groups ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize('arch,n', [('resnet18', 6), ('resnet50', 6), ('cifar_resnet20', 5)])
def test_groups_are_the_stem_the_stages_and_the_head(arch, n):
    net = build_net(arch, 5)
    groups = stage_groups(net)
    assert len(groups) == n and [id(p) for g in groups for p in g] == [id(p) for p in net.parameters()]      # each once, in their order
    assert [id(p) for p in groups[0]] == [id(p) for p in (net.conv1.weight, *net.bn1.parameters())]
    for i, g in enumerate(groups[1:-1], 1): assert [id(p) for p in g] == [id(p) for p in getattr(net, f'layer{i}').parameters()]
    assert [id(p) for p in groups[-1]] == [id(p) for p in net.fc.parameters()]


def test_freezing_and_slices_as_fastais_users_expect(begun, paths):
    learn = begun.on(*paths, train_bn=False, **SETTINGS).learn
    trains = lambda: {k.partition('.')[0] for k, p in learn.model.named_parameters() if p.requires_grad}
    for how, expected in [(learn.freeze, {'fc'}), (lambda: learn.freeze_to(-2), {'layer3', 'fc'}), (lambda: learn.freeze_to(1), {'layer1', 'layer2', 'layer3', 'fc'}),
                          (learn.unfreeze, {'conv1', 'bn1', 'layer1', 'layer2', 'layer3', 'fc'})]:
        how()
        assert trains() == expected
    with learn.no_bar(), learn.no_logging(): learn.fit(1, lr=slice(1e-4, 1e-2))
    assert [h['lr'] for h in learn.opt.hypers] == pytest.approx([1e-4*100**(i/4) for i in range(5)])


@pytest.mark.parametrize('train_bn', [True, False])
def test_bn_of_frozen_layers(train_bn, begun, paths):
    model = begun.on(*paths, train_bn=train_bn, **SETTINGS)
    before = copied(model.net)
    model.learn.freeze()
    quietly(model, lambda m: m.learn.fit(1, lr=.1))
    bn = {f'{name}.{k}' for name, m in model.net.named_modules() if isinstance(m, BNS) for k in m.state_dict()}
    assert changed(before, copied(model.net)) == {'fc.weight', 'fc.bias'} | (bn if train_bn else set())
    model.learn.unfreeze()
    quietly(model, lambda m: m.learn.fit(1, lr=.1))
    assert changed(before, copied(model.net)) == set(before)                      # all of them, BN too


# ── fastai's own way is the reference ────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize('way', ['fine_tune', 'one_cycle'])
def test_it_is_what_fastai_does(way, begun, paths):
    "With updates of one batch, fastai's own learner comes to the same weights, to the bit"
    ours = begun.on(*paths, precision='fp32', channels_last=False, lr=.02, schedule='one_cycle' if way == 'one_cycle' else None,
                    **SETTINGS | dict(micro_bs=8))
    start, dls = copied(ours.net), ours.learn.dls
    theirs = Learner(dls, copy.deepcopy(ours.net), loss_func=CrossEntropyLossFlat(), splitter=stage_groups, lr=.02, wd_bn_bias=False,
                     opt_func=partial(SGD, mom=.9, wd=1e-4, decouple_wd=False))
    def run(learn, f):
        set_seed(5)
        for dl in dls.loaders: dl.rng.seed(0)
        with learn.no_bar(), learn.no_logging(): f()
        return copied(learn.model), list(map(float, learn.recorder.lrs))
    a, rates = run(ours.learn, lambda: ours.fine_tune(2, freeze_epochs=1) if way == 'fine_tune' else ours.fit(2))
    b, expected = run(theirs, lambda: theirs.fine_tune(2, base_lr=.02) if way == 'fine_tune' else theirs.fit_one_cycle(2, .02))
    assert rates[-len(expected):] == expected and changed(a, start) == set(start)
    assert not changed(a, b)


@pytest.mark.parametrize('made, asked, bs, head', [({}, {}, 8, .03125), ({}, {}, 64, .1), (dict(lr=.02), {}, 8, .02), (dict(lr=.02), dict(lr=.3), 8, .3)])
def test_the_heads_rate(made, asked, bs, head, begun, paths):
    "None is ten times the paper's .1·bs/256, .1 at most; what somebody says counts as it is"
    model = ResNet(*paths, weights=begun, **SETTINGS | dict(bs=bs) | made)
    seen = []
    class Rates(Callback):
        def after_step(self): seen.append(self.opt.hypers[-1]['lr'])
    model.learn.add_cb(Rates())
    quietly(model, lambda m: m.fine_tune(1, **asked))
    assert max(seen) <= head*(1 + 1e-6) and max(seen) > .4*head                  # in a few updates the peak itself is not always met


def test_rates_fall_towards_the_stem(begun, paths):
    model = begun.on(*paths, **SETTINGS)
    seen = []
    class Watch(Callback):
        def after_step(self): seen.append(([h['lr'] for h in self.opt.hypers], self.opt.frozen_idx))
    model.learn.add_cb(Watch())
    quietly(model, lambda m: m.fine_tune(2, freeze_epochs=1, lr=.08, lr_mult=16))
    frozen, free = [r for r, i in seen if i], [r for r, i in seen if not i]
    assert len(frozen) == 4 and len(free) == 8 and max(r[-1] for r in frozen) <= .08
    for rates in free: assert [b/a for a, b in zip(rates, rates[1:])] == pytest.approx([2]*4)
    assert max(r[-1] for r in free) == pytest.approx(.04, rel=.05)


# ── Runs that break off ──────────────────────────────────────────────────────────────────────────────────────────────────────

def result(model):
    "All that must agree"
    learn = model.learn
    return dict(weights=copied(model.net), momentum=[learn.opt.state[p].get('grad_avg') for p, *_ in learn.opt.all_params()],
                history=[[v for k, v in row.items() if k != 'seconds'] for row in learn.history.rows], hypers=[dict(h) for h in learn.opt.hypers],
                losses=torch.stack(learn.recorder.losses), lrs=list(map(float, learn.recorder.lrs)), trains=[p.requires_grad for p in model.net.parameters()],
                rng=torch.rand(3))


def same(a, b):
    if torch.is_tensor(a): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b


def unlike(model, expected):
    found = result(model)
    return [k for k in expected if not same(found[k], expected[k])]


WAYS = {'fine_tune': lambda m, resume: m.fine_tune(2, freeze_epochs=2, lr=.05, resume=resume), 'one_cycle': lambda m, resume: m.fit(3, resume=resume)}


@pytest.mark.parametrize('train_bn', [True, False])
@pytest.mark.parametrize('way', WAYS)
def test_a_run_goes_on_from_every_update_to_the_bit(way, train_bn, begun, paths, tmp_path):
    "Killed after any update: in a frozen epoch, between the two parts, when all layers train; nothing but the folder is left"
    if way == 'one_cycle' and not train_bn: pytest.skip('nothing is frozen there')
    make = lambda **kw: begun.on(*paths, train_bn=train_bn, schedule='one_cycle' if way == 'one_cycle' else None, **SETTINGS, **kw)
    whole = make(run_folder=tmp_path/'whole', every=1, keep=None)
    quietly(whole, lambda m: WAYS[way](m, False))
    expected = result(whole)
    files = sorted((tmp_path/'whole').glob('checkpoint-*.pt'))
    assert len(files) >= 12
    for k in range(0, len(files), 1 if way == 'fine_tune' and train_bn else 3):
        (folder := tmp_path/f'run{k}').mkdir()
        shutil.copy(files[k], folder)
        torch.manual_seed(k)                                                      # what a new process has drawn so far is anybody's guess
        again = make(run_folder=folder)
        quietly(again, lambda m: WAYS[way](m, True))
        over = ['hypers'] if files[k] == files[-1] else []                        # nothing is left to do: the next fit sets the rate
        assert [key for key in unlike(again, expected) if key not in over] == [], files[k].name
        shutil.rmtree(folder)


class Die(Callback):
    "The process's end after its third update"
    order = 101                                                                   # after `Checkpoint`
    def after_batch(self):
        if self.checkpoint.updates == 3: os.kill(os.getpid(), signal.SIGKILL)


def in_a_process(photos, labels, encoding, model, folder):
    "The body of the process that is killed"
    torch.set_num_threads(1)
    model = ResNet(photos, labels, encoding, weights=model, run_folder=folder, every=1, cbs=Die(), **SETTINGS)
    quietly(model, lambda m: m.fine_tune(2, freeze_epochs=2, lr=.05))


def test_killed_in_the_middle_of_a_frozen_epoch(begun, paths, tmp_path):
    begun.save(tmp_path/'model')
    make = lambda **kw: ResNet(*paths, weights=tmp_path/'model', **SETTINGS, **kw)
    whole = make()
    quietly(whole, lambda m: m.fine_tune(2, freeze_epochs=2, lr=.05))
    expected = result(whole)
    args = [*map(str, paths), str(tmp_path/'model'), str(tmp_path/'run')]
    code = f'import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_fine_tuning; test_fine_tuning.in_a_process(*sys.argv[1:])'
    assert subprocess.run([sys.executable, '-c', code, *args], stderr=subprocess.DEVNULL).returncode == -signal.SIGKILL
    left = sorted((tmp_path/'run').glob('checkpoint-*.pt'))
    assert len(left) == 2 and left[-1].name.endswith('batch.pt')
    again = make(run_folder=tmp_path/'run')
    quietly(again, lambda m: m.fine_tune(2, freeze_epochs=2, lr=.05, resume=True))
    assert not unlike(again, expected), left


def test_a_run_that_began_with_other_weights_is_refused(begun, paths, tmp_path):
    model = begun.on(*paths, run_folder=tmp_path/'run', **SETTINGS)
    quietly(model, lambda m: m.fine_tune(1))
    quietly(model, lambda m: m.fine_tune(1, resume=True))                         # nothing is left to do
    assert len(model.history) == 2
    other = model.on(*paths, run_folder=tmp_path/'run', **SETTINGS)
    with pytest.raises(DataError, match='another network'): quietly(other, lambda m: m.fine_tune(1, resume=True))


def test_a_run_by_one_cycle_goes_on_with_another_cycle(paths, tmp_path):
    "As a second `fit` does in the same session; killed in the second cycle, too"
    make = lambda **kw: ResNet(*paths, arch='cifar_resnet8', schedule='one_cycle', lr=.1, **SETTINGS, **kw)
    whole = make()
    for n in (2, 3): quietly(whole, lambda m: m.fit(n))
    expected = result(whole)
    first = make(run_folder=tmp_path/'run', every=1, keep=None)
    quietly(first, lambda m: m.fit(2, resume=True))
    again = make(run_folder=tmp_path/'run', every=1, keep=None)
    quietly(again, lambda m: m.fit(5, resume=True))
    assert not unlike(again, expected)
    (tmp_path/'third').mkdir()
    shutil.copy(sorted((tmp_path/'run').glob('*-batch.pt'))[-4], tmp_path/'third')
    third = make(run_folder=tmp_path/'third')
    quietly(third, lambda m: m.fit(5, resume=True))
    assert not unlike(third, expected)


# ── The best epoch ───────────────────────────────────────────────────────────────────────────────────────────────────────────

class Spoil(Callback):
    "From the third epoch on the weights are worse than they were"
    def after_train(self):
        if len(self.learn.history.rows) >= 2:
            for p in self.model.fc.parameters(): torch.nn.init.normal_(p.data, 0, 9, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('kept_in', ['memory', 'folder'])
def test_the_best_epoch_comes_back(kept_in, begun, paths, tmp_path):
    model = begun.on(*paths, cbs=[Spoil()], precision='fp32', **SETTINGS, **(dict(run_folder=tmp_path/'run') if kept_in == 'folder' else {}))
    quietly(model, lambda m: m.fit(4, restore_best=True))
    losses = model.history.valid_loss
    assert losses.idxmin() == model.learn.restored < 2 < losses.idxmax() + 1
    with model.learn.no_bar(): assert float(model.learn.validate()[0]) == pytest.approx(losses.min(), rel=1e-5)
    config = json.loads((model.save(tmp_path/'m')/'config.json').read_text())
    assert config['training']['restored_epoch'] == losses.idxmin()
    spoiled = begun.on(*paths, cbs=[Spoil()], precision='fp32', **SETTINGS)
    quietly(spoiled, lambda m: m.fit(4))
    with spoiled.learn.no_bar(): assert float(spoiled.learn.validate()[0]) > 1.5*losses.min()      # without it the last one stays


# ── What is asked for wrongly ────────────────────────────────────────────────────────────────────────────────────────────────

def test_sentences(begun, paths, tmp_path):
    model = begun.on(*paths, **SETTINGS)
    for kwargs, says in [(dict(epochs=0), 'epochs is 0'), (dict(epochs=1, freeze_epochs=-1), 'freeze_epochs is -1'), (dict(epochs=1, resume=True), 'run_folder')]:
        with pytest.raises(DataError, match=says): model.fine_tune(**kwargs)
    loaded = ResNet.load(begun.save(tmp_path/'m'))
    with pytest.raises(DataError, match=r'model.on\('): loaded.fine_tune(1)
    dls = resnet_dls(*paths, size=32, num_workers=0)
    with pytest.raises(DataError, match="schedule is 'two_cycle'"): resnet_learner(dls, 'cifar_resnet8', schedule='two_cycle')


def test_outputs_as_many_as_the_indices_need(paths, edit):
    dls = resnet_dls(*paths, size=32, n_out=None, num_workers=0)
    assert len(dls.vocab) == max(json.loads(paths.label_encoding.read_text()).values()) + 1 and len(resnet_dls(*paths, size=32, num_workers=0).vocab) == 1000




def test_who_trains_on_has_the_best_epochs_weights_no_longer(begun, paths, tmp_path):
    model = begun.on(*paths, cbs=[Spoil()], **SETTINGS)
    epoch = lambda: json.loads((model.save(tmp_path/'model', overwrite=True)/'config.json').read_text())['training'].get('restored_epoch')
    quietly(model, lambda m: m.fit(3, restore_best=True))
    assert epoch() == model.learn.restored < 2
    quietly(model, lambda m: m.learn.validate())
    assert epoch() is not None
    quietly(model, lambda m: m.fit(1))
    assert epoch() is None
