"""
Each request holds one connection and asks for a second one; when all do so at once, nobody gets it.

On call: everything hangs for the pool's timeout, then all fail at once; the database has nothing to do. It comes with
load and goes with it, and no single request can show it.
The signal `nested_checkout`: `otel_pools.checkout.nested` grows while the pool is full and requests wait. The log has
both lines.
What to do: hand the first connection on (or the session) instead of asking for another.
"""

from __future__ import annotations

from threading import Barrier, Event

from lab import PATIENCE, Lab, alone, crowd, until
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import TimeoutError as PoolTimeout

REQUESTS = 4


def audit(engine: Engine) -> None:
    """Writes into a table of its own, on a connection of its own."""
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))


def play(lab: Lab) -> None:
    """As many requests as the pool has connections."""
    engine = create_engine(
        lab.servers.postgres, pool_size=REQUESTS, max_overflow=0, pool_timeout=0.3, pool_logging_name="accounts"
    )
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))
    lab.before()
    together, gave_up = Barrier(REQUESTS, timeout=PATIENCE), []

    def request(over: Event) -> None:
        with lab.span("POST /transfer"), engine.connect() as connection:
            connection.execute(text("SELECT 1"))
            together.wait()
            while not over.is_set():
                try:
                    audit(engine)
                except PoolTimeout as error:
                    gave_up.append(error)

    with crowd(REQUESTS, request):
        until(lambda: len(gave_up) >= REQUESTS)
        lab.after()
    engine.dispose()


if __name__ == "__main__":
    alone(play)
