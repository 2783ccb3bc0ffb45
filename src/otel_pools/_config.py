"""Arguments and environment variables become one frozen Settings; a wrong value is said and not used."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ._guard import once
from ._model import Identity

PREFIX = "OTEL_POOLS_"


@dataclass(frozen=True, slots=True)
class Settings:
    """
    What a user can choose.

    Each field is a keyword of `instrument` and, in capitals after
    ``OTEL_POOLS_``, an environment variable; lists are separated by commas there.

    Attributes:
        span_threshold: Seconds a checkout must have waited to be worth a span; 0 means every checkout.
        metrics_exclude: Names of metrics not to emit.
        targets: Libraries to watch, as in ``sqlalchemy``; empty means all.
        names: Pool names by server, ``host[:port][/database]=name``.
        leak_threshold: Seconds after which a connection that is out is overdue; 0 means never.
        holders: Whether to note who holds a connection: the thread or task, trace and line that borrowed it. Without
            that a checkout takes 40 to 60 % of our time for it, and there are no holders (in spans, logs, `holders()`),
            no leak watch and no nested checkouts.
        call_site: Whether to note from which line of the application a connection was borrowed.
        stacks: Whether to note everything that stood below that line too.
        busy_time: Whether to measure for how long servers work while a connection is held (SQLAlchemy).
        poll_idle: Whether to look, at each collection, if the servers of idle connections have gone.
        native_redis: Beside redis-py's own OpenTelemetry metrics: ``defer`` leaves to them what they emit,
            ``replace`` takes it over from them, ``both`` emits both.
        health_degraded: From which part of its limit in use on a pool is degraded, 0 to 1.
        health_critical: From which part on it is critical.
        health_wait: Seconds; a request that has waited for longer makes `health` say "not ready".
    """

    span_threshold: float = 0.01
    metrics_exclude: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    leak_threshold: float = 60.0
    holders: bool = True
    call_site: bool = True
    stacks: bool = False
    busy_time: bool = False
    poll_idle: bool = False
    native_redis: str = "defer"
    health_degraded: float = 0.80
    health_critical: float = 0.95
    health_wait: float = 5.0

    def rename(self, identity: Identity) -> Identity:
        """Give the pool the name that `names` has for its server, the most exact entry first."""
        named = dict(pair.split("=", 1) for pair in self.names)
        host = identity.address or ""
        for server in (identity.server or host, host):
            for key in (f"{server}/{identity.namespace}", server):
                if key in named:
                    return replace(identity, given=named[key])
        return identity


def _seconds(value: object) -> float:
    seconds = float(value)  # type: ignore[arg-type]  # a wrong type is as wrong as a wrong number
    if isinstance(value, bool) or not math.isfinite(seconds) or seconds < 0:
        raise ValueError(value)
    return seconds


def _part(value: object) -> float:
    part = _seconds(value)
    if not 0 < part <= 1:
        raise ValueError(value)
    return part


def _words(value: object) -> tuple[str, ...]:
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, Iterable):
        raise TypeError(value)
    listed = tuple(items)
    if not all(isinstance(item, str) for item in listed):
        raise TypeError(value)
    return tuple(item.strip() for item in listed if item.strip())


def _pairs(value: object) -> tuple[str, ...]:
    if isinstance(value, Mapping):
        value = tuple(f"{server}={name}" for server, name in value.items())
    pairs = _words(value)
    if not all(all(part.strip() for part in pair.partition("=")) for pair in pairs):
        raise ValueError(value)
    return pairs


SWITCH = {"true": True, "1": True, "on": True, "yes": True, "false": False, "0": False, "off": False, "no": False}


def _switch(value: object) -> bool:
    return SWITCH[str(value).strip().lower()]


NATIVE = ("defer", "replace", "both")


def _native(value: object) -> str:
    if value not in NATIVE:
        raise ValueError(value)
    return str(value)


_READ: dict[str, tuple[Callable[[object], Any], str]] = {
    "span_threshold": (_seconds, "a number of seconds, 0 or more"),
    "metrics_exclude": (_words, "metric names separated by commas"),
    "targets": (_words, "target names separated by commas"),
    "names": (_pairs, "pairs host[:port][/database]=name separated by commas"),
    "leak_threshold": (_seconds, "a number of seconds, 0 or more"),
    "holders": (_switch, "true or false"),
    "call_site": (_switch, "true or false"),
    "stacks": (_switch, "true or false"),
    "busy_time": (_switch, "true or false"),
    "poll_idle": (_switch, "true or false"),
    "native_redis": (_native, f"one of {', '.join(NATIVE)}"),
    "health_degraded": (_part, "a number above 0 and up to 1"),
    "health_critical": (_part, "a number above 0 and up to 1"),
    "health_wait": (_seconds, "a number of seconds, 0 or more"),
}


def settings(given: Mapping[str, Any]) -> Settings:
    """Read *given* and, for what is not given, the environment. Never raises."""
    for unknown in given.keys() - _READ.keys():
        known = ", ".join(_READ)
        once(f"setting {unknown}", "otel_pools has no setting %r; it is ignored (there are: %s)", unknown, known)
    chosen: dict[str, Any] = {}
    for field in fields(Settings):
        variable = PREFIX + field.name.upper()
        value, source = given.get(field.name), field.name
        if value is None:
            value, source = os.environ.get(variable, "").strip() or None, variable
        if value is not None:
            _choose(chosen, field.name, field.default, value, source)
    return Settings(**chosen)


def _choose(chosen: dict[str, Any], name: str, default: object, value: object, source: str) -> None:
    read, wanted = _READ[name]
    try:
        chosen[name] = read(value)
    except (KeyError, TypeError, ValueError):
        # Only the source is named: a value put into the wrong variable may be a secret. And once for all libraries.
        once(f"setting {source}", "otel_pools: %s must be %s; the default %r is used", source, wanted, default)
