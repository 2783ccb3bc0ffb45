"""
Several pools have plenty to do, and nothing is wrong.

On call: nothing.
No signal fires.
"""

from __future__ import annotations

import asyncio
import time
from threading import Event

import httpx
import redis
from lab import Lab, alone, crowd
from qdrant_client import QdrantClient, models
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

import otel_pools

SECONDS = 1.2


async def asynchronous(lab: Lab) -> None:
    """Coroutines on an asyncio pool, with pings, and on an asyncio HTTP client."""
    url = make_url(lab.servers.postgres).set(drivername="postgresql+asyncpg")
    engine = create_async_engine(url, pool_size=4, pool_pre_ping=True, pool_logging_name="articles")
    limits = httpx.Limits(max_connections=4)
    client = httpx.AsyncClient(base_url=lab.servers.web, limits=limits, timeout=30, trust_env=False)
    otel_pools.name_pool(client, "prices")
    end = time.monotonic() + SECONDS

    async def requests() -> None:
        while time.monotonic() < end:
            async with engine.connect() as connection:
                await connection.execute(text("SELECT pg_sleep(0.005)"))
            await client.get("/price", params={"seconds": "0.005"})

    await asyncio.gather(*(requests() for _ in range(4)))
    await client.aclose()
    await engine.dispose()


def play(lab: Lab) -> None:
    """Threads and coroutines on six pools, one of them a little too popular, for more than a second."""
    engine = create_engine(lab.servers.postgres, pool_size=4, max_overflow=2, pool_logging_name="orders")
    tight = create_engine(lab.servers.postgres, pool_size=3, max_overflow=0, pool_logging_name="stock")
    pool = redis.BlockingConnectionPool.from_url(lab.servers.valkey, max_connections=5, client_name="carts")
    cache = redis.Redis(connection_pool=pool)
    server = lab.servers.qdrant
    vectors = QdrantClient(url=server.url, grpc_port=server.grpc_port, prefer_grpc=True, check_compatibility=False)
    otel_pools.name_pool(vectors, "vectors")
    if not vectors.collection_exists("goods"):
        vectors.create_collection("goods", models.VectorParams(size=2, distance=models.Distance.COSINE))
    lab.before()

    def requests(over: Event) -> None:
        while not over.is_set():
            for one in (engine, tight):
                with lab.span("GET /"), one.connect() as connection:
                    connection.execute(text("SELECT pg_sleep(0.005)"))
            cache.incr("incident:visits")
            vectors.query_points("goods", query=[1.0, 1.0], limit=1)

    with crowd(4, requests):
        asyncio.run(asynchronous(lab))
        lab.after()
    vectors.close()
    cache.close()
    pool.disconnect()
    engine.dispose()
    tight.dispose()


if __name__ == "__main__":
    alone(play)
