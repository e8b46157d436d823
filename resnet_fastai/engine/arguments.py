"""Checks of arguments, whose error messages say what would do."""
from numbers import Integral


def one_of(
    name:str, # Of the argument, for the error message
    value, # What was passed
    choices, # What may be passed
): # The value
    "The value, if it is among the choices; a ValueError that lists them otherwise"
    if value in list(choices): return value
    raise ValueError(f"{name} is {value!r:.80}; it must be one of {', '.join(map(repr, choices))}")


def whole_number(
    name:str, # Of the argument, for the error message
    value, # What was passed
) -> int: # The value
    "The value, if it is a whole number from 1 on; a ValueError otherwise"
    if isinstance(value, Integral) and not isinstance(value, bool) and value >= 1: return int(value)
    raise ValueError(f"{name} is {value!r:.80}; it must be a whole number, 1 or more")
