"""
The server accepts fewer connections than all pools together believe they may open.

On call: "sorry, too many clients already" for some requests while others work, and the pool is not even full.
The signal `server_limit`: `otel_pools.checkouts` with `error.type` `connect_error` grows while connections are open
and work, none of them broke, and fewer than `db.client.connection.max` are in use.
What to do: add up `db.client.connection.max` over all instances, and compare with the server's `max_connections` (or
the role's CONNECTION LIMIT, or PgBouncer's): smaller pools, or fewer instances.
"""

from __future__ import annotations

from threading import Event

from lab import Lab, alone, crowd, until
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import OperationalError

EACH = 4  # requests to each service at once


def play(lab: Lab) -> None:
    """A server for six connections, and two services whose pools may have five each."""
    url = lab.servers.small_postgres.url("psycopg")
    web, batch = (
        create_engine(url, pool_size=5, max_overflow=0, pool_logging_name=service) for service in ("web", "batch")
    )
    served, refused = [], []

    def use(pool: Engine, over: Event) -> None:
        try:
            with pool.connect() as connection:
                served.append(connection.scalar(text("SELECT 1")))
                over.wait()
        except OperationalError as error:
            refused.append(error)

    with crowd(EACH, lambda over: use(web, over)):
        until(lambda: len(served) == EACH)
        lab.before()
        with crowd(EACH, lambda over: use(batch, over)):
            until(lambda: len(served + refused) == 2 * EACH)
            lab.after()
    web.dispose()
    batch.dispose()


if __name__ == "__main__":
    alone(play)
