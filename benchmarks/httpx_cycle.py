"""What one request costs on httpcore, httpx and their twins: bare, ours, official; taking turns in one run."""

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
from functools import partial
from importlib.metadata import version
from typing import Any

from stubs import URL, async_in_memory, in_memory
from turns import PROVIDER, Row, Run, Way, arguments, awaited, compare, repeated, show, threaded

LOOP = asyncio.new_event_loop()
NAMES = {
    name: core for name, core in {"httpx": "httpcore", "httpx2": "httpcore2"}.items() if importlib.util.find_spec(name)
}
SERVER = """
import sys, uvicorn
async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})
uvicorn.run(app, port=int(sys.argv[1]), log_level="error", lifespan="off")
"""


def cores(name: str) -> dict[str, Run]:
    """Pools on a network in memory."""
    core = importlib.import_module(name)
    pool = core.ConnectionPool(network_backend=in_memory(core))
    own = core.AsyncConnectionPool(network_backend=async_in_memory(core))
    return {
        name: repeated(lambda: pool.request("GET", URL)),
        f"{name}, 8 threads": threaded(lambda: pool.request("GET", URL)),
        f"{name}, asyncio": awaited(LOOP, lambda: own.request("GET", URL)),
    }


def client(name: str) -> Run:
    """A client on a network in memory: here the official instrumentation can be beside us."""
    library, core = importlib.import_module(name), importlib.import_module(NAMES[name])
    transport = library.HTTPTransport(verify=False)
    transport._pool = core.ConnectionPool(network_backend=in_memory(core))
    made = library.Client(transport=transport)
    return repeated(lambda: made.get(URL))


def clients(name: str, url: str) -> dict[str, Run]:
    """Clients of a real server."""
    library = importlib.import_module(name)
    made, own = library.Client(), library.AsyncClient()
    return {
        f"{name}, uvicorn": repeated(lambda: made.get(url)),
        f"{name}, uvicorn, 8 threads": threaded(lambda: made.get(url)),
        f"{name}, uvicorn, asyncio": awaited(LOOP, lambda: own.get(url)),
    }


@contextmanager
def official(provider: Any = PROVIDER) -> Iterator[None]:
    """The official instrumentation of httpx, with the same SDK for its metric and none for spans."""
    from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor

    HTTPXClientInstrumentor().instrument(meter_provider=provider, skip_dep_check=True)
    try:
        yield
    finally:
        HTTPXClientInstrumentor().uninstrument()


def peers(name: str, provider: Any = PROVIDER) -> dict[str, Way]:
    """It knows httpx alone, and not what is below it."""
    return {"official": partial(official, provider)} if name.startswith("httpx,") else {}


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
    rows: dict[str, Row] = {}

    def measure(name: str, run: Run, part: int) -> None:
        rows[name] = compare("httpx", run, chosen, peers(name), part)

    for name, core in NAMES.items():
        for told, run in cores(core).items():
            measure(told, run, 4)
        measure(f"{name}, in memory", client(name), 4)
    if not chosen.no_server:
        with server() as url:
            for name in NAMES:
                for told, run in clients(name, url).items():
                    measure(told, run, 10)
    show(rows, chosen, ", ".join(f"{core} {version(core)}" for core in NAMES.values()))


if __name__ == "__main__":
    main()
