"""Batch norm's statistics as plain averages over training batches, in the place of moving averages."""
from itertools import takewhile

import torch
import torch.distributed as dist
from fastai.learner import Learner
from fastai.torch_core import num_distrib
from fastprogress.fastprogress import progress_bar
from torch import nn

from .arguments import whole_number
from .calibration import outdated
from .checkpoint import get_rng, set_rng
from .files import DataError


@torch.no_grad()
def average_statistics(
    net:nn.Module, # Changed in place: running means and variances, nothing else
    batches, # Of inputs (B,C,H,W), prepared as in training; not empty
):
    "Replace each batch norm's moving averages by plain averages over batches; where the passes break off, they come back"
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None]
    kept = [(m.momentum, {k: v.clone() for k, v in m._buffers.items()}) for m in norms]
    modes = {m: m.training for m in net.modules()}
    net.eval()
    for m in norms:
        m.reset_running_stats()
        m.momentum = None                                   # PyTorch's cumulative average
        m.train()
    try:
        for x in batches: net(x)
    except BaseException:
        for m, (_, old) in zip(norms, kept):
            for k, v in old.items(): m._buffers[k].copy_(v)
        raise
    finally:
        for m, (momentum, _) in zip(norms, kept): m.momentum = momentum
        for m, training in modes.items(): m.training = training


def _average_over_processes(net):
    "The mean of what the processes have found, each from its own photos"
    for m in net.modules():
        if not isinstance(m, nn.modules.batchnorm._BatchNorm) or m.running_mean is None: continue
        for found in (m.running_mean, m.running_var):
            dist.all_reduce(found)
            found /= num_distrib()


def exact_bn(
    model, # A trained learner, or a `ResNet` with photos
    photos:int=10_000, # Training photos to average over, as they are augmented in training; at most one epoch. All processes together
) -> int: # Photos that were averaged over
    """Replace the moving averages of a trained model's batch norms by plain averages over training photos, in place.

    The authors computed the statistics of their released models so. Draws of a later `fit` stay as they would have been; a temperature
    or threshold that was measured before no longer counts."""
    learn = model if isinstance(model, Learner) else getattr(model, 'learn', None)
    if learn is None: raise DataError("a loaded model has no training photos to average over; exact_bn needs a learner")
    photos = whole_number('photos', photos, 2)
    rng, seen, many = get_rng(learn.dls.loaders), [], getattr(learn, 'many_processes', None)
    share = -(-photos//num_distrib()) if many else photos
    def inputs():
        for x, *_ in takewhile(lambda _: sum(seen) < share, progress_bar(learn.dls.train, leave=False)):
            yield x
            seen.append(len(x))
    if balance := getattr(learn, 'balance', None): balance.before_fit()      # the photos that training draws
    try: average_statistics(learn.model, inputs())
    finally:
        set_rng(rng, learn.dls.loaders)
        if balance: balance.close()
    learn.trust = outdated(getattr(learn, 'trust', {}))
    if not many: return sum(seen)
    _average_over_processes(learn.model)
    return int(many.sum(sum(seen))[0])
