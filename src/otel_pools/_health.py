"""From what a pool says to whether it is well, whether it can serve, and why not: pure, and in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

from . import _vocabulary as words
from ._model import HealthReport, PoolHealth

HEALTHY, DEGRADED, ERROR, CRITICAL = "healthy", "degraded", "error", "critical"
# The worst last: harm that is known outweighs what cannot be told.
STATUSES = (HEALTHY, DEGRADED, ERROR, CRITICAL)

# How failed checkouts end that harm whoever asked; to be cancelled, or refused by a listener, is his own affair.
HARM = {
    words.TIMEOUT: "got no connection in time",
    words.EXHAUSTED: "found the pool exhausted",
    words.CONNECT_ERROR: "could not open a connection",
}
# For so many seconds a failure makes a pool not ready: it takes no request then, and so has to recover by the clock.
RECENT = 60.0


class Limits(NamedTuple):
    """From which load on a pool is degraded, or critical, and how many seconds a request may wait."""

    degraded: float
    critical: float
    wait: float


class Vital(Protocol):
    """The part of `PoolStats` that health needs; for what each means, see there."""

    @property
    def name(self) -> str: ...
    @property
    def pools(self) -> int: ...
    @property
    def unreadable(self) -> int: ...
    @property
    def used(self) -> int | None: ...
    @property
    def max(self) -> int | None: ...
    @property
    def pending(self) -> int | None: ...
    @property
    def streams(self) -> int | None: ...
    @property
    def streams_max(self) -> int | None: ...
    @property
    def oldest_wait_s(self) -> float | None: ...
    @property
    def last_error_s(self) -> Mapping[str, float]: ...


class Vitals(NamedTuple):
    """As few figures as will do, for who asks every few seconds."""

    name: str
    pools: int = 0
    unreadable: int = 0
    used: int | None = None
    max: int | None = None
    pending: int | None = None
    streams: int | None = None
    streams_max: int | None = None
    oldest_wait_s: float | None = None
    last_error_s: Mapping[str, float] = {}


def report(pools: Iterable[tuple[Vital, Limits]], timestamp: float) -> HealthReport:
    """
    How these pools are, each by its limits; the worst first.

    Names that have no pool left are left out: they serve nobody.
    """
    found = [judge(pool, limits) for pool, limits in pools if pool.pools or pool.unreadable]
    found.sort(key=lambda health: (-STATUSES.index(health.status), health.pool))
    return HealthReport(
        status=found[0].status if found else HEALTHY,
        ready=all(health.ready for health in found),
        pools=tuple(found),
        timestamp=timestamp,
    )


def judge(pool: Vital, limits: Limits) -> PoolHealth:
    """How one pool is. Not ready means harm, and harm is critical however empty the pool may be."""
    share = load(pool)
    harm = _harm(pool, limits)
    status, crowd = _crowd(pool, share, limits)
    if harm:
        status = CRITICAL
    elif pool.unreadable and status != CRITICAL:
        status = ERROR
    dark = _dark(pool) if pool.unreadable else ()
    return PoolHealth(pool.name, status, not harm, harm + crowd + dark, share)


def load(pool: Vital) -> float | None:
    """How much of its limit is in use, 0 to 1: of streams where requests share connections; None without a limit."""
    used, most = (pool.streams, pool.streams_max) if pool.streams is not None else (pool.used, pool.max)
    return None if used is None or not most else min(used / most, 1.0)


def _crowd(pool: Vital, share: float | None, limits: Limits) -> tuple[str, tuple[str, ...]]:
    if share is None or share < min(limits.degraded, limits.critical):
        return HEALTHY, ()
    status, bound = (CRITICAL, limits.critical) if share >= limits.critical else (DEGRADED, limits.degraded)
    used, most, what = (
        (pool.used, pool.max, "connections")
        if pool.streams is None
        else (pool.streams, pool.streams_max, "streams of its connections")
    )
    return status, (f"{used} of {most} {what} are in use, {share:.0%}; {status} from {bound:.0%} on",)


def _harm(pool: Vital, limits: Limits) -> tuple[str, ...]:
    return (*_waits(pool, limits), *_failures(pool.last_error_s)) if pool.oldest_wait_s or pool.last_error_s else ()


def _waits(pool: Vital, limits: Limits) -> Iterator[str]:
    oldest = pool.oldest_wait_s
    if oldest is not None and oldest > limits.wait:
        others = f" ({pool.pending} in line)" if pool.pending else ""
        yield f"a request has waited {oldest:.1f} s for a connection{others}; more than {limits.wait:g} s is harm"


def _failures(last: Mapping[str, float]) -> Iterator[str]:
    for error, how in HARM.items():
        if error in last and last[error] <= RECENT:
            yield f"a checkout {how} {last[error]:.0f} s ago; {RECENT:.0f} s after the last of these the pool is ready"


def _dark(pool: Vital) -> tuple[str, ...]:
    return (f"{pool.unreadable} of {max(pool.pools, pool.unreadable)} pools cannot be read; the log says why",)
