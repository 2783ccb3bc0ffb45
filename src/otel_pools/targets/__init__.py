"""
What one library has to say about itself to be watched, and where each library says it.

To add a library: write `identify`, `read` and a table of hooks in a module
here, add one line to `LIBRARIES`, one instrumentor and one entry point to
pyproject.toml, and let a test class inherit `otel_pools.testing.PoolContract`.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from .._hooks import Row
    from .._leases import Loan
    from .._model import Identity, Snapshot
    from .._registry import Registry
    from .._watch import Ledger, Watch


# What users call their pools, for as long as those live.
given_names: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def existing(*places: str) -> Iterator[Any]:
    """
    What there is of these classes (``module:Class``), as far as their modules are imported.

    One walk over what the garbage collector tracks: about 20 ms for 50 000
    objects. `type()` and not `isinstance`, which would ask every proxy in the
    process for its class.
    """
    found = (place.split(":") for place in places)
    kinds = tuple(kind for module, name in found if (kind := getattr(sys.modules.get(module), name, None)))
    return (thing for thing in gc.get_objects() if issubclass(type(thing), kinds))


def _none(pool: Any) -> Iterable[Any]:
    return ()


def _always(pool: Any) -> bool:
    return True


def _nothing(registry: Registry) -> None:
    pass


def itself(thing: Any) -> Iterable[Any]:
    """It alone."""
    return (thing,)


def _by_id(pool: Any) -> tuple[int, Any]:
    return id(pool), pool


def _connections(pool: Any, watch: Watch) -> Iterable[int]:
    return map(id, watch.connections())


def descriptor(connection: Any) -> int | None:
    """The file descriptor of a connection as drivers have it: its own, its socket's or a transport's; -1 if closed."""
    transport = getattr(connection, "_transport", None) or getattr(connection, "_writer", None)
    inner = None if transport is None else transport.get_extra_info("socket")
    for one in (inner, getattr(connection, "_sock", None), connection):
        if one is not None and hasattr(one, "fileno"):
            return int(one.fileno())
    return None


def _unsaid(pool: Any) -> Mapping[str, Any]:
    return {}


def _unknown(loan: Loan) -> None:
    return None


def _nobody(registry: Registry, ledger: Ledger) -> Collection[str]:
    return ()


@dataclass(frozen=True, slots=True)
class Target:
    """
    One library, as a table.

    Attributes:
        name: As in `LIBRARIES`.
        identify: Who a pool is.
        read: What a pool says about itself now; may raise, which costs only its numbers.
        hooks: Which methods of the library mean what, by the top-level module they are in.
        members: The connections a pool already has when we meet it, and whether they are open, where it is
            the connection that says when it is closed.
        complete: Whether a pool that was only sighted can be identified yet.
        discover: Sight what existed before we came.
        anchor: From a pool to its id, and to what lives as long as it and can be referenced weakly.
        pools_of: From what a user holds (an engine, a client) to its pools; raises TypeError if it is nothing of ours.
        name_pool: Remember the name a user gives a pool.
        idle_sockets: The file descriptors of the connections that nobody holds; None if nobody can tell.
        purpose: What a loan is for, where somebody holds a connection on purpose.
        leases: The ids of what stands for a pool's loans, of the living ones at least.
        withheld: Names of metrics that somebody else emits for the pools of this name, asked at every collection.
        config: How a pool is set up, in the library's own words; nothing that is a secret or may hold one.
    """

    name: str
    identify: Callable[[Any], Identity]
    read: Callable[[Any, Watch], Snapshot]
    hooks: Mapping[str, tuple[Row, ...]]
    members: Callable[[Any], Iterable[tuple[Any, bool]]] = _none
    complete: Callable[[Any], bool] = _always
    discover: Callable[[Registry], None] = _nothing
    anchor: Callable[[Any], tuple[int, Any]] = _by_id
    pools_of: Callable[[Any], Iterable[Any]] = itself
    name_pool: Callable[[Any, str], None] = given_names.__setitem__
    idle_sockets: Callable[[Any, Watch], Iterable[int | None]] | None = None
    purpose: Callable[[Loan], str | None] = _unknown
    leases: Callable[[Any, Watch], Iterable[int]] = _connections
    withheld: Callable[[Registry, Ledger], Collection[str]] = _nobody
    config: Callable[[Any], Mapping[str, Any]] = _unsaid


@dataclass(frozen=True, slots=True)
class Library:
    """
    Where a target is, and what it is for, without importing either.

    Attributes:
        target: The module with `TARGET`; imported when the app has imported the library.
        modules: The top-level modules whose import we wait for, any of them, and the versions
            the table was tested with; no upper bound.
        extra: What to ``pip install`` if the user named it and it is missing.
    """

    target: str
    modules: Mapping[str, str]
    extra: str


LIBRARIES = {
    "sqlalchemy": Library("otel_pools.targets.sqlalchemy", {"sqlalchemy": "sqlalchemy >= 1.4"}, "sqlalchemy"),
    "httpx": Library(
        "otel_pools.targets.httpx", {"httpcore": "httpcore >= 0.17", "httpcore2": "httpcore2 >= 2.0"}, "httpx"
    ),
    "qdrant": Library("otel_pools.targets.qdrant", {"qdrant_client": "qdrant-client >= 1.9"}, "qdrant"),
    "redis": Library("otel_pools.targets.redis", {"redis": "redis >= 5.0", "valkey": "valkey >= 6.0"}, "redis"),
}
