"""How long `import otel_pools` takes: alone, and where OpenTelemetry is imported already."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from turns import Row, parser

# What an application has that is instrumented by anything at all.
THERE = "import opentelemetry.metrics, opentelemetry.trace, opentelemetry.instrumentation.instrumentor"
WAYS = {"otel_pools": "", "otel_pools, after OpenTelemetry's API": THERE}


def imported(before: str) -> float:
    """Milliseconds, cumulative, in a process of its own."""
    program = [sys.executable, "-X", "importtime", "-c", f"{before}\nimport otel_pools"]
    told = subprocess.run(program, check=True, capture_output=True, text=True).stderr
    line = next(line for line in told.splitlines() if line.rpartition("|")[2].strip() == "otel_pools")
    return int(line.split("|")[1]) / 1e3


def measure(rounds: int) -> dict[str, Row]:
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, before in WAYS.items():
            taken[way].append(imported(before))
    return {
        way: {"ms": round(statistics.median(all), 1), "least": min(all), "most": max(all)} for way, all in taken.items()
    }


def table(told: Mapping[str, Any]) -> list[str]:
    """As lines of less than 100 columns."""
    lines = [f"Import, ms, median of {told['rounds']} (least, most)"]
    for way, row in told["rows"].items():
        lines.append(f"{way:40}{row['ms']:8.1f} ({row['least']:.1f}, {row['most']:.1f})")
    return lines


def main() -> None:
    chosen = parser(__doc__, rounds=7).parse_args()
    told = {"python": platform.python_version(), "rounds": chosen.rounds, "rows": measure(chosen.rounds)}
    print(json.dumps(told) if chosen.json else "\n".join(table(told)))


if __name__ == "__main__":
    main()
