"""Tests that the Prometheus rules use names we emit, and that each alert fires when it should and only then."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from pipelines import FOLDER, NAMES, PROMETHEUS, ROOT, loaded, our_labels, ours

import otel_pools

PROMTOOL, AMTOOL = shutil.which("promtool"), shutil.which("amtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian's package prometheus)")
needs_amtool = pytest.mark.skipif(
    AMTOOL is None, reason="amtool is not installed (Debian's package prometheus-alertmanager)"
)

RECORDS = [rule for group in loaded(PROMETHEUS / "rules.yml")["groups"] for rule in group["rules"]]
ALERTS = [rule for group in loaded(PROMETHEUS / "alerts.yml")["groups"] for rule in group["rules"]]
TESTS = loaded(PROMETHEUS / "rules_test.yml")
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text("utf-8")

# What the receivers in servers/ say: by upstream's documentation, and by the names that we give there.
SERVERS = {"postgresql_backends", "postgresql_connection_max"} | {
    metric["metric_name"].replace(".", "_") + ("_seconds" if metric["unit"] == "s" else "")
    for path in (FOLDER / "servers").glob("*.yaml")
    for receiver in loaded(path)["receivers"].values()
    for query in receiver.get("queries", ())
    for metric in query["metrics"]
}
SERVER_LABELS = {"state", "application_name", "database"}
# In all three ways to Prometheus there are these; `pool` is made by the records.
ALWAYS = {"job", "instance", "le", "pool"}

RECORD = re.compile(r"\b(?:pool|service|server):\w+(?::\w+)?")
GROUPING = re.compile(r"\b(?:by|on|without|ignoring|group_left|group_right)\s*\(([^)]*)\)")
MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"')
# A number that decides; not the `> 0` in brackets that keeps a division from dividing by nothing.
THRESHOLD = re.compile(r"(?<=[<>=] )\d+(?:\.\d+)?(?!\d|\.|\))")


def ids(rules: list[dict[str, Any]]) -> list[str]:
    return [rule.get("alert") or rule["record"] for rule in rules]


def cases() -> dict[str, list[dict[str, Any]]]:
    """The tests of each alert."""
    found: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for test in TESTS["tests"]:
        for check in test.get("alert_rule_test", ()):
            found[check["alertname"]].append(test)
    return found


def promtool(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PROMTOOL, *args], check=False, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("rule", RECORDS + ALERTS, ids=ids(RECORDS + ALERTS))
def test_names_exist(rule):
    """A rule asks for series that we or the servers' receivers emit, and for records that there are."""
    expression = re.sub(r'"[^"]*"', '""', rule["expr"])
    mentioned = set(NAMES.findall(RECORD.sub("", expression)))

    assert set() == mentioned - ours() - SERVERS - our_labels()
    assert set() == set(RECORD.findall(expression)) - {record["record"] for record in RECORDS}


@pytest.mark.parametrize("rule", RECORDS + ALERTS, ids=ids(RECORDS + ALERTS))
def test_labels_exist_however_it_is_scraped(rule):
    """A rule groups by and asks for labels that are the same by the Collector, by remote write and by the SDK."""
    grouped = {label.strip() for labels in GROUPING.findall(rule["expr"]) for label in labels.split(",")}
    matched = set(MATCHER.findall(rule["expr"]))

    assert set() == (grouped | matched) - our_labels() - ALWAYS - SERVER_LABELS


def test_every_record_is_used_or_told():
    """There is no record that neither a rule, an alert, the runbook, nor the documentation of the pipelines uses."""
    told = RUNBOOK + (ROOT / "docs" / "pipelines.md").read_text("utf-8")
    used = {name for rule in RECORDS + ALERTS for name in RECORD.findall(rule["expr"])}

    assert [rule["record"] for rule in RECORDS if rule["record"] not in used and rule["record"] not in told] == []


@pytest.mark.parametrize("alert", ALERTS, ids=ids(ALERTS))
def test_alert_is_complete(alert):
    """An alert says how bad it is, where and what, and what to read; and that is there."""
    anchor = alert["alert"].lower()

    assert alert["labels"]["severity"] in {"critical", "warning"}
    assert {"summary", "description", "runbook_url"} == set(alert["annotations"])
    assert f"docs/runbook.md#{anchor}" == alert["annotations"]["runbook_url"]
    assert "$labels." in alert["annotations"]["summary"]
    # What happened in a window of time has lasted as long as the window; anything else must last for a while.
    assert "for" in alert or ":increase15m" in alert["expr"]


@pytest.mark.parametrize("alert", ids(ALERTS))
def test_runbook_has_a_section(alert):
    """Of each alert the runbook says what it means, what to ask, why it happens and what mends it."""
    (section,) = re.findall(rf"^### {alert}\n(.*?)(?=^##|\Z)", RUNBOOK, re.MULTILINE | re.DOTALL)

    assert all(f"**{part}**" in section for part in ("Means.", "Ask.", "Causes.", "Fix."))


def test_runbook_tells_of_no_other():
    """Each section of the runbook is of an alert that there is."""
    assert set(ids(ALERTS)) == set(re.findall(r"^### (\w+)$", RUNBOOK, re.MULTILINE))


def test_runbook_names_exist():
    """Each metric, label and record in the runbook is one that there is."""
    spoken = RECORD.sub("", RUNBOOK)
    records = {rule["record"] for rule in RECORDS}

    assert set() == set(NAMES.findall(spoken)) - ours() - SERVERS - our_labels()
    assert set() == set(RECORD.findall(RUNBOOK)) - records


def test_runbook_calls_what_there_is():
    """Each function of ours that the runbook tells to call is public."""
    called = set(re.findall(r"\botel_pools\.(\w+)\(", RUNBOOK))

    assert "holders" in called
    assert called <= set(otel_pools.__all__)


@needs_promtool
def test_runbook_queries_can_be_asked(tmp_path):
    """Prometheus can read every query of the runbook: one a line, and those that are indented go on."""
    blocks = re.findall(r"^```promql\n(.*?)^```", RUNBOOK, re.MULTILINE | re.DOTALL)
    queries = [query for block in blocks for query in re.findall(r"^\S.*(?:\n[ )].*)*", block, re.MULTILINE)]
    rules = [{"record": f"query_{number}", "expr": query} for number, query in enumerate(queries)]
    (tmp_path / "queries.yml").write_text(yaml.safe_dump({"groups": [{"name": "runbook", "rules": rules}]}))
    checked = promtool("check", "rules", tmp_path / "queries.yml")

    assert len(queries) > len(ALERTS)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("alert", ids(ALERTS))
def test_alert_has_both_cases(alert):
    """Each alert is tested to fire and to be silent."""
    expected = [
        bool(check["exp_alerts"])
        for test in cases()[alert]
        for check in test["alert_rule_test"]
        if check["alertname"] == alert
    ]

    assert {True, False} == set(expected)


def test_groups_are_evaluated_in_order():
    """The tests evaluate every group of rules, those with records first."""
    order = [group["name"] for name in ("rules.yml", "alerts.yml") for group in loaded(PROMETHEUS / name)["groups"]]

    assert order == TESTS["group_eval_order"]


@needs_promtool
def test_prometheus_accepts_the_files():
    """Prometheus itself finds no mistake in its configuration and the rules."""
    checked = promtool("check", "config", PROMETHEUS / "prometheus.yml")

    assert checked.returncode == 0, checked.stdout + checked.stderr


@needs_promtool
def test_rules_do_as_their_tests_say():
    """Every alert fires in its firing cases and is silent in the others, and the records are what they should be."""
    done = promtool("test", "rules", PROMETHEUS / "rules_test.yml")

    assert done.returncode == 0, done.stdout + done.stderr


def altered(expression: str) -> list[str]:
    """The expression with each of its thresholds doubled, and halved; those that are 0 go up and down instead."""
    return [
        f"{expression[: threshold.start()]}{other:g}{expression[threshold.end() :]}"
        for threshold in THRESHOLD.finditer(expression)
        for other in (float(threshold[0]) * 2 or 1000, float(threshold[0]) / 2 or -1)
    ]


def needed(expression: str) -> list[dict[str, Any]]:
    """The records that an expression builds on, those first that others build on."""
    asked = [rule for rule in RECORDS if rule["record"] in RECORD.findall(expression)]
    below = [rule for one in asked for rule in needed(one["expr"])]
    return list({rule["record"]: rule for rule in below + asked}.values())


@needs_promtool
@pytest.mark.parametrize("alert", ALERTS, ids=ids(ALERTS))
def test_tests_notice_another_threshold(alert, tmp_path):
    """With any threshold twice or half of what it is, a test of that alert fails; as it is, none does."""
    tests = {"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": cases()[alert["alert"]]}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(tests))
    passed = []
    for expression in (alert["expr"], *altered(alert["expr"])):
        rules = [*needed(alert["expr"]), {**alert, "expr": expression}]
        (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "one", "rules": rules}]}))
        if promtool("test", "rules", tmp_path / "test.yml").returncode == 0:
            passed.append(expression)

    assert [alert["expr"]] == passed


@needs_amtool
def test_alertmanager_accepts_its_file():
    """Alertmanager itself finds no mistake in the example of its configuration."""
    command = [AMTOOL, "check-config", PROMETHEUS / "alertmanager.yml"]
    checked = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)

    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_alertmanager_names_alerts_that_there_are():
    """What is left unsaid, and why, is said in names of alerts."""
    rules = loaded(PROMETHEUS / "alertmanager.yml")["inhibit_rules"]
    matchers = [text for rule in rules for text in rule["source_matchers"] + rule["target_matchers"]]
    named = {name for text in matchers for name in re.search(r'"(.+)"', text)[1].split("|")}

    assert set() == named - set(ids(ALERTS))


def test_prometheus_scrapes_the_gateway_and_keeps_its_labels():
    """The example of Prometheus scrapes what the gateway offers, and keeps each service's own name."""
    gateway = next(job for job in loaded(PROMETHEUS / "prometheus.yml")["scrape_configs"] if job.get("honor_labels"))
    offered = loaded(FOLDER / "backends" / "prometheus.yaml")["exporters"]["prometheus"]["endpoint"]

    assert gateway["static_configs"][0]["targets"][0].rpartition(":")[2] == offered.rpartition(":")[2]
