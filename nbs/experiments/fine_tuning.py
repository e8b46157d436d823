"""Does it help to start from pretrained weights, and how many photos does it save? Train on some photos of each class, with and without.

    python nbs/experiments/fine_tuning.py PHOTOS resnet20.th

    python nbs/experiments/fine_tuning.py PHOTOS resnet20.th --rates .01 .03 .1 --sizes 100 400 --seeds 2    # which rate? on validation/

PHOTOS is {train,validation,test}/CLASS/*.jpg, resnet20.th a file from `weights_of` of cifar10.py. Every run has the same number of epochs
and a fixed schedule. Rates are compared on the validation photos; all other results are on the test photos. Each run is added to
results/fine_tuning.json (or fine_tuning_rates.json) when it ends; the same command resumes with those that are missing."""
import argparse
import json
import os
import random
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

import pandas as pd

from cifar10 import commit, machine, published_net, weights_of
from resnet_fastai.core import ResNet
from resnet_fastai.data import from_folders
from resnet_fastai.engine.files import DataError, write_json
from resnet_fastai.engine.layout import list_photos
from resnet_fastai.engine.scores import wilson
from resnet_fastai.engine.weights import Weights, hash_of_tensors, scaled

crops = dict(size=32, min_side=32, max_side=44)                     # at 224: 224 to 308, so that a crop shows most of the photo
how = dict(bs=16, num_workers=0, n_out=None)
ways = {'from nothing': (dict(lr=.03, schedule='one_cycle'), lambda m, epochs: m.fit(epochs)),
        'from weights': ({}, lambda m, epochs: m.fine_tune(epochs - 1)),
        'from weights, BN of frozen layers fixed': (dict(train_bn=False), lambda m, epochs: m.fine_tune(epochs - 1))}


def published(file):
    "Weights that others trained on CIFAR-10, with the mean and std that they expect"
    net, mean, std = published_net(file), (.485, .456, .406), (.229, .224, .225)
    state = scaled(net.state_dict(), [1/s for s in std])                # our photos are not divided by std: the first layer does it
    depth = sum(p.ndim == 4 for p in net.parameters()) + 1
    return Weights(state, f'cifar_resnet{depth}', {}, mean, std, 32, {}, weights_of, hash_of_tensors(state), 'BSD-2-Clause', 'its author')


def class_names(photos):
    "The classes of {train,validation,test}/CLASS, or what is missing"
    named = {s: sorted(p.name for p in (photos/s).iterdir() if p.is_dir()) if (photos/s).is_dir() else [] for s in ('train', 'validation', 'test')}
    for s, names in named.items():
        if not names: raise DataError(f"{photos/s} has no class folders; the photos of PHOTOS belong in train/CLASS, validation/CLASS and test/CLASS")
        if names != named['train']: raise DataError(f"{photos/s} has other classes than {photos/'train'}")
    return named['train']


def some_of(photos, n, seed, dest):
    "n training photos, equally many of each class (or a list: how many of each), and all validation and test photos"
    classes = class_names(photos)
    for c, k in zip(classes, n if isinstance(n, list) else [n//len(classes)]*len(classes), strict=True):
        files = {s: sorted(list_photos(photos/s/c)) for s in ('train', 'validation', 'test')}
        files['train'] = random.Random(f'{seed} {c}').sample(files['train'], min(k, len(files['train'])))
        for split, some in files.items():
            (folder := dest/split/c).mkdir(parents=True)
            for f in some: (folder/f.name).symlink_to(f.resolve())
    return from_folders(dest, dest.with_name('layout'))


def train_and_test(photos, n, seed, epochs, fit, split, protocol, **kwargs):
    "Train on n photos and test on those of a split: what a run has found, and the seconds of training"
    start = time.process_time()
    with tempfile.TemporaryDirectory() as tmp:
        model = ResNet(*some_of(photos, n, seed, Path(tmp)/'some'), seed=seed, **kwargs)
        with model.learn.no_bar(), model.learn.no_logging(): fit(model, epochs)
        spent = time.process_time() - start
        t = model.evaluate(split=split, protocol=protocol).iloc[0]
    return dict(photos=n, seed=seed, epochs=len(model.history), error=float(t.top1_error), tested=int(t.photos),
                train_loss=round(float(model.history.train_loss.iloc[-1]), 4), cpu_seconds=round(spent, 1))


def one_run(photos, weights, way, n, epochs, seed, rate, split):
    "Train in one way on n photos; test with one crop"
    args, fit = ways[way]
    begin = dict(weights=weights) if 'weights' in way else dict(arch=weights.arch)
    given = args | ({} if rate is None else dict(lr=rate))
    return dict(way=way, rate=rate) | train_and_test(photos, n, seed, epochs, fit, split, '1crop@32', **crops, **how, **begin, **given)


def summary(runs):
    "For each way, rate and number of photos: mean error over seeds, its spread, and the 95 % interval for that many test photos"
    for (way, rate, n), r in pd.DataFrame(runs).groupby(['way', 'rate', 'photos'], sort=False, dropna=False):
        low, high = wilson(round(r.error.mean()*r.tested.iloc[0]), int(r.tested.iloc[0]))
        yield dict(way=way, rate=None if pd.isna(rate) else rate, photos=int(n), seeds=len(r), error=round(r.error.mean(), 4),
                   std=round(r.error.std(ddof=1), 4) if len(r) > 1 else None, low=round(low, 4), high=round(high, 4),
                   cpu_seconds=round(r.cpu_seconds.mean(), 1))


def curve(photos, weights, sizes=(50, 100, 200, 400), seeds=5, epochs=30, rates=(), out=None):
    "Train every way, size, seed (and rate); store the results after each run"
    class_names(photos)
    out = Path(out or Path(__file__).parent/'results'/f"fine_tuning{'_rates'*bool(rates)}.json")
    options = dict(sizes=sizes, epochs=[epochs], **(dict(rates=rates) if rates else {}))
    told = ' '.join(f"--{k} {' '.join(map(str, v))}" for k, v in options.items())
    command = f'python nbs/experiments/fine_tuning.py {photos.name} {weights.name} {told}'
    about = dict(command=command, weights=weights_of, crops=crops, bs=how['bs'])
    known = json.loads(out.read_text()) if out.exists() else {}
    runs = known['runs'] if all(known.get(k) == v for k, v in about.items()) else []
    done, from_ = {(r['seed'], r['photos'], r['way'], r['rate']) for r in runs}, published(weights)
    asked = list(ways)[:2] if rates else list(ways)
    for seed, n, way, rate in product(range(seeds), sizes, asked, rates or [None]):
        if (seed, n, way, rate) in done: continue
        runs.append(one_run(photos, from_, way, n, epochs, seed, rate, 'val' if rates else 'test'))
        print(runs[-1], flush=True)
        now = dict(commit=commit(__file__), machine=machine(), load=os.getloadavg()[1])
        write_json(out, about | now | dict(runs=runs, summary=list(summary(runs))))
    return runs


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('photos', type=Path)
    p.add_argument('weights', type=Path)
    p.add_argument('--sizes', type=int, nargs='+', default=[50, 100, 200, 400])
    p.add_argument('--seeds', type=int, default=5)
    p.add_argument('--epochs', type=int, default=30)
    p.add_argument('--rates', type=float, nargs='+', default=(), help='compare these learning rates on the validation photos')
    p.add_argument('--out', type=Path, help='default: nbs/experiments/results/fine_tuning.json, or fine_tuning_rates.json')
    try: runs = curve(**vars(p.parse_args(argv)))
    except DataError as e: sys.exit(f'{type(e).__name__}: {e}')
    print(pd.DataFrame(summary(runs)).to_string())


if __name__ == '__main__': main()
