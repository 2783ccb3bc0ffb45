"""What one `get_connection` and `release`, and one GET, cost: bare, ours, redis-py's own metrics; taking turns."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from threading import Thread
from time import perf_counter
from typing import Any

import redis
import redis.asyncio
from turns import PROVIDER, Run, arguments, compare, show, timed

THREADS, SHARED = 8, 4


class Stub:
    """A connection that does nothing: no I/O hides what we add."""

    def __init__(self, **_: Any) -> None:
        self.pid = os.getpid()

    def connect(self) -> None: ...
    def disconnect(self) -> None: ...
    def re_auth(self) -> None: ...
    def can_read(self, *_: float) -> bool:
        return False

    def should_reconnect(self) -> bool:
        return False


class AsyncStub:
    """The same for asyncio."""

    is_connected = True

    def __init__(self, **_: Any) -> None: ...
    async def connect(self) -> None: ...
    async def disconnect(self) -> None: ...
    async def re_auth(self) -> None: ...
    async def can_read(self) -> bool:
        return False

    async def can_read_destructive(self) -> bool:
        return False

    def should_reconnect(self) -> bool:
        return False


LOOP = asyncio.new_event_loop()


def asked() -> tuple[str, ...]:
    """The arguments of `get_connection` that this version's client gives."""
    return () if tuple(map(int, version("redis").split(".")[:2])) >= (5, 3) else ("GET",)


def stub(kind: type[Any]) -> Run:
    """A pool on stubs."""
    pool, arguments = kind(connection_class=Stub, max_connections=5), asked()

    def cycle() -> None:
        pool.release(pool.get_connection(*arguments))

    return lambda cycles: timed(cycle, cycles)


def async_stub(kind: type[Any]) -> Run:
    """An asyncio pool on stubs."""
    arguments = asked()

    async def make() -> Any:
        return kind(connection_class=AsyncStub, max_connections=5)

    pool = LOOP.run_until_complete(make())

    async def cycles_of(cycles: int) -> float:
        start = perf_counter()
        for _ in range(cycles):
            await pool.release(await pool.get_connection(*arguments))
        return perf_counter() - start

    return lambda cycles: LOOP.run_until_complete(cycles_of(cycles))


def get(url: str) -> Run:
    """`GET` on a real Valkey."""
    client = redis.Redis.from_url(url)
    return lambda cycles: timed(lambda: client.get("key"), cycles)


def async_get(url: str) -> Run:
    """`GET` on a real Valkey, asyncio."""
    client = redis.asyncio.Redis.from_url(url)

    async def cycles_of(cycles: int) -> float:
        start = perf_counter()
        for _ in range(cycles):
            await client.get("key")
        return perf_counter() - start

    return lambda cycles: LOOP.run_until_complete(cycles_of(cycles))


def threads(url: str) -> Run:
    """`GET` by 8 threads on a blocking pool of 4."""
    client = redis.Redis(connection_pool=redis.BlockingConnectionPool.from_url(url, max_connections=SHARED))

    def run(cycles: int) -> float:
        workers = [Thread(target=timed, args=(lambda: client.get("key"), cycles // THREADS)) for _ in range(THREADS)]
        start = perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return perf_counter() - start

    return run


@contextmanager
def native() -> Iterator[None]:
    """redis-py's own metrics, basic and advanced, with the same SDK."""
    from opentelemetry.metrics import _internal
    from redis.asyncio.observability import recorder as async_recorder
    from redis.observability import providers, recorder
    from redis.observability.config import MetricGroup, OTelConfig

    _internal._METER_PROVIDER = PROVIDER
    groups = [MetricGroup.CONNECTION_BASIC, MetricGroup.CONNECTION_ADVANCED]
    providers.get_observability_instance().init(OTelConfig(metric_groups=groups))
    try:
        yield
    finally:
        providers.reset_observability_instance()
        recorder.reset_collector()
        async_recorder.reset_collector()
        _internal._METER_PROVIDER = None


def peers() -> dict[str, Callable[[], Any]]:
    """redis-py has metrics of its own from 7.2 on."""
    return {"native": native} if tuple(map(int, version("redis").split(".")[:2])) >= (7, 2) else {}


def main() -> None:
    chosen = arguments(__doc__, "valkey")
    rounds, cycles = chosen.rounds, chosen.cycles
    rows = {
        "ConnectionPool": compare(stub(redis.ConnectionPool), cycles, rounds, peers()),
        "BlockingConnectionPool": compare(stub(redis.BlockingConnectionPool), cycles, rounds, peers()),
        "asyncio": compare(async_stub(redis.asyncio.ConnectionPool), cycles, rounds, peers()),
        "asyncio, blocking": compare(async_stub(redis.asyncio.BlockingConnectionPool), cycles, rounds, peers()),
    }
    if not chosen.no_server:
        from otel_pools.demo._valkey import Valkey

        with Valkey() as server:
            url = server.url()
            for name, make in {"GET": get, "GET, asyncio": async_get, "GET, 8 threads on 4": threads}.items():
                rows[name] = compare(make(url), cycles // 5, rounds, peers())
    show(rows, chosen, f"redis-py {version('redis')}")


if __name__ == "__main__":
    main()
