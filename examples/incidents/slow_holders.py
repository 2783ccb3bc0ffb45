"""
A few slow reports hold every connection, and quick requests give up.

On call: requests fail with "QueuePool limit of size 3 overflow 0 reached, connection timed out", others are slow.
The signal `slow_holders`: the pool is full, `db.client.connection.timeouts` grows, and `otel_pools.use.oldest` is
greater than the time for which requests wait. The log names who holds the connections, since when and from which
line; the span of each wait that failed links to the spans of those who hold.
What to do: look at those lines. Make the reports faster, or give them a pool of their own; a greater pool only
moves the queue into the database.
"""

from __future__ import annotations

from threading import Event

from lab import Lab, alone, crowd, until
from sqlalchemy import create_engine, text
from sqlalchemy.exc import TimeoutError as PoolTimeout

REPORTS = 3


def play(lab: Lab) -> None:
    """Three reports take a second each, and two requests wait for a fifth of one."""
    engine = create_engine(
        lab.servers.postgres, pool_size=REPORTS, max_overflow=0, pool_timeout=0.2, pool_logging_name="orders"
    )
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))
    lab.before()
    gave_up = []

    def report(over: Event) -> None:
        with lab.span("GET /report"), engine.connect() as connection:
            while not over.is_set():
                connection.execute(text("SELECT pg_sleep(0.2)"))

    def request(over: Event) -> None:
        while not over.is_set():
            try:
                with lab.span("GET /order"), engine.connect() as connection:
                    connection.execute(text("SELECT 1"))
            except PoolTimeout as error:
                gave_up.append(error)

    with crowd(REPORTS, report):
        until(lambda: engine.pool.checkedout() == REPORTS)
        with crowd(2, request):
            until(lambda: len(gave_up) > 1)
            lab.after()
    engine.dispose()


if __name__ == "__main__":
    alone(play)
