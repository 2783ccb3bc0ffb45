"""Each incident is named by its own signal and by no other, and a healthy service by none."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

import otel_pools
from otel_pools._vocabulary import METRICS

for needed in ("asyncpg", "grpc", "h2", "httpx", "hypercorn", "psycopg", "qdrant_client", "redis"):
    pytest.importorskip(needed)
if not hasattr(os, "fork"):
    pytest.skip("the servers need a POSIX system", allow_module_level=True)

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "incidents"
PAGE = ROOT / "docs" / "incidents.md"
HEALTHY = "healthy"
STAGE = {"lab", "matrix", "servers", "signals"}
NAMES = [path.stem for path in sorted(SCRIPTS.glob("*.py")) if path.stem not in {*STAGE, HEALTHY}]

every_incident = pytest.mark.parametrize("name", NAMES)


# -- the matrix ----------------------------------------------------------------------------


@every_incident
def test_incident_is_named(stage, matrix, name):
    """The incident's own signal fires, on one pool, and no other does on any pool."""
    row = matrix.row(name, stage(name)[0])

    assert row.expected is not None
    assert [signal for _, signal in row.fired] == [row.expected]


def test_health_is_silent(stage, signals):
    """No signal fires on a service with plenty to do on six pools."""
    (seen,) = stage(HEALTHY)
    checkouts = {pool: signals.Pool(signals.only(seen, pool)).gained("otel_pools.checkouts") for pool in HEALTHY_POOLS}

    assert {pool for pool, number in checkouts.items() if number > 20} == HEALTHY_POOLS
    assert signals.fired(seen) == set()


HEALTHY_POOLS = {"orders", "stock", "carts", "articles", "prices", "vectors"}


def test_every_script_is_in_the_matrix(signals, matrix):
    """Each script has its row, and each signal is called after an incident."""
    assert sorted(matrix.NAMES) == sorted([*NAMES, HEALTHY])
    assert set(signals.SIGNALS) <= set(NAMES)
    assert {name for name in matrix.NAMES if matrix.named_by(name) not in {name, "server_limit"}} == {HEALTHY}


def test_signals_see_what_was_exported(stage, lab):
    """A signal is given no more than an alert could see, and looks nowhere else."""
    seen = stage("consumers_take_all")[0]
    imported = {
        alias.name
        for node in ast.walk(ast.parse((SCRIPTS / "signals.py").read_text("utf-8")))
        for alias in getattr(node, "names", ())
        if getattr(node, "module", None) in {None, "lab"}
    }

    assert seen.holders
    assert lab.only(seen, "jobs").holders == ()
    assert imported == {"LEAK_THRESHOLD", "Evidence", "Point", "only", "pools"}


@pytest.mark.timeout(300)  # if it is run by itself it plays them all
def test_matrix(stage, matrix, tmp_path_factory):
    """In the table of all incidents and all signals all are named and nothing is false; it is printed and kept."""
    rows = [matrix.row(name, stage(name)[0]) for name in matrix.NAMES if name not in OPTIONAL]
    text = "\n".join([matrix.HEAD, *map(str, rows), matrix.verdict(rows)])
    path = tmp_path_factory.getbasetemp() / "incidents.txt"
    path.write_text(text, "utf-8")
    sys.stdout.write(f"\n{text}\n{path}\n")

    assert [row.name for row in rows if not row.is_right] == []
    assert matrix.verdict(rows) == "18 of 18 named by their own signal, 0 false signals"


OPTIONAL = {"pgbouncer_limit"}  # whose program may not be there; it has a test of its own


def test_a_wrong_row_is_seen(matrix):
    """A signal that fires where it should not, and one that is silent where it should fire, show in row and verdict."""
    wrong = matrix.Row("leak", "leak", frozenset({("orders", "dropped")}))
    sick = matrix.Row(HEALTHY, None, frozenset({("orders", "leak"), ("stock", "leak")}))

    assert re.search(r"leak +\.   -   !", str(wrong))
    assert re.search(r"healthy +\.   !   \.", str(sick))
    assert [row for row in (wrong, sick) if row.is_right] == []
    assert matrix.verdict([wrong, sick]) == "0 of 1 named by their own signal, 3 false signals"


def test_stage_says_what_it_is(lab, servers, matrix, monkeypatch):
    """What has a state says it in a word: the lab and its servers, and PgBouncer, which need not be there for that."""
    monkeypatch.setattr("shutil.which", lambda *_, **__: "pgbouncer")
    bouncer = importlib.import_module("servers").PgBouncer("postgresql://me@127.0.0.1/shop", 3)

    assert repr(lab.Lab(servers)) == "<Lab [0 looks]>"
    assert repr(matrix.Servers({"web": "http://127.0.0.1:1"})) == "<Servers [web]>"
    assert repr(bouncer) == "<PgBouncer on 127.0.0.1:0 for 3 clients>"


# -- what on-call is told besides -----------------------------------------------------------------


def lines(seen, *words):
    """The lines of the log, each with those below it that belong to it, that have all these words."""
    return [line for line in seen.logs if all(word in line for word in words)]


def test_slow_holders_are_named(stage):
    """The log of the exhaustion has the line that holds, and so has the span of a wait that failed."""
    seen = stage("slow_holders")[0]
    failed = [wait for wait in seen.waits if wait.error == "timeout"]

    assert lines(seen, "pool orders is exhausted: 3 of 3", "slow_holders.py", "report")
    assert failed
    assert all(len(wait.holders) == 3 for wait in failed)
    # Before Python 3.11 a function's code does not know where it was defined.
    names = {holder["code.function.name"].rpartition(".")[2] for wait in failed for holder in wait.holders}
    assert names == {"report"}


def test_slow_holders_are_linked(stage):
    """The span of a wait that failed links to the spans of those who held the connections."""
    seen = stage("slow_holders")[0]
    holding = {int(holder.span_id, 16) for holder in seen.holders}

    assert len(holding) == 3
    assert all(set(wait.links) == holding for wait in seen.waits if wait.error == "timeout")


def test_leak_is_named(stage):
    """The log has the line that borrowed, and says it when the connection comes back after all."""
    during, afterwards = stage("leak")

    assert len(lines(during, "has been out for", "leak.py", "export")) == 1
    assert len(lines(afterwards, "came back after all", "leak.py", "export")) == 1


def test_dropped_is_named(stage):
    """The log has the line that borrowed and forgot."""
    assert lines(stage("dropped")[0], "was dropped", "dropped.py", "count")


def test_nested_checkout_is_named(stage):
    """One line of the log has both places: where the first was borrowed, and where a second was asked for."""
    (line,) = lines(stage("nested_checkout")[0], "asked for another")

    assert re.search(r"\(borrowed by .*nested_checkout.py:\d+ .*request\).* at .*nested_checkout.py:\d+ audit", line)


def test_nobody_else_nests(stage):
    """Of all other incidents with a full pool none is said to ask for a second connection."""
    for name in ("slow_holders", "pool_too_small", "refused_at_once", "consumers_take_all"):
        assert not lines(stage(name)[0], "asked for another")


def test_unclosed_response_is_named(stage):
    """The log has the line that sent the request."""
    assert len(lines(stage("unclosed_response")[0], "has been out for", "unclosed_response.py", "first_bytes")) == 1


def test_fork_sharing_says_what_to_do(stage):
    """The log of the child has the cure."""
    assert len(lines(stage("fork_sharing")[0], "pool workers", "dispose(close=False)")) == 1


def test_consumers_are_named(stage):
    """The log of the exhaustion, and the span, say that those who hold are blocking commands."""
    seen = stage("consumers_take_all")[0]
    kinds = {holder["otel_pools.holder.kind"] for wait in seen.waits if wait.error for holder in wait.holders}

    assert lines(seen, "pool jobs is exhausted", "consumers_take_all.py", "blpop()", "blocking")
    assert kinds == {"blocking"}


def test_on_purpose_is_no_leak(stage):
    """Nobody is warned of a subscription or of a blocking command, and both are told as such."""
    seen = stage("held_on_purpose")[0]

    assert {holder.kind for holder in seen.holders} == {"pub/sub", "blocking"}
    assert seen.logs == ()


def test_a_running_statement_is_work(lab, servers):
    """Who is in the middle of a slow query is not told to hold a connection and do nothing."""
    with lab.Lab(servers):
        engine = create_engine(servers.postgres, pool_logging_name="reports")

        def report(_):
            with engine.connect() as connection:
                connection.execute(text("SELECT 1"))
                connection.execute(text("SELECT pg_sleep(1.5)"))

        with lab.crowd(1, report):
            lab.until(lambda: any(holder.held_s > 0.8 for holder in otel_pools.holders("reports")))
            (holder,) = otel_pools.holders("reports")
        engine.dispose()

    assert holder.busy_s > holder.held_s / 10


@pytest.mark.parametrize("name", ["http2_streams", "leak", "server_restart", "unclosed_response"])
def test_it_ends(stage, signals, name):
    """When the incident is over, its signal is silent in the next export."""
    _, afterwards = stage(name)

    assert name not in {signal for _, signal in signals.fired(afterwards)}


def test_restart_is_over(stage, signals):
    """After a restart nothing is left of it."""
    assert signals.fired(stage("server_restart")[1]) == set()


# -- the scripts ------------------------------------------------------------------------------------


def run(postgres, *command):
    """Run one of the scripts as a reader would, but that a PostgreSQL is there already."""
    return subprocess.run(
        [sys.executable, "-W", "error", *command],
        cwd=ROOT,
        env={**os.environ, "INCIDENTS_POSTGRES_URL": postgres.url("psycopg")},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_runs_by_itself(postgres):
    """A script that is run by itself tells its story and prints the signal that fires, and the log."""
    done = run(postgres, "examples/incidents/dropped.py")

    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^dropped on pool counts: ", done.stdout, re.MULTILINE)
    assert re.search(r"^otel_pools: .* was dropped .* count\)$", done.stdout, re.MULTILINE)


def test_lab_prints_the_matrix(postgres, matrix):
    """The command of the README plays those that it is asked for, on servers of its own, and prints a row of each."""
    done = run(postgres, "examples/incidents/lab.py", "http2_streams", "dropped")

    assert (done.returncode, done.stderr) == (0, "")
    assert matrix.HEAD in done.stdout
    assert re.search(r"^12 http2_streams +(\.   ){11}X(   \.)+$", done.stdout, re.MULTILINE)
    assert re.search(r"^ 3 dropped +\.   \.   X(   \.)+$", done.stdout, re.MULTILINE)
    assert "2 of 2 named by their own signal, 0 false signals" in done.stdout


def test_lab_plays_all_unless_asked(monkeypatch, matrix, capsys):
    """Without a name the command plays every incident and health; if one is not as it should be, it fails."""
    wrong = {"leak": matrix.Row("leak", "leak")}
    monkeypatch.setattr("sys.argv", ["lab.py"])
    monkeypatch.setattr(matrix, "play", lambda name, _: wrong.get(name) or matrix.Row(name, None))

    with pytest.raises(SystemExit, match="True"):
        matrix.main()

    rows = re.findall(r"^(?:..) (\w+) +[.X-]", capsys.readouterr().out, re.MULTILINE)
    assert rows == [*matrix.NAMES]


def test_lab_knows_its_incidents(monkeypatch, matrix, capsys):
    """An incident that is not there is an error."""
    monkeypatch.setattr("sys.argv", ["lab.py", "no_such"])

    with pytest.raises(SystemExit, match="2"):
        matrix.main()
    assert "there is no incident no_such" in capsys.readouterr().err


def test_what_is_not_installed_is_said(monkeypatch, servers, matrix):
    """Without PgBouncer its incident is not played, and the row says so; it counts for nothing."""
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    row = matrix.play("pgbouncer_limit", servers)

    assert str(row).endswith("not played: pgbouncer is not installed")
    assert matrix.verdict([row]) == "0 of 0 named by their own signal, 0 false signals"


@every_incident
def test_script_tells_its_story(name):
    """A script's docstring says what on-call sees, which signal names it, and what to do."""
    story = ast.get_docstring(ast.parse((SCRIPTS / f"{name}.py").read_text("utf-8")))

    assert re.search(r"\nOn call: .*\nThe signal `\w+`: .*\nWhat to do: ", story, re.DOTALL)


@every_incident
def test_readme_lists_it(name):
    """Each incident has its row in the README."""
    assert f"| [{name}]({name}.py) |" in (SCRIPTS / "README.md").read_text("utf-8")


# -- the page ---------------------------------------------------------------------------------------


@every_incident
def test_page_tells_it(name):
    """Each incident has its paragraph on the page of the documentation."""
    assert re.search(rf"^### `{name}`", PAGE.read_text("utf-8"), re.MULTILINE)


def test_page_has_the_matrix(matrix):
    """The matrix on the page is one in which all are named and nothing is false, with the rows there are today."""
    page = PAGE.read_text("utf-8")
    signals = {name: matrix.named_by(name) for name in matrix.NAMES}
    right = [matrix.Row(name, it, frozenset({("", it)} if it else ())) for name, it in signals.items()]

    assert "\n".join([matrix.HEAD, *map(str, right)]) in page


def test_page_names_what_there_is():
    """Each metric on the page, by its own name or by that in Prometheus, is one that is emitted."""
    page = PAGE.read_text("utf-8")
    written = set(re.findall(r"`((?:db\.client|http\.client|otel_pools)\.[a-z_.]+[a-z])", page))
    series = set(re.findall(r"\b((?:db_client|http_client|otel_pools)_[a-z_]+)\b", "".join(promql(page))))
    metrics = {metric.name.replace(".", "_") for metric in METRICS}
    keys = {key.replace(".", "_") for metric in METRICS for key in (metric.pool_key, *metric.keys)}
    suffix = re.compile("(_seconds)?(_total|_bucket|_sum|_count|)$")

    assert len(written) > 10
    assert written <= {metric.name for metric in METRICS} | {"otel_pools.holders", "otel_pools.holder", HOLDER_KIND}
    assert len(series) > 10
    assert {name for name in series if not {name, suffix.sub("", name)} & metrics} <= keys


HOLDER_KIND = "otel_pools.holder.kind"


def promql(page):
    """The queries on the page."""
    return re.findall(r"^```promql\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
