"""What the benchmarks share: photos, fair turns, and a report that can be read and one that can be parsed.

Contestants take turns within each round, in an order that rotates, so that a machine that slows down slows all of them. A ratio is
taken within a round; what is printed is the median of the rounds' ratios, with the smallest and the largest."""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from pathlib import Path

root = Path(__file__).resolve().parent.parent
warnings.filterwarnings('ignore')
os.environ['PYTHONWARNINGS'] = 'ignore'


def arguments(doc, **more):
    "The options that every benchmark has; `more`: name=(default, help)"
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--photos', type=Path, help='a folder of photos; default: the real ones of ../shared/data, or drawn ones')
    p.add_argument('--rounds', type=int, default=7)
    p.add_argument('--json', type=Path, help='where the figures go; default: runs/bench/NAME.json')
    for name, (default, text) in more.items(): p.add_argument(f'--{name.replace("_", "-")}', type=type(default), default=default, help=text)
    args = p.parse_args()
    args.json = args.json or root/'runs'/'bench'/f'{Path(sys.argv[0]).stem}.json'
    if args.rounds < 5: p.error('fewer than 5 rounds say little')
    return args


def photos(folder=None):
    "Paths of JPEG photos about as large as ImageNet's, and what they are"
    from resnet_fastai.engine.demo_photos import draw_photo
    from resnet_fastai.engine.layout import list_photos
    if folder: return [p for p in list_photos(folder) if p.suffix.lower() in ('.jpg', '.jpeg')], str(folder)
    tmp, real = Path(tempfile.mkdtemp()), root.parent/'shared'/'data'/'photos.tar'
    if real.exists():
        with tarfile.open(real) as t: t.extractall(tmp, **({'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}))
        return list_photos(tmp), 'ImageNet samples'
    import numpy as np
    for i in range(60): draw_photo('zigzag', np.random.default_rng(i)).resize((500, 375)).save(tmp/f'{i}.jpg', quality=90)
    return list_photos(tmp), 'drawn, 500×375'


def alternate(contestants, rounds, clock=time.perf_counter):
    "{name: seconds of each round}; every contestant runs once before the clock starts"
    seconds = {name: [] for name in contestants}
    for f in contestants.values(): f()
    for r in range(rounds):
        names = list(contestants)
        for name in names[r % len(names):] + names[:r % len(names)]:
            start = clock()
            contestants[name]()
            seconds[name].append(clock() - start)
    return seconds


def compare(seconds, ours, items, bars=None, unit='photos/s'):
    "Print rates and ratios; returns them"
    rates = {name: items/statistics.median(s) for name, s in seconds.items()}
    result = dict(items=items, unit=unit, seconds=seconds, rates=rates, ratios={})
    for name, rate in rates.items(): print(f'  {name:<42} {rate:10,.1f} {unit}')
    for name in seconds:
        if name == ours: continue
        each = [theirs/mine for theirs, mine in zip(seconds[name], seconds[ours])]
        bar = (bars or {}).get(name)
        result['ratios'][name] = dict(median=statistics.median(each), least=min(each), most=max(each), bar=bar)
        verdict = '' if bar is None else f'   bar {bar:g}: {"reached" if statistics.median(each) >= bar else "NOT reached"}'
        print(f'  ours / {name:<35} {statistics.median(each):6.2f}× ({min(each):.2f} to {max(each):.2f}){verdict}')
    return result


def machine():
    import torch
    import torchvision
    cpu = next((line.split(':')[1].strip() for line in open('/proc/cpuinfo') if line.startswith('model name')), platform.processor()) \
        if Path('/proc/cpuinfo').exists() else platform.processor()
    commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=root, capture_output=True, text=True).stdout.strip()
    return dict(cpu=cpu, cores=os.cpu_count(), python=platform.python_version(), torch=torch.__version__, torchvision=torchvision.__version__,
                gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None, commit=commit)


def write(args, **figures):
    args.json.parent.mkdir(parents=True, exist_ok=True)
    command = ' '.join(['python', os.path.relpath(Path(sys.argv[0]).resolve(), root), *sys.argv[1:]])
    args.json.write_text(json.dumps(dict(command=command, machine=machine(), **figures), indent=1, ensure_ascii=False))
    print(f'figures: {os.path.relpath(args.json)}')
