"""The verbs: whatever is wrong in a row of ours, the library's method does what it did."""

from __future__ import annotations

import asyncio
import inspect
import weakref
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import ANY

import pytest
from doubles import Clock

import otel_pools
from otel_pools import Settings, _guard, _hooks, _watch
from otel_pools._leases import Loan, lend, lend_nobody, site
from otel_pools._model import Identity, Snapshot
from otel_pools._registry import Registry
from otel_pools._spans import Spans
from otel_pools.targets import Target
from otel_pools.targets import sqlalchemy as target


class Pool:
    """Something that can be held weakly."""


@pytest.fixture
def registry(telemetry, monkeypatch):
    """A registry that takes anything for a pool, with the wall as in production."""
    monkeypatch.setattr(_guard, "loud", False)
    otel_pools.instrument(meter_provider=telemetry.meter_provider)
    registry = otel_pools.SQLAlchemyPoolInstrumentor._registry
    monkeypatch.setattr(type(registry), "_ledger", lambda self, _: self.ledgers.setdefault(1, _ledger()))
    return registry


def _ledger():
    from otel_pools._model import Identity
    from otel_pools._watch import Ledger

    return Ledger(Identity("lib", "sys"))


def broken(_):
    """A row's function that does not fit."""
    raise AttributeError("ours")


def test_a_failed_creation_keeps_the_hosts_error(registry, caplog):
    """If we cannot tell whether a connection was opened, the creator's own error comes out all the same."""

    def connect(_):
        raise LookupError("theirs")

    pool, record = Pool(), Pool()
    twin = _hooks.create("m:C.connect", pool=lambda _: pool, opened=broken).compile(connect, registry)
    with pytest.raises(LookupError, match="theirs"):
        twin(record)

    assert "the end of a creation: AttributeError" in caplog.text


def test_a_replacement_goes_through(registry, caplog):
    """If we cannot see the pool that is replaced, it is replaced all the same."""
    twin = _hooks.replace("m:C.dispose", pool=broken).compile(lambda _: "done", registry)

    assert twin(Pool()) == "done"
    assert "a pool to be replaced: AttributeError" in caplog.text


def test_every_row_fits_this_version():
    """Each row of the table finds its method in the installed library."""
    rows = [row for row in target.TARGET.hooks["sqlalchemy"] if isinstance(row, _hooks.Hook)]

    assert rows
    assert all(vars(owner)[name] for owner, name in map(_hooks.resolve, (row.where for row in rows)))


class Thing:
    """A class of a library."""

    def ask(self):
        """Answer."""
        return "answer"


def _row(where):
    return _hooks.Hook("ask", where, lambda original, _: lambda self: f"our {original(self)}")


def test_either_takes_the_first_that_fits(registry):
    """Of several rows the first whose method exists is put on, and taken off again."""
    row = _hooks.either(_row(f"{__name__}:Thing.missing"), _row(f"{__name__}:Thing.ask"))

    undo = row.install(registry)
    ours = Thing().ask()
    undo()

    assert (ours, Thing().ask()) == ("our answer", "answer")


def test_either_says_all_that_was_looked_for(registry):
    """If no method exists, the error names every place."""
    row = _hooks.either(_row(f"{__name__}:Thing.one"), _row(f"{__name__}:Thing.two"))

    with pytest.raises(LookupError, match=r"Thing\.one or .*Thing\.two"):
        row.install(registry)


def test_an_optional_row_may_be_missing(registry):
    """A row for a method that comes and goes with versions is no loss."""
    _hooks.optional(_row(f"{__name__}:Thing.missing")).install(registry)()


@pytest.mark.parametrize("is_async", [False, True])
def test_a_connection_we_cannot_read_is_opened(registry, is_async):
    """If we cannot tell whether a connection is open, it is opened as without us."""

    def connect(_):
        return "stream"

    async def async_connect(_):
        return "stream"

    row = _hooks.connect("m:C.connect", is_open=broken)
    opened = row.compile(async_connect if is_async else connect, registry)(Pool())

    assert (asyncio.run(opened) if is_async else opened) == "stream"


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("do", [broken, lambda *_: 1 / 0, lambda *_: None])
def test_what_is_done_before_does_not_change_a_call(registry, is_async, do):
    """Whether we learn something before a call or fail to, it gets its arguments, and its result is the very same."""
    thing, given, result = Pool(), object(), object()

    def close(*args, **kwargs):
        assert (args, kwargs) == ((thing, given), {"grace": given})
        return result

    async def async_close(*args, **kwargs):
        return close(*args, **kwargs)

    twin = _hooks.before("m:C.close", do=do).compile(async_close if is_async else close, registry)
    closed = twin(thing, given, grace=given)

    assert inspect.iscoroutinefunction(twin) == is_async
    assert (asyncio.run(closed) if is_async else closed) is result


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("do", [broken, lambda *_: None])
def test_what_is_done_before_does_not_change_an_error(registry, is_async, do):
    """The call's own error comes out as the very same object, without a context of ours."""
    error = LookupError("theirs")

    def close(_):
        raise error

    async def async_close(_):
        raise error

    twin = _hooks.before("m:C.close", do=do).compile(async_close if is_async else close, registry)
    with pytest.raises(LookupError) as caught:
        asyncio.run(twin(Pool())) if is_async else twin(Pool())

    assert caught.value is error
    assert (error.__context__, error.__cause__) == (None, None)


@pytest.mark.parametrize("is_async", [False, True])
def test_something_is_done_before(registry, is_async):
    """What is to be learnt is learnt of the object, before the call and not after it."""
    seen, thing = [], Pool()

    async def async_close(_):
        return list(seen)

    row = _hooks.before("m:C.close", do=lambda *args: seen.append(args))
    closed = row.compile(async_close if is_async else lambda _: list(seen), registry)(thing)

    assert (asyncio.run(closed) if is_async else closed) == [(registry, thing)]


# -- the verbs, on a library of one class ----------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """Ours, as of now."""
    clock = Clock()
    for room in (_hooks, _watch):
        monkeypatch.setattr(room, "clock", clock)
    return clock


@pytest.fixture
def lib(telemetry):
    """A registry for pools of any class, and one of them; no wait is so slow that it had a span."""
    spans = Spans(telemetry.tracer_provider.get_tracer("lib"), 1000.0)
    target = Target("lib", lambda _: Identity("lib", "sys", "one"), lambda *_: Snapshot(), {})
    pool = Pool()
    registry = Registry(target, Settings(), spans)
    outside = _watch._passage.set(None)
    yield SimpleNamespace(registry=registry, pool=pool, watch=registry.meet(pool), spans=spans)
    registry.close()  # or it meets the pools of other tests
    _watch._passage.reset(outside)


@pytest.fixture
def quiet(monkeypatch):
    """The wall, as in production."""
    monkeypatch.setattr(_guard, "loud", False)


either_way = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
# A method that has no arguments has a twin that has none; these are the verbs for methods that may.
CATCH_ALL = "with arguments"
any_way = pytest.mark.parametrize("is_async", [False, CATCH_ALL, True], ids=["alone", CATCH_ALL, "async"])


def method(do, is_async):
    """A function as it is, one that takes anything, or one that says the same to who awaits it."""

    def do_with(*args, **kwargs):
        return do(*args, **kwargs)

    async def async_do(*args, **kwargs):
        return do(*args, **kwargs)

    return do_with if is_async == CATCH_ALL else async_do if is_async else do


def called(result):
    return asyncio.run(result) if inspect.iscoroutine(result) else result


def refusal(error):
    return "timeout" if isinstance(error, TimeoutError) else None


def told(outbox):
    outbox.fold()
    return outbox.tally()


def acquiring(lib, do, is_async=False, **options):
    options = {"refusal": refusal} | options
    return _hooks.acquire("m:C.get", **options).compile(method(do, is_async), lib.registry)


@any_way
def test_a_checkout_is_a_wait_and_a_lease(lib, clock, is_async):
    """It lasts as long as the call; what is lent is down as lent to who asked, since the call has ended."""
    connection, during = Pool(), []

    def get(_):
        during.append(list(lib.watch.waiting))
        clock.now += 3.0
        return connection

    got = called(acquiring(lib, get, is_async)(lib.pool))

    lease = Loan(*lib.watch.leases[id(connection)])
    assert got is connection
    assert (during, lib.watch.waiting) == ([[100.0]], [])
    assert (lib.watch.waits, lib.watch.notes) == ([3.0], [])
    assert (lease.since, lib.watch.holding) == (103.0, {lease.owner: id(connection)})
    assert lib.watch.ledger.peak == 1


def test_a_lease_knows_who_called_the_library(lib):
    """Its place is in the application's function, its way through the library's one."""
    connection = Pool()
    acquiring(lib, lambda _: connection)(lib.pool)

    assert site(lib.watch.leases[id(connection)]).endswith("test_a_lease_knows_who_called_the_library")


@any_way
@pytest.mark.parametrize("given", [((), {}), ((1,), {}), ((), {"timeout": 2}), ((1, 2), {"timeout": 3})])
@pytest.mark.parametrize("active", [True, False])
def test_a_checkout_is_called_as_it_was(lib, is_async, given, active):
    """Whatever arguments it is called with arrive, whether we watch or not."""
    args, kwargs = given
    twin = acquiring(lib, lambda *args, **kwargs: (args, kwargs), is_async)
    if not active:
        lib.registry.close()

    assert called(twin(lib.pool, *args, **kwargs)) == ((lib.pool, *args), kwargs)
    assert inspect.iscoroutinefunction(twin) == (is_async is True)


@any_way
def test_without_arguments_the_short_way_is_taken(lib, is_async):
    """Where there is another function for a call without arguments, only a call with some goes to the original."""
    long, asked = method(lambda *_, **__: "long", is_async), []
    row = _hooks.acquire(
        "m:C.get",
        refusal=refusal,
        bare=lambda original: asked.append(original) or method(lambda _: "short", is_async),
    )
    twin = row.compile(long, lib.registry)

    ways = [called(twin(lib.pool)), called(twin(lib.pool, 1)), called(twin(lib.pool, wait=1))]

    assert (ways, asked) == (["short", "long", "long"], [long])


@any_way
def test_a_pool_is_identified_once(lib, is_async, monkeypatch):
    """Who it is does not change by being borrowed from."""
    asked = []
    identify = lib.registry.target.identify
    target = replace(lib.registry.target, identify=lambda pool: asked.append(pool) or identify(pool))
    monkeypatch.setattr(lib.registry, "target", target)
    new, twin = Pool(), acquiring(lib, lambda _: "connection", is_async)
    for _ in range(3):
        called(twin(new))

    assert asked == [new]


@any_way
@pytest.mark.parametrize("fails", [False, True])
def test_two_may_ask_in_the_same_moment(lib, clock, is_async, fails):
    """On a coarse clock two who wait may have begun at once; each ends for itself, and then nobody waits."""

    def get(pool):
        if not inner:
            inner.append(None)
            called(acquiring(lib, get)(pool))
            if fails:
                raise ConnectionError
        return "connection"

    inner = []
    with pytest.raises(ConnectionError) if fails else nullcontext():
        called(acquiring(lib, get, is_async)(lib.pool))

    assert lib.watch.waiting == []


@any_way
def test_who_borrows_what_is_inherited_is_told(lib, is_async):
    """A checkout of a connection that was there when the process was forked is an event, with its lease."""
    connection = Pool()
    lib.watch.met(connection)
    lib.watch.inherit(dict(lib.watch.members))
    called(acquiring(lib, lambda _: connection, is_async)(lib.pool))

    (event,) = lib.watch.ledger.outbox.events
    assert (event.what, event.lease) == ("inherited", lib.watch.leases[id(connection)])


@any_way
def test_what_is_inside_decides_how_it_is_called(lib, is_async):
    """A plain function around a coroutine function is awaited."""
    inner = method(lambda _: "connection", is_async)

    def get(pool):
        return inner(pool)

    twin = _hooks.acquire("m:C.get", refusal=refusal, bare=lambda _: inner).compile(get, lib.registry)

    assert inspect.iscoroutinefunction(twin) == (is_async is True)
    assert called(twin(lib.pool)) == "connection"


any_lease = pytest.mark.parametrize("lease", ["record", lambda result: result.record], ids=["attribute", "function"])


@any_way
@any_lease
def test_a_result_may_stand_for_something_else(lib, is_async, lease):
    """What stands for the loan is taken from the result; the caller gets the result."""
    result = Record(lib.pool)
    result.record = Pool()

    assert called(acquiring(lib, lambda _: result, is_async, lease=lease)(lib.pool)) is result
    assert list(lib.watch.leases) == [id(result.record)]


@any_way
@any_lease
def test_a_shared_loan_is_none(lib, is_async, lease):
    """If what is got was lent before, there is neither a wait nor a lease."""
    result = Record(lib.pool)
    result.record = None

    assert called(acquiring(lib, lambda _: result, is_async, lease=lease)(lib.pool)) is result
    assert (lib.watch.leases, lib.watch.waits, lib.watch.notes, lib.watch.waiting) == ({}, [], [], [])


@any_way
def test_a_refusal_is_counted_and_raised(lib, clock, is_async):
    """The error comes out as the very same object; its word, its seconds and that it took no detour are noted."""
    error = TimeoutError()

    def get(_):
        clock.now += 2.0
        raise error

    with pytest.raises(TimeoutError) as caught:
        called(acquiring(lib, get, is_async)(lib.pool))

    (noted,) = lib.watch.notes
    assert caught.value is error
    assert (noted.path, noted.error, noted.seconds) == ("idle", "timeout", 2.0)
    assert (lib.watch.waiting, lib.watch.waits, lib.watch.leases) == ([], [], {})


@either_way
@pytest.mark.parametrize("crowd", [True, False])
def test_a_crowded_pool_makes_queue(lib, is_async, crowd):
    """Who asks a pool that has none free has stood in line, and it is asked of that pool."""
    asked = []
    twin = acquiring(lib, lambda _: Pool(), is_async, crowded=lambda pool: asked.append(pool) or crowd)
    kept = called(twin(lib.pool))

    assert asked == [lib.pool]
    assert (len(lib.watch.queues), len(lib.watch.waits), lib.watch.notes) == (crowd, 1 - crowd, [])
    assert told(lib.watch.ledger.outbox).checkouts == {("queued" if crowd else "idle", None): 1}
    del kept


@either_way
@pytest.mark.parametrize("ends", ["slow", "new", "refused"])
def test_a_crowded_pool_may_have_more_to_tell(lib, clock, is_async, ends):
    """Who stood in line, and for long, for a new connection or in vain, is noted as one who stood in line."""
    lib.watch.slow = 0.5

    def get(_):
        if ends == "new":
            _watch.detour("new")
        clock.now += 1.0 if ends == "slow" else 0.1
        if ends == "refused":
            raise TimeoutError
        return "connection"

    with pytest.raises(TimeoutError) if ends == "refused" else nullcontext():
        called(acquiring(lib, get, is_async, crowded=lambda _: True)(lib.pool))

    assert [(each.path, each.error) for each in lib.watch.notes] == [
        ("queued", "timeout" if ends == "refused" else None)
    ]
    assert (lib.watch.queues, lib.watch.waits) == ([], [])
    assert _watch.current_passage() is None


@any_way
def test_without_holders_nobody_is_known_to_hold(lib, clock, is_async):
    """If nobody is to know who holds a connection, a checkout is a wait, and a lease with its beginning alone."""
    lib.registry.lend = lend_nobody
    connection = Pool()
    twin = acquiring(lib, lambda _: connection, is_async)
    called(twin(lib.pool))
    clock.now += 1.0
    called(twin(lib.pool))

    assert lib.watch.leases == {id(connection): lend_nobody(101.0)}
    assert (lib.watch.waits, lib.watch.holding, lib.watch.ledger.peak) == ([0.0, 0.0], {}, 1)


@any_way
@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("row", [{"crowded": broken}, {"lease": broken}])
def test_a_broken_row_costs_only_the_measurement(lib, is_async, row, caplog):
    """Whatever of ours fails in a checkout, the caller gets what the library gave; it is said later."""
    twin = acquiring(lib, lambda _: "connection", is_async, **row)

    assert called(twin(lib.pool)) == "connection"
    assert (lib.watch.waiting, caplog.text) == ([], "")
    _guard.speak()
    assert "AttributeError" in caplog.text


@any_way
def test_a_pool_that_is_met_by_a_checkout_is_counted(lib, is_async):
    """The first checkout of a pool that we have not met counts like any other."""
    new = Pool()
    called(acquiring(lib, lambda _: "connection", is_async)(new))

    assert list(lib.registry.watches.values())[1].pool() is new
    assert len(lib.watch.ledger.outbox.waits) == 1


@any_way
@pytest.mark.parametrize("seconds", [0.4, 0.5])
def test_a_slow_wait_has_a_span(lib, clock, telemetry, is_async, seconds):
    """From the threshold on a wait is told by itself, with a span; a quicker one is a number among others."""
    is_worth_it = seconds == 0.5
    lib.spans.threshold = lib.watch.slow = 0.5

    def get(_):
        clock.now = seconds
        return Pool()

    clock.now = 0.0
    kept = called(acquiring(lib, get, is_async)(lib.pool))

    assert (len(telemetry.spans), lib.watch.waits) == ((1, []) if is_worth_it else (0, [seconds]))
    assert [(each.seconds, each.path, each.error) for each in lib.watch.notes] == [(0.5, "idle", None)] * is_worth_it
    del kept


@any_way
def test_a_detour_is_told(lib, is_async):
    """A checkout for which a connection was opened has that path, and the next one has none."""

    def get(_):
        if not held:
            _watch.detour("new")
        return Pool()

    async def twice():
        for _ in range(2):
            result = twin(lib.pool)
            held.append(await result if is_async is True else result)

    held = []
    twin = acquiring(lib, get, is_async)
    asyncio.run(twice())

    assert [each.path for each in lib.watch.notes] == ["new"]
    assert len(lib.watch.waits) == 1


@any_way
def test_the_peak_is_the_most_that_were_lent_at_once(lib, is_async):
    """It stays when they come back."""
    held = []
    twin = acquiring(lib, lambda _: held.append(Pool()) or held[-1], is_async)
    for _ in range(3):
        called(twin(lib.pool))
    del lib.watch.leases[id(held[0])], lib.watch.leases[id(held[1])]
    called(twin(lib.pool))

    assert lib.watch.ledger.peak == 3


@any_way
@pytest.mark.parametrize("limit", [2, 3])
def test_what_nobody_collects_is_let_go(lib, is_async, limit, monkeypatch):
    """Beyond the limit the waits are dropped and counted, not kept."""
    monkeypatch.setattr(_watch, "LIMIT", limit)
    monkeypatch.setattr(_watch, "A_WHILE", 0.0)
    lib.watch.due = 0.0
    twin = acquiring(lib, lambda _: "connection", is_async)
    for _ in range(3):
        called(twin(lib.pool))

    assert len(lib.watch.waits) == (0 if limit == 2 else 3)
    assert lib.watch.ledger.outbox.tally().dropped == 3 - len(lib.watch.waits)


@any_way
def test_who_holds_one_and_gets_another_is_nested(lib, clock, is_async):
    """The second one's lease and the first one's are told together."""
    held = []

    def get(_):
        clock.now += 1.0
        held.append(Pool())
        return held[-1]

    async def twice():
        for _ in range(2):
            result = twin(lib.pool)
            if is_async is True:
                await result

    twin = acquiring(lib, get, is_async)
    asyncio.run(twice())

    (event,) = lib.watch.ledger.outbox.events
    inner, outer = (lib.watch.leases[id(each)] for each in (held[1], held[0]))
    assert (event.what, event.lease, event.other) == ("nested", outer, inner)
    assert lib.watch.holding == {outer[1]: {id(each) for each in held}}


@any_way
def test_the_same_one_again_is_not_nested(lib, is_async):
    """Who gets what he has already holds one."""
    connection = Pool()

    async def twice():
        for _ in range(2):
            result = twin(lib.pool)
            if is_async is True:
                await result

    twin = acquiring(lib, lambda _: connection, is_async)
    asyncio.run(twice())

    assert lib.watch.ledger.outbox.events == []


@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_a_call_inside_may_have_said_so(lib, clock, seconds):
    """If a call inside the coroutine has lent the same connection, it is one checkout."""
    connection = Pool()
    inner = acquiring(lib, lambda _: connection)

    async def get(pool):
        clock.now += seconds
        return inner(pool)

    twin = _hooks.acquire("m:C.get", refusal=refusal).compile(get, lib.registry)
    asyncio.run(twin(lib.pool))

    assert lib.watch.waits == [0.0]


def test_a_lease_from_before_is_another_checkout(lib, clock):
    """What was lent before this coroutine began, and never came back as far as we know, is lent anew."""
    connection = Pool()
    lib.watch.leases[id(connection)] = lend(50.0)
    twin = acquiring(lib, lambda _: connection, is_async=True)
    asyncio.run(twin(lib.pool))

    assert lib.watch.leases[id(connection)][0] == 100.0
    assert lib.watch.waits == [0.0]


# -- what comes back -------------------------------------------------------------------


class Held:
    """What was lent, and whose it is."""

    def __init__(self, pool):
        self.pool = pool


def releasing(lib, do=lambda *_, **__: "back", **options):
    return _hooks.release("m:C.put", pool=lambda held: held.pool, **options).compile(do, lib.registry)


def lent(lib, held, since, owner=7):
    """As a checkout leaves it."""
    lease = (since, owner, *lend(since)[2:])
    lib.watch.leases[id(held)] = lease
    lib.watch.holding[owner] = id(held)
    return lease


def putting(lib, is_async=False, do=lambda *_: "back", out=lambda *_: False):
    return _hooks.take_back("m:C.put", out=out).compile(method(do, is_async), lib.registry)


@pytest.fixture(params=["release", "release with a flag", "take_back", "async take_back"])
def give_back(request, lib):
    """Each verb that ends a loan, as a function of what was lent."""
    if request.param.startswith("release"):
        return releasing(lib, lambda held, flag=True: "back") if "flag" in request.param else releasing(lib)
    twin = putting(lib, request.param != "take_back")
    return lambda held: called(twin(held.pool, held))


def test_what_comes_back_was_in_use(lib, clock, give_back):
    """Its seconds are from its lease to now; nobody has it any more, and the call has its result."""
    held = Held(lib.pool)
    lent(lib, held, 95.0)

    assert give_back(held) == "back"
    assert (lib.watch.uses, lib.watch.leases, lib.watch.holding) == ([5.0], {}, {})
    assert lib.watch.ledger.outbox.events == []


@pytest.mark.parametrize(("patience", "is_late"), [(4.9, True), (5.0, False)])
def test_what_comes_back_too_late_is_told(lib, clock, give_back, patience, is_late):
    """Beyond our patience it is an event, with the lease and its seconds."""
    lib.watch.patience = patience
    held = Held(lib.pool)
    lease = lent(lib, held, 95.0)
    give_back(held)

    assert [tuple(each) for each in lib.watch.ledger.outbox.events] == [("late", lease, 5.0, None)] * is_late


def test_what_is_given_back_leaves_the_rest(lib, give_back):
    """Who has two and gives back one has the other."""
    held, other = Held(lib.pool), Held(lib.pool)
    lent(lib, other, 1.0)
    lent(lib, held, 2.0)
    lib.watch.holding[7] = {id(held), id(other)}
    give_back(held)

    assert lib.watch.holding == {7: id(other)}


def test_what_another_has_got_meanwhile_stays_his(lib, give_back):
    """If its borrower holds another one by now, giving this back takes nothing from him."""
    held, other = Held(lib.pool), Held(lib.pool)
    lent(lib, held, 1.0)
    lib.watch.holding[7] = id(other)
    give_back(held)

    assert lib.watch.holding == {7: id(other)}


def test_what_nobody_is_known_to_hold_comes_back(lib, clock, give_back):
    """A lease whose owner is not down as holding it ends like any other."""
    held = Held(lib.pool)
    lent(lib, held, 95.0)
    lib.watch.holding.clear()
    give_back(held)

    assert (lib.watch.uses, lib.watch.leases, lib.watch.holding) == ([5.0], {}, {})


@pytest.mark.parametrize("way", ["release", "take_back"])
def test_without_holders_what_comes_back_was_in_use(lib, clock, way):
    """If nobody is to know who holds a connection, the end of a loan is a number, and who dropped it is not asked."""
    lib.registry.lend = lend_nobody
    held = Held(lib.pool)
    lib.watch.leases[id(held)] = lend_nobody(95.0)
    if way == "release":
        releasing(lib, loan=lambda _: lambda: None)(held)
    else:
        putting(lib)(lib.pool, held)

    assert (lib.watch.uses, lib.watch.leases, lib.watch.ledger.outbox.events) == ([5.0], {}, [])


@pytest.mark.parametrize(
    ("do", "given"),
    [
        (lambda held, flag=True: flag, ((), {})),
        (lambda held, flag=True: flag, ((False,), {})),
        (lambda held, flag=True: flag, ((), {"flag": False})),
        (lambda *args, **kwargs: (args[1:], kwargs), ((1, 2), {"three": 3})),
        (lambda held, *, flag=True: flag, ((), {"flag": False})),
        (lambda held, flag, /: flag, ((7,), {})),
        (lambda held: "alone", ((), {})),
    ],
)
def test_what_is_given_back_is_given_back_as_it_was(lib, do, given):
    """Whatever arguments the call has, by place or by name, arrive; so do its own defaults."""
    args, kwargs = given
    held = Held(lib.pool)

    assert releasing(lib, do)(held, *args, **kwargs) == do(held, *args, **kwargs)


@pytest.mark.parametrize("given", [((), {"other": 1}), ((1, 2), {}), ((1,), {"flag": 1})])
def test_a_wrong_call_is_the_hosts(lib, given):
    """Who gives a method what it does not take gets a TypeError, as without us."""
    args, kwargs = given
    with pytest.raises(TypeError):
        releasing(lib, lambda held, flag=True: "back")(Held(lib.pool), *args, **kwargs)


def test_what_we_did_not_see_go_is_no_use(lib, give_back):
    """What comes back without a lease is given back, and no time is told of it."""
    assert give_back(Held(lib.pool)) == "back"
    assert lib.watch.uses == []


def test_a_pool_may_be_met_by_what_comes_back(lib, give_back):
    """The first that we see of a pool may be something that comes back to it."""
    new = Pool()

    assert give_back(Held(new)) == "back"
    assert [watch.pool() for watch in lib.registry.watches.values()] == [lib.pool, new]


def test_without_us_it_comes_back(lib, give_back):
    """Switched off, a release is what it was."""
    lib.registry.close()
    lib.registry.active = False

    assert give_back(Held(lib.pool)) == "back"
    assert lib.registry.watches == {}


@pytest.mark.usefixtures("quiet")
def test_a_mistake_of_ours_gives_it_back(lib, give_back, caplog):
    """If we cannot note a release it happens all the same, silently, and is said at the next collection."""
    held = Held(lib.pool)
    lent(lib, held, "long ago")

    assert give_back(held) == "back"
    assert caplog.text == ""
    _guard.speak()
    assert "a checkin: TypeError" in caplog.text


@pytest.fixture
def lost(monkeypatch):
    """No pool can be found."""
    monkeypatch.setattr(Registry, "find", lambda *_: 1 / 0)


@pytest.mark.usefixtures("quiet", "lost")
def test_a_pool_that_cannot_be_found_gets_it_back(give_back, caplog):
    """If we cannot tell whose it is, that is the only mistake that is said."""
    back = give_back(Held(Pool()))
    _guard.speak()

    assert back == "back"
    assert [record.args for record in caplog.records] == [(ANY,)]
    assert "a checkin: ZeroDivisionError" in caplog.text


def test_a_release_is_called_as_it_was(lib):
    """Its arguments and its result are the library's."""
    twin = releasing(lib, lambda *args, **kwargs: (args, kwargs))
    held = Held(lib.pool)

    assert twin(held) == ((held,), {})
    assert twin(held, 1) == ((held, 1), {})
    assert twin(held, reset=2) == ((held,), {"reset": 2})
    assert twin(held, 1, reset=2) == ((held, 1), {"reset": 2})


def test_what_comes_back_unseen_is_known_from_now_on(lib):
    """A record that we did not see go out is one of the pool's connections."""
    held = Held(lib.pool)
    releasing(lib)(held)

    assert list(lib.watch.connections()) == [held]


def test_an_owner_is_known_without_asking(lib):
    """Whose a met record is need not be asked of it."""
    held = Held(None)
    lib.watch.met(held)
    lent(lib, held, 1.0)
    releasing(lib)(held)

    assert len(lib.watch.uses) == 1
    assert len(lib.registry.watches) == 1


@pytest.mark.parametrize("is_dropped", [True, False])
def test_what_the_collector_gives_back_has_leaked(lib, clock, is_dropped):
    """If what its owner had is gone, its owner did not give it back; that is told with its lease."""
    held, fairy = Held(lib.pool), Pool()
    ref = weakref.ref(fairy)
    lease = lent(lib, held, 95.0)
    asked = []
    twin = releasing(lib, loan=lambda held: asked.append(held) or ref)
    if is_dropped:
        del fairy
    twin(held)

    assert asked == [held]
    assert [tuple(each) for each in lib.watch.ledger.outbox.events] == [("collected", lease, 5.0, None)] * is_dropped


def test_what_has_no_loan_has_not_leaked(lib, clock):
    """Where there is nothing that its owner could have dropped, it was given back."""
    held = Held(lib.pool)
    lent(lib, held, 95.0)
    releasing(lib, loan=lambda _: None)(held)

    assert lib.watch.ledger.outbox.events == []


@either_way
def test_what_was_lost_is_found(lib, is_async):
    """An orphan that comes back after all is none; others stay."""
    held = Held(lib.pool)
    lent(lib, held, 1.0)
    lib.watch.orphans |= {id(held), 1}
    called(putting(lib, is_async)(lib.pool, held))

    assert lib.watch.orphans == {1}


@either_way
def test_what_is_taken_back_is_called_as_it_was(lib, is_async):
    """The pool and the connection arrive, and its result comes out."""
    held = Held(lib.pool)
    for _ in range(2):
        assert called(putting(lib, is_async, lambda *args: args)(lib.pool, held)) == (lib.pool, held)
        lent(lib, held, 1.0)


@pytest.mark.parametrize("is_out", [True, False])
@pytest.mark.parametrize("error", [LookupError("theirs"), asyncio.CancelledError()])
def test_what_is_lost_on_its_way_back_is_an_orphan(lib, clock, is_out, error):
    """If the call fails, the pool is asked whether it has the connection back; the error is the very same."""
    held, asked = Held(lib.pool), []

    async def put(*_):
        clock.now += 1.0
        raise error

    def out(*of):
        asked.append(of)
        return is_out

    lease = lent(lib, held, 95.0)
    twin = _hooks.take_back("m:C.put", out=out).compile(put, lib.registry)
    coroutine = twin(lib.pool, held)
    with pytest.raises(type(error)) as caught:
        coroutine.send(None)

    assert caught.value is error
    assert asked == [(lib.pool, held)]
    assert (lib.watch.leases, lib.watch.orphans) == (({id(held): lease}, {id(held)}) if is_out else ({}, set()))
    assert lib.watch.uses == ([] if is_out else [5.0])
    assert lib.watch.holding == {}


@pytest.mark.usefixtures("quiet")
def test_a_mistake_in_a_lost_return_keeps_the_hosts_error(lib, caplog):
    """If we cannot ask whether it is back, the library's error comes out."""
    held = Held(lib.pool)
    lent(lib, held, 1.0)

    async def put(*_):
        raise LookupError("theirs")

    twin = _hooks.take_back("m:C.put", out=lambda *_: 1 / 0).compile(put, lib.registry)
    with pytest.raises(LookupError, match="theirs"):
        asyncio.run(twin(lib.pool, held))
    _guard.speak()

    assert "a checkin: ZeroDivisionError" in caplog.text


def test_the_way_back_is_not_use(lib, clock):
    """How long it takes to give back a connection is not counted as its use."""
    held = Held(lib.pool)
    lent(lib, held, 95.0)

    def put(*_):
        clock.now += 10.0

    asyncio.run(putting(lib, True, put)(lib.pool, held))

    assert lib.watch.uses == [5.0]


# -- on the way ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("items", "given", "path"),
    [(0, (), "queued"), (1, (), None), (0, (False,), None), (0, (True, 0.5), "queued"), (2, (False, None), None)],
)
def test_who_finds_nothing_stands_in_line(lib, items, given, path):
    """Only who waits for something that is not there has queued; the call has its arguments, with their defaults."""
    line = Pool()
    asked = []
    row = _hooks.queue("m:Q.get", items=lambda line: asked.append(line) or items)
    got = row.compile(lambda *args: args, lib.registry)(line, *given)
    passage = _watch.current_passage()

    assert got == (line, *(given + (True, None)[len(given) :]))
    assert getattr(passage, "path", None) == path
    assert asked in ([line], [])


def test_a_queue_without_us_is_a_queue(lib):
    """Switched off, nothing is noted."""
    lib.registry.close()
    get = _hooks.queue("m:Q.get", items=lambda _: 0).compile(lambda *_: "item", lib.registry)

    assert get(Pool(), timeout=0.5) == "item"
    assert _watch.current_passage() is None


@pytest.mark.usefixtures("quiet")
def test_a_queue_that_cannot_be_asked_is_a_queue(lib, caplog):
    """If we cannot tell whether something is there, the call is made."""
    get = _hooks.queue("m:Q.get", items=broken).compile(lambda *_: "item", lib.registry)

    assert get(Pool()) == "item"
    _guard.speak()
    assert "a queue: AttributeError" in caplog.text


class Line:
    """A queue as Python's, which asks itself whether it is empty."""

    def __init__(self, *items):
        self.queue = [*items]

    def _empty(self):
        return not self.queue

    def asks_more(self):
        return not len(self.queue)

    def get(self, block=True):
        return None if self._empty() else self.queue.pop()

    def empty(self):
        block = True
        return block and self._empty()


def asking(lib, line=Line):
    """The class, and the registry of what its queues note."""

    class Asking(line):
        _empty = _hooks.queue_if_empty("m:Q._empty").compile(line._empty, lib.registry)

    return Asking


@pytest.mark.parametrize(
    ("items", "ask", "answer", "path"),
    [
        ((), lambda line: line.get(), None, "queued"),
        ((1,), lambda line: line.get(), 1, None),
        ((), lambda line: line.get(block=False), None, None),
        ((), lambda line: line.empty(), True, None),
        ((1,), lambda line: line.empty(), False, None),
    ],
)
def test_who_asks_a_queue_without_items_stands_in_line(lib, items, ask, answer, path):
    """Only a `get` that may wait, and hears that there is nothing, has queued; the answer is the queue's."""
    assert ask(asking(lib)(*items)) == answer
    assert getattr(_watch.current_passage(), "path", None) == path


def test_an_empty_queue_without_us_is_empty(lib):
    """Switched off, nothing is noted."""
    lib.registry.close()

    assert asking(lib)().get() is None
    assert _watch.current_passage() is None


@pytest.mark.parametrize("method", [Line.asks_more, Line.get, len])
def test_a_queue_that_asks_more_is_not_answered_for(lib, method):
    """Where the method is not known to look at the items alone, the row does not fit."""
    with pytest.raises(LookupError, match=r"m:Q\._empty"):
        _hooks.queue_if_empty("m:Q._empty").compile(method, lib.registry)


@pytest.mark.usefixtures("quiet")
def test_a_queue_whose_items_we_cannot_see_is_asked(lib, caplog):
    """If we fail, its own method is asked."""

    class Shy(Line):
        queue = property(lambda _: 1 / 0, lambda *_: None)

    with pytest.raises(ZeroDivisionError):
        asking(lib, Shy)().get()
    _guard.speak()
    assert "a queue: ZeroDivisionError" in caplog.text


class Record:
    """A connection's place in a pool."""

    def __init__(self, pool, connection=None):
        self.pool, self.connection = pool, connection


def creating(lib, do, opened=lambda _: False):
    return _hooks.create("m:R.connect", pool=lambda record: record.pool, opened=opened).compile(do, lib.registry)


def closing(lib, do=lambda *_: None, reason=lambda: "error"):
    row = _hooks.close("m:P.close", reason=reason, connection=lambda record: record.connection)
    return row.compile(do, lib.registry)


def test_a_creation_is_timed(lib, clock):
    """It lasts as long as the call, its record is known from now on and is not idle meanwhile; the path is new."""
    record, during = Record(lib.pool), []

    def connect(*args, **kwargs):
        clock.now += 4.0
        during.append((set(lib.watch.creating), _watch.current_passage().creating))
        return args, kwargs

    assert creating(lib, connect)(record, 1, ssl=2) == ((record, 1), {"ssl": 2})
    passage = _watch.current_passage()
    assert during == [({id(record)}, id(record))]
    assert lib.watch.ledger.outbox.creates == [4.0]
    assert (lib.watch.creating, list(lib.watch.connections())) == (set(), [record])
    assert lib.watch.opened == {id(record): 104.0}
    assert (passage.path, passage.creating, passage.created, passage.failed) == ("new", False, False, 0)


@pytest.mark.parametrize(
    ("is_open", "was_closed", "counted"), [(0, None, 0), (1, None, 1), (0, "itself", 1), (0, "another", 0)]
)
def test_a_creation_that_fails_is_counted_if_something_was_opened(lib, clock, is_open, was_closed, counted):
    """A connection that a listener's error left open, or that was closed again, was opened; its record is no member."""
    record, another = Record(lib.pool, Pool()), Record(lib.pool, Pool())
    error, asked = LookupError("theirs"), []
    lib.watch.met(another)

    def connect(_):
        clock.now += 4.0
        if was_closed:
            closing(lib)(lib.pool, {"itself": record, "another": another}[was_closed].connection)
        raise error

    with pytest.raises(LookupError) as caught:
        creating(lib, connect, lambda record: asked.append(record) or is_open)(record)

    assert caught.value is error
    assert asked in ([record], [])
    assert lib.watch.ledger.outbox.creates == [4.0] * counted
    assert (lib.watch.creating, list(lib.watch.connections())) == (set(), [another])
    assert _watch.current_passage().failed == id(error)


def test_a_new_connection_is_not_inherited(lib):
    """A record that opens anew in a forked child has nothing of its parent's."""
    record = Record(lib.pool)
    lib.watch.inherited = {id(record): "from the parent", 1: "another"}
    creating(lib, lambda _: None)(record)

    assert lib.watch.inherited == {1: "another"}


@pytest.mark.parametrize("way", [(), (1,)])
def test_a_creation_that_we_cannot_follow_is_made(lib, caplog, quiet, way):
    """Of no pool of ours, or of none that can be found, a record is connected as without us."""
    twin = _hooks.create("m:R.connect", pool=broken, opened=broken).compile(
        lambda *args, **kwargs: (args, kwargs), lib.registry
    )
    record = Record(None)

    assert twin(record, *way, ssl=2) == ((record, *way), {"ssl": 2})
    assert "a creation: AttributeError" in caplog.text
    assert lib.watch.ledger.outbox.creates == []


def test_a_creation_without_us_is_a_creation(lib):
    """Switched off, a record is connected and nothing is noted."""
    lib.registry.close()

    assert creating(lib, lambda *args: args)(Record(Pool()), 1)[1:] == (1,)
    assert _watch.current_passage() is None


def test_a_record_may_be_forgotten_while_it_opens(lib):
    """If a creation fails whose record we do not know any more, its error comes out."""

    def connect(_):
        lib.watch.members.clear()
        raise LookupError("theirs")

    with pytest.raises(LookupError, match="theirs"):
        creating(lib, connect)(Record(lib.pool))


def test_a_close_has_its_reason(lib):
    """It is counted by what the row says, before the call, which has its arguments and its result."""
    seen = []

    def close(*args, **kwargs):
        seen.append(list(lib.watch.ledger.outbox.closes))
        return args, kwargs

    twin = closing(lib, close, lambda: "recycle")

    assert twin(lib.pool, 1, 2, terminate=3) == ((lib.pool, 1, 2), {"terminate": 3})
    assert seen == [["recycle"]]


def test_what_is_closed_is_not_open(lib):
    """The record that speaks through what is closed, once or twice, is not open any more; the others are."""
    records = [Record(lib.pool, Pool()) for _ in range(3)]
    for record in records:
        lib.watch.met(record)
        lib.watch.opened[id(record)] = 1.0
    for connection in (records[1].connection, records[1].connection, Pool()):
        closing(lib)(lib.pool, connection)

    assert list(lib.watch.opened) == [id(records[0]), id(records[2])]


def test_a_close_outside_of_a_creation_opens_nothing(lib):
    """A passage that creates nothing has nothing created when something else is closed."""
    passage = _watch.detour("new")
    closing(lib)(lib.pool, Pool())

    assert not passage.created


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("verb", ["close", "make", "disconnect"])
def test_a_mistake_costs_only_the_number(lib, verb, caplog):
    """If we fail to note what a call does, it is done, with its result, and the mistake is said later."""
    connection = Pool()
    lib.watch.met(connection)
    row = {
        "close": lambda: _hooks.close("m:C.f", reason=lambda: 1 / 0, connection=broken),
        "make": lambda: _hooks.make("m:C.f", parts=lambda _: 1 / 0),
        "disconnect": lambda: _hooks.disconnect("m:C.f", is_open=lambda _: True, reason=lambda: 1 / 0),
    }[verb]()

    arguments = {"close": (lib.pool, connection), "make": (lib.pool,), "disconnect": (connection,)}[verb]

    assert row.compile(lambda *_: "done", lib.registry)(*arguments) == "done"
    assert caplog.text == ""
    _guard.speak()
    assert "ZeroDivisionError" in caplog.text


def test_a_connection_that_is_made_is_met_once(lib):
    """What a pool returns is known from now on, part by part, as not yet opened; what it returns again is not new."""
    parts = [Pool(), Pool()]
    whole = (1, *parts)
    twin = _hooks.make("m:P.make", parts=lambda whole: whole[1:]).compile(lambda *_, **__: whole, lib.registry)

    assert twin(lib.pool, 1, db=2) is whole
    assert (list(lib.watch.connections()), lib.watch.made) == (parts, {*map(id, parts)})
    lib.watch.made.clear()
    twin(lib.pool)
    assert lib.watch.made == set()


def test_a_maker_is_called_as_it_was(lib):
    """Its arguments arrive."""
    twin = _hooks.make("m:P.make", parts=lambda _: ()).compile(lambda *args, **kwargs: (args, kwargs), lib.registry)

    assert twin(lib.pool, 1, db=2) == ((lib.pool, 1), {"db": 2})


def opening(lib, do, is_async, is_open):
    return _hooks.connect("m:C.connect", is_open=is_open).compile(method(do, is_async), lib.registry)


class Socket:
    """A connection that knows whether it is open."""

    def __init__(self, is_open=False):
        self.is_open = is_open


def is_open(socket):
    return socket.is_open


@either_way
def test_opening_a_connection_is_timed(lib, clock, is_async):
    """It lasts as long as the call, and the connection is open since then."""
    socket = Socket()
    lib.watch.met(socket)

    def connect(*args, **kwargs):
        clock.now += 4.0
        socket.is_open = True
        return args, kwargs

    twin = opening(lib, connect, is_async, is_open)

    assert called(twin(socket, 1, retry=2)) == ((socket, 1), {"retry": 2})
    assert lib.watch.ledger.outbox.creates == [4.0]
    assert lib.watch.opened == {id(socket): 104.0}


@either_way
@pytest.mark.parametrize("is_closed", [False, True])
@pytest.mark.parametrize("given", [(lambda _: "alone", ()), (lambda _, a, b=2: (a, b), (1,)), (lambda _, a: a, (1,))])
def test_opening_is_called_as_it_was(lib, is_async, is_closed, given):
    """Whatever the method takes arrives, whether there is something to open or not."""
    do, args = given
    socket = Socket(not is_closed)
    lib.watch.met(socket)

    async def async_do(socket, *args):
        return do(socket, *args)

    twin = _hooks.connect("m:C.connect", is_open=is_open).compile(async_do if is_async else do, lib.registry)

    assert called(twin(socket, *args)) == do(socket, *args)
    assert inspect.iscoroutinefunction(twin) == is_async


@pytest.mark.usefixtures("quiet")
@either_way
def test_an_opening_that_we_cannot_begin_to_follow(lib, is_async, caplog, monkeypatch):
    """If we cannot note that it is opened, it is opened all the same; it is said later."""
    socket = Socket()
    lib.watch.met(socket)
    monkeypatch.setattr(type(lib.watch), "opening", broken)

    assert called(opening(lib, lambda _: "stream", is_async, is_open)(socket)) == "stream"
    _guard.speak()
    assert "a creation: TypeError" in caplog.text


@either_way
@pytest.mark.parametrize("of", ["open", "nobody's"])
def test_what_need_not_be_opened_or_is_nobodys_is_not_timed(lib, is_async, of):
    """A connection that is open, or belongs to no pool, is called as without us."""
    socket = Socket(of == "open")
    if of == "open":
        lib.watch.met(socket)
    twin = opening(lib, lambda *args, **kwargs: (args, kwargs), is_async, is_open)

    assert called(twin(socket, 1, retry=2)) == ((socket, 1), {"retry": 2})
    assert (lib.watch.ledger.outbox.creates, lib.watch.opened) == ([], {})
    assert _watch.current_passage() is None


@either_way
def test_a_connection_that_fails_to_open(lib, is_async):
    """The error is the very same, and known to the checkout that it fails; nothing was created."""
    socket, error = Socket(), ConnectionError("theirs")
    lib.watch.met(socket)

    def connect(_):
        raise error

    def get(_):
        return opening(lib, connect, False, is_open)(socket)

    async def async_get(_):
        return await opening(lib, connect, True, is_open)(socket)

    twin = _hooks.acquire("m:P.get", refusal=refusal).compile(async_get if is_async else get, lib.registry)
    with pytest.raises(ConnectionError) as caught:
        called(twin(lib.pool))

    assert caught.value is error
    assert (lib.watch.ledger.outbox.creates, lib.watch.opened) == ([], {})
    assert [(each.path, each.error) for each in lib.watch.notes] == [("new", "connect_error")]


@either_way
@pytest.mark.usefixtures("quiet")
def test_an_opening_that_we_cannot_follow_to_its_end(lib, is_async, caplog):
    """If afterwards we cannot tell whether it is open, the caller gets his result."""
    socket, asked = Socket(), []
    lib.watch.met(socket)

    def fragile(socket):
        asked.append(socket)
        return len(asked) > 1 and 1 / 0

    assert called(opening(lib, lambda _: "stream", is_async, fragile)(socket)) == "stream"
    assert asked == [socket, socket]
    assert "a creation: ZeroDivisionError" in caplog.text


@either_way
def test_closing_a_connection_is_counted_once(lib, clock, is_async):
    """An open one is counted with its reason and its life, before the call; a closed one, or nobody's, is not."""
    socket, stranger = Socket(True), Socket(True)
    lib.watch.met(socket)
    lib.watch.opened[id(socket)] = 90.0
    seen = []

    def close(*args, **kwargs):
        seen.append(list(lib.watch.ledger.outbox.closes))
        args[0].is_open = False
        return args, kwargs

    row = _hooks.disconnect("m:C.close", is_open=is_open, reason=lambda: "error")
    twin = row.compile(method(close, is_async), lib.registry)

    assert called(twin(socket, 1, nowait=2)) == ((socket, 1), {"nowait": 2})
    lib.watch.opened[id(socket)] = 90.0
    called(twin(socket))
    called(twin(stranger))
    assert seen == [["error"]] * 3
    assert lib.watch.ledger.outbox.lives == [10.0]
    assert inspect.iscoroutinefunction(twin) == is_async


def test_a_pool_that_is_replaced_rests(lib):
    """After the call the old pool hands out no more and the new one is known; the call has its arguments and result."""
    engine, new = SimpleNamespace(pool=lib.pool), Pool()

    def dispose(*args, **kwargs):
        engine.pool = new
        return args, kwargs

    twin = _hooks.replace("m:E.dispose", pool=lambda engine: engine.pool).compile(dispose, lib.registry)

    assert twin(engine, 1, close=2) == ((engine, 1), {"close": 2})
    assert (lib.watch.closed_down, list(lib.registry.resting.values())) == (True, [lib.watch])
    assert [ref() for ref in lib.registry.sighted.values()] == [new]


@pytest.mark.parametrize("before", ["the same", "none"])
def test_a_pool_that_stays_does_not_rest(lib, before):
    """If the pool is the same after the call, or there was none before, nothing is closed down."""
    engine = SimpleNamespace(pool=lib.pool if before == "the same" else None)

    def dispose(_):
        engine.pool = lib.pool

    _hooks.replace("m:E.dispose", pool=lambda engine: engine.pool).compile(dispose, lib.registry)(engine)

    assert (lib.watch.closed_down, lib.registry.resting, lib.registry.sighted) == (False, {}, {})


@pytest.mark.usefixtures("quiet")
def test_a_replacement_of_what_we_could_not_see(lib):
    """If only the new pool can be asked for, nothing rests, and the new one will be met when it is used."""
    engine, new = SimpleNamespace(), Pool()

    def dispose(_):
        engine.pool = new

    _hooks.replace("m:E.dispose", pool=lambda engine: engine.pool).compile(dispose, lib.registry)(engine)

    assert (lib.registry.resting, lib.registry.sighted) == ({}, {})


def test_a_replacement_that_fails_is_looked_at_too(lib):
    """If the call replaces the pool and then fails, the old one rests, and the error is the library's."""
    engine = SimpleNamespace(pool=lib.pool)

    def dispose(_):
        engine.pool = Pool()
        raise LookupError("theirs")

    twin = _hooks.replace("m:E.dispose", pool=lambda engine: engine.pool).compile(dispose, lib.registry)
    with pytest.raises(LookupError, match="theirs"):
        twin(engine)

    assert lib.watch.closed_down


def test_afterwards_there_is_something_to_learn(lib):
    """What is to be learnt gets the registry and the call's arguments, after it; the call has its result."""
    seen = []
    twin = _hooks.after("m:C.init", lambda *args, **kwargs: seen.append((args, kwargs))).compile(
        lambda *args, **kwargs: (list(seen), args, kwargs), lib.registry
    )

    assert twin(lib.pool, 1, size=2) == ([], (lib.pool, 1), {"size": 2})
    assert seen == [((lib.registry, lib.pool, 1), {"size": 2})]


@pytest.mark.usefixtures("quiet")
def test_what_cannot_be_learnt_afterwards_changes_nothing(lib, caplog):
    """If it fails to learn, the call has its result."""
    assert _hooks.after("m:C.init", broken).compile(lambda _: "done", lib.registry)(lib.pool) == "done"
    assert "TypeError" in caplog.text


# -- on and off ------------------------------------------------------------------------


class Kind:
    """A class of a library."""

    @classmethod
    def make(cls, *args):
        """Make one."""
        return cls, args

    class Inner:
        """A class in a class."""

        def ask(self):
            return "inner"


class Special(Kind):
    """One more."""


def _wrapping(where):
    return _hooks.Hook("ask", where, lambda original, _: lambda *args: ("ours", original(*args)))


def test_a_method_of_a_class_stays_one(registry):
    """A class method is called with the class it is called on, ours as well; off again it is the very same object."""
    original = vars(Kind)["make"]
    undo = _wrapping(f"{__name__}:Kind.make").install(registry)
    ours = Special.make(1)
    name = Kind.make.__name__
    undo()

    assert (ours, name) == (("ours", (Special, (1,))), "make")
    assert vars(Kind)["make"] is original


def test_a_class_in_a_class_is_found(registry):
    """A row may name a method at any depth."""
    undo = _wrapping(f"{__name__}:Kind.Inner.ask").install(registry)
    ours = Kind.Inner().ask()
    undo()

    assert (ours, Kind.Inner().ask()) == (("ours", "inner"), "inner")


def test_what_takes_its_place_looks_like_it(registry):
    """The twin has the name and the words of the original."""
    undo = _row(f"{__name__}:Thing.ask").install(registry)
    twin = Thing.ask
    undo()

    assert (twin.__name__, twin.__doc__) == ("ask", "Answer.")
    assert twin.__wrapped__ is Thing.ask


def test_what_others_have_wrapped_stays_theirs(registry, monkeypatch):
    """If somebody has wrapped our twin since, taking it off leaves theirs."""
    monkeypatch.setattr(Thing, "ask", Thing.ask)
    undo = _row(f"{__name__}:Thing.ask").install(registry)
    twin = Thing.ask
    theirs = Thing.ask = lambda self: f"theirs {twin(self)}"
    undo()

    assert Thing.ask is theirs
    assert Thing().ask() == "theirs our answer"


def test_what_others_have_removed_stays_removed(registry, monkeypatch):
    """If the method is gone since, taking ours off brings nothing back."""
    monkeypatch.setattr(Thing, "ask", Thing.ask)
    undo = _row(f"{__name__}:Thing.ask").install(registry)
    del Thing.ask
    undo()

    assert not hasattr(Thing, "ask")


@pytest.mark.parametrize("place", ["Thing.other", "Missing.ask", "Thing.ask.deeper", "Special.make"])
def test_a_method_that_is_not_there(place):
    """A row whose class has no such method of its own says where it looked."""
    with pytest.raises(LookupError, match=f"^{__name__}:{place}$".replace(".", r"\.")):
        _hooks.resolve(f"{__name__}:{place}")


def test_a_module_that_is_not_there_is_passed_over(registry):
    """Of several rows one may be in a module that this version does not have."""
    row = _hooks.either(_row("no_such_module:C.ask"), _row(f"{__name__}:Thing.ask"))
    undo = row.install(registry)
    ours = Thing().ask()
    undo()

    assert ours == "our answer"


def test_either_has_the_verb_of_its_rows():
    """For the log it is one row: one verb, and all its places."""
    row = _hooks.either(_row("m:C.one"), _row("m:C.two"))

    assert (row.verb, row.where, row.optional) == ("ask", "m:C.one or m:C.two", False)
    assert (_hooks.optional(row.rows[0]).verb, _hooks.optional(row.rows[0]).optional) == ("ask", True)


def test_the_row_that_fits_gets_the_registry(registry):
    """Whichever row is put on works for the registry it is put on for."""
    row = _hooks.Hook("ask", f"{__name__}:Thing.ask", lambda _, given: lambda self: given)
    undo = _hooks.either(row).install(registry)
    given = Thing().ask()
    undo()

    assert given is registry


@pytest.mark.parametrize(
    ("verb", "row"),
    [
        ("acquire", lambda: _hooks.acquire("m:C.f", refusal=refusal)),
        ("release", lambda: _hooks.release("m:C.f", pool=broken)),
        ("release", lambda: _hooks.take_back("m:C.f", out=broken)),
        ("queue", lambda: _hooks.queue("m:C.f", items=broken)),
        ("queue", lambda: _hooks.queue_if_empty("m:C.f")),
        ("create", lambda: _hooks.create("m:C.f", pool=broken, opened=broken)),
        ("create", lambda: _hooks.connect("m:C.f", is_open=broken)),
        ("close", lambda: _hooks.close("m:C.f", reason=broken, connection=broken)),
        ("close", lambda: _hooks.disconnect("m:C.f", is_open=broken, reason=broken)),
        ("make", lambda: _hooks.make("m:C.f", parts=broken)),
        ("replace", lambda: _hooks.replace("m:C.f", pool=broken)),
        ("after", lambda: _hooks.after("m:C.f", broken)),
        ("before", lambda: _hooks.before("m:C.f", broken)),
    ],
)
def test_a_row_says_what_it_means_and_where(verb, row):
    """What is logged of a row that does not fit has its verb and its place."""
    assert (row().verb, row().where) == (verb, "m:C.f")
