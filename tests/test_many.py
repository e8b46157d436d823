"Two, three and six processes do the training of one"
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from patience import run
from resnet_fastai.data import demo_data

program = Path(__file__).parent/'many.py'


def launch(n, what, folder):
    "Run many.py in n processes; (exit code, what was said)"
    start = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(n)] if n > 1 else [sys.executable]
    env = os.environ | dict(OMP_NUM_THREADS='1', FASTAI_HOME=str(folder/'fastai'), CUDA_VISIBLE_DEVICES='')
    p = run([*start, program, what, folder], env=env)
    return p.returncode, p.stdout + p.stderr


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
    code, said = launch(1, 'killed-again', folder)                       # another number of processes has other generators
    assert code != 0 and 'another number of processes' in said


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
