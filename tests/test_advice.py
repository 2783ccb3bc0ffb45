"""What to change about a pool: each rule where it should speak, and silence where it should not."""

from __future__ import annotations

import contextlib
import json
import math
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from random import Random

import httpx
import pytest
import redis
import webs
from hypothesis import given, settings
from hypothesis import strategies as some
from sqlalchemy import create_engine, text
from sqlalchemy.pool import QueuePool

import otel_pools
from otel_pools._advice import RULES, Case, advise
from otel_pools._model import Holder, PoolStats, Timing
from otel_pools._sizing import waits

SIZES = {"too_small", "fleet_budget", "big_pool_behind_pgbouncer", "overflow_always", "too_large"}


def timing(mean, count=10_000, p50=None, p99=None, longest=None):
    """Exponential, unless said otherwise."""
    p50 = mean * math.log(2) if p50 is None else p50
    p99 = mean * math.log(100) if p99 is None else p99
    return Timing(count, mean, p50, p50 * 3, p99, p99 * 2 if longest is None else longest)


# An hour of a pool that is as it should be: load 4, of 10 + 5.
HEALTHY = PoolStats(
    name="shop",
    library="sqlalchemy",
    system="postgresql",
    server_address="db",
    namespace="shop",
    pools=1,
    config={"class": "QueuePool", "pool_size": 10, "max_overflow": 4, "timeout": 30.0, "recycle": -1, "pre_ping": True},
    used=4,
    idle=6,
    max=14,
    idle_max=10,
    overflow=0,
    overflow_max=4,
    pending=0,
    peak=11,
    utilization=4 / 14,
    checkouts=144_000,
    paths={"idle": 143_900, "new": 90, "queued": 10},
    created=90,
    closed={"overflow": 80},
    wait=timing(0.0001),
    use=timing(0.08, 144_000),
    create=timing(0.02, 90),
    rate_per_s=40.0,
    busiest_per_s=50.0,
    overdue=0,
    orphaned=0,
)
REDIS = replace(
    HEALTHY,
    name="cache",
    library="redis",
    system="redis",
    config={"class": "ConnectionPool", "max_connections": 20},
    max=20,
    idle_max=None,
    overflow=None,
    overflow_max=None,
    closed={},
    created=11,
    paths={"idle": 143_989, "new": 11},
)
HTTP = replace(
    REDIS,
    name="billing:443",
    library="httpx",
    system=None,
    config={"class": "ConnectionPool", "max_connections": 100, "max_keepalive_connections": 20},
    max=100,
    idle_max=20,
)
REST = replace(
    HTTP, name="localhost:6333", library="qdrant", system="qdrant", server_address="localhost", server_port=6333
)
GRPC = PoolStats(
    name="vectors:6334",
    library="qdrant",
    system="qdrant",
    server_address="vectors",
    server_port=6334,
    pools=1,
    config={"class": "QdrantRemote", "pool_size": 3},
    used=1,
    idle=0,
    pending=0,
    checkouts=5000,
    rate_per_s=5.0,
    streams=2,
    streams_pending=0,
    channels={"idle": 0, "connecting": 0, "ready": 3, "transient_failure": 0, "shutdown": 0},
)
WELL = [HEALTHY, REDIS, HTTP, REST, GRPC]

CROWDED = replace(
    HEALTHY,
    max=3,
    idle_max=2,
    overflow_max=1,
    paths={"idle": 80_000, "new": 10, "queued": 63_990},
    peak=3,
    use=timing(0.05, 144_000),
    closed={},
)
TO_BOUNCER = replace(HEALTHY, server_port=6432)
NULL = replace(
    TO_BOUNCER,
    config={"class": "NullPool", "recycle": -1, "pre_ping": False},
    max=None,
    idle_max=0,
    overflow=None,
    overflow_max=None,
    created=144_000,
    closed={"closed": 144_000},
    create=timing(0.03),
)
CHURNING = replace(HTTP, created=143_000, create=timing(0.02))

# From a kind to what makes it speak, how loud, and what to set.
SPEAK = {
    "too_small": (CROWDED, "high", {"pool_size": 6, "max_overflow": 2}),
    "overflow_always": (
        replace(HEALTHY, closed={"overflow": 50_000}, idle_max=3, overflow_max=11, peak=12),
        "medium",
        {"pool_size": 8, "max_overflow": 6},
    ),
    "too_large": (
        replace(HEALTHY, max=60, idle_max=20, overflow_max=40, paths={"idle": 144_000}, closed={}),
        "low",
        {"pool_size": 8, "max_overflow": 14},
    ),
    "big_pool_behind_pgbouncer": (
        replace(TO_BOUNCER, max=60, idle_max=60, overflow_max=0, paths={"idle": 144_000}, closed={}),
        "low",
        {"pool_size": 22, "max_overflow": 0},
    ),
    "nullpool_behind_pgbouncer": (NULL, "low", {"pool_size": 8, "max_overflow": 2}),
    "timeout_too_long": (
        replace(HEALTHY, errors={"cancelled": 200}, wait=timing(0.01, longest=9.0)),
        "medium",
        {"pool_timeout": 5},
    ),
    "recycle_herd": (
        replace(
            HEALTHY,
            config={**HEALTHY.config, "recycle": 60},
            closed={"recycle": 3000, "overflow": 80},
            paths={"idle": 140_910, "new": 3080, "queued": 10},
            wait=timing(0.001, p50=0.0001, p99=0.12),
        ),
        "medium",
        {"pool_recycle": 1800},
    ),
    "stale": (
        replace(HEALTHY, config={**HEALTHY.config, "pre_ping": False}, stale=3),
        "medium",
        {"pool_pre_ping": True},
    ),
    "leak": (replace(HEALTHY, overdue=2, oldest_use_s=93.0, leaked={"overdue": 2}), "medium", {}),
    "orphaned": (replace(HTTP, orphaned=2, timeouts=4), "high", {}),
    "nested": (replace(HEALTHY, nested=900), "medium", {}),
    "inherited": (replace(HEALTHY, inherited=1), "high", {}),
    "held_idle": (replace(HEALTHY, busy_s=800.0, max=7, overflow_max=0, idle_max=7, closed={}), "low", {}),
    "connect_errors": (
        replace(HEALTHY, errors={"connect_error": 3000}, last_error_s={"connect_error": 2.0}),
        "high",
        {},
    ),
    "redis_default_limits": (replace(REDIS, max=None), "low", {"max_connections": 22}),
    "keepalive_churn": (
        replace(CHURNING, closed={"evicted": 142_000}),
        "medium",
        {"max_connections": 100, "max_keepalive_connections": 100},
    ),
    "streams_saturated": (
        replace(HTTP, streams=5, streams_max=5, streams_pending=15, used=1),
        "high",
        {"http2": False},
    ),
    "qdrant_localhost": (
        replace(REST, max=None, idle_max=0, created=143_999, closed={"evicted": 143_990}),
        "low",
        {"limits": "httpx.Limits()"},
    ),
    "qdrant_one_connection": (
        replace(GRPC, rate_per_s=50.0),
        "low",
        {"grpc_options": {"grpc.use_local_subchannel_pool": 1}},
    ),
    "many_pools": (replace(HTTP, pools=400, checkouts=900, created=900), "medium", {}),
}


def kinds(*stats, holders=(), **options):
    return [advice.kind for advice in advise(stats, holders, **options)]


# -- each rule -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SPEAK)
def test_a_rule_speaks(kind):
    """It is the only one that does, and says how urgent it is and what to set."""
    pool, severity, settings = SPEAK[kind]
    (advice,) = advise([pool], [])

    assert (advice.pool, advice.kind, advice.severity, dict(advice.settings)) == (pool.name, kind, severity, settings)


def test_every_rule_is_tested():
    """A rule that nobody tests is none."""
    assert {rule.__name__ for row in RULES for rule in row} == {*SPEAK, "fleet_budget"}


def test_every_rule_is_documented():
    """`docs/advice.md` has one row for each, in the groups of the table."""
    page = (Path(__file__).parents[1] / "docs" / "advice.md").read_text()
    rows = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]

    assert sorted(rows) == sorted({rule.__name__ for row in RULES for rule in row})
    for row in RULES:
        places = [rows.index(rule.__name__) for rule in row]
        assert places == sorted(places)


@pytest.mark.parametrize("pool", WELL, ids=lambda pool: pool.name)
def test_a_healthy_pool_gets_no_advice(pool):
    """Nor do all of them together, if the server has enough for their instances."""
    assert kinds(pool) == []
    assert kinds(*WELL, instances=4, server_limit=100) == []


def test_nothing_is_nothing():
    """Neither no pool nor a pool that nobody has used is advised anything."""
    assert advise([], []) == ()
    assert kinds(PoolStats("p", "sqlalchemy"), PoolStats("r", "redis", max=None), PoolStats("h", "httpx")) == []


FACTS = {"leak", "orphaned", "inherited", "nested", "stale", "streams_saturated"}  # what is so now needs no statistics


@pytest.mark.parametrize("kind", SPEAK.keys() - FACTS)
def test_thin_evidence_is_none(kind):
    """The same picture after 15 checkouts is no reason to change anything."""
    pool, _, _ = SPEAK[kind]
    part = 15 / pool.checkouts
    few = {name: int(number * part) for name, number in pool.paths.items()}
    thin = replace(
        pool,
        checkouts=15,
        paths=few,
        errors={name: int(number * part) for name, number in pool.errors.items()},
        closed={name: int(number * part) for name, number in pool.closed.items()},
        created=int(pool.created * part),
        use=replace(pool.use, count=15),
        pools=min(pool.pools, 5),
        streams_pending=pool.streams_pending,
    )

    assert kinds(thin) == []


@pytest.mark.parametrize("kind", ["too_small", "overflow_always", "recycle_herd", "held_idle", "timeout_too_long"])
def test_a_short_look_is_none(kind):
    """However many checkouts there were in one second, the next one may be another."""
    pool, _, _ = SPEAK[kind]

    assert kinds(replace(pool, rate_per_s=pool.checkouts / 1.0)) == []


def but(kind, **changes):
    """What makes the rule speak, less what is said here."""
    return replace(SPEAK[kind][0], **changes)


# From a kind to pools that are nearly so.
SILENT = {
    "too_small": [
        # 1.5 % wait, where 1.3 % are to be expected of seven, and eight would be needed: chance.
        but("too_small", max=7, idle_max=7, paths={"idle": 141_840, "queued": 2160}),
        but("too_small", use=timing(0.05, 15)),
        but("too_small", paths={"idle": 143_990, "queued": 10}, checkouts=144_000),
    ],
    "overflow_always": [but("overflow_always", closed={"overflow": 28_000})],
    "too_large": [
        but("too_large", paths={"idle": 143_999, "queued": 1}),
        but("too_large", peak=16),
        but("too_large", peak=None),
        but("too_large", pending=1),
        but("too_large", max=17, peak=4, use=timing(0.01, 144_000)),  # it would save nine
        but("too_large", checkouts=900, paths={"idle": 900}, rate_per_s=1.0, use=timing(3.0, 900)),
        but("too_large", checkouts=20_000, paths={"idle": 20_000}),  # eight minutes
        but("too_large", system=None),
    ],
    "big_pool_behind_pgbouncer": [
        but("big_pool_behind_pgbouncer", peak=31),
        but("big_pool_behind_pgbouncer", checkouts=2000, paths={"idle": 2000}),  # fifty seconds
    ],
    "nullpool_behind_pgbouncer": [
        but("nullpool_behind_pgbouncer", server_port=None),
        but("nullpool_behind_pgbouncer", create=timing(0.01)),
        but("nullpool_behind_pgbouncer", created=60_000),
        but("nullpool_behind_pgbouncer", idle_max=5, max=15, overflow_max=10),
    ],
    "timeout_too_long": [
        but("timeout_too_long", errors={"cancelled": 9}),
        but("timeout_too_long", timeouts=21),
        but("timeout_too_long", wait=timing(0.01, longest=0.9)),
        but("timeout_too_long", wait=timing(0.01, longest=29.0)),
        but("timeout_too_long", config={}),
        but("timeout_too_long", paths={"idle": 144_000}),
    ],
    "recycle_herd": [
        but("recycle_herd", closed={"recycle": 3000, "overflow": 3100}),
        but("recycle_herd", paths={"idle": 143_000, "new": 1000}),
        but("recycle_herd", wait=timing(0.001)),
        but("recycle_herd", wait=timing(0.001, p50=0.0001, p99=0.005)),
    ],
    "stale": [
        but("stale", stale=0),
        but("stale", config=HEALTHY.config),
        but("stale", closed={"pre_ping": 4}),
        but("stale", stale=None, closed={"error": 143}),
        but("stale", library="httpx", system=None),
    ],
    "leak": [but("leak", overdue=0)],
    "orphaned": [but("orphaned", orphaned=0, timeouts=0), but("orphaned", orphaned=None, timeouts=0)],
    "nested": [but("nested", nested=2)],
    "inherited": [but("inherited", inherited=0)],
    "held_idle": [
        but("held_idle", busy_s=None),
        but("held_idle", busy_s=5000.0),
        but("held_idle", max=14, overflow_max=0, idle_max=14),
    ],
    "connect_errors": [
        but("connect_errors", errors={"connect_error": 1400}),
        but("connect_errors", checkouts=100, errors={"connect_error": 9}, paths={"idle": 91}),
    ],
    "redis_default_limits": [but("redis_default_limits", peak=9), but("redis_default_limits", peak=None)],
    "keepalive_churn": [
        but("keepalive_churn", created=71_000),
        but("keepalive_churn", closed={}),
        but("keepalive_churn", system="postgresql", library="asyncpg", max=14),
    ],
    "streams_saturated": [
        but("streams_saturated", streams_pending=2),
        but("streams_saturated", streams=100, streams_max=100, streams_pending=40),
        but("streams_saturated", streams=None, streams_max=None, streams_pending=None),
    ],
    "qdrant_localhost": [
        but("qdrant_localhost", server_address="vectors", created=100),
        but("qdrant_localhost", idle_max=20, created=100),
        but("qdrant_localhost", created=70_000),
    ],
    "qdrant_one_connection": [
        but("qdrant_one_connection", rate_per_s=9.0),
        but("qdrant_one_connection", idle=2),
        but("qdrant_one_connection", channels={"ready": 1, "shutdown": 2}),
    ],
    "many_pools": [but("many_pools", pools=9, created=0)],
}


@pytest.mark.parametrize(("kind", "number"), [(kind, number) for kind in SILENT for number in range(len(SILENT[kind]))])
def test_a_rule_is_silent(kind, number):
    """Where one of its conditions does not hold, nothing is said."""
    assert kinds(SILENT[kind][number]) == []


def test_every_rule_can_be_silent():
    """There is such a case for each."""
    assert SILENT.keys() == SPEAK.keys()


# -- each bound ------------------------------------------------------------------------


def edge(what, **changes):
    """A bound, and what is to be changed to be on this side of it and on that; what is no pair is changed for both."""
    pairs = {name: value if isinstance(value, tuple) else (value, value) for name, value in changes.items()}
    return what, *({name: pair[side] for name, pair in pairs.items()} for side in (0, 1))


SHORT = edge("5 seconds", rate_per_s=(144_000 / 5, 144_000 / 4.99))
RARE = timing(0.001, 144_000)

# From a kind to its bounds: of the first pool the rule still speaks, of the second it does no more.
EDGES = {
    "too_small": [
        SHORT,
        edge("100 checkouts", checkouts=(100, 99), paths={"queued": 44}, rate_per_s=9.0),
        edge("20 that waited", checkouts=100, paths=({"queued": 20}, {"queued": 19}), rate_per_s=9.0),
        edge("20 holds", use=(timing(0.05, 20), timing(0.05, 19))),
        edge("3 nested of few", checkouts=200, paths={"queued": 88}, rate_per_s=9.0, nested=(3, 4)),
        edge("1 % nested of many", nested=(1440, 1441)),
        # If one is leaked, who waits is no sign of the load, and for that eight are enough.
        edge("as many as needed", max=(7, 8), overdue=1),
        edge("twice as many waited as wanted", max=7, paths=({"queued": 2881}, {"queued": 2880})),
        # By the formulas 13 % have to wait for five at the busiest time, and 5 % for six.
        edge("ten times as many are predicted", max=(5, 6), paths={"queued": 100}),
    ],
    "big_pool_behind_pgbouncer": [
        edge("1000 checkouts", checkouts=(1000, 999), rate_per_s=9.0),
        edge("a minute", rate_per_s=(144_000 / 60, 144_000 / 59.9), use=RARE),
        edge("twice the advised size", max=(44, 43)),
        edge("the advised size is twice the peak", max=60, peak=(15, 16)),
        edge("10 connections saved", max=(15, 14), peak=2, use=RARE),
        edge("nobody had to wait", paths=({}, {"queued": 1})),
        edge("nobody was refused", errors=({}, {"exhausted": 1})),
        edge("nobody waits", pending=(0, 1)),
        edge("a known peak", peak=(11, None)),
        edge("a limit", max=(60, None)),
        edge("the port", server_port=(6432, 6433)),
    ],
    "too_large": [
        edge("1000 checkouts", checkouts=(1000, 999), rate_per_s=1.0),
        edge("10 minutes", rate_per_s=(144_000 / 600, 144_000 / 599), use=RARE),
        edge("another size than the default", max=(16, 15), peak=2, use=RARE),
        edge("a database", system=("mysql", None)),
    ],
    "overflow_always": [
        SHORT,
        edge("100 checkouts", checkouts=(100, 99), rate_per_s=9.0),
        edge("a fifth of them", closed=({"overflow": 28_800}, {"overflow": 28_799})),
        edge("overflow connections", closed=({"overflow": 144_000}, {"idle": 144_000})),
        edge("a base size", idle_max=(1, 0)),
        edge("a base size that is known", idle_max=(1, None)),
        edge("a base size for each pool", max=56, pools=4, idle_max=(4, 3)),
    ],
    "nullpool_behind_pgbouncer": [
        SHORT,
        edge("100 checkouts", checkouts=(100, 99), rate_per_s=9.0),
        edge("a connect for each second checkout", created=(72_000, 71_999)),
        edge("a connect takes a fifth of a hold", create=(timing(0.016), timing(0.0159))),
        edge("no limit", max=(None, 14)),
        edge("nothing is kept", idle_max=(0, 1)),
        edge("SQLAlchemy", library=("sqlalchemy", "asyncpg")),
        edge("the port", server_port=(6432, 6433)),
    ],
    "timeout_too_long": [
        SHORT,
        edge("100 checkouts", checkouts=(100, 99), rate_per_s=9.0),
        edge("10 cancelled", errors=({"cancelled": 10}, {"cancelled": 9})),
        edge("some cancelled", errors=({"cancelled": 10}, {"timeout": 10})),
        edge("ten times as many as timed out", timeouts=(20, 21)),
        edge("a wait of more than a second", wait=(timing(0.01, longest=1.01), timing(0.01, longest=1.0))),
        edge("no wait of four fifths", wait=(timing(0.01, longest=24.0), timing(0.01, longest=24.1))),
        edge("somebody had to wait", paths=({"queued": 1}, {})),
        edge("a timeout", config=({"timeout": 30}, {"timeout": None})),
    ],
    "recycle_herd": [
        SHORT,
        edge("1000 checkouts", checkouts=(1000, 999), rate_per_s=9.0),
        edge("10 recycled", closed=({"recycle": 10}, {"recycle": 9}), idle_max=5),
        edge("10 recycled where nothing is said to be kept", closed=({"recycle": 10}, {"recycle": 9}), idle_max=None),
        edge("each place once", closed=({"recycle": 20}, {"recycle": 19}), idle_max=20),
        edge("half of what was closed", closed=({"recycle": 300, "idle": 300}, {"recycle": 300, "idle": 301})),
        edge("recycled at all", closed=({"recycle": 300}, {"idle": 300})),
        edge("a connect for one checkout in a hundred", paths=({"new": 1440}, {"new": 1439})),
        edge("connects at all", paths=({"new": 3000}, {"idle": 3000})),
        edge(
            "waits of ten times the median",
            wait=(timing(0.01, p50=0.002, p99=0.02), timing(0.01, p50=0.002, p99=0.0199)),
        ),
        edge(
            "waits of half a connect",
            create=timing(0.1, p50=0.08),
            wait=(timing(0.01, p50=0.0, p99=0.04), timing(0.01, p50=0.0, p99=0.039)),
        ),
    ],
    "stale": [
        edge("one without a server", stale=(1, 0)),
        edge("10 that failed", stale=0, checkouts=900, closed=({"error": 10}, {"error": 9})),
        edge("one in 1000 that failed", stale=None, checkouts=2_000_000, closed=({"error": 2000}, {"error": 1999})),
        edge("a library that can look", library=("sqlalchemy", "asyncpg")),
    ],
    "leak": [
        edge("one that is out", overdue=(1, 0)),
        edge("one that the collector gave back", overdue=None, leaked=({"collected": 1}, {"overdue": 1})),
    ],
    "orphaned": [edge("one place", orphaned=(1, 0))],
    "nested": [edge("three times", nested=(3, 2))],
    "inherited": [edge("one connection", inherited=(1, 0))],
    "held_idle": [
        SHORT,
        edge("100 checkouts", checkouts=(100, 99), rate_per_s=9.0, paths={}),
        edge("a third of the time", busy_s=(3840.0, 3840.1)),
        edge("half of the pool in use", max=(8, 9)),
        edge("whatever is in use where there is no limit", max=(None, 7), use=RARE, busy_s=0.0),
        edge("more waited than wanted", max=14, paths=({"queued": 1441}, {"queued": 1440})),
        edge("somebody held one", busy_s=0.0, use=(timing(0.08, 1), timing(0.08, 0))),
        edge("the server's time is known", busy_s=(0.0, None)),
    ],
    "connect_errors": [
        edge("ten", checkouts=900, errors=({"connect_error": 10}, {"connect_error": 9})),
        edge("one checkout in a hundred", errors=({"connect_error": 1440}, {"connect_error": 1439})),
        edge("of the server", errors=({"connect_error": 3000}, {"timeout": 3000})),
    ],
    "redis_default_limits": [
        SHORT,
        edge("100 checkouts", checkouts=(100, 99), rate_per_s=9.0),
        edge("10 in use at once", peak=(10, 9)),
        edge("no limit", max=(None, 1000)),
        edge("Redis or Valkey", library=("valkey", "httpx")),
    ],
    "keepalive_churn": [
        SHORT,
        edge("100 requests", checkouts=(100, 99), rate_per_s=9.0),
        edge("a connect for each second request", created=(72_000, 71_999)),
        edge("most of them to make room", closed=({"evicted": 6, "error": 5}, {"evicted": 5, "error": 6})),
        edge("HTTP", system="qdrant", library=("qdrant", "redis")),
        edge("no gRPC", system="qdrant", library="qdrant", channels=(None, {"ready": 1})),
    ],
    "streams_saturated": [
        edge("three that wait", streams_pending=(3, 2)),
        edge("half as many as have one", streams=10, streams_pending=(5, 4)),
        edge("more than half of an odd number", streams=9, streams_pending=(5, 4)),
        edge("streams in use", streams=(1, 0)),
    ],
    "qdrant_localhost": [
        edge("20 calls", checkouts=(20, 19)),
        edge("a connect for each second call", created=(72_000, 71_999)),
        edge("this machine", server_address=("127.0.0.1", "10.0.0.1")),
        edge("nothing is kept", idle_max=(0, None)),
        edge("no gRPC", channels=(None, {"ready": 1})),
        edge("Qdrant", library=("qdrant", "httpx")),
    ],
    "qdrant_one_connection": [
        edge("100 calls", checkouts=(100, 99)),
        edge("10 calls per second", rate_per_s=(10.0, 9.9)),
        edge("or calls that wait", rate_per_s=9.0, pending=(1, 0)),
        edge("two channels", channels=({"ready": 2}, {"ready": 1})),
        edge("two that are not shut down", channels=({"ready": 2, "shutdown": 2}, {"ready": 1, "shutdown": 3})),
        edge("one connection", used=0, idle=(1, 2)),
        edge("one that is in use or idle", used=1, idle=(0, 1)),
        edge("one that is known", used=(1, None), idle=None),
    ],
    "many_pools": [
        edge("ten", pools=(10, 9), created=0),
        edge("100 checkouts", checkouts=(100, 99)),
    ],
}


@pytest.mark.parametrize(
    ("kind", "speaks", "silent"),
    [pytest.param(kind, *sides, id=f"{kind}: {what}") for kind, edges in EDGES.items() for what, *sides in edges],
)
def test_the_bounds_of_a_rule(kind, speaks, silent):
    """Each bound is where the documentation has it: on it the rule speaks, and one step beyond it does not."""
    assert kind in kinds(but(kind, **speaks))
    assert kind not in kinds(but(kind, **silent))


def test_every_rule_has_its_bounds():
    """Of the one that needs the number of instances see below."""
    assert EDGES.keys() == SPEAK.keys()


# From a kind to what makes it as urgent: where one severity begins, and the one below it.
URGENCY = {
    "too_small": [
        ("high", edge("a tenth waited", paths=({"queued": 14_400}, {"queued": 14_399}))),
        ("high", edge("one was refused", paths={"queued": 9000}, timeouts=(1, 0))),
    ],
    "nullpool_behind_pgbouncer": [
        ("medium", edge("a connect takes as long as a hold", create=(timing(0.08), timing(0.0799)))),
    ],
    "recycle_herd": [
        (
            "medium",
            edge("waits that somebody notices", wait=(timing(0.1, p50=0.0, p99=0.1), timing(0.1, p50=0.0, p99=0.099))),
        ),
    ],
    "stale": [("high", edge("ten failed", closed=({"error": 10}, {"error": 9})))],
    "leak": [
        ("high", edge("somebody waits", pending=(1, 0))),
        ("high", edge("somebody was refused", errors=({"exhausted": 1}, {}))),
        ("high", edge("four fifths are in use", utilization=(0.8, 0.7999))),
    ],
    "orphaned": [
        ("high", edge("somebody waits", timeouts=0, pending=(1, 0))),
        ("high", edge("somebody was refused", timeouts=(1, 0))),
        ("high", edge("four fifths are in use", timeouts=0, utilization=(0.8, None))),
    ],
    "nested": [
        ("high", edge("somebody waits", pending=(1, 0))),
        ("high", edge("somebody was refused", timeouts=(1, 0))),
    ],
    "held_idle": [("medium", edge("more waited than wanted", paths=({"queued": 1441}, {"queued": 1440})))],
    "connect_errors": [
        ("high", edge("within five minutes", last_error_s=({"connect_error": 300.0}, {"connect_error": 300.1}))),
    ],
    "redis_default_limits": [("medium", edge("a hundred at once", peak=(100, 99)))],
    "keepalive_churn": [("medium", edge("a handshake", create=(timing(0.01), timing(0.0099))))],
    "qdrant_one_connection": [("medium", edge("calls wait", pending=(1, 0)))],
    "many_pools": [("medium", edge("less than ten checkouts each", checkouts=(3999, 4000)))],
}


@pytest.mark.parametrize(
    ("kind", "severity", "more", "less"),
    [
        pytest.param(kind, severity, *sides, id=f"{kind}: {what}")
        for kind, rows in URGENCY.items()
        for severity, (what, *sides) in rows
    ],
)
def test_how_urgent_it_is(kind, severity, more, less):
    """Each severity begins where the documentation has it, and below it comes the next."""
    below = {"high": "low" if kind == "connect_errors" else "medium", "medium": "low"}[severity]

    assert severities(but(kind, **more))[kind] == severity
    assert severities(but(kind, **less))[kind] == below


def severities(*stats):
    return {advice.kind: advice.severity for advice in advise(stats, [])}


# -- word by word ----------------------------------------------------------------------

UNEVEN = 1.000123457


def uneven(pool):
    """The same a little slower, with figures that do not come out even."""
    return replace(
        pool,
        rate_per_s=pool.rate_per_s * UNEVEN,
        busiest_per_s=pool.busiest_per_s and pool.busiest_per_s * UNEVEN,
        busy_s=pool.busy_s and pool.busy_s * UNEVEN,
        use=replace(pool.use, mean_s=pool.use.mean_s * UNEVEN),
        create=replace(pool.create, mean_s=pool.create.mean_s * UNEVEN),
    )


HELD = [
    Holder("shop", 80.0, "app.py:12 handler", "connect"),
    Holder("shop", 93.0, "app.py:12 handler", "connect"),
    Holder("shop", 1.0, "app.py:99 quick", "connect"),
]
SEEN = {
    "checkouts": 144_000,
    "seconds": 3599.556,
    "rate_per_s": 40.005,
    "busiest_per_s": 50.006,
    "hold_mean_s": 0.08001,
    "load": 4.001,
}

# From a kind to all that is said of the pool that makes it speak: what is wrong, what to do, on which figures.
SAID = {
    "too_small": (
        (
            "44.4 % of 144000 checkouts had to wait for one of 3 connections or got none: 50 per second, each held for"
            " 50 ms, have 2.5 in use on average."
        ),
        "`create_engine(pool_size=6, max_overflow=2)`: then 0.452 % will have to wait.",
        SEEN
        | {"hold_mean_s": 0.050006, "load": 2.501, "waited": 63_990, "refused": 0, "peak": 3, "size": 3, "needed": 8}
        | {"predicted_waiting": 0.004524, "predicted_mean_wait_s": 4.3e-05, "predicted_p99_wait_s": 0.0},
    ),
    "overflow_always": (
        (
            "34.7 % of 144000 checkouts ended with an overflow connection being closed, as pool_size is 3: opening the"
            " next one takes 20 ms."
        ),
        "`create_engine(pool_size=8, max_overflow=6)`: as many at most, but they stay open.",
        SEEN | {"waited": 10, "peak": 12, "closed_overflow": 50_000, "pool_size": 3, "create_mean_s": 0.020002},
    ),
    "too_large": (
        "There may be 60 connections, and in 60 min never more than 11 were in use.",
        (
            "`create_engine(pool_size=8, max_overflow=14)`: more than ever were needed, and the server has the others"
            " for somebody else."
        ),
        SEEN | {"waited": 0, "peak": 11, "size": 60, "needed": 10},
    ),
    "big_pool_behind_pgbouncer": (
        (
            "There may be 60 connections to what is, going by its port 6432, PgBouncer, which pools them anyway; never"
            " were more than 11 in use."
        ),
        "`create_engine(pool_size=22, max_overflow=0)`: a small pool before PgBouncer, the large one behind it.",
        SEEN | {"waited": 0, "peak": 11, "size": 60, "server_port": 6432},
    ),
    "nullpool_behind_pgbouncer": (
        (
            "144000 connections were opened for 144000 checkouts to what is, going by its port 6432, PgBouncer: 30 ms"
            " to open one that is held for 80 ms."
        ),
        (
            "`create_engine(pool_size=8, max_overflow=2)` without NullPool: a small pool spares the connect (with"
            " asyncpg and transaction pooling, mind its prepared statements)."
        ),
        {"created": 144_000, "checkouts": 144_000, "create_mean_s": 0.030004, "hold_mean_s": 0.08001}
        | {"server_port": 6432},
    ),
    "timeout_too_long": (
        (
            "200 checkouts were cancelled and 0 timed out: nobody has ever waited for the 30 s after which the pool"
            " gives up, the longest for 9 s."
        ),
        "`create_engine(pool_timeout=5)`: less than callers wait, so that they get an error that says why.",
        {"cancelled": 200, "timeouts": 0, "timeout_s": 30.0, "wait_max_s": 9.0},
    ),
    "recycle_herd": (
        (
            "3000 of 3080 connections were closed for their age, and 3080 of 144000 checkouts had to open one: half of"
            " them take 0.1 ms at most, one in a hundred 120 ms or more."
        ),
        (
            "`create_engine(pool_recycle=1800)`, and a different number in each instance: connections that were opened"
            " together are recycled together, as SQLAlchemy adds no jitter."
        ),
        {"recycled": 3000, "closed": 3080, "new": 3080, "checkouts": 144_000, "pool_recycle": 60}
        | {"wait_p50_s": 0.0001, "wait_p99_s": 0.12, "create_p50_s": 0.02 * math.log(2)},
    ),
    "stale": (
        (
            "Nobody looks at connections before they are lent: 3 idle ones are without a server now, and 0 have failed"
            " when they were in use."
        ),
        (
            "`create_engine(pool_pre_ping=True)` does; if something in between closes idle connections, replace them"
            " earlier, too."
        ),
        {"stale": 3, "closed_error": 0, "checkouts": 144_000},
    ),
    "leak": (
        "2 connections are out for longer than the leak threshold (the longest for 93 s): 2 from app.py:12 handler.",
        (
            "Give it back however the block ends: use `with engine.connect() as connection:`"
            " (or `with Session() as session:`)."
        ),
        {"overdue": 2, "collected": 0, "oldest_use_s": 93.0, "call_sites": {"app.py:12 handler": 2}},
    ),
    "orphaned": (
        "2 places are taken by nobody, of 100: a larger pool would lose them too.",
        (
            "Update the library: httpcore up to 1.0.9 loses them when a connect is cancelled (httpcore2 does not);"
            " until then only a new client has them back."
        ),
        {"orphaned": 2, "used": 4, "max": 100, "refused": 4},
    ),
    "nested": (
        (
            "900 of 144000 checkouts were made by somebody who held a connection of the same pool: when all do so at"
            " once, all wait for each other."
        ),
        "Hand the connection (or session) on to what is called, or give it back before; a larger pool only delays it.",
        {"nested": 900, "checkouts": 144_000, "refused": 0, "pending": 0},
    ),
    "inherited": (
        "1 connection is used here that the parent process had opened before the fork: both write to the same socket.",
        (
            "Where processes are forked (gunicorn's `post_fork`, Celery's `worker_process_init`), call"
            " `engine.dispose(close=False)` first thing in the new process."
        ),
        {"inherited": 1},
    ),
    "held_idle": (
        "Connections are held for 80 ms, used for 6.94 % of that time.",
        (
            "Give the connection back before other work is done (a call to another service, a template), and take it as"
            " late as possible: at best 0.278 instead of 4 would be in use."
        ),
        {"busy_s": 800.099, "held_s": 11521.422, "waiting": 6.9e-05},
    ),
    "connect_errors": (
        "3000 of 144000 checkouts could not open a connection to db, the last one 2 s ago.",
        (
            "Look at the server, the network and the password; a server at its limit of connections refuses too, which"
            " a larger pool makes worse."
        ),
        {"connect_errors": 3000, "checkouts": 144_000, "last_error_s": 2.0, "created": 90},
    ),
    "redis_default_limits": (
        (
            "The pool has no limit, as is the default of redis-py before 8.0 and of valkey-py, and 11 connections were"
            " in use at once: the slower the server, the more it gets, up to its maxclients."
        ),
        "`ConnectionPool(max_connections=22)`; beyond that it refuses at once, and BlockingConnectionPool waits.",
        SEEN | {"waited": 0, "peak": 11},
    ),
    "keepalive_churn": (
        "143000 connections were opened for 144000 requests, 20 ms each; most were closed as `evicted`.",
        (
            "`httpx.Limits(max_connections=100, max_keepalive_connections=100)`: keep as many open as are in use"
            " (httpcore up to 1.0.9 counts the busy ones too)."
        ),
        {"created": 143_000, "checkouts": 144_000, "closed": {"evicted": 142_000}}
        | {"create_mean_s": 0.020002, "idle_max": 20},
    ),
    "streams_saturated": (
        "5 streams are in use and 15 requests wait for one, which no timeout covers.",
        (
            "`http2=False` gives each request a connection of its own; or share the requests out over several clients,"
            " or have the server allow more streams on a connection."
        ),
        {"streams": 5, "streams_pending": 15, "streams_max": 5, "used": 1},
    ),
    "qdrant_localhost": (
        "143999 connections in 144000 calls: qdrant-client keeps none open, as the server is local.",
        "`QdrantClient(limits=httpx.Limits())` keeps them.",
        {"created": 143_999, "checkouts": 144_000, "create_mean_s": 0.020002},
    ),
    "qdrant_one_connection": (
        "3 gRPC channels share one connection, and so its streams: pool_size does nothing.",
        "`grpc_options={'grpc.use_local_subchannel_pool': 1}` gives each a connection of its own.",
        {"channels": 3, "connections": 1, "pending": 0, "rate_per_s": 50.006},
    ),
    "many_pools": (
        "400 pools of this name are alive, with 2.25 checkouts each: that many clients of one server.",
        (
            "Make one client (or engine) when the application starts, and share it; where each has a purpose of its"
            " own, name it with `otel_pools.name_pool`."
        ),
        {"pools": 400, "checkouts": 900, "created": 900},
    ),
}


@pytest.mark.parametrize("kind", SPEAK)
def test_all_that_a_rule_says(kind):
    """What people read and programs use: the issue, the suggestion and the figures of each, as they are told."""
    (advice,) = advise([uneven(SPEAK[kind][0])], HELD)

    assert (advice.issue, advice.suggestion, advice.evidence) == SAID[kind]


def one(*stats, holders=(), **options):
    """The one thing that is advised."""
    (advice,) = advise(stats, holders, **options)
    return advice


def test_what_to_expect_of_the_advised_size():
    """How long one will wait is predicted for that size, and for holds as they were, regular or not."""
    found = [
        one(uneven(replace(CROWDED, use=timing(0.05, 144_000, p50=p50))), wait_probability=0.05).evidence
        for p50 in (0.05, 0.02)
    ]

    assert [told["needed"] for told in found] == [6, 6]
    assert [told["predicted_waiting"] for told in found] == [0.047494, 0.047494]
    assert [told["predicted_mean_wait_s"] for told in found] == [0.000339, 0.002121]
    assert [told["predicted_p99_wait_s"] for told in found] == [0.011135, 0.069592]


# -- what else it may say --------------------------------------------------------------

STEADY = replace(CROWDED, rate_per_s=2.5, busiest_per_s=2.5)
BARE = replace(STEADY, library="redis", overflow_max=None, config={}, use=timing(0.999, 144_000))
LEAKING = SPEAK["leak"][0]
PLACES = [None, "app.py:1 f", *["app.py:2 f"] * 2, *["app.py:3 f"] * 3, *["app.py:4 f"] * 4, "app.py:5 f"]
LATE = [Holder("shop", 90.0 - number, place) for number, place in enumerate(PLACES)]
ON_PURPOSE = [Holder("shop", 500.0, "app.py:9 listen", kind=kind) for kind in ("pub/sub", "blocking")]
MISSING = (
    "8, and 20 instances have 100 connections of the server to share: hold connections for less long, put a pooler such"
    " as PgBouncer in between, or have the server allow more."
)
THEN = "then 0.452 % will have to wait."
AS_MANY = "as many at most, but they stay open."

# What is said where there is more to say, or less.
SUGGESTED = {
    "all that is needed": (
        CROWDED,
        {"instances": 11, "server_limit": 100},
        f"`create_engine(pool_size=6, max_overflow=2)`: {THEN}",
    ),
    "what the server allows": (
        CROWDED,
        {"instances": 20, "server_limit": 100},
        f"`create_engine(pool_size=4, max_overflow=0)`: then 32 % will have to wait; it needs {MISSING}",
    ),
    "the server allows no more": (
        replace(CROWDED, max=4, paths={"idle": 104_000, "queued": 40_000}),
        {"instances": 20, "server_limit": 100},
        f"It needs {MISSING}",
    ),
    "long holds": (
        replace(STEADY, use=timing(1.0, 144_000)),
        {},
        f"`create_engine(pool_size=6, max_overflow=2)`: {THEN} Or hold them for less long, which helps as much.",
    ),
    "Redis": (BARE, {}, "`Redis(max_connections=8)`: then 0.449 % will have to wait."),
    "Redis that refuses": (
        replace(BARE, errors={"exhausted": 9}),
        {},
        (
            "`Redis(max_connections=8)`: then 0.449 % will have to wait."
            " BlockingConnectionPool waits where this one refuses at once."
        ),
    ),
    "HTTP that refuses": (
        replace(BARE, library="httpx", system=None, errors={"exhausted": 9}),
        {},
        "`httpx.Limits(max_connections=8)`: then 0.449 % will have to wait.",
    ),
    "another library": (replace(BARE, library="asyncpg"), {}, "`max_size=8`: then 0.449 % will have to wait."),
    "a fleet that fits": (
        HEALTHY,
        {"instances": 8, "server_limit": 100},
        "`create_engine(pool_size=8, max_overflow=3)` in each, which leaves a tenth of them for others.",
    ),
    "a fleet that does not fit": (
        HEALTHY,
        {"instances": 20, "server_limit": 100},
        (
            "It needs 10 and its share is 4: put a pooler such as PgBouncer in between, have the server allow more, or"
            " run fewer instances."
        ),
    ),
    "overflow without a limit": (
        but("overflow_always", max=None, overflow_max=None),
        {},
        f"`create_engine(pool_size=8)`: {AS_MANY}",
    ),
    "no base size is beyond the limit": (
        but("overflow_always", max=6, overflow_max=3, peak=6),
        {},
        f"`create_engine(pool_size=6, max_overflow=0)`: {AS_MANY}",
    ),
    "more overflow than the load explains": (
        but("overflow_always", use=RARE),
        {},
        f"`create_engine(pool_size=5, max_overflow=9)`: {AS_MANY}",
    ),
    "what is leaked of any library": (
        replace(LEAKING, library="asyncpg"),
        {},
        "Give it back however the block ends: use `with`.",
    ),
    "what Redis has lost": (
        but("orphaned", library="redis"),
        {},
        "Update the library: redis-py 8.1 loses none after a failover; until then only a new pool has them back.",
    ),
    "what any library has lost": (
        but("orphaned", library="asyncpg"),
        {},
        "Update the library: only a new pool has them back.",
    ),
    "what Redis has inherited": (
        but("inherited", library="redis"),
        {},
        (
            "Where processes are forked (gunicorn's `post_fork`, Celery's `worker_process_init`), make the client in"
            " the new process."
        ),
    ),
    "the server closes": (
        but("keepalive_churn", closed={"server": 5}),
        {},
        "Have the server keep connections alive: it is the server who closes them.",
    ),
    "a client for each request": (
        but("keepalive_churn", closed={"dispose": 5}),
        {},
        "Make one client and share it: they were closed with their client, as if there was one for each request.",
    ),
    "they are too old": (
        but("keepalive_churn", closed={"idle": 5}, pools=3),
        {},
        (
            "`httpx.Limits(max_connections=33, max_keepalive_connections=6, keepalive_expiry=60)`: keep them for longer"
            " than there is between two requests."
        ),
    ),
    "no room, in each of three": (
        but("keepalive_churn", pools=3),
        {},
        (
            "`httpx.Limits(max_connections=33, max_keepalive_connections=33)`: keep as many open as are in use"
            " (httpcore up to 1.0.9 counts the busy ones too)."
        ),
    ),
    **{
        f"no room, and none to be had: {changes}": (
            but("keepalive_churn", **changes),
            {},
            "Keep as many open as are in use (httpcore up to 1.0.9 counts the busy ones too).",
        )
        for changes in ({"max": None}, {"max": 20})
    },
    "gRPC, one connection for all channels": (
        replace(GRPC, streams=100, streams_pending=300),
        {},
        (
            "`grpc_options={'grpc.use_local_subchannel_pool': 1}` opens a connection for each channel, with streams of"
            " its own."
        ),
    ),
    **{
        f"gRPC, {used} connections in use and {idle} idle for three channels": (
            replace(GRPC, streams=100, streams_pending=300, used=used, idle=idle),
            {},
            (
                "`grpc_options={'grpc.use_local_subchannel_pool': 1}, pool_size=6` opens a connection for each channel,"
                " with streams of its own."
            ),
        )
        for used, idle in ((3, 0), (1, 2), (None, 3), (3, None))
    },
    **{
        f"gRPC, {used} connections in use and {idle} idle": (
            replace(GRPC, streams=100, streams_pending=300, used=used, idle=idle),
            {},
            (
                "`grpc_options={'grpc.use_local_subchannel_pool': 1}` opens a connection for each channel, with streams"
                " of its own."
            ),
        )
        for used, idle in ((2, 0), (None, 2), (2, None))
    },
}
NOTED = {
    "more wait than the load explains": (
        replace(CROWDED, use=timing(0.005, 144_000)),
        {},
        (
            "44.4 % of 144000 checkouts had to wait for one of 3 connections or got none: 50 per second, each held for"
            " 5 ms, have 0.25 in use on average, and so many wait as if it were 2."
        ),
    ),
    "a fleet": (
        HEALTHY,
        {"instances": 8, "server_limit": 100},
        "The pools of 8 instances may open 112 connections to a server that allows 100: the last ones will be refused.",
    ),
    "the three lines that leak most": (
        replace(LEAKING, overdue=11),
        {"holders": LATE + ON_PURPOSE},
        (
            "11 connections are out for longer than the leak threshold (the longest for 90 s): 4 from app.py:4 f, 3"
            " from app.py:3 f, 2 from app.py:2 f."
        ),
    ),
    "one is out, held by nobody known": (
        replace(LEAKING, overdue=1),
        {},
        "1 connection is out for longer than the leak threshold.",
    ),
    "both kinds of leaks": (
        replace(LEAKING, leaked={"collected": 4}),
        {},
        (
            "2 connections are out for longer than the leak threshold; 4 connections are back only because the garbage"
            " collector found them dropped."
        ),
    ),
    "one place of a pool without a limit": (
        but("orphaned", orphaned=1, max=None),
        {},
        "1 place is taken by nobody, of all: a larger pool would lose them too.",
    ),
    "one idle connection without a server": (
        but("stale", stale=1, closed={"error": 4}),
        {},
        (
            "Nobody looks at connections before they are lent: 1 idle one is without a server now, and 4 have failed"
            " when they were in use."
        ),
    ),
    "a server with a port": (
        but("connect_errors", server_port=5433),
        {},
        "3000 of 144000 checkouts could not open a connection to db:5433, the last one 2 s ago.",
    ),
    "a server without a name": (
        but("connect_errors", server_address=None),
        {},
        "3000 of 144000 checkouts could not open a connection, the last one 2 s ago.",
    ),
    **{
        f"{seconds} seconds ago": (
            but("connect_errors", last_error_s={"connect_error": seconds}),
            {},
            f"3000 of 144000 checkouts could not open a connection to db, the last one {ago} ago.",
        )
        for seconds, ago in (
            *((0.0, "0 ms"), (0.0123456, "12.3 ms"), (0.999, "999 ms"), (1.0, "1 s"), (99.94, "99.9 s")),
            *((119.0, "119 s"), (120.0, "2 min"), (7199.0, "120 min"), (7200.0, "2 h"), (36_000_000.0, "10000 h")),
        )
    },
}


@pytest.mark.parametrize(("pool", "asked", "text"), SUGGESTED.values(), ids=SUGGESTED.keys())
def test_what_else_is_suggested(pool, asked, text):
    """A suggestion says what fits the library, the limit and the cause."""
    assert one(pool, **asked).suggestion == text


@pytest.mark.parametrize(("pool", "asked", "text"), NOTED.values(), ids=NOTED.keys())
def test_what_else_is_noted(pool, asked, text):
    """An issue says so much as is known, in numbers that people read."""
    assert one(pool, **asked).issue == text


@pytest.mark.parametrize("kind", SPEAK)
def test_advice_is_json_with_its_figures(kind):
    """Every advice can be sent, says what it rests on, and is written in whole sentences."""
    pool, _, settings = SPEAK[kind]
    (advice,) = advise([pool], [])
    told = json.loads(json.dumps(advice.to_dict()))

    assert told["evidence"]
    assert told["kind"] == kind
    for sentence in (advice.issue, advice.suggestion):
        assert sentence[0] == sentence[0].upper()
        assert sentence.endswith(".")
        assert "{" not in sentence.replace("{'grpc", "")
        assert "None" not in sentence
    assert all(name in advice.suggestion for name in settings)


# -- what it says ----------------------------------------------------------------------


def test_the_size_is_that_of_the_busiest_time():
    """By Little's law and Erlang's formula for the busiest ten seconds, else for all of the time."""
    (busy,) = advise([CROWDED], [])
    (usual,) = advise([replace(CROWDED, busiest_per_s=None, rate_per_s=30.0)], [])

    assert busy.evidence["load"] == 2.5
    assert (busy.evidence["needed"], sum(busy.settings.values())) == (8, 8)
    assert busy.evidence["predicted_waiting"] <= 0.01
    assert usual.evidence["needed"] < 8


def test_bursts_need_more_than_the_average_says():
    """If more wait than the load explains, the size is for the load that explains them."""
    (advice,) = advise([replace(CROWDED, use=timing(0.005, 144_000))], [])

    assert advice.evidence["load"] > 5 * 50 * 0.005
    assert advice.evidence["needed"] > 3
    assert "as if it were" in advice.issue


@pytest.mark.parametrize("timeout", [1, 2, 3, 5, 10, 15, 20, 30, 60])
def test_a_timeout_as_people_write_them(timeout):
    """It is the longest usual one that is shorter than callers have waited."""
    waited = but("timeout_too_long", config={"timeout": 100}, wait=timing(0.01, longest=timeout + 0.1))

    assert one(waited).settings == {"pool_timeout": timeout}
    if timeout > 1:
        assert one(replace(waited, wait=timing(0.01, longest=timeout))).settings["pool_timeout"] < timeout


@pytest.mark.parametrize(("recycle", "advised"), [(-1, 1800), (60, 1800), (900, 1800), (1200, 2400), (None, 1800)])
def test_a_longer_life(recycle, advised):
    """Connections should live for half an hour at least, or twice as long as they do."""
    pool = but("recycle_herd", config={"recycle": recycle, "pre_ping": True})

    assert one(pool).settings == {"pool_recycle": advised}


def test_the_promise_can_be_chosen():
    """Who wants fewer to wait needs more connections."""
    sizes = [advise([CROWDED], [], wait_probability=part)[0].evidence["needed"] for part in (0.1, 0.01, 0.0001)]

    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("part", [0, 1, -0.5])
def test_the_promise_is_a_part(part):
    """Neither all nor none can be asked for."""
    with pytest.raises(ValueError, match="between 0 and 1"):
        advise([], [], wait_probability=part)


def test_no_overflow_stays_no_overflow():
    """Who has chosen to have none is not talked into it."""
    (advice,) = advise([replace(CROWDED, overflow_max=0, idle_max=3)], [])

    assert advice.settings == {"pool_size": 8, "max_overflow": 0}


def test_each_of_several_pools_is_sized():
    """Pools of one name share the load, and the settings are those of one."""
    (advice,) = advise([replace(CROWDED, pools=3, max=9, idle_max=6, overflow_max=3, busiest_per_s=150.0)], [])

    assert sum(advice.settings.values()) == 8
    assert advice.evidence["size"] == 3


@pytest.mark.parametrize(
    ("library", "system", "settings", "words"),
    [
        ("redis", "redis", {"max_connections": 8}, "Redis(max_connections=8)"),
        ("valkey", "redis", {"max_connections": 8}, "Valkey(max_connections=8)"),
        ("httpx", None, {"max_connections": 8}, "httpx.Limits(max_connections=8)"),
        ("qdrant", "qdrant", {"max_connections": 8}, "QdrantClient(limits=httpx.Limits(max_connections=8))"),
        ("asyncpg", "postgresql", {"max_size": 8}, "max_size=8"),
    ],
)
def test_in_the_words_of_the_library(library, system, settings, words):
    """The setting is called as the library calls it."""
    (advice,) = advise([replace(CROWDED, library=library, system=system, overflow_max=None, idle_max=None)], [])

    assert advice.settings == settings
    assert words in advice.suggestion


def test_in_the_words_of_the_pool():
    """Redis's pools have arguments of their own."""
    blocking = replace(CROWDED, library="valkey", config={"class": "BlockingConnectionPool", "timeout": 20})
    impatient = replace(blocking, max=14, errors={"cancelled": 200}, paths={"idle": 143_990, "queued": 10})
    (small,) = advise([blocking], [])
    (long,) = advise([replace(impatient, wait=timing(0.01, longest=4.0))], [])

    assert "`BlockingConnectionPool(max_connections=8)`" in small.suggestion
    assert "`BlockingConnectionPool(timeout=3)`" in long.suggestion


def test_who_refuses_at_once_could_wait():
    """Of a Redis pool that refuses, the advice names the one that waits."""
    refusing = replace(REDIS, max=3, errors={"exhausted": 20_000}, paths={"idle": 124_000}, use=timing(0.05, 124_000))
    (advice,) = advise([refusing], [])

    assert (advice.kind, advice.severity) == ("too_small", "high")
    assert "BlockingConnectionPool" in advice.suggestion


def test_a_leak_is_no_reason_for_a_larger_pool():
    """If places are taken for good, those who wait are no sign of the load."""
    leaking = replace(
        HEALTHY, overdue=12, timeouts=3000, paths={"idle": 100_000, "queued": 40_000}, errors={"timeout": 3000}
    )

    assert kinds(leaking) == ["leak"]
    assert kinds(replace(leaking, overdue=0, orphaned=12)) == ["orphaned"]
    assert kinds(replace(leaking, overdue=0)) == ["too_small"]


def test_nested_checkouts_are_no_reason_for_a_larger_pool():
    """Who waits for himself holds for longer than the work takes."""
    assert kinds(replace(CROWDED, nested=50_000, timeouts=30)) == ["nested"]


def test_http2_has_no_size():
    """Where connections carry many requests at once, their number says nothing."""
    assert kinds(replace(CROWDED, library="httpx", system=None, streams=2, streams_max=100)) == []


def test_the_leak_has_a_place():
    """Of those that are overdue the advice says from where they were borrowed, of those on purpose nothing."""
    held = [
        Holder("shop", 93.0, "app.py:12 handler", "connect"),
        Holder("shop", 80.0, "app.py:12 handler", "connect"),
        Holder("shop", 500.0, "worker.py:7 listen", kind="pub/sub"),
        Holder("shop", 1.0, "app.py:99 quick", "connect"),
        Holder("other", 900.0, "other.py:1 main", "connect"),
    ]
    (advice,) = advise([SPEAK["leak"][0]], held)

    assert "2 from app.py:12 handler" in advice.issue
    assert "93 s" in advice.issue
    assert advice.evidence["call_sites"] == {"app.py:12 handler": 2}
    assert "with engine.connect()" in advice.suggestion


def test_a_leak_is_urgent_when_connections_are_missed():
    """That is, if somebody waits or was refused, or most of them are in use."""
    leaking = SPEAK["leak"][0]
    urgent = [replace(leaking, utilization=0.8), replace(leaking, pending=1), replace(leaking, timeouts=1)]

    assert [advise([pool], [])[0].severity for pool in (leaking, *urgent)] == ["medium", "high", "high", "high"]


def test_given_back_by_the_collector():
    """That is a leak, though nothing is out any more."""
    (advice,) = advise([replace(HEALTHY, leaked={"collected": 4})], [])

    assert advice.kind == "leak"
    assert "4 connections are back only because the garbage collector found them dropped" in advice.issue


@pytest.mark.parametrize(
    ("reason", "settings", "word"),
    [
        ("idle", {"max_connections": 100, "max_keepalive_connections": 20, "keepalive_expiry": 60}, "longer"),
        ("server", {}, "server"),
        ("dispose", {}, "one client"),
    ],
)
def test_why_nothing_is_kept_alive(reason, settings, word):
    """The cure depends on why most connections were closed."""
    (advice,) = advise([replace(CHURNING, closed={reason: 140_000, "error": 3})], [])

    assert (advice.kind, advice.settings) == ("keepalive_churn", settings)
    assert word in advice.suggestion


def test_connections_that_fail_are_no_churn():
    """If most were closed because of errors, keeping them would not help."""
    assert kinds(replace(CHURNING, closed={"error": 140_000})) == []


def test_channels_that_share_a_connection_get_their_own():
    """If calls wait for streams, more connections have more; with one for each channel, it takes more channels."""
    waiting = replace(GRPC, streams=100, streams_pending=300, pending=300)
    (shared,) = advise([waiting], [])
    (own,) = advise([replace(waiting, used=3)], [])

    assert shared.settings == {"grpc_options": {"grpc.use_local_subchannel_pool": 1}}
    assert own.settings == {"grpc_options": {"grpc.use_local_subchannel_pool": 1}, "pool_size": 6}


def test_redis_looks_at_its_connections():
    """Dead connections of a Redis pool that does not look at them."""
    (advice,) = advise([replace(REDIS, stale=2)], [])

    assert (advice.kind, advice.settings) == ("stale", {"health_check_interval": 30})
    assert kinds(replace(REDIS, stale=2, config={"health_check_interval": 25})) == []


def test_an_outage_that_is_over():
    """Errors are urgent for five minutes, and no longer."""
    outage = SPEAK["connect_errors"][0]
    after = {seconds: advise([replace(outage, last_error_s={"connect_error": seconds})], []) for seconds in (290, 310)}

    assert [advice.severity for (advice,) in after.values()] == ["high", "low"]


def test_a_few_pools_that_are_used_well():
    """Ten clients of one server are waste at most."""
    (advice,) = advise([replace(SPEAK["many_pools"][0], pools=10)], [])

    assert (advice.kind, advice.severity) == ("many_pools", "low")


def test_defaults_are_nobodys_mistake():
    """A pool of the library's own size is not called too large."""
    large = SPEAK["too_large"][0]
    by_default = replace(large, library="redis", max=100, idle_max=None, overflow_max=None)

    assert kinds(by_default) == kinds(replace(by_default, library="valkey")) == []
    assert kinds(replace(by_default, max=99)) == kinds(replace(by_default, max=101)) == ["too_large"]
    assert kinds(replace(by_default, max=99, library="valkey")) == ["too_large"]


# -- several pools -----------------------------------------------------------------------


def test_the_most_urgent_comes_first():
    """By severity, then by the pool's name."""
    found = advise([SPEAK[kind][0] for kind in ("redis_default_limits", "too_small", "orphaned", "stale")], [])

    assert [(advice.severity, advice.pool) for advice in found] == [
        ("high", "billing:443"),
        ("high", "shop"),
        ("medium", "shop"),
        ("low", "cache"),
    ]


def test_a_pool_can_have_several_mistakes():
    """They are all told, but only one thing about its size."""
    pool = replace(CROWDED, inherited=1, overdue=0, stale=1, config={}, closed={"overflow": 100_000})

    assert kinds(pool) == ["inherited", "too_small", "stale"]


def test_the_fleet_has_a_budget():
    """All instances together must fit in the server, with a tenth left for others."""
    (advice,) = advise([HEALTHY], [], instances=8, server_limit=100)
    each = sum(advice.settings.values())

    assert (advice.kind, advice.severity) == ("fleet_budget", "medium")
    assert advice.evidence["claim"] == 112
    assert each == 11
    assert each * 8 <= 90


def test_pools_of_one_server_share_its_budget():
    """Their claims add up; those of another server have its own."""
    one, two = replace(HEALTHY, name="a"), replace(HEALTHY, name="b")

    assert kinds(one, two, instances=4, server_limit=100) == ["fleet_budget", "fleet_budget"]
    assert kinds(one, replace(two, server_address="replica"), instances=4, server_limit=100) == []


def test_the_limit_is_that_of_the_database():
    """A Redis pool is not measured by it, unless there is nothing else."""
    assert kinds(HEALTHY, REDIS, instances=6, server_limit=100) == []
    assert kinds(REDIS, instances=6, server_limit=100) == ["fleet_budget"]


def test_a_share_that_does_not_do():
    """If the load needs more than its share, no size is right, and something else must be done."""
    (advice,) = advise([HEALTHY], [], instances=20, server_limit=100)

    assert (advice.kind, advice.settings) == ("fleet_budget", {})
    assert "PgBouncer" in advice.suggestion


def test_no_larger_than_the_server_allows():
    """Of a pool that is too small the new size respects the budget, and says what is missing."""
    (some_more,) = advise([CROWDED], [], instances=20, server_limit=100)
    (no_more,) = advise([CROWDED], [], instances=40, server_limit=100)

    assert (some_more.kind, sum(some_more.settings.values())) == ("too_small", 4)
    assert (no_more.kind, no_more.settings) == ("too_small", {})
    assert "needs 8" in some_more.suggestion
    assert "needs 8" in no_more.suggestion


def shares(*stats, **options):
    """How many connections each pool may have."""
    return [advice.evidence["share"] for advice in advise(stats, [], **options)]


def test_the_budget_of_one_instance():
    """Who does not say how many there are has one; to claim all that the server allows is no mistake yet."""
    assert kinds(HEALTHY, server_limit=14) == []
    assert one(HEALTHY, server_limit=13).evidence == {
        "instances": 1,
        "max": 14,
        "claim": 14,
        "server_limit": 13,
        "share": 11,
        "needed": 10,
    }
    assert kinds(HEALTHY, instances=100) == []


def test_a_share_that_just_does():
    """A size of as many as are needed is advised; if the share is one less, none is."""
    assert [len(one(HEALTHY, instances=n, server_limit=100).settings) for n in (9, 10)] == [2, 0]


def test_the_budget_is_shared_by_size():
    """Of pools of one server each gets its part of nine tenths, and of several of one name each the same."""
    large = replace(HEALTHY, name="large", max=28)

    assert shares(HEALTHY, large, instances=4, server_limit=100) == [15, 7]
    assert shares(replace(large, pools=2), instances=4, server_limit=100) == [11]
    assert shares(replace(large, pools=0), instances=4, server_limit=100) == [22]
    assert shares(replace(large, max=500), instances=2, server_limit=900) == [405]


def test_a_pool_without_a_limit_claims_nothing():
    """It is not measured, and takes nothing of the others' share."""
    unlimited = replace(HEALTHY, name="unlimited", max=None)

    assert shares(unlimited, HEALTHY, instances=8, server_limit=100) == [11]


def test_whose_limit_it_is():
    """Without a database it is that of each other server; a pool that just speaks HTTP has none."""
    assert kinds(REDIS, REST, instances=6, server_limit=100) == ["fleet_budget", "fleet_budget"]
    assert kinds(HTTP, instances=6, server_limit=10) == []
    assert kinds(HTTP, REST, HEALTHY, instances=6, server_limit=90) == []


def test_a_fleet_that_is_refused():
    """If the server refuses connections already, it is urgent."""
    refused = replace(HEALTHY, errors={"connect_error": 1})

    assert one(refused, instances=8, server_limit=100).severity == "high"


@pytest.mark.parametrize(
    ("asked", "changes", "answer"),
    [
        ("each", {"pools": 3}, 3),
        ("each", {"pools": 0}, 1),
        ("size", {}, 14),
        ("size", {"pools": 4}, 3),
        ("size", {"pools": 20}, 1),
        ("size", {"max": None}, None),
        ("size", {"max": 0}, None),
        ("size", {"streams_max": 100}, None),
        ("seconds", {"checkouts": 100, "rate_per_s": 0.5}, 200.0),
        ("seconds", {"rate_per_s": 0.0}, 0.0),
        ("refused", {"timeouts": 2, "errors": {"exhausted": 3, "cancelled": 4}}, 5),
        ("waited", {"timeouts": 2, "errors": {"exhausted": 3}, "paths": {"queued": 4, "new": 5}}, 9),
        ("waited", {"paths": {}}, 0),
        ("waiting", {"paths": {"queued": 36_000}}, 0.25),
        ("waiting", {"paths": {"queued": 1}, "checkouts": 1}, 1.0),
        ("waiting", {"paths": {}, "checkouts": 0}, 0.0),
        ("stuck", {"overdue": 2, "orphaned": 3}, 5),
        ("stuck", {"overdue": 2, "orphaned": None}, 2),
        ("stuck", {"overdue": None, "orphaned": 3}, 3),
        ("per_s", {}, 50.0),
        ("per_s", {"busiest_per_s": 30.0}, 40.0),
        ("per_s", {"busiest_per_s": None}, 40.0),
        ("per_s", {"busiest_per_s": None, "rate_per_s": 0.0}, 0.0),
        ("load", {}, 4.0),
        ("load", {"pools": 2}, 2.0),
        ("demand", {"paths": {}}, 4.0),
        ("demand", {"paths": {"queued": 144_000}}, pytest.approx(14.0, abs=1e-4)),
        ("demand", {"paths": {"queued": 144_000}, "overdue": 1}, 4.0),
        ("demand", {"paths": {"queued": 144_000}, "max": None}, 4.0),
        ("need", {}, 10),
        ("comfort", {}, 22),
        ("comfort", {"pools": 2}, 12),
        ("comfort", {"peak": 1}, 10),
        ("comfort", {"peak": None}, 10),
        ("comfort", {"peak": 2, "use": RARE, "paths": {}}, 5),
    ],
)
def test_what_is_asked_of_a_case(asked, changes, answer):
    """What the rules have in common: sizes and loads are those of one pool, and what nobody knows counts as nothing."""
    assert getattr(Case(replace(HEALTHY, **changes), [], 0.01), asked) == answer


def test_a_case_in_one_sentence():
    """Its repr says which pool it is, and how full."""
    assert repr(Case(HEALTHY, [], 0.01)) == "<Case shop [144000 checkouts, load 4 of 14]>"


# -- stability ---------------------------------------------------------------------------


def modelled(per_s, hold, base, overflow, library="sqlalchemy"):
    """What a pool of this size would have shown after an hour, going by the formulas."""
    load, size, checkouts = per_s * hold, base + overflow, int(per_s * 3600)
    queued = int(checkouts * waits(size, load))
    churned = int(checkouts * waits(base, load)) if overflow else 0
    return replace(
        HEALTHY,
        library=library,
        config={},
        max=size,
        idle_max=base if library == "sqlalchemy" else None,
        overflow_max=overflow if library == "sqlalchemy" else None,
        peak=min(size, math.ceil(load + 4 * math.sqrt(load) + 1)),
        checkouts=checkouts,
        paths={"idle": checkouts - queued, "queued": queued},
        closed={"overflow": churned},
        use=timing(hold, checkouts),
        rate_per_s=per_s,
        busiest_per_s=per_s,
    )


@settings(deadline=None, max_examples=200)
@given(
    per_s=some.floats(0.5, 500),
    hold=some.floats(0.002, 0.5),
    base=some.integers(1, 80),
    overflow=some.integers(0, 40),
    part=some.sampled_from([0.001, 0.01, 0.05]),
)
def test_whoever_follows_the_advice_has_peace(per_s, hold, base, overflow, part):
    """A pool of the advised size is neither too small nor too large nor in need of another base size."""
    found = advise([modelled(per_s, hold, base, overflow)], [], wait_probability=part)
    sized = [advice for advice in found if advice.kind in SIZES]
    for advice in sized:
        after = modelled(per_s, hold, advice.settings["pool_size"], advice.settings["max_overflow"])

        assert kinds(after, wait_probability=part) == []
    assert len(sized) <= 1


@settings(deadline=None, max_examples=100)
@given(per_s=some.floats(0.5, 500), hold=some.floats(0.002, 0.5), size=some.integers(1, 120))
def test_the_same_of_a_pool_without_overflow(per_s, hold, size):
    """In Redis's words: what is advised once is never taken back."""
    for advice in advise([modelled(per_s, hold, size, 0, "redis")], []):
        assert kinds(modelled(per_s, hold, advice.settings["max_connections"], 0, "redis")) == []


@settings(deadline=None, max_examples=100)
@given(
    per_s=some.floats(0.5, 200),
    hold=some.floats(0.002, 0.2),
    base=some.integers(1, 60),
    instances=some.integers(1, 40),
    limit=some.integers(20, 500),
)
def test_a_fleet_that_follows_the_advice_fits(per_s, hold, base, instances, limit):
    """After it, nothing is advised that would break the budget again."""
    budget = {"instances": instances, "server_limit": limit}
    for advice in advise([modelled(per_s, hold, base, 0)], [], **budget):
        if not advice.settings:
            continue
        after = modelled(per_s, hold, advice.settings["pool_size"], 0)
        assert after.max * instances <= limit
        again = advise([after], [], **budget)

        assert "fleet_budget" not in [advice.kind for advice in again]
        assert all(advice.settings["pool_size"] < after.max for advice in again if advice.settings)


# -- on a real database ------------------------------------------------------------------

PER_S, HOLD_S = 40, 0.05  # load 2, of which a pool of 3 makes 44 % wait
TOLERATED = 0.05  # of the checkouts, where 1 % is promised: this machine stops for longer than a hold now and then


def poisson(engine, seconds):
    """Requests that come independently of each other, however long the earlier ones take."""
    random, start, due = Random(8), time.perf_counter(), 0.0

    def request(hold):
        with engine.connect() as connection:
            connection.execute(SLEEP, {"hold": hold})

    with ThreadPoolExecutor(64) as threads:
        while (due := due + random.expovariate(PER_S)) < seconds:
            time.sleep(max(start + due - time.perf_counter(), 0))
            threads.submit(request, random.expovariate(1 / HOLD_S))


SLEEP = text("SELECT pg_sleep(:hold)")


@pytest.fixture
def loaded(postgres, telemetry):
    """What the statistics say after such a load on a pool of these sizes."""
    otel_pools.instrument("sqlalchemy", meter_provider=telemetry.meter_provider)

    def run(seconds, **sizes):
        engine = create_engine(postgres.url("psycopg"), pool_logging_name=f"load {sizes}", **sizes)
        for connection in [engine.connect() for _ in range(sum(sizes.values()))]:
            connection.close()  # the load is not to begin with connections being opened
        otel_pools.reset_stats()
        poisson(engine, seconds)
        (found,) = (pool for pool in otel_pools.pools() if pool.name == f"load {sizes}")
        engine.dispose()
        return found

    return run


def test_on_postgresql_the_advised_size_is_enough(loaded):
    """A pool too small for its load gets a size, and with that the checkouts no longer wait."""
    before = loaded(5.2, pool_size=2, max_overflow=1)
    (advice,) = advise([before], [])
    after = loaded(3.0, **advice.settings)

    assert advice.kind == "too_small"
    assert before.paths["queued"] > before.checkouts * 0.2
    assert 5 <= sum(advice.settings.values()) <= 20
    assert after.checkouts > 100
    assert after.paths.get("queued", 0) <= after.checkouts * TOLERATED
    assert SIZES.isdisjoint(kinds(after))


# -- on real pools -----------------------------------------------------------------------


@pytest.fixture
def said(telemetry):
    """What is advised of the pools that are watched, as if all that happened had taken a minute."""
    otel_pools.instrument(meter_provider=telemetry.meter_provider, leak_threshold=0.01)

    def ask(library):
        found = [
            replace(pool, rate_per_s=pool.checkouts / 60) for pool in otel_pools.pools() if pool.library == library
        ]
        return advise([pool for pool in found if pool.checkouts], otel_pools.holders())

    return ask


def test_of_a_pool_that_overflows(said):
    """SQLAlchemy closes what comes back beyond pool_size, and opens it again."""
    pool = QueuePool(lambda: sqlite3.connect(":memory:", check_same_thread=False), pool_size=1, max_overflow=3)
    for _ in range(75):
        first, second = pool.connect(), pool.connect()
        first.close()
        second.close()
    found = {advice.kind: advice for advice in said("sqlalchemy")}

    assert found.keys() == {"nested", "overflow_always"}
    assert found["overflow_always"].settings["pool_size"] > 1
    assert sum(found["overflow_always"].settings.values()) == 4


def test_of_a_leak(said):
    """The line that borrowed it is in the advice."""
    pool = QueuePool(lambda: sqlite3.connect(":memory:", check_same_thread=False), pool_size=2)
    held = pool.connect()
    time.sleep(0.02)
    otel_pools.pools()
    (advice,) = said("sqlalchemy")
    held.close()

    assert advice.kind == "leak"
    assert "test_of_a_leak" in advice.issue


def test_of_a_redis_pool_that_refuses(said, valkey):
    """redis-py refuses at once what is beyond max_connections."""
    pool = redis.ConnectionPool(port=valkey.port, max_connections=2, client_name="tight")

    def caller(_):
        for _ in range(40):
            with contextlib.suppress(redis.ConnectionError):
                connection = pool.get_connection()
                time.sleep(0.002)  # the work
                pool.release(connection)
            time.sleep(0.002)  # what else there is to do

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(caller, range(4)))
    pool.disconnect()
    (advice,) = said("redis")

    assert (advice.kind, advice.severity) == ("too_small", "high")
    assert advice.settings["max_connections"] > 2
    assert "BlockingConnectionPool" in advice.suggestion


@pytest.mark.parametrize(
    ("path", "limits", "word"),
    [
        ("/", {"max_connections": 4, "max_keepalive_connections": 0}, "max_keepalive_connections=4"),
        ("/close", {"max_connections": 4}, "server"),
    ],
)
def test_of_a_client_that_keeps_nothing_alive(said, path, limits, word):
    """Because it is told not to, or because the server does not want to."""
    client = httpx.Client(limits=httpx.Limits(**limits), trust_env=False)
    with webs.Ground() as ground, webs.Server(ground) as server, client:
        for _ in range(120):
            client.get(server.url(path))
        (advice,) = said("httpx")

    assert advice.kind == "keepalive_churn"
    assert word in advice.suggestion
    assert advice.evidence["created"] == 120
