"""How long things take: seconds counted in exponential bins, so that any quantile is known within 5 %."""

from __future__ import annotations

import struct
import sys
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence

from ._model import Timing

# A bin is the exponent and the first four binary digits of a double, as they stand in its upper two bytes: 16 bins
# for each doubling, whose middles are at most 1/32 away from what is in them. No sorting, no logarithm.
_UPPER = slice(3 if sys.byteorder == "little" else 0, None, 4)
QUANTILES = (50, 95, 99)  # in a hundred


class Distribution:
    """
    How long one thing took, however often it happened.

    Takes less than a hundred nanoseconds a sample, and never more than a few
    hundred bins: 16 for each doubling between the shortest and the longest.
    """

    __slots__ = ("_bins", "count", "longest", "total")

    def __init__(self) -> None:
        self._bins: Counter[int] = Counter()
        self.count = 0
        self.total = 0.0
        self.longest = 0.0

    def __repr__(self) -> str:
        return f"<Distribution [{self.count} times, {self.longest:g} s at most, {len(self._bins)} bins]>"

    def add(self, samples: Sequence[float]) -> None:
        """Count these seconds; none of them is negative."""
        if samples:
            self._bins.update(array("H", array("d", samples).tobytes())[_UPPER])
            self._sum(samples, max(samples))

    def add_sorted(self, samples: Sequence[float]) -> None:
        """The same for what is in order, from bin to bin: of very many samples hardly any is looked at."""
        start = 0
        while start < len(samples):
            bin = _bin(samples[start])
            end = bisect_left(samples, _double(bin + 1, 0), start)
            self._bins[bin] += end - start
            start = end
        if samples:
            self._sum(samples, samples[-1])

    def _sum(self, samples: Sequence[float], longest: float) -> None:
        self.count += len(samples)
        self.total += sum(samples)
        if longest > self.longest:
            self.longest = longest

    def merge(self, other: Distribution) -> None:
        """Count all that the other has, as if it had happened here."""
        self._bins.update(other._bins)
        self.count += other.count
        self.total += other.total
        self.longest = max(self.longest, other.longest)

    def timing(self) -> Timing:
        """In the figures that people know."""
        if not self.count:
            return Timing()
        p50, p95, p99 = self._quantiles()
        return Timing(self.count, self.total / self.count, p50, p95, p99, self.longest)

    def _quantiles(self) -> Iterator[float]:
        """For each, what the sample of that rank was: so many in a hundred took no longer."""
        ranks = iter([-(-self.count * part // 100) for part in QUANTILES])
        rank, passed = next(ranks), 0
        for bin, count in sorted(self._bins.items()):
            passed += count
            while passed >= rank:
                yield min(_middle(bin), self.longest)
                rank = next(ranks, self.count + 1)


def _bin(seconds: float) -> int:
    number: int = struct.unpack("Q", struct.pack("d", seconds))[0]
    return number >> 48


def _double(bin: int, rest: int) -> float:
    seconds: float = struct.unpack("d", struct.pack("Q", bin << 48 | rest))[0]
    return seconds


def _middle(bin: int) -> float:
    """Of the seconds that fall into this bin."""
    return _double(bin, 1 << 47) if bin else 0.0
