"""Are the probabilities of published CIFAR-10 networks calibrated, and does a fitted temperature help on other photos?

    python nbs/experiments/calibration.py CIFAR10 --weights FOLDER

The temperature, and the threshold for a precision of 99 %, are fitted on one half of the test photos. Everything else is measured on
the other half."""
import argparse
from pathlib import Path

import numpy as np

from cifar10 import checksum, cifar10, commit, machine, predict, published_net
from resnet_fastai.engine.calibration import calibration_error, fit_temperature, log_loss, pick_threshold, reliability, tempered
from resnet_fastai.engine.files import write_json

results = Path(__file__).parent/'results'


def first(probs, y): # (N,n_out), (N,)
    "The largest probability of each photo, and whether its class is right"
    return probs.max(1).astype(np.float64), probs.argmax(1) == y


def measured(probs, y, least):
    "Calibration and error of all photos, and of those with at least the probability `least`"
    confidence, right = first(probs, y)
    n, said, was = (np.nan_to_num(v).round(4).tolist() for v in reliability(confidence, right))
    sure = confidence >= least
    return dict(ece=calibration_error(confidence, right), log_loss=log_loss(probs, y), confidence=float(confidence.mean()),
                error=float(1 - right.mean()), answered=float(sure.mean()), right_of_answered=float(right[sure].mean()),
                bins=dict(photos=n, confidence=said, right=was))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', type=Path, help='CIFAR-10, as for cifar10.py')
    p.add_argument('--weights', type=Path, required=True, help='a folder with resnet20.th and so on')
    p.add_argument('--depths', type=int, nargs='+', default=[20, 32, 44, 56])
    p.add_argument('--photos', type=int, default=10_000, help='test photos; the first half is for fitting')
    p.add_argument('--precision', type=float, default=.99, help='precision that the threshold should reach')
    p.add_argument('--out', type=Path, default=results/'calibration.json')
    args = p.parse_args(argv)
    x, y = (t[:args.photos] for t in cifar10(args.folder)['test'])
    half, targ = args.photos//2, y.numpy()
    command = f'python nbs/experiments/calibration.py CIFAR10 --weights {args.weights.name}'
    told = dict(command=command, commit=commit(__file__), machine=machine(), data=checksum(x, y), fitted_to=half,
                measured_on=args.photos - half, precision=args.precision, nets={})
    for depth in args.depths:
        probs = predict(published_net(args.weights/f'resnet{depth}.th'), x).softmax(1).numpy()
        t = fit_temperature(probs[:half], targ[:half])
        found = dict(temperature=t)
        for name, at in (('before', 1), ('after', t)):
            p = tempered(probs, at)
            least = pick_threshold(*first(p[:half], targ[:half]), args.precision)['min_prob']
            found[name] = dict(min_prob=least) | measured(p[half:], targ[half:], least)
        told['nets'][f'ResNet-{depth}'] = found
        print(f"ResNet-{depth}: temperature {t:.2f}, ECE {found['before']['ece']:.1%} → {found['after']['ece']:.1%}", flush=True)
        write_json(args.out, told)


if __name__ == '__main__': main()
