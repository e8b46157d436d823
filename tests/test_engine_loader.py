"Batches that several processes share: each photo once, as many batches for each process, and none of a lone photo."
import pytest

from resnet_fastai.engine.files import DataError
from resnet_fastai.engine.loader import PhotoDL


def dealt(n, bs, world_size, shuffle=True, num_workers=0):
    "The batches of each process"
    shares = []
    for rank in range(world_size):
        dl = PhotoDL(list(range(n)), bs=bs, shuffle=shuffle, num_workers=num_workers)
        dl.rng.seed(0)
        dl.rank, dl.world_size = rank, world_size
        shares.append([b.tolist() for b in dl])
    return shares


@pytest.mark.parametrize('n,bs,world_size', [(23, 4, 1), (21, 4, 1), (20, 4, 1), (3, 8, 1), (23, 4, 2), (25, 4, 3), (24, 4, 3), (29, 4, 3), (6, 9, 3),
                                             (31, 1, 2), (50, 16, 3)])
def test_an_epoch_is_dealt_out(n, bs, world_size):
    shares = dealt(n, bs, world_size)
    assert sorted(i for share in shares for b in share for i in b) == list(range(n))
    assert len({len(share) for share in shares}) == 1
    assert all(min(bs, 2) <= len(b) <= bs + 2 for share in shares for b in share)
    in_order = dealt(n, bs, world_size, shuffle=False)                                          # validation: a process may get a batch less
    assert sorted(i for share in in_order for b in share for i in b) == list(range(n))


def test_workers_do_not_change_the_batches(): assert dealt(23, 4, 2, num_workers=2) == dealt(23, 4, 2)


def test_a_lone_photo_joins_the_update_before(): assert [len(b) for b in dealt(21, 4, 1)[0]] == [4, 4, 4, 4, 2, 3]


def test_too_few_photos_for_the_processes():
    with pytest.raises(DataError, match='too few for 3 processes'): dealt(5, 4, 3)
