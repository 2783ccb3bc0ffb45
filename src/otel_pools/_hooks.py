"""The verbs a target's table is written in, and how each attaches to a method of someone else's library."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import update_wrapper
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Protocol

from . import _vocabulary as words
from ._guard import guard, lost_quietly
from ._leases import lend_nobody
from ._watch import Refusal, Watch, clock, current_passage, detour, passages

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
        owner, name = resolve(self.where)
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


@dataclass(frozen=True, slots=True)
class Either:
    """
    Rows for one meaning, of which the first that this version of the library has is put on.

    Attributes:
        optional: Whether it may have none of them, and nothing is lost then.
    """

    rows: tuple[Hook, ...]
    optional: bool = False

    @property
    def verb(self) -> str:
        """That of its rows."""
        return self.rows[0].verb

    @property
    def where(self) -> str:
        """All its places."""
        return " or ".join(row.where for row in self.rows)

    def install(self, registry: Registry) -> Undo:
        """
        Put the first that fits on.

        Raises:
            LookupError: None does, and one is needed.
        """
        for row in self.rows:
            try:
                return row.install(registry)
            except (LookupError, ImportError):
                continue
        if self.optional:
            return nothing
        raise LookupError(self.where)


def nothing() -> None:
    pass


def either(*rows: Hook) -> Either:
    """The first of these that this version of the library has."""
    return Either(rows)


def optional(row: Hook) -> Either:
    """A row for a method that older or newer versions of the library do without."""
    return Either((row,), optional=True)


def resolve(where: str) -> tuple[Any, str]:
    module, _, path = where.partition(":")
    *parents, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for parent in parents:
        owner = getattr(owner, parent, None)
    if name not in getattr(owner, "__dict__", ()):
        raise LookupError(where)
    return owner, name


def acquire(
    where: str,
    *,
    lease: Pick | str | None = None,
    refusal: Refusal,
    crowded: Pick | None = None,
    bare: Pick | None = None,
) -> Hook:
    """
    A call on a pool that borrows a connection; its duration is the wait time.

    Args:
        where: The method, a coroutine function or not.
        lease: From its result to the object that stands for the loan until it is released, None if this call only
            shared an earlier loan, or the attribute that it is; by default the result itself.
        refusal: From an error to the word for "the pool had none", or None.
        crowded: Whether who asks this pool now must stand in line, where the library has no `queue` to hook.
        bare: From the method to what does the same for a call without arguments.
    """

    def compile(original: Callable[..., Any], registry: Registry) -> Callable[..., Any]:
        plain = original if bare is None else bare(original)
        # Asked of what is inside: redis-py 5.3 to 7.1 wrap a coroutine function in a plain one.
        is_async = inspect.iscoroutinefunction(plain)
        if not is_async and crowded is None and isinstance(lease, str) and takes(original) == 1:
            return reading(_plain_checkout(original, registry, plain=plain, refusal=refusal), lent=lease)
        twin = _async_checkout if is_async else _checkout
        pick = attrgetter(lease) if isinstance(lease, str) else lease
        return twin(original, registry, plain=plain, lease=pick, refusal=refusal, crowded=crowded)

    return Hook("acquire", where, compile)


# A catch-all for arguments costs as much as ten lines of a twin: where the method has none, its twin has none either.
CATCH_ALL = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS


def takes(method: Any) -> int | None:
    """How many parameters a method has, its object included, if each can be given by place and by name."""
    code = getattr(method, "__code__", None)
    if code is None or code.co_posonlyargcount or code.co_kwonlyargcount or code.co_flags & CATCH_ALL:
        return None
    count: int = code.co_argcount
    return count


def named_like(original: Any, twin: Any) -> Callable[..., Any]:
    """The twin, with the names and defaults that its parameters have in the original."""
    names, own = original.__code__.co_varnames, twin.__code__.co_varnames
    count = twin.__code__.co_argcount
    twin.__code__ = twin.__code__.replace(co_varnames=(*names[:count], *own[count:]))
    twin.__defaults__ = original.__defaults__
    like: Callable[..., Any] = twin
    return like


def reading(twin: Any, **names: str) -> Callable[..., Any]:
    """The twin, which reads these attributes by the names that they have in the library: a pick would be a call."""
    code = twin.__code__
    twin.__code__ = code.replace(co_names=tuple(names.get(name, name) for name in code.co_names))
    like: Callable[..., Any] = twin
    return like


# Of what follows three times, all of the common case stands where it happens: a call would cost as much as any of its
# lines. So would a catch-all for arguments where there are none, which is why `_plain_checkout` is not `_checkout`.


def _plain_checkout(  # noqa: C901  # a branch costs less than the call that would take its place
    original: Callable[..., Any],
    registry: Registry,
    *,
    plain: Callable[..., Any],
    refusal: Refusal,
) -> Callable[..., Any]:
    watches, meet, passage, lend = registry.watches, registry.meet, current_passage, registry.lend
    knows = lend is not lend_nobody

    def checkout(pool: Any) -> Any:  # the same
        try:
            watch: Watch | None = watches[id(pool)]
        except KeyError:
            watch = meet(pool)
        if watch is None:
            return original(pool)
        waiting, start = watch.waiting, clock()
        waiting.append(start)
        try:
            result = plain(pool)
        except BaseException as error:
            watch.failed(waiting, start, error, refusal)
            raise
        end = clock()
        try:
            waiting.remove(start)
            held = result.lent  # that is, by its own name
            if held is not None:
                leases, key = watch.leases, id(held)
                if knows:
                    leases[key] = loan = lend(end)
                    if watch.holding.setdefault(loan[1], key) != key:
                        watch.nests(loan[1], key)
                else:
                    leases[key] = (end,)  # `lend_nobody`, without the call
                if len(leases) > watch.ledger.peak:
                    watch.ledger.peak = len(leases)
                seconds = end - start
                if (not passages or passage() is None) and seconds < watch.slow and end < watch.due:
                    watch.waits.append(seconds)
                else:
                    watch.acquired(start, end, key)
        except Exception as mistake:
            lost_quietly("a checkout", mistake)
        return result

    return checkout


def _checkout(  # noqa: C901  # the same
    original: Callable[..., Any],
    registry: Registry,
    *,
    plain: Callable[..., Any],
    lease: Pick | None,
    refusal: Refusal,
    crowded: Pick | None,
) -> Callable[..., Any]:
    watches, meet, passage, lend = registry.watches, registry.meet, current_passage, registry.lend
    knows = lend is not lend_nobody

    def checkout(pool: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: C901, PLR0912  # the same
        try:
            watch: Watch | None = watches[id(pool)]
        except KeyError:
            watch = meet(pool)
        if watch is None:
            return original(pool, *args, **kwargs)
        waiting, start = watch.waiting, clock()
        waiting.append(start)
        queues = False
        if crowded is not None:
            try:
                queues = crowded(pool)
            except Exception as mistake:
                lost_quietly("a queue", mistake)
        try:
            # Unpacking costs more than asking whether there is anything to unpack.
            result = original(pool, *args, **kwargs) if args or kwargs else plain(pool)
        except BaseException as error:
            watch.failed(waiting, start, error, refusal, queues)
            raise
        end = clock()
        try:
            waiting.remove(start)
            held = result if lease is None else lease(result)
            if held is not None:
                leases, key = watch.leases, id(held)
                if knows:
                    leases[key] = loan = lend(end)
                    if watch.holding.setdefault(loan[1], key) != key:
                        watch.nests(loan[1], key)
                else:
                    leases[key] = (end,)  # the same
                if len(leases) > watch.ledger.peak:
                    watch.ledger.peak = len(leases)
                seconds = end - start
                if (not passages or passage() is None) and seconds < watch.slow and end < watch.due:
                    (watch.queues if queues else watch.waits).append(seconds)
                else:
                    watch.acquired(start, end, key, queues)
        except Exception as mistake:
            lost_quietly("a checkout", mistake)
        return result

    return checkout


def _async_checkout(  # noqa: C901  # the same
    original: Callable[..., Any],
    registry: Registry,
    *,
    plain: Callable[..., Any],
    lease: Pick | None,
    refusal: Refusal,
    crowded: Pick | None,
) -> Callable[..., Any]:
    watches, meet, passage, lend = registry.watches, registry.meet, current_passage, registry.lend
    knows = lend is not lend_nobody

    async def checkout(pool: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: C901, PLR0912  # the same
        try:
            watch: Watch | None = watches[id(pool)]
        except KeyError:
            watch = meet(pool)
        if watch is None:
            return await original(pool, *args, **kwargs)
        waiting, start = watch.waiting, clock()
        waiting.append(start)
        queues = False
        if crowded is not None:
            try:
                queues = crowded(pool)
            except Exception as mistake:
                lost_quietly("a queue", mistake)
        try:
            result = await (original(pool, *args, **kwargs) if args or kwargs else plain(pool))
        except BaseException as error:
            watch.failed(waiting, start, error, refusal, queues)
            raise
        end = clock()
        try:
            waiting.remove(start)
            held = result if lease is None else lease(result)
            leases, key = watch.leases, id(held)
            # A call inside this one may have said so already.
            if held is not None and ((lent := leases.get(key)) is None or lent[0] < start):
                if knows:
                    leases[key] = loan = lend(end)
                    if watch.holding.setdefault(loan[1], key) != key:
                        watch.nests(loan[1], key)
                else:
                    leases[key] = (end,)  # the same
                if len(leases) > watch.ledger.peak:
                    watch.ledger.peak = len(leases)
                seconds = end - start
                if (not passages or passage() is None) and seconds < watch.slow and end < watch.due:
                    (watch.queues if queues else watch.waits).append(seconds)
                else:
                    watch.acquired(start, end, key, queues)
        except Exception as mistake:
            lost_quietly("a checkout", mistake)
        return result

    return checkout


def release(where: str, *, pool: Pick, loan: Pick | None = None) -> Hook:
    """
    A call on what was lent that gives it back; it ends the use time.

    A finaliser may make it, inside any lock at all: what happens here takes
    no lock, makes no SDK call and logs nothing.

    Args:
        where: The method.
        pool: From what was lent to its pool.
        loan: From what was lent to the weak reference to what its owner has: if that is gone, it is the garbage
            collector that gives it back, because its owner never did.
    """

    def compile(original: Callable[..., Any], registry: Registry) -> Callable[..., Any]:
        if takes(original) == 2:  # noqa: PLR2004  # as that has
            return named_like(original, _checkin_with_flag(original, registry, pool, loan))
        ended = _checkin_with_flag(_ignoring, registry, pool, loan)

        def checkin(held: Any, *args: Any, **kwargs: Any) -> Any:
            ended(held, None)
            return original(held, *args, **kwargs)

        return checkin

    return Hook("release", where, compile)


def _ignoring(*_: Any) -> None:
    pass


def _checkin_with_flag(
    original: Callable[[Any, Any], Any], registry: Registry, pool: Pick, loan: Pick | None
) -> Callable[[Any, Any], Any]:
    owners, find, knows = registry.owners, registry.find, registry.lend is not lend_nobody

    def checkin(held: Any, flag: Any) -> Any:
        try:
            key = id(held)
            try:
                watch: Watch | None = owners[key]
            except KeyError:
                watch = find(pool(held))
            if watch is not None:
                lease = watch.leases.pop(key, None)
                if lease is None:
                    watch.returned(held)
                else:
                    seconds = clock() - lease[0]
                    watch.uses.append(seconds)
                    if knows:
                        if seconds > watch.patience:
                            watch.late(lease, seconds)
                        if (has := watch.holding.pop(lease[1], None)) != key:
                            watch.has_back(lease[1], key, has)
                        if loan is not None and (ref := loan(held)) is not None and ref() is None:
                            watch.collected(lease)
        except Exception as mistake:
            lost_quietly("a checkin", mistake)
        return original(held, flag)

    return checkin


def take_back(where: str, *, out: Callable[[Any, Any], bool]) -> Hook:
    """
    A call on a pool with the ``connection`` that it lent, which it takes back; it ends the use time.

    Like `release`, it may come from a finaliser.

    Args:
        where: The method, a coroutine function or not.
        out: Whether the pool still has this connection down as lent.
    """

    def compile(original: Callable[..., Any], registry: Registry) -> Callable[..., Any]:
        if inspect.iscoroutinefunction(original):
            return _async_checkin(original, registry, out)
        return _checkin(original, registry)

    return Hook("release", where, compile)


def _checkin(original: Callable[..., Any], registry: Registry) -> Callable[..., Any]:
    watches, find, knows = registry.watches, registry.find, registry.lend is not lend_nobody

    def checkin(pool: Any, connection: Any) -> Any:
        try:
            try:
                watch: Watch | None = watches[id(pool)]
            except KeyError:
                watch = find(pool)
            if watch is not None:
                key = id(connection)
                lease = watch.leases.pop(key, None)
                if lease is not None:
                    seconds = clock() - lease[0]
                    watch.uses.append(seconds)
                    if knows:
                        if seconds > watch.patience:
                            watch.late(lease, seconds)
                        if (has := watch.holding.pop(lease[1], None)) != key:
                            watch.has_back(lease[1], key, has)
                    if watch.orphans:
                        watch.orphans.discard(key)
        except Exception as mistake:
            lost_quietly("a checkin", mistake)
        return original(pool, connection)

    return checkin


def _async_checkin(
    original: Callable[..., Any], registry: Registry, out: Callable[[Any, Any], bool]
) -> Callable[..., Any]:
    watches, find = registry.watches, registry.find

    async def checkin(pool: Any, connection: Any) -> Any:
        watch = lease = None
        end = clock()
        try:
            watch = watches.get(id(pool)) or find(pool)
            if watch is not None:
                lease = watch.leases.pop(id(connection), None)
                if watch.orphans:
                    watch.orphans.discard(id(connection))
        except Exception as mistake:
            lost_quietly("a checkin", mistake)
        if watch is None or lease is None:
            return await original(pool, connection)
        try:
            result = await original(pool, connection)
        except BaseException:
            try:
                # A second cancellation, while it waits for the pool's lock, loses the connection for good.
                if out(pool, connection):
                    watch.kept(connection, lease)
                else:
                    watch.used(id(connection), lease, end)
            except Exception as mistake:
                lost_quietly("a checkin", mistake)
            raise
        try:
            watch.used(id(connection), lease, end)
        except Exception as mistake:
            lost_quietly("a checkin", mistake)
        return result

    return checkin


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


def queue_if_empty(where: str) -> Hook:
    """
    What `queue.Queue.get` asks: whether its ``queue`` has no items; a `get(block)` that hears so stands in line.

    Only where that is all that the method looks at: it is not called then, so
    that a checkout which finds an item makes no call for our sake.
    """

    def compile(original: Callable[..., Any], registry: Registry) -> Callable[..., Any]:
        code = getattr(original, "__code__", None)
        if code is None or code.co_names != ("queue",):
            raise LookupError(where)

        def is_empty(line: Any) -> Any:
            try:
                if line.queue:
                    return False
                asks = sys._getframe(1)
                if registry.active and asks.f_code.co_name == "get" and asks.f_locals.get("block"):
                    detour(words.QUEUED)
            except Exception as mistake:
                lost_quietly("a queue", mistake)
            return original(line)

        return is_empty

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
            ended = None
            with guard("a creation"):
                watch = registry.find(pool(record))
                ended = None if watch is None else _creating(watch, record, opened)
            if ended is None:
                return original(record, *args, **kwargs)
            try:
                result = original(record, *args, **kwargs)
            except BaseException as error:
                ended(error)
                raise
            ended(None)
            return result

        return connect

    return Hook("create", where, compile)


def _creating(watch: Watch, record: Any, opened: Callable[[Any], bool]) -> Callable[[BaseException | None], None]:
    start, passage = clock(), detour(words.NEW)
    watch.met(record)
    watch.creating.add(id(record))
    watch.inherited.pop(id(record), None)
    passage.creating = id(record)

    def ended(error: BaseException | None) -> None:
        with guard("the end of a creation"):
            created, passage.creating, passage.created = passage.created, 0, False
            watch.creating.discard(id(record))
            if error is not None:
                passage.failed = id(error)
                # Whatever is left of it is not idle: it never was in the pool.
                watch.unmeet(record)
            else:
                watch.has_opened(record)
            # Opened, and closed again (or not even that) when a listener of the user's failed.
            if error is None or created or opened(record):
                watch.created(start)

    return ended


def close(where: str, *, reason: Callable[[], str], connection: Pick) -> Hook:
    """
    A call on a pool with what one connection speaks through, which it closes for good.

    Args:
        where: The method.
        reason: Why it does; it may look at its callers.
        connection: From a record that we know to what it speaks through.
    """

    def compile(original: Callable[..., Any], registry: Registry) -> Callable[..., Any]:
        def discard(pool: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                watch = registry.find(pool)
                if watch is not None:
                    watch.closed(reason())
                    passage = current_passage()
                    for record in watch.connections():
                        if connection(record) is args[0]:
                            watch.opened.pop(id(record), None)
                            # While one is being opened the garbage collector may close another.
                            if passage is not None and passage.creating == id(record):
                                passage.created = True
            except Exception as mistake:
                lost_quietly("a close", mistake)
            return original(pool, *args, **kwargs)

        return discard

    return Hook("close", where, compile)


def make(where: str, *, parts: Pick) -> Hook:
    """A call on a pool whose result may be a new connection; *parts* are the objects that open and close it."""

    def compile(original: Callable[..., Any], registry: Registry) -> Callable[..., Any]:
        def made(pool: Any, *args: Any, **kwargs: Any) -> Any:
            connection = original(pool, *args, **kwargs)
            # It may hold the pool's lock, in which somebody's logging could ask the pool.
            try:
                watch = registry.find(pool)
                if watch is not None:
                    for part in parts(connection):
                        if id(part) not in watch.members:
                            watch.met(part)
                            watch.made.add(id(part))
            except Exception as mistake:
                lost_quietly("a new connection", mistake)
            return connection

        return made

    return Hook("make", where, compile)


def connect(where: str, *, is_open: Pick) -> Hook:
    """A call on a connection that opens it unless it is open; its duration is the create time."""

    def compile(original: Callable[..., Any], registry: Registry) -> Callable[..., Any]:
        owners = registry.owners

        def begin(connection: Any) -> Callable[[BaseException | None], None] | None:
            watch = owners.get(id(connection))
            return None if watch is None else _until_open(watch.opening(connection), connection, is_open)

        twin = _async_open if inspect.iscoroutinefunction(original) else _open
        return _if_closed(original, is_open, twin(original, begin))

    return Hook("create", where, compile)


# From a connection to what to call at the end of opening it, with the error; None if it is nobody's.
Begin = Callable[[Any], Callable[[BaseException | None], None] | None]


def _until_open(
    ended: Callable[[bool, BaseException | None], None], connection: Any, is_open: Pick
) -> Callable[[BaseException | None], None]:
    def end(error: BaseException | None) -> None:
        with guard("a creation"):
            ended(bool(is_open(connection)), error)

    return end


def _if_closed(original: Callable[..., Any], is_open: Pick, opens: Callable[..., Any]) -> Callable[..., Any]:
    """Every checkout calls it, and hardly ever is there something to open: no catch-all for that."""

    def way(connection: Any) -> Callable[..., Any]:
        try:
            return original if is_open(connection) else opens
        except Exception as mistake:
            lost_quietly("a creation", mistake)
            return original

    def open(connection: Any) -> Any:
        return way(connection)(connection)

    def open_with_two(connection: Any, first: Any, second: Any) -> Any:
        return way(connection)(connection, first, second)

    def open_with_any(connection: Any, *args: Any, **kwargs: Any) -> Any:
        return way(connection)(connection, *args, **kwargs)

    async def async_open(connection: Any, *args: Any, **kwargs: Any) -> Any:
        return await way(connection)(connection, *args, **kwargs)

    if inspect.iscoroutinefunction(original):
        return async_open
    twin = {1: open, 3: open_with_two}.get(takes(original) or 0)
    return open_with_any if twin is None else named_like(original, twin)


def _open(original: Callable[..., Any], begin: Begin) -> Callable[..., Any]:
    def open(connection: Any, *args: Any, **kwargs: Any) -> Any:
        end = _begun(begin, connection)
        try:
            result = original(connection, *args, **kwargs)
        except BaseException as error:
            end(error)
            raise
        end(None)
        return result

    return open


def _async_open(original: Callable[..., Any], begin: Begin) -> Callable[..., Any]:
    async def open(connection: Any, *args: Any, **kwargs: Any) -> Any:
        end = _begun(begin, connection)
        try:
            result = await original(connection, *args, **kwargs)
        except BaseException as error:
            end(error)
            raise
        end(None)
        return result

    return open


def _begun(begin: Begin, connection: Any) -> Callable[[BaseException | None], None]:
    try:
        return begin(connection) or _ignoring
    except Exception as mistake:
        lost_quietly("a creation", mistake)
        return _ignoring


def disconnect(where: str, *, is_open: Pick, reason: Callable[[], str]) -> Hook:
    """A call on a connection that closes it if it is open; *reason* says why (it may look at its callers)."""

    def compile(original: Callable[..., Any], registry: Registry) -> Callable[..., Any]:
        owners = registry.owners

        def shut(connection: Any) -> None:
            try:
                watch = owners.get(id(connection)) if is_open(connection) else None
                if watch is not None:
                    watch.shut(id(connection), reason())
            except Exception as mistake:
                lost_quietly("a close", mistake)

        def close(connection: Any, *args: Any, **kwargs: Any) -> Any:
            shut(connection)
            return original(connection, *args, **kwargs)

        async def async_close(connection: Any, *args: Any, **kwargs: Any) -> Any:
            shut(connection)
            return await original(connection, *args, **kwargs)

        return async_close if inspect.iscoroutinefunction(original) else close

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


def before(where: str, do: Callable[[Registry, Any], None]) -> Hook:
    """A call, of a coroutine function or not, after which it is too late to learn something of the object."""

    def compile(original: Callable[..., Any], registry: Registry) -> Callable[..., Any]:
        def call(thing: Any, *args: Any, **kwargs: Any) -> Any:
            with guard(where):
                do(registry, thing)
            return original(thing, *args, **kwargs)

        async def async_call(thing: Any, *args: Any, **kwargs: Any) -> Any:
            with guard(where):
                do(registry, thing)
            return await original(thing, *args, **kwargs)

        return async_call if inspect.iscoroutinefunction(original) else call

    return Hook("before", where, compile)
