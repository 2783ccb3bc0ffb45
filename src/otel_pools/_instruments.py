"""The vocabulary's rows as live OpenTelemetry instruments over the registry."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from opentelemetry.context import Context, attach, detach
from opentelemetry.metrics import CallbackOptions, Meter, MeterProvider, Observation, get_meter
from opentelemetry.trace import INVALID_SPAN, set_span_in_context

from . import _guard
from . import _vocabulary as words
from ._merge import Histogram, Shelf, Shelves
from ._model import Identity, Reading
from ._outbox import Histograms
from ._registry import Registry
from ._version import __version__
from ._vocabulary import CREATE, DURATION, METRICS, TIME_IN_QUEUE, USE, WAIT, Kind, Metric
from ._watch import Ledger

# What is current while metrics are collected, a span of whoever flushes for one, has no part in what they say; and
# not an empty context, which the SDK takes for none.
NOBODY = set_span_in_context(INVALID_SPAN, Context())

Callback = Callable[[CallbackOptions], Iterable[Observation]]
# By the attribute that holds the name of a pool: what every series of it carries.
Whose = Mapping[str, Mapping[str, str | int]]
# Of the pools of one name: whose it is, where its values go, what it says, and what of that is not to be told.
Told = tuple[Whose, Shelf, Reading, Collection[str]]


class Instruments:
    """
    The instruments at one meter provider, of all targets; made once and kept for ever.

    Not of each target its own: OpenTelemetry's Prometheus exporter gives all
    metrics of one name the labels of the first, whatever their scope.

    The SDK silently drops the second callback of an instrument and can never
    remove the first, so re-instrumenting must find this object again. What
    changes is the registries it reads: none while we are switched off.

    One collection runs the callbacks in the order of creation. The first one
    takes all readings and delivers all samples; the others only pick from
    them, so the numbers of one export belong to the same moment, and so many
    pools are read once and not once per metric.
    """

    def __init__(self, meter: Meter) -> None:
        self.registries: dict[str, Registry] = {}  # by target
        self._readings: list[Told] = []
        self._shelves = Shelves()
        self._observed: dict[str, Any] = {}  # by name, the instruments that have a callback
        self._histograms = {row.name: _histogram(meter, row) for row in METRICS if row.points is None}
        collect: Callable[[], None] = self._collect
        for row in METRICS:
            if row.points is not None:
                callbacks = [self._observe(row, collect)]
                self._observed[row.name] = _create(meter, row)(
                    row.name, callbacks, unit=row.unit, description=row.description
                )
                collect = _nothing

    def __repr__(self) -> str:
        return f"<Instruments [{', '.join(self.registries) or 'nothing watched'}]>"

    def _collect(self) -> None:
        """Deliver first, so that the counters and the histograms of one export agree."""
        _guard.speak()
        self._readings = []
        self._shelves.begin(next(iter(self._observed.values()), None))  # none yet, if a reader is very quick
        for registry in list(self.registries.values()):
            for ledger in list(registry.ledgers.values()):
                with _guard.guard("delivery"):
                    self._deliver(ledger, _withheld(registry, ledger))
            with _guard.guard("readings"):
                # Asked again: taking the readings may meet a pool, whose name had nothing to deliver.
                self._readings += [
                    (_whose(ledger.identity), self._shelves.of(ledger), reading, _withheld(registry, ledger))
                    for ledger, reading in registry.readings()
                ]

    def _deliver(self, ledger: Ledger, withheld: Collection[str]) -> None:
        # Not left to a view that drops it: the call would cost the same.
        wanted = {name: histogram for name, histogram in self._histograms.items() if name not in withheld}
        wait = WAIT if ledger.identity.system is not None else TIME_IN_QUEUE
        histograms = Histograms(*(wanted.get(row.name) for row in (wait, USE, CREATE, DURATION)))
        whose = words.attributes(ledger.identity, words.pool_key(ledger.identity))
        token = attach(NOBODY)
        try:
            ledger.outbox.deliver(histograms, whose)
        finally:
            detach(token)

    def _observe(self, row: Metric, collect: Callable[[], None]) -> Callback:
        name, pool_key, points = row.name, row.pool_key, row.points
        assert points is not None

        def observe(_: CallbackOptions) -> Iterable[Observation]:
            observations: list[Observation] = []
            with _guard.guard(name):
                collect()
                for whose, shelf, reading, withheld in self._readings:
                    if name not in withheld:
                        for value, extra in points(reading):
                            if value is None or shelf.put(value, key := (name, *extra.items())):
                                continue
                            attributes = {**whose[pool_key], **extra}
                            if not shelf.put_first(value, key, self._observed[name], attributes):
                                observations.append(Observation(value, attributes, NOBODY))
            return observations

        return observe


def _withheld(registry: Registry, ledger: Ledger) -> Collection[str]:
    """What is not told of pools of this name: excluded by the user, of another column, or somebody else's to tell."""
    withheld = {*registry.settings.metrics_exclude, *words.foreign(ledger.identity)}
    with _guard.guard("what others tell"):
        withheld.update(registry.target.withheld(registry, ledger))
    return withheld


def _whose(identity: Identity) -> Whose:
    """Once for all metrics of a collection: made for each point this would be a third of what a point takes us."""
    return {key: words.attributes(identity, key) for key in words.POOL_KEYS}


def _create(meter: Meter, row: Metric) -> Callable[..., Any]:
    # Counts are never gauges: of two equal series a gauge keeps the last, a sum adds them.
    return {
        Kind.COUNTER: meter.create_observable_counter,
        Kind.UP_DOWN: meter.create_observable_up_down_counter,
        Kind.GAUGE: meter.create_observable_gauge,
    }[row.kind]


def _histogram(meter: Meter, row: Metric) -> Histogram:
    return meter.create_histogram(
        row.name, unit=row.unit, description=row.description, explicit_bucket_boundaries_advisory=words.BUCKETS
    )


def _nothing() -> None:
    pass


_made: weakref.WeakKeyDictionary[MeterProvider, Instruments] = weakref.WeakKeyDictionary()
_global: list[Instruments] = []


def instruments(provider: MeterProvider | None) -> Instruments:
    """The instruments at this provider (None: the global one, even before it is set)."""
    known = _made.get(provider) if provider is not None else _global[0] if _global else None
    if known is None:
        known = Instruments(get_meter("otel_pools", __version__, provider, words.SCHEMA_URL))
        if provider is None:
            _global.append(known)
        else:
            _made[provider] = known
    return known
