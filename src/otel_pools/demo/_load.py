"""The application of the demo: some traffic, then more than its pools can serve, then calm; knows nothing of us."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx
from opentelemetry import trace
from redis import ConnectionError as RedisConnectionError
from redis.asyncio import BlockingConnectionPool, ConnectionPool, Redis
from sqlalchemy import text
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

if TYPE_CHECKING:
    from qdrant_client import AsyncQdrantClient

# Where the URLs are handed over: one holds a password, and arguments can be read by everybody.
URL = "OTEL_POOLS_DEMO_URL"
VALKEY_URL = "OTEL_POOLS_DEMO_VALKEY_URL"
WEB_URL = "OTEL_POOLS_DEMO_WEB_URL"
QDRANT_URL, QDRANT_GRPC_PORT = "OTEL_POOLS_DEMO_QDRANT_URL", "OTEL_POOLS_DEMO_QDRANT_GRPC_PORT"

SIZE, OVERFLOW = 5, 3
SESSIONS = 4
CACHE = 32
CONNECTIONS, STREAMS = 2, 4  # to the prices: what the client allows, and what the server allows on each
GOODS, SIMILAR = "goods", 3  # the collection of vectors, and how many of them a search is for
SHOPPERS = 3  # one at a time is no traffic, and less than SESSIONS is no strain
CROWD = 16  # twice what the database's pool can open, and half of the cache's
# In shares of a cycle. A query of the burst outlasts the timeout, so that those who queue behind it see the timeout.
TIMEOUT, SLOW_QUERY = 1 / 15, 1.5 / 15
# All who ask for a price, or search, are served in the end, by fours; it must not take so long that the database is
# left in peace.
SLOW_PRICE = SLOW_QUERY / 3
CALM_QUERY, PAUSE = 0.01, 0.05  # seconds

tracer = trace.get_tracer("otel_pools.demo")


@dataclass(frozen=True)
class Phase:
    """A third of a cycle: what it is called, what goes on, how many do it, how long a query and all else take."""

    name: str
    story: str
    workers: int
    query: float
    price: float


def phases(cycle: float) -> tuple[Phase, ...]:
    """The three thirds of a cycle of so many seconds."""
    slow, slow_price, timeout = cycle * SLOW_QUERY, cycle * SLOW_PRICE, cycle * TIMEOUT
    steady = f"{SHOPPERS} shoppers, quick queries, pools of {SIZE} and {SESSIONS}, {STREAMS} streams"
    burst = (
        f"{CROWD} ask; {SIZE + OVERFLOW} get a connection to the database and {SESSIONS} to their sessions for"
        f" {slow:.1f} s (timeout {timeout:.1f} s), and {STREAMS} each a stream to the prices and to the vectors for"
        f" {slow_price:.1f} s"
    )
    recovery = f"the crowd is gone, {SHOPPERS} shoppers remain"
    return (
        Phase("steady", steady, SHOPPERS, CALM_QUERY, CALM_QUERY),
        Phase("burst", burst, CROWD, slow, slow_price),
        Phase("recovery", recovery, SHOPPERS, CALM_QUERY, CALM_QUERY),
    )


@dataclass(frozen=True)
class Stores:
    """What a request needs: the database, the same Valkey through two pools, and the servers of prices and vectors."""

    database: AsyncEngine
    sessions: Redis
    cache: Redis
    prices: httpx.AsyncClient
    vectors: AsyncQdrantClient


@contextlib.asynccontextmanager
async def stores(places: Mapping[str, str], cycle: float) -> AsyncIterator[Stores]:
    """Open them, with a timeout for connections that fits the cycle; close them in the end."""
    timeout = cycle * TIMEOUT
    engine = create_async_engine(places[URL], pool_size=SIZE, max_overflow=OVERFLOW, pool_timeout=timeout)
    # A client's name is what the server calls its connections, and what tells the two pools apart.
    sessions = BlockingConnectionPool.from_url(
        places[VALKEY_URL],
        client_name="sessions",
        max_connections=SESSIONS,
        timeout=timeout,
        socket_timeout=None,  # the answer comes with the lock
    )
    cache = ConnectionPool.from_url(places[VALKEY_URL], client_name="cache", max_connections=CACHE)
    prices, vectors = prices_client(places, cycle), vectors_client(places, cycle)
    try:
        await stock(vectors)
        yield Stores(engine, Redis(connection_pool=sessions), Redis(connection_pool=cache), prices, vectors)
    finally:
        await vectors.close()
        await prices.aclose()
        await engine.dispose()
        await sessions.disconnect()
        await cache.disconnect()


def prices_client(places: Mapping[str, str], cycle: float) -> httpx.AsyncClient:
    """For HTTP/2 alone, which the server speaks from the first byte on."""
    return httpx.AsyncClient(
        base_url=places[WEB_URL],
        http1=False,
        http2=True,
        limits=httpx.Limits(max_connections=CONNECTIONS),
        timeout=2 * cycle,  # whoever waits for a stream, waits
        trust_env=False,  # a proxy for the internet is not for this machine
    )


def vectors_client(places: Mapping[str, str], cycle: float) -> AsyncQdrantClient:
    """For gRPC: several channels, which share one connection."""
    # The demo itself imports us too, and this would take it most of two seconds.
    from qdrant_client import AsyncQdrantClient  # noqa: PLC0415  # as said

    return AsyncQdrantClient(
        url=places[QDRANT_URL],
        grpc_port=int(places[QDRANT_GRPC_PORT]),
        prefer_grpc=True,
        timeout=math.ceil(2 * cycle),
        check_compatibility=False,  # of its version with that of a Qdrant
    )


async def stock(vectors: AsyncQdrantClient) -> None:
    """Something to be found."""
    from qdrant_client import models  # noqa: PLC0415  # as in `vectors_client`

    if not await vectors.collection_exists(GOODS):
        size = models.VectorParams(size=2, distance=models.Distance.COSINE)
        await vectors.create_collection(GOODS, vectors_config=size)
    goods = [models.PointStruct(id=number, vector=[1.0, float(number)]) for number in range(10)]
    await vectors.upsert(GOODS, goods)


async def shop(opened: Stores, phase: Phase) -> None:
    """One request: a look into the cache, session, orders, price and search at once, and the page into the cache."""
    with tracer.start_as_current_span("GET /orders"):
        await opened.cache.get("prices")
        # One after the other, the smallest pool would keep the crowd from the others.
        await asyncio.gather(
            session(opened.sessions, phase.query),
            orders(opened.database, phase.query),
            price(opened.prices, phase.price),
            similar(opened.vectors, phase.price),
        )
        await opened.cache.set("page", "...")


async def orders(database: AsyncEngine, seconds: float) -> None:
    """A query that takes so many seconds; a pool that is exhausted is an answer too."""
    with contextlib.suppress(PoolTimeout):
        async with database.connect() as connection:
            await connection.execute(text("SELECT pg_sleep(:seconds)"), {"seconds": seconds})


async def session(sessions: Redis, seconds: float) -> None:
    """A wait of so many seconds for the lock on a session, which takes a connection; as with the database."""
    try:
        await sessions.blpop(["lock"], timeout=seconds)
    except RedisConnectionError as error:
        # An answer too; it has the class of a lost connection.
        if str(error) != "No connection available.":
            raise


async def price(prices: httpx.AsyncClient, seconds: float) -> None:
    """A price that takes the server so many seconds; all share one connection, so most of a crowd wait for a stream."""
    answer = await prices.get("/price", params={"seconds": f"{seconds:.3f}"})
    answer.raise_for_status()


async def similar(vectors: AsyncQdrantClient, seconds: float) -> None:
    """A search that takes the server so many seconds; over gRPC, so the crowd waits where no pool can be seen."""
    from qdrant_client import models  # noqa: PLC0415  # the same

    effort = models.SearchParams(hnsw_ef=round(1000 * seconds))  # which our server takes for milliseconds
    await vectors.query_points(GOODS, query=[1.0, random.random()], limit=SIMILAR, search_params=effort)


async def visit(opened: Stores, phase: Phase, until: float) -> None:
    """One worker: request after request, while the phase lasts."""
    now = asyncio.get_running_loop().time
    while now() < until:
        await shop(opened, phase)
        await asyncio.sleep(PAUSE * random.random())


async def run(places: Mapping[str, str], cycle: float, cycles: int, tell: Callable[[Phase], None]) -> None:
    """So many cycles on the servers at these places, or without end if 0; *tell* hears of each phase as it begins."""
    now = asyncio.get_running_loop().time
    async with stores(places, cycle) as opened:
        done = 0
        while not cycles or done < cycles:
            for phase in phases(cycle):
                tell(phase)
                until = now() + cycle / 3
                await asyncio.gather(*(visit(opened, phase, until) for _ in range(phase.workers)))
            done += 1


async def unless_stopped(work: Awaitable[None]) -> None:
    """Do the work, until SIGTERM comes or whoever started us is gone, which closes our input."""
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(work)
    told = sys.stdin.fileno()

    def stop() -> None:
        loop.remove_reader(told)  # an end stays readable, and a second cancel would hit the tidying up
        task.cancel()

    loop.add_signal_handler(signal.SIGTERM, stop)
    # What is no pipe, as when run by hand, cannot be watched.
    with contextlib.suppress(OSError, ValueError):
        loop.add_reader(told, stop)
    with contextlib.suppress(asyncio.CancelledError):
        await task


def tell(phase: Phase) -> None:
    """One line on standard output, which the demo reads; nobody may be left to read it."""
    with contextlib.suppress(BrokenPipeError):
        print(f"{phase.name}: {phase.story}", flush=True)


def main() -> None:
    """Run the load that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cycle", type=float, default=15.0, help="seconds of one cycle")
    parser.add_argument("--cycles", type=int, default=0, help="how many; 0 is without end")
    chosen = parser.parse_args()
    asyncio.run(unless_stopped(run(os.environ, chosen.cycle, chosen.cycles, tell)))


if __name__ == "__main__":
    main()
