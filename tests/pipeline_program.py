"""
A program with a pool of two connections to a database and one to a cache; it does what it reads, and counts it.

It knows nothing of OpenTelemetry: the tests start it under `opentelemetry-instrument`. Each line it reads is a word and
perhaps a number; each line it writes is what it has done so far, as JSON.
"""

from __future__ import annotations

import json
import sys
import threading
from collections import Counter
from contextlib import ExitStack

import redis
from sqlalchemy import create_engine, text
from sqlalchemy.exc import TimeoutError as PoolTimeout

PATIENCE = 0.05
WAITERS = 3

engine = create_engine(
    sys.argv[1], pool_size=2, max_overflow=0, pool_timeout=PATIENCE, pool_logging_name="shop", pool_pre_ping=False
)
cache = redis.Redis.from_url(sys.argv[2], client_name="cache")
done: Counter[str] = Counter()
released = threading.Event()
held = ExitStack()
waiters: list[threading.Thread] = []


def work(times: int) -> None:
    """Ask both stores; at every fifth time ask for a connection that cannot be had."""
    for time in range(times):
        with engine.connect() as connection:
            connection.execute(text("SELECT 1"))
        cache.incr("visits")
        done.update(shop=1, cache=1)
        if time % 5 == 4:
            fail()


def fail() -> None:
    with engine.connect(), engine.connect():
        want()
    done.update(shop=2)


def want() -> None:
    try:
        engine.connect().close()
    except PoolTimeout:
        done.update(timeouts=1)
    done.update(shop=1)


def hold() -> None:
    """Take all connections, and let others ask for one again and again until they are released."""
    for _ in range(2):
        held.enter_context(engine.connect())
    waiters.extend(threading.Thread(target=ask_again) for _ in range(WAITERS))
    for waiter in waiters:
        waiter.start()


def ask_again() -> None:
    while not released.is_set():
        want()


def release() -> None:
    released.set()
    for waiter in waiters:
        waiter.join()
    held.close()


def main() -> None:
    """Read and do, until there is nothing more to read."""
    for line in sys.stdin:
        word, *numbers = line.split()
        {"work": work, "hold": hold, "release": release}[word](*map(int, numbers))
        print(json.dumps(done), flush=True)  # noqa: T201  # that is how it answers


main()
