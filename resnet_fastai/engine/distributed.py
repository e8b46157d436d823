"""Train on several processes as if they were one."""
import torch
import torch.distributed as dist
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.imports import noop
from fastai.learner import Learner
from fastai.torch_core import num_distrib, rank_distrib
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .files import DataError
from .loader import join_processes


class ManyProcesses(Callback):
    "Average gradients over processes; sum up losses, metrics and errors; act as one"
    order = 45                                             # before the Recorder reads its metrics
    def __init__(self): self.net = self.seeded = None

    def before_fit(self):
        if hasattr(self.learn, 'lr_finder'): raise DataError("lr_find runs in one process; start it without torchrun, and train with the rate that it finds")
        self.run,self.net = not hasattr(self.learn, 'lr_finder'),None
        for dl in self.dls.loaders: dl.rng.setstate(self.on_rank0(dl.rng.getstate))
        if not self.seeded: torch.manual_seed(torch.initial_seed() + rank_distrib())     # each process draws its own lighting
        self.seeded = True

    def before_train(self):
        self.net = self.model
        ids = [self.dls.device.index] if self.dls.device.type == 'cuda' else None
        self.learn.model = DistributedDataParallel(self.net, device_ids=ids, broadcast_buffers=False)

    def before_batch(self):
        if self.training: self.model.require_backward_grad_sync = self.accumulate.last

    def after_batch(self):
        "Stop together"
        if self.training and self.between_updates: self.learn.stopping = self.sum(float(self.stopping))[0] > 0

    def after_train(self):
        self.close()
        self.history.wrong,self.history.seen = self.sum(float(self.history.wrong), self.history.seen)

    def close(self):
        "The network without its wrapper, also when a fit broke off"
        if self.net is not None: self.learn.model,self.net = self.net,None

    def before_validate(self):
        for b in self.model.buffers(): dist.broadcast(b, 0)

    def after_validate(self):
        for m in self.recorder._valid_mets:
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
        values = [None]*dist.get_world_size()
        dist.all_gather_object(values, value)
        return values

    def on_rank0(self,
        f, # A function without arguments
    ):
        "What the first process's `f()` returns, or the error it raises, in every process"
        box = [None, None]
        if not rank_distrib():
            try: box[0] = f()
            except DataError as e: box[1] = e
        dist.broadcast_object_list(box)
        if box[1]: raise box[1]
        return box[0]


def distribute(
    learn:Learner, # Made by `resnet_learner`, not yet fitted
    sync_bn:bool=False, # BN over the photos of all processes (GPUs only); False, as in the paper: each over its own
) -> Learner: # The same one
    "Let a learner train together with those of the other processes, if there are any"
    if num_distrib() < 2: return learn
    join_processes()
    if sync_bn:
        if learn.dls.device.type != 'cuda': raise DataError("sync_bn=True needs GPUs; on CPUs BN is each process's own")
        learn.model = nn.SyncBatchNorm.convert_sync_batchnorm(learn.model)
    for dl in learn.dls.loaders: dl.rank,dl.world_size = rank_distrib(),num_distrib()
    if rank_distrib():
        learn.remove_cb(ProgressCallback)
        learn.logger = noop
    learn.add_cb(ManyProcesses())
    return learn
