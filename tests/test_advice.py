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

    assert kinds(by_default) == []
    assert kinds(replace(by_default, max=90)) == ["too_large"]


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
