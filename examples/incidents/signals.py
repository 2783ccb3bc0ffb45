"""What names each incident: one small question per incident, of one pool's metrics before and after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lab import LEAK_THRESHOLD, Evidence, Point, only, pools

KEYS = {
    "error": "error.type",
    "http_state": "http.connection.state",
    "kind": "otel_pools.leak.kind",
    "path": "otel_pools.checkout.path",
    "reason": "otel_pools.close.reason",
    "state": "db.client.connection.state",
    "stream": "otel_pools.stream.state",
}
ON_PURPOSE = {"pub/sub", "blocking", "reserved"}

# What is worth a word at all: seconds that one thing takes, and all of them together, and how many.
LONG, MUCH, SOME = 0.1, 0.5, 10


@dataclass(frozen=True)
class Pool:
    """One pool's part of the evidence, and what can be asked of it."""

    seen: Evidence

    # -- the words in which signals are written ------------------------------------

    def now(self, metric: str, **where: str | None) -> float:
        """The value after; None as an attribute means without it."""
        return sum(point.value for point in self._points(self.seen.after, metric, where))

    def gained(self, metric: str, **where: str | None) -> float:
        """What a counter, or the number of a histogram's samples, has grown by."""
        before, after = (self._points(points, metric, where) for points in (self.seen.before, self.seen.after))
        return sum(point.value for point in after) - sum(point.value for point in before)

    def seconds(self, metric: str, **where: str | None) -> float:
        """What the sum of a histogram has grown by."""
        before, after = (self._points(points, metric, where) for points in (self.seen.before, self.seen.after))
        return sum(point.total for point in after) - sum(point.total for point in before)

    def mean(self, metric: str, **where: str | None) -> float:
        """The mean of a histogram's new samples; 0 if there are none."""
        number = self.gained(metric, **where)
        return self.seconds(metric, **where) / number if number else 0.0

    def above(self, metric: str, bound: float, **where: str | None) -> float:
        """How many of a histogram's new samples are above this bound of a bucket."""
        before, after = (self._points(points, metric, where) for points in (self.seen.before, self.seen.after))
        return _above(after, bound) - _above(before, bound)

    def has(self, metric: str) -> bool:
        """Whether the pool has such a metric at all."""
        return any(point.metric == metric for point in self.seen.after)

    @staticmethod
    def _points(points: tuple[Point, ...], metric: str, where: dict[str, str | None]) -> list[Point]:
        wanted = {KEYS[key]: value for key, value in where.items()}
        return [
            point
            for point in points
            if point.metric == metric and all(point.attributes.get(key) == value for key, value in wanted.items())
        ]

    # -- what several of them ask ------------------------------------------------------

    @property
    def is_http(self) -> bool:
        """Whether it is the pool of an HTTP client; those have other names for the same."""
        return self.has("http.client.open_connections")

    @property
    def wait_time(self) -> str:
        """The name of its histogram of waits."""
        return "http.client.request.time_in_queue" if self.is_http else "db.client.connection.wait_time"

    @property
    def prefix(self) -> str:
        """The beginning of the names of what conventions have for databases only."""
        return "otel_pools" if self.is_http else "db.client"

    @property
    def pending(self) -> float:
        """How many wait for a connection."""
        return self.now(f"{self.prefix}.connection.pending_requests")

    @property
    def used(self) -> float:
        """How many connections are in use."""
        if self.is_http:
            return self.now("http.client.open_connections", http_state="active")
        return self.now("db.client.connection.count", state="used")

    @property
    def is_full(self) -> bool:
        """Whether all connections that may be are in use."""
        return 0 < self.now(f"{self.prefix}.connection.max") <= self.used

    @property
    def open(self) -> float:
        """How many connections are open (of databases)."""
        return self.now("db.client.connection.count")

    @property
    def gave_up(self) -> float:
        """How many waited in vain."""
        return self.gained("otel_pools.checkouts", error="timeout")

    @property
    def hold(self) -> float:
        """For how long a connection is held: those that were given back, and the oldest that was not."""
        return max(self.now("otel_pools.use.oldest"), self.mean("db.client.connection.use_time"))

    @property
    def broken(self) -> float:
        """How many connections were closed because they did not work any more."""
        reasons = ("error", "invalidated", "pre_ping", "server")
        return sum(self.gained("otel_pools.connection.closed", reason=reason) for reason in reasons)

    @property
    def on_purpose(self) -> bool:
        """Whether all who held a connection when a wait failed did so on purpose, as its span says."""
        kinds = {holder.get("otel_pools.holder.kind") for wait in self.seen.waits for holder in wait.holders}
        return bool(kinds) and kinds <= ON_PURPOSE

    @property
    def is_leaking(self) -> bool:
        """Whether connections or places of the pool have been lost, or are held for too long."""
        return bool(
            self.now("otel_pools.connection.overdue")
            or self.now("otel_pools.connection.orphaned")
            or self.gained("otel_pools.connection.leaked")
        )


def _above(points: list[Point], bound: float) -> float:
    return sum(count for point in points for upper, count in point.buckets if upper > bound)


# -- the signals ------------------------------------------------------------------------------


def slow_holders(pool: Pool) -> bool:
    """Full, and requests give up while each connection is held for longer than they are ready to wait."""
    in_vain = pool.mean(pool.wait_time, error="timeout")
    nobody_else = not (pool.gained("otel_pools.checkout.nested") or pool.is_leaking or pool.on_purpose)
    return pool.is_full and pool.gave_up > 0 and pool.hold > in_vain and nobody_else


def leak(pool: Pool) -> bool:
    """A connection to a database has been out for longer than the leak threshold, and still is."""
    overdue = pool.gained("otel_pools.connection.leaked", kind="overdue") and pool.now("otel_pools.connection.overdue")
    return bool(overdue) and not pool.is_http


def dropped(pool: Pool) -> bool:
    """The garbage collector gave back what its owner had dropped."""
    return pool.gained("otel_pools.connection.leaked", kind="collected") > 0


def lost_slots(pool: Pool) -> bool:
    """Places in the pool are occupied and owned by nobody."""
    return pool.now("otel_pools.connection.orphaned") > 0


def nested_checkout(pool: Pool) -> bool:
    """Full, and those who hold the connections are the ones who wait for more."""
    return pool.gained("otel_pools.checkout.nested") > 0 and pool.is_full and pool.pending > 0


def idle_in_transaction(pool: Pool) -> bool:
    """Connections are held for long and given back, and of that time the database worked less than a tenth."""
    held = pool.seconds("db.client.connection.use_time")
    if not pool.has("otel_pools.connection.busy_time") or held < MUCH or pool.is_leaking:
        return False
    is_long = pool.mean("db.client.connection.use_time") > LONG
    return is_long and pool.gained("otel_pools.connection.busy_time") < held / 10


def recycle_herd(pool: Pool) -> bool:
    """Every connection that was open was closed for its age and opened anew between two exports."""
    open_before = sum(p.value for p in pool.seen.before if p.metric == "db.client.connection.count")
    recycled = pool.gained("otel_pools.connection.closed", reason="recycle")
    return recycled > 1 and recycled >= open_before and pool.gained("otel_pools.connection.created") >= recycled


def fork_sharing(pool: Pool) -> bool:
    """A process uses connections that another one opened."""
    return pool.gained("otel_pools.connection.inherited") > 0


def server_restart(pool: Pool) -> bool:
    """Connections were found broken, and no new ones could be made."""
    return pool.broken > 0 and pool.gained("otel_pools.checkouts", error="connect_error") > 0


def pool_too_small(pool: Pool) -> bool:
    """Most requests queue, for longer than anybody holds a connection: the work is short and the pool is small."""
    queued = pool.gained(pool.wait_time, path="queued")
    is_common = queued > SOME and queued > pool.gained(pool.wait_time) / 2
    use = pool.mean("db.client.connection.use_time")  # what came back: who still holds may just be out of luck
    return is_common and pool.mean(pool.wait_time, path="queued") > 2 * use > 0


def server_limit(pool: Pool) -> bool:
    """The pool may open more connections and cannot, while those it has work: the server has had enough of us."""
    refused = pool.gained("otel_pools.checkouts", error="connect_error") > 0
    return refused and pool.open > 0 and not pool.is_full and pool.broken == 0


def http2_streams(pool: Pool) -> bool:
    """Requests wait for a stream of a connection that they have, and none for a connection."""
    return pool.is_http and pool.now("otel_pools.stream.count", stream="pending") > 0 and pool.pending == 0


def unclosed_response(pool: Pool) -> bool:
    """A connection of an HTTP client has been out for longer than the leak threshold."""
    return pool.is_http and pool.now("otel_pools.connection.overdue") > 0


def grpc_queue(pool: Pool) -> bool:
    """Calls wait inside gRPC for a stream."""
    is_grpc = pool.has("otel_pools.grpc.channels")
    return is_grpc and pool.pending > 0 and pool.now("otel_pools.stream.count", stream="pending") > 0


def refused_at_once(pool: Pool) -> bool:
    """A pool that does not wait had nothing left: the time to wait is zero and looks healthy."""
    return pool.gained("otel_pools.checkouts", error="exhausted") > 0


def consumers_take_all(pool: Pool) -> bool:
    """Full, and requests give up, because all connections wait in blocking commands or subscriptions."""
    return pool.is_full and pool.gave_up > 0 and pool.on_purpose


def loop_lag(pool: Pool) -> bool:
    """An idle connection was there at once, nobody queued, and yet it took more than 100 ms to get it: not the pool."""
    slow = pool.above(pool.wait_time, LONG, path="idle")
    is_common = slow > pool.gained(pool.wait_time, path="idle") / 5
    return is_common and pool.gained(pool.wait_time, path="queued") == 0


def held_on_purpose(pool: Pool) -> bool:
    """Connections are out for longer than the leak threshold, none of them overdue, and nobody waits: no incident."""
    is_long = pool.now("otel_pools.use.oldest") > LEAK_THRESHOLD * 1.1
    return is_long and not (pool.is_leaking or pool.gave_up or pool.pending)


SIGNALS: dict[str, Callable[[Pool], bool]] = {
    signal.__name__: signal
    for signal in (
        slow_holders,
        leak,
        dropped,
        lost_slots,
        nested_checkout,
        idle_in_transaction,
        recycle_herd,
        fork_sharing,
        server_restart,
        pool_too_small,
        server_limit,
        http2_streams,
        unclosed_response,
        grpc_queue,
        refused_at_once,
        consumers_take_all,
        loop_lag,
        held_on_purpose,
    )
}


def fired(evidence: Evidence) -> set[tuple[str, str]]:
    """Which signals fire, on which pools."""
    return {
        (pool, name)
        for pool in pools(evidence)
        for name, signal in SIGNALS.items()
        if signal(Pool(only(evidence, pool)))
    }
