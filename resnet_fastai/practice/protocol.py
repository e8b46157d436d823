"""Which crops to predict with: measured on the validation photos, kept in the model, and used from then on"""
from contextlib import suppress

import numpy as np
import pandas as pd
from fastai.imports import noop
from fastai.torch_core import rank_distrib
from fastcore.foundation import L

from ..engine.calibration import log_loss
from ..engine.files import DataError
from ..engine.protocols import protocols as tried, split_protocol
from ..engine.scores import wilson
from ..engine.splits import labelled_split, model_parts
from ..inference import _answers, paper_scales


def protocol_scales(
    protocol:str, # '1crop', '10crop', '50crop', 'dense'; or at lengths of its own: '10crop@110,128'
    size:int=224, # Side of the crops, pixels
) -> tuple: # ('1crop', '10crop', '50crop' or 'dense'; lengths of the shorter side, pixels)
    "What a protocol does: its kind, and the lengths to which it resizes a photo"
    kind, scales = split_protocol(protocol, size)
    usual = paper_scales(size)
    return kind, scales or (usual if kind in ('50crop', 'dense') else usual[1:2])


def sides_of_training(
    dls, # Of `resnet_dls`
) -> tuple: # (shortest, longest), pixels
    "Between which short sides training draws"
    crop = next((t for t in dls.after_item.fs if hasattr(t, 'min_side') and hasattr(t, 'max_side')), None)
    return (crop.min_side, crop.max_side) if crop else (dls.size, dls.size)


def training_scales(
    low:int, # Shortest short side that training draws, pixels
    high:int, # Longest
    size:int, # Side of the crops, pixels
) -> tuple: # Up to three lengths, pixels: the shortest, a quarter and half of the way to the longest
    "Short sides that training has seen"
    return tuple(dict.fromkeys(max(size, round(low + q*(high - low))) for q in (0, .25, .5)))


def candidates(
    low:int, # Shortest short side that training draws, pixels
    high:int, # Longest
    size:int, # Side of the crops, pixels
) -> list: # Of protocols
    "The paper's protocols, and the same at the scales of the training"
    scales = training_scales(low, high, size)
    least, every = scales[0], ','.join(map(str, scales))
    some = [f'{crops}@{side}' for crops in ('1crop', '10crop') for side in (size, least)]         # at `size` a crop shows most of the photo
    named = {protocol_scales(p, size): p for p in [f'dense@{every}', f'10crop@{every}', *some, *tried]}      # one name for what is the same
    return list(named.values())[::-1]


def _to_try(model):
    "The candidates for a `ResNet`; a loaded one keeps the short sides of its training"
    if learn := getattr(model, 'learn', None): return candidates(*sides_of_training(learn.dls), learn.dls.size)
    sides = model.trained.training.get('short_sides')
    return candidates(*sides, model.size) if sides else list(tried)


def _number_of_crops(protocol, size):
    kind, scales = protocol_scales(protocol, size)
    return len(scales)*dict(dense=2).get(kind, 1 if kind == '1crop' else 10)


def measure(
    model, # A `ResNet`, or a learner over `resnet_dls`
    protocols:str|list, # As for `evaluate`
    split:str='val', # Whose photos
    data_path=None, # Photos of another place than the model's own
    label_path=None, # Their labels
    precision:str|None=None, # 'fp32', 'bf16' or 'fp16'; None: the fastest that the hardware has
) -> pd.DataFrame: # A row a protocol, the best first: protocol, photos, top1_error, top1_low, top1_high, log_loss, crops
    "Error with its 95 % interval, log loss and cost of each protocol on photos with labels"
    parts, rows, protocols = model_parts(model), [], list(L(protocols))
    photos, targ = labelled_split(parts, split, data_path, label_path)
    kinds = {p: split_protocol(p, parts.size)[0] for p in protocols}            # or its error
    crops = [p for p in protocols if kinds[p] != 'dense']
    for some in [crops]*bool(crops) + [[p] for p in protocols if p not in crops]:
        probs = np.stack(list(_answers(parts, photos, some, precision=precision)), 1)
        for protocol,p in zip(some, probs):
            wrong = int((p.argmax(1) != targ).sum())
            low, high = wilson(wrong, len(targ))
            rows.append(dict(protocol=protocol, photos=len(targ), top1_error=wrong/len(targ), top1_low=low, top1_high=high,
                             log_loss=log_loss(p, targ), crops=_number_of_crops(protocol, parts.size)))
    return pd.DataFrame(rows).sort_values(['top1_error', 'log_loss'], ignore_index=True)


def choose_protocol(
    model, # A `ResNet`; its predictions follow the choice from now on
    protocols:str|list|None=None, # As for `evaluate`; None: the paper's, and the same at the scales of the training
    data_path=None, # For a loaded model: photos with a val/ folder
    label_path=None, # Their labels
    precision:str|None=None, # 'fp32', 'bf16' or 'fp16'; None: the fastest that the hardware has
) -> pd.DataFrame: # What `measure` gives; the first row is the choice
    "Choose the protocol with the smallest error on the validation photos; of equal ones, that with the smaller log loss"
    if protocols is None: protocols = _to_try(model)
    if not protocols: raise DataError("there is no protocol to choose from; name some, or leave protocols out")
    found = measure(model, protocols, 'val', data_path, label_path, precision)
    model.protocol = str(found.protocol[0])
    return found


def hint(
    learn, # Of `resnet_learner`, fitted
    seconds:float=3, # That the look may take, by the time of the last epoch
    least:int=100, # So few photos tell nothing
) -> str: # '' where nothing can be said
    "Does the photo as training saw it give clearly fewer errors than the usual 50 crops? Only asked where it costs a few seconds"
    photos, rows = getattr(learn.dls, 'photos', {}).get('val', ()), learn.history.rows
    if rank_distrib() or learn.logger == noop or not rows or learn.protocol != '50crop' or len(photos) < least: return ''
    a_photo = rows[-1]['seconds']/(3*len(learn.dls.photos['train']) + len(photos))     # a training step costs three forward passes
    if a_photo*52*least > seconds: return ''
    few = photos[np.linspace(0, len(photos) - 1, min(len(photos), int(seconds/52/a_photo))).astype(int)]
    other = f'1crop@{training_scales(*sides_of_training(learn.dls), learn.dls.size)[0]}'
    parts, labels = model_parts(learn), learn.dls.labels
    targ = np.array([labels.encoding[labels(p)] for p in few])
    wrong = np.stack(list(_answers(parts, few, ['50crop', other])), 1).argmax(2) != targ
    only_many, only_one = int((wrong[0] & ~wrong[1]).sum()), int((wrong[1] & ~wrong[0]).sum())
    if only_many - only_one < 2*(only_many + only_one)**.5: return ''              # McNemar: two standard deviations
    return (f"on {len(few)} validation photos, predictions by 50 crops are wrong for {wrong[0].mean():.0%}, by one crop at short side "
            f"{other.partition('@')[2]} for {wrong[1].mean():.0%}: choose_protocol() measures and keeps the best")


def remark(
    learn, # Of `resnet_learner`, fitted
):
    "Print the hint, if there is one; a remark is no reason to end in an error"
    with suppress(Exception):
        if said := hint(learn): print(said)
