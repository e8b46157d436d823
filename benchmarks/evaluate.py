"""Many photos: files → probabilities, by each of the crop protocols, against the network alone.

The peer is the same prepared network on crops that lie ready in memory, in batches of the same size: whoever decodes, resizes and cuts beside
it cannot be faster. A ratio of 1 would mean that this costs nothing."""
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)      # not this folder: its `statistics` is not Python's
from itertools import cycle, islice
from types import SimpleNamespace

from benchmarks.common import alternate, arguments, compare, photos, write

import torch
from fastai.torch_core import default_device, set_seed
from fastprogress import fastprogress

from benchmarks.fifty_crop import stats
from resnet_fastai.data import LabelMap
from resnet_fastai.engine.photo import open_photo
from resnet_fastai.engine.batching import batch_size
from resnet_fastai.inference import make_predictor, extract_crops, unique_crops, protocol_boxes
from resnet_fastai.practice.predict_folder import predict_folder
from resnet_fastai.model import build_net


def cut(path, protocol, size):
    img = open_photo(path)
    return extract_crops(img, unique_crops([protocol_boxes(protocol, *img.size, size)])[0], size)


def alone(net, crops, size):
    "The network on batches that are ready"
    batches, (ask, _) = crops.split(batch_size(net, size)), make_predictor(net, stats, size)
    return lambda: [ask(b).cpu() for b in batches]


def main():
    args = arguments(__doc__, arch=('resnet50', 'the network'), size=(224, 'side of its crops'), crops=(200, 'about so many in a turn'))
    fastprogress.NO_BAR = True
    paths, what = photos(args.photos)
    set_seed(0)
    net = build_net(args.arch, 1000).eval().to(default_device())
    model = SimpleNamespace(learn=None, net=net, stats=stats, size=args.size, labels=LabelMap({}, {str(i): i for i in range(1000)}))
    table, figures = [], {}
    for protocol, most in (('50crop', 50), ('10crop', 10), ('1crop', 1)):
        some = list(islice(cycle(paths), max(3, args.crops//most)))
        crops = torch.cat([cut(p, protocol, args.size) for p in some])
        print(f'{protocol}: {len(some)} photos ({what}), {len(crops)} different crops, {args.arch}, {next(net.parameters()).device}')
        ways = {'the network alone': alone(net, crops, args.size), 'ours': lambda: predict_folder(model, some, protocol=protocol)}
        found = compare(alternate(ways, args.rounds), 'ours', len(crops), {'the network alone': .85}, unit='crops/s')
        figures[protocol], rate = found, found['rates']
        table.append({'protocol': protocol, 'photos/s': rate['ours']*len(some)/len(crops), 'crops/s': rate['ours'],
                      'the network alone, crops/s': rate['the network alone'], 'share of it': found['ratios']['the network alone']['median']})
    gpu = torch.cuda.is_available()
    if not gpu: print('there is no GPU here: photos a second on one were not measured')
    write(args, photos=what, threads=torch.get_num_threads(), protocols=figures, table=table, gpu_measured=gpu)


if __name__ == '__main__': main()
