"""Errors of published CIFAR-10 networks with batch norm's moving averages, and with plain averages.

    python nbs/experiments/bn_statistics.py CIFAR10 --weights FOLDER

The authors computed the statistics of their released models as plain averages over a large training batch, after training. The averages
here are over training photos in batches of 128, augmented as in training."""
import argparse
from pathlib import Path

import torch

from cifar10 import checksum, cifar10, commit, machine, pad_crop_flip, predict, published_input, published_net
from resnet_fastai.engine.exact_bn import average_statistics
from resnet_fastai.engine.files import write_json

results = Path(__file__).parent/'results'


def count_errors(net, x, y): return int((predict(net, x).argmax(1) != y).sum())


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', type=Path, help='CIFAR-10, as for cifar10.py')
    p.add_argument('--weights', type=Path, required=True, help='a folder with resnet20.th and resnet56.th')
    p.add_argument('--photos', type=int, default=10_000, help='training photos to average over')
    p.add_argument('--seeds', type=int, default=3, help='draws of training photos')
    p.add_argument('--out', type=Path, default=results/'bn_statistics.json')
    args = p.parse_args(argv)
    data = cifar10(args.folder)
    (x, _), (tx, ty) = data['train'], data['test']
    options = f'--weights {args.weights.name} --photos {args.photos} --seeds {args.seeds}'
    told = dict(command=f'python nbs/experiments/bn_statistics.py CIFAR10 {options}', commit=commit(__file__), machine=machine(),
                data=checksum(tx, ty), test_photos=len(ty), nets={})
    for depth in (20, 56):
        net, plain = published_net(args.weights/f'resnet{depth}.th'), []
        moving = count_errors(net, tx, ty)
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            batches = x[torch.randperm(len(x))[:args.photos]].split(128)
            average_statistics(net, (published_input(pad_crop_flip(b)) for b in batches))      # black padding, as in their training
            plain.append(count_errors(net, tx, ty))
        told['nets'][f'ResNet-{depth}'] = dict(moving=moving, plain=plain)
        print(f'ResNet-{depth}: {moving} of {len(ty):,} wrong with moving averages, {plain} with plain ones', flush=True)
        write_json(args.out, told)


if __name__ == '__main__': main()
