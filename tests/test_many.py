"Two, three and six processes do the training of one"
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from patience import run, until
from resnet_fastai.data import demo_data
from resnet_fastai.engine.checkpoint import Checkpoint, share_of
from resnet_fastai.engine.loader import PhotoDL
from resnet_fastai.engine.lock import lock_folder, unlock_folder

program = Path(__file__).parent/'many.py'


def launch(n, what, folder):
    "Run many.py in n processes; (exit code, what was said)"
    start = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(n)] if n > 1 else [sys.executable]
    env = os.environ | dict(OMP_NUM_THREADS='1', FASTAI_HOME=str(folder/'fastai'), CUDA_VISIBLE_DEVICES='')
    p = run([*start, program, what, folder], env=env)
    return p.returncode, p.stdout + p.stderr


def forked(folder, *jobs):
    "Run jobs like '2:failing' in many.py, one after the other; (exit codes of each, what was said)"
    p = run([sys.executable, program, *jobs, folder], env=os.environ | dict(OMP_NUM_THREADS='1', FASTAI_HOME=str(folder/'fastai'), CUDA_VISIBLE_DEVICES=''))
    lines = [line.split() for line in p.stdout.splitlines()]
    return [[int(code) for code in words[1:]] for words in lines if words[:1] and words[0] in jobs], p.stdout + p.stderr


def left(n, what, folder): return [torch.load(folder/f'{what}-{n}-{r}.pt', weights_only=False) for r in range(n)]      # our own, just written


def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def figures(rows): return [[v for k, v in row.items() if k != 'seconds'] for row in rows]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('many')
    demo_data(folder/'drawn', sizes=dict(train=42, val=23, test=2))      # 42 is no multiple of 12, 23 is odd and no multiple of 3
    return folder


@pytest.fixture(scope='module')
def alone(folder):
    code, said = launch(1, 'everything', folder)
    assert code == 0, said
    return left(1, 'everything', folder)[0]


@pytest.mark.parametrize('n', [2, 3, 6])
def test_processes_do_the_training_of_one(n, folder, alone):
    code, said = launch(n, 'everything', folder)
    assert code == 0, said
    got = left(n, 'everything', folder)
    for one in got[1:]:                                                  # the same everywhere
        assert equal(one['plain']['weights'], got[0]['plain']['weights']) and one['plain']['lr'] == got[0]['plain']['lr'] == alone['plain']['lr']
        assert all(torch.equal(one['bn'][k], v) for k, v in got[0]['bn'].items() if 'running' not in k and 'tracked' not in k)
        assert figures(one['plain']['rows']) == figures(got[0]['plain']['rows'])
    for one in (*got, alone): assert one['plain']['drops'] == alone['plain']['drops']
    assert [sum(photos) for photos in zip(*(one['plain']['updates'] for one in got))] == [12, 12, 12, 6]*3 == alone['plain']['updates']
    for epoch in range(3):                                               # each photo once
        assert sorted(i for one in got for i in one['plain']['photos'][epoch]) == list(range(42))
    for k, v in alone['plain']['weights'].items(): torch.testing.assert_close(got[0]['plain']['weights'][k], v, atol=1e-5, rtol=1e-4)
    for name in ('valid_loss', 'top1_error', 'top5_error', 'median_logit', 'surest', 'train_error'):
        for a, b in zip(got[0]['plain']['rows'], alone['plain']['rows']): assert a[name] == pytest.approx(b[name], abs=2e-4), name
    for kind, own in alone['balanced'].items():
        assert sorted(i for one in got for i in one['balanced'][kind]['photos']) == sorted(own['photos'])
        for k, v in own['weights'].items(): torch.testing.assert_close(got[0]['balanced'][kind]['weights'][k], v, atol=1e-5, rtol=1e-4)
        for name in ('balanced_error', 'valid_loss'): assert got[0]['balanced'][kind]['rows'][0][name] == pytest.approx(own['rows'][0][name], abs=2e-4)
    assert not equal(alone['balanced']['sampler']['weights'], alone['balanced']['loss']['weights'])
    for k, v in alone['helped']['weights'].items(): torch.testing.assert_close(got[0]['helped']['weights'][k], v, atol=1e-5, rtol=1e-4)
    for v, mine in zip(alone['helped']['own'], got[0]['helped']['own']): torch.testing.assert_close(mine, v, atol=1e-5, rtol=1e-4)
    for a, b in zip(got[0]['helped']['rows'], alone['helped']['rows'], strict=True): assert a['valid_loss'] == pytest.approx(b['valid_loss'], abs=2e-4)
    for one in got:                                                      # each mixes its own photos; the weights are the same everywhere
        assert equal(one['helped']['weights'], got[0]['helped']['weights']) and figures(one['mixed']['rows']) == figures(got[0]['mixed']['rows'])
        assert all(torch.equal(one['mixed']['weights'][k], v) for k, v in got[0]['mixed']['weights'].items() if 'tracked' not in k)
    assert got[0]['untouched'] == pytest.approx(alone['untouched'], abs=1e-6)      # BN and all, on the same weights
    assert got[0]['before'] == pytest.approx(alone['before'], abs=1e-6)
    assert len(alone['plain']['drops']) == 2 and alone['plain']['rows'][-1]['surest'] != 0 != alone['plain']['rows'][-1]['median_logit']


def test_a_killed_process_ends_the_job_and_the_run_goes_on_to_the_same_bits(folder):
    assert launch(2, 'untouched', folder)[0] == 0
    code, said = launch(2, 'killed', folder)
    assert code != 0 and 'SIGKILL' in said
    assert list((folder/'run-killed').glob('checkpoint-*batch.pt'))
    code, said = launch(2, 'killed-again', folder)
    assert code == 0, said
    for one, other in zip(left(2, 'untouched', folder), left(2, 'killed-again', folder)):
        assert equal(one['weights'], other['weights']) and figures(one['rows']) == figures(other['rows']) and one['lr'] == other['lr']
        assert torch.equal(one['draw'], other['draw'])
    assert len((folder/'run-killed'/'history.csv').read_text().splitlines()) == 4


@pytest.fixture(scope='module')
def moved(folder):
    "Runs that other numbers of processes go on with, and one that nobody touches: their exit codes"
    codes, said = forked(folder, '1:moving-still', '2:moving-moved-k5', '4:moving-moved-k5', '1:moving-moved', '2:moving-preempted-t6', '1:moving-preempted')
    assert len(codes) == 6, said
    return codes


def test_another_number_of_processes_goes_on_at_the_next_photo_that_nobody_had(folder, moved):
    "Killed on 2 processes in the second epoch, on 4 in the third, ended by 1: the photos, crops and weights of one that nobody touched"
    assert moved[:4] == [[0], [-9, -9], [-9]*4, [0]]
    lines = {what: sorted(line for p in folder.glob(f'moving-{what}*.txt') for line in p.read_text().splitlines()) for what in ('still', 'moved')}
    assert len(lines['still']) == 3*42 and lines['moved'] == lines['still']
    still, moved = left(1, 'moving-still', folder)[0], left(1, 'moving-moved', folder)[0]
    for k, v in still['weights'].items(): torch.testing.assert_close(moved['weights'][k], v, atol=1e-5, rtol=1e-4)
    for a, b in zip(still['rows'], moved['rows']): assert a['train_error'] == b['train_error']      # counted over all processes
    rows = pd.read_csv(folder/'moved'/'history.csv')
    assert rows.processes.tolist() == [2, 4, 1] and 'processes' not in still['rows'][0]
    resumes = pd.read_csv(folder/'moved'/'resumes.csv')
    assert resumes[['epochs', 'photos', 'before', 'processes']].values.tolist() == [[1, 12, 2, 4], [2, 24, 4, 1]]


def test_sigterm_to_one_of_them_writes_a_checkpoint_and_ends_them_all(folder, moved):
    "Before preemption; and then fewer processes have exactly what is left"
    assert moved[4][1] == -signal.SIGTERM and moved[4][0] and moved[5] == [0]
    lines = sorted(line for p in folder.glob('moving-preempted*.txt') for line in p.read_text().splitlines())
    assert lines == sorted((folder/'moving-still-1-0.pt.txt').read_text().splitlines())
    resumes = pd.read_csv(folder/'preempted'/'resumes.csv')
    assert resumes[['epochs', 'photos', 'before', 'processes']].values.tolist() == [[1, 36, 2, 1]]      # after the update that had begun


def test_two_jobs_in_one_folder_are_refused(folder):
    (folder/'busy').mkdir()
    lock_folder(folder/'busy')
    try: codes, said = forked(folder, '2:moving-busy')
    finally: unlock_folder(folder/'busy')
    assert all(codes[0]) and f'busy is in use by process {os.getpid()}' in said and not list((folder/'busy').glob('checkpoint*'))


@pytest.mark.slow
def test_torchrun_goes_on_whatever_dies(folder, moved):
    "One machine; a second one joins; a rank is killed; one hangs; the second machine is lost. 12 updates, and the weights of a run that nobody touched"
    with socket.create_server(('127.0.0.1', 0)) as s: port = s.getsockname()[1]
    agent = [sys.executable, '-m', 'torch.distributed.run', '--nnodes', '1:2', '--nproc-per-node', '1', '--max-restarts', '8', '--rdzv-backend', 'c10d',
             '--rdzv-id', 'test', '--rdzv-endpoint', f'127.0.0.1:{port}', '--rdzv-conf', 'last_call_timeout=2', program, 'elastic', folder]
    env = os.environ | dict(OMP_NUM_THREADS='1', FASTAI_HOME=str(folder/'fastai'), CUDA_VISIBLE_DEVICES='', RESNET_FASTAI_TIMEOUT='20', PET_SHUTDOWN_TIMEOUT='3',
                            TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1')
    with open(folder/'agents.log', 'w') as log:
        start = lambda machine: subprocess.Popen(list(map(str, agent)), env=env | dict(MACHINE=machine), stdout=log, stderr=log, start_new_session=True)
        first = start('1')
        until((folder/'alone').exists)
        second = start('2')
        until(lambda: first.poll() is not None)
    said = (folder/'agents.log').read_text()
    assert first.returncode == 0 and second.wait() == -signal.SIGKILL and all((folder/what).exists() for what in ('killed', 'hung', 'lost')), said
    still, ended = left(1, 'moving-still', folder)[0], left(1, 'elastic', folder)[0]
    for k, v in still['weights'].items(): torch.testing.assert_close(ended['weights'][k], v, atol=1e-5, rtol=1e-4)
    assert [r['train_error'] for r in ended['rows']] == [r['train_error'] for r in still['rows']]
    lines = {line for p in folder.glob('elastic*.txt') for line in p.read_text().splitlines()}
    assert lines == {*(folder/'moving-still-1-0.pt.txt').read_text().splitlines()}
    resumes = pd.read_csv(folder/'elastic'/'resumes.csv')
    steps = resumes[['before', 'processes']].values.tolist()
    assert [s for s, last in zip(steps, [None, *steps]) if s != last] == [[1, 2], [2, 2], [2, 1]] and len(steps) >= 4
    done = resumes.epochs*42 + resumes.photos
    assert done.is_monotonic_increasing


def test_a_last_update_that_the_processes_would_have_joined_to_the_one_before():
    "37 photos in updates of 12: one process ends with an update of 1, two with one of 13"
    dl = PhotoDL(range(37), bs=12, shuffle=True, num_workers=0)
    dl.update, dl.world_size = 12, 2
    learn = SimpleNamespace(epoch=1, n_epoch=2, n_iter=len(dl), dls=SimpleNamespace(train=dl))
    at = {}
    for position in (0, 12, 24, 36, 37):
        cb = Checkpoint('nowhere')
        cb.learn = learn
        cb._move(position)
        at[position] = cb.batch, learn.pct_train
    assert dl.photos_in() == [12, 12, 13]
    assert at == {0: (0, .5), 12: (1, pytest.approx(4/6)), 24: (2, pytest.approx(5/6)), 36: (3, 1.), 37: (3, 1.)}


def test_a_process_that_was_not_there_before_draws_numbers_of_its_own():
    def own(seed):
        torch.manual_seed(seed)
        return dict(rng=dict(torch=torch.get_rng_state(), cuda=[]), counts=dict(wrong=seed, seen=4, sums=[[1., 2]]))
    def draws(rank, n):
        torch.set_rng_state(share_of([own(1), own(2)], rank, n)['rng']['torch'])
        return tuple(torch.rand(3).tolist())
    assert len({draws(r, 4) for r in range(4)}) == 4 and draws(3, 4) == draws(3, 4) and draws(0, 1) == draws(0, 2)
    assert [share_of([own(1), own(2)], r, 3)['counts'] for r in range(3)] == [dict(wrong=3, seen=8, sums=[[2., 4]])] + 2*[dict(wrong=0, seen=0, sums=[[0, 0]])]


def test_a_process_that_fails_ends_the_job_with_its_sentence(folder):
    code, said = launch(2, 'failing', folder)
    assert code != 0 and 'no numbers' in said and 'train/' in said


def test_one_interrupted_process_stops_them_all_in_good_order(folder):
    code, said = launch(2, 'stopped', folder)
    assert code == 0, said
    one, other = left(2, 'stopped', folder)
    assert one['files'] == 1 and all(torch.equal(v, other['weights'][k]) for k, v in one['weights'].items() if 'running' not in k)


@pytest.mark.parametrize('what,why', [('photos', 'other training photos'), ('labels', 'other labels of the training photos'),
                                      ('pixels', 'other colour statistics'), ('lr', 'another learning rate')])
def test_processes_that_do_not_have_the_same_do_not_begin(folder, what, why):
    if what != 'lr': shutil.copytree(folder/'drawn', other := folder/what)
    photos = what != 'lr' and sorted((other/'train').iterdir())
    if what == 'photos': photos[3].unlink()
    if what == 'labels':
        labels = json.loads((other/'labels.json').read_text())
        (other/'labels.json').write_text(json.dumps(labels | {photos[0].stem: labels[photos[1].stem]}))
    if what == 'pixels': shutil.copy(photos[0], photos[1])
    code, said = launch(2, f'different-{what}', folder)
    assert code == 0, said
    for one in left(2, f'different-{what}', folder): assert f'process 1 has {why}' in one['said'] and one['batches'] == 0


def test_an_update_that_is_too_small_for_the_processes(folder):
    code, said = launch(2, 'small', folder)
    assert code != 0 and 'an update of bs=3 photos is too small for 2 processes' in said
