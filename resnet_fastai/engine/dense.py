"""The dense protocol: what a network says about every window of a whole photo, in tiles where the photo is a long strip."""
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image

from .fast_crop import cutter, short_size


class Dense:
    "A function: (B,3,H,W), uint8 or RGB in [0,1], at least as large as the crop → (B,n_out,windows) logits"
    halo = 768                                               # pixels around a tile: half of what a unit of ResNet-152's last maps sees
    most = 1 << 21                                           # pixels of a photo that passes through at once
    def __init__(self,
        maps:Callable, # (B,3,H,W) photos → what comes before the last average
        read:Callable, # These maps → (B,n_out,windows) logits
        window:tuple, # Height and width of the maps of one crop
        size:int, # Side of that crop, pixels
    ): self.maps, self.read, self.window, self.size = maps, read, window, size

    def __call__(self, x): return self.read(self.maps(x))

    def _stride(self):
        "Pixels of the photo for each place of the last maps"
        return 1024//(self.maps(torch.zeros(1, 3, self.size, self.size + 1024)).shape[3] - self.window[1])

    def pieces(self,
        img:Image.Image, # RGB
        side:int, # Length that its short side is resized to, pixels
    ) -> Iterator: # Of (photo and mirror image: (2,h,w,3) uint8, which part of their maps counts; None: all)
        "A resized photo at once, or in tiles"
        (W,H), cut = short_size(*img.size, side), cutter(img, side, self.most)
        if W*H <= self.most: yield _both(cut(0, 0, W, H)), None; return
        stride, wide = self._stride(), W > H
        n, step, halo = -(-max(W, H)//stride), max(1, self.most//(min(W, H)*stride)), -(-self.halo//stride)
        window = self.window[1 if wide else 0]
        for first in range(0, n - window + 1, step):
            last = min(first + step, n - window + 1) + window - 1                    # maps first … last - 1 hold the windows of this tile
            a, b = max(0, first - halo), min(n, last + halo)
            start, end = a*stride, min(b*stride, max(W, H))
            if wide: tile = np.stack([cut(start, 0, end - start, H), cut(W - end, 0, end - start, H)[:, ::-1]])
            else: tile = _both(cut(0, start, W, end - start))
            yield tile, (slice(first - a, last - a), wide)

    def mean(self,
        img:Image.Image, # RGB
        side:int, # Length that its short side is resized to, pixels
    ) -> torch.Tensor: # (2,n_out) float64 on the CPU: the photo and its mirror image, each row sums to 1
        "The mean of the network's probabilities over all windows"
        total, count = 0, 0
        for pair,part in self.pieces(img, side):
            x = torch.from_numpy(pair).permute(0, 3, 1, 2)
            logits = self(x) if part is None else self._tile(x, *part)
            total, count = total + logits.cpu().double().softmax(1).sum(2), count + logits.shape[2]
        return total/count

    def _tile(self, x, places, wide):
        maps = self.maps(x)
        return self.read(maps[..., places] if wide else maps[:, :, places])


def _both(rgb): return np.stack([rgb, rgb[:, ::-1]])                                   # photo and mirror image
