"""Other worlds than threads and asyncio as it comes: green threads, eager tasks, uvloop, trio, child processes."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import apps
import httpcore
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
