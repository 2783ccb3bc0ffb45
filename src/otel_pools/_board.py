"""What `otel-pools watch` has heard of every pool of every process, how it was before, and what that means."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from . import _vocabulary as words
from ._receiver import Receiver, Scalar, Wait
from ._screen import PoolRow, duration, printable, rows

# Seconds without a word after which a pool is gone, if it did not say less often before; and is forgotten.
GONE, FORGOTTEN = 60.0, 600.0
# Two intervals, and what an export may be late.
MISSED = 2.5
LONGEST_LINE = 200
# Pools, of all processes together; moments of each; and of who held its connections so many are shown.
MAX_POOLS, MAX_MOMENTS, MAX_HOLDERS = 500, 512, 3


@dataclass(frozen=True, slots=True)
class Moment:
    """How full a pool was at one time (on the monotonic clock), and how many waited."""

    heard: float
    used: int
    idle: int
    waiting: int

    @property
    def strain(self) -> int:
        """What of two moments is the one to remember."""
        return self.used + self.waiting


class Track:
    """
    One pool of one process, from when it was first heard of.

    Attributes:
        row: What it says now.
        moments: How it was before, the oldest first; at most 512, the older ones further apart.
        wait: The last failed wait, with who held the connections.
    """

    def __init__(self, row: PoolRow) -> None:
        self.row = row
        self.moments: list[Moment] = []
        self.wait: Wait | None = None
        self.note(row)

    def __repr__(self) -> str:
        return f"<Track of {self.row.name} in {self.process} [{len(self.moments)} moments]>"

    @property
    def process(self) -> str:
        """Its service and its pid, or the beginning of what identifies it."""
        which = f"pid {self.row.pid}" if self.row.pid else printable(self.row.source[:8])
        return f"{self.row.service or 'unknown_service'} {which}"

    @property
    def waiting(self) -> int:
        """How many wait for a connection or for a stream; of gRPC these are the same."""
        return max(self.row.waiting or 0, self.row.streams_pending or 0)

    @property
    def share(self) -> float:
        """How full it is, 0 to 1; 0 where there is no limit."""
        return (self.row.used or 0) / self.row.max if self.row.max else 0.0

    def note(self, row: PoolRow) -> None:
        """Take what it says now; a moment it is if anything was said since."""
        if self.moments and row.heard <= self.moments[-1].heard:
            return
        self.row = row
        self.moments.append(Moment(row.heard, row.used or 0, row.idle or 0, self.waiting))
        if len(self.moments) > MAX_MOMENTS:
            # Of each two the one with more strain, so that no peak is lost.
            self.moments = [max(pair, key=lambda one: one.strain) for pair in _pairs(self.moments)]

    def silent(self, now: float) -> float:
        """Seconds since its last word."""
        return max(now - self.row.heard, 0.0)

    def gone(self, now: float) -> bool:
        """Whether nothing more is to be expected."""
        return self.silent(now) > max(GONE, MISSED * self.row.interval)


def _pairs(moments: list[Moment]) -> Iterable[list[Moment]]:
    return (moments[at : at + 2] for at in range(0, len(moments), 2))


class Board:
    """Every pool of every process that a receiver has heard of; at most 500, those heard of last."""

    def __init__(self) -> None:
        self._tracks: dict[tuple[str, ...], Track] = {}
        self._exports = -1
        self._waits: dict[tuple[str, str], Wait] = {}  # the newest of each pool, which may be unknown yet

    def __repr__(self) -> str:
        return f"<Board of {len(self._tracks)} pools in {self.processes} processes>"

    @property
    def tracks(self) -> list[Track]:
        """One for each pool, in the order of processes and names."""
        return sorted(self._tracks.values(), key=lambda track: (track.process, track.row.name, track.row.key))

    @property
    def processes(self) -> int:
        """How many there are."""
        return len({track.row.source for track in self._tracks.values()})

    def told(self, waits: list[Wait]) -> None:
        """Take spans; called by the receiver, in a thread of its own, one at a time."""
        for wait in waits:
            if wait.holders:
                self._waits.pop((wait.source, wait.pool), None)
                self._waits[wait.source, wait.pool] = wait
        while len(self._waits) > MAX_POOLS:
            del self._waits[next(iter(self._waits))]

    def look(self, receiver: Receiver, now: float) -> None:
        """Take what the receiver has heard since the last look, and let it forget what is long gone."""
        if receiver.exports != self._exports:
            self._exports = receiver.exports
            self._note(rows(receiver.series()))
        for track in self._tracks.values():
            track.wait = self._waits.get((track.row.source, track.row.key[0]), track.wait)
        self._forget(receiver, now)

    def _note(self, told: list[PoolRow]) -> None:
        for row in told:
            if row.key in self._tracks:
                self._tracks[row.key].note(row)
            else:
                self._tracks[row.key] = Track(row)
        kept = sorted(self._tracks.items(), key=lambda item: -item[1].row.heard)[:MAX_POOLS]
        self._tracks = dict(kept)

    def _forget(self, receiver: Receiver, now: float) -> None:
        old = {key for key, track in self._tracks.items() if track.silent(now) > FORGOTTEN and track.gone(now)}
        if not old:
            return
        sources = {self._tracks[key].row.source for key in old}
        for key in old:
            del self._tracks[key]
        receiver.forget(sources - {track.row.source for track in self._tracks.values()})


# -- what it means -----------------------------------------------------------------------


def advice(track: Track) -> list[str]:
    """What the figures of a pool say is wrong, the worst first; nothing if all is well."""
    row = track.row
    full, streams = row.max is not None and (row.used or 0) >= row.max, row.streams_pending or 0
    # Over gRPC, who waits for a stream is told as waiting for a connection too.
    waiting = row.waiting if row.waiting and (full or row.waiting > streams) else 0
    told = {
        f"exhausted: all {row.max} are in use and {waiting} wait; who holds them longest, and why?": waiting and full,
        f"{row.gave_up} gave up waiting since the last export": row.gave_up,
        f"{waiting} wait, though {row.used} of {row.max or 'any number'} are in use": waiting and not full,
        f"{row.streams_pending} wait for a stream, not for a connection: {_allowed(row)}": streams,
        f"{row.orphaned} places are lost, owned by nobody: update the library, and restart": row.orphaned,
        f"{row.leaked} leaked: left to the garbage collector and never given back; use `with`": row.leaked,
        f"{row.overdue} are out for longer than the leak threshold: a leak, or work that takes long": row.overdue,
        f"{row.overflow} beyond the base size: if that is always so, raise it": (row.overflow or 0) > 0,
    }
    return [text for text, true in told.items() if true]


def _allowed(row: PoolRow) -> str:
    return "how many are allowed is not known" if row.streams_max is None else f"{row.streams_max} at once are allowed"


def holders(track: Track) -> list[str]:
    """Who held connections when somebody last got none: from which line, for how long, in which trace."""
    return [] if track.wait is None else [_held(holder) for holder in track.wait.holders[:MAX_HOLDERS]]


def _held(holder: Mapping[str, Scalar]) -> str:
    seconds, trace = holder.get(f"{words.HOLDER}.held"), holder.get(f"{words.HOLDER}.trace_id")
    since = f", for {duration(float(seconds))}" if isinstance(seconds, int | float) else ""
    return printable(f"held {_where(holder)}{since}" + (f", trace {trace}" if trace else ""), LONGEST_LINE)


def _where(holder: Mapping[str, Scalar]) -> str:
    """The line, or the task if none is known, as of code that is ours."""
    path, function = holder.get("code.file.path"), holder.get("code.function.name")
    if path is None:
        return f"by {holder.get(f'{words.HOLDER}.task', 'somebody')}"
    return f"at {path}:{holder.get('code.line.number', '?')}" + (f" in {function}" if function else "")
