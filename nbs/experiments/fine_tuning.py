"""Does it help to start from weights? Train on CIFAR-10 without loss, enlarged; then fine-tune on a folder of photos, against training from scratch.

    python nbs/experiments/fine_tuning.py pretrain CIFAR WEIGHTS      # a folder whose read.py gives CIFAR-10's pixels → a saved model
    python nbs/experiments/fine_tuning.py compare PHOTOS WEIGHTS      # {train,val,test}/CLASS/*.jpg; results/fine_tuning.json"""
import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from PIL import Image

from cifar10 import commit, machine
from resnet_fastai.core import ResNet
from resnet_fastai.data import from_folders
from resnet_fastai.engine.files import DataError, write_json
from resnet_fastai.engine.scores import wilson
from resnet_fastai.inference import evaluate

crops = dict(size=64, min_side=64, max_side=88)                         # of 224, 224 to 308: a crop shows most of the photo
quick = dict(num_workers=0, bs=32, precision=None)


def cifar_folder(source, dest, n_train):
    "CIFAR-10 as PNG files in this project's layout; the first `n_train` photos of the training set, and 1,000 of the test set for validation"
    spec = importlib.util.spec_from_file_location('read', Path(source)/'read.py')
    read = importlib.util.module_from_spec(spec); spec.loader.exec_module(read)
    data, labels = read.load(), {}
    for split, x, y, n in (('train', data['x'], data['y'], n_train), ('val', data['tx'], data['ty'], 1000)):
        (dest/split).mkdir(parents=True)
        for i in range(n):
            labels[f'{split}{i:05}'] = data['classes'][y[i]]
            Image.fromarray(x[i]).save(dest/split/f'{split}{i:05}.png', compress_level=1)
    write_json(dest/'labels.json', labels)
    write_json(dest/'encoding.json', {c: i for i, c in enumerate(data['classes'])})
    return dest, dest/'labels.json', dest/'encoding.json'


def quietly(model, fit):
    "Fit without a bar; (history, seconds)"
    start = time.perf_counter()
    with model.learn.no_bar(), model.learn.no_logging(): history = fit(model)
    return history, time.perf_counter() - start


def pretrain(source, weights, photos=20_000, epochs=4, lr=.05, seed=0):
    "A ResNet-18 on enlarged CIFAR-10, saved; what it came to lies beside it"
    paths = cifar_folder(source, Path(tempfile.mkdtemp())/'cifar', photos)
    model = ResNet(*paths, arch='resnet18', n_out=10, lr=lr, seed=seed, schedule='one_cycle', **crops, **quick)
    history, seconds = quietly(model, lambda m: m.fit(epochs))
    model.save(weights)
    command = f'python nbs/experiments/fine_tuning.py pretrain cifar10 weights --photos {photos} --epochs {epochs} --lr {lr} --seed {seed}'
    write_json(Path(weights)/'pretraining.json', dict(command=command, commit=commit(__file__), photos=photos, epochs=epochs, lr=lr, seed=seed,
                                                      seconds=round(seconds, 1), history=history.round(5).to_dict('records')))
    return history


ways = {'scratch, plateau': (dict(arch='resnet18', n_out=None), lambda m, epochs: m.fit(epochs)),
        'scratch, one cycle': (dict(arch='resnet18', n_out=None, schedule='one_cycle', lr=.05), lambda m, epochs: m.fit(epochs)),
        'fine_tune': (dict(), lambda m, epochs: m.fine_tune(epochs - 1)),
        'fine_tune, BN of frozen layers fixed': (dict(train_bn=False), lambda m, epochs: m.fine_tune(epochs - 1))}


def one_run(paths, weights, way, epochs, seed, lr=None):
    "Train one way with one seed; test by one crop at the shortest side of the training, and by the usual 50"
    args, fit = ways[way]
    args = args | (dict(weights=weights) if way.startswith('fine') else {}) | ({} if lr is None else dict(lr=lr))
    model = ResNet(*paths, seed=seed, **crops, **quick, **args)
    history, seconds = quietly(model, lambda m: fit(m, epochs))
    protocols = [f"1crop@{crops['min_side']}", '50crop']
    with model.learn.no_bar():
        tested = {split: evaluate(model, split, protocols) for split in ('val', 'test')}
    row = dict(way=way, seed=seed, epochs=len(history), lr=float(model.learn.lr if lr is None else lr), seconds=round(seconds, 1))
    for split, t in tested.items(): row |= {f'{split}_error_{p}': round(float(e), 5) for p, e in zip(('1crop', '50crop'), t.top1_error)}
    return row | dict(tested=int(tested['test'].photos[0]))


def summary(rows):
    "Each way: mean test error over the seeds, their spread, and the 95 % interval that the number of photos leaves"
    for way, r in pd.DataFrame(rows).groupby('way', sort=False):
        mean, n = r.test_error_1crop.mean(), int(r.tested.iloc[0])
        low, high = wilson(round(mean*n), n)
        yield dict(way=way, seeds=len(r), test_error=round(mean, 4), seeds_std=round(r.test_error_1crop.std(ddof=1), 4) if len(r) > 1 else None,
                   low=round(low, 4), high=round(high, 4), test_error_50crop=round(r.test_error_50crop.mean(), 4), seconds=round(r.seconds.mean(), 1))


def compare(photos, weights, epochs=10, seeds=3, out=None, only=None):
    "Every way, every seed; written after each run"
    paths = from_folders(photos, Path(tempfile.mkdtemp())/'photos')
    out, rows, chosen = Path(out or Path(__file__).parent/'results'/'fine_tuning.json'), [], only or list(ways)
    command = f'python nbs/experiments/fine_tuning.py compare {Path(photos).name} weights --epochs {epochs} --seeds {seeds}'
    for seed in range(seeds):
        for way in chosen:
            rows.append(one_run(paths, weights, way, epochs, seed))
            print(rows[-1], flush=True)
            write_json(out, dict(command=command, commit=commit(__file__), machine=machine(), load=os.getloadavg()[1], crops=crops, bs=quick['bs'],
                                 pretraining=json.loads((Path(weights)/'pretraining.json').read_text()), runs=rows, summary=list(summary(rows))))
    return rows


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = p.add_subparsers(required=True)
    a = sub.add_parser('pretrain'); a.set_defaults(run=pretrain)
    a.add_argument('source'); a.add_argument('weights')
    for name, kind, default in (('photos', int, 20_000), ('epochs', int, 4), ('lr', float, .05), ('seed', int, 0)): a.add_argument(f'--{name}', type=kind, default=default)
    b = sub.add_parser('compare'); b.set_defaults(run=compare)
    b.add_argument('photos'); b.add_argument('weights'); b.add_argument('--out', type=Path)
    for name, kind, default in (('epochs', int, 10), ('seeds', int, 3)): b.add_argument(f'--{name}', type=kind, default=default)
    args = vars(p.parse_args(argv))
    try: found = args.pop('run')(**args)
    except DataError as e: sys.exit(f'{type(e).__name__}: {e}')
    print(pd.DataFrame(found).to_string())


if __name__ == '__main__': main()
