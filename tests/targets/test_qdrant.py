"""The target for qdrant-client: who its pools are, when there is one, how it attaches; numbers have their own file."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.util
import inspect
import json
import logging
import subprocess
import sys
import textwrap
import threading

import pytest
import qdrants

if not qdrants.available():
    pytest.skip("qdrant-client, or what our server is made of, is not installed", allow_module_level=True)

import grpc
import httpx
import qdrant_client
from qdrant_client import async_qdrant_remote, qdrant_remote
from qdrants import HOST, Server

import otel_pools
from otel_pools import _guard
from otel_pools import _vocabulary as words
from otel_pools._model import Identity
from otel_pools.targets import _channelz
from otel_pools.targets import qdrant as target
from otel_pools.testing import PoolContract, Telemetry, _hooked

# Since 1.13 a client asks for the server's version by a request of its own, which is none of a pool's.
QUIET = (
    {"check_compatibility": False}
    if "check_compatibility" in inspect.signature(qdrant_remote.QdrantRemote.__init__).parameters
    else {}
)
# To read the authorities that everybody trusts takes longer than most tests.
PLAIN = {"verify": False}
# From 1.16 on a client has many.
CHANNELS = getattr(qdrant_remote.QdrantRemote, "DEFAULT_GRPC_POOL_SIZE", 1)
CLASSES = (qdrant_remote.QdrantRemote, async_qdrant_remote.AsyncQdrantRemote)
LIMITS = httpx.Limits(max_connections=2, max_keepalive_connections=2)
needs_books = pytest.mark.skipif(not _channelz.OPEN, reason="the books of this version of gRPC are closed to us")
QUEUE = {"db.client.connection.pending_requests", "otel_pools.stream.count"}
STATES = ["idle", "connecting", "ready", "transient_failure", "shutdown"]


@pytest.fixture(scope="module")
def server():
    with Server() as server:
        yield server


class World:
    """Clients of one kind, sync or asyncio, and what is done with them; all of it in one event loop."""

    def __init__(self, kind, server, loop):
        self.kind, self.server, self.loop = kind, server, loop
        self.opened = []

    @property
    def asynchronous(self):
        return self.kind is qdrant_client.AsyncQdrantClient

    def do(self, result):
        async def wait():
            return await result

        return self.loop.run_until_complete(wait()) if inspect.isawaitable(result) else result

    def made(self, **options):
        """A client that is not closed in the end."""
        at = {"host": HOST, "port": self.server.port, "grpc_port": self.server.grpc_port}
        if options.keys() & {"host", "url"}:
            del at["host"]
        return self.kind(**{**at, "prefer_grpc": True, "timeout": 60, **PLAIN, **QUIET, **options})

    def client(self, **options):
        self.opened.append(self.made(**options))
        return self.opened[-1]

    def ask(self, client, times=1):
        for _ in range(times):
            self.do(client.get_collections())

    def close(self, client):
        self.do(client.close())

    def end(self):
        """Close all, and leave nothing to the next test even if that fails."""
        with contextlib.ExitStack() as stack:
            stack.callback(gc.collect)
            while self.opened:
                stack.callback(self.close, self.opened.pop())


@pytest.fixture
def loop():
    loop = asyncio.new_event_loop()
    yield loop
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


@pytest.fixture(params=[qdrant_client.QdrantClient, qdrant_client.AsyncQdrantClient], ids=["sync", "asyncio"])
def world(request, server, loop):
    """Each kind of client."""
    world = World(request.param, server, loop)
    yield world
    world.end()


@pytest.fixture
def sync(server, loop):
    """The sync kind alone."""
    world = World(qdrant_client.QdrantClient, server, loop)
    yield world
    world.end()


@pytest.fixture
def watched(telemetry):
    gc.collect()  # clients of an earlier test would be found, and rightly counted
    watch(telemetry)


def watch(telemetry, *targets, **options):
    otel_pools.instrument(
        *(targets or ("httpx", "qdrant")),
        meter_provider=telemetry.meter_provider,
        tracer_provider=telemetry.tracer_provider,
        **options,
    )


def channels(now, **where):
    """How many gRPC channels there are, by state, zeros left out."""
    points = now.points("otel_pools.grpc.channels", **where)
    return {point.attributes[words.GRPC_STATE]: point.value for point in points if point.value}


def names(now, metric="otel_pools.pools"):
    """The names of the pools that are there, by the ports of their servers."""
    return {point.attributes[words.PORT]: point.attributes[words.OUR_POOL] for point in now.points(metric)}


class Books:
    """A stand-in for gRPC's compiled module, around the real one: what it says can be changed on the way."""

    def __init__(self, **changes):
        self._changes = changes

    def __getattr__(self, name):
        ask = getattr(REAL, name)
        change = self._changes.get(name.removeprefix("channelz_get_"))
        return ask if change is None else lambda *args: change(ask(*args))


REAL = _channelz.cygrpc


# -- the contract, for REST -----------------------------------------------------------


class OnServer(PoolContract):
    """The HTTP pool of a client, which the target for httpx watches and this one names."""

    target = "httpx"
    exhausted = httpx.PoolTimeout
    kind = None

    @pytest.fixture(autouse=True)
    def _server(self, server, _watched):
        self.server = server

    def instrument(self, telemetry, **options):
        watch(telemetry, **options)

    def make(self):
        return self.kind(host=HOST, port=self.server.port, limits=LIMITS, **QUIET)

    def asked(self, client):
        # No call of the client's own leaves its connection out.
        return client.build_request("GET", self.server.url, timeout=httpx.Timeout(5, pool=0.02))


class TestRest(OnServer):
    """A QdrantClient."""

    kind = qdrant_client.QdrantClient

    def open(self):
        return self.make()

    def borrow(self, pool):
        client = pool._client.openapi_client.client._client
        return client.send(self.asked(client), stream=True)

    def give_back(self, pool, held):
        held.read()

    def shut(self, pool):
        pool.close()


class TestAsyncRest(OnServer):
    """An AsyncQdrantClient."""

    kind = qdrant_client.AsyncQdrantClient

    async def open(self):
        return self.make()

    async def borrow(self, pool):
        client = pool._client.openapi_client.client._async_client
        return await client.send(self.asked(client), stream=True)

    async def give_back(self, pool, held):
        await held.aread()

    async def shut(self, pool):
        await pool.close()


# -- who a pool is ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "host", "port"),
    [
        ({"host": "db"}, "db", 6334),
        ({"host": "db", "port": 7333, "grpc_port": 7334}, "db", 7334),
        ({"url": "http://db.example"}, "db.example", 6334),
        ({"url": "http://db.example:7333/private/path", "grpc_port": 7334}, "db.example", 7334),
        ({"url": "https://db.example", "api_key": "s3cret"}, "db.example", 6334),
        ({"url": "localhost:7333"}, "localhost", 6334),
        ({}, "localhost", 6334),
    ],
)
def test_a_pool_is_its_server(world, options, host, port):
    """Without a name it is called after its server and gRPC's port; nothing else of an address or a key is kept."""
    client = world.kind(**options, **QUIET)

    pool, *_ = target.pools_of(client)
    who = target.identify(pool)
    world.close(client)

    assert who == Identity("qdrant", "qdrant", None, None, host, port)
    assert who.name == f"{host}:{port}"
    assert [word for word in ("s3cret", "private", "7333") if word in repr((who, pool))] == []


def test_both_pools_are_qdrants(world, watched, telemetry, server):
    """The gRPC pool and the REST pool are told apart by their ports, and both carry Qdrant's system and the host."""
    world.ask(world.client())
    world.ask(world.client(prefer_grpc=False))
    points = telemetry.points("otel_pools.pools")

    assert {point.attributes[words.PORT]: dict(point.attributes) for point in points} == {
        port: {words.OUR_POOL: f"{HOST}:{port}", words.SYSTEM: "qdrant", words.ADDRESS: HOST, words.PORT: port}
        for port in (server.grpc_port, server.port)
    }


def test_a_rest_pool_has_no_metric_of_http_clients(world, watched, telemetry):
    """What a REST pool tells is in the words of databases alone."""
    world.ask(world.client(prefer_grpc=False))
    now = telemetry.read()

    assert now.value("db.client.connection.create_time") == now.value("db.client.connection.wait_time") == 1
    assert [name for name in now.metrics if name.startswith("http.")] == []
    assert now.points("otel_pools.connection.pending_requests") == []


@pytest.mark.parametrize("moment", ["before", "after", "later"])
def test_a_user_names_a_client(world, telemetry, server, moment):
    """A name given to a client is that of both its pools, given before we came, before its first call or after."""
    client = world.client()
    if moment == "before":
        otel_pools.name_pool(client, "vectors")
    watch(telemetry)
    if moment == "after":
        otel_pools.name_pool(client, "vectors")
    world.ask(client)
    by_rest = client._client.openapi_client
    world.do(by_rest.collections_api.get_collections())
    if moment == "later":
        telemetry.read()
        otel_pools.name_pool(client, "vectors")
    now = telemetry.read()

    assert names(now) == {server.grpc_port: "vectors", server.port: "vectors"}


@needs_books
def test_calls_after_a_new_name_are_counted_under_it(world, watched, telemetry):
    """A pool that gets its name late takes its channels along, and no call is counted under both names."""
    client = world.client()
    world.ask(client, 3)
    telemetry.read()
    otel_pools.name_pool(client, "vectors")
    world.ask(client, 2)
    now = telemetry.read()

    assert now.value("otel_pools.checkouts") == 5
    assert now.value("otel_pools.checkouts", otel_pools__pool__name="vectors") == 2
    assert sum(channels(now, otel_pools__pool__name="vectors").values()) == CHANNELS
    assert now.value("otel_pools.pools") == 1


def test_settings_name_a_pool(world, telemetry, server, monkeypatch):
    """OTEL_POOLS_NAMES names the pool of a host and port."""
    monkeypatch.setenv("OTEL_POOLS_NAMES", f"{HOST}:{server.grpc_port}=vectors,{HOST}:{server.port}=rest")
    watch(telemetry)
    world.ask(world.client())
    world.ask(world.client(prefer_grpc=False))

    assert names(telemetry.read()) == {server.grpc_port: "vectors", server.port: "rest"}


@needs_books
def test_an_ipv6_address_is_found_in_the_books(world, watched, telemetry):
    """A server by its IPv6 address is told like any other."""
    client = world.client(url="http://[::1]:1", grpc_port=1)
    with pytest.raises(Exception, match=r"UNAVAILABLE|DEADLINE_EXCEEDED|failed to connect"):
        world.ask(client)
    now = telemetry.read()

    assert now.value("otel_pools.checkouts", error__type=words.OTHER) == 1
    assert sum(channels(now).values()) == CHANNELS
    assert names(now) == {1: "[::1]:1"}


@pytest.mark.parametrize("thing", [object(), "http://db", None])
def test_what_has_no_pool_cannot_be_named(thing):
    """A TypeError says so."""
    with pytest.raises(TypeError, match="neither a client of a server nor its remote"):
        target.pools_of(thing)
    with pytest.raises(TypeError, match="no pool we know"):
        otel_pools.name_pool(thing, "mine")


def test_a_client_has_both_its_pools(world):
    """A client, and what it is made of, has its server and its HTTP pool."""
    client = world.client()

    for thing in (client, client._client):
        pool, http = target.pools_of(thing)
        assert isinstance(pool, target.Server)
        assert hasattr(http, "create_connection")


def test_it_says_what_it_is(world, server):
    """A server and the books are one sentence each."""
    client = world.client()
    pool, *_ = target.pools_of(client)

    assert repr(pool) == f"<Server {HOST}:{server.grpc_port} [1 clients]>"
    assert repr(_channelz.Books()) == "<Books of 0 servers, read up to channel 0>"


# -- which pools there are --------------------------------------------------------------


def test_a_client_by_rest_has_no_grpc_pool(world, watched, telemetry, server):
    """A client that never calls by gRPC has no gRPC pool to tell."""
    world.ask(world.client(prefer_grpc=False))
    now = telemetry.read()

    assert names(now) == {server.port: f"{HOST}:{server.port}"}
    assert channels(now) == {}
    assert now.points("otel_pools.grpc.channels") == []


def test_a_client_by_grpc_has_no_rest_pool(world, watched, telemetry, server):
    """A client that never calls by REST has no HTTP pool to tell."""
    world.ask(world.client())

    assert names(telemetry.read()) == {server.grpc_port: f"{HOST}:{server.grpc_port}"}


def test_an_unused_client_is_nobody(world, watched, telemetry):
    """A client that was made and has called nobody is not told."""
    world.client()

    assert telemetry.metrics() == []


@pytest.mark.parametrize("where", ["memory", "path"])
def test_no_server_no_pool(world, watched, telemetry, caplog, tmp_path, where):  # noqa: PLR0917  # fixtures
    """A client in local mode has nothing that is told, logged or named."""
    client = world.kind(":memory:") if where == "memory" else world.kind(path=str(tmp_path / "points"))
    world.ask(client)
    with pytest.raises(TypeError, match="no pool we know"):
        otel_pools.name_pool(client, "mine")

    assert telemetry.metrics() == []
    assert caplog.text == ""
    world.close(client)


@needs_books
def test_a_client_from_before(world, telemetry, server):
    """A client that was made and has called before we came is found, with its connection and its channels."""
    client, unused = world.client(), world.client(prefer_grpc=False)
    world.ask(client)
    watch(telemetry)
    now = telemetry.read()

    assert (now.count("used"), now.count("idle")) == (0, 1)
    assert sum(channels(now).values()) == CHANNELS
    assert names(now) == {server.grpc_port: f"{HOST}:{server.grpc_port}"}
    assert unused


def test_a_closed_client_from_before(world, telemetry):
    """A client that was closed before we came is not found."""
    client = world.made()
    world.ask(client)
    world.close(client)
    watch(telemetry)

    assert telemetry.points("otel_pools.pools") == []
    assert client


@needs_books
def test_a_closed_client_is_silent(world, watched, telemetry):
    """The last client that is closed takes its pool along; the calls it made since the last collection are counted."""
    client = world.made()
    world.ask(client, 2)
    telemetry.read()
    world.ask(client, 3)
    world.close(client)
    world.close(client)
    now = telemetry.read()

    assert now.value("otel_pools.checkouts") == 5
    assert set(now.metrics) == {"otel_pools.checkouts", "otel_pools.samples.dropped"}


def test_a_collected_client_is_silent(world, watched, telemetry):
    """A client that was dropped and not closed takes its pool along."""
    client = world.made()
    world.ask(client)
    before = telemetry.read()
    with contextlib.suppress(AttributeError):
        world.do(client._client.openapi_client.aclose())  # its HTTP client alone
    del client
    gc.collect()
    now = telemetry.read()

    assert names(before)
    assert set(now.metrics) <= {"otel_pools.checkouts", "otel_pools.samples.dropped"}
    assert target._servers == {}
    assert repr(target._books).startswith("<Books of 0 servers")


@needs_books
def test_two_clients_of_a_server_are_one_pool(world, watched, telemetry):
    """Clients of one server are one pool with the channels of both; when one is closed the other goes on."""
    one, other = world.client(), world.client()
    world.ask(one, 2)
    world.ask(other, 3)
    both = telemetry.read()
    world.close(one)
    gc.collect()
    left = telemetry.read()
    world.ask(other)
    after = telemetry.read()

    assert (both.value("otel_pools.pools"), left.value("otel_pools.pools")) == (1, 1)
    assert sum(channels(both).values()) == 2 * CHANNELS
    assert [now.value("otel_pools.checkouts") for now in (both, left, after)] == [5, 5, 6]
    assert left.value("otel_pools.grpc.channels", otel_pools__grpc__state="ready") >= 1


@needs_books
def test_a_client_after_another_is_a_pool_of_its_own(world, watched, telemetry):
    """A client that is made when the last one of its server is gone counts on, and tells its own channels."""
    first = world.made()
    world.ask(first, 2)
    world.close(first)
    del first
    gc.collect()
    world.ask(world.client(), 3)
    now = telemetry.read()

    assert now.value("otel_pools.checkouts") == 5
    assert now.value("otel_pools.pools") == 1
    assert sum(channels(now).values()) == CHANNELS


# -- what is told, and what is not --------------------------------------------------------


@needs_books
def test_what_nobody_can_see_is_not_told(world, watched, telemetry):
    """Of a gRPC pool no wait, age, peak, timeout, limit or creation is told, as a zero would be a guess."""
    world.ask(world.client())

    assert set(telemetry.read().metrics) == {
        "db.client.connection.count",
        "otel_pools.checkouts",
        "otel_pools.grpc.channels",
        "otel_pools.pools",
        "otel_pools.samples.dropped",
    } | (QUEUE if _channelz.QUEUES else set())


@needs_books
def test_calls_have_no_path(world, watched, telemetry):
    """How a call got its connection nobody knows, so that no path is told."""
    world.ask(world.client())

    (point,) = telemetry.points("otel_pools.checkouts")
    assert (point.value, words.PATH in point.attributes) == (1, False)


def test_every_state_is_told(world, watched, telemetry):
    """All states of channels are told, those in which there is none as zero."""
    world.ask(world.client())

    points = telemetry.points("otel_pools.grpc.channels")
    assert [point.attributes[words.GRPC_STATE] for point in points] == STATES
    assert sum(point.value for point in points) == CHANNELS


def test_everything_is_in_the_vocabulary(world, watched, telemetry):
    """Every metric that arrives has the name, unit and attributes of a row."""
    world.ask(world.client())
    world.ask(world.client(prefer_grpc=False))
    rows = {row.name: row for row in words.METRICS}
    identity = {words.SYSTEM, words.ADDRESS, words.PORT}

    metrics = telemetry.metrics()

    assert metrics
    for metric in metrics:
        row = rows[metric.name]
        assert (metric.unit, metric.description) == (row.unit, row.description)
        for point in metric.data.data_points:
            assert row.pool_key in point.attributes
            assert set(point.attributes) <= identity | {row.pool_key, *row.keys}


def test_the_key_is_nowhere(world, watched, telemetry, caplog):
    """No API key, path or header is in any metric, log line or sentence."""
    client = world.client(
        url=f"http://{HOST}:{world.server.port}/private", metadata={"api-key": "s3cret", "x-token": "t0ken"}
    )
    world.ask(client)
    told = repr([metric.to_json() for metric in telemetry.metrics()]) + caplog.text
    told += repr([*otel_pools.QdrantPoolInstrumentor._registry.pools(), *target._servers.values(), target._books])

    assert HOST in told
    assert [word for word in ("s3cret", "t0ken", "private") if word in told] == []


def test_no_keep_alive_is_said_once(sync, watched, caplog):
    """That a client of this machine keeps no connection open is said once, and not of one that has limits."""
    caplog.set_level(logging.INFO, "otel_pools")
    sync.client(prefer_grpc=False, limits=LIMITS)
    with_limits = caplog.text
    for _ in range(2):
        sync.client(prefer_grpc=False)

    assert with_limits == ""
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert f"keeps no HTTP connection to {HOST} open" in record.getMessage()
    assert "limits=httpx.Limits(...)" in record.getMessage()


# -- how it attaches ----------------------------------------------------------------------


def test_every_row_finds_its_method(caplog):
    """Each version has every method that we need."""
    otel_pools.instrument("qdrant")

    assert caplog.text == ""


def test_uninstrument_leaves_the_very_functions():
    """Every hooked attribute is, before and after, the same object."""
    bare = _hooked("qdrant")
    otel_pools.instrument("qdrant")
    twins = _hooked("qdrant")
    otel_pools.uninstrument("qdrant")

    assert len(bare) == 4
    assert all(twin is not original for twin, original in zip(twins, bare, strict=True))
    assert all(one is other for one, other in zip(bare, _hooked("qdrant"), strict=True))


def test_nothing_of_ours_is_on_the_way():
    """Only making and closing a client comes by us; no method that calls does, nor anything of gRPC's."""
    kinds = (*CLASSES, grpc.Channel, type(grpc.insecure_channel), grpc.aio.Channel)
    before = [dict(vars(kind)) for kind in kinds]
    factories = qdrant_remote.get_channel, async_qdrant_remote.get_channel
    otel_pools.instrument("qdrant")
    changed = [
        {name for name, value in vars(kind).items() if value is not had.get(name)}
        for kind, had in zip(kinds, before, strict=True)
    ]

    assert changed == [{"__init__", "close"}, {"__init__", "close"}, set(), set(), set()]
    assert (qdrant_remote.get_channel, async_qdrant_remote.get_channel) == factories


def test_coroutines_stay_coroutines():
    """Closing an asyncio client is a coroutine function as before, and closing a sync one is none."""
    otel_pools.instrument("qdrant")

    assert [inspect.iscoroutinefunction(kind.close) for kind in CLASSES] == [False, True]


@needs_books
def test_uninstrument_lets_go(world, watched, telemetry):
    """After uninstrument nothing is told and clients work; with us again, they are told and no call counts twice."""
    client = world.client()
    world.ask(client, 3)
    telemetry.read()
    otel_pools.uninstrument()
    otel_pools.uninstrument()
    silent = telemetry.metrics()
    watch(telemetry)
    world.ask(client, 2)
    now = telemetry.read()

    assert silent == []
    assert now.value("otel_pools.checkouts") == 2
    assert sum(channels(now).values()) == CHANNELS


@needs_books
def test_calls_from_before_are_not_counted(world, telemetry):
    """What was called before we came, or while we were away, is not counted as if it happened now."""
    client = world.client()
    world.ask(client, 3)
    watch(telemetry)
    first = telemetry.read()
    world.ask(client)
    second = telemetry.read()
    otel_pools.uninstrument()
    world.ask(client, 3)
    watch(telemetry)
    world.ask(client)
    third = telemetry.read()

    assert [now.value("otel_pools.checkouts") for now in (first, second, third)] == [0, 1, 1]


def test_a_client_made_meanwhile(world, watched, telemetry):
    """A client that was made while we were away, of a server that we knew, is told when we are back."""
    world.ask(world.client())
    telemetry.read()
    otel_pools.uninstrument()
    world.ask(world.client())
    watch(telemetry)
    now = telemetry.read()

    assert sum(channels(now).values()) == 2 * CHANNELS


def test_without_the_target_for_httpx(world, telemetry, server):
    """With this target alone only gRPC is told, as HTTP pools are those of the other one."""
    watch(telemetry, "qdrant")
    world.ask(world.client())
    world.ask(world.client(prefer_grpc=False))

    assert names(telemetry.read()) == {server.grpc_port: f"{HOST}:{server.grpc_port}"}


def test_without_this_target(world, telemetry, server):
    """With the one for httpx alone a REST pool is an HTTP pool like any other, and gRPC is not told."""
    watch(telemetry, "httpx")
    world.ask(world.client())
    world.ask(world.client(prefer_grpc=False))
    now = telemetry.read()

    assert names(now) == {server.port: f"{HOST}:{server.port}"}
    assert now.points("http.client.request.time_in_queue")
    assert [name for name in now.metrics if name.startswith("db.")] == []


def test_this_target_before_the_one_for_httpx(world, telemetry, server):
    """Whichever target comes first, a REST pool that was there before is Qdrant's."""
    client = world.client(prefer_grpc=False, limits=LIMITS)
    world.ask(client)
    watch(telemetry, "qdrant")
    watch(telemetry, "httpx")
    now = telemetry.read()

    assert now.value("db.client.connection.count", server__port=server.port) == 1
    assert [name for name in now.metrics if name.startswith("http.")] == []


def in_a_new_process(code, *args, seconds=60):
    """Run this in a fresh interpreter; it prints what it found, and must say nothing else."""
    script = textwrap.dedent(code)
    command = [sys.executable, "-W", "error", "-c", script, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_before_the_library_is_imported(server):
    """Instrumenting imports neither qdrant-client nor gRPC; clients that are made later are told, to the very exit."""
    found = in_a_new_process(
        """
        import sys
        import otel_pools
        from otel_pools.testing import Telemetry

        telemetry = Telemetry()
        otel_pools.instrument("qdrant", meter_provider=telemetry.meter_provider)
        print(sys.modules.keys() & {"qdrant_client", "grpc", "httpx"} or "none")
        import qdrant_client

        client = qdrant_client.QdrantClient(
            host="127.0.0.1", grpc_port=int(sys.argv[1]), prefer_grpc=True, **eval(sys.argv[2])
        )
        client.get_collections()
        print(telemetry.value("otel_pools.pools"), telemetry.value("otel_pools.grpc.channels"))
        """,
        server.grpc_port,
        QUIET,
    )

    assert found == ["none", "1.0", f"{CHANNELS}.0"]


def test_without_the_library():
    """A missing library is silent by default, and a line with the pip command when it was asked for."""
    found = in_a_new_process(
        """
        import importlib.util, logging, sys
        find = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *a: None if name == "qdrant_client" else find(name, *a)
        import otel_pools
        logging.basicConfig(stream=sys.stdout, format="%(message)s")
        otel_pools.instrument()
        print("quiet")
        otel_pools.instrument("qdrant")
        """
    )

    assert found[0] == "quiet"
    assert " ".join(found[1:]) == ("otel_pools: qdrant is not installed; try: pip install 'otel-pools[qdrant]'")


# -- where gRPC's books are closed, or odd ---------------------------------------------------


@pytest.fixture
def closed(monkeypatch):
    """As with a gRPC whose books we may not read."""
    monkeypatch.setattr(_channelz, "OPEN", False)


def anew():
    """The room of the books as it is when it is imported now."""
    spec = importlib.util.spec_from_file_location(_channelz.__name__, _channelz.__file__)
    room = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(room)
    return room


@pytest.mark.parametrize(
    ("version", "is_open"), [("1.49.1", False), ("1.50.0", True), ("1.100.0rc1", True), ("2.0.0.dev0", True)]
)
def test_books_are_open_from_a_version_on(monkeypatch, version, is_open):
    """Before gRPC 1.50 its books are closed to us, as who reads them may die of it."""
    monkeypatch.setattr(grpc, "__version__", version)

    assert anew().OPEN is is_open


@pytest.mark.parametrize(("version", "tells"), [("1.82.0", False), ("1.83.0", True), ("2.0.0", True)])
def test_books_tell_queues_from_a_version_on(monkeypatch, version, tells):
    """Before gRPC 1.83 a call that waits for a stream is in its books as one that has it."""
    monkeypatch.setattr(grpc, "__version__", version)

    assert anew().QUEUES is tells


@needs_books
def test_books_without_queues(world, watched, telemetry, monkeypatch):
    """Where the books do not tell who waits for a stream, neither those nor the others are told, and all else is."""
    monkeypatch.setattr(_channelz, "QUEUES", False)
    world.ask(world.client(), 2)
    now = telemetry.read()

    assert now.metrics.keys() & QUEUE == set()
    assert (now.count("used"), now.count("idle"), now.value("otel_pools.checkouts")) == (0, 1, 2)
    assert sum(channels(now).values()) == CHANNELS


def test_without_the_compiled_module(monkeypatch):
    """A gRPC without its compiled module under that name (pretended) is one that keeps no books."""
    monkeypatch.delattr("grpc._cython.cygrpc")
    monkeypatch.setitem(sys.modules, "grpc._cython.cygrpc", None)

    assert (anew().OPEN, anew().Books().page("here")) == (False, None)


def test_a_compiled_module_without_books(monkeypatch):
    """A gRPC that was built without them (pretended) keeps no books."""
    monkeypatch.delattr("grpc._cython.cygrpc.channelz_get_top_channels")

    assert (anew().OPEN, anew().Books().page("here")) == (False, None)


def test_without_books_there_are_the_states(world, watched, telemetry, closed):
    """Where the books are closed to us there are the states of a client's channels, and no guesses."""
    client = world.client()
    world.ask(client)
    now = telemetry.read()
    world.close(client)

    assert channels(now) == ({"ready": 1, "idle": CHANNELS - 1} if CHANNELS > 1 else {"ready": 1})
    assert now.points("db.client.connection.count") == now.points("otel_pools.stream.count") == []
    assert now.points("otel_pools.checkouts") == []
    assert now.value("otel_pools.pools") == 1
    assert telemetry.points("otel_pools.grpc.channels") == []


def test_a_client_that_was_closed_while_we_were_away(world, telemetry, closed):
    """Where there are no books, a client that was closed unseen does not cost the numbers of another."""
    gone, other = world.client(), world.client()
    for client in (gone, other):
        world.ask(client)
    watch(telemetry)
    otel_pools.uninstrument()
    world.close(gone)
    watch(telemetry)

    assert channels(telemetry.read()).get("ready") == 1


@pytest.mark.parametrize("odd", ["{}", "[]", "no JSON", '{"channel": [{"ref": {"channelId": "1"}, "data": {}}]}'])
def test_books_that_cannot_be_read(  # noqa: PLR0917  # fixtures
    world, watched, telemetry, monkeypatch, caplog, odd
):
    """If the books make no sense (pretended) that costs their numbers, with at most one line; calls go on."""
    monkeypatch.setattr(_guard, "loud", False)
    monkeypatch.setattr(_channelz, "cygrpc", Books(top_channels=lambda _: odd, channel=lambda _: odd))
    client = world.client()
    world.ask(client)
    now = telemetry.read()
    telemetry.read()
    world.ask(client)
    world.close(client)

    assert [point.value for point in now.points("db.client.connection.count") if point.value] == []
    assert now.value("otel_pools.pools") == 1
    assert caplog.text.count("lost a measurement (reading a Server") <= 1


@needs_books
def test_an_odd_entry_of_another_channel(world, watched, telemetry, monkeypatch):
    """A channel of somebody else's whose entry lacks its target (pretended) costs the others nothing."""

    def beheaded(said):
        page = json.loads(said)
        page.setdefault("channel", []).insert(0, {"ref": {"channelId": "0"}, "data": {}})
        return json.dumps(page)

    world.ask(world.client())
    with monkeypatch.context() as patch:
        patch.setattr(_channelz, "cygrpc", Books(top_channels=beheaded))
        now = telemetry.read()

    assert (now.value("otel_pools.checkouts"), now.count("idle")) == (1, 1)


@needs_books
@pytest.mark.parametrize("kind", ["subchannel", "socket"])
def test_what_closes_while_it_is_read(world, watched, telemetry, monkeypatch, kind):
    """A connection that is gone when its entry is asked for (pretended) is no connection, and no loss."""

    def gone(_):
        raise ValueError("Failed to get it, please ensure your id==7 is valid")

    monkeypatch.setattr(_channelz, "cygrpc", Books(**{kind: gone}))
    world.ask(world.client())
    now = telemetry.read()

    assert now.count("idle") == now.count("used") == 0
    assert now.value("otel_pools.checkouts") == 1


@needs_books
def test_many_channels_of_others(sync, watched, telemetry, monkeypatch):
    """However many channels an app has to other servers, each collection reads one page, and ours come to be told."""
    pages = []

    def noted(said):
        pages.append(len(json.loads(said).get("channel", ())))
        return said

    telemetry.read()
    others = [grpc.insecure_channel("localhost:1") for _ in range(250)]
    sync.ask(sync.client())
    monkeypatch.setattr(_channelz, "cygrpc", Books(top_channels=noted))
    for _ in range(3):
        now = telemetry.read()
    for other in others:
        other.close()

    assert (len(pages), max(pages)) == (3, 100)
    assert (now.count("idle"), now.value("otel_pools.checkouts")) == (1, 1)
    assert sum(channels(now).values()) == CHANNELS


@needs_books
def test_too_many_channels_are_said_once(sync, watched, telemetry, caplog):
    """Of more than 32 channels to a server the first are told, and one line says so."""
    for _ in range(_channelz.MOST // CHANNELS + 1):
        sync.ask(sync.client())
    now = telemetry.read()
    telemetry.read()

    assert sum(channels(now).values()) == _channelz.MOST
    assert [record.getMessage() for record in caplog.records] == [
        "otel_pools: more than 32 gRPC channels to one server; the others go unseen"
    ]


# -- where it could do harm ---------------------------------------------------------------


def test_a_client_without_a_network(world, watched, telemetry, caplog, monkeypatch):
    """A client whose HTTP transport has no pool, as in a test of the app's, is told by gRPC, and nothing is lost."""
    monkeypatch.setattr(_guard, "loud", False)
    mock = httpx.MockTransport(lambda request: httpx.Response(200))
    client = world.client(transport=mock)
    otel_pools.name_pool(client, "vectors")
    world.ask(client)

    assert names(telemetry.read()) == {world.server.grpc_port: "vectors"}
    assert caplog.text == ""


def test_a_client_that_cannot_be_made(world, watched, caplog):
    """An error of a client's own is the caller's, and nothing of it remains."""
    with pytest.raises(ValueError, match="Only one of"):
        world.kind(url="http://db", host="db")
    gc.collect()

    assert target._servers == {}
    assert caplog.text == ""


def ends(job, lock):
    """Whether this comes to an end in a thread of its own; who waits for this lock for ever is let go."""
    thread = threading.Thread(target=job, daemon=True)
    thread.start()
    thread.join(5)
    ended = not thread.is_alive()
    if not ended:
        lock.release()
        thread.join(5)
    return ended


class Cycle:
    """Somebody who holds a client, and himself: both go when garbage is collected, wherever that is."""

    def __init__(self, client):
        self.client, self.me = client, self


def test_a_client_may_be_collected_while_the_books_are_read(sync, watched, telemetry, monkeypatch):
    """A client that the garbage collector closes in the midst of our reading does not make it wait for itself."""

    def collecting(said):
        gc.collect()
        return said

    sync.ask(sync.client())
    telemetry.read()
    garbage = Cycle(sync.made())
    sync.ask(garbage.client)
    gc.disable()
    del garbage
    monkeypatch.setattr(_channelz, "cygrpc", Books(channel=collecting))
    ended = ends(telemetry.read, target._books.lock)
    gc.enable()

    assert ended


def test_a_client_may_be_collected_while_samples_are_delivered(sync, watched, telemetry, monkeypatch):
    """The same, in the midst of our counting."""
    from otel_pools import _outbox

    take = _outbox._cut

    def collecting(samples):
        gc.collect()
        return take(samples)

    sync.ask(sync.client())
    telemetry.read()
    (ledger,) = otel_pools.QdrantPoolInstrumentor._registry.ledgers.values()
    garbage = Cycle(sync.made())
    sync.ask(garbage.client)
    gc.disable()
    del garbage
    monkeypatch.setattr(_outbox, "_cut", collecting)
    ended = ends(telemetry.read, ledger.outbox._folding)
    gc.enable()

    assert ended


FORK = """
    import faulthandler, gc, os, sys, threading, warnings
    warnings.simplefilter("ignore")  # from 3.12 on a fork beside threads is warned of
    import qdrant_client
    import otel_pools
    from otel_pools.testing import Telemetry

    def client():
        return qdrant_client.QdrantClient(
            host="127.0.0.1", grpc_port=int(sys.argv[1]), prefer_grpc=True, timeout=20, **eval(sys.argv[2])
        )

    telemetry = Telemetry()
    otel_pools.instrument("qdrant", meter_provider=telemetry.meter_provider)
    inherited = client()
    inherited.get_collections()
    telemetry.read()

    def in_a_child(job):
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            faulthandler.dump_traceback_later(5, exit=True)
            gc.disable()
            job()
            sys.stdout.flush()
            os._exit(0)
        return os.waitpid(pid, 0)[1]
"""


@needs_books
@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_a_forked_child_tells_nothing_of_its_parent(server):
    """In a forked child the parent's channels are neither told nor looked at; a client of its own is told once."""
    found = in_a_new_process(
        textwrap.dedent(FORK)
        + textwrap.dedent("""
        def tell():
            now = telemetry.read()
            print(now.value("otel_pools.pools"), now.value("otel_pools.grpc.channels"))
            mine = client()
            try:
                mine.get_collections()
            except Exception:  # of old gRPC, with us and without
                mine.get_collections()
                refused = 1
            else:
                refused = 0
            now = telemetry.read()
            print(now.value("otel_pools.pools"), now.value("otel_pools.checkouts") - refused, now.count("idle"))
            mine.close()

        assert in_a_child(tell) == 0
        inherited.get_collections()
        print(telemetry.value("otel_pools.checkouts"))
        """),
        server.grpc_port,
        QUIET,
    )

    assert found == ["0.0", "0.0", "1.0", "1.0", "1.0", "2.0"]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_a_forked_child_does_not_hang(server):
    """A child of a process that is calling goes through its collections, though gRPC's locks may be held for ever."""
    found = in_a_new_process(
        textwrap.dedent(FORK)
        + textwrap.dedent("""
        over = threading.Event()

        def call():
            while not over.is_set():
                inherited.get_collections()

        threads = [threading.Thread(target=call) for _ in range(4)]
        for thread in threads:
            thread.start()
        registry = otel_pools.QdrantPoolInstrumentor._registry
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # gRPC warns of such a fork
        # At times gRPC itself ends a child at once, without us too; who hangs is ended with 1.
        print(any(in_a_child(lambda: list(registry.readings())) == 1 << 8 for _ in range(8)))
        over.set()
        for thread in threads:
            thread.join()
        """),
        server.grpc_port,
        QUIET,
        seconds=110,
    )

    assert found == ["False"]


# -- other channels of the app's -------------------------------------------------------------


@needs_books
def test_other_channels_are_not_counted(sync, watched, telemetry):
    """A channel that the app has to another port is none of ours."""
    with Server() as other, grpc.insecure_channel(f"{HOST}:{other.grpc_port}") as channel:
        sync.ask(sync.client())
        call = channel.unary_unary("/qdrant.Qdrant/HealthCheck")
        call(b"")
        now = telemetry.read()

    assert (now.value("otel_pools.checkouts"), now.count("idle")) == (1, 1)
    assert sum(channels(now).values()) == CHANNELS


@needs_books
def test_the_exporters_channel_is_not_counted(sync, telemetry):
    """OpenTelemetry's own gRPC exporter is none of ours, whether it gets through or not."""
    if importlib.util.find_spec("opentelemetry.exporter") is None:
        pytest.skip("no exporter is installed")
    exporters = pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc.metric_exporter")
    exporter = exporters.OTLPMetricExporter(endpoint="http://127.0.0.1:1", insecure=True, timeout=1)
    watch(telemetry)
    sync.ask(sync.client())
    export = telemetry.reader.get_metrics_data()
    exporter.export(export, timeout_millis=10)
    now = telemetry.read()
    exporter.shutdown()

    assert (now.value("otel_pools.checkouts"), now.count("idle")) == (1, 1)
    assert sum(channels(now).values()) == CHANNELS


@needs_books
def test_two_readers_count_a_call_once(sync):
    """Two readers of one provider are told the same, also when they collect at the same time."""
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    telemetry, second = Telemetry(), Telemetry()
    readers = telemetry.reader, second.reader = InMemoryMetricReader(), InMemoryMetricReader()
    telemetry.meter_provider = MeterProvider(readers)
    watch(telemetry)
    client = sync.client()
    sync.ask(client)
    over = threading.Event()

    def collect(one):
        while not over.is_set():
            one.read()

    threads = [threading.Thread(target=collect, args=(one,)) for one in (telemetry, second)]
    for thread in threads:
        thread.start()
    sync.ask(client, 200)
    over.set()
    for thread in threads:
        thread.join()

    assert [one.value("otel_pools.checkouts") for one in (telemetry, second)] == [201, 201]
