"""Your few photos from nothing or from weights, and from nothing by which schedule? A ResNet-18, pretrained on enlarged CIFAR-10.

    python nbs/experiments/enlarged.py CIFAR10 PHOTOS

CIFAR10 is CIFAR-10 in any layout that cifar10.py reads, PHOTOS is {train,validation,test}/CLASS/*.jpg. First the network learns CIFAR-10, its
photos of 32 pixels enlarged to 66 to 96; that is kept in runs/enlarged and continued if it was interrupted. Then it is trained on draws of
PHOTOS in three ways, with as many epochs each. Rates are compared on validation/, with draws of their own, and each way then has its best one
on test/. Results go to results/enlarged.json after each run; the same command resumes with those that are missing."""
import argparse
import json
import os
import sys
import tempfile
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from cifar10 import cifar10, commit, machine, root
from fine_tuning import class_names, train_and_test
from resnet_fastai.core import ResNet
from resnet_fastai.data import from_folders
from resnet_fastai.engine.files import DataError, write_json
from what_helps import checksum, paired, shrunk

base = dict(size=64, augment='wide', num_workers=0, n_out=None, precision='bf16')
protocol = '1crop@80'                                               # the middle of what training sees
first = dict(arch='resnet18', bs=128, micro_bs=128, lr=.1, schedule='one_cycle')
ways = {'from nothing, plateau': (dict(arch='resnet18'), lambda m, epochs: m.fit(epochs)),
        'from nothing, one-cycle': (dict(arch='resnet18', schedule='one_cycle'), lambda m, epochs: m.fit(epochs)),
        'from weights': ({}, lambda m, epochs: m.fine_tune(epochs - 1))}


def as_folders(data, dest):
    "{train,validation}/CLASS/*.png of what `cifar10` has read; the test photos are the validation photos, and choose nothing"
    for split, folder in dict(train='train', test='validation').items():
        for c in data['classes']: (dest/folder/c).mkdir(parents=True)
        for i, (x, y) in enumerate(zip(*data[split])):
            Image.fromarray(np.asarray(x).transpose(1, 2, 0)).save(dest/folder/data['classes'][int(y)]/f'{i:05d}.png', compress_level=1)
    return from_folders(dest, dest.with_name('cifar10'))


def pretrained(cifar, folder, epochs):
    "A ResNet-18 of enlarged CIFAR-10 and the facts about it; trained where there is none, or not to the end"
    if (folder/'about.json').exists():
        if (about := json.loads((folder/'about.json').read_text()))['epochs'] == epochs: return ResNet.load(folder/'model'), about
        raise DataError(f"{folder} has a network of {about['epochs']} epochs, not {epochs}; name another folder with --keep")
    folder.mkdir(parents=True, exist_ok=True)
    data = cifar10(cifar)
    with tempfile.TemporaryDirectory() as tmp:
        model = ResNet(*as_folders(data, Path(tmp)/'folders'), seed=0, run_folder=folder/'run', every=100, **base | first)
        with model.learn.no_bar(): model.fit(epochs, resume=True)
        model.save(folder/'model')
    last = model.history.iloc[-1]
    about = dict(epochs=epochs, crops=base, **first, data=data['about'], test_photos=len(data['test'][1]), test_error=float(last.top1_error),
                 train_error=float(last.train_error), commit=commit(__file__), machine=machine())
    write_json(folder/'about.json', about)
    return model, about


def one_run(photos, weights, way, rate, n, epochs, seed, split):
    "Train one way on n photos; test with one crop"
    args, fit = ways[way]
    begin = dict(weights=weights) if way == 'from weights' else {}
    return dict(way=way, rate=rate, split=split) | train_and_test(photos, n, seed, epochs, fit, split, protocol, bs=16, lr=rate, **base, **begin, **args)


def best_rates(runs):
    "Of each way the rate with the fewest errors on the validation photos"
    seen = pd.DataFrame([r for r in runs if r['split'] == 'val'])
    mean = seen.groupby(['way', 'rate']).error.mean()
    return {way: float(mean[way].idxmin()) for way in ways}


def summary(runs):
    "Each way on the test photos, at its best rate: mean error, and the difference to the others on the same draws, with 95 % intervals"
    best = best_rates(runs)
    found = pd.DataFrame([r for r in runs if r['split'] == 'test' and r['rate'] == best[r['way']]])
    errors = found.pivot(index='seed', columns='way', values='error')
    for way, r in found.groupby('way', sort=False):
        mean = paired(errors[way].dropna())
        row = dict(way=way, rate=float(r.rate.iloc[0]), draws=len(r), error=mean['difference'], low=mean['low'], high=mean['high'],
                   train_loss=r.train_loss.mean(), cpu_seconds=r.cpu_seconds.mean())
        for other in ways:
            if other != way and other in errors: row[f'minus {other}'] = list(paired((errors[way] - errors[other]).dropna()).values())
        yield {k: [round(float(x), 4) for x in v] if isinstance(v, list) else round(v, 4) if isinstance(v, float) else v for k, v in row.items()}


def compare(cifar, photos, pretrain_epochs=15, n=400, seeds=5, epochs=20, rates=(.003, .01, .03, .1), out=None, keep=root/'runs'/'enlarged'):
    "Pretrain, look for rates, and compare; the results are stored after each run"
    out = Path(out or Path(__file__).parent/'results'/'enlarged.json')
    class_names(photos)                                              # before an hour of pretraining
    model, told = pretrained(cifar, keep, pretrain_epochs)
    command = (f'python nbs/experiments/enlarged.py {cifar.name} {photos.name} --pretrain-epochs {pretrain_epochs} --photos-drawn {n} '
               f"--epochs {epochs} --rates {' '.join(map(str, rates))}")
    about = dict(pretrained=told, crops=base, protocol=protocol, data_sha256=checksum(photos), photos=n, epochs=epochs)
    known = json.loads(out.read_text()) if out.exists() else {}
    runs = known['runs'] if all(known.get(k) == v for k, v in about.items()) else []

    def go(small, way, rate, seed, split):
        if any((r['way'], r['rate'], r['seed'], r['split']) == (way, rate, seed, split) for r in runs): return
        runs.append(one_run(small, model, way, rate, n, epochs, seed, split))
        print(runs[-1], flush=True)
        now = dict(command=command, commit=commit(__file__), machine=machine(), load=os.getloadavg()[1])
        write_json(out, about | now | dict(runs=runs, summary=list(summary(runs)) if split == 'test' else []))

    with tempfile.TemporaryDirectory() as tmp:
        small = shrunk(photos, Path(tmp)/'small')
        for seed, way, rate in product((100, 101), ways, rates): go(small, way, rate, seed, 'val')
        best = best_rates(runs)
        for seed, way in product(range(seeds), ways): go(small, way, best[way], seed, 'test')
    return runs


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('cifar', type=Path)
    p.add_argument('photos', type=Path)
    p.add_argument('--pretrain-epochs', type=int, default=15)
    p.add_argument('--photos-drawn', type=int, default=400, dest='n')
    p.add_argument('--seeds', type=int, default=5)
    p.add_argument('--epochs', type=int, default=20)
    p.add_argument('--rates', type=float, nargs='+', default=(.003, .01, .03, .1))
    p.add_argument('--out', type=Path, help='default: nbs/experiments/results/enlarged.json')
    p.add_argument('--keep', type=Path, default=root/'runs'/'enlarged', help='where the pretrained network goes; default: runs/enlarged')
    try: runs = compare(**vars(p.parse_args(argv)))
    except DataError as e: sys.exit(f'{type(e).__name__}: {e}')
    print(pd.DataFrame(summary(runs)).to_string())


if __name__ == '__main__': main()
