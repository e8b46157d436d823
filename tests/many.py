"""A training by several processes, as `torchrun` starts them.

    torchrun --standalone --nproc-per-node N many.py WHAT FOLDER
    python many.py serve                                # then a line of JSON for each request; see ranks.py

Each process leaves what it knows in FOLDER/WHAT-N-RANK.pt; without `torchrun` it is one process."""
import copy
import json
import os
import signal
import socket
import sys
import time
import traceback
import warnings
import zlib
from pathlib import Path

warnings.filterwarnings('ignore')
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.distributed.run as launcher  # noqa: E402
from fastai.callback.core import Callback  # noqa: E402
from fastai.learner import Metric  # noqa: E402
from fastai.metrics import AccumMetric  # noqa: E402
from torch import nn  # noqa: E402

from resnet_fastai.core import ResNet  # noqa: E402
from resnet_fastai.engine.checkpoint import get_rng, set_rng  # noqa: E402
from resnet_fastai.engine.exact_bn import average_statistics, exact_bn  # noqa: E402
from resnet_fastai.engine.layout import DataPaths  # noqa: E402
from resnet_fastai.engine.shared import Answers  # noqa: E402
from resnet_fastai.engine.survey import scan_photos  # noqa: E402
from resnet_fastai.practice.cli import main as command  # noqa: E402
from resnet_fastai.practice.prepare import check_data  # noqa: E402
from resnet_fastai.training import PlateauLR  # noqa: E402

torch.set_num_threads(1)
rank, ranks = 0, 1
settings = dict(arch='cifar_resnet8', size=32, bs=12, num_workers=0, precision='fp32', patience=0, min_delta=10, device='cpu')


class Watch(Callback):
    "Keep the photos of each epoch, and the number of this process's in each update; do something to one process at one batch"
    order = -20
    def __init__(self, act=None): self.act, self.order_of, self.batches, self.updates, self.photos = act, [], 0, [], 0
    def after_step(self): self.updates, self.photos = [*self.updates, self.photos], 0
    def before_train(self): self.order_of.append([])
    def before_batch(self):
        if not self.training: return
        dl = self.dls.train
        if self.iter == 0: self.order_of[-1] = [int(i) for i in dl._DataLoader__idxs]
        self.batches, self.photos = self.batches+1, self.photos + len(self.yb[0])
        if self.act: self.act(self)


def median_logit(logits, targ): return logits.gather(1, targ[:, None]).median().item()


class Surest(Metric):
    "The largest logit of all: no mean over photos, and it has no `total`"
    def reset(self): self.most = -float('inf')
    def accumulate(self, learn): self.most = max(self.most, learn.pred.max().item())
    @property
    def value(self): return self.most


def model(paths, plain=False, **kw):
    m = ResNet(*paths, **settings | dict(micro_bs={1: 12, 2: 5, 3: 3}.get(ranks, 1), lighting=0. if plain else .1) | kw)
    if plain:                                             # no BN: shares of a batch make the batch
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(8*7*7, 1000))
        m.learn.model.forward, m.learn.model.inner = net.forward, net
        for name, p in list(m.learn.model.named_parameters()):
            if not name.startswith('inner'): p.requires_grad_(False)
    return m


def weights(m): return {k: v.clone() for k, v in m.learn.model.state_dict().items()}


def without_bn(paths):
    "Gradients, photos, figures, the plateau"
    m = model(paths, plain=True, schedule=PlateauLR('surest', patience=0))
    m.learn.metrics = [*m.learn.metrics, AccumMetric(median_logit, flatten=False), Surest()]
    watch = Watch()
    m.learn.add_cb(watch)
    before = m.learn.validate()
    m.learn.fit(3)
    return dict(weights=weights(m), rows=m.learn.history.rows, lr=m.learn.lr, photos=watch.order_of, drops=m.learn.plateau_lr.drops,
                updates=watch.updates, before=list(before))


def everything(paths, out):
    "Also balanced classes, and BN"
    plain, balanced = without_bn(paths), {}
    for kind in ('sampler', 'loss'):
        m = model(paths, plain=True, balance=kind)
        m.learn.add_cb(watch := Watch())
        m.learn.fit(1)
        balanced[kind] = dict(weights=weights(m), rows=m.learn.history.rows, photos=watch.order_of[0])
    m = model(paths, plain=True, label_smoothing=.1, ema=.9, early_stopping=1, lr=.01)
    m.learn.fit(2)
    helped = dict(weights=weights(m), own=m.learn.ema.other, rows=m.learn.history.rows)
    m = model(paths, ema=.9, **(dict(cutmix=1.) if ranks < 6 else {}))     # of 6 processes each has one photo at a time
    m.learn.fit(1)
    mixed = dict(weights=weights(m), rows=m.learn.history.rows)
    m = model(paths)
    m.learn.fit(1)
    untouched = model(paths).learn.validate()
    torch.save(dict(plain=plain, balanced=balanced, helped=helped, mixed=mixed, bn=weights(m), untouched=list(untouched), lr=m.learn.lr), out)


def resumed(paths, out, folder, die_at=None):
    "A run that may be killed after so many batches"
    def die(watch):
        if watch.batches == die_at and rank == ranks - 1: os.kill(os.getpid(), signal.SIGKILL)
    m = model(paths, run_folder=folder, every=1, cbs=Watch(die))
    m.fit(3, resume=True)
    torch.save(dict(weights=weights(m), rows=m.learn.history.rows, lr=m.learn.lr, draw=torch.rand(2)), out)


def all_die():
    "Killed by one of them, while the others wait: none lives to see that another died, and to be told to end"
    pids = [None]*ranks
    torch.distributed.all_gather_object(pids, os.getpid())
    if rank == ranks - 1:
        for pid in pids: os.kill(pid, signal.SIGKILL)                   # its own is the last
    while True: signal.pause()


class Diary(Callback):
    "A line for each photo that is trained on: epoch, number, checksum of its pixels; all processes die before one update, or one is told to end (t)"
    order = -20
    def __init__(self, to, die_at): self.to, self.die_at, self.updates = to, die_at, 0
    def before_train(self): self.at = 0
    def after_step(self): self.updates += 1
    def before_batch(self):
        if not self.training: return
        if self.die_at and self.updates == int(self.die_at[-1]):
            if self.die_at[0] != 't': all_die()
            elif rank == ranks - 1 and not self.stopping: os.kill(os.getpid(), signal.SIGTERM)
        idxs = self.dls.train._DataLoader__idxs[self.at:self.at + len(self.xb[0])]
        self.at += len(idxs)
        with open(self.to, 'a') as f:
            f.write(''.join(f'{self.epoch} {i} {zlib.crc32(x.contiguous().numpy().tobytes())}\n' for i, x in zip(idxs, self.xb[0])))


class Disasters(Callback):
    "Alone until the scheduler wants the place for two; then on the second machine, one a start: a killed rank, one that hangs, the machine's end"
    def __init__(self, folder): self.folder, self.updates = folder, 0
    def after_step(self): self.updates += 1
    def before_batch(self):
        if not self.training or not self.updates: return
        if ranks == 1 and not self.happened('alone'):
            while not self.stopping: time.sleep(.1)                      # SIGTERM
        elif ranks == 2 and os.environ['MACHINE'] == '2':
            if not self.happened('killed'): os.kill(os.getpid(), signal.SIGKILL)
            if not self.happened('hung'): os.kill(os.getpid(), signal.SIGSTOP)
            if not self.happened('lost'):
                for pid in os.getppid(), os.getpid(): os.kill(pid, signal.SIGKILL)

    def happened(self, what):
        try: (self.folder/what).touch(exist_ok=False)
        except FileExistsError: return True


def elastic(paths, out, folder):
    "A run that is started again and again by torchrun; only the one that hangs must not wait long"
    if ranks == 2 and (folder/'killed').exists() and not (folder/'hung').exists(): os.environ['RESNET_FASTAI_TIMEOUT'] = '20'
    m = model(paths, plain=True, micro_bs=1, run_folder=folder/'elastic', every=1, cbs=[Diary(f'{out}.txt', None), Disasters(folder)])
    m.fit(3, resume=True)
    torch.save(dict(weights=weights(m), rows=m.learn.history.rows), out)


def moving(paths, out, folder, die_at):
    "A run that another number of processes goes on with; of each its own diary"
    m = model(paths, plain=True, micro_bs=1, run_folder=folder, every=1, cbs=Diary(f'{out}.txt', die_at))
    m.fit(3, resume=True)
    torch.save(dict(weights=weights(m), rows=m.learn.history.rows), out)


def different(paths, out, folder, what):
    "One process has another folder, or other arguments"
    root, kw = (paths[0], dict(lr=.5)) if what == 'lr' else (folder/what, {})
    if rank == ranks - 1: paths, kw = DataPaths(root, root/'labels.json', root/'encoding.json'), kw
    else: kw = {}
    m = model(paths, cbs=(watch := Watch()), **kw)
    try: m.fit(1)
    except ValueError as e: torch.save(dict(said=str(e), batches=watch.batches), out)


def failing(paths, out, folder):
    "One process meets a loss that is no number"
    def spoil(watch):
        if watch.batches == 3 and rank == ranks - 1: watch.learn.xb = (watch.xb[0]*float('nan'),)
    m = model(paths, run_folder=folder, cbs=Watch(spoil))
    m.fit(3)


def after_fit(paths, out, folder):
    "What is done to a trained model; only the first process can see the run's folder"
    m = model(paths, run_folder=folder/f'run-after-{rank}')
    m.fit(2, restore_best=True)
    best, own = weights(m), copy.deepcopy(m.net)
    rng = get_rng(m.learn.dls.loaders)
    seen = [x for x, _ in m.learn.dls.train]
    set_rng(rng, m.learn.dls.loaders)
    average_statistics(own, seen)
    photos = exact_bn(m.learn, 46)
    torch.save(dict(best=best, restored=m.learn.restored, own=own.state_dict(), exact=weights(m), photos=photos, seen=sum(map(len, seen))), out)


def shell(paths, out, folder, how):
    "The command; the last process may die in it, or the same is done in Python"
    kw = dict(arch='cifar_resnet8', size=32, bs=12, micro_bs=5, num_workers=0, precision='fp32')
    if how == 'python':
        m = ResNet(*paths, **kw, device='cpu', run_folder=folder/'python-run')
        m.fit(2)
        return torch.save(dict(weights=weights(m)), out)
    words = [w for k, v in kw.items() for w in (f'--{k.replace("_", "-")}', str(v))]
    train = ['train', *map(str, paths), '--model', str(folder/'shell'), '--epochs', '2', '--every', '1', *words]
    if how == 'killed':
        def die(watch):
            if watch.batches == 5 and rank == ranks - 1: os.kill(os.getpid(), signal.SIGKILL)
        init = ResNet.__init__
        ResNet.__init__ = lambda *args, **kw: init(*args, **kw, cbs=Watch(die))
    if how == 'other': train += ['--lr', '.3']
    command(['--device', 'cpu', *(['resume', str(folder/'shell-run'), '--epochs', '3'] if how == 'resume' else train)])


class Late(Callback):
    "Ask one process to stop while it agrees with the others, or when it has agreed already"
    order = 99
    def __init__(self, watch, when): self.watch, self.when = watch, when
    def ask(self): os.kill(os.getpid(), signal.SIGINT)
    def before_fit(self):
        agree = self.learn.many_processes.sum
        def sum_(*values):
            total = agree(*values)
            if self.when == 'meanwhile' and self.watch.batches == 4 and rank == ranks - 1: self.ask()
            return total
        self.learn.many_processes.sum = sum_
    def after_batch(self):
        if self.training and self.when == 'after' and self.watch.batches == 4 and rank == ranks - 1: self.ask()


def stopped(paths, out, folder, when):
    "One process of several is asked to stop"
    def ask(watch):
        if when == 'before' and watch.batches == 3 and rank == ranks - 1: os.kill(os.getpid(), signal.SIGINT)
    watch = Watch(ask)
    m = model(paths, run_folder=folder, cbs=[watch, Late(watch, when)])
    try: m.fit(3)
    except KeyboardInterrupt:
        torch.save(dict(weights=weights(m), files=len(m.learn.checkpoint.files()), batches=watch.batches, after=list(m.learn.validate())), out)


def tables(paths, out, folder):
    "What is asked of many photos"
    look = sorted((folder/'faulty').rglob('*.jpg'))
    os.environ['FASTAI_HOME'] = str(folder/f'home-{ranks}')              # what another number has found is not known there
    m = model(paths, n_out=None, lr=.1, patience=9)
    colours, (moments, bad) = m.stats.as_dict(), scan_photos(look, num_workers=0)
    loaded = ResNet.load(folder/'model') if (folder/'model').exists() else trained(m, folder/'model')
    where = dict(data_path=paths.data_path, label_path=paths.label_path, protocol=['1crop', '10crop'], precision='fp32')
    torch.save(dict(colours=colours, moments=moments, bad=bad, errors=loaded.evaluate(split='val', **where),
                    classes=loaded.evaluate(split='train', per_class=True, **where), threads=torch.get_num_threads(),
                    problems=check_data(folder/'faulty', paths.label_path, paths.label_encoding, num_workers=0),
                    memory=loaded.predict_folder(look, n=3, protocol='1crop', precision='fp32'),
                    rows=loaded.predict_folder(folder/'faulty', dest=f'{out}.csv', n=3, protocol='1crop', precision='fp32')), out)


def trained(m, folder):
    m.fit(5)
    m.save(folder)
    return ResNet.load(folder)


def begun(paths, out, folder, ask, die_at=None):
    "A question that is shared out; the last process dies after so many blocks of two photos"
    asked, had, flush, ask_, init = [], [], Answers.flush, Answers.ask, Answers.__init__
    def opening(self, folder):
        init(self, folder, 2, 20)
        had.append(len(self))
    def counting(self, *args):
        asked.extend(args[2])
        ask_(self, *args)
    def dying(self):
        self.blocks = getattr(self, 'blocks', 0) + 1
        flush(self)
        if self.blocks == die_at and rank == ranks - 1: os.kill(os.getpid(), signal.SIGKILL)
    Answers.ask, Answers.flush, Answers.__init__ = counting, dying, opening
    loaded = ResNet.load(folder/'model')
    if ask == 'predict': found = loaded.predict_folder(folder/'faulty', dest=folder/'begun.csv', n=2, protocol='1crop', precision='fp32')
    else: found = loaded.evaluate(split='train', data_path=paths.data_path, label_path=paths.label_path, protocol='1crop', precision='fp32')
    torch.save(dict(found=found, asked=asked, had=had), out)


def serve():
    "Answer a request in each line. What runs is forked, so that it imports nothing"
    for line in sys.stdin:
        kind, *what = json.loads(line)
        print(json.dumps(dict(jobs=jobs, agent=agent, wait=wait)[kind](*what)), flush=True)


def child(folder, env, act, *args):
    "The process id of a new process that does something, and adds what it says to FOLDER/said.txt"
    if (pid := os.fork()): return pid
    os.environ |= dict(FASTAI_HOME=f'{folder}/fastai') | env
    log, code = os.open(f'{folder}/said.txt', os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1
    for fd in (1, 2): os.dup2(log, fd)
    try: act(*args); code = 0
    except SystemExit as e: code = e.code
    except BaseException: traceback.print_exc()
    finally: sys.stdout.flush(); sys.stderr.flush(); os._exit(code)


def wait(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def jobs(folder, *jobs):
    "Jobs like '2:moving' for two processes, one after the other; the exit codes of each"
    return [forked(int(n), what, Path(folder)) for n, what in (job.split(':') for job in jobs)]


def forked(n, what, folder):
    "Processes that are ended as torchrun ends them: when one fails, the others get SIGTERM"
    with socket.create_server(('127.0.0.1', 0)) as s: port = s.getsockname()[1]
    env = [dict(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port)) if n > 1 else {} for r in range(n)]
    pids, codes = [child(folder, e, main, what, folder) for e in env], {}
    while len(codes) < n:
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid]:
            for other in {*pids} - {*codes}: os.kill(other, signal.SIGTERM)
    return [codes[p] for p in pids]


def agent(folder, what, env, *options):
    "A machine: `torchrun` with these options, whose processes are forked; its process id. `wait` for it before further jobs"
    def start():
        os.setsid()
        config, *_ = launcher.config_from_args(launcher.parse_args([*options, '--start-method', 'fork', __file__]))
        launcher.elastic_launch(config, main)(what, Path(folder))
    return child(folder, env, start)


def main(what, folder):
    global rank, ranks
    rank, ranks = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    root = folder/'drawn'
    paths, out = DataPaths(root, root/'labels.json', root/'encoding.json'), folder/f'{what}-{ranks}-{rank}.pt'
    if what == 'everything': everything(paths, out)
    elif what.startswith('plain'): torch.save(dict(plain=without_bn(paths)), out)
    elif what == 'untouched': resumed(paths, out, folder/'run-untouched')
    elif what.startswith('killed'): resumed(paths, out, folder/'run-killed', die_at=5 if what == 'killed' else None)
    elif what.startswith('moving'): moving(paths, out, folder/what.split('-')[1], (what.split('-') + [''])[2])
    elif what == 'elastic': elastic(paths, out, folder)
    elif what == 'tables': tables(paths, out, folder)
    elif what.startswith('begun'): begun(paths, out, folder, what.split('-')[1], int((what.split('-') + [0])[2]))
    elif what == 'failing': failing(paths, out, folder/'run-failing')
    elif what.startswith('different'): different(paths, out, folder, what.partition('-')[2])
    elif what == 'small': model(paths, bs=3)
    elif what == 'after': after_fit(paths, out, folder)
    elif what.startswith('shell'): shell(paths, out, folder, what.partition('-')[2])
    elif what.startswith('stopped'): stopped(paths, out, folder/f'run-{what}', what.partition('-')[2])
    if dist.is_initialized(): dist.destroy_process_group()


if __name__ == '__main__':
    if sys.argv[1] == 'serve': serve()
    else: main(sys.argv[1], Path(sys.argv[2]))
