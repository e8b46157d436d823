"""A copy of a network for predictions: batch norm folded into the convolutions, 16 bits where that is faster."""
import copy
import hashlib
import json
import threading
from collections import Counter
from contextlib import suppress
from functools import lru_cache
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .files import _one_of
from .precision import fast_precision


def _probe(size, device, n=1):
    "(n,3,size,size) noise whose amplitude falls with the frequency, as in photos"
    noise = torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))
    f = (torch.fft.fftfreq(size)[:,None]**2 + torch.fft.rfftfreq(size)**2).sqrt()
    x = torch.fft.irfft2(torch.fft.rfft2(noise)/f.clamp(min=1/size), s=(size, size))
    return (x/x.std()/4).to(device).contiguous(memory_format=torch.channels_last)


def _bare(net):
    "The network inside what spreads it over devices or compiles it"
    spread = isinstance(net, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    inner = net.module if spread else getattr(net, '_orig_mod', None)
    return net if inner is None else _bare(inner)


def _copy(net):
    "An independent copy in eval mode and 32 bits; hooks stay the same functions"
    memo = {}
    for m in net.modules():
        own = [p for d in (m._parameters, m._buffers, vars(m)) for p in d.values() if isinstance(p, torch.Tensor)]
        for t in own:
            new = (t.detach().float() if t.is_floating_point() else t.detach()).clone()
            memo[id(t)] = nn.Parameter(new, requires_grad=False) if isinstance(t, nn.Parameter) else new
        memo |= {id(v): copy.copy(v) for k,v in vars(m).items() if k.endswith('_hooks')}
    return copy.deepcopy(net, memo).eval().to(memory_format=torch.channels_last)


class _Watch:
    "Sees a forward pass: which layer reads what a convolution puts out, unchanged"
    def __init__(self, net, x):
        self.reader, self.calls, self.out = {}, Counter(), {}
        leaves = [m for m in net.modules() if not len(m._modules)]
        self.hooked = {m for m in leaves if m._forward_hooks or m._forward_pre_hooks}
        hooks = [m.register_forward_pre_hook(self.read) for m in leaves]
        hooks += [m.register_forward_hook(self.made) for m in leaves if type(m) is nn.Conv2d]
        try: self.logits = net(x)
        finally:
            for h in hooks: h.remove()
        self.out.clear()

    def read(self, m, args):
        self.calls[m] += 1
        conv,out,version = self.out.get(id(args[0]), (None, None, None)) if args and type(m) is not nn.Identity else (None, None, None)
        if conv and out._version == version: self.reader[conv] = m

    def made(self, m, _, out): self.out[id(out)] = (m, out, out._version)

    def alone(self, m): return self.calls[m] == 1 and m not in self.hooked and 'weight' in m._parameters     # used once, as it stands


def fold_bn(
    net:nn.Module, # Changed in place; in eval mode
    x:torch.Tensor, # (B,3,H,W), passes through it once
) -> int: # How many BN layers have become part of a convolution
    "Give the work of each BN to the convolution before it"
    seen = _Watch(net, x)
    pairs = [(c, b) for c,b in seen.reader.items() if type(b) is nn.BatchNorm2d and b.running_mean is not None
             and seen.alone(c) and seen.alone(b)]
    for conv,bn in pairs:
        args = (conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
        w,b = fuse_conv_bn_weights(*[a.cpu().double() if isinstance(a, torch.Tensor) else a for a in args])     # Apple's GPUs have no 64 bits
        conv.weight, conv.bias = (nn.Parameter(p.detach().float().to(conv.weight.device), requires_grad=False) for p in (w, b))
    gone = {bn for _,bn in pairs}
    for m in list(net.modules()):
        for name,child in list(m.named_children()):
            if child in gone: setattr(m, name, nn.Identity())
    return len(pairs)


@lru_cache
def _cpu_conv():
    "oneDNN's convolution of 16-bit numbers that takes a 32-bit bias, where PyTorch has it"
    with suppress(Exception):
        conv, one = torch.ops.mkldnn._convolution_pointwise, torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
        y = conv(one.expand(1, 1, 2, 2), one, torch.full((1,), .5), (0, 0), (1, 1), (1, 1), 1, 'none', [], '')
        if torch.equal(y.float(), torch.full((1, 1, 2, 2), 1.5)): return conv


class HalfConv(nn.Conv2d):
    "A convolution in 16 bits with a bias in 32; `wide`: so is what it puts out"
    wide = False
    def forward(self, x):
        x, rest = x.to(self.weight.dtype), (self.stride, self.padding, self.dilation, self.groups)
        if x.device.type == 'cpu' and x.dtype == torch.bfloat16 and (conv := _cpu_conv()):
            x = conv(x, self.weight, self.bias, self.padding, self.stride, *rest[2:], 'none', [], '')
        else: x = F.conv2d(x, self.weight, None, *rest).add_(0 if self.bias is None else self.bias[:,None,None])
        return x.float() if self.wide else x


class FullLinear(nn.Linear):
    "A linear layer in 32 bits, whatever goes on around it"
    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False): return F.linear(x.float(), self.weight, self.bias)


dtypes = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)


def to_half(
    net:nn.Module, # Changed in place; in eval mode
    x:torch.Tensor, # (B,3,H,W), passes through it once
    precision:str='bf16', # 'bf16' or 'fp16'
):
    "Let the convolutions multiply in 16 bits"
    seen = _Watch(net, x)
    for m in [m for m in net.modules() if type(m) is nn.Conv2d]:
        if m.padding_mode != 'zeros' or isinstance(m.padding, str) or m in seen.hooked or 'weight' not in m._parameters: continue
        m.__class__, m.wide = HalfConv, m not in seen.reader
        m.weight = nn.Parameter(m.weight.to(dtypes[precision]), requires_grad=False)
    for m in [m for m in net.modules() if type(m) is nn.Linear][-1:]: m.__class__ = FullLinear


def _bit_sums(t):
    "(1021,) int64: the bits of a tensor's numbers as whole numbers, every 1021st added up"
    if t.dtype in (torch.bool, torch.bfloat16, torch.float16): t = t.float()
    if t.is_complex(): t = torch.view_as_real(t)
    bits = t.detach().contiguous().flatten()
    bits = bits.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()])
    n = len(bits)//1021*1021
    sums = bits[:n].view(-1, 1021).sum(0)
    sums[:len(bits) - n] += bits[n:]
    return sums


def weights_hash(
    net:nn.Module,
) -> str: # 64 hexadecimal digits; the same in every session
    "What tells a network's numbers, parameters and buffers, from any others"
    named = [*net.named_parameters(), *net.named_buffers()]
    what = json.dumps([(name, str(t.dtype), list(t.shape)) for name,t in named]).encode()
    with torch.no_grad(): sums = torch.stack([_bit_sums(t) for _,t in named]).cpu().numpy() if named else np.zeros(0)
    return hashlib.sha256(what + sums.tobytes()).hexdigest()


_kept, _lock = WeakKeyDictionary(), threading.RLock()


def _plan(net):
    "What a network is made of, apart from its numbers"
    plain = (int, float, bool, str, tuple, type(None))
    own = lambda m: [(k, repr(v)) for k,v in vars(m).items() if isinstance(v, plain) and k != 'training'] + [id(vars(m).get('forward'))]
    return [(name, id(m), own(m)) for name,m in net.named_modules()] + [(t.device, t.dtype) for t in (*net.parameters(), *net.buffers())]


def _make(net, precision, size):
    "Only what answers as the network does"
    device, made = next((t.device for t in net.parameters()), torch.device('cpu')), _copy(net)
    with torch.no_grad():
        x = _probe(size, device)
        before, folded = made(x), copy.deepcopy(made)
        if fold_bn(folded, x) and (folded(x) - before).abs().max() <= 1e-4*before.abs().max(): made = folded
        if precision != 'fp32': to_half(made, x, precision)
    return made


def inference_copy(
    net:nn.Module, # Stays as it is
    precision:str|None='fp32', # 'fp32', 'bf16' or 'fp16'; None: the fastest that the hardware has
    size:int=224, # Side of its input, pixels
) -> nn.Module: # In eval mode; for `torch.autocast` in 16 bits
    "A copy for predictions, BN folded: made at the first call, and anew when the network has changed"
    net = _bare(net)
    precision = precision or fast_precision(next(net.parameters()).device)
    _one_of('precision', precision, dtypes)
    hooked = any(v for m in net.modules() for k,v in vars(m).items() if k.endswith('_hooks'))
    if hooked: return _make(net, precision, size)                                # a hook may hold the network: nothing is kept
    with _lock:
        state, kept = (size, weights_hash(net), _plan(net)), _kept.setdefault(net, {})
        if kept.get(precision, ('',))[0] != state: kept[precision] = state, _make(net, precision, size)
        return kept[precision][1]
