"One check for all whole numbers that people pass."
import numpy as np
import pytest

from resnet_fastai.engine.arguments import whole_number
from resnet_fastai.engine.checkpoint import Checkpoint
from resnet_fastai.engine.files import DataError
from resnet_fastai.engine.stratified import check_shares
from resnet_fastai.practice.prepare import check_shrinking


@pytest.mark.parametrize('value', [3, np.int64(3), np.uint8(3), np.arange(4)[3]])
def test_numpys_count_too(value):
    found = whole_number('n', value, 1, 10)
    assert found == 3 and type(found) is int


@pytest.mark.parametrize('value', [True, np.bool_(True), 3., np.float64(3), '3', None, [3], 0, -1, np.int8(-3), 11, 10**30])
def test_what_is_none_in_the_limits_is_refused(value):
    with pytest.raises(DataError, match='n is .*; it must be a whole number, from 1 to 10$'): whole_number('n', value, 1, 10)


def test_where_people_pass_them(tmp_path):
    assert type(Checkpoint(tmp_path, every=np.int64(5), keep=np.int64(2)).every) is int
    check_shares(.2, 0, np.int64(3))
    check_shrinking(np.int64(480), np.int64(90))
    with pytest.raises(DataError, match="every is 'epochs'; if not 'epoch' it must be a whole number, 1 or more"): Checkpoint(tmp_path, every='epochs')
    with pytest.raises(DataError, match='keep is 0; if not None it must be'): Checkpoint(tmp_path, keep=0)
    with pytest.raises(DataError, match='quality is 101; it must be a whole number, from 1 to 100'): check_shrinking(480, 101)
