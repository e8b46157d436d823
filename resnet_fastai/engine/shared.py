"""Questions about many photos, shared out over processes; what one that died had found is not asked again."""
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from fastai.torch_core import num_distrib, rank_distrib
from fastprogress.fastprogress import progress_bar
from torch import nn

from .cache import cache_folder
from .fast_net import _bare, weights_hash
from .files import atomic_write, DataError
from .layout import PhotoList, ShardList, stamp
from .loader import join_processes


@lru_cache(maxsize=1)
def _patient(world):
    "A group whose processes wait a day for the slowest of them"
    return dist.new_group(backend='gloo', timeout=timedelta(days=1))


def of_all(
    value, # Anything that can be pickled
    patient:bool=True, # Wait a day for the slowest process, and not as long as in training?
) -> list: # One a process
    "What each process has; all of them call it"
    if num_distrib() < 2: return [value]
    join_processes()
    values = [None]*num_distrib()
    with _explained(): dist.all_gather_object(values, value, _patient(dist.group.WORLD) if patient else None)
    return values


@contextmanager
def _explained():
    try: yield
    except RuntimeError as e:
        raise RuntimeError("another process has ended, hangs, or does something else: what is shared out over processes is called in "
                           f"all of them, not under `if rank == 0` ({(str(e).splitlines() or [''])[0]:.150})") from None


def on_rank0(
    f:Callable, # Without arguments
    patient:bool=True, # As for `of_all`
):
    "What the first process's `f()` returns, or the `DataError` it raises, in every process"
    box = [None, None]
    if not rank_distrib():
        try: box[0] = f()
        except DataError as e: box[1] = e
    if num_distrib() > 1:
        join_processes()
        with _explained(): dist.broadcast_object_list(box, group=_patient(dist.group.WORLD) if patient else None)
    if box[1]: raise box[1]
    return box[0]


def _digests(photos):
    "(of all names and sizes, the same on all machines; of paths, sizes and times)"
    names,files = hashlib.sha256(),hashlib.sha256()
    for path,was in photos.stamps() if isinstance(photos, PhotoList) else map(stamp, photos):
        alike = was if isinstance(photos, ShardList) or not was else was[0]
        names.update(f'{os.path.basename(path)}\0{alike}\n'.encode('utf-8', 'surrogateescape'))
        files.update(f'{path}\0{was}\n'.encode('utf-8', 'surrogateescape'))
    return names.hexdigest(),files.hexdigest()


def have_same_photos(
    photos, # A list of paths
) -> bool:
    "Are there several processes, and do all have the same photos, by names and sizes?"
    if num_distrib() < 2: return False
    return len({*of_all(_digests(photos)[0])}) == 1


def some_of(
    photos, # A list of paths
    places, # Which ones, ascending
) -> Iterator:
    "Some of the photos; those of a server are fetched ahead"
    return (photos[i] for i in (photos.read_ahead(places) if isinstance(photos, PhotoList) else places))


def _text(o): return weights_hash(_bare(o)) if isinstance(o, nn.Module) else repr(o.as_dict() if hasattr(o, 'as_dict') else o)


def _tensors(o):
    "Arrays as tensors, which are read back without running code"
    if isinstance(o, tuple): return tuple(map(_tensors, o))
    return torch.from_numpy(np.array(o)) if isinstance(o, np.ndarray) else o


def _arrays(o):
    if isinstance(o, tuple): return tuple(map(_arrays, o))
    return o.numpy() if isinstance(o, torch.Tensor) else o


class Answers(dict):
    "place → answer, kept in a folder in blocks"
    def __init__(self,
        folder:Path, # Made with the first block
        most:int=200, # Answers in a block
        seconds:float=20, # After which a block is written, whatever it holds
    ):
        self.folder,self.most,self.seconds,self.new,self.since = folder,most,seconds,{},time.monotonic()
        for path in sorted(folder.glob('*.pt')):
            # or it is asked again
            with suppress(Exception): self.update({i: _arrays(a) for i,a in torch.load(path, weights_only=True).items()})

    def ask(self,
        ask:Callable, photos, places:list, # As for `shared_out`; of this process
    ):
        "Ask, and keep what is answered"
        found = ask(some_of(photos, places))
        bar = found if rank_distrib() else progress_bar(found, total=len(places), leave=False)
        try:
            for a,i in zip(bar, places):                                        # the bar first: it is to see its end
                self[i] = self.new[i] = a
                if len(self.new) >= self.most or time.monotonic() - self.since > self.seconds: self.flush()
        finally: self.flush()

    def flush(self):
        "Write a block, where that is possible"
        block,self.new,self.since = self.new,{},time.monotonic()
        if not block: return
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.folder/f'{min(block)}-{secrets.token_hex(4)}.pt') as part:
                torch.save({i: _tensors(a) for i,a in block.items()}, part)

    def remove(self,
        others:bool, # Also what was kept for other questions in the same place?
    ):
        # halves, too
        for path in self.folder.parent.glob('*/*.pt*') if others else self.folder.glob('*.pt*'): path.unlink(missing_ok=True)
        for folder in (*self.folder.parent.glob('*'), self.folder.parent) if others else (self.folder,):
            with suppress(OSError): folder.rmdir()                              # where it is empty


def shared_out(
    ask:Callable[[Iterable], Iterator], # Photos → their answers in order: arrays, texts, numbers, None, or tuples of these
    photos, # A list of paths, the same in all processes
    of=(), # What an answer depends on besides its photo: networks, numbers, texts
    places=None, # Which photos are asked about, ascending; None: all
    keep:Path|None=None, # A folder that keeps answers until all are there; None: in the user's cache
    finish:Callable|None=None, # What the first process does with all answers before they are kept no longer; the others get none then
) -> list: # An answer for each place
    "Ask about photos, each process about a share; called again after one died, about those that are left. All processes call it"
    places = range(len(photos)) if places is None else places
    if num_distrib() < 2 and not (keep and keep.exists()):
        return list(progress_bar(ask(some_of(photos, places)), total=len(places), leave=False))
    names,files = _digests(photos)
    what = hashlib.sha256(json.dumps([*map(_text, of), len(photos)]).encode()).hexdigest()
    have = of_all([names, what])
    if unlike := [r for r,o in enumerate(have) if o != have[0]]:
        raise DataError(f"process {unlike[0]} does not have the {'photos' if have[unlike[0]][0] != names else 'model and arguments'} of "
                        "process 0; "
                        "every process needs the same files and the same arguments")
    kept = Answers((keep or cache_folder()/'shared')/hashlib.sha256((files + what).encode()).hexdigest()[:24])
    own,me = of_all(sorted(kept)),rank_distrib()
    first = {i: r for r in reversed(range(len(own))) for i in own[r]}           # who brings an answer that several have
    left = [i for i in places if i not in first]
    if mine := left[me::len(own)]: kept.ask(ask, photos, mine)
    found = _together(kept, {i for i,r in first.items() if r == me} | {*mine}, places, finish)
    kept.remove(others=keep is not None)
    return found


def _together(kept, mine, places, finish):
    "The answers of all processes"
    packed = _packed({i: kept[i] for i in mine})
    parts = _to_rank0(packed) if finish and num_distrib() > 1 else of_all(packed)
    at = {i: a for numbers,arrays,others in parts for i,a in (*zip(numbers, arrays), *others.items())}
    found = [at[i] for i in places] if parts else []
    if finish and parts: finish(found)
    of_all(None)                                                                # all have what they need
    return found


def _packed(found):
    "(places, their arrays as one, {place: answer} where that is no array)"
    numbers = [i for i,a in found.items() if isinstance(a, np.ndarray)]
    return numbers,np.stack([found[i] for i in numbers]) if numbers else [],{i: a for i,a in found.items() if not isinstance(a, np.ndarray)}


def _to_rank0(value):
    "What each process has, in the first one; an empty list in the others"
    parts = None if rank_distrib() else [None]*num_distrib()
    dist.gather_object(value, parts, group=_patient(dist.group.WORLD))
    return parts or []
