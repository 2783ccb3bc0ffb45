"""
Servers on 127.0.0.1 that speak Qdrant's protocol and count for themselves.

They are the demo's (`otel_pools.demo._vectors`), in a process of their own.
There is no real Qdrant to start, but the sockets, HTTP and gRPC are real. A
search takes as many milliseconds as its `hnsw_ef` says.
"""

from __future__ import annotations

import json
import random
import select
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

HOST = "127.0.0.1"
PROGRAM = Path(__file__).with_name("qdrants_program.py")
# Below the ports that systems give to clients: there, a client that retries during an outage can meet itself.
PORTS = range(20000, 32000)
NEEDED = ("qdrant_client", "grpc", "hypercorn", "psutil")
SECONDS = 60  # for everything that must happen, on a machine that is busy
SETTLE_SECONDS = 5


def _of_client():
    return tuple(int(part) for part in version("qdrant-client").split(".")[:2])


# Before, GRPC_DEFAULT_SSL_ROOTS_FILE_PATH has to name the authority when the program starts.
GRPC_TAKES_CERTIFICATES = bool(find_spec("qdrant_client")) and _of_client() >= (1, 16)


def available():
    """Whether there is a server to start here."""
    return all(find_spec(name) for name in NEEDED)


@dataclass(frozen=True)
class Seen:
    """What a server has seen since it was last started; of a connection, whether it was used is another question."""

    rest_accepted: int = 0  # connections, used or not
    rest_begun: int = 0  # requests
    rest_ended: int = 0
    grpc_peers: int = 0  # connections on which a call has come
    grpc_begun: int = 0  # calls that have come: those that wait for a stream have not
    grpc_ended: int = 0  # answered, failed, cancelled

    @property
    def rest_under_way(self):
        return self.rest_begun - self.rest_ended

    @property
    def grpc_under_way(self):
        return self.grpc_begun - self.grpc_ended


class Certificates:
    """An authority of our own, and the file in which those who trust it find it; a context manager."""

    def __init__(self):
        import trustme

        self._authority = trustme.CA()
        self._folder = tempfile.TemporaryDirectory(prefix="qd-")
        self.authority = f"{self._folder.name}/authority.pem"
        self.server = f"{self._folder.name}/server.pem"  # its key and its certificate
        self._authority.cert_pem.write_to_path(self.authority)
        self._authority.issue_cert(HOST, "localhost").private_key_and_cert_chain_pem.write_to_path(self.server)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._folder.cleanup()

    @property
    def trusting(self):
        """What a client is told to trust us: `QdrantClient(..., https=True, **certificates.trusting)`."""
        if not GRPC_TAKES_CERTIFICATES:
            return {"verify": self.authority}  # as a path, for which newer versions of httpx give a warning
        # New options each time: a client writes its name into them.
        roots = {"root_certificates": Path(self.authority).read_bytes()}
        return {"verify": ssl.create_default_context(cafile=self.authority), "grpc_options": roots}


class Server:
    """
    One server, on two ports of 127.0.0.1 that it keeps.

    A context manager; `kill` and `start` inside it simulate an outage: on the
    same ports, but what was stored and counted is gone.

    Args:
        streams: How many gRPC calls a connection may carry at once.
        certificates: Of whom it has its own, to speak TLS on both ports.
        key: What clients must say with each call: UNAUTHENTICATED otherwise, or status 401.
        keep_alive: Seconds after which it closes a REST connection that nobody uses.
        options: More arguments of the gRPC server, as ``{"grpc.max_connection_age_ms": 500}``; with
            ``{"grpc.http.overload_protection": 1}``, which is gRPC's default and off here, it refuses calls beyond
            *streams* (UNAVAILABLE, RST_STREAM 7) of a client that does not yet know the limit, and at times others.

    Attributes:
        port: The TCP port of REST; chosen when the server first starts.
        grpc_port: That of gRPC.
    """

    def __init__(self, streams=100, *, certificates=None, key="", keep_alive=60.0, options=None):
        self.streams = streams
        self.certificates = certificates
        self.key = key
        self.keep_alive = keep_alive
        self.options = options or {}
        self.port = 0
        self.grpc_port = 0
        self._process = None

    def __repr__(self):
        state = "running" if self.running else "stopped"
        return f"<{type(self).__name__} on {HOST}:{self.port}, gRPC on {self.grpc_port}, {state}>"

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.kill()

    @property
    def running(self):
        """Whether the server's process is alive."""
        return self._process is not None and self._process.poll() is None

    @property
    def url(self):
        """Its origin, for REST."""
        return f"{'https' if self.certificates else 'http'}://{HOST}:{self.port}"

    def start(self):
        """Start the server and wait until it serves; nothing to do if it runs."""
        if self.running:
            return
        self.grpc_port = self.grpc_port or _free_port()
        with _listening(self.port) as rest, tempfile.TemporaryFile() as log:
            self.port = rest.getsockname()[1]
            self._process = self._spawn(rest.fileno(), log)
            if self._line() != "ready":
                self.kill()
                log.seek(0)
                raise RuntimeError(log.read().decode(errors="replace")[-2000:])

    def kill(self):
        """End the server at once, with all its connections; nothing to do if it is gone."""
        process, self._process = self._process, None
        if process is not None:
            with process:
                process.kill()

    def pause(self):
        """Let it hang: connections stay, the system accepts new ones, and nobody answers, until `resume`."""
        self._psutil.suspend()

    def resume(self):
        """Let it go on after `pause`."""
        self._psutil.resume()

    @contextmanager
    def held(self):
        """Let it take in what it is asked and answer nobody until the end: for that long all of it is under way."""
        self._tell("hold")
        try:
            yield
        finally:
            self._tell("release")

    def seen(self):
        """What it has seen since it was last started; nothing while it is stopped."""
        return self._tell("?")

    def established(self):
        """How many connections the system says are open with it now: for REST, and for gRPC."""
        if not self.running:
            return 0, 0
        here = [one.laddr.port for one in self._psutil.net_connections("tcp") if one.status == "ESTABLISHED"]
        return here.count(self.port), here.count(self.grpc_port)

    def settles(self, *, rest=None, grpc=None):
        """Whether `established` comes to be these numbers; a server takes a moment to see a connection go."""

        def settled():
            return all(want in {None, have} for want, have in zip((rest, grpc), self.established(), strict=True))

        return _comes(settled)

    def sees(self, **numbers):
        """Whether what it has seen comes to be these numbers, as in ``sees(grpc_under_way=4)``."""
        return _comes(lambda: all(getattr(self.seen(), name) == number for name, number in numbers.items()))

    @property
    def _psutil(self):
        import psutil

        return psutil.Process(self._process.pid)

    def _tell(self, order):
        if not self.running:
            return Seen()
        self._process.stdin.write(f"{order}\n".encode())
        self._process.stdin.flush()
        return Seen(**self._line())

    def _line(self):
        readable, _, _ = select.select([self._process.stdout], [], [], SECONDS)
        line = self._process.stdout.readline() if readable else b""
        return json.loads(line or b"{}")

    def _spawn(self, fd, log):
        from otel_pools.demo import _qdrant

        asked = {
            "vectors": _qdrant.PROGRAM.parent,
            "fd": fd,
            "grpc-port": self.grpc_port,
            "streams": self.streams,
            "keep-alive": self.keep_alive,
            "options": json.dumps(self.options),
            "key": self.key,
            "pem": self.certificates.server if self.certificates else "",
        }
        return subprocess.Popen(
            [sys.executable, PROGRAM, *(f"--{name}={value}" for name, value in asked.items())],
            cwd="/",
            stdin=subprocess.PIPE,  # its end tells the server that we are gone, however we went
            stdout=subprocess.PIPE,
            stderr=log,
            pass_fds=(fd,),
            start_new_session=True,
        )


def _listening(port):
    """A socket that listens on *port*, or on one that is free."""
    return socket.create_server((HOST, port or _free_port()))


def _free_port():
    while True:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as ours:
            if ours.connect_ex((HOST, port)):
                return port


def _comes(true):
    end = time.monotonic() + SETTLE_SECONDS
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True
