"""The hot closures take no more instructions than is recorded: a guard that no noise can trip or fool."""

from __future__ import annotations

import instructions
import pytest


@pytest.mark.timeout(900)
def test_no_more_instructions_than_recorded():
    """On every target we add at most a tenth more than is recorded for this version of Python."""
    try:
        regressions = instructions.confirmed(instructions.recorded())
    except instructions.Unavailable as reason:
        pytest.skip(str(reason))

    assert regressions == []


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


def test_the_middle_of_several_seeds_is_recorded():
    """Of each target by itself, by what we add."""
    measured = [{"a": {"added": 1}, "b": {"added": 9}}, {"a": {"added": 3}, "b": {"added": 7}}]

    assert instructions.typical([*measured, {"a": {"added": 2}, "b": {"added": 8}}]) == {
        "a": {"added": 2},
        "b": {"added": 8},
    }


@pytest.mark.parametrize(
    ("grown", "asked", "told"), [((), "0", []), (("0",), "01", []), (("0", "1", "2"), "012", ["a"])]
)
def test_a_regression_is_one_with_each_seed(monkeypatch, grown, asked, told):
    """Other seeds are asked as long as one tells of a regression; if the last does, it is one."""
    seeds = []

    def measure(seed):
        seeds.append(seed)
        return {"a": {"bare": 1000, "added": 200 if seed in grown else 100}}

    monkeypatch.setattr(instructions, "measure", measure)
    found = instructions.confirmed({"a": {"bare": 1000, "added": 100}})

    assert "".join(seeds) == asked
    assert [one.partition(":")[0] for one in found] == told
