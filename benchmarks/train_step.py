"""Training steps of ResNet-50 on ready batches: `resnet_learner`'s loop, with everything that it records, against a bare PyTorch loop
over the same batches: `torchvision.models.resnet50`, `torch.optim.SGD(foreach=True)`, the same precision. And the default precision
and layout against 32 bits in PyTorch's own order.

On a GPU: batches of 256 in bf16, channels last, and the share of the GPU's peak where it is known. Without one it says so."""
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)      # not this folder: its `statistics` is not Python's

from benchmarks.common import alternate, arguments, compare, write

import torch
from fastai.data.core import DataLoaders
from torch.nn import functional as F
from torchvision.models import resnet50

from resnet_fastai.model import build_net
from resnet_fastai.training import resnet_learner

gpu = torch.cuda.is_available()
device = torch.device('cuda' if gpu else 'cpu')


class Ready:
    "Batches that are in memory already"
    def __init__(self, n, bs, size=224):
        self.bs, self.device = bs, device
        self.batches = [(torch.randn(bs, 3, size, size, device=device), torch.randint(0, 1000, (bs,), device=device)) for _ in range(n)]
    def __iter__(self): return iter(self.batches)
    def __len__(self): return len(self.batches)


def wait():
    if gpu: torch.cuda.synchronize()


def bare(batches, precision, channels_last, net=None, compile=False):
    "A step loop as short as PyTorch allows, over torchvision's network or, with net='ours', over this project's"
    net = (build_net('resnet50', 1000, stride_at='3x3') if net == 'ours' else resnet50()).to(device, memory_format=torch.channels_last if channels_last else torch.preserve_format).train()
    if compile: net.compile()
    opt = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=.9, weight_decay=1e-4, foreach=True)
    def run():
        for x, y in batches:
            if channels_last: x = x.contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == 'bf16'): out = net(x)
            F.cross_entropy(out.float(), y).backward()
            opt.step()
            opt.zero_grad()
        wait()
    return run


def ours(batches, **kw):
    "`resnet_learner` with its callbacks, one epoch of training; the validation that `fit` adds is left out"
    dls = DataLoaders(batches, batches, device=device)
    dls.vocab = dls.labels = list(range(1000))
    learn = resnet_learner(dls, 'resnet50', bs=batches.bs, lr=1e-4, stride_at='3x3', **kw)
    learn.model.to(device)
    learn._do_epoch = learn._do_epoch_train
    learn.history.after_epoch = learn.plateau_lr.after_epoch = lambda: None      # they look at a validation that is not there
    def run():
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        wait()
    return run


def main():
    args = arguments(__doc__)
    figures = {}
    if gpu: plans = {256: (20, dict(precision='bf16', channels_last=True))}
    else: plans = {8: (3, dict(precision='fp32', channels_last=False)), 32: (1, dict(precision='fp32', channels_last=False))}
    for bs, (n, how) in plans.items():
        batches = Ready(n, bs)
        print(f'batches of {bs}, {how}')
        seconds = alternate({'bare PyTorch loop': bare(batches, **how), 'ours': ours(batches, **how)}, args.rounds)
        figures[f'loop_bs{bs}'] = compare(seconds, 'ours', n*bs, {'bare PyTorch loop': .97})
    if gpu:
        rate = figures['loop_bs256']['rates']['ours']
        figures['gpu'] = dict(memory_gb=torch.cuda.max_memory_allocated()/2**30, tflops=rate*3*2*4.089e9/1e12)
        print(f"{rate:,.0f} photos/s, {figures['gpu']['tflops']:.0f} TFLOP/s, {figures['gpu']['memory_gb']:.1f} GB")
    else:
        batches = Ready(3, 8)
        print('the default precision and layout, batches of 8')
        seconds = alternate({'fp32, NCHW': ours(batches, precision='fp32', channels_last=False), 'default': ours(batches)}, args.rounds)
        figures['default'] = compare(seconds, 'default', 24, {'fp32, NCHW': 1.7})
        print('no GPU here: a GPU was not measured')
    write(args, gpu_measured=gpu, **figures)


if __name__ == '__main__': main()
