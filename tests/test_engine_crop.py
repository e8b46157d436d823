"A crop made from a part of the photo against the plain way on drawn photos; test_photos.py does the same on real ones."
import io
import random

import numpy as np

from resnet_fastai.augment import five_boxes, random_box, resize_short
from resnet_fastai.engine.demo_photos import draw_photo
from resnet_fastai.engine.fast_crop import crop_photo, short_size
from resnet_fastai.engine.photo import open_photo, Photo


def test_a_crop_from_a_part_is_resize_all_then_crop():
    "Wide, high and square, every kind of scale, corners and inside: 2 grey levels at most in the mean of each crop"
    draw, rng, means = np.random.default_rng(0), random.Random(0), []
    for w, h in [(500, 375), (333, 500), (300, 300), (257, 700), (1200, 900)]:
        draw_photo('zigzag', draw).resize((w, h)).save(b := io.BytesIO(), 'JPEG', quality=95)
        whole = open_photo(b.getvalue())
        for side in (256, 257, 300, 333, 375, 401, 479, 480):
            resized, size = np.array(resize_short(whole, side)).astype(int), short_size(w, h, side)
            for box in five_boxes(*size, 224)[:4] + [random_box(*size, 224, rng) for _ in range(4)]:
                part = crop_photo(Photo(b.getvalue()), side, box).permute(1, 2, 0).numpy()
                means.append(abs(part - resized[box[1]:box[3], box[0]:box[2]]).mean())
    assert len(means) == 320 and max(means) < 2 and np.mean(means) < .5
