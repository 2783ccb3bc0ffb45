"""Tests that the examples run as they say, as real processes that export real OTLP."""

from __future__ import annotations

import ast
import asyncio
import importlib.metadata
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

for needed in ("aiosqlite", "fastapi", "opentelemetry.distro", "opentelemetry.exporter.otlp.proto.http", "uvicorn"):
    pytest.importorskip(needed)
httpx = pytest.importorskip("httpx")
metrics_service = pytest.importorskip("opentelemetry.proto.collector.metrics.v1.metrics_service_pb2")

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "fastapi_app.py"
PATIENCE = 30.0  # seconds: for what takes one on an idle machine

Points = Mapping[str, list[tuple[dict[str, str], Any]]]


def docstring() -> str:
    """What the example says about itself."""
    return ast.get_docstring(ast.parse(EXAMPLE.read_text("utf-8"))) or ""


def documented_environment() -> dict[str, str]:
    """The variables that the docstring tells the reader to export (those of its commands, not of its prose)."""
    return dict(re.findall(r"^ +export (\w+)=(\S+)$", docstring(), re.MULTILINE))


def documented_command() -> list[str]:
    """The command that the docstring tells the reader to run."""
    (line,) = re.findall(r"^ +(opentelemetry-instrument .+)$", docstring(), re.MULTILINE)
    return shlex.split(line)


# -- where the metrics arrive ------------------------------------------------------


def points_of(export: Any) -> Points:
    """The points of one OTLP request, by metric, each with its attributes that are strings."""
    found: dict[str, list[tuple[dict[str, str], Any]]] = {}
    for resource in export.resource_metrics:
        for metric in (metric for scope in resource.scope_metrics for metric in scope.metrics):
            for point in getattr(metric, metric.WhichOneof("data")).data_points:
                attributes = {pair.key: pair.value.string_value for pair in point.attributes}
                found.setdefault(metric.name, []).append((attributes, point))
    return found


class Backend(ThreadingHTTPServer):
    """Takes OTLP in over HTTP and keeps every export of metrics."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.exports: list[Points] = []
        self.arrived = threading.Condition()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def take(self, export: Points) -> None:
        with self.arrived:
            self.exports.append(export)
            self.arrived.notify_all()

    def wait_for(self, wanted: Callable[[Points], bool]) -> Points:
        """The first export like this, those that are still to come included."""
        with self.arrived:
            found = self.arrived.wait_for(lambda: [e for e in self.exports if wanted(e)], PATIENCE)
            assert found, f"not in {len(self.exports)} exports; the last: {self.exports[-1:]}"
            return found[0]


class Handler(BaseHTTPRequestHandler):
    """Answers every OTLP request with success."""

    server: Backend

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v1/metrics":
            self.server.take(points_of(metrics_service.ExportMetricsServiceRequest.FromString(body)))
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the test's output is for the test."""


@pytest.fixture
def backend() -> Iterator[Backend]:
    with Backend() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


# -- the process -------------------------------------------------------------------


@dataclass
class Server:
    """The example, running as its docstring says, on a port that was free."""

    process: subprocess.Popen[bytes]
    log: Path

    def port(self) -> int:
        """The port that uvicorn chose, as soon as it says so."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.process.poll() is None:
            if found := re.search(r"running on http://127\.0\.0\.1:(\d+)", self.log.read_text("utf-8")):
                return int(found[1])
            time.sleep(0.05)
        raise AssertionError(f"the example did not start:\n{self.log.read_text('utf-8')}")

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)


def environment(backend: Backend, folder: Path) -> dict[str, str]:
    """The reader's environment after the docstring's exports, with our own backend, database and less patience."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("OTEL_")}
    return {
        **inherited,
        **documented_environment(),
        "DATABASE_URL": f"sqlite+aiosqlite:///{folder}/example.db",
        "NO_PROXY": "127.0.0.1",
        "OTEL_EXPORTER_OTLP_ENDPOINT": backend.url,
        "OTEL_METRIC_EXPORT_INTERVAL": "500",
        "PATH": os.pathsep.join((sysconfig.get_path("scripts"), inherited.get("PATH", os.defpath))),
        "PYTHONUNBUFFERED": "1",
    }


@contextmanager
def running(backend: Backend, folder: Path) -> Iterator[Server]:
    log = folder / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*documented_command(), "--port", "0"],
            cwd=ROOT,
            env=environment(backend, folder),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield Server(process, log)
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def server(backend: Backend, tmp_path: Path) -> Iterator[Server]:
    with running(backend, tmp_path) as started:
        yield started


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with httpx.Client(base_url=f"http://127.0.0.1:{server.port()}", trust_env=False, timeout=PATIENCE) as opened:
        yield opened


# -- what must hold ----------------------------------------------------------------

on_posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to end the example with")

SEMCONV_POOL = {"db.client.connection.pool.name": "example.db"}
OUR_POOL = {"otel_pools.pool.name": "example.db"}


def total(export: Points, metric: str, wanted: Mapping[str, str]) -> int:
    """The sum, or for a histogram the count, of the points with these attributes."""
    points = [point for attributes, point in export.get(metric, ()) if wanted.items() <= attributes.items()]
    return sum(point.count if hasattr(point, "bucket_counts") else point.as_int for point in points)


@on_posix
def test_pool_arrives(backend: Backend, client: Any) -> None:
    """Run as documented, both routes answer, and checkouts, waits and connections arrive under the pool's name."""
    used = {**SEMCONV_POOL, "db.client.connection.state": "used"}
    idle = {**SEMCONV_POOL, "db.client.connection.state": "idle"}

    with ThreadPoolExecutor(1) as other:
        slow = other.submit(client.get, "/slow", params={"seconds": 2})
        backend.wait_for(lambda export: total(export, "db.client.connection.count", used) == 1)
        assert slow.result().json() == {"held": 2.0}
    assert [item["name"] for item in client.get("/items").json()] == ["lane", "towel"]

    after = backend.wait_for(
        lambda export: (
            total(export, "otel_pools.checkouts", OUR_POOL) == 2
            and total(export, "db.client.connection.count", used) == 0
        )
    )
    assert total(after, "db.client.connection.wait_time", SEMCONV_POOL) == 2
    assert total(after, "db.client.connection.count", idle) == 1


@on_posix
def test_ends_cleanly(client: Any, server: Server) -> None:
    """On SIGTERM the example shuts down and the process ends by itself, without a word of complaint."""
    client.get("/items")

    status = server.terminate()

    log = server.log.read_text("utf-8")
    # Having shut down, uvicorn raises the signal once more, so that whoever waits sees why.
    assert status in (0, -signal.SIGTERM)
    assert "Application shutdown complete" in log
    assert not re.findall(r"^(?:.*Traceback|ERROR|Exception|.*Warning:).*", log, re.MULTILINE), log


def test_disposes_its_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """When the application ends, the connections that lie in the pool are closed."""
    monkeypatch.setenv("DATABASE_URL", f"sqlite+aiosqlite:///{tmp_path}/example.db")
    example = runpy.run_path(str(EXAMPLE))
    engine, closed = example["engine"], []
    event.listen(engine.sync_engine, "close", lambda *_: closed.append(True))

    async def life() -> None:
        async with example["lifespan"](example["app"]):
            await example["items"]()
            assert closed == []

    asyncio.run(life())

    assert closed == [True]


def test_code_says_nothing_about_us() -> None:
    """The example needs no line of code to be seen."""
    code = ast.parse(EXAMPLE.read_text("utf-8"))
    code.body = code.body[1:]

    assert not re.search("otel|opentelemetry", ast.unparse(code), re.IGNORECASE)


def test_install_line_names_real_extras() -> None:
    """The extras in the documented `pip install` exist."""
    (extras,) = re.findall(r"otel-pools\[(.+?)\]", docstring())

    assert set(extras.split(",")) <= set(importlib.metadata.metadata("otel-pools").get_all("Provides-Extra") or ())


def test_readme_lists_every_example() -> None:
    """Each example has its paragraph in the README."""
    readme = (ROOT / "examples" / "README.md").read_text("utf-8")

    names = [path.name for path in EXAMPLE.parent.glob("*.py")]
    assert [name for name in names if f"**[{name}]({name})**" not in readme] == []
