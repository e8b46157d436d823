"A run that is killed, interrupted or refused its disk goes on as if nothing had been."
import copy
import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.training import GradientClip
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import FuncSplitter
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat, FocalLossFlat, LabelSmoothingCrossEntropyFlat
from fastai.optimizer import OptimWrapper
from fastai.torch_core import set_seed
from fastai.vision.augment import Resize
from fastai.vision.data import ImageBlock

from kill_and_resume import result, same
from patience import run
from resnet_fastai.engine import checkpoint, finite
from resnet_fastai.core import ResNet, train
from resnet_fastai.augment import ColorStats
from resnet_fastai.data import LabelMap, demo_data
from resnet_fastai.engine.files import atomic_write, DataError
from resnet_fastai.engine.balance import BalancedLoss
from resnet_fastai.engine.layout import list_photos
from resnet_fastai.engine.checkpoint import read_checkpoint
from resnet_fastai.engine.finite import LossError
from resnet_fastai.training import caffe_sgd, Checkpoint, MultiStepLR, paper_sgd, resnet_learner

settings = dict(arch='cifar_resnet8', size=32, bs=8, micro_bs=4, patience=0, min_delta=10, num_workers=0)
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def photos(tmp_path_factory): return demo_data(tmp_path_factory.mktemp('photos')/'drawn', sizes=dict(train=44, val=12, test=4))


def model(photos, folder=None, *cbs, **kw): return ResNet(*photos, **settings | dict(run_folder=folder, every=1, cbs=cbs) | kw)


def fit(model, epochs=3, resume=False):
    with model.learn.no_bar(), model.learn.no_logging(): model.fit(epochs, resume=resume)
    return model


@pytest.fixture(scope='module')
def untouched(photos):
    "What a run of three epochs ends with that keeps no checkpoints"
    return result(fit(model(photos)))


def differing(a, b): return [k for k in a if not same(a[k], b[k])]


class At(Callback):
    "Does something after so many training (or validation) batches"
    order = 99                                             # just before the checkpoint
    def __init__(self, n, act, training=True): self.n, self.act, self.when = n, act, training
    def after_batch(self):
        self.n -= self.training == self.when
        if self.n == 0 and self.training == self.when: self.act(self)


class Stop(BaseException): "Ends a run at once, as a kill does"


def stop(_): raise Stop
def ctrl_c(_): os.kill(os.getpid(), signal.SIGINT)


def broken(photos, folder, n=17, act=stop, **kw):
    "A run that ended at a batch"
    m = model(photos, folder, At(n, act, kw.pop('training', True)), **kw)
    with pytest.raises((Stop, KeyboardInterrupt)): fit(m)
    return m


def digests(folder): return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


# ---- killed

@pytest.mark.parametrize('workers,more', [(0, {}), (2, dict(label_smoothing=.1, mixup=.4, ema=.9, early_stopping=4))])
def test_twenty_kills_change_nothing(workers, more, tmp_path):
    "Ten at random moments, ten inside a checkpoint's writing; and five times Ctrl-C; once with all that helps few photos"
    script = Path(__file__).with_name('kill_and_resume.py')
    out = run([sys.executable, script, tmp_path, str(workers), '20', str(workers), json.dumps(more)])
    assert not out.returncode, out.stderr[-3000:]
    said = json.loads(out.stdout.splitlines()[-1])
    print(said)
    assert said['timed'] == said['writing'] == 10 and said['interrupted'] == 5 and said['parts'] and said['rates'] > 1


@pytest.mark.parametrize('n,every', [(1, 1), (11, 1), (12, 1), (33, 1), (9, 4), (16, 4), (5, 'epoch'), (12, 'epoch'), (30, 'epoch')])
def test_resumed_is_untouched(photos, untouched, tmp_path, n, every):
    broken(photos, tmp_path/'run', n, every=every)
    again = fit(model(photos, tmp_path/'run', every=every), resume=True)
    assert not differing(untouched, result(again))
    assert len((tmp_path/'run'/'history.csv').read_text().splitlines()) == 4


@pytest.mark.parametrize('what', ['set_rng', '_set_opt_state', 'at_train', 'batch', 'lr', 'callbacks', 'model', 'recorder'])
def test_the_comparison_would_notice(photos, untouched, tmp_path, monkeypatch, what):
    "A resumption that forgets one thing ends elsewhere"
    broken(photos, tmp_path/'run', 17)
    again = model(photos, tmp_path/'run')
    if hasattr(checkpoint, what): monkeypatch.setattr(checkpoint, what, lambda *_: None)
    else:
        read = checkpoint.read_checkpoint
        def forget(path):
            s = read(path)
            if what == 'at_train': s['ranks'][0]['at_train']['loaders'] = s['ranks'][0]['rng']['loaders']
            elif what == 'batch': s['batch'] += 2
            elif what == 'lr': s['lr'], s['hypers'] = .5, [h | dict(lr=.5) for h in s['hypers']]
            elif what == 'callbacks': s['callbacks']['plateau_lr'].update(best=0., wait=-9)
            elif what == 'model': s['model']['bn1.running_mean'] += .01
            elif what == 'recorder': s['recorder']['smooth'][0] += 1
            return s
        monkeypatch.setattr(checkpoint, 'read_checkpoint', forget)
    assert differing(untouched, result(fit(again, resume=True)))


def test_resumed_is_untouched_with_wide_crops(photos, untouched, tmp_path):
    broken(photos, tmp_path/'run', 11, augment='wide')
    again = result(fit(model(photos, tmp_path/'run', augment='wide'), resume=True))
    assert not differing(result(fit(model(photos, augment='wide'))), again) and 'weights' in differing(untouched, again)


def test_resumed_again_and_again_in_several_fits(photos, untouched, tmp_path):
    "One update at a time; and with `resume`, epochs are counted from the run's beginning"
    for n in range(8):
        with pytest.raises(Stop): fit(model(photos, tmp_path/'run', At(3, stop)), resume=True)
    fit(model(photos, tmp_path/'run'), 2, resume=True)
    m = fit(model(photos, tmp_path/'run'), 3, resume=True)
    assert not differing(untouched, result(m))
    m = fit(model(photos, tmp_path/'run'), 2, resume=True)                      # nothing left to do
    assert len(m.history) == 3 and m.learn.lr == untouched['lr']
    longer = result(fit(m, 4, resume=True))
    assert not differing(result(fit(fit(model(photos)), 1)), longer)


def test_train_resumes(photos, untouched, tmp_path):
    broken(photos, tmp_path/'run', 20, every='epoch')
    learn = train(*photos, epochs=3, resume=tmp_path/'run', **settings)
    assert not [k for k, v in untouched['weights'].items() if not torch.equal(v, learn.model.state_dict()[k])]
    assert len(train(*photos, epochs=1, resume=tmp_path/'new', **settings).history.rows) == 1


def test_workers_may_change(photos, untouched, tmp_path):
    broken(photos, tmp_path/'run', num_workers=2)
    assert not differing(untouched, result(fit(model(photos, tmp_path/'run'), resume=True)))


def test_keep(photos, tmp_path):
    fit(model(photos, tmp_path/'run', every=1, keep=3))
    files = sorted(p.name for p in (tmp_path/'run').glob('checkpoint*'))
    assert len(files) == 3 and files[-1] == 'checkpoint-000000033-epoch.pt'
    m = fit(model(photos, tmp_path/'all', every='epoch', keep=None), 4)
    states = [read_checkpoint(p) for p in sorted((tmp_path/'all').glob('checkpoint*'))]
    best = m.history.valid_loss.idxmin()
    assert len(states) == 4 and same(read_checkpoint(tmp_path/'all'/'best.pt')['model'], states[best]['model'])


def test_a_scaler_is_kept(photos, tmp_path):
    class Scale(Callback):
        def before_fit(self): self.learn.scaler = torch.amp.GradScaler('cpu', init_scale=4.)
        def after_fit(self): self.learn.scaler = None
    class Grow(Callback):
        order = 50
        def after_step(self):
            if self.learn.scaler._scale is None: self.learn.scaler.scale(torch.ones(1))
            self.learn.scaler.update(self.learn.scaler.get_scale() + 1)
    broken(photos, tmp_path/'run', 17, cbs=[Scale(), Grow(), At(17, stop)])
    scales = []
    class Look(Callback):
        order = 101
        def before_fit(self): scales.append(self.learn.scaler.get_scale())
    fit(model(photos, tmp_path/'run', Scale(), Look()), 2, resume=True)
    assert scales == [4. + 8]                                # 6 updates in the first epoch, 2 in the second


# ---- interrupted

@pytest.mark.parametrize('n,training,every', [(1, True, 1), (5, True, 'epoch'), (11, True, 'epoch'), (13, True, 1), (1, False, 'epoch'),
                                              (3, False, 1), (6, False, 'epoch')])
def test_ctrl_c(photos, untouched, tmp_path, n, training, every):
    "It leaves a checkpoint, and a learner that can be used and fitted on, in the same session too"
    m = broken(photos, tmp_path/'run', n, ctrl_c, training=training, every=every)
    assert m.learn.checkpoint.newest() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    m.learn.remove_cb(At)
    m.learn.validate()
    shutil.copytree(tmp_path/'run', tmp_path/'moved')
    again = fit(model(photos, tmp_path/'moved', every=every), resume=True)
    assert not differing(untouched, result(again))
    fit(m, 1)
    assert len(m.predict(photos.data_path/'test'/'test_00001.jpg')) == 1000


def test_ctrl_c_and_on_in_the_same_session(photos, untouched, tmp_path):
    m = broken(photos, tmp_path/'run', 13, ctrl_c)
    assert not differing(untouched, result(fit(m, 3, resume=True)))


def test_ctrl_c_without_a_folder(photos):
    m = broken(photos, None, 13, ctrl_c)
    assert len(m.history) == 1 and not m.learn.accumulate.count
    assert len(fit(m, 1).history) == 2


def test_a_second_ctrl_c_is_obeyed_at_once(photos, tmp_path):
    def twice(cb): ctrl_c(cb); time.sleep(1.1); ctrl_c(cb); time.sleep(.01); cb.went_on = True
    m = model(photos, tmp_path/'run', at := At(3, twice))
    with pytest.raises(KeyboardInterrupt): fit(m)
    assert not hasattr(at, 'went_on') and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(fit(m, 3, resume=True).history) == 3


# ---- refused

def test_a_fit_without_resume_does_not_touch_another_run(photos, tmp_path):
    broken(photos, tmp_path/'run')
    was = digests(tmp_path/'run')
    with pytest.raises(DataError, match='holds a run already.*resume=True'): fit(model(photos, tmp_path/'run'))
    assert digests(tmp_path/'run') == was


other_runs = {'another network': dict(arch='cifar_resnet14'), 'another network ': dict(net_args=dict(shortcut='B')),
              'batches of another size': dict(bs=4), 'another crop size': dict(size=24), 'a network with other weights': dict(n_out=1001)}

@pytest.mark.parametrize('what', other_runs)
def test_another_run_is_refused(photos, tmp_path, what):
    broken(photos, tmp_path/'run')
    m, was = model(photos, tmp_path/'run', **other_runs[what]), digests(tmp_path/'run')
    weights = {k: v.clone() for k, v in m.net.state_dict().items()}
    with pytest.raises(DataError, match=f'checkpoint-.* belongs to a run with {what.strip()}.*nothing was changed'): fit(m, resume=True)
    assert digests(tmp_path/'run') == was and same(weights, dict(m.net.state_dict())) and m.learn.checkpoint.state is None


@pytest.mark.parametrize('change', ['indices', 'labels', 'photos'])
def test_other_labels_or_photos_are_refused(tmp_path, edit, change):
    photos = demo_data(tmp_path/'drawn', sizes=dict(train=44, val=12, test=4))
    broken(photos, tmp_path/'run')
    was = digests(tmp_path/'run')
    if change == 'indices': edit(photos.label_encoding, lambda e: e | dict(stripes=e['mesh'], mesh=e['stripes']))
    if change == 'labels': edit(photos.label_encoding, lambda e: e | dict(cat=7))
    if change == 'photos': (photos.data_path/'train'/'train_00003.jpg').rename(photos.data_path/'val'/'train_00003.jpg')
    with pytest.raises(DataError, match='other training photos' if change == 'photos' else "another label encoding.*'(stripes|cat)'"):
        fit(model(photos, tmp_path/'run'), resume=True)
    assert digests(tmp_path/'run') == was


@pytest.fixture(scope='module')
def other_folder(photos, tmp_path_factory):
    "A run that has begun"
    folder = tmp_path_factory.mktemp('others')/'run'
    fit(model(photos, folder), 1)
    return folder


other_arguments = [('another learning rate: it has 0.003125, you have 0.5', dict(lr=.5)), ('another weight decay', dict(decay='all')),
                   ("another augmentation: it has 'PhotoNormalize': 'std': 0.1, you have 'PhotoNormalize': 'std': 0.0", dict(lighting=0.)),
                   ("another augmentation: it has 'ScaleJitterCrop': 'min_side': 37, you have 'ScaleJitterCrop': 'min_side': 40", dict(min_side=40)),
                   ("another augmentation: it has 'ScaleJitterCrop': 'min_side': 37, you have 'ScaleJitterCrop': 'min_side': 33", dict(augment='wide')),
                   ('another optimizer: it has SGD.*you have caffe_sgd', dict(opt_func=caffe_sgd)),
                   ('another optimizer: .*mom=0.9.*mom=0.8', dict(opt_func=partial(paper_sgd, mom=.8))),
                   ("other callbacks: it has 'plateau_lr': 'patience': 0, you have 'plateau_lr': 'patience': 5", dict(patience=5)),
                   ("other callbacks: .*'multi_step_lr'|other callbacks: .*'plateau_lr'", dict(schedule=MultiStepLR(epochs=(3,)))),
                   ("other callbacks: it has 'gradient_clip': None, you have 'gradient_clip'.*max_norm", dict(cbs=[GradientClip(.1)])),
                   ('another loss function: it has CrossEntropyLoss.., you have .*label_smoothing=0.1.', dict(label_smoothing=.1)),
                   ('another loss function: .*you have FocalLoss.gamma=3.', dict(loss_func=FocalLossFlat(gamma=3))),
                   ('other colour statistics', dict(stats=ColorStats([.5]*3, [.2, .02, .01], np.eye(3))))]


def weighed(*weights): return CrossEntropyLossFlat(weight=torch.tensor(weights))


@pytest.mark.parametrize('one,other', [
    (LabelSmoothingCrossEntropyFlat(eps=.1), LabelSmoothingCrossEntropyFlat(eps=.2)), (FocalLossFlat(), FocalLossFlat(gamma=3)),
    (weighed(1., 2.), weighed(2., 1.)), (weighed(1., 2.), CrossEntropyLossFlat()), (torch.nn.CrossEntropyLoss(label_smoothing=.1), torch.nn.CrossEntropyLoss()),
    (partial(F.cross_entropy, label_smoothing=.1), partial(F.cross_entropy, label_smoothing=.2)),
    (BalancedLoss(torch.nn.CrossEntropyLoss(), torch.ones(2)), BalancedLoss(torch.nn.CrossEntropyLoss(label_smoothing=.1), torch.ones(2))),
    (partial(OptimWrapper, opt=torch.optim.Adam), partial(OptimWrapper, opt=torch.optim.SGD))], ids=lambda o: type(o).__name__)
def test_a_loss_or_an_optimizer_is_known_by_its_strength(one, other):
    again = copy.deepcopy(one)
    if hasattr(again, 'reduction'): again.reduction = 'none'                  # as mixing sets it for the time being
    assert checkpoint._function(one) == checkpoint._function(again) != checkpoint._function(other)


@pytest.mark.parametrize('folder', [True, False, 3])
def test_a_folder_that_is_no_path(photos, folder):
    with pytest.raises(DataError, match=f'the folder of a run is {folder}; name it'): train(*photos, epochs=1, resume=folder, **settings)


@pytest.mark.parametrize('why,kw', other_arguments, ids=lambda x: next(iter(x)) if isinstance(x, dict) else '')
def test_other_arguments_are_refused(photos, other_folder, why, kw):
    was = digests(other_folder)
    with pytest.raises(DataError, match=f'belongs to a run with {why}.*nothing was changed'): fit(model(photos, other_folder, **kw), resume=True)
    assert digests(other_folder) == was


def test_photos_with_other_labels_are_refused(photos, other_folder, tmp_path):
    "The same encoding, and every photo another label"
    labels = json.loads(photos.label_path.read_text())
    names = sorted(set(labels.values()))
    (tmp_path/'moved.json').write_text(json.dumps({k: names[names.index(v) - 1] for k, v in labels.items()}))
    with pytest.raises(DataError, match='other labels of the training photos'):
        fit(model((photos[0], tmp_path/'moved.json', photos[2]), other_folder), resume=True)


# ---- two runs in one folder

def in_a_process(photos, folder, ready, go_on):
    "The body of a child: begin or resume a run, say when a batch is done, and wait"
    def wait(_): os.write(ready, b'.'); os.read(go_on, 1)
    fit(model(photos, folder, At(3, wait), num_workers=2), 1, resume=True)


@pytest.mark.parametrize('end', ['killed', 'finished'])
def test_a_second_run_in_a_folder_is_refused(photos, tmp_path, end):
    "It hears who is in there; a lock that nobody holds any more is none"
    (ready, say), (wait, go) = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        os.setsid()
        try: in_a_process(photos, tmp_path/'run', say, wait)
        finally: os._exit(0)
    os.read(ready, 1)
    was = digests(tmp_path/'run')
    for resume in (True, False):
        with pytest.raises(DataError, match=rf'run (is in use by process {pid} on {socket.gethostname()}, since 20|holds a run already)'):
            fit(model(photos, tmp_path/'run'), 1, resume=resume)
    assert digests(tmp_path/'run') == was and '.lock' in was
    os.kill(pid, signal.SIGKILL) if end == 'killed' else os.write(go, b'.')
    os.waitpid(pid, 0)
    assert (tmp_path/'run'/'.lock').exists() == (end == 'killed')
    assert len(fit(model(photos, tmp_path/'run'), 2, resume=True).history) == 2 and not (tmp_path/'run'/'.lock').exists()
    if end == 'killed': os.killpg(pid, signal.SIGKILL)                       # its workers, which wait for ever


def test_a_second_run_of_this_process_is_refused(photos, tmp_path):
    said = []
    def again(_):
        with pytest.raises(DataError, match='in use by another training of this process') as e: fit(model(photos, tmp_path/'run'), 2, resume=True)
        said.append(str(e.value))
    fit(model(photos, tmp_path/'run', At(3, again)), 1)
    assert len(said) == 1 and sorted(p.name for p in (tmp_path/'run').iterdir())[0] == 'best.pt'


def test_a_run_that_others_have_gone_on_with_is_left_to_them(photos, tmp_path):
    one = fit(model(photos, tmp_path/'run'), 1)
    fit(model(photos, tmp_path/'run'), 2, resume=True)
    with pytest.raises(DataError, match='another run has gone on in .*run, up to checkpoint-000000022-epoch.pt'): fit(one, 1)
    assert len(fit(one, 3, resume=True).history) == 3


def test_temporary_files_of_one_process_have_names_of_their_own(tmp_path):
    with atomic_write(tmp_path/'a') as one, atomic_write(tmp_path/'a') as two:
        assert one != two
        one.write_text('1'); two.write_text('2')
    assert (tmp_path/'a').read_text() == '1' and len(list(tmp_path.iterdir())) == 1


# ---- damaged

@pytest.mark.parametrize('harm', ['cut', 'empty', 'flipped', 'text', 'pickle', 'other'])
def test_the_one_before_a_damaged_checkpoint(photos, untouched, tmp_path, harm, capsys):
    broken(photos, tmp_path/'run')
    newest = sorted((tmp_path/'run').glob('checkpoint*'))[-1]
    data = newest.read_bytes()
    class Bomb:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'ran'),)
    bomb = io.BytesIO()
    torch.save(dict(format=2, run=Bomb()), bomb)
    half = len(data)//2
    newest.write_bytes(dict(cut=data[:-9], empty=b'', flipped=data[:half] + bytes(b ^ 255 for b in data[half:half+64]) + data[half+64:],
                            text=b'hello', pickle=pickle.dumps(Bomb()), other=bomb.getvalue())[harm])
    assert not differing(untouched, result(fit(model(photos, tmp_path/'run'), resume=True)))
    assert f'{newest} is no whole checkpoint' in capsys.readouterr().out and not (tmp_path/'ran').exists()


def test_nothing_is_whole(photos, tmp_path):
    broken(photos, tmp_path/'run')
    for p in (tmp_path/'run').glob('*.pt'): p.write_bytes(p.read_bytes()[:1000])
    with pytest.raises(DataError, match='is no whole checkpoint.*name another folder'): fit(model(photos, tmp_path/'run'), resume=True)


@pytest.mark.parametrize('state', [dict(format=2), dict(), [1], dict(format=1, run={}), dict(format=2, run={})])
def test_what_is_no_checkpoint(photos, tmp_path, state):
    (tmp_path/'run').mkdir()
    torch.save(state, tmp_path/'run'/'checkpoint-000000001-epoch.pt')
    with pytest.raises(DataError, match='checkpoint-000000001-epoch.pt is (no whole checkpoint|of another version)'):
        fit(model(photos, tmp_path/'run'), resume=True)


# ---- no room

def test_a_full_disk(photos, untouched, tmp_path):
    "The system refuses to write past some byte; what was there stands, and the run goes on from it when there is room"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    def fill(_): resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(DataError, match='no checkpoint can be written in .*run: .*stands: .*checkpoint-000000017-batch.pt'):
            fit(model(photos, tmp_path/'run', At(18, fill)))
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    names = ['best.pt', 'checkpoint-000000015-batch.pt', 'checkpoint-000000017-batch.pt', 'history.csv']
    assert sorted(p.name for p in (tmp_path/'run').iterdir()) == names
    assert not differing(untouched, result(fit(model(photos, tmp_path/'run'), resume=True)))


def test_a_folder_that_cannot_be_written(photos, tmp_path):
    "It shows before the first epoch, not after it"
    (tmp_path/'file').write_text('')
    folders = [tmp_path/'file'/'run', Path('/proc/none/run')]
    if os.geteuid():
        (tmp_path/'locked').mkdir(mode=0o500)
        folders.append(tmp_path/'locked')
    for folder in folders:
        m = model(photos, folder, seen := At(1, lambda cb: None))
        with pytest.raises(DataError, match=f'^no checkpoint can be written in {folder}'): fit(m)
        assert seen.n == 1 and not len(m.history)


def test_a_folder_that_becomes_read_only(photos, untouched, tmp_path, monkeypatch):
    write = Path.write_bytes
    def refuse(self, data):
        if '.pt' in self.name: raise OSError(30, 'Read-only file system', str(self))
        return write(self, data)
    with pytest.raises(DataError, match='Read-only file system; the last whole one stands'):
        fit(model(photos, tmp_path/'run', At(16, lambda _: monkeypatch.setattr(Path, 'write_bytes', refuse))))
    monkeypatch.undo()
    assert not differing(untouched, result(fit(model(photos, tmp_path/'run'), resume=True)))


# ---- a loss that is no number

class Spoil(Callback):
    "Makes one batch's loss infinite or NaN, without touching the weights"
    order = 4
    def __init__(self, n, value, where='loss'): self.n, self.value, self.where = n, value, where
    def before_batch(self):
        self.n -= self.training
        if self.n == 0 and self.where == 'photo': self.learn.xb = (self.xb[0].index_fill(0, torch.tensor([2]), self.value),)
        if self.n == 0: self.names = finite.batch_names(self.dl, self.iter)
    def after_loss(self):
        if self.n == 0 and self.where == 'loss': self.learn.loss_grad = self.learn.loss = self.loss*self.value
    def after_step(self):
        if self.n == 0 and self.where == 'weights': self.model.fc.weight.data[0, 0] = self.value


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_no_number_stops_the_run(photos, untouched, tmp_path, value):
    m = model(photos, tmp_path/'run', spoil := Spoil(17, value))
    with pytest.raises(LossError, match=f'^the loss is {value} in epoch 1, training batch 5, at the rate 0.003125.*lr=0.00031') as e: fit(m)
    assert len(spoil.names) == 4 and all(n in str(e.value) and Path(n).is_file() for n in spoil.names)
    newest = tmp_path/'run'/'checkpoint-000000015-batch.pt'
    assert str(e.value).endswith(f'The last good checkpoint stands: {newest}') and m.learn.checkpoint.newest() == newest
    assert not differing(untouched, result(fit(model(photos, tmp_path/'run'), resume=True)))


def test_the_names_of_a_batch_are_right(photos):
    "Seen from the pixels: a loader that loads the named photos gives the batch's targets"
    found = []
    class Note(Callback):
        def before_batch(self):
            names = finite.batch_names(self.dl, self.iter)
            found.append([self.dls.labels(n) for n in names] == [self.dls.vocab[int(i)] for i in self.yb[0]])
    fit(model(photos, None, Note()), 2)
    assert len(found) == 2*(11 + 3) and all(found)


def test_the_names_after_resuming_are_right(photos, tmp_path):
    broken(photos, tmp_path/'run', 17)
    one, two = Spoil(19, float('nan')), Spoil(4, float('nan'))             # the last checkpoint was after 15
    with pytest.raises(LossError): fit(model(photos, None, one))
    with pytest.raises(LossError): fit(model(photos, tmp_path/'run', two), resume=True)
    assert one.names == two.names


def test_a_photo_without_numbers_is_named(photos):
    m = model(photos, None, spoil := Spoil(3, float('nan'), 'photo'))
    with pytest.raises(LossError) as e: fit(m)
    assert f'The pixels of {spoil.names[2]} are no numbers' in str(e.value) and 'There is no checkpoint yet' in str(e.value)


def test_weights_that_are_no_numbers_are_not_kept(photos, tmp_path):
    with pytest.raises(LossError, match='the weights are no numbers any more.*stands: .*checkpoint-000000017-batch.pt'):
        fit(model(photos, tmp_path/'run', Spoil(19, float('nan'), 'weights')))
    assert not [p for p in (tmp_path/'run').glob('*.pt') if not all(torch.isfinite(v).all() for v in read_checkpoint(p)['model'].values())]


# ---- asked for what cannot be

def test_resume_needs_a_folder(photos):
    with pytest.raises(DataError, match='no folder to resume from'): fit(model(photos), resume=True)


def test_checkpoint_needs_this_learner(photos, tmp_path):
    m = model(photos)
    learn = Learner(m.learn.dls, m.net, loss_func=m.learn.loss_func, cbs=Checkpoint(tmp_path/'run'))
    with learn.no_bar(), pytest.raises(DataError, match='needs a learner of resnet_learner'): learn.fit(1)


def test_an_unknown_monitor_shows_before_the_first_epoch(photos, tmp_path):
    m = model(photos, None, Checkpoint(tmp_path/'run', monitor='acuracy'))
    with pytest.raises(DataError, match="Checkpoint monitors 'acuracy'; there is train_loss, valid_loss, top1_error"): fit(m)
    assert not (tmp_path/'run').exists()


def test_a_look_at_the_learner_writes_nothing(photos, tmp_path):
    m = model(photos, tmp_path/'run')
    with m.learn.no_bar(): m.learn.validate(); m.learn.get_preds()
    assert not (tmp_path/'run').exists()


@pytest.mark.parametrize('workers, how', [(0, 'crop'), (2, 'squish')])           # in processes a random crop goes by what was drawn before it
def test_over_a_data_block_of_the_users_own(photos, tmp_path, workers, how):
    label = LabelMap(photos.label_path, photos.label_encoding)

    def fitted(folder, *cbs):
        set_seed(1)
        block = DataBlock((ImageBlock, CategoryBlock), get_items=lambda root: list_photos(root/'train') + list_photos(root/'val'), get_y=label,
                          splitter=FuncSplitter(lambda p: p.parent.name == 'val'), item_tfms=Resize(32, how))
        dls = block.dataloaders(photos.data_path, bs=8, num_workers=workers)
        for dl in dls.loaders: dl.rng.seed(5)
        learn = resnet_learner(dls, 'cifar_resnet8', bs=8, lr=.01, precision='fp32', cbs=[Checkpoint(folder), *cbs])
        with learn.no_bar(), learn.no_logging(): learn.resume(3)
        return learn

    whole = fitted(tmp_path/'whole')
    assert whole.recorder.metric_names[-2:] == ['top5_error', 'time']           # of eight classes
    with pytest.raises(KeyboardInterrupt, match=r'learn\.resume'): fitted(tmp_path/'broken', At(8, ctrl_c))
    again = fitted(tmp_path/'broken')
    for a, b in zip(whole.model.state_dict().values(), again.model.state_dict().values()): assert torch.equal(a, b)
    assert [r['valid_loss'] for r in whole.history.rows] == [r['valid_loss'] for r in again.history.rows]
