"Labels of lesson 3: ids, indices, tables, and what `LabelMap` says of what does not fit."
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from resnet_fastai.data import LabelMap
from resnet_fastai.engine.files import LabelError
from resnet_fastai.engine.ids import photo_ids


def test_ids_are_the_tails_of_a_path():
    assert list(photo_ids('train/cats/1.jpg')) == ['train/cats/1.jpg', 'train/cats/1', 'cats/1.jpg', 'cats/1', '1.jpg', '1']
    assert list(photo_ids('a.b/x.tar.jpg'))[-2:] == ['x.tar.jpg', 'x.tar']
    assert list(photo_ids('/a.b/c/x', 1)) == ['c/x', 'c/x', 'x', 'x']


@pytest.mark.parametrize('encoding,says', [
    ({'cat': True}, "'cat' the index true"), ({'cat': '3'}, "'cat' the index \"3\""), ({'cat': 2.0}, "'cat' the index 2.0"),
    ({'cat': -1}, "'cat' the index -1"), ({'cat': 4, 'dog': 4}, "'cat' and 'dog' the same index 4"), ({}, 'is empty')])
def test_an_index_that_is_none(encoding, says):
    with pytest.raises(LabelError) as e: LabelMap({}, encoding)
    assert says in str(e.value)


@pytest.mark.parametrize('labels,encoding,says', [
    ({'1': 'cow', '2': 'cat'}, {'cat': 0}, "'cow' in the labels has no index in the encoding (1 of 2 ids; first: '1')"),
    ({'1': 3.5}, {'3': 0}, "labels '1' with 3.5, not with a text")])
def test_a_label_that_does_not_fit(labels, encoding, says):
    with pytest.raises(LabelError) as e: LabelMap(labels, encoding)
    assert says in str(e.value)


table = pd.DataFrame({'photo': [7, 8], 'label': ['dog', 'cat'], 'by': ['ann', 'bob']})
index = pd.DataFrame({'label': ['cat', 'dog'], 'index': [281, 207]})


def test_tables_do_for_either_file():
    labels = LabelMap(table, index)
    assert labels.labels == {'7': 'dog', '8': 'cat'} and labels.encoding == {'cat': 281, 'dog': 207}


@pytest.mark.parametrize('wrong,says', [
    (pd.concat([table, table.assign(label='cat')]), "table of the labels gives '7' two labels, 'cat' and 'dog'"),
    (table[['photo']], 'a table of 1 columns'), (table.replace('dog', np.nan), "labels '7' with NaN")])
def test_a_table_that_is_no_label_file(wrong, says):
    with pytest.raises(LabelError) as e: LabelMap(wrong, index)
    assert says in str(e.value)


@pytest.fixture
def labels(): return LabelMap({'cats/1.jpg': 'cat', 'dogs/1.jpg': 'dog', '7': 'dog'}, {'cat': 281, 'dog': 207})


def test_the_label_of_a_path(labels):
    assert [labels(p) for p in ('x/cats/1.jpg', 'x/dogs/1.jpg', Path('anywhere/7.PNG'))] == ['cat', 'dog', 'dog']
    assert labels.find_id('x/cats/2.jpg') is None
    with pytest.raises(LabelError, match=r"'2\.jpg' has no label"): labels('x/cats/2.jpg')


a, b, c = Path('train/cats/1.jpg'), Path('train/dogs/1.jpg'), Path('val/cows/1.jpg')


def test_photos_are_matched_with_ids(labels):
    assert labels.match([a, b]) == ['cats/1.jpg', 'dogs/1.jpg']
    assert labels.match([a, b, c], 2) == ['cats/1.jpg', 'dogs/1.jpg', None]


def test_photos_that_do_not_match(labels):
    with pytest.raises(LabelError) as e: labels.match([a, b, c])
    assert "'1.jpg' has no label in the labels (1 of 3 photos; first: val/cows/1.jpg)" in str(e.value).replace('\\', '/')
    with pytest.raises(LabelError, match="names none of the 1 photos: its ids look like 'cats/1.jpg'"): labels.match([c])
    with pytest.raises(LabelError, match="claim the id '1'"): LabelMap({'1': 'cat'}, {'cat': 0}).match([a, b])


def test_every_output_has_a_name(labels):
    assert LabelMap({}, {'b': 0, 'a': 2}).vocab(4) == ['b', '(unused 1)', 'a', '(unused 3)']
    assert labels.vocab()[281] == 'cat' and len(labels.vocab()) == 1000
    with pytest.raises(LabelError, match="'cat' the index 281, which does not fit in 281 outputs"): labels.vocab(281)
