"""Do probabilities mean what they say? Temperature, calibration error, and the probability from which answers can be trusted."""
import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from .files import DataError
from .scores import wilson

_coldest, _hottest = .05, 20                # temperatures that are looked at


def _is_number(value): return isinstance(value, (int, float, np.floating, np.integer)) and not isinstance(value, bool)


def check_temperature(
    temperature:float, # Above 0
) -> float:
    "A `DataError` where it is no temperature"
    if _is_number(temperature) and 0 < temperature < float('inf'): return float(temperature)
    raise DataError(f"temperature is {temperature!r:.80}; it must be a number above 0, and 1 changes nothing")


def check_min_prob(
    min_prob:float, # From 0 to 1
) -> float:
    "A `DataError` where it is no probability"
    if _is_number(min_prob) and 0 <= min_prob <= 1: return float(min_prob)
    raise DataError(f"min_prob is {min_prob!r:.80}; it must be a probability, from 0 to 1")


def _logs(probs): return np.log(np.maximum(np.asarray(probs, np.float64), np.finfo(np.float32).tiny))


def tempered(
    probs:np.ndarray, # (n_out,) or (n,n_out), each row sums to 1
    temperature:float=1, # Above 1: less sure; below 1: surer; 1: as they are
) -> np.ndarray: # The same shape; the order of the labels stays
    "Probabilities to the power of 1/temperature, rescaled to sum to 1: for one crop, the softmax of logits/temperature"
    if check_temperature(temperature) == 1: return probs
    logs = _logs(probs)/temperature
    return np.exp(logs - logsumexp(logs, -1, keepdims=True)).astype(np.float32)


def log_loss(
    probs:np.ndarray, # (n,n_out)
    targ:np.ndarray, # (n,) indices
) -> float: # Nats
    "The mean of -log of the probability of the right label"
    return float(-_logs(probs)[np.arange(len(targ)), targ].mean())


def fit_temperature(
    probs:np.ndarray, # (n,n_out), as the network says them
    targ:np.ndarray, # (n,) indices
) -> float: # From .05 to 20; 1 where all photos are right, as there is no smallest loss then
    "The temperature with the smallest log loss, which is convex in 1/temperature (Guo et al., 2017)"
    if (probs.argmax(1) == targ).all(): return 1.
    logs = _logs(probs)
    right = logs[np.arange(len(targ)), targ]
    def loss(cold): return (logsumexp(cold*logs, 1) - cold*right).mean()
    return float(1/minimize_scalar(loss, bounds=(1/_hottest, 1/_coldest), method='bounded', options=dict(xatol=1e-7)).x)


def at_limit(temperature): return not 1.001*_coldest < temperature < .999*_hottest


def reliability(
    confidence:np.ndarray, # (n,) probability of each photo's first label
    right:np.ndarray, # (n,) bool: is it the label?
    bins:int=15, # Of equal width, from 0 to 1
) -> tuple: # (photos in each bin, their mean confidence, the share that is right); NaN in an empty bin
    "What a reliability diagram shows"
    at = np.clip(np.ceil(np.asarray(confidence, np.float64)*bins).astype(int) - 1, 0, bins - 1)       # (0, 1/15], (1/15, 2/15], …
    n = np.bincount(at, minlength=bins)
    with np.errstate(invalid='ignore'): return n, np.bincount(at, confidence, bins)/n, np.bincount(at, right, bins)/n


def calibration_error(
    confidence:np.ndarray, # (n,) probability of each photo's first label
    right:np.ndarray, # (n,) bool: is it the label?
    bins:int=15, # Of equal width, from 0 to 1
) -> float: # 0 to 1
    "ECE: the mean distance between confidence and share of right answers, over the bins of a reliability diagram"
    n, said, was = reliability(confidence, right, bins)
    return float((n*np.abs(np.nan_to_num(said - was))).sum()/n.sum())


def answered(
    confidence:np.ndarray, # (n,) probability of each photo's first label
    right:np.ndarray, # (n,) bool: is it the label?
) -> tuple: # (thresholds that fall, photos that are answered, right ones among them)
    "What each threshold leaves: one between every two neighbouring probabilities, and 0, which answers all"
    order = np.argsort(-np.asarray(confidence, np.float64), kind='stable')
    sure, good = np.asarray(confidence, np.float64)[order], np.cumsum(right[order])
    last = np.flatnonzero(np.append(sure[1:] < sure[:-1], True))                 # equal probabilities are answered together
    between = (sure[last] + np.append(sure[last[1:]], 0))/2
    between[-1] = 0
    return between, last + 1, good[last]


def pick_threshold(
    confidence:np.ndarray, # (n,) probability of each photo's first label
    right:np.ndarray, # (n,) bool: is it the label?
    precision:float=.95, # Share of the answers that has to be right, 0 to 1
) -> dict: # min_prob, precision with its 95 % interval, coverage (share of photos that are answered) with its own, photos
    "The threshold that answers the most photos at this precision; a `DataError` where none reaches it"
    if not 0 < precision <= 1: raise DataError(f"precision is {precision!r:.80}; it must be above 0 and at most 1, like .95")
    at, n, good = answered(confidence, right)
    enough = np.flatnonzero(good >= precision*n - 1e-9)
    if not len(enough):
        raise DataError(f"no threshold reaches a precision of {precision:.1%} on these {len(right):,} photos; the best is "
                        f"{(good/n).max():.1%}: ask for less")
    n, good, at, total = int(n[i := enough[-1]]), int(good[i]), float(at[i]), len(right)
    (low, high), (least, most) = wilson(good, n), wilson(n, total)
    return dict(min_prob=at, precision=good/n, precision_low=low, precision_high=high, coverage=n/total, coverage_low=least,
                coverage_high=most, photos=total)


_never = 2**53                              # epochs that no model is trained for


def outdated(
    trust:dict, # What `calibrate` and `threshold` have kept
) -> dict: # The same, and `in_effect` no longer counts it
    "What was measured on weights that are others now, though not by a whole epoch of training"
    return {what: kept | dict(epochs=_never) for what,kept in trust.items()}


def in_effect(
    trust:dict, # What `calibrate` and `threshold` have kept
    protocol:str, # How the model predicts
    epochs:int, # So many has it been trained
) -> tuple: # (temperature, min_prob): 1 and None where nothing is kept, or it was measured on other weights or crops
    "The temperature and threshold that fit a model as it stands"
    fits = lambda kept: kept if kept and (kept['protocol'], kept['epochs']) == (protocol, epochs) else {}
    temperature = fits(trust.get('calibration')).get('temperature', 1)
    kept = fits(trust.get('threshold'))
    return temperature, kept['min_prob'] if kept and kept['temperature'] == temperature else None
