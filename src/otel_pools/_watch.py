"""Our record of one pool, and of one pool name: who waits, who holds, and since when."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import replace
from operator import itemgetter
from threading import Lock
from time import perf_counter
from typing import TYPE_CHECKING, Any

from . import _vocabulary as words
from ._guard import guard, lost, lost_quietly
from ._leases import Lease, settle, who
from ._model import Identity, Load, Origin, Snapshot
from ._outbox import LIMIT, Event, Note, Outbox

if TYPE_CHECKING:
    from typing_extensions import Self

    from ._registry import Registry

clock = perf_counter
# Before we came: how long such a connection has lived nobody knows.
LONG_AGO = 0.0
# Seconds; so often it is looked whether what was noted is too much, because nobody collects.
A_WHILE = 1.0

Refusal = Callable[[BaseException], str | None]

# Of how many origins a name's pools may have been before we stop to say that they have nothing now.
ORIGINS = 100


# All there are, held weakly: while there is none anywhere, nobody need ask whether there is one here.
passages: set[weakref.ref[Passage]] = set()


class Passage:
    """What happened on the way to one connection; only made when something did."""

    __slots__ = ("__weakref__", "created", "creating", "failed", "outer", "path", "since")

    def __init__(self, path: str, outer: Passage | None) -> None:
        passages.add(weakref.ref(self, passages.discard))
        self.path = path
        self.outer = outer
        self.since = clock()
        self.creating = 0  # the id of what is being opened
        self.created = False
        # The id of the error of opening it: the error has its frames, and would keep alive whatever is in them.
        self.failed = 0

    def __repr__(self) -> str:
        return f"<Passage {self.path}{', creating' if self.creating else ''}>"


# The passage of the checkout that is under way in this thread, task or greenlet.
# A context variable is the one thing that all three of them keep apart.
_passage: ContextVar[Passage | None] = ContextVar("otel_pools_passage", default=None)


def detour(path: str) -> Passage:
    """Note that the current checkout takes this path; having queued outweighs the rest."""
    passage = _passage.get()
    if passage is None or passage.creating:
        # A creator that itself asks a pool begins a story inside the story.
        passage = Passage(path, passage)
        _passage.set(passage)
    else:
        # It may be left over from a connection that was opened outside of any checkout.
        passage.since = clock()
        if passage.path != words.QUEUED:
            passage.path = path
    return passage


# The story of the checkout under way here, or None.
current_passage = _passage.get


def _ended(passage: Passage | None, start: float) -> Passage | None:
    """Close the story of a checkout that began at *start*; another's story is none of its."""
    if passage is None or passage.creating:
        return None
    _passage.set(passage.outer)
    return passage if passage.since >= start else None


def no_more(line: list[float], since: float) -> None:
    """Who waits there since this moment waits no more."""
    with suppress(ValueError):
        line.remove(since)


class KeyedRef(weakref.ref[Any]):
    """A weak reference that knows which entry of a table it stands in."""

    __slots__ = ("key",)

    key: int

    def __new__(cls, thing: Any, gone: Callable[[KeyedRef], None], key: int | None = None) -> Self:
        ref = super().__new__(cls, thing, gone)
        ref.key = id(thing) if key is None else key
        return ref

    def __init__(self, thing: Any, gone: Callable[[KeyedRef], None], *_: int | None) -> None:
        super().__init__(thing, gone)  # type: ignore[call-arg]  # typeshed has it in __new__ alone


class Ledger:
    """
    All pools of one name: who waits, who holds, and what happened.

    Shared by those pools, so that a peak is one of the name and not a sum of
    peaks that never coincided. Only atomic operations of `dict` and `list`
    happen outside a collection.
    """

    __slots__ = ("__weakref__", "_origins", "identity", "leases", "looking", "outbox", "overdue", "peak", "waiting")

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self.waiting: list[float] = []  # since when; whose is all the same
        self.leases: dict[int, Lease] = {}  # id of what is held -> by whom, and since when
        self.overdue: dict[int, Lease] = {}  # those that were out for too long at the last look
        self.looking = Lock()  # of two collections at once the second takes what the first has found
        self.peak = 0
        self.outbox = Outbox()
        self._origins: dict[Origin, Load] = {}

    def __repr__(self) -> str:
        return f"<Ledger {self.identity.name} [{len(self.leases)} held, {len(self.waiting)} waiting]>"

    def take_peak(self, used: int) -> int:
        """The highest number held since this was last asked, *used* being what is held now."""
        peak, self.peak = max(self.peak, used), used
        return peak

    def with_former(self, origins: Mapping[Origin, Load] | None) -> Mapping[Origin, Load] | None:
        """These origins, and nothing for those that had something before: who keeps the last value hears of the end."""
        if origins is None:
            return None
        if len(self._origins) > ORIGINS:
            self._origins.clear()
        self._origins.update(dict.fromkeys(origins, Load()))
        return {**self._origins, **origins}


def age(since: Iterable[float], now: float) -> float:
    """How long ago the earliest of these moments was, in seconds; 0 if there is none."""
    return now - min(since, default=now)


class _Way:
    """
    What every checkout and checkin looks at.

    The slots of a base stand side by side in memory, which is worth 0.4 to 0.9 % of a checkout.
    """

    __slots__ = (
        "due",
        "holding",
        "leases",
        "ledger",
        "orphans",
        "patience",
        "queues",
        "slow",
        "uses",
        "waiting",
        "waits",
    )

    due: float
    holding: dict[int, int | set[int]]
    leases: dict[int, Lease]
    ledger: Ledger
    orphans: set[int]
    patience: float
    queues: list[float]
    slow: float
    uses: list[float]
    waiting: list[float]
    waits: list[float]


class Watch(_Way):
    """
    Our record of one pool.

    The verbs of a table end here. What every checkout and checkin does, the
    verbs themselves do with the containers below; they `append`, `pop` and
    assign, and nothing else, as the garbage collector may call them anywhere.
    """

    __slots__ = (
        "_missing",
        "_read",
        "_spans",
        "busy",
        "closed_down",
        "creating",
        "inherited",
        "lend",
        "made",
        "members",
        "notes",
        "opened",
        "owners",
        "pool",
        "registry",
        "working",
    )

    def __init__(self, pool: weakref.ref[Any], ledger: Ledger, registry: Registry) -> None:
        self.pool = pool
        self.holding = {}  # who -> id of what it has of this pool, or the ids
        self.owners = registry.owners  # shared by all pools: id of a connection -> whose it is
        self.members: dict[int, KeyedRef] = {}  # the connections we have met, held weakly
        self.creating: set[int] = set()  # ids of those being opened: open perhaps, but not idle
        self.opened: dict[int, float] = {}  # ids of those that are open, and not seen closing -> since
        self.inherited: dict[int, KeyedRef] = {}  # those that were there when this process was forked
        self.busy: dict[int, tuple[Lease, float]] = {}  # id of a connection -> its loan, and seconds the server worked
        self.working: dict[int, float] = {}  # id of a connection for which the server works now -> since
        self.made: set[int] = set()  # ids of those that we have seen being made, and not yet opened
        self.orphans = set()  # ids of those that were lost on their way back
        self.closed_down = False
        self._missing = 0
        self._read = registry.target.read
        self._spans = registry.spans
        self.slow = registry.spans.threshold
        self.due = clock() + A_WHILE
        self.patience = registry.patience
        self.lend = registry.lend
        self.registry = registry
        self.move(ledger)

    def __repr__(self) -> str:
        identity, now = self.ledger.identity, self.snapshot()
        system = identity.system or identity.library
        where = f"{system} at {identity.server}" if identity.server else system
        of = "" if now.max is None else f" of {now.max}"
        return f"<Watch {identity.name} on {where} [{now.used} used, {now.idle} idle{of} | {now.pending} waiting]>"

    def move(self, ledger: Ledger, leases: Iterable[int] = ()) -> None:
        """Go by another name from now on, and take these leases along."""
        for key in list(leases):
            if (lease := self.leases.pop(key, None)) is not None:
                ledger.leases[key] = lease
            if (lease := self.ledger.overdue.pop(key, None)) is not None:
                ledger.overdue[key] = lease
        self.ledger = ledger
        # Short cuts: these are looked up on every checkout.
        self.waiting, self.leases = ledger.waiting, ledger.leases
        outbox = ledger.outbox
        self.waits, self.queues, self.uses, self.notes = outbox.waits, outbox.queues, outbox.uses, outbox.notes

    # -- what can happen -------------------------------------------------------

    def acquired(self, start: float, end: float, key: int, queued: bool = False) -> None:
        """Somebody got a connection, slowly or by a detour, or a while is over; the common case never comes here."""
        if self.inherited:
            self._inherits(key)
        if queued:
            detour(words.QUEUED)
        path, seconds = _path(_ended(_passage.get(), start)), end - start
        if seconds >= self._spans.threshold or (path == words.NEW and self.state().overflow):
            self.noted(seconds, path, None, self.span(seconds, path, None))
        elif path == words.IDLE:
            self.waits.append(seconds)
        else:
            self.noted(seconds, path, None, None)
        if end >= self.due:
            self.tidy(end)

    def tidy(self, now: float) -> None:
        """If nobody collects, make room; looked at once in a while, as every checkout would pay for it."""
        self.due = now + A_WHILE
        if max(len(self.waits), len(self.queues)) > LIMIT:
            self.ledger.outbox.spill()

    def inherit(self, connections: Mapping[int, KeyedRef]) -> None:
        """These were opened by the process that this one was forked from; whoever gets one is not the common case."""
        self.inherited.update(connections)
        self.slow = -1.0 if self.inherited else self._spans.threshold

    def _inherits(self, key: int) -> None:
        """The parent may use the same socket; each is told once."""
        ref, lease = self.inherited.pop(key, None), self.leases.get(key)
        # One that is gone may have left its id to another.
        if ref is not None and ref() is not None and lease is not None:
            self.ledger.outbox.events.append(Event(words.INHERITED, lease, 0.0))
        self.inherit({})

    def worked(self, key: int) -> None:
        """The server has worked for who holds this connection, since `working`."""
        now = clock()
        seconds = now - self.working.pop(key, now)
        self.ledger.outbox.busies.append(seconds)
        lease = self.leases.get(key)
        if lease is not None:
            known = self.busy.get(key)
            self.busy[key] = lease, seconds + (known[1] if known is not None and known[0] is lease else 0.0)

    def busy_for(self, key: int, lease: Lease) -> float | None:
        """How long it has worked for this loan by now, what is under way included; None if nobody counts."""
        known, now = self.busy.get(key), clock()
        under_way = now - self.working.get(key, now)
        if known is None:
            return under_way or None
        return under_way + (known[1] if known[0] is lease else 0.0)

    def nests(self, owner: int, key: int | None) -> None:
        """Who holds one has asked for another, and got that of this *key* or none; if all do so, nobody gets one."""
        if settle():
            return  # who seemed to be one are several
        held = self.holding.get(owner, 0)
        keys = set(held) if isinstance(held, set) else {held}
        other = self.lend(clock()) if key is None else self.leases.get(key)
        outer = [lease for each in keys - {key} if (lease := self.leases.get(each)) is not None]
        # The same number with another name is somebody else: it is given again when its thread or task has ended.
        outer = [lease for lease in outer if other is None or lease[2] == other[2]]
        if outer:
            lease = min(outer, key=itemgetter(0))
            self.ledger.outbox.events.append(Event(words.NESTED, lease, 0.0, other))
        if key is not None:
            self.holding[owner] = {*keys, key} if outer else key

    def has_back(self, owner: int, key: int, held: int | set[int] | None) -> None:
        """*owner* has given back this *key*, and has not only that: of what it *held* the rest stays."""
        if isinstance(held, set):
            held.discard(key)
            if held:
                self.holding[owner] = held if len(held) > 1 else held.pop()
        elif held is not None:
            self.holding[owner] = held

    def failed(
        self, line: list[float], start: float, error: BaseException, refusal: Refusal, queued: bool = False
    ) -> None:
        """Somebody asked, waited in this line and got none; *error* goes on to the caller untouched."""
        with guard("a failed checkout"):
            no_more(line, start)
            if queued:
                detour(words.QUEUED)
            if (owner := who()[0]) in self.holding:
                self.nests(owner, None)
            seconds = clock() - start
            passage = _ended(_passage.get(), start)
            if type(error).__qualname__ in ABANDONED:
                self.noted(seconds, _path(passage), words.CANCELLED, None)
            else:
                refused = 0 if passage is None else passage.failed
                self.refused(seconds, _path(passage), kind(error, refused, refusal))

    def refused(self, seconds: float, path: str, error: str) -> None:
        """Somebody got none, for this reason."""
        self.noted(seconds, path, error, self.span(seconds, path, error))
        if error in {words.TIMEOUT, words.EXHAUSTED}:
            self._spans.exhausted(self, seconds)

    def span(self, seconds: float, path: str, error: str | None) -> Any:
        """Write the span of a wait that has just ended; returns the context for its exemplar."""
        return self._spans.waited(self, seconds, path, error)

    def returned(self, lease: Any) -> None:
        """Something came back that we had not seen go out; if it was out before we came, we know it now."""
        if id(lease) not in self.members:
            self.met(lease)

    def ended(self, connection: Any) -> None:
        """A loan ended, but not by coming back."""
        key = id(connection)
        lease = self.leases.pop(key, None)
        if lease is not None:
            self.used(key, lease, clock())

    def used(self, key: int, lease: Lease, end: float) -> None:
        """A loan ended."""
        self._has_left(key, lease)
        seconds = end - lease[0]
        self.uses.append(seconds)
        if seconds > self.patience:
            self.late(lease, seconds)

    def _has_left(self, key: int, lease: Lease) -> None:
        """As who gives back does it."""
        # Of an HTTP pool nobody is known to hold, and without holders a lease has no owner.
        if self.holding and (held := self.holding.pop(lease[1], None)) is not None and held != key:
            self.has_back(lease[1], key, held)

    def late(self, lease: Lease, seconds: float) -> None:
        """A loan ended after all."""
        self.ledger.outbox.events.append(Event(words.LATE, lease, seconds))

    def collected(self, lease: Lease) -> None:
        """The garbage collector gave back what its owner had dropped."""
        self.ledger.outbox.events.append(Event(words.COLLECTED, lease, clock() - lease[0]))

    def kept(self, connection: Any, lease: Lease) -> None:
        """What should have come back did not: it is out as before, and nobody holds it any more."""
        self._has_left(id(connection), lease)
        self.leases[id(connection)] = lease
        self.orphans.add(id(connection))

    def met(self, connection: Any) -> None:
        """Know *connection* from now on, for as long as it lives."""
        self.members[id(connection)] = KeyedRef(connection, self._gone)
        self.owners[id(connection)] = self

    def unmeet(self, connection: Any) -> None:
        """Know it no more, though it lives: nobody would note when it goes."""
        self.members.pop(id(connection), None)
        self.owners.pop(id(connection), None)

    def _gone(self, ref: KeyedRef) -> None:
        try:
            self._forget(ref)
        except Exception as mistake:
            lost_quietly("a connection that is gone", mistake)

    def _forget(self, ref: KeyedRef) -> None:
        lease = self.leases.pop(ref.key, None)
        if lease is not None:
            self._has_left(ref.key, lease)
        for table in (self.members, self.owners, self.busy, self.working, self.inherited):
            table.pop(ref.key, None)
        self.orphans.discard(ref.key)
        self.made.discard(ref.key)
        if ref.key in self.opened:
            # Nobody closed it before the garbage collector did.
            self.shut(ref.key, words.CLOSED)

    def opening(self, connection: Any) -> Callable[[bool, BaseException | None], None]:
        """Somebody opens *connection*; returns what to call at the end: whether it is open now, and the error."""
        if id(connection) in self.opened:
            # It was closed without a word, as when two close and open it at once.
            self.shut(id(connection), words.CLOSED)
        start, passage = clock(), detour(words.NEW)
        passage.creating = id(connection)

        def ended(is_open: bool, error: BaseException | None) -> None:
            if is_open:
                self.has_opened(connection)
            if is_open or passage.created:
                self.created(start)
            passage.creating, passage.created = 0, False
            passage.failed = 0 if error is None else id(error)

        return ended

    def has_opened(self, connection: Any) -> None:
        """It is open from now on, whoever has opened it."""
        self.opened[id(connection)] = clock()
        self.made.discard(id(connection))

    def shut(self, key: int, reason: str) -> None:
        """
        A connection was closed that we have seen being opened, or it is closed while it is being opened.

        Who takes it from `opened` counts it: two may close it at once.
        """
        since = self.opened.pop(key, None)
        if since is not None:
            if since != LONG_AGO:
                self.ledger.outbox.lives.append(clock() - since)
        else:
            passage = _passage.get()
            # While one is being opened the garbage collector may close another.
            if passage is None or passage.creating != key or passage.created:
                return
            passage.created = True
        self.closed(reason)

    def created(self, start: float) -> None:
        """A connection was opened."""
        self.ledger.outbox.creates.append(clock() - start)

    def closed(self, reason: str) -> None:
        """A connection was closed."""
        self.ledger.outbox.closes.append(reason)

    def noted(self, seconds: float, path: str, error: str | None, context: Any) -> None:
        """A wait with a story."""
        self.notes.append(Note(seconds, path, error, context, clock()))
        if len(self.notes) > LIMIT:
            self.ledger.outbox.spill()

    # -- what can be asked -----------------------------------------------------

    def connections(self) -> Iterator[Any]:
        """The connections we know that are still alive."""
        for ref in list(self.members.values()):
            if (connection := ref()) is not None:
                yield connection

    def state(self) -> Snapshot:
        """What the pool says about itself now; nothing if it is gone or cannot be read."""
        pool = self.pool()
        try:
            return Snapshot() if pool is None else self._read(pool, self)
        except Exception as error:
            lost(f"reading a {type(pool).__qualname__}", error)
            return Snapshot()

    def snapshot(self) -> Snapshot:
        """What is to be told of that, at a collection."""
        now = self.state()
        if self.closed_down:
            # A pool that was replaced hands out no more, so its limits no longer count.
            return Snapshot(used=now.used, idle=now.idle, pending=now.pending)
        return now if now.orphaned is None else replace(now, orphaned=self._orphaned(now.orphaned))

    def _orphaned(self, missing: int) -> int:
        """What is in nobody's hands for a moment may be on its way; it is lost if it was missing last time too."""
        sure, self._missing = min(missing, self._missing), missing
        return sure + len(self.orphans)


# How a garbage collector ends a coroutine or greenlet that nobody waits for any more. It may do so inside
# any lock, a tracer's too, so there is no span for these.
ABANDONED = {"GeneratorExit", "GreenletExit"}


def _path(passage: Passage | None) -> str:
    return words.IDLE if passage is None else passage.path


def kind(error: BaseException, failed: int, refusal: Refusal) -> str:
    """One low-cardinality word for what went wrong; *failed* is the id of the error of opening a connection, or 0."""
    name = type(error).__qualname__
    if name in {"CancelledError", "Cancelled"}:  # asyncio's, trio's
        return words.CANCELLED
    if failed == id(error):
        return words.CONNECT_ERROR
    return refusal(error) or name
