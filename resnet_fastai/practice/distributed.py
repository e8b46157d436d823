"""Train on several GPUs or machines with one command, and get the result of one."""
__all__ = ['GradualWarmUp', 'all_reduce_seconds', 'rate_limits', 'estimate_hours']

from fastai.callback.core import Callback
from fastai.callback.schedule import ParamScheduler
from fastcore.meta import delegates

from ..engine.files import DataError
from ..training import default_lr, RateDrop


class GradualWarmUp(Callback):
    "The rate rises by the same step with each update, from `start` to the learner's own: for large batches"      # Goyal et al. 2017, §2.2
    order,run_valid,part_of_run,state_attrs = 61,False,True,('done',)
    on_graph = 'replay'
    def __init__(self,
        epochs:float=5, # Epochs until the learner's own rate is reached
        start:float=.1, # Rate of the first update; where the learner's own is smaller, that
    ):
        if epochs <= 0 or start < 0:
            raise DataError(f"GradualWarmUp has epochs={epochs!r} and start={start!r}; it needs more than 0 epochs, and no negative rate")
        self.epochs,self.start,self.done = epochs,start,0

    def before_fit(self):
        self.run,self.full,self.others = not hasattr(self.learn, 'lr_finder'),[h['lr'] for h in self.opt.hypers],()
        dl,bs = self.dls.train,self.accumulate.bs
        self.total = round(self.epochs*-(-dl.n//bs))                # updates, with any number of processes

    def before_train(self):
        "Nothing else sets the rate meanwhile"
        if self.done >= self.total: return
        if any(isinstance(cb, ParamScheduler) and 'lr' in cb.scheds for cb in self.cbs):
            raise DataError("a schedule sets the rate already; take GradualWarmUp away, or train by fit(…) without a schedule")
        self.others = [cb for cb in self.cbs if isinstance(cb, RateDrop)]
        for cb in self.others: cb.waits = True
        self.set_rate()

    def share(self,
        done:int, # Updates
        full:float, # The learner's own rate
    ) -> float: # 0 to 1
        "The part of its own rate that an update has"
        first = min(1, self.start/full) if full else 1
        return first + (1 - first)*min(1, done/self.total)

    def set_rate(self):
        share = self.share(self.done, max(self.full))
        self.opt.set_hyper('lr', [share*lr for lr in self.full])

    def before_batch(self): self.stepped = False
    def after_step(self): self.stepped = True
    def after_batch(self):
        if not self.stepped or self.done >= self.total: return
        self.done += 1
        self.set_rate()
        if self.done < self.total: return
        for cb in self.others: cb.waits = False


def all_reduce_seconds(
    gpus:int, # That average their gradients in a ring
    link:float, # GB a second, each way, of the slowest link in the ring
    params:int=25_557_032, # Of the network, here ResNet-50; each travels in 4 bytes
) -> float:
    "How long an average of the gradients takes: each GPU sends and receives 2 (N-1)/N of them, and latency is left out"
    return 2*(gpus - 1)/gpus*4*params/(link*1e9)


def rate_limits(
    step_rate:float, # Photos a second that one GPU trains on
    decode_rate:float, # Photos a second that one core decodes and crops
    gpus:int=8, # On all machines
    cores:int=64, # On all machines
    bs:int=256, # Photos in an update
    efficiency:float=.9, # What is left of the GPUs' sum when they wait for each other
    link:float|None=None, # GB a second, each way, of the slowest link between GPUs; None: no limit
    params:int=25_557_032, # Of the network
) -> dict: # Photos a second by 'GPUs', 'decoding' and, where there is a link, 'network'
    "The rates that a training cannot exceed; an update never takes less time than its all-reduce, however well that is hidden"
    rates = dict(GPUs=step_rate*gpus*(efficiency if gpus > 1 else 1), decoding=decode_rate*cores)
    return rates | (dict(network=bs/all_reduce_seconds(gpus, link, params)) if link and gpus > 1 else {})


@delegates(rate_limits)
def estimate_hours(
    step_rate:float, # Photos a second that one GPU trains on
    decode_rate:float, # Photos a second that one core decodes and crops
    gpus:int=8, # On all machines
    cores:int=64, # On all machines
    epochs:int=90, # Passes over the photos
    photos:int=1_281_167, # Of ImageNet's training set
    bs:int|None=None, # Photos in an update; None: 256, or 32 a GPU
    **kwargs
) -> dict: # bs, lr, micro_bs, photos_per_s, limit, hours
    "Batch, rate and hours of a training on several GPUs"
    bs = bs or max(256, 32*gpus)
    rates = rate_limits(step_rate, decode_rate, gpus, cores, bs, **kwargs)
    limit = min(rates, key=rates.get)
    return dict(bs=bs, lr=default_lr(bs), micro_bs=min(bs//gpus, 256), photos_per_s=round(rates[limit]), limit=limit,
                hours=float(f'{photos*epochs/rates[limit]/3600:.3g}'))
