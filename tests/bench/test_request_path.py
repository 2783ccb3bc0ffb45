"""Nothing on the way of a request calls OpenTelemetry or takes a lock; what happened arrives all the same."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import pkgutil
import sys
from collections import Counter
from threading import Lock, RLock

import pytest

import otel_pools
from otel_pools import instrument

CYCLES = 20
CALLS = {
    "opentelemetry.sdk.metrics._internal.instrument": (
        "Histogram.record",
        "Counter.add",
        "UpDownCounter.add",
        "_Gauge.set",
    ),
    "opentelemetry.metrics._internal.instrument": (
        *("NoOpHistogram.record", "NoOpCounter.add", "NoOpUpDownCounter.add", "NoOpGauge.set"),
        *("_ProxyHistogram.record", "_ProxyCounter.add", "_ProxyUpDownCounter.add", "_ProxyGauge.set"),
    ),
}


# -- everything a user of each library does ----------------------------------------------


def sqlalchemy_sync():
    """An engine: lend, give back, fail to detach nothing."""
    from sqlalchemy import create_engine, text
    from sqlalchemy.pool import QueuePool

    engine = create_engine("sqlite://", poolclass=QueuePool, connect_args={"check_same_thread": False})

    def cycle():
        with engine.connect() as connection:
            connection.execute(text("SELECT 1"))

    return cycle


def sqlalchemy_async():
    from sqlalchemy import text
    from sqlalchemy.ext.asyncio import create_async_engine
    from sqlalchemy.pool import AsyncAdaptedQueuePool

    engine = create_async_engine("sqlite+aiosqlite://", poolclass=AsyncAdaptedQueuePool)

    async def cycle():
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))

    cycle.close = engine.dispose  # its connections have threads
    return cycle


def redis_sync():
    from stubs import RedisPool

    return RedisPool().cycle


def redis_blocking():
    import redis
    from stubs import Redis, asked

    pool = redis.BlockingConnectionPool(connection_class=Redis, max_connections=2)
    return lambda: pool.release(pool.get_connection(*asked()))


def redis_async():
    import redis.asyncio
    from stubs import AsyncRedis, asked

    pool = redis.asyncio.ConnectionPool(connection_class=AsyncRedis, max_connections=2)

    async def cycle():
        await pool.release(await pool.get_connection(*asked()))

    return cycle


def httpx_sync():
    import httpcore
    import httpx
    from stubs import URL, in_memory

    transport = httpx.HTTPTransport(verify=False)
    transport._pool = httpcore.ConnectionPool(network_backend=in_memory(httpcore))
    client = httpx.Client(transport=transport)
    return lambda: client.get(URL)


def httpx_async():
    import httpcore
    import httpx
    from stubs import URL, async_in_memory

    transport = httpx.AsyncHTTPTransport(verify=False)
    transport._pool = httpcore.AsyncConnectionPool(network_backend=async_in_memory(httpcore))
    client = httpx.AsyncClient(transport=transport)

    async def cycle():
        await client.get(URL)

    return cycle


# Qdrant: nothing of ours is on the way of its requests.
USES = {
    "sqlalchemy": (sqlalchemy_sync, sqlalchemy_async),
    "redis": (redis_sync, redis_blocking, redis_async),
    "httpx": (httpx_sync, httpx_async),
}
CASES = [pytest.param(target, make, id=make.__name__) for target, makes in USES.items() for make in makes]
WAITS = {"httpx": "http.client.request.time_in_queue"}


@pytest.fixture
def play():
    """Run a cycle so many times, in one event loop if it is a coroutine function."""
    loop, closing = asyncio.new_event_loop(), []

    def play(cycle, cycles):
        if hasattr(cycle, "close"):
            closing.append(cycle.close)
        for _ in range(cycles):
            if inspect.iscoroutinefunction(cycle):
                loop.run_until_complete(cycle())
            else:
                cycle()

    yield play
    for close in closing:
        loop.run_until_complete(close())
    loop.close()


@pytest.fixture
def forbidden(monkeypatch):
    """While its `set()` is in force, a call into the metrics of the SDK or the API, or a lock of ours, raises."""
    said = []

    def refuse(name):
        def raising(*_, **__):
            said.append(name)
            raise AssertionError(f"{name} on the way of a request")

        return raising

    with monkeypatch.context() as patch:

        def forbid():
            for module, methods in CALLS.items():
                for method in methods:
                    kind, name = method.split(".")
                    patch.setattr(getattr(importlib.import_module(module), kind), name, refuse(method))
            Watched.refuse = staticmethod(refuse("a lock of ours"))

        def allow():
            Watched.refuse = None
            patch.undo()
            return said

        yield forbid, allow
        Watched.refuse = None


class Watched:
    """A lock that can be told to let nobody take it."""

    refuse = None

    def __init__(self):
        self._lock = Lock()

    def acquire(self, *args, **kwargs):
        if Watched.refuse is not None:
            Watched.refuse()
        return self._lock.acquire(*args, **kwargs)

    def release(self):
        self._lock.release()

    def __enter__(self):
        return self.acquire()

    def __exit__(self, *_):
        self.release()


@pytest.fixture(autouse=True)
def watched_locks(monkeypatch):
    """Every lock that a room of ours makes from now on is one of those."""
    for module in pkgutil.iter_modules(otel_pools.__path__):
        if module.name.startswith("_") and module.name != "__main__":
            room = importlib.import_module(f"otel_pools.{module.name}")
            for name, value in list(vars(room).items()):
                if value in (Lock, RLock):
                    monkeypatch.setattr(room, name, Watched)


@pytest.mark.parametrize(("target", "make"), CASES)
def test_no_call_into_the_sdk_and_no_lock(target, make, play, forbidden, telemetry):
    """Every cycle goes through while recording and locking raise, and each is in the next collection."""
    forbid, allow = forbidden
    instrument(target, meter_provider=telemetry.meter_provider, tracer_provider=telemetry.tracer_provider)
    cycle = make()

    forbid()
    play(cycle, CYCLES)
    refused = allow()
    now = telemetry.read()

    assert refused == []
    assert now.value("otel_pools.checkouts") == CYCLES
    assert now.value(WAITS.get(target, "db.client.connection.wait_time")) == CYCLES


@pytest.mark.parametrize(("target", "make"), CASES)
def test_no_function_of_opentelemetry_runs(target, make, play, telemetry):
    """Once the pool is known, functions of ours run on the way of a request, and none of OpenTelemetry's."""
    # A wait of 10 ms has a span, and on a busy machine under a profiler there may be one.
    slow = {"span_threshold": 60.0}
    instrument(target, meter_provider=telemetry.meter_provider, tracer_provider=telemetry.tracer_provider, **slow)
    cycle, seen = make(), Counter()
    play(cycle, 2)

    def look(frame, event, _):
        if event == "call":
            seen[str(frame.f_globals.get("__name__")).partition(".")[0]] += 1

    sys.setprofile(look)
    try:
        play(cycle, CYCLES)
    finally:
        sys.setprofile(None)

    assert seen["otel_pools"] >= CYCLES
    assert seen["opentelemetry"] == 0


def test_the_fixture_would_tell(forbidden, telemetry):
    """A call into the SDK does raise where it is forbidden, or the tests above would say nothing."""
    forbid, allow = forbidden
    histogram = telemetry.meter_provider.get_meter("m").create_histogram("h")

    forbid()
    with pytest.raises(AssertionError, match=r"Histogram\.record"):
        histogram.record(1.0)

    assert allow() == ["Histogram.record"]
