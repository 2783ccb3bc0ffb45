"""
A connection is dropped without being closed; the garbage collector gives it back, some time.

On call: now and then requests wait although hardly anything goes on. A connection of SQLAlchemy's that has begun a
transaction is part of a cycle of references, so it is out until the collector happens to come by.
The signal `dropped`: `otel_pools.connection.leaked` with kind `collected` grows. The log has the line.
What to do: that line needs a `with`.
"""

from __future__ import annotations

import gc

from lab import Lab, alone
from sqlalchemy import Engine, create_engine, text


def count(engine: Engine) -> None:
    """Forgets to close what it borrows."""
    connection = engine.connect()
    connection.execute(text("SELECT 1"))


def play(lab: Lab) -> None:
    """Ten times a connection is dropped."""
    engine = create_engine(lab.servers.postgres, pool_logging_name="counts")
    lab.before()
    for _ in range(10):
        count(engine)
    gc.collect()  # which comes by itself, some time
    lab.after()
    engine.dispose()


if __name__ == "__main__":
    alone(play)
