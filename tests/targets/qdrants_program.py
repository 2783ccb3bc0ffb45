"""The program of `qdrants.Server`: the demo's vector server, which counts, may ask for a key, and may speak TLS."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import sys
from contextlib import contextmanager
from pathlib import Path

import grpc
from hypercorn.asyncio import serve
from hypercorn.config import Config

MISSING_KEY = "Must provide an API key or an Authorization bearer token"  # what a real one says


class Seen:
    """What this server has seen since it started, and whether it answers."""

    def __init__(self):
        self.accepted = 0  # connections for REST
        self.peers = set()  # of gRPC
        self.begun = {"rest": 0, "grpc": 0}
        self.ended = {"rest": 0, "grpc": 0}
        self.open = asyncio.Event()  # while it is not set, nobody is answered
        self.open.set()

    def told(self):
        return {
            "rest_accepted": self.accepted,
            "rest_begun": self.begun["rest"],
            "rest_ended": self.ended["rest"],
            "grpc_peers": len(self.peers),
            "grpc_begun": self.begun["grpc"],
            "grpc_ended": self.ended["grpc"],
        }

    @contextmanager
    def one(self, protocol):
        self.begun[protocol] += 1
        try:
            yield
        finally:
            self.ended[protocol] += 1


class Counted(grpc.aio.ServerInterceptor):
    """Counts calls, and refuses those without the key."""

    def __init__(self, seen, key):
        self.seen, self.key = seen, key

    async def intercept_service(self, continuation, details):
        handler = await continuation(details)
        knows = not self.key or dict(details.invocation_metadata).get("api-key") == self.key

        async def counted(asked, context):
            self.seen.peers.add(context.peer())
            with self.seen.one("grpc"):
                if not knows:
                    await context.abort(grpc.StatusCode.UNAUTHENTICATED, MISSING_KEY)
                await self.seen.open.wait()
                return await handler.unary_unary(asked, context)

        return handler and grpc.unary_unary_rpc_method_handler(
            counted, handler.request_deserializer, handler.response_serializer
        )


def counted(rest, seen, key):
    """The same for requests."""

    async def app(scope, receive, send):
        if scope["type"] != "http":
            return
        with seen.one("rest"):
            if key and dict(scope["headers"]).get(b"api-key") != key.encode():
                await send({"type": "http.response.start", "status": 401, "headers": []})
                await send({"type": "http.response.body", "body": MISSING_KEY.encode()})
            else:
                await seen.open.wait()
                await rest(scope, receive, send)

    return app


class Door(socket.socket):
    """A socket that counts whom it lets in."""

    seen = None

    def accept(self):
        entered = super().accept()
        self.seen.accepted += 1
        return entered


class Settings(Config):
    """Listens with a door."""

    door = None

    def _create_sockets(self, binds, kind=socket.SOCK_STREAM):
        return [self.door] if kind == socket.SOCK_STREAM and binds else []


def settings(chosen, seen):
    config = Settings()
    config.door = Door(fileno=chosen.fd)
    config.door.setblocking(False)
    config.door.seen = seen
    config.bind = ["here"]
    config.keep_alive_max_requests = sys.maxsize
    config.keep_alive_timeout = chosen.keep_alive
    if chosen.pem:
        config.certfile = config.keyfile = chosen.pem
    return config


def add_port(server, chosen):
    place = f"127.0.0.1:{chosen.grpc_port}"
    if not chosen.pem:
        return server.add_insecure_port(place)
    pem = Path(chosen.pem).read_bytes()
    return server.add_secure_port(place, grpc.ssl_server_credentials([(pem, pem)]))


def say(what):
    """One line for whoever started us."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


async def answering(seen):
    """Say that we serve; then obey each line, and answer it with what was seen, until whoever started us is gone."""
    orders = {b"hold\n": seen.open.clear, b"release\n": seen.open.set, b"?\n": seen.told}

    def answer():
        line = os.read(0, 1 << 10)
        if not line:
            os._exit(0)
        orders[line]()
        say(seen.told())

    asyncio.get_running_loop().add_reader(0, answer)
    say("ready")
    await asyncio.Event().wait()


async def run(chosen, vectors):
    seen = Seen()
    options = list(json.loads(chosen.options).items())
    server = vectors.grpc_server(chosen.streams, options, [Counted(seen, chosen.key)])
    assert add_port(server, chosen) == chosen.grpc_port
    await server.start()
    app = counted(vectors.rest, seen, chosen.key)
    await serve(app, settings(chosen, seen), shutdown_trigger=lambda: answering(seen))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", required=True, help="where the demo's server is")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--grpc-port", type=int, required=True)
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--keep-alive", type=float, required=True)
    parser.add_argument("--options", default="{}")
    parser.add_argument("--key", default="")
    parser.add_argument("--pem", default="")
    chosen = parser.parse_args()
    sys.path.insert(0, chosen.vectors)
    import _vectors

    asyncio.run(run(chosen, _vectors))


if __name__ == "__main__":
    main()
