"""
Something blocks the event loop, and every wait in the process looks slow, that for a connection too.

On call: "the pool is slow", says the histogram of waits.
The signal `loop_lag`: `db.client.connection.wait_time` with path `idle` is slow: a connection was there at once, nobody
queued, and yet it took more than 100 ms to get it.
What to do: leave the pool alone. Find what blocks the loop (`PYTHONASYNCIODEBUG=1`) and give it a thread. If nothing
does, it is the server that is slow to answer the ping before each loan.
"""

from __future__ import annotations

import asyncio
import time

from lab import Lab, alone
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine


async def request(engine: AsyncEngine) -> None:
    """Quick by itself."""
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1"))


async def parse() -> None:
    """A great document, so to speak: nothing else runs meanwhile."""
    time.sleep(0.2)  # noqa: ASYNC251  # which is the incident


async def day(lab: Lab) -> None:
    """Five requests, and each time somebody parses beside it."""
    url = make_url(lab.servers.postgres).set(drivername="postgresql+asyncpg")
    engine = create_async_engine(url, pool_size=5, pool_pre_ping=True, pool_logging_name="articles")
    await request(engine)
    lab.before()
    for _ in range(5):
        await asyncio.gather(request(engine), parse())
    lab.after()
    await engine.dispose()


def play(lab: Lab) -> None:
    """In an event loop of its own."""
    asyncio.run(day(lab))


if __name__ == "__main__":
    alone(play)
