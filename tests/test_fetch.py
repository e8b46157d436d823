"Archives from a server on this machine, well-behaved and not: the photos arrive whole, or a sentence says why not."
import io
import stat
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from resnet_fastai.data import DataError, list_photos, resolve_data

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


def tarred(members=files, links=()):
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
            self.send_header('Content-Length', str(length))
            self.end_headers()
            self.wfile.write(body)
        def log_message(self, *_): pass
    httpd = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    httpd.content, httpd.asked = {}, []
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    def put(path, body, length=None):
        httpd.content[path] = body, len(body) if length is None else length
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


hostile = {
    'zip climbs': ('zip', zipped({'../evil.jpg': b'', **files}), "'../evil.jpg' climbs out"),
    'zip absolute': ('zip', zipped({'/evil.jpg': b'', **files}), "'/evil.jpg' climbs out"),
    'zip link': ('zip', zipped(links=[('set/train/l', '/etc')]), "'set/train/l' is a link or a device"),
    'tar climbs': ('tgz', tarred({'../evil.jpg': b'', **files}), "'../evil.jpg' climbs out"),
    'tar link': ('tgz', tarred(links=[('set/train/l', '../../../..')]), "'set/train/l' is a link"),
    'tar absolute': ('tgz', tarred({'/evil.jpg': b'', **files}), "'/evil.jpg' climbs out"),
    'tar absolute link': ('tgz', tarred(links=[('set/train/l', '/etc')]), "'set/train/l' is a link"),
    'a page, not a zip': ('zip', b'<html>not found</html>', 'is not a whole .zip archive'),
    'a page, not a tar': ('tar.gz', b'<html>not found</html>', 'is not a whole .tar.gz archive'),
    'cut zip': ('zip', zipped()[:-30], 'is not a whole .zip archive'),
    'cut tar': ('tgz', tarred()[:-30], 'is not a whole .tgz archive'),
    'no train': ('zip', zipped({'set/photos/1.jpg': b'1'}), 'has no folder train/'),
}


@pytest.mark.parametrize('case', hostile)
def test_hostile_archives_leave_nothing(server, tmp_path, case):
    suffix, body, says = hostile[case]
    before = sorted(tmp_path.parent.iterdir())
    with pytest.raises(DataError) as e: resolve_data(server(f'/{tmp_path.name}/x.{suffix}', body), cache=tmp_path/'cache')
    assert says in str(e.value) and '\n' not in str(e.value)
    assert list((tmp_path/'cache').iterdir()) == [] and sorted(tmp_path.parent.iterdir()) == before


def test_a_cut_connection_is_not_taken_for_the_whole(server, tmp_path):
    url = server(f'/{tmp_path.name}/x.zip', zipped(), length=len(zipped()) + 100)
    with pytest.raises(DataError, match='broke off|cannot be fetched'): resolve_data(url, cache=tmp_path/'cache')
    server(f'/{tmp_path.name}/x.zip', zipped())
    assert len(list_photos(resolve_data(url, cache=tmp_path/'cache'))) == 2


@pytest.mark.parametrize('url,says', [('http://127.0.0.1:1/x.zip', 'cannot be fetched'), ('gopher://127.0.0.1/x.zip', 'starts with neither'),
                                      ('http://127.0.0.1/photos', 'does not name an archive'), ('file:///nowhere/x.zip', 'cannot be fetched')])
def test_urls_that_lead_nowhere(tmp_path, url, says):
    with pytest.raises(DataError, match=says): resolve_data(url, cache=tmp_path/'cache')


def test_missing_on_the_server(server, tmp_path):
    url = server('/here', b'').replace('/here', '/gone.zip')
    with pytest.raises(DataError, match='cannot be fetched: Not Found'): resolve_data(url, cache=tmp_path/'cache')
