"""What gRPC writes in its own books, channelz, of the channels to one server; reading them asks no server anything."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from .._guard import once

try:
    # Compiled in and on by default since long; the public package grpcio-channelz calls these same functions.
    from grpc import __version__ as version  # type: ignore[import-untyped,unused-ignore]  # no types either
    from grpc._cython import cygrpc  # type: ignore[import-untyped,unused-ignore]  # private, and without types
except ImportError:
    cygrpc, version = None, "0.0"

VERSION = tuple(int(part) for part in version.split(".")[:2])
# Up to 1.49 gRPC dies, and the process with it, if a channel goes while its books are read (seen on 1.42, 1.48, 1.49).
OLDEST = (1, 50)
OPEN = hasattr(cygrpc, "channelz_get_top_channels") and VERSION >= OLDEST
# Up to 1.82 a call that waits for a stream is written down as one that has it (seen on 1.50 to 1.82, not from 1.83 on).
QUEUES = OPEN and VERSION >= (1, 83)

# A channel takes about 0.3 ms to look up, in which no other thread runs: of more than these nothing is said.
MOST = 32
STATES = ("IDLE", "CONNECTING", "READY", "TRANSIENT_FAILURE", "SHUTDOWN")


@dataclass(frozen=True, slots=True)
class Channel:
    """
    One gRPC channel as the books have it.

    Attributes:
        state: Of `STATES`; a channel that was never used is idle.
        succeeded: Calls that ended well.
        failed: Calls that ended otherwise: refused, cancelled, too late.
        running: Calls that were begun and have not ended.
        subchannels: Where its connections are; channels of equal target and options share them.
    """

    id: int
    state: str
    succeeded: int
    failed: int
    running: int
    subchannels: tuple[int, ...]


@dataclass
class Page:
    """
    The channels to one server that we know of.

    Attributes:
        target: As gRPC writes it, without its scheme.
        channels: Their ids; each is found once, as it is new.
        told: Of each, how many of its calls were counted by now: well ended, otherwise ended.
        cut: Of each, how many were under way when a client was last closed: if it was the channel's, they were cut off.
    """

    target: str
    channels: list[int] = field(default_factory=list)
    told: dict[int, tuple[int, int]] = field(default_factory=dict)
    cut: dict[int, int] = field(default_factory=dict)

    def ended(self, found: Iterable[Channel]) -> tuple[int, int]:
        """The calls that ended since this was last asked, well and otherwise; the books only ever count on."""
        news = [self._news(channel) for channel in found]
        cut = sum(self.cut.pop(id) for id in [*self.cut] if id not in self.told)
        self.cut.clear()
        return sum(well for well, _ in news), sum(ill for _, ill in news) + cut

    def _news(self, channel: Channel) -> tuple[int, int]:
        well, ill = self.told.get(channel.id, (0, 0))
        self.told[channel.id] = channel.succeeded, channel.failed
        return max(channel.succeeded - well, 0), max(channel.failed - ill, 0)

    def close(self, id: int) -> None:
        """That channel is gone."""
        self.channels.remove(id)
        self.told.pop(id, None)


class Books:
    """
    All pages that somebody asks for.

    The list of a process's channels is long where an app makes many, and who
    reads it keeps every other thread from running: so it is read on from where
    the last reading ended, at most one hundred at a time.
    """

    def __init__(self) -> None:
        self._pages: dict[str, Page] = {}
        self._next = 0
        self.begin_anew()

    def __repr__(self) -> str:
        return f"<Books of {len(self._pages)} servers, read up to channel {self._next}>"

    def begin_anew(self) -> None:
        """As in a forked child, where the lock may be held for ever, and the channels are its parent's."""
        self.lock = Lock()  # for readers, of which none is a finaliser
        self._pages.clear()

    def open(self, target: str) -> None:
        """Look for channels to this server from now on."""
        self._pages.setdefault(target, Page(target))

    def close(self, target: str) -> None:
        """Nobody asks for this server any more."""
        self._pages.pop(target, None)

    def page(self, target: str) -> Page | None:
        """What is known of this server's channels, brought up to date; None if the books are closed to us."""
        if not OPEN:
            return None
        for channel in json.loads(cygrpc.channelz_get_top_channels(self._next)).get("channel", ()):
            id = int(channel["ref"]["channelId"])
            self._next = id + 1
            page = self._pages.get(_address(channel.get("data", {}).get("target", "")))
            if page is not None:
                page.channels.append(id)
        return self._pages.get(target)


def _address(target: str) -> str:
    """``host:port`` of ``dns:///host:port``, as newer versions write it."""
    return target.rpartition("/")[2]


def channels(page: Page) -> Iterator[Channel]:
    """The channels of a page that are still there, the first of them if they are many."""
    if len(page.channels) > MOST:
        once("channels", "otel_pools: more than %d gRPC channels to one server; the others go unseen", MOST)
    for id in page.channels[:MOST]:
        entry = _entry(cygrpc.channelz_get_channel, id, "channel")
        if entry is None:
            page.close(id)
        else:
            yield _channel(id, entry)


def _channel(id: int, entry: dict[str, Any]) -> Channel:
    data = entry["data"]
    begun, succeeded, failed = (int(data.get(key, 0)) for key in ("callsStarted", "callsSucceeded", "callsFailed"))
    parts = tuple(int(ref["subchannelId"]) for ref in entry.get("subchannelRef", ()))
    state = data.get("state", {}).get("state", STATES[0])
    # The three are counted one after the other.
    return Channel(id, state, succeeded, failed, max(begun - succeeded - failed, 0), parts)


def streams(subchannels: Iterable[int]) -> list[int]:
    """
    How many streams are in use on each open connection of these.

    One of an ended call may still be among them, and unless the books tell
    `QUEUES`, so are calls that wait for one.
    """
    found = (_entry(cygrpc.channelz_get_subchannel, id, "subchannel") or {} for id in set(subchannels))
    sockets = {int(ref["socketId"]) for subchannel in found for ref in subchannel.get("socketRef", ())}
    entries = (_entry(cygrpc.channelz_get_socket, id, "socket") for id in sockets)
    return [_in_use(entry["data"]) for entry in entries if entry is not None]


def _in_use(data: dict[str, Any]) -> int:
    begun, succeeded, failed = (
        int(data.get(key, 0)) for key in ("streamsStarted", "streamsSucceeded", "streamsFailed")
    )
    return max(begun - succeeded - failed, 0)


def _entry(ask: Callable[[int], str | bytes], id: int, kind: str) -> dict[str, Any] | None:
    try:
        entry: dict[str, Any] = json.loads(ask(id))[kind]
    except ValueError:  # it was closed meanwhile
        return None
    return entry


def state(channel: Any) -> str:
    """The state of one channel's connectivity as it says itself, for when there are no books."""
    while not hasattr(channel, "check_connectivity_state"):
        channel = channel._channel  # interceptors around it, and then the compiled one inside
    return STATES[channel.check_connectivity_state(False)]
