"""A folder for what is fetched or computed once; also where there is no home that can be written."""
import configparser
import os
import tempfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from fastai.data.external import fastai_path


@lru_cache
def _fallback():
    "A folder of this user's own among the temporary files; a new one where somebody else has taken its name"
    folder = Path(tempfile.gettempdir())/f'resnet_fastai-{os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "")}'
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if hasattr(os, 'getuid') and (found.st_uid != os.getuid() or found.st_mode & 0o077 or folder.is_symlink()): raise PermissionError
    except OSError: folder = Path(tempfile.mkdtemp(prefix='resnet_fastai-'))
    print(f'fastai has no home that can be written here; {folder} is used instead (FASTAI_HOME names another)')
    return folder


def _fastais():
    "fastai's data folder; the usual one where another process is just writing what names it"
    with suppress(configparser.Error):
        if folder := fastai_path('data'): return folder
    return Path(os.environ.get('FASTAI_HOME', '~/.fastai')).expanduser()/'data'


def cache_folder() -> Path:
    "fastai's data folder, or a temporary one where it cannot be written, as in a container without a home"
    try:
        folder = _fastais()
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK): return folder
    except OSError: pass
    return _fallback()
