"""Colour statistics of folders of photos: mean, principal axes and the variances along them, in nbs/experiments/results/colours.json.

    python nbs/experiments/colours.py photos clothing"""
import argparse
import sys
import time
from pathlib import Path

from cifar10 import commit, machine
from resnet_fastai.augment import ColorStats
from resnet_fastai.engine.files import DataError, write_json
from resnet_fastai.engine.layout import list_photos


def measure(folders, out):
    "Write the statistics of all folders to one JSON file"
    sets, start = {}, time.perf_counter()
    for folder in folders:
        if not (photos := list_photos(folder)): raise DataError(f'{folder} holds no photos')
        stats = ColorStats.fit(photos)
        sets[Path(folder).name] = dict(photos=stats.n_photos, mean=stats.mean.tolist(), eigval=stats.eigval.tolist(),
                                       eigvec=stats.eigvec.tolist())
        print(f'{Path(folder).name}: {stats}')
    write_json(out, dict(command='python nbs/experiments/colours.py ' + ' '.join(sets), commit=commit(__file__), machine=machine(),
                         seconds=round(time.perf_counter() - start, 1), sets=sets))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folders', nargs='+', type=Path, help='folders of photos, searched with all their subfolders')
    p.add_argument('--out', type=Path, default=Path(__file__).parent/'results'/'colours.json')
    args = p.parse_args(argv)
    try: measure(args.folders, args.out)
    except DataError as e: sys.exit(f'{type(e).__name__}: {e}')


if __name__ == '__main__': main()
