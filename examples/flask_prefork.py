"""
A Flask application under gunicorn: every worker has its own pool and tells it; with `--preload` too.

Install::

    pip install 'otel-pools[sqlalchemy,redis,otlp]' 'psycopg[binary]' flask gunicorn

Run, with PostgreSQL, Redis and a Collector on this machine::

    export OTEL_SERVICE_NAME=flask-prefork
    export OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf
    export OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4318
    export OTEL_METRIC_EXPORT_INTERVAL=5000
    opentelemetry-instrument gunicorn --workers 2 --threads 4 --bind 127.0.0.1:8000 examples.flask_prefork:app

And ask which process and which connection answers::

    for i in $(seq 20); do curl -s http://127.0.0.1:8000/orders & done

Each worker has a ``service.instance.id`` of its own (opentelemetry-sdk 1.45 and later) and tells the pools ``orders``
and ``cache``: five connections at most *in each*, so the database must bear ``--workers`` times as many.

With ``--preload`` gunicorn imports this module once, before it forks. What is open by then belongs to the parent, and
two processes that talk on one connection read each other's answers. So in the child, first of all,
``engine.dispose(close=False)``: an empty pool instead, while the parent's connections stay open. Redis's clients do
that by themselves; clients of httpx and of Qdrant do not: make them on first use. The SDK has to begin in the child
too, which `gunicorn_preload.py` does, and ``opentelemetry-instrument`` would not::

    gunicorn --config examples/gunicorn_preload.py --bind 127.0.0.1:8000 examples.flask_prefork:app
"""

import os
from typing import Any

from flask import Flask
from redis import Redis
from sqlalchemy import create_engine, text

engine = create_engine(
    os.environ.get("DATABASE_URL", "postgresql+psycopg://postgres@127.0.0.1/postgres"),
    pool_size=3,
    max_overflow=2,
    pool_logging_name="orders",
)
cache = Redis.from_url(os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0"), client_name="cache")

# Under gunicorn, uWSGI, Celery and multiprocessing alike; without preload it has nothing to do.
os.register_at_fork(after_in_child=lambda: engine.dispose(close=False))

with engine.connect() as connection:  # as applications do when they start; its connection stays in the pool
    version = connection.scalar(text("SHOW server_version"))
cache.ping()

app = Flask(__name__)


@app.get("/orders")
def orders() -> dict[str, Any]:
    """Who answers: this process, on this connection of its own."""
    with engine.connect() as connection:
        backend = connection.scalar(text("SELECT pg_backend_pid()"))
    return {"process": os.getpid(), "connection": backend, "seen": cache.incr("seen"), "version": version}
