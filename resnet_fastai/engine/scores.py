"""Error rates of predictions, each with its 95 % interval."""
import numpy as np
import pandas as pd


def wilson(
    wrong:int, # Errors
    n:int, # Photos
    z:float=1.96, # 1.96: 95 %
) -> tuple: # (low, high), 0 to 1
    "The interval in which an error rate lies, from a sample (Wilson, 1927)"
    p, w = wrong/n, z**2/n
    middle, half = (p + w/2)/(1 + w), z*(p*(1 - p)/n + w/4/n)**.5/(1 + w)
    return max(0., middle - half), min(1., middle + half)


def error_rates(
    probs:np.ndarray, # (n,n_out)
    targ:np.ndarray, # (n,) indices
) -> dict: # top1_error, top1_low, top1_high, top5_error, …
    "Top-1 and top-5 error, and the interval of each"
    ranked, found = probs.argsort(1)[:, ::-1], {}
    for k in (1, 5):
        wrong = int((ranked[:, :k] != targ[:, None]).all(1).sum())
        found[f'top{k}_error'] = wrong/len(targ)
        found[f'top{k}_low'], found[f'top{k}_high'] = wilson(wrong, len(targ))
    return found


def balanced_error(
    wrong:np.ndarray, # (n,) is the best guess wrong?
    targ:np.ndarray, # (n,) indices
) -> dict: # balanced_error, balanced_low, balanced_high
    "The mean of the classes' top-1 errors, and its 95 % interval from those of the classes (MOVER: Zou and Donner, 2008)"
    classes, which = np.unique(targ, return_inverse=True)
    n, k = np.bincount(which), np.bincount(which, wrong).astype(int)
    low, high = np.array([wilson(*o) for o in zip(k, n)]).T
    mean, spread = (k/n).mean(), lambda bound: (((k/n - bound)**2).sum()**.5)/len(n)
    return dict(balanced_error=mean, balanced_low=max(0., mean - spread(low)), balanced_high=min(1., mean + spread(high)))


def error_rows(
    protocol:str, # Its name, for the table
    probs:np.ndarray, # (n,n_out)
    targ:np.ndarray, # (n,) indices
    labels=None, # A `LabelMap`: a row for each class; None: one row
): # Yields dicts: protocol, [label,] photos and `error_rates`; of all classes together `balanced_error` too
    "The rows of an evaluation"
    groups = {labels.by_index[i]: targ == i for i in np.unique(targ)} if labels else {None: slice(None)}
    for label, g in groups.items():
        row = dict(protocol=protocol) | (dict(label=label) if labels else {}) | dict(photos=len(targ[g])) | error_rates(probs[g], targ[g])
        yield row | ({} if labels else balanced_error(probs.argmax(1) != targ, targ))


def error_table(
    protocols:list, # Their names, in the table's order
    probs:dict, # {name: (n,n_out) probabilities}
    targ:np.ndarray, # (n,) indices
    labels=None, # A `LabelMap`: a row for each protocol and class; None: for each protocol
) -> pd.DataFrame: # protocol, [label,] photos, top1_error, top1_low, …
    "The rows of several protocols as a table; labels stay text whatever they look like"
    rows = [row for p in protocols for row in error_rows(p, probs[p], targ, labels)]
    text = lambda k: object if k == 'label' else None
    return pd.DataFrame({k: pd.Series([r[k] for r in rows], dtype=text(k)) for k in rows[0]})
