"The script of Tables 2 and 3 in small: what it trains, how it counts, what it has stored."
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

root = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def script():
    sys.path.insert(0, str(root/'nbs'/'experiments'))
    import shortcuts
    yield shortcuts
    sys.path.remove(str(root/'nbs'/'experiments'))


def test_intervals_are_those_of_students_t_test(script):
    rng = np.random.default_rng(0)
    errors = {net: rng.normal(50, 3, 5) for net in ('plain-18', 'plain-34')}
    table = pd.DataFrame([dict(net=n, seed=s, parameters=1e6, train_error=e, test_error=e) for n, es in errors.items() for s, e in enumerate(es)])
    a, b = errors['plain-34'], errors['plain-18']
    low, high = stats.ttest_rel(a, b).confidence_interval()
    found = script.differences(table, pairs=[('plain-34', 'plain-18')]).difference.iloc[0]
    assert found == f'{np.mean(a - b):+.1f} ± {(high - low)/2:.1f}'
    low, high = stats.ttest_1samp(a, 0).confidence_interval()
    assert script.ends(table).loc['plain-34', 'test error, %'] == f'{a.mean():.1f} ± {(high - low)/2:.1f}'


def test_a_run_has_the_updates_and_the_rate_that_it_tells_of(script, tmp_path, monkeypatch):
    from cifar10 import cifar10, draw_cifar
    data = cifar10(draw_cifar(tmp_path/'photos', train=160, test=16), cache=tmp_path)
    monkeypatch.setattr(script, 'bs', 32)
    monkeypatch.setattr(script, 'window', 2)
    seen = []
    class Rates(script.Callback):
        def after_batch(self):
            if self.training: seen.append(self.opt.hypers[0]['lr'])
    learner = script.resnet_learner
    monkeypatch.setattr(script, 'resnet_learner', lambda *args, cbs, **kw: learner(*args, cbs=[*cbs, Rates()], **kw))
    run = script.train(data, 'ResNet-18 A', updates=8, seed=0)
    assert seen == pytest.approx([.0125]*6 + [.00125]*2)                                    # .1 at 256 photos; a tenth in the last quarter
    assert [r['updates'] for r in run['curve']] == [2, 4, 6, 8] and all(0 <= r['train_error'] <= 1 for r in run['curve'])
    again = script.train(data, 'ResNet-18 A', updates=8, seed=0)
    assert run['curve'] == again['curve'] != script.train(data, 'ResNet-18 A', updates=8, seed=1)['curve']


def test_what_is_stored_is_whole_and_in_the_papers_order(script):
    told = json.loads(script.stored.read_text())
    table = script.read_runs()
    assert told['data']['is_cifar10'] and table.groupby('net').seed.agg(lambda s: tuple(sorted(s))).nunique() == 1 and {*table.net} == {*script.nets}
    by = table.pivot(index='seed', columns='net', values='train_error')
    assert (by['plain-34'] > by['plain-18']).all() and (by['plain-34'] > by['ResNet-34 A']).all() and (by['plain-18'] > by['ResNet-18 A']).all()
