"""Everything that needs a GPU, in one command, in the order of what it tells; it stops in time, and goes on when it is called again.

    python benchmarks/gpu.py --minutes 12 --out runs/gpu          # needs an NVIDIA GPU
    python benchmarks/gpu.py --dry-run                            # the same steps in small, on the processor, in some three minutes

1. Checks: does it work on CUDA at all? Training, prediction, evaluation, resuming after a kill, saving, three precisions, two layouts,
   `compile=True`, two processes, CUDA graphs. Each is a process of its own with a time limit; one that fails leaves its traceback.
2. Rates: ResNet-50's training step against a bare PyTorch loop, the loader, prediction with 50 crops.
3. CIFAR-10: how many small networks train side by side best; then whole runs of 64,000 updates, which are resumed by the next call.

Every figure is written as soon as it exists: to gpu.json, and each run's epochs and checkpoints to runs-1.tar, runs-2.tar, …, all in --out. Work in
progress lies in --work. On a machine that forgets everything, give the files of the last call by `--resume FOLDER`."""
import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import traceback
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

root = Path(__file__).resolve().parent.parent
sys.path[0] = str(root)                                        # not this folder: its `statistics` is not Python's
sys.path.insert(1, str(root/'nbs'/'experiments'))

# name: seconds it may take. What is measured runs alone; checks run side by side
checks = dict(train=60, compile=180, graph=120, predict=90, evaluate=90, save_load=90, resume=120, bf16=90, fp16=90, channels_last=90, two_processes=120)
rates = dict(train_step=75, train_step_compiled=180, loader=45, fifty_crops=45)
side_by_side = (1, 3, 6)                                       # networks at a time, of which the best is chosen
runs = [(kind, depth, seed) for seed in range(5) for kind, depth in (
    ('resnet', 20), ('plain', 20), ('resnet', 56), ('plain', 56), ('resnet', 32), ('resnet', 44), *([('plain', 32), ('plain', 44), ('resnet', 110)][:3*(seed < 2)]))]
bf16_peak = {'H200': 989e12, 'H100 PCIe': 756e12, 'H100 NVL': 835e12, 'H100': 989e12, 'B200': 2250e12, 'A100': 312e12, 'A10G': 70e12,
             'A10': 125e12, 'L40S': 362e12, 'L4': 121e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12}      # dense, without sparsity, by NVIDIA's data sheets
resnet50_macs = 4.089e9                                        # v1.5, an image of 224×224


def store(path, value):
    "JSON, whole or not at all"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'.{path.name}.{os.getpid()}')
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False))
    part.replace(path)


def load(path):
    try: return json.loads(path.read_text())
    except (OSError, ValueError): return None


# --- Steps: each a function of `o` (options) that returns figures; it runs in a process of its own

def device():
    import torch
    return torch.device('cuda', torch.cuda.current_device()) if torch.cuda.is_available() else torch.device('cpu')


def sync():
    import torch
    if torch.cuda.is_available(): torch.cuda.synchronize()


def quietly(learn, epochs):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs)


def machine(o):
    "What there is"
    import platform
    from importlib import metadata

    import torch
    import torchvision

    gpu = dict(gpu=None)
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        gpu = dict(gpu=p.name, gpus=torch.cuda.device_count(), gpu_memory_gb=round(p.total_memory/2**30, 1), capability=f'{p.major}.{p.minor}',
                   cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version())
        with suppress(OSError, subprocess.SubprocessError):
            query = ['nvidia-smi', '--query-gpu=driver_version,clocks.max.sm,power.limit', '--format=csv,noheader']
            gpu['smi'] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    return dict(gpu, cores=os.cpu_count(), python=platform.python_version(), torch=torch.__version__, torchvision=torchvision.__version__,
                fastai=metadata.version('fastai'), fastprogress=metadata.version('fastprogress'))


def drawn(o, **sizes):
    "A folder of drawn photos, one for each step"
    from resnet_fastai.data import demo_data
    return demo_data(o.tmp/'photos', sizes=sizes or (dict(train=48, val=16, test=8) if o.dry_run else dict(train=320, val=80, test=40)))


def small(o, **kw):
    "A model over drawn photos"
    from resnet_fastai.core import ResNet
    how = dict(arch='cifar_resnet8', size=32, bs=16, micro_bs=16, num_workers=0) if o.dry_run else dict(arch='resnet18', size=64, bs=32, micro_bs=32, num_workers=2)
    return ResNet(*drawn(o), **how | dict(net_args=dict(zero_init_residual=True)) | kw)


def told(model):
    "The history, if its numbers are numbers and the network is where it belongs"
    import numpy as np
    df = model.history
    assert np.isfinite(df.select_dtypes('number').to_numpy()).all(), df
    where = next(model.net.parameters()).device
    assert where.type == device().type, where
    return dict(epochs=len(df), train_loss=df.train_loss.tolist(), top1_error=df.top1_error.tolist(), seconds_an_epoch=df.seconds.tolist(), on=str(where))


def fitted(o, epochs=1, **kw):
    model = small(o, **kw)
    quietly(model.learn, epochs)
    return model


def train(o):
    "`train` for an epoch, and what fastai offers on its learner"
    from resnet_fastai.core import train as train_
    how = dict(arch='cifar_resnet8', size=32, bs=16) if o.dry_run else dict(arch='resnet50', size=224, bs=64, micro_bs=32)
    learn = train_(*drawn(o), epochs=1, **how)
    learn.recorder.plot_loss()
    probs, _ = learn.get_preds()
    return dict(history=learn.history.df.to_dict('list'), preds=list(probs.shape))


def predict(o):
    "Probabilities of photos, the same on the GPU and on the processor"
    import numpy as np

    from resnet_fastai.core import ResNet
    model, photos = fitted(o, 2), [*(o.tmp/'photos'/'test').rglob('*.*')][:8]
    model.save(o.tmp/'model')
    here, there = (ResNet.load(o.tmp/'model', device=d) for d in (device(), 'cpu'))
    fast, exact, cpu = here.predict(photos), here.predict(photos, precision='fp32'), there.predict(photos, precision='fp32')
    assert abs(fast.sum(1) - 1).max() < 1e-4 and np.isfinite(fast).all()
    assert abs(exact - cpu).max() < 5e-3, abs(exact - cpu).max()              # TF32 in the convolutions
    return dict(change_to_cpu=float(abs(exact - cpu).max()), change_by_precision=float(abs(fast - exact).max()), likeliest=here.predict_n(photos[0], n=3))


def evaluate(o):
    "All protocols"
    model = fitted(o)
    table = model.evaluate(split='val', protocol=['1crop', '10crop', '50crop', 'dense'])
    assert table.top1_error.between(0, 1).all()
    return dict(table=table.to_dict('list'))


def save_load(o):
    "What is loaded predicts what was saved"
    from resnet_fastai.core import ResNet
    model, photos = fitted(o), [*(o.tmp/'photos'/'test').rglob('*.*')][:4]
    model.save(o.tmp/'model')
    off = abs(ResNet.load(o.tmp/'model').predict(photos, precision='fp32') - model.predict(photos, precision='fp32')).max()
    assert off < 1e-4, off
    learn = model.learn
    learn.path = o.tmp
    learn.save('fastai'), learn.load('fastai')
    return dict(change=float(off))


def exact():
    "Results that do not depend on the mood of a library"
    import torch
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def resume_child(o):
    "Train until the process is killed, in the middle of an epoch"
    from fastai.callback.core import Callback

    class Kill(Callback):
        order, on_graph = 200, 'replay'
        def after_batch(self):
            if self.training and self.train_iter == (8 if o.dry_run else 25): os.kill(os.getpid(), signal.SIGKILL)
    exact()
    model = small(o, run_folder=o.tmp/'run', every=2, precision='fp32', cbs=[Kill()], num_workers=0)
    with model.learn.no_bar(): model.fit(4)


def resume(o):
    "A run that was killed goes on, and ends as one that was not"
    import torch
    exact()
    drawn(o)
    child = subprocess.run([*me(o, 'resume_child'), '--tmp', str(o.tmp)], capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr[-2000:]
    one = small(o, run_folder=o.tmp/'run', every=2, precision='fp32', num_workers=0)
    with one.learn.no_bar(), one.learn.no_logging(): one.fit(4, resume=True)
    two = fitted(o, 4, precision='fp32', num_workers=0)
    off = max(float((a.float() - b.float()).abs().max()) for a, b in zip(one.net.state_dict().values(), two.net.state_dict().values()))
    assert len(one.history) == 4 and off < 1e-3, (len(one.history), off)
    return dict(difference=off, same_to_the_bit=all(torch.equal(a, b) for a, b in zip(one.net.state_dict().values(), two.net.state_dict().values())))


def learns(o, **kw):
    "Does the loss fall?"
    model = fitted(o, 1 if o.dry_run else 4, **kw)
    figures = told(model)
    assert o.dry_run or figures['train_loss'][-1] < figures['train_loss'][0], figures
    return figures


def bf16(o): return learns(o, precision='bf16')


def fp16(o):
    "fp16 with its loss scaling (which is for GPUs; on the processor bf16 stands in)"
    from fastai.callback.core import Callback

    class Scale(Callback):
        def after_train(self):
            if getattr(self.learn, 'scaler', None): seen.append(self.learn.scaler.get_scale())
    seen = []
    return dict(learns(o, precision='bf16' if o.dry_run else 'fp16', cbs=[Scale()]), scale=seen)


def channels_last(o):
    "Both layouts, in 32 and in 16 bits"
    return {f'{p}, channels_last={c}': told(fitted(o, precision=p, channels_last=c)) for p in ('fp32', 'bf16') for c in (False, True)}


def compile(o):
    "`compile=True`: the first batch takes its time"
    start = time.perf_counter()
    return dict(told(fitted(o, 1, compile=True)), seconds=time.perf_counter() - start)


def rank(o):
    "One of two processes"
    import torch
    import torch.distributed as dist
    n = torch.cuda.device_count()
    if n < 2:                                                   # two on one GPU: NCCL refuses that, gloo does not
        if n: torch.cuda.set_device(0)
        dist.init_process_group('gloo')
    model = small(o, micro_bs=8 if o.dry_run else 16, num_workers=0)
    quietly(model.learn, 2)
    told(model)
    me_, ranks = dist.get_rank(), dist.get_world_size()
    weights = torch.cat([p.detach().flatten().cpu() for p in model.net.parameters()])
    all_ = [None]*ranks
    dist.all_gather_object(all_, weights.numpy().tobytes())
    if not me_: store(o.tmp/'rank.json', dict(same_weights=len({*all_}) == 1, processes=ranks, backend=dist.get_backend(), gpus=n, **told(model)))
    dist.destroy_process_group()


def two_processes(o):
    "Two processes train one network; on one GPU, too"
    drawn(o)
    child = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', *me(o, 'rank')[3:], '--tmp', str(o.tmp)],
                           capture_output=True, text=True)
    assert child.returncode == 0, (child.stdout + child.stderr)[-3000:]
    found = load(o.tmp/'rank.json')
    assert found['same_weights'], found
    return found


# CIFAR-10

def noise(n, o):
    "As many photos as asked for, of noise: rates and agreement do not depend on what is seen"
    import torch
    g = torch.Generator().manual_seed(0)
    split = lambda n: (torch.randint(0, 256, (n, 3, 32, 32), generator=g, dtype=torch.uint8), torch.randint(0, 10, (n,), generator=g))
    return dict(train=split(n), test=split(64 if o.dry_run else 1000), classes=list('abcdefghij'))


def cifar_learner(o, kind, depth, updates, precision, graph, cbs=(), n=50_000, look_every=50, compile=False):
    import cifar10 as c
    from fastai.torch_core import set_seed

    from resnet_fastai.engine.cuda_graph import CudaGraph, DeviceGraph, TapeGraph
    dls = c.cifar_dls(noise(n, o), 16 if o.dry_run else 128, device=device())
    set_seed(0)
    for dl in dls.loaders: dl.rng.seed(0)
    graph = [CudaGraph(look_every=look_every, graph=TapeGraph if o.dry_run else DeviceGraph)] if graph else []
    learn = c.cifar_learner(dls, depth, kind, updates, precision, [*graph, *cbs], graph=False, compile=compile)
    return learn, c.epochs(dls, updates)


def graph(o):
    "An update from a CUDA graph is the update: the same weights after some; and how often the processor waits for the GPU"
    import torch
    exact()
    updates, nets, found = 16 if o.dry_run else 40, [], {}
    for graphed in (False, True):
        learn, epochs = cifar_learner(o, 'resnet', 8 if o.dry_run else 20, updates, 'fp32', graphed, n=200 if o.dry_run else 4000)
        quietly(learn, epochs)
        nets.append(learn)
    eager, graphed = nets
    assert graphed.cuda_graph.count['replays'] > updates//2, (graphed.cuda_graph.count, graphed.cuda_graph.reason)
    pairs = [(a.float(), b.float()) for a, b in zip(eager.model.state_dict().values(), graphed.model.state_dict().values())]
    off = max(float((a - b).abs().max()/(a.abs().max() + 1e-8)) for a, b in pairs)
    losses = [torch.stack(n.recorder.losses).cpu() for n in nets]
    found = dict(updates=updates, **graphed.cuda_graph.count, difference=off, same_to_the_bit=all(torch.equal(a, b) for a, b in pairs),
                 difference_of_losses=float((losses[0] - losses[1]).abs().max()), lrs_equal=eager.recorder.lrs == graphed.recorder.lrs)
    o.note(**found)
    assert off < .02 and found['lrs_equal'], found             # small differences grow in training; a wrong update differs by far more
    found['bf16'] = graphs_in_bf16(o, updates)
    found['syncs'] = syncs(o)
    return found


def graphs_in_bf16(o, updates):
    learn, epochs = cifar_learner(o, 'resnet', 8 if o.dry_run else 20, updates, 'bf16', True, n=200 if o.dry_run else 4000)
    quietly(learn, epochs)
    assert learn.cuda_graph.count['replays'] > updates//2, learn.cuda_graph.reason
    return dict(learn.cuda_graph.count, last_loss=float(learn.recorder.losses[-1]))


def syncs(o):
    "In 100 updates from the graph, the calls that wait for the GPU, by the warnings that PyTorch gives"
    import torch
    from fastai.callback.core import Callback
    if not torch.cuda.is_available(): return None

    class Watch(Callback):
        order, on_graph, run_valid = 200, 'replay', False
        def after_batch(self):
            if self.iter == 99: torch.cuda.set_sync_debug_mode('warn')
            if self.iter == 199: torch.cuda.set_sync_debug_mode('default')
    learn, epochs = cifar_learner(o, 'resnet', 20, 250, 'bf16', True, [Watch()])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        quietly(learn, epochs)
    seen = [f'{Path(w.filename).name}:{w.lineno}' for w in seen if 'synchroniz' in str(w.message)]
    return dict(in_100_updates=len(seen), where=sorted({*seen})[:10])


def rate(o):
    "Updates a second of one small network, perhaps beside others that begin together with it"
    from fastai.callback.core import Callback
    kind, depth, precision, graphed, at_a_time, which = o.arg.split(',')
    n = (12, 18) if o.dry_run else (60, 360)
    here = o.tmp

    class Clock(Callback):
        order, on_graph, run_valid = 200, 'replay', False
        def after_batch(self):
            if self.iter == n[0]:
                sync()
                (here/f'ready-{which}').touch()
                while len([*here.glob('ready-*')]) < int(at_a_time): time.sleep(.005)
                times.append(time.perf_counter())
            if self.iter == n[1]-1:
                sync()
                times.append(time.perf_counter())
    times = []
    learn, epochs = cifar_learner(o, kind, int(depth), n[1], precision, 'graph' in graphed, [Clock()], n=320 if o.dry_run else 50_000, compile='compiled' in graphed)
    quietly(learn, epochs)
    used = 'graph' not in graphed or learn.cuda_graph.reason
    return dict(updates_per_s=(n[1] - n[0])/(times[1] - times[0]), ms=1e3*(times[1] - times[0])/(n[1] - n[0]), without_graph=used if used is not True else None)


def run(o):
    "A whole run, or what is left of it"
    import cifar10 as c
    kind, depth, seed, precision, how = o.arg.split(',')
    name = f'{kind}{depth}-{seed}'
    folder, updates = (c.draw_cifar(o.tmp/'cifar', 96, 32), 20) if o.dry_run else (Path(o.cifar), c.paper_updates)

    class Checkpoint(c.Checkpoint):
        "An epoch takes half a second here: not each of them is worth a checkpoint"
        saved_at = 0
        def save(self, epoch, batch, best=False):
            if not batch and epoch < self.n_epoch and time.monotonic() - self.saved_at < 10: return
            super().save(epoch, batch, best)
            self.saved_at = time.monotonic()
    c.Checkpoint = Checkpoint
    c.train(folder, int(depth), kind, updates, int(seed), o.work/'results'/f'{name}.json', o.work/'runs'/name, precision, cache=o.work,
            bs=16 if o.dry_run else c.paper_bs, every=8 if o.dry_run else 10_000, compile='compiled' in how)
    return {}


# Rates

def steps(o, names):
    "Contestants in turns; the training loops of train_step.py"
    import torch

    from benchmarks import train_step as t
    from benchmarks.common import alternate
    n, bs, size, rounds = (1, 2, 32, 2) if o.dry_run else (8, 256, 224, 5)
    how = dict(precision='bf16', channels_last=True)
    batches = t.Ready(n, bs, size)
    contestants = dict(bare=lambda **kw: t.bare(batches, **how, **kw), ours=lambda **kw: t.ours(batches, **how, **kw))
    found = {}
    for name, kw in names.items():
        f = contestants[name.split(',')[0]](**kw)
        if torch.cuda.is_available(): torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        f()
        found[name] = dict(f=f, first_seconds=time.perf_counter() - start, memory_gb=torch.cuda.max_memory_allocated()/2**30 if torch.cuda.is_available() else None)
    seconds = alternate({k: v['f'] for k, v in found.items()}, rounds)
    peak = next((v for k, v in bf16_peak.items() if k in torch.cuda.get_device_name()), None) if torch.cuda.is_available() else None
    out = {}
    for name, v in found.items():
        r = n*bs/sorted(seconds[name])[len(seconds[name])//2]
        out[name] = dict(photos_per_s=r, seconds=seconds[name], first_seconds=v['first_seconds'], memory_gb=v['memory_gb'],
                         mfu=3*2*resnet50_macs*r/peak if peak and not o.dry_run else None)
    first = next(iter(out))
    for name in list(out)[1:]: out[name]['against_'+first] = out[name]['photos_per_s']/out[first]['photos_per_s']
    return dict(bs=bs, batches=n, rounds=rounds, peak=peak, **how, loops=out)


def train_step(o):
    "ResNet-50, 256 photos, bf16, channels last: the bare loop over torchvision's network, over ours, and our learner"
    return steps(o, {"bare, torchvision's network": {}, 'bare, our network': dict(net='ours'), 'ours': {}})


def train_step_compiled(o):
    found = steps(o, {'ours, compiled': dict(compile=True)})
    o.note(**found)
    both = steps(o, {"bare, torchvision's network, compiled": dict(compile=True), 'ours, compiled': dict(compile=True)})
    return both


def files(o, n):
    "Paths of n JPEGs of 500×375, few of them different"
    import numpy as np

    from resnet_fastai.engine.demo_photos import draw_photo
    folder = o.tmp/'jpegs'/'train'
    folder.mkdir(parents=True)
    for i in range(40): draw_photo('zigzag', np.random.default_rng(i)).resize((500, 375)).save(folder/f'{i}.jpg', quality=90)
    for i in range(40, n): os.link(folder/f'{i%40}.jpg', folder/f'{i}.jpg')
    return sorted(folder.iterdir())


def loader(o):
    "The batches of `resnet_dls` on all cores, augmented and on the device: photos a second"
    from resnet_fastai.augment import ColorStats
    from resnet_fastai.data import resnet_dls
    n, bs, cores = (80, 16, 2) if o.dry_run else (8000, 256, os.cpu_count())
    photos = files(o, n)
    (o.tmp/'jpegs'/'val').mkdir()
    os.link(photos[0], o.tmp/'jpegs'/'val'/'v.jpg')
    store(o.tmp/'labels.json', {p.stem: 'zigzag' for p in photos} | {'v': 'zigzag'})
    store(o.tmp/'encoding.json', dict(zigzag=0, other=1))
    stats = ColorStats([.48, .457, .408], [.2175, .0188, .0045], [[1, 0, 0], [0, 1, 0], [0, 0, 1]])
    dls = resnet_dls(o.tmp/'jpegs', o.tmp/'labels.json', o.tmp/'encoding.json', micro_bs=bs, num_workers=cores, stats=stats, size=64 if o.dry_run else 224)
    seen, start, times = 0, None, []
    for x, _ in dls.train:
        sync()
        if start is None: start = time.perf_counter()           # the workers have begun
        else: seen += len(x); times.append(time.perf_counter())
    took = time.perf_counter() - start
    return dict(photos_per_s=seen/took, photos=seen, workers=cores, per_core=seen/took/cores)


def fifty_crops(o):
    "`predict_probs` with 50 crops, from JPEGs to probabilities, ResNet-50"
    from resnet_fastai.augment import ColorStats
    from resnet_fastai.inference import predict_probs
    from resnet_fastai.model import build_net
    net = build_net('cifar_resnet8' if o.dry_run else 'resnet50', 1000).to(device()).eval()
    photos, size = files(o, 40 if o.dry_run else 400), 32 if o.dry_run else 224
    stats = ColorStats([.48, .457, .408], [.2175, .0188, .0045], [[1, 0, 0], [0, 1, 0], [0, 0, 1]])
    found = {}
    for precision in ('bf16', 'fp32'):
        predict_probs(net, photos[:20], stats, size, precision=precision)
        sync()
        start = time.perf_counter()
        predict_probs(net, photos[:4] if o.dry_run else photos, stats, size, precision=precision)
        found[precision] = dict(photos_per_s=(4 if o.dry_run else len(photos))/(time.perf_counter() - start))
        o.note(**found)
    return found


# --- A step's own process

def me(o, step): return [sys.executable, '-W', 'ignore', str(Path(__file__).resolve()), '--step', step, '--work', str(o.work), *['--dry-run'][:o.dry_run]]


def child(o):
    "Run one step; leave its figures, or its traceback"
    file = o.work/'steps'/f'{o.name or o.step}.json'
    if not o.tmp: shutil.rmtree(o.work/'tmp'/(o.name or o.step), ignore_errors=True)
    o.tmp = Path(o.tmp) if o.tmp else o.work/'tmp'/(o.name or o.step)
    o.tmp.mkdir(parents=True, exist_ok=True)
    noted = {}
    def note(**figures): store(file, noted.update(figures) or dict(noted, ok=None))
    o.note = note
    if o.dry_run:
        import torch
        torch.set_num_threads(1)
        compiled = torch.nn.Module.compile                     # its C++ alone would take minutes here
        torch.nn.Module.compile = lambda self: compiled(self, backend='aot_eager')
    try: found = globals()[o.step](o)
    except Exception as e:
        store(file, dict(noted, ok=False, error=f'{type(e).__name__}: {e}'[:500], traceback=traceback.format_exc()[-4000:]))
        raise
    if o.step not in ('rank', 'resume_child'): store(file, dict(noted, **(found or {}), ok=True))


# --- The whole

class Whole:
    "The order of the steps, their time limits, and what is known so far"
    def __init__(self, o):
        self.o, self.end, self.stopped, self.children, self.env = o, time.monotonic() + 60*o.minutes, False, [], {}
        self.file = o.work/'gpu.json'
        for f in (o.out, o.resume): self.take(f)
        self.known = load(self.file) or dict(steps={}, rates={}, cifar={})
        self.known |= dict(command=' '.join(['python', 'benchmarks/gpu.py', *sys.argv[1:]]), commit=commit(), dry_run=o.dry_run)
        self.bundled = 0

    def take(self, folder):
        "What an earlier call has left"
        if not folder or not (folder/'gpu.json').exists() or self.file.exists(): return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder/'gpu.json', self.file)
        for tar in sorted(folder.glob('runs-*.tar')):
            with tarfile.open(tar) as t: t.extractall(self.o.work, **({'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}))

    def left(self): return self.end - time.monotonic()

    def keep(self):
        store(self.file, self.known)
        store(self.o.out/'gpu.json', self.known)

    @contextmanager
    def mps(self):
        "NVIDIA's service that lets kernels of several processes run at the same time; only with --mps, in a folder of its own"
        control, place = shutil.which('nvidia-cuda-mps-control'), self.o.work/'mps'
        if not self.o.mps or not control: return (yield)
        place.mkdir(parents=True, exist_ok=True)
        self.env = dict(CUDA_MPS_PIPE_DIRECTORY=str(place), CUDA_MPS_LOG_DIRECTORY=str(place))
        try:
            subprocess.run([control, '-d'], env=os.environ | self.env, timeout=20)
            yield
        finally:
            with suppress(subprocess.SubprocessError): subprocess.run([control], input='quit\n', text=True, env=os.environ | self.env, timeout=20)
            self.env = {}

    def start(self, step, name, *more):
        log = self.o.work/'logs'/f'{name}.txt'
        log.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError): (self.o.work/'steps'/f'{name}.json').unlink()
        env = os.environ | dict(MPLBACKEND='Agg', PYTHONPATH=os.pathsep.join([str(root), *filter(None, [os.environ.get('PYTHONPATH')])]),
                                FASTAI_HOME=str(self.o.work/'fastai')) | self.env
        with open(log, 'w') as f:
            p = subprocess.Popen([*me(self.o, step), '--name', name, *map(str, more)], stdout=f, stderr=subprocess.STDOUT, env=env, cwd=root, start_new_session=True)
        p.name, p.log, p.began = name, log, time.monotonic()
        self.children.append(p)
        return p

    def stop(self, p, seconds=20):
        "Ask it to end; insist where that does not help"
        for sig, wait in ((signal.SIGTERM, seconds), (signal.SIGKILL, 10)):
            if p.poll() is not None: break
            with suppress(ProcessLookupError, PermissionError): os.killpg(p.pid, sig) if sig == signal.SIGKILL else p.send_signal(sig)
            with suppress(subprocess.TimeoutExpired): p.wait(wait)

    def result(self, p, limit=None):
        "What a step that has ended left behind"
        found, tail = load(self.o.work/'steps'/f'{p.name}.json') or {}, p.log.read_text(errors='replace')[-3000:]
        if found.get('ok') is None and p.returncode != 0 or not found:
            found |= dict(ok=False, error=f'more than {limit:.0f} s' if limit else f'ended with {p.returncode}', output=tail)
        self.children.remove(p)
        return dict(found, took=round(time.monotonic() - p.began, 1))

    def steps(self, wanted, at_a_time):
        "Run steps, so many side by side, each within its limit"
        queue = [(n, s) for n, s in wanted.items() if self.o.only is None or n in self.o.only]
        queue, going = [(n, s) for n, s in queue if n not in self.known['steps'] or self.o.again and not self.known['steps'][n].get('ok')], {}
        while (queue or going) and not self.stopped:
            while queue and len(going) < at_a_time and self.left() > 30:
                name, seconds = queue.pop(0)
                going[self.start(name, name)] = min(seconds*(10 if self.o.dry_run else 1), self.left() - 5)      # the processor may be busy
            if not going: break
            time.sleep(.1)
            for p, limit in list(going.items()):
                late = time.monotonic() - p.began > limit
                if late: self.stop(p, 2)
                if p.poll() is None: continue
                del going[p]
                self.known['steps'][p.name] = found = self.result(p, limit if late else None)
                self.keep()
                print(f"{p.name:<22} {'works' if found['ok'] else 'FAILS'} {found['took']:6.1f} s   {found.get('error', '')[:90]}", flush=True)
        for p in going: self.stop(p, 2)

    # CIFAR-10

    def rate(self, kind, depth, precision, how, n=1):
        "Updates a second of n equal networks side by side: of all together; None where it fails"
        key = f'{n} × {kind}-{depth}, {precision}, {how}' + (', MPS' if self.env else '')
        if key not in self.known['rates']:
            if self.left() < 45 or self.stopped: return None
            tmp = self.o.work/'tmp'/f'rate-{key}'
            shutil.rmtree(tmp, ignore_errors=True)
            going = [self.start('rate', f'rate-{n}-{kind}{depth}-{precision}-{how}-{i}', '--arg', f'{kind},{depth},{precision},{how},{n},{i}', '--tmp', tmp) for i in range(n)]
            until = time.monotonic() + min(900 if self.o.dry_run else 90, self.left() - 10)
            while any(p.poll() is None for p in going) and time.monotonic() < until and not self.stopped and not any(p.returncode for p in going): time.sleep(.05)
            for p in going: self.stop(p, 1)
            each = [self.result(p) for p in going]
            ok = all(e['ok'] for e in each)
            self.known['rates'][key] = dict(ok=ok, updates_per_s=sum(e['updates_per_s'] for e in each), ms=sum(e['ms'] for e in each)/n,
                                            without_graph=each[0]['without_graph']) if ok else dict(next(e for e in each if not e['ok']))
            self.keep()
            r = self.known['rates'][key]
            print(f"{key:<34} " + (f"{r['updates_per_s']:8.1f} updates/s together, {r['ms']:.2f} ms each" if ok else f"FAILS {r.get('error')}"), flush=True)
        return self.known['rates'][key].get('updates_per_s')

    def choose(self):
        "The precision and the way that are faster, and how many networks at a time: the fewest that reach nine tenths of the best"
        if 'choice' in self.known: return
        small_, deep = (8, 14) if self.o.dry_run else (20, 56)
        if not self.o.dry_run: self.rate('resnet', small_, 'bf16', 'eager')
        both = {p: self.rate('resnet', small_, p, 'graph') or 0 for p in ('fp32', 'bf16')}
        if not self.o.dry_run: self.rate('resnet', deep, 'bf16', 'graph')
        precision = 'bf16' if both['bf16'] > 1.1*both['fp32'] else 'fp32'    # the paper's precision, unless the other one is clearly faster
        ways = {how: self.rate('resnet', small_, precision, how) or 0 for how in ('graph', 'compiled graph')}
        how = 'compiled graph' if ways['compiled graph'] > 1.2*ways['graph'] else 'graph'
        together = {n: self.rate('resnet', small_, precision, how, n) or 0 for n in ((1, 2) if self.o.dry_run else side_by_side)}
        if not any(together.values()) and self.left() < 60: return
        best = max(together.values())
        self.known['choice'] = dict(precision=precision, how=how, at_a_time=min(n for n, r in together.items() if r >= .9*best))
        self.keep()
        print(f"CIFAR-10 runs: {self.known['choice']}", flush=True)

    def look(self, name):
        "What a run has reached, by its own file"
        r = load(self.o.work/'results'/f'{name}.json')
        if not r: return self.known['cifar'].get(name, dict(updates_done=0))
        last = r['epochs'][-1] if r['epochs'] else {}
        return {k: r.get(k) for k in ('kind', 'depth', 'seed', 'precision', 'updates', 'updates_done', 'seconds', 'commit', 'machine', 'data', 'command')} \
            | {k: last.get(k) for k in ('top1_error', 'train_error', 'valid_loss', 'train_loss')}

    def cifar(self):
        "Whole runs, until the time is over"
        choice, queue, going = self.known['choice'], [], {}
        for kind, depth, seed in ([('resnet', 8, 0), ('plain', 8, 0)] if self.o.dry_run else runs):
            if self.look(f'{kind}{depth}-{seed}').get('updates_done', 0) < (20 if self.o.dry_run else 64_000): queue.append((kind, depth, seed))
        failed = 0
        while (queue or going) and self.left() > 25 and not self.stopped and failed < 3:
            while queue and len(going) < choice['at_a_time'] and self.left() > 40:
                kind, depth, seed = queue.pop(0)
                name = f'{kind}{depth}-{seed}'
                going[self.start('run', name, '--arg', f"{kind},{depth},{seed},{choice['precision']},{choice.get('how', 'graph')}", '--cifar', self.o.cifar)] = name
            if not going: break
            time.sleep(.5)
            for p, name in list(going.items()):
                self.known['cifar'][name] = self.look(name)
                if p.poll() is None: continue
                del going[p]
                found = self.result(p)
                self.known['cifar'][name] = self.look(name) | ({} if found['ok'] else {k: found.get(k) for k in ('error', 'traceback', 'output')})
                failed += not found['ok']
                print(f"{name:<22} {self.line(self.known['cifar'][name])}", flush=True)
            self.bundle(every=45)
        for p in going: p.send_signal(signal.SIGTERM)           # all at once: each writes its checkpoint
        for p, name in going.items():
            self.stop(p, max(self.left() - 6, 3))
            self.children.remove(p)
            self.known['cifar'][name] = self.look(name)
            print(f"{name:<22} {self.line(self.known['cifar'][name])}; goes on in the next call", flush=True)
        self.bundle()

    def line(self, r):
        if r.get('error'): return f"FAILS {r['error'][:100]}"
        if not r.get('updates_done'): return 'no epoch yet'
        return f"{r['updates_done']:6,} updates, error {r['top1_error']:.2%}, training error {r['train_error']:.2%}, {r['seconds']:.0f} s"

    def bundle(self, every=0):
        "gpu.json and runs-*.tar anew: epochs of all runs, and of each the newest checkpoint; none above 15 MB, which mail and forms take"
        self.keep()
        if time.monotonic() - self.bundled < every: return
        self.bundled = time.monotonic()
        found = sorted((self.o.work/'results').glob('*.json'))
        for folder in sorted((self.o.work/'runs').glob('*')): found += [*folder.glob('history.csv'), *sorted(folder.glob('checkpoint-*.pt'))[-1:]]
        parts, room = [[]], 15e6
        for f in found:
            with suppress(OSError):                            # a checkpoint may just have been replaced by a newer one
                size = f.stat().st_size + 2048
                if parts[-1] and size > room: parts, room = [*parts, []], 15e6
                parts[-1].append(f)
                room -= size
        for i, files_ in enumerate(parts, 1):
            part = self.o.out/f'.runs-{i}.tar'
            with tarfile.open(part, 'w') as t:
                for f in files_:
                    with suppress(OSError): t.add(f, f.relative_to(self.o.work))
            part.replace(self.o.out/f'runs-{i}.tar')
        for f in self.o.out.glob('runs-*.tar'):
            if int(f.stem[5:]) > len(parts): f.unlink()

    def table(self):
        "What was found, for people"
        k, out = self.known, []
        m = k['steps'].get('machine', {})
        out.append(f"{m.get('gpu') or 'no GPU'}, {m.get('cores')} cores, torch {m.get('torch')}, commit {k['commit']}{', DRY RUN: no figure below means anything' if k['dry_run'] else ''}")
        for name in checks:
            s = k['steps'].get(name)
            out.append(f"  {name:<22} {'not run' if s is None else 'works' if s['ok'] else 'FAILS: ' + s.get('error', '')[:100]}")
        for name in ('train_step', 'train_step_compiled'):
            for loop, r in k['steps'].get(name, {}).get('loops', {}).items():
                more = [f"MFU {r['mfu']:.1%}"] if r.get('mfu') else []
                more += [f"{v:.3f} of {n[8:]}" for n, v in r.items() if n.startswith('against_')] + ([f"{r['memory_gb']:.1f} GB"] if r.get('memory_gb') else [])
                out.append(f"  {loop:<40} {r['photos_per_s']:9,.0f} photos/s  {', '.join(more)}")
        for name in ('loader', 'fifty_crops'):
            s = k['steps'].get(name) or {}
            for what, r in ([(name, s)] if 'photos_per_s' in s else [(f'{name}, {p}', r) for p, r in s.items() if isinstance(r, dict)]):
                out.append(f"  {what:<40} {r['photos_per_s']:9,.1f} photos/s")
        for key, r in k['rates'].items():
            if r['ok']: out.append(f"  {key:<40} {r['updates_per_s']:9,.1f} updates/s, {r['ms']:.2f} ms")
        for name, r in k['cifar'].items(): out.append(f"  {name:<22} {self.line(r)}")
        return '\n'.join(out)

    def run(self):
        for s in (signal.SIGTERM, signal.SIGINT): signal.signal(s, lambda *_: setattr(self, 'stopped', True))
        self.steps(dict(machine=60), 1)
        if not self.o.dry_run and not self.known['steps']['machine'].get('gpu'):
            sys.exit(f"no GPU was found: {self.known['steps']['machine'].get('error') or 'torch.cuda.is_available() is False'}; "
                     "--dry-run tries everything in small on the processor")
        parts = self.o.parts
        if 'checks' in parts: self.steps(checks, 2 if self.o.dry_run else 4)
        if 'rates' in parts: self.steps(rates, 1)
        if 'cifar' in parts and not self.stopped:
            with self.mps():
                self.choose()
                if not self.o.cifar and not self.o.dry_run: print('no CIFAR-10: give its folder by --cifar', flush=True)
                elif 'choice' in self.known: self.cifar()
        for p in list(self.children): self.stop(p, 2)
        self.bundle()
        (self.o.out/'table.txt').write_text(self.table() + '\n')
        print(self.table())


def commit():
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.check_output(['git', 'rev-parse', '--short', 'HEAD'], cwd=root, text=True, stderr=subprocess.DEVNULL).strip()
    return 'unknown'


def cifar_folder(o):
    "Where CIFAR-10 is; two halves of a folder are put together"
    for f in (root.parent/'shared'/'data'/'cifar10', root/'.gpu'/'cifar10'):
        if (f/'test.webp').exists(): return f
    halves = [root/'.gpu'/h for h in ('c1', 'c2')]
    if not all(h.is_dir() for h in halves): return None
    (whole := o.work/'cifar10').mkdir(parents=True, exist_ok=True)
    for h in halves:
        for f in h.iterdir():
            if not (whole/f.name).exists(): shutil.copyfile(f, whole/f.name)
    return whole


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--minutes', type=float, help='after which it has ended; default: 12, and 60 with --dry-run')
    p.add_argument('--out', type=Path, help='gpu.json, runs-*.tar and table.txt; default: runs/gpu, and runs/gpu-dry with --dry-run')
    p.add_argument('--work', type=Path, help='checkpoints, logs and photos; default: runs/gpu-work, runs/gpu-dry-work')
    p.add_argument('--resume', type=Path, help='a folder with gpu.json and runs-*.tar of an earlier call')
    p.add_argument('--cifar', type=Path, help='CIFAR-10, in any layout that nbs/experiments/cifar10.py reads')
    p.add_argument('--parts', nargs='+', choices=['checks', 'rates', 'cifar'], default=['checks', 'rates', 'cifar'])
    p.add_argument('--only', nargs='+', help=f'of the checks and rates these: {", ".join([*checks, *rates])}')
    p.add_argument('--again', action='store_true', help='also what failed in an earlier call')
    p.add_argument('--mps', action='store_true', help="CIFAR-10's processes share the GPU by NVIDIA's MPS, where it is installed")
    p.add_argument('--dry-run', action='store_true', help='in small, on the processor')
    for hidden in ('--step', '--name', '--arg', '--tmp'): p.add_argument(hidden, help=argparse.SUPPRESS)
    o = p.parse_args()
    o.work = (o.work or root/'runs'/('gpu-dry-work' if o.dry_run else 'gpu-work')).resolve()
    if o.step: return child(o)
    o.minutes = o.minutes or (60 if o.dry_run else 12)
    o.out = (o.out or root/'runs'/('gpu-dry' if o.dry_run else 'gpu')).resolve()
    o.out.mkdir(parents=True, exist_ok=True)
    o.only = o.only and {*o.only, 'machine'}
    o.cifar = o.cifar or cifar_folder(o)
    Whole(o).run()


if __name__ == '__main__': main()
