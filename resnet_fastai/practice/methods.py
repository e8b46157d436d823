"""What `ResNet` can do with photos beyond the paper: one short method for each function of this package.

`core.ResNet` inherits `Practice`; what the methods do is told where their functions are."""
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from fastai.interpret import ClassificationInterpretation
from fastcore.meta import delegates

from . import look, predict_folder as folders, protocol, share


class Practice:
    "The methods of `ResNet` that are no part of the paper"

    @delegates(protocol.choose_protocol)
    def choose_protocol(self,
        protocols:list|None=None, # As for `evaluate`; None: the paper's, and at the training's scales
        **kwargs
    ) -> pd.DataFrame: # A row a protocol, the choice first: error, its interval, log loss, crops
        "Measure protocols on the validation photos; predictions follow the best, also in a saved model"
        return protocol.choose_protocol(self, protocols, **kwargs)

    @delegates(folders.predict_folder)
    def predict_folder(self,
        photos:str|Path|list, # A folder, searched to the bottom, or a list of paths
        **kwargs
    ) -> pd.DataFrame: # id, label_1, prob_1, …, error
        "The likeliest labels of every photo, in a table that an interrupted run goes on with"
        return folders.predict_folder(self, photos, **kwargs)

    # ── Pictures

    @delegates(look.show_prediction)
    def show_prediction(self,
        photo, # What `predict` takes
        n:int=5, # Labels for each photo; fewer where the model knows fewer
        **kwargs
    ) -> plt.Figure: # Each photo beside its bars
        "Draw photos beside the probabilities of their likeliest labels"
        return look.show_prediction(self, photo, n, **kwargs)

    def show_crops(self,
        photo, # A path, URL, bytes, PIL image or array
    ) -> plt.Figure: # A row a scale
        "Draw the 50 crops of a photo, and which of them agree with their average"
        return look.show_crops(self, photo)

    def show_cam(self,
        photo, # A path, URL, bytes, PIL image or array
        label:str|None=None, # The label that is asked about; None: the likeliest
    ) -> plt.Figure: # The photo, and its grey copy with what speaks for the label
        "Draw where in a photo the evidence for a label lies"
        return look.show_cam(self, photo, label)

    def interpretation(self,
        split:str='val', # 'val', 'test' or 'train'; its photos need labels
    ) -> ClassificationInterpretation: # `plot_confusion_matrix`, `most_confused`, `plot_top_losses`, …
        "fastai's `ClassificationInterpretation` of a split"
        return look.interpretation(self, split)

    # ── Files for other programs

    @delegates(share.export_model)
    def export(self,
        folder:str|Path, # Made if need be
        **kwargs
    ) -> Path: # The file; beside it, the same name with .json: size, scales, encoding
        "Write the network for other programs: (batch,3,size,size) RGB in [0,1] → (batch,n_out)"
        return share.export_model(self, folder, **kwargs)

    @classmethod
    @delegates(share.from_torchvision)
    def from_torchvision(cls,
        source:dict|str|Path, # A state dict, or a .pth, .pt or .safetensors file of one
        label_encoding:str|Path|dict, # {label: index}, or a JSON file of it
        device=None, # Where it predicts; None: the GPU where there is one
        **kwargs
    ) -> 'ResNet': # Predicts; it has no photos to train on
        "A model with torchvision's weights"
        return cls._from(share.from_torchvision(source, label_encoding, **kwargs), device)

    @delegates(share.to_torchvision)
    def to_torchvision(self, **kwargs) -> dict: # {name: tensor}
        "The weights for torchvision's network of the same name"
        return share.to_torchvision(self, **kwargs)
