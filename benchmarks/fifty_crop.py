"""One photo → the average of its 50 crops, from the bytes of a JPEG to probabilities.

Ours by default against (a) the plain way, 50 forward passes one by one, 32 bits, and (b) the 50 crops as one batch; both take their crops
from torchvision's `TenCrop`. Ours in 32 bits runs beside them. The second part trains a small network on drawn photos and compares its
probabilities by default and in 32 bits, over drawn and real photos: the bound is a change of 2e-3."""
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)      # not this folder: its `statistics` is not Python's
import io
import tempfile

from benchmarks.common import alternate, arguments, compare, photos, write

import numpy as np
import torch
from fastai.torch_core import set_seed
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms.functional import to_tensor

from resnet_fastai.augment import ColorStats
from resnet_fastai.data import demo_data, resnet_dls
from resnet_fastai.inference import predict_probs
from resnet_fastai.model import build_net
from resnet_fastai.training import resnet_learner

stats = ColorStats([.48, .457, .408], [.2175, .0188, .0045], np.eye(3))
bound = 2e-3


def theirs(net, data, size, bs):
    "torchvision's crops through the network, `bs` at a time"
    img = Image.open(io.BytesIO(data)).convert('RGB')
    crops = [to_tensor(c) for s in (224, 256, 384, 480, 640) for c in T.TenCrop(size)(T.Resize(round(s*size/224))(img))]
    x = torch.stack(crops) - torch.tensor(stats.mean, dtype=torch.float32)[:, None, None]
    with torch.inference_mode(): return torch.cat([net(b).softmax(1) for b in x.split(bs)]).mean(0).numpy()


def speed(args, path):
    set_seed(0)
    net, data = build_net(args.arch, 1000).eval(), path.read_bytes()
    ways = {'(a) one by one': lambda: theirs(net, data, args.size, 1), '(b) one batch of 50': lambda: theirs(net, data, args.size, 50),
            'ours, fp32': lambda: predict_probs(net, data, stats, args.size, precision='fp32'),
            'ours': lambda: predict_probs(net, data, stats, args.size)}
    plain = theirs(net, data, args.size, 1)
    off = {name: float(abs(way() - plain).max()) for name, way in ways.items() if name.startswith('ours')}
    a, b, exact, _ = ways
    assert off[exact] < 1e-5, off
    found = compare(alternate(ways, args.rounds), 'ours', 1, {a: 2.5, b: 1.3})
    return dict(arch=args.arch, size=args.size, photo='{}×{}'.format(*Image.open(path).size), **found, change=off)


def accuracy(args, paths):
    tmp = Path(tempfile.mkdtemp())
    set_seed(0)
    dls = resnet_dls(*demo_data(tmp/'demo', sizes=dict(train=480, val=16, test=60)), micro_bs=16, size=64, num_workers=0)
    learn = resnet_learner(dls, 'resnet18', bs=16, zero_init_residual=True)
    with learn.no_bar(), learn.no_logging(): learn.fit(args.epochs)
    asked = [*dls.photos['test'], *paths]
    exact, fast = (predict_probs(learn.model, asked, dls.stats, 64, precision=p) for p in ('fp32', None))
    change, order = abs(fast - exact).max(1), 0
    for e, f in zip(exact, fast):
        best = (-e).argsort(kind='stable')[:5]
        order += any(f[i] <= f[j] for k, i in enumerate(best) for j in best[k+1:] if e[i] - e[j] > bound)
    print(f'  {len(asked)} photos, ResNet-18 after {args.epochs} epochs: largest change of a probability {change.max():.1e}, median over photos '
          f'{np.median(change):.1e}; bound {bound:g}: {"kept" if change.max() <= bound else "NOT kept"}; '
          f'labels exchanged among the first five whose probabilities differ by more: {order} photos')
    return dict(photos=len(asked), epochs=args.epochs, largest=float(change.max()), median=float(np.median(change)), bound=bound, exchanged=order)


def main():
    args = arguments(__doc__, arch=('resnet50', 'the network of the first part'), size=(224, 'side of its crops'), epochs=(4, 'of the second part'))
    paths, what = photos(args.photos)
    paths = [p for p in paths if min(Image.open(p).size) >= 300]
    path = min(paths, key=lambda p: abs(np.log(np.array(Image.open(p).size)/(500, 375))).sum())
    print(f'one photo ({what}), {args.arch}, {torch.get_num_threads()} threads')
    figures = speed(args, path)
    write(args, photos=what, threads=torch.get_num_threads(), **figures, accuracy=accuracy(args, paths))


if __name__ == '__main__': main()
