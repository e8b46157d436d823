"""Checkpoints from which a run goes on to the same weights, to the bit."""
import errno
import hashlib
import io
import os
import pickle
import random
import signal
import socket
import threading
import time
import zipfile
from contextlib import contextmanager, suppress
from functools import partial, wraps
from inspect import signature
from pathlib import Path

import numpy as np
import torch
from fastai.callback.core import (
    Callback, CancelBackwardException, CancelEpochException, CancelFitException, CancelStepException, CancelTrainException,
    CancelValidException)
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import ParamScheduler
from fastai.callback.tracker import TrackerCallback
from fastai.learner import Learner
from fastai.torch_core import num_distrib, rank_distrib
from fastcore.foundation import L
from torch import nn

from .arguments import whole_number
from .calibration import outdated
from .files import DataError, atomic_write, sync_folder
from .finite import _what_stands, LossError
from .foreach import foreach_step, release_grads
from .lock import lock_folder, unlock_folder
from .precision import Precision


def _pack(state):
    version,ints,gauss = state
    return [version, torch.tensor(ints), gauss]


def _unpack(state):
    version,ints,gauss = state
    return version, tuple(ints.tolist()), gauss


def get_rng(
    dls=(), # Loaders; those of fastai have a generator each
) -> dict: # Of tensors, numbers and strings
    "The state of every random generator"
    kind,keys,*rest = np.random.get_state()
    return dict(python=_pack(random.getstate()), numpy=[kind, torch.tensor(keys.tolist()), *rest], torch=torch.get_rng_state(),
                cuda=torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
                loaders=[_pack(dl.rng.getstate()) for dl in dls])


def set_rng(
    state:dict, # What `get_rng` gave
    dls=(), # The loaders, in the same order
):
    "Put every random generator back"
    kind,keys,*rest = state['numpy']
    random.setstate(_unpack(state['python']))
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state['torch'])
    if len(state['cuda']) == torch.cuda.device_count(): torch.cuda.set_rng_state_all(state['cuda'])
    for dl,s in zip(dls, state['loaders']): dl.rng.setstate(_unpack(s))


def batches_from(
    dl, # A fastai loader
    k:int, # The first batch wanted
    start:dict, # `get_rng([dl])` when the epoch began
    now:dict, # `get_rng([dl, …])` when batch k was next
    dls=(), # The loaders of `now`
): # Yields (number, batch)
    "An epoch's batches from number k on, as they would have come"
    def rest():
        del dl.get_idxs                                    # once; and worker processes get a loader without this
        order = dl.get_idxs()
        if not hasattr(dl, 'shares'): return order[k*dl.bs:]                   # no `PhotoDL`
        done,dl.shares = sum(dl.shares[:k]),dl.shares[k:]
        return order[done:]
    set_rng(now, dls)
    dl.rng.setstate(_unpack(start['loaders'][0]))
    dl.get_idxs,dl.fake_l.generator = rest,torch.Generator()
    dl.fake_l.generator.set_state(start['torch'])          # the workers' seeds come from here, and leave the others alone
    try: yield from enumerate(dl, k)
    finally: dl.fake_l.generator = None


_cancels = CancelTrainException, CancelValidException, CancelEpochException, CancelFitException     # each ends more than the one before


def _number(lr): return lr.item() if isinstance(lr, (np.generic, torch.Tensor)) and not lr.ndim else lr


def _schedules(cbs): return [cb for cb in cbs if isinstance(cb, ParamScheduler)]


def _curves(cbs):
    "{hyper-parameter: its values, one a parameter group, at 17 places of a fit}"
    return {name: [np.ravel(f(i/16)).tolist() for i in range(17)] for cb in _schedules(cbs) for name,f in cb.scheds.items()}


def _remembered(
    f, # One of fastai's ways to fit on a schedule
    rate:str, # The name of its learning rate
): # The same, and the learner has `call` while it runs
    "A way to fit that a run which broke off inside can take again"
    @wraps(f)
    def fit(self, *args, **kwargs):
        given = signature(f).bind(self, *args, **kwargs).arguments
        cbs = given.pop('cbs', None) if given.pop('self') is self else None
        if self.opt is None: self.create_opt()
        self.opt.set_hyper('lr', _number(self.lr if given.get(rate) is None else given[rate]))
        given[rate] = [float(h['lr']) for h in self.opt.hypers]
        self.call = [f.__name__, given]
        try: f(self, **given, cbs=cbs)
        finally: self.call = None
    return fit


class ResumableLearner(Learner):
    "A `Learner` whose fit can begin in the middle, and which ends its update before it obeys Ctrl-C"
    first_epoch,rest,stopping,decay,spec,call = 0,None,False,'weights',None,None
    weights,restored,protocol,one_cycle = None,None,'50crop',False        # what it began with, the epoch it went back to, how it predicts
    asked_lr = None                                        # the rate that it was made with; None: the paper's
    agreed = None                                          # do all processes end now? None: there is only this one

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.initial_lr = _number(self.lr)

    def _call_one(self, event_name):
        "What a batch or an epoch has done, every callback hears, also where one of them ends the fit"
        if event_name not in ('after_batch', 'after_epoch'): return super()._call_one(event_name)
        raised = []
        for cb in self.cbs.sorted('order'):
            try: cb(event_name)
            except _cancels as e: raised.append(e)
        if raised: raise max(raised, key=lambda e: _cancels.index(type(e)))

    def _do_fit(self):
        first,self.first_epoch = self.first_epoch,0
        for epoch in range(first, self.n_epoch):
            self.epoch = epoch
            self._with_events(self._do_epoch, 'epoch', CancelEpochException)

    def all_batches(self):
        rest,self.rest = self.rest,None
        if rest is None or not self.training: return super().all_batches()
        self.n_iter = len(self.dl)
        for i,b in rest(): self.one_batch(i, b)

    def one_batch(self, i, b):
        super().one_batch(i, b)
        if self.ends_now: raise CancelFitException()

    @property
    def ends_now(self):
        "Does the fit end here? A signal that comes after the processes have agreed counts after the next update"
        return (self.stopping if self.agreed is None else self.agreed) and self.between_updates

    @property
    def between_updates(self):
        "Are the gradients empty?"
        return not (hasattr(self, 'accumulate') and self.accumulate.count)

    def _do_one_batch(self):
        "fastai's, but that the forward pass may be in 16 bits"
        self.pred = self.precision.forward(self.model, *self.xb) if hasattr(self, 'precision') else self.model(*self.xb)
        self('after_pred')
        if len(self.yb):
            self.loss_grad = self.loss_func(self.pred, *self.yb)
            self.loss = self.loss_grad.clone()
        self('after_loss')
        if self.training and len(self.yb): self._do_grad_opt()

    def _step(self): foreach_step(self.opt)
    def _release(self): release_grads(self.opt)

    def _do_grad_opt(self):
        "fastai's, with a quick step, and gradients that are given back in the place of set to zero"
        self._with_events(self._backward, 'backward', CancelBackwardException)
        self._with_events(self._step, 'step', CancelStepException)
        self._release()

    def add_cb(self, cb):
        "In the place of fastai's `MixedPrecision` comes `Precision`: `to_fp16` and `to_bf16` work on any device, and with accumulation"
        cb = cb() if isinstance(cb, type) else cb
        if isinstance(cb, MixedPrecision): cb = Precision(cb.amp_mode.value, **cb.kwargs)
        if isinstance(cb, Precision) and hasattr(self, 'precision'):
            cb.channels_last = cb.channels_last or self.precision.channels_last
            self.remove_cb(self.precision)
            if self.spec: self.spec = dict(self.spec, precision=cb.kind)
            if self.spec and cb.kind == 'fp32': del self.spec['precision']
        return super().add_cb(cb)

    def to_fp32(self): return self.add_cb(Precision('fp32'))

    def create_opt(self):
        self.lr = _number(self.lr)
        super().create_opt()
        if self.decay == 'conv_fc':
            for p in self._bn_bias_state(False): p['do_wd'] = False

    def fit(self, n_epoch, lr=None, wd=None, cbs=None, reset_opt=False, start_epoch=0):
        if self.opt is None: self.create_opt()
        self.lr,own = _number(self.lr),[dict(h) for h in self.opt.hypers]
        try:
            with graceful_interrupt(self):
                super().fit(n_epoch, lr=_number(lr), wd=wd, cbs=cbs, reset_opt=reset_opt, start_epoch=start_epoch)
        except DataError as e:
            if not str(e).startswith('Exception occured in `'): raise
            raise type(e)(str(e).partition(':\n\t')[2]) from None                # fastai says first in which callback
        finally:
            for cb in L(cbs) + self.cbs:
                if hasattr(type(cb), 'close'): cb.close()
            for name in {name for cb in _schedules(L(cbs) + self.cbs) for name in cb.scheds} - {'lr'}:        # a schedule's last momentum
                self.opt.set_hyper(name, [h[name] for h in own])

    fit_one_cycle = _remembered(Learner.fit_one_cycle, 'lr_max')
    fit_flat_cos = _remembered(Learner.fit_flat_cos, 'lr')
    fit_sgdr = _remembered(Learner.fit_sgdr, 'lr_max')

    def to_detach(self, b, cpu=True, gather=True):
        return super().to_detach(b, cpu, gather and not hasattr(self, 'many_processes'))      # whose metrics are summed at the end

    def resume(self,
        epochs:int, # Of the whole run
        cbs=None, # fastai callbacks for the rest, among them the `ParamScheduler` that was given to `fit`, if there was one
    ):
        "Go on with the run in the checkpoint's folder, on its schedule, until it has had `epochs` epochs; begin it where there is none"
        if not hasattr(self, 'checkpoint'): raise DataError("there is no folder to resume from; give the learner a Checkpoint(folder)")
        s = self.checkpoint.find()
        earlier = len(s['callbacks']['history']['rows']) - s['epoch'] if s else len(self.history.rows)     # epochs of fits before this one
        if s and s['schedule'] and s['epoch'] < s['n_epoch']: return self._finish(s, earlier, epochs, cbs)
        if epochs - earlier > (s['epoch'] if s else 0): return self.fit(epochs - earlier, cbs=cbs)
        with self.no_bar(), self.no_logging(): self.fit(0, cbs=cbs)         # nothing is left to train

    def _finish(self, s, earlier, epochs, cbs):
        "The rest of a fit on a schedule"
        (name,args),end = s['call'] or ['fit', dict(n_epoch=s['n_epoch'])],earlier + s['n_epoch']
        why = ''
        if epochs != end: why = f"whose schedule ends when the run has had {end} epochs, not {epochs}; resume({end}), and fit on afterwards"
        elif name == 'fit' and _plain(_curves(L(cbs) + self.cbs)) != s['schedule']:
            why = f"on a schedule of {' and '.join(s['schedule'])}; pass the same ParamScheduler once more: resume({end}, cbs=…)"
        if not why and name in ('fit', 'fit_one_cycle', 'fit_flat_cos', 'fit_sgdr'): return getattr(self, name)(**args, cbs=cbs)
        self.checkpoint.state = None
        raise DataError(f"{self.checkpoint.folder} holds a run that broke off in {name} of {s['n_epoch']} epochs, {why}")


@contextmanager
def graceful_interrupt(learn):
    "A first Ctrl-C, or SIGTERM, sets `learn.stopping`; a second Ctrl-C is obeyed at once"
    if threading.current_thread() is not threading.main_thread(): return (yield)
    me,asked = os.getpid(),[]
    def stop(signum, _):
        if os.getpid() != me: return                       # a worker process, which the terminal interrupts too
        if signum == signal.SIGINT and asked and time.monotonic() - asked[0][0] > 1: raise KeyboardInterrupt     # a launcher passes it on
        if not asked and not rank_distrib(): print('stopping after this update; Ctrl-C once more stops at once', flush=True)
        asked.append((time.monotonic(), signum))
        learn.stopping = True
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    old = {s: signal.signal(s, stop) for s,h in usual.items() if signal.getsignal(s) is h}
    try: yield
    except RuntimeError:                                   # workers that have obeyed
        if not learn.stopping: raise
    finally:
        for s,h in old.items(): signal.signal(s, h)
        stopped,learn.stopping,learn.agreed = learn.stopping,False,None
    if not stopped: return
    advice = learn.checkpoint.advice() if hasattr(learn, 'checkpoint') else 'the learner can be used, and fitted on'
    if asked and all(s == signal.SIGTERM for _,s in asked):
        print(advice, flush=True)
        signal.raise_signal(signal.SIGTERM)
    raise KeyboardInterrupt(advice)


def describe(
    learn:ResumableLearner, # Just made
    spec:dict, # How to build its network: arch, stride_at, …
    decay:str, # 'weights', 'conv_fc' or 'all'
    started:dict|None, # Where its weights come from; None: drawn anew
    one_cycle:bool, # Does `fit` train by one cycle?
    asked_lr:float|None, # The rate that the user gave
) -> ResumableLearner: # The same
    "Write down what checkpoints and saved models need to know about a learner"
    learn.decay,learn.weights,learn.one_cycle,learn.asked_lr = decay,started,one_cycle,asked_lr
    if (kind := learn.precision.kind) != 'fp32': spec = spec | dict(precision=kind)
    learn.spec = spec | (dict(weights=started['sha256']) if started else {})
    learn.dls.taken = True                                  # whose mean must stay
    return learn


def run_identity(
    learn:Learner, # Made by `resnet_learner`
) -> dict: # Of numbers, strings, lists and dicts
    "What must be the same for a run to go on, or for processes to train together"
    dls,photos,labels = learn.dls,getattr(learn.dls, 'photos', {}),getattr(learn.dls, 'labels', None)
    encoding,stats = dict(getattr(labels, 'encoding', {})),getattr(dls, 'stats', None)
    return _plain(dict(
        network=str(learn.spec or type(learn.model).__name__), weights={k: list(v.shape) for k,v in _net(learn).state_dict().items()},
        encoding=encoding, size=getattr(dls, 'size', None), photos=[len(dls.train_ds), _names(photos.get('train', dls.train))],
        labels=_labels(photos.get('train'), encoding), colours=_rounded(stats.as_dict()) if hasattr(stats, 'as_dict') else {},
        validation=[len(dls.valid_ds), _names(photos.get('val', dls.valid)), _labels(photos.get('val'), encoding)],
        augmentation={type(t).__name__: _settings(t) for part in ('after_item', 'after_batch')
                      for t in getattr(getattr(dls.train, part, None), 'fs', ())},
        batches=[learn.accumulate.bs if hasattr(learn, 'accumulate') else dls.train.bs, dls.train.bs],
        rate=learn.initial_lr, optimizer=_function(learn.opt_func), decay=[learn.decay, bool(learn.wd_bn_bias), learn.wd],
        loss=_function(_own_loss(learn)), callbacks={cb.name: _settings(cb) for cb in learn.cbs if _trains(cb)},
        processes=max(num_distrib(), 1)))


def _digest(data): return hashlib.sha256(data).hexdigest()


def _names(photos):
    items = getattr(photos, 'names', getattr(photos, 'items', ()))          # of a `PhotoList`, or of a loader
    if isinstance(items, np.ndarray): return _digest(b'\n'.join(items.tolist())) if items.dtype.kind == 'S' else ''
    if not len(items) or not isinstance(items[0], (str, Path)): return ''
    return _digest('\n'.join(map(str, items)).encode('utf-8', 'surrogateescape'))


def _labels(photos, encoding):
    if photos is None or not photos.vocab: return ''
    return _digest(np.array([encoding[label] for label in photos.vocab], np.int64)[photos.codes].tobytes())


# machines differ in the last bits
def _rounded(o): return {k: _rounded(v) for k,v in o.items()} if isinstance(o, dict) else np.round(o, 7).tolist()


def _is_plain(v):
    return type(v) in (bool, int, float, str) or isinstance(v, np.generic) or type(v) in (list, tuple) and all(map(_is_plain, v))


def _settings(o):
    "The arguments that an object was made with, as far as they are numbers and names that it has kept"
    return {k: getattr(o, k) for k in signature(type(o).__init__).parameters if _is_plain(getattr(o, k, None))}


def _function(f):
    "A loss or an optimizer by its name and what it was given"
    given, f = getattr(f, 'keywords', {}), getattr(f, 'func', f)             # of a `partial`; a loss of fastai's has PyTorch's in `func`
    name = getattr(f, '__name__', type(f).__name__)
    given = _unusual(f) | given if not hasattr(f, '__name__') else given
    return f"{name}({', '.join(f'{k}={said}' for k,v in sorted(given.items()) if (said := _in_words(v)) is not None)})"


def _unusual(o):
    "The arguments that an object was made with and has kept, but for its defaults; the reduction comes and goes while it is used"
    known = ((k, p.default, getattr(o, k, p.default)) for k,p in signature(type(o).__init__).parameters.items() if k != 'reduction')
    return {k: v for k,usual,v in known if not (v is usual or _is_plain(v) and v == usual)}


def _in_words(v):
    "What tells one argument from another; None where nothing does"
    if _is_plain(v): return v
    if torch.is_tensor(v): return _digest(np.round(v.detach().cpu().double().numpy(), 6).tobytes())[:12]
    return v.__name__ if hasattr(v, '__name__') else _function(v) if isinstance(v, nn.Module) else None


def _own_loss(learn):
    "The loss function, without what fastai's MixUp puts in its place while it trains"
    return next((cb.old_lf for cb in learn.cbs if hasattr(cb, 'old_lf') and learn.loss_func == cb.lf), learn.loss_func)


def _trains(cb):
    "Does a callback decide what an update is?"
    return getattr(cb, 'part_of_run', False) or any(c.__module__ in ('fastai.callback.training', 'fastai.callback.mixup')
                                                    for c in type(cb).__mro__)


_unlike = dict(processes='another number of processes', network='another network', weights='a network with other weights',
               encoding='another label encoding', size='another crop size', photos='other training photos',
               labels='other labels of the training photos', colours='other colour statistics',
               validation='other validation photos or labels', augmentation='another augmentation', batches='batches of another size',
               rate='another learning rate', optimizer='another optimizer', decay='another weight decay', loss='another loss function',
               callbacks='other callbacks')


def first_difference(
    a:dict, b:dict, # Two `run_identity`s
) -> tuple|None: # (what b has, that of a, that of b); None where they are the same
    "In what two runs differ, in words"
    for key,what in _unlike.items():
        if a[key] != b[key]: return what, *(f'{v!s:.80}' for v in _inmost(a[key], b[key]))


def _inmost(a, b, at=''):
    if not (isinstance(a, dict) and isinstance(b, dict)): return at + str(a), at + str(b)
    one = next(k for k in [*a, *b] if a.get(k) != b.get(k))
    return _inmost(a.get(one), b.get(one), f'{at}{one!r}: ')


def _refuse_strangers(path, theirs, ours):
    if found := first_difference(ours | dict(processes=theirs['processes']), theirs):     # another number of them can go on
        what,mine,other = found
        raise DataError(f"{path} belongs to a run with {what}: it has {other}, you have {mine}; nothing was changed. "
                        "Resume with the same arguments, or name another folder")


class Checkpoint(Callback):
    "Keep a run in a folder: checkpoints from which it goes on exactly, the best weights, and history.csv"
    # after all others; not while `FetchPredsCallback` looks at the validation set
    locked,order,remove_on_fetch = False,100,True
    state_attrs = ('best', 'batches', 'updates')
    def __init__(self,
        folder:str|Path, # Made if need be; one for each run
        every:str|int='epoch', # 'epoch', or after so many updates (and epochs)
        keep:int|None=2, # So many of the newest stay, and the best; None: all
        monitor:str='valid_loss', # What makes the best one: a column of the history; smaller is better
    ):
        if not isinstance(folder, (str, os.PathLike)): raise DataError(f"the folder of a run is {folder!r:.80}; name it: 'runs/flowers'")
        if every != 'epoch': every = whole_number('every', every, why="if not 'epoch' ")
        if keep is not None: keep = whole_number('keep', keep, why='if not None ')
        self.folder,self.every,self.keep,self.monitor = Path(folder),every,keep,monitor
        self.best,self.batches,self.updates,self.mine,self.state = float('inf'),0,0,False,None
        self.identity = self.last = None                    # what makes the run; the newest file that we know of

    def files(self): return sorted(self.folder.glob('checkpoint-*.pt'))
    def newest(self): return next(iter(self.files()[::-1]), None)
    def advice(self): return f"stopped; {self.newest()} holds the run; go on with fit(epochs, resume=True), or learn.resume(epochs)"

    def before_fit(self):
        self.run,self.trained,self.at_train,self.at_valid = not hasattr(self.learn, 'lr_finder'),False,None,None
        if self.run and self.state: self.restore()

    def before_epoch(self): self.trained = False

    def before_train(self):
        self.claim()
        self.trained,self.at_valid,self.batch = True,None,0
        if not self.rest: self.at_train = get_rng([self.dls.train])
        else: self.at_train = self.resumed_at_train

    def before_validate(self):
        if self.trained: self.at_valid = get_rng(self.dls.loaders)

    def after_batch(self):
        if not (self.trained and self.training): return
        self.batch,self.batches = self.iter+1,self.batches+1
        if not self.between_updates: return
        self.updates += 1
        if self.every != 'epoch' and self.updates % self.every == 0: self.save(self.epoch, self.batch)

    def after_epoch(self):
        if not self.trained: return
        if better := self.history.rows[-1][self.monitor] < self.best: self.best = self.history.rows[-1][self.monitor]
        self.trained,self.at_valid = False,None
        self.save(self.epoch+1, 0, better)
        self.write_history()

    def after_cancel_fit(self):
        if self.trained and self.between_updates: self.save(self.epoch, self.batch)

    def gather(self,
        epoch:int, # Of this fit: the one that is under way, or the next one
        batch:int, # The next one in it
    ) -> dict: # Of tensors, numbers, strings, lists and dicts
        "Everything that the rest of the run depends on"
        learn,rec,hist = self.learn,self.recorder,self.history
        return dict(
            format=2, run=self.identity, epoch=epoch, batch=batch, train_iter=self.train_iter, pct_train=self.pct_train,
            n_epoch=self.n_epoch, call=learn.call, schedule=_curves(learn.cbs),
            hps={k: torch.tensor(v, dtype=torch.float64) for cb in _schedules(learn.cbs) for k,v in cb.hps.items()},
            model=_net(learn).state_dict(), opt=_opt_state(self.opt), lr=learn.lr, hypers=[dict(h) for h in self.opt.hypers],
            frozen_idx=self.opt.frozen_idx,
            scaler=scaler.state_dict() if (scaler := getattr(learn, 'scaler', None)) else None, ranks=self.of_ranks(batch),
            position=sum(self.dls.train.photos_in()[:batch]) if hasattr(self.dls.train, 'photos_in') else None,     # in the epoch's order
            recorder=dict(lrs=torch.tensor(rec.lrs, dtype=torch.float64), iters=list(rec.iters), values=[list(v) for v in rec.values],
                          losses=torch.stack(rec.losses) if rec.losses else torch.zeros(0),
                          smooth=[rec.smooth_loss.count, rec.smooth_loss.val]),
            kept=[len(hist.kept[n]) for n in hist.lists] if hist.kept else None, smooth=list(hist.smooth) if hist.kept else None,
            elapsed=time.perf_counter() - hist.start,
            callbacks={cb.name: {a: getattr(cb, a) for a in names} for cb in learn.cbs if (names := _state_of(cb))})

    def of_ranks(self, batch) -> list: # Of dicts, one a process
        "What each process has for itself: its generators, and how many of its photos were wrong"
        sums = [[m.total, m.count] for m in self.recorder._train_mets[1:] if batch]
        own = _plain(dict(rng=self.at_valid or get_rng(self.dls.loaders), at_train=self.at_train,
                          counts=dict(wrong=int(self.history.wrong), seen=self.history.seen, sums=sums)))
        return self.many_processes.all(own) if hasattr(self, 'many_processes') else [own]

    def claim(self):
        "Make the folder, try to write in it; refuse one that holds another run"
        if self.monitor not in (names := [*self.recorder.metric_names[1:-1], 'train_error']):
            raise DataError(f"Checkpoint monitors {self.monitor!r}; there is {', '.join(names)}")
        if not isinstance(self.learn, ResumableLearner) or not hasattr(self, 'history') or not hasattr(self.dls.train, 'get_idxs'):
            raise DataError("Checkpoint needs a learner of resnet_learner, with a fastai loader of photos")
        if not self.mine: self.identity = run_identity(self.learn)
        _on_rank0(self.learn, self._take)
        self.mine = True

    def _take(self):
        "Keep others out until the fit ends, and see to it that nobody was there in the meantime"
        if self.locked: return
        if not self.mine: self._make()
        with self._plainly(): lock_folder(self.folder)
        self.locked,new,last = True,self.newest(),self.last
        if not new or last and new.name <= last.name: return
        unlock_folder(self.folder)
        self.locked = False
        raise DataError(f"another run has gone on in {self.folder}, up to {new.name}; go on with it by learn.resume(epochs), or name "
                        "another folder")

    def close(self):
        "Let others write in the folder, when a fit has ended"
        if self.locked:
            self.last,self.locked = self.newest(),False
            unlock_folder(self.folder)

    def _make(self):
        if self.newest():
            raise DataError(f"{self.folder} holds a run already, up to {self.newest().name}; go on with it by fit(epochs, resume=True) "
                            "or learn.resume(epochs), or name another folder")
        with self._plainly():
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.folder/'.probe') as part: part.write_bytes(b'')
            (self.folder/'.probe').unlink()

    @contextmanager
    def _plainly(self):
        try: yield
        except OSError as e:
            stands = f"the last whole one stands: {self.newest()}" if self.newest() else "there is none yet"
            advice = 'Make room' if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else 'Make the folder writable, or name another'
            raise DataError(f"no checkpoint can be written in {self.folder}: {e.strerror or e}; {stands}. {advice}, and resume") from None

    def save(self,
        epoch:int, # Of this fit: the one that is under way, or the next one
        batch:int, # The next one in it
        best:bool=False, # Is it the best so far?
    ):
        "Write a checkpoint; a `DataError` where that fails, a `LossError` where the weights are no numbers"
        if hasattr(self.learn, 'cuda_graph'): self.learn.cuda_graph.flush()     # its losses are logged on the device
        if not all(torch.isfinite(v).all() for v in _net(self.learn).state_dict().values()):
            lr = self.opt.hypers[-1]['lr']
            raise LossError(f"the weights are no numbers any more after epoch {epoch}, batch {batch}, at the rate {lr:.4g}. "
                            f"Try a smaller one, or WarmUp() for the start. {_what_stands(self)}")
        state = self.gather(epoch, batch)                       # all processes take part; one writes
        if rank_distrib(): return
        file,data = self.folder/f'checkpoint-{self.batches:09}-{"batch" if batch else "epoch"}.pt',io.BytesIO()
        torch.save(_plain(state), data)
        with self._plainly():
            for left in self.folder.glob('.*.pt.*'): left.unlink(missing_ok=True)       # of a run that was killed as it wrote
            if best: _write_through(self.folder/'best.pt', data.getbuffer())
            _write_through(file, data.getbuffer())
            for old in self.files()[:-self.keep] if self.keep else []: old.unlink(missing_ok=True)

    def write_history(self):
        "history.csv: a line an epoch"
        if rank_distrib(): return
        path,df = self.folder/'history.csv',self.history.df
        with self._plainly():
            if len(df) == 1 or {*self.history.rows[-1]} != {*self.history.rows[0]} or not path.exists():
                _write_through(path, df.to_csv(index=False).encode())
            else:
                with open(path, 'ab') as f: f.write(df[-1:].to_csv(index=False, header=False).encode()); f.flush(); os.fsync(f.fileno())

    def find(self) -> dict|None: # The state; None where the folder has none
        "Read the newest whole checkpoint of the folder, if it is of this run; the next fit begins there"
        self.identity = run_identity(self.learn)
        self.state = _on_rank0(self.learn, self._newest_whole)
        return self.state

    def _newest_whole(self):
        said,self.last = [],self.newest()
        for path in self.files()[::-1]:
            try: state = read_checkpoint(path)
            except DataError as e: said.append(str(e)); continue
            try: _refuse_strangers(path, state['run'], self.identity)
            except KeyError as e: raise DataError(f"{path} is no whole checkpoint: it lacks {e}") from None
            if state['batch'] and len(state['ranks']) != max(num_distrib(), 1) and state.get('position') is None:
                raise DataError(f"{path} does not say which photos it has seen; go on with {len(state['ranks'])} processes, as before")
            for own in state['ranks']: own['counts'].setdefault('sums', state['recorder'].get('sums', []))     # where older files have them
            if said: print(*said, f'going on from {path.name}', sep='\n')
            return state | dict(file=path.name)
        if said: raise DataError(f"{said[0]}; no other one in {self.folder} is whole: name another folder to begin anew")

    def restore(self):
        "Put the learner where it was; the batches of a broken epoch come from `ResumableLearner.rest`"
        s,self.state,self.mine,learn = self.state,None,True,self.learn
        _on_rank0(learn, self._take)
        s |= share_of(s['ranks'], rank_distrib(), max(num_distrib(), 1))
        learn.model.load_state_dict(s['model'])
        own,self.opt.frozen_idx = [dict(h) for h in self.opt.hypers],s['frozen_idx']
        _set_opt_state(self.opt, s['opt'], s['hypers'])
        learn.lr,learn.train_iter,learn.first_epoch = s['lr'],s['train_iter'],s['epoch']
        learn.restored,learn.trust = None,outdated(getattr(learn, 'trust', {}))
        if s['scaler']: learn.scaler.load_state_dict(s['scaler'])
        for name in s['schedule'] if s['epoch'] == s['n_epoch'] else ():                # it is over
            self.opt.set_hyper(name, learn.lr if name == 'lr' else [h[name] for h in own])
        for cb in _schedules(learn.cbs): cb.hps |= {k: v.tolist() for k,v in s['hps'].items() if k in cb.hps}
        self._restore_callbacks(s)
        self._restore_records(s['recorder'], s['kept'], s['smooth'])
        set_rng(s['rng'], self.dls.loaders)
        if getattr(learn, 'progress', None) and hasattr(learn.progress, 'mbar'): learn.progress.mbar.update(0)       # it begins with 0 only
        if s['batch']: learn.rest = partial(self.catch_up, s)
        self.resumed_at_train = s['at_train']
        if not rank_distrib(): self._note(s)
        if self.history.rows and not rank_distrib(): _write_through(self.folder/'history.csv', self.history.df.to_csv(index=False).encode())

    def _note(self, s):
        "A line in resumes.csv: when, from where, on how many processes; best effort"
        path,row = self.folder/'resumes.csv',dict(
            time=time.strftime('%Y-%m-%d %H:%M:%S'), checkpoint=s['file'], epochs=len(s['callbacks']['history']['rows']),
            photos=(s.get('position') or 0) if s['batch'] else 0, processes=max(num_distrib(), 1),
            before=len(s['ranks']), host=socket.gethostname())
        with suppress(OSError), open(path, 'a', encoding='utf-8') as f:
            f.write(''.join(','.join(map(str, line)) + '\n' for line in ([row] if not f.tell() else []) + [row.values()]))

    def _restore_callbacks(self, s):
        for cb in self.learn.cbs:
            for name,value in s['callbacks'].get(cb.name, {}).items(): setattr(cb, name, value)

    def _restore_records(self, r, kept, smooth):
        rec,hist = self.recorder,self.history
        rec.lrs,rec.iters,rec.losses,rec.values = r['lrs'].tolist(),list(r['iters']),list(r['losses'].unbind()),[L(v) for v in r['values']]
        rec.smooth_loss.count,rec.smooth_loss.val = r['smooth']
        hist.kept,hist.smooth = {name: getattr(rec, name)[:n] for name,n in zip(hist.lists, kept)} if kept else None,smooth

    def catch_up(self, s):
        "What the beginning of the epoch has reset, once more; then the batches that are left"
        learn,learn.pct_train,self.batch = self.learn,s['pct_train'],s['batch']
        if len(s['ranks']) != max(num_distrib(), 1): self._move(s['position'])
        self._restore_callbacks(s)
        self.history.wrong,self.history.seen = s['counts']['wrong'],s['counts']['seen']
        for m,(total,count) in zip(self.recorder._train_mets[1:], s['counts']['sums']): m.total,m.count = total,count
        self.history.start = time.perf_counter() - s['elapsed']
        return batches_from(self.dls.train, self.batch, s['at_train'], s['rng'], self.dls.loaders)

    def _move(self, position):
        "Begin with the first update of photos that nobody had: another number of processes has other batches"
        learn,ends = self.learn,np.cumsum([0, *self.dls.train.photos_in()]).tolist()
        self.batch = ends.index(position) if position in ends else len(ends) - 1
        learn.pct_train = (learn.epoch + self.batch/learn.n_iter)/learn.n_epoch
        if position not in ends and not rank_distrib():
            print(f"the last {ends[-1] - position} photos of this epoch are left out: they are too few for {self.dls.train.world_size} "
                  "processes")


def share_of(
    ranks:list, # What each process had for itself: `Checkpoint.of_ranks`
    rank:int, # Of this process
    world_size:int, # Processes now
) -> dict: # rng, at_train, counts
    "What a process goes on with; one that was not there before draws numbers that nobody drew"
    if len(ranks) == world_size: return ranks[rank]
    own,(wrong,seen,sums) = dict(ranks[min(rank, len(ranks)-1)]),zip(*(r['counts'].values() for r in ranks))
    total = dict(wrong=sum(wrong), seen=sum(seen), sums=[[sum(v) for v in zip(*m)] for m in zip(*sums)])
    own['counts'] = total if not rank else dict(wrong=0, seen=0, sums=[[0, 0] for _ in total['sums']])     # they are summed over processes
    if rank >= len(ranks):
        torch.set_rng_state(own['rng']['torch'])
        torch.manual_seed(int(torch.randint(1 << 62, ())) + rank)              # of GPUs, too
        own['rng'] = dict(own['rng'], torch=torch.get_rng_state(), cuda=[])
    return own


def _net(learn): return getattr(learn.model, 'module', learn.model)        # inside PyTorch's wrapper for many processes


def _plain(o):
    "The same without classes of fastai's, which `weights_only` would refuse"
    if isinstance(o, dict): return {k: _plain(v) for k,v in o.items()}
    if isinstance(o, (list, tuple, L)): return [_plain(v) for v in o]
    return o.detach().as_subclass(torch.Tensor) if torch.is_tensor(o) else o.item() if isinstance(o, np.generic) else o


def _state_of(cb):
    "The attributes of a callback that a resumed run needs"
    fastais = [a for a in ('best', 'wait', 'new_best') if hasattr(cb, a)] if isinstance(cb, TrackerCallback) else ()
    return getattr(type(cb), 'state_attrs', fastais)


def _opt_state(opt):
    "A list of what the optimiser knows of each tensor, and whether it has a gradient"
    return [dict(opt.state[p], has_grad=p.grad is not None, trains=p.requires_grad) for p,*_ in opt.all_params()]


def _on_rank0(learn, f): return learn.many_processes.on_rank0(f) if hasattr(learn, 'many_processes') else f()


def _write_through(path, data):
    "Put bytes in the place of a file, whole or not at all, even if the power fails"
    with atomic_write(path) as part: part.write_bytes(data)
    sync_folder(path.parent)


def read_checkpoint(
    path:str|Path, # What `Checkpoint` wrote
) -> dict:
    "Read a checkpoint, on the CPU; it runs no code of the file's. A `DataError` where it is none"
    try:
        with zipfile.ZipFile(path) as z: bad = z.testzip()     # torch.load does not look at the sums
        if bad: raise DataError(f"{path} is no whole checkpoint: {bad} in it is damaged")
        state = torch.load(path, map_location='cpu', weights_only=True)
        if state['format'] != 2: raise DataError(f"{path} is of another version of this project: format {state['format']}, not 2")
        return state
    except OSError as e: raise DataError(f"{path} cannot be read: {e.strerror or e}") from None
    except DataError: raise
    except pickle.UnpicklingError:
        raise DataError(f"{path} is no whole checkpoint: it is cut short, or holds more than tensors and numbers") from None
    except (zipfile.BadZipFile, RuntimeError, EOFError, KeyError, TypeError, ValueError, IndexError, AttributeError) as e:
        raise DataError(f"{path} is no whole checkpoint: {type(e).__name__}: {(str(e).splitlines() or [''])[0][:150]}") from None


def _set_opt_state(opt, states, hypers):
    for h,new in zip(opt.hypers, hypers): h.update(new)
    for (p,*_),s in zip(opt.all_params(), states):
        s = {k: v.to(p.device) if torch.is_tensor(v) else v for k,v in s.items()}
        p.grad = torch.zeros_like(p) if s.pop('has_grad') else None
        p.requires_grad_(s.pop('trains'))
        opt.state[p] = s
