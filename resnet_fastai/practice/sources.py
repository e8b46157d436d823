"""Class folders, a CSV, ImageNet and Imagenette, each brought into this project's layout by one call."""
__all__ = ['read_synsets', 'label_synsets', 'read_ground_truth', 'from_imagenet', 'imagenette']

import os
import shutil
from collections.abc import Iterator
from io import BytesIO
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
from fastai.data.external import URLs, untar_data
from scipy.io import loadmat

from ..engine.class_folders import from_folders
from ..engine.fetch import resolve_data
from ..engine.files import DataError, LabelError, read_json_object
from ..engine.layout import DataPaths, _finish, _new_folder, _scan, link_photo, list_photos
from .exports import from_export  # noqa: F401  from here to users
from .tables import from_csv, read_table  # noqa: F401


def _read(path):
    try: return Path(path).read_bytes()
    except OSError as e: raise DataError(f"{path} cannot be read: {e.strerror or e}") from None


def _lines(path):
    "The lines of a text that are not blank"
    try: text = _read(path).decode('utf-8-sig')
    except ValueError as e: raise DataError(f"{path} is not a text in UTF-8: {e}") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _read_words(path):
    "(wnid, number, words) of a list with a line a class"
    rows = [line.split(None, 1) for line in _lines(path)]
    for row in rows:
        if len(row) < 2: raise LabelError(f"{path} has the line {row[0]!r}; one like 'n01440764 tench, Tinca tinca' is needed")
    return [(wnid, i, words) for i,(wnid,words) in enumerate(rows, 1)]


def _read_meta(path):
    "(wnid, number, words) of the classes in the development kit's meta.mat; inner nodes are left out"
    data = _read(path)
    try:
        s = np.atleast_1d(loadmat(BytesIO(data), squeeze_me=True)['synsets'])
        return [(str(w), int(i), str(t)) for w,i,t,n in zip(s['WNID'], s['ILSVRC2012_ID'], s['words'], s['num_children']) if n == 0]
    except Exception as e: raise DataError(f"{path} is not the meta.mat of ILSVRC2012's development kit ({type(e).__name__}: {e}); "
                                           "name the right one, or a list of the classes, with synsets=") from None


def read_synsets(
    path:str|Path, # LOC_synset_mapping.txt, synset_words.txt or meta.mat
) -> pd.DataFrame: # A row a class: `number`, from 1 on, and `words`, by `wnid`
    "ImageNet's classes, in the order of their numbers"
    rows = _read_meta(path) if Path(path).suffix == '.mat' else _read_words(path)
    if not rows: raise LabelError(f"{path} lists no classes")
    table = pd.DataFrame(rows, columns=['wnid', 'number', 'words'])
    for what in ('wnid', 'number'):
        if (again := table[what].duplicated()).any():
            raise LabelError(f"{path} has the {what} {table[what][again].iloc[0]} twice; keep one")
    return table.set_index('wnid').sort_values('number')


def label_synsets(
    synsets:pd.DataFrame, # From `read_synsets`
    order:str='official', # 'official': the file's number less 1; 'wnid': torchvision's, the place in the sorted wnids
) -> pd.DataFrame: # With columns `label` and `index` as well
    "Give each class a label that no other has, and its index, from 0 on"
    if order not in ('official', 'wnid'): raise DataError(f"order is {order!r}; it must be 'official' or 'wnid'")
    clash = synsets.words.duplicated(keep=False)
    index = synsets.number - 1 if order == 'official' else synsets.index.argsort().argsort()
    return synsets.assign(label=synsets.words.where(~clash, synsets.words + ' (' + synsets.index + ')'), index=index)


def _truth_of_csv(path):
    "{photo: wnid} of LOC_val_solution.csv"
    table = read_table(path)
    if list(table.columns) != ['ImageId', 'PredictionString']:
        raise DataError(f"{path} has the columns {', '.join(table.columns)}; ImageId,PredictionString, as in LOC_val_solution.csv, are "
                        "needed")
    return {photo: ((text.split() or [''])[0]) for photo,text in table.itertuples(index=False)}


def _truth_of_numbers(path, synsets):
    "{photo: wnid} of ILSVRC2012_validation_ground_truth.txt"
    wnid, lines = {str(n): w for w,n in synsets.number.items()}, _lines(path)
    for i,n in enumerate(lines, 1):
        if n not in wnid: raise LabelError(f"line {i} of {path} is {n[:40]!r}, which is not the number of a class in meta.mat")
    return {f'ILSVRC2012_val_{i:08}': wnid[n] for i,n in enumerate(lines, 1)}


def read_ground_truth(
    path:str|Path, # LOC_val_solution.csv or ILSVRC2012_validation_ground_truth.txt
    synsets:pd.DataFrame, # From `read_synsets`; for the .txt from meta.mat
) -> dict[str,str]: # {stem of a photo: wnid}
    "The classes of ImageNet's validation photos"
    truth = _truth_of_csv(path) if Path(path).suffix.lower() == '.csv' else _truth_of_numbers(path, synsets)
    lost = [photo for photo,wnid in truth.items() if wnid not in synsets.index]
    if lost: raise LabelError(f"{path} gives {lost[0]} the class {truth[lost[0]]!r}, which is not in the list of the classes "
                              f"({len(lost):,} of {len(truth):,} photos); is it another year's?")
    return truth

_split_folders = { # the first that is there counts
    s: (s, *more, f'ILSVRC2012_img_{s}') for s,more in dict(train=(), val=('valid', 'validation'), test=()).items()}
_synset_files = ('meta.mat', 'LOC_synset_mapping.txt', 'synset_words.txt')
_truth_files = ('LOC_val_solution.csv', 'ILSVRC2012_validation_ground_truth.txt')


def _find_splits(src):
    "{split: its folder} of ImageNet, in `src` or below"
    if not src.is_dir(): raise DataError(f"{src} is not a folder; name the one that ImageNet was unpacked in")
    known = [src/s for s in ('.', 'ILSVRC/Data/CLS-LOC', 'Data/CLS-LOC', 'CLS-LOC')]
    for base in known + sorted(p for p in src.iterdir() if p.is_dir()):
        found = {s: base/n for s,names in _split_folders.items() for n in reversed(names) if (base/n).is_dir()}
        if 'train' in found and 'val' in found: return found
    raise DataError(f"{src} has no train/ with a val/ beside it, neither at its top, nor in ILSVRC/Data/CLS-LOC/, nor one level down")


def _find_file(src, base, names):
    "The nearest file of one of these names; None where there is none"
    for place in (src, base, *Path(os.path.abspath(base)).parents[:3]):
        for folder in (place, *sorted(place.glob('ILSVRC2012_devkit*/data')), *sorted(place.glob('ILSVRC2012_devkit*'))):
            if found := next((folder/n for n in names if (folder/n).is_file()), None): return found


def _below(folder):
    "Every photo in a folder: (its path, that path below the folder), in order"
    start = len(os.path.join(folder, ''))
    if photos := [(p, p[start:]) for p in sorted(_scan(folder))]: return photos
    tar = min((t for t in _scan(folder, photos=False) if t.endswith('.tar')), default=None)
    raise DataError(f"{folder} holds no photos" + (f", but archives; unpack {tar} into a folder of its name, and so on" if tar else ''))


def _by_folder(
    folder:Path, # Holds a folder a class
    photos:list, # From `_below`
    wnids:set, # The classes that there are
    name:str|Path, # The file that lists them
) -> Iterator[tuple]: # (path, wnid)
    "The class of each photo, by the folder that it lies in"
    for path,rel in photos:
        wnid,sep,_ = rel.partition(os.sep)
        if not sep: raise LabelError(f"{path} lies in no synset folder; move it to {folder/'WNID'/rel}")
        if wnid not in wnids: raise LabelError(f"{folder/wnid} is no class in {name}; add a line for it there or move the folder away")
        yield path, wnid


def _stem(path): return os.path.splitext(os.path.basename(path))[0]


def _by_truth(
    folder:Path, # Holds photos
    photos:list, # From `_below`
    truth:dict, # From `read_ground_truth`
    name:str|Path, # The file that it was read from
) -> Iterator[tuple]: # (path, wnid)
    "The class of each photo, by the ground truth, which must name exactly these"
    lost = [p for p,_ in photos if _stem(p) not in truth]
    if lost: raise LabelError(f"{lost[0]} is not in {name} ({len(lost):,} of {len(photos):,} photos; the file has {len(truth):,}); "
                              "name the ground truth of these photos with ground_truth=")
    there = {_stem(p) for p,_ in photos}
    if gone := [photo for photo in truth if photo not in there]:
        raise DataError(f"{folder} has no photo {gone[0]} ({len(there):,} photos; {name} has {len(truth):,}); unpack the archive again")
    return ((p, truth[_stem(p)]) for p,_ in photos)


def _by_stem(
    found:Iterator, # (path, wnid) of photos
    label:dict, # {wnid: label}
) -> dict[str,str]: # {stem: label}
    "The labels by id; a `LabelError` where two photos share a stem"
    labels = {}
    for path,wnid in found:
        if (stem := _stem(path)) in labels: raise LabelError(f"{path} has the name of another photo, {stem!r}; rename or remove one")
        labels[stem] = label[wnid]
    return labels


def _link_folder(src, dest):
    try: os.symlink(src.resolve(), dest, target_is_directory=True)
    except OSError:
        for p in list_photos(src): link_photo(p, dest/p.relative_to(src))


def _val_classes(src, folder, synset_file, synsets, truth_file):
    "(path, wnid) of the validation photos, sorted or flat"
    photos = _below(folder)
    if any(os.sep in rel for _,rel in photos): return _by_folder(folder, photos, set(synsets.index), synset_file)
    truth_file = truth_file or _find_file(src, folder.parent, _truth_files)
    if truth_file is None: raise DataError(f"{folder} is flat, and there is no {' or '.join(_truth_files)} with the labels of its photos, "
                                           f"neither in {src} nor above; name one with ground_truth=")
    if Path(truth_file).suffix.lower() != '.csv' and Path(synset_file).suffix != '.mat':
        raise DataError(f"the numbers in {truth_file} count as meta.mat does, {synset_file} may not; name meta.mat with synsets=")
    return _by_truth(folder, photos, read_ground_truth(truth_file, synsets), truth_file)


def from_imagenet(
    src:str|Path, # ImageNet as Kaggle or image-net.org hand it out, or with its validation photos in synset folders
    dest:str|Path, # A new folder
    synsets:str|Path|None=None, # LOC_synset_mapping.txt, synset_words.txt or meta.mat; None: the nearest
    ground_truth:str|Path|None=None, # LOC_val_solution.csv or ILSVRC2012_validation_ground_truth.txt; None: the nearest
    order:str='official', # 'official': a class's number in `synsets` less 1; 'wnid': torchvision's indices
) -> DataPaths: # dest and its two JSON files
    "Turn ImageNet into this project's layout, linking the folders; src is left as it is"
    src, dest = Path(src), Path(dest)
    folders = _find_splits(src)
    file = synsets or _find_file(src, folders['train'].parent, _synset_files)
    if file is None: raise DataError(f"there is no list of the classes ({', '.join(_synset_files)}), neither in {src} nor above; "
                                     "name one with synsets=")
    table = label_synsets(read_synsets(file), order)
    tmp = _new_folder(dest)
    try:
        train = _by_folder(folders['train'], _below(folders['train']), set(table.index), file)
        val = _val_classes(src, folders['val'], file, table, ground_truth)
        labels = _by_stem(chain(train, val), table.label.to_dict())
        for split,folder in folders.items(): _link_folder(folder, tmp/split)
        return _finish(tmp, dest, labels, dict(zip(table.label, table['index'].tolist())))
    finally: shutil.rmtree(tmp, ignore_errors=True)


_imagenette = {
    'n01440764': ('tench', 0),        'n02102040': ('English springer', 217), 'n02979186': ('cassette player', 482),
    'n03000684': ('chain saw', 491),  'n03028079': ('church', 497),           'n03394916': ('French horn', 566),
    'n03417042': ('garbage truck', 569), 'n03425413': ('gas pump', 571),      'n03445777': ('golf ball', 574),
    'n03888257': ('parachute', 701)}


def _fetch_imagenette(size):
    urls = {160: URLs.IMAGENETTE_160, 320: URLs.IMAGENETTE_320, None: URLs.IMAGENETTE}
    if size not in urls: raise DataError(f"size is {size!r}; Imagenette comes with short sides of 160 or 320 pixels, or whole (None)")
    try: return untar_data(urls[size])
    except PermissionError: return resolve_data(urls[size])              # no home that fastai could write to
    except OSError as e: raise DataError(f"{urls[size]} cannot be fetched: {getattr(e, 'reason', None) or e}") from None


def imagenette(
    dest:str|Path, # A new folder
    size:int|None=160, # Short side of the photos, pixels: 160, 320, or None for whole photos
) -> DataPaths: # dest and its two JSON files
    "Fetch fastai's Imagenette and lay it out, with readable labels and torchvision's indices"
    dest = Path(dest)
    tmp = _new_folder(dest)
    try:
        found = from_folders(src := _fetch_imagenette(size), tmp)
        labels = read_json_object(found.label_path)
        odd = sorted(set(labels.values()) - set(_imagenette))
        if odd: raise DataError(f"{src} has the folder {odd[0]}, which is no class of Imagenette")
        return _finish(tmp, dest, {i: _imagenette[wnid][0] for i,wnid in labels.items()}, dict(_imagenette.values()))
    finally: shutil.rmtree(tmp, ignore_errors=True)
