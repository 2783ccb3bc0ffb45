"""Who borrows a connection: from which line of the application, in which trace, thread or task."""

from __future__ import annotations

import asyncio
import gc
import importlib
import importlib.util
import sqlite3
import sys
import threading
import time
import weakref
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import webs
from sqlalchemy import create_engine, text
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import AsyncAdaptedQueuePool, QueuePool

import otel_pools
from otel_pools import _leases
from otel_pools._config import Settings, settings
from otel_pools._leases import DEEPEST
from otel_pools._model import Holder

SELECT = text("SELECT 1")


def connect():
    return sqlite3.connect(":memory:", check_same_thread=False)


@pytest.fixture
def watched(telemetry):
    otel_pools.instrument(meter_provider=telemetry.meter_provider, tracer_provider=telemetry.tracer_provider)
    return telemetry


@pytest.fixture
def engine(watched):
    engine = create_engine("sqlite://", creator=connect, poolclass=QueuePool, pool_size=5, max_overflow=0)
    yield engine
    engine.dispose()


def run(scenario):
    """Run *scenario*, a coroutine function, with an asyncio engine."""
    pytest.importorskip("aiosqlite")

    async def main():
        engine = create_async_engine("sqlite+aiosqlite://", poolclass=AsyncAdaptedQueuePool)
        try:
            return await scenario(engine)
        finally:
            await engine.dispose()

    return asyncio.run(main())


def line():
    """The line that calls this."""
    return sys._getframe(1).f_lineno


def here(number):
    return f"{__file__}:{number}"


def only():
    """Who holds the only connection that is out."""
    (holder,) = otel_pools.holders()
    return holder


def place(holder):
    """File and line, without the function."""
    return None if holder.call_site is None else holder.call_site.rpartition(" ")[0]


# -- the application's line: SQLAlchemy ----------------------------------------------


def by_pool(engine):
    return engine.pool.connect(), line()


def by_raw_connection(engine):
    return engine.raw_connection(), line()


def by_engine(engine):
    return engine.connect(), line()


def by_execute(engine):
    session = Session(engine)
    return (session, session.execute(SELECT).all(), line())[::2]


def by_scalars(engine):
    session = Session(engine)
    return (session, session.scalars(SELECT).all(), line())[::2]


WAYS = [by_pool, by_raw_connection, by_engine, by_execute, by_scalars]


@pytest.mark.parametrize("borrow", WAYS)
def test_the_site_is_where_the_application_asked(engine, borrow):
    """However many frames of SQLAlchemy lie between, it is the application's file, line and function."""
    held, number = borrow(engine)
    holder = only()
    held.close()

    assert holder.call_site == f"{here(number)} {borrow.__name__}"
    assert otel_pools.holders() == ()


@pytest.mark.parametrize("borrow", WAYS[1:])
def test_via_is_what_the_application_called(engine, borrow):
    """Of the library's frames it is the one next to the application."""
    held, _ = borrow(engine)
    holder = only()
    held.close()

    assert holder.via == {"by_engine": "connect"}.get(borrow.__name__, borrow.__name__.removeprefix("by_"))


def test_a_call_over_many_lines_is_at_one_of_them(engine):
    """The line lies in the call, and not where its function begins."""
    first = line() + 1
    held = (
        engine
        # Taken out here.
        .connect()
    )
    holder = only()
    held.close()

    assert first <= int(place(holder).rpartition(":")[2]) <= first + 4


def test_a_function_in_another_is_named_with_it(engine):
    """The function has its qualified name, as far as this Python knows it."""

    def borrow():
        return engine.connect()

    held = borrow()
    holder = only()
    held.close()
    named = borrow.__qualname__ if sys.version_info >= (3, 11) else borrow.__name__

    assert holder.call_site.rpartition(" ")[2] == named


def test_the_site_of_an_asyncio_engine(watched):
    """The greenlet in which SQLAlchemy works is passed over, to who waits for it."""

    async def scenario(engine):
        async with engine.connect():
            number = line() - 1
            return only(), number

    holder, number = run(scenario)

    assert place(holder) == here(number)


def test_the_site_of_an_asyncio_session(watched):
    """It is the line that awaits the first statement."""

    async def scenario(engine):
        async with AsyncSession(engine) as session:
            await session.execute(SELECT)
            number = line() - 1
            return only(), number

    holder, number = run(scenario)

    assert (place(holder), holder.via) == (here(number), "execute")


def test_the_site_inside_run_sync(watched):
    """A function of the application that SQLAlchemy runs in its greenlet is where it asked."""

    async def scenario(engine):
        def work(session):
            session.execute(SELECT)
            return only(), line() - 1

        async with AsyncSession(engine) as session:
            return await session.run_sync(work)

    holder, number = run(scenario)

    assert (place(holder), holder.via) == (here(number), "execute")


# -- the application's line: Redis and HTTP ------------------------------------------


def spying(kind):
    """A real connection that notes who holds what whenever an answer is awaited."""

    class Spy(kind):
        seen: list[Any] = []

        def read_response(self, *args, **kwargs):
            Spy.seen += otel_pools.holders()
            return super().read_response(*args, **kwargs)

    return Spy


@pytest.mark.parametrize("name", ["redis", "valkey"])
def test_the_site_of_a_redis_command(watched, valkey, name):
    """A command borrows for as long as it takes, and its line is known meanwhile; a pipeline's is where it executes."""
    library = pytest.importorskip(name)
    spy = spying(library.connection.Connection)
    pool = library.ConnectionPool(host="127.0.0.1", port=valkey.port, connection_class=spy)
    client = getattr(library, name.capitalize())(connection_pool=pool)
    client.get("k")
    get, after_get = line() - 1, spy.seen[-1]
    pipeline = client.pipeline().get("k").get("k")
    pipeline.execute()
    execute, after_pipeline = line() - 1, spy.seen[-1]
    pool.disconnect()

    assert (place(after_get), after_get.via) == (here(get), "get")
    assert (place(after_pipeline), after_pipeline.via) == (here(execute), "execute")


@pytest.mark.parametrize("name", ["redis", "valkey"])
def test_the_site_of_an_asyncio_redis_command(watched, valkey, name):
    """It is the line that awaits the command."""
    library = pytest.importorskip(f"{name}.asyncio")
    spy = spying(library.connection.Connection)

    async def scenario():
        pool = library.ConnectionPool(host="127.0.0.1", port=valkey.port, connection_class=spy)
        client = getattr(library, name.capitalize())(connection_pool=pool)
        await client.get("k")
        get, after_get = line() - 1, spy.seen[-1]
        await client.pipeline().get("k").execute()
        execute, after_pipeline = line() - 1, spy.seen[-1]
        await pool.disconnect()
        return [(place(after_get), get), (place(after_pipeline), execute)]

    assert [told == here(number) for told, number in asyncio.run(scenario())] == [True, True]


@pytest.fixture
def web():
    with webs.Ground() as ground, webs.Server(ground) as server:
        yield server


@pytest.mark.parametrize("name", webs.LIBRARIES)
def test_the_site_of_an_http_request(watched, web, name):
    """It is the line of `get` or `stream`, told while the answer is under way."""
    library = importlib.import_module(name)
    seen = []
    hooks = {"response": [lambda _: seen.append(only())]}
    with library.Client(trust_env=False, verify=False, event_hooks=hooks) as client:
        client.get(web.url())
        numbers = [line() - 1]
        with client.stream("GET", web.url()):
            numbers.append(line() - 1)
            seen.append(only())

    assert [place(holder) for holder in seen] == [here(numbers[0]), here(numbers[1]), here(numbers[1])]
    assert seen[0].via == "get"


@pytest.mark.parametrize("name", webs.LIBRARIES)
def test_the_site_of_an_asyncio_http_request(watched, web, name):
    """It is the line that awaits it."""
    library = importlib.import_module(name)
    seen = []

    async def note(_):
        seen.append(only())

    async def scenario():
        async with library.AsyncClient(trust_env=False, verify=False, event_hooks={"response": [note]}) as client:
            await client.get(web.url())
            numbers = [line() - 1]
            async with client.stream("GET", web.url()):
                numbers.append(line() - 1)
            return numbers

    numbers = asyncio.run(scenario())

    assert [place(holder) for holder in seen] == [here(number) for number in numbers]
    assert seen[0].via == "get"


def test_the_site_of_a_request_that_stood_in_line(watched, web):
    """Who had to wait for a connection is known by its line like any other."""
    httpx = pytest.importorskip("httpx")
    served = []

    def ask(client, started):
        started.set()
        with client.stream("GET", web.url()):
            served.append((only(), line() - 1))

    with httpx.Client(trust_env=False, verify=False, limits=httpx.Limits(max_connections=1)) as client:
        with client.stream("GET", web.url()):
            started = threading.Event()
            thread = threading.Thread(target=ask, args=(client, started))
            thread.start()
            started.wait(10)
            while watched.value("otel_pools.connection.pending_requests") != 1:
                time.sleep(0.005)
        thread.join(10)
    ((holder, number),) = served

    assert place(holder) == here(number)


def test_a_task_made_of_the_librarys_own_coroutine_has_no_site(watched, valkey):
    """In `create_task(client.get(...))` nobody of the application awaits, so no line is blamed for it."""
    library = pytest.importorskip("redis.asyncio")
    spy = spying(library.connection.Connection)

    async def scenario():
        pool = library.ConnectionPool(host="127.0.0.1", port=valkey.port, connection_class=spy)
        await asyncio.create_task(library.Redis(connection_pool=pool).get("k"))
        await pool.disconnect()

    asyncio.run(scenario())
    blamed = line() - 1

    assert place(spy.seen[-1]) != here(blamed)


# -- whose a file is -----------------------------------------------------------------


def load(path, code):
    """A module of this code in this file."""
    path.parent.mkdir(parents=True)
    path.write_text(code)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BORROW = "def borrow(engine):\n    return engine.connect()\n"


@pytest.fixture
def installed(tmp_path):
    """Somebody's package that borrows for its caller."""
    return load(tmp_path / "site-packages" / "somepkg" / "db.py", BORROW)


def test_the_application_comes_before_an_installed_package(engine, installed, tmp_path):
    """A package that was installed may stand between the application and its pool, and is passed over."""
    app = load(tmp_path / "app" / "views.py", "def view(borrow, engine):\n    return borrow(engine)\n")
    held = app.view(installed.borrow, engine)
    holder = only()
    held.close()

    assert holder.call_site == f"{tmp_path}/app/views.py:2 view"


def in_a_thread(function, *args):
    """What *function* returns, called with no frame of the application around it."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as executor:
        return executor.submit(function, *args).result()


def test_an_installed_package_may_be_the_application(engine, installed):
    """Without any frame of an application it is the package next to the library that asked."""
    held = in_a_thread(installed.borrow, engine)
    holder = only()
    held.close()

    assert (holder.call_site, holder.via) == (f"{installed.__file__}:2 borrow", "connect")


def test_of_two_installed_packages_it_is_the_nearer(engine, installed, tmp_path):
    """A framework that calls the package which borrows is not the one that asked."""
    code = "def serve(borrow, engine):\n    return borrow(engine)\n"
    framework = load(tmp_path / "dist-packages" / "framework" / "server.py", code)
    held = in_a_thread(framework.serve, installed.borrow, engine)
    holder = only()
    held.close()

    assert holder.call_site == f"{installed.__file__}:2 borrow"


def test_not_too_many_installed_frames_are_passed(engine, tmp_path):
    """An application that stands far behind a framework is not searched for: it costs too much and says too little."""
    code = f"{BORROW}def deep(engine, frames):\n    return deep(engine, frames - 1) if frames else borrow(engine)\n"
    framework = load(tmp_path / "site-packages" / "framework" / "server.py", code)
    sites = []
    for frames in (1, DEEPEST * 2):
        held = framework.deep(engine, frames)
        sites.append(place(only()))
        held.close()
    number = line() - 3

    assert sites == [here(number), f"{framework.__file__}:2"]


def test_nobody_is_a_site(engine):
    """Where only libraries are on the stack there is no site, and nobody is blamed."""
    held = in_a_thread(engine.connect)
    holder = only()
    held.close()

    assert holder.call_site is None


def compiled(filename):
    """`borrow`, as if it came from there."""
    names: dict[str, Any] = {}
    exec(compile(BORROW, filename, "exec"), names)
    return names["borrow"]


@pytest.mark.parametrize("filename", ["<sqlalchemy generated borrow>", "<attrs generated init app.Repo>", "<frozen x>"])
def test_generated_code_is_passed_over(engine, filename):
    """What a library has generated is not where the application asked."""
    held = compiled(filename)(engine)
    number = line() - 1
    holder = only()
    held.close()

    assert place(holder) == here(number)


@pytest.mark.parametrize("filename", ["<string>", "<stdin>", "<console>"])
def test_what_was_typed_in_counts(engine, filename, monkeypatch):
    """Code without a file may be the application: that of `python -c`, or of a console."""
    monkeypatch.setattr(sys, "argv", ["-c"])
    monkeypatch.setattr(_leases, "_tiers", {})
    held = compiled(filename)(engine)
    holder = only()
    held.close()

    assert holder.call_site == f"{filename}:2 borrow"


def test_the_init_of_a_dataclass_is_passed_over(engine):
    """A field that borrows by default is borrowed for by who makes the object."""

    @dataclass
    class Repository:
        connection: Any = field(default_factory=engine.connect)

    repository = Repository()
    number = line() - 1
    holder = only()
    repository.connection.close()

    assert place(holder) == here(number)


# -- what is kept ----------------------------------------------------------------------


class Thing:
    """What a local variable holds."""


def test_nothing_of_the_caller_is_kept_alive(engine):
    """No frame is kept: what a local variable held dies when its function returns, the connection being out."""

    def borrow():
        local = Thing()
        return engine.connect(), weakref.ref(local)

    held, local = borrow()
    gc.collect()
    sites = [holder.call_site for holder in otel_pools.holders()]
    held.close()

    assert local() is None
    assert len(sites) == 1


def test_nothing_of_an_asyncio_caller_is_kept_alive(watched):
    """Neither by the greenlet nor by the task."""

    async def borrow(engine):
        local = Thing()
        return await engine.connect(), weakref.ref(local)

    async def scenario(engine):
        held, local = await asyncio.create_task(borrow(engine))
        await asyncio.sleep(0)
        gc.collect()
        try:
            return local(), len(otel_pools.holders())
        finally:
            await held.close()

    assert run(scenario) == (None, 1)


def test_without_call_sites_everything_else_is_told(telemetry):
    """`call_site=False` leaves out where, and tells who, for how long, and in which trace."""
    otel_pools.instrument("sqlalchemy", meter_provider=telemetry.meter_provider, call_site=False)
    pool = QueuePool(connect, logging_name="p", pool_size=2)
    with telemetry.tracer_provider.get_tracer("app").start_as_current_span("request") as span:
        held = pool.connect()
        inner = pool.connect()
    first, second = otel_pools.holders()
    now = telemetry.read()
    inner.close()
    held.close()

    assert {(holder.call_site, holder.via) for holder in (first, second)} == {(None, None)}
    assert {holder.trace_id for holder in (first, second)} == {f"{span.get_span_context().trace_id:032x}"}
    assert (first.pool, first.task, first.held_s > 0) == ("p", threading.current_thread().name, True)
    assert now.value("otel_pools.checkout.nested") == 1


def test_without_holders_only_numbers_are_told(telemetry, caplog):
    """`holders=False` leaves out who, where and in which trace: what is told of a loan is how long it lasts."""
    otel_pools.instrument(
        "sqlalchemy",
        meter_provider=telemetry.meter_provider,
        tracer_provider=telemetry.tracer_provider,
        holders=False,
        leak_threshold=0.001,
    )
    pool = QueuePool(connect, logging_name="p", pool_size=2, max_overflow=0, timeout=0.01)
    with telemetry.tracer_provider.get_tracer("app").start_as_current_span("request"):
        held, inner = pool.connect(), pool.connect()
        with pytest.raises(PoolTimeout):
            pool.connect()
    told, now = otel_pools.holders(), telemetry.read()
    held.close()
    del inner
    gc.collect()
    after = telemetry.read()

    assert [replace(holder, held_s=0.0) for holder in told] == [Holder(pool="p", held_s=0.0)] * 2
    assert told[0].held_s > told[1].held_s > 0.01
    assert (now.value("otel_pools.use.oldest") > 0.01, now.value("db.client.connection.timeouts")) == (True, 1)
    assert (now.count("used"), now.value("otel_pools.connection.peak")) == (2, 2)
    assert now.value("otel_pools.checkout.nested") + now.value("otel_pools.connection.overdue") == 0
    assert (after.value("db.client.connection.use_time"), after.value("otel_pools.connection.leaked")) == (2, 0)
    assert [list(span.links) for span in telemetry.spans if span.name == "acquire p"] == [[]]
    assert "pool p is exhausted" in caplog.text
    assert caplog.text.count("held for") == 2
    assert "borrowed" not in caplog.text


# -- in which trace ----------------------------------------------------------------------


def ids(span):
    context = span.get_span_context()
    return f"{context.trace_id:032x}", f"{context.span_id:016x}"


def told(holder):
    return holder.trace_id, holder.span_id


def test_the_trace_is_that_of_the_checkout(engine, watched):
    """It is the span that was current when the connection was borrowed, though it has ended since."""
    tracer = watched.tracer_provider.get_tracer("app")
    with tracer.start_as_current_span("request"), tracer.start_as_current_span("handler") as span:
        held = engine.connect()
    with tracer.start_as_current_span("another"):
        holder = only()
    held.close()

    assert told(holder) == ids(span)


def test_outside_a_trace_there_is_none(engine):
    """Who has no span has no trace."""
    held = engine.connect()
    holder = only()
    held.close()

    assert told(holder) == (None, None)


def test_each_thread_has_its_own_trace(engine, watched):
    """Of two threads each is told with its own span and its own name."""
    tracer, done, both = watched.tracer_provider.get_tracer("app"), {}, threading.Barrier(3)

    def work():
        with tracer.start_as_current_span("work") as span, engine.connect():
            done[threading.current_thread().name] = ids(span)
            both.wait(10)
            both.wait(10)

    threads = [threading.Thread(target=work, name=name) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    both.wait(10)
    seen = {holder.task: told(holder) for holder in otel_pools.holders()}
    both.wait(10)
    for thread in threads:
        thread.join(10)

    assert seen == done


def test_each_task_has_its_own_trace(watched):
    """Of two asyncio tasks each is told with its own span and its own name."""
    tracer = watched.tracer_provider.get_tracer("app")

    async def work(engine, done, ready, end):
        with tracer.start_as_current_span("work") as span:
            async with engine.connect():
                done[asyncio.current_task().get_name()] = ids(span)
                ready.release()
                await end.wait()

    async def scenario(engine):
        done, ready, end = {}, asyncio.Semaphore(0), asyncio.Event()
        tasks = [asyncio.create_task(work(engine, done, ready, end), name=name) for name in ("one", "two")]
        for _ in tasks:
            await ready.acquire()
        seen = {holder.task: told(holder) for holder in otel_pools.holders()}
        end.set()
        await asyncio.gather(*tasks)
        return seen, done

    seen, done = run(scenario)

    assert seen == done
    assert set(done) == {"one", "two"}


def test_a_thread_that_has_ended_is_told_by_its_name(engine):
    """A connection that outlives its thread is told with what that was called."""
    held = []
    thread = threading.Thread(target=lambda: held.append(engine.connect()), name="importer")
    thread.start()
    thread.join(10)
    holder = only()
    held[0].close()

    assert (holder.task, holder.call_site is not None) == ("importer", True)


@contextmanager
def second_of_the_same_ident(work):
    """A thread that runs, after another has done *work* and ended, with the ident of that one."""
    for _ in range(100):
        first = threading.Thread(target=work, name="first")
        first.start()
        first.join(10)
        stop = threading.Event()
        second = threading.Thread(target=stop.wait, args=(10,), name="second")
        second.start()
        try:
            if first.ident == second.ident:
                yield
                return
        finally:
            stop.set()
            second.join(10)
    pytest.skip("this system gives no ident twice")


def test_a_thread_that_has_ended_is_not_taken_for_another(engine):
    """Somebody who happens to have the same ident now is not the holder."""
    held = []
    with second_of_the_same_ident(lambda: held.append(engine.connect())):
        tasks = {holder.task for holder in otel_pools.holders()}
    while held:
        held.pop().close()

    assert tasks == {"first"}


# -- the whole stack -------------------------------------------------------------------


def test_no_stack_unless_asked(engine):
    """By default only the line that asked is noted."""
    held = engine.connect()
    holder = only()
    held.close()

    assert holder.stack == ()


def test_the_whole_stack(telemetry):
    """With `stacks` all that stood below is told, the innermost first, and nothing of ours."""
    otel_pools.instrument(meter_provider=telemetry.meter_provider, stacks=True)
    engine = create_engine("sqlite://", creator=connect, poolclass=QueuePool)

    def inner():
        return engine.connect()

    held = inner()
    holder = only()
    held.close()
    engine.dispose()
    functions = [place.rpartition(" ")[2].rpartition(".")[2] for place in holder.stack]

    assert functions.index("raw_connection") < functions.index("inner") < functions.index("test_the_whole_stack")
    assert holder.call_site == holder.stack[functions.index("inner")]
    assert not any(place.startswith(str(Path(_leases.__file__).parent)) for place in holder.stack)


def test_the_whole_stack_behind_a_greenlet(telemetry):
    """Of an asyncio engine the coroutines that wait for it are told too."""
    otel_pools.instrument(meter_provider=telemetry.meter_provider, stacks=True)

    async def scenario(engine):
        async with engine.connect():
            return only()

    holder = run(scenario)

    assert any(place.endswith("scenario") for place in holder.stack)
    assert holder.call_site.endswith("scenario")


# -- settings --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [("true", True), ("1", True), (" TRUE ", True), ("on", True), ("false", False), ("0", False), ("no", False)],
)
def test_call_site_from_the_environment(monkeypatch, value, expected, caplog):
    """It is said in one of the words for yes and no."""
    monkeypatch.setenv("OTEL_POOLS_CALL_SITE", value)

    assert settings({}).call_site is expected
    assert caplog.records == []


@pytest.mark.parametrize(("value", "expected"), [(True, True), (False, False), (1, True), (0, False)])
def test_call_site_in_code(value, expected):
    """In code it is a bool, or what is as good as one."""
    assert settings({"call_site": value}).call_site is expected


@pytest.mark.parametrize("value", ["perhaps", "2", object(), [], 0.5])
def test_a_wrong_call_site(value, caplog):
    """One line says what was expected, without the value, and call sites are noted."""
    assert settings({"call_site": value}) == Settings()
    assert [record.getMessage() for record in caplog.records] == [
        "otel_pools: call_site must be true or false; the default True is used"
    ]


@pytest.mark.parametrize(("value", "expected"), [("0", 0.0), ("0.5", 0.5), (5, 5.0)])
def test_leak_threshold(value, expected):
    """It is a number of seconds."""
    assert settings({"leak_threshold": value}).leak_threshold == expected


@pytest.mark.parametrize("value", ["never", "-1", "nan", "inf", True])
def test_a_wrong_leak_threshold(value, caplog):
    """One line says what was expected, and the default is used."""
    assert settings({"leak_threshold": value}).leak_threshold == 60.0
    assert [record.getMessage() for record in caplog.records] == [
        "otel_pools: leak_threshold must be a number of seconds, 0 or more; the default 60.0 is used"
    ]
