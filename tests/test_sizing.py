"""How large a pool has to be: the formulas against published values, each other, and a simulation."""

from __future__ import annotations

import math
import runpy
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from otel_pools._sizing import load, load_behind, mean_wait, refused, size_for, variability, wait_quantile, waits

bench = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "sizing.py"))
HOLDS = bench["HOLDS"]
EXPONENTIAL = HOLDS["exponential"]
HEAVY = [name for name in HOLDS if name != "exponential"]

LOADS = some.floats(0.01, 60, allow_nan=False)
SIZES = some.integers(1, 80)
PARTS = some.floats(0.0001, 0.9)


@cache
def simulated(size, load, holds, seed=1):
    return bench["simulate"](size, load, HOLDS[holds], 250_000, seed)


# -- the formulas ----------------------------------------------------------------------


def test_littles_law():
    """100 requests a second that hold one for 50 ms have 5 in use."""
    assert load(100, 0.05) == pytest.approx(5)


@pytest.mark.parametrize(
    ("size", "load", "part"), [(1, 1, 1 / 2), (2, 1, 1 / 5), (5, 3, 0.110054), (10, 5, 0.018385), (20, 12, 0.009796)]
)
def test_erlang_b(size, load, part):
    """The part that is refused is that of the published tables."""
    assert refused(size, load) == pytest.approx(part, rel=1e-4)


@pytest.mark.parametrize(
    ("size", "load", "part"), [(1, 0.5, 1 / 2), (2, 1, 1 / 3), (5, 3, 0.236151), (10, 5, 0.036105), (20, 12, 0.024124)]
)
def test_erlang_c(size, load, part):
    """The part that waits is that of the published tables."""
    assert waits(size, load) == pytest.approx(part, rel=1e-3)


@given(size=SIZES, load=LOADS)
def test_erlang_b_is_its_definition(size, load):
    """The recursion gives what the sum over all states does."""
    terms = [number * math.log(load) - math.lgamma(number + 1) for number in range(size + 1)]
    definition = 1 / sum(math.exp(term - terms[-1]) for term in terms)

    assert refused(size, load) == pytest.approx(definition, rel=1e-9)


@given(size=SIZES, load=LOADS)
def test_less_wait_in_a_larger_pool(size, load):
    """One more connection never makes more wait, and more load never fewer; both are parts."""
    parts = [0, waits(size + 1, load), waits(size, load), waits(size, load * 1.1), 1]

    assert all(less <= more + 1e-12 for less, more in pairwise(parts))


@pytest.mark.parametrize("load", [2, 2.5, 100])
def test_as_much_load_as_connections(load):
    """Then all wait sooner or later, and without end."""
    assert waits(2, load) == 1
    assert mean_wait(2, load, 0.1) == math.inf
    assert wait_quantile(2, load, 0.1, 0.99) == math.inf


def test_thousands_of_connections():
    """The recursion neither overflows nor loses precision where factorials would."""
    size = size_for(5000, 0.01)

    assert 5000 < size < 5500
    assert waits(size, 5000) <= 0.01 < waits(size - 1, 5000)


@given(load=LOADS, part=PARTS)
def test_the_smallest_size(load, part):
    """With the size no more than that part waits, and with one less more do."""
    size = size_for(load, part)

    assert waits(size, load) <= part
    assert size == 1 or waits(size - 1, load) > part


def test_no_load():
    """A pool that nobody uses still has one connection."""
    assert size_for(0.0, 0.01) == 1
    assert waits(1, 0.0) == 0


@given(size=SIZES, part=some.floats(0.001, 0.95))
def test_the_load_behind_a_wait(size, part):
    """It is the one of which that part waits."""
    assert waits(size, load_behind(size, part)) == pytest.approx(part, rel=1e-2)


def test_the_load_behind_waits_of_all():
    """Of a pool for which all wait, nothing but its size is known."""
    assert load_behind(4, 1.0) == pytest.approx(4, rel=1e-5)


@given(load=some.floats(0.01, 0.99), hold=some.floats(0.001, 10))
def test_one_connection(load, hold):
    """Of one connection the mean wait is that of the textbook, for exponential, equal and any holds."""
    exponential = load * hold / (1 - load)

    assert mean_wait(1, load, hold) == pytest.approx(exponential)
    assert mean_wait(1, load, hold, 0.0) == pytest.approx(exponential / 2)
    assert mean_wait(1, load, hold, 4.0) == pytest.approx(exponential * 2.5)


@given(size=SIZES, load=LOADS, part=some.floats(0.01, 0.99))
def test_the_quantile_of_a_wait(size, load, part):
    """Who waits longer than the quantile are as many as it says, by the exponential tail of the wait."""
    if load >= size * 0.99:
        return
    quantile = wait_quantile(size, load, 0.1, part)
    beyond = waits(size, load) * math.exp(-(size - load) / 0.1 * quantile)

    assert quantile >= 0
    assert beyond == pytest.approx(1 - part) if quantile else beyond <= 1 - part + 1e-12


def test_how_much_holds_vary():
    """By mean and median: nothing if they are equal, about 1 if exponential, and what it is if log-normal."""
    assert variability(0.1, 0.1) == 0
    assert variability(0.1, 0.0) == 0
    assert variability(1.0, math.log(2)) == pytest.approx(1.08, abs=0.01)
    assert variability(1.0, math.exp(-math.log(5) / 2)) == pytest.approx(4)


@pytest.mark.parametrize("part", [0, 1, -1, 2])
def test_a_part_is_between_0_and_1(part):
    """Nothing else can be asked for."""
    with pytest.raises(ValueError, match="between 0 and 1"):
        size_for(1.0, part)
    with pytest.raises(ValueError, match="between 0 and 1"):
        wait_quantile(2, 1.0, 1.0, part)


# -- a simulation ------------------------------------------------------------------------


@pytest.mark.parametrize("load", [1, 5, 20])
def test_the_advised_size_keeps_the_promise(load):
    """Exponential holds: no more wait than wanted, and with one connection less more do."""
    size = size_for(load, 0.01)

    assert simulated(size, load, "exponential").waiting <= 0.01
    assert simulated(size - 1, load, "exponential").waiting > 0.01


@pytest.mark.parametrize("holds", HEAVY)
@pytest.mark.parametrize("load", [1, 5])
def test_heavy_tails_keep_the_promise(load, holds):
    """Log-normal and Pareto holds: no more wait than wanted, by a tenth of that at most."""
    assert simulated(size_for(load, 0.01), load, holds).waiting <= 0.011


@pytest.mark.parametrize("holds", HOLDS)
def test_as_many_wait_as_predicted(holds):
    """Whatever the holds are like, Erlang's formula is within a tenth of what is simulated."""
    assert simulated(8, 5, holds).waiting == pytest.approx(waits(8, 5), rel=0.1)


@pytest.mark.parametrize(("size", "load"), [(3, 1), (8, 5), (25, 20)])
def test_they_wait_for_as_long_as_predicted(size, load):
    """Exponential holds: the mean wait is within a tenth of what is simulated."""
    assert simulated(size, load, "exponential").mean_wait == pytest.approx(mean_wait(size, load, 1.0), rel=0.1)


@pytest.mark.parametrize("holds", HEAVY)
def test_heavy_tails_wait_no_longer_than_predicted(holds):
    """Log-normal and Pareto holds: the approximation is an upper bound, by no more than a factor of four."""
    predicted = mean_wait(8, 5, 1.0, HOLDS[holds].variance)

    assert predicted / 4 < simulated(8, 5, holds).mean_wait < predicted * 1.1


@settings(deadline=None, max_examples=5)
@given(seed=some.integers(0, 1000))
def test_the_simulation_itself(seed):
    """With as many connections as requests nobody waits; with one it is the textbook's queue."""
    assert bench["simulate"](200, 5, EXPONENTIAL, 5000, seed) == (0, 0)
    assert bench["simulate"](1, 0.5, EXPONENTIAL, 50_000, seed).waiting == pytest.approx(0.5, rel=0.1)
