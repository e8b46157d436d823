"""Several runs side by side: errors with intervals on the same photos, the test that says whether they differ, and their curves."""
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy.stats import binomtest

from ..engine.files import DataError
from ..engine.scores import wilson
from .share import load_model
from .trust import answers

_colors = '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9'        # Okabe and Ito's


def mcnemar(
    a:np.ndarray, # (n,) bool: where one is right
    b:np.ndarray, # (n,) bool: where the other is right, on the same photos
) -> float: # p value, two-sided
    "McNemar's exact test: the chance of photos that only one gets right to be divided so unevenly between two equally good ones"
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.


def _named(runs):
    "{name: model} of a dict, or of a list of models and folders"
    if isinstance(runs, dict): named = dict(runs)
    else: named = {Path(r).name if isinstance(r, (str, Path)) else f'run {i}': r for i,r in enumerate(runs, 1)}
    if len(named) < 2 or len(named) < len(runs):
        raise DataError("pass two runs or more, each under a name of its own: {'first': …, 'second': …}")
    return {name: load_model(r) if isinstance(r, (str, Path)) else r for name,r in named.items()}


def _photos(said, split):
    "What tells the photos of one run from another's: their paths from the split's folder on"
    parts = [Path(p).parts for p in said.photos]
    below = lambda p: p[len(p) - p[::-1].index(split):] if split in p else p
    return ['/'.join(below(p)) for p in parts]


def compare(
    runs, # Models, learners or folders of saved models: a list, or {name: one}
    split:str='test', # Whose photos: 'test' for a report, 'val' while choosing
    data_path=None, # For saved models: photos with such a folder
    label_path=None, # Their labels
) -> pd.DataFrame: # A row a run: photos, top1_error, its interval, only_here and only_first (photos that only one gets right), p_value, …
    "The errors of several runs on the same photos; each is tested against the first (McNemar, exact)"
    named = _named(runs)
    said = {name: answers(m, split, data_path, label_path) for name,m in named.items()}
    first = next(iter(said.values()))
    names, right, rows = _photos(first, split), {}, []
    for name,s in said.items():
        right[name] = _right(s, name, names, split)
        rows.append(dict(run=name) | _row(right[name], next(iter(right.values()))) | _about(named[name], s))
    return pd.DataFrame(rows)


def _right(said, name, names, split):
    "(n,) bool in the order of `names`: is the first label right?"
    place = {photo: i for i,photo in enumerate(_photos(said, split))}
    if {*place} != {*names}:
        raise DataError(f"{name} was measured on other photos than the first run; pass data_path and label_path of photos for all of them")
    return said.first()[1][[place[n] for n in names]]


def _row(right, first):
    wrong, n = int((~right).sum()), len(right)
    low, high = wilson(wrong, n)
    return dict(photos=n, top1_error=wrong/n, top1_low=low, top1_high=high, only_here=int((right & ~first).sum()),
                only_first=int((first & ~right).sum()),
                p_value=mcnemar(right, first))


def _about(model, said):
    history = _history(model)
    return dict(epochs=len(history), seconds=float(history.seconds.sum()) if 'seconds' in history else 0.)


def _history(model):
    past = getattr(model, 'history', None)
    return past.df if hasattr(past, 'df') else pd.DataFrame() if past is None else past


def show_runs(
    runs, # Models, learners or folders of saved models: a list, or {name: one}
    columns:tuple=('valid_loss', 'top1_error'), # Of their histories, a panel each
) -> plt.Figure:
    "The curves of several runs over their epochs, in one picture"
    named = {name: _history(m) for name,m in _named(runs).items()}
    fig, axs = plt.subplots(1, len(columns), figsize=(4*len(columns), 3.2), squeeze=False, layout='constrained')
    for ax,column in zip(axs[0], columns):
        drawn = {name: h for name,h in named.items() if column in h}
        if not drawn:
            raise DataError(f"no run has a column {column!r:.80}; there is "
                            f"{', '.join(dict.fromkeys(c for h in named.values() for c in h))}")
        for i,(name,h) in enumerate(drawn.items()):
            ax.plot(h.epoch, h[column], color=_colors[i % len(_colors)], ls=('-', '--', ':')[i//len(_colors) % 3], marker='o', ms=3,
                    label=name)
        best = min(drawn, key=lambda name: drawn[name][column].min())
        ax.set(xlabel='epoch', ylabel=column.replace('_', ' '))
        ax.set_title(f"Lowest {column.replace('_', ' ')}: {drawn[best][column].min():.3g}, {best}", fontsize=10)
    axs[0][0].legend(fontsize=8)
    return fig
