"""A small HTTP server for tests and benchmarks: it answers range requests, late if asked to, and fails as told.

    python tests/range_server.py FOLDER LATENCY

serves FOLDER on a free port of this machine, LATENCY seconds late, prints its address, and ends when its standard input does."""
import re
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path



class RangeServer(ThreadingHTTPServer):
    "Serves a folder; `plan(name, how often this part was asked for, number of the request)` names one of the faults below, or None"
    daemon_threads, request_queue_size = True, 128
    def __init__(self, folder, latency=0, plan=lambda name, n, k: None):
        super().__init__(('127.0.0.1', 0), Handler)
        self.folder, self.latency, self.plan, self.asked, self.lock = Path(folder), latency, plan, [], threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self): return f'http://127.0.0.1:{self.server_port}/'
    def handle_error(self, request, client_address): pass             # somebody hung up
    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


def part_of(path, start, size):
    with open(path, 'rb') as f:
        f.seek(start)
        return f.read(size)


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True
    def log_message(self, *_): pass

    def do_GET(self):
        name = self.path.split('?')[0].lstrip('/')
        with self.server.lock:
            self.server.asked.append(part := (name, self.headers.get('Range')))
            fault = self.server.plan(name, self.server.asked.count(part), len(self.server.asked))
        if self.server.latency: time.sleep(self.server.latency)
        if fault == 'hold': self.server.hold()
        path = self.server.folder/name.removeprefix('moved/')
        if fault == 'moved': return self.answer(302, b'', Location=f'/moved/{name}')
        if fault == 'busy': return self.answer(503, b'busy')
        if fault == 'gone' or not path.is_file(): return self.answer(404, b'no such file')
        if fault == 'reset':
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        asked = re.fullmatch(r'bytes=(\d+)-(\d+)', self.headers.get('Range', ''))
        if not asked or fault == 'whole': return self.answer(200, path.read_bytes())
        a, b, size = int(asked[1]), int(asked[2]), path.stat().st_size
        data = part_of(path, a, b + 1 - a)
        if fault == 'changed': data = bytes([data[0] ^ 1]) + data[1:]
        if fault == 'elsewhere': a, b = a + 1, b + 1
        self.answer(206, data, cut=fault == 'short', **{'Content-Range': f'bytes {a}-{b}/{size + (fault == "longer")}'})

    def answer(self, status, data, cut=False, **headers):
        self.send_response(status)
        for k, v in headers.items(): self.send_header(k, v)
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        self.wfile.write(data[:len(data)//2] if cut else data)
        if cut: self.close_connection = True


if __name__ == '__main__':
    with RangeServer(sys.argv[1], float(sys.argv[2])) as server:
        print(server.url, flush=True)
        sys.stdin.read()
