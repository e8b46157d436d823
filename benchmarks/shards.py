"""The same photos from files, from shards, and from shards on a server that answers 20 ms late.

Photos a second: whole epochs of augmented 224×224 batches with two worker processes, taking turns; the server is a process of this machine and
takes its share of the cores. `one at a time` is HTTP without fetching ahead. First batch: from `resnet_dls(...)` on, in a fresh process, on many
tiny files (hard links, as in startup.py), their shards, and these on the server, whose index is fetched too; the colour statistics are given.
Index: that of ImageNet's 1,281,167 training photos (its names; no photos), opened in a fresh process: seconds, and megabytes with every page
of it touched."""
import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)      # not this folder: its `statistics` is not Python's
import json
import os
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from benchmarks.common import alternate, arguments, compare, photos, write
from benchmarks.startup import memory, tree

latency = .02


@contextmanager
def server(folder):
    "The address of a server of a folder"
    command = [sys.executable, pathlib.Path(sys.path[0])/'tests'/'range_server.py', folder, str(latency)]
    with subprocess.Popen([str(c) for c in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as p:
        try: yield p.stdout.readline().strip()
        finally: p.stdin.close()


def child(*args):
    out = subprocess.run([sys.executable, __file__, *map(str, args)], capture_output=True, text=True)
    if out.returncode: raise SystemExit(out.stderr[-2000:])
    return json.loads(out.stdout.strip().splitlines()[-1])


def loaders(data_path, labels, encoding, **kw):
    import numpy as np
    from resnet_fastai.augment import ColorStats
    from resnet_fastai.data import resnet_dls
    return resnet_dls(data_path, labels, encoding, stats=ColorStats([.48, .46, .41], [.2, .02, .004], np.eye(3)), device='cpu', num_workers=2, **kw)


# ── Photos a second ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def a_set(root, paths, n):
    "n training photos, copies of a few, and the two label files"
    for split in ('train', 'val'): (root/split).mkdir(parents=True)
    for i in range(n): shutil.copy(paths[i % len(paths)], root/'train'/f'{i:05}.jpg')
    for i, p in enumerate(paths): shutil.copy(p, root/'val'/f'v{i:05}.jpg')
    names = [p.stem for p in sorted(root.rglob('*.jpg'))]
    (root/'labels.json').write_text(json.dumps({name: str(i % 10) for i, name in enumerate(names)}))
    (root/'encoding.json').write_text(json.dumps({str(i): i for i in range(10)}))


def epoch(dls, ahead=True):
    from resnet_fastai.engine.layout import PhotoList, ShardList
    kept = ShardList.read_ahead
    def run():
        if not ahead: ShardList.read_ahead = PhotoList.read_ahead
        try: return sum(len(y) for _, y in dls.train)
        finally: ShardList.read_ahead = kept
    return run


def rates(root, args):
    from resnet_fastai.practice.shards import pack_photos
    paths, what = photos(args.photos)
    a_set(root/'photos', paths, args.n)
    start = time.perf_counter()
    pack_photos(root/'photos', root/'shards', num_workers=2)
    packing = (args.n + len(paths))/(time.perf_counter() - start)
    labels = root/'photos'/'labels.json', root/'photos'/'encoding.json'
    with server(root/'shards') as url:
        at = {'files': root/'photos', 'shards': root/'shards', 'shards over HTTP': url}
        contestants = {name: epoch(loaders(where, *labels)) for name, where in at.items()}
        contestants['shards over HTTP, one at a time'] = epoch(loaders(url, *labels), ahead=False)
        print(f'{args.n} photos ({what}), packed at {packing:.0f} photos/s; {1000*latency:.0f} ms')
        found = compare(alternate(contestants, args.rounds), 'shards', args.n, {'files': .95})
    return dict(found, photos=what, packing=packing, latency=latency)


# ── The first batch ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def first_batch(data_path, labels, encoding):
    import resnet_fastai.data  # noqa: F401
    start = time.perf_counter()
    next(iter(loaders(data_path, labels, encoding, size=32).train))
    print(json.dumps(time.perf_counter() - start))


def firsts(root, args):
    from resnet_fastai.practice.shards import pack_photos
    root.mkdir()
    tree(root, args.files, args.files//25)
    pack_photos(root/'data', root/'shards')
    os.environ['FASTAI_HOME'] = str(root/'home')
    with server(root/'shards') as url:
        at = {'files': root/'data', 'shards': root/'shards', 'shards over HTTP': url, 'shards over HTTP, again': url}
        found = {name: child('--child', 'first', '--at', where, '--labels', root/'labels.json', '--encoding', root/'encoding.json') for name, where in at.items()}
    for name, seconds in found.items(): print(f'  first batch of {args.files:,} files, {name:<24} {seconds:6.2f} s')
    return dict(files=args.files + args.files//25, seconds=found)


# ── The index ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def open_index(folder):
    from resnet_fastai.engine.layout import split_photos
    before, start = memory('self'), time.perf_counter()
    photos = split_photos(folder, ('train',))['train']
    seconds = time.perf_counter() - start
    photos[len(photos)//2]
    own = memory('self')['own'] - before['own']
    shards = photos.shards
    int(shards.columns.sum(dtype='u8')), shards.texts.view('u1').max()                            # every page
    print(json.dumps(dict(photos=len(photos), seconds=seconds, own_mb=own, all_mb=memory('self')['all'] - before['all'])))


def index(root, args):
    import numpy as np
    from resnet_fastai.engine.shards import write_index
    n = args.index
    names = sorted(f'train/n{1_440_764 + 8_000*(i % 1000):08}/n{1_440_764 + 8_000*(i % 1000):08}_{i//13}.JPEG'.encode() for i in range(n))
    root.mkdir()
    write_index(root, [[f'train-{k:06}.tar', 512*220*(n//600 + 1), '0'*64] for k in range(600)], names, np.stack([np.arange(n)*220, np.full(n, 110_000), np.arange(n)]), {})
    found = child('--child', 'index', '--at', root)
    for what, value, bar in ('seconds to open', found['seconds'], 2), ('MB, every page touched', found['all_mb'], 60):
        print(f'  index of {n:,} photos, {what}: {value:.2f}, bar {bar}: {"reached" if value <= bar else "NOT reached"}')
    return found | dict(file_mb=(root/'shards.index').stat().st_size/1e6)


def main():
    args = arguments(__doc__, n=(590, 'training photos for the rates'), files=(100_000, 'tiny training files for the first batch'), index=(1_281_167, 'photos in the index'),
                     child=('', ''), at=('', ''), labels=('', ''), encoding=('', ''))
    if args.child: return first_batch(args.at, args.labels, args.encoding) if args.child == 'first' else open_index(args.at)
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(tmp)
        os.environ['FASTAI_HOME'] = str(root/'home')
        write(args, index=index(root/'index', args), first=firsts(root/'first', args), epoch=rates(root/'rates', args))


if __name__ == '__main__': main()
