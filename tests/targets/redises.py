"""The pools of redis-py and valkey-py, sync and asyncio, behind one face; and whether the metrics are true."""

from __future__ import annotations

import asyncio
import gc
import importlib
import importlib.metadata
import inspect
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

from valkeys import HOST

from otel_pools import _vocabulary as words
from otel_pools.testing import Export

LIBRARIES = tuple(name for name in ("redis", "valkey") if find_spec(name))
FLAVOURS = ("sync", "sync-blocking", "asyncio", "asyncio-blocking")
SECONDS = 5  # for everything that must happen


class Kind:
    """
    One of the four kinds of pool, of one library.

    Attributes:
        package: ``redis`` or ``redis.asyncio``, or valkey's.
        version: The library's; valkey-py 6 is a fork of redis-py 5.0.
    """

    def __init__(self, name):
        self.name = name
        self.library, _, self.flavour = name.partition(" ")
        self.is_async = self.flavour.startswith("asyncio")
        self.is_blocking = self.flavour.endswith("blocking")
        self.root = importlib.import_module(self.library)
        self.package = importlib.import_module(f"{self.library}.asyncio") if self.is_async else self.root
        self.version = version(self.library)
        self.errors = self.root.exceptions

    def __repr__(self):
        return f"<Kind {self.name} {'.'.join(map(str, self.version))}>"

    @property
    def pool_class(self):
        return self.package.BlockingConnectionPool if self.is_blocking else self.package.ConnectionPool

    @property
    def queues_slots(self):
        """Whether the pool is a queue with a None for each connection that is not made yet."""
        return self.is_blocking and (not self.is_async or self.is_first)

    @property
    def counts_created(self):
        """Whether the pool counts what it has made, rather than what it has."""
        return not self.is_blocking and (not self.is_async or self.is_first)

    @property
    def is_first(self):
        """redis-py 5.0.0, whose asyncio pools are still those of 4.6."""
        return self.library == "redis" and self.version < (5, 0, 1)

    def is_redis(self, since, until=(99,)):
        """Whether it is redis-py, of a version in this half-open range."""
        return self.library == "redis" and since <= self.version < until

    def client(self, pool, **options):
        return self.client_class(connection_pool=pool, **options)

    @property
    def client_class(self):
        """By the library's name; by the other's too, as an asyncio client, in valkey-py from 6.1 on alone."""
        return getattr(self.package, self.library.title())

    def retries(self, number):
        """So many retries, at once, of a command or a connection."""
        where = f"{self.library}.asyncio" if self.is_async else self.library
        backoff = importlib.import_module(f"{self.library}.backoff")
        return importlib.import_module(f"{where}.retry").Retry(backoff.NoBackoff(), number)

    def run(self, coroutine):
        """Run *coroutine* in a loop; or without any, if it has nothing to wait for."""
        if self.is_async:
            return asyncio.run(coroutine)
        try:
            coroutine.send(None)
        except StopIteration as end:
            return end.value
        raise RuntimeError("a scenario of a sync pool waits for something")


def version(library):
    """As three numbers."""
    return tuple(int(part) for part in importlib.metadata.version(library).split(".")[:3])


def kinds(*flavours, libraries=LIBRARIES):
    """The names of these kinds, of all libraries that are there."""
    return [f"{library} {flavour}" for library in libraries for flavour in flavours or FLAVOURS]


class Part(Export):
    """What one collection brought about the pools of one name."""

    def __init__(self, export, name):
        self.metrics = export.metrics
        self.name = name

    def points(self, name, **where):
        key = "db__client__connection__pool__name" if name.startswith("db.") else "otel_pools__pool__name"
        return super().points(name, **{key: self.name}, **where)


class Job:
    """A call in a thread of its own, to be awaited like a task."""

    def __init__(self, future):
        self.future = future

    def __await__(self):
        return self.future.result(SECONDS)
        yield


class Stage:
    """
    The pools of one name, on one server, and the question whether the metrics are true.

    Scenarios are written once, as coroutines; with a sync library they run
    without a loop, and nothing in them ever waits.
    """

    def __init__(self, kind, server, telemetry):
        self.kind, self.server, self.telemetry = kind, server, telemetry
        self.name = f"t{uuid.uuid4().hex[:8]}"
        self.pools = []
        self._threads = None if kind.is_async else ThreadPoolExecutor(16)

    # -- what a scenario does --------------------------------------------------

    def options(self, **options):
        """Of a small pool with little patience, unless they are given."""
        chosen = {"host": HOST, "port": self.server.port, "client_name": self.name, "max_connections": 2}
        if self.kind.is_blocking:
            chosen["timeout"] = 0.05
        return {**chosen, "retry": self.kind.retries(0), **options}

    def open(self, **options):
        return self.keep(self.kind.pool_class(**self.options(**options)))

    def keep(self, pool):
        """Disconnect this pool at the end."""
        self.pools.append(pool)
        return pool

    def client(self, **options):
        """A client of a pool of its own."""
        return self.kind.client(self.open(**options))

    def both(self, **options):
        """A pool and a client of it."""
        pool = self.open(**options)
        return pool, self.kind.client(pool)

    async def do(self, call, *args, **kwargs):
        """Call it, and wait if it is a coroutine."""
        result = call(*args, **kwargs)
        return await result if inspect.isawaitable(result) else result

    async def borrow(self, pool):
        # The command's name is demanded up to 5.2, and from 5.3 on there is a warning of it.
        parameters = inspect.signature(type(pool).get_connection).parameters
        args = ("GET",) if parameters["command_name"].default is inspect.Parameter.empty else ()
        return await self.do(pool.get_connection, *args)

    def start(self, call, *args, **kwargs):
        """Call it in a task or a thread of its own; the result can be awaited, or its error."""
        if self.kind.is_async:
            return asyncio.ensure_future(self.do(call, *args, **kwargs))
        return Job(self._threads.submit(call, *args, **kwargs))

    async def start_blocking(self, client):
        """Let a command wait at the server, until something is pushed to the list of our name."""
        job = self.start(client.blpop, [self.name], timeout=SECONDS)
        waits = f"name={self.name} "
        assert await self.comes(
            lambda: any(waits in row and "cmd=blpop" in row for row in self.server.ask("CLIENT", "LIST").splitlines())
        )
        return job

    def start_borrowing(self, pool):
        """Borrow in a task or a thread of its own, and give back at once."""

        async def use():
            await self.do(pool.release, await self.borrow(pool))

        if self.kind.is_async:
            return asyncio.ensure_future(use())
        return Job(self._threads.submit(self.kind.run, use()))

    async def sleep(self, seconds):
        await self.do(asyncio.sleep if self.kind.is_async else time.sleep, seconds)

    async def comes(self, condition):
        """Whether *condition* comes true in time."""
        deadline = time.monotonic() + SECONDS
        while not condition():
            if time.monotonic() > deadline:
                return False
            await self.sleep(0.01)
        return True

    async def close(self):
        """Disconnect every pool."""
        while self.pools:
            await self.do(self.pools.pop().disconnect)
        if self._threads is not None:
            self._threads.shutdown()

    # -- what must be true -----------------------------------------------------

    def read(self):
        return Part(self.telemetry.read(), self.name)

    def orphaned(self):
        """What is missing is told if it was missing at the last reading too."""
        self.read()
        return self.read().value("otel_pools.connection.orphaned")

    async def sees(self, number):
        """Whether the server comes to see so many connections of this name."""
        return await asyncio.to_thread(self._sees, number) if self.kind.is_async else self._sees(number)

    def _sees(self, number):
        try:
            return self.server.settles(self.name, number)
        except ConnectionError:  # a failover hangs up on whoever asks, too
            return self.server.settles(self.name, number)

    async def is_true(self, used, idle, unconnected=0, unnoticed=0, orphaned=0):
        """
        Compare with the truth; *unconnected* of those in use the server does not have now.

        Of *unnoticed* ones the client has not seen that yet. Used and idle are
        what the scenario says, both together what the server sees, and so is
        created minus closed.
        """
        open = used + idle - unconnected
        assert await self.sees(open), f"the server sees {self.server.clients(self.name)}, not {open}"
        self.read()
        now = self.read()

        created, closed = now.value("otel_pools.connection.created"), now.closed()
        same("used, idle", (now.count("used"), now.count("idle")), (used, idle))
        same("unknown reasons", set(closed) - set(words.REASONS), set())
        same("created - closed", created - sum(closed.values()), open + unnoticed)
        same("create_time", now.value("db.client.connection.create_time"), created)
        same("orphaned", now.value("otel_pools.connection.orphaned"), orphaned)
        return now

    async def is_settled(self, idle, orphaned=0):
        """At rest: nobody holds or waits, every attempt was a wait, and every success a use."""
        now = await self.is_true(0, idle, orphaned=orphaned)

        worked = sum(count for (_, error), count in now.checkouts().items() if error is None)
        same("wait_time", now.value("db.client.connection.wait_time"), now.value("otel_pools.checkouts"))
        same("use_time", now.value("db.client.connection.use_time"), worked)
        same("wait.oldest", now.value("otel_pools.wait.oldest"), 0)
        same("use.oldest", now.value("otel_pools.use.oldest"), 0)
        same("pending_requests", now.value("db.client.connection.pending_requests"), 0)
        return now

    async def is_over(self):
        """The pools are closed, and perhaps gone: nothing is open that was opened."""
        gc.collect()
        assert await self.sees(0), f"the server still sees {self.server.clients(self.name)}"
        now = self.read()

        same("idle", now.count("idle"), 0)
        same("closed", sum(now.closed().values()), now.value("otel_pools.connection.created"))


def same(what, told, true):
    """Pytest explains assertions of test modules only."""
    assert told == true, f"{what}: told {told}, but it is {true}"
