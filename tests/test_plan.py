"The plan of a large training: what a ring sends, which limit decides, and what the ImageNet page makes of stored rates."
import pytest

from resnet_fastai.model import count_params, resnet50
from resnet_fastai.engine.distributed import distribute
from resnet_fastai.practice.distributed import all_reduce_seconds, estimate_hours, rate_limits


def ring(gpus, n):
    "Average n numbers in a ring, number by number; (how many numbers the busiest link carried, is every GPU's result the sum?)"
    held = [[float(g*n + i) for i in range(n)] for g in range(gpus)]
    want = [sum(column) for column in zip(*held)]
    part = lambda k: range(k % gpus*n//gpus, (k % gpus + 1)*n//gpus)
    sent = [0]*gpus
    for phase in ('add', 'copy'):
        for step in range(gpus - 1):
            moves = [(g, part(g - step + (phase == 'copy'))) for g in range(gpus)]
            values = [[held[g][i] for i in p] for g, p in moves]
            for (g, p), vs in zip(moves, values):
                sent[g] += len(p)
                for i, v in zip(p, vs): held[(g + 1) % gpus][i] = v + (held[(g + 1) % gpus][i] if phase == 'add' else 0)
    return max(sent), all(h == want for h in held)


@pytest.mark.parametrize('gpus', [2, 3, 8, 16])
def test_a_ring_sends_what_the_plan_says(gpus, n=48*5):
    most, right = ring(gpus, n)
    assert right and all_reduce_seconds(gpus, link=1e-9, params=n) == pytest.approx(4*most)                    # 1 byte a second


def test_the_gradients_are_those_of_resnet50():
    assert all_reduce_seconds(2, 1) == pytest.approx(4*count_params(resnet50())/1e9)


def test_the_smallest_rate_decides():
    few = dict(gpus=64, bs=2048, link=1.25)
    rates = rate_limits(1000, 100, cores=512, **few)
    assert rates['GPUs'] == pytest.approx(57_600) and rates['decoding'] == 51_200 and rates['network'] == pytest.approx(2048/(2*63/64*4*25_557_032/1.25e9))
    assert estimate_hours(1000, 100, cores=512, **few)['limit'] == 'network' and estimate_hours(1000, 100, cores=64, **few | dict(link=50))['limit'] == 'decoding'
    plan = estimate_hours(1000, 1000, cores=512, gpus=64, epochs=90, link=50)
    assert plan['limit'] == 'GPUs' and plan['bs'] == 2048 and plan['lr'] == pytest.approx(.8) and plan['hours'] == pytest.approx(90*1_281_167/57_600/3600, abs=.05)
    assert 'network' not in rate_limits(1000, 100, gpus=1, link=1)


def test_hours_of_round_numbers():
    assert estimate_hours(1000, 1e9, gpus=1, cores=1, epochs=1, photos=3_600_000)['hours'] == 1.
    assert estimate_hours(1000, 10, gpus=1, cores=1)['limit'] == 'decoding'
    assert estimate_hours(1, 1, gpus=32)['lr'] == .4                      # 1024 photos in an update, and the rate in proportion


def test_one_process_is_left_alone():
    same = object()
    assert distribute(same) is same
