"""Batch norm's statistics as plain averages over training batches, in the place of moving averages."""
import torch
from fastai.learner import Learner
from fastprogress.fastprogress import progress_bar
from torch import nn

from .checkpoint import get_rng, set_rng
from .files import DataError


def _norms(net):
    return [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None]


def exact_bn(
    model, # A trained learner, or a `ResNet` with photos
    photos:int=10_000, # Training photos to average over, as they are augmented in training; at most one epoch
) -> int: # Photos that were averaged over
    """Replace each batch norm's moving averages by plain averages over training batches, in place.

    The authors computed the statistics of their released models so, after training. Draws of a later `fit` stay as they
    would have been; where the passes break off, the moving averages come back."""
    learn = model if isinstance(model, Learner) else getattr(model, 'learn', None)
    if learn is None: raise DataError("a loaded model has no training photos to average over; exact_bn needs a learner")
    if type(photos) is not int or photos < 2: raise DataError(f"photos is {photos!r}; it must be a whole number from 2 on")
    net, dl, seen = learn.model, learn.dls.train, 0
    norms, rng, modes = _norms(net), get_rng(learn.dls.loaders), {m: m.training for m in net.modules()}
    kept = [(m.momentum, {k: v.clone() for k, v in m._buffers.items()}) for m in norms]
    net.eval()
    for m in norms:
        m.reset_running_stats()
        m.momentum = None                                   # PyTorch's cumulative average
        m.train()
    try:
        with torch.no_grad():
            for x, *_ in progress_bar(dl, leave=False):
                net(x)
                seen += len(x)
                if seen >= photos: break
    except BaseException:
        for m, (_, old) in zip(norms, kept):
            for k, v in old.items(): m._buffers[k].copy_(v)
        raise
    finally:
        for m, (momentum, _) in zip(norms, kept): m.momentum = momentum
        for m, training in modes.items(): m.training = training
        set_rng(rng, learn.dls.loaders)
    return seen
