"The recipe's updates beside torch's own SGD, on a small net without BN."
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from resnet_fastai.training import Accumulate, paper_sgd


def _net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))


def trained_as_torch_does(
    n, # Rows of data
    bs, # Of them in an update
    micro_bs, # That pass the network at a time
    epochs,
    theirs, # A loss of torch's
    ours, # The same, as our learner takes it
): # (learner, x, y)
    "Micro-batches give the weights of torch's SGD on whole batches, momentum and decay included"
    torch.manual_seed(n)
    x, y, net, mine = torch.randn(n, 6), torch.randint(0, 4, (n,)), _net(), _net()
    opt = torch.optim.SGD(net.parameters(), lr=.1, momentum=.9, weight_decay=1e-4)
    for _ in range(epochs):
        for xb, yb in zip(x.split(bs), y.split(bs)):
            opt.zero_grad()
            theirs(net(xb), yb).backward()
            opt.step()
    dl = DataLoader(TensorDataset(x, y), batch_size=micro_bs)
    learn = Learner(DataLoaders(dl, dl, device='cpu'), mine, loss_func=ours, opt_func=paper_sgd, lr=.1, wd_bn_bias=True, cbs=Accumulate(bs))
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs)
    for a, b in zip(net.parameters(), mine.parameters()): torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    return learn, x, y
