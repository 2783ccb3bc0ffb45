"""Every name we emit: the metrics, one row each, and the attributes, spans and words in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from ._model import Holder, Identity, Load, Reading, Snapshot

SCHEMA_URL = "https://opentelemetry.io/schemas/1.44.0"

# Identity, on every series. The pool's name has two keys, as semconv owns only the first.
SEMCONV_POOL = "db.client.connection.pool.name"
OUR_POOL = "otel_pools.pool.name"
POOL_KEYS = (SEMCONV_POOL, OUR_POOL)
SYSTEM = "db.system.name"
NAMESPACE = "db.namespace"
ADDRESS = "server.address"
PORT = "server.port"

# What a single series adds to it.
STATE = "db.client.connection.state"
ERROR = "error.type"
PATH = "otel_pools.checkout.path"
REASON = "otel_pools.close.reason"

LEAK = "otel_pools.leak.kind"

# Of an HTTP pool, by origin; and of its HTTP/2 streams.
SCHEME = "url.scheme"
HTTP_STATE = "http.connection.state"
ORIGIN = (SCHEME, ADDRESS, PORT)
STREAM_STATE = "otel_pools.stream.state"
GRPC_STATE = "otel_pools.grpc.state"

# How a checkout got its connection (PATH).
IDLE, NEW, QUEUED = "idle", "new", "queued"
PATHS = (IDLE, NEW, QUEUED)

# Why it got none (ERROR); anything else is the class name of the error.
TIMEOUT, EXHAUSTED, CANCELLED, CONNECT_ERROR = "timeout", "exhausted", "cancelled", "connect_error"
OTHER = "_OTHER"  # what semantic conventions have for an error of which no more is known

# Why a connection was closed (REASON).
CLOSED = "closed"  # somebody did, or nothing is known of why
IDLED, EVICTED, SERVER, FAILED, GOAWAY, DISPOSE = "idle", "evicted", "server", "error", "goaway", "dispose"
REASONS = (
    "recycle",
    IDLED,
    "overflow",
    EVICTED,
    "invalidated",
    "pre_ping",
    "reset",
    SERVER,
    FAILED,
    GOAWAY,
    DISPOSE,
    CLOSED,
)

# How a connection leaks (LEAK): out for too long, or given back by the garbage collector.
OVERDUE, COLLECTED = "overdue", "collected"
LEAKS = (OVERDUE, COLLECTED)

# What a connection is held for; the first three on purpose, for as long as it takes.
PUBSUB, BLOCKING, RESERVED, TRANSACTION = "pub/sub", "blocking", "reserved", "transaction"
ON_PURPOSE = (PUBSUB, BLOCKING, RESERVED)

# What else is worth a word at the next collection.
NESTED, LATE, INHERITED = "nested", "late", "inherited"

# Seconds. The SDK's default buckets are made for milliseconds: its first bound would be 5 s.
BUCKETS = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0)


# On the span of a wait: how full the pool is; and of each who holds a connection (HOLDER), an event's attributes.
POOL_STATE = ("used", "idle", "max", "overflow", "pending")
HOLDER = "otel_pools.holder"


def state(snapshot: Snapshot) -> dict[str, int]:
    """The attributes of a span that say how full its pool is."""
    numbers = {f"otel_pools.pool.{name}": getattr(snapshot, name) for name in POOL_STATE}
    return {key: number for key, number in numbers.items() if number is not None}


def held(holder: Holder) -> dict[str, str | int | float]:
    """The attributes of an event about who holds a connection; the code's are those of semantic conventions."""
    place, _, function = (holder.call_site or "").rpartition(" ")
    path, _, line = place.rpartition(":")
    known = {
        f"{HOLDER}.held": holder.held_s,
        f"{HOLDER}.trace_id": holder.trace_id,
        f"{HOLDER}.task": holder.task,
        f"{HOLDER}.kind": holder.kind,
        "code.file.path": path or None,
        "code.line.number": int(line) if line else None,
        "code.function.name": function or None,
    }
    return {key: value for key, value in known.items() if value is not None}


def span_name(identity: Identity) -> str:
    """The name of the span of one wait."""
    return f"acquire {identity.name}"


class Kind(Enum):
    """The OpenTelemetry instrument of a metric, named as the specification does."""

    COUNTER = "Counter"
    UP_DOWN = "UpDownCounter"
    GAUGE = "Gauge"
    HISTOGRAM = "Histogram"


Value = int | float | None
Points = Iterable[tuple[Value, Mapping[str, str | int]]]


@dataclass(frozen=True, slots=True)
class Metric:
    """
    One metric: what it is called, and how its points follow from a reading.

    Attributes:
        keys: The attributes its points carry beside the identity, or instead of it.
        points: From a reading to (value, attributes); None for histograms, whose samples come one by one.
    """

    name: str
    kind: Kind
    unit: str
    description: str
    points: Callable[[Reading], Points] | None = None
    keys: tuple[str, ...] = ()

    @property
    def pool_key(self) -> str:
        """The attribute that holds the pool's name on this metric."""
        return SEMCONV_POOL if self.name.startswith("db.client.connection.") else OUR_POOL


def _one(value: Callable[[Reading], Value]) -> Callable[[Reading], Points]:
    return lambda reading: ((value(reading), {}),)


def _checkouts(reading: Reading) -> Points:
    # Paths start at zero, so that the first checkout is an increase too; unless nobody can tell them apart.
    counted = reading.tally.checkouts
    paths = () if (None, None) in counted else PATHS
    counts: dict[tuple[str | None, str | None], int] = dict.fromkeys(((path, None) for path in paths), 0)
    counts.update(counted)
    return [(count, _known({PATH: path, ERROR: error})) for (path, error), count in counts.items()]


def _known(attributes: Mapping[str, str | int | None]) -> dict[str, str | int]:
    return {key: value for key, value in attributes.items() if value is not None}


COUNT = Metric(
    "db.client.connection.count",
    Kind.UP_DOWN,
    "{connection}",
    "The number of connections that are currently in state described by the `state` attribute.",
    lambda r: ((r.snapshot.used, {STATE: "used"}), (r.snapshot.idle, {STATE: "idle"})),
    (STATE,),
)
TIMEOUTS = Metric(
    "db.client.connection.timeouts",
    Kind.COUNTER,
    "{timeout}",
    "The number of connection timeouts that have occurred trying to obtain a connection from the pool.",
    _one(lambda r: r.tally.timeouts),
)
WAIT = Metric(
    "db.client.connection.wait_time",
    Kind.HISTOGRAM,
    "s",
    "The time it took to obtain an open connection from the pool.",
    keys=(PATH, ERROR),
)
USE = Metric(
    "db.client.connection.use_time",
    Kind.HISTOGRAM,
    "s",
    "The time between borrowing a connection and returning it to the pool.",
)
CREATE = Metric(
    "db.client.connection.create_time",
    Kind.HISTOGRAM,
    "s",
    "The time it took to create a new connection.",
)

# Names, units and descriptions of the first nine are those of semantic conventions 1.44 (tested against them).
DB = (
    COUNT,
    Metric(
        "db.client.connection.max",
        Kind.UP_DOWN,
        "{connection}",
        "The maximum number of open connections allowed.",
        _one(lambda r: r.snapshot.max),
    ),
    Metric(
        "db.client.connection.idle.max",
        Kind.UP_DOWN,
        "{connection}",
        "The maximum number of idle open connections allowed.",
        _one(lambda r: r.snapshot.idle_max),
    ),
    Metric(
        "db.client.connection.idle.min",
        Kind.UP_DOWN,
        "{connection}",
        "The minimum number of idle open connections allowed.",
        _one(lambda r: r.snapshot.idle_min),
    ),
    Metric(
        "db.client.connection.pending_requests",
        Kind.UP_DOWN,
        "{request}",
        "The number of current pending requests for an open connection.",
        _one(lambda r: r.snapshot.pending),
    ),
    TIMEOUTS,
    WAIT,
    USE,
    CREATE,
)

TIME_IN_QUEUE = Metric(
    "http.client.request.time_in_queue",
    Kind.HISTOGRAM,
    "s",
    "The amount of time requests spent on a queue waiting for an available connection.",
    keys=(PATH, ERROR),
)
DURATION = Metric(
    "http.client.connection.duration",
    Kind.HISTOGRAM,
    "s",
    "The duration of the successfully established outbound HTTP connections.",
)

HTTP = (
    Metric(
        "http.client.open_connections",
        Kind.UP_DOWN,
        "{connection}",
        "Number of outbound HTTP connections that are currently active or idle on the client.",
        lambda r: _by_origin(
            r, lambda load: ((load.active, {HTTP_STATE: "active"}), (load.idle, {HTTP_STATE: "idle"}))
        ),
        (HTTP_STATE, *ORIGIN),
    ),
    DURATION,
    Metric(
        "http.client.active_requests",
        Kind.UP_DOWN,
        "{request}",
        "Number of active HTTP requests.",
        lambda r: _by_origin(r, lambda load: ((load.requests, {}),)),
        ORIGIN,
    ),
    TIME_IN_QUEUE,
    Metric(
        "otel_pools.connection.max",
        Kind.UP_DOWN,
        "{connection}",
        "The maximum number of open connections allowed.",
        _one(lambda r: r.snapshot.max),
    ),
    Metric(
        "otel_pools.connection.idle.max",
        Kind.UP_DOWN,
        "{connection}",
        "The maximum number of idle open connections allowed.",
        _one(lambda r: r.snapshot.idle_max),
    ),
    Metric(
        "otel_pools.connection.pending_requests",
        Kind.UP_DOWN,
        "{request}",
        "The number of requests that wait for a connection.",
        _one(lambda r: r.snapshot.pending),
    ),
    Metric(
        "otel_pools.connection.timeouts",
        Kind.COUNTER,
        "{timeout}",
        "The number of requests that waited for a connection for longer than they would.",
        _one(lambda r: r.tally.timeouts),
    ),
)


def _by_origin(reading: Reading, points: Callable[[Load], Points]) -> Points:
    for origin, load in (reading.snapshot.origins or {}).items():
        where: dict[str, str | int] = dict(zip(ORIGIN, origin, strict=True))
        for value, extra in points(load):
            yield value, {**where, **extra}


PEAK = Metric(
    "otel_pools.connection.peak",
    Kind.GAUGE,
    "{connection}",
    "The highest number of connections in use at once since the previous collection.",
    _one(lambda r: r.peak),
)
CREATED = Metric(
    "otel_pools.connection.created",
    Kind.COUNTER,
    "{connection}",
    "Connections opened.",
    _one(lambda r: r.tally.created),
)
OLDEST_WAIT = Metric(
    "otel_pools.wait.oldest",
    Kind.GAUGE,
    "s",
    "The age of the oldest request that has no connection yet.",
    _one(lambda r: r.oldest_wait),
)
OLDEST_USE = Metric(
    "otel_pools.use.oldest",
    Kind.GAUGE,
    "s",
    "The age of the oldest checkout.",
    _one(lambda r: r.oldest_use),
)

OVERDUE_NOW = Metric(
    "otel_pools.connection.overdue",
    Kind.UP_DOWN,
    "{connection}",
    "Connections that have been out for longer than the leak threshold.",
    _one(lambda r: r.overdue),
)
LEAKED = Metric(
    "otel_pools.connection.leaked",
    Kind.COUNTER,
    "{connection}",
    "Connections that were out for longer than the leak threshold, or that the garbage collector gave back.",
    lambda r: [(r.tally.leaked.get(leak, 0), {LEAK: leak}) for leak in LEAKS],
    (LEAK,),
)
INHERITED_USE = Metric(
    "otel_pools.connection.inherited",
    Kind.COUNTER,
    "{connection}",
    "Connections that were used in a process forked from the one that had opened them.",
    _one(lambda r: r.tally.inherited),
)
NESTED_CHECKOUTS = Metric(
    "otel_pools.checkout.nested",
    Kind.COUNTER,
    "{checkout}",
    "Checkouts by a thread or task that held a connection of the same pool.",
    _one(lambda r: r.tally.nested),
)

EVERY = (
    Metric(
        "otel_pools.checkouts",
        Kind.COUNTER,
        "{checkout}",
        "Attempts to obtain a connection, by the path that served them and by error.",
        _checkouts,
        (PATH, ERROR),
    ),
    Metric(
        "otel_pools.connection.overflow",
        Kind.UP_DOWN,
        "{connection}",
        "Open connections beyond the base size of the pool.",
        _one(lambda r: r.snapshot.overflow),
    ),
    Metric(
        "otel_pools.connection.overflow.max",
        Kind.UP_DOWN,
        "{connection}",
        "The maximum number of connections beyond the base size of the pool.",
        _one(lambda r: r.snapshot.overflow_max),
    ),
    PEAK,
    CREATED,
    Metric(
        "otel_pools.connection.closed",
        Kind.COUNTER,
        "{connection}",
        "Connections closed, by reason.",
        lambda r: [(count, {REASON: reason}) for reason, count in r.tally.closed.items()],
        (REASON,),
    ),
    Metric(
        "otel_pools.connection.orphaned",
        Kind.UP_DOWN,
        "{connection}",
        "Places in the pool that are occupied and owned by nobody.",
        _one(lambda r: r.snapshot.orphaned),
    ),
    OVERDUE_NOW,
    LEAKED,
    Metric(
        "otel_pools.connection.stale",
        Kind.UP_DOWN,
        "{connection}",
        "Idle connections whose server has gone, as nobody has noticed yet.",
        _one(lambda r: r.snapshot.stale),
    ),
    INHERITED_USE,
    Metric(
        "otel_pools.connection.busy_time",
        Kind.COUNTER,
        "s",
        "The time that servers worked while somebody held a connection.",
        _one(lambda r: r.tally.busy),
    ),
    NESTED_CHECKOUTS,
    Metric(
        "otel_pools.stream.count",
        Kind.UP_DOWN,
        "{stream}",
        "HTTP/2 streams in use, and requests that have a connection and wait for a stream of it.",
        lambda r: (
            (r.snapshot.streams, {STREAM_STATE: "used"}),
            (r.snapshot.streams_pending, {STREAM_STATE: "pending"}),
        ),
        (STREAM_STATE,),
    ),
    Metric(
        "otel_pools.stream.max",
        Kind.UP_DOWN,
        "{stream}",
        "The maximum number of HTTP/2 streams that the open connections allow.",
        _one(lambda r: r.snapshot.streams_max),
    ),
    Metric(
        "otel_pools.grpc.channels",
        Kind.UP_DOWN,
        "{channel}",
        "gRPC channels by the state of their connectivity; several may share one connection.",
        lambda r: [(count, {GRPC_STATE: state}) for state, count in (r.snapshot.channels or {}).items()],
        (GRPC_STATE,),
    ),
    OLDEST_WAIT,
    OLDEST_USE,
    Metric(
        "otel_pools.pools",
        Kind.UP_DOWN,
        "{pool}",
        "Live pools under this name.",
        _one(lambda r: r.pools),
    ),
    Metric(
        "otel_pools.samples.dropped",
        Kind.COUNTER,
        "{sample}",
        "Samples of ours that were lost before anybody collected them.",
        _one(lambda r: r.tally.dropped),
    ),
)

METRICS = (*DB, *HTTP, *EVERY)
_DB, _HTTP = frozenset(row.name for row in DB), frozenset(row.name for row in HTTP)


def foreign(identity: Identity) -> frozenset[str]:
    """The metrics that such a pool does not have: those of databases, or those of HTTP clients."""
    return _DB if identity.system is None else _HTTP


def pool_key(identity: Identity) -> str:
    """The attribute that holds the pool's name on spans."""
    return OUR_POOL if identity.system is None else SEMCONV_POOL


def attributes(identity: Identity, pool_key: str) -> dict[str, str | int]:
    """What every series of this pool carries; what the library cannot tell is left out."""
    return _known(
        {
            pool_key: identity.name,
            SYSTEM: identity.system,
            NAMESPACE: identity.namespace,
            ADDRESS: identity.address,
            PORT: identity.port,
        }
    )
