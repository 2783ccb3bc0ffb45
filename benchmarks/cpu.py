"""What one cycle costs in CPU time with all that follows from it: each turn ends with a collection, serialised."""

from __future__ import annotations

import gc
import json
import platform
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from time import perf_counter, process_time
from typing import Any

from sdk import Sdk
from stubs import POOLS
from turns import METRICS, Row, parser, timed, watched

# About what one of our points carries.
IDENTITY = {"db.client.connection.pool.name": "app", "db.system.name": "postgresql", "server.address": "db"}
Cycle = Callable[[], Any]
Way = Callable[[Sdk], AbstractContextManager[Cycle]]  # what to repeat while this lasts


def ways(target: str, cycle: Cycle, peer: Callable[[Any], AbstractContextManager[Any]] | None) -> dict[str, Way]:
    """Bare, ours, the same with all that is on by default, what one would write oneself, and what there is."""

    @contextmanager
    def bare(_: Sdk) -> Iterator[Cycle]:
        yield cycle

    @contextmanager
    def ours(sdk: Sdk) -> Iterator[Cycle]:
        with watched(target, meter_provider=sdk.provider, **METRICS):
            yield cycle

    @contextmanager
    def full(sdk: Sdk) -> Iterator[Cycle]:
        with watched(target, meter_provider=sdk.provider):
            yield cycle

    @contextmanager
    def peers(sdk: Sdk) -> Iterator[Cycle]:
        assert peer is not None
        with peer(sdk.provider):
            yield cycle

    @contextmanager
    def naive(sdk: Sdk) -> Iterator[Cycle]:
        yield _recorded(cycle, sdk)

    return {"bare": bare, "ours": ours, "full": full, "naive": naive} | ({} if peer is None else {"peer": peers})


def _recorded(cycle: Cycle, sdk: Sdk) -> Cycle:
    """Two samples into two histograms, on the way of the request."""
    meter = sdk.provider.get_meter("naive")
    wait, use = meter.create_histogram("wait", unit="s"), meter.create_histogram("use", unit="s")

    def recorded() -> None:
        start = perf_counter()
        cycle()
        seconds = perf_counter() - start
        wait.record(seconds, IDENTITY)
        use.record(seconds, IDENTITY)

    return recorded


def turn(way: Way, sdk: Sdk, cycles: int) -> tuple[float, float]:
    """Microseconds of CPU a cycle, and of those what was spent on collecting and serialising."""
    with way(sdk) as cycle:
        timed(cycle, max(cycles // 10, 1))
        sdk.export()
        gc.collect()
        start = process_time()
        timed(cycle, cycles)
        middle = process_time()
        sdk.export()
        end = process_time()
    return (end - start) / cycles * 1e6, (end - middle) / cycles * 1e6


def measure(all: Mapping[str, Way], rounds: int, cycles: int) -> Row:
    """What each way adds to bare, by the median of the rounds' differences."""
    sdks = {way: Sdk() for way in all}  # each exports its own and nothing else
    taken: dict[str, list[tuple[float, float]]] = {way: [] for way in all}
    for number in range(rounds):
        for way in list(all)[:: -1 if number % 2 else 1]:
            taken[way].append(turn(all[way], sdks[way], cycles))
    bare = [whole for whole, _ in taken["bare"]]
    row = {"cycles": float(cycles), "bare_us": statistics.median(bare)}
    for way in list(all)[1:]:
        row[f"{way}_added_us"] = statistics.median(
            whole - other for (whole, _), other in zip(taken[way], bare, strict=True)
        )
    row["ours_collection_us"] = statistics.median(part for _, part in taken["ours"])
    return {key: round(value, 2) for key, value in row.items()}


def subjects() -> Iterator[tuple[str, str, Cycle, Callable[[Any], AbstractContextManager[Any]] | None, int]]:
    """Name, target, cycle, peer, and by how much fewer cycles it is done with."""
    import cycle
    import httpx_cycle
    import redis_cycle

    pools = {target: make() for target, make in POOLS.items()}
    sqlalchemy, redis, httpcore = pools["sqlalchemy"], pools["redis"], pools["httpx"]
    yield "SQLAlchemy", "sqlalchemy", sqlalchemy.cycle, lambda sdk: cycle.official(sqlalchemy.pool, sdk), 1
    native = redis_cycle.native if redis_cycle.peers() else None
    yield "redis-py", "redis", redis.cycle, native, 1
    yield "httpcore", "httpx", httpcore.cycle, None, 4
    client = httpx_cycle.client("httpx")
    yield "httpx", "httpx", lambda: client(1), httpx_cycle.official, 4


def table(told: Mapping[str, Any]) -> list[str]:
    """As lines of less than 100 columns."""
    keys = ("bare_us", "ours_added_us", "full_added_us", "ours_collection_us", "naive_added_us", "peer_added_us")
    heads = ("cycles", "bare µs", "ours +µs", "all on +µs", "(at export)", "naive +µs", "peer +µs")
    lines = [f"CPU a cycle, with one export after so many; {told['rounds']} rounds"]
    lines.append(f"{'':12}" + "".join(f"{head:>12}" for head in heads))
    for name, row in told["rows"].items():
        cells = (f"{row[key]:12.2f}" if key in row else f"{'-':>12}" for key in keys)
        lines.append(f"{name:12}{row['cycles']:12.0f}" + "".join(cells))
    return lines


def main() -> None:
    chosen = parser(__doc__, rounds=7).parse_args()
    rows = {
        name: measure(ways(target, cycle, peer), chosen.rounds, chosen.cycles // part)
        for name, target, cycle, peer, part in subjects()
    }
    told = {"python": platform.python_version(), "rounds": chosen.rounds, "rows": rows}
    print(json.dumps(told) if chosen.json else "\n".join(table(told)))


if __name__ == "__main__":
    main()
