"""
A stage for the dashboards: a load on real servers, a real Prometheus that watches it, and every query answered.

The load is `load.py`, in a process of its own. What the Collector's receivers would tell of the servers comes from
`StandIn`: their names, with numbers that PostgreSQL and Valkey tell it. A Collector is not part of the stage.
"""

# ruff: noqa: INP001, S603  # a script's neighbour, which starts programs and asks this machine

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any
from unittest.mock import patch
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import ProxyHandler, build_opener

from promql import SERVERS, prometheus

from otel_pools.demo import _load, _valkey
from otel_pools.demo._postgres import Postgres
from otel_pools.demo._qdrant import Qdrant
from otel_pools.demo._web import Web

FOLDER = Path(__file__).parent
if TYPE_CHECKING:
    from typing_extensions import Self

SCRAPE = 0.5  # seconds
WINDOW = "4s"  # what $__rate_interval is here: several scrapes
PATIENCE = 30.0  # seconds

# Nothing here is for a proxy.
ask = build_opener(ProxyHandler({})).open


class StandIn:
    """
    What the Collector's postgresql and redis receivers would tell, on a page to be scraped; a context manager.

    The names are theirs, as the Collector writes them for Prometheus; the numbers are the servers' own.

    Args:
        postgres: The SQLAlchemy URL of a PostgreSQL.
        valkey: The URL of a Valkey.
    """

    def __init__(self, postgres: str, valkey: str) -> None:
        import psycopg  # noqa: PLC0415  # only where it is needed
        from redis import Redis  # noqa: PLC0415

        self._postgres = psycopg.connect(postgres, autocommit=True)
        self._valkey = Redis.from_url(valkey, decode_responses=True)
        stand_in = self

        class Page(BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # the name is http.server's
                body = stand_in.page().encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.end_headers()
                # Prometheus may have been stopped meanwhile.
                with suppress(OSError):
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
        # One connection to each server, and so one page at a time.
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self._thread = Thread(target=self._server.serve_forever, args=(0.05,), name="stand-in")

    def __repr__(self) -> str:
        return f"<StandIn for the Collector's receivers on 127.0.0.1:{self.port}>"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._postgres.close()
        self._valkey.close()

    def page(self) -> str:
        """In the words of Prometheus."""
        return "".join(f"{prometheus(SERVERS[name])} {number}\n" for name, number in self._numbers().items())

    def _numbers(self) -> Mapping[str, int]:
        info = self._valkey.info()
        count = "SELECT sum(numbackends), current_setting('max_connections')::int FROM pg_stat_database"
        backends, most = self._postgres.execute(count).fetchone() or (0, 0)
        return {
            "postgresql.backends": backends,
            "postgresql.connection.max": most,
            "redis.clients.connected": info["connected_clients"],
            "redis.clients.blocked": info["blocked_clients"],
            "redis.connections.received": info["total_connections_received"],
            "redis.connections.rejected": info["rejected_connections"],
        }


class Prometheus:
    """
    A real Prometheus on 127.0.0.1, which scrapes pages of this machine; a context manager.

    Args:
        targets: Ports, by the job that they get.

    Raises:
        FileNotFoundError: There is no program `prometheus`.
        TimeoutError: It does not come up.
    """

    def __init__(self, targets: Mapping[str, Sequence[int]]) -> None:
        self._targets = targets
        self._program = program()
        self.port = 0

    def __repr__(self) -> str:
        return f"<Prometheus on 127.0.0.1:{self.port} for {', '.join(self._targets)}>"

    def __enter__(self) -> Self:
        self._folder = tempfile.mkdtemp(prefix="otel-pools-prometheus-")
        self.port = free_port()
        config = Path(self._folder, "prometheus.json")  # JSON is YAML
        config.write_text(json.dumps(self._config()), encoding="utf-8")
        flags = [f"--config.file={config}", f"--storage.tsdb.path={self._folder}/data"]
        flags += [f"--web.listen-address=127.0.0.1:{self.port}", "--log.level=error"]
        self._process = subprocess.Popen([self._program, *flags], stdin=subprocess.DEVNULL)
        try:
            until(self._answers, "Prometheus does not come up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def query(self, expr: str, start: float, end: float, patience: float = 10.0) -> list[dict[str, Any]]:
        """The lines of an expression over a time, a point for each scrape; how long it may take, in seconds."""
        asked = urlencode({"query": expr, "start": start, "end": end, "step": SCRAPE})
        with ask(f"http://127.0.0.1:{self.port}/api/v1/query_range?{asked}", timeout=patience) as answer:
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        return found

    def _config(self) -> Mapping[str, Any]:
        jobs = [
            {"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{port}" for port in ports]}]}
            for job, ports in self._targets.items()
        ]
        return {
            "global": {"scrape_interval": f"{SCRAPE * 1000:.0f}ms", "scrape_timeout": "400ms"},
            "scrape_configs": jobs,
        }

    def _answers(self) -> bool:
        if self._process.poll() is not None:
            raise RuntimeError(f"Prometheus ended with {self._process.returncode}")
        try:
            with ask(f"http://127.0.0.1:{self.port}/-/ready", timeout=1) as answer:
                return bool(answer.status == 200)  # noqa: PLR2004
        except URLError:
            return False


def program() -> str:
    """Where Prometheus is."""
    found = shutil.which("prometheus")
    if found is None:
        raise FileNotFoundError("there is no prometheus; on Debian: apt-get install --no-install-recommends prometheus")
    return found


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def until(condition: Any, otherwise: str) -> None:
    """Wait for a condition."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{otherwise} within {PATIENCE:.0f} s")
        time.sleep(0.05)


# -- the play --------------------------------------------------------------------------------


class Played:
    """
    What is left of a load: a Prometheus that has seen it, and from when to when.

    Attributes:
        start: Seconds since the epoch.
        end: Likewise.
    """

    def __init__(self, prometheus: Prometheus, start: float, end: float) -> None:
        self.prometheus = prometheus
        self.start = start
        self.end = end

    def __repr__(self) -> str:
        return f"<Played for {self.end - self.start:.0f} s, seen by {self.prometheus!r}>"

    def lines(self, expr: str, pool: str = ".*") -> list[dict[str, Any]]:
        """What a panel's query brings, all jobs, instances and servers chosen."""
        found = self.prometheus.query(plain(expr, pool), self.start, self.end)
        # A line of nothing but "not a number" is empty in Grafana too.
        return [line for line in found if any(value != "NaN" for _, value in line["values"])]


def plain(expr: str, pool: str = ".*") -> str:
    """An expression as Grafana would send it, everything chosen but one pool."""
    replaced = {"$__rate_interval": WINDOW, "$job": ".*", "$instance": ".*", "$server": ".*", "$pool": pool}
    for name, value in replaced.items():
        expr = expr.replace(name, value)
    return expr


@contextmanager
def servers() -> Iterator[dict[str, str]]:
    """A PostgreSQL, a Valkey, a web server and one with Qdrant's protocol; where they are, as the load wants it."""
    with ExitStack() as stack:
        postgres = stack.enter_context(Postgres("shop"))
        # The receiver asks for INFO, which the demo's server refuses to strangers.
        with patch.object(_valkey, "SETTINGS", (*_valkey.SETTINGS, "+info")):
            valkey = stack.enter_context(_valkey.Valkey())
        web, qdrant = stack.enter_context(Web(4)), stack.enter_context(Qdrant(4))
        yield {
            _load.URL: postgres.url("asyncpg"),
            _load.VALKEY_URL: valkey.url(),
            _load.WEB_URL: web.url,
            _load.QDRANT_URL: qdrant.url,
            _load.QDRANT_GRPC_PORT: str(qdrant.grpc_port),
        }


@contextmanager
def played(seconds: float) -> Iterator[Played]:
    """Play the load for so many seconds of traffic."""
    with ExitStack() as stack:
        places = stack.enter_context(servers())
        # The receivers have an account that may see everything; so has the owner of this server.
        stand_in = StandIn(places[_load.URL].replace("+asyncpg", ""), places[_load.VALKEY_URL])
        stack.enter_context(stand_in)
        with playing(places, seconds) as (load, ports):
            watcher = stack.enter_context(Prometheus({"shop": ports, "servers": [stand_in.port]}))
            start = time.time()
            load.wait(seconds + PATIENCE)
            end = time.time()
        if load.returncode:
            raise RuntimeError(f"the load ended with {load.returncode}")
        yield Played(watcher, start, end)


@contextmanager
def playing(places: Mapping[str, str], seconds: float) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """The load, and the ports of its metrics."""
    command = [sys.executable, str(FOLDER / "load.py"), f"--seconds={seconds}"]
    # The places in the environment, as one holds a password.
    environ, no = {**os.environ, **places}, subprocess.DEVNULL
    with subprocess.Popen(command, stdin=no, stdout=subprocess.PIPE, text=True, env=environ) as load:
        try:
            said = (load.stdout and load.stdout.readline()) or ""
            if not said:
                raise RuntimeError("the load did not begin")
            yield load, [int(port) for port in said.split()]
        finally:
            load.kill()
