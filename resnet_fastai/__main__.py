"`python -m resnet_fastai`: the command `resnet-fastai`, also for `torchrun -m resnet_fastai`."
from .practice.cli import main

if __name__ == '__main__': main()
