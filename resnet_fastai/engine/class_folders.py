"""Class folders become this project's layout"""

from collections import Counter, defaultdict
from pathlib import Path

from .convert import Row, lay_out, some
from .files import DataError
from .ids import normal_text
from .layout import DataPaths, list_photos

__all__ = ['from_folders']

_split_names = dict(train=('train', 'training'), val=('val', 'valid', 'validation', 'dev'), test=('test', 'testing'))


def _split_folders(src: Path) -> dict:
    "{split: its folder}; a `DataError` where train or val is missing"
    try: folders = {p.name.lower(): p for p in sorted(src.iterdir(), reverse=True) if p.is_dir()}
    except OSError as e: raise DataError(f"{src} cannot be searched for photos: {e.strerror}") from None
    found = {s: folders[next(n for n in names if n in folders)] for s, names in _split_names.items() if any(n in folders for n in names)}
    for split in ('train', 'val'):
        if split not in found: raise DataError(f"{src} has no folder {' or '.join(n + '/' for n in _split_names[split])}")
    return found


def _rows(split, folder) -> list:
    "The photos of a split; the first folder below it is the label"
    photos = {p: p.relative_to(folder).as_posix() for p in list_photos(folder)}
    loose = [p for p, rel in photos.items() if '/' not in rel]
    if split == 'test': return [Row(rel, p, normal_text(rel.partition('/')[0]) if '/' in rel else '', split) for p, rel in photos.items()]
    if loose: raise DataError(f"{loose[0]} lies in no class folder; move it to {folder/'CLASS'/loose[0].name}")
    if not photos: raise DataError(f"{folder} holds no photos")
    _refuse_wrapped(folder, photos.values())
    return [Row(rel, p, normal_text(rel.partition('/')[0]), split) for p, rel in photos.items()]


def _refuse_wrapped(folder, names):
    "Refuse a single folder with others in it: the others are probably the classes"
    below = defaultdict(set)
    for n in names: below[n.partition('/')[0]].add(n.partition('/')[2].rpartition('/')[0].partition('/')[0])
    (only, inner), *others = below.items()
    if not others and len(inner - {''}) > 1:
        raise DataError(f"{folder} has one class folder, {only}/, with {some(inner - {''})} in it; if these are the classes, move them up into {folder}")


def _distinct(rows) -> list:
    "Rows whose names differ within their split: folders may be called the same in NFC and NFD"
    count = Counter((r.split, normal_text(r.name)) for r in rows)
    if twice := next((r for r in rows if count[r.split, normal_text(r.name)] > 1), None):
        raise DataError(f"{twice.path} has the name of another photo, in another spelling of its accents; rename one")
    return [r._replace(name=normal_text(r.name)) for r in rows]


def from_folders(
    src: str|Path, # Folder with train/CLASS/…, val/CLASS/… (or valid/, validation/) and perhaps test/
    dest: str|Path, # A new folder
) -> DataPaths: # dest and its two JSON files
    "Turn class folders into this project's layout, linking the photos where possible; src is left as it is"
    src = Path(src)
    return lay_out(_distinct([r for split, folder in _split_folders(src).items() for r in _rows(split, folder)]), src, dest)
