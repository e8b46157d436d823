"""Capture an update in a CUDA graph and replay it, so that the kernel launches of a small network cost no time."""
# An update of ResNet-20 is several hundred kernels of a few microseconds each; launched one by one from Python they take far longer than
# they run. `CudaGraph` captures augmentation, forward pass, backward pass and optimizer step of one update, replays them for each batch,
# and captures anew when a hyperparameter changes. Losses and errors are logged on the device and read every `look_every` updates.
#
# What other callbacks do in a batch is either part of the graph or runs beside it; a callback says which in its class attribute `on_graph`:
#
# - `'capture'`: its hooks are work for the device, the same for each batch. They run once, while the graph is captured.
# - `'replay'`: its `before_batch`, `after_step` and `after_batch` are bookkeeping. They run for each update, after it was queued.
# - `'log'`: its method `after_replays(iters, losses, wrong, seen)` gets what was logged since the last look.
#
# Those of fastai and of this folder are in `_roles`. A callback with hooks in the batch and no role makes the learner train without a
# graph, and the reason is printed.

from contextlib import contextmanager

import torch
from fastai.callback.core import Callback, CancelBatchException, CancelFitException, TrainEvalCallback
from fastai.callback.progress import ProgressCallback
from fastai.imports import noop
from fastai.learner import CastToTensor, Learner, Recorder
from fastai.optimizer import Optimizer
from fastai.torch_core import num_distrib, rank_distrib
from fastcore.foundation import L
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .checkpoint import _cancels, Checkpoint
from .finite import FiniteLoss, LossError
from .foreach import release_grads
from .precision import Precision

_roles = {TrainEvalCallback: 'replay', CastToTensor: 'capture', ProgressCallback: 'replay', Recorder: 'log', Precision: 'capture',
          FiniteLoss: 'log', Checkpoint: 'replay'}
_host = 'before_batch', 'after_step', 'after_batch'
_inner = (*_host, 'after_pred', 'after_loss', 'before_backward', 'after_cancel_backward', 'after_backward', 'before_step',
          'after_cancel_step', 'after_cancel_batch')


# --- What captures and replays

class DeviceGraph:
    "A `torch.cuda.CUDAGraph`, captured on a stream of its own"
    needs = 'cuda'
    _streams: dict = {}
    def __init__(self,
        device:torch.device, # A GPU
    ): self.device, self.graph = device, torch.cuda.CUDAGraph()

    @classmethod
    def _stream(cls, device):
        if device not in cls._streams: cls._streams[device] = torch.cuda.Stream(device)
        return cls._streams[device]

    @classmethod
    @contextmanager
    def aside(cls, device):
        "Work on the stream of captures: gradients that were first accumulated on the default stream could not be captured"
        with torch.cuda.device(device):
            now, own = torch.cuda.current_stream(), cls._stream(device)
            own.wait_stream(now)
            with torch.cuda.stream(own): yield
            now.wait_stream(own)

    def capture(self,
        f, # Without arguments; its work must be for the device alone
    ):
        "Record what `f` would do; nothing is computed yet"
        with torch.cuda.device(self.device), \
                torch.cuda.graph(self.graph, stream=self._stream(self.device), capture_error_mode='thread_local'): f()

    def replay(self): self.graph.replay()


class _Recording(TorchDispatchMode):
    "Keep the operations that run inside, their results, and what each tensor held before"
    syncs = {torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero, torch.ops.aten.nonzero, torch.ops.aten.equal}

    def __init__(self):
        super().__init__()
        self.ops, self.before, self.made = [], {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket in self.syncs: raise RuntimeError(f'{func} is not permitted while a graph is captured')
        for t in _tensors((args, kwargs)):
            at = t.untyped_storage().data_ptr()
            if at not in self.made and at not in self.before: self.before[at] = t.untyped_storage(), t.untyped_storage().clone()
        out = func(*args, **(kwargs or {}))
        alias = [r.alias_info for r in func._schema.returns]
        if any(a is not None and not a.is_write for a in alias): return out      # a view: it needs no work
        outs = _tensors(out)
        for t in outs:
            if t.untyped_storage().data_ptr() not in self.before: self.made[t.untyped_storage().data_ptr()] = t
        self.ops.append((func, args, kwargs or {}, [] if any(a is not None for a in alias) else outs))
        return out


def _tensors(tree): return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


class TapeGraph:
    """The same interface on the CPU, for tests and dry runs: a graph that records operations and executes them again on the same memory.

    Like a CUDA graph it computes nothing at capture, keeps every Python number of that moment, and refuses what waits for a result."""
    needs = 'cpu'
    def __init__(self, device=None): self.ops = []

    @classmethod
    @contextmanager
    def aside(cls, device): yield

    def capture(self, f):
        rng, recording = torch.get_rng_state(), _Recording()
        try:
            with recording: f()
        finally:
            for storage, was in recording.before.values(): storage.copy_(was)
            torch.set_rng_state(rng)
        for t in recording.made.values():
            if t.is_floating_point(): t.fill_(float('nan'))
        self.ops = recording.ops

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, outs in self.ops:
            for old, new in zip(outs, _tensors(func(*args, **kwargs))):
                if old.numel(): old.copy_(new)


# --- Can it be?

def _role(cb):
    if hasattr(type(cb), 'on_graph'): return cb.on_graph
    return next((_roles[t] for t in type(cb).__mro__ if t in _roles), None)
def _hooks(cb): return [e for e in _inner if hasattr(type(cb), e) or e in vars(cb)]
def _active(cb): return cb.run and cb.run_train


def _hooked(net):
    "Has any module or parameter a hook? They are Python, which a graph does not replay"
    kinds = '_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks'
    return any(getattr(m, k, None) for m in net.modules() for k in kinds) or any(
        getattr(p, k, None) for p in net.parameters() for k in ('_backward_hooks', '_post_accumulate_grad_hooks'))


def why_not(
    learn:Learner, # Ready to train
    graph=DeviceGraph, # What captures
) -> str|None: # A reason; None where a graph can be used
    "Why the updates of a learner cannot be replayed from a CUDA graph"
    device, bs = next(learn.model.parameters()).device, getattr(learn.dls.train, 'bs', None)
    if device.type != graph.needs: return f"the network is on {device}, and CUDA graphs need a GPU"
    if num_distrib() > 1: return "several processes train together"
    if getattr(learn, 'scaler', None): return "fp16 decides after each backward pass whether its gradients can be used"
    if hasattr(learn, 'accumulate') and bs != learn.accumulate.bs: return f"an update has {learn.accumulate.bs} photos, and a batch {bs}"
    if _hooked(learn.model): return "the network has hooks"
    if learn.recorder.train_metrics: return "the recorder computes metrics of the training batches"
    if not isinstance(learn.opt, Optimizer): return "the optimizer is none of fastai's"
    for cb in learn.cbs:
        hooks = _hooks(cb) if _active(cb) else []
        if hooks and (_role(cb) is None or _role(cb) == 'replay' and set(hooks) - set(_host)):
            return f"{cb} works on each batch ({hooks[0]})"


# --- The loop

class _Updates:
    "The updates of one fit: by the learner itself until all buffers exist, then from the graph"
    def __init__(self, learn, graph, look_every, warm_up):
        self.learn, self.type, self.look_every, self.warm_up = learn, graph, look_every, warm_up
        self.device = next(learn.model.parameters()).device
        self.losses = torch.zeros(look_every, device=self.device)
        self.at, self.wrong = torch.zeros((), dtype=torch.long, device=self.device), torch.zeros((), dtype=torch.long, device=self.device)
        self.graph = self.key = self.failed = None
        self.make, self.pending, self.warm, self.seen, self.replays, self.short, self.count = None, [], 0, 0, 0, 0, learn.cuda_graph.count

    def begin(self):
        "At the start of each epoch"
        self.end()
        learn, self.dl = self.learn, self.learn.dl
        self.make, self.bs = getattr(self.dl, 'make_batch', None), self.dl.bs
        cbs = [cb for cb in learn.cbs.sorted('order') if _active(cb)]
        self.captured = [cb for cb in cbs if _role(cb) == 'capture']
        self.hooks = [getattr(cb, e) for e in _host for cb in cbs if _role(cb) == 'replay' and e in _hooks(cb)]
        self.logs = [cb for cb in cbs if hasattr(type(cb), 'after_replays')]
        if self.graph and self.tensors() != self.known: self.drop()          # somebody has exchanged weights or momentum
        self.own, self.had = learn.one_batch, 'one_batch' in vars(learn)
        learn.one_batch = self.one_batch
        if self.make: self.dl.raw = True

    def end(self):
        "After each epoch, and when a fit breaks off"
        if vars(self.learn).get('one_batch') != self.one_batch: return
        if self.had: self.learn.one_batch = self.own
        else: del self.learn.one_batch
        if self.make: self.dl.raw = False

    def tensors(self):
        "Where weights, momentum and BN's statistics are"
        opt = self.learn.opt
        return [(p.data_ptr(), *[v.data_ptr() for v in s.values() if torch.is_tensor(v)]) for p, _, s, _ in opt.all_params()] \
            + [b.data_ptr() for b in self.learn.model.buffers()]

    def drop(self):
        self.graph = self.key = self.out = None
        for p in self.learn.model.parameters(): p.grad = None                # they live in the graph's memory

    # One batch

    def one_batch(self, i, b):
        learn = self.learn
        learn.iter = i
        b = b if isinstance(b, (tuple, list)) else (b,)
        if self.failed or self.warm < self.warm_up or not self.fits(b): return self.by_itself(i, b)
        key = tuple((t.shape, t.dtype) for t in b), tuple(tuple(h.items()) for h in learn.opt.hypers)
        if key != self.key and not self.capture(key, b): return self.by_itself(i, b)
        for mine, t in zip(self.static, b): mine.copy_(t, non_blocking=True)
        self.graph.replay()
        self.replays += 1
        self.count['replays'] += 1
        self.pending.append((i, learn.opt.hypers[-1]['lr']))
        learn.xb, learn.yb, learn.pred, learn.loss = self.out
        try:
            self.tell()
            if len(self.pending) == self.look_every or i == learn.n_iter-1: self.flush()
        except BaseException:
            self.flush()
            raise
        if getattr(learn, 'ends_now', False):
            self.flush()
            raise CancelFitException()

    def tell(self):
        "All hooks, also where one of them ends the epoch or the fit"
        ends = []
        for hook in self.hooks:
            try: hook()
            except _cancels as e: ends.append(e)
        if ends: raise max(ends, key=lambda e: _cancels.index(type(e)))

    def fits(self, b): return all(torch.is_tensor(t) for t in b) and len(b[-1]) == self.bs and (self.make or len(b) == 2)

    def by_itself(self, i, b):
        "One batch as the learner does it: the first ones, and a last one that is smaller"
        self.flush()
        if self.replays: release_grads(self.learn.opt)                       # a replay leaves its gradients
        self.replays, self.warm, self.known = 0, self.warm+1, self.tensors()
        with self.type.aside(self.device): self.own(i, self.make(*b) if self.make else b)

    # Capture

    def capture(self, key, b):
        "Capture an update with these shapes and hyperparameters; False where that fails"
        learn, self.short = self.learn, self.short+1 if self.graph and self.replays < 5 else 0
        if self.short > 5: return self.give_up("the hyperparameters change with nearly every update")
        if why := self.unfit(): return self.give_up(why)
        self.flush()
        self.drop()
        learn.xb = learn.yb = learn.pred = learn.loss = learn.loss_grad = None   # an old autograd graph would bring its stream along
        torch.clear_autocast_cache()
        self.static = [t.detach().as_subclass(torch.Tensor).to(self.device).clone() for t in b]
        graph = self.type(self.device)
        try:
            with self.stripped(): graph.capture(self.update)
        except RuntimeError as e:
            self.drop()
            return self.give_up(f"it cannot be captured: {(str(e).splitlines() or [''])[0][:200]}")
        self.graph, self.key, self.known, self.replays = graph, key, self.tensors(), 0
        self.count['captures'] += 1
        return True

    def unfit(self):
        "Does the optimizer keep more than tensors that it changes in place? A graph would not"
        kept = {k for *_, s, _ in self.learn.opt.all_params() for k, v in s.items() if not isinstance(v, (torch.Tensor, bool))}
        if kept: return f"the optimizer counts for itself ({', '.join(sorted(kept))})"
        if not self.graph and self.known != self.tensors(): return "the optimizer exchanges its tensors with each update"

    def give_up(self, reason):
        self.failed = reason
        self.learn.cuda_graph.say(reason)
        return False

    @contextmanager
    def stripped(self):
        "A learner whose gradients are made anew, and with those callbacks alone that belong into the graph"
        learn, cbs = self.learn, self.learn.cbs
        learn.cbs, learn._release = L(self.captured), noop
        try: yield
        finally:
            learn.cbs, learn.loss_grad = cbs, None
            del learn._release
            if hasattr(learn, 'accumulate'): learn.accumulate.count = 0

    def update(self):
        "What is captured"
        learn = self.learn
        learn._split(self.make(*self.static) if self.make else tuple(self.static))
        learn._with_events(learn._do_one_batch, 'batch', CancelBatchException)
        pred, loss, y = learn.pred.detach(), learn.loss.detach(), learn.yb[0]
        self.losses.index_copy_(0, self.at[None], loss.float()[None])
        self.at.add_(1)
        self.seen = len(y) if pred.ndim == 2 and not y.is_floating_point() else 0
        if self.seen: self.wrong.add_((pred.argmax(1) != y).sum())
        self.out = learn.xb, learn.yb, pred, loss

    # Bookkeeping

    def flush(self):
        "Read what was logged; let the recorder and others know"
        if not self.pending: return
        learn, (done, self.pending) = self.learn, (self.pending, [])
        losses, wrong = self.losses[:len(done)].cpu(), self.wrong.item()
        self.at.zero_(), self.wrong.zero_()
        bad = self.bad(losses)
        for cb in self.logs: cb.after_replays([i for i, _ in done], losses, wrong, self.seen*len(done))
        rec, last = learn.recorder, learn.loss
        for (_, lr), learn.loss in zip(done[:bad], losses):                  # as `Recorder.after_batch` does
            rec.smooth_loss.accumulate(learn)
            rec.lrs.append(lr)
            rec.losses.append(rec.smooth_loss.value)
            learn.smooth_loss = rec.smooth_loss.value
        learn.loss = last
        if bad is not None: self.stop(done[bad][0], losses[bad])

    def bad(self, losses):
        "The first loss that is no number; None where all are, or nobody minds"
        if not hasattr(self.learn, 'finite_loss') or not self.learn.finite_loss.run: return None
        return next((k for k, good in enumerate(torch.isfinite(losses).tolist()) if not good), None)

    def stop(self, i, loss):
        "What `FiniteLoss` does, some updates later"
        learn = self.learn
        learn.iter, learn.loss, learn.xb = i, loss, ((),)
        raise LossError(learn.finite_loss.say(f'the loss is {loss.item()}'))


class CudaGraph(Callback):
    "Replay updates from a CUDA graph; where that cannot be, train as usual and print the reason"
    order = 101                                                              # after `Checkpoint`: all is ready when an epoch begins
    def __init__(self,
        look_every:int=50, # Updates between two looks at the losses; each look waits for the device
        warm_up:int=3, # Updates of a fit that run without the graph: buffers, libraries and momentum come into being
        graph=DeviceGraph, # What captures; `TapeGraph` on a CPU, to test
    ):
        self.look_every, self.warm_up, self.graph, self.updates, self.reason = look_every, max(warm_up, 2), graph, None, None
        self.count = dict(captures=0, replays=0)                             # over all fits

    def before_fit(self):
        self.run, self.updates = not hasattr(self.learn, 'lr_finder'), None

    def before_train(self):
        if self.updates and self.updates.failed: return
        if reason := why_not(self.learn, self.graph): return self.say(reason)
        if not self.updates: self.updates = _Updates(self.learn, self.graph, self.look_every, self.warm_up)
        self.reason = None
        self.updates.begin()

    def say(self, reason):
        if reason != self.reason and not rank_distrib(): print(f'training without a CUDA graph: {reason}')
        self.reason = reason

    def after_train(self):
        self.flush()
        self.close()

    def flush(self):
        "Bring losses, errors and their records up to the last update; before anything is saved"
        if self.updates: self.updates.flush()

    def close(self):
        "The learner's own loop again, also when a fit broke off"
        if self.updates: self.updates.end()

    def after_fit(self):
        if not self.updates: return
        self.flush(), self.close()
        self.updates.drop()                                                  # its memory; weights and momentum stay
        self.updates = None
