"""What one checkout and checkin of SQLAlchemy costs: bare, ours, official; taking turns in one run."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from time import perf_counter
from typing import Any

from opentelemetry.trace import get_tracer
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, QueuePool
from sqlalchemy.util import greenlet_spawn
from turns import PROVIDER, Run, arguments, compare, show, timed


class Stub:
    """A DBAPI connection that does nothing: no I/O hides what we add."""

    def rollback(self) -> None: ...
    def close(self) -> None: ...
    def terminate(self) -> None: ...
    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


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


def main() -> None:
    chosen = arguments(__doc__, "postgres")
    rounds, cycles = chosen.rounds, chosen.cycles
    rows = {}
    for make in (pool_cycles, raw_cycles, engine_cycles, async_cycles):
        run, pool = make()
        peers = {} if make is async_cycles else {"official": partial(official, pool)}
        rows[make.__name__] = compare(run, cycles, rounds, peers)
    if not chosen.no_server:
        from otel_pools.demo._postgres import Postgres

        with Postgres() as server:
            rows["postgres_cycles"] = compare(postgres_cycles(server.url("psycopg"))[0], cycles // 10, rounds)
            run = postgres_async_cycles(server.url("asyncpg"))[0]
            rows["postgres_async_cycles"] = compare(run, cycles // 10, rounds)
    show(rows, chosen, f"SQLAlchemy {version('sqlalchemy')}")


if __name__ == "__main__":
    main()
