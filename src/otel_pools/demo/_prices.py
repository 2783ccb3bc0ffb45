"""The web application of the demo: prices over HTTP/2, so many at once on a connection; knows nothing of us."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import sys
from typing import Any

from hypercorn.asyncio import serve
from hypercorn.config import Config

ASKED = re.compile(rb"seconds=(\d+(?:\.\d+)?)")
LONGEST = 60.0  # seconds; anybody on this machine may ask


async def price(scope: Any, _: Any, send: Any) -> None:
    """Answer `/price?seconds=S` after so many seconds."""
    if scope["type"] != "http":
        return  # there is nothing to set up or to tear down
    asked = ASKED.fullmatch(scope["query_string"]) if scope["path"] == "/price" else None
    if asked is not None:
        await asyncio.sleep(min(float(asked[1]), LONGEST))
    status, said = (404, b"there is /price?seconds=S") if asked is None else (200, b"9.99")
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": said})


async def until_alone() -> None:
    """Say that we serve, and go on until whoever started us is gone, which closes our input."""
    # At once, as nothing is to be saved. What is no pipe, as when run by hand, cannot be watched.
    with contextlib.suppress(OSError, ValueError):
        asyncio.get_running_loop().add_reader(sys.stdin.fileno(), os._exit, 0)
    print("ready", flush=True)
    await asyncio.Event().wait()


def main() -> None:
    """Serve on the socket that the command line names, until we are killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="the socket that listens")
    parser.add_argument("--streams", type=int, default=4, help="how many at once on a connection")
    chosen = parser.parse_args()
    config = Config()
    config.bind = [f"fd://{chosen.fd}"]
    config.h2_max_concurrent_streams = chosen.streams
    config.keep_alive_max_requests = sys.maxsize  # it would close a connection after 1000
    asyncio.run(serve(price, config, shutdown_trigger=until_alone))


if __name__ == "__main__":
    main()
