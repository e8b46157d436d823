"""Photos that are nearly the same: scaled, compressed, cut a little, mirrored. A hash finds pairs, a small grey copy confirms them."""

import numpy as np
import torch
from PIL import Image
from scipy.fft import dctn

__all__ = ['side', 'small_grey', 'hash_bits', 'near_pairs', 'nearest']

side = 16 # Of the small copy, pixels
most_bits, least_likeness = 12, .96 # Of 64; correlation. Measured by nbs/experiments/near_duplicates.py


def small_grey(
    rgb: Image.Image|torch.Tensor, # A photo: PIL, or (3,H,W) uint8
) -> np.ndarray: # (16,16) uint8
    "A photo's small grey copy"
    if not isinstance(rgb, Image.Image): rgb = Image.fromarray(rgb.permute(1, 2, 0).contiguous().numpy())
    return np.asarray(rgb.convert('L').resize((side, side), Image.Resampling.BOX))


def hash_bits(
    small: np.ndarray, # (n,16,16) uint8, from `small_grey`
) -> np.ndarray: # (n,64) of -1 and 1
    "The perceptual hash: which of the 64 lowest frequencies are above their median (Zauner, 2010)"
    low = dctn(small.astype(np.float32), axes=(1, 2))[:, :8, :8].reshape(len(small), 64)
    low[:, 0] = 0                                                     # the brightness
    return np.where(low > np.median(low, axis=1, keepdims=True), 1, -1).astype(np.int8)


def _unit(small):
    "Copies without their brightness and contrast; a flat one is like nothing"
    x = small.reshape(len(small), -1).astype(np.float32)
    x -= x.mean(1, keepdims=True)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return x/np.where(length > side, length, np.inf)                  # a standard deviation of one grey level at least


def near_pairs(
    first: np.ndarray, # (n,16,16) uint8
    second: np.ndarray, # (m,16,16) uint8
    most: int = 1 << 25, # Pairs that are looked at together
): # Yields (i, j, likeness): places, and the correlation of the copies
    "Pairs that are nearly the same, also where one of them is mirrored"
    if not len(first) or not len(second): return
    chunk = max(1, most//len(second))
    for there in (second, second[:, :, ::-1]):
        bits, unit = torch.from_numpy(hash_bits(there)).float().T.contiguous(), _unit(there)
        for at in range(0, len(first), chunk):
            some = first[at:at + chunk]
            close = (torch.from_numpy(hash_bits(some)).float() @ bits >= 64 - 2*most_bits).nonzero().numpy()
            like = (_unit(some)[close[:, 0]]*unit[close[:, 1]]).sum(1)
            for (i, j), r in zip(close[like >= least_likeness].tolist(), like[like >= least_likeness].tolist()): yield at + i, j, r


def nearest(
    small: dict, # {split: (n,16,16) uint8}, in the order in which splits are compared
): # Yields (split, place, other split, its place, likeness): once for each photo that is nearly one of an earlier split
    "Photos of later splits that are nearly those of earlier ones, each with the likest"
    names = list(small)
    for k, split in enumerate(names):
        best = {}
        for other in names[:k]:
            for i, j, r in near_pairs(small[other], small[split]):
                if r > best.get(j, (0,))[0]: best[j] = r, other, i
        for j, (r, other, i) in sorted(best.items()): yield split, j, other, i, r
