"""How often does `check_data` report two different photos as nearly the same, and which edited copies does it find?

    python nbs/experiments/near_duplicates.py

Compares CIFAR-10's 10,000 test photos with its 50,000 training photos, 699 photographs with each other, and every fourth of
those with edited copies of itself. Needs the real photos beside the checkout; writes nbs/experiments/results/near_duplicates.json
and near_duplicates.jpg, the pairs found in CIFAR-10 that are least alike."""
import json
import tarfile
from io import BytesIO
from pathlib import Path
from runpy import run_path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageEnhance

from resnet_fastai.engine import near
from resnet_fastai.engine.files import write_json

here = Path(__file__).resolve().parent
data = here.parents[2]/'shared'/'data'


def small(images): return np.stack([near.small_grey(im) for im in images])


def photographs(*names):
    "The photos of archives as PIL images"
    for name in names:
        with tarfile.open(data/name) as t:
            for m in sorted(t.getmembers(), key=lambda m: m.name):
                if m.name.lower().endswith(('.jpg', '.jpeg')): yield Image.open(BytesIO(t.extractfile(m).read())).convert('RGB')


def cropped(share): return lambda im: im.crop([round(s*k) for s, k in zip(im.size*2, [share]*2 + [1 - share]*2)])


def jpeg(im):
    im.save(out := BytesIO(), 'JPEG', quality=30)
    return Image.open(out).convert('RGB')


edits = {
    'JPEG, quality 30': jpeg, 'a fifth of the size': lambda im: im.resize((im.width//5, im.height//5)),
    'squeezed to a square': lambda im: im.resize((256, 256)),
    'grey': lambda im: im.convert('L').convert('RGB'), 'brighter by 30 %': lambda im: ImageEnhance.Brightness(im).enhance(1.3),
    'contrast less by 30 %': lambda im: ImageEnhance.Contrast(im).enhance(.7),
    'mirrored': lambda im: im.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    '2 % cut off each side': cropped(.02), '5 % cut off each side': cropped(.05), 'turned by 2°': lambda im: im.rotate(2)}


def cifar():
    "Pairs between CIFAR-10's splits, and a figure of them"
    d = run_path(str(data/'cifar10'/'read.py'))['load']()
    found = list(near.near_pairs(small(map(Image.fromarray, d['x'])), small(map(Image.fromarray, d['tx']))))
    sheet(sorted(found, key=lambda o: o[2])[:24], d)
    other = [(i, j) for i, j, _ in found if d['y'][i] != d['ty'][j]]
    test_photos = len({j for _, j, _ in found})
    return dict(compared=len(d['x'])*len(d['tx']), pairs=len(found), test_photos=test_photos, of_different_classes=len(other))


def sheet(pairs, d):
    fig, axs = plt.subplots(4, 12, figsize=(12, 4.6), layout='constrained')
    for ax in axs.flat: ax.axis('off')
    for k, (i, j, r) in enumerate(pairs):
        axs.flat[2*k].imshow(d['x'][i])
        axs.flat[2*k + 1].imshow(d['tx'][j])
        axs.flat[2*k].set_title(f'{r:.3f}', fontsize=9)
    fig.suptitle('CIFAR-10, training photo beside test photo: the 24 least alike of the pairs found', fontsize=11)
    fig.savefig(here/'results'/'near_duplicates.jpg', dpi=80)


def photos():
    "Pairs reported among different photographs, and the share of edited copies found"
    own = list(photographs('clothing.tar', 'photos.tar'))
    every, some = small(own), own[::4]
    found = [(i, j) for i, j, _ in near.near_pairs(every, every) if i < j]
    rates = {}
    for name, edit in edits.items():
        pairs = near.near_pairs(small(some), small(map(edit, some)))
        rates[name] = len({i for i, j, _ in pairs if i == j})/len(some)
    return dict(photos=len(own), compared=len(own)*(len(own) - 1)//2, pairs=len(found)), dict(photos=len(some), found=rates)


if __name__ == '__main__':
    apart, copies = photos()
    result = dict(command='python nbs/experiments/near_duplicates.py', most_bits=near.most_bits, least_likeness=near.least_likeness,
                  photographs=apart, edited=copies, cifar10=cifar())
    write_json(here/'results'/'near_duplicates.json', result)
    print(json.dumps(result, indent=1))
