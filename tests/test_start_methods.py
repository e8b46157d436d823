"Three ways in which Python starts processes: by copying (Linux up to 3.13), anew (macOS, Windows), from a server (Linux from 3.14 on)."
import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

from resnet_fastai.engine.demo_photos import demo_data

methods = [m for m in ('fork', 'spawn', 'forkserver') if m in multiprocessing.get_all_start_methods()]
root = Path(__file__).resolve().parent.parent

everything = """
import hashlib, json, multiprocessing, random, sys
import numpy as np
import torch
from resnet_fastai.augment import ColorStats
from resnet_fastai.core import ResNet
from resnet_fastai.data import resnet_dls
from resnet_fastai.engine.layout import list_photos
from resnet_fastai.practice.prepare import check_data, shrink_photos

def batches(dls):
    digest = hashlib.sha256()
    for dl in (dls.train, dls.train, dls.valid):
        for x, y in dl: digest.update(x.numpy().tobytes() + repr(y.tolist()).encode())
    return digest.hexdigest()

def main(method, folder, num_workers):
    multiprocessing.set_start_method(method)
    torch.set_num_threads(1)
    data = [f'{folder}/photos', f'{folder}/photos/labels.json', f'{folder}/photos/encoding.json']
    said = dict(problems=len(check_data(*data, num_workers=num_workers)))
    small = shrink_photos(data[0], f'{folder}/small-{method}-{num_workers}', short_side=64, num_workers=num_workers)
    said['small'] = len(list_photos(small))
    said['mean'] = ColorStats.fit(list_photos(f'{data[0]}/train'), num_workers=num_workers).mean.tolist()
    torch.manual_seed(1); random.seed(1); np.random.seed(1)
    dls = resnet_dls(*data, n_out=1000, micro_bs=8, size=32, lighting=0, num_workers=num_workers)
    said['batches'], said['threads'] = batches(dls), dls.train.threads
    if num_workers != 0:
        model = ResNet(*data, arch='cifar_resnet8', bs=8, size=32, num_workers=num_workers)
        with model.learn.no_bar(), model.learn.no_logging(): said['epochs'] = len(model.fit(1))
        said['predicted'] = len(model.predict_folder(f'{data[0]}/test', n=1, protocol='1crop'))
    print(json.dumps(said))
"""
guarded = everything + "\nif __name__ == '__main__': main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))\n"
plain = everything + "\nmain(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))\n"          # a script as people write it


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('started')
    demo_data(folder/'photos', sizes=dict(train=200, val=16, test=4))                            # more than a handful
    return folder


@pytest.fixture(scope='module')
def run(folder):
    kept = {}
    def run(script, method, num_workers):
        if (key := (script, method, num_workers)) not in kept:
            (file := folder/'script.py').write_text(script)
            said = subprocess.run([sys.executable, '-W', 'ignore', file, method, folder, json.dumps(num_workers)], capture_output=True, text=True,
                                  cwd=root, env={**__import__('os').environ, 'PYTHONPATH': str(root)})
            assert said.returncode == 0, said.stderr[-3000:]
            kept[key] = json.loads(said.stdout.splitlines()[-1])
        return kept[key]
    return run


@pytest.mark.parametrize('method', methods)
def test_with_processes(run, method):
    "A script with a guard: the same photos, colours and batches as without any process"
    alone, found = run(guarded, methods[0], 0), run(guarded, method, 2)
    assert found.pop('epochs') == 1 and found.pop('predicted') == 4
    assert found == alone and found['small'] == 220 and found['threads'] == 0


@pytest.mark.parametrize('method', methods)
def test_without_a_guard(run, method):
    "The README's lines as they stand: threads where processes would need a guard, and the same batches"
    alone, found = run(guarded, methods[0], 0), run(plain, method, None)
    assert (found['threads'] > 0) == (method != 'fork') and found['epochs'] == 1
    assert {k: found[k] for k in ('batches', 'mean', 'small')} == {k: alone[k] for k in ('batches', 'mean', 'small')}
