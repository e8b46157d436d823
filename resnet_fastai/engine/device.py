"Which device computes: an index, a name, or what PyTorch calls one."
from numbers import Integral

import torch
from fastai.torch_core import default_device

from .files import DataError, quote


def as_device(
    device=None, # 'cpu', 'cuda', 'cuda:1', the index of a GPU as a number or a text, or a `torch.device`; None: the GPU where there is one
) -> torch.device:
    "A device that is there; a `DataError` where it is not"
    if device is None: return default_device()
    index = isinstance(device, Integral) and not isinstance(device, bool) or isinstance(device, str) and device.isdecimal()
    try: found = torch.device('cuda', int(device)) if index else torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        raise DataError(f"device is {quote(device)}; it must be 'cpu', 'cuda', 'cuda:1', the index of a GPU, or a torch.device") from None
    if found.type == 'cuda' and (found.index or 0) >= (n := torch.cuda.device_count()*torch.cuda.is_available()):
        raise DataError(f"device is {quote(device)}, and PyTorch finds {n or 'no'} GPU{'s'*(n != 1)} here; leave device out, or name "
                        "another")
    return found


def use_device(
    device, # As for `as_device`
):
    "Compute there wherever no device is named"
    found = as_device(device)
    default_device(found.type != 'cpu')
    if found.type == 'cuda' and found.index is not None: torch.cuda.set_device(found)
