"""Train on several GPUs or machines with one command, and get the result of one."""
__all__ = ['estimate_hours']

from ..training import default_lr


def estimate_hours(
    step_rate:float, # Photos a second that one GPU trains on
    decode_rate:float, # Photos a second that one core decodes and crops
    gpus:int=8, # On all machines
    cores:int=64, # On all machines
    epochs:int=90, # Passes over the photos
    photos:int=1_281_167, # Of ImageNet's training set
    efficiency:float=.9, # What is left of the GPUs' sum when they wait for each other
) -> dict: # bs, lr, micro_bs, photos_per_s, limit, hours
    "Batch, rate and hours of a training on several GPUs"
    train,feed = step_rate*gpus*(efficiency if gpus > 1 else 1), decode_rate*cores
    bs = max(256, 32*gpus)
    return dict(bs=bs, lr=default_lr(bs), micro_bs=bs//gpus if bs//gpus <= 256 else 256, photos_per_s=round(min(train, feed)),
                limit='GPUs' if train <= feed else 'decoding', hours=round(photos*epochs/min(train, feed)/3600, 1))
