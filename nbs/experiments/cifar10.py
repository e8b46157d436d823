"""Train a network of the paper's CIFAR-10 family by the paper's recipe (§4.2), and store every epoch in a JSON file.

    python nbs/experiments/cifar10.py CIFAR10 --depth 20                       # the paper's 64,000 updates
    python nbs/experiments/cifar10.py CIFAR10 --depth 20 --updates 2000        # the same recipe, shortened 32 times

CIFAR10 is torchvision's folder (the one that holds cifar-10-batches-py), fastai's (`untar_data(URLs.CIFAR)`), an .npz, or grids;
`layouts` below lists them. The same command resumes a run that was stopped."""
import argparse
import hashlib
import json
import math
import os
import pickle
import subprocess
import sys
import tempfile
import time
import warnings
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
from PIL import Image

from resnet_fastai.data import LabelMap, demo_data
from resnet_fastai.engine.files import DataError, PhotoError, atomic_write, write_json
from resnet_fastai.engine.layout import list_photos
from resnet_fastai.engine.photo import open_photo
from resnet_fastai.engine.weights import read_tensors, unwrapped
from resnet_fastai.model import Block, build_net, count_macs, count_params
from resnet_fastai.training import Checkpoint, MultiStepLR, WarmUp, resnet_learner

root = Path(__file__).resolve().parents[2]
paper_updates, paper_bs = 64_000, 128                                # §4.2


# --- Photos

n_photos, mean_std = dict(train=50_000, test=10_000), ((.4914, .4822, .4465), (.2470, .2435, .2616))      # CIFAR-10's, RGB in [0,1]
layouts = """cifar-10-batches-py/ (torchvision), {train,test}/CLASS/*.png (fastai), an .npz with x, y, tx, ty, classes, or
grids of 100×100 photos: train_1.webp … train_5.webp, test.webp, labels.json"""


def cifar10(
    path:str|Path, # A folder or a file in one of `layouts`
    cache:str|Path|None=None, # Folder for the decoded photos of class folders; None: fastai's data folder
) -> dict: # train and test: (photos (N,3,32,32) of 8 bits, classes (N,)); classes: their names; about: kind, sha256, lossy, is_cifar10
    "Read all of CIFAR-10 into memory from any of `layouts`, and compare it with the published data"
    path = Path(path)
    kind, read = _layout(path)
    data = read(path) if kind != 'class folders' else _cached(path, cache)
    for split in n_photos: _check(path, split, *data[split], data['classes'])
    about = dict(kind=kind, sha256={s: checksum(*data[s]) for s in n_photos}, lossy=_lossy(path, kind, data))
    strange = _strange(data)
    if about['lossy']: strange.append('it has been through a lossy compression (JPEG): errors will be percents higher')
    if strange: warnings.warn(f"{path} is not CIFAR-10 as published: {'; '.join(strange)}. Results will say so", stacklevel=2)
    return data | dict(about=about | dict(is_cifar10=not strange))


def _layout(path):
    "The kind of storage, and the function that reads it"
    if path.suffix == '.npz' and path.is_file(): return 'npz', _read_npz
    for folder in (path, path/'cifar-10-batches-py'):
        if (folder/'data_batch_1').is_file(): return 'pickled batches', lambda _: _read_batches(folder)
    if (path/'train_1.webp').is_file(): return 'grids', _read_grids
    if all((path/s).is_dir() for s in n_photos): return 'class folders', _read_folders
    raise DataError(f"{path} holds no photos of CIFAR-10; one of these is needed: {layouts}")


def _check(path, split, x, y, classes):
    if x.ndim != 4 or x.shape[1:] != (3, 32, 32) or x.dtype != torch.uint8:
        raise DataError(f"{path}: the {split} photos are {tuple(x.shape)} of {x.dtype}; 32×32 pixels of 3 × 8 bits are needed")
    if len(x) != len(y) or not len(y): raise DataError(f"{path}: {len(x)} {split} photos have {len(y)} labels")
    if y.min() < 0 or y.max() >= len(classes): raise DataError(f"{path}: a {split} label lies outside the {len(classes)} classes")


def _rgb_first(x):
    "(N,32,32,3) of 8 bits as a contiguous tensor (N,3,32,32): cropping is twice as fast"
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def _read_npz(file):
    with np.load(file, allow_pickle=False) as z:
        if missing := {'x', 'y', 'tx', 'ty', 'classes'} - {*z.files}: raise DataError(f"{file} lacks {', '.join(sorted(missing))}")
        x, y, tx, ty, classes = (z[k] for k in ('x', 'y', 'tx', 'ty', 'classes'))
    labels = (torch.from_numpy(a.astype(np.int64)) for a in (y, ty))
    return dict(train=(_rgb_first(x), next(labels)), test=(_rgb_first(tx), next(labels)), classes=[str(c) for c in classes])


def _read_grids(folder):
    def photos(name):
        grid = np.asarray(Image.open(folder/name).convert('RGB'))
        return grid.reshape(100, 32, 100, 32, 3).swapaxes(1, 2).reshape(10_000, 32, 32, 3)
    told = json.loads((folder/'labels.json').read_text())
    x = np.concatenate([photos(f'train_{i}.webp') for i in range(1, 6)])
    return dict(train=(_rgb_first(x), torch.tensor(told['train'])), test=(_rgb_first(photos('test.webp')), torch.tensor(told['test'])),
                classes=told['classes'])


class _Array:
    "Takes the place of a numpy array in a pickle: keeps its bytes, runs nothing"
    def __init__(self, *args): self.state = None
    def __setstate__(self, state): self.state = state
    def pixels(self):
        _, shape, _, fortran, raw = self.state
        if fortran: raise DataError('the pixels are stored by column; torchvision stores them by row')
        return np.frombuffer(raw, np.uint8).reshape(shape)


class _Unpickler(pickle.Unpickler):
    "Reads dicts, lists, numbers, texts and arrays of bytes; refuses everything else, since a pickle may hold code"
    allowed = {('numpy', 'ndarray'), ('numpy', 'dtype'), ('numpy.core.multiarray', '_reconstruct'),
               ('numpy._core.multiarray', '_reconstruct')}
    def find_class(self, module, name):
        if (module, name) in self.allowed: return _Array
        if (module, name) == ('_codecs', 'encode'): return lambda text, coding: text.encode('latin1')
        raise DataError(f"it asks for {module}.{name}, which CIFAR-10 has no need of; nothing was run")


def _unpickle(file, *keys):
    "The values of these keys; arrays become numpy arrays"
    try:
        with open(file, 'rb') as f: found = _Unpickler(f, encoding='bytes').load()
        found = {k.decode() if isinstance(k, bytes) else k: v.pixels() if isinstance(v, _Array) else v for k, v in found.items()}
        return tuple(found[k] for k in keys)
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError, LookupError, DataError) as e:
        raise DataError(f"{file} cannot be read as a part of CIFAR-10: {type(e).__name__}: {e}") from None


def _read_batches(folder):
    def split(names):
        x, y = zip(*(_unpickle(folder/n, 'data', 'labels') for n in names))
        return torch.from_numpy(np.concatenate(x).reshape(-1, 3, 32, 32)), torch.tensor(sum(y, []))
    classes = [c.decode() if isinstance(c, bytes) else c for c in _unpickle(folder/'batches.meta', 'label_names')[0]]
    return dict(train=split([f'data_batch_{i}' for i in range(1, 6)]), test=split(['test_batch']), classes=classes)


def _read_folders(folder):
    (x, y, classes), (tx, ty, others) = (_read_split(folder/s) for s in n_photos)
    if classes != others: raise DataError(f"train/ and test/ of {folder} have different classes: {classes} and {others}")
    return dict(x=x, y=y, tx=tx, ty=ty, classes=classes)


def _read_split(folder):
    "Photos (N,32,32,3) of 8 bits, the class of each, and the names of the classes"
    if not (paths := list_photos(folder)): raise DataError(f"{folder} holds no photos; there should be CLASS/*.png")
    classes = sorted({p.parent.name for p in paths})
    return np.stack([_pixels(p) for p in paths]), np.array([classes.index(p.parent.name) for p in paths]), classes


def _pixels(path):
    img = np.asarray(open_photo(path))
    if img.shape == (32, 32, 3): return img
    raise PhotoError(f"{path} has {img.shape[1]}×{img.shape[0]} pixels; CIFAR-10 has 32×32")


def _cached(folder, cache):
    "Decode 60,000 files once; later calls read them from one file"
    files = [p for s in n_photos for p in list_photos(folder/s)]
    what = '\n'.join(f'{p.relative_to(folder)} {p.stat().st_size} {p.stat().st_mtime_ns}' for p in files)
    file = Path(cache or fastai_path('data'))/f'cifar10-{hashlib.sha256(what.encode()).hexdigest()[:12]}.npz'
    if not file.exists():
        found = _read_folders(folder)
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as part, open(part, 'wb') as f: np.savez(f, **found)
    return _read_npz(file)


def checksum(x, y):
    "SHA-256 of photos and labels, independent of their order and file format"
    x = x.permute(0, 2, 3, 1).contiguous().numpy()
    each = sorted(hashlib.sha256(bytes([label]) + photo.tobytes()).digest() for photo, label in zip(x, y.tolist()))
    return hashlib.sha256(b''.join(each)).hexdigest()


def block_edges(x):
    "How much larger steps between pixels are at the edges of JPEG's 8×8 blocks than one pixel beside; 1: no blocks"
    def steps(x):                                                    # minus the mean of its neighbours, so that slopes do not count
        d = x.float().diff(dim=3)
        return (d[..., 1:-1] - (d[..., :-2] + d[..., 2:])/2).abs().mean((0, 1, 2))       # [i]: from column i+1 to i+2
    by_place = steps(x) + steps(x.transpose(2, 3))
    edges = torch.tensor([6, 14, 22])                                # from 7 to 8, 15 to 16, 23 to 24
    return (2*by_place[edges].sum()/(by_place[edges - 1] + by_place[edges + 1]).sum()).item()


def _lossy(path, kind, data):
    "Whether the photos were stored as JPEG files"
    names = (p.suffix.lower() for s in n_photos for p in list_photos(path/s)) if kind == 'class folders' else ()
    return any(n in ('.jpg', '.jpeg') for n in names) or block_edges(data['test'][0]) > 1.02


def _strange(data):
    "How a data set differs from CIFAR-10, in words"
    counts = {s: len(data[s][0]) for s in n_photos}
    if counts != n_photos: return [f"it has {counts['train']:,} + {counts['test']:,} photos, not 50,000 + 10,000"]
    if len(data['classes']) != 10 or any((data[s][1].bincount() != n_photos[s]//10).any() for s in n_photos):
        return ["its classes are not ten of the same size"]
    found = color_mean_std(data['train'][0])
    if np.abs(np.subtract(found, mean_std)).max() < 1e-4: return []
    mean, std = ([f'{v:.4f}' for v in row] for row in found)
    return [f"mean and std of the training photos' colours are {' '.join(mean)} and {' '.join(std)}, "
            "not .4914 .4822 .4465 and .2470 .2435 .2616"]


def color_mean_std(x):
    "Mean and standard deviation of each colour, RGB in [0,1]"
    counts = [x[:, c].flatten().bincount(minlength=256).double() for c in range(3)]      # exact, and quick
    values = torch.arange(256).double()/255
    mean = [(n*values).sum()/n.sum() for n in counts]
    return [[m.item() for m in mean], [((n*(values - m)**2).sum()/n.sum()).sqrt().item() for n, m in zip(counts, mean)]]


def draw_cifar(
    folder:str|Path, # Made
    train:int=640, # Training photos
    test:int=160, # Test photos
) -> Path: # The folder
    "Draw a small substitute: photos of eight textures in CIFAR-10's size, as class folders of PNG files"
    with tempfile.TemporaryDirectory() as tmp:
        demo = demo_data(Path(tmp)/'demo', dict(train=train, test=test))
        labels = LabelMap(demo.label_path, demo.label_encoding)
        for p in list_photos(demo.data_path):
            file = Path(folder)/p.parent.name/labels(p)/f'{p.stem}.png'
            file.parent.mkdir(parents=True, exist_ok=True)
            open_photo(p).resize((32, 32)).save(file)
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
    "Photos in memory; an item is a batch, normalised and augmented"
    def __init__(self, x, y, mean, augment=False): self.x, self.y, self.mean, self.augment = x, y, mean, augment
    def __len__(self): return len(self.x)
    def __getitem__(self, idxs): # Indices of photos
        x = self.x[idxs].float()/255 - self.mean
        return pad_crop_flip(x) if self.augment else x, self.y[idxs]


class PhotosDL(DataLoader):
    "A loader of `Photos`: a batch is one indexing operation"
    most = math.inf                                                  # batches in the next epoch, if fewer than it has
    raw = False                                                      # yield indices only; a CUDA graph calls `make_batch` itself

    def create_batches(self, samps):
        "Copy all indices of an epoch to the device at once; a copy for each batch would wait for the GPU"
        for idxs in torch.tensor(list(samps), dtype=torch.long, device=self.dataset.x.device).split(self.bs):
            if len(idxs) == self.bs or len(idxs) and not self.drop_last: yield idxs if self.raw else self.make_batch(idxs)
    def make_batch(self, idxs): return self.dataset[idxs]
    def to(self, device): return self                                # the photos are there already

    @property
    def whole(self): return super().__len__()                        # batches in a whole epoch
    def __len__(self): return min(self.whole, self.most)
    def get_idxs(self): return super().get_idxs()[:len(self)*self.bs]


def cifar_dls(
    data:dict, # From `cifar10`
    bs:int=paper_bs, # Photos in a batch
    hold_out:int=0, # Training photos to evaluate on (5,000 in the paper); 0: train on all, evaluate on the test photos
    device=None, # None: the GPU where there is one
) -> DataLoaders:
    "Training and evaluation batches, the training photos' mean at each pixel subtracted"       # §4.2
    (x, y), (vx, vy) = data['train'], data['test']
    if hold_out:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))       # the same ones for every seed
        (x, y), (vx, vy) = ((x[i], y[i]) for i in (order[hold_out:], order[:hold_out]))
    if len(x) < bs: raise DataError(f"there are {len(x)} training photos; a batch needs {bs}")
    x, y, vx, vy = (t.to(device or default_device()) for t in (x, y, vx, vy))
    mean = (x.sum(0)/len(x)).float()/255
    kwargs = dict(num_workers=0, device=x.device)
    valid_bs = bs if x.device.type == 'cpu' else max(bs, 1000)       # kernel launches are what evaluation on a GPU costs
    train = PhotosDL(Photos(x, y, mean, augment=True), shuffle=True, drop_last=True, bs=bs, **kwargs)
    dls = DataLoaders(train, PhotosDL(Photos(vx, vy, mean), bs=valid_bs, **kwargs))
    dls.labels, dls.vocab = LabelMap({}, {c: i for i, c in enumerate(data['classes'])}), data['classes']
    return dls


# --- The recipe

class LastUpdate(Callback):
    "End the training after n updates: the last epoch is shortened, and evaluated like the others"
    def __init__(self, n): self.n = n
    def before_train(self): self.dls.train.most = self.n - len(self.history.rows)*self.dls.train.whole


class Results(Callback):
    "Store the run in a JSON file, complete after every epoch"
    order, state_attrs, on_graph = 90, ('spent',), 'replay'          # before the checkpoint
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
    "The updates after which the rate falls: 1/2 and 3/4 of the run, as the paper's 32k and 48k of 64k"      # §4.2
    return updates//2, updates*3//4


def cifar_learner(
    dls:DataLoaders, # From `cifar_dls`
    depth:int=20, # Layers, 6n+2
    kind:str='resnet', # 'resnet' or 'plain'
    updates:int=paper_updates, # Of the whole run
    precision:str='fp32', # 'fp32', 'bf16' or 'fp16'
    cbs=(), # More callbacks
    graph:bool|None=None, # Updates from a CUDA graph; None: on a GPU
    compile:bool=False, # Compile the network, which takes up to a minute first
): # A `ResumableLearner`; fit it for `epochs(dls, updates)` epochs
    "The paper's network and recipe: rate .1, momentum .9, decay .0001; a small rate first where there are 110 layers or more"
    cbs = [LastUpdate(updates), *([WarmUp(.01, .8)] if depth >= 110 else []), *cbs]
    return resnet_learner(dls, f'cifar_{kind}{depth}', bs=dls.train.bs, lr=.1, schedule=MultiStepLR(updates=drops(updates)),
                          precision=precision, channels_last=precision != 'fp32', cbs=cbs,
                          graph=dls.device.type == 'cuda' if graph is None else graph, compile=compile)


def epochs(dls, updates): return math.ceil(updates/dls.train.whole)


# --- Weights that others trained

weights_of = 'https://github.com/akamaster/pytorch_resnet_cifar10'    # ResNet-20, 32, 44 and 56 by the paper's recipe, one .th file each
published_errors = {20: .0827, 32: .0737, 44: .0690, 56: .0661}      # of 10,000 test photos, as given there


def _shapes(state): return {k: v.shape for k, v in state.items() if v.ndim}          # without BN's counters, which they lack


def published_net(
    file:str|Path, # A file of `weights_of`: resnet20.th, resnet32.th, …
): # `build_net('cifar_resnet20')`, …, with these weights; it expects `published_input`
    "Our network with their weights: they pad new channels with zeros on both sides, we at the end"
    told = unwrapped(read_tensors(file), str(file))
    theirs = {k.replace('linear.', 'fc.'): v for k, v in told.items()}
    n = sum(k.startswith('layer1.') and k.endswith('conv1.weight') for k in theirs)
    net, order = build_net(f'cifar_resnet{6*n + 2}', 10) if n else None, torch.arange(16)
    if not net or 'linear.weight' not in told or _shapes(net.state_dict()) != _shapes(theirs):        # ours have no `linear`
        raise DataError(f"{file} is none of the networks of {weights_of}")
    for name, block in net.named_modules():
        if not isinstance(block, Block): continue
        new = block.conv2.out_channels - len(order)                  # `order`: which of their channels is our first, second, …
        after = torch.cat([order + new//2, torch.arange(new//2), torch.arange(len(order) + new//2, len(order) + new)])
        theirs[f'{name}.conv1.weight'] = theirs[f'{name}.conv1.weight'][:, order]
        for k in theirs: theirs[k] = theirs[k][after] if k.startswith((f'{name}.conv2', f'{name}.bn2')) and theirs[k].ndim else theirs[k]
        order = after
    net.load_state_dict(theirs | {'fc.weight': theirs['fc.weight'][:, order]})
    return net.eval()


def published_input(x): # (B,3,32,32) of 8 bits
    "Normalise photos as the networks of `weights_of` expect them"
    mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in ((.485, .456, .406), (.229, .224, .225)))
    return (x.float()/255 - mean)/std


@torch.no_grad()
def predict(net, x, prepare=published_input, bs=100): # (N,3,32,32) of 8 bits
    "Logits (N,n_out), 32-bit"
    return torch.cat([net(prepare(b)) for b in x.split(bs)])


# --- A run

def commit(script=__file__):
    "The commit of this checkout, with a + where the library or this script differ from it"
    git = partial(subprocess.check_output, cwd=root, text=True, stderr=subprocess.DEVNULL)
    try: changed, head = git(['git', 'status', '--porcelain', '--', 'resnet_fastai', script]), git(['git', 'rev-parse', 'HEAD'])
    except (OSError, subprocess.CalledProcessError): return 'unknown'
    return head.strip() + ('+' if changed else '')


def machine():
    "Processor, cores, threads, PyTorch and GPU"
    info = Path('/proc/cpuinfo')
    names = [line.split(':')[1].strip() for line in info.read_text().splitlines() if line.startswith('model name')] if info.exists() else []
    return dict(cpu=names[0] if names else sys.platform, cores=os.cpu_count(), threads=torch.get_num_threads(), torch=torch.__version__,
                gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None)


def about(dls, depth, kind, updates, seed, precision, hold_out):
    "The facts of a run that are known at its start"
    options = dict(depth=depth, kind=kind, updates=updates, seed=seed, precision=precision, **({'hold-out': hold_out} if hold_out else {}))
    command = 'python nbs/experiments/cifar10.py CIFAR10 ' + ' '.join(f'--{k} {v}' for k, v in options.items())
    return dict(command=command, commit=commit(), machine=machine(), kind=kind, depth=depth, seed=seed, precision=precision,
                bs=dls.train.bs, updates=updates, paper_updates=paper_updates, drops=drops(updates), train_photos=len(dls.train.dataset),
                evaluated_on='hold-out' if hold_out else 'test', evaluated_photos=len(dls.valid.dataset))


def earlier_parts(
    file:Path, # The JSON file of the run so far
    now:dict, # Its `about`
) -> list: # machine, commit and updates_done, in order
    "The parts of a run that were computed on another machine or by other code"
    if not file.exists(): return []
    was = json.loads(file.read_text())
    same = all(was[k] == now[k] for k in ('machine', 'commit'))
    return was.get('earlier', []) + ([] if same else [{k: was[k] for k in ('machine', 'commit', 'updates_done')}])


def train(
    folder:str|Path, # CIFAR-10 in one of `layouts`
    depth:int=20, # Layers, 6n+2: 20, 32, 44, 56, 110
    kind:str='resnet', # 'resnet' or 'plain'
    updates:int=paper_updates, # 64,000 in the paper; fewer are a shorter run by the same recipe
    seed:int=0, # Of the weights and of the order of the photos
    out:str|Path|None=None, # The JSON file; None: results/KIND DEPTH-UPDATES-SEED.json beside this script
    run_folder:str|Path|None=None, # Folder for checkpoints; None: runs/cifar10/… of the project
    precision:str='fp32', # 'fp32', 'bf16' or 'fp16'
    hold_out:int=0, # Training photos to evaluate on, instead of the test photos
    cache:str|Path|None=None, # Folder for the decoded photos
    bs:int=paper_bs, # Photos in a batch
    every:int=500, # Updates between two checkpoints; each epoch also ends with one
    quiet:bool=True, # A line for each epoch instead of progress bars
    compile:bool=False, # Compile the network
): # The learner
    "Run from the start, or resume from the newest checkpoint"
    data = cifar10(folder, cache)
    dls = cifar_dls(data, bs, hold_out)
    set_seed(seed)
    for dl in dls.loaders: dl.rng.seed(seed)
    name = f'{kind}{depth}-{updates}-{seed}' + (f'-{hold_out}' if hold_out else '')
    told = about(dls, depth, kind, updates, seed, precision, hold_out) | dict(data=data['about'])
    out = Path(out or Path(__file__).parent/'results'/f'{name}.json')
    results = Results(out, told | dict(earlier=earlier_parts(out, told)), quiet)
    keep = Checkpoint(run_folder or root/'runs'/'cifar10'/name, every=every)
    learn = cifar_learner(dls, depth, kind, updates, precision, [results, keep], compile=compile)
    results.about |= dict(parameters=count_params(learn.model), macs=count_macs(learn.model, 32), graph=hasattr(learn, 'cuda_graph'),
                          compiled=compile, tf32=dls.device.type == 'cuda' and precision == 'fp32' and torch.backends.cudnn.allow_tf32)
    if not quiet: learn.resume(epochs(dls, updates)); return learn
    with learn.no_bar(), learn.no_logging(): learn.resume(epochs(dls, updates))
    return learn


def _machines(run):
    "The GPU or processor of a run; several in order if it moved"
    name = lambda m: m['gpu'] or m['cpu']
    return ', then '.join(dict.fromkeys(name(p['machine']) for p in [*run.get('earlier', []), run]))


def read_results(
    planned:int, # Updates of a whole run; runs of other lengths are left out
    folder:str|Path=Path(__file__).parent/'results', # Of JSON files
) -> pd.DataFrame: # A row an epoch, with what is known of its run
    "The stored runs; for a net with several seeds, those with the most updates"
    runs = [json.loads(f.read_text()) for f in sorted(Path(folder).glob('*.json')) if f.name.startswith(('plain', 'resnet'))]
    known = 'kind', 'depth', 'seed', 'parameters', 'macs'
    rows = pd.DataFrame([{k: r[k] for k in known} | dict(machine=_machines(r)) | e
                         for r in runs for e in r['epochs'] if r['updates'] == planned])
    if not len(rows): raise DataError(f"{folder} holds no run of {planned:,} updates; this script makes them")
    done, farthest = (rows.groupby(['kind', 'depth', *more]).updates.transform('max') for more in (['seed'], []))
    return rows[done == farthest].reset_index(drop=True)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', type=Path, help=f'CIFAR-10: {layouts}')
    p.add_argument('--depth', type=int, default=20, help='layers, 6n+2: 20, 32, 44, 56, 110, 1202')
    p.add_argument('--kind', choices=['resnet', 'plain'], default='resnet')
    p.add_argument('--updates', type=int, default=paper_updates, help="of the whole run; the rate falls after 1/2 and 3/4 of them")
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--out', type=Path, help='the JSON file; default: nbs/experiments/results/NAME.json')
    p.add_argument('--run-folder', type=Path, help='checkpoints; default: runs/cifar10/NAME')
    p.add_argument('--precision', choices=['fp32', 'bf16', 'fp16'], default='fp32')
    p.add_argument('--hold-out', type=int, default=0, help='number of training photos to evaluate on, instead of the test photos')
    p.add_argument('--cache', type=Path, help="folder for the decoded photos of class folders; default: fastai's data folder")
    p.add_argument('--compile', action='store_true', help='compile the network: takes a minute first, then updates are faster on a GPU')
    p.add_argument('--threads', type=int, help='of the processor; default: all')
    args = vars(p.parse_args(argv))
    if n := args.pop('threads'): torch.set_num_threads(n)
    try: train(**args)
    except DataError as e: sys.exit(f'{type(e).__name__}: {e}')


if __name__ == '__main__': main()
