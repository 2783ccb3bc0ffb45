"""Our metrics as PromQL: the names they have in Prometheus, and the few expressions that panels are made of."""

# ruff: noqa: INP001  # a script's neighbour, and no package

from __future__ import annotations

from otel_pools._vocabulary import HTTP_STATE, METRICS, OUR_POOL, STATE, TIME_IN_QUEUE, WAIT, Kind, Metric

ROWS = {row.name: row for row in METRICS}

# What the Collector's receivers tell of the servers themselves (their documentation.md), as far as connections go.
SERVERS = {
    row.name: row
    for row in (
        Metric("postgresql.backends", Kind.UP_DOWN, "1", "Server processes, those of clients among them."),
        Metric("postgresql.connection.max", Kind.GAUGE, "{connections}", "The server's max_connections."),
        Metric("redis.clients.connected", Kind.UP_DOWN, "{client}", "Connections of clients."),
        Metric("redis.clients.blocked", Kind.UP_DOWN, "{client}", "Clients in a blocking call."),
        Metric("redis.connections.received", Kind.COUNTER, "{connection}", "Connections accepted."),
        Metric(
            "redis.connections.rejected", Kind.COUNTER, "{connection}", "Connections refused because of maxclients."
        ),
    )
}

# How Prometheus calls a unit at the end of a name; what is counted, in braces, it does not say.
UNITS = {"s": "_seconds"}

RATE = "$__rate_interval"
POOL = "pool"  # the label in legends, whichever of the two keys it comes from
JOB = "job"
INSTANCE = "instance"


def label(key: str) -> str:
    """An attribute's name in Prometheus."""
    return key.replace(".", "_")


def prometheus(row: Metric, part: str = "") -> str:
    """A metric's name in Prometheus, the same by scrape, by Collector and by remote write; *part* of a histogram."""
    end = "_total" if row.kind is Kind.COUNTER else ""
    return label(row.name) + UNITS.get(row.unit, "") + end + (f"_{part}" if part else "")


def of(name: str, part: str = "", window: str = "", by: tuple[str, ...] = (), **only: str) -> str:
    """
    The chosen series of one of our metrics, their pool in the label `pool`.

    Args:
        name: Of the metric, as in the vocabulary.
        part: Of a histogram: ``bucket``, ``sum`` or ``count``.
        window: What to take the rate over; empty takes the values.
        by: What to add up by at once, beside job and pool; empty adds up nothing. Worth it where there are many series.
        only: Further matchers, by label, with their operator: ``state='="used"'``.

    Raises:
        KeyError: We have no such metric.
    """
    row = ROWS[name]
    key = label(row.pool_key)
    # Of two keys for one thing only one is on a series, so each is asked for by its own.
    wanted = {JOB: '=~"$job"', INSTANCE: '=~"$instance"', key: '=~"$pool"', **only}
    matchers = ", ".join(f"{what}{how}" for what, how in wanted.items())
    series = f"{prometheus(row, part)}{{{matchers}}}"
    found = f"rate({series}[{window}])" if window else series
    if by:
        found = f"sum by ({', '.join((JOB, key, *by))}) ({found})"
    return f'label_replace({found}, "{POOL}", "$1", "{key}", "(.*)")'


def any_of(*vectors: str) -> str:
    """Of whichever kind the pool is: database or HTTP."""
    return "(" + " or ".join(vectors) + ")"


def total(vector: str, *by: str) -> str:
    """Added up by job, pool and whatever else."""
    return f"sum by ({', '.join((JOB, POOL, *by))}) ({vector})"


def highest(vector: str, *by: str) -> str:
    """The highest by job, pool and whatever else."""
    return f"max by ({', '.join((JOB, POOL, *by))}) ({vector})"


def quantile(share: float, name: str, *by: str) -> str:
    """What this share of samples did not exceed, in seconds, by pool; *name* of a histogram, or both for waits."""
    names = (WAIT.name, TIME_IN_QUEUE.name) if name == WAIT.name else (name,)
    buckets = any_of(*(of(one, "bucket", RATE, (*by, "le")) for one in names))
    return f"histogram_quantile({share}, {total(buckets, *by, 'le')})"


def used() -> str:
    """Connections in use, of all kinds of pools."""
    database = of("db.client.connection.count", **{label(STATE): '="used"'})
    return any_of(database, of("http.client.open_connections", **{label(HTTP_STATE): '="active"'}))


def idle() -> str:
    """Open connections that nobody uses."""
    database = of("db.client.connection.count", **{label(STATE): '="idle"'})
    return any_of(database, of("http.client.open_connections", **{label(HTTP_STATE): '="idle"'}))


def limit() -> str:
    """How many connections may be open; nothing where there is no limit."""
    return any_of(of("db.client.connection.max"), of("otel_pools.connection.max"))


def waiting() -> str:
    """Requests that wait for a connection."""
    return any_of(of("db.client.connection.pending_requests"), of("otel_pools.connection.pending_requests"))


def timeouts() -> str:
    """Requests that waited in vain, a second."""
    names = ("db.client.connection.timeouts", "otel_pools.connection.timeouts")
    return any_of(*(of(name, window=RATE) for name in names))


def share(part: str, whole: str) -> str:
    """How full the fullest instance is, by pool: one that is full hides in the sum of a fleet that is not."""
    return highest(f"{total(part, INSTANCE)} / {total(whole, INSTANCE)}")


def server(name: str, window: str = "") -> str:
    """What a receiver of the Collector tells of the chosen servers."""
    series = f'{prometheus(SERVERS[name])}{{{INSTANCE}=~"$server"}}'
    return f"rate({series}[{window}])" if window else series


def values(name: str, key: str, where: str = "") -> str:
    """The choices of a dashboard's variable: the values of a label."""
    return f"label_values({prometheus(ROWS[name])}{where}, {label(key)})"


CHOICES = {
    JOB: values("otel_pools.pools", JOB),
    INSTANCE: values("otel_pools.pools", INSTANCE, '{job=~"$job"}'),
    POOL: values("otel_pools.pools", OUR_POOL, '{job=~"$job", instance=~"$instance"}'),
}
