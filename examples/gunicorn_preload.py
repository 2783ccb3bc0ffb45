"""
A configuration of gunicorn with `--preload`: OpenTelemetry begins in each worker, after the fork.

Run::

    gunicorn --config examples/gunicorn_preload.py --bind 127.0.0.1:8000 examples.flask_prefork:app

and not by ``opentelemetry-instrument``: then the parent exports too, and a worker that is forked while it does inherits
locks of the SDK that nobody will ever open (opentelemetry-sdk 1.45 and before). That worker serves, tells nothing, and
takes half a minute to end. Pools that were made before OpenTelemetry begins are watched from then on.
"""

from typing import Any

from opentelemetry.instrumentation.auto_instrumentation import initialize

preload_app = True
workers = 2
threads = 4


def post_fork(server: Any, worker: Any) -> None:
    """Do what ``opentelemetry-instrument`` does at the start of a process, by the same variables."""
    initialize()
