"""The checks of this project: `nox` runs what CI runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import nox

PROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = nox.project.python_versions(PROJECT)
MAIN = "3.11"  # the one that all supported versions of all libraries run on

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "uv|virtualenv"
# A machine that lacks one of the Pythons tests the others, in CI too.
nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["lint", "tests", "targets", "oldest", "wheel"]

# Oldest supported, where they changed how their pools work, and newest but one; the newest is in `tests`.
SLICE = [
    *("sqlalchemy==2.0.0", "sqlalchemy==2.0.*"),
    *("redis==5.0.0", "redis==6.4.*", "redis==7.4.*"),
    *("httpx==0.24.*", "httpx2==2.0.*"),
    "qdrant-client==1.12.*",
]
MATRIX = [
    *SLICE,
    *("redis==5.0.1", "redis==5.2.*", "redis==5.3.*", "redis==7.1.*", "redis==8.0.*", "valkey==6.0.*"),
    *("httpx==0.25.*", "httpx==0.27.*", "httpx2==2.8.*"),
    *("qdrant-client==1.9.*", "qdrant-client==1.16.*"),
]
# Whose tests a library has a part in.
TESTS = {"sqlalchemy": "sqlalchemy", "redis": "redis", "valkey": "redis", "httpx": "httpx", "httpx2": "httpx"} | {
    "qdrant-client": "qdrant"
}
# Where two libraries have one target, each test is there for both.
ONLY = {"redis": ("-k", "not valkey"), "httpx": ("-k", "not httpx2"), "httpx2": ("-k", "httpx2")}
EXTRAS = {"sqlalchemy": "sqlalchemy[asyncio]", "httpx": "httpx[http2]", "httpx2": "httpx2[http2]"}
# Where we touch the API, the SDK or the loader.
OPENTELEMETRY = [f"tests/test_{room}.py" for room in ("instruments", "merge", "merge_equal", "doors", "spans", "watch")]

# What does not depend on the Python: whole programs, real Prometheus, documents.
ONCE = (
    *("tests/incidents", "tests/bench/test_instructions.py", "tests/test_demo.py"),
    *("tests/test_examples.py", "tests/test_supabase_example.py"),
    *("tests/test_rules.py", "tests/test_pipeline.py", "tests/test_collector_config.py", "tests/test_sizing.py"),
    *("tests/test_dashboards.py", "tests/test_dashboards_live.py", "tests/test_qdrant_server.py"),
    *("tests/targets/test_qdrant_truth.py", "tests/targets/test_qdrants.py"),
)
SDKS = {"1.33": "0.54b0", "1.35": "0.56b0", "1.37": "0.58b0", "1.39": "0.60b0", "1.41": "0.62b0", "1.43": "0.64b0"}


@nox.session(python=MAIN)
def lint(session: nox.Session) -> None:
    """Format, lint, types."""
    session.install("-e", ".[demo]", *nox.project.dependency_groups(PROJECT, "lint", "test"))
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("mypy")


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Everything; on the other Pythons what may depend on them."""
    session.install("-e", ".[demo]", *nox.project.dependency_groups(PROJECT, "test"))
    left_out = () if session.python == MAIN else [f"--ignore={place}" for place in ONCE]
    session.run("pytest", *left_out, *session.posargs)


@nox.session(python=MAIN)
@nox.parametrize("version", SLICE)
def targets(session: nox.Session, version: str) -> None:
    """The contract and the truth, on other versions of the libraries."""
    _on(session, version)


@nox.session(python=MAIN)
@nox.parametrize("version", MATRIX)
def matrix(session: nox.Session, version: str) -> None:
    """The same on all versions where something changed: on demand."""
    _on(session, version)


def _on(session: nox.Session, version: str) -> None:
    library = version.partition("=")[0]
    session.install("-e", ".[demo]", *nox.project.dependency_groups(PROJECT, "test"))
    session.install(version.replace(library, EXTRAS.get(library, library)))
    files = [f"tests/targets/test_{TESTS[library]}{part}.py" for part in ("", "_truth")]
    session.run("pytest", *files, *ONLY.get(library, ()), *session.posargs)


@nox.session(python=MAIN)
def oldest(session: nox.Session) -> None:
    """The oldest OpenTelemetry we say we work with."""
    session.install("-e", ".", *nox.project.dependency_groups(PROJECT, "oldest"))
    session.run("pytest", "tests/targets/test_sqlalchemy.py", *OPENTELEMETRY)


@nox.session(python=MAIN)
@nox.parametrize("version", SDKS)
def sdks(session: nox.Session, version: str) -> None:
    """Every SDK whose private aggregations we touch: on demand; the oldest and the newest are in CI."""
    parts = ("instrumentation", "instrumentation-sqlalchemy", "distro")
    session.install(
        *(
            "-e",
            ".",
            "aiosqlite",
            "hypothesis",
            "psycopg[binary]",
            "pytest>=8",
            "pytest-timeout",
            "sqlalchemy[asyncio]",
        ),
        *(f"opentelemetry-{part}=={version}.*" for part in ("api", "sdk")),
        *(f"opentelemetry-{part}=={SDKS[version]}" for part in parts),
    )
    session.run("pytest", "tests/targets/test_sqlalchemy.py", *OPENTELEMETRY, *session.posargs)


@nox.session(python=MAIN)
def legacy(session: nox.Session) -> None:
    """SQLAlchemy 1.4, as far as it goes: on demand."""
    session.install("-e", ".", *nox.project.dependency_groups(PROJECT, "test"))
    session.install("sqlalchemy[asyncio]==1.4.*")
    session.run("pytest", "tests/targets/test_sqlalchemy.py", "-k", "TestSync or TestAsync or TestBare")


@nox.session(python=MAIN)
def wheel(session: nox.Session) -> None:
    """The built wheel where there is none of the libraries: silent, and complete."""
    built = Path(session.create_tmp()) / "dist"
    shutil.rmtree(built, ignore_errors=True)
    session.install("build", "twine")
    session.run("python", "-m", "build", "--outdir", str(built), silent=True)
    session.run("twine", "check", "--strict", *map(str, built.iterdir()))
    session.install("--force-reinstall", str(next(built.glob("*.whl"))))
    session.run("python", "tests/packaging_check.py", external=False)


@nox.session(python=MAIN)
def bench(session: nox.Session) -> None:
    """What we cost, as a table: on demand, on a quiet machine."""
    session.install("-e", ".[demo]", *nox.project.dependency_groups(PROJECT, "test"))
    session.run("python", "benchmarks", *session.posargs)
