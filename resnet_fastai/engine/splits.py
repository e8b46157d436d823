"""What an evaluation needs of a model and of a split: the network's parts, the photos, the index of each photo's label."""
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from fastai.learner import Learner

from .arguments import one_of
from .calibration import in_effect
from .fetch import resolve_data
from .files import DataError
from .layout import split_photos, splits


def model_parts(
    model, # A learner over `resnet_dls`, or a `ResNet`
) -> SimpleNamespace: # net, stats, size, labels, protocol, temperature, min_prob; dls: the learner's photos, None for a loaded model
    "What predictions need of a model"
    learn = model if isinstance(model, Learner) else getattr(model, 'learn', None)
    of, dls = (model, None) if learn is None else (learn.dls, learn.dls)
    if not all(hasattr(of, name) for name in ('labels', 'stats', 'size')):
        raise DataError("this is no ResNet, nor a learner over resnet_dls, whose mean and crop size predictions need; ResNet.load(folder) "
                        "reads a saved model, and fastai's own loaders go with learn.validate() and learn.get_preds()")
    net = model.net if learn is None else learn.model
    has = model if learn is None else learn
    protocol, past = getattr(has, 'protocol', '50crop'), getattr(has, 'history', ())
    temperature, min_prob = in_effect(getattr(has, 'trust', {}), protocol, len(getattr(past, 'rows', past)))
    return SimpleNamespace(net=net, stats=of.stats, size=of.size, labels=of.labels, dls=dls, protocol=protocol, temperature=temperature,
                           min_prob=min_prob)


def labelled_split(
    parts:SimpleNamespace, # From `model_parts`
    split:str, # 'train', 'val' or 'test'
    data_path:str|Path|None=None, # Photos of another place than the model's own
    label_path:str|Path|None=None, # Their labels
) -> tuple: # (photos, (n,) array of indices)
    "The photos of a split, and the index of each one's label"
    one_of('split', split, splits)
    if parts.dls is None and (data_path is None or label_path is None):
        raise DataError("a loaded model has no photos; pass data_path and label_path")
    labels = parts.labels if label_path is None else type(parts.labels)(label_path, parts.labels.encoding)
    if data_path is None: photos = parts.dls.photos.get(split)
    else: photos = split_photos(resolve_data(data_path), (split,))[split]
    if not photos: raise DataError(f"there are no photos in {parts.dls.path/split}; evaluate another split than {split!r}")
    if label_path is not None: photos = photos.unlabelled()                                    # without their old labels
    labels.match(photos)
    return photos, np.array([labels.encoding[labels(p)] for p in photos])
