"Figures with controls: what they show is computed right, a still picture lies beside them, and nothing is fetched."
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

experiments = Path(__file__).resolve().parent.parent/'nbs'/'experiments'


@pytest.fixture
def interactive(monkeypatch):
    monkeypatch.syspath_prepend(str(experiments))
    import interactive
    shown = []
    monkeypatch.setattr(interactive, 'display', shown.append)
    interactive.shown = shown
    return interactive


def run(kind, depth, seed, errors): return dict(kind=kind, depth=depth, seed=seed, epochs=[dict(updates=10*i, train_error=e, top1_error=e/2) for i, e in enumerate(errors, 1)])


def data_of(html):
    "What the page hands to its script"
    return json.loads(re.search(r'^interactive\("\w+", "\w+", (.*)\);$', html, re.M)[1].replace('<\\/', '</'))


def test_a_line_is_the_mean_of_the_seeds(interactive):
    lines = interactive.curve_lines([run('resnet', 20, 0, [.4, .2, .1]), run('plain', 20, 0, [.5]), run('resnet', 20, 1, [.6, .4])])
    assert [d['name'] for d in lines] == ['plain-20', 'ResNet-20 (2 seeds)'] and [d['dash'] for d in lines] == [True, False]
    train, test = lines[1]['parts']
    assert (train['x'], train['y'], test['y']) == ([10, 20], [50., 30.], [25., 15.]) and train['width'] < test['width']
    assert lines[0]['color'] == lines[1]['color']                          # one depth, one colour


def test_crops_lie_where_they_were_cut(interactive):
    "A crop that is cut out of the photo at its box, and resized, is the crop"
    from resnet_fastai.inference import crop_boxes, extract_crops
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((400, 300), Image.Resampling.BICUBIC)
    places = crop_boxes(*photo.size, 64)
    crops = extract_crops(photo, places, 64).permute(0, 2, 3, 1).numpy().astype(float)
    for c, crop in zip(interactive.crop_votes(photo.size, places, np.full((50, 2), .5), 64), crops):
        x, y, side = c['box']
        again = np.asarray(photo.resize((64, 64), Image.Resampling.BILINEAR, (x, y, min(x + side, 400), min(y + side, 300))), float)
        assert abs((again[:, ::-1] if c['mirrored'] else again) - crop).mean() < 8, c['box']      # another place differs by 70


@pytest.mark.parametrize('kind', ['curves', 'light', 'votes'])
def test_a_picture_and_a_page_part(interactive, kind):
    photo, stats = Image.new('RGB', (300, 200), 'teal'), SimpleNamespace(eigvec=np.eye(3), eigval=np.array([.2, .02, .01]))
    if kind == 'curves': interactive.curves([run('resnet', 20, 0, [.4, .2])], 'Title </script>')
    elif kind == 'light': interactive.light(photo, stats)
    else: interactive.votes(photo, [(64, 0, 0, False), (80, 5, 5, True)], np.array([[.2, .8], [.6, .4]]), ['a', 'b'], 64, 'Title')
    still, part = interactive.shown
    assert still.data.startswith(b'\x89PNG') and len(still.data) < 200_000
    assert part.data.count('</script>') == 1 and not re.search(r'https?://(?!www\.w3\.org/2000/svg)', part.data)
    data = data_of(part.data)
    if kind == 'light': np.testing.assert_allclose(data['axes'], np.diag([.2, .02, .01]))
    if kind == 'votes': assert [c['probs'] for c in data['crops']] == [[.2, .8], [.6, .4]] and data['size'] == [300, 200]


def test_the_same_figure_is_the_same_text(interactive):
    "Or a notebook would differ each time that it is run"
    assert interactive.page_part('curves', dict(lines=[])) == interactive.page_part('curves', dict(lines=[])) != interactive.page_part('light', dict(lines=[]))
    assert 'interactive' in sys.modules
