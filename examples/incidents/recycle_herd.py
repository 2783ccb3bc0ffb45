"""
All connections are of one age, so they all reach `pool_recycle` at once.

On call: a stripe of latency as regular as a clock, and at the same time the database's CPU on connecting (with TLS the
worse), from each instance that was started by the same deployment.
The signal `recycle_herd`: `otel_pools.connection.closed` with reason `recycle` grows by as many as there are
connections between two exports, and `otel_pools.connection.created` with it.
What to do: a longer `pool_recycle`; it has no jitter, so choose it at random for each process.
"""

from __future__ import annotations

import time
from threading import Barrier, Event

from lab import PATIENCE, Lab, alone, crowd
from sqlalchemy import create_engine, text


def play(lab: Lab) -> None:
    """Six connections of one second, and six requests at once after that."""
    engine = create_engine(lab.servers.postgres, pool_size=6, pool_recycle=1, pool_logging_name="catalogue")
    together = Barrier(6, timeout=PATIENCE)

    def request(_: Event) -> None:
        with engine.connect() as connection:
            together.wait()
            connection.execute(text("SELECT pg_sleep(0.2)"))

    with crowd(6, request):
        pass
    lab.before()
    time.sleep(1.1)
    with crowd(6, request):
        pass
    lab.after()
    engine.dispose()


if __name__ == "__main__":
    alone(play)
