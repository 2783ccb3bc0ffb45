"""Watch and registry: who is alive, who is gone, and what they say of themselves."""

from __future__ import annotations

import copy
import gc
import pickle
from types import SimpleNamespace

import pytest
from sqlalchemy import create_engine
from sqlalchemy.pool import QueuePool

import otel_pools
from otel_pools import _doors, _guard
from otel_pools._watch import Passage, age


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
