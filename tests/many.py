"""A training by several processes, as `torchrun` starts them.

    torchrun --standalone --nproc-per-node N many.py WHAT FOLDER

Each process leaves what it knows in FOLDER/WHAT-N-RANK.pt; without `torchrun` it is one process."""
import os
import signal
import sys
import warnings
from pathlib import Path

warnings.filterwarnings('ignore')
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from fastai.callback.core import Callback  # noqa: E402
from fastai.learner import Metric  # noqa: E402
from fastai.metrics import AccumMetric  # noqa: E402
from torch import nn  # noqa: E402

from resnet_fastai.core import ResNet  # noqa: E402
from resnet_fastai.engine.layout import DataPaths  # noqa: E402
from resnet_fastai.training import PlateauLR  # noqa: E402

torch.set_num_threads(1)
rank, ranks = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
settings = dict(arch='cifar_resnet8', size=32, bs=12, micro_bs={1: 12, 2: 5, 3: 3, 6: 1}[ranks], num_workers=0, precision='fp32', patience=0,
                min_delta=10, device='cpu')


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
    m = ResNet(*paths, **settings | dict(lighting=0. if plain else .1) | kw)
    if plain:                                             # no BN: shares of a batch make the batch
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(8*7*7, 1000))
        m.learn.model.forward, m.learn.model.inner = net.forward, net
        for name, p in list(m.learn.model.named_parameters()):
            if not name.startswith('inner'): p.requires_grad_(False)
    return m


def weights(m): return {k: v.clone() for k, v in m.learn.model.state_dict().items()}


def everything(paths, out):
    "Gradients, photos, figures, the plateau"
    m = model(paths, plain=True, schedule=PlateauLR('surest', patience=0))
    m.learn.metrics = [*m.learn.metrics, AccumMetric(median_logit, flatten=False), Surest()]
    watch = Watch()
    m.learn.add_cb(watch)
    before = m.learn.validate()
    m.learn.fit(3)
    plain = dict(weights=weights(m), rows=m.learn.history.rows, lr=m.learn.lr, photos=watch.order_of, drops=m.learn.plateau_lr.drops,
                 updates=watch.updates)
    m = model(paths)
    m.learn.fit(1)
    untouched = model(paths).learn.validate()
    torch.save(dict(before=list(before), plain=plain, bn=weights(m), untouched=list(untouched), lr=m.learn.lr), out)


def resumed(paths, out, folder, die_at=None):
    "A run that may be killed after so many batches"
    def die(watch):
        if watch.batches == die_at and rank == ranks - 1: os.kill(os.getpid(), signal.SIGKILL)
    m = model(paths, run_folder=folder, every=1, cbs=Watch(die))
    m.fit(3, resume=True)
    torch.save(dict(weights=weights(m), rows=m.learn.history.rows, lr=m.learn.lr, draw=torch.rand(2)), out)


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


def stopped(paths, out, folder):
    "One process of several is asked to stop"
    def ask(watch):
        if watch.batches == 3 and rank == ranks - 1: os.kill(os.getpid(), signal.SIGINT)
    m = model(paths, run_folder=folder, cbs=Watch(ask))
    try: m.fit(3)
    except KeyboardInterrupt: torch.save(dict(weights=weights(m), files=len(m.learn.checkpoint.files())), out)


if __name__ == '__main__':
    what, folder = sys.argv[1], Path(sys.argv[2])
    root = folder/'drawn'
    paths, out = DataPaths(root, root/'labels.json', root/'encoding.json'), folder/f'{what}-{ranks}-{rank}.pt'
    if what == 'everything': everything(paths, out)
    elif what == 'untouched': resumed(paths, out, folder/'run-untouched')
    elif what.startswith('killed'): resumed(paths, out, folder/'run-killed', die_at=5 if what == 'killed' else None)
    elif what == 'failing': failing(paths, out, folder/'run-failing')
    elif what.startswith('different'): different(paths, out, folder, what.partition('-')[2])
    elif what == 'small': model(paths, bs=3)
    elif what == 'stopped': stopped(paths, out, folder/'run-stopped')
    if dist.is_initialized(): dist.destroy_process_group()
