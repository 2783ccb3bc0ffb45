"""What an application lives in: exporters that nobody answers, a wall clock that jumps, no more file descriptors."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import apps
import pytest
import webs
from apps import APPS
from doubles import Dbapi, Server
from listener import Listener
from opentelemetry.sdk import metrics as sdk
from proxy import HOST, Proxy
from test_network import GatedHTTP1

import otel_pools
from otel_pools import _guard, _outbox, _spans, _watch

SECONDS = 30  # for everything that must happen, on a machine that is busy
NEVER = float("inf")
MINUTES = 30  # collections without an endpoint
NOTHING = 2**14  # bytes, of caches of Python itself; the samples of those collections would be ten times as many
FEW = 20
HOUR = 3600
STARVING = Path(__file__).with_name("starving_program.py")

# -- nobody takes what is exported ------------------------------------------------------------


class Endpoint(Listener):
    """Where OTLP goes to: takes metrics, or answers with another status; a context manager."""

    def __init__(self):
        super().__init__(_Post)
        self.status = 200
        self.totals = Counter()

    @property
    def port(self):
        return self.server_address[1]

    def handle_error(self, request, client_address):
        """Who was cut off may be."""

    def take(self, body):
        """Keep the newest sums and numbers of samples, by metric, of the pool that we count."""
        from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

        totals = Counter()
        for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics:
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    totals[metric.name] += _total(metric)
        self.totals = totals


def _total(metric):
    kind = metric.WhichOneof("data")
    points = [p for p in getattr(metric, kind).data_points if COUNTED in {a.value.string_value for a in p.attributes}]
    return sum(p.count if kind == "histogram" else p.as_int or p.as_double for p in points)


class _Post(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.status == 200:
            self.server.take(body)
        self.send_response(self.server.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


COUNTED = "counted"


class Program:
    """A pool whose checkouts it counts itself, and an SDK that exports when it is told to."""

    def __init__(self, port, timeout):
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
        from sqlalchemy.pool import QueuePool

        exporter = OTLPMetricExporter(f"http://{HOST}:{port}/v1/metrics", timeout=timeout)
        self.provider = MeterProvider([PeriodicExportingMetricReader(exporter, NEVER)], shutdown_on_exit=False)
        server = Server()
        self.pool = QueuePool(lambda: Dbapi(server), pool_size=1, max_overflow=0, timeout=0, logging_name=COUNTED)
        self.attempts = self.timeouts = 0

    def __enter__(self):
        otel_pools.instrument(meter_provider=self.provider)
        return self

    def __exit__(self, *_):
        self.provider.shutdown(1)

    def work(self, times):
        """Borrow and give back so often, and once in vain."""
        from sqlalchemy.exc import TimeoutError as PoolTimeout

        for _ in range(times):
            self.pool.connect().close()
        held = self.pool.connect()
        with pytest.raises(PoolTimeout):
            self.pool.connect()
        held.close()
        self.attempts += times + 2
        self.timeouts += 1

    def export(self):
        """Collect and send."""
        self.provider.force_flush(SECONDS * 1000)

    def delivers(self, endpoint):
        """Export until all that it has done has arrived, and return that; a busy machine may be late for once."""
        end = time.monotonic() + SECONDS
        while True:
            self.export()
            if endpoint.totals["otel_pools.checkouts"] == self.attempts or time.monotonic() > end:
                break
        totals = endpoint.totals
        assert totals["otel_pools.checkouts"] == self.attempts
        assert totals["db.client.connection.timeouts"] == self.timeouts
        assert totals["otel_pools.connection.created"] == 1
        return totals

    @property
    def waiting(self):
        """How many samples of its pool wait for a collection."""
        ledgers = otel_pools.SQLAlchemyPoolInstrumentor._registry.ledgers.values()
        return sum(ledger.outbox._waiting() for ledger in ledgers if ledger.identity.name == COUNTED)


@contextlib.contextmanager
def refusing(endpoint, proxy):
    proxy.cut()
    proxy.refuse()
    yield
    proxy.well()


@contextlib.contextmanager
def hanging(endpoint, proxy):
    proxy.hang()
    yield
    proxy.well()


@contextlib.contextmanager
def busy(endpoint, proxy):
    endpoint.status = 503
    yield
    endpoint.status = 200


@pytest.fixture(scope="module")
def bare():
    """What each application meets without us."""
    otel_pools.uninstrument()
    return {app: app().go() for app in APPS}


@pytest.fixture
def lines():
    """What our logger says, as in production: a mistake of ours would be a line."""
    said = []

    class Lines(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    handler = Lines()
    _guard.logger.addHandler(handler)
    yield said
    _guard.logger.removeHandler(handler)


@pytest.mark.parametrize("away", [refusing, hanging, busy], ids=lambda away: away.__name__)
def test_an_exporter_without_an_endpoint(away, bare, lines):
    """Many collections that nobody takes: applications as without us, no memory more, and in the end nothing lost."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    with Endpoint() as endpoint, Proxy(endpoint.port) as proxy, Program(proxy.port, timeout=0.05) as program:
        program.work(100)
        before = program.delivers(endpoint)
        met, waiting, sizes = {}, set(), []
        with away(endpoint, proxy), traced():
            for minute in range(MINUTES):
                if minute < len(APPS):
                    met[APPS[minute]] = APPS[minute]().go()
                program.work(300)
                program.export()
                waiting.add(program.waiting)
                if minute in {MINUTES // 2, MINUTES - 1}:
                    sizes.append(kept())
            assert endpoint.totals == before
        program.work(100)
        after = program.delivers(endpoint)

    assert met == bare
    assert waiting == {0}
    assert sizes[1] - sizes[0] < NOTHING
    assert after["db.client.connection.wait_time"] == program.attempts
    assert after["otel_pools.samples.dropped"] == 0
    assert [line for line in lines if "lost" in line] == []


def test_an_export_that_hangs(bare, lines, monkeypatch):
    """While one export hangs nobody collects: applications do not wait, memory is bounded, nothing is uncounted."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    for room in (_outbox, _watch):
        monkeypatch.setattr(room, "LIMIT", FEW)
    monkeypatch.setattr(_watch, "A_WHILE", 0.0)
    with Endpoint() as endpoint, Proxy(endpoint.port) as proxy, Program(proxy.port, timeout=SECONDS) as program:
        program.work(1)
        proxy.hang()
        export = threading.Thread(target=program.export)
        export.start()
        assert proxy.settles(1)
        met = {app: app().go() for app in APPS}
        program.work(50 * FEW)
        for _ in range(2 * FEW):
            program.work(1)
        waiting, hangs = program.waiting, export.is_alive()
        proxy.cut()
        export.join(SECONDS)
        totals = program.delivers(endpoint)

    assert hangs
    assert met == bare
    assert waiting <= 5 * (FEW + 1)  # there are five lists
    recorded = sum(totals[f"db.client.connection.{what}_time"] for what in ("wait", "use", "create"))
    assert totals["otel_pools.samples.dropped"] > 0
    assert recorded + totals["otel_pools.samples.dropped"] == 2 * program.attempts - program.timeouts + 1
    assert [line for line in lines if "lost" in line] == []


@contextlib.contextmanager
def traced():
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


def kept():
    """Bytes that lines of ours, or of the SDK, have allocated and that are still there."""
    gc.collect()
    ours = [tracemalloc.Filter(True, f"{Path(room.__file__).parent}/*") for room in (otel_pools, sdk)]
    return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces(ours).traces)


# -- the wall clock is set --------------------------------------------------------------------


class Wall:
    """The wall clock, which somebody sets."""

    def __init__(self):
        self.ahead = 0  # seconds
        self._time, self._time_ns = time.time, time.time_ns

    def __repr__(self):
        return f"<Wall clock, {self.ahead} s ahead>"

    def time(self):
        return self._time() + self.ahead

    def time_ns(self):
        return self._time_ns() + self.ahead * 10**9


@pytest.fixture
def wall(monkeypatch):
    """For us and for OpenTelemetry, wherever they have imported it to."""
    wall = Wall()
    rooms = [room for name, room in list(sys.modules.items()) if name.startswith(("otel_pools", "opentelemetry"))]
    patched = set()
    for room in (time, *rooms):
        for name, thing in list(vars(room).items()):
            if thing is wall._time or thing is wall._time_ns:
                monkeypatch.setattr(room, name, wall.time if thing is wall._time else wall.time_ns)
                patched.add(room.__name__.partition(".")[0])
    assert patched == {"time", "otel_pools", "opentelemetry"}, _spans
    return wall


GIVE_BACK = {
    apps.SQLAlchemy: lambda _, held: held.close(),
    apps.Redis: lambda app, held: app.pool.release(held),
    apps.HTTP: lambda _, held: (held.read(), held.close()),
}


@pytest.mark.parametrize("jump", [HOUR, -HOUR], ids=["forward", "back"])
@pytest.mark.parametrize("kind", list(GIVE_BACK), ids=lambda kind: kind.__name__)
def test_the_clock_is_set(kind, jump, telemetry, wall, lines):
    """It jumps by an hour while a connection is opened, again while it is held, and back: no age or duration does."""
    otel_pools.instrument(
        kind.target,
        meter_provider=telemetry.meter_provider,
        tracer_provider=telemetry.tracer_provider,
        span_threshold=0,
    )
    began, began_ns = time.perf_counter(), wall._time_ns()
    app = kind()
    opens = app.server.connect

    def connect(*connection):
        wall.ahead += jump
        opens(*connection)

    app.server.connect = connect
    held = [one for one in (app.take(), app.take(), app.take(), app.take()) if one is not None]
    first = telemetry.read()
    wall.ahead += jump
    second, holders, (pool,) = telemetry.read(), otel_pools.holders(), otel_pools.pools()
    most, wall.ahead = wall.ahead, 0
    for one in held:
        GIVE_BACK[kind](app, one)
    last = telemetry.read()
    elapsed, ended_ns = time.perf_counter() - began, wall._time_ns()

    assert len(held) == len(holders) == most // jump - 1 >= 2
    assert 0 < first.value("otel_pools.use.oldest") < second.value("otel_pools.use.oldest") < elapsed
    assert all(0 < holder.held_s < elapsed for holder in holders)
    assert 0 < pool.oldest_use_s < elapsed
    assert all(0 <= timing.max_s < elapsed for timing in (pool.wait, pool.create))
    assert pool.rate_per_s > 0
    durations = [point for metrics in last.metrics.values() for point in _histograms(metrics)]
    assert len(durations) >= 3
    assert all(0 <= point.min <= point.max < elapsed for point in durations)
    assert last.value("otel_pools.connection.overdue") == last.value("otel_pools.connection.leaked") == 0
    assert [line for line in lines if "has been out" in line] == []
    assert len(telemetry.spans) >= len(held)
    for span in telemetry.spans:
        assert 0 <= span.end_time - span.start_time < elapsed * 1e9
        # By the clock as it was set when the wait was over.
        assert any(began_ns <= span.end_time - n * jump * 10**9 <= ended_ns for n in range(len(held) + 2)), span


def _histograms(metrics):
    return [point for metric in metrics for point in metric.data.data_points if hasattr(point, "bucket_counts")]


# -- no more file descriptors -------------------------------------------------------------------


def test_no_more_file_descriptors(postgres, valkey):
    """Each kind of pool meets EMFILE as without us; meanwhile a collection tells the failures, and we say little."""
    with webs.Ground() as ground, webs.Server(ground, GatedHTTP1) as web:
        web.gate = asyncio.Event()
        web.gate.set()
        servers = {"sqlalchemy": postgres.url(), "redis": valkey.port, "httpx": web.port}
        done = subprocess.run(
            [sys.executable, STARVING, json.dumps(servers)],
            check=False,
            capture_output=True,
            text=True,
            timeout=3 * SECONDS,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)

    assert len(found) == 6
    for kind, (bare, watched, failed, said) in found.items():
        assert watched == bare, kind
        assert sum(isinstance(one, list) for one in bare) == sum(failed.values()) == 2, kind
        assert len(said) <= 1, kind
