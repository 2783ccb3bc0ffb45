"""Connections that are out for too long or were never given back: counted once, said once, and said if they return."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from . import _vocabulary as words
from ._guard import logger, once
from ._leases import Lease, Loan, Purpose, site

if TYPE_CHECKING:
    from ._outbox import Event
    from ._watch import Ledger

# Lines a pool may log at one look; of more than these there is one line with their number.
LINES = 5


def look(ledger: Ledger, patience: float, purpose: Purpose, now: float) -> int:
    """
    How many connections of this name are overdue now; what has happened since the last look is said.

    Args:
        ledger: Of the pool name.
        patience: The leak threshold, in seconds.
        purpose: What a loan is for: who holds a connection on purpose is not overdue.
        now: On the clock of `_watch`.
    """
    if not ledger.looking.acquire(blocking=False):
        return len(ledger.overdue)
    try:
        _say(ledger, _news(ledger))
        _say(ledger, [_overdue(ledger, lease, patience, now) for lease in _newly(ledger, patience, purpose, now)])
        return len(ledger.overdue)
    finally:
        ledger.looking.release()


def _newly(ledger: Ledger, patience: float, purpose: Purpose, now: float) -> list[Lease]:
    """Those that have become overdue; those that are no more are forgotten."""
    since = now - patience
    out = {
        key: lease
        for key, lease in list(ledger.leases.items())
        if lease[0] < since and purpose(Loan(*lease)) not in words.ON_PURPOSE
    }
    found = [lease for key, lease in out.items() if ledger.overdue.get(key) is not lease]
    ledger.overdue.clear()
    ledger.overdue.update(out)
    return found


def _overdue(ledger: Ledger, lease: Lease, patience: float, now: float) -> str:
    ledger.outbox.overdue()
    return f"has been out for {now - lease[0]:.1f} s, longer than the leak threshold of {patience:g} s{_by(lease)}"


def _news(ledger: Ledger) -> list[str]:
    """What the request and release paths have noted, which must not log."""
    told = {id(lease) for lease in ledger.overdue.values()}
    said = []
    while ledger.outbox.news:
        event = ledger.outbox.news.popleft()
        if event.what == words.COLLECTED:
            said.append(f"was dropped and not given back, until the garbage collector did{_by(event.lease)}")
        elif event.what == words.LATE and id(event.lease) in told:
            said.append(f"came back after all, after {event.seconds:.1f} s{_by(event.lease)}")
        elif event.what == words.NESTED:
            _nested(ledger, event)
        elif event.what == words.INHERITED:
            _inherited(ledger)
    return said


def _nested(ledger: Ledger, event: Event) -> None:
    name, inner = ledger.identity.name, "?" if event.other is None else site(event.other) or "?"
    outer = site(event.lease) or "?"
    once(
        f"nested {name} {outer} {inner}",
        "otel_pools: pool %s: who held a connection%s asked for another at %s; if all do so at once, nobody gets one",
        name,
        _by(event.lease),
        inner,
    )


def _inherited(ledger: Ledger) -> None:
    once(
        f"inherited {ledger.identity.name}",
        "otel_pools: pool %s: this process uses a connection that was opened before it was forked, and so may its"
        " parent; give the child a pool of its own (SQLAlchemy: engine.dispose(close=False) in the child)",
        ledger.identity.name,
    )


def _by(lease: Lease) -> str:
    loan = Loan(*lease)
    who = f" by {loan.name}" if loan.name else ""
    where = site(lease)
    return f" (borrowed{who} at {where})" if where else f" (borrowed{who})" if who else ""


def _say(ledger: Ledger, said: Iterable[str]) -> None:
    lines = list(said)
    for line in lines[:LINES]:
        logger.warning("otel_pools: a connection of pool %s %s", ledger.identity.name, line)
    if len(lines) > LINES:
        logger.warning("otel_pools: and %d more of pool %s", len(lines) - LINES, ledger.identity.name)
