"""A small OTLP receiver on this machine alone, which keeps the newest two points of every series."""

from __future__ import annotations

import hashlib
import math
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, islice
from socketserver import TCPServer
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

# The protobuf runtime raises it, and has no types of its own.
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import (
    AggregationTemporality,
    HistogramDataPoint,
    Metric,
    NumberDataPoint,
)
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from . import _vocabulary as words

if TYPE_CHECKING:
    from typing_extensions import Self

# Bytes of one request, packed or not: a real export is a few kilobytes. Read, it takes up to forty times as much.
MAX_BODY = 4 * 1024 * 1024
# Of a body that we refuse, as much is still read, so that the client gets to see why.
MAX_DRAINED = 16 * MAX_BODY
# Series, of all processes together; the one not heard of for longest gives way.
MAX_SERIES = 20_000
# Of one request: resources, scopes and metrics that are looked at, each inside the one before; points; and spans.
MAX_PARTS, MAX_POINTS, MAX_SPANS = 1000, 20_000, 1000
# Of one point: attributes, characters of each text, and buckets.
MAX_ATTRIBUTES, MAX_TEXT, MAX_BUCKETS = 24, 256, 200
# Requests over HTTP at a time; whoever comes then has to come again.
MAX_CLIENTS = 64
# Seconds that a client may keep us waiting.
PATIENCE = 5.0

PROTOBUF = "application/x-protobuf"
ENCODINGS = {"gzip": 31, "deflate": 15}  # to the window bits that make zlib expect this format and no other
INSTANCE, SERVICE, PID = "service.instance.id", "service.name", "process.pid"
OUR_SCOPES = "otel_pools."
HOST = "127.0.0.1"

Scalar = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Distribution:
    """
    A histogram: how many values fell into which bucket.

    Attributes:
        counts: One more than *bounds*; each bucket includes its upper bound.
        max: No value is above this; infinite if that is not known.
    """

    count: int
    sum: float
    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    max: float = math.inf

    def __add__(self, other: Distribution) -> Distribution:
        """Both together; if their buckets differ they cannot be added, and *other* alone remains."""
        if self.bounds != other.bounds:
            return other
        counts = tuple(a + b for a, b in zip(self.counts, other.counts, strict=True))
        most = max(self.max, other.max)
        return Distribution(self.count + other.count, self.sum + other.sum, self.bounds, counts, most)

    def since(self, earlier: Distribution) -> Distribution:
        """What came after *earlier*; all of it if the process has begun to count anew."""
        if self.bounds != earlier.bounds or self.count < earlier.count:
            return self
        counts = tuple(max(a - b, 0) for a, b in zip(self.counts, earlier.counts, strict=True))
        return Distribution(sum(counts), self.sum - earlier.sum, self.bounds, counts, self.max)

    def quantile(self, q: float) -> float | None:
        """The value below which the share *q* (0..1) lies, spread evenly inside a bucket; None without values."""
        total, below = sum(self.counts), 0
        if not total or not self.bounds:
            return None
        last = self.max if self.max < math.inf else self.bounds[-1]  # beyond the last bound: at least so much
        for upper, lower, count in zip((*self.bounds, last), (0.0, *self.bounds), self.counts, strict=True):
            if count and below + count >= q * total:
                highest = max(min(upper, self.max), lower)
                return lower + (highest - lower) * (q * total - below) / count
            below += count
        return last


@dataclass(frozen=True, slots=True)
class Point:
    """
    One value of one series.

    Attributes:
        source: Which process: its `service.instance.id`, or its whole resource.
        service: Its `service.name`, or nothing.
        seconds: When, since the epoch.
        pid: The `process.pid` of the process, if it says so.
        heard: When it came here, on the monotonic clock.
        delta: Whether *value* counts from the previous point on, and not from the start.
    """

    source: str
    service: str
    name: str
    attributes: Mapping[str, Scalar]
    value: int | float | Distribution
    seconds: float
    delta: bool = field(default=False, compare=False)
    pid: str = field(default="", compare=False)
    heard: float = field(default=0.0, compare=False)

    @property
    def series(self) -> tuple[Any, ...]:
        """What two points of the same series have in common."""
        return self.source, self.name, frozenset(self.attributes.items())


@dataclass(frozen=True, slots=True)
class Series:
    """The newest point of a series, counted from the start, and the one before it."""

    now: Point
    before: Point | None = None

    def then(self, point: Point) -> Series:
        """The series one point later; what counts from point to point is added up."""
        value, known = point.value, self.now.value
        if point.delta and type(known) is type(value):
            point = replace(point, value=known + value)  # type: ignore[operator]  # of one type, both
        return Series(point, self.now)


@dataclass(frozen=True, slots=True)
class Wait:
    """
    A span of ours: a wait that was slow or failed.

    Attributes:
        source: As of a point.
        pool: The name of the pool.
        error: Why it got no connection, or nothing.
        seconds: How long it took.
        holders: The attributes of its events, one for each who held a connection when it failed.
    """

    source: str
    pool: str
    error: str
    seconds: float
    holders: tuple[Mapping[str, Scalar], ...] = ()


class Receiver:
    """
    Receives OTLP over HTTP on 127.0.0.1; a context manager.

    Metrics are kept, the newest two points of each series; of spans and log
    records it only counts how many came. What comes by another way than HTTP
    is handed to `take`.

    Args:
        on_metrics: Called with the points of each export, in the thread of the request.
        on_waits: Called with those of our spans that have come, likewise.
        port: Where to listen; 0 is any free port.

    Raises:
        OSError: The port is taken.

    Attributes:
        exports: How many requests with metrics have come.
        spans: How many spans have come.
        logs: How many log records have come.
    """

    def __init__(
        self,
        on_metrics: Callable[[list[Point]], None] | None = None,
        on_waits: Callable[[list[Wait]], None] | None = None,
        port: int = 0,
    ) -> None:
        self.exports = self.spans = self.logs = 0
        self._on_metrics = on_metrics
        self._on_waits = on_waits
        self._series: dict[tuple[Any, ...], Series] = {}
        self._lock = threading.Lock()
        self._reading = threading.Lock()
        self._server = _Server(self, port)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="otel-pools-receiver")

    def __repr__(self) -> str:
        return (
            f"<Receiver on {self.endpoint} [{self.exports} exports, {len(self._series)} series"
            f" | {self.spans} spans | {self.logs} logs]>"
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def endpoint(self) -> str:
        """What belongs into `OTEL_EXPORTER_OTLP_ENDPOINT`."""
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}"

    def series(self) -> list[Series]:
        """Every series as it is now."""
        with self._lock:
            return list(self._series.values())

    def close(self) -> None:
        """Stop listening, and end the requests that are under way."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.hang_up()
        self._server.server_close()

    def forget(self, sources: Collection[str]) -> None:
        """Drop every series of these processes."""
        with self._lock:
            for key in [key for key, one in self._series.items() if one.now.source in sources]:
                del self._series[key]

    def take(self, path: str, body: bytes, encoding: str = "identity") -> None:
        """
        Read one request.

        Args:
            path: As in OTLP over HTTP.
            body: A message, packed if there is an *encoding*.
            encoding: ``gzip``, ``deflate`` or ``identity``.

        Raises:
            LookupError: There is nothing at this path.
            ValueError: The body is no such message.
            RefusedError: It is too large, or packed in a way that we do not know.
        """
        reader = {"/v1/metrics": self._metrics, "/v1/traces": self._traces, "/v1/logs": self._logs}[path]
        # One at a time: a message takes many times its length while it is read.
        with self._reading:
            try:
                reader(_unpacked(body, encoding))
            except DecodeError as error:
                raise ValueError("not a protobuf message of this kind") from error

    def _metrics(self, body: bytes) -> None:
        points = list(islice(_points(ExportMetricsServiceRequest.FromString(body)), MAX_POINTS))
        with self._lock:
            self.exports += 1
            for point in points:
                self._keep(point)
        if self._on_metrics is not None:
            self._on_metrics(points)

    def _keep(self, point: Point) -> None:
        known = self._series.pop(point.series, None)
        if known is None and len(self._series) >= MAX_SERIES:
            del self._series[next(iter(self._series))]
        # Put back at the end, so that the first is the one not heard of for longest.
        self._series[point.series] = Series(point) if known is None else known.then(point)

    def _traces(self, body: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        count = sum(len(scope.spans) for resource in request.resource_spans for scope in resource.scope_spans)
        with self._lock:
            self.spans += count
        if self._on_waits is not None:
            self._on_waits(list(_waits(request)))

    def _logs(self, body: bytes) -> None:
        request = ExportLogsServiceRequest.FromString(body)
        count = sum(len(scope.log_records) for resource in request.resource_logs for scope in resource.scope_logs)
        with self._lock:
            self.logs += count


# -- from protobuf to points ---------------------------------------------------------


def _points(request: ExportMetricsServiceRequest) -> Iterator[Point]:
    for resource in islice(request.resource_metrics, MAX_PARTS):
        known = _attributes(resource.resource.attributes)
        process = _source(resource.resource, known), str(known.get(SERVICE, "")), str(known.get(PID, ""))
        for scope in islice(resource.scope_metrics, MAX_PARTS):
            for metric in islice(scope.metrics, MAX_PARTS):
                yield from _of(metric, *process)


def _source(resource: Resource, known: Mapping[str, Scalar]) -> str:
    """The instance; without one the whole resource, of which a digest is enough."""
    whole = resource.SerializeToString(deterministic=True)
    return str(known.get(INSTANCE) or hashlib.sha256(whole).hexdigest())


def _of(metric: Metric, source: str, service: str, pid: str) -> Iterator[Point]:
    kind = metric.WhichOneof("data")
    if kind not in {"gauge", "sum", "histogram"}:
        return
    data = getattr(metric, kind)
    delta = getattr(data, "aggregation_temporality", None) == AggregationTemporality.AGGREGATION_TEMPORALITY_DELTA
    for point in islice(data.data_points, MAX_POINTS):
        value = _distribution(point) if kind == "histogram" else _number(point)
        if value is not None:
            attributes, seconds = _attributes(point.attributes), point.time_unix_nano / 1e9
            yield Point(
                source, service, metric.name[:MAX_TEXT], attributes, value, seconds, delta, pid, time.monotonic()
            )


def _number(point: NumberDataPoint) -> int | float | None:
    kind = point.WhichOneof("value")
    return None if kind is None else cast("int | float", getattr(point, kind))


def _distribution(point: HistogramDataPoint) -> Distribution | None:
    if len(point.bucket_counts) != len(point.explicit_bounds) + 1 or len(point.bucket_counts) > MAX_BUCKETS:
        return None  # no buckets, or broken ones: nothing to see in it
    bounds, counts = tuple(point.explicit_bounds), tuple(point.bucket_counts)
    most = point.max if point.HasField("max") else math.inf
    return Distribution(point.count, point.sum, bounds, counts, most)


def _attributes(pairs: Iterable[KeyValue]) -> dict[str, Scalar]:
    """Lists and maps are left out: nothing of ours has them."""
    scalars = {"string_value", "int_value", "double_value", "bool_value"}
    kinds = ((pair.key, pair.value, pair.value.WhichOneof("value")) for pair in islice(pairs, MAX_ATTRIBUTES))
    return {key[:MAX_TEXT]: _short(getattr(value, kind)) for key, value, kind in kinds if kind in scalars}


def _short(value: Scalar) -> Scalar:
    return value[:MAX_TEXT] if isinstance(value, str) else value


def _waits(request: ExportTraceServiceRequest) -> Iterator[Wait]:
    """Those spans that are ours; the others stay unread."""
    for resource in islice(request.resource_spans, MAX_PARTS):
        source = _source(resource.resource, _attributes(resource.resource.attributes))
        scopes = islice(resource.scope_spans, MAX_PARTS)
        ours = (scope.spans for scope in scopes if scope.scope.name.startswith(OUR_SCOPES))
        for span in islice(chain.from_iterable(ours), MAX_SPANS):
            yield _wait(span, source)


def _wait(span: Span, source: str) -> Wait:
    attributes = _attributes(span.attributes)
    pool = attributes.get(words.SEMCONV_POOL) or attributes.get(words.OUR_POOL) or ""
    holders = (event for event in islice(span.events, MAX_ATTRIBUTES) if event.name == words.HOLDER)
    return Wait(
        source,
        str(pool),
        str(attributes.get(words.ERROR, "")),
        (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9,
        tuple(_attributes(event.attributes) for event in holders),
    )


# -- HTTP ------------------------------------------------------------------------------


class RefusedError(Exception):
    """A request that is not read; the message says why."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # closing waits for them, so that none outlives us

    def __init__(self, receiver: Receiver, port: int) -> None:
        self.receiver = receiver
        self._open: set[socket.socket] = set()
        super().__init__((HOST, port), _Handler)

    def server_bind(self) -> None:
        # Without HTTPServer's own, which asks the DNS for our name.
        TCPServer.server_bind(self)

    def get_request(self) -> tuple[socket.socket, Any]:
        request, address = super().get_request()
        self._open.add(request)
        return request, address

    def verify_request(self, *_: Any) -> bool:
        """Whether there is a thread to spare for it."""
        return len(self._open) <= MAX_CLIENTS

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """End what clients have left open: a thread that reads from one sees its end."""
        for request in list(self._open):
            try:
                request.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # closed in the meantime

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is not worth a word; anything else is a mistake of ours."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    # HTTP/1.0, the default: a connection per export, and none left idle when we close.
    timeout = PATIENCE
    server: _Server

    def do_POST(self) -> None:
        try:
            self._take()
        except RefusedError as refused:
            self._answer(refused.status, str(refused))
        except LookupError:
            self._answer(HTTPStatus.NOT_FOUND, "there are /v1/metrics, /v1/traces and /v1/logs")
        except ValueError as error:
            self._answer(HTTPStatus.BAD_REQUEST, str(error))

    def _take(self) -> None:
        body = self._body()
        kind = self.headers.get_content_type()
        if kind != PROTOBUF:
            # Also keeps out the web pages in a browser on this machine: they may not send this type.
            raise RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"{PROTOBUF} is spoken here, not {kind}")
        path = self.path.partition("?")[0]
        self.server.receiver.take(path, body, self.headers.get("Content-Encoding", "identity"))
        self._answer(HTTPStatus.OK, "")  # the message "all accepted" has no bytes

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise RefusedError(HTTPStatus.LENGTH_REQUIRED, "Content-Length is needed")
        if int(length) > MAX_BODY:
            self._drain(min(int(length), MAX_DRAINED))
            raise _too_large()
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise RefusedError(HTTPStatus.BAD_REQUEST, "the body is shorter than announced")
        return body

    def _drain(self, rest: int) -> None:
        while rest > 0 and (piece := self.rfile.read(min(rest, 65536))):
            rest -= len(piece)

    def _answer(self, status: HTTPStatus, reason: str) -> None:
        said = reason.encode()
        self.send_response(status)
        self.send_header("Content-Type", PROTOBUF if status == HTTPStatus.OK else "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, format: str, *args: Any) -> None:
        """Not to the terminal, where the table is."""


def _too_large() -> RefusedError:
    return RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {MAX_BODY} bytes")


def _unpacked(body: bytes, encoding: str) -> bytes:
    """The body as it was before it was packed; never more than `MAX_BODY` of it in memory."""
    if encoding == "identity":
        return body
    if encoding not in ENCODINGS:
        raise RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"not a Content-Encoding we know: {encoding}")
    unpacker = zlib.decompressobj(ENCODINGS[encoding])
    try:
        plain = unpacker.decompress(body, MAX_BODY + 1)
    except zlib.error as error:
        raise ValueError(f"not {encoding}") from error
    if len(plain) > MAX_BODY:
        raise _too_large()
    if not unpacker.eof:
        raise ValueError(f"{encoding} that ends too early")
    return plain
