"""
Write the Grafana dashboards, one JSON file each, beside this script.

    pip install 'grafana-foundation-sdk==1769699379!11.6.0' otel-pools
    python collector-config/grafana/generate.py

What they say is in `panels.py`, what they ask in `promql.py`; this is how it looks. Needs Python 3.11, as the SDK does.
"""

# ruff: noqa: INP001  # a script

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as look
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from panels import BOARDS, SECONDS, SHARE, Board, Chart
from promql import CHOICES, INSTANCE, POOL, SERVERS
from promql import prometheus as named

FOLDER = Path(__file__).parent
TAG = "otel-pools"
DATA, TRACES = "datasource", "traces"
SOURCE = model.DataSourceRef(type_val="prometheus", uid=f"${{{DATA}}}")
COLOURS = ("green", "yellow", "red")
HEIGHTS = {"stat": 4, "timeseries": 8, "table": 10}
LETTERS = "ABCDEFGH"


def uid(name: str) -> str:
    """Of a dashboard: fixed, so that links and a second import find it."""
    return f"{TAG}-{name}"


def generate() -> dict[str, str]:
    """The dashboards as JSON, by the names of their files."""
    encoder = JSONEncoder(sort_keys=True, indent=2, ensure_ascii=False)
    return {f"{board.name}.json": encoder.encode(plain(build(board).build())) + "\n" for board in BOARDS}


def plain(built: model.Dashboard) -> model.Dashboard:
    """Without what the SDK says unasked of variables that are no intervals, and of tables: newer Grafanas lack it."""
    for variable in built.templating.list_val or ():
        variable.auto = variable.auto_count = variable.auto_min = None
    for shown in built.panels or ():
        if shown.type_val == "table":
            shown.options.footer = None
    return built


def build(board: Board) -> dashboard.Dashboard:
    """One dashboard."""
    built = (
        dashboard.Dashboard(board.title)
        .uid(uid(board.name))
        .description(board.description)
        .tags([TAG])
        .editable()
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .time("now-1h", "now")
        .refresh("30s")
        .link(siblings())
    )
    for variable in variables(board):
        built = built.with_variable(variable)
    letters = iter(range(1, 1000))
    for heading, charts in board.rows:
        built = built.with_row(dashboard.Row(heading).id(next(letters)))
        for chart in charts:
            built = built.with_panel(panel(chart, board).id(next(letters)))
    return built


def siblings() -> dashboard.DashboardLink:
    """A menu of all our dashboards that keeps what is chosen."""
    link = dashboard.DashboardLink("Connection pools").type(model.DashboardLinkType.DASHBOARDS)
    return link.tags([TAG]).as_dropdown(True).include_vars(True).keep_time(True)


# -- variables ---------------------------------------------------------------------------


def variables(board: Board) -> list[Any]:
    """Where the data are, and what of them to show."""
    sources = [
        dashboard.DatasourceVariable(DATA).label("Metrics").type("prometheus"),
        dashboard.DatasourceVariable(TRACES).label("Traces").type("tempo"),
    ]
    chosen = [choice(name, query, one=board.one_pool and name == POOL) for name, query in CHOICES.items()]
    if board.servers:
        names = "|".join(named(SERVERS[name]) for name in ("postgresql.backends", "redis.clients.connected"))
        chosen.append(choice("server", f'label_values({{__name__=~"{names}"}}, {INSTANCE})'))
    return [*sources, *chosen]


def choice(name: str, query: str, *, one: bool = False) -> dashboard.QueryVariable:
    """A list to choose from, of which all are chosen at first; or just one."""
    variable = (
        dashboard.QueryVariable(name)
        .label(name.capitalize())
        .datasource(SOURCE)
        .query({"query": query, "refId": name})
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
        .multi(not one)
        .include_all(not one)
    )
    # Of series without an instance, too, all are meant by "all".
    return variable if one else variable.all_value(".*").current(model.VariableOption(text="All", value="$__all"))


# -- panels --------------------------------------------------------------------------------


def panel(chart: Chart, board: Board) -> Any:
    """One panel, of its kind."""
    built: Any = {"stat": _stat, "table": _table, "timeseries": _timeseries}[chart.kind](chart)
    for letter, query in zip(LETTERS, chart.queries, strict=False):
        built = built.with_target(_target(chart, letter, query))
    built = built.title(chart.title).description(chart.advice).datasource(SOURCE).unit(chart.unit)
    built = built.thresholds(steps(chart)).height(HEIGHTS[chart.kind]).span(chart.width)
    return built.data_links(links(board)) if chart.kind == "timeseries" else built


def _target(chart: Chart, letter: str, query: Any) -> prometheus.Dataquery:
    # The SDK's own letter is empty, and Grafana tells queries apart by it.
    asked = prometheus.Dataquery().expr(query.expr).ref_id(letter).datasource(SOURCE).exemplar(query.exemplar)
    if chart.kind == "table":
        return asked.instant().format(PromQueryFormat.TABLE)
    return asked.range().legend_format(query.legend)


def _stat(chart: Chart) -> stat.Panel:
    last = common.ReduceDataOptions().calcs(["lastNotNull"])
    built = stat.Panel().reduce_options(last).graph_mode(look.BigValueGraphMode.AREA)
    return built.color_mode(look.BigValueColorMode.VALUE)


def _timeseries(chart: Chart) -> timeseries.Panel:
    legend = common.VizLegendOptions().show_legend(True).display_mode(look.LegendDisplayMode.LIST)
    tooltip = common.VizTooltipOptions().mode(look.TooltipDisplayMode.MULTI).sort(look.SortOrder.DESCENDING)
    built = timeseries.Panel().legend(legend.placement(look.LegendPlacement.BOTTOM)).tooltip(tooltip)
    built = built.fill_opacity(30 if chart.stacked else 8).show_points(look.VisibilityMode.NEVER)
    if chart.unit in {SECONDS, SHARE}:
        built = built.min(0)
    if chart.stacked:
        built = built.stacking(common.StackingConfig().mode(look.StackingMode.NORMAL))
    lines = look.GraphThresholdsStyleMode.DASHED if any(chart.steps) else look.GraphThresholdsStyleMode.OFF
    return built.thresholds_style(common.GraphThresholdsStyleConfig().mode(lines))


def _table(chart: Chart) -> table.Panel:
    renamed = {f"Value #{letter}": query.legend for letter, query in zip(LETTERS, chart.queries, strict=False)}
    organize = {"excludeByName": {"Time": True}, "renameByName": renamed}
    built = table.Panel().filterable(True).show_header(True)
    for name, options in (("merge", {}), ("organize", organize)):
        built = built.with_transformation(model.DataTransformerConfig(id_val=name, options=options))
    link = {"title": "This pool", "url": _pool_url("${__value.raw}", "${__data.fields.job}")}
    for legend in ("wait p95", "oldest use"):
        built = built.override_by_name(legend, [model.DynamicConfigValue(id_val="unit", value=SECONDS)])
    return built.override_by_name(POOL, [model.DynamicConfigValue(id_val="links", value=[link])])


def steps(chart: Chart) -> dashboard.ThresholdsConfig:
    """From which value on a number is yellow, and from which it is red."""
    values = zip((None, *chart.steps), COLOURS, strict=True)
    colours = [model.Threshold(value, colour) for value, colour in values if value is not None or colour == "green"]
    return dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(colours)


# -- where to go from here ---------------------------------------------------------------------


def links(board: Board) -> list[dashboard.DashboardLink]:
    """Of a line: to its pool, and to the traces of those who waited for it."""
    pool = "${pool}" if board.one_pool else f"${{__field.labels.{POOL}}}"
    to_pool = dashboard.DashboardLink("This pool").url(_pool_url(pool, "${__field.labels.job}"))
    to_traces = dashboard.DashboardLink("Traces of its waits").url(_traces_url(pool)).target_blank(True)
    if board.servers:
        return []
    return [to_traces] if board.one_pool else [to_pool, to_traces]


def _pool_url(pool: str, job: str) -> str:
    chosen = f"var-{DATA}=${{{DATA}}}&var-{TRACES}=${{{TRACES}}}&var-job={job}&var-{POOL}={pool}"
    return f"/d/{uid('pool')}?{chosen}&${{__url_time_range}}"


def _traces_url(pool: str) -> str:
    query = {"refId": "A", "queryType": "traceql", "query": f'{{ name = "acquire {pool}" }}'}
    pane = {"datasource": f"${{{TRACES}}}", "queries": [query], "range": {"from": "${__from}", "to": "${__to}"}}
    # What Grafana is to replace must not be escaped.
    return f"/explore?schemaVersion=1&panes={quote(json.dumps({'a': pane}), safe='${}:_.')}"


def main() -> None:
    """Write the files."""
    for name, text in generate().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
