"""The family against the paper's Table 1, against torchvision and timm, and under what PyTorch does to a module.

The table is written from the paper, not from the code. Nothing is downloaded."""
import copy
import itertools
import pickle
import shutil
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision.models as tvm
import fastai.callback.progress  # gives a Learner `no_bar`
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import SGD
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from resnet_fastai.model import (Block, IdentityBlock, ProjectionBlock, ZeroPad, ZeroPadBlock, block_convs, build_net, cifar_plain,
                                 cifar_resnet, conv, count_macs, count_params, init_he, plain, resnet, resnet50)

DEPTHS = (18, 34, 50, 101, 152)
META = torch.device('meta')           # shapes without values: whole networks at 224 pixels in no time


def on_meta(make, *args, **kwargs):
    with META: return make(*args, **kwargs)


# ── Table 1, from the paper ──────────────────────────────────────────────────────────────────────────────────────────────────
# conv2_x … conv5_x: the (kernel, channels) of a block's convolutions, and how many blocks for each depth
BASIC = [[(3, 64), (3, 64)], [(3, 128), (3, 128)], [(3, 256), (3, 256)], [(3, 512), (3, 512)]]
BOTTLENECK = [[(1, 64), (3, 64), (1, 256)], [(1, 128), (3, 128), (1, 512)],
              [(1, 256), (3, 256), (1, 1024)], [(1, 512), (3, 512), (1, 2048)]]
TABLE_1 = {18: (BASIC, (2, 2, 2, 2)), 34: (BASIC, (3, 4, 6, 3)), 50: (BOTTLENECK, (3, 4, 6, 3)),
           101: (BOTTLENECK, (3, 4, 23, 3)), 152: (BOTTLENECK, (3, 8, 36, 3))}
SIZES_AT_224 = (112, 56, 28, 14, 7)
PAPER_GFLOPS = {18: 1.8, 34: 3.6, 50: 3.8, 101: 7.6, 152: 11.3}


def paper_convs(depth, stride_at='1x1', shortcut='B', size=224):
    "(kernel, stride, padding, channels in, channels out, output size) of each convolution, the projection after its block's own"
    blocks, counts = TABLE_1[depth]
    half = lambda s: (s + 1)//2
    size = half(size)
    rows, ni = [(7, 2, 3, 3, 64, size)], 64
    size = half(size)                                                                    # the 3×3 max-pool of stride 2
    for stage, (block, n) in enumerate(zip(blocks, counts)):
        for i in range(n):
            shrinks, first_in = i == 0 and stage > 0, ni                                 # conv3_1, conv4_1 and conv5_1
            strided = 1 if stride_at == '3x3' and len(block) == 3 else 0
            for j, (k, nf) in enumerate(block):
                if shrinks and j == strided: size = half(size)
                rows.append((k, 2 if shrinks and j == strided else 1, k//2, ni, nf, size))
                ni = nf
            if shortcut == 'C' or (shortcut == 'B' and (shrinks or first_in != ni)):
                rows.append((1, 2 if shrinks else 1, 0, first_in, ni, size))
    return rows


def net_convs(net, size=224):
    "The same, as a forward pass meets them"
    rows = []
    def look(m, _, out):
        (k, k2), (s, s2), (p, p2), (h, w) = m.kernel_size, m.stride, m.padding, out.shape[2:]
        assert (k, s, p, h) == (k2, s2, p2, w) and m.bias is None and m.groups == 1 and m.dilation == (1, 1)
        rows.append((k, s, p, m.in_channels, m.out_channels, h))
    hooks = [m.register_forward_hook(look) for m in net.modules() if isinstance(m, nn.Conv2d)]
    net(torch.empty(1, 3, size, size, device=META))
    for h in hooks: h.remove()
    return rows


def macs(rows, features, n_out):
    return sum(k*k*ni*nf*size*size for k, _, _, ni, nf, size in rows) + features*n_out


@pytest.mark.paper('3.2-layers', '3.2-bias', '3.3-stride', '3.3-B', '3.3-across', '4.1-table-1', '4.1-downsample', '4.1-C', '4.1-bottleneck')
@pytest.mark.parametrize('depth', DEPTHS)
def test_convolutions_are_those_of_table_1(depth):
    for stride_at, shortcut, size in itertools.product(('1x1', '3x3'), 'ABC', (224, 97)):
        net = on_meta(resnet, depth, stride_at=stride_at, shortcut=shortcut)
        assert net_convs(net, size) == paper_convs(depth, stride_at, shortcut, size)
    layers = [r for r in paper_convs(depth, shortcut='A')]
    assert len(layers) + 1 == depth                                                      # the fully connected layer is the last
    assert [r[-1] for r in layers if r[1] == 2] == [112, 28, 14, 7] and {r[-1] for r in layers} == set(SIZES_AT_224)


@pytest.mark.paper('3.3-3x3', '4.1-plain')
@pytest.mark.parametrize('depth', (18, 34))
def test_plain_nets_have_the_layers_of_table_1(depth):
    assert net_convs(on_meta(plain, depth)) == paper_convs(depth, shortcut='none')


@pytest.mark.paper('4.2-net')
@pytest.mark.parametrize('n', (1, 3, 9))
@pytest.mark.parametrize('make', (cifar_resnet, cifar_plain))
def test_cifar_nets_have_the_layers_of_section_4_2(make, n):
    maps, sizes = (16, 32, 64), (32, 16, 8)
    rows, ni = [(3, 1, 1, 3, 16, 32)], 16
    for nf, size in zip(maps, sizes):
        for i in range(2*n):
            rows.append((3, 2 if ni != nf else 1, 1, ni, nf, size))
            ni = nf
    net = on_meta(make, n)
    assert net_convs(net, 32) == rows and len(rows) + 1 == 6*n + 2
    assert net.fc.in_features == 64 and net.fc.out_features == 10
    assert count_macs(net, 32) == macs(rows, 64, 10)


@pytest.mark.paper('4.2-A', '4.2-table-6')
@pytest.mark.parametrize('n,millions', [(3, .27), (5, .46), (7, .66), (9, .85), (18, 1.7), (200, 19.4)])
def test_cifar_parameters_are_those_of_table_6(n, millions):
    for make in (cifar_resnet, cifar_plain):
        p = count_params(on_meta(make, n))/1e6
        assert round(p, 1 if millions > 1 else 2) == millions


@pytest.mark.paper('3.3-34', '4.1-flops')
@pytest.mark.parametrize('depth', DEPTHS)
@pytest.mark.parametrize('stride_at', ('1x1', '3x3'))
def test_multiply_adds_equal_the_formula_and_pytorchs_counter(depth, stride_at):
    net = on_meta(resnet, depth, 10, stride_at=stride_at)
    for size in (224, 97):
        formula = macs(paper_convs(depth, stride_at, size=size), 2048 if depth >= 50 else 512, 10)
        assert count_macs(net, size) == formula
    with FlopCounterMode(display=False) as counter: net(torch.empty(1, 3, size, size, device=META))
    assert counter.get_total_flops() == 2*formula
    if stride_at == '1x1': assert abs(count_macs(on_meta(resnet, depth))/1e9 - PAPER_GFLOPS[depth]) <= .1


def test_counting_leaves_the_network_alone():
    net = resnet(18, 5).train()
    net.layer1.eval()
    before = copy.deepcopy(net.state_dict())
    count_macs(net, 64)
    assert net.training and not net.layer1.training and not net.conv1._forward_hooks
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert count_macs(net.to(torch.bfloat16), 64) == count_macs(resnet(18, 5), 64)


@pytest.mark.paper('4.1-50')
def test_resnet50_by_numbers():
    assert count_params(on_meta(resnet50)) == 25_557_032
    assert count_macs(on_meta(resnet50)) == 3_857_973_248 and count_macs(on_meta(resnet50, stride_at='3x3')) == 4_089_184_256


# ── Other people's networks ──────────────────────────────────────────────────────────────────────────────────────────────────

def lived_in(net, n_out=10):
    "The network with BN statistics that belong to its weights, so that signals stay in range at any depth"
    bns = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for bn in bns: bn.momentum = 1.
    with torch.no_grad(): net.train()(torch.randn(8, 3, 64, 64))
    for bn in bns:
        bn.momentum = .1
        nn.init.uniform_(bn.bias, -.1, .1)
    return net


def same_logits(ours, theirs, sizes=((64, 96), (97, 65))):
    "In training and in evaluation, BN statistics included"
    with torch.no_grad():
        for h, w in sizes:
            x = torch.randn(3, 3, h, w)
            for mode in (True, False):
                torch.testing.assert_close(ours.train(mode)(x), theirs.train(mode)(x), rtol=1e-5, atol=1e-5)
    theirs = theirs.state_dict()
    for k, v in ours.state_dict().items(): torch.testing.assert_close(v, theirs[k], rtol=1e-5, atol=1e-5)


@pytest.fixture(scope='module', params=DEPTHS)
def torchvisions(request):
    torch.manual_seed(request.param)
    return request.param, lived_in(getattr(tvm, f'resnet{request.param}')(num_classes=10))


@pytest.mark.paper('3.2-projection')
def test_torchvisions_weights_load_strictly_and_give_its_logits(torchvisions):
    depth, theirs = torchvisions
    ours = resnet(depth, 10, stride_at='3x3')
    assert [(k, v.shape, v.dtype) for k, v in ours.state_dict().items()] == [(k, v.shape, v.dtype) for k, v in theirs.state_dict().items()]
    assert [k for k, _ in ours.named_parameters()] == [k for k, _ in theirs.named_parameters()]
    theirs.load_state_dict(ours.state_dict(), strict=True)                     # both ways
    theirs = lived_in(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    same_logits(ours, theirs)
    if depth >= 50:                                                            # the authors' strides look at other pixels
        other = resnet(depth, 10)
        other.load_state_dict(theirs.state_dict(), strict=True)
        x = torch.randn(2, 3, 64, 64)
        with torch.no_grad(): assert (other.eval()(x) - theirs.eval()(x)).norm() > .1*theirs(x).norm()


def test_timms_weights_load_strictly_and_give_its_logits(torchvisions):
    depth, other = torchvisions
    theirs = timm.create_model(f'resnet{depth}', pretrained=False, num_classes=10)
    ours = resnet(depth, 10, stride_at='3x3')
    theirs.load_state_dict(ours.state_dict(), strict=True)
    theirs.load_state_dict(other.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    same_logits(ours, theirs)


@pytest.mark.paper('4.1-downsample')
def test_the_papers_strides_are_torchvisions_network_with_its_strides_moved(torchvisions):
    depth, theirs = torchvisions
    if depth < 50: pytest.skip('no bottlenecks at 18 and 34 layers: v1 and v1.5 are the same')
    theirs = copy.deepcopy(theirs)
    for m in theirs.modules():
        if isinstance(m, tvm.resnet.Bottleneck): m.conv1.stride, m.conv2.stride = m.conv2.stride, m.conv1.stride
    ours = resnet(depth, 10)                                                   # stride_at='1x1' is the default
    ours.load_state_dict(theirs.state_dict(), strict=True)
    same_logits(ours, theirs)


class PaddedByHand(nn.Module):
    "Option A pixel by pixel: every stride-th value, zeros for the channels that are new"
    def __init__(self, nf, stride):
        super().__init__()
        self.nf, self.stride = nf, stride

    def forward(self, x):
        b, ni, h, w = x.shape
        rows, cols = range(0, h, self.stride), range(0, w, self.stride)
        y = x.new_zeros(b, self.nf, len(rows), len(cols))
        for (i, r), (j, c) in itertools.product(enumerate(rows), enumerate(cols)): y[:, :ni, i, j] = x[:, :, r, c]
        return y


@pytest.mark.paper('3.3-A', '3.3-across')
@pytest.mark.parametrize('stride', (1, 2, 3))
@pytest.mark.parametrize('h,w', [(8, 8), (9, 7), (1, 2), (6, 11)])
def test_option_a_against_pixel_by_pixel(stride, h, w):
    x = torch.randn(2, 5, h, w)
    assert torch.equal(ZeroPadBlock(5, 12, stride).downsample(x), PaddedByHand(12, stride)(x))


@pytest.mark.paper('3.3-A')
@pytest.mark.parametrize('depth', (18, 50))
def test_option_a_in_torchvisions_network(depth):
    torch.manual_seed(0)
    theirs = getattr(tvm, f'resnet{depth}')(num_classes=10)
    for m in theirs.modules():
        if getattr(m, 'downsample', None): m.downsample = PaddedByHand(m.downsample[0].out_channels, m.downsample[0].stride[0])
    ours = resnet(depth, 10, shortcut='A', stride_at='3x3')
    lived_in(theirs).load_state_dict(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    same_logits(ours, theirs)


# ── What the paper says of the layers ────────────────────────────────────────────────────────────────────────────────────────

ARCHS = [*(('resnet%d' % d, {}) for d in DEPTHS), ('resnet34', dict(shortcut='A')), ('resnet50', dict(shortcut='A')),
         ('resnet18', dict(shortcut='C')), ('resnet50', dict(shortcut='C', stride_at='3x3')), ('plain18', {}), ('plain34', {}),
         ('cifar_resnet20', {}), ('cifar_plain20', {}), ('cifar_resnet8', dict(shortcut='B'))]
archs = pytest.mark.parametrize('arch,kwargs', ARCHS, ids=lambda v: v if isinstance(v, str) else ','.join(v.values()) or '-')


def calls(net, x):
    "(module, input, output) of each convolution, BN and ReLU, in the order of execution; outputs as they were at that moment"
    seen = []
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)
    hooks = []
    for m in net.modules():
        if isinstance(m, nn.ReLU): m.inplace = False
        if isinstance(m, kinds): hooks.append(m.register_forward_hook(lambda m, i, o: seen.append((m, i[0], o))))
    net(x)
    for h in hooks: h.remove()
    return seen


@pytest.mark.paper('3.4-bn', '4.2-sgd')
@archs
def test_bn_follows_each_convolution_and_comes_before_the_activation(arch, kwargs):
    net = build_net(arch, 5, **kwargs)
    with torch.no_grad(): seen = calls(net, torch.randn(2, 3, 33, 33))
    made_by = {id(out): m for m, _, out in seen}
    used_by = {id(inp): m for m, inp, _ in seen if id(inp) in made_by}
    last = {b.bn2 if b.layers == 2 else b.bn3 for b in net.modules() if isinstance(b, Block) and b.downsample is not None}
    last |= {b.downsample[1] for b in net.modules() if isinstance(b, Block) and isinstance(b.downsample, nn.Sequential)}
    convs = [(m, nxt, out, inp) for (m, _, out), (nxt, inp, _) in itertools.pairwise(seen) if isinstance(m, nn.Conv2d)]
    assert len(convs) == sum(isinstance(m, nn.Conv2d) for m in net.modules())
    for m, nxt, out, inp in convs:                                             # the next thing that happens is its BN
        assert isinstance(nxt, nn.BatchNorm2d) and inp is out and m.bias is None and nxt.num_features == m.out_channels
    for m, _, out in seen:                                                     # then ReLU, except where the sum comes in between
        if isinstance(m, nn.BatchNorm2d): assert (m in last and id(out) not in used_by) or isinstance(used_by[id(out)], nn.ReLU)
    assert all(isinstance(made_by[id(i)], nn.ReLU) for m, i, _ in seen if isinstance(m, nn.Conv2d) and id(i) in made_by)


@pytest.mark.paper('3.1-residual', '3.2-block', '3.2-relu')
@pytest.mark.parametrize('make', (IdentityBlock, partial(ProjectionBlock, 8), partial(ZeroPadBlock, 8)))
def test_the_last_relu_waits_for_the_sum(make):
    block, x = make(16), torch.randn(2, 16 if make is IdentityBlock else 8, 9, 7)
    with torch.no_grad(): (relu, before, after) = calls(block, x)[-1]
    with torch.no_grad(): total = block.residual(x) + block.downsample(x)
    assert relu is block.relu and (before < 0).any()
    torch.testing.assert_close(before, total)
    assert torch.equal(after, before.clamp(min=0))


@pytest.mark.paper('3.2-layers', '4.1-bottleneck', '4.1-downsample')
def test_a_blocks_convolutions():
    assert block_convs(256, 512, 2) == [(256, 128, 1, 2), (128, 128, 3, 1), (128, 512, 1, 1)]
    assert block_convs(256, 512, 2, stride_at='3x3') == [(256, 128, 1, 1), (128, 128, 3, 2), (128, 512, 1, 1)]
    assert block_convs(64, 128, 2, layers=2) == [(64, 128, 3, 2), (128, 128, 3, 1)]
    assert count_params(IdentityBlock(256)) == 2*256*64 + 9*64*64 + 2*(64 + 64 + 256)
    assert count_macs(conv(3, 5, 7, 2), size=9) == 5*5*5*7*7*3


@pytest.mark.paper('3.2-block', '3.1-residual', '3.2-relu')
@pytest.mark.parametrize('layers', (2, 3))
def test_a_block_is_the_papers_formula_written_out(layers):
    "Eq. 1 and 2 with nothing but functions, in training and in evaluation"
    torch.manual_seed(0)
    for block, ni in [(IdentityBlock(16, layers), 16), (ProjectionBlock(8, 16, 2, layers), 8), (Block(16, 16, 1, 'none', layers), 16)]:
        w, x = block.state_dict(), torch.randn(4, ni, 9, 7)
        stride = 2 if ni == 8 else 1
        def conv_bn(x, c, b, stride=1):
            x = F.conv2d(x, w[f'{c}.weight'], stride=stride, padding=w[f'{c}.weight'].shape[-1]//2)
            return F.batch_norm(x, None, None, w[f'{b}.weight'], w[f'{b}.bias'], training=True)
        h = conv_bn(x, 'conv1', 'bn1', stride)
        for i in range(2, layers + 1): h = conv_bn(h.relu(), f'conv{i}', f'bn{i}')
        if ni == 8: h = h + conv_bn(x, 'downsample.0', 'downsample.1', 2)
        elif block.downsample is not None: h = h + x
        with torch.no_grad(): torch.testing.assert_close(block(x), h.relu(), rtol=1e-4, atol=1e-5)


@pytest.mark.paper('3.3-identity', '3.3-A', '3.3-B', '4.1-C', '4.1-same-size')
@pytest.mark.parametrize('depth,shrinking', [(34, 3), (50, 4)])
def test_the_options_put_each_shortcut_in_its_place(depth, shrinking):
    "The first block of each stage that changes the shape, and all the others"
    kinds = dict(A=(nn.Identity, ZeroPad), B=(nn.Identity, nn.Sequential), C=(nn.Sequential, nn.Sequential), none=(type(None), type(None)))
    for option, (stays, changes) in kinds.items():
        net = on_meta(resnet, depth, shortcut=option)
        blocks = [b for i in range(1, 5) for b in getattr(net, f'layer{i}')]
        new_shape = [b for b in blocks if b.conv1.in_channels != getattr(b, f'bn{b.layers}').num_features]
        assert len(blocks) == 16 and len(new_shape) == shrinking
        for b in blocks: assert type(b.downsample) is (changes if b in new_shape else stays)
        if option != 'C': assert count_params(net) - count_params(on_meta(resnet, depth, shortcut='none')) == sum(
            b.conv1.in_channels*b.downsample[0].out_channels + 2*b.downsample[0].out_channels for b in new_shape if option == 'B')


@pytest.mark.paper('3.2-bias')
def test_bn_takes_a_bias_away():
    bn, y = nn.BatchNorm2d(5), conv(3, 5, 1)(torch.randn(2, 3, 9, 7))
    torch.testing.assert_close(bn(y + 7), bn(y), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('layers', (2, 3))
def test_zero_init_sets_the_last_scale_of_a_block_only(layers):
    for zero, scale in [(False, 1.), (True, 0.)]:
        block = init_he(IdentityBlock(64, layers), zero)
        scales = [getattr(block, f'bn{i + 1}').weight for i in range(layers)]
        assert (scales[-1] == scale).all() and all((s == 1).all() for s in scales[:-1])


@archs
def test_gradients_reach_every_parameter(arch, kwargs):
    torch.manual_seed(0)
    net = build_net(arch, 5, **kwargs).train()
    F.cross_entropy(net(torch.randn(4, 3, 40, 56)), torch.arange(4)).backward()
    missing = [k for k, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    assert missing == []


@pytest.mark.paper('3.4-init', '3.4-scratch', '4.2-sgd')
@archs
def test_initialisation(arch, kwargs):
    torch.manual_seed(0)
    net = build_net(arch, 5, **kwargs)
    zs = []
    for m in net.modules():
        if isinstance(m, nn.Conv2d): zs.append((m.weight*(m.out_channels*m.kernel_size[0]**2/2)**.5).flatten())   # fan-out
        if isinstance(m, nn.BatchNorm2d): assert (m.weight == 1).all() and (m.bias == 0).all()
    for z in zs:                                                               # each a standard normal, as far as its size tells
        assert abs(z.mean()) < 6*z.numel()**-.5 and abs(z.var() - 1) < 6*(2/z.numel())**.5
    z = torch.cat(zs)
    assert abs(z.pow(4).mean() - 3) < .1                                       # normal, not uniform
    torch.manual_seed(0)
    again = build_net(arch, 5, **kwargs).state_dict()
    assert all(torch.equal(v, again[k]) for k, v in net.state_dict().items())


@pytest.mark.paper('3.1-identity')
@pytest.mark.parametrize('arch', ('resnet18', 'resnet50', 'cifar_resnet20'))
def test_zero_init_residual_starts_each_block_as_its_shortcut(arch):
    net = build_net(arch, 5, zero_init_residual=True)
    for block in (m for m in net.modules() if isinstance(m, Block)):
        nf = block.conv1.in_channels
        x = torch.rand(2, nf, 6, 6)
        with torch.no_grad(): assert torch.equal(block(x), block.downsample(x).relu())


def without_bn(net):
    for m in list(net.modules()):
        for name, child in m.named_children():
            if isinstance(child, nn.BatchNorm2d): setattr(m, name, nn.Identity())
    return net


def first_pass(net, init):
    "Deviation of the last convolution's output, and the share of weights that a step of SGD at the paper's rate changes"
    torch.manual_seed(42)
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    for c in convs: init(c.weight)
    stds = []
    convs[-1].register_forward_hook(lambda m, i, o: stds.append(o.std().item()))
    F.cross_entropy(net.train()(torch.randn(4, 3, 64, 64)), torch.arange(4)).backward()
    moved = sum((c.weight - .1*c.weight.grad != c.weight).sum().item() for c in convs)
    return stds[0], moved/sum(c.weight.numel() for c in convs)


@pytest.mark.paper('3.4-init')
def test_hes_rule_is_needed_without_bn_and_forgiven_with_it():
    he = partial(nn.init.kaiming_normal_, mode='fan_out', nonlinearity='relu')
    bare = [first_pass(without_bn(resnet(50, 10, shortcut='none')), init) for init in (he, nn.init.xavier_uniform_)]
    full = [first_pass(resnet(50, 10), init) for init in (he, nn.init.xavier_uniform_)]
    assert bare[0][0] > 1e5*bare[1][0] and bare[0][1] > .5 and bare[1][1] < .05
    assert .5 < full[0][0]/full[1][0] < 2


def test_bn_makes_the_scale_of_the_weights_a_matter_of_the_step():
    "Three times the weights: the same output, a third of the gradient"
    torch.manual_seed(0)
    c, bn, x = conv(16, 16, 3), nn.BatchNorm2d(16, eps=1e-12), torch.randn(8, 16, 9, 9)
    def out_and_grad():
        c.weight.grad = None
        y = bn(c(x)).relu()
        (y.square()*torch.linspace(0, 1, 9)).sum().backward()
        return y.detach(), c.weight.grad
    y1, g1 = out_and_grad()
    with torch.no_grad(): c.weight *= 3
    y3, g3 = out_and_grad()
    torch.testing.assert_close(y1, y3, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(g1/3, g3, rtol=1e-3, atol=1e-3)


@pytest.mark.paper('4.1-gradients')
def test_signals_and_gradients_of_56_layers_at_the_start():
    "BN keeps the signal of a plain net; its gradient grows on the way back, by orders of magnitude more than a residual net's"
    def growth(net, x):
        blocks, outs = [*net.layer1, *net.layer2, *net.layer3], []
        def keep(m, i, o): o.retain_grad(); outs.append(o)
        for b in blocks: b.register_forward_hook(keep)
        F.cross_entropy(net.train()(x), torch.arange(len(x)) % 8).backward()
        return outs[-1].std()/outs[0].std(), outs[0].grad.norm()/outs[-1].grad.norm()
    torch.manual_seed(0)
    x = torch.randn(32, 3, 16, 16)
    (signal, plain_grad), (_, residual_grad) = growth(cifar_plain(9, 8), x), growth(cifar_resnet(9, 8), x)
    assert .2 < signal < 5 and plain_grad > 1000 and residual_grad < 50


@pytest.mark.paper('3.2-free', '4.1-same-size', '4.2-A')
@pytest.mark.parametrize('family,depth', [('', 18), ('', 34), ('cifar_', 20)])
def test_plain_nets_have_no_shortcut(family, depth):
    residual, shortcutless = (build_net(f'{family}{kind}{depth}', 5, **kw).eval() for kind, kw in (('resnet', dict(shortcut='A')), ('plain', {})))
    shortcutless.load_state_dict(residual.state_dict(), strict=True)           # option A: the same parameters exactly
    with torch.no_grad():
        x, x2 = torch.rand(2, 1, 3, 64, 64)
        assert not torch.allclose(residual(x), shortcutless(x))
        for net in (residual, shortcutless):
            for block in (m for m in net.modules() if isinstance(m, Block)): nn.init.zeros_(block.bn2.weight)
        assert not torch.equal(residual(x), residual(x2))                      # F is zero, and the input still arrives
        assert torch.equal(shortcutless(x), shortcutless(x2)) and torch.equal(shortcutless(x)[0], shortcutless.fc.bias)


@pytest.mark.paper('3.3-head')
def test_outputs_are_logits_at_any_size():
    net = resnet(18, 7).eval()
    for h, w in [(32, 32), (33, 200), (225, 101)]:
        with torch.no_grad(): y = net(torch.rand(2, 3, h, w))
        assert y.shape == (2, 7) and (y < 0).any() and not torch.allclose(y.sum(1), torch.ones(2))


# ── What PyTorch and fastai do to a module ───────────────────────────────────────────────────────────────────────────────────

SMALL = [('resnet18', dict(shortcut='A')), ('resnet50', {}), ('plain18', {}), ('cifar_resnet8', {})]
small = pytest.mark.parametrize('arch,kwargs', SMALL, ids=[a for a, _ in SMALL])


def built(arch, kwargs):
    torch.manual_seed(1)
    return lived_in(build_net(arch, 5, **kwargs)).eval(), torch.randn(3, 3, 64, 48)


@small
def test_copies_and_pickles_give_the_same_outputs(arch, kwargs):
    net, x = built(arch, kwargs)
    with torch.no_grad():
        y = net(x)
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert torch.equal(other(x), y)
            nn.init.zeros_(other.fc.weight)                                    # a copy: the first does not feel it
            assert torch.equal(net(x), y)


@small
def test_channels_last_gives_the_same_outputs(arch, kwargs):
    net, x = built(arch, kwargs)
    with torch.no_grad():
        y = net(x)
        last = copy.deepcopy(net).to(memory_format=torch.channels_last)
        torch.testing.assert_close(last(x.to(memory_format=torch.channels_last)), y, rtol=1e-4, atol=1e-5)
        assert last[0](x.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)


@small
def test_export_gives_the_same_outputs(arch, kwargs):
    net, x = built(arch, kwargs)
    exported = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim('batch', min=2, max=64)},)).module()
    with torch.no_grad():
        for n in (3, 2): torch.testing.assert_close(exported(x[:n]), net(x[:n]), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not any(map(shutil.which, ('g++', 'clang++', 'c++'))), reason='torch.compile on a CPU needs a C++ compiler; none is here')
def test_compile_gives_the_same_outputs(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path))
    torch.manual_seed(2)
    net = lived_in(nn.Sequential(nn.Conv2d(3, 8, 3), IdentityBlock(8), ProjectionBlock(8, 16), ZeroPadBlock(16, 24))).eval()
    x = torch.randn(2, 3, 18, 15)
    with torch.no_grad(): torch.testing.assert_close(torch.compile(net, fullgraph=True)(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('arch', ('resnet18', 'cifar_resnet8'))
def test_a_fastai_learner_trains_it(arch):
    torch.manual_seed(0)
    data = [(torch.full((3, 32, 32), i/4 - 1.) + .1*torch.randn(3, 32, 32), i % 2*4) for i in range(16)]
    dls = DataLoaders.from_dsets(data, data, bs=8, num_workers=0, device='cpu')
    learn = Learner(dls, build_net(arch, 5), loss_func=nn.CrossEntropyLoss(), opt_func=partial(SGD, mom=.9), lr=.01)
    before = learn.model.fc.weight.detach().clone()
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    assert np.isfinite(learn.recorder.values).all() and not torch.equal(before, learn.model.fc.weight)
    assert learn.get_preds()[0].shape == (16, 5)


# ── Wrong requests ───────────────────────────────────────────────────────────────────────────────────────────────────────────

NETS, COUNT = ('resnet18', 'resnet152', 'plain18', 'plain34', 'cifar_resnet20', 'cifar_plain', '6n+2'), ('whole number', '1 or more')
WRONG = [(partial(build_net, name), (repr(name), *NETS)) for name in ('resnet51', 'resnet', 'resnet050', 'resnet-50', 'ResNet50', ' resnet50',
         'plain50', 'cifar_resnet21', 'cifar_resnet2', 'cifar_plain0', 'resnet１８', '', None, 50)]
WRONG += [(partial(resnet, depth), (repr(depth), '18, 34, 50, 101, 152')) for depth in (0, 51, -18, '50', None, [50])]
WRONG += [(partial(plain, depth), (repr(depth), '18, 34')) for depth in (50, 0, '18')]
WRONG += [(partial(make, **{'n_out': n}), (f'n_out is {n!r}', *COUNT)) for n in (0, -1, 2.5, '10', None, True)
          for make in (partial(resnet, 18), resnet50, partial(plain, 18), cifar_resnet, cifar_plain, partial(build_net, 'resnet18'))]
WRONG += [(partial(make, n), (f'n is {n!r}', *COUNT)) for n in (0, -3, 1.5, '3', None) for make in (cifar_resnet, cifar_plain)]
WRONG += [(partial(make, shortcut=s), (f'shortcut is {s!r}', "'A', 'B', 'C', 'none'")) for s in ('D', 'a', '', None, 1)
          for make in (partial(resnet, 18), resnet50, cifar_resnet, partial(build_net, 'resnet34'), partial(build_net, 'cifar_resnet8'))]
WRONG += [(partial(make, stride_at=s), (f'stride_at is {s!r}', "'1x1', '3x3'")) for s in ('1×1', '7x7', '', None, 3)
          for make in (partial(resnet, 18), resnet50, partial(build_net, 'resnet101'), partial(ProjectionBlock, 8, 16))]
WRONG += [(partial(Block, 8, 8, shortcut=s), (f'shortcut is {s!r}', "'identity', 'projection', 'zeros', 'none'")) for s in ('A', 'id', None)]
WRONG += [(partial(Block, 8, nf, stride), (f'from 8 to {nf} channels with stride {stride}', "'projection' or 'zeros'")) for nf, stride in [(16, 1), (8, 2)]]
WRONG += [(partial(block, layers=n), (f'layers is {n!r}', '2, 3')) for block in (partial(IdentityBlock, 8), partial(ProjectionBlock, 8, 16)) for n in (1, 4, '2')]
WRONG += [(partial(build_net, 'x'*500), ("there is no network 'xxxx",)), (partial(cifar_resnet, 'x'*500), ("n is 'xxxx", *COUNT))]
WRONG += [(partial(make, shortcut='none', zero_init_residual=True), ('zero_init_residual needs shortcuts',)) for make in (resnet50, cifar_resnet)]


@pytest.mark.parametrize('request_it,words', WRONG)
def test_a_wrong_request_is_told_what_there_is(request_it, words):
    with META, pytest.raises(ValueError) as e: request_it()
    assert all(w in str(e.value) for w in words) and '\n' not in str(e.value) and len(str(e.value)) < 300


def test_whole_numbers_of_other_types_are_welcome():
    net = on_meta(resnet, np.int64(18), np.int32(7))
    assert net.fc.out_features == 7 and type(net.fc.out_features) is int
    assert len(on_meta(cifar_resnet, np.int64(2)).layer1) == 2


@pytest.mark.parametrize('arch,make', [*((f'resnet{d}', partial(resnet, d)) for d in DEPTHS), ('plain18', partial(plain, 18)),
                                       ('plain34', plain), ('cifar_resnet110', partial(cifar_resnet, 18)),
                                       ('cifar_plain8', partial(cifar_plain, 1)), ('cifar_resnet1202', partial(cifar_resnet, 200))])
def test_a_name_builds_what_its_function_builds(arch, make):
    named, made = on_meta(build_net, arch, 12), on_meta(make, n_out=12)
    assert repr(named) == repr(made) and on_meta(build_net, arch).fc.out_features == 1000
