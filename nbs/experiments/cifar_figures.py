"""Look inside networks of the paper's CIFAR-10 family, and keep what is found as JSON in results/layers/.

    python nbs/experiments/cifar_figures.py CIFAR10 --weights FOLDER    # four networks that others have trained
    python nbs/experiments/cifar_figures.py CIFAR10 --weights FOLDER --jpeg 95 90 75    # ResNet-20 on copies of the test photos
    python nbs/experiments/cifar_figures.py CIFAR10 --runs FOLDER       # what runs of cifar10.py have reached: their newest checkpoints
    python nbs/experiments/cifar_figures.py CIFAR10 --net plain56       # a short run of our own, at half the resolution

With --runs, a folder of run folders: test error, the responses of Figure 7, and the norm of each 3×3 layer's gradient over some batches
of training photos, at the point that each run has come to. With --weights: test errors, errors of ensembles (the idea of Table 5), the error without each block, and the responses of Figure 7, of
resnet20.th, resnet32.th, resnet44.th and resnet56.th from https://github.com/akamaster/pytorch_resnet_cifar10. With --net: the gradient
of every 3×3 layer while the network is trained, and its responses after each epoch. CIFAR10 as for cifar10.py."""
import argparse
import copy
import io
import json
import re
import sys
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.torch_core import set_seed
from PIL import Image
from torch import nn
from torch.nn import functional as F

from cifar10 import (block_edges, cifar10, cifar_dls, cifar_learner, commit, epochs, machine, paper_bs, paper_updates, predict, published_errors,
                     published_input, published_net, weights_of)
from resnet_fastai.engine.checkpoint import read_checkpoint
from resnet_fastai.engine.files import DataError, write_json
from resnet_fastai.model import Block, build_net, count_params
from resnet_fastai.training import WarmUp

results = Path(__file__).parent/'results'/'layers'


def layers_3x3(net):
    "[(name, convolution, its BN)] in the order of the layers"
    modules = dict(net.named_modules())
    return [(k, m, modules[k.replace('conv', 'bn')]) for k, m in modules.items() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]


def _digits(x): return float(f'{x:.5g}')


class Responses:
    "Standard deviation of what each 3×3 layer puts out after BN, before ReLU or addition, over photos, pixels and channels"      # Figure 7
    def __init__(self, net):
        self.sums = {}
        self.hooks = [bn.register_forward_hook(lambda m, i, out, k=k: self.add(k, out)) for k, _, bn in layers_3x3(net)]

    def add(self, name, out):
        out = out.detach().float()
        new = torch.tensor([out.numel(), out.sum(), (out*out).sum()], dtype=torch.float64)
        self.sums[name] = self.sums.get(name, 0) + new

    def stop(self):
        "{layer: standard deviation}"
        for h in self.hooks: h.remove()
        return {k: _digits(((s2/n - (s/n)**2)**.5).item()) for k, (n, s, s2) in self.sums.items()}


# --- Trained by others

@torch.no_grad()
def without_each_block(net, x, y, bs=100): # y: labels
    "[(block, errors of 1 if only its shortcut is left)]; what comes before the block is computed once"
    blocks = [(k, m) for k, m in net.named_modules() if isinstance(m, Block)]
    wrong = dict.fromkeys([k for k, _ in blocks], 0)
    def rest(h, i):
        for _, b in blocks[i:]: h = b(h)
        return net.fc(net.flatten(net.avgpool(h)))
    for xb, yb in zip(x.split(bs), y.split(bs)):
        h = net.relu(net.bn1(net.conv1(published_input(xb))))
        for i, (k, b) in enumerate(blocks):
            wrong[k] += (rest(b.downsample(h), i + 1).argmax(1) != yb).sum().item()
            h = b(h)
    return [dict(block=k, error=n/len(x)) for k, n in wrong.items()]


def ensembles(probs, y):
    "The error of each group of networks whose probabilities are averaged"
    found = [g for n in range(1, len(probs) + 1) for g in combinations(probs, n)]
    return [dict(nets=list(g), error=(sum(probs[d] for d in g).argmax(1) != y).double().mean().item()) for g in found]


def published(folder, weights, out, delete=(20, 56)):
    "Everything that can be learnt from the networks of `weights_of`"
    data = cifar10(folder)
    x, y = data['test']
    told, probs = dict(_about(f'--weights {Path(weights).name}', data), weights=weights_of, photos=len(x), nets={}, without_block={}), {}
    for depth, given in published_errors.items():
        net = published_net(Path(weights)/f'resnet{depth}.th')
        look = Responses(net)
        probs[depth] = predict(net, x, bs=100).softmax(1)
        told['nets'][depth] = dict(error=(probs[depth].argmax(1) != y).double().mean().item(), given=given, parameters=count_params(net),
                                   responses=look.stop())
        print(f"ResNet-{depth}: {told['nets'][depth]['error']:.2%}, given as {given:.2%}", flush=True)
        _write(out, told)
    told['ensembles'] = ensembles(probs, y)
    for depth in delete:
        told['without_block'][depth] = without_each_block(published_net(Path(weights)/f'resnet{depth}.th'), x, y)
        _write(out, told)
    return told


def jpeg_copy(x, quality): # (N,3,32,32) of 8 bits; JPEG's quality, up to 95
    "The photos as they come back from JPEG files, colour at half resolution as usual"
    def through(photo):
        file = io.BytesIO()
        Image.fromarray(photo).save(file, 'JPEG', quality=quality)
        return np.asarray(Image.open(file))
    return torch.from_numpy(np.stack([through(p) for p in x.permute(0, 2, 3, 1).numpy()])).permute(0, 3, 1, 2)


def on_jpegs(folder, weights, qualities, out):
    "The error of the published ResNet-20 on the test photos, and on copies that have been JPEGs"
    data = cifar10(folder)
    (x, y), net = data['test'], published_net(Path(weights)/'resnet20.th')
    command = f"--weights {Path(weights).name} --jpeg {' '.join(map(str, qualities))}"
    told = _about(command, data) | dict(weights=weights_of, photos=len(x), rows=[])
    for q in [None, *qualities]:
        copies = x if q is None else jpeg_copy(x, q)
        told['rows'].append(dict(quality=q, block_edges=_digits(block_edges(copies)),
                                 error=(predict(net, copies).argmax(1) != y).double().mean().item()))
        print(told['rows'][-1], flush=True)
        _write(out, told)
    return told


# --- Trained by us

def checkpoints(folder): # A folder of run folders of cifar10.py
    "{KIND DEPTH-UPDATES-SEED: its newest checkpoint}"
    found = {p.name: sorted(p.glob('checkpoint-*.pt')) for p in sorted(Path(folder).iterdir()) if re.match('(plain|resnet)[0-9]+-', p.name)}
    found = {name: files[-1] for name, files in found.items() if files}
    if not found: raise DataError(f"{folder} holds no runs of cifar10.py, which have names like resnet20-64000-0 and checkpoints inside")
    return found


def gradient_norms(net, dl, batches):
    "The norm of each 3×3 layer's gradient, the root mean square over batches; weights and BN's averages stay as they are"
    net, squares = copy.deepcopy(net).train(), 0
    for x, y in islice(iter(dl), batches):
        net.zero_grad()
        F.cross_entropy(net(x), y).backward()
        squares = squares + np.array([conv.weight.grad.square().sum().item() for _, conv, _ in layers_3x3(net)])
    return [_digits(v) for v in (squares/batches)**.5]


def trained_here(folder, runs, out, batches=20, bs=paper_bs):
    "Each run's newest checkpoint: its error, its responses and its gradients"
    data = cifar10(folder)
    told = _about(f'--runs {Path(runs).name}', data) | dict(photos=len(data['test'][0]), batches=batches, nets={})
    known = json.loads(out.read_text())['nets'] if out.exists() else {}          # of checkpoints that are the same still
    for name, file in checkpoints(runs).items():
        kind, depth = re.match('(plain|resnet)([0-9]+)', name).groups()
        told['nets'][name] = known.get(name, dict(updates=None))
        if told['nets'][name]['updates'] == int(re.search('[0-9]+', file.name)[0]): continue
        state, dls = read_checkpoint(file), cifar_dls(data, bs, device='cpu')
        net = build_net(f'cifar_{kind}{depth}', len(data['classes']))
        net.load_state_dict(state['model'])
        look, wrong = Responses(net.eval()), 0
        with torch.no_grad():
            for x, y in dls.valid: wrong += (net(x).argmax(1) != y).sum().item()
        set_seed(0)
        dls.train.rng.seed(0)
        told['nets'][name] = dict(kind=kind, depth=int(depth), updates=int(re.search('[0-9]+', file.name)[0]), error=wrong/told['photos'],
                                  responses=look.stop(), gradients=gradient_norms(net, dls.train, batches))
        print(f"{name}: {told['nets'][name]['updates']:,} updates, error {wrong/told['photos']:.2%}", flush=True)
        _write(out, told)
    _write(out, told)                                                # with those that were known already
    return told


# --- While it is trained

class Gradients(Callback):
    "Keep the norm of each 3×3 layer's gradient, at the first ten updates and at every tenth from then on"
    order, run_valid = 30, False                                     # the gradients of the whole batch, not yet used
    def __init__(self): self.rows, self.updates = [], 0
    def before_step(self):
        self.updates += 1
        if self.updates > 10 and self.updates % 10: return
        self.rows.append(dict(update=self.updates, loss=_digits(self.loss.item()),
                              norms=[_digits(conv.weight.grad.norm().item()) for _, conv, _ in layers_3x3(self.model)]))


class KeepLayers(Callback):
    "After each epoch, the responses of the evaluation photos, and the file"
    order = 95
    def __init__(self, out, told, gradients): self.out, self.told, self.gradients = out, told, gradients
    def before_validate(self): self.look = Responses(self.model)
    def after_validate(self): self.responses = self.look.stop()
    def after_epoch(self):
        row = self.history.rows[-1]
        self.told |= dict(updates_done=self.gradients.updates, train_error=row['train_error'], top1_error=row['top1_error'],
                          layers=[*self.responses], responses=self.responses, gradients=self.gradients.rows)
        _write(self.out, self.told)
        print(f"{self.told['net']}: {self.gradients.updates:,} updates, test error {row['top1_error']:.2%}", flush=True)


def smaller(x, size): # (N,3,32,32) of 8 bits
    "The photos at `size`, the mean of each square of pixels"
    return x if size == 32 else torch.cat([F.avg_pool2d(b.float(), 32//size).round().byte() for b in x.split(1000)])


def short_run(folder, net, updates, size, bs, seed, out):
    "The recipe of §4.2 in small: fewer updates and pixels, and for every net the small rate that the paper begins 110 layers with"
    kind, depth = re.fullmatch('(plain|resnet)([0-9]+)', net).groups()
    data = cifar10(folder)
    dls = cifar_dls(data | {s: (smaller(data[s][0], size), data[s][1]) for s in ('train', 'test')}, bs)
    set_seed(seed)
    for dl in dls.loaders: dl.rng.seed(seed)
    options = dict(net=net, updates=updates, size=size, bs=bs, seed=seed)
    told = _about(' '.join(f'--{k} {v}' for k, v in options.items()), data) | options | dict(paper_updates=paper_updates, precision='bf16')
    gradients = Gradients()
    warm_up = [] if int(depth) >= 110 else [WarmUp(.01, .8)]         # `cifar_learner` has it from 110 layers on
    learn = cifar_learner(dls, int(depth), kind, updates, 'bf16', [gradients, KeepLayers(out, told, gradients), *warm_up])
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs(dls, updates))
    return learn


# --- The command

def _about(options, data):
    command = f'python nbs/experiments/cifar_figures.py CIFAR10 {options}'
    return dict(command=command, commit=commit(__file__), machine=machine(), data=data['about'])


def _write(out, told):
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, told)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', type=Path, help='CIFAR-10, as for cifar10.py')
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument('--weights', type=Path, help='a folder with resnet20.th, resnet32.th, resnet44.th and resnet56.th')
    what.add_argument('--runs', type=Path, help='a folder of run folders of cifar10.py: resnet20-64000-0, …')
    what.add_argument('--net', help='plain20, resnet56, …: trained for a short time')
    p.add_argument('--jpeg', type=int, nargs='+', metavar='QUALITY', help='with --weights: qualities of JPEG, from 1 to 95')
    p.add_argument('--updates', type=int, default=3000, help='with --net; the rate falls after 1/2 and 3/4 of them')
    p.add_argument('--size', type=int, default=16, choices=[8, 16, 32], help='with --net: pixels on a side')
    p.add_argument('--bs', type=int, default=64, help='with --net: photos in an update')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--out', type=Path, help='default: nbs/experiments/results/layers/NET.json, runs.json, published.json or jpeg.json')
    p.add_argument('--threads', type=int, help='of the processor; default: all')
    args = p.parse_args(argv)
    if args.threads: torch.set_num_threads(args.threads)
    if args.net and not re.fullmatch('(plain|resnet)[0-9]+', args.net):
        p.error(f"--net is {args.net!r}; it should be like plain20 or resnet56")
    if args.jpeg and not args.weights: p.error('--jpeg needs --weights: a network that is asked about the copies')
    try:
        if args.jpeg: on_jpegs(args.folder, args.weights, args.jpeg, args.out or results/'jpeg.json')
        elif args.runs: trained_here(args.folder, args.runs, args.out or results/'runs.json')
        elif args.weights: published(args.folder, args.weights, args.out or results/'published.json')
        else: short_run(args.folder, args.net, args.updates, args.size, args.bs, args.seed, args.out or results/f'{args.net}.json')
    except (DataError, FileNotFoundError) as e: sys.exit(f'{type(e).__name__}: {e}')


if __name__ == '__main__': main()
