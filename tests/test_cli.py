"""The command line, before it hands over to anything."""

from __future__ import annotations

import subprocess
import sys

import pytest

from otel_pools import __version__, cli

HINT = "pip install 'otel-pools[demo]'"


def command(*arguments, before=""):
    """The command in a process of its own, *before* running first in it."""
    code = f"import sys\n{before}\nfrom otel_pools.cli import main\nsys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"]])
def test_explains_itself(arguments, capsys):
    """Help is there for the command and for the demo."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)

    assert ended.value.code == 0
    assert "demo" in capsys.readouterr().out


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
    "arguments", [[], ["watsh"], ["demo", "--seconds", "0"], ["demo", "--seconds", "nan"], ["demo", "--seconds", "x"]]
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
def test_a_missing_extra_is_one_line(missing):
    """Whatever of the extra is missing, one line has the command that installs it; no traceback."""
    ran = command("demo", before=f"sys.modules[{missing!r}] = None")

    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == f"otel-pools: {missing} is not installed; try: {HINT}\n"


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


def test_windows_is_told_the_truth(monkeypatch, capsys):
    """There the extra cannot be installed, so no command is offered."""
    monkeypatch.setattr(sys, "platform", "win32")

    assert cli.main(["demo"]) == 2
    assert HINT not in capsys.readouterr().err
