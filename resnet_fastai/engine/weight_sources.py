"Where weights come from: torchvision's by name into torch.hub's cache, Hugging Face's repositories, files, folders, models in memory"
import os
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from .download import _download, _is_page
from .files import DataError, atomic_write, read_json_object, sha256_of
from .loader import join_processes, local_rank0_first
from .weights import (Weights, archs, assembled, check_arch, first_line, hash_of_tensors, imagenet_labels, of_model, of_timm, read_folder,
                      read_tensors, rows_of, unwrapped)


# ── torchvision ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

def torchvision_file(
    arch: str, # 'resnet18' … 'resnet152'
    version: str|None=None, # 'v1', 'v2'; None: torchvision's own choice
) -> tuple: # (URL, whose name ends in the first digits of its SHA-256; torchvision's name of the weights)
    "Where torchvision's ImageNet weights lie"
    from torchvision.models import get_model_weights
    check_arch(arch, "torchvision's ImageNet weights")
    every = get_model_weights(arch)
    name = f'IMAGENET1K_{version.upper()}' if version else every.DEFAULT.name
    if name not in every.__members__:
        raise DataError(f"torchvision has no weights {version!r} of {arch}; there is "
                        f"{', '.join(m[-2:].lower() for m in every.__members__)}")
    return every[name].url, f'{every.__name__}.{name}'


def known_file(
    name: str, # Of a file
    sha256: str, # Of what it holds
) -> tuple|None: # (arch, torchvision's name of the weights, URL)
    "Is it one of torchvision's files, whole?"
    from torchvision.models import get_model_weights
    if not (m := re.fullmatch(r'(resnet\d+)-([0-9a-f]{8})\.pth', name)) or m[1] not in archs or not sha256.startswith(m[2]): return None
    return next(((m[1], f'{type(w).__name__}.{w.name}', w.url) for w in get_model_weights(m[1]) if w.url.endswith('/' + name)), None)


def torchvision_weights(
    arch: str, # 'resnet18' … 'resnet152'
    version: str|None=None, # 'v1', 'v2'; None: torchvision's own choice
) -> Weights:
    "torchvision's ImageNet weights from torch.hub's cache, fetched if need be; their checksum is looked at each time"
    url,name = torchvision_file(arch, version)
    dest = Path(torch.hub.get_dir())/'checkpoints'/url.rpartition('/')[2]
    wanted = re.search(r'-([0-9a-f]{8,64})\.', dest.name)[1]
    join_processes()
    with local_rank0_first():
        if not dest.exists(): _fetch(url, dest, wanted)
    if not (sha := sha256_of(dest)).startswith(wanted):
        raise DataError(f"{dest} is not the file of this name: its SHA-256 begins with {sha[:8]}, not {wanted}; delete it, and it is "
                        "fetched again")
    return of_torchvision(dest, sha, arch, name, url)


def of_torchvision(
    path: Path, # A file that is known to be torchvision's
    sha256: str, # Its own
    arch: str, # 'resnet18' … 'resnet152'
    name: str, # What torchvision calls it
    url: str, # Where it comes from
) -> Weights:
    "`Weights` of a file of torchvision's"
    return assembled(unwrapped(read_tensors(path), str(path)), str(path), sha256, arch, labels=rows_of(imagenet_labels()), size=224,
                     licence="BSD-3-Clause (torchvision); ImageNet's terms may apply", scaling='torchvision',
                     origin=f'torchvision {name}, {url}')


def _fetch(url, dest, wanted):
    "Download a file whole, or not at all"
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(dest) as part:
            with open(part, 'wb') as f: sha = _download(url, f)
            if sha.startswith(wanted): return
            with open(part, 'rb') as f: page = _is_page(f.read(512))
            what = 'a web page (a login?)' if page else f'a file whose SHA-256 begins with {sha[:8]}, not {wanted}'
            raise DataError(f"{url} gave {what}")
    except OSError as e: raise DataError(f"{dest} cannot be written: {e.strerror or e}; set TORCH_HOME to a folder that can be") from None
    except DataError as e:
        raise DataError(f"{str(e).removesuffix('; try again')}. Without a network: download it elsewhere and put it there as {dest}; or "
                        "pass as "
                        "weights a .pth or .safetensors file, the folder of a saved model, or a Hugging Face name that is in its "
                        "cache") from None


# ── Hugging Face ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

names = re.compile(r'(?:hf:|hf-hub:|hf_hub:)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?')     # user/name, of a branch, a tag or a commit


def _hub_file(repo, revision, name, needed=True):
    "A file of a repository, from the cache or the network; None where it does not exist and is not needed"
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError
    try: return Path(hf_hub_download(repo, name, revision=revision))
    except Exception as e:                                                      # its own, and those of the HTTP client that it uses today
        if not needed and isinstance(e, EntryNotFoundError): return None
        raise DataError(f"{name} of {repo} cannot be had from Hugging Face ({constants.ENDPOINT}/{repo}): {first_line(e)}. Without a "
                        "network: "
                        f"fill its cache ({constants.HF_HUB_CACHE}) elsewhere, or pass as weights the file, or a folder with config.json "
                        "and "
                        "model.safetensors") from None


def _need_hub(repo):
    if find_spec('huggingface_hub') is None:
        raise DataError(f'{repo} is a Hugging Face name, which needs huggingface_hub: pip install "resnet_fastai[hub]"; '
                        'or download the file, and pass its path')


def hub_weights(
    repo: str, # 'user/name'
    revision: str|None=None, # Branch, tag or commit; None: the newest
) -> Weights:
    "`Weights` of a Hugging Face repository: timm's, transformers' or of this project"
    _need_hub(repo)
    join_processes()
    with local_rank0_first():
        config = _hub_file(repo, revision, 'config.json')
        c = read_json_object(config)
        if 'architecture' in c: of_timm(c, repo)                                # refuses another network before it is fetched
        weights = _hub_file(repo, revision, 'model.safetensors', needed=False) or _hub_file(repo, revision, 'pytorch_model.bin')
        for name in ('preprocessor_config.json', 'README.md'): _hub_file(repo, revision, name, needed=False)
    _same_blob(weights)
    return replace(read_folder(config.parent, repo), origin=f'Hugging Face {repo}, revision {config.parent.name[:12]}')


def model_folder(
    source: str|Path, # A folder, or 'hf:user/name', 'hf:user/name@revision'
) -> Path:
    "The folder of a saved model; one of Hugging Face's is fetched into its cache, config.json and model.safetensors only"
    text = Path(source).as_posix()
    if not (m := names.fullmatch(text)) or not text.startswith(('hf:', 'hf-hub:', 'hf_hub:')): return Path(source)
    _need_hub(m[1])
    join_processes()
    with local_rank0_first():
        config = _hub_file(m[1], m[2], 'config.json')
        if not {'format', 'encoding', 'weights_sha256'} <= read_json_object(config).keys():
            raise DataError(f"{m[1]} holds no model that this project saved; ResNet(…, weights={text!r}) starts from its weights, if it "
                            "is a ResNet")
        weights = _hub_file(m[1], m[2], 'model.safetensors')
    _same_blob(weights)
    if weights.parent != config.parent: raise DataError(f"{m[1]} has changed meanwhile; load it again, or name a revision: {text}@…")
    return config.parent


def _same_blob(path):
    "The cache names large files by their SHA-256: is this one still that?"
    wanted = os.path.basename(os.path.realpath(path))
    if re.fullmatch('[0-9a-f]{64}', wanted) and sha256_of(path) != wanted:
        raise DataError(f"{path} is damaged: its SHA-256 does not begin with {wanted[:8]}; delete it and the file that it links to, "
                        "and it is fetched again")


# ── The door ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def read_weights(
    source, # 'imagenet', 'imagenet:v1', a Hugging Face name, a file, a saved model's folder, a state dict, a `ResNet`
    arch: str|None=None, # What `build_net` calls the network; None: as the weights are, or resnet50 for 'imagenet'
    mean: tuple|None=None, # (3,): RGB in [0,1], for a file or a state dict; None: what is known, or ImageNet's
    std: tuple|None=None, # (3,): what was divided by in training, for a file or a state dict; None: what is known, or ImageNet's
    size: int|None=None, # Side of the training crops, pixels; None: what is known
    labels: dict|None=None, # {label: row of the head}; None: what is known
) -> Weights:
    "Weights from elsewhere, for a network of this project; a `DataError` says what is wrong with them"
    said = {k: v for k,v in dict(mean=mean, std=std).items() if v is not None}
    found = _found(source, arch, said | (dict(scaling='the caller') if said else {}))
    if arch and found.arch != arch:
        raise DataError(f"{found.origin} holds a {found.arch}, not a {arch}; leave arch out, or pass other weights")
    return replace(found, **{k: v for k,v in dict(size=size, labels=labels).items() if v is not None})


def _found(source, arch, said):
    "By what the source is"
    if isinstance(source, dict):
        state = unwrapped(source, 'the state dict')
        return assembled(state, 'the state dict', hash_of_tensors(state), arch, **said)
    if isinstance(source, (str, os.PathLike)) and Path(source).is_file(): return _of_file(Path(source), arch, said)
    found = _by_name(str(source), arch) if isinstance(source, (str, os.PathLike)) else _in_memory(source)
    if said: raise DataError(f"mean and std are those of {found.origin}; they can be given for a file or a state dict only")
    return found


def _by_name(text, arch):
    "A folder, or a name of torchvision's or Hugging Face's"
    if Path(text).is_dir(): return read_folder(Path(text), text)
    if m := re.fullmatch(r'imagenet(?::(v\d))?', text.lower()): return torchvision_weights(arch or 'resnet50', m[1])
    if (m := names.fullmatch(text)) and not re.search(r'\.(pth?|bin|ckpt|safetensors)$', text): return hub_weights(m[1], m[2])
    raise DataError(f"there is no file or folder {text[:80]!r}; names of weights are 'imagenet', 'imagenet:v1', 'imagenet:v2' and those of "
                    "Hugging Face, like 'timm/resnet50.a1_in1k'")


def _in_memory(source):
    "A `Weights`, or a model of this project: a `ResNet`, or what it knows of itself"
    if isinstance(source, Weights): return source
    t = getattr(source, 'trained', source)
    if all(hasattr(t, a) for a in ('net', 'arch', 'net_args', 'labels', 'stats', 'size')): return of_model(t)
    others = 'a name, a file, a folder, a state dict or a ResNet'
    what = "a network's state dict: net.state_dict()" if isinstance(source, nn.Module) else others
    raise DataError(f"weights is a {type(source).__name__}; pass {what}")


def _of_file(path, arch, said):
    "A file of weights; torchvision's own are known by name and checksum"
    sha = sha256_of(path)
    if not said and (known := known_file(path.name, sha)): return of_torchvision(path, sha, *known)
    if not said and path.name in ('model.safetensors', 'pytorch_model.bin') and (path.parent/'config.json').exists():
        return read_folder(path.parent, str(path.parent))
    if m := re.match(r'(resnet(?:aa|blur)\d+\w*)', path.name):
        raise DataError(f"{path} is timm's {m[1]}, which smooths where it halves the resolution and is no network of the paper")
    return assembled(unwrapped(read_tensors(path), str(path)), str(path), sha, arch, **said)
