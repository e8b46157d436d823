"""Photos as vectors: the network's features before its head, and the photos that are most like one."""
import os
from collections import deque
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from ..engine.arguments import whole_number
from ..engine.batching import batch_size, batched_forward, prefetch
from ..engine.fast_net import _bare, _copy
from ..engine.files import DataError
from ..engine.layout import photo_inputs
from ..engine.photo import open_photo
from ..engine.protocols import split_protocol
from ..engine.splits import model_parts
from ..inference import extract_crops, make_predictor, protocol_boxes, unique_crops
from .look import require_trained


def _without_head(net):
    "A copy that gives what the last layer reads"
    if not isinstance(getattr(body := _copy(_bare(net)), 'fc', None), nn.Linear):
        raise DataError("this network has no head `fc` that reads features")
    body.fc = nn.Identity()
    return body


def embed(
    model, # A `ResNet`, or a learner over `resnet_dls`
    photos, # A photo (path, URL, bytes, PIL image, array), a list of these, or a folder
    protocol:str='1crop', # '1crop': the central crop; '10crop', '50crop', '10crop@110,128', …: the mean over its crops
    precision:str|None=None, # 'fp32', 'bf16' or 'fp16'; None: the fastest that the hardware has
    num_workers:int|None=None, # Threads that decode photos; None: one a core
    bs:int|None=None, # Crops that go through the network at a time; None: as many as suit the hardware
) -> np.ndarray: # (features,) float32, 2048 of a ResNet-50; for a list or folder a row each
    "The features that the head reads, averaged over a photo's crops"
    require_trained(model)
    parts, (photos, one), weights = model_parts(model), photo_inputs(photos), deque()
    if split_protocol(protocol, size := parts.size)[0] == 'dense':
        raise DataError("features are those of crops; name '1crop', '10crop' or '50crop'")
    ask, _ = make_predictor(_without_head(parts.net), parts.stats, size, False, precision)
    def load(photo):
        boxes, weight = unique_crops([protocol_boxes(protocol, *(img := open_photo(photo)).size, size)])
        return extract_crops(img, boxes, size), weight
    def crops():
        for x, weight in prefetch(load, photos, 0 if one else num_workers):
            weights.append(weight)
            yield x
    found = batched_forward(ask, crops(), bs or batch_size(parts.net, size))
    rows = torch.cat([weights.popleft()@features.double() for features in found]).float().numpy()
    return rows[0] if one else rows


def cosines(
    a:np.ndarray, # (d,) or (m,d)
    b:np.ndarray, # (n,d)
) -> np.ndarray: # (n,) or (m,n), from -1 to 1
    "The cosine between vectors; 0 where one of them is 0"
    unit = lambda v: v/np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-12)
    return unit(np.asarray(a, np.float64))@unit(np.asarray(b, np.float64)).T


def _known(photos, i):
    "The path of a photo in a list; its place where it has none"
    return os.fspath(photos[i]) if isinstance(photos[i], (str, Path)) else i


def _same_file(a, b): return isinstance(a, (str, Path)) and isinstance(b, (str, Path)) and os.path.abspath(a) == os.path.abspath(b)


def similar(
    model, # A `ResNet`, or a learner over `resnet_dls`
    photo, # A path, URL, bytes, PIL image or array
    photos, # A folder, or a list of photos
    n:int=5, # How many
    features:np.ndarray|None=None, # What `embed` gave for these photos, so that they are not asked about again
    protocol:str='1crop', # As for `embed`
) -> pd.DataFrame: # photo (its path, or its place in the list), similarity, label where photos know theirs; the most similar first
    "The photos whose features point the same way, by cosine similarity; the photo itself is left out"
    n = whole_number('n', n)
    photos, one = photo_inputs(photos)
    if one: raise DataError(f"photos is one photo, {str(photos[0])!r:.80}; pass a folder or a list")
    features = embed(model, photos, protocol) if features is None else np.asarray(features)
    if features.shape[:1] != (len(photos),): raise DataError(f"features has {len(features):,} rows for {len(photos):,} photos")
    near = cosines(embed(model, photo, protocol), features)
    order = [int(i) for i in np.argsort(-near, kind='stable') if not _same_file(photo, photos[int(i)])][:n]
    found = pd.DataFrame(dict(photo=pd.Series([_known(photos, i) for i in order], dtype=object), similarity=near[order]))
    labels = [getattr(photos[i], 'label', None) for i in order]
    return found.assign(label=pd.Series(labels, dtype=object)) if any(label is not None for label in labels) else found
