"""
Many short requests share too few connections.

On call: everything is slower with load, and neither the database nor the machine is busy.
The signal `pool_too_small`: most of `db.client.connection.wait_time` has path `queued`, and its mean is more than
twice that of `db.client.connection.use_time`: requests wait for longer than the work takes.
What to do: a greater pool (if the database has connections to give: mind all instances together). In `slow_holders`
it would not help; there the use is longer than the wait.
"""

from __future__ import annotations

import time
from threading import Event

from lab import Lab, alone, crowd, until
from sqlalchemy import create_engine, text

MANY = 150  # waits


def play(lab: Lab) -> None:
    """Twelve threads, two connections, and queries of 10 ms."""
    engine = create_engine(lab.servers.postgres, pool_size=2, max_overflow=0, pool_logging_name="sessions")
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))
    lab.before()

    def requests(over: Event) -> None:
        while not over.is_set():
            with engine.connect() as connection:
                connection.execute(text("SELECT pg_sleep(0.01)"))
            time.sleep(0.005)  # what else there is to do

    with crowd(12, requests):
        until(lambda: lab.reads("db.client.connection.wait_time", "sessions", path="queued") > MANY)
        lab.after()
    engine.dispose()


if __name__ == "__main__":
    alone(play)
