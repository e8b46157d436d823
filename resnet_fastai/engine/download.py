"""Fetch one file over HTTP, within limits of size and time."""
import hashlib
import io
import re
import time
import urllib.request
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from urllib.error import HTTPError
from urllib.parse import urlsplit

from fastprogress.fastprogress import progress_bar

from .files import DataError, cut


def shown_url(
    url:str,
) -> str: # Without user name, password and whatever follows a ?, which may be a token
    "An address as an error message shows it"
    url = re.sub(r'^([a-zA-Z][a-zA-Z0-9+.-]*://)[^/?#]*@', r'\1', url)
    return cut(re.sub(r'[?#].*$', lambda m: '?…' if m[0][0] == '?' else '', url, flags=re.DOTALL), 200)


class _Timed:
    "A socket whose every answer comes before the same moment, however slowly a server sends it"
    def __init__(self, sock, end): self.sock, self.end = sock, end
    def __getattr__(self, name): return getattr(self.sock, name)
    def makefile(self, mode, *args, **kwargs): return io.BufferedReader(_TimedFile(self.sock.makefile('rb', buffering=0), self))
    def left(self):
        if (left := self.end - time.monotonic()) <= 0: raise TimeoutError('it takes too long')
        self.sock.settimeout(min(30, left))


class _TimedFile(io.RawIOBase):
    def __init__(self, raw, timed): self.raw, self.timed = raw, timed
    def readable(self): return True
    def readinto(self, buffer):
        self.timed.left()
        return self.raw.readinto(buffer)
    def close(self):
        self.raw.close()
        super().close()


def _within(connection, end):
    "A class of connections that are over at a certain moment"
    class Within(connection):
        def connect(self):
            super().connect()
            self.sock = _Timed(self.sock, end)
    return Within


class _HTTP(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    def __init__(self, end):
        urllib.request.HTTPSHandler.__init__(self)
        self.end = end
    def http_open(self, req): return self.do_open(_within(HTTPConnection, self.end), req)
    def https_open(self, req): return self.do_open(_within(HTTPSConnection, self.end), req, context=self._context)


class _Redirect(urllib.request.HTTPRedirectHandler):
    "Follows a server to other pages of the web, not to a file or to FTP"
    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if urlsplit(newurl).scheme not in ('http', 'https'):
            raise DataError(f"{shown_url(req.full_url)} leads to {shown_url(newurl)}, which is not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener(url, end):
    "Opens http and https, or a file where the user has named one"
    opener = urllib.request.OpenerDirector()
    web = [urllib.request.ProxyHandler(), _HTTP(end), _Redirect(), urllib.request.HTTPErrorProcessor(),
           urllib.request.HTTPDefaultErrorHandler()]
    for handler in [urllib.request.FileHandler()] if url.lower().startswith('file://') else web: opener.add_handler(handler)
    return opener


def _reason(e):
    "What went wrong, without the address"
    reason = e.reason if isinstance(e, HTTPError) else getattr(e, 'reason', None) or e
    return 'it takes too long' if isinstance(reason, TimeoutError) else cut(str(reason) or type(e).__name__, 200)


def _download(
    url:str, # http://, https:// or file://
    out, # A file, open for writing
    limit:int|None=None, # Bytes at the most; None: any number, with a progress bar
    seconds:float=float('inf'), # Timeout of the whole, headers and redirects included
    chunk:int=1<<20, # Bytes at a time
) -> str: # Its SHA-256 sum
    "Fetch a file; a `DataError` where it does not come whole"
    digest, done, end, name = hashlib.sha256(), 0, time.monotonic() + seconds, shown_url(url)
    try:
        with _opener(url, end).open(urllib.request.Request(url, headers={'User-Agent': 'resnet_fastai'}), timeout=min(30, seconds)) as r:
            size, read = int(r.headers.get('Content-Length') or 0), r.read if limit is None else r.read1
            parts = iter(lambda: read(chunk), b'')
            for part in progress_bar(parts, total=-(-size//chunk) or 'noinfer', leave=False) if limit is None else parts:
                done += len(part)
                if limit and max(size, done) > limit:
                    raise DataError(f"{name} has more than {limit:,} bytes; download it, and pass the file")
                if time.monotonic() > end: raise TimeoutError
                out.write(part); digest.update(part)
    except DataError: raise
    except TimeoutError: raise DataError(f"{name} has not come whole within {seconds} seconds; try again") from None
    except (OSError, ValueError, HTTPException) as e:
        if time.monotonic() > end: raise DataError(f"{name} has not come whole within {seconds} seconds; try again") from None
        raise DataError(f"{name} cannot be fetched: {_reason(e)}; try again") from None
    if size and done != size: raise DataError(f"{name} broke off after {done:,} of {size:,} bytes; try again")
    return digest.hexdigest()


def _is_page(start): return start[:512].lstrip().lower().startswith((b'<!doctype', b'<html', b'<?xml'))
