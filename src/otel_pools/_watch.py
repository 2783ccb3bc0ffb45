"""Our record of one pool, and of one pool name: who waits, who holds, and since when."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from time import perf_counter
from typing import TYPE_CHECKING, Any

from . import _vocabulary as words
from ._guard import guard, lost
from ._model import Identity, Snapshot
from ._outbox import LIMIT, Note, Outbox

if TYPE_CHECKING:
    from ._spans import Spans

clock = perf_counter
tickets = itertools.count()

Refusal = Callable[[BaseException], str | None]


class Passage:
    """What happened on the way to one connection; only made when something did."""

    __slots__ = ("created", "creating", "failed", "outer", "path", "since")

    def __init__(self, path: str, outer: Passage | None) -> None:
        self.path = path
        self.outer = outer
        self.since = clock()
        self.creating = False
        self.created = False
        self.failed: BaseException | None = None

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
    elif passage.path != words.QUEUED:
        passage.path = path
    return passage


# The story of the checkout under way here, or None; bound, because every checkout asks.
current_passage = _passage.get


def _ended(passage: Passage | None, start: float) -> Passage | None:
    """Close the story of a checkout that began at *start*; another's story is none of its."""
    if passage is None or passage.creating:
        return None
    _passage.set(passage.outer)
    return passage if passage.since >= start else None


class KeyedRef(weakref.ref[Any]):
    """A weak reference that knows which entry of a table it stands in."""

    __slots__ = ("key",)

    def __init__(self, thing: Any, gone: Callable[[KeyedRef], None]) -> None:
        super().__init__(thing, gone)  # type: ignore[call-arg]  # typeshed has it in __new__ alone
        self.key = id(thing)


class Ledger:
    """
    All pools of one name: who waits, who holds, and what happened.

    Shared by those pools, so that a peak is one of the name and not a sum of
    peaks that never coincided. Only atomic operations of `dict` and `list`
    happen outside a collection.
    """

    __slots__ = ("identity", "leases", "outbox", "peak", "waiting")

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self.waiting: dict[int, float] = {}  # ticket -> since
        self.leases: dict[int, float] = {}  # id of what is held -> since
        self.peak = 0
        self.outbox = Outbox()

    def __repr__(self) -> str:
        return f"<Ledger {self.identity.name} [{len(self.leases)} held, {len(self.waiting)} waiting]>"

    def take_peak(self, used: int) -> int:
        """The highest number held since this was last asked, *used* being what is held now."""
        peak, self.peak = max(self.peak, used), used
        return peak


def age(since: Iterable[float], now: float) -> float:
    """How long ago the earliest of these moments was, in seconds; 0 if there is none."""
    # list() copies in one step: other threads go on writing.
    return max((now - moment for moment in list(since)), default=0.0)


class Watch:
    """
    Our record of one pool.

    The verbs of a table end here. What every checkout and checkin does, the
    verbs themselves do with the containers below; they `append`, `pop` and
    assign, and nothing else, as the garbage collector may call them anywhere.
    """

    __slots__ = (
        "_read",
        "_spans",
        "closed_down",
        "creating",
        "leases",
        "ledger",
        "members",
        "notes",
        "pool",
        "slow",
        "uses",
        "waiting",
        "waits",
    )

    def __init__(
        self, pool: weakref.ref[Any], ledger: Ledger, read: Callable[[Any, Watch], Snapshot], spans: Spans
    ) -> None:
        self.pool = pool
        self.ledger = ledger
        self.members: dict[int, KeyedRef] = {}  # the connections we have met, held weakly
        self.creating: set[int] = set()  # ids of those being opened: open perhaps, but not idle
        self.closed_down = False
        self._read = read
        self._spans = spans
        self.slow = spans.threshold
        # Short cuts: these are looked up on every checkout.
        self.waiting, self.leases = ledger.waiting, ledger.leases
        self.waits, self.uses, self.notes = ledger.outbox.waits, ledger.outbox.uses, ledger.outbox.notes

    def __repr__(self) -> str:
        identity, now = self.ledger.identity, self.snapshot()
        where = f"{identity.system} at {identity.server}" if identity.server else identity.system
        of = "" if now.max is None else f" of {now.max}"
        return f"<Watch {identity.name} on {where} [{now.used} used, {now.idle} idle{of} | {now.pending} waiting]>"

    # -- what can happen -------------------------------------------------------

    def acquired(self, start: float, seconds: float) -> None:
        """Somebody got a connection, slowly or by a detour; the common case never comes here."""
        self._noted(seconds, _ended(_passage.get(), start), None)

    def failed(self, ticket: int, start: float, error: BaseException, refusal: Refusal) -> None:
        """Somebody asked and got none; *error* goes on to the caller untouched."""
        self.waiting.pop(ticket, None)
        with guard("a failed checkout"):
            seconds = clock() - start
            passage = _ended(_passage.get(), start)
            if type(error).__qualname__ in ABANDONED:
                self.notes.append(Note(seconds, _path(passage), words.CANCELLED, None))
            else:
                self._noted(seconds, passage, _kind(error, passage, refusal))

    def returned(self, lease: Any) -> None:
        """Something came back that we had not seen go out; if it was out before we came, we know it now."""
        if id(lease) not in self.members:
            self.met(lease)

    def ended(self, lease: Any) -> None:
        """A loan ended, but not by coming back."""
        since = self.leases.pop(id(lease), None)
        if since is not None:
            self.uses.append(clock() - since)

    def met(self, connection: Any) -> None:
        """Know *connection* from now on, for as long as it lives."""
        members, leases = self.members, self.leases

        def gone(ref: KeyedRef) -> None:
            members.pop(ref.key, None)
            leases.pop(ref.key, None)

        members[id(connection)] = KeyedRef(connection, gone)

    def created(self, start: float) -> None:
        """A connection was opened."""
        self.ledger.outbox.creates.append(clock() - start)

    def closed(self, reason: str) -> None:
        """A connection was closed."""
        self.ledger.outbox.closes.append(reason)

    def _noted(self, seconds: float, passage: Passage | None, error: str | None) -> None:
        path = _path(passage)
        context = None
        if error is not None or seconds >= self.slow:
            context = self._spans.waited(self.ledger.identity, seconds, path, error)
        self.notes.append(Note(seconds, path, error, context))
        if len(self.notes) > LIMIT:
            self.ledger.outbox.spill()

    # -- what can be asked -----------------------------------------------------

    def connections(self) -> Iterator[Any]:
        """The connections we know that are still alive."""
        for ref in list(self.members.values()):
            if (connection := ref()) is not None:
                yield connection

    def snapshot(self) -> Snapshot:
        """What the pool says about itself now; nothing if it is gone or cannot be read."""
        pool = self.pool()
        if pool is None:
            return Snapshot()
        try:
            now = self._read(pool, self)
        except Exception as error:
            lost(f"reading a {type(pool).__qualname__}", error)
            return Snapshot()
        # A pool that was replaced hands out no more, so its limits no longer count.
        return Snapshot(used=now.used, idle=now.idle, pending=now.pending) if self.closed_down else now


# How a garbage collector ends a coroutine or greenlet that nobody waits for any more. It may do so inside
# any lock, a tracer's too, so there is no span for these.
ABANDONED = {"GeneratorExit", "GreenletExit"}


def _path(passage: Passage | None) -> str:
    return words.IDLE if passage is None else passage.path


def _kind(error: BaseException, passage: Passage | None, refusal: Refusal) -> str:
    """One low-cardinality word for what went wrong."""
    name = type(error).__qualname__
    if name in {"CancelledError", "Cancelled"}:  # asyncio's, trio's
        return words.CANCELLED
    if passage is not None and passage.failed is error:
        return words.CONNECT_ERROR
    return refusal(error) or name
