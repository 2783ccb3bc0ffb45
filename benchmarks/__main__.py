"""Everything this project says of its cost, measured by one command: a table, JSON, and a picture."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plot

HERE = Path(__file__).parent
# What each program is told by default, when all take about a minute together; --long leaves them their own.
SHORT = {
    "cycle": ("--rounds=5", "--cycles=1000"),
    "redis_cycle": ("--rounds=5", "--cycles=1000"),
    "httpx_cycle": ("--rounds=3", "--cycles=800"),
    "floor": ("--rounds=3", "--cycles=2000"),
    "cpu": ("--rounds=3", "--cycles=4000"),
    "tail": ("--rounds=4", "--cycles=60000"),
    "collection": ("--rounds=3",),
    "memory": ("--pools=1000", "--names=50"),
    "imports": ("--rounds=3",),
}
CYCLES = ("cycle", "redis_cycle", "httpx_cycle")
MILLION = {"tail": ("--rounds=10", "--cycles=1000000")}


def run(part: str, options: tuple[str, ...]) -> dict[str, Any]:
    """One program, in a process of its own: what the others import and patch is no part of what it measures."""
    command = [sys.executable, str(HERE / f"{part}.py"), "--json", *options]
    told: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return told


def lines(part: str, told: Mapping[str, Any]) -> list[str]:
    """What it would have printed."""
    module = importlib.import_module("turns" if part in CYCLES else part)
    printed: list[str] = module.table(told)
    return printed


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], *SHORT], help="which programs; all by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture of the cycles there, as SVG")
    parser.add_argument("--long", action="store_true", help="many rounds, and a million single cycles: half an hour")
    parser.add_argument("--no-server", action="store_true", help="only stubs")
    return parser.parse_args()


def options(part: str, chosen: argparse.Namespace) -> tuple[str, ...]:
    length = MILLION.get(part, ()) if chosen.long else SHORT[part]
    return (*length, *(("--no-server",) if chosen.no_server and part in CYCLES else ()))


def main() -> None:
    chosen, parts = arguments(), {}
    start = time.monotonic()
    for part in chosen.parts or SHORT:
        parts[part] = run(part, options(part, chosen))
        print("\n".join(lines(part, parts[part])), end="\n\n", flush=True)
    print(f"{time.monotonic() - start:.0f} s")
    if chosen.json:
        chosen.json.write_text(json.dumps(parts, indent=2) + "\n")
    if chosen.plot:
        chosen.plot.write_text(plot.svg({part: parts[part] for part in CYCLES if part in parts}))


if __name__ == "__main__":
    main()
