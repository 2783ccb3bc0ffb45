"""The metrics of Redis and Valkey pools equal the server's own count, whatever happens, in both libraries."""

from __future__ import annotations

import asyncio
import gc
import importlib
import inspect
import json
import os
import random
import threading
import traceback
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress

import pytest
import redises
import valkeys
from redises import Kind, Part, Stage, kinds
from valkeys import HOST, Cluster, Sentinels, Server, Tls

import otel_pools
from otel_pools import _doors, _instruments
from otel_pools.testing import Telemetry

pytestmark = [
    pytest.mark.skipif(not redises.LIBRARIES, reason="neither redis nor valkey is installed"),
    pytest.mark.skipif(not valkeys.available(), reason="the Valkey wheel is not installed"),
]

REFUSALS = ("Too many connections", "No connection available.")


@pytest.fixture(params=kinds())
def kind(request):
    """Every kind of pool in turn."""
    return Kind(request.param)


def only(*flavours, libraries=redises.LIBRARIES):
    """A test for these kinds alone."""
    return pytest.mark.parametrize("kind", kinds(*flavours, libraries=libraries), indirect=True)


sync_only = only("sync", "sync-blocking")
asyncio_only = only("asyncio", "asyncio-blocking")
blocking_only = only("sync-blocking", "asyncio-blocking")
each_library = pytest.mark.parametrize("library", redises.LIBRARIES)


@pytest.fixture(scope="module")
def server():
    with Server() as server:
        yield server


@pytest.fixture(scope="module")
def outage():
    """A server that may be stopped."""
    with Server() as server:
        yield server
        server.start()


@pytest.fixture(scope="module")
def locked():
    """A server that wants a password."""
    with Server(password="secret") as server:
        yield server


@pytest.fixture(scope="module")
def tls(server):
    pytest.importorskip("trustme")
    with Tls(server) as tls:
        yield tls


@pytest.fixture(scope="module")
def sentinels():
    with Sentinels() as sentinels:
        yield sentinels


@pytest.fixture(scope="module")
def cluster():
    with Cluster() as cluster:
        yield cluster


@pytest.fixture
def watched(telemetry):
    """All pools, with the collector's view of them."""
    otel_pools.instrument("redis", meter_provider=telemetry.meter_provider, tracer_provider=telemetry.tracer_provider)
    return telemetry


@pytest.fixture
def play(kind, server, watched):
    """Run a scenario on pools of this kind; close them afterwards, and see that nothing is left."""

    def play(scenario, server=server):
        async def whole():
            stage = Stage(kind, server, watched)
            try:
                await scenario(stage)
            finally:
                await stage.close()
            await stage.is_over()

        kind.run(whole())

    return play


@contextmanager
def leaking():
    """Both libraries warn when the garbage collector has to close a connection."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def lends_the_dead(kind):
    """
    Whether a pool does not see that the server has hung up.

    The asyncio pools up to 5.0.7 do not; nor do those of 8.1, with the
    maintenance notifications that are on by default.
    """
    return kind.is_async and (kind.is_redis((5, 0), (5, 0, 8)) or kind.is_redis((8, 1)))


# -- out and back ------------------------------------------------------------------


@pytest.mark.parametrize("way", ["constructor", "url", "unix", "unix-url", "tls", "tls-url", "password"])
def test_normal(play, kind, server, request, way):
    """However the server is reached: one new connection, then an idle one; two waits, two uses, one created."""

    async def scenario(stage):
        name = {"client_name": stage.name}
        if way == "constructor":
            pool = stage.open()
        elif way == "url":
            pool = stage.keep(kind.pool_class.from_url(f"redis://{HOST}:{server.port}/0", **name))
        elif way == "unix":
            unix = kind.package.UnixDomainSocketConnection
            pool = stage.keep(kind.pool_class(connection_class=unix, path=server.path, **name))
        elif way == "unix-url":
            pool = stage.keep(kind.pool_class.from_url(f"unix://{server.path}", **name))
        elif way == "tls":
            tls = request.getfixturevalue("tls")
            pool = stage.open(connection_class=kind.package.SSLConnection, port=tls.port, ssl_ca_certs=tls.ca)
        elif way == "tls-url":
            tls = request.getfixturevalue("tls")
            url = f"rediss://{HOST}:{tls.port}?ssl_ca_certs={tls.ca}"
            pool = stage.keep(kind.pool_class.from_url(url, **name))
        else:
            pool = stage.open(password="secret")
        client = kind.client(pool)
        for _ in range(2):
            assert await stage.do(client.get, "nothing") is None
        now = await stage.is_settled(idle=1)

        assert now.checkouts() == {("new", None): 1, ("idle", None): 1}
        assert now.value("otel_pools.connection.created") == 1
        assert now.closed() == {}
        assert now.value("otel_pools.pools") == 1

    play(scenario, request.getfixturevalue("locked") if way == "password" else server)


def test_held(play):
    """Connections that are out are used, one that is back is idle, and the peak was all of them."""

    async def scenario(stage):
        pool = stage.open()
        one, other = await stage.borrow(pool), await stage.borrow(pool)
        await stage.is_true(2, 0)
        await stage.do(pool.release, one)
        now = await stage.is_true(1, 1)
        await stage.do(pool.release, other)
        await stage.is_settled(idle=2)

        assert now.checkouts() == {("new", None): 2}

    play(scenario)


def test_blpop(play, server):
    """A command that blocks holds its connection, and its age grows until it is done."""

    async def scenario(stage):
        client = stage.client()
        job = await stage.start_blocking(client)
        first = (await stage.is_true(1, 0)).value("otel_pools.use.oldest")
        await stage.sleep(0.03)
        second = (await stage.is_true(1, 0)).value("otel_pools.use.oldest")
        server.ask("RPUSH", stage.name, "done")
        assert (await job)[1] == b"done"
        await stage.is_settled(idle=1)

        assert 0 < first <= second - 0.03

    play(scenario)


@asyncio_only
def test_blpop_cancelled(play):
    """A command that is cancelled gives its connection back, closed, as nobody would read the reply."""

    async def scenario(stage):
        client = stage.client()
        job = await stage.start_blocking(client)
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        cut = await stage.is_settled(idle=0)
        await client.get("nothing")
        now = await stage.is_settled(idle=1)

        assert cut.closed() == {"error": 1}
        assert now.checkouts() == {("new", None): 2}

    play(scenario)


def test_pubsub(play):
    """A subscription holds a connection; when it is closed, redis-py keeps one that is no open connection."""

    async def scenario(stage):
        client = stage.client()
        pubsub = client.pubsub()
        await stage.do(pubsub.subscribe, "news")
        out = await stage.is_true(1, 0)
        await stage.do(client.get, "nothing")
        await stage.is_true(1, 1)
        await stage.do(getattr(pubsub, "aclose", pubsub.close))
        back = await stage.is_settled(idle=1)
        await stage.do(client.get, "nothing")
        await stage.do(client.get, "nothing")

        assert out.value("otel_pools.use.oldest") > 0
        assert sum(back.closed().values()) == 1
        assert set(back.closed()) <= {"reset", "closed"}

    play(scenario)


def test_pipeline(play):
    """A pipeline is one checkout, and so is a transaction."""

    async def scenario(stage):
        client = stage.client()
        for transaction in (False, True):
            pipe = client.pipeline(transaction=transaction)
            pipe.set(stage.name, 1)
            pipe.get(stage.name)
            assert await stage.do(pipe.execute) == [True, b"1"]
        now = await stage.is_settled(idle=1)

        assert now.checkouts() == {("new", None): 1, ("idle", None): 1}

    play(scenario)


def test_watch(play):
    """A pipeline that watches holds its connection until it is reset."""

    async def scenario(stage):
        client = stage.client()
        pipe = client.pipeline()
        await stage.do(pipe.watch, "nothing")
        await stage.is_true(1, 0)
        await stage.do(pipe.get, "nothing")
        await stage.is_true(1, 0)
        await stage.do(pipe.reset)
        await stage.is_settled(idle=1)

    play(scenario)


@sync_only
def test_finalised_pipeline(play):
    """A pipeline that watches and is dropped gives its connection back when it is collected."""

    async def scenario(stage):
        client = stage.client()
        pipe = client.pipeline()
        pipe.watch("nothing")
        await stage.is_true(1, 0)
        del pipe
        gc.collect()
        await stage.is_settled(idle=1)

    play(scenario)


def test_single_connection_client(play, kind):
    """A client with one connection of its own holds it until it is closed."""

    async def scenario(stage):
        pool = stage.open()
        client = kind.client(pool, single_connection_client=True)
        await stage.do(client.get, "nothing")
        now = await stage.is_true(1, 0)
        await stage.do(client.get, "nothing")
        await stage.is_true(1, 0)
        await stage.do(getattr(client, "aclose", client.close))
        await stage.is_settled(idle=1)

        assert now.checkouts() == {("new", None): 1}

    play(scenario)


def test_response_error(play, kind):
    """An error the server answers with costs no connection."""

    async def scenario(stage):
        client = stage.client()
        for _ in range(2):
            with pytest.raises(kind.errors.ResponseError):
                await stage.do(client.execute_command, "NONSENSE")
        now = await stage.is_settled(idle=1)

        assert now.checkouts() == {("new", None): 1, ("idle", None): 1}

    play(scenario)


# -- closing -----------------------------------------------------------------------


def test_disconnect_free(play, kind):
    """Disconnecting the free connections leaves those that are out alone."""

    async def scenario(stage):
        pool, client = stage.both()
        if "inuse_connections" not in inspect.signature(pool.disconnect).parameters:
            return  # a sync blocking pool cannot, in redis-py 5
        if kind.is_blocking and (kind.is_first or (kind.library == "valkey" and not kind.is_async)):
            return  # it takes the word and closes all
        one, other = await stage.borrow(pool), await stage.borrow(pool)
        await stage.do(pool.release, one)
        await stage.do(pool.disconnect, inuse_connections=False)
        cut = await stage.is_true(1, 0)
        await stage.do(client.get, "nothing")
        await stage.is_true(1, 1)
        await stage.do(pool.release, other)
        now = await stage.is_settled(idle=2)

        assert cut.closed() == {"dispose": 1}
        assert now.value("otel_pools.connection.created") == 3

    play(scenario)


@pytest.mark.parametrize("verb", ["disconnect", "close"])
def test_disconnect_all(play, kind, verb):
    """Disconnecting all closes those that are out too; they take their place without a socket, and the pool works."""

    async def scenario(stage):
        pool, client = stage.both()
        close = getattr(pool, "aclose" if kind.is_async else "close", None)
        if verb == "close" and close is None:
            return  # not in redis-py 5.0.0
        one, other = await stage.borrow(pool), await stage.borrow(pool)
        await stage.do(pool.release, one)
        await stage.do(pool.disconnect if verb == "disconnect" else close)
        cut = await stage.is_true(1, 0, unconnected=1)
        await stage.do(pool.release, other)
        await stage.is_settled(idle=0)
        for _ in range(2):
            await stage.do(client.get, "nothing")
        now = await stage.is_settled(idle=1)

        assert sum(cut.closed().values()) == 2
        assert set(cut.closed()) <= {"dispose", "closed"}
        assert now.checkouts() == {("new", None): 3, ("idle", None): 1}

    play(scenario)


def test_disconnect_twice(play):
    """Who disconnects a pool twice, at once or one after the other, closes each connection once."""

    async def scenario(stage):
        pool, client = stage.both()
        await stage.do(client.get, "nothing")
        for job in [stage.start(pool.disconnect) for _ in range(2)]:
            await job
        await stage.do(pool.disconnect)
        now = await stage.is_settled(idle=0)

        assert now.closed() == {"dispose": 1}

    play(scenario)


def test_client_close(play, kind):
    """A client that made its pool closes it."""

    async def scenario(stage):
        options = stage.options()
        options.pop("timeout", None)
        client = kind.client_class(**options)
        for _ in range(2):
            await stage.do(client.get, "nothing")
        await stage.is_settled(idle=1)
        await stage.do(getattr(client, "aclose", client.close))
        if not kind.is_async and kind.is_first:
            client.connection_pool.disconnect()  # a sync client of 5.0.0 does not
        now = await stage.is_settled(idle=0)

        assert now.closed() in ({"dispose": 1}, {"closed": 1})

    if kind.is_blocking:
        pytest.skip("a client makes no blocking pool itself")
    play(scenario)


def test_reset(play, kind):
    """A pool that is reset forgets its connections, which are closed when they are collected."""

    async def scenario(stage):
        pool, client = stage.both()
        await stage.do(client.get, "nothing")
        with leaking():
            pool.reset()
            gc.collect()
            await stage.sleep(0.01)
            await stage.is_true(0, 0)
        await stage.do(client.get, "nothing")
        held = await stage.borrow(pool)  # the asyncio pools have a WeakSet now
        await stage.is_true(1, 0)
        await stage.do(pool.release, held)
        await stage.is_settled(idle=1)

    play(scenario)


# -- what the server does ----------------------------------------------------------


def test_killed_idle(play, kind, server):
    """A connection the server has ended is replaced at its next checkout, or under the command."""

    async def scenario(stage):
        client = stage.client(retry=kind.retries(1), retry_on_error=[kind.errors.ConnectionError])
        await stage.do(client.get, "nothing")
        assert server.kill(stage.name) == 1
        await stage.sleep(0.05)  # for a loop to notice
        await stage.do(client.get, "nothing")
        now = await stage.is_settled(idle=1)

        assert now.closed() == {"error" if lends_the_dead(kind) else "pre_ping": 1}
        again = "idle" if lends_the_dead(kind) else "new"
        assert now.checkouts() == Counter([("new", None), (again, None)])

    play(scenario)


def test_killed_in_use(play, kind, server):
    """A connection that is killed under a command is closed for an error, and the next command opens another."""

    async def scenario(stage):
        client = stage.client()
        job = await stage.start_blocking(client)
        assert server.kill(stage.name) == 1
        with pytest.raises(kind.errors.ConnectionError):
            await job
        now = await stage.is_settled(idle=0)
        await stage.do(client.get, "nothing")
        await stage.is_settled(idle=1)

        assert now.closed() == {"error": 1}

    play(scenario)


def test_killed_in_hand(play, kind, server):
    """A connection that dies in its holder's hand takes its place until it comes back."""

    async def scenario(stage):
        pool, client = stage.both()
        held = await stage.borrow(pool)
        assert server.kill(stage.name) == 1
        await stage.sleep(0.05)
        with pytest.raises(kind.errors.ConnectionError):
            await stage.do(held.send_command, "PING")
            await stage.do(held.read_response)
        now = await stage.is_true(1, 0, unconnected=1)
        await stage.do(pool.release, held)
        await stage.is_settled(idle=0)
        await stage.do(client.get, "nothing")
        await stage.is_settled(idle=1)

        assert now.closed() == {"error": 1}

    play(scenario)


def test_retry_is_one_checkout(play, kind, server):
    """A command that is tried again on a new connection is still one checkout."""

    async def scenario(stage):
        client = stage.client(retry=kind.retries(3), retry_on_error=[kind.errors.ConnectionError])
        await stage.do(client.get, "nothing")
        job = await stage.start_blocking(client)
        assert server.kill(stage.name) == 1
        assert await stage.comes(lambda: stage.read().value("otel_pools.connection.created") == 2)
        await stage.is_true(1, 0)
        server.ask("RPUSH", stage.name, "done")
        assert (await job)[1] == b"done"
        now = await stage.is_settled(idle=1)

        assert now.checkouts() == {("new", None): 1, ("idle", None): 1}
        assert now.value("otel_pools.connection.created") == 2
        assert now.closed() == {"error": 1}

    play(scenario)


def test_outage(play, kind, outage):
    """The server down, three refused connections, and up again: no number drifts, and a closed one is not idle."""

    async def scenario(stage):
        client = stage.client()
        await stage.do(client.get, "nothing")
        outage.stop()
        await stage.sleep(0.02)
        try:
            for _ in range(3):
                with pytest.raises(kind.errors.ConnectionError):
                    await stage.do(client.get, "nothing")
            down = stage.read()
        finally:
            outage.start()
        for _ in range(2):
            await stage.do(client.get, "nothing")
        up = await stage.is_settled(idle=1)

        assert (down.count("used"), down.count("idle")) == (0, 0)
        lent = lends_the_dead(kind)  # then the first command fails after its checkout
        assert down.closed() == {"error" if lent else "pre_ping": 1}
        assert down.value("otel_pools.checkouts", error__type="connect_error") == 3 - lent
        assert up.checkouts() == {("new", None): 2, ("new", "connect_error"): 3 - lent, ("idle", None): 1 + lent}

    play(scenario, outage)


def test_never_up(play, kind, outage):
    """A server that was never there: three failures, and nothing is idle."""

    async def scenario(stage):
        client = stage.client()
        outage.stop()
        try:
            for _ in range(3):
                with pytest.raises(kind.errors.ConnectionError):
                    await stage.do(client.get, "nothing")
        finally:
            outage.start()
        now = await stage.is_settled(idle=0)

        assert now.checkouts() == {("new", "connect_error"): 3}
        assert now.value("otel_pools.connection.created") == 0
        assert now.value("db.client.connection.timeouts") == 0

    play(scenario, outage)


def test_wrong_password(play, kind, locked):
    """A wrong password is a connection that was opened and closed, and a failed checkout."""

    async def scenario(stage):
        client = stage.client(password="wrong")
        for _ in range(2):
            with pytest.raises((kind.errors.AuthenticationError, kind.errors.ResponseError)):
                await stage.do(client.get, "nothing")
        now = await stage.is_settled(idle=0)

        assert now.checkouts() == {("new", "connect_error"): 2}
        assert now.closed() == {"error": 2}

    play(scenario, locked)


# -- too few of them -----------------------------------------------------------------


def test_exhausted(play, kind):
    """Whoever finds no connection, at once or in time, fails, is counted, and takes nothing with him."""

    async def scenario(stage):
        pool = stage.open()
        held = [await stage.borrow(pool), await stage.borrow(pool)]
        with pytest.raises(kind.errors.ConnectionError, match="|".join(REFUSALS)):
            await stage.borrow(pool)
        now = await stage.is_true(2, 0)
        for one in held:
            await stage.do(pool.release, one)
        await stage.is_settled(idle=2)

        refused = ("queued", "timeout") if kind.is_blocking else ("idle", "exhausted")
        assert now.checkouts() == {("new", None): 2, refused: 1}
        assert now.value("db.client.connection.timeouts") == kind.is_blocking
        assert now.value("db.client.connection.wait_time", error__type=refused[1]) == 1
        assert now.value("db.client.connection.max") == 2

    play(scenario)


@blocking_only
def test_waiters(play):
    """While three wait, three are pending and the oldest has an age; those who are served have queued."""

    async def scenario(stage):
        pool = stage.open(timeout=5)
        held = [await stage.borrow(pool), await stage.borrow(pool)]
        jobs = [stage.start_borrowing(pool) for _ in range(3)]
        assert await stage.comes(lambda: stage.read().value("db.client.connection.pending_requests") == 3)
        await stage.sleep(0.01)
        now = await stage.is_true(2, 0)
        for one in held:
            await stage.do(pool.release, one)
        for job in jobs:
            await job
        end = await stage.is_settled(idle=2)

        assert now.value("db.client.connection.pending_requests") == 3
        assert now.value("otel_pools.wait.oldest") > 0.01
        assert end.checkouts() == {("new", None): 2, ("queued", None): 3}

    play(scenario)


@only("asyncio")
def test_line_at_the_lock(play, kind):
    """From 5.3 to 7.1 an asyncio pool connects under its lock: whoever stands there is pending, and has queued."""

    class Slow(kind.package.Connection):
        async def _connect(self):
            await asyncio.sleep(0.05)
            await super()._connect()

    async def scenario(stage):
        pool = stage.open(connection_class=Slow, max_connections=3)
        jobs = [stage.start_borrowing(pool) for _ in range(3)]
        await asyncio.sleep(0.02)
        now = stage.read()
        for job in jobs:
            await job
        serial = kind.is_first is False and kind.is_redis((5, 3), (7, 2))
        end = await stage.is_settled(idle=1 if serial else 3)

        assert now.value("otel_pools.wait.oldest") > 0.01
        assert now.value("db.client.connection.pending_requests") == (2 if serial else 0)
        assert end.checkouts() == ({("new", None): 1, ("queued", None): 2} if serial else {("new", None): 3})

    play(scenario)


def test_maximum(play, kind):
    """The limit is told where there is one: by default a pool that does not block has none before redis-py 8."""

    async def scenario(stage):
        options = stage.options()
        del options["max_connections"]
        pool = stage.keep(kind.pool_class(**options))
        await stage.do(kind.client(pool).get, "nothing")
        points = stage.read().points("db.client.connection.max")

        limit = 50 if kind.is_blocking else 100 if kind.is_redis((8,)) else None
        assert [point.value for point in points] == ([] if limit is None else [limit])

    play(scenario)


# -- misuse --------------------------------------------------------------------------


def refuses_strangers(kind):
    """The asyncio pools raise a KeyError for a connection they have not lent, except the ones of 5.0.0."""
    return kind.is_async and not kind.is_first


async def give_back_wrongly(stage, pool, connection):
    """Give *connection* to a pool that has not lent it, or not any more."""
    if refuses_strangers(stage.kind):
        with pytest.raises(KeyError):
            await pool.release(connection)
    else:
        await stage.do(pool.release, connection)


def test_double_release(play):
    """A connection given back twice is one connection and one use, also when it is lent again."""

    async def scenario(stage):
        pool = stage.open()
        held = await stage.borrow(pool)
        await stage.do(pool.release, held)
        await give_back_wrongly(stage, pool, held)
        await stage.is_settled(idle=1)
        held = await stage.borrow(pool)
        await stage.is_true(1, 0)
        await stage.do(pool.release, held)
        now = await stage.is_settled(idle=1)

        assert now.checkouts() == {("new", None): 1, ("idle", None): 1}

    play(scenario)


def test_double_release_beside_another(play, kind):
    """Given back twice into the place of another, a connection is still one, and the other is not lost sight of."""

    async def scenario(stage):
        pool = stage.open()
        one, other = await stage.borrow(pool), await stage.borrow(pool)
        await stage.do(pool.release, one)
        await give_back_wrongly(stage, pool, one)
        await stage.is_true(1, 1)
        await stage.do(pool.release, other)
        if kind.queues_slots:
            # The queue is full, and the library drops the other one: open, and in nobody's hands.
            now = await stage.is_true(1, 1)
            assert now.value("otel_pools.use.oldest") == 0
        else:
            await stage.is_settled(idle=2)

    play(scenario)


@pytest.mark.parametrize("room", [True, False], ids=["room", "no room"])
def test_foreign_release(play, kind, room):
    """A connection given to another pool is still the first one's: the numbers of both stay right."""

    async def scenario(stage):
        other = Stage(kind, stage.server, stage.telemetry)
        mine, yours = stage.open(), other.open()
        held = await stage.borrow(mine)
        theirs = await other.borrow(yours)
        if not room:
            await other.do(yours.release, theirs)
        await give_back_wrongly(stage, yours, held)
        await stage.is_true(1, 0)
        await other.is_true(room, not room)
        await stage.do(mine.release, held)
        now = await stage.is_settled(idle=1)
        if room:
            await other.do(yours.release, theirs)
        await other.close()
        await other.is_over()

        assert now.checkouts() == {("new", None): 1}

    play(scenario)


@asyncio_only
def test_a_refused_release_raises_the_very_same_error(play, kind):
    """What the library raises when a connection is given back wrongly is what the caller gets."""
    if not refuses_strangers(kind):
        pytest.skip("this version takes anything")
    mine = KeyError("mine")

    class Refusing(set):
        def remove(self, _):
            raise mine

    async def scenario(stage):
        pool = stage.open()
        held = await stage.borrow(pool)
        pool._in_use_connections = Refusing(pool._in_use_connections)
        with pytest.raises(KeyError) as caught:
            await pool.release(held)
        assert caught.value is mine
        assert traceback.extract_tb(mine.__traceback__)[-1].name == "remove"
        await stage.is_true(1, 0, orphaned=1)
        pool._in_use_connections = set(pool._in_use_connections)
        await pool.release(held)
        await stage.is_settled(idle=1)

    play(scenario)


def test_the_very_same_error(play, kind):
    """What is raised while a connection is opened is what the caller gets, with its own frame last."""
    mine = kind.errors.RedisError("mine") if kind.library == "redis" else kind.errors.ValkeyError("mine")

    def fail(_):
        raise mine

    async def async_fail(_):
        fail(_)

    async def scenario(stage):
        client = stage.client(**{f"{kind.library}_connect_func": async_fail if kind.is_async else fail})
        for _ in range(2):
            with pytest.raises(type(mine)) as caught:
                await stage.do(client.get, "nothing")
            assert caught.value is mine
            assert traceback.extract_tb(mine.__traceback__)[-1].name == "fail"
        now = await stage.is_settled(idle=0)

        assert now.checkouts() == {("new", "connect_error"): 2}
        assert now.closed() == {"error": 2}

    play(scenario)


def test_coroutine_functions(kind, watched):
    """A method that was a coroutine function is one, and one that was not is not."""
    # From 5.3 to 7.1 redis-py's own decorator hides that it is one.
    hidden = kind.is_redis((5, 3), (7, 2))
    assert hidden or inspect.iscoroutinefunction(kind.pool_class.get_connection) == kind.is_async
    assert inspect.iscoroutinefunction(kind.pool_class.release) == kind.is_async
    assert inspect.iscoroutinefunction(kind.package.Connection.connect) == kind.is_async
    assert inspect.iscoroutinefunction(kind.package.Connection.disconnect) == kind.is_async
    node = importlib.import_module(f"{kind.library}.asyncio.cluster").ClusterNode
    assert inspect.iscoroutinefunction(node.execute_command)
    assert not inspect.iscoroutinefunction(node.acquire_connection)


def test_constructor_fails(play, kind):
    """A connection that cannot even be made takes its place for good in most pools: that is told, the second time."""

    class Broken(kind.package.Connection):
        def __new__(cls, *_, **__):
            raise LookupError("mine")

    async def scenario(stage):
        pool = stage.open()
        pool.connection_class = Broken
        for _ in range(2):
            with pytest.raises(LookupError, match="mine"):
                await stage.borrow(pool)
        first = stage.read()
        lost = 2 if kind.queues_slots or kind.counts_created else 0
        now = await stage.is_true(0, 0, orphaned=lost)
        if lost:
            with pytest.raises(kind.errors.ConnectionError, match="|".join(REFUSALS)):
                await stage.borrow(pool)

        assert first.value("otel_pools.connection.orphaned") == 0
        assert now.checkouts() == {("idle", "LookupError"): 2}

    play(scenario)


# -- the end of a pool -----------------------------------------------------------------


def test_dropped_pool(play, kind):
    """A pool that is dropped and not closed is gone, with its series, its sockets and its counts."""

    async def scenario(stage):
        pool, client = stage.both()
        for _ in range(2):
            await stage.do(client.get, "nothing")
        await stage.is_settled(idle=1)
        with leaking():
            stage.pools.clear()
            del pool, client
            gc.collect()
            await stage.sleep(0.02)
        assert await stage.sees(0)
        now = stage.read()

        assert now.points("db.client.connection.count") == []
        assert now.points("otel_pools.pools") == []
        assert now.value("otel_pools.connection.created") == sum(now.closed().values()) == 1
        assert now.value("otel_pools.checkouts") == 2

    play(scenario)


def test_leaked_connection(play, kind):
    """A connection that is never given back outlives its pool; it is counted as closed when it is."""

    async def scenario(stage):
        pool, client = stage.both()
        leaked = await stage.borrow(pool)
        await stage.do(client.get, "nothing")
        await stage.is_true(1, 1)
        with leaking():
            stage.pools.clear()
            del pool, client
            gc.collect()
            await stage.sleep(0.02)
            # From 8.0 on, asyncio 8.1, a connection keeps its pool alive, by the handler of maintenance notifications.
            kept = kind.is_redis((8, 1) if kind.is_async else (8,))
            assert await stage.sees(1 + kept)
            alone = stage.read()
            assert leaked is not None
            del leaked
            gc.collect()
            await stage.sleep(0.02)
        assert await stage.sees(0)
        now = stage.read()

        assert (alone.count("used"), alone.count("idle")) == ((1, 1) if kept else (0, 0))
        assert sum(alone.closed().values()) == (0 if kept else 1)
        assert now.points("db.client.connection.count") == []
        assert now.value("otel_pools.connection.created") == sum(now.closed().values()) == 2

    play(scenario)


@sync_only
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_fork(play, kind):
    """A child reports nothing before it uses its pool, then its own; what the parent has is the parent's."""

    def numbers(now):
        names = ("otel_pools.checkouts", "otel_pools.connection.created", "otel_pools.use.oldest")
        return [now.count("used"), now.count("idle"), *map(now.value, names), sum(now.closed().values())]

    async def scenario(stage):
        pool, client = stage.both()
        held = await stage.borrow(pool)
        await stage.do(client.get, "nothing")
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            with os.fdopen(writing, "w") as out:
                fresh = Telemetry()
                _doors.RedisPoolInstrumentor._instruments.registries.clear()
                instruments = _instruments.instruments(fresh.meter_provider)
                instruments.registries["redis"] = _doors.RedisPoolInstrumentor._registry
                before = numbers(Part(fresh.read(), stage.name))
                client.get("nothing")
                client.get("nothing")
                out.write(json.dumps([before, numbers(Part(fresh.read(), stage.name))]))
                out.flush()
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as answer:
            before, after = json.loads(answer.read())
        os.waitpid(child, 0)
        await stage.is_true(1, 1)
        await stage.do(pool.release, held)
        await stage.is_settled(idle=2)

        assert before == [0, 0, 0, 0, 0, 0]
        assert after == [0, 1, 2, 1, 0, 0]

    play(scenario)


# -- Sentinel and Cluster ----------------------------------------------------------------


@asynccontextmanager
async def closing(stage, *clients):
    """Close these at the end, and their pools, which the clients of Sentinel leave alone up to 5.0."""
    try:
        yield
    finally:
        for client in clients:
            await stage.do(getattr(client, "aclose", client.close))
            if hasattr(client, "connection_pool"):
                await stage.do(client.connection_pool.disconnect)
            elif hasattr(client, "disconnect_connection_pools"):  # of a sync cluster
                client.disconnect_connection_pools()


def sentinel_of(kind, sentinels):
    return importlib.import_module(f"{kind.package.__name__}.sentinel").Sentinel([(HOST, sentinels.port)])


@only("sync", "asyncio")
def test_sentinel_names(play, kind, sentinels):
    """The pools of Sentinel have the names of the service and the role."""

    async def scenario(stage):
        sentinel = sentinel_of(kind, sentinels)
        master, replica = sentinel.master_for("shop"), sentinel.slave_for("shop")
        async with closing(stage, master, replica, *sentinel.sentinels):
            for client in (master, replica):
                await stage.do(client.get, "nothing")
            now = [Part(stage.telemetry.read(), f"sentinel:shop/{role}") for role in ("master", "replica")]

        assert [(one.count("used"), one.count("idle")) for one in now] == [(0, 1), (0, 1)]
        assert [one.checkouts() for one in now] == [{("new", None): 1}] * 2

    play(scenario, sentinels)


@only("sync", "asyncio")
def test_sentinel_failover(play, kind, sentinels):
    """After a failover the connections go to the new master; a place that the library loses on the way is told."""

    async def scenario(stage):
        sentinel = sentinel_of(kind, sentinels)
        client = sentinel.master_for("shop", client_name=stage.name, retry=kind.retries(0), max_connections=3)
        pool = client.connection_pool
        async with closing(stage, client, *sentinel.sentinels):
            held = await stage.borrow(pool)
            await stage.do(client.get, "nothing")
            await stage.is_true(1, 1)
            await asyncio.to_thread(sentinels.failover) if kind.is_async else sentinels.failover()
            assert await stage.sees(0)  # the old master hangs up when it learns that it is none any more
            for _ in range(2):
                with suppress(kind.errors.ConnectionError):  # where it is not seen that a connection is dead
                    await stage.do(client.get, "nothing")
            await stage.is_true(1, 1, unconnected=1, unnoticed=1)
            await stage.do(pool.release, held)
            del held
            gc.collect()
            # All asyncio pools but those of 5.0.0 take it back; the others close it, and some do not count that.
            lost = not kind.is_async and kind.is_redis((5, 3), (8, 1))
            for _ in range(2):
                with suppress(kind.errors.ConnectionError):
                    assert (await stage.do(client.execute_command, "ROLE"))[0] == b"master"
            both = [await stage.borrow(pool), await stage.borrow(pool)]
            for one in both:
                await stage.do(pool.release, one)
            now = await stage.is_settled(idle=2, orphaned=lost)

        assert now.value("otel_pools.connection.created") == 4

    play(scenario, sentinels)


KEYS = [f"key{number}" for number in range(24)]


def cluster_of(kind, port, **options):
    """A client of a cluster."""
    where = kind.package if kind.is_async else importlib.import_module(f"{kind.library}.cluster")
    return getattr(where, "RedisCluster", None or getattr(where, "ValkeyCluster", None))(
        host=HOST, port=port, **options
    )


@only("sync", "asyncio")
def test_cluster(play, kind, cluster):
    """All nodes of a cluster together: as many connections as the servers see."""

    async def scenario(stage):
        client = cluster_of(kind, cluster.ports[0], client_name=stage.name)
        async with closing(stage, client):
            for key in KEYS * 2:
                assert await stage.do(client.set, key, 1)
            pipe = client.pipeline()
            for key in KEYS:
                pipe.get(key)
            assert await stage.do(pipe.execute) == [b"1"] * len(KEYS)
            now = await stage.is_settled(idle=int(stage.read().count("idle")))
        await stage.is_settled(idle=0)

        assert now.count("idle") >= 3
        assert now.value("otel_pools.pools") >= 3

    play(scenario, cluster)


@only("sync", "asyncio")
def test_cluster_nodes_have_names(play, kind, cluster):
    """Each node is a pool of its own, named after the server."""

    async def scenario(stage):
        client = cluster_of(kind, cluster.ports[0])
        async with closing(stage, client):
            for key in KEYS * 2:
                await stage.do(client.set, key, 1)
            now = stage.telemetry.read()
            parts = [Part(now, f"{HOST}:{port}/0") for port in cluster.ports]
            seen = [node.clients("") for node in cluster.nodes]

        assert [part.count("used") for part in parts] == [0, 0, 0]
        assert [part.count("idle") for part in parts] == seen
        assert min(seen) > 0

    play(scenario, cluster)


@pytest.fixture(scope="module")
def fragile():
    """A cluster of which a node may be stopped."""
    with Cluster() as cluster:
        yield cluster


@only("asyncio")
def test_cluster_node_down(play, kind, fragile):
    """A command that fails while its node is down loses a connection for good, up to redis-py 7: that is told."""

    async def scenario(stage):
        client = cluster_of(kind, fragile.ports[0], client_name=stage.name)
        async with closing(stage, client):
            for key in KEYS:
                await client.set(key, 1)
            node = client.get_node_from_key(KEYS[0])
            machine = next(one for one in fragile.nodes if one.port == node.port)
            await stage.is_settled(idle=int(stage.read().count("idle")))
            machine.stop()
            try:
                await asyncio.sleep(0.02)
                for _ in range(3):
                    with pytest.raises((kind.errors.ConnectionError, OSError)):
                        await node.execute_command("GET", KEYS[0])
                lost = len(node._connections) - len(node._free)
                others = int(stage.read().count("idle"))
                now = await stage.is_true(lost, others, unconnected=lost, orphaned=lost)
            finally:
                machine.start()
                assert await stage.comes(lambda: all("state:ok" in one.ask("CLUSTER", "INFO") for one in fragile.nodes))
        await stage.is_true(lost, 0, unconnected=lost, orphaned=lost)

        assert (lost > 0) == (not kind.is_redis((8,)))
        assert now.value("otel_pools.checkouts", error__type="connect_error") == 0  # a node connects after its checkout

    play(scenario, fragile)


@only("asyncio")
def test_cluster_full(play, kind, cluster):
    """A node that has no connection left refuses at once."""

    async def scenario(stage):
        client = cluster_of(kind, cluster.ports[0], client_name=stage.name, max_connections=1)
        async with closing(stage, client):
            for key in KEYS:
                await client.set(key, 1)
            node = client.get_node_from_key(KEYS[0])
            job = asyncio.ensure_future(node.execute_command("BLPOP", KEYS[0] + "{" + KEYS[0] + "}", 0.2))
            await asyncio.sleep(0.02)
            with pytest.raises(Exception) as caught:
                await node.execute_command("GET", KEYS[0])
            now = stage.read()
            await job
            await stage.is_settled(idle=int(stage.read().count("idle")))

        assert type(caught.value).__name__ == "MaxConnectionsError"
        assert now.count("used") == 1
        assert now.value("otel_pools.checkouts", error__type="exhausted") == 1

    play(scenario, cluster)


# -- other clients ---------------------------------------------------------------------


@only("sync", libraries=[name for name in redises.LIBRARIES if name == "redis"])
def test_several_databases(play, kind):
    """The client of several databases has a pool for each, and others for its health checks."""
    multidb = pytest.importorskip("redis.multidb.client", reason="from 7.0 on, and with pybreaker")
    from redis.multidb.config import DatabaseConfig, MultiDbConfig

    async def scenario(stage):
        options = {"host": HOST, "port": stage.server.port, "client_name": stage.name}
        databases = [DatabaseConfig(client_kwargs={**options, "db": number}, weight=1.0 - number) for number in (0, 1)]
        with leaking():  # its background loop is left as it is
            client = multidb.MultiDBClient(MultiDbConfig(databases_config=databases))
            for _ in range(5):
                client.set("nothing", 1)
            now = stage.read()
            assert await stage.sees(int(now.count("used") + now.count("idle")))
            for database, _ in client.get_databases():
                database.client.connection_pool.disconnect()
            client.close()
            del client, database
            gc.collect()
        assert now.count("used") == 0

    play(scenario)


@only("sync", "sync-blocking")
def test_client_side_cache(play, kind, monkeypatch):
    """A connection with a client-side cache around it is one connection."""
    if kind.library == "valkey":
        options = {"protocol": 3, "cache_enabled": True}
    elif kind.version < ((5, 3) if kind.is_blocking else (5, 1)):
        pytest.skip("from 5.1 on; in a blocking pool from 5.3 on, as before it has no lock to give to the cache")
    else:
        from redis.cache import CacheConfig
        from redis.connection import CacheProxyConnection

        options = {"protocol": 3, "cache_config": CacheConfig()}
        monkeypatch.setattr(CacheProxyConnection, "MIN_ALLOWED_VERSION", "7.2.0")  # what Valkey says it is

    async def scenario(stage):
        pool, client = stage.both(**options)
        client.set(stage.name, 1)
        for _ in range(3):
            assert client.get(stage.name) == b"1"
        held = await stage.borrow(pool)
        await stage.is_true(1, 0)
        await stage.do(pool.release, held)
        await stage.is_settled(idle=1)
        pool.disconnect()
        await stage.is_settled(idle=0)
        client.set(stage.name, 2)
        now = await stage.is_settled(idle=1)

        assert now.value("otel_pools.connection.created") == 2
        assert now.closed() == {"dispose": 1}

    with Server(config={"extended-redis-compatibility": "yes"}) as compatible:
        play(scenario, compatible)


# -- storms ------------------------------------------------------------------------------


@only("sync-blocking")
def test_thread_storm(play):
    """Eight threads on four connections, some of which die: every command is a checkout, a wait and a use."""

    async def scenario(stage):
        pool, client = stage.both(max_connections=4, timeout=30)
        with ThreadPoolExecutor(8) as executor:
            list(executor.map(lambda seed: storm(stage, pool, client, random.Random(seed)), range(8)))
        now = await stage.is_settled(idle=int(stage.read().count("idle")))

        assert now.value("otel_pools.checkouts") == 8 * 250
        assert {error for _, error in now.checkouts()} == {None}
        assert now.value("otel_pools.connection.created") > 4

    def storm(stage, pool, client, rng):
        for _ in range(250):
            act = rng.random()
            if act < 0.05:
                pubsub = client.pubsub()
                pubsub.subscribe("news")
                pubsub.close()
            elif act < 0.1:
                held = stage.kind.run(stage.borrow(pool))
                held.disconnect()
                pool.release(held)
            else:
                client.get("nothing")

    play(scenario)


@asyncio_only
def test_cancel_storm(play, kind):
    """Sixty tasks, cancelled wherever they are: no number drifts."""

    async def scenario(stage):
        client = stage.client(max_connections=8, **({"timeout": 5} if kind.is_blocking else {}))
        rng = random.Random(7)
        attempts = 0

        async def work():
            nonlocal attempts
            for _ in range(20):
                attempts += 1
                if rng.random() < 0.2:
                    await client.blpop([stage.name], timeout=0.02)
                else:
                    await client.get("nothing")

        async def life():
            task = asyncio.ensure_future(work())
            await asyncio.sleep(rng.random() * 0.1)
            task.cancel()
            with suppress(asyncio.CancelledError, kind.errors.ConnectionError):
                await task

        await asyncio.gather(*(life() for _ in range(60)))
        gc.collect()
        await asyncio.sleep(0.02)
        now = await stage.is_settled(idle=int(stage.read().count("idle")))

        assert now.value("otel_pools.checkouts") == attempts
        if kind.is_blocking:
            assert now.value("otel_pools.checkouts", error__type="cancelled") > 0

    play(scenario)


@asyncio_only
def test_second_cancellation(play, kind):
    """A command cancelled again while its connection waits to come back loses it for good: that is told."""

    async def scenario(stage):
        pool, client = stage.both()
        names = inspect.unwrap(kind.pool_class.release).__code__.co_names
        lock = next((getattr(pool, name) for name in ("_condition", "_lock") if name in names), None)
        if lock is None:
            return  # nothing to wait for on the way back, in this version
        job = await stage.start_blocking(client)
        await lock.acquire()
        job.cancel()
        await asyncio.sleep(0.02)
        assert not job.done()
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        lock.release()
        await stage.is_true(1, 0, unconnected=1, orphaned=1)
        held = next(iter(pool._in_use_connections))
        await client.get("nothing")
        await stage.is_true(1, 1, unconnected=1, orphaned=1)
        await pool.release(held)  # nobody could, without looking inside
        await stage.is_true(0, 1)

    play(scenario)


@each_library
@pytest.mark.timeout(110)
def test_finalisers_inside_a_collection(library, server, watched):
    """Garbage collection may give connections back while the SDK holds its locks: 10^4 times, nothing hangs."""
    kind = Kind(f"{library} sync")
    stage = Stage(kind, server, watched)
    pool, client = stage.both(max_connections=500)
    lent = 0

    class Loan:
        """A cycle: only the garbage collector gives this connection back."""

        def __init__(self):
            self.me = self
            self.pipe = client.pipeline()
            self.pipe.connection = kind.run(stage.borrow(pool))

    def work():
        nonlocal lent
        while lent < 10_000:
            for _ in range(5):
                Loan()
                lent += 1
            gc.enable()
            watched.read()
            gc.disable()  # inside its own locks the library itself would hang

    threshold = gc.get_threshold()
    gc.set_threshold(50, 2, 2)
    gc.disable()
    try:
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(100)
    finally:
        gc.set_threshold(*threshold)
        gc.enable()
    hung = thread.is_alive()
    gc.collect()

    assert not hung
    now = kind.run(stage.is_settled(idle=int(stage.read().count("idle"))))
    kind.run(stage.close())

    assert now.value("db.client.connection.use_time") == now.value("otel_pools.checkouts") == lent
