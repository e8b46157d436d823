"""Find the photos of a folder or of its shards, and make the folders that training reads: train/, val/, test/ and two JSON files."""
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from fastcore.foundation import L

from .files import _umask, DataError, write_json
from .shards import open_shards, Shards, Source


photo_suffixes = frozenset('.jpg .jpeg .jpe .jfif .png .webp .gif .bmp .dib .tif .tiff .avif '
                           '.heic .heif .jp2 .mpo .ppm .pgm .pbm .tga'.split())
raw_suffixes = frozenset('.arw .cr2 .cr3 .dng .nef .orf .pef .raf .raw .rw2 .srw'.split())       # what a camera's sensor saw


def _scan(folder, above=(), photos=True):
    "Photos below a folder, or all the other files, in no order"
    try:
        me = ((s := os.stat(folder)).st_dev, s.st_ino)
        if me in above: return                                        # a link to a folder that it lies in
        with os.scandir(folder) as found: entries = [e for e in found if e.name[0] != '.']
    except OSError as e: raise DataError(f"{folder} cannot be searched for photos: {e.strerror}") from None
    for e in entries:
        if os.path.isdir(e.path) if e.is_symlink() else e.is_dir(): yield from _scan(e.path, (*above, me), photos)
        elif (os.path.splitext(e.name)[1].lower() in photo_suffixes) == photos: yield e.path


def no_photos(
    folder:str|Path, # Where none was found
) -> DataError: # To be raised
    "Says so, and what is there in their place"
    raw = []
    with suppress(DataError): raw = sorted({os.path.splitext(p)[1].lower() for p in _scan(folder, photos=False)} & raw_suffixes)
    advice = f"; {' and '.join(raw)} files hold what a camera's sensor saw: export them as JPEG" if raw else ''
    return DataError(f"{folder} holds no photos (looked for .jpg, .png and so on, to the bottom){advice}")


def list_photos(
    folder:str|Path, # Searched to the bottom; hidden files are left out; or a folder of shards
) -> list[Path]: # Sorted paths
    "Every photo in a folder, flat or nested"
    if (shards := open_shards(folder)): return sorted(ShardList(shards, shards.rows()))
    return [Path(p) for p in sorted(_scan(folder))] if Path(folder).is_dir() else []


def folder_photos(
    folder:str|Path, # Searched to the bottom; hidden files are left out; or a folder of shards
) -> 'PhotoList': # Sorted
    "Every photo in a folder, in the order of `list_photos`"
    if (shards := open_shards(folder)):
        photos = ShardList(shards, shards.rows())
        texts = list(photos.texts())
        return photos[sorted(range(len(texts)), key=texts.__getitem__)]
    root = os.path.join(folder, '')
    return PhotoList(folder, [os.fsencode(Path(os.path.relpath(p, root)).as_posix()) for p in list_photos(folder)])


def training_photos(
    folder:str|Path, # Folder with train/, any folder of photos, or shards of one
) -> 'PhotoList': # Sorted
    "The photos of train/, or all where there is no such folder"
    if (shards := open_shards(folder)): return ShardList(shards, shards.rows('train') or shards.rows())
    return folder_photos(train if (train := Path(folder)/'train').is_dir() else folder)


class PhotoPath(type(Path())):
    "The path of a photo that remembers its label, and where its bytes are if not in a file of that name"
    label = source = None
    def __reduce__(self): return (*super().__reduce__()[:2], self.__dict__)


def stamp(
    path:str|Path, # Of a file
) -> tuple: # (its whole path, (size, time); None: a link that leads nowhere)
    "What tells whether a file is the one that it was"
    try: was = (at := os.stat(path)).st_size, at.st_mtime_ns
    except OSError: was = None
    return os.path.abspath(path), was


class PhotoList:
    "Paths of photos, and the label of each, held in two arrays"
    def __init__(self,
        root:str|Path, # The folder that all of them are in
        names, # (n,) bytes: paths below `root`
        codes=None, # (n,) whole numbers: the place of each one's label in `vocab`; -1: none
        vocab:tuple=(), # Labels
    ):
        self.root, self.names, self.vocab = str(root), np.asarray(names, dtype='S'), tuple(vocab)
        self.codes = np.full(len(self.names), -1, np.int32) if codes is None else np.asarray(codes, np.int32)

    @property
    def iloc(self): return self
    def __len__(self): return len(self.names)
    def __repr__(self): return f'PhotoList({len(self):,} photos in {self.root})'
    def __add__(self, other): return PhotoList(self.root, np.concatenate([self.names, other.names]),
                                               np.concatenate([self.codes, other.codes]), self.vocab)
    def texts(self): return (os.path.join(self.root, os.fsdecode(n)) for n in self.names)
    def stamps(self): return map(stamp, self.texts())                # what each photo is known by while nothing changes
    def unlabelled(self): return PhotoList(self.root, self.names)
    def read_ahead(self, places): return iter(places)                 # the places; photos of a server are fetched meanwhile
    def ahead(self): return (self[i] for i in self.read_ahead(range(len(self))))

    def look_up(self,
        find_id, # A photo's path → its id, or None
        labels:dict, # {id: label}
        vocab, # The labels that there are
    ) -> bool: # Do two photos go by one id?
        "Give each photo its label, where it has one"
        code = {label: i for i,label in enumerate(vocab)}
        look = ((-1, 0) if (i := find_id(p)) is None else (code[labels[i]], hash(i)) for p in self.texts())     # hashes, not a million ids
        codes, hashes = np.fromiter(look, np.dtype('i8,i8'), len(self)).view('i8').reshape(-1, 2).T
        self.vocab, self.codes = tuple(code), codes.astype(np.int32)
        return len(np.unique(hashes[codes >= 0])) < (codes >= 0).sum()

    def __getitem__(self, i):
        if isinstance(i, slice) or np.ndim(i):
            return self._some(i if isinstance(i, slice) else np.asarray(i, dtype=None if len(i) else int))
        path = self._path(i)
        if self.codes[i] >= 0: path.label = self.vocab[self.codes[i]]
        return path

    def _some(self, i): return PhotoList(self.root, self.names[i], self.codes[i], self.vocab)
    def _path(self, i): return PhotoPath(self.root, os.fsdecode(self.names[i]))


class ShardList(PhotoList):
    "Photos in shards: their rows in the index, and the label of each; the paths are those of the files that were packed"
    def __init__(self,
        shards:Shards,
        rows, # (n,) whole numbers, or a range
        codes=None, # As for `PhotoList`
        vocab:tuple=(),
    ):
        self.shards, self.rows, self.root, self.vocab = shards, rows, shards.folder, tuple(vocab)
        self.codes = np.full(len(rows), -1, np.int32) if codes is None else np.asarray(codes, np.int32)

    @property
    def names(self): return np.array(list(self.shards.names(self.rows)), dtype='S')
    def __len__(self): return len(self.rows)
    def __repr__(self): return f'ShardList({len(self):,} photos in {self.shards.place})'
    def __add__(self, other):
        return ShardList(self.shards, np.concatenate([_array(self.rows), _array(other.rows)]), np.concatenate([self.codes, other.codes]),
                         self.vocab)
    def texts(self): return (os.path.join(self.root, os.fsdecode(n)) for n in self.shards.names(self.rows))
    def stamps(self): return zip(map(os.fsdecode, self.shards.names(self.rows)), self.shards.columns[1:,_array(self.rows)].T.tolist())
    def unlabelled(self): return ShardList(self.shards, self.rows)
    def read_ahead(self, places): return self.shards.read_ahead(places, self.rows)
    def _some(self, i):
        return ShardList(self.shards, (self.rows if isinstance(i, slice) else _array(self.rows))[i], self.codes[i], self.vocab)
    def _path(self, i):
        row = int(self.rows[i])
        path = PhotoPath(self.root, os.fsdecode(self.shards.name(row)))
        path.source = Source(self.shards, row)
        return path


def _array(rows): return np.arange(rows.start, rows.stop, rows.step, dtype=np.uint32) if isinstance(rows, range) else rows


def photo_inputs(
    image, # What `Photo` takes, a list of these, or a folder
) -> tuple: # (list of photos, was it one photo?)
    "What somebody wants to be told about, as a list; a `DataError` where there is nothing in it"
    folder = isinstance(image, (str, Path)) and os.path.isdir(image)
    if not folder and not isinstance(image, (list, tuple, L, PhotoList)): return [image], True
    photos = list_photos(image) if folder else image
    if not len(photos): raise no_photos(image) if folder else DataError("there are no photos in this list")
    return photos, False


splits = ('train', 'val', 'test')


def split_photos(
    data_path:str|Path, # Folder with train/, val/ and perhaps test/, or of shards of them
    needed:tuple=('train','val'), # Splits that must have photos
) -> dict[str,PhotoList]: # The photos of each split
    "The photos of each split; a `DataError` where a needed one is missing or empty"
    root, photos = os.path.join(data_path, ''), {}
    if (shards := open_shards(data_path)): return _shard_splits(shards, needed)
    for s in splits:
        there = os.path.isdir(root + s)
        if s in needed and not there: raise DataError(f"{data_path} has no folder {s}/; {_instead(data_path)}")
        names = (os.fsencode(p[len(root):]) for p in _scan(root + s)) if there else ()
        photos[s] = PhotoList(data_path, np.sort(np.array([*names], dtype='S')) if there else [])
        if s in needed and not len(photos[s]): raise no_photos(root + s)
    return photos


def _shard_splits(shards, needed):
    for s in needed:
        if not shards.rows(s):
            raise DataError(f"{shards.place} has no photos of {s}/; its shards hold "
                            f"{', '.join(n for n in shards.run_names if n) or 'others'}")
    return {s: ShardList(shards, shards.rows(s)) for s in splits}


def _instead(data_path):
    with suppress(OSError):
        if found := sorted(p.name for p in Path(data_path).iterdir() if p.is_dir()):
            return f"it has {', '.join(found[:5])}; class folders become this layout by from_folders(src, dest)"
    return 'it needs train/ and val/ with photos in them'


class DataPaths(NamedTuple):
    "What `train` and `ResNet` ask for, in their order"
    data_path:Path
    label_path:Path
    label_encoding:Path


def _new_folder(dest):
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise DataError(f"{dest} exists already and is not touched; name a new folder")
    dest.parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(dir=dest.parent, prefix=f'.{dest.name}-'))


def _finish(tmp, dest, labels, encoding):
    write_json(tmp/'labels.json', labels)
    write_json(tmp/'encoding.json', encoding)
    _settle(tmp, dest)
    return DataPaths(dest, dest/'labels.json', dest/'encoding.json')


def _settle(tmp, dest):
    "Put a finished folder in its place"
    tmp.chmod(0o777 & ~_umask())
    with suppress(OSError): dest.rmdir()                              # an empty one, which Windows does not replace
    tmp.replace(dest)


def link_photo(src, dest):
    dest.parent.mkdir(parents=True, exist_ok=True)
    for way in (os.link, os.symlink, shutil.copy2):
        with suppress(OSError): return way(src.resolve(), dest)
    raise DataError(f"{src} can neither be linked nor copied to {dest}")

