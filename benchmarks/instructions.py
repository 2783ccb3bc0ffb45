"""How many instructions a cycle takes, by callgrind: a measure without noise, compared with a recorded one."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any

from stubs import POOLS

RECORD = Path(__file__).parents[1] / "tests/bench/instructions.json"
MOST = 1.10  # times what is recorded; other seeds of the hashes make up to a tenth of it, in either direction
# Of a bare cycle: it differs so much from one folder to another, which is a quarter of what httpcore is added.
SWAY = 0.003
ALIKE = 8  # pools
# Each `instrument()` gives the types new versions, which in CPython's cache of methods collide with others, or do not.
LAYOUTS = 5
MANY, CYCLES = 200, {"httpx": 40}  # of one measure; some are longer
MARK = "getloadavg"  # a function of libc that nothing here calls but us
SEEDS = "012"  # of the hashes, and so of where in memory everything is
WAYS: dict[str, dict[str, bool]] = {"ours": {"holders": False}, "all on": {}}
TURNS = 1 + len(WAYS)  # of one target and layout: bare, and each way
Figures = dict[str, Any]  # of one target and way: instructions a cycle, their ratio, and of which version


class Unavailable(Exception):  # noqa: N818  # it is none
    """There is no callgrind, or no figure, here."""


# -- the program under valgrind --------------------------------------------------------


def program() -> None:
    """Of each target some cycles, then twice as many, bare and each way; between marks. No SDK: a cycle calls none."""
    import otel_pools

    for make in POOLS.values():
        make().cycle()  # the libraries are imported by it
    gc.disable()
    _count()
    for target, make in [*POOLS.items()] * LAYOUTS:
        # Several, as what a look-up takes depends on where in memory its key happens to be.
        cycles = [make().cycle for _ in range(ALIKE)]
        gc.freeze()  # or each search for pools, under valgrind, takes seconds
        _marked(target, cycles)
        for way in WAYS.values():
            # No wait is slow, however slow valgrind is.
            otel_pools.instrument(target, span_threshold=1000, **way)
            _marked(target, cycles)
            otel_pools.uninstrument(target)


def _count() -> None:
    """From here on: to count in the imports as well takes longer than all the rest."""
    told = subprocess.Popen(["vgdb", f"--pid={os.getpid()}", "instrumentation", "on"], stderr=subprocess.DEVNULL)
    while told.poll() is None:
        """Were this a wait, valgrind would have to be woken by ptrace, which not everybody may use."""
    if told.returncode:
        raise subprocess.CalledProcessError(told.returncode, told.args)


def _marked(target: str, cycles: list[Callable[[], Any]]) -> None:
    rounds = CYCLES.get(target, MANY) // ALIKE
    _repeat(cycles, rounds)
    for number in (rounds, 2 * rounds):
        os.getloadavg()
        _repeat(cycles, number)
    os.getloadavg()


def _repeat(cycles: list[Callable[[], Any]], rounds: int) -> None:
    for _ in range(rounds):
        for cycle in cycles:
            cycle()


# -- what callgrind says of it ---------------------------------------------------------


def measure(seed: str) -> dict[str, Figures]:
    """Instructions a cycle, bare and in our ways, of all targets: the median of several layouts."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        _valgrind(out, seed)
        # A dump at each mark: what was before the first cycles, these, twice as many; and again.
        totals = [_total(Path(f"{out}.{number + 1}")) for number in range(3 * TURNS * len(POOLS) * LAYOUTS)]
    taken = [after - before for before, after in zip(totals[1::3], totals[2::3], strict=True)]
    figures = {
        target: _figures(target, [taken[TURNS * place + way :: TURNS * len(POOLS)] for way in range(TURNS)])
        for place, target in enumerate(POOLS)
    }
    return {f"{target}, {way}": told for target, ways in figures.items() for way, told in ways.items()}


def typical(measured: list[dict[str, Figures]]) -> dict[str, Figures]:
    """Of several seeds, for each target the figures in the middle."""
    middle = len(measured) // 2
    return {one: sorted((each[one] for each in measured), key=itemgetter("added"))[middle] for one in measured[0]}


def _figures(target: str, taken: list[list[int]]) -> dict[str, Figures]:
    bare, *ours = (round(median(one)) // CYCLES.get(target, MANY) for one in taken)
    name = POOLS[target].distribution
    return {
        way: {"bare": bare, "added": one - bare, "ratio": round(one / bare, 4), name: version(name)}
        for way, one in zip(WAYS, ours, strict=True)
    }


def _valgrind(out: Path, seed: str) -> None:
    """Same hashes, same addresses: the same instructions each time."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise Unavailable("valgrind is not installed")
    files = (f"--callgrind-out-file={out}", f"--dump-before={MARK}")
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [valgrind, "-q", "--tool=callgrind", "--instr-atstart=no", *files, sys.executable, __file__, "--program"]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=300)


def _total(file: Path) -> int:
    if not file.exists():
        raise Unavailable(f"callgrind does not see {MARK}() of this libc")
    lines = file.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("totals:"))


# -- what is recorded ------------------------------------------------------------------


def recorded() -> Mapping[str, Figures]:
    """The figures of this minor version of Python, by target and way."""
    minor, all = _minor(), json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if minor not in all:
        raise Unavailable(f"nothing is recorded for Python {minor}: run {Path(__file__).name} --update with it")
    figures: Mapping[str, Figures] = all[minor]
    return figures


def _minor() -> str:
    return ".".join(platform.python_version_tuple()[:2])


def update(now: Mapping[str, Figures]) -> None:
    """Record these for this minor version, and leave the others."""
    all = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    all[_minor()] = now
    RECORD.write_text(json.dumps(dict(sorted(all.items(), key=lambda one: int(one[0].split(".")[1]))), indent=2) + "\n")


def regressions(now: Mapping[str, Figures], then: Mapping[str, Figures]) -> Iterator[str]:
    """
    On which targets we add more than we may, in a sentence each.

    What we add must have grown, and its share of the cycle too: the one alone
    grows with another build of Python, the other with a faster version of the
    library. A tenth of ours / bare would not do: it lets what we add double.
    And it must have grown by more than a bare cycle sways.
    """
    for target, figures in now.items():
        before = then.get(target)
        if before is None or figures["added"] - before["added"] <= SWAY * before["bare"]:
            continue
        if growth(figures, before) > MOST:
            yield f"{target}: we add {growth(figures, before):.2f} times what is recorded; {figures}, was {before}"


def confirmed(then: Mapping[str, Figures]) -> list[str]:
    """The regressions, if there are some with each seed: what we add sways by a tenth with what lies where."""
    told: list[str] = []
    for seed in SEEDS:
        told = list(regressions(measure(seed), then))
        if not told:
            break
    return told


def growth(now: Figures, then: Figures) -> float:
    added: float = now["added"] / then["added"]
    return min(added, added * then["bare"] / now["bare"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", help="record what is measured, for this version of Python")
    parser.add_argument("--program", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.program:
        program()
        return
    now = typical([measure(seed) for seed in SEEDS])
    for target, figures in now.items():
        print(f"{target:20} {figures}")
    if chosen.update:
        update(now)
    sys.exit("\n".join(regressions(now, recorded())) or 0)


if __name__ == "__main__":
    main()
