"""Tests of whole pipelines on real parts: through another's Collector with an outage, and to an alert at a webhook."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote
from urllib.request import urlopen

import pytest
from listener import Listener
from pipelines import PROMETHEUS

HOST = "127.0.0.1"
PROGRAM = Path(__file__).with_name("pipeline_program.py")
SECONDS = 60  # for everything that must happen, on a machine that is busy

prometheus_program = shutil.which("prometheus")
alertmanager_program = shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")


@functools.cache
def rotel():
    """The Collector in the wheel and the environment in which it runs; or why it does not."""
    found = find_spec("rotel")
    if found is None:
        return None, {}, "rotel, an independent Collector, is not installed"
    agent = Path(found.submodule_search_locations[0]) / "rotel-agent"
    # It is linked to the library of one version of Python.
    environment = {"LD_LIBRARY_PATH": sysconfig.get_config_var("LIBDIR") or ""}
    tried = subprocess.run([agent, "--version"], env=environment, check=False, capture_output=True, text=True)
    return agent, environment, None if tried.returncode == 0 else f"rotel does not run here: {tried.stderr.strip()}"


def comes(condition, what):
    """Wait until *condition* is true; return what it is."""
    deadline = time.monotonic() + SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, f"never came: {what() if callable(what) else what}"
        time.sleep(0.05)
    return found


def free_port():
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def listens(port):
    with socket.socket() as knock:
        return knock.connect_ex((HOST, port)) == 0


@contextmanager
def running(command, log, port, **how):
    """A program that listens on a port, until the end of the block."""
    with (
        log.open("ab") as said,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, **how) as process,
    ):
        try:
            comes(lambda: process.poll() is not None or listens(port), f"{command[0]} on port {port}")
            assert process.poll() is None, log.read_text()[-2000:]
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


class Application:
    """The program under `opentelemetry-instrument`, told what to do and asked what it has done."""

    def __init__(self, postgres, valkey, log, **environment):
        stores = [postgres.url("psycopg"), f"redis://{HOST}:{valkey.port}/0"]
        plain = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
        self._log = log.open("wb")
        self._process = subprocess.Popen(
            [Path(sys.executable).with_name("opentelemetry-instrument"), sys.executable, PROGRAM, *stores],
            env={**plain, "OTEL_SERVICE_NAME": "shop", **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            pipe.close()

    def does(self, what):
        """Let it do something; return everything it has done by then."""
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def ends(self):
        """Let it end as programs do, with a last export."""
        self._process.stdin.close()
        assert self._process.wait(SECONDS) == 0


class Outage:
    """Somebody in the place of a server, who ends every connection at once and counts them; a context manager."""

    def __init__(self, port):
        self.knocks = 0
        self._listener = socket.create_server((HOST, port))
        self._thread = threading.Thread(target=self._refuse)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _refuse(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            connection.close()
            self.knocks += 1


class Backend:
    """Our receiver at the end of the pipeline, which can go away and come back on its port."""

    def __init__(self):
        self.newest = {}
        self.spans = 0
        self._receiver = None
        self.port = free_port()

    def __enter__(self):
        from otel_pools._receiver import Receiver

        self._receiver = Receiver(self._take, port=self.port)
        self._receiver.__enter__()
        return self

    def __exit__(self, *_):
        self.spans += self._receiver.spans
        self._receiver.close()

    def _take(self, points):
        for point in points:
            known = self.newest.get(point.series)
            # What has been tried again may come after what is newer.
            if known is None or known.seconds <= point.seconds:
                self.newest[point.series] = point

    def counted(self):
        """What the counters, and the counts of the histograms, say by now: as the program counts itself."""

        def total(name, pool):
            found = [p for p in list(self.newest.values()) if p.name == name and pool in p.attributes.values()]
            return sum(getattr(point.value, "count", point.value) for point in found)

        attempts = {pool: total("otel_pools.checkouts", pool) for pool in ("shop", "cache")}
        waits = {pool: total("db.client.connection.wait_time", pool) for pool in ("shop", "cache")}
        return attempts | {"timeouts": total("db.client.connection.timeouts", "shop")}, waits


@pytest.mark.parametrize(
    ("protocol", "what"), [("grpc", "collector"), ("http/protobuf", "collector"), ("http/protobuf", "backend")]
)
def test_an_outage_loses_no_increment(protocol, what, postgres, valkey, tmp_path):
    """Whichever is away, the Collector or what is behind it, in the end all counters are what the program counted."""
    agent, environment, reason = rotel()
    if reason:
        pytest.skip(reason)
    pytest.importorskip(f"opentelemetry.exporter.otlp.proto.{protocol.partition('/')[0]}")
    grpc, http, backend = free_port(), free_port(), Backend()
    taken = grpc if protocol == "grpc" else http
    collector = functools.partial(
        running,
        [
            *(agent, "start", "--pid-file", tmp_path / "pid", "--log-file", tmp_path / "rotel.log"),
            *("--otlp-grpc-endpoint", f"{HOST}:{grpc}", "--otlp-http-endpoint", f"{HOST}:{http}"),
            *("--exporter", "otlp", "--otlp-exporter-protocol", "http", "--batch-timeout", "100ms"),
            *("--otlp-exporter-endpoint", f"http://{HOST}:{backend.port}"),
            *("--otlp-exporter-retry-initial-backoff", "100ms", "--otlp-exporter-retry-max-backoff", "500ms"),
        ],
        tmp_path / "said.log",
        taken,
        env=environment,
    )
    application = Application(
        postgres,
        valkey,
        tmp_path / "application.log",
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://{HOST}:{taken}",
        OTEL_EXPORTER_OTLP_PROTOCOL=protocol,
        OTEL_EXPORTER_OTLP_TIMEOUT="1",
        OTEL_METRIC_EXPORT_INTERVAL="300",
        OTEL_LOGS_EXPORTER="none",
    )

    stays, leaves, port = (
        (lambda: backend, collector, taken) if what == "collector" else (collector, lambda: backend, backend.port)
    )

    with application, stays():
        with leaves():
            before = application.does("work 20")
            comes(lambda: backend.counted()[1]["shop"] == before["shop"], backend.counted)
        with Outage(port) as outage:
            application.does("work 20")
            comes(lambda: outage.knocks > 1, f"attempts to reach the {what}")
            during = application.does("work 20")
            seen = backend.counted()
        with leaves():
            after = application.does("work 20")
            application.ends()
            comes(lambda: backend.counted()[1]["shop"] == after["shop"], backend.counted)
            comes(lambda: backend.counted()[0]["shop"] == after["shop"], backend.counted)

    assert before["shop"] < during["shop"] < after["shop"]
    assert seen[1]["shop"] < during["shop"]  # it was an outage
    assert after["timeouts"] == 4 * 4
    assert (after, {pool: after[pool] for pool in ("shop", "cache")}) == backend.counted()
    assert backend.spans >= before["timeouts"]  # each failed wait has one


# -- Prometheus, rules, Alertmanager, webhook --------------------------------------------


class Webhook(Listener):
    """Takes what Alertmanager sends; a context manager."""

    def __init__(self):
        super().__init__(_Hook)
        self.alerts = []

    def told(self, name, status):
        """The alerts of this name and status."""
        return [a for a in self.alerts if (a["labels"]["alertname"], a["status"]) == (name, status)]


class _Hook(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.alerts += body["alerts"]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


def hurried(folder, scraped, alertmanager, hook):
    """Copies of our files in which nobody waits for long, and everybody is on this machine."""
    told = (PROMETHEUS / "prometheus.yml").read_text("utf-8")
    told = re.sub(r"(_interval): \w+", r"\1: 300ms", told)
    told = told.replace("alertmanager:9093", f"{HOST}:{alertmanager}")
    told = re.sub(r"(?s)\nscrape_configs:.*", "\nscrape_configs:\n", told)
    told += f"  - job_name: shop\n    static_configs:\n      - targets: ['{HOST}:{scraped}']\n"
    (folder / "prometheus.yml").write_text(told)
    (folder / "rules.yml").write_bytes((PROMETHEUS / "rules.yml").read_bytes())
    alerts = (PROMETHEUS / "alerts.yml").read_text("utf-8")
    (folder / "alerts.yml").write_text(re.sub(r"\n( +)for: \w+", r"\n\1for: 1s", alerts))
    routed = (PROMETHEUS / "alertmanager.yml").read_text("utf-8")
    routed = re.sub(r"(group_wait|group_interval): \w+", r"\1: 300ms", routed)
    routed = re.sub(r"url: http://localhost:\d+", f"url: http://{HOST}:{hook}", routed)
    (folder / "alertmanager.yml").write_text(routed)


@pytest.mark.skipif(prometheus_program is None, reason="Prometheus is not installed (Debian's package prometheus)")
@pytest.mark.skipif(
    alertmanager_program is None, reason="Alertmanager is not installed (Debian's package prometheus-alertmanager)"
)
def test_an_exhausted_pool_reaches_the_webhook(postgres, valkey, tmp_path):
    """A pool runs dry: the alert arrives at the webhook, with its labels and words; and its end, when it is over."""
    pytest.importorskip("opentelemetry.exporter.prometheus")
    scraped, asked, routed = free_port(), free_port(), free_port()
    with ExitStack() as stack:
        hook = stack.enter_context(Webhook())
        hurried(tmp_path, scraped, routed, hook.server_address[1])
        settings = {"OTEL_METRICS_EXPORTER": "prometheus", "OTEL_TRACES_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none"}
        where = {"OTEL_EXPORTER_PROMETHEUS_HOST": HOST, "OTEL_EXPORTER_PROMETHEUS_PORT": str(scraped)}
        application = Application(postgres, valkey, tmp_path / "application.log", **settings, **where)
        stack.enter_context(application)
        alertmanager = [
            *(alertmanager_program, f"--config.file={tmp_path}/alertmanager.yml", f"--storage.path={tmp_path}/told"),
            *(f"--web.listen-address={HOST}:{routed}", "--cluster.listen-address="),
        ]
        stack.enter_context(running(alertmanager, tmp_path / "alertmanager.log", routed))
        prometheus = [
            *(prometheus_program, f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/tsdb"),
            f"--web.listen-address={HOST}:{asked}",
        ]
        stack.enter_context(running(prometheus, tmp_path / "prometheus.log", asked))

        application.does("work 3")
        comes(lambda: ask(asked, 'pool:otel_pools_utilisation:ratio{pool="shop"}') is not None, "the pool's record")
        assert hook.alerts == []
        application.does("hold")
        (exhausted, *_) = comes(lambda: hook.told("PoolExhausted", "firing"), lambda: hook.alerts)
        comes(lambda: hook.told("PoolTimeouts", "firing"), lambda: hook.alerts)
        full = ask(asked, 'pool:otel_pools_saturation:ratio{pool="shop"}')
        failing = [rule for rule in rules(asked) if rule["health"] != "ok"]
        application.does("release")
        comes(lambda: hook.told("PoolExhausted", "resolved"), lambda: hook.alerts)

    assert {"job": "shop", "instance": f"{HOST}:{scraped}", "pool": "shop", "server_address": HOST} == {
        name: exhausted["labels"][name] for name in ("job", "instance", "pool", "server_address")
    }
    assert exhausted["labels"]["severity"] == "critical"
    assert f"pool shop of shop on {HOST}:{scraped} is exhausted" == exhausted["annotations"]["summary"]
    assert exhausted["annotations"]["runbook_url"] == "docs/runbook.md#poolexhausted"
    assert full > 1
    # On real series too: two that cannot be told apart would be an error here, and nowhere else.
    assert failing == []
    # The cache is at peace, and so nobody is told of it.
    assert {"shop"} == {alert["labels"].get("pool") for alert in hook.alerts}


def ask(port, query):
    """The first value that Prometheus answers a query with, or None."""
    with urlopen(f"http://{HOST}:{port}/api/v1/query?query={quote(query)}") as answer:
        result = json.load(answer)["data"]["result"]
    return float(result[0]["value"][1]) if result else None


def rules(port):
    """All rules of Prometheus, and how they fare."""
    with urlopen(f"http://{HOST}:{port}/api/v1/rules") as answer:
        groups = json.load(answer)["data"]["groups"]
    return [rule for group in groups for rule in group["rules"]]
