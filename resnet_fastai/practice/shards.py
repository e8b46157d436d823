"""Pack a folder of photos into a few large tar files, which train alike, are quick to copy, and are read over HTTP too."""
import hashlib
import json
import os
import shutil
import tarfile
import zlib
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
from fastprogress.fastprogress import progress_bar

from ..data import LabelMap
from ..engine.arguments import whole_number
from ..engine.batching import prefetch
from ..engine.fetch import resolve_data
from ..engine.files import _sync, DataError, PhotoError, read_json_object, read_regular, sha256_of, sync_folder, write_json
from ..engine.layout import folder_photos, no_photos, splits
from ..engine.lock import lock_folder, unlock_folder
from ..engine.shards import block, header_name, open_shards, write_index
from .prepare import check_shrinking, shrunk

__all__ = ['pack_photos', 'verify_shards']

_begun = '.packing'                               # A folder with a note, and a record of each shard that is done
_suffixes = dict.fromkeys(('.jpeg', '.jpe', '.jfif'), '.jpg')
_end = tarfile.RECORDSIZE                         # Zeros end a tar file, and fill it up to a multiple of this


# ── What goes where ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def _order(photos) -> dict:
    "{name of the shards: places of their photos, in the order of packing}; training photos mixed, for readers that go from end to end"
    tops = [t if (t := name.split(b'/')[0].decode(errors='replace')) in splits and b'/' in name else 'photos' for name in photos.names]
    tops = np.array(tops)
    places = {top: np.flatnonzero(tops == top) for top in (*splits, 'photos')}
    return {top: np.random.default_rng(0).permutation(p) if top == 'train' else p for top,p in places.items() if len(p)}


def _labels(photos, root, label_path, label_encoding) -> list:
    "(label, index) of each photo, None where it has none"
    if (label_path is None) != (label_encoding is None):
        raise DataError("label_path and label_encoding belong together; pass both, or neither")
    if label_path is None: return [None]*len(photos)
    labels = LabelMap(label_path, label_encoding)
    ids = labels.match(photos, 0)
    return [None if i is None else (labels.labels[i], labels.encoding[labels.labels[i]]) for i in ids]


def _bytes(path, short_side, quality) -> bytes:
    "A photo as it is packed: as it is, or smaller, as `shrink_photos` would write it"
    with suppress(PhotoError):
        if short_side and (data := shrunk(path, short_side, quality)) is not None: return data
    try: return bytes(path.source.read() if path.source else read_regular(path))
    except OSError as e:
        raise PhotoError(f"{str(path)!r} cannot be read: {e.strerror}; repair or remove it, and pack again: it goes on "
                         "where it was") from None


# ── The shards ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

def _member(name, data) -> bytes:
    "A file as a tar holds it"
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % block)


def _sample(key, name, label, data) -> tuple:
    "(the members of a photo, as WebDataset groups them; where its own bytes begin)"
    about = dict(name=os.fsdecode(name)) | (dict(label=label[0]) if label else {})
    before = _member(f'{key}.json', json.dumps(about).encode()) + (_member(f'{key}.cls', str(label[1]).encode()) if label else b'')
    suffix = os.path.splitext(about['name'])[1].lower()
    return before + _member(key + _suffixes.get(suffix, suffix), data), len(before) + block


class _Writer:
    "Shards of one name, one after another; each appears whole, with a record of what is in it"
    def __init__(self, dest, top, most):
        self.dest, self.top, self.most, self.k, self.done = dest, top, most, 0, []
        while (record := self._record()).exists() and (dest/self.name).exists():
            self.done.append(read_json_object(record))
            self.k += 1
        self._new()

    @property
    def name(self): return f'{self.top}-{self.k:06}.tar'
    def _record(self): return self.dest/_begun/f'{self.name}.json'

    def _new(self): self.file, self.size, self.digest, self.rows = None, 0, hashlib.sha256(), []

    def _write(self, data):
        if self.file is None: self.file = open(self.dest/_begun/'part', 'wb')
        self.file.write(data)
        self.digest.update(data)
        self.size += len(data)

    def add(self, row, members, begin, size, crc):
        if self.rows and self.size + len(members) + 2*block > self.most: self.close()
        self.rows.append((int(row), (self.size + begin)//block, size, crc))
        self._write(members)

    def close(self):
        if not self.rows: return
        self._write(bytes(2*block + -(self.size + 2*block) % _end))
        with self.file as f:
            f.flush()
            _sync(f.fileno())
        self.done.append(dict(name=self.name, bytes=self.size, sha256=self.digest.hexdigest(), rows=self.rows))
        write_json(self._record(), self.done[-1])
        (self.dest/_begun/'part').replace(self.dest/self.name)
        sync_folder(self.dest)
        self.k += 1
        self._new()

    def abandon(self):
        if self.file: self.file.close()


def _write_shards(photos, labels, order, dest, most, load, num_workers) -> list:
    "Write what an earlier call has not; the records of all shards"
    records, names, bar = [], photos.names, progress_bar(range(len(photos)), leave=False)
    ticks = iter(bar)
    for top,places in order.items():
        writer = _Writer(dest, top, most)
        have = sum(len(r['rows']) for r in writer.done)
        for _ in range(have): next(ticks)
        try:
            for place,(data,crc) in zip(places[have:], prefetch(load, (photos[i] for i in places[have:]), num_workers)):
                writer.add(place, *_sample(f'{place:09}', names[place], labels[place], data), len(data), crc)
                next(ticks)
            writer.close()
        finally: writer.abandon()
        records += writer.done
    next(ticks, None)
    return records


def _finish(dest, root, photos, records, note):
    "The label files, the checksums, the index, and nothing of the work"
    for p in root.glob('*.json'):
        if p.name != header_name and not (dest/p.name).exists(): shutil.copyfile(p, dest/p.name)
    columns, begin = np.zeros((3, len(photos)), np.uint32), 0
    for r in records:
        row, at, size, crc = np.array(r['rows'], np.int64).T
        columns[:,row] = at + begin, size, crc
        begin += r['bytes']//block
    sums = ''.join(f"{r['sha256']}  {r['name']}\n" for r in records)
    (dest/'SHA256SUMS').write_bytes(sums.encode())                    # not write_text: sha256sum takes \r for a part of the name
    write_index(dest, [[r['name'], r['bytes'], r['sha256']] for r in records], photos.names.tolist(), columns, note)
    for p in (dest/_begun).iterdir():
        if p.name != '.lock': p.unlink()                              # that one is still in use


# ── The whole ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def _note(root, photos, labels, settings) -> dict:
    "What is packed, and how: another call goes on only with the same"
    digest = hashlib.sha256(json.dumps(labels).encode())
    for name,(_,was) in zip(photos.names.tolist(), photos.stamps()): digest.update(name + repr(was).encode())
    sizes = [was[0] for _,was in photos.stamps() if was]
    if max(sizes, default=0) >= 1 << 32 or sum(sizes) > 2e12:
        raise DataError(f"{root} holds more than 2 TB, or a photo of 4 GB; pack it in parts")
    return dict(photos=digest.hexdigest(), **settings)


def _begin(dest, root, note) -> bool:
    "Make the folder, or go on in it; is there anything left to do?"
    mark, done = dest/_begun/'note.json', dest/header_name
    if dest.resolve().is_relative_to(root.resolve()): raise DataError(f"{dest} lies inside {root}; name a folder beside it")
    old = read_json_object(done).get('made') if done.exists() else read_json_object(mark) if mark.exists() else None
    if old is not None and old != note:
        other = ', '.join(k for k in note if old.get(k) != note[k])
        raise DataError(f"{dest} was packed from other photos, or in another way ({other}); name another folder")
    if old is None and dest.exists() and (not dest.is_dir() or any(p.name != _begun for p in dest.iterdir())):
        raise DataError(f"{dest} exists already and is not touched; name a new folder")
    if done.exists(): return False
    mark.parent.mkdir(parents=True, exist_ok=True)
    write_json(mark, note)
    return True


def pack_photos(
    data_path:str|Path, # Folder with train/, val/ and so on, or of any photos
    dest:str|Path, # A new folder, or one that an earlier call has begun
    shard_mb:int=256, # MiB of a tar file at the most; a larger photo has one of its own
    short_side:int|None=None, # Photos whose shorter side is longer are resized to it, as by `shrink_photos`; None: as they are
    quality:int=95, # Of the JPEG files that are resized, 1 to 100
    label_path:str|Path|None=None, # Labels that go into the tar files too, for other programs; this one has them from its JSON files
    label_encoding:str|Path|None=None, # Their indices
    num_workers:int|None=None, # Threads; None: one a core
) -> Path: # dest: train on it as on `data_path`
    "Pack photos into tar files with an index; a call that was stopped goes on where it was"
    shard_mb = whole_number('shard_mb', shard_mb)
    check_shrinking(short_side or 1, quality)
    root, dest = resolve_data(data_path), Path(dest)
    photos = folder_photos(root)
    photos = photos[np.argsort(photos.names, kind='stable')]
    if not len(photos): raise no_photos(root)
    labels = _labels(photos, root, label_path, label_encoding)
    note = _note(root, photos, labels, dict(shard_mb=shard_mb, short_side=short_side, quality=quality if short_side else None))
    if _begin(dest, root, note):
        lock_folder(dest/_begun)
        try:
            def load(path): return (data := _bytes(path, short_side, quality)), zlib.crc32(data)
            records = _write_shards(photos, labels, _order(photos), dest, shard_mb << 20, load, num_workers)
            _finish(dest, root, photos, records, note)
        finally: unlock_folder(dest/_begun)
        with suppress(OSError): (dest/_begun).rmdir()
    shards = open_shards(dest).header['shards']
    print(f"{len(photos):,} photos in {len(shards):,} shards of {dest}, {sum(size for _,size,_ in shards)/1e6:,.0f} MB")
    return dest


def _wrong(shard, folder) -> str:
    name, size, sha = shard
    path = Path(folder)/name
    if not path.exists(): return f'{path} is missing'
    if path.stat().st_size != size: return f'{path} has {path.stat().st_size:,} bytes, not {size:,}'
    return '' if sha256_of(path) == sha else f'{path} is damaged: its SHA-256 is another'


def verify_shards(
    folder:str|Path, # Of `pack_photos`
    num_workers:int|None=None, # Threads; None: one a core
) -> list: # Of sentences, one for each shard that is not as it was packed; empty: all is well
    "Read every shard and compare its SHA-256; `sha256sum -c SHA256SUMS` does the same"
    if (shards := open_shards(folder)) is None: raise DataError(f"{folder} holds no {header_name}: no shards, or packing has not ended")
    return [w for w in prefetch(partial(_wrong, folder=folder), shards.header['shards'], num_workers) if w]
