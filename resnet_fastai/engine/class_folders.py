"""Class folders become this project's layout"""

import hashlib
import re
from collections import Counter, defaultdict
from pathlib import Path

from .cache import cache_folder
from .convert import Row, lay_out, some
from .fetch import _archives, resolve_data
from .files import DataError
from .ids import normal_text
from .layout import DataPaths, _scan, list_photos, no_photos
from .stratified import lay_out_heap, name_keys

__all__ = ['from_folders']

_split_names = dict(train=('train', 'training'), val=('val', 'valid', 'validation', 'dev'), test=('test', 'testing'))


def _split_folders(src: Path) -> dict:
    "{split: its folder}; where there are no splits, all is for training"
    try: folders = {p.name.lower(): p for p in sorted(src.iterdir(), reverse=True) if p.is_dir() and p.name[0] != '.'}
    except OSError as e: raise DataError(f"{src} cannot be searched for photos: {e.strerror}") from None
    found = {s: folders[next(n for n in names if n in folders)] for s, names in _split_names.items() if any(n in folders for n in names)}
    if found and 'train' not in found:
        raise DataError(f"{src} has no folder train/ or training/ beside {some(p.name + '/' for p in found.values())}")
    if not found: _refuse_split_like(src, folders)
    return found or dict(train=src)


def _refuse_split_like(src, folders):
    "Refuse folders that are probably splits under other names"
    like = {n: s for n in folders for s, names in _split_names.items() if {*names} & {*re.split('[^a-z]+', n)}}
    if len({*like.values()}) > 1:
        raise DataError(f"{src} has the folders {some(like)}, which look like splits; call them train/, val/ and test/")


def _source(src) -> Path:
    "The folder of the classes; archives are unpacked in the cache"
    if '://' in str(src): return resolve_data(src, find=_find_classes)
    if not ((path := Path(src)).is_file() and path.name.lower().endswith(_archives)): return path
    was = path.stat()
    at = hashlib.sha256(f'{path.absolute()} {was.st_size} {was.st_mtime_ns}'.encode('utf-8', 'surrogateescape')).hexdigest()[:12]
    return resolve_data(path.absolute().as_uri(), cache_folder()/f'archive-{at}', _find_classes)


def _find_classes(folder, url) -> Path:
    "The folder in an archive that holds train/, or the class folders"
    inside = [p for p in sorted(folder.iterdir()) if p.is_dir() and p.name[0] != '.' and any(_scan(p))]
    wrapped = len(inside) == 1 and inside[0].name.lower() not in _split_names['train'] and any(p.is_dir() for p in inside[0].iterdir())
    return _find_classes(inside[0], url) if wrapped else folder


def _rows(split, folder) -> list:
    "The photos of a split; the first folder below it is the label"
    photos = {p: p.relative_to(folder).as_posix() for p in list_photos(folder)}
    loose = [p for p, rel in photos.items() if '/' not in rel]
    if split == 'test': return [Row(rel, p, normal_text(rel.partition('/')[0]) if '/' in rel else '', split) for p, rel in photos.items()]
    if loose: raise DataError(f"{loose[0]} lies in no class folder; move it to {folder/'CLASS'/loose[0].name}, "
                               "or name the labels in a CSV, which from_csv reads")
    if not photos: raise no_photos(folder)
    _refuse_wrapped(folder, photos.values())
    return [Row(rel, p, normal_text(rel.partition('/')[0]), split) for p, rel in photos.items()]


def _refuse_wrapped(folder, names):
    "Refuse a single folder with others in it: the others are probably the classes"
    below = defaultdict(set)
    for n in names: below[n.partition('/')[0]].add(n.partition('/')[2].rpartition('/')[0].partition('/')[0])
    (only, inner), *others = below.items()
    if not others and len(inner - {''}) > 1:
        raise DataError(f"{folder} has one class folder, {only}/, with {some(inner - {''})} in it; if these are the classes, move them up "
                        f"into {folder}")


def _distinct(rows) -> list:
    "Rows whose names differ within their split: folders may be called the same in NFC and NFD"
    count = Counter((r.split, normal_text(r.name)) for r in rows)
    if twice := next((r for r in rows if count[r.split, normal_text(r.name)] > 1), None):
        raise DataError(f"{twice.path} has the name of another photo, in another spelling of its accents; rename one")
    return [r._replace(name=normal_text(r.name)) for r in rows]


def from_folders(
    src: str|Path, # Folder with CLASS/…, or with train/CLASS/…, val/CLASS/… (or validation/), perhaps test/; or a .zip or .tar.gz of it
    dest: str|Path, # A new folder
    val: float = .2, # Share of the validation photos where src has no folder of them; drawn class by class
    test: float = 0, # Share of the test photos where src has no folder of them; 0: none
    seed: int = 42, # The same seed draws the same photos
    group: str|None = None, # A regular expression on a photo's path: photos in which it finds the same stay in one split
    folds: int|None = None, # So many layouts in dest, `fold1` and so on, for a cross-validation
) -> DataPaths|list: # dest and its two JSON files; with `folds` one a fold
    "Turn class folders into this project's layout, linking the photos where possible; src is left as it is"
    there = _split_folders(_source(src))
    rows = _distinct([r for split, below in there.items() for r in _rows(split, below)])
    if 'val' not in there:
        keys = None if group is None else name_keys([r.name for r in rows], group, src)
        return lay_out_heap(rows, src, dest, val, test, seed, keys, folds)
    if test or group is not None or folds is not None:
        raise DataError(f"{src} has its own {there['val'].name}/, so that nothing is drawn; leave out test=, group= and folds=, "
                        f"or draw from {there['train']} alone")
    return lay_out(rows, src, dest)
