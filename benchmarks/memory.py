"""What we keep: the bytes of an idle pool, and what short-lived, dropped and leaked pools leave behind."""

from __future__ import annotations

import gc
import itertools
import json
import platform
import sys
import tracemalloc
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from opentelemetry.metrics import NoOpMeterProvider
from sdk import Sdk
from stubs import POOLS
from turns import Row, parser, watched

from otel_pools._doors import INSTRUMENTORS
from otel_pools._outbox import Histograms

WARM = 20
PARTS = 4
# Blocks, of 250 pools or more: one for each of them would be more. It is not nothing, as the statistics count times
# in bins, and each new bin stays; on a busy machine there are many.
ONE = 200
Scenario = Callable[[str, int], Any]  # from a target and a number of pools; what it returns is kept while we look
_numbers = itertools.count()


def one(target: str, named: bool = False) -> Any:
    """A pool, with a name that all others have too or with one that no other ever had."""
    return POOLS[target](host=f"host{next(_numbers)}" if named else "host")


def used(pool: Any) -> Any:
    """It has lent a connection and has it back."""
    pool.give_back(pool.borrow())
    return pool


def idle(target: str, number: int) -> Any:
    """Alive, with an idle connection each."""
    return [used(one(target)) for _ in range(number)]


def idle_of_names(target: str, number: int) -> Any:
    """The same, each with a name of its own."""
    return [used(one(target, named=True)) for _ in range(number)]


def short_lived(target: str, number: int) -> None:
    """One after the other, each closed after use: a new client for every request."""
    for _ in range(number):
        used(one(target)).close()


def short_lived_of_names(target: str, number: int) -> None:
    """The same, each with a name of its own."""
    for _ in range(number):
        used(one(target, named=True)).close()


def dropped(target: str, number: int) -> None:
    """Never closed, with an idle connection."""
    for _ in range(number):
        used(one(target))


def leaked(target: str, number: int) -> None:
    """Never closed, and the connection never given back."""
    for _ in range(number):
        one(target).borrow()


KEEPING: dict[str, Scenario] = {
    "idle": idle,
    "idle, own names": idle_of_names,
    "gone, own names": short_lived_of_names,
}
GOING: dict[str, Scenario] = {"short-lived": short_lived, "dropped": dropped, "leaked": leaked}


# -- bytes -----------------------------------------------------------------------------


def held(play: Scenario, target: str, number: int, collect: Callable[[], Any]) -> int:
    """How many bytes are held afterwards that were not before."""
    play(target, WARM)
    collect()
    gc.collect()
    before, _ = tracemalloc.get_traced_memory()
    kept = play(target, number)
    for _ in range(2):  # from the second on it is known where the SDK keeps the values
        collect()
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    del kept
    return after - before


def added(play: Scenario, target: str, number: int, sdk: Sdk | None = None) -> float:
    """How many bytes more a pool is because we watch; and with an SDK, what that keeps of it after collections."""
    tracemalloc.start()
    try:
        bare = held(play, target, number, lambda: None)
        with watched(target, meter_provider=NoOpMeterProvider() if sdk is None else sdk.provider):
            collect = partial(_read, target) if sdk is None else sdk.collect
            return (held(play, target, number, collect) - bare) / number
    finally:
        tracemalloc.stop()


def _read(target: str) -> None:
    """What a collection would have us do, without anybody to hear it."""
    registry = INSTRUMENTORS[target]._registry
    assert registry is not None
    for ledger, _ in list(registry.readings()):
        ledger.outbox.deliver(Histograms(None, None, None, None), {})


# -- what is left ----------------------------------------------------------------------


def left(play: Scenario, target: str, number: int) -> int:
    """
    How many blocks of memory so many pools leave behind, watched and collected; a tracer would be too slow.

    Of the parts of them the one that leaves least: what is made once, for
    good, is not what a pool leaves.
    """
    sdk = Sdk()
    with watched(target, meter_provider=sdk.provider):
        play(target, WARM)
        return min(_left(play, target, number // PARTS, sdk) for _ in range(PARTS))


def _left(play: Scenario, target: str, number: int, sdk: Sdk) -> int:
    _settle(sdk)
    before = sys.getallocatedblocks()
    play(target, number)
    _settle(sdk)
    return sys.getallocatedblocks() - before


def _settle(sdk: Sdk) -> None:
    """The first collection delivers the last samples, and what it allocates for that the second does not keep."""
    for _ in range(3):
        sdk.collect()
        gc.collect()


# -- all of it -------------------------------------------------------------------------


def measure(pools: int, names: int) -> dict[str, Row]:
    """Bytes a pool, ours alone and with the SDK's series of it; and blocks left by a part of so many pools."""
    rows: dict[str, Row] = {}
    for name, play in KEEPING.items():
        rows[f"{name}: ours, bytes"] = {one: added(play, one, names) for one in POOLS}
        rows[f"{name}: with SDK, bytes"] = {one: added(play, one, names, Sdk()) for one in POOLS}
    for name, play in GOING.items():
        rows[f"{name}: blocks left"] = {one: left(play, one, pools) for one in POOLS}
    return {name: {target: round(value) for target, value in row.items()} for name, row in rows.items()}


def table(told: Mapping[str, Any]) -> list[str]:
    """As lines of less than 100 columns."""
    gone = told["pools"] // PARTS
    lines = [f"Memory that we add: bytes a pool ({told['names']} pools), and blocks left after {gone} pools"]
    lines.append(f"{'':34}" + "".join(f"{target:>14}" for target in POOLS))
    for name, row in told["rows"].items():
        lines.append(f"{name:34}" + "".join(f"{row[target]:14.0f}" for target in POOLS))
    return lines


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--pools", type=int, default=10_000)
    options.add_argument("--names", type=int, default=200)
    chosen = options.parse_args()
    rows = measure(chosen.pools, chosen.names)
    told = {"python": platform.python_version(), "pools": chosen.pools, "names": chosen.names, "rows": rows}
    print(json.dumps(told) if chosen.json else "\n".join(table(told)))


if __name__ == "__main__":
    main()
