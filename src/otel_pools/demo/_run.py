"""The demo itself: starts the servers, the receiver and the load, shows the table, and leaves nothing behind."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from .._child import (
    DEFAULTS,
    ENDPOINT,
    HTTP,
    PROTOCOL,
    PROTOCOLS,
    Wish,
    elsewhere,
    end,
    instrumented,
    safe,
    unproxied,
    wishes,
)
from .._receiver import Receiver
from .._screen import LiveScreen, PlainScreen, PoolRow, Status, rows
from . import _load
from ._postgres import Postgres, PostgresStartError
from ._qdrant import Qdrant, QdrantStartError
from ._valkey import Valkey, ValkeyStartError
from ._web import Web, WebStartError

if TYPE_CHECKING:
    from typing_extensions import Self

DATABASE = "shop"  # which also names its pool
SERVICE = "otel-pools-demo"
PATIENCE = 20.0  # seconds until the first metric must have come; it takes two
TICK = 0.05
TAIL_LINES = 15

DISABLED = "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS"
OURS = "otel_pools_"


class DemoError(RuntimeError):
    """The demo cannot show what it promises; the message says why."""


# -- what the load is told -------------------------------------------------------------


def environment(environ: Mapping[str, str], endpoint: str | None) -> dict[str, str]:
    """
    The load's environment: that of the user, OpenTelemetry switched on, and exports every second.

    Args:
        environ: The user's.
        endpoint: Our receiver; None leaves endpoints and protocols as the user has set them.
    """
    told = {
        **environ,
        **DEFAULTS,
        "OTEL_SERVICE_NAME": SERVICE,
        DISABLED: _without_ours(environ.get(DISABLED, "")),
    }
    if endpoint is not None:
        return _to_us(told, endpoint)
    if not any(environ.get(key) for key in PROTOCOLS) and not _has_grpc():
        told[PROTOCOL] = HTTP  # the other half of the default, gRPC, is not in our extra
    return told


def _to_us(told: dict[str, str], endpoint: str) -> dict[str, str]:
    # What was meant for another destination does not fit ours.
    foreign = (*PROTOCOLS, "OTEL_CONFIG_FILE", "OTEL_EXPORTER_OTLP_HEADERS")
    kept = {key: value for key, value in told.items() if key not in foreign}
    return {**kept, ENDPOINT: endpoint, PROTOCOL: HTTP, **unproxied(told)}


def _without_ours(disabled: str) -> str:
    names = (name.strip() for name in disabled.split(","))
    return ",".join(name for name in names if name and name != "*" and not name.startswith(OURS))


def _has_grpc() -> bool:
    try:
        return importlib.util.find_spec("opentelemetry.exporter.otlp.proto.grpc") is not None
    except ModuleNotFoundError:
        return False


# -- the load, seen from outside ---------------------------------------------------------


class Load:
    """
    The application in a process of its own, under `opentelemetry-instrument`; a context manager.

    Args:
        places: Of the servers, by the variables in which the application looks for them.
        environ: What else it finds in its environment.
        cycle: Seconds of one cycle.
        cycles: How many; 0 is without end.

    Attributes:
        phase: What it last said it does.
        since: When it began its traffic, on the monotonic clock; None before.
    """

    def __init__(self, places: Mapping[str, str], environ: Mapping[str, str], cycle: float, cycles: int) -> None:
        self.phase = "starting"
        self.since: float | None = None
        # It has no name, so it cannot be left behind.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed in __exit__
        # By its path: as a module of ours it would import us, and loading us is the command's business.
        self._process = subprocess.Popen(
            [*instrumented(), sys.executable, _load.__file__, f"--cycle={cycle:g}", f"--cycles={cycles}"],
            env={**environ, **places},
            stdin=subprocess.PIPE,  # its end tells the load that we are gone, however we went
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            # A Ctrl-C in the terminal is for us alone: the load may still deliver what it has.
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._listen, name="otel-pools-demo-phases")
        self._reader.start()

    def __repr__(self) -> str:
        code = self.ended
        return f"<Load {self._process.pid}, {'running' if code is None else f'ended with {code}'}: {self.phase}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            assert pipe is not None
            pipe.close()

    @property
    def ended(self) -> int | None:
        """Its exit status, or None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """Let it finish and deliver its last metrics; after 10 s, kill it and whatever it has started."""
        if self._process.poll() is not None:
            return
        end(self._process)

    def last_words(self) -> str:
        """The end of what it wrote to standard error."""
        # At an offset of its own: the load goes on writing at that of the file.
        said = os.pread(self._errors.fileno(), 1 << 20, max(os.fstat(self._errors.fileno()).st_size - (1 << 20), 0))
        return "\n".join(said.decode(errors="replace").strip().splitlines()[-TAIL_LINES:])

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.phase = line.strip()
            self.since = self.since or time.monotonic()


# -- the play -------------------------------------------------------------------------------


class Play:
    """One run of the demo, from its first table to its last."""

    def __init__(self, load: Load, receiver: Receiver | None, where: str, screen: LiveScreen | PlainScreen) -> None:
        self._load = load
        self._receiver = receiver
        self._where = where
        self._screen = screen
        self._start = time.monotonic()

    def __repr__(self) -> str:
        return f"<Play since {self._seconds:.0f} s, {'heard' if self._heard else 'not heard yet'}>"

    def watch(self, wish: Wish, seconds: float | None) -> None:
        """
        Show the table until the load ends, the time is over or somebody wishes it.

        Raises:
            DemoError: The load died, or no metric of a pool has come in time.
        """
        due = 0.0
        while self._load.ended is None and wish.signal is None and not self._over(seconds):
            if self._seconds >= due:
                due = self._seconds + self._screen.seconds_between
                self._show()
            if not self._heard and self._seconds > PATIENCE:
                raise self._failed(f"no metric of a pool has come in {PATIENCE:.0f} s")
            time.sleep(TICK)

    def finish(self, wish: Wish) -> None:
        """
        Let the load deliver its last, and show that.

        Raises:
            DemoError: The load did not end well, or no metric of a pool has come at all.
        """
        was_running = self._load.ended is None
        self._load.stop()
        self._show()
        if not was_running and self._load.ended:
            raise self._failed(f"the load died with status {self._load.ended}")
        if wish.signal is None and not self._heard:
            raise self._failed("no metric of a pool has come")

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._start

    def _over(self, seconds: float | None) -> bool:
        # Of its traffic: how long it takes to start is the machine's affair.
        since = self._load.since
        return seconds is not None and since is not None and time.monotonic() - since >= seconds

    @property
    def _heard(self) -> bool:
        # What goes elsewhere is not ours to judge.
        return self._receiver is None or bool(self._pools())

    def _pools(self) -> list[PoolRow]:
        return [] if self._receiver is None else rows(self._receiver.series())

    def _show(self) -> None:
        self._screen.show(Status(self._seconds, self._load.phase, self._origin()), self._pools())

    def _origin(self) -> str:
        if self._receiver is not None:
            heard = f"{self._receiver.exports} exports, {self._receiver.spans} spans received"
            return f"{SERVICE} -> OTLP {self._where}: {heard}"
        said = self._load.last_words().rpartition("\n")[2]
        return f"{SERVICE} -> OTLP {self._where}: look there, nothing is received here" + (f"\n{said}" if said else "")

    def _failed(self, what: str) -> DemoError:
        said = self._load.last_words()
        return DemoError(f"{what}; the load said:\n{said}" if said else what)


def run(seconds: float | None, cycle: float, out: TextIO) -> int:
    """
    Run the demo and return its exit status.

    Args:
        seconds: When to end at the latest; by default after one cycle, and on a terminal never.
        cycle: Seconds of one cycle: steady traffic, a burst, recovery.
        out: Where the table goes.
    """
    endless = seconds is not None or out.isatty()
    with wishes() as wish:
        try:
            with ExitStack() as stack:
                play = _set_up(stack, wish, cycle, 0 if endless else 1, out)
                if play is not None:
                    play.watch(wish, seconds)
                    play.finish(wish)
        except (DemoError, PostgresStartError, QdrantStartError, ValkeyStartError, WebStartError) as error:
            print(f"otel-pools demo: {error}", file=sys.stderr)
            return 1
        return wish.status


def _set_up(stack: ExitStack, wish: Wish, cycle: float, cycles: int, out: TextIO) -> Play | None:
    """Everything in its order, so that it ends in the other; None if by then nobody wants it any more."""
    target = elsewhere(os.environ)
    receiver = stack.enter_context(Receiver() if target is None else nullcontext())
    valkey = stack.enter_context(Valkey())
    web = stack.enter_context(Web(_load.STREAMS))
    qdrant = stack.enter_context(Qdrant(_load.STREAMS))
    postgres = stack.enter_context(Postgres(DATABASE))
    if wish.signal is not None:
        return None
    environ = environment(os.environ, receiver.endpoint if receiver else None)
    places = {
        _load.URL: postgres.url("asyncpg"),
        _load.VALKEY_URL: valkey.url(),
        _load.WEB_URL: web.url,
        _load.QDRANT_URL: qdrant.url,
        _load.QDRANT_GRPC_PORT: str(qdrant.grpc_port),
    }
    load = stack.enter_context(Load(places, environ, cycle, cycles))
    screen = LiveScreen(out) if out.isatty() else PlainScreen(out)
    stack.callback(screen.close)
    return Play(load, receiver, safe(target) or (receiver.endpoint if receiver else ""), screen)
