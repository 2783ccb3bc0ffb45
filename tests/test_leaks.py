"""Connections that leak: out for too long, dropped, asked for twice, or lost: counted, and said once."""

from __future__ import annotations

import asyncio
import gc
import re
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest
import webs
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from sqlalchemy import create_engine, text
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import AssertionPool, AsyncAdaptedQueuePool, QueuePool, SingletonThreadPool, StaticPool

import otel_pools
from otel_pools.testing import Export, Telemetry

PATIENCE = 0.02


def connect():
    return sqlite3.connect(":memory:", check_same_thread=False)


def named(name="p", size=10):
    return QueuePool(connect, pool_size=size, max_overflow=0, timeout=0.01, logging_name=name)


def watch(telemetry, *targets, **options):
    options = {"leak_threshold": PATIENCE, "span_threshold": 60, **options}
    otel_pools.instrument(
        *targets, meter_provider=telemetry.meter_provider, tracer_provider=telemetry.tracer_provider, **options
    )


@pytest.fixture
def watched(telemetry):
    """Everything, with little patience."""
    watch(telemetry)
    return telemetry


@pytest.fixture
def patient(telemetry):
    """Everything, with as much patience as by default."""
    watch(telemetry, leak_threshold=60)
    return telemetry


@pytest.fixture
def said(caplog):
    """What we have logged so far, with these words in it."""

    def said(words=""):
        messages = [record.getMessage() for record in caplog.records if record.name == "otel_pools"]
        return [message for message in messages if words in message]

    return said


def line():
    """The line that calls this."""
    return sys._getframe(1).f_lineno


def here(number):
    return f"{__file__}:{number} "


def too_long():
    time.sleep(PATIENCE * 1.5)


def leaked(now, kind, **where):
    return now.value("otel_pools.connection.leaked", otel_pools__leak__kind=kind, **where)


def overdue(now):
    return now.value("otel_pools.connection.overdue")


def nested(now):
    return now.value("otel_pools.checkout.nested")


# -- out for too long -------------------------------------------------------------------


def test_what_is_out_for_too_long_is_overdue(watched, said):
    """It is one of those overdue as long as it is out, has leaked once, and is said once with where it was borrowed."""
    pool = named()
    pool.connect().close()
    held, number = pool.connect(), line()
    too_long()
    told = [(overdue(now), leaked(now, "overdue")) for now in (watched.read() for _ in range(3))]
    held.close()

    assert told == [(1, 1)] * 3
    (only,) = said()
    assert "a connection of pool p has been out for" in only
    assert f"longer than the leak threshold of {PATIENCE:g} s" in only
    assert f"(borrowed by {threading.current_thread().name} at {here(number)}" in only


def test_what_is_out_for_a_while_is_not(patient, said):
    """Below the threshold a connection is just in use."""
    held = named().connect()
    now = patient.read()
    held.close()

    assert (overdue(now), leaked(now, "overdue"), leaked(now, "collected"), said()) == (0, 0, 0, [])


def test_what_comes_back_after_all_is_said_again(watched, said):
    """Who was told that it is missing is told that it is back, and after how long; it stays counted."""
    held, number = named().connect(), line()
    too_long()
    watched.read()
    held.close()
    now = watched.read()
    watched.read()
    (_, back) = said()

    assert (overdue(now), leaked(now, "overdue")) == (0, 1)
    assert float(re.search(r"came back after all, after ([\d.]+) s \(borrowed", back)[1]) >= 0
    assert here(number) in back


def test_what_nobody_had_missed_is_not_said_to_be_back(watched, said):
    """A connection that came back between two collections was never said to be out."""
    held = named().connect()
    too_long()
    held.close()
    now = watched.read()

    assert (overdue(now), said()) == (0, [])


def test_each_loan_is_counted_for_itself(watched, said):
    """The same connection, borrowed twice and twice for too long, has leaked twice."""
    pool = named(size=1)
    for _ in range(2):
        held = pool.connect()
        too_long()
        watched.read()
        held.close()

    assert leaked(watched.read(), "overdue") == 2
    assert [" ".join(each.split()[5:8]) for each in said()] == ["p has been", "p came back"] * 2


def test_a_loan_is_counted_once_though_its_pool_is_renamed(watched, said):
    """A connection that is overdue when its pool gets a name has leaked once, and is not said again."""
    engine = create_engine("sqlite://", creator=connect, poolclass=QueuePool)
    held = engine.connect()
    too_long()
    watched.read()
    otel_pools.name_pool(engine, "orders")
    now = watched.read()
    held.close()
    engine.dispose()

    assert (leaked(now, "overdue"), len(said())) == (1, 1)


def test_threshold_zero_is_never(telemetry, said):
    """With `leak_threshold=0` nothing is overdue, however long it is out, nor said to be late."""
    watch(telemetry, leak_threshold=0)
    held = named().connect()
    too_long()
    during = telemetry.read()
    held.close()
    after = telemetry.read()

    assert [(overdue(now), leaked(now, "overdue")) for now in (during, after)] == [(0, 0), (0, 0)]
    assert said() == []


def test_of_many_at_once_five_are_said(watched, said):
    """One look logs five lines of a pool, and how many more there are; all are counted."""
    pool, other = named(), named("other")
    held = [*(pool.connect() for _ in range(8)), other.connect()]
    too_long()
    now = watched.read()
    lines = said()
    for connection in held:
        connection.close()
    watched.read()

    assert (overdue(now), leaked(now, "overdue")) == (9, 9)
    assert sum("of pool p has been out" in each for each in lines) == 5
    assert [each for each in lines if "more" in each] == ["otel_pools: and 3 more of pool p"]
    assert sum("of pool other has been out" in each for each in lines) == 1
    assert sum("of pool p came back" in each for each in said()) == 5


def test_two_readers_count_once(said):
    """However many ask, a loan leaks once, is said once, and both are told the same."""
    readers = [InMemoryMetricReader(), InMemoryMetricReader()]
    otel_pools.instrument(meter_provider=MeterProvider(readers), leak_threshold=PATIENCE)
    held = named().connect()
    too_long()
    told = [(overdue(now), leaked(now, "overdue")) for _ in range(2) for now in map(read, readers)]
    held.close()
    told += [(overdue(now), leaked(now, "overdue")) for now in map(read, readers)]

    assert told == [(1, 1)] * 4 + [(0, 1)] * 2
    assert len(said()) == 2


def test_two_readers_at_once_count_once(said):
    """Even if they ask in the same moment, from threads of their own."""
    readers = [InMemoryMetricReader() for _ in range(4)]
    otel_pools.instrument(meter_provider=MeterProvider(readers), leak_threshold=PATIENCE)
    pool = named()
    held = [pool.connect() for _ in range(5)]
    too_long()
    with ThreadPoolExecutor(4) as executor:
        for _ in range(5):
            list(executor.map(read, readers))
    now = read(readers[0])
    for connection in held:
        connection.close()

    assert leaked(now, "overdue") == 5
    assert len(said("has been out for")) == 5


def read(reader):
    data = reader.get_metrics_data()
    return Export([m for r in (data.resource_metrics if data else ()) for s in r.scope_metrics for m in s.metrics])


def test_a_pool_that_is_gone_keeps_what_has_leaked(watched, said):
    """A counter never goes back; of what is overdue nothing is told any more, and nothing said."""
    pool = named()
    held = pool.connect()
    too_long()
    watched.read()
    held.close()
    lines = len(said())
    del held, pool
    gc.collect()
    now = watched.read()
    watched.read()

    assert leaked(now, "overdue") == 1
    assert now.points("otel_pools.connection.overdue") == []
    assert len(said()) == lines + 1  # that it came back


def test_a_replaced_pool_still_has_its_overdue_connections(watched):
    """After `dispose()` what is out is out, for as long as it is."""
    engine = create_engine("sqlite://", creator=connect, poolclass=QueuePool)
    held = engine.connect()
    engine.dispose()
    too_long()
    during = overdue(watched.read())
    held.close()

    assert (during, overdue(watched.read())) == (1, 0)


def test_a_subscription_is_not_overdue(watched, valkey, said):
    """A connection that is held on purpose may be out for as long as it takes."""
    redis = pytest.importorskip("redis")
    client = redis.Redis(host="127.0.0.1", port=valkey.port)
    listener = client.pubsub()
    listener.subscribe("news")
    held = client.connection_pool.get_connection()
    too_long()
    now = watched.read()
    client.connection_pool.release(held)
    listener.close()
    client.close()

    # The other one.
    assert (overdue(now), leaked(now, "overdue"), len(said("has been out for"))) == (1, 1, 1)


def test_an_answer_that_is_not_closed_is_overdue(watched, web, said):
    """Who streams an answer for too long is told like who holds a connection to a database."""
    httpx = pytest.importorskip("httpx")
    with httpx.Client(trust_env=False, verify=False) as client:
        with client.stream("GET", web.url("/stream")):
            number = line() - 1
            too_long()
            now = watched.read()
        after = watched.read()

    assert [overdue(now), overdue(after), leaked(after, "overdue")] == [1, 0, 1]
    assert here(number) in said()[0]
    assert "came back after all" in said()[1]


# -- dropped ----------------------------------------------------------------------------


@pytest.fixture
def web():
    with webs.Ground() as ground, webs.Server(ground) as server:
        yield server


@contextmanager
def leaking():
    """SQLAlchemy and the libraries warn of what is dropped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


DROPS = {
    "fairy": lambda engine: engine.raw_connection(),
    "connection": lambda engine: engine.connect(),
    "session": lambda engine: Session(engine).connection(),
}


@pytest.mark.parametrize("drop", DROPS)
def test_what_is_dropped_is_collected(patient, said, drop):
    """A connection that only the garbage collector gives back has leaked, and its line is said once."""
    engine = create_engine("sqlite://", creator=connect, poolclass=QueuePool, pool_logging_name="p")
    DROPS[drop](engine)
    gc.collect()
    now = patient.read()
    patient.read()
    engine.dispose()

    assert (leaked(now, "collected"), leaked(now, "overdue"), now.count("used")) == (1, 0, 0)
    (only,) = said()
    assert "a connection of pool p was dropped and not given back" in only
    assert f"at {__file__}:" in only


def test_what_is_dropped_in_a_cycle_is_collected(patient):
    """It is the collector that finds it, whenever that comes."""

    class Loan:
        def __init__(self):
            self.me, self.connection = self, pool.connect()

    pool = named()
    for _ in range(3):
        Loan()
    gc.collect()

    assert leaked(patient.read(), "collected") == 3


def test_what_an_asyncio_application_drops_is_collected(patient):
    """SQLAlchemy closes such a connection instead of taking it back; it has leaked all the same."""
    pytest.importorskip("aiosqlite")

    async def main():
        engine = create_async_engine("sqlite+aiosqlite://", poolclass=AsyncAdaptedQueuePool)
        before = set(threading.enumerate())
        held = await engine.connect()
        workers = set(threading.enumerate()) - before
        del held
        gc.collect()
        await engine.dispose()
        for worker in workers:  # aiosqlite's, which has something to tell the loop to the last
            await asyncio.to_thread(worker.join, 10)

    with leaking():
        asyncio.run(main())
        gc.collect()

    assert leaked(patient.read(), "collected") == 1


@pytest.mark.parametrize("name", webs.LIBRARIES)
def test_an_answer_that_is_dropped_is_overdue(watched, web, said, name):
    """Its connection takes a place in the pool for good, and is told as held and overdue, with its line."""
    library = pytest.importorskip(name)
    with library.Client(trust_env=False, verify=False) as client:
        client.send(client.build_request("GET", web.url("/stream")), stream=True)
        number = line() - 1
        gc.collect()
        too_long()
        now, holders = watched.read(), otel_pools.holders()

    assert (overdue(now), len(holders)) == (1, 1)
    assert [here(number) in each for each in said()] == [True]


@pytest.mark.parametrize("name", webs.LIBRARIES)
def test_an_answer_that_is_dropped_with_its_client_is_collected(patient, web, said, name):
    """A response that nobody closes gives its connection up when its client is collected, and has leaked."""
    library = pytest.importorskip(name)

    def ask():
        client = library.Client(trust_env=False, verify=False)
        client.send(client.build_request("GET", web.url("/stream")), stream=True)

    with leaking():
        ask()
        gc.collect()
    now = patient.read()
    patient.read()

    assert (leaked(now, "collected"), leaked(now, "overdue"), otel_pools.holders()) == (1, 0, ())
    (only,) = said()
    assert "was dropped and not given back" in only
    assert f"at {__file__}:" in only


@pytest.mark.parametrize("name", webs.LIBRARIES)
def test_an_asyncio_answer_that_is_dropped_with_its_client_is_collected(patient, web, name):
    """It is the same there."""
    library = pytest.importorskip(name)

    async def ask():
        client = library.AsyncClient(trust_env=False, verify=False)
        await client.send(client.build_request("GET", web.url("/stream")), stream=True)

    async def main():
        await ask()
        gc.collect()
        return leaked(patient.read(), "collected")

    with leaking():
        number = asyncio.run(main())
        gc.collect()

    assert number == 1


def test_what_is_given_back_is_not_collected(patient, said):
    """Closed, left, detached, invalidated or broken: whoever ends a loan has not dropped it."""
    engine = create_engine("sqlite://", creator=connect, poolclass=QueuePool)
    engine.connect().close()
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))
    with Session(engine) as session:
        session.execute(text("SELECT 1"))
    detached = engine.raw_connection()
    detached.detach()
    detached.close()
    invalidated = engine.raw_connection()
    invalidated.invalidate()
    del detached, invalidated
    with pytest.raises(ZeroDivisionError), engine.begin():
        _ = 1 / 0
    engine.dispose()
    gc.collect()

    assert leaked(patient.read(), "collected") == 0
    assert said() == []


def test_what_an_asyncio_application_gives_back_is_not_collected(patient, said):
    """Neither closing nor cancelling is dropping."""
    pytest.importorskip("aiosqlite")

    async def hold(engine, started):
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
            started.set()
            await asyncio.sleep(10)

    async def main():
        engine = create_async_engine("sqlite+aiosqlite://", poolclass=AsyncAdaptedQueuePool)
        started = asyncio.Event()
        task = asyncio.create_task(hold(engine, started))
        await started.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await engine.dispose()

    asyncio.run(main())
    gc.collect()

    assert leaked(patient.read(), "collected") == 0
    assert said() == []


def test_what_redis_and_http_give_back_is_not_collected(patient, web, valkey, said):
    """Commands, pipelines and answers that were read or closed have not leaked, in time or out of it."""
    redis, httpx = pytest.importorskip("redis"), pytest.importorskip("httpx")
    client = redis.Redis(host="127.0.0.1", port=valkey.port)
    client.pipeline().get("k").execute()
    client.get("k")
    client.close()
    with httpx.Client(trust_env=False, verify=False) as browser:
        browser.get(web.url())
        with browser.stream("GET", web.url("/stream")):
            pass
        with pytest.raises(httpx.HTTPError):
            browser.get(web.url("/drop"))
    del client, browser
    gc.collect()
    now = patient.read()

    assert (leaked(now, "collected"), leaked(now, "overdue"), said()) == (0, 0, [])


# -- asked for by who has one ------------------------------------------------------------


def test_who_has_one_and_asks_for_another_is_nested(patient, said):
    """Two of one pool in one thread are a deadlock in waiting: counted, and said with both lines."""
    pool = named()
    outer, first = pool.connect(), line()
    inner, second = pool.connect(), line()
    inner.close()
    outer.close()

    assert nested(patient.read()) == 1
    (only,) = said()
    assert f"pool p: who held a connection (borrowed by {threading.current_thread().name} at {here(first)}" in only
    assert f"asked for another at {here(second)}" in only


def test_the_same_two_lines_are_said_once(patient, said):
    """However often it happens, it is one mistake; it is counted each time."""
    pool = named()
    for _ in range(3):
        with ExitStack() as stack:
            for _ in range(2):
                stack.callback(pool.connect().close)
        patient.read()

    assert nested(patient.read()) == 3
    assert len(said()) == 1


def test_one_after_the_other_is_not_nested(patient, said):
    """Who has given back the first may ask for the next."""
    pool = named()
    for _ in range(3):
        pool.connect().close()

    assert (nested(patient.read()), said()) == (0, [])


def test_each_inner_loan_is_nested(patient):
    """Who keeps one and borrows three others, one after the other, has nested three times."""
    pool = named()
    outer = pool.connect()
    for _ in range(3):
        pool.connect().close()
    outer.close()

    assert nested(patient.read()) == 3


def test_who_gives_back_the_outer_one_first_still_has_the_inner(patient):
    """In which order they come back does not matter: who still has one and asks is nested."""
    pool = named()
    outer, inner = pool.connect(), pool.connect()
    outer.close()
    pool.connect().close()
    inner.close()

    assert nested(patient.read()) == 2


def test_who_got_none_is_nested_too(patient, said):
    """A pool of one and two of one thread: the second waits for the first in vain, and that is why."""
    pool = named(size=1)
    outer = pool.connect()
    with pytest.raises(PoolTimeout):
        pool.connect()
    outer.close()

    assert nested(patient.read()) == 1
    assert any("asked for another" in each for each in said())


def test_who_was_refused_is_nested_too(patient):
    """An AssertionPool refuses at once; it is the same mistake."""
    pool = AssertionPool(connect, logging_name="p")
    outer = pool.connect()
    with pytest.raises(AssertionError):
        pool.connect()
    outer.close()

    assert nested(patient.read()) == 1


def test_one_asyncio_task_is_nested(patient):
    """A task that has one and asks for another is like a thread."""
    pytest.importorskip("aiosqlite")

    async def main():
        engine = create_async_engine("sqlite+aiosqlite://", poolclass=AsyncAdaptedQueuePool, pool_size=2)
        async with engine.connect(), engine.connect():
            pass
        await engine.dispose()

    asyncio.run(main())

    assert nested(patient.read()) == 1


def test_one_asyncio_task_that_got_none_is_nested(patient):
    """Neither does it matter there whether it got the second."""
    pytest.importorskip("aiosqlite")

    async def main():
        engine = create_async_engine(
            "sqlite+aiosqlite://", poolclass=AsyncAdaptedQueuePool, pool_size=1, max_overflow=0, pool_timeout=0.01
        )
        async with engine.connect():
            with pytest.raises(PoolTimeout):
                await engine.connect()
        await engine.dispose()

    asyncio.run(main())

    assert nested(patient.read()) == 1


def test_two_threads_are_not_nested(patient, said):
    """Each has one of its own, at the same time."""
    pool, both = named(), threading.Barrier(2)

    def work(_):
        held = pool.connect()
        both.wait(10)
        held.close()
        both.wait(10)

    with ThreadPoolExecutor(2) as executor:
        for _ in range(3):
            list(executor.map(work, range(2)))

    assert (nested(patient.read()), said()) == (0, [])


def test_two_tasks_are_not_nested(patient, said):
    """Though one thread runs them all."""
    pytest.importorskip("aiosqlite")

    async def main():
        engine = create_async_engine("sqlite+aiosqlite://", poolclass=AsyncAdaptedQueuePool, pool_size=3)

        async def work():
            async with engine.connect() as connection:
                await connection.execute(text("SELECT 1"))
                await asyncio.sleep(0.001)

        for _ in range(5):
            await asyncio.gather(*(work() for _ in range(3)))
        await engine.dispose()

    asyncio.run(main())

    assert (nested(patient.read()), said()) == (0, [])


def test_two_pools_are_not_nested(patient, said):
    """Who has one of each takes nothing from the other, even if both go by one name."""
    held = [named("one").connect(), named("other").connect(), named("same").connect(), named("same").connect()]
    for connection in held:
        connection.close()

    assert (nested(patient.read()), said()) == (0, [])


@pytest.mark.parametrize("kind", [SingletonThreadPool, StaticPool])
def test_one_connection_that_is_shared_is_not_nested(patient, said, kind):
    """Such a pool hands the same connection out again: nobody can be without."""
    pool = kind(connect, logging_name="p")
    outer, inner = pool.connect(), pool.connect()
    inner.close()
    outer.close()

    assert (nested(patient.read()), said()) == (0, [])


def test_a_loan_that_another_thread_ends_is_over(patient, said):
    """Who borrows, passes the connection on, and borrows again when it was given back there, has one at a time."""
    pool = named()
    with ThreadPoolExecutor(1) as executor:
        for _ in range(3):
            executor.submit(pool.connect().close).result(10)

    assert (nested(patient.read()), said()) == (0, [])


def test_a_thread_is_not_nested_in_one_that_has_ended(patient):
    """A thread that has the ident of one that has ended has borrowed nothing before."""
    pool, held, idents = named(size=200), [], []

    def work():
        idents.append(threading.get_ident())
        held.append(pool.connect())

    while len(set(idents)) == len(idents):
        if len(idents) == 100:
            pytest.skip("this system gives no ident twice")
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(10)
    for connection in held:
        connection.close()

    assert nested(patient.read()) == 0


def test_a_task_is_not_nested_in_one_that_is_gone(patient):
    """A task that has the id of one that is gone has borrowed nothing before."""
    pytest.importorskip("aiosqlite")
    ids = []

    async def main():
        engine = create_async_engine("sqlite+aiosqlite://", poolclass=AsyncAdaptedQueuePool, pool_size=200)
        held = []

        async def work():
            ids.append(id(asyncio.current_task()))
            held.append(await engine.connect())

        while len(set(ids)) == len(ids) < 50:
            await asyncio.create_task(work())
            gc.collect()
        for connection in held:
            await connection.close()
        await engine.dispose()

    asyncio.run(main())
    if len(set(ids)) == len(ids):
        pytest.skip("no id was given twice")

    assert nested(patient.read()) == 0


@pytest.mark.parametrize("name", ["redis", "valkey"])
def test_commands_that_are_gathered_are_not_nested(patient, valkey, said, name):
    """Each command of an asyncio gather is a task of its own."""
    package = pytest.importorskip(f"{name}.asyncio")

    async def main():
        client = getattr(package, name.capitalize())(host="127.0.0.1", port=valkey.port)
        for _ in range(5):
            await asyncio.gather(*(client.get(f"k{number}") for number in range(5)))
        await client.aclose()

    asyncio.run(main())

    assert (nested(patient.read()), said()) == (0, [])


def test_who_watches_and_asks_is_nested(patient, valkey):
    """A command in the middle of somebody's own transaction takes a second connection."""
    redis = pytest.importorskip("redis")
    client = redis.Redis(host="127.0.0.1", port=valkey.port)
    pipeline = client.pipeline()
    pipeline.watch("k")
    client.get("k")
    pipeline.reset()
    client.close()

    assert nested(patient.read()) == 1


# -- where it may happen -----------------------------------------------------------------


def test_after_a_fork_nothing_of_the_parents_is_told():
    """What was out, overdue, nested or dropped before is the parent's to tell, by metric, holder and log."""
    program = """
        import gc, logging, os, sqlite3, sys, time, warnings
        warnings.simplefilter("ignore", DeprecationWarning)
        import otel_pools
        from otel_pools.testing import Telemetry
        from sqlalchemy.pool import QueuePool

        def tell(who):
            lines.clear()
            now = telemetry.read()
            kinds = ("overdue", "collected")
            leaks = [now.value("otel_pools.connection.leaked", otel_pools__leak__kind=kind) for kind in kinds]
            numbers = [now.value("otel_pools.connection.overdue"), *leaks, now.value("otel_pools.checkout.nested")]
            print(who, [int(number) for number in numbers], len(otel_pools.holders()), len(lines), flush=True)

        lines = []
        class Lines(logging.Handler):
            def emit(self, record): lines.append(record.getMessage())
        logging.getLogger("otel_pools").addHandler(Lines())
        telemetry = Telemetry()
        otel_pools.instrument("sqlalchemy", meter_provider=telemetry.meter_provider, leak_threshold=0.01)
        pool = QueuePool(lambda: sqlite3.connect(":memory:", check_same_thread=False), logging_name="p")
        held = [pool.connect(), pool.connect()]
        pool.connect()
        gc.collect()
        time.sleep(0.02)
        child = os.fork()
        if child == 0:
            tell("child")
            held.clear()
            gc.collect()
            tell("child")
            os._exit(0)
        os.waitpid(child, 0)
        tell("parent")
        for connection in held: connection.close()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)

    assert done.stderr == ""
    assert done.stdout.splitlines()[:2] == ["child [0, 0, 0, 0] 0 0"] * 2
    # Of three loans in one thread two are nested; of the dropped one nothing is out.
    parent = done.stdout.splitlines()[2]
    assert re.fullmatch(r"parent \[2, 2, 1, [12]\] 2 \d", parent)
    assert int(parent[-1]) >= 3


def test_a_storm_of_drops_inside_a_collection_does_not_hang(caplog):
    """Each of 10^4 connections is late, dropped, and given back inside the SDK's and the log's locks: nothing hangs."""
    telemetry = Telemetry()
    watch(telemetry, "sqlalchemy", leak_threshold=1e-9)
    pool = QueuePool(connect, pool_size=5, max_overflow=-1, logging_name="gc")
    returned = 0

    class Loan:
        """A cycle: only the garbage collector gives this connection back."""

        def __init__(self):
            self.me, self.fairy = self, pool.connect()

    def work():
        nonlocal returned
        while returned < 10_000:
            for _ in range(20):
                Loan()
                returned += 1
            telemetry.read()

    threshold = gc.get_threshold()
    gc.freeze()  # what the other tests left behind need not be walked 10^4 times
    gc.set_threshold(50, 2, 2)
    try:
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(100)
    finally:
        gc.set_threshold(*threshold)
        gc.unfreeze()
    hung = thread.is_alive()
    gc.collect()
    now = telemetry.read()

    assert not hung
    assert leaked(now, "collected") == returned
    assert overdue(now) == 0
    assert otel_pools.holders() == ()
    assert "was dropped and not given back" in caplog.text
