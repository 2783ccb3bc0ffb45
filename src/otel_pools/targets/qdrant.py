"""qdrant-client: the gRPC channels it shares out its calls over, and whose the HTTP pools are that it opens."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

from .. import _vocabulary as words
from .._guard import once
from .._hooks import after, before
from .._model import Identity, Snapshot
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
        found = (getattr(client, name, None) for client in clients for name in CHANNELS)
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
    return (server(remote), *httpx.pools_of(remote.openapi_client.client))


# -- what it says --------------------------------------------------------------------


def read(pool: Server, watch: Watch) -> Snapshot:
    """
    From gRPC's own books: calls that are under way and have no stream stand in line, of which only gRPC knows.

    Without the books there are the states of the channels alone.
    """
    found = _look_up(pool, watch)
    if found is None:
        return Snapshot(channels=_by_state(map(_channelz.state, pool.channels)))
    streams = _channelz.streams(part for channel in found for part in channel.subchannels)
    waiting = max(sum(channel.running for channel in found) - sum(streams), 0)
    busy = sum(map(bool, streams))
    return Snapshot(
        used=busy,
        idle=len(streams) - busy,
        pending=waiting,
        streams=sum(streams),
        # Without a connection it is that what they wait for.
        streams_pending=waiting if streams else 0,
        channels=_by_state(channel.state for channel in found),
    )


def _look_up(pool: Server, watch: Watch) -> list[_channelz.Channel] | None:
    """The pool's channels, whose calls are counted by the way; None if gRPC keeps no books."""
    with _books.lock:
        page = _books.page(pool.target)
        if page is None:
            return None
        found = list(_channelz.channels(page))
        _count(page, found, watch)
    return found


def _count(page: _channelz.Page, found: Iterable[_channelz.Channel], watch: Watch) -> None:
    """Calls that have ended; of those that did not end well gRPC does not keep why."""
    watch.ledger.outbox.counted(None, 0)
    for channel in found:
        well, ill = page.news(channel)
        watch.ledger.outbox.counted(None, well)
        if ill:
            watch.ledger.outbox.counted(words.OTHER, ill)


def _by_state(states: Iterable[str]) -> dict[str, int]:
    """All of them: a state in which there is nothing any more has to say so."""
    counts = Counter(states)
    return {state.lower(): counts[state] for state in _channelz.STATES}


def withheld(registry: Registry, ledger: Ledger) -> Collection[str]:
    """What nobody can see from outside, so that a zero would be a guess."""
    unseen = (words.TIMEOUTS, words.PEAK, words.CREATED, words.OLDEST_WAIT, words.OLDEST_USE)
    return [row.name for row in unseen]


# -- what happens to it ------------------------------------------------------------


def opened(registry: Registry, remote: Any) -> None:
    """A client was made: its gRPC side is a pool, and its HTTP pools are Qdrant's."""
    registry.sight(server(remote))
    for pool in httpx.pools_of(remote.openapi_client.client):
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
    """A client is being closed: its last calls are counted, as gRPC strikes it off its books."""
    pool = server(remote)
    watch = registry.find(pool) if complete(pool) else None
    if watch is not None:
        _look_up(pool, watch)
    pool.leave(id(remote))


def discover(registry: Registry) -> None:
    """Find the clients that were there before us."""
    for remote in existing(*PLACES):
        if not getattr(remote, "_closed", True):
            opened(registry, remote)


TARGET = Target(
    name="qdrant",
    identify=identify,
    read=read,
    complete=complete,
    discover=discover,
    pools_of=pools_of,
    withheld=withheld,
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
