"""What one checkout and checkin costs: bare, ours, official; taking turns in one run, medians and ratios."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import platform
import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from time import perf_counter
from typing import Any

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.trace import get_tracer
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, QueuePool
from sqlalchemy.util import greenlet_spawn

import otel_pools

READER = InMemoryMetricReader()
PROVIDER = MeterProvider([READER])
Run = Callable[[int], float]


class Stub:
    """A DBAPI connection that does nothing: no I/O hides what we add."""

    def rollback(self) -> None: ...
    def close(self) -> None: ...
    def terminate(self) -> None: ...
    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def timed(cycle: Callable[[], Any], cycles: int) -> float:
    start = perf_counter()
    for _ in range(cycles):
        cycle()
    return perf_counter() - start


def pool_cycles() -> tuple[Run, Any]:
    """The bare pool: `pool.connect().close()`."""
    pool = QueuePool(Stub, pool_size=5)
    return lambda cycles: timed(lambda: pool.connect().close(), cycles), pool


def engine_cycles() -> tuple[Run, Any]:
    """What an application does: `engine.connect().close()`."""
    engine = create_engine("sqlite://", creator=Stub, poolclass=QueuePool, pool_size=5, _initialize=False)
    return lambda cycles: timed(lambda: engine.connect().close(), cycles), engine.pool


def raw_cycles() -> tuple[Run, Any]:
    """In between: `engine.raw_connection().close()`."""
    engine = create_engine("sqlite://", creator=Stub, poolclass=QueuePool, pool_size=5, _initialize=False)
    return lambda cycles: timed(lambda: engine.raw_connection().close(), cycles), engine.pool


def async_cycles() -> tuple[Run, Any]:
    """The pool of an AsyncEngine, each checkout in a greenlet as there."""
    pool = AsyncAdaptedQueuePool(Stub, pool_size=5)

    def cycle() -> None:
        pool.connect().close()

    async def cycles_of(cycles: int) -> float:
        start = perf_counter()
        for _ in range(cycles):
            await greenlet_spawn(cycle)
        return perf_counter() - start

    return lambda cycles: asyncio.run(cycles_of(cycles)), pool


def postgres_cycles(url: str) -> tuple[Run, Any]:
    """`SELECT 1` on a real PostgreSQL, synchronous."""
    engine = create_engine(url, pool_size=5)

    def cycle() -> None:
        with engine.connect() as connection:
            connection.exec_driver_sql("SELECT 1").scalar()

    return lambda cycles: timed(cycle, cycles), engine.pool


def postgres_async_cycles(url: str) -> tuple[Run, Any]:
    """`SELECT 1` on a real PostgreSQL with asyncpg."""
    engine = create_async_engine(url, pool_size=5)
    loop = asyncio.new_event_loop()

    async def cycles_of(cycles: int) -> float:
        start = perf_counter()
        for _ in range(cycles):
            async with engine.connect() as connection:
                await connection.exec_driver_sql("SELECT 1")
        return perf_counter() - start

    return lambda cycles: loop.run_until_complete(cycles_of(cycles)), engine.sync_engine.pool


@contextmanager
def ours(_: Any) -> Iterator[None]:
    """Instrumented by us, with an SDK and a reader."""
    otel_pools.instrument(meter_provider=PROVIDER)
    try:
        yield
    finally:
        otel_pools.uninstrument()


@contextmanager
def official(pool: Any) -> Iterator[None]:
    """The official instrumentation of an engine on this pool, with the same SDK for its metric."""
    from opentelemetry.instrumentation.sqlalchemy.engine import EngineTracer

    meter, tracer = PROVIDER.get_meter("official"), get_tracer("official")
    usage = meter.create_up_down_counter("db.client.connections.usage", unit="connections")
    engine = create_engine("sqlite://", pool=pool, _initialize=False)
    EngineTracer(tracer, engine, usage)
    try:
        yield
    finally:
        EngineTracer.remove_all_event_listeners()
        EngineTracer._remove_event_listener_params.clear()  # or it removes these again with the next engine's


def compare(run: Run, pool: Any, cycles: int, rounds: int, peer: bool) -> dict[str, float]:
    """Medians in microseconds a cycle, the ways taking turns, and the median of the rounds' ratios."""
    ways: dict[str, Any] = {"bare": nullcontext, "ours": ours} | ({"official": official} if peer else {})
    times: dict[str, list[float]] = {way: [] for way in ways}
    run(cycles)
    for turn in range(rounds):
        for way in sorted(ways, reverse=bool(turn % 2)):
            with ways[way](pool):
                run(cycles // 10)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--cycles", type=int, default=10_000)
    parser.add_argument("--no-postgres", action="store_true")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    rounds, cycles = chosen.rounds, chosen.cycles
    stubs = (pool_cycles, raw_cycles, engine_cycles, async_cycles)
    rows = {make.__name__: compare(*make(), cycles, rounds, peer=make is not async_cycles) for make in stubs}
    if not chosen.no_postgres:
        from otel_pools.demo._postgres import Postgres

        with Postgres() as server:
            rows["postgres_cycles"] = compare(*postgres_cycles(server.url("psycopg")), cycles // 10, rounds, peer=False)
            run, pool = postgres_async_cycles(server.url("asyncpg"))
            rows["postgres_async_cycles"] = compare(run, pool, cycles // 10, rounds, peer=False)
    if chosen.json:
        print(json.dumps({"python": platform.python_version(), "sqlalchemy": version("sqlalchemy"), **rows}))
        return
    print(f"Python {platform.python_version()}, SQLAlchemy {version('sqlalchemy')}, {rounds} rounds of {cycles} cycles")
    for name, row in rows.items():
        print(f"{name:24}", "  ".join(f"{key} {value:8.3f}" for key, value in row.items()))


if __name__ == "__main__":
    main()
