"""
A subscriber and a worker hold their connections for as long as they live, as they should.

On call: connections have been out for hours, which looks like a leak, and is none.
The signal `held_on_purpose`: `otel_pools.use.oldest` is greater than the leak threshold while
`otel_pools.connection.overdue` is 0; `otel_pools.holders()` says `pub/sub` and `blocking`.
What to do: nothing.
"""

from __future__ import annotations

import time
from threading import Event

import redis
from lab import LEAK_THRESHOLD, Lab, alone, crowd


def play(lab: Lab) -> None:
    """One subscription and one BLPOP, for longer than the leak threshold."""
    pool = redis.BlockingConnectionPool.from_url(
        lab.servers.valkey, max_connections=4, client_name="consumers", socket_timeout=None
    )
    client = redis.Redis(connection_pool=pool)
    client.ping()
    lab.before()

    def subscriber(over: Event) -> None:
        with client.pubsub() as channel:
            channel.subscribe("incident:news")
            while not over.is_set():
                channel.get_message(timeout=0.05)

    def worker(_: Event) -> None:
        client.blpop("incident:work", timeout=60)

    with crowd(1, subscriber), crowd(1, worker):
        time.sleep(LEAK_THRESHOLD + 0.3)
        lab.after()
        client.rpush("incident:work", "go home")
    client.close()
    pool.disconnect()


if __name__ == "__main__":
    alone(play)
