"""Stop a training whose loss is infinite or NaN, and name its photos."""
import torch
from fastai.callback.core import Callback

from .files import DataError
from .foreach import to_host


class LossError(DataError): "A loss that is infinite or not a number"


def batch_names(
    dl, # A loader that is being read
    i:int, # Number of the batch in the epoch
) -> list: # Their names; empty where the loader does not know
    "The items of a batch, by the loader's own order"
    order,items = getattr(dl, '_DataLoader__idxs', None),getattr(getattr(dl, 'dataset', None), 'items', None)
    if order is None or items is None or not hasattr(dl, 'shares'): return []
    i -= len(dl) - len(shares := dl.shares or [dl.bs]*len(dl))             # a resumed epoch has only the rest of its order
    return [str(items[int(j) % len(items)]) for j in order[sum(shares[:i]):sum(shares[:i+1])]]     # past the end: a photo's second turn


class FiniteLoss(Callback):
    "Stop before an update whose loss is infinite or not a number, and name its photos"
    order = -20                                             # before any other callback takes the loss, or the gradients, for numbers
    def before_fit(self): self.run = not hasattr(self.learn, 'lr_finder')        # lr_find drives it there on purpose
    def before_epoch(self): self.fitting = False
    def before_train(self): self.fitting = True

    def before_backward(self): self.loss_here = to_host(self.loss)
    def after_backward(self): self._check(self.loss_here())           # a GPU has its gradients to do while the processor waits for the loss
    def after_batch(self):
        if self.fitting and not self.training: self._check(self.loss)

    def _check(self, loss):
        # on the processor: the recorder need not wait once more, for the update
        self.learn.loss = loss
        if not torch.isfinite(loss): raise LossError(self.say(f'the loss is {loss.item()}'))

    def say(self,
        what:str, # What is wrong
    ) -> str:
        "What is wrong, where, with which photos, and what may help"
        names,lr = batch_names(self.dl, self.iter),self.opt.hypers[-1]['lr']
        bad = [n for n,x in zip(names, self.xb[0]) if not torch.isfinite(x).all()]
        some = f"{'; '.join(names[:8])}{f' and {len(names)-8} more' if len(names) > 8 else ''}"
        return (f"{what} in epoch {self.epoch}, {'training' if self.training else 'validation'} batch {self.iter}, at the rate {lr:.4g}. "
                + (f"The pixels of {'; '.join(bad)} are no numbers: repair or remove that. " if bad else
                   f"Try lr={lr/10:.2g}, or WarmUp() for the start; if it is always the same photos, look at them. ")
                + (f"The batch: {some}. " if names else '')
                + _what_stands(self))


def _what_stands(learn):
    newest = learn.checkpoint.newest() if hasattr(learn, 'checkpoint') else None
    return f"The last good checkpoint stands: {newest}" if newest else "There is no checkpoint yet; Checkpoint(folder) keeps them"
