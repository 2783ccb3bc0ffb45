"""The application of the demo: some traffic, then more than the pool can serve, then calm; knows nothing of us."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from opentelemetry import trace
from sqlalchemy import text
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

# Where the URL is handed over: it holds a password, and arguments can be read by everybody.
URL = "OTEL_POOLS_DEMO_URL"

SIZE, OVERFLOW = 5, 3
SHOPPERS = 3  # one at a time is no traffic, and less than SIZE is no strain
CROWD = 16  # twice what the pool can open
# In shares of a cycle. A query of the burst outlasts the timeout, so that those who queue behind it see the timeout.
TIMEOUT, SLOW_QUERY = 1 / 15, 1.5 / 15
CALM_QUERY, PAUSE = 0.01, 0.05  # seconds

tracer = trace.get_tracer("otel_pools.demo")


@dataclass(frozen=True)
class Phase:
    """A third of a cycle: what it is called, what goes on, how many do it and how long their query is."""

    name: str
    story: str
    workers: int
    query: float


def phases(cycle: float) -> tuple[Phase, ...]:
    """The three thirds of a cycle of so many seconds."""
    slow, timeout = cycle * SLOW_QUERY, cycle * TIMEOUT
    most = SIZE + OVERFLOW
    return (
        Phase("steady", f"{SHOPPERS} shoppers, quick queries, a pool of {SIZE}", SHOPPERS, CALM_QUERY),
        Phase("burst", f"{CROWD} ask, {most} get, queries of {slow:.1f} s, timeout {timeout:.1f} s", CROWD, slow),
        Phase("recovery", f"the crowd is gone, {SHOPPERS} shoppers remain", SHOPPERS, CALM_QUERY),
    )


async def shop(engine: AsyncEngine, seconds: float) -> None:
    """One request: a query that takes so many seconds; a pool that is exhausted is an answer too."""
    with tracer.start_as_current_span("GET /orders"), contextlib.suppress(PoolTimeout):
        async with engine.connect() as connection:
            await connection.execute(text("SELECT pg_sleep(:seconds)"), {"seconds": seconds})


async def visit(engine: AsyncEngine, phase: Phase, until: float) -> None:
    """One worker: request after request, while the phase lasts."""
    now = asyncio.get_running_loop().time
    while now() < until:
        await shop(engine, phase.query)
        await asyncio.sleep(PAUSE * random.random())


async def run(url: str, cycle: float, cycles: int, tell: Callable[[Phase], None]) -> None:
    """So many cycles, or without end if 0; *tell* hears of each phase as it begins."""
    engine = create_async_engine(url, pool_size=SIZE, max_overflow=OVERFLOW, pool_timeout=cycle * TIMEOUT)
    now = asyncio.get_running_loop().time
    try:
        done = 0
        while not cycles or done < cycles:
            for phase in phases(cycle):
                tell(phase)
                until = now() + cycle / 3
                await asyncio.gather(*(visit(engine, phase, until) for _ in range(phase.workers)))
            done += 1
    finally:
        await engine.dispose()


async def unless_stopped(work: Awaitable[None]) -> None:
    """Do the work, until SIGTERM comes or whoever started us is gone, which closes our input."""
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(work)
    told = sys.stdin.fileno()

    def stop() -> None:
        loop.remove_reader(told)  # an end stays readable, and a second cancel would hit the tidying up
        task.cancel()

    loop.add_signal_handler(signal.SIGTERM, stop)
    # What is no pipe, as when run by hand, cannot be watched.
    with contextlib.suppress(OSError, ValueError):
        loop.add_reader(told, stop)
    with contextlib.suppress(asyncio.CancelledError):
        await task


def tell(phase: Phase) -> None:
    """One line on standard output, which the demo reads; nobody may be left to read it."""
    with contextlib.suppress(BrokenPipeError):
        print(f"{phase.name}: {phase.story}", flush=True)


def main() -> None:
    """Run the load that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cycle", type=float, default=15.0, help="seconds of one cycle")
    parser.add_argument("--cycles", type=int, default=0, help="how many; 0 is without end")
    chosen = parser.parse_args()
    asyncio.run(unless_stopped(run(os.environ[URL], chosen.cycle, chosen.cycles, tell)))


if __name__ == "__main__":
    main()
