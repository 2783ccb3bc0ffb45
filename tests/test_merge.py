"""Merging is for an SDK that has proven to be as we know it; any other gets its samples one by one."""

from __future__ import annotations

import inspect
import logging
import re
import sys
import threading
from collections import Counter
from dataclasses import replace
from types import ModuleType

import pytest
from opentelemetry.sdk.metrics import Histogram, MeterProvider
from opentelemetry.sdk.metrics._internal._view_instrument_match import _ViewInstrumentMatch as Match
from opentelemetry.sdk.metrics._internal.aggregation import _ExplicitBucketHistogramAggregation as Kind
from opentelemetry.sdk.metrics.export import AggregationTemporality, InMemoryMetricReader

from otel_pools import _merge
from otel_pools._vocabulary import BUCKETS

DELTA = {Histogram: AggregationTemporality.DELTA}
SAMPLES = [0.5, 2.0, 0.0, 40.0, 1.0, 0.25, 5.0] * 20  # some of them on a bound
SOURCE = inspect.getsource(_merge)
# What it touches that is not its own.
PRIVATE = sorted(set(re.findall(r"(?<!self)\.(_[a-z]\w*)", SOURCE)))


class Way:
    """A provider of its own, and one histogram in it whose public calls are counted."""

    def __init__(self):
        self.readers = [InMemoryMetricReader(), InMemoryMetricReader(DELTA)]
        self.provider = MeterProvider(self.readers, shutdown_on_exit=False)
        self._real_instrument = self.another("h")
        self.calls = 0

    def another(self, name):
        return self.provider.get_meter("m").create_histogram(name, explicit_bucket_boundaries_advisory=BUCKETS)

    def record(self, *arguments):
        self.calls += 1
        self._real_instrument.record(*arguments)

    def exported(self):
        return [
            (metric.name, replace(point, start_time_unix_nano=0, time_unix_nano=0))
            for reader in self.readers
            for resource in getattr(reader.get_metrics_data(), "resource_metrics", ())
            for scope in resource.scope_metrics
            if scope.scope.name == "m"  # SDK 1.41 tells of itself, too
            for metric in scope.metrics
            for point in metric.data.data_points
        ]


def recorded():
    way = Way()
    for sample in SAMPLES:
        way.record(sample, {"a": 1})
    return way.exported()


@pytest.fixture
def way():
    """Where the samples go."""
    return Way()


def test_is_used(way):
    """On this SDK the merge is what happens: one call of the public API for each delivery."""
    for _ in range(3):
        _merge.record_all(way, SAMPLES, {"a": 1})

    assert way.calls == 3
    assert [point.count for _, point in way.exported()] == [3 * len(SAMPLES)] * 2


def test_a_few_are_just_recorded(way):
    """Below four samples nothing is looked up, and none at all is nothing."""
    for count in range(5):
        _merge.record_all(way, SAMPLES[:count], {})

    assert way.calls == 0 + 1 + 2 + 3 + 1


# SDK 1.45 and newer.
MISSING = set() if hasattr(sys.modules[Match.__module__], "_hash_attributes") else {"_hash_attributes"}


@pytest.mark.parametrize("private", sorted(set(PRIVATE) - MISSING))
def test_an_sdk_that_calls_it_otherwise_is_left_alone(way, private):
    """Whichever private name an SDK may change, every sample goes through the public API."""
    room = ModuleType("room")
    exec(re.sub(rf"\.{private}\b", ".another_name", SOURCE), room.__dict__)

    room.record_all(way, SAMPLES, {"a": 1})

    assert way.calls == len(SAMPLES)
    assert way.exported() == recorded()


def test_the_private_names_are_known():
    """The private surface is this; who makes it larger has to look at every SDK that we support."""
    assert PRIVATE == [
        "_aggregation",
        "_attribute_keys",
        "_attributes",
        "_attributes_aggregation",
        "_boundaries",
        "_hash_attributes",
        "_instrument_view_instrument_matches",
        "_lock",
        "_max",
        "_measurement_consumer",
        "_min",
        "_reader_storages",
        "_record_min_max",
        "_sdk_config",
        "_sum",
        "_value",
        "_view",
    ]


def lower_inclusive(aggregation, value):
    """A bound belongs to the bucket above it."""
    if value in aggregation._boundaries:
        at = aggregation._boundaries.index(value)
        aggregation._value[at] -= 1
        aggregation._value[at + 1] += 1


def kept_elsewhere(field, fold, start, since=0):
    """Another attribute than ours is what *field* is exported from, after so many collections."""

    def keep(aggregation, value):
        setattr(aggregation, f"_new_{field}", fold(getattr(aggregation, f"_new_{field}", start), value))

    keep.field, keep.since = field, since
    return keep


CHANGES = {
    "bounds": lower_inclusive,
    "count": kept_elsewhere("count", lambda count, _: count + 1, 0),
    "sum": kept_elsewhere("sum", lambda total, value: total + value, 0.0),
    "min": kept_elsewhere("min", min, 1e9),
    "max": kept_elsewhere("max", max, 0.0),
    "once collected": kept_elsewhere("count", lambda count, _: count + 1, 0, since=1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_sdk_that_means_otherwise_is_left_alone(way, monkeypatch, change):
    """If an SDK keeps our names and gives them another meaning, the proof fails, and nothing is miscounted."""
    aggregate, collect, field = Kind.aggregate, Kind.collect, getattr(change, "field", None)
    collections = Counter()

    def changed(self, measurement, *arguments):
        aggregate(self, measurement, *arguments)
        change(self, measurement.value)

    def told(self, *arguments):
        point, before = collect(self, *arguments), collections[self]
        collections[self] += 1
        if field is None or before < change.since:
            return point
        return replace(point, **{field: getattr(self, f"_new_{field}")})

    monkeypatch.setattr(Kind, "aggregate", changed)
    monkeypatch.setattr(Kind, "collect", told)
    _merge.record_all(way, SAMPLES, {"a": 1})

    assert way.calls == len(SAMPLES)
    assert way.exported() == recorded()


def test_a_subclass_is_left_alone(way, monkeypatch):
    """An aggregation that somebody derived from the SDK's may do more, and is recorded to."""
    monkeypatch.setattr(Kind, "__module__", "app.metrics")
    _merge.record_all(way, SAMPLES, {"a": 1})

    assert way.calls == len(SAMPLES)
    assert way.exported() == recorded()


def test_proven_once_for_each_provider(way, monkeypatch):
    """The proof is made at the first delivery that is worth it, for all histograms of a provider."""
    proofs, prove = [], _merge._prove
    monkeypatch.setattr(_merge, "_prove", lambda real: proofs.append(real) or prove(real))
    one, two = way.another("one"), way.another("two")
    _merge.record_all(one, SAMPLES[:3], {})
    before = len(proofs)
    for histogram in (one, two) * 3:
        _merge.record_all(histogram, SAMPLES, {})

    assert (before, len(proofs)) == (0, 1)
    _merge.record_all(Way().another("one"), SAMPLES, {})
    assert len(proofs) == 2


def test_what_cannot_be_proven_is_not_tried_again(way, monkeypatch):
    """An SDK of which no twin can be made costs one attempt, and not one for each delivery."""
    attempts = []
    monkeypatch.setattr(_merge, "_twin", lambda real: attempts.append(real) or 1 / 0)
    for _ in range(3):
        _merge.record_all(way, SAMPLES, {})

    assert (way.calls, len(attempts)) == (3 * len(SAMPLES), 1)


def test_waits_for_the_aggregation(way):
    """Nothing is counted while somebody else holds an aggregation's lock."""
    way.record(1.0, {})
    (aggregation, _) = _merge._aggregations(way._real_instrument, {})
    thread = threading.Thread(target=_merge._merge, args=(way._real_instrument, SAMPLES, {}))
    with aggregation._lock:
        thread.start()
        thread.join(0.1)
        waited = thread.is_alive(), sum(aggregation._value)
    thread.join()

    assert waited == (True, 1)
    assert [point.count for _, point in way.exported()] == [1 + len(SAMPLES)] * 2


def test_nobody_sees_the_proof(way, caplog):
    """Neither the exports nor the logs know of it, and no provider is kept alive."""
    caplog.set_level(logging.DEBUG)
    readers = len(MeterProvider._all_metric_readers)
    _merge.record_all(way, SAMPLES, {"a": 1})

    assert [(name, point.count) for name, point in way.exported()] == [("h", len(SAMPLES))] * 2
    assert caplog.records == []
    assert len(MeterProvider._all_metric_readers) == readers


def test_no_sdk_is_no_merge():
    """A histogram of the API alone, or of another SDK, is only ever recorded to."""
    calls = []

    class Foreign:
        def record(self, amount, attributes, context=None):
            calls.append(amount)

    _merge.record_all(Foreign(), [1.0, 2.0, 3.0, 4.0, 5.0], {})
    _merge.record_all(Foreign(), [], {})

    assert calls == [1.0, 2.0, 3.0, 4.0, 5.0]
