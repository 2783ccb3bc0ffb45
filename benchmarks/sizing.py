"""
Does the pool that the advice makes keep its promise? Simulated, beside what the formulas predict.

Requests come independently of each other (Poisson) and wait in one line. A hold takes one unit of time on average, so
waits are in units of a hold. The table goes to `docs/advice.md`: python benchmarks/sizing.py
"""

from __future__ import annotations

import math
from collections.abc import Callable
from heapq import heapreplace
from random import Random
from typing import NamedTuple

from otel_pools._sizing import mean_wait, size_for, waits

TARGET = 0.01
REQUESTS = 1_000_000
SEEDS = (1, 2, 3, 4)


class Holds(NamedTuple):
    """How long connections are held: 1 on average, and the variance."""

    variance: float
    draw: Callable[[Random], float]


class Outcome(NamedTuple):
    """Which part of the requests had to wait, and for how long on average, those that had not included."""

    waiting: float
    mean_wait: float


def lognormal(variance: float) -> Holds:
    spread = math.sqrt(math.log(1 + variance))
    return Holds(variance, lambda random: random.lognormvariate(-spread * spread / 2, spread))


def pareto(tail: float) -> Holds:
    """Of finite variance for a *tail* above 2."""
    return Holds(1 / (tail * (tail - 2)), lambda random: random.paretovariate(tail) * (tail - 1) / tail)


HOLDS = {
    "exponential": Holds(1.0, lambda random: random.expovariate(1.0)),
    "log-normal, variance 4": lognormal(4.0),
    "log-normal, variance 8": lognormal(8.0),
    "Pareto, tail 2.5": pareto(2.5),
    "Pareto, tail 2.2": pareto(2.2),
}


def simulate(size: int, load: float, holds: Holds, requests: int, seed: int) -> Outcome:
    """First come, first served, by *size* connections; as long as they are all in use, one waits for the first."""
    random, draw = Random(seed), holds.draw
    free = [0.0] * size  # when each connection is free; the earliest first
    now, waited, total = 0.0, 0, 0.0
    for _ in range(requests):
        now += random.expovariate(load)
        begins = free[0]
        if begins > now:
            waited += 1
            total += begins - now
        else:
            begins = now
        heapreplace(free, begins + draw(random))
    return Outcome(waited / requests, total / requests)


def averaged(size: int, load: float, holds: Holds) -> Outcome:
    outcomes = [simulate(size, load, holds, REQUESTS, seed) for seed in SEEDS]
    return Outcome(*(sum(values) / len(SEEDS) for values in zip(*outcomes, strict=True)))


def main() -> None:
    print("| holds | load | size | waiting: predicted | simulated | with one less | mean wait: predicted | simulated |")
    print("|---|---|---|---|---|---|---|---|")
    for name, holds in HOLDS.items():
        for load in (1, 5, 20):
            size = size_for(load, TARGET)
            row(name, holds, load, size, percent(averaged(size - 1, load, holds).waiting))
        row(name, holds, 3.8, 4, "-")


def row(name: str, holds: Holds, load: float, size: int, one_less: str) -> None:
    found = averaged(size, load, holds)
    predicted = mean_wait(size, load, 1.0, holds.variance)
    print(
        f"| {name} | {load} | {size} | {percent(waits(size, load))} | {percent(found.waiting)} | {one_less}"
        f" | {predicted:.3g} | {found.mean_wait:.3g} |",
        flush=True,
    )


def percent(part: float) -> str:
    return f"{100 * part:.2f} %"


if __name__ == "__main__":
    main()
