"""Label files and encodings: read from JSON, dicts or tables, brought to one spelling, and checked."""
import json
import operator
import os
from pathlib import Path

import numpy as np
import pandas as pd

from .files import DataError, LabelError, cut, exported_by, quote, read_json_object
from .ids import normal_ids, normal_text, text_of


def _json(value): return cut(json.dumps(value, default=lambda o: o.item() if isinstance(o, np.generic) else repr(o)))


def read_map(
    source:str|Path|dict|pd.DataFrame, # A JSON file, its object, or a table of two columns
    name:str, # What to call one that has no file name
) -> tuple: # ([(key, value)], its name), keys as texts
    "A mapping, from whatever somebody keeps it in"
    if isinstance(source, (str, os.PathLike)): source, name = read_json_object(source), Path(source).name
    if isinstance(source, pd.DataFrame):
        if source.shape[1] < 2: raise LabelError(f"{name} are a table of {source.shape[1]} columns; a key and a value are needed")
        pairs, name = list(zip(source.iloc[:,0].tolist(), source.iloc[:,1].tolist())), f'the table of {name}'
    elif isinstance(source, dict): pairs = list(source.items())
    else: raise DataError(f"{name} are {quote(source)}; pass a JSON file, a dict, or a DataFrame of two columns")
    if said := exported_by(source): raise LabelError(f"{name}: {said}")
    for k,_ in pairs:
        if text_of(k) is None: raise LabelError(f"{name} has the key {quote(k)}; a text, a path or a whole number is needed")
    return [(text_of(k), v) for k,v in pairs], name


def read_ids(
    source:str|Path|dict|pd.DataFrame, # {image id: label}
) -> tuple: # ([(id, label)], its name): ids in one spelling, labels as they are
    "What a label file says, unchecked"
    pairs, name = read_map(source, 'the labels')
    return list(zip(normal_ids([k for k,_ in pairs]), [v for _,v in pairs])), name


def as_label(
    value, # A text or a whole number, numpy's among them
) -> str|None: # NFC; None where it is something else
    "A label as a text"
    return None if isinstance(value, os.PathLike) or (text := text_of(value)) is None else normal_text(text)


def read_labels(
    source:str|Path|dict|pd.DataFrame, # {image id: label}
) -> tuple: # ({image id: label}, its name)
    "Labels, their ids and texts in one spelling; a `LabelError` where one is no text, or a photo has two"
    pairs, name = read_ids(source)
    labels, once = {}, {}                                            # a million labels of a thousand kinds: each text once
    for i,value in pairs:
        if (label := as_label(value)) is None: raise LabelError(f"{name} labels {quote(i)} with {_json(value)}, not with a text")
        if labels.setdefault(i, once.setdefault(label, label)) != label:
            raise LabelError(f"{name} gives {quote(i)} two labels, {quote(label)} and {quote(labels[i])}; keep one")
    return labels, name


def _as_index(value):
    try: return operator.index(value) if not isinstance(value, (bool, np.bool_)) else -1
    except TypeError: return -1


def read_encoding(
    source:str|Path|dict|pd.DataFrame, # {label: index}
) -> tuple: # ({label: index}, its name)
    "An encoding; a `LabelError` where an index is no whole number from 0 on, or two labels have the same one"
    pairs, name = read_map(source, 'the encoding')
    if not pairs: raise LabelError(f"{name} is empty; it must give each label its index, like {{\"goldfish\": 1}}")
    encoding, seen = {}, {}
    for label,value in ((normal_text(k), v) for k,v in pairs):
        if (i := _as_index(value)) < 0:
            raise LabelError(f"{name} gives {quote(label)} the index {_json(value)}; a whole number from 0 on is needed")
        if label in encoding: raise LabelError(f"{name} repeats the key {quote(label)}; keep one of its entries")
        if i in seen: raise LabelError(f"{name} gives {quote(seen[i])} and {quote(label)} the same index {i}; indices must differ")
        encoding[label], seen[i] = i, label
    return encoding, name


def check_known(
    labels:dict, # {image id: label}
    encoding:dict, # {label: index}
    name:str, encoding_name:str, # For the error message
):
    "A `LabelError` where a label has no index"
    lost = [photo for photo,label in labels.items() if label not in encoding]
    if lost: raise LabelError(f"the label {quote(labels[lost[0]])} in {name} has no index in {encoding_name} "
                              f"({len(lost):,} of {len(labels):,} ids; first: {quote(lost[0])}); add it there")


def refuse_twins(
    photos:list, # Paths
    ids:list, # The id of each, None where it has none
    name:str, # Of the label file
):
    "A `LabelError` where two photos go by one id"
    claimed = {}
    for p,i in zip(photos, ids):
        if i is not None and (other := claimed.setdefault(i, p)) is not p:
            raise LabelError(f"both {other} and {p} claim the id {quote(i)} of {name}; tell them apart by their paths, "
                             f"like {'/'.join(Path(p).parts[-3:])!r}")


def refuse_orphans(
    orphans:list, # Paths of photos without a label
    n:int, # How many photos need one
    labels:dict, # {image id: label}
    name:str, # Of the label file
):
    "A `LabelError` where a photo that needs a label has none"
    if not orphans: return
    if len(orphans) < n:
        raise LabelError(f"{Path(orphans[0]).name!r} has no label in {name} ({len(orphans):,} of {n:,} photos; "
                         f"first: {orphans[0]}); label them, move them away, or pass on_bad='skip' to train without them")
    raise LabelError(f"{name} names none of the {n:,} photos: its ids look like "
                     f"{quote(next(iter(labels), 'nothing, it is empty'))}, the photos like {orphans[0]}")


def alike(
    labels, # Texts
) -> list: # Of (label, label)
    "Labels that differ only in case or space, which are probably meant to be one"
    first = {}
    return [(other, l) for l in sorted(set(labels)) if (other := first.setdefault(''.join(l.casefold().split()), l)) != l]
