"""Who holds the connections that are out, as the person on call asks for it."""

from __future__ import annotations

import asyncio
import inspect
import json
import sqlite3
import sys
import threading
import time

import pytest
from sqlalchemy import create_engine
from sqlalchemy.pool import QueuePool

import otel_pools
from otel_pools import Holder


def connect():
    return sqlite3.connect(":memory:", check_same_thread=False)


def named(name):
    return QueuePool(connect, pool_size=5, logging_name=name)


def watch(telemetry, *targets, **options):
    otel_pools.instrument(
        *targets, meter_provider=telemetry.meter_provider, tracer_provider=telemetry.tracer_provider, **options
    )


@pytest.fixture
def watched(telemetry):
    watch(telemetry)
    return telemetry


def line():
    """The line that calls this."""
    return sys._getframe(1).f_lineno


# -- what is asked ---------------------------------------------------------------------


def test_nothing_watched_is_nothing():
    """Before `instrument()` and after `uninstrument()` there is nobody to tell of, and no error."""
    before = otel_pools.holders()
    otel_pools.instrument("sqlalchemy")
    held = named("p").connect()
    number = len(otel_pools.holders())
    otel_pools.uninstrument()

    assert (before, number, otel_pools.holders()) == ((), 1, ())
    held.close()


def test_who_has_held_longest_comes_first(watched):
    """Over all pools, by the time since each was borrowed."""
    one, other = named("one"), named("other")
    held = []
    for pool in (other, one, other):
        held.append(pool.connect())
        time.sleep(0.002)
    holders = otel_pools.holders()
    for connection in held:
        connection.close()

    assert [holder.pool for holder in holders] == ["other", "one", "other"]
    assert [holder.held_s for holder in holders] == sorted((holder.held_s for holder in holders), reverse=True)


def test_the_order_is_not_that_of_the_pool(watched):
    """A connection that is borrowed again has its new age."""
    pool = named("p")
    first, second = pool.connect(), pool.connect()
    first.close()
    again, number = pool.connect(), line()
    holders = otel_pools.holders()
    for connection in (second, again):
        connection.close()

    assert holders[0].call_site != holders[1].call_site
    assert f":{number} " in holders[1].call_site


def test_of_one_pool(watched):
    """A name asks for the holders of that pool; one that nobody has is nothing."""
    held = [named("one").connect(), named("other").connect()]
    asked = {name: [holder.pool for holder in otel_pools.holders(name)] for name in ("one", "other", "none")}
    for connection in held:
        connection.close()

    assert asked == {"one": ["one"], "other": ["other"], "none": []}


def test_held_grows(watched):
    """It is for how long, now."""
    held = named("p").connect()
    first = otel_pools.holders()[0].held_s
    time.sleep(0.005)
    second = otel_pools.holders()[0].held_s
    held.close()

    assert 0 <= first < second
    assert second - first >= 0.005


def test_a_holder_is_json(watched):
    """`to_dict` has every field, in types that JSON has."""
    with watched.tracer_provider.get_tracer("app").start_as_current_span("request"):
        held = named("p").connect()
    (holder,) = otel_pools.holders()
    held.close()

    told = json.loads(json.dumps(holder.to_dict()))

    assert Holder(**told | {"stack": tuple(told["stack"])}) == holder
    assert {"pool", "held_s", "call_site", "via", "trace_id", "span_id", "task", "kind"} <= set(told)
    assert (len(told["trace_id"]), len(told["span_id"])) == (32, 16)


def test_a_holder_does_not_change(watched):
    """It is what was at that moment."""
    held = named("p").connect()
    (holder,) = otel_pools.holders()
    held.close()

    with pytest.raises(AttributeError):
        holder.pool = "other"


def test_after_a_new_name(watched):
    """Who holds a connection when its pool is named holds one of that name, and gives that one back."""
    engine = create_engine("sqlite://", creator=connect, poolclass=QueuePool)
    held, number = engine.connect(), line()
    otel_pools.name_pool(engine, "orders")
    holders = otel_pools.holders()
    held.close()

    assert [holder.pool for holder in holders] == ["orders"]
    assert f":{number} " in holders[0].call_site
    assert otel_pools.holders("sqlite") == otel_pools.holders("orders") == ()
    engine.dispose()


def test_of_a_replaced_pool(watched):
    """Who holds a connection of a pool that was disposed of still holds it."""
    engine = create_engine("sqlite://", creator=connect, poolclass=QueuePool, pool_logging_name="p")
    held = engine.connect()
    engine.dispose()
    after = otel_pools.holders()
    held.close()

    assert [holder.pool for holder in after] == ["p"]
    assert otel_pools.holders() == ()


def test_what_does_not_come_back_is_not_held(watched):
    """A connection that was detached or invalidated is nobody's any more, as far as the pool goes."""
    engine = create_engine("sqlite://", creator=connect, poolclass=QueuePool, pool_logging_name="p")
    detached, dropped = engine.connect(), engine.connect()
    detached.detach()
    after = len(otel_pools.holders())
    del dropped
    then = len(otel_pools.holders())
    detached.close()
    engine.dispose()

    assert (after, then) == (1, 0)


def test_asked_while_others_borrow(watched):
    """Threads may borrow and give back all the while: nobody is told twice, and nothing breaks."""
    pool, stop, errors = named("p"), threading.Event(), []

    def work():
        try:
            while not stop.is_set():
                pool.connect().close()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    most = max(len(otel_pools.holders()) for _ in range(300))
    stop.set()
    for thread in threads:
        thread.join(10)

    assert errors == []
    assert most <= 4
    assert otel_pools.holders() == ()


# -- what a connection is held for -------------------------------------------------------


@pytest.fixture(params=["redis", "valkey"])
def library(request):
    return pytest.importorskip(request.param)


class Cache:
    """Clients of one library, and what they hold."""

    def __init__(self, library, port):
        self.library, self.port, self.made = library, port, []

    @property
    def kind(self):
        return self.library.Redis if hasattr(self.library, "Redis") else self.library.Valkey

    def client(self, **options):
        self.made.append(self.kind(host="127.0.0.1", port=self.port, client_name="cache", **options))
        return self.made[-1]

    def keep(self, client):
        self.made.append(client)
        return client

    def close(self):
        for client in self.made:
            client.close()
            client.connection_pool.disconnect()


@pytest.fixture
def cache(watched, valkey, library):
    cache = Cache(library, valkey.port)
    yield cache
    cache.close()


def kinds():
    return [holder.kind for holder in otel_pools.holders()]


def test_a_subscription(cache):
    """A connection that listens for messages is held for pub/sub."""
    listener = cache.client().pubsub()
    listener.subscribe("news")
    during = kinds()
    listener.close()

    assert (during, kinds()) == (["pub/sub"], [])


def test_a_blocking_command(cache, valkey):
    """One that waits for something to be pushed is held for that."""
    client = cache.client()
    thread = threading.Thread(target=lambda: client.blpop(["blocked"], timeout=10))
    thread.start()
    while not kinds():
        time.sleep(0.002)
    during = kinds()
    valkey.ask("LPUSH", "blocked", "1")
    thread.join(10)

    assert (during, kinds()) == (["blocking"], [])


def test_a_transaction(cache):
    """WATCH keeps a connection until the transaction is over."""
    pipeline = cache.client().pipeline()
    pipeline.watch("k")
    during = kinds()
    pipeline.reset()

    assert (during, kinds()) == (["transaction"], [])


def test_a_command_is_held_for_nothing_special(cache):
    """A connection that was borrowed for an ordinary purpose has no kind."""
    client = cache.client()
    seen = []
    client.set_response_callback("PING", lambda answer, **_: answer)
    original = client.connection_pool.release

    def release(connection):
        seen.extend(kinds())
        original(connection)

    client.connection_pool.release = release
    client.get("k")

    assert seen == [None]


def test_a_client_with_one_connection(cache):
    """`single_connection_client` reserves one for as long as the client lives."""
    client = cache.client(single_connection_client=True)
    during = kinds()
    client.close()

    assert (during, kinds()) == (["reserved"], [])


@pytest.mark.parametrize("way", ["from_url", "client"])
def test_other_ways_to_a_client_with_one_connection(cache, way):
    """Made from a URL or by another client, it reserves one all the same."""
    if way == "client":
        cache.keep(cache.client().client())
    else:
        cache.keep(cache.kind.from_url(f"redis://127.0.0.1:{cache.port}", single_connection_client=True))

    assert kinds() == ["reserved"]


def test_a_transaction_by_a_function(cache):
    """`Redis.transaction` watches for its caller."""
    during = []
    cache.client().transaction(lambda _: during.extend(kinds()), "k")

    assert during == ["transaction"]


def test_a_lock_reserves_nothing(cache):
    """A lock is taken and released by commands, each of which borrows for a moment."""
    client, seen = cache.client(), []
    original = client.connection_pool.release

    def release(connection):
        seen.extend(kinds())
        original(connection)

    client.connection_pool.release = release
    with client.lock("lock", timeout=10):
        pass

    assert set(seen) == {None}


def test_a_package_between_does_not_hide_what_for(cache, tmp_path):
    """A framework that waits for work by a blocking command holds its connection for that, whoever called it."""
    path = tmp_path / "site-packages" / "somequeue" / "worker.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "def work(client):\n    listener = client.pubsub()\n    listener.subscribe('x')\n    return listener"
    )
    names = {}
    exec(compile(path.read_text(), str(path), "exec"), names)
    listener = names["work"](cache.client())
    during = kinds()
    listener.close()

    assert during == ["pub/sub"]


def test_without_call_sites_it_is_still_told_what_for(telemetry, valkey, library):
    """`call_site=False` is about where, and a subscription is not a leak for it."""
    watch(telemetry, "redis", call_site=False)
    cache = Cache(library, valkey.port)
    listener = cache.client().pubsub()
    listener.subscribe("news")
    during = kinds()
    listener.close()
    cache.close()

    assert during == ["pub/sub"]


class AsyncCache:
    """The same, in one event loop."""

    def __init__(self, library, port):
        self.package = library.asyncio
        self.options = {"host": "127.0.0.1", "port": port}

    @property
    def kind(self):
        return self.package.Redis if hasattr(self.package, "Redis") else self.package.Valkey

    def run(self, scenario):
        """What *scenario* returns of a client of the given options."""

        async def main():
            made = []

            def client(**options):
                made.append(self.kind(**self.options, **options))
                return made[-1]

            try:
                return await asyncio.wait_for(scenario(client), 20)
            finally:
                for one in made:
                    closed = one.aclose() if hasattr(one, "aclose") else one.close()
                    if inspect.isawaitable(closed):
                        await closed
                    await one.connection_pool.disconnect()

        return asyncio.run(main())


@pytest.fixture
def async_cache(watched, valkey, library):
    pytest.importorskip(f"{library.__name__}.asyncio")
    return AsyncCache(library, valkey.port)


def test_an_asyncio_subscription(async_cache):
    """It is held for pub/sub."""

    async def scenario(client):
        listener = client().pubsub()
        await listener.subscribe("news")
        during = kinds()
        await (listener.aclose if hasattr(listener, "aclose") else listener.close)()
        return during, kinds()

    assert async_cache.run(scenario) == (["pub/sub"], [])


def test_an_asyncio_transaction(async_cache):
    """WATCH keeps a connection there too."""

    async def scenario(client):
        pipeline = client().pipeline()
        await pipeline.watch("k")
        during = kinds()
        await pipeline.reset()
        return during, kinds()

    assert async_cache.run(scenario) == (["transaction"], [])


def test_an_asyncio_client_with_one_connection(async_cache):
    """`async with` reserves it."""

    async def scenario(client):
        async with client(single_connection_client=True):
            return kinds()

    assert async_cache.run(scenario) == ["reserved"]


def test_an_asyncio_blocking_command(async_cache):
    """One that waits for something to be pushed is held for that, and is not overdue when it takes its time."""

    async def scenario(client):
        one = client()

        async def pop():
            return await one.blpop(["asyncio-blocked"], timeout=10)

        task = asyncio.create_task(pop())
        while not kinds():
            await asyncio.sleep(0.002)
        during = kinds()
        await one.lpush("asyncio-blocked", "1")
        await task
        return during

    assert async_cache.run(scenario) == ["blocking"]


def test_an_asyncio_client_that_reserves_late(async_cache):
    """Without `async with` the first command reserves the connection, for good and not for that command."""

    async def scenario(client):
        await client(single_connection_client=True).get("k")
        return kinds()

    assert async_cache.run(scenario) == ["reserved"]


# -- HTTP ------------------------------------------------------------------------------


def test_an_answer_that_is_not_closed_is_held(watched):
    """Who streams an answer holds its connection, until the answer is closed."""
    httpx = pytest.importorskip("httpx")
    import webs

    with webs.Ground() as ground, webs.Server(ground) as web, httpx.Client(trust_env=False, verify=False) as client:
        with client.stream("GET", web.url("/stream")):
            during = [(holder.pool, holder.kind, holder.task) for holder in otel_pools.holders()]
        after = otel_pools.holders()

    assert during == [(f"127.0.0.1:{web.port}", None, threading.current_thread().name)]
    assert after == ()
