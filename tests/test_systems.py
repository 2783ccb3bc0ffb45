"""The table in docs/systems.md: nothing that the four systems have is missing, and every name of ours exists."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

import otel_pools
from otel_pools import _model, _servers, _vocabulary
from otel_pools._advice import RULES
from otel_pools._config import Settings
from otel_pools.web import Endpoints

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "systems.md"

KINDS = {rule.__name__ for row in RULES for rule in row}
METRICS = {metric.name for metric in _vocabulary.METRICS}
NOUNS = {
    kind.__name__: {field.name for field in fields(kind)}
    for kind in (
        *(_model.PoolStats, _model.PoolHealth, _model.HealthReport, _model.Advice, _model.Holder, _model.Timing),
        *(_servers.ServerConnections, _servers.ServerClients, _servers.ServerLimits),
    )
}
# Attributes and their values, which are no names of their own.
WORDS = {"error.type", "recycle", "otel_pools", "pg_stat_activity"}

# What the documents of the four systems name, word for word as it must stand in the table.
ASKED = {
    "A": (
        (
            "settings",
            "size 20, overflow 40, recycle 3600 s, timeout 30 s, pre-ping",
            "redis 50 connections",
            "gRPC preferred on 6334",
        ),
        ("gauge", "db pool size", "db checked out", "db checked in", "db overflow", "db utilisation percent"),
        ("gauge", "redis max", "redis in use", "redis available"),
        ("query", "current utilisation", "rate of checked out", "peak overflow over an hour", "redis in_use/max"),
        ("gap", "no dedicated connection pool metrics for Qdrant", "external call duration"),
        ("alert", "PostgreSQL utilisation > 80 % for 5 min", "Redis utilisation > 80 % for 5 min"),
        ("", "connection errors on the dashboard", "readiness probe", "dashboard: utilisation over time"),
        ("troubleshooting", "QueuePool limit", "high churn", "stale connections", "too many connections", "slow redis"),
        ("", "sizing table by users", "PgBouncer above 100 users", "Sentinel or Cluster", "20 % steps"),
        (
            "debugging",
            "active, idle and long-running queries from pg_stat_activity",
            "INFO clients",
            "INFO memory",
            "pool event logging",
        ),
    ),
    "B": (
        ("settings", "size 10, overflow 20, timeout 30, recycle 3600, pre-ping, LIFO", "redis max 10"),
        ("", "pools by purpose", "the replica"),
        ("endpoint", "stats", "health", "optimize", "config", "reset-stats (POST)"),
        ("metric", "active connections", "peak connections", "average wait time", "connection errors", "recycle rate"),
        ("metric", "connections created", "connections closed", "overflow", "pool size"),
        ("metric", "redis in use", "redis available", "redis created"),
        ("recommendation", "pool", "issue", "suggestion", "severity"),
        (
            "rule",
            "high wait times, increase pool_size to 15",
            "peaks, resize",
            "waits, grow",
            "errors, stability alert",
        ),
        ("rule", "idle, shrink"),
        ("", "monitoring loop", "exports to Prometheus"),
        ("troubleshooting", "waits, by size or long queries", "connection errors, by server", "memory growth, by"),
        ("claim", "50 to 70 %", "sub-millisecond acquisition"),
    ),
    "C": (
        ("settings", "size 5 to 30, overflow 10 to 60, timeout 20 to 30, recycle 3600, pre-ping, echo"),
        ("", "concurrent requests x database time, plus 50 %", "several instances share the server limit"),
        ("endpoint", "GET /api/v1/health/pools", "GET /api/v1/health"),
        ("field", "timestamp", "database status", "pool_size", "checked_out", "checked_in", "overflow"),
        ("field", "total_capacity", "utilization_percent", "redis status", "max_connections", "connected_clients"),
        ("field", "total_connections_received", "connection settings (host, port, db)"),
        ("status", "healthy < 80 %", "degraded 80 to 95 %", "critical > 95 %", "error when it cannot be read"),
        ("", "probe every 30 s"),
        ("in code", "pool status", "pool health, utilisation", "pool health, warnings", "pool health, recommendations"),
        ("in code", "active connections, total", "active connections, active", "active connections, idle"),
        ("in code", "active connections, idle in transaction", "active connections, longest query"),
        ("in code", "settings, current", "settings, recommended size and overflow", "settings, recommendations"),
        ("target", "utilisation < 70 % average and < 90 % peak", "checkout time < 10 ms", "overflow use < 50 %"),
        ("alert", "utilisation > 80 % for 5 min", "checkout time > 50 ms", "timeouts > 1/min", "overflow use > 80 %"),
        ("alert", "idle in transaction > 5", "long queries > 30 s (target < 5 s)"),
        ("leak sign", "checked_out stays high at low traffic", "overflow keeps rising", "never healthy again"),
        ("", "timeouts answered with 503", "overhead wanted: < 1 ms per check"),
    ),
    "D": (
        ("settings", "Supabase pool 20, keepalive 50, timeout 30 s", "Pinecone pool 10, max 20", "HTTP/2 on"),
        ("settings", "pool acquisition timeout 5 s"),
        ("", "concurrent requests / 5"),
        ("endpoint", "connection-pools", "system-health", "alerts"),
        ("field", "pool_size", "total_connections", "active_connections", "failed_connections", "utilization"),
        ("field", "health per client", "component status", "utilisations", "average query time"),
        ("field", "severity", "component", "message", "recommendation", "count", "status"),
        ("", "bearer token required"),
        ("alert", "utilisation > 80 % for 5 min", "failed connections > 0 for 1 min"),
        ("query", "utilisation", "failure rate", "average query time"),
        ("disaster", "a client created per request", "the server's 100", "22 % of requests fail"),
        ("cure", "one client, pooled"),
        ("checklist", "sizes per environment", "endpoints, alerts", "test under load", "document decisions"),
        ("checklist", "monitor, review"),
    ),
}


def sections():
    """The rows of each system's table, by its letter."""
    parts = re.split(r"^## ([A-D])\. ", PAGE.read_text("utf-8"), flags=re.MULTILINE)
    return {letter: rows(text.split("\n## ")[0]) for letter, text in zip(parts[1::2], parts[2::2], strict=True)}


def rows(text):
    """Theirs and ours; the first two lines of a table are its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in lines[2:]]


ROWS = [(letter, *row) for letter, table in sections().items() for row in table]


def anchors(page):
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def spelled(name, file):
    """What a file of rules defines under this keyword, as ``alert`` or ``record``."""
    text = (ROOT / "collector-config" / "prometheus" / file).read_text("utf-8")
    return set(re.findall(rf"^ +- {name}: (\S+)$", text, re.MULTILINE))


def exists(name):
    """Whether there is what a name in the right column says; its form says what it is."""
    kind, _, rest = name.partition(" ")
    noun, _, field = name.partition(".")
    if kind in KNOWN:
        return rest in KNOWN[kind]
    if kind == "promql":
        known = {metric.replace(".", "_") for metric in METRICS}
        return {found.removesuffix("_total") for found in re.findall(r"otel_pools_\w+(?=[{[])", rest)} <= known
    if noun in NOUNS:
        return field in NOUNS[noun]
    if name.endswith("()"):
        place = otel_pools
        return noun == "otel_pools" and callable(getattr(place, field[:-2], None))
    return name in METRICS or name in WORDS


def routes(method):
    return {path for path, (methods, _) in Endpoints(holders=True, reset=True).routes.items() if method in methods}


KNOWN = {
    "GET": routes("GET"),
    "POST": routes("POST"),
    "alert": spelled("alert", "alerts.yml"),
    "record": spelled("record", "rules.yml"),
    "advice": KINDS,
    "setting": {field.name for field in fields(Settings)},
}


@pytest.mark.parametrize("letter", ASKED)
def test_nothing_they_have_is_missing(letter):
    """Every endpoint, field, metric, alert, rule and recommendation of a system has a row."""
    table = [theirs for theirs, _ in sections()[letter]]
    missing = [
        (kind, phrase)
        for kind, *phrases in ASKED[letter]
        for phrase in phrases
        if f"{kind}: {phrase}" not in table
        and not any(theirs.startswith(kind) and " " in phrase and phrase in theirs for theirs in table)
    ]

    assert missing == []


def test_every_row_has_an_answer():
    """No right column is empty: each has a name of ours, or a link to how it is done."""
    assert len(ROWS) > 150
    assert [row for row in ROWS if "`" not in row[2] and "](" not in row[2]] == []


def test_every_name_of_ours_exists():
    """Fields, endpoints, kinds of advice, metrics, settings, alerts and records are as the table spells them."""
    text = PAGE.read_text("utf-8").rpartition("\n## ")[2]
    names = {name for *_, ours in ROWS for name in re.findall(r"`([^`]+)`", ours)} | set(re.findall(r"`([^`]+)`", text))

    assert {name for name in names if not exists(name)} == set()


def test_every_kind_of_advice_answers_somebody():
    """There is no advice that the table does not know of."""
    assert {kind for kind in KINDS if f"`advice {kind}`" not in PAGE.read_text("utf-8")} == set()


@pytest.mark.parametrize("page", ["systems.md", "endpoints.md"])
def test_links_lead_somewhere(page):
    """The files and headings that the two pages point to are there."""
    found = re.findall(r"\]\(((?!https?:)[^)]+)\)", (PAGE.parent / page).read_text("utf-8"))
    broken = []
    for link in found:
        file, _, anchor = link.partition("#")
        target = (PAGE.parent / file).resolve() if file else PAGE.parent / page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)

    assert broken == []
    assert found
