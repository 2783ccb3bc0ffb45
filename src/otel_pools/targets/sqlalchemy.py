"""SQLAlchemy: the pool of every engine, sync or asyncio, and pools without an engine."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import takewhile
from operator import attrgetter
from types import FrameType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import AssertionPool, NullPool, Pool, QueuePool, SingletonThreadPool, StaticPool
from sqlalchemy.pool.base import _ConnectionFairy, _ConnectionRecord

from .. import _vocabulary as words
from .._guard import guard, lost_quietly
from .._hooks import Hook, Undo, acquire, after, close, create, either, nothing, queue, queue_if_empty, release, replace
from .._leases import outwards
from .._model import Identity, Snapshot
from .._watch import LONG_AGO, clock
from . import Target, descriptor, existing

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

    from .._registry import Registry
    from .._watch import Watch

# -- who a pool is -----------------------------------------------------------------

# A pool does not know its URL. Its dialect belongs to one engine and is the
# same object in the pool that `dispose()` puts in its place, so it is the key.
_engines: WeakKeyDictionary[Any, tuple[Identity, str | None]] = WeakKeyDictionary()
_names: WeakKeyDictionary[Any, str] = WeakKeyDictionary()

# From the backend of a URL to `db.system.name` and its default port.
SYSTEMS: dict[str, tuple[str, int | None]] = {
    "postgresql": ("postgresql", 5432),
    "mysql": ("mysql", 3306),
    "mariadb": ("mariadb", 3306),
    "mssql": ("microsoft.sql_server", 1433),
    "oracle": ("oracle.db", 1521),
    "sqlite": ("sqlite", None),
    "cockroachdb": ("cockroachdb", 26257),
    "redshift": ("aws.redshift", 5439),
    "trino": ("trino", None),
    "clickhouse": ("clickhouse", None),
    "db2": ("ibm.db2", 50000),
    "hana": ("sap.hana", None),
    "teradatasql": ("teradata", None),
    "firebird": ("firebirdsql", 3050),
}
OTHER = "other_sql"


def remember(registry: Registry, engine: Engine) -> None:
    """Note where an engine's pools connect to: the parts of the URL that are no secret."""
    _engines[engine.dialect] = _located(engine.url), engine.logging_name
    registry.sight(engine.pool)


def _located(url: URL) -> Identity:
    system, default = SYSTEMS.get(url.get_backend_name(), (OTHER, None))
    host, port = _server(url, default)
    return Identity(
        library="sqlalchemy",
        system=system,
        namespace=_database(url),
        address=host,
        port=None if port == default else port,
    )


def _server(url: URL, default: int | None) -> tuple[str | None, int | None]:
    """Host and port; a URL that names several hosts keeps them in its query, as libpq does."""
    hosts = _listed(url, "host")
    if url.host or not hosts:
        return url.host, url.port
    ports = _listed(url, "port") or [""]
    if len(hosts) == 1:
        host, _, port = hosts[0].rpartition(":") if _has_port(hosts[0]) else (hosts[0], "", ports[0])
        return host, int(port) if port.isdigit() else url.port
    pairs = [host if _has_port(host) else f"{host}:{port or default}" for host, port in _aligned(hosts, ports)]
    return ",".join(pairs), None


def _listed(url: URL, key: str) -> list[str]:
    value = url.query.get(key, ())
    values = (value,) if isinstance(value, str) else value
    return [item for entry in values for item in entry.split(",")] if any(values) else []


def _aligned(hosts: list[str], ports: list[str]) -> Iterable[tuple[str, str]]:
    return zip(hosts, ports if len(ports) == len(hosts) else ports[:1] * len(hosts), strict=True)


def _has_port(host: str) -> bool:
    name, colon, port = host.rpartition(":")
    return bool(colon) and port.isdigit() and (":" not in name or name.endswith("]"))


def _database(url: URL) -> str | None:
    """The database, or Oracle's service; of a SQLite file the name alone, as its folders are nobody's business."""
    backend, database = url.get_backend_name(), url.database or None
    if backend == "oracle":
        service = url.query.get("service_name") or url.query.get("sid") or database
        return service if isinstance(service, str) else database
    if backend != "sqlite" or database is None or database == ":memory:":
        return database if backend != "sqlite" else None
    return database.removeprefix("file:").partition("?")[0].replace("\\", "/").rpartition("/")[2] or None


def identify(pool: Pool) -> Identity:
    """By the user's name, the pool's or engine's logging name, and the engine's URL."""
    dialect: Any = pool._dialect
    known, engine_name = _engines.get(dialect, (None, None))
    if known is None:
        system, _ = SYSTEMS.get(getattr(dialect, "name", ""), (OTHER, None))
        known = Identity(library="sqlalchemy", system=system)
    given = _names.get(_anchor(pool)) or getattr(pool, "_orig_logging_name", None) or engine_name
    return Identity(known.library, known.system, given, known.namespace, known.address, known.port)


def complete(pool: Pool) -> bool:
    """A pool is made before its engine, and nobody knows its URL in between; a bare pool is met at its first use."""
    return pool._dialect in _engines


def _anchor(pool: Pool) -> Any:
    """What stays when `dispose()` replaces the pool: the dialect, or, without an engine, the pool itself."""
    return pool._dialect if pool._dialect in _engines else pool


def pools_of(thing: Any) -> Iterable[Pool]:
    """The pool of an Engine, an AsyncEngine or a Pool."""
    engine = getattr(thing, "sync_engine", thing)
    pool = engine if isinstance(engine, Pool) else getattr(engine, "pool", None)
    if not isinstance(pool, Pool):
        raise TypeError(f"neither an engine nor a pool: {type(thing).__qualname__}")
    return (pool,)


def name_pool(pool: Pool, name: str) -> None:
    """Keep the user's name for as long as the engine lives."""
    _names[_anchor(pool)] = name


# -- what it says --------------------------------------------------------------------


def read(pool: Pool, watch: Watch) -> Snapshot:
    """
    Counted from the records of its connections, not from the pool's own counters.

    Those go to -1 after `dispose()`, count closed connections as idle, and
    take a mutex that hangs a forked child.
    """
    used = idle = 0
    for record in watch.connections():
        if record.dbapi_connection is not None:
            if record.fairy_ref is not None:
                used += 1
            elif id(record) not in watch.creating:
                idle += 1
    size, most = _limits(pool)
    overflow = None if size is None else max(used + idle - size, 0)
    beyond = None if size is None or most is None else most - size
    return Snapshot(used, idle, most, size, None, _pending(pool), overflow, beyond)


def _limits(pool: Pool) -> tuple[int | None, int | None]:
    """How many connections the pool keeps, and how many it opens at most; None where it has no limit."""
    if isinstance(pool, QueuePool):
        size, overflow = pool._pool.maxsize, pool._max_overflow
        return (size or None), (size + overflow if overflow > -1 else None)
    if isinstance(pool, NullPool):
        return 0, None
    if isinstance(pool, StaticPool | AssertionPool):
        return 1, 1
    if isinstance(pool, SingletonThreadPool):
        return pool.size, pool.size
    return None, None


def _pending(pool: Pool) -> int | None:
    """
    Who stands in the queue, from the queue itself.

    Both lists are CPython's own and undocumented; without them the number is
    not told.
    """
    line = getattr(pool, "_pool", None)
    condition = getattr(line, "not_empty", None)
    if condition is not None:
        waiters = getattr(condition, "_waiters", None)
        return None if waiters is None else len(waiters)
    loop_queue = _loop_queue(line)
    if loop_queue is None:
        return 0 if isinstance(pool, QueuePool) else None
    getters = getattr(loop_queue, "_getters", None)
    return None if getters is None else sum(not future.done() for future in getters.copy())


def _loop_queue(line: Any) -> Any:
    """The queue of an asyncio pool, if there is one: made at its first use, in the loop that uses it, and not by us."""
    return getattr(line, "__dict__", {}).get("_queue")


def members(pool: Pool) -> Iterable[tuple[Any, bool]]:
    """The records that lie in a pool when we first see it; those that are out come back through `checkin`."""
    line = getattr(pool, "_pool", None)
    queued = getattr(line, "queue", None) or getattr(_loop_queue(line), "_queue", None) or ()
    single = vars(pool).get("connection") or getattr(pool, "_conn", None)
    return [
        (record, record.dbapi_connection is not None)
        for record in (*list(queued), *list(getattr(pool, "_all_conns", ())), single)
        if isinstance(record, _ConnectionRecord)
    ]


def discover(registry: Registry) -> None:
    """Find the engines, pools and connections that were there before us."""
    found = list(existing(*(f"{kind.__module__}:{kind.__qualname__}" for kind in (Engine, Pool, _ConnectionRecord))))
    # In this order: a pool is called after its engine.
    for engine in found:
        if isinstance(engine, Engine) and "dialect" in vars(engine):
            remember(registry, engine)
    for pool in found:
        if isinstance(pool, Pool):
            registry.sight(pool)
    for record in found:
        if isinstance(record, _ConnectionRecord) and record.dbapi_connection is not None:
            watch = registry.find(_pool_of_record(record))
            if watch is not None:
                watch.met(record)
                watch.opened.setdefault(id(record), LONG_AGO)


# -- what happens to it ------------------------------------------------------------

_pool_of_record = attrgetter("_ConnectionRecord__pool")


def refusal(error: BaseException) -> str | None:
    """SQLAlchemy's error for "none came back in time" has a code; AssertionPool refuses a second at once."""
    if isinstance(error, PoolTimeout) and error.code == "3o7r":
        return words.TIMEOUT
    return words.EXHAUSTED if isinstance(error, AssertionError) else None


def inside(connect: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What `Pool.connect` calls, if it does nothing else (from 1.4 to 2.1 it does not), which saves us a call."""
    code = getattr(connect, "__code__", None)
    if code is None or code.co_names != ("_ConnectionFairy", "_checkout"):
        return connect
    checkout: Callable[[Any], Any] = _ConnectionFairy._checkout
    return checkout


def _loan(fairy: Any) -> Any:
    """SingletonThreadPool hands the same loan out again to the thread that has it."""
    return fairy._connection_record if fairy._counter == 1 else None


def why_closed() -> str:
    """
    Why `Pool._close_connection` was called.

    Its callers know, and they have kept their names since 1.4. Only frames of
    SQLAlchemy itself are looked at: asking one of the user's for its locals
    would keep alive whatever they held, for as long as it runs.
    """
    frames = _callers(sys._getframe(2))
    return _reason([frame.f_code.co_name for frame in frames], frames)


def _callers(frame: FrameType) -> list[FrameType]:
    """Of this frame and those that called it, SQLAlchemy's own, up to the first that is not."""
    return list(takewhile(lambda one: str(one.f_globals.get("__name__")).startswith("sqlalchemy."), outwards(frame)))


def _reason(callers: list[str], frames: list[FrameType]) -> str:  # noqa: PLR0911  # a table, in the form of a match
    match callers:
        case ["_finalize_fairy", *_]:  # it had been detached, and is now really closed
            return "closed"
        case ["__connect", *_]:  # a listener failed on the new connection
            return "error"
        case ["__close", "get_connection", *_]:
            return _staleness(frames[1].f_locals["self"])
        case ["__close", "close", "_do_return_conn", *_]:  # a NullPool closes whatever comes back
            return "overflow" if isinstance(frames[2].f_locals["self"], QueuePool) else "closed"
        case ["__close", "close", "_cleanup", *_]:
            return "overflow"
        case ["__close", "close", "dispose", *_]:
            return "dispose"
        case ["__close", "close", *_]:
            return "closed"
    return _invalidation(callers, frames)


def _staleness(record: Any) -> str:
    """At checkout the record was too old, or had been invalidated softly or with its pool."""
    pool, soft = _pool_of_record(record), record._soft_invalidate_time
    return "invalidated" if max(pool._invalidate_time, soft) > record.starttime else "recycle"


def _invalidation(callers: list[str], frames: list[FrameType]) -> str:
    """Walk outwards from `invalidate` to who asked for it."""
    for name, frame in zip(callers, frames, strict=True):
        if name == "_finalize_fairy":
            return "reset"
        if name in {"_checkin_failed", "_handle_dbapi_exception"}:
            return "error"
        if name == "_checkout":
            return "pre_ping" if _is_ping_failure(frame.f_locals.get("e")) else "invalidated"
    return "invalidated"


def _is_ping_failure(error: Any) -> bool:
    """The pre-ping's own verdict, and not a user's listener that raised the same: one frame, not two."""
    trace = getattr(error, "__traceback__", None)
    return isinstance(error, InvalidatePoolError) and trace is not None and trace.tb_next is None


class _Detached:
    """
    The end of a loan that never comes back: `detach()`, and an asyncio connection left to the collector.

    By the public event, because patching the class of the fairy makes every
    checkout slower. Listened to once and for ever: `event.remove` in one
    thread can break a checkout in another.
    """

    verb = "release"
    where = "sqlalchemy.pool:Pool (event detach)"

    def __init__(self) -> None:
        self._registry: Registry | None = None
        self._listening = False

    def install(self, registry: Registry) -> Undo:
        """Listen, from the first time on; return what stops us from acting on it."""
        self._registry = registry
        if not self._listening:
            event.listen(Pool, "detach", self._detached)
            self._listening = True
        return self._off

    def _off(self) -> None:
        self._registry = None

    def _detached(self, _: Any, record: Any) -> None:
        try:
            registry = self._registry
            watch = None if registry is None else registry.find(_pool_of_record(record))
            if watch is not None:
                lease = watch.leases.get(id(record))
                watch.ended(record)
                watch.opened.pop(id(record), None)  # its connection goes on without it
                if lease is not None and _is_finalised():
                    watch.collected(lease)
        except Exception as mistake:
            lost_quietly("a detached connection", mistake)


def _is_finalised() -> bool:
    """Whether it is the finaliser that detaches: what asyncio connections are lent for cannot be undone there."""
    return any(frame.f_code.co_name == "_finalize_fairy" for frame in _callers(sys._getframe(2)))


def idle_sockets(_: Pool, watch: Watch) -> Iterable[int | None]:
    """Of the drivers' connections that nobody holds, where the driver has a socket to look at."""
    records = (record for record in watch.connections() if record.fairy_ref is None)
    connections = (record.dbapi_connection for record in records)
    # What SQLAlchemy puts around asyncio drivers has the driver's own connection inside.
    return [descriptor(getattr(one, "_connection", one)) for one in connections if one is not None]


EXECUTES = ("do_execute", "do_execute_no_params", "do_executemany")


class _Work:
    """A call that has the server work, and takes as long; measured only if the user wants to know."""

    verb = "work"

    def __init__(self, where: str) -> None:
        self.where = where

    def install(self, registry: Registry) -> Undo:
        """Wrap it, if `busy_time` is on."""
        return Hook(self.verb, self.where, _working).install(registry) if registry.settings.busy_time else nothing


def _working(original: Callable[..., Any], registry: Registry) -> Callable[..., Any]:
    def execute(dialect: Any, *args: Any, **kwargs: Any) -> Any:
        ended = nothing
        with guard("a statement"):
            ended = _works(registry, kwargs.get("context", args[-1]))
        try:
            return original(dialect, *args, **kwargs)
        finally:
            with guard("the time of a statement"):
                ended()

    return execute


def _works(registry: Registry, context: Any) -> Callable[[], None]:
    record = getattr(getattr(context, "_dbapi_connection", None), "_connection_record", None)
    watch = None if record is None else registry.find(_pool_of_record(record))
    if watch is None:
        return nothing
    watch.working[id(record)] = clock()
    return partial(watch.worked, id(record))


def config(pool: Pool) -> Mapping[str, Any]:
    """The arguments it was made with, by the names that its class has for them."""
    known = {
        "class": type(pool).__name__,
        "recycle": pool._recycle,
        "pre_ping": pool._pre_ping,
    }
    if not isinstance(pool, QueuePool):
        return known | ({"pool_size": pool.size} if isinstance(pool, SingletonThreadPool) else {})
    line = pool._pool
    return known | {
        "pool_size": line.maxsize,
        "max_overflow": pool._max_overflow,
        "timeout": pool._timeout,
        "use_lifo": line.use_lifo,
    }


TARGET = Target(
    name="sqlalchemy",
    identify=identify,
    read=read,
    members=members,
    complete=complete,
    idle_sockets=idle_sockets,
    discover=discover,
    pools_of=pools_of,
    name_pool=name_pool,
    config=config,
    hooks={
        "sqlalchemy": (
            acquire(
                "sqlalchemy.pool.base:Pool.connect",
                lease="_connection_record",
                refusal=refusal,
                bare=inside,
            ),
            acquire("sqlalchemy.pool.impl:SingletonThreadPool.connect", lease=_loan, refusal=refusal),
            release(
                "sqlalchemy.pool.base:_ConnectionRecord.checkin", pool=_pool_of_record, loan=attrgetter("fairy_ref")
            ),
            either(
                queue_if_empty("sqlalchemy.util.queue:Queue._empty"),
                queue("sqlalchemy.util.queue:Queue.get", items=attrgetter("queue")),
            ),
            queue("sqlalchemy.util.queue:AsyncAdaptedQueue.get", items=attrgetter("_queue._queue")),
            create(
                "sqlalchemy.pool.base:_ConnectionRecord._ConnectionRecord__connect",
                pool=_pool_of_record,
                opened=lambda record: record.dbapi_connection is not None,
            ),
            close(
                "sqlalchemy.pool.base:Pool._close_connection",
                reason=why_closed,
                connection=attrgetter("dbapi_connection"),
            ),
            _Detached(),
            *(_Work(f"sqlalchemy.engine.default:DefaultDialect.{name}") for name in EXECUTES),
            replace("sqlalchemy.engine.base:Engine.dispose", pool=attrgetter("pool")),
            # Not the constructors: `create_engine` reads from their code which options there are.
            after(
                "sqlalchemy.engine.interfaces:Dialect.engine_created",
                do=lambda registry, _, engine: remember(registry, engine),
            ),
        ),
    },
)
