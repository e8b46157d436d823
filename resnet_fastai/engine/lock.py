"One writer at a time in a folder."
import json
import os
import socket
import time
from pathlib import Path

from .files import DataError

try: import fcntl
except ImportError: fcntl = None                            # Windows: no lock

_mine = {}                                                  # {folder: its lock's file}, of this process


def lock_folder(
    folder:str|Path, # One that exists
):
    "Keep every other writer out until `unlock_folder`, or until this process ends, however it ends; a `DataError` says who is in"
    folder = os.path.realpath(folder)
    if folder in _mine: raise DataError(f"{folder} is in use by another training of this process; wait for its end, or name another folder")
    path = os.path.join(folder, '.lock')
    while True:
        f = open(path, 'a+', encoding='utf-8')
        try: fcntl and fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            with f: raise DataError(f"{folder} is in use by {_holder(f)}; wait for its end, stop it, or name another folder") from None
        except OSError: pass                                # a file system without locks
        if _still_there(path, f): break
        f.close()                                           # the one before has just taken the file away
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
    try: os.unlink(f.name)
    except OSError: pass
    f.close()                                               # only now does the lock end


def _still_there(path, f):
    try: return os.path.samestat(os.stat(path), os.fstat(f.fileno()))
    except OSError: return False


def _holder(f):
    try:
        f.seek(0)
        who = json.loads(f.read())
        return f"process {who['pid']:d} on {who['host']:.80}, since {who['since']:.20}"
    except (OSError, ValueError, KeyError, TypeError): return 'another process'
