"""What the tests of incidents share: where the scripts are, their servers, and each incident played once."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "examples" / "incidents"


@pytest.fixture(scope="session")
def lab():
    """The module `lab`, found as it is when a script is run by itself."""
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("lab")
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="session")
def signals(lab):
    """The module `signals`."""
    return importlib.import_module("signals")


@pytest.fixture(scope="session")
def matrix(lab):
    """The module `matrix`."""
    return importlib.import_module("matrix")


@pytest.fixture(scope="session")
def servers(lab, postgres, valkey):
    """The servers of the other tests, and the incidents' own."""
    given = {"postgres": postgres.url("psycopg"), "valkey": f"redis://127.0.0.1:{valkey.port}/0"}
    with importlib.import_module("servers").Servers(given) as servers:
        yield servers


@pytest.fixture(scope="session")
def stage(lab, servers):
    """What was seen of an incident, by its name; played when it is first asked for."""
    seen, missing = {}, {}

    def stage(name):
        if name not in seen:
            if name in missing:
                pytest.skip(missing[name])
            script = importlib.import_module(name)
            try:
                with lab.Lab(servers) as one:
                    script.play(one)
            except lab.NotInstalledError as program:
                missing[name] = str(program)
                pytest.skip(missing[name])
            seen[name] = one.seen
        return seen[name]

    return stage
