"""Labels that are probably wrong: cleanlab's confident learning on photos that the model has not learned from."""
import os

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from ..engine.arguments import whole_number
from ..engine.files import DataError
from ..engine.photo import open_photo
from .look import _say
from .trust import answers

_orange = '#D55E00'


def _cleanlab():
    try:
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_scores
    except ImportError:
        raise DataError('suspicious labels are ranked by cleanlab, which is not installed: pip install "resnet_fastai[clean]"') from None
    return find_label_issues, get_label_quality_scores


def _out_of_fold(models, split, data_path, label_path):
    "(paths, (n,) places of the labels, (n,k) probabilities, k labels) of the photos of all models; each of them once"
    said = [answers(m, split, data_path, label_path) for m in models]
    if any(s.encoding != said[0].encoding for s in said):
        raise DataError("these models have different label encodings; make the folds from one of them")
    paths = [os.fspath(p) for s in said for p in s.photos]
    stems = {os.path.realpath(p) for p in paths}                                  # folds are often made of links
    if len(stems) < len(paths):
        raise DataError(f"{len(paths) - len(stems):,} photos are in the {split}/ of two models; each photo may be left out of one fold "
                        "only")
    labels, index = list(said[0].encoding), np.array(list(said[0].encoding.values()))
    probs = np.concatenate([s.probs[:, index] for s in said]).astype(np.float64)
    place = {i: k for k,i in enumerate(index)}
    return paths, np.array([place[t] for s in said for t in s.targ]), probs/probs.sum(1, keepdims=True), labels


def suspects(
    model, # A `ResNet` or a learner; or a list of them, one for each fold, so that each photo is judged by the one that has not seen it
    split:str='val', # The photos to judge: not those that the model has learned from
    n:int|None=None, # So many rows; None: all photos
    data_path=None, # For a loaded model: photos with such a folder
    label_path=None, # Their labels
) -> pd.DataFrame: # photo, label, suggested, quality (0 to 1: how well the label fits), suspicious (bool); the worst first
    "Rank photos by how little their label fits, and mark those whose label is probably wrong"
    find, quality = _cleanlab()
    n = n if n is None else whole_number('n', n)
    models = list(model) if isinstance(model, (list, tuple)) else [model]
    if not models: raise DataError("there is no model in this list; pass one for each fold")
    paths, targ, probs, labels = _out_of_fold(models, split, data_path, label_path)
    there = np.unique(targ)                                                       # cleanlab wants a photo of each label
    if len(there) < 2: raise DataError(f"all {len(paths):,} photos of {split}/ have one label; there is nothing to compare it with")
    own, some = np.searchsorted(there, targ), probs[:, there]/probs[:, there].sum(1, keepdims=True).clip(1e-300)
    frame = pd.DataFrame(dict(photo=paths, label=[labels[i] for i in targ], suggested=[labels[i] for i in probs.argmax(1)],
                              quality=quality(own, some),
                              suspicious=find(own, some, n_jobs=1)), dtype=object).astype(dict(quality=float, suspicious=bool))
    frame['suspicious'] &= frame.label != frame.suggested
    return frame.sort_values(['suspicious', 'quality'], ascending=[False, True], kind='stable', ignore_index=True)[:n]


def show_suspects(
    found:pd.DataFrame, # Rows of `suspects`
    n:int=24, # So many photos
    cols:int=6, # In a row
) -> plt.Figure: # A contact sheet
    "The photos whose labels fit least, each with its label, and what the network takes it for"
    found = found[:n]
    if not len(found): raise DataError("there are no rows to show")
    rows = -(-len(found)//cols)
    fig, axs = plt.subplots(rows, cols, figsize=(1.5*cols, 1.85*rows), squeeze=False, layout='constrained')
    for ax in axs.flat: ax.axis('off')
    for ax,row in zip(axs.flat, found.itertuples()):
        img = open_photo(row.photo)
        img.thumbnail((96, 96))
        ax.imshow(np.asarray(img) & 0xF0 | 8, interpolation='nearest')                     # few colours: a small file
        ax.set_title(f'{_say(row.label, 16)}\n{_say(row.suggested, 14)}?  {row.quality:.2f}', fontsize=8,
                     color=_orange if row.suspicious else 'k')
    fig.suptitle(f'{int(found.suspicious.sum())} of these {len(found)} labels are probably wrong (orange): label, suggestion, quality',
                 fontsize=10)
    return fig
