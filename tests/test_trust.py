"Calibration, \"not sure\", and photos as vectors: beside torch, scikit-learn, torchvision and brute force; kept in a saved model, used by whatever predicts."
import json
import re
import runpy
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
import torchvision.transforms.functional as T
from fastai.callback.core import Callback, CancelFitException
from PIL import Image
from sklearn.metrics.pairwise import cosine_similarity

from resnet_fastai.core import ResNet
from resnet_fastai.data import demo_data
from resnet_fastai.engine.calibration import answered, calibration_error, fit_temperature, log_loss, pick_threshold, tempered
from resnet_fastai.engine.exact_bn import exact_bn
from resnet_fastai.engine.files import DataError
from resnet_fastai.engine.weights import config_sum
from resnet_fastai.practice.cli import app
from resnet_fastai.practice.look import top_labels

experiments = Path(__file__).resolve().parent.parent/'nbs'/'experiments'
pytestmark = pytest.mark.usefixtures('one_thread')
tiny = dict(arch='cifar_resnet8', size=32, bs=8, micro_bs=8, num_workers=0, n_out=None, lr=.1, schedule='one_cycle', min_side=32, max_side=40)


@pytest.fixture(scope='module')
def demo(tmp_path_factory): return demo_data(tmp_path_factory.mktemp('trust')/'demo', sizes=dict(train=160, val=48, test=24))


@pytest.fixture(scope='module')
def trained(demo):
    model = ResNet(*demo, **tiny)
    with model.learn.no_bar(), model.learn.no_logging(): model.fit(4)
    return model


@pytest.fixture
def model(trained):
    "As it was trained: nothing calibrated, 1 crop"
    trained.trust, trained.protocol = {}, '1crop'
    return trained


@pytest.fixture(autouse=True)
def no_figures():
    yield
    plt.close('all')


# ── Numbers

def drawn_logits(temperature, n=4000, classes=7):
    "Logits, and labels that are drawn from softmax(logits/temperature)"
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.normal(0, 3, (n, classes)))
    p = (logits/temperature).softmax(1).numpy()
    return logits, (p.cumsum(1) < rng.random((n, 1))).sum(1)


@pytest.mark.parametrize('temperature', [.4, 2.5])
def test_the_temperature_is_the_one_that_labels_were_drawn_with(temperature):
    logits, targ = drawn_logits(temperature)
    probs = logits.softmax(1).float().numpy()
    found = fit_temperature(probs, targ)
    assert found == pytest.approx(temperature, rel=.06)
    log_t = torch.zeros(1, dtype=torch.float64, requires_grad=True)              # as Guo et al. do it
    opt = torch.optim.LBFGS([log_t], max_iter=100, line_search_fn='strong_wolfe')
    def closure():
        opt.zero_grad()
        loss = torch.nn.functional.cross_entropy(logits/log_t.exp(), torch.tensor(targ))
        loss.backward()
        return loss
    opt.step(closure)
    assert found == pytest.approx(float(log_t.exp()), rel=1e-3)
    np.testing.assert_allclose(tempered(probs, found), (logits/found).softmax(1), atol=1e-5)
    assert log_loss(probs, targ) == pytest.approx(float(torch.nn.functional.nll_loss(torch.tensor(probs).log(), torch.tensor(targ))), rel=1e-5)


def test_tempering_keeps_the_order_and_the_sum():
    probs = np.float32([[.7, .2, .1, 0], [.25, .25, .25, .25]])
    assert tempered(probs, 1) is probs
    for t in (.2, 5):
        p = tempered(probs, t)
        assert p.dtype == np.float32 and p[0].argsort().tolist() == probs[0].argsort().tolist() and (p[0].max() > .7) == (t < 1)
        np.testing.assert_allclose(p.sum(1), 1, atol=1e-6)
        np.testing.assert_array_equal(tempered(probs[0], t), p[0])
    for bad in (0, -1, float('nan'), float('inf'), '2', True, None):
        with pytest.raises(DataError, match='temperature is'): tempered(probs, bad)
    assert fit_temperature(np.float32([[.9, .1], [.2, .8]]), np.array([0, 1])) == 1             # there is no smallest loss


def test_calibration_error_is_the_sum_over_the_bins():
    rng = np.random.default_rng(1)
    confidence = np.append(rng.random(500), [0, 1, 1/15, 2/15])
    right = rng.random(504) < confidence
    expected = 0
    for low in range(15):
        inside = [i for i, c in enumerate(confidence) if low/15 < c <= (low + 1)/15 or (low == 0 and c == 0)]
        expected += len(inside)/504*abs(np.mean(confidence[inside]) - np.mean(right[inside]))
    assert calibration_error(confidence, right) == pytest.approx(expected, abs=1e-12)
    assert calibration_error(np.full(10, .8), np.arange(10) < 8) == pytest.approx(0, abs=1e-12)
    assert calibration_error(np.ones(10), np.arange(10) < 5) == pytest.approx(.5)


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('precision', [.6, .8, .95, 1])
def test_the_threshold_answers_the_most_photos(seed, precision):
    rng = np.random.default_rng(seed)
    confidence = rng.integers(1, 30, 60)/30 if seed % 2 else rng.random(60)      # with ties, and without
    right = rng.random(60) < confidence
    right[confidence.argmax()] = True
    right |= confidence == confidence.max()
    each = {int((confidence >= t).sum()): right[confidence >= t].mean() for t in {*confidence}}
    most = max(n for n, share in each.items() if share >= precision)
    found = pick_threshold(confidence, right, precision)
    sure = confidence >= found['min_prob']
    assert sure.sum() == most and found['coverage'] == most/60 and found['precision'] == right[sure].mean() >= precision
    assert found['precision_low'] - 1e-9 <= found['precision'] <= found['precision_high'] + 1e-9 and found['photos'] == 60
    assert {int(n) for n in answered(confidence, right)[1]} == {*each}


def test_a_precision_that_nothing_reaches():
    with pytest.raises(DataError, match=r'no threshold reaches a precision of 90.0% on these 3 photos; the best is 66.7%'):
        pick_threshold(np.array([.9, .8, .7]), np.array([False, True, True]), .9)
    for bad in (0, 1.5, -1):
        with pytest.raises(DataError, match='precision is'): pick_threshold(np.array([.9]), np.array([True]), bad)
    assert pick_threshold(np.array([.9, .2]), np.array([True, True]), .9)['min_prob'] == 0       # all are right: all get an answer


# ── Calibration of a model

def test_predictions_follow_the_temperature(model, demo, tmp_path):
    photos = model.learn.dls.photos['val']
    targ = np.array([model.labels.encoding[model.labels(p)] for p in photos])
    before = model.predict(list(photos))
    rows = model.calibrate()
    t = model.temperature
    assert rows.temperature.tolist() == [1, t] and t != 1 and rows.log_loss['after'] < rows.log_loss['before'] == pytest.approx(log_loss(before, targ), rel=1e-4)
    for other in (t*.97, t*1.03): assert log_loss(tempered(before, other), targ) > rows.log_loss['after']
    after = model.predict(list(photos))
    np.testing.assert_allclose(after, tempered(before, t), atol=1e-4)
    assert rows.top1_error.tolist() == pytest.approx([(before.argmax(1) != targ).mean()]*2) and rows.confidence['after'] == pytest.approx(after.max(1).mean(), abs=1e-4)
    assert rows.ece['after'] == pytest.approx(calibration_error(after.max(1), after.argmax(1) == targ), abs=1e-3)
    folder = model.save(tmp_path/'m')
    loaded, photo = ResNet.load(folder, device='cpu'), photos[0]
    for m in (model, loaded):
        assert m.temperature == t
        np.testing.assert_allclose(m.predict(photo), after[0], atol=1e-4)
        np.testing.assert_allclose(m.predict(photo, temperature=1), before[0], atol=1e-4)
        assert m.predict_n(photo, 1)[0][1] == pytest.approx(after[0].max(), abs=1e-4)
        assert m.predict_folder([str(photo)], n=1).prob_1[0] == pytest.approx(after[0].max(), abs=1e-4)
    said = (folder/'README.md').read_text().replace('&#46;', '.').replace('&#37;', '%')
    assert f'| temperature | {t:.3g}' in said and f"{rows.ece['before']:.1%} without it, {rows.ece['after']:.1%}" in said
    bars = [b.get_width() for b in model.show_prediction(photo, n=3).axes[1].patches]
    assert bars[0] == pytest.approx(after[0].max(), abs=1e-4)
    model.temperature = loaded.temperature = 1                                   # undone
    for m in (model, loaded): np.testing.assert_allclose(m.predict(photo), before[0], atol=1e-4)
    assert 'temperature' not in (model.save(tmp_path/'n')/'README.md').read_text() and 'trust' not in json.loads((tmp_path/'n'/'config.json').read_text())


def test_what_was_measured_belongs_to_weights_and_protocol(model, demo, capsys):
    model.calibrate()
    t = model.temperature
    model.min_prob = .3
    model.protocol = '10crop'
    assert (model.temperature, model.min_prob) == (1, None)
    model.protocol = '1crop'
    assert (model.temperature, model.min_prob) == (t, .3)
    model.temperature = 3.
    assert model.min_prob is None                                                # it was a probability at another temperature
    other = ResNet(*demo, **tiny | dict(schedule=None, lr=.01))
    with other.learn.no_bar(), other.learn.no_logging():
        other.fit(1)
        other.temperature, other.min_prob = 2., .5
        capsys.readouterr()
        other.fit(1)
    assert (other.temperature, other.min_prob) == (1, None) and 'the temperature and the threshold belonged to other weights' in capsys.readouterr().out
    with pytest.raises(DataError, match='has not been trained'): ResNet(*demo, **tiny).calibrate()


@pytest.mark.parametrize('how', ['plain averages in BN', 'a fit that breaks off', 'a checkpoint'])
def test_weights_that_change_within_an_epoch_take_temperature_and_threshold_along(how, demo, tmp_path):
    other = ResNet(*demo, **tiny | dict(schedule=None, lr=.01), run_folder=tmp_path/'run')
    def fit(n, **kw):
        with other.learn.no_bar(), other.learn.no_logging(): other.fit(n, **kw)
    fit(1)
    other.temperature, other.min_prob = 2., .5
    class Break(Callback):
        def after_batch(self): raise CancelFitException()
    if how == 'plain averages in BN': exact_bn(other, 16)
    elif how == 'a checkpoint': fit(1, resume=True)
    else:
        with other.learn.added_cbs(Break()): fit(1)
    assert len(other.history) == 1 and (other.temperature, other.min_prob) == (1, None)
    loaded = ResNet.load(other.save(tmp_path/'model'), device='cpu')
    assert (loaded.temperature, loaded.min_prob) == (1, None)
    other.temperature = 3.
    assert other.temperature == 3


def test_a_loaded_model_is_calibrated_on_photos_that_it_is_given(model, demo, tmp_path):
    expected = model.calibrate().loc['after']
    loaded = ResNet.load(model.save(tmp_path/'m'), device='cpu')
    with pytest.raises(DataError, match='pass data_path and label_path'): loaded.threshold()
    loaded.temperature = 1
    found = loaded.calibrate(data_path=demo.data_path, label_path=demo.label_path).loc['after']
    pd.testing.assert_series_equal(found, expected, rtol=1e-3)


def test_pictures_of_trust(model):
    model.calibrate()
    left, right = model.show_calibration('test').axes
    assert left.get_title().startswith('As the network says: ECE') and f'temperature {model.temperature:.2f}' in right.get_title()
    assert sum(b.get_height() for b in left.patches) == pytest.approx(1) == sum(b.get_height() for b in right.patches)
    found = model.threshold(.9)
    ax, = model.show_threshold().axes
    assert f"{found.precision:.0%} right, {found.coverage:.0%} of 48 val photos answered" in ax.get_title()
    lines = {line.get_label(): line.get_xydata() for line in ax.lines}
    precision, coverage = (next(v for k, v in lines.items() if k.startswith(s)) for s in ('right', 'answered'))
    assert coverage[:, 1].tolist() == sorted(coverage[:, 1]) and coverage[-1, 1] == 1 and len(precision) == len(coverage)


# ── Not sure

def test_below_the_threshold_it_is_not_sure(model, tmp_path):
    photos = list(model.learn.dls.photos['val'])
    probs, targ = model.predict(photos), np.array([model.labels.encoding[model.labels(p)] for p in model.learn.dls.photos['val']])
    confidence, right = probs.max(1), probs.argmax(1) == targ
    wanted = max(right[confidence >= c].mean() for c in confidence)               # what the surest reach
    assert wanted > right.mean()
    found = model.threshold(wanted)
    assert model.min_prob == found.min_prob > 0 and found.precision >= wanted and 0 < found.coverage < 1
    loaded = ResNet.load(model.save(tmp_path/'m'), device='cpu')
    for m in (model, loaded):
        said = m.predict_n(photos, 2)
        assert [bool(s) for s in said] == (probs.max(1) >= found.min_prob).tolist() and {len(s) for s in said} == {0, 2}
        sure = next(i for i, s in enumerate(said) if s)
        assert [label for label, _ in said[sure]] == [label for label, _ in top_labels(probs[sure], m.labels, 2)]
        assert all(len(s) == 2 for s in m.predict_n(photos, 2, min_prob=0)) and m.predict_n(photos[0], min_prob=1) == []
        table = m.predict_folder(photos, n=2)
        assert list(table) == ['id', 'label_1', 'prob_1', 'label_2', 'prob_2', 'sure', 'error'] and table.sure.tolist() == ['yes' if s else 'no' for s in said]
    for bad in (-.1, 1.1, '.5', float('nan'), True):
        with pytest.raises(DataError, match='min_prob is'): model.predict_n(photos[0], min_prob=bad)
        with pytest.raises(DataError, match='min_prob is'): model.min_prob = bad
    model.min_prob = None
    assert 'sure' not in model.predict_folder(photos[:1], n=1) and len(model.predict_n(photos[0], 1)) == 1


def test_a_table_knows_its_threshold_and_its_temperature(model, demo, tmp_path):
    (tmp_path/'photos').mkdir()
    for i, p in enumerate(list(model.learn.dls.photos['test'])[:3]): (tmp_path/'photos'/f'{i}.jpg').write_bytes(p.read_bytes())
    (tmp_path/'photos'/'bad.jpg').write_bytes(b'no photo')
    ask = lambda name, **kw: model.predict_folder(tmp_path/'photos', dest=tmp_path/name, n=1, **kw)
    plain = ask('t.csv')
    assert list(plain) == ['id', 'label_1', 'prob_1', 'error']
    with pytest.raises(DataError, match='begun with another min_prob'): ask('t.csv', min_prob=.5)
    model.temperature = 2.
    with pytest.raises(DataError, match='begun with another temperature'): ask('t.csv')
    for name in ('s.csv', 's.csv', 's.parquet', 's.parquet'):                    # made, and gone on with
        table = ask(name, min_prob=.2)
        sure = table[table.error == '']
        assert (sure.sure == np.where(sure.prob_1 >= .2, 'yes', 'no')).all() and table[table.error != ''].sure.tolist() == ['']
    assert pd.read_parquet(tmp_path/'s.parquet').sure.tolist() == table.sure.tolist()
    model.temperature = 1
    pd.testing.assert_frame_equal(ask('t.csv'), plain)


def test_a_saved_trust_that_cannot_be(model, tmp_path):
    model.temperature, model.min_prob = 2., .5
    folder = model.save(tmp_path/'m')
    c = json.loads((folder/'config.json').read_text())
    good = c['trust']['threshold']
    for bad in ([], dict(other={}), dict(threshold=good | dict(min_prob=2)), dict(threshold={}), dict(calibration=good | dict(temperature=0)),
                dict(threshold=good | dict(protocol=3)), dict(threshold=good | dict(photos='many')), dict(calibration=good | dict(epochs=-1))):
        (folder/'config.json').write_text(json.dumps((d := c | dict(trust=bad)) | dict(sha256=config_sum(d))))
        with pytest.raises(DataError, match='holds no whole model'): ResNet.load(folder)


def test_the_program_of_the_card_knows_the_temperature(tmp_path, monkeypatch, capsys):
    "Torchvision's way to the same probabilities, without this project"
    torch.manual_seed(0)
    net, photo = torchvision.models.resnet18(num_classes=3), tmp_path/'p.png'
    torch.nn.init.normal_(net.fc.bias, std=2)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)).save(photo)
    model = ResNet.from_torchvision(net.state_dict(), {'cat': 0, 'dog': 1, 'cow': 2}, size=32, device='cpu')
    model.protocol = '1crop@32'
    before = model.predict(photo)
    model.temperature = 2.5
    folder = model.save(tmp_path/'m')
    (tmp_path/'predict.py').write_text(re.search('```python\n(import json.*?)```', (folder/'README.md').read_text(), re.DOTALL)[1])
    monkeypatch.setattr(sys, 'argv', ['predict.py', str(folder), str(photo)])
    runpy.run_path(str(tmp_path/'predict.py'))
    said = capsys.readouterr().out
    found = {label: float(p) for p, label in (line.split('\t') for line in said.splitlines())}
    expected = model.predict(photo, precision='fp32')
    assert np.abs(expected - before).max() > .05
    assert [found[k] for k in ('cat', 'dog', 'cow')] == pytest.approx(expected.tolist(), abs=2e-3)


# ── The shell

def test_calibrate_and_predict_from_the_shell(model, demo, tmp_path):
    from typer.testing import CliRunner
    def run(*words):
        done = CliRunner().invoke(app, [*map(str, words)])
        assert done.exit_code == 0, done.output
        return done.stdout
    photos = [str(p) for p in list(model.learn.dls.photos['test'])[:2]]
    folder, expected = model.save(tmp_path/'m'), model.calibrate()
    least = model.threshold(.95)
    shown = run('calibrate', folder, demo.data_path, demo.label_path, '--precision', '.95', '--to', tmp_path/'sure')
    assert f'{model.temperature:.3f}' in shown and f'not sure below {least.min_prob:.4f}' in shown and f"{expected.ece['after']:.1%}" in shown
    made = ResNet.load(tmp_path/'sure', device='cpu')
    assert made.temperature == pytest.approx(model.temperature, rel=1e-3) and made.min_prob == pytest.approx(least.min_prob, rel=1e-3)
    found = json.loads(run('predict', tmp_path/'sure', *photos, '--n', '2', '--json'))
    for f, p in zip(found, photos):
        (label, prob), _ = model.predict_n(p, 2, min_prob=0)
        assert f['labels'][0]['label'] == label and f['labels'][0]['prob'] == pytest.approx(prob, abs=1e-3) and f['sure'] == (prob >= least.min_prob)
    assert run('predict', tmp_path/'sure', photos[0], '--min-prob', '1').rstrip().endswith('(not sure)')
    assert 'sure' not in run('predict', folder, photos[0])


# ── Photos as vectors

def by_hand(model, path, crops):
    "The mean of what the last layer reads, for crops that torchvision has cut"
    seen, mean = [], torch.tensor(model.stats.mean).float()[:, None, None]
    hook = model.net.fc.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    with torch.no_grad(): model.net.eval()(torch.stack([T.to_tensor(c) for c in crops]) - mean)
    hook.remove()
    return seen[0].mean(0).numpy()


def test_features_are_what_the_head_reads(model, demo):
    paths = list(model.learn.dls.photos['test'])[:3]
    opened = [Image.open(p).convert('RGB') for p in paths]
    one = np.stack([by_hand(model, p, [T.center_crop(T.resize(im, 37), 32)]) for p, im in zip(paths, opened)])
    ten = np.stack([by_hand(model, p, [c for s in (32, 40) for c in T.ten_crop(T.resize(im, s), 32)]) for p, im in zip(paths, opened)])
    found = model.embed(paths, precision='fp32')
    assert found.shape == (3, 64) and found.dtype == np.float32 and np.abs(one - ten).max() > .01
    np.testing.assert_allclose(found, one, atol=5e-3)
    np.testing.assert_allclose(model.embed(paths, protocol='10crop@32,40', precision='fp32'), ten, atol=5e-3)
    np.testing.assert_allclose(model.embed(paths[1], precision='fp32'), found[1], atol=1e-5)
    w, b = (t.detach().numpy() for t in (model.net.fc.weight, model.net.fc.bias))
    np.testing.assert_allclose(torch.tensor(found@w.T + b).softmax(1), model.predict(paths, precision='fp32'), atol=1e-4)
    with pytest.raises(DataError, match="name '1crop'"): model.embed(paths, protocol='dense')


def test_similar_photos(model, demo):
    photos = model.learn.dls.photos['test']
    features = model.embed(photos)
    near = cosine_similarity(features[2:3], features)[0]
    order = [i for i in (-near).argsort(kind='stable') if i != 2][:4]
    found = model.similar(photos[2], photos, n=4, features=features)
    assert found.photo.tolist() == [str(photos[i]) for i in order]
    np.testing.assert_allclose(found.similarity, near[order], atol=1e-5)
    assert found.label.tolist() == [photos[i].label for i in order]
    folder = model.similar(photos[2], demo.data_path/'test', n=4)
    assert folder.photo.tolist() == found.photo.tolist() and list(folder) == ['photo', 'similarity']
    arrays = [np.asarray(Image.open(photos[i])) for i in range(5)]
    assert model.similar(arrays[3], arrays, n=1).photo.tolist() == [3]           # an array is no file, so it is found itself
    with pytest.raises(DataError, match='24 photos'): model.similar(photos[2], photos, features=features[:5])
    with pytest.raises(DataError, match='pass a folder or a list'): model.similar(photos[2], photos[3])


# ── Published networks on real pixels

def test_stored_calibration():
    "What the guide shows, from the bins beside it"
    told = json.loads((experiments/'results'/'calibration.json').read_text())
    assert len(told['nets']) == 4 and told['fitted_to'] == told['measured_on'] == 5000
    for name, net in told['nets'].items():
        for when in ('before', 'after'):
            bins = {k: np.array(v) for k, v in net[when]['bins'].items()}
            assert bins['photos'].sum() == 5000
            assert (bins['photos']*np.abs(bins['confidence'] - bins['right'])).sum()/5000 == pytest.approx(net[when]['ece'], abs=2e-4), name
            assert 1 - (bins['photos']*bins['right']).sum()/5000 == pytest.approx(net[when]['error'], abs=1e-4)
        assert net['before']['error'] == net['after']['error'] and net['temperature'] > 2 and net['after']['ece'] < net['before']['ece']/3


def test_a_published_network_is_too_sure(shared_data, tmp_path, monkeypatch):
    "Its temperature, from photos of one half, helps on those of the other"
    monkeypatch.syspath_prepend(str(experiments))
    spec = spec_from_file_location('calibration_script', experiments/'calibration.py')
    spec.loader.exec_module(script := module_from_spec(spec))
    script.main([str(shared_data/'cifar10'), '--weights', str(shared_data/'cifar10_weights'), '--depths', '20', '--photos', '600', '--out', str(tmp_path/'c.json')])
    net = json.loads((tmp_path/'c.json').read_text())['nets']['ResNet-20']
    assert net['temperature'] > 1.5 and net['after']['log_loss'] < net['before']['log_loss'] and net['after']['ece'] < net['before']['ece']
    assert net['before']['confidence'] > 1 - net['before']['error'] + .02
