"""What helps few photos: label smoothing, MixUp and CutMix, an average of the weights, and an end when validation no longer improves."""
from numbers import Real

import torch
from fastai.callback import mixup as fastai_mixup
from fastai.callback.core import Callback, CancelFitException
from fastai.imports import noop
from fastai.losses import CrossEntropyLossFlat
from fastcore.basics import GetAttr

from .arguments import whole_number
from .files import DataError


# ── Label smoothing ──────────────────────────────────────────────────────────────────────────────────────────────────────────

class SmoothedLoss(GetAttr):
    "Cross-entropy whose targets leave a share for the other labels, in training; plain in validation, so that runs can be compared"
    _default = 'loss'
    def __init__(self,
        label_smoothing:float, # The share that is spread evenly over the labels, 0 to 1
        outputs:list|None=None, # The outputs that have a label; None: all
    ):
        self.loss, self.share = CrossEntropyLossFlat(), label_smoothing
        self.outputs = None if outputs is None else torch.tensor(outputs)
        self.keywords = dict(label_smoothing=label_smoothing)               # a run goes on with the same one only

    def __call__(self, pred, targ):
        plain = self.loss(pred, targ)
        if not torch.is_grad_enabled(): return plain
        logs = pred.log_softmax(-1)
        if self.outputs is not None:
            if self.outputs.device != logs.device: self.outputs = self.outputs.to(logs.device)
            logs = logs.index_select(-1, self.outputs)
        spread = -logs.mean(-1)
        return (1 - self.share)*plain + self.share*(spread if self.reduction == 'none' else spread.mean())

    @property
    def reduction(self): return self.loss.reduction
    @reduction.setter
    def reduction(self, how): self.loss.reduction = how


def smoothed(
    label_smoothing:float, # 0: none
    loss_func, # The loss that was asked for; None: cross-entropy
    dls, # Loaders; those of `resnet_dls` know which outputs have a label
): # A loss function
    "The loss of a learner: cross-entropy, perhaps smoothed, or one's own"
    share = _number('label_smoothing', label_smoothing, 1, .1)
    if not share: return loss_func or CrossEntropyLossFlat()
    if loss_func: raise DataError("label_smoothing belongs to the cross-entropy; pass either it or a loss_func of your own")
    known = sorted(getattr(getattr(dls, 'labels', None), 'by_index', ()))
    return SmoothedLoss(share, known if known and len(known) < len(dls.vocab) else None)


def _number(name, value, below, such_as):
    "An argument as a float: 0 and None are off; a `DataError` where it is no number from 0 to `below`"
    if value is None: return 0.
    if isinstance(value, Real) and not isinstance(value, bool) and 0 <= value < below: return float(value)
    most = '' if below == float('inf') else f' and below {below}'
    raise DataError(f"{name} is {value!r:.80}; it must be a number from 0 (off) on{most}, such as {such_as}")


# ── MixUp and CutMix ─────────────────────────────────────────────────────────────────────────────────────────────────────────

class _Mixing:
    "fastai's mixing of photos within a micro-batch; gives the loss back whatever ends the fit"
    stack_y = False
    def before_train(self):
        if getattr(self.dls.train, 'bs', 2) < 2:
            raise DataError(f"{self.name} mixes the photos of a micro-batch, and micro_bs=1 leaves none to mix with")
        super().before_train()

    def after_train(self):
        super().after_train()
        self.stack_y = False
    def close(self): self.after_train()


class _MixUp(_Mixing, fastai_mixup.MixUp):
    name = 'mixup'
    def __init__(self,
        alpha:float=.4, # Of the Beta distribution that the shares are drawn from
    ):
        super().__init__(alpha)
        self.alpha = alpha


class _CutMix(_Mixing, fastai_mixup.CutMix):
    name = 'cutmix'
    def __init__(self,
        alpha:float=1., # Of the Beta distribution that the areas are drawn from
    ):
        super().__init__(alpha)
        self.alpha = alpha


# ── An average of the weights ────────────────────────────────────────────────────────────────────────────────────────────────

class EMA(Callback):
    """An exponential moving average of weights and BN statistics, one step an update. The network has the average wherever it is
    looked at (in validation, in best.pt, after the fit); it gets its own weights back to train on.

    The first averages are short: `decay` is at most (1 + updates)/(10 + updates)."""
    order,part_of_run,state_attrs = 80,True,('updates', 'shown', 'other')
    def __init__(self,
        decay:float=.999, # The share of the average that an update leaves
    ):
        self.decay,self.updates,self.versions = decay,0,None
        self.shown,self.other = False,None                  # has the network the average? and those of both that it has not

    def _tensors(self):
        net = getattr(self.model, 'module', self.model)
        return [t for t in net.state_dict().values() if t.is_floating_point()]

    def before_fit(self):
        self.run = not hasattr(self.learn, 'lr_finder')
        if self.versions is None or self.versions == self._versions(): return
        self.updates,self.shown,self.other = 0,False,None   # somebody has put other weights in: they are the ones to train

    def before_batch(self):
        if self.training and self.shown: self._swap()

    @torch.no_grad()
    def after_step(self):
        now = self._tensors()
        if self.other is None: self.other = [t.clone() for t in now]
        else:
            self.other = [o.to(t.device) for o,t in zip(self.other, now)]       # a checkpoint is read on the CPU
            torch._foreach_lerp_(self.other, now, 1 - min(self.decay, (1 + self.updates)/(10 + self.updates)))
        self.updates += 1

    def after_train(self): self._show()
    def after_cancel_epoch(self): self._show()

    def close(self):
        "The average stays in the network, also when a fit broke off"
        self._show()
        self.versions = self._versions()

    def _show(self):
        if not self.shown and self.other is not None: self._swap()

    @torch.no_grad()
    def _swap(self):
        now = self._tensors()
        own = [t.clone() for t in now]
        torch._foreach_copy_(now, self.other)
        self.other,self.shown = own,not self.shown

    def _versions(self): return [p._version for p in getattr(self.model, 'module', self.model).parameters()]


# ── The end ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

class EarlyStopping(Callback):
    "End a fit when a column of the history has not improved for `patience` epochs; each fit counts anew"
    order,state_attrs = 62,('best', 'wait')                 # when `History` has written the row, before `Checkpoint` keeps the counter
    def __init__(self,
        patience:int=5, # Epochs without improvement after which the fit ends
        monitor:str='valid_loss', # A column of the history; smaller is better
    ):
        patience = whole_number('early_stopping', patience)
        self.patience,self.monitor,self.best,self.wait,self.trained = patience,monitor,float('inf'),0,False

    def before_fit(self): self.run = not hasattr(self.learn, 'lr_finder')
    def before_epoch(self): self.trained = False            # validate() is an epoch too
    def before_train(self):
        self.trained = True
        if not self.epoch: self.best,self.wait = float('inf'),0
        if self.wait >= self.patience: self._stop()         # a run that had ended so, and is resumed

    def after_epoch(self):
        if not self.trained: return
        row = self.learn.history.rows[-1]
        if self.monitor not in row: raise DataError(f"EarlyStopping monitors {self.monitor!r}; there is {', '.join(row)}")
        value = row[self.monitor]
        if value != value: return                           # NaN: the epoch was cut short
        self.best,self.wait = (value, 0) if value < self.best else (self.best, self.wait + 1)
        if self.wait >= self.patience: self._stop()

    def _stop(self):
        if self.logger != noop:
            print(f"no {self.monitor} below {self.best:.4g} for {self.wait} epochs: the training ends after {len(self.learn.history.rows)}")
        raise CancelFitException()


# ── All of them ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

def regularising(
    dls, # Loaders; those of `resnet_dls` know which outputs have a label
    loss_func, # The loss that was asked for; None: cross-entropy
    label_smoothing:float=0, # The share of each target that is spread over all labels, such as .1; 0: none
    mixup:float=0, # Alpha with which MixUp draws how much of two photos is blended, such as .4; 0: never
    cutmix:float=0, # Alpha with which CutMix draws how much of a photo another one covers, such as 1; 0: never
    ema:float=0, # Decay of an average of the weights, which is validated, saved and predicted with, such as .999; 0: none
    early_stopping:int|None=None, # Epochs without a better validation loss after which a fit ends; None: never
) -> tuple: # (loss function, callbacks)
    "What helps few photos, as far as it is wanted"
    mixup, cutmix = _number('mixup', mixup, float('inf'), .4), _number('cutmix', cutmix, float('inf'), 1)
    ema = _number('ema', ema, 1, .999)
    if mixup and cutmix: raise DataError("mixup and cutmix would mix each photo twice; pass one of the two")
    if loss_func and not callable(loss_func):
        raise DataError(f"loss_func is {str(loss_func)[:80]!r}; pass a function of outputs and labels")
    asked = (_MixUp, mixup or None), (_CutMix, cutmix or None), (EMA, ema or None), (EarlyStopping, early_stopping)
    return smoothed(label_smoothing, loss_func, dls), [make(value) for make,value in asked if value is not None]


def in_use(
    learn, # Of `resnet_learner`
) -> dict: # Of numbers and names, as the arguments were given
    "Which of these a learner has, for the card of a model; and `balance`"
    cbs, of = {cb.name: cb for cb in learn.cbs}, dict(mixup='alpha', cutmix='alpha', ema='decay', early_stopping='patience', balance='kind')
    share = getattr(learn.loss_func, 'share', 0)
    return (dict(label_smoothing=share) if share else {}) | {name: getattr(cbs[name], attr) for name,attr in of.items()
                                                             if hasattr(cbs.get(name), attr)}
