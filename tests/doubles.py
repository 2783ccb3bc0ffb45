"""Connections that lead nowhere, for each kind of pool; a server stands behind them that knows which are open."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Clock:
    """A clock that stands still until somebody moves it."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Server:
    """
    What the connections lead to.

    Attributes:
        refusal: The error with which it refuses the next connection, if it is to.
    """

    def __init__(self):
        self.open = set()
        self.opened = self.closed = 0
        self.refusal = None

    def __repr__(self):
        return f"<Server [{len(self.open)} connections]>"

    def connect(self, connection):
        """Open it."""
        refusal, self.refusal = self.refusal, None
        if refusal is not None:
            raise refusal
        self.open.add(id(connection))
        self.opened += 1

    def disconnect(self, connection):
        """Close it, if it is open."""
        if id(connection) in self.open:
            self.open.discard(id(connection))
            self.closed += 1


# -- SQLAlchemy ----------------------------------------------------------------------------


class Dbapi:
    """A connection of a driver."""

    def __init__(self, server):
        self.server = server
        self.connect()

    def connect(self):
        self.server.connect(self)

    def rollback(self): ...
    def close(self):
        self.server.disconnect(self)

    terminate = close

    def __del__(self):
        # As drivers do for who did not: of a pool that was replaced, and of which nothing is left.
        self.server.disconnect(self)


class AsyncDbapi(Dbapi):
    """What SQLAlchemy puts around one of asyncio: its methods wait, in their greenlet, for turns of the event loop."""

    def connect(self):
        wait()
        wait()
        super().connect()

    def rollback(self):
        wait()

    def close(self):
        super().close()
        wait()

    def terminate(self):
        """Of the garbage collector it does not wait."""
        from sqlalchemy.util.concurrency import in_greenlet

        super().close()
        if in_greenlet():
            wait()


def wait():
    """One turn."""
    from sqlalchemy.util import await_only

    await_only(asyncio.sleep(0))


# -- redis ---------------------------------------------------------------------------------


class Line:
    """What stands for a socket, or for asyncio's streams."""

    def __init__(self, server, connection):
        self.server = server
        self.key = connection

    def shutdown(self, *_): ...
    def close(self):
        self.server.disconnect(self.key)

    async def wait_closed(self):
        await asyncio.sleep(0)


class Bare:
    """A connection of redis-py that is nobody's."""

    host, port = "stub", 0

    def __init__(self, **_):
        super().__init__(protocol=2)

    def repr_pieces(self):
        return []

    def _host_error(self):
        return "stub"


def line(server):
    """A class of connections, opened and closed by redis-py's own methods."""
    from redis.connection import AbstractConnection

    class Stub(Bare, AbstractConnection):
        def _connect(self):
            server.connect(self)
            return Line(server, self)

        def on_connect(self): ...
        def on_connect_check_health(self, check_health=True): ...
        def can_read(self, timeout=0):
            return False

    return Stub


def async_line(server):
    """The same for asyncio: to open takes two turns of the event loop, to close one."""
    from redis.asyncio.connection import AbstractConnection

    class Stub(Bare, AbstractConnection):
        async def _connect(self):
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            server.connect(self)
            self._reader = self._writer = Line(server, self)

        async def on_connect(self): ...
        async def on_connect_check_health(self, check_health=True): ...
        async def can_read_destructive(self):
            return False

        can_read = can_read_destructive

    return Stub


# -- httpcore ------------------------------------------------------------------------------


def network(library):
    """Of httpcore or httpcore2: one end of a connection that has an answer ready, and the network to that server."""

    class Stream(library.NetworkStream):
        def __init__(self, server):
            server.connect(self)
            self.server = server

        def read(self, *_, **__):
            return ANSWER

        def write(self, *_, **__): ...
        def close(self):
            self.server.disconnect(self)

        def get_extra_info(self, _): ...

    class Network(library.NetworkBackend):
        def __init__(self, server):
            self.server = server

        def connect_tcp(self, *_, **__):
            return Stream(self.server)

    return Stream, Network


def async_network(library):
    """The same for asyncio and trio: each thing that is done takes a turn of the event loop, to open takes two."""
    from anyio.lowlevel import checkpoint

    class Stream(library.AsyncNetworkStream):
        def __init__(self, server):
            server.connect(self)
            self.server = server

        async def read(self, *_, **__):
            await checkpoint()
            return ANSWER

        async def write(self, *_, **__):
            await checkpoint()

        async def aclose(self):
            self.server.disconnect(self)
            await checkpoint()

        def get_extra_info(self, _): ...

    class Network(library.AsyncNetworkBackend):
        def __init__(self, server):
            self.server = server

        async def connect_tcp(self, *_, **__):
            await checkpoint()
            await checkpoint()
            return Stream(self.server)

    return Stream, Network


# -- gRPC ----------------------------------------------------------------------------------


class CallServer:
    """
    A real gRPC server on 127.0.0.1 that answers calls for Qdrant's collections: there are none.

    A call whose metadata have a ``name`` waits until `let_go`; one that says ``refuse`` is refused.

    Attributes:
        running: Of each connection that it knows, how many calls it has begun and not ended.
    """

    HOST = "127.0.0.1"
    # Below those that systems give to clients: there, a client that retries during an outage can meet itself.
    PORTS = range(20000, 32000)

    def __init__(self, streams):
        self.streams = streams
        self.port = None
        self.running = Counter()
        self._free = defaultdict(threading.Event)
        self._lock = threading.Lock()
        self.start()

    def start(self):
        """Serve, on the port that it had before."""
        import grpc

        # Without overload protection, which refuses calls of clients that keep to the limit.
        limits = {"grpc.max_concurrent_streams": self.streams, "grpc.http.overload_protection": 0}
        options = [*limits.items(), ("grpc.so_reuseport", 0)]
        self._threads = ThreadPoolExecutor(64)
        self._server = grpc.server(self._threads, options=options)
        answer = grpc.unary_unary_rpc_method_handler(self._answer)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("qdrant.Collections", {"List": answer}),)
        )
        self.port = self._listen(self.port)
        self._server.start()

    def stop(self):
        """End, with all calls and connections."""
        self._server.stop(grace=None).wait()
        self._threads.shutdown()

    def let_go(self, name):
        """Answer this call, or do so at once when it comes."""
        self._free[name].set()

    def connections(self):
        """How many the system says are open."""
        import psutil

        found = psutil.Process().net_connections("tcp")
        return sum(one.laddr.port == self.port and one.status == "ESTABLISHED" for one in found)

    def _listen(self, port):
        while True:
            with suppress(RuntimeError):  # somebody has it
                return self._server.add_insecure_port(f"{self.HOST}:{port or random.choice(self.PORTS)}")

    def _answer(self, _, context):
        import grpc

        said = dict(context.invocation_metadata())
        if "refuse" in said:
            context.abort(grpc.StatusCode.NOT_FOUND, "the server's own")
        if "name" in said:
            self._hold(self._free[said["name"]], context)
        return b""

    def _hold(self, free, context):
        peer = context.peer()  # which it knows no more when the call has ended
        self._runs(peer, 1)
        try:
            if context.add_callback(free.set):  # or it was cancelled before
                free.wait()
        finally:
            self._runs(peer, -1)

    def _runs(self, peer, more):
        with self._lock:
            self.running[peer] += more
