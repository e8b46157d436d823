"""Photos in tar files (shards) with an index of their places: read one by one, from a folder or over HTTP."""
import hashlib
import json
import os
import threading
import weakref
import zlib
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .download import shown_url
from .files import atomic_write, DataError, PhotoError, read_regular, sha256_of
from .ranges import RangeReader

# A folder of shards holds `train-000000.tar` and so on, `shards.json` (their sizes and checksums) and `shards.index`: four columns with a
# row a photo, sorted by name: where it begins (in blocks of 512 bytes, the shards laid end to end), its size, its CRC-32, and its name
# without the first folder, which `shards.json` gives for runs of rows. The columns are mapped, not read, so all processes share one copy.

block = 512                                       # Bytes, of a tar file
header_name, index_name = 'shards.json', 'shards.index'


# ── The index ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def write_index(
    folder:str|Path, # Where the shards are
    shards:list, # Of [name, bytes, SHA-256]
    names:list, # (n,) bytes: paths of the photos, sorted
    columns:np.ndarray, # (3,n) uint32: first block, size, CRC-32
    made:dict, # What they were made from and how
):
    "Write shards.index, then shards.json, without which a folder is not one of shards"
    runs = []
    for row,name in enumerate(names):
        top = os.fsdecode(name[:name.find(b'/') + 1])
        if not runs or runs[-1][0] != top: runs.append([top, row])
    texts = np.array([name[name.find(b'/') + 1:] for name in names], 'S')
    data = np.ascontiguousarray(columns, '<u4').tobytes() + texts.tobytes()
    with atomic_write(Path(folder)/index_name) as part: part.write_bytes(data)
    header = dict(format=_format, photos=len(names), width=texts.itemsize, index=hashlib.sha256(data).hexdigest(), runs=runs, shards=shards,
                  made=made)
    with atomic_write(Path(folder)/header_name) as part: part.write_text(json.dumps(header))


_format = 'resnet_fastai shards, 1'


def read_header(
    data:bytes, # Of shards.json
    name:str, # Its name, for error messages
) -> dict:
    "What shards.json says, checked"
    try:
        h = json.loads(data)
        if h['format'] != _format:
            raise DataError(f"{name} says {str(h['format'])[:60]!r}; this version of resnet_fastai reads {_format!r}. "
                            "Use the version that packed them, or pack the photos again")
        starts = [*(start for _,start in h['runs']), h['photos']]
        sizes = [h['photos'], h['width'], *starts, *(size for _,size,_ in h['shards'])]
        rising = starts[0] == 0 and all(a < b for a,b in pairwise(starts))
        sound = all(type(n) is int and n >= 0 for n in sizes) and rising and h['width'] > 0
        if sound and all(n == os.path.basename(n) and len(sha) == 64 for n,_,sha in h['shards']): return h
    except DataError: raise
    except (ValueError, TypeError, KeyError, AttributeError, IndexError): pass
    raise DataError(f"{name} is not as pack_photos writes it; copy or pack the shards again")


def fetch_index(
    url:str, # Of a folder of shards, ending in /
) -> Path: # A folder of this machine with its shards.json and shards.index, for `Shards`
    "Fetch the index of shards that a server has"
    from .cache import cache_folder                                   # brings fastai, which finding photos does not need
    reader = RangeReader(url)
    data = reader.read(header_name, most=64 << 20)
    header = read_header(data, shown_url(reader.url(header_name)))
    folder = cache_folder()/'shards'/hashlib.sha256(url.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder/index_name).exists() or sha256_of(folder/index_name) != header['index']:
        of = min(header['photos']*(12 + header['width']), 4 << 30)
        found = reader.read(index_name, most=of, good=lambda data: hashlib.sha256(data).hexdigest() == header['index'])
        with atomic_write(folder/index_name) as part: part.write_bytes(found)
    with atomic_write(folder/header_name) as part:
        part.write_text(json.dumps(header | dict(url=url)))
        with suppress(OSError): part.chmod(0o600)                     # the address may hold a token
    return folder


# ── The bytes ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

_turn = threading.Lock()


def _seek_and_read(fd, size, offset):
    "`os.pread`, which Windows lacks"
    with _turn:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, size)


_at = getattr(os, 'pread', _seek_and_read)


def _pread(fd, size, offset) -> bytearray:
    data = bytearray()
    while len(data) < size and (some := _at(fd, size - len(data), offset + len(data))): data += some
    return data


def _open_files():
    "How many shards a process may keep open"
    try:
        import resource
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return most//2 if most > 0 else 4096                          # -1: as many as it likes
    except (ImportError, ValueError, OSError): return 256


def _close_all(files):
    for fd in files.values(): os.close(fd)


class LocalTars:
    "Shards in a folder, each opened once; for any number of threads and of forked processes"
    def __init__(self, folder, shards):
        self.folder, self.shards, self.files, self.most = folder, shards, {}, _open_files()
        weakref.finalize(self, _close_all, self.files)

    def read(self, k, start, size, good):
        "Bytes of a shard; a `DataError` where the whole shard is not there"
        if (fd := self.files.get(k)) is not None: return _pread(fd, size, start)
        fd = self._open(k)
        if len(self.files) < self.most and self.files.setdefault(k, fd) == fd: return _pread(fd, size, start)
        try: return _pread(fd, size, start)                           # too many are open, or another thread was quicker
        finally: os.close(fd)

    def _open(self, k):
        name, size, _ = self.shards[k]
        path = os.path.join(self.folder, name)
        try: fd = os.open(path, os.O_RDONLY | getattr(os, 'O_BINARY', 0) | getattr(os, 'O_CLOEXEC', 0))
        except OSError as e: raise DataError(f"{path} cannot be opened: {e.strerror}; {header_name} names it, so copy it again") from None
        if (found := os.fstat(fd).st_size) == size: return fd
        os.close(fd)
        raise DataError(f"{path} has {found:,} bytes, not the {size:,} of the index: copied in part, or another file; copy it again")


class RemoteTars:
    "Shards of a server"
    def __init__(self, url, shards): self.reader, self.shards = RangeReader(url), shards
    def read(self, k, start, size, good): return self.reader.read(self.shards[k][0], start, size, self.shards[k][1], good)


class Source(NamedTuple):
    "Where the bytes of a photo in a shard are"
    shards:'Shards'
    row:int

    @property
    def shown(self): return self.shards.shown(self.row)
    def read(self) -> bytearray: return self.shards.read(self.row)


class Shards:
    "The photos of a folder of shards by their rows in the index; a process that gets a pickled one opens it anew"
    def __init__(self,
        folder:str|Path, # With shards.json and shards.index
    ):
        self.folder, path = str(folder), os.path.join(folder, header_name)
        try: self.header = h = read_header(read_regular(path), path)
        except OSError as e: raise DataError(f"{path} cannot be read: {e.strerror}") from None
        self.columns, self.texts = self._mapped(h['photos'], h['width'])
        self.run_names, self.run_starts = zip(*h['runs'])
        self.starts = np.cumsum([0, *(size//block for _,size,_ in h['shards'])])
        self.url, self.ahead = h.get('url'), {}
        self.tars = RemoteTars(self.url, h['shards']) if self.url else LocalTars(self.folder, h['shards'])

    def __reduce__(self): return Shards, (self.folder,)
    def __len__(self): return len(self.texts)
    def __repr__(self): return f'Shards({len(self):,} photos in {len(self.header["shards"]):,} shards of {self.place})'
    @property
    def place(self): return shown_url(self.url.split('?')[0]).rstrip('/') if self.url else self.folder

    def _mapped(self, n, width):
        path = os.path.join(self.folder, index_name)
        try:
            if os.path.getsize(path) != n*(12 + width) or sha256_of(path) != self.header['index']:
                raise DataError(f"{path} does not belong to the {header_name} beside it, or is damaged; copy both again")
            data = np.asarray(np.memmap(path, np.uint8, 'r'))
        except OSError as e: raise DataError(f"{path} cannot be read: {e.strerror}") from None
        return data[:12*n].view('<u4').reshape(3, n), data[12*n:].view(f'S{width}')

    def rows(self,
        top:str='', # A folder at the top; '': all
    ) -> range: # Rows of the photos below it
        "The photos of a folder"
        ends = [*self.run_starts[1:], len(self)]
        if not top: return range(len(self))
        return next((range(a, b) for name,a,b in zip(self.run_names, self.run_starts, ends) if name == f'{top}/'), range(0))

    def name(self, row) -> bytes:
        "The path of a photo below the folder"
        return os.fsencode(self.run_names[bisect_right(self.run_starts, row) - 1]) + bytes(self.texts[row])

    def names(self, rows) -> Iterator[bytes]:
        "Paths of photos, some thousands at a time"
        for i in range(0, len(rows), 4096):
            some = np.asarray(rows[i:i+4096])
            runs = np.searchsorted(self.run_starts, some, 'right') - 1
            tops = [os.fsencode(name) for name in self.run_names]
            yield from (tops[run] + text for run,text in zip(runs.tolist(), self.texts[some].tolist()))

    def shown(self, row) -> str: return f'{self.place}/{os.fsdecode(self.name(row))}'

    def read(self, row) -> bytearray:
        "The bytes of a photo; a `PhotoError` names the shard where they are not what was packed"
        coming = self.ahead.pop((os.getpid(), row), None)
        return coming.result() if coming else self._read(row)

    def _read(self, row):
        at, size, crc = self.columns[:,row].tolist()
        k = int(np.searchsorted(self.starts, at, 'right')) - 1
        def good(data): return len(data) == size and zlib.crc32(data) == crc
        data = self.tars.read(k, (at - int(self.starts[k]))*block, size, good)
        if good(data): return data
        raise PhotoError(f"{self.shown(row)!r} is damaged in {self.header['shards'][k][0]}: its checksum is another; copy that shard again")

    def read_ahead(self,
        numbers:Iterable, # Places in `rows`
        rows, # Rows of photos
        n:int=32, # Requests at a time
    ) -> Iterator: # The same numbers
        "Fetch a server's photos while those before them are used: each is asked for by `read` soon"
        if not self.url: return (yield from numbers)
        pool, soon = ThreadPoolExecutor(n), deque()
        try:
            for i in numbers:
                key = os.getpid(), int(rows[i])
                if key not in self.ahead: self.ahead[key] = pool.submit(self._read, key[1])
                soon.append((i, key))
                if len(soon) > n: yield soon.popleft()[0]
            while soon: yield soon.popleft()[0]
        finally:
            for _,key in soon: self.ahead.pop(key, None)
            pool.shutdown(wait=False, cancel_futures=True)


def open_shards(
    folder:str|Path,
) -> Shards|None: # None where it is a folder of files
    "The shards of a folder"
    return Shards(folder) if os.path.isfile(os.path.join(folder, header_name)) else None
