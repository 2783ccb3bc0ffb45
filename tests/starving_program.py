"""
A program in which nobody gets a file descriptor any more, while it asks pools of each kind for connections.

First as it is, then watched by us. Of each kind it prints, as JSON, what it met both times, how many checkouts we say
have failed, by error, and the lines that we have logged.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import resource
import sys
from types import SimpleNamespace
from urllib.parse import urlsplit

sys.path.insert(1, os.path.join(os.path.dirname(__file__), "targets"))  # noqa: PTH118, PTH120

import apps
import redis
import test_network as network

import otel_pools
from otel_pools import _guard
from otel_pools.testing import Telemetry


class HTTP1(network.HTTP1):
    """Its server is in another process, and its gate stands open."""

    def gate(self, _): ...


class AsyncHTTP1(HTTP1, network.AsyncHTTP1): ...


class Constructed:
    """To make a connection redis-py 8 reads its own version from a file; a pool that cannot may lose a place by it."""

    def word(self, error):
        return super().word(error) if isinstance(error, redis.ConnectionError) else type(error).__name__


class BlockingRedis(Constructed, network.BlockingRedis):
    def lost(self, used):
        return self.pool.max_connections - self.pool.pool.qsize() - used


class AsyncRedis(Constructed, network.AsyncRedis): ...


KINDS = [network.Psycopg, network.Asyncpg, BlockingRedis, AsyncRedis, HTTP1, AsyncHTTP1]


class Starved:
    """Nobody gets a file descriptor, until the end of the block."""

    def __enter__(self):
        self._limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._taken = []
        # Not above what is open: the limit is one of numbers.
        most = max(map(int, os.listdir("/proc/self/fd")))  # noqa: PTH208
        resource.setrlimit(resource.RLIMIT_NOFILE, (most + 1, self._limits[1]))
        while True:
            try:
                self._taken.append(os.dup(0))
            except OSError:
                break

    def __exit__(self, *_):
        for one in self._taken:
            os.close(one)
        resource.setrlimit(resource.RLIMIT_NOFILE, self._limits)


async def scenario(app, look):
    """One connection is in hand when there are no more; then two are asked for in vain; and again when there are."""
    app.told = lambda error: error  # to look at its lines takes a file
    app.open()
    try:
        await app.ask()
        hand = await app.tries_to_take()
        with Starved():
            taken = [await app.tries_to_take() for _ in range(2)]
            look(used=1)
            await app.tries_to_use(hand)
            look()
        for _ in range(2):
            await app.ask()
        look()
    finally:
        await app.shut()
    assert taken == [None, None]
    return [apps.told(one, None) if isinstance(one, Exception) else repr(one) for one in app.met]


class Lines(logging.Handler):
    """What we have logged."""

    def __init__(self):
        super().__init__()
        self.said = []

    def emit(self, record):
        self.said.append(record.getMessage())


def run(kind, servers, look):
    """What an application of this kind meets."""
    port = urlsplit(servers["sqlalchemy"]).port if kind.target == "sqlalchemy" else servers[kind.target]
    plain = servers["sqlalchemy"]
    server = SimpleNamespace(url=lambda driver: plain.replace("postgresql", f"postgresql+{driver}"))
    app = kind(SimpleNamespace(port=port), server, network.SECONDS)
    return asyncio.run(scenario(app, look(app)))


def watched(kind, servers):
    """The same while we watch, what we say has failed, and what we have logged."""
    telemetry, lines = Telemetry(), Lines()
    _guard.logger.addHandler(lines)
    otel_pools.instrument(
        kind.target, meter_provider=telemetry.meter_provider, tracer_provider=telemetry.tracer_provider
    )
    failed = {}

    def look(app):
        def look(used=0):
            telemetry.read()  # what is orphaned must be so twice
            now = telemetry.read()
            told = network.outcomes(now)
            created, closed = now.value("otel_pools.connection.created"), now.closed()
            assert app.count(now)[0] == used, app.count(now)
            assert created - sum(closed.values()) == sum(app.count(now))
            assert told == app.outcomes, (app, told, app.met)
            assert now.value("otel_pools.connection.orphaned") == app.lost(used)
            if not used:
                app.check(now)
            failed.update({error: number for error, number in told.items() if error is not None})

        return look

    try:
        return run(kind, servers, look), failed, lines.said
    finally:
        otel_pools.uninstrument()
        _guard.logger.removeHandler(lines)


def main():
    servers = json.loads(sys.argv[1])
    found = {}
    for kind in KINDS:
        bare = run(kind, servers, lambda _: lambda **_: None)
        gc.collect()
        found[kind.__name__] = bare, *watched(kind, servers)
    print(json.dumps(found))  # noqa: T201  # that is how it answers


if __name__ == "__main__":
    main()
