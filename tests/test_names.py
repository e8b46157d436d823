"Names that are not UTF-8, as old disks and other systems leave them, go through everything, also where pandas keeps strings in pyarrow."
import json
import os

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from resnet_fastai.core import ResNet
from resnet_fastai.data import from_folders
from resnet_fastai.practice.prepare import check_data

classes = [b'caf\xe9', b'tea']


@pytest.fixture
def folders(tmp_path):
    "Two classes of four photos in each split; bytes in their names that are no UTF-8"
    src, rng = os.fsencode(tmp_path/'src'), np.random.default_rng(0)
    for split in (b'train', b'val', b'test'):
        for c in classes:
            try: os.makedirs(os.path.join(src, split, c))
            except OSError: pytest.skip('this file system takes UTF-8 names only')
            for i in range(4): Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(os.fsdecode(os.path.join(src, split, c, b'%d\xff.jpg' % i)))
    return tmp_path/'src'


def test_names_that_are_not_utf8(folders, tmp_path):
    paths = from_folders(folders, tmp_path/'photos')
    wanted = [os.fsdecode(c) for c in classes]
    assert json.loads(paths.label_encoding.read_text(encoding='utf-8')) == {c: i for i, c in enumerate(wanted)}
    bad = os.fsdecode(b'tea/bad\xff.jpg')
    (paths.data_path/'test'/bad).write_bytes(b'no photo')
    assert check_data(*paths).query("problem == 'unreadable'").photo.tolist() == [f'test/{bad}']

    model = ResNet(*paths, arch='resnet18', size=32, bs=4, n_out=2, num_workers=0)
    model.fit(1)
    assert set(model.evaluate(split='val', protocol='1crop', per_class=True).label) == set(wanted)
    here = {os.path.relpath(os.path.join(at, f), paths.data_path/'test') for at, _, files in os.walk(paths.data_path/'test') for f in files}
    ask = lambda dest=None: model.predict_folder(paths.data_path/'test', n=2, dest=dest, protocol='1crop')
    whole = ask()
    assert set(whole.id) == here and whole.id[whole.error != ''].tolist() == [bad] and set(whole.label_1) - {''} <= set(wanted)
    for file in ('t.csv', 't.csv', 't.parquet'): pd.testing.assert_frame_equal(ask(tmp_path/file).sort_values('id'), whole.sort_values('id'), rtol=1e-5)
    escaped = lambda name: os.fsencode(name).decode('utf-8', 'backslashreplace')                   # Parquet holds UTF-8 only
    assert set(pd.read_parquet(tmp_path/'t.parquet').id) == {escaped(n) for n in here}
