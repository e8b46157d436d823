"""Error classes, JSON that is checked as it is read, and files that appear whole or not at all."""
import json
import os
import secrets
from contextlib import contextmanager
from pathlib import Path


class DataError(ValueError): "Photos or label files that cannot be used as they are"


class LabelError(DataError): "A label, an id or an index that does not fit"


class PhotoError(DataError): "A file that cannot be read as a photo"


def _unique(pairs):
    once = {}                                                         # a million labels of a thousand kinds: keep each text once
    obj = {k: once.setdefault(v, v) if isinstance(v, str) else v for k,v in pairs}
    if len(obj) == len(pairs): return obj
    keys = [k for k,_ in pairs]
    raise LabelError(f"repeats the key {next(k for k in keys if keys.count(k) > 1)!r}; keep one of its entries")


def read_json_object(
    path:str|Path, # A UTF-8 JSON file
) -> dict: # Its object
    "Read a file that holds one JSON object; anything else is a `LabelError` that names the file"
    try: obj = json.loads(Path(path).read_text(encoding='utf-8-sig'), object_pairs_hook=_unique)
    except LabelError as e: raise LabelError(f"{path} {e}") from None
    except OSError as e: raise LabelError(f"{path} cannot be read: {e.strerror or e}") from None
    except (ValueError, RecursionError) as e: raise LabelError(f"{path} is not JSON: {e}") from None
    if not isinstance(obj, dict): raise LabelError(f"{path} holds a JSON {type(obj).__name__}; an object {{…}} is needed")
    return obj


@contextmanager
def atomic_write(
    path:str|Path, # The file that is to appear, or to be replaced
):
    "Yields a temporary path beside `path`; what is written there takes its place in one step when all went well"
    path = Path(path)
    part = path.with_name(f'.{path.name}.{secrets.token_hex(4)}')        # processes of two containers can have one number
    try:
        yield part
        with open(part, 'rb+') as f: os.fsync(f.fileno())
        part.replace(path)
    finally: part.unlink(missing_ok=True)


def write_json(
    path:str|Path, # Replaced in one step
    obj, # What JSON can hold
):
    "Write an object as JSON"
    text = json.dumps(obj, ensure_ascii=False, indent=1).encode('utf-8', 'backslashreplace')     # a name that is not UTF-8: as JSON escapes it
    with atomic_write(path) as part: part.write_bytes(text)


def _umask():
    os.umask(mask := os.umask(0))
    return mask


def _one_of(name, value, choices):
    if value not in choices: raise DataError(f"there is no {name} {value!r}; there is {', '.join(choices)}")
