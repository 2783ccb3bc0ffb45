"""A small HTTP server on 127.0.0.1, for what others post while a test waits."""

from __future__ import annotations

import threading
from http.server import ThreadingHTTPServer

HOST = "127.0.0.1"


class Listener(ThreadingHTTPServer):
    """
    Listens within its block.

    Args:
        handler: The class that answers a request.
    """

    daemon_threads = True

    def __init__(self, handler):
        super().__init__((HOST, 0), handler)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,))

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self._thread.join()
        self.server_close()
