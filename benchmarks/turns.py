"""How everything is measured here: the ways take turns in one run, and what counts is the median of their ratios."""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import perf_counter
from typing import Any

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

import otel_pools

READER = InMemoryMetricReader()
PROVIDER = MeterProvider([READER])
Run = Callable[[int], float]  # from a number of cycles to the seconds they took
Way = Callable[[], AbstractContextManager[Any]]
Row = dict[str, float]


def timed(cycle: Callable[[], Any], cycles: int) -> float:
    start = perf_counter()
    for _ in range(cycles):
        cycle()
    return perf_counter() - start


@contextmanager
def ours() -> Iterator[None]:
    """Instrumented by us, with an SDK and a reader."""
    otel_pools.instrument(meter_provider=PROVIDER)
    try:
        yield
    finally:
        otel_pools.uninstrument()


def compare(run: Run, cycles: int, rounds: int, peers: Mapping[str, Way] = {}) -> Row:
    """Medians in microseconds a cycle, the ways taking turns, and the median of the rounds' ratios."""
    ways: dict[str, Way] = {"bare": nullcontext, "ours": ours, **peers}
    times: dict[str, list[float]] = {way: [] for way in ways}
    run(cycles)
    for turn in range(rounds):
        for way in list(ways)[:: -1 if turn % 2 else 1]:
            with ways[way]():
                run(max(cycles // 10, 1))
                gc.collect()
                gc.disable()
                times[way].append(run(cycles) / cycles * 1e6)
                gc.enable()
            READER.get_metrics_data()
    row = {f"{way}_us": round(statistics.median(taken), 2) for way, taken in times.items()}
    for way in list(ways)[1:]:
        ratios = [one / bare for bare, one in zip(times["bare"], times[way], strict=True)]
        row[f"{way}/bare"] = round(statistics.median(ratios), 3)
    return row


def arguments(about: str | None, server: str) -> argparse.Namespace:
    """What every benchmark here can be told."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--cycles", type=int, default=10_000)
    parser.add_argument(f"--no-{server}", dest="no_server", action="store_true", help="only what needs no server")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    warnings.simplefilter("ignore")
    return parser.parse_args()


def show(rows: Mapping[str, Row], chosen: argparse.Namespace, library: str) -> None:
    if chosen.json:
        print(json.dumps({"python": platform.python_version(), "library": library, **rows}))
        return
    print(f"Python {platform.python_version()}, {library}, {chosen.rounds} rounds of {chosen.cycles} cycles")
    for name, row in rows.items():
        print(f"{name:24}", "  ".join(f"{key} {value:8.3f}" for key, value in row.items()))
