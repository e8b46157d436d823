"The script that compares few photos from nothing and from weights: its photos, its rates, its table, what it has stored"
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

root = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='module')
def script():
    sys.path.insert(0, str(root/'nbs'/'experiments'))
    import enlarged
    yield enlarged
    sys.path.remove(str(root/'nbs'/'experiments'))


def run(way, split, seed, error, rate=.01): return dict(way=way, split=split, seed=seed, error=error, rate=rate, train_loss=1., cpu_seconds=60.)


def test_the_photos_are_those_of_cifar10_without_loss(script, tmp_path):
    rng = np.random.default_rng(0)
    def some(n): return rng.integers(0, 256, (n, 3, 32, 32), np.uint8), np.arange(n) % 2
    data = dict(train=some(4), test=some(2), classes=['cat', 'dog'])
    paths = script.as_folders(data, tmp_path/'folders')
    labels = json.loads(paths.label_path.read_text())
    for split, there in (('train', 'train'), ('test', 'val')):
        files = sorted((paths.data_path/there).rglob('*.png'), key=lambda f: int(f.stem[-5:]))
        assert len(files) == len(data[split][0])
        for f, x, y in zip(files, *data[split]):
            np.testing.assert_array_equal(np.asarray(Image.open(f)), x.transpose(1, 2, 0))
            assert labels[f.relative_to(paths.data_path).as_posix()] == data['classes'][y]


def test_rates_are_chosen_on_validation_photos_alone(script):
    val = [run(way, 'val', s, e, rate) for way in script.ways for rate, es in {.01: (.5, .3), .1: (.3, .4)}.items() for s, e in enumerate(es)]
    assert script.best_rates(val + [run(way, 'test', 0, 0., .01) for way in script.ways]) == dict.fromkeys(script.ways, .1)


def test_differences_are_those_of_students_paired_test(script):
    rng = np.random.default_rng(1)
    a, b = rng.random(5), rng.random(5)
    one, two = list(script.ways)[:2]
    val = [run(w, 'val', 0, error, rate) for w in script.ways for error, rate in ((.3, .01), (.6, .1))]
    tests = [run(w, 'test', s, e) for w, es in ((one, a), (two, b)) for s, e in enumerate(es)]
    rows = {r['way']: r for r in script.summary(val + tests + [run(one, 'test', 0, 1., .1)])}       # the last at a rate that is no longer the best
    low, high = stats.ttest_rel(b, a).confidence_interval()
    np.testing.assert_allclose(rows[two][f'minus {one}'], [(b - a).mean(), low, high], atol=1e-4)
    np.testing.assert_allclose([rows[one]['low'], rows[one]['high']], stats.t.interval(.95, 4, a.mean(), stats.sem(a)), atol=1e-4)


def test_what_is_stored_is_whole(script):
    told = json.loads((root/'nbs'/'experiments'/'results'/'enlarged.json').read_text())
    tests = [r for r in told['runs'] if r['split'] == 'test']
    assert {(r['way'], r['seed']) for r in tests} == {(w, s) for w in script.ways for s in range(5)}
    best = script.best_rates(told['runs'])
    assert all(r['rate'] == best[r['way']] for r in tests)
    assert told['summary'] == list(script.summary(told['runs'])) and told['pretrained']['data']['is_cifar10']


def test_what_is_missing_is_said_before_anything_is_trained(script, tmp_path):
    for s in ('train', 'validation', 'test'):
        with pytest.raises(script.DataError, match=f'{s} has no class folders'): script.compare(tmp_path, tmp_path, keep=tmp_path/'keep')
        (tmp_path/s/'cat').mkdir(parents=True)
    (tmp_path/'test'/'dog').mkdir()
    with pytest.raises(script.DataError, match='test has other classes than'): script.compare(tmp_path, tmp_path, keep=tmp_path/'keep')
    (tmp_path/'keep').mkdir()
    (tmp_path/'keep'/'about.json').write_text('{"epochs": 3}')
    with pytest.raises(script.DataError, match='a network of 3 epochs, not 15'): script.pretrained(tmp_path, tmp_path/'keep', 15)
