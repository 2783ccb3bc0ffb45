"""SQLAlchemy's pools keep the contract; then, what is special to them."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from flavours import CountingCreator
from sqlalchemy import create_engine
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import AssertionPool, AsyncAdaptedQueuePool, QueuePool, SingletonThreadPool, StaticPool

import otel_pools
from otel_pools import _doors, _guard, _instruments
from otel_pools.targets import sqlalchemy as sqlalchemy_target
from otel_pools.testing import PoolContract, Telemetry


class TestSync(PoolContract):
    """A QueuePool of an engine."""

    target = "sqlalchemy"
    exhausted = PoolTimeout

    def open(self):
        return create_engine("sqlite://", poolclass=QueuePool, pool_size=1, max_overflow=1, pool_timeout=0.01)

    def borrow(self, pool):
        return pool.connect()

    def give_back(self, pool, held):
        held.close()

    def shut(self, pool):
        pool.dispose()

    def test_overflow_is_open_beyond_the_base_size(self, do, pool, telemetry):
        """Of two connections in a pool of one, one is overflow; its limit is told too."""
        held = [pool.connect(), pool.connect()]

        now = telemetry.read()

        assert now.value("otel_pools.connection.overflow") == 1
        assert now.value("otel_pools.connection.overflow.max") == 1
        assert now.value("db.client.connection.idle.max") == 1
        for one in held:
            one.close()


class TestAsync(PoolContract):
    """An AsyncAdaptedQueuePool of an AsyncEngine."""

    target = "sqlalchemy"
    exhausted = PoolTimeout

    def open(self):
        return create_async_engine(
            "sqlite+aiosqlite://", poolclass=AsyncAdaptedQueuePool, pool_size=1, max_overflow=1, pool_timeout=0.01
        )

    async def borrow(self, pool):
        return await pool.connect()

    async def give_back(self, pool, held):
        await held.close()

    async def shut(self, pool):
        await pool.dispose()


class TestBare(PoolContract):
    """A QueuePool that no engine knows."""

    target = "sqlalchemy"
    exhausted = PoolTimeout

    def open(self):
        return QueuePool(Stub, pool_size=1, max_overflow=1, timeout=0.01)

    def borrow(self, pool):
        return pool.connect()

    def give_back(self, pool, held):
        held.close()

    def shut(self, pool):
        pool.dispose()


class Stub:
    """A DBAPI connection that does nothing."""

    def rollback(self):
        pass

    def close(self):
        pass


def names(telemetry):
    """Pool names by which something is counted now."""
    return {
        point.attributes["db.client.connection.pool.name"] for point in telemetry.points("db.client.connection.max")
    }


@pytest.fixture
def watched(telemetry):
    """SQLAlchemy, watched."""
    otel_pools.instrument("sqlalchemy", meter_provider=telemetry.meter_provider)
    return telemetry


@pytest.fixture
def creator():
    """Connections that count themselves; all are closed in the end."""
    return CountingCreator()


def engine_of(creator, url="sqlite://", **options):
    """An engine whose connections come from *creator*."""
    return create_engine(url, creator=creator, poolclass=options.pop("poolclass", QueuePool), **options)


# -- who a pool is ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://u:s3cret@db/app", ("postgresql", "app", "db", None)),
        ("postgresql+psycopg://u:s3cret@db:5433/app?sslmode=require", ("postgresql", "app", "db", 5433)),
        ("postgresql://u:s3cret@/app?host=/var/run/postgresql", ("postgresql", "app", "/var/run/postgresql", None)),
        ("postgresql://u:s3cret@/app?host=a:1&host=b:2", ("postgresql", "app", "a:1,b:2", None)),
        ("postgresql://u:s3cret@/app?host=a,b&port=1,2", ("postgresql", "app", "a:1,b:2", None)),
        ("postgresql://u:s3cret@/app?host=a&port=5433", ("postgresql", "app", "a", 5433)),
        ("postgresql://u:s3cret@/app?host=a:5433", ("postgresql", "app", "a", 5433)),
        ("postgresql://u:s3cret@/app?host=a,b", ("postgresql", "app", "a:5432,b:5432", None)),
        ("postgresql://u:s3cret@[::1]:5433/app", ("postgresql", "app", "::1", 5433)),
        ("mysql+pymysql://u:s3cret@db:3306/shop", ("mysql", "shop", "db", None)),
        ("mariadb+pymysql://u:s3cret@db:3307/shop", ("mariadb", "shop", "db", 3307)),
        ("mssql+pyodbc://u:s3cret@db:1433/erp?driver=x", ("microsoft.sql_server", "erp", "db", None)),
        ("oracle+oracledb://u:s3cret@db:1521/?service_name=orcl", ("oracle.db", "orcl", "db", None)),
        ("oracle+oracledb://u:s3cret@db:1521/XE", ("oracle.db", "XE", "db", None)),
        ("sqlite://", ("sqlite", None, None, None)),
        ("sqlite:////srv/private/app.db", ("sqlite", "app.db", None, None)),
        ("sqlite:///file:/srv/app.db?mode=ro&uri=true", ("sqlite", "app.db", None, None)),
        ("unheard+of://u:s3cret@db/x", ("other_sql", "x", "db", None)),
    ],
)
def test_identity_from_the_url(url, expected):
    """System, namespace, server and port by the semantic conventions; nothing secret."""
    identity = sqlalchemy_target._located(make_url(url))

    assert (identity.system, identity.namespace, identity.address, identity.port) == expected
    assert "s3cret" not in repr(identity)


def test_name_by_the_pools_logging_name(watched, creator):
    """`pool_logging_name` names the pool, and stays when dispose() replaces it."""
    engine = engine_of(creator, pool_logging_name="orders")
    engine.connect().close()
    engine.dispose()

    assert names(watched) == {"orders"}


def test_name_by_the_user(watched, creator):
    """`name_pool` names a pool met already, with whoever holds it, and its successors."""
    engine = engine_of(creator)
    held = engine.connect()
    otel_pools.name_pool(engine, "mine")
    now = watched.read()
    held.close()
    back = watched.read()
    engine.dispose()

    assert [point.value for point in now.points("otel_pools.use.oldest", otel_pools__pool__name="mine")] != [0]
    assert now.points("db.client.connection.count", db__client__connection__pool__name="sqlite") == []
    assert back.value("db.client.connection.use_time", db__client__connection__pool__name="mine") == 1
    assert names(watched) == {"mine"}


def test_name_of_an_async_engine(watched):
    """`name_pool` takes an AsyncEngine."""
    engine = create_async_engine("sqlite+aiosqlite:///x.db", poolclass=AsyncAdaptedQueuePool)
    otel_pools.name_pool(engine, "mine")

    assert names(watched) == {"mine"}


def test_name_of_something_else(watched):
    """`name_pool` of what has no pool is the caller's mistake, and says so."""
    with pytest.raises(TypeError, match="no pool we know: int"):
        otel_pools.name_pool(1, "mine")


def test_name_by_setting(telemetry):
    """The `names` setting maps a server, or a server and database, to a name."""
    otel_pools.instrument("sqlalchemy", meter_provider=telemetry.meter_provider, names="db:5433/app=shop, db=rest")
    engines = [engine_of(CountingCreator(), f"postgresql+psycopg://{host}") for host in ("db:5433/app", "db/app")]

    assert names(telemetry) == {"shop", "rest"}
    assert len(engines) == 2


def test_primary_and_replica_are_told_apart(watched):
    """One database on two servers is one name and two series."""
    engines = [engine_of(CountingCreator(), f"postgresql+psycopg://{host}/app") for host in ("primary", "replica")]

    points = watched.points("db.client.connection.max")

    assert {p.attributes["server.address"]: p.value for p in points} == {"primary": 15, "replica": 15}
    assert len(engines) == 2


def test_equal_names_add_up(watched, creator):
    """Two engines with one URL are one series, and their numbers its sum."""
    engines = [engine_of(creator), engine_of(creator)]
    held = [engine.connect() for engine in engines]

    now = watched.read()

    assert now.value("otel_pools.pools") == 2
    assert (now.count("used"), now.value("db.client.connection.max")) == (2, 30)
    for one in held:
        one.close()


def test_a_pool_of_two_engines_counts_once(watched, creator):
    """Two engines on one pool are one pool."""
    one = engine_of(creator)
    other = create_engine("sqlite://", pool=one.pool)
    held = [one.connect(), other.connect()]

    now = watched.read()

    assert (now.count("used"), now.value("otel_pools.pools")) == (2, 1)
    for each in held:
        each.close()


def test_a_bare_pool_is_named_after_what_is_known(watched, creator):
    """Without an engine: the logging name, else the system, which is unknown."""
    pools = [QueuePool(creator), QueuePool(creator, logging_name="bare")]
    for pool in pools:
        pool.connect().close()

    assert names(watched) == {"other_sql", "bare"}


def test_every_option_of_create_engine_still_works(watched, creator):
    """SQLAlchemy reads from the constructors' code which options exist: they must be left alone."""
    engine = engine_of(
        creator,
        pool_pre_ping=True,
        pool_recycle=7,
        pool_use_lifo=True,
        pool_reset_on_return=None,
        logging_name="mine",
        hide_parameters=True,
        query_cache_size=3,
    )

    assert (engine.pool._pre_ping, engine.pool._recycle, engine.logging_name) == (True, 7, "mine")
    assert names(watched) == {"mine"}


def test_an_engine_never_used_is_seen(watched, creator):
    """A pool shows its limits from its engine's creation on, and again when dispose() has replaced it."""
    engine = engine_of(creator, pool_size=2, max_overflow=3)
    first = watched.value("db.client.connection.max")
    engine.dispose()

    assert (first, watched.value("db.client.connection.max")) == (5, 5)


# -- other kinds of pool ------------------------------------------------------------


def test_connections_that_could_not_be_opened_are_not_known(watched, creator):
    """Of those that failed nothing is kept: an outage may last for days."""
    creator.fail = True
    pools = [QueuePool(creator) for _ in range(5)]
    for pool in pools:
        with pytest.raises(sqlite3.OperationalError):
            pool.connect()

    assert _doors.SQLAlchemyPoolInstrumentor._registry.owners == {}


def test_connections_that_go_with_their_pool_are_closed(watched, telemetry, creator):
    """What comes back to a pool that was replaced goes with it, closed by its driver alone; it is counted as closed."""
    engine = engine_of(creator)
    held = [engine.connect(), engine.connect()]
    engine.dispose()
    for connection in held:
        connection.close()
    before = telemetry.read().closed()
    del held, connection
    gc.collect()

    assert (before, telemetry.read().closed()) == ({}, {"closed": 2})


@pytest.mark.parametrize("end", ["detach", "invalidate", "soft", "dispose", "overflow"])
def test_what_was_closed_is_not_closed_again_when_it_goes(watched, telemetry, creator, end):
    """Whatever becomes of a connection, it is closed once."""
    pool = QueuePool(creator, pool_size=1)
    kept, fairy = pool.connect(), pool.connect()
    if end == "detach":
        fairy.detach()
    elif end != "overflow":
        kept.close()
    if end in {"invalidate", "soft"}:
        fairy.invalidate(soft=end == "soft")
        fairy = pool.connect() if end == "soft" else fairy
    fairy.close()
    pool.dispose()
    if end in {"detach", "overflow"}:
        kept.close()
    del pool, kept, fairy
    gc.collect()
    now = telemetry.read()

    assert sum(now.closed().values()) == now.value("otel_pools.connection.created") == creator.made


def test_unlimited_overflow_has_no_maximum(watched, creator):
    """`max_overflow=-1` is no limit, so no limit is reported."""
    engine = engine_of(creator, pool_size=1, max_overflow=-1)
    held = [engine.connect(), engine.connect()]

    now = watched.read()

    assert now.points("db.client.connection.max") == []
    assert now.points("otel_pools.connection.overflow.max") == []
    assert now.value("otel_pools.connection.overflow") == 1
    for one in held:
        one.close()


def test_static_pool_is_one_connection(watched, creator):
    """Three loans of a StaticPool are one connection, and never a negative number."""
    engine = engine_of(creator, poolclass=StaticPool)
    held = [engine.raw_connection() for _ in range(3)]
    out = watched.read()
    for one in held:
        one.close()
    back = watched.read()

    assert (out.count("used"), out.value("db.client.connection.max")) == (1, 1)
    assert (back.count("used"), back.count("idle"), creator.open) == (0, 1, 1)


def test_singleton_thread_pool(watched, creator):
    """A thread that asks again gets the same loan: one connection, one wait, one use."""
    engine = engine_of(creator, poolclass=SingletonThreadPool)
    one = engine.raw_connection()
    other = engine.raw_connection()
    out = watched.read()
    other.close()
    one.close()
    back = watched.read()

    assert (out.count("used"), out.value("otel_pools.checkouts")) == (1, 1)
    assert (back.count("used"), back.count("idle"), back.value("db.client.connection.use_time")) == (0, 1, 1)
    engine.dispose()


def test_assertion_pool_refuses(watched, creator):
    """AssertionPool's refusal of a second loan is exhaustion, not a timeout."""
    engine = engine_of(creator, poolclass=AssertionPool)
    held = engine.raw_connection()
    with pytest.raises(AssertionError, match="already checked out"):
        engine.raw_connection()

    now = watched.read()

    assert (now.count("used"), now.value("db.client.connection.max")) == (1, 1)
    assert now.checkouts() == {("new", None): 1, ("idle", "exhausted"): 1}
    assert now.value("db.client.connection.timeouts") == 0
    held.close()


def test_a_users_subclass(watched, creator):
    """A subclass that calls its parents is read like them."""

    class Mine(QueuePool):
        def connect(self):
            return super().connect()

    engine = engine_of(creator, poolclass=Mine)
    held = engine.raw_connection()

    now = watched.read()

    assert (now.count("used"), now.value("otel_pools.checkouts")) == (1, 1)
    held.close()


def test_an_unreadable_pool(watched, creator, monkeypatch, caplog):
    """A pool class we cannot read costs its numbers and one log line; it works, and its waits are counted."""
    monkeypatch.setattr(_guard, "loud", False)

    class Odd(QueuePool):
        @property
        def _max_overflow(self):
            raise RuntimeError("odd")

        @_max_overflow.setter
        def _max_overflow(self, value):
            pass

        def _do_get(self):
            return self._create_connection()

        def _do_return_conn(self, record):
            record.close()

    engine = engine_of(creator, poolclass=Odd)
    engine.connect().close()

    assert watched.points("db.client.connection.count") == []
    assert watched.value("otel_pools.checkouts") == 1
    assert caplog.text.count("lost a measurement (reading a ") == 1


def test_a_creator_that_fails(watched, creator):
    """An empty pool whose creator fails five times has opened nothing, and the creator's own error comes out."""
    creator.fail = True
    engine = engine_of(creator)
    for _ in range(5):
        with pytest.raises(DBAPIError):
            engine.connect()
    down = watched.read()
    creator.fail = False
    engine.connect().close()
    up = watched.read()

    assert (down.count("used"), down.count("idle")) == (0, 0)
    assert down.checkouts() == {("new", "connect_error"): 5}
    assert (up.count("idle"), up.value("otel_pools.connection.created"), creator.made) == (1, 1, 1)


def test_the_error_is_the_very_object(watched):
    """What the creator raises is what the caller catches, raised where it was raised."""
    error = RuntimeError("mine")

    def fail():
        raise error

    with pytest.raises(RuntimeError) as caught:
        QueuePool(fail).connect()

    assert caught.value is error
    assert caught.traceback[-1].name == "fail"


def test_a_creator_that_asks_the_pool_inside(watched, creator):
    """A creator that borrows from another pool: each checkout keeps its own path."""
    inner = QueuePool(creator, logging_name="inner")
    inner.connect().close()

    def create():
        inner.connect().close()
        return creator()

    outer = QueuePool(create, logging_name="outer")
    outer.connect().close()
    now = watched.read()

    def path(name):
        points = now.points("otel_pools.checkouts", otel_pools__pool__name=name)
        return {point.attributes["otel_pools.checkout.path"]: point.value for point in points if point.value}

    assert (path("outer"), path("inner")) == ({"new": 1}, {"new": 1, "idle": 1})


# -- who waits ----------------------------------------------------------------------


def test_waiters_are_pending_and_age(watched, creator):
    """Who stands in the queue is pending, the oldest wait grows meanwhile, and its path is `queued`."""
    engine = engine_of(creator, pool_size=1, max_overflow=0, pool_timeout=10)
    held = engine.raw_connection()
    with ThreadPoolExecutor(3) as executor:
        waiting = [executor.submit(lambda: engine.raw_connection().close()) for _ in range(3)]
        while watched.value("db.client.connection.pending_requests") < 3:
            time.sleep(0.001)
        during = watched.read()
        held.close()
        for future in waiting:
            future.result()
    after = watched.read()

    assert during.value("otel_pools.wait.oldest") > 0
    assert after.value("db.client.connection.pending_requests") == 0
    assert after.value("otel_pools.wait.oldest") == 0
    assert after.checkouts()["queued", None] >= 1
    assert sum(after.checkouts().values()) == 4


def test_tasks_wait_too(watched):
    """The same in asyncio; a cancelled waiter is pending no more, and its wait a cancelled checkout."""

    async def scenario():
        engine = create_async_engine(
            "sqlite+aiosqlite://", poolclass=AsyncAdaptedQueuePool, pool_size=1, max_overflow=0, pool_timeout=10
        )
        async with engine.connect():
            waiting = [asyncio.create_task(engine.connect().start()) for _ in range(4)]
            await asyncio.sleep(0.01)
            four = watched.read()
            waiting.pop().cancel()
            await asyncio.sleep(0)
            three = watched.read()
        for task in waiting:
            await (await task).close()
        await engine.dispose()
        return four, three

    four, three = asyncio.run(scenario())

    assert four.value("db.client.connection.pending_requests") == 4
    assert four.value("otel_pools.wait.oldest") > 0.005
    assert three.value("db.client.connection.pending_requests") == 3
    assert watched.read().checkouts() == {("new", None): 1, ("queued", "cancelled"): 1, ("queued", None): 3}


def test_an_abandoned_checkout(telemetry, creator):
    """A greenlet that is collected while it waits is a cancelled checkout; no span, as a collector may hold locks."""
    greenlet = pytest.importorskip("greenlet")
    otel_pools.instrument(
        "sqlalchemy", meter_provider=telemetry.meter_provider, tracer_provider=telemetry.tracer_provider
    )

    def create():
        greenlet.getcurrent().parent.switch()
        return creator()

    pool = QueuePool(create)
    waiting = greenlet.greenlet(pool.connect)
    waiting.switch()
    during = telemetry.value("otel_pools.wait.oldest")
    del waiting
    now = telemetry.read()

    assert during > 0
    assert now.value("otel_pools.wait.oldest") == now.value("otel_pools.connection.created") == 0
    assert now.checkouts() == {("new", "cancelled"): 1}
    assert telemetry.spans == ()


def test_late_with_some_out(telemetry, creator):
    """Two idle and one out when we come: seen at once, and right when it is back."""
    engine = engine_of(creator)
    held = [engine.connect() for _ in range(3)]
    for one in held[1:]:
        one.close()
    otel_pools.instrument("sqlalchemy", meter_provider=telemetry.meter_provider)
    late = telemetry.read()
    held[0].close()
    back = telemetry.read()

    assert (late.count("used"), late.count("idle")) == (1, 2)
    assert (back.count("used"), back.count("idle")) == (0, 3)


# -- fork ---------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("disposed", [True, False], ids=["disposed", "inherited"])
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_fork(watched, creator, disposed):
    """A child starts at zero: what the parent holds, counted and waited for is the parent's."""
    engine = engine_of(creator, pool_size=3)
    one, held = engine.connect(), engine.connect()
    one.close()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with os.fdopen(writing, "w") as out:
            if disposed:
                engine.dispose(close=False)
            fresh = Telemetry()
            _doors.SQLAlchemyPoolInstrumentor._instruments.registries.clear()
            instruments = _instruments.instruments(fresh.meter_provider)
            instruments.registries["sqlalchemy"] = _doors.SQLAlchemyPoolInstrumentor._registry
            now = fresh.read()
            names = ("otel_pools.checkouts", "otel_pools.connection.created", "otel_pools.use.oldest")
            out.write(json.dumps([now.count("used"), now.count("idle"), *map(now.value, names)]))
            out.flush()
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        said = json.loads(answer.read())
    os.waitpid(child, 0)

    assert said == [0, 0 if disposed else 1, 0, 0, 0]
    assert watched.read().count("used") == 1
    held.close()


# -- beside the official instrumentation ------------------------------------------------


@pytest.mark.parametrize("order", [0, 1], ids=["official first", "ours first"])
def test_beside_the_official_instrumentation(telemetry, creator, order):
    """In either order both work, and what each takes off is its own."""
    official = pytest.importorskip("opentelemetry.instrumentation.sqlalchemy").SQLAlchemyInstrumentor()
    import sqlalchemy

    before = sqlalchemy.create_engine, vars(QueuePool.__mro__[1])["connect"]
    both = [
        lambda: official.instrument(skip_dep_check=True, tracer_provider=telemetry.tracer_provider),
        lambda: otel_pools.instrument("sqlalchemy", meter_provider=telemetry.meter_provider),
    ]
    for way in both[order:] + both[:order]:
        way()
    engine = sqlalchemy.create_engine("sqlite://", creator=creator, poolclass=QueuePool)
    with engine.connect() as connection:
        connection.exec_driver_sql("SELECT 1")
    now = telemetry.read()
    ways = [official.uninstrument, otel_pools.uninstrument]
    for way in ways[order:] + ways[:order]:
        way()

    assert (now.count("idle"), now.value("otel_pools.checkouts")) == (1, 1)
    assert any(span.name.startswith("SELECT") for span in telemetry.spans)
    assert (sqlalchemy.create_engine, vars(QueuePool.__mro__[1])["connect"]) == before


# -- a storm ---------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_thread_storm(watched, creator):
    """Eight threads, 10^5 cycles, collected all the while: every attempt is a wait, every success a use."""
    engine = engine_of(creator, pool_size=4, max_overflow=2, pool_timeout=60)
    done = threading.Event()
    cycles = 100_000 // 8

    def collect():
        while not done.wait(0.05):  # without a pause it would hold the GIL against eight threads that need it often
            watched.read()

    def work():
        for _ in range(cycles):
            engine.pool.connect().close()

    with ThreadPoolExecutor(9) as executor:
        collecting = executor.submit(collect)
        for future in [executor.submit(work) for _ in range(8)]:
            future.result()
        done.set()
        collecting.result()
    now = watched.read()

    assert now.value("otel_pools.checkouts") == 8 * cycles
    assert now.value("db.client.connection.wait_time") == 8 * cycles
    assert now.value("db.client.connection.use_time") == 8 * cycles
    assert now.value("otel_pools.samples.dropped") == 0
    assert now.count("used") == now.value("otel_pools.wait.oldest") == 0
    assert now.value("otel_pools.connection.created") - sum(now.closed().values()) == now.count("idle") == creator.open
