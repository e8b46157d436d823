"A table of predictions that a kill at any byte leaves whole, and that is never written over."
import json

import numpy as np
import pandas as pd
import pytest
from fastai.torch_core import set_seed
from pandas.testing import assert_frame_equal
from pathlib import Path

from resnet_fastai.data import demo_data, resnet_dls
from resnet_fastai.engine.files import DataError
from resnet_fastai.inference import evaluate
from resnet_fastai.practice.predict_folder import ResumableCSV, predict_folder
from resnet_fastai.training import resnet_learner

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture
def table(tmp_path):
    "A table of five rows in two blocks: (the file, how to open it)"
    file = tmp_path/'new'/'a.csv'
    def open_rows(model='m'): return ResumableCSV(file, ['id', 'label'], dict(model=model, n=1))
    rows = open_rows()
    rows.add([['one, "quoted"', 'x'], ['two\nlines', 'y'], ['car\rriage', 'z']])
    rows.add([['three', 'z'], ['four', 'z']])
    return file, open_rows


def test_killed_at_any_byte_of_the_last_block(table):
    file, open_rows = table
    whole = file.read_bytes()
    for n in range(whole.index(b'three'), len(whole) + 1):
        file.write_bytes(whole[:n])
        rows = open_rows()
        assert file.read_bytes() == whole
    rows.add([['five', 'z']])
    assert pd.read_csv(file).id.tolist() == ['one, "quoted"', 'two\nlines', 'car\rriage', 'three', 'four', 'five']
    assert set(rows.ids()) == {*pd.read_csv(file).id}


@pytest.mark.parametrize('was, now', [(b'z\n', b'z,my note\n'), (b'\n', b'\r\n'), (b'four,z\n', b'four,z\nsix,z\n'), (b'x\n', b'q\n'), (b'three,z\n', b'')])
def test_an_edited_table_stays_the_users(table, was, now):
    file, open_rows = table
    file.write_bytes(theirs := file.read_bytes().replace(was, now))
    with pytest.raises(DataError, match='not as it was left'): open_rows()
    assert file.read_bytes() == theirs


def test_other_files_and_other_models_are_refused(table):
    file, open_rows = table
    with pytest.raises(DataError, match='begun with another model'): open_rows('other')
    (mine := file.parent/'mine.csv').write_text('precious')
    with pytest.raises(DataError, match='not ours'): ResumableCSV(mine, ['id'], {})
    assert mine.read_text() == 'precious'


def test_a_folder(tmp_path):
    set_seed(0)
    demo = demo_data(tmp_path/'demo', sizes=dict(train=64, val=16, test=24))
    learn = resnet_learner(resnet_dls(*demo, 16, size=32, num_workers=0), 'cifar_resnet8', bs=16)
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    for name in ('cut.jpg', 'note.png'): (demo.data_path/'test'/name).write_bytes(b'\xff\xd8 not a photo')
    ask = lambda n=2: predict_folder(learn, demo.data_path/'test', tmp_path/'answers.csv', n=n, protocol='10crop')
    found, labels = ask(), json.loads(demo.label_path.read_text())
    assert len(found) == 26 and sum(found.error != '') == 2
    right = np.mean([labels[Path(i).stem] == label for i, label in zip(found.id, found.label_1) if Path(i).stem in labels])
    (demo.data_path/'test'/'cut.jpg').unlink(), (demo.data_path/'test'/'note.png').unlink()
    assert 1 - right == pytest.approx(evaluate(learn, protocol='10crop').top1_error[0])
    assert_frame_equal(ask(), found)                                     # nothing is left to do
    with pytest.raises(DataError, match='begun with another n'): ask(3)


def test_a_learner_that_has_not_been_trained_is_refused(drawn, tmp_path):
    learn = resnet_learner(resnet_dls(*drawn, size=32, num_workers=0), 'cifar_resnet8', bs=8)
    with pytest.raises(DataError, match='has not been trained'): predict_folder(learn, drawn.data_path/'test', tmp_path/'a.csv')
    assert not (tmp_path/'a.csv').exists()
