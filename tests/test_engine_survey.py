"The sums of which colour statistics are made, beside numpy's."
import numpy as np

from resnet_fastai.engine.demo_photos import draw_photo
from resnet_fastai.engine.survey import color_moments


def test_moments_hold_count_mean_and_covariance():
    photos = [draw_photo('bricks', np.random.default_rng(i)) for i in range(3)]
    x = np.concatenate([np.array(im).reshape(-1, 3)/255 for im in photos])
    m = sum(color_moments(im, chunk=5000) for im in photos)
    assert abs(m[3, 3] - len(x)) < 1e-9
    mean = m[3, :3]/m[3, 3]
    np.testing.assert_allclose(mean, x.mean(0), atol=1e-12)
    np.testing.assert_allclose(m[:3, :3]/m[3, 3] - np.outer(mean, mean), np.cov(x.T, bias=True), atol=1e-12)
