"Several runs side by side: intervals and McNemar's test as statsmodels and a sum of binomials have them, on the same photos in whatever order."
from math import comb
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from resnet_fastai.core import ResNet
from resnet_fastai.data import demo_data
from resnet_fastai.engine.files import DataError
from resnet_fastai.practice import compare as module
from resnet_fastai.practice.compare import compare, mcnemar, show_runs
from resnet_fastai.practice.trust import Answers

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(autouse=True)
def no_figures():
    yield
    plt.close('all')


def pair(seed, n=200):
    rng = np.random.default_rng(seed)
    a = rng.random(n) < .8
    return a, np.where(rng.random(n) < .1 + .1*seed, rng.random(n) < .5, a)


@pytest.mark.parametrize('seed', range(3))
def test_mcnemar(seed):
    a, b = pair(seed)
    only_a, only_b = (a & ~b).sum(), (b & ~a).sum()
    m, k = only_a + only_b, min(only_a, only_b)
    by_hand = min(1, 2*sum(comb(m, i) for i in range(k + 1))/2**m)
    assert mcnemar(a, b) == pytest.approx(by_hand) == pytest.approx(mcnemar(b, a))
    tables = pytest.importorskip('statsmodels.stats.contingency_tables', reason='statsmodels is not installed')
    table = [[(a & b).sum(), only_a], [only_b, (~a & ~b).sum()]]
    assert mcnemar(a, b) == pytest.approx(tables.mcnemar(table, exact=True).pvalue)
    assert mcnemar(a, a) == 1


def run_of(right, order=None, folder='one', photos=None):
    "A run that is right for these photos"
    n, order = len(right), np.arange(len(right)) if order is None else order
    probs = np.zeros((n, 3), np.float32)
    probs[np.arange(n), np.where(right[order], 1, 2)] = 1
    photos = [Path(folder)/'test'/f'{i}.jpg' for i in (order if photos is None else photos)]
    return SimpleNamespace(said=Answers(photos, np.ones(n, int), probs, dict(a=1, b=2, c=0)), history=pd.DataFrame(dict(epoch=range(3), seconds=[1., 2, 3], valid_loss=[3., 2, 1])))


@pytest.fixture
def fake(monkeypatch): monkeypatch.setattr(module, 'answers', lambda model, *args: model.said)


def test_rows_are_errors_on_the_same_photos(fake):
    a, b = pair(1)
    order = np.random.default_rng(5).permutation(200)
    found = compare(dict(first=run_of(a), second=run_of(b, order, 'elsewhere')))
    assert found.run.tolist() == ['first', 'second'] and found.photos.tolist() == [200, 200] and found.top1_error.tolist() == pytest.approx([1 - a.mean(), 1 - b.mean()])
    assert found.p_value.tolist() == [1, mcnemar(a, b)] and found.only_here.tolist() == [0, (b & ~a).sum()] and found.only_first.tolist() == [0, (a & ~b).sum()]
    assert found.epochs.tolist() == [3, 3] and found.seconds.tolist() == [6, 6]
    proportion = pytest.importorskip('statsmodels.stats.proportion', reason='statsmodels is not installed')
    for row, right in zip(found.itertuples(), (a, b)):
        low, high = proportion.proportion_confint((~right).sum(), 200, method='wilson')
        assert (row.top1_low, row.top1_high) == pytest.approx((low, high), abs=1e-4)


def test_other_photos_cannot_be_compared(fake):
    a, b = pair(0)
    with pytest.raises(DataError, match='run 2 was measured on other photos'): compare([run_of(a), run_of(b, photos=range(1, 201))])
    for few in ([run_of(a)], [], {'one': run_of(a)}):
        with pytest.raises(DataError, match='two runs or more'): compare(few)
    with pytest.raises(DataError, match='under a name of its own'): compare(['x/model', 'y/model'])


def test_models_and_saved_ones(tmp_path):
    "The same weights in memory and on disk make the same errors"
    demo = demo_data(tmp_path/'demo', sizes=dict(train=32, val=16, test=16))
    model = ResNet(*demo, arch='cifar_resnet8', size=32, bs=8, micro_bs=8, num_workers=0, n_out=None)
    with model.learn.no_bar(), model.learn.no_logging(): model.fit(1)
    model.protocol = '1crop'
    found = compare(dict(memory=model, disk=model.save(tmp_path/'m')), data_path=demo.data_path, label_path=demo.label_path)
    photos = model.learn.dls.photos['test']
    wrong = sum(best[0][0] != model.labels(p) for p, best in zip(photos, model.predict_n(list(photos), 1)))
    assert found.top1_error[0] == found.top1_error[1] == pytest.approx(wrong/16) and found.p_value[1] == 1
    with pytest.raises(DataError, match='pass data_path and label_path'): compare([model, tmp_path/'m'])


def test_the_curves(fake):
    a, b = pair(0)
    fig = show_runs(dict(first=run_of(a), second=run_of(b)), columns=('valid_loss',))
    ax, = fig.axes
    assert [line.get_label() for line in ax.lines] == ['first', 'second'] and ax.lines[0].get_ydata().tolist() == [3, 2, 1] and 'Lowest valid loss: 1' in ax.get_title()
    with pytest.raises(DataError, match="no run has a column 'top9'; there is epoch, seconds, valid_loss"): show_runs([run_of(a), run_of(b)], columns=('top9',))
