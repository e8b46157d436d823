"Predictions beside the plain way of making them, and what a prepared network must not get wrong."
import copy
import os
import pickle
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from fastai.torch_core import set_seed
from PIL import ImageOps
from torchvision import transforms as T
from torchvision.transforms.functional import hflip, to_tensor

from patience import until
from resnet_fastai import inference
from resnet_fastai.augment import ColorStats, resize_short
from resnet_fastai.core import ResNet
from resnet_fastai.data import LabelMap
from resnet_fastai.engine.demo_photos import draw_photo
from resnet_fastai.engine.files import DataError
from resnet_fastai.engine.layout import list_photos
from resnet_fastai.engine.photo import open_photo
from resnet_fastai.inference import dense_probs, evaluate, paper_scales, predict_probs
from resnet_fastai.practice import predict_folder as tables
from resnet_fastai.practice.predict_folder import predict_folder
from resnet_fastai.model import build_net

stats = ColorStats([.5, .4, .3], [.2, .02, .005], np.eye(3))
scales = {64: (64, 73, 110, 137, 183)}


def settled(net, size=64):
    "The network after BN has seen something, in eval mode"
    with torch.no_grad(): net.train()(torch.rand(16, 3, size, size)*2 - 1)
    return net.eval()


def a_net(arch='resnet18', n_out=6, seed=0):
    set_seed(seed)
    return settled(build_net(arch, n_out))


def a_photo(w=150, h=110, seed=0): return draw_photo('bricks', np.random.default_rng(seed)).resize((w, h))


def plain(net, img, size=64, mean=stats.mean):
    "Fifty forward passes, one by one, of torchvision's crops"
    net, mean = copy.deepcopy(net).eval(), torch.tensor(mean, dtype=torch.float32)[:, None, None]
    crops = [to_tensor(c) - mean for s in scales[size] for c in T.TenCrop(size)(T.Resize(s)(img))]
    with torch.no_grad(): return torch.cat([net(c[None]).softmax(1) for c in crops]).mean(0).numpy()


def close(a, b, atol=1e-5): np.testing.assert_allclose(a, b, atol=atol, rtol=0)


def _whole(img, size):
    "Photo and mirror image, (2,3,H,W) uint8, at each of the five scales"
    pairs = [np.stack([im, ImageOps.mirror(im)]) for im in (resize_short(img, s) for s in paper_scales(size))]
    return [torch.from_numpy(p).permute(0, 3, 1, 2) for p in pairs]


@pytest.mark.paper('3.3-head', '3.4-ten-crop', '3.4-scales')
@pytest.mark.parametrize('arch,wh', [('resnet18', (150, 110)), ('plain18', (111, 150)), ('cifar_resnet8', (64, 64))])
def test_fifty_crops_are_the_plain_way(arch, wh):
    net, img = a_net(arch).train(), a_photo(*wh)
    close(predict_probs(net, img, stats, 64, precision='fp32'), plain(net, img))
    close(predict_probs(net, img, stats, 64), plain(net, img), 5e-3)                         # a network of chance, in the default precision


@pytest.mark.paper('3.4-dense', '3.4-scales')
@pytest.mark.parametrize('arch', ['resnet18', 'cifar_resnet8'])
def test_dense_is_written_out(arch):
    "Every window of the last maps, at five scales and mirrored, read one by one"
    net, img = a_net(arch), a_photo()
    side, mean, found = net[:-3](torch.zeros(1, 3, 64, 64)).shape[-1], torch.tensor(stats.mean, dtype=torch.float32)[:, None, None], []
    with torch.no_grad():
        for s in scales[64]:
            for im in (T.Resize(s)(img), hflip(T.Resize(s)(img))):
                maps = net[:-3](to_tensor(im)[None] - mean)[0]
                windows = [maps[:, i:i+side, j:j+side].mean((1, 2)) for i in range(maps.shape[1]-side+1) for j in range(maps.shape[2]-side+1)]
                found.append(torch.stack([net.fc(w).softmax(0) for w in windows]).mean(0))
    close(torch.cat([dense_probs(net, x, stats, 64) for x in _whole(img, 64)]), torch.stack(found))
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad(): close(dense_probs(net, x, stats, 64), net(x - mean).softmax(1))    # one window: the ordinary forward pass


def test_each_prediction_is_of_the_weights_of_its_time(drawn):
    "predict, fit, predict, load_state_dict, predict: nothing of an earlier network is left"
    model = ResNet(*drawn, size=64, arch='resnet18', bs=8, n_out=1000, num_workers=0)
    photo, net = list_photos(drawn[0]/'test')[0], model.net
    img, mean = open_photo(photo), model.stats.mean
    ask = lambda: [predict_probs(net, photo, model.stats, 64, precision=p) for p in ('fp32', None)]
    def check():
        exact, fast = ask()
        close(exact, plain(net, img, mean=mean)); close(fast, exact, 5e-3)
        return exact
    first = check()
    with model.learn.no_bar(), model.learn.no_logging(): model.fit(1)
    second, kept = check(), copy.deepcopy(net.state_dict())
    with model.learn.no_bar(), model.learn.no_logging(): model.fit(1)                          # fit after predict after fit
    third = check()
    net.load_state_dict(kept)
    close(check(), second, 1e-7)
    assert min(abs(first - second).max(), abs(second - third).max()) > 1e-4
    net.bn1.running_mean.add_(.5); check()
    net.fc = torch.nn.Linear(512, 1000); check()
    net.fc.weight.data = net.fc.weight.data.flip(0); check()
    net.relu = torch.nn.SiLU(); check()                                                        # no weight tells of this one


def test_predicting_leaves_the_network_alone():
    net = build_net('resnet18', 6).train()
    net.bn1.eval()                                                                            # frozen by its owner
    before, pickled, names = copy.deepcopy(net.state_dict()), len(pickle.dumps(net)), [set(vars(m)) for m in net.modules()]
    predict_probs(net, a_photo(), stats, 64)
    dense_probs(net, _whole(a_photo(), 64)[0], stats, 64)
    assert net.training and not net.bn1.training and net.layer1.training
    for k, v in net.state_dict().items(): assert torch.equal(v, before[k]), k
    assert len(pickle.dumps(net)) == pickled and [set(vars(m)) for m in net.modules()] == names


def test_threads_predict_at_once():
    nets, imgs = [a_net('cifar_resnet8', seed=s) for s in (1, 2)], [a_photo(seed=s) for s in range(3)]
    jobs = [(n, i) for n in nets for i in imgs]*2
    expected = [plain(n, i) for n, i in jobs]
    with ThreadPoolExecutor(4) as pool: found = list(pool.map(lambda j: predict_probs(j[0], j[1], stats, 64, precision='fp32'), jobs))
    for f, e in zip(found, expected): close(f, e)


class Backwards(torch.nn.Module):
    "Names and shapes of a convolution and its BN, in an order that must not be folded; logits from a functional end"
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.drop = torch.nn.Conv2d(3, 3, 3), torch.nn.BatchNorm2d(3), torch.nn.Dropout(.5)
    def forward(self, x): return self.drop(torch.relu(self.conv1(self.bn1(x)))).mean((2, 3))*5


class Shared(torch.nn.Module):
    "A convolution that is read by BN, and once more"
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.BatchNorm2d(3)
    def forward(self, x):
        y = self.conv1(x)
        return (self.bn1(y) + y).mean((2, 3))*5


def foreign():
    import timm
    norm = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv2d(3, 4, 3))
    return dict(torchvision=torchvision.models.resnet18(num_classes=6), mobilenet=torchvision.models.mobilenet_v3_small(num_classes=6), backwards=Backwards(),
                shared=Shared(), timm=timm.create_model('resnet10t', num_classes=6), preact=timm.create_model('test_resnet', num_classes=6),
                weight_norm=torch.nn.Sequential(norm, torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()))


@pytest.mark.parametrize('name', ['torchvision', 'mobilenet', 'backwards', 'shared', 'timm', 'preact', 'weight_norm'])
def test_networks_of_others(name):
    set_seed(0)
    net, img = settled(foreign()[name]), a_photo()
    close(predict_probs(net, img, stats, 64, precision='fp32'), plain(net, img))
    close(predict_probs(net, img, stats, 64, precision='bf16'), plain(net, img), 1e-2)
    net.register_forward_hook(lambda m, args, out: out*0)                                    # a hook that has the last word
    close(predict_probs(net, img, stats, 64), plain(net, img))


def test_the_order_of_sixteen_bits(drawn):
    "A trained network: no probability moves by more than 2e-3, no label overtakes another from further away"
    model = ResNet(*drawn, size=64, arch='resnet18', bs=8, n_out=1000, num_workers=0, lr=.01)
    with model.learn.no_bar(), model.learn.no_logging(): model.fit(5)
    photos = [p for s in ('val', 'test') for p in list_photos(drawn[0]/s)]
    exact, fast = (predict_probs(model.net, photos, model.stats, 64, precision=p) for p in ('fp32', 'bf16'))
    assert 0 < abs(exact - fast).max() < 2e-3
    for e, f in zip(exact, fast):
        best = np.argsort(-e)[:5]
        assert all(f[i] > f[j] for k, i in enumerate(best) for j in best[k+1:] if e[i] - e[j] > 2e-3)


@pytest.fixture
def model():
    "As a loaded `ResNet`; labels that a reader of tables may take for something else"
    labels = LabelMap({}, dict(zip(['NA', 'b', 'c', 'd,"e"', 'null'], (5, 1, 2, 3, 0))))
    return SimpleNamespace(learn=None, net=a_net('cifar_resnet8'), stats=stats, size=64, labels=labels)


@pytest.fixture
def folder(tmp_path):
    "Twelve photos in two folders, and three files that are none"
    for i in range(12):
        p = tmp_path/'photos'/('a' if i % 2 else 'b, c')/f'{i}.jpg'
        p.parent.mkdir(parents=True, exist_ok=True)
        a_photo(150 + i, 110, i).save(p)
    whole = (tmp_path/'photos'/'a'/'1.jpg').read_bytes()
    (tmp_path/'photos'/'cut.jpg').write_bytes(whole[:len(whole)//2])
    (tmp_path/'photos'/'empty.png').write_bytes(b'')
    (tmp_path/'photos'/'text.jpg').write_text('hello')
    return tmp_path/'photos'


@pytest.mark.paper('4.1-errors')
def test_evaluate_counts(model, drawn):
    labels = pd.read_json(drawn[1], typ='series')
    photos, names = list_photos(drawn[0]/'test'), sorted(set(labels))
    model.labels, model.net = LabelMap({}, {l: i for i, l in enumerate(names)}), a_net('cifar_resnet8', len(names))
    mean, wrong = torch.tensor(stats.mean, dtype=torch.float32)[:, None, None], {1: 0, 5: 0}
    for p in photos:
        crops = torch.stack([to_tensor(c) - mean for c in T.TenCrop(64)(T.Resize(73)(open_photo(p)))])
        with torch.no_grad(): ranked = model.net(crops).log_softmax(1).mean(0).argsort(descending=True).tolist()
        for k in wrong: wrong[k] += names.index(labels.get(p.stem, labels.get(p.name))) not in ranked[:k]
    found = evaluate(model, protocol='10crop', average='logits', precision='fp32', data_path=drawn[0], label_path=drawn[1])
    assert [round(found[f'top{k}_error'][0]*len(photos)) for k in wrong] == list(wrong.values())
    with pytest.raises(DataError, match='pass data_path and label_path'): evaluate(model)


def test_a_table_is_what_single_predictions_say(model, folder):
    found = predict_folder(model, folder, n=5, precision='fp32')
    assert list(found.columns) == ['id', *(f'{w}_{i}' for i in range(1, 6) for w in ('label', 'prob')), 'error']
    assert found.id.tolist() == [p.relative_to(folder).as_posix() for p in list_photos(folder)]
    good, bad = found[found.error == ''], found[found.error != '']
    assert set(bad.id) == {'cut.jpg', 'empty.png', 'text.jpg'} and all(name in error for name, error in zip(bad.id, bad.error))
    for _, row in good.iterrows():
        probs = predict_probs(model.net, folder/row.id, stats, 64, precision='fp32')
        for i in range(1, 6): assert abs(row[f'prob_{i}'] - probs[model.labels.encoding[row[f'label_{i}']]]) < 1e-6
        assert all(row[f'prob_{i}'] >= row[f'prob_{i+1}'] for i in range(1, 5))


@pytest.mark.parametrize('protocol', ['1crop', '10crop', '50crop', 'dense'])
def test_batches_do_not_matter(model, folder, protocol):
    small, large = (predict_folder(model, folder, n=2, protocol=protocol, precision='fp32', bs=bs, num_workers=w) for bs, w in ((7, 0), (100, 3)))
    pd.testing.assert_frame_equal(small, large, atol=1e-6, rtol=0)


def test_a_file_is_what_is_returned(model, folder, tmp_path):
    memory, dest = predict_folder(model, folder, n=3), tmp_path/'new'/'answers.csv'
    pd.testing.assert_frame_equal(predict_folder(model, folder, dest, n=3), memory)
    a_photo(seed=99).save(folder/'zz.jpg')                                                    # one more photo, for a second call
    again = predict_folder(model, folder, dest, n=3)
    pd.testing.assert_frame_equal(again[:-1], memory)
    assert again.id.iloc[-1] == 'zz.jpg' and again.error.iloc[-1] == ''
    with pytest.raises(DataError, match='another n'): predict_folder(model, folder, dest, n=2)
    with pytest.raises(DataError, match='another protocol'): predict_folder(model, folder, dest, n=3, protocol='1crop')
    model.net.fc.bias.data.add_(torch.arange(6.))
    with pytest.raises(DataError, match='another model'): predict_folder(model, folder, dest, n=3)
    assert len(pd.read_csv(dest)) == len(again)


def test_what_cannot_be_answered_is_refused_first(model, folder, tmp_path):
    (tmp_path/'mine.csv').write_text('precious')
    with pytest.raises(DataError, match='not ours'): predict_folder(model, folder, tmp_path/'mine.csv')
    assert (tmp_path/'mine.csv').read_text() == 'precious'
    with pytest.raises(DataError, match='neither .csv nor .parquet'): predict_folder(model, folder, tmp_path/'a.xlsx')
    with pytest.raises(DataError, match='not a folder'): predict_folder(model, tmp_path/'nowhere')
    with pytest.raises(DataError, match='holds no photos'): predict_folder(model, (tmp_path/'none').mkdir() or tmp_path/'none')
    with pytest.raises(DataError, match='knows 5 labels'): predict_folder(model, folder, n=6)
    with pytest.raises(DataError, match='not a path'): predict_folder(model, [a_photo()])
    with pytest.raises(DataError, match="it must be one of '1crop', '10crop', '50crop', 'dense'"): predict_folder(model, folder, protocol='2crop')
    with pytest.raises(DataError, match="it must be one of 'fp32', 'bf16', 'fp16'"): predict_folder(model, folder, precision='int8')


def test_parquet(model, folder, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(tables.importlib.util, 'find_spec', lambda name: None)
        with pytest.raises(DataError, match='need pyarrow'): predict_folder(model, folder, tmp_path/'a.parquet')
        assert not list(tmp_path.glob('a.*'))
    found = predict_folder(model, folder, tmp_path/'a.parquet', n=2)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path/'a.parquet'), found, check_dtype=False)
    a_photo(seed=98).save(folder/'zz.jpg')
    with monkeypatch.context() as m:                                                           # rows are there, and the Parquet file is not made of them
        m.setattr(tables, '_write_parquet', lambda *a: (_ for _ in ()).throw(OSError('no room')))
        with pytest.raises(OSError, match='no room'): predict_folder(model, folder, tmp_path/'a.parquet', n=2)
    found = predict_folder(model, folder, tmp_path/'a.parquet', n=2)
    assert len(found) == len(pd.read_parquet(tmp_path/'a.parquet')) and 'zz.jpg' in {*found.id}


killed = """
import sys, time
from tests.test_inference import *
model = pickle.loads(sys.stdin.buffer.read())
answers = tables._answers
def some(*args, **kw):
    for n, a in enumerate(answers(*args, **kw)):
        yield a
        while n == 5: time.sleep(1)                                                            # until it is killed
tables._answers = some
work = tables._work
tables._work = lambda *args: work(*args, block=2)
predict_folder(model, sys.argv[1], sys.argv[2], n=2, precision='fp32')
"""


def test_killed_and_gone_on(model, folder, tmp_path):
    whole, dest, root = predict_folder(model, folder, n=2, precision='fp32'), tmp_path/'k.csv', Path(__file__).resolve().parent.parent
    def rows(): return dest.read_bytes().count(b'\n') - 1 if dest.exists() else 0

    with subprocess.Popen([sys.executable, '-W', 'ignore', '-c', killed, str(folder), str(dest)], stdin=subprocess.PIPE, cwd=root,
                          env=os.environ | dict(PYTHONPATH=os.pathsep.join([str(root), str(root/'tests')])), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as p:
        p.stdin.write(pickle.dumps(model)); p.stdin.close()
        until(lambda: p.poll() is not None or rows() >= 4)
        p.kill()
    assert p.returncode == -signal.SIGKILL and 4 <= rows() < len(whole)
    os.truncate(dest, dest.stat().st_size - 3)                                                 # as a kill in the middle of a write leaves it
    asked, ask = [], inference.open_photo
    inference.open_photo = lambda photo: asked.append(photo) or ask(photo)
    try: pd.testing.assert_frame_equal(predict_folder(model, folder, dest, n=2, precision='fp32'), whole, atol=1e-6, rtol=0)
    finally: inference.open_photo = ask
    assert 0 < len(asked) <= len(whole) - 4                                                    # no photo is done again whose row was on its way


def test_the_same_names_elsewhere_are_other_photos(model, folder, tmp_path, monkeypatch):
    here, elsewhere, names = folder/'a', tmp_path/'elsewhere', ['1.jpg', '3.jpg']
    elsewhere.mkdir()
    for i,p in enumerate(here.iterdir()): a_photo(seed=100 + i).save(elsewhere/p.name)
    predict_folder(model, here, tmp_path/'a.csv', n=1)
    with pytest.raises(DataError, match='begun with another folder'): predict_folder(model, elsewhere, tmp_path/'a.csv', n=1)
    monkeypatch.chdir(here)
    predict_folder(model, [here/n for n in names], tmp_path/'b.csv', n=1); predict_folder(model, names, tmp_path/'c.csv', n=1)
    monkeypatch.chdir(elsewhere)
    predict_folder(model, [here/n for n in names], tmp_path/'b.csv', n=1)                      # whole paths mean the same everywhere
    with pytest.raises(DataError, match='begun with another folder'): predict_folder(model, names, tmp_path/'c.csv', n=1)


def test_a_file_that_two_fill_is_refused(tmp_path):
    first = tables.ResumableCSV(tmp_path/'a.csv', ['id', 'label'], {})
    first.add([['a', 'x']])
    second = tables.ResumableCSV(tmp_path/'a.csv', ['id', 'label'], {})
    second.add([['b', 'x']])
    with pytest.raises(DataError, match='not as it was left'): first.add([['b', 'x']])
    assert set(tables.ResumableCSV(tmp_path/'a.csv', ['id', 'label'], {}).ids()) == {'a', 'b'}


def test_labels_that_are_no_unicode_are_written_as_escapes(tmp_path):
    rows = tables.ResumableCSV(tmp_path/'a.csv', ['id', 'label'], {})
    rows.add([['a', '\ud800 x'], [os.fsdecode(b'\xff'), 'y']])
    assert (tmp_path/'a.csv').read_bytes().splitlines()[1:] == [b'a,\\ud800 x', b'\xff,y'] and set(rows.ids()) == {'a', os.fsdecode(b'\xff')}
