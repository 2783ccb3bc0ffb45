"""What one `get_connection` and `release`, and one GET, cost: bare, ours, redis-py's own metrics; taking turns."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from time import perf_counter
from typing import Any

import redis
import redis.asyncio
from stubs import AsyncRedis, Redis, asked
from turns import PROVIDER, THREADS, Row, Run, Way, arguments, awaited, compare, repeated, show, threaded

SHARED = 4
LOOP = asyncio.new_event_loop()


def stub(kind: type[Any]) -> Run:
    """A pool on stubs."""
    pool, arguments = kind(connection_class=Redis, max_connections=5), asked()
    return repeated(lambda: pool.release(pool.get_connection(*arguments)))


def threads() -> Run:
    """Enough connections for everybody."""
    pool, arguments = redis.ConnectionPool(connection_class=Redis, max_connections=THREADS), asked()
    return threaded(lambda: pool.release(pool.get_connection(*arguments)))


def async_stub(kind: type[Any]) -> Run:
    """An asyncio pool on stubs."""
    arguments = asked()

    async def make() -> Any:
        return kind(connection_class=AsyncRedis, max_connections=5)

    pool = LOOP.run_until_complete(make())

    # Not `awaited`, whose one coroutine more would make light of what we add.
    async def cycles_of(cycles: int) -> float:
        start = perf_counter()
        for _ in range(cycles):
            await pool.release(await pool.get_connection(*arguments))
        return perf_counter() - start

    return lambda cycles: LOOP.run_until_complete(cycles_of(cycles))


def stubs() -> dict[str, Run]:
    return {
        "ConnectionPool": stub(redis.ConnectionPool),
        "BlockingConnectionPool": stub(redis.BlockingConnectionPool),
        "ConnectionPool, 8 threads": threads(),
        "asyncio ConnectionPool": async_stub(redis.asyncio.ConnectionPool),
        "asyncio BlockingConnectionPool": async_stub(redis.asyncio.BlockingConnectionPool),
    }


def gets(url: str) -> dict[str, Run]:
    """`GET` on a real Valkey."""
    shared = redis.BlockingConnectionPool.from_url(url, max_connections=SHARED)
    client, own, few = redis.Redis.from_url(url), redis.asyncio.Redis.from_url(url), redis.Redis(connection_pool=shared)
    return {
        "GET": repeated(lambda: client.get("key")),
        "GET, asyncio": awaited(LOOP, lambda: own.get("key")),
        "GET, 8 threads on 4": threaded(lambda: few.get("key")),
    }


@contextmanager
def native(provider: Any = PROVIDER) -> Iterator[None]:
    """redis-py's own metrics, basic and advanced, with the same SDK."""
    from opentelemetry.metrics import _internal
    from redis.asyncio.observability import recorder as async_recorder
    from redis.observability import providers, recorder
    from redis.observability.config import MetricGroup, OTelConfig

    _internal._METER_PROVIDER = provider
    groups = [MetricGroup.CONNECTION_BASIC, MetricGroup.CONNECTION_ADVANCED]
    providers.get_observability_instance().init(OTelConfig(metric_groups=groups))
    try:
        yield
    finally:
        providers.reset_observability_instance()
        recorder.reset_collector()
        async_recorder.reset_collector()
        _internal._METER_PROVIDER = None


def peers(provider: Any = PROVIDER) -> dict[str, Way]:
    """redis-py has metrics of its own from 7.2 on."""
    return {"native": partial(native, provider)} if tuple(map(int, version("redis").split(".")[:2])) >= (7, 2) else {}


def main() -> None:
    chosen = arguments(__doc__, "valkey")
    rows: dict[str, Row] = {name: compare("redis", run, chosen, peers()) for name, run in stubs().items()}
    if not chosen.no_server:
        from otel_pools.demo._valkey import Valkey

        with Valkey() as server:
            for name, run in gets(server.url()).items():
                rows[name] = compare("redis", run, chosen, peers(), 5)
    show(rows, chosen, f"redis-py {version('redis')}")


if __name__ == "__main__":
    main()
