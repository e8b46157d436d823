"""An update of a CIFAR-10 network on 128 photos: `cifar_learner`'s loop, with everything that it records, against a bare PyTorch loop in the
same precision and layout, which cuts the same crops and uses `torch.optim.SGD(foreach=True)`. Then that bare loop in other ways: layout,
precision, threads, and `torch.compile` where it is asked for. On the processor, also where there is a GPU.

`--clock cpu` counts the processor's time in the place of the wall's, for a machine that others use; what threads bring is not seen so."""
import sys
import time
from functools import partial
from pathlib import Path

root = Path(__file__).resolve().parent.parent
sys.path[0] = str(root)                                        # not this folder: its `statistics` is not Python's
sys.path.insert(1, str(root/'nbs'/'experiments'))

from benchmarks.common import alternate, arguments, compare, write

import cifar10
import torch
from torch.nn import functional as F

from resnet_fastai.model import build_net


def data():
    "50,000 photos of noise: what is in them costs nothing more or less"
    x = torch.randint(256, (50_000, 32, 32, 3), dtype=torch.uint8).permute(0, 3, 1, 2).contiguous()
    y = torch.arange(50_000) % 10
    return dict(train=(x, y), test=(x[:10_000], y[:10_000]), classes=[*'abcdefghij'])


def bare(dls, depth, updates, precision='bf16', channels_last=True, threads=None, compile=False):
    "As short as PyTorch allows"
    net = build_net(f'cifar_resnet{depth}', 10).to(memory_format=torch.channels_last if channels_last else torch.contiguous_format).train()
    if compile: net.compile()
    opt = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=.9, weight_decay=1e-4, foreach=True)
    photos = dls.train_ds
    def run():
        with use(threads):
            order = torch.randperm(len(photos))
            for i in range(updates):
                x, y = photos[order[i*128:(i + 1)*128]]
                x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
                with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bf16'): out = net(x)
                F.cross_entropy(out.float(), y).backward()
                opt.step()
                opt.zero_grad()
    return run


class use:
    "So many threads, for a while"
    def __init__(self, n): self.n, self.old = n, torch.get_num_threads()
    def __enter__(self): torch.set_num_threads(self.n or self.old)
    def __exit__(self, *_): torch.set_num_threads(self.old)


def ours(dls, depth, updates):
    "An epoch of so many updates; the evaluation that `fit` adds is left out"
    learn = cifar10.cifar_learner(dls, depth, precision='bf16')
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, cifar10.LastUpdate)])
    learn.dls.train.most = updates
    learn._do_epoch = learn._do_epoch_train
    learn.history.after_epoch = lambda: None                   # it looks at an evaluation that is not there
    def run():
        with learn.no_bar(), learn.no_logging(): learn.fit(1, lr=1e-3)
    return run


def main():
    args = arguments(__doc__, depth=(20, 'layers'), updates=(10, 'in a turn'), clock=('wall', 'wall or cpu'),
                     compile=(0, '1: torch.compile too'))
    clock, dls = dict(wall=time.perf_counter, cpu=time.process_time)[args.clock], cifar10.cifar_dls(data(), device='cpu')
    threads = torch.get_num_threads()
    loop = partial(bare, dls, args.depth, args.updates)
    print(f'ResNet-{args.depth}, {args.updates} updates of 128 photos a turn, {threads} threads, bf16, channels last')
    contestants = {'bare PyTorch loop': loop(), 'ours': ours(dls, args.depth, args.updates)}
    same = compare(alternate(contestants, args.rounds, clock), 'ours', args.updates, {'bare PyTorch loop': .97}, 'updates/s')
    ways = {'bf16, channels last': {}, 'bf16, NCHW': dict(channels_last=False), 'fp32, channels last': dict(precision='fp32'),
            '1 thread': dict(threads=1)}
    if args.compile: ways['compiled'] = dict(compile=True)
    print('the bare loop in other ways')
    turns = alternate({name: loop(**how) for name, how in ways.items()}, args.rounds, clock)
    other = compare(turns, 'bf16, channels last', args.updates, unit='updates/s')
    write(args, threads=threads, clock=args.clock, depth=args.depth, updates=args.updates, loop=same, bare=other)


if __name__ == '__main__': main()
