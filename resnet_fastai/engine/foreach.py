"""SGD's step in a few kernels for all parameters, in the place of a Python loop over them."""
import torch
from fastai.optimizer import Optimizer, average_grad, l2_reg, momentum_step


def _is_sgd(opt):
    "fastai's SGD with momentum and L2 decay, as it is: nobody has put a step of their own in its place"
    return isinstance(opt, Optimizer) and list(opt.cbs) == [l2_reg, average_grad, momentum_step] and type(opt).step is Optimizer.step \
        and 'step' not in vars(opt) and not any(h.get('dampening') for h in opt.hypers)


def foreach_step(
    opt, # A fastai optimizer
):
    "`opt.step()` in a few kernels for all parameters, where it is SGD with momentum; the same numbers"
    if not _is_sgd(opt): return opt.step()
    for group, h in zip(opt.param_lists, opt.hypers):
        ps = [p for p in group if p.grad is not None]
        if not ps: continue
        for p in ps:
            if 'grad_avg' not in opt.state[p]: opt.state[p]['grad_avg'] = torch.zeros_like(p.grad)
        values, grads, avgs = [p.data for p in ps], [p.grad.data for p in ps], [opt.state[p]['grad_avg'] for p in ps]
        decays = [i for i, p in enumerate(ps) if opt.state[p].get('do_wd', True)] if h['wd'] else []
        if decays: torch._foreach_add_([grads[i] for i in decays], [values[i] for i in decays], alpha=h['wd'])
        torch._foreach_mul_(avgs, h['mom'])
        torch._foreach_add_(avgs, grads)
        torch._foreach_add_(values, avgs, alpha=-h['lr'])


def release_grads(
    opt, # A fastai optimizer
):
    "Give gradients back in the place of setting them to zero: the next backward pass writes them without reading"
    if type(opt).zero_grad is not Optimizer.zero_grad or 'zero_grad' in vars(opt): return opt.zero_grad()
    for group in opt.param_lists:
        for p in group: p.grad = None


def to_host(
    x:torch.Tensor, # Of any shape, on any device
): # A function without arguments that waits for the copy and returns it
    "Start to copy a tensor to the processor; what was queued for the GPU afterwards runs on meanwhile"
    if x.device.type != 'cuda': return lambda: x
    here, done = torch.empty(x.shape, dtype=x.dtype, pin_memory=True), torch.cuda.Event()
    here.copy_(x.detach(), non_blocking=True)
    done.record()
    def wait():
        done.synchronize()
        return here
    return wait
