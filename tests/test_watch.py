"""Watch and registry: who is alive, who is gone, and what they say of themselves."""

from __future__ import annotations

import copy
import gc
import pickle
import time
import weakref
from types import SimpleNamespace

import pytest
from sqlalchemy import create_engine
from sqlalchemy.pool import QueuePool

import otel_pools
from otel_pools import Settings, _doors, _guard
from otel_pools._leases import lend
from otel_pools._model import Identity, Load, Origin, Snapshot
from otel_pools._outbox import Histograms
from otel_pools._registry import Registry
from otel_pools._watch import Ledger, Passage, Watch, age
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
