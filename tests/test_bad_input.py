"What people get wrong ends in a sentence that names the thing, before training starts."
import json
import shutil

import pytest

from resnet_fastai.core import ResNet, train
from resnet_fastai.data import resnet_dls
from resnet_fastai.engine.files import DataError, LabelError, PhotoError

small = dict(size=32, arch='resnet18', bs=8, num_workers=0)


def fails(error, *parts, on, **kw):
    "Making a ResNet raises this error, and the message is one line with all these parts"
    with pytest.raises(error) as e: ResNet(*on, **small | kw)
    message = str(e.value)
    assert '\n' not in message and all(p in message for p in parts), message


@pytest.mark.parametrize('split', ['train', 'val'])
def test_missing_split(drawn, split):
    shutil.rmtree(drawn.data_path/split)
    fails(DataError, f'has no folder {split}/', on=drawn)


@pytest.mark.parametrize('split', ['train', 'val'])
def test_empty_split(drawn, split):
    for p in (drawn.data_path/split).iterdir(): p.unlink()
    fails(DataError, split, 'holds no photos', on=drawn)


def test_no_test_split_is_fine(drawn):
    shutil.rmtree(drawn.data_path/'test')
    assert len(resnet_dls(*drawn, size=32, num_workers=0).photos['test']) == 0


def test_photo_without_label(drawn, edit):
    edit(drawn.label_path, lambda d: {k: v for k, v in d.items() if k != 'val_00003'})
    fails(LabelError, "'val_00003.jpg' has no label in labels.json", '1 of 24', on=drawn)


def test_label_without_index(drawn, edit):
    edit(drawn.label_path, lambda d: d | {'train_00000': 'zebra'})
    fails(LabelError, "'zebra' in labels.json has no index in encoding.json", 'train_00000', on=drawn)


def test_index_outside_the_outputs(drawn, edit):
    edit(drawn.label_encoding, lambda d: d | {'mesh': 1000})
    fails(LabelError, "'mesh'", 'the index 1000', '1000 outputs', on=drawn)
    assert len(resnet_dls(*drawn, size=32, num_workers=0, n_out=1001).vocab) == 1001


@pytest.mark.parametrize('index', [True, '3', 2.0, -1, None, [1], 1e3])
def test_index_that_is_none(drawn, edit, index):
    edit(drawn.label_encoding, lambda d: d | {'mesh': index})
    fails(LabelError, 'encoding.json', "'mesh'", json.dumps(index), 'whole number', on=drawn)


def test_duplicate_indices(drawn, edit):
    edit(drawn.label_encoding, lambda d: d | {'mesh': 101})
    fails(LabelError, "'stripes' and 'mesh' the same index 101", on=drawn)


@pytest.mark.parametrize('which', ['label_path', 'label_encoding'])
@pytest.mark.parametrize('text,says', [('[1]', 'JSON list'), ('"a"', 'JSON str'), ('{"a": 1, "a": 2}', "repeats the key 'a'"), ('{', 'is not JSON'),
                                       ('', 'is not JSON'), ('\x00', 'is not JSON'), ('['*100_000, 'is not JSON')])
def test_json_that_is_no_label_file(drawn, which, text, says):
    getattr(drawn, which).write_text(text)
    fails(LabelError, getattr(drawn, which).name, says, on=drawn)


def test_json_that_is_not_utf8(drawn):
    drawn.label_path.write_bytes(b'{"caf\xe9": "x"}')
    fails(LabelError, 'labels.json is not JSON', on=drawn)


def test_missing_json(drawn):
    drawn.label_path.unlink()
    fails(LabelError, 'labels.json cannot be read', on=drawn)


@pytest.mark.parametrize('labels', [{}, {'elsewhere': 'mesh'}])
def test_labels_that_name_no_photo(drawn, labels):
    drawn.label_path.write_text(json.dumps(labels))
    fails(LabelError, 'labels.json names none of the 24 photos', on=drawn)


def test_two_photos_claim_one_id(drawn):
    (drawn.data_path/'train'/'more').mkdir()
    shutil.copy(drawn.data_path/'train'/'train_00000.jpg', drawn.data_path/'train'/'more')
    fails(LabelError, "claim the id 'train_00000'", on=drawn)


def test_two_photos_told_apart_by_their_paths(drawn, edit):
    (drawn.data_path/'train'/'more').mkdir()
    shutil.copy(drawn.data_path/'train'/'train_00000.jpg', drawn.data_path/'train'/'more')
    edit(drawn.label_path, lambda d: d | {'more/train_00000': 'dots'})
    dls = resnet_dls(*drawn, size=32, num_workers=0)
    named = {p.parent.name: dls.labels(p) for p in dls.photos['train'] if p.stem == 'train_00000'}
    assert named == {'more': 'dots', 'train': 'stripes'}


@pytest.mark.parametrize('split', ['train', 'val'])
def test_unreadable_photo(drawn, split, capsys):
    bad = drawn.data_path/split/f'{split}_00001.jpg'
    bad.write_bytes(bad.read_bytes()[:300])
    fails(PhotoError, bad.name, '1 of 24 photos', "on_bad='skip'", on=drawn)
    model = ResNet(*drawn, **small, on_bad='skip')
    assert 'left out 1 of 24 photos' in capsys.readouterr().out
    assert bad not in model.learn.dls.photos[split] and len(model.fit(1)) == 1


def test_photo_that_goes_bad_while_training(drawn):
    model = ResNet(*drawn, **small | dict(num_workers=2))
    for p in (drawn.data_path/'train').iterdir(): p.write_text('gone')
    with pytest.raises(PhotoError) as e: model.fit(1)
    assert '\n' not in str(e.value) and 'cannot be read as a photo' in str(e.value) and 'train_' in str(e.value)


@pytest.mark.parametrize('n', [0, 9, -1, 2.0])
def test_too_many_labels_asked_for(drawn, n):
    model = ResNet(*drawn, **small)
    model.fit(1)
    with pytest.raises(DataError, match='this model knows 8 labels'): model.predict_n(drawn.data_path/'test'/'test_00000.jpg', n)


def test_predict_before_fit(drawn):
    for ask in ('predict', 'predict_n'):
        with pytest.raises(DataError, match='has not been trained'): getattr(ResNet(*drawn, **small), ask)(drawn.data_path/'test'/'test_00000.jpg')


@pytest.mark.parametrize('kw,says', [(dict(size=0), 'does not hold'), (dict(min_side=20), 'does not hold'), (dict(max_side=33), 'does not hold'),
                                     (dict(on_bad='ignore'), "'error' or 'skip'"), (dict(bs=0), 'bs=0'), (dict(micro_bs=0), 'micro_bs=0')])
def test_options_that_contradict(drawn, kw, says): fails(DataError, says, on=drawn, **kw)


def test_unknown_network(drawn):
    with pytest.raises(ValueError, match='there is no network'): train(*drawn, **small | dict(arch='resnet51'))


def test_nothing_is_overwritten(drawn, tmp_path):
    "Training and predicting leave the user's folder as it was, byte for byte"
    before = {p: p.read_bytes() for p in drawn.data_path.rglob('*') if p.is_file()}
    train(*drawn, epochs=1, **small)
    assert {p: p.read_bytes() for p in drawn.data_path.rglob('*') if p.is_file()} == before
