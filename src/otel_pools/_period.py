"""What the statistics of one pool name are about: all that happened since a moment, until somebody resets them."""

from __future__ import annotations

import time
from threading import RLock
from time import perf_counter

from ._model import Tally
from ._timings import Distribution

# The shortest time, in seconds, of which it is said how many checkouts came in a second.
WINDOW = 10.0


class Period:
    """
    The time since the statistics of one pool name began, and what they need beside the counters.

    The exported counters never go back: a reset only notes how far they had
    come. The distributions are filled by the outbox, under its lock.
    """

    __slots__ = (
        "_baseline",
        "_began",
        "_busiest",
        "_counting",
        "_cut",
        "_due",
        "_peak",
        "create",
        "failures",
        "since",
        "use",
        "wait",
    )

    def __init__(self) -> None:
        self._counting = RLock()  # for those who look, a signal handler too; never taken on the request path
        self._due = 0  # the peak that the next collection tells
        self.failures: dict[str, float] = {}  # error type -> when it was last, on the clock of `_watch`; survives
        # Not `restart`: a pool is met on a request, which takes no lock.
        self._begin(Tally(), 0)

    def __repr__(self) -> str:
        return f"<Period [{perf_counter() - self._began:.0f} s, {self.wait.count} waits, peak {self._peak}]>"

    def restart(self, tally: Tally, held: int) -> None:
        """Begin anew: *tally* is what the counters say by now, and *held* how many connections are out."""
        with self._counting:
            self._begin(tally, held)

    def _begin(self, tally: Tally, held: int) -> None:
        self.wait, self.use, self.create = Distribution(), Distribution(), Distribution()
        self.since, self._began = time.time(), perf_counter()
        self._baseline, self._peak = tally, held
        self._cut, self._busiest = (self._began, _attempts(tally)), 0.0

    # -- whoever looks, for the metrics or for the statistics ------------------------

    def peaked(self, highest: int) -> None:
        """So many were held at once since somebody last looked."""
        with self._counting:
            self._peak, self._due = max(self._peak, highest), max(self._due, highest)

    def take_peak(self, used: int) -> int:
        """The highest number held since the previous collection; *used* is what is held now."""
        with self._counting:
            due, self._due = self._due, used
            return due

    def peak(self, _: int = 0) -> int:
        """The highest number held since this period began."""
        return self._peak

    def looked(self, tally: Tally) -> None:
        """Cut the time into windows: their ends are where somebody looks."""
        with self._counting:
            now, attempts = perf_counter(), _attempts(tally)
            then, before = self._cut
            if now - then >= WINDOW:
                self._busiest = max(self._busiest, (attempts - before) / (now - then))
                self._cut = now, attempts

    # -- what is said ------------------------------------------------------------------

    def tally(self, tally: Tally) -> Tally:
        """What of this was counted in this period."""
        return tally.since(self._baseline)

    def rate(self, attempts: int) -> float:
        """So many attempts in this period, in one second."""
        return attempts / max(perf_counter() - self._began, 1e-9)

    @property
    def busiest(self) -> float | None:
        """The most attempts in one second of any window; None as long as there is none."""
        return self._busiest if self._cut[0] > self._began else None

    def ago(self) -> dict[str, float]:
        """How long ago, in seconds, the last failure of each type was."""
        if not self.failures:
            return {}
        now = perf_counter()
        return {error: max(now - moment, 0.0) for error, moment in list(self.failures.items())}


def _attempts(tally: Tally) -> int:
    return sum(tally.checkouts.values())
