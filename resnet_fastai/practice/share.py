"""Save, load and export a network for people who have neither the photos nor a reason to trust you."""
__all__ = ['imagenet_stats', 'Trained', 'as_trained', 'torchvision_kin', 'standalone', 'in_words', 'model_card', 'save_model',
           'load_model', 'PhotoProbs', 'export_model', 'from_torchvision', 'to_torchvision']

import hashlib
import io
import json
import logging
import math
import os
import re
import warnings
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple

import fastai
import numpy as np
import pandas as pd
import safetensors.torch
import torch
from fastai.learner import Learner
from safetensors import SafetensorError
from torch import nn

from .. import __version__
from ..augment import ColorStats
from ..data import LabelMap
from ..engine.calibration import in_effect
from ..engine.files import DataError, read_json_object, atomic_write
from ..engine.regularise import in_use
from ..engine.weight_sources import model_folder, read_weights
from ..engine.weights import config_sum, imagenet_mean, json_bytes, misfit, saved_tensors, scaled
from ..inference import paper_scales
from .hub_card import front_matter
from .protocol import protocol_scales, sides_of_training
from ..model import build_net


class Trained(NamedTuple):
    "A network and all that its predictions need"
    net:nn.Module
    arch:str # What `build_net` calls it
    net_args:dict # More for `build_net`: stride_at, shortcut, zero_init_residual
    labels:LabelMap
    stats:ColorStats # Of the training set
    size:int # Side of the crops, pixels
    history:pd.DataFrame # A row an epoch
    training:dict # What the training was: photos, epochs, seconds, bs, …
    protocol:str='50crop' # How it predicts, as for `protocol_scales`
    trust:dict={} # What `calibrate` and `threshold` have measured

    @property
    def temperature(self): return in_effect(self.trust, self.protocol, len(self.history))[0]
    @property
    def min_prob(self): return in_effect(self.trust, self.protocol, len(self.history))[1]


def _summary(learn, precision):
    "What the training was, in numbers"
    df = learn.history.df
    past = dict(seconds=round(float(df.seconds.sum()), 1), lr=float(df.lr.iloc[0])) if len(df) else {}
    return dict(photos={s: len(p) for s,p in learn.dls.photos.items()}, epochs=len(df), **past, bs=int(learn.accumulate.bs),
                micro_bs=int(learn.dls.train.bs), decay=learn.decay, precision=str(precision),
                short_sides=[int(side) for side in sides_of_training(learn.dls)], **_beginning(learn))


def _beginning(learn):
    "The weights that a training began with, what helped it beyond the paper, and the epoch whose weights it went back to"
    found = {} if learn.restored is None else dict(restored_epoch=learn.restored)
    if helps := in_use(learn): found['beyond'] = helps
    if learn.weights: found['weights'] = learn.weights
    if learn.weights and learn.weights['head'].startswith('all '): found['origin'] = 'taken over from ' + learn.weights['origin']
    return found


def as_trained(
    model, # A learner of `resnet_learner`, as `train` gives; a `Trained`; or an object that has one, like `ResNet`
) -> Trained: # Its network is the model's own, not a copy
    "What a model's predictions need"
    if isinstance(model, Trained): return model
    if not isinstance(model, Learner): return model.trained
    spec, dls = getattr(model, 'spec', None), model.dls
    if not spec or not hasattr(dls, 'stats'): raise DataError("only a learner of resnet_learner over resnet_dls can be saved")
    net_args = {k: spec[k] for k in ('shortcut', 'stride_at', 'zero_init_residual') if k in spec}
    return Trained(model.model, spec['arch'], net_args, dls.labels, dls.stats, dls.size, model.history.df,
                   _summary(model, spec.get('precision', 'fp32')), model.protocol, getattr(model, 'trust', {}))


def _put(folder, files, overwrite):
    "Write {name: bytes} into a folder, the last name first"
    folder = Path(folder)
    there = [n for n in files if (folder/n).exists()]
    if there and not overwrite:
        raise DataError(f"{folder} holds a model already ({', '.join(there)}); name another folder, or pass overwrite=True")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as renames:
            for name,data in files.items(): renames.enter_context(atomic_write(folder/name)).write_bytes(data)
    except OSError as e: raise DataError(f"nothing can be written in {folder}: {e.strerror or e}") from None
    return folder


def _plain_history(df): # NaN is not JSON
    return {k: [v if v is None or math.isfinite(v) else None for v in vs] for k,vs in df.to_dict('list').items()}


def _config(t, weights):
    "All of config.json"
    c = dict(format=2, arch=t.arch, net_args=t.net_args, n_out=t.net.fc.out_features, size=t.size, scales=list(paper_scales(t.size)),
             protocol=t.protocol,
             encoding=t.labels.encoding, stats=t.stats.as_dict(), training=t.training, history=_plain_history(t.history),
             weights_bytes=len(weights), weights_sha256=hashlib.sha256(weights).hexdigest(),
             versions=dict(resnet_fastai=__version__, fastai=fastai.__version__, torch=torch.__version__))
    if t.trust: c['trust'] = t.trust
    return c | dict(sha256=config_sum(c))


def _md(text):
    "A text that Markdown shows as it is, on one line and without commands"
    def one(c):
        if c.isalnum() or c in " -,'()/+": return c
        return f'&#{ord(c)};' if c.isprintable() else f'&#92;u{ord(c):04x}'
    return ''.join(map(one, str(text)))


def torchvision_kin(
    arch:str, # What `build_net` calls the network
    net_args:dict, # What it was built with
) -> str: # 'same': torchvision has it; 'strides': but for where the strides are; 'none': nothing like it
    "How a network is related to torchvision's of the same name"
    if not re.fullmatch('resnet(18|34|50|101|152)', arch) or net_args.get('shortcut', 'B') != 'B': return 'none'
    return 'same' if int(arch[6:]) < 50 or net_args.get('stride_at') == '3x3' else 'strides'

_program = '''import json
import sys

import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torchvision.models import {arch}
from torchvision.transforms.functional import center_crop, hflip, resize, ten_crop, to_tensor

folder, *photos = sys.argv[1:]
with open(f'{{folder}}/config.json', encoding='utf-8') as f: config = json.load(f)
net = {arch}(num_classes=config['n_out']).eval()
{strides}net.load_state_dict(load_file(f'{{folder}}/model.safetensors'))
mean = torch.tensor(config['stats']['mean'])[:, None, None]


def predict(path):
    "The probability of each label, {words}"
    photo = ImageOps.exif_transpose(Image.open(path)).convert('RGB')
{asking}    return {{label: float(probs[i]) for label, i in config['encoding'].items()}}

for path in photos:
    for label, p in sorted(predict(path).items(), key=lambda o: -o[1])[:5]: print(f'{{p:.4f}}\\t{{label}}')
'''
_strides = '''for block in net.modules():                # a block's stride is in its first convolution here, in its second there
    if hasattr(block, 'conv3'): block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
'''
_asking = '''    crops = [c for side in {scales} for c in {cut}]
    with torch.inference_mode(): probs = net(torch.stack([to_tensor(c) for c in crops]) - mean).softmax(1).mean(0)
'''
_dense = '''    trunk, found = torch.nn.Sequential(*list(net.children())[:-2]), []
    with torch.inference_mode():
        window = trunk(torch.zeros(1, 3, config['size'], config['size'])).shape[2:]
        for side in {scales}:
            whole = resize(photo, side)
            x = torch.stack([to_tensor(whole), to_tensor(hflip(whole))]) - mean
            found.append(net.fc(torch.nn.functional.avg_pool2d(trunk(x), window, stride=1).flatten(2).mT).softmax(2).mean(1))
    probs = torch.cat(found).mean(0)
'''


def standalone(
    arch:str, # What `build_net` calls the network
    net_args:dict, # What it was built with
    protocol:str='50crop', # How it predicts, as for `protocol_scales`
    size:int=224, # Side of the crops, pixels
    temperature:float=1, # Of its probabilities, as for `tempered`
) -> str: # Python, or '' where torchvision has no such network
    "The program that predicts without this project: `python predict.py FOLDER PHOTO …`"
    kin = torchvision_kin(arch, net_args)
    if kin == 'none': return ''
    what,scales = protocol_scales(protocol, size)
    if protocol in ('50crop', 'dense'): scales = "config['scales']"
    cut = "[center_crop(resize(photo, side), config['size'])]" if what == '1crop' else "ten_crop(resize(photo, side), config['size'])"
    asking = (_dense if what == 'dense' else _asking).format(scales=scales, cut=cut)
    if temperature != 1: asking += "    probs = (probs.log()/config['trust']['calibration']['temperature']).softmax(0)\n"
    words = 'the mean over 50 crops' if protocol == '50crop' else in_words(protocol, size)
    return _program.format(arch=arch, strides=_strides if kin == 'strides' else '', words=words, asking=asking)


def in_words(
    protocol:str, # As for `protocol_scales`
    size:int=224, # Side of the crops, pixels
) -> str:
    "What a protocol does with a photo"
    kind,scales = protocol_scales(protocol, size)
    one = 'centre crops' if len(scales) > 1 else 'centre crop'
    what = {'1crop': one, 'dense': 'all windows of photo and mirror image'}.get(kind, '10 crops')
    at = f"at each of the short sides {', '.join(map(str, scales))}" if len(scales) > 1 else f"at the short side {scales[0]}"
    return f"{'the' if kind == '1crop' and len(scales) == 1 else 'the mean over'} {what} {at}"


def _without(c):
    "The card's words about life without this project"
    if not (code := standalone(c['arch'], c['net_args'], c.get('protocol', '50crop'), c['size'], _in_effect(c)[0])):
        return "torchvision has no such network. `export(folder)` makes an ONNX file, which runs without this project.\n"
    kin, own = torchvision_kin(c['arch'], c['net_args']), f"The network is torchvision's `{c['arch']}`"
    differs = {'same': own + '.', 'strides': own + " with its strides in another place (v1; torchvision's is v1.5). The weights fit "
                                                   "both, the answers do not: the loop over `net.modules()` is needed."}
    return (f"{differs[kin]} Save this as predict.py, `pip install torch torchvision safetensors`, "
            f"and run `python predict.py FOLDER PHOTO.jpg`.\n\n```python\n{code}```\n")


def _started_from(w):
    "Rows of the card about the weights that a training began with"
    if not w: return
    yield 'started from', w.get('origin', '')
    said = [f"{k} {w[k]}" for k in ('sha256', 'licence', 'scaling', 'head') if w.get(k)]
    yield 'these weights', '; '.join(said).replace('sha256', 'SHA-256').replace('scaling', 'mean and std:')


def _trained_on(c):
    "Rows of the card about the training"
    t, h = c['training'], c['history']
    if 'origin' in t: yield 'weights', t['origin']
    yield from _started_from(t.get('weights'))
    if n := t.get('photos'): yield 'photos', ', '.join(f'{k:,} {s}' for s,k in n.items())
    if t.get('epochs'):
        yield 'training', (f"{t['epochs']} epochs in {t.get('seconds', 0):,.0f} seconds; {t.get('bs')} photos an update, "
                           f"rate {t.get('lr', 0):.4g} at first, {t.get('precision')}")
    if helps := t.get('beyond'): yield 'beyond the paper', ', '.join(f'{k}={v}' for k,v in helps.items())
    if (epoch := t.get('restored_epoch')) is not None: yield 'weights of', f'epoch {epoch}, the one with the smallest validation loss'
    for name in ('top1_error', 'top5_error'):
        if known := [v for v in h.get(name, []) if v is not None]:
            yield f"validation {name.replace('_', ' ')}", f"{known[-1]:.1%} after the last epoch, {min(known):.1%} at best"


def _in_effect(c):
    "Temperature and threshold of a config"
    return in_effect(c.get('trust', {}), c.get('protocol', '50crop'), max(map(len, c['history'].values()), default=0))

def _trusted(c):
    "Rows of the card about calibration and threshold, as far as they count"
    (temperature, min_prob), trust = _in_effect(c), c.get('trust', {})
    if temperature != 1:
        e = trust['calibration']
        yield 'temperature', f'{temperature:.3g}' + (f"; on {e['photos']:,} validation photos the calibration error (ECE) is "
                                                     f"{e['ece_before']:.1%} without it, {e['ece']:.1%} "
                                                     f"with it" if 'ece' in e else '')
    if min_prob is not None:
        e = trust['threshold']
        yield 'not sure', f'below a probability of {min_prob:.3g}' + (f"; of {e['photos']:,} validation photos {e['coverage']:.1%} get an "
                                                                      f"answer, {e['precision']:.1%} of these "
                          f"are right (95 % interval {e['precision_low']:.1%} to {e['precision_high']:.1%})" if 'photos' in e else '')

def _facts(c):
    "Rows of the card's table"
    s, args = c['stats'], ', '.join(f'{k}={v}' for k,v in c['net_args'].items())
    numbers = lambda vs, digits: ' '.join(f'{v:.{digits}f}' for v in vs)
    yield 'network', f"{c['arch']}, {args or 'as in the paper'}; {c['n_out']:,} outputs, {len(c['encoding']):,} of them with a label"
    yield 'input', f"crops of {c['size']}×{c['size']} pixels, RGB / 255 minus the mean, not divided by a standard deviation"
    yield 'prediction', in_words(c.get('protocol', '50crop'), c['size'])
    yield from _trusted(c)
    yield from _trained_on(c)
    whose = " (the weights')" if c['training'].get('weights') else ''
    yield 'colours', f"mean {numbers(s['mean'], 4)}{whose}, variances along the axes {numbers(s['eigval'], 4)}, of {s['n_photos']:,} photos"
    yield 'made with', ', '.join(f'{k} {v}' for k,v in c['versions'].items())


def model_card(
    config:dict, # What config.json holds
    most:int=100, # Labels that the card lists; all of them are in config.json
) -> str: # Markdown
    "README.md: what a model is, how good it was, how to use it; at its head the YAML for Hugging Face's hub"
    c, encoding = config, sorted(config['encoding'].items(), key=lambda o: o[1])
    table = lambda rows: ''.join(f"| {_md(a)} | {_md(b)} |\n" for a,b in rows)
    more = f"\n… and {len(encoding) - most:,} more, in config.json.\n" if len(encoding) > most else ''
    return (f"{front_matter(c)}# {_md(c['arch'])} for {len(encoding):,} labels\n\nA residual network (He et al., 2015, arXiv 1512.03385) "
            "that says what is "
            f"on a photo. The weights are in model.safetensors, all settings in config.json; neither can run code.\n\n"
            f"| | |\n|:--|:--|\n{table(_facts(c))}\n## With resnet_fastai\n\n```python\nfrom resnet_fastai.core import ResNet\n\n"
            f"ResNet.load('FOLDER').predict_n('PHOTO.jpg')\n```\n\n## Without\n\n{_without(c)}\n"
            f"## Labels\n\n| index | label |\n|--:|:--|\n{table((i, label) for label,i in encoding[:most])}{more}")


def _weights(net):
    "Names and tensors, on the CPU; a `DataError` where one holds no numbers"
    weights = {k: v.detach().cpu().contiguous() for k,v in net.state_dict().items()}
    if bad := next((k for k,v in weights.items() if not torch.isfinite(v).all()), None):
        raise DataError(f"the weights {bad} are no numbers any more; go back to a checkpoint from before")
    return weights


def save_model(
    model, # What `as_trained` takes
    folder:str|Path, # Made if need be
    overwrite:bool=False, # Replace a model that is already there?
) -> Path: # The folder
    "Save what predictions need: model.safetensors, config.json, and README.md for people"
    t = as_trained(model)
    weights = safetensors.torch.save(_weights(t.net), {'format': 'pt'})
    c = _config(t, weights)
    card = model_card(c).encode('utf-8', 'backslashreplace')
    return _put(folder, {'README.md': card, 'config.json': json_bytes(c), 'model.safetensors': weights}, overwrite)


def _need(ok, what):
    if not ok: raise ValueError(what)


def _is_number(v, low=-1e300, high=1e300): return type(v) in (int, float) and low <= v <= high
def _is_whole(v, low=0, high=2**53): return type(v) is int and low <= v <= high

_entries = dict(arch=str, net_args=dict, n_out=int, size=int, scales=list, encoding=dict, stats=dict, training=dict, history=dict,
                weights_sha256=str)


def _check_config(c):
    "Is everything there, of the right kind, and possible?"
    for k,kind in _entries.items(): _need(type(c.get(k)) is kind, f"its {k} is not a {kind.__name__}" if k in c else f"it lacks {k}")
    _need(1 <= c['size'] <= 10_000, f"a crop of {c['size']} pixels is not possible")
    _need(c['scales'] == list(paper_scales(c['size'])), f"its scales are not those of a crop of {c['size']} pixels")
    _need(isinstance(c.get('protocol', ''), str) and protocol_scales(c.get('protocol', '50crop'), c['size']), "its protocol is no text")
    columns = c['history'].values()
    numbers = (type(vs) is list and all(v is None or _is_number(v) or v != v for v in vs) for vs in columns)
    _need(all(numbers), "its history holds more than numbers")
    _need(len({len(vs) for vs in columns}) < 2, "the columns of its history differ in length")
    _need(all(_training_entry(k, v) for k,v in c['training'].items()), "its training summary holds what is none")
    _need(_possible_trust(c.get('trust', {})), "its calibration or threshold is not possible")

def _possible_trust(trust):
    "May `in_effect` and the card read this?"
    if type(trust) is not dict or not {*trust} <= {'calibration', 'threshold'}: return False
    for what,e in trust.items():
        if type(e) is not dict or not (isinstance(e.get('protocol'), str) and _is_whole(e.get('epochs'))
                                       and _is_number(e.get('temperature'), 1e-6, 1e6)):
            return False
        if not all(_is_number(v) for k,v in e.items() if k != 'protocol'): return False
        if what == 'threshold' and not _is_number(e.get('min_prob'), 0, 1): return False
    return True


def _training_entry(k, v):
    if k == 'photos': return type(v) is dict and all(_is_whole(n) for n in v.values())
    if k in ('origin', 'decay', 'precision'): return isinstance(v, str)
    if k == 'short_sides': return type(v) is list and len(v) == 2 and all(_is_whole(n, 1, 100_000) for n in v)
    if k == 'weights': return type(v) is dict and all(isinstance(t, str) for t in v.values())
    if k == 'beyond': return type(v) is dict and all(isinstance(t, str) or _is_number(t) for t in v.values())
    return k in ('epochs', 'seconds', 'bs', 'micro_bs', 'lr', 'restored_epoch') and _is_number(v)


def _stats(s):
    stats = ColorStats(**s)
    _need(np.isfinite(stats.eigvec).all() and (stats.eigval >= 0).all() and (stats.eigval <= 1).all(), "its colour axes are not possible")
    _need((stats.mean >= 0).all() and (stats.mean <= 1).all() and _is_whole(stats.n_photos), "its mean colour is not possible")
    return stats


def _shell(arch, n_out, net_args):
    "The network without memory for its weights; draws nothing"
    with torch.device('meta'): return build_net(arch, n_out, **net_args)


def _filled(net, weights):
    "The network on the CPU with these weights, ready to predict"
    net = net.to_empty(device='cpu')
    net.load_state_dict(weights)
    return net.eval()


def _read_config(path):
    "The object in config.json, as today's version writes it"
    c = read_json_object(path)
    if c.get('format') == 1: return c | dict(scales=list(paper_scales(c['size'])), training={})     # knew no sum of its own
    _need(c.get('format') == 2, f"its format is {c.get('format')!r}, and this version reads 1 and 2; a newer resnet_fastai may know it")
    _need(c.get('sha256') == config_sum(c), "config.json has been changed since it was saved, or is damaged")
    return c


def _understood(folder):
    c = _read_config(folder/'config.json')
    _check_config(c)
    weights = saved_tensors(folder/'model.safetensors', c)
    depth, weight = int(re.sub(r'\D', '', c['arch'])[:9] or 0), sum(w.nbytes for w in weights.values())
    _need(depth <= len(weights) and 8192*(depth - 2) <= weight, f"there is no network {c['arch'][:40]!r} with {len(weights)} tensors")
    net = _shell(c['arch'], c['n_out'], c['net_args'])
    if wrong := misfit(weights, net.state_dict()): raise ValueError(f"model.safetensors does not fit {c['arch']}: {wrong}")
    labels = LabelMap({}, c['encoding'])
    labels.vocab(c['n_out'])
    return Trained(_filled(net, weights), c['arch'], c['net_args'], labels, _stats(c['stats']), c['size'],
                   pd.DataFrame(c['history']), c['training'], c.get('protocol', '50crop'), c.get('trust', {}))

_strange = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, MemoryError, SafetensorError)


def load_model(
    folder:str|Path, # What `save_model` wrote; or of Hugging Face's hub: 'hf:user/name', 'hf:user/name@revision'
) -> Trained: # On the CPU, ready to predict
    "Load a saved model; runs no code of the files'. A `DataError` where anything is missing, damaged or impossible"
    folder = model_folder(folder)
    try:
        for name in ('config.json', 'model.safetensors'): _need(S_ISREG(os.stat(folder/name).st_mode), f"{name} is not a file")
        return _understood(folder)
    except OSError as e: raise DataError(f"{folder} holds no saved model: {e.filename or folder}: {e.strerror or e}") from None
    except _strange as e:
        say = str(e) if type(e) is ValueError or isinstance(e, DataError) else f'{type(e).__name__}: {e}'
        raise DataError(f"{folder} holds no whole model: {' '.join(say.split())[:300]}") from None


class PhotoProbs(nn.Module):
    "Crops, RGB in [0,1] → probabilities: centring, network and softmax in one"
    def __init__(self,
        net:nn.Module, # Gives logits
        stats:ColorStats, # Of the training set
    ):
        super().__init__()
        self.net = net
        self.register_buffer('mean', torch.tensor(stats.mean, dtype=torch.float32)[:,None,None])

    def forward(self, photos): return self.net(photos - self.mean).softmax(1)


@contextmanager
def _quietly():
    "Without the exporters' remarks on themselves"
    was = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally: logging.disable(was)


def _onnx(module, example, shapes, notes):
    if missing := [p for p in ('onnx', 'onnxscript') if find_spec(p) is None]:
        raise DataError(f'an ONNX file needs {" and ".join(missing)}: pip install "resnet_fastai[onnx]"')
    program = torch.onnx.export(module, (example,), dynamo=True, input_names=['photos'], output_names=['probs'], dynamic_shapes=shapes,
                                verbose=False)
    program.model.metadata_props.update({k: json.dumps(v) for k,v in notes.items()})
    return program.model_proto.SerializeToString()


def _torch_export(module, example, shapes, notes):
    out = io.BytesIO()
    torch.export.save(torch.export.export(module, (example,), dynamic_shapes=shapes), out, extra_files={'model.json': json.dumps(notes)})
    return out.getvalue()

_formats = dict(onnx=('model.onnx', _onnx), torch_export=('model.pt2', _torch_export))


def export_model(
    model, # What `as_trained` takes
    folder:str|Path, # Made if need be
    format:str='onnx', # 'onnx': model.onnx; 'torch_export': model.pt2
    overwrite:bool=False, # Replace a file that is already there?
) -> Path: # The file; the same name with .json is beside it: size, scales, encoding
    "Write a network for other programs: photos (batch,3,size,size) float32, RGB in [0,1] → probs (batch,n_out)"
    if format not in _formats: raise DataError(f"there is no format {format!r}; there is {', '.join(_formats)}")
    t, (name, write) = as_trained(model), _formats[format]
    n_out = t.net.fc.out_features
    notes = dict(size=t.size, scales=list(paper_scales(t.size)), encoding=t.labels.encoding)
    if t.temperature != 1: notes['temperature'] = t.temperature                   # for the mean over crops, which the file does not take
    if t.min_prob is not None: notes['min_prob'] = t.min_prob
    module = PhotoProbs(_filled(_shell(t.arch, n_out, t.net_args), _weights(t.net)), t.stats).eval()
    with _quietly(): data = write(module, torch.zeros(2, 3, t.size, t.size), ({0: torch.export.Dim('batch', min=1)},), notes)
    return _put(folder, {name + '.json': json_bytes(notes), name: data}, overwrite)/name

imagenet_stats = ColorStats(imagenet_mean, (.2175, .0188, .0045),     # as torchvision and the authors' successors publish them
                            ((-.5675, .7192, .4009), (-.5808, -.0045, -.8140), (-.5836, -.6948, .4203)))


def from_torchvision(
    source, # What `read_weights` takes: a state dict, a .pth, .pt or .safetensors file, 'imagenet', …; it needs a head
    label_encoding:str|Path|dict, # {label: index}, or a JSON file of it
    arch:str|None=None, # 'resnet18' … 'resnet152'; None: the one that fits
    stats:ColorStats|None=None, # Its mean is what was subtracted in training; None: what is known, or ImageNet's
    std:tuple|None=None, # (3,): what was divided by in training; None: what is known, or ImageNet's
    size:int=224, # Side of the crops, pixels
) -> Trained: # Takes x/255 - mean, like every network here
    "Weights from elsewhere as a model that predicts, with their own head; a `DataError` where something does not fit"
    w = read_weights(source, arch, None if stats is None else stats.mean, std)
    if not w.n_out: raise DataError(f"{w.origin} has no head, so it predicts nothing; train one: ResNet(…, weights=…)")
    labels = LabelMap({}, label_encoding)
    labels.vocab(w.n_out)
    stats = stats or ColorStats(w.mean, imagenet_stats.eigval, imagenet_stats.eigvec)
    net, training = _filled(_shell(w.arch, w.n_out, w.net_args), w.state), dict(origin='taken over from ' + w.origin, weights=w.facts())
    return Trained(net, w.arch, dict(w.net_args), labels, stats, size, pd.DataFrame(), training)


def to_torchvision(
    model, # What `as_trained` takes; with torchvision's strides, or of 18 or 34 layers
    path:str|Path|None=None, # A .pth, .pt or .safetensors file to write as well
    std:tuple|None=None, # (3,): what the pixels will be divided by after subtracting the mean; None: nothing
    overwrite:bool=False, # Replace a file that is already there?
) -> dict: # {name: tensor}, copies on the CPU
    "A model's weights for torchvision's network of the same name; a `DataError` where it has none"
    t = as_trained(model)
    say = {'strides': "the stride of its bottlenecks is in the first 1×1 convolution (v1), torchvision's in the 3×3 (v1.5); train with "
                      "net_args=dict(stride_at='3x3')", 'none': "torchvision has no such network"}
    if why := say.get(torchvision_kin(t.arch, t.net_args)): raise DataError(f"{t.arch} cannot become torchvision's: {why}")
    weights = {k: v.clone() for k,v in _weights(t.net).items()}
    if std is not None: weights = scaled(weights, std)
    if path is not None:
        data = io.BytesIO()
        if Path(path).suffix == '.safetensors': data.write(safetensors.torch.save(weights))
        else: torch.save(weights, data)
        _put(Path(path).parent, {Path(path).name: data.getvalue()}, overwrite)
    return weights
