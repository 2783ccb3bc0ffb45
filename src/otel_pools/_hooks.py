"""The verbs a target's table is written in, and how each attaches to a method of someone else's library."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import update_wrapper
from typing import TYPE_CHECKING, Any, Protocol

from . import _vocabulary as words
from ._guard import guard, lost_quietly
from ._outbox import LIMIT
from ._watch import Refusal, clock, current_passage, detour, tickets

if TYPE_CHECKING:
    from ._registry import Registry

Pick = Callable[[Any], Any]
Undo = Callable[[], None]
Compile = Callable[[Callable[..., Any], "Registry"], Callable[..., Any]]


class Row(Protocol):
    """A row of a table: anything that can be put on and returns what takes it off."""

    @property
    def verb(self) -> str: ...
    @property
    def where(self) -> str: ...
    def install(self, registry: Registry) -> Undo: ...


@dataclass(frozen=True, slots=True)
class Hook:
    """
    One row of a table: a method, and what a call to it means.

    Attributes:
        verb: The meaning, for the log line when this version of the library has no such method.
        where: ``module:Class.method``.
        compile: From the original and a registry to the function that takes its place.
    """

    verb: str
    where: str
    compile: Compile

    def install(self, registry: Registry) -> Undo:
        """
        Swap the method for its instrumented twin; return what swaps it back.

        A plain attribute swap on the class: it reaches pools that exist
        already, and, unlike adding an event listener, has no moment at which
        another thread's checkout could break.

        Raises:
            LookupError: This version of the library has no such method.
        """
        owner, name = _resolve(self.where)
        original = vars(owner)[name]
        plain = original.__func__ if isinstance(original, classmethod) else original
        twin: Any = update_wrapper(self.compile(plain, registry), plain)
        if isinstance(original, classmethod):
            twin = classmethod(twin)
        setattr(owner, name, twin)

        def undo() -> None:
            # Whoever wrapped our twin since keeps it; it finds no watch any more and passes through.
            if vars(owner).get(name) is twin:
                setattr(owner, name, original)

        return undo


def _resolve(where: str) -> tuple[Any, str]:
    module, _, path = where.partition(":")
    *parents, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for parent in parents:
        owner = getattr(owner, parent, None)
    if name not in getattr(owner, "__dict__", ()):
        raise LookupError(where)
    return owner, name


def acquire(where: str, *, lease: Pick, refusal: Refusal) -> Hook:
    """
    A call on a pool that borrows a connection; its duration is the wait time.

    Args:
        where: The method.
        lease: From its result to the object that stands for the loan until it
            is released; None if this call only shared an earlier loan.
        refusal: From an error to the word for "the pool had none", or None.
    """

    def compile(original: Callable[..., Any], registry: Registry) -> Callable[..., Any]:
        watches, meet, passage = registry.watches, registry.meet, current_passage

        # All of the common case stands here, because a call would cost as much as any of its lines.
        def checkout(pool: Any, *args: Any, **kwargs: Any) -> Any:
            watch = watches.get(id(pool)) or meet(pool)
            if watch is None:
                return original(pool, *args, **kwargs)
            ticket = next(tickets)
            watch.waiting[ticket] = start = clock()
            try:
                # Unpacking costs more than asking whether there is anything to unpack.
                result = original(pool, *args, **kwargs) if args or kwargs else original(pool)
            except BaseException as error:
                watch.failed(ticket, start, error, refusal)
                raise
            end = clock()
            watch.waiting.pop(ticket, None)
            try:
                held = lease(result)
                if held is not None:
                    leases = watch.leases
                    leases[id(held)] = end
                    if len(leases) > watch.ledger.peak:
                        watch.ledger.peak = len(leases)
                    seconds = end - start
                    if passage() is None and seconds < watch.slow:
                        waits = watch.waits
                        waits.append(seconds)
                        if len(waits) > LIMIT:
                            watch.ledger.outbox.spill()
                    else:
                        watch.acquired(start, seconds)
            except Exception as mistake:
                lost_quietly("a checkout", mistake)
            return result

        return checkout

    return Hook("acquire", where, compile)


def release(where: str, *, pool: Pick) -> Hook:
    """
    A call on what was lent that gives it back; it ends the use time.

    A finaliser may make it, inside any lock at all: what happens here takes
    no lock, makes no SDK call and logs nothing.
    """

    def compile(original: Callable[..., Any], registry: Registry) -> Callable[..., Any]:
        watches, find = registry.watches, registry.find

        def checkin(held: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                owner = pool(held)
                watch = watches.get(id(owner)) or find(owner)
                if watch is not None:
                    since = watch.leases.pop(id(held), None)
                    if since is None:
                        watch.returned(held)
                    else:
                        watch.uses.append(clock() - since)
            except Exception as mistake:
                lost_quietly("a checkin", mistake)
            return original(held, *args, **kwargs) if args or kwargs else original(held)

        return checkin

    return Hook("release", where, compile)


def queue(where: str, *, items: Pick) -> Hook:
    """A `get(block, timeout)` as of `queue.Queue`; a checkout that calls it with no *items* there stands in line."""

    def compile(original: Callable[..., Any], registry: Registry) -> Callable[..., Any]:
        def get(line: Any, block: bool = True, timeout: float | None = None) -> Any:
            try:
                if block and not items(line) and registry.active:
                    detour(words.QUEUED)
            except Exception as mistake:
                lost_quietly("a queue", mistake)
            return original(line, block, timeout)

        return get

    return Hook("queue", where, compile)


def create(where: str, *, pool: Pick, opened: Callable[[Any], bool]) -> Hook:
    """
    A call on a connection's record that opens it; its duration is the create time.

    Args:
        where: The method.
        pool: From the record to its pool.
        opened: Whether the record has a connection though the call failed.
    """

    def compile(original: Callable[..., Any], registry: Registry) -> Callable[..., Any]:
        def connect(record: Any, *args: Any, **kwargs: Any) -> Any:
            watch = None
            with guard("a creation"):
                watch = registry.find(pool(record))
            if watch is None:
                return original(record, *args, **kwargs)
            start, passage = clock(), detour(words.NEW)
            passage.creating = True
            watch.met(record)
            watch.creating.add(id(record))
            try:
                result = original(record, *args, **kwargs)
            except BaseException as error:
                passage.failed = error
                with guard("a failed creation"):
                    # Whatever is left of it is not idle: it never was in the pool.
                    watch.members.pop(id(record), None)
                    # Opened, and closed again (or not even that) when a listener of the user's failed.
                    if passage.created or opened(record):
                        watch.created(start)
                raise
            finally:
                passage.creating = passage.created = False
                watch.creating.discard(id(record))
            watch.created(start)
            return result

        return connect

    return Hook("create", where, compile)


def close(where: str, *, reason: Callable[[], str]) -> Hook:
    """A call on a pool that closes one connection for good; *reason* says why (it may look at its callers)."""

    def compile(original: Callable[..., Any], registry: Registry) -> Callable[..., Any]:
        def discard(pool: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                watch = registry.find(pool)
                if watch is not None:
                    watch.closed(reason())
                    passage = current_passage()
                    if passage is not None and passage.creating:
                        passage.created = True
            except Exception as mistake:
                lost_quietly("a close", mistake)
            return original(pool, *args, **kwargs)

        return discard

    return Hook("close", where, compile)


def replace(where: str, *, pool: Pick) -> Hook:
    """A call after which its pool hands out no more connections, because another one does."""

    def compile(original: Callable[..., Any], registry: Registry) -> Callable[..., Any]:
        def dispose(thing: Any, *args: Any, **kwargs: Any) -> Any:
            old = None
            with guard("a pool to be replaced"):
                old = pool(thing)
            try:
                return original(thing, *args, **kwargs)
            finally:
                with guard("a replaced pool"):
                    new = pool(thing)
                    if old is not None and new is not old:
                        registry.close_down(old)
                        registry.sight(new)

        return dispose

    return Hook("replace", where, compile)


def after(where: str, do: Callable[..., None]) -> Hook:
    """A call after which there is something to learn: *do* gets its arguments and the registry."""

    def compile(original: Callable[..., Any], registry: Registry) -> Callable[..., Any]:
        def then(thing: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(thing, *args, **kwargs)
            with guard(where):
                do(registry, thing, *args, **kwargs)
            return result

        return then

    return Hook("after", where, compile)
