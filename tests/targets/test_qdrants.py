"""The servers of the tests of the qdrant target: what they say about their clients is true."""

from __future__ import annotations

import inspect
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("hypercorn")
pytest.importorskip("psutil")
pytest.importorskip("qdrant_client")

import grpc
import qdrants
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import UnexpectedResponse
from qdrants import Certificates, Seen, Server

# Newer clients ask a server for its version, in a thread, before anybody has asked them.
CHECKS = "check_compatibility" in inspect.signature(QdrantClient).parameters


@pytest.fixture(scope="module")
def shared():
    with Server(streams=2) as running:
        yield running


@pytest.fixture
def server(shared):
    """Just started, so that it has seen nothing."""
    shared.kill()
    shared.start()
    return shared


@contextmanager
def connected(server, *, prefer_grpc, **more):
    """A client, and no thread of its own."""
    told = {"port": server.port, "grpc_port": server.grpc_port, **({"check_compatibility": False} if CHECKS else {})}
    client = QdrantClient(host="127.0.0.1", prefer_grpc=prefer_grpc, timeout=60, **told, **more)
    try:
        yield client
    finally:
        client.close()


def in_threads(count, work):
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads


def searching(client, milliseconds):
    """A search that takes so long."""
    asked = {"search_params": models.SearchParams(hnsw_ef=milliseconds)}
    if hasattr(client, "query_points"):
        return lambda: client.query_points("plane", query=[1.0, 0.0], **asked)
    return lambda: client.search("plane", [1.0, 0.0], **asked)


def with_plane(client):
    client.create_collection("plane", vectors_config=models.VectorParams(size=2, distance=models.Distance.DOT))
    return client


def test_rest_is_counted(server):
    """Requests and connections of REST are counted: on this machine the client keeps none."""
    with connected(server, prefer_grpc=False) as client:
        for _ in range(20):
            client.get_collections()

    assert server.seen() == Seen(rest_accepted=20, rest_begun=20, rest_ended=20)
    assert server.settles(rest=0, grpc=0)


def test_open_connections_are_counted(server):
    """While requests are under way, their connections are open."""
    with connected(server, prefer_grpc=False) as client:
        threads = in_threads(3, searching(with_plane(client), 500))
        assert server.sees(rest_under_way=3)
        assert server.established() == (3, 0)
        for thread in threads:
            thread.join()

    assert (server.seen().rest_accepted, server.seen().rest_under_way) == (4, 0)


def test_calls_are_counted(server):
    """Of calls those count that have got a stream; the others wait in the client, on the same connection."""
    with connected(server, prefer_grpc=True) as client:
        threads = in_threads(5, searching(with_plane(client), 300))
        assert server.sees(grpc_under_way=2)
        assert server.settles(rest=0, grpc=1)
        assert server.seen().grpc_peers == 1
        for thread in threads:
            thread.join()

    assert (server.seen().grpc_begun, server.seen().grpc_ended) == (6, 6)
    assert server.settles(grpc=0)


def test_an_outage(server):
    """A killed server has no connections and has seen nothing; it comes back on the same ports, empty."""
    ports = server.port, server.grpc_port
    with connected(server, prefer_grpc=True) as client:
        with_plane(client)
        server.kill()
        assert (server.seen(), server.established(), server.running) == (Seen(), (0, 0), False)
        with pytest.raises(grpc.RpcError) as caught:
            client.get_collections()
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    server.start()
    with connected(server, prefer_grpc=True) as client:
        assert client.get_collections().collections == []

    assert (server.port, server.grpc_port) == ports


def test_a_server_that_hangs(server):
    """A paused server keeps its connections and answers nobody until it goes on."""
    with connected(server, prefer_grpc=True) as client:
        client.get_collections()
        server.pause()
        [thread] = in_threads(1, client.get_collections)
        time.sleep(0.1)
        assert thread.is_alive()
        assert server.settles(grpc=1)
        server.resume()
        thread.join(60)
        assert not thread.is_alive()


@pytest.mark.parametrize("prefer_grpc", [True, False])
def test_a_server_that_holds_its_answers(server, prefer_grpc):
    """What is asked while answers are held is under way, and is answered when they are not any more."""
    with connected(server, prefer_grpc=prefer_grpc) as client:
        with server.held():
            threads = in_threads(2, client.get_collections)
            assert server.sees(**{"grpc_under_way" if prefer_grpc else "rest_under_way": 2})
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()

    assert (server.seen().rest_under_way, server.seen().grpc_under_way) == (0, 0)


def test_settling_ends(server, monkeypatch):
    """Waiting for a number that does not come ends with False."""
    monkeypatch.setattr(qdrants, "SETTLE_SECONDS", 0.05)

    assert (server.settles(grpc=1), server.sees(grpc_begun=1)) == (False, False)


@pytest.mark.filterwarnings("ignore:Api key is used with an insecure connection")
def test_a_key_is_asked_for():
    """Without the key a call or a request is refused, and counts all the same."""
    with Server(key="secret") as server:
        for key in ("secret", "wrong"):
            for prefer_grpc in (True, False):
                with connected(server, prefer_grpc=prefer_grpc, api_key=key, https=False) as client:
                    if key == "secret":
                        assert client.get_collections().collections == []
                        continue
                    with pytest.raises((grpc.RpcError, UnexpectedResponse)) as caught:
                        client.get_collections()
                    refused = caught.value.status_code if not prefer_grpc else caught.value.code()
                    assert refused in {401, grpc.StatusCode.UNAUTHENTICATED}

        assert (server.seen().rest_ended, server.seen().grpc_ended) == (2, 2)


@pytest.mark.filterwarnings("ignore:.verify=<str>. is deprecated")  # older clients take nothing else
def test_tls():
    """A client that trusts the authority reaches the server over TLS."""
    pytest.importorskip("trustme")
    with Certificates() as certificates, Server(certificates=certificates) as server:
        for prefer_grpc in (True, False):
            if prefer_grpc and not qdrants.GRPC_TAKES_CERTIFICATES:
                continue  # that would have to be told before the program starts
            with connected(server, prefer_grpc=prefer_grpc, https=True, **certificates.trusting) as client:
                assert client.get_collections().collections == []
        assert server.url == f"https://127.0.0.1:{server.port}"

    assert not Path(certificates.authority).exists()


def test_options_are_the_servers():
    """More arguments reach gRPC: a connection that must not grow old is closed."""
    with Server(options={"grpc.max_connection_age_ms": 200}) as server, connected(server, prefer_grpc=True) as client:
        client.get_collections()
        assert server.settles(grpc=0)


def test_nothing_is_left():
    """A closed server leaves no process, and says where it was."""
    with Server() as server:
        process = server._process
        assert repr(server) == f"<Server on 127.0.0.1:{server.port}, gRPC on {server.grpc_port}, running>"

    assert process.returncode is not None
    assert repr(server).endswith(", stopped>")


def test_a_server_that_cannot_start():
    """A server that cannot start says why."""
    with pytest.raises(RuntimeError, match="usage"), Server(streams="many"):
        pass
