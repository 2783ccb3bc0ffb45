"""A program that runs under `opentelemetry-instrument` for us: what it is told, the signals on their way, its end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

ENDPOINT, PROTOCOL = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_PROTOCOL"
ENDPOINTS = (ENDPOINT, "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
PROTOCOLS = (PROTOCOL, "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
SERVICE, RESOURCE = "OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES"
# What makes a program export all that can be watched, every second.
DEFAULTS = {
    "OTEL_METRICS_EXPORTER": "otlp",
    "OTEL_TRACES_EXPORTER": "otlp",
    "OTEL_LOGS_EXPORTER": "none",
    "OTEL_METRIC_EXPORT_INTERVAL": "1000",
    "OTEL_BSP_SCHEDULE_DELAY": "1000",
}
HTTP, GRPC = "http/protobuf", "grpc"

# The same as the command `opentelemetry-instrument`, for when it is not beside the interpreter.
INSTRUMENT = "from opentelemetry.instrumentation.auto_instrumentation import run; run()"

LINE = 8192  # bytes of a line; a longer one is several
STOP_SECONDS = 10.0
LAST_LINES_SECONDS = 1.0
# Beside those that end us, what a program may be waiting for.
PASSED_ON = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT) if sys.platform != "win32" else ()


# -- what it is told -----------------------------------------------------------------------


def elsewhere(environ: Mapping[str, str]) -> str | None:
    """The endpoint that the user has set, so that the data go there and not to us."""
    return next((environ[key] for key in ENDPOINTS if environ.get(key)), None)


def environment(environ: Mapping[str, str], http: str, grpc: str | None, name: str) -> dict[str, str]:
    """
    The environment of a program that is to be watched: the user's, and where that is silent, ours.

    Args:
        environ: The user's.
        http: Where we receive OTLP over HTTP.
        grpc: Where we receive it over gRPC, if we do.
        name: Of the service, if the user has given it none.
    """
    told = {**environ, **{key: value for key, value in DEFAULTS.items() if not environ.get(key)}}
    if not environ.get(SERVICE) and "service.name=" not in environ.get(RESOURCE, ""):
        told[SERVICE] = name
    if elsewhere(environ) is None:
        chosen = {environ[key] for key in PROTOCOLS if environ.get(key)}
        told[ENDPOINT] = grpc if grpc and GRPC in chosen else http
        if not chosen:
            told[PROTOCOL] = HTTP
        told |= unproxied(environ)
    return told


def unproxied(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables without which a proxy for the internet would be asked for this machine."""
    hosts = ",".join(filter(None, (environ.get("NO_PROXY") or environ.get("no_proxy"), "127.0.0.1")))
    return {"NO_PROXY": hosts, "no_proxy": hosts}


def instrumented() -> list[str]:
    """The words that, before a command, have OpenTelemetry loaded into it."""
    command = Path(sys.executable).with_name("opentelemetry-instrument")
    return [str(command)] if command.exists() else [sys.executable, "-c", INSTRUMENT]


def safe(endpoint: str | None) -> str:
    """An endpoint without the user and password that may stand in it."""
    if endpoint is None:
        return ""
    scheme, mark, rest = endpoint.rpartition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{mark}{host.rpartition('@')[2]}{slash}{path.partition('?')[0]}"


# -- signals ---------------------------------------------------------------------------------


class Wish:
    """
    Whether somebody wants us to end: which signal came.

    Only noted when it comes, so that nothing is torn down half made; whoever
    waits looks at it.

    Attributes:
        came: All that came and that nobody has passed on.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.came: deque[int] = deque(maxlen=16)

    def __repr__(self) -> str:
        return f"<Wish {'to go on' if self.signal is None else f'to end, by {signal.Signals(self.signal).name}'}>"

    def __call__(self, number: int, _: FrameType | None) -> None:
        self.came.append(number)
        if number not in PASSED_ON:
            self.signal = number

    @property
    def status(self) -> int:
        """The exit status: 0 also for Ctrl-C, which is how one leaves."""
        return 0 if self.signal in {None, signal.SIGINT} else 128 + (self.signal or 0)


@contextmanager
def wishes(*more: int) -> Iterator[Wish]:
    """Note SIGINT, SIGTERM, SIGHUP and *more* instead of dying of them; what `nohup` has set stays."""
    wish, before = Wish(), dict[int, Any]()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, *more):
        if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
            continue
        before[number] = signal.signal(number, wish)
    try:
        yield wish
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)


# -- the program -------------------------------------------------------------------------------


class Child:
    """
    A command of the user's under `opentelemetry-instrument`; a context manager, which ends it.

    Args:
        command: The program and its arguments.
        environ: Its environment.
        on_line: Called with each line that it writes, in a thread; by default it writes where we do.

    Raises:
        FileNotFoundError: There is no such program.
    """

    def __init__(
        self, command: Sequence[str], environ: Mapping[str, str], on_line: Callable[[str], None] | None = None
    ) -> None:
        if shutil.which(command[0]) is None:
            raise FileNotFoundError(f"{command[0]}: not found, or no program")
        self.name = Path(command[0]).name
        # On a terminal with a table the keys are for the table, and what is written goes above it.
        pipes: dict[str, Any] = (
            {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if on_line else {}
        )
        # In a session of its own: a Ctrl-C in the terminal comes once, from us, and not twice.
        self._process = subprocess.Popen(  # noqa: S603  # the user's own command
            [*instrumented(), *command], env=dict(environ), start_new_session=True, **pipes
        )
        self._stopped = False
        self._reader: threading.Thread | None = None
        if on_line is not None:
            assert self._process.stdout is not None
            self._reader = threading.Thread(target=_read, args=(self._process.stdout, on_line), daemon=True)
            self._reader.start()

    def __repr__(self) -> str:
        code = self._process.poll()
        return f"<Child {self.name}, {'running' if code is None else f'ended with {code}'}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if self._reader is not None:
            # Whatever it has started may keep the pipe open for ever.
            self._reader.join(LAST_LINES_SECONDS)

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    @property
    def status(self) -> int:
        """As a shell tells it; 0 if it died because we ended it."""
        code = self._process.wait()
        if self._stopped and code in {-signal.SIGTERM, -signal.SIGKILL}:
            return 0
        return code if code >= 0 else 128 - code

    def send(self, number: int) -> None:
        """Pass a signal on; Ctrl-C to all that it has started, as a terminal does."""
        with suppress(ProcessLookupError):
            if number == signal.SIGINT:
                os.killpg(self._process.pid, number)
            else:
                self._process.send_signal(number)

    def stop(self) -> None:
        """End it, if it runs: let it finish, and after 10 s kill it and whatever it has started."""
        if not self.running:
            return
        self._stopped = True
        end(self._process)


def end(process: subprocess.Popen[Any]) -> None:
    """Let what has a session of its own finish, and after 10 s kill it and whatever it has started."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _read(pipe: IO[bytes], on_line: Callable[[str], None]) -> None:
    with pipe:
        while line := pipe.readline(LINE):
            on_line(line.decode(errors="replace").rstrip("\r\n"))
