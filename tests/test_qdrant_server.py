"""The launcher of the demo's vector server and its program: Qdrant's own client finds there what it expects."""

from __future__ import annotations

import asyncio
import inspect
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

import pytest

pytest.importorskip("grpc")
pytest.importorskip("hypercorn")
pytest.importorskip("psutil")
pytest.importorskip("qdrant_client")
if sys.platform == "win32":
    pytest.skip("the demo does not run on Windows", allow_module_level=True)

import grpc
import psutil
from qdrant_client import AsyncQdrantClient, QdrantClient, models
from qdrant_client.http.exceptions import UnexpectedResponse

from otel_pools.demo import _qdrant
from otel_pools.demo._qdrant import Qdrant, QdrantStartError

STREAMS = 2
CHECKS = "check_compatibility" in inspect.signature(QdrantClient).parameters  # of versions, before the first call
ENOUGH = 60  # seconds after which a server that stays is a failure
PLANE = models.VectorParams(size=2, distance=models.Distance.DOT)
POINTS = [models.PointStruct(id=number, vector=[number, 0.0], payload={"number": number}) for number in range(1, 6)]


@pytest.fixture(scope="module")
def server():
    with Qdrant(STREAMS) as running:
        yield running


def asking(kind, server, prefer_grpc):
    """A client that asks at once, whoever it thinks it talks to."""
    newer = {"check_compatibility": False} if CHECKS else {}
    return kind(
        host="127.0.0.1",
        port=server.port,
        grpc_port=server.grpc_port,
        prefer_grpc=prefer_grpc,
        timeout=ENOUGH,
        **newer,
    )


@pytest.fixture(params=[True, False], ids=["grpc", "rest"])
def client(server, request):
    opened = asking(QdrantClient, server, request.param)
    opened.create_collection("plane", vectors_config=PLANE)
    opened.upsert("plane", POINTS)
    yield opened
    opened.delete_collection("plane")
    opened.close()


def found(client, **asked):
    """What a search finds; its method had another name before 1.10."""
    vector = asked.pop("vector", [1.0, 0.0])
    if hasattr(client, "query_points"):
        return client.query_points("plane", query=vector, **asked).points
    return client.search("plane", vector, **asked)


@pytest.fixture
def spawned(monkeypatch):
    """The processes that are started, also by a start that fails."""
    processes, spawn = [], Qdrant._spawn

    def watched(self, *args):
        processes.append(spawn(self, *args))
        return processes[-1]

    monkeypatch.setattr(Qdrant, "_spawn", watched)
    return processes


@pytest.fixture
def program(monkeypatch, tmp_path):
    """Puts another program in the place of the server's."""

    def put(code):
        path = tmp_path / "program.py"
        path.write_text(code)
        monkeypatch.setattr(_qdrant, "PROGRAM", path)

    return put


def listening(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# -- what it can do -------------------------------------------------------------------


def test_collections_come_and_go(client):
    """A collection that is made is in the list until it is deleted."""
    client.create_collection("line", vectors_config={"only": models.VectorParams(size=1, distance="Cosine")})
    names = {one.name for one in client.get_collections().collections}
    line = client.get_collection("line").config.params.vectors["only"]
    there = client.collection_exists("line")
    client.delete_collection("line")

    assert (names, line.size, there, client.collection_exists("line")) == ({"line", "plane"}, 1, True, False)


def test_the_nearest_are_found(client):
    """A search has as many points as are wanted, the best first, with what they carry."""
    best, next_best = found(client, limit=2, with_vectors=True)

    assert (best.id, best.score, best.payload, best.vector) == (5, 5.0, {"number": 5}, [5.0, 0.0])
    assert (next_best.id, next_best.score) == (4, 4.0)


def test_a_search_has_conditions(client):
    """Filter, offset, threshold and contents are respected."""
    four = models.Filter(must=[models.FieldCondition(key="number", match=models.MatchValue(value=4))])

    assert [one.id for one in found(client, query_filter=four)] == [4]
    assert [one.id for one in found(client, offset=3)] == [2, 1]
    assert [one.id for one in found(client, score_threshold=3.5)] == [5, 4]
    assert {one.payload for one in found(client, with_payload=False)} == {None}


def test_points_are_counted_retrieved_and_deleted(client):
    """Points are there by their ids, until they are deleted by their ids or by what they are like."""
    [second] = client.retrieve("plane", [2, 99], with_vectors=True)
    client.delete("plane", [1, 2])
    three = models.Filter(must=[models.FieldCondition(key="number", match=models.MatchValue(value=3))])

    assert (second.id, second.payload, second.vector) == (2, {"number": 2}, [2.0, 0.0])
    assert (client.count("plane").count, client.count("plane", count_filter=three).count) == (3, 1)
    client.delete("plane", models.FilterSelector(filter=three))
    assert client.count("plane").count == 2


def test_columns_of_points_are_stored(client):
    """Points can also come column by column."""
    client.upsert("plane", models.Batch(ids=[7, 8], vectors=[[7.0, 0.0], [8.0, 0.0]]))

    assert [one.id for one in found(client, limit=3)] == [8, 7, 5]


def test_a_search_takes_its_time(client):
    """A search takes as many milliseconds as its `hnsw_ef` says."""
    start = time.monotonic()
    found(client, search_params=models.SearchParams(hnsw_ef=200))

    assert time.monotonic() - start >= 0.2


def test_what_is_not_there_is_not_found(client):
    """A collection that is not there has the status that a client expects."""
    with pytest.raises((grpc.RpcError, UnexpectedResponse)) as caught:
        client.count("nowhere")

    status = caught.value.status_code if isinstance(caught.value, UnexpectedResponse) else caught.value.code()
    assert status in {404, grpc.StatusCode.NOT_FOUND}
    assert "nowhere" in str(caught.value)


def test_a_mistake_of_the_callers_is_told(client):
    """A collection that is there cannot be made again."""
    with pytest.raises((grpc.RpcError, UnexpectedResponse)) as caught:
        client.create_collection("plane", vectors_config=PLANE)

    status = caught.value.status_code if isinstance(caught.value, UnexpectedResponse) else caught.value.code()
    assert status in {400, grpc.StatusCode.INVALID_ARGUMENT}


@pytest.mark.parametrize("path", ["/collections/plane/points", "/secret", "/collections/plane/secret"])
def test_rest_has_nothing_else(server, path):
    """Anything else is not found, and the answer is in the usual form."""
    with pytest.raises(urllib.error.HTTPError, match="404") as caught:
        urllib.request.urlopen(server.url + path, timeout=ENOUGH)
    with caught.value:
        assert json.load(caught.value)["status"] == {"error": f"there is no GET {path}"}


def test_grpc_has_nothing_else(server):
    """A call that it does not know is refused as gRPC refuses it."""
    client = asking(QdrantClient, server, prefer_grpc=True)
    with pytest.raises(grpc.RpcError) as caught:
        client.get_aliases()
    client.close()

    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_is_honest_about_what_it_is(server):
    """Whoever asks is told that this is no Qdrant, in either protocol."""
    from qdrant_client.grpc import qdrant_pb2, qdrant_pb2_grpc

    with urllib.request.urlopen(server.url, timeout=ENOUGH) as answer:
        title = json.load(answer)["title"]
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        reply = qdrant_pb2_grpc.QdrantStub(channel).HealthCheck(qdrant_pb2.HealthCheckRequest())

    assert title == reply.title == "otel-pools demo: speaks Qdrant's protocol, is no Qdrant"


# -- many at once ------------------------------------------------------------------------


async def crowd(server, prefer_grpc, count):
    """So many searches of 100 ms at once: how long they take."""
    client = asking(AsyncQdrantClient, server, prefer_grpc)
    await client.create_collection("plane", vectors_config=PLANE)
    ask = getattr(client, "query_points", None) or client.search
    start = time.monotonic()
    await asyncio.gather(
        *(ask("plane", [1.0, 0.0], search_params=models.SearchParams(hnsw_ef=100)) for _ in range(count))
    )
    seconds = time.monotonic() - start
    await client.delete_collection("plane")
    await client.close()
    return seconds


def test_a_connection_carries_so_many_calls_at_once(server):
    """Of more calls than that some wait on the client until others are through, and none of them fails."""
    assert asyncio.run(crowd(server, prefer_grpc=True, count=4 * STREAMS)) >= 0.4


def test_requests_do_not_wait_for_each_other(server):
    """Over REST each has a connection of its own, so a crowd takes less than one after the other."""
    count = 20

    assert asyncio.run(crowd(server, prefer_grpc=False, count=count)) < count * 0.1


# -- how it comes and goes -----------------------------------------------------------------


def test_listens_on_loopback_only(server):
    """It can be reached from this machine alone."""
    places = {one.laddr for one in psutil.Process(server._process.pid).net_connections() if one.status == "LISTEN"}

    # gRPC writes the same address as one of IPv6.
    assert {place.ip.removeprefix("::ffff:") for place in places} == {"127.0.0.1"}
    assert {place.port for place in places} == {server.port, server.grpc_port}
    assert server.url == f"http://127.0.0.1:{server.port}"


def test_says_where_it_is(server):
    """The repr has the addresses and the state."""
    where = f"127.0.0.1:{server.port}, gRPC on {server.grpc_port}"

    assert repr(server) == f"<Qdrant's protocol on {where}, running>"
    assert repr(Qdrant()) == "<Qdrant's protocol on 127.0.0.1:0, gRPC on 0, stopped>"


def test_leaves_nothing_behind(monkeypatch, tmp_path):
    """After it there is no process and no listening port, and there never is a file."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with Qdrant() as server:
        process = server._process
        assert list(tmp_path.iterdir()) == []

    assert (process.poll() is None, server.running) == (False, False)
    assert (listening(server.port), listening(server.grpc_port)) == (False, False)
    assert process.stdin.closed
    assert process.stdout.closed


def test_ends_with_whoever_started_it():
    """If its parent is killed, it sees the end of its input, and ends too."""
    code = """
import time
from otel_pools.demo._qdrant import Qdrant
with Qdrant() as qdrant:
    print(qdrant._process.pid, flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        server = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    _, alive = psutil.wait_procs([server], timeout=ENOUGH)

    assert alive == []


def test_says_why_it_does_not_come_up(program, spawned):
    """A server that cannot start is an error with the end of its log, and no process."""
    program("raise SystemExit('no socket today')")
    with pytest.raises(QdrantStartError, match="did not come up; its log ends with:\nno socket today"), Qdrant():
        pass

    assert [process.poll() is None for process in spawned] == [False]


def test_a_server_that_is_never_ready_is_stopped(monkeypatch, program, spawned):
    """Patience has an end, and then nothing is left running."""
    monkeypatch.setattr(_qdrant, "START_SECONDS", 0)
    program("import time; time.sleep(600)")
    with pytest.raises(QdrantStartError, match="did not come up"), Qdrant():
        pass

    assert [process.poll() is None for process in spawned] == [False]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_start_that_is_broken_off_leaves_no_process(monkeypatch, spawned, error):
    """Whatever ends the start half way, the server ends too."""

    def broken(_):
        raise error

    monkeypatch.setattr(_qdrant, "_ports", broken)
    with pytest.raises(error), Qdrant():
        pass

    assert [process.poll() is None for process in spawned] == [False]


@pytest.mark.parametrize(
    ("module", "wheel"), [("hypercorn", "hypercorn"), ("qdrant_client", "qdrant-client"), ("grpc", "grpcio")]
)
def test_a_missing_wheel_is_told(monkeypatch, module, wheel):
    """The error has the command that installs it."""
    monkeypatch.setitem(sys.modules, module, None)

    with pytest.raises(QdrantStartError, match=rf"{wheel} is not installed; try: pip install 'otel-pools\[demo\]'"):
        Qdrant().__enter__()
