"""The least that Python on these functions can cost: calling on and nothing else, and two durations; beside ours."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

from stubs import POOLS
from turns import SLOWER, Row, compare, parser, repeated

from otel_pools._hooks import resolve

WAITS: list[float] = []
USES: list[float] = []
Wrap = Callable[["Place", Callable[..., Any]], Callable[..., Any]]


class Place(NamedTuple):
    """
    A method on the way of a connection.

    Attributes:
        where: ``module:Class.method``.
        held: From its arguments, the result first, to what is held between the two.
        more: Whether it takes an argument beside its object; a catch-all would cost more than the rest.
    """

    where: str
    held: Callable[..., Any]
    more: bool = False


# Where a connection is asked for, and where it is given back; of httpcore the answer's stream is what is held.
PLACES = {
    "sqlalchemy": (
        Place("sqlalchemy.pool.base:Pool.connect", lambda fairy: fairy._connection_record),
        Place("sqlalchemy.pool.base:_ConnectionRecord.checkin", lambda record, _: record, more=True),
    ),
    "redis": (
        Place("redis.connection:ConnectionPool.get_connection", lambda connection: connection),
        Place("redis.connection:ConnectionPool.release", lambda _, connection: connection, more=True),
    ),
    "httpx": (
        Place(
            "httpcore._sync.connection_pool:ConnectionPool.handle_request",
            lambda answer, _: answer.stream,
            more=True,
        ),
        Place("httpcore._sync.connection_pool:PoolByteStream.close", lambda stream: stream),
    ),
}


def calls_on(place: Place, original: Callable[..., Any]) -> Callable[..., Any]:
    """What any wrapper does."""

    def alone(one: Any) -> Any:
        return original(one)

    def with_another(one: Any, two: Any = True) -> Any:
        return original(one, two)

    return with_another if place.more else alone


def asked(place: Place, original: Callable[..., Any]) -> Callable[..., Any]:
    """How long it took; and since when it is held, kept on what is held."""
    held = place.held

    def alone(one: Any) -> Any:
        start = perf_counter()
        got = original(one)
        end = perf_counter()
        WAITS.append(end - start)
        held(got).since = end
        return got

    def with_another(one: Any, two: Any) -> Any:
        start = perf_counter()
        got = original(one, two)
        end = perf_counter()
        WAITS.append(end - start)
        held(got, two).since = end
        return got

    return with_another if place.more else alone


def given_back(place: Place, original: Callable[..., Any]) -> Callable[..., Any]:
    """How long it was held."""
    held = place.held

    def alone(one: Any) -> Any:
        USES.append(perf_counter() - held(one).since)
        return original(one)

    def with_another(one: Any, two: Any = True) -> Any:
        USES.append(perf_counter() - held(one, two).since)
        return original(one, two)

    return with_another if place.more else alone


@contextmanager
def replaced(target: str, *wraps: Wrap) -> Iterator[None]:
    """Have its two methods replaced; redis-py's without its decorator for deprecated arguments, as ours are."""
    undo = []
    for place, wrap in zip(PLACES[target], wraps, strict=True):
        owner, name = resolve(place.where)
        original = vars(owner)[name]
        setattr(owner, name, wrap(place, getattr(original, "__wrapped__", original)))
        undo.append((owner, name, original))
    try:
        yield
    finally:
        for one in undo:
            setattr(*one)
        WAITS.clear()
        USES.clear()


def ways(target: str) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    """Calling on alone; and two durations alone: no pool is told from another, nobody is seen waiting or holding."""
    return {
        "calls": partial(replaced, target, calls_on, calls_on),
        "two": partial(replaced, target, asked, given_back),
    }


def measure(target: str, chosen: argparse.Namespace) -> Row:
    """Ratios, and the microseconds that each way adds."""
    row = compare(target, repeated(POOLS[target]().cycle), chosen, ways(target), SLOWER.get(target, 1))
    added = {way: round((row[f"{way}/bare"] - 1) * row["bare_us"], 2) for way in ("calls", "two", "ours", "full")}
    return row | {f"{way}_added_us": more for way, more in added.items()}


def table(told: Mapping[str, Any]) -> list[str]:
    """As lines of less than 100 columns."""
    lines = ["What is added to a cycle, as a ratio (and µs): calling on, two durations alone, ours, all on"]
    lines.append(f"{'':12}{'bare µs':>9}{'calls on':>18}{'two durations':>18}{'ours':>18}{'all on':>18}")
    for target, row in told["rows"].items():
        cells = (f"{row[f'{w}/bare']:.3f} ({row[f'{w}_added_us']:.2f})" for w in ("calls", "two", "ours", "full"))
        lines.append(f"{target:12}{row['bare_us']:9.2f}" + "".join(f"{cell:>18}" for cell in cells))
    return lines


def main() -> None:
    chosen = parser(__doc__, rounds=15).parse_args()
    told: dict[str, Any] = {"python": platform.python_version(), "rounds": chosen.rounds}
    told |= {"rows": {target: measure(target, chosen) for target in POOLS}}
    print(json.dumps(told) if chosen.json else "\n".join(table(told)))


if __name__ == "__main__":
    main()
