"""
A FastAPI application that answers for its pools: statistics, health and advice, probes, and 503 instead of a hang.

Install::

    pip install 'otel-pools[sqlalchemy]' 'sqlalchemy[asyncio]' aiosqlite fastapi uvicorn

Run::

    export POOLS_TOKEN=choose-one
    uvicorn examples.fastapi_pools:app

And look, while it has more to do than it has connections::

    for i in $(seq 30); do curl -s 'http://127.0.0.1:8000/slow?seconds=5' & done
    curl -s http://127.0.0.1:8000/ready
    curl -s -H "Authorization: Bearer $POOLS_TOKEN" http://127.0.0.1:8000/pools/stats
    curl -s -H "Authorization: Bearer $POOLS_TOKEN" http://127.0.0.1:8000/pools/holders
    curl -s -H "Authorization: Bearer $POOLS_TOKEN" http://127.0.0.1:8000/pools/advice

Fifteen requests get a connection, and the others wait for two seconds at most: then they are answered with 503, and
``/ready`` is 503 too, until a minute has passed without such harm. `kubernetes-probes.yaml` has the probes for it.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse
from sqlalchemy import text
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import create_async_engine

import otel_pools
from otel_pools.web import asgi_app

otel_pools.instrument()  # or start it by `opentelemetry-instrument`, which exports the same as metrics
engine = create_async_engine(
    os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///./example.db"),
    pool_timeout=2,  # less than callers wait, so that it is we who answer
)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Close the connections when the application ends, in the event loop that opened them."""
    yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)
# `os.environ[...]` and not `.get(...)`: without a token it must not start.
app.mount("/pools", asgi_app(token=os.environ["POOLS_TOKEN"], holders=True, reset=True))


@app.exception_handler(PoolTimeout)
async def busy(request: Request, error: PoolTimeout) -> JSONResponse:
    """Nobody got a connection in time: say so, and when to come back."""
    return JSONResponse({"error": "too busy"}, status_code=503, headers={"Retry-After": "2"})


@app.get("/ready")
async def ready() -> JSONResponse:
    """For the readiness probe, which has no token: a word, and no details."""
    is_ready = otel_pools.health().ready
    return JSONResponse({"ready": is_ready}, status_code=200 if is_ready else 503)


@app.get("/live")
async def live() -> dict[str, bool]:
    """For the liveness probe: that the event loop answers, and nothing of pools, as a restart mends none."""
    return {"live": True}


@app.get("/slow")
async def slow(seconds: Annotated[float, Query(ge=0, le=60)] = 1.0) -> dict[str, float]:
    """Hold a connection while doing something else: the mistake that empties pools."""
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
        await asyncio.sleep(seconds)
    return {"held": seconds}
