"""Train on several GPUs or machines with one command, and get the result of one."""
__all__ = ['all_reduce_seconds', 'rate_limits', 'estimate_hours']

from fastcore.meta import delegates

from ..training import default_lr


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
