"""From `resnet_dls(...)` to the first batch on as many files as ImageNet has, and what a worker's memory does in a long epoch.

1,281,167 training and 50,000 validation files in 1000 folders each, hard links to a few tiny photos, with label files of ImageNet's size. Ours
is timed in a fresh process, with the colour statistics given (they are computed once and kept); then 2000 batches are drawn with two
workers, and the memory of each is read after the first 100 and at the end: all that it sees (RSS), and its own, not shared with its parent
(USS). Growth is that of the larger of the two, in percent of what it saw. fastai's stock `DataBlock`, with a dictionary for the labels,
does the same beside it."""
import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)      # not this folder: its `statistics` is not Python's
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks.common import arguments, write


def tree(root, n_train, n_val, classes=1000):
    "The files and the two JSON files"
    import numpy as np
    from resnet_fastai.engine.demo_photos import draw_photo
    few = [root/f'{i}.jpg' for i in range(8)]
    for i, p in enumerate(few): draw_photo('dots', np.random.default_rng(i)).resize((48, 40)).save(p, quality=80)
    labels, wnids = {}, [f'n{1_000_000 + 7919*c:08}' for c in range(classes)]
    # a file system allows so many links to one file (65,000 on ext4): a new copy now and then
    source, links = None, 0
    for split, n in ('train', n_train), ('val', n_val):
        for w in wnids: (root/'data'/split/w).mkdir(parents=True)
        for i in range(n):
            if source is None or links >= 60_000: source, links = root/f'copy{i}-{split}.jpg', 0; shutil.copy(few[i % 8], source)
            links += 1
            w = wnids[i % classes]
            name = f'{w}_{i}' if split == 'train' else f'ILSVRC2012_val_{i+1:08}'
            os.link(source, f'{root}/data/{split}/{w}/{name}.JPEG')
            labels[name] = f'label {w}'
    (root/'labels.json').write_text(json.dumps(labels))
    (root/'encoding.json').write_text(json.dumps({f'label {w}': i for i, w in enumerate(wnids)}))


def memory(pid):
    "Megabytes of a process: all that it sees (RSS), and what is its own and not shared with its parent (USS)"
    kb = {line.split(':')[0]: int(line.split()[1]) for line in Path(f'/proc/{pid}/smaps_rollup').read_text().splitlines()[1:]}
    return dict(all=kb['Rss']/1024, own=(kb['Private_Clean'] + kb['Private_Dirty'])/1024)


def ours(root, **kwargs):
    import numpy as np
    from resnet_fastai.augment import ColorStats
    from resnet_fastai.data import resnet_dls
    stats = ColorStats([.48, .46, .41], [.2, .02, .004], np.eye(3))
    return lambda: resnet_dls(root/'data', root/'labels.json', root/'encoding.json', stats=stats, size=32, device='cpu', **kwargs)


def stock(root, **kwargs):
    from fastai.vision.all import CategoryBlock, DataBlock, GrandparentSplitter, ImageBlock, RandomResizedCrop, get_image_files
    def make():
        labels, vocab = json.loads((root/'labels.json').read_text()), list(json.loads((root/'encoding.json').read_text()))
        block = DataBlock(blocks=(ImageBlock, CategoryBlock(vocab, sort=False)), get_items=get_image_files, get_y=lambda p: labels[p.stem],
                          splitter=lambda items: ([i for i, p in enumerate(items) if p.parts[-3] == 'train'], [i for i, p in enumerate(items) if p.parts[-3] == 'val']),
                          item_tfms=RandomResizedCrop(32))
        return block.dataloaders(root/'data', bs=32, device='cpu', **kwargs)
    return make


def child(who, root, batches):
    "In a fresh process: seconds to the first batch, memory, and the workers' memory over an epoch"
    import multiprocessing as mp
    make = dict(ours=ours, stock=stock)[who](root, num_workers=2)
    start = time.perf_counter()
    dls = make()
    ready = time.perf_counter() - start
    it = iter(dls.train)
    next(it)
    first = time.perf_counter() - start
    peak = next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM'))/1024
    pids = [p.pid for p in mp.active_children()]
    for _ in range(100): next(it)
    early = [memory(p) for p in pids]
    for _ in range(batches-101): next(it)
    late = [memory(p) for p in pids]
    print(json.dumps(dict(seconds_to_loaders=ready, seconds_to_first_batch=first, peak_mb=peak, worker_mb_early=early, worker_mb_late=late,
                          growth_percent=max(100*max(b['all']-a['all'], b['own']-a['own'])/a['all'] for a, b in zip(early, late)))))


def main():
    args = arguments(__doc__, train=(1_281_167, 'training files'), val=(50_000, 'validation files'), batches=(2000, 'batches of 32'), child=('', ''), root=('', ''))
    if args.child: return child(args.child, Path(args.root), args.batches)
    root = Path(tempfile.mkdtemp())
    try:
        start = time.perf_counter()
        tree(root, args.train, args.val)
        print(f'{args.train:,} + {args.val:,} files made in {time.perf_counter()-start:.0f} s')
        figures = {}
        for who in 'ours', 'stock':
            out = subprocess.run([sys.executable, __file__, '--child', who, '--root', str(root), '--batches', str(args.batches)], capture_output=True, text=True)
            if out.returncode: print(f'{who}: failed\n{out.stderr[-1500:]}'); continue
            f = figures[who] = json.loads(out.stdout.strip().splitlines()[-1])
            print(f"  {who:<6} first batch after {f['seconds_to_first_batch']:6.1f} s, memory at most {f['peak_mb']:6.0f} MB; a worker "
                  + ', '.join(f"{k} {max(w[k] for w in f['worker_mb_early']):.0f} → {max(w[k] for w in f['worker_mb_late']):.0f} MB" for k in ('all', 'own'))
                  + f" ({f['growth_percent']:+.1f} %)")
        f = figures['ours']
        for what, value, bar in ('seconds to the first batch', f['seconds_to_first_batch'], 20), ('memory, MB', f['peak_mb'], 1500), ('growth of a worker, %', f['growth_percent'], 5):
            print(f'  {what}: {value:.1f}, bar {bar}: {"reached" if value <= bar else "NOT reached"}')
        write(args, files=args.train + args.val, **figures)
    finally: shutil.rmtree(root, ignore_errors=True)


if __name__ == '__main__': main()
