"""The statistics agree with the metrics, take nothing from them, need no SDK, and can begin anew."""

from __future__ import annotations

import contextlib
import gc
import importlib
import inspect
import json
import math
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import schemas
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult, PeriodicExportingMetricReader
from sqlalchemy import create_engine
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import NullPool, QueuePool

import otel_pools
from otel_pools import _guard, _outbox, _period
from otel_pools import _vocabulary as words
from otel_pools._model import PoolStats, Tally
from otel_pools._outbox import LIMIT, Histograms, Outbox
from otel_pools._period import Period


class Stub:
    """A DBAPI connection that does nothing."""

    def rollback(self):
        pass

    def close(self):
        pass


@pytest.fixture
def pool():
    """A small pool with a name."""
    return QueuePool(Stub, pool_size=1, max_overflow=1, timeout=0.01, logging_name="p")


def stats(name="p"):
    """What is said of one pool name."""
    (found,) = (pool for pool in otel_pools.pools() if pool.name == name)
    return found


def watch(telemetry, *targets, **options):
    gc.collect()  # pools of an earlier test would be found, and rightly counted
    otel_pools.instrument(*targets, meter_provider=telemetry.meter_provider, **options)


class Clock:
    """A clock that can be put on."""

    def __init__(self):
        self.ahead = 0.0

    def __call__(self):
        return time.perf_counter() + self.ahead


@pytest.fixture
def clock(monkeypatch):
    """The clock by which the statistics know how much time has passed."""
    clock = Clock()
    monkeypatch.setattr(_period, "perf_counter", clock)
    monkeypatch.setattr(_outbox, "perf_counter", clock)
    return clock


# -- the same as the metrics ---------------------------------------------------------

# From a metric to what the statistics say of it: by the attributes of its row, or a number.
SAME = {
    "db.client.connection.count": lambda s: {("used",): s.used, ("idle",): s.idle},
    "db.client.connection.max": lambda s: s.max,
    "db.client.connection.idle.max": lambda s: s.idle_max,
    "db.client.connection.pending_requests": lambda s: s.pending,
    "db.client.connection.timeouts": lambda s: s.timeouts,
    "http.client.open_connections": lambda s: {("active",): s.used, ("idle",): s.idle},
    "otel_pools.connection.max": lambda s: s.max,
    "otel_pools.connection.idle.max": lambda s: s.idle_max,
    "otel_pools.connection.pending_requests": lambda s: s.pending,
    "otel_pools.connection.timeouts": lambda s: s.timeouts,
    "otel_pools.connection.overflow": lambda s: s.overflow,
    "otel_pools.connection.overflow.max": lambda s: s.overflow_max,
    "otel_pools.connection.peak": lambda s: s.peak,
    "otel_pools.connection.created": lambda s: s.created,
    "otel_pools.connection.closed": lambda s: {(reason,): count for reason, count in s.closed.items()},
    "otel_pools.connection.orphaned": lambda s: s.orphaned,
    "otel_pools.connection.overdue": lambda s: s.overdue,
    "otel_pools.connection.leaked": lambda s: {(kind,): count for kind, count in s.leaked.items()},
    "otel_pools.connection.stale": lambda s: s.stale,
    "otel_pools.connection.inherited": lambda s: s.inherited,
    "otel_pools.connection.busy_time": lambda s: s.busy_s,
    "otel_pools.checkout.nested": lambda s: s.nested,
    "otel_pools.stream.count": lambda s: {("used",): s.streams, ("pending",): s.streams_pending},
    "otel_pools.stream.max": lambda s: s.streams_max,
    "otel_pools.grpc.channels": lambda s: {(state,): count for state, count in s.channels.items()},
    "otel_pools.pools": lambda s: s.pools,
}
TIMED = {
    "db.client.connection.wait_time": lambda s: s.wait,
    "http.client.request.time_in_queue": lambda s: s.wait,
    "db.client.connection.use_time": lambda s: s.use,
    "db.client.connection.create_time": lambda s: s.create,
}
# Ages move on between two looks; the others are no statistics.
ELSE = {
    "otel_pools.checkouts",  # compared by path and by error
    "otel_pools.wait.oldest",
    "otel_pools.use.oldest",
    "otel_pools.samples.dropped",
    "http.client.active_requests",
    "http.client.connection.duration",
}
ROWS = {row.name: row for row in words.METRICS}
FIRST = ("address", "port", "scheme")  # of an HTTP pool's origin; the statistics add them up


def agree(export, said, *, but=()):
    """That every metric of this pool says what its statistics say; returns the names of those compared."""
    compared = set()
    for name in export.metrics:
        points = [p for p in export.points(name) if p.attributes.get(ROWS[name].pool_key) == said.name]
        if not points or name in {*ELSE, *but}:
            assert name in {*SAME, *TIMED, *ELSE}
        elif name in TIMED:
            compared.add(name)
            timed(points, TIMED[name](said), name)
        else:
            compared.add(name)
            numbers(points, SAME[name](said), name)
    checkouts(export, said)
    return compared


def numbers(points, expected, name):
    keys = [key for key in ROWS[name].keys if not key.endswith(FIRST)]
    sums = Counter()
    for point in points:
        sums[tuple(point.attributes[key] for key in keys)] += point.value
    wanted = expected if isinstance(expected, dict) else {(): expected}
    assert {k: v for k, v in sums.items() if v} == {k: v for k, v in wanted.items() if v}, name


def timed(points, timing, name):
    assert sum(point.count for point in points) == timing.count, name
    assert math.isclose(sum(point.sum for point in points), timing.count * timing.mean_s, rel_tol=1e-9), name
    assert max(point.max for point in points) == timing.max_s, name


def checkouts(export, said):
    paths, errors, total = Counter(), Counter(), 0
    for point in export.points("otel_pools.checkouts", otel_pools__pool__name=said.name):
        path, error = point.attributes.get(words.PATH), point.attributes.get(words.ERROR)
        total += point.value
        if error is not None:
            errors[error] += point.value
        elif path is not None and point.value:
            paths[path] += point.value
    assert (said.checkouts, said.paths, said.errors) == (total, dict(paths), dict(errors))


def test_sqlalchemy_agrees(telemetry):
    """Overflow, a timeout, a nested checkout, invalidation and disposal are the same in both, before and after."""
    watch(telemetry, "sqlalchemy", busy_time=True)
    engine = create_engine(
        "sqlite://", poolclass=QueuePool, pool_size=1, max_overflow=1, pool_timeout=0.01, pool_logging_name="p"
    )
    one, two = engine.connect(), engine.connect()
    with pytest.raises(PoolTimeout):
        engine.connect()
    one.exec_driver_sql("SELECT 1")
    two.invalidate()

    first = stats()
    compared = agree(telemetry.read(), first)

    assert {"db.client.connection.count", "db.client.connection.use_time", "otel_pools.connection.peak"} <= compared
    assert (first.used, first.peak, first.timeouts, first.errors) == (1, 2, 1, {"timeout": 1})
    assert first.utilization == 0.5
    two.close()
    one.close()
    engine.dispose()
    engine.connect().close()
    again = stats()
    agree(telemetry.read(), again, but=("otel_pools.connection.peak",))
    assert (again.checkouts, again.peak, again.closed) == (4, 2, {"invalidated": 1, "overflow": 1})
    engine.dispose()


def test_redis_agrees(telemetry, valkey):
    """A blocking pool on a real server: commands, a pool that is empty, connections that are dropped."""
    redis = pytest.importorskip("redis")
    watch(telemetry, "redis")
    pool = redis.BlockingConnectionPool(
        host="127.0.0.1", port=valkey.port, max_connections=2, timeout=0.02, client_name="p"
    )
    client = redis.Redis(connection_pool=pool)
    for number in range(5):
        client.set("statistics", number)
    held = [pool.get_connection(), pool.get_connection()]
    with pytest.raises(redis.ConnectionError):
        client.get("statistics")

    compared = agree(telemetry.read(), stats())

    assert {"db.client.connection.count", "db.client.connection.create_time"} <= compared
    for connection in held:
        pool.release(connection)
    pool.disconnect()
    agree(telemetry.read(), stats(), but=("otel_pools.connection.peak",))
    assert stats().errors == {"timeout": 1}
    assert stats().config["class"] == "BlockingConnectionPool"


@pytest.fixture(scope="module")
def ground():
    webs = pytest.importorskip("webs")
    with webs.Ground() as ground:
        yield ground


def requests_of(web, **options):
    httpx = pytest.importorskip("httpx")
    return httpx.Client(
        trust_env=False,
        verify=False,
        limits=httpx.Limits(max_connections=1, max_keepalive_connections=1),
        timeout=httpx.Timeout(5, pool=0.02),
        **options,
    )


@pytest.mark.parametrize("kind", ["HTTP1", "HTTP2"])
def test_httpx_agrees(kind, telemetry, ground):
    """A real server of each protocol: one connection, a request that gets none, streams, a server that hangs up."""
    webs = pytest.importorskip("webs")
    httpx = pytest.importorskip("httpx")
    watch(telemetry, "httpx")
    options = {"http1": False, "http2": True} if kind == "HTTP2" else {}
    with webs.Server(ground, getattr(webs, kind)) as web, requests_of(web, **options) as client:
        otel_pools.name_pool(client, "p")
        client.get(web.url())
        with client.stream("GET", web.url("/stream")) as answer:
            with contextlib.suppress(httpx.PoolTimeout):
                client.get(web.url())
            said = stats()
            compared = agree(telemetry.read(), said)
            answer.close()
        assert said.errors == ({"timeout": 1} if kind == "HTTP1" else {})
        assert (said.streams, said.peak) == ((None, 1) if kind == "HTTP1" else (1, None))
        agree(telemetry.read(), stats(), but=("otel_pools.connection.peak",))
    agree(telemetry.read(), stats(), but=("otel_pools.connection.peak",))

    assert {"http.client.open_connections", "http.client.request.time_in_queue"} <= compared
    assert stats().pools == 1


def test_qdrant_agrees(telemetry):
    """Channels of gRPC: their streams and calls; what nobody sees from outside is not said to be 0."""
    qdrants = pytest.importorskip("qdrants")
    if not qdrants.available():
        pytest.skip("qdrant-client, or what our server is made of, is not installed")
    from qdrant_client import QdrantClient
    from qdrant_client.qdrant_remote import QdrantRemote

    # Since 1.13 a client asks for the server's version, in a thread of its own.
    known = inspect.signature(QdrantRemote.__init__).parameters
    quiet = {"check_compatibility": False} if "check_compatibility" in known else {}
    watch(telemetry, "qdrant")
    with qdrants.Server() as server:
        ports = {"port": server.port, "grpc_port": server.grpc_port}
        client = QdrantClient(host=qdrants.HOST, **ports, prefer_grpc=True, timeout=60, **quiet)
        for _ in range(3):
            client.get_collections()
        name = f"{qdrants.HOST}:{server.grpc_port}"
        compared = agree(telemetry.read(), stats(name))
        said = stats(name)
        client.close()

    assert {"otel_pools.grpc.channels", "otel_pools.stream.count"} <= compared
    assert (said.checkouts, said.paths, said.peak, said.oldest_wait_s, said.oldest_use_s) == (3, {}, None, None, None)
    assert (said.config["prefer_grpc"], said.config["localhost"]) == (True, True)


# -- beside the SDK --------------------------------------------------------------------


def test_what_was_looked_at_is_exported_all_the_same(pool, telemetry):
    """Looking before, between and after collections takes nothing away from them, and adds nothing."""
    watch(telemetry, "sqlalchemy")
    seen = []
    for _ in range(3):
        pool.connect().close()
        otel_pools.pools()
        pool.connect().close()
        otel_pools.health()
        now = telemetry.read()
        seen.append((now.value("db.client.connection.wait_time"), now.value("otel_pools.checkouts")))

    assert seen == [(2, 2), (4, 4), (6, 6)]
    assert stats().checkouts == stats().wait.count == 6


def test_the_peak_is_of_each_its_own_time(pool, telemetry):
    """A look leaves the peak to the next collection, and a collection leaves it to the statistics."""
    watch(telemetry, "sqlalchemy")
    held = [pool.connect(), pool.connect()]
    for one in held:
        one.close()

    assert stats().peak == 2
    assert telemetry.value("otel_pools.connection.peak") == 2
    assert telemetry.value("otel_pools.connection.peak") == 0
    assert stats().peak == 2


class Failing(MetricExporter):
    """An exporter whose endpoint is down."""

    def export(self, metrics_data, timeout_millis=0, **kwargs):
        return MetricExportResult.FAILURE

    def force_flush(self, timeout_millis=0):
        return False

    def shutdown(self, timeout_millis=0, **kwargs):
        pass


def test_a_failing_exporter_costs_nothing(pool):
    """What an exporter fails to send is in the statistics, and still is when the provider has shut down."""
    reader = PeriodicExportingMetricReader(Failing(), export_interval_millis=math.inf)
    provider = MeterProvider([reader], shutdown_on_exit=False)
    otel_pools.instrument("sqlalchemy", meter_provider=provider)
    pool.connect().close()
    reader.collect()
    before = stats().wait.count
    provider.shutdown()
    pool.connect().close()

    assert (before, stats().wait.count, stats().use.count) == (1, 2, 2)


def test_without_an_sdk():
    """With nothing but the API installed and set up, the statistics are complete and are JSON."""
    program = """
        import json, sys
        sys.modules["opentelemetry.sdk"] = None
        import otel_pools
        from sqlalchemy import create_engine
        from sqlalchemy.pool import QueuePool
        print(otel_pools.pools(), otel_pools.health().status, otel_pools.health().ready)
        otel_pools.instrument()
        print(otel_pools.pools(), otel_pools.health().pools)
        engine = create_engine("sqlite://", poolclass=QueuePool, pool_logging_name="p")
        for _ in range(7):
            engine.connect().close()
        (said,) = otel_pools.pools()
        print(said.checkouts, said.wait.count, said.use.count, said.create.count, said.idle, said.name)
        json.dumps(said.to_dict()), json.dumps(otel_pools.health().to_dict())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)

    assert (done.stdout.splitlines(), done.stderr) == (["() healthy True", "() ()", "7 7 7 1 1 p"], "")


def test_nothing_watched():
    """Where nothing is instrumented there are no statistics, and resetting them is no mistake."""
    otel_pools.reset_stats()

    assert otel_pools.pools() == ()
    assert otel_pools.health().to_dict() | {"timestamp": 0} == {
        "status": "healthy",
        "ready": True,
        "pools": (),
        "timestamp": 0,
    }


def test_samples_that_nobody_collects_are_in_the_statistics():
    """Beyond the limit samples are dropped for the SDK, and counted so; the timings still have them."""
    outbox = Outbox()
    for _ in range(3):
        outbox.waits += [0.001] * (LIMIT // 2 + 1)
        outbox.fold()
    outbox.uses += [1.0]
    outbox.spill()

    tally, wait, use, _ = outbox.account()

    assert (wait.count, use.count) == (3 * (LIMIT // 2 + 1), 1)
    assert tally.dropped == 3 * (LIMIT // 2 + 1) + 1
    assert repr(outbox) == f"<Outbox [0 samples waiting, {tally.dropped} dropped]>"


def test_what_others_count_needs_no_lock():
    """A finaliser inside of our own counting may add what it has counted; it is told at the next look."""
    outbox = Outbox()
    with outbox._folding:
        outbox.counted(None, 2)
        outbox.counted("_OTHER", 1)

    assert outbox.tally().checkouts == {(None, None): 2, (None, "_OTHER"): 1}
    assert list(outbox.period.failures) == ["_OTHER"]


def test_the_ways_of_folding_agree(monkeypatch):
    """Collected in order and bin by bin, or looked at one by one: the timings are the same, and so is what is sent."""
    monkeypatch.setattr(_outbox, "MANY", 10)
    sent = []
    monkeypatch.setattr(_outbox, "record_all", lambda histogram, samples, _: sent.append(sorted(samples)))
    collected, looked = Outbox(), Outbox()
    for outbox in (collected, looked):
        outbox.waits += [number % 8 / 8 for number in range(100)]
    looked.fold()
    for outbox in (collected, looked):
        outbox.deliver(Histograms("wait", None, None, None), {})

    assert collected.account()[1] == looked.account()[1]
    assert sent[0] == sent[1]
    assert len(sent[0]) == 100


def test_many_at_once(pool, telemetry):
    """While threads borrow, others collect, look and ask for health: in the end all say the same."""
    watch(telemetry, "sqlalchemy", span_threshold=1000)
    wide = QueuePool(Stub, pool_size=8, max_overflow=0, logging_name="p")
    done = threading.Event()

    def borrow():
        for _ in range(300):
            wide.connect().close()

    def look(ask):
        while not done.is_set():
            ask()

    with ThreadPoolExecutor(7) as threads:
        looking = [threads.submit(look, ask) for ask in (otel_pools.pools, otel_pools.health, telemetry.read)]
        for borrowing in [threads.submit(borrow) for _ in range(4)]:
            borrowing.result()
        done.set()
        for looked in looking:
            looked.result()

    said = stats()
    agree(telemetry.read(), said, but=("otel_pools.connection.peak",))
    assert (said.checkouts, said.wait.count, said.use.count) == (1200, 1200, 1200)


# -- since when ------------------------------------------------------------------------


def test_a_reset_begins_anew(pool, telemetry):
    """After a reset counts, timings and the peak begin at nothing, or at what is held; the exported ones go on."""
    watch(telemetry, "sqlalchemy", busy_time=True)
    began = time.time()
    with pytest.raises(PoolTimeout):
        [pool.connect() for _ in range(3)]
    gc.collect()
    held = pool.connect()
    otel_pools.reset_stats()
    fresh = stats()

    assert (fresh.checkouts, fresh.errors, fresh.timeouts, fresh.created, fresh.closed) == (0, {}, 0, 0, {})
    assert (fresh.wait.count, fresh.use.count, fresh.create.count, fresh.nested, fresh.leaked) == (0, 0, 0, 0, {})
    assert (fresh.used, fresh.peak) == (1, 1)
    assert fresh.since >= began
    now = telemetry.read()
    assert (now.value("otel_pools.checkouts"), now.value("otel_pools.connection.peak")) == (4, 2)
    held.close()
    pool.connect().close()
    assert (stats().checkouts, stats().wait.count, stats().use.count) == (1, 1, 2)
    assert telemetry.value("otel_pools.checkouts") == 5


def test_rates(clock, pool, telemetry):
    """The rate is over all the time; the busiest is of the fullest window of ten seconds or more between two looks."""
    watch(telemetry, "sqlalchemy")
    pool.connect().close()
    unknown = stats().busiest_per_s
    for seconds, checkouts in ((10, 19), (20, 100), (5, 60), (5, 20)):
        for _ in range(checkouts):
            pool.connect().close()
        clock.ahead += seconds
        otel_pools.pools()

    # The first is cut after 10 s with 20, the second after 20 s with 100; of the 60 nobody can say that they came in 5.
    assert unknown is None
    assert stats().busiest_per_s == pytest.approx(8, rel=0.05)
    assert stats().rate_per_s == pytest.approx(5, rel=0.05)
    otel_pools.reset_stats()
    assert stats().busiest_per_s is None


def test_collections_are_looks_too(clock, pool, telemetry):
    """Windows end at collections as well, and a reset in between does not lose count."""
    watch(telemetry, "sqlalchemy")
    pool.connect().close()
    otel_pools.reset_stats()
    for _ in range(50):
        pool.connect().close()
    clock.ahead += 10
    telemetry.read()
    clock.ahead += 10

    assert stats().busiest_per_s == pytest.approx(5, rel=0.05)


def test_the_last_failure_has_an_age(clock, pool, telemetry):
    """Of each type of error it is known how long ago the last was, and a reset does not hide it."""
    watch(telemetry, "sqlalchemy")
    held = [pool.connect(), pool.connect()]
    with pytest.raises(PoolTimeout):
        pool.connect()
    at_once = stats().last_error_s
    clock.ahead += 30
    otel_pools.reset_stats()
    later = stats().last_error_s
    for one in held:
        one.close()

    assert list(at_once) == list(later) == ["timeout"]
    assert 0 <= at_once["timeout"] < 30 <= later["timeout"]


def test_a_failure_that_nobody_saw_for_long_is_old(clock, pool, telemetry):
    """The age of a failure is counted from when it happened, not from the first look after it."""
    watch(telemetry, "sqlalchemy")
    held = [pool.connect(), pool.connect()]
    with pytest.raises(PoolTimeout):
        pool.connect()
    clock.ahead += 3600
    said = stats()
    for one in held:
        one.close()

    assert said.last_error_s["timeout"] >= 3600


def test_a_tally_since_another():
    """What is the same in both is left out; what nobody counted before is there as a whole."""
    before = Tally({("idle", None): 3, ("new", None): 1}, created=1, closed={"idle": 1}, busy=None)
    now = Tally({("idle", None): 5, ("new", None): 1, ("new", "x"): 1}, created=4, closed={"idle": 1}, busy=2.0)

    assert now.since(before) == Tally({("idle", None): 2, ("new", "x"): 1}, created=3, closed={}, busy=2.0)


def test_repr():
    """A period is one sentence."""
    period = Period()
    period.wait.add([0.1])
    period.peaked(3)

    assert repr(period) == "<Period [0 s, 1 waits, peak 3]>"


# -- who ------------------------------------------------------------------------------


def test_a_name_without_pools_keeps_its_statistics(telemetry):
    """Pools that are gone are counted to the end, and no number says that there is one."""
    watch(telemetry, "sqlalchemy")
    pool = QueuePool(Stub, logging_name="gone")
    pool.connect().close()
    del pool
    gc.collect()

    said = stats("gone")

    assert (said.pools, said.checkouts, said.used, said.max, said.config) == (0, 1, None, None, {})


def test_pools_of_one_name_add_up(telemetry):
    """Two pools of one name are one entry, set up as the first."""
    watch(telemetry, "sqlalchemy")
    both = [QueuePool(Stub, pool_size=size, max_overflow=0, logging_name="p") for size in (2, 3)]
    held = [pool.connect() for pool in both]
    said = stats()
    for one in held:
        one.close()

    assert (said.pools, said.used, said.max, said.utilization) == (2, 2, 5, 0.4)
    assert said.config["pool_size"] == 2


def test_a_pool_without_a_limit_has_no_utilization(telemetry):
    """Where as many as anybody likes may be opened, no part of them is in use."""
    watch(telemetry, "sqlalchemy")
    pool = NullPool(Stub, logging_name="p")
    held = pool.connect()

    assert (stats().used, stats().max, stats().utilization) == (1, None, None)
    held.close()


def test_a_pool_that_cannot_be_read_is_said_to_be_so(pool, telemetry, monkeypatch, caplog):
    """What was counted is told, the pool is marked, and the log has one line."""
    monkeypatch.setattr(_guard, "loud", False)
    watch(telemetry, "sqlalchemy")
    pool.connect().close()
    (watched,) = otel_pools.SQLAlchemyPoolInstrumentor._registry.pools()
    watched._read = lambda *_: 1 / 0
    said = [stats(), stats()]

    assert [(one.unreadable, one.pools, one.used, one.checkouts) for one in said] == [(1, 1, None, 1)] * 2
    assert caplog.text.count("ZeroDivisionError") == 1


def test_a_library_that_cannot_be_read_is_said_to_be_so(pool, telemetry, monkeypatch):
    """If not even its pools can be listed, there is one entry that says so, and the others are told."""
    monkeypatch.setattr(_guard, "loud", False)
    watch(telemetry, "sqlalchemy")
    pool.connect().close()
    registry = otel_pools.SQLAlchemyPoolInstrumentor._registry
    monkeypatch.setattr(type(registry), "pools", lambda _: 1 / 0)

    (said,) = otel_pools.pools()

    assert (said.name, said.library, said.unreadable, said.pools) == ("sqlalchemy", "sqlalchemy", 1, 0)


# -- how it is set up ------------------------------------------------------------------


def test_the_settings_of_sqlalchemy(telemetry):
    """In the words of the pool's own constructor, sync and asyncio, and only those that its class has."""
    watch(telemetry, "sqlalchemy")
    queue = create_engine(
        "sqlite://",
        poolclass=QueuePool,
        pool_size=3,
        max_overflow=4,
        pool_timeout=5,
        pool_recycle=6,
        pool_pre_ping=True,
        pool_use_lifo=True,
        pool_logging_name="queue",
    )
    null = create_engine("sqlite://", poolclass=NullPool, pool_logging_name="null")
    told = {said.name: said.config for said in otel_pools.pools()}

    assert told["queue"] == {
        "class": "QueuePool",
        "pool_size": 3,
        "max_overflow": 4,
        "timeout": 5,
        "recycle": 6,
        "pre_ping": True,
        "use_lifo": True,
    }
    assert told["null"] == {"class": "NullPool", "recycle": -1, "pre_ping": False}
    queue.dispose()
    null.dispose()


def test_the_settings_of_redis():
    """Of a pool and its connections; user and password are none of them."""
    redis = pytest.importorskip("redis")
    from otel_pools.targets import redis as target

    pool = redis.ConnectionPool(
        username="user-x", password="secret-x", max_connections=7, socket_timeout=2.5, health_check_interval=30
    )

    told = target.config(pool)

    assert told == {
        "class": "ConnectionPool",
        "max_connections": 7,
        "socket_timeout": 2.5,
        "health_check_interval": 30,
    }
    assert target.config(redis.BlockingConnectionPool(timeout=3))["timeout"] == 3
    assert target.config(redis.asyncio.BlockingConnectionPool(timeout=4))["timeout"] == 4


def test_the_settings_of_httpx():
    """Limits, expiry, protocols and retries; None where it has no limit."""
    httpx = pytest.importorskip("httpx")
    from otel_pools.targets import httpx as target

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=20, keepalive_expiry=5)
    transport = httpx.HTTPTransport(verify=False, limits=limits, http2=True, retries=2)

    assert target.config(transport._pool) == {
        "class": "ConnectionPool",
        "max_connections": None,
        "max_keepalive_connections": 20,
        "keepalive_expiry": 5,
        "http1": True,
        "http2": True,
        "retries": 2,
    }


def test_no_secret_in_the_statistics(telemetry):
    """User, password, query and token of a URL are nowhere in what is said; nor is what is in somebody's object."""
    watch(telemetry, "sqlalchemy")

    engine = create_engine(
        "postgresql+psycopg://user-x:secret-x@db:5433/app?sslpassword=query-x", creator=Stub, _initialize=False
    )
    registry = otel_pools.SQLAlchemyPoolInstrumentor._registry
    odd = {"timeout": {"password": "object-x"}, "size": 3}
    table = registry.target
    registry.target = replace(table, config=lambda _: odd)
    said = json.dumps(stats("app").to_dict())
    registry.target = table
    plain = json.dumps(stats("app").to_dict())
    engine.dispose()

    assert '"config": {"timeout": "dict", "size": 3}' in said
    assert not [word for word in ("user-x", "secret-x", "query-x", "object-x") if word in said + plain]


def test_the_public_names():
    """What the design names is there; `health` and `advice` are functions whatever is imported."""
    for room in ("otel_pools._health", "otel_pools._statistics", "otel_pools._doors"):
        importlib.import_module(room)

    assert {"pools", "health", "advice", "reset_stats", "holders", "PoolStats", "HealthReport", "Advice"} <= {
        *otel_pools.__all__
    }
    assert callable(otel_pools.health)
    assert callable(otel_pools.advice)
    assert importlib.util.find_spec("otel_pools.health") is None
    assert importlib.util.find_spec("otel_pools.advice") is None
    assert PoolStats("p", "x").to_dict()["wait"] == {
        "count": 0,
        "mean_s": 0.0,
        "p50_s": 0.0,
        "p95_s": 0.0,
        "p99_s": 0.0,
        "max_s": 0.0,
    }


def test_advice_is_wired(pool, telemetry):
    """`advice()` is what the rules say of these statistics and these holders."""
    watch(telemetry, "sqlalchemy")
    from otel_pools._advice import advise

    pool.connect().close()

    assert [type(one) for one in otel_pools.advice()] == [type(one) for one in advise(otel_pools.pools(), ())]


# -- as JSON -----------------------------------------------------------------------------


def test_the_schema_is_documented():
    """The page has the schema of the dataclasses as they are; `python tests/schemas.py` writes it."""
    text = schemas.PAGE.read_text()

    assert schemas.page(text) == text
    assert schemas.written() in text
    assert json.loads(schemas.written()) == schemas.document()


def test_what_is_said_fits_the_schema(pool, telemetry):
    """What real pools say is as the schema has it, field by field."""
    jsonschema = pytest.importorskip("jsonschema")
    watch(telemetry, "sqlalchemy")
    held = [pool.connect(), pool.connect()]
    with pytest.raises(PoolTimeout):
        pool.connect()
    told = {
        "PoolStats": otel_pools.pools(),
        "HealthReport": [otel_pools.health()],
        "Advice": otel_pools.advice(),
        "Holder": otel_pools.holders(),
    }
    for one in held:
        one.close()

    for name, all in told.items():
        check = jsonschema.Draft202012Validator(schemas.document() | {"$ref": f"#/$defs/{name}", "type": "object"})
        for one in all:
            check.validate(json.loads(json.dumps(one.to_dict())))
    assert told["PoolStats"]
    assert told["Holder"]
