"""The training that the scripts of this folder start: python my_training.py PHOTOS LABELS ENCODING RUN MODEL [EPOCHS]"""
import sys

from fastai.torch_core import rank_distrib

from resnet_fastai.core import ResNet

photos, labels, encoding, run, model, *epochs = sys.argv[1:]
net = ResNet(photos, labels, encoding, run_folder=run, every=200)     # a checkpoint after each 200 updates, too
net.fit(int(epochs[0]) if epochs else 90, resume=True)                # begins, or goes on where the run was
errors = net.evaluate(split='val', protocol='10crop')                 # shared out: all processes call it
net.save(model, overwrite=True)                                       # the first one writes
if not rank_distrib(): print(errors.to_string(index=False))
