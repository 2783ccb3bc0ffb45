"""Other worlds than threads and asyncio as it comes: green threads, eager tasks, uvloop, trio, child processes."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import apps
import httpcore
import httpx
import pytest

import otel_pools

PROGRAM = Path(__file__).parent / "worlds_program.py"


def told(*arguments):
    """What the program has to say."""
    # Without it eventlet imports half of the world, of which trio cannot be imported then.
    environment = {**os.environ, "EVENTLET_NO_GREENDNS": "yes"}
    run = subprocess.run(
        [sys.executable, str(PROGRAM), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("world", ["gevent", "eventlet"])
def test_green_threads_are_told_apart(world, when):
    """Two green threads that hold one connection each are two holders, and none of them has asked for a second."""
    if find_spec(world) is None:
        pytest.skip(f"{world} is not installed")
    said = told(world, when)

    assert (said["nested"], said["checkouts"], len(said["holders"])) == (0, 2, 2)
    assert said["holders"] != ["MainThread", "MainThread"]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_children_count_their_own():
    """A child has its own numbers and ends well, whether it was forked, spawned or comes from a fork server."""
    assert told("children") == {method: [7, 0] for method in ("fork", "spawn", "forkserver")}


# -- prefork -------------------------------------------------------------------------------

PREFORK = Path(__file__).parent / "prefork_program.py"
PATIENCE = 30.0  # seconds: for what takes three on an idle machine
BEFORE = 3  # checkouts of the parent
# Who forks, what becomes of the connections that the parent has opened, and where the SDK begins.
FORKS = {
    "gunicorn --preload": ("gunicorn", "keep", "parent"),
    "gunicorn --preload, disposed": ("gunicorn", "dispose", "child"),
    "celery": ("celery", "keep", "child"),
    "celery, disposed": ("celery", "dispose", "parent"),
}


@dataclass(frozen=True)
class Family:
    """A parent and its two children, all ended: what the children answered, and what each process exported last."""

    parent: int
    code: int
    left: bool
    log: str
    answers: list
    exported: dict

    @property
    def worked(self):
        """How often each child was asked."""
        return Counter(answer["process"] for answer in self.answers)


def ask_gunicorn(log, _):
    """Eight requests at a time."""
    port = re.search(r"Listening at: http://127\.0\.0\.1:(\d+)", log)
    with httpx.Client(trust_env=False, timeout=PATIENCE) as client, ThreadPoolExecutor(8) as askers:
        return list(askers.map(lambda _: client.get(f"http://127.0.0.1:{port[1]}").json(), range(8)))


def ask_celery(_, url):
    """Eight tasks at a time."""
    from celery import Celery

    with Celery(broker=url, backend=url) as app:
        return [result.get(timeout=PATIENCE) for result in [app.send_task("work") for _ in range(8)]]


ASK = {"gunicorn": ("Booting worker", ask_gunicorn), "celery": (" ready.", ask_celery)}


def family(folder, url, host, connections, beginner):
    """Let them be born, work and end."""
    ready, ask = ASK[host]
    url, log, answers = f"{url}/{8 + len(connections)}", folder / "log", []  # a database each
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(PREFORK), host, str(folder), connections, beginner],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # gunicorn puts a socket into the home.
            env={**os.environ, "REDIS_URL": url, "HOME": str(folder), "NO_PROXY": "127.0.0.1"},
        )
    try:
        deadline = time.monotonic() + PATIENCE
        while ready not in log.read_text() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        while len({answer["process"] for answer in answers}) < 2 and time.monotonic() < deadline:
            answers += ask(log.read_text(), url)
        process.send_signal(signal.SIGTERM)
        code = process.wait(PATIENCE)
        left = alive(process.pid)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    exported = {int(path.stem): json.loads(path.read_text()) for path in folder.glob("*.json")}
    return Family(process.pid, code, left, log.read_text(), answers, exported)


def alive(group):
    """Whether anybody of this group is there."""
    with suppress(ProcessLookupError):
        os.killpg(group, 0)
        return True
    return False


@pytest.fixture(scope="module")
def families(tmp_path_factory, valkey):
    """All at once."""
    for host in ASK:
        pytest.importorskip(host)
    url = f"redis://127.0.0.1:{valkey.port}"
    with ThreadPoolExecutor(len(FORKS)) as all_of_them:
        born = {
            how: all_of_them.submit(family, tmp_path_factory.mktemp("family"), url, *arguments)
            for how, arguments in FORKS.items()
        }
    return {how: future.result() for how, future in born.items()}


prefork = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")


@prefork
@pytest.mark.parametrize("how", FORKS)
def test_a_family_ends_when_it_is_told_to(how, families):
    """On SIGTERM parent and children end by themselves and well, without a word of complaint."""
    ended = families[how]

    assert (ended.code, ended.left, len(ended.worked)) == (0, False, 2), ended.log
    assert not re.findall(r"Traceback|ERROR|CRITICAL|lost a measurement", ended.log), ended.log


@prefork
@pytest.mark.parametrize("how", FORKS)
def test_each_of_a_family_tells_its_own(how, families):
    """Children tell what they have done themselves, statistics and export alike; the parent tells its own, once."""
    told = families[how]

    for child, times in told.worked.items():
        # Answers may overtake each other on their way.
        own = sorted(answer["checkouts"] for answer in told.answers if answer["process"] == child)
        assert own == list(range(1, times + 1))
        assert told.exported[child]["otel_pools.checkouts"] == times
        assert told.exported[child]["otel_pools.pools"] == 1
    begun_in_parent = FORKS[how][2] == "parent"
    parents = [told.exported[told.parent]["otel_pools.checkouts"]] if begun_in_parent else []
    assert parents == [BEFORE] * begun_in_parent
    assert len(told.exported) == 2 + begun_in_parent


@prefork
@pytest.mark.parametrize("how", FORKS)
def test_histograms_begin_where_the_sdk_did(how, families):
    """
    An SDK that is set up in the child tells the child's waits alone.

    One that was there before the fork goes on with the parent's, in its own counters as in our histograms.
    """
    told, repeated = families[how], BEFORE * (FORKS[how][2] == "parent")

    for child, times in told.worked.items():
        exported = told.exported[child]
        waits, uses = (exported[f"db.client.connection.{what}_time"] for what in ("wait", "use"))
        assert (waits, uses, exported["app.borrowed"]) == (times + repeated,) * 3


@prefork
@pytest.mark.parametrize("how", FORKS)
def test_a_family_shares_no_connection_in_silence(how, families):
    """What a child uses of its parent's is `inherited`, and said; after `dispose(close=False)` it opens its own."""
    told, kept = families[how], FORKS[how][1] == "keep"

    for child in told.worked:
        exported = told.exported[child]
        opened_by = {answer["opened by"] for answer in told.answers if answer["process"] == child}
        created, inherited = (exported[f"otel_pools.connection.{what}"] for what in ("created", "inherited"))
        assert (opened_by, created, inherited) == (({told.parent}, 0, 1) if kept else ({child}, 1, 0))
    assert told.log.count("a connection that was opened before it was forked") == 2 * kept


# -- asyncio -------------------------------------------------------------------------------


async def two(pool):
    """Two tasks that hold one connection each; what is told of them meanwhile."""
    over, held = asyncio.Event(), []

    async def hold():
        connection = await pool.get_connection()
        held.append(connection)
        await over.wait()
        await pool.release(connection)

    tasks = [asyncio.ensure_future(hold()) for _ in range(2)]
    while len(held) < 2:
        await asyncio.sleep(0)
    names = {holder.task for holder in otel_pools.holders()}
    over.set()
    await asyncio.gather(*tasks)
    await pool.disconnect()
    return names, {task.get_name() for task in tasks}


def on(loop):
    """Both tasks on this loop."""
    try:
        names, tasks = loop.run_until_complete(two(apps.AsyncRedis().pool))
    finally:
        loop.close()
    [stats] = otel_pools.pools()
    return names == tasks, stats.nested, stats.checkouts


@pytest.fixture
def watched(telemetry):
    otel_pools.instrument(meter_provider=telemetry.meter_provider)


@pytest.mark.skipif(not hasattr(asyncio, "eager_task_factory"), reason="eager tasks are new in Python 3.12")
@pytest.mark.usefixtures("watched")
def test_eager_tasks_are_told_apart():
    """A task that runs before it is ever scheduled is a holder of its own, by its name."""
    loop = asyncio.new_event_loop()
    loop.set_task_factory(asyncio.eager_task_factory)

    assert on(loop) == (True, 0, 2)


@pytest.mark.usefixtures("watched")
def test_tasks_of_uvloop_are_told_apart():
    """So are those of uvloop."""
    uvloop = pytest.importorskip("uvloop")

    assert on(uvloop.new_event_loop()) == (True, 0, 2)


@pytest.mark.parametrize("name", ["AsyncSQLAlchemy", "AsyncRedis", "AsyncBlockingRedis", "AsyncHTTP"])
def test_an_application_on_uvloop_meets_the_same(name, telemetry):
    """On uvloop too there is no difference between watched and not."""
    uvloop = pytest.importorskip("uvloop")
    app = next(app for app in apps.APPS if app.__name__ == name)

    def go():
        loop, one = uvloop.new_event_loop(), app()
        try:
            return loop.run_until_complete(one.all())
        finally:
            loop.close()

    bare = outline(go())
    otel_pools.instrument(app.target, meter_provider=telemetry.meter_provider)

    assert outline(go()) == bare
    assert telemetry.value("otel_pools.checkouts") > 0


def outline(results):
    """Without what was handled before an error: of a timeout that depends on which of two ways uvloop was faster."""
    errors = (isinstance(first, tuple) for first, *_ in results)
    return [
        (first[:4], *rest) if error else (first, *rest) for error, (first, *rest) in zip(errors, results, strict=True)
    ]


def test_trio_meets_the_same(telemetry):
    """Two tasks of trio get their answers, one its timeout, and the end of all is told."""
    trio = pytest.importorskip("trio")

    class Stream(apps.AsyncStream):
        async def aclose(self):
            await trio.lowlevel.checkpoint()
            self.server.closed += 1

    class Network(httpcore.AsyncNetworkBackend):
        def __init__(self, server):
            self.server = server

        async def connect_tcp(self, *_, **__):
            await trio.lowlevel.checkpoint()
            return Stream(self.server)

    async def all(said):
        server = apps.Server()
        pool = httpcore.AsyncConnectionPool(network_backend=Network(server), **apps.LIMITS)
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(ask, pool, said)
        held = [await pool.handle_async_request(apps.asked()) for _ in range(2)]
        with pytest.raises(httpcore.PoolTimeout):
            await pool.handle_async_request(apps.asked())
        for answer in held:
            await answer.aread()
            await answer.aclose()
        with trio.move_on_after(0) as scope:
            await pool.handle_async_request(apps.asked())
        said.append(scope.cancelled_caught)
        await pool.aclose()
        return said, server.opened == server.closed

    async def ask(pool, said):
        answer = await pool.handle_async_request(apps.asked())
        said.append(await answer.aread())
        await answer.aclose()

    bare = trio.run(all, [])
    otel_pools.instrument("httpx", meter_provider=telemetry.meter_provider)

    assert trio.run(all, []) == bare
    now = telemetry.read()
    # Who was cancelled had a connection.
    assert {error for _, error in now.checkouts()} == {None, "timeout"}
    assert sum(now.checkouts().values()) == 6
    assert now.value("otel_pools.connection.created") == now.value("otel_pools.connection.closed") > 0
