"""Merging many samples has exactly the effect of recording each of them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.metrics import AlwaysOnExemplarFilter, Histogram, MeterProvider
from opentelemetry.sdk.metrics.export import AggregationTemporality, InMemoryMetricReader
from opentelemetry.sdk.metrics.view import (
    DropAggregation,
    ExplicitBucketHistogramAggregation,
    ExponentialBucketHistogramAggregation,
    View,
)

from otel_pools import _merge
from otel_pools._vocabulary import BUCKETS

DELTA = {Histogram: AggregationTemporality.DELTA}
CUMULATIVE = {Histogram: AggregationTemporality.CUMULATIVE}
SETUPS = {
    "cumulative": ([CUMULATIVE], {}),
    "delta": ([DELTA], {}),
    "two readers": ([CUMULATIVE, DELTA], {}),
    "buckets": ([DELTA], {"aggregation": ExplicitBucketHistogramAggregation([0.5, 5.0])}),
    "no min and max": ([DELTA], {"aggregation": ExplicitBucketHistogramAggregation([1.0], record_min_max=False)}),
    "fewer attributes": ([CUMULATIVE], {"attribute_keys": {"a"}}),
    "dropped": ([CUMULATIVE], {"aggregation": DropAggregation()}),
    "exponential": ([CUMULATIVE, DELTA], {"aggregation": ExponentialBucketHistogramAggregation()}),
}
seconds = st.one_of(st.floats(0, 100), st.sampled_from(BUCKETS))
batches = st.lists(st.tuples(st.sampled_from("xy"), st.lists(seconds, max_size=40)), max_size=6)


class Way:
    """A provider of its own, and one histogram in it."""

    def __init__(self, setup, **options):
        temporalities, view = SETUPS[setup]
        self.readers = [InMemoryMetricReader(preferred_temporality=one) for one in temporalities]
        views = [View(instrument_name="h", **view)] if view else []
        meter = MeterProvider(self.readers, views=views, **options).get_meter("m")
        self.histogram = meter.create_histogram("h", unit="s", explicit_bucket_boundaries_advisory=BUCKETS)

    def exported(self):
        """What each reader exports now, without the times."""
        return [
            (dict(point.attributes), *numbers(point))
            for reader in self.readers
            for resource in getattr(reader.get_metrics_data(), "resource_metrics", ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
            for point in metric.data.data_points
        ]


def numbers(point):
    """A point's numbers; a sum is one up to the order of its addition."""
    shape = getattr(point, "explicit_bounds", None) or getattr(point, "scale", None)
    counts = getattr(point, "bucket_counts", None) or (point.positive.bucket_counts, point.zero_count)
    return point.count, pytest.approx(point.sum, rel=1e-12, abs=1e-12), point.min, point.max, shape, counts


@pytest.mark.parametrize("setup", SETUPS)
@settings(max_examples=60, deadline=None)
@given(batches=batches)
def test_equals_recording_each(setup, batches):
    """Whatever the temporality, the readers and the views: the same counts, buckets, sum, minimum and maximum."""
    one_by_one, at_once = Way(setup), Way(setup)
    for name, samples in batches:
        attributes = {"a": name, "b": 1}
        for sample in samples:
            one_by_one.histogram.record(sample, attributes)
        _merge.record_all(at_once.histogram, samples, attributes)

        assert at_once.exported() == one_by_one.exported()


def test_is_used():
    """On this SDK the merge is what happens: of a thousand samples one goes through the public API."""
    way, calls = Way("two readers"), []
    record = way.histogram.record

    class Spy:
        _real_instrument = way.histogram

        def record(self, *arguments):
            calls.append(arguments)
            record(*arguments)

    _merge.record_all(Spy(), [0.1] * 1000, {})

    assert len(calls) == 1
    assert [count for _, count, *_ in way.exported()] == [1000, 1000]


@pytest.mark.parametrize("missing", ["_boundaries", "_value", "_sum", "_min", "_max", "_lock", "_attributes"])
def test_another_shape_is_left_alone(monkeypatch, missing):
    """If an SDK looks different inside, every sample goes through the public API."""
    way = Way("cumulative")
    find = _merge._of

    class Changed:
        def __init__(self, known):
            self._known = known

        def __getattr__(self, name):
            if name == missing:
                raise AttributeError(name)
            return getattr(self._known, name)

    def of(match, attributes):
        real = dict(match._attributes_aggregation)
        match._attributes_aggregation = {key: Changed(one) for key, one in real.items()}
        try:
            return find(match, attributes)
        finally:
            match._attributes_aggregation = real

    monkeypatch.setattr(_merge, "_of", of)
    monkeypatch.setattr(_merge, "_named", lambda thing, name: name == "_ExplicitBucketHistogramAggregation")
    _merge.record_all(way.histogram, [0.1] * 100, {})

    assert [count for _, count, *_ in way.exported()] == [100]


def test_a_filter_that_wants_each_sample_gets_it():
    """With exemplars always on, the reservoir is offered every sample."""
    way = Way("cumulative", exemplar_filter=AlwaysOnExemplarFilter())

    assert _merge._aggregations(way.histogram, {}) is None


def test_no_sdk_is_no_merge():
    """A histogram of the API alone, or of another SDK, is only ever recorded to."""
    calls = []

    class Foreign:
        def record(self, amount, attributes, context=None):
            calls.append(amount)

    _merge.record_all(Foreign(), [1.0, 2.0, 3.0, 4.0, 5.0], {})
    _merge.record_all(Foreign(), [], {})

    assert calls == [1.0, 2.0, 3.0, 4.0, 5.0]
