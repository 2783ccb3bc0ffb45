"""
A FastAPI application on an asyncio engine, whose pool becomes visible without a line of code.

Install::

    pip install 'otel-pools[sqlalchemy,otlp]' 'sqlalchemy[asyncio]' aiosqlite fastapi uvicorn

Run, with a Collector on this machine (collector-config/ has one)::

    export OTEL_SERVICE_NAME=fastapi-example
    export OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf
    export OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4318
    export OTEL_METRIC_EXPORT_INTERVAL=5000
    opentelemetry-instrument uvicorn examples.fastapi_app:app

And ask for more connections than there are::

    for i in $(seq 30); do curl -s 'http://127.0.0.1:8000/slow?seconds=5' & done

The pool is called ``example.db``: it has no name, so it goes by its database. Any other database will do, an empty one
too: ``export DATABASE_URL=postgresql+asyncpg://user@host/shop`` (and ``pip install asyncpg``).
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import FastAPI, Query
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

engine = create_async_engine(os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///./example.db"))


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Close the connections when the application ends, in the event loop that opened them."""
    yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)


@app.get("/items")
async def items() -> list[dict[str, Any]]:
    """Borrow a connection for as long as one query takes."""
    async with engine.connect() as connection:
        rows = await connection.execute(text("SELECT 1 AS id, 'lane' AS name UNION ALL SELECT 2, 'towel'"))
        return [dict(row) for row in rows.mappings()]


@app.get("/slow")
async def slow(seconds: Annotated[float, Query(ge=0, le=60)] = 1.0) -> dict[str, float]:
    """Hold a connection while doing something else: the mistake that empties pools."""
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
        await asyncio.sleep(seconds)  # a call to another service, say: it belongs after the block
    return {"held": seconds}
