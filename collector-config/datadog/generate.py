"""
Write the Datadog dashboard and monitors beside this script: `dashboard.json`, and `monitors.json` with a list of them.

    python collector-config/datadog/generate.py

The names are those of the Collector's Datadog exporter, as `../backends/datadog.yaml` sets it up: dots stay, counters
are counts, up-down counters and gauges are gauges, histograms are distributions (percentiles are to be switched on for
them in Datadog's Metrics Summary). Attributes are tags, and so is `service.instance.id`.
"""

# ruff: noqa: INP001  # a script

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from otel_pools._vocabulary import (
    CONNECT_ERROR,
    CREATED,
    ERROR,
    HTTP_STATE,
    METRICS,
    OLDEST_USE,
    OLDEST_WAIT,
    REASON,
    SEMCONV_POOL,
    STATE,
    STREAM_STATE,
    SYSTEM,
    TIME_IN_QUEUE,
    TIMEOUTS,
    USE,
    WAIT,
    Kind,
)

FOLDER = Path(__file__).parent
ROWS = {row.name: row for row in METRICS}
SERVICE, INSTANCE = "service", "service.instance.id"
POOL = "pool"  # the dashboard's variable
RUNBOOK = "docs/runbook.md"


def query(name: str, aggregate: str = "sum", *by: str, monitor: bool = False, **only: str) -> str:
    """
    One metric in Datadog's words, by pool and whatever else.

    Args:
        name: Of the metric, as in the vocabulary.
        aggregate: Over the series of a group: ``sum``, ``max``, or of distributions ``p95`` and the like.
        by: Tags to tell apart.
        monitor: Whether it is for a monitor, which has no variables.
        only: Tags to choose by: their values.

    Raises:
        KeyError: We have no such metric.
    """
    row = ROWS[name]
    chosen = "" if monitor else f"${SERVICE},{row.pool_key}:${POOL}.value"
    tags = ",".join(filter(None, (chosen, *(f"{key}:{value}" for key, value in only.items())))) or "*"
    rate = ".as_rate()" if row.kind is Kind.COUNTER and not monitor else ""
    return f"{aggregate}:{row.name}{{{tags}}} by {{{','.join((SERVICE, row.pool_key, *by))}}}{rate}"


@dataclass(frozen=True)
class Widget:
    """
    One chart.

    Attributes:
        title: A few words.
        queries: By the names that the formula has for them; without a formula each is a line.
        formula: How they make one line; empty for each its own.
        kind: ``line``, ``bars`` or ``area``.
    """

    title: str
    queries: dict[str, str]
    formula: str = ""
    kind: str = "line"


USED = {STATE: "used"}
ACTIVE = {HTTP_STATE: "active"}
FAILED = "otel_pools.checkouts"

GROUPS: tuple[tuple[str, str, tuple[Widget, ...]], ...] = (
    (
        "Saturation",
        "Full alone is no harm; full while requests wait is. Hold connections for less time before enlarging a pool.",
        (
            Widget(
                "Databases: in use, of the limit, fullest instance",
                {
                    "used": query("db.client.connection.count", "sum", INSTANCE, **USED),
                    "limit": query("db.client.connection.max", "sum", INSTANCE),
                },
                "used / limit",
            ),
            Widget(
                "HTTP: in use, of the limit, fullest instance",
                {
                    "used": query("http.client.open_connections", "sum", INSTANCE, **ACTIVE),
                    "limit": query("otel_pools.connection.max", "sum", INSTANCE),
                },
                "used / limit",
            ),
            Widget(
                "Requests waiting",
                {
                    "databases": query("db.client.connection.pending_requests"),
                    "http": query("otel_pools.connection.pending_requests"),
                },
            ),
            Widget("Oldest wait, s", {"oldest": query(OLDEST_WAIT.name, "max")}),
            Widget(
                "Wait, 95th percentile, s",
                {"databases": query(WAIT.name, "p95"), "http": query(TIME_IN_QUEUE.name, "p95")},
            ),
            Widget(
                "Peak in use since the previous export", {"peak": query("otel_pools.connection.peak", "max", INSTANCE)}
            ),
        ),
    ),
    (
        "Holding and leaking",
        "The log of otel_pools names the line that borrowed; the spans 'acquire' link to those who hold.",
        (
            Widget("Use, 95th percentile, s", {"use": query(USE.name, "p95")}),
            Widget("Oldest use, s", {"oldest": query(OLDEST_USE.name, "max", INSTANCE)}),
            Widget(
                "Overdue, and lost places",
                {"overdue": query("otel_pools.connection.overdue"), "lost": query("otel_pools.connection.orphaned")},
            ),
            Widget("Nested checkouts a second", {"nested": query("otel_pools.checkout.nested")}, kind="bars"),
        ),
    ),
    (
        "Traffic and errors",
        "timeout: waited in vain. exhausted: refused at once. connect_error: the server. cancelled: by the caller.",
        (
            Widget("Checkouts a second", {"all": query(FAILED)}),
            Widget(
                "Timeouts a second",
                {"databases": query(TIMEOUTS.name), "http": query("otel_pools.connection.timeouts")},
                kind="bars",
            ),
            Widget("Failures a second, by cause", {"failed": query(FAILED, "sum", ERROR, **{ERROR: "*"})}, kind="bars"),
            Widget("Opened a second", {"opened": query(CREATED.name)}),
            Widget(
                "Closed a second, by reason",
                {"closed": query("otel_pools.connection.closed", "sum", REASON)},
                kind="area",
            ),
        ),
    ),
    (
        "HTTP/2 and gRPC",
        "Many requests share one connection, and wait inside it, where no pool sees them.",
        (
            Widget(
                "Streams in use, of the limit",
                {
                    "used": query("otel_pools.stream.count", "sum", INSTANCE, **{STREAM_STATE: "used"}),
                    "limit": query("otel_pools.stream.max", "sum", INSTANCE),
                },
                "used / limit",
            ),
            Widget("Waiting for a stream", {"waiting": query("otel_pools.stream.count", **{STREAM_STATE: "pending"})}),
            Widget(
                "gRPC calls waiting", {"waiting": query("db.client.connection.pending_requests", **{SYSTEM: "qdrant"})}
            ),
            Widget(
                "gRPC channels by state",
                {"channels": query("otel_pools.grpc.channels", "sum", "otel_pools.grpc.state")},
            ),
        ),
    ),
)


def dashboard() -> dict[str, Any]:
    """As Datadog's API takes it."""
    return {
        "title": "Connection pools",
        "description": "Every connection pool of every service: who waits, who holds, what leaks.",
        "layout_type": "ordered",
        "template_variables": [
            {"name": SERVICE, "prefix": SERVICE, "available_values": [], "defaults": ["*"]},
            {"name": POOL, "prefix": SEMCONV_POOL, "available_values": [], "defaults": ["*"]},
        ],
        "widgets": [_group(title, advice, widgets) for title, advice, widgets in GROUPS],
    }


def _group(title: str, advice: str, widgets: tuple[Widget, ...]) -> dict[str, Any]:
    note = {"definition": {"type": "note", "content": advice, "background_color": "gray", "font_size": "14"}}
    inside = [note, *(_chart(widget) for widget in widgets)]
    return {"definition": {"type": "group", "title": title, "layout_type": "ordered", "widgets": inside}}


def _chart(widget: Widget) -> dict[str, Any]:
    queries = [{"name": name, "data_source": "metrics", "query": text} for name, text in widget.queries.items()]
    formulas = (
        [{"formula": widget.formula, "alias": widget.formula}]
        if widget.formula
        else [{"formula": name, "alias": name} for name in widget.queries]
    )
    request = {
        "response_format": "timeseries",
        "queries": queries,
        "formulas": formulas,
        "display_type": widget.kind,
    }
    return {"definition": {"type": "timeseries", "title": widget.title, "show_legend": True, "requests": [request]}}


# -- monitors ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Monitor:
    """
    One monitor.

    Attributes:
        name: That of the alert for Prometheus that means the same, and of its part of the runbook.
        says: What is the matter, and what to do.
        query: What is compared, over a time.
        above: From which value on it is critical.
        priority: 1 (wakes somebody) to 5.
    """

    name: str
    says: str
    query: str
    above: float
    priority: int


def over(minutes: int, how: str, *texts: str) -> str:
    """The values of that time as one, in a monitor's words."""
    return f"{how}(last_{minutes}m):{' / '.join(texts)}"


def of(name: str, aggregate: str = "sum", *by: str, **only: str) -> str:
    """One metric for a monitor, as it is counted."""
    count = ".as_count()" if ROWS[name].kind is Kind.COUNTER else ""
    return query(name, aggregate, *by, monitor=True, **only) + count


MONITORS = (
    Monitor(
        "PoolAlmostExhausted",
        "More than 80 % of the connections have been in use for 5 minutes.",
        over(
            5,
            "min",
            of("db.client.connection.count", "sum", INSTANCE, **USED),
            of("db.client.connection.max", "sum", INSTANCE),
        ),
        0.8,
        3,
    ),
    Monitor(
        "PoolTimeouts",
        "Requests fail because they waited for a database connection for longer than the pool lets them.",
        over(5, "sum", of(TIMEOUTS.name)),
        5,
        1,
    ),
    Monitor(
        "PoolTimeouts",
        "Requests fail because they waited for an HTTP connection for longer than the client lets them.",
        over(5, "sum", of("otel_pools.connection.timeouts")),
        5,
        1,
    ),
    Monitor(
        "PoolOldestWait",
        "Somebody has waited for more than 5 s and still has no connection.",
        over(1, "min", of(OLDEST_WAIT.name, "max", INSTANCE)),
        5,
        1,
    ),
    Monitor(
        "PoolConnectionsOverdue",
        "Connections are out for longer than the leak threshold; the log names the lines that borrowed them.",
        over(5, "min", of("otel_pools.connection.overdue", "sum", INSTANCE)),
        0,
        3,
    ),
    Monitor(
        "PoolSlotsOrphaned",
        "Places of the pool are taken and in nobody's hands; only a restart brings them back.",
        over(5, "min", of("otel_pools.connection.orphaned", "sum", INSTANCE)),
        0,
        2,
    ),
    Monitor(
        "PoolNestedCheckouts",
        "Who holds a connection asks for another of the same pool: a deadlock under load.",
        over(10, "sum", of("otel_pools.checkout.nested")),
        0,
        4,
    ),
    Monitor(
        "PoolConnectErrors",
        "Connections cannot be opened: look at the server, its limits, and the way to it.",
        over(5, "sum", of(FAILED, **{ERROR: CONNECT_ERROR})),
        5,
        2,
    ),
    Monitor(
        "PoolStreamsSaturated",
        "Requests wait for an HTTP/2 stream inside their connection, where no pool sees them.",
        over(5, "min", of("otel_pools.stream.count", "sum", INSTANCE, **{STREAM_STATE: "pending"})),
        0,
        3,
    ),
    Monitor(
        "PoolGrpcQueue",
        "Calls wait inside gRPC: more of them than the connection has streams.",
        over(5, "min", of("db.client.connection.pending_requests", "sum", INSTANCE, **{SYSTEM: "qdrant"})),
        0,
        3,
    ),
    Monitor(
        "PoolTelemetryDropped",
        "Samples are lost before they are exported; export more often.",
        over(10, "sum", of("otel_pools.samples.dropped", "sum", INSTANCE)),
        0,
        4,
    ),
)


def monitor(of_ours: Monitor) -> dict[str, Any]:
    """As Datadog's API takes it."""
    pool = SEMCONV_POOL if SEMCONV_POOL in of_ours.query else "otel_pools.pool.name"
    # A tag with dots in its name goes into brackets there.
    whose = f"pool {{{{[{pool}].name}}}} of {{{{{SERVICE}.name}}}}"
    return {
        "name": f"{of_ours.name}: {whose}",
        "type": "query alert",
        "query": f"{of_ours.query} > {of_ours.above:g}",
        "message": f"{of_ours.says}\n\nRunbook: {RUNBOOK}#{of_ours.name.lower()}",
        "tags": ["otel_pools"],
        "priority": of_ours.priority,
        "options": {
            "thresholds": {"critical": of_ours.above},
            "notify_no_data": False,
            "require_full_window": False,
            "include_tags": True,
        },
    }


def generate() -> Iterator[tuple[str, str]]:
    """The files' names and what is in them."""
    yield "dashboard.json", _text(dashboard())
    yield "monitors.json", _text([monitor(one) for one in MONITORS])


def _text(told: Any) -> str:
    return json.dumps(told, indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    """Write the files."""
    for name, text in generate():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
