"""Photos of eight drawn textures, so that everything runs without a download."""
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from .files import read_json_object
from .layout import _finish, _new_folder, DataPaths


def _wave(x): return np.tanh(4*np.sin(2*np.pi*x))


def _cell(x): return x - np.floor(x) - .5


def _bricks(u, v):
    shifted = u + .5*(np.floor(2*v) % 2)
    return np.where(np.minimum(.5 - abs(_cell(shifted)), (.5 - abs(_cell(2*v)))/2) < .06, 1., -1.)


def _weave(u, v): return np.where((np.floor(u/1.5) + np.floor(v/1.5)) % 2, _wave(4/3*u), _wave(4/3*v))


_textures = dict( # in (u,v), the coordinates on the bent surface: 4.5 to 7 units across a photo
    stripes = (101, lambda u,v: _wave(u)),
    checks  = (207, lambda u,v: _wave(u/1.4)*_wave(v/1.4)),
    dots    = (281, lambda u,v: np.tanh(12*(.32 - np.hypot(_cell(u), _cell(v))))),
    rings   = (340, lambda u,v: _wave(3*np.hypot(_cell(u/2), _cell(v/2)))),
    bricks  = (407, _bricks),
    zigzag  = (555, lambda u,v: _wave(u + 1.2*abs(_cell(v)))),
    weave   = (640, _weave),
    mesh    = (999, lambda u,v: np.tanh(12*(np.maximum(abs(_cell(u)), abs(_cell(v))) - .38))))


def _surface(h, w, rng):
    "Coordinates (u,v) on a surface that is turned, tilted and bent at random"
    y,x = (np.mgrid[:h,:w] - np.array([h, w])[:,None,None]*rng.uniform(.35, .65, (2,1,1)))/min(h, w)
    a, scale = rng.uniform(-.5, .5), rng.uniform(4.5, 7)
    u,v = np.cos(a)*x + np.sin(a)*y, np.cos(a)*y - np.sin(a)*x
    far = 1 + rng.uniform(-.25, .25)*u + rng.uniform(-.25, .25)*v
    bend = rng.uniform(0, .05)*np.sin(rng.uniform(2, 5)*v + rng.uniform(0, 6))
    return scale*(u/far + bend), scale*v/far


def draw_photo(
    label:str, # One of the textures
    rng:np.random.Generator, # Decides everything else
) -> Image.Image: # RGB, sides of 72 to 160 pixels
    "Draw one photo of a texture, in random light, colours, size and place"
    h,w = rng.integers(72, 161, 2)
    light = rng.uniform(.55, 1) + rng.uniform(-.4, .4)*np.linspace(-1, 1, w) + rng.uniform(-.3, .3)*np.linspace(-1, 1, h)[:,None]
    pattern = (_textures[label][1](*_surface(h, w, rng)) + 1)/2
    dark, bright = rng.uniform(0, 90, 3), rng.uniform(160, 255, 3)
    photo = (dark + pattern[...,None]*(bright - dark))*light.clip(.25, 1.2)[...,None] + rng.normal(0, rng.uniform(2, 10), (h,w,3))
    return Image.fromarray(photo.clip(0, 255).astype(np.uint8))


def demo_data(
    dest:str|Path, # A new folder; one that an earlier call has filled is used again
    sizes:dict=dict(train=640, val=80, test=80), # Photos in each split
    seed:int=42, # The same seed draws the same photos
) -> DataPaths: # dest and its two JSON files
    "Draw a small data set of eight textures, in exactly the layout of a user's photos, without a network"
    dest = Path(dest)
    paths = DataPaths(dest, dest/'labels.json', dest/'encoding.json')
    encoding = {label: i for label,(i,_) in _textures.items()}
    if paths.label_encoding.exists() and read_json_object(paths.label_encoding) == encoding: return paths
    tmp, rng, labels = _new_folder(dest), np.random.default_rng(seed), {}
    try:
        for split,n in sizes.items():
            (tmp/split).mkdir()
            for i in range(n):
                name, label = f'{split}_{i:05}', list(_textures)[i % len(_textures)]
                draw_photo(label, rng).save(tmp/split/f'{name}.jpg', quality=90)
                labels[name] = label
        return _finish(tmp, dest, labels, encoding)
    finally: shutil.rmtree(tmp, ignore_errors=True)
