"""Settings come from arguments, then the environment; a wrong value is said once and not used."""

from __future__ import annotations

import pytest

from otel_pools._config import Settings, settings
from otel_pools._model import Identity


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("span_threshold", "0.5", 0.5),
        ("span_threshold", "0", 0.0),
        ("metrics_exclude", "a, b ,", ("a", "b")),
        ("targets", "sqlalchemy", ("sqlalchemy",)),
        ("names", "db/app=shop,db:1=rest", ("db/app=shop", "db:1=rest")),
    ],
)
def test_from_the_environment(monkeypatch, name, value, expected):
    """`OTEL_POOLS_` and the name in capitals."""
    monkeypatch.setenv(f"OTEL_POOLS_{name.upper()}", value)

    assert getattr(settings({}), name) == expected


def test_an_argument_outweighs_the_environment(monkeypatch):
    """What is given in code is meant."""
    monkeypatch.setenv("OTEL_POOLS_SPAN_THRESHOLD", "1")

    assert settings({"span_threshold": 2}).span_threshold == 2.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("span_threshold", "soon"),
        ("span_threshold", "-1"),
        ("span_threshold", "nan"),
        ("span_threshold", True),
        ("span_threshold", object()),
        ("metrics_exclude", 7),
        ("targets", [7]),
        ("names", "nameless"),
        ("names", "=x"),
    ],
)
def test_a_wrong_value(name, value, caplog):
    """One line says what was expected, without the value, and the default is used."""
    chosen = settings({name: value})

    assert chosen == Settings()
    assert len(caplog.records) == 1
    assert f"otel_pools: {name} must be" in caplog.text
    assert "soon" not in caplog.text


def test_a_wrong_variable_is_named(monkeypatch, caplog):
    """The line names the variable to correct."""
    monkeypatch.setenv("OTEL_POOLS_SPAN_THRESHOLD", "secret")
    settings({})

    assert "OTEL_POOLS_SPAN_THRESHOLD must be a number of seconds" in caplog.text
    assert "secret" not in caplog.text


def test_an_unknown_setting(caplog):
    """One line says that there is no such setting and which there are."""
    assert settings({"span_treshold": 1}) == Settings()
    assert "no setting 'span_treshold'" in caplog.text


def test_an_empty_variable_is_none(monkeypatch, caplog):
    """A variable that is set to nothing is not set."""
    monkeypatch.setenv("OTEL_POOLS_NAMES", " ")

    assert settings({}) == Settings()
    assert caplog.records == []


def test_names_as_a_mapping():
    """In code, `names` may be a dict."""
    assert settings({"names": {"db": "main"}}).names == ("db=main",)


@pytest.mark.parametrize(
    ("names", "given"),
    [
        (("db:1/app=a", "db:1=b", "db/app=c", "db=d"), "a"),
        (("db:1=b", "db/app=c", "db=d"), "b"),
        (("db/app=c", "db=d"), "c"),
        (("db=d",), "d"),
        (("other=x",), None),
        (("db=a=b",), "a=b"),
    ],
)
def test_the_most_exact_name_is_given(names, given):
    """Host, port and database before host and port before host and database before host."""
    identity = Identity("sqlalchemy", "postgresql", None, "app", "db", 1)

    assert Settings(names=names).rename(identity).given == given
