"""Classes of different sizes that count the same in training: by the batches, or by the loss; and the error to judge it by"""

import numpy as np
import pandas as pd
import torch
from fastai.callback.core import Callback
from fastai.layers import NoneReduce
from fastai.learner import Metric
from fastai.torch_core import rank_distrib
from fastcore.basics import GetAttr

from .arguments import one_of
from .files import DataError

__all__ = ['balanced_order', 'class_weights', 'BalancedLoss', 'BalancedError', 'Balance', 'balancing']


def balanced_order(
    classes: np.ndarray, # (n,) the class of each photo
    rng: np.random.Generator, # The order is a function of its state
) -> np.ndarray: # (n,) places; n, 2n, … more where a photo comes for the second time, the third …
    "An epoch of as many photos as there are, as many of each class; the photos of a class take turns"
    n, by_class = len(classes), np.argsort(classes, kind='stable')
    members = np.split(by_class, np.flatnonzero(np.diff(classes[by_class])) + 1)
    wanted = np.full(len(members), n//len(members))
    wanted[rng.permutation(len(members))[:n % len(members)]] += 1
    turns = [np.concatenate([rng.permutation(mine) + n*k for k in range(-(-w//len(mine)))])[:w] for mine, w in zip(members, wanted)]
    return rng.permutation(np.concatenate(turns))


def class_weights(
    counts: np.ndarray, # (n_out,) training photos of each output
) -> torch.Tensor: # (n_out,) float32; their mean over the photos is 1
    "Weights with which every class that has photos adds the same to the loss"
    there = counts > 0
    return torch.tensor(np.where(there, counts.sum()/(there.sum()*counts.clip(1)), 1.), dtype=torch.float32)


class BalancedLoss(GetAttr):
    "A loss in which each photo weighs as its class says, in training; the mean is over photos, so that parts of a batch add up"
    _default = 'loss'
    def __init__(self,
        loss, # A loss of fastai's or PyTorch's
        weights: torch.Tensor, # (n_out,)
    ): self.loss, self.weights, self.reduction = loss, weights, 'mean'

    def __call__(self, pred, targ):
        if not torch.is_grad_enabled() and self.reduction == 'mean': return self.loss(pred, targ)     # validation: photos as they are
        with NoneReduce(self.loss) as f: each = f(pred, targ)
        if torch.is_grad_enabled():
            if self.weights.device != each.device: self.weights = self.weights.to(each.device)
            each = each*self.weights[targ.as_subclass(torch.Tensor)]
        return each if self.reduction == 'none' else each.mean()


class BalancedError(Metric):
    "The mean of the classes' top-1 errors, however many photos each has"
    name = 'balanced_error'
    def __init__(self): self.reset()
    def reset(self): self.wrong = self.seen = 0

    def accumulate(self, learn):
        targ, n = learn.yb[0].as_subclass(torch.Tensor), learn.pred.shape[1]
        wrong = learn.pred.detach().as_subclass(torch.Tensor).argmax(1) != targ
        self.seen = self.seen + torch.bincount(targ, minlength=n).cpu()
        self.wrong = self.wrong + torch.bincount(targ[wrong], minlength=n).cpu()

    @property
    def per_class(self) -> torch.Tensor: # (n_out,) NaN where a class had no photo
        "The top-1 error of each class"
        return self.wrong/self.seen

    @property
    def value(self): return None if isinstance(self.seen, int) else self.per_class.nanmean().item()


class Balance(Callback):
    "Every class counts the same in training: as many photos of each in an epoch ('sampler'), or weights in the loss ('loss')"
    part_of_run = True                                       # so that a run goes on, and processes train together, in the same way only
    def __init__(self,
        kind: str, # 'sampler' or 'loss'
    ): self.kind, self.error = kind, BalancedError()

    def after_create(self):
        photos = getattr(self.dls, 'photos', {}).get('train')
        if photos is None or not photos.vocab or not hasattr(self.dls.train, 'photos_in'):
            raise DataError(f"balance={self.kind!r} needs to know the labels of the training photos; make the loaders with resnet_dls")
        self.codes,self.counts = photos.codes,np.bincount(photos.codes, minlength=len(photos.vocab))
        of = [self.dls.labels.encoding[label] for label in photos.vocab]
        self.by_output = np.bincount(of, self.counts, len(self.dls.vocab))
        if self.kind == 'loss': self.learn.loss_func = BalancedLoss(self.loss_func, class_weights(self.by_output))
        self.learn.metrics = [*self.learn.metrics, self.error]
        if not rank_distrib(): print(self)

    def before_fit(self):
        "From here to `close` the loader draws as many photos of each class: another learner may have the same loaders"
        if self.kind == 'sampler': self.dls.train.classes = self.codes

    def close(self): self.dls.train.classes = None

    def __repr__(self):
        own = self.counts[self.counts > 0]
        how = f'about {own.sum()/len(own):,.0f} of each in an epoch' if self.kind == 'sampler' else 'each adds the same to the loss'
        return f'balance={self.kind!r}: {len(own):,} classes of {own.min():,} to {own.max():,} photos, {how}'

    @property
    def table(self) -> pd.DataFrame: # label, photos, share; turns or weight; error
        "What it does to each class, and the class's error on the validation photos of the last epoch"
        labels, seen = self.dls.labels.by_index, not isinstance(self.error.seen, int)
        there = [i for i in sorted(labels) if self.by_output[i]]
        found = pd.DataFrame(dict(label=pd.Series([labels[i] for i in there], dtype=object), photos=self.by_output[there].astype(int)))
        found['share'] = found.photos/found.photos.sum()
        if self.kind == 'sampler': found['turns'] = found.photos.sum()/len(there)/found.photos    # of each photo in an epoch
        else: found['weight'] = class_weights(self.by_output)[there].numpy()
        return found.assign(error=self.error.per_class[there].numpy() if seen else float('nan'))


def balancing(
    kind: str|None, # 'sampler', 'loss' or None
) -> list: # Of callbacks
    "The callback that balances classes, if one is wanted"
    return [] if kind is None else [Balance(one_of('balance', kind, ('sampler', 'loss')))]
