"""The verbs for a request that borrows a connection, shares it perhaps, and is done when its response is closed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from . import _vocabulary as words
from ._guard import guard, lost_quietly
from ._hooks import Hook, Pick, named_like, takes
from ._leases import lend_nobody
from ._watch import ABANDONED, Refusal, Watch, clock, kind, no_more

if TYPE_CHECKING:
    from ._registry import Registry

# An attribute of the request, which is made for one call; never an entry of its extensions, which callers share.
KEY = "_otel_pools_visit"
TWO = 2  # parameters: the place, and for how long to wait
IDLE = words.IDLE


class Visit:
    """
    One request at its pool, from asking to the end of its response.

    It may be left to the garbage collector: then nobody holds the connection
    any more, and nobody waits.
    """

    # What most visits never change stands in the class: it need not be set for each.
    path = IDLE
    waited = 0.0
    connecting = 0.0
    connection: Any = None
    refused = 0  # the id of the error of opening its connection
    context: Any = None
    since = 0.0
    ticket: tuple[list[float], float] | None = None  # where it waits, if it does
    start = 0.0
    # Set by who makes it: an initialiser would be one more call for each request.
    watch: Watch

    def __repr__(self) -> str:
        return f"<Visit of {self.watch.ledger.identity.name}, {'served' if self.since else 'waiting'}, {self.path}>"

    def __del__(self) -> None:
        try:
            if self.connection is not None:
                lease = self.watch.leases.pop(id(self), None)
                if lease is not None:
                    self.watch.collected(lease)
            if self.ticket is not None:
                self.waits_no_more()
        except Exception as mistake:
            lost_quietly("a request that is gone", mistake)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a request has made no visit; and what it was copied with need not know us."""
        return type(None), ()

    def has_left(self) -> bool:
        """Whether it is over, though the pool may not know: a cancelled close never tells it."""
        return self.since > 0.0 and self.connection is None

    def queues(self) -> float:
        """It stands in line from now on, and perhaps not for the first time; its wait began when it first did."""
        now = clock()
        self.start = self.start or now
        waiting = self.watch.waiting
        waiting.append(self.start)
        self.ticket = waiting, self.start
        return now

    def queued(self, seconds: float) -> None:
        """It stood in line for so long; the pool may send it there more than once."""
        self.path = words.QUEUED
        self.waited += seconds
        self.waits_no_more()

    def waits_no_more(self) -> None:
        """It got a connection, or gave up."""
        if self.ticket is not None:
            waiting, ticket = self.ticket
            no_more(waiting, ticket)
            self.ticket = None

    def served(self) -> None:
        """It has a connection, or may open one."""
        watch = self.watch
        leases = watch.leases
        self.since = clock()
        leases[id(self)] = watch.lend(self.since)
        if len(leases) > watch.ledger.peak:
            watch.ledger.peak = len(leases)
        if self.waited and self.waited >= watch.slow and self.context is None:
            # Now, as the answer may take its time: a span is back-dated from when it is written.
            self.context = watch.span(self.waited, self.path, None)

    def sent_back(self) -> None:
        """The connection it got was of no use, and it asks again."""
        self.watch.leases.pop(id(self), None)
        self.start = self.start or self.since
        self.since, self.connection = 0.0, None

    def opened(self, seconds: float) -> None:
        """It has opened its connection."""
        self.connecting += seconds
        self._open()
        self.watch.ledger.outbox.creates.append(seconds)

    def could_not_open(self, error: BaseException) -> None:
        """It tried to open its connection."""
        self.refused = id(error)
        if self.path == IDLE:
            self.path = words.NEW

    def _open(self) -> None:
        if self.path == IDLE:
            self.path = words.NEW
        self.watch.has_opened(self.connection)

    def answered(self) -> None:
        """It got its connection, whatever comes of it."""
        watch = self.watch
        if id(self.connection) in watch.made:
            # Opened behind a proxy, where we cannot see how.
            self._open()
            watch.ledger.outbox.creates.append(0.0)
        if self.since >= watch.due:
            watch.tidy(self.since)
        if self.path is IDLE and watch.slow > 0.0:
            watch.waits.append(0.0)
            return
        if not self.waited and watch.slow <= 0.0:
            self.context = watch.span(0.0, self.path, None)
        # An HTTP client's queue is one thing and connecting another; a database's wait is both.
        seconds = self.waited if watch.ledger.identity.system is None else self.waited + self.connecting
        watch.noted(seconds, self.path, None, self.context)

    def failed(self, error: BaseException, established: Pick, refusal: Refusal) -> None:
        """It got no answer; perhaps not even a connection."""
        connection = self.connection
        if connection is not None and not self.refused and established(connection):
            self.answered()
        else:
            self._refuse(error, refusal)
        self.left()

    def _refuse(self, error: BaseException, refusal: Refusal) -> None:
        watch, seconds = self.watch, self.waited
        if self.since:
            seconds += clock() - self.since
        self.waits_no_more()
        if self.connection is not None and self.path == IDLE:
            self.path = words.NEW
        if type(error).__qualname__ in ABANDONED:
            watch.noted(seconds, self.path, words.CANCELLED, None)
        else:
            watch.refused(seconds, self.path, kind(error, self.refused, refusal))

    def left(self, ended: Pick | None = None) -> None:
        """It is over; if that is the end of its connection too, *ended* says why."""
        watch, connection, self.connection = self.watch, self.connection, None
        lease = watch.leases.pop(id(self), None)
        if lease is not None:
            # As `Watch.used`, without asking what else its owner has: under trio nobody could say who that is.
            seconds = clock() - lease[0]
            watch.uses.append(seconds)
            if seconds > watch.patience:
                watch.late(lease, seconds)
        if ended is not None and id(connection) in watch.opened and connection.is_closed():
            _closed(watch, connection, ended)


def visit_of(request: Any) -> Visit | None:
    """The visit of this request, if we have seen it come."""
    visit: Visit | None = getattr(request, KEY, None)
    return visit


def visit(
    where: str, *, introduce: Callable[[Any, Any], None], established: Pick, refusal: Refusal, ended: Pick
) -> Hook:
    """
    A call on a pool with a request, which gets it a connection and an answer whose body is still to come.

    Args:
        where: The method, a coroutine function or not.
        introduce: Called with pool and request before we meet the pool: what it is called may follow from the request.
        established: Whether a connection has been opened.
        refusal: From an error to the word for why there was no connection, or None.
        ended: From a visit's connection to why it is closed, or None if it is open; asked when an answer fails.
    """

    def compile(original: Callable[..., Any], registry: Registry) -> Callable[..., Any]:
        def meet(pool: Any, request: Any) -> Watch | None:
            try:
                introduce(pool, request)
                return registry.meet(pool)
            except Exception as mistake:
                lost_quietly("a new pool", mistake)
                return None

        def failed(arrived: Visit, error: BaseException) -> None:
            try:
                connection = arrived.connection
                arrived.failed(error, established, refusal)
                _closed(arrived.watch, connection, ended, words.FAILED)
            except Exception as mistake:
                lost_quietly("a request", mistake)

        twin = _async_handle if inspect.iscoroutinefunction(original) else _handle
        return twin(original, registry.watches.get, meet, failed)

    return Hook("acquire", where, compile)


Find = Callable[[int], Watch | None]
Meet = Callable[[Any, Any], Watch | None]
Failed = Callable[[Visit, BaseException], None]


# In these, the common case stands where it happens: a call would cost as much as any of its lines.


def _handle(original: Callable[..., Any], find: Find, meet: Meet, failed: Failed) -> Callable[..., Any]:
    def handle(pool: Any, request: Any) -> Any:
        watch = find(id(pool)) or meet(pool, request)
        if watch is not None:
            try:
                arrived = Visit()
                arrived.watch = watch
                request._otel_pools_visit = arrived
            except Exception as mistake:
                lost_quietly("a request", mistake)
                watch = None
        if watch is None:  # not above: a request that fails would fail while a mistake of ours is handled
            return original(pool, request)
        try:
            response = original(pool, request)
        except BaseException as error:
            failed(arrived, error)
            raise
        if arrived.path is IDLE and arrived.since < watch.due and watch.slow > 0.0 and not watch.made:
            watch.waits.append(0.0)
        else:
            _answered(arrived)
        return response

    return handle


def _async_handle(original: Callable[..., Any], find: Find, meet: Meet, failed: Failed) -> Callable[..., Any]:
    async def handle(pool: Any, request: Any) -> Any:
        watch = find(id(pool)) or meet(pool, request)
        if watch is not None:
            try:
                arrived = Visit()
                arrived.watch = watch
                request._otel_pools_visit = arrived
            except Exception as mistake:
                lost_quietly("a request", mistake)
                watch = None
        if watch is None:  # not above: a request that fails would fail while a mistake of ours is handled
            return await original(pool, request)
        try:
            response = await original(pool, request)
        except BaseException as error:
            failed(arrived, error)
            raise
        if arrived.path is IDLE and arrived.since < watch.due and watch.slow > 0.0 and not watch.made:
            watch.waits.append(0.0)
        else:
            _answered(arrived)
        return response

    return handle


def _answered(arrived: Visit) -> None:
    try:
        arrived.answered()
    except Exception as mistake:
        lost_quietly("a request", mistake)


def _closed(watch: Watch, connection: Any, ended: Pick, otherwise: str | None = None) -> None:
    """Count *connection* once, if it is closed by now."""
    if connection is not None and id(connection) in watch.opened and (reason := ended(connection)) is not None:
        watch.shut(id(connection), otherwise if otherwise is not None and reason != words.GOAWAY else reason)


def wait(where: str, *, ended: Pick) -> Hook:
    """
    A call on a request's place in line, which returns with its connection.

    Args:
        where: The method, a coroutine function or not.
        ended: From a connection to why it is closed, or None if it is open; asked of one that was of no use.
    """

    def compile(original: Callable[..., Any], registry: Registry) -> Callable[..., Any]:
        line_up = _async_line_up if inspect.iscoroutinefunction(original) else _line_up
        return line_up(original, ended, registry.lend is not lend_nobody)

    return Hook("queue", where, compile)


def _visit_at(place: Any) -> Visit | None:
    try:
        return visit_of(getattr(place, "request", None))
    except Exception as mistake:
        lost_quietly("a request", mistake)
        return None


def _line_up(original: Callable[..., Any], ended: Pick, knows: bool) -> Callable[..., Any]:
    def line_up(place: Any, timeout: Any) -> Any:
        try:
            arrived = place.request._otel_pools_visit
            at_once = not arrived.since and place.connection is not None
        except Exception:  # it came before us, or this is no place that we know
            arrived, at_once = _visit_at(place), False
        if not at_once:
            return stand_in_line(arrived, place, timeout)
        arrived.connection = connection = original(place, timeout)
        try:
            watch = arrived.watch
            leases = watch.leases
            arrived.since = now = clock()
            leases[id(arrived)] = watch.lend(now) if knows else (now,)
            if len(leases) > watch.ledger.peak:
                watch.ledger.peak = len(leases)
        except Exception as mistake:
            lost_quietly("a connection", mistake)
        return connection

    def stand_in_line(arrived: Visit | None, place: Any, *args: Any, **kwargs: Any) -> Any:
        if arrived is None:
            return original(place, *args, **kwargs)
        start = _begin(arrived, place, ended)
        try:
            connection = original(place, *args, **kwargs)
        finally:
            if start is not None:
                _queued(arrived, clock() - start)
        arrived.connection = connection
        _served(arrived)
        return connection

    def line_up_somehow(place: Any, *args: Any, **kwargs: Any) -> Any:
        return stand_in_line(_visit_at(place), place, *args, **kwargs)

    return named_like(original, line_up) if takes(original) == TWO else line_up_somehow


def _async_line_up(original: Callable[..., Any], ended: Pick, knows: bool) -> Callable[..., Any]:
    async def line_up(place: Any, timeout: Any) -> Any:
        try:
            arrived = place.request._otel_pools_visit
            at_once = not arrived.since and place.connection is not None
        except Exception:  # it came before us, or this is no place that we know
            arrived, at_once = _visit_at(place), False
        if not at_once:
            return await stand_in_line(arrived, place, timeout)
        arrived.connection = connection = await original(place, timeout)
        try:
            watch = arrived.watch
            leases = watch.leases
            arrived.since = now = clock()
            leases[id(arrived)] = watch.lend(now) if knows else (now,)
            if len(leases) > watch.ledger.peak:
                watch.ledger.peak = len(leases)
        except Exception as mistake:
            lost_quietly("a connection", mistake)
        return connection

    async def stand_in_line(arrived: Visit | None, place: Any, *args: Any, **kwargs: Any) -> Any:
        if arrived is None:
            return await original(place, *args, **kwargs)
        start = _begin(arrived, place, ended)
        try:
            connection = await original(place, *args, **kwargs)
        finally:
            if start is not None:
                _queued(arrived, clock() - start)
        arrived.connection = connection
        _served(arrived)
        return connection

    async def line_up_somehow(place: Any, *args: Any, **kwargs: Any) -> Any:
        return await stand_in_line(_visit_at(place), place, *args, **kwargs)

    return named_like(original, line_up) if takes(original) == TWO else line_up_somehow


def _begin(arrived: Visit, place: Any, ended: Pick) -> float | None:
    """When it began to stand in line; None if it has its connection already."""
    try:
        if arrived.since:
            connection = arrived.connection
            arrived.sent_back()
            _closed(arrived.watch, connection, ended)
        return None if place.connection is not None else arrived.queues()
    except Exception as mistake:
        lost_quietly("a queue", mistake)
        return None


def _queued(arrived: Visit, seconds: float) -> None:
    try:
        arrived.queued(seconds)
    except Exception as mistake:
        lost_quietly("a queue", mistake)


def _served(arrived: Visit) -> None:
    try:
        arrived.served()
    except Exception as mistake:
        lost_quietly("a connection", mistake)


def dial(where: str) -> Hook:
    """A call on a connection with the request that has it opened; its duration is the create time."""

    def compile(original: Callable[..., Any], registry: Registry) -> Callable[..., Any]:
        def ended(connection: Any, request: Any, start: float, error: BaseException | None) -> None:
            with guard("a creation"):
                arrived = visit_of(request)
                if arrived is None or not arrived.watch.registry.active:
                    # Who asked before we came opens one for all who come after.
                    watch = registry.owners.get(id(connection))
                    if error is None and watch is not None:
                        watch.has_opened(connection)
                        watch.created(start)
                elif error is None:
                    arrived.opened(clock() - start)
                else:
                    arrived.could_not_open(error)

        def connect(connection: Any, request: Any) -> Any:
            start = clock()
            try:
                stream = original(connection, request)
            except BaseException as error:
                ended(connection, request, start, error)
                raise
            ended(connection, request, start, None)
            return stream

        async def async_connect(connection: Any, request: Any) -> Any:
            start = clock()
            try:
                stream = await original(connection, request)
            except BaseException as error:
                ended(connection, request, start, error)
                raise
            ended(connection, request, start, None)
            return stream

        return async_connect if inspect.iscoroutinefunction(original) else connect

    return Hook("create", where, compile)


def leave(where: str, *, request: Pick, ended: Pick) -> Hook:
    """
    A call on the body of an answer that closes it; it ends the use time.

    A finaliser may make it, even inside the pool's lock.

    Args:
        where: The method, a coroutine function or not.
        request: From the body to its request.
        ended: From the connection to why it is closed, or None if it is open.
    """

    def compile(original: Callable[..., Any], _: Registry) -> Callable[..., Any]:
        twin = _async_close if inspect.iscoroutinefunction(original) else _close
        return twin(original, request, ended)

    return Hook("release", where, compile)


def _close(original: Callable[..., Any], request: Pick, ended: Pick) -> Callable[..., Any]:
    def close(body: Any) -> Any:
        try:
            arrived = request(body)._otel_pools_visit
            going = arrived.connection is not None  # everyone who has it closes it
        except AttributeError:  # it came before us
            going = False
        except Exception as mistake:
            going = False
            lost_quietly("the end of an answer", mistake)
        if not going:
            return original(body)
        try:
            return original(body)
        finally:
            try:
                arrived.left(ended)
            except Exception as mistake:
                lost_quietly("the end of an answer", mistake)

    return close


def _async_close(original: Callable[..., Any], request: Pick, ended: Pick) -> Callable[..., Any]:
    async def close(body: Any) -> Any:
        try:
            arrived = request(body)._otel_pools_visit
            going = arrived.connection is not None  # everyone who has it closes it
        except AttributeError:  # it came before us
            going = False
        except Exception as mistake:
            going = False
            lost_quietly("the end of an answer", mistake)
        if not going:
            return await original(body)
        try:
            return await original(body)
        finally:
            try:
                arrived.left(ended)
            except Exception as mistake:
                lost_quietly("the end of an answer", mistake)

    return close


def drop(where: str, *, reason: Pick, idles: Callable[[Any], bool]) -> Hook:
    """
    A call on a pool with connections that it closes.

    Args:
        where: The method, a coroutine function or not.
        reason: From a connection to why it is closed.
        idles: Whether the method does nothing if there is nothing to close; then it is not called, which makes up for
            the calls that we add to a request.
    """

    def compile(original: Callable[..., Any], registry: Registry) -> Callable[..., Any]:
        needless = idles(original)

        def dropped(pool: Any, connections: Iterable[Any]) -> None:
            try:
                watch = registry.watches.get(id(pool))
                if watch is not None:
                    for connection in connections:
                        _closed(watch, connection, reason)
            except Exception as mistake:
                lost_quietly("a close", mistake)

        def close(pool: Any, connections: Any) -> Any:
            if not connections and needless:
                return None
            dropped(pool, connections)
            return original(pool, connections)

        async def async_close(pool: Any, connections: Any) -> Any:
            if not connections and needless:
                return None
            dropped(pool, connections)
            return await original(pool, connections)

        return async_close if inspect.iscoroutinefunction(original) else close

    return Hook("close", where, compile)
