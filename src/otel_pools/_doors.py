"""The ways in: one OpenTelemetry instrumentor per library, and `instrument()` for people."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
import time
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from opentelemetry.instrumentation.dependencies import DependencyConflict
from opentelemetry.instrumentation.instrumentor import BaseInstrumentor  # type: ignore[attr-defined]  # untyped upstream
from opentelemetry.metrics import MeterProvider
from opentelemetry.trace import TracerProvider, get_tracer
from packaging.requirements import Requirement
from packaging.version import InvalidVersion
from wrapt import when_imported

from . import _guard
from . import _vocabulary as words
from ._config import Settings, settings
from ._guard import guard, logger, once
from ._model import Advice, HealthReport, Holder, PoolStats
from ._version import __version__
from .targets import LIBRARIES, Target

try:
    from opentelemetry.instrumentation.dependencies import DependencyConflictError

    EXPECTED = True  # by the auto-loader: this, and that a module is not found
except ImportError:
    # Before 0.54 it logs a traceback of whatever it gets.
    class DependencyConflictError(Exception):  # type: ignore[no-redef]
        """A library is there, and too old."""

    EXPECTED = False

if TYPE_CHECKING:
    from ._instruments import Instruments
    from ._registry import Registry


@dataclass
class Configuration:
    """
    What a declarative configuration file may say about one of our instrumentors.

    The fields are the keywords of `instrument`, in the types that JSON has.
    """

    span_threshold: float | None = None
    metrics_exclude: list[str] | None = None
    names: list[str] | None = None
    leak_threshold: float | None = None
    holders: bool | None = None
    call_site: bool | None = None
    stacks: bool | None = None
    busy_time: bool | None = None
    poll_idle: bool | None = None
    native_redis: str | None = None
    health_degraded: float | None = None
    health_critical: float | None = None
    health_wait: float | None = None


class PoolInstrumentor(BaseInstrumentor):  # type: ignore[misc]  # the same
    """What the instrumentors of all libraries have in common; never made itself, or its children would be it."""

    library: ClassVar[str]
    configuration: ClassVar[type] = Configuration

    _undo: ClassVar[ExitStack | None] = None
    _registry: ClassVar[Registry | None] = None
    _instruments: ClassVar[Instruments | None] = None

    def instrumentation_dependencies(self) -> Collection[str]:
        """The versions this was tested with, of the libraries that are there; without an upper bound."""
        requires = LIBRARIES[self.library].modules
        return [requires[module] for module in requires if _is_there(module)] or [*requires.values()][:1]

    def instrument(
        self,
        *,
        meter_provider: MeterProvider | None = None,
        tracer_provider: TracerProvider | None = None,
        **options: Any,
    ) -> None:
        """
        Watch every pool of this library, those that exist included.

        Args:
            meter_provider: Where the metrics go; by default the global provider, even if it is set later.
            tracer_provider: Where the spans go; likewise.
            **options: The fields of `Settings`.

        Raises:
            ModuleNotFoundError: The library is not installed, and ``skip_dep_check`` was given,
                as the auto-loader does, which expects this error.
        """
        if self.is_instrumented_by_opentelemetry:
            # A declarative configuration file instruments first, and the auto-loader comes by again.
            logger.debug("otel_pools: %s is instrumented already", self.library)
            return
        if options.get("raise_exception_on_conflict") and not options.get("skip_dep_check"):
            # Asked here and not again: 0.53 logs as an error what it is about to raise, which the auto-loader expects.
            if conflict := self._check_dependency_conflicts():
                raise DependencyConflictError(conflict)
            options["skip_dep_check"] = True
        try:
            super().instrument(meter_provider=meter_provider, tracer_provider=tracer_provider, **options)
        except (ModuleNotFoundError, DependencyConflictError) as why:
            if EXPECTED:
                raise
            logger.debug("otel_pools: %s goes unseen: %s", self.library, why)

    def uninstrument(self, **options: Any) -> None:
        """Take every hook off: the library's own functions, the very same objects, are back."""
        if self.is_instrumented_by_opentelemetry:
            super().uninstrument(**options)

    def _instrument(self, **options: Any) -> None:
        modules = _demand(self.library)
        with guard(f"instrumenting {self.library}"):
            self._open(modules, **options)

    def _open(
        self,
        modules: list[str],
        meter_provider: MeterProvider | None,
        tracer_provider: TracerProvider | None,
        **given: Any,
    ) -> None:
        cls = type(self)
        chosen = settings(given)
        if chosen.targets and self.library not in chosen.targets:
            return
        undo = ExitStack()
        cls._undo = undo
        attached: set[str] = set()

        def imported(module: Any) -> None:
            # Inside the app's own import statement: nothing of ours may come out of it.
            with guard(f"instrumenting {self.library}"):
                # One library may go by the name of another, as under `httpx2.alias_httpx()`.
                if cls._undo is undo and module.__name__ not in attached:
                    attached.add(module.__name__)
                    _attach(
                        cls._registry or cls._begin(undo, chosen, meter_provider, tracer_provider),
                        undo,
                        module.__name__,
                    )

        for module in modules:
            when_imported(module)(imported)
        if cls._registry is not None:  # a module had been imported
            with guard(f"looking for pools of {self.library}"):
                cls._registry.target.discover(cls._registry)
                # Now, and not when somebody first looks: their connections may be opened and closed before.
                cls._registry.pools()

    @classmethod
    def _begin(
        cls,
        undo: ExitStack,
        chosen: Settings,
        meter_provider: MeterProvider | None,
        tracer_provider: TracerProvider | None,
    ) -> Registry:
        """Everything but the hooks; one of the library's modules has been imported by now."""
        # Half of what we are, and of no use to an app that never imports the library: not before now.
        from ._instruments import instruments  # noqa: PLC0415  # as said
        from ._registry import Registry  # noqa: PLC0415  # as said
        from ._spans import Spans  # noqa: PLC0415  # as said

        target: Target = importlib.import_module(LIBRARIES[cls.library].target).TARGET
        tracer = get_tracer(f"otel_pools.{target.name}", __version__, tracer_provider, words.SCHEMA_URL)
        registry = Registry(target, chosen, Spans(tracer, chosen.span_threshold))
        undo.callback(registry.close)
        cls._registry = registry
        cls._instruments = instruments(meter_provider)
        cls._instruments.registries[target.name] = registry
        return registry

    def _uninstrument(self, **_: Any) -> None:
        cls = type(self)
        undo, cls._undo = cls._undo, None
        made, cls._instruments = cls._instruments, None
        cls._registry = None
        with guard(f"uninstrumenting {self.library}"):
            if made is not None:
                made.registries.pop(cls.library, None)
            if undo is not None:
                undo.close()
        _guard.forget()


class SQLAlchemyPoolInstrumentor(PoolInstrumentor):
    """Watches every SQLAlchemy pool: of engines sync and asyncio, made before or after, and of no engine."""

    library = "sqlalchemy"


class RedisPoolInstrumentor(PoolInstrumentor):
    """Watches every pool of redis-py and valkey-py: sync and asyncio, blocking, Sentinel, Cluster."""

    library = "redis"


class HTTPXPoolInstrumentor(PoolInstrumentor):
    """Watches every pool of httpcore and httpcore2, hence of httpx, httpx2 and the many clients built on them."""

    library = "httpx"


class QdrantPoolInstrumentor(PoolInstrumentor):
    """Watches the gRPC channels of qdrant-client, and gives its HTTP pools their name; those need the httpx one too."""

    library = "qdrant"


INSTRUMENTORS: dict[str, type[PoolInstrumentor]] = {
    "httpx": HTTPXPoolInstrumentor,
    "qdrant": QdrantPoolInstrumentor,
    "redis": RedisPoolInstrumentor,
    "sqlalchemy": SQLAlchemyPoolInstrumentor,
}


def _attach(registry: Registry, undo: ExitStack, module: str) -> None:
    """Put the hooks for this module on."""
    target = registry.target
    for hook in target.hooks[module]:
        try:
            undo.callback(hook.install(registry))
        except (LookupError, ImportError):
            logger.warning("otel_pools: this %s has no %s; %s goes unseen", module, hook.where, hook.verb)


def _demand(name: str) -> list[str]:
    """
    The modules of this library that are there and new enough, none of them imported for that.

    The auto-loader checks only the distribution, whose extras name any one of
    our libraries; and the two errors are the only ones it survives.

    Raises:
        ModuleNotFoundError: There is none.
        DependencyConflictError: Those that are there are too old.
    """
    requires = LIBRARIES[name].modules
    there = [module for module in requires if _is_there(module)]
    if not there:
        module = next(iter(requires))
        raise ModuleNotFoundError(f"{module} is not installed", name=module)
    conflicts = {module: conflict for module in there if (conflict := _conflict(requires[module]))}
    if len(conflicts) == len(there):
        raise DependencyConflictError(next(iter(conflicts.values())))
    for conflict in conflicts.values():
        once(f"unseen {name}", "otel_pools: %s goes unseen: %s", name, conflict)
    return [module for module in there if module not in conflicts]


def _is_there(module: str) -> bool:
    return module in sys.modules or importlib.util.find_spec(module) is not None


def _conflict(requirement: str) -> DependencyConflict | None:
    wanted = Requirement(requirement)
    try:
        found = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        return None  # vendored: its table will tell what fits
    try:
        fits = wanted.specifier.contains(found, prereleases=True)
    except InvalidVersion:
        fits = True  # as that of a fork; the table will tell
    return None if fits else DependencyConflict(requirement, f"{wanted.name} {found}")


def instrument(
    *targets: str,
    meter_provider: MeterProvider | None = None,
    tracer_provider: TracerProvider | None = None,
    **options: Any,
) -> None:
    """
    Watch the pools of these libraries, or of all we know.

    Never raises: what cannot be watched is said in the log, and the
    application runs on.

    Args:
        *targets: As in ``"sqlalchemy"``; by default, every library that is installed.
        meter_provider: Where the metrics go; by default the global provider, even if it is set later.
        tracer_provider: Where the spans go; likewise.
        **options: The fields of `Settings`, as in ``span_threshold=0.05``.
    """
    for name in targets or INSTRUMENTORS:
        _instrument(name, bool(targets), meter_provider=meter_provider, tracer_provider=tracer_provider, **options)


def _instrument(name: str, asked_for: bool, **options: Any) -> None:
    if name not in INSTRUMENTORS:
        logger.warning("otel_pools knows no target %r (there are: %s)", name, ", ".join(INSTRUMENTORS))
        return
    try:
        if not EXPECTED:
            _demand(name)  # the instrumentor, which asks too, keeps the answer to itself there
        INSTRUMENTORS[name]().instrument(skip_dep_check=True, **options)
    except ModuleNotFoundError:
        _missing(name, asked_for)
    except DependencyConflictError as conflict:
        logger.warning("otel_pools: %s goes unseen: %s", name, conflict)


def _missing(name: str, asked_for: bool) -> None:
    if asked_for:
        hint = f"pip install 'otel-pools[{LIBRARIES[name].extra}]'"
        logger.warning("otel_pools: %s is not installed; try: %s", name, hint)
    else:
        logger.debug("otel_pools: %s is not installed", name)


def uninstrument(*targets: str) -> None:
    """Stop watching these libraries, or all; without effect on those that are not watched."""
    for name in targets or INSTRUMENTORS:
        if name in INSTRUMENTORS:
            INSTRUMENTORS[name]().uninstrument()


def name_pool(thing: Any, name: str) -> None:
    """
    Give a pool the name that its metrics, spans and logs will carry.

    Args:
        thing: An engine, a client or a pool, sync or asyncio.
        name: Stable and not unique to the process: equal names add up.

    Raises:
        TypeError: *thing* is nothing that has a pool we know.
    """
    for library in LIBRARIES.values():
        if any(module in sys.modules for module in library.modules):
            target: Target = importlib.import_module(library.target).TARGET
            if _named(target, thing, name):
                return
    raise TypeError(f"no pool we know: {type(thing).__qualname__}")


def holders(pool: str | None = None) -> tuple[Holder, ...]:
    """
    Who holds the connections that are out, who has held longest first.

    Args:
        pool: The name of a pool; by default of all pools that are watched.
    """
    # As late as the rest of what only an app with pools needs.
    from ._holders import holders_of  # noqa: PLC0415  # as said
    from ._registry import alive  # noqa: PLC0415  # as said
    from ._watch import clock  # noqa: PLC0415  # as said

    found = [
        holder
        for registry in alive()
        for ledger in list(registry.ledgers.values())
        if pool in {None, ledger.identity.name}
        for holder in holders_of(ledger, registry, clock())
    ]
    return tuple(sorted(found, key=lambda holder: -holder.held_s))


def pools() -> tuple[PoolStats, ...]:
    """
    The statistics of every pool that is watched, one for each pool name, by name.

    Read from the pools themselves and from what was counted; with or without
    an SDK, and whatever becomes of its exports.
    """
    # As late as the rest of what only an app with pools needs.
    from ._statistics import statistics  # noqa: PLC0415  # as said

    return statistics()


def health(
    *, degraded: float | None = None, critical: float | None = None, max_wait: float | None = None
) -> HealthReport:
    """
    How the pools are, and whether they can serve.

    A pool is ``degraded`` or ``critical`` by how much of its limit is in use,
    ``critical`` also if there is harm, and in ``error`` if it cannot be read.
    It is not ready only on harm: a request has waited for longer than
    *max_wait*, or within the last minute one got no connection in time, found
    the pool exhausted, or could not connect. A full pool that nobody waits for
    is ready.

    Args:
        degraded: From which part of its limit on, 0 to 1; by default the setting ``health_degraded``.
        critical: Likewise; by default ``health_critical``.
        max_wait: In seconds; by default ``health_wait``.
    """
    from ._health import report  # noqa: PLC0415  # as said
    from ._statistics import vitals  # noqa: PLC0415  # as said

    chosen = {"degraded": degraded, "critical": critical, "wait": max_wait}
    given = {name: value for name, value in chosen.items() if value is not None}
    found = [(vital, limits._replace(**given) if given else limits) for vital, limits in vitals()]
    return report(found, time.time())


def check(*things: Any, timeout: float = 1.0) -> HealthReport:
    """
    Try to get a connection of each of these, for real; `health` never does.

    It is a checkout like any other: it stands in line, and is counted. A
    client of Redis sends a PING; an engine connects, which reaches the server
    if a connection has to be opened or is tested first (``pool_pre_ping``).
    Of each there is one attempt at a time, in a thread.

    Args:
        *things: SQLAlchemy engines, clients of redis-py and valkey-py; sync ones.
        timeout: In seconds, for all of them together.

    Raises:
        TypeError: One of them is for asyncio, or has no connection to get.
    """
    from ._check import check  # noqa: PLC0415  # as said

    return check(things, timeout)


async def check_async(*things: Any, timeout: float = 1.0) -> HealthReport:
    """
    Do what `check` does with asyncio: for an AsyncEngine, or asyncio's clients of Redis.

    Args:
        *things: Of asyncio.
        timeout: In seconds, for each.

    Raises:
        TypeError: One of them is not for asyncio, or has no connection to get.
    """
    from ._check import check_async  # noqa: PLC0415  # as said

    return await check_async(things, timeout)


def advice(
    *, wait_probability: float = 0.01, instances: int | None = None, server_limit: int | None = None
) -> tuple[Advice, ...]:
    """
    What to change about the pools that are watched, why, and by which settings; the gravest first.

    Args:
        wait_probability: How many of all checkouts may have to wait, 0 to 1: sizes are made for it.
        instances: How many processes of this kind share the server.
        server_limit: How many connections it allows them all together; see `server_limits`.

    Raises:
        ValueError: *wait_probability* is not between 0 and 1.
    """
    from ._advice import advise  # noqa: PLC0415  # as said

    return advise(pools(), holders(), wait_probability=wait_probability, instances=instances, server_limit=server_limit)


def reset_stats() -> None:
    """
    Let the statistics of all pools begin anew: counts, timings, peaks and rates.

    The exported metrics go on, and so does what `health` knows of failures.
    """
    from ._statistics import restart  # noqa: PLC0415  # as said

    restart()


def _named(target: Target, thing: Any, name: str) -> bool:
    try:
        pools = target.pools_of(thing)
    except TypeError:
        return False
    # As late as the rest of what only an app with pools needs.
    from ._registry import renamed  # noqa: PLC0415  # as said

    for pool in pools:
        target.name_pool(pool, name)
        renamed(pool)
    return True
