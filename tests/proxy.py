"""A TCP proxy on 127.0.0.1 that is well, refuses, hangs, delays or resets, as its test wants."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import time
from threading import Thread

HOST = "127.0.0.1"
# Below the ports that systems give to clients: while it refuses, nobody else may get its port.
PORTS = range(20000, 32000)
CHUNK, CHUNKS = 2**16, 64  # what it holds back in one direction of one connection, before it reads no more
SECONDS = 10  # for everything that must happen
GREETING, PAUSE = 0.5, 0.01  # seconds in which a client should have begun to speak, and in which it has ended
RST = struct.pack("ii", 1, 0)  # linger, for no time: close with a reset


class Proxy:
    """
    Stands between clients and a server of 127.0.0.1, and is their bad network.

    A context manager; all methods may be called from any thread, and have
    happened when they return. The end of one direction of a connection is
    the end of both. A client whose server is not there is reset.

    Args:
        server: The port of the server.

    Attributes:
        port: The proxy's own port.
        accepted: How many connections there have been, those that were reset at once too.
        clients: The ports from which they came.
    """

    def __init__(self, server):
        self.server = server
        self.port = 0
        self.accepted = 0
        self.clients = set()
        self._state, self._seconds = "well", 0.0
        self._lines = set()
        self._flows = asyncio.Event()
        self._listener = None
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def __repr__(self):
        ours = f"Proxy on {HOST}:{self.port} for port {self.server}"
        return f"<{ours}, {self._state}, {self.open} of {self.accepted} connections open>"

    def __enter__(self):
        self._thread.start()
        self._become("well")
        return self

    def __exit__(self, *_):
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(SECONDS)
        self._loop.close()

    @property
    def resets(self):
        """Whether it resets new connections."""
        return self._state == "resetting"

    @property
    def open(self):
        """How many connections clients have open with it."""
        return sum(not line.left for line in list(self._lines))

    def settles(self, number):
        """Whether `open` comes to be *number*; it takes a moment to see a client go."""
        end = time.monotonic() + SECONDS
        while self.open != number and time.monotonic() < end:
            time.sleep(0.005)
        return self.open == number

    # -- what it can be ----------------------------------------------------------------

    def well(self):
        """Pass everything on, what was held back too."""
        self._become("well")

    def refuse(self):
        """Do not listen, until it is something else; present connections stay, and are well."""
        self._become("refusing")

    def hang(self):
        """Take everything and pass on nothing, not even an end; new connections do not reach the server."""
        self._become("hanging")

    def delay(self, seconds):
        """Pass everything on, each chunk so many seconds after it came."""
        self._become(f"{seconds} s late", seconds)

    def reset(self):
        """
        Reset all present connections, and every new one as soon as its client waits for an answer.

        Not before: it would be chance whether the client meets it connecting, writing or reading.
        """
        self._become("resetting", cut=True)

    def cut(self):
        """Reset all present connections; new ones are well."""
        self._become("well", cut=True)

    # -- how: all of it on the loop ------------------------------------------------------

    def _become(self, state, seconds=0.0, *, cut=False):
        self._do(self._turn(state, seconds, cut))

    def _do(self, coroutine):
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(SECONDS)

    async def _turn(self, state, seconds, cut):
        self._state, self._seconds = state, seconds
        if state == "refusing":
            self._deafen()
        elif self._listener is None:
            self._listen()
        if state == "hanging":
            self._flows.clear()
        else:
            self._flows.set()
        if cut:
            await self._cut()

    async def _close(self):
        self._deafen()
        await self._cut()

    async def _cut(self):
        await asyncio.gather(*[line.end() for line in self._lines])

    def _listen(self):
        self._listener = self._bound()
        self._listener.setblocking(False)
        self._loop.add_reader(self._listener, self._arrives)

    def _bound(self):
        if self.port:
            return socket.create_server((HOST, self.port), backlog=1024)
        while True:
            with contextlib.suppress(OSError):
                listener = socket.create_server((HOST, random.SystemRandom().choice(PORTS)), backlog=1024)
                self.port = listener.getsockname()[1]
                return listener

    def _deafen(self):
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    def _arrives(self):
        try:
            client, (_, port) = self._listener.accept()
        except OSError:  # it has gone again
            return
        self.accepted += 1
        self.clients.add(port)
        client.setblocking(False)
        line = Line(self, client)
        self._lines.add(line)
        line.task.add_done_callback(lambda _: self._lines.discard(line))

    async def passage(self, arrived):
        """Wait until what *arrived* then may go on."""
        await asyncio.sleep(max(0.0, arrived + self._seconds - self._loop.time()))
        await self._flows.wait()


class Line:
    """
    One connection through the proxy, from its client to the server.

    Attributes:
        left: Whether the client has closed it; the server may not know yet.
    """

    def __init__(self, proxy, client):
        self.proxy, self.client = proxy, client
        self.left = False
        self.writers, self.tasks = [], []
        self.task = asyncio.get_running_loop().create_task(self._live())

    def __repr__(self):
        return f"<Line through {self.proxy!r}, {'left by its client' if self.left else 'open'}>"

    async def end(self):
        """Reset both ends."""
        self._abort()
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.client.close()  # if the task has not even begun

    async def _live(self):
        try:
            if not await self._carry():
                self._abort()
        except OSError:  # there is no server
            self._abort()
        finally:
            for task in self.tasks:
                task.cancel()
            await asyncio.gather(*self.tasks, return_exceptions=True)
            for writer in self.writers:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()

    async def _carry(self):
        """Carry what both ends say, until one has ended; whether it has in peace."""
        hear, tell = await self._end(sock=self.client)
        if self.proxy.resets:
            await _silence(hear)
            return False
        question = Way(self.proxy)
        self._start(question.listen(hear, self._leave))
        await self.proxy.passage(0)
        if self.left:
            return False
        hear, ask = await self._end(HOST, self.proxy.server)
        answer = Way(self.proxy)
        self._start(answer.listen(hear))
        ends = [self._start(question.say(ask)), self._start(answer.say(tell))]
        done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        return all(end.exception() is None for end in done)

    async def _end(self, *where, **how):
        reader, writer = await asyncio.open_connection(*where, **how)
        self.writers.append(writer)
        return reader, writer

    def _start(self, job):
        self.tasks.append(asyncio.ensure_future(job))
        return self.tasks[-1]

    def _leave(self):
        self.left = True

    def _abort(self):
        _reset(self.client)
        for writer in self.writers:
            _reset(writer.get_extra_info("socket"))
            writer.transport.abort()


class Way:
    """One direction of a connection: what was heard, until it may be said."""

    def __init__(self, proxy):
        self.proxy = proxy
        self.heard = asyncio.Queue(CHUNKS)

    def __repr__(self):
        return f"<Way through {self.proxy!r}, {self.heard.qsize()} chunks on it>"

    async def listen(self, reader, ended=lambda: None):
        """Take in what one end says; tell at once that it has *ended*, and last of all how."""
        how = None
        try:
            while chunk := await reader.read(CHUNK):
                await self._put(chunk)
        except OSError as error:
            how = error
        ended()
        await self._put(how)

    async def say(self, writer):
        """Say it to the other end, each chunk in its time, to the last; raise what the end was, if no peace."""
        while True:
            arrived, said = await self.heard.get()
            await self.proxy.passage(arrived)
            if not isinstance(said, bytes):
                break
            writer.write(said)
            await writer.drain()
        if said is not None:
            raise said

    async def _put(self, what):
        await self.heard.put((asyncio.get_running_loop().time(), what))


async def _silence(reader):
    """Listen until there is nothing more to hear."""
    patience = GREETING
    with contextlib.suppress(asyncio.TimeoutError, OSError):
        while await asyncio.wait_for(reader.read(CHUNK), patience):
            patience = PAUSE


def _reset(sock):
    """Let this socket be reset when it is closed."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST)
