"""
What a fleet costs: series, bytes and collections of one process, measured; a thousand, simulated; the rest, computed.

One process plays the load of the dashboards on real servers, with six pools of all four libraries. What it exported is
then sent a thousand times, under other names, to rotel (an independent Collector), and offered on a thousand pages to a
real Prometheus. Needs rotel, prometheus, psutil, and what the demo needs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gzip
import http.client
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
GRAFANA = HERE.parent / "collector-config" / "grafana"
sys.path.insert(0, str(GRAFANA))

from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics  # noqa: E402
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (  # noqa: E402
    ExportMetricsServiceRequest,
)
from promql import ROWS, label, prometheus  # noqa: E402
from stage import Prometheus, free_port, servers, until  # noqa: E402

INSTANCE, SERVICE = "service.instance.id", "service.name"
PAGES, PAUSE = 10, 0.5  # so many looks at the load, so many seconds apart
INTERVAL = 10  # seconds between two scrapes here
FLEET = (1, 100, 10_000)
Told = dict[str, Any]


# -- one process -----------------------------------------------------------------------------


def one() -> Told:
    """A process of its own plays the load; what it exported, and what that cost it."""
    with servers() as places:
        done = subprocess.run(
            [sys.executable, __file__, "--one"], env={**os.environ, **places}, stdout=subprocess.PIPE, check=True
        )
    told: Told = json.loads(done.stdout)
    return told


def play() -> Told:
    """In that process."""
    import logging
    import warnings

    from load import SETTINGS, opened
    from load import play as visit
    from opentelemetry.sdk import metrics as sdk
    from opentelemetry.sdk.metrics.export import AggregationTemporality, InMemoryMetricReader
    from opentelemetry.sdk.resources import Resource

    import otel_pools

    logging.disable()
    warnings.simplefilter("ignore")
    delta = dict.fromkeys((sdk.Counter, sdk.ObservableCounter, sdk.Histogram), AggregationTemporality.DELTA)
    readers = {"cumulative": InMemoryMetricReader(), "delta": InMemoryMetricReader(preferred_temporality=delta)}
    resource = Resource.create({SERVICE: "shop", INSTANCE: "00000000-0000-0000-0000-000000000000"})
    otel_pools.instrument(meter_provider=sdk.MeterProvider(list(readers.values()), resource=resource), **SETTINGS)
    pages: list[str] = []
    last: dict[str, ExportMetricsServiceRequest] = {}
    over = threading.Event()

    def look() -> None:
        while not over.wait(PAUSE):
            looked = {name: reader.get_metrics_data() for name, reader in readers.items()}
            if all(looked.values()) and len(pages) < PAGES:
                pages.append(page(looked["cumulative"]))
                last.update((name, request(data)) for name, data in looked.items())

    looking = threading.Thread(target=look)
    looking.start()
    asyncio.run(visit(opened(os.environ), PAGES * PAUSE + 2))
    over.set()
    looking.join()
    told = {name: size(export) for name, export in last.items()}
    told["cumulative"]["export"] = last["cumulative"].SerializeToString().hex()
    return told | {"pools": pools(last["cumulative"]), "pages": pages, **costs(readers["cumulative"])}


def costs(reader: Any) -> Told:
    """The CPU of one collection and of making bytes of it, in milliseconds, medians."""
    collect, encode = [], []
    for _ in range(30):
        start = time.thread_time()
        data = reader.get_metrics_data()
        middle = time.thread_time()
        gzip.compress(request(data).SerializeToString())
        collect.append(middle - start)
        encode.append(time.thread_time() - middle)
    return {"collect_ms": 1e3 * statistics.median(collect), "encode_ms": 1e3 * statistics.median(encode)}


def request(data: Any) -> ExportMetricsServiceRequest:
    """As it goes over the wire."""
    encoded: ExportMetricsServiceRequest = encode_metrics(data)
    return encoded


def size(export: ExportMetricsServiceRequest) -> Told:
    """Points and bytes."""
    text = export.SerializeToString()
    return {"points": sum(1 for _ in points(export)), "bytes": len(text), "gzip": len(gzip.compress(text))}


def points(export: ExportMetricsServiceRequest) -> Iterator[tuple[Any, Any]]:
    """Metric and point."""
    for resource in export.resource_metrics:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                for point in getattr(metric, metric.WhichOneof("data")).data_points:
                    yield metric, point


def pools(export: ExportMetricsServiceRequest) -> list[Told]:
    """Of each pool: points, Prometheus's series, and how many of these are of histograms."""
    counted: dict[tuple[str, str], Counter[str]] = {}
    for metric, point in points(export):
        names = {pair.key: pair.value.string_value for pair in point.attributes}
        pool = names[ROWS[metric.name].pool_key]
        counts = counted.setdefault((names.get("db.system.name", "http"), pool), Counter())
        lines = len(point.bucket_counts) + 2 if metric.WhichOneof("data") == "histogram" else 1
        counts.update(points=1, series=lines, histogram=lines if lines > 1 else 0)
    return [{"system": system, "pool": pool, **counts} for (system, pool), counts in sorted(counted.items())]


# -- as Prometheus reads it ------------------------------------------------------------------


def page(data: Any) -> str:
    """An export in Prometheus's words, as the Collector's exporter writes it: names by `promql`, no scope's labels."""
    lines: dict[str, list[str]] = {}
    for metric, point in points(request(data)):
        row = ROWS[metric.name]
        labels = ",".join(f'{label(pair.key)}="{_value(pair.value)}"' for pair in point.attributes)
        lines.setdefault(metric.name, []).extend(_lines(row, metric.WhichOneof("data"), point, labels))
    return "".join(f"{line}\n" for name in lines for line in lines[name])


def _value(value: Any) -> str:
    return str(getattr(value, value.WhichOneof("value")))


def _lines(row: Any, kind: str, point: Any, labels: str) -> Iterator[str]:
    if kind != "histogram":
        number = point.as_int if point.WhichOneof("value") == "as_int" else point.as_double
        yield f"{prometheus(row)}{{{labels}}} {number}"
        return
    seen = 0
    for bound, count in zip([*point.explicit_bounds, "+Inf"], point.bucket_counts, strict=True):
        seen += count
        yield f'{prometheus(row, "bucket")}{{{labels},le="{bound}"}} {seen}'
    yield f"{prometheus(row, 'sum')}{{{labels}}} {point.sum}"
    yield f"{prometheus(row, 'count')}{{{labels}}} {point.count}"


# -- a thousand, over OTLP into a Collector ----------------------------------------------------


def collector(export: bytes, fleet: int, rounds: int) -> Told:
    """So many processes export so many times to rotel, which sends them on; CPU, memory, and what arrives."""
    bodies = [gzip.compress(renamed(export, number)) for number in range(fleet)]
    with sink() as (arrived, port), rotel(port) as (agent, taken):
        start, before = time.perf_counter(), sum(agent.cpu_times()[:2])
        highest = [agent.memory_info().rss]
        with ThreadPoolExecutor(4) as senders:
            for _ in range(rounds):
                assert set(senders.map(lambda body: post(taken, body), bodies)) == {200}
                highest.append(agent.memory_info().rss)
        sent = time.perf_counter() - start
        until(lambda: len(arrived) >= fleet * rounds, f"{len(arrived)} of {fleet * rounds} arrived")
        spent = sum(agent.cpu_times()[:2]) - before
    return {
        "fleet": fleet,
        "exports": fleet * rounds,
        "seconds": sent,
        "arrived": len(arrived),
        "instances": len(set(arrived)),
        "cpu_ms_per_export": 1e3 * spent / (fleet * rounds),
        "rss_mb_idle": highest[0] / 2**20,
        "rss_mb": max(highest) / 2**20,
    }


def renamed(export: bytes, number: int) -> bytes:
    """The same export of another process."""
    other = ExportMetricsServiceRequest.FromString(export)
    for pair in other.resource_metrics[0].resource.attributes:
        if pair.key == INSTANCE:
            pair.value.string_value = f"instance-{number:05}"
    return other.SerializeToString()


_kept = threading.local()


def post(port: int, body: bytes) -> int:
    """One export, on a connection that is kept."""
    if not hasattr(_kept, "connection"):
        _kept.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    headers = {"content-type": "application/x-protobuf", "content-encoding": "gzip"}
    _kept.connection.request("POST", "/v1/metrics", body, headers)
    answer = _kept.connection.getresponse()
    answer.read()
    return int(answer.status)


@contextlib.contextmanager
def sink() -> Iterator[tuple[list[str], int]]:
    """A backend that only notes of which process each export is."""
    arrived: list[str] = []

    class Sink(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                arrived.extend(p.value.string_value for p in resource.resource.attributes if p.key == INSTANCE)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Sink)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield arrived, server.server_port
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def rotel(backend: int) -> Iterator[tuple[psutil.Process, int]]:
    """A Collector, and the port where it takes OTLP over HTTP."""
    found = find_spec("rotel")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("rotel is not installed: pip install rotel")
    agent, http_port = Path(found.submodule_search_locations[0]) / "rotel-agent", free_port()
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--pid-file", f"{folder}/pid", "--log-file", f"{folder}/log", "--exporter", "otlp"]
        flags += ["--otlp-grpc-endpoint", f"127.0.0.1:{free_port()}", "--otlp-http-endpoint", f"127.0.0.1:{http_port}"]
        flags += ["--otlp-exporter-protocol", "http", "--otlp-exporter-endpoint", f"http://127.0.0.1:{backend}"]
        # It is linked to the library of one version of Python.
        environment = {"LD_LIBRARY_PATH": sysconfig.get_config_var("LIBDIR") or ""}
        with subprocess.Popen(
            [agent, "start", *flags], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            try:
                until(lambda: _listens(http_port), "rotel does not come up")
                yield psutil.Process(process.pid), http_port
            finally:
                process.kill()


def _listens(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
    try:
        connection.connect()
    except OSError:
        return False
    connection.close()
    return True


# -- a thousand, scraped by a Prometheus -----------------------------------------------------------


class Fleet(Prometheus):
    """A Prometheus that scrapes so many pages of one server, each an instance."""

    def __init__(self, port: int, fleet: int) -> None:
        super().__init__({"shop": [port]})
        self._fleet = fleet

    def _config(self) -> Told:
        (port,) = self._targets["shop"]
        instances = {f"/{number}": f"instance-{number:05}" for number in range(self._fleet)}
        pages = [
            {"targets": [f"127.0.0.1:{port}"], "labels": {"__metrics_path__": path, "instance": name}}
            for path, name in instances.items()
        ]
        jobs = [{"job_name": "shop", "static_configs": pages}]
        return {"global": {"scrape_interval": f"{INTERVAL}s", "scrape_timeout": "8s"}, "scrape_configs": jobs}

    def look(self) -> Told:
        """Its own numbers, and the system's of it."""
        process = psutil.Process(self._process.pid)
        own: dict[str, float] = defaultdict(float)  # over kinds of samples
        for line in page_of(self.port, "/metrics"):
            if line.startswith("prometheus_tsdb_head_"):
                own[line.split("{")[0].split()[0]] += float(line.split()[-1])
        return {
            "cpu": sum(process.cpu_times()[:2]),
            "rss": process.memory_info().rss,
            "series": own["prometheus_tsdb_head_series"],
            "samples": own["prometheus_tsdb_head_samples_appended_total"],
            "wal": sum(file.stat().st_size for file in Path(self._folder, "data").rglob("*") if file.is_file()),
        }


def page_of(port: int, path: str) -> list[str]:
    """The lines of a page."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path)
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return lines


def scraped(pages: list[str], fleet: int) -> Told:
    """A Prometheus scrapes so many processes, several times; what that costs it, and the queries of the overview."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(pages, file)
        file.flush()
        offered = subprocess.Popen([sys.executable, __file__, "--serve", file.name], stdout=subprocess.PIPE, text=True)
        try:
            assert offered.stdout is not None
            port = int(offered.stdout.readline())
            with Fleet(port, fleet) as prometheus:
                return watched(prometheus, fleet, len(pages))
        finally:
            offered.kill()
            offered.wait()


def watched(prometheus: Fleet, fleet: int, rounds: int) -> Told:
    """From when all have been scraped twice to when the pages run out."""
    empty = prometheus.look()
    time.sleep(2 * INTERVAL + 1)
    first, then = prometheus.look(), time.time()
    time.sleep((min(rounds, 6) - 2) * INTERVAL)
    last, now = prometheus.look(), time.time()
    up = prometheus.query("sum(up)", now, now)[0]["values"][-1][1]
    samples = last["samples"] - first["samples"]
    return {
        "fleet": fleet,
        "up": int(up),
        "interval": INTERVAL,
        "series": int(last["series"]),
        "samples_per_second": samples / (now - then),
        "cpu_us_per_sample": 1e6 * (last["cpu"] - first["cpu"]) / samples,
        "rss_mb": last["rss"] / 2**20,
        "bytes_per_series": (last["rss"] - empty["rss"]) / last["series"],
        "wal_bytes_per_sample": (last["wal"] - first["wal"]) / samples,
        "query_ms": asked(prometheus, now),
    }


def asked(prometheus: Fleet, now: float) -> dict[str, float]:
    """How long each of the overview's queries takes for one point of its line, everything chosen."""
    from stage import plain

    board = json.loads((GRAFANA / "overview.json").read_text(encoding="utf-8"))
    taken = []
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            began = time.perf_counter()
            prometheus.query(plain(target["expr"]).replace("[4s]", f"[{4 * INTERVAL}s]"), now, now, 60)
            taken.append(1e3 * (time.perf_counter() - began))
    return {"median": statistics.median(taken), "longest": max(taken), "all": sum(taken), "queries": len(taken)}


def serve(file: str) -> None:
    """Each path is a process, whose page is another each time that it is asked for."""
    pages = [gzip.compress(text.encode()) for text in json.loads(Path(file).read_text(encoding="utf-8"))]
    seen: Counter[bytes] = Counter()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                path = (await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)[1]
                body = pages[min(seen[path], len(pages) - 1)]
                seen[path] += 1
                head = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain; version=0.0.4\r\ncontent-encoding: gzip\r\n"
                writer.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
                await writer.drain()

    async def main() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=2000)
        print(server.sockets[0].getsockname()[1], flush=True)
        await asyncio.Event().wait()

    asyncio.run(main())


# -- the rest, computed ------------------------------------------------------------------------------


def computed(told: Told, fleet: int, interval: int) -> Told:
    """What so many processes cost, exporting at that interval, if each costs what one of a thousand did."""
    single, gateway, store = told["one"], told["collector"], told["prometheus"]
    series = fleet * sum(pool["series"] for pool in single["pools"])
    return {
        "processes": fleet,
        "interval_s": interval,
        "series": series,
        "samples_per_s": series / interval,
        "gzip_kb_per_s": fleet * single["cumulative"]["gzip"] / interval / 1e3,
        "collector_cores": fleet * gateway["cpu_ms_per_export"] / interval / 1e3,
        "prometheus_cores": series / interval * store["cpu_us_per_sample"] / 1e6,
        "prometheus_gb": series * store["bytes_per_series"] / 1e9,
    }


def table(told: Told) -> list[str]:
    """As lines."""
    single = told["one"]
    lines = [f"{pool['library']:12}{pool['pool']:12}{pool['points']:6} points {pool['series']:6} series "
             f"({pool['histogram']} of histograms)" for pool in single["pools"]]  # fmt: skip
    for name in ("cumulative", "delta"):
        export = single[name]
        lines.append(f"{name:12}{export['points']} points, {export['bytes']} bytes, {export['gzip']} gzipped")
    lines.append(f"collect {single['collect_ms']:.2f} ms, encode and gzip {single['encode_ms']:.2f} ms of CPU")
    lines += [f"{part}: {json.dumps(told[part])}" for part in ("collector", "prometheus")]
    return [*lines, *(json.dumps(row) for row in told["computed"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fleet", type=int, default=1000, help="how many processes are simulated")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(play()))
        return
    if chosen.serve:
        serve(chosen.serve)
        return
    began = time.monotonic()

    def at(part: str) -> None:
        print(f"{time.monotonic() - began:5.0f} s: {part}", file=sys.stderr, flush=True)

    at("one process")
    told: Told = {"one": one()}
    at(f"{chosen.fleet} into the Collector")
    export = bytes.fromhex(told["one"]["cumulative"].pop("export"))
    told["collector"] = collector(export, chosen.fleet, 3)
    at(f"{chosen.fleet} into Prometheus")
    told["prometheus"] = scraped(told["one"].pop("pages"), chosen.fleet)
    told["computed"] = [computed(told, fleet, interval) for fleet in FLEET for interval in (15, 60)]
    print(json.dumps(told) if chosen.json else "\n".join(table(told)))


if __name__ == "__main__":
    main()
