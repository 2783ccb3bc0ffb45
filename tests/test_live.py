"""`otel-pools watch`: what it makes of what it hears, what it shows, and the command it runs, for real."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import io
import os
import re
import signal
import socket
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("opentelemetry.proto")

import fcntl

from rich.console import Console

from otel_pools import _board, _child, _live
from otel_pools import _vocabulary as words
from otel_pools._board import Board, Track, advice, holders
from otel_pools._child import Child, Wish, environment
from otel_pools._live import Keys, LiveScreen, PlainScreen, View, Watching, drawing, figures, lines, remarks, trend
from otel_pools._probe import Target, ask
from otel_pools._receiver import Point, Receiver, Series, Wait
from otel_pools._screen import PoolRow

ENOUGH = 60
MAX = "db.client.connection.max"


def pool(name="shop", heard=100.0, source="one", **figures):
    given = {"source": source, "service": "app", "pid": "7", "key": (name, source), "heard": heard}
    return PoolRow(name, "postgresql", **{**given, **figures})


def tracked(**figures):
    return Track(pool(**figures))


HELD = {
    "code.file.path": "orders.py",
    "code.line.number": 12,
    "code.function.name": "fetch",
    f"{words.HOLDER}.held": 3.14,
    f"{words.HOLDER}.trace_id": "abc",
}


# -- what is remembered ----------------------------------------------------------------------


class Told:
    """Stands in for a receiver: these series, as if they had just come."""

    def __init__(self):
        self.exports, self.told, self.forgotten = 0, {}, set()

    def hear(self, name="shop", source="one", heard=0.0, value=8):
        self.exports += 1
        attributes = {words.SEMCONV_POOL: name, words.SYSTEM: "redis"}
        point = Point(source, "app", MAX, attributes, value, heard, heard=heard)
        self.told[name, source] = Series(point)

    def series(self):
        return list(self.told.values())

    def forget(self, sources):
        self.forgotten |= sources


def test_a_board_has_a_track_for_each_pool_of_each_process():
    """Two processes with a pool of one name are two; the repr counts."""
    told, board = Told(), Board()
    told.hear(source="one")
    told.hear(source="two")
    told.hear("cache", source="two")
    board.look(told, 0.0)

    assert [(track.row.source, track.row.name) for track in board.tracks] == [
        ("one", "shop"),
        ("two", "cache"),
        ("two", "shop"),
    ]
    assert repr(board) == "<Board of 3 pools in 2 processes>"


def test_a_board_keeps_only_so_many_pools(monkeypatch):
    """Those heard of last stay."""
    monkeypatch.setattr(_board, "MAX_POOLS", 2)
    told, board = Told(), Board()
    for number in range(4):
        told.hear(f"pool{number}", heard=float(number))
    board.look(told, 4.0)

    assert [track.row.name for track in board.tracks] == ["pool2", "pool3"]


def test_a_pool_is_gone_after_a_minute_and_forgotten_after_ten():
    """Of a process of which no pool is left the receiver need not know any more either."""
    told, board = Told(), Board()
    told.hear(heard=100.0)
    board.look(told, 100.0)
    [track] = board.tracks
    gone = [track.gone(100.0 + seconds) for seconds in (59, 61)]
    board.look(told, 100.0 + 599)
    kept = board.tracks
    board.look(told, 100.0 + 601)

    assert (gone, kept, board.tracks, told.forgotten) == ([False, True], [track], [], {"one"})


def test_who_speaks_seldom_is_not_gone_so_soon():
    """With an export a minute, two may be missed."""
    track = tracked(heard=100.0, interval=60.0)

    assert [track.gone(100.0 + seconds) for seconds in (140, 160)] == [False, True]


def test_only_new_words_are_moments():
    """To look twice at one export is no second moment."""
    track = tracked(heard=1.0, used=1)
    track.note(pool(heard=1.0, used=1))
    track.note(pool(heard=2.0, used=5))

    assert [(moment.heard, moment.used) for moment in track.moments] == [(1.0, 1), (2.0, 5)]
    assert repr(track) == "<Track of shop in app pid 7 [2 moments]>"


def test_moments_are_bounded_and_no_peak_is_lost(monkeypatch):
    """When there are too many, of each two the one with more strain stays."""
    monkeypatch.setattr(_board, "MAX_MOMENTS", 8)
    track = tracked(heard=0.0, used=0)
    for number in range(1, 100):
        track.note(pool(heard=float(number), used=9 if number == 41 else 1))

    assert len(track.moments) <= 8
    assert max(moment.used for moment in track.moments) == 9
    assert track.moments[-1].heard == 99.0


def test_the_newest_wait_of_a_pool_is_known():
    """Whichever comes first, the span or the metric; waits without holders tell nothing."""
    told, board = Told(), Board()
    board.told([Wait("one", "shop", "timeout", 1.0, ({"code.line.number": 1},))])
    board.told([Wait("one", "shop", "timeout", 1.0, (HELD,)), Wait("one", "shop", "", 0.1), Wait("one", "x", "", 1.0)])
    told.hear()
    board.look(told, 0.0)

    assert holders(board.tracks[0]) == ["held at orders.py:12 in fetch, for 3.1 s, trace abc"]


@pytest.mark.parametrize(("known", "who"), [({f"{words.HOLDER}.task": "Task-7"}, "Task-7"), ({}, "somebody")])
def test_a_holder_whose_line_is_not_known_is_its_task(known, who):
    """As where the call site is switched off."""
    track = tracked()
    track.wait = Wait("one", "shop", "timeout", 1.0, (known,))

    assert holders(track) == [f"held by {who}"]


def test_who_waits_for_a_stream_is_counted_once():
    """The pending requests of gRPC are the same calls as its pending streams."""
    assert (tracked(waiting=5, streams_pending=5).waiting, tracked(waiting=5).waiting) == (5, 5)


def test_waits_are_bounded(monkeypatch):
    """A process that makes pool names up costs no memory."""
    monkeypatch.setattr(_board, "MAX_POOLS", 5)
    board = Board()
    board.told([Wait("one", f"pool{number}", "", 1.0, (HELD,)) for number in range(100)])

    assert len(board._waits) == 5


# -- what it means -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"used": 8, "max": 8, "waiting": 3}, "exhausted: all 8 are in use and 3 wait"),
        ({"used": 2, "max": 8, "waiting": 3}, "3 wait, though 2 of 8 are in use"),
        ({"gave_up": 2}, "2 gave up waiting"),
        ({"streams_pending": 5, "streams_max": 10}, "5 wait for a stream, not for a connection: 10 at once"),
        ({"streams_pending": 5, "waiting": 5}, "5 wait for a stream, not for a connection: how many are allowed is"),
        ({"orphaned": 1}, "1 places are lost"),
        ({"leaked": 1}, "1 leaked"),
        ({"overdue": 1}, "1 are out for longer than the leak threshold"),
        ({"overflow": 2}, "2 beyond the base size"),
    ],
)
def test_each_harm_has_its_advice(told, words):
    """One line for what the metrics say, and no more."""
    [line] = advice(tracked(**told))

    assert line.startswith(words)


@pytest.mark.parametrize("told", [{}, {"used": 8, "max": 8, "waiting": 0}, {"used": 99}, {"overflow": -5}])
def test_what_is_no_harm_has_no_advice(told):
    """A full pool that nobody waits for is used well."""
    assert advice(tracked(**told)) == []


def test_call_sites_stand_beside_harm_alone():
    """Who held connections long ago is of no interest while all is well."""
    track = tracked(heard=0.0, used=1, max=1, waiting=2)
    track.wait = Wait("one", "shop", "timeout", 1.0, (HELD,))
    bad = remarks(track, 0.0)
    track.note(pool(heard=1.0, used=0, max=1, waiting=0))

    assert (bad[-1], remarks(track, 1.0)) == ("held at orders.py:12 in fetch, for 3.1 s, trace abc", [])


def test_who_is_gone_gives_no_advice():
    """Its last words may be of any state."""
    assert remarks(tracked(heard=0.0, used=8, max=8, waiting=3), 90.0) == ["gone: not a word for 90 s"]


# -- what is shown --------------------------------------------------------------------------------

FULL = {
    "used": 5,
    "idle": 1,
    "max": 8,
    "waiting": 4,
    "oldest_wait": 0.5,
    "oldest_use": 3.0,
    "p95": 0.25,
    "timeouts": 6,
    "overdue": 1,
    "leaked": 2,
    "orphaned": 3,
    "overflow": 1,
    "streams": 4,
    "streams_pending": 5,
    "streams_max": 4,
}


def test_every_figure_is_shown():
    """In words and numbers."""
    assert figures(tracked(**FULL)) == [
        "waiting 4",
        "timeouts 6",
        "oldest wait 500 ms",
        "oldest use 3.0 s",
        "wait p95 250 ms",
        "overdue 1",
        "leaked 2",
        "orphaned 3",
        "overflow 1",
        "streams 4/5/4",
    ]


def test_what_a_pool_cannot_tell_is_left_out():
    """No zero is made up."""
    assert figures(tracked(used=1)) == []


def test_the_trend_has_the_newest_at_the_right():
    """Its height is a share of what may be in use."""
    track = tracked(heard=0.0, used=0, max=8)
    track.note(pool(heard=1.0, used=4, max=8))
    track.note(pool(heard=2.0, used=8, max=8))

    assert trend(track).strip() == "▁▅█"
    assert len(trend(track)) == _live.TREND


def test_plain_text_has_a_line_for_each_pool():
    """And one for each remark; process, name, system and counts come first."""
    said = lines(View(1.0, [tracked(**FULL), tracked(name="idle")], 100.0, ("head", "note")))

    assert said[:2] == ["head", "  note"]
    assert said[2].startswith("app pid 7  shop  postgresql  5/1/8  waiting 4  ")
    assert said[-1] == "app pid 7  idle  postgresql  -/-/-"
    assert said.count("    6 gave up waiting since the last export") == 0


def test_the_drawing_fits_the_terminal():
    """However narrow it is: a line that is too long is cut and not wrapped."""
    out = io.StringIO()
    view = View(1.0, [tracked(**FULL), tracked(name="[red]x", heard=0.0)], 100.0, ("head",))
    Console(file=out, width=40).print(drawing(view))
    drawn = out.getvalue().splitlines()

    assert max(map(len, drawn)) <= 40
    assert "█" * 15 + "▒" * 3 + "·" * 6 in out.getvalue()
    assert any(line.startswith("[red]x") for line in drawn)
    assert "gone: not a word for 100 s" in out.getvalue()


@pytest.mark.parametrize("kind", [PlainScreen, LiveScreen])
def test_a_screen_shows_and_says_how_often(kind):
    """Each writes to where it was told, and its repr counts."""
    out = io.StringIO()
    screen = kind(out)
    screen.show(View(1.0, [tracked()], 100.0))
    screen.close()

    assert "shop" in out.getvalue()
    assert repr(screen) == f"<{kind.__name__} [1 shown]>"


def test_what_the_command_writes_cannot_move_the_cursor():
    """Its colours stay; what else a terminal would obey is dropped."""
    out = io.StringIO()
    screen = LiveScreen(out)
    screen.above("\x1b[31mred\x1b[0m \x1b[2Jgone\x07 [bold]no markup[/bold]")
    screen.close()

    assert "red gone [bold]no markup[/bold]" in out.getvalue()
    assert "\x1b[2J" not in out.getvalue()


# -- keys -----------------------------------------------------------------------------------------


class Shown:
    seconds_between = 1.0

    def __init__(self):
        self.views = []

    def show(self, view):
        self.views.append(view)


@pytest.fixture
def watching():
    board, told = Board(), Told()
    for name, value in (("a", 1), ("b", 2)):
        told.hear(name, value=value, heard=time.monotonic())
    told.spans = 0
    made = Watching(told, board, Shown(), ["where"])
    made.show(keys=True)
    board.tracks[1].row = pool("b", used=1, max=1, waiting=5, p95=1.0, heard=time.monotonic())
    return made


def names(watching):
    watching.show(keys=True)
    return [track.row.name for track in watching._screen.views[-1].tracks]


def test_s_sorts(watching):
    """By name at first; then by how full, by who waits, by wait time; and from the beginning."""
    orders = [names(watching)]
    for _ in range(4):
        watching.press("s")
        orders.append(names(watching))

    assert orders == [["a", "b"], ["b", "a"], ["b", "a"], ["b", "a"], ["a", "b"]]


def test_help_comes_and_goes(watching):
    """The keys are always there, what they mean when asked for; and that it is paused."""
    watching.press("?")
    names(watching)
    helped = watching._screen.views[-1].notes
    watching.press("?")
    watching.press("p")
    names(watching)
    plain = watching._screen.views[-1].notes

    assert set(_live.HELP) <= set(helped)
    assert not set(_live.HELP) & set(plain)
    assert plain[-1] == f"{_live.KEYS}   (by name, paused)"
    assert re.fullmatch(r"<Watching for \d+ s: 2 pools>", repr(watching))


def test_q_ends_and_other_keys_do_nothing(watching):
    """An arrow key is three characters, none of which means anything."""
    watching.press("\x1b")
    before = watching.quit
    watching.press("q")

    assert (before, watching.quit) == (False, True)


def test_what_is_no_terminal_has_no_keys():
    """A file, a pipe and nothing at all are left alone."""
    read, write = os.pipe()
    with os.fdopen(read) as pipe:
        os.close(write)
        for source in (None, io.StringIO(), pipe):
            with Keys(source) as keys:
                assert (keys.readable, keys.pressed()) == (False, "")
    assert repr(keys) == "<Keys of nobody>"


# -- what the command is told -------------------------------------------------------------------------

HERE, HERE_GRPC = "http://127.0.0.1:1", "http://127.0.0.1:2"


def test_the_command_exports_to_here_every_second():
    """Endpoint, protocol, exporters, interval and a name, as the user has said nothing; and no proxy between."""
    told = environment({"PATH": "p"}, HERE, HERE_GRPC, "app")

    assert told == {
        "PATH": "p",
        **_child.DEFAULTS,
        "OTEL_SERVICE_NAME": "app",
        "OTEL_EXPORTER_OTLP_ENDPOINT": HERE,
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    assert told["OTEL_METRIC_EXPORT_INTERVAL"] == "1000"


def test_what_the_user_has_set_stays():
    """All of it, the endpoint too."""
    theirs = {
        "OTEL_SERVICE_NAME": "mine",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c",
        "OTEL_METRIC_EXPORT_INTERVAL": "5",
        "OTEL_METRICS_EXPORTER": "console",
    }

    assert environment(theirs, HERE, HERE_GRPC, "app").items() >= theirs.items()
    assert "OTEL_EXPORTER_OTLP_PROTOCOL" not in environment(theirs, HERE, HERE_GRPC, "app")
    assert "OTEL_SERVICE_NAME" not in environment({"OTEL_RESOURCE_ATTRIBUTES": "service.name=x"}, HERE, None, "app")


@pytest.mark.parametrize(("grpc", "endpoint"), [(HERE_GRPC, HERE_GRPC), (None, HERE)])
def test_a_chosen_protocol_gets_its_endpoint(grpc, endpoint):
    """Who exports over gRPC is sent to the port for that, if there is one."""
    told = environment({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, HERE, grpc, "app")

    assert told["OTEL_EXPORTER_OTLP_ENDPOINT"] == endpoint


@pytest.mark.parametrize(
    ("command", "name"), [(["python", "-u", "a/shop.py", "x"], "shop"), (["/bin/gunicorn", "app:app"], "gunicorn")]
)
def test_a_service_is_called_after_its_script(command, name):
    """Or after its program."""
    assert _live._name(command) == name


def test_a_program_that_is_not_there_is_said():
    """Before anything is started."""
    with pytest.raises(FileNotFoundError, match="no-such-program: not found"):
        Child(["no-such-program"], {})


def test_signals_are_noted_in_their_order():
    """Those that end us are a wish; the others are only passed on."""
    with _child.wishes(*_child.PASSED_ON) as wish:
        for number in (signal.SIGUSR1, signal.SIGINT):
            signal.raise_signal(number)

    assert (list(wish.came), wish.signal, wish.status) == ([signal.SIGUSR1, signal.SIGINT], signal.SIGINT, 0)
    assert repr(Wish()) == "<Wish to go on>"


# -- for real -------------------------------------------------------------------------------------------

APP = """
import sys, threading, time
from sqlalchemy import create_engine
from sqlalchemy.exc import TimeoutError
from sqlalchemy.pool import QueuePool

engine = create_engine(
    "sqlite://", poolclass=QueuePool, pool_size=1, max_overflow=0, pool_timeout=0.2, pool_logging_name="<orders>",
    connect_args={"check_same_thread": False},
)
print("started", flush=True)
end = time.monotonic() + float(sys.argv[1])
while time.monotonic() < end:
    with engine.connect():
        try:
            engine.connect()
        except TimeoutError:
            pass
sys.exit(7)
"""
# Nothing of OpenTelemetry is asked for here, so that it starts at once.
QUICK = {"OTEL_SDK_DISABLED": "true", "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS": "*"}


@pytest.fixture
def app(tmp_path):
    path = tmp_path / "orders_app.py"
    path.write_text(APP)
    return path


def command(*arguments):
    return [sys.executable, "-m", "otel_pools", "watch", "--http", "0", "--grpc", "0", *map(str, arguments)]


def bare(**environ):
    """Our environment without what somebody has said to OpenTelemetry."""
    return {key: value for key, value in os.environ.items() if not key.startswith("OTEL_")} | environ


def run(*arguments, **environ):
    return subprocess.run(
        command(*arguments), env=bare(**environ), capture_output=True, text=True, timeout=ENOUGH, check=False
    )


def needs_exporter(protocol):
    pytest.importorskip("opentelemetry.distro")
    pytest.importorskip(f"opentelemetry.exporter.otlp.proto.{protocol}")


def test_a_real_command_over_http(app, tmp_path):
    """Its pool and the line that holds the connection are shown without escape codes; its exit status is ours."""
    needs_exporter("http")
    report = tmp_path / "report.html"
    ran = run("--html", report, "--", sys.executable, app, "1.5")

    assert ran.returncode == 7, ran.stderr
    assert "started" in ran.stdout
    assert re.search(r"^orders_app \w+  <orders>  sqlite  [01]/[01]/1  .*timeouts [1-9]", ran.stdout, re.MULTILINE)
    assert re.search(r"held at \S*orders_app.py:14 in \S+, for ", ran.stdout)
    assert "\x1b" not in ran.stdout
    assert "&lt;orders&gt;" in report.read_text()


class Terminal:
    """The command on a terminal of its own, which is its controlling one."""

    def __init__(self, *arguments, **environ):
        self.ours, theirs = os.openpty()
        termios.tcsetwinsize(theirs, (40, 120)) if hasattr(termios, "tcsetwinsize") else None
        self.before = termios.tcgetattr(theirs)
        self.process = subprocess.Popen(
            command(*arguments),
            env=bare(TERM="xterm", COLUMNS="120", LINES="40", **environ),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509  # no other thread runs here
        )
        self.theirs = theirs
        self.said = ""

    def read_until(self, words):
        while words not in self.said:
            self.said += os.read(self.ours, 65536).decode(errors="replace")

    def end(self, keys):
        """Press these, and wait; its status, and whether the terminal is as it was."""
        os.write(self.ours, keys)
        os.set_blocking(self.ours, False)
        until = time.monotonic() + ENOUGH
        while self.process.poll() is None and time.monotonic() < until:
            with contextlib.suppress(BlockingIOError):
                self.said += os.read(self.ours, 65536).decode(errors="replace")
        return self.process.wait(1), termios.tcgetattr(self.theirs) == self.before

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.ours)
        os.close(self.theirs)


@pytest.fixture
def terminal():
    opened = []

    def start(*arguments, **environ):
        opened.append(Terminal(*arguments, **environ))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def test_a_real_command_over_grpc_on_a_terminal_until_ctrl_c(terminal, app):
    """What it writes stands above the pools; Ctrl-C reaches it once, and leaves the terminal as it was."""
    needs_exporter("grpc")
    shown = terminal("--", sys.executable, app, "600", OTEL_EXPORTER_OTLP_PROTOCOL="grpc")
    shown.read_until("oldest use")
    status, restored = shown.end(b"\x03")

    assert (status, restored) == (130, True)
    assert "started" in shown.said
    assert "<orders>" in shown.said
    assert shown.said.count("KeyboardInterrupt") == 1
    assert shown.said.rstrip().endswith("\x1b[?25h")


def test_q_on_a_terminal(terminal):
    """The way out, with nothing watched; keys are told where they work."""
    shown = terminal()
    shown.read_until(_live.KEYS)

    assert shown.end(b"q") == (0, True)


def test_seconds_end_the_command_too():
    """It is ended, and that is no failure."""
    ran = run("--seconds", "0.5", "--", sys.executable, "-c", "import time; time.sleep(600)", **QUICK)

    assert (ran.returncode, ran.stderr) == (0, "")


def test_signals_are_passed_on():
    """What the command makes of one is its affair, and its status is ours."""
    program = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\n"
        "signal.signal(signal.SIGUSR1, lambda *_: print('heard', flush=True))\n"
        "print('ready', flush=True)\n"
        "while True: time.sleep(0.1)"
    )
    process = subprocess.Popen(
        command("--", sys.executable, "-c", program), env=bare(**QUICK), stdout=subprocess.PIPE, text=True
    )
    for said, number in (("ready", signal.SIGUSR1), ("heard", signal.SIGTERM)):
        while said not in (line := process.stdout.readline()):
            assert line, "it ended too early"
        process.send_signal(number)
    process.communicate(timeout=ENOUGH)

    assert process.returncode == 5


def most_memory(process):
    """Bytes that it has ever had at once, where the system tells."""
    with contextlib.suppress(FileNotFoundError):
        told = Path(f"/proc/{process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", told)[1]) * 1024
    return 0


def post(port, body):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ENOUGH)
    headers = {"Content-Type": "application/x-protobuf", "Content-Encoding": "gzip"}
    connection.request("POST", "/v1/metrics", body, headers)
    status = connection.getresponse().status
    connection.close()
    return status


def test_without_a_command_a_signal_ends_it():
    """With the status that a shell would tell; garbage and bombs on both of its ports do not, and cost no memory."""
    process = subprocess.Popen(command(), env=bare(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said = process.stdout.readline() + process.stdout.readline()
    ports = [int(port) for port in re.findall(r"http://127\.0\.0\.1:(\d+)", said)]
    for port in ports:
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"\xff" * 1000)
    before = most_memory(process)
    statuses = [post(ports[0], gzip.compress(body, 1)) for body in (bytes(400 << 20), b"\x0a\x00" * (2 << 20))]
    more = most_memory(process) - before
    assert ask(Target("http/protobuf", f"http://127.0.0.1:{ports[0]}/v1/metrics", {}), ENOUGH) is None
    process.terminate()
    _, errors = process.communicate(timeout=ENOUGH)

    assert (process.returncode, errors, statuses) == (143, "", [413, 200])
    assert more < 300 << 20
    assert len(ports) == (2 if "over gRPC: http" in said else 1)


def test_a_port_that_is_taken_is_one_line(capsys):
    """With what to do about it."""
    with Receiver() as taken:
        port = int(taken.endpoint.rpartition(":")[2])
        status = _live.watch(_live.Options(port, 0), io.StringIO())

    assert status == 1
    assert capsys.readouterr().err.startswith(f"otel-pools watch: port {port} cannot be had (")


def test_a_command_that_is_not_there_is_one_line(capsys):
    """And the status that a shell has for it."""
    status = _live.watch(_live.Options(0, 0, command=["no-such-program"]), io.StringIO())

    assert (status, capsys.readouterr().err) == (
        127,
        "otel-pools watch: no-such-program: not found, or no program\n",
    )


def test_without_grpcio_there_is_http(monkeypatch):
    """It says so, and goes on."""
    monkeypatch.setattr(_live._grpc, "available", lambda: False)
    out = io.StringIO()

    assert _live.watch(_live.Options(0, 0, seconds=0.01), out) == 0
    assert "(not over gRPC: grpcio is not installed)" in out.getvalue()


def test_an_endpoint_of_the_users_is_said(monkeypatch):
    """What goes elsewhere cannot be seen here; the secrets in its URL are not shown."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "https://me:secret@collector:4318/")
    for key, value in QUICK.items():
        monkeypatch.setenv(key, value)
    out = io.StringIO()
    status = _live.watch(_live.Options(0, 0, command=[sys.executable, "-c", ""]), out)

    assert (status, "secret" in out.getvalue()) == (0, False)
    assert "the command exports to https://collector:4318/, as your environment says" in out.getvalue()


def test_a_report_that_cannot_be_written_is_one_line(tmp_path, capsys):
    """The pools were shown all the same."""
    folder = tmp_path / "folder"
    folder.mkdir()
    status = _live.watch(_live.Options(0, 0, html=Path(folder), seconds=0.01), io.StringIO())

    assert status == 1
    assert capsys.readouterr().err.startswith(f"otel-pools watch: the report cannot be written to {folder} (")
