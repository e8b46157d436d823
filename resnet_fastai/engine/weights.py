"""Weights from elsewhere: a name, a file, a folder, a state dict or a model becomes what a network of this project starts from.

Networks here take `x/255 - mean`. A division by a standard deviation is folded into the first convolution."""
import argparse
import hashlib
import json
import math
import os
import pickle
import re
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from fastai.data.transforms import Normalize
from safetensors import SafetensorError
from torch import nn

from .files import DataError, read_json_object, sha256_of

imagenet_mean, imagenet_std = (.485, .456, .406), (.229, .224, .225)
archs = tuple(f'resnet{d}' for d in (18, 34, 50, 101, 152))                     # that torchvision, timm and transformers have too


@dataclass(frozen=True)
class Weights:
    "A state dict for `build_net(arch, **net_args)`, and what is known about it"
    state: dict # {name: tensor}, float32 on the CPU; the network takes x/255 - mean
    arch: str # What `build_net` calls the network
    net_args: dict # More for `build_net`: stride_at, shortcut
    mean: tuple # (3,): RGB in [0,1], subtracted from the pixels
    std: tuple # (3,): what was divided by in training; already folded into the first convolution
    size: int|None # Side of the training crops, pixels; None: unknown
    labels: dict # {label: row of the head}; empty where the names are unknown
    origin: str # Where they come from, for people
    sha256: str # Of the file, or of the tensors where there is no file
    licence: str # '' where it is unknown
    scaling: str # Who says what mean and std are

    @property
    def n_out(self) -> int|None: # None: there is no head
        "Outputs of the head"
        return len(self.state['fc.bias']) if 'fc.bias' in self.state else None

    def __repr__(self): return f'Weights({self.arch}, {self.n_out or "no"} outputs, {self.origin})'

    def facts(self) -> dict: # Of str
        "What a model card says about them"
        return dict(origin=self.origin, sha256=self.sha256, licence=self.licence or 'unknown', scaling=self.scaling)


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def first_line(
    e, # An exception
    most: int=150, # Characters
) -> str:
    "What an exception says, on one line"
    return ' '.join(str(e).split())[:most] or type(e).__name__


def read_tensors(
    path: str|Path, # .pth, .pt, .bin or .safetensors
):
    "What a file of weights holds; runs no code of the file's. A `DataError` where it cannot be read"
    try:
        if Path(path).suffix == '.safetensors': return safetensors.torch.load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as z: bad = z.testzip()                  # torch.load does not look at the sums
            if bad: raise ValueError(f"{bad} in it is damaged")
        with torch.serialization.safe_globals([argparse.Namespace]):            # options, as training scripts store them: data, no code
            return torch.load(path, map_location='cpu', weights_only=True)
    except OSError as e: raise DataError(f"{path} cannot be read: {e.strerror or first_line(e)}") from None
    except pickle.UnpicklingError:
        raise DataError(f"{path} is cut short, or holds more than tensors and numbers; if you trust it, save its weights alone") from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, MemoryError, EOFError, SafetensorError,
            zipfile.BadZipFile) as e:
        raise DataError(f"{path} is no checkpoint: {first_line(e)}") from None


def hash_of_tensors(
    state: dict, # {name: tensor}
) -> str: # 64 hexadecimal digits
    "SHA-256 of names and values, for weights that have no file"
    sha = hashlib.sha256()
    for k in sorted(state):
        sha.update(k.encode() + b'\0')
        sha.update(state[k].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


# ── State dicts as people have them ──────────────────────────────────────────────────────────────────────────────────────────

_nests = ('state_dict', 'model_state_dict', 'model', 'net', 'network')
_prefixes = re.compile(r'(?:module\.|model\.|_orig_mod\.|net\.|timm_model\.)+')


def _is_state(o): return isinstance(o, dict) and o and all(isinstance(k, str) and torch.is_tensor(v) for k,v in o.items())


def unwrapped(
    o, # What a file holds
    name: str, # What to call it in an error message
) -> dict: # {name: tensor}
    "The state dict inside what training scripts save, without the prefixes of wrappers"
    if isinstance(o, dict) and {'format', 'run', 'ranks'} <= o.keys():
        raise DataError(f"{name} is a checkpoint of a run here, which does not hold the mean of its photos; "
                        "go on with it by fit(…, resume=True), or save the model and name its folder")
    for _ in range(4):
        if _is_state(o) or not isinstance(o, dict): break
        o = next((o[k] for k in _nests if isinstance(o.get(k), dict)), None)
    if not _is_state(o): raise DataError(f"{name} is no state dict; {{name: tensor}} is needed")
    return {_prefixes.sub('', k, 1) if _prefixes.match(k) else k: v for k,v in o.items()}


def _in_32_bits(state):
    "On the CPU, in 32 bits"
    state = {k: v.detach().cpu() for k,v in state.items()}
    return {k: v.float() if v.is_floating_point() else v for k,v in state.items()}


_transformers = [ # resnet.embedder.embedder.{convolution,normalization}, resnet.encoder.stages.S.layers.L.{shortcut,layer.I}.…
    (r'embedder\.embedder\.(convolution|normalization)\.(\w+)', lambda m: f'{_part[m[1]]}1.{m[2]}'),
    (r'encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.(convolution|normalization)\.(\w+)',
     lambda m: f'layer{int(m[1]) + 1}.{m[2]}.downsample.{int(m[3] == "normalization")}.{m[4]}'),
    (r'encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.(convolution|normalization)\.(\w+)',
     lambda m: f'layer{int(m[1]) + 1}.{m[2]}.{_part[m[4]]}{int(m[3]) + 1}.{m[5]}'),
    (r'classifier\.1\.(weight|bias)', lambda m: f'fc.{m[1]}')]
_part = dict(convolution='conv', normalization='bn')


def _from_transformers(key):
    "torchvision's name of one of transformers' tensors; the same where it has no counterpart"
    k = key.removeprefix('resnet.').removeprefix('backbone.')
    return next((rename(m) for pattern,rename in _transformers if (m := re.fullmatch(pattern, k))), key)


def _other_kind(w):
    "Which relative of ResNet has such tensors; '' where none is recognised"
    shape = lambda k: tuple(w[k].shape) if k in w else ()
    if 'conv1.0.weight' in w: return "its stem has three 3×3 convolutions, like timm's resnet50c, d, s and t"
    if any('.se.' in k or '.attn.' in k for k in w): return "its blocks have attention, like timm's seresnet50"
    if len(shape('layer2.0.downsample.1.weight')) == 4: return "its shortcuts average before they project, like timm's resnet50d"
    if 'bn1.weight' in w and 'bn1.running_mean' not in w: return "it has no statistics of batch normalisation (another normalisation?)"
    first = shape('layer1.0.conv2.weight')
    if 'layer1.0.conv3.weight' in w and len(first) == 4:
        if first[1] != first[0]: return "its convolutions have groups, like ResNeXt's"
        if first[0] != 64: return "its blocks have another width, like wide_resnet50_2's"
    if shape('conv1.weight')[1:2] not in ((), (3,)): return f"its first convolution takes {shape('conv1.weight')[1]} channels, not RGB"
    if any(re.match(r'0\.\d+\.', k) for k in w): return "its layers are numbered, like those of fastai's vision_learner"
    return ''


def misfit(
    state: dict, # {name: tensor}
    wanted: dict, # {name: tensor}, the network's own
) -> str: # '' where all fit
    "What is wrong with the first tensor that does not fit"
    for k,v in wanted.items():
        if k not in state: return f"{k} is missing"
        w = state[k]
        if w.shape != v.shape: return f"{k} has the shape {tuple(w.shape)}, not {tuple(v.shape)}"
        if w.dtype != v.dtype: return f"{k} is {w.dtype}, not {v.dtype}"
        if not torch.isfinite(w).all(): return f"{k} holds what is no number"
    return next((f"{k} has no place in the network" for k in state if k not in wanted), '')


def check_arch(
    arch: str|None, # None: any
    name: str, # Who is asked for it
):
    "A `DataError` where torchvision has no network of this name"
    if arch and arch not in archs: raise DataError(f"{name} has no network {str(arch)[:80]!r}; it has {', '.join(archs)}")


def torchvision_state(
    state: dict, # {name: tensor}: of torchvision, timm or transformers
    name: str, # What to call it in an error message
    arch: str|None=None, # 'resnet18' … 'resnet152'; None: the one that fits
) -> tuple: # ('resnet18' …, {torchvision's name: tensor}); without a head where there is none
    "Recognise a ResNet by its tensors; a `DataError` that says what does not fit"
    from torchvision.models import get_model
    check_arch(arch, 'torchvision')
    w = _in_32_bits(state)
    if any('embedder.embedder.' in k for k in w): w = {_from_transformers(k): v for k,v in w.items()}
    n_out = len(w['fc.bias']) if 'fc.bias' in w and w['fc.bias'].ndim == 1 else 1000
    with torch.device('meta'): nets = {a: get_model(a, num_classes=n_out).state_dict() for a in ([arch] if arch else archs)}
    best = max(nets, key=lambda a: (sum(k in w and w[k].shape == v.shape for k,v in nets[a].items()), -len(nets[a])))
    wanted = {k: v for k,v in nets[best].items() if not k.startswith('fc.') or any(k.startswith('fc.') for k in w)}
    w = {k: torch.tensor(0) for k in wanted if k.endswith('num_batches_tracked')} | w      # old checkpoints have none
    if not (wrong := misfit(w, wanted)): return best, w
    kind, nearest = _other_kind(w), '' if arch else f', the nearest of {len(archs)}'
    raise DataError(f"{name} does not hold the weights of torchvision's {best}{nearest}: {kind + '; ' if kind else ''}{wrong}")


def scaled(
    state: dict, # {name: tensor}
    factor, # (3,): one for each input channel
) -> dict: # The same, but for the first convolution
    "Weights with the first convolution's input channels multiplied"
    return state | {'conv1.weight': state['conv1.weight']*torch.as_tensor(factor, dtype=torch.float64).float()[:,None,None]}


# ── Folders with a config.json ───────────────────────────────────────────────────────────────────────────────────────────────

def imagenet_labels() -> list: # 1000 names, in the order of the outputs
    "ImageNet's classes as torchvision names them"
    from torchvision.models import ResNet18_Weights
    return ResNet18_Weights.DEFAULT.meta['categories']


def rows_of(
    names: Iterable[str], # Of the outputs, in their order
) -> dict: # {label: row}
    "The row of each name; a name that stands for two rows is left out"
    names = list(names)
    many = Counter(names)
    return {n: i for i,n in enumerate(names) if many[n] == 1}


def _three(values, what, name):
    "Three numbers as floats"
    try: found = tuple(float(v) for v in values)
    except (TypeError, ValueError): found = ()
    if len(found) == 3 and all(map(math.isfinite, found)) and (what == 'mean' or min(found) > 0): return found
    raise DataError(f"{name} gives the {what} {str(values)[:80]!r}; three numbers are needed")


def of_timm(
    c: dict, # What timm's config.json holds
    name: str, # What to call it in an error message
) -> dict: # Arguments for `assembled`
    "What timm's config.json says; a `DataError` where it is of another network"
    arch, cfg = str(c['architecture']).removeprefix('tv_'), c.get('pretrained_cfg') or c
    if arch not in archs: raise DataError(f"{name} is timm's {arch[:40]}, which is no network of the paper; those are {', '.join(archs)}")
    names = c.get('label_names') or cfg.get('label_names')
    known = cfg.get('num_classes') == 1000 and str(cfg.get('tag', name)).endswith('in1k')
    labels = rows_of(map(str, names)) if isinstance(names, list) else rows_of(imagenet_labels()) if known else {}
    size = cfg['input_size'][-1] if isinstance(cfg.get('input_size'), list) and cfg['input_size'] else None
    return dict(arch=arch, mean=cfg.get('mean', imagenet_mean), std=cfg.get('std', imagenet_std), labels=labels, size=size,
                licence=str(cfg.get('license') or ''), scaling='its configuration')


def _of_transformers(c, name, folder):
    "What transformers' config.json and preprocessor_config.json say"
    if c.get('model_type') != 'resnet': raise DataError(f"{name} is of the kind {str(c.get('model_type'))[:40]!r}; 'resnet' is needed")
    if c.get('downsample_in_first_stage') or c.get('hidden_act', 'relu') != 'relu':
        raise DataError(f"{name} is a ResNet with a stride in its first stage, or with another activation than relu; those are none of "
                        "the paper's")
    there = (folder/'preprocessor_config.json').exists()
    pre = read_json_object(folder/'preprocessor_config.json') if there else {}
    size = pre.get('crop_size') or pre.get('size')
    if isinstance(size, dict): size = size.get('height') or size.get('shortest_edge')
    ids = c.get('id2label') if isinstance(c.get('id2label'), dict) else {}
    full = {str(v): int(k) for k,v in ids.items() if str(k).isdecimal() and not re.fullmatch(r'LABEL_\d+', str(v))}
    # 'tench, Tinca tinca': also by the first name, if it is one class's
    many = Counter(v.split(',')[0] for v in full)
    first = {s: i for v,i in full.items() if many[s := v.split(',')[0]] == 1}
    return dict(mean=pre.get('image_mean', imagenet_mean), std=pre.get('image_std', imagenet_std), labels=first | full, size=size,
                stride_at='1x1' if c.get('downsample_in_bottleneck') else '3x3',
                scaling='its configuration' if there else "assumed: ImageNet's")


def _licence(folder):
    "What the front matter of README.md says"
    try: text = (folder/'README.md').read_text(encoding='utf-8')[:4000]
    except (OSError, ValueError): return ''
    found = re.search(r'^license:[ \t]*([\w.-]+)', text[3:].partition('\n---')[0], re.MULTILINE) if text.startswith('---') else None
    return found[1] if found else ''


def read_folder(
    folder: Path, # Of `save`, or with the config.json of timm or transformers
    name: str, # What to call it
) -> Weights:
    "The weights of a folder, and what its config.json says about them"
    if not (folder/'config.json').exists():
        raise DataError(f"{folder} has no config.json; name a saved model's folder, or a file of weights")
    c = read_json_object(folder/'config.json')
    if 'weights_sha256' in c: return _of_saved(folder, c)
    said = of_timm(c, name) if 'architecture' in c else _of_transformers(c, name, folder)
    file = next((folder/n for n in ('model.safetensors', 'pytorch_model.bin') if (folder/n).exists()), None)
    if not file: raise DataError(f"{folder} has neither model.safetensors nor pytorch_model.bin")
    if licence := _licence(folder): said['licence'] = licence
    return assembled(unwrapped(read_tensors(file), name), name, sha256_of(file), **said)


def assembled(
    state: dict, # {name: tensor}: of torchvision, timm or transformers
    name: str, # What to call it in an error message
    sha256: str, # Of its file
    arch: str|None=None, # 'resnet18' … 'resnet152'; None: the one that fits
    mean=imagenet_mean, std=imagenet_std, # (3,): what was subtracted and divided by in training, RGB in [0,1]
    size: int|None=None, # Side of the training crops, pixels
    labels: dict|None=None, # {label: row of the head}
    stride_at: str='3x3', # Which convolution of a bottleneck has the stride
    licence: str='', # '' where it is unknown
    scaling: str="assumed: ImageNet's", # Who says what mean and std are
    origin: str|None=None, # Where it comes from; None: its name
) -> Weights:
    "`Weights` of a state dict in any of the layouts"
    arch, state = torchvision_state(state, name, arch)
    mean, std = _three(mean, 'mean', name), _three(std, 'std', name)
    rows = len(state['fc.bias']) if 'fc.bias' in state else 0
    labels = {k: i for k,i in (labels or {}).items() if 0 <= i < rows}
    size = size if type(size) is int and 1 <= size <= 10_000 else None
    net_args = {} if arch in archs[:2] else dict(stride_at=stride_at)
    return Weights(scaled(state, [1/s for s in std]), arch, net_args, mean, std, size, labels, origin or name, sha256, licence, scaling)


# ── Models of this project ───────────────────────────────────────────────────────────────────────────────────────────────────

def json_bytes(obj) -> bytes:
    "JSON as bytes; half a character, which JSON allows and UTF-8 does not, stays an escape"
    return json.dumps(obj, ensure_ascii=False, indent=1, allow_nan=False).encode('utf-8', 'backslashreplace')


def config_sum(
    c: dict, # What config.json holds
) -> str: # 64 hexadecimal digits
    "SHA-256 of a saved model's settings, but for the entry of that name"
    return hashlib.sha256(json_bytes({k: c[k] for k in sorted(c) if k != 'sha256'})).hexdigest()


def saved_tensors(
    path: Path, # model.safetensors
    c: dict, # What config.json holds
) -> dict: # {name: tensor}
    "The tensors of a saved model, once it is known to be the right file; a `ValueError` otherwise"
    size, wanted = os.path.getsize(path), c.get('weights_bytes')
    if wanted not in (None, size): raise ValueError(f"model.safetensors has {size:,} bytes; config.json was written for one of {wanted}")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != c['weights_sha256']:
        raise ValueError("model.safetensors is not the file that config.json was written for")
    return safetensors.torch.load(data)


def _of_saved(folder, c):
    "`Weights` of a folder that `save` wrote"
    try:
        if c.get('format') not in (1, 2): raise ValueError(f"its format is {str(c.get('format'))[:20]!r}, and this version reads 1 and 2")
        if c['format'] == 2 and c.get('sha256') != config_sum(c):
            raise ValueError("config.json has been changed since it was saved, or is damaged")
        state = saved_tensors(folder/'model.safetensors', c)
        return Weights(state, str(c['arch']), dict(c['net_args']), _three(c['stats']['mean'], 'mean', 'config.json'), (1., 1., 1.),
                       int(c['size']), {str(k): int(i) for k,i in c['encoding'].items()}, f'the saved model {folder}',
                       str(c['weights_sha256']), _licence(folder), 'the model')
    except OSError as e: raise DataError(f"{folder} holds no saved model: {e.filename or folder}: {e.strerror or e}") from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, MemoryError, SafetensorError) as e:
        raise DataError(f"{folder} holds no whole model: {first_line(e, 300)}") from None


def of_model(
    t, # A `Trained`: net, arch, net_args, labels, stats, size
    origin: str='a model in memory', # Where it comes from
) -> Weights:
    "`Weights` of a model of this project"
    state = {k: v.clone() for k,v in _in_32_bits(t.net.state_dict()).items()}
    return Weights(state, t.arch, dict(t.net_args), tuple(map(float, t.stats.mean)), (1., 1., 1.), t.size, dict(t.labels.encoding), origin,
                   hash_of_tensors(state), '', 'the model')


# ── Into a network ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def _simple(label): return re.sub(r'[\W_]+', ' ', unicodedata.normalize('NFKC', str(label)).casefold()).strip()


def _by_simple(labels):
    "{simplified label: label}, where only one label is simplified to it"
    simple = [(_simple(l), l) for l in labels]
    many = Counter(s for s,_ in simple)
    return {s: l for s,l in simple if s and many[s] == 1}


def agreeing_rows(
    theirs: dict, # {label: row of the head}
    ours: dict, # {label: index}
) -> dict: # {our index: their row}
    "Labels that two models share: by name, but for case, spaces, underscores and punctuation"
    known = _by_simple(theirs)
    alike = {label: known[s] for s,label in _by_simple(ours).items() if s in known}
    return {i: theirs[label if label in theirs else alike[label]] for label,i in ours.items() if label in theirs or label in alike}


def load_into(
    net: nn.Module, # Of `build_net`, its head freshly drawn; changed in place
    weights: Weights, # Of `read_weights`
    labels: dict, # {label: index}
) -> int: # How many labels keep their row of the head
    "Give a network these weights; rows of the head are kept where labels agree by name, the others stay as they were drawn"
    own = net.state_dict()
    head = {k: v for k,v in own.items() if k.startswith('fc.')}
    state = {k: v for k,v in weights.state.items() if not k.startswith('fc.')} | head
    if wrong := misfit(state, own): raise DataError(f"{weights.origin} does not fit the network that is asked for: {wrong}")
    net.load_state_dict(state)
    kept = agreeing_rows(weights.labels, labels) if weights.n_out else {}
    with torch.no_grad():
        for i,row in kept.items(): net.fc.weight[i], net.fc.bias[i] = weights.state['fc.weight'][row], weights.state['fc.bias'][row]
    return len(kept)


def start_from(
    net: nn.Module, # Of `build_net`, freshly drawn; changed in place
    dls, # fastai's DataLoaders; they subtract the weights' mean from now on
    weights: Weights|None, # Of `read_weights`; None: nothing is changed
    net_args: dict, # What the network was built with
) -> dict: # What a model card says about it
    "Give a network its weights and its loaders the mean that belongs to them"
    if weights is None: return {}
    for k,v in weights.net_args.items():
        if net_args.get(k, v) != v: raise DataError(f"{weights.origin} was trained with {k}={v!r}, not {net_args[k]!r}; leave {k} out")
    labels = dls.labels.encoding if hasattr(dls, 'labels') else {str(name): i for i,name in enumerate(dls.vocab)}
    kept = load_into(net, weights, labels)
    centre(dls, net, weights)
    return weights.facts() | dict(head=f"{'all' if kept == len(labels) else kept} of {len(labels)} labels keep their row")


def _refuse_taken(dls, weights, same=False):
    "An earlier learner over these loaders would compute with another mean from here on"
    if getattr(dls, 'taken', False) and not same:
        raise DataError(f"another learner has these loaders already, and {weights.origin} needs a mean of its own; make loaders anew for "
                        "each learner, which is quick the second time")


def centre(
    dls, # fastai's DataLoaders; changed in place
    net: nn.Module, # Has these weights; its first convolution takes on the division of a `Normalize`
    weights: Weights,
):
    "Let loaders subtract the mean that the weights were trained with; lighting stays that of the photos"
    fs = [t for dl in dls.loaders for t in dl.after_batch.fs]
    if hasattr(dls, 'stats'):
        _refuse_taken(dls, weights, np.allclose(dls.stats.mean, weights.mean, atol=1e-6))
        dls.stats = type(dls.stats)(weights.mean, dls.stats.eigval, dls.stats.eigvec, dls.stats.n_photos)
        for t in fs:
            if isinstance(getattr(t, 'mean', None), torch.Tensor):
                t.mean = torch.tensor(weights.mean, dtype=t.mean.dtype, device=t.mean.device)
        return
    mean = torch.tensor(weights.mean)
    if not (norms := [t for t in fs if isinstance(t, Normalize)]):
        _refuse_taken(dls, weights)
        return dls.add_tfms([Normalize.from_stats(mean, torch.ones(3))], 'after_batch')
    for t in norms:
        if t.mean.numel() != 3 or (t.mean.flatten().cpu() - mean).abs().max() > 5e-3:
            raise DataError(f"these loaders subtract the mean {t.mean.flatten().tolist()}; {weights.origin} was trained with "
                            f"{weights.mean}: "
                            f"use Normalize.from_stats({weights.mean}, {weights.std})")
    with torch.no_grad(): net.conv1.weight *= norms[0].std.flatten().to(net.conv1.weight)[:,None,None]
