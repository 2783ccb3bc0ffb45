"""
PgBouncer accepts fewer clients than the pool before it believes it may open.

On call: "no more connections allowed (max_client_conn)" for some requests while others work; the database has
hardly any connections.
The signal `server_limit`: from inside the process it looks as if the server itself had had enough.
What to do: a greater `max_client_conn`, which costs PgBouncer next to nothing, or smaller pools. Clients that it
accepts and lets wait (`cl_waiting`) look like slow queries from here: `SHOW POOLS` tells them apart.

It needs the program `pgbouncer` (Debian: `apt-get install pgbouncer`).
"""

from __future__ import annotations

from threading import Event

from lab import Lab, alone, crowd, until
from servers import PgBouncer
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError

REQUESTS = 6


def play(lab: Lab) -> None:
    """A PgBouncer for three clients, and a pool that wants six."""
    with PgBouncer(lab.servers.postgres, max_client_conn=REQUESTS // 2) as bouncer:
        engine = create_engine(bouncer.url, pool_size=REQUESTS, max_overflow=0, pool_logging_name="search")
        with engine.connect() as connection:
            connection.execute(text("SELECT 1"))
        lab.before()
        served, refused = [], []

        def request(over: Event) -> None:
            try:
                with engine.connect() as connection:
                    served.append(connection.scalar(text("SELECT 1")))
                    over.wait()
            except OperationalError as error:
                refused.append(error)

        with crowd(REQUESTS, request):
            until(lambda: len(served + refused) == REQUESTS)
            lab.after()
        engine.dispose()


if __name__ == "__main__":
    alone(play)
