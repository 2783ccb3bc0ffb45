"""
A Flask application that answers for its pools, under the path that its monitoring knows from before.

Install::

    pip install 'otel-pools[sqlalchemy]' flask

Run::

    export POOLS_TOKEN=choose-one
    flask --app examples/flask_pools.py run

And look::

    curl -s http://127.0.0.1:5000/items
    curl -s -H "Authorization: Bearer $POOLS_TOKEN" http://127.0.0.1:5000/pools/stats
    curl -s -H "Authorization: Bearer $POOLS_TOKEN" http://127.0.0.1:5000/api/v1/health/pools

The last is written by hand, in the words of an older dashboard, from the same statistics.
"""

import hmac
import os
from typing import Any

from flask import Flask, abort, request
from sqlalchemy import create_engine, text
from werkzeug.middleware.dispatcher import DispatcherMiddleware

import otel_pools
from otel_pools.web import wsgi_app

TOKEN = os.environ["POOLS_TOKEN"]

otel_pools.instrument()
engine = create_engine(os.environ.get("DATABASE_URL", "sqlite:///example.db"), pool_size=5, max_overflow=10)

app = Flask(__name__)
app.wsgi_app = DispatcherMiddleware(app.wsgi_app, {"/pools": wsgi_app(token=TOKEN)})  # type: ignore[method-assign]  # Flask's own way


@app.get("/items")
def items() -> list[dict[str, Any]]:
    """Borrow a connection for as long as one query takes."""
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(text("SELECT 1 AS id, 'lane' AS name")).mappings()]


@app.get("/api/v1/health/pools")
def older() -> dict[str, Any]:
    """The names that the dashboard had, from the statistics that the metrics agree with."""
    if not hmac.compare_digest(request.headers.get("Authorization", "").encode(), f"Bearer {TOKEN}".encode()):
        abort(401)
    report = otel_pools.health()
    status = {pool.pool: pool.status for pool in report.pools}
    return {
        "timestamp": report.timestamp,
        **{
            pool.name: {
                "status": status.get(pool.name, "error"),
                "pool_size": pool.idle_max,
                "checked_out": pool.used,
                "checked_in": pool.idle,
                "overflow": pool.overflow,
                "total_capacity": pool.max,
                "utilization_percent": None if pool.utilization is None else round(100 * pool.utilization, 1),
            }
            for pool in otel_pools.pools()
        },
    }
