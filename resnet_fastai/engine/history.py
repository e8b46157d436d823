"""A row for each epoch, over all fits, and a picture of it."""
import time

import matplotlib.pyplot as plt
import pandas as pd
import torch
from fastai.callback.core import Callback
from fastai.torch_core import num_distrib

from .calibration import outdated
from .files import DataError


class History(Callback):
    "One row for each epoch, over all fits: losses, errors, rate, seconds; the recorder goes on where it was"
    order,remove_on_fetch = 51,True                         # right after the Recorder has cleared its lists; and out of the way with it
    state_attrs = ('rows', 'wrong', 'seen')
    lists = ('lrs', 'iters', 'losses', 'values')            # the recorder's
    on_graph = 'log'
    def __init__(self): self.rows,self.kept = [],None

    def before_fit(self):
        self.run = not hasattr(self.learn, 'lr_finder')
        self._give_back()

    def _give_back(self):
        if not self.run or not self.kept: return
        for name,old in self.kept.items(): setattr(self.recorder, name, list(old))
        self.recorder.smooth_loss.count,self.recorder.smooth_loss.val = self.smooth

    def before_epoch(self): self.trained,self.start,self.wrong,self.seen = False,time.perf_counter(),0,0
    def before_train(self):
        self.trained,learn = True,self.learn
        learn.restored,learn.trust = None,outdated(getattr(learn, 'trust', {}))       # these are the weights of no epoch from here on
    def after_train(self): self._fill(2 + len(self.metrics)*self.recorder.train_metrics)
    def after_validate(self): self._fill(len(self.recorder.metric_names) - self.recorder.add_time)
    def after_cancel_epoch(self):
        self.recorder.cancel_valid = True
        self.after_validate()

    def _fill(self, n):
        "What an epoch that was cut short has not logged, so that each value keeps its place"
        rec = self.recorder
        if self.trained and len(rec.log) == 1: rec.log.append(float(rec.smooth_loss.value))
        if self.trained: rec.log = rec.log + [float('nan')]*(n - len(rec.log))

    def after_batch(self):
        if self.training and len(self.recorder.losses) % 100 == 0: self._pack(100)
        self._count_wrong()

    def _pack(self, n):
        "The recorder's newest n losses side by side: among an update's large buffers, each would keep a megabyte from being used again"
        if n and (new := self.recorder.losses[-n:]): self.recorder.losses[-n:] = torch.stack(new).as_subclass(torch.Tensor).unbind()

    def _count_wrong(self):
        "Count the training photos whose best guess is wrong, as they go by"
        if not self.training or self.pred.ndim != 2 or self.yb[0].is_floating_point(): return
        self.wrong,self.seen = self.wrong + (self.pred.detach().argmax(1) != self.yb[0]).sum(),self.seen + len(self.yb[0])

    def after_epoch(self):
        if not self.trained: return self._give_back()       # validate() or get_preds()
        self._pack(len(self.recorder.losses) % 100)
        rec,self.trained = self.recorder,False
        values = {name: float('nan' if v is None else v) for name,v in zip(rec.metric_names[1:], rec.values[-1])}
        lr = (rec.lrs or [self.opt.hypers[-1]['lr']])[-1]
        row = dict(epoch=len(self.rows), **values, lr=float(lr), seconds=time.perf_counter() - self.start)
        row |= dict(train_error=int(self.wrong)/self.seen) if self.seen else {}
        many = num_distrib() > 1 or any('processes' in r for r in self.rows)                 # at the end of the epoch
        self.rows.append(row | (dict(processes=max(num_distrib(), 1)) if many else {}))
        self.kept,self.smooth = {n: list(getattr(rec, n)) for n in self.lists},(rec.smooth_loss.count, rec.smooth_loss.val)

    def after_replays(self, iters, losses, wrong, seen):
        "Count photos of updates from a CUDA graph"
        self.wrong,self.seen = self.wrong + wrong,self.seen + seen

    @property
    def df(self): return pd.DataFrame(self.rows)


def plot_history(
    history:pd.DataFrame, # A row an epoch, as `History` and `ResNet` keep it
) -> plt.Figure: # Losses on the left, errors on the right
    "Loss and error over the epochs, as in the paper's Figure 4: training thin, validation bold; dotted where the rate fell to half or less"
    if not isinstance(history, pd.DataFrame) or not len(history): raise DataError("this history has no epoch yet; call fit() first")
    missing = [name for name in ('epoch', 'lr', 'valid_loss', 'top1_error') if name not in history]
    if missing: raise DataError(f"this is no history of a training: it has no column {missing[0]!r}")
    fig,axs = plt.subplots(1, 2, figsize=(8, 3), layout='constrained')
    for name,style in _line_styles.items():
        if name in history: axs[int('error' in name)].plot(history.epoch, history[name], label=name.replace('_', ' '), **style)
    fell = history.epoch[history.lr <= history.lr.shift()/2]
    for ax,unit in zip(axs, ('cross-entropy, nats', 'share of photos')):
        for e in fell: ax.axvline(e - .5, color='.5', ls=':', lw=1)
        ax.set(xlabel='epoch', ylabel=unit)
        ax.legend()
    axs[0].set_title(f'Best validation loss {history.valid_loss.min():.3g}, epoch {history.valid_loss.idxmin()}', fontsize=10)
    axs[1].set_title(f'Last top-1 error {history.top1_error.iloc[-1]:.1%}', fontsize=10)
    return fig


_train,_valid = dict(color='#0072B2', lw=1, marker='o', ms=2),dict(color='#D55E00', lw=2.4, marker='o', ms=3)     # Okabe and Ito's
_line_styles = dict(train_loss=_train, valid_loss=_valid, train_error=_train, top1_error=_valid,
                    top5_error=_valid | dict(color='#009E73', ls='--'), balanced_error=_valid | dict(color='#CC79A7', ls='-.'))
