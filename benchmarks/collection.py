"""What one collection of many pools costs: CPU, by part; and for how long it keeps another thread from running."""

from __future__ import annotations

import cProfile
import gc
import json
import platform
import pstats
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event, Thread
from time import perf_counter, thread_time
from typing import Any

from sdk import Sdk
from stubs import POOLS
from turns import parser, watched

from otel_pools._doors import INSTRUMENTORS

SAMPLES = 10_000  # of each kind, waiting for a collection, over all pools
Told = dict[str, Any]


def filled(target: str, pools: int, connections: int, named: bool) -> list[Any]:
    """Pools of so many connections, one half lent and one half idle; returns what keeps them so."""
    kept: list[Any] = []
    for number in range(pools):
        pool = POOLS[target](connections, f"host{number}" if named else "host")
        held = [pool.borrow() for _ in range(connections)]
        for one in held[::2]:
            pool.give_back(one)
        kept.append((pool, held[1::2]))
    return kept


def _registry(target: str) -> Any:
    return INSTRUMENTORS[target]._registry


def wait_for(target: str, samples: int) -> None:
    """Let so many samples lie waiting, as after as many checkouts."""
    ledgers = list(_registry(target).ledgers.values())
    for ledger in ledgers:
        for kind in (ledger.outbox.waits, ledger.outbox.uses):
            kind += [number * 1e-7 for number in range(samples // len(ledgers))]


# -- CPU -------------------------------------------------------------------------------


def cpu(work: Callable[[], Any], rounds: int, before: Callable[[], Any] = lambda: None) -> float:
    """Milliseconds of this thread's CPU, median."""
    taken = []
    for _ in range(rounds):
        before()
        start = thread_time()
        work()
        taken.append((thread_time() - start) * 1e3)
    return round(statistics.median(taken), 2)


def costs(target: str, sdk: Sdk, rounds: int) -> Told:
    """Reading the pools; a whole collection, with samples waiting and without; and serialising it."""
    registry = _registry(target)
    return {
        "read_ms": cpu(lambda: list(registry.readings()), rounds),
        "collect_ms": cpu(sdk.collect, rounds),
        "with_samples_ms": cpu(sdk.collect, rounds, lambda: wait_for(target, SAMPLES)),
        "with_export_ms": cpu(sdk.export, rounds),
        "points": sdk.collect(),
    }


def rooms(sdk: Sdk, rounds: int) -> dict[str, float]:
    """Which files the time is spent in, by the profiler: shares, as it slows down what it looks at."""
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(rounds):
        sdk.collect()
    profile.disable()
    spent: Counter[str] = Counter()
    for (file, _, _), (_, _, own, *_) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]  # untyped
        spent[_room(file)] += own
    return {room: round(seconds / spent.total(), 2) for room, seconds in spent.most_common(5)}


def _room(file: str) -> str:
    path = Path(file)
    for package in ("otel_pools", "opentelemetry"):
        if package in path.parts:
            place = len(path.parts) - 1 - path.parts[::-1].index(package)
            return ".".join((path.parts[place], path.with_suffix("").parts[-1]))
    return "builtins" if file == "~" else path.stem


# -- another thread --------------------------------------------------------------------


def pause(work: Callable[[], Any], rounds: int) -> list[float]:
    """The longest time that a thread which only looks at the clock could not, in milliseconds, each time."""
    taken = []
    for _ in range(rounds):
        done, longest = Event(), [0.0]
        thread = Thread(target=_spin, args=(done, longest), daemon=True)
        thread.start()
        time.sleep(0.01)
        longest[0] = 0.0
        work()
        done.set()
        thread.join()
        taken.append(longest[0] * 1e3)
    return taken


def _spin(done: Event, longest: list[float]) -> None:
    last = perf_counter()
    while not done.is_set():
        now = perf_counter()
        if now - last > longest[0]:
            longest[0] = now - last
        last = now


def pauses(target: str, sdk: Sdk, rounds: int, seconds: float) -> Told:
    """While nobody does anything, while there is some other Python at work for as long, and while we collect."""

    def busy() -> None:
        end = thread_time() + seconds
        while thread_time() < end:
            pass

    def collect() -> None:
        wait_for(target, SAMPLES)
        sdk.collect()

    works = {"nothing": lambda: time.sleep(seconds), "any_python": busy, "collect": collect}
    taken = {name: pause(work, rounds) for name, work in works.items()}
    medians = {f"pause_{name}_ms": round(statistics.median(all), 2) for name, all in taken.items()}
    return medians | {"pause_collect_max_ms": round(max(taken["collect"]), 2)}


# -- all of it -------------------------------------------------------------------------


def measure(target: str, pools: int, connections: int, named: bool, rounds: int) -> Told:
    sdk = Sdk()
    with watched(target, meter_provider=sdk.provider):
        kept = filled(target, pools, connections, named)
        sdk.collect()
        gc.collect()
        told = costs(target, sdk, rounds)
        told |= pauses(target, sdk, rounds, told["with_samples_ms"] / 1e3)
        told["rooms"] = rooms(sdk, rounds)
        del kept
    gc.collect()
    return told


def table(told: Mapping[str, Any]) -> list[str]:
    """As lines of less than 100 columns."""
    lines = [f"One collection of {told['pools']} x {told['connections']} connections; CPU ms, medians"]
    lines.append(f"{'':24}{'points':>8}{'read':>8}{'collect':>9}{'+ samples':>11}{'+ export':>10}{'pause (max)':>16}")
    for name, row in told["rows"].items():
        cells = f"{row['points']:8}{row['read_ms']:8.2f}{row['collect_ms']:9.2f}{row['with_samples_ms']:11.2f}"
        pause = f"{row['pause_collect_ms']:.1f} ({row['pause_collect_max_ms']:.1f})"
        lines.append(f"{name:24}{cells}{row['with_export_ms']:10.2f}{pause:>16}")
    first = next(iter(told["rows"].values()))
    other = f"{first['pause_nothing_ms']:.1f} ms when nothing else runs, {first['pause_any_python_ms']:.1f} ms beside"
    return [*lines, f"pause: of another thread, in ms; {other} any other Python of that length"]


def main() -> None:
    options = parser(__doc__, rounds=7)
    options.add_argument("--pools", type=int, default=100)
    options.add_argument("--connections", type=int, default=100)
    chosen = options.parse_args()
    rows = {}
    for target in POOLS:
        for named in (True, False):
            name = f"{target}, {chosen.pools if named else 1} names"
            rows[name] = measure(target, chosen.pools, chosen.connections, named, chosen.rounds)
    told = {"python": platform.python_version(), "pools": chosen.pools, "connections": chosen.connections, "rows": rows}
    print(json.dumps(told | {"switch_interval": sys.getswitchinterval()}) if chosen.json else "\n".join(table(told)))


if __name__ == "__main__":
    main()
