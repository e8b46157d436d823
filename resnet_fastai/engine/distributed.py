"""Train on several processes as if they were one."""
import torch
import torch.distributed as dist
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.imports import noop
from fastai.learner import Learner, Metric
from fastai.torch_core import num_distrib, rank_distrib, to_detach
from fastcore.foundation import L
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .checkpoint import first_difference, run_identity
from .files import DataError
from .loader import join_processes
from .shared import of_all, on_rank0


class ManyProcesses(Callback):
    "Average gradients over processes; sum up losses, metrics and errors; act as one"
    order = 45                                             # before the Recorder reads its metrics
    def __init__(self): self.net = self.seeded = None

    def before_fit(self):
        if hasattr(self.learn, 'lr_finder'):
            raise DataError("lr_find runs in one process; start it without torchrun, and train with the rate that it finds")
        self.run,self.net = not hasattr(self.learn, 'lr_finder'),None
        if not self.seeded: self.compare()
        self.learn.agreed = False
        for dl in self.dls.loaders: dl.rng.setstate(self.on_rank0(dl.rng.getstate))
        if not self.seeded: torch.manual_seed(torch.initial_seed() + rank_distrib())     # each process draws its own lighting
        self.seeded = True

    def compare(self):
        "Refuse to begin where the processes do not have the same photos, labels, colours and settings"
        first,*others = self.all(run_identity(self.learn))
        for rank,other in enumerate(others, 1):
            if found := first_difference(first, other):
                what,mine,theirs = found
                raise DataError(f"process {rank} has {what}: {theirs}; process 0 has {mine}. "
                                "Every process needs the same folder, the same files in it and the same arguments")

    def before_train(self):
        self.net,device = self.model,next(self.model.parameters()).device
        ids = [device.index] if device.type == 'cuda' else None
        self.learn.model = DistributedDataParallel(self.net, device_ids=ids, broadcast_buffers=False)

    def before_batch(self):
        if self.training: self.model.require_backward_grad_sync = self.accumulate.last

    def after_batch(self):
        "Stop together; keep what a metric needs that is no mean over photos"
        if self.training and self.between_updates: self.agree()
        if not self.training and hasattr(self, 'recorder') and self.odd:
            self.seen.append(to_detach([self.pred, *self.yb, self.loss], gather=False))

    def agree(self):
        "Each process says once whether it has been told to end; what a signal says meanwhile is kept for the next time"
        self.learn.agreed = self.sum(float(self.stopping))[0] > 0
        if self.learn.agreed: self.learn.stopping = True
    def after_fit(self): self.agree()

    def after_train(self):
        if self.net is None: return
        self.close()
        self.history.wrong,self.history.seen = self.sum(float(self.history.wrong), self.history.seen)
        self.sum_metrics(self.recorder._train_mets[1:])
    def after_cancel_epoch(self): self.after_train()

    def close(self):
        "The network without its wrapper, also when a fit broke off"
        if self.net is not None: self.learn.model,self.net = self.net,None

    def before_validate(self):
        for b in self.model.buffers(): dist.broadcast(b, 0)
        if not hasattr(self, 'recorder'): return             # fastai takes it away while it fetches predictions
        odd = lambda m: not hasattr(m, 'total') and type(m).accumulate is not Metric.accumulate
        self.odd,self.seen = [m for m in self.recorder._valid_mets if odd(m)],[]

    def after_validate(self):
        if not hasattr(self, 'recorder'): return
        self.sum_metrics(self.recorder._valid_mets)
        if not self.odd: return
        learn,mine = self.learn,(self.pred, self.yb, self.loss)
        batches = [b for batches in self.all(self.seen) for b in batches]
        for m in self.odd: m.reset()
        for learn.pred,*learn.yb,learn.loss in batches:                                # what the others have seen too
            for m in self.odd: m.accumulate(learn)
        learn.pred,learn.yb,learn.loss = mine

    def after_epoch(self):
        "What was measured is the same everywhere, and so is what is decided"
        if hasattr(self, 'recorder'): self.recorder.log = L(self.on_rank0(lambda: list(self.recorder.log)))

    def sum_metrics(self, metrics):
        for m in metrics:
            if hasattr(m, 'total'): m.total,m.count = self.sum(float(m.total), m.count)

    def sum(self,
        *values:float, # One or more numbers
    ) -> list: # Of float
        "Sums over all processes"
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def all(self,
        value, # Anything that can be pickled
    ) -> list: # One a process
        "What each process has"
        return of_all(value, patient=False)

    def on_rank0(self,
        f, # A function without arguments
    ):
        "What the first process's `f()` returns, or the error it raises, in every process"
        return on_rank0(f, patient=False)


def distribute(
    learn:Learner, # Made by `resnet_learner`, not yet fitted
    sync_bn:bool=False, # BN over the photos of all processes (GPUs only); False, as in the paper: each over its own
) -> Learner: # The same one
    "Let a learner train together with those of the other processes, if there are any"
    if num_distrib() < 2: return learn
    join_processes()
    if sync_bn:
        if torch.device(learn.dls.device).type != 'cuda': raise DataError("sync_bn=True needs GPUs; on CPUs BN is each process's own")
        learn.model = nn.SyncBatchNorm.convert_sync_batchnorm(learn.model)
    if not hasattr(learn.dls.train, 'photos_in'):
        raise DataError("several processes need loaders of resnet_dls, which give each its share of the photos")
    for dl in learn.dls.loaders: dl.rank,dl.world_size = rank_distrib(),num_distrib()
    learn.dls.train.update = learn.accumulate.bs
    learn.dls.train.photos_in()                            # an update that is too small shows now
    if rank_distrib():
        learn.remove_cb(ProgressCallback)
        learn.logger = noop
    learn.add_cb(ManyProcesses())
    return learn
