"""A copy of a network for predictions: batch norm folded into the convolutions, 16 bits where that is faster."""
import copy
import hashlib
import json
import threading
from collections import Counter
from contextlib import suppress
from functools import lru_cache
from types import BuiltinFunctionType, FunctionType
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .arguments import one_of
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
        # Apple's GPUs have no 64 bits
        w,b = fuse_conv_bn_weights(*[a.cpu().double() if isinstance(a, torch.Tensor) else a for a in args])
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


def _bits(t):
    "A tensor's numbers as whole numbers, so that NaN equals NaN and -0 differs from 0"
    t = torch.view_as_real(t.detach()) if t.is_complex() else t.detach()
    return t.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def weights_hash(
    net:nn.Module,
) -> str: # 64 hexadecimal digits; the same in every session
    "SHA-256 of weights and buffers"
    digest = hashlib.sha256()
    for name,t in (*net.named_parameters(), *net.named_buffers()):
        digest.update(json.dumps([name, str(t.dtype), list(t.shape)]).encode())
        digest.update(memoryview(_bits(t).cpu().contiguous().flatten().numpy()).cast('B') if t.numel() else b'')
    return digest.hexdigest()


class _Unknown(Exception): "Something in a network that cannot be compared"


def _setting(v):
    "A setting of a layer as something that `==` compares; functions and classes are themselves"
    if v is None or isinstance(v, (bool, int, float, str, torch.dtype, torch.device, torch.memory_format)): return type(v), repr(v)
    if isinstance(v, (tuple, list, set, frozenset)): return type(v), [_setting(i) for i in v]
    if isinstance(v, dict): return type(v), [(_setting(k), _setting(i)) for k,i in v.items()]
    if isinstance(v, (type, FunctionType, BuiltinFunctionType)): return v
    raise _Unknown


class _Snapshot:
    "All that decides what a network computes: layers, their settings and methods, and every bit of its tensors"
    apart = {'training', '_parameters', '_buffers', '_modules', '_non_persistent_buffers_set', '_compiled_call_impl'}
    def __init__(self, net):
        self.settings, self.tensors = [], []
        for name,m in net.named_modules(remove_duplicate=False):
            # a layer itself: no id is used again
            self.settings += [(name, None if m is net else m, type(m), type(m).forward, list(m._modules))]
            tensors = [*m._parameters.items(), *m._buffers.items(), *((k, v) for k,v in vars(m).items() if isinstance(v, torch.Tensor))]
            self.tensors += [t for _,t in tensors if t is not None]
            self.settings += [(k, None if t is None else (type(t), t.dtype, t.device, t.shape)) for k,t in tensors]
            for k,v in vars(m).items():
                if k.endswith('_hooks') and v: raise _Unknown                     # a hook may do anything, and hold the network
                if k not in self.apart and '_hooks' not in k and not isinstance(v, torch.Tensor): self.settings.append((k, _setting(v)))

    def keep(self):
        "Copy the tensors, which go on to change"
        self.tensors = [_bits(t).clone() for t in self.tensors]
        return self

    def same_as(self,
        kept, # What `keep` has returned earlier
    ) -> bool:
        "Does the network stand as it stood then, to the bit?"
        if self.settings != kept.settings: return False
        pairs = [(_bits(a), b) for a,b in zip(self.tensors, kept.tensors)]
        if all(a.device.type == 'cpu' for a,_ in pairs): return all(torch.equal(a, b) for a,b in pairs)
        return not torch.stack([(a != b).any() for a,b in pairs]).any()           # a GPU is asked once


_kept, _lock = WeakKeyDictionary(), threading.RLock()


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
    size:int=224, # Side of an input that it takes, pixels
) -> nn.Module: # In eval mode; for `torch.autocast` in 16 bits
    "A copy for predictions, BN folded: made at the first call, and anew when anything of the network has changed"
    net = _bare(net)
    precision = precision or fast_precision(next(net.parameters()).device)
    one_of('precision', precision, dtypes)
    with _lock:
        try: now = _Snapshot(net)
        except (_Unknown, RuntimeError, KeyError): return _make(net, precision, size)      # what cannot be compared is not kept
        was, made = _kept.get(net, (None, {}))
        if was is None or not now.same_as(was): _kept[net] = now.keep(), (made := {})
        if precision not in made: made[precision] = _make(net, precision, size)
        return made[precision]
