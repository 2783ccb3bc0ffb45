"""The metrics of the pools of httpx and httpx2 equal the server's own count, whatever happens."""

from __future__ import annotations

import asyncio
import gc
import importlib
import os
import ssl
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import version

import pytest
import webs
from webs import ASYNC, CORES, HTTP2, LIBRARIES, SOCKS5, SYNC, HTTPProxy, Server, Silent, flavour_id

import otel_pools
from otel_pools import _vocabulary as words
from otel_pools.targets import httpx as target

if not LIBRARIES:
    pytest.skip("neither httpx nor httpx2 is installed", allow_module_level=True)
pytest.importorskip("h2")
pytest.importorskip("trustme")


@pytest.fixture(params=SYNC + ASYNC, ids=flavour_id)
def flavour(request):
    """Each library, sync and asyncio."""
    return request.param


async_only = pytest.mark.parametrize("flavour", ASYNC, indirect=True, ids=flavour_id)
sync_only = pytest.mark.parametrize("flavour", SYNC, indirect=True, ids=flavour_id)


@pytest.fixture(scope="module")
def ground():
    with webs.Ground() as ground:
        yield ground


@pytest.fixture(scope="module")
def certificates():
    return webs.Certificates()


@pytest.fixture
def web(ground):
    """HTTP/1.1."""
    with Server(ground) as server:
        yield server


@pytest.fixture
def other(ground):
    """HTTP/1.1, at another port."""
    with Server(ground) as server:
        yield server


@pytest.fixture
def secure(ground, certificates):
    """HTTP/1.1 over TLS."""
    with Server(ground, tls=certificates.of_server("http/1.1")) as server:
        yield server


@pytest.fixture
def web2(ground):
    """HTTP/2 by prior knowledge."""
    with Server(ground, HTTP2) as server:
        yield server


class Stage:
    """One client of one library, and the question whether the metrics are true."""

    def __init__(self, flavour, telemetry, trusted):
        name, self.asynchronous = flavour
        self.lib = importlib.import_module(name)
        self.core = importlib.import_module(CORES[name])
        self.version = tuple(int(part) for part in version(CORES[name]).split(".")[:2])
        self.telemetry, self.trusted = telemetry, trusted
        self.client = None

    # -- what the library is -------------------------------------------------

    @property
    def tells_reasons(self):
        """Up to 1.0.2 httpcore closed connections one by one: that they are gone shows when they are collected."""
        return hasattr(self.core.ConnectionPool, "_close_connections")

    @property
    def leaks(self):
        """Until httpcore2 2.6 a request that was cancelled before it could connect left its place taken (#1093)."""
        return self.core.__name__ == "httpcore" or self.version < (2, 6)

    @property
    def races(self):
        """Until httpcore2 2.8 a thread could close a connection that another was about to use (#1110)."""
        return self.core.__name__ == "httpcore" or self.version < (2, 8)

    def reasons(self, **expected):
        """What should be counted as closed, by reason, where this version can tell it."""
        return expected if self.tells_reasons or not expected else {words.CLOSED: sum(expected.values())}

    # -- what can be done ------------------------------------------------------

    def transport(self, **options):
        kind = self.lib.AsyncHTTPTransport if self.asynchronous else self.lib.HTTPTransport
        names = ("max_connections", "max_keepalive_connections", "keepalive_expiry")
        limits = self.lib.Limits(**{name: options.pop(name) for name in names if name in options})
        if "proxy" in options:
            options["proxy"] = self.lib.Proxy(options["proxy"])
        return kind(limits=limits, verify=options.pop("verify", self.trusted), trust_env=False, **options)

    def start(self, *, timeout=None, mounts=None, **options):
        """Make the client."""
        kind = self.lib.AsyncClient if self.asynchronous else self.lib.Client
        self.client = kind(
            transport=self.transport(**options),
            mounts=None if mounts is None else {where: self.transport(**of) for where, of in mounts.items()},
            timeout=self.lib.Timeout(**{"timeout": 10, **(timeout or {})}),
            trust_env=False,
        )

    @property
    def pool(self):
        return self.client._transport._pool

    async def call(self, function, *args, **kwargs):
        """Sync in a thread of its own, so that a scenario can do more than one thing at once in both worlds."""
        if self.asynchronous:
            return await function(*args, **kwargs)
        return await asyncio.to_thread(function, *args, **kwargs)

    async def get(self, url, **options):
        # An old response holds on to its connection: let go of it.
        return (await self.call(self.client.get, url, **options)).status_code

    async def fails(self, error, url, **options):
        with pytest.raises(error):
            await self.get(url, **options)

    async def open(self, url, **options):
        """Ask, and leave the body unread."""
        return await self.call(self.client.send, self.client.build_request("GET", url, **options), stream=True)

    async def close(self, response):
        await self.call(response.aclose if self.asynchronous else response.close)

    async def read(self, response):
        await self.call(response.aread if self.asynchronous else response.read)

    async def shut(self):
        await self.call(self.client.aclose if self.asynchronous else self.client.close)

    async def at_once(self, urls):
        """All of them together; the errors among the results."""
        return await asyncio.gather(*(self.get(url) for url in urls), return_exceptions=True)

    @staticmethod
    async def until(condition, seconds=5.0):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end
            await asyncio.sleep(0.005)

    # -- what should be true -----------------------------------------------------

    async def is_true(self, active, idle, *servers, orphaned=0, unborn=0, pending=0, sockets=None):
        """
        Compare with the truth.

        Active and idle are what the scenario says, both together what the
        servers see, origin by origin, and so is created minus closed.
        *unborn* are places in the pool whose connection was never opened;
        *sockets*, if given, is what the servers should see instead.
        """
        gc.collect()
        self.telemetry.read()  # what is orphaned must be so twice
        now = self.telemetry.read()

        assert (opens(now, "active"), opens(now, "idle")) == (active, idle)
        assert now.value("otel_pools.connection.created") - sum(now.closed().values()) == active + idle - unborn
        assert now.value("http.client.connection.duration") == sum(now.closed().values())
        assert now.value("http.client.request.time_in_queue") == now.value("otel_pools.checkouts")
        assert now.value("otel_pools.connection.orphaned") == orphaned
        assert now.value("otel_pools.connection.pending_requests") == pending
        assert set(now.closed()) <= set(words.REASONS)
        if active == orphaned and not pending:
            assert now.value("otel_pools.wait.oldest") == now.value("otel_pools.use.oldest") == 0
            assert now.value("http.client.active_requests") == 0
        for server in servers:
            told = sockets if sockets is not None else opens(now, port=server.port)
            assert await asyncio.to_thread(server.settles, told), (server.open, told)
        return now


def opens(now, state=None, port=None):
    """``http.client.open_connections``, of one state or at one port."""
    return sum(
        point.value
        for point in now.points("http.client.open_connections")
        if state in {None, point.attributes[words.HTTP_STATE]} and port in {None, point.attributes[words.PORT]}
    )


def streams(now, state):
    return now.value("otel_pools.stream.count", otel_pools__stream__state=state)


@pytest.fixture
def play(flavour, telemetry, certificates):
    """Run a scenario on a client with these options; close it afterwards, and see that nothing is left."""

    def play(scenario, **options):
        stage = Stage(flavour, telemetry, certificates.trusted)

        async def whole():
            asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(64))
            stage.start(**options)
            try:
                await scenario(stage)
            finally:
                await stage.shut()

        otel_pools.instrument(
            "httpx", meter_provider=telemetry.meter_provider, tracer_provider=telemetry.tracer_provider
        )
        asyncio.run(whole())

    return play


# -- keep-alive --------------------------------------------------------------------------


def test_keep_alive(play, web):
    """Three requests in turn are one connection: one new, two idle; active while a body is open, and idle after."""

    async def scenario(stage):
        response = await stage.open(web.url())
        await stage.is_true(1, 0, web)
        await stage.close(response)
        # A body that was not read is a connection that cannot be used again.
        await stage.get(web.url())
        await stage.get(web.url())
        now = await stage.is_true(0, 1, web)

        assert now.checkouts() == {("new", None): 2, ("idle", None): 1}
        assert now.value("otel_pools.connection.created") == web.accepted

    play(scenario)


def test_expired(play, web):
    """A connection that was idle for too long is closed by the next request, and the reason is told."""

    async def scenario(stage):
        await stage.get(web.url())
        await asyncio.sleep(0.1)
        await stage.get(web.url())
        now = await stage.is_true(0, 1, web)

        assert now.closed() == stage.reasons(idle=1)
        assert now.checkouts() == {("new", None): 2}

    play(scenario, keepalive_expiry=0.05)


def test_server_hangs_up(play, web):
    """A connection that the server has closed while idle is found closed at the next request."""

    async def scenario(stage):
        await stage.get(web.url())
        assert web.hang_up() == 1
        before = stage.telemetry.read()
        await stage.get(web.url())
        now = await stage.is_true(0, 1, web)

        assert opens(before, "idle") == 1  # the pool does not know yet, and we do not poll its sockets
        assert now.closed() == stage.reasons(server=1)
        assert now.checkouts() == {("new", None): 2}

    play(scenario)


def test_connection_close(play, web):
    """A server that says "Connection: close" has its connection closed for that reason."""

    async def scenario(stage):
        for _ in range(3):
            await stage.get(web.url("/close"))
        now = await stage.is_true(0, 0, web)

        assert now.closed() == {"server": 3}

    play(scenario)


def test_surplus(play, web):
    """Connections beyond those that may stay idle are closed to make room."""

    async def scenario(stage):
        await stage.at_once([web.url("/slow?0.2")] * 4)
        now = await stage.is_true(0, 1, web)

        assert now.closed() == {"evicted": 3}
        assert now.value("otel_pools.connection.created") == web.accepted == 4

    play(scenario, max_keepalive_connections=1)


def test_another_origin(play, web, other):
    """In a full pool a request to another origin closes an idle connection; each origin has its own count."""

    async def scenario(stage):
        await stage.get(web.url())
        await stage.is_true(0, 1, web, other)
        await stage.get(other.url())
        now = await stage.is_true(0, 1, web, other)

        assert now.closed() == stage.reasons(evicted=1)
        assert opens(now, "idle", other.port) == 1

    play(scenario, max_connections=1)


def test_two_origins(play, web, other):
    """What each origin has is told apart, though the pool has one name."""

    async def scenario(stage):
        held = [await stage.open(web.url()), await stage.open(other.url())]
        await stage.get(other.url())
        now = await stage.is_true(2, 1, web, other)

        assert [opens(now, "active", server.port) for server in (web, other)] == [1, 1]
        assert [opens(now, "idle", server.port) for server in (web, other)] == [0, 1]
        for response in held:
            await stage.close(response)

    play(scenario)


# -- waiting ---------------------------------------------------------------------------------


def test_pool_timeout(play, web):
    """Two connections and six requests: two are served, four wait, and time out."""

    async def scenario(stage):
        requests = asyncio.ensure_future(stage.at_once([web.url("/slow?0.9")] * 6))
        await stage.until(lambda: web.requests == 2)
        await asyncio.sleep(0.05)
        during = await stage.is_true(2, 0, web, pending=4)
        results = await requests
        now = await stage.is_true(0, 2, web)

        assert sorted(type(result).__name__ for result in results) == ["PoolTimeout"] * 4 + ["int"] * 2
        assert 0.04 < during.value("otel_pools.wait.oldest") < 1
        assert now.checkouts() == {("new", None): 2, ("queued", "timeout"): 4}
        assert now.value("otel_pools.connection.timeouts") == 4
        assert now.value("http.client.request.time_in_queue", error__type="timeout") == 4

    play(scenario, max_connections=2, timeout={"timeout": 5, "pool": 0.5})


def test_waits_add_up(play, web):
    """
    A request that has to stand in line again has waited for both times, once.

    httpcore promises an idle connection to all who wait; those who come second
    go back to the line. httpcore2 2.8 does no more.
    """

    async def scenario(stage):
        first = await stage.open(web.url())
        start = time.monotonic()
        others = asyncio.ensure_future(stage.at_once([web.url("/slow?0.2")] * 2))
        await stage.until(lambda: stage.telemetry.read().value("otel_pools.connection.pending_requests") == 2)
        await asyncio.sleep(0.2)
        await stage.read(first)
        await others
        took = time.monotonic() - start
        now = await stage.is_true(0, 1, web)
        (queued,) = now.points("http.client.request.time_in_queue", otel_pools__checkout__path="queued")

        assert now.checkouts() == {("new", None): 1, ("queued", None): 2}
        # Both wait for 0.2 s, and one for as long as the other takes; on a busy machine all of it is more.
        assert 0.4 < queued.max < took - 0.2
        assert 0.6 < queued.sum < 2 * took - 0.6

    play(scenario, max_connections=1)


def test_oldest_wait_in_a_second_line(play, web):
    """A request that is sent back to the line still waits: its age counts from when it came."""

    async def scenario(stage):
        requests = asyncio.ensure_future(stage.at_once([web.url("/slow?0.3")] * 3))
        await stage.until(lambda: web.requests == 2)
        await asyncio.sleep(0.1)
        now = stage.telemetry.read()
        await requests

        assert now.value("otel_pools.connection.pending_requests") == 1
        assert now.value("otel_pools.wait.oldest") > 0.3

    play(scenario, max_connections=1)


def test_http1_where_http2_was_hoped_for(play, secure):
    """Requests that hoped to share an HTTP/2 connection, and cannot, wait for one of their own; each counts once."""

    async def scenario(stage):
        await stage.at_once([secure.url("/slow?0.05")] * 5)
        now = await stage.is_true(0, secure.open, secure)

        assert now.value("otel_pools.checkouts") == 5
        assert now.value("otel_pools.connection.created") == secure.accepted

    play(scenario, http2=True, max_connections=2)


# -- failure -----------------------------------------------------------------------------------


def test_dropped(play, web):
    """A connection that ends without an answer was obtained, and is closed for an error."""

    async def scenario(stage):
        lost = (stage.lib.RemoteProtocolError, stage.lib.ReadError)
        await stage.fails(lost, web.url("/drop"))
        await stage.get(web.url())
        await stage.fails(lost, web.url("/drop"))
        now = await stage.is_true(0, 0, web)

        assert now.checkouts() == {("new", None): 2, ("idle", None): 1}
        assert now.closed() == {"error": 2}

    play(scenario)


def test_cut(play, web):
    """A body that the server cuts short closes the connection."""

    async def scenario(stage):
        await stage.fails((stage.lib.RemoteProtocolError, stage.lib.ReadError), web.url("/cut"))
        now = await stage.is_true(0, 0, web)

        assert now.checkouts() == {("new", None): 1}
        assert sum(now.closed().values()) == 1
        assert set(now.closed()) <= {"server", "error"}

    play(scenario)


def test_connection_refused(play, web):
    """A server that is not there is a connect error, and no connection."""

    async def scenario(stage):
        for _ in range(3):
            await stage.fails(stage.lib.ConnectError, f"http://127.0.0.1:{webs.free_port()}/")
        now = await stage.is_true(0, 0)

        assert now.checkouts() == {("new", "connect_error"): 3}
        assert now.value("otel_pools.connection.created") == 0

    play(scenario)


def test_connect_timeout(play, ground):
    """A server that does not speak is a connect error after the timeout, and no connection."""

    async def scenario(stage):
        with Server(ground, Silent) as silent:
            await stage.fails(stage.lib.ConnectTimeout, f"https://127.0.0.1:{silent.port}/")
            now = await stage.is_true(0, 0, silent)

        assert now.checkouts() == {("new", "connect_error"): 1}
        assert now.value("otel_pools.connection.timeouts") == 0

    play(scenario, timeout={"timeout": 5, "connect": 0.1})


def test_untrusted(play, secure):
    """A certificate that nobody trusts is a connect error."""

    async def scenario(stage):
        # (httpx 0.24 did not wrap this one under asyncio.)
        await stage.fails((stage.lib.ConnectError, ssl.SSLError), secure.url())
        now = await stage.is_true(0, 0, secure)

        assert now.checkouts() == {("new", "connect_error"): 1}

    play(scenario, verify=ssl.create_default_context())


def test_read_timeout(play, web):
    """An answer that does not come in time: the connection was obtained, and is closed for an error."""

    async def scenario(stage):
        await stage.fails(stage.lib.ReadTimeout, web.url("/slow?2"))
        now = await stage.is_true(0, 0, web)

        assert now.checkouts() == {("new", None): 1}
        assert now.closed() == {"error": 1}

    play(scenario, timeout={"timeout": 5, "read": 0.1})


def test_read_timeout_in_the_body(play, web):
    """A body that stalls ends the connection for an error, too: the server has not closed it."""

    async def scenario(stage):
        await stage.fails(stage.lib.ReadTimeout, web.url("/stall"))
        now = await stage.is_true(0, 0, web)

        assert now.checkouts() == {("new", None): 1}
        assert now.closed() == {"error": 1}

    play(scenario, timeout={"timeout": 5, "read": 0.1})


def test_body_left_unread(play, web):
    """Who closes a response before its end closes the connection; the server did not."""

    async def scenario(stage):
        response = await stage.open(web.url("/stream"))
        await stage.close(response)
        now = await stage.is_true(0, 0, web)

        assert now.closed() == {"closed": 1}

    play(scenario)


# -- cancellation ---------------------------------------------------------------------------------


async def cancel(task):
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


@async_only
def test_cancelled_in_line(play, web):
    """A request cancelled while it waits is a failed wait, and takes nothing with it."""

    async def scenario(stage):
        first = asyncio.create_task(stage.get(web.url("/slow?0.3")))
        await stage.until(lambda: web.requests == 1)
        second = asyncio.create_task(stage.get(web.url()))
        await asyncio.sleep(0.05)
        await cancel(second)
        during = await stage.is_true(1, 0, web)
        await first
        now = await stage.is_true(0, 1, web)

        assert during.value("otel_pools.wait.oldest") == 0
        assert now.checkouts() == {("new", None): 1, ("queued", "cancelled"): 1}

    play(scenario, max_connections=1)


@async_only
def test_cancelled_while_connecting(play, web, monkeypatch):
    """A request cancelled while its connection is opened got none."""

    async def scenario(stage):
        # (Not in TLS: there asyncio's socket is left open, for nobody, by all versions.)
        backend = stage.pool._network_backend
        begun = []

        async def connect_tcp(*_, **__):
            begun.append(1)
            await asyncio.sleep(10)

        with monkeypatch.context() as patch:
            patch.setattr(backend, "connect_tcp", connect_tcp)
            task = asyncio.create_task(stage.get(web.url()))
            await stage.until(lambda: begun)
            await asyncio.sleep(0.05)
            during = stage.telemetry.read()
            await cancel(task)
            if stage.core.__name__ == "httpcore" and stage.version < (1, 0):
                # The place stays taken.
                now = await stage.is_true(1, 0, web, orphaned=1, unborn=1, sockets=0)
            else:
                now = await stage.is_true(0, 0, web)

        assert now.checkouts() == {("new", "cancelled"): 1}
        assert opens(during, "active") == 1  # its place is taken, though it is not open yet

    play(scenario, max_connections=1)


@async_only
def test_cancelled_while_reading(play, web):
    """A request cancelled while it waits for its answer had its connection, which is closed for that."""

    async def scenario(stage):
        task = asyncio.create_task(stage.get(web.url("/slow?2")))
        await stage.until(lambda: web.requests == 1)
        await cancel(task)
        now = await stage.is_true(0, 0, web)

        assert now.checkouts() == {("new", None): 1}
        assert now.closed() == {"error": 1}

    play(scenario)


@async_only
def test_cancelled_in_the_body(play, web):
    """A request cancelled in the middle of a body: the server has not closed that connection."""

    async def scenario(stage):
        task = asyncio.create_task(stage.get(web.url("/stream")))
        await stage.until(lambda: web.requests == 1)
        await asyncio.sleep(0.05)
        await cancel(task)
        now = await stage.is_true(0, 0, web)

        assert now.checkouts() == {("new", None): 1}
        assert set(now.closed()) <= {"error", "closed"}

    play(scenario)


@async_only
def test_cancelled_as_its_turn_comes(play, web):
    """
    A request cancelled in the moment it may connect leaves its place taken, for good, and that is what we say.

    So it is in httpcore (#1093), and was in httpcore2 until 2.6.
    """

    async def scenario(stage):
        async def first():
            await stage.get(web.url("/close"))
            second.cancel()

        one = asyncio.create_task(first())
        await asyncio.sleep(0)
        second = asyncio.create_task(stage.get(web.url()))
        await one
        with pytest.raises(asyncio.CancelledError):
            await second
        if stage.leaks:
            now = await stage.is_true(1, 0, web, orphaned=1, unborn=1, sockets=0)
        else:
            now = await stage.is_true(0, 0, web)

        assert now.checkouts() == {("new", None): 1, ("queued", "cancelled"): 1}

    play(scenario, max_connections=1)


@async_only
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_cancelled_after_every_step(play, web):
    """Requests cancelled after each number of steps of the loop: every attempt counts once, and no number drifts."""

    async def scenario(stage):
        for steps in range(60):
            headers = {"Connection": "close"} if steps % 2 else {}
            task = asyncio.create_task(stage.get(web.url(), headers=headers))
            for _ in range(steps):
                await asyncio.sleep(0)
            await cancel(task)
        gc.collect()
        stage.telemetry.read()
        now = stage.telemetry.read()
        lost = now.value("otel_pools.connection.orphaned")
        under_way = [one for one in stage.pool._requests if not target._has_left(one)]
        served = {id(one.connection) for one in under_way if not one.connection.is_closed()}

        assert 50 <= now.value("otel_pools.checkouts") == now.value("http.client.request.time_in_queue")
        assert now.value("otel_pools.wait.oldest") == 0
        # What is lost has a socket, or has not; what the server sees is what was opened and not closed.
        opened = now.value("otel_pools.connection.created") - sum(now.closed().values())
        assert await asyncio.to_thread(web.settles, opened), (web.open, opened)
        # Some versions lose connections; all of them responses, see the next test.
        assert opens(now, "active") == lost + len(served)
        assert lost == 0 or stage.leaks

    play(scenario)


@async_only
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("steps", range(1, 4))
def test_cancelled_while_closing(play, web, steps):
    """
    A body whose closing is cancelled is nobody's any more.

    httpcore (its shield is none against asyncio's cancellation) keeps the
    request in its list then, for good: if it keeps the connection too, that
    place is an orphan; and the request is none that is active.
    """

    async def scenario(stage):
        response = await stage.open(web.url())
        closing = asyncio.create_task(response.aclose())
        for _ in range(steps):
            await asyncio.sleep(0)
        await cancel(closing)
        closed = response.is_closed
        del response, closing
        gc.collect()
        stage.telemetry.read()
        now = stage.telemetry.read()
        kept = sum(not connection.is_closed() for connection in stage.pool.connections)

        assert closed
        assert opens(now, "active") == kept
        assert now.value("otel_pools.connection.orphaned") == kept
        assert now.value("http.client.active_requests") == 0

    play(scenario)


# -- bodies left open --------------------------------------------------------------------------------


def test_never_closed(play, web):
    """Responses that are dropped and not closed keep their connections; the oldest use tells, and nothing is lost."""

    async def scenario(stage):
        for _ in range(3):
            await stage.open(web.url())
        first = await stage.is_true(3, 0, web)
        await asyncio.sleep(0.05)
        second = await stage.is_true(3, 0, web)

        assert second.value("otel_pools.use.oldest") >= first.value("otel_pools.use.oldest") + 0.05
        assert second.value("otel_pools.wait.oldest") == 0
        assert second.value("http.client.active_requests") == 3

    play(scenario)


# -- many ----------------------------------------------------------------------------------------------


def test_storm(play, web):
    """Eight at once, two thousand requests over five connections: no number drifts."""

    async def scenario(stage):
        errors = []

        def path(number):
            return web.url("/close" if number % 50 == 49 else "/")

        async def work():
            for number in range(250):
                await stage.get(path(number))

        def sync_work():
            for number in range(250):
                try:
                    stage.client.get(path(number))
                except stage.lib.TransportError as error:
                    errors.append(type(error).__name__)

        worker = work if stage.asynchronous else lambda: asyncio.to_thread(sync_work)
        await asyncio.gather(*(worker() for _ in range(8)))
        now = await stage.is_true(0, len(stage.pool.connections), web)

        assert errors == [] or stage.races
        assert now.value("otel_pools.checkouts") == 2000
        assert {error for _, error in now.checkouts()} == {None}
        assert now.value("otel_pools.connection.created") == web.accepted
        assert sum(now.closed().values()) >= 40

    play(scenario, max_connections=5, timeout={"timeout": 3})


def test_many_connections(play, web, record_property):
    """Two hundred connections are counted, active and idle."""

    async def scenario(stage):
        held = [await stage.open(web.url()) for _ in range(200)]
        out = await stage.is_true(200, 0, web)
        start = time.perf_counter()
        target.read(stage.pool, None)
        record_property("milliseconds to read 200 connections", 1000 * (time.perf_counter() - start))
        for response in held:
            await stage.read(response)
        await stage.is_true(0, 200, web)

        assert out.points("otel_pools.connection.max") == []

    play(scenario, max_connections=None, max_keepalive_connections=None, keepalive_expiry=None)


# -- HTTP/2 -----------------------------------------------------------------------------------------------

PRIOR = {"http1": False, "http2": True}


def test_streams(play, web2):
    """Twenty requests on five streams: one connection, fifteen that wait for a stream, and none for the pool."""

    async def scenario(stage):
        await stage.get(web2.url())
        requests = asyncio.ensure_future(stage.at_once([web2.url("/slow?0.25")] * 20))
        await stage.until(lambda: web2.streams == 5)
        await asyncio.sleep(0.1)
        during = await stage.is_true(1, 0, web2)
        await requests
        now = await stage.is_true(0, 1, web2)

        assert (streams(during, "used"), streams(during, "pending")) == (5, 15)
        assert during.value("http.client.active_requests") == 20
        assert during.points("otel_pools.connection.peak") == []
        assert (streams(now, "used"), streams(now, "pending")) == (0, 0)
        assert now.value("otel_pools.stream.max") == 5
        assert now.checkouts() == {("new", None): 1, ("idle", None): 20}
        assert web2.most_streams == 5
        assert web2.accepted == 1

    play(scenario, **PRIOR)


def test_streams_from_cold(play, web2):
    """Twenty requests at once, before the server has said how many it takes: one connection all the same."""

    async def scenario(stage):
        await stage.at_once([web2.url("/slow?0.05")] * 20)
        now = await stage.is_true(0, 1, web2)

        assert now.value("otel_pools.checkouts") == 20
        assert now.value("otel_pools.connection.created") == web2.accepted == 1

    play(scenario, **PRIOR)


def test_stream_reset(play, web2):
    """A stream that the server resets fails its request alone; the connection stays."""

    async def scenario(stage):
        await stage.fails(stage.lib.RemoteProtocolError, web2.url("/reset"))
        await stage.get(web2.url())
        now = await stage.is_true(0, 1, web2)

        assert now.checkouts() == {("new", None): 1, ("idle", None): 1}
        assert now.closed() == {}

    play(scenario, **PRIOR)


def test_goaway_under_way(play, web2):
    """GOAWAY under a request closes the connection for that reason (and httpcore fails the request in any case)."""

    async def scenario(stage):
        request = asyncio.ensure_future(stage.get(web2.url("/slow?0.2")))
        await stage.until(lambda: web2.streams == 1)
        web2.goaway()
        with suppress(stage.lib.RemoteProtocolError):
            await request
        during = await stage.is_true(0, 0, web2)
        await stage.get(web2.url())
        now = await stage.is_true(0, 1, web2)

        assert during.closed() == {"goaway": 1}
        assert now.checkouts() == {("new", None): 2}

    play(scenario, **PRIOR)


def test_goaway_while_idle(play, web2):
    """A GOAWAY that came in the meantime is found by the next request, and is why the connection is closed."""

    async def scenario(stage):
        await stage.get(web2.url())
        web2.goaway()
        with suppress(stage.lib.RemoteProtocolError, stage.lib.ReadError):
            await stage.get(web2.url())
        await stage.get(web2.url())
        now = await stage.is_true(0, 1, web2)

        assert now.closed() == {"goaway": 1}
        assert now.value("otel_pools.connection.created") == web2.accepted == 2

    play(scenario, **PRIOR)


def test_http2_by_alpn(play, ground, certificates):
    """Over TLS the two sides agree on HTTP/2, and its streams are told."""

    async def scenario(stage):
        with Server(ground, HTTP2, certificates.of_server("h2")) as secure2:
            held = [await stage.open(secure2.url("/stream")) for _ in range(3)]
            during = await stage.is_true(1, 0, secure2)
            for response in held:
                await stage.close(response)
            now = await stage.is_true(0, 1, secure2)
            await stage.shut()

        assert (streams(during, "used"), during.value("otel_pools.stream.max")) == (3, 5)
        (point,) = now.points("http.client.open_connections", http__connection__state="idle")
        assert point.attributes[words.SCHEME] == "https"

    play(scenario, http2=True)


# -- proxies ------------------------------------------------------------------------------------------------


@pytest.fixture
def proxy(ground):
    with Server(ground, HTTPProxy) as server:
        yield server


def test_forward_proxy(play, proxy):
    """Through a proxy, the connection is the proxy's and counts for where it leads."""

    async def scenario(stage):
        for _ in range(2):
            await stage.get("http://shop.example/")
        held = await stage.open("http://shop.example:8080/")
        now = await stage.is_true(1, 1, proxy, sockets=2)
        await stage.read(held)
        await stage.is_true(0, 2, proxy, sockets=2)

        assert {point.attributes[words.ADDRESS] for point in now.points("http.client.open_connections")} == {
            "shop.example"
        }
        assert now.checkouts() == {("new", None): 2, ("idle", None): 1}

    play_through(play, scenario, proxy)


def test_tunnel(play, proxy, secure):
    """A tunnel is one connection, at the proxy and behind it."""

    async def scenario(stage):
        for _ in range(2):
            await stage.get(secure.url())
        now = await stage.is_true(0, 1, secure, proxy, sockets=1)
        assert now.checkouts() == {("new", None): 1, ("idle", None): 1}

        await stage.get(secure.url("/close"))
        now = await stage.is_true(0, 0, secure, proxy)

        assert now.closed() == {"server": 1}

    play_through(play, scenario, proxy)


def test_proxy_down(play, ground):
    """A proxy that is not there is a connect error, for http and for https."""

    async def scenario(stage):
        await stage.fails(stage.lib.ConnectError, "http://shop.example/")
        await stage.fails(stage.lib.ConnectError, "https://shop.example/")
        now = await stage.is_true(0, 0)

        assert now.checkouts() == {("new", "connect_error"): 2}
        assert now.value("otel_pools.connection.created") == 0

    play(scenario, proxy=f"http://127.0.0.1:{webs.free_port()}")


def test_tunnel_refused(play, proxy, secure):
    """A proxy that will not open the tunnel: there is no connection to be had."""

    async def scenario(stage):
        proxy.refuses = True
        await stage.fails(stage.lib.ProxyError, secure.url())
        now = await stage.is_true(0, 0, secure, proxy)

        assert len(stage.pool.connections) == 0
        assert now.checkouts() == {("new", "connect_error"): 1}

    play_through(play, scenario, proxy)


def test_tunnel_without_tls(play, proxy, secure):
    """
    TLS that fails behind the proxy leaves its place in the pool taken for good: an orphan, and no socket.

    So it is up to httpcore 1.0.9 and httpcore2 2.16.
    """

    async def scenario(stage):
        proxy.garbles = True
        await stage.fails((stage.lib.ConnectError, ssl.SSLError), secure.url())
        slots = len(stage.pool.connections)
        gc.collect()
        stage.telemetry.read()
        now = stage.telemetry.read()

        assert opens(now, "active") == now.value("otel_pools.connection.orphaned") == slots
        assert slots == 1
        assert now.checkouts() == {("new", "connect_error"): 1}
        assert await asyncio.to_thread(proxy.settles, 0)
        assert now.value("otel_pools.use.oldest") == now.value("http.client.active_requests") == 0

    play_through(play, scenario, proxy)


def play_through(play, scenario, proxy, **options):
    play(scenario, proxy=f"http://user:s3cret@127.0.0.1:{proxy.port}", **options)


def test_socks(play, ground, web, secure):
    """Through SOCKS5, to http and https."""
    pytest.importorskip("socksio")

    async def scenario(stage):
        for _ in range(2):
            await stage.get(web.url())
            await stage.get(secure.url())
        now = await stage.is_true(0, 2, web, secure)

        assert now.checkouts() == {("new", None): 2, ("idle", None): 2}
        assert socks.settles(2)
        await stage.get(web.url("/close"))
        now = await stage.is_true(0, 1, web, secure)
        assert now.closed() == {"server": 1}

    with Server(ground, SOCKS5) as socks:
        play(scenario, proxy=f"socks5://127.0.0.1:{socks.port}")


def test_socks_down(play):
    """A SOCKS5 proxy that is not there is a connect error."""
    pytest.importorskip("socksio")

    async def scenario(stage):
        await stage.fails(stage.lib.ConnectError, "http://127.0.0.1:1/")
        now = await stage.is_true(0, 0)

        assert now.checkouts() == {("new", "connect_error"): 1}

    play(scenario, proxy=f"socks5://127.0.0.1:{webs.free_port()}")


def test_mounts(play, web, other):
    """Each transport of a client is a pool of its own, with its own name and limit."""

    async def scenario(stage):
        await stage.get(web.url())
        await stage.get(other.url())
        now = await stage.is_true(0, 2, web, other)

        limits = now.points("otel_pools.connection.max")
        assert {point.attributes[words.OUR_POOL]: point.value for point in limits} == {
            f"127.0.0.1:{web.port}": 7,
            f"127.0.0.1:{other.port}": 3,
        }

    play(scenario, max_connections=7, mounts={f"http://127.0.0.1:{other.port}": {"max_connections": 3}})


# -- the end ------------------------------------------------------------------------------------------------


def test_closed_client(play, web):
    """Closing the client closes its connections, and tells why; the pool has nothing then."""

    async def scenario(stage):
        await stage.at_once([web.url("/slow?0.1")] * 3)
        await stage.shut()
        if not stage.tells_reasons:
            await asyncio.sleep(0.1)  # a thread may still let go of an answer, and with it of a connection
        now = await stage.is_true(0, 0, web)

        assert now.closed() == stage.reasons(dispose=3)

    play(scenario)


def test_closed_under_a_request(play, web):
    """Closing the client under a request closes a connection once, and creates none."""

    async def scenario(stage):
        await stage.get(web.url())
        request = asyncio.ensure_future(stage.get(web.url("/slow?0.5")))
        await stage.until(lambda: web.requests == 2)
        pool = stage.pool
        await stage.call(pool.aclose if stage.asynchronous else pool.close)
        with suppress(stage.lib.TransportError, AssertionError):
            await request
        now = await stage.is_true(0, 0, web)

        assert now.value("otel_pools.connection.created") == web.accepted == 1
        assert sum(now.closed().values()) == 1

    play(scenario)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_dropped_client(play, web, flavour, telemetry):
    """A client that is dropped and not closed takes its connections with it, and reports nothing any more."""

    async def scenario(stage):
        kept = stage.client
        stage.start()
        await stage.get(web.url())
        stage.client = kept
        gc.collect()
        await asyncio.sleep(0.05)
        gc.collect()
        now = await stage.is_true(0, 0, web)

        assert now.closed() == {"closed": 1}
        assert now.points("http.client.open_connections") == []
        assert now.points("otel_pools.connection.max") == []
        assert now.value("otel_pools.pools") == 0

    play(scenario)


# -- other worlds ----------------------------------------------------------------------------------------------


@async_only
def test_trio(web, flavour, telemetry, certificates):
    """Under trio it is the same."""
    trio = pytest.importorskip("trio")
    otel_pools.instrument("httpx", meter_provider=telemetry.meter_provider)
    stage = Stage(flavour, telemetry, certificates.trusted)
    seen = []

    async def main():
        stage.start(max_connections=1)
        async with stage.client as client:
            await client.get(web.url())
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.get, web.url("/slow?0.1"))
                await trio.sleep(0.05)
                with trio.move_on_after(0.02):
                    await client.get(web.url())
            seen.append(telemetry.read())

    trio.run(main)
    gc.collect()  # up to httpcore 1.0.2 an answer holds its connection
    now = telemetry.read()

    assert (opens(seen[0], "active"), opens(seen[0], "idle")) == (0, 1)
    assert now.checkouts() == {("new", None): 1, ("idle", None): 1, ("queued", "cancelled"): 1}
    assert now.closed() == stage.reasons(dispose=1)
    assert web.settles(0)


@sync_only
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_fork(play, web):
    """A child counts the connections it has inherited as it finds them, and only what it has done itself."""

    async def scenario(stage):
        await stage.get(web.url())
        ours, theirs = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: there are threads
            child = os.fork()
        if child == 0:
            try:
                before = stage.telemetry.read()
                stage.start()
                stage.client.get(web.url())
                after = stage.telemetry.read()
                numbers = [opens(before), opens(after), after.value("otel_pools.connection.created")]
                os.write(theirs, repr([int(number) for number in numbers]).encode())
            finally:
                os._exit(0)
        os.close(theirs)
        told = await asyncio.to_thread(os.read, ours, 100)
        os.close(ours)
        os.waitpid(child, 0)
        now = await stage.is_true(0, 1, web)

        assert told == b"[1, 2, 1]"
        assert now.value("otel_pools.connection.created") == 1

    play(scenario)


@sync_only
def test_finalised_inside_a_collection(play, web, monkeypatch):
    """
    Bodies that are closed while the SDK holds its locks block nothing, and count.

    That is what a garbage collection in the midst of a collection of metrics does.
    """
    reservoirs = importlib.import_module("opentelemetry.sdk.metrics._internal.exemplar.exemplar_reservoir")
    held = []
    original = reservoirs.FixedSizeExemplarReservoirABC.collect

    def collect(reservoir, attributes):
        while held:
            held.pop().close()
        return original(reservoir, attributes)

    monkeypatch.setattr(reservoirs.FixedSizeExemplarReservoirABC, "collect", collect)

    async def scenario(stage):
        def work():
            for _ in range(1000):
                response = stage.client.send(stage.client.build_request("GET", web.url()), stream=True)
                response._elapsed = None
                held.append(response)
                stage.telemetry.read()
                assert not held

        await asyncio.wait_for(asyncio.to_thread(work), 60)
        now = await stage.is_true(0, 0, web)

        assert now.value("otel_pools.checkouts") == 1000

    play(scenario)
