"""Forward and backward passes in 16 bits where the hardware computes in them."""
import torch
from fastai.callback.core import Callback, CancelStepException


def fast_precision(
    device, # Where the network is: a `torch.device`, or its name
) -> str: # 'bf16' or 'fp32'
    "The fastest precision that keeps the result: bf16 where the hardware computes in it"
    kind = torch.device(device).type
    if kind == 'cuda': return 'bf16' if torch.cuda.get_device_capability(device)[0] >= 8 or torch.version.hip else 'fp32'
    has = [getattr(torch.cpu, f'_is_{what}_supported', lambda: False)() for what in ('avx512_bf16', 'amx_tile')]
    return 'bf16' if kind == 'cpu' and any(has) else 'fp32'


class Precision(Callback):
    "Forward and backward passes in 16 bits; weights, BN's statistics, loss and updates in 32"
    order = 70                                              # after `Accumulate` has let the update through
    def __init__(self,
        dtype:str='bf16', # 'bf16' or 'fp16'
        channels_last:bool=False, # Photos in the order that 16-bit convolutions like
    ): self.dtype,self.channels_last,self.cast = dict(fp32=None, bf16=torch.bfloat16, fp16=torch.float16)[dtype],channels_last,None

    def before_fit(self):
        if self.dtype is torch.float16: self.learn.scaler = torch.amp.GradScaler(self._device())
    def _device(self): return next(self.model.parameters()).device.type
    def before_batch(self):
        if self.channels_last: self.learn.xb = tuple(x.contiguous(memory_format=torch.channels_last) for x in self.xb)
        self.cast = torch.autocast(self._device(), self.dtype, enabled=self.dtype is not None)
        self.cast.__enter__()
    def after_pred(self):
        self.close()
        self.learn.pred = self.pred.float()
    def close(self):
        "Back to 32 bits, also when a forward pass broke off"
        if self.cast: self.cast.__exit__(None, None, None)
        self.cast = None
    def after_fit(self): self.learn.scaler = None

    def before_backward(self):
        if scaler := getattr(self.learn, 'scaler', None): self.learn.loss_grad = scaler.scale(self.loss_grad)
    def before_step(self):
        if not (scaler := getattr(self.learn, 'scaler', None)): return
        self.fits = False
        scaler.step(self)                                   # divides the gradients; calls our step() if all of them are numbers
        scaler.update()
        if not self.fits: raise CancelStepException()       # this update is left out, the next one is scaled less
    def step(self): self.fits = True
    @property
    def param_groups(self): return self.opt.param_groups
