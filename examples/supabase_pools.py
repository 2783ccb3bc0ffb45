"""
How many pools a Supabase and a Pinecone client really have, and with which limits.

Install::

    pip install 'otel-pools[httpx]' opentelemetry-sdk supabase pinecone

Run::

    python examples/supabase_pools.py

A small server on this machine stands in for both services, so no account is needed; the clients are the real ones. Each
prints what its pools say about themselves: one Supabase client is one pool per service it has used, each with httpx's
default limits, unless it is given an httpx client of yours, whose limits are then those of all four. That is what a
setting like ``SUPABASE_POOL_SIZE`` has to do; alone it does nothing.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import httpx
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from pinecone import Pinecone
from supabase import Client, create_client
from supabase.lib.client_options import SyncClientOptions

import otel_pools

KEY = "header.payload.signature"  # looks like a key; nobody checks it
SHOWN = (
    "otel_pools.pools",
    "otel_pools.connection.max",
    "otel_pools.connection.idle.max",
    "otel_pools.connection.created",
)


class Service(BaseHTTPRequestHandler):
    """Answers everything with an empty result, and keeps the connection."""

    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        body = json.dumps([] if "rest" in self.path or "bucket" in self.path else {"matches": [], "namespace": ""})
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    do_GET = do_POST = answer  # noqa: N815  # the names that http.server looks for

    def log_message(self, format: str, *arguments: Any) -> None:
        """Be quiet."""


@contextmanager
def service() -> Iterator[str]:
    """The stand-in, until we are done; yields its URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    server.daemon_threads = True
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def use(client: Client) -> None:
    """A table, a bucket, a function and a login: one request to each of its services."""
    client.table("orders").select("*").execute()
    client.storage.list_buckets()
    client.functions.invoke("hello")
    with suppress(Exception):  # the stand-in knows no user
        client.auth.sign_in_with_password({"email": "somebody@example.org", "password": "secret"})


def show(title: str, reader: InMemoryMetricReader) -> None:
    data = reader.get_metrics_data()
    metrics = [m for r in (data.resource_metrics if data else ()) for s in r.scope_metrics for m in s.metrics]
    told = {metric.name: metric for metric in metrics if metric.name in SHOWN}
    numbers = [
        f"{name.removeprefix('otel_pools.')} {point.value}" for name in SHOWN for point in told[name].data.data_points
    ]
    print(f"{title:34} {'   '.join(numbers)}")


@contextmanager
def watched(title: str) -> Iterator[None]:
    """Watch what happens, and show what the pools said at the end of it."""
    gc.collect()  # the clients of before, whose pools would be found and counted
    reader = InMemoryMetricReader()
    otel_pools.instrument("httpx", meter_provider=MeterProvider([reader]))
    yield
    show(title, reader)
    otel_pools.uninstrument()


def supabase(url: str) -> None:
    """As its documentation has it."""
    use(create_client(url, KEY))


def supabase_with_our_client(url: str) -> None:
    """With one pool of 20 for everything."""
    with httpx.Client(limits=httpx.Limits(max_connections=20), http2=True) as ours:
        use(create_client(url, KEY, options=SyncClientOptions(httpx_client=ours)))


def pinecone(url: str) -> None:
    """One query of an index."""
    with suppress(Exception):  # an empty answer is not all it wants to see
        Pinecone(api_key=KEY).Index(host=url).query(vector=[0.1, 0.2], top_k=1)


def main() -> None:
    with service() as url:
        for client in (supabase, supabase_with_our_client, pinecone):
            with watched(client.__name__):
                client(url)


if __name__ == "__main__":
    main()
