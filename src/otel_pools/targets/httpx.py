"""httpx and httpx2, by the pools of httpcore and httpcore2 under them: sync and asyncio, proxies, HTTP/2."""

from __future__ import annotations

import ssl
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from .. import _vocabulary as words
from .._hooks import Row, either, make, optional
from .._model import Identity, Load, Origin, Snapshot
from .._visits import dial, drop, leave, visit, visit_of, wait
from . import Target, existing, given_names, itself

if TYPE_CHECKING:
    from .._registry import Registry
    from .._watch import Watch

LIBRARIES = ("httpcore", "httpcore2")
KINDS = ("ConnectionPool", "AsyncConnectionPool")
PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}

# -- who a pool is -----------------------------------------------------------------

_origins: WeakKeyDictionary[Any, Origin] = WeakKeyDictionary()
# Of those that another library uses to speak to its server.
_owned: WeakKeyDictionary[Any, Identity] = WeakKeyDictionary()


def own(pool: Any, identity: Identity) -> None:
    """Let *pool* be that of another library's client, whatever it carries."""
    _owned[pool] = identity


def identify(pool: Any) -> Identity:
    """By the user's name, by its owner, or by where its first request went; a pool itself knows none of them."""
    given, socket = given_names.get(pool), getattr(pool, "_uds", None)
    if pool in _owned:
        return replace(_owned[pool], given=given)
    if socket is not None:
        return Identity("httpx", None, given, None, str(socket))
    origin = _origins.get(pool) or next(iter(_seen(pool)), None)
    if origin is None:
        return Identity("httpx", None, given)
    port = None if origin.port == PORTS.get(origin.scheme) else origin.port
    return Identity("httpx", None, given, None, origin.address, port)


def introduce(pool: Any, request: Any) -> None:
    """Remember where the first request goes."""
    _origins.setdefault(pool, _origin(request.url.origin))


def _seen(pool: Any) -> Iterator[Origin]:
    """Where the connections go that it has already."""
    return (_where(connection) for connection in list(pool.connections))


def _origin(origin: Any) -> Origin:
    return _decoded(origin.scheme, origin.host, origin.port)


@lru_cache(1024)
def _decoded(scheme: bytes, host: bytes, port: int | None) -> Origin:
    name = scheme.decode("ascii", "replace")
    return Origin(name, host.decode("ascii", "replace"), port or PORTS.get(name, 0))


def _where(connection: Any) -> Origin:
    """The origin that a connection serves, behind a proxy if there is one; it remembers it, as it serves no other."""
    try:
        known: Origin = connection._otel_pools_origin
    except AttributeError:
        origin = getattr(connection, "_remote_origin", None) or getattr(connection, "_origin", None)
        known = connection._otel_pools_origin = _origin(connection._proxy_origin if origin is None else origin)
    return known


def complete(pool: Any) -> bool:
    """A pool that has carried nothing is called after nothing, and its limits are no news."""
    return pool in _origins or bool(pool.connections)


def pools_of(thing: Any) -> Iterable[Any]:
    """The pools of a client, its own and those of its mounts, behind whatever is wrapped around its transports."""
    found = list(_walk(thing, 5, set()))
    if not found:
        raise TypeError(f"neither a client nor a pool: {type(thing).__qualname__}")
    return found


def _walk(thing: Any, depth: int, seen: set[int]) -> Iterator[Any]:
    """What carries requests carries them on to what does, down to what makes connections."""
    if id(thing) in seen or depth < 0:
        return
    seen.add(id(thing))
    if _carries(thing) and hasattr(type(thing), "create_connection"):
        yield thing
        return
    for value in list(getattr(thing, "__dict__", {}).values()):
        for part in list(value.values()) if isinstance(value, dict) else (value,):
            if _carries(part) or _is_client(part):
                yield from _walk(part, depth - 1, seen)


def _carries(thing: Any) -> bool:
    return hasattr(type(thing), "handle_request") or hasattr(type(thing), "handle_async_request")


def _is_client(thing: Any) -> bool:
    """An httpx client in the hands of another library's."""
    return hasattr(type(thing), "build_request") and "_transport" in getattr(thing, "__dict__", ())


# -- what it says --------------------------------------------------------------------


def read(pool: Any, _: Watch) -> Snapshot:
    """
    Counted from copies of its lists, without its lock; connections first, as they are there before their requests.

    `has_expired` is not asked: it polls the socket.
    """
    connections = list(pool.connections)
    requests = [one for one in list(pool._requests) if not _has_left(one)]
    served = [connection for one in requests if (connection := one.connection) is not None]
    requested = Counter(map(id, served))
    idle, active = _by_state(connections)
    streams, waiting, most = _streams(pool, chain(idle, active), requested)
    return Snapshot(
        used=len(active),
        idle=len(idle),
        max=_limit(pool._max_connections),
        idle_max=_limit(pool._max_keepalive_connections),
        pending=len(requests) - len(served),
        orphaned=sum([id(connection) not in requested for connection in active]),
        streams=streams,
        streams_pending=waiting,
        streams_max=most,
        origins=_by_origin(active, idle, served),
    )


def _by_state(connections: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    """Those that are idle, and those in use; a closed one is neither."""
    idle: list[Any] = []
    active: list[Any] = []
    for connection in connections:
        if not connection.is_closed():
            (idle if connection.is_idle() else active).append(connection)
    return idle, active


def _has_left(one: Any) -> bool:
    """Whether a request is over, though its pool holds on to it: as when its close was cancelled."""
    visit = visit_of(one.request)
    return visit is not None and visit.has_left()


def leases(pool: Any, _: Watch) -> Iterable[int]:
    """The visits of its requests."""
    return [id(visit) for one in list(pool._requests) if (visit := visit_of(one.request)) is not None]


def _limit(most: int) -> int | None:
    return None if most >= sys.maxsize else most


def _inner(connection: Any) -> Any:
    """What speaks the protocol, once there is one; each layer above only asks the next."""
    while (below := getattr(connection, "_connection", None)) is not None:
        connection = below
    return connection


def _streams(pool: Any, open: Iterable[Any], requested: Counter[int]) -> tuple[int | None, ...]:
    """Streams in use, requests that wait for one, and how many there may be, over the HTTP/2 connections."""
    if not getattr(pool, "_http2", False):
        return None, None, None
    multiplexed = [(one, inner) for one in open if hasattr(inner := _inner(one), "_events")]
    used = [len(inner._events) for _, inner in multiplexed]
    waiting = [max(requested[id(one)] - busy, 0) for (one, _), busy in zip(multiplexed, used, strict=True)]
    # It has no limit before its first request.
    return sum(used), sum(waiting), sum(getattr(inner, "_max_streams", 0) for _, inner in multiplexed)


def _by_origin(active: Iterable[Any], idle: Iterable[Any], served: Iterable[Any]) -> dict[Origin, Load]:
    busy, resting, under_way = (Counter([_where(one) for one in those]) for those in (active, idle, served))
    return {origin: Load(busy[origin], resting[origin], under_way[origin]) for origin in {*busy, *resting, *under_way}}


def members(pool: Any) -> Iterable[tuple[Any, bool]]:
    """The connections a pool has when we first see it, and whether they are open."""
    found = [(connection, _inner(connection)) for connection in list(pool.connections)]
    return [(connection, established(connection) and not inner.is_closed()) for connection, inner in found]


def discover(registry: Registry) -> None:
    """Find the pools that were there before us and have connections."""
    for thing in existing(*(f"{library}:{kind}" for library in LIBRARIES for kind in KINDS)):
        registry.sight(thing)


# -- what happens to it ------------------------------------------------------------


def established(connection: Any) -> bool:
    """Whether there is a protocol spoken on it, or was; in a tunnel, not just with the proxy."""
    if not getattr(connection, "_connected", True):
        return False
    inner = _inner(connection)
    return hasattr(inner, "_state") or hasattr(inner, "_events")


def refusal(error: BaseException) -> str | None:
    """There is a class for each way to get no connection."""
    name = type(error).__name__
    if name == "PoolTimeout":
        return words.TIMEOUT
    # The asyncio backend of httpcore 0.17 lets the last one through as it comes.
    connects = name in {"ConnectError", "ConnectTimeout", "ProxyError"} or isinstance(error, ssl.SSLError)
    return words.CONNECT_ERROR if connects else None


def why_ended(connection: Any) -> str | None:
    """
    Why a connection was closed at the end of an answer, or before it could be used; None if it is open.

    Of HTTP/1.1 the protocol's own state says how far the server had come.
    """
    if not connection.is_closed():
        return None
    inner = _inner(connection)
    if getattr(inner, "_connection_terminated", None):
        return words.GOAWAY
    theirs = repr(getattr(getattr(inner, "_h11_state", None), "their_state", None))
    if theirs == "SEND_BODY":  # it had more to say: we did not want it, or could not have it
        error = sys.exc_info()[0]
        return words.CLOSED if error is None or issubclass(error, GeneratorExit) else words.FAILED
    return {"ERROR": words.FAILED, "IDLE": words.EVICTED, "DONE": words.EVICTED}.get(theirs, words.SERVER)


def why_dropped(connection: Any) -> str:
    """
    Why the pool closes it.

    Either the whole pool is closed; or it was idle for too long; or the
    server has closed it, which shows when its socket has something to read;
    or it has to make room.
    """
    caller = sys._getframe(4)  # of `_close_connections`: the pool, or the body of an answer
    if caller.f_code.co_name in {"close", "aclose"} and hasattr(caller.f_locals.get("self"), "create_connection"):
        return words.DISPOSE
    inner = _inner(connection)
    expiry = getattr(inner, "_expire_at", None)
    if expiry is not None and time.monotonic() > expiry:
        return words.IDLED
    stream = getattr(inner, "_network_stream", None)
    readable = stream is not None and stream.get_extra_info("is_readable")
    return words.SERVER if readable else words.EVICTED


def only_closes(method: Any) -> bool:
    """Whether `_close_connections` closes what it is given, shielded from cancellation, and nothing else."""
    names = getattr(getattr(method, "__code__", None), "co_names", ())
    return names in {("ShieldCancellation", "close"), ("AsyncShieldCancellation", "aclose")}


# -- the table -------------------------------------------------------------------------


def _rows(library: str) -> tuple[Row, ...]:
    return (
        *_flavour(library, "_sync", "", "handle_request", "close"),
        *_flavour(library, "_async", "Async", "handle_async_request", "aclose"),
    )


def _flavour(library: str, package: str, prefix: str, handle: str, close: str) -> Iterable[Row]:
    room = f"{library}.{package}"
    pools = f"{room}.connection_pool"
    pool = f"{pools}:{prefix}ConnectionPool"
    yield visit(f"{pool}.{handle}", introduce=introduce, established=established, refusal=refusal, ended=why_ended)
    yield either(
        wait(f"{pools}:{prefix}PoolRequest.wait_for_connection", ended=why_ended),
        wait(f"{pools}:RequestStatus.wait_for_connection", ended=why_ended),  # up to 1.0.2
    )
    yield either(
        leave(f"{pools}:PoolByteStream.{close}", request=attrgetter("_pool_request.request"), ended=why_ended),
        leave(f"{pools}:ConnectionPoolByteStream.{close}", request=attrgetter("_status.request"), ended=why_ended),
    )
    yield make(f"{pool}.create_connection", parts=itself)
    # Proxies are pools of their own making.
    yield optional(make(f"{room}.http_proxy:{prefix}HTTPProxy.create_connection", parts=itself))
    yield optional(make(f"{room}.socks_proxy:{prefix}SOCKSProxy.create_connection", parts=itself))
    yield dial(f"{room}.connection:{prefix}HTTPConnection._connect")
    yield optional(drop(f"{pool}._close_connections", reason=why_dropped, idles=only_closes))  # from 1.0.3 on


def config(pool: Any) -> Mapping[str, Any]:
    """The arguments it was made with; None where it has no limit."""
    return {
        "class": type(pool).__name__,
        "max_connections": _limit(pool._max_connections),
        "max_keepalive_connections": _limit(pool._max_keepalive_connections),
        "keepalive_expiry": pool._keepalive_expiry,
        "http1": pool._http1,
        "http2": pool._http2,
        "retries": pool._retries,
    }


TARGET = Target(
    name="httpx",
    identify=identify,
    read=read,
    complete=complete,
    discover=discover,
    pools_of=pools_of,
    leases=leases,
    members=members,
    config=config,
    hooks={library: _rows(library) for library in LIBRARIES},
)
