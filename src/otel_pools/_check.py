"""One real checkout, only when somebody asks for it: whether a pool hands out a connection now, within a timeout."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from threading import Thread
from typing import Any
from weakref import WeakKeyDictionary

from ._health import CRITICAL, HEALTHY
from ._model import HealthReport, PoolHealth
from ._registry import alive


class Attempt(Thread):
    """A checkout in a thread of its own; one that hangs goes on until the pool gives it up."""

    def __init__(self, thing: Any) -> None:
        super().__init__(name="otel_pools check", daemon=True)
        self._thing = thing
        self._kind = type(thing).__qualname__
        self.error: Exception | None = None

    def __repr__(self) -> str:
        state = "under way" if self.is_alive() else "failed" if self.error else "over"
        return f"<Attempt on a {self._kind} [{state}]>"

    def run(self) -> None:
        """Borrow a connection and give it back."""
        thing, self._thing = self._thing, None  # which may go, once this is over
        try:
            if hasattr(thing, "ping"):
                thing.ping()
            else:
                thing.connect().close()
        except Exception as error:
            self.error = error


# One for each at a time: probes of a pool that hangs must not pile up in its queue.
_attempts: WeakKeyDictionary[Any, Attempt] = WeakKeyDictionary()


def check(things: Sequence[Any], timeout: float) -> HealthReport:
    """All at once, in threads."""
    attempts = [_attempt(thing) for thing in _known(things, asynchronous=False)]
    end = time.monotonic() + timeout
    for attempt in attempts:
        attempt.join(max(end - time.monotonic(), 0.0))
    ended = zip(things, attempts, strict=True)
    return _report([(thing, attempt.is_alive(), attempt.error) for thing, attempt in ended], timeout)


async def check_async(things: Sequence[Any], timeout: float) -> HealthReport:
    """All at once, in tasks."""
    known = _known(things, asynchronous=True)
    errors = await asyncio.gather(*(_error(thing, timeout) for thing in known))
    ended = zip(known, errors, strict=True)
    return _report([(thing, isinstance(error, asyncio.TimeoutError), error) for thing, error in ended], timeout)


async def _error(thing: Any, timeout: float) -> Exception | None:
    try:
        await asyncio.wait_for(_borrow(thing), timeout)
    except Exception as error:
        return error
    return None


async def _borrow(thing: Any) -> None:
    if hasattr(thing, "ping"):
        await thing.ping()
    else:
        async with thing.connect():
            pass


def _attempt(thing: Any) -> Attempt:
    attempt = _attempts.get(thing)
    if attempt is None or not attempt.is_alive():
        attempt = _attempts[thing] = Attempt(thing)
        attempt.start()
    return attempt


def _known(things: Sequence[Any], *, asynchronous: bool) -> list[Any]:
    for thing in things:
        kind = type(thing).__qualname__
        if not hasattr(thing, "ping") and not (hasattr(thing, "connect") and hasattr(thing, "pool")):
            raise TypeError(f"neither an engine nor a client of Redis: {kind}")
        if (hasattr(thing, "sync_engine") or hasattr(thing, "__aenter__")) != asynchronous:
            raise TypeError(f"{kind} is {'not ' * asynchronous}for asyncio; there are check() and check_async()")
    return list(things)


def _report(ended: list[tuple[Any, bool, Exception | None]], timeout: float) -> HealthReport:
    pools = [_verdict(_name(thing), hangs, error, timeout) for thing, hangs, error in ended]
    pools.sort(key=lambda health: (health.ready, health.pool))
    ready = all(health.ready for health in pools)
    return HealthReport(HEALTHY if ready else CRITICAL, ready, tuple(pools), time.time())


def _verdict(pool: str, hangs: bool, error: Exception | None, timeout: float) -> PoolHealth:
    if hangs:
        return PoolHealth(pool, CRITICAL, ready=False, reasons=(f"a checkout got no connection within {timeout:g} s",))
    if error is not None:  # by its class alone: what it says may have the server's address and a user in it
        return PoolHealth(pool, CRITICAL, ready=False, reasons=(f"a checkout failed: {type(error).__qualname__}",))
    return PoolHealth(pool, HEALTHY, ready=True)


def _name(thing: Any) -> str:
    """As in the metrics, if it is watched."""
    for registry in alive():
        try:
            watch = registry.find(next(iter(registry.target.pools_of(thing))))
        except (TypeError, StopIteration):
            continue
        if watch is not None:
            return watch.ledger.identity.name
    return type(thing).__qualname__
