"""What every watched pool must do, as tests to inherit, and what a collector would have received."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import inspect
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import AggregationTemporality, InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from . import _guard
from . import _vocabulary as words
from ._doors import INSTRUMENTORS, instrument, uninstrument
from ._hooks import Either, Hook, Row, resolve
from .targets import LIBRARIES


class Telemetry:
    """
    A meter and a tracer provider of its own, and what arrived there.

    Each question is a collection, as a periodic reader would make it.
    """

    def __init__(self, temporality: dict[type, AggregationTemporality] | None = None) -> None:
        self.reader = InMemoryMetricReader(preferred_temporality=temporality)
        self.meter_provider = MeterProvider([self.reader])
        self._spans = InMemorySpanExporter()
        self.tracer_provider = TracerProvider()
        self.tracer_provider.add_span_processor(SimpleSpanProcessor(self._spans))

    def __repr__(self) -> str:
        return f"<Telemetry [{len(self.metrics())} metrics, {len(self.spans)} spans]>"

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        """The spans that have ended."""
        return self._spans.get_finished_spans()

    def metrics(self) -> list[Any]:
        """Collect; the metrics of our scopes, as the SDK's data classes."""
        data = self.reader.get_metrics_data()
        return [
            metric
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            if scope.scope.name.startswith("otel_pools")
            for metric in scope.metrics
        ]

    def points(self, name: str, **where: str) -> list[Any]:
        """Collect; the points of one metric whose attributes contain *where* (dots written as ``__``)."""
        return self.read().points(name, **where)

    def value(self, name: str, **where: str) -> float:
        """Collect; the sum of those points, or of their counts if it is a histogram."""
        return self.read().value(name, **where)

    def read(self) -> Export:
        """Collect once, to ask more than one question about the same moment."""
        return Export(self.metrics())


class Export:
    """What one collection brought."""

    def __init__(self, metrics: list[Any]) -> None:
        self.metrics: dict[str, list[Any]] = {}  # by name
        for metric in metrics:
            self.metrics.setdefault(metric.name, []).append(metric)

    def __repr__(self) -> str:
        return f"<Export [{len(self.metrics)} metrics]>"

    def points(self, name: str, **where: str) -> list[Any]:
        """The points of one metric whose attributes contain *where* (dots written as ``__``)."""
        wanted = {key.replace("__", "."): value for key, value in where.items()}
        points = [point for metric in self.metrics.get(name, ()) for point in metric.data.data_points]
        return [point for point in points if wanted.items() <= point.attributes.items()]

    def value(self, name: str, **where: str) -> float:
        """The sum of those points, or of their counts if it is a histogram."""
        points = self.points(name, **where)
        return float(sum(point.count if hasattr(point, "count") else point.value for point in points))

    def count(self, state: str) -> float:
        """``db.client.connection.count`` in this state."""
        points = self.points("db.client.connection.count")
        return float(sum(point.value for point in points if point.attributes[words.STATE] == state))

    def closed(self) -> dict[str, int]:
        """``otel_pools.connection.closed`` by reason."""
        return self._sums("otel_pools.connection.closed", lambda attributes: attributes[words.REASON])

    def checkouts(self) -> dict[tuple[str, str | None], int]:
        """``otel_pools.checkouts`` by path and error type, without zeros."""
        told = self._sums(
            "otel_pools.checkouts", lambda attributes: (attributes.get(words.PATH), attributes.get(words.ERROR))
        )
        return {kind: number for kind, number in told.items() if number}

    def _sums(self, name: str, kind: Callable[[Mapping[str, Any]], Any]) -> dict[Any, int]:
        sums: Counter[Any] = Counter()
        for point in self.points(name):
            sums[kind(point.attributes)] += point.value
        return dict(sums)


class PoolContract:
    """
    What every watched pool must do, whatever library it comes from.

    A target's test class inherits this and says how to `open` a pool of at
    most two connections, `borrow` one, `give_back` it and `shut` the pool;
    any of the four may be a coroutine function. What a library cannot tell is
    declared in the class, visibly. Each test runs with and without holders being
    noted, as the ways of a checkout are not the same.

    Attributes:
        target: The target's name.
        exhausted: The error the library raises when both connections are out.
        refused: The ``error.type`` we give it: ``timeout`` or ``exhausted``.
        tells_limit: Whether the library has a limit to tell.
        tells_creation: Whether it has a seam where connections are made.
    """

    target: ClassVar[str]
    exhausted: ClassVar[type[BaseException]]
    refused: ClassVar[str] = words.TIMEOUT
    tells_limit: ClassVar[bool] = True
    tells_creation: ClassVar[bool] = True

    def open(self) -> Any:
        """Make a pool of at most two connections, with a short timeout."""
        raise NotImplementedError

    def borrow(self, pool: Any) -> Any:
        """Take a connection out."""
        raise NotImplementedError

    def give_back(self, pool: Any, held: Any) -> Any:
        """Return it."""
        raise NotImplementedError

    def shut(self, pool: Any) -> Any:
        """Close the pool and its connections."""
        raise NotImplementedError

    # -- the stage -------------------------------------------------------------

    @pytest.fixture
    def telemetry(self) -> Telemetry:
        """Where everything goes."""
        return Telemetry()

    @pytest.fixture
    def do(self) -> Iterator[Callable[..., Any]]:
        """Call one of the four, and wait if it is a coroutine: all in one event loop."""
        loop = asyncio.new_event_loop()

        async def wait(awaitable: Any) -> Any:
            return await awaitable

        def call(verb: Callable[..., Any], *args: Any) -> Any:
            result = verb(*args)
            return loop.run_until_complete(wait(result)) if inspect.isawaitable(result) else result

        yield call
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()

    @pytest.fixture(autouse=True, params=[True, False], ids=["holders", "no holders"])
    def _watched(
        self, request: pytest.FixtureRequest, telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[None]:
        monkeypatch.setattr(_guard, "loud", True)
        monkeypatch.setenv("OTEL_POOLS_HOLDERS", str(request.param))
        gc.collect()  # pools of an earlier test would be found, and rightly counted
        self.instrument(telemetry)
        yield
        uninstrument(self.target)

    @pytest.fixture
    def pool(self, do: Callable[..., Any]) -> Iterator[Any]:
        """An open pool, shut afterwards."""
        pool = do(self.open)
        yield pool
        with contextlib.suppress(Exception):
            do(self.shut, pool)

    def instrument(self, telemetry: Telemetry, **options: Any) -> None:
        """Watch this target, into *telemetry*."""
        instrument(
            self.target,
            meter_provider=telemetry.meter_provider,
            tracer_provider=telemetry.tracer_provider,
            **options,
        )

    # -- the contract ----------------------------------------------------------

    def test_a_checkout_is_one_wait(self, do: Any, pool: Any, telemetry: Telemetry) -> None:
        """One borrow is one wait_time sample and one counted checkout."""
        held = do(self.borrow, pool)

        now = telemetry.read()

        assert now.value("db.client.connection.wait_time") == 1
        assert now.value("otel_pools.checkouts") == 1
        do(self.give_back, pool, held)

    def test_a_return_is_one_use(self, do: Any, pool: Any, telemetry: Telemetry) -> None:
        """One borrow and return is one use_time sample, and nothing is recorded twice."""
        do(self.give_back, pool, do(self.borrow, pool))

        assert telemetry.value("db.client.connection.use_time") == 1
        assert telemetry.value("db.client.connection.use_time") == 1

    def test_the_count_follows_the_pool(self, do: Any, pool: Any, telemetry: Telemetry) -> None:
        """A held connection is used, a returned one is idle."""
        held = do(self.borrow, pool)
        out = telemetry.read()
        do(self.give_back, pool, held)
        back = telemetry.read()

        assert (out.count("used"), out.count("idle")) == (1, 0)
        assert (back.count("used"), back.count("idle")) == (0, 1)

    def test_the_limit_is_told(self, do: Any, pool: Any, telemetry: Telemetry) -> None:
        """The pool's limit is reported where it has one."""
        do(self.give_back, pool, do(self.borrow, pool))

        assert telemetry.value("db.client.connection.max") == (2 if self.tells_limit else 0)

    def test_only_the_first_checkout_creates(self, do: Any, pool: Any, telemetry: Telemetry) -> None:
        """The first borrow opens a connection and the second finds it; the path says which it was."""
        if not self.tells_creation:
            pytest.skip("declared: this library has no seam where connections are made")
        for _ in range(2):
            do(self.give_back, pool, do(self.borrow, pool))

        now = telemetry.read()

        assert now.value("db.client.connection.create_time") == 1
        assert now.value("otel_pools.connection.created") == 1
        assert now.checkouts() == {(words.NEW, None): 1, (words.IDLE, None): 1}

    def test_exhaustion_is_counted_and_raised(self, do: Any, pool: Any, telemetry: Telemetry) -> None:
        """Asking an empty pool raises the library's own error, counts it, and writes a failed span."""
        held = [do(self.borrow, pool), do(self.borrow, pool)]
        with pytest.raises(self.exhausted):
            do(self.borrow, pool)

        now = telemetry.read()

        assert now.value("db.client.connection.timeouts") == (self.refused == words.TIMEOUT)
        assert now.value("otel_pools.checkouts", error__type=self.refused) == 1
        assert now.value("db.client.connection.wait_time", error__type=self.refused) == 1
        assert [span.attributes[words.ERROR] for span in telemetry.spans if not span.status.is_ok] == [self.refused]  # type: ignore[index]
        for one in held:
            do(self.give_back, pool, one)

    def test_a_burst_leaves_its_peak(self, do: Any, pool: Any, telemetry: Telemetry) -> None:
        """The peak is the most that was held since the previous collection, even if all is back."""
        held = [do(self.borrow, pool), do(self.borrow, pool)]
        for one in held:
            do(self.give_back, pool, one)

        assert telemetry.value("otel_pools.connection.peak") == 2
        assert telemetry.value("otel_pools.connection.peak") == 0

    def test_the_oldest_use_moves_while_it_lasts(self, do: Any, pool: Any, telemetry: Telemetry) -> None:
        """The age of the oldest checkout grows while it is held, and is gone when it is back."""
        held = do(self.borrow, pool)
        first = telemetry.value("otel_pools.use.oldest")
        time.sleep(0.02)
        second = telemetry.value("otel_pools.use.oldest")
        do(self.give_back, pool, held)

        assert 0 < first < first + 0.02 <= second
        assert telemetry.value("otel_pools.use.oldest") == 0

    def test_a_pool_from_before_counts(self, do: Any, telemetry: Telemetry) -> None:
        """A pool that was made, and a connection that was out, before we came, count."""
        uninstrument(self.target)
        pool = do(self.open)
        held = do(self.borrow, pool)
        self.instrument(telemetry)

        out = telemetry.read()
        do(self.give_back, pool, held)
        back = telemetry.read()

        assert (out.count("used"), out.count("idle")) == (1, 0)
        assert (back.count("used"), back.count("idle")) == (0, 1)
        do(self.shut, pool)

    def test_a_shut_pool_is_silent(self, do: Any, telemetry: Telemetry) -> None:
        """A pool that is shut and gone reports no state; what has happened stays counted."""
        pool = do(self.open)
        do(self.give_back, pool, do(self.borrow, pool))
        do(self.shut, pool)
        del pool
        gc.collect()

        now = telemetry.read()

        assert now.points("db.client.connection.count") == []
        assert now.points("db.client.connection.max") == []
        assert now.value("otel_pools.checkouts") == 1

    def test_a_broken_reader_costs_only_its_numbers(
        self,
        do: Any,
        pool: Any,
        telemetry: Telemetry,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """If a pool cannot be read, one line says so, the other metrics come, and borrowing works."""
        monkeypatch.setattr(_guard, "loud", False)
        do(self.give_back, pool, do(self.borrow, pool))
        registry = INSTRUMENTORS[self.target]._registry
        assert registry is not None
        for watch in registry.pools():
            monkeypatch.setattr(watch, "_read", lambda *_: 1 / 0)

        now = telemetry.read()
        telemetry.read()

        assert now.points("db.client.connection.count") == []
        assert now.value("otel_pools.checkouts") == 1
        assert caplog.text.count("lost a measurement") == 1
        do(self.give_back, pool, do(self.borrow, pool))

    def test_uninstrument_leaves_the_very_functions(self) -> None:
        """Every hooked attribute is, before and after, the same object."""
        before = _hooked(self.target)
        uninstrument(self.target)
        bare = _hooked(self.target)
        instrument(self.target)
        uninstrument(self.target)

        assert all(twin is not original for twin, original in zip(before, bare, strict=True))
        assert all(one is other for one, other in zip(bare, _hooked(self.target), strict=True))

    def test_uninstrument_lets_go(self, do: Any, pool: Any, telemetry: Telemetry) -> None:
        """After uninstrument nothing is reported, what is out can come back, and instrumenting again works."""
        held = do(self.borrow, pool)
        uninstrument(self.target)
        uninstrument(self.target)

        assert telemetry.points("db.client.connection.count") == []

        do(self.give_back, pool, held)
        self.instrument(telemetry)
        do(self.give_back, pool, do(self.borrow, pool))

        assert telemetry.read().checkouts() == {(words.IDLE, None): 1}

    def test_no_sdk_call_on_the_way(
        self, do: Any, pool: Any, telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Borrowing and returning make no call into the SDK's metrics."""
        calls: list[str] = []
        for name in ("Histogram.record", "Counter.add", "UpDownCounter.add", "_Gauge.set"):
            kind, _, method = name.partition(".")
            module = importlib.import_module("opentelemetry.sdk.metrics._internal.instrument")
            monkeypatch.setattr(getattr(module, kind), method, lambda *_, name=name, **__: calls.append(name))

        do(self.give_back, pool, do(self.borrow, pool))
        on_the_way = list(calls)
        telemetry.read()

        assert (on_the_way, set(calls)) == ([], {"Histogram.record"})

    def test_everything_is_in_the_vocabulary(self, do: Any, pool: Any, telemetry: Telemetry) -> None:
        """Every metric that arrives has the name, unit and attributes of a row."""
        do(self.give_back, pool, do(self.borrow, pool))
        rows = {row.name: row for row in words.METRICS}
        identity = {words.SYSTEM, words.NAMESPACE, words.ADDRESS, words.PORT}

        metrics = telemetry.metrics()

        assert metrics
        for metric in metrics:
            row = rows[metric.name]
            assert (metric.unit, metric.description) == (row.unit, row.description)
            for point in metric.data.data_points:
                assert row.pool_key in point.attributes
                assert point.attributes.get(words.PATH, words.IDLE) in words.PATHS
                assert point.attributes.get(words.REASON, "closed") in words.REASONS
                assert set(point.attributes) <= identity | {row.pool_key, *row.keys}


def _hooked(target: str) -> list[Any]:
    """What stands now where the table's rows attach."""
    tables = importlib.import_module(LIBRARIES[target].target).TARGET.hooks
    places = [place for module in tables if module in sys.modules for row in tables[module] for place in _places(row)]
    return [vars(owner)[name] for owner, name in places]


def _places(row: Row) -> list[tuple[Any, str]]:
    """Where this row would attach here."""
    for hook in row.rows if isinstance(row, Either) else (row,):
        if isinstance(hook, Hook):
            with contextlib.suppress(LookupError, ImportError):
                return [resolve(hook.where)]
    return []
