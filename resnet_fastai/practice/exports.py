"""What labelling tools and data sets hand out: COCO, Label Studio, CVAT, Roboflow, and tables with a column for each class"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree

from ..engine.convert import PhotoFinder, Row, draw_splits, lay_out, some
from ..engine.files import DataError, exported_by, read_regular
from ..engine.layout import DataPaths
from ..engine.stratified import lay_out_heap, name_keys
from .tables import one_hot_columns, photo_column, read_table

__all__ = ['from_export']

# ── What is in a file: (name of a photo, its classes) ────────────────────────────────────────────────────────────────────────


def _coco(found: dict) -> Iterator:
    "COCO: images, annotations and categories, by their numbers"
    names, of = {c['id']: str(c['name']) for c in found['categories']}, defaultdict(set)
    for a in found['annotations']: of[a['image_id']].add(names[a['category_id']])
    return ((i['file_name'], of[i['id']]) for i in found['images'])


def _choices(value) -> set:
    "What was chosen: a text, or a list of them"
    value = value.get('choices', []) if isinstance(value, dict) else value
    return {str(v) for v in (value if isinstance(value, list) else [value]) if v not in (None, '')}


def _label_studio(found: list) -> Iterator:
    "Label Studio: a list of tasks, whole ones or in the short form JSON-MIN"
    for task in found:
        data, classes = task.get('data', task), set()
        for a in task.get('annotations', [task] if 'data' not in task else []):
            if a.get('was_cancelled'): continue
            for r in a.get('result', []): classes |= _choices(r['value'].get('choices', [])) if r.get('type') == 'choices' else set()
            if 'result' not in a: classes |= _choices(a.get('choice', a.get('label', [])))
        yield _upload_name(data['image']), classes


def _upload_name(address: str) -> str:
    "The path of a photo in an address of Label Studio's"
    at = urlsplit(address)
    return unquote(parse_qs(at.query)['d'][0] if 'd' in parse_qs(at.query) else at.path)


def _cvat(root: ElementTree.Element) -> Iterator:
    "CVAT for images: a tag, or boxes, in each image"
    for image in root.iter('image'):
        yield image.get('name'), {o.get('label') for o in image if o.get('label')}


def _hot(path: Path) -> Iterator:
    "A table with a column for each class, 1 where a photo is of it"
    table = read_table(path)
    photo = photo_column(table, path)
    columns = one_hot_columns(table, [c for c in table.columns if c != photo])
    if len(columns) < 2: raise DataError(f"{path} has no columns of 0 and 1, one a class; from_csv reads other tables")
    for _, row in table.iterrows(): yield row[photo].strip(), {c for c in columns if row[c].strip() in ('1', '1.0')}


def _read(path: Path) -> list:
    "(name, classes) of each photo in a file; a `DataError` where no tool is known that writes it"
    try:
        if path.suffix.lower() == '.csv': return list(_hot(path))
        data = read_regular(path)
        if path.suffix.lower() == '.xml': return list(_cvat(ElementTree.fromstring(data)))
        found = json.loads(data.decode('utf-8-sig'))
        if exported_by(found): return list((_coco if isinstance(found, dict) else _label_studio)(found))
    except OSError as e: raise DataError(f"{path} cannot be read: {e.strerror or e}") from None
    except DataError: raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, ElementTree.ParseError) as e:
        raise DataError(f"{path} is not a whole export: {type(e).__name__}: {str(e)[:80]}") from None
    raise DataError(f"{path} is no export that is known: COCO or Label Studio (.json), CVAT for images (.xml), a column for each class "
                    "(.csv)")


# ── Where its files are ──────────────────────────────────────────────────────────────────────────────────────────────────────

_split_folders = dict(train='train', valid='val', val='val', validation='val', test='test')
_files = ('_classes.csv', '_annotations.coco.json')


def _sources(src: Path) -> list:
    "[(file, folder of its photos, split or None)]"
    if not src.is_dir(): return [(src, src.parent, None)]
    found = [(p/f, p, _split_folders[p.name.lower()]) for p in sorted(src.iterdir()) if p.name.lower() in _split_folders
             for f in _files if (p/f).is_file()]                                                     # Roboflow's
    if found: return found
    files = [p for p in sorted(src.iterdir()) if p.suffix.lower() in ('.json', '.xml', '.csv') and p.is_file()]
    if len(files) != 1:
        raise DataError(f"{src} has {some(p.name for p in files) or 'no file'} of .json, .xml or .csv; name the file of the labels")
    return [(files[0], src, None)]


def _one_class(name, classes, path) -> str:
    "A photo's class; '' where it has none"
    if len(classes) > 1: raise DataError(f"{path} gives {str(name)[:80]!r} the labels {some(classes)}; this network knows one a photo. "
                                         "Keep one of them, or cut the photo into its boxes")
    return next(iter(classes), '')


def _rows(path, folder, split) -> Iterator[Row]:
    "The photos of a file"
    finder = PhotoFinder(folder)
    for name, classes in _read(path):
        found = finder.exact(str(name)) or finder.tail(str(name)) or finder.tail(re.sub(r'(^|/)[0-9a-f]{8}-([^/]+)$', r'\1\2', str(name)))
        if found is None:
            raise DataError(f"{path} names {str(name)[:80]!r}, which is not in {folder}; name the folder of the photos with folder=")
        yield Row(found.relative_to(folder).as_posix(), found, _one_class(name, classes, path), split or 'train')


def _once(rows, src) -> list:
    "Each photo once; a `DataError` where it has two labels"
    first = {}
    for r in rows:
        if (other := first.setdefault(r.path, r)).label != r.label:
            raise DataError(f"{src} gives {r.name[:80]!r} the labels {some({r.label, other.label})}; this network knows one a photo")
    return list(first.values())


def from_export(
    src: str|Path, # COCO or Label Studio (.json), CVAT for images (.xml), a column for each class (.csv); or a folder that holds it
    dest: str|Path, # A new folder
    folder: str|Path|None = None, # Where the photos are; None: where the file is
    valid_pct: float = .2, # Share of validation photos where the export has no splits, and none of the last four is given
    seed: int = 42, # The same seed picks the same photos
    val: float|None = None, # Share of validation photos, drawn class by class, copies kept together; None: valid_pct of all, at random
    test: float = 0, # Share of test photos, drawn likewise; 0: none
    group: str|None = None, # A regular expression on the names: photos in which it finds the same stay in one split
    folds: int|None = None, # So many layouts in dest, `fold1` and so on, for a cross-validation
) -> DataPaths|list: # dest and its two JSON files; with `folds` one a fold
    "Turn the export of a labelling tool into this project's layout, one class a photo, linking the photos where possible"
    src, sources = Path(src), _sources(Path(src))
    rows = [r for path, here, split in sources for r in _rows(path, here if folder is None else Path(folder), split)]
    if bare := [r for r in rows if not r.label and r.split != 'test']:
        print(f"{src.name}: {len(bare):,} of {len(rows):,} photos have no label and are left out; first: {bare[0].name}")
    rows = _once([r for r in rows if r.label or r.split == 'test'], src)
    if not rows: raise DataError(f"{src} labels no photo")
    ready, heap = any(r.split == 'val' for r in rows), any(o not in (None, 0) for o in (val, test, group, folds))
    if ready and heap:
        raise DataError(f"{src} has validation photos of its own, so that nothing is drawn; leave out val=, test=, group= and folds=")
    if not heap: return lay_out(rows if ready else draw_splits(rows, src, valid_pct, seed), src, dest)
    keys = None if group is None else name_keys([r.name for r in rows], group, src)
    return lay_out_heap(rows, src, dest, .2 if val is None else val, test, seed, keys, folds)
