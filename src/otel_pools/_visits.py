"""The verbs for a request that borrows a connection, shares it perhaps, and is done when its response is closed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from . import _vocabulary as words
from ._guard import lost_quietly
from ._hooks import Hook, Pick
from ._outbox import LIMIT
from ._watch import ABANDONED, Refusal, Watch, clock, kind, tickets

if TYPE_CHECKING:
    from ._registry import Registry

# An attribute of the request, which is made for one call; never an entry of its extensions, which callers share.
KEY = "_otel_pools_visit"


class Visit:
    """
    One request at its pool, from asking to the end of its response.

    It may be left to the garbage collector: then nobody holds the connection
    any more, and nobody waits.
    """

    __slots__ = (
        "connecting",
        "connection",
        "context",
        "path",
        "refused",
        "since",
        "start",
        "ticket",
        "waited",
        "watch",
    )

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.path = words.IDLE
        self.waited = 0.0
        self.connecting = 0.0
        self.connection: Any = None
        self.refused: BaseException | None = None
        self.context: Any = None
        self.since = 0.0
        self.ticket = next(tickets)
        self.start = watch.waiting[self.ticket] = clock()

    def __repr__(self) -> str:
        return f"<Visit of {self.watch.ledger.identity.name}, {'served' if self.since else 'waiting'}, {self.path}>"

    def __del__(self) -> None:
        self.watch.waiting.pop(self.ticket, None)
        self.watch.leases.pop(id(self), None)

    def queued(self, seconds: float) -> None:
        """It stood in line for so long; the pool may send it there more than once."""
        self.path = words.QUEUED
        self.waited += seconds

    def assigned(self, connection: Any) -> None:
        """It has a connection, or may open one."""
        watch = self.watch
        self.connection = connection
        watch.waiting.pop(self.ticket, None)
        if not self.since:
            self.since = watch.leases[id(self)] = clock()
            if len(watch.leases) > watch.ledger.peak:
                watch.ledger.peak = len(watch.leases)
        if self.waited >= watch.slow and self.context is None:
            # Now, as the answer may take its time: a span is back-dated from when it is written.
            self.context = watch.span(self.waited, self.path, None)

    def opened(self, seconds: float) -> None:
        """It has opened its connection."""
        self.connecting += seconds
        self._open()
        self.watch.ledger.outbox.creates.append(seconds)

    def could_not_open(self, error: BaseException) -> None:
        """It tried to open its connection."""
        self.refused = error
        if self.path == words.IDLE:
            self.path = words.NEW

    def _open(self) -> None:
        if self.path == words.IDLE:
            self.path = words.NEW
        self.watch.opened[id(self.connection)] = clock()

    def answered(self) -> None:
        """It got its connection, whatever comes of it."""
        watch, connection = self.watch, self.connection
        if id(connection) not in watch.opened and id(connection) in watch.members and not self.connecting:
            # Opened behind a proxy, where we cannot see how.
            self._open()
            watch.ledger.outbox.creates.append(0.0)
        seconds = self.waited if watch.ledger.identity.system is None else self.waited + self.connecting
        if self.path == words.IDLE:
            watch.waits.append(seconds)
            if len(watch.waits) > LIMIT:
                watch.ledger.outbox.spill()
        else:
            watch.noted(seconds, self.path, None, self.context)

    def failed(self, error: BaseException, established: Pick, refusal: Refusal) -> None:
        """It got no answer; perhaps not even a connection."""
        connection = self.connection
        if connection is not None and self.refused is None and established(connection):
            self.answered()
        else:
            self._refuse(error, refusal)
        self.left()

    def _refuse(self, error: BaseException, refusal: Refusal) -> None:
        watch, seconds = self.watch, clock() - self.start
        watch.waiting.pop(self.ticket, None)
        if type(error).__qualname__ in ABANDONED:
            watch.noted(seconds, self.path, words.CANCELLED, None)
        else:
            watch.refused(seconds, self.path, kind(error, self.refused, refusal))

    def left(self) -> None:
        """Its response is closed, or there will be none."""
        if self.since and self.watch.leases.pop(id(self), None) is not None:
            self.watch.uses.append(clock() - self.since)
        self.connection = None


def _of(request: Any) -> Visit | None:
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
        def arrive(pool: Any, request: Any) -> Visit | None:
            try:
                watch = registry.watches.get(id(pool))
                if watch is None:
                    introduce(pool, request)
                    watch = registry.meet(pool)
                if watch is None:
                    return None
                arrived = Visit(watch)
                setattr(request, KEY, arrived)
            except Exception as mistake:
                lost_quietly("a request", mistake)
                return None
            return arrived

        def answer(arrived: Visit, error: BaseException | None) -> None:
            try:
                if error is None:
                    arrived.answered()
                    return
                connection = arrived.connection
                arrived.failed(error, established, refusal)
                _closed(arrived.watch, connection, ended, words.FAILED)
            except Exception as mistake:
                lost_quietly("a request", mistake)

        twin = _async_handle if inspect.iscoroutinefunction(original) else _handle
        return twin(original, arrive, answer)

    return Hook("acquire", where, compile)


Arrive = Callable[[Any, Any], Visit | None]
Answer = Callable[[Visit, BaseException | None], None]


def _handle(original: Callable[..., Any], arrive: Arrive, answer: Answer) -> Callable[..., Any]:
    def handle(pool: Any, request: Any) -> Any:
        arrived = arrive(pool, request)
        if arrived is None:
            return original(pool, request)
        try:
            response = original(pool, request)
        except BaseException as error:
            answer(arrived, error)
            raise
        answer(arrived, None)
        return response

    return handle


def _async_handle(original: Callable[..., Any], arrive: Arrive, answer: Answer) -> Callable[..., Any]:
    async def handle(pool: Any, request: Any) -> Any:
        arrived = arrive(pool, request)
        if arrived is None:
            return await original(pool, request)
        try:
            response = await original(pool, request)
        except BaseException as error:
            answer(arrived, error)
            raise
        answer(arrived, None)
        return response

    return handle


def _closed(watch: Watch, connection: Any, ended: Pick, otherwise: str | None = None) -> None:
    """Count *connection* once, if it is closed by now."""
    if connection is not None and id(connection) in watch.opened and (reason := ended(connection)) is not None:
        watch.shut(id(connection), otherwise if otherwise is not None and reason != words.GOAWAY else reason)


def wait(where: str) -> Hook:
    """A call on a request's place in line, which returns with its connection."""

    def compile(original: Callable[..., Any], _: Registry) -> Callable[..., Any]:
        def line_up(place: Any, *args: Any, **kwargs: Any) -> Any:
            arrived = _of(place.request)
            if arrived is None:
                return original(place, *args, **kwargs)
            start = None if place.connection is not None else clock()
            try:
                connection = original(place, *args, **kwargs)
            finally:
                if start is not None:
                    arrived.queued(clock() - start)
            _assign(arrived, connection)
            return connection

        async def async_line_up(place: Any, *args: Any, **kwargs: Any) -> Any:
            arrived = _of(place.request)
            if arrived is None:
                return await original(place, *args, **kwargs)
            start = None if place.connection is not None else clock()
            try:
                connection = await original(place, *args, **kwargs)
            finally:
                if start is not None:
                    arrived.queued(clock() - start)
            _assign(arrived, connection)
            return connection

        return async_line_up if inspect.iscoroutinefunction(original) else line_up

    return Hook("queue", where, compile)


def _assign(arrived: Visit, connection: Any) -> None:
    try:
        arrived.assigned(connection)
    except Exception as mistake:
        lost_quietly("a connection", mistake)


def dial(where: str) -> Hook:
    """A call on a connection with the request that has it opened; its duration is the create time."""

    def compile(original: Callable[..., Any], _: Registry) -> Callable[..., Any]:
        def connect(connection: Any, request: Any) -> Any:
            arrived, start = _of(request), clock()
            try:
                stream = original(connection, request)
            except BaseException as error:
                if arrived is not None:
                    arrived.could_not_open(error)
                raise
            if arrived is not None:
                arrived.opened(clock() - start)
            return stream

        async def async_connect(connection: Any, request: Any) -> Any:
            arrived, start = _of(request), clock()
            try:
                stream = await original(connection, request)
            except BaseException as error:
                if arrived is not None:
                    arrived.could_not_open(error)
                raise
            if arrived is not None:
                arrived.opened(clock() - start)
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
        def done(body: Any) -> None:
            try:
                arrived = _of(request(body))
                if arrived is not None:
                    connection = arrived.connection
                    arrived.left()
                    _closed(arrived.watch, connection, ended)
            except Exception as mistake:
                lost_quietly("the end of an answer", mistake)

        def close(body: Any) -> Any:
            try:
                return original(body)
            finally:
                done(body)

        async def async_close(body: Any) -> Any:
            try:
                return await original(body)
            finally:
                done(body)

        return async_close if inspect.iscoroutinefunction(original) else close

    return Hook("release", where, compile)


def drop(where: str, *, reason: Pick) -> Hook:
    """A call on a pool with connections that it closes; *reason* says why of each."""

    def compile(original: Callable[..., Any], registry: Registry) -> Callable[..., Any]:
        def dropped(pool: Any, connections: Iterable[Any]) -> None:
            try:
                watch = registry.watches.get(id(pool))
                if watch is not None:
                    for connection in connections:
                        _closed(watch, connection, reason)
            except Exception as mistake:
                lost_quietly("a close", mistake)

        def close(pool: Any, connections: Any) -> Any:
            if connections:
                dropped(pool, connections)
            return original(pool, connections)

        async def async_close(pool: Any, connections: Any) -> Any:
            if connections:
                dropped(pool, connections)
            return await original(pool, connections)

        return async_close if inspect.iscoroutinefunction(original) else close

    return Hook("close", where, compile)
