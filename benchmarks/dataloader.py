"""Whole epochs of batches: decoding, scale jitter, crop, mirror, lighting, division by 255 and centring, with two workers.

`resnet_dls` against PyTorch's `DataLoader` with torchvision v2 doing the same augmentation in its workers; both end with float batches on
the CPU. Every round is one epoch over the photos, repeated by links until there are enough."""
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)      # not this folder: its `statistics` is not Python's
import os
import random
import tempfile

from benchmarks.common import alternate, arguments, compare, photos, write

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2

from resnet_fastai.augment import ColorStats
from resnet_fastai.data import resnet_dls


class Lighting:
    "AlexNet's lighting and the centring, on one photo"
    def __init__(self, stats):
        self.axes, self.mean = torch.tensor(stats.eigvec*stats.eigval, dtype=torch.float32), torch.tensor(stats.mean, dtype=torch.float32)
    def __call__(self, x): return x + (self.axes @ (torch.randn(3)*.1) - self.mean)[:, None, None]


class Photos(Dataset):
    def __init__(self, paths, stats):
        self.paths = paths
        self.after = v2.Compose([v2.RandomCrop(224), v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True), Lighting(stats)])
    def __len__(self): return len(self.paths)
    def __getitem__(self, i):
        rgb = decode_jpeg(read_file(self.paths[i]), ImageReadMode.RGB)
        return self.after(v2.functional.resize(rgb, [random.randint(256, 480)], antialias=True)), 0


def laid_out(paths, n):
    "n links to the photos, as a data set of this project"
    tmp = Path(tempfile.mkdtemp())
    for s in ('train', 'val'): (tmp/s).mkdir()
    for i in range(n): os.symlink(paths[i % len(paths)].resolve(), tmp/'train'/f't{i}.jpg')
    os.symlink(paths[0].resolve(), tmp/'val'/'v.jpg')
    return tmp, {p.stem: 'a' for p in (*tmp.glob('train/*'), *tmp.glob('val/*'))}


def main():
    args = arguments(__doc__, items=(1024, 'photos in an epoch'), workers=(2, 'processes'), bs=(32, 'photos in a batch'))
    paths, what = photos(args.photos)
    stats = ColorStats.fit(paths)
    data, labels = laid_out(paths, args.items)
    dls = resnet_dls(data, labels, {'a': 0}, micro_bs=args.bs, stats=stats, num_workers=args.workers, device='cpu')
    theirs = DataLoader(Photos([str(p) for p in sorted(data.glob('train/*'))], stats), batch_size=args.bs, shuffle=True, num_workers=args.workers)
    def epoch(batches):
        for x, _ in batches: assert x.dtype == torch.float32
    seconds = alternate({'torch DataLoader, torchvision v2': lambda: epoch(theirs), 'ours': lambda: epoch(dls.train)}, args.rounds)
    write(args, photos=what, workers=args.workers, epoch=compare(seconds, 'ours', args.items, {'torch DataLoader, torchvision v2': 1.0}))


if __name__ == '__main__': main()
