"""The command line, before it hands over to anything."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from otel_pools import __version__, cli

HINT = "pip install 'otel-pools[demo]'"


def command(*arguments, before=""):
    """The command in a process of its own, *before* running first in it."""
    code = f"import sys\n{before}\nfrom otel_pools.cli import main\nsys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [[], ["demo"], ["watch"], ["doctor"]])
def test_explains_itself(arguments, capsys):
    """Help is there for the command and for each of its commands."""
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--help"])
    said = capsys.readouterr().out

    assert ended.value.code == 0
    assert all(word in said for word in arguments or ("demo", "watch", "doctor"))


def test_the_demo_names_its_servers(capsys):
    """It says what it will start, all of it."""
    with pytest.raises(SystemExit):
        cli.main(["demo", "--help"])
    said = " ".join(capsys.readouterr().out.split())

    assert "four servers of its own (PostgreSQL, Valkey, one that speaks HTTP/2 and one that speaks Qdrant's" in said


def test_the_hidden_option_is_hidden(capsys):
    """What is for our tests alone is not in the help."""
    with pytest.raises(SystemExit):
        cli.main(["demo", "--help"])

    assert "--cycle" not in capsys.readouterr().out


def test_knows_its_version(capsys):
    """The version is that of the package."""
    with pytest.raises(SystemExit):
        cli.main(["--version"])

    assert capsys.readouterr().out == f"otel-pools {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["watsh"],
        ["demo", "--seconds", "0"],
        ["demo", "--seconds", "nan"],
        ["demo", "--seconds", "x"],
        ["demo", "--", "python"],
        ["watch", "python"],
        ["watch", "--http", "65536"],
        ["watch", "--grpc", "-1"],
        ["watch", "--html", "no/such/folder/report.html"],
        ["doctor", "now"],
    ],
)
def test_refuses_what_makes_no_sense(arguments, capsys):
    """No command, an unknown one and a wrong number are status 2."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)

    assert ended.value.code == 2
    assert "otel-pools" in capsys.readouterr().err


def test_runs_as_a_module():
    """`python -m otel_pools` is the same command."""
    ran = subprocess.run([sys.executable, "-m", "otel_pools", "--version"], capture_output=True, text=True, check=True)

    assert ran.stdout == f"otel-pools {__version__}\n"


@pytest.mark.parametrize("missing", cli.DEMO)
def test_a_missing_extra_is_one_line(monkeypatch, capsys, missing):
    """Whatever of the extra is missing, one line has the command that installs it; no traceback."""
    monkeypatch.setattr(cli, "DEMO", (missing,))  # on a machine that lacks more than that
    monkeypatch.setitem(sys.modules, missing, None)

    assert cli.main(["demo"]) == 2
    assert capsys.readouterr() == ("", f"otel-pools: {missing} is not installed; try: {HINT}\n")


def test_an_import_that_is_refused_is_a_missing_extra():
    """Also a finder that says no, as where a whole namespace is not there."""
    finder = (
        "class No:\n"
        " def find_spec(self, name, path=None, target=None):\n"
        "  if name == 'opentelemetry.exporter': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, No())"
    )
    ran = command("demo", before=finder)

    assert (ran.returncode, ran.stderr.count("\n"), HINT in ran.stderr) == (2, 1, True)


def test_imports_nothing_it_is_not_asked_for():
    """Help and version work without any extra, and load none."""
    heavy = "{'rich', 'sqlalchemy', 'asyncpg', 'opentelemetry.proto', 'opentelemetry.sdk'}"
    ran = command("--version", before=f"import atexit\natexit.register(lambda: print({heavy} & set(sys.modules)))")

    assert ran.stdout.endswith("set()\n")


@pytest.mark.parametrize("name", ["demo", "watch"])
def test_windows_is_told_the_truth(monkeypatch, capsys, name):
    """There they do not run, so no command is offered that would install something."""
    monkeypatch.setattr(sys, "platform", "win32")

    assert cli.main([name]) == 2
    assert "pip install" not in capsys.readouterr().err


@pytest.mark.parametrize("missing", cli.WATCH)
def test_watch_says_what_it_lacks(monkeypatch, capsys, missing):
    """One line has the command that installs it."""
    monkeypatch.setattr(cli, "WATCH", (missing,))
    monkeypatch.setitem(sys.modules, missing, None)
    hint = f"otel-pools: {missing} is not installed; try: pip install 'otel-pools[watch]'\n"

    assert cli.main(["watch"]) == 2
    assert capsys.readouterr() == ("", hint)


def test_the_command_to_watch_is_what_comes_after_the_dashes():
    """Its own options, and dashes of its own, are not for us."""
    given = ["watch", "--http", "0", "--", "python", "-m", "app", "--", "--http"]

    assert cli._split(given) == (["watch", "--http", "0"], ["python", "-m", "app", "--", "--http"])


def test_the_demo_does_not_import_the_client_of_its_load():
    """What only the load needs, and what takes a second and a half to import, no room of the demo imports at once."""
    rooms = (Path(cli.__file__).parent / "demo").glob("_[lqrw]*.py")
    at_once = [node for room in rooms for node in ast.parse(room.read_text()).body]
    names = {node.module for node in at_once if isinstance(node, ast.ImportFrom)}

    assert "qdrant_client" not in names
    assert "dataclasses" in names
