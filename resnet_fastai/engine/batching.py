"""Load ahead in threads, and fill batches whatever the size of the groups."""
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import chain

import torch
from fastai.torch_core import defaults
from torch import nn


def prefetch(
    load:Callable, # Of an item
    items:Iterable, # A `PhotoList` of a server's shards is fetched ahead
    num_workers:int|None=None, # Threads; 0: none; None: one a core, 16 at most
    depth:int=0, # So many items are loaded ahead, besides two a thread
    single:bool=False, # Let PyTorch use one core in each of these threads
) -> Iterator: # load(item) for each, in their order
    "Load items in threads, a few more than are asked for"
    num_workers = defaults.cpus if num_workers is None else num_workers
    items = items.ahead() if hasattr(items, 'ahead') else items
    if not num_workers: yield from map(load, items); return
    cores = torch.get_num_threads()
    pool, soon = ThreadPoolExecutor(num_workers, initializer=partial(torch.set_num_threads, 1) if single else None), deque()
    try:
        for item in items:
            soon.append(pool.submit(load, item))
            if len(soon) > 2*num_workers + depth: yield soon.popleft().result()
        while soon: yield soon.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        if single: torch.set_num_threads(cores)                       # what threads to come begin with


def batched_forward(
    ask:Callable, # (n,…) → (n,n_out), perhaps on a GPU that is not yet done with it
    groups:Iterable, # Tensors (nᵢ,…)
    bs:int, # Rows that are asked about at a time
    gpu:bool|None=None, # Is a GPU asked? None: where there is one
) -> Iterator: # (nᵢ,n_out) on the CPU for each group
    "Ask about groups of rows in batches that do not care where a group ends"
    sizes, answers, running = deque(), torch.empty(0), None
    gpu = torch.cuda.is_available() if gpu is None else gpu
    for x in chain(_filled(groups, bs, sizes, gpu), [None]):
        said, running = running, None if x is None else ask(x)                   # the next batch is under way while this one is fetched
        if said is not None: answers = torch.cat([answers, said.cpu()])
        while sizes and len(answers) >= sizes[0]:
            n = sizes.popleft()
            yield answers[:n]
            answers = answers[n:]


def _filled(groups, bs, sizes, gpu):
    "Two batches in turns, filled from groups; a GPU copies from them by itself, and gets a last batch of the usual shape, which it knows"
    batches, n, i = [None, None], 0, 0
    for group in groups:
        sizes.append(len(group))
        while len(group):
            if batches[i] is None:
                layout = torch.channels_last if group.ndim == 4 else torch.contiguous_format
                batches[i] = torch.empty((bs, *group.shape[1:]), dtype=group.dtype, memory_format=layout,
                                         pin_memory=gpu and torch.cuda.is_available())
            k = min(bs - n, len(group))
            batches[i][n:n + k], group, n = group[:k], group[k:], n + k
            if n == bs: yield batches[i]; n, i = 0, 1 - i
    if n: yield batches[i] if gpu and batches[1 - i] is not None else batches[i][:n]


def batch_size(
    net:nn.Module,
    size:int=224, # Side of the crops, pixels
) -> int: # Crops
    "How many crops at a time fill a GPU, or stay in the cache of a CPU"
    device = next(net.parameters()).device
    if device.type == 'cpu': return max(1, min(64, round(4*torch.get_num_threads()*(224/size)**2)))
    free = torch.cuda.mem_get_info(device)[0] if device.type == 'cuda' else 8 << 30
    # 64 MiB a crop: twice what ResNet-50 takes in 32 bits
    return max(1, min(round(250*(224/size)**2), int(free/2/((64 << 20)*(size/224)**2))))


@lru_cache(maxsize=64)
def _sent(values, shape, device): return torch.tensor(values, device=device).view(shape)


def constant(
    t:torch.Tensor, # A few numbers of float32, on the CPU
    device:torch.device,
) -> torch.Tensor: # The same on the device; not to be changed
    "A small tensor where it is needed, sent there once and not with each batch"
    return t if device.type == 'cpu' else _sent(tuple(t.flatten().tolist()), tuple(t.shape), device)
