"""
The database restarts under a pool that is in use.

On call: a burst of OperationalError, then connections are refused, then all is well and nobody knows why.
The signal `server_restart`: `otel_pools.connection.closed` with reason `error`, `invalidated` or `pre_ping` grows, and
`otel_pools.checkouts` with `error.type` `connect_error`.
What to do: nothing, if it was a deployment; `pool_pre_ping=True` spares the first requests after it.
"""

from __future__ import annotations

from contextlib import suppress

from lab import Lab, alone
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError


def play(lab: Lab) -> None:
    """Stop it, ask, start it again."""
    server = lab.servers.small_postgres
    engine = create_engine(server.url("psycopg"), pool_size=3, pool_logging_name="stock")

    def request() -> None:
        with engine.connect() as connection:
            connection.execute(text("SELECT 1"))

    request()
    lab.before()
    server.stop()
    for _ in range(4):
        with suppress(OperationalError):
            request()
    server.start()
    request()
    lab.after()
    request()
    lab.later()
    engine.dispose()


if __name__ == "__main__":
    alone(play)
