"""A server of our own that speaks Qdrant's protocol for a few minutes: `_vectors`, in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

HOST = "127.0.0.1"
# By its path: as a module of ours it would import us, and what it imports itself is not for this process.
PROGRAM = Path(__file__).with_name("_vectors.py")
# The package that each comes in, where that is not its name.
NEEDED = {"qdrant_client": "qdrant-client", "grpc": "grpcio", "hypercorn": "hypercorn"}
START_SECONDS = 30.0
TAIL_LINES = 15


class QdrantStartError(RuntimeError):
    """The server cannot be started here; the message says why and ends with its own last words."""


class Qdrant:
    """
    One server with the protocol of Qdrant, whose program is in no package, on two free ports of 127.0.0.1.

    A context manager. It writes no file, and ends with the process that started
    it. A search takes as many milliseconds as its `hnsw_ef` says.

    Args:
        streams: How many gRPC calls a connection may carry at once.

    Attributes:
        port: The TCP port of REST; chosen when the server starts.
        grpc_port: That of gRPC.

    Raises:
        QdrantStartError: The server does not come up, or is not installed.
    """

    def __init__(self, streams: int = 4) -> None:
        self.streams = streams
        self.port = 0
        self.grpc_port = 0
        self._process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        where = f"{HOST}:{self.port}, gRPC on {self.grpc_port}"
        return f"<Qdrant's protocol on {where}, {'running' if self.running else 'stopped'}>"

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def running(self) -> bool:
        """Whether the server's process is alive."""
        return self._process is not None and self._process.poll() is None

    @property
    def url(self) -> str:
        """Its origin, for REST."""
        return f"http://{HOST}:{self.port}"

    def stop(self) -> None:
        """Kill the server, as it has nothing to save; nothing to do if there is none."""
        process, self._process = self._process, None
        if process is not None:
            with process:  # which closes its pipes and waits for it
                process.kill()

    def _start(self) -> None:
        missing = [wheel for name, wheel in NEEDED.items() if importlib.util.find_spec(name) is None]
        if missing:
            raise QdrantStartError(f"{missing[0]} is not installed; try: pip install 'otel-pools[demo]'")
        # The socket is made here and handed over, so nobody else can be quicker at the port. The log has no name,
        # so it cannot be left behind.
        with socket.create_server((HOST, 0)) as listening, tempfile.TemporaryFile() as log:
            self._process = self._spawn(listening.fileno(), log)
            ports = _ports(self._process)
            if not ports:
                self.stop()
                raise QdrantStartError(f"the vector server did not come up; its log ends with:\n{_tail(log)}")
            self.port, self.grpc_port = ports["rest"], ports["grpc"]

    def _spawn(self, listening: int, log: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, PROGRAM, f"--fd={listening}", f"--streams={self.streams}"],
            cwd="/",
            stdin=subprocess.PIPE,  # its end tells the server that we are gone, however we went
            stdout=subprocess.PIPE,
            stderr=log,
            pass_fds=(listening,),
            # A Ctrl-C in the terminal is for us, and we end the server in our own order.
            start_new_session=True,
        )


def _ports(process: subprocess.Popen[bytes]) -> dict[str, int]:
    """Where it serves, if it said so in time, in the one line that it prints; without one it has ended."""
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], START_SECONDS)
    said: dict[str, int] = json.loads((readable and process.stdout.readline()) or b"{}")
    return said


def _tail(log: Any) -> str:
    # At an offset of its own: the server goes on writing at that of the file.
    said = os.pread(log.fileno(), 1 << 20, 0).decode(errors="replace")
    return "\n".join(said.strip().splitlines()[-TAIL_LINES:])
