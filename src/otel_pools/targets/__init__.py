"""
What one library has to say about itself to be watched, and where each library says it.

To add a library: write `identify`, `read` and a table of hooks in a module
here, add one line to `LIBRARIES` and one entry point to pyproject.toml, and
let a test class inherit `otel_pools.testing.PoolContract`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .._hooks import Row
    from .._model import Identity, Snapshot
    from .._registry import Registry
    from .._watch import Watch


def _none(pool: Any) -> Iterable[Any]:
    return ()


def _always(pool: Any) -> bool:
    return True


def _nothing(registry: Registry) -> None:
    pass


def _itself(thing: Any) -> Any:
    return thing


@dataclass(frozen=True, slots=True)
class Target:
    """
    One library, as a table.

    Attributes:
        name: As in `LIBRARIES`.
        identify: Who a pool is.
        read: What a pool says about itself now; may raise, which costs only its numbers.
        hooks: Which methods of the library mean what.
        members: The connections a pool already has when we meet it.
        complete: Whether a pool that was only sighted can be identified yet.
        discover: Sight what existed before we came.
        pool_of: From what a user holds (an engine, a client) to the pool; raises TypeError if there is none.
        name_pool: Remember the name a user gives a pool.
    """

    name: str
    identify: Callable[[Any], Identity]
    read: Callable[[Any, Watch], Snapshot]
    hooks: tuple[Row, ...]
    members: Callable[[Any], Iterable[Any]] = _none
    complete: Callable[[Any], bool] = _always
    discover: Callable[[Registry], None] = _nothing
    pool_of: Callable[[Any], Any] = _itself
    name_pool: Callable[[Any, str], None] | None = None


@dataclass(frozen=True, slots=True)
class Library:
    """
    Where a target is, and what it is for, without importing either.

    Attributes:
        target: The module with `TARGET`; imported when the app has imported the library.
        module: The top-level module whose import we wait for.
        requires: The versions its table was tested with; no upper bound.
        extra: What to ``pip install`` if the user named it and it is missing.
    """

    target: str
    module: str
    requires: str
    extra: str


LIBRARIES = {
    "sqlalchemy": Library("otel_pools.targets.sqlalchemy", "sqlalchemy", "sqlalchemy >= 1.4", "sqlalchemy"),
}
