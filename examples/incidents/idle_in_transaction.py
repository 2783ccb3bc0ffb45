"""
Requests begin a transaction and then call somebody else, while they hold their connection.

On call: the pool is busy, the database is idle, and yet others wait for locks; `pg_stat_activity` is full of
"idle in transaction".
The signal `idle_in_transaction`: of the sum of `db.client.connection.use_time`, `otel_pools.connection.busy_time`
(the setting `busy_time`) is less than a tenth.
What to do: call first and begin then, or commit before the call.
"""

from __future__ import annotations

import time
from threading import Event

from lab import Lab, alone, crowd
from sqlalchemy import create_engine, text


def ask_the_bank() -> None:
    """Somebody else's service, which takes its time."""
    time.sleep(1.2)


def play(lab: Lab) -> None:
    """Three requests, one query each, and a call."""
    engine = create_engine(lab.servers.postgres, pool_size=5, pool_logging_name="payments")
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))
    lab.before()

    def request(_: Event) -> None:
        with engine.begin() as connection:
            connection.execute(text("SELECT 1"))
            ask_the_bank()

    with crowd(3, request):
        pass
    lab.after()
    engine.dispose()


if __name__ == "__main__":
    alone(play)
