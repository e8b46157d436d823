"""Error classes, JSON that is checked as it is read, and files that appear whole or not at all."""
import errno
import hashlib
import json
import os
import secrets
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISFIFO, S_ISREG


class DataError(ValueError): "Photos or label files that cannot be used as they are"


class LabelError(DataError): "A label, an id or an index that does not fit"


class PhotoError(DataError): "A file that cannot be read as a photo"


def cut(
    text:str,
    most:int=80, # Characters
) -> str: # The same, or its start and …
    "A text as an error message shows it"
    return text if len(text) <= most else f'{text[:most]}…'


def quote(
    value, # Anything
) -> str: # Its `repr`, 80 characters of it at the most
    "A value as an error message shows it"
    return cut(repr(value[:100] if isinstance(value, str) else value))


def _unique(pairs):
    once = {}                                                         # a million labels of a thousand kinds: keep each text once
    obj = {k: once.setdefault(v, v) if isinstance(v, str) else v for k,v in pairs}
    if len(obj) == len(pairs): return obj
    twice = next(k for k,n in Counter(k for k,_ in pairs).items() if n > 1)
    raise LabelError(f"repeats the key {quote(twice)}; keep one of its entries")


def open_regular(
    path:str|Path,
): # A file of bytes, open
    "Open a file to read; an `OSError` where it is a device, or a pipe, which may never end"
    f = open(path, 'rb', opener=lambda p, flags: os.open(p, flags | getattr(os, 'O_NONBLOCK', 0)))
    if S_ISREG(os.fstat(f.fileno()).st_mode): return f
    f.close()
    raise OSError(errno.EINVAL, 'a pipe or a device, not a file', str(path))


def read_regular(
    path:str|Path,
    pipes:bool=False, # Is a pipe read too, like a shell's <(command)? Who names one waits for it
) -> bytes:
    "What a file holds; an `OSError` as from `open_regular`"
    if pipes and S_ISFIFO(os.stat(path).st_mode): return Path(path).read_bytes()
    with open_regular(path) as f: return f.read()


def sha256_of(
    path: str|Path, # A file
) -> str: # 64 hexadecimal digits
    "SHA-256 of a file"
    sha = hashlib.sha256()
    with open(path, 'rb') as f:
        while part := f.read(1 << 20): sha.update(part)
    return sha.hexdigest()


def read_json_object(
    path:str|Path, # A UTF-8 JSON file
) -> dict: # Its object
    "Read a file that holds one JSON object; anything else is a `LabelError` that names the file"
    try: obj = json.loads(read_regular(path, pipes=True).decode('utf-8-sig'), object_pairs_hook=_unique)
    except LabelError as e: raise LabelError(f"{path} {e}") from None
    except OSError as e: raise LabelError(f"{path} cannot be read: {e.strerror or e}") from None
    except (ValueError, RecursionError) as e: raise LabelError(f"{path} is not JSON: {cut(str(e))}") from None
    if not isinstance(obj, dict):
        raise LabelError(f"{path} holds a JSON {type(obj).__name__}; {exported_by(obj) or 'an object {…} is needed'}")
    return obj


def exported_by(
    obj, # What a JSON file holds
) -> str: # '' where no tool is known that writes it
    "Advice where a file is a labelling tool's own export"
    if isinstance(obj, dict) and all(isinstance(obj.get(k), list) for k in ('images', 'annotations', 'categories')): kind = 'COCO'
    else:
        task = obj[0] if isinstance(obj, list) and obj and isinstance(obj[0], dict) else {}
        kind = 'Label Studio' if 'image' in (task['data'] if isinstance(task.get('data'), dict) else task) else ''
    return kind and f"it is an export of {kind}, which practice.exports.from_export(src, dest) turns into this project's layout"


def _sync(fd):
    "fsync, where the file system has it"
    try: os.fsync(fd)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP): raise


def sync_folder(
    path:str|Path,
):
    "Let a folder's new names reach the disk, where that is possible; network drives and Windows do without"
    with suppress(OSError, AttributeError):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try: os.fsync(fd)
        finally: os.close(fd)


def part_name(
    name:str, # Of a file
) -> str: # Hidden, at most 255 bytes long, and nobody else's: threads have one process id, containers too
    "The name that a file has while it is written"
    short = name if len(os.fsencode(name)) < 200 else name[:30] + name[-20:]
    return f'.{short}.{os.getpid()}-{secrets.token_hex(4)}'


@contextmanager
def atomic_write(
    path:str|Path, # The file that is to appear, or to be replaced
):
    "Yields a temporary path beside `path`; what is written there takes its place in one step when all went well"
    path = Path(path)
    part = path.with_name(part_name(path.name))
    try:
        yield part
        with open(part, 'rb+') as f: _sync(f.fileno())
        part.replace(path)
    finally: part.unlink(missing_ok=True)


def write_json(
    path:str|Path, # Replaced in one step
    obj, # What JSON can hold
):
    "Write an object as JSON"
    # a name that is not UTF-8: as JSON escapes it
    text = json.dumps(obj, ensure_ascii=False, indent=1).encode('utf-8', 'backslashreplace')
    with atomic_write(path) as part: part.write_bytes(text)


def _umask():
    os.umask(mask := os.umask(0))
    return mask
