"""Tests that the dashboards and monitors say what their tables say, in names that exist and words that parse."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from itertools import combinations
from pathlib import Path

import pytest

from otel_pools._vocabulary import METRICS, TIME_IN_QUEUE, WAIT, Kind

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "collector-config"
GRAFANA, DATADOG = FOLDER / "grafana", FOLDER / "datadog"
BOARDS = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(GRAFANA.glob("*.json"))}
DATADOG_BOARD = json.loads((DATADOG / "dashboard.json").read_text("utf-8"))
MONITORS = json.loads((DATADOG / "monitors.json").read_text("utf-8"))

# What hardly ever changes, and is told where pools are configured.
NOT_SHOWN = {"db.client.connection.idle.max", "db.client.connection.idle.min", "otel_pools.connection.idle.max"}

IDENTITY = ("db.system.name", "db.namespace", "server.address", "server.port")


def module(path: Path, monkeypatch):
    """A script of the folder, as if it were run."""
    monkeypatch.syspath_prepend(str(path.parent))
    for name in ("promql", "panels"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, loaded)
    spec.loader.exec_module(loaded)
    return loaded


def panels(board):
    """All that ask something."""
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def queries():
    """Every query of every dashboard of Grafana."""
    return [target["expr"] for board in BOARDS.values() for panel in panels(board) for target in panel["targets"]]


def selectors(node):
    """What a parsed query selects: (name of the series, labels matched)."""
    parser = pytest.importorskip("promql_parser")
    if isinstance(node, parser.VectorSelector):
        matchers = {one.name for one in node.matchers.matchers}
        return [(node.name, matchers)]
    parts = [getattr(node, part, None) for part in ("expr", "lhs", "rhs", "param", "vector_selector")]
    arguments = getattr(node, "args", None) or []
    return [found for part in (*parts, *arguments) if part is not None for found in selectors(part)]


def parsed(expr):
    """The tree of a query, its variables filled in as Grafana does."""
    parser = pytest.importorskip("promql_parser", reason="promql-parser is not installed")
    return parser.parse(expr.replace("$__rate_interval", "1m"))


# -- Grafana -----------------------------------------------------------------------------------


def test_four_boards() -> None:
    """There is one for the fleet, one for a pool, one for HTTP/2 and gRPC, and one beside the servers."""
    assert set(BOARDS) == {"overview", "pool", "streams", "servers"}


def test_grafana_is_generated(monkeypatch) -> None:
    """The files are what the script writes."""
    if sys.version_info < (3, 11):
        pytest.skip("grafana-foundation-sdk needs Python 3.11")
    pytest.importorskip("grafana_foundation_sdk", reason="grafana-foundation-sdk is not installed")
    written = module(GRAFANA / "generate.py", monkeypatch).generate()

    assert set(written) == {f"{name}.json" for name in BOARDS}
    for name, text in written.items():
        assert (GRAFANA / name).read_text("utf-8") == text


def test_queries_parse_and_names_exist(monkeypatch) -> None:
    """Every query is PromQL, of series that we or the Collector's receivers write, by labels that these have."""
    promql = module(GRAFANA / "promql.py", monkeypatch)
    ours = {
        promql.prometheus(row, part): {promql.label(key) for key in (row.pool_key, *row.keys, *IDENTITY)}
        for row in METRICS
        for part in (("bucket", "sum", "count") if row.kind is Kind.HISTOGRAM else ("",))
    }
    known = ours | {promql.prometheus(row): set() for row in promql.SERVERS.values()}
    for expr in queries():
        found = selectors(parsed(expr))
        assert found, expr
        assert all(labels <= {"job", "instance"} | known[name] for name, labels in found), expr


def test_parser_refuses_what_is_wrong() -> None:
    """The parser is no rubber stamp."""
    with pytest.raises(ValueError, match=r"unexpected|missing|unclosed|expected"):
        parsed("sum by (job (up)")


def test_every_metric_is_on_a_board(monkeypatch) -> None:
    """Whatever we emit can be seen, but for limits that never change."""
    promql = module(GRAFANA / "promql.py", monkeypatch)
    asked = {name for case in queries() for name, _ in selectors(parsed(case))}
    shown = {row.name for row in METRICS if any(name.startswith(promql.prometheus(row)) for name in asked)}

    assert {row.name for row in METRICS} - shown == NOT_SHOWN


def test_names_in_prometheus(monkeypatch) -> None:
    """The function that derives names agrees with what was measured through the Collector and by scrape."""
    promql = module(GRAFANA / "promql.py", monkeypatch)
    measured = {
        "db.client.connection.count": "db_client_connection_count",
        "db.client.connection.timeouts": "db_client_connection_timeouts_total",
        "otel_pools.use.oldest": "otel_pools_use_oldest_seconds",
        "otel_pools.connection.busy_time": "otel_pools_connection_busy_time_seconds_total",
    }

    assert {name: promql.prometheus(promql.ROWS[name]) for name in measured} == measured
    assert promql.prometheus(WAIT, "bucket") == "db_client_connection_wait_time_seconds_bucket"
    with pytest.raises(KeyError):
        promql.of("otel_pools.no.such.metric")


@pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)
def test_panels_say_what_to_do(board) -> None:
    """Each panel has a title, a sentence or more of advice, a unit and a colour for what is well."""
    for panel in panels(board):
        defaults = panel["fieldConfig"]["defaults"]
        assert panel["title"]
        assert len(panel["description"].split()) > 4, panel["title"]
        assert panel["description"].endswith((".", ".)"))
        assert defaults["unit"] in {"short", "s", "percentunit", "cps"}
        assert defaults["thresholds"]["steps"][0] == {"color": "green", "value": None}


@pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)
def test_queries_are_told_apart(board) -> None:
    """The letters of a panel's queries differ, and all ask the chosen data source."""
    for panel in panels(board):
        letters = [target["refId"] for target in panel["targets"]]
        assert letters == sorted(set(letters))
        assert all(letters)
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
    numbers = [panel["id"] for panel in board["panels"]]
    assert len(numbers) == len(set(numbers))


@pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)
def test_layout(board) -> None:
    """No panel covers another, or stands over the edge."""
    places = [panel["gridPos"] for panel in board["panels"]]

    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        assert not (
            one["x"] < other["x"] + other["w"]
            and other["x"] < one["x"] + one["w"]
            and one["y"] < other["y"] + other["h"]
            and other["y"] < one["y"] + one["h"]
        )


@pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)
def test_waits_lead_to_traces(board, monkeypatch) -> None:
    """Lines made of histograms of waits show exemplars, and no others do, as only these have any."""
    promql = module(GRAFANA / "promql.py", monkeypatch)
    waits = {promql.prometheus(row, "bucket") for row in (WAIT, TIME_IN_QUEUE)}
    for panel in panels(board):
        if panel["type"] == "timeseries":
            for target in panel["targets"]:
                assert target["exemplar"] is any(name in target["expr"] for name in waits), panel["title"]


@pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)
def test_variables(board) -> None:
    """One chooses the data source, job, instance and pool, and every variable that is asked with is one of these."""
    names = {variable["name"] for variable in board["templating"]["list"]}
    text = json.dumps(board)

    assert names >= {"datasource", "traces", "job", "instance", "pool"}
    assert set(re.findall(r"\$\{?([a-z]+)\b", text)) <= names


def test_links_lead_to_boards_of_ours() -> None:
    """A link to a dashboard leads to one that is there."""
    known = {board["uid"] for board in BOARDS.values()}
    linked = {uid for board in BOARDS.values() for uid in re.findall(r"/d/([\w-]+)", json.dumps(board))}

    assert linked
    assert linked <= known


def test_nothing_is_made_up() -> None:
    """A zero is put in for a missing series in one place only: where none means that nothing has ever failed."""
    filled = [expr for expr in queries() if "vector(" in expr]

    assert len(filled) == 1
    assert 'error_type!=""' in filled[0]


# -- Datadog -----------------------------------------------------------------------------------


def datadog_queries():
    """Every query of the dashboard and the monitors of Datadog."""
    groups = [group["definition"]["widgets"] for group in DATADOG_BOARD["widgets"]]
    charts = [widget["definition"] for widgets in groups for widget in widgets]
    asked = [
        query["query"] for chart in charts for request in chart.get("requests", ()) for query in request["queries"]
    ]
    return asked + [monitor["query"] for monitor in MONITORS]


def test_datadog_is_generated(monkeypatch) -> None:
    """The files are what the script writes."""
    for name, text in module(DATADOG / "generate.py", monkeypatch).generate():
        assert (DATADOG / name).read_text("utf-8") == text


def test_datadog_names_exist() -> None:
    """Every query is of metrics and tags of ours, and aggregates each as its kind can be."""
    rows = {row.name: row for row in METRICS}
    for text in datadog_queries():
        found = re.findall(r"(?:^|[: ])(\w+):([\w.]+)\{([^}]*)\} by \{([^}]*)\}(\.as_\w+\(\))?", text)
        assert found, text
        for aggregate, name, chosen, groups, counted in found:
            row = rows[name]
            tags = {tag.partition(":")[0] for tag in chosen.split(",") if tag not in {"*", "$service"}}
            known = {row.pool_key, *row.keys, *IDENTITY, "service", "service.instance.id"}
            assert tags | set(groups.split(",")) <= known, text
            assert (re.fullmatch(r"p\d\d", aggregate) is not None) == (row.kind is Kind.HISTOGRAM), text
            assert bool(counted) == (row.kind is Kind.COUNTER), text


def test_monitors_have_a_runbook() -> None:
    """Each monitor is named after an alert for Prometheus, compares with its own threshold, and has a runbook."""
    alerts = set(re.findall(r"alert: (\w+)", (FOLDER / "prometheus" / "alerts.yml").read_text("utf-8")))
    for monitor in MONITORS:
        name = monitor["name"].partition(":")[0]
        assert name in alerts
        assert monitor["message"].endswith(f"docs/runbook.md#{name.lower()}")
        assert float(monitor["query"].rpartition(" > ")[2]) == monitor["options"]["thresholds"]["critical"]


# -- a way in that does not work ---------------------------------------------------------------


def test_prometheus_page_of_two_libraries() -> None:
    """On one page of the SDK's Prometheus exporter each series has its own labels, whatever library it is of."""
    pytest.importorskip("opentelemetry.exporter.prometheus")
    pytest.importorskip("redis")
    from opentelemetry.exporter.prometheus import PrometheusMetricReader
    from opentelemetry.sdk.metrics import MeterProvider
    from prometheus_client import CollectorRegistry, generate_latest
    from redis import ConnectionPool
    from redis.backoff import NoBackoff
    from redis.retry import Retry
    from sqlalchemy import create_engine

    import otel_pools

    registry = CollectorRegistry()
    provider = MeterProvider([PrometheusMetricReader(registry=registry)], shutdown_on_exit=False)
    otel_pools.instrument("sqlalchemy", "redis", meter_provider=provider)
    engine = create_engine("sqlite://")
    with engine.connect():
        pass
    pool = ConnectionPool(host="127.0.0.1", port=1, client_name="cache", retry=Retry(NoBackoff(), 0))
    with pytest.raises(Exception, match="refused"):
        pool.get_connection()
    page = generate_latest(registry).decode()
    provider.shutdown()
    engine.dispose()

    assert set(re.findall(r'otel_pools_pools\{.*db_system_name="([^"]*)"', page)) == {"sqlite", "redis"}
    assert set(re.findall(r'otel_pools_pools\{.*otel_pools_pool_name="([^"]*)"', page)) >= {"cache"}
