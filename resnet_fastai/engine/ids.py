"""Ids of photos: one way of writing what people write in many"""

import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np

__all__ = ['text_of', 'normal_text', 'normal_id', 'normal_ids', 'photo_ids', 'find_in']


def text_of(
    key, # A text, path or whole number, numpy's among them
) -> str|None: # None where it is something else
    "What people use as a name, as a text"
    if isinstance(key, str): return str(key)
    if isinstance(key, os.PathLike): return os.fsdecode(key)
    return str(int(key)) if isinstance(key, (int, np.integer)) and not isinstance(key, bool) else None


def normal_text(
    text: str,
) -> str: # NFC
    "One spelling of an accented letter, which macOS writes as two characters"
    return text if text.isascii() else unicodedata.normalize('NFC', text)


def normal_id(
    name: str, # A photo's name or path, however it is written
) -> str: # NFC, / between folders, neither drive nor / nor ./ in front
    "A name as ids are compared"
    if name.isascii() and '\\' not in name and '//' not in name and '/.' not in name and name[:1] not in ('/', '.') and name[1:2] != ':':
        return name                                                              # the usual case, a million times
    name = re.sub('/(\\./|/)+', '/', normal_text(name).replace('\\', '/'))
    return re.sub('^([A-Za-z]:(?=/))?(\\./|/)*', '', name)


def normal_ids(
    names: list, # Of str
) -> list: # Of str
    "`normal_id` of each; where all are whole paths, less the folder that all of them are in"
    found = [normal_id(n) for n in names]
    if not all(re.match(r'[A-Za-z]:[\\/]|[\\/]', n) for n in names) or not names: return found
    above = os.path.commonprefix([min(found), max(found)]).rpartition('/')[0]
    return [n[len(above) + 1:] for n in found] if above else found


def photo_ids(
    path: str|Path, # A photo's path
    depth: int|None = None, # Folders that an id names at most; None: all of them
) -> Iterator[str]: # Ids, the most specific first
    "Every id that a photo may go by: each tail of its path, with and without the suffix"
    parts = normal_id(os.fspath(path)).split('/')
    for k in range(0 if depth is None else max(0, len(parts)-1-depth), len(parts)):
        tail = '/'.join(parts[k:])
        yield tail
        yield os.path.splitext(tail)[0]


def find_in(
    ids, # A set or dict of ids
    path: str|Path, # A photo's path
    depth: int, # Folders that one of the ids names, at most
) -> str|None: # None where no id fits
    "The most specific id of a photo that is among `ids`"
    if depth == 0:                                                    # the usual case, a million times: ids without folders
        name = normal_id(os.path.basename(path))
        return name if name in ids else stem if (stem := os.path.splitext(name)[0]) in ids else None
    return next((i for i in photo_ids(path, depth) if i in ids), None)
