"""The verbs of a request: they count, say what they are, and never come between a host and its own errors."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from otel_pools import _guard, _visits, _watch
from otel_pools._config import Settings
from otel_pools._model import Identity, Snapshot
from otel_pools._registry import Registry
from otel_pools._visits import KEY, Visit
from otel_pools.targets import Target


class Pool:
    """Something that carries requests."""


class Request:
    """A request as httpcore's: a plain object."""


class Slotted:
    """A request that takes no attribute of ours."""

    __slots__ = ()


@pytest.fixture
def registry():
    """A registry whose pools are all called one."""
    target = Target("test", lambda _: Identity("lib", None, "one"), lambda *_: Snapshot(), {})
    return Registry(target, Settings(), SimpleNamespace(threshold=1.0, waited=lambda *_: None))


def visiting(watch):
    """A visit of that pool, made as the twin of its method makes one."""
    visit = Visit()
    visit.watch = watch
    return visit


def visit(original, registry, **changed):
    """The twin of a pool's method."""
    table = {
        "introduce": lambda *_: None,
        "established": lambda _: True,
        "refusal": lambda _: None,
        "ended": lambda _: None,
        **changed,
    }
    return _visits.visit("m:Pool.handle", **table).compile(original, registry)


def test_a_visit_says_how_far_it_is(registry):
    """Its repr has the pool, whether it was served, and the path."""
    arrived = visiting(registry.meet(Pool()))
    waiting = repr(arrived)
    arrived.connection = object()
    arrived.served()

    assert waiting == "<Visit of one, waiting, idle>"
    assert repr(arrived) == "<Visit of one, served, idle>"


@pytest.mark.parametrize("served", [False, True])
def test_a_visit_that_is_dropped_neither_waits_nor_holds(registry, served):
    """A request that is garbage-collected is no waiter and no holder any more."""
    pool = Pool()
    watch = registry.meet(pool)
    arrived = visiting(watch)
    if served:
        arrived.connection = object()
        arrived.served()
    before = len(watch.waiting), len(watch.leases)
    del arrived

    assert before == (0, 1) if served else (1, 0)
    assert (watch.waiting, watch.leases) == ([], {})


def test_a_request_without_room_for_us_goes_through(registry, monkeypatch):
    """A request that takes no attribute is carried, uncounted, and nobody waits for ever."""
    monkeypatch.setattr(_guard, "loud", False)
    pool = Pool()

    assert visit(lambda *_: "answer", registry)(pool, Slotted()) == "answer"
    assert registry.meet(pool).waiting == []


@pytest.mark.parametrize("broken", ["introduce", "established", "refusal", "ended"])
def test_a_mistake_of_ours_is_not_the_hosts(registry, monkeypatch, broken):
    """Whatever fails in the table, the host gets its own error, the very same object."""
    monkeypatch.setattr(_guard, "loud", False)
    theirs = LookupError("theirs")

    def fail(*_):
        raise theirs

    twin = visit(fail, registry, **{broken: lambda *_: 1 / 0})
    with pytest.raises(LookupError) as caught:
        twin(Pool(), Request())

    assert caught.value is theirs


def test_a_mistake_of_ours_does_not_spoil_an_answer(registry, monkeypatch):
    """If an answer cannot be counted, it is given all the same."""
    monkeypatch.setattr(_guard, "loud", False)
    monkeypatch.setattr(Visit, "answered", lambda _: 1 / 0)

    assert visit(lambda *_: "answer", registry)(Pool(), Request()) == "answer"


def test_coroutine_functions_have_coroutine_functions_for_twins(registry):
    """An asyncio pool's method is awaited like before."""

    async def handle(pool, request):
        await asyncio.sleep(0)
        return getattr(request, KEY).path

    assert asyncio.run(visit(handle, registry)(Pool(), Request())) == "idle"


@pytest.mark.parametrize("wait", [lambda *_, **__: "connection", lambda place, timeout=None: "connection"])
def test_a_request_that_comes_by_itself_is_left_alone(registry, wait):
    """A place in line, a body and a connection whose request we have not seen are passed through."""
    request = Request()
    place = SimpleNamespace(request=request, connection=None)
    row = _visits.wait("m:Place.wait", ended=lambda _: None).compile(wait, registry)
    dial = _visits.dial("m:Connection._connect").compile(lambda *_: "stream", SimpleNamespace(owners={}))
    body = _visits.leave("m:Body.close", request=lambda body: body, ended=lambda _: None).compile(lambda _: "ok", None)

    assert (row(place, timeout=1), dial(object(), request), body(request)) == ("connection", "stream", "ok")


@pytest.mark.parametrize("lacks", ["request", "connection"])
def test_a_place_in_line_of_another_make_is_waited_in(registry, lacks, monkeypatch):
    """If a place in line has other attributes than we know, its request waits and is served as without us."""
    monkeypatch.setattr(_guard, "loud", False)
    request = Request()
    setattr(request, KEY, visiting(registry.meet(Pool())))
    place = SimpleNamespace(request=request, connection=None)
    delattr(place, lacks)
    row = _visits.wait("m:Place.wait", ended=lambda _: None)

    async def line_up(*_):
        return "connection"

    async def line_up_for(_, timeout=None):
        return "connection"

    for wait in (lambda *_: "connection", lambda _, timeout=None: "connection"):
        assert row.compile(wait, registry)(place) == "connection"
    for async_wait in (line_up, line_up_for):
        assert asyncio.run(row.compile(async_wait, registry)(place)) == "connection"


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_a_place_in_line_is_asked_as_it_was(registry, is_async, known):
    """However long a request is to wait, that arrives, whether its method has one argument or takes anything."""
    request = Request()
    setattr(request, KEY, visiting(registry.meet(Pool())))

    async def line_up(_, timeout=7):
        return timeout

    async def line_up_somehow(*args, **kwargs):
        return args[1:], kwargs

    one = line_up if is_async else lambda _, timeout=7: timeout
    any = line_up_somehow if is_async else lambda *args, **kwargs: (args[1:], kwargs)
    row = _visits.wait("m:Place.wait", ended=lambda _: None)

    def ask(wait, *args, **kwargs):
        place = SimpleNamespace(request=request, connection="connection" if known else None)
        answer = row.compile(wait, registry)(place, *args, **kwargs)
        return asyncio.run(answer) if is_async else answer

    assert [ask(one), ask(one, 1), ask(one, timeout=2)] == [7, 1, 2]
    assert ask(any, 1, timeout=2) == ((1,), {"timeout": 2})


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(("idles", "left_out"), [(True, [[]]), (False, [])])
def test_a_call_that_closes_nothing_may_be_left_out(registry, is_async, idles, left_out):
    """With nothing to close, a method of which that is known is not called; with something it always is."""
    called = []

    async def close_later(_, connections):
        called.append(connections)
        return "closed"

    def close(_, connections):
        called.append(connections)
        return "closed"

    original = close_later if is_async else close
    twin = _visits.drop("m:Pool.close", reason=lambda _: "x", idles=lambda method: idles and method is original)
    for connections in ([], ["one"]):
        answer = twin.compile(original, registry)(Pool(), connections)
        answer = asyncio.run(answer) if is_async else answer
        assert answer == ("closed" if connections in called else None)

    assert [it for it in ([], ["one"]) if it not in called] == left_out


def test_the_pool_is_tidied_once_in_a_while(registry, monkeypatch):
    """If nobody collects, a request makes room, but only looks whether it has to when it is time."""
    monkeypatch.setattr(_watch, "LIMIT", 2)
    pool = Pool()
    watch, twin = registry.meet(pool), visit(lambda *_: "answer", registry)
    kept = []
    for due in (float("inf"), float("inf"), float("inf"), 0.0, float("inf")):
        watch.due = due
        twin(pool, Request())
        kept.append(len(watch.waits))

    assert kept == [1, 2, 3, 1, 2]
    assert watch.ledger.outbox.tally().dropped == 3
