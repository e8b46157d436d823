"""Batches of photos: an order that several processes share, and draws that no number of workers changes."""
import copy
import gc
import multiprocessing
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from fastai.data.block import DataBlock
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from fastai.torch_core import num_distrib
from fastcore.basics import defaults
from fastprogress.fastprogress import progress_bar
from PIL import Image

from .balance import balanced_order
from .batching import prefetch
from .files import DataError, quote
from .layout import photo_inputs, PhotoList, PhotoPath


def each_photo(
    ask, # A function of a path; several threads call it
    photos:list, # Paths
    num_workers:int|None=None, # Threads; 0: none; None: one a core
) -> Iterator: # The answer for each photo, in their order
    "Ask something of every photo, with a progress bar"
    paths = photos if isinstance(photos, PhotoList) else (p if isinstance(p, Path) else Path(p) for p in photos)
    yield from progress_bar(prefetch(ask, paths, num_workers, single=True), total=len(photos), leave=False)


def forks() -> bool:
    "Do processes start as copies of this one? Where not, a script needs a guard around its main part to start any"
    return (multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]) == 'fork'


def _equal_parts(n, k): return [n*(i+1)//k - n*i//k for i in range(k)]


class Turn(int):
    "The place of a photo that comes more than once in an epoch"
    again = 0                                             # 1: for the second time


class PhotoDL(TfmdDL):
    "A `TfmdDL` whose order is compact, whose draws do not depend on the number of workers, and which several processes can share"
    def __init__(self,
        dataset=None,
        num_workers:int|None=None, # Processes that load photos; None: one a core, 16 at most; threads where processes would need a guard
        **kwargs
    ):
        self.threads = defaults.cpus if num_workers is None and not forks() else 0
        super().__init__(dataset, num_workers=0 if self.threads else num_workers, **kwargs)

    def new(self, dataset=None, cls=None, **kwargs):
        if self.threads: kwargs = dict(num_workers=None) | kwargs
        return super().new(dataset, cls, **kwargs)

    # update: photos in an update, which `Accumulate` says; None: what passes at a time
    rank,world_size,shares,update = 0,1,None,None
    classes = None                                            # (n,) of each photo, where an epoch is to have as many photos of each
    def photos_in(self) -> list[int]:
        "The number of photos in each batch, all processes together: equal parts of an update, of at most `bs` photos a process"
        at_once,least = self.bs*self.world_size,min(self.bs, 2)*self.world_size     # BN needs two photos in each process
        update = self.update or at_once
        if self.shuffle and update < least:
            raise DataError(f"an update of bs={update} photos is too small for {self.world_size} processes: "
                            f"it needs {least//self.world_size} for each")
        whole,rest = divmod(self.n, update)
        updates = [update]*whole + [rest]*(rest > 0 and not self.drop_last)
        if self.shuffle and updates and updates[-1] < least:                        # the last few go with those before them
            if len(updates) == 1:
                raise DataError(f"{self.n} photos are too few for {self.world_size} process{'es' if self.world_size > 1 else ''}: "
                                "training needs two for each")
            updates[-2:] = [updates[-2] + updates[-1]]
        return [n for u in updates for n in _equal_parts(u, max(1, min(-(-u//at_once), u//least)))]

    def __len__(self): return len(self.photos_in())

    def get_idxs(self):
        "The order of an epoch; of it, this process's share"
        self.epoch_seed = self.rng.getrandbits(64)
        order = self._order(np.random.default_rng(self.epoch_seed)) if self.shuffle else np.arange(self.n)
        ends = np.cumsum([0, *self.photos_in()])
        cut = (ends[:-1,None] + np.diff(ends)[:,None]*np.arange(self.world_size + 1)//self.world_size)[:, self.rank:self.rank+2]
        self.shares = np.diff(cut)[:,0].tolist()
        return np.concatenate([order[a:b] for a,b in cut]) if len(cut) else order[:0]

    def _order(self, rng): return rng.permutation(self.n) if self.classes is None else balanced_order(self.classes, rng)

    def sample(self):
        if self.shares is None: return super().sample()
        batches = np.split(self._DataLoader__idxs, np.cumsum(self.shares)[:-1])
        mine = (i for batch in batches[self.offs::self.num_workers] for i in batch)
        return mine if self.classes is None else map(self._turn, mine)

    def _turn(self, i):
        again,place = divmod(int(i), self.n)
        place = Turn(place)
        place.again = again
        return place

    def chunkify(self, b):
        if self.shares is None: return super().chunkify(b)
        b = iter(b)
        return filter(None, (list(islice(b, n)) for n in self.shares[self.offs::self.num_workers]))

    def before_iter(self):
        super().before_iter()
        self.pixel_limit = Image.MAX_IMAGE_PIXELS         # before the workers begin, also where somebody else gives the order (`get_preds`)

    def wif(self):
        "In a worker: the garbage collector writes to what it looks at; Pillow's limit is the one of the process that asks"
        gc.freeze()
        Image.MAX_IMAGE_PIXELS = self.pixel_limit

    def create_batches(self, samps):
        photos = getattr(self.dataset, 'items', None)
        if isinstance(photos, PhotoList): samps = photos.read_ahead(samps)
        if not self.threads: yield from super().create_batches(samps); return
        own = threading.local()
        def load(i):
            if not hasattr(own, 'dl'): own.dl = self._twin()
            return own.dl.do_item(i)
        items = prefetch(load, samps, self.threads, 2*self.bs, single=True)
        yield from map(self.do_batch, self.chunkify(o for o in items if o is not None))

    def _twin(self):
        "The same loader with transforms of its own, for a thread"
        twin = copy.copy(self)
        twin.threads, twin.after_item = 0, copy.deepcopy(self.after_item)
        return twin

    def do_item(self, i):
        drawing = [t for t in self.after_item.fs if hasattr(t, 'rng')]
        turn = getattr(i, 'again', 0) << 96               # another time, another crop
        for t in drawing: t.rng = random.Random(turn | getattr(self, 'epoch_seed', 0) << 32 | int(i or 0))
        try: return super().do_item(i)
        finally:
            for t in drawing: del t.rng                               # another loader's draws are not ours


def own_gpu() -> bool: # Are there any?
    "Let each of several processes use a GPU of its own; where a scheduler shows each only one, that"
    gpus = torch.cuda.is_available()
    if gpus and num_distrib() > 1: torch.cuda.set_device(int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count())
    return gpus


def join_processes():
    "Join the processes that `torchrun` or `accelerate launch` has started with this one; nothing where it is alone"
    if num_distrib() < 2 or dist.is_initialized(): return
    gpus = own_gpu()
    dist.init_process_group('cpu:gloo,cuda:nccl' if gpus else 'gloo', timeout=_timeout())


def _timeout():
    "How long a process waits for the others in training; a rank that hangs for longer ends the job, and torchrun begins again"
    seconds = os.environ.get('RESNET_FASTAI_TIMEOUT', '600')
    if not seconds.isdigit() or int(seconds) < 1:
        raise DataError(f"RESNET_FASTAI_TIMEOUT is {quote(seconds)}; it must be a whole number of seconds")
    return timedelta(seconds=int(seconds))


@contextmanager
def local_rank0_first(
    wait:timedelta=timedelta(days=1), # How long the others wait at the most; the first look at a million photos takes an hour
):
    "One process of each machine runs what is inside; then its others do"
    if num_distrib() < 2: return (yield)
    late = int(os.environ.get('LOCAL_RANK', 0)) > 0
    turn = dist.new_group(backend='gloo', timeout=wait)
    if late: dist.barrier(turn)
    yield
    if not late: dist.barrier(turn)


class PhotoLoaders(DataLoaders):
    "`DataLoaders` that keep what predictions need when they are exported; photos are given as paths, lists or a folder"
    carried = ('labels', 'stats', 'size')
    def new_empty(self):
        new = super().new_empty()
        for name in self.carried: setattr(new, name, getattr(self, name, None))
        new.photos = {split: PhotoList(photos.root, [], vocab=photos.vocab) for split,photos in getattr(self, 'photos', {}).items()}
        return new

    def test_dl(self,
        test_items, # A photo's path, a folder of photos, or a list of paths
        **kwargs
    ):
        "A loader over other photos, as in validation"
        items, _ = photo_inputs(test_items)
        if not isinstance(items, PhotoList):
            # the kind that fastai knows here
            items = [PhotoPath(p) if isinstance(p, (str, Path)) and not isinstance(p, PhotoPath) else p for p in items]
        return super().test_dl(items, **kwargs)


class PhotoSets(Datasets): _dbunch_type = PhotoLoaders


class PhotoBlock(DataBlock):
    "A `DataBlock` whose first `n_train` items are for training, without a list of their million numbers"
    n_train = 0
    def datasets(self, source, verbose=False):
        return PhotoSets(source, tfms=self._combine_type_tfms(), splits=[slice(self.n_train), slice(self.n_train, len(source))],
                         dl_type=self.dl_type, n_inp=self.n_inp, verbose=verbose)
