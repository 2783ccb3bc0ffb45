"""redis-py and valkey-py: every pool, sync and asyncio, blocking or not, of Sentinel and of Cluster."""

from __future__ import annotations

import inspect
import os
import sys
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from functools import cache
from operator import attrgetter
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from .. import _vocabulary as words
from .._guard import logger, lost_quietly, once
from .._hooks import Hook, Row, Undo, acquire, connect, disconnect, either, make, nothing, optional, resolve, take_back
from .._leases import doing
from .._model import Identity, Snapshot
from .._watch import KeyedRef
from . import Target, descriptor, existing, given_names

if TYPE_CHECKING:
    from .._leases import Loan
    from .._registry import Registry
    from .._watch import Ledger, Watch

LIBRARIES = ("redis", "valkey")
PORT = 6379
UNLIMITED = 2**31  # what redis-py writes for "no limit"

# -- who a pool is -----------------------------------------------------------------


def identify(pool: Any) -> Identity:
    """
    By the user's name, the client's, or Sentinel's; else by the server.

    Asked once, when we meet the pool: a maintenance notification rewrites the host.
    """
    options = pool.connection_kwargs
    service = getattr(pool, "service_name", None)
    address, port = (None, None) if service else _server(options)
    given = given_names.get(pool) or options.get("client_name") or (_sentinel(pool) if service else None)
    return Identity(_library(pool), "redis", given, str(options.get("db") or 0), address, port)


def _library(pool: Any) -> str:
    if isinstance(pool, Node):
        return pool.library
    roots = (base.__module__.partition(".")[0] for base in type(pool).__mro__)
    return next((root for root in roots if root in LIBRARIES), "redis")


def _server(options: dict[str, Any]) -> tuple[str, int | None]:
    if "path" in options:
        return str(options["path"]), None
    port = int(options.get("port") or PORT)
    return str(options.get("host") or "localhost"), None if port == PORT else port


def _sentinel(pool: Any) -> str:
    return f"sentinel:{pool.service_name}/{'master' if pool.is_master else 'replica'}"


def complete(pool: Any) -> bool:
    """A pool is made before Sentinel's part of it."""
    return hasattr(pool, "connection_kwargs") and ("Sentinel" not in type(pool).__name__ or hasattr(pool, "is_master"))


class Node:
    """
    The pool of one node of an asyncio cluster, which is no pool and cannot be referenced weakly.

    It keeps what the node keeps, except the deque of free connections, which
    is referenced weakly: it lives exactly as long as the node.
    """

    __slots__ = ("__weakref__", "_free", "connection_kwargs", "connections", "key", "library", "max_connections")

    def __init__(self, node: Any, free: weakref.ref[Any]) -> None:
        self.key = id(node)
        self.library = type(node).__module__.partition(".")[0]
        self.connection_kwargs = {"client_name": node.connection_kwargs.get("client_name")}
        self.connection_kwargs |= {"host": node.host, "port": node.port}
        self.connections = node._connections
        self.max_connections = node.max_connections
        self._free = free

    def __repr__(self) -> str:
        return f"<Node {self.connection_kwargs['host']}:{self.connection_kwargs['port']} of an asyncio cluster>"

    @property
    def free(self) -> list[Any]:
        """The connections that nobody holds."""
        return list(self._free() or ())


# By the id of its deque; the only strong reference to a Node.
_nodes: dict[int, tuple[KeyedRef, Node]] = {}


def anchor(pool: Any) -> tuple[int, Any]:
    """A pool, or what stands for a node of an asyncio cluster."""
    if isinstance(pool, Node):
        return pool.key, pool
    if not hasattr(pool, "acquire_connection"):
        return id(pool), pool
    free = pool._free
    if id(free) not in _nodes:
        ref = KeyedRef(free, lambda ref: void(_nodes.pop(ref.key, None)))
        _nodes[id(free)] = ref, Node(pool, ref)
    return id(pool), _nodes[id(free)][1]


def void(_: Any) -> None:
    """Forget the result."""


def pools_of(thing: Any) -> Iterable[Any]:
    """The pool of a client, those of a cluster's nodes or of several databases, or a pool itself."""
    if hasattr(thing, "nodes_manager"):
        nodes = list(thing.nodes_manager.nodes_cache.values())
        return [pool for node in nodes for pool in _pools_of_node(node)]
    if hasattr(thing, "get_databases"):
        return [pool for database, _ in thing.get_databases() for pool in pools_of(database.client)]
    pool = getattr(thing, "connection_pool", thing)
    if not hasattr(pool, "get_connection") or not hasattr(pool, "connection_kwargs"):
        raise TypeError(f"neither a client nor a pool: {type(thing).__qualname__}")
    return (pool,)


def _pools_of_node(node: Any) -> Iterable[Any]:
    if hasattr(node, "acquire_connection"):
        return (anchor(node)[1],)
    client = getattr(node, "redis_connection", None) or getattr(node, "valkey_connection", None)
    return () if client is None else (client.connection_pool,)


# -- what it says --------------------------------------------------------------------


def read(pool: Any, watch: Watch) -> Snapshot:
    """
    Counted from its connections; without its lock, which it holds while it talks to the server.

    One that is out counts even while it has no socket: it takes a place.
    One that lies in the pool counts only if it is open: redis-py keeps the
    closed ones too.
    """
    most = _limit(pool)
    if _is_the_parents(pool):
        return Snapshot(0, 0, most, pending=0, orphaned=0)
    used, free = _used(pool, watch.leases), _free(pool)
    missing = _missing(pool, used, free)
    out = {id(connection) for connection in used}
    lying = [connection for connection in free if id(connection) not in out]
    idle = [connection for connection in lying if _is_open(connection)]
    if len(idle) < len(lying):
        _notice(lying, watch)
    return Snapshot(
        used=_own(used, watch), idle=_own(idle, watch), max=most, pending=_pending(pool, watch), orphaned=missing
    )


def _notice(lying: list[Any], watch: Watch) -> None:
    """Of these, who was closed and we have not seen it: in the very moment in which somebody else had opened it."""
    for connection in lying:
        key = id(_parts(connection)[-1])
        if key in watch.opened and not _is_open(connection):
            watch.shut(key, words.CLOSED)


def _own(connections: list[Any], watch: Watch) -> int:
    """How many are not another pool's, to whom they were given back by mistake, and which counts them."""
    return sum(watch.owners.get(id(connection), watch) is watch for connection in connections)


def _is_the_parents(pool: Any) -> bool:
    """Whether this process was forked and has not used the pool yet, which starts over then."""
    return getattr(pool, "pid", None) not in {None, os.getpid()}


def _limit(pool: Any) -> int | None:
    line = _line(pool)
    most: int = pool.max_connections if line is None else line.maxsize
    return most if most < UNLIMITED else None


def _line(pool: Any) -> Any:
    """The queue of a blocking pool, which holds None for each connection that is not made yet."""
    return None if isinstance(pool, Node) else vars(pool).get("pool")


def _slots(line: Any) -> list[Any]:
    return list(line.queue if hasattr(line, "queue") else line._queue)


def _free(pool: Any) -> list[Any]:
    """Each connection once: one that was released twice lies in a blocking pool twice."""
    return list({id(connection): connection for connection in _lying(pool) if connection is not None}.values())


def _lying(pool: Any) -> list[Any]:
    if isinstance(pool, Node):
        return pool.free
    line = _line(pool)
    return list(pool._available_connections) if line is None else _slots(line)


def _used(pool: Any, leases: Collection[int] = ()) -> list[Any]:
    """The connections that are out; one that was released twice, and lent again, is also among the free."""
    if isinstance(pool, Node) or _line(pool) is not None:
        made = pool.connections if isinstance(pool, Node) else pool._connections
        free = {id(connection) for connection in _free(pool)}.difference(leases)
        return [connection for connection in list(made) if id(connection) not in free]
    out = pool._in_use_connections
    if isinstance(out, WeakSet):  # an asyncio pool after `reset()`; iterating over it runs Python code
        return [connection for ref in list(vars(out)["data"]) if (connection := ref()) is not None]
    return list(out)


def _missing(pool: Any, used: list[Any], free: list[Any]) -> int:
    """Places that are taken and hold nothing: an owner was refused, or a connection could not even be made."""
    line = _line(pool)
    if line is not None:
        made: int = line.maxsize - len(_slots(line))
        return max(made - len(used), 0)
    made = getattr(pool, "_created_connections", len(free) + len(used))
    return max(made - len(free) - len(used), 0)


def _pending(pool: Any, watch: Watch) -> int | None:
    """
    Who stands in line, from the line itself.

    The lists are CPython's own and undocumented; without them the number is
    not told. Who gives a connection back stands in the same asyncio lines, so
    never more are told than ask.
    """
    line = _line(pool)
    if line is not None and hasattr(line, "not_empty"):
        waiters = getattr(line.not_empty, "_waiters", None)
        return None if waiters is None else len(waiters)
    if line is not None:
        return _futures(line, "_getters")
    condition = None if isinstance(pool, Node) else vars(pool).get("_condition")
    lock = None if isinstance(pool, Node) else vars(pool).get("_lock")
    lines = (condition, getattr(condition, "_lock", None), lock)
    return min(sum(_futures(one, "_waiters") or 0 for one in lines), len(watch.waiting))


def _futures(line: Any, name: str) -> int | None:
    """How many still wait in this list of asyncio's; it is None until somebody has."""
    if not hasattr(line, name):
        return None
    return sum(hasattr(one, "done") and not one.done() for one in list(getattr(line, name) or ()))


def _parts(connection: Any) -> tuple[Any, ...]:
    """A connection, and the one inside it if it is one with a client-side cache."""
    inner = getattr(connection, "_conn", None)
    return (connection,) if inner is None else (connection, inner)


def _is_open(connection: Any) -> bool:
    connection = getattr(connection, "_conn", None) or connection
    if hasattr(connection, "_sock"):
        return connection._sock is not None
    return bool(getattr(connection, "is_connected", True))


def idle_sockets(pool: Any, _: Watch) -> Iterable[int | None]:
    """Of the connections that lie in the pool; a client-side cache has the real one inside."""
    return () if _is_the_parents(pool) else (descriptor(_parts(one)[-1]) for one in _free(pool) if _is_open(one))


def members(pool: Any) -> Iterable[tuple[Any, bool]]:
    """The connections a pool has when we first see it, free or out."""
    if _is_the_parents(pool):
        return ()
    parts = [part for connection in (*_used(pool), *_free(pool)) for part in _parts(connection)]
    return [(part, not hasattr(part, "_conn") and _is_open(part)) for part in parts]


def discover(registry: Registry) -> None:
    """Find the pools, and the nodes of asyncio clusters, that were there before us."""
    places = ("connection:ConnectionPool", "asyncio.connection:ConnectionPool", "asyncio.cluster:ClusterNode")
    for thing in existing(*(f"{library}.{place}" for library in LIBRARIES for place in places)):
        registry.sight(thing)


# -- what happens to it ------------------------------------------------------------


def refusal(error: BaseException) -> str | None:
    """By words, as the class is the same as for a lost connection, or has changed between versions."""
    said = str(error)
    if type(error).__name__ == "MaxConnectionsError" or said == "Too many connections":
        return words.EXHAUSTED
    return words.TIMEOUT if said == "No connection available." else None


def empty(pool: Any) -> bool:
    """Whether the queue of a blocking pool has neither a connection nor room for one."""
    return not getattr(pool.pool, "queue", True)


def crowded(pool: Any) -> bool:
    """Whether a blocking asyncio pool has neither a free connection nor room for one."""
    line = _line(pool)
    if line is not None:
        return not getattr(line, "_queue", True)
    return not pool._available_connections and len(pool._in_use_connections) >= pool.max_connections


def locked(pool: Any) -> bool:
    """Whether somebody holds an asyncio pool's lock: from 5.3 to 7.1, for as long as it takes to connect."""
    lock = getattr(pool, "_lock", None)
    return lock is not None and lock.locked()


def undecorated(method: Callable[..., Any]) -> Callable[..., Any]:
    """
    From 5.3 on, `get_connection` warns of arguments; without any, what is inside does the same for 1.3 us less.

    Only redis-py's own decorator is passed by, never somebody else's.
    """
    code = getattr(method, "__code__", None)
    inside = getattr(method, "__wrapped__", None)
    if code is None or inside is None or code.co_name not in {"wrapper", "async_wrapper"}:
        return method
    return inside if _is_from(method, f"{method.__module__.partition('.')[0]}.utils") else method


def _is_from(function: Any, module: str) -> bool:
    """Whether it was written there: what somebody has put around it was not, whatever it calls itself."""
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename.replace("\\", "/").endswith(f"/{module.replace('.', '/')}.py")


def unless_open(kind: str, is_open: Callable[[Any], Any]) -> Row:
    """
    What a checkout calls to have its connection open: from 6.0 on several steps, of which the last looks if it is.

    If so, they come to nothing and are left out, which makes up for what we add to a checkout; unless one of them is
    not the library's own. It comes after the row for the last of them.
    """

    def compile(original: Callable[..., Any], _: Registry) -> Callable[..., Any]:
        owner, name = resolve(f"{kind}.connect")
        if not only_asks(owner):
            raise LookupError(name)
        last, retries = owner.connect_check_health, _retry(owner).call_with_retry

        def is_needless(connection: Any) -> bool:
            try:
                own = type(connection).connect_check_health is last
                return own and type(connection.retry).call_with_retry is retries and bool(is_open(connection))
            except Exception as mistake:
                lost_quietly("a creation", mistake)
                return False

        def connect(connection: Any) -> Any:
            return None if is_needless(connection) else original(connection)

        async def async_connect(connection: Any) -> Any:
            return None if is_needless(connection) else await original(connection)

        return async_connect if inspect.iscoroutinefunction(original) else connect

    return optional(Hook("create", f"{kind}.connect", compile))


def _retry(connection: type[Any]) -> Any:
    """The class whose `call_with_retry` the steps to open one of these go through, from 7.2 on."""
    owner, _ = resolve(f"{connection.__module__.rpartition('.')[0]}.retry:Retry.call_with_retry")
    return owner


def only_asks(connection: type[Any]) -> bool:
    """Whether its `connect` only calls `connect_check_health`, which asks first; all of it the library's own."""
    first, last, retry = vars(connection)["connect"], vars(connection).get("connect_check_health"), _retry(connection)
    inside, module = getattr(last, "__wrapped__", last), connection.__module__  # of our twin
    steps = ((first, module), (inside, module), (retry.call_with_retry, retry.__module__))
    if not all(_is_from(step, place) for step, place in steps):
        return False
    asks = first.__code__.co_names in {("connect_check_health",), ("retry", "call_with_retry")}
    return asks and inside.__code__.co_names[0] in {"_sock", "is_connected"}


def _out(pool: Any, connection: Any) -> bool:
    return any(one is connection for one in _used(pool))


# Who asks a pool for a connection that it keeps for as long as its user likes.
KEEPERS = {
    "client:PubSub.execute_command": words.PUBSUB,
    "cluster:ClusterPubSub.execute_command": words.PUBSUB,
    "asyncio.client:PubSub.connect": words.PUBSUB,
    "client:Pipeline.immediate_execute_command": words.TRANSACTION,
    "asyncio.client:Pipeline.immediate_execute_command": words.TRANSACTION,
    "asyncio.cluster:TransactionStrategy._get_client_and_connection_for_transaction": words.TRANSACTION,
    "client:Redis.__init__": words.RESERVED,
    "client:Valkey.__init__": words.RESERVED,
    "client:Monitor.__init__": words.RESERVED,
    "asyncio.client:Redis.initialize": words.RESERVED,
    "asyncio.client:Valkey.initialize": words.RESERVED,
    "asyncio.client:Monitor.connect": words.RESERVED,
}
# Commands that the server may answer when something has happened, and no sooner.
BLOCKS = ("BLMOVE", "BLMPOP", "BLPOP", "BRPOP", "BRPOPLPUSH", "BZMPOP", "BZPOPMAX", "BZPOPMIN", "XREAD", "XREADGROUP")
BLOCKING = {*BLOCKS, "WAIT", "WAITAOF"}


def purpose(loan: Loan) -> str | None:
    """What a connection is held for, by who asked the pool for it, or by the command under way."""
    kept = next((keepers[loan.by] for keepers in map(_keepers, _loaded()) if loan.by in keepers), None)
    if kept is None and (_blocks(loan.via) or _is_blocked(loan)):
        return words.BLOCKING
    return kept


def _loaded() -> list[str]:
    return [library for library in LIBRARIES if library in sys.modules]


@cache
def _keepers(library: str) -> dict[CodeType | None, str]:
    """Those of this version, by their code."""
    found: dict[CodeType | None, str] = {}
    for place, what in KEEPERS.items():
        with suppress(LookupError, ImportError):
            owner, name = resolve(f"{library}.{place}")
            found[getattr(inspect.unwrap(vars(owner)[name]), "__code__", None)] = what
    found.pop(None, None)
    return found


def _blocks(called: CodeType | None) -> bool:
    return called is not None and called.co_name.upper() in BLOCKING


def _is_blocked(loan: Loan) -> bool:
    """Of an asyncio command only its coroutine is left, and without call sites nothing at all: its holder shows it."""
    for frame in doing(loan):
        name, arguments = frame.f_code.co_name, ()
        if name in {"execute_command", "_execute_command"} and _is_theirs(frame):
            arguments = frame.f_locals.get("args", ())
        if arguments:
            return str(arguments[0]).upper() in BLOCKING
    return False


def _is_theirs(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).startswith(("redis.", "valkey."))


# From the function of redis-py that had a connection closed to why.
CALLERS = {
    "release": "invalidated",  # marked for reconnection, or the owner is another: Sentinel has failed over
    "disconnect_if_needed": "invalidated",
    "_disconnect_and_release": "invalidated",
    "disconnect_free_connections": "invalidated",
    "get_connection": "pre_ping",  # found unfit when it was to be lent
    "ensure_connection": "pre_ping",
    "reset": "reset",
    "close": words.CLOSED,
    "aclose": words.CLOSED,
    "__del__": words.CLOSED,
} | dict.fromkeys(
    (
        "call_with_retry",
        "can_read",
        "can_read_destructive",
        "check_health",
        "connect",
        "connect_check_health",
        "read_response",
        "send_packed_command",
        "_disconnect_raise",
        "_disconnect_reset_raise",
        "_close_connection",
    ),
    "error",
)


def why_closed() -> str:
    """Why `disconnect` was called: who did is known, and only frames of redis-py itself are looked at."""
    frame: FrameType | None = sys._getframe(3)
    while frame is not None and str(frame.f_globals.get("__name__")).startswith(("redis.", "valkey.")):
        name = frame.f_code.co_name
        if name in CALLERS:
            return CALLERS[name]
        if name == "disconnect" and hasattr(frame.f_locals.get("self"), "connection_class"):
            return "dispose"
        frame = frame.f_back
    # An asyncio pool closes its connections in tasks of their own.
    in_task = frame is not None and str(frame.f_globals.get("__name__")).startswith("asyncio.")
    return "dispose" if in_task else words.CLOSED


# What a command of an asyncio cluster has borrowed, until it is through.
_borrowed: ContextVar[list[Any] | None] = ContextVar("otel_pools_borrowed", default=None)


def _lend(connection: Any) -> Any:
    borrowed = _borrowed.get()
    if borrowed is not None:
        borrowed.append(connection)
    return connection


class _Call:
    """A command of an asyncio cluster node that puts the connection back itself, as up to 7.4, and not by a call."""

    verb = "release"

    def __init__(self, where: str) -> None:
        self.where = where

    def install(self, registry: Registry) -> Undo:
        """Wrap it, unless it calls `release`, which has a row of its own."""
        owner, name = resolve(self.where)
        code = getattr(inspect.unwrap(vars(owner)[name]), "__code__", None)
        if code is None or "release" in code.co_names:
            return nothing
        return Hook(self.verb, self.where, self._compile).install(registry)

    def _compile(self, original: Callable[..., Any], registry: Registry) -> Callable[..., Any]:
        async def call(node: Any, *args: Any, **kwargs: Any) -> Any:
            borrowed: list[Any] = []
            _borrowed.set(borrowed)
            try:
                return await original(node, *args, **kwargs)
            finally:
                # Not by its token: the garbage collector may end us in another context.
                _borrowed.set(None)
                for connection in borrowed:
                    _put_back(registry, node, connection)

        return call


def _put_back(registry: Registry, node: Any, connection: Any) -> None:
    """The last thing it has done is to put it back; if not, it never will."""
    try:
        watch = registry.find(node)
        lease = None if watch is None else watch.leases.get(id(connection))
        if watch is None or lease is None:
            return
        if node._free and node._free[-1] is connection:
            watch.ended(connection)
        else:
            watch.kept(connection, lease)
    except Exception as mistake:
        lost_quietly("a checkin", mistake)


# -- beside redis-py's own metrics ---------------------------------------------------

# What redis-py emits itself, from 7.2 on and if it was told to: our metric, and its instruments for it.
NATIVE = {
    words.COUNT.name: ("connection_count_updown", "connection_count"),
    words.CREATE.name: ("connection_create_time",),
    words.WAIT.name: ("connection_wait_time",),
    words.TIMEOUTS.name: ("connection_timeouts",),
}
COLLECTORS = {
    "redis.observability.recorder": "_metrics_collector",
    "redis.asyncio.observability.recorder": "_async_metrics_collector",
}


def _collectors() -> list[Any]:
    """redis-py's own recorders, if it records; without making one, and without asking it, which does."""
    found = (getattr(sys.modules.get(module), name, None) for module, name in COLLECTORS.items())
    return [collector for collector in found if collector is not None]


def withheld(registry: Registry, ledger: Ledger) -> Collection[str]:
    """
    What redis-py emits for these pools itself, if we defer to it.

    It knows no asyncio cluster, measures waits of blocking pools only, and has
    a counter of timeouts that it never uses.
    """
    if registry.settings.native_redis == "both" or ledger.identity.library != "redis" or not _collectors():
        return ()
    pools = [watch.pool() for watch in list(registry.watches.values()) if watch.ledger is ledger]
    names = [name for name in NATIVE if _emitted(name) and name != words.TIMEOUTS.name]
    if any(isinstance(pool, Node) for pool in pools):
        return ()
    if not any("Blocking" in base.__name__ for pool in pools for base in type(pool).__mro__):
        names = [name for name in names if name != words.WAIT.name]
    if names:
        once(
            "native redis",
            "otel_pools: redis-py's own OpenTelemetry metrics are on; %s of its pools are left to it (its counts"
            " drift, see the README; native_redis='replace' lets us emit them instead)",
            ", ".join(names),
        )
    return names


def _emitted(name: str) -> bool:
    return any(getattr(one, attribute, None) is not None for one in _collectors() for attribute in NATIVE[name])


class _Replacement:
    """Takes over from redis-py's own metrics what is ours too, if the user wants that."""

    verb = "replace"
    where = "redis.observability.metrics:RedisMetricsCollector"

    def install(self, registry: Registry) -> Undo:
        """Let its recorder be made without these instruments: it records only those it has."""
        if registry.settings.native_redis != "replace":
            return nothing
        if _collectors():
            logger.warning("otel_pools: redis-py's own metrics have begun already; they are left to it, not replaced")
            return nothing
        undo = [row.install(registry) for row in self._rows()]
        return lambda: void([take_off() for take_off in undo])

    def _rows(self) -> Iterable[Row]:
        for part in ("basic", "advanced"):
            yield optional(Hook(self.verb, f"{self.where}._init_connection_{part}_metrics", _without_ours))


def _without_ours(original: Callable[..., Any], _: Registry) -> Callable[..., Any]:
    def init(collector: Any) -> None:
        original(collector)
        for attributes in NATIVE.values():
            for attribute in attributes:
                vars(collector).pop(attribute, None)

    return init


# -- the table -------------------------------------------------------------------------


def _rows(library: str) -> tuple[Row, ...]:
    """Both libraries have the same; the pools of Sentinel, of a sync cluster and of several databases are these."""
    pool, blocking = f"{library}.connection:ConnectionPool", f"{library}.connection:BlockingConnectionPool"
    aio = f"{library}.asyncio.connection"
    connection, async_connection = f"{library}.connection:AbstractConnection", f"{aio}:AbstractConnection"
    node = f"{library}.asyncio.cluster:ClusterNode"
    sync_open, async_open = attrgetter("_sock"), attrgetter("is_connected")

    def asks(pool: str, line: Callable[[Any], Any] | None) -> Row:
        return acquire(f"{pool}.get_connection", refusal=refusal, crowded=line, bare=undecorated)

    def opens(connection: str, is_open: Callable[[Any], Any]) -> Row:
        # From 6.0 on the first is one attempt, and the second may make several.
        places = (f"{connection}.connect_check_health", f"{connection}.connect")
        return either(*(connect(place, is_open=is_open) for place in places))

    return (
        asks(pool, None),
        asks(blocking, empty),
        asks(f"{aio}:ConnectionPool", locked),
        asks(f"{aio}:BlockingConnectionPool", crowded),
        take_back(f"{pool}.release", out=_out),
        take_back(f"{blocking}.release", out=_out),
        take_back(f"{aio}:ConnectionPool.release", out=_out),
        take_back(f"{aio}:BlockingConnectionPool.release", out=_out),
        make(f"{pool}.make_connection", parts=_parts),
        make(f"{blocking}.make_connection", parts=_parts),
        make(f"{aio}:ConnectionPool.make_connection", parts=_parts),
        optional(make(f"{aio}:BlockingConnectionPool.make_connection", parts=_parts)),  # 5.0.0 alone
        opens(connection, sync_open),
        opens(async_connection, async_open),
        unless_open(connection, sync_open),
        unless_open(async_connection, async_open),
        disconnect(f"{connection}.disconnect", is_open=sync_open, reason=why_closed),
        disconnect(f"{async_connection}.disconnect", is_open=async_open, reason=why_closed),
        acquire(f"{node}.acquire_connection", lease=_lend, refusal=refusal),
        make(f"{node}.acquire_connection", parts=_parts),
        optional(take_back(f"{node}.release", out=_out)),  # from 6.4 on
        _Call(f"{node}.execute_command"),
        _Call(f"{node}.execute_pipeline"),
    )


# Of a connection's arguments, those that are no secret and tell how it behaves.
SAID = (
    "health_check_interval",
    "socket_timeout",
    "socket_connect_timeout",
    "socket_keepalive",
    "retry_on_timeout",
)


def config(pool: Any) -> Mapping[str, Any]:
    """Its own arguments, and those of its connections that were given."""
    known = {"class": type(pool).__name__, "max_connections": pool.max_connections}
    if hasattr(pool, "timeout"):  # of a blocking pool
        known["timeout"] = pool.timeout
    options = pool.connection_kwargs
    return known | {name: options[name] for name in SAID if name in options}


TARGET = Target(
    name="redis",
    identify=identify,
    read=read,
    members=members,
    complete=complete,
    discover=discover,
    anchor=anchor,
    pools_of=pools_of,
    idle_sockets=idle_sockets,
    purpose=purpose,
    withheld=withheld,
    config=config,
    hooks={"redis": (*_rows("redis"), _Replacement()), "valkey": _rows("valkey")},
)
