"""What `ResNet` can do with photos beyond the paper: one short method for each function of this package.

`core.ResNet` inherits `Practice`; what the methods do is told where their functions are."""
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from fastai.interpret import ClassificationInterpretation
from fastcore.meta import delegates

from . import embed as vectors, look, predict_folder as folders, protocol, share, suspects as suspecting, trust as trusting

if TYPE_CHECKING: from ..core import ResNet


class Practice:
    "The methods of `ResNet` that are no part of the paper"

    @delegates(protocol.choose_protocol)
    def choose_protocol(self,
        protocols:str|list|None=None, # As for `evaluate`; None: the paper's, and at the training's scales
        **kwargs
    ) -> pd.DataFrame: # A row a protocol, the choice first: error, its interval, log loss, crops
        "Measure protocols on the validation photos; predictions follow the best, also in a saved model"
        found = protocol.choose_protocol(self, protocols, **kwargs)
        trusting.remark(self)
        return found

    @delegates(folders.predict_folder)
    def predict_folder(self,
        photos:str|Path|list, # A folder, searched to the bottom, or a list of paths
        **kwargs
    ) -> pd.DataFrame: # id, label_1, prob_1, …, error
        "The likeliest labels of every photo, in a table that an interrupted run goes on with"
        return folders.predict_folder(self, photos, **kwargs)

    # ── Can it be trusted?

    @property
    def trust(self):
        "What `calibrate` and `threshold` have measured, as config.json keeps it"
        return self.trained.trust
    @trust.setter
    def trust(self, measured):
        if self.learn: self.learn.trust = measured
        else: self._loaded = self._loaded._replace(trust=measured)

    @property
    def temperature(self):
        "Predictions are `tempered` by it; 1: they are as the network says"
        return self.trained.temperature
    @temperature.setter
    def temperature(self, value): trusting.set_temperature(self, value)

    @property
    def min_prob(self):
        "The probability below which `predict_n` and `predict_folder` are not sure; None: they always answer"
        return self.trained.min_prob
    @min_prob.setter
    def min_prob(self, value): trusting.set_min_prob(self, value)

    @delegates(trusting.calibrate)
    def calibrate(self,
        split:str='val', # Photos that training has not learned from
        **kwargs
    ) -> pd.DataFrame: # 'before' and 'after': temperature, log_loss, ece, confidence, top1_error, photos
        "Fit one temperature to the validation photos; predictions follow, also in a saved model; `temperature = 1` undoes it"
        return trusting.calibrate(self, split, **kwargs)

    @delegates(trusting.threshold)
    def threshold(self,
        precision:float=.95, # Share of the answers that has to be right, 0 to 1
        **kwargs
    ) -> pd.Series: # min_prob, precision with its 95 % interval, coverage (share of photos that are answered) with its own, photos
        "Find the probability below which it says \"not sure\"; predictions follow, also in a saved model; `min_prob = None` undoes it"
        return trusting.threshold(self, precision, **kwargs)

    @delegates(trusting.show_calibration)
    def show_calibration(self,
        split:str='val', # Whose photos: 'test' is the honest one after `calibrate`, which has seen the labels of 'val'
        **kwargs
    ) -> plt.Figure: # Left as the network says it, right at the model's temperature
        "Reliability diagrams: does what is said with 80 % come true four times of five?"
        return trusting.show_calibration(self, split, **kwargs)

    @delegates(trusting.show_threshold)
    def show_threshold(self,
        split:str='val', # Whose photos
        **kwargs
    ) -> plt.Figure: # Precision and coverage against the threshold
        "What each threshold costs: how many answers are right, and how many photos still get one"
        return trusting.show_threshold(self, split, **kwargs)

    @delegates(suspecting.suspects)
    def suspects(self,
        split:str='val', # The photos to judge: not those that the model has learned from
        **kwargs
    ) -> pd.DataFrame: # photo, label, suggested, quality (0 to 1: how well the label fits), suspicious (bool); the worst first
        "Rank photos by how little their label fits, and mark those whose label is probably wrong; needs cleanlab"
        return suspecting.suspects(self, split, **kwargs)

    # ── Photos as vectors

    @delegates(vectors.embed)
    def embed(self,
        photos, # What `predict` takes
        **kwargs
    ) -> np.ndarray: # (features,) float32, 2048 of a ResNet-50; for a list or folder a row each
        "The features that the head reads: of the central crop, or the mean over a protocol's crops"
        return vectors.embed(self, photos, **kwargs)

    @delegates(vectors.similar)
    def similar(self,
        photo, # A path, URL, bytes, PIL image or array
        photos, # A folder, or a list of photos
        n:int=5, # How many
        **kwargs
    ) -> pd.DataFrame: # photo (its path, or its place in the list), similarity, label where photos know theirs; the most similar first
        "The photos whose features point the same way, by cosine similarity"
        return vectors.similar(self, photo, photos, n, **kwargs)

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
        device=None, # Where it predicts: 'cpu', 'cuda:1', an index; None: the GPU where there is one
        **kwargs
    ) -> 'ResNet': # Predicts; it has no photos to train on
        "A model with torchvision's weights"
        return cls._from(share.from_torchvision(source, label_encoding, **kwargs), device)

    @delegates(share.to_torchvision)
    def to_torchvision(self, **kwargs) -> dict: # {name: tensor}
        "The weights for torchvision's network of the same name"
        return share.to_torchvision(self, **kwargs)
