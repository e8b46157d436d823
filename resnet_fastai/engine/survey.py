"""Read every photo once: the sums of which its colour statistics are made, and which ones are bad; and keep what was found."""
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .batching import prefetch
from .cache import cache_folder
from .files import PhotoError, write_json
from .layout import PhotoList, stamp
from .loader import each_photo
from .photo import Photo
from .shared import have_same_photos, on_rank0, shared_out


def color_moments(
    rgb:Image.Image|torch.Tensor, # RGB: a PIL image, or (3,H,W) uint8
    chunk:int=1<<20, # Pixels at a time, so that memory does not grow with the photo
) -> np.ndarray: # (4,4) float64: Σ x xᵀ over the pixels x = (R,G,B,1), RGB in [0,1]
    "The sums of which mean and covariance of a photo's colours are made; they add up over photos"
    if isinstance(rgb, Image.Image): rgb = torch.from_numpy(np.array(rgb)).permute(2,0,1)
    m = np.zeros((4,4))
    for x in rgb.permute(1,2,0).reshape(-1, 3).split(chunk): m += _chunk_moments(x)
    return m


def _chunk_moments(x):
    n, x = len(x), F.pad(x.float() - 128, (0, 0, 0, -len(x) % 1024)).view(-1, 1024, 3)   # |x| ≤ 128, 1024·128² = 2²⁴: nothing is rounded
    xx, s = ((x.transpose(1,2) @ x).double().sum(0).numpy(), x.sum(1).double().sum(0).numpy())
    m = np.empty((4,4))
    m[:3,:3] = xx + 128*(s[:,None] + s) + 128**2*n                                # back from x - 128 to x
    m[3,:3] = m[:3,3] = 255*(s + 128*n)
    m[3,3] = 255**2*n
    return m/255**2


def _moments(path):
    "The `color_moments` of a photo, or the reason why it has none"
    try: return color_moments(Photo(path).pixels()[0])
    except PhotoError as e: return str(e)


def scan_photos(
    paths:list, # Photos
    num_workers:int|None=None, # Threads; 0: none; None: one a core
) -> tuple: # ((4,4,n) moments, zeros where a photo is bad; {place: why it cannot be read})
    "Decode every photo once, with a progress bar: its colour moments, and which ones are bad; several processes share the work"
    # asked in all processes, also by one with nothing to do
    moments, bad, same = np.zeros((len(paths), 4, 4)), {}, have_same_photos(paths)
    if not len(paths): return moments, bad
    ask = lambda some: prefetch(_moments, some, num_workers, single=True)
    for i,m in enumerate(shared_out(ask, paths, ['moments']) if same else each_photo(_moments, paths, num_workers)):
        if isinstance(m, str): bad[i] = m
        else: moments[i] = m
    return moments, bad


def _fail_or_skip(bad, n, on_bad):
    if not bad: return
    first = bad[min(bad)]
    if on_bad == 'skip': return print(f"left out {len(bad):,} of {n:,} photos that cannot be read; first: {first}")
    raise PhotoError(f"{first} ({len(bad):,} of {n:,} photos); repair or remove them, or pass on_bad='skip' to train without them")


def _sum(moments, bad):
    n = int((moments[:,3,3] > 0).sum())
    if not n: raise PhotoError(f"none of the {len(moments):,} photos can be read; first: {next(iter(bad.values()), 'there is none')}")
    return moments.sum(0), n


# What a first reading has found is kept under a name made from path, size and time of every photo: it is found while nothing changes

def survey_file(
    photos, # Paths, or a `PhotoList`
) -> Path: # Of a JSON file in the user's cache
    "Where the findings on these photos are kept"
    digest = hashlib.sha256()
    for p,was in photos.stamps() if isinstance(photos, PhotoList) else map(stamp, photos):
        digest.update(f'{p}\0{was}\n'.encode('utf-8', 'surrogateescape'))
    return cache_folder()/'color_stats'/f'{digest.hexdigest()[:24]}.json'


def kept_survey(
    file:Path, # Of `survey_file`
    photos, # Paths; processes that have the same ones take what the first process has kept
) -> tuple|None: # (summed moments (4,4), photos in them, places of the photos that could not be read); None where nothing usable is kept
    "What `keep_survey` wrote"
    return on_rank0(lambda: _kept(file)) if have_same_photos(photos) else _kept(file)


def _kept(file):
    try:
        kept = json.loads(file.read_text(encoding='utf-8'))
        return np.array(kept['moments'], float).reshape(4, 4), int(kept['n_photos']), np.array(kept['bad'], int)
    except (OSError, ValueError, TypeError, KeyError): return None


def keep_survey(
    file:Path, # Of `survey_file`
    moments:np.ndarray, # (4,4), summed over the training photos that could be read
    n_photos:int, # How many these are
    bad, # Places of the photos that could not be read: they are tried again
):
    "Keep what was found, where that is possible"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, dict(moments=moments.tolist(), n_photos=n_photos, bad=sorted(bad)))
    except OSError: pass                                                          # a read-only home costs time, not the run
