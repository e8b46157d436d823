"Archives from a server on this machine, well-behaved and not: the photos arrive whole, or a sentence says why not."
import gzip
import hashlib
import io
import socket
import stat
import subprocess
import sys
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from patience import communicate
from resnet_fastai.data import resolve_data
from resnet_fastai.engine.download import _download
from resnet_fastai.engine.files import DataError
from resnet_fastai.engine.layout import list_photos

files = {'set/train/a/1.jpg': b'1', 'set/val/2.jpg': b'22'}


def zipped(members=files, links=()):
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as z:
        for name, data in members.items(): z.writestr(name, data)
        for name, to in links:
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            z.writestr(info, to)
    return out.getvalue()


def tarred(members=files, links=(), devices=()):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w:gz') as t:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))
        for name, to in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, to
            t.addfile(info)
        for name, kind in devices:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, 'set/train/a/1.jpg'
            t.addfile(info)
    return out.getvalue()


@pytest.fixture(scope='module')
def server():
    "A server on loopback: put bytes (or bytes and a promised length) under a path, and count what was asked for"
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            httpd.asked.append(self.path)
            path = self.path.split('?')[0]
            if path not in httpd.content: return self.send_error(404)
            body, length = httpd.content[path]
            self.send_response(200)
            if length == 'chunked': self.send_header('Transfer-Encoding', 'chunked')
            elif length is not None: self.send_header('Content-Length', str(length))
            self.end_headers()
            if length == 'chunked': self.wfile.write(b'%x\r\n%s\r\n' % (2*len(body), body))      # promises twice as much, then hangs up
            else: self.wfile.write(body)
        def log_message(self, *_): pass
    httpd = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    httpd.content, httpd.asked = {}, []
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    def put(path, body, length='true'):
        httpd.content[path] = body, len(body) if length == 'true' else length
        return f'http://127.0.0.1:{httpd.server_port}{path}'
    put.asked = httpd.asked
    yield put
    httpd.shutdown()


@pytest.mark.parametrize('name,body', [('a.zip', zipped()), ('a.tar.gz', tarred()), ('a.tgz', tarred()), ('A.ZIP', zipped())])
def test_archives_arrive_whole_and_once(server, tmp_path, name, body):
    url = server(f'/{tmp_path.name}/{name}', body) + '?download=1'
    home = resolve_data(url, cache=tmp_path/'cache')
    assert {p.relative_to(home).as_posix(): p.read_bytes() for p in list_photos(home)} == {n.removeprefix('set/'): b for n, b in files.items()}
    asked = len(server.asked)
    assert resolve_data(url, cache=tmp_path/'cache') == home and len(server.asked) == asked


def bomb(n, suffix):
    "n gigabytes of zeros in a few megabytes or less"
    out, zeros = io.BytesIO(), bytes(1 << 20)
    if suffix == 'zip':
        with zipfile.ZipFile(out, 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as z:
            with z.open('set/train/big.jpg', 'w', force_zip64=True) as f:
                for _ in range(n << 10): f.write(zeros)
    else:
        class Zeros:
            def read(self, k): return bytes(k)
        with tarfile.open(fileobj=out, mode='w:gz', compresslevel=1) as t:
            info = tarfile.TarInfo('set/train/big.jpg')
            info.size = n << 30
            t.addfile(info, Zeros())
    return out.getvalue()


def long_name(n):
    "A tar.gz whose one member has a name of n characters, as GNU tar writes it"
    out = io.BytesIO()
    with gzip.open(out, 'wb', compresslevel=1) as f:
        head = tarfile.TarInfo('././@LongLink')
        head.type, head.size = tarfile.GNUTYPE_LONGNAME, n + 1
        f.write(head.tobuf(tarfile.GNU_FORMAT))
        for _ in range((n + 512)//(1 << 20)): f.write(b'a'*(1 << 20))
        f.write((b'a'*(n % (1 << 20)) + b'\0').ljust(-(-((n % (1 << 20)) + 1)//512)*512, b'\0'))
        f.write(tarfile.TarInfo('a').tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    return out.getvalue()


hostile = {
    'zip climbs': ('zip', zipped({'../evil.jpg': b'', **files}), "'../evil.jpg' climbs out"),
    'zip absolute': ('zip', zipped({'/evil.jpg': b'', **files}), "'/evil.jpg' climbs out"),
    'zip link': ('zip', zipped(links=[('set/train/l', '/etc')]), "'set/train/l' is a link or a device"),
    'tar climbs': ('tgz', tarred({'../evil.jpg': b'', **files}), "'../evil.jpg' climbs out"),
    'tar link': ('tgz', tarred(links=[('set/train/l', '../../../..')]), "'set/train/l' is a link"),
    'tar absolute': ('tgz', tarred({'/evil.jpg': b'', **files}), "'/evil.jpg' climbs out"),
    'tar absolute link': ('tgz', tarred(links=[('set/train/l', '/etc')]), "'set/train/l' is a link"),
    'tar hard link': ('tgz', tarred(devices=[('set/train/l', tarfile.LNKTYPE)]), "'set/train/l' is a link"),
    'tar device': ('tgz', tarred(devices=[('set/train/zero', tarfile.CHRTYPE)]), "'set/train/zero' is a link or a device"),
    'tar pipe': ('tgz', tarred(devices=[('set/train/pipe', tarfile.FIFOTYPE)]), "'set/train/pipe' is a link or a device"),
    'a page, not a zip': ('zip', b'\n<!DOCTYPE html><html>please log in</html>', 'gave a web page, not an archive'),
    'a page, not a tar': ('tar.gz', b'<html>not found</html>', 'gave a web page, not an archive'),
    'neither page nor zip': ('zip', b'{"error": 500}', 'is not a whole .zip archive'),
    'zip bomb': ('zip', lambda: bomb(2, 'zip'), 'unpacks to more than 1,073,741,824 bytes, 100 times its own size'),
    'tar bomb': ('tgz', lambda: bomb(2, 'tgz'), 'unpacks to more than 1,073,741,824 bytes, 100 times its own size'),
    'cut zip': ('zip', zipped()[:-30], 'is not a whole .zip archive'),
    'cut tar': ('tgz', tarred()[:-30], 'is not a whole .tgz archive'),
    'tar with a name of 8 MB': ('tgz', lambda: long_name(8 << 20), 'has a header of 8,389,'),
    'tar with a long name': ('tgz', lambda: long_name(9000), 'has a name of 9,000 characters'),
    'no train': ('zip', zipped({'set/photos/1.jpg': b'1'}), 'has no folder train/'),
}


@pytest.mark.parametrize('case', hostile)
def test_hostile_archives_leave_nothing(server, tmp_path, case):
    suffix, body, says = hostile[case]
    if callable(body): body = body()
    before = sorted(tmp_path.parent.iterdir())
    with pytest.raises(DataError) as e: resolve_data(server(f'/{tmp_path.name}/x.{suffix}', body), cache=tmp_path/'cache')
    assert says in str(e.value) and '\n' not in str(e.value)
    assert list((tmp_path/'cache').iterdir()) == [] and sorted(tmp_path.parent.iterdir()) == before


def test_backslashes_in_a_zip(server, tmp_path):
    "As .NET wrote them for years; a folder's entry ends in one"
    body = zipped({'set\\train\\': b'', 'set\\train\\a\\1.jpg': b'1', 'set\\val\\2.jpg': b'22'})
    home = resolve_data(server(f'/{tmp_path.name}/x.zip', body), cache=tmp_path/'cache')
    assert {p.relative_to(home).as_posix(): p.read_bytes() for p in list_photos(home)} == {'train/a/1.jpg': b'1', 'val/2.jpg': b'22'}
    with pytest.raises(DataError, match='climbs out'):
        resolve_data(server(f'/{tmp_path.name}/y.zip', zipped({'set\\train\\1.jpg': b'', '..\\..\\evil.jpg': b''})), cache=tmp_path/'cache')


def answering(reply):
    "The address of a server that sends these bytes to whoever asks, and then nothing more"
    listener = socket.create_server(('127.0.0.1', 0))
    kept = []
    def serve():
        while True:
            try: kept.append(listener.accept()[0])
            except OSError: return
            kept[-1].recv(4096)
            kept[-1].sendall(reply)
    threading.Thread(target=serve, daemon=True).start()
    return f'http://127.0.0.1:{listener.getsockname()[1]}', listener


@pytest.mark.parametrize('reply', [b'', b'HTTP/1.1 200 OK\r\nContent-Le', b'HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc'])
def test_a_server_that_stalls(reply):
    "before, within or after the headers"
    url, listener = answering(reply)
    with listener, pytest.raises(DataError, match=r'x.jpg has not come whole within 1 seconds'): _download(f'{url}/x.jpg', io.BytesIO(), 1 << 20, 1)


@pytest.mark.parametrize('to', ['ftp://127.0.0.1/x.zip', 'file:///etc/passwd'])
def test_redirects_that_leave_the_web(to, tmp_path):
    url, listener = answering(f'HTTP/1.1 302 Found\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n'.encode())
    with listener, pytest.raises(DataError, match='is not followed|cannot be fetched'): resolve_data(f'{url}/x.zip', cache=tmp_path)


def test_passwords_and_tokens_are_not_shown(tmp_path):
    from resnet_fastai.engine.photo import open_photo
    for start in ('http://ann:s3cret@127.0.0.1:1', 'ftp://ann:s3cret@127.0.0.1:1', 'http://s3cret@127.0.0.1:1'):
        for end in ('/a.zip?sig=t0ken&x=1', '/a.zip?t0ken#sha256=0', '/photos?t0ken'):
            for ask in (lambda u: resolve_data(u, cache=tmp_path), open_photo):
                with pytest.raises(DataError) as e: ask(start + end)
                assert 's3cret' not in str(e.value) and 't0ken' not in str(e.value) and '127.0.0.1' in str(e.value)


def test_a_cut_connection_is_not_taken_for_the_whole(server, tmp_path):
    url = server(f'/{tmp_path.name}/x.zip', zipped(), length=len(zipped()) + 100)
    with pytest.raises(DataError, match='broke off|cannot be fetched'): resolve_data(url, cache=tmp_path/'cache')
    server(f'/{tmp_path.name}/x.zip', zipped())
    assert len(list_photos(resolve_data(url, cache=tmp_path/'cache'))) == 2


def test_a_cut_chunked_answer_is_not_taken_for_the_whole(server, tmp_path):
    url = server(f'/{tmp_path.name}/x.tgz', tarred(), length='chunked')
    with pytest.raises(DataError, match='cannot be fetched'): resolve_data(url, cache=tmp_path/'cache')
    assert list((tmp_path/'cache').iterdir()) == []


def test_more_than_the_disk_has_left(server, tmp_path, monkeypatch):
    import shutil
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: shutil._ntuple_diskusage(100, 98, 2))
    with pytest.raises(DataError, match='more than the 2 bytes that the disk has left'):
        resolve_data(server(f'/{tmp_path.name}/x.zip', zipped()), cache=tmp_path/'cache')


def test_empty_files_take_room_too(server, tmp_path, monkeypatch):
    import shutil
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: shutil._ntuple_diskusage(8 << 20, 4 << 20, 4 << 20))
    body = zipped({f'train/{i}.jpg': b'' for i in range(2000)})
    with pytest.raises(DataError, match='that the disk has left'): resolve_data(server(f'/{tmp_path.name}/x.zip', body), cache=tmp_path/'cache')
    assert list((tmp_path/'cache').iterdir()) == []


def test_sha256_behind_the_url(server, tmp_path):
    body = zipped()
    url, right = server(f'/{tmp_path.name}/x.zip', body), hashlib.sha256(body).hexdigest()
    with pytest.raises(DataError, match=f'has the SHA-256 sum {right}, not {"0"*64}'): resolve_data(f'{url}#sha256={"0"*64}', cache=tmp_path/'cache')
    assert list((tmp_path/'cache').iterdir()) == []
    assert len(list_photos(resolve_data(f'{url}#sha256={right.upper()}', cache=tmp_path/'cache'))) == 2


def test_two_processes_fetch_at_once(server, tmp_path):
    "Both end well, with the same photos in the same place, and nothing is left beside them"
    url = server(f'/{tmp_path.name}/x.zip', zipped({f'set/train/{i}.jpg': bytes([i % 256])*1000 for i in range(500)}))
    code = 'import sys; from resnet_fastai.data import resolve_data; input(); print(resolve_data(*sys.argv[1:]))'
    both = [subprocess.Popen([sys.executable, '-c', code, url, str(tmp_path/'cache')], stdin=-1, stdout=-1, stderr=-1, text=True) for _ in range(2)]
    for p in both:                                                               # both have imported; now go
        p.stdin.write('\n'); p.stdin.flush()
    said = [communicate(p) for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    homes = {out.strip().splitlines()[-1] for out, _ in said}
    assert len(homes) == 1 and len(list_photos(homes.pop())) == 500 and len(list((tmp_path/'cache').iterdir())) == 1


@pytest.mark.parametrize('url,says', [('http://127.0.0.1:1/x.zip', 'cannot be fetched'), ('gopher://127.0.0.1/x.zip', 'starts with neither'),
                                      ('http://127.0.0.1/photos', 'does not name an archive'), ('file:///nowhere/x.zip', 'cannot be fetched')])
def test_urls_that_lead_nowhere(tmp_path, url, says):
    with pytest.raises(DataError, match=says): resolve_data(url, cache=tmp_path/'cache')


def test_missing_on_the_server(server, tmp_path):
    url = server('/here', b'').replace('/here', '/gone.zip')
    with pytest.raises(DataError, match='cannot be fetched: Not Found'): resolve_data(url, cache=tmp_path/'cache')
