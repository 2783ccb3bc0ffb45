"""What the tests of rules, Collector files and pipelines share: where things are, and what our names become."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from otel_pools._vocabulary import METRICS, PORT, SYSTEM, Kind, Metric

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "collector-config"
PROMETHEUS = FOLDER / "prometheus"

# What is ours or a server's, in Prometheus; `otel_pools` alone is the package, and no metric.
NAMES = re.compile(r"\b(?:(?:db|http)_client|otel_pools|postgresql|pgbouncer|redis)_[a-z_]*[a-z]\b")


def in_prometheus(metric: Metric) -> set[str]:
    """The series of one metric, named as the Collector's Prometheus exporter does (measured with v0.155)."""
    base = metric.name.replace(".", "_") + ("_seconds" if metric.unit == "s" else "")
    if metric.kind is Kind.HISTOGRAM:
        return {f"{base}_{part}" for part in ("bucket", "sum", "count")}
    return {base + ("_total" if metric.kind is Kind.COUNTER else "")}


def ours() -> set[str]:
    """Every series that we emit, as Prometheus calls it."""
    return {name for metric in METRICS for name in in_prometheus(metric)}


def our_labels() -> set[str]:
    """Every attribute that we emit, as Prometheus calls it."""
    keys = {key for metric in METRICS for key in (metric.pool_key, *metric.keys)}
    identity = {SYSTEM, "db.namespace", "server.address", PORT}
    return {key.replace(".", "_") for key in keys | identity}


def loaded(path: Path) -> dict[str, Any]:
    """One YAML file."""
    content: dict[str, Any] = yaml.safe_load(path.read_text("utf-8"))
    return content
