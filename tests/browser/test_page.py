"The page of `resnet-fastai app` as a visitor meets it: dropped photos, answers, heat, crops, the table; on a phone; and nothing asks another host."
import csv
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from patience import until, used

pytest.importorskip('gradio', reason="needs Gradio: pip install -e '.[app]'")

# Writes down each address that the server itself asks, other than this machine's
watched = '''
import os, sys
def asked(event, args):
    other = event == 'socket.connect' and isinstance(args[1], tuple) and args[1][0] not in ('127.0.0.1', '::1')
    named = event == 'socket.getaddrinfo' and str(args[0]) not in ('127.0.0.1', 'localhost', 'None')
    if other or named: os.write(fd, f'{event} {args}\\n'.encode())
fd = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_CREAT)
sys.addaudithook(asked)
import torch
torch.set_num_threads(1)
from resnet_fastai.practice.cli import main
main()
'''


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    "A saved model that knows the drawn textures by name, and was never trained"
    from resnet_fastai.augment import ColorStats
    from resnet_fastai.core import ResNet
    from resnet_fastai.data import LabelMap
    from resnet_fastai.engine.demo_photos import _textures
    from resnet_fastai.model import build_net
    from resnet_fastai.practice.share import Trained
    torch.manual_seed(0)
    net = build_net('cifar_resnet8', 8)
    with torch.no_grad():
        net.train()(torch.randn(16, 3, 32, 32)*.3)
        net.eval().fc.weight *= 4
    labels, stats = LabelMap({}, {name: i for i, name in enumerate(_textures)}), ColorStats([.5]*3, [.1, .02, .003], np.eye(3), 9)
    t = Trained(net, 'cifar_resnet8', {}, labels, stats, 32, pd.DataFrame(dict(epoch=[0], top1_error=[.5])), {})
    model = ResNet._from(t, 'cpu')
    model.folder = model.save(tmp_path_factory.mktemp('app')/'model')
    return model


@pytest.fixture(scope='module')
def served(browser, model, tmp_path_factory):
    "The page's address; at the end Ctrl-C, and nothing is left: no uploaded photo, and no request to another host"
    tmp = tmp_path_factory.mktemp('served')
    env = os.environ | dict(TMPDIR=str(tmp), PYTHONWARNINGS='ignore', MPLBACKEND='Agg')
    cmd = [sys.executable, '-c', watched, str(tmp/'asked'), 'app', str(model.folder), '--port', '0', '--max-photos', '4', '--max-mb', '1', '--json']
    log = open(tmp/'log', 'w')
    server = subprocess.Popen(cmd, stdout=subprocess.PIPE, stderr=log, env=env, text=True)
    said = ''
    while not said.endswith('}\n'):
        line = server.stdout.readline()
        assert line, (tmp/'log').read_text()[-2000:]
        said += line
    yield json.loads(said)['url']
    assert [p for p in tmp.iterdir() if p.name.startswith('resnet-fastai-app-')]
    server.send_signal(signal.SIGINT)
    until(lambda: server.poll() is not None, lambda: used(server.pid))
    log.close()
    assert server.returncode == 130 and (tmp/'log').read_text().splitlines()[-1] == 'stopped', (tmp/'log').read_text()[-2000:]
    assert [p.name for p in tmp.iterdir() if p.name.startswith('resnet-fastai-app-')] == []
    assert (tmp/'asked').read_text() == ''


def drop(v, *files): v.page.locator('#drop input[type=file]').set_input_files(list(files))


def test_photos_are_dropped_and_named(visit, served, model, tmp_path):
    "What the page says is what `predict_n` says; several photos have an overview and a table; what is no photo is a sentence"
    from resnet_fastai.data import demo_data
    photos = sorted((demo_data(tmp_path/'drawn', sizes=dict(test=3)).data_path/'test').iterdir())
    v = visit()
    v.page.goto(served)
    v.page.locator('#verdict h2', has_text='Drop a photo').wait_for()
    assert 'stripes, checks, dots' in v.page.inner_text('header.rf-head')
    v.shot('first')
    drop(v, photos[0])
    (label, p), *_ = best = model.predict_n(photos[0], 5)
    v.page.locator('#verdict h2', has_text=f'{label} {p:.1%}').wait_for()
    rows = v.page.locator('#verdict tr').all_inner_texts()
    assert [re.split(r'\s+', row.strip())[0] for row in rows] == [name for name, _ in best]
    v.page.locator('#votes img').nth(49).wait_for()
    assert v.page.locator('#votes img').count() == 50 and '50 crops' in v.page.inner_text('#votes')
    assert v.page.eval_on_selector('#heat img', 'i => i.decode().then(() => i.naturalWidth)') >= 72
    v.shot('one', full_page=True)

    (bad := tmp_path/'bad.jpg').write_text('hello')
    drop(v, photos[1], photos[2], bad)
    v.page.locator('#many button').nth(2).wait_for()
    with v.page.expect_download() as got: v.page.locator('#csv').click()
    table = list(csv.reader(Path(got.value.path()).read_text(encoding='utf-8').splitlines()))
    assert [r[0] for r in table] == ['id', photos[1].name, photos[2].name, 'bad.jpg']
    assert [r[1] for r in table[1:3]] == [model.predict_n(f, 1)[0][0] for f in photos[1:]]
    v.page.locator('#many button').nth(1).click()
    v.page.locator('#verdict figcaption', has_text=photos[2].name).wait_for()
    v.shot('many', full_page=True)
    v.page.locator('#many button').nth(2).click()
    v.page.locator('#verdict', has_text="'bad.jpg' cannot be read as a photo").wait_for()


def test_a_phone_and_limits(visit, served, tmp_path):
    "An example is a tap away; nothing scrolls sideways; too many and too large photos are sentences"
    v = visit(390, 844, is_mobile=True, has_touch=True)
    v.page.goto(served)
    for i in (2, 0, 1): v.page.locator('#examples button').nth(i).tap()           # impatient: the last one counts
    v.page.locator('#verdict figcaption', has_text='checks.png').wait_for()
    v.page.locator('#votes img').nth(49).wait_for()
    assert v.page.evaluate('document.documentElement.scrollWidth') <= 390
    v.shot('example', full_page=True)
    files = [tmp_path/f'{i}.png' for i in range(5)]
    for f in files: f.write_bytes(b'x')
    drop(v, *files)
    v.page.locator('#verdict', has_text='this page takes 4 at a time').wait_for()
    (tmp_path/'large.png').write_bytes(b'\0'*(1 << 21))
    drop(v, tmp_path/'large.png')
    v.page.locator('#verdict', has_text="'large.png' is larger than 1 MB").wait_for()
    with open(tmp_path/'film.png', 'wb') as f: f.truncate((8 << 20) + 1)
    drop(v, tmp_path/'film.png', files[0])
    v.page.locator('#verdict', has_text="'film.png': larger than 8 MB, far more than a photo").wait_for()
    assert 'Error' not in v.page.inner_text('body')
    v.shot('too-large')
    drop(v, tmp_path/'film.png')                                                  # the same again is said again
    drop(v, files[0])
    v.page.locator('#verdict', has_text="'0.png' cannot be read as a photo").wait_for()


def test_another_name_for_this_machine_is_refused(served):
    "A page elsewhere whose name leads to 127.0.0.1 reads nothing here, and the browser is told to ask no other host"
    page = urllib.request.urlopen(served)
    assert "connect-src 'self'" in page.headers['Content-Security-Policy'] and page.headers['Referrer-Policy'] == 'no-referrer'
    with pytest.raises(urllib.error.HTTPError, match='400'): urllib.request.urlopen(urllib.request.Request(served, headers=dict(Host='elsewhere.example')))
