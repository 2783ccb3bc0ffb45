"""Idle connections whose server has gone, by one look at their sockets that takes nothing out of them."""

from __future__ import annotations

import select
from collections.abc import Iterable

# The other side has hung up: the first is said of a half-closed connection, the others in any case.
GONE = getattr(select, "POLLRDHUP", 0) | getattr(select, "POLLHUP", 0) | getattr(select, "POLLERR", 0)


def stale(sockets: Iterable[int]) -> int | None:
    """How many of these file descriptors' other sides have gone; None where that cannot be asked, as on Windows."""
    if not hasattr(select, "poll"):
        return None
    looking = select.poll()
    for descriptor in sockets:
        if descriptor >= 0:  # or it was closed meanwhile
            looking.register(descriptor, GONE)
    return sum(bool(event & GONE) for _, event in looking.poll(0))
