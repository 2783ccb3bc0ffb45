"""What to change about a pool, and why: one rule for each mistake, judged by what was measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from math import ceil
from typing import Any, NamedTuple

from . import _vocabulary as words
from ._model import Advice, Holder, PoolStats
from ._sizing import load, load_behind, mean_wait, size_for, variability, wait_quantile, waits

HIGH, MEDIUM, LOW = SEVERITIES = ("high", "medium", "low")

# -- how much must have been seen before a rule speaks -----------------------------------

CHECKOUTS = 100
SECONDS = 5.0
MINUTE = 60.0
FEW = 3  # of what the start of an application may do once or twice
WAITERS = 20  # whoever had to wait, before we say that too many do
MANY_CHECKOUTS = 1000  # for what is rare, and for what never happened
LONG = 600.0  # seconds: no pool is too large before its next busy time may have come
SOME = 10  # of an event that happens once in a while by itself

# -- and how bad it must be --------------------------------------------------------------

TOO_MANY = 2.0  # times the wanted wait probability: what chance does to a pool of the right size is below
SLIGHTLY = 1.05  # times as much
PEAK = 10.0  # the same in the busiest time alone, where it is predicted and not measured
OFTEN = 0.2  # of the checkouts: an overflow connection that is used so often should stay
SELDOM = 0.1  # of the checkouts at the busiest time may use the overflow that we advise
SPARE = 2  # times the most that were ever in use: a pool may be as large
SAVES = 10  # connections at least, or a smaller pool is not worth the change
SMALLEST = 5  # no pool is advised to be smaller
STRAINED = 0.8  # of its connections in use: none is to spare
SLOW = 0.1  # seconds to wait, and somebody notices
HANDSHAKE = 0.01  # seconds to connect: over a network, or encrypted
AT_WORK = 1 / 3  # of the time they are held, connections should be used
CHURN = 0.5  # connections opened for each checkout
PATIENCE = 0.8  # of the pool's timeout; if nobody ever waited for that long, callers give up earlier
RECENT = 300.0  # seconds since the last error: it goes on
CROWD = 10  # pools of one name
BUSY = 10.0  # requests per second
UNLIMITED_PEAK = 10  # connections at once, of a pool without a limit
FREE = 0.9  # of what the server allows: the rest is for administrators and for other programs

PGBOUNCER = 6432
TIMEOUTS = (1, 2, 3, 5, 10, 15, 20, 30, 60)  # seconds, as people write them
RECYCLE = 1800  # seconds

# -- the words of the libraries ----------------------------------------------------------

SIZE = dict.fromkeys(("redis", "valkey", "httpx", "qdrant"), "max_connections")
WHERE = {
    "sqlalchemy": "create_engine({})",
    "redis": "Redis({})",
    "valkey": "Valkey({})",
    "httpx": "httpx.Limits({})",
    "qdrant": "QdrantClient(limits=httpx.Limits({}))",
}
REDIS_POOLS = ("ConnectionPool", "BlockingConnectionPool")  # the classes that a user makes himself
DEFAULT_SIZE = {"sqlalchemy": 15, "redis": 100, "valkey": 100, "httpx": 100, "qdrant": 100}
GIVE_BACK = {
    "sqlalchemy": "use `with engine.connect() as connection:` (or `with Session() as session:`)",
    "redis": "use `with` for pipelines, pub/sub and single-connection clients",
    "valkey": "use `with` for pipelines, pub/sub and single-connection clients",
    "httpx": "use `with client.stream(...) as response:`, or close the response",
}
MEND = {
    "redis": "redis-py 8.1 loses none after a failover; until then only a new pool has them back",
    "httpx": "httpcore up to 1.0.9 loses them when a connect is cancelled (httpcore2 does not);"
    " until then only a new client has them back",
}
AFTER_FORK = {"sqlalchemy": "call `engine.dispose(close=False)` first thing in the new process"}
OTHERWISE = (None, "redis", "qdrant")  # systems to whom the limit of a database does not apply
LOCAL = ("localhost", "127.0.0.1")


class Budget(NamedTuple):
    """
    What a server allows, and what all instances of the application together may open there.

    Attributes:
        instances: How many instances of the application there are.
        limit: The most connections that the server allows.
        claim: The most that the pools of all instances open there.
        share: How many of them this pool may have in one instance, if all are to fit.
    """

    instances: int
    limit: int
    claim: int
    share: int


class Finding(NamedTuple):
    """What a rule has to say of one pool; its fields are those of `Advice`."""

    severity: str
    issue: str
    suggestion: str
    settings: Mapping[str, Any]
    evidence: Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """
    One pool, and what a rule may ask of it.

    Pools of one name share its load evenly; sizes and loads are those of one of them.

    Attributes:
        pool: What was measured.
        holders: Who has its connections, who has held longest first.
        wait_probability: Which part of the checkouts may have to wait.
        budget: What its server allows, if somebody says.
    """

    pool: PoolStats
    holders: Sequence[Holder]
    wait_probability: float
    budget: Budget | None = None

    def __repr__(self) -> str:
        return f"<Case {self.pool.name} [{self.pool.checkouts} checkouts, load {self.load:.3g} of {self.size}]>"

    @property
    def each(self) -> int:
        """How many pools share the name."""
        return max(self.pool.pools, 1)

    @property
    def is_redis(self) -> bool:
        """Whether it is of redis-py, or of valkey-py, which is the same."""
        return self.pool.library in {"redis", "valkey"}

    @property
    def size(self) -> int | None:
        """The most connections of one pool; None without a limit, and where connections carry many requests at once."""
        return None if not self.pool.max or self.pool.streams_max else max(self.pool.max // self.each, 1)

    @property
    def seconds(self) -> float:
        """For how long the pool was watched."""
        return self.pool.checkouts / self.pool.rate_per_s if self.pool.rate_per_s > 0 else 0.0

    @property
    def refused(self) -> int:
        """Who got none, as there was none: at once, or after waiting."""
        return self.pool.timeouts + self.pool.errors.get(words.EXHAUSTED, 0)

    @property
    def waited(self) -> int:
        """Who had to wait for one to come back, or was refused."""
        return self.pool.paths.get(words.QUEUED, 0) + self.refused

    @property
    def waiting(self) -> float:
        """The same, as a part of all checkouts."""
        return self.waited / max(self.pool.checkouts, 1)

    @property
    def stuck(self) -> int:
        """Connections that somebody keeps or nobody has: more of them would help for a while."""
        return (self.pool.overdue or 0) + (self.pool.orphaned or 0)

    @property
    def is_strained(self) -> bool:
        """Whether a connection less is missed: somebody waits or was refused, or soon will be."""
        return bool(self.pool.pending or self.refused) or (self.pool.utilization or 0.0) >= STRAINED

    @property
    def per_s(self) -> float:
        """Checkouts per second at the busiest time, from all pools of the name."""
        return max(self.pool.busiest_per_s or 0.0, self.pool.rate_per_s)

    @cached_property
    def load(self) -> float:
        """How many connections of one pool are in use on average at the busiest time, by Little's law."""
        return load(self.per_s, self.pool.use.mean_s) / self.each

    @cached_property
    def demand(self) -> float:
        """The load, or more if more had to wait than it explains, as when requests come in bursts."""
        if self.size is None or self.stuck or not self.waited:
            return self.load
        return max(self.load, load_behind(self.size, self.waiting))

    @cached_property
    def need(self) -> int:
        """The fewest connections with which no more than wanted have to wait."""
        return size_for(self.demand, self.wait_probability)

    @property
    def comfort(self) -> int:
        """A size that nobody will miss a connection of."""
        return max(self.need, SPARE * ceil((self.pool.peak or 0) / self.each), SMALLEST)

    def has_seen(self, checkouts: int, seconds: float = SECONDS) -> bool:
        """Whether there is enough to judge by."""
        return self.pool.checkouts >= checkouts and self.seconds >= seconds

    def sized(self, size: int) -> dict[str, Any]:
        """The settings that make one pool this large, in the library's own words."""
        if self.pool.library != "sqlalchemy":
            return {SIZE.get(self.pool.library, "max_size"): size}
        base = size if self.pool.overflow_max == 0 else min(size, size_for(self.demand, SELDOM))
        return {"pool_size": base, "max_overflow": size - base}

    def written(self, settings: Mapping[str, Any]) -> str:
        """Such settings, as they stand in the source."""
        arguments = ", ".join(f"{name}={value}" for name, value in settings.items())
        kind = str(self.pool.config.get("class"))
        where = f"{kind}({{}})" if self.is_redis and kind in REDIS_POOLS else WHERE.get(self.pool.library, "{}")
        return f"`{where.format(arguments)}`"


Rule = Callable[[Case], Finding | None]


def advise(
    stats: Sequence[PoolStats],
    holders: Sequence[Holder],
    *,
    wait_probability: float = 0.01,
    instances: int | None = None,
    server_limit: int | None = None,
) -> tuple[Advice, ...]:
    """
    What to change, the most urgent first; nothing, if all is well or too little was seen.

    Each rule says at most one thing of each pool.

    Args:
        stats: What was measured of each pool.
        holders: Who has connections.
        wait_probability: Which part of the checkouts may have to wait for a connection.
        instances: How many processes of the application run, each with such pools.
        server_limit: The most connections that the database allows; if there are SQL databases
            among the pools it is theirs, else that of each other server.

    Raises:
        ValueError: *wait_probability* is not between 0 and 1.
    """
    if not 0 < wait_probability < 1:
        raise ValueError(f"wait_probability must be between 0 and 1: {wait_probability}")
    budgets = _budgets(stats, instances or 1, server_limit)
    longest = sorted(holders, key=lambda holder: -holder.held_s)
    cases = (
        Case(pool, [holder for holder in longest if holder.pool == pool.name], wait_probability, budget)
        for pool, budget in zip(stats, budgets, strict=True)
    )
    found = [advice for case in cases for advice in _heard(case)]
    return tuple(sorted(found, key=lambda advice: (SEVERITIES.index(advice.severity), advice.pool)))


def _heard(case: Case) -> Iterator[Advice]:
    """What the rules say; of those in one row the first that has something to say."""
    for row in RULES:
        found = ((rule.__name__, finding) for rule in row if (finding := rule(case)) is not None)
        for kind, finding in islice(found, 1):
            yield Advice(case.pool.name, kind, *finding)


def _budgets(stats: Sequence[PoolStats], instances: int, limit: int | None) -> list[Budget | None]:
    """What each pool may claim of its server, in proportion to what it claims."""
    is_sql = any(pool.system not in OTHERWISE for pool in stats)
    claims: Counter[tuple[str | None, str | None, int | None]] = Counter()
    for pool in stats:
        claims[_server(pool)] += pool.max or 0

    def budget(pool: PoolStats) -> Budget | None:
        is_asked = pool.system not in OTHERWISE if is_sql else pool.system is not None
        if limit is None or not is_asked or not pool.max:
            return None
        claim = claims[_server(pool)]
        share = int(FREE * limit / instances * pool.max / claim) // max(pool.pools, 1)
        return Budget(instances, limit, instances * claim, share)

    return [budget(pool) for pool in stats]


def _server(pool: PoolStats) -> tuple[str | None, str | None, int | None]:
    return pool.system, pool.server_address, pool.server_port


# -- the size ----------------------------------------------------------------------------


def too_small(case: Case) -> Finding | None:
    """More have to wait than should, and more connections would help."""
    pool, size = case.pool, case.size
    if size is None or not case.has_seen(CHECKOUTS) or min(case.waited, pool.use.count) < WAITERS:
        return None
    if pool.nested > max(FEW, case.wait_probability * pool.checkouts) or case.need <= size:
        return None  # who waits for himself holds longer than he would
    expected = waits(size, case.load)
    if case.waiting <= TOO_MANY * case.wait_probability and expected <= PEAK * case.wait_probability:
        return None
    settings, suggestion = _larger(case, size)
    return Finding(
        HIGH if case.refused or case.waiting >= SELDOM else MEDIUM,
        f"{_part(case.waiting)} of {pool.checkouts} checkouts had to wait for one of {size} connections or got none:"
        f" {_number(case.per_s)} per second, each held for {_time(pool.use.mean_s)}, have {_number(case.load)} in use"
        f" on average{_and_more(case)}.",
        suggestion,
        settings,
        _size_evidence(case) | {"refused": case.refused, "size": size, "needed": case.need, **_predicted(case)},
    )


def _larger(case: Case, size: int) -> tuple[dict[str, Any], str]:
    """As large as needed, or as the server allows."""
    budget, need = case.budget, case.need
    allowed = need if budget is None else min(need, budget.share)
    settings = case.sized(allowed) if allowed > size else {}
    promise = f"then {_part(waits(allowed, case.demand))} will have to wait"
    if budget is None or allowed == need:
        return settings, f"{case.written(settings)}: {promise}.{_besides(case)}"
    rest = (
        f"it needs {need}, and {budget.instances} instances have {budget.limit} connections of the server to share:"
        " hold connections for less long, put a pooler such as PgBouncer in between, or have the server allow more."
    )
    return settings, f"{case.written(settings)}: {promise}; {rest}" if settings else rest[0].upper() + rest[1:]


def _and_more(case: Case) -> str:
    is_more = case.demand > SLIGHTLY * case.load
    return f", and so many wait as if it were {_number(case.demand)}" if is_more else ""


def _besides(case: Case) -> str:
    """What else helps: long holds are the other half of the load."""
    shorter = " Or hold them for less long, which helps as much." if case.pool.use.mean_s >= 1 else ""
    refuses = case.is_redis and case.pool.errors.get(words.EXHAUSTED)
    return f"{shorter} BlockingConnectionPool waits where this one refuses at once." if refuses else shorter


def _size_evidence(case: Case) -> dict[str, Any]:
    pool = case.pool
    return {
        "checkouts": pool.checkouts,
        "seconds": round(case.seconds, 3),
        "rate_per_s": round(pool.rate_per_s, 3),
        "busiest_per_s": None if pool.busiest_per_s is None else round(pool.busiest_per_s, 3),
        "hold_mean_s": round(pool.use.mean_s, 6),
        "load": round(case.demand, 3),
        "waited": case.waited,
        "peak": pool.peak,
    }


def _predicted(case: Case) -> dict[str, Any]:
    """What to expect of a pool that is as large as needed."""
    use, size, load = case.pool.use, case.need, case.demand
    spread = variability(use.mean_s, use.p50_s)
    return {
        "predicted_waiting": round(waits(size, load), 6),
        "predicted_mean_wait_s": round(mean_wait(size, load, use.mean_s, spread), 6),
        "predicted_p99_wait_s": round(wait_quantile(size, load, use.mean_s, 0.99, spread), 6),
    }


def fleet_budget(case: Case) -> Finding | None:
    """All instances together claim more than the server allows."""
    budget, size = case.budget, case.pool.max
    if budget is None or size is None or budget.claim <= budget.limit:
        return None
    fits = case.need <= budget.share
    settings = case.sized(budget.share) if fits else {}
    return Finding(
        HIGH if case.pool.errors.get(words.CONNECT_ERROR) else MEDIUM,
        f"The pools of {budget.instances} instances may open {budget.claim} connections to a server that allows"
        f" {budget.limit}: the last ones will be refused.",
        f"{case.written(settings)} in each, which leaves a tenth of them for others."
        if fits
        else f"It needs {case.need} and its share is {budget.share}: put a pooler such as PgBouncer in between,"
        " have the server allow more, or run fewer instances.",
        settings,
        {
            "instances": budget.instances,
            "max": size,
            "claim": budget.claim,
            "server_limit": budget.limit,
            "share": budget.share,
            "needed": case.need,
        },
    )


def big_pool_behind_pgbouncer(case: Case) -> Finding | None:
    """Two pools, one behind the other, of which the second makes a large first one useless."""
    if case.pool.server_port != PGBOUNCER or not case.has_seen(MANY_CHECKOUTS, MINUTE) or not _is_roomy(case):
        return None
    settings = case.sized(case.comfort)
    return Finding(
        LOW,
        f"There may be {case.size} connections to what is, going by its port {PGBOUNCER}, PgBouncer, which pools them"
        f" anyway; never were more than {case.pool.peak} in use.",
        f"{case.written(settings)}: a small pool before PgBouncer, the large one behind it.",
        settings,
        _size_evidence(case) | {"size": case.size, "server_port": case.pool.server_port},
    )


def _is_roomy(case: Case) -> bool:
    """Whether nobody ever waited, and half of it would do with room to spare."""
    size = case.size
    if size is None or case.pool.peak is None or case.waited or case.pool.pending:
        return False
    return SPARE * case.comfort <= size and size - case.comfort >= SAVES


def too_large(case: Case) -> Finding | None:
    """Connections that nobody ever needed, of a database that has not many."""
    pool, size = case.pool, case.size
    is_chosen = size != DEFAULT_SIZE.get(pool.library)
    if pool.system is None or not is_chosen or not case.has_seen(MANY_CHECKOUTS, LONG) or not _is_roomy(case):
        return None
    settings = case.sized(case.comfort)
    return Finding(
        LOW,
        f"There may be {size} connections, and in {_time(case.seconds)} never more than {pool.peak} were in use.",
        f"{case.written(settings)}: more than ever were needed, and the server has the others for somebody else.",
        settings,
        _size_evidence(case) | {"size": size, "needed": case.need},
    )


def overflow_always(case: Case) -> Finding | None:
    """Connections beyond the base size are opened and closed all the time."""
    pool = case.pool
    overflowed = pool.closed.get("overflow", 0)
    churned = overflowed / max(pool.checkouts, 1)
    base = (pool.idle_max or 0) // case.each
    if not case.has_seen(CHECKOUTS) or not base or churned < OFTEN:
        return None
    wanted = size_for(max(case.load, load_behind(base, churned)), SELDOM)
    settings = {"pool_size": wanted}
    if case.size is not None:
        settings = {"pool_size": min(wanted, case.size), "max_overflow": max(case.size - wanted, 0)}
    return Finding(
        MEDIUM,
        f"{_part(churned)} of {pool.checkouts} checkouts ended with an overflow connection being closed, as pool_size"
        f" is {base}: opening the next one takes {_time(pool.create.mean_s)}.",
        f"{case.written(settings)}: as many at most, but they stay open.",
        settings,
        _size_evidence(case)
        | {"closed_overflow": overflowed, "pool_size": base}
        | {"create_mean_s": round(pool.create.mean_s, 6)},
    )


# -- who holds them ----------------------------------------------------------------------


def leak(case: Case) -> Finding | None:
    """Connections that are out for too long, or that nobody gave back."""
    overdue, collected = case.pool.overdue or 0, case.pool.leaked.get(words.COLLECTED, 0)
    if not overdue and not collected:
        return None
    late = [holder for holder in case.holders if holder.kind not in words.ON_PURPOSE][:overdue]
    sites = Counter(holder.call_site for holder in late if holder.call_site)
    places = [f"{number} from {place}" for place, number in sites.most_common(3)]
    told = []
    if overdue:
        longest = f" (the longest for {_time(late[0].held_s)})" if late else ""
        whence = f": {', '.join(places)}" if places else ""
        told.append(f"{_times(overdue, 'connection')} out for longer than the leak threshold{longest}{whence}")
    if collected:
        dropped = "it" if collected == 1 else "them"
        told.append(
            f"{_times(collected, 'connection')} back only because the garbage collector found {dropped} dropped"
        )
    return Finding(
        HIGH if case.is_strained else MEDIUM,
        f"{'; '.join(told)}.",
        f"Give it back however the block ends: {GIVE_BACK.get(case.pool.library, 'use `with`')}.",
        {},
        {"overdue": overdue, "collected": collected, "oldest_use_s": case.pool.oldest_use_s, "call_sites": dict(sites)},
    )


def orphaned(case: Case) -> Finding | None:
    """Places that the library has lost."""
    lost = case.pool.orphaned or 0
    if not lost:
        return None
    return Finding(
        HIGH if case.is_strained else MEDIUM,
        f"{_times(lost, 'place')} taken by nobody, of {case.pool.max or 'all'}: a larger pool would lose them too.",
        f"Update the library: {MEND.get(case.pool.library, 'only a new pool has them back')}.",
        {},
        {"orphaned": lost, "used": case.pool.used, "max": case.pool.max, "refused": case.refused},
    )


def nested(case: Case) -> Finding | None:
    """Who holds one asks for another: if all do so at once, nobody gets one."""
    times = case.pool.nested
    if times < FEW:
        return None
    return Finding(
        HIGH if case.refused or case.pool.pending else MEDIUM,
        f"{times} of {case.pool.checkouts} checkouts were made by somebody who held a connection of the same pool:"
        " when all do so at once, all wait for each other.",
        "Hand the connection (or session) on to what is called, or give it back before; a larger pool only delays it.",
        {},
        {"nested": times, "checkouts": case.pool.checkouts, "refused": case.refused, "pending": case.pool.pending},
    )


def inherited(case: Case) -> Finding | None:
    """A connection that two processes write to."""
    if not case.pool.inherited:
        return None
    cure = AFTER_FORK.get(case.pool.library, "make the client in the new process")
    return Finding(
        HIGH,
        f"{_times(case.pool.inherited, 'connection')} used here that the parent process had opened before the fork:"
        " both write to the same socket.",
        f"Where processes are forked (gunicorn's `post_fork`, Celery's `worker_process_init`), {cure}.",
        {},
        {"inherited": case.pool.inherited},
    )


def held_idle(case: Case) -> Finding | None:
    """Connections are held while something else is done."""
    pool = case.pool
    held = pool.use.mean_s * pool.use.count
    if pool.busy_s is None or not held or not case.has_seen(CHECKOUTS) or pool.busy_s > AT_WORK * held:
        return None
    if case.waiting <= case.wait_probability and case.load < (case.size or 0) / 2:
        return None  # it hurts nobody
    return Finding(
        MEDIUM if case.waiting > case.wait_probability else LOW,
        f"Connections are held for {_time(pool.use.mean_s)}, used for {_part(pool.busy_s / held)} of that time.",
        "Give the connection back before other work is done (a call to another service, a template), and take it as"
        f" late as possible: at best {_number(case.load * pool.busy_s / held)} instead of {_number(case.load)} would be"
        " in use.",
        {},
        {"busy_s": round(pool.busy_s, 3), "held_s": round(held, 3), "waiting": round(case.waiting, 6)},
    )


def timeout_too_long(case: Case) -> Finding | None:
    """Callers give up before the pool does, so that its own error is never seen."""
    pool, timeout = case.pool, case.pool.config.get("timeout")
    cancelled = pool.errors.get(words.CANCELLED, 0)
    if not isinstance(timeout, int | float) or not case.waited or not case.has_seen(CHECKOUTS):
        return None
    if cancelled < SOME or cancelled < SOME * pool.timeouts or not 1 < pool.wait.max_s <= PATIENCE * timeout:
        return None
    word = "pool_timeout" if pool.library == "sqlalchemy" else "timeout"
    settings = {word: max(step for step in TIMEOUTS if step < pool.wait.max_s)}
    return Finding(
        MEDIUM,
        f"{cancelled} checkouts were cancelled and {pool.timeouts} timed out: nobody has ever waited for the"
        f" {_time(timeout)} after which the pool gives up, the longest for {_time(pool.wait.max_s)}.",
        f"{case.written(settings)}: less than callers wait, so that they get an error that says why.",
        settings,
        {"cancelled": cancelled, "timeouts": pool.timeouts, "timeout_s": timeout, "wait_max_s": pool.wait.max_s},
    )


# -- how they come and go ----------------------------------------------------------------


def recycle_herd(case: Case) -> Finding | None:
    """Connections that were opened together are recycled together."""
    pool, closed = case.pool, case.pool.closed
    recycled, renewed = closed.get("recycle", 0), pool.paths.get(words.NEW, 0)
    if not case.has_seen(MANY_CHECKOUTS) or recycled < max(SOME, pool.idle_max or 0, sum(closed.values()) / 2):
        return None
    is_slow = pool.wait.p99_s >= max(SOME * pool.wait.p50_s, pool.create.p50_s / 2)
    if renewed < pool.checkouts / 100 or not is_slow:
        return None
    old = case.pool.config.get("recycle")
    settings = {"pool_recycle": max(RECYCLE, 2 * old) if isinstance(old, int | float) else RECYCLE}
    return Finding(
        MEDIUM if pool.wait.p99_s >= SLOW else LOW,
        f"{recycled} of {sum(closed.values())} connections were closed for their age, and {renewed} of {pool.checkouts}"
        f" checkouts had to open one: half of them take {_time(pool.wait.p50_s)} at most, one in a hundred"
        f" {_time(pool.wait.p99_s)} or more.",
        f"{case.written(settings)}, and a different number in each instance: connections that were opened together are"
        " recycled together, as SQLAlchemy adds no jitter.",
        settings,
        {
            "recycled": recycled,
            "closed": sum(closed.values()),
            "new": renewed,
            "checkouts": pool.checkouts,
            "wait_p50_s": pool.wait.p50_s,
            "wait_p99_s": pool.wait.p99_s,
            "create_p50_s": pool.create.p50_s,
            "pool_recycle": old,
        },
    )


def stale(case: Case) -> Finding | None:
    """Connections whose server has gone, and that the next caller gets."""
    pool, dead, failed = case.pool, case.pool.stale or 0, case.pool.closed.get(words.FAILED, 0)
    settings = _look(case)
    if not settings or (not dead and failed < max(SOME, pool.checkouts / 1000)):
        return None
    return Finding(
        HIGH if failed >= SOME else MEDIUM,
        f"Nobody looks at connections before they are lent: {_times(dead, 'idle one')} without a server now, and"
        f" {failed} have failed when they were in use.",
        f"{case.written(settings)} does; if something in between closes idle connections, replace them earlier, too.",
        settings,
        {"stale": dead, "closed_error": failed, "checkouts": pool.checkouts},
    )


def _look(case: Case) -> dict[str, Any]:
    """What makes the library look at connections before it lends them, unless it does."""
    pool = case.pool
    if pool.library == "sqlalchemy":
        is_on = pool.config.get("pre_ping") or pool.closed.get("pre_ping")
        return {} if is_on else {"pool_pre_ping": True}
    if case.is_redis:
        return {} if pool.config.get("health_check_interval") else {"health_check_interval": 30}
    return {}


def nullpool_behind_pgbouncer(case: Case) -> Finding | None:
    """Without a pool each checkout opens a connection, to PgBouncer too."""
    pool = case.pool
    is_null = pool.library == "sqlalchemy" and pool.idle_max == 0 and pool.max is None
    if pool.server_port != PGBOUNCER or not is_null or not case.has_seen(CHECKOUTS):
        return None
    if pool.created < CHURN * pool.checkouts or pool.create.mean_s < OFTEN * pool.use.mean_s:
        return None
    settings = case.sized(max(case.need, SMALLEST))
    return Finding(
        MEDIUM if pool.create.mean_s >= pool.use.mean_s else LOW,
        f"{pool.created} connections were opened for {pool.checkouts} checkouts to what is, going by its port"
        f" {PGBOUNCER}, PgBouncer: {_time(pool.create.mean_s)} to open one that is held for {_time(pool.use.mean_s)}.",
        f"{case.written(settings)} without NullPool: a small pool spares the connect (with asyncpg and transaction"
        " pooling, mind its prepared statements).",
        settings,
        {
            "created": pool.created,
            "checkouts": pool.checkouts,
            "create_mean_s": round(pool.create.mean_s, 6),
            "hold_mean_s": round(pool.use.mean_s, 6),
            "server_port": pool.server_port,
        },
    )


def connect_errors(case: Case) -> Finding | None:
    """The server cannot be reached, or does not want us."""
    pool, errors = case.pool, case.pool.errors.get(words.CONNECT_ERROR, 0)
    if errors < SOME or errors < pool.checkouts / 100:
        return None
    ago = pool.last_error_s.get(words.CONNECT_ERROR, 0.0)
    where = ":".join(str(part) for part in (pool.server_address, pool.server_port) if part is not None)
    return Finding(
        HIGH if ago <= RECENT else LOW,
        f"{errors} of {pool.checkouts} checkouts could not open a connection{where and f' to {where}'}, the last one"
        f" {_time(ago)} ago.",
        "Look at the server, the network and the password; a server at its limit of connections refuses too, which a"
        " larger pool makes worse.",
        {},
        {"connect_errors": errors, "checkouts": pool.checkouts, "last_error_s": ago, "created": pool.created},
    )


# -- Redis, HTTP and Qdrant --------------------------------------------------------------


def redis_default_limits(case: Case) -> Finding | None:
    """A pool without a limit opens as many connections as there are commands at once."""
    pool, peak = case.pool, case.pool.peak or 0
    if not case.is_redis or pool.max is not None:
        return None
    if not case.has_seen(CHECKOUTS) or peak < UNLIMITED_PEAK:
        return None
    settings = case.sized(case.comfort)
    return Finding(
        MEDIUM if peak >= SOME * UNLIMITED_PEAK else LOW,
        f"The pool has no limit, as is the default of redis-py before 8.0 and of valkey-py, and {peak} connections were"
        " in use at once: the slower the server, the more it gets, up to its maxclients.",
        f"{case.written(settings)}; beyond that it refuses at once, and BlockingConnectionPool waits.",
        settings,
        _size_evidence(case),
    )


def qdrant_localhost(case: Case) -> Finding | None:
    """For a server on this machine, qdrant-client keeps no connection open."""
    pool = case.pool
    is_local = pool.library == "qdrant" and pool.channels is None and pool.server_address in LOCAL
    if not is_local or pool.idle_max != 0 or pool.checkouts < WAITERS or pool.created < CHURN * pool.checkouts:
        return None
    return Finding(
        LOW,
        f"{pool.created} connections in {pool.checkouts} calls: qdrant-client keeps none open, as the server is local.",
        "`QdrantClient(limits=httpx.Limits())` keeps them.",
        {"limits": "httpx.Limits()"},
        {"created": pool.created, "checkouts": pool.checkouts, "create_mean_s": round(pool.create.mean_s, 6)},
    )


def many_pools(case: Case) -> Finding | None:
    """A client for each request, and each has a pool of its own."""
    pool = case.pool
    if pool.pools < CROWD or pool.checkouts < CHECKOUTS:
        return None
    per_pool = pool.checkouts / pool.pools
    return Finding(
        MEDIUM if per_pool < SOME else LOW,
        f"{pool.pools} pools of this name are alive, with {_number(per_pool)} checkouts each: that many clients of one"
        " server.",
        "Make one client (or engine) when the application starts, and share it; where each has a purpose of its own,"
        " name it with `otel_pools.name_pool`.",
        {},
        {"pools": pool.pools, "checkouts": pool.checkouts, "created": pool.created},
    )


def keepalive_churn(case: Case) -> Finding | None:
    """Nearly each request opens a connection of its own."""
    pool = case.pool
    is_http = pool.system is None or (pool.library == "qdrant" and pool.channels is None)
    if not is_http or not case.has_seen(CHECKOUTS) or pool.created < CHURN * pool.checkouts:
        return None
    reason = max(pool.closed, key=lambda reason: pool.closed[reason], default="")
    if reason not in CHURNS:
        return None
    cure, settings = CHURNS[reason](case)
    return Finding(
        MEDIUM if pool.create.mean_s >= HANDSHAKE else LOW,
        f"{pool.created} connections were opened for {pool.checkouts} requests, {_time(pool.create.mean_s)} each; most"
        f" were closed as `{reason}`.",
        f"{case.written(settings)}: {cure}." if settings else f"{cure[0].upper()}{cure[1:]}.",
        settings,
        {"created": pool.created, "checkouts": pool.checkouts, "closed": dict(pool.closed)}
        | {"create_mean_s": round(pool.create.mean_s, 6), "idle_max": pool.idle_max},
    )


def _limits(case: Case, **changed: Any) -> dict[str, Any]:
    """All arguments of `httpx.Limits`: what it is not told is without a limit."""
    known = {"max_connections": case.pool.max, "max_keepalive_connections": case.pool.idle_max}
    return {word: number // case.each for word, number in known.items() if number is not None} | changed


def _evicts(case: Case) -> tuple[str, dict[str, Any]]:
    pool = case.pool
    cure = "keep as many open as are in use (httpcore up to 1.0.9 counts the busy ones too)"
    if pool.max is None or pool.max == pool.idle_max:
        return cure, {}
    return cure, _limits(case, max_keepalive_connections=pool.max // case.each)


def _expires(case: Case) -> tuple[str, dict[str, Any]]:
    return "keep them for longer than there is between two requests", _limits(case, keepalive_expiry=60)


def _is_closed(_: Case) -> tuple[str, dict[str, Any]]:
    return "have the server keep connections alive: it is the server who closes them", {}


def _is_dropped(_: Case) -> tuple[str, dict[str, Any]]:
    return "make one client and share it: they were closed with their client, as if there was one for each request", {}


# From why most connections were closed to what would keep them open.
CHURNS: dict[str, Callable[[Case], tuple[str, dict[str, Any]]]] = {
    words.EVICTED: _evicts,
    words.IDLED: _expires,
    words.SERVER: _is_closed,
    words.DISPOSE: _is_dropped,
}


def streams_saturated(case: Case) -> Finding | None:
    """Requests wait for a stream of a connection, where no queue of the pool and no timeout is."""
    pool, pending, used = case.pool, case.pool.streams_pending or 0, case.pool.streams or 0
    if not used or pending < max(FEW, used / 2):
        return None
    is_grpc = pool.channels is not None
    settings = _more_sockets(pool) if is_grpc else {"http2": False}
    return Finding(
        HIGH,
        f"{used} streams are in use and {pending} requests wait for one, which no timeout covers.",
        f"{_written(settings)} opens a connection for each channel, with streams of its own."
        if is_grpc
        else f"{_written(settings)} gives each request a connection of its own; or share the requests out over several"
        " clients, or have the server allow more streams on a connection.",
        settings,
        {"streams": used, "streams_pending": pending, "streams_max": pool.streams_max, "used": pool.used},
    )


def qdrant_one_connection(case: Case) -> Finding | None:
    """All gRPC channels to one server share one connection."""
    pool, channels = case.pool, _channels(case.pool)
    if channels <= 1 or (pool.used or 0) + (pool.idle or 0) != 1 or pool.checkouts < CHECKOUTS:
        return None
    if not pool.pending and pool.rate_per_s < BUSY:
        return None
    settings = {"grpc_options": LOCAL_POOL}
    return Finding(
        MEDIUM if pool.pending else LOW,
        f"{channels} gRPC channels share one connection, and so its streams: pool_size does nothing.",
        f"{_written(settings)} gives each a connection of its own.",
        settings,
        {"channels": channels, "connections": 1, "pending": pool.pending, "rate_per_s": round(pool.rate_per_s, 3)},
    )


LOCAL_POOL = {"grpc.use_local_subchannel_pool": 1}


def _more_sockets(pool: PoolStats) -> dict[str, Any]:
    """A connection for each channel; if they have that, more channels."""
    channels = _channels(pool)
    shared = channels > (pool.used or 0) + (pool.idle or 0)
    return {"grpc_options": LOCAL_POOL} | ({} if shared else {"pool_size": 2 * channels})


def _channels(pool: PoolStats) -> int:
    return sum(pool.channels.values()) - pool.channels.get("shutdown", 0) if pool.channels else 0


def _written(settings: Mapping[str, Any]) -> str:
    """Arguments of a client."""
    return f"`{', '.join(f'{name}={value}' for name, value in settings.items())}`"


# -- the table ---------------------------------------------------------------------------

# Rules in one row turn the same screw, so only the first of them that has something to say is heard.
RULES: tuple[tuple[Rule, ...], ...] = (
    (inherited,),
    (connect_errors,),
    (orphaned,),
    (leak, nested),  # who keeps one and comes back for another is both
    (streams_saturated, qdrant_one_connection),
    (too_small, fleet_budget, big_pool_behind_pgbouncer, too_large, overflow_always),
    (nullpool_behind_pgbouncer, redis_default_limits),
    (timeout_too_long,),
    (held_idle,),
    (stale,),
    (recycle_herd,),
    (qdrant_localhost, many_pools, keepalive_churn),
)

# -- figures in a sentence -----------------------------------------------------------------


def _part(part: float) -> str:
    return f"{_number(100 * part)} %"


def _time(seconds: float) -> str:
    units = ((7200, "h", 1 / 3600), (120, "min", 1 / 60), (1, "s", 1), (0, "ms", 1000))
    unit, times = next((unit, times) for least, unit, times in units if seconds >= least)
    return f"{_number(seconds * times)} {unit}"


def _number(value: float) -> str:
    """Three digits are more than the figures are good for; large ones are not to be cut."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"  # noqa: PLR2004  # three digits


def _times(number: int, noun: str) -> str:
    """As in "2 connections are"."""
    return f"1 {noun} is" if number == 1 else f"{number} {noun}s are"
