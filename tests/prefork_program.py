"""
An application that is watched, and has used its pool, before gunicorn or Celery forks it.

`python prefork_program.py gunicorn|celery FOLDER keep|dispose parent|child`: what becomes of the parent's connections
in the child, and who sets the SDK up. Each process writes what it exports into a file of its own.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path

from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult, PeriodicExportingMetricReader
from sqlalchemy import create_engine, event, text
from sqlalchemy.pool import QueuePool

import otel_pools

HOST, FOLDER, CONNECTIONS, BEGINNER = sys.argv[1:5]
IN_PARENT = 3  # checkouts before the fork
NEVER = 3600_000  # milliseconds


class Exporter(MetricExporter):
    """Writes what each process has told last into a file of its own."""

    def export(self, metrics_data, timeout_millis=10_000, **_):
        told = Counter()
        scopes = [scope for resource in metrics_data.resource_metrics for scope in resource.scope_metrics]
        for metric in (metric for scope in scopes for metric in scope.metrics):
            for point in metric.data.data_points:
                names = [value for key, value in point.attributes.items() if key.endswith("pool.name")]
                if names in (["pool"], []):  # kombu and the results have pools too
                    told[metric.name] += getattr(point, "value", getattr(point, "count", 0))
        Path(FOLDER, f"{os.getpid()}.json").write_text(json.dumps(told))
        return MetricExportResult.SUCCESS

    def force_flush(self, timeout_millis=10_000):
        return True

    def shutdown(self, timeout_millis=30_000, **_): ...


def begin():
    """Set the SDK up."""
    metrics.set_meter_provider(MeterProvider([PeriodicExportingMetricReader(Exporter(), NEVER)]))


borrowed = metrics.get_meter("app").create_counter("app.borrowed")
engine = create_engine(f"sqlite:///{FOLDER}/db", poolclass=QueuePool, pool_size=3, pool_logging_name="pool")


@event.listens_for(engine, "connect")
def whose(_, record):
    """Note which process has opened a connection."""
    record.info["process"] = os.getpid()


def work():
    """Borrow; which process this is, who had opened the connection, and what is said of the pools here."""
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))
        opened_by = connection.info["process"]
    borrowed.add(1)
    [stats] = [stats for stats in otel_pools.pools() if stats.name == "pool"]
    return {"process": os.getpid(), "opened by": opened_by, "checkouts": stats.checkouts}


def born(*_, **__):
    """Do in the child what is to be done there."""
    if CONNECTIONS == "dispose":
        engine.dispose(close=False)
    if BEGINNER == "child":
        begin()


def flush(*_, **__):
    """Tell the last."""
    metrics.get_meter_provider().force_flush()


if BEGINNER == "parent":
    begin()
otel_pools.instrument("sqlalchemy")
for _ in range(IN_PARENT):
    work()
if BEGINNER == "parent":
    flush()


def gunicorn():
    """Serve as `gunicorn --preload --workers 2` does, at a port of its own."""
    from gunicorn.app.base import BaseApplication

    class Application(BaseApplication):
        def load_config(self):
            options = {
                "bind": "127.0.0.1:0",
                "workers": 2,
                "preload_app": True,
                "post_fork": lambda server, worker: born(),
            }
            for name, value in {**options, "control_socket_disable": True}.items():
                self.cfg.set(name, value)

        def load(self):
            return serve

    Application().run()


def serve(_, start_response):
    """Answer what came of one borrowing."""
    start_response("200 OK", [("Content-Type", "application/json"), ("Connection", "close")])
    return [json.dumps(work()).encode()]


def celery():
    """Work as `celery worker --pool prefork --concurrency 2` does, on a real broker."""
    from celery import Celery, signals

    app = Celery("prefork", broker=os.environ["REDIS_URL"], backend=os.environ["REDIS_URL"])
    app.task(work, name="work")
    signals.worker_process_init.connect(born)
    signals.worker_process_shutdown.connect(flush)
    options = ["--without-mingle", "--without-gossip", "--without-heartbeat", "--loglevel", "INFO"]
    app.worker_main(["worker", "--pool", "prefork", "--concurrency", "2", *options])


if __name__ == "__main__":
    {"gunicorn": gunicorn, "celery": celery}[HOST]()
