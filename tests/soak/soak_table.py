"""What a soak has found, in words: its numbers, its memory, and whether all is as it should be."""

from __future__ import annotations

from collections import Counter
from statistics import median

KIB, MIB = 2**10, 2**20
MOST = MIB  # of growth after the first fifth
WATCHED, BARE = "watched", "bare"
TITLES = {
    "postgres-threads": "SQLAlchemy, psycopg, threads",
    "postgres-tasks": "SQLAlchemy, asyncpg, asyncio",
    "valkey-threads": "redis-py, BlockingConnectionPool, threads",
    "valkey-tasks": "redis-py, ConnectionPool, asyncio",
    "web-threads": "httpx, HTTP/1.1, threads",
    "web-tasks": "httpx2, HTTP/2, asyncio",
    "vectors": "qdrant-client, gRPC, asyncio",
}
# What we have to say of such an application: it drops connections, asks for a second one, and finds its pools empty.
EXPECTED = (
    "otel_pools: otel_pools: pool %s is exhausted",
    "otel_pools: otel_pools: a connection of pool %s %s",
    "otel_pools: otel_pools: and %d more of pool %s",
    "otel_pools: otel_pools: pool %s: who held a connection",
)
# Whose log lines are no business of a database's or a client's troubles.
OURS = ("otel_pools: ", "opentelemetry: ")


def growth(found, role, measure):
    """
    Bytes after the first fifth, at the end, and in between.

    Each is the median of a fifth of the looks: of single ones, some fall on
    a moment with more open connections than others.
    """
    values = [one[role]["memory"][measure] for one in found["rounds"]]
    fifth = max(len(values) // 5, 1)
    first, last = median(values[fifth : 2 * fifth]), median(values[-fifth:])
    return first, last, last - first


def added(found):
    """Bytes by which the watched application has grown more than the other."""
    return growth(found, WATCHED, "used")[2] - growth(found, BARE, "used")[2]


def surprises(found):
    """Log lines of ours, and of OpenTelemetry's, that such an application does not call for."""
    said = found["rounds"][-1][WATCHED]["log"]
    return {kind: count for kind, count in said.items() if kind.startswith(OURS) and not kind.startswith(EXPECTED)}


def lines(found):
    """All of it, in Markdown."""
    return [*_numbers(found), "", *_memory(found), "", *_words(found)]


def _numbers(found):
    head = (
        *("target", "attempts", "done", "errors", "cancelled", "faults"),
        *("numbers compared", "wrong", "lost samples"),
    )
    rows = [_row(found, kind) for kind in TITLES]
    return [*_table(head), *rows]


def _row(found, kind):
    counts = Counter(next(told for name, told in _last(found)["counts"].items() if name.startswith(kind)))
    faults = sum(count for name, count in found["faults"].items() if name.startswith(f"{kind} "))
    wrong = sum(one["kind"] == kind for one in found["wrong"])
    numbers = [counts["asked"], counts["done"], counts["errors"], counts["cancelled"], faults]
    numbers += [found["compared"][kind], f"**{wrong}**", f"**{found['lost'][kind]}**"]
    return f"| {TITLES[kind]} | {' | '.join(map(_digits, numbers))} |"


def _memory(found):
    head = ("process", "after the first fifth", "at the end", "growth", "resident, then", "at the end", "growth", "CPU")
    return [*_table(head), *(_use(found, role) for role in (WATCHED, BARE))]


def _use(found, role):
    used, resident = growth(found, role, "used"), growth(found, role, "resident")
    told = found["rounds"][-1][role]
    cells = [_mib(used[0]), _mib(used[1]), f"**{used[2] / KIB:+.0f} KiB**"]
    cells += [_mib(resident[0]), _mib(resident[1]), f"{resident[2] / KIB:+.0f} KiB"]
    operations = sum(counts.get("done", 0) + counts.get("errors", 0) for counts in told["counts"].values())
    cells.append(f"{told['cpu'] / told['wall']:.0%} of a core, {told['cpu'] / operations * 1000:.2f} ms an operation")
    return f"| {'with us' if role == WATCHED else 'without'} | {' | '.join(cells)} |"


def _words(found):
    last, rounds = _last(found), found["rounds"]
    said = Counter({kind: count for kind, count in last["log"].items() if kind.startswith(EXPECTED)})
    surprising = surprises(found)
    yield (
        f"{rounds[-1]['seconds'] / 60:.1f} minutes, {len(rounds)} rounds; {found['exports']} exports and"
        f" {found['spans']} spans arrived over OTLP."
    )
    yield (
        f"Log lines of ours that such an application calls for (connections dropped, pools empty, a second connection"
        f" asked for): {sum(said.values())}; others: **{sum(surprising.values())}**."
    )
    mended = sum(counts.get("mended", 0) for counts in last["counts"].values())
    yield (
        f"Places that httpcore 1.0.9 itself has lost, and that we told as `orphaned`, equal to the pool's own list:"
        f" in {mended} rounds; the application took a new client each time."
    )
    tables = sum(one["kind"] == "tables" for one in found["wrong"])
    yield (
        f"Our own tables, of who waits, who holds, and whose each connection is, were empty or equal at rest: looked at"
        f" in {len(rounds)} rounds, wrong **{tables}** times."
    )


def _last(found):
    return found["rounds"][-1][WATCHED]


def _table(head):
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]


def _digits(number):
    return f"{number:,}".replace(",", " ") if isinstance(number, int) else str(number)


def _mib(number):
    return f"{number / MIB:.2f} MiB"
