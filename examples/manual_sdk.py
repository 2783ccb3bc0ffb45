"""
The SDK set up in code, for who starts Python without `opentelemetry-instrument`.

Install::

    pip install 'otel-pools[sqlalchemy,otlp]' 'psycopg[binary]'

Run, with PostgreSQL and a Collector on this machine::

    export OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4318
    python examples/manual_sdk.py

The providers are given to `otel_pools.instrument`; without them it takes the global ones, even if they are set later.
The pool ``stock`` arrives in the Collector, and so does a trace: the span ``restock``, in it ``acquire stock`` for its
wait, which failed. That has a link to the span ``inventory``, which held the only connection, and an event that says
for how long, and from which line.
"""

import os
import threading

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from sqlalchemy import create_engine, text
from sqlalchemy.exc import TimeoutError as PoolTimeout

import otel_pools

resource = Resource.create({"service.name": "manual-sdk"})
meters = MeterProvider([PeriodicExportingMetricReader(OTLPMetricExporter(), export_interval_millis=5000)], resource)
tracers = TracerProvider(resource=resource)
tracers.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))

otel_pools.instrument(meter_provider=meters, tracer_provider=tracers, span_threshold=0.05)


def main() -> None:
    tracer = tracers.get_tracer("examples")
    engine = create_engine(
        os.environ.get("DATABASE_URL", "postgresql+psycopg://postgres@127.0.0.1/postgres"),
        pool_size=1,
        max_overflow=0,
        pool_timeout=0.1,
        pool_logging_name="stock",
    )
    held = threading.Event()

    def take_inventory() -> None:
        with tracer.start_as_current_span("inventory"), engine.connect() as connection:
            held.set()
            connection.execute(text("SELECT pg_sleep(0.5)"))

    inventory = threading.Thread(target=take_inventory)
    inventory.start()
    held.wait()
    with tracer.start_as_current_span("restock"):
        try:
            with engine.connect() as connection:
                connection.execute(text("SELECT 1"))
        except PoolTimeout:
            print("no connection in time")
    inventory.join()
    engine.dispose()


if __name__ == "__main__":
    main()
    # Not left to the end of Python, where it happens too, so that a Collector that is away is noticed here.
    meters.shutdown()
    tracers.shutdown()
