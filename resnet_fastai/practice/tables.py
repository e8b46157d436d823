"""Tables of photos and labels as people have them: which column names the photo, which its label, which its split"""

import re
from csv import Error as CSVError
from csv import reader as csv_reader
from io import StringIO
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from ..engine.convert import PhotoFinder, Row, draw_splits, lay_out
from ..engine.files import DataError
from ..engine.layout import DataPaths, photo_suffixes
from ..engine.stratified import lay_out_heap, name_keys

__all__ = ['read_table', 'find_columns', 'from_csv']

# ── The file ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _text(path: str|Path) -> str:
    "A text file in UTF-8, or in UTF-16 as spreadsheets save it"
    try: data = Path(path).read_bytes()
    except OSError as e: raise DataError(f"{path} cannot be read: {e.strerror or e}") from None
    try: return data.decode('utf-16' if data[:2] in (b'\xff\xfe', b'\xfe\xff') else 'utf-8-sig')
    except ValueError as e: raise DataError(f"{path} is not a CSV in UTF-8: {e}") from None


def _separator(text: str) -> tuple:
    "(the character between two fields, the text without a first line like sep=;)"
    first, _, rest = text.partition('\n')
    if said := re.fullmatch(r'"?sep=(.)"?\s*', first, re.IGNORECASE): return said[1], rest          # for spreadsheets
    header = text.lstrip('\r\n').partition('\n')[0]
    return (',' if ',' in header else next((s for s in ';\t' if s in header), ',')), text


def read_table(
    path: str|Path, # A CSV with a header; commas, semicolons or tabs between the fields
) -> pd.DataFrame: # Of texts; `attrs`: `first`, the number of the row below the header, and `blank`, the numbers of rows without anything
    "Read a table of texts, all rows of one length"
    separator, text = _separator(whole := _text(path))
    try: read = [*csv_reader(StringIO(text, newline=''), delimiter=separator)]
    except CSVError as e: raise DataError(f"{path} is not a CSV in UTF-8: {e}") from None
    rows, start = [r for r in read if any(r)], 1 if text is whole else 2
    if len(rows) < 2: raise DataError(f"{path} has no rows below its header")
    header = [c.strip() for c in rows[0]]
    for r in rows:
        if len(r) != len(header): raise DataError(f"{path} has {len(header)} columns, but {len(r)} fields in the row "
                                                  f"{separator.join(r)[:60]!r}; put quotes around a text that holds a {separator!r}")
    if any(PurePosixPath(c).suffix.lower() in photo_suffixes for c in header):
        raise DataError(f"{path} begins with a photo; put the line fname,label on top")
    if len(set(header)) < len(header): raise DataError(f"{path} has two columns of one name: {_list(header)}")
    table = pd.DataFrame(rows[1:], columns=header, dtype=object)
    table.attrs |= dict(first=start + 1, blank=[i for i,r in enumerate(read, start) if not any(r)])
    return table.drop(columns=[c for c in header[:1] if c in ('', 'Unnamed: 0')])                   # the index that pandas writes


def _list(names, most=12) -> str:
    "Names for an error message: the first few"
    names = [str(n)[:40] for n in names]
    return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')


# ── Its columns ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

photo_words = ('fname filename file imagefilename filepath filepaths imagepath path image imagename img imgname photo picture '
               'imageid imgid photoid id name').split()                                             # the first that is there counts
label_words = {*'label labels labelname labelid class classes classname classid classindex category categories categoryname categoryid '
               'target targets targetname choice choices tag tags groundtruth breed species diagnosis'.split()}
valid_words = {*'isvalid isval isvalidation valid val'.split()}
split_words = {*'split splits set subset dataset datasplit partition phase fold'.split()}
other_words = {*'width height xmin ymin xmax ymax x1 y1 x2 y2 depth size url md5 sha256'.split()}


def _plain(name) -> str: return re.sub('[^a-z0-9]', '', str(name).casefold())


def _pick(table, col, csv) -> str:
    "The name of a column that is given by name or number"
    if isinstance(col, str) and col in table.columns: return col
    if isinstance(col, int) and 0 <= col < table.shape[1]: return table.columns[col]
    raise DataError(f"{csv} has no column {col!r}; it has {_list(table.columns)}")


def photo_column(table, csv) -> str:
    "The column with the names of photos: by what is in it, then by what it is called"
    ends = lambda c: table[c].str.strip().map(lambda v: PurePosixPath(v.replace('\\', '/')).suffix.lower() in photo_suffixes).mean() > .5
    found = [c for c in table.columns if ends(c)]
    if len(found) == 1: return found[0]
    named = [c for w in photo_words for c in found or table.columns if _plain(c) == w]
    if named: return named[0]
    if found or table.shape[1] > 2:
        raise DataError(f"{csv} does not say which column names the photos; it has {_list(found or table.columns)}; "
                        "choose one with fn_col=")
    return table.columns[0]


def one_hot_columns(table, columns) -> list:
    "Columns that hold nothing but 0 and 1 (or -1)"
    return [c for c in columns if set(table[c].str.strip()) <= {'0', '1', '-1', '0.0', '1.0', '-1.0', ''}]


def _same(a, b) -> bool:
    "Do two columns name the same classes?"
    return len(set(zip(a, b))) == a.nunique() == b.nunique()


def _label_column(table, photo, split, csv) -> str:
    "The column with the labels; a `DataError` where it is not clear which"
    rest = [c for c in table.columns if c not in (photo, split)]
    if not rest: raise DataError(f"{csv} has the column {photo!r} only; fname,label are needed")
    named = [c for c in rest if _plain(c) in label_words]
    if named and all(_same(table[named[0]], table[c]) for c in named[1:]):                           # a class, and its number
        return next((c for c in named if not table[c].str.fullmatch(r'\s*[\d.]+\s*').all()), named[0])
    if named: raise DataError(f"{csv} has several columns that may hold the label: {_list(named)}; choose one with label_col=")
    if len(hot := one_hot_columns(table, rest)) > 1:
        raise DataError(f"{csv} has a column for each class ({_list(hot)}); from_export reads it where each photo has one class, "
                        "or choose one with label_col=")
    rest = [c for c in rest if _plain(c) not in other_words | split_words | valid_words] or rest
    if len(rest) == 1: return rest[0]
    raise DataError(f"{csv} has no column called label or class; it has {_list(table.columns)}; choose one with label_col=")


def _split_column(table, photo) -> str|None:
    "The column that says which photos are for validation"
    for c in table.columns:
        words = set(table[c].str.strip().str.lower())
        if c == photo: continue
        if _plain(c) == 'isvalid' or _plain(c) in valid_words and words <= {*_splits}: return c
        if _plain(c) in split_words and words <= {w for w in _splits if not w[:1].isdigit()} - {''}: return c


def find_columns(
    table: pd.DataFrame, # From `read_table`
    csv: str|Path, # Its name, for error messages
    fn_col: int|str|None = None, # Column of the photos' names; None: found
    label_col: int|str|None = None, # Column of the labels; None: found
    valid_col: int|str|None = None, # Column that picks the validation photos; None: found, if there is one
    group: str|None = None, # Column of the groups, which holds no labels
) -> tuple: # Names of the columns: photo, label, split (None where there is none)
    "Which column is which; a `DataError` that names the candidates where that is not clear"
    photo = photo_column(table, csv) if fn_col is None else _pick(table, fn_col, csv)
    split = _split_column(table, photo) if valid_col is None else _pick(table, valid_col, csv)
    label = _label_column(table.drop(columns=group or []), photo, split, csv) if label_col is None else _pick(table, label_col, csv)
    if label_col is None: _check_labels(table[label].str.strip(), label, csv)
    return photo, label, split


def _check_labels(labels, name, csv):
    "Refuse what is probably no class a photo"
    cells, found = labels[labels != ''], set(labels)
    several = {c: parts for c in found if len(parts := {p for p in re.split(r'[\s,;|]+', c) if p}) > 1}
    if both := next((c for c, parts in several.items() if parts <= found or _plain(name) == 'tags'), None):
        raise DataError(f"{csv} gives photos several labels at once, like {both[:80]!r} in the column {name!r}; this network knows one a "
                        "photo. "
                        "If that is one label, say so with label_col=")
    if len(cells) >= 20 and cells.nunique() > len(cells)/2:
        raise DataError(f"{csv} has {cells.nunique():,} different labels for {len(cells):,} photos in the column {name!r}, like "
                        f"{cells.iloc[0][:80]!r}; choose the column of the classes with label_col=")


# ── Its rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────

_splits = {**dict.fromkeys('true 1 1.0 valid val validation dev'.split(), 'val'), **dict.fromkeys('test testing'.split(), 'test'),
           **dict.fromkeys(['false', '0', '0.0', 'train', 'training', ''], 'train')}


def _row_number(table, place):
    "The number that a spreadsheet gives to a row of the table"
    number = table.attrs['first'] + place
    for blank in table.attrs['blank']: number += blank <= number
    return number


def _refuse(csv, table, bad, what, advice):
    "A `DataError` that counts the bad rows and names the first"
    if bad.any():
        raise DataError(f"{csv} {what} ({int(bad.sum()):,} of {len(bad):,} rows; first: row {_row_number(table, int(np.argmax(bad)))}); "
                        f"{advice}")


def _names(csv, table, column, folder, suffix) -> list:
    "Names of the photos, relative to `folder` where they lie in it"
    texts = [f.strip().replace('\\', '/') for f in column]
    _refuse(csv, table, np.array([t == '' for t in texts]), 'has no name for a photo', 'name it or remove the row')
    here = Path(folder).absolute().as_posix() + '/'
    names = [PurePosixPath(t.removeprefix(here) + suffix) for t in texts]
    _refuse(csv, table, np.array([n.is_absolute() or '..' in n.parts or re.match('[A-Za-z]:', str(n)) is not None for n in names]),
            f'names photos outside {folder}', "name them by their paths in it, or name another with folder=")
    _refuse(csv, table, np.array([n.suffix.lower() not in photo_suffixes or any(p[0] == '.' for p in n.parts) for n in names]),
            'names files that do not count as photos', "photos end in .jpg, .png and so on (suffix='.jpg' adds it) and are not hidden")
    return [str(n) for n in names]


def _found(csv, names, folder) -> list:
    "The photos themselves, below `folder`; a `DataError` where some are not there"
    finder = PhotoFinder(folder)
    found = [finder.exact(n) for n in names]
    lost = [n for n, f in zip(names, found) if f is None]
    if lost: raise DataError(f"{csv} names photos that are not in {folder} ({len(lost):,} of {len(names):,}; first: {lost[0]}); "
                             "fetch them, or name their folder with folder=")
    return found


def _row_splits(csv, table, column) -> list:
    "'train', 'val' or 'test' for each row"
    found = column.str.strip().str.lower().map(_splits)
    _refuse(csv, table, found.isna().to_numpy(), 'has rows that are neither for training nor for validation',
            'write True or False, or train, val and test')
    return found.tolist()


def _once(csv, table, names, labels, splits) -> list:
    "The places of the rows that count: a photo that has several, one a box for example, must have one label"
    first = {}
    for i, n in enumerate(names): first.setdefault(n, i)
    again = np.array([(labels[first[n]], splits[first[n]]) != (labels[i], splits[i]) for i, n in enumerate(names)])
    _refuse(csv, table, again, 'names a photo twice, with different labels', 'keep one of its rows')
    return list(first.values())


def _group_keys(csv, table, group, column, names) -> list|None:
    "A key for each row: what its column says, or what a regular expression finds in its name"
    if group is None: return None
    if column is None: return name_keys(names, group, csv)
    found = [k.strip() or None for k in table[column]]
    if not any(found): raise DataError(f"{csv} has an empty column {column!r}; name another with group=")
    return found


def from_csv(
    csv: str|Path, # A CSV with a header: fname,label and perhaps is_valid or split
    dest: str|Path, # A new folder
    folder: str|Path|None = None, # What the names are relative to; None: the CSV's folder
    fn_col: int|str|None = None, # Column of the names; None: found by what is in it, and by its name
    label_col: int|str|None = None, # Column of the labels; None: the one called label, class, category, target …
    valid_col: int|str|None = None, # Column of the splits: True/False, 1/0, train/val/test; None: is_valid or split where it is there
    valid_pct: float = .2, # Share of validation photos where no column picks them, and none of the last four is given
    seed: int = 42, # The same seed picks the same rows
    suffix: str = '', # Added to each name, like '.jpg'
    val: float|None = None, # Share of validation photos, drawn class by class, copies kept together; None: valid_pct of all, at random
    test: float = 0, # Share of test photos, drawn likewise; 0: none
    group: str|None = None, # A column, or a regular expression on the names: photos of one group stay in one split
    folds: int|None = None, # So many layouts in dest, `fold1` and so on, for a cross-validation
) -> DataPaths|list: # dest and its two JSON files; with `folds` one a fold
    "Turn a folder of photos and a CSV into this project's layout, linking the photos where possible; both are left as they are"
    csv, dest, heap = Path(csv), Path(dest), any(o not in (None, 0) for o in (val, test, group, folds))
    rows, keys, used = _csv_rows(csv, csv.parent if folder is None else Path(folder), fn_col, label_col, valid_col, suffix, group)
    ready = any(r.split == 'val' for r in rows)
    if ready and heap:
        raise DataError(f"{csv} says which photos are for validation, in the column {used[2]!r}; leave out val=, test=, group= and folds=, "
                        "or the column")
    if heap: return lay_out_heap(rows, csv, dest, .2 if val is None else val, test, seed, keys, folds)
    if not ready: rows = draw_splits(rows, csv, valid_pct, seed)
    if {_plain(c) for c in used[:2]} != {'fname', 'label'}: _say_columns(csv, *used)
    return lay_out(rows, csv, dest)


def _say_columns(csv, photo, label, split):
    print(f"{csv.name}: photos by {photo!r}, labels by {label!r}, " + (f'splits by {split!r}' if split else 'validation photos drawn'))


def _csv_rows(csv, folder, fn_col, label_col, valid_col, suffix, group) -> tuple:
    "(rows, the key of each one's group, the names of the columns)"
    table = read_table(csv)
    column = group if isinstance(group, str) and group in table.columns else None
    photo, label, split = used = find_columns(table, csv, fn_col, label_col, valid_col, column)
    names, labels = _names(csv, table, table[photo], folder, suffix), table[label].str.strip().tolist()
    splits = ['train']*len(names) if split is None else _row_splits(csv, table, table[split])
    _refuse(csv, table, np.array([not l and s != 'test' for l, s in zip(labels, splits)]), 'has no label for a photo',
            'label it or remove the row')
    keep = _once(csv, table, names, labels, splits)
    keys = _group_keys(csv, table, group, column, names)
    rows = [Row(n, f, labels[i], splits[i]) for i, n, f in zip(keep, pick(names, keep), _found(csv, pick(names, keep), folder))]
    return rows, None if keys is None else pick(keys, keep), used


def pick(values: list, places: list) -> list: return [values[i] for i in places]
