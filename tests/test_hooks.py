"""The verbs: whatever is wrong in a row of ours, the library's method does what it did."""

from __future__ import annotations

import asyncio
import inspect

import pytest

import otel_pools
from otel_pools import _guard, _hooks
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


def test_something_is_done_before(registry):
    """What is to be learnt is learnt of the object, before the call and not after it."""
    seen, thing = [], Pool()
    twin = _hooks.before("m:C.close", do=lambda *args: seen.append(args)).compile(lambda _: list(seen), registry)

    assert twin(thing) == [(registry, thing)]
