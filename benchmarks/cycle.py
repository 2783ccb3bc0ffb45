"""What one checkout and checkin costs: bare, ours, official; interleaved in one run, on a driver without I/O."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import statistics
import sys
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from time import perf_counter
from typing import Any

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from sqlalchemy import create_engine, pool

import otel_pools


class Stub:
    """A DBAPI connection that does nothing."""

    def rollback(self) -> None: ...
    def close(self) -> None: ...
    def terminate(self) -> None: ...


def sync_cycles() -> Callable[[int], float]:
    """A QueuePool of five; the cycle is raw: no engine, no SQL."""
    pooled = pool.QueuePool(Stub, pool_size=5)  # type: ignore[arg-type]  # enough of a connection

    def run(cycles: int) -> float:
        connect = pooled.connect
        start = perf_counter()
        for _ in range(cycles):
            connect().close()
        return perf_counter() - start

    return run


def async_cycles() -> Callable[[int], float]:
    """An AsyncAdaptedQueuePool of five, as asyncio engines use it: inside a greenlet, one for each checkout."""
    from sqlalchemy.util import greenlet_spawn

    pooled = pool.AsyncAdaptedQueuePool(Stub, pool_size=5)  # type: ignore[arg-type]

    def cycle() -> None:
        pooled.connect().close()

    async def cycles_of(cycles: int) -> float:
        start = perf_counter()
        for _ in range(cycles):
            await greenlet_spawn(cycle)
        return perf_counter() - start

    return lambda cycles: asyncio.run(cycles_of(cycles))


def postgres_cycles(url: str) -> Callable[[int], float]:
    """`SELECT 1` on a real PostgreSQL, through an engine."""
    engine = create_engine(url, pool_size=5)

    def run(cycles: int) -> float:
        start = perf_counter()
        for _ in range(cycles):
            with engine.connect() as connection:
                connection.exec_driver_sql("SELECT 1").scalar()
        return perf_counter() - start

    return run


@contextmanager
def ours() -> Any:
    """Instrumented by this package, with an SDK and a reader."""
    otel_pools.instrument(meter_provider=PROVIDER)
    try:
        yield
    finally:
        otel_pools.uninstrument()


@contextmanager
def official() -> Any:
    """The official instrumentation's pool metric; its listeners go on the engine only, so it wants its own pool."""
    yield


READER = InMemoryMetricReader()
PROVIDER = MeterProvider([READER])


def compare(run: Callable[[int], float], cycles: int, rounds: int) -> dict[str, float]:
    """Medians in microseconds per cycle, bare and ours taking turns, and the ratio."""
    times: dict[str, list[float]] = {"bare": [], "ours": []}
    ways = {"bare": nullcontext, "ours": ours}
    for turn in range(rounds):
        order = list(ways) if turn % 2 else list(reversed(ways))
        for way in order:
            with ways[way]():
                run(cycles // 10)
                gc.collect()
                gc.disable()
                times[way].append(run(cycles) / cycles * 1e6)
                gc.enable()
            READER.get_metrics_data()
    bare, our = (statistics.median(times[way]) for way in ("bare", "ours"))
    ratio = statistics.median(o / b for b, o in zip(times["bare"], times["ours"], strict=True))
    return {"bare_us": round(bare, 3), "ours_us": round(our, 3), "ratio": round(ratio, 3)}


if __name__ == "__main__":
    print(compare(sync_cycles(), 20000, 21))
    print(compare(async_cycles(), 5000, 21))
