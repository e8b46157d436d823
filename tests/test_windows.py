"""What Windows does otherwise, with stand-ins on Linux: no fcntl, no pread, no O_DIRECTORY, and open files that are neither removed nor replaced."""
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from resnet_fastai.core import ResNet
from resnet_fastai.engine import lock, shards
from resnet_fastai.engine.files import DataError, sync_folder
from resnet_fastai.engine.layout import list_photos
from resnet_fastai.engine.lock import lock_folder, unlock_folder
from resnet_fastai.practice.shards import pack_photos, verify_shards

fcntl = pytest.importorskip('fcntl', reason='needs Linux, whose /proc says what is open')
if not Path('/proc/self/fd').is_dir(): pytest.skip('needs Linux, whose /proc says what is open', allow_module_level=True)
pytestmark = pytest.mark.usefixtures('one_thread')


def locking(fd, mode, size):
    "msvcrt.locking: bytes from the file's position on, refused with EACCES where another process has them"
    how = {0: fcntl.LOCK_UN, 2: fcntl.LOCK_EX | fcntl.LOCK_NB}[mode]
    try: fcntl.lockf(fd, how, size, os.lseek(fd, 0, os.SEEK_CUR))
    except OSError: raise PermissionError(13, 'Permission denied') from None


def in_use():
    "Files that this process has open or mapped"
    for fd in os.listdir('/proc/self/fd'):
        try: yield os.readlink(f'/proc/self/fd/{fd}')
        except OSError: pass
    yield from re.findall(r' (/\S.*)$', Path('/proc/self/maps').read_text(), re.M)


@pytest.fixture
def windows(monkeypatch):
    "As there; yields what was removed or replaced"
    changed = []

    def refusing(name, at):
        real = getattr(os, name)
        def act(*args, **kw):
            below = os.readlink(f"/proc/self/fd/{kw['dir_fd']}") if kw.get('dir_fd') is not None else ''
            path = os.path.realpath(os.path.join(below, os.fsdecode(args[at])))
            if path in in_use(): raise PermissionError(13, 'it is open', path)
            changed.append(path)
            return real(*args, **kw)
        monkeypatch.setattr(os, name, act)
    for name, at in [('unlink', 0), ('remove', 0), ('replace', 1), ('rename', 1)]: refusing(name, at)
    monkeypatch.setattr(lock, 'fcntl', None)
    monkeypatch.setattr(lock, 'msvcrt', SimpleNamespace(locking=locking, LK_NBLCK=2, LK_UNLCK=0))
    for name in ('O_DIRECTORY', 'O_NONBLOCK', 'pread', 'getuid'): monkeypatch.delattr(os, name)
    return changed


def elsewhere(act):
    "What another process says to it"
    ours, theirs = os.pipe()
    if not (pid := os.fork()):
        lock._mine.clear()
        try: said = str(act())
        except DataError as e: said = str(e)
        os.write(theirs, said.encode())
        os._exit(0)
    os.close(theirs)
    with open(ours) as f: said = f.read()
    os.waitpid(pid, 0)
    return said


def test_a_lock_of_windows(windows, tmp_path):
    lock_folder(tmp_path)
    assert json.loads(elsewhere((tmp_path/'.lock').read_text))['pid'] == os.getpid()          # nobody is kept from reading it
    assert f'is in use by process {os.getpid()} on ' in elsewhere(lambda: lock_folder(tmp_path))
    with pytest.raises(DataError, match='in use by another training of this process'): lock_folder(tmp_path)
    unlock_folder(tmp_path)
    assert not (tmp_path/'.lock').exists() and elsewhere(lambda: lock_folder(tmp_path)) == 'None'
    assert (tmp_path/'.lock').exists()                                                        # that process has ended without a word
    lock_folder(tmp_path)
    unlock_folder(tmp_path)
    assert [p for p in windows if p.endswith('.lock')] == 2*[f'{tmp_path}/.lock']


def test_a_system_without_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, 'fcntl', None)
    for _ in range(2):
        lock_folder(tmp_path)
        assert json.loads((tmp_path/'.lock').read_text())['pid'] == os.getpid()
        unlock_folder(tmp_path)
        assert not list(tmp_path.iterdir())


def test_a_drive_whose_files_never_look_like_themselves(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, '_still_there', lambda path, f: False)
    lock_folder(tmp_path)
    assert 'is in use by process' in elsewhere(lambda: lock_folder(tmp_path))
    unlock_folder(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_and_its_continuation(windows, drawn, tmp_path):
    def fit(epochs, resume):
        m = ResNet(*drawn, arch='cifar_resnet8', size=32, bs=8, micro_bs=8, num_workers=0, device='cpu', run_folder=tmp_path/'run', every=1, keep=1)
        with m.learn.no_bar(), m.learn.no_logging(): m.fit(epochs, resume=resume)
        return m
    fit(1, False)
    m = fit(3, True)
    assert len(m.history) == 3 and not (tmp_path/'run'/'.lock').exists() and len(list((tmp_path/'run').glob('checkpoint*'))) == 1
    assert len((tmp_path/'run'/'history.csv').read_bytes().splitlines()) == 4
    for _ in range(2): folder = m.save(tmp_path/'model', overwrite=True)
    loaded, csv = ResNet.load(folder, device='cpu'), tmp_path/'answers.csv'
    for _ in range(2): assert len(loaded.predict_folder(drawn.data_path/'test', dest=csv, n=1, protocol='1crop', num_workers=0)) == 4
    assert any('checkpoint-' in p for p in windows) and any(p.endswith('model.safetensors') for p in windows)
    sync_folder(tmp_path)


def test_shards(windows, drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, '_at', shards._seek_and_read)
    packed = pack_photos(drawn.data_path, tmp_path/'shards', shard_mb=1, num_workers=2)
    assert verify_shards(packed) == [] and not [p for p in packed.iterdir() if p.name[0] == '.']
    for path, file in zip(list_photos(packed), list_photos(drawn.data_path)): assert path.source.read() == file.read_bytes()
