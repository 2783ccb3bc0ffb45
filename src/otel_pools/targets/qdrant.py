"""qdrant-client: the gRPC channels it shares out its calls over, and whose the HTTP pools are that it opens."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .. import _vocabulary as words
from .._guard import once
from .._hooks import after, before
from .._model import Identity, Snapshot
from .._outbox import PATIENCE
from .._registry import renamed
from .._watch import KeyedRef
from . import Target, _channelz, existing, given_names, httpx

if TYPE_CHECKING:
    from .._registry import Registry
    from .._watch import Ledger, Watch

PLACES = ("qdrant_client.qdrant_remote:QdrantRemote", "qdrant_client.async_qdrant_remote:AsyncQdrantRemote")
# One channel up to 1.15, in sync clients a second one for asyncio; then a list.
CHANNELS = ("_grpc_channel_pool", "_grpc_channel", "_aio_grpc_channel")
LOCAL = ("localhost", "127.0.0.1")
# What the books alone can tell; a renamed row is noticed at import.
(COUNTED,) = (row.name for row in words.EVERY if row.name.endswith(".checkouts"))

_books = _channelz.Books()

# -- who a pool is -----------------------------------------------------------------


class Server:
    """
    What the clients of one Qdrant server have in common, and so the pool.

    gRPC tells channels apart by the server alone, and lets them share one
    connection: neither client nor channel has connections of its own.
    """

    def __init__(self, host: str, port: int) -> None:
        self.host = host
        self.port = port
        self.clients: dict[int, KeyedRef] = {}

    def __repr__(self) -> str:
        return f"<Server {self.target} [{len(self.clients)} clients]>"

    @property
    def target(self) -> str:
        """As in gRPC's books."""
        return f"{self.host}:{self.port}"

    @property
    def channels(self) -> list[Any]:
        """Those its clients have opened; they do at the first call."""
        clients = [client for ref in list(self.clients.values()) if (client := ref()) is not None]
        # One that was closed while we were away keeps its channels, which cannot be asked any more.
        found = (getattr(client, name, None) for client in clients if not client._closed for name in CHANNELS)
        return [channel for one in found if one for channel in (one if isinstance(one, list) else (one,))]

    def join(self, remote: Any) -> None:
        """One more client of this server."""
        self.clients[id(remote)] = KeyedRef(remote, lambda ref: self.leave(ref.key))
        _servers[self.target] = self
        _books.open(self.target)

    def leave(self, key: int) -> None:
        """That client was closed or is gone; the last one takes the pool along."""
        self.clients.pop(key, None)
        if not self.clients and _servers.get(self.target) is self:
            del _servers[self.target]
            _books.close(self.target)


# The only strong references.
_servers: dict[str, Server] = {}


def _after_fork() -> None:
    """The channels are the parent's; to look at them could wait for ever for one of its threads."""
    for known in _servers.values():
        known.clients.clear()  # which know it, so that it would live on until garbage is collected
    _servers.clear()
    _books.begin_anew()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)


def server(remote: Any) -> Server:
    """Where this client's gRPC calls go."""
    known = _servers.get(f"{remote._host}:{remote._grpc_port}") or Server(remote._host, remote._grpc_port)
    if id(remote) not in known.clients and not remote._closed:
        known.join(remote)
    return known


def identify(pool: Server) -> Identity:
    """By the user's name or the server; always with the port, as the HTTP pool of the same client has another."""
    return Identity("qdrant", "qdrant", given_names.get(pool), None, pool.host, pool.port)


def complete(pool: Server) -> bool:
    """A client that has made no call by gRPC has no channel."""
    return bool(pool.channels)


def pools_of(thing: Any) -> Iterable[Any]:
    """The gRPC side of a client, and the HTTP pools under it."""
    remote = getattr(thing, "_client", thing)
    if not hasattr(remote, "_grpc_port") or not hasattr(remote, "openapi_client"):
        raise TypeError(f"neither a client of a server nor its remote: {type(thing).__qualname__}")
    return (server(remote), *_http_pools(remote))


def _http_pools(remote: Any) -> Iterable[Any]:
    """None if the app has given it a transport without one, as in a test."""
    try:
        return httpx.pools_of(remote.openapi_client.client)
    except TypeError:
        return ()


# -- what it says --------------------------------------------------------------------


def read(pool: Server, watch: Watch) -> Snapshot:
    """
    From gRPC's own books: calls that are under way and have no stream stand in line, of which only gRPC knows.

    Books of old write down both alike, so that neither number is told, and
    without any there are the states of the channels alone.
    """
    found = _look_up(pool, watch)
    if found is None:
        return Snapshot(channels=_by_state(map(_channelz.state, pool.channels)))
    streams = _channelz.streams(part for channel in found for part in channel.subchannels)
    running = sum(channel.running for channel in found)
    # A call of asyncio that has failed has its stream for as long as somebody keeps its error.
    in_use = min(sum(streams), running)
    busy = min(sum(map(bool, streams)), in_use)
    seen = Snapshot(
        used=busy,
        idle=len(streams) - busy,
        channels=_by_state(channel.state for channel in found),
    )
    if not _channelz.QUEUES:
        return seen
    waiting = running - in_use
    # Without a connection it is that what they wait for.
    return replace(seen, pending=waiting, streams=in_use, streams_pending=waiting if streams else 0)


def _look_up(pool: Server, watch: Watch) -> list[_channelz.Channel] | None:
    """The pool's channels, whose calls are counted by the way; None if gRPC keeps no books."""
    # A signal handler cannot wait for the reading that it has interrupted.
    if not _books.lock.acquire(timeout=PATIENCE):
        return None
    try:
        page = _books.page(pool.target)
        if page is None:
            return None
        found = list(_channelz.channels(page))
        well, ill = page.ended(found)
    finally:
        _books.lock.release()
    _count(watch, well, ill)
    return found


def _count(watch: Watch, well: int, ill: int) -> None:
    """Calls that have ended; of those that did not end well gRPC does not keep why."""
    watch.ledger.outbox.counted(None, well)
    if ill:
        watch.ledger.outbox.counted(words.OTHER, ill)


def _by_state(states: Iterable[str]) -> dict[str, int]:
    """All of them: a state in which there is nothing any more has to say so."""
    counts = Counter(states)
    return {state.lower(): counts[state] for state in _channelz.STATES}


def withheld(registry: Registry, ledger: Ledger) -> Collection[str]:
    """What nobody can see from outside, so that a zero would be a guess."""
    unseen = (
        words.TIMEOUTS,
        words.PEAK,
        words.CREATED,
        words.OVERDUE_NOW,
        words.LEAKED,
        words.INHERITED_USE,
        words.NESTED_CHECKOUTS,
        words.OLDEST_WAIT,
        words.OLDEST_USE,
    )
    names = [row.name for row in unseen]
    return names if _channelz.OPEN else [*names, COUNTED]


# -- what happens to it ------------------------------------------------------------


def opened(registry: Registry, remote: Any) -> None:
    """A client was made: its gRPC side is a pool, and its HTTP pools are Qdrant's."""
    registry.sight(server(remote))
    for pool in _http_pools(remote):
        httpx.own(pool, Identity("qdrant", "qdrant", None, None, remote._host, remote._port))
        renamed(pool)
        if remote._host in LOCAL and pool._max_keepalive_connections == 0:
            once(
                "qdrant localhost",
                "otel_pools: qdrant-client keeps no HTTP connection to %s open, each call makes one of its own;"
                " QdrantClient(limits=httpx.Limits(...)) changes that",
                remote._host,
                level=logging.INFO,
            )


def closes(registry: Registry, remote: Any) -> None:
    """
    A client is being closed: its last calls are counted, as gRPC strikes it off its books.

    It may be the garbage collector who closes it, anywhere: here nobody waits
    for a lock, and in the midst of a reading the client is left to that.
    Closed again, as the client does when it is collected, it has no more calls.
    """
    pool = server(remote)
    watch = registry.find(pool) if id(remote) in pool.clients and complete(pool) else None
    if watch is not None and _books.lock.acquire(blocking=False):
        try:
            if (ended := _last_words(pool)) is not None:
                _count(watch, *ended)
        finally:
            _books.lock.release()
    pool.leave(id(remote))


def _last_words(pool: Server) -> tuple[int, int] | None:
    """What has ended by now, and with the pool's last client what is cut off; another's is told when it is gone."""
    page = _books.page(pool.target)
    if page is None:
        return None
    found = list(_channelz.channels(page))
    well, ill = page.ended(found)
    if len(pool.clients) == 1:
        ill += sum(channel.running for channel in found)
    else:
        page.cut.update((channel.id, channel.running) for channel in found)
    return well, ill


def discover(registry: Registry) -> None:
    """Find the clients that were there before us; what they have called by now is not ours to count."""
    for remote in existing(*PLACES):
        if not getattr(remote, "_closed", True):
            opened(registry, remote)
    with _books.lock:
        for target in list(_servers):
            page = _books.page(target)
            if page is not None:
                page.ended(list(_channelz.channels(page)))


def config(pool: Server) -> Mapping[str, Any]:
    """The arguments of its first client, and whether the server is on this machine."""
    client = next((client for ref in list(pool.clients.values()) if (client := ref()) is not None), None)
    return {
        "class": "QdrantRemote" if client is None else type(client).__name__,
        "localhost": pool.host in LOCAL,
        "prefer_grpc": getattr(client, "_prefer_grpc", None),
        "pool_size": getattr(client, "_pool_size", None),
        "channels": len(pool.channels),
    }


TARGET = Target(
    name="qdrant",
    identify=identify,
    read=read,
    complete=complete,
    discover=discover,
    pools_of=pools_of,
    withheld=withheld,
    config=config,
    hooks={
        "qdrant_client": tuple(
            row
            for place in PLACES
            for row in (
                after(f"{place}.__init__", do=lambda registry, remote, *_, **__: opened(registry, remote)),
                before(f"{place}.close", do=closes),
            )
        )
    },
)
