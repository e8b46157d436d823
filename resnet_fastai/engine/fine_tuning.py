"""Fine-tuning: parameter groups by stage, BN of frozen layers, the head first and then everything, the best epoch's weights"""
import numpy as np
from fastai.callback.core import Callback
from torch import nn

from .arguments import whole_number
from .checkpoint import _on_rank0, read_checkpoint
from .files import DataError


def stage_groups(
    net:nn.Module, # Of `build_net`
) -> list: # Of lists of parameters: the stem, each stage, the head
    "Split a network's parameters where its stages begin: fastai's `freeze_to` and slices of rates count in these groups"
    groups = {}
    for name,p in getattr(net, 'module', net).named_parameters():
        part = name.partition('.')[0]
        groups.setdefault(part if part.startswith('layer') else 'head' if part == 'fc' else 'stem', []).append(p)
    return list(groups.values())


class FrozenBN(Callback):
    "BN whose weights are frozen keeps its statistics too: it stays in eval mode while the rest trains"
    order,run_valid = -9,False                              # after fastai has set the network to training mode
    def before_train(self):
        for m in self.model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine and not m.weight.requires_grad: m.eval()


class BestWeights(Callback):
    "Keep the weights of the epoch with the smallest monitored value, where no `Checkpoint` does"
    order = 99
    def __init__(self,
        monitor:str='valid_loss', # A column of the history; smaller is better
    ): self.monitor,self.best,self.state,self.epoch_kept,self.trained = monitor,float('inf'),None,None,False

    def before_epoch(self): self.trained = False            # validate() and get_preds() are epochs too
    def before_train(self): self.trained = True
    def after_epoch(self):
        if not self.trained: return
        row = self.learn.history.rows[-1]
        if self.monitor not in row: raise DataError(f"BestWeights monitors {self.monitor!r}; there is {', '.join(row)}")
        if not row[self.monitor] < self.best: return
        net = getattr(self.model, 'module', self.model)
        self.best,self.epoch_kept = row[self.monitor],row['epoch']
        self.state = {k: v.detach().clone() for k,v in net.state_dict().items()}


def keeping_best(
    learn, # Made by `resnet_learner`
    way, # A way to train: `fit_on_schedule` or `fine_tune`
    restore:bool, # Go back to the best epoch's weights at the end?
    **kwargs # For `way`
):
    "Train, and if asked to, go back to the weights of the epoch with the smallest validation loss"
    if restore and not hasattr(learn, 'checkpoint') and not hasattr(learn, 'best_weights'): learn.add_cb(BestWeights())
    way(learn, **kwargs)
    if restore: restore_best(learn)


def _best(path):
    "(weights, epoch) of a checkpoint; the first process reads it, which has written it"
    if not path.exists(): raise DataError(f"{path} is not there: no epoch has been finished in this folder yet")
    state = read_checkpoint(path)
    return state['model'],state['callbacks']['history']['rows'][-1]['epoch']


def restore_best(
    learn, # Made by `resnet_learner`; fitted with a `Checkpoint` or `BestWeights`
) -> int: # Its epoch
    "Go back to the weights of the best epoch"
    if hasattr(learn, 'checkpoint'): weights,epoch = _on_rank0(learn, lambda: _best(learn.checkpoint.folder/'best.pt'))
    else:
        cb = getattr(learn, 'best_weights', None)
        if cb is None or cb.state is None: raise DataError("no epoch's weights were kept; pass restore_best=True to fit, or a run_folder")
        weights,epoch = cb.state,cb.epoch_kept
    net = getattr(learn.model, 'module', learn.model)
    net.load_state_dict(weights)
    learn.restored = int(epoch)
    return learn.restored


def fit_on_schedule(
    learn, # Made by `resnet_learner`
    epochs:int, # Passes over the training photos; with `resume`, those of the whole run
    resume:bool=False, # Go on from the newest checkpoint; begin where there is none
):
    "Fit on the learner's own schedule: one cycle, or rates that a callback moves"
    begin = learn.fit_one_cycle if learn.one_cycle else learn.fit
    if not resume: return begin(epochs)
    if not learn.one_cycle or not hasattr(learn, 'checkpoint'): return learn.resume(epochs)
    s = learn.checkpoint.find()
    done = len(s['callbacks']['history']['rows']) if s else 0
    if s and (s['epoch'] < s['n_epoch'] or epochs <= done): return learn.resume(epochs)
    if s: learn.resume(done)                                # its cycle is over: another one for the epochs that are left
    begin(epochs - done)


def fine_tune(
    learn, # Made by `resnet_learner`, with weights
    epochs:int, # Passes over the training photos with all layers, after those with the head alone
    freeze_epochs:int=1, # Passes with the head alone (and BN, unless the learner was made with train_bn=False)
    lr:float|None=None, # Of the head; None: what the learner was made with, or ten times the paper's rate for its batches, .1 at most
    lr_mult:float=100, # The head's rate divided by the stem's; the stages lie between
    pct_start:float=.3, # Share of the epochs in which the rate rises
    div:float=5, # The highest rate divided by the first
    resume:bool=False, # Go on from the newest checkpoint; begin where there is none
):
    "Train the head, then all layers with rates that fall towards the stem; each is one cycle, as in fastai's `fine_tune`"
    epochs,freeze_epochs = whole_number('epochs', epochs),whole_number('freeze_epochs', freeze_epochs, 0)
    # as nbs/experiments/fine_tuning.py found
    lr = float(next(v for v in (lr, learn.asked_lr, min(10*np.max(learn.lr), .1)) if v is not None))
    before, at = _where(learn, freeze_epochs, epochs) if resume else (len(learn.history.rows), 'beginning')
    if freeze_epochs and at != 'all layers':
        if at == 'head': learn.resume(before + freeze_epochs)
        else:
            learn.freeze()
            learn.fit_one_cycle(freeze_epochs, slice(lr), pct_start=.99)
    if at == 'all layers': return learn.resume(before + freeze_epochs + epochs)
    learn.unfreeze()
    learn.fit_one_cycle(epochs, slice(lr/2/lr_mult, lr/2), pct_start=pct_start, div=div)


def _where(learn, freeze_epochs, epochs):
    "(epochs before this fine-tuning, the part that a run broke off in)"
    if not hasattr(learn, 'checkpoint'): raise DataError("there is no folder to resume from; make the model with run_folder=…")
    s = learn.checkpoint.find()
    if not s: return len(learn.history.rows), 'beginning'
    start = len(s['callbacks']['history']['rows']) - s['epoch']                 # of the fit that the checkpoint is of
    if not s['frozen_idx'] and s['epoch'] == s['n_epoch'] != epochs:
        raise DataError(f"{learn.checkpoint.folder} holds a fine-tuning that has ended after {s['n_epoch']} epochs of all layers; to "
                        "train on, save "
                        "the model and start from it: weights=FOLDER")
    return (start, 'head') if s['frozen_idx'] else (start - freeze_epochs, 'all layers')
