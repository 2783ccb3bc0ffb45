"""Whether what arrived over OTLP is what the application has counted and what the servers see."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from otel_pools import _vocabulary as words


@dataclass(frozen=True)
class Wrong:
    """A number that is not what it should be."""

    round: int
    kind: str
    what: str
    told: float
    true: float

    def __str__(self):
        return f"round {self.round}, {self.kind}: {self.what} is told to be {self.told:g}, and is {self.true:g}"


class Arrived:
    """What the newest export of one program has told of one pool name."""

    def __init__(self, series, role, name):
        points = [one.now for one in series if one.now.source == role]
        newest = max((point.seconds for point in points), default=0.0)
        self.points = [
            point
            for point in points
            if point.seconds == newest and name in {point.attributes.get(key) for key in words.POOL_KEYS}
        ]

    def __repr__(self):
        return f"<Arrived [{len(self.points)} points]>"

    def value(self, name, **where):
        """The sum of these points, or of their counts, if they are histograms; attributes with ``__`` for dots."""
        wanted = {key.replace("__", "."): value for key, value in where.items()}
        points = [point for point in self.points if point.name == name and wanted.items() <= point.attributes.items()]
        return sum(getattr(point.value, "count", point.value) for point in points)

    def checkouts(self):
        """By error, or None."""
        found = Counter()
        for point in self.points:
            if point.name == "otel_pools.checkouts":
                found[point.attributes.get(words.ERROR)] += point.value
        return found


def compare(kind, arrived, counts, seen):
    """
    The numbers that must be equal: what, as told, as it is.

    Those that speak of what the server sees come last: it may take a moment
    until a connection that has ended is known to have.
    """
    counts = Counter(counts)
    rows = {"web": _web, "vectors": _vectors}.get(kind.partition("-")[0], _database)(kind, arrived, counts)
    value = arrived.value
    rows += [
        ("checkouts", value("otel_pools.checkouts"), counts["asked"]),
        ("orphaned", value("otel_pools.connection.orphaned"), counts["astray"]),
        ("samples dropped", value("otel_pools.samples.dropped"), 0),
        ("oldest wait", value("otel_pools.wait.oldest"), 0),
        ("oldest use", value("otel_pools.use.oldest"), 0),
        ("overdue", value("otel_pools.connection.overdue"), 0),
        ("pools", value("otel_pools.pools"), 1),
    ]
    return rows, _servers(kind, arrived, seen, counts["astray"])


def lost(kind, arrived, counts):
    """How many of the application's attempts are in no histogram; where waits are not timed, in no counter."""
    name = {"web": "http.client.request.time_in_queue", "vectors": "otel_pools.checkouts"}
    told = arrived.value(name.get(kind.partition("-")[0], "db.client.connection.wait_time"))
    return abs(counts.get("asked", 0) - told) + arrived.value("otel_pools.samples.dropped")


def _database(kind, arrived, counts):
    value, checkouts = arrived.value, arrived.checkouts()
    rows = [
        ("used", value("db.client.connection.count", **{words.STATE.replace(".", "__"): "used"}), 0),
        ("pending", value("db.client.connection.pending_requests"), 0),
        ("waits", value("db.client.connection.wait_time"), counts["asked"]),
        ("uses", value("db.client.connection.use_time"), checkouts[None]),
        ("creations", value("db.client.connection.create_time"), value("otel_pools.connection.created")),
        ("timeouts", value("db.client.connection.timeouts"), counts["timeouts"]),
        ("exhausted", checkouts[words.EXHAUSTED], counts["exhausted"]),
        ("dropped", value("otel_pools.connection.leaked", otel_pools__leak__kind="collected"), counts["dropped"]),
    ]
    if kind.startswith("postgres"):
        rows.append(("served", checkouts[None], counts["got"]))
    return rows


def _web(_, arrived, counts):
    value = arrived.value
    return [
        ("active", value("http.client.open_connections", http__connection__state="active"), counts["astray"]),
        ("active requests", value("http.client.active_requests"), 0),
        ("pending", value("otel_pools.connection.pending_requests"), 0),
        ("waits", value("http.client.request.time_in_queue"), counts["asked"]),
        ("lives", value("http.client.connection.duration"), value("otel_pools.connection.closed")),
        ("timeouts", value("otel_pools.connection.timeouts"), counts["timeouts"]),
        ("streams", value("otel_pools.stream.count"), 0),
    ]


def _vectors(_, arrived, counts):
    value, served = arrived.value, arrived.checkouts()[None]
    # Who was cancelled does not know whether it was answered.
    possible = min(max(served, counts["got"]), counts["got"] + counts["cancelled"])
    return [
        ("used", value("db.client.connection.count", **{words.STATE.replace(".", "__"): "used"}), 0),
        ("pending", value("db.client.connection.pending_requests"), 0),
        ("streams", value("otel_pools.stream.count"), 0),
        ("served", served, possible),
    ]


def _servers(kind, arrived, seen, astray):
    """A place that was lost counts as taken, but nobody has opened anything there."""
    value = arrived.value
    web = kind.startswith("web")
    open = value("http.client.open_connections") if web else value("db.client.connection.count")
    rows = [("open", open, seen + astray)]
    if kind != "vectors":
        created, closed = value("otel_pools.connection.created"), value("otel_pools.connection.closed")
        rows.append(("created - closed", created - closed, seen))
    return rows
