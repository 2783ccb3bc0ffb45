"""The registry of one library: it meets pools, forgets them, adds up what they say, and starts over after a fork."""

from __future__ import annotations

import gc
import socket
from types import SimpleNamespace

import pytest

from otel_pools import Settings, _guard, _registry
from otel_pools._leases import lend, lend_barely, lend_nobody, lend_with_stack
from otel_pools._model import Identity, Load, Origin, Reading, Snapshot, Tally
from otel_pools._outbox import Histograms
from otel_pools._period import Period
from otel_pools._registry import OTHERS, Registry, alive, is_dark, renamed
from otel_pools._watch import LONG_AGO
from otel_pools.targets import Target

HERE, THERE = Origin("https", "here", 443), Origin("https", "there", 443)


class Connection:
    """Something that is borrowed."""


class Pool:
    """Something that lends, and says of itself what it is told to say."""

    def __init__(self, name="one", **says):
        self.name = name
        self.says = Snapshot(**({"used": 0} | says))
        self.connections = []  # and whether each is open
        self.complete = True
        self.sockets = []


def table(**changed):
    """A library whose pools are of the class above."""
    rows = {
        "identify": lambda pool: Identity("lib", "sys", pool.name),
        "read": lambda pool, _: pool.says,
        "hooks": {},
        "members": lambda pool: pool.connections,
        "complete": lambda pool: pool.complete,
        "idle_sockets": lambda pool, watch: pool.sockets if watch.pool() is pool else (),
        "leases": lambda pool, watch: map(id, watch.connections()) if watch.pool() is pool else (),
    }
    return Target("lib", **rows | changed)


@pytest.fixture
def registry():
    """Makes registries, and closes them: a registry that is alive is asked by whoever looks at all pools."""
    made = []

    def make(settings=None, **changed):
        made.append(Registry(table(**changed), settings or Settings(), SimpleNamespace(threshold=1.0)))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def quiet(monkeypatch):
    """Mistakes of ours are said in the log, as in an application."""
    monkeypatch.setattr(_guard, "loud", False)


@pytest.fixture
def now(monkeypatch):
    """It is 100 by the clock of the registry."""
    monkeypatch.setattr(_registry, "clock", lambda: 100.0)


def told(registry):
    """By name, what is told at a collection."""
    return {ledger.identity.name: reading for ledger, reading in registry.readings()}


def fails(*_):
    return 1 / 0


# -- as it was set up ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "way"),
    [
        (Settings(), lend),
        (Settings(call_site=False), lend_barely),
        (Settings(stacks=True), lend_with_stack),
        (Settings(call_site=False, stacks=True), lend_with_stack),
        (Settings(holders=False, call_site=True, stacks=True), lend_nobody),
    ],
)
def test_what_is_noted_of_a_loan(registry, settings, way):
    """The line that asked; no line; everything that stood below it; or nothing but when it began."""
    assert registry(settings).lend is way


@pytest.mark.parametrize(
    ("settings", "overdue"),
    [
        (Settings(leak_threshold=9.5), 1),
        (Settings(leak_threshold=10.5), 0),
        (Settings(leak_threshold=0), 0),
        (Settings(leak_threshold=9.5, holders=False), 0),
    ],
)
def test_the_leak_threshold(registry, now, settings, overdue):
    """Who has had one for longer is overdue; with a threshold of 0, or if nobody is known, nobody ever is."""
    watched, pool = registry(settings), Pool()
    watched.meet(pool).leases[1] = lend(90.0)

    assert told(watched)["one"].overdue == overdue


def test_on_purpose_is_not_overdue(registry, now):
    """What the library says a connection is held for is asked."""
    watched, pool = registry(purpose=lambda _: "pub/sub"), Pool()
    watched.meet(pool).leases[1] = lend(0.0)

    assert told(watched)["one"].overdue == 0


# -- meeting ---------------------------------------------------------------------------


def test_a_pool_is_met_once(registry):
    """Whoever meets it again gets the same record."""
    watched, pool, other, new = registry(), Pool(), Pool(), Pool()
    watch = watched.meet(pool)

    assert watched.meet(pool) is watch
    assert watched.find(pool) is watch
    assert watched.meet(other) is not watch
    assert watched.find(new).pool() is new
    assert watched.watches == {id(pool): watch, id(other): watched.find(other), id(new): watched.find(new)}
    assert watch.pool() is pool


def test_its_connections_are_met_with_it(registry):
    """Those that it has already are known, and since when those that are open have been so is not."""
    watched, pool = registry(), Pool()
    one, two = Connection(), Connection()
    pool.connections = [(one, True), (two, False)]
    watch = watched.meet(pool)

    assert set(watch.connections()) == {one, two}
    assert watch.opened == {id(one): LONG_AGO}
    assert watched.owners == {id(one): watch, id(two): watch}


def test_of_two_who_meet_a_pool_the_second_changes_nothing(registry):
    """Since when a connection is open, which the first has seen it opened, is still known."""
    watched, pool, connection = registry(), Pool(), Connection()
    watch = watched.meet(pool)
    watch.opened[id(connection)] = 5.0
    pool.connections = [(connection, True)]
    watched.meet(pool)  # as one who has looked before the first had put it into the table

    assert watch.opened == {id(connection): 5.0}


def test_a_sighted_pool_is_met_when_it_is_complete(registry):
    """Until then it is no pool; somebody who looks notices when it is."""
    watched, pool = registry(), Pool()
    pool.complete = False
    watched.sight(pool)
    before = watched.pools()
    pool.complete = True

    assert before == []
    assert [watch.pool() for watch in watched.pools()] == [pool]
    assert watched.sighted == {}


def test_a_met_pool_is_not_sighted(registry):
    """Neither one that is known already nor one that is used before it was looked at."""
    watched, pool, used = registry(), Pool(), Pool()
    watched.meet(pool)
    watched.sight(pool)
    watched.sight(used)
    watched.meet(used)

    assert watched.sighted == {}


def test_a_pool_that_cannot_be_asked_costs_no_other(registry, quiet, caplog):
    """If one does not even say whether it is complete, the others are met."""
    odd, good = Pool(), Pool()
    watched = registry(complete=lambda pool: fails() if pool is odd else True)
    watched.sight(odd)
    watched.sight(good)

    assert [watch.pool() for watch in watched.pools()] == [good]
    assert "a pool that was sighted: ZeroDivisionError" in caplog.text


def test_what_stands_for_a_pool(registry):
    """Where a library anchors its pools in something else, that is what is known and referenced."""
    watched, pool, anchor = registry(anchor=lambda pool: (id(pool.anchor), pool.anchor)), Pool(), Pool("anchor")
    pool.anchor = anchor
    watched.sight(pool)
    watch = watched.meet(pool)

    assert watched.watches == {id(anchor): watch}
    assert watch.pool() is anchor
    assert watch.ledger.identity.name == "anchor"
    assert watched.sighted == {}


def test_what_stands_for_a_pool_may_go(registry):
    """With it goes what we know, under whatever key; whether the pool was used or just seen."""
    watched, pools = registry(anchor=lambda pool: (id(pool), pool.anchor)), [Pool(), Pool()]
    for pool in pools:
        pool.anchor = Pool()
    watched.meet(pools[0])
    watched.sight(pools[1])
    known = list(watched.watches), list(watched.sighted)
    for pool in pools:
        del pool.anchor
    gc.collect()

    assert known == ([id(pools[0])], [id(pools[1])])
    assert (watched.watches, watched.sighted) == ({}, {})


def test_a_pool_that_cannot_be_met(registry, quiet, caplog):
    """It is none of ours, whatever went wrong, and the log says what when somebody looks."""
    watched = registry(members=fails)

    assert watched.meet(Pool()) is None
    assert caplog.text == ""
    _guard.speak()
    assert "meeting a Pool: ZeroDivisionError" in caplog.text


def test_a_pool_without_a_name(registry, quiet, caplog):
    """If the library cannot say who it is, it goes by the library's name, and the log says so."""
    watched, pool = registry(identify=fails), Pool()
    watch = watched.meet(pool)
    _guard.speak()

    assert watch.ledger.identity == Identity("lib")
    assert "the name of a Pool: ZeroDivisionError" in caplog.text


def test_the_users_names(registry):
    """A server may be given a name in the settings."""
    settings = Settings(names=("db:5433=orders",))
    watched, pool = registry(settings, identify=lambda _: Identity("lib", "sys", address="db", port=5433)), Pool()

    assert watched.meet(pool).ledger.identity.name == "orders"


def test_names_are_bounded(registry, monkeypatch, caplog):
    """Pools of more names than we keep go by one name for all, which is said once; those known stay what they are."""
    monkeypatch.setattr(_registry, "NAMES", 2)
    watched, pools = registry(), [Pool(name) for name in ("a", "b", "c", "d", "a")]
    names = [watched.meet(pool).ledger.identity for pool in pools]

    assert names == [Identity("lib", "sys", name) for name in ("a", "b", OTHERS, OTHERS, "a")]
    assert [record.getMessage() for record in caplog.records] == [
        "otel_pools: more than 2 pool names; pools of more are all called 'otel_pools.others'"
    ]


def test_pools_of_one_name_share_their_ledger(registry):
    """So that what is told of the name is told once."""
    watched, pools = registry(), [Pool("a"), Pool("a"), Pool("b")]
    one, two, other = (watched.meet(pool).ledger for pool in pools)

    assert one is two is not other
    assert list(watched.ledgers.values()) == [one, other]


# -- forgetting ------------------------------------------------------------------------


def test_a_pool_that_is_gone_is_in_no_table(registry):
    """Met, resting, sighted or inherited: nothing is kept but the name's counters."""
    watched = registry()
    pools = [Pool(), Pool(), Pool()]
    watched.meet(pools[0])
    watched.meet(pools[1])
    watched.close_down(pools[1])
    watched.sight(pools[2])
    watched._from_parent = {id(pools[0]): {}}
    pools.clear()
    gc.collect()

    assert (watched.watches, watched.resting, watched.sighted, watched._from_parent) == ({}, {}, {}, {})
    assert len(watched.ledgers) == 1
    assert watched.names() == [(*watched.ledgers.values(), [])]


def test_a_pool_that_was_replaced_rests(registry):
    """It is found and counted as before; only that it hands out no more is noted."""
    watched, pool = registry(), Pool()
    watch = watched.meet(pool)
    watched.close_down(pool)

    assert (watched.watches, watched.resting) == ({}, {id(pool): watch})
    assert watch.closed_down
    assert watched.pools() == [watch]
    assert watched.find(pool) is watch
    assert watch.closed_down
    assert repr(watched) == "<Registry lib [0 pools, 1 resting]>"


def test_a_resting_pool_wakes(registry):
    """Who borrows of it wakes it, whoever is first."""
    watched, pool = registry(), Pool()
    watch = watched.meet(pool)
    watched.close_down(pool)

    assert watched.meet(pool) is watch
    assert watch.closed_down is False
    assert (watched.watches, watched.resting) == ({id(pool): watch}, {})


def test_while_one_rests_another_is_met(registry):
    """That some were replaced is nothing to a new pool."""
    watched, old, new = registry(), Pool(), Pool()
    resting = watched.meet(old)
    watched.close_down(old)
    watch = watched.meet(new)

    assert watch.pool() is new
    assert watched.pools() == [watch, resting]


def test_a_pool_that_two_wake_is_woken_once(registry):
    """Who comes second gets the record that the first has put back."""
    watched, pool = registry(), Pool()
    watch = watched.meet(pool)
    watched.resting[id(pool)] = registry().meet(pool)  # as the second has it in its hands

    assert watched.meet(pool) is watch
    assert watched.pools() == [watch]


def test_a_pool_that_was_only_sighted_may_be_closed_down(registry):
    """It is gone then; and so it is with one that nobody knows."""
    watched, pool, unknown = registry(), Pool(), Pool()
    watched.sight(pool)
    watched.close_down(pool)
    watched.close_down(unknown)

    assert (watched.sighted, watched.resting) == ({}, {})


def test_a_closed_registry_forgets_and_meets_nobody(registry):
    """Hooks that could not be taken off find nothing, and pass through."""
    watched, pools = registry(), [Pool(), Pool(), Pool()]
    pools[0].connections = [(Connection(), True)]
    for pool in pools[:2]:
        watched.meet(pool)
    watched.close_down(pools[1])
    watched.sight(pools[2])
    watched.close()
    watched.sight(pools[2])

    assert [watched.meet(pools[0]), watched.find(pools[1])] == [None, None]
    assert (watched.watches, watched.resting, watched.sighted) == ({}, {}, {})
    assert (watched.ledgers, watched.owners, watched.active) == ({}, {}, False)
    assert watched not in alive()
    assert repr(watched) == "<Registry lib [0 pools, 0 resting, inactive]>"


# -- what is told ----------------------------------------------------------------------


def test_pools_of_one_name_are_told_together(registry, now):
    """All live pools of a name add up, with the oldest of all who wait and of all who hold."""
    watched, pools = registry(), [Pool("a", used=2, max=5, pending=1), Pool("a", used=1, max=5), Pool("b", used=7)]
    ledger, _, _ = (watched.meet(pool).ledger for pool in pools)
    ledger.waiting.extend([97.5, 99.0])
    ledger.leases.update({1: lend(99.5), 2: lend(96.0)})
    both = told(watched)["a"]

    assert both == Reading(
        snapshot=Snapshot(used=3, max=10, pending=1),
        tally=Tally(),
        pools=2,
        peak=3,
        oldest_wait=2.5,
        oldest_use=4.0,
        overdue=0,
        unreadable=0,
    )
    assert told(watched)["b"].snapshot == Snapshot(used=7)


def test_a_replaced_pool_is_no_pool_of_its_name(registry):
    """Who holds a connection of it is counted, and its limit is not."""
    watched, old, new = registry(), Pool(used=2, max=5), Pool(used=1, max=5)
    watched.meet(old)
    watched.meet(new)
    watched.close_down(old)
    reading = told(watched)["one"]

    assert (reading.pools, reading.snapshot) == (1, Snapshot(used=3, max=5))


def test_a_name_without_a_pool_is_told_by_its_counters(registry):
    """What has happened remains; what would be of now does not."""
    watched, pool = registry(), Pool(used=3)
    watch = watched.meet(pool)
    watch.closed("dispose")
    watch.ledger.outbox.deliver(Histograms(None, None, None, None), {})
    del pool, watch
    gc.collect()

    assert told(watched) == {"one": Reading(Snapshot(), Tally(closed={"dispose": 1}))}


def test_a_reading_that_fails_costs_its_own_name(registry, quiet, caplog):
    """The others are told."""
    watched, pools = registry(), [Pool("a"), Pool("b")]
    bad = watched.meet(pools[0]).ledger
    watched.meet(pools[1])
    bad.waiting = None

    assert list(told(watched)) == ["b"]
    assert "a reading: TypeError" in caplog.text


def test_the_peak_of_a_collection_and_that_of_the_statistics(registry):
    """A collection takes it, so that the next begins with what is held; who only looks takes nothing away."""
    watched, pool = registry(), Pool(used=1)
    ledger = watched.meet(pool).ledger
    ledger.peak = 4
    seen = [watched.reading(*watched.names()[0], Period.peak).peak for _ in range(2)]
    taken = [told(watched)["one"].peak for _ in range(2)]

    assert (seen, taken) == ([4, 4], [4, 1])


def test_no_peak_where_requests_share_connections(registry):
    """Who gets a stream of a connection is not one more connection in use."""
    watched, pool = registry(), Pool(used=1, streams=5)
    watched.meet(pool)

    assert told(watched)["one"].peak is None


@pytest.mark.parametrize(
    ("says", "peak"),
    [
        ({"used": 1, "max": 3}, 9),
        ({"used": 1, "max": 3, "origins": {}}, 3),
        ({"used": 5, "max": 3, "origins": {}}, 5),
        ({"used": 1, "max": 12, "origins": {}}, 9),
        ({"used": 1, "max": None, "origins": {}}, 9),
        ({"used": None, "max": 3, "origins": {}}, 3),
        ({"used": 0, "max": 0, "origins": {}}, 0),
    ],
)
def test_the_peak_of_an_http_pool_is_possible(registry, says, peak):
    """It gives one connection to all who wait, so that for a moment more seem to have one than there are."""
    watched, pool = registry(), Pool(**says)
    watched.meet(pool).ledger.peak = 9

    assert told(watched)["one"].peak == peak


def test_an_origin_that_is_left_is_told_as_nothing(registry):
    """Of an HTTP pool each origin is told, with nothing when it has nothing any more; of another pool none is."""
    watched, pool, other = registry(), Pool(origins={HERE: Load(1, 0, 1)}), Pool("other")
    watched.meet(pool)
    watched.meet(other)
    before = told(watched)
    pool.says = Snapshot(used=0, origins={THERE: Load(0, 1, 0)})
    after = told(watched)["one"].snapshot.origins

    assert before["one"].snapshot.origins == {HERE: Load(1, 0, 1)}
    assert before["other"].snapshot.origins is None
    assert after == {HERE: Load(), THERE: Load(0, 1, 0)}


def test_idle_sockets_are_looked_at_if_somebody_wants_to_know(registry, quiet):
    """How many have lost their server; without the setting, or if they cannot be told, nothing is said."""
    ours, theirs = zip(*(socket.socketpair() for _ in range(3)), strict=True)
    theirs[0].close()
    pool = Pool()
    pool.sockets = [each.fileno() for each in ours]
    asked, unasked = registry(Settings(poll_idle=True)), registry()
    broken = registry(Settings(poll_idle=True), idle_sockets=fails)
    found = []
    for watched in (asked, unasked, broken):
        watched.meet(pool)
        found.append(told(watched)["one"].snapshot.stale)
    for each in (*ours, *theirs[1:]):
        each.close()

    assert found == [1, None, None]


def test_where_idle_sockets_cannot_be_told_nobody_asks(registry):
    """A library without them is no mistake of ours, and nothing is said of its pools' sockets."""
    watched, pool = registry(Settings(poll_idle=True), idle_sockets=None), Pool()
    watched.meet(pool)

    assert told(watched)["one"].snapshot == Snapshot(used=0)


@pytest.mark.parametrize(
    ("snapshot", "closed_down", "is_gone", "dark"),
    [
        (Snapshot(), False, False, True),
        (Snapshot(max=5), False, False, True),
        (Snapshot(used=0), False, False, False),
        (Snapshot(channels={}), False, False, False),
        (Snapshot(), True, False, False),
        (Snapshot(), False, True, False),
    ],
)
def test_a_pool_that_says_nothing_is_dark(registry, snapshot, closed_down, is_gone, dark):
    """Unless it hands out no more, or is gone: who says neither how many are in use nor a channel's state is unread."""
    watched, pool = registry(), Pool()
    watch = watched.meet(pool)
    watch.closed_down = closed_down
    if is_gone:
        del pool
        gc.collect()

    assert is_dark(watch, snapshot) is dark


def test_a_dark_pool_is_counted(registry, quiet):
    """Of several of one name it is said how many cannot be read."""
    watched, pools = registry(read=lambda pool, _: pool.says or fails()), [Pool(used=1), Pool(used=1)]
    for pool in pools:
        watched.meet(pool)
    pools[1].says = None
    reading = told(watched)["one"]

    assert (reading.unreadable, reading.pools, reading.snapshot) == (1, 2, Snapshot(used=1))


# -- another name ----------------------------------------------------------------------


def test_a_pool_that_is_renamed_takes_its_loans_along(registry):
    """Whoever's it is: of all libraries that are watched the one that knows it moves it; the others are unmoved."""
    one, other, closed = registry(), registry(), registry()
    pool, stranger = Pool("old"), Pool("stranger")
    pool.connections = [(Connection(), True)]
    watch, unmoved = one.meet(pool), other.meet(stranger)
    closed.meet(pool)
    closed.close()
    (key,) = watch.opened
    watch.leases[key] = lend(0.0)
    pool.name = stranger.name = "new"
    renamed(pool)

    assert watch.ledger.identity.name == "new"
    assert list(watch.leases) == [key]
    assert [ledger.identity.name for ledger in one.ledgers.values()] == ["old", "new"]
    assert unmoved.ledger.identity.name == "stranger"
    assert closed.ledgers == {}


# -- fork ------------------------------------------------------------------------------


def test_starting_over(registry):
    """A forked child has its parent's pools, as it finds them, and nothing of what happened or of who held."""
    watched, pool, resting = registry(), Pool(), Pool("resting")
    connection = Connection()
    pool.connections = [(connection, True)]
    parents = watched.meet(pool)
    watched.meet(resting)
    watched.close_down(resting)
    parents.leases[id(connection)] = lend(0.0)
    parents.closed("dispose")
    parents.ledger.outbox.deliver(Histograms(None, None, None, None), {})
    watched.after_fork()
    unmet = dict(watched.watches), dict(watched.ledgers), dict(watched.owners), list(watched.sighted)
    (child,) = watched.pools()

    assert unmet == ({}, {}, {}, [id(pool)])
    assert child is not parents
    assert (child.pool(), child.leases, child.closed_down) == (pool, {}, False)
    assert told(watched) == {"one": Reading(Snapshot(used=0), Tally(), 1, 0, 0.0, 0.0, 0)}


def test_what_was_inherited(registry):
    """A forked child knows its parent's connections as such; those of a pool that it has made itself are its own."""
    watched, pool, new = registry(), Pool(), Pool()
    connection = Connection()
    pool.connections = new.connections = [(connection, True)]
    watched.meet(pool)
    watched.after_fork()
    (child,) = watched.pools()

    assert list(child.inherited) == [id(connection)]
    assert watched.meet(new).inherited == {}
    assert watched._from_parent == {}


def test_one_library_that_cannot_start_over_costs_no_other(registry, quiet, caplog):
    """Each starts over by itself."""
    watched = [registry(), registry()]
    pools = [Pool(), Pool()]
    for each, pool in zip(watched, pools, strict=True):
        each.meet(pool)
    watched[0].watches = None
    _registry._after_fork()

    assert (watched[1].watches, list(watched[1].sighted)) == ({}, [id(pools[1])])
    assert "fork: AttributeError" in caplog.text
    watched[0].watches = {}
