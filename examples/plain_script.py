"""
A script that ends: a batch of jobs on eight threads, which share a pool of four connections.

Install::

    pip install 'otel-pools[sqlalchemy,otlp]' 'psycopg[binary]'

Run, with PostgreSQL and a Collector on this machine::

    export OTEL_SERVICE_NAME=plain-script
    export OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf
    export OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4318
    opentelemetry-instrument python examples/plain_script.py

The SDK exports once more when Python ends, so all 40 checkouts of the pool ``jobs`` arrive however short the script is;
a process that is killed, or left by `os._exit`, says nothing. Before that it prints what it knows of its own pool; this
needs no Collector and no SDK.
"""

import os
from concurrent.futures import ThreadPoolExecutor

from sqlalchemy import create_engine, text

import otel_pools

otel_pools.instrument()  # `opentelemetry-instrument` has done so; started by `python` alone, the script prints the same


def main() -> None:
    engine = create_engine(
        os.environ.get("DATABASE_URL", "postgresql+psycopg://postgres@127.0.0.1/postgres"),
        pool_size=4,
        max_overflow=0,
        pool_logging_name="jobs",
    )

    def job(number: int) -> None:
        with engine.connect() as connection:
            connection.execute(text("SELECT pg_sleep(0.02)"))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(job, range(40)))

    for pool in otel_pools.pools():
        longest = pool.wait.max_s or 0
        print(f"{pool.name}: {pool.checkouts} checkouts, at most {pool.peak} of {pool.max} connections in use at once")
        print(f"{pool.name}: the longest wait for a connection took {longest * 1000:.0f} ms")
    engine.dispose()


if __name__ == "__main__":
    main()
