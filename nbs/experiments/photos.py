"""Photos to show in the lessons: real ones where a checkout has them beside it, drawn ones otherwise."""
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from resnet_fastai.engine.demo_photos import draw_photo

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
