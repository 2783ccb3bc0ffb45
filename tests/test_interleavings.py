"""Random steps on a pool of each library: at each look we tell what a plain model and the server say."""

from __future__ import annotations

import asyncio
import gc
import importlib
import logging
import os
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata

import pytest
from doubles import AsyncDbapi, CallServer, Dbapi, Server, async_line, async_network, line, network
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.resources import Resource

import otel_pools
from otel_pools import _registry
from otel_pools.testing import Telemetry

# A slice in CI; with OTEL_POOLS_STEPS=100000 and random seeds what docs/measurements.md tells of.
STEPS = int(os.environ.get("OTEL_POOLS_STEPS", "1500"))
LONG = 100  # steps of one walk
WALK = settings(
    deadline=None,
    database=None,
    derandomize="OTEL_POOLS_STEPS" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
SIZE, MORE = 2, 1  # of a pool: what it keeps, and what it may have beyond


def step(method):
    """One thing that may be done at any time; it gets a number, in case there is something to choose."""
    method.weight = 10
    return method


def rare_step(method):
    """One that takes long, or ends what the others have begun: a fifth as often."""
    method.weight = 2
    return method


def rarest_step(method):
    """One after which another watches: half as often as that."""
    method.weight = 1
    return method


class Walk:
    """A pool, what its model says should be told of it, and the steps that all libraries have."""

    target = ""
    needs = "sqlalchemy"
    slowness = 1  # of its steps so many times fewer are taken
    holders = True  # whether it is noted who holds a connection

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
        gc.collect()  # or what is left of a replaced pool goes when we have begun to count, and have not yet found it
        self.telemetry = Telemetry()
        self.served = self.ended = self.refused = self.failed = self.cancelled = self.collected = 0
        self.opened, self.closed = self.server.opened, self.server.closed
        otel_pools.instrument(self.target, meter_provider=self.telemetry.meter_provider, holders=self.holders)

    def finish(self):
        """Look once more, and leave nothing behind."""
        self.look()
        otel_pools.uninstrument()
        for held in self.held:
            self.give_back(held)
        self.held.clear()
        self.end()

    def take(self):
        """Borrow one, if there is one."""
        self.learn(self.ask)

    def learn(self, asked):
        """Note what came of asking."""
        try:
            self.held.append(asked())
        except asyncio.CancelledError:
            self.cancelled += 1
        except Served:
            self.served += 1
        except Exception as error:
            if _is_of_server(error):
                self.failed += 1
            elif type(error).__name__ in self.exhausted:
                self.refused += 1
            else:
                raise
        else:
            self.served += 1

    def left(self, held):
        """Note that what was borrowed is not any more."""
        self.held = [one for one in self.held if one is not held]
        if any(one is held for one in self.unseen):
            self.unseen = [one for one in self.unseen if one is not held]
        else:
            self.ended += 1

    # -- what each library does in its own way -----------------------------------------

    exhausted = ()  # what its errors are called that say so

    def make(self):
        """Make the pool."""

    def ask(self):
        """Borrow."""

    def give_back(self, held):
        """The opposite."""

    def open(self):
        """Of the pool's connections, how many are."""
        return len(self.server.open)

    def pending(self):
        """How many stand in line."""
        return 0

    def end(self):
        """Close the pool."""

    def leave(self):
        """Leave nothing behind, whatever has happened."""

    # -- steps -------------------------------------------------------------------------

    @classmethod
    def names(cls):
        """Of all steps, each as often as it is to be chosen."""
        return [name for name in dir(cls) for _ in range(getattr(getattr(cls, name), "weight", 0))]

    def choose(self, number):
        """One of those that we hold; None if there is none."""
        return self.held[number % len(self.held)] if self.held else None

    @step
    def borrow(self, number=0):
        self.take()

    @step
    def borrow_and_fail_to_open(self, number=0):
        self.server.refusal = ConnectionRefusedError()
        self.take()
        self.server.refusal = None

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
        wrong = {key: (told[key], truth[key]) for key in told if told[key] != truth[key]}
        assert not wrong, wrong

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
        if not self.holders:  # who dropped what need not be told then
            told["collected"] = self.collected
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
            "pending": self.pending(),
            "orphaned": 0,
            "collected": self.collected,
        }

    @rarest_step
    def stop_and_watch_again(self, number=0):
        otel_pools.uninstrument()
        self.unseen = list(self.held)
        self.holders = number % 2 == 0
        self.begin()

    @rarest_step
    def borrow_unwatched(self, number=0):
        otel_pools.uninstrument()
        self.take()
        self.unseen = list(self.held)
        self.begin()

    @rarest_step
    def be_a_forked_child(self, number=0):
        """As if: what happens in a child after a fork, without the fork; whatever is out counts as the parent's."""
        _registry._after_fork()
        # The SDK's own counters go on here: in a real child they do as well.
        self.stop_and_watch_again()


def _is_of_server(error):
    """Whether it is the server that refused, and not the pool."""
    while error is not None and not isinstance(error, ConnectionRefusedError):
        error = error.__cause__ or error.__context__
    return error is not None


class Served(Exception):
    """Cancelled, but not while it waited for a connection."""


class AsyncWalk(Walk):
    """The same in asyncio: who asks is a task, which may stand in line, and be cancelled after any turn of the loop."""

    ENOUGH = 30  # turns after which everybody has a connection, none, or to wait for somebody else

    def __init__(self):
        self.loop = asyncio.new_event_loop()
        self.asking = {}  # who asks -> whether they began when we watched
        super().__init__()

    def begin(self):
        super().begin()
        self.asking = dict.fromkeys(self.asking, False)

    def finish(self):
        self.look()
        self.nobody_asks()
        super().finish()

    def end(self):
        self.run(self.shut())

    async def shut(self):
        """Close the pool."""

    def leave(self):
        self.loop.close()

    async def ask(self, patient=True):
        """Borrow, and stand in line for it if *patient*."""

    async def return_(self, held):
        """Give back."""

    def run(self, coroutine):
        return self.loop.run_until_complete(coroutine)

    def turn(self, number):
        """Let the loop turn so often, and see who has got what."""
        self.run(self._turn(number))
        for task in [one for one in self.asking if one.done()]:
            learn = self.learn if self.asking.pop(task) else self.learn_uncounted
            learn(task.result)

    async def _turn(self, number):
        for _ in range(number):
            await asyncio.sleep(0)

    def learn_uncounted(self, asked):
        """They began to ask when nobody watched."""
        counts, held = (self.served, self.refused, self.failed, self.cancelled), len(self.held)
        self.learn(asked)
        self.served, self.refused, self.failed, self.cancelled = counts
        self.unseen += self.held[held:]

    def nobody_asks(self):
        """All are cancelled."""
        for task in self.asking:
            task.cancel()
        self.turn(self.ENOUGH)

    def take(self, patient=True, turns=ENOUGH):
        self.asking[self.loop.create_task(self.ask(patient))] = True
        self.turn(turns)

    def give_back(self, held):
        self.run(self.return_(held))

    @step
    def borrow_at_once_or_not_at_all(self, number=0):
        self.take(patient=False)

    @step
    def begin_to_borrow(self, number=0):
        self.take(turns=1 + number % 5)  # before its first turn it has not even asked

    @step
    def wait_a_little(self, number=0):
        self.turn(1 + number % 3)

    @step
    def give_up(self, number=0):
        """Cancel somebody who asks."""
        if self.asking:
            list(self.asking)[number % len(self.asking)].cancel()
            self.turn(1 + number % 3)

    @step
    def give_one_back_and_be_cancelled(self, number=0):
        if (held := self.choose(number)) is None:
            return
        self.left(held)
        task = self.loop.create_task(self.return_(held))
        self.turn(1 + number % 4)
        task.cancel()
        self.turn(self.ENOUGH)
        assert task.done()
        task.cancelled() or task.result()

    @rare_step
    def look(self, number=0):
        gc.collect()  # which may give somebody what another one has dropped
        self.turn(self.ENOUGH)
        super().look()

    @rarest_step
    def stop_and_watch_again(self, number=0):
        self.turn(self.ENOUGH)  # who is connecting now is nobody's
        super().stop_and_watch_again()

    @rarest_step
    def borrow_unwatched(self, number=0):
        self.turn(self.ENOUGH)
        super().borrow_unwatched()

    @rarest_step
    def be_a_forked_child(self, number=0):
        self.turn(self.ENOUGH)
        super().be_a_forked_child()

    def pending(self):
        return len(self.asking)


# -- SQLAlchemy --------------------------------------------------------------------------


class SQLAlchemy(Walk):
    target = "sqlalchemy"
    exhausted = ("TimeoutError",)
    url, kind, dbapi, patience = "sqlite://", "QueuePool", Dbapi, 0

    def make(self):
        from sqlalchemy import create_engine, pool

        self.loose = []  # detached: open, and not the pool's
        options = {"pool_size": SIZE, "max_overflow": MORE, "pool_timeout": self.patience}
        options |= {"poolclass": getattr(pool, self.kind), "_initialize": False}
        self.engine = create_engine(self.url, creator=lambda: self.dbapi(self.server), **options)

    def do(self, what, *args, **kwargs):
        """Do it here and now."""
        return what(*args, **kwargs)

    def open(self):
        return len(self.server.open) - len(self.loose)

    def ask(self):
        return self.engine.raw_connection()

    def give_back(self, held):
        self.do(held.close)

    @step
    def drop(self, number=0):
        """Forget it: the garbage collector gives it back."""
        if (held := self.choose(number)) is None:
            return
        self.collected += not any(one is held for one in self.unseen)
        self.left(held)
        del held
        gc.collect()

    @step
    def invalidate(self, number=0):
        if (held := self.choose(number)) is None:
            return
        soft = number >= 5
        self.do(held.invalidate, soft=soft)
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
            self.do(self.loose.pop().close)

    @rare_step
    def dispose(self, number=0):
        self.do(self.engine.dispose)

    @rare_step
    def rename(self, number=0):
        otel_pools.name_pool(self.engine, ("orders", "reports")[len(self.held) % 2])

    def end(self):
        while self.loose:
            self.close_detached()
        self.dispose()
        super().end()


class AsyncSQLAlchemy(AsyncWalk, SQLAlchemy):
    url, kind, dbapi, patience = "sqlite+aiosqlite://", "AsyncAdaptedQueuePool", AsyncDbapi, None

    def do(self, what, *args, **kwargs):
        """In a greenlet, as SQLAlchemy's own asyncio classes do."""
        from sqlalchemy.util import greenlet_spawn

        return self.run(greenlet_spawn(what, *args, **kwargs))

    async def ask(self, patient=True):
        from sqlalchemy.util import greenlet_spawn

        self.engine.pool._timeout = None if patient else 0  # of this one: it is read when one asks
        return await greenlet_spawn(self.engine.raw_connection)

    async def return_(self, held):
        from sqlalchemy.util import greenlet_spawn

        await greenlet_spawn(held.close)

    def end(self):
        SQLAlchemy.end(self)


# -- redis -------------------------------------------------------------------------------


class Redis(Walk):
    target = needs = "redis"
    exhausted = ("ConnectionError", "MaxConnectionsError")
    kind, more = "redis:ConnectionPool", {}
    stub = staticmethod(line)

    def make(self):
        module, _, name = self.kind.partition(":")
        kind = getattr(importlib.import_module(module), name)
        self.pool = kind(connection_class=self.stub(self.server), max_connections=SIZE + MORE, **self.more)

    def ask(self):
        return self.pool.get_connection()

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
    kind, more = "redis:BlockingConnectionPool", {"timeout": 0}

    disconnect_idle = None  # it knows no such thing before 5.3


class AsyncRedis(AsyncWalk, Redis):
    kind = "redis.asyncio:ConnectionPool"
    stub = staticmethod(async_line)

    def pending(self):
        # Who gives back stands in the same line, so that only those are told whom we have seen asking.
        return sum(self.asking.values())

    async def ask(self, patient=True):
        self.pool.timeout = None if patient else 0
        return await self.pool.get_connection()

    async def return_(self, held):
        await self.pool.release(held)

    @step
    def disconnect_all(self, number=0):
        self.run(self.pool.disconnect())

    @step
    def disconnect_idle(self, number=0):
        self.run(self.pool.disconnect(inuse_connections=False))

    @step
    def reconnect(self, number=0):
        if (held := self.choose(number)) is None:
            return
        self.run(held.disconnect())
        self.run(held.connect())

    async def shut(self):
        await self.pool.disconnect()

    end = AsyncWalk.end


class BlockingAsyncRedis(AsyncRedis):
    kind = "redis.asyncio:BlockingConnectionPool"


# -- httpx -------------------------------------------------------------------------------


class HTTP(Walk):
    target = "httpx"
    exhausted = ("PoolTimeout",)
    needs = "httpcore"
    kind = "ConnectionPool"
    network = staticmethod(network)

    def make(self):
        self.core = importlib.import_module(self.needs)
        limits = {"max_connections": SIZE + MORE, "max_keepalive_connections": SIZE}
        _, network = self.network(self.core)
        self.pool = getattr(self.core, self.kind)(network_backend=network(self.server), **limits)

    def request(self, patience):
        asked = self.core.Request("GET", "http://example.org/", headers=[("Host", "example.org")])
        asked.extensions["timeout"] = {"pool": patience}
        return asked

    def ask(self):
        return self.pool.handle_request(self.request(0.0001))

    def give_back(self, held):
        held.read()
        held.close()

    @step
    def close_unread(self, number=0):
        """Its connection is of no use any more; of one that began unwatched that is told when it is collected."""
        held = self.choose(number)
        if held is not None and not any(held is one for one in self.unseen):
            self.left(held)
            self.close(held)

    def close(self, held):
        held.close()

    def told(self, now):
        told = super().told(now)
        opened = now.points("http.client.open_connections")
        active = sum(point.value for point in opened if point.attributes["http.connection.state"] == "active")
        told |= {"used": active, "open": sum(point.value for point in opened)}
        told["waits"] = now.value("http.client.request.time_in_queue")
        told["pending"] = now.value("otel_pools.connection.pending_requests")
        del told["uses"]  # an HTTP pool has no such histogram
        if "http.client.open_connections" not in now.metrics:
            told |= {"used": len(self.held), "open": self.open()}
        return told

    def end(self):
        self.pool.close()


class HTTPCore2(HTTP):
    needs = "httpcore2"


class AsyncHTTP(AsyncWalk, HTTP):
    kind = "AsyncConnectionPool"
    network = staticmethod(async_network)

    def make(self):
        self.lost = set()  # open, and httpcore will never use them
        super().make()

    def open(self):
        return len(self.server.open - self.lost)

    def begin(self):
        super().begin()
        self.doubtful = 0  # of those cancelled, who may have had a connection, one that had been idle

    async def ask(self, patient=True):
        request = self.request(None if patient else 0)
        met = {}

        async def trace(name, info):
            met[name] = info

        request.extensions["trace"] = trace
        try:
            return await self.pool.handle_async_request(request)
        except asyncio.CancelledError:
            connected = met.get("connection.connect_tcp.complete")
            if connected and id(connected["return_value"]) in self.server.open:
                self.lost.add(id(connected["return_value"]))
            if connected or "http11.send_request_headers.started" in met:
                # It had what it was waiting for, though its request came to nothing.
                raise Served from None
            self.doubtful += not met
            raise

    async def return_(self, held):
        await held.aread()
        await held.aclose()

    def close(self, held):
        self.run(held.aclose())

    @rare_step
    def look(self, number=0):
        self.turn(self.ENOUGH)
        self.telemetry.read()  # what is orphaned must be so twice
        super().look()

    def told(self, now):
        told = super().told(now)
        # A place that httpcore has lost is taken by nobody.
        told["used"] -= told["orphaned"]
        told["open"] -= told.pop("orphaned")
        if 0 <= (had := told["served"] - self.served) <= self.doubtful:
            told["served"] -= had
            told["cancelled"] += had
        return told

    def finish(self):
        self.nobody_asks()
        self.look()
        lost = self.telemetry.value("otel_pools.connection.orphaned")
        for _ in range(SIZE + MORE):
            self.take(patient=False)
        assert len(self.held) == SIZE + MORE - lost  # nobody gets what is lost
        super().finish()

    async def shut(self):
        await self.pool.aclose()

    end = AsyncWalk.end


class AsyncHTTPCore2(AsyncHTTP):
    needs = "httpcore2"


# -- qdrant ------------------------------------------------------------------------------


@dataclass
class Call:
    """A call over gRPC; *free* if it ends by itself as soon as there is a stream for it."""

    client: object
    name: str
    future: object
    free: bool = False


class Qdrant(Walk):
    """Calls over gRPC to a real server, in which nothing is behind; what is borrowed is a stream."""

    target = "qdrant"
    needs = "qdrant_client"
    slowness = 10
    EAGER = {f"grpc.{name}_reconnect_backoff_ms": 50 for name in ("initial", "min", "max")}
    PATIENCE = 10  # seconds for what must happen
    MOST = 8  # calls under way

    def make(self):
        self.grpc = CallServer(SIZE)
        self.clients = []
        self.begun = 0
        self.make_client()

    def finish(self):
        self.look()
        self.let_all_go()
        super().finish()

    def leave(self):
        while self.clients:
            self.clients.pop().close()
        self.grpc.stop()

    # -- calls -------------------------------------------------------------------------

    def client(self, number):
        return self.clients[number % len(self.clients)]

    def start(self, client, free=False, *said, **more):
        """Begin a call, past the client's own interceptor, which would wait for its end."""
        client.grpc_collections  # noqa: B018  # makes the channels
        channels = client._client._grpc_channel_pool
        self.begun += 1
        name = str(self.begun)
        inner = channels[self.begun % len(channels)]._channel.unary_unary("/qdrant.Collections/List")
        self.held.append(Call(client, name, inner.future(b"", metadata=(("name", name), *said), **more), free))
        return self.held[-1]

    def answers(self, client):
        """Whether it is connected and there is a stream for it."""
        try:
            client.get_collections()
        except Exception:
            self.failed += 1
            return False
        self.served += 1
        return True

    def let_go(self, call):
        call.free = True
        self.grpc.let_go(call.name)

    def let_all_go(self):
        """Until nothing is under way."""
        for call in self.held:
            self.let_go(call)
        self.comes(lambda: not self.held)

    def reap(self):
        """Note how the calls ended that have."""
        for call in [call for call in self.held if call.future.done()]:
            self.held.remove(call)
            if call.future.code().name == "OK":
                self.served += 1
            else:
                self.failed += 1

    def comes(self, true):
        """Wait for it."""
        end = time.monotonic() + self.PATIENCE
        while self.reap() or not true():
            assert time.monotonic() < end
            time.sleep(0.001)

    def calm(self):
        """Of what is under way nothing ends by itself, so that it is clear how it ends."""
        self.look()
        if any(call.free for call in self.held):
            self.let_all_go()

    # -- steps -------------------------------------------------------------------------

    borrow = borrow_and_fail_to_open = borrow_unwatched = give_one_back = be_a_forked_child = None

    @step
    def call(self, number=0):
        self.let_go(self.start(self.client(number)))

    @step
    def call_and_be_refused(self, number=0):
        self.start(self.client(number), True, ("refuse", ""))

    @step
    def call_too_long(self, number=0):
        """The deadline passes."""
        self.start(self.client(number), timeout=0.005).future.code()

    @step
    def begin_to_call(self, number=0):
        self.reap()
        if len(self.held) < self.MOST:
            self.start(self.client(number))

    @step
    def begin_to_call_several_times(self, number=0):
        for _ in range(3):
            self.begin_to_call(number)

    @step
    def let_one_go(self, number=0):
        """Perhaps before the server has begun it."""
        if self.held:
            self.let_go(self.choose(number))

    @step
    def cancel_one(self, number=0):
        """Unless it may be ending: then its caller and gRPC may differ on how."""
        if self.held and not (call := self.choose(number)).free:
            call.future.cancel()

    @rare_step
    def make_client(self, number=0):
        from qdrant_client import QdrantClient

        if len(self.clients) > SIZE:
            return
        options = self.EAGER | ({"grpc.use_local_subchannel_pool": 1} if number % 2 else {})
        at = {"host": self.grpc.HOST, "grpc_port": self.grpc.port, "prefer_grpc": True, "verify": False}
        self.clients.append(QdrantClient(**at, grpc_options=options, check_compatibility=False))

    @rare_step
    def close_client(self, number=0):
        """Whatever it has under way is cut off."""
        self.calm()
        client = self.clients.pop(number % len(self.clients))
        client.close()
        self.comes(lambda: not any(call.client is client for call in self.held))
        self.clients or self.make_client(number)

    @rare_step
    def drop_client(self, number=0):
        """If it has nothing under way."""
        self.calm()
        client = self.client(number)
        if not any(call.client is client for call in self.held):
            self.clients.remove(client)
        del client
        gc.collect()
        self.clients or self.make_client(number)

    @rarest_step
    def outage(self, number=0):
        self.grpc.stop()
        self.comes(lambda: not self.held)
        self.answers(self.client(number))
        self.look()
        self.grpc.start()
        for client in self.clients:
            while not self.answers(client):
                time.sleep(0.001)

    @rarest_step
    def stop_and_watch_again(self, number=0):
        self.calm()
        super().stop_and_watch_again()
        self.unseen.clear()  # whoever began a call, its end is counted

    @rarest_step
    def call_unwatched(self, number=0):
        self.let_all_go()
        self.look()
        otel_pools.uninstrument()
        self.answers(self.client(number))
        self.begin()

    @rare_step
    def look(self, number=0):
        """What gRPC has written down comes to be the truth; it may take a moment to write it."""
        end = time.monotonic() + self.PATIENCE
        while True:
            gc.collect()
            self.reap()
            now = self.telemetry.read()
            told, truth = self.told(now), self.truth()
            wrong = {key: (told[key], truth[key]) for key in told if told[key] != truth[key]}
            # The system's list is long, and asked last.
            wrong = wrong or {"open": self.grpc.connections() - now.count("used") - now.count("idle")}
            if not any(wrong.values()):
                return
            assert time.monotonic() < end, wrong
            time.sleep(0.003)

    def told(self, now):
        states = now.points("otel_pools.grpc.channels")
        return {
            "served": self._errors(now, None),
            "failed": sum(now.checkouts().values()) - self._errors(now, None),
            "used": now.count("used"),
            "streams": now.value("otel_pools.stream.count", otel_pools__stream__state="used"),
            "waiting": now.value("otel_pools.stream.count", otel_pools__stream__state="pending"),
            "pending": now.value("db.client.connection.pending_requests"),
            "states": {one.attributes["otel_pools.grpc.state"]: one.value for one in states if one.value},
        }

    def truth(self):
        running = list(self.grpc.running.values())
        waiting = len(self.held) - sum(running)
        return {
            "served": self.served,
            "failed": self.failed,
            "used": sum(map(bool, running)),
            "streams": sum(running),
            "waiting": waiting,
            "pending": waiting,
            "states": Counter(map(_state, self.channels())),
        }

    def channels(self):
        """Of all clients."""
        return [channel for client in self.clients for channel in client._client._grpc_channel_pool]


def _state(channel):
    """What the channel says itself, inside of what is around it."""
    while not hasattr(channel, "check_connectivity_state"):
        channel = channel._channel
    return ("idle", "connecting", "ready", "transient_failure", "shutdown")[channel.check_connectivity_state(False)]


WALKS = [
    SQLAlchemy,
    AsyncSQLAlchemy,
    Redis,
    BlockingRedis,
    AsyncRedis,
    BlockingAsyncRedis,
    HTTP,
    HTTPCore2,
    AsyncHTTP,
    AsyncHTTPCore2,
    Qdrant,
]


@pytest.mark.parametrize("walk", WALKS, ids=lambda walk: walk.__name__)
@pytest.mark.timeout(0 if "OTEL_POOLS_STEPS" in os.environ else 120)
def test_whatever_is_done_the_numbers_are_right(walk, monkeypatch):
    """Of every sequence of steps that was tried."""
    pytest.importorskip(walk.needs)
    # What this process is, and what is installed in it, is looked up in files each time.
    monkeypatch.setattr(Resource, "create", lambda *_: Resource({}))
    monkeypatch.setattr(metadata, "version", lru_cache(metadata.version))

    @settings(WALK, max_examples=max(1, STEPS // LONG // walk.slowness))
    @given(st.lists(st.tuples(st.sampled_from(walk.names()), st.integers(0, 9)), min_size=LONG, max_size=LONG))
    def go(steps):
        on = walk()
        try:
            for name, number in steps:
                getattr(on, name)(number)
            on.finish()
        finally:
            otel_pools.uninstrument()
            on.leave()

    logging.disable()  # there is much of what is dropped and refused
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            warnings.filterwarnings("ignore", "The garbage collector is trying to clean up")
            go()
    finally:
        logging.disable(logging.NOTSET)


# -- what these walks found, and step round since ------------------------------------------


def test_a_qdrant_client_that_is_closed_again_cuts_off_nobody():
    """What another client of that server has under way goes on, and is not told as failed."""
    pytest.importorskip("qdrant_client")
    walk = Qdrant()
    try:
        walk.begin_to_call()
        walk.make_client()
        walk.look()
        for _ in range(2):
            walk.clients[1].close()

        assert walk.told(walk.telemetry.read())["failed"] == 0
    finally:
        otel_pools.uninstrument()
        walk.let_all_go()
        walk.leave()


def test_an_http_connection_opened_for_who_waited_before_we_came_is_counted():
    """Who stood in line then, and opens one now, has opened one."""
    pytest.importorskip("httpcore")
    walk = AsyncHTTP()
    try:
        for _ in range(SIZE + MORE + 1):
            walk.borrow()
        otel_pools.uninstrument()
        walk.begin()
        opened = walk.server.opened
        walk.give_one_back()
        walk.turn(walk.ENOUGH)

        assert walk.server.opened == opened + 1
        assert walk.telemetry.value("otel_pools.connection.created") == 1
    finally:
        otel_pools.uninstrument()
        walk.nobody_asks()
        walk.end()
        walk.leave()
