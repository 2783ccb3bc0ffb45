"""The nouns: who a pool is, what it says about itself, and what has happened to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple


@dataclass(frozen=True, slots=True)
class Identity:
    """
    How one pool is told apart from every other.

    Made of host, port, database and names only, because a URL never travels:
    what is not in here (user, password, query string) cannot leak from here.

    Attributes:
        library: The library the pool belongs to, as in ``sqlalchemy``.
        system: ``db.system.name``, as in ``postgresql``; None for a pool that speaks just HTTP.
        given: The name somebody gave the pool, if anybody did.
        namespace: ``db.namespace``: the database.
        address: ``server.address``: a host, a socket path, or ``a:1,b:2`` for many.
        port: ``server.port``; None where it is the system's default.
    """

    library: str
    system: str | None = None
    given: str | None = None
    namespace: str | None = None
    address: str | None = None
    port: int | None = None

    @property
    def name(self) -> str:
        """
        The pool's name, by the fallback of semantic-conventions #4097.

        Given name, else database, else server, else system, else library; a
        database that is only a number, as Redis has them, goes with its server.
        Never an id or a sequence: pools with equal names add up.
        """
        if self.namespace and self.namespace.isdigit() and self.server and not self.given:
            return f"{self.server}/{self.namespace}"
        return self.given or self.namespace or self.server or self.system or self.library

    @property
    def server(self) -> str | None:
        """``host:port``, or the host alone on its default port."""
        if self.address is None or self.port is None:
            return self.address
        return f"{self.address}:{self.port}"


class Origin(NamedTuple):
    """Where an HTTP connection goes: ``url.scheme``, ``server.address``, ``server.port``."""

    scheme: str
    address: str
    port: int


class Load(NamedTuple):
    """What one origin has of a pool: connections that are busy, those that are idle, and requests under way."""

    active: int = 0
    idle: int = 0
    requests: int = 0

    def plus(self, other: Load) -> Load:
        """Both together."""
        return Load(self.active + other.active, self.idle + other.idle, self.requests + other.requests)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """
    What a pool says about itself, read at one moment, in connections.

    None means "this library cannot tell", or "there is no such limit";
    nothing is reported for it.

    Attributes:
        used: Connections that somebody holds.
        idle: Open connections that nobody holds; idle means *an open socket*.
        max: The most that may be open at once.
        idle_max: The most that are kept open while nobody holds them.
        idle_min: The fewest that are kept open.
        pending: Requests that wait for a connection to come back.
        overflow: Open connections beyond the pool's base size.
        overflow_max: The most of those.
        orphaned: Places that are taken, and by nobody: a leaked slot.
        streams: HTTP/2 streams in use; None if there is no HTTP/2.
        streams_pending: Requests that have a connection, and wait for a stream of it.
        streams_max: The most streams its connections allow.
        origins: What each origin has of an HTTP pool.
        channels: How many gRPC channels are in which state.
        stale: Idle connections whose server has gone; None if nobody looks.
    """

    used: int | None = None
    idle: int | None = None
    max: int | None = None
    idle_max: int | None = None
    idle_min: int | None = None
    pending: int | None = None
    overflow: int | None = None
    overflow_max: int | None = None
    orphaned: int | None = None
    streams: int | None = None
    streams_pending: int | None = None
    streams_max: int | None = None
    origins: Mapping[Origin, Load] | None = None
    channels: Mapping[str, int] | None = None
    stale: int | None = None

    def __add__(self, other: Snapshot) -> Snapshot:
        """Both pools together: a number only one of them can tell is that one's."""
        return Snapshot(*(_add(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))


def _add(one: Any, other: Any) -> Any:
    if one is None or other is None:
        return other if one is None else one
    if isinstance(one, Mapping):
        return {key: _add(one.get(key), other.get(key)) for key in (*one, *other)}
    return one.plus(other) if isinstance(one, Load) else one + other


@dataclass(frozen=True, slots=True)
class Tally:
    """
    What has happened under one pool name since we first saw it.

    Attributes:
        checkouts: How many attempts, by path (idle, new, queued; None: nobody knows) and error type (None: it worked).
        timeouts: How many of them ended because the pool's own timeout did.
        created: Connections opened.
        closed: Connections closed, by reason.
        dropped: Samples we could not keep until somebody collected them.
        leaked: Connections that leaked, by how.
        nested: Checkouts by who held a connection of the same pool.
        inherited: Connections that were used in a process forked from the one that opened them.
        busy: Seconds that servers worked for who held a connection; None if nobody counts.
    """

    checkouts: Mapping[tuple[str | None, str | None], int] = field(default_factory=dict)
    timeouts: int = 0
    created: int = 0
    closed: Mapping[str, int] = field(default_factory=dict)
    dropped: int = 0
    leaked: Mapping[str, int] = field(default_factory=dict)
    nested: int = 0
    inherited: int = 0
    busy: float | None = None

    def since(self, earlier: Tally) -> Tally:
        """What has come on top of an earlier tally of the same pools."""
        return Tally(*(_less(getattr(self, f.name), getattr(earlier, f.name)) for f in fields(self)))


def _less(now: Any, before: Any) -> Any:
    if isinstance(now, Mapping):
        return {key: more for key, count in now.items() if (more := count - before.get(key, 0))}
    return now if now is None or before is None else now - before


@dataclass(frozen=True, slots=True)
class Reading:
    """
    Everything to be said about one pool name at one collection.

    Attributes:
        snapshot: All live pools of that name, added up.
        tally: What has happened under that name.
        pools: How many live pools bear it; this and the following are None when the last one is gone.
        peak: The highest ``used`` since the previous collection; None where requests share connections.
        oldest_wait: Age of the oldest request without a connection yet, in seconds.
        oldest_use: Age of the oldest checkout, in seconds.
        overdue: Connections that have been out for longer than the leak threshold; None if no pool is left.
        unreadable: Live pools that could not say anything about themselves.
    """

    snapshot: Snapshot
    tally: Tally
    pools: int | None = None
    peak: int | None = None
    oldest_wait: float | None = None
    oldest_use: float | None = None
    overdue: int | None = None
    unreadable: int = 0


@dataclass(frozen=True, slots=True)
class Holder:
    """
    Who has a connection that is out.

    Attributes:
        pool: The name of its pool.
        held_s: For how long, in seconds.
        call_site: Where the application asked for it, ``file:line function``.
        via: The library's function that it called there.
        trace_id: Of the span that was current there, in hexadecimal digits.
        span_id: Likewise.
        task: The name of the asyncio task, or of the thread, that asked.
        kind: What it is held for, where the library tells: ``pub/sub``, ``blocking``, ``reserved``, ``transaction``.
        busy_s: For how long of that the server worked, in seconds; None if nobody counts (``busy_time``).
        stack: Everything that stood below, the innermost first; empty if nobody asks for it (``stacks``).
    """

    pool: str
    held_s: float
    call_site: str | None = None
    via: str | None = None
    trace_id: str | None = None
    span_id: str | None = None
    task: str | None = None
    kind: str | None = None
    busy_s: float | None = None
    stack: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Timing:
    """
    How long something took, over all times it happened.

    Attributes:
        count: How often it happened.
        mean_s: On average, in seconds; 0 if it never happened, as all that follow.
        p50_s: Half of them took no longer. This and the next two are within 5 %.
        p95_s: 95 in 100 took no longer.
        p99_s: 99 in 100 took no longer.
        max_s: The longest.
    """

    count: int = 0
    mean_s: float = 0.0
    p50_s: float = 0.0
    p95_s: float = 0.0
    p99_s: float = 0.0
    max_s: float = 0.0


@dataclass(frozen=True, slots=True)
class PoolStats:
    """
    Everything that can be said of the pools of one name: what they are now, and what has happened since a moment.

    Numbers are of connections unless said otherwise. None means that the
    library cannot tell, or that there is no such limit.

    Attributes:
        name: As it stands in the metrics.
        library: As in ``sqlalchemy``.
        system: ``db.system.name``; None for a pool that speaks just HTTP.
        server_address: ``server.address``.
        server_port: ``server.port``; None where it is the system's default.
        namespace: ``db.namespace``.
        pools: Live pools of this name.
        unreadable: Of these, those that could not be read: something is wrong with them, or with us.
        config: How the pool is set up, in the library's own words; of several of one name, the first.
        used: Held by somebody.
        idle: Open, and held by nobody.
        max: The most that may be open.
        idle_max: The most that are kept open while nobody holds them.
        overflow: Open beyond the base size.
        overflow_max: The most of those.
        pending: Requests that wait for one to come back.
        peak: The highest ``used`` since ``since``.
        utilization: ``used`` as a part of ``max``, 0 to 1.
        checkouts: Attempts.
        paths: Successful attempts by path (``idle``, ``new``, ``queued``).
        errors: Failed attempts by ``error.type``.
        last_error_s: How long ago the last failed attempt of each ``error.type`` was, resets regardless.
        timeouts: Of the failed attempts, those that the pool's own timeout ended.
        created: Opened.
        closed: Closed, by reason.
        wait: Seconds until a checkout was served, or given up.
        use: Seconds that connections were held.
        create: Seconds that opening took.
        rate_per_s: Attempts per second since ``since``.
        busiest_per_s: The same in the busiest 10 seconds or more between two looks; None if nobody has looked twice.
        oldest_wait_s: How long the one who waits longest has waited by now.
        oldest_use_s: Likewise of who holds.
        overdue: Out for longer than the leak threshold.
        leaked: Those that leaked, by how.
        orphaned: Places that are taken, and by nobody.
        nested: Checkouts by who held a connection of the same pool.
        inherited: Used in a process forked from the one that opened them.
        busy_s: Seconds that servers worked for who held one; None if nobody counts (``busy_time``).
        stale: Idle ones whose server has gone; None if nobody looks (``poll_idle``).
        streams: HTTP/2 or gRPC streams in use.
        streams_pending: Requests that wait for a stream.
        streams_max: The most streams.
        channels: gRPC channels by state.
        since: When the counting began, in seconds since the epoch.
    """

    name: str
    library: str
    system: str | None = None
    server_address: str | None = None
    server_port: int | None = None
    namespace: str | None = None
    pools: int = 0
    unreadable: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    used: int | None = None
    idle: int | None = None
    max: int | None = None
    idle_max: int | None = None
    overflow: int | None = None
    overflow_max: int | None = None
    pending: int | None = None
    peak: int | None = None
    utilization: float | None = None
    checkouts: int = 0
    paths: Mapping[str, int] = field(default_factory=dict)
    errors: Mapping[str, int] = field(default_factory=dict)
    last_error_s: Mapping[str, float] = field(default_factory=dict)
    timeouts: int = 0
    created: int = 0
    closed: Mapping[str, int] = field(default_factory=dict)
    wait: Timing = field(default_factory=Timing)
    use: Timing = field(default_factory=Timing)
    create: Timing = field(default_factory=Timing)
    rate_per_s: float = 0.0
    busiest_per_s: float | None = None
    oldest_wait_s: float | None = None
    oldest_use_s: float | None = None
    overdue: int | None = None
    leaked: Mapping[str, int] = field(default_factory=dict)
    orphaned: int | None = None
    nested: int = 0
    inherited: int = 0
    busy_s: float | None = None
    stale: int | None = None
    streams: int | None = None
    streams_pending: int | None = None
    streams_max: int | None = None
    channels: Mapping[str, int] | None = None
    since: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class PoolHealth:
    """
    How one pool is.

    Attributes:
        pool: Its name.
        status: ``healthy``, ``degraded``, ``critical`` or ``error`` (cannot tell).
        ready: Whether it can serve: false only on harm, never for a full pool alone.
        reasons: Why, in words; none if all is well.
        utilization: 0 to 1; None if there is no limit.
    """

    pool: str
    status: str
    ready: bool
    reasons: tuple[str, ...] = ()
    utilization: float | None = None


@dataclass(frozen=True, slots=True)
class HealthReport:
    """
    How all pools are.

    Attributes:
        status: The worst of theirs; ``healthy`` if there is none.
        ready: Whether all of them are.
        pools: Each of them, the worst first.
        timestamp: When, in seconds since the epoch.
    """

    status: str
    ready: bool
    pools: tuple[PoolHealth, ...]
    timestamp: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Advice:
    """
    Something to change, and why.

    Attributes:
        pool: The name of the pool.
        kind: What it is about, as in ``too_small``; one word per rule.
        severity: ``high``, ``medium`` or ``low``.
        issue: What is wrong, in one sentence with the figures.
        suggestion: What to do, in one sentence.
        settings: The settings to change, in the library's own words, as in ``{"pool_size": 12, "max_overflow": 8}``.
        evidence: The figures it rests on.
    """

    pool: str
    kind: str
    severity: str
    issue: str
    suggestion: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    evidence: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)
