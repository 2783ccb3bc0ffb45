"""The OTLP receiver, over real HTTP and gRPC: the real exporter on one side, hostile clients on the other."""

from __future__ import annotations

import gzip
import http.client
import socket
import threading
import zlib
from urllib.parse import urlsplit

import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.metrics import Counter, Histogram, MeterProvider
from opentelemetry.sdk.metrics.export import AggregationTemporality, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from otel_pools import _receiver
from otel_pools import _vocabulary as words
from otel_pools._grpc import GrpcDoor
from otel_pools._receiver import Distribution, Receiver, Wait

DELTA = AggregationTemporality.DELTA


@pytest.fixture
def receiver():
    with Receiver() as running:
        yield running


@pytest.fixture
def exported(receiver):
    """A meter whose metrics go to the receiver when flushed; as many as are asked for."""
    providers = []

    def provide(instance="one", **options):
        exporter = OTLPMetricExporter(f"{receiver.endpoint}/v1/metrics", **options)
        reader = PeriodicExportingMetricReader(exporter, export_interval_millis=1e9)
        resource = Resource({"service.name": "shop", "service.instance.id": instance})
        providers.append(MeterProvider([reader], resource))
        return providers[-1]

    yield provide
    for provider in providers:
        provider.shutdown()


def post(receiver, path="/v1/metrics", body=b"", **headers):
    """One request as a hostile client would write it; status and reason."""
    given = {"Content-Type": "application/x-protobuf"} | {key.replace("_", "-"): v for key, v in headers.items()}
    connection = http.client.HTTPConnection(urlsplit(receiver.endpoint).netloc, timeout=10)
    try:
        connection.request("POST", path, body, given)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def values(receiver):
    return {one.now.name: one.now.value for one in receiver.series()}


@pytest.mark.parametrize("compression", list(Compression))
def test_takes_what_the_exporter_sends(receiver, exported, compression):
    """Numbers and histograms arrive as they were recorded, packed or not."""
    provider = exported(compression=compression)
    provider.get_meter("m").create_counter("hits").add(3, {"path": "idle"})
    provider.get_meter("m").create_histogram("wait", explicit_bucket_boundaries_advisory=[1.0, 2.0]).record(1.5)
    provider.force_flush()

    assert values(receiver) == {"hits": 3, "wait": Distribution(1, 1.5, (1.0, 2.0), (0, 1, 0), 1.5)}


def test_keeps_two_points_of_a_series(receiver, exported):
    """The newest point and the one before it are there, so that a difference can be told."""
    provider = exported()
    hits = provider.get_meter("m").create_counter("hits")
    for _ in range(3):
        hits.add(1)
        provider.force_flush()
    [series] = receiver.series()

    assert (series.now.value, series.before.value) == (3, 2)
    assert series.now.seconds > series.before.seconds


def test_adds_deltas_up(receiver, exported):
    """Of a process that exports differences, the sum is kept, as of the others."""
    provider = exported(preferred_temporality={Counter: DELTA, Histogram: DELTA})
    hits = provider.get_meter("m").create_counter("hits")
    wait = provider.get_meter("m").create_histogram("wait", explicit_bucket_boundaries_advisory=[1.0])
    for _ in range(3):
        hits.add(2)
        wait.record(0.5)
        provider.force_flush()

    assert values(receiver) == {"hits": 6, "wait": Distribution(3, 1.5, (1.0,), (3, 0), 0.5)}


def test_keeps_processes_apart(receiver, exported):
    """The same series of two instances are two series."""
    for instance in ("one", "two"):
        provider = exported(instance)
        provider.get_meter("m").create_counter("hits").add(1)
        provider.force_flush()

    assert sorted((one.now.source, one.now.service) for one in receiver.series()) == [("one", "shop"), ("two", "shop")]


def test_forgets_the_stalest_series_first(receiver, exported, monkeypatch):
    """There is a limit to the series it keeps; what was heard of last stays."""
    monkeypatch.setattr(_receiver, "MAX_SERIES", 2)
    provider = exported()
    hits = provider.get_meter("m").create_counter("hits")
    for path in ("a", "b", "c"):
        hits.add(1, {"path": path})
    provider.force_flush()

    assert [one.now.attributes["path"] for one in receiver.series()] == ["b", "c"]


def test_tells_of_each_export(exported):
    """Whoever asked to be told gets the points of the export."""
    told = []
    with Receiver(on_metrics=told.append) as receiver:
        exporter = OTLPMetricExporter(f"{receiver.endpoint}/v1/metrics")
        provider = MeterProvider([PeriodicExportingMetricReader(exporter, export_interval_millis=1e9)])
        provider.get_meter("m").create_counter("hits").add(1)
        provider.shutdown()

    assert [[point.name for point in points] for points in told] == [["hits"]]


def test_counts_spans(receiver):
    """Of spans, it knows how many came."""
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(f"{receiver.endpoint}/v1/traces")))
    for _ in range(2):
        provider.get_tracer("t").start_span("s").end()
    provider.shutdown()

    assert receiver.spans == 2


def test_says_in_one_sentence_what_it_has(receiver):
    """The repr counts what has come."""
    post(receiver)
    post(receiver, "/v1/logs")

    assert repr(receiver) == f"<Receiver on {receiver.endpoint} [1 exports, 0 series | 0 spans | 0 logs]>"


def test_listens_on_loopback_alone(receiver):
    """Other machines cannot reach it."""
    assert receiver._server.socket.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize("path", ["/v1/metrics", "/v1/traces", "/v1/logs"])
def test_refuses_garbage(receiver, path):
    """A body that is no such message is the client's mistake."""
    assert post(receiver, path, b"\xff\xfe garbage") == (400, "not a protobuf message of this kind")


@pytest.mark.parametrize("path", ["/", "/v1/metric", "/v1/metrics/", "/../v1/metrics"])
def test_knows_three_paths(receiver, path):
    """Any other path is not found."""
    assert post(receiver, path)[0] == 404


@pytest.mark.parametrize(("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_refuses_a_bomb(receiver, encoding, pack):
    """A small body that unpacks to more than the limit is refused."""
    bomb = pack(bytes(_receiver.MAX_BODY + 1))

    assert post(receiver, body=bomb, Content_Encoding=encoding) == (413, f"more than {_receiver.MAX_BODY} bytes")


def test_refuses_a_body_that_is_too_large(receiver):
    """A plain body over the limit is refused, and the client gets to read why."""
    assert post(receiver, body=bytes(_receiver.MAX_BODY + 1))[0] == 413


@pytest.mark.parametrize(
    ("body", "reason"), [(b"not gzip", "not gzip"), (gzip.compress(b"abc" * 99)[:-9], "gzip that ends too early")]
)
def test_refuses_broken_gzip(receiver, body, reason):
    """What calls itself gzip and is not, or not all of it, is the client's mistake."""
    assert post(receiver, body=body, Content_Encoding="gzip") == (400, reason)


def test_refuses_other_encodings_and_types(receiver):
    """JSON and unknown encodings are refused as what they are, not as garbage."""
    json, brotli = post(receiver, body=b"{}", Content_Type="application/json"), post(receiver, Content_Encoding="br")

    assert (json[0], brotli[0]) == (415, 415)


@pytest.mark.parametrize("length", ["-1", "+5", "ten", "\u0663", ""])
def test_refuses_a_length_that_is_none(receiver, length):
    """A Content-Length must be a number in plain digits."""
    assert post(receiver, Content_Length=length.encode())[0] == 411


def test_passes_over_broken_histograms(receiver):
    """A histogram whose buckets and bounds do not fit is left out, and the rest is taken."""
    request = ExportMetricsServiceRequest()
    metric = request.resource_metrics.add().scope_metrics.add().metrics.add(name="wait")
    metric.histogram.data_points.add(count=1, bucket_counts=[1, 2, 3], explicit_bounds=[1.0])
    metric.histogram.data_points.add(count=1, bucket_counts=[1, 0], explicit_bounds=[1.0])

    assert post(receiver, body=request.SerializeToString())[0] == 200
    assert values(receiver) == {"wait": Distribution(1, 0.0, (1.0,), (1, 0))}


def test_closes_while_a_client_hangs():
    """A client that never finishes its request does not keep the receiver from closing, nor a thread alive."""
    before = set(threading.enumerate())
    with Receiver() as receiver, socket.create_connection(receiver._server.server_address) as client:
        client.sendall(b"POST /v1/metrics HTTP/1.1\r\nContent-Length: 100\r\n\r\n")
        while not receiver._server._open:
            pass
        receiver.close()

        assert set(threading.enumerate()) == before


def test_survives_clients_that_leave(receiver, capfd):
    """A client that hangs up in the middle costs no word on the terminal, and the next one is served."""
    for _ in range(3):
        with socket.create_connection(receiver._server.server_address) as client:
            client.sendall(b"POST /v1/metrics HTTP/1.1\r\nContent-Length: 9\r\n\r\nabc")

    assert post(receiver)[0] == 200
    assert capfd.readouterr().err == ""


# -- what it makes of hostile messages ---------------------------------------------------


def message(name="hits", **resource):
    """A request with one metric, and the metric."""
    request = ExportMetricsServiceRequest()
    told = request.resource_metrics.add()
    for key, value in resource.items():
        told.resource.attributes.add(key=key.replace("_", ".")).value.string_value = value
    return request, told.scope_metrics.add().metrics.add(name=name)


def sent(receiver, request):
    status = post(receiver, body=request.SerializeToString())[0]
    assert status == 200
    return receiver.series()


def test_long_texts_are_cut(receiver):
    """Of a name and of an attribute only so many characters are kept, and only so many attributes."""
    request, metric = message("n" * 1000)
    point = metric.sum.data_points.add(as_int=1)
    for number in range(100):
        point.attributes.add(key=f"{number:03}{'k' * 1000}").value.string_value = "v" * 1000
    [series] = sent(receiver, request)

    assert len(series.now.name) == _receiver.MAX_TEXT
    assert len(series.now.attributes) == _receiver.MAX_ATTRIBUTES
    assert {len(text) for pair in series.now.attributes.items() for text in pair} == {_receiver.MAX_TEXT}


def test_histograms_of_too_many_buckets_are_passed_over(receiver):
    """No real one has that many."""
    request, metric = message()
    metric.histogram.data_points.add(bucket_counts=[1] * 1001, explicit_bounds=range(1000))

    assert sent(receiver, request) == []


def test_a_request_has_only_so_many_points(receiver, monkeypatch):
    """What is beyond is left unread."""
    monkeypatch.setattr(_receiver, "MAX_POINTS", 3)
    request, metric = message()
    for number in range(9):
        metric.sum.data_points.add(as_int=1).attributes.add(key="n").value.int_value = number

    assert len(sent(receiver, request)) == 3


def test_a_million_empty_resources_are_not_looked_at(receiver, monkeypatch):
    """A small packed body that unpacks to a great many parts costs neither memory nor time: most are left unread."""
    looked = []
    source = _receiver._source
    monkeypatch.setattr(_receiver, "_source", lambda *resource: looked.append(1) or source(*resource))

    assert post(receiver, body=gzip.compress(b"\x0a\x00" * 1_000_000), Content_Encoding="gzip")[0] == 200
    assert len(looked) == _receiver.MAX_PARTS


def test_a_process_without_an_instance_is_told_by_its_resource(receiver):
    """Equal resources are one process, by a digest of them, which is short however long they are."""
    for host in ("a" * 10_000, "b", "b"):
        request, metric = message(host_name=host, process_pid="7")
        metric.sum.data_points.add(as_int=1)
        series = sent(receiver, request)

    assert [(len(one.now.source), one.now.pid) for one in series] == [(64, "7"), (64, "7")]


def test_forgets_processes(receiver):
    """What somebody no longer wants to know of is dropped, and the rest stays."""
    for instance in ("one", "two"):
        request, metric = message(service_instance_id=instance)
        metric.sum.data_points.add(as_int=1)
        sent(receiver, request)
    receiver.forget({"one"})

    assert [one.now.source for one in receiver.series()] == ["two"]


def test_more_clients_than_threads_have_to_come_again(receiver, monkeypatch):
    """When all threads are taken, whoever comes is sent away, and served when one is free."""
    monkeypatch.setattr(_receiver, "MAX_CLIENTS", 1)
    with socket.create_connection(receiver._server.server_address):
        while not receiver._server._open:
            pass
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            post(receiver)
    while receiver._server._open:
        pass

    assert post(receiver)[0] == 200


def test_a_port_can_be_chosen():
    """It listens where it is told to; a port that is taken is an error."""
    with Receiver() as first:
        port = urlsplit(first.endpoint).port
        with pytest.raises(OSError, match="in use"):
            Receiver(port=port)
    with Receiver(port=port) as second:
        assert urlsplit(second.endpoint).port == port


def test_tells_of_waits():
    """Of the spans that are ours it tells who held the connections; those of others are only counted."""
    request, told = ExportTraceServiceRequest(), []
    for scope in ("otel_pools.sqlalchemy", "app"):
        scopes = request.resource_spans.add().scope_spans.add()
        scopes.scope.name = scope
        span = scopes.spans.add(name="acquire shop", start_time_unix_nano=10**9, end_time_unix_nano=3 * 10**9)
        span.attributes.add(key=words.SEMCONV_POOL).value.string_value = "shop"
        span.attributes.add(key=words.ERROR).value.string_value = "timeout"
        span.events.add(name="else")
        span.events.add(name=words.HOLDER).attributes.add(key="code.line.number").value.int_value = 7
    with Receiver(on_waits=told.extend) as receiver:
        assert post(receiver, "/v1/traces", request.SerializeToString())[0] == 200

        assert receiver.spans == 2
    assert told == [Wait(told[0].source, "shop", "timeout", 2.0, ({"code.line.number": 7},))]


# -- over gRPC -------------------------------------------------------------------------------


@pytest.fixture
def door(receiver):
    pytest.importorskip("grpc", reason="grpcio is not installed")
    with GrpcDoor(receiver) as running:
        yield running


def export(door, body, service="metrics", compression=None):
    """One call as a hostile client would make it; the name of its status."""
    import grpc

    name = f"/opentelemetry.proto.collector.{service}.v1.{service.title()}Service/Export"
    with grpc.insecure_channel(f"127.0.0.1:{door.port}", options=[("grpc.max_send_message_length", -1)]) as channel:
        try:
            channel.unary_unary(name)(body, timeout=20, compression=compression, wait_for_ready=True)
        except grpc.RpcError as error:
            return error.code().name
    return "OK"


@pytest.mark.parametrize("packing", ["NoCompression", "Gzip", "Deflate"])
def test_takes_what_comes_over_grpc(receiver, door, packing):
    """However it is packed, it is what would have come over HTTP."""
    import grpc

    request, metric = message()
    metric.sum.data_points.add(as_int=3)

    assert export(door, request.SerializeToString(), compression=grpc.Compression[packing]) == "OK"
    assert values(receiver) == {"hits": 3}


def test_takes_what_the_exporter_sends_over_grpc(receiver, door):
    """The real exporter for gRPC is served."""
    exporters = pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc.metric_exporter")
    exporter = exporters.OTLPMetricExporter(door.endpoint)
    provider = MeterProvider([PeriodicExportingMetricReader(exporter, export_interval_millis=1e9)])
    provider.get_meter("m").create_counter("hits").add(3)
    provider.shutdown()

    assert values(receiver) == {"hits": 3}


@pytest.mark.parametrize("service", ["metrics", "trace", "logs"])
def test_refuses_garbage_over_grpc(door, service):
    """Each signal has its service, and a message that is none is the client's mistake."""
    assert export(door, b"\xff\xfe garbage", service) == "INVALID_ARGUMENT"


@pytest.mark.parametrize("packing", ["NoCompression", "Gzip", "Deflate"])
def test_refuses_a_bomb_over_grpc(receiver, door, packing):
    """A message over the limit is refused, packed or not, and without unpacking all of it."""
    import grpc

    bomb = b"\x0a" + bytes(20 * _receiver.MAX_BODY)

    assert export(door, bomb, compression=grpc.Compression[packing]) == "RESOURCE_EXHAUSTED"
    assert (receiver.exports, export(door, b"")) == (0, "OK")


def test_other_calls_are_not_implemented(door):
    """There are three services."""
    assert export(door, b"", "profiles") == "UNIMPLEMENTED"


def test_the_door_survives_what_is_no_grpc(door, capfd):
    """Noise on the port costs nothing but the connection, and no word on the terminal."""
    for noise in (
        b"\xff" * 10_000,
        b"GET / HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00" * 999,
        b"",
    ):
        with socket.create_connection(("127.0.0.1", door.port)) as client:
            client.sendall(noise)

    assert export(door, b"") == "OK"
    assert capfd.readouterr().err == ""


def test_the_door_says_where_it_is(receiver, door):
    """The repr has the endpoint; a port that is taken is an error, and not shared."""
    assert repr(door) == f"<GrpcDoor on http://127.0.0.1:{door.port}>"
    with pytest.raises(OSError, match="cannot be had"):
        GrpcDoor(receiver, door.port)


# -- distributions -----------------------------------------------------------------------


def test_no_quantile_is_above_the_highest_value():
    """A bucket that is wide is no wider than to the highest value, and so is the last one."""
    waits = Distribution(4, 4.1, (1.0, 5.0), (0, 4, 0), 1.1)
    beyond = Distribution(2, 14.0, (1.0, 5.0), (0, 0, 2), 9.0)

    assert waits.quantile(0.5) == pytest.approx(1.05)
    assert beyond.quantile(1.0) == 9.0
    assert (waits + beyond).max == 9.0


HALVES = Distribution(4, 4.0, (1.0, 2.0), (2, 2, 0))


@pytest.mark.parametrize(("q", "value"), [(0.25, 0.5), (0.5, 1.0), (0.75, 1.5), (1.0, 2.0)])
def test_a_quantile_lies_inside_its_bucket(q, value):
    """Values are taken to be spread evenly in their bucket."""
    assert HALVES.quantile(q) == value


def test_a_quantile_beyond_the_last_bound_is_that_bound():
    """Of what lies above all bounds only this much is known."""
    assert Distribution(1, 9.0, (1.0,), (0, 1)).quantile(0.5) == 1.0


def test_nothing_has_no_quantile():
    """Without values there is no quantile."""
    assert HALVES.since(HALVES).quantile(0.5) is None


def test_the_difference_is_what_came_since():
    """Two readings of a growing histogram give what happened in between."""
    later = Distribution(5, 5.5, (1.0, 2.0), (2, 3, 0))

    assert later.since(HALVES) == Distribution(1, 1.5, (1.0, 2.0), (0, 1, 0))


def test_a_process_that_began_anew_counts_from_nothing():
    """A histogram that has shrunk was started again: all of it is new."""
    fresh = Distribution(1, 0.5, (1.0, 2.0), (1, 0, 0))

    assert fresh.since(HALVES) == fresh


def test_different_buckets_are_not_added():
    """Of two histograms with other bounds the second is kept."""
    other = Distribution(1, 0.5, (3.0,), (1, 0))

    assert HALVES + other == other
