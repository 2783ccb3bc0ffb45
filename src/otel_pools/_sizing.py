"""How large a pool has to be: queueing theory on how often connections are asked for, and how long they are held."""

from __future__ import annotations

from math import log

# By how much a load may be off that is looked for by halving.
PRECISION = 1e-6


def load(per_s: float, hold_s: float) -> float:
    """
    How many connections are in use on average, if nobody has to wait: Little's law.

    Args:
        per_s: How often one is asked for, per second.
        hold_s: How long it is held on average, in seconds.
    """
    return per_s * hold_s


def refused(size: int, load: float) -> float:
    """
    Which part of the requests finds all connections in use, where nobody waits: Erlang's B formula.

    For pools that refuse at once. It holds whatever the holds are distributed like.

    Args:
        size: How many connections there may be.
        load: As `load` says.
    """
    blocked = 1.0
    for servers in range(1, size + 1):
        blocked = _one_more(blocked, servers, load)
    return blocked


def waits(size: int, load: float) -> float:
    """
    Which part of the requests has to wait: Erlang's C formula.

    Exact for requests that come independently of each other and holds that
    are exponentially distributed; of others see ``docs/advice.md``. With no
    more connections than the load all wait sooner or later.
    """
    return _queued(refused(size, load), size, load)


def size_for(load: float, wait_probability: float) -> int:
    """
    The fewest connections with which no greater part of the requests has to wait.

    Args:
        load: As `load` says.
        wait_probability: The part that may, above 0 and below 1.

    Raises:
        ValueError: That part is neither; no number of connections could do it.
    """
    if not 0 < wait_probability < 1:
        raise ValueError(f"wait_probability must be between 0 and 1: {wait_probability}")
    size, blocked = 0, 1.0
    while _queued(blocked, size, load) > wait_probability:
        size += 1
        blocked = _one_more(blocked, size, load)
    return size


def load_behind(size: int, wait_probability: float) -> float:
    """
    The load under which such a part of the requests has to wait: `waits`, asked the other way round.

    What a pool has seen may be more than Little's law says, as when requests come in bursts.
    """
    low, high = 0.0, float(size)
    while high - low > PRECISION * size:
        middle = (low + high) / 2
        low, high = (middle, high) if waits(size, middle) < wait_probability else (low, middle)
    return low


def mean_wait(size: int, load: float, hold_s: float, variability: float = 1.0) -> float:
    """
    How long a request waits on average, in seconds, those that do not wait included.

    Allen's and Cunneen's approximation, exact for exponential holds. For
    heavy tails it is an upper bound, and the nearer, the fuller the pool.

    Args:
        size: How many connections there may be.
        load: As `load` says.
        hold_s: How long one is held on average, in seconds.
        variability: As `variability` says.
    """
    return waits(size, load) * _mean_of_who_waits(size, load, hold_s, variability)


def wait_quantile(size: int, load: float, hold_s: float, part: float, variability: float = 1.0) -> float:
    """
    How long such a *part* of the requests waits at most, in seconds; the rest as in `mean_wait`.

    Raises:
        ValueError: *part* is not between 0 and 1.
    """
    if not 0 < part < 1:
        raise ValueError(f"part must be between 0 and 1: {part}")
    waiting = waits(size, load)
    if waiting <= 1 - part:
        return 0.0
    return log(waiting / (1 - part)) * _mean_of_who_waits(size, load, hold_s, variability)


def variability(mean_s: float, median_s: float) -> float:
    """
    The variance of the holds, in units of their squared mean, as far as their median tells: 1 if exponential.

    That of a log-normal distribution with this mean and median; of an
    exponential one it makes 1.1, and a tail beyond these two it cannot see.
    """
    return (mean_s / median_s) ** 2 - 1 if 0 < median_s < mean_s else 0.0


def _one_more(blocked: float, size: int, load: float) -> float:
    """Erlang's B formula for *size* connections, from that for one less; no step loses precision."""
    return load * blocked / (size + load * blocked)


def _queued(blocked: float, size: int, load: float) -> float:
    return 1.0 if load >= size else blocked / (1 - load / size * (1 - blocked))


def _mean_of_who_waits(size: int, load: float, hold_s: float, variability: float) -> float:
    """In seconds; without end where the load is too much."""
    return float("inf") if load >= size else hold_s / (size - load) * (1 + variability) / 2
