"""Fetch one file over HTTP, within limits of size and time."""
import hashlib
import time
import urllib.request
from http.client import HTTPException

from fastprogress.fastprogress import progress_bar

from .files import DataError


def _download(
    url:str, # http://, https:// or file://
    out, # A file, open for writing
    limit:int|None=None, # Bytes at the most; None: any number, with a progress bar
    seconds:float=float('inf'), # That it may take
    chunk:int=1<<20, # Bytes at a time
) -> str: # Its SHA-256 sum
    "Fetch a file; a `DataError` where it does not come whole"
    digest, done, end = hashlib.sha256(), 0, time.monotonic() + seconds
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={'User-Agent': 'resnet_fastai'}), timeout=30) as r:
            size, read = int(r.headers.get('Content-Length') or 0), r.read if limit is None else r.read1
            parts = iter(lambda: read(chunk), b'')
            for part in progress_bar(parts, total=-(-size//chunk) or 'noinfer', leave=False) if limit is None else parts:
                done += len(part)
                if limit and max(size, done) > limit: raise DataError(f"{url} has more than {limit:,} bytes; download it, and pass the file")
                if time.monotonic() > end: raise DataError(f"{url} has not come whole within {seconds} seconds; try again")
                out.write(part); digest.update(part)
    except DataError: raise
    except (OSError, ValueError, HTTPException) as e:
        raise DataError(f"{url} cannot be fetched: {getattr(e, 'reason', None) or e}; try again") from None
    if size and done != size: raise DataError(f"{url} broke off after {done:,} of {size:,} bytes; try again")
    return digest.hexdigest()


def _is_page(start): return start[:512].lstrip().lower().startswith((b'<!doctype', b'<html', b'<?xml'))
