"""The metrics of SQLAlchemy's pools equal the server's own count, whatever happens, on every driver."""

from __future__ import annotations

import asyncio
import gc
import inspect
import random
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import flavours
import pytest
from flavours import ping
from sqlalchemy import event, exc, text
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool.base import _ConnectionRecord

import otel_pools
from otel_pools._vocabulary import REASONS


@pytest.fixture(params=flavours.names())
def flavour(request, tmp_path):
    """Every driver in turn."""
    return flavours.flavour(request.param, request, tmp_path)


# Until 2.0.5x SQLAlchemy dropped a connection, without closing it, when what should have configured it failed.
LOSES = "stranded" not in inspect.getsource(_ConnectionRecord)
# The drivers complain of such a connection when it is collected.
pytestmark = [pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")] if LOSES else []

with_server = pytest.mark.parametrize(
    "flavour", [name for name in flavours.names() if name.startswith("pg")], indirect=True
)
without_loop = pytest.mark.parametrize(
    "flavour", [name for name in flavours.names() if name in {"sqlite", "pg-psycopg"}], indirect=True
)


class Stage:
    """One engine of one flavour, and the question whether the metrics are true."""

    def __init__(self, flavour, telemetry, engine):
        self.flavour, self.telemetry, self.engine = flavour, telemetry, engine

    def is_true(self, used, idle, beside=0):
        """
        Compare with the truth; *beside* are open connections that are the pool's no more.

        Used and idle are what the scenario says, both together what the
        server sees, and so is created minus closed.
        """
        now = self.telemetry.read()

        assert (now.count("used"), now.count("idle")) == (used, idle)
        assert set(now.closed()) <= set(REASONS)
        lost = now.value("otel_pools.connection.created") - sum(now.closed().values()) - (used + idle + beside)
        assert lost == 0 or (LOSES and lost > 0)
        assert self.flavour.settles(used + idle + beside), self.flavour.open()
        return now

    def read_in_outage(self, server, checkouts):
        """Stop the server, see so many checkouts fail, and read; then start it again."""
        server.stop()
        try:
            for _ in range(checkouts):
                with pytest.raises((exc.DBAPIError, OSError)):
                    self.engine.connect()
            return self.telemetry.read()
        finally:
            server.start()

    def settled(self):
        """At rest: nobody holds or waits, every attempt is a wait, and every success a use."""
        now = self.telemetry.read()
        self.is_true(0, int(now.count("idle")))

        worked = sum(count for (_, error), count in now.checkouts().items() if error is None)
        assert now.value("db.client.connection.wait_time") == now.value("otel_pools.checkouts")
        assert now.value("db.client.connection.use_time") == worked
        assert now.value("db.client.connection.create_time") == now.value("otel_pools.connection.created")
        assert now.value("otel_pools.wait.oldest") == now.value("otel_pools.use.oldest") == 0
        return now


@pytest.fixture
def play(flavour, telemetry):
    """Run a scenario on an engine with these options; dispose afterwards, and see that nothing is left."""

    def play(scenario, **options):
        options = (
            options if "poolclass" in options else {"pool_size": 2, "max_overflow": 1, "pool_timeout": 0.05, **options}
        )

        def whole():
            stage = Stage(flavour, telemetry, flavour.engine(**options))
            try:
                scenario(stage)
            finally:
                stage.engine.dispose()

        otel_pools.instrument(
            "sqlalchemy", meter_provider=telemetry.meter_provider, tracer_provider=telemetry.tracer_provider
        )
        flavour.run(whole)

    return play


@contextmanager
def leaking():
    """SQLAlchemy warns when the garbage collector has to return a connection."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_normal(play):
    """Out and back: one used, then one idle; one wait, one use, one created."""

    def scenario(stage):
        connection = stage.engine.connect()
        ping(connection)
        stage.is_true(1, 0)
        connection.close()
        now = stage.is_true(0, 1)

        assert now.value("db.client.connection.wait_time") == 1
        assert now.value("db.client.connection.use_time") == 1
        assert now.value("db.client.connection.create_time") == 1

    play(scenario)


def test_overflow(play):
    """A connection beyond the size is overflow, and is closed for that reason when it comes back."""

    def scenario(stage):
        held = [stage.engine.connect() for _ in range(3)]
        out = stage.is_true(3, 0)
        for connection in held:
            connection.close()
        back = stage.is_true(0, 2)

        assert out.value("otel_pools.connection.overflow") == 1
        assert back.value("otel_pools.connection.overflow") == 0
        assert back.closed() == {"overflow": 1}
        assert back.value("otel_pools.connection.peak") == 3

    play(scenario)


def test_timeout(play):
    """A checkout that found none in time is a timeout and a failed wait, and takes nothing with it."""

    def scenario(stage):
        held = [stage.engine.connect() for _ in range(3)]
        with pytest.raises(exc.TimeoutError):
            stage.engine.connect()
        now = stage.is_true(3, 0)
        for connection in held:
            connection.close()

        assert now.checkouts() == {("new", None): 3, ("queued", "timeout"): 1}
        assert now.value("db.client.connection.timeouts") == 1
        assert now.value("db.client.connection.wait_time", error__type="timeout") == 1

    play(scenario)


def test_hard_invalidation(play):
    """An invalidated connection is neither used nor idle: it is closed, and the pool's empty record is nothing."""

    def scenario(stage):
        for _ in range(3):
            connection = stage.engine.connect()
            connection.invalidate()
            stage.is_true(0, 0)
            connection.close()
        now = stage.is_true(0, 0)

        assert now.closed() == {"invalidated": 3}
        assert now.value("db.client.connection.use_time") == 3

    play(scenario)


def test_soft_invalidation(play):
    """A softly invalidated connection stays open until its next checkout replaces it."""

    def scenario(stage):
        connection = stage.engine.raw_connection()
        connection.invalidate(soft=True)
        connection.close()
        stage.is_true(0, 1)
        stage.engine.connect().close()
        now = stage.is_true(0, 1)

        assert now.closed() == {"invalidated": 1}
        assert now.checkouts() == {("new", None): 2}

    play(scenario)


# psycopg's asyncio dialect cannot terminate: SQLAlchemy lets go of a detached connection without closing it.
@pytest.mark.parametrize("flavour", [n for n in flavours.names() if n != "pg-psycopg-async"], indirect=True)
def test_detach(play):
    """A detached connection is the caller's: open, and no longer the pool's; its loan has ended."""

    def scenario(stage):
        for _ in range(3):
            connection = stage.engine.connect()
            connection.detach()
            stage.is_true(0, 0, beside=1)
            connection.close()
        now = stage.is_true(0, 0)

        assert now.value("db.client.connection.use_time") == 3
        assert now.value("otel_pools.use.oldest") == 0
        assert now.closed() == {"closed": 3}

    play(scenario)


def test_recycle(play):
    """A connection too old is replaced at its checkout, and the reason is told."""

    def scenario(stage):
        stage.engine.connect().close()
        stage.engine.pool._recycle = 0
        connection = stage.engine.connect()
        now = stage.is_true(1, 0)
        connection.close()

        assert now.closed() == {"recycle": 1}

    play(scenario)


@with_server
def test_pre_ping_repairs(play, flavour):
    """A connection the server has ended is replaced by the pre-ping, which is part of the wait."""

    def scenario(stage):
        stage.engine.connect().close()
        assert flavour.admin.kill(flavour.app) == 1
        connection = stage.engine.connect()
        now = stage.is_true(1, 0)
        connection.close()

        assert now.closed() == {"pre_ping": 1}
        assert now.checkouts() == {("new", None): 2}

    play(scenario, pool_pre_ping=True)


@with_server
def test_disconnect_in_use(play, flavour):
    """A connection that dies while it is used is closed for an error."""

    def scenario(stage):
        connection = stage.engine.connect()
        flavour.admin.kill(flavour.app)
        with pytest.raises(exc.DBAPIError):
            ping(connection)
        now = stage.is_true(0, 0)
        connection.close()

        assert now.closed() == {"error": 1}

    play(scenario)


@with_server
def test_outage(play, flavour, postgres):
    """The server down and up again, five checkouts in between: no number drifts."""

    def scenario(stage):
        stage.engine.connect().close()
        down = stage.read_in_outage(postgres, 5)
        connection = stage.engine.connect()
        stage.is_true(1, 0)
        connection.close()
        up = stage.is_true(0, 1)

        assert (down.count("used"), down.count("idle")) == (0, 0)
        assert down.checkouts() == {("new", None): 1, ("new", "connect_error"): 5}
        assert up.checkouts()["new", None] == 2

    play(scenario, pool_pre_ping=True)


@with_server
def test_recycle_while_down(play, flavour, postgres):
    """Recycling while the server is down fails every checkout, and counts nothing as open."""

    def scenario(stage):
        stage.engine.connect().close()
        stage.engine.pool._recycle = 0
        down = stage.read_in_outage(postgres, 3)

        assert (down.count("used"), down.count("idle")) == (0, 0)
        assert down.closed() == {"recycle": 1}
        assert down.value("otel_pools.checkouts", error__type="connect_error") == 3

    play(scenario)


@pytest.mark.parametrize("stage_of_life", ["connect", "checkout"])
def test_listener_raises(play, flavour, stage_of_life):
    """A user's listener that fails leaves nothing counted as used, and its own error is what the caller gets."""
    if LOSES and flavour.name == "aiosqlite" and stage_of_life == "connect":
        pytest.skip("this SQLAlchemy leaves aiosqlite's thread behind, and Python waits for it for ever")

    def scenario(stage):
        stage.engine.connect().close()
        stage.engine.dispose()
        event.listen(stage.engine, stage_of_life, fail)
        for _ in range(3):
            with pytest.raises(LookupError, match="mine"):
                stage.engine.connect()
        now = stage.telemetry.read()
        event.remove(stage.engine, stage_of_life, fail)
        gc.collect()
        stage.engine.connect().close()
        back = stage.telemetry.read()

        assert (back.count("used"), back.count("idle")) == (0, 1)
        if not LOSES:
            stage.is_true(0, 1)
        assert (now.count("used"), now.value("otel_pools.wait.oldest")) == (0, 0)
        word = "connect_error" if stage_of_life == "connect" else "LookupError"
        assert now.value("otel_pools.checkouts", error__type=word) == 3

    def fail(*_):
        raise LookupError("mine")

    play(scenario)


def test_another_closes_while_one_fails_to_open(play):
    """While a connection cannot be opened another is closed, as the garbage collector may: one was created, not two."""

    def scenario(stage):
        held = stage.engine.connect()
        creator = stage.engine.pool._creator

        def fail():
            held.invalidate()
            raise ConnectionError("down")

        stage.engine.pool._creator = fail
        with pytest.raises(ConnectionError, match="down"):
            stage.engine.connect()
        stage.engine.pool._creator = creator
        now = stage.is_true(0, 0)
        held.close()

        assert now.value("otel_pools.connection.created") == 1

    play(scenario)


def test_dispose_while_out(play):
    """A replaced pool counts as long as its connections are open; its limits, and it as a pool, do not."""

    def scenario(stage):
        connection, old = stage.engine.connect(), stage.engine.pool
        stage.engine.dispose()
        out = stage.is_true(1, 0)
        second = stage.engine.connect()
        both = stage.is_true(2, 0)
        second.close()
        connection.close()
        back = stage.is_true(0, 2)  # one of them in the old pool, still open
        old.dispose()
        end = stage.is_true(0, 1)

        assert [now.value("db.client.connection.max") for now in (out, both, back, end)] == [3, 3, 3, 3]
        assert [now.value("otel_pools.pools") for now in (out, both, back, end)] == [1, 1, 1, 1]
        assert back.value("otel_pools.connection.peak") == 2

    play(scenario)


@without_loop
def test_dispose_without_closing(play, flavour):
    """`dispose(close=False)`, the recipe for fork: the new pool starts at nothing."""

    def scenario(stage):
        for connection in [stage.engine.connect(), stage.engine.connect()]:
            connection.close()
        old = stage.engine.pool
        stage.engine.dispose(close=False)
        kept = stage.telemetry.read()
        old.dispose()
        del old
        gc.collect()

        assert kept.count("idle") == 2  # somebody still has the old pool, and its sockets are open
        stage.is_true(0, 0)

    play(scenario)


def test_collected_checkout(play, flavour):
    """A connection that was dropped and not returned is not used any more once it has been collected."""

    def scenario(stage):
        connection = stage.engine.raw_connection()
        with leaking():
            del connection
            gc.collect()
        now = stage.telemetry.read()

        assert now.count("used") == 0
        assert stage.flavour.settles(now.count("idle"))  # an old SQLAlchemy takes it back, a new one closes it
        assert now.value("otel_pools.use.oldest") == 0
        assert now.value("db.client.connection.use_time") == 1

    with leaking():
        play(scenario)
        gc.collect()


def test_suppressed(play):
    """Suppressing instrumentation changes no state: what is back is back."""
    from opentelemetry.instrumentation.utils import suppress_instrumentation

    def scenario(stage):
        connection = stage.engine.connect()
        with suppress_instrumentation():
            connection.close()
        stage.is_true(0, 1)

    play(scenario)


def test_execution_options_share_the_pool(play):
    """A copy of the engine with options has the same pool, counted once."""

    def scenario(stage):
        copy = stage.engine.execution_options(logging_token="copy")
        one, other = stage.engine.connect(), copy.connect()
        now = stage.is_true(2, 0)
        one.close()
        other.close()

        assert now.value("otel_pools.pools") == 1

    play(scenario)


def test_null_pool(play):
    """A NullPool's connections are counted while they are out, and it has no maximum."""
    from sqlalchemy.pool import NullPool

    def scenario(stage):
        held = [stage.engine.connect(), stage.engine.connect()]
        out = stage.is_true(2, 0)
        for connection in held:
            connection.close()
        back = stage.is_true(0, 0)

        assert out.points("db.client.connection.max") == []
        assert back.closed() == {"closed": 2}
        assert back.value("db.client.connection.use_time") == 2

    play(scenario, poolclass=NullPool)


@without_loop
def test_thread_storm(play):
    """Eight threads, with invalidations and detachments: at rest every count agrees with every other."""

    def scenario(stage):
        with ThreadPoolExecutor(8) as executor:
            list(executor.map(lambda seed: storm(stage.engine, random.Random(seed)), range(8)))

        assert stage.settled().value("otel_pools.checkouts") == 8 * 200

    play(scenario, pool_timeout=10)


def storm(engine, rng):
    """A few hundred cycles of the kinds that happen."""
    for _ in range(200):
        connection = engine.connect()
        act = rng.random()
        if act < 0.05:
            connection.invalidate()
        elif act < 0.1:
            connection.detach()
        elif act < 0.5:
            ping(connection)
        connection.close()


tasks_only = pytest.mark.parametrize(
    "flavour", [name for name in flavours.names() if name not in {"sqlite", "pg-psycopg"}], indirect=True
)


def sqlite_threads():
    """How many threads of aiosqlite's (from 0.22 on) are alive."""
    return sum("_connection_worker_thread" in thread.name for thread in threading.enumerate())


async def settles_in_the_loop(flavour, idle):
    """
    Whether so many connections come to be open, while the loop goes on.

    An aiosqlite thread may open a file after its task was cancelled; the
    connection waits in the loop's queue, and is in a cycle then. Where SQLAlchemy
    drops connections unclosed, the server keeps some that are nobody's.
    """
    deadline = time.monotonic() + 5
    while (flavour.open() != idle or sqlite_threads() > idle) and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
        gc.collect()
    return flavour.open() == idle or (LOSES and flavour.open() > idle)


@tasks_only
def test_task_storm_with_cancellation(flavour, telemetry):
    """Twenty tasks, cancelled wherever they are (connecting, waiting, working, returning): no number drifts."""
    otel_pools.instrument("sqlalchemy", meter_provider=telemetry.meter_provider)
    attempts = 0

    async def work(engine, rng):
        nonlocal attempts
        for _ in range(10):
            attempts += 1
            async with engine.connect() as connection:
                await connection.execute(text("SELECT 1"))
                await asyncio.sleep(rng.random() * 0.002)

    async def life(engine, rng):
        task = asyncio.create_task(work(engine, rng))
        await asyncio.sleep(rng.random() * 0.05)
        task.cancel()
        with suppress(asyncio.CancelledError, exc.DBAPIError):
            await task

    async def main():
        engine = AsyncEngine(flavour.engine(pool_size=2, max_overflow=1, pool_timeout=5))
        rng = random.Random(7)
        for _ in range(6):
            await asyncio.gather(*(life(engine, rng) for _ in range(20)))
        gc.collect()
        await asyncio.sleep(0.1)
        now = telemetry.read()

        assert now.count("used") == 0
        assert now.value("otel_pools.checkouts") == attempts
        assert now.value("otel_pools.checkouts", error__type="cancelled") > 0
        assert await settles_in_the_loop(flavour, now.count("idle"))
        lost = now.value("otel_pools.connection.created") - sum(now.closed().values()) - now.count("idle")
        assert lost == 0 or (LOSES and lost > 0)
        await engine.dispose()

    with leaking():
        asyncio.run(main())
        gc.collect()


@tasks_only
@pytest.mark.parametrize("moment", ["connect", "checkout", "checkin"])
def test_cancelled_at_every_step(flavour, telemetry, moment):
    """A task cancelled after each number of steps, connecting, pinging or returning: nothing stays used."""
    otel_pools.instrument("sqlalchemy", meter_provider=telemetry.meter_provider)

    async def borrow(engine):
        async with engine.connect() as connection:
            if moment == "checkin":
                await connection.execute(text("SELECT 1"))
            else:
                await asyncio.sleep(10)

    async def cancel_after(steps, engine):
        task = asyncio.create_task(borrow(engine))
        for _ in range(steps):
            await asyncio.sleep(0.0003)
        task.cancel()
        with suppress(asyncio.CancelledError, exc.DBAPIError):
            await task

    async def main():
        engine = AsyncEngine(flavour.engine(pool_size=1, max_overflow=0, pool_timeout=5, pool_pre_ping=True))
        for steps in range(25):
            if moment == "connect":
                await engine.dispose()
            await cancel_after(steps, engine)
        gc.collect()
        await asyncio.sleep(0.05)
        now = telemetry.read()

        assert now.count("used") == 0
        assert now.value("otel_pools.wait.oldest") == now.value("otel_pools.use.oldest") == 0
        assert await settles_in_the_loop(flavour, now.count("idle"))
        lost = now.value("otel_pools.connection.created") - sum(now.closed().values()) - now.count("idle")
        assert lost == 0 or (LOSES and lost > 0)
        assert now.value("otel_pools.checkouts") == now.value("db.client.connection.wait_time")
        await engine.dispose()

    with leaking():
        asyncio.run(main())
        gc.collect()


def test_creator_fails_with_an_empty_record(play):
    """An outage that meets a pool with an invalidated record: five failures leave nothing used, nothing idle."""

    def scenario(stage):
        connection = stage.engine.connect()
        connection.invalidate()
        connection.close()
        creator = stage.engine.pool._creator
        stage.engine.pool._creator = fail
        for _ in range(5):
            with pytest.raises((exc.DBAPIError, ConnectionError)):
                stage.engine.connect()
        down = stage.telemetry.read()
        stage.engine.pool._creator = creator
        stage.engine.connect().close()
        stage.is_true(0, 1)

        assert (down.count("used"), down.count("idle")) == (0, 0)
        assert down.value("otel_pools.checkouts", error__type="connect_error") == 5

    def fail():
        raise ConnectionError("down")

    play(scenario)
