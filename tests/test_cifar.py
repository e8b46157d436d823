"The CIFAR-10 scripts: data in four layouts, published weights, crops beside a brute-force version, a run that is stopped and goes on."
import copy
import importlib.util
import io
import json
import pickle
import shutil
import signal
import struct
import warnings
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from resnet_fastai.core import ResNet
from resnet_fastai.engine.files import DataError, PhotoError
from resnet_fastai.model import Block, build_net
from resnet_fastai.training import WarmUp

experiments = Path(__file__).resolve().parent.parent/'nbs'/'experiments'
spec = importlib.util.spec_from_file_location('cifar10_script', experiments/'cifar10.py')
cifar = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cifar)


@pytest.fixture
def figures(monkeypatch):
    "The second script, which imports the first"
    monkeypatch.syspath_prepend(str(experiments))
    spec = importlib.util.spec_from_file_location('cifar_figures_script', experiments/'cifar_figures.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sha256 = dict(train='d59acf989e068e709ce686cda292672c7b212c08d29d3d3e6d8c3aa99eba6a85',      # of CIFAR-10's photos and labels
              test='899683d46c3a8c66fd56e1af12202e69fe5a4517be10b0f68e04c78fe585c57c')
classes = 'bird', 'cat', 'ship'
pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.filterwarnings('ignore:.*is not CIFAR-10')]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "60 drawn PNGs of 32×32 in three classes: 48 to train on, 12 to test"
    root, rng = tmp_path_factory.mktemp('cifar'), np.random.default_rng(0)
    for split, n in dict(train=16, test=4).items():
        for c, name in enumerate(classes):
            (root/split/name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 250, (32, 32, 3))
                pixels[..., c] += 5                                      # a hint, so that there is something left to learn
                Image.fromarray(pixels.astype(np.uint8)).save(root/split/name/f'{i:04}.png')
    return root


@pytest.fixture
def run(folder, tmp_path):
    "run(name): a run of 8 updates of 16 photos, in epochs of 3, 3 and 2"
    def go(name, **kwargs):
        args = dict(depth=8, updates=8, seed=3, bs=16, out=tmp_path/f'{name}.json', run_folder=tmp_path/name,
                    cache=tmp_path/'cache') | kwargs
        return cifar.train(folder, **args), json.loads(args['out'].read_text())
    return go


@pytest.mark.paper('4.2-crop')
def test_crops_are_those_of_a_loop():
    x = torch.randn(2, 3, 6, 5)                                          # not square, so that rows and columns cannot be mixed up
    for photo in x:
        padded = np.pad(photo.numpy(), ((0, 0), (2, 2), (2, 2)))
        crops = {(dy, dx, flip): padded[:, dy:dy+6, dx:dx+5][..., ::(-1 if flip else 1)]
                 for dy in range(5) for dx in range(5) for flip in (False, True)}
        names = {np.ascontiguousarray(c).tobytes(): k for k, c in crops.items()}
        torch.manual_seed(0)
        found = [names[c.contiguous().numpy().tobytes()] for c in cifar.pad_crop_flip(photo.expand(5000, -1, -1, -1), pad=2)]
        counts = [found.count(k) for k in crops]
        assert min(counts) > 50 and max(counts) < 150                    # 100 of each are expected, ± 10
    torch.manual_seed(0)
    mixed = cifar.pad_crop_flip(x.repeat(20, 1, 1, 1), pad=2)            # each photo stays in its place
    for i, crop in enumerate(mixed): assert torch.isin(crop[crop != 0], x[i % 2]).all()


def test_photos_are_pillows(folder, tmp_path):
    data = cifar.cifar10(folder, tmp_path)
    assert data['classes'] == list(classes) and [len(data[s][0]) for s in ('train', 'test')] == [48, 12]
    for split in ('train', 'test'):
        x, y = data[split]
        for i, p in enumerate(sorted((folder/split).rglob('*.png'))):
            assert classes[y[i]] == p.parent.name and np.array_equal(x[i].permute(1, 2, 0), np.asarray(Image.open(p)))


# ── The data set, in four layouts ────────────────────────────────────────────────────────────────────────────────────────────

def python2(value):
    "Opcodes of protocol 2 as Python 2 wrote them, in which CIFAR-10 was published: its texts are bytes now"
    if isinstance(value, dict): return b'}(' + b''.join(python2(k) + python2(v) for k, v in value.items()) + b'u'
    if isinstance(value, list): return b'](' + b''.join(map(python2, value)) + b'e'
    if isinstance(value, int): return b'J' + struct.pack('<i', value)
    if isinstance(value, str): return b'U' + bytes([len(value)]) + value.encode()
    n, m = value.shape
    return (b'cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR(K\x01J' + struct.pack('<i', n)
            + b'J' + struct.pack('<i', m)
            + b'\x86cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb'
            + b'\x89T' + struct.pack('<i', value.size) + value.tobytes() + b'tb')


def write_batches(folder, x, y, tx, ty, names, dump):
    "CIFAR-10's files, by `dump` (value → bytes)"
    folder.mkdir(parents=True)
    files = {f'data_batch_{i+1}': (x[i::5], y[i::5]) for i in range(5)} | dict(test_batch=(tx, ty))
    for name, (pixels, labels) in files.items():
        rows = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).reshape(len(pixels), -1)
        (folder/name).write_bytes(dump(dict(batch_label=name, labels=labels.tolist(), data=rows)))
    (folder/'batches.meta').write_bytes(dump(dict(num_cases_per_batch=10_000, label_names=list(names))))


@pytest.fixture(scope='module')
def arrays(folder):
    "The photos of `folder` as Pillow reads them: x (N,32,32,3), y, tx, ty"
    found = []
    for split in ('train', 'test'):
        paths = sorted((folder/split).rglob('*.png'))
        found += [np.stack([np.asarray(Image.open(p)) for p in paths]), np.array([classes.index(p.parent.name) for p in paths])]
    return found


@pytest.mark.parametrize('writer', ['python 2', 'python 3'])
def test_pickled_batches(folder, arrays, tmp_path, writer):
    dump = (lambda o: b'\x80\x02' + python2(o) + b'.') if writer == 'python 2' else lambda o: pickle.dumps(o, protocol=2)
    write_batches(tmp_path/'cifar-10-batches-py', *arrays, classes, dump)
    if writer == 'python 2':                                             # numpy reads what this test wrote as it should be
        told = pickle.loads((tmp_path/'cifar-10-batches-py'/'test_batch').read_bytes(), encoding='bytes')
        assert np.array_equal(told[b'data'].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), arrays[2])
    for path in (tmp_path, tmp_path/'cifar-10-batches-py'):              # torchvision's root, or the folder in it
        found = cifar.cifar10(path)
        assert found['classes'] == list(classes) and found['about']['kind'] == 'pickled batches' and not found['about']['lossy']
        assert np.array_equal(found['test'][0].permute(0, 2, 3, 1), arrays[2]) and np.array_equal(found['test'][1], arrays[3])
        order = np.concatenate([np.arange(i, 48, 5) for i in range(5)])
        assert np.array_equal(found['train'][0].permute(0, 2, 3, 1), arrays[0][order])
        assert np.array_equal(found['train'][1], arrays[1][order])
    assert found['about']['sha256'] == cifar.cifar10(folder, tmp_path)['about']['sha256']      # in whatever order


class Evil:
    "What a pickle may do when it is read as usual"
    def __reduce__(self): return exec, ('import pathlib; pathlib.Path("was_run").touch()',)


@pytest.mark.parametrize('content', [*map(pickle.dumps, [Evil(), dict(data=Evil(), labels=[1]), dict(data=np.array([Evil()]), labels=[1]),
                                                         [1, 2], dict(labels=[1])]), b'', b'hello',
                                     b'cbuiltins\neval\n(U\x011tR.', b'cnumpy.core.multiarray\nscalar\n.'])
def test_a_pickle_runs_nothing(arrays, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    write_batches(tmp_path/'own', *arrays, classes, pickle.dumps)
    (tmp_path/'own'/'data_batch_3').write_bytes(content)
    with pytest.raises(DataError, match=r'data_batch_3 cannot be read as a part of CIFAR-10'): cifar.cifar10(tmp_path/'own')
    assert not (tmp_path/'was_run').exists()


def test_npz(arrays, tmp_path):
    x, y, tx, ty = arrays
    np.savez(tmp_path/'c.npz', x=x, y=y, tx=tx, ty=ty, classes=classes)
    found = cifar.cifar10(tmp_path/'c.npz')
    assert found['about']['kind'] == 'npz' and found['classes'] == list(classes) and np.array_equal(found['train'][1], y)
    assert np.array_equal(found['train'][0].permute(0, 2, 3, 1), x) and np.array_equal(found['test'][0].permute(0, 2, 3, 1), tx)
    for bad, says in [(dict(y=y[:-1]), '48 train photos have 47 labels'), (dict(tx=tx[:, :30]), r'the test photos are \(12, 3, 30, 32\)'),
                      (dict(x=x.astype(np.float32)), 'float32'), (dict(ty=ty + 1), 'label lies outside the 3 classes'),
                      (dict(y=None), 'lacks y')]:
        told = {k: v for k, v in (dict(x=x, y=y, tx=tx, ty=ty, classes=classes) | bad).items() if v is not None}
        np.savez(tmp_path/'bad.npz', **told)
        with pytest.raises(DataError, match=says): cifar.cifar10(tmp_path/'bad.npz')


def test_the_checksum_is_of_photos_and_labels(arrays):
    x, y = torch.from_numpy(arrays[0]).permute(0, 3, 1, 2), torch.from_numpy(arrays[1])
    order, once = torch.randperm(48), cifar.checksum(x, y)
    assert once == cifar.checksum(x[order], y[order]) == cifar.checksum(x.contiguous(), y)
    other, pixel = y.clone(), x.clone()
    other[[0, 47]], pixel[5, 1, 2, 3] = y[[47, 0]], x[5, 1, 2, 3] ^ 1
    assert len({once, cifar.checksum(x, other), cifar.checksum(pixel, y), cifar.checksum(x[1:], y[1:])}) == 4


def jpeg(img, **how):
    file = io.BytesIO()
    Image.fromarray(img).save(file, 'JPEG', **how)
    return np.asarray(Image.open(file))


def test_what_is_not_cifar10_is_said_and_stored(folder, tmp_path):
    says = r'is not CIFAR-10 as published: it has 48 \+ 12 photos, not 50,000 \+ 10,000\. Results will say so'
    with pytest.warns(UserWarning, match=says):
        about = cifar.cifar10(folder, tmp_path)['about']
    assert about['kind'] == 'class folders' and (about['lossy'], about['is_cifar10']) == (False, False)
    shutil.copytree(folder, tmp_path/'own')
    Image.new('RGB', (32, 32)).save(tmp_path/'own'/'test'/'cat'/'one.jpg')
    with pytest.warns(UserWarning, match=r'lossy compression \(JPEG\): errors will be percents higher'):
        assert cifar.cifar10(tmp_path/'own', tmp_path)['about']['lossy']


def test_cifar10_itself(shared_data, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        data = cifar.cifar10(shared_data/'cifar10')
    assert data['about'] == dict(kind='grids', sha256=sha256, lossy=False, is_cifar10=True)
    x, y = data['train']
    by_numpy = [f(x[:2000].numpy()/255, axis=(0, 2, 3)) for f in (np.mean, np.std)]
    np.testing.assert_allclose(cifar.color_mean_std(x[:2000]), by_numpy, atol=1e-7)
    for other, says in [(dict(train=(x.flip(1), y)), 'mean and std .* are 0.4465 0.4822 0.4914'),
                        (dict(train=(x, y.clamp(min=1))), 'not ten of the same size'),
                        (dict(test=data['train']), r'50,000 \+ 50,000 photos')]:
        with pytest.raises(AssertionError, match=says): assert not cifar._strange(data | other), cifar._strange(data | other)
    photos = data['test'][0][:500].permute(0, 2, 3, 1).numpy()
    for how in (dict(quality=75), dict(quality=90), dict(quality=90, subsampling=0)):           # seen also where only pixels are left
        copy = torch.from_numpy(np.stack([jpeg(p, **how) for p in photos])).permute(0, 3, 1, 2)
        assert cifar._lossy(Path('x.npz'), 'npz', dict(test=(copy, None))), how
    assert not cifar._lossy(Path('x.npz'), 'npz', dict(test=(data['test'][0][:500], None)))


# ── Other people's weights ───────────────────────────────────────────────────────────────────────────────────────────────────

class Theirs(nn.Module):
    "The other project's network, as its paper and weights define it: zeros on both sides of the channels"
    def __init__(self, n):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for s, (ni, nf) in enumerate([(16, 16), (16, 32), (32, 64)], 1):
            self.add_module(f'layer{s}', nn.Sequential(*[self.block(ni if i == 0 else nf, nf) for i in range(n)]))
        self.linear = nn.Linear(64, 10)

    def block(self, ni, nf):
        convs = nn.Conv2d(ni, nf, 3, nf//ni, 1, bias=False), nn.Conv2d(nf, nf, 3, 1, 1, bias=False)
        return nn.ModuleDict(dict(conv1=convs[0], bn1=nn.BatchNorm2d(nf), conv2=convs[1], bn2=nn.BatchNorm2d(nf)))

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        for b in [*self.layer1, *self.layer2, *self.layer3]:
            new = b['conv1'].out_channels - b['conv1'].in_channels
            short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, new//2, new//2)) if new else x
            x = F.relu(b['bn2'](b['conv2'](F.relu(b['bn1'](b['conv1'](x))))) + short)
        return self.linear(x.mean((2, 3)))


@pytest.mark.parametrize('n', [1, 3])
def test_zeros_on_both_sides_are_zeros_at_the_end(tmp_path, n):
    torch.manual_seed(n)
    net = Theirs(n).eval()
    for p in net.state_dict().values():
        if p.is_floating_point() and p.ndim == 1: p.uniform_(.5, 1.5)    # BN that is not the same for every channel
    torch.save(dict(state_dict={f'module.{k}': v for k, v in net.state_dict().items()}, best_prec1=1.), tmp_path/'net.th')
    x = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad(): expected = net(cifar.published_input(x))
    torch.testing.assert_close(cifar.predict(cifar.published_net(tmp_path/'net.th'), x, bs=4), expected, rtol=1e-4, atol=1e-4)
    twin = build_net(f'cifar_resnet{6*n + 2}', 10).eval()                # without the order of the channels they are not the same
    twin.load_state_dict({k.replace('linear', 'fc'): v for k, v in net.state_dict().items()})
    with torch.no_grad(): assert (twin(cifar.published_input(x)) - expected).abs().max() > .01


def test_other_weights_than_the_published_ones_are_refused(tmp_path):
    "Ours have the same shapes and another order of channels: read as theirs they would be wrong without a word"
    ours = build_net('cifar_resnet20', 10).state_dict()
    theirs = {f'module.{k}'.replace('fc.', 'linear.'): v for k, v in ours.items()}
    for i, state in enumerate((ours, theirs | {'module.linear.weight': torch.ones(100, 64)}, {'weight': torch.ones(2)})):
        torch.save(dict(state_dict=state), file := tmp_path/f'{i}.th')
        with pytest.raises(DataError, match=f'{i}.th is none of the networks'): cifar.published_net(file)
    with pytest.raises(DataError, match='cannot be read'): cifar.published_net(tmp_path/'none.th')
    torch.save(dict(state_dict=theirs), tmp_path/'good.th')
    cifar.published_net(tmp_path/'good.th')



@pytest.mark.parametrize('depth, error', [(20, .0827), (32, .0737), (44, .0690), (56, .0661)])
def test_published_weights_make_their_errors_exactly(shared_data, depth, error):
    x, y = cifar.cifar10(shared_data/'cifar10')['test']
    wrong = cifar.predict(cifar.published_net(shared_data/'cifar10_weights'/f'resnet{depth}.th'), x).argmax(1) != y
    assert wrong.sum().item() == round(error*10_000)


def weights_script(monkeypatch):
    monkeypatch.syspath_prepend(str(experiments))
    spec = importlib.util.spec_from_file_location('cifar10_weights_script', experiments/'cifar10_weights.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_our_own_weights_make_the_error_that_their_card_says(shared_data):
    model, card = ResNet.load(experiments/'results'/'cifar10_resnet20'), (experiments/'results'/'cifar10_resnet20'/'config.json').read_text()
    data = cifar.cifar10(shared_data/'cifar10')
    x, y = data['test']
    assert model.stats.mean == pytest.approx(cifar.mean_std[0], abs=5e-5)            # as published
    mean = torch.tensor(model.stats.mean).float()[:, None, None]
    wrong = cifar.predict(model.net.eval(), x, lambda b: b.float()/255 - mean).argmax(1) != y
    assert f'test error {wrong.double().mean():.2%};' in card and [model.labels.by_index[i] for i in range(10)] == list(data['classes'])


def test_a_finished_run_becomes_a_model_to_start_from(folder, run, tmp_path, monkeypatch):
    script, (learn, told) = weights_script(monkeypatch), run('whole')
    monkeypatch.setattr(script, 'results', tmp_path)
    model, error = script.model_of(tmp_path/'whole', cifar.cifar10(folder, tmp_path/'cache'))
    state = model.net.state_dict()
    assert all(torch.equal(v.cpu(), state[k]) for k, v in learn.model.state_dict().items())
    assert model.labels.encoding == {c: i for i, c in enumerate(classes)} and 0 <= error <= 1
    (tmp_path/'whole.json').write_text(json.dumps(told | dict(updates_done=7)))
    with pytest.raises(DataError, match='no finished run: 7 of 8 updates'): script.model_of(tmp_path/'whole', cifar.cifar10(folder, tmp_path/'cache'))


# ── Batches and the recipe ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.paper('4.2-mean', '4.2-test')
def test_batches(folder, tmp_path):
    data = cifar.cifar10(folder, tmp_path)
    dls = cifar.cifar_dls(data, bs=16)
    mean = np.mean([x.numpy()/255 for x in data['train'][0]], axis=0)
    assert mean.shape == (3, 32, 32)                                     # a mean for each pixel, not for each channel
    (x, y), = dls.valid
    np.testing.assert_allclose(x, data['test'][0].numpy()/255 - mean, atol=1e-6)
    assert torch.equal(y, data['test'][1])
    assert [len(x) for x, _ in dls.train] == [16]*3
    first, again = (torch.cat([y for _, y in dls.train]) for _ in range(2))
    assert not torch.equal(first, again) and torch.equal(first.bincount(), data['train'][1].bincount())      # each photo once, shuffled


@pytest.mark.paper('4.2-hold-out')
def test_hold_out(folder, tmp_path):
    data = cifar.cifar10(folder, tmp_path)
    dls = cifar.cifar_dls(data, bs=16, hold_out=10)
    kept, held = dls.train_ds.x, dls.valid_ds.x
    assert len(kept) == 38 and len(held) == 10
    bits = sorted(x.numpy().tobytes() for x in torch.cat([kept, held]))
    assert bits == sorted(x.numpy().tobytes() for x in data['train'][0])
    assert torch.equal(held, cifar.cifar_dls(data, bs=16, hold_out=10).valid_ds.x)


@pytest.mark.paper('4.2-rate', '4.2-sgd')
def test_a_run_of_the_papers_recipe(run):
    learn, told = run('whole')
    assert cifar.drops(64_000) == (32_000, 48_000)                       # §4.2
    np.testing.assert_allclose(learn.recorder.lrs, [.1]*4 + [.01]*2 + [.001]*2)
    assert {k: learn.opt.hypers[0][k] for k in ('mom', 'wd')} == dict(mom=.9, wd=1e-4)
    assert [r['updates'] for r in told['epochs']] == [3, 6, 8] and told['updates_done'] == told['updates'] == 8
    for key in ('command', 'commit', 'seed', 'machine', 'data', 'seconds', 'parameters', 'macs', 'precision', 'paper_updates'):
        assert told[key] not in (None, '')
    assert told['seconds'] == pytest.approx(sum(r['seconds'] for r in told['epochs']))
    logits, targets = learn.get_preds(dl=learn.dls.valid, act=torch.nn.Identity())
    assert told['epochs'][-1]['top1_error'] == pytest.approx((logits.argmax(1) != targets).float().mean().item())
    assert told['epochs'][-1]['valid_loss'] == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item(), rel=1e-4)


@pytest.mark.parametrize('event, at', [('after_epoch', 2), ('after_batch', 6), ('after_batch', 7)])      # an epoch: 3 batches, 1 of evaluation
def test_a_stopped_run_goes_on_as_if_it_had_not_been(run, monkeypatch, event, at):
    once, told = run('once')
    after, seen = getattr(cifar.Results, event), []

    def stop(self):
        seen.append(len(self.history.rows))
        if len(seen) == at and event == 'after_epoch': raise KeyboardInterrupt
        if len(seen) == at: signal.raise_signal(signal.SIGINT)
        after(self)
    monkeypatch.setattr(cifar.Results, event, stop)
    with pytest.raises(KeyboardInterrupt): run('broken')
    monkeypatch.undo()
    again, told_again = run('broken')
    for a, b in zip(once.model.state_dict().values(), again.model.state_dict().values()): assert torch.equal(a, b)
    same = lambda rows: [{k: v for k, v in r.items() if 'seconds' not in k} for r in rows]
    assert same(told['epochs']) == same(told_again['epochs'])


@pytest.mark.paper('4.2-warm-up')
def test_a_plain_net_and_a_deep_one(folder, run, tmp_path):
    learn, told = run('plain', kind='plain', updates=1)
    assert told['kind'] == 'plain' and all(b.downsample is None for b in learn.model.modules() if isinstance(b, Block))
    dls = cifar.cifar_dls(cifar.cifar10(folder, tmp_path), bs=16)
    warm = {d: [c for c in cifar.cifar_learner(dls, d).cbs if isinstance(c, WarmUp)] for d in (20, 110)}
    assert not warm[20] and (warm[110][0].lr, warm[110][0].until) == (.01, .8)      # §4.2


def test_another_photo_is_decoded_anew(folder, tmp_path):
    own = tmp_path/'own'
    shutil.copytree(folder, own)
    before, _ = cifar.cifar10(own, tmp_path/'cache')['train']
    assert torch.equal(before, cifar.cifar10(own, tmp_path/'cache')['train'][0])
    Image.new('RGB', (32, 32), 'red').save(own/'train'/'cat'/'0000.png')
    after, _ = cifar.cifar10(own, tmp_path/'cache')['train']
    assert [i for i in range(48) if not torch.equal(before[i], after[i])] == [16]


def test_what_cannot_be_used_is_named(folder, tmp_path, capsys):
    with pytest.raises(SystemExit, match='holds no photos of CIFAR-10.*{train,test}/CLASS'): cifar.main([str(tmp_path/'nowhere')])
    own = tmp_path/'own'
    shutil.copytree(folder, own)
    Image.new('RGB', (32, 30)).save(own/'test'/'cat'/'small.png')
    with pytest.raises(PhotoError, match=r'small\.png has 32×30 pixels'): cifar.cifar10(own, tmp_path)
    shutil.rmtree(own/'test'/'cat')
    with pytest.raises(DataError, match='different classes'): cifar.cifar10(own, tmp_path)
    with pytest.raises(DataError, match='48 training photos; a batch needs 128'): cifar.cifar_dls(cifar.cifar10(folder, tmp_path))


@pytest.mark.paper('4.2-batch', '4.2-rate')
@pytest.mark.parametrize('file', sorted((experiments/'results').glob('*[0-9].json')), ids=lambda p: p.stem)
def test_stored_results(file):
    run = Namespace(**json.loads(file.read_text()))
    assert file.stem == f'{run.kind}{run.depth}-{run.updates}-{run.seed}'
    assert run.data['is_cifar10'] and not run.data['lossy'] and run.data['sha256'] == sha256
    for option in (f'--depth {run.depth}', f'--kind {run.kind}', f'--updates {run.updates}', f'--seed {run.seed}'):
        assert option in run.command
    assert run.train_photos == 50_000 and run.evaluated_photos == 10_000 and run.bs == 128 and len(run.commit.rstrip('+')) == 40
    assert run.updates_done == run.epochs[-1]['updates'] <= run.updates
    assert np.all(np.diff([r['updates'] for r in run.epochs]) > 0)
    for r in run.epochs:                                                 # the rate of the epoch's last update
        fallen = sum(r['updates'] > run.updates*part for part in (1/2, 3/4))
        assert r['lr'] == pytest.approx(.1/10**fallen) and 0 < r['top1_error'] < 1 and 0 < r['train_error'] < 1
        assert round(r['top1_error']*10_000, 2) == pytest.approx(round(r['top1_error']*10_000), abs=.02)      # whole photos of 10,000


# ── Looking inside ───────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A `cifar_resnet14` whose BNs are not as at the start, and photos"
    torch.manual_seed(0)
    net = build_net('cifar_resnet14', 10)
    x = torch.randint(256, (24, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim == 1: p.uniform_(.2, 1)
        for _ in range(20): net.train()(cifar.published_input(x))
    return net.eval(), x, torch.arange(24) % 10


@pytest.mark.paper('4.2-responses')
def test_responses_are_the_spread_of_what_each_bn_puts_out(figures, trained):
    net, x, _ = trained
    h, expected = cifar.published_input(x), {}
    def bn(name, h, m):                                                  # by BN's formula
        shape = (1, -1, 1, 1)
        out = (h - m.running_mean.view(shape))/(m.running_var.view(shape) + m.eps).sqrt()*m.weight.view(shape) + m.bias.view(shape)
        expected[name] = out.double().numpy().std()
        return out
    with torch.no_grad():
        h = bn('conv1', net.conv1(h), net.bn1).relu()
        for s in (1, 2, 3):
            for i, b in enumerate(getattr(net, f'layer{s}')):
                r = bn(f'layer{s}.{i}.conv1', b.conv1(h), b.bn1).relu()
                h = (bn(f'layer{s}.{i}.conv2', b.conv2(r), b.bn2) + b.downsample(h)).relu()
    look = figures.Responses(net)
    figures.predict(net, x, bs=5)
    found = look.stop()
    assert [*found] == [*expected] and len(found) == 13                  # the 3×3 layers, first to last
    np.testing.assert_allclose([*found.values()], [*expected.values()], rtol=1e-3)
    assert not any(m._forward_hooks for m in net.modules())


def test_without_a_block_only_its_shortcut_is_left(figures, trained):
    net, x, y = trained
    found = figures.without_each_block(net, x, y, bs=7)
    assert [r['block'] for r in found] == [f'layer{s}.{i}' for s in (1, 2, 3) for i in (0, 1)]
    for row in found:
        bn = net.get_submodule(row['block']).bn2                         # F is zero where its last BN puts out zeros
        was = [bn.weight.data.clone(), bn.bias.data.clone()]
        bn.weight.data.zero_(), bn.bias.data.zero_()
        assert row['error'] == pytest.approx((figures.predict(net, x).argmax(1) != y).float().mean().item())
        bn.weight.data, bn.bias.data = was


def test_ensembles_average_probabilities(figures):
    probs, y = {d: torch.rand(200, 4).softmax(1) for d in (8, 14, 20)}, torch.randint(4, (200,))
    found = {tuple(r['nets']): r['error'] for r in figures.ensembles(probs, y)}
    assert {*found} == {(8,), (14,), (20,), (8, 14), (8, 20), (14, 20), (8, 14, 20)}
    for nets, error in found.items():
        votes = np.mean([probs[d].numpy() for d in nets], axis=0)
        assert error == pytest.approx((votes.argmax(1) != y.numpy()).mean())


def test_a_short_run_keeps_gradients_and_responses(figures, folder, tmp_path, monkeypatch):
    seen, make = [], figures.cifar_learner
    class Spy(figures.Callback):
        order = 31
        def before_step(self):
            norms = [p.grad.double().square().sum().sqrt().item() for p in self.model.parameters() if p.ndim == 4]
            seen.append((self.loss.item(), norms))
    monkeypatch.setattr(figures, 'cifar_learner', lambda *args: make(*args[:-1], [*args[-1], Spy()]))
    figures.main([str(folder), '--net', 'plain8', '--updates', '22', '--bs', '16', '--out', str(tmp_path/'plain8.json'), '--threads', '1'])
    told = json.loads((tmp_path/'plain8.json').read_text())
    assert told['updates_done'] == 22 and told['net'] == 'plain8' and not told['data']['is_cifar10']
    assert [r['update'] for r in told['gradients']] == [*range(1, 11), 20]
    for r in told['gradients']:
        loss, norms = seen[r['update'] - 1]
        np.testing.assert_allclose([r['loss'], *r['norms']], [loss, *norms], rtol=1e-3)
    assert len(told['layers']) == 7 and [*told['responses']] == told['layers'] and min(told['responses'].values()) > 0


def test_a_run_is_looked_at_where_it_has_come_to(figures, folder, tmp_path):
    how = dict(depth=8, updates=8, bs=16, cache=tmp_path)
    cifar.train(folder, **how, out=tmp_path/'run.json', run_folder=tmp_path/'runs'/'resnet8-8-0')
    cifar.train(folder, **how, kind='plain', out=tmp_path/'plain.json', run_folder=tmp_path/'runs'/'plain8-8-0')
    told = figures.trained_here(folder, tmp_path/'runs', tmp_path/'runs.json', batches=2, bs=16)
    assert json.loads((tmp_path/'runs.json').read_text())['nets'] == told['nets'] and [*told['nets']] == ['plain8-8-0', 'resnet8-8-0']
    for name, file in (('resnet8-8-0', 'run.json'), ('plain8-8-0', 'plain.json')):
        net, last = told['nets'][name], json.loads((tmp_path/file).read_text())['epochs'][-1]
        assert net['updates'] == 8 and net['error'] == pytest.approx(last['top1_error']) and len(net['responses']) == len(net['gradients']) == 7
    (tmp_path/'runs'/'plain8-8-0'/'checkpoint-000000009-epoch.pt').write_bytes(next((tmp_path/'runs'/'plain8-8-0').glob('*.pt')).read_bytes())
    again = figures.trained_here(folder, tmp_path/'runs', tmp_path/'runs.json', batches=2, bs=16)       # one is newer, the other known
    assert again['nets']['resnet8-8-0'] == told['nets']['resnet8-8-0'] and again['nets']['plain8-8-0']['updates'] == 9
    assert json.loads((tmp_path/'runs.json').read_text())['nets'] == again['nets']
    with pytest.raises(DataError, match='holds no runs'): figures.checkpoints(tmp_path)


def test_gradient_norms_leave_the_network_as_it_is(figures, trained):
    net, x, y = trained
    batches = [(cifar.published_input(x[i:i + 12]), y[i:i + 12]) for i in (0, 12)]
    before = {k: v.clone() for k, v in net.state_dict().items()}
    found = figures.gradient_norms(net, batches, 2)
    own, each = copy.deepcopy(net).train(), []
    weights = [p for p in own.parameters() if p.ndim == 4]
    for xb, yb in batches:
        grads = torch.autograd.grad(torch.nn.functional.cross_entropy(own(xb), yb), weights)
        each.append([g.double().norm().item() for g in grads])
    np.testing.assert_allclose(found, np.sqrt((np.array(each)**2).mean(0)), rtol=1e-3)
    assert not net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_smaller_photos_are_means_of_squares(figures):
    x = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    expected = x.numpy().reshape(3, 3, 8, 4, 8, 4).mean((3, 5))
    assert figures.smaller(x, 8).dtype == torch.uint8 and np.abs(figures.smaller(x, 8).numpy() - expected).max() <= .5


@pytest.mark.parametrize('file', sorted((experiments/'results'/'layers').glob('*.json')), ids=lambda p: p.stem)
def test_stored_layers(file):
    told = json.loads(file.read_text())
    assert told['data'] == dict(kind=told['data']['kind'], sha256=sha256, lossy=False, is_cifar10=True)
    assert told['command'].startswith('python nbs/experiments/cifar_figures.py CIFAR10 --') and len(told['commit']) == 40
    if 'net' in told:
        assert f'--net {file.stem} ' in told['command'] and told['updates_done'] == told['updates'] == told['gradients'][-1]['update']
        layers = int(told['net'].lstrip('plainresnet')) - 1              # all but the last one
        assert len(told['layers']) == len(told['responses']) == layers == len(told['gradients'][0]['norms'])
    if file.stem == 'runs':
        for name, net in told['nets'].items():
            assert name.startswith(f"{net['kind']}{net['depth']}-64000-") and 0 < net['updates'] <= 64_000
            assert len(net['responses']) == len(net['gradients']) == net['depth'] - 1 and 0 < net['error'] < 1
    if file.stem == 'published':
        assert {int(d): round(n['error']*10_000) for d, n in told['nets'].items()} == {20: 827, 32: 737, 44: 690, 56: 661}
        assert {int(d): len(n['responses']) for d, n in told['nets'].items()} == {d: d - 1 for d in (20, 32, 44, 56)}
        singles = {tuple(r['nets']): r['error'] for r in told['ensembles']}
        assert len(singles) == 15 and all(singles[int(d),] == n['error'] for d, n in told['nets'].items())
        assert {int(d): len(rows) for d, rows in told['without_block'].items()} == {20: 9, 56: 27}
    if file.stem == 'jpeg': assert told['rows'][0]['quality'] is None and round(told['rows'][0]['error']*10_000) == 827


def test_a_run_that_moves_says_where_its_parts_were_computed(tmp_path):
    file, here = tmp_path/'run.json', dict(machine=dict(gpu=None), commit='b')
    assert cifar.earlier_parts(file, here) == []
    file.write_text(json.dumps(dict(machine=dict(gpu='H200'), commit='a', updates_done=390)))
    first = [dict(machine=dict(gpu='H200'), commit='a', updates_done=390)]
    assert cifar.earlier_parts(file, here) == first
    file.write_text(json.dumps(here | dict(updates_done=780, earlier=first)))
    assert cifar.earlier_parts(file, here) == first                      # stopped and gone on with at the same place
    assert cifar.earlier_parts(file, here | dict(commit='c')) == [*first, here | dict(updates_done=780)]
