"""Real servers on 127.0.0.1 that count for themselves: HTTP/1.1, HTTP/2, a proxy, a SOCKS5 proxy."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from functools import cached_property
from importlib.util import find_spec
from threading import Thread
from urllib.parse import urlsplit

# Who asks them: each library that is installed, sync and asyncio; and the library under it.
LIBRARIES = [name for name in ("httpx", "httpx2") if find_spec(name)]
CORES = {"httpx": "httpcore", "httpx2": "httpcore2"}
SYNC, ASYNC = [(name, False) for name in LIBRARIES], [(name, True) for name in LIBRARIES]

MOST_STREAMS = 5


def flavour_id(flavour):
    return f"{flavour[0]}-{'async' if flavour[1] else 'sync'}"


class Ground:
    """An event loop in a thread of its own, on which the servers of a test module run."""

    def __init__(self):
        self.loop = asyncio.new_event_loop()
        self.thread = Thread(target=self.loop.run_forever, name="webs", daemon=True)
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.do(self._finish())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()

    def do(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(10)

    async def _finish(self):
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Certificates:
    """An authority of our own, what it has signed for 127.0.0.1, and who trusts it."""

    def __init__(self):
        import trustme

        self.authority = trustme.CA()
        self.certificate = self.authority.issue_cert("127.0.0.1", "localhost")

    def of_server(self, *protocols):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.certificate.configure_cert(context)
        context.set_alpn_protocols(protocols)
        return context

    @cached_property
    def trusted(self):
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        return context


# -- connections, as a server sees them ---------------------------------------------


class Connection(asyncio.Protocol):
    """One connection that somebody opened to us; in its server's count until the socket is gone."""

    def __init__(self, server):
        self.server = server
        self.busy = False
        self.buffer = b""
        self.tasks = set()

    def connection_made(self, transport):
        self.transport = transport
        self.server.connections.add(self)
        self.server.accepted += 1
        self.server.most = max(self.server.most, len(self.server.connections))

    def connection_lost(self, error):
        self.server.connections.discard(self)
        for task in self.tasks:
            task.cancel()
        self.transport.close()  # for Python 3.10, whose TLS transport does not notice by itself that it is over

    def start(self, coroutine):
        task = self.server.ground.loop.create_task(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


class Silent(Connection):
    """Takes what comes and says nothing."""


class HTTP1(Connection):
    """HTTP/1.1 with keep-alive; a request for the whole URL, as to a proxy, is answered in its stead."""

    def data_received(self, data):
        self.buffer += data
        self.proceed()

    def proceed(self):
        if not self.busy and b"\r\n\r\n" in self.buffer:
            head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
            method, target, _ = head.split(b"\r\n")[0].decode().split(" ")
            self.busy = True
            self.server.requests += 1
            self.start(self.serve(method, target))

    async def serve(self, method, target):
        await self.answer(method, target)
        self.busy = False
        self.proceed()

    def say(self, status, body, *headers):
        head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
        self.transport.write("\r\n".join([*head, "", body]).encode())

    async def answer(self, method, target):
        url = urlsplit(target)
        if url.path == "/slow":
            await asyncio.sleep(float(url.query))
            self.say("200 OK", "slow")
        elif url.path == "/close":
            self.say("200 OK", "bye", "Connection: close")
            self.transport.close()
        elif url.path == "/drop":
            self.transport.close()
        elif url.path == "/cut":
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nno more")
            self.transport.close()
        elif url.path == "/stall":
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nno more")
            await asyncio.sleep(30)
        elif url.path == "/stream":
            self.transport.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            while True:
                self.transport.write(b"4\r\nmore\r\n")
                await asyncio.sleep(0.02)
        else:
            self.say("200 OK", "ok")


class HTTP2(Connection):
    """HTTP/2, by ALPN or by prior knowledge, with few streams at once."""

    def connection_made(self, transport):
        from h2.config import H2Configuration
        from h2.connection import H2Connection
        from h2.settings import SettingCodes, Settings

        self.leaving = False
        self.streams = set()
        super().connection_made(transport)
        self.last = 0
        self.state = H2Connection(H2Configuration(client_side=False))
        self.state.local_settings = Settings(
            client=False, initial_values={SettingCodes.MAX_CONCURRENT_STREAMS: MOST_STREAMS}
        )
        self.state.initiate_connection()
        self.flush()

    def flush(self):
        self.transport.write(self.state.data_to_send())

    def connection_lost(self, error):
        super().connection_lost(error)
        for stream in list(self.streams):
            self.ended(stream)

    def data_received(self, data):
        from h2 import events
        from h2.exceptions import ProtocolError

        try:
            happened = self.state.receive_data(data)
        except ProtocolError:
            self.transport.close()
            return
        for event in happened:
            if isinstance(event, events.RequestReceived):
                path = dict(event.headers)[b":path"].decode()
                self.streams.add(event.stream_id)
                self.last = max(self.last, event.stream_id)
                self.server.streams += 1
                self.server.most_streams = max(self.server.most_streams, self.server.streams)
                self.server.requests += 1
                self.start(self.serve(event.stream_id, urlsplit(path)))
            elif isinstance(event, events.StreamReset):
                self.ended(event.stream_id)
        self.flush()

    def ended(self, stream):
        if stream in self.streams:
            self.streams.remove(stream)
            self.server.streams -= 1
        if self.leaving and not self.streams:
            self.transport.close()

    async def serve(self, stream, url):
        if url.path == "/slow":
            await asyncio.sleep(float(url.query))
        if stream not in self.streams:
            return
        if url.path == "/reset":
            self.state.reset_stream(stream, error_code=2)
        else:
            self.state.send_headers(stream, [(":status", "200")])
            while url.path == "/stream":
                self.state.send_data(stream, b"more")
                self.flush()
                await asyncio.sleep(0.02)
                if stream not in self.streams:
                    return
            self.state.send_data(stream, b"ok", end_stream=True)
        self.flush()
        self.ended(stream)

    def goaway(self):
        """Take no new streams; those under way are answered, and then the socket is closed."""
        from hyperframe.frame import GoAwayFrame

        # Not by `close_connection`, after which h2 would not let us finish.
        self.transport.write(GoAwayFrame(0, last_stream_id=self.last).serialize())
        self.leaving = True
        if not self.streams:
            self.transport.close()


class Far(asyncio.Protocol):
    """The other side of a tunnel."""

    def __init__(self, near):
        self.near = near

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.near.transport.write(data)

    def connection_lost(self, error):
        self.near.transport.close()


class Tunnel(Connection):
    """What it gets it passes on, once it knows where to."""

    far = None

    async def reach(self, host, port):
        _, far = await self.server.ground.loop.create_connection(lambda: Far(self), host, int(port))
        self.far = far

    def connection_lost(self, error):
        super().connection_lost(error)
        if self.far is not None:
            self.far.transport.close()


class HTTPProxy(HTTP1, Tunnel):
    """A proxy: for http it answers itself, for CONNECT it opens a tunnel, refuses, or breaks what comes through."""

    garbles = False

    def data_received(self, data):
        if self.garbles:
            self.transport.write(b"this is not TLS\r\n")
        elif self.far is not None:
            self.far.transport.write(data)
        else:
            super().data_received(data)

    async def answer(self, method, target):
        if method != "CONNECT":
            await super().answer(method, target)
        elif self.server.refuses:
            self.say("502 Bad Gateway", "no")
        else:
            self.garbles = self.server.garbles
            if not self.garbles:
                await self.reach(*target.rsplit(":", 1))
            self.transport.write(b"HTTP/1.1 200 OK\r\n\r\n")


class SOCKS5(Tunnel):
    """A SOCKS5 proxy without passwords."""

    greeted = False

    def data_received(self, data):
        if self.far is not None:
            self.far.transport.write(data)
            return
        self.buffer += data
        if not self.greeted and len(self.buffer) >= 2 + self.buffer[1]:
            self.greeted, self.buffer = True, b""
            self.transport.write(b"\x05\x00")
        elif self.greeted and len(self.buffer) >= 10:
            self.start(self.connect(self.buffer))
            self.buffer = b""

    async def connect(self, asked):
        kind = asked[3]
        host = socket.inet_ntoa(asked[4:8]) if kind == 1 else asked[5:-2].decode()
        if self.server.refuses:
            self.transport.write(b"\x05\x05\x00\x01" + bytes(6))
            return
        await self.reach(host, int.from_bytes(asked[-2:], "big"))
        self.transport.write(b"\x05\x00\x00\x01" + bytes(6))


# -- servers --------------------------------------------------------------------------


class Server:
    """A server on an ephemeral port, or on a socket in the file system; its counts are its own."""

    def __init__(self, ground, kind=HTTP1, tls=None, path=None):
        self.ground, self.kind, self.tls, self.path = ground, kind, tls, path
        self.connections = set()
        self.accepted = self.requests = self.most = 0
        self.streams = self.most_streams = 0
        self.refuses = self.garbles = False
        self.scheme = "http" if tls is None else "https"
        self.port = None

    def __enter__(self):
        self.ground.do(self._start())
        return self

    def __exit__(self, *_):
        self.ground.do(self._stop())

    async def _start(self):
        loop = self.ground.loop
        if self.path is None:
            self.server = await loop.create_server(
                lambda: self.kind(self), "127.0.0.1", 0, ssl=self.tls, backlog=1024, reuse_address=True
            )
            self.port = self.server.sockets[0].getsockname()[1]
        else:
            self.server = await loop.create_unix_server(lambda: self.kind(self), self.path)

    async def _stop(self):
        # asyncio leaves a connection open that it is about to accept.
        await asyncio.sleep(0.01)
        self.server.close()
        for connection in list(self.connections):
            connection.transport.abort()
        for _ in range(100):
            if not self.connections:
                break
            await asyncio.sleep(0.01)
        await self.server.wait_closed()

    @property
    def origin(self):
        return (self.scheme, "127.0.0.1", self.port)

    def url(self, path="/"):
        return f"{self.scheme}://127.0.0.1:{self.port}{path}"

    @property
    def open(self):
        return len(self.connections)

    def settles(self, count, seconds=3.0):
        """Whether so many connections are open here, by and by: the last bytes may be on their way."""
        end = time.monotonic() + seconds
        while self.open != count and time.monotonic() < end:
            time.sleep(0.005)
        return self.open == count

    def hang_up(self):
        """Close every connection that waits for a request, as a server does that has had enough."""

        async def hang_up():
            idle = [connection for connection in self.connections if not connection.busy]
            for connection in idle:
                connection.transport.close()
            return len(idle)

        number = self.ground.do(hang_up())
        time.sleep(0.05)
        return number

    def goaway(self):
        """Send GOAWAY on every connection."""

        async def goaway():
            for connection in list(self.connections):
                connection.goaway()

        self.ground.do(goaway())
        time.sleep(0.05)


def free_port():
    """A port that nobody listens on."""
    with contextlib.closing(socket.socket()) as ours:
        ours.bind(("127.0.0.1", 0))
        return ours.getsockname()[1]
