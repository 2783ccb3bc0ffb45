"""
A Redis pool that does not wait has nothing left, and says so at once.

On call: "Too many connections" from Redis clients in bursts. All graphs of waiting are flat, because nobody waits.
The signal `refused_at_once`: `otel_pools.checkouts` with `error.type` `exhausted` grows.
What to do: `BlockingConnectionPool`, which waits (with a timeout), or a greater `max_connections`; the log names who
holds the connections.
"""

from __future__ import annotations

from threading import Barrier, Event

import redis
from lab import PATIENCE, Lab, alone, crowd


def play(lab: Lab) -> None:
    """Eight threads on a pool of three, each with a pipeline that takes its connection for a while."""
    pool = redis.ConnectionPool.from_url(lab.servers.valkey, max_connections=3, client_name="carts")
    client = redis.Redis(connection_pool=pool)
    client.ping()
    lab.before()
    together = Barrier(8, timeout=PATIENCE)

    def request(_: Event) -> None:
        together.wait()
        try:
            with client.pipeline() as pipeline:
                pipeline.watch("cart")
                together.wait()
        except redis.MaxConnectionsError:
            together.wait()

    with crowd(8, request):
        pass
    lab.after()
    client.close()
    pool.disconnect()


if __name__ == "__main__":
    alone(play)
