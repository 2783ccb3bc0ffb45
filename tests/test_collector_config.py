"""Tests that the Collector configuration is valid, safe by default, and documented with names that exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from otel_pools._vocabulary import METRICS, Kind, Metric

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "collector-config"
CONFIG = FOLDER / "collector.yaml"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
VALIDATOR = ROOT.parent / "shared" / "otelcol-schema" / "validate.py"

# `otel_pools` alone is the package, and no metric.
NAMES = re.compile(r"\b(?:db[._]client|otel_pools)[._][a-z_.]*[a-z]")


def config() -> dict[str, Any]:
    """The configuration as the Collector sees it when no variable of the environment is set."""
    text = re.sub(r"\$\{env:\w+(?::-([^}]*))?\}", lambda variable: variable[1] or "", CONFIG.read_text("utf-8"))
    return yaml.safe_load(text)


def blocks(language: str) -> list[str]:
    """The fenced blocks of the README in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def in_prometheus(metric: Metric) -> set[str]:
    """The series of one metric, named as the Collector's Prometheus exporter does (measured with v0.155)."""
    base = metric.name.replace(".", "_") + ("_seconds" if metric.unit == "s" else "")
    if metric.kind is Kind.HISTOGRAM:
        return {f"{base}_{part}" for part in ("bucket", "sum", "count")}
    return {base + ("_total" if metric.kind is Kind.COUNTER else "")}


def known_names() -> set[str]:
    """Every metric and attribute we emit, by its own name and by the one in Prometheus."""
    keys = {key for metric in METRICS for key in (metric.pool_key, *metric.keys)}
    series = {name for metric in METRICS for name in in_prometheus(metric)}
    return {metric.name for metric in METRICS} | series | keys | {key.replace(".", "_") for key in keys}


def test_schemas_accept_it() -> None:
    """Every component is configured as its upstream schema says."""
    pytest.importorskip("jsonschema")
    if not VALIDATOR.exists():
        pytest.skip("the Collector's schemas (../shared/otelcol-schema) are not beside this repository")

    command = [sys.executable, VALIDATOR, CONFIG]
    run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)

    assert run.returncode == 0, run.stdout + run.stderr
    assert "unchecked" not in run.stdout


@pytest.mark.parametrize("role", ["receivers", "processors", "exporters"])
def test_pipelines_and_components_fit(role: str) -> None:
    """A pipeline names only what is configured, and whatever is configured is in a pipeline."""
    named = {name for pipeline in config()["service"]["pipelines"].values() for name in pipeline[role]}

    assert set(config()[role]) == named


def test_signals() -> None:
    """Metrics and traces have a pipeline each, limited in memory first and batched last."""
    pipelines = config()["service"]["pipelines"]

    assert {"metrics", "traces"} == set(pipelines)
    assert all(pipeline["processors"] == ["memory_limiter", "batch"] for pipeline in pipelines.values())


def test_listens_on_loopback_by_default() -> None:
    """Nobody outside the machine can reach what was not opened on purpose."""
    protocols = config()["receivers"]["otlp"]["protocols"]

    assert protocols["grpc"]["endpoint"] == "127.0.0.1:4317"
    assert protocols["http"]["endpoint"] == "127.0.0.1:4318"
    assert config()["exporters"]["prometheus"]["endpoint"] == "127.0.0.1:8889"


def test_backend_is_asked_for_and_encrypted_by_default() -> None:
    """Nothing leaves the machine unless a backend is named, and then not in the clear unless that is said too."""
    exporter = config()["exporters"]["otlp"]

    assert None is exporter["endpoint"]
    assert False is exporter["tls"]["insecure"]


def test_scrape_example_keeps_labels_and_finds_the_exporter() -> None:
    """Prometheus, set up as the README says, scrapes the exporter and keeps each service's own name."""
    (job,) = yaml.safe_load(blocks("yaml")[0])["scrape_configs"]

    assert True is job["honor_labels"]
    assert [config()["exporters"]["prometheus"]["endpoint"]] == job["static_configs"][0]["targets"]


def test_readme_names_every_variable() -> None:
    """Whoever reads only the README learns of every variable in the configuration."""
    variables = set(re.findall(r"\$\{env:(\w+)", CONFIG.read_text("utf-8")))

    assert set() == {name for name in variables if name not in README}


def test_readme_names_exist() -> None:
    """Each metric, series and label in the README is one that we emit."""
    mentioned = set(NAMES.findall(README))

    assert len(mentioned) > 10
    assert set() == mentioned - known_names()


def test_readme_table_pairs_metrics_with_their_series() -> None:
    """Each row of the table names exactly the series that its metric becomes in Prometheus."""
    metrics = {metric.name: metric for metric in METRICS}
    rows = re.findall(r"^\| `(\S+)` \| (.+) \|$", README, re.MULTILINE)

    assert rows
    assert {name: in_prometheus(metrics[name]) for name, _ in rows} == {
        name: set(re.findall(r"`(\S+)`", series)) for name, series in rows
    }
