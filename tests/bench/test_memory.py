"""What we keep of a pool: little while it lives, and nothing when it is gone."""

from __future__ import annotations

import memory
import pytest
from stubs import POOLS

KIB = 1024
TARGETS = pytest.mark.parametrize("target", POOLS)


@TARGETS
@pytest.mark.parametrize("scenario", ["idle", "idle, own names"])
def test_an_idle_pool_costs_at_most_8_kib(target, scenario):
    """A pool with one idle connection costs at most 8 KiB of ours, even if no other has its name."""
    assert memory.added(memory.KEEPING[scenario], target, 50) <= 8 * KIB


@TARGETS
@pytest.mark.parametrize("scenario", memory.GOING)
def test_what_is_gone_leaves_nothing(target, scenario):
    """Of 1000 pools that were closed, dropped, or dropped with a connection out, next to nothing remains."""
    assert memory.left(memory.GOING[scenario], target, 1000) < memory.ONE


@TARGETS
def test_ten_thousand_short_lived_pools_leave_nothing(target):
    """Of 10 000 pools, a new one for every request, next to nothing remains."""
    assert memory.left(memory.short_lived, target, 10_000) < memory.ONE


@TARGETS
def test_a_name_that_is_gone_costs_less_than_a_pool(target):
    """A name of which no pool is left keeps its counters, in at most 6 KiB of ours."""
    assert memory.added(memory.KEEPING["gone, own names"], target, 50) <= 6 * KIB
