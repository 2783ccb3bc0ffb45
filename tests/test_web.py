"""The launcher of the demo's HTTP/2 server: it comes, goes, and leaves nothing."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import tempfile
import time

import pytest

pytest.importorskip("h2")
pytest.importorskip("hypercorn")
pytest.importorskip("httpx")
pytest.importorskip("psutil")
if sys.platform == "win32":
    pytest.skip("the demo does not run on Windows", allow_module_level=True)

import httpx
import psutil

from otel_pools.demo import _web
from otel_pools.demo._web import Web, WebStartError

STREAMS = 2
ENOUGH = 60  # seconds after which a server that stays is a failure


@pytest.fixture(scope="module")
def server():
    with Web(STREAMS) as running:
        yield running


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server.url, http1=False, http2=True, timeout=ENOUGH, trust_env=False) as opened:
        yield opened


@pytest.fixture
def spawned(monkeypatch):
    """The processes that are started, also by a start that fails."""
    processes, spawn = [], Web._spawn

    def watched(self, *args):
        processes.append(spawn(self, *args))
        return processes[-1]

    monkeypatch.setattr(Web, "_spawn", watched)
    return processes


@pytest.fixture
def program(monkeypatch, tmp_path):
    """Puts another program in the place of the server's."""

    def put(code):
        path = tmp_path / "program.py"
        path.write_text(code)
        monkeypatch.setattr(_web, "PROGRAM", path)

    return put


def listening(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_answers_over_http2_after_so_many_seconds(client):
    """There is a price at its URL, in HTTP/2 over plain TCP, and not before its time."""
    start = time.monotonic()
    answer = client.get("/price", params={"seconds": "0.2"})

    assert time.monotonic() - start >= 0.2
    assert (answer.status_code, answer.http_version, answer.text) == (200, "HTTP/2", "9.99")


@pytest.mark.parametrize("path", ["/", "/price", "/price?seconds=nan", "/price?seconds=-1", "/secret?seconds=0"])
def test_has_nothing_else(client, path):
    """Anything else is not found, at once."""
    assert client.get(path).status_code == 404


def test_a_connection_carries_so_many_at_once(server):
    """Of more than that on one connection, some have to wait until others are through."""

    async def ask(count):
        async with httpx.AsyncClient(
            base_url=server.url, http1=False, http2=True, timeout=ENOUGH, trust_env=False
        ) as client:
            answers = await asyncio.gather(*(client.get("/price?seconds=0.1") for _ in range(count)))
            return {answer.status_code for answer in answers}

    start = time.monotonic()

    assert asyncio.run(ask(3 * STREAMS)) == {200}
    assert time.monotonic() - start >= 0.3


def test_stays_for_many_requests(client):
    """A connection is not closed after a thousand, which is hypercorn's own habit."""
    for _ in range(1100):
        client.get("/price?seconds=0")
    [connection] = client._transport._pool.connections

    assert (connection.is_closed(), connection.info().rpartition(" ")[2]) == (False, "1100")


def test_listens_on_loopback_only(server):
    """It can be reached from this machine alone."""
    places = {one.laddr for one in psutil.Process(server._process.pid).net_connections() if one.status == "LISTEN"}

    assert places == {("127.0.0.1", server.port)}
    assert server.url == f"http://127.0.0.1:{server.port}"


def test_says_where_it_is(server):
    """The repr has the address and the state."""
    assert repr(server) == f"<Web on 127.0.0.1:{server.port}, running>"
    assert repr(Web()) == "<Web on 127.0.0.1:0, stopped>"


def test_leaves_nothing_behind(monkeypatch, tmp_path):
    """After it there is no process and no listening port, and there never is a file."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with Web() as server:
        process = server._process
        assert list(tmp_path.iterdir()) == []

    assert (process.poll() is None, server.running, listening(server.port)) == (False, False, False)
    assert process.stdin.closed
    assert process.stdout.closed


def test_ends_with_whoever_started_it():
    """If its parent is killed, it sees the end of its input, and ends too."""
    code = """
import time
from otel_pools.demo._web import Web
with Web() as web:
    print(web._process.pid, flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        server = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    _, alive = psutil.wait_procs([server], timeout=ENOUGH)

    assert alive == []


def test_says_why_it_does_not_come_up(program, spawned):
    """A server that cannot start is an error with the end of its log, and no process."""
    program("raise SystemExit('no socket today')")
    with pytest.raises(WebStartError, match="did not come up; its log ends with:\nno socket today"), Web():
        pass

    assert [process.poll() is None for process in spawned] == [False]


def test_a_server_that_is_never_ready_is_stopped(monkeypatch, program, spawned):
    """Patience has an end, and then nothing is left running."""
    monkeypatch.setattr(_web, "START_SECONDS", 0)
    program("import time; time.sleep(600)")
    with pytest.raises(WebStartError, match="did not come up"), Web():
        pass

    assert [process.poll() is None for process in spawned] == [False]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_start_that_is_broken_off_leaves_no_process(monkeypatch, spawned, error):
    """Whatever ends the start half way, the server ends too."""

    def broken(_):
        raise error

    monkeypatch.setattr(_web, "_ready", broken)
    with pytest.raises(error), Web():
        pass

    assert [process.poll() is None for process in spawned] == [False]


@pytest.mark.parametrize("wheel", ["hypercorn", "h2"])
def test_a_missing_wheel_is_told(monkeypatch, wheel):
    """The error has the command that installs it."""
    monkeypatch.setitem(sys.modules, wheel, None)

    with pytest.raises(WebStartError, match=rf"{wheel} is not installed; try: pip install 'otel-pools\[demo\]'"):
        Web().__enter__()
