"""Whatever we cannot read, and whatever of ours fails: the application meets what it would meet without us."""

from __future__ import annotations

import gc
import inspect
import itertools
import logging
import sys
import types
import weakref
from collections import Counter
from contextlib import contextmanager
from importlib import import_module

import apps
import httpcore
import pytest
import redis
import redis.asyncio
import sqlalchemy.pool.base
import sqlalchemy.util.queue
from apps import APPS
from packaging.version import InvalidVersion
from sqlalchemy.pool import QueuePool

import otel_pools
from otel_pools import _guard, _hooks, _watch
from otel_pools.targets import LIBRARIES
from otel_pools.testing import Telemetry, _hooked

apps_of = {app.__name__: app for app in APPS}


@pytest.fixture(autouse=True)
def quiet(loud, monkeypatch):
    """As in production."""
    monkeypatch.setattr(_guard, "loud", False)


@pytest.fixture(scope="module")
def bare():
    """What each application meets without us."""
    otel_pools.uninstrument()
    return {app: app().go() for app in APPS}


class Lines(logging.Handler):
    """What is logged by us, by what it is about."""

    def __init__(self):
        super().__init__()
        self.kinds = Counter()

    def emit(self, record):
        if record.args and record.msg.startswith("otel_pools lost"):
            self.kinds[record.args[0]] += 1


@contextmanager
def lines():
    """Listen to our logger alone: not to what pytest makes of it, which takes longer than all the rest."""
    handler, logger = Lines(), _guard.logger
    logger.addHandler(handler)
    propagates, logger.propagate = logger.propagate, False
    try:
        yield handler.kinds
    finally:
        logger.propagate = propagates
        logger.removeHandler(handler)


class Run:
    """One application, watched and looked at twice, and what came of it."""

    def __init__(self, app, fault, during=None, *, ask=True):
        _guard.forget()
        before = _hooked(app.target)
        gc.freeze()  # pools of earlier runs are not looked for
        self.unraisable = []
        telemetry = Telemetry()
        outside, sys.unraisablehook = sys.unraisablehook, self.unraisable.append
        with lines() as self.kinds:
            try:
                with fault:
                    providers = {
                        "meter_provider": telemetry.meter_provider,
                        "tracer_provider": telemetry.tracer_provider,
                    }
                    self.asked = [_asked(lambda: otel_pools.instrument(app.target, **providers))]
                    with during or nothing():
                        self.met = _go(app)
                    self.metrics = set(telemetry.read().metrics)
                    if ask:
                        self.asked += [_asked(ask) for ask in (otel_pools.pools, otel_pools.health, otel_pools.holders)]
                    self.metrics |= set(telemetry.read().metrics)
            finally:
                otel_pools.uninstrument()
                sys.unraisablehook = outside
        self.left = [one for one, other in zip(before, _hooked(app.target), strict=True) if one is not other]

    def complaints(self, bare):
        """What an application would complain of."""
        if self.met != bare:
            both = zip(self.met, bare, strict=False)
            yield (
                self.met if isinstance(self.met, str) else next(f"{now}, not {was}" for now, was in both if now != was)
            )
        yield from (f"left behind: {one}" for one in self.left)
        yield from (f"said {number} times: {kind}" for kind, number in self.kinds.items() if number > 1)
        yield from (f"unraisable: {one.exc_value!r} in {one.object}" for one in self.unraisable)
        yield from (f"raised by a question: {error!r}" for error in self.asked if error is not None)


def _go(app):
    try:
        return app().go()
    except Exception as error:
        return f"{type(error).__qualname__}: {error}"


def _asked(ask):
    try:
        ask()
    except Exception as error:
        return error


@contextmanager
def nothing():
    yield


# -- attributes of other libraries -----------------------------------------------------------

POOLS = {
    "sqlalchemy": [
        sqlalchemy.pool.base.Pool,
        sqlalchemy.pool.base._ConnectionRecord,
        sqlalchemy.pool.base._ConnectionFairy,
        sqlalchemy.engine.Engine,
        sqlalchemy.engine.URL,
        sqlalchemy.engine.default.DefaultDialect,
        sqlalchemy.util.queue.Queue,
        sqlalchemy.util.queue.AsyncAdaptedQueue,
        sqlalchemy.exc.TimeoutError,
    ],
    "redis": [
        redis.ConnectionPool,
        redis.asyncio.ConnectionPool,
        redis.connection.AbstractConnection,
        redis.asyncio.connection.AbstractConnection,
    ],
    "httpx": [
        httpcore.ConnectionPool,
        httpcore.AsyncConnectionPool,
        httpcore.Request,
        httpcore.URL,
        httpcore.Origin,
        httpcore._sync.connection_pool.PoolRequest,
        httpcore._async.connection_pool.AsyncPoolRequest,
        httpcore._sync.connection_pool.PoolByteStream,
        httpcore._async.connection_pool.PoolByteStream,
        httpcore._sync.connection.HTTPConnection,
        httpcore._async.connection.AsyncHTTPConnection,
        httpcore._sync.http11.HTTP11Connection,
        httpcore._async.http11.AsyncHTTP11Connection,
    ],
}
# Python asks for these, whatever we do; and what is ours in an object of theirs stays there.
NOT_THEIRS = {"__class__", "__weakref__", "_otel_pools_visit"}


@contextmanager
def seen_through(classes, look):
    """Let *look* be told of every attribute that we read of an object of these classes, before it is read."""
    owned = [(kind, kind.__getattribute__, "__getattribute__" in vars(kind)) for kind in classes]
    for kind, original, _ in owned:
        kind.__getattribute__ = _getattribute(kind, original, look)
    try:
        yield
    finally:
        for kind, original, own in owned:
            if own:
                kind.__getattribute__ = original
            else:
                del kind.__getattribute__


def _getattribute(kind, original, look):
    def getattribute(thing, name):
        if name not in NOT_THEIRS and sys._getframe(1).f_globals.get("__name__", "").startswith("otel_pools"):
            look(kind, name)
        return original(thing, name)

    return getattribute


def read_by_us(app):
    """Of each class the attributes that we read in this application."""
    found = set()
    Run(app, seen_through(POOLS[app.target], lambda kind, name: found.add((kind, name))))
    return sorted(found, key=lambda one: (one[0].__module__, one[0].__qualname__, one[1]))


def without(kind, name, error):
    """As if this class had no such attribute, for us; the library gets along without it."""

    def look(_, asked):
        if asked == name:
            raise error(f"{kind.__name__} has no {name}")

    return seen_through([kind], look)


@pytest.mark.parametrize("error", [AttributeError, RuntimeError])
@pytest.mark.parametrize("name", list(apps_of))
def test_an_attribute_may_go(name, error, bare):
    """Each attribute that we read may be gone, or raise: neither the application nor a question to us fails."""
    app = apps_of[name]
    complaints = {}
    attributes = read_by_us(app)
    assert len(attributes) >= 10
    for kind, attribute in attributes:
        run = Run(app, without(kind, attribute, error))
        if found := list(run.complaints(bare[app])):
            complaints[f"{kind.__qualname__}.{attribute}"] = found

    assert complaints == {}


# -- functions of ours -------------------------------------------------------------------------


def ours(code):
    """Whether this is a function that an application runs."""
    name = code.co_filename
    return name.startswith(HOME) and not name.endswith(("testing.py", "_guard.py")) and not code.co_name.startswith("<")


HOME = otel_pools.__file__.removesuffix("__init__.py")


@contextmanager
def noting(found):
    """Note which functions of ours run, and whether one is called by who is not us."""

    def look(frame, event, _):
        if event == "call" and ours(frame.f_code):
            outside = not frame.f_back.f_code.co_filename.startswith(HOME)
            found[frame.f_code] = found.get(frame.f_code, False) or outside

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(before)


def run_by_us(app):
    """The functions of ours that one of ours calls on this application's way, and those called for instrument."""
    on_the_way, otherwise = {}, {}
    Run(app, noting(otherwise), during=noting(on_the_way))
    inner = [code for code, outside in on_the_way.items() if not outside and place(code) not in WALLS]
    others = [code for code, outside in otherwise.items() if not outside and code not in on_the_way]
    return sorted(inner, key=place), sorted(others, key=place)


def place(code):
    """How we speak of a function here: its file and its name."""
    function, way = function_of(code)
    return ".".join(
        (code.co_filename.removeprefix(HOME)[:-3], function.__qualname__, *(one.co_name for one in way[1:]))
    )


FOUND = {}


def function_of(code):
    """The function at the top that this code is in, and the codes on the way to it; of modules imported since, too."""
    if code not in FOUND:
        FOUND.update(functions())
    return FOUND[code]


def functions():
    """Of the code of each function of ours, nested ones too."""
    found = {}
    for module in [module for name, module in sys.modules.items() if name.startswith("otel_pools")]:
        for thing in list(vars(module).values()):
            for function in _functions(thing):
                _nested(function, (function.__code__,), found)
    return found


def _functions(thing):
    parts = vars(thing).values() if isinstance(thing, type) else (thing,)
    for part in parts:
        part = part.fget if isinstance(part, property) else getattr(part, "__func__", part)  # noqa: PLW2901
        part = inspect.unwrap(part) if callable(part) else part  # noqa: PLW2901
        if isinstance(part, types.FunctionType) and part.__code__.co_filename.startswith(HOME):
            yield part


def _nested(function, way, found):
    found.setdefault(way[-1], (function, way))
    for code in way[-1].co_consts:
        if isinstance(code, types.CodeType):
            _nested(function, (*way, code), found)


def failing(code, error):
    """Code that fits where this one is, and raises."""
    free = code.co_freevars
    kind = "async def" if code.co_flags & inspect.CO_COROUTINE else "def"
    lines = [
        "def outer():",
        f"    {' = '.join((*free, 'unused'))} = None",
        f"    {kind} inner(*args, **kwargs):",
        f"        {', '.join((*free, 'None'))}",
        f"        raise {error.__name__}('injected')",
        *(["        yield"] if code.co_flags & inspect.CO_GENERATOR else []),
        "    return inner",
    ]
    made = {}
    exec("\n".join(lines), made)
    return made["outer"]().__code__.replace(co_name=code.co_name)


@contextmanager
def broken(code, error):
    """Let this function of ours raise, whoever calls it."""
    function, way = function_of(code)
    fails = failing(code, error)
    for outer, inner in zip(way[-2::-1], way[:0:-1], strict=True):
        fails = outer.replace(co_consts=tuple(fails if one is inner else one for one in outer.co_consts))
    original, function.__code__ = function.__code__, fails
    try:
        yield
    finally:
        function.__code__ = original
        _watch._passage.set(None)  # if what closes a story has failed, it is open for ever


# The walls, and what is one with a method of a library: nothing of ours stands around them, or within but a wall.
WALLS = {
    "_registry.Registry.meet",
    "_watch.Watch.failed",
    "_hooks._until_open.end",
    "_hooks._creating.ended",
    "_hooks._if_closed.way",
    "targets/redis.unless_open.compile.is_needless",
    "_hooks._begun",
    "_hooks._open.open",
    "_hooks._async_open.open",
    "_visits._visit_at",
    "_visits._begin",
    "_visits._queued",
    "_visits._served",
    "_visits._answered",
    "_visits._line_up.stand_in_line",
    "_visits._async_line_up.stand_in_line",
}


def test_the_walls_stand():
    """Each function that is named as a wall is there."""
    import_module("otel_pools._visits")  # which else comes with the first target that needs it
    assert {place(code) for code in functions()} >= WALLS


def blamed(app, codes, bare):
    """Of these functions, those whose failure the application notices."""
    found = {}
    for code, error in zip(codes, itertools.cycle([RuntimeError, MemoryError]), strict=False):
        run = Run(app, broken(code, error), ask=False)
        if complaints := list(run.complaints(bare[app])):
            found[place(code)] = complaints
    return found


@pytest.fixture
def _always_full(monkeypatch):
    """Every sample is one too many for its list."""
    monkeypatch.setattr(_watch, "LIMIT", 0)
    monkeypatch.setattr(_watch, "A_WHILE", 0.0)


@pytest.mark.usefixtures("_always_full")
@pytest.mark.parametrize("name", list(apps_of))
def test_a_function_of_ours_may_fail(name, bare):
    """Each function of ours on the way of a checkout may raise, for want of memory too: the application goes on."""
    app = apps_of[name]
    way, _ = run_by_us(app)

    assert len(way) > 50
    assert blamed(app, way, bare) == {}


@pytest.mark.parametrize("name", ["SQLAlchemy"])
def test_a_function_of_ours_may_fail_at_the_start(name, bare):
    """Each function of ours that puts hooks on or collects may raise: at worst there are no numbers."""
    app = apps_of[name]
    _, others = run_by_us(app)
    inside = [code for code in others if not place(code).startswith("_doors.")]

    assert len(inside) > 50
    assert blamed(app, inside, bare) == {}


def test_a_version_that_is_none(monkeypatch):
    """A library whose version nobody can compare, as that of a fork, is watched or not: `instrument` never raises."""

    def contains(*_, **__):  # as up to packaging 24; later ones say no
        raise InvalidVersion("2024-main")

    monkeypatch.setattr("packaging.specifiers.SpecifierSet.contains", contains)

    otel_pools.instrument("redis")


# -- rows ------------------------------------------------------------------------------------


def rows(target):
    """Where the table attaches here."""
    table = import_module(LIBRARIES[target].target).TARGET.hooks
    return [
        row.where for name in table if name in sys.modules for row in table[name] if row.verb not in {"replace", "work"}
    ]


@contextmanager
def no_such(where):
    """As if this version had no such method."""
    original = _hooks.resolve

    def resolve(asked):
        if asked in where.split(" or "):
            raise LookupError(asked)
        return original(asked)

    _hooks.resolve = resolve
    try:
        yield
    finally:
        _hooks.resolve = original


@pytest.mark.parametrize("name", ["SQLAlchemy", "Redis", "AsyncRedis", "HTTP", "AsyncHTTP"])
def test_a_method_may_go(name, bare):
    """Each method of the table may be gone: the application goes on, and the pool is still read."""
    app = apps_of[name]
    complaints, dark = {}, []
    for where in rows(app.target):
        run = Run(app, no_such(where))
        if found := list(run.complaints(bare[app])):
            complaints[where] = found
        if not any("connection" in metric for metric in run.metrics):
            dark.append(where)

    assert complaints == {}
    assert dark == []


# -- one pool's fault is not another's ----------------------------------------------------------


def test_one_broken_pool_costs_its_own_numbers(telemetry):
    """A pool that cannot even be asked whether it is complete leaves the numbers of all others alone."""

    class Odd(QueuePool):
        @property
        def _dialect(self):
            raise RuntimeError("not yet")

        @_dialect.setter
        def _dialect(self, _): ...

    otel_pools.instrument("sqlalchemy", meter_provider=telemetry.meter_provider)
    registry = otel_pools.SQLAlchemyPoolInstrumentor._registry
    good, odd = apps.SQLAlchemy(), Odd(lambda: apps.Dbapi(apps.Server()))
    registry.sight(odd)
    held = good.take()
    with lines():
        now = telemetry.read()
    held.close()

    assert now.count("used") == 1


def test_a_mistake_keeps_nothing_alive(monkeypatch):
    """What an application lets go is gone, whatever went wrong with us meanwhile and whoever collects."""
    otel_pools.instrument("sqlalchemy")
    monkeypatch.setattr(otel_pools.SQLAlchemyPoolInstrumentor._registry.spans, "threshold", 0.0)
    app = apps.SQLAlchemy()
    with without(sqlalchemy.pool.base._ConnectionFairy, "_connection_record", AttributeError):
        held = app.take()
    gone = weakref.ref(held)
    del held

    assert gone() is None


def test_a_log_handler_that_raises(bare):
    """A handler of the application's that raises when we say something does not make a checkout fail."""

    class Raises(logging.Handler):
        def emit(self, record):
            raise RuntimeError("the handler's own")

    app = apps.SQLAlchemy
    handler = Raises()
    _guard.logger.addHandler(handler)
    try:
        otel_pools.instrument("sqlalchemy")
        met = _go(app)
    finally:
        _guard.logger.removeHandler(handler)

    assert met == bare[app]
