"""Does 16 bits cost accuracy? A ResNet-18 is trained on drawn photos in 32 bits and in bf16, from the same seeds; what counts is the loss
on 800 validation photos, and whether the difference exceeds what another seed makes."""
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)      # not this folder: its `statistics` is not Python's
import statistics
import tempfile

from benchmarks.common import arguments, write

from resnet_fastai.practice.cli import demo_args
from resnet_fastai.core import ResNet
from resnet_fastai.data import demo_data


def main():
    args = arguments(__doc__, epochs=(6, 'passes over the photos'), seeds=(5, 'seeds'))
    paths, runs = demo_data(Path(tempfile.mkdtemp())/'photos', sizes=dict(train=720, val=800, test=8)), []
    for seed in range(args.seeds):
        for precision in ('fp32', 'bf16'):
            model = ResNet(*paths, **demo_args | dict(arch='resnet18'), precision=precision, seed=seed)
            with model.learn.no_bar(), model.learn.no_logging(): history = model.fit(args.epochs)
            runs.append(dict(seed=seed, precision=precision, history=history.to_dict('list')))
            print(f'{precision}, seed {seed}: best validation loss {history.valid_loss.min():.4f}, '
                  f'top-1 error {history.top1_error.min():.1%}, {history.seconds.mean():.1f} s an epoch', flush=True)
    best = {p: [min(r['history']['valid_loss']) for r in runs if r['precision'] == p] for p in ('fp32', 'bf16')}
    apart = [b - a for a, b in zip(*best.values())]
    mean, error = statistics.mean(apart), statistics.stdev(apart)/len(apart)**.5 if len(apart) > 1 else float('nan')
    print(f'bf16 − fp32, best validation loss: {mean:+.4f} ± {error:.4f} (standard error over {args.seeds} seeds)')
    write(args, best_valid_loss=best, difference=dict(mean=mean, standard_error=error), runs=runs)


if __name__ == '__main__': main()
