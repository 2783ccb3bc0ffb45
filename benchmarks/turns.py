"""How everything is measured here: the ways take turns in one run, and what counts is the median of their ratios."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import platform
import statistics
import warnings
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from threading import Thread
from time import perf_counter
from typing import Any

from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import NoOpTracerProvider

import otel_pools

READER = InMemoryMetricReader()
PROVIDER = MeterProvider([READER])
TRACERS = TracerProvider()  # spans are recorded, and exported to nobody
THREADS = 8
SLOWER = {"httpx": 10}  # by how much fewer cycles are done with what takes longer
METRICS = {"holders": False}  # what is measured as "ours": nobody's name, line and trace, only numbers
Run = Callable[[int], float]  # from a number of cycles to the seconds they took
Way = Callable[[], AbstractContextManager[Any]]
Row = dict[str, float]
OURS = ("api", "ours", "full")
HEAD = f"{'cycle':32}{'bare µs':>10}{'ours µs':>10}{'API only':>10}{'ours':>10}{'all on':>10}"


# -- the ways --------------------------------------------------------------------------


@contextmanager
def watched(target: str, **options: Any) -> Iterator[None]:
    """Have this library instrumented by us."""
    otel_pools.instrument(target, **options)
    try:
        yield
    finally:
        otel_pools.uninstrument(target)


def ways(target: str, peers: Mapping[str, Way]) -> dict[str, Way]:
    """
    Without us; us without an SDK; us with one and a reader; the same with all that is on by default; and others.

    That is, beside metrics, to know of each loan who has it and from where, for spans, logs and the leak watch.
    """
    no_sdk = {"meter_provider": NoOpMeterProvider(), "tracer_provider": NoOpTracerProvider()}
    sdk = {"meter_provider": PROVIDER, "tracer_provider": TRACERS}
    return {
        "bare": nullcontext,
        "api": partial(watched, target, **no_sdk, **METRICS),
        "ours": partial(watched, target, **sdk, **METRICS),
        "full": partial(watched, target, **sdk),
        **peers,
    }


# -- the turns -------------------------------------------------------------------------


def compare(target: str, run: Run, chosen: argparse.Namespace, peers: Mapping[str, Way] = {}, part: int = 1) -> Row:
    """Medians in microseconds a cycle, the ways taking turns, and the median of the rounds' ratios."""
    all, cycles = ways(target, peers), max(chosen.cycles // part, THREADS)
    times: dict[str, list[float]] = {way: [] for way in all}
    run(cycles)
    for turn in range(chosen.rounds):
        for way in list(all)[:: -1 if turn % 2 else 1]:
            with all[way]():
                times[way].append(_turn(run, cycles))
            READER.get_metrics_data()
    return _row(times)


def _turn(run: Run, cycles: int) -> float:
    """Microseconds a cycle, warm, and without the garbage collector."""
    run(max(cycles // 10, 1))
    gc.collect()
    gc.disable()
    try:
        return run(cycles) / cycles * 1e6
    finally:
        gc.enable()


def _row(times: Mapping[str, list[float]]) -> Row:
    row = {f"{way}_us": round(statistics.median(taken), 2) for way, taken in times.items()}
    for way, taken in list(times.items())[1:]:
        row[f"{way}/bare"] = ratio(taken, times["bare"])
    return row


def ratio(taken: list[float], bare: list[float]) -> float:
    """The median of the rounds' ratios."""
    return round(statistics.median(one / other for one, other in zip(taken, bare, strict=True)), 3)


# -- what is run in a turn -------------------------------------------------------------


def timed(cycle: Callable[[], Any], cycles: int) -> float:
    start = perf_counter()
    for _ in range(cycles):
        cycle()
    return perf_counter() - start


def repeated(cycle: Callable[[], Any]) -> Run:
    """One after the other."""
    return partial(timed, cycle)


def awaited(loop: Any, cycle: Callable[[], Coroutine[Any, Any, Any]]) -> Run:
    """One after the other, in this event loop."""

    async def cycles_of(cycles: int) -> float:
        start = perf_counter()
        for _ in range(cycles):
            await cycle()
        return perf_counter() - start

    return lambda cycles: loop.run_until_complete(cycles_of(cycles))


def threaded(cycle: Callable[[], Any]) -> Run:
    """By eight threads at once; together they make this many."""

    def run(cycles: int) -> float:
        workers = [Thread(target=timed, args=(cycle, cycles // THREADS)) for _ in range(THREADS)]
        start = perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return perf_counter() - start

    return run


# -- what every benchmark is told and says ---------------------------------------------


def parser(about: str | None, rounds: int = 21, cycles: int = 10_000) -> argparse.ArgumentParser:
    """The options that all have."""
    # What is imported by now is nothing to look through for pools, again and again.
    gc.freeze()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # that one thread holds a hundred connections is meant
    made = argparse.ArgumentParser(description=about)
    made.add_argument("--rounds", type=int, default=rounds, help="how often each way has its turn (%(default)s)")
    made.add_argument("--cycles", type=int, default=cycles, help="of one turn (%(default)s)")
    made.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return made


def arguments(about: str | None, server: str) -> argparse.Namespace:
    """The options of those that ask a real server too."""
    made = parser(about)
    made.add_argument(f"--no-{server}", "--no-server", dest="no_server", action="store_true", help="only stubs")
    return made.parse_args()


def show(rows: Mapping[str, Row], chosen: argparse.Namespace, library: str) -> None:
    """Print them, for people or for programs."""
    told = {"python": platform.python_version(), "library": library, "rounds": chosen.rounds, "cycles": chosen.cycles}
    if chosen.json:
        print(json.dumps({**told, "rows": rows}))
    else:
        print("\n".join(table({**told, "rows": rows})))


def table(told: Mapping[str, Any]) -> list[str]:
    """What a benchmark of cycles has told, as lines of less than 100 columns."""
    rows = told["rows"]
    peer = next((key.removesuffix("/bare") for row in rows.values() for key in list(row)[-1:] if _is_peer(key)), "")
    title = f"{told['library']}, Python {told['python']}, {told['rounds']} rounds of up to {told['cycles']} cycles"
    return [title, f"{HEAD}{peer:>12}", *(line(name, row) for name, row in rows.items())]


def _is_peer(key: str) -> bool:
    return key.endswith("/bare") and key.removesuffix("/bare") not in OURS


def line(name: str, row: Row) -> str:
    """One cycle: two times and up to four ratios."""
    ratios = [value for key, value in row.items() if key.endswith("/bare")]
    return f"{name:32}{row['bare_us']:10.2f}{row['ours_us']:10.2f}" + "".join(
        f"{value:{12 if place == 3 else 10}.3f}"  # noqa: PLR2004  # the peer's
        for place, value in enumerate(ratios)
    )
