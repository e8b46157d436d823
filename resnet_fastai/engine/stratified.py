"""Draw validation and test photos from a heap: every class alike; groups, and copies of a photo, stay whole"""

import hashlib
import os
import re
import shutil
import warnings
from collections import Counter
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

from .arguments import whole_number
from .convert import lay_out, some
from .files import DataError, PhotoError, open_regular, quote, read_regular
from .layout import DataPaths, _new_folder, _settle
from .loader import each_photo
from .photo import open_photo

__all__ = ['copies', 'name_keys', 'pieces', 'draw', 'draw_folds', 'check_shares', 'lay_out_heap']

# ── What stays together ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _sides(path) -> tuple|None:
    "The sides of a photo, the shorter one first; None where its header cannot be read"
    try:
        with open_regular(path) as f, Image.open(f) as img: return tuple(sorted(img.size))
    except Exception: return None


def _digest(path) -> bytes:
    "SHA-256 of a photo's upright pixels; of its bytes where they are no photo; of its name where they cannot be read"
    try: rgb = np.asarray(open_photo(path))
    except PhotoError:
        try: return hashlib.sha256(read_regular(path)).digest()
        except OSError: return hashlib.sha256(os.fsencode(path)).digest()
    return hashlib.sha256(repr(rgb.shape).encode() + rgb.tobytes()).digest()


def copies(
    paths: list, # Photos
    num_workers: int|None = None, # Threads; None: one a core
) -> list: # A key for each: equal where all pixels are; None where no other photo has its sides
    "Find photos that are there more than once, whatever their names and files"
    sides = list(each_photo(_sides, paths, num_workers))
    often, keys = Counter(sides), [None]*len(paths)
    again = [i for i, s in enumerate(sides) if often[s] > 1]
    for i, key in zip(again, each_photo(_digest, [paths[i] for i in again], num_workers)): keys[i] = key
    return keys


def name_keys(
    names: list, # Of photos, with their folders
    pattern: str, # A regular expression; its groups, or all that it matches, are the key
    source: str|Path, # Where they come from, for error messages
) -> list: # A key for each; None where nothing matches
    "What a regular expression finds in names: photos of one key belong together"
    try: found = [re.search(pattern, n) for n in names]
    except re.error as e: raise DataError(f"group={quote(pattern)} is no regular expression: {e}") from None
    if not any(found):
        raise DataError(f"group={quote(pattern)} matches none of the {len(names):,} names in {source}, which look like {quote(names[0])}")
    return [(m.groups() or m[0]) if m else None for m in found]


def pieces(
    *columns: list, # A key for each photo, None where it has none
) -> np.ndarray: # A number for each photo
    "Number what must stay whole: photos that share a key, directly or through others"
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
    n, node = len(columns[0]), {}
    links = [(i, node.setdefault((c, key), n + len(node)))
             for c, keys in enumerate(columns) for i, key in enumerate(keys) if key is not None]
    at = np.array(links, int).reshape(-1, 2).T
    graph = coo_array((np.ones(len(links)), tuple(at)), shape=[n + len(node)]*2)
    return connected_components(graph, directed=False)[1][:n]


# ── Drawing ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _parts(y, piece, n, seed) -> list:
    "Places in at most `n` parts, each with its share of every class, which cut no piece"
    from sklearn.model_selection import StratifiedGroupKFold          # comes with fastai
    order = np.random.default_rng(seed).permutation(len(y))           # our own, so that every version of scikit-learn draws the same
    _, first, number = np.unique(piece[order], return_index=True, return_inverse=True)
    n = max(2, min(n, np.bincount(y).max(), len(first)))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')                               # about small classes, which we name ourselves
        found = StratifiedGroupKFold(n).split(order, y[order], first.argsort().argsort()[number])
        return [order[test] for _, test in found]


def _take(y, piece, share, seed) -> np.ndarray:
    "Places of whole pieces that make about `share` of every class"
    nearest = Fraction(1, round(1/share)) if share < .1 else min(Fraction(share).limit_denominator(10), Fraction(9, 10))
    parts = _parts(y, piece, nearest.denominator, seed)
    some_parts = min(max(1, round(nearest*len(parts))), len(parts) - 1)
    counts = np.array([np.bincount(y[p], minlength=y.max() + 1) for p in parts])
    total = counts.sum(0)
    off = lambda chosen: ((counts[list(chosen)].sum(0) - share*total)**2/total.clip(1)).sum()
    return np.concatenate([parts[k] for k in min(combinations(range(len(parts)), some_parts), key=off)])


def _free(y, piece, train) -> np.ndarray:
    "Places in training whose piece is not the last one of a class"
    at = np.flatnonzero(train)
    held = np.bincount(np.unique(np.stack([y[at], piece[at]]), axis=1)[0], minlength=y.max() + 1)
    return at[~np.isin(piece[at], piece[at][held[y[at]] == 1])]


def _keep_one(y, piece, train, taken) -> np.ndarray:
    "`taken` without those pieces that a class needs to be trained on"
    taken = np.sort(taken)
    while len(lost := np.setdiff1d(y[taken], y[np.setdiff1d(np.flatnonzero(train), taken)])):
        mine, size = piece[taken][y[taken] == lost[0]], Counter(piece[taken].tolist())
        taken = taken[piece[taken] != min(mine.tolist(), key=lambda p: (size[p], p))]
    return taken


def _draw(y, piece, train, share, seed) -> np.ndarray:
    "Places taken out of training"
    free = _free(y, piece, train)
    if len(np.unique(piece[free])) < 2: return free[:0]
    _, own = np.unique(y[free], return_inverse=True)
    return _keep_one(y, piece, train, free[_take(own, piece[free], share, seed)])


def draw(
    y: np.ndarray, # (n,) the class of each photo, from 0 on
    piece: np.ndarray, # (n,) from `pieces`
    val: float, # Share of the validation photos
    test: float = 0, # Share of the test photos; 0: none
    seed: int = 42, # The same seed draws the same photos
) -> np.ndarray: # (n,) of 'train', 'val' and 'test'
    "Draw validation and test photos, about the same share of every class; no class loses its last piece for training"
    split = np.full(len(y), 'train', object)
    if test: split[_draw(y, piece, split == 'train', test, (seed, 1))] = 'test'
    split[_draw(y, piece, split == 'train', val/(1 - test), (seed, 0))] = 'val'
    return split


def draw_folds(
    y: np.ndarray, # (n,) the class of each photo, from 0 on
    piece: np.ndarray, # (n,) from `pieces`
    folds: int, # So many parts; each is the validation photos once
    test: float = 0, # Share of the test photos, the same in all folds; 0: none
    seed: int = 42, # The same seed draws the same photos
) -> list: # Of what `draw` returns
    "Draw the splits of a cross-validation"
    split = np.full(len(y), 'train', object)
    if test: split[_draw(y, piece, split == 'train', test, (seed, 1))] = 'test'
    free, train = _free(y, piece, split == 'train'), split == 'train'
    _, own = np.unique(y[free], return_inverse=True)
    found = _parts(own, piece[free], folds, (seed, 0)) if len(np.unique(piece[free])) > 1 else []
    if len(found) < folds:
        raise DataError(f"folds is {folds}, but no class has so many photos that may lie in different folds; ask for fewer")
    def one(part):
        out = split.copy()
        out[_keep_one(y, piece, train, free[part])] = 'val'
        return out
    return [one(part) for part in found]


# ── From a heap to folders ───────────────────────────────────────────────────────────────────────────────────────────────────


def check_shares(val, test, folds):
    "A `DataError` where the shares, or the number of folds, make no sense"
    share = lambda v, least: isinstance(v, (int, float)) and not isinstance(v, bool) and least <= v < 1
    if not share(val, 1e-9) or not share(test, 0) or val + test >= 1:
        raise DataError(f"val is {quote(val)} and test is {quote(test)}; shares from 0 to 1 are needed that leave photos "
                        "to train on, like .2 and .1")
    if folds is not None: whole_number('folds', folds, 2)


def _tell(source, rows, names, y, split, copy, keys):
    "What was drawn, and which classes are too small to say much"
    n, amounts = Counter(split.tolist()), np.bincount(y)
    print(f"{Path(source).name}: {len(y):,} photos of {len(names):,} classes: {n['train']:,} to train on, {n['val']:,} to validate with"
          + (f", {n['test']:,} to test with" if n['test'] else '')
          + (f"; {len({k for k in keys if k is not None}):,} groups, each in one split" if any(k is not None for k in keys) else ''))
    labels = {}
    for r, key in zip(rows, copy): labels.setdefault(key, []).append(r)
    twice = [rs for key, rs in labels.items() if key is not None and len(rs) > 1]
    if twice: print(f"  {sum(map(len, twice)) - len(twice):,} photos are copies of others and stay in one split with them; "
                    f"first: {twice[0][1].name} of {twice[0][0].name}")
    if torn := next((rs for rs in twice if len({r.label for r in rs}) > 1), None):
        other = next(r for r in torn if r.label != torn[0].label)
        print(f"  copies with different labels: {torn[0].name} is {quote(torn[0].label)}, {other.name} is not; check them")
    if (few := np.flatnonzero(amounts <= 2)).size:
        print('  classes with one or two photos: ' + some(f'{names[i]} ({amounts[i]})' for i in few))
    if len(none := np.setdiff1d(y, y[split == 'val'])): print('  without a validation photo: ' + some(names[none]))


def _drawn(rows, source, val, test, seed, keys, folds):
    "Yields the rows with their splits, as often as there are folds"
    own = [i for i, r in enumerate(rows) if r.split == 'train']
    if test and len(own) < len(rows): raise DataError(f"{source} has test photos already; leave out test=")
    mine, keys = [rows[i] for i in own], [keys[i] if keys else None for i in own]
    names, y = np.unique(np.array([r.label for r in mine], object), return_inverse=True)
    piece = pieces(copy := copies([r.path for r in mine]), keys)
    found = [draw(y, piece, val, test, seed)] if folds is None else draw_folds(y, piece, folds, test, seed)
    if not all((s == 'val').any() for s in found):
        raise DataError(f"{source} has no class with two photos that may lie in different splits "
                        f"({len(own):,} photos, {piece.max() + 1:,} groups and copies)")
    _tell(source, mine, names, y, found[0], copy, keys)
    for s in found: yield [r._replace(split=t) for r, t in zip(mine, s)] + [r for r in rows if r.split != 'train']


def lay_out_heap(
    rows: list, # Of `Row`; those of the split 'train' are drawn from
    source: str|Path, # Where they come from, for messages
    dest: str|Path, # A new folder
    val: float = .2, # Share of the validation photos
    test: float = 0, # Share of the test photos; 0: none
    seed: int = 42, # The same seed draws the same photos
    keys: list|None = None, # A key for each row: photos of one key stay in one split; None: no groups
    folds: int|None = None, # So many layouts, `fold1` and so on; each photo is for validation in one of them
) -> DataPaths|list: # dest and its two JSON files; with `folds` one a fold
    "Draw splits and link the photos into a new folder"
    check_shares(val, test, folds)
    tmp, place = _new_folder(dest := Path(dest)), lambda k: f'fold{k}' if folds else 'all'          # or its error, before anything is read
    try:
        made = [lay_out(drawn, source, tmp/place(k)) for k, drawn in enumerate(_drawn(rows, source, val, test, seed, keys, folds), 1)]
        _settle(tmp if folds else made[0].data_path, dest)
        places = [dest/place(k) for k, _ in enumerate(made, 1)] if folds else [dest]
        found = [DataPaths(d, d/'labels.json', d/'encoding.json') for d in places]
        return found if folds else found[0]
    finally: shutil.rmtree(tmp, ignore_errors=True)
