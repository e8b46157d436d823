"""The YAML at the head of a model card, by which Hugging Face's hub knows what a model is."""
import re

import yaml

_licences = {'apache-2.0', 'mit', 'bsd-2-clause', 'bsd-3-clause', 'cc0-1.0', 'cc-by-4.0', 'cc-by-sa-4.0', 'cc-by-nc-4.0', 'cc-by-nc-sa-4.0'}


def _origin(training):
    "What is known about the weights that a training began with: their repository, and the licence where they were only taken over"
    w = training.get('weights') or {}
    repo = re.search(r'Hugging Face ([\w.-]+/[\w.-]+), revision', w.get('origin', ''))
    licence = str(w.get('licence', '')).lower()
    if repo: yield 'base_model', repo[1]
    if licence in _licences and not training.get('epochs'): yield 'license', licence


def _results(c):
    "The errors of the validation photos as the hub's model index has them; nothing where none were measured"
    h, training = c['history'], c['training']
    epochs = h.get('epoch', [])
    at = epochs.index(training['restored_epoch']) if training.get('restored_epoch') in epochs else len(epochs) - 1
    known = [(name, kind, h[k][at]) for name,kind,k in (('Top-1', 'accuracy', 'top1_error'), ('Top-5', 'top-5-accuracy', 'top5_error'))
             if at >= 0 and k in h and h[k][at] is not None]
    metrics = [dict(type=kind, value=round(1 - error, 6), name=f'{name} accuracy by the centre crop') for name,kind,error in known]
    if not metrics: return
    data = dict(name='the photos of its training, validation split', type='imagefolder', split='validation')
    yield dict(task=dict(type='image-classification', name='Image Classification'), dataset=data, metrics=metrics)


def front_matter(
    config: dict, # What config.json holds
) -> str: # YAML between two lines of ---
    "What Hugging Face's hub reads of a model card: library, task, tags, metrics; the licence only where it is known"
    about = dict(library_name='resnet_fastai', pipeline_tag='image-classification',
                 tags=['image-classification', 'resnet', 'pytorch', 'fastai', 'arxiv:1512.03385'], **dict(_origin(config['training'])))
    if results := list(_results(config)):
        about |= {'metrics': ['accuracy'], 'model-index': [dict(name=f"{config['arch']}, {len(config['encoding'])} labels",
                                                                results=results)]}
    return f'---\n{yaml.safe_dump(about, sort_keys=False, allow_unicode=True)}---\n'
