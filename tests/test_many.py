"Two to eight processes do the training of one"
import json
import os
import shutil
import signal
import socket
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from patience import run, until
from ranks import left, program, quiet
from resnet_fastai.core import ResNet
from resnet_fastai.data import demo_data
from resnet_fastai.engine.checkpoint import Checkpoint, share_of
from resnet_fastai.engine.loader import PhotoDL
from resnet_fastai.engine.lock import lock_folder, unlock_folder

def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def figures(rows): return [[v for k, v in row.items() if k != 'seconds'] for row in rows]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('many')
    demo_data(folder/'drawn', sizes=dict(train=46, val=23, test=2))      # 46 is no multiple of 12, 23 is odd and no multiple of 3
    return folder


@pytest.fixture(scope='module')
def alone(ranks, folder):
    codes, said = ranks(folder, '1:everything')
    assert codes == [[0]], said
    return left(1, 'everything', folder)[0]


def trained_as_one(got, alone):
    "What each of several processes tells of a training without BN is what one process tells"
    for one in got[1:]:                                                  # the same everywhere
        assert equal(one['weights'], got[0]['weights']) and one['lr'] == got[0]['lr'] == alone['lr']
        assert figures(one['rows']) == figures(got[0]['rows'])
    for one in got: assert one['drops'] == alone['drops']
    assert [sum(photos) for photos in zip(*(one['updates'] for one in got))] == [12, 12, 12, 10]*3 == alone['updates']
    for epoch in range(3):                                               # each photo once
        assert sorted(i for one in got for i in one['photos'][epoch]) == list(range(46))
    for k, v in alone['weights'].items(): torch.testing.assert_close(got[0]['weights'][k], v, atol=1e-5, rtol=1e-4)
    for name in ('valid_loss', 'top1_error', 'top5_error', 'median_logit', 'surest', 'train_error'):
        for a, b in zip(got[0]['rows'], alone['rows']): assert a[name] == pytest.approx(b[name], abs=2e-4), name
    assert got[0]['before'] == pytest.approx(alone['before'], rel=1e-6)


@pytest.mark.parametrize('n', [2, 3, 6])
def test_processes_do_the_training_of_one(n, ranks, folder, alone):
    codes, said = ranks(folder, f'{n}:everything')
    assert codes == [[0]*n], said
    got = left(n, 'everything', folder)
    trained_as_one([one['plain'] for one in got], alone['plain'])
    for one in got[1:]: assert all(torch.equal(one['bn'][k], v) for k, v in got[0]['bn'].items() if 'running' not in k and 'tracked' not in k)
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
    assert len(alone['plain']['drops']) == 2 and alone['plain']['rows'][-1]['surest'] != 0 != alone['plain']['rows'][-1]['median_logit']


@pytest.mark.parametrize('n', [4, 5, 7, 8])
def test_any_number_of_processes(n, ranks, folder, alone):
    codes, said = ranks(folder, f'{n}:plain')
    assert codes == [[0]*n], said
    trained_as_one([one['plain'] for one in left(n, 'plain', folder)], alone['plain'])


def test_a_killed_process_ends_the_job_and_the_run_goes_on_to_the_same_bits(ranks, folder):
    codes, said = ranks(folder, '2:untouched', '2:killed')
    assert codes[0] == [0, 0] and codes[1][0] and codes[1][1] == -signal.SIGKILL, said
    assert list((folder/'run-killed').glob('checkpoint-*batch.pt'))
    codes, said = ranks(folder, '2:killed-again')
    assert codes == [[0, 0]], said
    for one, other in zip(left(2, 'untouched', folder), left(2, 'killed-again', folder)):
        assert equal(one['weights'], other['weights']) and figures(one['rows']) == figures(other['rows']) and one['lr'] == other['lr']
        assert torch.equal(one['draw'], other['draw'])
    assert len((folder/'run-killed'/'history.csv').read_text().splitlines()) == 4


@pytest.fixture(scope='module')
def moved(ranks, folder):
    "Runs that other numbers of processes go on with, and one that nobody touches: their exit codes"
    return ranks(folder, '1:moving-still', '2:moving-moved-k5', '4:moving-moved-k5', '1:moving-moved', '2:moving-preempted-t6', '1:moving-preempted')[0]


def test_another_number_of_processes_goes_on_at_the_next_photo_that_nobody_had(folder, moved):
    "Killed on 2 processes in the second epoch, on 4 in the third, ended by 1: the photos, crops and weights of one that nobody touched"
    assert moved[:4] == [[0], [-9, -9], [-9]*4, [0]]
    lines = {what: sorted(line for p in folder.glob(f'moving-{what}*.txt') for line in p.read_text().splitlines()) for what in ('still', 'moved')}
    assert len(lines['still']) == 3*46 and lines['moved'] == lines['still']
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


def test_two_jobs_in_one_folder_are_refused(ranks, folder):
    (folder/'busy').mkdir()
    lock_folder(folder/'busy')
    try: codes, said = ranks(folder, '2:moving-busy')
    finally: unlock_folder(folder/'busy')
    assert all(codes[0]) and f'busy is in use by process {os.getpid()}' in said and not list((folder/'busy').glob('checkpoint*'))


machine = '--rdzv-backend', 'c10d', '--rdzv-id', 'test', '--local-addr', '127.0.0.1'


@pytest.fixture
def free_port():
    with socket.create_server(('127.0.0.1', 0)) as s: return s.getsockname()[1]


@pytest.mark.slow
def test_two_machines_of_two_processes_each(ranks, folder, alone, free_port):
    options = *machine, '--nnodes', 2, '--nproc-per-node', 2, '--rdzv-endpoint', f'127.0.0.1:{free_port}'
    both = [ranks.agent(folder, 'plain-machines', *options) for _ in range(2)]
    codes = [ranks.wait(folder, a) for a in both]
    assert [code for code, _ in codes] == [0, 0], codes[1][1]
    trained_as_one([one['plain'] for one in left(4, 'plain-machines', folder)], alone['plain'])


@pytest.mark.slow
def test_accelerate_launch(folder, alone, free_port):
    pytest.importorskip('accelerate', reason="needs accelerate: pip install -e '.[dev]'")
    p = run([sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1', '--mixed_precision', 'no',
             '--dynamo_backend', 'no', '--main_process_port', str(free_port), program, 'plain-accelerate', folder],
            env=os.environ | quiet | dict(FASTAI_HOME=str(folder/'fastai')))
    assert p.returncode == 0, p.stdout + p.stderr
    trained_as_one([one['plain'] for one in left(2, 'plain-accelerate', folder)], alone['plain'])


@pytest.mark.slow
def test_torchrun_goes_on_whatever_dies(ranks, folder, moved, free_port):
    "One machine; a second one joins; a rank is killed; one hangs; the second machine is lost. 12 updates, and the weights of a run that nobody touched"
    options = *machine, '--nnodes', '1:2', '--nproc-per-node', 1, '--max-restarts', 8, '--rdzv-conf', 'last_call_timeout=2'
    options += '--rdzv-endpoint', f'127.0.0.1:{free_port}'
    env = dict(PET_SHUTDOWN_TIMEOUT='3', TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1')
    first = ranks.agent(folder, 'elastic', *options, MACHINE='1', **env)
    until((folder/'alone').exists)
    second = ranks.agent(folder, 'elastic', *options, MACHINE='2', **env)
    (code, _), (killed, said) = (ranks.wait(folder, a) for a in (first, second))
    assert code == 0 and killed == -signal.SIGKILL and all((folder/what).exists() for what in ('killed', 'hung', 'lost')), said
    still, ended = left(1, 'moving-still', folder)[0], left(1, 'elastic', folder)[0]
    for k, v in still['weights'].items(): torch.testing.assert_close(ended['weights'][k], v, atol=1e-5, rtol=1e-4)
    assert [r['train_error'] for r in ended['rows']] == [r['train_error'] for r in still['rows']]
    lines = {line for p in folder.glob('elastic*.txt') for line in p.read_text().splitlines()}
    assert lines == {*(folder/'moving-still-1-0.pt.txt').read_text().splitlines()}
    resumes = pd.read_csv(folder/'elastic'/'resumes.csv')
    steps = resumes[['before', 'processes']].values.tolist()
    assert steps[0] == [1, 2] and steps[-1] == [2, 1] and [2, 2] in steps and len(steps) >= 4
    done = resumes.epochs*46 + resumes.photos
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


def test_a_process_that_fails_ends_the_job_with_its_sentence(ranks, folder):
    codes, said = ranks(folder, '2:failing')
    assert all(codes[0]) and 'no numbers' in said and 'train/' in said


def test_the_command_trains_and_resumes(ranks, folder):
    "As `train` in Python does; started once more, as torchrun does when a process has died, it goes on; other arguments are refused"
    (killed, other, codes, python), said = ranks(folder, '2:shell-killed', '2:shell-other', '2:shell-train', '2:shell-python')
    assert killed[1] == -signal.SIGKILL and other == [1, 1] and 'holds a run already' in said and codes == python == [0, 0], said
    loaded = ResNet.load(folder/'shell', device='cpu')
    assert loaded.history.processes.tolist() == [2, 2] and said.count('saved in ') == 1
    for k, v in left(2, 'shell-python', folder)[0]['weights'].items(): assert torch.equal(v, loaded.net.state_dict()[k]), k
    (codes,), said = ranks(folder, '2:shell-resume')
    assert codes == [0, 0] and said.count('saved in ') == 1, said
    assert pd.read_csv(folder/'shell-run'/'resumes.csv')[['before', 'processes']].values.tolist() == [[2, 2], [2, 2]]
    assert len(ResNet.load(folder/'shell', device='cpu').history) == 3


def test_after_training_all_have_the_same_network(ranks, folder):
    "The best epoch's weights, from the folder that the first one has written; BN's averages over the photos of all"
    codes, said = ranks(folder, '2:after')
    assert codes == [[0, 0]], said
    one, other = left(2, 'after', folder)
    assert one['restored'] == other['restored'] and one['photos'] == other['photos'] == one['seen'] + other['seen'] == 46
    for name, v in one['exact'].items():
        if 'num_batches' in name: continue
        assert torch.equal(v, other['exact'][name]), name
        if 'running' in name: torch.testing.assert_close(v, (one['own'][name] + other['own'][name])/2)
        assert torch.equal(one['best'][name], other['best'][name]), name


@pytest.mark.parametrize('when,batches', [('before', 4), ('meanwhile', 6), ('after', 6)])      # an update is two batches
def test_one_interrupted_process_stops_them_all_in_good_order(ranks, folder, when, batches):
    codes, said = ranks(folder, f'2:stopped-{when}')
    assert codes == [[0, 0]], said
    one, other = left(2, f'stopped-{when}', folder)
    assert one['batches'] == other['batches'] == batches and one['after'] == other['after']
    assert one['files'] == 1 and all(torch.equal(v, other['weights'][k]) for k, v in one['weights'].items() if 'running' not in k)


@pytest.mark.parametrize('what,why', [('photos', 'other training photos'), ('labels', 'other labels of the training photos'),
                                      ('pixels', 'other colour statistics'), ('lr', 'another learning rate')])
def test_processes_that_do_not_have_the_same_do_not_begin(ranks, folder, what, why):
    if what != 'lr': shutil.copytree(folder/'drawn', other := folder/what)
    photos = what != 'lr' and sorted((other/'train').iterdir())
    if what == 'photos': photos[3].unlink()
    if what == 'labels':
        labels = json.loads((other/'labels.json').read_text())
        (other/'labels.json').write_text(json.dumps(labels | {photos[0].stem: labels[photos[1].stem]}))
    if what == 'pixels': shutil.copy(photos[0], photos[1])
    codes, said = ranks(folder, f'2:different-{what}')
    assert codes == [[0, 0]], said
    for one in left(2, f'different-{what}', folder): assert f'process 1 has {why}' in one['said'] and one['batches'] == 0


def test_an_update_that_is_too_small_for_the_processes(ranks, folder):
    codes, said = ranks(folder, '2:small')
    assert all(codes[0]) and 'an update of bs=3 photos is too small for 2 processes' in said
