"""Train on class folders as the guide "Your photos" does, test with every protocol, and store the results in a JSON file: every epoch, the
confusion matrix, the photos with the largest losses, and the error of each number of crops and scales.

    python nbs/experiments/your_photos.py clothing --epochs 60 --patience 12         # a folder {train,val,test}/CLASS/*.jpg
    python nbs/experiments/your_photos.py drawn --epochs 3                           # 5,400 drawn textures"""
import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from cifar10 import commit, machine
from resnet_fastai.core import ResNet
from resnet_fastai.data import demo_data, from_folders
from resnet_fastai.engine.files import DataError, write_json
from resnet_fastai.engine.photo import open_photo
from resnet_fastai.engine.scores import wilson
from resnet_fastai.inference import evaluate, fifty_crop, make_predictor, paper_scales

crop_sets = {1: [4], 2: [4, 9], 5: range(5), 10: range(10)}             # of the ten: the centre, its mirror image, the five, all
scale_order = (1, 2, 0, 3, 4)                                           # of the five: 256, then 384, 224, 480 and 640


def worst(learn, n=8):
    "The validation photos with the largest losses for the central crop"
    probs, targ = learn.get_preds(dl=learn.dls.valid)
    losses, vocab = -probs[torch.arange(len(targ)), targ].log(), learn.dls.vocab
    photos = learn.dls.photos['val']
    return [dict(photo=Path(photos[int(i)]).name, label=vocab[targ[i]], predicted=vocab[probs[i].argmax()], loss=round(float(losses[i]), 3),
                 prob=round(float(probs[i].max()), 3)) for i in losses.argsort(descending=True)[:n]]


def crop_by_crop(model, photos):
    "(N,5,10,n_out): probabilities of each of the fifty crops of each photo, so that any of them can be averaged"
    ask, _ = make_predictor(model.net, model.stats, model.size)
    return torch.stack([ask(fifty_crop(open_photo(p), size=model.size)).softmax(1).float().view(5, 10, -1).cpu() for p in photos])


def rated(probs, targ):
    "Top-1 error of (N,n_out) probabilities, with its 95 % interval"
    wrong = int((probs.argmax(1) != targ).sum())
    low, high = wilson(wrong, len(targ))
    return dict(top1_error=wrong/len(targ), low=low, high=high)


def by_crops_and_scales(said, targ):
    "The error for each number of crops a scale and each number of scales"
    return [dict(crops=c, scales=s, **rated(said[:, list(scale_order[:s])][:, :, list(crop_sets[c])].mean((1, 2)), targ))
            for s in range(1, 6) for c in crop_sets]


def by_chance(said, targ, orders=20):
    "The error with 1, 2, 3, 5 … 50 of the fifty crops, drawn at random: mean over `orders` draws"
    said, rng = said.flatten(1, 2), np.random.default_rng(0)
    drawn = [rng.permutation(50) for _ in range(orders)]
    def error(n): return float(np.mean([rated(said[:, d[:n]].mean(1), targ)['top1_error'] for d in drawn]))
    return [dict(crops=n, top1_error=error(n)) for n in (1, 2, 3, 5, 8, 12, 20, 32, 50)]


def timed(model, photos, protocol):
    "Evaluate with a protocol, and measure its time"
    start = time.perf_counter()
    return evaluate(model, protocol=protocol).assign(seconds_a_photo=(time.perf_counter() - start)/len(photos))


def train(
    photos:str|Path, # `{train,val,test}/CLASS/*.jpg`, or 'drawn'
    epochs:int=8, # Passes over the training photos
    size:int=64, # Side of the crops, pixels
    arch:str='resnet18', # A name that `build_net` knows
    seed:int=0, # Of weights, order of photos and crops
    patience:int=2, # Of the plateau, epochs
    out:str|Path|None=None, # The JSON file; None: results/NAME.json beside this script
    sizes:dict|None=None, # Photos of each split of the drawn set
) -> dict: # The contents of the file
    "One run, from photos to the error of each protocol"
    tmp, drawn = Path(tempfile.mkdtemp()), str(photos) == 'drawn'
    paths = demo_data(tmp/'photos', sizes=sizes or dict(train=4000, val=400, test=1000)) if drawn else from_folders(photos, tmp/'photos')
    start = time.perf_counter()
    model = ResNet(*paths, arch=arch, size=size, bs=16, patience=patience, seed=seed, num_workers=0, net_args=dict(zero_init_residual=True))
    with model.learn.no_bar(), model.learn.no_logging(): history = model.fit(epochs)
    seconds = time.perf_counter() - start
    name = 'drawn' if drawn else Path(photos).name
    options = f'--epochs {epochs} --size {size} --arch {arch} --seed {seed} --patience {patience}'
    command = f'python nbs/experiments/your_photos.py {name} {options}'
    what = dict(command=command, commit=commit(__file__), machine=machine(), seed=seed, seconds=round(seconds, 1), arch=arch, size=size,
                short_sides=list(paper_scales(size)), epochs=history.round(5).to_dict('records')) | measure(model)
    write_json(out or Path(__file__).parent/'results'/f'{name}.json', what)
    return what


def measure(model): # A fitted `ResNet`
    "What is measured on the photos: confusion matrix, largest losses, and the error of each protocol and group of crops"
    tested = model.learn.dls.photos['test']
    labels = sorted(model.labels.encoding, key=model.labels.encoding.get)
    outputs = torch.tensor([model.labels.encoding[label] for label in labels])
    with model.learn.no_bar():
        said, true = crop_by_crop(model, tested), torch.tensor([labels.index(model.labels(p)) for p in tested])
        table = pd.concat([timed(model, tested, p) for p in ('1crop', '10crop', '50crop', 'dense')])
        top_losses = worst(model.learn)
    targ, best = outputs[true], said.mean((1, 2))[:, outputs].argmax(1)
    confusion = np.zeros((len(labels), len(labels)), int)
    np.add.at(confusion, (true.numpy(), best.numpy()), 1)
    return dict(photos={s: len(p) for s, p in model.learn.dls.photos.items()}, labels=labels, confusion=confusion.tolist(),
                top_losses=top_losses, protocols=table.round(5).to_dict('records'),
                crops_and_scales=by_crops_and_scales(said, targ), by_chance=by_chance(said, targ))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('photos', help="a folder {train,val,test}/CLASS/*.jpg, or 'drawn'")
    p.add_argument('--epochs', type=int, default=8)
    p.add_argument('--size', type=int, default=64, help='side of the crops, pixels')
    p.add_argument('--arch', default='resnet18')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--patience', type=int, default=2, help='epochs without improvement before the rate falls')
    p.add_argument('--out', type=Path, help='the JSON file; default: nbs/experiments/results/NAME.json')
    try: found = train(**vars(p.parse_args(argv)))
    except DataError as e: sys.exit(f'{type(e).__name__}: {e}')
    print(pd.DataFrame(found['epochs']).to_string(), pd.DataFrame(found['protocols']).to_string(), sep='\n\n')


if __name__ == '__main__': main()
