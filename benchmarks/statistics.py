"""`ColorStats.fit` with two workers against decoding everything and `numpy.cov`: seconds, memory and agreement.

The peer decodes with Pillow, keeps all pixels as 64-bit fractions and calls `numpy.cov` once. Memory is the highest resident set of a fresh
process, less what the imports take; with twice the photos ours should need no more."""
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)      # not this folder: its `statistics` is not Python's
import os
import subprocess
import tempfile

from benchmarks.common import alternate, arguments, compare, photos, write

import numpy as np
from PIL import Image

from resnet_fastai.augment import ColorStats


def plain(paths):
    pixels = np.concatenate([np.asarray(Image.open(p).convert('RGB')).reshape(-1, 3)/255 for p in paths])
    return pixels.mean(0), np.cov(pixels.T)


def angles(a, b): return np.degrees(np.arccos(np.clip(abs((a*b).sum(0)), 0, 1)))


child = """
import sys
sys.path.insert(0, {root!r})
from benchmarks.statistics import ColorStats, plain
def peak(): return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM'))/1024
paths, before = sys.argv[2:], peak()
ColorStats.fit(paths, num_workers=2) if sys.argv[1] == 'ours' else plain(paths)
print(peak() - before)
"""


def megabytes(who, paths):
    out = subprocess.run([sys.executable, '-c', child.format(root=sys.path[0]), who, *map(str, paths)], capture_output=True, text=True, check=True)
    return round(float(out.stdout.strip().split()[-1]))


def main():
    args = arguments(__doc__, times=(4, 'how often each photo counts'))
    paths, what = photos(args.photos)
    tmp = Path(tempfile.mkdtemp())
    for k in range(args.times):
        for p in paths: os.symlink(p.resolve(), tmp/f'{k}{p.name}')
    many = sorted(tmp.iterdir())
    seconds = alternate({'decode all, numpy.cov': lambda: plain(many), 'ours': lambda: ColorStats.fit(many, num_workers=2)}, args.rounds)
    speed = compare(seconds, 'ours', len(many), {'decode all, numpy.cov': 3})
    mean, cov = plain(paths)
    val, vec = np.linalg.eigh(cov)
    ours = ColorStats.fit(paths, num_workers=2)
    agreement = dict(mean=abs(ours.mean - mean).max(), eigval_percent=(100*abs(ours.eigval/val[::-1] - 1)).max(),
                     eigvec_degrees=angles(ours.eigvec, vec[:, ::-1]).max())
    print('  largest deviation: mean {mean:.1e}, eigenvalues {eigval_percent:.1e} %, eigenvectors {eigvec_degrees:.1e}°'.format(**agreement))
    memory = {f'{who}, {n} photos': megabytes(who, many[:n]) for who in ('plain', 'ours') for n in (len(paths), len(many))}
    for k, v in memory.items(): print(f'  memory, {k:<30} {v:6} MB')
    write(args, photos=what, speed=speed, agreement=agreement, memory_mb=memory)


if __name__ == '__main__': main()
