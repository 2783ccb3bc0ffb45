"""
The load behind the dashboards' test and picture: all four libraries, and everything that can go wrong with a pool.

An ordinary asyncio application but for its metrics, which it offers to Prometheus itself. Started by `stage.py`.
"""

# ruff: noqa: INP001, S311, T201  # a script; its chance is no secret; it says where its metrics are

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import CollectorRegistry, start_http_server
from qdrant_client import AsyncQdrantClient, models
from redis.asyncio import BlockingConnectionPool, ConnectionPool, Redis
from redis.exceptions import RedisError
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

import otel_pools
from otel_pools.demo._load import QDRANT_GRPC_PORT, QDRANT_URL, URL, VALKEY_URL, WEB_URL

LEAK_THRESHOLD = 1.0
# All that is off by default too, as every panel is to be seen.
SETTINGS: dict[str, Any] = {"leak_threshold": LEAK_THRESHOLD, "busy_time": True, "poll_idle": True}
TARGETS = ("sqlalchemy", "redis", "httpx", "qdrant")
GOODS = "goods"
QUICK, SLOW = 0.005, 0.35  # seconds
SHOPPERS, CROWD = 3, 14
BURST, CALM = 2.5, 1.5  # seconds
CHURN = 0.3  # of the reports are the last on their connection


@dataclass(frozen=True)
class Stores:
    """What a request needs."""

    database: AsyncEngine
    sessions: Redis
    cache: Redis
    prices: httpx.AsyncClient
    reports: httpx.AsyncClient
    vectors: AsyncQdrantClient


def opened(places: Mapping[str, str]) -> Stores:
    """Small pools, so that a small crowd is too much for them."""
    engine = create_async_engine(places[URL], pool_size=3, max_overflow=2, pool_timeout=0.3, pool_recycle=2)
    sessions = BlockingConnectionPool.from_url(
        places[VALKEY_URL], client_name="sessions", max_connections=4, timeout=0.3, socket_timeout=None
    )
    cache = ConnectionPool.from_url(places[VALKEY_URL], client_name="cache", max_connections=8)
    vectors = AsyncQdrantClient(
        url=places[QDRANT_URL],
        grpc_port=int(places[QDRANT_GRPC_PORT]),
        prefer_grpc=True,
        timeout=30,
        check_compatibility=False,
    )
    prices, reports = web(places, 2, http2=True), web(places, 2, http2=False)
    for client, name in ((prices, "prices"), (reports, "reports"), (vectors, "vectors")):
        otel_pools.name_pool(client, name)
    return Stores(engine, Redis(connection_pool=sessions), Redis(connection_pool=cache), prices, reports, vectors)


def web(places: Mapping[str, str], connections: int, *, http2: bool) -> httpx.AsyncClient:
    """A client of the web server, which hears from the first byte on which HTTP is spoken."""
    limits = httpx.Limits(max_connections=connections, keepalive_expiry=0.5)
    timeout = httpx.Timeout(30, pool=None if http2 else 0.5)
    return httpx.AsyncClient(
        base_url=places[WEB_URL], http1=not http2, http2=http2, limits=limits, timeout=timeout, trust_env=False
    )


async def orders(stores: Stores, seconds: float) -> None:
    """A query; some time is spent on other things while the connection is held."""
    with contextlib.suppress(SQLAlchemyError):
        async with stores.database.connect() as connection:
            await connection.execute(text("SELECT pg_sleep(:seconds)"), {"seconds": seconds})
            await asyncio.sleep(seconds / 2)


async def session(stores: Stores, seconds: float) -> None:
    """A wait for a lock, which takes a connection."""
    with contextlib.suppress(RedisError):
        await stores.sessions.blpop(["lock"], timeout=max(seconds, 0.02))


async def page(stores: Stores) -> None:
    """From the cache, whose pool refuses at once when it is exhausted."""
    with contextlib.suppress(RedisError):
        await stores.cache.get("page")


async def price(stores: Stores, seconds: float) -> None:
    """Over HTTP/2: all on one connection, four at once."""
    answer = await stores.prices.get("/price", params={"seconds": f"{seconds:.3f}"})
    answer.raise_for_status()


async def report(stores: Stores, seconds: float) -> None:
    """Over HTTP/1.1: two connections, so the crowd waits in the pool, and some in vain; often for the last time."""
    headers = {"connection": "close"} if random.random() < CHURN else {}
    with contextlib.suppress(httpx.PoolTimeout):
        await stores.reports.get("/price", params={"seconds": f"{seconds:.3f}"}, headers=headers)


async def similar(stores: Stores, seconds: float) -> None:
    """Over gRPC: the same."""
    effort = models.SearchParams(hnsw_ef=max(round(seconds * 1000), 1))
    await stores.vectors.query_points(GOODS, query=[1.0, random.random()], limit=3, search_params=effort)


async def nested(stores: Stores) -> None:
    """A second connection of the same pool while holding one."""
    with contextlib.suppress(SQLAlchemyError):
        async with stores.database.connect(), stores.database.connect():
            await asyncio.sleep(QUICK)


async def visitor(stores: Stores, seconds: float, until: float) -> None:
    """Request after request."""
    now = asyncio.get_running_loop().time
    while now() < until:
        await asyncio.gather(
            orders(stores, seconds),
            session(stores, seconds),
            page(stores),
            price(stores, seconds),
            report(stores, seconds),
            similar(stores, seconds),
        )
        await nested(stores)
        await asyncio.sleep(0.05 * random.random())


async def leaker(stores: Stores) -> None:
    """One connection held for longer than the leak threshold, and another dropped, again and again."""
    while True:
        with contextlib.suppress(SQLAlchemyError):
            held = await stores.database.connect()
            await asyncio.sleep(2 * LEAK_THRESHOLD)
            await held.close()
            lost = await stores.database.connect()
            del lost
        gc.collect()


async def stock(stores: Stores) -> None:
    """Something to be found."""
    if not await stores.vectors.collection_exists(GOODS):
        size = models.VectorParams(size=2, distance=models.Distance.COSINE)
        await stores.vectors.create_collection(GOODS, vectors_config=size)
    await stores.vectors.upsert(GOODS, [models.PointStruct(id=one, vector=[1.0, float(one)]) for one in range(10)])


async def play(stores: Stores, seconds: float) -> None:
    """Calm and bursts in turn, and a leak all the time."""
    now = asyncio.get_running_loop().time
    await stock(stores)
    end, leak = now() + seconds, asyncio.create_task(leaker(stores))
    while now() < end:
        for workers, length, query in ((SHOPPERS, CALM, QUICK), (CROWD, BURST, SLOW)):
            until = min(now() + length, end)
            await asyncio.gather(*(visitor(stores, query, until) for _ in range(workers)))
    leak.cancel()
    await asyncio.gather(leak, return_exceptions=True)


def watched(target: str) -> int:
    """
    Watch one library; the port of a page with its metrics.

    One page for each, as `opentelemetry-exporter-prometheus` (0.62b1 to 0.66b1 at least) mixes up the labels of
    metrics that two meters have in common.
    """
    registry = CollectorRegistry()
    provider = MeterProvider([PrometheusMetricReader(registry=registry)])
    otel_pools.instrument(target, meter_provider=provider, **SETTINGS)
    server: Any = start_http_server(0, "127.0.0.1", registry)[0]
    return int(server.server_port)


def main() -> None:
    """Play, and say on which ports the metrics are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="of traffic")
    chosen = parser.parse_args()
    logging.disable()  # what goes wrong here goes wrong on purpose
    warnings.simplefilter("ignore")
    ports = [watched(target) for target in TARGETS]
    stores = opened(os.environ)
    print(*ports, flush=True)
    asyncio.run(play(stores, chosen.seconds))


if __name__ == "__main__":
    main()
