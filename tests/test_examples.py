"""Tests that the examples run as they say, as real processes that export real OTLP."""

from __future__ import annotations

import ast
import asyncio
import importlib.metadata
import importlib.util
import os
import re
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
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
trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")

from otel_pools._receiver import Point, Receiver  # noqa: E402  # needs what was looked for above

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
EXAMPLE = EXAMPLES / "fastapi_app.py"
PATIENCE = 60.0  # seconds: for what takes one on an idle machine

Points = Mapping[str, list[tuple[dict[str, str], Any]]]


def docstring(example: Path = EXAMPLE) -> str:
    """What the example says about itself; a file that is no program says it in comments."""
    text = example.read_text("utf-8")
    if example.suffix == ".py":
        return ast.get_docstring(ast.parse(text)) or ""
    return "\n".join(line[1:] for line in text.splitlines() if line.startswith("#"))


def documented_environment(example: Path = EXAMPLE) -> dict[str, str]:
    """The variables that the docstring tells the reader to export (those of its commands, not of its prose)."""
    return dict(re.findall(r"^ +export (\w+)=(\S+)$", docstring(example), re.MULTILINE))


def documented_command(example: Path = EXAMPLE, begins: str = "opentelemetry-instrument") -> list[str]:
    """The command that the docstring tells the reader to run."""
    (line,) = re.findall(rf"^ +({begins} .+)$", docstring(example), re.MULTILINE)
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
    """Takes OTLP in over HTTP and keeps every export of metrics, and every span by its name."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.exports: list[Points] = []
        self.spans: dict[str, Any] = {}
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
        if self.path == "/v1/traces":
            export = trace_service.ExportTraceServiceRequest.FromString(body)
            scopes = [scope for resource in export.resource_spans for scope in resource.scope_spans]
            self.server.spans.update({span.name: span for scope in scopes for span in scope.spans})
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


def test_install_lines_name_real_extras() -> None:
    """The extras in the documented `pip install` exist."""
    said = "".join(map(docstring, (*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.yaml"))))
    extras = {extra for found in re.findall(r"otel-pools\[(.+?)\]", said) for extra in found.split(",")}

    assert {"sqlalchemy", "redis", "httpx", "qdrant", "otlp"} <= extras
    assert extras <= set(importlib.metadata.metadata("otel-pools").get_all("Provides-Extra") or ())


def test_readme_lists_every_example() -> None:
    """Each example has its paragraph in the README."""
    readme = (EXAMPLES / "README.md").read_text("utf-8")

    names = [path.name for path in (*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.yaml"))]
    assert [name for name in names if f"**[{name}]({name})**" not in readme] == []
    assert "**[incidents/](incidents/README.md)**" in readme


# -- the examples with servers: real ones, and all processes of an example ------------


@dataclass
class Fleet:
    """What the processes of an example have told our receiver."""

    receiver: Receiver

    def points(self, metric: str, pool: str) -> list[Point]:
        """The newest of each series."""
        known = [series.now for series in self.receiver.series()]
        return [point for point in known if point.name == metric and pool in point.attributes.values()]

    def count(self, metric: str, pool: str) -> dict[str, int]:
        """The sum, or for a histogram the count, by process."""
        counted: Counter[str] = Counter()
        for point in self.points(metric, pool):
            counted[point.source] += getattr(point.value, "count", point.value)
        return dict(counted)

    def checkouts(self, pool: str) -> list[int]:
        """How many each process has had, the idlest first; those that have had none left out."""
        return sorted(count for count in self.count("otel_pools.checkouts", pool).values() if count)

    def services(self) -> set[str]:
        return {series.now.service for series in self.receiver.series()}


def comes(condition: Callable[[], Any], what: Callable[[], object]) -> Any:
    """Wait until it is true; return what it is."""
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline, f"never came; there is: {what()}"
        time.sleep(0.05)
    return found


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    with Receiver() as receiver:
        yield Fleet(receiver)


@pytest.fixture
def elsewhere(fleet: Fleet, postgres: Any, valkey: Any, tmp_path: Path) -> dict[str, str]:
    """The environment of a reader who has the same servers at other addresses."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("OTEL_")}
    return {
        **inherited,
        "DATABASE_URL": postgres.url("psycopg"),
        "HOME": str(tmp_path),  # where gunicorn puts a socket
        "NO_PROXY": "127.0.0.1",
        "OTEL_EXPORTER_OTLP_ENDPOINT": fleet.receiver.endpoint,
        # The official one, which says of SQLAlchemy 2.1, as an error, that it does nothing there.
        "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS": "sqlalchemy",
        "PATH": os.pathsep.join((sysconfig.get_path("scripts"), inherited.get("PATH", os.defpath))),
        "PYTHONUNBUFFERED": "1",
        "REDIS_URL": f"redis://127.0.0.1:{valkey.port}/9",
    }


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def ran(command: list[str], environment: dict[str, str]) -> str:
    """Run it to its end, which must be a good one; return what it printed."""
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@dataclass
class Service:
    """An example that serves until it is told to end, with all its processes."""

    process: subprocess.Popen[bytes]
    log: Path

    def says(self, words: str) -> None:
        """Wait for words in its log."""
        comes(lambda: words in self.said or self.process.poll() is not None, lambda: self.said)
        assert words in self.said, self.said

    @property
    def said(self) -> str:
        return self.log.read_text("utf-8")

    def ends(self) -> int:
        """Tell it to; in time, and all of it, without a word of complaint."""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(PATIENCE)
        with pytest.raises(ProcessLookupError):
            os.killpg(self.process.pid, 0)
        # Celery's SecurityWarning is for who runs the tests as root.
        bad = r"^.*(?:Traceback|ERROR|CRITICAL|Exception|(?<!Security)Warning:|inherited).*"
        assert not re.findall(bad, self.said, re.MULTILINE)
        return status


@contextmanager
def serving(command: list[str], environment: dict[str, str], folder: Path) -> Iterator[Service]:
    log = folder / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield Service(process, log)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def at_port(command: list[str], port: int) -> list[str]:
    """The documented command, at a port that is free."""
    moved = [word.replace("8000", str(port)) for word in command]
    assert moved != command
    return moved


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")


@on_posix
def test_every_library_of_one_request(fleet: Fleet, postgres: Any, elsewhere: dict[str, str], tmp_path: Path) -> None:
    """Of one request after the other, each of the four pools tells its part by its name, and its connection."""
    qdrants = pytest.importorskip("qdrants")
    if not (qdrants.available() and importlib.util.find_spec("asyncpg")):
        pytest.skip("the vector server or asyncpg is not installed")
    example, port = EXAMPLES / "fastapi_everything.py", free_port()

    with qdrants.Server() as vectors:
        addresses = {
            "DATABASE_URL": postgres.url("asyncpg"),
            "PRICES_URL": f"http://127.0.0.1:{port}",
            "QDRANT_URL": vectors.url,
            "QDRANT_GRPC_PORT": str(vectors.grpc_port),
        }
        environment = {
            **documented_environment(example),
            **elsewhere,
            **addresses,
            "OTEL_METRIC_EXPORT_INTERVAL": "300",
        }
        with serving(at_port(documented_command(example), port), environment, tmp_path) as service:
            service.says("Uvicorn running on")
            for _ in range(3):
                url = f"http://127.0.0.1:{port}/offer/7"
                answer = httpx.get(url, trust_env=False, timeout=PATIENCE).raise_for_status().json()
            assert {**answer, "seen": 0} == {"sold": 70, "seen": 0, "price": 10.5, "alike": [7]}

            # The vectors were looked for, made and filled at the beginning.
            asked = {"orders": 3, "cache": 3, "prices": 3, "vectors": 6}
            comes(
                lambda: {pool: sum(fleet.checkouts(pool)) for pool in asked} == asked,
                lambda: {pool: fleet.checkouts(pool) for pool in asked},
            )
            for pool, metric in {**dict.fromkeys(asked, "db.client.connection.count"), "prices": OPEN_HTTP}.items():
                assert sum(fleet.count(metric, pool).values()) == 1, pool
            assert service.ends() in (0, -signal.SIGTERM)
    # Nobody else had a pool: nothing was asked before the pools had their names.
    assert {name for one in fleet.receiver.series() if (name := pool_of(one.now))} == set(asked)
    assert "otel_pools:" not in service.said


OPEN_HTTP = "http.client.open_connections"


def pool_of(point: Point) -> Any:
    return point.attributes.get("otel_pools.pool.name") or point.attributes.get("db.client.connection.pool.name")


@forks
@pytest.mark.parametrize("begins", ["opentelemetry-instrument", "gunicorn"], ids=["", "preload"])
def test_every_worker_of_gunicorn(fleet: Fleet, elsewhere: dict[str, str], tmp_path: Path, begins: str) -> None:
    """Each worker tells its own pools, has connections of its own, and ends with a last export."""
    for needed in ("flask", "gunicorn"):
        pytest.importorskip(needed)
    example, port = EXAMPLES / "flask_prefork.py", free_port()
    environment = {**documented_environment(example), **elsewhere, "OTEL_METRIC_EXPORT_INTERVAL": "300"}
    answers: list[dict[str, Any]] = []

    def ask(_: int = 0) -> dict[str, Any]:
        answer = httpx.get(f"http://127.0.0.1:{port}/orders", trust_env=False, timeout=PATIENCE)
        return dict(answer.raise_for_status().json())

    def both_answered() -> bool:
        with ThreadPoolExecutor(4) as readers:
            answers.extend(readers.map(ask, range(8)))
        return len({answer["process"] for answer in answers}) == 2

    with serving(at_port(documented_command(example, begins), port), environment, tmp_path) as service:
        service.says("Booting worker")
        comes(both_answered, lambda: answers)
        served = Counter(answer["process"] for answer in answers)
        # Without preload each worker has begun with a question of its own; with it, the parent has, and is silent.
        asked = sorted(count + (begins != "gunicorn") for count in served.values())
        expected = {"orders": asked, "cache": asked}
        comes(lambda: {pool: fleet.checkouts(pool) for pool in expected} == expected, fleet.receiver.series)
        answers.append(ask())  # which only the last export may tell
        assert service.ends() == 0

    assert sum(fleet.checkouts("orders")) == sum(asked) + 1
    assert sum(fleet.count("otel_pools.connection.inherited", "orders").values()) == 0
    # A connection is one process's, on the server's side too.
    whose = {(answer["connection"], answer["process"]) for answer in answers}
    assert len(whose) == len({connection for connection, _ in whose})
    assert "otel_pools:" not in service.said


@forks
def test_children_of_celery_tell_their_tasks(fleet: Fleet, elsewhere: dict[str, str], tmp_path: Path) -> None:
    """Each child tells the checkouts of its tasks, and of the results it has stored, by its last export alone."""
    pytest.importorskip("celery")
    example = EXAMPLES / "celery_tasks.py"
    environment = {**documented_environment(example), **elsewhere, "OTEL_METRIC_EXPORT_INTERVAL": "60000"}

    # There is no other worker whom it would have to wait for.
    command = [*documented_command(example, "celery"), "--without-mingle", "--without-gossip"]
    with serving(command, environment, tmp_path) as service:
        service.says(" ready.")
        printed = ran(documented_command(example, "python"), environment)
        assert fleet.checkouts("orders") == []
        service.ends()

    tasks = {int(process): int(count) for process, count in re.findall(r"process (\d+): (\d+) tasks", printed)}
    assert sum(tasks.values()) == 20
    assert fleet.checkouts("orders") == sorted(tasks.values())
    assert sum(fleet.count("otel_pools.connection.inherited", "orders").values()) == 0
    results = fleet.count("otel_pools.checkouts", elsewhere["REDIS_URL"].removeprefix("redis://"))
    assert fleet.count("otel_pools.checkouts", "orders").keys() <= results.keys()
    assert sum(results.values()) >= 20


def test_a_script_tells_all_at_its_end(fleet: Fleet, elsewhere: dict[str, str]) -> None:
    """Started under `opentelemetry-instrument` or by Python alone it prints the same; all of it is exported."""
    example = EXAMPLES / "plain_script.py"
    environment = {**documented_environment(example), **elsewhere}
    command = documented_command(example)

    with ThreadPoolExecutor(2) as readers:
        printed = list(readers.map(ran, (command, command[1:]), (environment, environment)))

    expected = "jobs: 40 checkouts, at most 4 of 4 connections in use at once"
    assert [text.splitlines()[0] for text in printed] == [expected, expected]
    assert fleet.checkouts("jobs") == [40]
    assert list(fleet.count("db.client.connection.wait_time", "jobs").values()) == [40]
    assert fleet.services() == {"plain-script"}


def test_a_file_configures_all(fleet: Fleet, elsewhere: dict[str, str]) -> None:
    """With the declarative file the same script is seen as the file says, and can be told from its like."""
    pytest.importorskip("opentelemetry.configuration")
    example = EXAMPLES / "declarative.yaml"

    ran(documented_command(example), {**documented_environment(example), **elsewhere, "OTEL_SERVICE_NAME": ""})

    assert fleet.checkouts("jobs") == [40]
    assert fleet.services() == {"declarative"}
    assert fleet.points("db.client.connection.wait_time", "jobs")
    assert fleet.points("db.client.connection.create_time", "jobs") == []
    # A `service.instance.id`, and not the digest that stands for one.
    assert {len(series.now.source) for series in fleet.receiver.series()} == {36}


def test_providers_of_ones_own(backend: Backend, elsewhere: dict[str, str]) -> None:
    """Metrics and spans arrive by the providers made in code; the failed wait is in its trace, and tells the holder."""
    example = EXAMPLES / "manual_sdk.py"
    environment = {**documented_environment(example), **elsewhere, "OTEL_EXPORTER_OTLP_ENDPOINT": backend.url}

    assert ran(documented_command(example, "python"), environment) == "no connection in time\n"

    last = backend.exports[-1]
    stock = {"otel_pools.pool.name": "stock"}
    assert total(last, "otel_pools.checkouts", stock) == 2
    assert total(last, "otel_pools.checkouts", {**stock, "error.type": "timeout"}) == 1
    wait, holder = backend.spans["acquire stock"], backend.spans["inventory"]
    assert wait.parent_span_id == backend.spans["restock"].span_id
    assert [link.span_id for link in wait.links] == [holder.span_id]
    (event,) = [event for event in wait.events if event.name == "otel_pools.holder"]
    place = {pair.key: pair.value.string_value for pair in event.attributes}
    assert place["code.file.path"].endswith("manual_sdk.py")
    assert "take_inventory" in place["code.function.name"]
