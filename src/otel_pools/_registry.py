"""The pools of one library that are alive in this process, held weakly; and what becomes of them at fork."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import reduce
from operator import add, itemgetter
from typing import TYPE_CHECKING, Any

from . import _leaks
from ._guard import guard, lost_quietly, once
from ._leases import Lend, lend, lend_barely, lend_nobody, lend_with_stack, settle
from ._model import Identity, Reading, Snapshot
from ._period import Period
from ._stale import stale
from ._watch import LONG_AGO, KeyedRef, Ledger, Watch, age, clock

if TYPE_CHECKING:
    from ._config import Settings
    from ._spans import Spans
    from .targets import Target


# Of so many names what happened is kept: for each the SDK keeps some 20 KB more, and neither ever forgets.
NAMES = 1000
OTHERS = "otel_pools.others"


class Registry:
    """
    Every pool of one target.

    Keyed by `id`, so that nothing is written into the host's objects (a pool
    may be copied or pickled) and nothing is asked of their `__eq__`. A weak
    reference removes an entry before its id can be used again.

    There is no lock: meeting a pool may happen in a finaliser. `dict`'s own
    operations are atomic, and `setdefault` settles who was first.
    """

    __slots__ = (
        "__weakref__",
        "_from_parent",
        "active",
        "ledgers",
        "lend",
        "owners",
        "patience",
        "resting",
        "settings",
        "sighted",
        "spans",
        "target",
        "watches",
    )

    def __init__(self, target: Target, settings: Settings, spans: Spans) -> None:
        self.target = target
        self.settings = settings
        self.spans = spans
        self.lend = _lender(settings)
        # Of whom nothing is known it is not known either whether he holds it on purpose.
        self.patience = (settings.holders and settings.leak_threshold) or math.inf
        self.watches: dict[int, Watch] = {}  # those that hand out connections
        self.resting: dict[int, Watch] = {}  # those that were replaced, until their last connection is gone
        self.sighted: dict[int, KeyedRef] = {}  # those we know of and have not met
        self.ledgers: dict[Identity, Ledger] = {}
        self.owners: dict[int, Watch] = {}  # id of a connection -> whose it is, where that is not written in it
        self._from_parent: dict[int, dict[int, KeyedRef]] = {}  # id of a pool -> the connections it had at the fork
        self.active = True
        _alive.add(self)

    def __repr__(self) -> str:
        state = "" if self.active else ", inactive"
        return f"<Registry {self.target.name} [{len(self.watches)} pools, {len(self.resting)} resting{state}]>"

    # -- on the host's paths ---------------------------------------------------

    def sight(self, pool: Any) -> None:
        """Know that *pool* exists; who it is will be clear once it is complete."""
        key, pool = self.target.anchor(pool)
        if self.active and key not in self.watches:
            self.sighted[key] = KeyedRef(pool, self._gone, key)

    def meet(self, pool: Any) -> Watch | None:
        """Our record of *pool*, made or woken if need be; None if we are switched off or cannot."""
        if not self.active:
            return None
        if self.resting and (watch := self.resting.pop(id(pool), None)) is not None:
            watch.closed_down = False
            return self.watches.setdefault(id(pool), watch)
        try:
            return self._meet(pool)
        except Exception as error:
            lost_quietly(f"meeting a {type(pool).__qualname__}", error)
            return None

    def find(self, pool: Any) -> Watch | None:
        """Our record of *pool* wherever it is; met now if it is new."""
        return self.watches.get(id(pool)) or self.resting.get(id(pool)) or self.meet(pool)

    def close_down(self, pool: Any) -> None:
        """*pool* hands out no more connections; those that are out still count."""
        watch = self.watches.pop(id(pool), None)
        self.sighted.pop(id(pool), None)
        if watch is not None:
            watch.closed_down = True
            self.resting[id(pool)] = watch

    def _meet(self, pool: Any) -> Watch:
        settle()
        key, pool = self.target.anchor(pool)
        ref = KeyedRef(pool, self._gone, key)
        watch = Watch(ref, self._ledger(pool), self)
        watch = self.watches.setdefault(key, watch)
        self.sighted.pop(key, None)
        watch.inherit(self._from_parent.pop(key, {}))
        for connection, is_open in self.target.members(pool):
            watch.met(connection)
            if is_open:
                watch.opened.setdefault(id(connection), LONG_AGO)
        return watch

    def _ledger(self, pool: Any) -> Ledger:
        identity = self.settings.rename(self._identify(pool))
        if identity not in self.ledgers and len(self.ledgers) >= NAMES:
            once("names", "otel_pools: more than %d pool names; pools of more are all called %r", NAMES, OTHERS)
            identity = Identity(identity.library, identity.system, OTHERS)
        return self.ledgers.setdefault(identity, Ledger(identity))

    def _identify(self, pool: Any) -> Identity:
        """Who it is; that it is there can be told even if the library does not tell more."""
        try:
            return self.target.identify(pool)
        except Exception as error:
            lost_quietly(f"the name of a {type(pool).__qualname__}", error)
            return Identity(self.target.name)

    def _gone(self, ref: KeyedRef) -> None:
        for table in (self.watches, self.resting, self.sighted, self._from_parent):
            table.pop(ref.key, None)

    # -- when somebody asks ----------------------------------------------------

    def pools(self) -> list[Watch]:
        """Every pool alive, those just sighted included."""
        for ref in list(self.sighted.values()):
            pool = ref()
            with guard("a pool that was sighted"):
                if pool is not None and self.target.complete(pool):
                    self.meet(pool)
        return [*self.watches.values(), *self.resting.values()]

    def readings(self) -> Iterator[tuple[Ledger, Reading]]:
        """One reading per pool name, for a collection; each pool is read once."""
        for ledger, watches in self.names():
            with guard("a reading"):
                yield ledger, self.reading(ledger, watches, Period.take_peak)

    def names(self) -> list[tuple[Ledger, list[Watch]]]:
        """The pools that are alive, by their names; those that have no pool left included."""
        alive: dict[int, list[Watch]] = {}
        for watch in self.pools():
            alive.setdefault(id(watch.ledger), []).append(watch)
        return [(ledger, alive.get(id(ledger), [])) for ledger in list(self.ledgers.values())]

    def reading(self, ledger: Ledger, watches: list[Watch], peak: Callable[[Period, int], int]) -> Reading:
        """Everything to be said about the pools of one name; of its peaks, whichever is asked for."""
        snapshots = [self._look(watch) for watch in watches]
        now, period = clock(), ledger.outbox.period
        overdue = _leaks.look(ledger, self.patience, self.target.purpose, now)
        tally = ledger.outbox.tally()
        period.looked(tally)
        if not watches:  # none is left: only what has happened remains to be told
            return Reading(Snapshot(), tally)
        snapshot = reduce(add, snapshots)
        used, origins = snapshot.used or 0, ledger.with_former(snapshot.origins)
        period.peaked(_possible(ledger.take_peak(used), snapshot))
        return Reading(
            snapshot=snapshot if origins is None else replace(snapshot, origins=origins),
            tally=tally,
            overdue=overdue,
            pools=sum(not watch.closed_down for watch in watches),
            # Who shares a connection is not one more of them.
            peak=peak(period, used) if snapshot.streams is None else None,
            # list() copies in one step: other threads go on writing.
            oldest_wait=age(list(ledger.waiting), now),
            oldest_use=age(map(itemgetter(0), list(ledger.leases.values())), now),
            unreadable=sum(map(is_dark, watches, snapshots)),
        )

    def _look(self, watch: Watch) -> Snapshot:
        """What a pool says of itself, and its idle sockets, if the user wants to know."""
        snapshot, pool, sockets = watch.snapshot(), watch.pool(), self.target.idle_sockets
        if self.settings.poll_idle and sockets is not None and pool is not None:
            with guard("a look at idle sockets"):
                return replace(snapshot, stale=stale(sockets(pool, watch)))
        return snapshot

    # -- when things change ----------------------------------------------------

    def rename(self, pool: Any) -> None:
        """The user gave *pool* a name after we had met it: move it, and who holds it, to that name."""
        watch = self.watches.get(self.target.anchor(pool)[0])
        if watch is not None:
            watch.move(self._ledger(pool), self.target.leases(pool, watch))

    def close(self) -> None:
        """Forget everything; hooks that could not be taken off find nothing and pass through."""
        self.active = False
        for table in (self.watches, self.resting, self.sighted, self.ledgers, self.owners):
            table.clear()

    def after_fork(self) -> None:
        """
        Start over in a child process.

        Who waits and holds belongs to the parent's threads, and so do the
        samples: the parent exports them. Pools are sighted again, so that one
        the child has inherited is met as the child finds it.
        """
        pools = [pool for watch in list(self.watches.values()) if (pool := watch.pool()) is not None]
        self._from_parent = {key: dict(watch.members) for key, watch in self.watches.items()}
        for table in (self.watches, self.resting, self.ledgers, self.owners):
            table.clear()
        for pool in pools:
            self.sight(pool)


def _lender(settings: Settings) -> Lend:
    if not settings.holders:
        return lend_nobody
    return lend_with_stack if settings.stacks else lend if settings.call_site else lend_barely


_alive: weakref.WeakSet[Registry] = weakref.WeakSet()


def _possible(peak: int, snapshot: Snapshot) -> int:
    """An HTTP pool gives one free connection to all who wait, and takes it back from all but one."""
    if snapshot.origins is None or snapshot.max is None:
        return peak
    return min(peak, max(snapshot.max, snapshot.used or 0))


def is_dark(watch: Watch, snapshot: Snapshot) -> bool:
    """Whether a pool hands out connections, and could not say a thing about itself."""
    if snapshot.used is not None or snapshot.channels is not None:
        return False
    return not watch.closed_down and watch.pool() is not None


def alive() -> list[Registry]:
    """The registries of all libraries that are watched."""
    return [registry for registry in list(_alive) if registry.active]


def renamed(pool: Any) -> None:
    """*pool* goes by another name from now on, whosever it is."""
    for registry in alive():
        registry.rename(pool)


def _after_fork() -> None:
    for registry in list(_alive):
        with guard("fork"):
            registry.after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
