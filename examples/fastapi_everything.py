"""
A FastAPI application with a pool of every kind: PostgreSQL, Redis, another service over HTTP, and Qdrant.

Install::

    pip install 'otel-pools[sqlalchemy,redis,httpx,qdrant,otlp]' 'sqlalchemy[asyncio]' asyncpg fastapi uvicorn

Run, with those servers and a Collector on this machine::

    export OTEL_SERVICE_NAME=fastapi-everything
    export OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf
    export OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4318
    export OTEL_METRIC_EXPORT_INTERVAL=5000
    opentelemetry-instrument uvicorn examples.fastapi_everything:app --port 8000

And let all four work for one request, or for thirty at a time::

    for i in $(seq 30); do curl -s http://127.0.0.1:8000/offer/7 & done

The servers are elsewhere? Set ``DATABASE_URL``, ``REDIS_URL``, ``PRICES_URL`` (by default the application itself stands
in for that service), ``QDRANT_URL`` and ``QDRANT_GRPC_PORT``.

The pools are called ``orders``, ``cache``, ``prices`` and ``vectors``. Two libraries have a word of their own for that,
the other two pools are named by `otel_pools.name_pool`, the only line here that knows of being watched.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from fastapi import FastAPI
from qdrant_client import AsyncQdrantClient
from qdrant_client.models import Distance, PointStruct, VectorParams
from redis.asyncio import BlockingConnectionPool, Redis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

import otel_pools

orders = create_async_engine(
    os.environ.get("DATABASE_URL", "postgresql+asyncpg://postgres@127.0.0.1/postgres"),
    pool_size=4,
    max_overflow=2,
    pool_logging_name="orders",
)
cache = Redis.from_pool(  # which closes its pool with itself; with `connection_pool=` that would be left to us
    BlockingConnectionPool.from_url(
        os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0"),
        client_name="cache",
        max_connections=8,
        timeout=2,
    )
)
prices = httpx.AsyncClient(
    base_url=os.environ.get("PRICES_URL", "http://127.0.0.1:8000"), limits=httpx.Limits(max_connections=10)
)
vectors = AsyncQdrantClient(
    os.environ.get("QDRANT_URL", "http://127.0.0.1:6333"),
    grpc_port=int(os.environ.get("QDRANT_GRPC_PORT", "6334")),
    prefer_grpc=True,
    check_compatibility=False,  # a request while this module is imported, which is too early for servers to be missed
)
otel_pools.name_pool(prices, "prices")
otel_pools.name_pool(vectors, "vectors")


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Have something to search in; close the connections in the event loop that opened them."""
    if not await vectors.collection_exists("things"):
        await vectors.create_collection("things", VectorParams(size=2, distance=Distance.COSINE))
        await vectors.upsert("things", [PointStruct(id=7, vector=[1, 0]), PointStruct(id=8, vector=[0, 1])])
    yield
    await vectors.close()
    await prices.aclose()
    await cache.aclose()
    await orders.dispose()


app = FastAPI(lifespan=lifespan)


@app.get("/offer/{thing}")
async def offer(thing: int) -> dict[str, Any]:
    """Ask one after the other, and hold no connection while waiting for another."""
    async with orders.connect() as connection:
        sold = await connection.scalar(text("SELECT CAST(:thing AS integer) * 10"), {"thing": thing})
    seen = await cache.incr(f"seen:{thing}")
    price = (await prices.get(f"/price/{thing}")).raise_for_status().json()
    alike = await vectors.query_points("things", query=[0.9, 0.1], limit=1)
    return {"sold": sold, "seen": seen, "price": price, "alike": [point.id for point in alike.points]}


@app.get("/price/{thing}")
async def price(thing: int) -> float:
    """The other service."""
    return thing * 1.5
