"""Samples on their way: appended on the request path, counted when somebody looks, delivered to who collects."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import Lock
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

from . import _vocabulary as words
from ._leases import Lease
from ._merge import Histogram, record_all
from ._model import Tally, Timing
from ._period import Period
from ._timings import Distribution

# Enough for 2000 checkouts a second at the SDK's default of one collection a minute; about 4 MiB.
LIMIT = 2**17
# Seconds; nobody counts for that long.
PATIENCE = 1.0
# From so many samples on, to go from bin to bin takes less than to look at each.
MANY = 1000

T = TypeVar("T")


class Event(NamedTuple):
    """Something worth a word: what, about which loan, after how many seconds, and what other loan has a part in it."""

    what: str
    lease: Lease
    seconds: float
    other: Lease | None = None


# So many are said at the next collection; of more only their number is told.
WORDS = 100


class Note(NamedTuple):
    """
    A wait with a story: not served at once by an idle connection, or slow, or failed.

    It ended *at* this moment on the clock of `_watch`.
    """

    seconds: float
    path: str
    error: str | None
    context: Any
    at: float


class Histograms(NamedTuple):
    """Where the samples of one pool name go; None for those that nobody wants."""

    wait: Histogram | None
    use: Histogram | None
    create: Histogram | None
    life: Histogram | None


class Batch(NamedTuple):
    """Samples that are counted and wait for a collection."""

    waits: list[float]
    queues: list[float]
    notes: list[Note]
    uses: list[float]
    creates: list[float]
    lives: list[float]

    def plus(self, other: Batch) -> Batch:
        """Both, the other's last."""
        return Batch(
            self.waits + other.waits,
            self.queues + other.queues,
            self.notes + other.notes,
            self.uses + other.uses,
            self.creates + other.creates,
            self.lives + other.lives,
        )

    def sizes(self) -> list[int]:
        """How many there are of each kind."""
        return [len(samples) for samples in self]


NOTHING = Batch([], [], [], [], [], [])


class Outbox:
    """
    What happened under one pool name and nobody has collected yet.

    The nine lists are the whole interface to the request and release paths:
    those only ever `append`, which is atomic, so a finaliser may run them
    inside anything, and they need no lock.

    Whoever looks has them counted, and what was in them is kept for the SDK:
    the statistics take nothing away from the metrics, and need none.
    """

    __slots__ = (
        "_busy",
        "_checkouts",
        "_closed",
        "_created",
        "_dropped",
        "_elsewhere",
        "_folding",
        "_inherited",
        "_kept",
        "_leaked",
        "_nested",
        "busies",
        "closes",
        "creates",
        "events",
        "lives",
        "news",
        "notes",
        "period",
        "queues",
        "uses",
        "waits",
    )

    def __init__(self) -> None:
        self.waits: list[float] = []  # of the common kind: an idle connection, at once
        self.queues: list[float] = []  # of who stood in line, and soon got an idle one
        self.notes: list[Note] = []  # of every other kind
        self.uses: list[float] = []
        self.creates: list[float] = []
        self.closes: list[str] = []
        self.lives: list[float] = []  # how long those lived that were closed
        self.busies: list[float] = []  # how long the server worked
        self.events: list[Event] = []  # what is worth a word
        self._elsewhere: list[tuple[str | None, int]] = []  # checkouts that somebody else has counted
        self._checkouts: Counter[tuple[str | None, str | None]] = Counter()
        self._closed: Counter[str] = Counter()
        self._created = 0
        self._dropped = 0
        self._busy: float | None = None
        self._inherited = 0
        self._nested = 0
        self._leaked: Counter[str] = Counter()
        self.news: deque[Event] = deque(maxlen=WORDS)  # of the events, those that nobody has heard of yet
        self.period = Period()
        self._kept = NOTHING
        self._folding = Lock()

    def __repr__(self) -> str:
        return f"<Outbox [{self._waiting()} samples waiting, {self._dropped} dropped]>"

    def _waiting(self) -> int:
        return sum(map(len, self._lists())) + sum(self._kept.sizes())

    def _lists(self) -> tuple[list[Any], ...]:
        return self.waits, self.queues, self.notes, self.uses, self.creates, self.lives

    def fold(self) -> None:
        """Count everything that is waiting, and keep it for who collects."""
        if any(self._lists()) or self.closes or self.events or self.busies:
            with self._alone() as alone:
                if alone:
                    self._fold()
                    if max(self._kept.sizes()) > LIMIT:
                        self._drop()

    def deliver(self, histograms: Histograms, identity: Mapping[str, str | int]) -> None:
        """Record everything that is waiting; called inside a collection, so it is part of that export."""
        with self._alone() as alone:
            if not alone:  # then it is for the next one
                return
            self._fold(collecting=True)
            batch, self._kept = self._kept, NOTHING
        for histogram, samples in (
            (histograms.use, batch.uses),
            (histograms.create, batch.creates),
            (histograms.life, batch.lives),
        ):
            if histogram is not None:
                record_all(histogram, samples, identity)
        if histograms.wait is not None:
            _deliver_waits(histograms.wait, batch, identity)

    def counted(self, error: str | None, more: int) -> None:
        """Add checkouts that somebody else has counted, whose path nobody knows; may be called by a finaliser."""
        self._elsewhere.append((error, more))

    def overdue(self) -> None:
        """Count one more connection that is out for too long."""
        with self._alone():
            self._leaked[words.OVERDUE] += 1

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Whether nobody else counts meanwhile; a signal handler cannot wait for whom it has interrupted."""
        alone = self._folding.acquire(timeout=PATIENCE)
        try:
            yield alone
        finally:
            if alone:
                self._folding.release()

    def spill(self) -> None:
        """
        Make room when nobody collects: what is dropped is still counted.

        Called on the request path, hence never waits: whoever comes second
        while a collection or another spill is at it simply goes on.
        """
        if self._folding.acquire(blocking=False):
            try:
                self._fold()
                self._drop()
            finally:
                self._folding.release()

    def tally(self) -> Tally:
        """What has been counted so far; what waits in the lists is not."""
        with self._alone():
            return self._tally()

    def _tally(self) -> Tally:
        for error, more in _cut(self._elsewhere):
            self._checkouts[None, error] += more
            if error is not None and more:
                self.period.failures[error] = perf_counter()
        checkouts = dict(self._checkouts)
        timeouts = sum(count for (_, error), count in checkouts.items() if error == words.TIMEOUT)
        return Tally(
            checkouts=checkouts,
            timeouts=timeouts,
            created=self._created,
            closed=dict(self._closed),
            dropped=self._dropped,
            leaked=dict(self._leaked),
            nested=self._nested,
            inherited=self._inherited,
            busy=self._busy,
        )

    def account(self) -> tuple[Tally, Timing, Timing, Timing]:
        """What happened in this period, and how long waits, uses and creations took in it; all of one moment."""
        with self._alone():
            period = self.period
            waits, uses, creates = period.wait.timing(), period.use.timing(), period.create.timing()
            return period.tally(self._tally()), waits, uses, creates

    def restart(self, held: int) -> None:
        """Let a new period begin; *held* is how many connections are out."""
        with self._alone() as alone:
            if alone:  # or what another counts just now would be counted twice
                self._fold()
            self.period.restart(self._tally(), held)

    def _fold(self, *, collecting: bool = False) -> None:
        """Empty the lists, and count what was in them."""
        fresh = Batch(*map(_cut, self._lists()))
        for path, samples in ((words.IDLE, fresh.waits), (words.QUEUED, fresh.queues)):
            if samples:
                self._checkouts[path, None] += len(samples)
        if fresh.notes:
            self._note(fresh.notes)
        self._created += len(fresh.creates)
        self._closed.update(_cut(self.closes))
        busies, events = _cut(self.busies), _cut(self.events)
        if busies:
            self._busy = (self._busy or 0.0) + sum(busies)
        if events:
            self._tell(events)
        _time(self.period.wait, fresh.waits, collecting)
        _time(self.period.wait, fresh.queues, collecting)
        _time(self.period.use, fresh.uses, collecting)
        _time(self.period.create, fresh.creates, collecting)
        self._kept = self._kept.plus(fresh) if any(self._kept.sizes()) else fresh

    def _note(self, notes: list[Note]) -> None:
        counted = Counter((note.path, note.error) for note in notes)
        self._checkouts.update(counted)
        self.period.wait.add([note.seconds for note in notes])
        if any(error is not None for _, error in counted):
            self.period.failures.update({note.error: note.at for note in notes if note.error is not None})

    def _tell(self, events: list[Event]) -> None:
        what = Counter(event.what for event in events)
        self._nested += what[words.NESTED]
        self._inherited += what[words.INHERITED]
        self._leaked[words.COLLECTED] += what[words.COLLECTED]
        self.news.extend(events)

    def _drop(self) -> None:
        """Nobody has collected for too long."""
        self._dropped += sum(self._kept.sizes())
        self._kept = NOTHING


def _time(distribution: Distribution, samples: list[float], collecting: bool) -> None:
    # To merge them into the SDK they will be sorted anyway.
    if collecting and len(samples) > MANY:
        samples.sort()
        distribution.add_sorted(samples)
    else:
        distribution.add(samples)


def _deliver_waits(wait: Histogram, batch: Batch, identity: Mapping[str, str | int]) -> None:
    record_all(wait, batch.waits, {**identity, words.PATH: words.IDLE})
    alike: defaultdict[tuple[str, str | None], list[float]] = defaultdict(list)
    if batch.queues:
        alike[words.QUEUED, None].extend(batch.queues)
    for note in batch.notes:
        if note.context is None:
            alike[note.path, note.error].append(note.seconds)
        else:  # by itself, so that its exemplar points at the trace that waited
            wait.record(note.seconds, _told(identity, note.path, note.error), note.context)
    for (path, error), samples in alike.items():
        record_all(wait, samples, _told(identity, path, error))


def _told(identity: Mapping[str, str | int], path: str, error: str | None) -> dict[str, str | int]:
    told = {**identity, words.PATH: path}
    return told if error is None else {**told, words.ERROR: error}


def _cut(samples: list[T]) -> list[T]:
    """Take what is there now; whatever is appended meanwhile stays for the next time."""
    taken = samples[:]
    del samples[: len(taken)]
    return taken
