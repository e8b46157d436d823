"""Fetch and unpack an archive of photos; refuse what could harm the disk."""
import gzip
import hashlib
import os
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path
from stat import S_ISLNK

from .cache import cache_folder
from .download import _download, _is_page, shown_url
from .files import DataError, cut, quote
from .shards import fetch_index


_archives = ('.zip', '.tar.gz', '.tgz')


def resolve_data(
    source:str|Path, # A folder, the URL of a .zip, .tar.gz or .tgz, perhaps with #sha256=…, or the http(s) URL of shards, with / at its end
    cache:str|Path|None=None, # Where archives are unpacked; None: fastai's data folder
    find=None, # (folder, its archive's name) → the folder that is wanted; None: the one that holds train/
) -> Path: # The folder that holds train/, or the index of shards
    "The local folder of the photos, fetched and unpacked if need be"
    if not isinstance(source, (str, os.PathLike)): raise DataError(f"data_path is {quote(source)}; pass a folder, or the URL of an archive")
    if '://' not in str(source):
        if Path(source).is_dir(): return Path(source)
        raise DataError(f"data_path {quote(str(source))} is not a folder; pass a folder, or the URL of a {', '.join(_archives)}")
    url,_,sha256 = str(source).partition('#sha256=')
    if not url.lower().startswith(('http://', 'https://', 'file://')):
        raise DataError(f"{shown_url(url)} starts with neither http://, https:// nor file://")
    if find is None and url.lower().startswith('http') and url.split('?')[0].endswith('/'): return fetch_index(url)
    name = url.split('?')[0].split('#')[0].rstrip('/').rsplit('/', 1)[-1]
    suffix = next((s for s in _archives if name.lower().endswith(s)), None)
    if suffix is None:
        raise DataError(f"{shown_url(url)} does not name an archive that can be unpacked ({', '.join(_archives)}), nor a folder of shards, "
                          "whose address ends in /")
    home = Path(cache or cache_folder())/f'{name[:-len(suffix)]}-{hashlib.sha256(str(source).encode()).hexdigest()[:8]}'
    find = find or _find_train
    if not home.exists(): _fetch(url, suffix, home, sha256.lower(), find)
    return find(home, shown_url(url))


def _fetch(url, suffix, home, sha256, find):
    name = shown_url(url)
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent, prefix='.fetching-') as tmp:
        archive, unpacked = Path(tmp)/f'archive{suffix}', Path(tmp)/'unpacked'
        with open(archive, 'wb') as f: found = _download(url, f)
        if sha256 and found != sha256:
            raise DataError(f"{name} has the SHA-256 sum {found}, not {sha256}: another file, or damaged on the way")
        unpacked.mkdir()
        _unpack(archive, unpacked, name)
        find(unpacked, name)
        try: unpacked.rename(home)
        except OSError:
            if not home.exists(): raise         # another process got there first: theirs is as good


def _find_train(folder, url):
    inside = [folder, *(p for p in sorted(folder.iterdir()) if p.is_dir())]
    for p in inside:
        if (p/'train').is_dir(): return p
    raise DataError(f"the archive at {url} has no folder train/, neither at its top nor one level down")


def _unpack(archive, dest, url):
    with open(archive, 'rb') as f: page = _is_page(f.read(512))
    if page: raise DataError(f"{url} gave a web page, not an archive; open it in a browser to see what it says")
    try: (_unzip if archive.suffix == '.zip' else _untar)(archive, dest, _Weight(archive, dest))
    except DataError as e: raise DataError(f"{url}: {e}") from None
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError, RuntimeError, ValueError, zlib.error) as e:
        raise DataError(f"{url} is not a whole {''.join(archive.suffixes)} archive: {cut((str(e).splitlines() or [''])[0], 200)}") from None


class _Weight:
    "Adds up what an archive unpacks to, and refuses a bomb"
    def __init__(self, archive, dest):
        self.total, self.limit, self.free = 0, max(1<<30, 100*archive.stat().st_size), shutil.disk_usage(dest).free
    def add(self, name, size):
        self.total += max(size, 4096)                                              # an empty file takes a block of the disk, too
        if self.total > self.limit:
            raise DataError(f"it unpacks to more than {self.limit:,} bytes, 100 times its own size; refused at {quote(name)}")
        if self.total > self.free: raise DataError(f"it unpacks to more than the {self.free:,} bytes that the disk has left")


def _refuse_strangers(dest, name, plain):
    "Only files and folders inside the destination; links could point anywhere"
    if not plain: raise DataError(f"its member {quote(name)} is a link or a device; refused")
    if len(name) > 4096: raise DataError(f"its member {quote(name)} has a name of {len(name):,} characters; refused")
    if not (dest/name).resolve().is_relative_to(dest.resolve()):
        raise DataError(f"its member {quote(name)} climbs out of the folder; refused")


def _unzip(archive, dest, weight):
    with zipfile.ZipFile(archive) as z:
        for m in z.infolist():
            m.filename = m.filename.replace('\\', '/')                           # as .NET writes them, against the standard
            _refuse_strangers(dest, m.filename, not S_ISLNK(m.external_attr >> 16))
            weight.add(m.filename, m.file_size)                                   # zipfile never writes more than this
        for m in z.infolist(): z.extract(m, dest)


class _Headers:
    "What tarfile reads from: gzip, but no header of more than a megabyte at once, which only a hostile archive has"
    def __init__(self, f): self.f = f
    def __getattr__(self, name): return getattr(self.f, name)
    def read(self, n=-1):
        if not 0 <= n <= 1 << 20: raise DataError(f"it has a header of {n:,} bytes; refused")
        return self.f.read(n)


def _untar(archive, dest, weight):
    safe = dict(filter='data') if hasattr(tarfile, 'data_filter') else {}
    with gzip.open(archive) as f, tarfile.open(fileobj=_Headers(f), mode='r:') as t:
        for m in t:
            _refuse_strangers(dest, m.name, m.isfile() or m.isdir())
            weight.add(m.name, m.size)
            t.extract(m, dest, **safe)
