"""
A server forks its workers after it has used the database, and parent and child talk on one and the same connection.

On call: random protocol errors, "decryption failed or bad record mac", or rows that somebody else has asked for.
The signal `fork_sharing`: in the child, `otel_pools.connection.inherited` grows. The log says what to do.
What to do: `engine.dispose(close=False)` in each child, first of all (`os.register_at_fork`, gunicorn's `post_fork`,
Celery's `worker_process_init`).
"""

from __future__ import annotations

import multiprocessing
import os
import warnings
from multiprocessing.connection import Connection

from lab import PATIENCE, Evidence, Lab, alone
from sqlalchemy import Engine, create_engine, text


def work(lab: Lab, engine: Engine, parent: Connection) -> None:
    """What the child does: a query, on the connection that it has from its parent; then it sends what it has seen."""
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))
    parent.send(lab.after())
    parent.close()
    os._exit(0)  # without closing what is the parent's, too


def play(lab: Lab) -> None:
    """A parent that has used one connection, and one child."""
    engine = create_engine(lab.servers.postgres, pool_logging_name="workers")
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))
    lab.before()
    ours, theirs = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=work, args=(lab, engine, theirs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12, about threads: which are at rest
        child.start()
    try:
        if not ours.poll(PATIENCE):
            raise TimeoutError("the child says nothing")
        seen: Evidence = ours.recv()
    finally:
        child.kill()
        child.join()
        ours.close()
        theirs.close()
    lab.take(seen)
    engine.dispose()


if __name__ == "__main__":
    alone(play)
