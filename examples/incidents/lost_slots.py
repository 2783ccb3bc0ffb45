"""
Cancelled requests leave their places in an HTTP pool taken, for ever (httpcore #1093).

On call: PoolTimeout from a service that is healthy, and a restart helps, until next week.
The signal `lost_slots`: `otel_pools.connection.orphaned` is not 0: places that are occupied and owned by nobody.
What to do: move to httpx2 (fixed in httpcore2 2.6), or do not cancel requests that wait for a connection; until then
make the pool greater and restart when the orphans near its size.
"""

from __future__ import annotations

import asyncio

import httpx
from lab import Lab, alone

import otel_pools


async def race(client: httpx.AsyncClient) -> None:
    """Ask twice and take the first answer; the other one is cancelled, which has just been given its place."""
    rivals: list[asyncio.Task[None]] = []

    async def ask() -> None:
        await client.get("/price", params={"seconds": "0"})
        for rival in rivals:
            if rival is not asyncio.current_task():
                rival.cancel()

    rivals += [asyncio.create_task(ask()) for _ in range(2)]
    await asyncio.gather(*rivals, return_exceptions=True)


async def storm(lab: Lab) -> None:
    """Races on a pool of one, whose connections serve one request each."""
    async with httpx.AsyncClient(
        base_url=lab.servers.web,
        headers={"Connection": "close"},
        limits=httpx.Limits(max_connections=1),
        timeout=httpx.Timeout(10, pool=0.2),
        trust_env=False,
    ) as client:
        otel_pools.name_pool(client, "prices")
        lab.before()
        for _ in range(3):
            await race(client)
        lab.after()


def play(lab: Lab) -> None:
    """In an event loop of its own."""
    asyncio.run(storm(lab))


if __name__ == "__main__":
    alone(play)
