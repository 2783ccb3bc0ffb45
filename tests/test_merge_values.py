"""Putting values on a shelf has exactly the effect of observing them, however the SDK is set up."""

from __future__ import annotations

import gc
import inspect
import logging
import math
import re
from dataclasses import replace
from types import ModuleType
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.metrics import Observation
from opentelemetry.metrics._internal import _ProxyMeterProvider
from opentelemetry.sdk.metrics import (
    AlwaysOnExemplarFilter,
    MeterProvider,
    ObservableCounter,
    ObservableGauge,
    ObservableUpDownCounter,
)
from opentelemetry.sdk.metrics._internal import aggregation as kinds
from opentelemetry.sdk.metrics.export import AggregationTemporality, InMemoryMetricReader
from opentelemetry.sdk.metrics.view import (
    DropAggregation,
    ExplicitBucketHistogramAggregation,
    LastValueAggregation,
    SumAggregation,
    View,
)
from opentelemetry.sdk.trace import TracerProvider
from sqlalchemy.pool import QueuePool

import otel_pools
from otel_pools import _merge
from otel_pools._doors import INSTRUMENTORS
from otel_pools._vocabulary import ERROR, PATH

KINDS = {"counter": ObservableCounter, "up_down_counter": ObservableUpDownCounter, "gauge": ObservableGauge}
DELTA = dict.fromkeys(KINDS.values(), AggregationTemporality.DELTA)
CUMULATIVE = dict.fromkeys(KINDS.values(), AggregationTemporality.CUMULATIVE)
SETS = ({"a": "x", "b": 1}, {"a": "x", "b": 2}, {"a": "y", "b": 1}, {"b": 1}, {})
sets = st.integers(0, len(SETS) - 1)
# Whole quarters, so that a sum is the same in any order; apart, what is no number, which is ignored since SDK 1.44.
amounts = st.one_of(st.integers(0, 9), st.sampled_from([0.25, 7.5, -3, True]))
odd = st.sampled_from([math.inf, -math.inf, math.nan])
told = st.one_of(st.lists(st.tuples(sets, amounts), max_size=6), st.lists(st.tuples(sets, odd), max_size=1))


class Setup(NamedTuple):
    """How an SDK is set up, and whether we know all that it makes of our instrument."""

    temporalities: tuple = (CUMULATIVE,)
    views: tuple = ()
    known: bool = True


def view(*aggregation, **options):
    return View(instrument_name="o", **dict(zip(("aggregation",), aggregation, strict=False)), **options)


SETUPS = {
    "cumulative": Setup(),
    "delta": Setup((DELTA,)),
    "two readers": Setup((CUMULATIVE, DELTA), known=False),
    "another name": Setup(views=(view(name="p"),)),
    "fewer attributes": Setup(views=(view(attribute_keys={"a"}),)),
    "no attributes": Setup(views=(view(attribute_keys=set()),)),
    "dropped": Setup(views=(view(DropAggregation()),)),
    "sum": Setup(views=(view(SumAggregation()),)),
    "last value": Setup(views=(view(LastValueAggregation()),)),
    "buckets": Setup(views=(view(ExplicitBucketHistogramAggregation([1.0])),)),  # refused by the SDK
    "two views": Setup(views=(view(name="p"), view(name="q", attribute_keys={"a"})), known=False),
    "dropped and kept": Setup(views=(view(DropAggregation()), view(name="p")), known=False),
}


class Way:
    """A provider of its own, and one observable instrument in it that tells what is in `now`."""

    def __init__(self, kind, setup=Setup(), *, room=_merge, provider=None, **options):  # noqa: B008  it is a constant
        self.readers = [InMemoryMetricReader(one) for one in setup.temporalities]
        self.provider = MeterProvider(self.readers, views=setup.views, shutdown_on_exit=False, **options)
        self.now, self.points, self.public = [], [], 0
        self.shelves = None if room is None else room.Shelves()
        create = getattr((provider or self.provider).get_meter("m"), f"create_observable_{kind}")
        self.instrument = create("o", [self.observe], unit="s")

    def observe(self, _):
        """As our instruments do it."""
        if self.shelves is not None:
            self.shelves.begin(self.instrument)
        observations = []
        for number, value in self.now:
            if self.shelves is None or not self.put(self.shelves.of(self), value, (number,), SETS[number]):
                observations.append(Observation(value, SETS[number]))
        self.public += len(observations)
        return observations

    def put(self, shelf, value, key, attributes):
        return shelf.put(value, key) or shelf.put_first(value, key, self.instrument, attributes)

    def collect(self, values, number=0):
        """Tell these values to this reader, and keep what it exports."""
        self.now = values
        data = self.readers[number % len(self.readers)].get_metrics_data()
        for resource in getattr(data, "resource_metrics", ()):
            for scope in resource.scope_metrics:
                for metric in scope.metrics if scope.scope.name == "m" else ():  # SDK 1.41 tells of itself, too
                    self.points += [(number, metric.name, metric.unit, point) for point in metric.data.data_points]

    def exported(self):
        """All points; of the times, which are the same and which are earlier."""
        moments = sorted({moment for *_, point in self.points for moment in when(point)})
        return [
            (*series, [moments.index(moment) for moment in when(point)], repr(comparable(point)))  # nan is not nan
            for *series, point in self.points
        ]


def when(point):
    return (point.start_time_unix_nano or 0, point.time_unix_nano)


def comparable(point):
    exemplars = [(e.value, e.filtered_attributes) for e in point.exemplars]
    return replace(point, start_time_unix_nano=0, time_unix_nano=0, exemplars=exemplars)


def observed(kind, steps, setup=Setup(), **options):  # noqa: B008  it is a constant
    way = Way(kind, setup, room=None, **options)
    for step in steps:
        way.collect(*step)
    return way.exported()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SETUPS)
@settings(max_examples=25, deadline=None)
@given(steps=st.lists(st.tuples(told, st.integers(0, 1)), max_size=8))
def test_equals_observing_each(name, kind, steps):
    """Whatever the readers and the views: the same points, values, attributes and times, and the same are missing."""
    way = Way(kind, SETUPS[name])
    for step in steps:
        way.collect(*step)

    assert way.exported() == observed(kind, steps, SETUPS[name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SETUPS)
def test_puts_what_is_known(name, kind):
    """From the second collection on nothing goes through the public API, or all if there is something unknown."""
    way = Way(kind, SETUPS[name])
    public = []
    for _ in range(4):
        way.collect([(0, 1), (1, 2), (2, 3)])
        public.append(way.public)

    assert public == ([3, 3, 3, 3] if SETUPS[name].known else [3, 6, 9, 12])


@pytest.mark.parametrize("kind", KINDS)
def test_who_wants_exemplars_is_offered_each(kind):
    """An SDK that takes exemplars of everything gets everything by the public API."""
    steps = [([(0, 1), (1, 2)],)] * 4
    way = Way(kind, exemplar_filter=AlwaysOnExemplarFilter())
    for step in steps:
        way.collect(*step)

    assert way.public == 8
    assert way.exported() == observed(kind, steps, exemplar_filter=AlwaysOnExemplarFilter())


def test_a_span_around_a_flush_makes_no_exemplar():
    """Who flushes inside a sampled span sees the same values, and later ones are put where they belong again."""
    way, span = Way("counter"), TracerProvider(shutdown_on_exit=False).get_tracer("t").start_as_current_span
    for number in range(6):
        if number == 3:
            with span("flush"):
                way.collect([(0, number)])
        else:
            way.collect([(0, number)])

    assert [point.value for *_, point in way.points] == list(range(6))
    assert way.public == 1 + 1


def test_the_sdk_may_come_late():
    """An instrument made before there was an SDK is known by what it became."""
    proxy = _ProxyMeterProvider()
    way = Way("up_down_counter", provider=proxy)
    proxy.on_set_meter_provider(way.provider)
    for number in range(4):
        way.collect([(0, number)])

    assert [point.value for *_, point in way.points] == [0, 1, 2, 3]
    assert way.public == 1


@pytest.mark.skipif(not hasattr(MeterProvider, "add_metric_reader"), reason="readers come and go since SDK 1.43")
def test_a_reader_may_come_and_go():
    """While there are two, both get each value; who is left afterwards does so too."""
    way = Way("counter")
    for _ in range(3):
        way.collect([(0, 1)])
    way.readers.append(InMemoryMetricReader(DELTA))
    way.provider.add_metric_reader(way.readers[1])
    for number in (0, 1, 0, 1):
        way.collect([(0, 2)], number)
    way.provider.remove_metric_reader(way.readers.pop(0))
    for _ in range(4):
        way.collect([(0, 5)], 1)

    assert [point.value for *_, point in way.points] == [1, 1, 1, 2, 2, 2, 0, 3, 0, 0, 0]


class Another:
    """Of an SDK that has our names for something else."""

    def __init__(self, storages):
        self._measurement_consumer = self
        self._reader_storages = storages


def test_nothing_without_an_sdk():
    """An instrument of the API alone, or of another SDK, has no shelf, and nothing breaks."""
    shelves = _merge.Shelves()
    no_op = _ProxyMeterProvider().get_meter("m").create_observable_gauge("o")
    for foreign in (object(), None, no_op, Another(None), Another({}), Another({1: 2}), Another([3])):
        shelves.begin(foreign)
        assert not shelves.of(shelves).put_first(1, ("a",), foreign, {})
        assert not shelves.of(shelves).put(1, ("a",))


SOURCE = inspect.getsource(_merge)
PRIVATE = ["_hash_attributes", "_attributes_aggregation", "_attributes", "_attribute_keys", "_view"]
PRIVATE += ["_instrument_view_instrument_matches", "_measurement_consumer", "_reader_storages", "_sdk_config"]


@pytest.mark.parametrize("private", PRIVATE)
def test_an_sdk_that_calls_it_otherwise_is_left_alone(private):
    """Whichever private name an SDK may change, every value goes through the public API."""
    if private == "_hash_attributes" and "_hash_attributes" not in vars(inspect.getmodule(match_of(Way("gauge")))):
        pytest.skip("SDK 1.45 and newer")
    room = ModuleType("room")
    exec(re.sub(rf"\.{private}\b", ".another_name", SOURCE), room.__dict__)
    steps = [([(0, 1), (1, 2)],)] * 4
    way = Way("counter", room=room)
    for step in steps:
        way.collect(*step)

    assert way.public == 8
    assert way.exported() == observed("counter", steps)


def match_of(way):
    way.collect([(0, 1)])
    (storage,) = way.provider._measurement_consumer._reader_storages.values()
    (match,) = storage._instrument_view_instrument_matches[way.instrument]
    return type(match)


CHANGES = {
    "counter": ("_SumAggregation", "aggregate", lambda self, amount: setattr(self, "seen", amount.time_unix_nano)),
    "gauge": ("_LastValueAggregation", "aggregate", lambda self, amount: self._attributes.update(amount.attributes)),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_an_sdk_that_asks_for_more_is_left_alone(kind, monkeypatch):
    """If an aggregation wants to know more of a measurement than its value, the proof fails."""
    name, method, more = CHANGES[kind]
    cls = getattr(kinds, name)
    original = getattr(cls, method)

    def changed(self, measurement, *arguments):
        more(self, measurement)
        original(self, measurement, *arguments)

    monkeypatch.setattr(cls, method, changed)
    way = Way(kind)
    for _ in range(4):
        way.collect([(0, 1)])

    assert way.public == 4
    assert [point.value for *_, point in way.points] == [1, 1, 1, 1]


def test_an_sdk_that_counts_otherwise_is_left_alone(monkeypatch):
    """If whoever consumes a measurement does more than hand it on, the proof fails."""
    match = match_of(Way("counter"))
    consume = match.consume_measurement

    def twice(self, measurement, *arguments):
        consume(self, measurement, *arguments)
        consume(self, measurement, *arguments)

    monkeypatch.setattr(match, "consume_measurement", twice)
    way = Way("counter")
    for _ in range(4):
        way.collect([(0, 1)])

    assert way.public == 4
    assert [point.value for *_, point in way.points] == [2, 2, 2, 2]


class Stub:
    """A DBAPI connection that does nothing."""

    def rollback(self):
        pass

    def close(self):
        pass


def test_a_shelf_goes_with_its_pool():
    """Nothing is kept for whose values nobody tells any more."""
    way, shelves = Way("gauge"), _merge.Shelves()
    shelves.begin(way.instrument)
    kept, gone = Way("gauge"), Way("gauge")
    shelves.of(kept), shelves.of(gone)
    before = repr(shelves)
    del gone
    gc.collect()

    assert (before, repr(shelves)) == ("<Shelves [2 pools]>", "<Shelves [1 pools]>")
    assert repr(shelves.of(kept)) == "<Shelf [0 series]>"


def test_nobody_sees_the_proof(caplog):
    """Neither the exports nor the logs know of it, and it is made once for each kind."""
    caplog.set_level(logging.DEBUG)
    way, proven = Way("counter"), []
    with pytest.MonkeyPatch.context() as patch:
        prove = _merge._prove_shelf
        patch.setattr(_merge, "_prove_shelf", lambda real: proven.append(real) or prove(real))
        for _ in range(4):
            way.collect([(0, 1), (1, 1)])

    assert {name for _, name, *_ in way.points} == {"o"}
    assert caplog.records == []
    assert len(proven) == 1


def test_series_are_not_mistaken_for_each_other(telemetry):
    """An error that is called as a path is: two series, at each collection."""
    otel_pools.instrument(meter_provider=telemetry.meter_provider)
    pool = QueuePool(Stub, pool_size=2, max_overflow=0, logging_name="p")
    pool.connect().close()
    (ledger,) = INSTRUMENTORS["sqlalchemy"]._registry.ledgers.values()
    ledger.outbox.counted("idle", 5)
    seen = []
    for _ in range(3):
        pool.connect().close()
        points = telemetry.points("otel_pools.checkouts")
        told = [
            ({*point.attributes} & {PATH, ERROR}, point.value)
            for point in points
            if "idle" in point.attributes.values()
        ]
        seen.append(sorted(told, key=repr))

    assert seen == [[({ERROR}, 5), ({PATH}, count)] for count in (1, 2, 3)]


def test_a_reader_may_be_quicker_than_we_are(monkeypatch, caplog):
    """A collection between the making of two instruments breaks nothing, and later ones tell everything."""
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], shutdown_on_exit=False)
    meter_type, collected = type(provider.get_meter("m")), []
    for create in ("create_observable_up_down_counter", "create_observable_gauge"):
        original = getattr(meter_type, create)

        def at_once(*arguments, original=original, **options):
            made = original(*arguments, **options)
            collected.append(reader.get_metrics_data())
            return made

        monkeypatch.setattr(meter_type, create, at_once)
    otel_pools.instrument(meter_provider=provider)
    pool = QueuePool(Stub, logging_name="p")
    pool.connect().close()
    (metrics,) = [
        [metric.name for metric in scope.metrics]
        for resource in reader.get_metrics_data().resource_metrics
        for scope in resource.scope_metrics
        if scope.scope.name == "otel_pools"
    ]

    assert len(collected) > 10
    assert caplog.records == []
    assert "db.client.connection.count" in metrics


def test_an_amount_says_its_value():
    """Also before it has one."""
    amount = _merge.Amount()
    before = repr(amount)
    amount.value = 0.5

    assert (before, repr(amount)) == ("<Amount None>", "<Amount 0.5>")


def test_our_instruments_use_it(telemetry, monkeypatch):
    """From the second collection of a pool on only what is new is observed, and its numbers are right."""
    made, observation = [], Observation
    monkeypatch.setattr("otel_pools._instruments.Observation", lambda *one: made.append(one) or observation(*one))
    otel_pools.instrument(meter_provider=telemetry.meter_provider)
    pool = QueuePool(Stub, pool_size=2, max_overflow=0, logging_name="p")
    seen = []
    for _ in range(4):
        held = pool.connect()
        made.clear()
        now = telemetry.read()
        checkouts = sum(point.value for point in now.points("otel_pools.checkouts"))
        seen.append((len(made), checkouts, now.count("used")))
        held.close()

    assert seen[0][0] > 10
    assert seen[1:] == [(0, 2, 1), (0, 3, 1), (0, 4, 1)]
