"Questions about many photos, shared out over processes"
import os
import shutil
import signal
import sys

import numpy as np
import pandas as pd
import pytest

from patience import run
from ranks import left
from resnet_fastai.data import demo_data
from resnet_fastai.engine.files import DataError
from resnet_fastai.engine.shared import shared_out


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('shared')
    demo_data(folder/'drawn', sizes=dict(train=42, val=23, test=2))
    shutil.copytree(folder/'drawn', folder/'faulty')
    train, val = (sorted((folder/'faulty'/split).iterdir()) for split in ('train', 'val'))
    for i in (3, 17): train[i].write_bytes(train[i].read_bytes()[:300])           # cannot be read
    shutil.copy(val[5], train[20])                                                # in two splits
    (folder/'faulty'/'val'/'nobody.jpg').write_bytes(val[6].read_bytes())         # has no label
    return folder


@pytest.fixture(scope='module')
def found(ranks, folder):
    "The tables that one, two and three processes make of the same photos"
    codes, said = ranks(folder, '1:tables', '2:tables', '3:tables', '2:begun-predict-4', '1:begun-predict', '2:begun-evaluate-4', '3:begun-evaluate')
    assert [codes[k] for k in (0, 1, 2, 4, 6)] == [[0], [0]*2, [0]*3, [0], [0]*3], said
    for k in (3, 5): assert codes[k][0] and codes[k][1] == -signal.SIGKILL, said
    return {n: left(n, 'tables', folder) for n in (1, 2, 3)}


@pytest.mark.parametrize('n', [2, 3])
def test_processes_make_the_tables_of_one(found, folder, n):
    alone = found[1][0]
    assert len({*alone['problems'].problem}) > 2 and 0 < alone['errors'].top1_error.iloc[0] < 1 and len(alone['bad']) == 2 and len(alone['rows']) == 68
    for one in found[n]:
        assert one['colours'] == alone['colours'] and one['bad'] == alone['bad']               # to the bit
        assert np.array_equal(one['moments'], alone['moments'])
        for name in ('errors', 'classes', 'problems'): pd.testing.assert_frame_equal(one[name], alone[name])
        for name in ('memory', 'rows'): pd.testing.assert_frame_equal(one[name], alone[name], atol=1e-6, rtol=0)
    files = [pd.read_csv(folder/f'tables-{n}-0.pt.csv') for n in (1, n)]
    pd.testing.assert_frame_equal(*files, atol=1e-6, rtol=0)
    assert not list(folder.glob('*.parts')) and not (folder/f'tables-{n}-1.pt.csv').exists()


def test_the_rows_of_those_that_live_are_safe_and_the_same_command_goes_on(found, folder):
    "One of two processes dies after four blocks of two photos; one alone, or three, ask about what is left"
    for ask, n, photos in ('predict', 1, 68), ('evaluate', 3, 42):
        ended = left(n, f'begun-{ask}', folder)
        (safe,), asked = {had for one in ended for had in one['had']}, [i for one in ended for i in one['asked']]
        assert 8 <= safe < photos and len(asked) == len({*asked}) == photos - safe
        if ask == 'predict':
            want = found[1][0]['rows'].drop(columns=['label_3', 'prob_3'])
            pd.testing.assert_frame_equal(ended[0]['found'], want, atol=1e-6, rtol=0)
            assert not (folder/'begun.csv.parts').exists()
        else:
            classes = found[1][0]['classes'].query("protocol == '1crop'")
            for one in ended: assert one['found'].top1_error[0] == pytest.approx((classes.top1_error*classes.photos).sum()/42)
            assert not list((folder/'fastai'/'data'/'shared').glob('*'))


def test_python_m_and_torchrun(found, folder):
    "The command in two processes: one says what there is to say, and the file is that of one process"
    start = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m']
    p = run([*start, 'resnet_fastai', 'predict', folder/'model', folder/'faulty', '--csv', folder/'shell.csv', '-n', '3'],
            env=os.environ | dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES=''))
    assert p.returncode == 0, p.stderr
    assert p.stdout.count('68 photos in') == 1 and p.stderr.count('error: ') == 2
    rows = pd.read_csv(folder/'shell.csv')
    assert rows.id.tolist() == found[1][0]['rows'].id.tolist() and rows.error.notna().sum() == 2


def test_a_process_with_other_photos_is_told_so(folder, monkeypatch):
    "Without a process group: what the others have is put into its mouth"
    from resnet_fastai.engine import shared
    monkeypatch.setattr(shared, 'num_distrib', lambda: 2)
    for other, said in ((('x', None), 'photos'), ((None, 'x'), 'model and arguments')):
        monkeypatch.setattr(shared, 'of_all', lambda mine: [mine, [o or m for o, m in zip(other, mine)]])
        with pytest.raises(DataError, match=f'process 1 does not have the {said} of process 0'): shared_out(iter, sorted((folder/'drawn').rglob('*.jpg')))
