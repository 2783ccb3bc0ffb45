"""The ways in: auto-loading, code, declarative configuration; and what happens when something is missing."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest
from sqlalchemy.pool import Pool

import otel_pools
from otel_pools import _doors, _guard
from otel_pools._doors import SQLAlchemyPoolInstrumentor

PROGRAM = """
import sys
from sqlalchemy import create_engine
from sqlalchemy.pool import QueuePool
engine = create_engine("sqlite://", poolclass=QueuePool, pool_size=3, max_overflow=4, pool_logging_name="auto")
with engine.connect() as connection:
    connection.exec_driver_sql("SELECT 1")
"""


def run(*command, **variables):
    """Run a Python program in a process of its own, with these variables and no other of OpenTelemetry's."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("OTEL_")}
    env |= {"OTEL_PYTHON_DISABLED_INSTRUMENTATIONS": "sqlalchemy,httpx,httpx2", **variables}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, check=False)


def auto(program, **variables):
    """Run a program under `opentelemetry-instrument`."""
    command = str(Path(sys.executable).with_name("opentelemetry-instrument"))
    exporters = {"OTEL_METRICS_EXPORTER": "console", "OTEL_TRACES_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none"}
    return run(command, sys.executable, "-c", textwrap.dedent(program), **exporters | variables)


def plain(program):
    """Run a program as it is."""
    return run(sys.executable, "-c", textwrap.dedent(program))


def test_auto_loading_needs_nothing_of_the_app():
    """Under `opentelemetry-instrument` an unchanged program exports its pool, the last samples included."""
    done = auto(PROGRAM)

    assert done.stderr == ""
    for expected in ('"db.client.connection.max"', '"auto"', '"value": 7', '"db.client.connection.wait_time"'):
        assert expected in done.stdout


def test_auto_loading_can_be_switched_off():
    """The entry point's name in OTEL_PYTHON_DISABLED_INSTRUMENTATIONS, or our own `targets`, keep us out."""
    by_name = auto(PROGRAM, OTEL_PYTHON_DISABLED_INSTRUMENTATIONS="sqlalchemy, otel_pools_sqlalchemy")
    by_setting = auto(PROGRAM, OTEL_POOLS_TARGETS="redis")

    assert "db.client.connection" not in by_name.stdout + by_setting.stdout
    assert by_name.stderr == by_setting.stderr == ""


def test_auto_loading_reads_the_environment():
    """Settings come from the environment; a wrong one is one line and the app runs."""
    done = auto(PROGRAM, OTEL_POOLS_METRICS_EXCLUDE="otel_pools.pools", OTEL_POOLS_SPAN_THRESHOLD="soon")

    assert done.returncode == 0
    assert '"otel_pools.pools"' not in done.stdout
    assert '"otel_pools.checkouts"' in done.stdout
    assert done.stderr.count("OTEL_POOLS_SPAN_THRESHOLD") == 1


def test_the_library_is_not_imported_for_us():
    """Auto-loading and `instrument()` import no target library; the app's own import is what wakes us."""
    program = "import sys; print(sorted({'sqlalchemy', 'redis', 'httpx'} & set(sys.modules)))"

    assert auto(program, OTEL_METRICS_EXPORTER="none").stdout == "[]\n"
    assert plain("import otel_pools; otel_pools.instrument(); " + program).stdout == "[]\n"


@pytest.mark.skipif(find_spec("opentelemetry.configuration") is None, reason="needs opentelemetry-configuration")
def test_declarative_configuration(tmp_path):
    """A configuration file sets our options by the entry point's name, and the auto-loader's second pass is silent."""
    file = tmp_path / "otel.yaml"
    file.write_text(
        textwrap.dedent("""
        file_format: "1.0"
        meter_provider:
          readers:
            - periodic: {exporter: {console: {}}}
        instrumentation/development:
          python:
            otel_pools_sqlalchemy: {metrics_exclude: [otel_pools.pools]}
        """)
    )
    done = auto(PROGRAM, OTEL_CONFIG_FILE=str(file))

    assert '"otel_pools.checkouts"' in done.stdout, done.stderr
    assert '"otel_pools.pools"' not in done.stdout
    assert "already instrumented" not in done.stderr


def test_from_sqlalchemy_import_before_us():
    """`from sqlalchemy import create_engine` before `instrument()` makes watched engines all the same."""
    program = """
        from sqlalchemy import create_engine
        from sqlalchemy.pool import QueuePool
        from otel_pools.testing import Telemetry
        import otel_pools
        before = create_engine("sqlite://", poolclass=QueuePool, pool_logging_name="before")
        telemetry = Telemetry()
        otel_pools.instrument(meter_provider=telemetry.meter_provider)
        after = create_engine("sqlite://", poolclass=QueuePool, pool_logging_name="after")
        print(sorted(p.attributes["otel_pools.pool.name"] for p in telemetry.points("otel_pools.pools")))
    """

    assert plain(program).stdout == "['after', 'before']\n"


def test_an_async_engine_counts_once():
    """An asyncio engine whose module is first imported after `instrument()` is one pool and one connection."""
    program = """
        import asyncio, otel_pools
        from otel_pools.testing import Telemetry
        telemetry = Telemetry()
        otel_pools.instrument(meter_provider=telemetry.meter_provider)
        from sqlalchemy.ext.asyncio import create_async_engine
        from sqlalchemy.pool import AsyncAdaptedQueuePool
        async def main():
            engine = create_async_engine("sqlite+aiosqlite://", poolclass=AsyncAdaptedQueuePool)
            async with engine.connect():
                now = telemetry.read()
                print(now.count("used"), now.value("otel_pools.pools"))
            await engine.dispose()
        asyncio.run(main())
    """

    assert plain(program).stdout == "1.0 1.0\n"


def test_without_the_library():
    """A missing library is silent by default, and a line with the pip command when it was asked for."""
    without = "import sys; sys.modules['sqlalchemy'] = None\nimport importlib.util as u; find = u.find_spec\n"
    without += "u.find_spec = lambda name, *a: None if name == 'sqlalchemy' else find(name, *a)\n"
    without += "del sys.modules['sqlalchemy']\nimport otel_pools\n"
    by_default = plain(without + "otel_pools.instrument(); print('runs')")
    asked_for = plain(without + "otel_pools.instrument('sqlalchemy'); print('runs')")

    assert (by_default.stdout, by_default.stderr) == ("runs\n", "")
    assert asked_for.stdout == "runs\n"
    assert asked_for.stderr == ("otel_pools: sqlalchemy is not installed; try: pip install 'otel-pools[sqlalchemy]'\n")


def test_an_old_auto_loader_hears_of_no_error(monkeypatch, caplog):
    """Before 0.54 it would log a traceback of a library that is too old, in every process: it is not told."""
    monkeypatch.setattr(_doors, "EXPECTED", False)
    monkeypatch.setattr("importlib.metadata.version", lambda _: "1.3.24")
    SQLAlchemyPoolInstrumentor().instrument(skip_dep_check=True)
    quietly = caplog.text
    otel_pools.instrument("sqlalchemy")

    assert (quietly, SQLAlchemyPoolInstrumentor._registry) == ("", None)
    assert "sqlalchemy goes unseen" in caplog.text


def test_the_auto_loader_survives_us(monkeypatch):
    """Only the two errors that it expects come out of a door: the library missing, or too old."""
    monkeypatch.setattr("importlib.metadata.version", lambda _: "1.3.24")
    monkeypatch.setattr(_doors, "EXPECTED", True)
    with pytest.raises(_doors.DependencyConflictError):
        SQLAlchemyPoolInstrumentor().instrument(skip_dep_check=True)
    monkeypatch.undo()
    monkeypatch.setattr(_guard, "loud", False)
    monkeypatch.setattr(_doors, "settings", lambda _: 1 / 0)
    SQLAlchemyPoolInstrumentor().instrument(skip_dep_check=True)
    SQLAlchemyPoolInstrumentor().uninstrument()

    assert SQLAlchemyPoolInstrumentor._registry is None


def test_too_old_is_said(monkeypatch, caplog):
    """`instrument()` in code says which version it would need, and goes on."""
    monkeypatch.setattr("importlib.metadata.version", lambda _: "1.3.24")
    otel_pools.instrument()

    assert "sqlalchemy goes unseen" in caplog.text
    assert "1.3.24" in caplog.text


def test_an_unknown_target_is_said(caplog):
    """A name we do not know is one line with those we do."""
    otel_pools.instrument("sqlalchmey")

    assert "knows no target 'sqlalchmey' (there are: httpx, qdrant, redis, sqlalchemy)" in caplog.text


def test_a_row_that_does_not_fit(monkeypatch, caplog, telemetry):
    """A method this version does not have costs its metric and one line; the gauges still come."""
    monkeypatch.delattr(Pool, "_close_connection")
    otel_pools.instrument(meter_provider=telemetry.meter_provider)

    assert "has no sqlalchemy.pool.base:Pool._close_connection; close goes unseen" in caplog.text
    assert SQLAlchemyPoolInstrumentor._registry is not None


def test_a_foreign_wrapper_stays(telemetry):
    """What somebody wrapped around our hook stays when we go, and passes through."""
    otel_pools.instrument(meter_provider=telemetry.meter_provider)
    ours = vars(Pool)["connect"]

    def theirs(pool):
        return ours(pool)

    Pool.connect = theirs
    try:
        otel_pools.uninstrument()
        after = vars(Pool)["connect"]
        from sqlalchemy import create_engine
        from sqlalchemy.pool import QueuePool

        engine = create_engine("sqlite://", poolclass=QueuePool)
        engine.connect().close()
    finally:
        Pool.connect = ours.__wrapped__

    assert after is theirs
    assert telemetry.points("otel_pools.pools") == []


def test_the_instrumentor_by_hand(telemetry):
    """`SQLAlchemyPoolInstrumentor().instrument(...)` is the same door, and a second call is no mistake."""
    SQLAlchemyPoolInstrumentor().instrument(
        meter_provider=telemetry.meter_provider, tracer_provider=telemetry.tracer_provider, span_threshold=1
    )
    SQLAlchemyPoolInstrumentor().instrument()

    assert SQLAlchemyPoolInstrumentor().is_instrumented_by_opentelemetry
    SQLAlchemyPoolInstrumentor().uninstrument()
    SQLAlchemyPoolInstrumentor().uninstrument()
    assert not SQLAlchemyPoolInstrumentor().is_instrumented_by_opentelemetry


def test_entry_points_are_ours_alone():
    """Each entry point has our prefix (equal names are disabled together) and loads an instrumentor."""
    found = {
        e.name: e.load() for e in entry_points(group="opentelemetry_instrumentor") if e.value.startswith("otel_pools")
    }

    assert found == {f"otel_pools_{name}": door for name, door in _doors.INSTRUMENTORS.items()}


def test_import_brings_no_library():
    """`import otel_pools` imports no target library, no SDK and no exporter."""
    wanted = "('sqlalchemy', 'redis', 'httpx', 'grpc', 'opentelemetry.sdk', 'rich', 'asyncio')"
    done = plain(f"import sys, otel_pools; print([m for m in {wanted} if m in sys.modules])")

    assert done.stdout in {"[]\n", "['asyncio']\n"}, done.stderr


@pytest.mark.parametrize("variables", [{}, {"OTEL_SDK_DISABLED": "true"}])
def test_without_an_sdk(variables):
    """With the API alone, or the SDK disabled, everything works and says nothing."""
    done = run(sys.executable, "-c", "import otel_pools; otel_pools.instrument()\n" + PROGRAM, **variables)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
