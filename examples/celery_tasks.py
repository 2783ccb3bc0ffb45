"""
A Celery worker, whose child processes tell the pools of their tasks.

Install::

    pip install 'otel-pools[sqlalchemy,redis,otlp]' 'celery[redis]' 'psycopg[binary]'

Run, with PostgreSQL, Redis and a Collector on this machine::

    export OTEL_SERVICE_NAME=celery-tasks
    export OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf
    export OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4318
    export OTEL_METRIC_EXPORT_INTERVAL=5000
    celery --app examples.celery_tasks worker --pool prefork --concurrency 2 --loglevel INFO

And give it something to do; this prints which processes have done it::

    python examples/celery_tasks.py 20

Tasks run in the children, and so do their pools: ``orders`` comes from each child, with a ``service.instance.id`` of
its own (opentelemetry-sdk 1.45 and later), and so does the pool in which kombu keeps what stores the results, by the
name of Redis's server.

Three things are to be done in a child. At its birth, let go of connections that the parent may have opened, and begin
with OpenTelemetry: were the worker started by ``opentelemetry-instrument``, a child that is forked while the parent
exports would inherit locks that nobody opens (opentelemetry-sdk 1.45 and before). At its end, export: it ends without
running what Python runs at exit, and would take along what happened since the last export.
"""

import os
import sys
from typing import Any

from celery import Celery, signals
from opentelemetry import metrics, trace
from opentelemetry.instrumentation.auto_instrumentation import initialize
from sqlalchemy import create_engine, text

REDIS = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0")

app = Celery("examples.celery_tasks", broker=REDIS, backend=REDIS)
app.conf.worker_proc_alive_timeout = 30  # seconds for a child to come up; OpenTelemetry takes one of the usual four
engine = create_engine(
    os.environ.get("DATABASE_URL", "postgresql+psycopg://postgres@127.0.0.1/postgres"),
    pool_size=2,
    max_overflow=0,
    pool_logging_name="orders",
)


@signals.worker_process_init.connect
def born(**_: Any) -> None:
    """Begin with an empty pool, which leaves the parent's connections open, and with OpenTelemetry."""
    engine.dispose(close=False)
    initialize()  # as `opentelemetry-instrument` does, by the same variables


@signals.worker_process_shutdown.connect
def ending(**_: Any) -> None:
    """Say the last, while there is time."""
    for provider in (metrics.get_meter_provider(), trace.get_tracer_provider()):
        if hasattr(provider, "force_flush"):  # those of the SDK; without one there is nothing to say
            provider.force_flush(5000)


@app.task
def count(seconds: float) -> int:
    """Hold a connection for as long as a query takes, and tell which process it was."""
    with engine.connect() as connection:
        connection.execute(text("SELECT pg_sleep(:seconds)"), {"seconds": seconds})
    return os.getpid()


if __name__ == "__main__":
    results = [count.delay(0.05) for _ in range(int(sys.argv[1]))]
    done = [result.get(timeout=30) for result in results]
    print(*(f"process {process}: {done.count(process)} tasks" for process in sorted(set(done))), sep="\n")
