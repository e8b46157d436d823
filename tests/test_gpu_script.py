"""benchmarks/gpu.py: what it does about steps that fail, hang or die, that it goes on where it was, and its dry run.

The dry run must not need a package that a bare machine with PyTorch and fastai lacks: an import of any other is refused."""
import json
import os
import re
import subprocess
import sys
import tarfile
import textwrap
import time
from importlib import metadata
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import pytest

from patience import until

root = Path(__file__).resolve().parent.parent
script = root/'benchmarks'/'gpu.py'

# What is there beside Python itself: PyTorch and torchvision with what they need; numpy, pandas, matplotlib, scipy, scikit-learn, pillow,
# safetensors, typer, rich, requests, pyyaml with theirs; fastai with its own
there = """torch torchvision torchgen functorch triton sympy mpmath networkx jinja2 markupsafe fsspec filelock typing_extensions setuptools
pkg_resources _distutils_hack cuda numpy pandas dateutil pytz tzdata six matplotlib mpl_toolkits pylab contourpy cycler fontTools kiwisolver
packaging pyparsing PIL scipy sklearn joblib threadpoolctl cloudpickle narwhals safetensors typer click shellingham rich markdown_it mdurl
pygments annotated_doc requests urllib3 idna certifi charset_normalizer yaml fastai fastcore fastdownload fasttransform fastprogress plum
beartype simplejpeg pydantic pydantic_core annotated_types typing_inspection resnet_fastai benchmarks cifar10""".split()


def needed(dist, seen=None):
    "A distribution, those that it needs, and so on"
    seen = {dist} if seen is None else seen
    try: wants = [re.match(r'[\w.-]+', r)[0].lower() for r in metadata.requires(dist) or [] if 'extra ==' not in r]
    except metadata.PackageNotFoundError: return seen
    for w in {*wants} - seen: needed(w, seen.add(w) or seen)
    return seen


# the machine has fastprogress 1.0; later ones draw their bars by fasthtml
bars = needed('python-fasthtml') if int(metadata.version('fastprogress').split('.')[1]) > 0 else set()
there += [top for top, dists in metadata.packages_distributions().items() if {d.lower() for d in dists} & bars]
refuse = f"""
import sys
class Only:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        top = name.split('.')[0]
        known = top in sys.stdlib_module_names or top in {there!r} or top.startswith('_') or top.endswith('__mypyc')
        return self.finder.find_spec(name, path, target) if known else None
sys.meta_path[:] = [Only(f) for f in sys.meta_path]
"""


@pytest.fixture
def gpu(monkeypatch):
    spec = spec_from_file_location('gpu_script', script)
    module = module_from_spec(spec)
    monkeypatch.setattr(sys, 'path', ['', *sys.path[1:]])
    spec.loader.exec_module(module)
    return module


def whole(gpu, tmp_path, monkeypatch, steps, minutes=600., **kw):
    "A `Whole` whose steps are these lines of Python"
    o = SimpleNamespace(minutes=minutes, out=tmp_path/'out', work=tmp_path/'work', resume=None, only=None, again=False, dry_run=False, mps=False,
                        cifar=None, parts=['checks'])
    vars(o).update(kw)
    o.out.mkdir(exist_ok=True)
    head = f'import json, os, signal, sys, time\nfile = {str(o.work/"steps")!r} + "/" + sys.argv[-1] + ".json"\n' \
           'def leave(**found):\n    os.makedirs(os.path.dirname(file), exist_ok=True)\n    open(file, "w").write(json.dumps(found))\n'
    monkeypatch.setattr(gpu, 'me', lambda o, step: [sys.executable, '-c', head + textwrap.dedent(steps[step])])
    return gpu.Whole(o)


def test_a_step_that_fails_dies_or_hangs_is_told_and_the_rest_goes_on(gpu, tmp_path, monkeypatch):
    steps = dict(good='leave(ok=True, n=3)', bad='leave(ok=False, error="ValueError: no")\nsys.exit(1)', dead='os.kill(os.getpid(), signal.SIGKILL)',
                 silent='print("nothing left")', half='leave(ok=None, n=4)\nos._exit(3)', hangs='leave(ok=None, n=5)\ntime.sleep(1000)',
                 deaf='signal.signal(signal.SIGTERM, signal.SIG_IGN)\nleave(ok=None, n=6)\ntime.sleep(1000)')
    w = whole(gpu, tmp_path, monkeypatch, steps)
    begin = w.start
    def start(step, name):
        p, left = begin(step, name), tmp_path/'work'/'steps'/f'{name}.json'
        if name in ('hangs', 'deaf'):                               # its time begins when it hangs, however slow the machine
            until(lambda: p.poll() is not None or left.exists() and left.read_text())
            p.began = time.monotonic()
        return p
    w.start = start
    w.steps({n: 3600 for n in steps} | dict(hangs=1, deaf=1), 3)
    known = json.loads((tmp_path/'out'/'gpu.json').read_text())['steps']
    assert known.keys() == steps.keys() and [n for n in steps if known[n]['ok']] == ['good']
    assert known['good']['n'] == 3 and known['bad']['error'] == 'ValueError: no'
    assert known['dead']['error'] == 'ended with -9' and 'nothing left' in known['silent']['output']
    assert known['half']['n'] == 4 and known['half']['error'] == 'ended with 3'
    assert known['hangs']['n'] == 5 and known['hangs']['error'].startswith('more than 1 s') and known['deaf']['n'] == 6
    assert not w.children


def test_the_next_call_does_what_is_left(gpu, tmp_path, monkeypatch):
    mark = tmp_path/'count'
    steps = {n: f'open({str(mark)!r}, "a").write({n!r})\nleave(ok={n != "b"})' for n in 'abc'}
    whole(gpu, tmp_path, monkeypatch, steps).steps(dict(a=3600, b=3600), 1)
    assert mark.read_text() == 'ab'
    whole(gpu, tmp_path, monkeypatch, steps).steps(dict(a=3600, b=3600, c=3600), 1)
    assert mark.read_text() == 'abc'                            # what failed is not tried again
    whole(gpu, tmp_path, monkeypatch, steps, again=True).steps(dict(a=3600, b=3600, c=3600), 1)
    assert mark.read_text() == 'abcb'
    # on a machine that has forgotten everything, from the files that came back
    w = whole(gpu, tmp_path, monkeypatch, steps, work=tmp_path/'other', out=tmp_path/'new', resume=tmp_path/'out')
    w.steps(dict(a=3600, b=3600, c=3600), 1)
    assert mark.read_text() == 'abcb' and {*w.known['steps']} == {*'abc'}


def test_no_step_begins_when_the_time_is_over(gpu, tmp_path, monkeypatch):
    w = whole(gpu, tmp_path, monkeypatch, dict(a='leave(ok=True)'), minutes=.4)
    w.steps(dict(a=3600), 1)
    assert not w.known['steps']


run = '''
name, folder = sys.argv[-1], {work!r}
name = sys.argv[sys.argv.index('--name') + 1]
kind, depth, seed, precision, how = sys.argv[sys.argv.index('--arg') + 1].split(',')
os.makedirs(folder + '/results', exist_ok=True), os.makedirs(folder + '/runs/' + name, exist_ok=True)
was = folder + '/results/' + name + '.json'
done = json.load(open(was))['updates_done'] if os.path.exists(was) else 0
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
while done < 64000 and not stop:
    done += 8000
    epoch = dict(top1_error=.1, train_error=.05, valid_loss=1., train_loss=1.)
    open(was + '.part', 'w').write(json.dumps(dict(kind=kind, depth=int(depth), seed=int(seed), updates_done=done, seconds=1., epochs=[epoch])))
    os.replace(was + '.part', was)
    open(folder + f'/runs/{{name}}/checkpoint-{{done:09}}-epoch.pt', 'w').write(str(done))
    while name == 'plain20-0' and done == 16000 and not stop: time.sleep(.02)
sys.exit(-15 if stop else 0)
'''


def test_runs_are_stopped_in_time_bundled_and_gone_on_with(gpu, tmp_path, monkeypatch):
    steps = dict(run='import sys\n' + run.format(work=str(tmp_path/'work')))
    monkeypatch.setattr(gpu, 'runs', [('resnet', 20, 0), ('plain', 20, 0)])
    w = whole(gpu, tmp_path, monkeypatch, steps)
    w.known['choice'] = dict(precision='bf16', at_a_time=2)
    result = w.result
    def ended(p, limit=None):
        w.stopped = True                                        # as SIGTERM does; the other run is in the middle then
        return dict(result(p), ok=True)
    w.result = ended
    w.cifar()
    known = json.loads((tmp_path/'out'/'gpu.json').read_text())['cifar']
    assert known['resnet20-0']['updates_done'] == 64_000 and known['plain20-0']['updates_done'] < 64_000
    with tarfile.open(tmp_path/'out'/'runs-1.tar') as t: names = t.getnames()
    assert sorted(n for n in names if n.endswith('.json')) == ['results/plain20-0.json', 'results/resnet20-0.json']
    assert 'runs/resnet20-0/checkpoint-000064000-epoch.pt' in names and len([n for n in names if 'resnet20-0/check' in n]) == 1
    # elsewhere, from the bundle
    new = whole(gpu, tmp_path, monkeypatch, dict(run='import sys\n' + run.format(work=str(tmp_path/'other')).replace("== 16000", "== -1")), work=tmp_path/'other',
                out=tmp_path/'new', resume=tmp_path/'out')
    assert (tmp_path/'other'/'runs'/'resnet20-0'/'checkpoint-000064000-epoch.pt').exists()
    started, begin = [], new.start
    def start(step, name, *more): started.append(name); return begin(step, name, *more)
    new.start, whole_result = start, new.result
    new.result = lambda p, limit=None: dict(whole_result(p), ok=True)
    new.cifar()
    assert started == ['plain20-0'] and new.known['cifar']['plain20-0']['updates_done'] == 64_000


def test_the_refusal_refuses(tmp_path):
    (tmp_path/'sitecustomize.py').write_text(refuse)
    run = lambda name: subprocess.run([sys.executable, '-c', f'import {name}'], env=os.environ | dict(PYTHONPATH=str(tmp_path))).returncode
    assert run('hypothesis') == run('nbdev') == 1 and run('numpy') == run('json') == 0


def call(tmp_path, *args):
    (block := tmp_path/'block').mkdir(exist_ok=True)
    (block/'sitecustomize.py').write_text(refuse)
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(block), str(root)]), MPLBACKEND='Agg', OMP_NUM_THREADS='1')
    return subprocess.run([sys.executable, '-W', 'ignore', script, '--work', tmp_path/'work', '--out', tmp_path/'out', *args],
                          cwd=tmp_path, env=env, capture_output=True, text=True)


def test_the_dry_run_of_three_steps(tmp_path):
    "A check, graphs, and a run of CIFAR-10; all of them: `python benchmarks/gpu.py --dry-run`"
    (tmp_path/'work').mkdir()
    (tmp_path/'work'/'gpu.json').write_text(json.dumps(dict(steps={}, rates={}, cifar={}, choice=dict(precision='fp32', at_a_time=2))))
    done = call(tmp_path, '--dry-run', '--parts', 'checks', 'cifar', '--only', 'graph', 'predict')
    assert done.returncode == 0, done.stdout + done.stderr
    known = json.loads((tmp_path/'out'/'gpu.json').read_text())
    assert {n: s['ok'] for n, s in known['steps'].items()} == dict(machine=True, graph=True, predict=True), done.stdout
    assert known['steps']['graph']['same_to_the_bit'] and known['steps']['graph']['replays'] > 8
    assert known['dry_run'] and {n: r['updates_done'] for n, r in known['cifar'].items()} == {'resnet8-0': 20, 'plain8-0': 20}, known['cifar']
    assert 'DRY RUN' in (tmp_path/'out'/'table.txt').read_text()
    assert [p.name for p in sorted((tmp_path/'out').iterdir())] == ['gpu.json', 'runs-1.tar', 'table.txt']
    again = call(tmp_path, '--dry-run', '--parts', 'checks', 'cifar', '--only', 'graph', 'predict')
    assert again.returncode == 0 and 'works' not in again.stdout.split('\n')[0]                  # all was done already


def test_without_a_gpu_it_says_so(tmp_path):
    import torch
    if torch.cuda.is_available(): pytest.skip('there is a GPU')
    done = call(tmp_path, '--parts', 'checks')
    assert done.returncode == 1 and 'no GPU was found' in done.stderr and '--dry-run' in done.stderr


def test_the_imagenet_page_reads_what_the_script_writes(tmp_path):
    nb = json.loads((root/'nbs'/'experiments'/'imagenet.ipynb').read_text(encoding='utf-8'))
    cell = next(''.join(c['source']) for c in nb['cells'] if 'def measured_gpu(' in ''.join(c['source']))
    scope = dict(json=json, Path=Path)
    exec(cell[:cell.index('\nfound = ')], scope)
    def asked(value):
        (tmp_path/'gpu.json').write_text(json.dumps(value))
        return scope['measured_gpu'](tmp_path/'gpu.json')
    loops = {"bare, torchvision's network": dict(photos_per_s=9.), 'ours': dict(photos_per_s=5.)}
    known = dict(dry_run=False, steps=dict(machine=dict(gpu='H100'), train_step=dict(ok=True, loops=loops)))
    assert scope['measured_gpu'](tmp_path/'none.json') is None and asked(known | dict(dry_run=True)) is None
    assert asked(known) == (5., 'H100') and asked(dict(dry_run=False, steps=dict(machine=dict(gpu='H100')))) is None
    known['steps']['train_step_compiled'] = dict(ok=True, loops={'ours, compiled': dict(photos_per_s=7.)})
    assert asked(known) == (7., 'H100')
