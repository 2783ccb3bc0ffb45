"""
An application with the pools of all targets under load, which does as it is told, line by line, and tells its counts.

It is watched, or, to compare with, it is not: `soak_program.py watched` or
`soak_program.py bare`. Each line it reads is an order, each line it writes the
answer, in JSON.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import threading
import time
import tracemalloc
import warnings
from collections import Counter

import soak_memory
from opentelemetry import metrics, trace
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from soak_traffic import KINDS, Gate, Tasks

REST_SECONDS = 60
TRACED = 1024  # bytes of one file or line, from which on they are told
# Tables of ours that must be empty when nobody asks and nobody holds.
EMPTY = ("waiting", "leases", "holding", "creating", "made", "busy", "working", "inherited", "orphans")


class Log(logging.Handler):
    """Counts what is logged, by logger, without figures and names."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.said = Counter()
        self.examples = {}

    def emit(self, record):
        root = record.name.partition(".")[0]
        kind = f"{root}: {record.msg if isinstance(record.msg, str) else type(record.msg).__name__}"
        self.said[kind[:60]] += 1
        self.examples.setdefault(kind[:60], record.getMessage()[:2000])


class Loop:
    """An event loop in a thread of its own."""

    def __init__(self):
        self.loop = asyncio.new_event_loop()
        # What tasks leave behind unfetched is not news: they are cancelled all the time.
        self.loop.set_exception_handler(lambda *_: None)
        self.thread = threading.Thread(target=self.loop.run_forever, name="loop", daemon=True)
        self.thread.start()

    def start(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def do(self, coroutine):
        return self.start(coroutine).result()


class Application:
    """
    All traffic of this process.

    Attributes:
        cpu: Seconds of CPU that the load has taken, without what happens at rest.
        wall: Seconds that there was load.
    """

    def __init__(self, places, *named):
        self.loop = Loop()
        self.traffic = [KINDS[kind](name, place, *named) for name, (kind, place) in places.items()]
        self.gate = Gate(sum(one.workers for one in self.traffic))
        self.cpu = self.wall = 0.0
        for one in self.traffic:
            self._do(one, one.open)
        seeds = iter(range(self.gate.workers))
        self.workers = [self._start(one, next(seeds)) for one in self.traffic for _ in range(one.workers)]

    def _do(self, one, verb):
        return self.loop.do(verb()) if isinstance(one, Tasks) else verb()

    def _start(self, one, seed):
        if isinstance(one, Tasks):
            return self.loop.start(one.work(self.gate, seed))
        thread = threading.Thread(target=one.work, args=(self.gate, seed), name=f"{one.name}-{seed}", daemon=True)
        thread.start()
        return thread

    def go(self):
        for one in self.traffic:
            self._do(one, one.mend)
        self._began = time.process_time(), time.monotonic()
        self.gate.become("working")

    def rest(self):
        """Let everybody come to rest; whether they have."""
        self.gate.become("resting")
        resting = self.gate.all_rest(REST_SECONDS)
        self.cpu += time.process_time() - self._began[0]
        self.wall += time.monotonic() - self._began[1]
        return resting

    def refresh(self):
        """Use every pool until it is well; those that never are, and why."""
        return [f"{one.name}: {one.trouble}" for one in self.traffic if not self._do(one, one.refresh)]

    def end(self):
        self.gate.become("over")
        for one in self.traffic:
            self._do(one, one.close)

    def counts(self):
        return {one.name: {**one.counts.told(), "astray": one.astray()} for one in self.traffic}


def residue():
    """What our tables still hold though nobody asks or holds anything, and how large the others are."""
    from otel_pools import _registry

    left, sizes = Counter(), Counter()
    for registry in _registry.alive():
        # Whose each connection is, is known of those that live, and of no other.
        left[f"{registry.target.name}.owners"] += len(registry.owners)
        for watch in [*registry.watches.values(), *registry.resting.values()]:
            for table in EMPTY:
                left[f"{registry.target.name}.{table}"] += len(getattr(watch, table))
            left[f"{registry.target.name}.owners"] -= len(watch.members)
            for table in ("members", "opened"):
                sizes[f"{registry.target.name}.{table}"] += len(getattr(watch, table))
        for table in ("watches", "resting", "sighted", "ledgers", "owners"):
            sizes[f"{registry.target.name}.{table}"] += len(getattr(registry, table))
    return {name: count for name, count in left.items() if count}, dict(sizes)


def traced():
    """Bytes that were asked for and not given back: by file, of ours by line; only if somebody looks for a leak."""
    if not tracemalloc.is_tracing():
        return {}
    found = tracemalloc.take_snapshot()
    ours = found.filter_traces([tracemalloc.Filter(True, "*/otel_pools/*")])
    told = [*found.statistics("filename"), *ours.statistics("lineno")]
    return {str(one.traceback): one.size for one in told if one.size > TRACED}


class Program:
    """Obeys."""

    def __init__(self, role, endpoint, places):
        self.role = role
        self.log = Log()
        logging.getLogger().addHandler(self.log)
        logging.getLogger().setLevel(logging.WARNING)
        resource = Resource({"service.name": "soak", "service.instance.id": role})
        exporter = OTLPMetricExporter(f"{endpoint}/v1/metrics")
        self.meters = MeterProvider([PeriodicExportingMetricReader(exporter, 1000)], resource)
        self.tracers = TracerProvider(resource=resource)
        self.tracers.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{endpoint}/v1/traces")))
        metrics.set_meter_provider(self.meters)
        trace.set_tracer_provider(self.tracers)
        # Who is not watched exports something too.
        self.beats = metrics.get_meter("soak").create_counter("soak.beats")
        if role == "watched":
            import otel_pools

            otel_pools.instrument()
            self.application = Application(places, otel_pools.name_pool)
        else:
            self.application = Application(places)

    def go(self):
        self.beats.add(1)
        self.application.go()
        return {}

    def rest(self):
        return {"resting": self.application.rest(), "unwell": self.application.refresh()}

    def look(self):
        """Collect garbage, export, and tell everything."""
        used = soak_memory.memory()
        exported = self.meters.force_flush() and self.tracers.force_flush()
        left, sizes = residue() if self.role == "watched" else ({}, {})
        return {
            "counts": self.application.counts(),
            "memory": used,
            "cpu": self.application.cpu,
            "wall": self.application.wall,
            "exported": exported,
            "left": left,
            "sizes": sizes,
            "log": dict(self.log.said),
            "examples": self.log.examples,
            "traced": traced(),
        }

    def again(self):
        """What an idle connection has met is found out by using it."""
        return {"unwell": self.application.refresh()}

    def end(self):
        self.application.end()
        self.meters.shutdown()
        self.tracers.shutdown()
        return {}


def main():
    warnings.simplefilter("ignore")  # of connections that are dropped, on purpose
    told = json.loads(os.environ.pop("SOAK"))  # there is a password in it
    program = Program(sys.argv[1], told["endpoint"], told["places"])
    for line in sys.stdin:
        order = line.strip()
        sys.stdout.write(json.dumps(getattr(program, order)()) + "\n")
        sys.stdout.flush()
        if order == "end":
            break
    # Threads that wait for a hung server would keep us.
    os._exit(0)


main()
