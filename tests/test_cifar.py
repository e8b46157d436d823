"The CIFAR-10 script: crops beside a brute-force version, the schedule beside the paper's, a run that is stopped and goes on."
import importlib.util
import json
import shutil
import signal
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from resnet_fastai.engine.files import DataError, PhotoError
from resnet_fastai.training import WarmUp

experiments = Path(__file__).resolve().parent.parent/'nbs'/'experiments'
spec = importlib.util.spec_from_file_location('cifar10_script', experiments/'cifar10.py')
cifar = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cifar)
classes = 'bird', 'cat', 'ship'
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "60 drawn JPEGs of 32×32 in three classes: 48 to train on, 12 to test"
    root, rng = tmp_path_factory.mktemp('cifar'), np.random.default_rng(0)
    for split, n in dict(train=16, test=4).items():
        for c, name in enumerate(classes):
            (root/split/name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 250, (32, 32, 3))
                pixels[..., c] += 5                                      # a hint, so that there is something left to learn
                Image.fromarray(pixels.astype(np.uint8)).save(root/split/name/f'{i:04}.jpg', quality=95)
    return root


@pytest.fixture
def run(folder, tmp_path):
    "run(name): a run of 8 updates of 16 photos, in epochs of 3, 3 and 2"
    def go(name, **kwargs):
        args = dict(depth=8, updates=8, seed=3, bs=16, out=tmp_path/f'{name}.json', run_folder=tmp_path/name, cache=tmp_path/'cache') | kwargs
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
        paths = sorted((folder/split).rglob('*.jpg'))
        for i, p in enumerate(paths):
            assert classes[y[i]] == p.parent.name
            assert np.abs(x[i].permute(1, 2, 0).numpy().astype(int) - np.asarray(Image.open(p)).astype(int)).max() <= 3      # decoders differ


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
    for key in ('command', 'commit', 'seed', 'machine', 'seconds', 'parameters', 'macs', 'precision', 'paper_updates'): assert told[key] not in (None, '')
    assert told['seconds'] == pytest.approx(sum(r['seconds'] for r in told['epochs']))
    logits, targets = learn.get_preds(dl=learn.dls.valid, act=torch.nn.Identity())
    assert told['epochs'][-1]['top1_error'] == pytest.approx((logits.argmax(1) != targets).float().mean().item())
    assert told['epochs'][-1]['valid_loss'] == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item(), rel=1e-4)


@pytest.mark.parametrize('event, at', [('after_epoch', 2), ('after_batch', 6), ('after_batch', 7)])      # an epoch: three batches and one of evaluation
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
    assert told['kind'] == 'plain' and 'Plain' in str(learn.model)
    dls = cifar.cifar_dls(cifar.cifar10(folder, tmp_path), bs=16)
    warm = {d: [c for c in cifar.cifar_learner(dls, d).cbs if isinstance(c, WarmUp)] for d in (20, 110)}
    assert not warm[20] and (warm[110][0].lr, warm[110][0].until) == (.01, .8)      # §4.2


def test_another_photo_is_decoded_anew(folder, tmp_path):
    own = tmp_path/'own'
    shutil.copytree(folder, own)
    before, _ = cifar.cifar10(own, tmp_path/'cache')['train']
    assert torch.equal(before, cifar.cifar10(own, tmp_path/'cache')['train'][0])
    Image.new('RGB', (32, 32), 'red').save(own/'train'/'cat'/'0000.jpg')
    after, _ = cifar.cifar10(own, tmp_path/'cache')['train']
    assert [i for i in range(48) if not torch.equal(before[i], after[i])] == [16]


def test_what_cannot_be_used_is_named(folder, tmp_path, capsys):
    with pytest.raises(SystemExit, match='holds no photos.*{train,test}/CLASS'): cifar.main([str(tmp_path/'nowhere')])
    own = tmp_path/'own'
    shutil.copytree(folder, own)
    Image.new('RGB', (32, 30)).save(own/'test'/'cat'/'small.jpg')
    with pytest.raises(PhotoError, match=r'small\.jpg has 32×30 pixels'): cifar.cifar10(own, tmp_path)
    shutil.rmtree(own/'test'/'cat')
    with pytest.raises(DataError, match='different classes'): cifar.cifar10(own, tmp_path)
    with pytest.raises(DataError, match='48 training photos; a batch needs 128'): cifar.cifar_dls(cifar.cifar10(folder, tmp_path))


@pytest.mark.paper('4.2-batch', '4.2-rate')
@pytest.mark.parametrize('file', sorted((experiments/'results').glob('*[0-9].json')), ids=lambda p: p.stem)
def test_stored_results(file):
    run = Namespace(**json.loads(file.read_text()))
    assert file.stem == f'{run.kind}{run.depth}-{run.updates}-{run.seed}'
    for option in (f'--depth {run.depth}', f'--kind {run.kind}', f'--updates {run.updates}', f'--seed {run.seed}'): assert option in run.command
    assert run.train_photos == 50_000 and run.evaluated_photos == 10_000 and run.bs == 128 and len(run.commit.rstrip('+')) == 40
    assert run.updates_done == run.epochs[-1]['updates'] <= run.updates
    assert np.all(np.diff([r['updates'] for r in run.epochs]) > 0)
    for r in run.epochs:                                                 # the rate of the epoch's last update
        fallen = sum(r['updates'] > run.updates*part for part in (1/2, 3/4))
        assert r['lr'] == pytest.approx(.1/10**fallen) and 0 < r['top1_error'] < 1 and 0 < r['train_error'] < 1
        assert round(r['top1_error']*10_000, 2) == pytest.approx(round(r['top1_error']*10_000), abs=.02)      # whole photos of 10,000
