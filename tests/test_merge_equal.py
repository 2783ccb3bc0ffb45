"""Merging many samples has exactly the effect of recording each of them, however the SDK is set up."""

from __future__ import annotations

import math
import threading
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.metrics._internal import _ProxyMeterProvider
from opentelemetry.sdk.metrics import (
    AlwaysOffExemplarFilter,
    AlwaysOnExemplarFilter,
    ExemplarFilter,
    Histogram,
    MeterProvider,
    TraceBasedExemplarFilter,
)
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    InMemoryMetricReader,
    MetricExporter,
    MetricExportResult,
    PeriodicExportingMetricReader,
)
from opentelemetry.sdk.metrics.view import (
    DropAggregation,
    ExplicitBucketHistogramAggregation,
    ExponentialBucketHistogramAggregation,
    LastValueAggregation,
    SumAggregation,
    View,
)
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import INVALID_SPAN, use_span
from sqlalchemy.pool import QueuePool

import otel_pools
from otel_pools import _merge
from otel_pools._vocabulary import BUCKETS
from otel_pools.testing import Export

DELTA = {Histogram: AggregationTemporality.DELTA}
CUMULATIVE = {Histogram: AggregationTemporality.CUMULATIVE}


class Setup(NamedTuple):
    """How an SDK is set up, and whether we know all that it makes of our histogram."""

    temporalities: tuple = (CUMULATIVE, DELTA)
    views: tuple = ()
    known: bool = True
    preferred: dict | None = None


def view(*aggregation, **options):
    return View(instrument_name="h", **dict(zip(("aggregation",), aggregation, strict=False)), **options)


COARSE = view(ExplicitBucketHistogramAggregation([1.0]), name="coarse")
SETUPS = {
    "cumulative": Setup((CUMULATIVE,)),
    "delta": Setup((DELTA,)),
    "two readers": Setup(),
    "three readers": Setup((DELTA, CUMULATIVE, DELTA)),
    "no reader": Setup(()),
    "other buckets": Setup(views=(view(ExplicitBucketHistogramAggregation([0.5, 5.0])),)),
    "one bucket": Setup(views=(view(ExplicitBucketHistogramAggregation([])),)),
    "no min and max": Setup(views=(view(ExplicitBucketHistogramAggregation([1.0], record_min_max=False)),)),
    "fewer attributes": Setup(views=(view(attribute_keys={"a"}),)),
    "no attributes": Setup(views=(view(attribute_keys=set()),)),
    "two views": Setup(views=(COARSE, view(name="fewer", attribute_keys={"a"}))),
    "dropped": Setup(views=(view(DropAggregation()),)),
    "dropped and kept": Setup(views=(view(DropAggregation()), COARSE)),
    "another is dropped": Setup(views=(View(instrument_name="i", aggregation=DropAggregation()),)),
    "buckets a reader prefers": Setup(preferred={Histogram: ExplicitBucketHistogramAggregation([2.0])}),
    "exponential": Setup(views=(view(ExponentialBucketHistogramAggregation()),), known=False),
    "exponential a reader prefers": Setup(preferred={Histogram: ExponentialBucketHistogramAggregation()}, known=False),
    "exponential and buckets": Setup(
        views=(view(ExponentialBucketHistogramAggregation(), name="e"), COARSE), known=False
    ),
    "sum": Setup(views=(view(SumAggregation()),), known=False),
    "last value": Setup(views=(view(LastValueAggregation()),), known=False),
    "last value and buckets": Setup(views=(view(LastValueAggregation(), name="last"), COARSE), known=False),
}
SETS = ({"a": "x", "b": 1}, {"a": "x", "b": 2}, {"a": "y", "b": 1}, {"b": 1}, {})
EDGES = (*BUCKETS, *(math.nextafter(bound, 0) for bound in BUCKETS), 0.0, 2.0, 5e-324, 1e9, 1e300)
seconds = st.one_of(st.floats(0, 100), st.sampled_from(EDGES))
deliveries = st.tuples(st.sampled_from(SETS), st.lists(seconds, max_size=20), st.booleans())


class Way:
    """A provider of its own, and one histogram in it."""

    def __init__(self, setup=Setup(), **options):  # noqa: B008  it is a constant
        self.readers = [InMemoryMetricReader(one, setup.preferred) for one in setup.temporalities]
        self.provider = MeterProvider(self.readers, views=setup.views, shutdown_on_exit=False, **options)
        self.histogram = create(self.provider.get_meter("m"))
        self.points = []
        self.public = 0

    def record(self, amount, attributes, context=None):
        """Record, and count the calls of the public API."""
        self.public += 1
        self.histogram.record(amount, attributes, context)

    @property
    def _real_instrument(self):
        return self.histogram

    def collect(self):
        """Keep what each reader exports now."""
        for number, reader in enumerate(self.readers):
            for metric in metrics(reader.get_metrics_data()):
                self.points += [(number, metric.name, metric.unit, point) for point in metric.data.data_points]

    def exported(self):
        """All points; of the times, which are the same and which are earlier."""
        moments = {moment for *_, point in self.points for moment in when(point)}
        rank = {moment: number for number, moment in enumerate(sorted(moments))}
        return [
            (*series, [rank[moment] for moment in when(point)], comparable(point)) for *series, point in self.points
        ]


def create(meter):
    return meter.create_histogram("h", unit="s", explicit_bucket_boundaries_advisory=BUCKETS)


def metrics(data):
    scopes = [scope for resource in (data.resource_metrics if data else ()) for scope in resource.scope_metrics]
    # SDK 1.41 tells of itself, too.
    return [metric for scope in scopes if scope.scope.name != "opentelemetry-sdk" for metric in scope.metrics]


def when(point):
    return (point.start_time_unix_nano or 0, point.time_unix_nano)


def comparable(point):
    """A point's fields but the times; a sum is one up to the order of its addition."""
    exemplars = [(e.value, e.filtered_attributes, e.span_id, e.trace_id) for e in point.exemplars]
    plain = replace(point, start_time_unix_nano=0, time_unix_nano=0, exemplars=exemplars)
    if not hasattr(point, "sum"):
        return plain
    return replace(plain, sum=0), pytest.approx(point.sum, rel=1e-12, abs=1e-300, nan_ok=True)


def both(steps, one_by_one, at_once):
    """Deliver the same samples in both ways, collecting where the step says so and at the end."""
    for attributes, samples, collect in [*steps, ({}, [], True)]:
        for sample in samples:
            one_by_one.record(sample, attributes)
        _merge.record_all(at_once, samples, attributes)
        for way in (one_by_one, at_once) if collect else ():
            way.collect()


@pytest.mark.parametrize("name", SETUPS)
@settings(max_examples=40, deadline=None)
@given(steps=st.lists(deliveries, max_size=8))
def test_equals_recording_each(name, steps):
    """Whatever the readers and the views: the same points, buckets, bounds, sums, extremes, attributes and times."""
    one_by_one, at_once = Way(SETUPS[name]), Way(SETUPS[name])

    both(steps, one_by_one, at_once)

    assert at_once.exported() == one_by_one.exported()


@pytest.mark.parametrize("name", SETUPS)
def test_merges_what_is_known(name):
    """Of a thousand samples one goes through the public API, or all where there is something that we do not know."""
    way = Way(SETUPS[name])

    _merge.record_all(way, [0.1] * 1000, SETS[0])

    assert way.public == (1 if SETUPS[name].known else 1000)


class OfOneHost(ExemplarFilter):
    """A user's own."""

    def should_sample(self, value, time_unix_nano, attributes, context):
        return attributes.get("a") == "x"


SPANS = {
    "no span": nullcontext,
    "invalid": lambda: use_span(INVALID_SPAN),
    "sampled": lambda: use_span(TracerProvider(shutdown_on_exit=False).get_tracer("t").start_span("flush")),
}


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize(
    "exemplar_filter", [AlwaysOffExemplarFilter, AlwaysOnExemplarFilter, TraceBasedExemplarFilter, OfOneHost]
)
@pytest.mark.parametrize("name", ["two readers", "fewer attributes"])
def test_offers_the_same_exemplars(name, exemplar_filter, span):
    """Whoever wants to be offered each sample is, be it of the first delivery or of a later one."""
    ways = [Way(SETUPS[name], exemplar_filter=exemplar_filter()) for _ in range(2)]
    steps = [(SETS[0], [0.2, 3.0, 0.3, 7.0, 8.0, 0.02], True)] * 2

    both(steps[:1], *ways)
    with SPANS[span]():
        both(steps, *ways)

    assert ways[1].exported() == ways[0].exported()


def test_merges_where_there_are_no_exemplars():
    """With exemplars off, a span makes no difference."""
    way = Way(exemplar_filter=AlwaysOffExemplarFilter())
    with SPANS["sampled"]():
        _merge.record_all(way, [0.1] * 100, {})

    assert way.public == 1


def test_merges_by_default_outside_spans_only():
    """With the SDK's own filter, a delivery inside a span does not end the merging of later ones."""
    way = Way()
    with SPANS["sampled"]():
        _merge.record_all(way, [0.1] * 100, {})

    assert way.public == 100
    _merge.record_all(way, [0.1] * 100, {})
    assert way.public == 101


@pytest.mark.parametrize("odd", [-1.0, -math.inf, math.inf, math.nan])
@pytest.mark.parametrize("where", [0, 3, 6])
def test_leaves_odd_samples_to_the_sdk(odd, where):
    """What is negative or no number is refused or taken by the SDK, not by us."""
    samples = [0.3, 0.1, 0.2, 5.0, 0.2, 40.0]
    samples.insert(where, odd)
    ways = Way(), Way()

    both([({}, [1.0] * 5, False), ({}, samples, True)], *ways)

    assert repr(ways[1].exported()) == repr(ways[0].exported())


def test_counts_nothing_where_the_sdk_does_not():
    """A histogram whose meter is switched off after a collection ignores the first sample, hence all of them."""
    way = Way()
    _merge.record_all(way, [0.1] * 100, {})
    way.collect()
    way.histogram.record, way.points = lambda *_: None, []

    _merge.record_all(way, [0.1] * 100, {})
    way.collect()

    assert [point.count for *_, point in way.points] == [100]  # what was cumulated before


def test_the_sdk_may_come_late():
    """A histogram made before there was an SDK forgets what it is given until then, and merges from then on."""
    early = [_ProxyMeterProvider() for _ in range(2)]
    histograms = [create(proxy.get_meter("m")) for proxy in early]
    ways = Way(), Way()
    for samples in ([0.1] * 50, [0.2, 7.0] * 25):
        for sample in samples:
            histograms[0].record(sample, {})
        _merge.record_all(histograms[1], samples, {})
        for proxy, way in zip(early, ways, strict=True):
            proxy.on_set_meter_provider(way.provider)
    for way in ways:
        way.collect()

    assert ways[1].exported() == ways[0].exported()
    assert {point.count for *_, point in ways[1].points} == {50}
    assert _merge._proven[ways[1].histogram._measurement_consumer]


def test_a_provider_may_be_shut_down():
    """Recording after the shutdown breaks nothing, and has the same effect."""
    ways = Way(), Way()
    both([({}, [0.1] * 9, True)], *ways)
    for way in ways:
        way.provider.shutdown()
    both([({}, [0.1] * 9, True)], *ways)

    assert ways[1].exported() == ways[0].exported()


def test_so_many_attribute_sets():
    """Beyond the 2000 attribute sets where other SDKs begin to limit them, both ways still agree."""
    ways = Way(), Way()

    both([({"a": number}, [0.1, 0.2, 0.3, number / 100], False) for number in range(2100)], *ways)

    assert ways[1].exported() == ways[0].exported()
    assert (ways[0].public, ways[1].public) == (8400, 2100)


def test_many_threads_lose_nothing():
    """While readers collect and others record, merging from many threads keeps every sample, once."""
    way, stop = Way(), threading.Event()

    def deliver():
        for _ in range(60):
            _merge.record_all(way.histogram, [0.5, 2.0, 0.25, 40.0] * 5, SETS[0])
            way.histogram.record(2.0, SETS[0])

    def collect():
        while not stop.is_set():
            way.collect()

    collector = threading.Thread(target=collect)
    deliverers = [threading.Thread(target=deliver) for _ in range(4)]
    for thread in (collector, *deliverers):
        thread.start()
    for thread in deliverers:
        thread.join()
    stop.set()
    collector.join()
    way.collect()
    cumulative, delta = ([point for reader, *_, point in way.points if reader == number] for number in (0, 1))

    for counted in (cumulative[-1:], delta):
        assert sum(point.count for point in counted) == 4 * 60 * 21
        assert sum(point.sum for point in counted) == 4 * 60 * (5 * 42.75 + 2)
        buckets = [sum(column) for column in zip(*(point.bucket_counts for point in counted), strict=True)]
        assert buckets == [0, 0, 0, 0, 0, 0, 0, 2400, 0, 1440, 0, 0, 1200]
        assert (min(p.min for p in counted), max(p.max for p in counted)) == (0.25, 40.0)


class Stub:
    """A DBAPI connection that does nothing."""

    def rollback(self):
        pass

    def close(self):
        pass


class Kept(MetricExporter):
    """An exporter to a list."""

    def __init__(self):
        super().__init__(preferred_temporality=DELTA)
        self.exports = []

    def export(self, metrics_data, timeout_millis=10_000, **kwargs):
        self.exports.append(Export(metrics(metrics_data)))
        return MetricExportResult.SUCCESS

    def force_flush(self, timeout_millis=10_000):
        return True

    def shutdown(self, timeout_millis=30_000, **kwargs):
        pass


def test_a_flush_and_a_shutdown_take_what_is_waiting():
    """What many pools of one name have waiting is in the export that was forced, and in the last one."""
    exporter = Kept()
    provider = MeterProvider([PeriodicExportingMetricReader(exporter, 3_600_000)], shutdown_on_exit=False)
    otel_pools.instrument("sqlalchemy", meter_provider=provider)
    pools = [QueuePool(Stub, logging_name="one") for _ in range(20)]
    for pool in pools:
        pool.connect().close()
    provider.force_flush()
    for pool in pools[:5] * 2:
        pool.connect().close()
    provider.shutdown()

    for name in ("wait_time", "use_time"):
        counts = [export.value(f"db.client.connection.{name}") for export in exporter.exports]
        assert counts == [20, 10]
