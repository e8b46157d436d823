"""What helps few photos? Fine-tune on the same draws of photos with one thing changed at a time, and compare draw by draw.

    python nbs/experiments/what_helps.py PHOTOS resnet20.th          # {train,validation,test}/CLASS/*.jpg, and a file of cifar10.py's `weights_of`

The first ways have as many photos of each class, the others ten times as many of the largest class as of the smallest. All are tested by one
crop on the photos of validation/ and test/, which have as many of each class and choose nothing here: the error is the balanced error.
Photos are shrunk once, since no crop here is taken from a short side above 69 pixels. Results go to results/what_helps.json, after each run;
the same command goes on with those that are missing."""
import argparse
import hashlib
import json
import os
import random
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import t as student

from cifar10 import commit, machine, weights_of
from fine_tuning import class_names, how, published, some_of
from resnet_fastai.augment import resize_short
from resnet_fastai.core import ResNet
from resnet_fastai.engine.files import DataError, write_json
from resnet_fastai.engine.layout import list_photos
from resnet_fastai.engine.photo import open_photo

base, protocol = dict(size=32, augment='wide'), '1crop@37'              # 37: all crops here have seen objects of that size
ways = {'even': {'nothing': {}, "augment='paper'": dict(augment='paper'), 'label_smoothing=.1': dict(label_smoothing=.1), 'mixup=.4': dict(mixup=.4),
                 'cutmix=1': dict(cutmix=1), 'ema=.999': dict(ema=.999)},
        'uneven': {'nothing': {}, "balance='sampler'": dict(balance='sampler'), "balance='loss'": dict(balance='loss')}}


def class_sizes(draw, n, seed, classes=10, ratio=10):
    "How many training photos of each class: all the same, or falling by the same factor from class to class, in an order of their own for each seed"
    if draw == 'even': return [n//classes]*classes
    shares = [ratio**(-i/(classes - 1)) for i in range(classes)]
    sizes = [round(n/5*s) for s in shares]                             # of 200 photos: 40 to 4
    random.Random(f'order {seed}').shuffle(sizes)
    return sizes


def shrunk(photos, dest, side=96):
    "The same photos without loss, their short side `side` pixels"
    for p in list_photos(photos):
        (file := (dest/p.relative_to(photos)).with_suffix('.png')).parent.mkdir(parents=True, exist_ok=True)
        resize_short(open_photo(p), side).save(file, compress_level=1)
    return dest


def checksum(photos):
    "SHA-256 of all photos and their places"
    sha = hashlib.sha256()
    for p in sorted(photos.rglob('*')):
        if p.is_file(): sha.update(f'{p.relative_to(photos).as_posix()}\0'.encode() + hashlib.sha256(p.read_bytes()).digest())
    return sha.hexdigest()


def one_run(photos, weights, draw, way, n, epochs, seed):
    "Fine-tune one way; the error of each class, on the photos that were not trained on"
    start, sizes = time.process_time(), class_sizes(draw, n, seed)
    with tempfile.TemporaryDirectory() as tmp:
        paths = some_of(photos, sizes, seed, Path(tmp)/'some')
        model = ResNet(*paths, weights=weights, seed=seed, **how, **base | ways[draw][way])
        with model.learn.no_bar(), model.learn.no_logging(): model.fine_tune(epochs - 1)
        told = pd.concat([model.evaluate(split=s, protocol=protocol, per_class=True) for s in ('val', 'test')])
    wrong = (told.top1_error*told.photos).groupby(told.label).sum().sort_index()
    tested = told.groupby('label').photos.sum().sort_index()
    small = np.array(sizes) <= np.median(sizes)
    return dict(draw=draw, way=way, seed=seed, photos=sum(sizes), tested=int(tested.sum()), error=float((wrong/tested).mean()),
                small=float((wrong/tested)[small].mean()) if draw == 'uneven' else None, train_loss=round(float(model.history.train_loss.iloc[-1]), 4),
                valid_loss=round(float(model.history.valid_loss.iloc[-1]), 4), cpu_seconds=round(time.process_time() - start, 1))


def paired(diff):
    "Mean of differences, and the 95 % interval of Student's t"
    half = student.ppf(.975, len(diff) - 1)*diff.std(ddof=1)/len(diff)**.5 if len(diff) > 1 else float('nan')
    return dict(difference=diff.mean(), low=diff.mean() - half, high=diff.mean() + half)


def summary(runs):
    "Each way: mean error over the draws, of all classes and of the smaller half of uneven ones, and what it is above or below 'nothing' on the same draws"
    found = pd.DataFrame(runs)
    for (draw, way), _ in found.groupby(['draw', 'way'], sort=False):
        r, plain = (found[(found.draw == draw) & (found.way == w)].set_index('seed') for w in (way, 'nothing'))
        row = dict(draw=draw, way=way, draws=len(r))
        for name in ('error', 'small') if draw == 'uneven' else ('error',):
            row[name] = r[name].mean()
            diff = (r[name] - plain[name]).dropna()
            if way != 'nothing' and len(diff): row |= {k if name == 'error' else f'{name}_{k}': v for k, v in paired(diff).items()}
        yield {k: round(float(v), 4) if isinstance(v, float) else v for k, v in row.items() if v == v} | dict(cpu_seconds=round(r.cpu_seconds.mean(), 1))


def compare(photos, weights, photos_drawn=200, seeds=5, epochs=20, out=None):
    "Every way and seed; written after each run"
    class_names(photos)
    from_ = published(weights)
    with tempfile.TemporaryDirectory() as tmp: return _compare(photos, shrunk(photos, Path(tmp)/'small'), weights, from_, photos_drawn, seeds, epochs, out)


def _compare(photos, small, weights, from_, photos_drawn, seeds, epochs, out):
    out = Path(out or Path(__file__).parent/'results'/'what_helps.json')
    about = dict(command=f'python nbs/experiments/what_helps.py {photos.name} {weights.name} --photos-drawn {photos_drawn} --epochs {epochs}',
                 weights=weights_of, base=base, bs=how['bs'], protocol=protocol, data_sha256=checksum(photos),
                 weights_sha256=hashlib.sha256(weights.read_bytes()).hexdigest())
    known = json.loads(out.read_text()) if out.exists() else {}
    runs = known['runs'] if all(known.get(k) == v for k, v in about.items()) else []
    done = {(r['seed'], r['draw'], r['way']) for r in runs}
    for seed, (draw, way) in product(range(seeds), [(d, w) for d in ways for w in ways[d]]):
        if (seed, draw, way) in done: continue
        runs.append(one_run(small, from_, draw, way, photos_drawn, epochs, seed))
        print(runs[-1], flush=True)
        write_json(out, about | dict(commit=commit(__file__), machine=machine(), load=os.getloadavg()[1], runs=runs, summary=list(summary(runs))))
    return runs


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('photos', type=Path)
    p.add_argument('weights', type=Path)
    p.add_argument('--photos-drawn', type=int, default=200, help='training photos of a draw; fewer in the uneven ones')
    p.add_argument('--seeds', type=int, default=5)
    p.add_argument('--epochs', type=int, default=20, help='the first of them with the head alone')
    p.add_argument('--out', type=Path, help='default: nbs/experiments/results/what_helps.json')
    try: runs = compare(**vars(p.parse_args(argv)))
    except DataError as e: sys.exit(f'{type(e).__name__}: {e}')
    print(pd.DataFrame(summary(runs)).to_string())


if __name__ == '__main__': main()
