"""Connections that do nothing, and pools on them: no I/O hides what we add."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

URL = "http://example.org/"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Dbapi:
    """A DBAPI connection."""

    def rollback(self) -> None: ...
    def close(self) -> None: ...
    def terminate(self) -> None: ...
    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


class Redis:
    """A connection of redis-py or valkey-py."""

    def __init__(self, **_: Any) -> None:
        self.pid = os.getpid()

    def connect(self) -> None: ...
    def disconnect(self, *_: Any) -> None: ...
    def re_auth(self) -> None: ...
    def can_read(self, *_: float) -> bool:
        return False

    def should_reconnect(self) -> bool:
        return False


class AsyncRedis:
    """The same for asyncio."""

    is_connected = True

    def __init__(self, **_: Any) -> None: ...
    async def connect(self) -> None: ...
    async def disconnect(self, *_: Any) -> None: ...
    async def re_auth(self) -> None: ...
    async def can_read(self) -> bool:
        return False

    async def can_read_destructive(self) -> bool:
        return False

    def should_reconnect(self) -> bool:
        return False


def in_memory(library: Any) -> Any:
    """A network for httpcore whose every connection has an answer ready."""

    class Stream(library.NetworkStream):  # type: ignore[misc, name-defined]  # whichever it is
        def read(self, *_: Any, **__: Any) -> bytes:
            return ANSWER

        def write(self, *_: Any, **__: Any) -> None: ...
        def close(self) -> None: ...
        def get_extra_info(self, _: str) -> Any: ...

    class Backend(library.NetworkBackend):  # type: ignore[misc, name-defined]  # the same
        def connect_tcp(self, *_: Any, **__: Any) -> Any:
            return Stream()

    return Backend()


def async_in_memory(library: Any) -> Any:
    """The same for asyncio."""

    class Stream(library.AsyncNetworkStream):  # type: ignore[misc, name-defined]  # the same
        async def read(self, *_: Any, **__: Any) -> bytes:
            return ANSWER

        async def write(self, *_: Any, **__: Any) -> None: ...
        async def aclose(self) -> None: ...
        def get_extra_info(self, _: str) -> Any: ...

    class Backend(library.AsyncNetworkBackend):  # type: ignore[misc, name-defined]  # the same
        async def connect_tcp(self, *_: Any, **__: Any) -> Any:
            return Stream()

    return Backend()


# -- one pool of each library, and how one borrows from it ------------------------------


class SQLAlchemyPool:
    """A pool of SQLAlchemy, without an engine unless it is to have a name."""

    distribution = "sqlalchemy"

    def __init__(self, size: int = 5, host: str | None = None) -> None:
        from sqlalchemy.pool import QueuePool

        self.engine = None if host is None else _engine(size, host)
        self.pool = QueuePool(Dbapi, pool_size=size) if self.engine is None else self.engine.pool

    def borrow(self) -> Any:
        return self.pool.connect()

    def give_back(self, held: Any) -> None:
        held.close()

    def cycle(self) -> None:
        self.pool.connect().close()

    def close(self) -> None:
        self.pool.dispose()


def _engine(size: int, host: str) -> Any:
    from sqlalchemy import create_engine
    from sqlalchemy.pool import QueuePool

    url = f"postgresql+psycopg://{host}/app"
    return create_engine(url, creator=Dbapi, poolclass=QueuePool, pool_size=size, _initialize=False)


class RedisPool:
    """A pool of redis-py."""

    distribution = "redis"

    def __init__(self, size: int = 5, host: str | None = None) -> None:
        from redis import ConnectionPool

        self.pool = ConnectionPool(connection_class=Redis, max_connections=size, host=host or "localhost")
        self._asked = asked()

    def borrow(self) -> Any:
        return self.pool.get_connection(*self._asked)

    def give_back(self, held: Any) -> None:
        self.pool.release(held)

    def cycle(self) -> None:
        self.pool.release(self.pool.get_connection(*self._asked))

    def close(self) -> None:
        self.pool.disconnect()


def asked() -> tuple[str, ...]:
    """The arguments of `get_connection` that this version's client gives."""
    return () if tuple(map(int, version("redis").split(".")[:2])) >= (5, 3) else ("GET",)


class HttpcorePool:
    """A pool of httpcore; what is borrowed is an answer whose body is still to come."""

    distribution = "httpcore"

    def __init__(self, size: int = 5, host: str | None = None) -> None:
        self._library = importlib.import_module("httpcore")
        backend = in_memory(self._library)
        limits = {"max_connections": size, "max_keepalive_connections": size}
        self.pool = self._library.ConnectionPool(network_backend=backend, **limits)
        self._url = URL if host is None else f"http://{host}/"

    def borrow(self) -> Any:
        return self.pool.handle_request(self._library.Request("GET", self._url, headers=[("Host", "example.org")]))

    def give_back(self, held: Any) -> None:
        held.read()
        held.close()

    def cycle(self) -> None:
        self.pool.request("GET", self._url)

    def close(self) -> None:
        self.pool.close()


# Qdrant has no row: nothing of ours stands on the way of its requests, so there is nothing to measure there.
# If it ever gets hooks, its stub belongs here, and every benchmark and test will take it up.
POOLS: dict[str, Callable[..., Any]] = {"sqlalchemy": SQLAlchemyPool, "redis": RedisPool, "httpx": HttpcorePool}
