"The copy of a network that predictions use gives the network's own answers, and is never one of yesterday's."
import copy

import pytest
import torch
import torchvision
from torch import nn

from resnet_fastai.engine.batching import batched_forward, prefetch
from resnet_fastai.engine.fast_net import HalfConv, fold_bn, inference_copy, to_half, weights_hash
from resnet_fastai.model import build_net

pytestmark = pytest.mark.usefixtures('one_thread')


class Before(nn.Module):
    "BN, then convolution: nothing to fold, though the channels would fit; and a convolution that two read"
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv1(self.bn1(x)).relu()
        z = self.conv2(y)
        return (self.bn2(z) + z).mean((2, 3))


def with_statistics(net, size=64):
    torch.manual_seed(0)
    with torch.no_grad(): net.train()(torch.rand(8, 3, size, size)*2 - 1)
    return net.eval()


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.rand(3, 3, 64, 64) - .5


nets = {'resnet18': lambda: build_net('resnet18', 5), 'resnet50': lambda: build_net('resnet50', 5), 'cifar_resnet8': lambda: build_net('cifar_resnet8', 5),
        'plain18': lambda: build_net('plain18', 5), 'torchvision': torchvision.models.resnet18, 'before': Before}


@pytest.mark.parametrize('name, folded', [('resnet18', 20), ('resnet50', 53), ('cifar_resnet8', 7), ('plain18', 17), ('torchvision', 20), ('before', 1)])
@torch.no_grad()
def test_each_bn_goes_into_the_convolution_that_it_reads(x, name, folded):
    net = with_statistics(nets[name]())
    made = copy.deepcopy(net)
    assert fold_bn(made, x) == folded
    if name != 'before': torch.testing.assert_close(made(x), net(x), atol=1e-5*net(x).abs().max().item(), rtol=0)


@pytest.mark.parametrize('make, wide', [(lambda: build_net('resnet50', 5), 20), (torchvision.models.resnet50, 20),
                                        (lambda: build_net('resnet18', 5, shortcut='A'), 8), (lambda: build_net('plain18', 5), 0)])
@torch.no_grad()
def test_sums_of_shortcut_and_residual_stay_in_32_bits(x, make, wide):
    net = with_statistics(make())
    fold_bn(net, x)
    to_half(net, x)
    assert sum(m.wide for m in net.modules() if isinstance(m, HalfConv)) == wide           # the ends of the residual branches, and the projections
    assert net.conv1.weight.dtype == torch.bfloat16 and net.conv1.bias.dtype == torch.float32


@torch.no_grad()
def test_a_bias_is_rounded_once():
    net = nn.Sequential(nn.Conv2d(1, 100, 1))                                               # its bias alone is what comes out
    nn.init.zeros_(net[0].weight)
    bias = net[0].bias.detach().clone()
    to_half(net, torch.ones(1, 1, 2, 2))
    assert torch.equal(net(torch.ones(1, 1, 2, 2))[0, :, 0, 0].bfloat16(), bias.bfloat16())


def test_the_hash_tells_weights_apart():
    net, hashes = build_net('cifar_resnet8', 5), set()
    hashes.add(weights_hash(net))
    assert weights_hash(copy.deepcopy(net).to(memory_format=torch.channels_last)) in hashes
    for change in [lambda: net.fc.weight.data[0].add_(1e-6), lambda: net.bn1.running_mean.add_(.1), lambda: net.bn1.weight.fill_(.5),
                   lambda: net.bn1.weight.fill_(.25), lambda: net.fc.weight.copy_(net.fc.weight.flip(0)),
                   lambda: net.conv1.weight.copy_(net.conv1.weight.flip(3)), lambda: net.fc.bias.zero_()]:
        with torch.no_grad(): change()
        assert weights_hash(net) not in hashes
        hashes.add(weights_hash(net))


@pytest.mark.parametrize('make', [nets['resnet18'], lambda: build_net('cifar_plain8', 5), torchvision.models.resnet18, Before,
                                  lambda: torchvision.models.mobilenet_v3_small(num_classes=5)])
@torch.no_grad()
def test_the_copy_answers_as_the_network_does(x, make):
    net = with_statistics(make())
    now = net(x)
    torch.testing.assert_close(inference_copy(net, 'fp32', 64)(x), now, atol=1e-5*now.abs().max().item(), rtol=0)


@torch.no_grad()
def test_the_copy_is_never_of_yesterday(x):
    net = with_statistics(build_net('resnet18', 5))
    net.train()
    for change in [lambda: net.fc.bias.data.add_(1), lambda: with_statistics(net), lambda: setattr(net, 'relu', nn.SiLU()),
                   lambda: setattr(net.bn1, 'eps', .1), lambda: net.fc.weight.copy_(net.fc.weight.flip(0))]:
        inference_copy(net, 'fp32', 64)
        change()
        torch.testing.assert_close(inference_copy(net, 'fp32', 64)(x), copy.deepcopy(net).eval()(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('bs', [1, 4, 5, 100])
def test_batches_do_not_care_where_a_group_ends(bs):
    sent, groups = [], [torch.full((n, 2), float(i)) for i, n in enumerate([3, 0, 7, 1, 12, 2])]
    def ask(x):
        sent.append(len(x))
        return x*10
    found = list(batched_forward(ask, iter(groups), bs))
    assert [len(f) for f in found] == [3, 0, 7, 1, 12, 2] and all(torch.equal(f, g*10) for f, g in zip(found, groups) if len(g))
    assert sent == [bs]*(25//bs) + [25 % bs]*(25 % bs > 0) and list(batched_forward(ask, iter([]), 5)) == []


@pytest.mark.parametrize('n, sent', [(3, [3]), (4, [4]), (5, [4, 4]), (8, [4, 4]), (11, [4, 4, 4])])
def test_a_gpu_sees_one_shape_only_and_the_rest_is_left_out(n, sent):
    seen, groups = [], [torch.full((1, 2), float(i)) for i in range(n)]
    def ask(x):
        seen.append(len(x))
        return x + 1
    assert torch.equal(torch.cat(list(batched_forward(ask, iter(groups), 4, gpu=True))), torch.cat(groups) + 1) and seen == sent


@pytest.mark.parametrize('workers', [0, 1, 3])
def test_prefetch_keeps_the_order(workers): assert list(prefetch(lambda i: i*i, range(20), workers)) == [i*i for i in range(20)]
