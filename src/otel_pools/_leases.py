"""Who borrows a connection: since when, in which thread or task, in which trace, from which line of the app."""

from __future__ import annotations

import os
import sys
import sysconfig
import threading
from asyncio import _get_running_loop as running_loop
from asyncio import current_task
from collections.abc import Callable
from contextvars import Context, copy_context
from pathlib import Path
from threading import get_ident
from types import CodeType, FrameType
from typing import NamedTuple

Lease = tuple[float, int, "str | None", "Context | None", "CodeType | None", int, "CodeType | None"]
Lend = Callable[[float], Lease]


# Before all others.
NEVER: Lease = (-1.0, 0, None, None, None, -1, None)


class Loan(NamedTuple):
    """
    A lease, by the names of its parts.

    It is made as a bare tuple, which takes a fifth of the time. Of frames only
    the code is kept, never the frame: that would keep alive what its variables
    hold, perhaps the very connection.

    Attributes:
        since: When it began, on the clock of `_watch`.
        owner: Who has it: a thread's ident, or minus the id of an asyncio task.
        task: The name of that task.
        context: What the context variables were, the current span among them.
        code: Of the application's function that asked, with the instruction it was at.
        via: Of the library's function that it called.
    """

    since: float
    owner: int
    task: str | None
    context: Context | None
    code: CodeType | None
    at: int
    via: CodeType | None

    @property
    def name(self) -> str | None:
        """What the task is called, or the thread, if it still runs."""
        if self.task is not None or self.owner < 0:
            return self.task
        return next((thread.name for thread in threading.enumerate() if thread.ident == self.owner), None)


# From a loan to what somebody holds the connection for.
Purpose = Callable[[Loan], "str | None"]


def who() -> int:
    """The asyncio task or thread that runs this."""
    if running_loop() is None:
        return get_ident()
    task = current_task()
    return get_ident() if task is None else -id(task)


def lend(since: float) -> Lease:
    """A lease that knows where it began; called by what takes the place of a method of the library."""
    frame: FrameType | None = sys._getframe(2)
    # As in `who`, which would be a call more.
    if (loop := running_loop()) is None or (task := current_task(loop)) is None:
        owner, name = get_ident(), None
    else:
        owner, name = -id(task), task.get_name()
    via = None
    while frame is not None:
        code = frame.f_code
        tier = _tiers.get(code.co_filename) or _tier(code.co_filename)
        if tier is APPLICATION:
            return since, owner, name, copy_context(), code, frame.f_lasti, via
        if tier is INSTALLED:
            break
        via, frame = code, frame.f_back
    return since, owner, name, copy_context(), *_further(frame or _beyond(), via)


def lend_barely(since: float) -> Lease:
    """A lease that does not know its call site."""
    return since, who(), None, copy_context(), None, -1, None


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
# What stands between an application and its pool; of what is installed, everything else may be the application.
BETWEEN = (
    *("sqlalchemy", "sqlmodel", "flask_sqlalchemy", "redis", "valkey", "django_redis", "kombu"),
    *("httpx", "httpx2", "httpcore", "httpcore2", "qdrant_client", "greenlet", "wrapt", "opentelemetry", "otel_pools"),
)
_OURS = f"{Path(__file__).parent}{os.sep}"
_STDLIB = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib")})
_INSTALLED = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")
# What somebody has typed in has no file.
TYPED = ("<stdin>", "<string>", "<console>")
_tiers: dict[str, str] = {}


def _tier(filename: str) -> str:
    tier = _tiers.get(filename)
    if tier is None:
        tier = _tiers[filename] = _classify(filename)
    return tier


def _classify(filename: str) -> str:
    for mark in _INSTALLED:
        _, found, tail = filename.rpartition(mark)
        if found:
            package = tail.partition(os.sep)[0].partition(".")[0]
            return PLUMBING if package in BETWEEN else INSTALLED
    if filename.startswith("<"):  # generated, by a library more often than not
        return APPLICATION if filename in TYPED else PLUMBING
    return PLUMBING if filename.startswith((_OURS, *_STDLIB)) else APPLICATION


# -- in words ------------------------------------------------------------------------


def site(lease: Lease) -> str | None:
    """``file:line function`` of the application, or None if it was not noted."""
    code, at = lease[4], lease[5]
    if code is None:
        return None
    return f"{code.co_filename}:{_line(code, at)} {getattr(code, 'co_qualname', code.co_name)}"


def _line(code: CodeType, at: int) -> int:
    """The line of this instruction; only asked for what is shown, as it has to be searched."""
    for start, end, number in code.co_lines():
        if start <= at < end and number is not None:
            return number
    return code.co_firstlineno
