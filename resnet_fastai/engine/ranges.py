"""Parts of files over HTTP: connections that are kept, attempts with a limit, errors that name the file."""
import os
import random
import re
import threading
import time
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from urllib.parse import urljoin, urlsplit, urlunsplit

from .download import _reason, _Timed, shown_url
from .files import DataError, PhotoError

waits = 0, .1, .5, 2, 8, 30                       # Seconds before each further attempt: a server may restart meanwhile
patience, slowest = 60, 1e5                       # Seconds that an answer may take, and bytes a second
_jitter = random.Random()                         # not the generator that seeds set


class _Passing(Exception): "A failure that another attempt may not meet"


def _kept(connection):
    "A class of connections that last, and whose answers come before a moment that each request sets"
    class Kept(connection):
        end = 0.
        def connect(self):
            super().connect()
            self.sock = _Timed(self.sock, self.end)

        def until(self, end):
            self.end = end
            if self.sock: self.sock.end = end
    return Kept


_kinds = {'http': _kept(HTTPConnection), 'https': _kept(HTTPSConnection)}


class RangeReader:
    "Files below one address, read in parts; for any number of threads and of forked processes"
    def __init__(self,
        base:str, # http(s) address that ends in /, perhaps with ?token behind it; files are named below it
    ): self.base, self.own = base, threading.local()

    def __reduce__(self): return RangeReader, (self.base,)

    def url(self, name) -> str:
        "The address of a file"
        parts = urlsplit(self.base)
        return urlunsplit(parts._replace(path=parts.path + name, fragment=''))

    def read(self,
        name:str, # Of a file
        start:int|None=None, size:int|None=None, # First byte, and how many; None: the whole file
        of:int|None=None, # Bytes that the file must have
        good:Callable=lambda data: True, # Are these the right bytes?
        most:int=1<<30, # Bytes of a whole file at the most
    ) -> bytearray:
        "Bytes of a file; tried again after what may pass; a `DataError` names the file, a `PhotoError` where only its bytes are wrong"
        for wait in (*waits, None):
            try:
                data = self._once(self.url(name), start, size, of, most)
                if good(data): return data
                error, said = PhotoError, 'its checksum is wrong: damaged on the way, or packed again since the training began'
            except (_Passing, OSError, HTTPException, ValueError) as e:
                if isinstance(e, DataError): raise
                self._drop()
                error, said = DataError, _reason(e)
            if wait is not None: time.sleep(wait*_jitter.uniform(.5, 1))
        part = '' if start is None else f' (bytes {start:,} to {start + size:,})'
        raise error(f"{shown_url(self.url(name))}{part} cannot be read: {said}; given up after {len(waits) + 1} attempts")

    def _connection(self, url, seconds):
        parts = urlsplit(url)
        if parts.scheme not in _kinds: raise DataError(f"{shown_url(url)} starts with neither http:// nor https://")
        kept, key = self.own.__dict__.setdefault(os.getpid(), {}), (parts.scheme, parts.netloc)      # a fork has connections of its own
        if key not in kept: kept[key] = _kinds[parts.scheme](parts.hostname, parts.port, timeout=30)
        kept[key].until(time.monotonic() + seconds)
        return kept[key]

    def _drop(self):
        for c in self.own.__dict__.pop(os.getpid(), {}).values(): c.close()

    def _once(self, url, start, size, of, most, hops=5):
        headers = {'User-Agent': 'resnet_fastai', 'Accept-Encoding': 'identity'}
        if start is not None: headers['Range'] = f'bytes={start}-{start + size - 1}'
        c, parts = self._connection(url, patience + (most if size is None else size)/slowest), urlsplit(url)
        c.request('GET', urlunsplit(('', '', parts.path or '/', parts.query, '')), headers=headers)
        r = c.getresponse()
        if r.status in (301, 302, 303, 307, 308) and hops:
            self._drop()
            return self._once(urljoin(url, r.headers.get('Location', '')), start, size, of, most, hops - 1)
        self._check(url, r, start, size, of, most)
        data = bytearray(r.read((most if size is None else size) + 1))
        if len(data) > most and size is None: raise DataError(f"{shown_url(url)} has more than {most:,} bytes")
        if len(data) != (int(r.headers.get('Content-Length', len(data))) if size is None else size): raise _Passing('it broke off')
        return data

    def _check(self, url, r, start, size, of, most):
        "Raise where an answer is not what was asked for"
        if r.status in (408, 425, 429) or r.status >= 500: raise _Passing(f'the server answered {r.status} {r.reason}')
        name = shown_url(url)
        if r.status == 200 and start is not None:
            self._drop()
            raise DataError(f"{name}: this server sends whole files, and shards need range requests; nginx, Apache, Caddy, S3 and the like "
                            "answer them, python -m http.server does not")
        if r.status != (200 if start is None else 206):
            self._drop()
            raise DataError(f"{name} cannot be read: the server answered {r.status} {r.reason}")
        if start is None: return
        found = re.fullmatch(r'bytes (\d+)-(\d+)/(\d+|\*)', r.headers.get('Content-Range', ''))
        if found and of and found[3] != '*' and int(found[3]) != of:
            self._drop()
            raise DataError(f"{name} has {int(found[3]):,} bytes, not the {of:,} of the index: copied in part, or packed again since; "
                            "copy it again, or start anew")
        if not found or (int(found[1]), int(found[2])) != (start, start + size - 1): raise _Passing('the server sent another part of it')
