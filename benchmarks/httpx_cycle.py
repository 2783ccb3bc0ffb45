"""What one request costs on httpcore and httpcore2: bare and ours taking turns; in memory and on a real server."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from time import perf_counter
from typing import Any

from turns import Run, arguments, compare, show, timed

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
LOOP = asyncio.new_event_loop()
SERVER = """
import sys, uvicorn
async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})
uvicorn.run(app, port=int(sys.argv[1]), log_level="error", lifespan="off")
"""


def in_memory(library: Any) -> Any:
    """A backend whose every connection has an answer ready."""

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


def requests(pool: Any, url: str) -> Run:
    return lambda cycles: timed(lambda: pool.request("GET", url), cycles)


def async_requests(pool: Any, url: str) -> Run:
    async def cycles_of(cycles: int) -> float:
        start = perf_counter()
        for _ in range(cycles):
            await pool.request("GET", url)
        return perf_counter() - start

    return lambda cycles: LOOP.run_until_complete(cycles_of(cycles))


@contextmanager
def server() -> Iterator[str]:
    """uvicorn, in a process of its own."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-c", SERVER, str(port)])
    try:
        while socket.socket().connect_ex(("127.0.0.1", port)):
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    chosen = arguments(__doc__, "server")
    rounds, cycles = chosen.rounds, chosen.cycles
    rows = {}
    names = [name for name in ("httpcore", "httpcore2") if importlib.util.find_spec(name)]
    for name in names:
        library = importlib.import_module(name)
        pool = library.ConnectionPool(network_backend=in_memory(library))
        rows[name] = compare(requests(pool, "http://example.org/"), cycles, rounds)
        async_pool = library.AsyncConnectionPool(network_backend=async_in_memory(library))
        rows[f"{name}, asyncio"] = compare(async_requests(async_pool, "http://example.org/"), cycles, rounds)
    if not chosen.no_server:
        with server() as url:
            for name in ("httpx", "httpx2"):
                if importlib.util.find_spec(name):
                    library = importlib.import_module(name)
                    rows[f"{name}, uvicorn"] = compare(requests(library.Client(), url), cycles // 10, rounds)
                    client = library.AsyncClient()
                    rows[f"{name}, uvicorn, asyncio"] = compare(async_requests(client, url), cycles // 10, rounds)
    show(rows, chosen, ", ".join(f"{name} {version(name)}" for name in names))


if __name__ == "__main__":
    main()
