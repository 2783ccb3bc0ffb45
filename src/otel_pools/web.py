"""Statistics, health and advice over HTTP: one ASGI and one WSGI application, to be mounted in any framework."""

from __future__ import annotations

import hmac
import json
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from dataclasses import asdict, dataclass
from http import HTTPStatus
from typing import Any

import otel_pools

from ._guard import lost

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]
WsgiApp = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]

READING = ("GET", "HEAD")
CHANGING = ("POST",)

HEADERS = (
    ("content-type", "application/json"),
    ("cache-control", "no-store"),
    ("x-content-type-options", "nosniff"),
)
CHALLENGE = 'Bearer realm="otel_pools"'


def asgi_app(*, token: str | None = None, holders: bool = False, reset: bool = False) -> AsgiApp:
    """
    The endpoints as an ASGI application, for FastAPI, Starlette, Django on ASGI and others.

    ``GET`` and ``HEAD`` of ``/stats``, ``/health``, ``/ready``, ``/advice``, ``/config`` and, if switched on, of
    ``/holders``, ``POST`` of ``/reset``, under wherever it is mounted. All answer JSON from this
    process's own memory: no endpoint asks a server. ``/ready`` is 503 when a pool does harm, ``/health`` when a
    pool cannot be read, and otherwise both are 200.

    Args:
        token: What callers must send as ``Authorization: Bearer <token>``, on every endpoint; None: nothing.
        holders: Whether there is ``/holders``, which tells lines of your code and trace ids.
        reset: Whether there is ``/reset``, which starts the statistics anew.

    Raises:
        ValueError: *token* is empty, as an environment variable may be; that would be no protection.
    """
    endpoints = Endpoints(token, holders, reset)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await _send(send, endpoints.answer(scope["method"], _path(scope), _authorization(scope)))
        elif scope["type"] == "lifespan":
            await _live(receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1000})  # before it is accepted, that is a 403
        else:
            raise ValueError(f"otel_pools.web speaks http, not {scope['type']}")  # as ASGI wants it

    return app


def wsgi_app(*, token: str | None = None, holders: bool = False, reset: bool = False) -> WsgiApp:
    """
    The endpoints as a WSGI application, for Flask, Django and others.

    Args:
        token: As in `asgi_app`, like the others.
        holders: Likewise.
        reset: Likewise.

    Raises:
        ValueError: *token* is empty.
    """
    endpoints = Endpoints(token, holders, reset)

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        given = environ.get("HTTP_AUTHORIZATION")
        sent = None if given is None else given.encode("latin-1", "replace")
        answer = endpoints.answer(environ["REQUEST_METHOD"], environ.get("PATH_INFO", ""), sent)
        start_response(f"{answer.status} {HTTPStatus(answer.status).phrase}", list(answer.headers))
        return [answer.body]

    return app


# -- what both have in common ------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, before it is HTTP."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


Said = tuple[int, Mapping[str, Any]]


class Endpoints:
    """
    Which paths there are, and what they answer.

    Args:
        token: What callers must know; None: nothing.
        holders: Whether there is ``/holders``.
        reset: Whether there is ``/reset``.

    Raises:
        ValueError: *token* is empty.
    """

    def __init__(self, token: str | None = None, holders: bool = False, reset: bool = False) -> None:
        if token is not None and not token.strip():
            raise ValueError("token is empty, which would protect nothing; None switches it off")
        self._token = None if token is None else token.encode()
        self.routes: dict[str, tuple[tuple[str, ...], Callable[[], Said]]] = {
            path: (READING, answer) for path, answer in READINGS.items()
        }
        if holders:
            self.routes["/holders"] = READING, _holders
        if reset:
            self.routes["/reset"] = CHANGING, _reset

    def __repr__(self) -> str:
        guarded = "open to all" if self._token is None else "behind a token"
        return f"<Endpoints {' '.join(self.routes)}, {guarded}>"

    def answer(self, method: str, path: str, authorization: bytes | None) -> Answer:
        """
        Answer one request; never raises.

        Args:
            method: As in ``GET``.
            path: Below where the application is mounted, as in ``/stats``.
            authorization: The header, if there was one.
        """
        try:
            found = self._respond(method, path.rstrip("/"), authorization)
        except Exception as error:
            lost("an endpoint", error)
            found = _answer(500, {"error": "otel_pools could not answer; its log says why"})
        if method == "HEAD":
            return Answer(found.status, found.headers, b"")
        return found

    def _respond(self, method: str, path: str, authorization: bytes | None) -> Answer:
        # Before the path is looked at: who has no token does not learn what there is.
        if not self._may(authorization):
            return _answer(401, {"error": "a bearer token is needed"}, ("www-authenticate", CHALLENGE))
        if path not in self.routes:
            return _answer(404, {"error": "not found"})
        methods, say = self.routes[path]
        if method not in methods:
            return _answer(405, {"error": "method not allowed"}, ("allow", ", ".join(methods)))
        return _answer(*say())

    def _may(self, authorization: bytes | None) -> bool:
        if self._token is None:
            return True
        scheme, _, given = (authorization or b"").strip().partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self._token)


def _answer(status: int, said: Mapping[str, Any], *headers: tuple[str, str]) -> Answer:
    # No NaN, which is no JSON; and of what JSON does not know only the kind, as its text may be a secret.
    body = json.dumps(said, allow_nan=False, default=_kind).encode()
    return Answer(status, (*HEADERS, ("content-length", str(len(body))), *headers), body)


def _kind(thing: Any) -> str:
    return type(thing).__qualname__


# -- what they say -----------------------------------------------------------------


def _stats() -> Said:
    return 200, {"timestamp": time.time(), "pools": [pool.to_dict() for pool in otel_pools.pools()]}


def _health() -> Said:
    # A pool that is full is no reason to take anything away; one that cannot be read wants somebody to look.
    report = otel_pools.health()
    return (503 if report.status == "error" else 200), report.to_dict()


def _ready() -> Said:
    report = otel_pools.health()
    reasons = {pool.pool: pool.reasons for pool in report.pools if not pool.ready}
    said = {"ready": report.ready, "status": report.status, "reasons": reasons, "timestamp": report.timestamp}
    return (200 if report.ready else 503), said


def _advice() -> Said:
    return 200, {"timestamp": time.time(), "advice": [advice.to_dict() for advice in otel_pools.advice()]}


WHO = ("name", "library", "system", "server_address", "server_port", "namespace")
LIMITS = ("config", "max", "idle_max", "overflow_max")


def _config() -> Said:
    # As late as the rest of what only an app with pools needs.
    from ._registry import alive  # noqa: PLC0415  # as said

    pools = [{part: said[part] for part in (*WHO, *LIMITS)} for said in (pool.to_dict() for pool in otel_pools.pools())]
    settings = {registry.target.name: asdict(registry.settings) for registry in alive()}
    return 200, {"timestamp": time.time(), "version": otel_pools.__version__, "pools": pools, "settings": settings}


def _holders() -> Said:
    return 200, {"timestamp": time.time(), "holders": [holder.to_dict() for holder in otel_pools.holders()]}


def _reset() -> Said:
    otel_pools.reset_stats()
    return 200, {"timestamp": time.time(), "reset": True}


READINGS: dict[str, Callable[[], Said]] = {
    "/stats": _stats,
    "/health": _health,
    "/ready": _ready,
    "/advice": _advice,
    "/config": _config,
}


# -- ASGI --------------------------------------------------------------------------


def _path(scope: Scope) -> str:
    """The path below the mount; servers and frameworks differ on whether it has the mount in it."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def _authorization(scope: Scope) -> bytes | None:
    sent = [bytes(value) for key, value in scope["headers"] if bytes(key).lower() == b"authorization"]
    return sent[0] if len(sent) == 1 else None  # two are somebody's trick


async def _send(send: Send, answer: Answer) -> None:
    headers = [(key.encode("latin-1"), value.encode("latin-1")) for key, value in answer.headers]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})


async def _live(receive: Receive, send: Send) -> None:
    """Say yes to the server that starts and stops us, where nobody mounted us."""
    while True:
        event = (await receive())["type"].removeprefix("lifespan.")
        await send({"type": f"lifespan.{event}.complete"})
        if event == "shutdown":
            return
