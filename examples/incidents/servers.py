"""The servers that the incidents need, each started on this machine when it is first asked for."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import URL, make_url

if TYPE_CHECKING:
    from typing_extensions import Self

HOST, USER, START_SECONDS = "127.0.0.1", "shop", 30.0


class NotInstalledError(RuntimeError):
    """An incident needs a program that is not here; the message says which."""


class Servers:
    """
    Servers on this machine, each started when it is first asked for, unless a running one was given.

    A context manager.

    Args:
        given: URLs of running servers, by ``postgres``, ``valkey``, ``web``.
    """

    def __init__(self, given: Mapping[str, str] | None = None) -> None:
        self._urls = dict(given or {})
        self._stack = ExitStack()
        self._small: Any = None
        self._qdrant: Any = None

    def __repr__(self) -> str:
        return f"<Servers [{', '.join(self._urls)}]>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def postgres(self) -> str:
        """The SQLAlchemy URL of a PostgreSQL."""
        if "postgres" not in self._urls:
            from otel_pools.demo._postgres import Postgres  # noqa: PLC0415  # only where it is needed

            self._urls["postgres"] = self._stack.enter_context(Postgres("shop")).url("psycopg")
        return self._urls["postgres"]

    @property
    def small_postgres(self) -> Any:
        """A PostgreSQL that takes six connections; always one of our own, as it may be stopped and started."""
        if self._small is None:
            from otel_pools.demo._postgres import Postgres  # noqa: PLC0415  # only where it is needed

            self._small = self._stack.enter_context(Postgres("shop", max_connections=6))
        return self._small

    @property
    def valkey(self) -> str:
        """The URL of a Valkey or Redis."""
        if "valkey" not in self._urls:
            from otel_pools.demo._valkey import Valkey  # noqa: PLC0415  # only where it is needed

            self._urls["valkey"] = self._stack.enter_context(Valkey()).url()
        return self._urls["valkey"]

    @property
    def web(self) -> str:
        """The URL of an HTTP server, which answers ``/price?seconds=S`` and takes four HTTP/2 requests at once."""
        if "web" not in self._urls:
            from otel_pools.demo._web import Web  # noqa: PLC0415  # only where it is needed

            self._urls["web"] = self._stack.enter_context(Web(streams=4)).url
        return self._urls["web"]

    @property
    def qdrant(self) -> Any:
        """A server with the protocol of Qdrant, which takes four gRPC calls at once."""
        if self._qdrant is None:
            from otel_pools.demo._qdrant import Qdrant  # noqa: PLC0415  # only where it is needed

            self._qdrant = self._stack.enter_context(Qdrant(streams=4))
        return self._qdrant


class PgBouncer:
    """
    A PgBouncer before a PostgreSQL, on a free port of 127.0.0.1; a context manager.

    Args:
        postgres: The SQLAlchemy URL of the PostgreSQL.
        max_client_conn: How many clients it accepts.

    Raises:
        NotInstalledError: There is no program ``pgbouncer``.
        TimeoutError: It does not come up.
    """

    def __init__(self, postgres: str, max_client_conn: int) -> None:
        # Debian puts it where not every user's path leads.
        found = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")
        if found is None:
            raise NotInstalledError("pgbouncer is not installed")
        self._program, self._postgres, self._limit = found, make_url(postgres), max_client_conn
        self._secret = secrets.token_hex(16)
        self._stack = ExitStack()
        self.port = 0

    def __repr__(self) -> str:
        return f"<PgBouncer on {HOST}:{self.port} for {self._limit} clients>"

    @property
    def url(self) -> URL:
        """The SQLAlchemy URL of the same database behind it."""
        return self._postgres.set(username=USER, password=self._secret, host=HOST, port=self.port)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._start(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self, stack: ExitStack) -> None:
        from otel_pools.demo import _postgres  # noqa: PLC0415  # only where it is needed

        self.port = _postgres._free_port()
        account = _postgres._account()  # as it refuses to run as root, too
        folder = _postgres._folder(account)
        stack.callback(shutil.rmtree, folder)
        for path, text in self._files(folder).items():
            path.touch(mode=0o600)
            path.write_text(text, "utf-8")
            _postgres._give(path, account)
        command = [self._program, "--quiet", folder / "ini"]
        process = subprocess.Popen(command, cwd="/", start_new_session=True, stderr=subprocess.DEVNULL, **account)
        stack.callback(process.wait)
        stack.callback(process.kill)
        _until_open(self.port, process)

    def _files(self, folder: Path) -> dict[Path, str]:
        at = self._postgres
        to = f"host={at.host} port={at.port or 5432} dbname={at.database} user={at.username} password={at.password}"
        settings = {
            "listen_addr": HOST,
            "listen_port": self.port,
            "unix_socket_dir": "",
            "auth_type": "scram-sha-256",
            "auth_file": folder / "users",
            "max_client_conn": self._limit,
        }
        lines = [f"[databases]\n{at.database} = {to}\n[pgbouncer]", *(f"{key} = {it}" for key, it in settings.items())]
        return {folder / "users": f'"{USER}" "{self._secret}"\n', folder / "ini": "\n".join(lines) + "\n"}


def _until_open(port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        try:
            socket.create_connection((HOST, port)).close()
        except OSError:
            time.sleep(0.01)
        else:
            return
    raise TimeoutError("pgbouncer does not come up")
