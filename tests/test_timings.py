"""Distributions of seconds: exact counts, sums and maxima, quantiles within 5 %, however they were filled."""

from __future__ import annotations

import random

import pytest

from otel_pools._model import Timing
from otel_pools._timings import Distribution

SHAPES = {
    "as fast as idle connections": lambda chance: chance.lognormvariate(-13, 0.5),
    "milliseconds with a long tail": lambda chance: 0.001 * chance.paretovariate(1.1),
    "two kinds": lambda chance: chance.choice([2e-6, 0.9]) * chance.uniform(0.9, 1.1),
    "hours": lambda chance: chance.uniform(3600, 86400),
    "all the same": lambda chance: 0.25,
}


def ranked(samples, part):
    """The sample that so many in a hundred do not exceed, by sorting."""
    return sorted(samples)[-(-len(samples) * part // 100) - 1]


def filled(samples, ordered):
    distribution = Distribution()
    if ordered:
        distribution.add_sorted(sorted(samples))
    else:
        distribution.add(samples)
    return distribution


@pytest.mark.parametrize("ordered", [False, True], ids=["as they came", "sorted"])
@pytest.mark.parametrize("size", [1, 2, 3, 99, 100, 5000])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantiles_are_within_five_percent(shape, size, ordered):
    """Count, sum and maximum are exact, and each quantile is at most 5 % off, whatever is measured."""
    chance = random.Random(size)
    samples = [SHAPES[shape](chance) for _ in range(size)]

    timing = filled(samples, ordered).timing()

    assert (timing.count, timing.max_s) == (size, max(samples))
    assert timing.mean_s == pytest.approx(sum(samples) / size)
    assert timing.p50_s == pytest.approx(ranked(samples, 50), rel=0.05)
    assert timing.p95_s == pytest.approx(ranked(samples, 95), rel=0.05)
    assert timing.p99_s == pytest.approx(ranked(samples, 99), rel=0.05)
    assert timing.p50_s <= timing.p95_s <= timing.p99_s <= timing.max_s


def test_the_two_ways_of_counting_agree():
    """What is counted bin by bin falls into the same bins as what is looked at one by one, the bounds included."""
    chance = random.Random(1)
    samples = [0.0, 5e-324, 1.0, 1.0625, 2.0, 1e300, *(chance.expovariate(1000) for _ in range(3000))]

    assert filled(samples, ordered=True)._bins == filled(samples, ordered=False)._bins


def test_nothing_takes_no_time():
    """Without a sample all figures are 0; a sample of 0 seconds is one all the same."""
    empty, zero = Distribution(), Distribution()
    empty.add([])
    empty.add_sorted([])
    zero.add([0.0])

    assert empty.timing() == Timing()
    assert zero.timing() == Timing(count=1)


def test_merged_is_as_if_counted_together():
    """Two distributions merged say what one of all samples would."""
    chance = random.Random(2)
    samples = [chance.expovariate(100) for _ in range(1000)]
    merged, rest = filled(samples[:300], ordered=False), filled(samples[300:], ordered=False)
    merged.merge(rest)
    merged.merge(Distribution())
    together = filled(samples, ordered=False)

    assert merged._bins == together._bins
    assert merged.timing().mean_s == pytest.approx(together.timing().mean_s)
    assert merged.timing().p99_s == together.timing().p99_s
    assert (merged.timing().count, merged.timing().max_s) == (1000, max(samples))


def test_bins_are_bounded():
    """A hundred thousand times between a nanosecond and a day fill no more than 16 bins for each doubling."""
    chance, distribution = random.Random(3), Distribution()
    for _ in range(100):
        distribution.add([10 ** chance.uniform(-9, 5) for _ in range(1000)])

    assert len(distribution._bins) <= 16 * 47
    assert distribution.count == 100_000


def test_repr():
    """A distribution is one sentence."""
    distribution = Distribution()
    distribution.add([0.5, 0.25, 0.25])

    assert repr(distribution) == "<Distribution [3 times, 0.5 s at most, 2 bins]>"
