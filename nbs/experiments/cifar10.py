"""Train a network of the paper's CIFAR-10 family by the paper's recipe (§4.2), and keep every epoch in a JSON file.

    python nbs/experiments/cifar10.py CIFAR10 --depth 20                       # the paper's 64,000 updates
    python nbs/experiments/cifar10.py CIFAR10 --depth 20 --updates 2000        # the same recipe, 32 times shorter

CIFAR10 is a folder `{train,test}/CLASS/*.jpg` of 32×32 photos. The same command again goes on with a run that was stopped."""
import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.external import fastai_path
from fastai.data.load import DataLoader
from fastai.torch_core import default_device, set_seed

from resnet_fastai.data import LabelMap, demo_data
from resnet_fastai.engine.files import DataError, PhotoError, atomic_write, write_json
from resnet_fastai.engine.layout import list_photos
from resnet_fastai.engine.photo import open_photo
from resnet_fastai.model import count_macs, count_params
from resnet_fastai.training import Checkpoint, MultiStepLR, WarmUp, resnet_learner

root = Path(__file__).resolve().parents[2]
paper_updates, paper_bs = 64_000, 128                                # §4.2


# --- Photos

def read_split(folder):
    "Photos (N,3,32,32) of 8 bits, the class of each, and the names of the classes"
    paths = list_photos(folder)
    if not paths: raise DataError(f"{folder} holds no photos; CIFAR-10 is needed as {{train,test}}/CLASS/*.jpg")
    classes = sorted({p.parent.name for p in paths})
    x = np.stack([_pixels(p) for p in paths]).transpose(0, 3, 1, 2)
    return torch.from_numpy(x.copy()), torch.tensor([classes.index(p.parent.name) for p in paths]), classes


def _pixels(path):
    img = np.asarray(open_photo(path))
    if img.shape == (32, 32, 3): return img
    raise PhotoError(f"{path} has {img.shape[1]}×{img.shape[0]} pixels; CIFAR-10 has 32×32")


def cifar10(
    folder:str|Path, # `{train,test}/CLASS/*.jpg`
    cache:str|Path|None=None, # Where the decoded photos are kept; None: fastai's data folder
) -> dict: # train and test: (photos (N,3,32,32) of 8 bits, classes (N,)); classes: their names
    "All of CIFAR-10 in memory; decoded once, and read from one file from then on"
    files = [p for s in ('train', 'test') for p in list_photos(Path(folder)/s)]
    what = '\n'.join(f'{p.relative_to(folder)} {p.stat().st_size} {p.stat().st_mtime_ns}' for p in files)
    file = Path(cache or fastai_path('data'))/f'cifar10-{hashlib.sha256(what.encode()).hexdigest()[:12]}.npz'
    if not file.exists():
        (x, y, classes), (tx, ty, others) = (read_split(Path(folder)/s) for s in ('train', 'test'))
        if classes != others: raise DataError(f"train/ and test/ of {folder} have different classes: {classes} and {others}")
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as part, open(part, 'wb') as f: np.savez(f, x=x, y=y, tx=tx, ty=ty, classes=classes)
    with np.load(file) as z:
        x, y, tx, ty = (torch.from_numpy(z[k]) for k in ('x', 'y', 'tx', 'ty'))
        return dict(train=(x, y), test=(tx, ty), classes=z['classes'].tolist())


def draw_cifar(
    folder:str|Path, # Made
    train:int=640, # Training photos
    test:int=160, # Test photos
) -> Path: # The folder
    "A small stand-in: photos of eight drawn textures, in CIFAR-10's size and layout"
    with tempfile.TemporaryDirectory() as tmp:
        demo = demo_data(Path(tmp)/'demo', dict(train=train, test=test))
        labels = LabelMap(demo.label_path, demo.label_encoding)
        for p in list_photos(demo.data_path):
            file = Path(folder)/p.parent.name/labels(p)/p.name
            file.parent.mkdir(parents=True, exist_ok=True)
            open_photo(p).resize((32, 32)).save(file, quality=95)
    return Path(folder)


# --- Batches

def pad_crop_flip(
    x:torch.Tensor, # (B,C,H,W)
    pad:int=4, # Pixels of zeros on each side
) -> torch.Tensor: # (B,C,H,W)
    "For each photo a crop at random from the padded photo, or from its mirror image; no loop over photos"     # §4.2
    b, _, h, w = x.shape
    crops = F.pad(x, [pad]*4).unfold(2, h, 1).unfold(3, w, 1)        # a view: (B,C,2·pad+1,2·pad+1,H,W)
    dy, dx = torch.randint(2*pad + 1, (2, b), device=x.device)
    x = crops[torch.arange(b, device=x.device), :, dy, dx]
    return torch.where((torch.rand(b, device=x.device) < .5)[:, None, None, None], x.flip(3), x)


class Photos:
    "Photos in memory, and what becomes of a batch of them"
    def __init__(self, x, y, mean, augment=False): self.x, self.y, self.mean, self.augment = x, y, mean, augment
    def __len__(self): return len(self.x)
    def __getitem__(self, idxs): # Numbers of photos
        x = self.x[idxs].float()/255 - self.mean
        return pad_crop_flip(x) if self.augment else x, self.y[idxs]


class PhotosDL(DataLoader):
    "A loader of `Photos`: a batch is one look into a tensor"
    most = math.inf                                                  # batches in the next epoch, if fewer than it has

    def create_item(self, i): return i
    def create_batch(self, idxs): return self.dataset[torch.tensor(idxs, device=self.dataset.x.device)]
    def to(self, device): return self                                # the photos are there already

    @property
    def whole(self): return super().__len__()                        # batches in a whole epoch
    def __len__(self): return min(self.whole, self.most)
    def get_idxs(self): return super().get_idxs()[:len(self)*self.bs]


def cifar_dls(
    data:dict, # From `cifar10`
    bs:int=paper_bs, # Photos in a batch
    hold_out:int=0, # Training photos to evaluate on; 0: train on all of them, evaluate on the test photos. The paper's choice was 5,000
    device=None, # None: the GPU where there is one
) -> DataLoaders:
    "Training and evaluation batches, the training photos' mean at each pixel subtracted"       # §4.2
    (x, y), (vx, vy) = data['train'], data['test']
    if hold_out:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))       # the same ones for every seed
        (x, y), (vx, vy) = ((x[i], y[i]) for i in (order[hold_out:], order[:hold_out]))
    if len(x) < bs: raise DataError(f"there are {len(x)} training photos; a batch needs {bs}")
    x, y, vx, vy = (t.to(device or default_device()) for t in (x, y, vx, vy))
    mean = x.double().mean(0).float()/255
    kwargs = dict(bs=bs, num_workers=0, device=x.device)
    dls = DataLoaders(PhotosDL(Photos(x, y, mean, augment=True), shuffle=True, drop_last=True, **kwargs), PhotosDL(Photos(vx, vy, mean), **kwargs))
    dls.labels, dls.vocab = LabelMap({}, {c: i for i, c in enumerate(data['classes'])}), data['classes']
    return dls


# --- The recipe

class LastUpdate(Callback):
    "So many updates in all: the last epoch is as short as need be, and evaluated like the others"
    def __init__(self, n): self.n = n
    def before_train(self): self.dls.train.most = self.n - len(self.history.rows)*self.dls.train.whole


class Results(Callback):
    "Keep the run in a JSON file, whole after every epoch"
    order, state_attrs = 90, ('spent',)                                  # before the checkpoint
    def __init__(self, file, about, quiet=True): self.file, self.about, self.quiet, self.spent = Path(file), about, quiet, 0

    def before_fit(self): self.last = time.process_time()
    def before_epoch(self): self.spent = 0
    def after_batch(self):
        now = time.process_time()
        self.spent, self.last = self.spent + now - self.last, now

    def after_epoch(self):
        rows = self.history.rows
        rows[-1] |= dict(updates=min(len(rows)*self.dls.train.whole, self.about['updates']), cpu_seconds=self.spent)
        done, seconds = rows[-1]['updates'], sum(r['seconds'] for r in rows)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.file, self.about | dict(updates_done=done, seconds=seconds, epochs=rows))
        if self.quiet: print(f"{done:,} of {self.about['updates']:,} updates: training error {rows[-1]['train_error']:.2%}, "
                             f"error {rows[-1]['top1_error']:.2%}; {self.remaining(done)}", flush=True)

    def remaining(self, done):
        if done == self.about['updates']: return 'done'
        row, before = self.history.rows[-1], self.history.rows[-2]['updates'] if len(self.history.rows) > 1 else 0
        return f"about {(self.about['updates'] - done)*row['seconds']/(done - before)/60:.0f} min left"


def drops(updates):
    "After how many updates the rate falls: at 1/2 and 3/4 of the run, the paper's 32k and 48k of 64k"      # §4.2
    return updates//2, updates*3//4


def cifar_learner(
    dls:DataLoaders, # From `cifar_dls`
    depth:int=20, # Layers, 6n+2
    kind:str='resnet', # 'resnet' or 'plain'
    updates:int=paper_updates, # Of the whole run
    precision:str='fp32', # 'fp32', 'bf16' or 'fp16'
    cbs=(), # More callbacks
): # A `ResumableLearner`; fit it for `epochs(dls, updates)` epochs
    "The paper's network and recipe: rate .1, momentum .9, decay .0001; a small rate first where there are 110 layers or more"
    cbs = [LastUpdate(updates), *([WarmUp(.01, .8)] if depth >= 110 else []), *cbs]
    return resnet_learner(dls, f'cifar_{kind}{depth}', bs=dls.train.bs, lr=.1, schedule=MultiStepLR(updates=drops(updates)), precision=precision,
                          channels_last=precision != 'fp32', cbs=cbs)


def epochs(dls, updates): return math.ceil(updates/dls.train.whole)


# --- A run

def commit(script=__file__):
    "The commit of this checkout, with a + where the library or this script differ from it"
    git = partial(subprocess.check_output, cwd=root, text=True, stderr=subprocess.DEVNULL)
    try: changed, head = git(['git', 'status', '--porcelain', '--', 'resnet_fastai', script]), git(['git', 'rev-parse', 'HEAD'])
    except (OSError, subprocess.CalledProcessError): return 'unknown'
    return head.strip() + ('+' if changed else '')


def machine():
    "What the run runs on"
    info = Path('/proc/cpuinfo')
    names = [line.split(':')[1].strip() for line in info.read_text().splitlines() if line.startswith('model name')] if info.exists() else []
    return dict(cpu=names[0] if names else sys.platform, cores=os.cpu_count(), threads=torch.get_num_threads(), torch=torch.__version__,
                gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None)


def about(dls, depth, kind, updates, seed, precision, hold_out):
    "What is known before the run begins"
    options = dict(depth=depth, kind=kind, updates=updates, seed=seed, precision=precision, **({'hold-out': hold_out} if hold_out else {}))
    command = 'python nbs/experiments/cifar10.py CIFAR10 ' + ' '.join(f'--{k} {v}' for k, v in options.items())
    return dict(command=command, commit=commit(), machine=machine(), kind=kind, depth=depth, seed=seed, precision=precision, bs=dls.train.bs,
                updates=updates, paper_updates=paper_updates, drops=drops(updates), train_photos=len(dls.train.dataset),
                evaluated_on='hold-out' if hold_out else 'test', evaluated_photos=len(dls.valid.dataset))


def train(
    folder:str|Path, # CIFAR-10: `{train,test}/CLASS/*.jpg`
    depth:int=20, # Layers, 6n+2: 20, 32, 44, 56, 110
    kind:str='resnet', # 'resnet' or 'plain'
    updates:int=paper_updates, # 64,000 in the paper; fewer are a shorter run by the same recipe
    seed:int=0, # Of the weights and of the order of the photos
    out:str|Path|None=None, # The JSON file; None: results/KIND DEPTH-UPDATES-SEED.json beside this script
    run_folder:str|Path|None=None, # Where checkpoints are kept; None: runs/cifar10/… of the project
    precision:str='fp32', # 'fp32', 'bf16' or 'fp16'
    hold_out:int=0, # Training photos to evaluate on, in the place of the test photos
    cache:str|Path|None=None, # Where the decoded photos are kept
    bs:int=paper_bs, # Photos in a batch
    quiet:bool=True, # A line an epoch in the place of progress bars
): # The learner
    "One run, from the beginning or from where it was stopped"
    dls = cifar_dls(cifar10(folder, cache), bs, hold_out)
    set_seed(seed)
    for dl in dls.loaders: dl.rng.seed(seed)
    name = f'{kind}{depth}-{updates}-{seed}' + (f'-{hold_out}' if hold_out else '')
    told = about(dls, depth, kind, updates, seed, precision, hold_out)
    results = Results(out or Path(__file__).parent/'results'/f'{name}.json', told, quiet)
    keep = Checkpoint(run_folder or root/'runs'/'cifar10'/name, every=500)
    learn = cifar_learner(dls, depth, kind, updates, precision, [results, keep])
    results.about |= dict(parameters=count_params(learn.model), macs=count_macs(learn.model, 32))
    if not quiet: learn.resume(epochs(dls, updates)); return learn
    with learn.no_bar(), learn.no_logging(): learn.resume(epochs(dls, updates))
    return learn


def read_results(
    planned:int, # Updates of a whole run; those of other lengths are left out
    folder:str|Path=Path(__file__).parent/'results', # Of JSON files
) -> pd.DataFrame: # A row an epoch, with what is known of its run
    "The stored runs; of a net with several seeds, those that have come farthest"
    runs = [json.loads(f.read_text()) for f in sorted(Path(folder).glob('*.json')) if f.name.startswith(('plain', 'resnet'))]
    known = 'kind', 'depth', 'seed', 'parameters', 'macs'
    rows = pd.DataFrame([{k: r[k] for k in known} | e for r in runs for e in r['epochs'] if r['updates'] == planned])
    if not len(rows): raise DataError(f"{folder} holds no run of {planned:,} updates; this script makes them")
    done, farthest = (rows.groupby(['kind', 'depth', *more]).updates.transform('max') for more in (['seed'], []))
    return rows[done == farthest].reset_index(drop=True)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', type=Path, help='CIFAR-10: {train,test}/CLASS/*.jpg')
    p.add_argument('--depth', type=int, default=20, help='layers, 6n+2: 20, 32, 44, 56, 110, 1202')
    p.add_argument('--kind', choices=['resnet', 'plain'], default='resnet')
    p.add_argument('--updates', type=int, default=paper_updates, help="of the whole run; the rate falls after 1/2 and 3/4 of them")
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--out', type=Path, help='the JSON file; default: nbs/experiments/results/NAME.json')
    p.add_argument('--run-folder', type=Path, help='checkpoints; default: runs/cifar10/NAME')
    p.add_argument('--precision', choices=['fp32', 'bf16', 'fp16'], default='fp32')
    p.add_argument('--hold-out', type=int, default=0, help='so many training photos to evaluate on, in the place of the test photos')
    p.add_argument('--cache', type=Path, help="decoded photos; default: fastai's data folder")
    p.add_argument('--threads', type=int, help='of the processor; default: all')
    args = vars(p.parse_args(argv))
    if n := args.pop('threads'): torch.set_num_threads(n)
    try: train(**args)
    except DataError as e: sys.exit(f'{type(e).__name__}: {e}')


if __name__ == '__main__': main()
