"""
All requests to a server share one HTTP/2 connection, which carries only so many at once.

On call: the service that we call is slow, says everybody; its dashboard shows nothing; our pool has free places.
The signal `http2_streams`: `otel_pools.stream.count` with state `pending` is not 0 while
`otel_pools.connection.pending_requests` is.
What to do: a greater limit of concurrent streams on the server, or several clients, each with a connection of its own.
"""

from __future__ import annotations

import asyncio

import httpx
from lab import Lab, alone, until

import otel_pools


async def rush(lab: Lab) -> None:
    """Twelve requests at once to a server that takes four."""
    async with httpx.AsyncClient(
        base_url=lab.servers.web, http1=False, http2=True, timeout=30, trust_env=False
    ) as client:
        otel_pools.name_pool(client, "quotes")
        await client.get("/price", params={"seconds": "0"})
        lab.before()
        requests = [asyncio.create_task(client.get("/price", params={"seconds": "0.4"})) for _ in range(12)]
        await asyncio.to_thread(until, lambda: lab.reads("otel_pools.stream.count", "quotes", state="pending"))
        lab.after()
        await asyncio.gather(*requests)
        lab.later()


def play(lab: Lab) -> None:
    """In an event loop of its own."""
    asyncio.run(rush(lab))


if __name__ == "__main__":
    alone(play)
