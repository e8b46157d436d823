"One writer at a time in a folder."
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from .files import DataError

try: import fcntl
except ImportError: fcntl = None                            # Windows
try: import msvcrt
except ImportError: msvcrt = None                           # every other system; where both are missing there is no lock

_mine = {}                                                  # {folder: its lock's file}, of this process
# the byte that is locked on Windows, where nobody reads a locked one: behind the note
_far = 1 << 30


def lock_folder(
    folder:str|Path, # One that exists
):
    "Keep every other writer out until `unlock_folder`, or until this process ends, however it ends; a `DataError` says who is in"
    folder = os.path.realpath(folder)
    if folder in _mine: raise DataError(f"{folder} is in use by another training of this process; wait for its end, or name another folder")
    f = _locked(folder, os.path.join(folder, '.lock'))
    with suppress(OSError):                                 # the note is for people
        f.seek(0)
        f.truncate()
        json.dump(dict(host=socket.gethostname(), pid=os.getpid(), since=time.strftime('%Y-%m-%d %H:%M:%S')), f)
        f.flush()
    _mine[folder] = f


def unlock_folder(
    folder:str|Path, # What `lock_folder` was given; nothing happens where it is not locked by this process
):
    "Let others write in a folder"
    if not (f := _mine.pop(os.path.realpath(folder), None)): return
    if msvcrt: _release(f)                                  # Windows removes no open file
    with suppress(OSError): os.unlink(f.name)
    f.close()                                               # elsewhere the lock ends only now


def _locked(folder, path):
    "The lock's file, open and locked"
    for attempts in reversed(range(100)):                   # on some network drives a file never looks like itself
        f = open(path, 'a+', encoding='utf-8')
        try: _lock(f)
        except (BlockingIOError, PermissionError):
            with f: raise DataError(f"{folder} is in use by {_holder(f)}; wait for its end, stop it, or name another folder") from None
        except OSError: pass                                # a file system without locks
        if not attempts or _still_there(path, f): return f
        f.close()                                           # the one before has just taken the file away


def _lock(f):
    if fcntl: return fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if not msvcrt: return
    os.lseek(f.fileno(), _far, os.SEEK_SET)
    msvcrt.locking(f.fileno(), msvcrt.LK_NBLCK, 1)


def _release(f):
    with suppress(OSError), f:
        f.flush()
        os.lseek(f.fileno(), _far, os.SEEK_SET)
        msvcrt.locking(f.fileno(), msvcrt.LK_UNLCK, 1)


def _still_there(path, f):
    try: return os.path.samestat(os.stat(path), os.fstat(f.fileno()))
    except OSError: return False


def _holder(f):
    try:
        f.seek(0)
        who = json.loads(f.read())
        return f"process {who['pid']:d} on {who['host']:.80}, since {who['since']:.20}"
    except (OSError, ValueError, KeyError, TypeError): return 'another process'
