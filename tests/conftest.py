"What several tests need: real photos where they are at hand, and a small set of drawn ones."
import json
import os
import signal
import tarfile
from pathlib import Path

import matplotlib
import pytest

matplotlib.use('Agg')
root = Path(__file__).resolve().parent.parent


def pytest_configure(config):
    config.addinivalue_line('markers', 'paper(*rules): the rules of nbs/experiments/paper.json that the test proves')
    config.addinivalue_line('markers', 'slow: starts many processes or waits for a timeout; the group takes about two minutes on two idle cores')
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:      # started in a script's background, where a shell turns Ctrl-C off
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN: signal.signal(signal.SIGTERM, signal.SIG_DFL)     # jobs of the tests inherit it


@pytest.fixture(scope='session', autouse=True)
def own_fastai_home(tmp_path_factory):
    "fastai's folders in a temporary place: no test reads or changes what the user has"
    os.environ['FASTAI_HOME'] = str(tmp_path_factory.mktemp('fastai'))


@pytest.fixture(scope='session')
def shared_data():
    "The folder of real photos beside the checkout"
    path = root.parent/'shared'/'data'
    if not path.is_dir(): pytest.skip('needs the real photos of ../shared/data, which are not here')
    return path


def unpacked(name, shared_data, tmp_path_factory):
    dest = tmp_path_factory.mktemp(name)
    safe = {'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}                  # 3.11.4, 3.10.12 and newer know filters
    with tarfile.open(shared_data/f'{name}.tar') as t: t.extractall(dest, **safe)
    return dest/name


@pytest.fixture(scope='session')
def photos(shared_data, tmp_path_factory):
    "A folder of 59 real photographs, about 500×375, some grey"
    return unpacked('photos', shared_data, tmp_path_factory)


@pytest.fixture(scope='session')
def clothing(shared_data, tmp_path_factory):
    "Class folders of 640 real photographs"
    return unpacked('clothing', shared_data, tmp_path_factory)


@pytest.fixture(scope='session')
def ranks():
    "ranks(folder, '2:failing', …): jobs of tests/many.py in so many processes"
    from ranks import Ranks
    ranks = Ranks()
    yield ranks
    ranks.close()


@pytest.fixture(scope='module')
def one_thread():
    "Small nets are slower on two, and much slower beside other work"
    import torch
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture
def drawn(tmp_path):
    "A fresh small data set of drawn photos: (data_path, label_path, label_encoding)"
    from resnet_fastai.data import demo_data
    return demo_data(tmp_path/'drawn', sizes=dict(train=16, val=8, test=4))


@pytest.fixture
def edit():
    "edit(path, change): apply a change to the object in a JSON file"
    def apply(path, change):
        obj = json.loads(path.read_text())
        path.write_text(json.dumps(change(obj) or obj))
    return apply
