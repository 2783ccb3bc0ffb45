"""The hot closures take no more instructions than is recorded: a guard that no noise can trip or fool."""

from __future__ import annotations

import instructions
import pytest


@pytest.mark.timeout(240)
def test_no_more_instructions_than_recorded():
    """On every target we add at most a tenth more than is recorded for this version of Python."""
    try:
        then = instructions.recorded()
        now = instructions.measure()
    except instructions.Unavailable as reason:
        pytest.skip(str(reason))

    assert list(instructions.regressions(now, then)) == []


def test_a_regression_would_be_told():
    """What we add may grow by a tenth, alone or as a share, or by what a bare cycle sways, or have no record."""
    then = {target: {"bare": 1000, "added": 100} for target in "abcd"}
    now = {
        "a": {"bare": 1000, "added": 111},
        "b": {"bare": 1000, "added": 110},
        "c": {"bare": 1200, "added": 120},
        "d": {"bare": 800, "added": 100},
        "e": {"bare": 1, "added": 9},
        "f": {"bare": 100_000, "added": 400},
        "g": {"bare": 100_000, "added": 401},
    }
    then |= {target: {"bare": 100_000, "added": 100} for target in "fg"}

    assert [told.partition(":")[0] for told in instructions.regressions(now, then)] == ["a", "g"]
