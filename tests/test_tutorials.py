"The tutorials on photos, colour and crops: their scripts make the files that they draw, and what is stored is whole."
import base64
import json
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest, ttest_rel

experiments = Path(__file__).resolve().parent.parent/'nbs'/'experiments'
runs = sorted(p for p in (experiments/'results').glob('*.json') if p.stem in ('clothing', 'drawn'))
notebooks = sorted(experiments.glob('*.ipynb'))
labels = 'dots', 'mesh', 'rings'


def script(name, monkeypatch):
    monkeypatch.syspath_prepend(str(experiments))                         # it imports from the script beside it
    spec = spec_from_file_location(f'{name}_script', experiments/f'{name}.py')
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture
def folder(tmp_path):
    "Drawn photos as SPLIT/CLASS/NAME.jpg; not equally many of each class"
    from resnet_fastai.engine.demo_photos import draw_photo
    rng = np.random.default_rng(0)
    for split, n in dict(train=6, val=2, test=3).items():
        for c, label in enumerate(labels):
            (tmp_path/'desk'/split/label).mkdir(parents=True)
            for i in range(n + c): draw_photo(label, rng).resize((56, 48)).save(tmp_path/'desk'/split/label/f'{label}_{split}_{i}.jpg')
    return tmp_path/'desk'


# ── Scripts ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def check_rates(rows, n, low, high):
    "Errors are whole photos, and their intervals scipy's"
    for r in rows:
        wrong = round(r['top1_error']*n)
        ci = binomtest(wrong, n).proportion_ci(method='wilson')
        assert wrong/n == pytest.approx(r['top1_error'], abs=1e-5)
        assert (r[low], r[high]) == pytest.approx((ci.low, ci.high), abs=1e-4)


def check_run(run):
    "What a run's file tells of one thing in two places is the same"
    n, counts = run['photos']['test'], np.array(run['confusion'])
    for key in ('command', 'commit', 'machine', 'seed', 'seconds', 'epochs', 'arch', 'size'): assert run[key] not in (None, '', [])
    assert f"--epochs {len(run['epochs'])} " in run['command'] and (experiments/run['command'].split()[1].split('/')[-1]).exists()
    assert [r['epoch'] for r in run['epochs']] == [*range(len(run['epochs']))]
    assert counts.shape == (len(run['labels']),)*2 and counts.sum() == n
    protocols = {r['protocol']: r['top1_error'] for r in run['protocols']}
    assert list(protocols) == ['1crop', '10crop', '50crop', 'dense'] and all(r['seconds_a_photo'] > 0 for r in run['protocols'])
    grid = {(r['crops'], r['scales']): r['top1_error'] for r in run['crops_and_scales']}
    assert set(grid) == {(c, s) for c in (1, 2, 5, 10) for s in range(1, 6)}
    same = [(grid[1, 1], protocols['1crop']), (grid[10, 1], protocols['10crop']), (grid[10, 5], protocols['50crop']),
            (run['by_chance'][-1]['top1_error'], protocols['50crop'])]
    for a, b in same: assert a == pytest.approx(b, abs=1e-5)
    assert 1 - np.trace(counts)/n <= protocols['50crop'] + 1e-5         # less where a net errs among outputs that have no label
    check_rates(run['protocols'], n, 'top1_low', 'top1_high')
    check_rates(run['crops_and_scales'], n, 'low', 'high')
    losses = [r['loss'] for r in run['top_losses']]
    assert losses == sorted(losses, reverse=True)
    for r in run['top_losses']:
        assert r['label'] in run['labels']
        sure = np.exp(-r['loss'])                                       # what the photo's own label was given
        assert r['prob'] == pytest.approx(sure, abs=2e-3) if r['label'] == r['predicted'] else sure <= min(r['prob'], 1 - r['prob']) + 2e-3


def test_a_run_from_class_folders(folder, tmp_path, monkeypatch, capsys):
    photos = script('your_photos', monkeypatch)
    told = []
    for out in (tmp_path/'a.json', tmp_path/'b.json'):
        photos.main([str(folder), '--epochs', '1', '--size', '32', '--arch', 'cifar_resnet8', '--seed', '3', '--out', str(out)])
        told.append(json.loads(out.read_text()))
    run, again = told
    check_run(run)
    assert run['labels'] == list(labels) and run['photos'] == dict(train=21, val=9, test=12)
    assert np.array(run['confusion']).sum(1).tolist() == [3, 4, 5]      # a row is what the photos are
    assert str(folder) not in run['command'] and ' desk ' in run['command'] and '--seed 3' in run['command']
    files = {p.name: p.parent.name for p in (folder/'val').rglob('*.jpg')}
    assert len(run['top_losses']) == 8 and all(files[r['photo']] == r['label'] for r in run['top_losses'])
    plain = lambda o: {k: v for k, v in o.items() if 'seconds' not in k}
    for key in run.keys() - {'seconds', 'command'}:
        a, b = ([plain(r) for r in t[key]] if key in ('epochs', 'protocols') else t[key] for t in told)
        assert a == b, key                                              # the same seed, the same run
    assert 'top1_error' in capsys.readouterr().out


def test_which_crops_are_averaged(monkeypatch):
    "The centre at the second scale first; then its mirror image, the corners, all ten; the scales 256, 384, 224, 480, 640"
    photos, said, targ = script('your_photos', monkeypatch), torch.rand(300, 5, 10, 4), torch.randint(4, (300,))
    found = {(r['crops'], r['scales']): r['top1_error'] for r in photos.by_crops_and_scales(said, targ)}
    cases = {(1, 1): said[:, 1, 4], (2, 1): said[:, 1, [4, 9]].sum(1), (5, 1): said[:, 1, :5].sum(1), (10, 1): said[:, 1].sum(1),
             (1, 2): said[:, 1, 4] + said[:, 2, 4], (10, 3): said[:, :3].sum((1, 2)), (10, 4): said[:, :4].sum((1, 2)), (10, 5): said.sum((1, 2))}
    for k, votes in cases.items(): assert found[k] == pytest.approx((votes.argmax(1) != targ).float().mean().item()), k


def test_crops_are_those_of_the_protocols(folder, tmp_path, monkeypatch):
    from resnet_fastai.core import ResNet
    from resnet_fastai.data import from_folders
    model = ResNet(*from_folders(folder, tmp_path/'laid_out'), arch='cifar_resnet8', size=32, bs=8, num_workers=0, n_out=3)
    with model.learn.no_bar(), model.learn.no_logging(): model.fit(1)
    tested = model.learn.dls.photos['test'][:4]
    said = script('your_photos', monkeypatch).crop_by_crop(model, tested)
    assert said.shape == (4, 5, 10, 3)
    top = {p: model.predict_folder(list(tested), n=1, protocol=p).prob_1 for p in ('1crop', '10crop', '50crop')}
    for p, votes in {'1crop': said[:, 1, 4], '10crop': said[:, 1].mean(1), '50crop': said.mean((1, 2))}.items():
        np.testing.assert_allclose(votes.amax(1), top[p], atol=1e-4, err_msg=p)


def test_help_and_what_cannot_be_used(tmp_path, monkeypatch, capsys):
    for name in ('your_photos', 'colours'):
        with pytest.raises(SystemExit) as stopped: script(name, monkeypatch).main(['--help'])
        assert stopped.value.code == 0 and f'python nbs/experiments/{name}.py' in capsys.readouterr().out
    (tmp_path/'empty').mkdir()
    with pytest.raises(SystemExit, match='Error: .*empty'): script('your_photos', monkeypatch).main([str(tmp_path/'empty')])
    with pytest.raises(SystemExit, match='empty holds no photos'): script('colours', monkeypatch).main([str(tmp_path/'empty')])


def test_colours_are_numpys(folder, tmp_path, monkeypatch):
    script('colours', monkeypatch).main([str(folder), '--out', str(tmp_path/'colours.json')])
    found = json.loads((tmp_path/'colours.json').read_text())
    desk = found['sets']['desk']
    pixels = np.concatenate([np.asarray(Image.open(p)).reshape(-1, 3) for p in folder.rglob('*.jpg')])/255
    assert desk['photos'] == 42 and str(folder) not in found['command']
    np.testing.assert_allclose(desk['mean'], pixels.mean(0), atol=2e-3)                  # decoders differ
    np.testing.assert_allclose(np.array(desk['eigvec'])*desk['eigval'] @ np.transpose(desk['eigvec']), np.cov(pixels.T), atol=2e-3)


def made_up(draw, way, seed): return dict(draw=draw, way=way, seed=seed, error=.5 + .01*len(way) + .02*seed**2 - .003*len(way)*seed, small=.7, cpu_seconds=1.)


def test_what_helps_is_compared_draw_by_draw(monkeypatch, folder, tmp_path):
    "The interval is that of scipy's paired t test; a command that was stopped makes the missing runs only"
    module, asked = script('what_helps', monkeypatch), []
    (folder/'val').rename(folder/'validation')                          # as the script's photos have it
    def one_run(photos, weights, draw, way, n, epochs, seed):
        asked.append((seed, draw, way))
        if len(asked) == 20: raise KeyboardInterrupt
        assert {p.suffix for p in photos.rglob('*.*')} == {'.png'} and max(min(Image.open(p).size) for p in photos.rglob('*.png')) == 96
        return made_up(draw, way, seed)
    monkeypatch.setattr(module, 'one_run', one_run)
    monkeypatch.setattr(module, 'published', lambda file: None)
    monkeypatch.setattr(module, 'commit', lambda file: 'none')
    (file := tmp_path/'weights.th').write_bytes(b'')
    with pytest.raises(KeyboardInterrupt): module.compare(folder, file, seeds=3, out=tmp_path/'out.json')
    runs = module.compare(folder, file, seeds=3, out=tmp_path/'out.json')
    assert len(runs) == 27 and len(asked) == 28 and asked[:19] + asked[20:] == sorted(asked[:19] + asked[20:], key=lambda a: a[0])
    kept = json.loads((tmp_path/'out.json').read_text())
    assert kept['runs'] == runs and kept['command'].split()[1] == 'nbs/experiments/what_helps.py' and str(tmp_path) not in kept['command']
    for row in kept['summary']:
        mine, plain = ([made_up(row['draw'], way, seed)['error'] for seed in range(3)] for way in (row['way'], 'nothing'))
        assert row['error'] == pytest.approx(np.mean(mine), abs=1e-4) and row['draws'] == 3
        if row['way'] == 'nothing': continue
        ci = ttest_rel(mine, plain).confidence_interval()
        assert (row['low'], row['difference'], row['high']) == pytest.approx((ci.low, np.subtract(mine, plain).mean(), ci.high), abs=1e-4)
        assert row.get('small_difference', 0) == 0 and ('small_low' in row) == (row['draw'] == 'uneven')
    (folder/'train'/'dots'/'new.jpg').write_bytes(next((folder/'train'/'dots').iterdir()).read_bytes())
    asked.clear()
    assert len(module.compare(folder, file, seeds=1, out=tmp_path/'out.json')) == 9 == len(asked)       # other photos: nothing is taken over


def test_uneven_draws(monkeypatch, folder, tmp_path):
    module = script('what_helps', monkeypatch)
    assert module.class_sizes('even', 200, 1) == [20]*10
    sizes = [module.class_sizes('uneven', 200, seed) for seed in (1, 2)]
    assert sorted(sizes[0]) == sorted(sizes[1]) == [4, 5, 7, 9, 11, 14, 19, 24, 31, 40] and sizes[0] != sizes[1]
    (folder/'val').rename(folder/'validation')
    found = module.some_of(folder, [1, 4, 2], 0, tmp_path/'some')
    assert [len(list((tmp_path/'some'/'train'/c).iterdir())) for c in labels] == [1, 4, 2] and len(list((found.data_path/'train').rglob('*.jpg'))) == 7


# ── What is stored ───────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize('file', runs, ids=lambda p: p.stem)
def test_stored_runs(file):
    run = json.loads(file.read_text())
    check_run(run)
    assert 1 - np.trace(run['confusion'])/run['photos']['test'] == pytest.approx(run['protocols'][2]['top1_error'], abs=1e-5)
    assert {r['predicted'] for r in run['top_losses']} <= set(run['labels'])
    assert run['command'].split()[2] == file.stem and len(run['commit'].rstrip('+')) == 40 and run['machine']['cores']


def test_stored_colours():
    "Axes of length 1, at right angles, the longest first; the published ones are near those of samples"
    from resnet_fastai.practice.share import imagenet_stats
    found = json.loads((experiments/'results'/'colours.json').read_text())
    for s in found['sets'].values():
        np.testing.assert_allclose(np.transpose(s['eigvec']) @ s['eigvec'], np.eye(3), atol=1e-9)
        assert s['eigval'] == sorted(s['eigval'], reverse=True) and len(s['mean']) == 3
    samples = np.array(found['sets']['photos']['eigvec'])
    assert (abs((samples*imagenet_stats.eigvec).sum(0)) > .98).all()


def test_stored_help(monkeypatch):
    "Five draws of each way, the same photos on each; the summary is that of the runs"
    module, kept = script('what_helps', monkeypatch), json.loads((experiments/'results'/'what_helps.json').read_text())
    assert {(r['draw'], r['way'], r['seed']) for r in kept['runs']} == {(d, w, s) for d in module.ways for w in module.ways[d] for s in range(5)}
    assert json.loads(json.dumps(list(module.summary(kept['runs'])))) == kept['summary']
    assert all(r['tested'] == 240 and r['photos'] == sum(module.class_sizes(r['draw'], 200, r['seed'])) for r in kept['runs'])
    assert len(kept['data_sha256']) == len(kept['weights_sha256']) == 64 and len(kept['commit']) == 40 and 'what_helps.py' in kept['command']


@pytest.mark.parametrize('file', notebooks, ids=lambda p: p.stem)
def test_stored_notebooks(file):
    "They ran without an error, their pictures are small and told in words, and they end in exercises with answers folded away"
    cells = json.loads(file.read_text())['cells']
    for c in cells:
        source = ''.join(c['source'])
        for o in c.get('outputs', []):
            assert o['output_type'] != 'error', source
            if picture := o.get('data', {}).get('image/png'):
                assert len(base64.b64decode(''.join(picture))) <= 200_000, source
                assert re.search(r'^#\| fig-alt: .{20,}', source, re.M), source
    text = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    if file.stem != 'from_the_paper': assert '## Exercises' in text and '<details>' in text and re.search(r'^3\. ', text, re.M)
    for name in {*re.findall(r"results/(\w+\.json)", json.dumps(cells))} - {'gpu.json'}:           # which is made where there is a GPU
        assert any((folder/'results'/name).exists() for folder in (experiments, experiments.parent)), name
