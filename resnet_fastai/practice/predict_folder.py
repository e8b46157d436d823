"""The likeliest labels of a folder of photos, in a table that an interrupted run goes on with."""
import csv
import hashlib
import importlib.util
import io
import json
import os
import re
import time
import zlib
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
from fastai.learner import Learner
from fastai.torch_core import num_distrib
from fastprogress.fastprogress import progress_bar

from ..engine.arguments import how_many
from ..engine.calibration import check_min_prob, tempered
from ..engine.fast_net import _bare, weights_hash
from ..engine.fetch import resolve_data
from ..engine.files import DataError, PhotoError, atomic_write, quote, write_json
from ..engine.layout import folder_photos, no_photos, PhotoList
from ..engine.shared import on_rank0, shared_out, some_of
from ..engine.splits import model_parts
from ..engine.protocols import split_protocol
from ..inference import _answers
from .look import require_trained


_formula, _number = re.compile(r"'*[=+\-@\t\r]"), re.compile(r'[-+]?[0-9.]+(e[-+]?[0-9]+)?')


def _harmless(cell):
    "A cell with ' in front where a spreadsheet would take it for a formula"
    return f"'{cell}" if _formula.match(cell) and not _number.fullmatch(cell) else cell


def _as_it_was(cell):
    "A cell of a file without the ' that `_harmless` has put there"
    return cell[1:] if cell[:1] == "'" and _harmless(cell[1:]) == cell else cell


def _line(row):
    "A row as CSV; names in the disk's bytes, what is neither these nor Unicode with escapes"
    csv.writer(text := io.StringIO(), lineterminator='\r\n').writerow(map(_harmless, row))
    line = text.getvalue()[:-2] + '\n'                                           # with '\r\n' given, a name with either of them is quoted
    try: return line.encode('utf-8', 'surrogateescape')
    except UnicodeEncodeError: return line.encode('utf-8', 'backslashreplace')


class ResumableCSV:
    "A CSV file that grows in blocks, and a JSON file beside it that knows what is in it and which block comes last"
    def __init__(self,
        dest:str|Path, # The CSV file; made, or gone on with
        columns:list, # Its header
        what:dict, # What its rows come from; another run's rows are refused
    ):
        self.dest, self.beside, self.what, self.length, self.sum = Path(dest), Path(f'{dest}.run.json'), what, 0, 0
        if self.dest.exists() and not self.beside.exists():
            raise DataError(f"{dest} exists and is not ours to go on with; name another file, or move it away")
        self.dest.parent.mkdir(parents=True, exist_ok=True)
        if self.dest.exists(): self._go_on()
        else: self._append(_line(columns))

    def _append(self, block):
        then = block.decode('utf-8', 'surrogateescape')
        # first: a kill leaves nothing that nobody knows
        write_json(self.beside, dict(what=self.what, bytes=self.length, sum=self.sum, then=then))
        self._write(block, block)

    def _write(self, rest, block):
        with open(self.dest, 'ab') as f: f.write(rest); f.flush(); os.fsync(f.fileno())
        self.length, self.sum = self.length + len(block), zlib.crc32(block, self.sum)

    def _go_on(self):
        try:
            kept = json.loads(self.beside.read_text(encoding='utf-8'))
            was, self.length, self.sum = kept['what'], int(kept['bytes']), kept['sum']
            then = kept['then'].encode('utf-8', 'surrogateescape')
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(f"{self.beside} is damaged; move it and {self.dest} away") from None
        if other := [k for k in self.what if was.get(k) != self.what[k]]:
            raise DataError(f"{self.dest} was begun with another {' and another '.join(other)}; name another file, or move it away")
        begun = self._last(len(then))
        if begun is None or not then.startswith(begun): raise self._changed()
        self._write(then[len(begun):], then)                                      # what a kill has left out of the last block

    def _last(self, n):
        "What the file holds of its last block; None where what comes before has been changed"
        with open(self.dest, 'rb') as f:
            left, found = self.length, 0
            while left and (some := f.read(min(left, 1 << 20))): left, found = left - len(some), zlib.crc32(some, found)
            return f.read(n + 1) if (left, found) == (0, self.sum) else None

    def _changed(self):
        return DataError(f"{self.dest} is not as it was left: somebody has changed it; name another file, or move it away")

    def add(self, rows):
        "Write a block of rows; when this returns, they are safe"
        if self.dest.stat().st_size != self.length: raise self._changed()        # by the same command, started twice, for example
        self._append(b''.join(map(_line, rows)))

    def ids(self) -> Counter:
        "The first column, without the header: how often each id is there"
        with open(self.dest, encoding='utf-8', errors='surrogateescape', newline='') as f:
            return Counter(_as_it_was(row[0]) for i,row in enumerate(csv.reader(f)) if i)


def _columns(n, min_prob=None):
    return ['id', *(f'{what}_{i}' for i in range(1, n+1) for what in ('label', 'prob')), *['sure']*(min_prob is not None), 'error']


def _row(name, probs, known, n, min_prob=None):
    "A row of the table: a photo's likeliest labels, or why there are none"
    if isinstance(probs, Exception): return [name, *['']*(2*n + (min_prob is not None)), str(probs)]
    labels,index = known
    best = np.argsort(-probs[0][index], kind='stable')[:n]
    sure = [] if min_prob is None else ['yes' if probs[0][index[best[0]]] >= min_prob else 'no']
    return [name, *chain(*((labels[i], str(probs[0][index[i]])) for i in best)), *sure, '']


def _table(rows, n, min_prob=None):
    "A frame of rows, or of a CSV file of them (whole, or an iterator over parts)"
    floats = {f'prob_{i}': 'float32' for i in range(1, n+1)}
    if not isinstance(rows, list):
        frame = pd.read_csv(rows, dtype={c: floats.get(c, object) for c in _columns(n, min_prob)}, na_values={c: [''] for c in floats},
                            keep_default_na=False, encoding_errors='surrogateescape')
        texts = {c: pd.Series([_as_it_was(v) for v in frame[c]], dtype=object) for c in frame if c not in floats}
        return frame.assign(**texts)                                          # pyarrow's strings refuse names that are not UTF-8
    frame = pd.DataFrame(rows, columns=_columns(n, min_prob), dtype=object)             # pyarrow's strings refuse names that are not UTF-8
    return frame.assign(**{c: pd.to_numeric(frame[c]).astype('float32') for c in floats})


def _write_parquet(rows, dest, n, min_prob=None, block=10_000):
    "A Parquet file of a CSV file, some rows at a time"
    import pyarrow as pa, pyarrow.parquet as pq
    schema = pa.schema([(c, pa.float32() if c.startswith('prob_') else pa.string()) for c in _columns(n, min_prob)])
    with atomic_write(dest) as part, pq.ParquetWriter(part, schema) as out, \
            open(rows, encoding='utf-8', errors='backslashreplace', newline='') as f:
        reader, _ = (r := csv.reader(f)), next(r)
        while some := [[*map(_as_it_was, row)] for _,row in zip(range(block), reader)]:
            out.write_table(pa.Table.from_pandas(_table(some, n, min_prob), schema, preserve_index=False))


def _named_photos(photos):
    "All photos below a folder, or those of a list; what makes an id of one; the folder that the ids are seen from"
    if isinstance(photos, (str, Path)):
        if '://' in str(photos): photos = resolve_data(photos)
        if not Path(photos).is_dir(): raise DataError(f"{photos} is not a folder; pass a folder of photos, or a list of paths")
        root, found = os.path.join(photos, ''), folder_photos(photos)
        if not len(found): raise no_photos(photos)
        return found, lambda p: Path(os.path.relpath(p, root)).as_posix(), os.path.abspath(photos)
    photos = photos if isinstance(photos, PhotoList) else list(photos)
    if (wrong := next((p for p in photos if not isinstance(p, (str, Path))), None)) is not None:
        raise DataError(f"{quote(wrong)} is not a path; pass a folder, or a list of paths")
    texts = photos.texts() if isinstance(photos, PhotoList) else photos
    return photos, str, None if all(map(os.path.isabs, texts)) else os.getcwd()


def _origin(parts, n, protocol, folder, min_prob=None):
    "What the rows of a file depend on, as JSON holds it"
    labels = hashlib.sha256(json.dumps([sorted(parts.labels.encoding.items()), parts.stats.as_dict(), parts.size]).encode()).hexdigest()
    return {'model': [weights_hash(_bare(parts.net)), labels], 'n': n, 'protocol': protocol, 'folder': folder,
            'temperature': None if parts.temperature == 1 else parts.temperature, 'min_prob': min_prob}


def predict_folder(
    model, # A `ResNet`, or a learner over `resnet_dls`
    photos:str|Path|list, # A folder, searched to the bottom, or a list of paths
    dest:str|Path|None=None, # A .csv or .parquet file, made or gone on with; None: rows stay in memory
    n:int|None=None, # How many labels; None: 5, or all where the model knows fewer
    protocol:str|None=None, # As for `evaluate`; None: the model's, 50 crops unless another was chosen
    precision:str|None=None, # 'fp32', 'bf16' or 'fp16'; None: the fastest that the hardware has
    num_workers:int|None=None, # Threads that decode photos; None: one a core
    bs:int|None=None, # Crops that go through the network at a time; None: as many as suit the hardware
    min_prob:float|None=None, # A first label that is less probable is not sure; None: as the model's `threshold` has found
) -> pd.DataFrame: # id, label_1, prob_1, …, sure ('yes' or 'no', with a threshold), error: why a photo cannot be read, or ''
    """The likeliest labels of every photo; called again with the same `dest`, it goes on where it was (a row with an error stays, too).
    Several processes share the photos, and what one that died has found is kept in DEST.parts"""
    parts = model_parts(model)
    protocol = protocol or parts.protocol
    split_protocol(protocol, parts.size)                                       # or its error
    n = how_many(n, len(parts.labels))
    if isinstance(model, Learner) or hasattr(model, 'trained'): require_trained(model)
    min_prob = parts.min_prob if min_prob is None else check_min_prob(min_prob)
    photos,name,folder = _named_photos(photos)
    shown,how = (n, min_prob),(protocol, precision, num_workers, bs)
    open_rows = lambda: _open_rows(dest, n, _origin(parts, n, protocol, folder, min_prob), min_prob) if dest is not None else None
    if num_distrib() > 1 or dest is not None and Path(f'{dest}.parts').exists():
        return _predict_together(parts, photos, name, shown, how, dest, open_rows)
    rows = open_rows()
    todo = _left(photos, name, rows.ids() if rows else Counter())
    some = _work(parts, photos, todo, name, shown, how, rows) if todo else []
    return _table(some, *shown) if rows is None else _finished(rows, dest, *shown)


def _finished(rows, dest, n, min_prob):
    "The table of a file of rows that has them all"
    if str(dest).endswith('.parquet') and not _newer(dest, rows.dest): _write_parquet(rows.dest, dest, n, min_prob)
    return _table(rows.dest, n, min_prob)


def _predict_together(parts, photos, name, shown, how, dest, open_rows, block=10_000):
    "Each process asks about a share; the first one writes the rows, in the photos' order"
    rows = None
    def begin():
        nonlocal rows
        rows = open_rows()
        return list(_left(photos, name, rows.ids() if rows else Counter()))
    def write(found):
        for k in range(0, len(todo), block): rows.add([[name(photos[i]), *row] for i,row in zip(todo[k:k+block], found[k:k+block])])
    todo = on_rank0(begin)
    of = parts.net, parts.stats, parts.size, parts.labels.encoding, parts.temperature, *shown, *how[:2]
    ask = lambda some: map(tuple, _told(parts, some, how, shown))
    found = shared_out(ask, photos, of, todo, dest and Path(f'{dest}.parts'), dest and write)
    if dest is None: return _table([[name(photos[i]), *row] for i,row in zip(todo, found)], *shown)
    return on_rank0(lambda: _finished(rows, dest, *shown))


def _left(photos, name, done):
    "The places of photos without a row; one that is named twice has two"
    if not done: return range(len(photos))
    left = []
    for i in range(len(photos)):
        if done[key := name(photos[i])]: done[key] -= 1
        else: left.append(i)
    return left


def _newer(a, b): return os.path.exists(a) and os.stat(a).st_mtime_ns > os.stat(b).st_mtime_ns


def _open_rows(dest, n, what, min_prob=None):
    suffix = Path(dest).suffix
    if suffix not in ('.csv', '.parquet'): raise DataError(f"{dest} ends in neither .csv nor .parquet")
    if suffix == '.csv': return ResumableCSV(dest, _columns(n, min_prob), what)
    if importlib.util.find_spec('pyarrow') is None:
        raise DataError(f"{dest}: Parquet files need pyarrow; install it (pip install pyarrow), or name a .csv file")
    if Path(dest).exists() and not Path(f'{dest}.csv').exists():
        raise DataError(f"{dest} exists and is not ours to go on with; name another file, or move it away")
    return ResumableCSV(f'{dest}.csv', _columns(n, min_prob), what)


def _told(parts, some, how, shown):
    "A row without its id for each photo"
    protocol, precision, num_workers, bs = how
    known = (list(parts.labels.encoding), np.array(list(parts.labels.encoding.values())))
    for probs in _answers(parts, some, [protocol], False, 'probs', precision, num_workers, bs, skip=PhotoError):
        yield _row('', probs if isinstance(probs, Exception) else tempered(probs, parts.temperature), known, *shown)[1:]


def _work(parts, photos, todo, name, shown, how, rows, block=200, seconds=20):
    "Ask about photos; give their rows to `rows` in blocks, or return them"
    found = _told(parts, some_of(photos, todo), how, shown)
    bar, some, start = progress_bar(found, total=len(todo), leave=False), [], time.perf_counter()
    saved = start
    try:
        for k,(row,i) in enumerate(zip(bar, todo), 1):                          # the bar first: it is to see its end
            some.append([name(photos[i]), *row])
            bar.comment = f'{k/(time.perf_counter() - start):.1f} photos/s'
            if rows and (len(some) >= block or time.perf_counter() - saved > seconds):
                some, full, saved = [], some, time.perf_counter(); rows.add(full)
    finally:
        if rows and some: rows.add(some)
    return some
