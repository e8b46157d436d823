"""The degradation problem in a minute: deeper plain nets end at a larger *training* error, deeper residual nets do not.

    python nbs/experiments/degradation.py            # three seeds; --jobs 2: two runs at the same time

Plain and residual nets of 8, 20 and 44 layers learn to classify eight drawn textures. Six nets take about a minute on two idle
cores. Every run is stored in results/degradation.json with its losses and errors, the command, the commit and the machine."""
import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.torch_core import set_seed
from PIL import ImageOps

from resnet_fastai.engine.demo_photos import draw_photo
from resnet_fastai.engine.files import write_json
from resnet_fastai.training import MultiStepLR, WarmUp, resnet_learner

textures = 'stripes', 'checks', 'dots', 'rings', 'bricks', 'zigzag', 'weave', 'mesh'
kinds, depths, seeds = ('plain', 'resnet'), (8, 20, 44), (0, 1, 2)
side, train_photos, test_photos = 24, 1200, 400
bs, epochs, lr = 48, 10, .02                                         # 25 updates an epoch, 250 in all
warm = 50                                                            # updates at a tenth of the rate, the same for every net
stored = Path(__file__).parent/'results'/'degradation.json'


# --- Photos

def drawn_photos(
    n:int, # Photos, equally many of each texture
    seed:int, # Of the drawings
) -> tuple: # (n,3,24,24) RGB in [0,1], (n,) numbers of textures
    "Photos of drawn textures: the central square, resized"
    rng = np.random.default_rng(seed)
    x = [np.asarray(ImageOps.fit(draw_photo(textures[i % 8], rng), (side, side))) for i in range(n)]
    return torch.from_numpy(np.stack(x)).permute(0, 3, 1, 2)/255, torch.arange(n) % 8


def drawn_dls() -> DataLoaders:
    "Batches of training and of test photos, the training photos' mean at each pixel subtracted"
    (x, y), (tx, ty) = drawn_photos(train_photos, seed=0), drawn_photos(test_photos, seed=1)
    mean = x.mean(0)
    dls = DataLoaders.from_dsets([*zip(x - mean, y)], [*zip(tx - mean, ty)], bs=bs, num_workers=0, device='cpu')
    dls.vocab = list(textures)
    return dls


# --- A run

class MeanLoss(Callback):
    "Store the mean loss of an epoch's updates as `train_loss`, instead of the recorder's moving average"
    order = 52                                                       # after the history has written the epoch's row
    def before_train(self): self.losses = []
    def after_loss(self):
        if self.training: self.losses.append(self.loss.item())
    def after_epoch(self): self.history.rows[-1]['train_loss'] = sum(self.losses)/len(self.losses)


def train(
    dls:DataLoaders, # From `drawn_dls`
    kind:str, # 'plain' or 'resnet'
    depth:int, # Layers, 6n+2
    seed:int=0, # Of the weights and of the order of the photos
    lr:float=lr, # Rate after the warm-up
    warm_up:bool=True, # Start with a tenth of it
    weights:dict|None=None, # A state dict to start from; None: random weights
) -> dict: # kind, depth, seed, lr, warm_up, and epochs: a row for each
    "Train one net by a short form of the paper's recipe: a warm-up, a constant rate, and a tenth of it in the last quarter"
    set_seed(seed)
    dls.train.rng.seed(seed)
    total = epochs*len(dls.train)
    cbs = [MeanLoss(), *([WarmUp(lr/10, until=1.01, window=warm)] if warm_up else [])]     # any error is below 101 %
    learn = resnet_learner(dls, f'cifar_{kind}{depth}', bs=bs, lr=lr, schedule=MultiStepLR(updates=(total*3//4,)), cbs=cbs)
    if weights: learn.model.load_state_dict(weights)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs)
    rows = [dict(updates=(r['epoch'] + 1)*len(dls.train), train_loss=round(r['train_loss'], 4), train_error=round(r['train_error'], 4),
                 test_error=round(r['top1_error'], 4)) for r in learn.history.rows]
    return dict(kind=kind, depth=depth, seed=seed, lr=lr, warm_up=warm_up, epochs=rows)


@cache
def dls_of_process(): return drawn_dls()                            # drawn once in each process


def run_one(task):
    "Train one net, and print its result"
    seed, (kind, depth, rate, warm_up) = task
    run = train(dls_of_process(), kind, depth, seed, rate, warm_up)
    last = run['epochs'][-1]
    print(f"seed {seed}, {kind}-{depth}, rate {rate}{'' if warm_up else ' without a warm-up'}: training loss {last['train_loss']:.2f}, "
          f"training error {last['train_error']:.1%}, test error {last['test_error']:.1%}", flush=True)
    return run


def train_all(
    seeds=seeds,
    settings=[(kind, depth, lr, True) for kind in kinds for depth in depths], # Of (kind, depth, rate, with a warm-up?)
    jobs:int=1, # Processes
) -> list: # Of dicts, from `train`
    "Train every setting with every seed"
    tasks = [(seed, setting) for setting in settings for seed in seeds]
    if jobs == 1: return [run_one(t) for t in tasks]
    with ProcessPoolExecutor(jobs, get_context('spawn'), torch.set_num_threads, (1,)) as pool: return [*pool.map(run_one, tasks)]


# --- Results

def as_table(
    runs:list, # Of dicts, from `train`
) -> pd.DataFrame: # A row an epoch of a run
    "All epochs of all runs"
    return pd.DataFrame([{k: r[k] for k in ('kind', 'depth', 'seed', 'lr', 'warm_up')} | e for r in runs for e in r['epochs']])


def read_runs(
    file:Path=stored, # JSON, made by this script
) -> pd.DataFrame: # A row an epoch of a run
    "The stored runs"
    return as_table(json.loads(Path(file).read_text(encoding='utf-8'))['runs'])


def plot_errors(
    table:pd.DataFrame, # From `as_table` or `read_runs`
) -> plt.Figure: # Plain nets on the left, residual ones on the right
    "Error against updates, as in the paper's Figures 1 and 6: training thin, test bold; the band is the range of the training error"
    table = table.query('lr == @lr and warm_up')
    fig, axs = plt.subplots(1, 2, figsize=(8, 3.3), sharey=True, layout='constrained')
    for ax, kind in zip(axs, kinds):
        ends = []
        for depth, color in zip(depths, ('#009E73', '#0072B2', '#D55E00')):
            by_update = table.query('kind == @kind and depth == @depth').groupby('updates')
            thin, bold = (100*by_update[key].agg(['mean', 'min', 'max']) for key in ('train_error', 'test_error'))
            ax.plot(bold['mean'], color=color, lw=3, alpha=.9, label=f'{depth} layers')
            ax.plot(thin['mean'], color=color, lw=1)
            ax.fill_between(thin.index, thin['min'], thin['max'], color=color, alpha=.15, lw=0)
            ends.append(thin['mean'].iloc[-1])
        name = 'residual' if kind == 'resnet' else kind
        ax.set_title(f"{name}: training error {' → '.join(f'{e:.1f}' for e in ends)} %", fontsize=11)
        ax.set_xlabel('updates'); ax.grid(alpha=.3)
    axs[0].set_ylabel('error, %: training thin, test bold'); axs[0].set_ylim(0, 95); axs[1].legend()
    fig.suptitle('More layers make plain nets worse, even on their training photos; residual nets no worse', fontsize=12)
    return fig


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, nargs='+', default=seeds)
    p.add_argument('--out', type=Path, default=stored, help='the JSON file; default: nbs/experiments/results/degradation.json')
    p.add_argument('--jobs', type=int, default=1, help='runs at the same time, each in a process with one thread; 1: all threads')
    args = p.parse_args(argv)
    from cifar10 import commit, machine                              # beside this script; lessons that import this one lack the path
    start, command = time.time(), 'python nbs/experiments/degradation.py'
    if args.jobs > 1: command += f' --jobs {args.jobs}'
    if tuple(args.seeds) != seeds: command += f" --seeds {' '.join(map(str, args.seeds))}"
    runs = train_all(args.seeds, jobs=args.jobs)
    write_json(args.out, dict(command=command, commit=commit(__file__), machine=machine(), seconds=round(time.time() - start), runs=runs))


if __name__ == '__main__': main()
