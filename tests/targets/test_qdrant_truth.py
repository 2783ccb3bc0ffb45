"""The metrics of a Qdrant client equal what its server sees, by gRPC and by REST, whatever happens."""

from __future__ import annotations

import asyncio
import gc
import inspect
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import qdrants

if not qdrants.available():
    pytest.skip("qdrant-client, or what our server is made of, is not installed", allow_module_level=True)

import grpc
import httpx
import qdrant_client
from qdrant_client import qdrant_remote
from qdrant_client.grpc import points_pb2, points_service_pb2_grpc
from qdrants import HOST, Certificates, Server

import otel_pools
from otel_pools import _vocabulary as words
from otel_pools.targets import _channelz
from otel_pools.targets.qdrant import server as server_of

# Before qdrant-client 1.16 a path is all that it takes to trust somebody, of which newer versions of httpx warn.
pytestmark = pytest.mark.filterwarnings("ignore:.verify=<str>. is deprecated")

STREAMS = 10
REMOTE = qdrant_remote.QdrantRemote
ARGUMENTS = inspect.signature(REMOTE.__init__).parameters
# Since 1.13 a client asks for the server's version by a request of its own, which is none of a pool's.
QUIET = {"check_compatibility": False} if "check_compatibility" in ARGUMENTS else {}
# To read the authorities that everybody trusts takes longer than most tests.
PLAIN = {"verify": False}
# From 1.16 on a client has many.
CHANNELS = getattr(REMOTE, "DEFAULT_GRPC_POOL_SIZE", 1)
OK = grpc.StatusCode.OK
OWN_SOCKETS = {"grpc.use_local_subchannel_pool": 1}  # a client writes into its options
KINDS = [qdrant_client.QdrantClient, qdrant_client.AsyncQdrantClient]

needs_books = pytest.mark.skipif(not _channelz.OPEN, reason="the books of this version of gRPC are closed to us")
needs_queues = pytest.mark.skipif(
    not _channelz.QUEUES, reason="the books of this version of gRPC do not tell who waits for a stream"
)
many_channels = pytest.mark.skipif(CHANNELS == 1, reason="up to 1.15 a client has one channel")
sync_only = pytest.mark.parametrize("kind", KINDS[:1], ids=["sync"])
asyncio_only = pytest.mark.parametrize("kind", KINDS[1:], ids=["asyncio"])


@pytest.fixture(scope="module")
def server():
    with Server(streams=STREAMS) as server:
        yield server


@pytest.fixture(scope="module")
def outage():
    """A server that may be stopped."""
    with Server(streams=STREAMS) as server:
        yield server


@pytest.fixture(scope="module")
def certificates():
    pytest.importorskip("trustme")
    with Certificates() as certificates:
        yield certificates


@pytest.fixture(scope="module")
def secure(certificates):
    """A server that speaks TLS and wants a key."""
    with Server(streams=STREAMS, certificates=certificates, key="s3cret") as server:
        yield server


@pytest.fixture(params=KINDS, ids=["sync", "asyncio"])
def kind(request):
    """Each kind of client."""
    return request.param


class Stage:
    """Clients of one kind, what they have called, and the question whether the metrics are true."""

    def __init__(self, kind, server, telemetry):
        self.kind, self.server, self.telemetry = kind, server, telemetry
        self.asynchronous = kind is qdrant_client.AsyncQdrantClient
        self.clients = []
        self.well, self.ill = 0, 0  # the calls that have ended, as their callers saw it
        self.before = server.seen()

    # -- what can be done ------------------------------------------------------

    def open(self, **options):
        at = {"host": HOST, "port": self.server.port, "grpc_port": self.server.grpc_port}
        if "url" in options:
            del at["host"]
        self.clients.append(self.kind(**{**at, "prefer_grpc": True, "timeout": 60, **PLAIN, **QUIET, **options}))
        return self.clients[-1]

    def open_eager(self):
        """One that does not wait long before it tries to connect again."""
        names = ("initial", "min", "max")
        return self.open(grpc_options={f"grpc.{name}_reconnect_backoff_ms": 100 for name in names})

    async def call(self, function, *args, **kwargs):
        """Sync in a thread of its own, so that a scenario can do more than one thing at once in both worlds."""
        if self.asynchronous:
            return await function(*args, **kwargs)
        return await asyncio.to_thread(function, *args, **kwargs)

    async def counted(self, call):
        """Its status, or the class of its error; the error itself would hold on to its channel."""
        try:
            await call
        except grpc.RpcError as error:
            self.ill += 1
            return error.code()
        except (Exception, asyncio.CancelledError) as error:
            self.ill += 1
            return type(error)
        self.well += 1
        return OK

    async def ask(self, client, times=1):
        """Quick calls, one after the other; returns how the last one ended."""
        for _ in range(times):
            last = await self.counted(self.call(client.get_collections))
        return last

    def search(self, client, milliseconds, timeout=60.0):
        """A call that takes so long, if the server comes to it; on its way at once."""
        asked = points_pb2.SearchPoints(
            collection_name="none", limit=1, params=points_pb2.SearchParams(hnsw_ef=milliseconds)
        )
        points = client._client.grpc_points

        async def search():
            # Of a real call alone asyncio can wait.
            return await self.call(points.Search, asked, timeout=timeout)

        return asyncio.ensure_future(self.counted(search()))

    def search_by_rest(self, client):
        """The same by REST, with the HTTP client inside."""
        http = client._client.openapi_client.client
        inner = http._async_client if self.asynchronous else http._client
        asked = {"vector": [1.0], "limit": 1}
        url = f"{self.server.url}/collections/none/points/search"
        return asyncio.ensure_future(self.call(inner.post, url, json=asked))

    async def until_answered(self, client):
        """Ask again and again, as gRPC waits before it tries to connect."""
        while await self.ask(client) != OK:
            await asyncio.sleep(0.1)

    async def close(self, client):
        self.clients.remove(client)
        await self.call(client.close)

    async def until(self, name, number, **where):
        """Some metric comes to be this number."""
        for _ in range(500):
            told = self.telemetry.value(name, **where)
            if told == number:
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"{name} is {told}")

    # -- what should be true -----------------------------------------------------

    def grpc(self, now=None):
        return Grpc(now or self.telemetry.read(), self.server.grpc_port)

    async def comes(self, **numbers):
        """What gRPC tells comes to be these numbers."""
        told = self.grpc()
        for _ in range(500):
            if told.has(numbers):
                return told
            await asyncio.sleep(0.01)
            gc.collect()  # the asyncio calls of gRPC are in cycles, and so are the channels
            told = self.grpc()
        raise AssertionError(f"{told} is not {numbers}")

    async def is_quiet(self, sockets=1):
        """
        Compare with the truth when no call is under way.

        The connections are what the system says the server has; the calls are
        those that were made here, no more and no fewer.
        """
        gc.collect()
        told = await self.comes(used=0, idle=sockets, pending=0, streams=0, waiting=0, well=self.well, ill=self.ill)

        assert await asyncio.to_thread(self.server.settles, grpc=sockets), self.server.established()
        again = self.grpc()
        assert (again.well, again.ill) == (told.well, told.ill)
        return told


class Grpc:
    """What an export says of the gRPC pool of one server."""

    def __init__(self, now, port):
        self.now, self.where = now, {"server__port": port}

    def __repr__(self):
        return f"<{self.used} used, {self.idle} idle, {self.pending} pending, {self.well} well, {self.ill} ill>"

    def has(self, numbers):
        return all(getattr(self, name) == number for name, number in numbers.items())

    def _count(self, state):
        return self.now.value("db.client.connection.count", db__client__connection__state=state, **self.where)

    def _streams(self, state):
        return self.now.value("otel_pools.stream.count", otel_pools__stream__state=state, **self.where)

    used = property(lambda self: self._count("used"))
    idle = property(lambda self: self._count("idle"))
    sockets = property(lambda self: self.used + self.idle)
    pending = property(lambda self: self.now.value("db.client.connection.pending_requests", **self.where))
    streams = property(lambda self: self._streams("used"))
    waiting = property(lambda self: self._streams("pending"))
    calls = property(lambda self: self.now.value("otel_pools.checkouts", **self.where))
    ill = property(lambda self: self.now.value("otel_pools.checkouts", error__type=words.OTHER, **self.where))
    well = property(lambda self: self.calls - self.ill)

    @property
    def channels(self):
        points = self.now.points("otel_pools.grpc.channels", **self.where)
        return {point.attributes[words.GRPC_STATE]: point.value for point in points if point.value}


@pytest.fixture
def play(kind, server, telemetry):
    """Run a scenario on clients of this kind; close them afterwards, and see that nothing is left."""

    def play(scenario, server=server):
        async def whole():
            asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(64))
            stage = Stage(kind, server, telemetry)
            try:
                await scenario(stage)
            finally:
                while stage.clients:
                    await stage.close(stage.clients[-1])
                gc.collect()  # a call of asyncio that has failed is in a cycle, with its connection
                settled = await asyncio.to_thread(server.settles, grpc=0)  # or the next one would find it
            gc.collect()
            assert settled
            assert telemetry.points("otel_pools.grpc.channels") == []
            assert telemetry.points("db.client.connection.count", server__port=server.grpc_port) == []

        gc.collect()  # clients of an earlier test would be found, and rightly counted
        otel_pools.instrument("httpx", "qdrant", meter_provider=telemetry.meter_provider)
        asyncio.run(whole())

    return play


# -- sockets ---------------------------------------------------------------------------


@needs_books
def test_one_socket_for_all_channels(play):
    """By default all channels of a client share one connection, as the server sees it."""

    async def scenario(stage):
        client = stage.open()
        await stage.ask(client, 2 * CHANNELS)
        told = await stage.is_quiet(sockets=1)

        assert told.channels == {"ready": CHANNELS}
        assert told.well == 2 * CHANNELS

    play(scenario)


@needs_books
def test_a_socket_for_each_channel(play):
    """With subchannels of its own each channel has a connection, as the server sees it."""

    async def scenario(stage):
        client = stage.open(grpc_options=dict(OWN_SOCKETS))
        await stage.ask(client, CHANNELS)
        told = await stage.is_quiet(sockets=CHANNELS)

        assert told.channels == {"ready": CHANNELS}

    play(scenario)


@needs_books
@many_channels
def test_a_channel_that_was_not_used_has_no_socket(play):
    """A channel connects at its first call."""

    async def scenario(stage):
        client = stage.open(grpc_options=dict(OWN_SOCKETS), pool_size=4)
        await stage.ask(client)
        told = await stage.is_quiet(sockets=1)

        assert told.channels == {"ready": 1, "idle": 3}

    play(scenario)


@needs_books
def test_two_clients_share_a_socket(play):
    """Clients of equal options share one connection, which is counted once; those of others have their own."""

    async def scenario(stage):
        clients = [stage.open(), stage.open()]
        for client in clients:
            await stage.ask(client, CHANNELS)
        await stage.is_quiet(sockets=1)
        other = stage.open(grpc_options={"grpc.keepalive_time_ms": 60_000})
        await stage.ask(other)
        await stage.is_quiet(sockets=2)
        await stage.close(clients.pop())
        await stage.ask(clients[0])
        await stage.is_quiet(sockets=2)

    play(scenario)


@needs_books
def test_the_server_lets_go(play):
    """A connection that the server ends after a while is no connection; the next call makes a new one."""

    async def scenario(stage):
        client = stage.open()
        await stage.ask(client)
        await stage.is_quiet(sockets=1)
        await stage.comes(idle=0)
        assert await asyncio.to_thread(stage.server.settles, grpc=0)
        # A channel that was let go is idle, and the next call connects.
        assert await stage.ask(client) == OK
        await stage.comes(well=2, ill=0)

    with Server(options={"grpc.max_connection_age_ms": 300}) as server:
        play(scenario, server)


# -- the queue -------------------------------------------------------------------------


@needs_queues
def test_more_calls_than_streams(play):
    """60 calls on a connection of 10 streams are 10 streams in use, and 50 calls that wait for one."""

    async def scenario(stage):
        client = stage.open()
        await stage.ask(client)  # a connection that is new has not heard of the limit
        first = stage.server.seen()
        with stage.server.held():
            jobs = [stage.search(client, 0) for _ in range(60)]
            told = await stage.comes(streams=STREAMS, pending=50)
            assert await asyncio.to_thread(stage.server.sees, grpc_under_way=STREAMS)
            seen = stage.server.seen()

        assert (told.used, told.idle, told.waiting) == (1, 0, 50)
        assert seen.grpc_begun - first.grpc_begun == STREAMS
        assert told.calls == 1  # none has ended
        await asyncio.gather(*jobs)
        await stage.is_quiet()

    play(scenario)


@needs_queues
def test_fewer_calls_than_streams(play):
    """Calls that all have a stream wait for none."""

    async def scenario(stage):
        client = stage.open()
        await stage.ask(client)
        with stage.server.held():
            jobs = [stage.search(client, 0) for _ in range(STREAMS - 1)]
            told = await stage.comes(streams=STREAMS - 1)
            assert await asyncio.to_thread(stage.server.sees, grpc_under_way=STREAMS - 1)

        assert (told.used, told.idle, told.pending, told.waiting) == (1, 0, 0, 0)
        await asyncio.gather(*jobs)
        await stage.is_quiet()

    play(scenario)


@needs_queues
@many_channels
def test_sockets_of_their_own_make_room(play):
    """With a connection for each channel three times as many calls have a stream."""

    async def scenario(stage):
        client = stage.open(grpc_options=dict(OWN_SOCKETS))
        await stage.ask(client, CHANNELS)
        with stage.server.held():
            jobs = [stage.search(client, 0) for _ in range(60)]
            told = await stage.comes(streams=CHANNELS * STREAMS, pending=60 - CHANNELS * STREAMS)
            assert await asyncio.to_thread(stage.server.sees, grpc_under_way=CHANNELS * STREAMS)

        assert (told.used, told.idle) == (CHANNELS, 0)
        await asyncio.gather(*jobs)
        await stage.is_quiet(sockets=CHANNELS)

    play(scenario)


@needs_books
def test_a_server_that_hangs(play, outage):
    """A call that nobody answers has its stream; it ends with its deadline, and the connection is idle again."""

    async def scenario(stage):
        client = stage.open()
        await stage.ask(client)
        outage.pause()
        try:
            job = stage.search(client, 1, timeout=0.5)
            told = await stage.comes(used=1)
            error = await job
        finally:
            outage.resume()

        assert (told.pending, told.waiting) == (0, 0)
        assert error == grpc.StatusCode.DEADLINE_EXCEEDED
        await stage.is_quiet()

    play(scenario, outage)


# -- ends that are not good -----------------------------------------------------------------


@needs_books
def test_deadline_exceeded(play):
    """A call that is too late is counted as failed, why nobody knows, and its stream is free."""

    async def scenario(stage):
        client = stage.open()
        await stage.ask(client)
        error = await stage.search(client, 5000, timeout=0.05)
        told = await stage.is_quiet()

        assert error == grpc.StatusCode.DEADLINE_EXCEEDED
        assert (told.well, told.ill) == (1, 1)

    play(scenario)


@needs_books
def test_refused_by_the_server(play):
    """An answer that is an error is a failed call."""

    async def scenario(stage):
        client = stage.open()
        error = await stage.search(client, 0)
        told = await stage.is_quiet()

        assert error == grpc.StatusCode.NOT_FOUND
        assert (told.well, told.ill) == (0, 1)

    play(scenario)


@needs_queues
@asyncio_only
def test_cancelled_task(play):
    """Tasks that are cancelled, on a stream or waiting for one, have failed, and the server is rid of them."""

    async def scenario(stage):
        client = stage.open()
        await stage.ask(client)
        jobs = [stage.search(client, 20_000) for _ in range(15)]
        await stage.comes(streams=STREAMS, pending=5)
        for job in jobs:
            job.cancel()
        assert set(await asyncio.gather(*jobs)) == {asyncio.CancelledError}
        await stage.is_quiet()

        assert stage.ill == 15
        assert await asyncio.to_thread(stage.server.sees, grpc_under_way=0)

    play(scenario)


@needs_queues
@sync_only
def test_cancelled_future(play):
    """Futures that are cancelled have failed, and the server is rid of them."""

    async def scenario(stage):
        client = stage.open()
        await stage.ask(client)
        # The client's own interceptor would wait for each.
        (bare, *_) = [channel._channel for channel in server_of(client._client).channels]
        points = points_service_pb2_grpc.PointsStub(bare)
        futures = [points.Search.future(_slow(), timeout=60) for _ in range(15)]
        await stage.comes(streams=STREAMS, pending=5)
        for future in futures:
            assert future.cancel()
        stage.ill += 15
        await stage.is_quiet()

        assert await asyncio.to_thread(stage.server.sees, grpc_under_way=0)

    play(scenario)


def _slow():
    return points_pb2.SearchPoints(collection_name="none", limit=1, params=points_pb2.SearchParams(hnsw_ef=20_000))


@needs_books
def test_outage(play, outage):
    """While the server is gone no connection is told and calls fail; when it is back, so is the connection."""

    async def scenario(stage):
        client = stage.open_eager()
        await stage.ask(client, CHANNELS)
        await stage.is_quiet()
        jobs = [stage.search(client, 20_000) for _ in range(STREAMS + 5)]
        assert await asyncio.to_thread(outage.sees, grpc_under_way=STREAMS)
        outage.kill()
        errors = await asyncio.gather(*jobs)
        down = await stage.comes(used=0, idle=0, pending=0, well=stage.well, ill=stage.ill)

        assert set(errors) == {grpc.StatusCode.UNAVAILABLE}
        assert await stage.ask(client) == grpc.StatusCode.UNAVAILABLE
        failing = await stage.comes(sockets=0, ill=stage.ill)
        assert "ready" not in {**down.channels, **failing.channels}
        assert sum(failing.channels.values()) == CHANNELS

        outage.start()
        await stage.until_answered(client)
        up = await stage.is_quiet()
        assert up.channels.get("ready", 0) >= 1

    play(scenario, outage)


@needs_queues
def test_a_call_waits_for_a_connection(play, outage):
    """A call that waits for the server to come back is pending, but for no stream, as there is no connection."""

    async def scenario(stage):
        client = stage.open_eager()
        await stage.ask(client)
        outage.kill()
        await stage.comes(idle=0)
        search = client._client.grpc_points.Search
        job = asyncio.ensure_future(
            stage.counted(stage.call(search, points_pb2.SearchPoints(limit=1), timeout=60, wait_for_ready=True))
        )
        told = await stage.comes(pending=1)

        assert (told.sockets, told.streams, told.waiting) == (0, 0, 0)
        outage.start()
        assert await job == grpc.StatusCode.NOT_FOUND
        await stage.is_quiet()

    play(scenario, outage)


@needs_books
@asyncio_only
def test_errors_that_are_kept(play):
    """Calls that have failed have no stream any more, though their errors, if the app keeps them, hold on to it."""

    async def scenario(stage):
        client = stage.open_eager()
        await stage.ask(client)
        kept = await asyncio.gather(*map(client._client.grpc_points.Search, [_none()] * 5), return_exceptions=True)
        told, codes = stage.grpc(), {error.code() for error in kept}
        kept.clear()

        assert codes == {grpc.StatusCode.NOT_FOUND}
        assert (told.used, told.idle, told.streams, told.waiting, told.pending) == (0, 1, 0, 0, 0)
        assert await asyncio.to_thread(stage.server.sees, grpc_under_way=0)

    play(scenario)


def _none():
    return points_pb2.SearchPoints(collection_name="none", limit=1)


# -- closing -----------------------------------------------------------------------------


@needs_books
def test_the_last_calls_of_a_client(play):
    """The calls that a client made before it was closed are counted, though gRPC has struck it off its books."""

    async def scenario(stage):
        client = stage.open()
        await stage.ask(client, 3)
        await stage.search(client, 0)
        await stage.close(client)
        gc.collect()
        told = stage.grpc()

        assert (told.well, told.ill) == (3, 1)
        assert told.channels == {}
        assert await asyncio.to_thread(stage.server.settles, grpc=0)

    play(scenario)


@needs_books
def test_calls_under_way_when_a_client_is_closed(play):
    """Calls that a client cuts off when it is closed are counted as failed."""

    async def scenario(stage):
        client = stage.open()
        await stage.ask(client)
        jobs = [stage.search(client, 20_000) for _ in range(4)]
        assert await asyncio.to_thread(stage.server.sees, grpc_under_way=4)
        await stage.close(client)
        await asyncio.gather(*jobs)

        assert (stage.well, stage.ill) == (1, 4)
        assert (stage.grpc().well, stage.grpc().ill) == (1, 4)

    play(scenario)


@needs_books
def test_one_client_of_two_is_closed(play):
    """What the one that is left has under way goes on, and the calls of both are counted."""

    async def scenario(stage):
        one, other = stage.open(), stage.open()
        await stage.ask(one, 2)
        await stage.ask(other, 3)
        with stage.server.held():
            jobs = [stage.search(other, 0) for _ in range(4)]
            assert await asyncio.to_thread(stage.server.sees, grpc_under_way=4)
            await stage.close(one)
            told = await stage.comes(used=1)

        assert (told.well, told.ill) == (5, 0)
        await asyncio.gather(*jobs)
        await stage.is_quiet()

    play(scenario)


@needs_books
@asyncio_only
def test_clients_in_turn(play):
    """Clients that are opened and closed one after the other leave no channel and lose no call."""

    async def scenario(stage):
        for _ in range(5):
            client = stage.open()
            await stage.ask(client, 2)
            await stage.close(client)
            del client
        stage.open()
        gc.collect()

        assert (stage.grpc().well, stage.grpc().ill) == (10, 0)
        assert await asyncio.to_thread(stage.server.settles, grpc=0)

    play(scenario)


# -- storms ------------------------------------------------------------------------------


@needs_books
@sync_only
def test_a_storm_of_threads(play):
    """Of 8 threads with 50 calls each, while metrics are collected, every call is counted once, and none failed."""

    async def scenario(stage):
        client = stage.open()
        # Threads that race for a client's first call make channels that it throws away, with their calls.
        await stage.ask(client, CHANNELS)
        first = stage.server.seen().grpc_begun
        storm = asyncio.gather(*(asyncio.to_thread(_ask, client, 50) for _ in range(8)))
        while not storm.done():
            told = stage.grpc()
            assert told.sockets <= 1
            assert told.streams <= STREAMS
            await asyncio.sleep(0.02)
        stage.well += sum(storm.result())
        told = await stage.is_quiet()

        assert (told.calls, told.ill) == (400 + CHANNELS, 0)
        assert stage.server.seen().grpc_begun - first == 400

    play(scenario)


def _ask(client, times):
    for _ in range(times):
        client.get_collections()
    return times


@needs_books
@asyncio_only
def test_a_storm_of_tasks(play):
    """Of 200 tasks of which many are cancelled, whenever that is, every call is counted once."""

    async def scenario(stage):
        client = stage.open()
        await stage.ask(client)
        dice = random.Random(1)
        jobs = [stage.search(client, 20 + dice.randrange(20)) for _ in range(200)]
        await asyncio.sleep(0.01)  # who is cancelled before its first step has called nobody
        for job in jobs:
            if dice.random() < 0.4:
                await asyncio.sleep(dice.random() / 100)
                job.cancel()
        ends = Counter(await asyncio.gather(*jobs))
        told = await stage.is_quiet()

        assert ends.keys() == {asyncio.CancelledError, grpc.StatusCode.NOT_FOUND}
        assert (told.well, told.ill) == (1, 200)

    play(scenario)


@needs_books
@sync_only
@pytest.mark.skipif(not hasattr(REMOTE, "async_grpc_points"), reason="there is none any more")
def test_the_asyncio_side_of_a_sync_client(play):
    """A sync client of old that is called by its asyncio stubs as well has a channel and a connection for them."""

    async def scenario(stage):
        client = stage.open()
        await stage.ask(client, 2)
        asked = points_pb2.SearchPoints(limit=1)
        with pytest.raises(grpc.aio.AioRpcError):
            await client._client.async_grpc_points.Search(asked)
        stage.ill += 1
        told = await stage.is_quiet(sockets=2)
        await client._client._aio_grpc_channel.close()  # a client that is closed by another thread leaves it open

        assert told.channels == {"ready": 2}

    play(scenario)


# -- TLS and keys --------------------------------------------------------------------------


@pytest.fixture
def trusting(certificates, monkeypatch):
    """What a client is told to trust the server; before 1.16 it cannot be told, and gRPC's default is changed."""
    trusting = certificates.trusting
    if "grpc_options" not in trusting:
        call, root = grpc.ssl_channel_credentials, Path(certificates.authority).read_bytes()
        monkeypatch.setattr(grpc, "ssl_channel_credentials", lambda: call(root))
    return trusting


@needs_queues
def test_tls_and_a_key(play, secure, trusting):
    """Over TLS each channel has a connection, as each has credentials of its own, and all else is told as without."""

    async def scenario(stage):
        client = stage.open(https=True, api_key="s3cret", **trusting)
        await stage.ask(client, CHANNELS)
        with stage.server.held():
            jobs = [stage.search(client, 0) for _ in range(STREAMS * CHANNELS + 5)]
            await stage.comes(used=CHANNELS, streams=STREAMS * CHANNELS, pending=5)
            assert await asyncio.to_thread(stage.server.sees, grpc_under_way=STREAMS * CHANNELS)
        await asyncio.gather(*jobs)
        told = await stage.is_quiet(sockets=CHANNELS)

        assert told.well == CHANNELS

    play(scenario, secure)


@needs_books
def test_a_wrong_key(play, secure, trusting):
    """A client whose key is wrong has a connection, and its calls are counted as failed."""

    async def scenario(stage):
        client = stage.open(https=True, api_key="wrong", **trusting)
        error = await stage.ask(client)
        told = await stage.is_quiet()

        assert error == grpc.StatusCode.UNAUTHENTICATED
        assert (told.well, told.ill) == (0, 1)

    play(scenario, secure)


@needs_books
def test_a_server_that_is_not_trusted(play, secure):
    """A client that does not trust its server has no connection, and its calls are counted as failed."""

    async def scenario(stage):
        client = stage.open(https=True, api_key="s3cret")
        error = await stage.ask(client)
        told = await stage.comes(sockets=0, well=0, ill=1)

        assert error == grpc.StatusCode.UNAVAILABLE
        assert "ready" not in told.channels

    play(scenario, secure)


# -- REST ----------------------------------------------------------------------------------


class Rest:
    """What an export says of the REST pool of one server."""

    def __init__(self, stage):
        self.now, self.where = stage.telemetry.read(), {"server__port": stage.server.port}

    def __getattr__(self, name):
        kind = "db.client.connection" if name in {"max", "create_time", "use_time"} else "otel_pools.connection"
        return self.now.value(f"{kind}.{name}", **self.where)

    def count(self, state):
        return self.now.value("db.client.connection.count", db__client__connection__state=state, **self.where)

    @property
    def sockets(self):
        return self.count("used") + self.count("idle")


def test_rest_without_keep_alive(play):
    """To this machine a client keeps no connection: 20 calls make 20 and close 20, as the server sees it."""

    async def scenario(stage):
        client = stage.open(prefer_grpc=False)
        await stage.ask(client, 20)
        told = Rest(stage)
        (idle_max,) = told.now.points("db.client.connection.idle.max")

        assert (told.created, told.closed, told.sockets, idle_max.value) == (20, 20, 0, 0)
        assert told.now.points("db.client.connection.max") == []
        assert stage.server.seen().rest_accepted - stage.before.rest_accepted == 20
        assert await asyncio.to_thread(stage.server.settles, rest=0)

    play(scenario)


def test_rest_with_keep_alive(play):
    """With limits of the user's own 20 calls share one connection, as the server sees it."""

    async def scenario(stage):
        client = stage.open(prefer_grpc=False, limits=httpx.Limits())
        await stage.ask(client, 20)
        told = Rest(stage)

        assert (told.created, told.closed, told.count("idle"), told.use_time) == (1, 0, 1, 20)
        assert stage.server.seen().rest_accepted - stage.before.rest_accepted == 1
        assert await asyncio.to_thread(stage.server.settles, rest=1)

    play(scenario)


@pytest.mark.skipif("pool_size" not in ARGUMENTS, reason="this version has no pool_size")
def test_pool_size_limits_rest(play):
    """`pool_size` is the limit of the REST pool, which 12 calls at once fill."""

    async def scenario(stage):
        # To this machine, by its usual names, there is no limit.
        client = stage.open(url=f"http://127.1:{stage.server.port}", port=stage.server.port, pool_size=4)
        client._client._prefer_grpc = False
        await asyncio.gather(*(stage.ask(client) for _ in range(12)))
        told = Rest(stage)

        assert told.max == 4
        assert 1 <= told.sockets <= 4
        assert told.sockets == told.created
        assert await asyncio.to_thread(stage.server.settles, rest=int(told.sockets))

    play(scenario)


def test_limits_of_rest_are_told(play):
    """Limits that a user gives are told, as is what waits for a connection."""

    async def scenario(stage):
        limits = httpx.Limits(max_connections=2, max_keepalive_connections=1)
        client = stage.open(prefer_grpc=False, limits=limits)
        with stage.server.held():
            jobs = [stage.search_by_rest(client) for _ in range(5)]
            await stage.until("db.client.connection.pending_requests", 3)
            assert await asyncio.to_thread(stage.server.sees, rest_under_way=2)
            told = Rest(stage)

        assert (told.count("used"), told.max, told.now.value("db.client.connection.idle.max")) == (2, 2, 1)
        await asyncio.gather(*jobs)
        assert await asyncio.to_thread(stage.server.settles, rest=1)

    play(scenario)


@pytest.mark.skipif(find_spec("h2") is None, reason="h2 is not installed")
def test_rest_over_http2(play, secure, trusting):
    """With `http2=True` requests at once share one connection, and each has a stream."""

    async def scenario(stage):
        client = stage.open(
            prefer_grpc=False,
            https=True,
            api_key="s3cret",
            http2=True,
            limits=httpx.Limits(),
            **trusting,
        )
        await stage.ask(client)
        where = {"otel_pools__stream__state": "used", "server__port": stage.server.port}
        with stage.server.held():
            jobs = []
            for begun in range(1, 6):  # threads that begin at once spoil each other's stream in httpcore
                jobs.append(stage.search_by_rest(client))
                assert await asyncio.to_thread(stage.server.sees, rest_under_way=begun)
            await stage.until("otel_pools.stream.count", 5, **where)
            told = Rest(stage)

        assert (told.created, told.sockets) == (1, 1)
        await asyncio.gather(*jobs)
        assert await asyncio.to_thread(stage.server.settles, rest=1)

    play(scenario, secure)


def test_rest_in_an_outage(play, outage):
    """While the server is gone REST calls fail to connect, and no connection is told."""

    async def scenario(stage):
        client = stage.open(prefer_grpc=False, limits=httpx.Limits())
        await stage.ask(client)
        outage.kill()
        failed = await stage.ask(client)
        down = Rest(stage)
        outage.start()
        await stage.ask(client)
        up = Rest(stage)

        assert failed is not OK
        assert (down.sockets, up.sockets) == (0, 1)
        assert up.now.value("otel_pools.checkouts", error__type="connect_error") == 1
        assert await asyncio.to_thread(outage.settles, rest=1)

    play(scenario, outage)


@needs_books
def test_both_protocols_of_one_client(play):
    """A client that calls by gRPC and by REST has two pools, each with the connection that the server sees."""

    async def scenario(stage):
        client = stage.open(limits=httpx.Limits())
        await stage.ask(client, 2)
        await stage.search_by_rest(client)
        await stage.is_quiet(sockets=1)

        assert Rest(stage).count("idle") == 1
        assert stage.telemetry.value("otel_pools.pools") == 2
        assert await asyncio.to_thread(stage.server.settles, rest=1, grpc=1)

    play(scenario)
