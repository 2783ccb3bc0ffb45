"""The pools of httpx and httpx2 keep the contract, in the words of HTTP; then, who a pool is and how it is found."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import inspect
import subprocess
import sys
import textwrap
import time

import pytest
import webs
from webs import ASYNC, CORES, LIBRARIES, SYNC, HTTPProxy, Server, flavour_id

import otel_pools
from otel_pools import _doors, _guard
from otel_pools import _vocabulary as words
from otel_pools._model import Identity
from otel_pools.targets import httpx as target
from otel_pools.testing import _hooked

if not LIBRARIES:
    pytest.skip("neither httpx nor httpx2 is installed", allow_module_level=True)


class World:
    """One library, sync or asyncio, and how its things are made and closed there."""

    def __init__(self, name, asynchronous, do):
        self.name, self.asynchronous, self.do = name, asynchronous, do
        self.lib, self.core = importlib.import_module(name), importlib.import_module(CORES[name])

    def kind(self, module, name):
        return getattr(module, f"Async{name}" if self.asynchronous else name)

    def client(self, **options):
        # To load the certificates takes longer than most tests.
        return self.kind(self.lib, "Client")(**{"trust_env": False, "verify": False, **options})

    def transport(self, **options):
        return self.kind(self.lib, "HTTPTransport")(verify=False, **options)

    def get(self, client, url):
        return self.do(client.get(url))

    def close(self, thing):
        """A client, or a response."""
        self.do(thing.aclose() if self.asynchronous else thing.close())


@pytest.fixture(params=SYNC + ASYNC, ids=flavour_id)
def world(request):
    """Each library, sync and asyncio: all in one event loop."""
    loop = asyncio.new_event_loop()

    async def wait(awaitable):
        return await awaitable

    yield World(
        *request.param, lambda result: loop.run_until_complete(wait(result)) if inspect.isawaitable(result) else result
    )
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


@pytest.fixture(scope="module")
def ground():
    with webs.Ground() as ground:
        yield ground


@pytest.fixture
def web(ground):
    with Server(ground) as server:
        yield server


@pytest.fixture
def watched(telemetry):
    gc.collect()  # pools of an earlier test would be found, and rightly counted
    watch(telemetry)


def watch(telemetry, **options):
    otel_pools.instrument(
        "httpx",
        meter_provider=telemetry.meter_provider,
        tracer_provider=telemetry.tracer_provider,
        **options,
    )


class Browser:
    """One client of at most two connections, and what a user does with it."""

    def __init__(self, world, url, **limits):
        self.world, self.url = world, url
        limits = {"max_connections": 2, "max_keepalive_connections": 1, **limits}
        self.client = world.client(limits=world.lib.Limits(**limits), timeout=world.lib.Timeout(5, pool=0.05))

    @property
    def pool(self):
        return self.client._transport._pool

    def borrow(self):
        return self.world.do(self.client.send(self.client.build_request("GET", self.url), stream=True))

    def give_back(self, held):
        self.world.do(held.aread() if self.world.asynchronous else held.read())

    def get(self):
        self.world.get(self.client, self.url)

    def shut(self):
        self.world.close(self.client)


@pytest.fixture
def browse(world, web):
    """Open clients; all are closed afterwards."""
    opened = []

    def browse(**limits):
        opened.append(Browser(world, web.url(), **limits))
        return opened[-1]

    yield browse
    for browser in opened:
        with contextlib.suppress(Exception):
            browser.shut()


def opens(now):
    """The open connections, active and idle."""
    points = now.points("http.client.open_connections")
    return tuple(
        sum(point.value for point in points if point.attributes[words.HTTP_STATE] == state)
        for state in ("active", "idle")
    )


# -- the contract ---------------------------------------------------------------------


def test_a_request_is_one_wait(browse, watched, telemetry):
    """One request is one time_in_queue sample and one counted checkout, while it lasts and after."""
    browser = browse()
    held = browser.borrow()
    during = telemetry.read()
    browser.give_back(held)
    after = telemetry.read()

    for now in (during, after):
        assert now.value("http.client.request.time_in_queue") == 1
        assert now.value("otel_pools.checkouts") == 1


def test_no_metric_of_a_database(browse, watched, telemetry):
    """A pool that speaks HTTP has no metric of database clients."""
    browse().get()

    assert [name for name in telemetry.read().metrics if name.startswith("db.")] == []


def test_the_count_follows_the_pool(browse, watched, telemetry, web):
    """A connection whose response is open is active, a returned one is idle, and each tells where it goes."""
    browser = browse()
    held = browser.borrow()
    out = telemetry.read()
    browser.give_back(held)
    back = telemetry.read()

    assert opens(out) == (1, 0)
    assert opens(back) == (0, 1)
    assert (out.value("http.client.active_requests"), back.value("http.client.active_requests")) == (1, 0)
    (point,) = back.points("http.client.open_connections", http__connection__state="idle")
    assert tuple(point.attributes[key] for key in words.ORIGIN) == web.origin


def test_the_limit_is_told_once_used(browse, watched, telemetry):
    """The limits are told after the first request; a pool that was never used has none to add."""
    browser = browse()
    browse()
    before = telemetry.read()
    browser.get()
    after = telemetry.read()

    assert before.points("otel_pools.connection.max") == []
    assert before.points("otel_pools.pools") == []
    assert after.value("otel_pools.connection.max") == 2
    assert after.value("otel_pools.connection.idle.max") == 1
    assert after.value("otel_pools.pools") == 1


def test_no_limit_is_not_told(browse, watched, telemetry):
    """Unlimited is no limit to report."""
    browse(max_connections=None, max_keepalive_connections=None).get()
    now = telemetry.read()

    assert now.points("otel_pools.connection.max") == []
    assert now.points("otel_pools.connection.idle.max") == []
    assert now.value("otel_pools.pools") == 1


def test_only_the_first_request_creates(browse, watched, telemetry):
    """The first request opens a connection and the second finds it; the path says which it was."""
    browser = browse()
    for _ in range(2):
        browser.get()
    now = telemetry.read()

    assert now.value("otel_pools.connection.created") == 1
    assert now.checkouts() == {(words.NEW, None): 1, (words.IDLE, None): 1}


def test_a_timeout_is_counted_and_raised(browse, watched, telemetry, world):
    """Asking an empty pool raises the library's own error, counts it, and writes a failed span."""
    browser = browse()
    held = [browser.borrow(), browser.borrow()]
    with pytest.raises(world.lib.PoolTimeout):
        browser.get()
    now = telemetry.read()

    assert now.value("otel_pools.connection.timeouts") == 1
    assert now.checkouts() == {(words.NEW, None): 2, (words.QUEUED, words.TIMEOUT): 1}
    assert now.value("http.client.request.time_in_queue", error__type="timeout") == 1
    assert [span.attributes[words.ERROR] for span in telemetry.spans if not span.status.is_ok] == ["timeout"]
    for response in held:
        browser.give_back(response)


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize(
    ("name", "told"), [("PoolTimeout", "timeout"), ("ConnectError", "connect_error"), ("ReadError", None)]
)
def test_an_error_is_the_very_same(browse, telemetry, world, name, told):
    """What the library raises is what the caller gets, the very same object, without a cause of ours."""
    browser, core, error = browse(), world.core, getattr(world.core, name)("mine")
    package = f"{core.__name__}._{'async' if world.asynchronous else 'sync'}"

    def fail(*_, **__):
        raise error

    async def async_fail(*_, **__):
        raise error

    owner, method = {
        "PoolTimeout": (world.kind(importlib.import_module(f"{core.__name__}._synchronization"), "Event"), "wait"),
        "ConnectError": (browser.pool._network_backend, "connect_tcp"),
        "ReadError": (
            world.kind(importlib.import_module(f"{package}.http11"), "HTTP11Connection"),
            "_receive_response_headers",
        ),
    }[name]
    held = [browser.borrow(), browser.borrow()] if name == "PoolTimeout" else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, async_fail if world.asynchronous else fail)
        with pytest.raises(Exception, match="mine") as caught:
            browser.get()

    assert caught.value.__cause__ is error
    assert (error.__cause__, error.__context__) == (None, None)
    assert {kind for _, kind in telemetry.read().checkouts()} - {None} == {told} - {None}
    for response in held:
        browser.give_back(response)


def test_the_oldest_use_moves_while_it_lasts(browse, watched, telemetry):
    """The age of the oldest checkout grows while a response is open, and is gone when it is closed."""
    browser = browse()
    held = browser.borrow()
    first = telemetry.value("otel_pools.use.oldest")
    time.sleep(0.02)
    second = telemetry.value("otel_pools.use.oldest")
    browser.give_back(held)

    assert 0 < first < first + 0.02 <= second
    assert telemetry.value("otel_pools.use.oldest") == 0


def test_a_burst_leaves_its_peak(browse, watched, telemetry):
    """The peak is the most that was held since the previous collection, even if all is back."""
    browser = browse()
    held = [browser.borrow(), browser.borrow()]
    for response in held:
        browser.give_back(response)

    assert telemetry.value("otel_pools.connection.peak") == 2
    assert telemetry.value("otel_pools.connection.peak") == 0


def test_a_pool_from_before_counts(browse, telemetry):
    """A pool that was made, and a response that was open, before we came, count; and nothing was created by it."""
    gc.collect()
    browser = browse()
    held = browser.borrow()
    watch(telemetry)

    out = telemetry.read()
    browser.give_back(held)
    back = telemetry.read()
    browser.get()
    after = telemetry.read()

    assert (opens(out), opens(back), opens(after)) == ((1, 0), (0, 1), (0, 1))
    assert out.value("otel_pools.connection.max") == 2
    assert after.checkouts() == {(words.IDLE, None): 1}
    assert after.value("otel_pools.connection.created") == 0
    assert after.value("otel_pools.connection.orphaned") == 0


def test_a_pool_from_before_closes(browse, telemetry):
    """A connection whose opening we have not seen counts when it closes; how long it has lived is not known."""
    gc.collect()
    browser = browse()
    browser.get()
    watch(telemetry)
    browser.get()
    browser.shut()
    gc.collect()  # before httpcore 1.0.3 what the pool itself closes is told when it is gone
    now = telemetry.read()

    assert opens(now) == (0, 0)
    assert sum(now.closed().values()) == 1
    assert now.value("http.client.connection.duration") == 0


def test_a_shut_pool_is_silent(watched, telemetry, world, web):
    """A pool that is shut and gone reports no state; what has happened stays counted."""
    browser = Browser(world, web.url())
    browser.get()
    browser.shut()
    del browser
    gc.collect()
    now = telemetry.read()

    assert now.points("http.client.open_connections") == []
    assert now.points("otel_pools.connection.max") == []
    assert now.value("otel_pools.checkouts") == 1
    assert sum(now.closed().values()) == 1


def test_a_broken_reader_costs_only_its_numbers(browse, watched, telemetry, monkeypatch, caplog):
    """If a pool cannot be read, one line says so, the other metrics come, and requests work."""
    monkeypatch.setattr(_guard, "loud", False)
    browser = browse()
    browser.get()
    for each in _doors.INSTRUMENTORS["httpx"]._registry.pools():
        monkeypatch.setattr(each, "_read", lambda *_: 1 / 0)

    now = telemetry.read()
    telemetry.read()
    browser.get()

    assert now.points("http.client.open_connections") == []
    assert now.value("otel_pools.checkouts") == 1
    assert caplog.text.count("lost a measurement") == 1


def test_uninstrument_leaves_the_very_functions(world):
    """Every hooked attribute is, before and after, the same object."""
    bare = _hooked("httpx")
    otel_pools.instrument("httpx")
    twins = _hooked("httpx")
    otel_pools.uninstrument("httpx")

    assert len(bare) > 10
    assert all(twin is not original for twin, original in zip(twins, bare, strict=True))
    assert all(one is other for one, other in zip(bare, _hooked("httpx"), strict=True))


def test_uninstrument_lets_go(browse, watched, telemetry):
    """After uninstrument nothing is reported, an open response can be closed, and instrumenting again works."""
    browser = browse()
    held = browser.borrow()
    otel_pools.uninstrument("httpx")
    otel_pools.uninstrument("httpx")

    assert telemetry.points("http.client.open_connections") == []

    browser.give_back(held)
    watch(telemetry)
    browser.get()

    assert telemetry.read().checkouts() == {(words.IDLE, None): 1}


def test_an_open_response_is_closed_under_a_new_watch(browse, watched, telemetry):
    """A response from before uninstrument and instrument is active until it is closed."""
    browser = browse()
    held = browser.borrow()
    otel_pools.uninstrument("httpx")
    watch(telemetry)
    out = telemetry.read()
    browser.give_back(held)

    assert (opens(out), opens(telemetry.read())) == ((1, 0), (0, 1))


def test_no_sdk_call_on_the_way(browse, watched, telemetry, monkeypatch):
    """Asking and closing make no call into the SDK's metrics."""
    calls = []
    module = importlib.import_module("opentelemetry.sdk.metrics._internal.instrument")
    for name in ("Histogram.record", "Counter.add", "UpDownCounter.add", "_Gauge.set"):
        kind, _, method = name.partition(".")
        monkeypatch.setattr(getattr(module, kind), method, lambda *_, name=name, **__: calls.append(name))

    browser = browse()
    browser.get()
    browser.get()
    browser.shut()
    on_the_way = list(calls)
    telemetry.read()

    assert (on_the_way, set(calls)) == ([], {"Histogram.record"})


def test_everything_is_in_the_vocabulary(browse, watched, telemetry):
    """Every metric that arrives has the name, unit and attributes of a row."""
    browser = browse()
    browser.get()
    browser.shut()
    browse().get()
    gc.collect()
    rows = {row.name: row for row in words.METRICS}
    identity = {words.ADDRESS, words.PORT}

    metrics = telemetry.metrics()

    assert {metric.name for metric in metrics} > {row.name for row in words.HTTP} - {"otel_pools.connection.timeouts"}
    for metric in metrics:
        row = rows[metric.name]
        assert (metric.unit, metric.description) == (row.unit, row.description)
        for point in metric.data.data_points:
            assert words.OUR_POOL in point.attributes
            assert point.attributes.get(words.PATH, words.IDLE) in words.PATHS
            assert point.attributes.get(words.REASON, "closed") in words.REASONS
            assert set(point.attributes) <= identity | {words.OUR_POOL, *row.keys}


# -- who a pool is ------------------------------------------------------------------------

ANSWER = [b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"]


@pytest.fixture
def pretend(world):
    """A client that has asked these URLs, of a network that is none."""

    def pretend(*urls):
        client = world.client()
        client._transport._pool._network_backend = world.kind(world.core, "MockBackend")(ANSWER)
        for url in urls:
            world.get(client, url)
        return client

    return pretend


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize(
    ("url", "name", "port"),
    [
        ("http://shop.example", "shop.example", None),
        ("http://shop.example:80", "shop.example", None),
        ("https://shop.example", "shop.example", None),
        ("https://shop.example:443", "shop.example", None),
        ("https://shop.example:8443", "shop.example:8443", 8443),
        ("http://shop.example:443", "shop.example:443", 443),
        ("http://127.0.0.1:8080", "127.0.0.1:8080", 8080),
        ("http://user:s3cret@shop.example:8080/private/path?token=s3cret#part", "shop.example:8080", 8080),
    ],
)
def test_a_pool_is_its_first_origin(pretend, telemetry, url, name, port):
    """Without a name it is called after where its first request went, without the port if that is the default."""
    client = pretend(url, "http://elsewhere.example")

    who = target.identify(client._transport._pool)

    assert who == Identity("httpx", None, None, None, name.partition(":")[0], port)
    assert who.name == name
    assert {point.attributes[words.OUR_POOL] for point in telemetry.points("otel_pools.pools")} == {name}


def test_nothing_of_a_url_but_its_origin(pretend, watched, telemetry, world):
    """No path, query, fragment, user or password is in any attribute, span or log line."""
    secrets = ("s3cret", "private", "token", "user")
    client = pretend("https://user:s3cret@shop.example/private/path?token=s3cret#part")
    client._transport._pool._network_backend = None  # the next request fails, inside
    with contextlib.suppress(Exception):
        world.get(client, "https://user:s3cret@other.example/private/path?token=s3cret")

    told = repr([metric.to_json() for metric in telemetry.metrics()])
    told += repr([span.to_json() for span in telemetry.spans])
    told += repr(_doors.INSTRUMENTORS["httpx"]._registry.pools())

    assert "shop.example" in told
    assert [secret for secret in secrets if secret in told] == []


def test_an_unused_pool_is_nobody(world):
    """A client that has asked nothing has no origin yet; it is not counted, and called after the library."""
    pool = world.client()._transport._pool

    assert not target.complete(pool)
    assert target.identify(pool).name == "httpx"


def test_a_socket_in_the_file_system(ground, world, watched, telemetry, tmp_path):
    """A pool of a Unix socket is called after its path."""
    path = str(tmp_path / "web")
    with Server(ground, path=path):
        client = world.client(transport=world.transport(uds=path))
        world.get(client, "http://docker/info")
        now = telemetry.read()
        world.close(client)

    assert {point.attributes[words.OUR_POOL] for point in now.points("otel_pools.pools")} == {path}
    assert opens(now) == (0, 1)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_user_names_a_pool(browse, watched, telemetry, moment):
    """The user's name goes before the origin, given before or after the first request; equal names add up."""
    for browser in (browse(), browse()):
        if moment == "after":
            browser.get()
        otel_pools.name_pool(browser.client, "orders")
        browser.get()
    now = telemetry.read()
    mine = {"otel_pools__pool__name": "orders"}

    assert now.value("otel_pools.pools", **mine) == now.value("otel_pools.pools") == 2
    assert now.value("otel_pools.connection.max", **mine) == 4
    assert now.value("http.client.open_connections", **mine) == 2
    assert now.value("otel_pools.checkouts") == (4 if moment == "after" else 2)
    assert now.value("otel_pools.checkouts", **mine) == 2


def test_a_name_given_under_a_response(browse, watched, telemetry):
    """A response that is open while its pool gets a name goes on under the new one, and its connection ends once."""
    browser = browse()
    held = browser.borrow()
    otel_pools.name_pool(browser.client, "orders")
    during = telemetry.read()
    browser.give_back(held)
    back = telemetry.read()
    browser.shut()
    del held  # which up to httpcore 1.0.2 keeps its connection
    gc.collect()
    now = telemetry.read()
    mine = {"otel_pools__pool__name": "orders"}

    assert (opens(during), opens(back), opens(now)) == ((1, 0), (0, 1), (0, 0))
    assert sum(now.closed().values()) == now.value("otel_pools.connection.created") == 1
    assert now.value("otel_pools.use.oldest") == 0
    assert during.value("otel_pools.use.oldest", **mine) > 0


def test_a_name_given_under_a_response_that_is_left(browse, watched, telemetry):
    """The same, when the connection ends with its response."""
    browser = browse()
    held = browser.borrow()
    otel_pools.name_pool(browser.client, "orders")
    browser.world.close(held)
    del held
    browser.shut()
    gc.collect()
    now = telemetry.read()

    assert sum(now.closed().values()) == now.value("otel_pools.connection.created") == 1


# -- what has a pool -------------------------------------------------------------------------


def test_a_client_has_its_pool(world):
    """A client has one pool; a transport and a pool have themselves."""
    ours = world.client()
    pool = ours._transport._pool

    for thing in (ours, ours._transport, pool):
        assert list(target.pools_of(thing)) == [pool]


def test_a_client_has_the_pools_of_its_mounts(world):
    """Each mount has a pool; a mount without a transport has none."""
    mounted = [world.transport(), world.transport()]
    ours = world.client(mounts={"https://": mounted[0], "http://inside": mounted[1], "all://nowhere": None})

    pools = list(target.pools_of(ours))

    assert len(pools) == 3
    assert {id(pool) for pool in pools} == {id(each._pool) for each in (ours._transport, *mounted)}


def test_a_proxy_is_a_pool(world):
    """A transport through a proxy has the proxy's pool, SOCKS or not."""
    pytest.importorskip("socksio")
    for url in ("http://127.0.0.1:1", "socks5://127.0.0.1:1"):
        ours = world.client(transport=world.transport(proxy=world.lib.Proxy(url)))

        assert list(target.pools_of(ours)) == [ours._transport._pool]


def test_a_proxy_of_the_environment_is_a_pool(world, monkeypatch):
    """HTTP_PROXY gives a client a second pool."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.delenv("http_proxy", raising=False)
    ours = world.client(trust_env=True)

    pools = list(target.pools_of(ours))

    assert [type(pool).__name__.removeprefix("Async") for pool in pools] == ["ConnectionPool", "HTTPProxy"]


@pytest.mark.usefixtures("watched")
def test_a_proxy_of_the_environment_is_seen(ground, world, telemetry, monkeypatch):
    """A client that finds its proxy in the environment is watched there, and called after where it wanted to go."""
    with Server(ground, HTTPProxy) as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://user:s3cret@127.0.0.1:{proxy.port}")
        monkeypatch.delenv("http_proxy", raising=False)
        ours = world.client(trust_env=True)
        world.get(ours, "http://shop.example/")
        now = telemetry.read()
        world.close(ours)

    assert {point.attributes[words.OUR_POOL] for point in now.points("otel_pools.pools")} == {"shop.example"}
    assert now.value("http.client.open_connections") == 1
    assert "s3cret" not in repr(now.metrics)


def test_a_pool_behind_the_official_transport(world):
    """The pool is found behind the transport of the official instrumentation."""
    if world.name != "httpx":
        pytest.skip("that transport is httpx's")
    official = pytest.importorskip("opentelemetry.instrumentation.httpx")
    kind = official.AsyncOpenTelemetryTransport if world.asynchronous else official.SyncOpenTelemetryTransport
    inner = world.transport()
    ours = world.client(transport=kind(inner))

    assert list(target.pools_of(ours)) == [inner._pool]


def test_the_official_instrumentation_beside(browse, world, telemetry):
    """With the official instrumentation, in either order, its spans come and our numbers are the same."""
    if world.name != "httpx":
        pytest.skip("for httpx")
    official = pytest.importorskip("opentelemetry.instrumentation.httpx").HTTPXClientInstrumentor()
    gc.collect()
    for ours_first in (True, False):
        steps = [
            lambda: watch(telemetry),
            lambda: official.instrument(tracer_provider=telemetry.tracer_provider, skip_dep_check=True),
        ]
        for step in steps if ours_first else reversed(steps):
            step()
        try:
            browser = browse()
            browser.get()
            browser.get()
            now = telemetry.read()
            browser.shut()
        finally:
            official.uninstrument()
            otel_pools.uninstrument("httpx")

        assert now.value("otel_pools.checkouts") == 2
        assert opens(now) == (0, 1)
    assert [span.name for span in telemetry.spans] == ["GET"] * 4


def test_a_client_in_another_hand(world):
    """A library's own class with a client in an attribute has that client's pool; cycles do no harm."""

    class Service:
        def __init__(self, http):
            self.http = http
            self.me = self
            self.name = "service"

    ours = world.client()

    assert list(target.pools_of(Service(ours))) == [ours._transport._pool]


def test_one_pool_twice_is_one(world):
    """A transport that is mounted twice has one pool."""
    shared = world.transport()
    ours = world.client(transport=shared, mounts={"http://": shared})

    assert list(target.pools_of(ours)) == [shared._pool]


def test_what_has_no_pool_cannot_be_named(world):
    """A TypeError says so, for what is no client and for a client that has no network."""
    mock = world.client(transport=world.lib.MockTransport(lambda request: world.lib.Response(200)))
    for thing in (object(), "http://", None, mock):
        with pytest.raises(TypeError, match="neither a client nor a pool"):
            target.pools_of(thing)
        with pytest.raises(TypeError, match="no pool we know"):
            otel_pools.name_pool(thing, "mine")


# -- how it attaches ----------------------------------------------------------------------------


def test_coroutines_stay_coroutines(world):
    """A method that was a coroutine function still says it is one, and one that was none does not."""
    core = world.core
    names = [
        (core.AsyncConnectionPool, "handle_async_request"),
        (core.AsyncConnectionPool, "create_connection"),
        (core.AsyncHTTPConnection, "_connect"),
        (core.ConnectionPool, "handle_request"),
        (core.HTTPConnection, "_connect"),
    ]
    before = [inspect.iscoroutinefunction(getattr(kind, name)) for kind, name in names]
    otel_pools.instrument("httpx")

    assert before == [inspect.iscoroutinefunction(getattr(kind, name)) for kind, name in names]
    assert before == [True, False, True, False, False]


def test_every_row_finds_its_method(world, caplog):
    """Each version has every method that we need."""
    otel_pools.instrument("httpx")

    assert caplog.text == ""


def ask_in_a_new_process(code):
    """Run this in a fresh interpreter, where nothing is imported; it prints what it found."""
    preamble = """
        import sys
        import otel_pools
        from otel_pools.testing import Telemetry

        HTTP = {"httpx", "httpcore", "httpx2", "httpcore2"}

        def ask(lib, core, *urls):
            client = lib.Client(trust_env=False)
            answer = b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\nok"
            client._transport._pool._network_backend = core.MockBackend([answer])
            for url in urls:
                client.get(url)
            return client

        telemetry = Telemetry()
        otel_pools.instrument("httpx", meter_provider=telemetry.meter_provider)
        assert not HTTP & sys.modules.keys(), HTTP & sys.modules.keys()
    """
    script = textwrap.dedent(preamble) + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("name", LIBRARIES)
def test_before_the_library_is_imported(name):
    """Instrumenting imports nothing; what is imported later is watched."""
    found = ask_in_a_new_process(
        f"""
        import {name}, {CORES[name]}
        client = ask({name}, {CORES[name]}, "http://shop.example/")
        now = telemetry.read()
        print(now.value("otel_pools.pools"), now.value("otel_pools.checkouts"))
        """
    )

    assert found == ["1.0", "1.0"]


@pytest.mark.skipif("httpx2" not in LIBRARIES, reason="httpx2 is not installed")
def test_one_library_by_the_name_of_the_other():
    """`httpx2.alias_httpx()` works after us, and a pool that goes by both names is one."""
    pytest.importorskip("httpx2._alias", reason="this httpx2 has no alias")
    found = ask_in_a_new_process(
        """
        import httpx2
        httpx2.alias_httpx()
        import httpcore, httpx
        assert httpx is httpx2
        client = ask(httpx, httpcore, "http://shop.example/", "http://other.example/")
        now = telemetry.read()
        print(now.value("otel_pools.pools"), now.value("otel_pools.checkouts"), now.value("otel_pools.connection.max"))
        otel_pools.uninstrument()
        print(hasattr(httpcore.ConnectionPool.handle_request, "__wrapped__"))
        """
    )

    assert found == ["1.0", "2.0", "100.0", "False"]


def test_only_the_librarys_own_close_is_left_out(world):
    """A pool's closing of no connections is not called; another tool's wrapper around it is, like any method."""
    # Up to httpcore 1.0.2 there is no such method.
    own = vars(world.kind(world.core, "ConnectionPool")).get("_close_connections")

    def wrapper(pool, connections):
        return own(pool, connections)

    assert target.only_closes(own) is (own is not None)
    assert target.only_closes(wrapper) is False
    assert target.only_closes(print) is False
