"Test protocols with scales of their own, and the one that the validation photos choose: the same crops by brute force, kept in the model."
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as T
from PIL import Image, ImageOps

from resnet_fastai.core import ResNet
from resnet_fastai.data import demo_data
from resnet_fastai.engine.files import DataError
from resnet_fastai.inference import crop_boxes, evaluate, predict_probs, protocol_boxes
from resnet_fastai.practice import protocol
from resnet_fastai.practice.protocol import protocol_scales

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def paths(tmp_path_factory): return demo_data(tmp_path_factory.mktemp('protocol')/'drawn', sizes=dict(train=24, val=24, test=8))


@pytest.fixture
def model(paths):
    "A ResNet-18 that has seen two epochs"
    model = ResNet(*paths, arch='resnet18', size=48, bs=8, micro_bs=8, min_side=48, max_side=64, num_workers=0, lr=.01)
    with model.learn.no_bar(), model.learn.no_logging(): model.fit(2)
    return model


def test_a_number_is_no_protocol(model, paths):
    for call in (lambda: model.predict(photo_of(paths), protocol=7), lambda: model.choose_protocol(5), lambda: model.choose_protocol([10, '1crop'])):
        with pytest.raises(DataError, match="must be one of '1crop'"): call()


def photo_of(paths): return sorted((paths.data_path/'test').iterdir())[0]


def by_hand(model, path, crops):
    "The mean of the probabilities of crops that torchvision has cut"
    mean = torch.tensor(model.stats.mean).float()[:, None, None]
    with torch.no_grad(): return model.net.eval()(torch.stack([T.to_tensor(c) for c in crops]) - mean).softmax(1).mean(0).numpy()


# ── Protocols ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize('name,expected', [('1crop', ('1crop', (256,))), ('10crop', ('10crop', (256,))), ('50crop', ('50crop', (224, 256, 384, 480, 640))),
                                           ('dense', ('dense', (224, 256, 384, 480, 640))), ('10crop@224,300', ('10crop', (224, 300))), ('dense@300', ('dense', (300,)))])
def test_names(name, expected): assert protocol_scales(name, 224) == expected


@pytest.mark.parametrize('name', ['7crop', '', '@224', '10crop@', '10crop@100', '10crop@224,', '50crop@224', '10crop@-224', '1crop@1e3', '10crop@99999', '10crop@' + '224,'*10 + '224', None, 3])
def test_what_no_protocol_is(name):
    with pytest.raises(DataError, match="there is no protocol|protocol is '.*'; it must be one of '1crop'"): protocol_scales(name, 224)


def test_the_papers_are_as_they_were():
    for w, h in [(500, 375), (375, 500), (640, 480)]:
        assert protocol_boxes('50crop', w, h) == crop_boxes(w, h) and protocol_boxes('10crop', w, h) == crop_boxes(w, h, scales=(256,))
        assert protocol_boxes('1crop', w, h) == [crop_boxes(w, h, scales=(256,))[4]]
        assert protocol_boxes('1crop@256,384', w, h) == [crop_boxes(w, h, scales=(s,))[4] for s in (256, 384)]


@pytest.mark.parametrize('name', ['1crop@52', '10crop@48,60', 'dense@50,70'])
def test_the_crops_are_torchvisions(name, model, paths):
    path, size = photo_of(paths), 48
    photo, (kind, scales) = Image.open(path).convert('RGB'), protocol_scales(name, size)
    if kind == 'dense':                                                            # every window's own features, one after the other
        trunk, mean = model.net.eval()[:-3], torch.tensor(model.stats.mean).float()[:, None, None]
        found = []
        with torch.no_grad():
            k = trunk(torch.zeros(1, 3, size, size)).shape[-1]
            for s in scales:
                for im in (whole := T.resize(photo, s), ImageOps.mirror(whole)):
                    f = trunk(T.to_tensor(im)[None] - mean)
                    windows = [f[:, :, y:y+k, x:x+k].mean((2, 3)) for y in range(f.shape[2] - k + 1) for x in range(f.shape[3] - k + 1)]
                    found.append(model.net.fc(torch.cat(windows)).softmax(1).mean(0))
        expected = torch.stack(found).mean(0).numpy()
    else:
        cut = (lambda s: [T.center_crop(T.resize(photo, s), size)]) if kind == '1crop' else (lambda s: T.ten_crop(T.resize(photo, s), size))
        expected = by_hand(model, path, [c for s in scales for c in cut(s)])
    np.testing.assert_allclose(model.predict(path, protocol=name, precision='fp32'), expected, atol=2e-4)
    two = predict_probs(model.net, [path, path], model.stats, size, name, precision='fp32')
    np.testing.assert_allclose(two, [expected]*2, atol=2e-4)


# ── The choice ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_the_choice_is_measured_kept_and_used(model, paths, tmp_path):
    photo = photo_of(paths)
    assert model.protocol == '50crop'
    np.testing.assert_array_equal(model.predict(photo), model.predict(photo, protocol='50crop'))      # until somebody asks for a choice
    np.testing.assert_array_equal(model.predict(photo), model.predict(photo, protocol=None))          # as `evaluate` and `predict_folder` take it
    assert model.choose_protocol('1crop').protocol.tolist() == ['1crop'] == [model.protocol]          # a name alone, too
    model.protocol = '50crop'
    found = model.choose_protocol(precision='fp32')
    shown = evaluate(model, 'val', list(found.protocol), precision='fp32')
    assert found.top1_error.tolist() == shown.top1_error.tolist() and found.top1_low.tolist() == shown.top1_low.tolist()
    assert {'1crop', '10crop', '50crop', 'dense'} <= {*found.protocol} | {'1crop'} and found.top1_error.is_monotonic_increasing
    for row in found.head(2).itertuples():                                       # the log loss, photo by photo
        probs = np.stack([model.predict(p, protocol=row.protocol, precision='fp32') for p in model.learn.dls.photos['val']])
        targ = torch.tensor([model.labels.encoding[model.labels(p)] for p in model.learn.dls.photos['val']])
        assert row.log_loss == pytest.approx(float(torch.nn.functional.nll_loss(torch.tensor(probs).log(), targ)), rel=1e-3)
    assert model.protocol == found.protocol[0]
    for name in ('10crop@48,60', 'dense@48', '1crop@48'):                        # whatever is chosen is used
        model.protocol = name
        folder = model.save(tmp_path/name)
        loaded = ResNet.load(folder, device='cpu')
        expected = predict_probs(model.net, photo, model.stats, 48, name, precision='fp32')
        assert loaded.protocol == name
        for m in (model, loaded): np.testing.assert_allclose(m.predict(photo, precision='fp32'), expected, atol=1e-5)
        table = loaded.predict_folder([str(photo)], n=1, precision='fp32')
        label, p = loaded.predict_n(photo, 1, precision='fp32')[0]
        assert table.label_1[0] == label and table.prob_1[0] == pytest.approx(p, abs=1e-4)
        assert evaluate(loaded, 'val', data_path=paths.data_path, label_path=paths.label_path).protocol.tolist() == [name]
        printed = re.search('```python\n(import json.*?)```', (folder/'README.md').read_text(), re.DOTALL)[1]
        (tmp_path/'predict.py').write_text(printed)
        said = subprocess.run([sys.executable, tmp_path/'predict.py', folder, photo], capture_output=True, text=True, check=True).stdout
        for line in said.splitlines():
            p, label = line.split('\t')
            assert float(p) == pytest.approx(expected[model.labels.encoding[label]], abs=2e-3)
        assert 'short side' in (folder/'README.md').read_text()


def test_a_loaded_model_chooses_on_photos_that_it_is_given(model, paths, tmp_path):
    loaded = ResNet.load(model.save(tmp_path/'m'))
    with pytest.raises(DataError, match='pass data_path and label_path'): loaded.choose_protocol()
    found = loaded.choose_protocol(['1crop@48', '10crop@48'], data_path=paths.data_path, label_path=paths.label_path)
    assert loaded.protocol == found.protocol[0] and ResNet.load(loaded.save(tmp_path/'n')).protocol == loaded.protocol
    every = loaded.choose_protocol(data_path=paths.data_path, label_path=paths.label_path)                       # at the scales of its training too
    assert {*every.protocol} == {*model.choose_protocol().protocol} > {'1crop', '10crop', '50crop'}
    with pytest.raises(DataError, match='no protocol'): loaded.choose_protocol([], data_path=paths.data_path, label_path=paths.label_path)


def test_a_saved_protocol_that_cannot_be(model, tmp_path):
    from resnet_fastai.engine.weights import config_sum
    folder = model.save(tmp_path/'m')
    c = json.loads((folder/'config.json').read_text())
    for bad in ('9crop', 3, '10crop@3', None):
        c['protocol'] = bad
        (folder/'config.json').write_text(json.dumps(c | dict(sha256=config_sum(c))))
        with pytest.raises(DataError, match='holds no whole model'): ResNet.load(folder)
    del c['protocol']
    (folder/'config.json').write_text(json.dumps(c | dict(sha256=config_sum(c))))
    assert ResNet.load(folder).protocol == '50crop'                              # as an earlier version saved it


# ── The remark after a fit ───────────────────────────────────────────────────────────────────────────────────────────────────

def fitted(wrong_by_many, wrong_by_one, n=200, seconds=.01, monkeypatch=None):
    "A learner whose two ways to predict err on given photos"
    photos = np.arange(n)
    labels = type('L', (), dict(encoding={i: 0 for i in photos}, __call__=lambda self, p: p))()
    dls = SimpleNamespace(photos=dict(val=photos, train=photos), labels=labels, size=48, after_item=SimpleNamespace(fs=[]), stats=None)
    learn = SimpleNamespace(dls=dls, history=SimpleNamespace(rows=[dict(seconds=seconds)]), logger=print, protocol='50crop')
    def answers(parts, some, wanted, **kwargs):
        for p in some: yield np.array([[p not in wrong, p in wrong] for wrong in (wrong_by_many, wrong_by_one)], float)
    monkeypatch.setattr(protocol, '_answers', answers)
    monkeypatch.setattr(protocol, 'model_parts', lambda learn: None)
    return learn


def test_a_clear_difference_is_said_and_no_other(monkeypatch):
    said = protocol.hint(fitted({*range(80)}, {*range(40)}, monkeypatch=monkeypatch))
    assert '200 validation photos' in said and '40%' in said and '20%' in said and 'choose_protocol()' in said
    assert protocol.hint(fitted({*range(40)}, {*range(80)}, monkeypatch=monkeypatch)) == ''            # the usual way is the better one
    assert protocol.hint(fitted({*range(80)}, {*range(77)}, monkeypatch=monkeypatch)) == ''            # 3 photos are chance
    assert protocol.hint(fitted({*range(80)}, {*range(40)}, n=90, monkeypatch=monkeypatch)) == ''      # too few photos
    assert protocol.hint(fitted({*range(80)}, {*range(40)}, seconds=100, monkeypatch=monkeypatch)) == ''     # it would take long
