"""Kill a run with SIGKILL again and again, interrupt it now and then, resume it each time, compare the end with a run that nobody touched.

    python kill_and_resume.py FOLDER WORKERS KILLS SEED [MORE]

MORE are arguments of the model, as JSON.

One process imports everything and forks the runs, so that a kill costs no import. Prints a line of JSON."""
import json
import os
import random
import signal
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path

warnings.filterwarnings('ignore')
import torch  # noqa: E402

from resnet_fastai.core import ResNet  # noqa: E402
from resnet_fastai.data import demo_data  # noqa: E402
from resnet_fastai.engine.checkpoint import read_checkpoint  # noqa: E402

epochs = 4
settings = dict(arch='cifar_resnet8', size=32, bs=8, micro_bs=4, patience=0, min_delta=10)        # the rate falls after each epoch but one
stages = ['bytes', 'bytes', 'sync', 'rename', 'renamed']


def result(model):
    "All that must agree"
    learn, rec = model.learn, model.learn.recorder
    return dict(weights=dict(model.net.state_dict()), momentum=[s['grad_avg'] for s in learn.opt.state.values() if 'grad_avg' in s],
                history=[[v for k, v in row.items() if k != 'seconds'] for row in learn.history.rows], lr=learn.lr,
                hypers=[dict(h) for h in learn.opt.hypers], losses=torch.stack(rec.losses), lrs=rec.lrs, iters=list(rec.iters),
                values=[list(v) for v in rec.values], plateau=[learn.plateau_lr.best, learn.plateau_lr.wait],
                helps=[getattr(cb, a) for cb in learn.cbs if cb.name in ('ema', 'early_stopping') for a in cb.state_attrs],
                rng=[torch.rand(1), random.random()])


def die(): os.kill(os.getpid(), signal.SIGKILL)


def die_writing(stage, nth, share):
    "Kill this process inside the nth writing of a checkpoint: after a share of its bytes, before or after its renaming"
    write, replace, fsync, n = Path.write_bytes, Path.replace, os.fsync, [0]
    mine = lambda path: str(path).count('.pt')
    def write_bytes(self, data):
        n[0] += mine(self) > 0
        if n[0] == nth and stage == 'bytes' and mine(self):
            with self.open('wb', buffering=0) as f: f.write(data[:int(share*len(data))]); die()
        return write(self, data)
    def sync(fd): die() if n[0] == nth and stage == 'sync' else fsync(fd)
    def rename(self, to):
        if n[0] == nth and mine(self) and stage == 'rename': die()
        out = replace(self, to)
        if n[0] == nth and mine(self) and stage == 'renamed': die()
        return out
    Path.write_bytes, Path.replace, os.fsync = write_bytes, rename, sync


def run(paths, workers, out, ready=None, how=None, **kw):
    "The body of a child: train to the end, leave the result"
    model = ResNet(*paths, **settings, num_workers=workers, **kw)
    if how: die_writing(*how)
    if ready: os.write(ready, b'.')
    with model.learn.no_bar(), model.learn.no_logging(): model.fit(epochs, resume='run_folder' in kw)
    torch.save(result(model), out)


def child(*args, **kw):
    if pid := os.fork(): return pid
    os.setsid()                                             # Ctrl-C in a terminal goes to a run and all its workers
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try: run(*args, **kw); os._exit(0)
    except KeyboardInterrupt: os._exit(3)
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)


def same(a, b):
    if torch.is_tensor(a): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b


def check(ref, path):
    found = torch.load(path, weights_only=False)
    wrong = [k for k in ref if not same(ref[k], found[k])]
    if wrong: sys.exit(f'not the same: {wrong}')
    path.unlink()


def main(folder, workers, kills, seed, more='{}'):
    torch.set_num_threads(1)
    settings.update(json.loads(more))
    folder, rng, begun = Path(folder), random.Random(seed), time.perf_counter()
    paths = demo_data(folder/'photos', sizes=dict(train=44, val=12, test=4))
    ref, out, said = folder/'ref.pt', folder/'out.pt', dict(timed=0, writing=0, interrupted=0, finished=0, parts=0)
    if os.waitpid(child(paths, workers, ref), 0)[1]: sys.exit('the untouched run failed')
    untouched, run_no = torch.load(ref, weights_only=False), 0
    while said['timed'] + said['writing'] < kills or said['interrupted'] < 5:
        mine = folder/f'run{run_no}'
        polite = said['timed'] + said['writing'] == kills or said['interrupted'] < (said['timed'] + said['writing'])//4
        inside = not polite and said['writing'] < said['timed'] and (rng.choice(stages), rng.randint(1, 5), rng.random())
        get, put = os.pipe()
        pid = child(paths, workers, out, put, inside, run_folder=mine, every=rng.choice(['epoch', 1, 2]))
        os.close(put)
        if os.read(get, 1) and not inside:
            time.sleep(rng.uniform(0, .8))
            os.killpg(pid, signal.SIGINT) if polite else os.kill(pid, signal.SIGKILL)
        os.close(get)
        status = os.waitpid(pid, 0)[1]
        with suppress(ProcessLookupError): os.killpg(pid, signal.SIGKILL)      # workers whose run was killed as they began wait for ever
        for p in mine.glob('[!.]*.pt'): read_checkpoint(p)                      # whatever has its name is whole
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            said['writing' if inside else 'timed'] += 1
            said['parts'] += len(list(mine.glob('.*.pt.*')))
        elif os.WIFEXITED(status) and os.WEXITSTATUS(status) == 3: said['interrupted'] += 1
        elif status: sys.exit('a resumed run failed')
        else:
            check(untouched, out)
            said['finished'], run_no = said['finished'] + 1, run_no + 1
    if os.waitpid(child(paths, workers, out, run_folder=mine, every=1), 0)[1]: sys.exit('the last run failed')
    check(untouched, out)
    rates = {row[untouched['history'][0].index(untouched['lrs'][0])] for row in untouched['history']}
    print(json.dumps(said | dict(rates=len(rates), seconds=round(time.perf_counter() - begun, 1))))


if __name__ == '__main__': main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:])
