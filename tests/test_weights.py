"""Weights from elsewhere: the same logits as in the library that they come from; nothing but sentences for what does not fit.

    python tests/test_weights.py                                        # the largest difference of the logits, source by source
    python tests/test_weights.py nbs/experiments/results/logits.json    # and keep them"""
import argparse
import copy
import hashlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
import threading
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision.models as tvm

from resnet_fastai.engine.files import DataError
from resnet_fastai.engine import weight_sources
from resnet_fastai.engine.weight_sources import read_weights
from resnet_fastai.engine.weights import agreeing_rows, imagenet_labels, load_into, read_tensors
from resnet_fastai.model import build_net

DEPTHS = 18, 34, 50, 101, 152
MEAN, STD = torch.tensor([.485, .456, .406])[:, None, None], torch.tensor([.229, .224, .225])[:, None, None]


def lived_in(net, size=32, seed=0):
    "BN statistics and affine weights as after some training, so that an exchange of layers would show"
    torch.manual_seed(seed)
    bns = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for bn in bns:
        bn.momentum = 1.
        torch.nn.init.uniform_(bn.weight, .5, 1.5); torch.nn.init.uniform_(bn.bias, -.2, .2)
    with torch.no_grad():
        net.train()(torch.randn(4, 3, size, size))
        for bn in bns: bn.running_var.copy_(bn.running_var.mean()*torch.empty_like(bn.running_var).uniform_(.5, 1.5))
    return net.eval()


@lru_cache(maxsize=2)
def of_torchvision(depth, n=10): return lived_in(getattr(tvm, f'resnet{depth}')(num_classes=n))


@lru_cache(maxsize=2)
def of_timm(depth, n=10):
    timm = pytest.importorskip('timm')
    return lived_in(timm.create_model(f'resnet{depth}', num_classes=n))


def of_transformers(depth, n=10, **config):
    transformers = pytest.importorskip('transformers')
    layers = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3], 50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}[depth]
    config = dict(depths=layers, layer_type='basic' if depth < 50 else 'bottleneck', hidden_sizes=[c*(1 if depth < 50 else 4) for c in (64, 128, 256, 512)],
                  num_labels=n) | config
    return lived_in(transformers.ResNetForImageClassification(transformers.ResNetConfig(**config)))


LIBRARIES = dict(torchvision=of_torchvision, timm=of_timm, transformers=of_transformers)


def logits(net, x):
    with torch.no_grad(): out = net(x)
    return getattr(out, 'logits', out)


def ours_of(weights, seed=7):
    "The network that starts from these weights, with their own head"
    torch.manual_seed(seed)
    net = build_net(weights.arch, weights.n_out, **weights.net_args)
    load_into(net, weights, {})
    net.load_state_dict(weights.state)
    return net.eval()


def difference(theirs, weights, mean=MEAN, std=STD, size=48):
    "Largest difference of the logits on photos in [0,1], and their spread"
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    a, b = logits(theirs, (x - mean)/std), logits(ours_of(weights), x - torch.tensor(weights.mean)[:, None, None])
    return float((a - b).abs().max()), float(a.std())


def agree(theirs, weights, **kwargs):
    diff, spread = difference(theirs, weights, **kwargs)
    assert spread > .05 and diff < 2e-5*spread, (diff, spread)


# ── Layouts ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize('depth', DEPTHS)
@pytest.mark.parametrize('library', LIBRARIES)
def test_the_logits_are_those_of_the_library_that_the_weights_come_from(library, depth):
    theirs = LIBRARIES[library](depth)
    found = read_weights(theirs.state_dict())
    assert (found.arch, found.n_out) == (f'resnet{depth}', 10) and found.net_args == ({} if depth < 50 else dict(stride_at='3x3'))
    agree(theirs, found)


def test_transformers_strides_of_the_paper(tmp_path):
    "downsample_in_bottleneck: the stride is in the first 1×1, as in the authors' models; read without config.json the answers would be others"
    theirs = of_transformers(50, downsample_in_bottleneck=True)
    theirs.save_pretrained(tmp_path)
    found = read_weights(tmp_path)
    assert found.net_args == dict(stride_at='1x1')
    agree(theirs, found)
    with pytest.raises(AssertionError): agree(theirs, read_weights(theirs.state_dict()))


old = lambda d: {k: v for k, v in d.items() if 'num_batches' not in k}
WRAPS = {'bare': dict, 'no counters': old, 'half': lambda d: {k: v.half() if v.is_floating_point() else v for k, v in d.items()},
         'state_dict': lambda d: dict(state_dict=d, epoch=3), 'model': lambda d: dict(model=d, opt={}), 'model_state_dict': lambda d: dict(model_state_dict=d),
         'two deep': lambda d: dict(model=dict(state_dict=d)), 'DataParallel': lambda d: {f'module.{k}': v for k, v in d.items()},
         'Lightning': lambda d: dict(state_dict={f'model.{k}': v for k, v in d.items()}, hyper_parameters={'lr': .1}),
         'compiled, parallel': lambda d: dict(model={f'module._orig_mod.{k}': v for k, v in d.items()}),
         "a training script's options": lambda d: dict(model=d, args=argparse.Namespace(lr=.1, model='resnet18'), best_acc=70.1)}


@pytest.mark.parametrize('suffix', ['.pth', '.legacy.pth', '.safetensors', None])
@pytest.mark.parametrize('wrap', WRAPS)
def test_checkpoints_as_people_have_them(wrap, suffix, tmp_path):
    theirs = of_torchvision(18)
    made = WRAPS[wrap](theirs.state_dict())
    source = tmp_path/f'w{suffix}'
    if suffix is None: source = made
    elif suffix == '.safetensors':
        if not all(torch.is_tensor(v) for v in made.values()): pytest.skip('a .safetensors file has no nesting')
        safetensors.torch.save_file({k: v.contiguous() for k, v in made.items()}, source)
    else: torch.save(made, source, _use_new_zipfile_serialization='legacy' not in suffix)
    found = read_weights(source)
    if wrap != 'half': agree(theirs, found)
    else:
        theirs = copy.deepcopy(theirs)
        theirs.load_state_dict({k: v.half() if v.is_floating_point() else v for k, v in theirs.state_dict().items()})
        agree(theirs, found)
    if suffix: assert found.sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    assert all(v.dtype in (torch.float32, torch.int64) for v in found.state.values())


def test_weights_without_a_head():
    transformers = pytest.importorskip('transformers')
    config = transformers.ResNetConfig(depths=[2, 2, 2, 2], layer_type='basic', hidden_sizes=[64, 128, 256, 512])
    theirs = lived_in(transformers.ResNetModel(config))
    found = read_weights(theirs.state_dict())
    net = build_net('resnet18', 4)
    assert found.n_out is None and load_into(net, found, dict(a=0)) == 0
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad(): torch.testing.assert_close(net.eval()[:9](x), theirs(x/STD).pooler_output, rtol=1e-4, atol=1e-4)


def test_a_given_scaling_is_used_and_said():
    theirs, mean, std = of_torchvision(18), (.1, .2, .3), (1., .5, .25)
    found = read_weights(theirs.state_dict(), mean=mean, std=std)
    agree(theirs, found, mean=torch.tensor(mean)[:, None, None], std=torch.tensor(std)[:, None, None])
    assert found.facts()['scaling'] == 'the caller' and 'assumed' in read_weights(theirs.state_dict()).facts()['scaling']
    for bad in [dict(mean=(1, 2)), dict(std=(1, 0, 1)), dict(std=(1, 1, float('nan'))), dict(mean='abc')]:
        with pytest.raises(DataError, match='three numbers are needed'): read_weights(theirs.state_dict(), **bad)


# ── Folders ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def timm_folder(folder, net, arch='resnet18', **cfg):
    "As timm's save_for_hf lays it out"
    folder.mkdir(parents=True, exist_ok=True)
    cfg = dict(tag='a1_in1k', mean=[.5, .4, .3], std=[.2, .3, .25], input_size=[3, 160, 160], num_classes=10, license='apache-2.0') | cfg
    (folder/'config.json').write_text(json.dumps(dict(architecture=arch, num_classes=10, pretrained_cfg=cfg)))
    safetensors.torch.save_file(net.state_dict(), folder/'model.safetensors')
    return folder


def test_a_folder_of_timm(tmp_path):
    theirs = of_timm(18)
    folder = timm_folder(tmp_path/'t', theirs, label_names=[f'kind {i}' for i in range(10)])
    (folder/'README.md').write_text('---\ntags:\n- timm\nlicense: mit\n---\n# a model\nlicense: not this\n')
    for found in (read_weights(folder), read_weights(folder/'model.safetensors')):
        agree(theirs, found, mean=torch.tensor([.5, .4, .3])[:, None, None], std=torch.tensor([.2, .3, .25])[:, None, None])
        assert (found.size, found.licence, found.labels['kind 3'], found.scaling) == (160, 'mit', 3, 'its configuration')


def test_timm_itself_writes_such_a_folder(tmp_path):
    "What timm's own writer makes is understood"
    timm, hub = pytest.importorskip('timm'), pytest.importorskip('timm.models._hub')
    theirs = lived_in(timm.create_model('resnet18', num_classes=10))
    hub.save_for_hf(theirs, tmp_path, model_config=dict(license='bsd-3-clause'), safe_serialization=True)
    agree(theirs, read_weights(tmp_path))


def test_a_folder_of_transformers(tmp_path):
    theirs = of_transformers(18, id2label={0: 'tench, Tinca tinca', 1: 'crane', 2: 'crane, bird', **{i: f'LABEL_{i}' for i in range(3, 10)}},
                             label2id={'tench, Tinca tinca': 0})
    theirs.save_pretrained(tmp_path)
    (tmp_path/'preprocessor_config.json').write_text(json.dumps(dict(image_mean=[.5, .5, .5], image_std=[.5, .25, .5], size=dict(shortest_edge=96))))
    found = read_weights(tmp_path)
    agree(theirs, found, mean=torch.full((3, 1, 1), .5), std=torch.tensor([.5, .25, .5])[:, None, None])
    assert found.size == 96 and found.labels == {'tench, Tinca tinca': 0, 'tench': 0, 'crane': 1, 'crane, bird': 2}


# ── What is something else ───────────────────────────────────────────────────────────────────────────────────────────────────

OTHERS = {'resnet50d': 'three 3×3 convolutions', 'resnet26': 'nearest of 5', 'seresnet50': 'attention', 'resnext50_32x4d': 'groups',
          'wide_resnet50_2': 'another width', 'resnet50_gn': 'statistics of batch normalisation', 'resnet26d': 'three 3×3', 'vit_tiny_patch16_224': 'missing',
          'convnext_atto': 'missing'}


@pytest.mark.parametrize('name', OTHERS)
def test_timms_other_networks_are_named(name):
    timm = pytest.importorskip('timm')
    with pytest.raises(DataError, match=OTHERS[name]) as e: read_weights(timm.create_model(name, num_classes=5).state_dict())
    assert '\n' not in str(e.value) and len(str(e.value)) < 400


def test_networks_whose_tensors_look_the_same_are_known_by_their_configuration(tmp_path):
    "timm's resnetaa50 has resnet50's tensors, but smooths before it halves the resolution"
    timm = pytest.importorskip('timm')
    net = timm.create_model('resnetaa50', num_classes=5)
    assert read_weights(net.state_dict()).arch == 'resnet50'                      # this cannot be seen
    with pytest.raises(DataError, match="timm's resnetaa50"): read_weights(timm_folder(tmp_path/'a', net, 'resnetaa50'))
    safetensors.torch.save_file(net.state_dict(), tmp_path/'resnetaa50.a1h_in1k.safetensors')
    with pytest.raises(DataError, match='smooths'): read_weights(tmp_path/'resnetaa50.a1h_in1k.safetensors')


def test_a_vision_learner_of_fastai_is_named():
    from fastai.vision.learner import create_vision_model
    with pytest.raises(DataError, match='vision_learner'): read_weights(create_vision_model(tvm.resnet18, 5, pretrained=False).state_dict())


class Bomb:
    def __reduce__(self): return os.mkdir, ('exploded',)


def broken_files(tmp_path):
    small = tvm.resnet18(num_classes=10).state_dict()
    torch.save(small, tmp_path/'w.pth')
    whole = (tmp_path/'w.pth').read_bytes()
    cut, flipped = whole[:len(whole)//2], whole[:len(whole)//2] + bytes([whole[len(whole)//2] ^ 255]) + whole[len(whole)//2 + 1:]
    torch.save([1, 2], out := io.BytesIO())
    return {'cut.pth': cut, 'flip.pth': flipped, 'none.pth': b'', 'text.pth': b'hello', 'bomb.pth': pickle.dumps(dict(a=Bomb())), 'cut.safetensors': cut,
            'list.pth': out.getvalue(), 'page.pth': b'<!doctype html><title>log in</title>', 'none.safetensors': b''}


def test_files_that_are_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, data in broken_files(tmp_path).items():
        (tmp_path/name).write_bytes(data)
        with pytest.raises(DataError, match=re.escape(name)) as e: read_weights(tmp_path/name)
        assert '\n' not in str(e.value)
    torch.save(dict(model={'conv1.weight': torch.zeros(1)}, more=Bomb()), tmp_path/'hidden.pth')
    with pytest.raises(DataError, match='more than tensors'): read_weights(tmp_path/'hidden.pth')
    assert not (tmp_path/'exploded').exists()


def test_options_in_a_checkpoint_run_nothing(tmp_path, monkeypatch):
    "argparse.Namespace is let through; what it holds is held to the same rules"
    monkeypatch.chdir(tmp_path)
    torch.save(dict(args=argparse.Namespace(a=Bomb()), model=tvm.resnet18().state_dict()), 'b.pth')
    with pytest.raises(DataError, match='more than tensors'): read_weights('b.pth')
    assert not Path('exploded').exists()
    torch.save(argparse.Namespace(a=1), 'c.pth')
    assert read_tensors('c.pth').a == 1
    with pytest.raises(pickle.UnpicklingError): torch.load('c.pth', weights_only=True)      # and only while a file is read here


def test_what_no_weights_are():
    small = tvm.resnet18(num_classes=10).state_dict()
    for bad, says in [({**small, 'fc.weight': small['fc.weight'][:5]}, 'fc.weight'), ({**small, 'fc.bias': small['fc.bias']*float('nan')}, 'no number'),
                      ({k: v for k, v in small.items() if k != 'conv1.weight'}, 'conv1.weight is missing'), ({}, 'no state dict'), ({1: small}, 'no state dict'),
                      ({**small, 'extra': torch.zeros(1)}, 'extra has no place'), ({**small, 'fc.bias': torch.tensor(3.)}, 'fc.'),
                      (dict(model=3), 'no state dict'), ({**small, 'conv1.weight': torch.zeros(64, 1, 7, 7)}, '1 channels, not RGB'),
                      (3, 'weights is a int'), (tvm.resnet18(), 'net.state_dict()'), ('imagnet', "no file or folder 'imagnet'"),
                      ('gone.pth', 'no file or folder'), ('some/where/else.pth', 'no file or folder'), (dict(format=1, run={}, ranks=[], model=small), 'checkpoint of a run')]:
        with pytest.raises(DataError, match=re.escape(says)) as e: read_weights(bad)
        assert '\n' not in str(e.value)


def test_another_network_than_the_one_asked_for():
    state = tvm.resnet18(num_classes=3).state_dict()
    with pytest.raises(DataError, match='layer1.2.conv1.weight is missing'): read_weights(state, 'resnet34')
    with pytest.raises(DataError, match="no network 'vgg16'; it has resnet18"): read_weights(state, 'vgg16')
    with pytest.raises(DataError, match='holds a resnet18, not a resnet50'): read_weights(read_weights(state), 'resnet50')


# ── Labels ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_labels_agree_but_for_case_spaces_and_underscores():
    theirs = {'Golden Retriever': 0, 'tabby cat': 1, 'crane': 2, 'Crane': 3, 'black-and-tan coonhound': 4, 'C++': 5, 'C#': 6}
    ours = {'golden_retriever': 10, 'TABBY  CAT': 3, 'crane': 5, 'CRANE': 6, 'black and tan coonhound': 7, 'c': 8, 'dog': 9, '': 11, '!!': 12}
    assert agreeing_rows(theirs, ours) == {10: 0, 3: 1, 5: 2, 7: 4}             # 'CRANE' and 'c' may be one of two
    assert agreeing_rows(theirs, {'a b': 0, 'A_B': 1, 'Tabby_Cat': 2, 'tabby cat': 3}) == {3: 1}


def test_rows_of_the_head_are_kept_where_labels_agree():
    theirs = of_torchvision(18, 1000)
    found = read_weights(theirs.state_dict(), labels={n: i for i, n in enumerate(imagenet_labels())})
    torch.manual_seed(3)
    net = build_net('resnet18', 6)
    drawn = {k: v.clone() for k, v in net.state_dict().items() if k.startswith('fc')}
    assert load_into(net, found, {'Goldfish': 4, 'zebra': 1, 'my cat': 0}) == 2
    for i, row in {4: 1, 1: 340}.items():
        assert torch.equal(net.fc.weight[i], theirs.fc.weight[row]) and torch.equal(net.fc.bias[i], theirs.fc.bias[row])
    for i in (0, 2, 3, 5): assert torch.equal(net.fc.weight[i], drawn['fc.weight'][i]) and torch.equal(net.fc.bias[i], drawn['fc.bias'][i])


# ── torchvision's files, from a server on this machine ───────────────────────────────────────────────────────────────────────

@pytest.fixture(scope='module')
def server():
    "put(path, body, **headers) → URL; HEAD and GET; `asked` counts what was asked for; `cut`: so many bytes arrive"
    class Handler(BaseHTTPRequestHandler):
        def answer(self, body):
            httpd.asked.append((self.command, self.path))
            if self.path not in httpd.content: self.send_response(404); self.send_header('Content-Length', '0'); self.end_headers(); return
            data, headers, cut = httpd.content[self.path]
            start = int(m[1]) if (m := re.match(r'bytes=(\d+)-', self.headers.get('Range') or '')) else 0
            self.send_response(206 if start else 200)
            self.send_header('Content-Length', str(len(data) - start))
            if start: self.send_header('Content-Range', f'bytes {start}-{len(data) - 1}/{len(data)}')
            for k, v in headers.items(): self.send_header(k, v)
            self.end_headers()
            if body: self.wfile.write(data[start:cut])
            self.close_connection = True
        def do_GET(self): self.answer(True)
        def do_HEAD(self): self.answer(False)
        def log_message(self, *_): pass
    httpd = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    httpd.content, httpd.asked = {}, []
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    def put(path, body, cut=None, **headers):
        httpd.content[path] = body, {k.replace('_', '-'): v for k, v in headers.items()}, cut
        return f'http://127.0.0.1:{httpd.server_port}{path}'
    put.asked, put.content, put.port = httpd.asked, httpd.content, httpd.server_port
    yield put
    httpd.shutdown()


@pytest.fixture(scope='module')
def published():
    "A network with ImageNet's 1000 outputs, and its file"
    theirs = of_torchvision(18, 1000)
    torch.save(theirs.state_dict(), out := io.BytesIO())
    return theirs, out.getvalue()


@pytest.fixture
def hosted(server, published, tmp_path, monkeypatch):
    "hosted(body) → the file's place in torch.hub's cache, once a server has it under the name that torchvision gives the right one"
    monkeypatch.setenv('TORCH_HOME', str(tmp_path/'torch'))
    sha = hashlib.sha256(published[1]).hexdigest()
    def host(body=published[1], cut=None):
        url = server(f'/{tmp_path.name}/resnet18-{sha[:8]}.pth', body, cut)
        monkeypatch.setattr(weight_sources, 'torchvision_file', lambda arch, version=None: (url, f'{arch}.{version}'))
        return tmp_path/'torch'/'hub'/'checkpoints'/f'resnet18-{sha[:8]}.pth'
    return host


def test_torchvisions_weights_are_fetched_once_and_checked(hosted, published, server):
    path = hosted()
    found = read_weights('imagenet', 'resnet18')
    agree(published[0], found)
    assert path.read_bytes() == published[1] and found.labels['goldfish'] == 1 and found.size == 224
    assert 'BSD' in found.licence and found.sha256 == hashlib.sha256(published[1]).hexdigest() and '127.0.0.1' in found.origin
    before = len(server.asked)
    agree(published[0], read_weights('ImageNet:v1', 'resnet18'))
    assert len(server.asked) == before
    path.write_bytes(published[1][:-9])                                          # the cached file has been cut short
    with pytest.raises(DataError, match=f'{re.escape(str(path))} is not the file of this name'): read_weights('imagenet', 'resnet18')
    assert path.exists() and len(server.asked) == before


def test_torch_hub_finds_what_was_fetched(hosted, server):
    hosted()
    url, _ = weight_sources.torchvision_file('resnet18')
    read_weights('imagenet', 'resnet18')
    before = len(server.asked)
    assert len(torch.hub.load_state_dict_from_url(url, check_hash=True, weights_only=True)) == 122 and len(server.asked) == before


@pytest.mark.parametrize('case', ['half', 'other file', 'login page', 'not found'])
def test_a_download_that_goes_wrong_leaves_nothing(case, hosted, published, server, tmp_path):
    whole = published[1]
    body, cut, says = {'half': (whole, len(whole)//2, 'broke off|cannot be fetched'), 'other file': (whole[:-1] + b'?', None, 'SHA-256 begins with'),
                       'login page': (b'<!DOCTYPE html><html>please log in</html>', None, 'a web page'), 'not found': (b'', None, 'Not Found')}[case]
    path = hosted(body, cut)
    if case == 'not found': server.content.clear()
    with pytest.raises(DataError, match=says) as e: read_weights('imagenet', 'resnet18')
    said = str(e.value)
    assert '127.0.0.1' in said and str(path) in said and 'Without a network' in said and '\n' not in said
    assert [p for p in (tmp_path/'torch').rglob('*') if p.is_file()] == []
    hosted()
    agree(published[0], read_weights('imagenet', 'resnet18'))                    # the next try is whole


def test_no_network_and_no_place(monkeypatch, tmp_path, hosted):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path/'torch'))
    with monkeypatch.context() as m:
        m.setattr(weight_sources, 'torchvision_file', lambda *_: ('http://127.0.0.1:1/resnet18-00000000.pth', 'x'))
        with pytest.raises(DataError, match=r'127.0.0.1:1/resnet18.*cannot be fetched.*Without a network.*checkpoints/resnet18-00000000.pth'): read_weights('imagenet', 'resnet18')
    (tmp_path/'torch').rename(tmp_path/'t')
    (tmp_path/'torch').write_text('a file')
    hosted()
    with pytest.raises(DataError, match='cannot be written.*TORCH_HOME'): read_weights('imagenet', 'resnet18')


def test_torchvisions_own_list():
    "URLs and names are those that torchvision publishes; there is no v2 of the small ones"
    for depth in DEPTHS:
        url, name = weight_sources.torchvision_file(f'resnet{depth}')
        assert url == tvm.get_model_weights(f'resnet{depth}').DEFAULT.url and name == str(tvm.get_model_weights(f'resnet{depth}').DEFAULT)
    assert weight_sources.torchvision_file('resnet50', 'v1')[0].endswith('resnet50-0676ba61.pth')
    with pytest.raises(DataError, match="no weights 'v2' of resnet18; there is v1"): read_weights('imagenet:v2', 'resnet18')
    with pytest.raises(DataError, match="no network 'cifar_resnet20'"): read_weights('imagenet', 'cifar_resnet20')


def test_a_file_of_torchvisions_is_known_wherever_it_lies(published, tmp_path, monkeypatch):
    sha = hashlib.sha256(published[1]).hexdigest()
    every = tvm.get_model_weights('resnet18')
    class Member:
        name, url = 'IMAGENET1K_V1', f'https://example.org/models/resnet18-{sha[:8]}.pth'
    monkeypatch.setattr(tvm, 'get_model_weights', lambda arch: [Member] if arch == 'resnet18' else every)
    for name, known in [(f'resnet18-{sha[:8]}.pth', True), ('resnet18-0123abcd.pth', False), ('mine.pth', False)]:
        (tmp_path/name).write_bytes(published[1])
        found = read_weights(tmp_path/name)
        assert (found.labels.get('goldfish') == 1) == known and ('torchvision' in found.scaling) == known


# ── Hugging Face's repositories, from a stand-in for the hub ─────────────────────────────────────────────────────────────────

COMMIT = 'c0ffee' + '0'*34


def put_repo(server, repo, files, cut=None):
    "As the hub answers: the commit, and for large files their SHA-256"
    for name, data in files.items():
        sha = hashlib.sha256(data).hexdigest()
        server(f'/{repo}/resolve/main/{name}', data, cut if name.endswith('safetensors') else None, X_Repo_Commit=COMMIT,
               **(dict(ETag=f'"{sha}"', X_Linked_Etag=f'"{sha}"', X_Linked_Size=str(len(data))) if name.endswith('safetensors') else dict(ETag=f'"{sha[:40]}"')))


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    "huggingface_hub asks the stand-in, and caches in a temporary folder"
    constants = pytest.importorskip('huggingface_hub.constants')
    endpoint = f'http://127.0.0.1:{server.port}'
    monkeypatch.setattr(constants, 'ENDPOINT', endpoint)
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', endpoint + '/{repo_id}/resolve/{revision}/{filename}')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path/'hf'))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    return lambda repo, files, **kwargs: put_repo(server, repo, files, **kwargs)


def folder_files(folder): return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_repository_of_timm(hub, server, tmp_path):
    theirs = of_timm(18)
    folder = timm_folder(tmp_path/'t', theirs)
    (folder/'README.md').write_text('---\nlicense: apache-2.0\n---\n')
    hub('timm/resnet18.made_up', folder_files(folder))
    found = read_weights('timm/resnet18.made_up')
    agree(theirs, found, mean=torch.tensor([.5, .4, .3])[:, None, None], std=torch.tensor([.2, .3, .25])[:, None, None])
    assert 'timm/resnet18.made_up' in found.origin and 'c0ffee' in found.origin and found.licence == 'apache-2.0'
    assert found.sha256 == hashlib.sha256((folder/'model.safetensors').read_bytes()).hexdigest()
    blob = next(p for p in (tmp_path/'hf').rglob('*') if p.name == found.sha256)
    data = bytearray(blob.read_bytes()); data[-1] ^= 1; blob.write_bytes(data)
    with pytest.raises(DataError, match='is damaged'): read_weights('timm/resnet18.made_up')


def test_a_repository_of_transformers(hub, tmp_path):
    theirs = of_transformers(50)
    theirs.save_pretrained(tmp_path/'t')
    hub('somebody/resnet-fifty', folder_files(tmp_path/'t'))
    agree(theirs, read_weights('hf:somebody/resnet-fifty@main'))


def test_another_network_is_refused_before_its_weights_are_fetched(hub, server, tmp_path):
    hub('timm/resnet50d.x', {'config.json': json.dumps(dict(architecture='resnet50d')).encode()})
    with pytest.raises(DataError, match="timm's resnet50d"): read_weights('timm/resnet50d.x')
    assert not any('resnet50d' in path and 'safetensors' in path for _, path in server.asked)


@pytest.mark.parametrize('case', ['half', 'other file', 'login page', 'nothing there'])
def test_a_hub_that_goes_wrong(case, hub, server, tmp_path):
    files, repo = folder_files(timm_folder(tmp_path/'t', tvm.resnet18(num_classes=10))), f'user/{case.replace(" ", "-")}'
    if case == 'half': hub(repo, files, cut=1000)
    elif case == 'login page':
        for name in (*files, 'README.md'): server(f'/{repo}/resolve/main/{name}', b'<!doctype html><title>log in</title>', Content_Type='text/html')
    elif case == 'other file':
        hub(repo, files)
        body, headers, _ = server.content[f'/{repo}/resolve/main/model.safetensors']
        server.content[f'/{repo}/resolve/main/model.safetensors'] = body[:-1] + b'?', headers, None
    with pytest.raises(DataError) as e: read_weights(repo)
    assert repo in str(e.value) or 'damaged' in str(e.value)
    assert '\n' not in str(e.value) and len(str(e.value)) < 700


def test_without_a_network_the_cache_is_used_or_a_sentence_says_what_to_do(hub, server, tmp_path):
    "HF_HUB_OFFLINE, in a process of its own, as a user sets it"
    theirs = of_timm(18)
    hub('user/kept', folder_files(timm_folder(tmp_path/'t', theirs)))
    read_weights('user/kept')
    code = ("import sys\nfrom resnet_fastai.engine.weight_sources import read_weights\nfrom resnet_fastai.engine.files import DataError\n"
            "print(read_weights('user/kept').sha256)\ntry: read_weights('user/gone')\nexcept DataError as e: print(e)")
    env = os.environ | dict(HF_HUB_OFFLINE='1', HF_HUB_CACHE=str(tmp_path/'hf'), HF_ENDPOINT='http://127.0.0.1:1')
    before = len(server.asked)
    out = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, check=True).stdout.splitlines()
    assert out[0] == hashlib.sha256((tmp_path/'t'/'model.safetensors').read_bytes()).hexdigest() and len(server.asked) == before
    assert 'Without a network' in out[1] and str(tmp_path/'hf') in out[1] and len(out) == 2


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setattr(weight_sources, 'find_spec', lambda name: None)
    with pytest.raises(DataError, match=r'pip install "resnet_fastai\[hub\]"'): read_weights('timm/resnet50.a1_in1k')


# ── Through the public face ──────────────────────────────────────────────────────────────────────────────────────────────────

SMALL = dict(size=32, num_workers=0, precision='fp32')


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    from resnet_fastai.data import demo_data
    return demo_data(tmp_path_factory.mktemp('small')/'drawn', sizes=dict(train=16, val=8, test=4))


@pytest.fixture
def dense_labels(small, tmp_path):
    "The same labels with the indices 0 to 7"
    path = tmp_path/'encoding.json'
    path.write_text(json.dumps({label: i for i, label in enumerate(sorted(json.loads(small.label_encoding.read_text())))}))
    return small.data_path, small.label_path, path


def test_a_resnet_starts_from_weights(dense_labels):
    from resnet_fastai.core import ResNet
    theirs, scratch = of_torchvision(18, 1000), ResNet(*dense_labels, arch='resnet18', **SMALL)
    model = ResNet(*dense_labels, weights=theirs.state_dict(), **SMALL)
    assert model.arch == 'resnet18' and model.net.fc.out_features == 8            # the largest index and one more; 1000 is for what is drawn anew
    np.testing.assert_allclose(model.stats.mean, [.485, .456, .406])
    np.testing.assert_array_equal(model.stats.eigval, scratch.stats.eigval)      # the lighting stays that of the photos
    assert scratch.net.fc.out_features == 1000 and scratch.learn.accumulate.bs == 256
    x, y = model.learn.dls.valid.one_batch()
    photo = x + torch.tensor([.485, .456, .406])[:, None, None]                   # what the network sees is x/255 - the weights' mean
    assert 0 <= photo.min() and photo.max() <= 1 and (photo*255 - (photo*255).round()).abs().max() < 1e-3
    with torch.no_grad(): a, b = model.net.eval()[:-1](x), torch.nn.Sequential(*list(theirs.children())[:-1])((photo - MEAN)/STD).flatten(1)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4*float(b.std()))


def test_train_and_the_learner_take_weights_too(dense_labels):
    from resnet_fastai.core import train
    from resnet_fastai.data import resnet_dls
    from resnet_fastai.training import resnet_learner
    state = of_torchvision(18).state_dict()
    dls = resnet_dls(*dense_labels, size=32, n_out=None, num_workers=0)
    for learn in (train(*dense_labels, epochs=1, weights=state, lr=0, **SMALL), resnet_learner(dls, weights=state)):
        assert torch.equal(learn.model.layer4[1].conv2.weight, state['layer4.1.conv2.weight']) and learn.spec['arch'] == 'resnet18'
        np.testing.assert_allclose(learn.dls.stats.mean, [.485, .456, .406])


@pytest.mark.parametrize('normalised', [True, False])
def test_loaders_of_fastai_take_the_weights_scaling(normalised, small, tmp_path):
    "With a `Normalize` its division stays there, without one the mean comes into the loaders; either way the network sees what it knows"
    from fastai.vision.all import ImageDataLoaders, Normalize, Resize, imagenet_stats
    from resnet_fastai.training import resnet_learner
    theirs, files = of_torchvision(18), sorted((small.data_path/'train').iterdir())
    labels = [str(i % 2) for i in range(len(files))]
    make = lambda tfms: ImageDataLoaders.from_lists(tmp_path, files, labels, item_tfms=Resize(32), batch_tfms=tfms, bs=4, num_workers=0, device='cpu', valid_pct=.5, seed=1)
    dls, plain = make([Normalize.from_stats(*imagenet_stats, cuda=False)] if normalised else []), make([])
    learn = resnet_learner(dls, weights=theirs.state_dict(), precision='fp32')
    x, raw = dls.valid.one_batch()[0], plain.valid.one_batch()[0]
    with torch.no_grad(): a, b = learn.model.eval()[:-1](x), torch.nn.Sequential(*list(theirs.children())[:-1])((raw - MEAN)/STD).flatten(1)
    torch.testing.assert_close(torch.Tensor(a), torch.Tensor(b), rtol=1e-3, atol=1e-3*float(b.std()))
    if normalised:
        other = make([Normalize.from_stats([.5]*3, [.5]*3, cuda=False)])
        with pytest.raises(DataError, match='use Normalize.from_stats'): resnet_learner(other, weights=theirs.state_dict())


@pytest.mark.parametrize('whose', ['ours', "fastai's"])
def test_weights_leave_the_mean_of_an_earlier_learner_alone(whose, small, dense_labels, tmp_path):
    "Two learners over the same loaders: the second one's mean would change what the first one says"
    from fastai.vision.all import ImageDataLoaders, Resize
    from resnet_fastai.data import resnet_dls
    from resnet_fastai.training import resnet_learner
    files, state = sorted((small.data_path/'train').iterdir()), of_torchvision(18).state_dict()
    labels = [str(i % 2) for i in range(len(files))]
    make = lambda: ImageDataLoaders.from_lists(tmp_path, files, labels, item_tfms=Resize(32), bs=4, num_workers=0, device='cpu', valid_pct=.5)
    dls = make() if whose != 'ours' else resnet_dls(*dense_labels, size=32, n_out=None, num_workers=0)
    first = resnet_learner(dls, 'cifar_resnet8', bs=8)
    x = first.dls.valid.one_batch()[0]
    with pytest.raises(DataError, match='another learner has these loaders already'): resnet_learner(dls, weights=state)
    assert torch.equal(first.dls.valid.one_batch()[0], x)
    dls = make() if whose != 'ours' else resnet_dls(*dense_labels, size=32, n_out=None, num_workers=0)
    for _ in range(2): resnet_learner(dls, weights=state)                     # the same mean: they get along


def test_a_saved_model_goes_on_elsewhere(dense_labels, tmp_path):
    from resnet_fastai.core import ResNet
    model = ResNet(*dense_labels, weights=of_torchvision(18).state_dict(), **SMALL)
    model.fit(1)
    photo = dense_labels[0]/'test'/'test_00000.jpg'
    said = model.predict(photo, precision='fp32')
    folder = model.save(tmp_path/'m')
    loaded = ResNet.load(folder, device='cpu')
    with pytest.raises(DataError, match=r'model.on\(data_path'): loaded.fit(1)
    for again in (loaded.on(*dense_labels[:2], num_workers=0), ResNet(*dense_labels, weights=folder, num_workers=0), ResNet(*dense_labels, weights=model, num_workers=0)):
        assert (again.size, again.arch) == (32, 'resnet18') and 'all of 8' in again.learn.weights['head']
        np.testing.assert_allclose(again.predict(photo, precision='fp32'), said, atol=1e-5)      # all rows are kept: it predicts at once
    other = tmp_path/'other.json'
    other.write_text(json.dumps({'Bricks': 0} | {label: i + 3 for i, label in enumerate(sorted(json.loads(dense_labels[2].read_text())))}))
    moved = loaded.on(*dense_labels[:2], other, num_workers=0)
    assert moved.net.fc.out_features == 11 and torch.equal(moved.net.fc.weight[3:11].cpu(), loaded.net.fc.weight[:8])
    moved.fit(1)
    assert not torch.equal(moved.net.conv1.weight, loaded.net.conv1.weight)      # and the loaded model has not changed
    np.testing.assert_allclose(loaded.predict(photo, precision='fp32'), said, atol=1e-5)


def test_the_card_says_where_the_weights_come_from(dense_labels, hosted, published, tmp_path):
    from resnet_fastai.core import ResNet
    hosted()
    model = ResNet(*dense_labels, arch='resnet18', weights='imagenet', **SMALL)
    model.fit(1)
    folder = model.save(tmp_path/'m')
    card = (folder/'README.md').read_text().replace('&#46;', '.').replace('&#58;', ':')
    assert hashlib.sha256(published[1]).hexdigest() in card and '127.0.0.1' in card and 'BSD' in card and 'keep their row' in card
    assert ResNet.load(folder).trained.training['weights'] == model.learn.weights


def test_what_cannot_start_from_weights(dense_labels):
    from resnet_fastai.core import ResNet
    state = of_torchvision(50).state_dict()
    with pytest.raises(DataError, match="holds a resnet50, not a resnet18|does not hold"): ResNet(*dense_labels, arch='resnet18', weights=state, **SMALL)
    with pytest.raises(DataError, match="trained with stride_at='3x3', not '1x1'"): ResNet(*dense_labels, weights=state, net_args=dict(stride_at='1x1'), **SMALL)
    with pytest.raises(DataError, match='does not fit the network'): ResNet(*dense_labels, weights=of_torchvision(18).state_dict(), net_args=dict(shortcut='A'), **SMALL)


def main(file=None):
    from importlib.metadata import version
    rows = []
    print('source         depth  largest difference  spread of the logits')
    for library, make in LIBRARIES.items():
        for depth in DEPTHS:
            theirs = make(depth)
            diff, spread = difference(theirs, read_weights(theirs.state_dict()))
            rows.append(dict(source=library, version=version(library), depth=depth, difference=diff, spread=spread))
            print(f'{library:<14} {depth:>5}  {diff:>18.1e}  {spread:>20.2f}', flush=True)
    if file: Path(file).write_text(json.dumps(dict(command=f'python tests/test_weights.py {file}', torch=torch.__version__, rows=rows), indent=1) + '\n')


if __name__ == '__main__': main(*sys.argv[1:])
