"""The table of compatibility is of real runs, all good, of every version that we name."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import compatibility
import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "compatibility.md").read_text("utf-8")
PROJECT = (ROOT / "pyproject.toml").read_text("utf-8")
# The versions that the sessions `targets`, `matrix` and `legacy` install.
PINS = sorted(set(re.findall(r'"([a-z][\w-]*(?:\[\w+\])?==[\d.]+\*?)"', (ROOT / "noxfile.py").read_text("utf-8"))))
PYTHONS = re.findall(r"Programming Language :: Python :: (3\.\d+)", PROJECT)

RUN = compatibility.Run("httpx", "0.24.1", "3.11.7", "1.45.2", "httpcore 0.17.3", 8, 0, 1, "2026-11-21", [])


def rows(library):
    """The rows of the table of one library: version, Python, SDK, passed, failed, skipped, date."""
    return [found.split(" | ") for found in re.findall(rf"^\| {library} \| (.+) \|$", PAGE, re.MULTILINE)]


def versions(library):
    """Which versions of it there are rows of."""
    return [Version(said.split()[0].rstrip("t")) for said, *_ in rows(library)]


@pytest.mark.parametrize("pin", PINS)
def test_every_version_that_is_tried_has_its_row(pin):
    """The table has each version that `nox` pins."""
    wanted = Requirement(pin)

    assert any(wanted.specifier.contains(tried) for tried in versions(wanted.name))


@pytest.mark.parametrize("library", compatibility.LIBRARIES)
def test_the_newest_is_there_too(library):
    """A library has a row beyond its pins: the newest when the table was made."""
    pinned = [Requirement(pin).specifier for pin in PINS if Requirement(pin).name == library]
    releases = [tried for tried in versions(library) if not tried.is_prerelease]

    assert not any(specifier.contains(max(releases)) for specifier in pinned)


@pytest.mark.parametrize("python", PYTHONS)
def test_every_python_has_its_row(python):
    """So has each Python of the classifiers."""
    assert any(f"{tried}".startswith(f"{python}.") for tried in versions("CPython"))


def test_every_sdk_has_its_row():
    """From the oldest OpenTelemetry that we ask for to the newest there is no gap."""
    [oldest] = re.findall(r'"opentelemetry-api >= (\d+\.\d+)"', PROJECT)
    minors = [tried.minor for tried in versions("opentelemetry-sdk")]

    assert minors[0] == Version(oldest).minor
    assert sorted(set(minors)) == list(range(minors[0], minors[-1] + 1))


def test_what_we_say_works_did():
    """No test failed on any released version; something was tested."""
    for library in (*compatibility.LIBRARIES, "opentelemetry-sdk", "CPython"):
        for said, _, _, passed, failed, *_ in rows(library):
            assert int(passed) > 0
            assert failed == "0" or Version(said.split()[0].rstrip("t")).is_prerelease, (library, said)


# -- how it is made ------------------------------------------------------------------------


def test_a_run_is_a_row():
    """The page has each run with its counts, older versions first, and the names of what failed."""
    bad = replace(
        RUN, version="1.0.dev6", failed=2, failures=["tests/test_a.py::test_x[1]", "tests/test_a.py::test_x[2]"]
    )
    said = compatibility.page([RUN, bad])

    assert "| httpx | 0.24.1 (httpcore 0.17.3) | 3.11.7 | 1.45.2 | 8 | 0 | 1 | 2026-11-21 |\n| httpx | 1.0.dev6" in said
    assert "On httpx 1.0.dev6 these do not pass: `test_x`.\n" in said


def test_what_pytest_says_is_kept(tmp_path):
    """Outcomes are counted as pytest counts them, under the versions that are installed; the exit code is its own."""
    program = tmp_path / "tests" / "compatibility.py"
    for folder in ("tests", "docs"):
        (tmp_path / folder).mkdir()
    program.write_text(Path(compatibility.__file__).read_text("utf-8"), "utf-8")
    (tmp_path / "test_it.py").write_text(OUTCOMES)

    codes = [
        subprocess.run([sys.executable, program, *arguments], cwd=tmp_path, capture_output=True, check=False).returncode
        for arguments in (("python", "-p", "no:cacheprovider"), ())
    ]

    assert codes == [1, 0]
    page = (tmp_path / "docs" / "compatibility.md").read_text("utf-8")
    python, sdk = compatibility.python(), version("opentelemetry-sdk")
    assert f"| CPython | {python} | {python} | {sdk} | 1 | 2 | 2 |" in page
    assert f"On CPython {python} these do not pass: `test_bad`, `test_error`.\n" in page


OUTCOMES = """
import pytest

@pytest.fixture
def broken():
    raise KeyError

def test_good(): pass
def test_bad(): assert 0
def test_error(broken): pass
def test_skip(): pytest.skip("no")
@pytest.mark.xfail
def test_known(): assert 0
"""
