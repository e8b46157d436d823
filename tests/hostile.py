"""Ten thousand files that are not photos, or hardly, through `predict` and `predict_folder`; what happened, as JSON.

python tests/hostile.py FOLDER [N [SEED]]: in a process of its own, so that a crash, a hang or growing memory shows."""
import faulthandler
import io
import json
import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch

from patience import still
from resnet_fastai.core import ResNet
from resnet_fastai.data import demo_data
from resnet_fastai.engine.demo_photos import draw_photo
from resnet_fastai.engine.files import DataError
from resnet_fastai.engine.layout import photo_suffixes
from resnet_fastai.practice.predict_folder import predict_folder

formats = dict(JPEG='.jpg', PNG='.png', WEBP='.webp', GIF='.gif', BMP='.bmp', TIFF='.tif')


def wholes():
    "Small photos of every common form: the start of what follows"
    made = []
    for i, (mode, size) in enumerate([('RGB', (48, 36)), ('L', (33, 40)), ('CMYK', (40, 33)), ('P', (36, 36)), ('RGBA', (36, 48)), ('1', (64, 40))]):
        photo = draw_photo('dots', np.random.default_rng(i)).resize(size).convert(mode)
        for form in formats:
            for more in [dict(), dict(progressive=True), dict(compression='tiff_lzw')]:
                if (form == 'JPEG') < ('progressive' in more) or (form == 'TIFF') < ('compression' in more): continue
                out = io.BytesIO()
                try: photo.save(out, form, **more)
                except (OSError, ValueError): continue                             # not every format has every mode
                made.append((form, out.getvalue()))
    return made


def hostile(whole, rng):
    "(what was done, the bytes) of one of ten bad turns"
    data, n = bytearray(whole), len(whole)
    how = rng.choice(['random', 'cut', 'header', 'flips', 'doubled', 'zeros', 'huge', 'swapped', 'text', 'whole'])
    if how == 'random': data = rng.randbytes(rng.randrange(0, 3000))
    elif how == 'cut': del data[rng.randrange(n):]
    elif how == 'header':
        for _ in range(rng.randint(1, 6)): data[rng.randrange(min(n, 64))] = rng.randrange(256)
    elif how == 'flips':
        for _ in range(rng.randint(1, 20)): data[rng.randrange(n)] ^= 1 << rng.randrange(8)
    elif how == 'doubled': data = data[:rng.randrange(n)] + data
    elif how == 'zeros': a = rng.randrange(n); data[a:a + rng.randrange(200)] = bytes(rng.randrange(200))
    elif how == 'huge':                                                             # two bytes at random become a large number
        a = rng.randrange(min(n, 200)); data[a:a + 2] = rng.choice([b'\xff\xff', b'\x7f\xff', b'\xff\x7f'])
    elif how == 'swapped': a, b = sorted(rng.randrange(n) for _ in 'ab'); data = data[b:] + data[a:b] + data[:a]
    elif how == 'text': data = rng.choice(['', ' ', '<!doctype html><p>404', '{"a": 1}', 'GIF89a', 'PK\x03\x04', '%PDF-1.4', '\xff\xd8\xff']).encode('latin-1')
    return how, bytes(data)


def memory(): return int(Path('/proc/self/statm').read_text().split()[1])*os.sysconf('SC_PAGE_SIZE') >> 20


def verdict(call):
    "'ok' or the complaint; anything else goes up"
    try: probs = call()
    except DataError as e: return str(e)
    assert probs.shape == (1000,) and np.isfinite(probs).all() and abs(probs.sum() - 1) < 1e-4
    return 'ok'


def main(folder, n=10_000, seed=0):
    torch.set_num_threads(1)
    rng, folder = random.Random(seed), Path(folder)
    model = ResNet(*demo_data(folder/'drawn', sizes=dict(train=16, val=8, test=4)), arch='cifar_resnet8', size=32, bs=8, num_workers=0)
    with model.learn.no_bar(), model.learn.no_logging(): model.fit(1)
    bases, kinds, said, levels, slowest = wholes(), {}, {}, [], 0
    (photos := folder/'photos').mkdir()
    for i in range(n):
        form, whole = rng.choice(bases)
        how, data = hostile(whole, rng)
        suffix = formats[form] if rng.random() < .7 else rng.choice(sorted(photo_suffixes))
        path = photos/f'{i:05}{suffix}'
        path.write_bytes(data)
        faulthandler.dump_traceback_later(still, exit=True)                         # a hang ends here, with where it was
        start = time.perf_counter()
        said[path.name] = verdict(lambda: model.predict(rng.choice([path, str(path)]) if i % 2 else data, scales=(32,)))
        slowest = max(slowest, time.perf_counter() - start)
        kinds.setdefault(how, []).append(said[path.name] == 'ok')
        if i % (n//10) == n//10 - 1: levels.append(memory())
    faulthandler.cancel_dump_traceback_later()
    table = predict_folder(model, photos, folder/'out.csv', n=2, protocol='1crop', num_workers=2)
    after = memory()
    again = dict(zip(table['id'], table.error))
    print(json.dumps(dict(
        n=len(table), ok=sum(v == 'ok' for v in said.values()), kinds={k: [len(v), sum(v)] for k, v in kinds.items()}, levels=levels, after=after,
        slowest=slowest, unlike=[k for k, v in said.items() if (v == 'ok') != (again[k] == '')][:9],
        unnamed=[v for k, v in again.items() if v and k not in v][:9], long=[v for v in said.values() if len(v) > 400 or '\n' in v][:9])))


if __name__ == '__main__': main(sys.argv[1], *map(int, sys.argv[2:]))
