"""Watch and registry: who is alive, who is gone, and what they say of themselves."""

from __future__ import annotations

import copy
import gc
import pickle
import time
import weakref
from types import SimpleNamespace

import pytest
from doubles import Clock
from sqlalchemy import create_engine
from sqlalchemy.pool import QueuePool

import otel_pools
from otel_pools import Settings, _doors, _guard, _watch
from otel_pools._leases import lend, who
from otel_pools._model import Identity, Load, Origin, Snapshot
from otel_pools._outbox import Histograms
from otel_pools._registry import Registry
from otel_pools._watch import LONG_AGO, KeyedRef, Ledger, Passage, Watch, age, current_passage, detour, passages
from otel_pools.targets import Target


class Stub:
    """A DBAPI connection that does nothing."""

    def rollback(self):
        pass

    def close(self):
        pass

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None


@pytest.fixture
def registry(telemetry, monkeypatch):
    """SQLAlchemy's registry, watching; it does not look for what other tests have left."""
    monkeypatch.setattr(_doors, "sys", SimpleNamespace(modules={}))
    otel_pools.instrument(meter_provider=telemetry.meter_provider, tracer_provider=telemetry.tracer_provider)
    return otel_pools.SQLAlchemyPoolInstrumentor._registry


def test_reprs(registry):
    """A watch is one sentence about its pool, a registry one about its library."""
    engine = create_engine(
        "postgresql+psycopg://u:s3cret@db:5433/app",
        creator=Stub,
        poolclass=QueuePool,
        pool_size=2,
        max_overflow=1,
        _initialize=False,
    )
    held = engine.pool.connect()
    bare = QueuePool(Stub, max_overflow=-1, logging_name="bare")
    bare.connect().close()
    watches = [repr(watch) for watch in registry.pools()]
    engine.dispose()

    assert watches == [
        "<Watch app on postgresql at db:5433 [1 used, 0 idle of 3 | 0 waiting]>",
        "<Watch bare on other_sql [0 used, 1 idle | 0 waiting]>",
    ]
    assert repr(registry) == "<Registry sqlalchemy [1 pools, 1 resting]>"
    held.close()
    otel_pools.uninstrument()
    assert repr(registry) == "<Registry sqlalchemy [0 pools, 0 resting, inactive]>"
    passage = Passage("new", None)
    passage.creating = True
    assert repr(passage) == "<Passage new, creating>"


def test_a_pool_is_held_weakly(registry):
    """A pool that nobody has any more leaves nothing but its name's counters."""
    for _ in range(100):
        QueuePool(Stub, logging_name="gone").connect().close()
    gc.collect()

    assert registry.pools() == []
    assert len(registry.ledgers) == 1
    assert not registry.sighted


def test_nothing_is_written_into_the_pool(registry):
    """A watched pool has the attributes it had, so copying or pickling it meets nothing of ours."""
    pool = QueuePool(Stub, logging_name="plain")
    assert pool.dispatch  # SQLAlchemy's own, made at the first use
    before = set(vars(pool))
    fairy = pool.connect()
    record = fairy._connection_record
    fairy.close()

    assert set(vars(pool)) == before
    assert not [name for name in vars(record) if "otel" in name]
    assert pickle.dumps(list(before))
    assert set(vars(copy.copy(pool))) == before


def test_a_replaced_pool_wakes_when_it_is_used(registry, telemetry):
    """Somebody who kept the old pool and borrows from it is counted like anybody."""
    engine = create_engine(
        "sqlite://", creator=Stub, poolclass=QueuePool, pool_size=1, max_overflow=0, _initialize=False
    )
    old = engine.pool
    old.connect().close()
    engine.dispose()
    resting = telemetry.value("otel_pools.pools")
    fairy = old.connect()
    awake = telemetry.read()
    fairy.close()

    assert (resting, awake.value("otel_pools.pools"), awake.count("used")) == (1, 2, 1)


def test_a_pool_that_cannot_be_identified_works(registry, monkeypatch, caplog):
    """If meeting a pool fails, its checkouts go through, and the collector says why."""
    monkeypatch.setattr(_guard, "loud", False)
    monkeypatch.setattr(type(registry), "_ledger", lambda *_: 1 / 0)
    QueuePool(Stub).connect().close()
    _guard.speak()

    assert "meeting a QueuePool: ZeroDivisionError" in caplog.text


def test_age():
    """The oldest is the earliest; nobody is 0 seconds old."""
    assert age([3.0, 1.0], 4.0) == 3.0
    assert age([], 4.0) == 0.0


# -- a watch by itself ---------------------------------------------------------------


class Thing:
    """A pool, or a connection."""


@pytest.fixture
def watch():
    """Our record of a pool that says what `reading` holds."""
    spans = SimpleNamespace(threshold=1.0, waited=lambda *_: None)
    pool = Thing()
    registry = Registry(Target("lib", lambda _: None, lambda *_: reading[0], {}), Settings(), spans)
    watch = Watch(weakref.ref(pool), Ledger(Identity("lib", "sys", "one")), registry)
    reading = [Snapshot(used=0, orphaned=0)]
    yield SimpleNamespace(watch=watch, reading=reading, outbox=watch.ledger.outbox)
    del pool


def test_notes_are_bounded(watch, monkeypatch):
    """If nobody collects, waits with a story are dropped and counted too."""
    monkeypatch.setattr("otel_pools._watch.LIMIT", 10)
    for _ in range(25):
        watch.watch.noted(0.0, "new", None, None)

    tally = watch.outbox.tally()

    assert len(watch.watch.notes) <= 10
    assert tally.dropped + len(watch.watch.notes) == 25


def test_what_is_missing_once_is_on_its_way(watch):
    """A place is lost when two readings in a row miss it, and is back as soon as one does not."""
    told = []
    for missing in (0, 2, 1, 3, 0):
        watch.reading[0] = Snapshot(used=0, orphaned=missing)
        told.append(watch.watch.snapshot().orphaned)

    assert told == [0, 0, 1, 1, 0]


def test_a_collected_connection_is_closed_once(watch):
    """A connection that the collector closes is counted, and is nothing to one that is just being opened."""
    one, other = Thing(), Thing()
    watch.watch.met(one)
    watch.watch.opening(one)(True, None)
    opened = watch.watch.opening(other)
    del one
    opened(False, ConnectionError())

    tally = _told(watch.outbox)

    assert (tally.created, tally.closed) == (1, {"closed": 1})


def test_a_connection_that_two_close_is_closed_once(watch):
    """Whoever comes second finds it closed."""
    connection = Thing()
    watch.watch.opening(connection)(True, None)
    for _ in range(2):
        watch.watch.shut(id(connection), "dispose")

    assert _told(watch.outbox).closed == {"dispose": 1}


def test_what_is_closed_while_it_opens_was_opened(watch):
    """A connection that fails in its handshake was opened and closed."""
    connection = Thing()
    ended = watch.watch.opening(connection)
    watch.watch.shut(id(connection), "error")
    ended(False, ConnectionError())

    tally = _told(watch.outbox)

    assert (tally.created, tally.closed) == (1, {"error": 1})


def test_what_is_opened_again_was_closed(watch):
    """A connection that is opened though nobody has said that it was closed has been closed without a word."""
    connection = Thing()
    for _ in range(2):
        watch.watch.opening(connection)(True, None)

    tally = _told(watch.outbox)

    assert (tally.created, tally.closed) == (2, {"closed": 1})


def _told(outbox):
    outbox.deliver(Histograms(None, None, None, None), {})
    return outbox.tally()


def test_a_pool_takes_its_leases_to_its_new_name(watch):
    """Who holds a connection holds it under the new name, and those of another pool stay."""
    mine, theirs = Thing(), Thing()
    for held in (mine, theirs):
        watch.watch.leases[id(held)] = lend(time.perf_counter())
    old, new = watch.watch.ledger, Ledger(Identity("lib", "sys", "two"))
    watch.watch.move(new, [id(mine)])

    assert (list(old.leases), list(new.leases)) == ([id(theirs)], [id(mine)])
    assert watch.watch.leases is new.leases


def test_an_origin_that_has_nothing_left_is_told_as_nothing(monkeypatch):
    """Who keeps the last value of a series hears that it is over; but not for ever of very many."""
    monkeypatch.setattr("otel_pools._watch.ORIGINS", 2)
    ledger = Ledger(Identity("lib", None, "one"))
    here, there = Origin("https", "here", 443), Origin("https", "there", 443)

    first = ledger.with_former({here: Load(1, 0, 1)})
    second = ledger.with_former({there: Load(0, 1, 0)})
    for number in range(10):
        last = ledger.with_former({Origin("https", str(number), 443): Load(1, 0, 0)})

    assert first == {here: Load(1, 0, 1)}
    assert second == {here: Load(), there: Load(0, 1, 0)}
    assert len(last) <= 3
    assert ledger.with_former(None) is None


# -- the story of a checkout -----------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """Ours, as of now."""
    clock = Clock()
    monkeypatch.setattr(_watch, "clock", clock)
    return clock


@pytest.fixture(autouse=True)
def outside():
    """No checkout is under way when the test begins, nor is one left when it has ended."""
    token = _watch._passage.set(None)
    yield
    _watch._passage.reset(token)


def test_a_passage_begins_with_nothing(clock):
    """It knows its path, since when, and that nothing was created or has failed yet."""
    passage = detour("new")

    assert current_passage() is passage
    assert (passage.path, passage.since, passage.outer) == ("new", 100.0, None)
    assert (passage.creating, passage.created, passage.failed) == (False, False, 0)
    assert repr(passage) == "<Passage new>"


def test_a_passage_is_known_while_it_lasts(watch, clock):
    """While there is none in the whole process, no checkout asks for its own."""
    before = set(passages)
    detour("new")
    during = passages - before
    watch.watch.acquired(100.0, 100.0, 1)
    watch.watch.notes.clear()

    assert len(during) == 1
    assert passages == before


@pytest.mark.parametrize(("paths", "path"), [(("new", "queued"), "queued"), (("queued", "new"), "queued")])
def test_having_queued_outweighs_the_rest(clock, paths, path):
    """One checkout has one passage, which is of its last detour, and queued if ever it was."""
    first, last = map(_detour_later(clock), paths)

    assert last is first
    assert (last.path, last.since) == (path, 102.0)


def _detour_later(clock):
    def detour_later(path):
        clock.now += 1.0
        return detour(path)

    return detour_later


def test_a_path_gives_way_to_the_next():
    """What was not queued is what it was last."""
    detour("new")

    assert detour("other").path == "other"


def test_a_creator_may_ask_a_pool_itself(watch, clock):
    """A checkout inside a creation has a story of its own, and after it the outer one goes on."""
    outer = detour("new")
    outer.creating = True
    inner = detour("queued")
    watch.watch.acquired(100.0, 100.0, 1)

    assert inner is not outer
    assert inner.outer is outer
    assert [note.path for note in watch.watch.notes] == ["queued"]
    assert current_passage() is outer
    watch.watch.acquired(100.0, 100.0, 2)
    assert current_passage() is outer
    assert watch.watch.waits == [0.0]


@pytest.mark.parametrize(("start", "path"), [(100.0, "new"), (100.5, "idle")])
def test_a_story_from_before_is_none_of_a_checkout(watch, clock, start, path):
    """What happened before a checkout began was another's; it is over all the same."""
    detour("new")
    watch.watch.acquired(start, start, 1)

    assert ([note.path for note in watch.watch.notes] or ["idle"] * len(watch.watch.waits)) == [path]
    assert current_passage() is None


# -- the pools of one name -------------------------------------------------------------


def test_a_peak_is_told_once():
    """Asked again it is what is held now; what is held now may be the peak."""
    ledger = Ledger(Identity("lib", "sys", "one"))
    ledger.peak = 5

    assert [ledger.take_peak(used) for used in (2, 1, 3, 0, 0)] == [5, 2, 3, 3, 0]


def test_what_a_ledger_begins_with():
    """Nobody holds, waits or is overdue, and nobody looks."""
    ledger = Ledger(Identity("lib", "sys", "one"))

    assert repr(ledger) == "<Ledger one [0 held, 0 waiting]>"
    assert (ledger.overdue, ledger.looking.locked(), ledger.peak) == ({}, False, 0)
    ledger.leases[1] = lend(0.0)
    ledger.waiting.extend([1.0, 2.0])
    assert repr(ledger) == "<Ledger one [1 held, 2 waiting]>"


@pytest.mark.parametrize(("origins", "told"), [(100, 101), (101, 1)])
def test_so_many_origins_are_remembered(origins, told):
    """Of up to a hundred it is said that they have nothing now; of more none is remembered."""
    ledger = Ledger(Identity("lib", None, "one"))
    ledger.with_former({Origin("https", str(number), 443): Load(1, 0, 0) for number in range(origins)})

    assert len(ledger.with_former({Origin("http", "new", 80): Load(1, 0, 0)})) == told


def test_what_has_become_of_a_watch(watch):
    """A new one knows its pool and nothing else; it is one sentence."""
    it = watch.watch
    tables = (it.holding, it.members, it.creating, it.opened, it.inherited, it.busy, it.working, it.made, it.orphans)

    assert not any(tables)
    assert (it.slow, it.patience, it.closed_down) == (1.0, 60.0, False)
    watch.reading[0] = Snapshot(used=1, idle=2, max=3, pending=4)
    assert repr(it) == "<Watch one on sys [1 used, 2 idle of 3 | 4 waiting]>"
    it.move(Ledger(Identity("lib", None, "two", address="db", port=1)))
    watch.reading[0] = Snapshot(used=1, idle=2, pending=4)
    assert repr(it) == "<Watch two on lib at db:1 [1 used, 2 idle | 4 waiting]>"


def test_a_new_name_has_all_that_happens_from_now_on(watch):
    """Who waits, what is lent and every sample go under the new name, and what was overdue with the leases."""
    it, old, new = watch.watch, watch.watch.ledger, Ledger(Identity("lib", "sys", "two"))
    leases = {key: lend(0.0) for key in (1, 2, 3)}
    old.leases.update({1: leases[1], 2: leases[2]})
    old.overdue.update({2: leases[2], 3: leases[3]})
    it.move(new, iter([1, 2, 4]))

    assert (old.leases, old.overdue) == ({}, {3: leases[3]})
    assert (new.leases, new.overdue) == ({1: leases[1], 2: leases[2]}, {2: leases[2]})
    assert it.ledger is new
    assert (it.waiting, it.leases) == (new.waiting, new.leases)
    assert it.waiting is new.waiting
    box = new.outbox
    assert all(one is other for one, other in ((it.waits, box.waits), (it.uses, box.uses), (it.notes, box.notes)))


# -- a checkout with a story -----------------------------------------------------------


@pytest.fixture
def spans(watch, clock):
    """What the spans of this watch are asked to write."""
    told = []
    watch.watch._spans.waited = lambda *args: told.append(args) or "context"
    watch.watch._spans.exhausted = lambda *args: told.append(("exhausted", *args))
    return told


@pytest.mark.parametrize(
    ("seconds", "story", "is_worth_it"),
    [
        (1.0, ("idle", 0), True),
        (0.9, ("idle", 0), False),
        (0.9, ("new", 0), False),
        (0.9, ("new", 1), True),
        (0.9, ("queued", 1), False),
    ],
)
def test_what_is_worth_a_span(watch, spans, seconds, story, is_worth_it):
    """A wait from the threshold on, or one that opened a connection beyond the pool's size."""
    path, overflow = story
    watch.reading[0] = Snapshot(used=1, overflow=overflow)
    if path != "idle":
        detour(path)
    watch.watch.acquired(0.0, seconds, 1)

    assert spans == [(watch.watch, seconds, path, None)] * is_worth_it
    context = "context" if is_worth_it else None
    told = [(*note,) for note in watch.watch.notes] or [(*watch.watch.waits, "idle", None, None, 100.0)]
    assert told == [(seconds, path, None, context, 100.0)]


def test_who_gets_an_inherited_connection_is_told_once(watch):
    """While some are left every checkout is looked at; afterwards the common case is common again."""
    it, connections = watch.watch, [Thing(), Thing()]
    for connection in connections:
        it.met(connection)
    it.inherit(dict(it.members))
    before = it.slow
    lease = it.leases[id(connections[0])] = lend(1.0)
    it.acquired(1.0, 1.0, id(connections[0]))
    between = it.slow
    it.acquired(1.0, 1.0, id(connections[0]))
    it.leases[id(connections[1])] = lend(1.0)
    it.acquired(1.0, 1.0, id(connections[1]))

    events = watch.outbox.events
    assert [event.what for event in events] == ["inherited", "inherited"]
    assert tuple(events[0]) == ("inherited", lease, 0.0, None)
    assert (before, between, it.slow, it.inherited) == (-1.0, -1.0, 1.0, {})


@pytest.mark.parametrize("missing", ["connection", "lease", "key"])
def test_what_is_not_inherited(watch, missing):
    """A connection that is gone, has no lease or was not there at the fork is nobody's parent's."""
    it, connection = watch.watch, Thing()
    key = id(connection)
    it.inherit({key + 1 if missing == "key" else key: KeyedRef(connection, lambda _: None, key)})
    if missing != "lease":
        it.leases[key] = lend(1.0)
    if missing == "connection":
        del connection
    it.acquired(1.0, 1.0, key)

    assert watch.outbox.events == []


def test_a_keyed_reference_knows_its_place():
    """Its key is the thing's id, or the one it is given; it says when the thing is gone."""
    gone, thing = [], Thing()
    one, other = KeyedRef(thing, gone.append), KeyedRef(thing, gone.append, 7)

    assert (one.key, other.key, one() is thing) == (id(thing), 7, True)
    del thing
    assert {id(ref) for ref in gone} == {id(one), id(other)}


# -- what the server does --------------------------------------------------------------


def test_the_seconds_that_the_server_works(watch, clock):
    """For each loan they add up, what is under way included; another loan of the connection has its own."""
    it, lease, other = watch.watch, lend(1.0), lend(2.0)
    told = [it.busy_for(1, lease)]
    it.leases[1] = lease
    for seconds in (2.0, 3.0):
        it.working[1] = clock.now
        clock.now += seconds
        told.append(it.busy_for(1, lease))
        it.worked(1)
        told.append(it.busy_for(1, lease))
    told.append(it.busy_for(1, other))
    it.leases[1] = other
    it.working[1] = clock.now
    clock.now += 4.0
    told.append(it.busy_for(1, other))
    it.worked(1)
    told.append(it.busy_for(1, other))

    assert told == [None, 2.0, 2.0, 5.0, 5.0, 0.0, 4.0, 4.0]
    assert (watch.outbox.busies, it.working) == ([2.0, 3.0, 4.0], {})


def test_work_for_nobody_is_work(watch, clock):
    """What nobody has borrowed is counted for the pool; what we did not see begin took no time."""
    watch.watch.working[1] = 98.0
    watch.watch.worked(1)
    watch.watch.worked(2)

    assert (watch.outbox.busies, watch.watch.busy) == ([2.0, 0.0], {})


# -- who holds what --------------------------------------------------------------------


def lease_of(owner, since, name="task"):
    return (since, owner, name, *lend(since)[3:])


@pytest.fixture
def holder(watch):
    """Somebody, 7, who holds two: 1 since 20 and 2 since 10; and a third, 3 since 30, that he has just got."""
    for key, since in ((1, 20.0), (2, 10.0), (3, 30.0)):
        watch.watch.leases[key] = lease_of(7, since)
    watch.watch.holding[7] = {1, 2}
    return watch.watch


def test_the_oldest_of_several_is_the_outer_one(watch, holder):
    """Who gets one more while holding two is told with the one that he has longest."""
    holder.nests(7, 3)

    assert [tuple(each) for each in watch.outbox.events] == [("nested", holder.leases[2], 0.0, holder.leases[3])]
    assert holder.holding == {7: {1, 2, 3}}


def test_two_that_began_at_once_are_one_nesting(watch, holder):
    """On a coarse clock leases may have begun at the same moment, and either is the outer one."""
    holder.leases[2] = lease_of(7, 20.0)
    holder.nests(7, 3)

    assert [each.lease[0] for each in watch.outbox.events] == [20.0]


def test_who_has_given_back_meanwhile_is_not_nested(watch, holder):
    """Who is not down as holding any has nothing but what he has just got."""
    del holder.holding[7]
    holder.nests(7, 3)

    assert (watch.outbox.events, holder.holding) == ([], {7: 3})


def test_who_asks_in_vain_is_nested_too(watch, holder, clock):
    """Who holds one and gets none is told with a lease that begins now; he holds what he held."""
    holder.lend = lambda since: lease_of(7, since)
    holder.nests(7, None)

    (event,) = watch.outbox.events
    assert (event.what, event.lease, event.other[:3]) == ("nested", holder.leases[2], (100.0, 7, "task"))
    assert holder.holding == {7: {1, 2}}


def test_the_same_number_by_another_name_is_somebody_else(watch, holder):
    """Threads' and tasks' numbers are given again: what an earlier one has left is not held by the next."""
    holder.leases[3] = lease_of(7, 30.0, "another")
    holder.nests(7, 3)

    assert (watch.outbox.events, holder.holding) == ([], {7: 3})


def test_what_is_not_lent_any_more_is_not_held(watch, holder):
    """Of what he is down as holding only what is lent counts."""
    del holder.leases[2]
    holder.nests(7, 3)
    del holder.leases[1]
    holder.holding[7] = {1, 2}
    holder.nests(7, 3)

    assert [each.lease[0] for each in watch.outbox.events] == [20.0]
    assert holder.holding == {7: 3}


def test_a_lease_that_is_gone_by_now_nests_all_the_same(watch, holder):
    """If what he has just got is back already, the others are told."""
    del holder.leases[3]
    holder.holding[7] = 1
    holder.nests(7, 3)

    assert [tuple(each) for each in watch.outbox.events] == [("nested", holder.leases[1], 0.0, None)]
    assert holder.holding == {7: {1, 3}}


def test_when_threads_have_become_several_nobody_is_nested(watch, holder, monkeypatch):
    """If gevent has taken the place of threads since, who seemed to be one are several."""
    monkeypatch.setattr(_watch, "settle", lambda: True)
    holder.nests(7, 3)

    assert (watch.outbox.events, holder.holding) == ([], {7: {1, 2}})


@pytest.mark.parametrize(
    ("held", "rest"),
    [({1, 2}, 2), ({1, 2, 3}, {2, 3}), ({1}, None), ({2, 3}, {2, 3}), (2, 2), (None, None)],
)
def test_what_is_left_when_one_has_come_back(watch, held, rest):
    """Of several that he held the others stay; one that he still has stays his."""
    watch.watch.has_back(7, 1, held)

    assert watch.watch.holding == ({} if rest is None else {7: rest})


@pytest.mark.parametrize("verb", ["used", "ended", "kept", "gone"])
@pytest.mark.parametrize(("held", "rest"), [("it", {}), ("another", {7: 2}), ("both", {7: 2}), ("none", {})])
def test_a_loan_that_ends_is_not_held(watch, verb, held, rest):
    """However a loan ends, its borrower has what else he had."""
    it, connection = watch.watch, Thing()
    key = id(connection)
    it.met(connection)
    lease = it.leases[key] = lease_of(7, 1.0)
    if held != "none":
        it.holding[7] = {"it": key, "another": 2, "both": {key, 2}}[held]
    if verb == "used":
        it.used(key, it.leases.pop(key), 3.0)
    elif verb == "gone":
        del connection
    else:
        getattr(it, verb)(*(connection, lease)[: 1 + (verb == "kept")])

    assert it.holding == rest
    assert list(it.leases) == [key] * (verb == "kept")


@pytest.mark.parametrize(("patience", "is_late"), [(4.9, True), (5.0, False)])
def test_a_loan_ends_at_its_time(watch, patience, is_late):
    """Its use is from its lease to its end, and beyond our patience it is told."""
    watch.watch.patience = patience
    lease = lend(10.0)
    watch.watch.used(1, lease, 15.0)

    assert watch.watch.uses == [5.0]
    assert [tuple(each) for each in watch.outbox.events] == [("late", lease, 5.0, None)] * is_late


def test_a_loan_may_end_without_coming_back(watch, clock):
    """It was in use until now, once; what was not lent has no use."""
    connection = Thing()
    watch.watch.leases[id(connection)] = lend(90.0)
    for _ in range(2):
        watch.watch.ended(connection)

    assert (watch.watch.uses, watch.watch.leases) == ([10.0], {})


def test_what_the_collector_gave_back_is_told_with_its_age(watch, clock):
    """It is a leak, of this lease, as old as the lease."""
    lease = lend(90.0)
    watch.watch.collected(lease)

    assert [tuple(each) for each in watch.outbox.events] == [("collected", lease, 10.0, None)]


def test_what_did_not_come_back_is_an_orphan(watch):
    """It is lent as before, to nobody that could give it back, and is a lost place."""
    connection, lease = Thing(), lease_of(7, 1.0)
    watch.watch.kept(connection, lease)
    watch.reading[0] = Snapshot(used=1, orphaned=0)

    assert watch.watch.leases == {id(connection): lease}
    assert watch.watch.snapshot().orphaned == 1


# -- a failed checkout -----------------------------------------------------------------


def _refusal(error):
    return {"QueueEmpty": "timeout", "TooMany": "exhausted"}.get(type(error).__qualname__)


def _error(name):
    return type(name, (Exception,), {})()


@pytest.mark.parametrize(
    ("error", "word", "said"),
    [
        ("QueueEmpty", "timeout", 2),
        ("TooMany", "exhausted", 2),
        ("CancelledError", "cancelled", 1),
        ("Cancelled", "cancelled", 1),
        ("OperationalError", "OperationalError", 1),
        ("GeneratorExit", "cancelled", 0),
        ("GreenletExit", "cancelled", 0),
    ],
)
def test_a_failure_has_one_word(watch, spans, error, word, said):
    """It is counted by it, with the seconds that it took; an abandoned one has no span, an exhausted pool is said."""
    watch.watch.failed([98.0], 98.0, _error(error), _refusal)

    assert spans == [(watch.watch, 2.0, "idle", word), ("exhausted", watch.watch, 2.0)][:said]
    assert [tuple(note) for note in watch.watch.notes] == [(2.0, "idle", word, "context" if said else None, 100.0)]


@pytest.mark.parametrize("is_the_same", [True, False])
def test_a_connection_that_failed_to_open_is_no_refusal(watch, spans, is_the_same):
    """If the error is the one of opening a connection, that is its word; the path is the passage's."""
    error = _error("TooMany")
    another = _error("TooMany")
    detour("new").failed = id(error if is_the_same else another)
    watch.watch.failed([98.0], 98.0, error, _refusal)

    assert [(note.path, note.error) for note in watch.watch.notes] == [
        ("new", "connect_error" if is_the_same else "exhausted")
    ]
    assert current_passage() is None


def test_an_abandoned_checkout_has_its_path(watch, spans):
    """What the collector ends while it waits has waited."""
    detour("queued")
    watch.watch.failed([98.0], 98.0, GeneratorExit(), _refusal)

    assert [(note.path, note.error) for note in watch.watch.notes] == [("queued", "cancelled")]


@pytest.mark.parametrize("holds", [True, False])
def test_who_holds_one_and_gets_none_is_nested(watch, spans, holds):
    """A refusal is nested if who is refused has one already."""
    owner, name = who()
    held = watch.watch.leases[1] = lease_of(owner, 1.0, name)
    watch.watch.holding[owner if holds else owner + 1] = 1
    watch.watch.failed([98.0], 98.0, _error("TooMany"), _refusal)

    assert [(event.what, event.lease) for event in watch.outbox.events] == [("nested", held)] * holds


def test_a_mistake_in_a_failed_checkout_is_ours(watch, spans, monkeypatch, caplog):
    """If we fail to tell a refusal, the caller does not hear of it."""
    monkeypatch.setattr(_guard, "loud", False)
    watch.watch.failed([98.0], 98.0, _error("TooMany"), lambda _: 1 / 0)

    assert "a failed checkout: ZeroDivisionError" in caplog.text


# -- a connection's life ---------------------------------------------------------------


def test_a_connection_is_met_once(watch):
    """What comes back and is a member already is no new one."""
    connection = Thing()
    watch.watch.returned(connection)
    ref = watch.watch.members[id(connection)]
    watch.watch.returned(connection)

    assert watch.watch.members == {id(connection): ref}
    assert watch.watch.members[id(connection)] is ref
    assert watch.watch.owners[id(connection)] is watch.watch


def test_a_connection_may_be_forgotten(watch):
    """What is unmet belongs to nobody, however often it is; others stay."""
    one, other = Thing(), Thing()
    for each in (one, other):
        watch.watch.met(each)
    for _ in range(2):
        watch.watch.unmeet(one)

    assert list(watch.watch.members) == list(watch.watch.owners) == [id(other)]


def test_a_connection_that_is_gone_leaves_nothing(watch):
    """No table of ours has it any more, and the others' entries stay; if it was open, it has been closed."""
    it, connection, other = watch.watch, Thing(), Thing()
    key = id(connection)
    for each in (connection, other):
        it.met(each)
        it.busy[id(each)], it.working[id(each)], it.inherited[id(each)] = (lend(1.0), 1.0), 1.0, it.members[id(each)]
        it.leases[id(each)] = lease_of(id(each), 1.0)
        it.orphans.add(id(each))
        it.made.add(id(each))
        it.opened[id(each)] = 1.0
    del connection, each

    for table in (it.members, it.owners, it.busy, it.working, it.inherited, it.leases, it.orphans, it.made, it.opened):
        assert list(table) == [id(other)]
    assert key not in it.leases
    assert watch.outbox.closes == ["closed"]


def test_a_mistake_when_something_is_gone_is_said_later(watch, monkeypatch, caplog):
    """The collector, which may be anywhere, hears nothing of it."""
    monkeypatch.setattr(_guard, "loud", False)
    monkeypatch.setattr(Watch, "shut", lambda *_: 1 / 0)
    connection = Thing()
    watch.watch.met(connection)
    watch.watch.opened[id(connection)] = 1.0
    del connection

    assert caplog.text == ""
    _guard.speak()
    assert "a connection that is gone: ZeroDivisionError" in caplog.text


def test_the_connections_that_are_alive(watch):
    """Those that we have met and that are there."""
    one, other = Thing(), Thing()
    watch.watch.met(one)
    watch.watch.members[1] = weakref.ref(Thing())
    watch.watch.met(other)

    assert list(watch.watch.connections()) == [one, other]


def test_a_connection_is_open_when_its_opening_has_ended(watch, clock):
    """Its creation lasts from the call to then; meanwhile the passage is one of a creation, and then no more."""
    connection = Thing()
    watch.watch.made |= {id(connection), 1}
    ended = watch.watch.opening(connection)
    during = current_passage().creating, current_passage().path
    clock.now += 3.0
    ended(True, None)
    passage = current_passage()

    assert during == (id(connection), "new")
    assert watch.outbox.creates == [3.0]
    assert (watch.watch.opened, watch.watch.made) == ({id(connection): 103.0}, {1})
    assert (passage.creating, passage.created, passage.failed) == (False, False, 0)


def test_another_connection_may_close_while_one_opens(watch):
    """If the garbage collector ends one in the midst of it, that says nothing of what is being opened."""
    ended = watch.watch.opening(Thing())
    watch.watch.shut(1, "closed")
    ended(False, ConnectionError())

    assert (watch.outbox.creates, watch.outbox.closes) == ([], [])


def test_a_connection_that_did_not_open(watch):
    """It is none, nothing was created, and the passage has the error."""
    connection, error = Thing(), ConnectionError()
    watch.watch.made.add(id(connection))
    watch.watch.opening(connection)(False, error)

    assert (watch.outbox.creates, watch.watch.opened, watch.watch.made) == ([], {}, {id(connection)})
    assert current_passage().failed == id(error)
    assert not current_passage().creating


def test_a_handshake_that_fails_twice_is_one_connection(watch):
    """A connection that is closed twice while it opens was closed once, for the first reason; the next is another."""
    connection = Thing()
    for _ in range(2):
        ended = watch.watch.opening(connection)
        watch.watch.shut(id(connection), "error")
        watch.watch.shut(id(connection), "closed")
        ended(False, ConnectionError())

    assert (watch.outbox.closes, len(watch.outbox.creates), watch.outbox.lives) == (["error"] * 2, 2, [])


@pytest.mark.parametrize("since", [90.0, LONG_AGO])
def test_a_life_is_told_if_it_is_known(watch, clock, since):
    """How long a connection was open, unless it was before we came; it is closed for this reason either way."""
    watch.watch.opened[1] = since
    watch.watch.shut(1, "dispose")

    assert (watch.outbox.lives, watch.outbox.closes) == ([10.0] * (since == 90.0), ["dispose"])


@pytest.mark.parametrize("story", [None, "queued"])
def test_what_was_not_open_is_not_closed(watch, story):
    """Outside of any opening, what is not open cannot be closed."""
    if story:
        detour(story)
    watch.watch.shut(1, "dispose")

    assert (watch.outbox.closes, watch.outbox.lives) == ([], [])
    assert current_passage() is None or not current_passage().created


# -- what a pool says ------------------------------------------------------------------


def test_a_pool_that_is_gone_says_nothing(watch):
    """All of its numbers are unknown."""
    it = Watch(weakref.ref(Thing()), watch.watch.ledger, watch.watch.registry)

    assert it.state() == it.snapshot() == Snapshot()


def test_a_pool_that_cannot_be_read_says_nothing(watch, monkeypatch, caplog):
    """The mistake is said with its pool's class."""
    monkeypatch.setattr(_guard, "loud", False)
    watch.reading.clear()

    assert watch.watch.state() == Snapshot()
    assert "reading a Thing: IndexError" in caplog.text


def test_a_pool_is_read_with_its_record(watch):
    """Who reads it gets the pool, and what we know of it."""
    asked = []
    watch.watch._read = lambda *args: asked.append(args) or Snapshot(used=1)

    assert watch.watch.state() == Snapshot(used=1)
    assert asked == [(watch.watch.pool(), watch.watch)]


def test_a_pool_that_was_replaced_has_no_limits(watch):
    """It says what is used, idle and pending, and nothing else."""
    watch.reading[0] = Snapshot(used=1, idle=2, pending=3, max=4, idle_max=5, orphaned=6)
    watch.watch.closed_down = True

    assert watch.watch.snapshot() == Snapshot(used=1, idle=2, pending=3)


def test_what_is_said_stays_as_it_is(watch):
    """Where a library cannot tell what is missing, nothing is added; otherwise only that number changes."""
    watch.watch.orphans |= {1, 2}
    told = []
    for orphaned in (None, 1, 1):
        watch.reading[0] = Snapshot(used=1, idle=2, max=4, orphaned=orphaned)
        told.append(watch.watch.snapshot())

    assert told == [Snapshot(used=1, idle=2, max=4, orphaned=orphaned) for orphaned in (None, 2, 3)]


@pytest.mark.parametrize("limit", [3, 2])
def test_so_many_stories_are_kept(watch, clock, monkeypatch, limit):
    """Up to the limit they wait for who collects; one more, and all are counted and let go."""
    monkeypatch.setattr(_watch, "LIMIT", limit)
    for _ in range(3):
        watch.watch.noted(1.0, "new", "timeout", None)

    assert len(watch.watch.notes) == (3 if limit == 3 else 0)
    assert watch.outbox.tally().dropped == (0 if limit == 3 else 3)


def test_opened_and_closed_are_counted(watch, clock):
    """A creation by its seconds, a close by its reason."""
    watch.watch.created(98.0)
    watch.watch.closed("recycle")

    assert (watch.outbox.creates, watch.outbox.closes) == ([2.0], ["recycle"])
