"""The matrix: each incident against each signal, which is what `python examples/incidents/lab.py` prints."""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass

import lab
from servers import NotInstalledError, Servers
from signals import SIGNALS, fired

HEALTHY = "healthy"
# Those whose signal has another name than they come last, and health.
NAMES = (*SIGNALS, "pgbouncer_limit", HEALTHY)

WIDTH = max(map(len, NAMES))
HEAD = f"   {'incident':{WIDTH}} " + "  ".join(f"{number:<2}" for number, _ in enumerate(SIGNALS, 1)).rstrip()
LEGEND = """\
A row is an incident, a column a signal, by the number of the incident that it is called after.
X fires and should, . is silent and should be, ! fires and should not, - is silent and should fire."""


def named_by(name: str) -> str | None:
    """The signal that an incident should make fire, as its own docstring says; None for health."""
    found = re.search(r"^The signal `(\w+)`", inspect.getdoc(importlib.import_module(name)) or "", re.MULTILINE)
    return found[1] if found else None


@dataclass(frozen=True)
class Row:
    """
    What fired in one incident.

    Attributes:
        expected: The signal that should; None where none should.
        fired: On which pool, which signal.
        missing: The program for whose lack it was not played; None if it was.
    """

    name: str
    expected: str | None
    fired: frozenset[tuple[str, str]] = frozenset()
    missing: str | None = None

    @property
    def signals(self) -> set[str]:
        """Those that fired on any pool."""
        return {signal for _, signal in self.fired}

    @property
    def is_right(self) -> bool:
        """Whether the expected signal fired on exactly one pool, and no other on any."""
        return [signal for _, signal in self.fired] == ([self.expected] if self.expected else [])

    @property
    def false(self) -> int:
        """How many signals fired that should not have."""
        return sum(signal != self.expected for _, signal in self.fired)

    def __str__(self) -> str:
        number = f"{NAMES.index(self.name) + 1:>2}" if self.name in SIGNALS else "  "
        cells = "   ".join(self._cell(signal) for signal in SIGNALS)
        return f"{number} {self.name:{WIDTH}} {self.missing or cells}"

    def _cell(self, signal: str) -> str:
        if signal in self.signals:
            return "X" if signal == self.expected else "!"
        return "-" if signal == self.expected else "."


def row(name: str, evidence: lab.Evidence) -> Row:
    """What fired in it."""
    return Row(name, named_by(name), frozenset(fired(evidence)))


def verdict(rows: Iterable[Row]) -> str:
    """One line about all that were played."""
    played = [row for row in rows if not row.missing]
    incidents = [row for row in played if row.expected]
    named = sum(row.expected in row.signals for row in incidents)
    return f"{named} of {len(incidents)} named by their own signal, {sum(row.false for row in played)} false signals"


def play(name: str, servers: Servers) -> Row:
    """Play one incident."""
    script = importlib.import_module(name)
    try:
        with lab.Lab(servers) as stage:
            script.play(stage)
    except NotInstalledError as missing:
        return Row(name, named_by(name), missing=f"not played: {missing}")
    return row(name, stage.evidence)


def main() -> None:
    """Play those that were asked for, or all; print a row of each, and fail if one is not as it should be."""
    parser = argparse.ArgumentParser(description=inspect.getdoc(lab))
    parser.add_argument("names", nargs="*", metavar="incident", help=", ".join(NAMES))
    asked = lab.options(parser)
    if unknown := set(asked.names) - set(NAMES):
        parser.error(f"there is no incident {', '.join(sorted(unknown))}")
    rows, begin = [], time.monotonic()
    print(f"{LEGEND}\n")
    print(HEAD)
    with Servers(asked.servers) as servers:
        for name in asked.names or NAMES:
            rows.append(play(name, servers))
            print(rows[-1], flush=True)
    print(f"\n{verdict(rows)} ({time.monotonic() - begin:.0f} s)")
    sys.exit(not all(one.is_right or one.missing for one in rows))
