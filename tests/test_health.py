"""Health tells a crowded pool from a harmed one: only harm takes a process out of service, and only for a while."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import create_engine
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, QueuePool

import otel_pools
from otel_pools import PoolHealth, Settings, _check, _guard, _outbox, _period, _watch
from otel_pools._config import settings
from otel_pools._health import HARM, RECENT, Limits, Vitals, judge, load, report
from otel_pools._model import PoolStats

LIMITS = Limits(0.8, 0.95, 5.0)


class Stub:
    """A DBAPI connection that does nothing."""

    def rollback(self):
        pass

    def close(self):
        pass


def pool(used=0, max=20, **more):
    return PoolStats("p", "sqlalchemy", pools=1, used=used, max=max, **more)


# -- by the figures alone --------------------------------------------------------------


@pytest.mark.parametrize(
    ("used", "status"),
    [(0, "healthy"), (15, "healthy"), (16, "degraded"), (18, "degraded"), (19, "critical"), (20, "critical")],
)
def test_status_by_what_is_in_use(used, status):
    """Degraded from 80 % on, critical from 95 % on; ready all the same, and the reason has the figures."""
    health, bound = judge(pool(used), LIMITS), "95%" if status == "critical" else "80%"

    assert (health.status, health.ready, health.utilization) == (status, True, used / 20)
    assert health.reasons == (
        ()
        if status == "healthy"
        else (f"{used} of 20 connections are in use, {used / 20:.0%}; {status} from {bound} on",)
    )


def test_a_full_pool_that_nobody_waits_for_is_ready():
    """To be busy is no harm, and neither is to wait for a moment."""
    assert judge(pool(20), LIMITS).ready
    assert judge(pool(20, pending=50, oldest_wait_s=4.9), LIMITS).ready


def test_who_waits_for_too_long_is_harm():
    """Somebody who has waited for longer than is tolerable makes the pool not ready and critical."""
    health = judge(pool(3, pending=2, oldest_wait_s=6.25), LIMITS)

    assert (health.status, health.ready) == ("critical", False)
    assert health.reasons == ("a request has waited 6.2 s for a connection (2 in line); more than 5 s is harm",)


@pytest.mark.parametrize("pending", [0, None])
def test_who_waits_alone(pending):
    """Where nobody is in line, or nobody can tell, no line is spoken of; to wait for just so long is tolerable."""
    health = judge(pool(3, pending=pending, oldest_wait_s=61.0), LIMITS)

    assert health.reasons == ("a request has waited 61.0 s for a connection; more than 5 s is harm",)
    assert judge(pool(3, pending=pending, oldest_wait_s=5.0), LIMITS).ready


@pytest.mark.parametrize("error", HARM)
def test_a_recent_failure_is_harm_for_a_while(error):
    """For a minute after the last one the pool is not ready; then it is, whatever came before."""
    recent, past = (judge(pool(last_error_s={error: age}), LIMITS) for age in (RECENT - 1, RECENT + 1))

    assert (recent.status, recent.ready) == ("critical", False)
    assert (past.status, past.ready, past.reasons) == ("healthy", True, ())
    assert HARM[error] in recent.reasons[0]
    assert "59 s ago" in recent.reasons[0]


@pytest.mark.parametrize(("seconds", "ready"), [(60.0, False), (60.1, True)])
def test_the_while_is_a_minute(seconds, ready):
    """In the sixtieth second after a failure a pool is not ready; after it, it is."""
    assert judge(pool(last_error_s={"timeout": seconds}), LIMITS).ready is ready


def test_who_gave_up_by_himself_was_not_harmed():
    """To be cancelled, or to fail in one's own code, says nothing about the pool."""
    assert judge(pool(last_error_s={"cancelled": 0.0, "ValueError": 0.0}), LIMITS).ready


def test_streams_count_where_requests_share_connections():
    """A pool of one HTTP/2 connection is not full with one request; it is with all streams in use."""
    one = judge(pool(1, 1, streams=1, streams_max=100), LIMITS)
    all = judge(pool(1, 100, streams=96, streams_max=100), LIMITS)

    assert (one.status, one.utilization) == ("healthy", 0.01)
    assert (all.status, all.utilization) == ("critical", 0.96)
    assert all.reasons == ("96 of 100 streams of its connections are in use, 96%; critical from 95% on",)


@pytest.mark.parametrize(
    ("vitals", "share"),
    [
        (Vitals("p", 1, used=3, max=None), None),
        (Vitals("p", 1, used=3, max=0), None),
        (Vitals("p", 1, used=None, max=5), None),
        (Vitals("p", 1, used=6, max=5), 1.0),
        (Vitals("p", 1, used=1, max=5, streams=0, streams_max=0), None),
        (Vitals("p", 1, used=1, max=5, streams=3), None),
    ],
)
def test_without_a_limit_nothing_is_crowded(vitals, share):
    """Of what has no limit, or does not tell, no part is in use; and never more than all."""
    assert load(vitals) == share
    assert judge(vitals._replace(used=1), LIMITS).status == "healthy"


def test_what_cannot_be_read_is_an_error_and_ready():
    """Our own blindness takes nobody out of service; what is known to be harmed still is."""
    blind = judge(Vitals("p", 3, unreadable=2), LIMITS)
    harmed = judge(Vitals("p", 1, unreadable=1, last_error_s={"timeout": 1.0}), LIMITS)
    full = judge(Vitals("p", 2, unreadable=1, used=5, max=5), LIMITS)

    assert (blind.status, blind.ready) == ("error", True)
    assert blind.reasons == ("2 of 3 pools cannot be read; the log says why",)
    assert (harmed.status, harmed.ready, len(harmed.reasons)) == ("critical", False, 2)
    assert (full.status, full.ready) == ("critical", True)


def test_the_report_is_the_worst_of_all():
    """The worst comes first and gives the whole its status; names without a pool are left out."""
    pools = [
        Vitals("b fine", 1, used=1, max=5),
        Vitals("a fine", 1, used=1, max=5),
        Vitals("full", 1, used=5, max=5),
        Vitals("blind", 1, unreadable=1),
        Vitals("busy", 1, used=4, max=5),
        Vitals("gone", 0, used=5, max=5, last_error_s={"timeout": 1.0}),
    ]
    told = report([(vitals, LIMITS) for vitals in pools], 12.5)

    assert [(health.pool, health.status) for health in told.pools] == [
        ("full", "critical"),
        ("blind", "error"),
        ("busy", "degraded"),
        ("a fine", "healthy"),
        ("b fine", "healthy"),
    ]
    assert (told.status, told.ready, told.timestamp) == ("critical", True, 12.5)
    assert report([], 1.0).to_dict() == {"status": "healthy", "ready": True, "pools": (), "timestamp": 1.0}


def test_one_harmed_pool_makes_the_whole_not_ready():
    """A process is ready if all its pools are."""
    harmed = Vitals("harmed", 1, oldest_wait_s=9.0)

    assert not report([(Vitals("fine", 1), LIMITS), (harmed, LIMITS)], 0.0).ready


def test_the_short_figures_are_those_of_the_statistics():
    """What is read for health alone judges as the whole statistics would."""
    whole = pool(19, pending=3, oldest_wait_s=7.0, last_error_s={"exhausted": 2.0})
    names = Vitals._fields

    assert judge(Vitals(*(getattr(whole, name) for name in names)), LIMITS) == judge(whole, LIMITS)


# -- of real pools ---------------------------------------------------------------------


@pytest.fixture
def watched(telemetry):
    gc.collect()  # pools of an earlier test would be found, and rightly counted
    otel_pools.instrument("sqlalchemy", meter_provider=telemetry.meter_provider)


@pytest.fixture
def clock(monkeypatch):
    """A clock that can be put on."""

    class Clock:
        ahead = 0.0

        def __call__(self):
            return time.perf_counter() + self.ahead

    clock = Clock()
    monkeypatch.setattr(_period, "perf_counter", clock)
    monkeypatch.setattr(_outbox, "perf_counter", clock)
    monkeypatch.setattr(_watch, "clock", clock)
    return clock


def of(name="p", **limits):
    (found,) = (health for health in otel_pools.health(**limits).pools if health.pool == name)
    return found


def comes(true, seconds=10.0):
    """Whether this becomes true."""
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.002)
    return true()


def test_a_full_pool(watched):
    """All connections out and nobody waiting: critical, ready, and said in words; back to healthy by itself."""
    pool = QueuePool(Stub, pool_size=2, max_overflow=0, logging_name="p")
    held = [pool.connect(), pool.connect()]
    full = of()
    for one in held:
        one.close()

    assert (full.status, full.ready, full.utilization) == ("critical", True, 1.0)
    assert full.reasons == ("2 of 2 connections are in use, 100%; critical from 95% on",)
    assert of().status == otel_pools.health().status == "healthy"


def test_somebody_who_waits(watched):
    """While somebody waits for longer than is tolerable the process is not ready; once he is served, it is."""
    pool = QueuePool(Stub, pool_size=1, max_overflow=0, timeout=30, logging_name="p")
    held = pool.connect()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(pool.connect)
        assert comes(lambda: not of(max_wait=0.01).ready)
        patient, impatient = otel_pools.health(max_wait=60), otel_pools.health(max_wait=0.01)
        held.close()
        waiting.result().close()

    assert (patient.ready, impatient.ready) == (True, False)
    assert "a request has waited" in impatient.pools[0].reasons[0]
    assert "(1 in line)" in impatient.pools[0].reasons[0]
    assert otel_pools.health(max_wait=0.01).ready


def test_timeouts_pass(watched, clock):
    """After a timeout the process is not ready for a minute, whoever collects or looks meanwhile; then it is."""
    pool = QueuePool(Stub, pool_size=1, max_overflow=0, timeout=0.001, logging_name="p")
    held = pool.connect()
    with pytest.raises(PoolTimeout):
        pool.connect()
    held.close()
    seen = []
    for seconds in (0, 30, 29, 2):
        clock.ahead += seconds
        otel_pools.pools()
        seen.append((otel_pools.health().ready, otel_pools.health().status))

    assert seen == [(False, "critical")] * 3 + [(True, "healthy")]


def test_a_server_that_is_not_there(watched, clock):
    """A connection that cannot be opened is harm, for as long as it goes on and a minute longer."""
    engine = create_engine("sqlite:////nowhere/at/all", poolclass=QueuePool, pool_logging_name="p")
    ready = []
    for _ in range(3):
        with pytest.raises(OperationalError):
            engine.connect()
        clock.ahead += 50
        ready.append(otel_pools.health().ready)
    clock.ahead += RECENT + 1

    assert ready == [False] * 3
    assert otel_pools.health().ready


def test_a_pool_that_cannot_be_read(watched, monkeypatch, caplog):
    """It is an error of its own, which is said in the log, and does not hide the other pools."""
    monkeypatch.setattr(_guard, "loud", False)
    pools = [QueuePool(Stub, logging_name=name) for name in ("p", "other")]
    for pool in pools:
        pool.connect().close()
    next(watch for watch in registry().pools() if watch.pool() is pools[0])._read = lambda *_: 1 / 0

    told = otel_pools.health()

    assert [(health.pool, health.status) for health in told.pools] == [("p", "error"), ("other", "healthy")]
    assert (told.status, told.ready) == ("error", True)
    assert "reading a QueuePool: ZeroDivisionError" in caplog.text


def test_a_library_that_cannot_be_read(watched, monkeypatch):
    """If not even the pools can be listed, that library is the error."""
    monkeypatch.setattr(_guard, "loud", False)
    monkeypatch.setattr(type(registry()), "pools", lambda _: 1 / 0)

    told = otel_pools.health()

    assert [(health.pool, health.status, health.ready) for health in told.pools] == [("sqlalchemy", "error", True)]


def registry():
    return otel_pools.SQLAlchemyPoolInstrumentor._registry


def test_pools_that_are_gone_say_nothing(watched):
    """Neither a pool that is gone nor one that was replaced is asked for its health."""
    engine = create_engine("sqlite://", poolclass=QueuePool, pool_size=1, max_overflow=0, pool_logging_name="p")
    held = engine.connect()
    engine.dispose()
    replaced = of()
    held.close()
    del held
    engine.dispose()
    del engine
    gc.collect()

    # The connection that is out is of the old pool, and still counts; the limit is the new one's alone.
    assert (replaced.status, replaced.utilization) == ("critical", 1.0)
    assert otel_pools.health().pools == ()


def test_health_lets_the_others_be(watched, telemetry):
    """Asking for health counts nothing twice, takes no peak and no sample."""
    pool = QueuePool(Stub, logging_name="p")
    held = [pool.connect(), pool.connect()]
    for one in held:
        one.close()
    for _ in range(3):
        otel_pools.health()
    now = telemetry.read()

    assert now.value("otel_pools.connection.peak") == 2
    assert (now.value("db.client.connection.wait_time"), now.value("otel_pools.checkouts")) == (2, 2)


# -- as somebody set it up -------------------------------------------------------------


def test_the_bounds_are_settings(telemetry):
    """Of `instrument`, and for one question of `health` itself."""
    gc.collect()
    otel_pools.instrument("sqlalchemy", meter_provider=telemetry.meter_provider, health_degraded=0.4, health_critical=1)
    pool = QueuePool(Stub, pool_size=2, max_overflow=0, logging_name="p")
    held = pool.connect()
    told = of().status, of(degraded=0.6).status, of(critical=0.5).status
    held.close()

    assert told == ("degraded", "healthy", "critical")


def test_the_bounds_from_the_environment(monkeypatch):
    """`OTEL_POOLS_HEALTH_...`, like every setting."""
    monkeypatch.setenv("OTEL_POOLS_HEALTH_DEGRADED", "0.7")
    monkeypatch.setenv("OTEL_POOLS_HEALTH_CRITICAL", "0.9")
    monkeypatch.setenv("OTEL_POOLS_HEALTH_WAIT", "2.5")
    chosen = settings({})

    assert (chosen.health_degraded, chosen.health_critical, chosen.health_wait) == (0.7, 0.9, 2.5)
    assert (Settings().health_degraded, Settings().health_critical, Settings().health_wait) == (0.8, 0.95, 5.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("health_degraded", "80"),
        ("health_degraded", "0"),
        ("health_critical", "95%"),
        ("health_critical", -1),
        ("health_critical", True),
        ("health_wait", "-1"),
        ("health_wait", "soon"),
    ],
)
def test_a_wrong_bound(name, value, caplog):
    """One line says what was expected, and the default is used."""
    assert settings({name: value}) == Settings()
    assert len(caplog.records) == 1
    assert f"otel_pools: {name} must be a number" in caplog.text


def test_many_look_at_once(watched):
    """Probes that come at once, while pools come and go, all get an answer."""
    done = threading.Event()

    def churn():
        while not done.is_set():
            with contextlib.closing(QueuePool(Stub, logging_name="short").connect()):
                pass

    with ThreadPoolExecutor(5) as threads:
        threads.submit(churn)
        asking = [threads.submit(lambda: [otel_pools.health().ready for _ in range(50)]) for _ in range(4)]
        answers = [answer for asked in asking for answer in asked.result()]
        done.set()

    assert answers == [True] * 200


# -- on demand: a real checkout --------------------------------------------------------


@pytest.fixture
def engine(tmp_path):
    """An engine of one connection to a real SQLite file, whose pool gives up after a minute."""
    engine = create_engine(
        f"sqlite:///{tmp_path}/file.db",
        poolclass=QueuePool,
        pool_size=1,
        max_overflow=0,
        pool_timeout=60,
        pool_logging_name="p",
    )
    yield engine
    engine.dispose()


def test_a_checkout_that_works(watched, engine, telemetry):
    """A pool that hands out a connection is healthy; the attempt is a checkout like any other."""
    told = otel_pools.check(engine, timeout=30)

    assert (told.status, told.ready, told.pools) == ("healthy", True, (PoolHealth("p", "healthy", ready=True),))
    assert telemetry.value("otel_pools.checkouts") == 1


def test_a_checkout_that_hangs(watched, engine):
    """Who gets nothing in time is not waited for, and does not stand in line twice; once he is served all is well."""
    with engine.connect():
        first = otel_pools.check(engine, timeout=0.05)
        again = otel_pools.check(engine, timeout=0.0)
        waiting = [pool.pending for pool in otel_pools.pools()]
        attempt = repr(_check._attempts[engine])
    over = otel_pools.check(engine, timeout=30)

    assert (first.status, first.ready) == (again.status, again.ready) == ("critical", False)
    assert first.pools[0].reasons == ("a checkout got no connection within 0.05 s",)
    assert waiting == [1]
    assert (attempt, over.ready) == ("<Attempt on a Engine [under way]>", True)
    assert repr(_check._attempts[engine]) == "<Attempt on a Engine [over]>"


def test_a_checkout_that_fails(valkey):
    """The error's class is told, and nothing of what it says; the failed come first."""
    redis = pytest.importorskip("redis")
    nowhere = create_engine("sqlite:////nowhere/secret-x", poolclass=QueuePool, pool_logging_name="p")
    client = redis.Redis(host="127.0.0.1", port=valkey.port)
    told = otel_pools.check(client, nowhere, timeout=30)
    client.close()

    assert [(health.pool, health.ready) for health in told.pools] == [("Engine", False), ("Redis", True)]
    assert told.pools[0].reasons == ("a checkout failed: OperationalError",)
    assert "secret-x" not in str(told.to_dict())


def test_a_checkout_of_asyncio(telemetry, valkey):
    """An asyncio engine and client are asked in the loop, each with its timeout."""
    redis = pytest.importorskip("redis.asyncio")
    gc.collect()
    otel_pools.instrument("sqlalchemy", meter_provider=telemetry.meter_provider)

    async def main():
        engine = create_async_engine(
            "sqlite+aiosqlite://",
            poolclass=AsyncAdaptedQueuePool,
            pool_size=1,
            max_overflow=0,
            pool_logging_name="p",
        )
        client = redis.Redis(host="127.0.0.1", port=valkey.port)
        works = await otel_pools.check_async(engine, client, timeout=30)
        async with engine.connect():
            hangs = await otel_pools.check_async(engine, client, timeout=0.05)
        await client.aclose()
        await engine.dispose()
        return works, hangs

    works, hangs = asyncio.run(main())

    assert (works.ready, [health.pool for health in works.pools]) == (True, ["Redis", "p"])
    assert [(health.pool, health.ready) for health in hangs.pools] == [("p", False), ("Redis", True)]
    assert hangs.pools[0].reasons == ("a checkout got no connection within 0.05 s",)


def test_what_cannot_be_checked(engine):
    """What has no connection to get, or is asked for in the wrong way, is an error of the caller."""
    redis = pytest.importorskip("redis.asyncio")

    with pytest.raises(TypeError, match="neither an engine nor a client of Redis: str"):
        otel_pools.check("postgresql://")
    with pytest.raises(TypeError, match="Redis is for asyncio"):
        otel_pools.check(redis.Redis())
    with pytest.raises(TypeError, match="Engine is not for asyncio"):
        asyncio.run(otel_pools.check_async(engine))
    assert otel_pools.check().ready


def test_a_checked_engine_may_go():
    """What was checked once is not kept alive."""
    engine = create_engine("sqlite://", creator=Stub, poolclass=QueuePool, _initialize=False)
    otel_pools.check(engine, timeout=30)
    gone = weakref.ref(engine)
    engine.dispose()
    del engine
    gc.collect()

    assert gone() is None
