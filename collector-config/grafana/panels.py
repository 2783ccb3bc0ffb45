"""The four dashboards as tables: what each panel asks, how it is read, and what to do about it."""

# ruff: noqa: INP001  # a script's neighbour, and no package

from __future__ import annotations

from dataclasses import dataclass

from promql import (
    INSTANCE,
    RATE,
    highest,
    idle,
    label,
    limit,
    of,
    quantile,
    server,
    share,
    timeouts,
    total,
    used,
    waiting,
)

from otel_pools._vocabulary import (
    CREATE,
    DURATION,
    ERROR,
    GRPC_STATE,
    HTTP_STATE,
    LEAK,
    PATH,
    REASON,
    SCHEME,
    STATE,
    STREAM_STATE,
    SYSTEM,
    TIME_IN_QUEUE,
    USE,
    WAIT,
)

COUNT, SECONDS, SHARE, PER_SECOND = "short", "s", "percentunit", "cps"
WAITED = "The line's dots are exemplars: click one for the trace of that wait, which links to who held the connections."


@dataclass(frozen=True)
class Query:
    """
    One question of a panel.

    Attributes:
        expr: PromQL.
        legend: Grafana's pattern for the name of each line.
        exemplar: Whether to show samples that lead to their traces.
    """

    expr: str
    legend: str
    exemplar: bool = False


@dataclass(frozen=True)
class Chart:
    """
    One panel.

    Attributes:
        title: A few words.
        advice: What it shows, and what to do if it looks bad.
        queries: In the order of their letters.
        unit: In Grafana's words.
        steps: From which value on it is worth a look (yellow), and from which it is bad (red); None is never.
        kind: Of panel: ``timeseries``, ``stat`` or ``table``.
        width: Of 24 columns.
        stacked: Whether the lines add up.
    """

    title: str
    advice: str
    queries: tuple[Query, ...]
    unit: str = COUNT
    steps: tuple[float | None, float | None] = (None, None)
    kind: str = "timeseries"
    width: int = 8
    stacked: bool = False


@dataclass(frozen=True)
class Board:
    """
    One dashboard.

    Attributes:
        name: Of its file, and the end of its uid.
        rows: Charts under a heading.
        one_pool: Whether it is about one pool, and not about any number.
        servers: Whether it looks at the servers' own numbers too.
    """

    name: str
    title: str
    description: str
    rows: tuple[tuple[str, tuple[Chart, ...]], ...]
    one_pool: bool = False
    servers: bool = False

    @property
    def charts(self) -> tuple[Chart, ...]:
        """Of all rows."""
        return tuple(chart for _, charts in self.rows for chart in charts)


def lines(expr: str, *by: str, exemplar: bool = False) -> tuple[Query, ...]:
    """One line for each pool of each job, and whatever else."""
    names = " ".join(f"{{{{{key}}}}}" for key in ("pool", *by))
    return (Query(expr, f"{names} ({{{{job}}}})", exemplar),)


def number(expr: str) -> tuple[Query, ...]:
    """One number."""
    return (Query(expr, ""),)


FAILED = of("otel_pools.checkouts", window=RATE, **{label(ERROR): '!=""'})
DONE = of("otel_pools.checkouts", window=RATE, **{label(ERROR): '=""'})
CREATED = of("otel_pools.connection.created", window=RATE)
CLOSED = of("otel_pools.connection.closed", window=RATE)
OVERDUE, ORPHANED = of("otel_pools.connection.overdue"), of("otel_pools.connection.orphaned")
LEAKED = of("otel_pools.connection.leaked", window=RATE)
OLDEST_WAIT, OLDEST_USE = of("otel_pools.wait.oldest"), of("otel_pools.use.oldest")
PEAK = of("otel_pools.connection.peak")
STREAMS = of("otel_pools.stream.count", **{label(STREAM_STATE): '="used"'})
STREAMS_WAITING = of("otel_pools.stream.count", **{label(STREAM_STATE): '="pending"'})
STREAM_LIMIT = of("otel_pools.stream.max")
# Little's law: how many are in use on average is how many are taken a second, times for how long.
HELD = total(of(USE.name, "sum", RATE))

OVERVIEW = Board(
    "overview",
    "Connection pools: the fleet",
    "Which pool of which service is in trouble? Begin here; the pool's own dashboard says why.",
    (
        (
            "Now",
            (
                Chart(
                    "Fullest pool",
                    "Of all pools with a limit, on its fullest instance. Full alone is no harm; full with requests "
                    "that wait is: look at 'Waiting' next.",
                    number(f"max({share(used(), limit())})"),
                    SHARE,
                    (0.8, 0.95),
                    "stat",
                    4,
                ),
                Chart(
                    "Waiting",
                    "Requests that wait for a connection at this moment. If it stays above 0, somebody holds "
                    "connections for too long, or the pool is too small: open the dashboard of that pool.",
                    number(f"sum({waiting()})"),
                    COUNT,
                    (1, 10),
                    "stat",
                    4,
                ),
                Chart(
                    "Oldest wait",
                    "It grows while something hangs, when no histogram says anything yet. Beyond the pool's timeout "
                    "requests fail.",
                    number(f"max({OLDEST_WAIT})"),
                    SECONDS,
                    (1, 5),
                    "stat",
                    4,
                ),
                Chart(
                    "Failed checkouts",
                    "Requests a second that got no connection. 0 if none ever failed: the series begins with the "
                    "first failure.",
                    number(f"sum({FAILED}) or vector(0)"),
                    PER_SECOND,
                    (0.001, 1),
                    "stat",
                    4,
                ),
                Chart(
                    "Overdue",
                    "Connections that have been out for longer than the leak threshold (60 s unless set). The log "
                    "of 'otel_pools' names the line that borrowed each.",
                    number(f"sum({OVERDUE})"),
                    COUNT,
                    (1, 5),
                    "stat",
                    4,
                ),
                Chart(
                    "Lost places",
                    "Places in pools that are taken and in nobody's hands. They come back only with a restart: "
                    "restart, then look for cancelled requests, and update the library.",
                    number(f"sum({ORPHANED})"),
                    COUNT,
                    (1, 2),
                    "stat",
                    4,
                ),
            ),
        ),
        (
            "Saturation",
            (
                Chart(
                    "How full",
                    "Connections in use as a share of the limit, on the fullest instance of each pool. Above 80 % "
                    "for minutes: shorten how long connections are held before you make the pool larger.",
                    lines(share(used(), limit())),
                    SHARE,
                    (0.8, 0.95),
                ),
                Chart(
                    "How full at the worst moment",
                    "The peak since the previous export: a look every few seconds misses bursts. Peaks of 100 % "
                    "while the line to the left is low are bursts: spread them, or allow for them.",
                    lines(share(PEAK, limit())),
                    SHARE,
                    (0.8, 1),
                ),
                Chart(
                    "Requests waiting",
                    "By pool. Waits on a pool that is not full are waits for connections being opened: look at "
                    "'Opened and closed'.",
                    lines(total(waiting())),
                    COUNT,
                    (1, 10),
                ),
                Chart(
                    "Wait, 95th percentile",
                    "Nineteen in twenty requests had their connection within this time. Below 10 ms is healthy. "
                    + WAITED,
                    lines(quantile(0.95, WAIT.name), exemplar=True),
                    SECONDS,
                    (0.01, 0.05),
                ),
                Chart(
                    "Oldest wait",
                    "The age of whoever has waited longest. A line that rises at 45 degrees is a pool that hangs: "
                    "ask 'otel_pools.holders()', or the spans 'acquire', who holds the connections.",
                    lines(highest(OLDEST_WAIT)),
                    SECONDS,
                    (1, 5),
                ),
                Chart(
                    "Oldest use",
                    "The age of the connection that has been out for longest. A line that rises for ever is a leak, "
                    "a stuck query, or a connection held on purpose (pub/sub).",
                    lines(highest(OLDEST_USE)),
                    SECONDS,
                    (30, 60),
                ),
            ),
        ),
        (
            "Traffic and errors",
            (
                Chart(
                    "Checkouts",
                    "Connections borrowed a second. If it falls while 'Requests waiting' rises, the pool is the brake.",
                    lines(total(DONE)),
                    PER_SECOND,
                ),
                Chart(
                    "Failures",
                    "By cause: timeout (waited in vain), exhausted (refused at once), connect_error (the server), "
                    "cancelled (the caller gave up).",
                    lines(total(FAILED, label(ERROR)), label(ERROR)),
                    PER_SECOND,
                    (0.001, 1),
                ),
                Chart(
                    "Opened and closed",
                    "Churn, a second. A healthy pool opens few. Opening at the rate of checkouts means that nothing "
                    "is kept: a pool that keeps none, a server or proxy that hangs up, or a client made per request.",
                    (
                        Query(total(CREATED), "{{pool}} opened ({{job}})"),
                        Query(total(CLOSED), "{{pool}} closed ({{job}})"),
                    ),
                    PER_SECOND,
                ),
                Chart(
                    "Leaks",
                    "Connections overdue now, and leaks a second by kind: 'collected' was dropped and given back by "
                    "the garbage collector. The log names the line.",
                    (
                        Query(total(OVERDUE), "{{pool}} overdue now ({{job}})"),
                        Query(total(LEAKED, label(LEAK)), f"{{{{pool}}}} {{{{{label(LEAK)}}}}} ({{{{job}}}})"),
                    ),
                    COUNT,
                    (1, 5),
                ),
                Chart(
                    "Pools of one name",
                    "More than one per instance where you expect one: a new client or engine for each request. Keep "
                    "one.",
                    lines(highest(of("otel_pools.pools"))),
                    COUNT,
                    (10, 100),
                ),
                Chart(
                    "Instances that report, and samples lost",
                    "If a line of instances falls without a deployment, telemetry is missing, not trouble. Lost "
                    "samples are missing in the histograms: export more often.",
                    (
                        Query(
                            f"count by (job) (sum by (job, instance) ({of('otel_pools.pools')}))", "{{job}}: instances"
                        ),
                        Query(
                            f"sum by (job) ({of('otel_pools.samples.dropped', window=RATE)})",
                            "{{job}}: samples lost a second",
                        ),
                    ),
                ),
            ),
        ),
        (
            "Every pool",
            (
                Chart(
                    "Pools",
                    "In use, limit, waiting, 95th percentile of the wait (s), timeouts a second, oldest use (s). "
                    "Sort by a column; a pool's name leads to its dashboard.",
                    (
                        Query(total(used()), "in use"),
                        Query(total(limit()), "limit"),
                        Query(total(waiting()), "waiting"),
                        Query(quantile(0.95, WAIT.name), "wait p95"),
                        Query(total(timeouts()), "timeouts/s"),
                        Query(highest(OLDEST_USE), "oldest use"),
                    ),
                    kind="table",
                    width=24,
                ),
            ),
        ),
    ),
)

ONE_POOL = Board(
    "pool",
    "Connection pools: one pool",
    "Why do requests wait for this pool, who holds its connections, and how large should it be?",
    (
        (
            "Now",
            (
                Chart(
                    "In use",
                    "Of the limit, on the fullest instance.",
                    number(f"max({share(used(), limit())})"),
                    SHARE,
                    (0.8, 0.95),
                    "stat",
                    6,
                ),
                Chart(
                    "Waiting",
                    "Requests without a connection. Above 0 for long: read the row 'Waiting' below.",
                    number(f"sum({waiting()})"),
                    COUNT,
                    (1, 10),
                    "stat",
                    6,
                ),
                Chart(
                    "Oldest use",
                    "If this is minutes and nobody holds a connection on purpose, it is a leak or a stuck query.",
                    number(f"max({OLDEST_USE})"),
                    SECONDS,
                    (30, 60),
                    "stat",
                    6,
                ),
                Chart(
                    "Timeouts",
                    "Requests a second that waited in vain; users saw an error.",
                    number(f"sum({timeouts()})"),
                    PER_SECOND,
                    (0.001, 1),
                    "stat",
                    6,
                ),
            ),
        ),
        (
            "Size",
            (
                Chart(
                    "Connections",
                    "In use and idle, over all chosen instances, below the limit. Much idle at all times: the pool, or "
                    "what it keeps, may be smaller.",
                    (
                        Query(total(used()), "in use ({{job}})"),
                        Query(total(idle()), "idle ({{job}})"),
                        Query(total(limit()), "limit ({{job}})"),
                    ),
                    width=8,
                ),
                Chart(
                    "How many are needed",
                    "Little's law: checkouts a second times the time each is held is how many are in use on average. "
                    "Peak far above the average: bursts. Average near the limit: hold for less time, or add 20 % and "
                    "measure again. Pools of gRPC calls tell no times.",
                    (
                        Query(HELD, "average in use ({{job}})"),
                        Query(total(PEAK), "peak ({{job}})"),
                        Query(total(limit()), "limit ({{job}})"),
                    ),
                ),
                Chart(
                    "Overflow",
                    "Connections beyond the base size (SQLAlchemy), and how many may be. In use all day: the base "
                    "size is too small, and each of these is opened and closed for one use.",
                    (
                        Query(total(of("otel_pools.connection.overflow")), "overflow ({{job}})"),
                        Query(total(of("otel_pools.connection.overflow.max")), "limit ({{job}})"),
                    ),
                ),
                Chart(
                    "In use by instance",
                    "One instance far above the others: uneven load, or a leak in that process.",
                    lines(total(used(), INSTANCE), INSTANCE),
                    width=12,
                ),
                Chart(
                    "Busy while held",
                    "The server's work as a share of the time that connections are held (needs busy_time, "
                    "SQLAlchemy). Low: "
                    "connections are held while the program does other things; give them back sooner.",
                    lines(f"{total(of('otel_pools.connection.busy_time', window=RATE))} / {HELD}"),
                    SHARE,
                    width=12,
                ),
            ),
        ),
        (
            "Waiting",
            (
                Chart(
                    "Wait",
                    "Half, nineteen in twenty, and 99 in 100 requests had a connection within this time. " + WAITED,
                    tuple(
                        Query(quantile(one, WAIT.name), f"p{one * 100:.0f} ({{{{job}}}})", exemplar=True)
                        for one in (0.5, 0.95, 0.99)
                    ),
                    SECONDS,
                    (0.01, 0.05),
                ),
                Chart(
                    "Wait by path",
                    "95th percentile: 'idle' found a connection, 'new' opened one, 'queued' waited for another to be "
                    "given back. Slow 'new': the server or the network. Slow 'queued': who holds them.",
                    lines(quantile(0.95, WAIT.name, label(PATH)), label(PATH), exemplar=True),
                    SECONDS,
                    (0.01, 0.05),
                ),
                Chart(
                    "Waiting now, and the oldest",
                    "These move while something hangs. Both rising and nothing given back: everybody waits for "
                    "everybody, look at 'Mistakes'.",
                    (
                        Query(total(waiting()), "requests ({{job}})"),
                        Query(highest(OLDEST_WAIT), "oldest wait, s ({{job}})"),
                    ),
                ),
                Chart(
                    "Use",
                    "For how long connections are held. This, times the rate, is the size that the pool needs: make "
                    "it shorter first.",
                    tuple(
                        Query(quantile(one, USE.name), f"p{one * 100:.0f} ({{{{job}}}})") for one in (0.5, 0.95, 0.99)
                    ),
                    SECONDS,
                    (1, 10),
                ),
                Chart(
                    "Opening a connection",
                    "TCP, TLS and login. Slow: the server is short of CPU, DNS, or the network; keep more idle ones.",
                    tuple(Query(quantile(one, CREATE.name), f"p{one * 100:.0f} ({{{{job}}}})") for one in (0.5, 0.95)),
                    SECONDS,
                    (0.1, 1),
                ),
                Chart(
                    "Oldest use by instance",
                    "The instance with the line that rises is the one to ask 'otel_pools.holders()'.",
                    lines(highest(OLDEST_USE, INSTANCE), INSTANCE),
                    SECONDS,
                    (30, 60),
                ),
            ),
        ),
        (
            "Mistakes",
            (
                Chart(
                    "Checkouts by path",
                    "'queued' of more than a few percent: too few connections, or held for too long. 'new' most of "
                    "the time: too few are kept.",
                    lines(total(DONE, label(PATH)), label(PATH)),
                    PER_SECOND,
                    stacked=True,
                ),
                Chart(
                    "Failures",
                    "timeout: waited in vain. exhausted: refused at once, as pools that do not wait do. connect_error: "
                    "the server or the way to it. cancelled: the caller gave up.",
                    lines(total(FAILED, label(ERROR)), label(ERROR)),
                    PER_SECOND,
                    (0.001, 1),
                ),
                Chart(
                    "Closed, by reason",
                    "'recycle' in waves: all were opened together, and are replaced together. 'invalidated', "
                    "'pre_ping', 'server': somebody hangs up on idle connections; recycle before that. 'error': "
                    "look at the log.",
                    lines(total(CLOSED, label(REASON)), label(REASON)),
                    PER_SECOND,
                ),
                Chart(
                    "Leaks",
                    "Overdue now, and leaks a second by kind. The log of 'otel_pools' names the line that borrowed.",
                    (
                        Query(total(OVERDUE), "overdue now ({{job}})"),
                        Query(total(LEAKED, label(LEAK)), f"{{{{{label(LEAK)}}}}} ({{{{job}}}})"),
                    ),
                    COUNT,
                    (1, 5),
                    width=6,
                ),
                Chart(
                    "Lost places and stale connections",
                    "Lost: taken and in nobody's hands; restart. Stale: idle, but the server has hung up (needs "
                    "poll_idle); the next "
                    "request that gets it fails, unless the pool tests connections (pre-ping, health check).",
                    (
                        Query(total(ORPHANED), "lost ({{job}})"),
                        Query(total(of("otel_pools.connection.stale")), "stale ({{job}})"),
                    ),
                    COUNT,
                    (1, 5),
                    width=6,
                ),
                Chart(
                    "Nested and inherited",
                    "Nested: asked for a second connection while holding one; if all do so at once, nobody gets one. "
                    "Inherited: used in a forked process; call engine.dispose(close=False) in the child.",
                    (
                        Query(total(of("otel_pools.checkout.nested", window=RATE)), "nested/s ({{job}})"),
                        Query(total(of("otel_pools.connection.inherited", window=RATE)), "inherited/s ({{job}})"),
                    ),
                    PER_SECOND,
                    (0.001, 1),
                    width=6,
                ),
                Chart(
                    "Opened",
                    "Connections opened a second. A stripe at regular times is a recycle of all at once.",
                    lines(total(CREATED)),
                    PER_SECOND,
                    width=6,
                ),
            ),
        ),
    ),
    one_pool=True,
)

CALLS_WAITING = of("db.client.connection.pending_requests", **{label(SYSTEM): '="qdrant"'})
ORIGIN = tuple(label(key) for key in ("server.address", "server.port", SCHEME))
STREAM_BOARD = Board(
    "streams",
    "Connection pools: HTTP/2 and gRPC",
    "Where saturation hides: many requests share one connection, and wait inside it, where no pool sees them.",
    (
        (
            "Streams",
            (
                Chart(
                    "Fullest connection set",
                    "Streams in use, as a share of what the open connections allow. At 100 % requests wait inside "
                    "the connection: raise the server's limit of concurrent streams, or use several clients.",
                    number(f"max({share(STREAMS, STREAM_LIMIT)})"),
                    SHARE,
                    (0.8, 0.95),
                    "stat",
                    6,
                ),
                Chart(
                    "Waiting for a stream",
                    "Requests that have a connection and wait for a stream of it. The pool's own queue is empty "
                    "meanwhile.",
                    number(f"sum({STREAMS_WAITING})"),
                    COUNT,
                    (1, 10),
                    "stat",
                    6,
                ),
                Chart(
                    "gRPC calls waiting",
                    "Calls queued inside gRPC. Raise the server's limit of concurrent streams, or spread the calls "
                    "over clients "
                    "in several processes.",
                    number(f"sum({CALLS_WAITING})"),
                    COUNT,
                    (1, 10),
                    "stat",
                    6,
                ),
                Chart(
                    "Requests under way",
                    "HTTP requests sent or queued at this moment, over all origins.",
                    number(f"sum({of('http.client.active_requests')})"),
                    COUNT,
                    kind="stat",
                    width=6,
                ),
                Chart(
                    "Streams in use and waiting",
                    "'used' flat at the limit, 'pending' above 0: the limit of the server's connection is the brake, "
                    "not your pool.",
                    (
                        *lines(total(of("otel_pools.stream.count"), label(STREAM_STATE)), label(STREAM_STATE)),
                        Query(total(STREAM_LIMIT), "{{pool}} limit ({{job}})"),
                    ),
                    width=12,
                ),
                Chart(
                    "How full",
                    "Streams in use as a share of what is allowed, on the fullest instance.",
                    lines(share(STREAMS, STREAM_LIMIT)),
                    SHARE,
                    (0.8, 0.95),
                    width=12,
                ),
            ),
        ),
        (
            "HTTP connections",
            (
                Chart(
                    "Open connections by origin",
                    "Active and idle. Many for one origin under HTTP/2: each came of its own client; share one client.",
                    lines(
                        total(of("http.client.open_connections"), label(HTTP_STATE), *ORIGIN),
                        label(HTTP_STATE),
                        *ORIGIN[:2],
                    ),
                ),
                Chart(
                    "Requests by origin",
                    "Under way at this moment. One origin that grows is slow: set a timeout for it, or a client of "
                    "its own.",
                    lines(total(of("http.client.active_requests"), *ORIGIN), *ORIGIN[:2]),
                ),
                Chart(
                    "Queue for a connection, 95th percentile",
                    "Time in the pool's own queue. Waits for an HTTP/2 stream are not in it. " + WAITED,
                    lines(
                        f"histogram_quantile(0.95, {total(of(TIME_IN_QUEUE.name, 'bucket', RATE, ('le',)), 'le')})",
                        exemplar=True,
                    ),
                    SECONDS,
                    (0.01, 0.05),
                ),
                Chart(
                    "How long connections live",
                    "Median, of those closed. Seconds where you expect minutes: the server or a proxy closes early, "
                    "or a client "
                    "is made per request.",
                    lines(quantile(0.5, DURATION.name)),
                    SECONDS,
                ),
                Chart(
                    "Closed, by reason",
                    "'goaway': the server asks HTTP/2 clients to leave, as in a deployment. 'server': it hung up. "
                    "'evicted': more "
                    "than are kept, raise max_keepalive_connections.",
                    lines(
                        total(
                            f"{CLOSED} and on (job, instance, pool) {of('http.client.open_connections')}", label(REASON)
                        ),
                        label(REASON),
                    ),
                    PER_SECOND,
                ),
                Chart(
                    "Waiting in the pool",
                    "Requests for which there is no connection. Raise max_connections, or read answers to their end "
                    "and close "
                    "them: an answer left open keeps its connection.",
                    lines(total(of("otel_pools.connection.pending_requests"))),
                    COUNT,
                    (1, 10),
                ),
            ),
        ),
        (
            "gRPC",
            (
                Chart(
                    "Channels by state",
                    "'ready' and 'idle' are healthy. 'transient_failure': the server cannot be reached, look at its "
                    "address, "
                    "TLS and deployment.",
                    lines(total(of("otel_pools.grpc.channels"), label(GRPC_STATE)), label(GRPC_STATE)),
                    width=12,
                    stacked=True,
                ),
                Chart(
                    "Calls waiting",
                    "Inside gRPC, by pool. Above 0 means more calls than the connection's streams.",
                    lines(total(CALLS_WAITING)),
                    COUNT,
                    (1, 10),
                    width=12,
                ),
            ),
        ),
    ),
)


def of_system(system: str, state: str = ".*") -> str:
    """Connections that all clients together have open to servers of a system."""
    only = {label(SYSTEM): f'="{system}"', label(STATE): f'=~"{state}"'}
    return f"sum({of('db.client.connection.count', **only)})"


POSTGRES, REDIS = {label(SYSTEM): '="postgresql"'}, {label(SYSTEM): '="redis"'}
BACKENDS, BACKEND_LIMIT = f"sum({server('postgresql.backends')})", f"sum({server('postgresql.connection.max')})"
SERVER_BOARD = Board(
    "servers",
    "Connection pools: client beside server",
    "Do our numbers and the server's agree, and can the server bear all pools at once? Needs the Collector's "
    "postgresql and redis receivers.",
    (
        (
            "PostgreSQL",
            (
                Chart(
                    "Budget",
                    "What all pools may open together, as a share of the server's max_connections. Above 80 %: "
                    "smaller pools, fewer "
                    "processes, or PgBouncer, before the next deployment doubles the processes for a minute.",
                    number(f"sum({of('db.client.connection.max', **POSTGRES)}) / {BACKEND_LIMIT}"),
                    SHARE,
                    (0.8, 1),
                    "stat",
                    8,
                ),
                Chart(
                    "Server in use",
                    "Backends as a share of max_connections; a few are kept for superusers. Above 90 % new "
                    "connections will be "
                    "refused soon: close idle clients first.",
                    number(f"{BACKENDS} / {BACKEND_LIMIT}"),
                    SHARE,
                    (0.8, 0.9),
                    "stat",
                    8,
                ),
                Chart(
                    "Not ours",
                    "Backends beyond what our pools have open: other clients, the server's own workers, or "
                    "connections that a "
                    "client lost. Below 0: a pooler is in between, or we see only some of the processes.",
                    number(f"{BACKENDS} - {of_system('postgresql')}"),
                    COUNT,
                    kind="stat",
                    width=8,
                ),
                Chart(
                    "Connections, client and server",
                    "What our pools have open, and what the server counts. They should move together; a gap that "
                    "grows is a leak "
                    "that no pool knows of.",
                    (
                        Query(of_system("postgresql", "used"), "client: in use"),
                        Query(of_system("postgresql"), "client: open"),
                        Query(BACKENDS, "server: backends"),
                        Query(BACKEND_LIMIT, "server: limit"),
                    ),
                    width=24,
                ),
            ),
        ),
        (
            "Redis and Valkey",
            (
                Chart(
                    "Connections, client and server",
                    "What our pools have open, and what the server counts. A gap that grows: clients that are gone "
                    "and not closed "
                    "(timeout in the server's configuration), or processes that we do not see.",
                    (
                        Query(of_system("redis", "used"), "client: in use"),
                        Query(of_system("redis"), "client: open"),
                        Query(f"sum({server('redis.clients.connected')})", "server: connected"),
                        Query(f"sum({server('redis.clients.blocked')})", "server: blocked"),
                    ),
                    width=12,
                ),
                Chart(
                    "Opened and refused",
                    "Connections a second: opened by our pools, accepted by the server, refused because of "
                    "maxclients. Accepted far "
                    "above ours: somebody connects for each command.",
                    (
                        Query(
                            f"sum({of('otel_pools.connection.created', window=RATE, **REDIS)})",
                            "client: opened",
                        ),
                        Query(f"sum({server('redis.connections.received', RATE)})", "server: accepted"),
                        Query(f"sum({server('redis.connections.rejected', RATE)})", "server: refused"),
                    ),
                    PER_SECOND,
                    width=12,
                ),
            ),
        ),
    ),
    servers=True,
)

BOARDS = (OVERVIEW, ONE_POOL, STREAM_BOARD, SERVER_BOARD)
