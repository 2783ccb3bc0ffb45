"""
A streamed response is neither read to its end nor closed, and keeps its connection.

On call: after some hours PoolTimeout on every call to one service, which is healthy.
The signal `unclosed_response`: `otel_pools.connection.overdue` of an HTTP pool is not 0, and `otel_pools.use.oldest`
goes up like a clock. The log has the line that sent the request.
What to do: that line needs `with client.stream(...)`.
"""

from __future__ import annotations

import time

import httpx
from lab import LEAK_THRESHOLD, Lab, alone

import otel_pools


def first_bytes(client: httpx.Client) -> httpx.Response:
    """Looks at the status and forgets the rest."""
    return client.send(client.build_request("GET", "/price", params={"seconds": "0"}), stream=True)


def play(lab: Lab) -> None:
    """One response stays open, while others come and go."""
    with httpx.Client(base_url=lab.servers.web, trust_env=False) as client:
        otel_pools.name_pool(client, "images")
        client.get("/price", params={"seconds": "0"})
        lab.before()
        response = first_bytes(client)
        time.sleep(LEAK_THRESHOLD + 0.1)
        client.get("/price", params={"seconds": "0"})
        lab.after()
        response.close()
        lab.later()


if __name__ == "__main__":
    alone(play)
