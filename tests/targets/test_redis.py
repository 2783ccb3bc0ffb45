"""The pools of redis-py and valkey-py keep the contract; then, what is special to them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import importlib
import inspect
from importlib.metadata import version
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

import otel_pools
from otel_pools import _doors, _guard
from otel_pools._model import Identity
from otel_pools.targets import redis as redis_target
from otel_pools.testing import PoolContract

LIBRARIES = [name for name in redis_target.LIBRARIES if find_spec(name)]
REDIS = tuple(int(part) for part in version("redis").split(".")[:2])

pytestmark = pytest.mark.filterwarnings(
    # What a test leaves out on purpose, 5.3 and later complain of.
    "ignore:unclosed Connection:ResourceWarning",
)


@pytest.fixture(params=LIBRARIES)
def library(request):
    """redis-py and valkey-py in turn."""
    return importlib.import_module(request.param)


def ask(library, pool):
    """Take a connection out, as each version wants to be asked."""
    old = library.__name__ == "valkey" or REDIS < (5, 3)
    return pool.get_connection("GET") if old else pool.get_connection()


class OnValkey(PoolContract):
    """A pool on a real server, of each library in turn."""

    target = "redis"

    @pytest.fixture(autouse=True)
    def _server(self, valkey, library, _watched):
        self.library = library
        self.options = {"host": "127.0.0.1", "port": valkey.port, "max_connections": 2}
        self.exhausted = library.exceptions.ConnectionError

    def borrow(self, pool):
        return ask(self.library, pool)

    def give_back(self, pool, held):
        return pool.release(held)

    def shut(self, pool):
        return pool.disconnect()


class TestPool(OnValkey):
    """A ConnectionPool, which refuses at once."""

    refused = "exhausted"

    def open(self):
        return self.library.ConnectionPool(**self.options)


class TestBlocking(OnValkey):
    """A BlockingConnectionPool, which makes wait."""

    refused = "timeout"

    def open(self):
        return self.library.BlockingConnectionPool(timeout=0.02, **self.options)


class TestAsyncPool(OnValkey):
    """An asyncio ConnectionPool."""

    refused = "exhausted"

    def open(self):
        return self.library.asyncio.ConnectionPool(**self.options)


class TestAsyncBlocking(OnValkey):
    """An asyncio BlockingConnectionPool."""

    refused = "timeout"

    async def open(self):
        return self.library.asyncio.BlockingConnectionPool(timeout=0.02, **self.options)


# -- who a pool is ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "name", "server"),
    [
        ({}, "localhost/0", ("0", "localhost", None)),
        ({"host": "db", "port": 6380, "db": 2}, "db:6380/2", ("2", "db", 6380)),
        ({"host": "db", "port": "6380", "db": "2"}, "db:6380/2", ("2", "db", 6380)),
        ({"path": "/run/redis.sock"}, "/run/redis.sock/0", ("0", "/run/redis.sock", None)),
        ({"host": "db", "client_name": "cache", "password": "s3cret"}, "cache", ("0", "db", None)),
    ],
)
def test_a_pool_is_its_server_and_database(library, options, name, server):
    """Without a name it is called after server and database number; the client's name comes first."""
    who = redis_target.identify(library.ConnectionPool(**options))

    assert who == Identity(library.__name__, "redis", options.get("client_name"), *server)
    assert who.name == name
    assert "s3cret" not in repr(who)


def test_a_url_is_its_parts(library):
    """Of a URL only host, port and database are kept."""
    pool = library.ConnectionPool.from_url("rediss://user:s3cret@db:6380/3?socket_timeout=5")

    assert redis_target.identify(pool) == Identity(library.__name__, "redis", None, "3", "db", 6380)


@pytest.mark.parametrize(("is_master", "name"), [(True, "sentinel:shop/master"), (False, "sentinel:shop/replica")])
def test_a_sentinel_pool_is_its_service(library, is_master, name):
    """What Sentinel looks up has no address of its own; service and role name it."""
    sentinel = library.sentinel.Sentinel([("127.0.0.1", 1)])
    pool = library.sentinel.SentinelConnectionPool("shop", sentinel, is_master=is_master)

    who = redis_target.identify(pool)

    assert (who.name, who.address) == (name, None)
    assert redis_target.complete(pool)


def test_a_half_made_sentinel_pool_waits(library):
    """A pool that Sentinel has not completed yet is not identified."""
    half = object.__new__(library.sentinel.SentinelConnectionPool)

    assert not redis_target.complete(half)


def test_a_user_names_a_pool(library, valkey, telemetry):
    """The user's name goes before all others, for clients and pools, before and after the first use."""
    otel_pools.instrument("redis", meter_provider=telemetry.meter_provider)
    clients = [getattr(library, library.__name__.title())(port=valkey.port, client_name="mine") for _ in range(2)]
    clients[1].ping()
    otel_pools.name_pool(clients[0], "orders")
    otel_pools.name_pool(clients[1].connection_pool, "orders")
    clients[0].ping()

    point = telemetry.points("otel_pools.pools", otel_pools__pool__name="orders")

    assert [each.value for each in point] == [2]
    for client in clients:
        client.close()


@pytest.mark.parametrize("thing", [object(), "redis://", None])
def test_what_has_no_pool_cannot_be_named(thing):
    """A TypeError says so."""
    with pytest.raises(TypeError, match="neither a client nor a pool"):
        redis_target.pools_of(thing)


# -- what it says -------------------------------------------------------------------

# Our record of a pool that nobody has asked for anything.
UNUSED = SimpleNamespace(leases={}, owners={}, opened={}, waiting={})


@pytest.mark.parametrize(("given", "told"), [(2**31, None), (7, 7)])
def test_no_limit_is_not_told(library, given, told):
    """redis-py writes "unlimited" as 2**31, which is no limit to report."""
    assert redis_target._limit(library.ConnectionPool(max_connections=given)) == told


def test_a_pool_of_an_older_fork_has_nothing(library):
    """Before its first use in a forked child a pool shows its parent's connections, which are not the child's."""
    pool = library.ConnectionPool(max_connections=3)
    pool._in_use_connections.add(object())
    pool.pid += 1

    now = redis_target.read(pool, UNUSED)

    assert (now.used, now.idle, now.max) == (0, 0, 3)


def test_a_queue_that_cannot_tell_leaves_pending_out(library):
    """A queue class without CPython's list of waiters costs that number alone."""
    pool = library.BlockingConnectionPool(max_connections=2)
    del pool.pool.not_empty._waiters

    now = redis_target.read(pool, UNUSED)

    assert (now.pending, now.used, now.max) == (None, 0, 2)


# -- what happens to it -------------------------------------------------------------


def test_coroutines_stay_coroutines(library):
    """A method that said it is a coroutine function still says so."""
    pool = library.asyncio.ConnectionPool
    # From 5.3 to 7.1 `get_connection` does not say it, for its decorator; with us it does.
    names = [name for name in ("get_connection", "release") if inspect.iscoroutinefunction(getattr(pool, name))]
    otel_pools.instrument("redis")

    assert "release" in names
    assert all(inspect.iscoroutinefunction(getattr(pool, name)) for name in names)


def test_only_redis_own_decorator_is_passed_by():
    """Another tool's wrapper around `get_connection` is called like any method."""

    def inside(pool):
        return pool

    def wrapper(pool):
        return inside(pool)

    wrapper.__wrapped__ = inside

    assert redis_target.undecorated(wrapper) is wrapper
    assert redis_target.undecorated(inside) is inside


def opened(library, valkey, kind=None, **options):
    """An open connection of a pool of its own."""
    kinds = {} if kind is None else {"connection_class": kind}
    pool = library.ConnectionPool(host="127.0.0.1", port=valkey.port, **kinds, **options)
    return pool, ask(library, pool)


needs_steps = pytest.mark.skipif(REDIS < (6, 0), reason="before, `connect` itself looks if there is a socket")


@needs_steps
def test_the_steps_to_open_an_open_connection_are_left_out(valkey):
    """`connect()` goes as far as redis-py's look for a socket only if there is none."""
    redis = importlib.import_module("redis")
    otel_pools.instrument("redis")
    pool, connection = opened(redis, valkey)
    asked = []
    connection.connect_check_health = lambda **_: asked.append("whether it is open")

    connection.connect()
    assert asked == []
    connection.disconnect()
    connection.connect()
    assert asked == ["whether it is open"]
    pool.disconnect()


@needs_steps
def test_the_steps_to_open_an_open_asyncio_connection_are_left_out(valkey):
    """The same for a coroutine function, which stays one."""
    redis = importlib.import_module("redis.asyncio")
    otel_pools.instrument("redis")
    asked = []

    async def look(**_):
        asked.append("whether it is open")

    async def go():
        connection = redis.Connection(host="127.0.0.1", port=valkey.port)
        assert inspect.iscoroutinefunction(connection.connect)
        await connection.connect()
        connection.connect_check_health = look
        await connection.connect()
        assert asked == []
        await connection.disconnect()
        await connection.connect()

    asyncio.run(go())
    assert asked == ["whether it is open"]


@needs_steps
def test_somebody_elses_step_is_not_left_out(valkey, monkeypatch):
    """A subclass that looks for itself is asked as without us; so is a wrapper that another tool puts on after us."""
    redis = importlib.import_module("redis")
    otel_pools.instrument("redis")
    asked = []

    class Own(redis.Connection):
        def connect_check_health(self, *args, **kwargs):
            asked.append("a subclass")
            return super().connect_check_health(*args, **kwargs)

    pool, connection = opened(redis, valkey, Own)
    asked.clear()
    connection.connect()
    assert asked == ["a subclass"]
    pool.disconnect()

    asked.clear()
    pool, connection = opened(redis, valkey)
    kind = importlib.import_module("redis.connection").AbstractConnection
    inside = kind.connect_check_health
    with monkeypatch.context() as patched:  # off before we are
        patched.setattr(
            kind, "connect_check_health", lambda *args, **kwargs: asked.append("a tool") or inside(*args, **kwargs)
        )
        connection.connect()
    assert asked == ["a tool"]
    pool.disconnect()


@pytest.mark.skipif(REDIS < (7, 2), reason="before, `connect` does not go through it")
def test_somebody_elses_retry_is_not_left_out(valkey):
    """A `Retry` of the user's that counts what goes through it counts as without us."""
    redis = importlib.import_module("redis")
    retry = importlib.import_module("redis.retry")
    otel_pools.instrument("redis")
    asked = []

    class Counting(retry.Retry):
        def call_with_retry(self, *args, **kwargs):
            asked.append("a retry")
            return super().call_with_retry(*args, **kwargs)

    no_backoff = importlib.import_module("redis.backoff").NoBackoff()
    pool, connection = opened(redis, valkey, retry=Counting(no_backoff, 0))
    asked.clear()
    connection.connect()

    assert asked == ["a retry"]
    pool.disconnect()


@needs_steps
def test_a_connection_that_we_cannot_read_is_asked_as_without_us(valkey, monkeypatch, caplog):
    """What is missing costs one line in the log, and the call goes on to redis-py."""
    monkeypatch.setattr(_guard, "loud", False)
    redis = importlib.import_module("redis")
    otel_pools.instrument("redis")
    pool, connection = opened(redis, valkey)
    pool.release(connection)
    retry = vars(connection).pop("retry")
    with contextlib.suppress(AttributeError):  # redis-py's own, from 7.2 on
        connection.connect()
    connection.retry = retry
    _guard.speak()

    assert [line for line in caplog.messages if "a creation" in line]
    assert redis.Redis(connection_pool=pool).ping()
    pool.disconnect()


@needs_steps
def test_only_redis_own_steps_are_known(monkeypatch):
    """Whatever another tool has put around one of the steps before us is called like any method."""
    connection = importlib.import_module("redis.connection").AbstractConnection
    retry = importlib.import_module("redis.retry").Retry
    assert redis_target.only_asks(connection)

    for owner, name in ((connection, "connect"), (connection, "connect_check_health"), (retry, "call_with_retry")):
        inside = vars(owner)[name]
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, lambda *args, inside=inside, **kwargs: inside(*args, **kwargs))
            assert not redis_target.only_asks(connection)
            patched.setattr(owner, name, functools.wraps(inside)(vars(owner)[name]))
            # Around the last step there may be one, which is ours.
            assert redis_target.only_asks(connection) is (name == "connect_check_health")


def test_a_connection_that_looks_for_itself_is_left_alone():
    """Up to 5.3, and in valkey-py, `connect` asks first: there is nothing to leave out."""
    for library in (name for name in LIBRARIES if name == "valkey" or REDIS < (6, 0)):
        for package in (library, f"{library}.asyncio"):
            assert not redis_target.only_asks(importlib.import_module(f"{package}.connection").AbstractConnection)


@pytest.mark.skipif(REDIS < (5, 3), reason="there was no decorator before")
def test_arguments_are_still_warned_of(valkey):
    """With an argument, redis-py's deprecation warning comes as without us."""
    redis = importlib.import_module("redis")
    otel_pools.instrument("redis")
    pool = redis.ConnectionPool(port=valkey.port)

    with pytest.warns(DeprecationWarning, match="get_connection"):
        pool.release(pool.get_connection("GET"))
    pool.disconnect()


def test_a_keyword_gives_back_too(library, valkey, telemetry):
    """`release(connection=...)` is a release."""
    otel_pools.instrument("redis", meter_provider=telemetry.meter_provider)
    pool = library.ConnectionPool(port=valkey.port, client_name="keyword")
    pool.release(connection=ask(library, pool))

    assert telemetry.value("db.client.connection.use_time", db__client__connection__pool__name="keyword") == 1
    pool.disconnect()


def test_a_connection_that_was_closed_unseen_is_noticed(library, valkey, telemetry):
    """As when one thread closes it in the very moment in which another has opened it; it is closed once."""
    otel_pools.instrument("redis", meter_provider=telemetry.meter_provider)
    pool = library.ConnectionPool(host="127.0.0.1", port=valkey.port)
    connection = ask(library, pool)
    pool.release(connection)
    line, connection._sock = connection._sock, None
    line.close()
    telemetry.read()
    noticed = telemetry.read()
    pool.release(ask(library, pool))
    again = telemetry.read()
    pool.disconnect()

    created = [now.value("otel_pools.connection.created") for now in (noticed, again)]
    assert (noticed.count("idle"), again.count("idle"), created) == (0, 1, [1, 2])
    assert noticed.closed() == again.closed() == {"closed": 1}


# -- other libraries on top -----------------------------------------------------------


def test_django_redis(valkey, telemetry):
    """A cache of django-redis uses a pool we see, named by its client_name."""
    pytest.importorskip("django_redis")
    from django.conf import settings

    settings.configure(
        CACHES={
            "default": {
                "BACKEND": "django_redis.cache.RedisCache",
                "LOCATION": f"redis://127.0.0.1:{valkey.port}/1",
                "OPTIONS": {"CONNECTION_POOL_KWARGS": {"client_name": "django", "max_connections": 5}},
            }
        }
    )
    otel_pools.instrument("redis", meter_provider=telemetry.meter_provider)
    from django.core.cache import caches

    cache = caches["default"]
    cache.set("color", "green")

    now = telemetry.read()

    assert cache.get("color") == "green"
    assert now.value("db.client.connection.max", db__client__connection__pool__name="django") == 5
    assert now.value("db.client.connection.count", db__client__connection__pool__name="django") == 1
    cache.client.get_client().connection_pool.disconnect()


@pytest.mark.skipif(REDIS < (6, 1), reason="kombu 5.7 wants a newer redis-py")
def test_kombu(valkey, telemetry):
    """A broker connection of kombu, as Celery's, is seen by the server it talks to."""
    kombu = pytest.importorskip("kombu")
    otel_pools.instrument("redis", meter_provider=telemetry.meter_provider)

    with kombu.Connection(f"redis://127.0.0.1:{valkey.port}/4") as broker:
        queue = broker.SimpleQueue("mail")
        queue.put("hello")
        message = queue.get(timeout=5)
        message.ack()
        now = telemetry.read()
        queue.close()

    assert message.payload == "hello"
    where = {"db__client__connection__pool__name": f"127.0.0.1:{valkey.port}/4"}
    assert now.value("db.client.connection.count", **where) >= 1
    assert now.value("db.client.connection.use_time", **where) >= 1
    gc.collect()


# -- beside redis-py's own metrics ------------------------------------------------------


@pytest.fixture
def native(telemetry, monkeypatch):
    """redis-py's own metrics, switched on by calling it."""
    providers = pytest.importorskip("redis.observability.providers", reason="redis-py has none of its own")
    from redis.asyncio.observability import recorder as async_recorder
    from redis.observability import recorder
    from redis.observability.config import MetricGroup, OTelConfig

    monkeypatch.setattr("opentelemetry.metrics._internal._METER_PROVIDER", telemetry.meter_provider)
    groups = [MetricGroup.CONNECTION_BASIC, MetricGroup.CONNECTION_ADVANCED]
    yield lambda: providers.get_observability_instance().init(OTelConfig(metric_groups=groups))
    providers.reset_observability_instance()
    recorder.reset_collector()
    async_recorder.reset_collector()


def ours(telemetry, name):
    """How many series of ours there are of this metric, for the pool of `use`."""
    return len(telemetry.points(name, db__client__connection__pool__name="native"))


def theirs(telemetry):
    """The names of what redis-py emits itself."""
    data = telemetry.reader.get_metrics_data()
    scopes = [scope for resource in data.resource_metrics for scope in resource.scope_metrics]
    return {metric.name for scope in scopes if scope.scope.name == "redis-py" for metric in scope.metrics}


def use(valkey, kind="BlockingConnectionPool"):
    """One command on a pool of redis-py; returns its client."""
    redis = importlib.import_module("redis")
    client = redis.Redis(
        connection_pool=getattr(redis, kind)(port=valkey.port, max_connections=2, client_name="native")
    )
    client.ping()
    return client


COUNT, CREATE, WAIT = (f"db.client.connection.{name}" for name in ("count", "create_time", "wait_time"))


def test_we_defer_to_native_metrics(native, valkey, telemetry, caplog):
    """What redis-py emits itself we do not; what it lacks we do; and one line says so."""
    otel_pools.instrument("redis", meter_provider=telemetry.meter_provider)
    native()
    client = use(valkey)
    told = {name: ours(telemetry, name) for name in (COUNT, CREATE, WAIT)}
    telemetry.read()

    assert told == {COUNT: 0, CREATE: 0, WAIT: 0}
    assert {COUNT, CREATE, WAIT} <= theirs(telemetry)
    assert [ours(telemetry, f"db.client.connection.{name}") for name in ("max", "use_time")] == [1, 1]
    assert caplog.text.count("own OpenTelemetry metrics are on") == 1
    client.connection_pool.disconnect()


def test_waits_that_native_does_not_measure_are_ours(native, valkey, telemetry):
    """redis-py measures waits of blocking pools only."""
    otel_pools.instrument("redis", meter_provider=telemetry.meter_provider)
    native()
    client = use(valkey, "ConnectionPool")

    assert ours(telemetry, WAIT) == 1
    assert ours(telemetry, COUNT) == 0
    client.connection_pool.disconnect()


def test_native_metrics_that_begin_later_are_noticed(native, valkey, telemetry):
    """Whether redis-py emits is asked at each collection."""
    otel_pools.instrument("redis", meter_provider=telemetry.meter_provider)
    client = use(valkey)
    before = ours(telemetry, COUNT)
    native()
    client.ping()

    assert (before, ours(telemetry, COUNT)) == (2, 0)
    client.connection_pool.disconnect()


def test_ours_replace_native_metrics(native, valkey, telemetry):
    """With `replace`, redis-py emits none of ours, and keeps its others."""
    otel_pools.instrument("redis", meter_provider=telemetry.meter_provider, native_redis="replace")
    native()
    client = use(valkey)
    told = [ours(telemetry, name) for name in (COUNT, CREATE, WAIT)]
    client.connection_pool.disconnect()

    assert told == [2, 1, 1]
    assert not {COUNT, CREATE, WAIT} & theirs(telemetry)
    assert "redis.client.connection.closed" in theirs(telemetry)
    client.connection_pool.disconnect()


def test_what_has_begun_is_not_replaced(native, valkey, telemetry, caplog):
    """If redis-py records already, its series would stay for ever: then it keeps them, and that is said."""
    native()
    client = use(valkey)
    otel_pools.instrument("redis", meter_provider=telemetry.meter_provider, native_redis="replace")
    client.ping()

    assert ours(telemetry, COUNT) == 0
    assert "have begun already" in caplog.text
    client.connection_pool.disconnect()


def test_both_emit(native, valkey, telemetry):
    """With `both`, nobody yields."""
    otel_pools.instrument("redis", meter_provider=telemetry.meter_provider, native_redis="both")
    native()
    client = use(valkey)

    assert ours(telemetry, COUNT) == 2
    assert COUNT in theirs(telemetry)
    client.connection_pool.disconnect()


def test_native_metrics_are_the_very_same_afterwards(native):
    """Uninstrumenting puts redis-py's own functions back."""
    metrics = importlib.import_module("redis.observability.metrics")
    before = vars(metrics.RedisMetricsCollector)["_init_connection_basic_metrics"]
    otel_pools.instrument("redis", native_redis="replace")
    between = vars(metrics.RedisMetricsCollector)["_init_connection_basic_metrics"]
    otel_pools.uninstrument("redis")

    assert between is not before
    assert vars(metrics.RedisMetricsCollector)["_init_connection_basic_metrics"] is before


# -- the room itself ---------------------------------------------------------------------


def test_the_node_of_an_asyncio_cluster_says_who_it_is(library):
    """Its stand-in is one sentence."""
    node = library.asyncio.cluster.ClusterNode("127.0.0.1", 7001)

    assert repr(redis_target.anchor(node)[1]) == "<Node 127.0.0.1:7001 of an asyncio cluster>"


def test_a_stand_in_goes_with_its_node(library):
    """What stands for a node of a cluster is gone as soon as the node is."""
    node = library.asyncio.cluster.ClusterNode("127.0.0.1", 7001)
    key, stand_in = redis_target.anchor(node)
    again = redis_target.anchor(node)
    before = len(redis_target._nodes)
    del node

    assert again == (key, stand_in)
    assert len(redis_target._nodes) == before - 1


def test_one_library_is_enough(monkeypatch):
    """Without valkey-py the dependencies name redis alone, and the other way round."""
    there = _doors._is_there
    monkeypatch.setattr(_doors, "_is_there", lambda module: module != "valkey" and there(module))

    assert otel_pools.RedisPoolInstrumentor().instrumentation_dependencies() == ["redis >= 5.0"]


def test_unknown_pools_are_left_alone(valkey, telemetry, monkeypatch):
    """A pool that we cannot identify works as without us."""
    monkeypatch.setattr(_guard, "loud", False)
    monkeypatch.setattr(redis_target, "_server", lambda _: 1 / 0)
    redis = importlib.import_module("redis")
    otel_pools.instrument("redis", meter_provider=telemetry.meter_provider)
    client = redis.Redis(port=valkey.port)

    assert client.ping()
    assert telemetry.points("db.client.connection.max") == []
    client.close()


def test_cancelled_while_waiting(library, valkey, telemetry):
    """A task that is cancelled in the line of a blocking pool is counted as that."""
    otel_pools.instrument("redis", meter_provider=telemetry.meter_provider)

    async def scenario():
        pool = library.asyncio.BlockingConnectionPool(
            port=valkey.port, max_connections=1, timeout=5, client_name="line"
        )
        client = getattr(library.asyncio, library.__name__.title())(connection_pool=pool)
        blocked = asyncio.create_task(client.blpop("nothing", timeout=5))
        await asyncio.sleep(0.05)
        waiting = asyncio.create_task(client.ping())
        await asyncio.sleep(0.05)
        now = telemetry.read()
        for task in (waiting, blocked):
            task.cancel()
        await asyncio.gather(waiting, blocked, return_exceptions=True)
        await pool.disconnect()
        return now

    now = asyncio.run(scenario())

    assert now.value("db.client.connection.pending_requests", db__client__connection__pool__name="line") == 1
    assert telemetry.read().checkouts() == {("new", None): 1, ("queued", "cancelled"): 1}
