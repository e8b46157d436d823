"Labels that are probably wrong: planted ones are found, the ranking is cleanlab's own, folds are put together."
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from resnet_fastai.engine.files import DataError
from resnet_fastai.practice import suspects as module
from resnet_fastai.practice.suspects import show_suspects, suspects
from resnet_fastai.practice.trust import Answers

encoding = dict(cat=7, dog=2, cow=4, newt=0)                                      # with gaps, and a label that no photo has


@pytest.fixture(autouse=True)
def no_figures():
    yield
    plt.close('all')


def said(n=60, seed=0, wrong=(), folder='p'):
    "Answers of a good network over 10 outputs; the labels of the photos `wrong` have been exchanged"
    rng = np.random.default_rng(seed)
    true = rng.choice([7, 2, 4], n)
    probs = rng.dirichlet(np.ones(10)/3, n)*.4
    probs[np.arange(n), true] += .6
    targ = true.copy()
    for i in wrong: targ[i] = {7: 2, 2: 4, 4: 7}[targ[i]]
    return Answers([Path(folder)/f'{i:03}.jpg' for i in range(n)], targ, probs.astype(np.float32), encoding)


@pytest.fixture
def ask(monkeypatch):
    "ask(answers, …, **kwargs): `suspects` of models that say this"
    def f(*each, **kwargs):
        monkeypatch.setattr(module, 'answers', lambda model, *args: model)
        return suspects(list(each), **kwargs)
    return f


def test_planted_errors_come_first(ask):
    pytest.importorskip('cleanlab', reason='cleanlab is not installed')
    planted = [3, 17, 40, 41]
    found = ask(said(wrong=planted))
    names = {7: 'cat', 2: 'dog', 4: 'cow'}
    assert {int(Path(p).stem) for p in found.photo[:4]} == {*planted} and found.suspicious.tolist() == sorted(found.suspicious, reverse=True)
    assert 3 <= found.suspicious.sum() <= 4 and len(found) == 60 and list(found) == ['photo', 'label', 'suggested', 'quality', 'suspicious']
    true = said()
    for row in found[:4].itertuples(): assert row.suggested == names[true.targ[int(Path(row.photo).stem)]] != row.label
    for part in (found[found.suspicious], found[~found.suspicious]): assert part.quality.is_monotonic_increasing


def test_the_ranking_is_cleanlabs(ask):
    filter, rank = (pytest.importorskip(f'cleanlab.{m}', reason='cleanlab is not installed') for m in ('filter', 'rank'))
    answers = said(wrong=[5, 6, 50], seed=3)
    targ = np.array([[2, 4, 7].index(t) for t in answers.targ])                   # cleanlab knows labels 0, 1, 2
    probs = answers.probs[:, [2, 4, 7]].astype(float)
    probs /= probs.sum(1, keepdims=True)
    found = ask(answers)
    order = [int(Path(p).stem) for p in found.photo]
    np.testing.assert_allclose(found.quality, rank.get_label_quality_scores(targ, probs)[order], rtol=1e-6)
    flagged = {*np.flatnonzero(filter.find_label_issues(targ, probs, n_jobs=1) & (probs.argmax(1) != targ))}
    assert {i for i, s in zip(order, found.suspicious) if s} == flagged and flagged >= {5, 6, 50}


def test_each_fold_is_judged_by_the_model_that_has_not_seen_it(ask):
    pytest.importorskip('cleanlab', reason='cleanlab is not installed')
    one, two = said(wrong=[1], folder='a'), said(wrong=[2], folder='b', seed=1)
    found = ask(one, two, n=2)
    assert {*found.photo} == {str(Path('a')/'001.jpg'), str(Path('b')/'002.jpg')} and len(ask(one, two)) == 120
    with pytest.raises(DataError, match='60 photos are in the val/ of two models'): ask(one, one)
    with pytest.raises(DataError, match='different label encodings'): ask(one, two._replace(encoding=dict(encoding, newt=1)))


def test_what_cannot_be_ranked(ask, monkeypatch):
    pytest.importorskip('cleanlab', reason='cleanlab is not installed')
    with pytest.raises(DataError, match='no model in this list'): ask()
    with pytest.raises(DataError, match='n is 0'): ask(said(), n=0)
    alone = said(n=5)
    with pytest.raises(DataError, match='all 5 photos of val/ have one label'): ask(alone._replace(targ=np.full(5, 7)))
    monkeypatch.setitem(sys.modules, 'cleanlab.filter', None)                     # as where it is not installed
    with pytest.raises(DataError, match=r'pip install "resnet_fastai\[clean\]"'): ask(said())


def test_the_contact_sheet(tmp_path):
    for i in range(3): Image.fromarray(np.full((30, 20*(i + 1), 3), 80*i, np.uint8)).save(tmp_path/f'{i}.png')
    found = pd.DataFrame(dict(photo=[str(tmp_path/f'{i}.png') for i in range(3)], label=['cat', 'a $dog$', 'cow'], suggested=['dog', 'cat', 'cow'],
                              quality=[.05, .2, .9], suspicious=[True, True, False]))
    fig = show_suspects(found, n=3, cols=2)
    shown = [ax for ax in fig.axes if ax.images]
    assert [ax.get_title().split('\n')[0].replace('\\$', '$') for ax in shown] == ['cat', 'a $dog$', 'cow'] and fig.get_suptitle().startswith('2 of these 3')
    assert [ax.images[0].get_array().shape[:2] for ax in shown] == [(30, 20), (30, 40), (30, 60)] and len(fig.axes) == 4
    found.to_csv(tmp_path/'s.csv', index=False)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path/'s.csv'), found)
    with pytest.raises(DataError, match='no rows'): show_suspects(found[:0])
