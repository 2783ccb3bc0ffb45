"""What a receiver has heard of each pool, as rows, and the rows as a table: live in a terminal, or plain text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from . import _vocabulary as words
from ._receiver import Distribution, Scalar, Series

WIDTH = 24  # characters of a bar
LONGEST_NAME = 40
NOTHING = "-"
SERVED = "served"  # by whichever path, of a library that cannot tell
EXACT = 0.01  # seconds below which a tenth of a millisecond is shown
HTTP = "http"  # for the system of a pool that has no `db.system.name`


def _metric(rows: Iterable[words.Metric], ending: str) -> str:
    """The name of the one metric that ends so; a renamed row is noticed at import."""
    [row] = (row for row in rows if row.name.endswith(ending))
    return row.name


COUNT = _metric(words.DB, ".connection.count")
MAX = _metric(words.DB, ".connection.max")
PENDING = _metric(words.DB, ".pending_requests")
TIMEOUTS = _metric(words.DB, ".timeouts")
CHECKOUTS = _metric(words.EVERY, ".checkouts")
OVERFLOW = _metric(words.EVERY, ".overflow")
PEAK = _metric(words.EVERY, ".peak")
CREATED = _metric(words.EVERY, ".created")
CLOSED = _metric(words.EVERY, ".closed")
OLDEST = _metric(words.EVERY, ".wait.oldest")
OLDEST_USE = _metric(words.EVERY, ".use.oldest")
OVERDUE = _metric(words.EVERY, ".overdue")
LEAKED = _metric(words.EVERY, ".leaked")
ORPHANED = _metric(words.EVERY, ".orphaned")
STREAMS = _metric(words.EVERY, ".stream.count")
STREAMS_MAX = _metric(words.EVERY, ".stream.max")

# What HTTP pools have under names of their own, and the column it belongs to.
SAME = {
    _metric(words.HTTP, ".open_connections"): COUNT,
    _metric(words.HTTP, ".connection.max"): MAX,
    _metric(words.HTTP, ".pending_requests"): PENDING,
    _metric(words.HTTP, ".timeouts"): TIMEOUTS,
    _metric(words.HTTP, ".time_in_queue"): words.WAIT.name,
}
STATES = (words.STATE, words.HTTP_STATE, words.STREAM_STATE)


@dataclass(frozen=True, slots=True)
class PoolRow:
    """
    One pool of one process; None where it has not said.

    Attributes:
        streams: How many HTTP/2 streams are in use now, of all its connections.
        streams_pending: How many requests have a connection and wait for a stream of it.
        waiting: How many wait for a connection now.
        oldest_wait: Seconds the first of them has waited.
        rates: Checkouts per second in the last interval, by path; failed ones under their `error.type`.
        p50, p95: Seconds a checkout waited, half and 95 % of those in the last interval.
        oldest_use: Seconds the longest of those that are out has been out.
        overdue: How many have been out for longer than the leak threshold.
        leaked: How many the garbage collector gave back, since the start.
        orphaned: How many places are occupied and owned by nobody.
        gave_up: How many waited for too long in the last interval.
        key: What tells it from all other pools.
        source, service, pid: Of which process, as in a `Point`.
        heard: When it last said something, on the monotonic clock.
        interval: Seconds between its last two words.
    """

    name: str
    system: str
    used: int | None = None
    idle: int | None = None
    max: int | None = None
    overflow: int | None = None
    peak: int | None = None
    waiting: int | None = None
    oldest_wait: float | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    p50: float | None = None
    p95: float | None = None
    timeouts: int | None = None
    created: int | None = None
    closed: int | None = None
    streams: int | None = None
    streams_pending: int | None = None
    streams_max: int | None = None
    oldest_use: float | None = None
    overdue: int | None = None
    leaked: int | None = None
    orphaned: int | None = None
    gave_up: int = 0
    key: tuple[str, ...] = field(default=(), compare=False)
    source: str = field(default="", compare=False)
    service: str = field(default="", compare=False)
    pid: str = field(default="", compare=False)
    heard: float = field(default=0.0, compare=False)
    interval: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class Status:
    """
    What stands around the table.

    Attributes:
        seconds: Since the start.
        phase: What the load does now.
        origin: Where the numbers come from, or where they go.
    """

    seconds: float
    phase: str
    origin: str


# -- from series to rows -------------------------------------------------------------


def rows(series: Iterable[Series]) -> list[PoolRow]:
    """One row per pool name and process, in the order of their names; series of anything else are passed over."""
    pools: dict[tuple[str, ...], list[Series]] = defaultdict(list)
    for one in series:
        attributes = one.now.attributes
        name = attributes.get(words.SEMCONV_POOL) or attributes.get(words.OUR_POOL)
        if name is not None:
            key = (str(name), one.now.source, *_where(attributes))
            pools[key].append(one)
    return [_row(key, of_pool) for key, of_pool in sorted(pools.items())]


def _where(attributes: Mapping[str, Scalar]) -> tuple[str, ...]:
    """The system and what tells its pools apart; nothing for HTTP, where a pool goes to many servers."""
    if words.SYSTEM not in attributes:
        return (HTTP,)
    return tuple(str(attributes.get(key, "")) for key in (words.SYSTEM, words.ADDRESS, words.PORT, words.NAMESPACE))


def _row(key: tuple[str, ...], series: list[Series]) -> PoolRow:
    totals = _totals(series)
    waits = _waits(series)
    latest = max(series, key=lambda one: one.now.heard)
    return PoolRow(
        name=printable(key[0]),
        system=printable(key[2]),
        used=totals.get((COUNT, "used"), totals.get((COUNT, "active"))),
        idle=totals.get((COUNT, "idle")),
        max=totals.get((MAX, None)),
        overflow=totals.get((OVERFLOW, None)),
        peak=totals.get((PEAK, None)),
        waiting=totals.get((PENDING, None)),
        oldest_wait=_gauge(series, OLDEST),
        rates=_rates(series),
        p50=waits.quantile(0.50) if waits else None,
        p95=waits.quantile(0.95) if waits else None,
        timeouts=totals.get((TIMEOUTS, None)),
        created=totals.get((CREATED, None)),
        closed=totals.get((CLOSED, None)),
        streams=totals.get((STREAMS, "used")),
        streams_pending=totals.get((STREAMS, "pending")),
        streams_max=totals.get((STREAMS_MAX, None)),
        oldest_use=_gauge(series, OLDEST_USE),
        overdue=totals.get((OVERDUE, None)),
        leaked=_collected(series),
        orphaned=totals.get((ORPHANED, None)),
        gave_up=_gave_up(series),
        key=key,
        source=latest.now.source,
        service=printable(latest.now.service),
        pid=printable(latest.now.pid),
        heard=latest.now.heard,
        interval=latest.now.heard - latest.before.heard if latest.before else 0.0,
    )


def _gauge(series: list[Series], name: str) -> float | None:
    return next((float(_number(one.now.value)) for one in series if one.now.name == name), None)


def _gave_up(series: list[Series]) -> int:
    """Nobody in the first word of a pool: what it counts may be long ago."""
    known = any(one.before for one in series)
    return int(sum(_more(one) for one in series if _name(one) == TIMEOUTS)) if known else 0


def _collected(series: list[Series]) -> int | None:
    """Those of which nobody will ever hear again; the overdue ones may still come back."""
    leaks = [one for one in series if one.now.name == LEAKED and one.now.attributes.get(words.LEAK) == words.COLLECTED]
    return int(sum(_number(one.now.value) for one in leaks)) if leaks else None


def _totals(series: list[Series]) -> dict[tuple[str, Scalar | None], int]:
    """The sum of each metric, with the two states of a connection or stream apart."""
    totals: dict[tuple[str, Scalar | None], int] = defaultdict(int)
    latest = max(one.now.seconds for one in series)
    for one in series:
        state = next((one.now.attributes[key] for key in STATES if key in one.now.attributes), None)
        # A pool that is gone says no more, so its last word was not the end of its connections.
        gone = state is not None and one.now.seconds < latest
        totals[_name(one), state] += 0 if gone else int(_number(one.now.value))
    return totals


def _name(one: Series) -> str:
    """The metric's name, or that of the same for databases."""
    return SAME.get(one.now.name, one.now.name)


def _rates(series: list[Series]) -> dict[str, float]:
    """Per second in the last interval; 0 while there is none, and after the process began anew."""
    rates: dict[str, float] = defaultdict(float)
    checkouts = [one for one in series if one.now.name == CHECKOUTS]
    # One interval for all: the first timeout has no point before it, and is one more all the same.
    interval = max((one.now.seconds - one.before.seconds for one in checkouts if one.before), default=0.0)
    for one in checkouts:
        attributes = one.now.attributes
        path = str(attributes.get(words.ERROR) or attributes.get(words.PATH, SERVED))
        rates[path] += _more(one) / interval if interval > 0 else 0.0
    return rates


def _more(one: Series) -> float:
    """By how much it grew in the last interval; nothing if the process began anew."""
    return max(_number(one.now.value) - (_number(one.before.value) if one.before else 0), 0.0)


def _waits(series: list[Series]) -> Distribution | None:
    """All waits of the last interval, whatever their path."""
    together: Distribution | None = None
    for one in series:
        now, before = one.now.value, one.before.value if one.before else None
        if _name(one) == words.WAIT.name and isinstance(now, Distribution):
            new = now.since(before) if isinstance(before, Distribution) else now
            together = new if together is None else together + new
    return together


def _number(value: float | Distribution) -> float:
    # A NaN has no place in a table of counts, and int() refuses it.
    return 0 if isinstance(value, Distribution) or not abs(value) < float("inf") else value


def printable(text: str, longest: int = LONGEST_NAME) -> str:
    """A name comes from another process: its control characters are not for this terminal."""
    return "".join(c if c.isprintable() else "?" for c in text[:longest])


# -- from rows to cells --------------------------------------------------------------

HEADINGS = (
    "pool",
    "system",
    "used/idle/max",
    "streams",
    "overflow",
    "peak",
    "waiting",
    "oldest",
    "checkouts/s",
    "wait p50/p95",
    "timeouts",
    "created/closed",
)


def _cells(row: PoolRow) -> tuple[str, ...]:
    return (
        row.name,
        row.system,
        f"{_count(row.used)}/{_count(row.idle)}/{_count(row.max)}",
        _streams(row),
        _count(row.overflow),
        _count(row.peak),
        _count(row.waiting),
        duration(row.oldest_wait),
        _paths(row.rates),
        f"{duration(row.p50)}/{duration(row.p95)}",
        _count(row.timeouts),
        f"{_count(row.created)}/{_count(row.closed)}",
    )


def _streams(row: PoolRow) -> str:
    """In use, waited for and allowed; most pools have none."""
    if row.streams is None:
        return NOTHING
    return f"{row.streams}/{_count(row.streams_pending)}/{_count(row.streams_max)}"


def _count(value: int | None) -> str:
    return NOTHING if value is None else str(value)


def duration(seconds: float | None) -> str:
    if seconds is None:
        return NOTHING
    if seconds >= 1:
        return f"{seconds:.1f} s"
    digits = 1 if 0 < seconds < EXACT else 0
    return f"{seconds * 1000:.{digits}f} ms"


def _paths(rates: Mapping[str, float]) -> str:
    """The three paths always and in their order, unless they are not told apart; then whatever failed."""
    paths = (SERVED,) if SERVED in rates else words.PATHS
    failed = sorted(path for path in rates if path not in paths and rates[path] > 0)
    return ", ".join(f"{rates.get(path, 0):.0f} {printable(path)}" for path in (*paths, *failed))


def _lines(status: Status) -> tuple[str, str]:
    return f"[{status.seconds:5.1f} s] {status.phase}", status.origin


# -- the two screens ------------------------------------------------------------------


def plain(status: Status, pools: list[PoolRow]) -> str:
    """The table as text, in columns that are as wide as what is in them."""
    phase, origin = _lines(status)
    lines = [HEADINGS, *map(_cells, pools)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)
    return "\n".join((phase, *(table if pools else ("no pool has been heard of yet",)), origin))


class PlainScreen:
    """Prints the table anew each time; for files and pipes."""

    seconds_between = 2.0

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._shown = 0

    def __repr__(self) -> str:
        return f"<PlainScreen [{self._shown} shown]>"

    def show(self, status: Status, pools: list[PoolRow]) -> None:
        """Print the table, and an empty line."""
        self._shown += 1
        print(plain(status, pools), end="\n\n", file=self._out, flush=True)

    def close(self) -> None:
        """Nothing to give back."""


class LiveScreen:
    """Draws the table over itself; for a terminal, whose cursor it gives back when closed."""

    seconds_between = 0.25

    def __init__(self, out: TextIO) -> None:
        self._live = Live(console=Console(file=out), auto_refresh=False, transient=False)
        self._live.start()
        self._shown = 0

    def __repr__(self) -> str:
        return f"<LiveScreen [{self._shown} shown]>"

    def show(self, status: Status, pools: list[PoolRow]) -> None:
        """Draw the table where it was."""
        self._shown += 1
        self._live.update(drawing(status, pools), refresh=True)

    def close(self) -> None:
        """Leave the last table standing, and the cursor below it."""
        self._live.stop()


def drawing(status: Status, pools: list[PoolRow]) -> Group:
    """The table in colours, with a bar per pool; cells are `Text`, as names are no markup."""
    phase, origin = _lines(status)
    table = Table(expand=False)
    for heading in HEADINGS:
        table.add_column(heading)
    for row in pools:
        name, system, counts, streams, *rest = _cells(row)
        table.add_row(
            Text(name, "bold"),
            Text(system),
            Text.assemble(bar(row), "\n", counts),
            # The bar has room left while nobody gets through.
            Text(streams, "red" if row.streams_pending else ""),
            *map(Text, rest),
        )
    return Group(Text(phase, "bold"), table, Text(origin, "dim"))


def bar(row: PoolRow) -> Text:
    """Used and idle, as shares of what may be open; red when nothing is left."""
    used, idle = row.used or 0, row.idle or 0
    most = max(row.max or 0, used + idle, 1)
    full, open_ = round(WIDTH * used / most), round(WIDTH * (used + idle) / most)
    colour = "red" if used >= most else "yellow" if used > 0.8 * most else "green"
    return Text.assemble(("█" * full, colour), ("▒" * (open_ - full), "cyan"), ("·" * (WIDTH - open_), "dim"))
