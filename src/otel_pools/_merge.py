"""Samples and values straight into the SDK's private aggregations: the only room that touches those."""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import isfinite
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from opentelemetry.metrics import CallbackOptions, Observation

# Below this, finding the aggregations costs more than recording.
FEW = 4
# For the SDK's own bounds: on, between and beyond them. Whole quarters, so that a sum is the same in any order.
PROOF = ((7.0, 0.0, 5.0, 0.25, 20000.0, 5.0), (10.0, 25.0, 6.5, 3.0))
# Of series, one collection after the other: the same and another value, none, two of one series, one that is new.
VALUES: Sequence[Mapping[str, Sequence[float]]] = (
    {"a": [3]},
    {"a": [3], "b": [1.5]},
    {"a": [5], "b": [2]},
    {"b": [4]},
    {"a": [6], "b": [7, 7], "c": [0]},
)

_proven: WeakKeyDictionary[Any, dict[type, bool]] = WeakKeyDictionary()


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
    real = _real(histogram)
    if len(samples) >= FEW and _may_merge(real, _prove):
        histogram.record(samples[0], attributes)
        rest = samples[1:]
        if _merge(real, rest, attributes):
            return
    for seconds in rest:
        histogram.record(seconds, attributes)


def _real(instrument: Any) -> Any:
    """The SDK's own: before one was set up, the API gave a stand-in."""
    return getattr(instrument, "_real_instrument", instrument)


def _may_merge(real: Any, prove: Callable[[Any], bool]) -> bool:
    """Whether this is the SDK as we know it, and nobody wants to be offered each sample."""
    try:
        consumer = real._measurement_consumer
        if _wants_each(consumer._sdk_config.exemplar_filter):
            return False
        proven, kind = _proven.setdefault(consumer, {}), type(real)
        if kind not in proven:
            proven[kind] = False  # for good, if an SDK that we do not know raises
            proven[kind] = prove(real)
        return proven[kind]
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
    one_by_one, at_once = _twin(real), _twin(real)
    return all(_is_same(one_by_one, at_once, samples) for samples in PROOF)


def _twin(real: Any, *callbacks: Any) -> Any:
    """An instrument of the same classes and for the same readers, with storage of its own."""
    consumer = real._measurement_consumer
    config = replace(consumer._sdk_config, views=())
    # The readers left the configuration in 1.43.
    readers = () if hasattr(config, "metric_readers") else (list(consumer._reader_storages),)
    return type(real)(real.name, real.instrumentation_scope, type(consumer)(config, *readers), *callbacks)


def _is_same(one_by_one: Any, at_once: Any, samples: Sequence[float]) -> bool:
    attributes = {"proof": 1}
    for sample in samples:
        one_by_one.record(sample, attributes)
    at_once.record(samples[0], attributes)
    return _merge(at_once, samples[1:], attributes) and _exported(at_once) == _exported(one_by_one)


def _exported(twin: Any) -> list[Any]:
    """What each reader would export."""
    storages = twin._measurement_consumer._reader_storages.values()
    return [_points(storage.collect()) for storage in storages]


def _points(data: Any) -> list[Any]:
    """All points but for their times: with whatever fields an SDK may have added."""
    return [
        replace(point, start_time_unix_nano=0, time_unix_nano=0)
        for resource in getattr(data, "resource_metrics", ())
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
    aggregation = _aggregation(match, attributes)
    # Empty, though we have just recorded: of a meter that is switched off, or collected meanwhile.
    if _named(aggregation, "_ExplicitBucketHistogramAggregation") and aggregation._value is not None:
        return aggregation
    raise LookupError(match)


def _aggregation(match: Any, attributes: Mapping[str, str | int]) -> Any:
    """What there is for these attributes, of those that the view leaves."""
    keys = match._view._attribute_keys
    wanted = {key: value for key, value in attributes.items() if keys is None or key in keys}
    aggregation = match._attributes_aggregation[_key(match)(wanted)]
    if aggregation._attributes == wanted:
        return aggregation
    raise LookupError(match)


def _key(match: Any) -> Callable[[Mapping[str, str | int]], Any]:
    """How the SDK finds what belongs to attributes: by a function since 1.45."""
    try:
        known: Callable[[Mapping[str, str | int]], Any] = sys.modules[type(match).__module__]._hash_attributes
    except AttributeError:
        return lambda attributes: frozenset(attributes.items())
    return known


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


# -- values of series ------------------------------------------------------------------

Key = tuple[Any, ...]  # by which a pool knows one of its series


class Amount:
    """As much of the SDK's measurement as an aggregation asks for that wants no exemplar."""

    __slots__ = ("value",)
    value: float

    def __repr__(self) -> str:
        return f"<Amount {getattr(self, 'value', None)}>"


class Shelf:
    """
    Where the SDK keeps the values of one pool's series, to be put there without a measurement of each.

    By the public API a measurement is made, cleaned, hashed and looked up at
    each collection, for the same series as the last time: half of what a
    collection takes with SDK 1.45.
    """

    __slots__ = ("_amount", "_known", "_storage")

    def __init__(self, storage: Any, amount: Amount) -> None:
        self._storage = storage  # of the one reader there is; None if there is none that we know
        self._amount = amount  # one for all series, as each is put and forgotten
        self._known: dict[Key, Any] = {}

    def __repr__(self) -> str:
        return f"<Shelf [{len(self._known)} series]>"

    def put(self, value: float, key: Key) -> bool:
        """Have the same effect as an observation of *value*, if it is known where that goes."""
        aggregation = self._known.get(key)
        if aggregation is None or not isfinite(value):  # what becomes of such a value is the SDK's decision
            return False
        self._amount.value = value
        aggregation.aggregate(self._amount, False)
        return True

    def put_first(self, value: float, key: Key, instrument: Any, attributes: Mapping[str, str | int]) -> bool:
        """The same for a series that is put for the first time: there is a place for it if it was ever observed."""
        real = _real(instrument)
        if self._storage is None or not _may_merge(real, _prove_shelf):
            return False
        return self.learn(key, real, attributes) and self.put(value, key)

    def learn(self, key: Key, real: Any, attributes: Mapping[str, str | int]) -> bool:
        """Whether it is known now where the values of this series go; of an SDK that has been proven, or is to be."""
        try:
            # Of several views each has its own.
            (match,) = self._storage._instrument_view_instrument_matches[real]
            aggregation = _aggregation(match, attributes)
        except Exception:
            return False
        if any(_named(aggregation, kind) for kind in NUMBERS):
            self._known[key] = aggregation
        return key in self._known


NUMBERS = ("_SumAggregation", "_LastValueAggregation", "_DropAggregation")


class Shelves:
    """The shelf of each pool at one provider; empty ones if it has several readers, as a callback is not told whose."""

    def __init__(self) -> None:
        self._storage: Any = None
        self._amount = Amount()
        self._shelves: WeakKeyDictionary[Any, Shelf] = WeakKeyDictionary()

    def __repr__(self) -> str:
        return f"<Shelves [{len(self._shelves)} pools]>"

    def begin(self, instrument: Any) -> None:
        """A collection begins, by the same reader as the last or by another."""
        storage = _only_storage(instrument)
        if storage is not self._storage:
            self._storage, self._shelves = storage, WeakKeyDictionary()

    def of(self, whose: Any) -> Shelf:
        """That of this pool's series, for as long as it lives."""
        shelf = self._shelves.get(whose)
        if shelf is None:
            shelf = self._shelves[whose] = Shelf(self._storage, self._amount)
        return shelf


def _only_storage(instrument: Any) -> Any:
    try:
        consumer = _real(instrument)._measurement_consumer
        (storage,) = consumer._reader_storages.values()
        return None if _wants_each(consumer._sdk_config.exemplar_filter) else storage
    except Exception:  # of an SDK that we do not know
        return None


def _prove_shelf(real: Any) -> bool:
    """Whether what is put on a shelf is exported as what is observed."""
    return _told(real, shelved=True) == _told(real, shelved=False)


def _told(real: Any, *, shelved: bool) -> list[list[Any]]:
    """What a twin exports of some values, one collection after the other."""
    remaining = iter(VALUES)

    def observe(_: CallbackOptions) -> Iterable[Observation]:
        for series, values in next(remaining).items():
            key, attributes = (series,), {"proof": series}
            for value in values:
                if not (shelved and shelf.learn(key, twin, attributes) and shelf.put(value, key)):
                    yield Observation(value, attributes)

    twin = _twin(real, [observe])
    consumer = twin._measurement_consumer
    ((reader, storage),) = consumer._reader_storages.items()
    shelf = Shelf(storage, Amount())
    consumer.register_asynchronous_instrument(twin)
    return [_points(consumer.collect(reader)) for _ in VALUES]
