"""From samples to exports: every reader, every temporality, whenever the SDK comes."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import threading

import pytest
from opentelemetry.sdk.metrics import Counter, Histogram, MeterProvider, ObservableCounter
from opentelemetry.sdk.metrics.export import AggregationTemporality, InMemoryMetricReader
from opentelemetry.sdk.metrics.view import DropAggregation, ExplicitBucketHistogramAggregation, View
from sqlalchemy import create_engine
from sqlalchemy.pool import QueuePool

import otel_pools
from otel_pools import _guard
from otel_pools import _outbox as outbox_room
from otel_pools._instruments import Instruments
from otel_pools._outbox import Note, Outbox
from otel_pools.testing import Export, Telemetry

DELTA = dict.fromkeys((Counter, Histogram, ObservableCounter), AggregationTemporality.DELTA)


class Stub:
    """A DBAPI connection that does nothing."""

    def rollback(self):
        pass

    def close(self):
        pass


@pytest.fixture
def pool():
    """A small pool with a name."""
    return QueuePool(Stub, pool_size=1, max_overflow=0, timeout=0.01, logging_name="p")


def read(reader):
    data = reader.get_metrics_data()
    return Export([m for r in (data.resource_metrics if data else ()) for s in r.scope_metrics for m in s.metrics])


def test_two_readers_each_get_everything_once(pool):
    """A sample is recorded once and exported by both readers, cumulative or delta."""
    readers = [InMemoryMetricReader(), InMemoryMetricReader(preferred_temporality=DELTA)]
    otel_pools.instrument(meter_provider=MeterProvider(readers))
    seen = []
    for _ in range(2):
        pool.connect().close()
        exports = [read(reader) for reader in readers]
        seen.append(
            [e.value(name) for e in exports for name in ("db.client.connection.wait_time", "otel_pools.checkouts")]
        )

    assert seen == [[1, 1, 1, 1], [2, 2, 1, 1]]


def test_buckets_suit_seconds(pool, telemetry):
    """The bounds are our advice, in seconds."""
    otel_pools.instrument(meter_provider=telemetry.meter_provider)
    pool.connect().close()

    (point,) = telemetry.points("db.client.connection.use_time")

    assert point.explicit_bounds == (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0)


def test_views_are_respected(pool):
    """A user's view changes buckets, attributes or drops a metric, and we still come through."""
    reader = InMemoryMetricReader()
    views = [
        View(instrument_name="db.client.connection.wait_time", aggregation=ExplicitBucketHistogramAggregation([1.0])),
        View(instrument_name="otel_pools.checkouts", attribute_keys=set()),
        View(instrument_name="db.client.connection.count", aggregation=DropAggregation()),
    ]
    otel_pools.instrument(meter_provider=MeterProvider([reader], views=views))
    pool.connect().close()
    now = read(reader)

    assert now.points("db.client.connection.wait_time")[0].explicit_bounds == (1.0,)
    assert [(dict(p.attributes), p.value) for p in now.points("otel_pools.checkouts")] == [({}, 1)]
    assert "db.client.connection.count" not in now.metrics


def test_excluded_metrics_are_not_made(pool, telemetry):
    """`metrics_exclude` leaves out gauges and histograms, and whichever comes first still collects."""
    excluded = ["db.client.connection.count", "db.client.connection.wait_time"]
    otel_pools.instrument(meter_provider=telemetry.meter_provider, metrics_exclude=excluded)
    pool.connect().close()
    now = telemetry.read()

    assert not set(excluded) & set(now.metrics)
    assert now.value("db.client.connection.use_time") == 1
    otel_pools.uninstrument()
    otel_pools.instrument(meter_provider=telemetry.meter_provider)
    pool.connect().close()
    assert telemetry.read().count("idle") == telemetry.value("otel_pools.checkouts") == 1


def test_instrumenting_again_makes_no_second_callback(pool, telemetry):
    """The SDK drops a second callback in silence; off and on again, every number comes once."""
    for _ in range(3):
        otel_pools.instrument(meter_provider=telemetry.meter_provider)
        otel_pools.uninstrument()
    otel_pools.instrument(meter_provider=telemetry.meter_provider)
    pool.connect().close()

    assert telemetry.value("otel_pools.checkouts") == 1


def test_another_provider_takes_over(pool, telemetry):
    """After instrumenting with a second provider, the first says nothing."""
    otel_pools.instrument(meter_provider=telemetry.meter_provider)
    otel_pools.uninstrument()
    second = Telemetry()
    otel_pools.instrument(meter_provider=second.meter_provider)
    pool.connect().close()

    assert second.value("otel_pools.checkouts") == 1
    assert telemetry.points("otel_pools.pools") == []


def test_slow_and_failed_waits_carry_their_context(pool, telemetry):
    """The exemplar of a failed wait points at the trace of who waited."""
    otel_pools.instrument(meter_provider=telemetry.meter_provider, tracer_provider=telemetry.tracer_provider)
    tracer = telemetry.tracer_provider.get_tracer("app")
    held = pool.connect()
    with tracer.start_as_current_span("request") as span, pytest.raises(Exception, match="QueuePool limit"):
        pool.connect()
    held.close()

    (point,) = telemetry.points("db.client.connection.wait_time", error__type="timeout")

    assert [exemplar.trace_id for exemplar in point.exemplars] == [span.get_span_context().trace_id]


def test_the_sdk_may_come_late():
    """What happened before the SDK was set up is exported when it is there."""
    program = """
        import otel_pools
        from sqlalchemy.pool import QueuePool
        from opentelemetry import metrics
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader
        from otel_pools.testing import Export
        class Stub:
            def rollback(self): pass
            def close(self): pass
        otel_pools.instrument()
        pool = QueuePool(Stub)
        for _ in range(7): pool.connect().close()
        reader = InMemoryMetricReader()
        metrics.set_meter_provider(MeterProvider([reader]))
        scopes = reader.get_metrics_data().resource_metrics[0].scope_metrics
        now = Export([metric for scope in scopes for metric in scope.metrics])
        print(now.value("db.client.connection.wait_time"), now.value("otel_pools.checkouts"), now.count("idle"))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)

    assert (done.stdout.split(), done.stderr) == (["7.0", "7.0", "1.0"], "")


def test_without_any_sdk_nothing_grows(pool, monkeypatch):
    """With nobody collecting, samples are dropped and counted beyond the limit."""
    monkeypatch.setattr("otel_pools._watch.LIMIT", 100)
    monkeypatch.setattr("otel_pools._watch.A_WHILE", 0.0)
    otel_pools.instrument()
    registry = otel_pools.SQLAlchemyPoolInstrumentor._registry
    for _ in range(1000):
        pool.connect().close()
    (ledger,) = registry.ledgers.values()

    assert len(ledger.outbox.waits) <= 101
    assert len(ledger.outbox.uses) <= 102
    tally = ledger.outbox.tally()
    assert tally.dropped + len(ledger.outbox.waits) + len(ledger.outbox.uses) + len(ledger.outbox.creates) >= 1999
    assert repr(ledger).startswith("<Ledger p [0 held, 0 waiting]>")


def test_a_name_whose_pools_are_gone_keeps_its_counters(telemetry):
    """A counter never goes back, though the pool it counted is gone."""
    otel_pools.instrument(meter_provider=telemetry.meter_provider)
    for _ in range(3):
        pool = QueuePool(Stub, logging_name="short-lived")
        pool.connect().close()
        del pool
        gc.collect()
    now = telemetry.read()

    assert now.value("otel_pools.checkouts", otel_pools__pool__name="short-lived") == 3
    assert now.points("otel_pools.pools", otel_pools__pool__name="short-lived") == []


def test_a_finaliser_inside_a_collection_does_not_hang(telemetry):
    """Garbage collection may return a connection while the SDK holds its locks: 10^4 times, nothing hangs."""
    otel_pools.instrument(meter_provider=telemetry.meter_provider)
    pool = QueuePool(Stub, pool_size=5, max_overflow=-1, logging_name="gc")
    returned = 0

    class Loan:
        """A cycle: only the garbage collector gives this connection back."""

        def __init__(self):
            self.me, self.fairy = self, pool.connect()

    def work():
        nonlocal returned
        while returned < 10_000:
            for _ in range(5):
                Loan()
                returned += 1
            telemetry.read()

    threshold = gc.get_threshold()
    gc.freeze()  # what the other tests left behind need not be walked 10^4 times
    gc.set_threshold(50, 2, 2)
    try:
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(100)
    finally:
        gc.set_threshold(*threshold)
        gc.unfreeze()
    hung = thread.is_alive()
    gc.collect()

    assert not hung
    assert telemetry.value("db.client.connection.use_time") == returned


def test_reprs():
    """Each stateful object says its state in a sentence."""
    outbox = Outbox()
    outbox.notes.append(Note(1.0, "new", None, None, 0.0))
    meter = MeterProvider().get_meter("m")

    assert repr(outbox) == "<Outbox [1 samples waiting, 0 dropped]>"
    assert repr(Instruments(meter)) == "<Instruments [nothing watched]>"
    assert repr(Telemetry()) == "<Telemetry [0 metrics, 0 spans]>"


def test_a_spill_never_waits(monkeypatch):
    """A request that finds the outbox being emptied goes on and leaves it alone."""
    outbox = Outbox()
    outbox.waits.append(1.0)
    with outbox._folding:
        outbox.spill()

    assert (outbox.waits, outbox.tally().dropped) == ([1.0], 0)
    outbox.spill()
    assert (outbox.waits, outbox.tally().dropped, outbox.tally().checkouts) == ([], 1, {("idle", None): 1})
    assert outbox_room.LIMIT > 0


def test_what_broke_on_the_release_path_is_said_at_collection(pool, telemetry, monkeypatch, caplog):
    """A mistake of ours in a checkin does not reach the host, and is logged at the next collection."""
    monkeypatch.setattr(_guard, "loud", False)
    otel_pools.instrument(meter_provider=telemetry.meter_provider)
    fairy = pool.connect()
    monkeypatch.setattr("otel_pools._watch.Watch.returned", lambda *_: 1 / 0)
    otel_pools.SQLAlchemyPoolInstrumentor._registry.ledgers.popitem()[1].leases.clear()
    fairy.close()
    before = caplog.text
    telemetry.read()

    assert (before, caplog.text.count("a checkin: ZeroDivisionError")) == ("", 1)


def test_a_pool_met_by_the_collection_is_told_like_any_other(telemetry):
    """The first export of a pool that nobody has used yet has its own column, without what the user has excluded."""
    otel_pools.instrument("sqlalchemy", meter_provider=telemetry.meter_provider, metrics_exclude=("otel_pools.pools",))
    engine = create_engine("sqlite://", poolclass=QueuePool)

    told = set(telemetry.read().metrics)

    assert "db.client.connection.max" in told
    assert not {"otel_pools.pools", "otel_pools.connection.max", "otel_pools.connection.pending_requests"} & told
    engine.dispose()
