"""What one checkout and checkin of SQLAlchemy costs: bare, ours, official; taking turns in one run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

from opentelemetry.trace import get_tracer
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, QueuePool
from sqlalchemy.util import greenlet_spawn
from stubs import Dbapi
from turns import PROVIDER, THREADS, Row, Run, Way, arguments, awaited, compare, repeated, show, threaded

LOOP = asyncio.new_event_loop()
Made = tuple[Run, Any]  # what to run, and its pool


def pool_cycles() -> Made:
    pool = QueuePool(Dbapi, pool_size=5)
    return repeated(lambda: pool.connect().close()), pool


def raw_cycles() -> Made:
    engine = _engine()
    return repeated(lambda: engine.raw_connection().close()), engine.pool


def engine_cycles() -> Made:
    """What an application does."""
    engine = _engine()
    return repeated(lambda: engine.connect().close()), engine.pool


def thread_cycles() -> Made:
    engine = _engine(THREADS)
    return threaded(lambda: engine.connect().close()), engine.pool


def _engine(size: int = 5) -> Any:
    return create_engine("sqlite://", creator=Dbapi, poolclass=QueuePool, pool_size=size, _initialize=False)


def async_cycles() -> Made:
    """The pool of an AsyncEngine, each checkout in a greenlet as there."""
    pool = AsyncAdaptedQueuePool(Dbapi, pool_size=5)
    return awaited(LOOP, lambda: greenlet_spawn(lambda: pool.connect().close())), pool


STUBS: dict[str, Callable[[], Made]] = {
    "pool.connect().close()": pool_cycles,
    "engine.raw_connection().close()": raw_cycles,
    "engine.connect().close()": engine_cycles,
    "the same, 8 threads": thread_cycles,
    "asyncio pool, in its greenlet": async_cycles,
}


def select(url: str, run: Callable[[Callable[[], Any]], Run] = repeated) -> Made:
    """`SELECT 1` on a real PostgreSQL, synchronous."""
    engine = create_engine(url, pool_size=THREADS)

    def cycle() -> None:
        with engine.connect() as connection:
            connection.exec_driver_sql("SELECT 1").scalar()

    return run(cycle), engine.pool


def async_select(url: str) -> Made:
    """`SELECT 1` on a real PostgreSQL with asyncpg."""
    engine = create_async_engine(url, pool_size=5)

    async def cycle() -> None:
        async with engine.connect() as connection:
            await connection.exec_driver_sql("SELECT 1")

    return awaited(LOOP, cycle), engine.sync_engine.pool


@contextmanager
def official(pool: Any, provider: Any = PROVIDER) -> Iterator[None]:
    """The official instrumentation of an engine on this pool, with the same SDK for its metric and none for spans."""
    from opentelemetry.instrumentation.sqlalchemy.engine import EngineTracer

    meter, tracer = provider.get_meter("official"), get_tracer("official")
    usage = meter.create_up_down_counter("db.client.connections.usage", unit="connections")
    engine = create_engine("sqlite://", pool=pool, _initialize=False)
    EngineTracer(tracer, engine, usage)
    try:
        yield
    finally:
        EngineTracer.remove_all_event_listeners()
        EngineTracer._remove_event_listener_params.clear()  # or it removes these again with the next engine's


def peers(pool: Any) -> dict[str, Way]:
    """It knows sync pools; what it does to those of asyncio is the same in their greenlet."""
    return {} if isinstance(pool, AsyncAdaptedQueuePool) else {"official": partial(official, pool)}


def main() -> None:
    chosen = arguments(__doc__, "postgres")
    rows: dict[str, Row] = {}

    def measure(name: str, made: Made, part: int = 1) -> None:
        run, pool = made
        rows[name] = compare("sqlalchemy", run, chosen, peers(pool), part)

    for name, make in STUBS.items():
        measure(name, make())
    if not chosen.no_server:
        from otel_pools.demo._postgres import Postgres

        with Postgres() as server:
            measure("SELECT 1, psycopg", select(server.url("psycopg")), 10)
            measure("SELECT 1, psycopg, 8 threads", select(server.url("psycopg"), threaded), 10)
            measure("SELECT 1, asyncpg", async_select(server.url("asyncpg")), 10)
    show(rows, chosen, f"SQLAlchemy {version('sqlalchemy')}")


if __name__ == "__main__":
    main()
