"""
The stage of every incident, and what on-call gets to see of it: metrics twice, logs, spans.

As a command it plays all incidents, one after the other, and prints which signals fire in which:

    python examples/incidents/lab.py
    python examples/incidents/lab.py leak dropped healthy
"""

from __future__ import annotations

import argparse
import inspect
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Event
from types import TracebackType
from typing import TYPE_CHECKING, Any

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from servers import NotInstalledError, Servers

import otel_pools

if TYPE_CHECKING:
    from typing_extensions import Self

# The same for all incidents: a signal that needed settings of its own would not be one.
LEAK_THRESHOLD = 2.0
SETTINGS = {"leak_threshold": LEAK_THRESHOLD, "busy_time": True, "span_threshold": 0.01}

PATIENCE = 30.0  # seconds: for what takes a few milliseconds on an idle machine

# -- what on-call sees ------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """
    One exported number.

    Attributes:
        value: Of a histogram, how many samples there were.
        total: Of a histogram, their sum.
        buckets: Of a histogram, how many there were up to each bound; the last one is infinite.
    """

    metric: str
    attributes: Mapping[str, Any]
    value: float
    total: float = 0.0
    buckets: tuple[tuple[float, int], ...] = ()


@dataclass(frozen=True)
class Wait:
    """One exported span ``acquire <pool>``: the pool, why it failed if it did, who held (events), spans linked to."""

    pool: str
    error: str | None
    holders: tuple[Mapping[str, Any], ...]
    links: tuple[int, ...]


@dataclass(frozen=True)
class Evidence:
    """
    All that the signals may look at; plain data, as it may come from another process.

    Attributes:
        before: What one export brought before the incident.
        after: What one export brought in the midst of it, or at its end where it is over in a moment.
        logs: What `otel_pools` has logged in between.
        waits: The spans it has written in between.
        holders: Who held connections at that moment, as `otel_pools.holders()` says; not exported, so the signals are
            not given it.
    """

    before: tuple[Point, ...]
    after: tuple[Point, ...]
    logs: tuple[str, ...]
    waits: tuple[Wait, ...]
    holders: tuple[otel_pools.Holder, ...]


class Lab:
    """
    Watches every pool of this process as an application would, and keeps what is exported.

    A context manager. An incident calls `before` when all is well, `after` in
    the midst of it, and `later` if there is a time after it.
    """

    def __init__(self, servers: Servers) -> None:
        self.servers = servers
        self._reader = InMemoryMetricReader()
        self._meters = MeterProvider([self._reader], shutdown_on_exit=False)
        self._spans = InMemorySpanExporter()
        self._tracers = TracerProvider(shutdown_on_exit=False)
        self._tracers.add_span_processor(SimpleSpanProcessor(self._spans))
        self._logs = _Kept()
        self._looks: list[tuple[Point, ...]] = []
        self.seen: list[Evidence] = []

    def __repr__(self) -> str:
        return f"<Lab [{len(self.seen)} looks]>"

    def __enter__(self) -> Self:
        logging.getLogger("otel_pools").addHandler(self._logs)
        otel_pools.instrument(meter_provider=self._meters, tracer_provider=self._tracers, **SETTINGS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        otel_pools.uninstrument()
        logging.getLogger("otel_pools").removeHandler(self._logs)
        self._meters.shutdown()
        self._tracers.shutdown()

    def reads(self, metric: str, pool: str, **attributes: str) -> float:
        """What an export would say of a pool now; an attribute's name may be given by its last word."""
        return sum(
            point.value
            for point in self.export()
            if point.metric == metric
            and _pool_of(point) == pool
            and attributes.items() <= {key.rpartition(".")[2]: value for key, value in point.attributes.items()}.items()
        )

    def span(self, name: str) -> Any:
        """A span of the application, as its web framework would start one."""
        return self._tracers.get_tracer("app").start_as_current_span(name)

    def before(self) -> None:
        """The export before the incident."""
        self._looks = [self.export()]
        self._logs.lines.clear()
        self._spans.clear()

    def after(self) -> Evidence:
        """The export in the midst of the incident, or when it is over."""
        self.export()  # as there are many; what is orphaned must be so in two
        return self._look()

    later = after

    @property
    def evidence(self) -> Evidence:
        """From `before` to `after`."""
        return self.seen[0]

    def take(self, evidence: Evidence) -> None:
        """What another process has seen."""
        self.seen.append(evidence)

    def _look(self) -> Evidence:
        self._looks.append(self.export())
        waits = tuple(_wait(span) for span in self._spans.get_finished_spans() if span.name.startswith("acquire "))
        evidence = Evidence(*self._looks[-2:], tuple(self._logs.lines), waits, otel_pools.holders())
        self._logs.lines.clear()
        self._spans.clear()
        self.seen.append(evidence)
        return evidence

    def export(self) -> tuple[Point, ...]:
        """One export."""
        data = self._reader.get_metrics_data()
        return tuple(
            _point(metric.name, point)
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
            for point in metric.data.data_points
        )


class _Kept(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _point(metric: str, point: Any) -> Point:
    attributes = dict(point.attributes)
    if not hasattr(point, "bucket_counts"):
        return Point(metric, attributes, point.value)
    bounds = (*point.explicit_bounds, float("inf"))
    return Point(metric, attributes, point.count, point.sum, tuple(zip(bounds, point.bucket_counts, strict=True)))


def _wait(span: ReadableSpan) -> Wait:
    attributes = span.attributes or {}
    return Wait(
        pool=span.name.removeprefix("acquire "),
        error=attributes.get("error.type"),  # type: ignore[arg-type]
        holders=tuple(dict(event.attributes or {}) for event in span.events if event.name == "otel_pools.holder"),
        links=tuple(link.context.span_id for link in span.links),
    )


# -- helpers -----------------------------------------------------------------------------


def until(condition: Callable[[], object]) -> None:
    """Wait until something is so."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(inspect.getsource(condition).strip())
        time.sleep(0.02)  # an export is no small thing


@contextmanager
def crowd(number: int, work: Callable[[Event], None]) -> Iterator[None]:
    """So many threads at once; *work* is given what is set when the incident is over."""
    over = Event()
    with ThreadPoolExecutor(number, "request") as threads:
        futures = [threads.submit(work, over) for _ in range(number)]
        try:
            yield
        finally:
            over.set()
    for future in futures:
        future.result()


# -- by itself -------------------------------------------------------------------------------

VARIABLES = {"postgres": "INCIDENTS_POSTGRES_URL", "valkey": "INCIDENTS_VALKEY_URL", "web": "INCIDENTS_WEB_URL"}


def alone(play: Callable[[Lab], None]) -> None:
    """Play one incident by itself and say which signals fire."""
    from signals import SIGNALS, fired  # noqa: PLC0415  # which imports us

    story = inspect.getdoc(inspect.getmodule(play)) or ""
    given = options(argparse.ArgumentParser(description=story))
    print(story, end="\n\n")
    try:
        with Servers(given.servers) as servers, Lab(servers) as lab:
            play(lab)
    except NotInstalledError as missing:
        sys.exit(str(missing))
    found = fired(lab.evidence)
    for pool, signal in sorted(found):
        print(f"{signal} on pool {pool}: {inspect.getdoc(SIGNALS[signal])}")
    if not found:
        print("No signal fires.")
    for line in lab.evidence.logs:
        print(line)


def options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What was asked for on the command line; the URLs of running servers as ``servers``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for name, variable in VARIABLES.items():
        parser.add_argument(
            f"--{name}", metavar="URL", default=os.environ.get(variable), help=f"a running one (or ${variable})"
        )
    asked = parser.parse_args()
    asked.servers = {name: url for name in VARIABLES if (url := getattr(asked, name))}
    return asked


# -- what is said of one pool ----------------------------------------------------------------


def only(evidence: Evidence, pool: str) -> Evidence:
    """What is exported of one pool."""
    return replace(
        evidence,
        before=tuple(point for point in evidence.before if _pool_of(point) == pool),
        after=tuple(point for point in evidence.after if _pool_of(point) == pool),
        logs=tuple(line for line in evidence.logs if f"pool {pool}" in line),
        waits=tuple(wait for wait in evidence.waits if wait.pool == pool),
        holders=(),
    )


def pools(evidence: Evidence) -> tuple[str, ...]:
    """The names of the pools that there were."""
    return tuple(sorted({name for point in evidence.after if (name := _pool_of(point)) is not None}))


def _pool_of(point: Point) -> str | None:
    found: str | None = point.attributes.get("db.client.connection.pool.name") or point.attributes.get(
        "otel_pools.pool.name"
    )
    return found


if __name__ == "__main__":
    import matrix  # and with it this module under its own name

    matrix.main()
