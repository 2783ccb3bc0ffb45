"""The checks of this project: `nox` runs what CI runs."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import nox

PROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = nox.project.python_versions(PROJECT)
MAIN = "3.11"  # the one that all supported versions of all libraries run on

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "uv|virtualenv"
# A machine that lacks one of the Pythons tests the others, in CI too.
nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["lint", "tests", "targets", "oldest", "coverage", "wheel"]

# Oldest supported, where they changed how their pools work, and newest but one; the newest is in `tests`.
SLICE = [
    *("sqlalchemy==2.0.0", "sqlalchemy==2.0.*"),
    *("redis==5.0.0", "redis==6.4.*", "redis==7.4.*"),
    *("httpx==0.24.*", "httpx2==2.0.*"),
    "qdrant-client==1.12.*",
]
MATRIX = [
    *SLICE,
    *("redis==5.0.7", "redis==5.2.*", "redis==5.3.*", "redis==7.1.*", "redis==8.0.*", "valkey==6.0.*"),
    *("httpx==0.25.*", "httpx==0.27.*", "httpx2==2.8.*"),
    *("qdrant-client==1.9.*", "qdrant-client==1.16.*"),
]
# Whose tests a library has a part in.
TESTS = {"sqlalchemy": "sqlalchemy", "redis": "redis", "valkey": "redis", "httpx": "httpx", "httpx2": "httpx"} | {
    "qdrant-client": "qdrant"
}
# Where two libraries have one target, each test is there for both.
ONLY = {
    "redis": ("-k", "not valkey"),
    "valkey": ("-k", "valkey"),
    "httpx": ("-k", "not httpx2"),
    "httpx2": ("-k", "httpx2"),
}
EXTRAS = {"sqlalchemy": "sqlalchemy[asyncio]", "httpx": "httpx[http2]", "httpx2": "httpx2[http2]"}
NEWEST = list(TESTS)
# Where we touch the API, the SDK or the loader.
OPENTELEMETRY = [f"tests/test_{room}.py" for room in ("instruments", "merge", "merge_equal", "merge_values", "doors")]
OPENTELEMETRY += ["tests/test_spans.py", "tests/test_watch.py"]

# What does not depend on the Python: whole programs, real Prometheus, documents.
ONCE = (
    *("tests/incidents", "tests/soak", "tests/bench/test_instructions.py", "tests/test_demo.py"),
    *("tests/test_network.py", "tests/test_compatibility.py"),
    *("tests/test_examples.py", "tests/test_supabase_example.py"),
    *("tests/test_rules.py", "tests/test_pipeline.py", "tests/test_collector_config.py", "tests/test_sizing.py"),
    *("tests/test_dashboards.py", "tests/test_dashboards_live.py", "tests/test_qdrant_server.py"),
    *("tests/targets/test_qdrant_truth.py", "tests/targets/test_qdrants.py", "tests/targets/test_valkeys.py"),
    *("tests/test_advice.py", "tests/test_postgres.py", "tests/test_valkey.py"),
    *(f"tests/test_{room}.py" for room in ("doctor", "outside", "secrets", "servers", "stale", "web_endpoints")),
)
# What the main and the newest Python are enough for: CI has an hour.
TWICE = (
    *("tests/bench/test_memory.py", "tests/targets/test_qdrant.py"),
    *(f"tests/test_{room}.py" for room in ("endings", "faults", "interleavings", "live", "merge_equal")),
    *(f"tests/test_{room}.py" for room in ("merge_values", "statistics", "web", "worlds")),
)
# Of the tests, by Python; all others leave out both.
LEFT_OUT = {PYTHONS[-1]: ONCE, MAIN: ()}
# In memory, or nearly; no test of these measures time or counts instructions, which a tracer would disturb.
TRACED = [
    *(f"tests/targets/test_{target}.py" for target in ("sqlalchemy", "redis", "httpx")),
    *(f"tests/test_{room}.py" for room in ("advice", "cli", "config", "doctor", "guard", "health", "holders", "hooks")),
    *(f"tests/test_{room}.py" for room in ("hosts", "instruments", "leaks", "leases", "live", "merge", "receiver")),
    *(f"tests/test_{room}.py" for room in ("report", "screen", "secrets", "servers", "spans", "stale", "statistics")),
    *(f"tests/test_{room}.py" for room in ("timings", "visits", "watch", "web", "web_endpoints")),
]
# Whose tests are tested themselves.
CORE = ("_watch", "_outbox", "_hooks", "_registry", "_health", "_advice")
SDKS = [f"1.{minor}" for minor in range(30, 46)]
# What young Pythons can install without a compiler (psycopg takes the system's libpq), and what a missing lock breaks.
LEAN = [
    *("aiosqlite", "hypothesis", "pytest>=8", "pytest-timeout", "sqlalchemy[asyncio]", "redis", "valkey"),
    *("psycopg", "httpx[http2]", "opentelemetry-distro", "opentelemetry-exporter-otlp-proto-http"),
]
THREADED = [
    *(f"tests/targets/test_{target}.py" for target in ("sqlalchemy", "redis", "httpx")),
    *(f"tests/test_{room}.py" for room in ("interleavings", "leases", "hooks", "doors", "merge", "spans", "faults")),
]


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
    left_out = LEFT_OUT.get(str(session.python), ONCE + TWICE)
    _test(session, "python", *(f"--ignore={place}" for place in left_out))


@nox.session(python=MAIN)
@nox.parametrize("version", SLICE)
def targets(session: nox.Session, version: str) -> None:
    """The contract and the truth, on other versions of the libraries."""
    _on(session, version)


@nox.session(python=MAIN)
@nox.parametrize("version", [*NEWEST, *MATRIX])
def matrix(session: nox.Session, version: str) -> None:
    """The same on the newest and on all versions where something changed: on demand."""
    _on(session, version)


@nox.session(python=MAIN)
@nox.parametrize("library", NEWEST)
def prerelease(session: nox.Session, library: str) -> None:
    """The newest pre-release, where there is one after the newest release: on demand; it may fail, and is told."""
    _on(session, library, "--upgrade", "--pre", codes=(0, 1))


def _on(session: nox.Session, version: str, *options: str, codes: Sequence[int] = (0,)) -> None:
    library = version.partition("=")[0]
    session.install("-e", ".[demo]", *nox.project.dependency_groups(PROJECT, "test"))
    session.install(*options, version.replace(library, EXTRAS.get(library, library)))
    if options and not _is_prerelease(session, library):
        session.skip(f"there is no pre-release of {library} after its newest release")
    files = [f"tests/targets/test_{TESTS[library]}{part}.py" for part in ("", "_truth")]
    _test(session, library, *files, *ONLY.get(library, ()), codes=codes)


def _is_prerelease(session: nox.Session, library: str) -> bool:
    ask = (
        f"import importlib.metadata as m, packaging.version as v; print(v.parse(m.version('{library}')).is_prerelease)"
    )
    return "True" in str(session.run("python", "-c", ask, silent=True))


def _test(session: nox.Session, subject: str, *arguments: str, codes: Sequence[int] = (0,)) -> None:
    """Run these tests; of a run that was not narrowed, keep for `docs/compatibility.md` what came out."""
    program = ("pytest",) if session.posargs else ("python", "tests/compatibility.py", subject)
    session.run(*program, *arguments, *session.posargs, success_codes=codes)


@nox.session(python=MAIN)
def oldest(session: nox.Session) -> None:
    """The oldest OpenTelemetry we say we work with."""
    session.install("-e", ".", *nox.project.dependency_groups(PROJECT, "oldest"))
    _test(session, "opentelemetry-sdk", "tests/targets/test_sqlalchemy.py", *OPENTELEMETRY)


@nox.session(python=MAIN)
@nox.parametrize("version", SDKS)
def sdks(session: nox.Session, version: str) -> None:
    """Every SDK whose private aggregations we touch: on demand; the oldest and the newest are in CI."""
    beta = f"0.{int(version.partition('.')[2]) + 21}b0"
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
        *(f"opentelemetry-{part}=={beta}" for part in parts),
    )
    _test(session, "opentelemetry-sdk", "tests/targets/test_sqlalchemy.py", *OPENTELEMETRY)


@nox.session(python=MAIN)
def legacy(session: nox.Session) -> None:
    """SQLAlchemy 1.4, as far as it goes: on demand."""
    session.install("-e", ".", *nox.project.dependency_groups(PROJECT, "test"))
    session.install("sqlalchemy[asyncio]==1.4.*")
    _test(session, "sqlalchemy", "tests/targets/test_sqlalchemy.py", "-k", "TestSync or TestAsync or TestBare")


@nox.session(python=["3.14", "3.13t", "3.14t"])
def coming(session: nox.Session) -> None:
    """Pythons to come, and those without the global lock: on demand."""
    session.install("-e", ".", *LEAN)
    _test(session, "python", *THREADED)


@nox.session(python=MAIN)
def coverage(session: nox.Session) -> None:
    """Which lines and branches of the package the quick tests pass through; a little less than there was fails."""
    session.install("-e", ".[demo]", *nox.project.dependency_groups(PROJECT, "test"), "coverage>=7.10")
    session.run("coverage", "run", "--branch", "--source=otel_pools", "-m", "pytest", *TRACED, *session.posargs)
    session.run("coverage", "report", "--omit=*/demo/*", "--show-missing", "--skip-covered", "--fail-under=92")


@nox.session(python=MAIN)
def mutation(session: nox.Session) -> None:
    """Whether the tests notice what is changed in the core: on demand; see `docs/mutation.md`."""
    session.install("-e", ".[demo]", *nox.project.dependency_groups(PROJECT, "test", "mutation"))
    results = Path(session.create_tmp()) / "mutants.jsonl"
    results.unlink(missing_ok=True)
    arguments = ("--results", str(results), "--floor", "85", *session.posargs)
    session.run("python", "tests/mutation/mutate.py", *CORE, *arguments)


@nox.session(python=MAIN)
def soak(session: nox.Session) -> None:
    """Half an hour of everything at once, on a bad network: on demand; a tenth of it is in `tests`."""
    session.install("-e", ".[demo]", *nox.project.dependency_groups(PROJECT, "test"))
    session.run("python", "tests/soak", *(session.posargs or ["--minutes=30"]))


@nox.session(python=MAIN)
def audit(session: nox.Session) -> None:
    """Known weaknesses of what we stand on, all extras included: on demand, and every week; asks PyPI itself."""
    session.install("pip-audit")
    project = PROJECT["project"]
    asked = Path(session.create_tmp()) / "requirements.txt"
    extras = chain.from_iterable(project["optional-dependencies"].values())
    asked.write_text("\n".join([*project["dependencies"], *extras]))
    # Not strict, it would say of all that the index has no advisories on, as a mirror has none, that nothing is known.
    session.run("pip-audit", "--strict", "--progress-spinner", "off", "--requirement", str(asked), *session.posargs)


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
