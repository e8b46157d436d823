"""Find bad photos and labels before the first epoch, and make large photos small, once."""
__all__ = ['check_data', 'shrink_photos']

import hashlib
import os
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
from fastai.torch_core import rank_distrib
from PIL import Image

from ..augment import resize_short
from ..data import LabelMap, resolve_data
from ..engine.arguments import whole_number
from ..engine.files import DataError, PhotoError, quote, read_json_object, atomic_write, write_json
from ..engine.label_files import alike, as_label, read_encoding, read_ids
from ..engine.layout import _scan, link_photo, list_photos, split_photos, splits
from ..engine.batching import prefetch
from ..engine.loader import each_photo, join_processes, local_rank0_first
from ..engine.near import nearest, side, small_grey
from ..engine.photo import Photo
from ..engine.shared import shared_out
from ..engine.shards import open_shards


def _look(path):
    "(what is wrong, size, digest, small grey copy) of a photo"
    try:
        photo = Photo(path)
        small = small_grey(photo.pixels()[0])
        return None, photo.size, hashlib.sha256(photo.data).hexdigest(), small
    except PhotoError as e: return str(e), None, None, np.zeros((side, side), np.uint8)


def _reading_problems(split, path, wrong, size):
    if wrong: yield 'truncated' if 'cut short' in wrong or 'truncated' in wrong else 'unreadable', split, path, wrong
    elif min(size) < 32 or max(size) > 10*min(size): yield 'suspicious size', split, path, f'{size[0]}×{size[1]} pixels'


def _near_problems(photos, small, known):
    "Photos that are nearly the same as one of another split, and not known to be the same file"
    small = {s: np.array(copies, np.uint8).reshape(-1, side, side) for s,copies in small.items()}
    for split,j,other,i,likeness in nearest(small):
        if str(path := photos[split][j]) not in known:
            yield 'nearly the same photo in two splits', split, path, f'like {photos[other][i]} ({likeness:.2f})'


def _label_problems(photos, pairs, encoding):
    labels, claimed = dict(reversed(pairs)), {}
    find = LabelMap(dict.fromkeys(labels, next(iter(encoding))), encoding).find_id
    for split,path in ((s, p) for s,paths in photos.items() for p in paths):
        if (i := find(path)) is None:
            if split != 'test': yield 'no label', split, path, 'no id fits'
            continue
        if claimed.setdefault(i, path) is not path: yield 'duplicate id', split, path, f"the id {quote(i)} also fits {claimed[i]}"
        if as_label(labels[i]) not in encoding: yield 'unknown label', split, path, f"{quote(labels[i])} has no index"
    yield from (('no photo', '', i, 'a label for a photo that is not there') for i in labels if i not in claimed)
    yield from (('two labels', '', i, f'{quote(l)} and {quote(labels[i])}') for i,l in pairs if as_label(l) != as_label(labels[i]))
    used = {*encoding, *filter(None, (as_label(l) for l in labels.values()))}
    yield from (('labels alike', '', a, f'{quote(a)} and {quote(b)} differ only in case or space') for a,b in alike(used))


def check_data(
    data_path:str|Path, # Folder with train/ and val/ (test/ may be there), or the URL of an archive of one
    label_path:str|Path, # JSON {image id: label}, or a DataFrame of two columns
    label_encoding:str|Path, # JSON {label: index}, or a DataFrame of two columns
    num_workers:int|None=None, # Threads; None: one a core
) -> pd.DataFrame: # A row for each problem: problem, split, photo, detail
    "Read every photo and match every label; what is wrong, before training finds out. Several processes share the reading"
    (pairs,_), (encoding,_) = read_ids(label_path), read_encoding(label_encoding)
    join_processes()
    with local_rank0_first(): root, seen, rows, small, twice = resolve_data(data_path), {}, [], {s: [] for s in splits}, set()
    photos = split_photos(root)
    of, paths = [s for s in splits for _ in photos[s]], photos['train'] + photos['val'] + photos['test']
    found = shared_out(lambda some: prefetch(_look, some, num_workers, single=True), paths, ['check_data', side])
    for (wrong,size,digest,copy),split,path in zip(found, of, paths):
        rows += _reading_problems(split, path, wrong, size)
        small[split].append(copy)
        if digest and (first := seen.setdefault(digest, (split, path)))[0] != split:
            twice.add(str(path))
            rows.append(('same photo in two splits', split, path, f'also {first[1]}'))
    rows += _near_problems(photos, small, twice)
    rows += _label_problems(photos, pairs, encoding)
    rows += [('no photo by its name', s, p, 'left out') for s in splits if (root/s).is_dir() for p in sorted(_scan(root/s, photos=False))]
    if not rank_distrib(): print(f'{len(paths):,} photos read, {len(rows):,} problems')
    short = lambda o: str(o).replace(os.path.join(root, ''), '')
    return pd.DataFrame([(problem, s, short(p), short(why)) for problem,s,p,why in rows], columns=['problem', 'split', 'photo', 'detail'],
                        dtype=object)

_kinds = {**dict.fromkeys(('.jpg', '.jpeg', '.jpe', '.jfif'), 'JPEG'), **dict.fromkeys(('.tif', '.tiff'), 'TIFF'),
          '.png': 'PNG', '.webp': 'WEBP', '.bmp': 'BMP'}                          # what is written anew; other kinds are linked


def shrunk(
    path:str|Path, # Of a photo
    side:int, # Its new short side, pixels
    quality:int=95, # Of a JPEG, 1 to 100
) -> bytes|None: # None where it is small already, or of a kind that is not written anew
    "A large photo, written anew and upright; a `PhotoError` where it cannot be read"
    photo, kind = Photo(path), _kinds.get(os.path.splitext(path)[1].lower())
    if kind is None or min(photo.size) <= side: return None
    rgb,_ = photo.pixels(2*side)                                      # twice the size: then it is resized once, and hardly by the decoder
    if not isinstance(rgb, Image.Image): rgb = Image.fromarray(rgb.permute(1,2,0).contiguous().numpy())
    resize_short(rgb, side).save(out := BytesIO(), kind, quality=quality)
    return out.getvalue()


def check_shrinking(
    short_side:int, # Pixels
    quality:int, # Of a JPEG
):
    "A `DataError` where these cannot be"
    whole_number('short_side', short_side, 1, 65_535)
    whole_number('quality', quality, 1, 100)


def _shrink(path, root, dest, side, quality):
    "What became of one photo: 'shrunk', 'linked' or 'kept' (from an earlier call), or why it cannot be read"
    out = dest/path.relative_to(root)
    if not path.exists(): return _linked(path, out, f'{str(path)!r} leads nowhere')
    was = path.stat()
    if out.exists() and out.stat().st_mtime_ns == was.st_mtime_ns: return 'kept'
    try:
        if (data := shrunk(path, side, quality)) is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(out) as part:
                part.write_bytes(data)
                os.utime(part, ns=(was.st_mtime_ns, was.st_mtime_ns))
            return 'shrunk'
    except PhotoError as e: return _linked(path, out, str(e))
    return _linked(path, out, 'linked')


def _linked(path, out, said):
    out.unlink(missing_ok=True)
    link_photo(path, out)
    return said


def _open_dest(dest, root, note):
    "A new folder with a note of what it is for, or one that an earlier call with the same note has begun"
    mark = dest/'.shrunk.json'
    if dest.resolve().is_relative_to(root.resolve()): raise DataError(f"{dest} lies inside {root}; name a folder beside it")
    if mark.exists():
        if (old := read_json_object(mark)) != note: raise DataError(f"{dest} was made with {old}, now it is {note}; name another folder")
    elif dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise DataError(f"{dest} exists already and is not touched; name a new folder")
    dest.mkdir(parents=True, exist_ok=True)
    write_json(mark, note)


def shrink_photos(
    data_path:str|Path, # Folder with train/, val/ and so on
    dest:str|Path, # A new folder, or one that an earlier call has begun
    short_side:int=480, # Larger photos are resized to this short side, pixels; training looks at 480 at most, 50 crops at 640
    quality:int=95, # Of the JPEG files, 1 to 100
    num_workers:int|None=None, # Threads; None: one a core
) -> Path: # dest: the same names, ready to train on
    "Write large photos anew at the size that training needs; whatever is small, or cannot be read, is linked as it is"
    check_shrinking(short_side, quality)
    root, dest = resolve_data(data_path), Path(dest)
    if open_shards(root):
        raise DataError(f"{root} holds shards; pack_photos(src, dest, short_side={short_side}) makes smaller ones of them")
    _open_dest(dest, root, dict(source=str(root.resolve()), short_side=short_side, quality=quality))
    paths = list_photos(root)
    fates = list(each_photo(partial(_shrink, root=root, dest=dest, side=short_side, quality=quality), paths, num_workers))
    for p in root.glob('*.json'):
        if not (dest/p.name).exists(): link_photo(p, dest/p.name)
    bad = [f for f in fates if f not in ('shrunk', 'linked', 'kept')]
    print(f"{len(paths):,} photos: " + ', '.join(f"{fates.count(w):,} {w}" for w in ('shrunk', 'linked', 'kept'))
          + (f", {len(bad):,} that cannot be read linked as they are (first: {bad[0].replace(os.path.join(root, ''), '')})" if bad else ''))
    return dest
