"The degradation script: its runs follow its recipe, and what is stored shows the paper's order."
import copy
import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from torch import nn

from resnet_fastai.model import Block, cifar_plain

root = Path(__file__).resolve().parent.parent
spec = spec_from_file_location('degradation_script', root/'nbs'/'experiments'/'degradation.py')
script = module_from_spec(spec)
spec.loader.exec_module(script)
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.mark.paper('3.1-degradation')
def test_a_deeper_plain_net_can_do_what_the_shallower_one_does():
    "By construction: 48 layers more, with kernels of one 1 and BNs that change nothing"
    torch.manual_seed(0)
    shallow, x = cifar_plain(1, 8), torch.randn(32, 3, 16, 16)
    with torch.no_grad(): shallow(x)                                         # BN's statistics
    deep = copy.deepcopy(shallow)
    for stage, nf in zip((deep.layer1, deep.layer2, deep.layer3), (16, 32, 64)):
        for _ in range(8):
            block = Block(nf, nf, shortcut='none', layers=2)
            for conv, bn in [(block.conv1, block.bn1), (block.conv2, block.bn2)]:
                nn.init.dirac_(conv.weight)
                bn.eps = 0
            stage.append(block)
    assert sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in deep.modules()) == 56
    with torch.no_grad(): torch.testing.assert_close(deep.eval()(x), shallow.eval()(x))


def test_photos_are_the_same_for_a_seed_and_balanced():
    (x, y), (again, _), (others, _) = (script.drawn_photos(16, seed) for seed in (3, 3, 4))
    assert x.shape == (16, 3, script.side, script.side) and 0 <= x.min() and x.max() <= 1 and x.std() > .1
    assert torch.equal(x, again) and not torch.equal(x, others) and y.bincount().tolist() == [2]*8


@pytest.fixture
def small(monkeypatch):
    "4 epochs of 3 updates"
    for name, value in dict(train_photos=48, test_photos=16, bs=16, epochs=4).items(): monkeypatch.setattr(script, name, value)
    return script.drawn_dls()


def test_a_run_follows_its_recipe(small, monkeypatch):
    "Rates, losses and errors beside those that a callback of this test sees"
    seen = []
    class Spy(script.Callback):
        order = 100
        def after_batch(self):
            if self.training: seen.append((self.opt.hypers[-1]['lr'], self.loss.item(), (self.pred.argmax(1) != self.y).sum().item()))
    make = script.resnet_learner
    monkeypatch.setattr(script, 'resnet_learner', lambda *args, cbs=(), **kwargs: make(*args, cbs=[*cbs, Spy()], **kwargs))
    run = script.train(small, 'resnet', 8, seed=1, lr=.04, warm_up=False)
    rates, losses, wrong = zip(*seen)
    assert [r['updates'] for r in run['epochs']] == [3, 6, 9, 12] and len(seen) == 12
    assert rates[0] == max(rates) == .04 and rates[-1] == pytest.approx(.004)
    for i, row in enumerate(run['epochs']):
        assert row['train_loss'] == pytest.approx(sum(losses[3*i:3*i+3])/3, abs=1e-4)
        assert row['train_error'] == pytest.approx(sum(wrong[3*i:3*i+3])/48, abs=1e-4)
    small.train.rng.seed(7)                                                  # a run does not depend on what came before it
    assert script.train(small, 'resnet', 8, seed=1, lr=.04, warm_up=False) == run
    assert script.train(small, 'plain', 8, seed=1, lr=.04, warm_up=False)['epochs'] != run['epochs']


def test_a_warm_up_is_as_long_for_every_net(small, monkeypatch):
    monkeypatch.setattr(script, 'warm', 4)
    monkeypatch.setattr(script.MeanLoss, 'after_batch', lambda self: self.training and rates.append(self.opt.hypers[-1]['lr']), raising=False)
    for kind in script.kinds:
        rates = []
        script.train(small, kind, 8, seed=1, lr=.04)
        assert rates[:3] == [.004]*3 and rates[4:8] == [.04]*4 and rates[-1] == pytest.approx(.004)


def test_the_command_stores_its_runs(small, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(root/'nbs'/'experiments'))               # as when the script is run
    script.dls_of_process.cache_clear()                                       # the fixture's photos, and not those of before
    script.main(['--seeds', '5', '--out', str(tmp_path/'runs.json')])
    script.dls_of_process.cache_clear()
    found = json.loads((tmp_path/'runs.json').read_text())
    assert found['command'].endswith('degradation.py --seeds 5') and len(found['runs']) == 6
    table = script.read_runs(tmp_path/'runs.json')
    assert len(table) == 6*4 and set(table.seed) == {5}
    assert capsys.readouterr().out.count('training error') == 6


# ── What is stored ───────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture(scope='module')
def stored(): return json.loads(script.stored.read_text(encoding='utf-8'))


def test_the_stored_runs_are_whole(stored):
    assert 'nbs/experiments/degradation.py' in stored['command'] and len(stored['commit'].rstrip('+')) == 40 and stored['machine']['cpu']
    keys = [(r['kind'], r['depth'], r['seed'], r['lr'], r['warm_up']) for r in stored['runs']]
    wanted = {(k, d, s, script.lr, True) for k in script.kinds for d in script.depths for s in {key[2] for key in keys}}
    assert set(keys) == wanted and len(keys) == len(wanted) > 0
    for r in stored['runs']:
        assert [e['updates'] for e in r['epochs']] == [25*(i + 1) for i in range(10)]
        assert all(0 <= e[k] <= 1 for e in r['epochs'] for k in ('train_error', 'test_error')) and r['epochs'][0]['train_loss'] > 1


@pytest.mark.paper('3.1-degradation', '4.1-plain')
def test_the_order_is_the_papers_in_training_error(stored):
    "With every seed: a deeper plain net is worse, a deeper residual net is not"
    for seed in {r['seed'] for r in stored['runs']}:
        error, loss = ({(r['kind'], r['depth']): r['epochs'][-1][key] for r in stored['runs']
                        if r['seed'] == seed and r['lr'] == script.lr and r['warm_up']} for key in ('train_error', 'train_loss'))
        assert error['plain', 44] > error['plain', 20] > error['plain', 8] and error['plain', 44] > .3
        assert loss['plain', 44] > loss['plain', 20] > loss['plain', 8]
        assert error['resnet', 44] < error['resnet', 8] + .01 and error['resnet', 20] < error['resnet', 8] + .01
