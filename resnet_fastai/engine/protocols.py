"""Names of test protocols: '1crop', '10crop', '50crop', 'dense', and the same at lengths of one's own, like '10crop@110,128'."""
from .arguments import one_of
from .files import DataError

protocols = '1crop', '10crop', '50crop', 'dense'


def split_protocol(
    protocol:str, # One of `protocols`, or with lengths: '10crop@110,128'; not '50crop'
    size:int=224, # Side of the crops, pixels
) -> tuple: # (one of `protocols`; lengths of the shorter side, pixels; None where the name has none)
    "What a protocol's name says; a `DataError` where there is no such protocol"
    kind, at, lengths = str(protocol).partition('@')
    one_of('protocol', kind, protocols)
    if not at: return kind, None
    scales = tuple(int(s) if s.isdecimal() else 0 for s in lengths.split(','))
    if kind != '50crop' and len(scales) <= 10 and all(size <= s <= 9999 for s in scales): return kind, scales
    raise DataError(f"there is no protocol {str(protocol)[:80]!r} at crops of {size} pixels; write it like '10crop@{size},{2*size}'")
