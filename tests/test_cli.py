"""The command `resnet-fastai`, as a shell sees it: exit codes, what goes where, what a signal leaves behind.

Importing torch and fastai takes seconds, so one process imports them and forks a process for each command: its own descriptors, folder,
signals and exit code, and none of the imports. `python test_cli.py` is that process."""
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from inspect import signature
from pathlib import Path

import pytest

from patience import until

commands = ['demo', 'split', 'check', 'stats', 'train', 'resume', 'evaluate', 'choose', 'predict', 'calibrate', 'export', 'app']
small = '--arch cifar_resnet8 --size 32 --bs 8 --num-workers 0'.split()
labelled = ['photos', 'photos/labels.json', 'photos/encoding.json']


def hold(*places):
    "Before the checkpoint of each of these batches, wait for a file held-N or a signal: no machine is too quick or too slow for the test"
    from resnet_fastai.training import Checkpoint
    save, left = Checkpoint.save, list(places)
    def held(self, *args):
        while left and self.batches >= left[0] and not self.stopping:
            if os.path.exists(f'held-{left[0]}'): left.pop(0)
            time.sleep(.01)
        save(self, *args)
    Checkpoint.save = held


def serve():
    "Fork a process for each line of stdin, tell its number, then how it ended"
    import torch
    import resnet_fastai.core  # noqa: F401
    import resnet_fastai.practice.prepare  # noqa: F401
    from resnet_fastai.practice.cli import main
    torch.set_num_threads(1)                                    # no threads that a fork would lack
    for line in sys.stdin:
        job = json.loads(line)
        if not (pid := os.fork()):
            code = 1
            try:
                os.setsid()
                os.chdir(job['cwd'])
                for fd, path in (0, os.devnull), (1, job['out']), (2, job['err']):
                    os.dup2(os.open(path, os.O_RDWR | os.O_NOCTTY, 0o600), fd)
                for name, fd in ('stdout', 1), ('stderr', 2): setattr(sys, name, open(fd, 'w', encoding=job['encoding'], closefd=False))
                signal.signal(signal.SIGINT, signal.SIG_IGN if job['background'] else signal.default_int_handler)
                hold(*job['hold'])
                main([os.fsdecode(bytes.fromhex(a)) for a in job['args']])
            except SystemExit as e: code = e.code or 0
            except BaseException:
                import traceback
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


class Done:
    def __init__(self, code, out, err): self.code, self.out, self.err = code, out, err
    def __repr__(self): return f'exit code {self.code}\n{self.out}\n--- stderr\n{self.err}'


class Shell:
    def __init__(self, folder):
        self.folder = folder
        self.server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                       env=os.environ | dict(COLUMNS='120', PYTHONWARNINGS='ignore', MPLBACKEND='Agg'))

    def start(self, *args, background=False, tty=None, encoding='utf-8', cwd=None, hold=()):
        "Run a command, which may have to `hold`; `wait` tells how it ended"
        self.paths = [tty or str(self.folder/name) for name in ('out', 'err')]
        if not tty: [Path(p).write_text('') for p in self.paths]
        job = dict(args=[os.fsencode(a).hex() for a in args], cwd=str(cwd or self.folder), out=self.paths[0], err=self.paths[1],
                   background=background, encoding=encoding, hold=hold)
        self.server.stdin.write(json.dumps(job) + '\n')
        self.server.stdin.flush()
        self.pid = int(self.server.stdout.readline())

    def wait(self):
        code = int(self.server.stdout.readline())
        return Done(code, *(Path(p).read_text(encoding='utf-8', errors='surrogateescape') if Path(p).is_file() else '' for p in self.paths))

    def __call__(self, *args, **kwargs):
        self.start(*args, **kwargs)
        return self.wait()


@pytest.fixture(scope='module')
def shell(tmp_path_factory):
    "A folder with photos, and a process that runs commands in it"
    from resnet_fastai.data import demo_data
    folder = tmp_path_factory.mktemp('shell')
    demo_data(folder/'photos', sizes=dict(train=44, val=12, test=4))
    sh = Shell(folder)
    yield sh
    sh.server.stdin.close()
    sh.server.wait()


def checkpoints(run): return sorted(run.glob('checkpoint-*.pt'))
def batches(run): return max((int(p.stem.split('-')[1]) for p in checkpoints(run)), default=0)
def weights(model): return (model/'model.safetensors').read_bytes()
def epochs(model): return len(json.loads((model/'config.json').read_text())['history']['epoch'])


@pytest.fixture(scope='module')
def untouched(shell):
    "A model of three epochs that nobody stopped"
    done = shell('train', *labelled, '--model', 'untouched', *small, '--epochs', '3', '--every', '1')
    assert done.code == 0, done
    return shell.folder/'untouched'


# ---- help

def test_help_comes_at_once_and_is_worth_reading():
    "Without torch; the commands in the order in which a person needs them"
    code = ("import sys; from resnet_fastai.practice.cli import main\ntry: main(['--help'])\nfinally: assert not {'torch', 'fastai', 'numpy'} & {*sys.modules}")
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    listed = done.stdout.partition('Commands:')[2]
    assert [line.split()[0] for line in listed.splitlines() if line[:2] == '  ' and line.split()[0] in commands][:len(commands)] == commands
    assert all(word in listed for word in ('Exit codes', '130', 'error:'))


def test_the_version_is_that_of_the_settings():
    "And importing what trains prints nothing, whatever its own imports have to say"
    version = re.search('^version = (.+)$', (Path(__file__).resolve().parent.parent/'settings.ini').read_text(), re.M)[1]
    done = subprocess.run([sys.executable, '-m', 'resnet_fastai', '--version'], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f'resnet-fastai {version}\n', '')
    done = subprocess.run([sys.executable, '-c', 'from resnet_fastai.core import train'], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')


def test_each_command_has_an_example(shell):
    for name in commands:
        done = shell(name, '--help')
        assert done.code == 0 and f'Example: resnet-fastai {name}' in done.out, name


def test_the_defaults_are_those_of_the_library():
    from resnet_fastai.practice.cli import _train
    from resnet_fastai.core import ResNet
    ours, fit = signature(_train).parameters, signature(ResNet.fit).parameters
    theirs = dict(signature(ResNet).parameters) | {k: fit[k] for k in ('epochs', 'restore_best')}
    told = [k for k, p in ours.items() if p.default not in (p.empty, None) and k not in ('run', 'folders', 'as_json')]
    assert len(told) > 5 and {k: ours[k].default for k in told} == {k: theirs[k].default for k in told}


# ---- exit codes

@pytest.mark.parametrize('args', [
    ['paint'], ['train'], ['train', 'photos', '--model', 'm'], ['train', *labelled], ['train', *labelled, '--model', 'm', '--folders'],
    ['train', 'photos', 'photos/labels.json', '--model', 'm'], ['train', *labelled, '--model', 'm', '--epochs', 'two'],
    ['train', *labelled, '--model', 'm', '--bs', '0'], ['train', *labelled, '--model', 'm', '--precision', 'fp8'],
    ['evaluate', 'm', *labelled[:2], '--split', 'dev'], ['evaluate', 'm', *labelled[:2], '--protocol', '7crop'], ['predict', 'm'],
    ['predict', 'm', 'a.jpg', '--n', '0'], ['export', 'm', 'd', '--format', 'coreml'], ['resume', 'r', '--epochs', '-1'], ['stats'], ['app', 'm', '--min-prob', '2'], ['app'],
    ['evaluate', 'm', 'photos'], ['evaluate', 'm', *labelled[:2], '--folders'], ['check', *labelled[:2]], ['choose', 'm', 'photos'],
    ['calibrate', 'm', *labelled[:2], '--folders']])
def test_usage(shell, args):
    done = shell(*args)
    assert done.code == 2 and not done.out and 'Error: ' in done.err and 'Traceback' not in done.err, done
    assert not {p.name for p in shell.folder.iterdir()} & {'m', 'm-run', 'd', 'r'}


def refused(done, said):
    lines = done.err.splitlines()
    assert done.code == 1 and not done.out and lines and lines[-1].startswith('error: ') and said in lines[-1], done
    assert 'Traceback' not in done.err and len([line for line in lines if line.startswith('error')]) == 1


new = ['--model', 'fresh']
complaints = {
    'no data': (['check', 'nowhere', *labelled[1:]], "'nowhere' is not a folder"),
    'no splits': (['check', 'empty', *labelled[1:]], 'empty has no folder train/'),
    'no labels': (['check', 'photos', 'none.json', labelled[2]], 'none.json cannot be read'),
    'no JSON': (['check', *labelled[:2], 'text.txt'], 'text.txt is not JSON'),
    'stats of nothing': (['stats', 'empty'], 'photos'),
    'stats of no folder': (['stats', 'nowhere'], "'nowhere' is not a folder"),
    'stats over a file': (['stats', 'photos', '--save', 'text.txt'], 'text.txt exists already'),
    'stats to nowhere': (['stats', 'photos', '--save', 'nowhere/s.json'], 'nowhere is not a folder'),
    'train on nothing': (['train', 'nowhere', *labelled[1:], *new], "nowhere' is not a folder"),
    'train by swapped files': (['train', 'photos', *labelled[:0:-1], *new], 'labels.json'),
    'an unknown network': (['train', *labelled, *new, '--arch', 'vgg16'], "there is no network 'vgg16'"),
    'no colours': (['train', *labelled, *new, '--stats', 'text.txt'], 'text.txt holds no colour statistics'),
    'no class folders': (['train', 'photos', *new, '--folders'], 'photos'),
    'a model that is there': (['train', *labelled, '--model', 'untouched', '--run', 'fresh-run'], 'untouched holds a model already'),
    'a run that is there': (['train', *labelled, *new, '--run', 'untouched-run'], 'go on with: resnet-fastai resume untouched-run'),
    'a model over a file': (['train', *labelled, '--model', 'text.txt', '--run', 'fresh-run'], 'text.txt cannot be a new folder'),
    'a model right here': (['train', *labelled, '--model', '.', '--run', 'fresh-run'], '. cannot be a new folder'),
    'a model among other files': (['train', *labelled, '--model', 'precious'], 'precious holds other things already'),
    'a run among other files': (['train', *labelled, *new, '--run', 'precious'], 'precious is no empty folder'),
    'a demo among other files': (['demo', 'precious'], 'precious holds other things than a demo'),
    'an index too large': (['train', *labelled, *new, '--n-out', '7'], 'does not fit in 7 outputs'),
    'resume nothing': (['resume', 'empty'], 'empty holds no run'),
    'resume to the model of another': (['resume', 'untouched-run', '--model', 'foreign'], 'foreign holds a model already'),
    'no model': (['predict', 'empty', 'a.jpg'], 'empty'),
    'a photo that is not there': (['predict', 'untouched', 'a.jpg'], 'a.jpg'),
    'no photo in a folder': (['predict', 'untouched', 'empty'], 'empty holds no photos'),
    'a file that is no photo': (['predict', 'untouched', 'text.txt'], 'text.txt'),
    'evaluate by no labels': (['evaluate', 'untouched', 'photos', 'none.json'], 'none.json cannot be read'),
    'export of nothing': (['export', 'empty', 'fresh'], 'empty'),
    'a page of nothing': (['app', 'empty'], 'empty'),
    'a page without examples': (['app', 'untouched', '--examples', 'empty'], 'empty holds no photos'),
}


@pytest.mark.parametrize('what', complaints)
def test_a_complaint_is_a_sentence(shell, untouched, what):
    f = shell.folder
    (f/'empty').mkdir(exist_ok=True)
    (f/'text.txt').write_text('hello')
    (f/'precious').mkdir(exist_ok=True)
    for name in ('README.md', 'best.pt', 'history.csv', 'curves.png'): (f/'precious'/name).write_text('mine')
    if not (f/'foreign').exists():
        (f/'foreign').mkdir()
        for p in untouched.iterdir(): (f/'foreign'/p.name).write_bytes(p.read_bytes())
        config = json.loads((f/'foreign'/'config.json').read_text())
        config['history']['seconds'][0] += 1e-9
        (f/'foreign'/'config.json').write_text(json.dumps(config))
    args, said = complaints[what]
    was = {p: p.stat().st_mtime_ns for p in f.rglob('*') if p.name not in ('out', 'err')}
    refused(shell(*args), said)
    assert {p: p.stat().st_mtime_ns for p in f.rglob('*') if p.name not in ('out', 'err')} == was or what == 'no class folders'
    assert not (f/'fresh').exists() and not (f/'fresh-run').exists()


def test_check_says_by_its_exit_code(shell, edit, tmp_path):
    from resnet_fastai.data import demo_data
    assert shell('check', *labelled).code == 0
    paths = demo_data(tmp_path/'drawn', sizes=dict(train=8, val=4, test=0))
    edit(paths.label_path, lambda e: e | dict(train_00002='cat'))
    (paths.data_path/'val'/'val_00001.jpg').write_bytes(b'')
    done = shell('check', *map(str, paths))
    assert done.code == 1 and 'train_00002.jpg' in done.out and 'val_00001.jpg' in done.out and 'error' not in done.err
    found = json.loads(shell('check', *map(str, paths), '--json').out)['problems']
    assert {(p['problem'], p['photo']) for p in found} >= {('unknown label', 'train/train_00002.jpg')} and len(found) == 2


# ---- one JSON document

def test_json_is_all_of_stdout(shell, untouched):
    import numpy as np
    from PIL import Image
    f = shell.folder
    rgb = np.concatenate([np.asarray(Image.open(p).convert('RGB')).reshape(-1, 3) for p in sorted((f/'photos'/'train').iterdir())])/255
    done = shell('stats', 'photos', '--json', '--save', 'colors.json')
    found = json.loads(done.out)
    assert found['n_photos'] == 44 and json.loads((f/'colors.json').read_text()) == found
    np.testing.assert_allclose(found['mean'], rgb.mean(0), atol=1e-9)
    np.testing.assert_allclose(sorted(found['eigval']), np.linalg.eigvalsh(np.cov(rgb.T, bias=True)), atol=1e-9)

    done = shell('train', *labelled, '--model', 'as-json', *small, '--epochs', '2', '--json', '--stats', 'colors.json')
    found = json.loads(done.out)
    assert len(found['history']) == 2 and {'epoch', 'train_loss', 'valid_loss', 'lr'} <= {*found['history'][0]} and 'train_loss' in done.err
    done = shell('resume', found['run'], '--epochs', '3', '--json')
    assert len(json.loads(done.out)['history']) == 3 == epochs(f/'as-json')
    assert weights(f/'as-json') == weights(untouched)                     # the same colours, the same run

    found = json.loads(shell('check', *labelled, '--json').out)
    assert found == dict(problems=[])
    found = json.loads(shell('predict', 'untouched', 'photos/test', '--n', '2', '--json').out)
    assert len(found) == 4 and [len(p['labels']) for p in found] == [2]*4


# ---- no debris

def test_a_log_has_a_line_an_epoch(shell):
    done = shell('train', *labelled, '--model', 'logged', *small, '--epochs', '4')
    assert done.code == 0 and not any(c in done.out + done.err for c in '\r█\x1b') and not done.err, done
    assert [line.split()[0] for line in done.out.splitlines() if line[:1].isdigit()] == list('0123')
    assert len(done.out.splitlines()) == 7                                   # where the run is kept, names, four epochs, where the model is


def test_a_log_can_be_followed(shell):
    "Each line is there before the next epoch is over"
    shell.start('train', *labelled, '--model', 'followed', *small, '--epochs', '1000')
    until(lambda: (shell.folder/'out').read_text().count('\n') >= 4)
    os.kill(shell.pid, signal.SIGKILL)
    done = shell.wait()
    assert done.code == -9 and [line.split()[0] for line in done.out.splitlines() if line[:1].isdigit()][:2] == ['0', '1']


def test_a_terminal_has_bars(shell):
    import pty
    import threading
    main, sub = pty.openpty()
    seen = []
    def read():
        try:
            while data := os.read(main, 4096): seen.append(data)
        except OSError: pass                                     # the other end is closed
    thread = threading.Thread(target=read)
    thread.start()
    done = shell('train', *labelled, '--model', 'seen', *small, '--epochs', '1', tty=os.ttyname(sub))
    os.close(sub)
    thread.join(5)
    text = b''.join(seen).decode()
    assert done.code == 0 and '█' in text and '\r' in text and 'saved in' in text


# ---- stopped

def stopped(shell, sig, model, **how):
    "A run that got a signal in its second epoch; what it left"
    run = shell.folder/f'{model}-run'
    shell.start('train', *labelled, '--model', model, *small, '--epochs', '3', '--every', '1', hold=[9], **how)
    until(lambda: batches(run) == 8)
    os.kill(shell.pid, sig)
    done = shell.wait()
    assert checkpoints(run) and not (shell.folder/model).exists(), done
    return run, done


def resumed(shell, run, untouched, **how):
    done = shell('resume', str(run), **how)
    assert done.code == 0 and 'after 3 epochs' in done.out, done
    model = Path(str(run).removesuffix('-run'))
    assert weights(model) == weights(untouched) and epochs(model) == epochs(untouched) == 3


@pytest.mark.parametrize('sig', [signal.SIGINT, signal.SIGTERM])
def test_stopped_and_resumed(shell, untouched, sig):
    run, done = stopped(shell, sig, f'by-{sig.name}')
    newest = f'by-{sig.name}-run/{checkpoints(run)[-1].name}'
    assert done.code == 130 and done.err.splitlines()[-1] == f'stopped; {newest} holds the run; go on with: resnet-fastai resume by-{sig.name}-run', done
    assert 'Traceback' not in done.err and 'Aborted' not in done.err
    resumed(shell, run, untouched)


def test_a_background_job_obeys_sigterm_only(shell, untouched):
    run = shell.folder/'behind-run'
    shell.start('train', *labelled, '--model', 'behind', *small, '--epochs', '3', '--every', '1', background=True, hold=[3, 9])
    until(lambda: batches(run) == 2)
    os.kill(shell.pid, signal.SIGINT)
    (shell.folder/'held-3').touch()
    until(lambda: batches(run) == 8)
    os.kill(shell.pid, signal.SIGTERM)
    done = shell.wait()
    assert done.code == 130 and 'go on with' in done.err and not (shell.folder/'behind').exists(), done
    resumed(shell, run, untouched)


def test_killed_and_resumed_from_elsewhere(shell, untouched, tmp_path):
    run, done = stopped(shell, signal.SIGKILL, 'killed')
    assert done.code == -9
    resumed(shell, run, untouched, cwd=tmp_path)


def test_killed_before_the_first_checkpoint(shell, untouched):
    run = shell.folder/'early-run'
    shell.start('train', *labelled, '--model', 'early', *small, '--epochs', '3', hold=[1])
    until(lambda: (run/'args.json').exists())
    os.kill(shell.pid, signal.SIGKILL)
    assert shell.wait().code == -9
    resumed(shell, run, untouched)


@pytest.mark.parametrize('sig', [signal.SIGINT, signal.SIGTERM])
def test_stopped_before_there_is_a_run(shell, tmp_path, sig):
    "While the labels are read, from a pipe that gives none"
    os.mkfifo(tmp_path/'labels.json')
    shell.start('train', 'photos', str(tmp_path/'labels.json'), labelled[2], '--model', 'never', *small)
    def being_read():
        try: return os.open(tmp_path/'labels.json', os.O_WRONLY | os.O_NONBLOCK)
        except OSError: return False                              # nobody reads yet
    until(being_read)
    os.kill(shell.pid, sig)
    done = shell.wait()
    assert (done.code, done.out, done.err) == (130, '', 'stopped\n') and not list(shell.folder.glob('never*')), done


# ---- nothing is lost

def test_the_model_of_a_finished_run(shell, untouched, tmp_path):
    "Resumed once more it stays as it is; with more epochs it is replaced; another model is not"
    f, was = shell.folder, weights(untouched)
    run = f/'mine-run'
    assert shell('train', *labelled, '--model', 'mine', *small, '--epochs', '3').code == 0
    assert shell('resume', 'mine-run').code == 0 and weights(f/'mine') == was and epochs(f/'mine') == 3
    assert shell('resume', 'mine-run', '--epochs', '4').code == 0 and epochs(f/'mine') == 4 and json.loads((run/'args.json').read_text())['epochs'] == 4
    assert shell('resume', 'mine-run', '--epochs', '5', '--model', str(tmp_path/'longer')).code == 0
    assert epochs(tmp_path/'longer') == 5 and epochs(f/'mine') == 4


def test_a_refused_resume_changes_nothing(shell, untouched, tmp_path):
    from shutil import copytree
    copytree(shell.folder/'photos', tmp_path/'photos'); copytree(shell.folder/'untouched-run', tmp_path/'run')
    args = json.loads((tmp_path/'run'/'args.json').read_text())
    (tmp_path/'run'/'args.json').write_text(json.dumps(args | dict(data_path=str(tmp_path/'photos'))))
    next((tmp_path/'photos'/'train').iterdir()).unlink()
    was = {p: p.read_bytes() for p in (tmp_path/'run').iterdir()}
    refused(shell('resume', str(tmp_path/'run'), '--epochs', '7', '--model', str(tmp_path/'m')), 'photos')
    assert {p: p.read_bytes() for p in (tmp_path/'run').iterdir()} == was and not (tmp_path/'m').exists()


def test_an_empty_folder_is_a_place_for_a_model(shell, tmp_path):
    (tmp_path/'m').mkdir(); (tmp_path/'r').mkdir()
    done = shell('train', *labelled, '--model', str(tmp_path/'m'), '--run', str(tmp_path/'r'), *small, '--epochs', '1', '--n-out', '1005')
    assert done.code == 0 and json.loads((tmp_path/'m'/'config.json').read_text())['n_out'] == 1005, done


def test_what_helps_few_photos(shell, tmp_path):
    "Kept in the run, resumed with it, and the model has the best epoch's average; runs from before these options are resumed as well"
    few, f = '--label-smoothing .1 --mixup .4 --ema .9 --early-stopping 9 --restore-best'.split(), str(tmp_path/'m')
    done = shell('train', *labelled, '--model', f, *small, '--epochs', '1', *few)
    args = json.loads((tmp_path/'m-run'/'args.json').read_text())
    assert done.code == 0 and [args[k] for k in ('label_smoothing', 'mixup', 'cutmix', 'ema', 'early_stopping', 'restore_best')] == [.1, .4, None, .9, 9, True], done
    assert shell('resume', f'{f}-run', '--epochs', '2').code == 0 and epochs(tmp_path/'m') == 2
    config = json.loads((tmp_path/'m'/'config.json').read_text())
    assert config['training']['restored_epoch'] == min((0, 1), key=config['history']['valid_loss'].__getitem__)
    (tmp_path/'m-run'/'args.json').write_text(json.dumps(args | dict(mixup=.3)))
    refused(shell('resume', f'{f}-run', '--epochs', '3'), "'mixup': 'alpha': 0.4, you have 'mixup': 'alpha': 0.3")
    refused(shell('train', *labelled, '--model', f'{f}2', *small, '--mixup', '.4', '--cutmix', '1'), 'pass one of the two')
    assert not (tmp_path/'m2-run').exists()
    from shutil import copytree
    copytree(shell.folder/'untouched-run', tmp_path/'old-run')
    args = json.loads((tmp_path/'old-run'/'args.json').read_text())
    (tmp_path/'old-run'/'args.json').write_text(json.dumps({k: v for k, v in args.items() if k not in ('ema', 'mixup', 'restore_best', 'balance')}))
    assert shell('resume', str(tmp_path/'old-run'), '--epochs', str(args['epochs'] + 1), '--model', str(tmp_path/'old')).code == 0


@pytest.mark.parametrize('text', ['', '[]', '{}', '{"epochs": 3}', 'null'])
def test_damaged_arguments(shell, tmp_path, text):
    (tmp_path/'args.json').write_text(text)
    refused(shell('resume', str(tmp_path)), 'args.json')


def test_a_heap_is_split(shell, tmp_path):
    from PIL import Image
    rows = ['photo,label,patient']
    for i in range(20):
        (tmp_path/'heap'/'ab'[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (40, 32), (9*i, 9, 9)).save(tmp_path/'heap'/'ab'[i % 2]/f'{i}.png')
        rows.append(f"{'ab'[i % 2]}/{i}.png,{'ab'[i % 2]},p{i//4}")
    (tmp_path/'heap'/'list.csv').write_text('\n'.join(rows))
    done = shell('split', 'heap', 'photos', '--val', '.3', '--json', cwd=tmp_path)
    assert done.code == 0 and [*json.loads(done.out)[0]] == ['data_path', 'label_path', 'label_encoding'] and '14 to train on, 6 to validate' in done.err
    done = shell('split', 'heap/list.csv', 'folds', '--folds', '5', '--group', 'patient', cwd=tmp_path)
    assert done.code == 0 and [line.split()[0] for line in done.out.splitlines()] == [f'folds/fold{k}' for k in range(1, 6)]
    refused(shell('split', 'heap', 'photos', cwd=tmp_path), 'exists already')
    done = shell('train', 'heap', '--folders', '--model', 'm', *small, '--epochs', '1', '--balance', 'sampler', cwd=tmp_path)
    assert done.code == 0 and '16 to train on, 4 to validate with' in done.out                                      # no split of its own: a fifth is drawn
    assert "balance='sampler': 2 classes of 8 to 8 photos" in done.out and [*done.out.partition('label')[2].split()[:4]] == ['photos', 'share', 'turns', 'error']
    assert ['a', '8', '50.0%', '1.00'] in [line.split()[:4] for line in done.out.splitlines()]


def test_class_folders(shell, tmp_path):
    "Linked into the run, trained on, resumed; the photos stay where they are"
    labels = json.loads((shell.folder/'photos'/'labels.json').read_text())
    for split in 'train', 'val':
        for p in (shell.folder/'photos'/split).iterdir():
            (to := tmp_path/'classes'/split/labels[p.stem]).mkdir(parents=True, exist_ok=True)
            (to/p.name).write_bytes(p.read_bytes())
    was = sorted(p.relative_to(tmp_path) for p in (tmp_path/'classes').rglob('*'))
    done = shell('train', 'classes', '--folders', '--model', 'm', *small, '--epochs', '1', cwd=tmp_path)
    assert done.code == 0, done
    assert shell('resume', 'm-run', '--epochs', '2', cwd=tmp_path).code == 0 and epochs(tmp_path/'m') == 2
    assert sorted(p.relative_to(tmp_path) for p in (tmp_path/'classes').rglob('*')) == was
    shell.start('train', 'classes', '--folders', '--model', 'k', *small, '--epochs', '1', cwd=tmp_path, hold=[1])      # killed before it has
    until(lambda: (tmp_path/'k-run'/'args.json').exists())
    os.kill(shell.pid, signal.SIGKILL)
    assert shell.wait().code == -9 and shell('resume', 'k-run', cwd=tmp_path).code == 0 and epochs(tmp_path/'k') == 1
    refused(shell('train', 'classes', '--folders', '--model', 'n', *small, '--arch', 'vgg', cwd=tmp_path), 'vgg')
    assert shell('check', 'classes', '--folders', cwd=tmp_path).out.startswith('nothing is wrong')
    chosen = json.loads(shell('choose', 'm', 'classes', '--folders', '--to', 'chosen', '--json', cwd=tmp_path).out)['protocols'][0]
    assert json.loads((tmp_path/'chosen'/'config.json').read_text())['protocol'] == chosen['protocol'] and chosen['photos'] == len([*(tmp_path/'classes'/'val').glob('*/*')])
    again = shell('choose', 'm', 'classes', '--folders', cwd=tmp_path)                            # only shown
    assert again.code == 0 and again.out.splitlines()[1].split()[0] == chosen['protocol'] and 'saved' not in again.out
    refused(shell('choose', 'm', 'classes', '--folders', '--to', 'chosen', cwd=tmp_path), 'chosen holds a model already; name a new folder with --to')
    measured = json.loads(shell('evaluate', 'chosen', 'classes', '--folders', '--split', 'val', '--json', cwd=tmp_path).out)['errors'][0]
    assert measured['protocol'] == chosen['protocol'] and measured['top1_error'] == chosen['top1_error']
    cut = tmp_path/'classes'/'val'/sorted(os.listdir(tmp_path/'classes'/'val'))[0]/'cut.jpg'
    cut.write_bytes(b'\xff\xd8\xff')
    refused(shell('evaluate', 'm', 'classes', '--folders', '--split', 'val', cwd=tmp_path), str(cut.relative_to(tmp_path)))     # the photo, not a link that is gone
    refused(shell('evaluate', 'm', 'classes', '--folders', cwd=tmp_path), 'classes has no folder test/')
    for c in {*labels.values()}:                                                                   # a heap: its val/ exists among the links only
        for i in range(5):
            (p := tmp_path/'heap'/c/f'cut{i}.jpg').parent.mkdir(parents=True, exist_ok=True)
            p.write_bytes(b'\xff\xd8\xff' + f'{c}{i}'.encode())
    done = shell('evaluate', 'm', 'heap', '--folders', '--split', 'val', cwd=tmp_path)
    refused(done, "'heap/")
    assert (tmp_path/done.err.split("'")[1]).is_file()
    assert not (tmp_path/'n-run'/'data').exists()


# ---- predict

odd = ['a b.jpg', 'a\nb.jpg', '-x.jpg', 'tab\t.jpg', 'é猫.jpg', "q'uote\".jpg", '%s{}.jpg', '*.jpg', 'a.jpg\r', '\x1b[31m.jpg', 'bad\udcff.jpg']


@pytest.mark.parametrize('encoding', ['utf-8', 'ascii'])
def test_odd_names(shell, untouched, tmp_path, encoding):
    "Each photo has one line and one label, whatever it is called and whatever the terminal can show"
    photo = (shell.folder/'photos'/'test'/'test_00001.jpg').read_bytes()
    for name in odd: (tmp_path/name).write_bytes(photo)
    done = shell('predict', str(untouched), '--', *odd, cwd=tmp_path, encoding=encoding)
    lines = done.out.split('\n')
    assert done.code == 0 and len(lines) == len(odd) + 1 and not any(c in done.out for c in '\x1b\t\r'), done
    assert len({tuple(line.split()[-2:]) for line in lines[:-1]}) == 1 and len(set(lines)) == len(lines)
    assert all(len(line) == len(lines[0]) for line in lines[:-1]) or encoding == 'ascii'
    found = json.loads(shell('predict', str(untouched), '--json', '--', *odd, cwd=tmp_path, encoding=encoding).out)
    assert [p['photo'] for p in found] == odd


def test_predict_is_the_library(shell, untouched):
    from resnet_fastai.core import ResNet
    photo = shell.folder/'photos'/'test'/'test_00002.jpg'
    expected = ResNet.load(untouched).predict_n(photo, 3)
    done = shell('predict', 'untouched', str(photo), '--n', '3')
    found = [line.split(None, 1) for line in done.out.splitlines()]
    assert [label for _, label in found] == [label for label, _ in expected]
    assert [float(p) for p, _ in found] == pytest.approx([p for _, p in expected], abs=6e-5)
    assert len(shell('predict', 'untouched', str(photo)).out.splitlines()) == 1
    assert len(shell('predict', 'untouched', str(photo), '--n', '999').out.splitlines()) == 8


def test_some_photos_cannot_be_read(shell, untouched, tmp_path):
    whole = (shell.folder/'photos'/'test'/'test_00001.jpg').read_bytes()
    (tmp_path/'good.jpg').write_bytes(whole)
    (tmp_path/'cut.jpg').write_bytes(whole[:400])
    good, cut, gone = (str(tmp_path/n) for n in ('good.jpg', 'cut.jpg', 'gone.jpg'))
    done = shell('predict', 'untouched', cut, good, gone)
    assert done.code == 3 and len(done.out.splitlines()) == 1 and good in done.out
    assert [line[:6] for line in done.err.splitlines()] == ['error:']*2 and 'cut.jpg' in done.err and 'gone.jpg' in done.err
    done = shell('predict', 'untouched', cut, good, '--json')
    found = json.loads(done.out)
    assert done.code == 3 and not found[0]['labels'] and 'cut.jpg' in found[0]['error'] and len(found[1]['labels']) == 1 and found[1]['error'] is None
    assert shell('predict', 'untouched', cut, gone).code == 1
    done = shell('predict', 'untouched', str(tmp_path), '--n', '2', '--csv', 'found.csv')
    with open(shell.folder/'found.csv', newline='') as f: rows = list(csv.DictReader(f))
    assert done.code == 3 and [r['id'] for r in rows] == ['cut.jpg', 'good.jpg'] and 'cut.jpg' in rows[0]['error'] and not rows[0]['label_1']
    assert float(rows[1]['prob_1']) == pytest.approx(found[1]['labels'][0]['prob'], rel=1e-6)
    assert float(rows[1]['prob_1']) >= float(rows[1]['prob_2']) and not rows[1]['error']
    was = (shell.folder/'found.csv').read_bytes()
    done = shell('predict', 'untouched', str(tmp_path), '--n', '2', '--csv', 'found.csv', '--json')
    assert done.code == 3 and len(json.loads(done.out)) == 2 and (shell.folder/'found.csv').read_bytes() == was
    refused(shell('predict', 'untouched', good, '--csv', 'photos/labels.json'), 'labels.json')


def test_the_installed_command(shell, untouched):
    "Imports and all, in a process that nothing was done for"
    done = subprocess.run([sys.executable, '-c', 'from resnet_fastai.practice.cli import main; main()', 'predict', 'untouched', 'photos/test/test_00001.jpg'],
                          cwd=shell.folder, capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1 and not done.stderr, done
    assert done.stdout == shell('predict', 'untouched', 'photos/test/test_00001.jpg').out


# ---- evaluate, export

def test_evaluate_counts(shell, untouched):
    "The errors are those of the ranks that the labels have among all outputs"
    from resnet_fastai.core import ResNet
    labels, encoding = (json.loads((shell.folder/'photos'/f'{name}.json').read_text()) for name in ('labels', 'encoding'))
    photos, model = sorted((shell.folder/'photos'/'val').iterdir()), ResNet.load(untouched)
    ranks = [(p > p[encoding[labels[photo.stem]]]).sum() for photo, p in zip(photos, model.predict(photos))]
    args = 'evaluate', 'untouched', *labelled[:2], '--split', 'val', '--protocol', '50crop'
    done = shell(*args, '--protocol', '10crop', '--json')
    assert done.code == 0, done
    first, second = json.loads(done.out)['errors']
    assert (first['protocol'], second['protocol'], first['photos']) == ('50crop', '10crop', 12)
    for k in (1, 5): assert first[f'top{k}_error'] == sum(r >= k for r in ranks)/12
    shown = shell(*args).out.splitlines()
    assert len(shown) == 2 and f"{first['top1_error']:.2%}" in shown[1] and f"{first['top5_error']:.2%}" in shown[1]


def test_evaluate_a_split_that_is_not_there(shell, untouched, tmp_path):
    for split in 'train', 'val': (tmp_path/'data'/split).mkdir(parents=True)
    refused(shell('evaluate', 'untouched', str(tmp_path/'data'), labelled[1]), 'test')


def test_export(shell, untouched):
    done = shell('export', 'untouched', 'handed', '--format', 'torch_export', '--json')
    assert done.code == 0 and (shell.folder/json.loads(done.out)['file']).is_file(), done
    refused(shell('export', 'untouched', 'handed', '--format', 'torch_export'), 'handed')
    assert shell('export', 'untouched', 'handed', '--format', 'torch_export', '--overwrite').code == 0


# ---- demo

def test_the_demo_goes_on(shell, tmp_path):
    from resnet_fastai.data import demo_data
    demo_data(tmp_path/'d'/'photos', sizes=dict(train=48, val=8, test=8))
    args = 'demo', 'd', '--arch', 'cifar_resnet8', '--epochs', '400'
    shell.start(*args, cwd=tmp_path)
    until(lambda: (shell.folder/'out').read_text().count('\n') >= 3)
    os.kill(shell.pid, signal.SIGINT)
    done = shell.wait()
    n = len([line for line in done.out.splitlines() if line[:1].isdigit()])
    assert done.code == 130 and 'go on with: resnet-fastai demo d --epochs 400 --arch cifar_resnet8' in done.err and not (tmp_path/'d'/'model').exists(), done
    done = shell(*args[:-1], str(n + 1), '--json', cwd=tmp_path)
    assert done.code == 0 and len(json.loads(done.out)['history']) == n + 1 == epochs(tmp_path/'d'/'model'), done
    assert not (tmp_path/'d'/'stopped').exists() and {'curves.png', 'predictions.png'} <= {p.name for p in (tmp_path/'d').iterdir()}


# ---- weights

def test_train_starts_from_weights(shell, untouched):
    "Network and crop size are those of the weights, also where the run is gone on with in another folder"
    done = shell('train', *labelled, '--model', 'further', '--weights', 'untouched', '--epochs', '1', '--num-workers', '0', '--lr', '0.001', '--schedule', 'plateau')
    assert done.code == 0, done
    config = json.loads((shell.folder/'further'/'config.json').read_text())
    began = json.loads((untouched/'config.json').read_text())
    assert (config['arch'], config['size'], config['training']['bs'], config['stats']['mean']) == ('cifar_resnet8', 32, 32, began['stats']['mean'])
    assert config['training']['weights']['sha256'] == began['weights_sha256'] and config['n_out'] == max(config['encoding'].values()) + 1
    (shell.folder/'elsewhere').mkdir()
    done = shell('resume', '../further-run', '--epochs', '2', cwd=shell.folder/'elsewhere')
    assert done.code == 0 and epochs(shell.folder/'further') == 2, done


def test_train_fine_tunes_from_weights_and_goes_on_after_a_stop(shell, untouched):
    "Stopped in the epoch of the head alone; the end is that of a run that nobody stopped"
    args = ['train', *labelled, '--weights', 'untouched', '--epochs', '2', '--bs', '4', '--num-workers', '0', '--lr', '0.01', '--every', '1']
    done = shell(*args, '--model', 'tuned')
    assert done.code == 0 and epochs(shell.folder/'tuned') == 3, done
    shell.start(*args, '--model', 'stopped', hold=[4])
    until(lambda: batches(shell.folder/'stopped-run') == 3)
    os.kill(shell.pid, signal.SIGINT)
    assert shell.wait().code == 130
    done = shell('resume', 'stopped-run')
    assert done.code == 0 and weights(shell.folder/'stopped') == weights(shell.folder/'tuned'), done
    done = shell('resume', 'stopped-run', '--epochs', '5')
    assert done.code == 1 and 'has ended' in done.err, done


@pytest.mark.parametrize('weights,says', [('gone.pth', 'no file or folder'), ('photos/labels.json', 'no checkpoint|cut short'), ('photos', 'no config.json')])
def test_weights_that_are_none(shell, weights, says):
    import re
    done = shell('train', *labelled, '--model', 'never', '--weights', weights, *small)
    assert done.code == 1 and re.search(says, done.err) and 'Traceback' not in done.err and not (shell.folder/'never-run').exists(), done


if __name__ == '__main__': serve()
