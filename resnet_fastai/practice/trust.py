"""Can a model be trusted? Calibrate its probabilities, find the one below which it should say "not sure", and draw both."""
from typing import NamedTuple
from weakref import WeakKeyDictionary

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from ..engine.calibration import (answered, at_limit, calibration_error, check_min_prob, check_temperature, fit_temperature, log_loss,
                                  pick_threshold,
                                  reliability, tempered)
from ..engine.fast_net import _bare, weights_hash
from ..engine.scores import wilson
from ..engine.splits import labelled_split, model_parts
from ..inference import _answers
from .look import require_trained

_blue, _green, _orange = '#0072B2', '#009E73', '#D55E00'     # Okabe and Ito's


class Answers(NamedTuple):
    "What a network says about photos whose labels are known"
    photos:list # Of paths
    targ:np.ndarray # (n,) index of each one's label
    probs:np.ndarray # (n,n_out) before any temperature
    encoding:dict # {label: index}

    def first(self, temperature=1):
        "(probability of the likeliest label that exists, is it the right one?), each (n,)"
        index = np.array(list(self.encoding.values()))
        best = index[(probs := tempered(self.probs, temperature))[:, index].argmax(1)]
        return probs[np.arange(len(best)), best].astype(np.float64), best == self.targ


_asked = WeakKeyDictionary()                # network → {split: (what was asked, the answers)}


def answers(
    model, # A `ResNet`, or a learner over `resnet_dls`
    split:str='val', # Whose photos
    data_path=None, # Photos of another place than the model's own
    label_path=None, # Their labels
    precision:str|None=None, # 'fp32', 'bf16' or 'fp16'; None: the fastest that the hardware has
) -> Answers:
    "Ask about the photos of a split by the model's protocol; the same question is only asked once"
    require_trained(model)
    parts, net = (p := model_parts(model)), _bare(p.net)
    photos, targ = labelled_split(parts, split, data_path, label_path)
    texts = tuple(map(str, photos))
    what = (weights_hash(net), parts.protocol, precision, parts.stats.mean.tobytes(), texts)
    kept = _asked.setdefault(net, {})
    if split not in kept or kept[split][0] != what:
        kept[split] = what, np.concatenate(list(_answers(parts, photos, [parts.protocol], precision=precision)))
    return Answers(photos, targ, kept[split][1], parts.labels.encoding)


def _stands(model):
    "How a model predicts now, and how long it was trained: what belongs to all that is measured here"
    past = getattr(model, 'history', ())
    return dict(protocol=model_parts(model).protocol, epochs=len(getattr(past, 'rows', past)))


def _keep(model, **found):
    model.trust = getattr(model, 'trust', {}) | {k: v | _stands(model) for k,v in found.items()}


def set_temperature(
    model, # A `ResNet`, or a learner over `resnet_dls`
    temperature:float, # Above 0; 1 undoes `calibrate`
):
    "Predict at this temperature from now on, as long as neither weights nor protocol change"
    if check_temperature(temperature) == 1: model.trust = {k: v for k,v in getattr(model, 'trust', {}).items() if k != 'calibration'}
    else: _keep(model, calibration=dict(temperature=float(temperature)))


def set_min_prob(
    model, # A `ResNet`, or a learner over `resnet_dls`
    min_prob:float|None, # From 0 to 1; None: every photo gets an answer again
):
    "Answer only what is at least so probable from now on, as long as neither weights nor protocol nor temperature change"
    if min_prob is None: model.trust = {k: v for k,v in getattr(model, 'trust', {}).items() if k != 'threshold'}
    else: _keep(model, threshold=dict(min_prob=check_min_prob(min_prob), temperature=model_parts(model).temperature))


def calibrate(
    model, # A `ResNet`, or a learner over `resnet_dls`; its predictions follow from now on
    split:str='val', # Photos that training has not learned from
    data_path=None, # For a loaded model: photos with such a folder
    label_path=None, # Their labels
    precision:str|None=None, # 'fp32', 'bf16' or 'fp16'; None: the fastest that the hardware has
) -> pd.DataFrame: # 'before' and 'after': temperature, log_loss, ece, confidence, top1_error, photos
    "Fit one temperature to the validation photos, so that of the answers given with 80 % about 80 % are right"
    said = answers(model, split, data_path, label_path, precision)
    temperature = fit_temperature(said.probs, said.targ)
    if temperature == 1: print(f"all {len(said.targ):,} photos are right, so that no temperature has a smallest loss: it stays 1")
    elif at_limit(temperature): print(f"the temperature is at its limit, {temperature:.3g}: these {len(said.targ):,} photos do not tell it")
    rows = pd.DataFrame([calibration_row(said, t) for t in (1., temperature)], index=['before', 'after'])
    measured = {f'{k}{when}': float(rows.loc[row, k]) for k in ('log_loss', 'ece') for row,when in (('before', '_before'), ('after', ''))}
    _keep(model, calibration=dict(temperature=temperature, photos=len(said.targ), **measured))
    return rows


def calibration_row(
    said:Answers, # Of photos
    temperature:float=1, # For their probabilities
) -> dict: # temperature, log_loss, ece, confidence, top1_error, photos
    "How far confidence and truth lie apart at a temperature"
    confidence, right = said.first(temperature)
    return dict(temperature=temperature, log_loss=log_loss(tempered(said.probs, temperature), said.targ),
                ece=calibration_error(confidence, right),
                confidence=confidence.mean(), top1_error=1 - right.mean(), photos=len(right))


def threshold(
    model, # A `ResNet`, or a learner over `resnet_dls`; its predictions follow from now on
    precision:float=.95, # Share of the answers that has to be right, 0 to 1
    split:str='val', # Photos that training has not learned from
    data_path=None, # For a loaded model: photos with such a folder
    label_path=None, # Their labels
) -> pd.Series: # min_prob, precision with its 95 % interval, coverage (share of photos that are answered) with its own, photos
    "Find the probability below which the model says \"not sure\", so that so many answers are right; a `DataError` where there is none"
    said, temperature = answers(model, split, data_path, label_path), model_parts(model).temperature
    found = pick_threshold(*said.first(temperature), precision)
    _keep(model, threshold=dict(found, wanted=float(precision), temperature=temperature))
    return pd.Series(found, name='threshold')


def remark(
    model, # A `ResNet`
):
    "Say so where a temperature or threshold no longer belongs to the weights and the protocol"
    parts, kept = model_parts(model), getattr(model, 'trust', {})
    gone = [w for w,stale in (('temperature', 'calibration' in kept and parts.temperature != kept['calibration']['temperature']),
                              ('threshold', 'threshold' in kept and parts.min_prob is None)) if stale]
    if gone:
        print(f"the {' and the '.join(gone)} belonged to other weights or another protocol, and no longer count; call calibrate() or "
              "threshold() again")


# ── Pictures

def _draw_reliability(ax, said, temperature, title):
    "Bars of the share that was right, with 95 % intervals, on the diagonal that they should follow"
    confidence, right = said.first(temperature)
    n, at, was = reliability(confidence, right, bins := 10)
    full = np.flatnonzero(n)
    low, high = np.array([wilson(round(was[i]*n[i]), n[i]) for i in full]).T
    ax.plot([0, 1], [0, 1], color='.6', ls='--', lw=1)
    ax.bar((np.arange(bins) + .5)/bins, n/n.sum(), 1/bins, color='.9', label='share of the photos')
    error = [(was[full] - low).clip(0), (high - was[full]).clip(0)]
    ax.errorbar(at[full], was[full], error, fmt='o', color=_blue, ms=5, lw=1.2, capsize=2, label='right, with 95 % interval')
    ax.set(xlim=(0, 1), ylim=(0, 1.02), xlabel='probability of the first label', aspect='equal')
    ax.set_title(f'{title}: ECE {calibration_error(confidence, right):.1%}, {confidence.mean():.0%} sure, {right.mean():.0%} right',
                 fontsize=9)


def show_calibration(
    model, # A `ResNet`, or a learner over `resnet_dls`
    split:str='val', # Whose photos: 'test' is the honest one after `calibrate`, which has seen the labels of 'val'
    data_path=None, # For a loaded model: photos with such a folder
    label_path=None, # Their labels
) -> plt.Figure: # Left as the network says it, right at the model's temperature
    "Reliability diagrams: does what is said with 80 % come true four times of five?"
    said, temperature = answers(model, split, data_path, label_path), model_parts(model).temperature
    fig, axs = plt.subplots(1, 2, figsize=(8, 4.1), layout='constrained')
    _draw_reliability(axs[0], said, 1, 'As the network says')
    _draw_reliability(axs[1], said, temperature, f'At temperature {temperature:.2f}')
    axs[0].set_ylabel('share of the answers that is right')
    fig.legend(*axs[0].get_legend_handles_labels(), fontsize=8, loc='outside lower center', ncols=2, frameon=False)
    return fig


def show_threshold(
    model, # A `ResNet`, or a learner over `resnet_dls`
    split:str='val', # Whose photos
    data_path=None, # For a loaded model: photos with such a folder
    label_path=None, # Their labels
) -> plt.Figure: # Precision and coverage against the threshold
    "What each threshold costs: how many answers are right, and how many photos still get one"
    parts, said = model_parts(model), answers(model, split, data_path, label_path)
    at, n, good = answered(*said.first(parts.temperature))
    low, high = np.array([wilson(g, m) for g,m in zip(good, n)]).T
    fig, ax = plt.subplots(figsize=(6.4, 3.4), layout='constrained')
    ax.fill_between(at, low, high, color=_blue, alpha=.2, step='mid', lw=0)
    ax.step(at, good/n, color=_blue, label='right, of the answers (95 % interval)', where='mid')
    ax.step(at, n/len(said.targ), color=_orange, ls='--', label='answered, of the photos', where='mid')
    title = f'{good[-1]/n[-1]:.0%} of {len(said.targ):,} {split} photos are right when all are answered'
    if parts.min_prob is not None:
        k = int((said.first(parts.temperature)[0] >= parts.min_prob).sum())
        ax.axvline(parts.min_prob, color='.3', lw=1, ls=':')
        if k:
            right, told = good[np.searchsorted(n, k)]/k, k/len(said.targ)
            title = f'Above {parts.min_prob:.2f}: {right:.0%} right, {told:.0%} of {len(said.targ):,} {split} photos answered'
    ax.set(xlabel='threshold: least probability of an answer', ylabel='share', xlim=(0, 1), ylim=(0, 1.02))
    ax.set_title(title, fontsize=10)
    ax.legend(fontsize=8, loc='lower left')
    return fig
