"""Random steps on a pool of each library: at each look we tell what a plain model and the server say."""

from __future__ import annotations

import asyncio
import gc
import os
import warnings
from functools import wraps

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import otel_pools
from otel_pools import _registry
from otel_pools.testing import Telemetry

# A slice in CI; OTEL_POOLS_STEPS=1000000 is what docs/measurements.md tells of.
STEPS = int(os.environ.get("OTEL_POOLS_STEPS", "3000"))
LONG = 100  # steps of one walk
WALK = settings(
    max_examples=max(1, STEPS // LONG),
    deadline=None,
    database=None,
    derandomize="OTEL_POOLS_STEPS" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
SIZE, MORE = 2, 1  # of a pool: what it keeps, and what it may have beyond


class Server:
    """Whose connections are open; it refuses the next one if told so."""

    def __init__(self):
        self.open = set()
        self.opened = self.closed = self.refusals = 0
        self.refuses = False

    def connect(self, connection):
        if self.refuses:
            self.refuses = False
            self.refusals += 1
            raise ConnectionRefusedError
        self.open.add(id(connection))
        self.opened += 1

    def disconnect(self, connection):
        if id(connection) in self.open:
            self.open.discard(id(connection))
            self.closed += 1


def step(method):
    """One thing that may be done at any time; it gets a number, in case there is something to choose."""
    method.is_step = True
    return method


def rare_step(method):
    """One that takes long, or ends what the others have begun: one time in five."""

    @wraps(method)
    def sometimes(walk, number=0):
        if number < 2:
            method(walk)

    return step(sometimes)


class Walk:
    """A pool, what its model says should be told of it, and the steps that all libraries have."""

    target = ""

    def __init__(self):
        gc.collect()
        gc.freeze()  # pools of earlier walks are not looked for
        self.server = Server()
        self.held = []  # what we have borrowed
        self.unseen = []  # of that, what was borrowed when nobody watched
        self.begin()
        self.make()

    def begin(self):
        """Watch from here on: nothing has been counted."""
        self.telemetry = Telemetry()
        self.served = self.ended = self.refused = self.failed = self.cancelled = self.collected = 0
        self.opened, self.closed = self.server.opened, self.server.closed
        otel_pools.instrument(self.target, meter_provider=self.telemetry.meter_provider)

    def finish(self):
        """Look once more, and leave nothing behind."""
        self.look()
        otel_pools.uninstrument()
        for held in self.held:
            self.give_back(held)
        self.held.clear()
        self.end()

    def end(self):
        """Leave nothing behind."""

    def left(self, held):
        """Note that what was borrowed is not any more."""
        self.held = [one for one in self.held if one is not held]
        if any(one is held for one in self.unseen):
            self.unseen = [one for one in self.unseen if one is not held]
        else:
            self.ended += 1

    def got_none(self, refusals):
        """The server refused, if it has done so more often than that; otherwise the pool did."""
        if self.server.refusals > refusals:
            self.failed += 1
        else:
            self.refused += 1

    # -- steps -------------------------------------------------------------------------

    @classmethod
    def names(cls):
        """Of all steps."""
        return [name for name in dir(cls) if getattr(getattr(cls, name), "is_step", False)]

    def choose(self, number):
        """One of those that we hold; None if there is none."""
        return self.held[number % len(self.held)] if self.held else None

    @step
    def borrow(self, number=0):
        self.take()

    @step
    def borrow_and_fail_to_open(self, number=0):
        self.server.refuses = True
        self.take()
        self.server.refuses = False

    @step
    def give_one_back(self, number=0):
        if (held := self.choose(number)) is None:
            return
        self.left(held)
        self.give_back(held)

    @rare_step
    def look(self, number=0):
        """What everything comes down to."""
        gc.collect()  # or what is left of a replaced pool goes while we look
        now = self.telemetry.read()
        told = self.told(now)
        truth = self.truth()
        assert {key: (told[key], truth[key]) for key in told if told[key] != truth[key]} == {}

    def told(self, now):
        """What this export says."""
        told = {
            "used": now.count("used"),
            "open": now.count("used") + now.count("idle"),
            "served": sum(number for (_, error), number in now.checkouts().items() if error is None),
            "refused": self._errors(now, "timeout", "exhausted"),
            "failed": self._errors(now, "connect_error"),
            "cancelled": self._errors(now, "cancelled"),
            "waits": now.value("db.client.connection.wait_time"),
            "uses": now.value("db.client.connection.use_time"),
            "created": now.value("otel_pools.connection.created"),
            "closed": now.value("otel_pools.connection.closed"),
            "pending": now.value("db.client.connection.pending_requests"),
            "orphaned": now.value("otel_pools.connection.orphaned"),
            "collected": now.value("otel_pools.connection.leaked", otel_pools__leak__kind="collected"),
        }
        if "db.client.connection.count" not in now.metrics:  # nobody has used the pool since we watch
            told |= {"used": len(self.held), "open": self.open()}
        return told

    def _errors(self, now, *kinds):
        return sum(number for (_, error), number in now.checkouts().items() if error in kinds)

    def truth(self):
        """What should be told."""
        return {
            "used": len(self.held),
            "open": self.open(),
            "served": self.served,
            "refused": self.refused,
            "failed": self.failed,
            "cancelled": self.cancelled,
            "waits": self.served + self.refused + self.failed + self.cancelled,
            "uses": self.ended,
            "created": self.server.opened - self.opened,
            "closed": self.server.closed - self.closed,
            "pending": 0,
            "orphaned": 0,
            "collected": self.collected,
        }

    def open(self):
        """Of the pool's connections, how many are."""
        return len(self.server.open)

    @rare_step
    def stop_and_watch_again(self, number=0):
        otel_pools.uninstrument()
        self.unseen = list(self.held)
        self.begin()

    @rare_step
    def borrow_unwatched(self, number=0):
        otel_pools.uninstrument()
        self.take()
        self.unseen = list(self.held)
        self.begin()

    @rare_step
    def be_a_forked_child(self, number=0):
        """As if: what happens in a child after a fork, without the fork; whatever is out counts as the parent's."""
        _registry._after_fork()
        self.unseen = list(self.held)
        self.telemetry_of_child()

    def telemetry_of_child(self):
        # The SDK's own counters go on here: in a real child they do as well.
        otel_pools.uninstrument()
        self.begin()


# -- SQLAlchemy --------------------------------------------------------------------------


class Dbapi:
    """A connection of a driver, to that server."""

    def __init__(self, server):
        self.server = server
        server.connect(self)

    def rollback(self): ...
    def close(self):
        self.server.disconnect(self)

    def __del__(self):
        # The system closes what nobody did: of a pool that was replaced, and of which nothing is left.
        self.server.open.discard(id(self))


class SQLAlchemy(Walk):
    target = "sqlalchemy"

    def make(self):
        from sqlalchemy import create_engine
        from sqlalchemy.pool import QueuePool

        self.loose = []  # detached: open, and not the pool's
        options = {"pool_size": SIZE, "max_overflow": MORE, "pool_timeout": 0, "poolclass": QueuePool}
        self.engine = create_engine("sqlite://", creator=lambda: Dbapi(self.server), _initialize=False, **options)

    def open(self):
        return len(self.server.open) - len(self.loose)

    def take(self):
        from sqlalchemy.exc import TimeoutError as PoolTimeout

        try:
            self.held.append(self.engine.raw_connection())
            self.served += 1
        except PoolTimeout:
            self.refused += 1
        except ConnectionRefusedError:
            self.failed += 1

    def give_back(self, held):
        held.close()

    @step
    def drop(self, number=0):
        """Forget it: the garbage collector gives it back."""
        if (held := self.choose(number)) is None:
            return
        self.collected += not any(one is held for one in self.unseen)
        self.left(held)
        del held
        gc.collect(0)

    @step
    def invalidate(self, number=0):
        if (held := self.choose(number)) is None:
            return
        soft = number >= 5
        held.invalidate(soft=soft)
        if not soft:
            self.left(held)

    @step
    def detach(self, number=0):
        if (held := self.choose(number)) is None:
            return
        self.left(held)
        held.detach()
        self.loose.append(held)

    @step
    def close_detached(self, number=0):
        if self.loose:
            self.loose.pop().close()

    @rare_step
    def dispose(self, number=0):
        self.engine.dispose()

    @rare_step
    def rename(self, number=0):
        otel_pools.name_pool(self.engine, ("orders", "reports")[len(self.held) % 2])

    def end(self):
        while self.loose:
            self.loose.pop().close()
        self.engine.dispose()


# -- redis -------------------------------------------------------------------------------


def stub(server):
    """A class of connections to that server, opened and closed by redis-py's own methods."""
    from redis.connection import AbstractConnection

    class Stub(AbstractConnection):
        host, port = "stub", 0

        def __init__(self, **_):
            super().__init__(protocol=2)

        def repr_pieces(self):
            return []

        def _connect(self):
            server.connect(self)
            return Line(server, self)

        def on_connect(self): ...
        def on_connect_check_health(self, check_health=True): ...
        def can_read(self, timeout=0):
            return False

        def _host_error(self):
            return "stub"

    return Stub


class Line:
    """What stands for a socket, or for asyncio's streams."""

    def __init__(self, server, connection):
        self.server = server
        self.key = connection

    def shutdown(self, *_): ...
    def close(self):
        self.server.disconnect(self.key)

    async def wait_closed(self):
        await asyncio.sleep(0)


class Redis(Walk):
    target = "redis"
    blocking = False

    def make(self):
        redis = pytest.importorskip("redis")
        kind = redis.BlockingConnectionPool if self.blocking else redis.ConnectionPool
        more = {"timeout": 0} if self.blocking else {}
        self.pool = kind(connection_class=stub(self.server), max_connections=SIZE + MORE, **more)

    def take(self):
        import redis

        refusals = self.server.refusals
        try:
            self.held.append(self.pool.get_connection())
            self.served += 1
        except (redis.ConnectionError, ConnectionRefusedError):
            self.got_none(refusals)

    def give_back(self, held):
        self.pool.release(held)

    @step
    def disconnect_all(self, number=0):
        """Those that are out, too: they stay out, closed, and their users open them again."""
        self.pool.disconnect()

    @step
    def disconnect_idle(self, number=0):
        self.pool.disconnect(inuse_connections=False)

    @step
    def reconnect(self, number=0):
        """As a client does whose connection broke while it had it."""
        if (held := self.choose(number)) is None:
            return
        held.disconnect()
        held.connect()

    def open(self):
        # Who holds a closed one takes a place: it is used all the same.
        return len(self.server.open) + sum(id(held) not in self.server.open for held in self.held)

    def end(self):
        self.pool.disconnect()


class BlockingRedis(Redis):
    blocking = True

    disconnect_idle = None  # it knows no such thing before 5.3


# -- asyncio -----------------------------------------------------------------------------


def async_stub(server):
    """The same for asyncio: to open takes two turns of the event loop, to close one."""
    from redis.asyncio.connection import AbstractConnection

    class Stub(AbstractConnection):
        host, port = "stub", 0

        def __init__(self, **_):
            super().__init__(protocol=2)

        def repr_pieces(self):
            return []

        async def _connect(self):
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            server.connect(self)
            self._reader = self._writer = Line(server, self)

        async def on_connect(self): ...
        async def on_connect_check_health(self, check_health=True): ...
        async def can_read_destructive(self):
            return False

        can_read = can_read_destructive

        def _host_error(self):
            return "stub"

    return Stub


class AsyncRedis(Walk):
    target = "redis"
    blocking = False

    def make(self):
        pytest.importorskip("redis")
        import redis.asyncio as redis

        self.loop = asyncio.new_event_loop()
        kind = redis.BlockingConnectionPool if self.blocking else redis.ConnectionPool
        more = {"timeout": None} if self.blocking else {}
        self.pool = kind(connection_class=async_stub(self.server), max_connections=SIZE + MORE, **more)

    def take(self, patience=50):
        """Ask, and give up after so many turns of the event loop."""
        self.loop.run_until_complete(self._take(patience))

    async def _take(self, patience):
        import redis

        refusals = self.server.refusals
        task = asyncio.ensure_future(self.pool.get_connection())
        for _ in range(patience):
            await asyncio.sleep(0)
            if task.done():
                break
        task.cancel()
        try:
            self.held.append(await task)
            self.served += 1
        except asyncio.CancelledError:
            self.cancelled += 1
        except (redis.ConnectionError, ConnectionRefusedError):
            self.got_none(refusals)

    @step
    def borrow_and_give_up(self, number=0):
        self.take(1 + number % 5)  # before its first turn it has not even asked

    def give_back(self, held):
        self.loop.run_until_complete(self.pool.release(held))

    @step
    def disconnect_idle(self, number=0):
        self.loop.run_until_complete(self.pool.disconnect(inuse_connections=False))

    def open(self):
        return len(self.server.open) + sum(id(held) not in self.server.open for held in self.held)

    def end(self):
        self.loop.run_until_complete(self.pool.disconnect())
        self.loop.close()


class BlockingAsyncRedis(AsyncRedis):
    blocking = True


# -- httpx -------------------------------------------------------------------------------


def network(library, server):
    """A network whose every connection has an answer ready."""

    class Stream(library.NetworkStream):
        def read(self, *_, **__):
            return b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

        def write(self, *_, **__): ...
        def close(self):
            server.disconnect(self)

        def get_extra_info(self, _): ...

    class Backend(library.NetworkBackend):
        def connect_tcp(self, *_, **__):
            stream = Stream()
            server.connect(stream)
            return stream

    return Backend()


class HTTP(Walk):
    target = "httpx"
    library = "httpcore"

    def make(self):
        self.core = pytest.importorskip(self.library)
        limits = {"max_connections": SIZE + MORE, "max_keepalive_connections": SIZE}
        self.pool = self.core.ConnectionPool(network_backend=network(self.core, self.server), **limits)

    def take(self):
        refusals = self.server.refusals
        asked = self.core.Request("GET", "http://example.org/", headers=[("Host", "example.org")])
        asked.extensions["timeout"] = {"pool": 0.0001}
        try:
            self.held.append(self.pool.handle_request(asked))
            self.served += 1
        except (self.core.PoolTimeout, ConnectionRefusedError):
            self.got_none(refusals)

    def give_back(self, held):
        held.read()
        held.close()

    @step
    def close_unread(self, number=0):
        """Its connection is of no use any more; of one that began unwatched that is told when it is collected."""
        held = self.choose(number)
        if held is not None and not any(held is one for one in self.unseen):
            self.left(held)
            held.close()

    def told(self, now):
        told = super().told(now)
        opened = now.points("http.client.open_connections")
        active = sum(point.value for point in opened if point.attributes["http.connection.state"] == "active")
        told |= {"used": active, "open": sum(point.value for point in opened)}
        told["waits"] = now.value("http.client.request.time_in_queue")
        del told["uses"]  # an HTTP pool has no such histogram
        if "http.client.open_connections" not in now.metrics:
            told |= {"used": len(self.held), "open": self.open()}
        return told

    def end(self):
        self.pool.close()


class HTTPCore2(HTTP):
    library = "httpcore2"


WALKS = [SQLAlchemy, Redis, BlockingRedis, AsyncRedis, BlockingAsyncRedis, HTTP, HTTPCore2]


@pytest.mark.parametrize("walk", WALKS, ids=lambda walk: walk.__name__)
@pytest.mark.timeout(0 if "OTEL_POOLS_STEPS" in os.environ else 120)
def test_whatever_is_done_the_numbers_are_right(walk):
    """Of every sequence of steps that was tried."""

    @WALK
    @given(st.lists(st.tuples(st.sampled_from(walk.names()), st.integers(0, 9)), min_size=LONG, max_size=LONG))
    def go(steps):
        on = walk()
        try:
            for name, number in steps:
                getattr(on, name)(number)
            on.finish()
        finally:
            otel_pools.uninstrument()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        go()
