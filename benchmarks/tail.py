"""How long the slowest cycles take while somebody collects ten times a second: bare, ours and all on taking turns."""

from __future__ import annotations

import gc
import json
import platform
from array import array
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from time import perf_counter
from typing import Any

from opentelemetry.metrics import Observation
from sdk import Sdk
from stubs import POOLS
from turns import METRICS, SLOWER, Row, parser, ratio, watched

SHARES = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}
WAYS = ("one", "ours", "full")
EVERY = 0.1


def sampled(cycle: Callable[[], Any], cycles: int) -> array[float]:
    """The seconds of each single cycle."""
    taken = array("d", bytes(8 * cycles))
    for number in range(cycles):
        start = perf_counter()
        cycle()
        taken[number] = perf_counter() - start
    return taken


def quantiles(taken: array[float]) -> dict[str, float]:
    """In microseconds."""
    ordered = sorted(taken)
    told = {name: ordered[int(len(ordered) * share)] for name, share in SHARES.items()} | {"max": ordered[-1]}
    return {name: seconds * 1e6 for name, seconds in told.items()}


def measure(target: str, rounds: int, cycles: int) -> Row:
    """Quantiles of all cycles, and the median of the rounds' ratios."""
    cycle, sdk, other = POOLS[target]().cycle, Sdk(), Sdk()
    other.provider.get_meter("app").create_observable_counter("requests", [lambda _: [Observation(1)]])
    # The thread collects in bare turns too: it is what we do there that is compared. And, for what any export does
    # to the slowest cycles, one single counter of an application that has nothing to do with pools.
    ways: dict[str, tuple[Sdk, Callable[[], AbstractContextManager[Any]]]] = {
        "bare": (Sdk(), nullcontext),
        "one": (other, nullcontext),
        "ours": (sdk, lambda: watched(target, meter_provider=sdk.provider, **METRICS)),
        "full": (sdk, lambda: watched(target, meter_provider=sdk.provider)),
    }
    taken: dict[str, list[array[float]]] = {way: [] for way in ways}
    for number in range(rounds):
        for way in list(ways)[:: -1 if number % 2 else 1]:
            exporting, watching = ways[way]
            with watching(), exporting.exporting(EVERY):
                sampled(cycle, max(cycles // rounds // 10, 1))
                gc.collect()
                taken[way].append(sampled(cycle, cycles // rounds))
    return _row(taken)


def _row(taken: Mapping[str, list[array[float]]]) -> Row:
    all = {way: quantiles(array("d", (one for turn in turns for one in turn))) for way, turns in taken.items()}
    told = {way: [quantiles(turn) for turn in turns] for way, turns in taken.items()}
    row = {"cycles": float(sum(map(len, taken["ours"])))}
    for name in (*SHARES, "max"):
        row |= {f"{name}_{way}_us": round(quantile[name], 2) for way, quantile in all.items()}
    for name, way in product(SHARES, WAYS):
        row[f"{name}_{way}/bare"] = ratio(*([turn[name] for turn in told[each]] for each in (way, "bare")))
        row[f"{name}_{way}/bare, all"] = round(all[way][name] / all["bare"][name], 3)
    return row


def table(told: Mapping[str, Any]) -> list[str]:
    """As lines of less than 100 columns."""
    heading = "bare in µs; as ratios of all an application's one counter, ours, all on"
    lines = [f"Single cycles, {heading}; collected every {EVERY * 1000:.0f} ms"]
    lines.append(f"{'':11}{'cycles':>9}" + "".join(f"{name:>26}" for name in SHARES))
    for target, row in told["rows"].items():
        cells = (
            f"{row[f'{q}_bare_us']:.4g}: " + ", ".join(f"{row[f'{q}_{way}/bare, all']:.2f}" for way in WAYS)
            for q in SHARES
        )
        lines.append(f"{target:11}{row['cycles']:9.0f}" + "".join(f"{cell:>26}" for cell in cells))
    return lines


def main() -> None:
    chosen = parser(__doc__, rounds=5, cycles=100_000).parse_args()
    rows = {target: measure(target, chosen.rounds, chosen.cycles // SLOWER.get(target, 1)) for target in POOLS}
    told = {"python": platform.python_version(), "rounds": chosen.rounds, "rows": rows}
    print(json.dumps(told) if chosen.json else "\n".join(table(told)))


if __name__ == "__main__":
    main()
