"""Samples on their way: appended on the request path, counted and delivered when metrics are collected."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from threading import Lock
from typing import Any, NamedTuple, TypeVar

from . import _vocabulary as words
from ._leases import Lease
from ._merge import Histogram, record_all
from ._model import Tally

# Enough for 2000 checkouts a second at the SDK's default of one collection a minute; about 4 MiB.
LIMIT = 2**17

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
    """A wait with a story: not served at once by an idle connection, or slow, or failed."""

    seconds: float
    path: str
    error: str | None
    context: Any


class Histograms(NamedTuple):
    """Where the samples of one pool name go; None for those that nobody wants."""

    wait: Histogram | None
    use: Histogram | None
    create: Histogram | None
    life: Histogram | None


class Outbox:
    """
    What happened under one pool name and nobody has collected yet.

    The eight lists are the whole interface to the request and release paths:
    those only ever `append`, which is atomic, so a finaliser may run them
    inside anything, and they need no lock.
    """

    __slots__ = (
        "_busy",
        "_checkouts",
        "_closed",
        "_created",
        "_dropped",
        "_folding",
        "_inherited",
        "_leaked",
        "_nested",
        "busies",
        "closes",
        "creates",
        "events",
        "lives",
        "news",
        "notes",
        "uses",
        "waits",
    )

    def __init__(self) -> None:
        self.waits: list[float] = []  # of the common kind: an idle connection, at once
        self.notes: list[Note] = []  # of every other kind
        self.uses: list[float] = []
        self.creates: list[float] = []
        self.closes: list[str] = []
        self.lives: list[float] = []  # how long those lived that were closed
        self.busies: list[float] = []  # how long the server worked
        self.events: list[Event] = []  # what is worth a word
        self._checkouts: Counter[tuple[str | None, str | None]] = Counter()
        self._closed: Counter[str] = Counter()
        self._created = 0
        self._dropped = 0
        self._busy: float | None = None
        self._inherited = 0
        self._nested = 0
        self._leaked: Counter[str] = Counter()
        self.news: deque[Event] = deque(maxlen=WORDS)  # of the events, those that nobody has heard of yet
        self._folding = Lock()

    def __repr__(self) -> str:
        return f"<Outbox [{self._waiting()} samples waiting, {self._dropped} dropped]>"

    def _waiting(self) -> int:
        return len(self.waits) + len(self.notes) + len(self.uses) + len(self.creates) + len(self.lives)

    def deliver(self, histograms: Histograms, identity: Mapping[str, str | int]) -> None:
        """Record everything that is waiting; called inside a collection, so it is part of that export."""
        with self._folding:
            waits, notes, uses, creates, lives = self._take()
        for histogram, samples in ((histograms.use, uses), (histograms.create, creates), (histograms.life, lives)):
            if histogram is not None:
                record_all(histogram, samples, identity)
        if histograms.wait is not None:
            _deliver_waits(histograms.wait, waits, notes, identity)

    def counted(self, error: str | None, more: int) -> None:
        """Add checkouts that somebody else has counted, whose path nobody knows; called inside a collection."""
        with self._folding:
            self._checkouts[None, error] += more

    def overdue(self) -> None:
        """Count one more connection that is out for too long."""
        with self._folding:
            self._leaked[words.OVERDUE] += 1

    def spill(self) -> None:
        """
        Make room when nobody collects: what is dropped is still counted.

        Called on the request path, hence never waits: whoever comes second
        while a collection or another spill is at it simply goes on.
        """
        if self._folding.acquire(blocking=False):
            try:
                self._dropped += sum(len(samples) for samples in self._take())
            finally:
                self._folding.release()

    def tally(self) -> Tally:
        """What has been counted so far."""
        checkouts = dict(self._checkouts)  # in one step: a request may be spilling
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

    def _take(self) -> tuple[list[float], list[Note], list[float], list[float], list[float]]:
        """Empty the lists and count what was in them."""
        waits, notes, uses, creates = _cut(self.waits), _cut(self.notes), _cut(self.uses), _cut(self.creates)
        if waits:
            self._checkouts[words.IDLE, None] += len(waits)
        self._checkouts.update((note.path, note.error) for note in notes)
        self._created += len(creates)
        self._closed.update(_cut(self.closes))
        busies, events = _cut(self.busies), _cut(self.events)
        if busies:
            self._busy = (self._busy or 0.0) + sum(busies)
        what = Counter(event.what for event in events)
        self._nested += what[words.NESTED]
        self._inherited += what[words.INHERITED]
        self._leaked[words.COLLECTED] += what[words.COLLECTED]
        self.news.extend(events)
        return waits, notes, uses, creates, _cut(self.lives)


def _deliver_waits(wait: Histogram, waits: list[float], notes: list[Note], identity: Mapping[str, str | int]) -> None:
    record_all(wait, waits, {**identity, words.PATH: words.IDLE})
    alike: defaultdict[tuple[str, str | None], list[float]] = defaultdict(list)
    for note in notes:
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
