"""Idle connections whose server has gone, by one look at their sockets that takes nothing out of them."""

from __future__ import annotations

import select
from collections.abc import Iterable

# The other side has hung up: the first is said of a half-closed connection, the others in any case.
GONE = getattr(select, "POLLRDHUP", 0) | getattr(select, "POLLHUP", 0) | getattr(select, "POLLERR", 0)


def stale(sockets: Iterable[int | None]) -> int | None:
    """
    Of how many of these file descriptors the other sides have gone; None where that cannot be asked, as on Windows.

    A negative one is that of a socket which asyncio has closed for that reason; None is one that nobody knows.
    """
    if not hasattr(select, "poll"):
        return None
    looking, closed = select.poll(), 0
    for descriptor in sockets:
        if descriptor is not None and descriptor >= 0:
            looking.register(descriptor, GONE)
        elif descriptor is not None:
            closed += 1
    return closed + sum(bool(event & GONE) for _, event in looking.poll(0))
