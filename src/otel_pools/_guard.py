"""The wall between our mistakes and the application: logged once per kind, never raised into the host."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from traceback import walk_tb

# Whatever is in this folder is ours.
OURS = f"{Path(__file__).parent}{os.sep}"

logger = logging.getLogger("otel_pools")

# Our own tests set this, so that a mistake of ours is loud at home.
loud = False

_said: set[str] = set()
_later: deque[str] = deque(maxlen=100)


def once(kind: str, message: str, *args: object, level: int = logging.WARNING) -> None:
    """Log *message* the first time something of this *kind* happens."""
    if kind not in _said:
        _said.add(kind)
        # A handler is the application's, and so is what it raises, but here nobody has asked for it.
        with suppress(Exception):
            logger.log(level, message, *args)


def lost(kind: str, error: Exception) -> None:
    """Say that *error* of ours cost a measurement; the application is fine."""
    if loud:
        raise error
    _say(_what(kind, error))


def _say(what: str) -> None:
    kind = what.partition(" at ")[0]
    once(kind, "otel_pools lost a measurement (%s); your application is not affected", what)


def _what(kind: str, error: Exception) -> str:
    """Its class, and the line of ours that it came through last; not its message: a driver's may quote a URL."""
    passed = [(frame.f_code.co_filename, line) for frame, line in walk_tb(error.__traceback__)]
    ours = [f" at {Path(file).name}:{line}" for file, line in passed if file.startswith(OURS)]
    return "".join([f"{kind}: {type(error).__qualname__}", *ours[-1:]])


def lost_quietly(kind: str, error: Exception) -> None:
    """
    Like `lost`, where logging is not allowed: the collector says it later.

    A garbage collector may run the release path inside a logging handler's or
    an exporter's lock; taking that lock again would hang the host for good.
    """
    if loud:
        raise error
    # Not the error itself, whose traceback would keep alive what the application has let go.
    _later.append(_what(kind, error))


def speak() -> None:
    """Log what `lost_quietly` was told."""
    while _later:
        _say(_later.popleft())


@contextmanager
def guard(kind: str) -> Iterator[None]:
    """Swallow any `Exception` of ours; never a `BaseException`, which belongs to the host."""
    try:
        yield
    except Exception as error:
        lost(kind, error)
        # On Python 3.12 it goes round in a circle with its frames, and what these hold would wait for the collector.
        error.__traceback__ = None


def forget() -> None:
    """Start over, as after `uninstrument`: the next mistake of each kind is said again."""
    _said.clear()
    _later.clear()
