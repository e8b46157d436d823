"""Photos for the figures of the lessons: real ones if they lie beside the checkout, drawn ones otherwise."""
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from resnet_fastai.engine.class_folders import from_folders
from resnet_fastai.engine.demo_photos import demo_data, draw_photo

clothing = Path(__file__).resolve().parents[3]/'shared'/'data'/'clothing.tar'         # a sample of the "clothing dataset (small)", CC0
_names = ('t-shirt/13cdd036-7605-4194-a0ec-29cee3f5e566', 'longsleeve/0d3b1b5a-3d8d-406f-b953-5b506b8f5665',
          'shorts/29e6297b-0d6c-49c6-8513-dc64b7b979f5', 'shoes/49d3b29c-54b9-4cae-b918-504cf24ce128')


def sample_photos(
    file:Path=clothing, # An archive of class folders; where it is absent, photos are drawn
) -> list: # Of four PIL images, RGB, 400 pixels high
    "Four photos, always the same"
    if not file.is_file():
        rng = np.random.default_rng(8)
        return [draw_photo(t, rng).resize((533, 400)) for t in ('checks', 'zigzag', 'rings', 'mesh')]
    with tarfile.open(file) as t: return [Image.open(t.extractfile(f'clothing/train/{n}.jpg')).convert('RGB') for n in _names]


def sample_folder(
    dest:Path, # A new folder
    sizes:dict=dict(train=80, validation=20), # Photos in each split
    file:Path=clothing, # An archive of class folders; where it is absent, photos are drawn
): # A `DataPaths`: folder, labels, encoding
    "A small training set in this project's layout, the same number of photos in each class"
    if not file.is_file(): return demo_data(dest, sizes=dict(train=sizes['train'], val=sizes['validation'], test=0))
    source = dest.with_name(f'{dest.name}-classes')
    with tarfile.open(file) as t:
        for split, n in sizes.items():
            names = sorted(m.name for m in t.getmembers() if m.isfile() and m.name.startswith(f'clothing/{split}/'))
            classes = sorted({n.split('/')[2] for n in names})
            for c in classes:
                for name in [x for x in names if x.split('/')[2] == c][:n//len(classes)]:
                    (new := source/split/c/name.split('/')[3]).parent.mkdir(parents=True, exist_ok=True)
                    new.write_bytes(t.extractfile(name).read())
    return from_folders(source, dest)


def show(
    ax, # Of matplotlib
    img:Image.Image|torch.Tensor, # A PIL image, or (3,H,W) of uint8 or of RGB in [0,1]
    title:str='',
):
    "Draw a photo without axes"
    if isinstance(img, torch.Tensor): img = img.permute(1, 2, 0).clip(0, 255 if img.dtype == torch.uint8 else 1)
    ax.imshow(img)
    ax.set_title(title, fontsize=9)
    ax.set(xticks=[], yticks=[])
