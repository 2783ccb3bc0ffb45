"""What all pools say, and what has happened to them, as statistics; needs no SDK and takes nothing away from one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from operator import add
from typing import Any

from ._guard import guard, lost
from ._health import Limits, Vitals
from ._model import PoolStats, Reading, Snapshot, Tally
from ._period import Period
from ._registry import Registry, alive, is_dark
from ._watch import Ledger, Watch, age, clock

PLAIN = (bool, int, float, str)


def statistics() -> tuple[PoolStats, ...]:
    """Of every pool name that is watched, by name."""
    found = [stats for registry in alive() for stats in _of(registry)]
    return tuple(sorted(found, key=lambda stats: (stats.name, stats.library)))


def restart() -> None:
    """Let the statistics of every pool name begin anew; the exported counters go on."""
    statistics()  # what has happened by now belongs to what was before
    for registry in alive():
        for ledger in list(registry.ledgers.values()):
            ledger.outbox.restart(len(ledger.leases))


def _of(registry: Registry) -> list[PoolStats]:
    for ledger in list(registry.ledgers.values()):
        ledger.outbox.fold()
    try:
        return [_stats(registry, ledger, watches) for ledger, watches in registry.names()]
    except Exception as error:
        lost(f"the statistics of {registry.target.name}", error)
        return [PoolStats(registry.target.name, registry.target.name, unreadable=1)]


def _stats(registry: Registry, ledger: Ledger, watches: list[Watch]) -> PoolStats:
    reading = Reading(Snapshot(), Tally(), unreadable=len(watches) or 1)
    with guard("a reading"):
        reading = registry.reading(ledger, watches, Period.peak)
    tally, wait, use, create = ledger.outbox.account()
    period, attempts = ledger.outbox.period, sum(tally.checkouts.values())
    identity, now = ledger.identity, reading.snapshot
    # Where nobody sees single checkouts, nobody knows how old they are.
    seen = (None, None) not in reading.tally.checkouts
    return PoolStats(
        name=identity.name,
        library=identity.library,
        system=identity.system,
        server_address=identity.address,
        server_port=identity.port,
        namespace=identity.namespace,
        pools=reading.pools or 0,
        unreadable=reading.unreadable,
        config=_config(registry, watches),
        used=now.used,
        idle=now.idle,
        max=now.max,
        idle_max=now.idle_max,
        overflow=now.overflow,
        overflow_max=now.overflow_max,
        pending=now.pending,
        peak=reading.peak,
        utilization=None if now.used is None or not now.max else min(now.used / now.max, 1.0),
        checkouts=attempts,
        paths=_sums(tally, lambda path, error: path if error is None else None),
        errors=_sums(tally, lambda _, error: error),
        last_error_s=period.ago(),
        timeouts=tally.timeouts,
        created=tally.created,
        closed=tally.closed,
        wait=wait,
        use=use,
        create=create,
        rate_per_s=period.rate(attempts),
        busiest_per_s=period.busiest,
        oldest_wait_s=reading.oldest_wait if seen else None,
        oldest_use_s=reading.oldest_use if seen else None,
        overdue=reading.overdue,
        leaked=tally.leaked,
        orphaned=now.orphaned,
        nested=tally.nested,
        inherited=tally.inherited,
        busy_s=tally.busy,
        stale=now.stale,
        streams=now.streams,
        streams_pending=now.streams_pending,
        streams_max=now.streams_max,
        channels=now.channels,
        since=period.since,
    )


def _sums(tally: Tally, kind: Callable[[str | None, str | None], str | None]) -> dict[str, int]:
    sums = Counter[str]()
    for (path, error), count in tally.checkouts.items():
        if (key := kind(path, error)) is not None:
            sums[key] += count
    return dict(sums)


def _config(registry: Registry, watches: Iterable[Watch]) -> Mapping[str, Any]:
    for watch in watches:
        if not watch.closed_down and (pool := watch.pool()) is not None:
            with guard("the settings of a pool"):
                return {name: _plain(value) for name, value in registry.target.config(pool).items()}
    return {}


def _plain(value: Any) -> Any:
    """What JSON can say, of anything else only what it is: it is somebody's object, and may know a secret."""
    return value if value is None or isinstance(value, PLAIN) else type(value).__name__


# -- for health, which asks often and for little -----------------------------------------


def vitals() -> list[tuple[Vitals, Limits]]:
    """Of every pool name that has a pool, and what its library was told to call healthy."""
    return [(vital, limits) for registry in alive() for limits in (_limits(registry),) for vital in _vitals(registry)]


def _limits(registry: Registry) -> Limits:
    chosen = registry.settings
    return Limits(chosen.health_degraded, chosen.health_critical, chosen.health_wait)


def _vitals(registry: Registry) -> list[Vitals]:
    try:
        return [_vital(ledger, watches) for ledger, watches in registry.names() if watches]
    except Exception as error:
        lost(f"the health of {registry.target.name}", error)
        return [Vitals(registry.target.name, unreadable=1)]


def _vital(ledger: Ledger, watches: list[Watch]) -> Vitals:
    """Without what only a collection must do, and without figures that nobody asks for here."""
    ledger.outbox.fold()
    states = [_state(watch) for watch in watches]
    now = reduce(add, states)
    return Vitals(
        ledger.identity.name,
        sum([not watch.closed_down for watch in watches]),
        sum(map(is_dark, watches, states)),
        now.used,
        now.max,
        now.pending,
        now.streams,
        now.streams_max,
        age(list(ledger.waiting), clock()),
        ledger.outbox.period.ago(),
    )


def _state(watch: Watch) -> Snapshot:
    state = watch.state()
    return Snapshot(used=state.used, pending=state.pending) if watch.closed_down else state
