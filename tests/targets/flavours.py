"""The ways SQLAlchemy reaches a database, each with an independent view of how many connections are open."""

from __future__ import annotations

import asyncio
import gc
import sqlite3
import time
import uuid
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import sqlalchemy
from sqlalchemy import create_engine, text
from sqlalchemy.pool import AsyncAdaptedQueuePool, QueuePool
from sqlalchemy.util import greenlet_spawn

SQLALCHEMY = tuple(int(part) for part in sqlalchemy.__version__.split(".")[:2])


@dataclass
class Flavour:
    """One dialect and driver; `run` calls a function as an application of that kind would."""

    name: str
    url: Any
    admin: Any = None  # a PostgreSQL to ask, instead of counting file descriptors
    app: str = field(default_factory=lambda: f"t{uuid.uuid4().hex[:8]}")

    @property
    def is_async(self):
        return any(driver in self.name for driver in ("asyncpg", "aiosqlite", "psycopg-async"))

    def run(self, scenario):
        """Call *scenario*; for an asyncio driver, inside a greenlet of a running loop, as AsyncEngine does."""
        if not self.is_async:
            return scenario()

        async def main():
            return await greenlet_spawn(scenario)

        return asyncio.run(main())

    def engine(self, **options):
        """A (sync view of an) engine with this driver."""
        if "asyncpg" in self.name:
            options.setdefault("connect_args", {"server_settings": {"application_name": self.app}})
        elif "psycopg" in self.name:
            options.setdefault("connect_args", {"application_name": self.app})
        if "sqlite" in self.name:  # before 2.0.38, a NullPool
            options.setdefault("poolclass", AsyncAdaptedQueuePool if self.is_async else QueuePool)
        if self.is_async:
            from sqlalchemy.ext.asyncio import create_async_engine

            return create_async_engine(self.url, **options).sync_engine
        return create_engine(self.url, **options)

    def open(self):
        """How many connections the server, or the operating system, sees."""
        if self.admin is None:
            path = self.url.removeprefix("sqlite:///").removeprefix("sqlite+aiosqlite:///")
            return sum(_target(fd) == path for fd in Path("/proc/self/fd").iterdir())
        return self.admin.backends(self.app)

    def settles(self, number):
        """Whether `open` comes to be *number*; a server takes a moment to see a connection go."""
        deadline = time.monotonic() + 5
        while self.open() != number:
            if time.monotonic() > deadline:
                return self.open() == number
            time.sleep(0.01)
        return True


def _target(fd):
    try:
        return str(fd.readlink())
    except OSError:
        return None


class Admin:
    """What PostgreSQL says about its backends."""

    def __init__(self, server):
        self.server = server

    def backends(self, app):
        """How many serve this application."""
        return self._ask(f"SELECT count(*) FROM pg_stat_activity WHERE application_name = '{app}'")

    def kill(self, app):
        """End them all, as a failover would."""
        return self._ask(
            f"SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = '{app}'"
        )

    def _ask(self, question):
        import asyncpg

        async def ask():
            connection = await asyncpg.connect(self.server.url("asyncpg").replace("+asyncpg", ""))
            try:
                return await connection.fetchval(question)
            finally:
                await connection.close()

        return asyncio.run(ask()) if _loopless() else _in_thread(ask)


def _loopless():
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return True
    return False


def _in_thread(ask):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as executor:
        return executor.submit(lambda: asyncio.run(ask())).result()


def flavour(name, request, tmp_path):
    """Make the flavour of this name."""
    if "pg" not in name and "postgres" not in name:
        return Flavour(name, f"{'sqlite+aiosqlite' if name == 'aiosqlite' else 'sqlite'}:///{tmp_path}/truth.db")
    server = request.getfixturevalue("postgres")
    driver = {"pg-asyncpg": "asyncpg", "pg-psycopg": "psycopg", "pg-psycopg-async": "psycopg_async"}[name]
    return Flavour(name, server.url(driver), Admin(server))


def names():
    """The flavours this environment can run."""
    drivers = {"sqlite": "sqlite3", "aiosqlite": "aiosqlite", "pg-asyncpg": "asyncpg"}
    if SQLALCHEMY >= (2, 0):
        drivers |= {"pg-psycopg": "psycopg", "pg-psycopg-async": "psycopg"}
    return [name for name, module in drivers.items() if find_spec(module)]


def ping(connection):
    """Do something with a Connection that only works if it is open."""
    return connection.execute(text("SELECT 1")).scalar()


class CountingCreator:
    """A creator for stub-free tests that must count: real SQLite connections, and how many were made and closed."""

    def __init__(self):
        self.made = self.shut = 0
        self.fail = False

    def __call__(self):
        if self.fail:
            raise sqlite3.OperationalError("down")
        self.made += 1
        return sqlite3.connect(":memory:", factory=self._connection, check_same_thread=False)

    def _connection(self, *args, **kwargs):
        creator = self

        class Counted(sqlite3.Connection):
            def close(self):
                creator.shut += 1
                super().close()

        return Counted(*args, **kwargs)

    @property
    def open(self):
        gc.collect()
        return self.made - self.shut
