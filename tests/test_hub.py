"A saved folder as a repository of Hugging Face's hub: its card by the hub's own reader, and its way back from a stand-in for the hub."
import json

import numpy as np
import pandas as pd
import pytest
import torch

from resnet_fastai.augment import ColorStats
from resnet_fastai.core import ResNet
from resnet_fastai.data import LabelMap
from resnet_fastai.engine import weight_sources
from resnet_fastai.engine.files import DataError
from resnet_fastai.engine.weight_sources import model_folder, read_weights
from resnet_fastai.model import build_net
from resnet_fastai.practice.hub_card import front_matter
from resnet_fastai.practice.share import Trained, load_model, save_model
from test_weights import COMMIT, folder_files, hub, server  # noqa: F401  fixtures

FILES = {'README.md', 'config.json', 'model.safetensors'}
LABELS = {'`<b>`\n--- # x': 9, 'crème|brûlée: yes': 0, "it's": 2}


def made(seed=0, training=None, **history):
    torch.manual_seed(seed)
    stats = ColorStats([.5, .4, .3], [.1, .02, .003], np.eye(3), 99)
    training = dict(photos=dict(train=7, val=2), epochs=len(history.get('epoch', ()))) if training is None else training
    return Trained(build_net('cifar_resnet8', 10).eval(), 'cifar_resnet8', {}, LabelMap({}, LABELS), stats, 32, pd.DataFrame(history), training)


def card_of(model, folder):
    "The card as the hub's own library reads it"
    hf = pytest.importorskip('huggingface_hub')
    return hf.ModelCard.load(save_model(model, folder)/'README.md', ignore_metadata_errors=False)


# ── The card ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_the_hubs_own_library_reads_the_card(tmp_path):
    card = card_of(made(epoch=[0, 1], top1_error=[.5, .25], top5_error=[.1, .125]), tmp_path/'m')
    d = card.data
    assert (d.library_name, d.pipeline_tag, d.metrics, d.license, d.base_model) == ('resnet_fastai', 'image-classification', ['accuracy'], None, None)
    assert {'image-classification', 'resnet'} <= {*d.tags} and d.model_name == 'cifar_resnet8, 3 labels'
    found = {r.metric_type: (r.task_type, r.dataset_split, r.metric_value) for r in d.eval_results}
    assert found == {'accuracy': ('image-classification', 'validation', .75), 'top-5-accuracy': ('image-classification', 'validation', .875)}
    assert card.text.lstrip().startswith('# ')                                    # people see the same card as before
    from huggingface_hub import metadata_load
    assert metadata_load(tmp_path/'m'/'README.md') == d.to_dict()


@pytest.mark.parametrize('training,right', [(dict(restored_epoch=1), .9), ({}, .7), (dict(restored_epoch=7), .7)])
def test_the_accuracy_is_that_of_the_weights_that_are_saved(training, right, tmp_path):
    model = made(training=training, epoch=[0, 1, 2], top1_error=[.5, .1, .3])
    assert [r.metric_value for r in card_of(model, tmp_path/'m').data.eval_results] == [right]


@pytest.mark.parametrize('history', [{}, dict(epoch=[0], top1_error=[float('nan')]), dict(epoch=[0], valid_loss=[1.])])
def test_no_accuracy_is_told_where_none_was_measured(history, tmp_path):
    d = card_of(made(**history), tmp_path/'m').data
    assert d.eval_results is None and d.metrics is None


def weights(**kwargs): return dict(dict(origin='x.pth', sha256='0', licence='unknown', scaling='the caller'), **kwargs)


@pytest.mark.parametrize('training,licence,base', [
    (dict(weights=weights(licence='MIT', origin='Hugging Face timm/resnet50.a1_in1k, revision c0ffee')), 'mit', 'timm/resnet50.a1_in1k'),
    (dict(weights=weights(licence='MIT'), epochs=3), None, None),                 # a new model; its licence is its owner's to choose
    (dict(weights=weights(licence="BSD-3-Clause (torchvision); ImageNet's terms may apply")), None, None),
    (dict(weights=weights()), None, None), ({}, None, None)])
def test_a_licence_is_told_only_where_it_is_known(training, licence, base, tmp_path):
    d = card_of(made(training=training), tmp_path/'m').data
    assert (d.license, d.base_model) == (licence, base)


def test_nothing_of_a_label_gets_into_the_metadata():
    "Labels are anybody's text"
    c = dict(arch='resnet18', encoding=LABELS, history={}, training={})
    assert front_matter(c) == front_matter(c | dict(encoding=dict(a=1, b=2, c=3)))


# ── From the hub ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

def same(a, b): return all(torch.equal(v, b.net.state_dict()[k]) for k, v in a.net.state_dict().items()) and a.labels.encoding == b.labels.encoding


def test_a_saved_folder_comes_back_from_the_hub(hub, server, tmp_path):  # noqa: F811
    "By load and as weights; only config.json and model.safetensors are fetched, once"
    model = made(epoch=[0], top1_error=[.5])
    files = folder_files(save_model(model, tmp_path/'m'))
    assert {*files} == FILES
    hub('user/flowers', files | {'predict.py': b'raise SystemExit', 'pytorch_model.bin': b'no'})
    found = ResNet.load('hf:user/flowers')
    assert same(found, model) and len(found.history) == 1
    assert {path.rpartition('/')[2] for _, path in server.asked if path.startswith('/user/flowers/')} == {'config.json', 'model.safetensors'}
    found = read_weights('hf:user/flowers')
    assert found.labels == LABELS and torch.equal(found.state['fc.weight'], model.net.fc.weight)
    assert 'user/flowers' in found.origin and COMMIT[:12] in found.origin


def test_a_revision_is_the_one_that_was_asked_for(hub, server, tmp_path):  # noqa: F811
    first, second = made(1), made(2)
    for rev, model in ('v1', first), ('main', second):
        for name, data in folder_files(save_model(model, tmp_path/rev)).items():
            server(f'/user/pinned/resolve/{rev}/{name}', data, X_Repo_Commit=rev[-1]*40, ETag=f'"{rev}{name}"')
    assert same(ResNet.load('hf:user/pinned@v1'), first) and same(ResNet.load('hf:user/pinned'), second)


@pytest.mark.parametrize('case', ['half', 'damaged', 'changed', 'other', 'nothing', 'login page'])
def test_what_the_hub_may_send_instead(case, hub, server, tmp_path):  # noqa: F811
    files, repo = folder_files(save_model(made(), tmp_path/'m')), f'user/{case.replace(" ", "-")}'
    config = json.loads(files['config.json'])
    says = {'half': repo, 'damaged': 'damaged|SHA-256|not the file', 'changed': 'has been changed', 'other': 'no model that this project saved', 'nothing': repo,
            'login page': 'not JSON'}[case]
    if case == 'changed': files['config.json'] = json.dumps(config | dict(size=64)).encode()
    if case == 'other': files['config.json'] = json.dumps(dict(architecture='resnet18')).encode()
    if case == 'login page': files = dict.fromkeys(files, b'<!doctype html><title>log in</title>')
    if case != 'nothing': hub(repo, files, cut=1000 if case == 'half' else None)
    if case == 'damaged':
        path = f'/{repo}/resolve/main/model.safetensors'
        body, headers, _ = server.content[path]
        server.content[path] = body[:-1] + bytes([body[-1] ^ 1]), headers, None
    with pytest.raises(DataError, match=says) as e: load_model(f'hf:{repo}')
    assert '\n' not in str(e.value) and len(str(e.value)) < 700
    if case == 'other': assert not any(repo in path and 'safetensors' in path for _, path in server.asked)


def test_a_folder_is_a_folder(tmp_path, monkeypatch):
    "Nobody is asked about a name without hf:, nor without huggingface_hub"
    for name in ('user/name', str(tmp_path), tmp_path/'hf'): assert str(model_folder(name)) == str(name)
    monkeypatch.setattr(weight_sources, 'find_spec', lambda name: None)
    with pytest.raises(DataError, match=r'pip install "resnet_fastai\[hub\]"'): load_model('hf:user/name')


def test_a_licence_that_the_owner_wrote_is_told_to_those_who_start_from_it(tmp_path):
    folder = save_model(made(), tmp_path/'m')
    text = (folder/'README.md').read_text(encoding='utf-8')
    (folder/'README.md').write_text(text.replace('---\n', '---\nlicense: cc-by-4.0\n', 1), encoding='utf-8')
    assert read_weights(folder).licence == 'cc-by-4.0' and same(load_model(folder), made())
