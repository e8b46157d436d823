"Saved folders, exported files and torchvision's checkpoints: the same answers elsewhere, and nothing but sentences for what is broken."
import hashlib
import html
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import mistune
import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
import torchvision.models as tvm
import torchvision.transforms as T
from fastai.learner import Learner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from resnet_fastai.practice import share
from resnet_fastai.augment import ColorStats
from resnet_fastai.core import ResNet
from resnet_fastai.data import LabelMap
from resnet_fastai.engine.files import DataError
from resnet_fastai.engine.layout import list_photos
from resnet_fastai.inference import fifty_crop, predict_probs
from resnet_fastai.model import build_net
from resnet_fastai.engine.weights import config_sum, json_bytes, misfit, scaled
from resnet_fastai.practice.share import (PhotoProbs, Trained, as_trained, export_model, from_torchvision, imagenet_stats, load_model, model_card, save_model,
                                          to_torchvision, torchvision_kin)

FILES = ('README.md', 'config.json', 'model.safetensors')
STATS = ColorStats([.5, .4, .3], [.1, .02, .003], np.eye(3), 99)
LABELS = {'zebra': 2, 'crème|brûlée': 0, '`<b>`\n# x': 9}


def lived_in(net, x):
    "The network with BN statistics that belong to its weights, and outputs that differ"
    bns = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for bn in bns: bn.momentum = 1.
    with torch.no_grad(): net.train()(x)
    for bn in bns: torch.nn.init.uniform_(bn.bias, -.1, .1)
    with torch.no_grad(): net.fc.weight *= 2/net.eval()(x).std()
    return net


def made(arch='cifar_resnet8', size=32, seed=0, **net_args):
    "A model that nobody trained, with a history as if"
    torch.manual_seed(seed)
    history = pd.DataFrame(dict(epoch=[0, 1], train_loss=[2., 1.], valid_loss=[2., 1.5], top1_error=[.5, .25], train_error=[np.nan, .3]))
    return Trained(lived_in(build_net(arch, 10, **net_args), torch.randn(16, 3, size, size)*.3), arch, net_args, LabelMap({}, LABELS), STATS, size,
                   history, dict(photos=dict(train=7, val=2, test=0), epochs=2, seconds=1.5, bs=4, micro_bs=4, lr=.1, decay='weights', precision='fp32'))


def answers(model):
    "What a model says and knows, to compare"
    x = torch.linspace(-1, 1, 3*model.size**2).reshape(1, 3, model.size, model.size)
    with torch.no_grad(): logits = model.net(x)
    return (logits.tolist(), model.labels.encoding, model.stats.as_dict(), model.size, model.arch)


@pytest.fixture(scope='module')
def saved(tmp_path_factory): return save_model(made(), tmp_path_factory.mktemp('saved')/'model')


@pytest.fixture
def copy(saved, tmp_path):
    "A copy of a saved model, to be broken"
    for name in FILES: (tmp_path/name).write_bytes((saved/name).read_bytes())
    return tmp_path


def refused(folder):
    with pytest.raises(DataError) as e: load_model(folder)
    assert '\n' not in str(e.value) and str(folder) in str(e.value)
    return str(e.value)


# ── Save and load ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_a_loaded_model_is_the_saved_one(saved):
    before, after = made(), load_model(saved)
    assert answers(after) == answers(before) and after.training == before.training
    pd.testing.assert_frame_equal(after.history, before.history)
    assert all(torch.equal(v, after.net.state_dict()[k]) for k, v in before.net.state_dict().items())


def test_the_first_format_loads(saved, tmp_path):
    "As an earlier version wrote it: without scales, summary and a sum of its own, with NaN"
    model, weights = made(), (saved/'model.safetensors').read_bytes()
    (tmp_path/'model.safetensors').write_bytes(weights)
    (tmp_path/'config.json').write_text(json.dumps(dict(
        format=1, arch='cifar_resnet8', net_args={}, n_out=10, size=32, encoding=LABELS, stats=STATS.as_dict(), history=model.history.to_dict('list'),
        weights_sha256=hashlib.sha256(weights).hexdigest(), versions={})))
    assert answers(load_model(tmp_path)) == answers(model)
    assert answers(load_model(save_model(load_model(tmp_path), tmp_path/'new'))) == answers(model)


@pytest.mark.parametrize('name', FILES)
def test_nothing_is_overwritten_unasked(name, tmp_path):
    (tmp_path/name).write_text('mine')
    with pytest.raises(DataError, match=re.escape(name)): save_model(made(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [name] and (tmp_path/name).read_text() == 'mine'


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path/'file').write_text('mine')
    with pytest.raises(DataError, match='nothing can be written'): save_model(made(), tmp_path/'file')
    assert (tmp_path/'file').read_text() == 'mine'


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    model = made()
    with torch.no_grad(): model.net.fc.bias[3] = float('nan')
    with pytest.raises(DataError, match='fc.bias are no numbers'): save_model(model, tmp_path/'m')
    assert not (tmp_path/'m').exists()


@pytest.mark.parametrize('n', range(4))
def test_a_save_that_is_broken_off_leaves_old_or_new_or_nothing_to_load(saved, copy, n, monkeypatch):
    "Killed before the n-th of the three renames"
    done, rename, new = [], Path.replace, made(seed=1)
    def replace(self, target):
        if len(done) == n: raise KeyboardInterrupt
        done.append(target)
        return rename(self, target)
    with monkeypatch.context() as m:
        m.setattr(Path, 'replace', replace)
        m.setattr(Path, 'unlink', lambda *a, **k: None)                       # who is killed does not tidy up
        try: save_model(new, copy, overwrite=True)
        except KeyboardInterrupt: assert n < 3
    if n == 0: assert answers(load_model(copy)) == answers(made())
    elif n == 1: refused(copy)                                                # new weights, old settings
    else: assert answers(load_model(copy)) == answers(new)


def test_a_process_that_is_killed_while_it_saves(tmp_path):
    "Two models in turn into one folder; whenever the killing comes, what loads is one of them"
    code = ("import sys; sys.path.insert(0, sys.argv[2]); from test_share import made, save_model\nmodels = made(), made(seed=1)\nprint('go', flush=True)\n"
            "while True:\n    for m in models: save_model(m, sys.argv[1], overwrite=True)")
    both, rng = [answers(made(seed=s)) for s in (0, 1)], random.Random(0)
    child = subprocess.Popen([sys.executable, '-c', code, str(tmp_path), str(Path(__file__).parent)], stdout=subprocess.PIPE)
    try:
        child.stdout.readline()
        for _ in range(12):
            time.sleep(rng.uniform(.005, .05))
            child.send_signal(signal.SIGSTOP)                                 # what a death at this moment would leave
            try: found = answers(load_model(tmp_path))
            except DataError: found = None
            assert found in (None, *both)
            child.send_signal(signal.SIGCONT)
    finally: child.kill(); child.wait()


def test_a_loaded_model_saves_the_same_files_and_reading_draws_nothing(saved, tmp_path):
    state = torch.get_rng_state()
    loaded = load_model(saved)
    assert torch.equal(torch.get_rng_state(), state)
    again = save_model(loaded, tmp_path/'again')
    assert all((again/name).read_bytes() == (saved/name).read_bytes() for name in FILES)
    assert sorted(p.name for p in again.iterdir()) == sorted(FILES)


def test_only_a_learner_of_this_library_is_a_model(drawn):
    model = ResNet(*drawn, size=32, arch='cifar_resnet8', bs=8, num_workers=0, net_args=dict(zero_init_residual=True))
    t = as_trained(model.learn)
    assert (t.arch, t.net_args, t.size, len(t.labels)) == ('cifar_resnet8', dict(zero_init_residual=True), 32, len(model.labels))
    assert t.training['photos'] == dict(train=16, val=8, test=4) and t.training['epochs'] == 0 and as_trained(t) is t
    with pytest.raises(DataError, match='only a learner of resnet_learner'): as_trained(Learner(model.learn.dls, model.net))


# ── What is broken, or was made to break ─────────────────────────────────────────────────────────────────────────────────────

def signed(c):
    "The settings with their sum, made as the docs say: SHA-256 of the other entries, sorted, as the file holds them"
    rest = {k: c[k] for k in sorted(c) if k != 'sha256'}
    return rest | dict(sha256=hashlib.sha256(json.dumps(rest, ensure_ascii=False, indent=1).encode('utf-8', 'backslashreplace')).hexdigest())


def test_the_sum_is_that_of_the_file(saved):
    c = json.loads((saved/'config.json').read_text(encoding='utf-8'))
    assert signed(c) == c


@pytest.mark.parametrize('name', ['config.json', 'model.safetensors'])
def test_files_that_are_missing_empty_short_or_long(name, copy):
    whole = (copy/name).read_bytes()
    for data in (b'', whole[:1], whole[:len(whole)//2], whole[:-1], whole + b'x', b'\0'*len(whole)):
        (copy/name).write_bytes(data)
        refused(copy)
    (copy/name).unlink()
    assert f'{name}: No such file' in refused(copy)
    (copy/name).mkdir()
    refused(copy)


def test_a_card_that_is_gone_or_edited_hurts_nobody(copy):
    (copy/'README.md').write_text('my notes')
    assert answers(load_model(copy)) == answers(made())
    (copy/'README.md').unlink()
    assert answers(load_model(copy)) == answers(made())


def test_any_changed_byte_is_noticed_or_means_nothing(copy):
    rng, same = random.Random(0), answers(made())
    for name in ('config.json', 'model.safetensors'):
        whole = (copy/name).read_bytes()
        for _ in range(150):
            data = bytearray(whole)
            for _ in range(rng.choice((1, 1, 3))): data[rng.randrange(len(data))] = rng.randrange(256)
            if rng.random() < .2: del data[(i := rng.randrange(len(data))):i + rng.randrange(9)]
            (copy/name).write_bytes(data)
            try: assert answers(load_model(copy)) == same
            except DataError as e: assert '\n' not in str(e)
        (copy/name).write_bytes(whole)


ODD = [None, True, 0, -1, 1.5, 10**400, 1e308, '', 'x'*999, '\ud800', [], {}, [[]], [None], {'a': {}}, 'resnet18', 'resnet' + '9'*5000, 'cifar_resnet600002']


def places(o, at=()):
    yield at
    if isinstance(o, dict):
        for k, v in o.items(): yield from places(v, (*at, k))
    if isinstance(o, list):
        for i, v in enumerate(o): yield from places(v, (*at, i))


def test_settings_that_somebody_signed_end_in_a_model_or_a_sentence(copy):
    "Every entry in turn becomes every odd thing, with a sum that is right"
    whole = json.loads((copy/'config.json').read_text(encoding='utf-8'))
    cases = [(at, odd) for at in places(whole) if at and at != ('sha256',) for odd in ODD]
    deep, loaded = [c for c in cases if len(c[0]) > 1], 0
    for at, odd in [c for c in cases if len(c[0]) == 1] + random.Random(0).sample(deep, 150):
        c = inner = json.loads(json.dumps(whole))
        for k in at[:-1]: inner = inner[k]
        inner[at[-1]] = odd
        (copy/'config.json').write_bytes(json.dumps(signed(c), ensure_ascii=False).encode('utf-8', 'backslashreplace'))
        try: model = load_model(copy)
        except DataError as e: assert '\n' not in str(e)
        else: loaded += bool(model_card(share._config(model, b'')))
    assert 0 < loaded < 100                                                    # most of it cannot be


@pytest.mark.parametrize('text', ['['*100_000, '{"format": 2, "a": NaN}', '{"format": 3}', '{"format": 1}', '[]', 'null', '{"a": 1, "a": 2}', '{"format": %s}' % ('9'*6000)])
def test_json_that_is_no_config(text, copy):
    (copy/'config.json').write_text(text)
    refused(copy)


@pytest.mark.parametrize('change, says', [
    (dict(size=True), 'size is not a int'), (dict(size=0), 'crop of 0'), (dict(scales=[1]), 'not those of a crop of 32'), (dict(arch='resnet34'), 'does not fit resnet34'),
    (dict(arch='cifar_resnet6000002'), 'no network'), (dict(size=10**7), 'crop of 10000000'), (dict(n_out=10**12), 'fc.weight'),
    (dict(encoding={'cat': 1000}), '1000'), (dict(history=dict(a=[1], b=[])), 'differ in length'), (dict(history=dict(a=['1'])), 'more than numbers'),
    (dict(training=dict(photos=3)), 'training summary'), (dict(training=dict(wings=2)), 'training summary'), (dict(arch=None), 'arch is not a str'),
    *((dict(stats=STATS.as_dict() | bad), '') for bad in (dict(mean=[.5, .5, 2]), dict(eigval=[1, -1, 0]), dict(n_photos='many'), dict(mean=[.5])))])
def test_settings_that_cannot_be_are_named(change, says, copy):
    c = json.loads((copy/'config.json').read_text(encoding='utf-8')) | change
    (copy/'config.json').write_text(json.dumps(signed(c)))
    assert says in refused(copy)


def test_an_entry_that_is_missing_or_not_signed(copy):
    c = json.loads((copy/'config.json').read_text(encoding='utf-8'))
    (copy/'config.json').write_text(json.dumps(signed({k: v for k, v in c.items() if k != 'arch'})))
    assert 'lacks arch' in refused(copy)
    (copy/'config.json').write_text(json.dumps(c | dict(stats=c['stats'] | dict(mean=[0, 0, 0]))))
    assert 'changed since it was saved' in refused(copy)


def test_the_checksum_and_json_of_settings():
    model = made()
    c = share._config(model, b'weights')
    assert json.loads(json_bytes(c)) == c and config_sum(json.loads(json_bytes(c))) == c['sha256'] and config_sum(c | dict(size=33)) != c['sha256']
    assert c['history']['train_error'] == [None, .3]                           # NaN is not JSON
    assert json.loads(json_bytes({'caf\xe9': '\ud800'})) == {'caf\xe9': '\ud800'} and 'café'.encode() in json_bytes(['café'])


@pytest.mark.parametrize('arch, n_out, change, says', [
    ('resnet18', 10, {}, ''), ('resnet18', 12, {}, 'fc.weight has the shape (10, 512), not (12, 512)'), ('resnet34', 10, {}, 'is missing'),
    ('plain18', 10, {}, 'has no place'), ('resnet18', 10, dict(kind='half'), 'float16'), ('resnet18', 10, dict(kind='nan'), 'no number')])
def test_weights_fit_one_network_only(arch, n_out, change, says):
    w = tvm.resnet18(num_classes=10).state_dict()
    if change: w['fc.bias'] = w['fc.bias'].half() if change['kind'] == 'half' else w['fc.bias']/0
    with torch.device('meta'): target = build_net(arch, n_out).state_dict()
    assert says in misfit(w, target) and bool(misfit(w, target)) == bool(says)


def test_weights_that_hold_no_numbers_or_of_another_kind(copy):
    good, c = safetensors.torch.load((copy/'model.safetensors').read_bytes()), json.loads((copy/'config.json').read_text(encoding='utf-8'))
    for k, v in {'fc.bias': good['fc.bias']/0, 'fc.weight': good['fc.weight'].half(), 'bn1.weight': good['bn1.weight'][:-1], 'more': torch.zeros(1)}.items():
        data = safetensors.torch.save(good | {k: v.contiguous()})
        (copy/'model.safetensors').write_bytes(data)
        (copy/'config.json').write_text(json.dumps(signed(c | dict(weights_bytes=len(data), weights_sha256=hashlib.sha256(data).hexdigest()))))
        assert k in refused(copy)


# ── The card ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────

render = mistune.create_markdown(escape=False, plugins=['table', 'url', 'strikethrough', 'footnotes'])


@settings(max_examples=150, deadline=None)
@given(st.text(min_size=1) | st.text('|`*_~[]()<>#&!:/\\\n\t.w1-+ahtps', min_size=1, max_size=40))
def test_a_label_is_text_in_the_card_whatever_it_says(label):
    c = dict(arch='resnet18', net_args={}, n_out=10, size=224, scales=[224], encoding={label: 3, 'next': 4}, stats=STATS.as_dict(), training={}, history={},
             versions={})
    _, head, card = model_card(c).split('---\n', 2)                              # the hub reads the head, people the rest
    page = render(card)
    assert label not in head or label in model_card(c | dict(encoding={'a': 3, 'b': 4}))
    rows = re.findall(r'<td[^>]*>3</td>\s*<td[^>]*>(.*?)</td>', page)
    shown = ''.join(ch if ch.isprintable() else f'\\u{ord(ch):04x}' for ch in label)
    assert len(rows) == 1 and html.unescape(rows[0]).split() == shown.split()
    assert not re.search('<[a-z]', rows[0]) and page.count('<h') == 4 and page.count('<tr>') == 9


def card_config(**changes):
    "Settings for a card"
    return dict(arch='resnet18', net_args={}, n_out=1000, size=224, scales=[224], encoding={'a': 0}, stats=STATS.as_dict(), training={}, history={},
                versions={}) | changes


def test_a_card_of_many_labels_and_of_each_network():
    nasty = 'a|b `c` *d* [e](http://f) <script>g</script>\n# h &amp; _i_ www.j.de \u202ek'
    assert share._md("T-shirt, men's (M/L)") == "T-shirt, men's (M/L)"
    assert not set('|`*[]<>#_:.\n\u202e\\') & set(re.sub('&#[0-9]+;', '', share._md(nasty)))
    odd = model_card(card_config(encoding={nasty: 0, 'é': 7} | {f'n{i}': i+10 for i in range(200)}))
    assert re.findall(r'^\| 7 .*$', odd, re.M) == ['| 7 | é |'] and '102 more' in odd and odd.split('---\n', 2)[2].count('\n#') == 3
    assert [model_card(card_config(arch=a)).count('hasattr(block') for a in ('resnet50', 'resnet18', 'cifar_resnet8')] == [1, 0, 0]
    assert 'torchvision has no such network' in model_card(card_config(arch='cifar_resnet8'))


@pytest.mark.parametrize('net_args', [{}, dict(stride_at='3x3')], ids=['v1', 'v1.5'])
def test_the_cards_program_runs_as_printed(net_args, photos, tmp_path):
    "Cut out of the card, in a Python that finds nothing of this project's, on photos that lie and stand"
    folder = save_model(made('resnet50', 32, **net_args), tmp_path/'model')
    code = next(c for c in re.findall(r'```python\n(.*?)```', (folder/'README.md').read_text(encoding='utf-8'), re.S) if 'sys.argv' in c)
    assert 'resnet_fastai' not in code and 'fastai' not in code
    (tmp_path/'predict.py').write_text(code, encoding='utf-8')
    some = [p for p in list_photos(photos) if Image.open(p).mode == 'RGB'][:3]
    out = subprocess.run([sys.executable, '-I', tmp_path/'predict.py', folder, *some], capture_output=True, text=True, encoding='utf-8',
                         env={**os.environ, 'PYTHONUTF8': '1', 'PYTHONIOENCODING': 'utf-8'})
    assert out.returncode == 0, out.stderr
    model, said = load_model(folder), [float(v) for v in re.findall(r'^([01]\.\d{4})\t', out.stdout, re.M)]
    wanted = [sorted((predict_probs(model.net, p, model.stats, 32, precision='fp32')[i] for i in LABELS.values()), reverse=True) for p in some]
    np.testing.assert_allclose(np.reshape(said, (len(some), 3)), wanted, atol=1e-4)
    assert np.ptp([w[0] for w in wanted]) > 1e-3                               # photos differ; a program that saw none would not


# ── Other programs ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def centre_crops(photos, size, n=20):
    crop = T.Compose([T.Resize(size), T.CenterCrop(size), T.ToTensor()])
    return torch.stack([crop(Image.open(p).convert('RGB')) for p in list_photos(photos)[:n]])


def by_hand(model, x):
    "Centred, through the network, softmax in float64"
    with torch.no_grad(): logits = model.net(x - torch.tensor(model.stats.mean).float()[:, None, None]).double().numpy()
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e/e.sum(1, keepdims=True)


@pytest.mark.parametrize('arch,size', [('resnet50', 64), ('cifar_resnet8', 32)])
def test_onnx_runtime_gives_the_same_probabilities(arch, size, photos, tmp_path):
    ort = pytest.importorskip('onnxruntime')
    model, x = made(arch, size), centre_crops(photos, size)
    session = ort.InferenceSession(export_model(model, tmp_path, 'onnx'), providers=['CPUExecutionProvider'])
    want = by_hand(model, x)
    for batch in (x[:1], x[1:8], x):
        got = session.run(['probs'], {'photos': batch.numpy()})[0]
        np.testing.assert_allclose(got, by_hand(model, batch), atol=1e-4)
    assert np.ptp(want, axis=0).max() > .01 and json.loads(session.get_modelmeta().custom_metadata_map['encoding']) == LABELS
    beside = json.loads((tmp_path/'model.onnx.json').read_text(encoding='utf-8'))
    assert beside == dict(size=size, scales=[round(s*size/224) for s in (224, 256, 384, 480, 640)], encoding=LABELS)


def test_torch_export_gives_the_same_probabilities(photos, tmp_path):
    model, x = made('resnet18', 64), centre_crops(photos, 64)
    model.net.train()                                                          # the export is for predicting all the same
    run = torch.export.load(export_model(model, tmp_path, 'torch_export')).module()
    assert model.net.training
    model.net.eval()
    for batch in (x[:1], x[1:8], x): np.testing.assert_allclose(run(batch).detach(), by_hand(model, batch), atol=1e-4)


def test_mean_and_softmax_are_in_the_exported_module(photos):
    model, photo = made(), list_photos(photos)[0]
    crops = fifty_crop(photo, size=32)
    with torch.inference_mode(): p = PhotoProbs(model.net.eval(), model.stats)(crops)
    np.testing.assert_allclose(p.mean(0), predict_probs(model.net, photo, model.stats, 32, precision='fp32'), atol=1e-6)
    with torch.inference_mode(): assert (model.net(crops).softmax(1) - p).abs().max() > .01              # without the mean it shows


def test_an_export_overwrites_nothing_and_knows_its_formats(tmp_path):
    (tmp_path/'model.pt2').write_text('mine')
    with pytest.raises(DataError, match='model.pt2'): export_model(made(), tmp_path, 'torch_export')
    with pytest.raises(DataError, match='there is onnx, torch_export'): export_model(made(), tmp_path, 'caffe')
    assert (tmp_path/'model.pt2').read_text() == 'mine'


@pytest.mark.parametrize('lacks', ['onnx', 'onnxscript'])
def test_what_onnx_needs_is_named(lacks, tmp_path, monkeypatch):
    monkeypatch.setattr(share, 'find_spec', lambda name: None if name == lacks else object())
    with pytest.raises(DataError, match=re.escape(f'needs {lacks}: pip install "resnet_fastai[onnx]"')): export_model(made(), tmp_path/'new')
    assert not (tmp_path/'new').exists()


# ── torchvision ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

normalise = T.Normalize((.485, .456, .406), (.229, .224, .225))


@pytest.fixture(scope='module')
def theirs():
    "torchvision's ResNet-50, as if trained"
    torch.manual_seed(5)
    return lived_in(tvm.resnet50(num_classes=10), torch.randn(8, 3, 64, 64))


def test_torchvisions_resnet50_gives_its_logits_here(theirs, photos):
    ours = from_torchvision(theirs.state_dict(), LABELS, size=96)
    assert (ours.arch, ours.net_args, ours.labels.encoding) == ('resnet50', dict(stride_at='3x3'), LABELS)
    x = centre_crops(photos, 96, 8)
    with torch.no_grad(): want, got = theirs(normalise(x)), ours.net(x - torch.tensor(ours.stats.mean).float()[:, None, None])
    assert want.std() > .1
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_dividing_by_std_moves_into_the_first_convolution():
    torch.manual_seed(2)
    x, conv = torch.rand(2, 3, 33, 20), torch.nn.Conv2d(3, 8, 7, 2, padding=3, bias=False)
    mean, std = (torch.tensor(o).float()[:, None, None] for o in (normalise.mean, normalise.std))
    folded = scaled({'conv1.weight': conv.weight}, 1/np.array(normalise.std))['conv1.weight']
    torch.testing.assert_close(torch.nn.functional.conv2d(x - mean, folded, stride=2, padding=3), conv((x - mean)/std), atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(imagenet_stats.eigvec.T @ imagenet_stats.eigvec, np.eye(3), atol=1e-3)   # the published axes are at right angles


@pytest.mark.parametrize('arch, net_args, kin', [('resnet18', {}, 'same'), ('resnet50', {}, 'strides'), ('resnet50', dict(stride_at='3x3'), 'same'),
                                                 ('resnet34', dict(shortcut='A'), 'none'), ('cifar_resnet20', {}, 'none')])
def test_what_torchvision_has(arch, net_args, kin):
    assert torchvision_kin(arch, net_args) == kin


@pytest.mark.parametrize('at, same', [('3x3', True), ('1x1', False)])
def test_strides_in_another_place_give_other_answers(theirs, at, same):
    ours = build_net('resnet50', 10, stride_at=at).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(): assert torch.allclose(ours(x), theirs(x), rtol=1e-3, atol=1e-4) == same


def test_out_and_in_again(theirs, photos):
    ours, x = from_torchvision(theirs.state_dict(), LABELS), centre_crops(photos, 64, 4)
    for k, v in to_torchvision(ours, std=(.229, .224, .225)).items(): torch.testing.assert_close(v, theirs.state_dict()[k], rtol=1e-6, atol=1e-6)
    again = tvm.resnet50(num_classes=10).eval()
    again.load_state_dict(to_torchvision(ours), strict=True)                   # for pixels that are centred and not divided
    with torch.no_grad(): torch.testing.assert_close(again(T.Normalize((.485, .456, .406), (1, 1, 1))(x)), theirs(normalise(x)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('wrap', [lambda d: d, lambda d: dict(state_dict={f'module.{k}': v for k, v in d.items()}, epoch=3, best_acc1=torch.tensor(7.)),
                                  lambda d: dict(model=d, optimizer=dict(param_groups=[]))], ids=['plain', 'imagenet example', 'reference'])
@pytest.mark.parametrize('suffix', ['.pth', 'legacy.pth', '.safetensors'])
def test_checkpoints_as_people_have_them(wrap, suffix, tmp_path):
    torch.manual_seed(6)
    net, path = lived_in(tvm.resnet18(num_classes=10), torch.randn(8, 3, 32, 32)), tmp_path/f'w{suffix}'
    old = {k: v for k, v in net.state_dict().items() if 'num_batches' not in k}                                   # as before PyTorch 0.4.1
    if suffix == '.safetensors': safetensors.torch.save_file(old, path)
    else: torch.save(wrap(old), path, _use_new_zipfile_serialization='legacy' not in suffix)
    ours, x = from_torchvision(path, LABELS), torch.rand(2, 3, 64, 64)
    with torch.no_grad(): torch.testing.assert_close(ours.net(x - torch.tensor([.485, .456, .406])[:, None, None]), net(normalise(x)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('depth', [18, 34, 50, 101, 152])
def test_the_depth_is_found(depth):
    with torch.device('meta'): shapes = getattr(tvm, f'resnet{depth}')(num_classes=3).state_dict()
    weights = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in shapes.items()}
    assert from_torchvision(weights, {'a': 2}).arch == f'resnet{depth}'


@pytest.mark.parametrize('source, kwargs, says', [
    ('r18', dict(label_encoding={'cat': 10}), 'does not fit in 10 outputs'), ('r18', dict(arch='resnet34'), 'layer1.2.conv1.weight is missing'),
    ('r18', dict(arch='vgg16'), 'it has resnet18'), ('resnext', {}, 'its convolutions have groups'), ({'a': 1}, {}, 'no state dict'),
    (Path('gone.pth'), {}, 'no file or folder'), (Path('photo.jpg'), {}, '.jpg is')])
def test_sources_that_do_not_fit(source, kwargs, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new('RGB', (40, 30)).save('photo.jpg')
    nets = dict(r18=tvm.resnet18, resnext=tvm.resnext50_32x4d)
    if source in ('r18', 'resnext'): source = nets[source](num_classes=10).state_dict()
    with pytest.raises(DataError, match=re.escape(says)): from_torchvision(source, **(dict(label_encoding=LABELS) | kwargs))


def test_weights_for_torchvision_as_a_file(tmp_path):
    ours = from_torchvision(tvm.resnet18(num_classes=10).state_dict(), LABELS)
    back = to_torchvision(ours, tmp_path/'back.pth')
    found = torch.load(tmp_path/'back.pth', weights_only=True)
    assert list(found) == list(back) and all(torch.equal(found[k], v) for k, v in back.items())
    with pytest.raises(DataError, match='overwrite=True'): to_torchvision(ours, tmp_path/'back.pth')


class Bomb:
    def __reduce__(self): return os.mkdir, ('exploded',)


def test_checkpoints_that_are_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = tvm.resnet18(num_classes=10).state_dict()
    torch.save(small, tmp_path/'w.pth')
    whole = (tmp_path/'w.pth').read_bytes()
    cut, flipped = whole[:len(whole)//2], whole[:len(whole)//2] + bytes([whole[len(whole)//2] ^ 255]) + whole[len(whole)//2 + 1:]
    for name, data in {'cut.pth': cut, 'flip.pth': flipped, 'none.pth': b'', 'text.pth': b'hello', 'bomb.pth': pickle.dumps(dict(a=Bomb())),
                       'cut.safetensors': cut, 'list.pth': None}.items():
        if data is None: torch.save([1, 2], tmp_path/name)
        else: (tmp_path/name).write_bytes(data)
        with pytest.raises(DataError, match=re.escape(name)) as e: from_torchvision(tmp_path/name, LABELS)
        assert '\n' not in str(e.value)
    assert not (tmp_path/'exploded').exists()
    for bad, says in [({**small, 'fc.weight': small['fc.weight'][:5]}, 'fc.weight'), ({**small, 'fc.bias': small['fc.bias']*float('nan')}, 'no number'),
                      ({k: v for k, v in small.items() if k != 'conv1.weight'}, 'conv1.weight is missing'), ({}, 'no state dict'), ({1: small}, 'no state dict'),
                      ({**small, 'extra': torch.zeros(1)}, 'extra has no place'), ({**small, 'fc.bias': torch.tensor(3.)}, 'fc.')]:
        with pytest.raises(DataError, match=says): from_torchvision(bad, LABELS)


@pytest.mark.parametrize('arch,net_args,says', [('resnet50', {}, "stride_at='3x3'"), ('resnet18', dict(shortcut='A'), 'no such'), ('resnet34', dict(shortcut='C'), 'no such'),
                                                ('plain18', {}, 'no such'), ('cifar_resnet8', {}, 'no such')])
def test_what_torchvision_has_not(arch, net_args, says):
    with torch.device('meta'): model = made()._replace(net=build_net(arch, 10, **net_args), arch=arch, net_args=net_args)
    with pytest.raises(DataError, match=says): to_torchvision(model)


# ── Through the public face ──────────────────────────────────────────────────────────────────────────────────────────────────

def test_from_training_to_a_folder_and_back(drawn, tmp_path):
    model = ResNet(*drawn, size=32, arch='resnet18', bs=8, num_workers=0)
    model.fit(1)
    photo = drawn.data_path/'test'/'test_00000.jpg'
    loaded = ResNet.load(model.save(tmp_path/'m'), device=next(model.net.parameters()).device)
    np.testing.assert_allclose(loaded.predict(photo, precision='fp32'), model.predict(photo, precision='fp32'), atol=1e-5)
    assert loaded.trained.training['photos'] == dict(train=16, val=8, test=4)
    assert np.array_equal(loaded.predict(drawn.data_path/'test'), loaded.predict(list_photos(drawn.data_path/'test')))
    given = ResNet.from_torchvision(model.to_torchvision(), drawn.label_encoding, stats=model.stats, std=(1, 1, 1), size=32, device='cpu')
    np.testing.assert_allclose(given.predict(photo, precision='fp32'), model.predict(photo, precision='fp32'), atol=1e-5)
