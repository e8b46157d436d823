"""Make a model to start from out of a finished run on CIFAR-10, and test it as it will be used: one mean for each channel.

    python nbs/experiments/cifar10.py CIFAR10 --depth 20 --precision bf16                  # hours: it leaves checkpoints and a JSON file
    python nbs/experiments/cifar10_weights.py CIFAR10 runs/cifar10/resnet20-64000-0        # → results/cifar10_resnet20/

In training the mean image was subtracted, pixel by pixel; photos of other sizes have none, so the model keeps the mean of each channel."""
import argparse
import json
import sys
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from cifar10 import cifar10, predict
from resnet_fastai.augment import ColorStats
from resnet_fastai.data import LabelMap
from resnet_fastai.engine.checkpoint import read_checkpoint
from resnet_fastai.engine.files import DataError
from resnet_fastai.engine.survey import color_moments
from resnet_fastai.model import build_net
from resnet_fastai.practice.share import save_model, Trained

results = Path(__file__).parent/'results'


def per_channel(x, stats): return x.float()/255 - torch.tensor(stats.mean, dtype=torch.float32)[:, None, None]


def model_of(
    run:Path, # A finished run's folder of checkpoints, named as its JSON file
    data:dict, # Of `cifar10`
) -> tuple: # (`Trained`, its test error)
    "The network of a run with its colour statistics and labels"
    told = json.loads((results/f'{run.name}.json').read_text())
    if told['updates_done'] < told['updates']: raise DataError(f"{run} is no finished run: {told['updates_done']:,} of {told['updates']:,} updates")
    arch = f"cifar_{told['kind']}{told['depth']}"
    net = build_net(arch, len(data['classes'])).eval()
    net.load_state_dict(read_checkpoint(max(run.glob('checkpoint-*-epoch.pt')))['model'])
    stats = ColorStats.from_moments(color_moments(data['train'][0].permute(1, 0, 2, 3).reshape(3, -1, 32)), len(data['train'][0]))
    x, y = data['test']
    error = float((predict(net, x, partial(per_channel, stats=stats)).argmax(1) != y).float().mean())
    origin = f"CIFAR-10, {told['updates']:,} updates of {told['bs']} by the paper's recipe; test error {error:.2%}; {told['command']}"
    labels = LabelMap({}, {str(c): i for i, c in enumerate(data['classes'])})
    return Trained(net, arch, {}, labels, stats, 32, pd.DataFrame(), dict(origin=origin, photos=dict(train=len(data['train'][0]))), '1crop@32'), error


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', type=Path, help="CIFAR-10, in a layout of cifar10.py")
    p.add_argument('run', type=Path, help='runs/cifar10/resnet20-64000-0')
    p.add_argument('--out', type=Path, default=results/'cifar10_resnet20', help='the new folder')
    a = p.parse_args(argv)
    try:
        model, error = model_of(a.run, cifar10(a.folder))
        print(save_model(model, a.out), f'test error {error:.2%}, one mean a channel')
    except DataError as e: sys.exit(f'{type(e).__name__}: {e}')


if __name__ == '__main__': main()
