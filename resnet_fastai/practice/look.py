"""See a network's likeliest labels, its fifty crops, the places that speak for a label, and the labels that it confuses."""
__all__ = ['require_trained', 'top_labels', 'show_prediction', 'show_crops', 'grad_cam', 'show_cam', 'PhotoInterpretation',
           'interpretation']

import os
from difflib import get_close_matches
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from fastai.data.transforms import CategoryMap
from fastai.interpret import ClassificationInterpretation
from fastai.learner import Learner
from fastai.torch_core import TensorImage
from torch import nn

from ..augment import PhotoNormalize, resize_short
from ..data import LabelMap
from ..engine.arguments import whole_number
from ..engine.calibration import tempered
from ..engine.files import DataError
from ..engine.layout import photo_inputs
from ..engine.photo import open_photo
from ..engine.batching import batch_size
from ..engine.fast_net import _bare, _copy
from ..engine.splits import labelled_split, model_parts
from ..inference import crop_boxes, crop_probs, extract_crops, predict_probs
from .share import Trained, as_trained


def require_trained(
    model, # A `ResNet`, a learner of `resnet_learner`, or what `load_model` gives
) -> Trained: # Network, labels, statistics, size of the crop
    "What predictions need, of a model that has been trained; a `DataError` otherwise"
    if not (isinstance(model, (Trained, Learner)) or hasattr(model, 'trained')):
        raise DataError(f"a {type(model).__name__} is not a model; pass a ResNet, a learner of train, or what load_model gives")
    t = as_trained(model)
    if len(t.history) or 'origin' in t.training: return t
    raise DataError("this model has not been trained; call fit() first, or load a saved model")


def top_labels(
    probs:np.ndarray, # (n_out,)
    labels:LabelMap, # The labels that there are
    n:int=5, # How many
) -> list: # [(label, probability)], most likely first
    "The likeliest of the labels that exist"
    named = sorted(labels.encoding.items(), key=lambda o: -probs[o[1]])
    return [(label, float(probs[i])) for label,i in named[:n]]

_blue, _green, _orange = '#0072B2', '#009E73', '#D55E00'     # Okabe and Ito's


def _say(label, most=24):
    "A label as matplotlib can write it: one line, not too long, and no mathematics"
    text = ' '.join(str(label).split())
    return (text if len(text) <= most else text[:most-1] + '…').replace('$', r'\$')


def _known(model, photo):
    "The label that one of the model's own photos has; None where nobody knows"
    dls, label = getattr(getattr(model, 'learn', model), 'dls', None), getattr(photo, 'label', None)
    if label or dls is None or not isinstance(photo, (str, Path)): return label
    ours = Path(os.path.abspath(photo)).is_relative_to(os.path.abspath(dls.path))     # a photo of another folder may have the same name
    return dls.labels.labels.get(dls.labels.find_id(photo)) if ours else None


def _told(label, known):
    "What a photo is taken for, and whether it is that"
    return _say(label) + ('' if known is None else ', as labelled' if label == known else f', labelled {_say(known)}')


def _bars(ax, best, known):
    "Horizontal bars of [(label, probability)], the first on top"
    rows, probs = range(len(best)), [p for _,p in best]
    ax.barh(rows, probs, color=[_green if label == known else _blue for label,_ in best])
    for i,p in zip(rows, probs): ax.text(p + .02, i, f'{p:.1%}', va='center', fontsize=8)
    ax.set_yticks(rows, [_say(label, 18) for label,_ in best], fontsize=8)
    ax.set(xlim=(0, 1.25), xticks=[]); ax.invert_yaxis(); ax.spines[['top', 'right', 'bottom']].set_visible(False)
    ax.set_title(_told(best[0][0], known), fontsize=9, loc='left', color=_orange if known not in (None, best[0][0]) else 'k')


def show_prediction(
    model, # A `ResNet`, a learner of `resnet_learner`, or what `load_model` gives
    photo, # What `Photo` takes, a list of these, or a folder
    n:int=5, # Labels for each photo; fewer where the model knows fewer
    most:int=24, # So many photos fit into a picture
) -> plt.Figure: # Each photo beside its bars
    "Draw photos beside the probabilities of their likeliest labels"
    t, (photos,_) = require_trained(model), photo_inputs(photo)
    n = whole_number('n', n)
    if len(photos) > most: raise DataError(f"{len(photos):,} photos do not fit into a picture; show {most} of them, or let predict_folder "
                                           "write a table")
    probs = tempered(predict_probs(t.net, list(photos), t.stats, t.size, t.protocol), t.temperature)
    cols, rows, height = min(2, len(photos)), -(-len(photos)//2), max(1.3, .5 + .22*min(n, len(t.labels)))
    fig,axs = plt.subplots(rows, 2*cols, figsize=(3.6*cols, rows*height), squeeze=False, layout='constrained')
    for ax in axs.flat[2*len(photos):]: ax.axis('off')
    for p,prob,(left,right) in zip(photos, probs, axs.reshape(-1, 2)):
        left.imshow(open_photo(p)); left.axis('off')
        _bars(right, top_labels(prob, t.labels, n), _known(model, p))
    return fig


def _draw_crop(ax, crop, label, p, agrees):
    "A crop in a frame, with what it says"
    # few colours: a small file
    thumb = F.interpolate(crop[None].float(), (42, 42), mode='bilinear', antialias=True)[0].byte() & 0xF0 | 8
    ax.imshow(thumb.permute(1, 2, 0).numpy(), interpolation='nearest'); ax.set_xticks([]); ax.set_yticks([])
    color = _blue if agrees else _orange
    ax.set_title(f'{_say(label, 10)}\n{p:.0%}', fontsize=6.5, color=color, pad=2, linespacing=1.05)
    for s in ax.spines.values(): s.set(color=color, linewidth=2)


def show_crops(
    model, # A `ResNet`, a learner of `resnet_learner`, or what `load_model` gives
    photo, # What `Photo` takes
) -> plt.Figure: # A row a scale: five crops, and the same of the mirror image
    "Draw the 50 crops, each with its own likeliest label: blue where it agrees with their average, orange where not"
    t, img = require_trained(model), open_photo(photo)
    places = crop_boxes(*img.size, t.size)
    crops = extract_crops(img, places, t.size)
    probs = crop_probs(t.net, crops, t.stats, bs=batch_size(t.net, t.size), precision=None).double().numpy()
    tops, (best,p) = [top_labels(q, t.labels, 1)[0] for q in probs], top_labels(probs.mean(0), t.labels, 1)[0]
    agree, known = [label == best for label,_ in tops], _known(model, photo)
    fig,axs = plt.subplots(5, 10, figsize=(7.2, 5.2), dpi=90, layout='constrained')
    for ax,crop,top,a in zip(axs.flat, crops, tops, agree): _draw_crop(ax, crop, *top, a)
    for ax,place,mean in zip(axs[:,0], places[::10], probs[:,t.labels.encoding[best]].reshape(5, 10).mean(1)):
        ax.set_ylabel(f'side {place[0]}\n{mean:.0%}', fontsize=7)
    fig.suptitle(f'{_told(best, known)}: {p:.1%} on the average; {sum(agree)} of 50 crops agree', fontsize=10)
    return fig


def _unknown(what, name, names):
    "The error for a name that is not there, with those that resemble it"
    lower = {n.lower(): n for n in names}
    near = [lower[m] for m in get_close_matches(str(name).lower(), lower, 3, .5)]
    return DataError(f"there is no {what} {name!r:.80}; " + (f"do you mean {' or '.join(map(repr, near))}?" if near else
                     f"there is {', '.join(map(repr, [*names][:8]))}{', …' if len(names) > 8 else ''}"))


def _layer_name(net, layer):
    "The name of a layer that is given as a module, or by its name"
    if layer is None: return None
    names = {m: n for n,m in net.named_modules() if n}
    name = names.get(layer) if isinstance(layer, nn.Module) else layer
    if name not in names.values(): raise _unknown('layer', layer, names.values())
    return name


def _maps_of(net, name, keep):
    "Let `keep` see, and replace, the maps of a layer, or those that the last global average reads"
    if name is not None: return net.get_submodule(name).register_forward_hook(lambda m, args, out: keep(out))
    pools = [m for m in net.modules() if isinstance(m, nn.AdaptiveAvgPool2d)]
    if not pools: raise DataError("this network has no global average, whose maps could be taken; name a layer of it")
    pools[-1].register_forward_pre_hook(lambda m, args: (keep(args[0]), *args[1:]))


def _targets(target, logits):
    "(B,) indices of outputs: the highest ones, or those asked for"
    if target is None: return logits.argmax(1)
    n,n_out = logits.shape
    wanted = np.asarray(target.tolist() if torch.is_tensor(target) else target)
    if wanted.dtype.kind not in 'iu' or wanted.shape not in ((), (n,)) or not ((0 <= wanted) & (wanted < n_out)).all():
        raise DataError(f"target is {target!r:.80}; an index from 0 to {n_out-1} is needed, or {n} of them, one a photo")
    return torch.as_tensor(wanted, device=logits.device).expand(n)


def grad_cam(
    net:nn.Module, # Gives logits; stays as it is
    x:torch.Tensor, # (B,3,H,W) float, as the network takes it: RGB in [0,1] less the mean
    target:int|torch.Tensor|None=None, # The output that is asked about, or one for each photo; None: the highest
    layer:str|nn.Module|None=None, # The layer whose maps are looked at; None: those that the last global average reads
) -> torch.Tensor: # (B,h,w) ≥ 0, as large as the maps, on the network's device
    "Grad-CAM: how much each place of a layer's maps speaks for an output"
    name, seen = _layer_name(net := _bare(net), layer), []
    def keep(maps):
        if not torch.is_tensor(maps) or maps.ndim != 4: raise DataError(f"the layer {name!r} puts out no maps (B,C,h,w)")
        seen[:] = [maps.detach().requires_grad_()]                             # what comes before needs no gradient
        return seen[0].clone()                                                 # what comes after may write into it
    with torch.inference_mode(False), torch.enable_grad():
        _maps_of(asked := _copy(net), name, keep)
        logits = asked(x.detach().clone().to(next(asked.parameters())))
        if not seen: raise DataError(f"nothing goes through the layer {name!r}")
        grad, = torch.autograd.grad(logits.gather(1, _targets(target, logits)[:,None]).sum(), seen)
    return (grad.mean((2,3), keepdim=True)*seen[0].detach()).sum(1).relu()


def _heat(t, img, label):
    "(H,W) in [0,1]: where a photo speaks for a label, as a share of the strongest place; zeros where nothing does"
    x = PhotoNormalize(t.stats, 0)(TensorImage(torch.from_numpy(np.array(img)).permute(2, 0, 1)[None]), split_idx=1)
    cam = grad_cam(t.net, x.as_subclass(torch.Tensor), t.labels.encoding[label])
    heat = F.interpolate(cam[None], img.size[::-1], mode='bilinear')[0,0].cpu().numpy()
    return heat/max(heat.max(), 1e-12)


def show_cam(
    model, # A `ResNet`, a learner of `resnet_learner`, or what `load_model` gives
    photo, # What `Photo` takes
    label:str|None=None, # The label that is asked about; None: the likeliest
) -> plt.Figure: # The photo, and its grey copy with what speaks for the label
    "Draw where in a photo the evidence for a label lies"
    t, img = require_trained(model), open_photo(photo)
    if label is not None and label not in [*t.labels.encoding]: raise _unknown('label', label, t.labels.encoding)
    probs = tempered(predict_probs(t.net, img, t.stats, t.size, t.protocol), t.temperature)
    small = resize_short(img, t.size)
    if label is None: label = top_labels(probs, t.labels, 1)[0][0]
    heat, p = _heat(t, small, label), probs[t.labels.encoding[label]]
    fig,axs = plt.subplots(1, 2, figsize=(6.6, min(5, .6 + max(1, 2.9*small.height/small.width))), layout='constrained')
    axs[0].imshow(small); axs[1].imshow(small.convert('L'), cmap='gray', vmin=0, vmax=255)
    drawn = axs[1].imshow(heat, cmap='inferno', alpha=.6, vmin=0, vmax=1)
    for ax in axs: ax.axis('off')
    fig.colorbar(drawn, ax=axs, ticks=[0, 1]).ax.set_yticklabels(['nothing', 'most'], fontsize=8)
    by = 'on the average of 50 crops' if t.protocol == '50crop' else f'by {t.protocol}'
    fig.suptitle(f"{'What' if heat.any() else 'Nothing'} speaks for {_say(label)}, {p:.1%} {by}", fontsize=10)
    return fig


class PhotoInterpretation(ClassificationInterpretation):
    "fastai's, for the labels that occur"
    @classmethod
    def from_learner(cls, learn, ds_idx=1, dl=None, act=None):
        dl = learn.dls[ds_idx].new(shuffle=False, drop_last=False) if dl is None else dl
        _,targs,decoded,losses = learn.get_preds(dl=dl, with_decoded=True, with_loss=True, act=act)
        self, outputs = cls(learn, dl, losses, act), torch.cat([targs, decoded]).unique().tolist()
        self.vocab = CategoryMap([self.vocab[i] for i in outputs], sort=False)
        self.vocab.o2i, self.found = dict(zip(self.vocab, outputs)), np.searchsorted(outputs, torch.stack([targs, decoded]).numpy())
        return self

    def confusion_matrix(self):
        "(labels,labels) photos: a row what they are, a column what they were taken for; in the order of `vocab`"
        counts = np.zeros((len(self.vocab),)*2, int)
        np.add.at(counts, tuple(self.found), 1)
        return counts

    def plot_confusion_matrix(self, normalize=False, title='Confusion matrix', plot_txt=None, **kwargs):
        "fastai's; without the numbers where they would be too small to read"
        plot_txt = len(self.vocab) <= 30 if plot_txt is None else plot_txt
        with np.errstate(invalid='ignore'): super().plot_confusion_matrix(normalize, title, plot_txt=plot_txt, **kwargs)


def interpretation(
    model, # A `ResNet` that has photos, or a learner of `resnet_learner`
    split:str='val', # 'val', 'test' or 'train'; its photos need labels
) -> PhotoInterpretation: # `plot_confusion_matrix`, `most_confused`, `plot_top_losses`, `top_losses`, …
    "fastai's `ClassificationInterpretation` of a split, each photo's central crop"
    import fastai.vision.learner  # noqa: F401  it draws photos with top losses, and takes a second to import
    require_trained(model)
    parts = model_parts(model)
    if parts.dls is None:
        raise DataError("a loaded model has no photos; its errors elsewhere are what evaluate(data_path=…, label_path=…) tells")
    photos,_ = labelled_split(parts, split)
    learn = model if isinstance(model, Learner) else model.learn
    return PhotoInterpretation.from_learner(learn, dl=learn.dls.test_dl(photos, with_labels=True))
