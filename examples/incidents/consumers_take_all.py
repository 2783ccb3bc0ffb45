"""
Workers that wait for jobs share a Redis pool with everybody else, and take all of it.

On call: "No connection available" from the web, while Redis has nothing to do.
The signal `consumers_take_all`: the pool is full and `db.client.connection.timeouts` grows, and all who hold a
connection are of kind `blocking` or `pub/sub` (`otel_pools.holders()`, the log of the exhaustion, the events of the
failed wait's span).
What to do: a pool of their own for blocking commands and subscriptions, as large as there are workers.
"""

from __future__ import annotations

from threading import Event

import redis
from lab import Lab, alone, crowd, until

import otel_pools

WORKERS = 2


def play(lab: Lab) -> None:
    """Two workers on a pool of two, and one request."""
    pool = redis.BlockingConnectionPool.from_url(
        lab.servers.valkey, max_connections=WORKERS, timeout=0.2, client_name="jobs", socket_timeout=None
    )
    client, boss = redis.Redis(connection_pool=pool), redis.Redis.from_url(lab.servers.valkey, client_name="boss")
    client.ping()
    lab.before()
    gave_up = []

    def worker(_: Event) -> None:
        client.blpop("incident:jobs", timeout=60)

    def request(over: Event) -> None:
        while not over.is_set():
            try:
                with lab.span("GET /page"):
                    client.get("page")
            except redis.ConnectionError as error:
                gave_up.append(error)

    with crowd(WORKERS, worker):
        until(lambda: len(otel_pools.holders("jobs")) == WORKERS)
        with crowd(1, request):
            until(lambda: gave_up)
            lab.after()
        boss.rpush("incident:jobs", "go home", "you too")
    boss.close()
    client.close()
    pool.disconnect()


if __name__ == "__main__":
    alone(play)
