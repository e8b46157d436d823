"""Bytes of a JPEG → an augmented 224×224 crop of 8-bit RGB, one process, one thread.

Against (a) fastai's stock transforms, (b) torchvision's reference preset on PIL images, (c) torchvision's fastest path, tensors from the
decoder on, in two forms, and (d) decoding and nothing else: the limit for whoever decodes the whole photo. The second part does the same
with photos of 12 million pixels, and with what `shrink_photos` makes of them. (a) and (b) end with a PIL image, the others with a tensor."""
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)      # not this folder: its `statistics` is not Python's
import io
import random
import tempfile

from benchmarks.common import alternate, arguments, compare, photos, write

import numpy as np
import torch
from fastai.vision.augment import FlipItem, RandomResizedCrop
from fastai.vision.core import PILImage
from PIL import Image
from torchvision import transforms as T
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from resnet_fastai.augment import ScaleJitterCrop
from resnet_fastai.engine.layout import list_photos
from resnet_fastai.engine.photo import Photo
from resnet_fastai.practice.prepare import shrink_photos


def decoded(data): return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)

fastai_crop, fastai_flip = RandomResizedCrop(224), FlipItem(p=.5)
def fastai_stock(data): return fastai_flip(fastai_crop(PILImage.create(data), split_idx=0), split_idx=0)

pil_crop, pil_flip = T.RandomCrop(224), T.RandomHorizontalFlip()
def torchvision_pil(data): return pil_flip(pil_crop(T.functional.resize(Image.open(io.BytesIO(data)).convert('RGB'), random.randint(256, 480))))

v2_crop, v2_flip, v2_area = v2.RandomCrop(224), v2.RandomHorizontalFlip(), v2.RandomResizedCrop(224, antialias=True)
def torchvision_v2(data): return v2_flip(v2_crop(v2.functional.resize(decoded(data), [random.randint(256, 480)], antialias=True)))
def torchvision_v2_area(data): return v2_flip(v2_area(decoded(data)))

our_crop = ScaleJitterCrop()
def ours(data): return our_crop(Photo(bytes(data)), split_idx=0)

contestants = {'(a) fastai, RandomResizedCrop': fastai_stock, '(b) torchvision on PIL': torchvision_pil, '(c) torchvision v2, scale jitter': torchvision_v2,
               '(c) torchvision v2, RandomResizedCrop': torchvision_v2_area, '(d) decode_jpeg only': decoded, 'ours': ours}


def turn(f, datas): return lambda: [f(d) for d in datas]


def large(paths, n, grain):
    "JPEGs of 4000×3000 at quality 90: photos enlarged, with the grain of a sensor or without"
    found = []
    for i, p in enumerate(paths[:n]):
        pixels = np.asarray(Image.open(p).convert('RGB').resize((4000, 3000), Image.Resampling.BICUBIC)).astype(np.int16)
        pixels = pixels + np.random.default_rng(i).normal(0, grain, (3000, 4000, 1)).astype(np.int16)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(b := io.BytesIO(), 'JPEG', quality=90)
        found.append(b.getvalue())
    return found


def shrunk(datas):
    "The same photos after `shrink_photos`"
    tmp = Path(tempfile.mkdtemp())
    (tmp/'large'/'train').mkdir(parents=True)
    for i, d in enumerate(datas): (tmp/'large'/'train'/f'{i}.jpg').write_bytes(d)
    shrink_photos(tmp/'large', tmp/'small')
    return [p.read_bytes() for p in list_photos(tmp/'small')]


def main():
    args = arguments(__doc__, large=(6, 'how many photos of 12 million pixels'))
    torch.set_num_threads(1)
    paths, what = photos(args.photos)
    datas = [p.read_bytes() for p in paths]
    a, b, c, c2, d, _ = contestants
    print(f'{len(datas)} photos ({what}), {sum(map(len, datas))/len(datas)/1e3:.0f} KB each')
    figures = dict(photos=what, small=compare(alternate({k: turn(f, datas) for k, f in contestants.items()}, args.rounds), 'ours', len(datas),
                                              {a: 1.6, b: 2.3, c: 1.1, d: .75}))
    for name, grain in (('smooth', 0), ('grainy', 6))[:args.large]:
        datas = large(paths, args.large, grain)
        print(f'{len(datas)} photos of 4000×3000, {name}, {sum(map(len, datas))/len(datas)/1e6:.1f} MB each')
        figures[name] = compare(alternate({k: turn(f, datas) for k, f in contestants.items()}, args.rounds), 'ours', len(datas), {a: 4, b: 4, c: 2})
        print('the same, shrunk once by shrink_photos, against (a) on the originals')
        both = {a: turn(fastai_stock, datas), 'ours': turn(ours, shrunk(datas))}
        figures[f'{name} shrunk'] = compare(alternate(both, args.rounds), 'ours', len(datas), {a: 15})
    write(args, **figures)


if __name__ == '__main__': main()
