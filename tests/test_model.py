"The networks beside torchvision's, at every depth."
import pytest
import torch
import torchvision.models as tvm

from resnet_fastai.model import resnet

depths = [18, 34, 50, 101, 152]


@pytest.mark.parametrize('depth', depths)
@pytest.mark.parametrize('training', [False, True])
def test_torchvisions_weights_give_torchvisions_logits(depth, training):
    torch.manual_seed(depth)
    theirs, ours = getattr(tvm, f'resnet{depth}')(weights=None), resnet(depth, stride_at='3x3')
    for p in theirs.parameters():
        if p.ndim == 1: torch.nn.init.uniform_(p, .3, 1)               # BN that does something
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 3, 97, 70)
    with torch.no_grad(): a, b = theirs.train(training)(x), ours.train(training)(x)
    torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4*a.abs().max().item())


@pytest.mark.parametrize('depth', depths)
def test_the_papers_network_has_the_same_keys_and_shapes(depth):
    theirs, ours = getattr(tvm, f'resnet{depth}')(weights=None).state_dict(), resnet(depth).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
