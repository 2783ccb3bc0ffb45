"""Who borrows a connection: since when, in which thread or task, in which trace, from which line of the app."""

from __future__ import annotations

import asyncio
import os
import sys
import sysconfig
import threading
from asyncio import _get_running_loop as running_loop
from asyncio import current_task
from collections.abc import Callable, Iterator
from contextvars import Context, copy_context
from types import CodeType, FrameType
from typing import Any, NamedTuple

from ._guard import OURS

# What a `Loan` has, in its order.
Lease = tuple[Any, ...]
Lend = Callable[[float], Lease]


class Loan(NamedTuple):
    """
    A lease, by the names of its parts.

    It is made as a bare tuple, which takes a fifth of the time. Of frames only
    the code is kept, never the frame: that would keep alive what its variables
    hold, perhaps the very connection.

    Attributes:
        since: When it began, on the clock of `_watch`.
        owner: Who has it: a thread's ident, or minus the id of an asyncio task. Both are given again to others.
        name: What that task or thread is called, so that one that is gone is not taken for another.
        context: What the context variables were, the current span among them.
        code: Of the application's function that asked, with the instruction it was at.
        via: Of the library's function that it called.
        by: Of the library's function that asked the pool.
        stack: All that stood below, with the instructions they were at; if one asks for it.
    """

    since: float
    owner: int = 0
    name: str | None = None
    context: Context | None = None
    code: CodeType | None = None
    at: int = -1
    via: CodeType | None = None
    by: CodeType | None = None
    stack: tuple[tuple[CodeType, int], ...] = ()


# From a loan to what somebody holds the connection for.
Purpose = Callable[[Loan], "str | None"]


def _threads() -> dict[int, threading.Thread]:
    """By ident, without the lock that `threading.enumerate` takes."""
    return getattr(threading, "_active", {})


def _here_now() -> Any:
    """The thread that runs this; what it is called is asked once, and without making it known to `threading`."""

    class Here(threading.local):
        def __init__(self) -> None:
            ident = threading.get_ident()
            self.who: tuple[int, str | None] = ident, getattr(_threads().get(ident), "name", None)

    return Here()


_here = _here_now()


def settle() -> bool:
    """Whether gevent or eventlet has put something else in the place of threads since, which is noticed here."""
    global _here  # noqa: PLW0603  # every checkout looks it up
    if isinstance(_here, threading.local):
        return False
    _here = _here_now()
    return True


def who() -> tuple[int, str | None]:
    """The asyncio task or thread that runs this, and its name."""
    if (loop := running_loop()) is None or (task := current_task(loop)) is None:
        me: tuple[int, str | None] = _here.who
        return me
    return -id(task), task.get_name()


def lend(since: float) -> Lease:
    """A lease that knows where it began; called by what takes the place of a method of the library."""
    frame: FrameType | None = (asking := sys._getframe(2))
    # As in `who`, which would be a call more.
    if (loop := running_loop()) is None or (task := current_task(loop)) is None:
        owner, name = _here.who
    else:
        owner, name = -id(task), task.get_name()
    via, by = None, asking.f_code
    while frame is not None:
        code = frame.f_code
        tier = _tiers.get(code.co_filename) or _tier(code.co_filename)
        if tier is APPLICATION:
            return since, owner, name, copy_context(), code, frame.f_lasti, via, by
        if tier is not PLUMBING:
            break
        via, frame = code, frame.f_back
    return since, owner, name, copy_context(), *_further(frame or _beyond(), via), by


def lend_nobody(since: float) -> Lease:
    """A lease that knows its beginning alone; nobody's thread has the number 0."""
    return (since,)


def lend_barely(since: float) -> Lease:
    """A lease that does not know its call site."""
    return since, *who(), copy_context(), None, -1, None, sys._getframe(2).f_code


def lend_with_stack(since: float) -> Lease:
    """A lease that knows everything that was below, for who looks for a leak and does not mind the cost."""
    asking = sys._getframe(2)
    return *lend(since)[:-1], asking.f_code, tuple(_below(asking))


def _below(frame: FrameType | None) -> Iterator[tuple[CodeType, int]]:
    """Every frame from here on, those behind a greenlet too."""
    for top in (frame, _beyond()):
        for each in outwards(top):
            yield each.f_code, each.f_lasti


def outwards(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame, and all that called it."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _further(frame: FrameType | None, via: CodeType | None) -> tuple[CodeType | None, int, CodeType | None]:
    """The application's frame, which may stand behind others; what is installed is none, unless there is no other."""
    found: tuple[CodeType | None, int, CodeType | None] = None, -1, None
    for _ in range(DEEPEST):
        if frame is None:
            break
        code = frame.f_code
        tier = _tier(code.co_filename)
        if tier is APPLICATION:
            return code, frame.f_lasti, via
        if tier is LOOP:
            break
        if tier is INSTALLED and found[0] is None:
            found = code, frame.f_lasti, via
        via, frame = code, frame.f_back
    return found


def _beyond() -> FrameType | None:
    """Where a greenlet was started that somebody waits for, as SQLAlchemy's asyncio does."""
    greenlet = sys.modules.get("greenlet")
    parent = None if greenlet is None else greenlet.getcurrent().parent
    frame: FrameType | None = None if parent is None else parent.gr_frame
    return frame


# -- whose a file is -----------------------------------------------------------------

# How many frames of other installed packages are passed before the first of them is taken for the application.
DEEPEST = 16

PLUMBING, INSTALLED, APPLICATION = "plumbing", "installed", "application"
# Below a task there is what runs the event loop, and who started that has not asked for any connection.
LOOP = "loop"
_LOOPS = (
    *(f"{os.sep}asyncio{os.sep}{name}.py" for name in ("base_events", "events", "runners")),
    *(f"{os.sep}site-packages{os.sep}{name}" for name in (f"uvloop{os.sep}", f"trio{os.sep}_core{os.sep}")),
)
# What stands between an application and its pool; of what is installed, everything else may be the application.
BETWEEN = (
    *("sqlalchemy", "sqlmodel", "flask_sqlalchemy", "redis", "valkey", "django_redis", "kombu"),
    *("httpx", "httpx2", "httpcore", "httpcore2", "qdrant_client", "greenlet", "wrapt", "opentelemetry", "otel_pools"),
)
_DEMO = f"{OURS}demo{os.sep}"  # which is an application
_STDLIB = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib")})
_INSTALLED = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")
# What somebody has typed in has no file; nor has what a dataclass or namedtuple has made.
TYPED = ("<stdin>", "<string>", "<console>")
_MADE = "<string>"
_tiers: dict[str, str] = {}


def _tier(filename: str) -> str:
    tier = _tiers.get(filename)
    if tier is None:
        tier = _tiers[filename] = _classify(filename)
    return tier


def _classify(filename: str) -> str:
    if filename.startswith(_DEMO):
        return APPLICATION
    if any(part in filename for part in _LOOPS):
        return LOOP
    for mark in _INSTALLED:
        _, found, tail = filename.rpartition(mark)
        if found:
            package = tail.partition(os.sep)[0].partition(".")[0]
            return PLUMBING if package in BETWEEN else INSTALLED
    if filename.startswith("<"):  # generated, by a library more often than not
        typed = filename in TYPED and (filename != _MADE or sys.argv[:1] == ["-c"])
        return APPLICATION if typed else PLUMBING
    return PLUMBING if filename.startswith((OURS, *_STDLIB)) else APPLICATION


# -- in words ------------------------------------------------------------------------


def site(lease: Lease) -> str | None:
    """``file:line function`` of the application, or None if it was not noted."""
    loan = Loan(*lease)
    return None if loan.code is None else _place(loan.code, loan.at)


def stack(loan: Loan) -> tuple[str, ...]:
    """Everything that stood below, the innermost first, in the same words."""
    return tuple(_place(code, at) for code, at in loan.stack if not code.co_filename.startswith(OURS))


def _place(code: CodeType, at: int) -> str:
    return f"{code.co_filename}:{_line(code, at)} {getattr(code, 'co_qualname', code.co_name)}"


def _line(code: CodeType, at: int) -> int:
    """The line of this instruction; only asked for what is shown, as it has to be searched."""
    for start, end, number in code.co_lines():
        if start <= at < end and number is not None:
            return number
    return code.co_firstlineno


# -- what the holder does now ----------------------------------------------------------


def doing(loan: Loan) -> Iterator[FrameType]:
    """The frames that its holder is in now; only asked for what somebody looks at, as it has to be searched."""
    if loan.owner > 0:
        thread = _threads().get(loan.owner)
        if getattr(thread, "name", None) == loan.name:
            yield from outwards(sys._current_frames().get(loan.owner))
        return
    coroutine = next((task.get_coro() for task in _tasks() if -id(task) == loan.owner), None)
    while coroutine is not None:
        if (frame := getattr(coroutine, "cr_frame", None)) is not None:
            yield frame
        coroutine = getattr(coroutine, "cr_await", None)


def _tasks() -> list[Any]:
    """Those of all loops of this process: `asyncio.all_tasks` knows one loop's, and which that is nobody has noted."""
    # Until 3.11 all are in the first, from 3.12 on in the other two.
    known = (getattr(asyncio.tasks, name, ()) for name in ("_all_tasks", "_scheduled_tasks", "_eager_tasks"))
    return [task for tasks in known if not callable(tasks) for task in list(tasks)]
