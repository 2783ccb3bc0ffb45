"""However a program ends, and wherever the garbage collector runs: it ends as without us, and says what it did."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the programs are forks of one")

PROGRAM = Path(__file__).parent / "endings_program.py"


class Ending(NamedTuple):
    """How a program ended, and what it said."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """All of them at once, with us and without."""
    folder = tmp_path_factory.mktemp("endings")
    keys = [f"{how}-{who}" for how in (*CODES, *ASKED) for who in ("watched", "bare")]
    subprocess.run([sys.executable, str(PROGRAM), str(folder), *keys], check=True, timeout=90)
    said = {key: [(folder / f"{key}.{part}").read_text() for part in range(3)] for key in keys}
    return {key: Ending(int(code), out, err) for key, (code, out, err) in said.items()}


# Of each way to end, the exit code.
CODES = {
    "sigterm": -15,
    "sigterm handled": 3,
    "sigint": -2,
    "os._exit": 5,
    "daemons": 0,
    "daemons without an end": 0,
    "finalisers": 0,
    "end": 0,
    "late provider": 0,
    "after the provider": 0,
    "uninstrumented at the end": 0,
    "forked in a collection": 0,
}
ASKED = ["asked by a signal"]


@pytest.mark.parametrize("how", CODES)
def test_it_ends_as_without_us(how, programs):
    """The same exit code, no deadlock, and no word on stderr but the application's own."""
    watched, bare = programs[f"{how}-watched"], programs[f"{how}-bare"]

    assert (watched.code, bare.code) == (CODES[how], CODES[how]), watched.err
    assert _without_ours(watched.err)[-1:] == _without_ours(bare.err)[-1:]
    assert "lost a measurement" not in watched.err


def _without_ours(said):
    """What we say of what an application does wrong is no traceback."""
    lines = said.splitlines()
    return [line for line in lines if not line.startswith(("otel_pools: ", "  held for "))]


@pytest.mark.parametrize(
    ("how", "checkouts"),
    [
        ("sigterm handled", 10),
        ("sigint", 10),
        ("end", 18),  # three of them in an `atexit` function that runs before the SDK's
        ("late provider", 18),
        ("after the provider", 10),  # three more after the SDK has ended
        ("uninstrumented at the end", 0),
        ("forked in a collection", 10),
    ],
)
def test_the_last_samples_are_exported(how, checkouts, programs):
    """What was counted until the SDK's own end, by `atexit` or by the application, is in its last export."""
    assert f"{checkouts} checkouts" in programs[f"{how}-watched"].out


def test_a_child_counts_its_own(programs):
    """A child that was forked while another thread collected has its own numbers, and can ask for them."""
    assert "7 in the child" in programs["forked in a collection-watched"].out


def test_what_finalisers_give_back_is_back(programs):
    """Connections given back inside the SDK's lock, an export, a logging lock and an import are all back."""
    assert "0 out" in programs["finalisers-watched"].out


def test_a_signal_handler_may_ask(programs):
    """A signal handler that calls `pools()` while the main thread is in it gets its answer, if late."""
    asked = programs["asked by a signal-watched"]

    assert asked.code == 0, asked.err
    assert "1 asked" in asked.out
