"""Checks of arguments, whose error messages say what would do."""
from inspect import signature
from numbers import Integral

from fastcore.meta import delegates

from .files import DataError


def one_of(
    name:str, # Of the argument, for the error message
    value, # What was passed
    choices, # What may be passed
): # The value
    "The value, if it is among the choices; a `DataError` that lists them otherwise"
    if value in list(choices): return value
    raise DataError(f"{name} is {value!r:.80}; it must be one of {', '.join(map(repr, choices))}")


def whole_number(
    name:str, # Of the argument, for the error message
    value, # What was passed; NumPy's whole numbers count
    low:int=1, # The smallest
    high:int|None=None, # The largest
    why:str='', # What the message says before the limits
) -> int: # The value
    "The value, if it is a whole number in these limits; a `DataError` otherwise"
    if isinstance(value, Integral) and not isinstance(value, bool) and low <= value <= (value if high is None else high): return int(value)
    limits = f'{low} or more' if high is None else f'from {low} to {high:,}'
    raise DataError(f"{name} is {value!r:.80}; {why}it must be a whole number, {limits}")


def how_many(
    n:int|None, # Labels that are asked for; None: five, or all where there are fewer
    known:int, # Labels that a model knows
) -> int:
    "Labels for each photo; a `DataError` where there are not so many"
    return min(5, known) if n is None else whole_number('n', n, 1, known, f'this model knows {known} labels: ')


def also_takes(
    to, # A function, whose arguments with defaults are added to the signature
): # A decorator of a function with **kwargs
    "fastcore's `delegates` for a function that keeps its kwargs; `docments` finds the comments"
    def decorate(f):
        f = delegates(to, keep=True)(f)
        f.__delwrap__ = to
        return f
    return decorate


def take(
    kwargs:dict, # Arguments; those of `f` are taken out
    f, # A function
) -> dict: # Arguments for `f`
    "Split the arguments of a function from others"
    return {k: kwargs.pop(k) for k in signature(f).parameters if k in kwargs}


def check_learner(
    dls, # Loaders of a learner
    decay:str, # Which tensors are to decay
    schedule=None, # Of the rate: None, a name or a callback
):
    "A `DataError` where the loaders have no validation photos, or decay or schedule is none that there is"
    if isinstance(schedule, str) and schedule != 'one_cycle':
        raise DataError(f"schedule is {schedule!r:.80}; it must be 'one_cycle' or a callback")
    if decay not in ('weights', 'conv_fc', 'all'): raise DataError(f"decay is {decay!r:.80}; it must be 'weights', 'conv_fc' or 'all'")
    if len(dls.loaders) < 2 or not len(dls.valid):
        raise DataError("these loaders have no validation photos; leave some out of training, for example with RandomSplitter()")


def short_sides(
    augment:str, # 'paper' or 'wide'
    size:int, # Side of the crop, pixels
    min_side:int|None=None, # Shortest short side, pixels; None: as augment says
    max_side:int|None=None, # Longest short side, pixels; None: as augment says
) -> tuple: # (min_side, max_side), pixels; None: the paper's, in proportion
    "To which short sides training resizes a photo: 'wide' crops see 44 to 92 % of a square one, the paper's 22 to 77 %"
    try: one_of('augment', augment, ('paper', 'wide'))
    except ValueError as e: raise DataError(str(e)) from None
    if augment == 'paper': return min_side, max_side
    low = round(1.04*size) if min_side is None else min_side
    return low, max(low, round(1.5*size)) if max_side is None else max_side
