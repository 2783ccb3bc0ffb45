"""
A connection is borrowed and never given back.

On call: at first nothing; the number of connections in use goes up over hours and never down, until the pool is empty.
The signal `leak`: `otel_pools.connection.leaked` with kind `overdue` grows, `otel_pools.connection.overdue` stays, and
`otel_pools.use.oldest` goes up like a clock. The log has the line that borrowed it.
What to do: that line needs a `with`.
"""

from __future__ import annotations

import time
from typing import Any

from lab import LEAK_THRESHOLD, Lab, alone
from sqlalchemy import Engine, create_engine, text


def export(engine: Engine) -> Any:
    """Forgets to close what it borrows."""
    connection = engine.connect()
    connection.execute(text("SELECT 1"))
    return connection


def play(lab: Lab) -> None:
    """One connection stays out, while others come and go."""
    engine = create_engine(lab.servers.postgres, pool_size=3, pool_logging_name="exports")
    lab.before()
    kept = export(engine)
    end = time.monotonic() + LEAK_THRESHOLD + 0.1
    while time.monotonic() < end:
        with engine.connect() as connection:
            connection.execute(text("SELECT 1"))
        time.sleep(0.05)
    lab.after()
    kept.close()
    lab.later()
    engine.dispose()


if __name__ == "__main__":
    alone(play)
