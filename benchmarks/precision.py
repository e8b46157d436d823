"""Does 16 bits cost accuracy? The demo's ResNet-50 is trained in 32 bits and in bf16 from the same seeds; what counts is the validation loss."""
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)      # not this folder: its `statistics` is not Python's
import tempfile

from benchmarks.common import arguments, write

from resnet_fastai.cli import demo_args
from resnet_fastai.core import ResNet
from resnet_fastai.data import demo_data


def main():
    args = arguments(__doc__, epochs=(6, 'passes over the photos'), seeds=(2, 'seeds'))
    paths, runs = demo_data(Path(tempfile.mkdtemp())/'photos'), []
    for seed in range(args.seeds):
        for precision in ('fp32', 'bf16'):
            model = ResNet(*paths, **demo_args, precision=precision, seed=seed)
            with model.learn.no_bar(), model.learn.no_logging(): history = model.fit(args.epochs)
            runs.append(dict(seed=seed, precision=precision, history=history.to_dict('list')))
            print(f'{precision}, seed {seed}: best validation loss {history.valid_loss.min():.4f}, '
                  f'top-1 error {history.top1_error.min():.1%}, {history.seconds.mean():.1f} s an epoch', flush=True)
    best = {p: sum(min(r['history']['valid_loss']) for r in runs if r['precision'] == p)/args.seeds for p in ('fp32', 'bf16')}
    print(f"mean of the best losses: fp32 {best['fp32']:.4f}, bf16 {best['bf16']:.4f}")
    write(args, best_valid_loss=best, runs=runs)


if __name__ == '__main__': main()
