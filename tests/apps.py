"""Small applications, one for each kind of pool, that say what they met: the same whether somebody watches or not."""

from __future__ import annotations

import asyncio
import re
import traceback

import httpcore
import redis
import redis.asyncio
from doubles import AsyncDbapi, Dbapi, Server, async_line, async_network, line, network
from sqlalchemy import create_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, QueuePool
from sqlalchemy.util import greenlet_spawn


def told(error, own):
    """What an application can see of an error, of its traceback the end; *own* is one that it would know again."""
    if error is None:
        return None
    tail = [f"{frame.name} {frame.line}" for frame in traceback.extract_tb(error.__traceback__)[-1:]]
    behind = [told(one, own) for one in (error.__context__, error.__cause__)]
    said = re.sub(r"\b[0-9a-f]{8,}\b", "<id>", str(error))
    said = re.sub(r" by <Task .*>", "", said)  # AnyIO: whether the deadline had passed on entry or passes later
    return type(error).__qualname__, said, error is own, tail, *behind


class App:
    """
    Borrows and gives back in every way there is.

    Attributes:
        target: Who watches its pools.
        said: What it met, in plain values.
    """

    target = ""

    def __init__(self):
        self.server = Server()
        self.said = []
        self.own = None
        self.pool = self.make()

    def refuse(self):
        """Let the server refuse the next connection."""
        self.own = self.server.refusal = ConnectionRefusedError("the server's own")

    def note(self, *what):
        """Say it."""
        self.said.append((*what, self.server.opened, self.server.closed))

    def failed(self, error):
        """Say what went wrong."""
        self.note(told(error, self.own))

    def go(self):
        """Do everything, and return what was met."""
        raise NotImplementedError


# -- SQLAlchemy ----------------------------------------------------------------------------


class SQLAlchemy(App):
    target = "sqlalchemy"
    kind, url, dbapi = QueuePool, "sqlite://", Dbapi

    def make(self):
        options = {"pool_size": 2, "max_overflow": 1, "pool_timeout": 0, "poolclass": self.kind}
        options |= {"logging_name": "orders"}
        return create_engine(self.url, creator=lambda: self.dbapi(self.server), _initialize=False, **options)

    def take(self):
        try:
            held = self.pool.raw_connection()
        except Exception as error:
            self.failed(error)
            return None
        self.note(type(held).__name__, type(held.dbapi_connection).__name__)
        return held

    def go(self):
        one, two, three = self.take(), self.take(), self.take()
        self.take()  # there is none
        for held in (one, two, three):
            self.note(held.close())
        one, two = self.take(), self.take()
        self.note(one.invalidate(), two.detach(), two.close(), one.close())
        self.refuse()
        self.take()
        one = self.take()
        self.note(self.pool.dispose(), one.close())
        del one
        one = self.take()
        self.note(self.pool.pool.status(), one.close())
        self.pool.dispose()
        return self.said


class ForgetfulSQLAlchemy(SQLAlchemy):
    def go(self):
        for _ in range(2):
            self.take()  # and the finaliser gives it back
        return super().go()


class AsyncSQLAlchemy(SQLAlchemy):
    kind, url, dbapi = AsyncAdaptedQueuePool, "sqlite+aiosqlite://", AsyncDbapi

    def all(self):
        return greenlet_spawn(super().go)

    def go(self):
        return asyncio.run(self.all())


# -- redis ---------------------------------------------------------------------------------


class Redis(App):
    target = "redis"
    kind, more = redis.ConnectionPool, {}

    def make(self):
        return self.kind(connection_class=line(self.server), max_connections=2, host="cache", **self.more)

    def take(self):
        try:
            held = self.pool.get_connection()
        except Exception as error:
            self.failed(error)
            return None
        self.note(type(held).__name__)
        return held

    def go(self):
        one, two = self.take(), self.take()
        self.take()  # there is none
        self.note(self.pool.release(one), self.pool.release(two))
        one = self.take()
        self.note(one.disconnect(), one.connect(), self.pool.release(one), self.pool.disconnect())
        self.refuse()
        self.take()
        one = self.take()
        self.note(self.pool.disconnect(), self.pool.release(one))
        return self.said


class BlockingRedis(Redis):
    kind, more = redis.BlockingConnectionPool, {"timeout": 0}


class AsyncRedis(App):
    target = "redis"
    kind, more = redis.asyncio.ConnectionPool, {}

    def make(self):
        return self.kind(connection_class=async_line(self.server), max_connections=2, host="cache", **self.more)

    async def take(self):
        try:
            held = await self.pool.get_connection()
        except Exception as error:
            self.failed(error)
            return None
        self.note(type(held).__name__)
        return held

    async def cancelled(self):
        """Ask, and be cancelled at the first turn."""
        task = asyncio.ensure_future(self.pool.get_connection())
        await asyncio.sleep(0)
        task.cancel()
        try:
            await self.pool.release(await task)
        except asyncio.CancelledError as error:
            self.failed(error)

    async def all(self):
        one, two = await self.take(), await self.take()
        if not self.more:
            await self.take()  # there is none
        self.note(await self.pool.release(one), await self.pool.release(two))
        one = await self.take()
        self.note(await one.disconnect(), await one.connect(), await self.pool.release(one))
        self.note(await self.pool.disconnect())
        self.refuse()
        await self.take()
        await self.cancelled()
        one = await self.take()
        self.note(await self.pool.disconnect(), await self.pool.release(one))
        return self.said

    def go(self):
        return asyncio.run(self.all())


class AsyncBlockingRedis(AsyncRedis):
    kind, more = redis.asyncio.BlockingConnectionPool, {"timeout": None}


# -- httpx ---------------------------------------------------------------------------------


Stream, Network = network(httpcore)
AsyncStream, AsyncNetwork = async_network(httpcore)


def asked():
    """A request that does not wait for a connection."""
    request = httpcore.Request("GET", "http://example.org/", headers=[("Host", "example.org")])
    request.extensions["timeout"] = {"pool": 0.0001}
    return request


LIMITS = {"max_connections": 2, "max_keepalive_connections": 1}


class HTTP(App):
    target = "httpx"

    def make(self):
        return httpcore.ConnectionPool(network_backend=Network(self.server), **LIMITS)

    def take(self):
        try:
            answer = self.pool.handle_request(asked())
        except Exception as error:
            self.failed(error)
            return None
        self.note(type(answer).__name__, answer.status)
        return answer

    def go(self):
        one, two = self.take(), self.take()
        self.take()  # there is none
        for answer in (one, two):
            self.note(answer.read(), answer.close())
        one = self.take()
        self.note(one.close())  # unread
        self.refuse()
        self.take()
        one = self.take()
        self.note(one.read(), one.close(), self.pool.close())
        return self.said


class AsyncHTTP(App):
    target = "httpx"

    def make(self):
        return httpcore.AsyncConnectionPool(network_backend=AsyncNetwork(self.server), **LIMITS)

    async def take(self):
        try:
            answer = await self.pool.handle_async_request(asked())
        except Exception as error:
            self.failed(error)
            return None
        self.note(type(answer).__name__, answer.status)
        return answer

    async def cancelled(self):
        """Ask, and be cancelled at the first turn."""
        task = asyncio.ensure_future(self.pool.handle_async_request(asked()))
        await asyncio.sleep(0)
        task.cancel()
        try:
            await (await task).aclose()
        except asyncio.CancelledError as error:
            self.failed(error)

    async def all(self):
        one, two = await self.take(), await self.take()
        await self.take()  # there is none
        for answer in (one, two):
            self.note(await answer.aread(), await answer.aclose())
        one = await self.take()
        self.note(await one.aclose())  # unread
        self.refuse()
        await self.take()
        await self.cancelled()
        one = await self.take()
        self.note(await one.aread(), await one.aclose(), await self.pool.aclose())
        return self.said

    def go(self):
        return asyncio.run(self.all())


APPS = [
    SQLAlchemy,
    ForgetfulSQLAlchemy,
    AsyncSQLAlchemy,
    Redis,
    BlockingRedis,
    AsyncRedis,
    AsyncBlockingRedis,
    HTTP,
    AsyncHTTP,
]
