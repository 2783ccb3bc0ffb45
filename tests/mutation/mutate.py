"""
Mutation testing: change the code in one place, and see whether a test says so.

    python tests/mutation/mutate.py _watch _outbox --results results.jsonl

The changes are those of mutmut. Its runner does not fit: it swaps functions at
run time, but our tables of hooks are compiled when a target is imported; its
trampolines add frames to stacks that we read; and decorated functions, or what
runs at import, would not count. So here each mutant has a process of its own,
forked from one that has collected the tests. There the functions of the module
get the code of the mutant, those that a table holds already included; no file
ever holds it. Then it runs the tests that have passed the changed line, the
fastest first. What is changed in a line that runs at import cannot be changed
afterwards: such a mutant's process is forked from one that has all other
libraries and nothing of ours, and imports the mutated module.

A mutant is killed if a test fails, or takes far longer than without it.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import gc
import importlib
import importlib.util
import json
import os
import re
import select
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.machinery import SourceFileLoader
from itertools import accumulate, pairwise
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import coverage
import libcst as cst
import pytest
from libcst.metadata import MetadataWrapper, ParentNodeProvider, PositionProvider
from mutmut.mutation.file_mutation import MutationVisitor, OuterFunctionProvider
from mutmut.mutation.mutators import mutation_operators
from mutmut.mutation.pragma_handling import get_ignored_lines

ROOT = Path(__file__).resolve().parents[2]
OURS = "otel_pools"
# The core's own: they need no server, no second process and little time.
ROOMS = ("watch", "outbox", "hooks", "spans", "registry", "health", "advice")
TESTS = [f"tests/test_{room}.py" for room in ROOMS]
# Those of them, or of others that somebody names, which fork, start servers or load the machine.
UNSUITED = re.compile("fork|storm|child|postgres|pg-|interpreter|program|finaliser|another_thread|for_another")
SLOW = 2.0  # seconds: what takes longer is not asked
SECONDS = 15  # for one test; without a mutant none takes a fifth of that
# The first argument goes to a log, and its words are nobody's behaviour.
LOGS = {"guard", "lost", "lost_quietly", "once"}

KILLED, TIMEOUT, SURVIVED, UNTESTED = "killed", "timeout", "survived", "no tests"
ALIVE = {SURVIVED, UNTESTED}
UNFIT = 90  # what a process says whose functions cannot have the code of the mutant

Tell = Callable[[str], None]
say = functools.partial(print, flush=True)


# -- what is changed -------------------------------------------------------------------


@dataclass(frozen=True)
class Mutant:
    """
    One change in one place.

    Attributes:
        name: Module, function, what was and what is, and which of several equal ones: it outlives edits elsewhere.
        module: Without the package.
        lines: Those of the statement.
        function: Those of the outermost function.
        source: The module's, changed.
    """

    name: str
    module: str
    lines: range
    function: range
    source: str = field(repr=False)


class Visitor(MutationVisitor):
    """mutmut's changes, in decorated functions too, and not in what is only logged."""

    METADATA_DEPENDENCIES = (PositionProvider, OuterFunctionProvider, ParentNodeProvider)

    def _skip_node_and_children(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.FunctionDef) and node.decorators:
            return False
        if isinstance(node, cst.Arg):
            call = self.get_metadata(ParentNodeProvider, node)
            if _logs(call) and call.args[0] is node:
                return True
        return super()._skip_node_and_children(node)

    def _create_mutations(self, node: cst.CSTNode) -> None:
        before = len(self.mutations)
        super()._create_mutations(node)
        if _logs(node):
            words, new = node.args[0], self.mutations[before:]
            self.mutations[before:] = [each for each in new if any(arg is words for arg in each.mutated_node.args)]


def _logs(node: cst.CSTNode) -> bool:
    return isinstance(node, cst.Call) and isinstance(node.func, cst.Name) and node.func.value in LOGS


def mutants(module: str) -> Iterator[Mutant]:
    """Every change of this module that still compiles."""
    path = _path(module)
    code = path.read_text()
    wrapper = MetadataWrapper(cst.parse_module(code))
    visitor = Visitor(mutation_operators, get_ignored_lines(str(path), code, wrapper))
    wrapper.visit(visitor)
    places, parents = wrapper.resolve(PositionProvider), wrapper.resolve(ParentNodeProvider)
    starts = [0, *accumulate(map(len, code.splitlines(keepends=True)))]
    names: Counter[str] = Counter()
    for change in visitor.mutations:
        function, place = change.contained_by_top_level_function, places[change.original_node]
        if not isinstance(function, cst.FunctionDef):
            continue
        # libcst's own way to replace takes a thousand times as long.
        start, end = (starts[at.line - 1] + at.column for at in (place.start, place.end))
        source = f"{code[:start]}{wrapper.module.code_for_node(change.mutated_node)}{code[end:]}"
        if source == code or not _compiles(source):
            continue
        name = f"{module}.{_qualified(function, parents)}: {_diff(code, source)}"
        names[name] += 1
        statement = _statement(change.original_node, parents)
        yield Mutant(f"{name} #{names[name]}", module, _lines(statement, places), _lines(function, places), source)


def _path(module: str) -> Path:
    return ROOT / "src" / OURS / f"{module.replace('.', '/')}.py"


def _compiles(source: str) -> bool:
    try:
        compile(source, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def _diff(code: str, source: str) -> str:
    lines = difflib.unified_diff(code.splitlines(), source.splitlines(), n=0, lineterm="")
    return " ".join(f"{line[0]} {line[1:].strip()}" for line in lines if not line.startswith(("---", "+++", "@@")))


def _qualified(function: cst.FunctionDef, parents: Mapping[cst.CSTNode, cst.CSTNode]) -> str:
    names, node = [function.name.value], parents.get(function)
    while node is not None:
        if isinstance(node, cst.ClassDef):
            names.append(node.name.value)
        node = parents.get(node)
    return ".".join(reversed(names))


def _statement(node: cst.CSTNode, parents: Mapping[cst.CSTNode, cst.CSTNode]) -> cst.CSTNode:
    each: cst.CSTNode | None = node
    while each is not None:
        if isinstance(each, cst.SimpleStatementLine):
            return each
        each = None if isinstance(each, cst.BaseCompoundStatement) else parents.get(each)
    return node


def _lines(node: cst.CSTNode, places: Mapping[cst.CSTNode, Any]) -> range:
    place = places[node]
    return range(place.start.line, place.end.line + 1)


# -- how it gets where it is tried -------------------------------------------------------


class Finder:
    """Finds the mutated module in the place of the true one."""

    def __init__(self, mutant: Mutant) -> None:
        self.name, self.path, self.source = f"{OURS}.{mutant.module}", _path(mutant.module), mutant.source

    def find_spec(self, name: str, *_: object) -> Any:
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(name, self.path, loader=Loader(name, self.path, self.source))


class Loader(SourceFileLoader):
    """Has the text already."""

    def __init__(self, name: str, path: Path, source: str) -> None:
        super().__init__(name, str(path))
        self.source = source

    def get_code(self, _: str) -> Any:
        return compile(self.source, self.path, "exec", dont_inherit=True)


def swap(functions: Iterable[FunctionType], mutant: Mutant) -> bool:
    """Give these functions the mutant's code; False if they cannot have it."""
    path = _path(mutant.module)
    true, mutated = (compile(text, path, "exec", dont_inherit=True) for text in (path.read_text(), mutant.source))
    try:
        changed = dict(_pairs(true, mutated))
        swapped = [function for function in functions if function.__code__ in changed]
        for function in swapped:
            function.__code__ = changed[function.__code__]
    except ValueError:  # not as many functions, or not as many variables of outer functions
        return False
    return bool(swapped)


def _pairs(true: CodeType, mutated: CodeType) -> Iterator[tuple[CodeType, CodeType]]:
    inner = ([each for each in code.co_consts if isinstance(each, CodeType)] for code in (true, mutated))
    for one, other in zip(*inner, strict=True):
        if one != other:
            yield one, other
            yield from _pairs(one, other)


# -- a process for each --------------------------------------------------------------------


class Listener:
    """Says at once which test fails, and that one has ended."""

    def __init__(self, tell: Tell) -> None:
        self.tell = tell

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            slow = "Timeout (>" in str(report.longrepr)
            self.tell(f"{TIMEOUT if slow else KILLED} {report.nodeid}")
        elif report.when == "teardown":
            self.tell("")


class Chosen:
    """Runs these tests alone, in this order."""

    def __init__(self, names: Sequence[str]) -> None:
        self.at = {name: at for at, name in enumerate(names)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((item for item in items if item.nodeid in self.at), key=lambda item: self.at[item.nodeid])


def run(files: Iterable[str], *plugins: object) -> int:
    """The tests of these files."""
    options = ["-v", "-s", "-p", "no:cacheprovider", "-o", f"timeout={SECONDS}", "--rootdir", str(ROOT)]
    # They are imported before we are here.
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    return int(pytest.main([*options, *files], plugins=list(plugins)))


def forked(do: Callable[[Tell], int], seconds: float, log: Path) -> tuple[int | None, str]:
    """What *do* returned in a process of its own, None if it went silent for so long; or the first thing it told."""
    told, tell = os.pipe()
    if (pid := os.fork()) == 0:
        code = 1
        try:
            os.setpgid(0, 0)
            output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            code = do(lambda what: os.write(tell, f"{what}\n".encode()) and None)
        finally:
            os._exit(code)
    os.close(tell)
    try:
        if (first := _first(told, seconds)) == "":
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), ""
        return None, first or ""
    finally:
        os.close(told)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)


def _first(told: int, seconds: float) -> str | None:
    """The first line with something in it, "" if it ended without; None if there was no line at all for so long."""
    while select.select([told], [], [], seconds)[0]:
        if not (lines := os.read(told, 2**16).decode()):
            return ""
        if words := lines.strip():
            return words.partition("\n")[0]
    return None


# -- which tests pass which line -----------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """
    What one run without a mutant has told.

    Attributes:
        seconds: How long each test takes.
        passed: Module -> line -> the tests that pass it; "" is what is run at import.
    """

    seconds: Mapping[str, float]
    passed: Mapping[str, Mapping[int, Sequence[str]]]

    def tests(self, mutant: Mutant) -> list[str]:
        """Those that pass the changed line, the fastest first; if it is run at import, those that pass its function."""
        found = self._passing(mutant, mutant.lines)
        if not found or "" in found:
            found |= self._passing(mutant, mutant.function)
        return sorted(found & set(self.seconds), key=self.seconds.__getitem__)

    def is_early(self, mutant: Mutant) -> bool:
        """Whether its line is run before any test."""
        return "" in self._passing(mutant, mutant.lines)

    def _passing(self, mutant: Mutant, lines: range) -> set[str]:
        passed = self.passed[mutant.module]
        return {test for line in lines for test in passed.get(line, ())}


class Observer:
    """Tells the tracer which test runs, and notes how long each takes."""

    def __init__(self, modules: Sequence[str]) -> None:
        include = [str(_path(module)) for module in modules]
        self.cover = coverage.Coverage(data_file=None, include=include, config_file=False)
        self.cover.set_option("run:concurrency", ["thread", "greenlet"])
        self.seconds: Counter[str] = Counter()
        self.unsure: set[str] = set()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if not UNSUITED.search(item.nodeid)]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self.cover.switch_context(item.nodeid)
        try:
            return (yield)
        finally:
            self.cover.switch_context("")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.unsure.add(report.nodeid)


def learn(modules: Sequence[str], files: Sequence[str], place: Path) -> Known:
    """Run all tests once; afterwards this process has all the other libraries that they need."""
    report, log = place / "known.json", place / "known.log"
    forked(lambda _: _observe(modules, files, report), 3600, log)
    if not report.exists():
        raise SystemExit(f"the tests do not run without a mutant:\n{log.read_text()[-3000:]}")
    known = json.loads(report.read_text())
    say(f"not asked, as they fail while they are observed: {', '.join(known['unsure']) or 'none'}")
    for name in known["modules"]:
        with suppress(Exception):
            importlib.import_module(name)
    passed = {module: {int(line): tests for line, tests in each.items()} for module, each in known["passed"].items()}
    return Known({test: seconds for test, seconds in known["seconds"].items() if seconds < SLOW}, passed)


def _observe(modules: Sequence[str], files: Sequence[str], report: Path) -> int:
    observer = Observer(modules)
    observer.cover.start()
    run(files, observer)
    observer.cover.stop()
    data = observer.cover.get_data()
    told = {
        "seconds": {test: seconds for test, seconds in observer.seconds.items() if test not in observer.unsure},
        "unsure": sorted(observer.unsure),
        "passed": {module: data.contexts_by_lineno(str(_path(module))) for module in modules},
        "modules": [name for name, module in list(sys.modules.items()) if _is_foreign(name, module)],
    }
    report.write_text(json.dumps(told))
    return 0


def _is_foreign(name: str, module: object) -> bool:
    file = getattr(module, "__file__", None)
    if name.partition(".")[0] == OURS or name == "__main__":
        return False
    return file is None or ROOT not in Path(file).parents


# -- the verdicts ----------------------------------------------------------------------------


class Court:
    """Tries mutants, and writes down what became of them."""

    def __init__(self, known: Known, results: Path, log: Path, budget: float) -> None:
        self.known = known
        self.results = results
        self.log = log
        self.budget = budget
        self.told: dict[tuple[str, range], set[str]] = {}  # function -> the tests that have killed a mutant of it

    def tests(self, mutant: Mutant) -> list[str]:
        """Those to ask, in this order, for as long as the budget lasts; at least one."""
        best = self.told.get((mutant.module, mutant.function), ())
        tests = sorted(self.known.tests(mutant), key=lambda test: test not in best)
        spent = accumulate(map(self.known.seconds.__getitem__, tests), initial=0.0)
        return [test for test, before in zip(tests, spent, strict=False) if before < self.budget]

    def judge(self, mutant: Mutant, do: Callable[[Mutant, Sequence[str], Tell], int]) -> bool:
        """Whether it could be tried like this."""
        start, tests = time.perf_counter(), self.tests(mutant)
        status, by = UNTESTED, ""
        if tests:
            # Each test has a limit of its own; this is for one that cannot be interrupted.
            code, failed = forked(lambda tell: do(mutant, tests, tell), 4 * SECONDS, self.log)
            if code == UNFIT:
                return False
            status, _, by = failed.partition(" ") if failed else (_status(code), "", "")
            self.told.setdefault((mutant.module, mutant.function), set()).add(by)
        result = {"name": mutant.name, "line": mutant.lines[0], "status": status, "by": by}
        with self.results.open("a") as file:
            file.write(f"{json.dumps(result | {'seconds': round(time.perf_counter() - start, 2)})}\n")
        if status in ALIVE:
            say(f"{status}: {mutant.lines[0]}: {mutant.name}")
        return True


def _status(code: int | None) -> str:
    return {None: TIMEOUT, 0: SURVIVED}.get(code, KILLED)


class Swapping:
    """In the place of pytest's loop over the tests: one over mutants, each in a process that has them all collected."""

    def __init__(self, court: Court, waiting: Sequence[Mutant], later: Path) -> None:
        self.court = court
        self.waiting = waiting
        self.later = later
        self.items: dict[str, pytest.Item] = {}
        self.functions: dict[str, list[FunctionType]] = {}

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.items = {item.nodeid: item for item in session.items}
        # `type()` and not `isinstance`, which would ask every proxy in the process for its class.
        for function in [each for each in gc.get_objects() if type(each) is FunctionType]:
            self.functions.setdefault(str(function.__module__), []).append(function)
        gc.freeze()
        left = [mutant.name for mutant in self.waiting if not self.court.judge(mutant, self.attempt)]
        self.later.write_text(json.dumps(left))
        return True

    def attempt(self, mutant: Mutant, tests: Sequence[str], tell: Tell) -> int:
        """Run these tests with its code."""
        if not swap(self.functions[f"{OURS}.{mutant.module}"], mutant):
            return UNFIT
        items = [self.items[test] for test in tests if test in self.items]
        items[0].config.pluginmanager.register(Listener(tell))
        for item, following in pairwise([*items, None]):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        return 0


def _imported(mutant: Mutant, tests: Sequence[str], tell: Tell) -> int:
    sys.meta_path.insert(0, Finder(mutant))
    return run(dict.fromkeys(test.partition("::")[0] for test in tests), Chosen(tests), Listener(tell))


def attempt(court: Court, waiting: Sequence[Mutant], files: Sequence[str], place: Path) -> None:
    """Try all of them: where the tests are collected already, if that can be."""
    if threading.active_count() > 1:
        raise SystemExit("a library has started a thread: a fork would hang")
    swapped, later = [mutant for mutant in waiting if not court.known.is_early(mutant)], place / "later.json"
    if (pid := os.fork()) == 0:
        code = 1
        try:
            code = run(files, Swapping(court, swapped, later))
        finally:
            sys.stdout.flush()
            os._exit(code)
    os.waitpid(pid, 0)
    unfit = set(json.loads(later.read_text()))
    gc.freeze()
    for mutant in waiting:
        if mutant.name in unfit or court.known.is_early(mutant):
            court.judge(mutant, _imported)


def main() -> int:
    asked = _arguments()
    os.chdir(ROOT)
    old = _read(asked.results)
    every = [mutant for module in asked.modules for mutant in mutants(module)]
    waiting = [
        mutant
        for mutant in every
        if asked.only in mutant.name
        and (mutant.name not in old or (asked.again and old[mutant.name]["status"] in ALIVE))
    ]
    if waiting:
        files = [test for test in asked.tests if Path(test).exists()]
        with tempfile.TemporaryDirectory() as place:
            known = learn(asked.modules, files, Path(place))
            say(f"{len(waiting)} mutants, {len(known.seconds)} tests of {sum(known.seconds.values()):.0f} s")
            court = Court(known, asked.results, Path(place) / "log", asked.budget)
            attempt(court, waiting, files, Path(place))
    return _tell(every, _read(asked.results), asked)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0].strip())
    parser.add_argument("modules", nargs="+", help="without otel_pools, as in _watch")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="files, in the place of the core's own")
    parser.add_argument("--results", type=Path, required=True, help="one line for each mutant; kept from run to run")
    parser.add_argument("--again", action="store_true", help="try those again that have survived")
    parser.add_argument("--only", default="", help="a part of the mutants' names")
    parser.add_argument("--budget", type=float, default=10.0, help="seconds of tests that a mutant is asked")
    parser.add_argument("--floor", type=float, default=0.0, help="per cent of all that must be killed")
    return parser.parse_args()


def _read(results: Path) -> dict[str, dict[str, Any]]:
    lines = results.read_text().splitlines() if results.exists() else []
    return {each["name"]: each for each in map(json.loads, lines)}


def _tell(every: Sequence[Mutant], results: Mapping[str, Mapping[str, Any]], asked: argparse.Namespace) -> int:
    rates = []
    for module in (*asked.modules, ""):
        here = [mutant.name for mutant in every if module in {mutant.module, ""}]
        status = Counter(results[name]["status"] for name in here if name in results)
        killed, total = status[KILLED] + status[TIMEOUT], status.total()
        if not total:  # of this one nothing was asked
            continue
        rates.append(100 * killed / total)
        counts = ", ".join(f"{count} {each}" for each, count in sorted(status.items()))
        say(f"{module or 'all'}: {killed} of {total} killed, {rates[-1]:.1f} % ({counts})")
    return int(min(rates, default=0.0) < asked.floor)


if __name__ == "__main__":
    sys.exit(main())
