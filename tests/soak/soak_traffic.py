"""What the application under soak does with its pools: asks, holds, cancels, drops, disposes; and counts for itself."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

HOST = "127.0.0.1"
PAUSE = 0.08  # seconds between two operations of one worker, on average
RUSH, EVERY = 1.0, 8.0  # for so many seconds, every so often, all workers hold what they get
SLOW = 0.3  # for so long
PATIENCE = 0.2  # how long they wait for a connection of a full pool
TIMEOUT = 1.0  # and for a server that says nothing
TRIES = 40  # of a pool that must be well again, half a second apart


class Counts:
    """What the application has counted itself, of one pool name."""

    def __init__(self):
        self._numbers = Counter()
        self._lock = threading.Lock()

    def __repr__(self):
        return f"<Counts {dict(self._numbers)}>"

    def add(self, what, number=1):
        with self._lock:
            self._numbers[what] += number

    def told(self):
        with self._lock:
            return dict(self._numbers)


class Gate:
    """Lets workers go on, stops them between two operations, or sends them home."""

    def __init__(self, workers):
        self.workers = workers
        self.state = "resting"
        self._waiting = 0
        self._changed = threading.Condition()

    def __repr__(self):
        return f"<Gate [{self.state}, {self._waiting} of {self.workers} workers at rest]>"

    def become(self, state):
        with self._changed:
            self.state = state
            self._changed.notify_all()

    def all_rest(self, seconds):
        """Whether all workers come to rest in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._waiting == self.workers, seconds)

    def _rests(self, more):
        with self._changed:
            self._waiting += more
            self._changed.notify_all()

    def passes(self):
        """Whether to go on, once it is known; for threads."""
        with self._changed:
            if self.state == "resting":
                self._rests(+1)
                self._changed.wait_for(lambda: self.state != "resting")
                self._rests(-1)
            return self.state == "working"

    async def passes_task(self):
        """The same for tasks."""
        if self.state == "resting":
            self._rests(+1)
            while self.state == "resting":
                await asyncio.sleep(0.02)
            self._rests(-1)
        return self.state == "working"


def rushing():
    return time.monotonic() % EVERY < RUSH


class Traffic:
    """
    The traffic through the pools of one name.

    Attributes:
        acts: What a worker may do next, and how many times in a thousand; `usual` for the rest.
        workers: How many there are.
    """

    acts = {}
    workers = 6

    def __init__(self, name, place, named=lambda thing, name: None):
        self.name = name
        self.place = place
        self.counts = Counts()
        self.trouble = ""  # the newest, of a pool that should be well
        self._named = named

    def known(self, thing):
        """The same thing, called by our name, if somebody wants to know."""
        self._named(thing, self.name)
        return thing

    def __repr__(self):
        return f"<{type(self).__name__} {self.name}>"

    def chosen(self, chance):
        if rushing():
            return self.hold
        dice = chance.randrange(1000)
        for name, weight in self.acts.items():
            dice -= weight
            if dice < 0:
                return getattr(self, name)
        return self.usual

    def astray(self):
        """How many places of its pool the library has lost, as far as the application can see."""
        return 0

    def failed(self, error):
        self.counts.add("errors")
        self.counts.add(f"error {type(error).__name__}")


class Threads(Traffic):
    """Traffic of threads."""

    def mend(self):
        """Before anybody goes on: what an operator would do, had he been called."""

    def is_dead(self):
        """Whether its library has lost every place of its pool."""
        return False

    def work(self, gate, seed):
        chance = random.Random(seed)
        while gate.passes():
            self._once(self.chosen(chance))
            time.sleep(chance.uniform(0, 2 * PAUSE))

    def _once(self, act):
        try:
            act()
        except Exception as error:
            self.failed(error)
        else:
            self.counts.add("done")

    def refresh(self):
        """Use the pool until nothing is left of what went wrong."""
        for _ in range(TRIES):
            try:
                self.touch()
            except Exception as error:
                self.failed(error)
                self.trouble = repr(error)
                if self.is_dead():
                    self.mend()
                time.sleep(0.5)
            else:
                return True
        return False


class Tasks(Traffic):
    """Traffic of asyncio tasks, of which some are cancelled."""

    impatient = 60  # times in a thousand
    begun = 1  # turns of the loop after which a task may be cancelled
    patient = ()  # what is never cancelled

    async def mend(self):
        """As of threads."""

    async def work(self, gate, seed):
        chance = random.Random(seed)
        while await gate.passes_task():
            act = self.chosen(chance)
            seconds = chance.choice((0.0, 0.001, 0.005, 0.03)) if chance.randrange(1000) < self.impatient else None
            if act.__name__ in self.patient:
                seconds = None
            await self._once(act, seconds)
            await asyncio.sleep(chance.uniform(0, 2 * PAUSE))

    async def _once(self, act, seconds):
        try:
            await (act() if seconds is None else cancelled_after(act(), self.begun, seconds))
        except Exception as error:
            self.failed(error)
        except asyncio.CancelledError:
            self.counts.add("cancelled")
        else:
            self.counts.add("done")

    async def refresh(self):
        for _ in range(TRIES):
            try:
                await self.touch()
            except Exception as error:
                self.failed(error)
                self.trouble = repr(error)
                await asyncio.sleep(0.5)
            else:
                return True
        return False


async def cancelled_after(job, turns, seconds):
    task = asyncio.ensure_future(job)
    for _ in range(turns):
        await asyncio.sleep(0)
    await asyncio.wait([task], timeout=seconds)
    task.cancel()
    return await task


# -- SQLAlchemy ------------------------------------------------------------------------


ENGINE = {"pool_size": 3, "max_overflow": 2, "pool_timeout": PATIENCE, "pool_pre_ping": True, "pool_recycle": 15}


class PostgresThreads(Threads):
    """SQLAlchemy and psycopg."""

    acts = {"hold": 20, "fail": 20, "invalidate": 15, "drop": 10, "ring": 5, "detach": 10, "dispose": 3, "visit": 5}

    def open(self):
        self.engine = self._engine()

    def close(self):
        self.engine.dispose()

    def _engine(self):
        from sqlalchemy import create_engine

        asks = {"application_name": self.name, "connect_timeout": 2}
        return create_engine(self.place, connect_args=asks, pool_logging_name=self.name, **ENGINE)

    def borrow(self, connect=None):
        from sqlalchemy.exc import TimeoutError as PoolTimeout

        self.counts.add("asked")
        try:
            connection = (connect or self.engine.connect)()
        except PoolTimeout:
            self.counts.add("timeouts")
            raise
        self.counts.add("got")
        return connection

    def ask(self, question):
        with self.borrow() as connection:
            connection.exec_driver_sql(question)

    def usual(self):
        self.ask("SELECT 1")

    def hold(self):
        self.ask(f"SELECT pg_sleep({SLOW})")

    def fail(self):
        self.ask("SELECT 1 / 0")

    def invalidate(self):
        with self.borrow() as connection:
            connection.invalidate()

    def drop(self):
        self.borrow(self.engine.raw_connection)
        self.counts.add("dropped")

    def ring(self):
        """What only the garbage collector can give back."""
        ring = [self.borrow(self.engine.raw_connection)]
        ring.append(ring)
        self.counts.add("dropped")

    def detach(self):
        with self.borrow() as connection:
            connection.detach()

    def dispose(self):
        self.engine.dispose()

    def visit(self):
        """An engine for one question."""
        engine = self._engine()
        try:
            with self.borrow(engine.connect) as connection:
                connection.exec_driver_sql("SELECT 1")
        finally:
            engine.dispose()

    def touch(self):
        # First in, first out: each of those that lie in the pool has its turn.
        for _ in range(2 * ENGINE["pool_size"]):
            self.usual()


class PostgresTasks(Tasks):
    """SQLAlchemy and asyncpg."""

    acts = {"hold": 20, "fail": 20, "invalidate": 15, "drop": 5, "dispose": 3, "visit": 5}

    async def open(self):
        self.engine = self._engine()

    async def close(self):
        await self.engine.dispose()

    def _engine(self):
        from sqlalchemy.ext.asyncio import create_async_engine

        settings = {"server_settings": {"application_name": self.name}, "timeout": 2, "command_timeout": TIMEOUT}
        return create_async_engine(self.place, connect_args=settings, pool_logging_name=self.name, **ENGINE)

    async def borrow(self, connect=None):
        from sqlalchemy.exc import TimeoutError as PoolTimeout

        self.counts.add("asked")
        try:
            connection = await (connect or self.engine.connect)()
        except PoolTimeout:
            self.counts.add("timeouts")
            raise
        self.counts.add("got")
        return connection

    async def ask(self, question, engine=None):
        connection = await self.borrow((engine or self.engine).connect)
        try:
            await connection.exec_driver_sql(question)
        finally:
            await connection.close()

    async def usual(self):
        await self.ask("SELECT 1")

    async def hold(self):
        await self.ask(f"SELECT pg_sleep({SLOW})")

    async def fail(self):
        await self.ask("SELECT 1 / 0")

    async def invalidate(self):
        connection = await self.borrow()
        try:
            await connection.invalidate()
        finally:
            await connection.close()

    async def drop(self):
        await self.borrow(self.engine.raw_connection)
        self.counts.add("dropped")

    async def dispose(self):
        await self.engine.dispose()

    async def visit(self):
        engine = self._engine()
        try:
            await self.ask("SELECT 1", engine)
        finally:
            await engine.dispose()

    async def touch(self):
        for _ in range(2 * ENGINE["pool_size"]):
            await self.usual()


# -- Valkey ----------------------------------------------------------------------------

CONNECTIONS = 4


class ValkeyThreads(Threads):
    """redis-py and a blocking pool."""

    acts = {"hold": 20, "pipeline": 100, "wrong": 20, "dispose": 3, "visit": 10, "guest": 10}

    def open(self):
        self.client = self._client()
        self.all = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="refresh")

    def close(self):
        self.client.connection_pool.disconnect()
        self.all.shutdown()

    def _client(self):
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        pool = redis.BlockingConnectionPool(
            host=HOST,
            port=self.place,
            client_name=self.name,
            max_connections=CONNECTIONS,
            timeout=PATIENCE,
            socket_timeout=TIMEOUT,
            socket_connect_timeout=TIMEOUT,
            retry=Retry(NoBackoff(), 1),
        )
        return redis.Redis(connection_pool=pool)

    def ask(self, command, *args, **kwargs):
        self.counts.add("asked")
        try:
            return command(*args, **kwargs)
        except Exception as error:
            if str(error) == "No connection available.":
                self.counts.add("timeouts")
            raise

    def usual(self):
        self.ask(self.client.get, "goods")

    def hold(self):
        self.ask(self.client.blpop, ["nothing"], timeout=SLOW)

    def pipeline(self):
        self.ask(self.client.pipeline(transaction=True).set("goods", 1).get("goods").execute)

    def wrong(self):
        self.ask(self.client.lpush, "goods", 1)

    def dispose(self):
        self.client.connection_pool.disconnect()

    def visit(self):
        """A client for one question, which is closed."""
        client = self._client()
        try:
            self.ask(client.get, "goods")
        finally:
            client.connection_pool.disconnect()

    def guest(self):
        """And one that is dropped."""
        self.ask(self._client().get, "goods")

    def touch(self):
        # All at once, so that each of those that lie in the pool is used.
        for answer in [self.all.submit(self.hold) for _ in range(CONNECTIONS)]:
            answer.result()


class ValkeyTasks(Tasks):
    """redis-py's asyncio and a pool that refuses."""

    acts = {"hold": 20, "pipeline": 100, "wrong": 20, "dispose": 3, "visit": 10, "guest": 10}

    async def open(self):
        self.client = self._client()

    async def close(self):
        await self.client.connection_pool.disconnect()

    def _client(self):
        import redis.asyncio
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        pool = redis.asyncio.ConnectionPool(
            host=HOST,
            port=self.place,
            client_name=self.name,
            max_connections=CONNECTIONS,
            socket_timeout=TIMEOUT,
            socket_connect_timeout=TIMEOUT,
            retry=Retry(NoBackoff(), 1),
        )
        return redis.asyncio.Redis(connection_pool=pool)

    async def ask(self, command, *args, **kwargs):
        self.counts.add("asked")
        try:
            return await command(*args, **kwargs)
        except Exception as error:
            if str(error) == "Too many connections":
                self.counts.add("exhausted")
            raise

    async def usual(self):
        await self.ask(self.client.get, "goods")

    async def hold(self):
        await self.ask(self.client.blpop, ["nothing"], timeout=SLOW)

    async def pipeline(self):
        await self.ask(self.client.pipeline(transaction=True).set("goods", 1).get("goods").execute)

    async def wrong(self):
        await self.ask(self.client.lpush, "goods", 1)

    async def dispose(self):
        await self.client.connection_pool.disconnect()

    async def visit(self):
        client = self._client()
        try:
            await self.ask(client.get, "goods")
        finally:
            await client.connection_pool.disconnect()

    async def guest(self):
        await self.ask(self._client().get, "goods")

    async def touch(self):
        await asyncio.gather(*(self.hold() for _ in range(CONNECTIONS)))


# -- HTTP ------------------------------------------------------------------------------


class WebThreads(Threads):
    """
    httpx and HTTP/1.1.

    httpcore 1.0.9 loses the place of a connection that it gives to a request
    in the moment in which that gives up waiting. Who notices takes a new client.
    """

    acts = {"hold": 20, "goodbye": 20, "dropped": 20, "cut": 20, "unread": 20, "visit": 10, "guest": 5}

    def open(self):
        self.client = self._client()

    def close(self):
        self.client.close()

    def mend(self):
        if self.astray():
            self.close()
            self.open()
            self.counts.add("mended")

    def astray(self):
        """Nobody uses the pool, and these were never opened."""
        return sum(one._connection is None for one in self.client._transport._pool.connections)

    def is_dead(self):
        return self.astray() == CONNECTIONS

    def _client(self):
        import httpx

        limits = httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=3, keepalive_expiry=3.0)
        timeout = httpx.Timeout(TIMEOUT, pool=PATIENCE)
        return self.known(httpx.Client(base_url=self.place, limits=limits, timeout=timeout, trust_env=False))

    def ask(self, path, client=None, **options):
        import httpx

        client = client or self.client
        self.counts.add("asked")
        try:
            return client.send(client.build_request("GET", path), **options)
        except httpx.PoolTimeout:
            self.counts.add("timeouts")
            raise

    def usual(self):
        self.ask("/")

    def hold(self):
        self.ask(f"/slow?{SLOW}")

    def goodbye(self):
        self.ask("/close")

    def dropped(self):
        self.ask("/drop")

    def cut(self):
        self.ask("/cut")

    def unread(self):
        """An answer of which nobody wants to hear the rest."""
        self.ask("/stall", stream=True).close()

    def visit(self):
        with self._client() as client:
            self.ask("/", client)

    def guest(self):
        """A client that is dropped, with an answer that was not read."""
        self.ask("/", self._client(), stream=True)

    def touch(self):
        # Whoever asks the pool has it look at all its connections.
        self.usual()
        self.usual()


class WebTasks(Tasks):
    """httpx2 and HTTP/2."""

    workers = 10
    acts = {"hold": 50, "reset": 20, "visit": 10, "guest": 5}

    async def open(self):
        self.client = self._client()

    async def close(self):
        await self.client.aclose()

    def _client(self):
        import httpx2

        limits = httpx2.Limits(max_connections=2, keepalive_expiry=1.0)
        timeout = httpx2.Timeout(TIMEOUT, pool=PATIENCE)
        options = {"http1": False, "http2": True, "trust_env": False}
        return self.known(httpx2.AsyncClient(base_url=self.place, limits=limits, timeout=timeout, **options))

    async def ask(self, path, client=None, **options):
        import httpx2

        client = client or self.client
        self.counts.add("asked")
        try:
            return await client.send(client.build_request("GET", path), **options)
        except httpx2.PoolTimeout:
            self.counts.add("timeouts")
            raise

    async def usual(self):
        await self.ask("/")

    async def hold(self):
        await self.ask(f"/slow?{SLOW}")

    async def reset(self):
        await self.ask("/reset")

    async def visit(self):
        async with self._client() as client:
            await self.ask("/", client)

    async def guest(self):
        await self.ask("/", self._client())

    async def touch(self):
        # A second connection whose server has gone is noticed when it is too old, if the first one is well.
        await self.usual()
        await asyncio.sleep(1.1)
        await self.usual()


# -- Qdrant ----------------------------------------------------------------------------

GOODS = "goods"
GRPC = {
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.min_reconnect_backoff_ms": 200,
    "grpc.max_reconnect_backoff_ms": 400,
}


class VectorTasks(Tasks):
    """
    qdrant-client and gRPC.

    A call that is cancelled in the third turn of the loop, when gRPC knows of
    it and has not begun it, is in gRPC's books for ever as one that is under
    way (1.85); before, gRPC does not know of it. So none is cancelled before
    the sixth.
    """

    workers = 8
    begun = 6
    patient = ("stock",)  # which is several calls
    acts = {"hold": 50, "missing": 30, "stock": 40, "visit": 5}

    async def open(self):
        self.client = self._client()

    async def close(self):
        await self.client.close()

    def _client(self):
        from qdrant_client import AsyncQdrantClient

        rest, port = self.place
        options = {"grpc_port": port, "prefer_grpc": True, "grpc_options": dict(GRPC), "check_compatibility": False}
        return self.known(AsyncQdrantClient(host=HOST, port=rest, timeout=int(TIMEOUT), **options))

    async def ask(self, call, *args, **kwargs):
        self.counts.add("asked")
        answer = await call(*args, **kwargs)
        self.counts.add("got")
        return answer

    async def search(self, goods, seconds):
        from qdrant_client import models

        effort = models.SearchParams(hnsw_ef=max(int(seconds * 1000), 1))
        await self.ask(self.client.query_points, goods, [1.0, 2.0], limit=3, search_params=effort)

    async def usual(self):
        await self.ask(self.client.get_collections)

    async def hold(self):
        await self.search(GOODS, SLOW)

    async def missing(self):
        await self.search("nothing", 0)

    async def stock(self):
        """A server that was started anew has nothing."""
        from qdrant_client import models

        if GOODS not in [one.name for one in (await self.ask(self.client.get_collections)).collections]:
            size = models.VectorParams(size=2, distance=models.Distance.COSINE)
            await self.ask(self.client.create_collection, GOODS, vectors_config=size)
        await self.ask(self.client.upsert, GOODS, [models.PointStruct(id=1, vector=[1.0, 2.0])])

    async def visit(self):
        client = self._client()
        try:
            await self.ask(client.get_collections)
        finally:
            await client.close()

    async def touch(self):
        await self.stock()


KINDS = {
    "postgres-threads": PostgresThreads,
    "postgres-tasks": PostgresTasks,
    "valkey-threads": ValkeyThreads,
    "valkey-tasks": ValkeyTasks,
    "web-threads": WebThreads,
    "web-tasks": WebTasks,
    "vectors": VectorTasks,
}
