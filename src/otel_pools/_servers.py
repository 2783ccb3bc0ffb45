"""What the server says of its connections, asked on a connection of our own that lives for one question."""

from __future__ import annotations

import asyncio
import inspect
import math
import os
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

from .targets import descriptor

Answer = TypeVar("Answer")

# -- what it says ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ServerConnections:
    """
    The sessions of a PostgreSQL server, of all its clients and without the one that asked.

    Attributes:
        server: Whom we asked, as in ``PostgreSQL at db.example:5432``.
        total: Sessions of clients; not those of the server itself, nor of replicas.
        active: Of these, who run a statement.
        idle: Who do nothing.
        idle_in_transaction: Who do nothing and have a transaction open, an aborted one included.
        hidden: Whose state our role may not see: they are in `total` and in none of the three above, nor in the
            two below. ``GRANT pg_monitor TO <role>`` shows them.
        longest_query_s: For how long the longest running statement has run, in seconds; None if none runs.
        longest_transaction_s: Likewise of transactions.
        by_application: Sessions by ``application_name``; an empty name is one too.
        max_connections: The server's setting.
        reserved: Connections that it keeps for superusers and for ``pg_use_reserved_connections``.
    """

    server: str
    total: int
    active: int
    idle: int
    idle_in_transaction: int
    hidden: int
    longest_query_s: float | None
    longest_transaction_s: float | None
    by_application: Mapping[str, int]
    max_connections: int
    reserved: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class ServerClients:
    """
    The clients of a Redis or Valkey server, the one that asked included.

    Attributes:
        server: Whom we asked, as in ``Redis at cache.example:6379``.
        connected_clients: Connections of clients.
        blocked_clients: Of these, who wait in a blocking command.
        maxclients: The most it takes; None where it does not tell (an old server, or a proxy in its place).
        total_connections_received: Connections it has taken since it was started.
        rejected_connections: Connections it has refused because of `maxclients`.
    """

    server: str
    connected_clients: int
    blocked_clients: int
    maxclients: int | None
    total_connections_received: int | None
    rejected_connections: int | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """
    How many connections a server takes.

    Attributes:
        server: Whom we asked.
        max_connections: The server's setting: ``max_connections``, or Redis's ``maxclients``.
        reserved: Those of them that applications do not get.
        usable: What all instances of all applications together can have under this role and database.
        limits: Narrower limits that hold for the one who asked, by where they are set: ``role``, ``database``,
            ``user``.
    """

    server: str
    max_connections: int
    reserved: int
    usable: int
    limits: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


# -- the questions -----------------------------------------------------------------


def server_connections(engine_or_client: Any, timeout: float = 2.0) -> ServerConnections | ServerClients:
    """
    Ask a server who is connected to it.

    On a connection of its own, made as the pool makes them and closed at once:
    a pool that is exhausted can be asked about, and its numbers stay as they
    are. Nothing is written: PostgreSQL is asked in a read-only transaction.

    Args:
        engine_or_client: A SQLAlchemy Engine on PostgreSQL, or a client or pool of redis-py or valkey-py.
        timeout: Seconds after which to give up, connecting included.

    Raises:
        TypeError: It is nothing of these; an asyncio one wants `server_connections_async`.
        TimeoutError: No answer in time; or the last question to it still hangs, so that threads cannot pile up.
        PermissionError: The server does not let us in, or does not let us see.
        ConnectionError: It cannot be reached, or takes no more connections.
    """
    answer: ServerConnections | ServerClients = _ask(engine_or_client, timeout, _who)
    return answer


async def server_connections_async(engine_or_client: Any, timeout: float = 2.0) -> ServerConnections | ServerClients:
    """
    Ask a server who is connected to it, from asyncio.

    Args:
        engine_or_client: Also an AsyncEngine, or an asyncio client; otherwise as in `server_connections`.
        timeout: Likewise.

    Raises:
        OSError: As `server_connections`: TimeoutError, PermissionError, ConnectionError.
        TypeError: Likewise.
    """
    answer: ServerConnections | ServerClients = await _ask_async(engine_or_client, timeout, _who)
    return answer


def server_limits(engine_or_client: Any, timeout: float = 2.0) -> ServerLimits:
    """
    Ask a server how many connections it takes: what all instances of an application have to share.

    Args:
        engine_or_client: A SQLAlchemy Engine on PostgreSQL, MySQL or MariaDB, or a client of redis-py or valkey-py.
        timeout: Seconds after which to give up, connecting included.

    Raises:
        OSError: As `server_connections`: TimeoutError, PermissionError, ConnectionError.
        TypeError: Likewise.
        LookupError: The server does not tell.
    """
    answer: ServerLimits = _ask(engine_or_client, timeout, _how_many)
    return answer


async def server_limits_async(engine_or_client: Any, timeout: float = 2.0) -> ServerLimits:
    """
    Ask a server how many connections it takes, from asyncio.

    Args:
        engine_or_client: Also an AsyncEngine, or an asyncio client; otherwise as in `server_limits`.
        timeout: Likewise.

    Raises:
        OSError: As `server_connections`: TimeoutError, PermissionError, ConnectionError.
        TypeError: Likewise.
        LookupError: The server does not tell.
    """
    answer: ServerLimits = await _ask_async(engine_or_client, timeout, _how_many)
    return answer


# -- what is asked, and what the answers mean --------------------------------------

READ_ONLY = "SET TRANSACTION READ ONLY"

# Whom we may not see has no backend_type; those of the server itself have no user or no database.
SESSIONS = """
SELECT application_name,
       count(*),
       count(*) FILTER (WHERE state IN ('active', 'fastpath function call')),
       count(*) FILTER (WHERE state = 'idle'),
       count(*) FILTER (WHERE state IN ('idle in transaction', 'idle in transaction (aborted)')),
       count(*) FILTER (WHERE backend_type IS NULL),
       max(extract(epoch FROM clock_timestamp() - query_start)) FILTER (WHERE state = 'active'),
       max(extract(epoch FROM clock_timestamp() - xact_start))
FROM pg_catalog.pg_stat_activity
WHERE pid <> pg_backend_pid() AND usesysid IS NOT NULL AND datid IS NOT NULL
      AND (backend_type IS NULL OR backend_type = 'client backend')
GROUP BY 1
"""
# The third is there from PostgreSQL 16 on; a limit of -1 is none.
LIMITS = """
SELECT current_setting('max_connections'),
       current_setting('superuser_reserved_connections'),
       current_setting('reserved_connections', true),
       (SELECT rolconnlimit FROM pg_catalog.pg_roles WHERE rolname = session_user),
       (SELECT datconnlimit FROM pg_catalog.pg_database WHERE datname = current_database())
"""
MYSQL_LIMITS = "SELECT @@GLOBAL.max_connections, @@GLOBAL.max_user_connections"


@dataclass(frozen=True, slots=True)
class _Question:
    """What to say to one server, and how to read what it says."""

    server: str
    texts: tuple[str, ...]
    read: Callable[..., Any]
    before: tuple[str, ...] = ()


def _who(server: str, system: str, seconds: float) -> _Question:
    if system == "redis":
        return _Question(server, ("clients", "stats"), _clients)
    if system == "postgresql":
        return _Question(server, (SESSIONS, LIMITS), _sessions, _politely(seconds))
    raise TypeError(f"only PostgreSQL and Redis tell who is connected, not {system}")


def _how_many(server: str, system: str, seconds: float) -> _Question:
    if system == "redis":
        return _Question(server, ("clients",), _redis_limits)
    if system == "postgresql":
        return _Question(server, (LIMITS,), _postgres_limits, _politely(seconds))
    if system in {"mysql", "mariadb"}:
        return _Question(server, (MYSQL_LIMITS,), _mysql_limits)
    raise TypeError(f"only PostgreSQL, MySQL and Redis have a limit we know to ask for, not {system}")


def _politely(seconds: float) -> tuple[str, ...]:
    # LOCAL: behind PgBouncer the session is somebody else's a moment later.
    return READ_ONLY, f"SET LOCAL statement_timeout = {max(int(seconds * 1000), 1)}"


def _sessions(server: str, rows: list[Any], limits: list[Any]) -> ServerConnections:
    names, *counts, queries, transactions = zip(*rows, strict=True) if rows else ((),) * 8
    total, active, idle, in_transaction, hidden = (int(sum(column)) for column in counts)
    most = _postgres_limits(server, limits)
    return ServerConnections(
        server=server,
        total=total,
        active=active,
        idle=idle,
        idle_in_transaction=in_transaction,
        hidden=hidden,
        longest_query_s=_longest(queries),
        longest_transaction_s=_longest(transactions),
        by_application=dict(zip(names, counts[0], strict=True)),
        max_connections=most.max_connections,
        reserved=most.reserved,
    )


def _longest(ages: tuple[Any, ...]) -> float | None:
    return max((round(float(age), 6) for age in ages if age is not None), default=None)


def _postgres_limits(server: str, rows: list[Any]) -> ServerLimits:
    (most, for_superusers, for_others, role, database), *_ = rows
    reserved = int(for_superusers) + int(for_others or 0)
    return _limits(server, int(most), reserved, role=role, database=database)


def _mysql_limits(server: str, rows: list[Any]) -> ServerLimits:
    (most, user), *_ = rows
    return _limits(server, int(most), 0, user=user or None)


def _redis_limits(server: str, clients: Mapping[str, str]) -> ServerLimits:
    if "maxclients" not in clients:
        raise LookupError(f"{server} does not say how many clients it takes")
    return _limits(server, int(clients["maxclients"]), 0)


def _limits(server: str, most: int, reserved: int, **narrower: int | None) -> ServerLimits:
    limits = {where: int(limit) for where, limit in narrower.items() if limit is not None and limit >= 0}
    return ServerLimits(server, most, reserved, min(most - reserved, *limits.values(), most), limits)


def _clients(server: str, clients: Mapping[str, str], stats: Mapping[str, str]) -> ServerClients:
    def number(said: Mapping[str, str], name: str) -> int | None:
        return int(said[name]) if name in said else None

    return ServerClients(
        server=server,
        connected_clients=int(clients["connected_clients"]),
        blocked_clients=int(clients["blocked_clients"]),
        maxclients=number(clients, "maxclients"),
        total_connections_received=number(stats, "total_connections_received"),
        rejected_connections=number(stats, "rejected_connections"),
    )


def _info(said: Any) -> dict[str, str]:
    """What INFO answers, as a dictionary."""
    text = said.decode() if isinstance(said, bytes) else str(said)
    return {key: value for key, colon, value in (line.partition(":") for line in text.splitlines()) if colon}


# -- whom to ask -------------------------------------------------------------------

Ask = Callable[[str, str, float], _Question]
SYSTEMS = {"postgresql": ("PostgreSQL", 5432), "mysql": ("MySQL", 3306), "mariadb": ("MariaDB", 3306)}
PORT = 6379


def _is_engine(thing: Any) -> bool:
    return all(hasattr(thing, part) for part in ("dialect", "pool", "url"))


def _pool(thing: Any) -> Any:
    """The pool of a Redis client, or what was given if it is one."""
    pool = getattr(thing, "connection_pool", thing)
    if not hasattr(pool, "connection_class") or not hasattr(pool, "connection_kwargs"):
        hint = "; ask one of its nodes" if hasattr(thing, "nodes_manager") else ""
        raise TypeError(f"neither an engine nor a client of one server: {type(thing).__qualname__}{hint}")
    return pool


def _database(engine: Any, ask: Ask, seconds: float) -> _Question:
    system = engine.dialect.name
    label, default = SYSTEMS.get(system, (system, None))
    host, port = engine.url.host, engine.url.port or default
    return ask(f"{label} at {host}:{port}" if host else label, system, seconds)


def _redis(pool: Any, ask: Ask, seconds: float) -> _Question:
    options, library = pool.connection_kwargs, type(pool).__module__.partition(".")[0]
    label = "Valkey" if library == "valkey" else "Redis"
    path, service = options.get("path"), getattr(pool, "service_name", None)
    where = path or service or f"{options.get('host') or 'localhost'}:{options.get('port') or PORT}"
    return ask(f"{label} at {where}", "redis", seconds)


def _is_async(pool: Any) -> bool:
    return inspect.iscoroutinefunction(pool.connection_class.connect)


def _connection(pool: Any, seconds: float) -> Any:
    """One like the pool's, which the pool does not know of."""
    options = {**pool.connection_kwargs, "socket_timeout": seconds, "socket_connect_timeout": seconds}
    # A pool's own attempts and pauses may take longer than we have.
    for attempts in ("retry", "retry_on_error", "retry_on_timeout"):
        options.pop(attempts, None)
    return pool.connection_class(**options)


def _ask(thing: Any, timeout: float, ask: Ask) -> Any:
    seconds = _seconds(timeout)
    if hasattr(thing, "sync_engine") or (not _is_engine(thing) and _is_async(_pool(thing))):
        raise TypeError(f"{type(thing).__qualname__} belongs to asyncio: await the function that ends in _async")
    if _is_engine(thing):
        engine, question = thing, _database(thing, ask, seconds)
        said = _within(seconds, thing, question.server, lambda call: _interview(engine, question, call.reached))
    else:
        pool = _pool(thing)
        question = _redis(pool, ask, seconds)
        said = _within(seconds, thing, question.server, lambda call: _info_of(pool, seconds, question, call))
    return question.read(question.server, *said)


async def _ask_async(thing: Any, timeout: float, ask: Ask) -> Any:
    seconds, engine = _seconds(timeout), getattr(thing, "sync_engine", None)
    if engine is not None:
        question = _database(engine, ask, seconds)
        # What bridges to the drivers is SQLAlchemy's, and there is an engine of it.
        spawn = cast("Callable[..., Awaitable[list[Any]]]", sys.modules["sqlalchemy.util"].greenlet_spawn)
        said = await _within_async(seconds, question.server, spawn(_interview, engine, question, _reached))
    elif not _is_engine(thing) and _is_async(pool := _pool(thing)):
        question = _redis(pool, ask, seconds)
        said = await _within_async(seconds, question.server, _info_of_async(pool, seconds, question))
    else:
        return await asyncio.to_thread(_ask, thing, timeout, ask)
    return question.read(question.server, *said)


def _seconds(timeout: float) -> float:
    if not (math.isfinite(timeout) and timeout > 0):
        raise ValueError("timeout must be a number of seconds above 0")
    return timeout


# -- asking ------------------------------------------------------------------------


def _interview(engine: Any, question: _Question, reached: Callable[[Any], None]) -> list[Any]:
    """The rows of each answer, on a connection that the engine makes and its pool does not know of."""
    connection = engine.pool._invoke_creator(None)
    try:
        reached(connection)
        cursor = connection.cursor()
        for statement in question.before:
            cursor.execute(statement)
        said = [_rows(cursor, text) for text in question.texts]
        cursor.close()
        connection.rollback()
    except BaseException:
        with suppress(Exception):
            # `close` of an asyncio driver asks the server first, which may be what hangs.
            getattr(connection, "terminate", connection.close)()
        raise
    connection.close()
    return said


def _rows(cursor: Any, text: str) -> list[Any]:
    cursor.execute(text)
    return [tuple(row) for row in cursor.fetchall()]


def _reached(_: Any) -> None:
    """Nothing to note: a task is cancelled, not hung up on."""


def _info_of(pool: Any, seconds: float, question: _Question, call: _Call) -> list[Any]:
    connection = _connection(pool, seconds)
    try:
        connection.connect()
        call.reached(connection)
        return [_info(_command(connection, section)) for section in question.texts]
    finally:
        connection.disconnect()


def _command(connection: Any, section: str) -> Any:
    connection.send_command("INFO", section)
    return connection.read_response()


async def _info_of_async(pool: Any, seconds: float, question: _Question) -> list[Any]:
    connection, said = _connection(pool, seconds), []
    try:
        await connection.connect()
        for section in question.texts:
            await connection.send_command("INFO", section)
            said.append(_info(await connection.read_response()))
    finally:
        await connection.disconnect(nowait=True)
    return said


# -- not for longer than we have ---------------------------------------------------


class _Call:
    """A question under way in a thread of its own, because no driver promises to come back in time."""

    def __init__(self, server: str, work: Callable[[_Call], list[Any]]) -> None:
        self.server = server
        self.over = threading.Event()
        self.answer: list[Any] = []
        self.error: Exception | None = None
        self._connection: Any = None
        self._given_up = False
        self._work = work
        # A daemon: a server that is silent must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="otel_pools asks a server", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<_Call to {self.server}, {'under way' if self.is_under_way else 'over'}>"

    @property
    def is_under_way(self) -> bool:
        """Whether its thread still asks; in a forked child there is none."""
        return self._thread.is_alive() and not self.over.is_set()

    def _run(self) -> None:
        try:
            self.answer = self._work(self)
        except BaseException as error:
            self.error = _plainly(error, self.server)
        finally:
            self.over.set()

    def reached(self, connection: Any) -> None:
        """It has a connection, which `give_up` can close."""
        self._connection = connection
        if self._given_up:
            _hang_up(connection)

    def give_up(self) -> None:
        """Nobody waits for it any more."""
        self._given_up = True
        if self._connection is not None:
            _hang_up(self._connection)


def _hang_up(connection: Any) -> None:
    """Wake the thread that waits for this connection: on a copy of its socket, as the driver's own is in its hands."""
    with suppress(Exception):
        if (known := descriptor(connection)) is not None:
            with socket.socket(fileno=os.dup(known)) as line:
                line.shutdown(socket.SHUT_RDWR)


# By whom was asked about; only those that nobody waits for any more.
_hanging: WeakKeyDictionary[Any, _Call] = WeakKeyDictionary()


def _within(seconds: float, thing: Any, server: str, work: Callable[[_Call], list[Any]]) -> list[Any]:
    earlier = _hanging.get(thing)
    if earlier is not None and earlier.is_under_way:
        raise TimeoutError(f"{server} has not answered yet what it was asked before")
    call = _Call(server, work)
    if not call.over.wait(seconds):
        _hanging[thing] = call
        call.give_up()
        raise _silent(server, seconds)
    if call.error is not None:
        raise call.error
    return call.answer


# The event loop keeps no task alive by itself.
_ending: set[asyncio.Future[Any]] = set()


async def _within_async(seconds: float, server: str, work: Awaitable[list[Any]]) -> list[Any]:
    task = asyncio.ensure_future(work)
    try:
        # Not `wait_for`, which waits for the end of a task that it has cancelled: a driver may ask the server first.
        done, _ = await asyncio.wait({task}, timeout=seconds)
    finally:
        if not task.done():
            _ending.add(task)
            task.add_done_callback(_ended)
            task.cancel()
    if not done:
        raise _silent(server, seconds)
    error = task.exception()
    if error is not None:
        raise _plainly(error, server)
    return task.result()


def _ended(task: asyncio.Future[Any]) -> None:
    _ending.discard(task)
    if not task.cancelled():
        task.exception()  # it has been looked at, so asyncio does not report it


def _silent(server: str, seconds: float) -> TimeoutError:
    return TimeoutError(f"{server} did not answer within {seconds:g} s")


# -- what went wrong, in our words ---------------------------------------------------

# From what a driver's error has in it to ours: a SQLSTATE, a number of MySQL's, the name of a class, or words.
# Its own text never travels: it may have the URL in it, and the password.
REASONS: tuple[tuple[type[OSError], str, tuple[str, ...]], ...] = (
    (
        PermissionError,
        "does not let us see its connections; the role needs a right for that",
        ("sqlstate 42501", "permission denied for", "noperm", "nopermissionerror"),
    ),
    (
        PermissionError,
        "does not let us in; look at user and password",
        (
            *(
                "sqlstate 28p01",
                "sqlstate 28000",
                "password authentication",
                "pg_hba.conf entry",
                "no password supplied",
            ),
            *("wrongpass", "noauth", "authenticationerror", "(1045,", 'role "'),
        ),
    ),
    (
        ConnectionError,
        "takes no more connections",
        (
            *("sqlstate 53300", "too many clients", "too many connections", "remaining connection slots"),
            *("max number of clients", "(1040,"),
        ),
    ),
    (ConnectionError, "has no such database", ("sqlstate 3d000", 'database "', "(1049,")),
    (TimeoutError, "did not answer in time", ("sqlstate 57014", "statement timeout", "timed out", "timeouterror")),
    (
        ConnectionError,
        "is not there: nobody listens",
        ("connection refused", "connectionrefused", "connect call failed"),
    ),
    (
        ConnectionError,
        "is not to be found under its name",
        ("gaierror", "name or service not known", "failed to resolve host", "could not translate host name"),
    ),
)


def _plainly(error: BaseException, server: str) -> Exception:
    """Our own error for a driver's, with nothing of its text."""
    seen = " ".join(_signs(error)).lower()
    for kind, words, signs in REASONS:
        if any(sign in seen for sign in signs):
            return kind(f"{server} {words}")
    return ConnectionError(f"{server} could not be asked ({type(error).__qualname__})")


def _signs(error: BaseException | None) -> list[str]:
    """What there is to be recognised in an error and in what it came from."""
    signs: list[str] = []
    while error is not None and len(signs) < 40:  # noqa: PLR2004  # a chain may be a ring
        signs += [type(error).__name__, str(error)]
        signs += [f"sqlstate {code}" for name in ("sqlstate", "pgcode") if (code := getattr(error, name, None))]
        error = error.__cause__ or error.__context__
    return signs
