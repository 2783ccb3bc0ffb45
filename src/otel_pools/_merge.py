"""Many samples into one SDK histogram at once: the only room that touches the SDK's private aggregations."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import isfinite
from typing import Any, Protocol
from weakref import WeakKeyDictionary

# Below this, finding the aggregations costs more than recording.
FEW = 4
# For the SDK's own bounds: on, between and beyond them. Whole quarters, so that a sum is the same in any order.
PROOF = ((7.0, 0.0, 5.0, 0.25, 20000.0, 5.0), (10.0, 25.0, 6.5, 3.0))

_proven: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


class Histogram(Protocol):
    """The part of an OpenTelemetry histogram that delivery needs."""

    def record(self, amount: float, attributes: Mapping[str, str | int] | None = None, context: Any = None) -> None: ...


def record_all(histogram: Histogram, samples: Sequence[float], attributes: Mapping[str, str | int]) -> None:
    """
    Have the same effect as recording each sample, for a fiftieth of the time.

    The first goes through the public API, so that every reader and view makes
    the aggregation it wants; the others are counted into the buckets of those.
    If there is one that we do not know (another SDK or version, an exponential
    histogram), all go through the public API.
    """
    rest = samples
    real = getattr(histogram, "_real_instrument", histogram)  # before an SDK was set up, the API gave a stand-in
    if len(samples) >= FEW and _may_merge(real):
        histogram.record(samples[0], attributes)
        rest = samples[1:]
        if _merge(real, rest, attributes):
            return
    for seconds in rest:
        histogram.record(seconds, attributes)


def _may_merge(real: Any) -> bool:
    """Whether this is the SDK as we know it, and nobody wants to be offered each sample."""
    try:
        consumer = real._measurement_consumer
        if _wants_each(consumer._sdk_config.exemplar_filter):
            return False
        if consumer not in _proven:
            _proven[consumer] = _prove(real)
        return _proven[consumer]
    except Exception:
        return False


def _wants_each(exemplar_filter: Any) -> bool:
    if _named(exemplar_filter, "TraceBasedExemplarFilter"):
        # Whoever forces a flush may do so inside a span.
        return bool(exemplar_filter.should_sample(0.0, 0, {}, None))
    return not _named(exemplar_filter, "AlwaysOffExemplarFilter")


def _named(thing: object, name: str) -> bool:
    """By name and not by class, so that no SDK is imported; and the SDK's own, not somebody's subclass."""
    kind = type(thing)
    return kind.__name__ == name and kind.__module__.startswith("opentelemetry.sdk.metrics.")


def _prove(real: Any) -> bool:
    """Whether merging does what recording does: tried once for each provider, on twins that nobody collects."""
    try:
        one_by_one, at_once = _twin(real), _twin(real)
        return all(_is_same(one_by_one, at_once, samples) for samples in PROOF)
    except Exception:  # whatever an SDK that we do not know may raise
        return False


def _twin(real: Any) -> Any:
    """An instrument of the same classes and for the same readers, with storage of its own."""
    consumer = real._measurement_consumer
    config = replace(consumer._sdk_config, views=())
    # The readers left the configuration in 1.43.
    readers = () if hasattr(config, "metric_readers") else (list(consumer._reader_storages),)
    return type(real)(real.name, real.instrumentation_scope, type(consumer)(config, *readers))


def _is_same(one_by_one: Any, at_once: Any, samples: Sequence[float]) -> bool:
    attributes = {"proof": 1}
    for sample in samples:
        one_by_one.record(sample, attributes)
    at_once.record(samples[0], attributes)
    return _merge(at_once, samples[1:], attributes) and _exported(at_once) == _exported(one_by_one)


def _exported(twin: Any) -> list[Any]:
    """What each reader would export, but for the times: with whatever fields an SDK may have added."""
    return [
        replace(point, start_time_unix_nano=0, time_unix_nano=0)
        for storage in twin._measurement_consumer._reader_storages.values()
        for resource in storage.collect().resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        for point in metric.data.data_points
    ]


def _merge(real: Any, samples: Sequence[float], attributes: Mapping[str, str | int]) -> bool:
    """Count the samples into all aggregations, or, if there is one that we do not know, into none."""
    ordered = sorted(samples)
    total = sum(ordered)
    found = _aggregations(real, attributes)
    if found is None or ordered[0] < 0 or not isfinite(total):  # what becomes of such samples is the SDK's decision
        return False
    for aggregation in found:
        _add(aggregation, ordered, total)
    return True


def _aggregations(real: Any, attributes: Mapping[str, str | int]) -> list[Any] | None:
    """What every reader's every view made of this histogram for these attributes; None if we do not know it all."""
    try:
        matches = [
            match
            for storage in real._measurement_consumer._reader_storages.values()
            for match in storage._instrument_view_instrument_matches[real]
        ]
        return [_of(match, attributes) for match in matches if not _named(match._aggregation, "_DropAggregation")]
    except Exception:
        return None


def _of(match: Any, attributes: Mapping[str, str | int]) -> Any:
    keys = match._view._attribute_keys
    wanted = {key: value for key, value in attributes.items() if keys is None or key in keys}
    for aggregation in match._attributes_aggregation.values():
        if aggregation._attributes == wanted and _is_known(aggregation):
            return aggregation
    raise LookupError(match)


def _is_known(aggregation: Any) -> bool:
    # Empty, though we have just recorded: of a meter that is switched off, or collected meanwhile.
    return _named(aggregation, "_ExplicitBucketHistogramAggregation") and aggregation._value is not None


def _add(aggregation: Any, samples: Sequence[float], total: float) -> None:
    """Count sorted *samples* into the buckets of one aggregation."""
    counts = _counted(samples, aggregation._boundaries)
    with aggregation._lock:
        buckets = aggregation._value or [0] * len(counts)
        aggregation._value = [bucket + count for bucket, count in zip(buckets, counts, strict=True)]
        aggregation._sum += total
        if aggregation._record_min_max:
            aggregation._min = min(aggregation._min, samples[0])
            aggregation._max = max(aggregation._max, samples[-1])


def _counted(samples: Sequence[float], boundaries: Iterable[float]) -> list[int]:
    """How many fall into each bucket; an upper bound belongs to its bucket."""
    below = [0, *(bisect_right(samples, bound) for bound in boundaries), len(samples)]
    return [upper - lower for lower, upper in pairwise(below)]
