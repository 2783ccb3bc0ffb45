"""
What our tests say of each version of a library, of OpenTelemetry and of Python: the real runs behind a page of `docs`.

`python tests/compatibility.py SUBJECT ARGUMENTS...` runs pytest with these arguments and keeps what came out in the
folder `.compatibility`, a file for each version of the subject; the sessions of `nox` do so. Without arguments it
writes the page from what is there.
"""

from __future__ import annotations

import json
import re
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib import metadata
from pathlib import Path

from packaging.version import Version

ROOT = Path(__file__).parent.parent
RUNS = ROOT / ".compatibility"
PAGE = ROOT / "docs" / "compatibility.md"

PYTHON, SDK = "python", "opentelemetry-sdk"
# What a subject is nothing without.
BESIDE = {"httpx": "httpcore", "httpx2": "httpcore2", "qdrant-client": "grpcio", SDK: "opentelemetry-instrumentation"}
LIBRARIES = ("sqlalchemy", "redis", "valkey", "httpx", "httpx2", "qdrant-client")
NAMED = 10  # tests that failed
COUNTED = {"passed": "passed", "failed": "failed", "error": "failed", "skipped": "skipped", "xfailed": "skipped"}

INTRODUCTION = """\
# Compatibility

What the tests say of each version. `nox -s tests matrix sdks legacy prerelease coming` runs them, and
`python tests/compatibility.py` writes this page from what came out. A row is a run that took place on that day, on
Linux, with the versions that were found installed. Skipped are tests of what a version does not have. What is not here
was not run.
"""
PARTS = {
    "Libraries": (
        LIBRARIES,
        "The contract and the truth on real servers, `tests/targets`; of SQLAlchemy 1.4 the contract alone.",
    ),
    "OpenTelemetry": ((SDK,), "All that touches the API, the SDK or the loader, and the contract of SQLAlchemy."),
    "Python": ((PYTHON,), "Tests that the Python has a part in, on the newest libraries."),
}


@dataclass(frozen=True)
class Run:
    """Tests that ran on one version of the subject."""

    subject: str
    version: str
    python: str
    sdk: str
    beside: str
    passed: int
    failed: int
    skipped: int
    date: str
    failures: Sequence[str]

    @property
    def file(self) -> Path:
        """Where it is kept: of each version the last run counts."""
        return RUNS / f"{self.subject}-{self.version}-{self.python}.json"

    @property
    def name(self) -> str:
        """As a reader would say it."""
        return "CPython" if self.subject == PYTHON else self.subject

    def row(self) -> str:
        """Its line of the table."""
        version = f"{self.version} ({self.beside})" if self.beside else self.version
        counts = (self.passed, self.failed, self.skipped)
        return "| " + " | ".join([self.name, version, self.python, self.sdk, *map(str, counts), self.date]) + " |"


class Outcome:
    """A plugin of pytest: how many tests passed, failed and were skipped."""

    def __init__(self) -> None:
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.failures: list[str] = []

    def pytest_terminal_summary(self, terminalreporter) -> None:
        """Take what pytest says itself at the end."""
        for outcome, reports in terminalreporter.stats.items():
            if counted := COUNTED.get(outcome):
                self.counts[counted] += len(reports)
                if counted == "failed":
                    self.failures += [report.nodeid for report in reports]


def python() -> str:
    """The version of this Python; a `t` for one without the global lock."""
    return f"{sys.version.split()[0]}{'t' if sysconfig.get_config_var('Py_GIL_DISABLED') else ''}"


def run(subject: str, arguments: Sequence[str]) -> int:
    """Test, and keep the result; the exit code is pytest's."""
    import pytest

    outcome = Outcome()
    code = pytest.main([*arguments], plugins=[outcome])
    if sum(outcome.counts.values()):
        beside = BESIDE.get(subject, "")
        result = Run(
            subject=subject,
            version=python() if subject == PYTHON else metadata.version(subject),
            python=python(),
            sdk=metadata.version(SDK),
            beside=f"{beside} {metadata.version(beside)}" if beside else "",
            date=f"{date.today()}",
            failures=sorted(outcome.failures),
            **outcome.counts,
        )
        RUNS.mkdir(exist_ok=True)
        result.file.write_text(json.dumps(asdict(result)) + "\n", "utf-8")
    return int(code)


def runs() -> list[Run]:
    """All that were kept, by subject and version."""
    found = [Run(**json.loads(path.read_text("utf-8"))) for path in RUNS.glob("*.json")]
    return sorted(found, key=lambda run: (Version(run.version.rstrip("t")), run.python))


def page(found: Iterable[Run]) -> str:
    """The document."""
    by_subject: dict[str, list[Run]] = {}
    for one in found:
        by_subject.setdefault(one.subject, []).append(one)
    parts = [INTRODUCTION]
    for title, (subjects, what) in PARTS.items():
        if rows := [one for subject in subjects for one in by_subject.get(subject, ())]:
            parts.append(f"## {title}\n\n{what}\n\n{table(rows)}\n")
            parts += [failed(one) for one in rows if one.failures]
    return "\n".join(parts)


def table(rows: Iterable[Run]) -> str:
    """One line a run."""
    heads = ("library", "version", "Python", "SDK", "passed", "failed", "skipped", "date")
    return "\n".join([f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *(one.row() for one in rows)])


def failed(one: Run) -> str:
    """Which tests did not pass, by their function; of many the first."""
    functions = sorted({re.sub(r"\[.*", "", node.partition("::")[2]) for node in one.failures})
    names = ", ".join(f"`{name}`" for name in functions[:NAMED])
    more = f" and {len(functions) - NAMED} more" if len(functions) > NAMED else ""
    return f"On {one.name} {one.version} these do not pass: {names}{more}.\n"


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit(run(sys.argv[1], sys.argv[2:]))
    PAGE.write_text(page(runs()), "utf-8")
