"""An application cannot tell that it is watched: not by what it gets, not by what it looks at, not by what is left."""

from __future__ import annotations

import asyncio
import copy
import gc
import inspect
import pickle
import sys
import typing
import weakref
from importlib import import_module

import apps
import httpcore
import pytest
import redis
import redis.asyncio
import redis.asyncio.retry
import sqlalchemy
from apps import APPS
from redis.backoff import NoBackoff
from sqlalchemy.pool import NullPool, QueuePool, SingletonThreadPool, StaticPool

import otel_pools
from otel_pools._hooks import Either, Hook, resolve
from otel_pools.targets import LIBRARIES

EVERYTHING = {"span_threshold": 0, "stacks": True, "busy_time": True, "poll_idle": True, "native_redis": "both"}
apps_of = {app.__name__: app for app in APPS}
LIBRARY = {"sqlalchemy": "sqlalchemy", "redis": "redis", "httpx": "httpcore"}


@pytest.fixture
def watch(telemetry):
    """Begin to watch, with all that can be watched."""

    def begin(*targets):
        providers = {"meter_provider": telemetry.meter_provider, "tracer_provider": telemetry.tracer_provider}
        otel_pools.instrument(*targets, **providers, **EVERYTHING)

    return begin


# -- what it gets --------------------------------------------------------------------------


@pytest.mark.parametrize("name", apps_of)
def test_it_meets_the_same(name, watch, telemetry):
    """Results, errors, their objects, causes and contexts, and the ends of their tracebacks are those without us."""
    app = apps_of[name]
    bare = app().go()
    watch(app.target)
    watched = app().go()

    assert watched == bare
    assert telemetry.value("otel_pools.checkouts") > 0


class End(BaseException):
    """As KeyboardInterrupt, which would end pytest."""


@pytest.mark.parametrize("error", [End("over"), SystemExit(3), GeneratorExit("gone")], ids=repr)
@pytest.mark.parametrize("name", ["SQLAlchemy", "Redis", "HTTP"])
def test_an_end_of_the_program_passes(name, error, watch):
    """What is no `Exception` comes out as the very object that the server's side raised, and the next call works."""
    app = apps_of[name]
    watch(app.target)
    one = app()
    one.server.refusal = error
    with pytest.raises(type(error)) as caught:
        one.take()

    assert caught.value is error
    assert one.take() is not None


# -- what it looks at ----------------------------------------------------------------------


def rows(target):
    """The places where the table attaches here."""
    for row in import_module(LIBRARIES[target].target).TARGET.hooks[LIBRARY[target]]:
        for hook in row.rows if isinstance(row, Either) else (row,):
            if isinstance(hook, Hook):
                try:
                    yield resolve(hook.where)
                    break
                except (LookupError, ImportError):
                    continue


def layers(function):
    """It and what it is wrapped around; one method may mean two things."""
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


def plain(owner, name):
    """The function itself."""
    return getattr(vars(owner)[name], "__func__", vars(owner)[name])


@pytest.mark.parametrize("target", LIBRARY)
def test_a_method_looks_the_same(target, watch):
    """Its name, place, documentation, signature, types and kind are those of the method it stands for."""
    originals = [(owner, name, plain(owner, name)) for owner, name in rows(target)]
    watch(target)
    twins = [plain(owner, name) for owner, name, _ in originals]

    assert originals
    for (_, name, original), twin in zip(originals, twins, strict=True):
        assert twin is not original, name
        assert original in layers(twin)
        for attribute in ("__name__", "__qualname__", "__module__", "__doc__", "__annotations__"):
            assert getattr(twin, attribute) == getattr(original, attribute)
        assert inspect.signature(twin) == inspect.signature(original)
        assert inspect.iscoroutinefunction(twin) == inspect.iscoroutinefunction(original)
        assert inspect.isfunction(twin) == inspect.isfunction(original)
        assert inspect.getsource(twin) == inspect.getsource(original)
        assert inspect.unwrap(twin) is inspect.unwrap(original)


def contents(library):
    """Everything in every module and class of a library: where, and the very objects, in their order."""
    found = {}
    for name, module in sorted(sys.modules.items()):
        if name.partition(".")[0] == library:
            found[name] = dict(vars(module))
            for thing in list(vars(module).values()):
                if isinstance(thing, type) and thing.__module__ == name:
                    found[f"{name}:{thing.__qualname__}"] = dict(vars(thing))
    return found


def differences(before, after):
    """What is not the very same object."""
    missing = {}
    return {
        f"{where}.{name}"
        for where in before.keys() | after.keys()
        for name in before.get(where, {}).keys() | after.get(where, {}).keys()
        if before.get(where, {}).get(name, missing) is not after.get(where, {}).get(name, missing)
    }


# Caches of Python and of the libraries, which anybody's use fills.
CACHES = ("__abstractmethods__", "_abc_impl", "__warningregistry__")


@pytest.mark.parametrize("target", LIBRARY)
def test_nothing_is_left_in_a_library(target, watch):
    """After `uninstrument` each attribute of each class and module is the very object it was, in its old place."""
    library = LIBRARY[target]
    for app in APPS:
        app().go()  # what a library does at its first use is done
    places = {f"{owner.__module__}:{owner.__qualname__}.{name}" for owner, name in rows(target)}
    before = contents(library)
    watch(target)
    during = contents(library)
    for app in APPS:
        app().go()
    otel_pools.uninstrument(target)
    after = contents(library)

    changed = {where for where in differences(before, during) if not where.endswith(CACHES)}
    assert changed - places - {where for where in changed if ".do_execute" in where} == set()
    assert places <= changed
    assert {where for where in differences(before, after) if not where.endswith(CACHES)} == set()
    assert {where: list(names) for where, names in before.items()} == {
        where: list(names) for where, names in after.items()
    }


@pytest.mark.parametrize("name", apps_of)
def test_nothing_is_written_into_a_pool(name, watch):
    """A pool has the attributes it has without us."""
    app = apps_of[name]
    one, other = app(), app()
    one.go()
    watch(app.target)
    other.go()

    assert list(vars(one.pool)) == list(vars(other.pool))


# -- copies, pickles and lives -----------------------------------------------------------------


def sent():
    """A request that has been answered."""
    pool, request = apps.HTTP().pool, apps.asked()
    answer = pool.handle_request(request)
    answer.read()
    answer.close()
    return request


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_a_request_can_be_duplicated(duplicate, watch):
    """A request that was answered can be copied and pickled, as without us."""
    bare = duplicate(sent())
    watch("httpx")
    watched = duplicate(sent())

    assert watched.url == bare.url


@pytest.mark.parametrize("duplicate", [copy.copy, lambda pool: type(pool)(pool.connection_class, 2)])
def test_a_copied_pool_works(duplicate, watch, telemetry):
    """A copy of a pool lends and takes back, and is one more pool."""
    watch("redis")
    original = apps.Redis().pool
    original.release(original.get_connection())
    other = duplicate(original)
    other.release(other.get_connection())

    assert telemetry.value("otel_pools.checkouts") == 2


@pytest.mark.parametrize("name", ["SQLAlchemy", "Redis", "BlockingRedis", "HTTP"])
def test_what_is_let_go_is_gone(name, watch):
    """A pool, and what it lent, live as long as without us, which Python's counting of references alone decides."""
    app = apps_of[name]

    def lives():
        gc.disable()
        try:
            one = app()
            held = one.take()
            refs = [weakref.ref(held), weakref.ref(one.pool)]
            del held
            first = refs[0]() is None
            del one
            return first, refs[1]() is None
        finally:
            gc.enable()

    bare = lives()
    watch(app.target)

    assert lives() == bare


class Thing:
    """What a function of the application has at hand."""


def opened_once(library, port):
    """A pool of redis-py that does not try again."""
    return library.ConnectionPool(host="127.0.0.1", port=port, retry=library.retry.Retry(NoBackoff(), 0))


async def open_redis(_):
    await opened_once(redis.asyncio, CLOSED).get_connection()


async def open_http(_):
    await httpcore.AsyncConnectionPool().request("GET", f"http://127.0.0.1:{CLOSED}/")


async def open_sync_http(_):
    httpcore.ConnectionPool().request("GET", f"http://127.0.0.1:{CLOSED}/")


async def reopen_redis(port):
    """The same outside of a checkout, as who holds a connection does that was closed."""
    connection = opened_once(redis, port).get_connection()
    connection.disconnect()
    connection.port = CLOSED
    connection.send_command("PING")


async def reopen_async_redis(port):
    connection = await opened_once(redis.asyncio, port).get_connection()
    await connection.disconnect()
    connection.port = CLOSED
    await connection.send_command("PING")


CLOSED = 1  # a port at which nobody listens


@pytest.mark.parametrize("open", [open_redis, open_http, open_sync_http, reopen_redis, reopen_async_redis])
def test_what_an_error_has_seen_is_gone_with_it(open, watch, valkey):
    """Of a connection that cannot be opened nothing stays: the error's frames live no longer than without us."""

    async def attempt():
        thing = Thing()
        try:  # not `pytest.raises`, which keeps what it has caught
            await open(valkey.port)
        except (httpcore.ConnectError, redis.ConnectionError):
            return weakref.ref(thing)

    async def lives():
        gc.disable()
        try:
            ref = await attempt()
            at_once = ref() is None
            gc.collect()
            return at_once, ref() is None
        finally:
            gc.enable()

    bare = asyncio.run(lives())  # asyncio itself keeps what it could not connect, from 3.12 on
    watch()

    assert asyncio.run(lives()) == bare


# -- pools of an application's own -----------------------------------------------------------------


def own(kind, *methods):
    """A class that overrides these methods, calls the inherited ones, and counts."""

    def override(name):
        def method(self, *args, **kwargs):
            calls.append(name)
            return getattr(super(Own, self), name)(*args, **kwargs)

        return method

    calls = []
    Own = type("Own", (kind,), {name: override(name) for name in methods})
    Own.calls = calls
    return Own


def test_a_subclass_of_a_redis_pool(watch, telemetry):
    """A pool class that overrides and calls what it inherits is called as often, and counted once."""
    kind = own(redis.ConnectionPool, "get_connection", "release", "make_connection")
    app = type("App", (apps.Redis,), {"kind": kind})
    bare, calls = app().go(), list(kind.calls)
    kind.calls.clear()
    watch("redis")

    assert app().go() == bare
    assert kind.calls == calls
    assert sum(telemetry.read().checkouts().values()) == calls.count("get_connection")


def test_a_subclass_of_a_sqlalchemy_pool(watch, telemetry):
    """The same of SQLAlchemy, whose pools override each other's methods too."""
    kind = own(QueuePool, "connect", "_do_get", "_do_return_conn", "_create_connection")
    app = type("App", (apps.SQLAlchemy,), {"kind": kind})
    bare, calls = app().go(), list(kind.calls)
    kind.calls.clear()
    watch("sqlalchemy")

    assert app().go() == bare
    assert kind.calls == calls
    assert sum(telemetry.read().checkouts().values()) == calls.count("connect")


def test_a_subclass_of_an_http_pool(watch, telemetry):
    """The same of httpcore."""
    kind = own(httpcore.ConnectionPool, "handle_request", "create_connection", "_close_connections")

    class App(apps.HTTP):
        def make(self):
            return kind(network_backend=apps.Network(self.server), **apps.LIMITS)

    bare, calls = App().go(), list(kind.calls)
    kind.calls.clear()
    watch("httpx")

    assert App().go() == bare
    assert kind.calls == calls
    assert sum(telemetry.read().checkouts().values()) == calls.count("handle_request")


@pytest.mark.parametrize("kind", [NullPool, StaticPool, SingletonThreadPool, QueuePool])
def test_every_kind_of_pool_of_sqlalchemy(kind, watch):
    """Borrowing twice and giving back does the same, whatever the pool."""

    def go():
        server = apps.Server()
        pool = kind(lambda: apps.Dbapi(server))
        one, two = pool.connect(), pool.connect()
        same = one.dbapi_connection is two.dbapi_connection
        met = [same, one.is_valid, one.close(), two.close(), server.opened, server.closed]
        pool.dispose()
        return [*met, server.closed]

    bare = go()
    watch("sqlalchemy")

    assert go() == bare


# -- what an application has kept ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SQLAlchemy", "Redis", "HTTP"])
def test_a_method_kept_from_before_or_meanwhile_works(name, watch, telemetry):
    """A bound method that an application keeps does its work, whether taken before, while or after we watch."""
    app = apps_of[name]
    method = {"SQLAlchemy": "raw_connection", "Redis": "get_connection", "HTTP": "handle_request"}[name]
    arguments = (apps.asked(),) if name == "HTTP" else ()

    def works(kept):
        held = kept(*arguments)
        return app.give_back(one, held) if hasattr(app, "give_back") else held is not None

    one = app()
    before = getattr(one.pool, method)
    watch(app.target)
    meanwhile = getattr(one.pool, method)
    assert works(before)
    assert works(meanwhile)
    otel_pools.uninstrument()
    two = app()
    assert type(two.pool).__dict__.get(method) is type(one.pool).__dict__.get(method)
    assert two.take() is not None
    assert telemetry.points("otel_pools.checkouts") == []


def test_a_class_made_meanwhile_works(watch, telemetry):
    """A class that has taken over a method while we watched works when we have gone, and nothing is counted."""
    watch("redis")
    own_kind = type("Own", (redis.ConnectionPool,), {"borrow": redis.ConnectionPool.get_connection})
    otel_pools.uninstrument()
    pool = own_kind(connection_class=apps.line(apps.Server()), max_connections=2)
    held = pool.borrow()
    pool.release(held)

    assert pool.borrow() is held
    assert telemetry.points("otel_pools.checkouts") == []


def test_type_hints_can_be_read(watch):
    """`typing.get_type_hints` of a method says what it says without us, or fails the same way."""

    def hints():
        found = []
        for target in LIBRARY:
            for owner, name in rows(target):
                try:
                    found.append(typing.get_type_hints(getattr(owner, name)))
                except Exception as error:
                    found.append(repr(error))
        return found

    bare = hints()
    watch()

    assert hints() == bare


def test_an_engine_and_its_statements(watch):
    """A real engine, with `busy_time` on, says the same of a statement and of a wrong one."""

    def go():
        engine = sqlalchemy.create_engine("sqlite://", poolclass=StaticPool)
        with engine.connect() as connection:
            rows = connection.execute(sqlalchemy.text("select 1 as one")).all()
            many = connection.exec_driver_sql("select ?", (5,)).scalar()
            with pytest.raises(sqlalchemy.exc.OperationalError) as caught:
                connection.execute(sqlalchemy.text("select wrong"))
        engine.dispose()
        return rows, many, apps.told(caught.value, None)

    bare = go()
    watch("sqlalchemy")

    assert go() == bare
