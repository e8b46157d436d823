"""Photos with a name, a label and a split become this project's layout: links, labels.json and encoding.json"""

import os
import re
import shutil
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .files import DataError
from .ids import normal_id
from .layout import DataPaths, _finish, _new_folder, link_photo, list_photos

__all__ = ['Row', 'PhotoFinder', 'draw_splits', 'number_labels', 'some', 'lay_out']


class Row(NamedTuple):
    "A photo of a collection"
    name: str # Its path below the split's folder
    path: Path # Where it is
    label: str # '' where it has none, which only test photos may
    split: str # 'train', 'val' or 'test'


class PhotoFinder:
    "The photos below a folder, found by names that may be written otherwise: NFC and NFD, \\ and /, another folder above"
    def __init__(self,
        folder: str|Path, # Searched to the bottom, when a name is first not found as it stands
    ): self.folder, self.listed, self.ends = Path(folder), None, defaultdict(list)

    def _list(self) -> dict:
        "{id: path} of every photo; `ends`: the ids that end in a name or a stem"
        if self.listed is None:
            self.listed = {normal_id(os.path.relpath(p, self.folder)): p for p in list_photos(self.folder)}
            for key in self.listed:
                for end in {name := key.rpartition('/')[2], os.path.splitext(name)[0]}: self.ends[end].append(key)
        return self.listed

    def exact(self,
        name: str, # A path below the folder
    ) -> Path|None: # None where it is not there
        "A photo by its path"
        if os.path.isabs(name) or '..' in (key := normal_id(name)).split('/'): return None
        if (path := self.folder/name).is_file(): return path
        return None if key.isascii() and key == name else self._list().get(key)

    def tail(self,
        name: str, # A path, of another machine perhaps; the end of it counts; a suffix may lack
    ) -> Path|None: # None where no photo fits; a `DataError` where several do
        "A photo by as much of the end of its path as is needed"
        parts, listed = normal_id(name).split('/'), self._list()
        for k in range(len(parts)):
            if found := listed.get('/'.join(parts[k:])): return found
        same = self.ends.get(parts[-1], [])
        if len(same) > 1:
            raise DataError(f"{name[:80]!r} may be {same[0]} or {same[1]} in {self.folder}; name the folder that it is relative to with "
                            "folder=")
        return listed[same[0]] if same else None


def draw_splits(
    rows: list, # Of `Row`
    source: str|Path, # Where they come from, for error messages
    valid_pct: float = .2, # Share of the validation photos
    seed: int = 42, # The same seed draws the same rows
) -> list: # Of `Row`
    "Draw the validation photos among those for training; no label loses its last training photo"
    if not 0 < valid_pct < 1: raise DataError(f"valid_pct is {valid_pct}; a share between 0 and 1 is needed")
    own = [i for i, r in enumerate(rows) if r.split == 'train']
    if len(own) < 2: raise DataError(f"{source} names one photo; training needs one, and validation another")
    n_valid = min(max(round(valid_pct*len(own)), 1), len(own) - 1)
    drawn = {i for i, k in zip(own, np.random.default_rng(seed).permutation(len(own))) if k < n_valid}
    left = {rows[i].label for i in own if i not in drawn}
    for i in sorted(drawn):
        if rows[i].label not in left and len(drawn) > 1: left.add(rows[i].label); drawn.discard(i)
    return [r._replace(split='val') if i in drawn else r for i, r in enumerate(rows)]


def number_labels(
    labels, # Texts
) -> dict: # {label: index}
    "Number labels in their order, which for whole numbers is that of their values"
    found = sorted(set(labels))
    return {l: i for i, l in enumerate(sorted(found, key=int) if all(re.fullmatch('[0-9]+', l) for l in found) else found)}


def _check(rows, source):
    "Refuse what cannot be trained on, or is probably meant otherwise"
    train, val = ({r.label for r in rows if r.split == s} for s in ('train', 'val'))
    if not train or not val:
        raise DataError(f"{source} has all its photos in one split ({len(rows):,}); training needs some, and validation others")
    if train.isdisjoint(val):
        raise DataError(f"{source} has no label in common between its training photos ({some(train)}) and its validation "
                        f"photos ({some(val)}); are the labels what these folders or columns say?")
    if only := val - train:
        raise DataError(f"{source} has validation photos of {some(only)}, and no training photos; move some of them to the training photos")
    if len(train) < 2:
        raise DataError(f"{source} gives all its photos the label {next(iter(train))[:80]!r}; at least two labels are needed")


def some(
    names, # Texts
    most: int = 5, # So many are shown
) -> str: # For an error message
    "The first few names"
    names = sorted(map(str, names))
    return ', '.join(n[:40] for n in names[:most]) + (f' and {len(names) - most:,} more' if len(names) > most else '')


def _known_only(rows, source) -> list:
    "Test photos whose label no training photo has keep no label"
    known = {r.label for r in rows if r.split != 'test'}
    strange = [r for r in rows if r.label and r.label not in known]
    if strange:
        print(f"{source}: {len(strange):,} test photos stay without a label; no training photo has theirs: "
              f"{some({r.label for r in strange})}")
    return [r if r.label in known else r._replace(label='') for r in rows]


def lay_out(
    rows: list, # Of `Row`
    source: str|Path, # Where they come from, for error messages
    dest: str|Path, # A new folder
) -> DataPaths: # dest and its two JSON files
    "Link the photos into a new folder and write the two JSON files"
    _check(rows, source)
    rows = _known_only(rows, source)
    full = {f'{r.split}/{r.name}' for r in rows}
    plain = full.isdisjoint(r.name for r in rows) and len({r.name for r in rows}) == len(rows)        # no path is taken for another's
    labels = {r.name if plain else f'{r.split}/{r.name}': r.label for r in rows if r.label}
    tmp = _new_folder(dest := Path(dest))
    try:
        for r in rows: link_photo(r.path, tmp/r.split/r.name)
        return _finish(tmp, dest, labels, number_labels(set(labels.values())))
    finally: shutil.rmtree(tmp, ignore_errors=True)
