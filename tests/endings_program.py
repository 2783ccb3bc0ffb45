"""
Programs with a pool and an SDK that end in the ways they are told, with us and without.

Each is a fork of one that has done nothing but import: to import takes longer than all they do.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import logging
import os
import signal
import sys
import threading
from pathlib import Path

from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult, PeriodicExportingMetricReader
from sqlalchemy.pool import QueuePool

import otel_pools
import otel_pools._holders
import otel_pools._instruments
import otel_pools._statistics
import otel_pools.targets.sqlalchemy
from otel_pools import _outbox

NEVER = 3600_000  # milliseconds
MANY = 4  # at a time


class Dbapi:
    def rollback(self): ...
    def close(self): ...


class Pool(QueuePool):
    """One that lets something happen while it is read, which only we do."""

    within = None
    most = 50

    @property
    def _max_overflow(self):
        name = sys._getframe(1).f_globals["__name__"]
        if self.within is not None and name.startswith("otel_pools"):
            happens, self.within = self.within, None
            happens()
        return self.most

    @_max_overflow.setter
    def _max_overflow(self, _): ...


class Exporter(MetricExporter):
    """Keeps the last of every sum, and lets something happen within an export."""

    within = None

    def __init__(self):
        super().__init__()
        self.last = {}

    def export(self, metrics_data, timeout_millis=10_000, **_):
        if self.within is not None:
            self.within()
        for resource in metrics_data.resource_metrics:
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    points = metric.data.data_points
                    self.last[metric.name] = sum(
                        getattr(point, "value", getattr(point, "count", 0)) for point in points
                    )
        return MetricExportResult.SUCCESS

    def force_flush(self, timeout_millis=10_000):
        return True

    def shutdown(self, timeout_millis=30_000, **_):
        # Not print(): what buffers may be gone by now.
        os.write(1, f"{self.last.get('otel_pools.checkouts', 0)} checkouts\n".encode())


def begin(folder, *endings):
    """In each child, what it is to do; the parent waits, and writes how they ended."""
    children = {}
    for ending in endings:
        child = os.fork()
        if child == 0:
            for stream in (1, 2):
                to = os.open(f"{folder}/{ending}.{stream}", os.O_WRONLY | os.O_CREAT)
                os.dup2(to, stream)
            return ending.split("-")
        children[child] = ending
        if len(children) >= MANY:
            wait(folder, children)
    while children:
        wait(folder, children)
    sys.exit()


def wait(folder, children):
    """For the next of them to end."""
    child, status = os.wait()
    Path(folder, f"{children.pop(child)}.0").write_text(str(os.waitstatus_to_exitcode(status)))


how, who = begin(*sys.argv[1:])
WATCHED = who == "watched"
exporter = Exporter()
reader = PeriodicExportingMetricReader(exporter, NEVER)
pool = Pool(Dbapi, pool_size=5)


def watch():
    if WATCHED:
        otel_pools.instrument("sqlalchemy")


if how == "late provider":
    watch()
provider = MeterProvider([reader])
metrics.set_meter_provider(provider)
if how != "late provider":
    watch()


def use(times):
    for _ in range(times):
        pool.connect().close()


def happens_in_a_collection(what):
    """In our part of it, or in the application's own callback."""
    if WATCHED:
        pool.within = what
    else:
        todo = [what]
        metrics.get_meter("app").create_observable_gauge("app", [lambda _: [todo.pop()() for _ in todo[:]] and ()])
    provider.force_flush()


def drop(number):
    """Borrow and forget: only the garbage collector can give them back."""
    for _ in range(number):
        held = pool.connect()
        around = [held]
        around.append(around)


def killed(number):
    os.kill(os.getpid(), number)


faulthandler.dump_traceback_later(40, exit=True)
use(10)

if how == "sigterm":
    happens_in_a_collection(lambda: killed(signal.SIGTERM))
elif how == "sigterm handled":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
    happens_in_a_collection(lambda: killed(signal.SIGTERM))
elif how == "sigint":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in what a shell runs in the background
    happens_in_a_collection(lambda: killed(signal.SIGINT))
elif how == "os._exit":
    happens_in_a_collection(lambda: os._exit(5))
elif how.startswith("daemons"):
    if how == "daemons without an end":  # the collection goes on while the interpreter ends, and nobody waits for it
        atexit.unregister(provider.shutdown)
    else:
        gc.set_threshold(50)
    threading.Thread(target=lambda: [provider.force_flush() for _ in iter(int, 1)], daemon=True).start()
    for _ in range(2):
        threading.Thread(target=lambda: [use(100) for _ in iter(int, 1)], daemon=True).start()
    threading.Event().wait(0.3)
elif how == "finalisers":
    # Inside the SDK's lock, inside an exporter, inside a logging handler's lock and inside an import.
    drop(2)
    happens_in_a_collection(gc.collect)
    drop(2)
    exporter.within = gc.collect
    provider.force_flush()
    exporter.within = None
    handler = logging.StreamHandler(sys.stdout)
    drop(2)
    with handler.lock:
        gc.collect()

    class Collects:
        def find_spec(self, name, *_):
            if name.startswith(("httpcore", "otel_pools")):
                drop(1)
                gc.collect(0)

    if WATCHED:
        otel_pools.instrument("httpx")  # as soon as it is imported
    sys.meta_path.insert(0, Collects())
    import httpcore  # noqa: F401  # as an application would, in the middle of its work

    sys.meta_path.pop(0)
    sys.stdout.write(f"{pool.checkedout()} out\n")
elif how in {"end", "late provider"}:
    use(5)
    atexit.register(use, 3)  # runs before the SDK's own, which was registered earlier
elif how == "after the provider":
    atexit.unregister(provider.shutdown)
    atexit.register(use, 3)
    atexit.register(provider.shutdown)  # what comes after it is lost, and harms nobody
elif how == "uninstrumented at the end":

    def leave():
        otel_pools.uninstrument()
        use(2)

    atexit.unregister(provider.shutdown)
    atexit.register(leave)
    atexit.register(provider.shutdown)
elif how == "asked by a signal":

    def asked(*_):
        os.write(1, f"{len(otel_pools.pools())} asked\n".encode())

    signal.signal(signal.SIGUSR1, asked)
    counted = _outbox._time

    def counts(*args):
        counted(*args)
        _outbox._time = counted
        killed(signal.SIGUSR1)

    _outbox._time = counts
    faulthandler.cancel_dump_traceback_later()
    faulthandler.dump_traceback_later(20, exit=True)
    otel_pools.pools()
elif how == "forked in a collection":
    entered, go_on = threading.Event(), threading.Event()

    def stay():
        entered.set()
        go_on.wait(5)

    collecting = threading.Thread(target=happens_in_a_collection, args=(stay,))
    collecting.start()
    entered.wait(5)
    child = os.fork()
    if child == 0:
        use(7)
        if WATCHED:
            [stats] = otel_pools.pools()
            os.write(1, f"{stats.checkouts} in the child\n".encode())
        os._exit(0)
    _, status = os.waitpid(child, 0)
    go_on.set()
    collecting.join()
    sys.exit(os.waitstatus_to_exitcode(status))
