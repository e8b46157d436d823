"""Tables 2 and 3 of the paper in small: ImageNet's networks of 18 and 34 layers on CIFAR-10, plain and with shortcuts of each kind.

    python nbs/experiments/shortcuts.py CIFAR10                      # six nets, five seeds; CIFAR10 as for cifar10.py

Photos keep their 32×32 pixels: the first stage sees 8×8, the last one 1×1. Crops, flips, optimiser and rate are the library's, the rate
falls to a tenth in the last quarter. Every run is stored in results/shortcuts.json as soon as it is done; the same command adds
those that are missing."""
import argparse
import json
import sys
import time
from itertools import combinations, product
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from fastai.callback.core import Callback
from fastai.torch_core import set_seed
from scipy.stats import t as student

from cifar10 import LastUpdate, cifar10, cifar_dls, commit, epochs, machine
from resnet_fastai.engine.files import DataError, write_json
from resnet_fastai.model import count_params
from resnet_fastai.training import MultiStepLR, resnet_learner

stored = Path(__file__).parent/'results'/'shortcuts.json'
nets = {'plain-18': (18, 'none'), 'plain-34': (34, 'none'), 'ResNet-18 A': (18, 'A'),
        'ResNet-34 A': (34, 'A'), 'ResNet-34 B': (34, 'B'), 'ResNet-34 C': (34, 'C')}
paper = {'plain-18': 27.94, 'plain-34': 28.54, 'ResNet-18 A': 27.88,      # top-1 error, %, 10 crops: Tables 2 and 3
         'ResNet-34 A': 25.03, 'ResNet-34 B': 24.52, 'ResNet-34 C': 24.19}
bs, window = 64, 50                                                 # photos in an update; updates that a point of the curve is the mean of


class Curve(Callback):
    "Mean loss and error of the training batches, of so many updates each"
    def __init__(self): self.seen, self.rows = [], []
    def after_loss(self):
        if not self.training: return
        self.seen.append((self.loss.item(), (self.pred.argmax(1) != self.y).float().mean().item()))
        if len(self.seen) == window:
            loss, error = torch.tensor(self.seen).mean(0).tolist()
            self.rows.append(dict(updates=window*(len(self.rows) + 1), train_loss=round(loss, 4), train_error=round(error, 4)))
            self.seen = []


def train(
    data:dict, # From `cifar10`
    name:str, # One of `nets`
    updates:int, # Of the run
    seed:int, # Of the weights and of the order of the photos
) -> dict: # net, seed, test_error, parameters, seconds, and curve: a row for each `window` updates
    "Train a net by the library's recipe, and test it on the test photos"
    start, (depth, shortcut) = time.process_time(), nets[name]
    dls, curve = cifar_dls(data, bs), Curve()
    set_seed(seed)
    dls.train.rng.seed(seed)
    arch = dict(arch=f'plain{depth}') if shortcut == 'none' else dict(arch=f'resnet{depth}', shortcut=shortcut)
    learn = resnet_learner(dls, **arch, bs=bs, schedule=MultiStepLR(updates=(updates*3//4,)), cbs=[LastUpdate(updates), curve])
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs(dls, updates))
    return dict(net=name, seed=seed, test_error=round(learn.history.rows[-1]['top1_error'], 4), parameters=count_params(learn.model),
                seconds=round(time.process_time() - start), curve=curve.rows)


def train_all(folder, updates=600, seeds=range(5), out=stored):
    "Every net with every seed; written after each run"
    data = cifar10(folder)
    about = dict(command=f"python nbs/experiments/shortcuts.py CIFAR10 --updates {updates}", data=data['about'], updates=updates, bs=bs)
    known = json.loads(out.read_text()) if out.exists() else {}
    runs = known['runs'] if all(known.get(k) == json.loads(json.dumps(v)) for k, v in about.items()) else []
    for seed, name in product(seeds, nets):
        if any((r['seed'], r['net']) == (seed, name) for r in runs): continue
        runs.append(train(data, name, updates, seed))
        last = runs[-1]['curve'][-1]
        print(f"seed {seed}, {name}: training error {last['train_error']:.1%}, test error {runs[-1]['test_error']:.1%}, "
              f"{runs[-1]['seconds']} s", flush=True)
        write_json(out, about | dict(commit=commit(__file__), machine=machine(), runs=runs))
    return runs


# --- What it shows

def read_runs(
    file:Path=stored, # JSON, made by this script
) -> pd.DataFrame: # A row a run: net, seed, train_error, test_error, %, parameters
    "The stored runs, at their ends"
    runs = json.loads(Path(file).read_text(encoding='utf-8'))['runs']
    return pd.DataFrame([dict(net=r['net'], seed=r['seed'], parameters=r['parameters'], train_error=100*r['curve'][-1]['train_error'],
                              test_error=100*r['test_error']) for r in runs])


def ends(
    table:pd.DataFrame, # From `read_runs`
) -> pd.DataFrame: # A row a net: seeds, train and test error (mean and half of the 95 % interval over seeds), the paper's
    "Mean error of each net, with the interval that its seeds leave"
    rows = {}
    for name, r in table.groupby('net', sort=False):
        rows[name] = dict(parameters=f'{r.parameters.iloc[0]/1e6:.2f} M', seeds=len(r))
        for column in ('train_error', 'test_error'): rows[name][column] = f'{r[column].mean():.1f} ± {half_interval(r[column]):.1f}'
        rows[name]['paper'] = paper[name]
    columns = {'train_error': 'training error, %', 'test_error': 'test error, %', 'paper': 'paper, %'}
    return pd.DataFrame(rows).T.rename(columns=columns)


def half_interval(x):
    "Half of Student's 95 % interval of a mean"
    return student.ppf(.975, len(x) - 1)*x.std(ddof=1)/len(x)**.5


def differences(
    table:pd.DataFrame, # From `read_runs`
    column:str='test_error', # Or 'train_error'
    pairs=[*combinations(('plain-18', 'plain-34', 'ResNet-18 A', 'ResNet-34 A'), 2)], # Of names
) -> pd.DataFrame: # A row a pair: mean difference in percent points and half of its 95 % interval, seeds paired
    "Differences of errors between nets that were trained with the same seeds"
    by = table.pivot(index='seed', columns='net', values=column)
    rows = {f'{a} − {b}': (by[a] - by[b]).dropna() for a, b in pairs}
    return pd.DataFrame({k: {'difference': f'{d.mean():+.1f} ± {half_interval(d):.1f}', 'seeds': len(d)} for k, d in rows.items()}).T


def plot_curves(
    file:Path=stored, # JSON, made by this script
) -> plt.Figure: # Plain nets and their residual twins on the left, the options of ResNet-34 on the right
    "Training error against updates, mean of the seeds; bands hold them all"
    runs = json.loads(Path(file).read_text(encoding='utf-8'))['runs']
    rows = pd.DataFrame([dict(net=r['net'], seed=r['seed'], **e) for r in runs for e in r['curve']])
    fig, axs = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True, layout='constrained')
    styles = {'plain-18': ('#D55E00', '--'), 'plain-34': ('#D55E00', '-'), 'ResNet-18 A': ('#0072B2', '--'), 'ResNet-34 A': ('#0072B2', '-'),
              'ResNet-34 B': ('#009E73', '-'), 'ResNet-34 C': ('#CC79A7', '-')}
    for ax, names in zip(axs, ([*nets][:4], ['plain-34', *[*nets][3:]])):
        for name in names:
            errors = 100*rows[rows.net == name].groupby('updates').train_error.agg(['mean', 'min', 'max'])
            color, dash = styles[name]
            ax.plot(errors['mean'], dash, color=color, lw=2, label=f"{name}: {errors['mean'].iloc[-1]:.1f} %")
            ax.fill_between(errors.index, errors['min'], errors['max'], color=color, alpha=.15, lw=0)
        ax.set_xlabel('updates'); ax.legend(fontsize=9); ax.grid(alpha=.3)
    axs[0].set(ylabel='training error, %', ylim=(100*rows.train_error.min() - 25, None))     # room for the names
    return fig


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', type=Path, help='CIFAR-10, as for cifar10.py')
    p.add_argument('--updates', type=int, default=600, help='of each run')
    p.add_argument('--seeds', type=int, default=5, help='runs of each net; more seeds are added to those that are stored')
    p.add_argument('--out', type=Path, default=stored, help='the JSON file; default: nbs/experiments/results/shortcuts.json')
    p.add_argument('--threads', type=int, help='of the processor; default: all')
    args = vars(p.parse_args(argv))
    if n := args.pop('threads'): torch.set_num_threads(n)
    try: train_all(args.pop('folder'), **args | dict(seeds=range(args['seeds'])))
    except DataError as e: sys.exit(f'{type(e).__name__}: {e}')


if __name__ == '__main__': main()
