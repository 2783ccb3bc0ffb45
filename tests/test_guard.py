"""The wall: our errors are logged once per kind and never reach the host."""

from __future__ import annotations

import pytest

from otel_pools import _guard


@pytest.fixture
def quiet(monkeypatch):
    """As in production."""
    monkeypatch.setattr(_guard, "loud", False)


@pytest.mark.usefixtures("quiet")
def test_once_per_kind(caplog):
    """The same mistake twice is one line; another one is another."""
    for kind in ("a", "a", "b"):
        with _guard.guard(kind):
            raise ValueError("x")

    assert len(caplog.records) == 2
    assert "your application is not affected" in caplog.text


@pytest.mark.usefixtures("quiet")
def test_a_base_exception_passes():
    """KeyboardInterrupt, SystemExit and cancellation belong to the host."""
    with pytest.raises(KeyboardInterrupt), _guard.guard("a"):
        raise KeyboardInterrupt


def test_loud_at_home():
    """In our own tests a mistake is raised, wherever it happens."""
    for say in (_guard.lost, _guard.lost_quietly):
        with pytest.raises(ValueError, match="x"):
            say("a", ValueError("x"))


@pytest.mark.usefixtures("quiet")
def test_on_the_release_path_it_is_said_later(caplog):
    """Where logging could hang the host, the collector says it."""
    _guard.lost_quietly("a", ValueError("x"))
    before = len(caplog.records)
    _guard.speak()

    assert (before, len(caplog.records)) == (0, 1)


@pytest.mark.usefixtures("quiet")
def test_what_is_kept_for_later_is_bounded():
    """A mistake on every release, and nobody collecting, costs a hundred entries."""
    for number in range(1000):
        _guard.lost_quietly(str(number), ValueError("x"))

    assert len(_guard._later) == 100
