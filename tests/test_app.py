"The page's own functions without a browser: what they say is what the library says; tests/browser/test_page.py clicks through the page."
import asyncio
import csv
import json
import os
import signal
import socket
import tempfile
import threading
import urllib.request
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from resnet_fastai.augment import ColorStats
from resnet_fastai.core import ResNet
from resnet_fastai.data import LabelMap
from resnet_fastai.engine.demo_photos import _textures, draw_photo
from resnet_fastai.engine.files import DataError
from resnet_fastai.engine.photo import open_photo
from resnet_fastai.inference import fifty_crop
from resnet_fastai.model import build_net
from resnet_fastai.practice import app
from resnet_fastai.practice.app import (Limits, ask, bound, example_photos, heading, heat, heat_html, known_threshold, verdict, votes,
                                       votes_html, write_csv)
from resnet_fastai.practice.share import Trained

LABELS = {'zebra': 2, '=<script>alert(1)</script>': 0, 'crème & brûlée': 9}
TEXT = '=<script>alert(1)</script>'


def made(labels=LABELS, protocol='50crop', seed=0):
    "A model with BN statistics of its own, that nobody trained, with a history as if"
    torch.manual_seed(seed)
    net = build_net('cifar_resnet8', 10)
    with torch.no_grad():
        net.train()(torch.randn(16, 3, 32, 32)*.3)
        net.eval().fc.weight *= 4
    history = pd.DataFrame(dict(epoch=[0], top1_error=[.5]))
    stats = ColorStats([.5, .4, .3], [.1, .02, .003], np.eye(3), 9)
    return ResNet._from(Trained(net, 'cifar_resnet8', {}, LabelMap({}, labels), stats, 32, history, {}, protocol), 'cpu')


@pytest.fixture(scope='module')
def model(): return made()


@pytest.fixture(scope='module')
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp('photos')/'my photo.jpg'
    draw_photo('rings', np.random.default_rng(3)).save(path)
    return path


class Read(HTMLParser):
    "Tags and text of HTML"
    def __init__(self, text):
        super().__init__()
        self.tags, self.attrs, self.text = [], [], ''
        self.feed(text)
    def handle_starttag(self, tag, attrs): self.tags.append(tag); self.attrs += attrs
    def handle_data(self, data): self.text += data + ' '


# ── Answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_an_answer_is_the_models(model, photo):
    found = ask(model, photo)
    assert found.best == model.predict_n(photo, 3) and found.sure and not found.error and found.name == 'my photo.jpg'
    np.testing.assert_array_equal(found.probs, model.predict(photo))


def test_not_sure_begins_below_the_threshold(model, photo):
    p = model.predict_n(photo, 1)[0][1]
    assert ask(model, photo, p).sure and not ask(model, photo, np.nextafter(p, 1)).sure
    unsure = verdict(ask(model, photo, 1.), 1.)
    assert 'Not sure' in unsure and 'from 100% on' in unsure and 'Not sure' not in verdict(ask(model, photo))


@pytest.mark.parametrize('case', ['text', 'cut', 'empty', 'gone', 'large'])
def test_what_is_no_photo_is_said_by_its_name_alone(case, model, photo, tmp_path):
    whole = photo.read_bytes()
    data = dict(text=b'hello', cut=whole[:len(whole)//2], empty=b'', large=b'\0'*(1 << 20) + b'1').get(case)
    path = tmp_path/"it's <b>.jpg"
    if data is not None: path.write_bytes(data)
    found = ask(model, path, limits=Limits(megabytes=1))
    assert found.probs is None and not found.sure and "it's <b>.jpg" in found.error and str(tmp_path) not in found.error and '\n' not in found.error
    assert ('larger than 1 MB' in found.error) == (case == 'large')
    shown = Read(verdict(found))
    assert found.error in shown.text and 'b' not in shown.tags


@pytest.mark.parametrize('asked,own,found', [(None, None, 0), (.3, None, .3), (.3, .8, .3), (None, .8, .8), (0., .8, 0), (1, None, 1)])
def test_whose_threshold(asked, own, found):
    "The user's before the model's"
    assert known_threshold(type('Model', (), dict(min_prob=own)), asked) == found


def test_a_calibrated_model_keeps_its_temperature_and_threshold_here(photo):
    "As `calibrate` and `threshold` leave them in a saved model"
    plain, entry = made(), dict(protocol='50crop', epochs=1)
    trust = dict(calibration=entry | dict(temperature=3.), threshold=entry | dict(min_prob=.99, temperature=3.))
    model = ResNet._from(plain.trained._replace(trust=trust), 'cpu')
    least, answer, before = known_threshold(model), ask(model, photo, known_threshold(model)), ask(plain, photo)
    softer = before.probs**(1/3)
    assert least == .99 and not answer.sure and 'from 99% on' in verdict(answer, least)
    np.testing.assert_allclose(answer.probs, softer/softer.sum(), rtol=1e-3)
    assert 'their mean, calibrated, is the answer' in votes_html(votes(model, answer), answer, model.trained.temperature)
    assert 'their mean is the answer' in votes_html(votes(plain, before), before, plain.trained.temperature)


@pytest.mark.parametrize('bad', [-.1, 1.5, float('nan')])
def test_a_threshold_that_is_none(bad):
    with pytest.raises(DataError, match='must be from 0 to 1'): known_threshold(None, bad)


# ── Crops and heat ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_the_crops_are_those_that_voted(model, photo):
    "Pixels as Pillow cuts them, probabilities as a plain forward pass gives them, and their mean is the answer"
    found, answer, t = votes(model, ask(model, photo)), ask(model, photo), model.trained
    crops = fifty_crop(photo, size=32)
    with torch.no_grad(): probs = t.net(crops - torch.tensor(t.stats.mean, dtype=torch.float32)[:, None, None]).softmax(1).numpy()
    np.testing.assert_array_equal(np.stack([v.crop for v in found]), (crops*255).round().byte().permute(0, 2, 3, 1).numpy())
    best = [max(p[i] for i in LABELS.values()) for p in probs]
    np.testing.assert_allclose([v.prob for v in found], best, atol=.02)           # in 16 bits, where the hardware computes in them
    assert [v.agrees for v in found] == [v.label == answer.best[0][0] for v in found]
    assert sorted({v.side for v in found}) == [32, 37, 55, 69, 91]
    shown = Read(votes_html(found, answer))
    assert shown.tags.count('img') == 50 and f'{sum(v.agrees for v in found)} of 50 crops say' in shown.text and 'script' not in shown.tags


@pytest.mark.parametrize('protocol,n', [('1crop', 1), ('10crop', 10), ('10crop@32,40', 20), ('1crop@32,40', 2), ('dense', 0)])
def test_other_protocols_have_other_crops(protocol, n, photo):
    model = made(protocol=protocol)
    found, answer = votes(model, ask(model, photo)), ask(model, photo)
    assert len(found) == n and Read(votes_html(found, answer)).tags.count('img') == n
    if n == 0: assert 'no crops' in votes_html(found, answer)
    if n == 1: assert abs(found[0].prob - answer.best[0][1]) < .02


def test_heat_lies_where_the_network_looks(photo):
    "A head that reads one map: bright where this map is large, and nothing for a label whose row is zero"
    model = made()
    fc = model.net.fc
    with torch.no_grad(): fc.weight.zero_(); fc.weight[2, 5] = 1.; fc.bias.zero_()
    img, strongest = heat(model, ask(model, photo), 'zebra')
    grey, none = heat(model, ask(model, photo), TEXT)
    assert img.size == grey.size == open_photo(photo).size and strongest == 1 and none == 0
    assert 'Bright' in heat_html(img, 1, 'zebra') and 'Nothing in this photo' in heat_html(grey, none, TEXT)
    assert 'script' not in Read(heat_html(grey, none, TEXT)).tags
    a = np.asarray(grey, float)
    assert (a[..., 0] - a[..., 2]).max() <= 3                                     # no colour where nothing speaks
    assert max(heat(model, ask(model, photo), 'zebra', most=50)[0].size) == 50


# ── Tables and pages ─────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_the_table_is_the_one_that_predict_writes(model, photo, tmp_path):
    (tmp_path/'=1+1.jpg').write_bytes(photo.read_bytes())
    (tmp_path/'bad.jpg').write_text('hello')
    paths = [photo, tmp_path/'=1+1.jpg', tmp_path/'bad.jpg']
    rows = list(csv.reader(write_csv([ask(model, p) for p in paths], model.labels, tmp_path).read_text(encoding='utf-8').splitlines()))
    model.predict_folder(paths, dest=tmp_path/'theirs.csv', n=3)
    theirs = list(csv.reader((tmp_path/'theirs.csv').read_text(encoding='utf-8').splitlines()))
    assert rows[0] == theirs[0] and [r[0] for r in rows[1:]] == ['my photo.jpg', "'=1+1.jpg", 'bad.jpg']
    for ours, row in zip(rows[1:3], theirs[1:]):
        assert ours[1::2] == row[1::2]
        np.testing.assert_allclose([float(p) for p in ours[2:7:2]], [float(p) for p in row[2:7:2]], rtol=1e-3)
    assert rows[3][1:-1] == ['']*6 and 'bad.jpg' in rows[3][-1] and str(tmp_path) not in rows[3][-1]
    assert not any(cell.startswith('=') for row in rows for cell in row)          # no formula for a spreadsheet


def test_labels_are_text(model, photo):
    "A label that is HTML is shown, not obeyed"
    for page in (verdict(ask(model, photo)), heading(model), verdict(ask(model, photo, 1.), 1.)):
        shown = Read(page)
        assert 'script' not in shown.tags and TEXT in shown.text and 'crème & brûlée' in shown.text
    widths = [float(v.removeprefix('width:').removesuffix('%')) for k, v in Read(verdict(ask(model, photo))).attrs if k == 'style']
    np.testing.assert_allclose(widths, [100*p for _, p in model.predict_n(photo, 3)], atol=.06)


def test_the_heading_says_where_photos_go(model):
    assert 'stay on this computer' in heading(model) and 'stay on this computer' not in heading(model, shared=True)
    many = made({f'kind {i}': i for i in range(10)})
    assert 'kind 3 and 6 more' in heading(many, most=4)


def test_examples(model, photo, tmp_path):
    for i in range(20): (tmp_path/f'{i:02}.jpg').write_bytes(photo.read_bytes())
    found = example_photos(model.labels, tmp_path)
    assert len(found) == len({*found}) == 8 and found[0].endswith('00.jpg') and found[-1].endswith('19.jpg')
    (tmp_path/'none').mkdir()
    with pytest.raises(DataError, match='holds no photos'): example_photos(model.labels, tmp_path/'none')
    assert example_photos(model.labels, None, tmp_path) == []                     # nobody knows a zebra to draw
    drawn = example_photos(made({label: i for i, label in enumerate(_textures)}).labels, None, tmp_path/'none')
    assert len(drawn) == 8 and all(min(Image.open(p).size) >= 72 for p in drawn)


# ── Serving ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_without_gradio(monkeypatch, model):
    monkeypatch.setattr(app, 'find_spec', lambda name: None)
    with pytest.raises(DataError, match=r'pip install "resnet_fastai\[app\]"'): app.serve(model)


def test_a_port_that_is_taken_is_a_sentence():
    with bound('127.0.0.1', 0) as s:
        port = s.getsockname()[1]
        with socket.create_connection(('127.0.0.1', port)): pass
        with pytest.raises(DataError, match=f'port {port}.*--port'): bound('127.0.0.1', port)
    with bound('127.0.0.1', port) as s: assert s.getsockname() == ('127.0.0.1', port)
    with pytest.raises(DataError, match='no address of this machine'): bound('no such host.invalid', 0)
    with pytest.raises(DataError, match='--port'): bound('127.0.0.1', 70000)


def test_without_a_port_the_next_free_one_is_taken():
    with bound('127.0.0.1', None) as a, bound('127.0.0.1', None) as b:
        assert a.getsockname()[1] != b.getsockname()[1] and a.getsockname()[0] == b.getsockname()[0] == '127.0.0.1'


@pytest.fixture(scope='module')
def page(model, photo, tmp_path_factory):
    pytest.importorskip('gradio', reason="needs Gradio: pip install -e '.[app]'")
    return app.Page(model, tmp_path_factory.mktemp('page'), [photo], least=.99999, limits=Limits(photos=3))


def shown(page, updates):
    "What the page holds after the updates of a generator"
    at = {}
    for u in updates: at.update(u)
    return {name: at[part] for name in ('verdict', 'many', 'csv', 'more', 'heat', 'votes', 'found') if (part := getattr(page, name)) in at}


def test_one_photo(page, photo):
    at = shown(page, page.read([str(photo)]))
    assert 'Not sure' in at['verdict'] and 'Bright' in at['heat'] and '50 crops' in at['votes'] and at['more']['visible'] and not at['csv']['visible']
    assert TEXT not in page.evidence(at['found'], 'zebra') and 'zebra' in page.evidence(at['found'], 'zebra')


def test_several_photos(page, photo, tmp_path):
    (bad := tmp_path/'bad.jpg').write_text('hello')
    at = shown(page, page.read([str(bad), str(photo)]))
    assert 'bad.jpg' in at['verdict'] and 'heat' not in at and not at['more']['visible']
    assert [caption.partition(' (')[0] for _, caption in at['many']['value']] == ['cannot be read', 'not sure'] and at['csv']['visible']
    with open(at['csv']['value'], encoding='utf-8') as f: assert len(f.readlines()) == 3
    at = shown(page, page.select(at['found'], 1))
    assert 'my photo.jpg' in at['verdict'] and at['found'][1] == 1 and 'Bright' in at['heat']


def test_too_many_photos_and_none(page, photo):
    at = shown(page, page.read([str(photo)]*4))
    assert 'takes 3 at a time' in at['verdict'] and at['found'] == [] and not at['more']['visible']
    at = shown(page, page.read(None))
    assert 'Drop a photo' in at['verdict'] and 'click one of the examples' in at['verdict']


def test_what_the_browser_has_held_back(page):
    at = shown(page, [page.too_large('{"names": ["a <b>.mov"], "at": 7}')])
    assert "'a <b>.mov': larger than 160 MB" in Read(at['verdict']).text and 'b' not in Read(at['verdict']).tags and at['found'] == []
    at = shown(page, [page.too_large(json.dumps(dict(names=[f'{i}.mov' for i in range(9)])))])
    assert "'0.mov', '1.mov', '2.mov' and 6 more" in Read(at['verdict']).text


@pytest.fixture
def usual_signals():
    "What signals do where nobody has said otherwise: `nohup` and some schedulers let a process ignore them"
    usual = dict(SIGTERM=signal.SIG_DFL, SIGHUP=signal.SIG_DFL, SIGINT=signal.default_int_handler)
    old = {name: signal.signal(getattr(signal, name), do) for name, do in usual.items()}
    yield
    for name, do in old.items(): signal.signal(getattr(signal, name), do)


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGHUP', 'SIGINT'])
def test_a_signal_ends_the_page_and_its_folder(name, model, tmp_path, monkeypatch, usual_signals):
    "As a scheduler, a terminal and a person end it; no uploaded photo stays behind, and what the signals did before they do again"
    pytest.importorskip('gradio', reason="needs Gradio: pip install -e '.[app]'")
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    found, before = [], [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]

    def ready(url):
        found.extend(tmp_path.iterdir())
        threading.Thread(target=lambda: (urllib.request.urlopen(url).read(), os.kill(os.getpid(), getattr(signal, name)))).start()
    with pytest.raises(KeyboardInterrupt): app.serve(model, port=0, ready=ready)
    assert len(found) == 1 and found[0].name.startswith('resnet-fastai-app-') and not list(tmp_path.iterdir())
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)] == before


def test_the_page_beside_an_event_loop_that_runs_already(model, usual_signals):
    "A notebook's thread has one"
    pytest.importorskip('gradio', reason="needs Gradio: pip install -e '.[app]'")
    answers = []
    def ready(url): threading.Thread(target=lambda: (answers.append(urllib.request.urlopen(url).status), os.kill(os.getpid(), signal.SIGTERM))).start()
    async def cell(): app.serve(model, port=0, ready=ready)
    try: runs = asyncio.get_running_loop()                                # the browser's, where its tests came first
    except RuntimeError: runs = None
    with pytest.raises(KeyboardInterrupt): cell().send(None) if runs else asyncio.run(cell())
    assert answers == [200]


def test_gradio_is_told_to_be_silent(page):
    import gradio.analytics
    assert not page.blocks.analytics_enabled and not gradio.analytics.analytics_enabled()
