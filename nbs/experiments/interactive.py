"""Figures with controls for notebooks: curves to switch on and off, a photo with PCA lighting, predictions of crops.

Each is shown as a picture, for GitHub, and as HTML with JavaScript, which replaces the picture where scripts run. The HTML needs no
server and loads nothing."""
import hashlib
import json
from base64 import b64encode
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML, display
from IPython.display import Image as Still
from PIL import Image

colors = '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000'     # Okabe and Ito's, for colour-blind readers too


def page_part(
    kind:str, # 'curves', 'light' or 'votes': a function of interactive.js
    data:dict, # What it draws
) -> str: # HTML
    "The controls and their data, as a part of a page"
    written = json.dumps(data, ensure_ascii=False).replace('</', '<\\/')
    script = Path(__file__).with_suffix('.js').read_text(encoding='utf-8')
    name = 'i' + hashlib.sha256((kind + written).encode()).hexdigest()[:10]
    call = f'interactive("{name}", "{kind}", {written});'
    return f'<div class="interactive" id="{name}"></div>\n<script>\n(() => {{\n{script}\n{call}\n}})();\n</script>'


def show(
    fig:plt.Figure, # The picture
    kind:str, # As for `page_part`
    data:dict, # As for `page_part`
):
    "Show a figure, and the same with controls"
    fig.savefig(png := BytesIO(), format='png')
    plt.close(fig)
    display(Still(png.getvalue()))
    display(HTML(page_part(kind, data)))


def photo_address(
    photo, # An image of PIL's, or (H,W,3) uint8
    side:int=240, # Its longer side at most, pixels
) -> str: # A data: URL of a JPEG
    "A photo as text, to be part of a page"
    img = photo if isinstance(photo, Image.Image) else Image.fromarray(np.asarray(photo))
    img = img.convert('RGB')
    img.thumbnail((side, side))
    img.save(out := BytesIO(), 'JPEG', quality=88)
    return 'data:image/jpeg;base64,' + b64encode(out.getvalue()).decode()


# --- Curves of stored runs

def net_name(run): return f"{run['kind'].replace('resnet', 'ResNet')}-{run['depth']}"


def curve_lines(
    runs:list, # Of dicts as the files of results/ hold them: kind, depth, epochs (rows with `x` and the keys of `y`)
    x:str='updates', # Key of the horizontal axis
    y:dict|None=None, # {key: name}; the last is drawn bold. None: training and test error
    scale:float=100., # Of the values
) -> list: # Of dicts, one a net: name, color, dash, parts
    "A line for each net and key, the mean over the net's seeds; plain nets are dashed"
    y = {'train_error': 'training', 'top1_error': 'test'} if y is None else y
    nets, depths = {}, sorted({r['depth'] for r in runs})
    for r in sorted(runs, key=lambda r: (r['kind'], r['depth'])): nets.setdefault(net_name(r), []).append(r)
    lines = []
    for name, same in nets.items():
        parts = []
        for i, (key, says) in enumerate(y.items()):
            rows = [[e for e in r['epochs'] if e.get(key) is not None] for r in same]
            n = min(map(len, rows))
            values = np.mean([[scale*e[key] for e in some[:n]] for some in rows], 0)
            width = 1.2 if i < len(y)-1 else 2.6
            if n: parts.append(dict(name=says, x=[e[x] for e in rows[0][:n]], y=values.round(3).tolist(), width=width))
        color = colors[depths.index(same[0]['depth']) % len(colors)]
        seeds = f' ({len(same)} seeds)' if len(same) > 1 else ''
        lines.append(dict(name=name + seeds, color=color, dash=same[0]['kind'] == 'plain', parts=parts))
    return lines


def curves(
    runs:list, # As for `curve_lines`
    title:str, # Of the picture: the finding
    x:str='updates', # As for `curve_lines`
    y:dict|None=None, # As for `curve_lines`
    scale:float=100., # As for `curve_lines`
    x_label:str='updates', # With its unit
    y_label:str='error, %: thin training, bold test', # With its unit
):
    "Show the learning curves of stored runs, with a box to switch each net on and off"
    lines = curve_lines(runs, x, y, scale)
    fig, ax = plt.subplots(figsize=(7.2, 3.8), layout='constrained')
    for d in lines:
        for p in d['parts']:
            label = d['name'] if p is d['parts'][-1] else None
            ax.plot(p['x'], p['y'], color=d['color'], ls='--' if d['dash'] else '-', lw=p['width'], label=label)
    ax.set(xlabel=x_label, ylabel=y_label, ylim=(0, None))
    ax.set_title(title, fontsize=11)
    ax.legend(fontsize=8)
    show(fig, 'curves', dict(lines=lines, x=x_label, y=y_label, label=title))


# --- A photo with PCA lighting

def light(
    photo, # An image of PIL's, or (H,W,3) uint8
    stats, # `ColorStats`: of the training set
    reach:tuple=(2., 10., 40.), # How far each alpha can be moved
    std:float=.1, # Of the alphas in training
    title:str='What each axis adds to a photo', # Of the picture
):
    "Show a photo with a slider for the alpha of each axis of PCA lighting"
    axes = np.asarray(stats.eigvec)*np.asarray(stats.eigval)
    pixels = np.asarray(photo, float)/255
    height = 3*(1.15*pixels.shape[0]/pixels.shape[1] + .3) + .3
    fig, grid = plt.subplots(3, 5, figsize=(6.2, height), dpi=75, layout='constrained')
    for k, row in enumerate(grid):
        for ax, share in zip(row, (-1, -.5, 0, .5, 1)):
            ax.imshow((pixels + share*reach[k]*axes[:, k]).clip(0, 1))
            ax.set(xticks=[], yticks=[])
            ax.set_xlabel(f'α{"₁₂₃"[k]} = {share*reach[k]:+g}' if share else 'unchanged', fontsize=8)
    fig.suptitle(title, fontsize=10)
    show(fig, 'light', dict(photo=photo_address(photo), axes=axes.round(6).tolist(), reach=list(reach), std=std, label=title))


# --- Predictions of crops

def crop_votes(
    size:tuple, # (width, height) of the photo
    places:list, # From `crop_boxes`
    probs:np.ndarray, # (n crops, n labels), a row sums to 1 or less
    crop:int, # Side of the crops, pixels
) -> list: # Of dicts: box (left, upper, side; pixels of the photo), side, mirrored, probs
    "Position of each crop in the original photo, and its probabilities"
    found = []
    for (side, left, upper, mirrored, *_), p in zip(places, probs):
        f = min(size)/side
        box, rounded = [round(v*f, 1) for v in (left, upper, crop)], [round(float(q), 4) for q in p]
        found.append(dict(box=box, side=side, mirrored=bool(mirrored), probs=rounded))
    return found


def votes(
    photo:Image.Image, # Upright, RGB
    places:list, # As for `crop_votes`
    probs:np.ndarray, # As for `crop_votes`
    labels:list, # Of the columns of `probs`
    crop:int, # As for `crop_votes`
    title:str, # Of the picture: the finding
):
    "Show the crops of a photo one by one, and the average of their probabilities"
    crops, mean = crop_votes(photo.size, places, probs, crop), np.cumsum(probs, 0)/np.arange(1, len(probs) + 1)[:, None]
    last = int(mean[-1].argmax())
    fig, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.1), layout='constrained', width_ratios=(1, 1.35))
    left.imshow(photo)
    for c in crops:
        x, y, side = c['box']
        wrong = int(np.argmax(c['probs'])) != last
        left.add_patch(plt.Rectangle((x, y), side, side, fill=False, ec='#E69F00' if wrong else '#0072B2', lw=.8))
    left.axis('off')
    left.set_title('blue: agrees with the average of all', fontsize=8)
    top = np.argsort(-mean[-1])[:4]
    for k, color in zip(top, colors): right.plot(range(1, len(probs) + 1), 100*mean[:, k], color=color, lw=2, label=labels[k])
    right.set(xlabel='crops in the average', ylabel='probability, %', ylim=(0, 100))
    right.legend(fontsize=8)
    fig.suptitle(title, fontsize=10)
    show(fig, 'votes', dict(photo=photo_address(photo, 300), size=list(photo.size), crops=crops, labels=list(labels), label=title))
