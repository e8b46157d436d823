"""Forward and backward passes in 16 bits where the hardware computes in them."""
import torch
from fastai.callback.core import Callback, CancelBatchException
from fastai.torch_core import to_float

from .files import DataError


def fast_precision(
    device, # Where the network is: a `torch.device`, its name, or the index of a GPU
) -> str: # 'bf16' or 'fp32'
    "The fastest precision that keeps the result: bf16 where the hardware computes in it"
    kind = torch.device(device).type
    if kind == 'cuda': return 'bf16' if torch.cuda.get_device_capability(device)[0] >= 8 or torch.version.hip else 'fp32'
    has = [getattr(torch.cpu, f'_is_{what}_supported', lambda: False)() for what in ('avx512_bf16', 'amx_tile')]
    return 'bf16' if kind == 'cpu' and any(has) else 'fp32'


def precision_and_layout(
    device, # Where the network will be: a `torch.device`, its name, or the index of a GPU; None: the CPU
    precision:str|None=None, # 'fp32', 'bf16' or 'fp16'; None: `fast_precision`
    channels_last:bool|None=None, # None: on a CPU, and in 16 bits
) -> tuple: # (precision, channels_last), both decided
    "Fill in what was left to the hardware; a `DataError` where the precision is none"
    device = torch.device('cpu' if device is None else device)
    precision = precision or fast_precision(device)
    if precision not in ('fp32', 'bf16', 'fp16'): raise DataError(f"precision is {precision!r:.80}; it must be 'fp32', 'bf16' or 'fp16'")
    return precision, device.type == 'cpu' or precision != 'fp32' if channels_last is None else channels_last


class Precision(Callback):
    "Forward and backward passes in 16 bits; weights, BN's statistics, loss and updates in 32"
    order,grad_scaler = -11,None                     # right after `Accumulate`: the other callbacks see gradients that are not scaled
    def __init__(self,
        dtype:str='bf16', # 'bf16' or 'fp16'; 'fp32' for the order in memory only
        channels_last:bool=False, # Photos in the order that 16-bit convolutions like
        **kwargs, # For `GradScaler`, in fp16
    ):
        self.kind,self.channels_last,self.kwargs = dtype,channels_last,kwargs
        self.dtype = dict(fp32=None, bf16=torch.bfloat16, fp16=torch.float16)[dtype]

    def before_fit(self):
        if self.dtype is torch.float16 and self.grad_scaler is None:
            self.grad_scaler = torch.amp.GradScaler(torch.device(self.dls.device).type, **self.kwargs)
        if self.dtype is torch.float16: self.learn.scaler = self.grad_scaler
    def after_fit(self): self.learn.scaler = None

    def forward(self,
        net, # The network
        *xb:torch.Tensor, # Its inputs
    ) -> torch.Tensor: # What it answers, in 32 bits
        "The forward pass; whatever ends it, what follows computes in 32 bits"
        if self.channels_last: xb = [x.contiguous(memory_format=torch.channels_last) for x in xb]
        with torch.autocast(xb[0].device.type, self.dtype, enabled=self.dtype is not None): pred = net(*xb)
        return to_float(pred)

    def before_backward(self):
        if scaler := getattr(self.learn, 'scaler', None): self.learn.loss_grad = scaler.scale(self.loss_grad)
    def after_backward(self):
        if not (scaler := getattr(self.learn, 'scaler', None)): return
        self.fits = False
        scaler.step(self)                                   # divides the gradients; calls our step() if all of them are numbers
        scaler.update()
        if self.fits: return
        self.opt.zero_grad()
        raise CancelBatchException()                        # this update is left out, the next one is scaled less
    def step(self): self.fits = True
    @property
    def param_groups(self): return self.opt.param_groups
