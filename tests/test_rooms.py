"""Who may know whom: the rooms of the package import only what their purpose allows."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import otel_pools

SOURCE = Path(otel_pools.__file__).parent
ROOMS = sorted(path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py"))
CORE = [room for room in ROOMS if "/" not in room]
TARGETS = [room for room in ROOMS if room.startswith("targets/")]
# What a target library is called when it is imported.
LIBRARIES = {"sqlalchemy", "redis", "valkey", "httpx", "httpcore", "httpx2", "httpcore2", "qdrant_client", "grpc"}
MAY_KNOW_OPENTELEMETRY = {
    "_merge.py",
    "_instruments.py",
    "_spans.py",
    "_holders.py",
    "_doors.py",
    "_receiver.py",
    "_screen.py",
    "testing.py",
}


def imports(room):
    """The top-level names a room imports, wherever in it."""
    tree = ast.parse((SOURCE / room).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("room", CORE)
def test_the_core_knows_no_library(room):
    """No module of the core imports a target library."""
    assert set(imports(room)) & LIBRARIES == set()


@pytest.mark.parametrize("room", TARGETS)
def test_a_target_knows_no_opentelemetry(room):
    """A target knows the verbs, the nouns and its own library."""
    assert "opentelemetry" not in imports(room)


@pytest.mark.parametrize("room", CORE)
def test_few_rooms_talk_to_opentelemetry(room):
    """The other rooms of the core are given what they need."""
    assert room in MAY_KNOW_OPENTELEMETRY or "opentelemetry" not in imports(room)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_it_is_for(room):
    """The first line of each module's docstring is one sentence."""
    first = next(iter((ast.get_docstring(ast.parse((SOURCE / room).read_text())) or "").splitlines()), "")

    assert first.endswith(".") or "\n\n" in (ast.get_docstring(ast.parse((SOURCE / room).read_text())) or "")
    assert len(first) > 20


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "_vocabulary.py"])
def test_metric_names_are_said_once(room):
    """No module but the vocabulary spells a metric name, except in prose and in the tests we ship."""
    if room == "testing.py":
        pytest.skip("a contract has to spell what it expects")
    tree = ast.parse((SOURCE / room).read_text())
    docstrings = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, DOCUMENTED)}
    spelled = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in docstrings
    }

    assert [
        text for text in spelled if text.startswith(("db.client.", "otel_pools.connection", "otel_pools.wait"))
    ] == []


DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
