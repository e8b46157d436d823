"Batch norm's exact statistics, beside sums over the very same activations."
import pytest
import torch
from torch import nn

from resnet_fastai.core import ResNet
from resnet_fastai.data import demo_data
from resnet_fastai.engine.checkpoint import get_rng
from resnet_fastai.engine.exact_bn import exact_bn
from resnet_fastai.engine.files import DataError

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture
def model(tmp_path):
    paths = demo_data(tmp_path/'drawn', sizes=dict(train=48, val=8, test=4))
    return ResNet(*paths, arch='cifar_resnet8', size=32, bs=16, micro_bs=16, num_workers=0, precision='fp32')


def norms(net): return [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]


def test_plain_averages_of_batch_statistics(model):
    net, found = model.net, {}
    def look(m, args): found.setdefault(m, []).append((args[0].mean((0, 2, 3)), args[0].transpose(0, 1).flatten(1).var(1)))
    hooks = [m.register_forward_pre_hook(look) for m in norms(net)]
    assert exact_bn(model, 32) == 32
    for h in hooks: h.remove()
    for m in norms(net):
        assert len(found[m]) == 2
        mean, var = (torch.stack(v).mean(0) for v in zip(*found[m]))
        torch.testing.assert_close(m.running_mean, mean.as_subclass(torch.Tensor), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(m.running_var, var.as_subclass(torch.Tensor), atol=1e-5, rtol=1e-4)


def test_one_batch_normalises_itself(model):
    "With one batch's own statistics, evaluation does what training does to that batch"
    x, _ = model.learn.dls.one_batch()
    class One(list): rng = model.learn.dls.valid.rng
    model.learn.dls.loaders[0] = One([(x, None)])
    exact_bn(model, 16)
    net = model.net
    with torch.no_grad(): by_exact, by_batch = net.eval()(x), net.train()(x)
    n = x[0, 0].numel()*len(x)
    torch.testing.assert_close(by_exact, by_batch, atol=20/n, rtol=.02)      # unbiased against biased variance


def test_everything_else_stays(model):
    net, before = model.net, get_rng(model.learn.dls.loaders)
    weights = {k: v.clone() for k, v in net.named_parameters()}
    net.train()
    model.net.layer1.eval()
    exact_bn(model)
    assert net.training and not net.layer1.training and {m.momentum for m in norms(net)} == {.1}
    assert all(torch.equal(v, weights[k]) for k, v in net.named_parameters())
    after = get_rng(model.learn.dls.loaders)
    assert torch.equal(before['torch'], after['torch']) and torch.equal(before['loaders'][0][1], after['loaders'][0][1])


def test_the_moving_averages_come_back_after_an_interrupt(model):
    old = {k: v.clone() for k, v in model.net.named_buffers()}
    def stop(m, args):
        if m.num_batches_tracked: raise KeyboardInterrupt
    hook = norms(model.net)[-1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt): exact_bn(model)
    hook.remove()
    assert all(torch.equal(v, old[k]) for k, v in model.net.named_buffers()) and norms(model.net)[0].momentum == .1


def test_refusals(model, tmp_path):
    with pytest.raises(DataError, match='photos is 1'): exact_bn(model, 1)
    with pytest.raises(DataError, match='no training photos'): exact_bn(model.net)
