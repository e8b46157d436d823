"""`resnet-fastai predict MODEL photo.jpg` and `resnet-fastai --help`, each in a fresh process, from the call to the end.

The peer is the same prediction in Python: in a fresh process the import of what it needs is timed, then, imported, loading the model and
asking for the photo's label, twice. The bar is for import + first prediction; to that, the command adds an interpreter to start and to end,
and words to read. The second prediction is given beside it. A ResNet-50 at 224 pixels and 50 crops."""
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)      # not this folder: its `statistics` is not Python's
import json
import shutil
import statistics
import subprocess
import tempfile
import time

from benchmarks.common import arguments, photos, write

command = 'from resnet_fastai.practice.cli import main; main()'
peer = '''
import json, sys, time
t = [time.perf_counter()]
from resnet_fastai.core import ResNet
t.append(time.perf_counter())
for _ in range(2): said = ResNet.load(sys.argv[1]).predict_n(sys.argv[2], 1); t.append(time.perf_counter())
print(json.dumps(dict(label=said[0][0], seconds=[b - a for a, b in zip(t, t[1:])])))'''


def saved_model(folder):
    "A ResNet-50 that has seen a few drawn photos"
    from resnet_fastai.core import ResNet
    from resnet_fastai.data import demo_data
    model = ResNet(*demo_data(folder/'photos', sizes=dict(train=8, val=4, test=1)), bs=8, num_workers=0)
    with model.learn.no_bar(), model.learn.no_logging(): model.fit(1)
    return model.save(folder/'model')


def run(code, *args):
    "(seconds, stdout) of a fresh Python"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, '-c', code, *map(str, args)], capture_output=True, text=True, check=True)
    return time.perf_counter() - start, done.stdout


def main():
    args = arguments(__doc__)
    folder = Path(tempfile.mkdtemp())
    try:
        model, photo, rounds = saved_model(folder), photos(args.photos)[0][0], []
        ask = {'predict': lambda: run(command, 'predict', model, photo), 'peer': lambda: run(peer, model, photo), 'help': lambda: run(command, '--help')}
        for f in ask.values(): f()                              # the first time reads the libraries from the disk
        for r in range(args.rounds):
            names = [*ask][r % 3:] + [*ask][:r % 3]
            got = {name: ask[name]() for name in names}
            said = json.loads(got['peer'][1])
            assert said['label'] in got['predict'][1] and got['predict'][1].count('\n') == 1
            rounds.append(dict(predict=got['predict'][0], help=got['help'][0], **dict(zip(('importing', 'first', 'warm'), said['seconds']))))
    finally: shutil.rmtree(folder, ignore_errors=True)
    middle = {k: statistics.median(r[k] for r in rounds) for k in rounds[0]}
    ratios = {k: [r['predict']/(r['importing'] + r[k]) for r in rounds] for k in ('first', 'warm')}
    for k, v in middle.items(): print(f'  {k:<10} {v:6.2f} s')
    for k, v in ratios.items():
        bar = f', bar 1.5: {"reached" if statistics.median(v) < 1.5 else "NOT reached"}' if k == 'first' else ''
        print(f'  predict / (import + {k} prediction) {statistics.median(v):.2f}× ({min(v):.2f} to {max(v):.2f}){bar}')
    print(f'  --help, bar 0.5 s: {"reached" if middle["help"] < .5 else "NOT reached"}')
    write(args, seconds=rounds, medians=middle, ratios={k: dict(median=statistics.median(v), least=min(v), most=max(v)) for k, v in ratios.items()})


if __name__ == '__main__': main()
