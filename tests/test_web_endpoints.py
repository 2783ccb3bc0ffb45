"""The endpoints: the same over ASGI and WSGI, mounted in real frameworks and asked over real HTTP."""

from __future__ import annotations

import asyncio
import hmac
import http.client
import json
import logging
import re
import runpy
import socket
import socketserver
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.validate import validator

import pytest

# Looked for and not imported: the process with Django in it imports this module, and needs none of the others.
for needed in ("sqlalchemy", "fastapi", "starlette", "flask", "django", "uvicorn"):
    if find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed", allow_module_level=True)

import sqlalchemy.ext.asyncio  # noqa: E402
import uvicorn  # noqa: E402
from sqlalchemy import create_engine  # noqa: E402
from sqlalchemy.pool import QueuePool  # noqa: E402

import otel_pools  # noqa: E402
from otel_pools import _guard, web  # noqa: E402
from otel_pools._model import HealthReport, PoolHealth  # noqa: E402
from otel_pools.web import Endpoints, asgi_app, wsgi_app  # noqa: E402

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "endpoints.md"
PATIENCE = 30.0  # seconds: for what takes a moment on an idle machine
TOKEN = "a-token-nobody-guesses"
ALL = {"holders": True, "reset": True}
READINGS = ("/stats", "/health", "/ready", "/advice", "/config")

# -- where they are mounted: all of it open under /pools, and as it comes but behind a token under /guarded ----------


def fastapi_host():
    from fastapi import FastAPI

    app = FastAPI()
    app.mount("/pools", asgi_app(**ALL))
    app.mount("/guarded", asgi_app(token=TOKEN))
    return app


def starlette_host():
    from starlette.applications import Starlette
    from starlette.routing import Mount

    mounts = [Mount("/pools", asgi_app(**ALL)), Mount("/guarded", asgi_app(token=TOKEN))]
    return Starlette(routes=[Mount("/", routes=mounts)])


def bare_asgi_host():
    """Without a framework: the server's own `root_path`, and its lifespan."""
    pools, guarded = asgi_app(**ALL), asgi_app(token=TOKEN)

    async def app(scope, receive, send):
        prefix = next((p for p in ("/pools", "/guarded") if scope.get("path", "").startswith(p)), "")
        chosen = guarded if prefix == "/guarded" else pools
        await chosen({**scope, "root_path": prefix} if prefix else scope, receive, send)

    return app


def flask_host():
    from flask import Flask
    from werkzeug.middleware.dispatcher import DispatcherMiddleware

    app = Flask("host")
    app.wsgi_app = DispatcherMiddleware(app.wsgi_app, {"/pools": wsgi_app(**ALL), "/guarded": wsgi_app(token=TOKEN)})
    return app


def bare_wsgi_host():
    """Without a framework, and watched by the standard library's judge of who keeps to PEP 3333."""
    mounts = {"/pools": validator(wsgi_app(**ALL)), "/guarded": validator(wsgi_app(token=TOKEN))}

    def app(environ, start_response):
        prefix = "/" + environ["PATH_INFO"].split("/")[1]
        mounted = {**environ, "SCRIPT_NAME": prefix, "PATH_INFO": environ["PATH_INFO"][len(prefix) :]}
        return mounts[prefix](mounted, start_response)

    return app


ASGI = {"fastapi": fastapi_host, "starlette": starlette_host, "asgi": bare_asgi_host}
WSGI = {"flask": flask_host, "wsgi": bare_wsgi_host}
# Django keeps its settings for the whole process, so it has one of its own.
DJANGO = ("django-asgi", "django-wsgi")
HOSTS = (*ASGI, *WSGI, *DJANGO)


@contextmanager
def serving_asgi(app, lifespan="on"):
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, ws="none", lifespan=lifespan))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


class Quiet(WSGIRequestHandler):
    def log_message(self, *_):
        """Nothing: the test's output is for the test."""


class Threaded(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True


@contextmanager
def serving_wsgi(app):
    with make_server("127.0.0.1", 0, app, Threaded, Quiet) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def snippet(file):
    """The block of docs/endpoints.md that begins with this file's name."""
    (block,) = [block for block in blocks() if block.startswith(f"# {file}\n")]
    return block


def blocks():
    return re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def mounted(file, inside, prefix, **options):
    """What the page's block makes of *inside*, with another prefix and other options."""
    source = re.sub(r"get_.sgi_application\(\)", "inside", snippet(file)).replace("/pools", prefix)
    space = {"inside": inside, "options": options}
    exec(source.replace('token=os.environ["POOLS_TOKEN"]', "**options"), space)
    return space["application"]


DJANGO_PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.wsgi import get_wsgi_application
from django.http import JsonResponse
from django.urls import path

settings.configure(SECRET_KEY="none", ALLOWED_HOSTS=["*"], ROOT_URLCONF=__name__)
urlpatterns = [path("own", lambda request: JsonResponse({{"own": True}}))]
import test_web_endpoints as shared

apps = {{"asgi.py": get_asgi_application(), "wsgi.py": get_wsgi_application()}}
for file, app in apps.items():
    guarded = shared.mounted(file, app, "/guarded", token=shared.TOKEN)
    apps[file] = shared.mounted(file, guarded, "/pools", **shared.ALL)
one, other = shared.serving_asgi(apps["asgi.py"], lifespan="off"), shared.serving_wsgi(apps["wsgi.py"])
with shared.watched_pool(), one as asgi, other as wsgi:
    print(asgi, wsgi, flush=True)
    sys.stdin.read()
"""


@contextmanager
def watched_pool():
    """One pool with two of three connections open, one of them in use, and one error."""
    otel_pools.instrument("sqlalchemy")
    engine = create_engine(
        "sqlite:///file:endpoints?mode=memory&uri=true",
        poolclass=QueuePool,
        pool_size=2,
        max_overflow=1,
        pool_timeout=0.001,
        logging_name="orders",
    )
    held, back = engine.connect(), engine.connect()
    back.close()
    try:
        yield engine
    finally:
        held.close()
        engine.dispose()
        otel_pools.uninstrument()


@pytest.fixture(scope="module")
def ports():
    """Every host, on a port of its own."""
    program = DJANGO_PROGRAM.format(tests=str(Path(__file__).parent))
    command = [sys.executable, "-W", "error", "-c", program]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as django,
        ExitStack() as hosts,
    ):
        found = {name: hosts.enter_context(serving_asgi(make())) for name, make in ASGI.items()}
        found |= {name: hosts.enter_context(serving_wsgi(make())) for name, make in WSGI.items()}
        found |= dict(zip(DJANGO, map(int, django.stdout.readline().split()), strict=True))
        yield found
        django.stdin.close()


@pytest.fixture
def pool():
    with watched_pool() as engine:
        yield engine


def ask(port, method, path, authorization=None):
    """Status, headers and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request(method, path, headers={} if authorization is None else {"Authorization": authorization})
        answer = connection.getresponse()
        return answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


# Method, path and token, and what comes of it.
TABLE = [
    *(("GET", f"/pools{path}", None, 200, {}) for path in (*READINGS, "/holders", "/stats/")),
    *(("HEAD", f"/pools{path}", None, 200, {}) for path in (*READINGS, "/holders")),
    *(("GET", f"/guarded{path}", f"Bearer {TOKEN}", 200, {}) for path in READINGS),
    *(("HEAD", f"/guarded{path}", f"bearer  {TOKEN}", 200, {}) for path in READINGS),
    ("POST", "/pools/reset", None, 200, {}),
    *((method, "/pools/stats", None, 405, {"allow": "GET, HEAD"}) for method in ("POST", "PUT", "DELETE", "OPTIONS")),
    *((method, "/pools/reset", None, 405, {"allow": "POST"}) for method in ("GET", "HEAD")),
    *(("GET", f"/pools/{path}", None, 404, {}) for path in ("", "nothing", "stats/more", "..%2Fstats", "STATS")),
    # Off unless asked for.
    ("GET", "/guarded/holders", f"Bearer {TOKEN}", 404, {}),
    ("POST", "/guarded/reset", f"Bearer {TOKEN}", 404, {}),
    # Who has no token does not learn what there is.
    *(
        (method, f"/guarded{path}", sent, 401, {"www-authenticate": 'Bearer realm="otel_pools"'})
        for method, path, sent in (
            ("GET", "/stats", None),
            ("GET", "/ready", f"Bearer {TOKEN}x"),
            ("GET", "/health", f"Bearer {TOKEN[:-1]}"),
            ("GET", "/stats", f"Basic {TOKEN}"),
            ("GET", "/stats", TOKEN),
            ("GET", "/stats", "Bearer"),
            ("GET", "/stats", "Bearer \xe9\xff"),
            ("HEAD", "/stats", None),
            ("POST", "/reset", None),
            ("GET", "/nothing", None),
        )
    ),
]


@pytest.mark.parametrize("host", HOSTS)
def test_every_host_answers_the_same_table(ports, pool, host):
    """Each path, method and token gets the same status and headers, whatever it is mounted in."""
    for method, path, token, status, wanted in TABLE:
        got, headers, body = ask(ports[host], method, path, token)

        assert (method, path, got) == (method, path, status)
        assert {key: headers.get(key) for key in wanted} == wanted
        assert (headers["content-type"], headers["cache-control"]) == ("application/json", "no-store")
        assert (body == b"") is (method == "HEAD")
        assert method == "HEAD" or (isinstance(json.loads(body), dict) and headers["content-length"] == str(len(body)))


def moving(said):
    """Without what differs between two moments."""
    if isinstance(said, dict):
        gone = {"timestamp", "rate_per_s", "busiest_per_s", "held_s", "since", "mean_s"}
        return {key: moving(value) for key, value in said.items() if key not in gone and not key.startswith("oldest_")}
    return [moving(one) for one in said] if isinstance(said, list) else said


def test_hosts_tell_the_same(ports, pool):
    """ASGI and WSGI, in every framework of this process, tell the same of the same pool."""
    told = {
        name: [moving(json.loads(ask(ports[name], "GET", f"/pools{path}")[2])) for path in (*READINGS, "/holders")]
        for name in (*ASGI, *WSGI)
    }

    assert all(said == told["asgi"] for said in told.values())
    stats, health, ready, _, config, holders = told["asgi"]
    assert [(p["name"], p["used"], p["idle"], p["max"]) for p in stats["pools"]] == [("orders", 1, 1, 3)]
    assert (health["status"], ready["ready"], ready["reasons"]) == ("healthy", True, {})
    assert config["settings"]["sqlalchemy"]["leak_threshold"] == 60.0
    assert [p["max"] for p in config["pools"]] == [3]
    assert [h["pool"] for h in holders["holders"]] == ["orders"]


def test_django_tells_of_its_own_process(ports):
    """Over ASGI and WSGI Django tells the same of its pool, and its own views are still there."""
    told = [[moving(json.loads(ask(ports[name], "GET", f"/pools{path}")[2])) for path in READINGS] for name in DJANGO]

    assert told[0] == told[1]
    assert [p["name"] for p in told[0][0]["pools"]] == ["orders"]
    assert [json.loads(ask(ports[name], "GET", "/own")[2]) for name in DJANGO] == [{"own": True}] * 2


def test_head_promises_what_get_keeps(ports, pool):
    """HEAD has the headers of GET, the length too."""
    for host in ("fastapi", "flask"):
        _, promised, _ = ask(ports[host], "HEAD", "/pools/config")
        _, kept, _ = ask(ports[host], "GET", "/pools/config")
        # The length of a timestamp's text may differ by some digits.
        assert abs(int(promised.pop("content-length")) - int(kept.pop("content-length"))) < 10
        assert {**promised, "date": ""} == {**kept, "date": ""}


def test_reset_starts_the_statistics_anew(ports, pool):
    """POST of /reset has the counts begin at zero, and the state stays as it is."""
    before = json.loads(ask(ports["flask"], "GET", "/pools/stats")[2])["pools"][0]
    ask(ports["fastapi"], "POST", "/pools/reset")
    after = json.loads(ask(ports["flask"], "GET", "/pools/stats")[2])["pools"][0]

    assert (before["checkouts"], after["checkouts"]) == (2, 0)
    assert (before["used"], after["used"]) == (1, 1)


def test_what_is_told_is_what_the_functions_return(pool):
    """The endpoints are the public functions as JSON, nothing else."""
    stats, health = get("/stats"), get("/health")

    assert [moving(one) for one in stats["pools"]] == [moving(as_json(one.to_dict())) for one in otel_pools.pools()]
    assert moving(health) == moving(as_json(otel_pools.health().to_dict()))
    assert get("/advice")["advice"] == as_json([one.to_dict() for one in otel_pools.advice()])


def as_json(thing):
    return json.loads(json.dumps(thing))


def get(path, **options):
    return json.loads(Endpoints(**options).answer("GET", path, None).body)


# -- what the status says ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "ready", "codes"),
    [
        ("healthy", True, (200, 200)),
        ("degraded", True, (200, 200)),
        ("critical", True, (200, 200)),
        ("critical", False, (200, 503)),
        ("error", True, (503, 200)),
        ("error", False, (503, 503)),
    ],
)
def test_status_codes_are_for_probes(monkeypatch, status, ready, codes):
    """A full pool takes nothing out of service: /health is 503 if a pool cannot be read, /ready if it does harm."""
    one = PoolHealth("orders", status, ready, ("three wait",), 1.0)
    report = HealthReport(status, ready, (one,), 1.0)
    monkeypatch.setattr(otel_pools, "health", lambda: report)  # in the place of pools in such a state
    answers = [Endpoints().answer("GET", path, None) for path in ("/health", "/ready")]

    assert tuple(answer.status for answer in answers) == codes
    assert json.loads(answers[0].body)["status"] == status
    assert json.loads(answers[1].body)["reasons"] == ({} if ready else {"orders": ["three wait"]})


def test_harm_is_not_ready(pool):
    """A checkout that timed out makes the real thing 503, with the reason in words."""
    held = [pool.connect() for _ in range(2)]
    with pytest.raises(Exception, match="QueuePool limit"):
        pool.connect()
    answer = Endpoints().answer("GET", "/ready", None)
    for one in held:
        one.close()

    assert answer.status == 503
    assert json.loads(answer.body)["reasons"]["orders"]


# -- safe --------------------------------------------------------------------------------


def test_no_secret_is_told(monkeypatch):
    """Neither user, password nor query string of a URL is in any answer."""
    monkeypatch.setenv("OTEL_POOLS_NAMES", "db.example=orders")
    otel_pools.instrument("sqlalchemy")
    engine = create_engine("postgresql+psycopg://scott:tiger-secret@db.example/shop?application_name=hush")
    bodies = [Endpoints(**ALL).answer("GET", path, None).body.decode() for path in (*READINGS, "/holders")]

    assert "orders" in bodies[0]
    assert engine.url.password == "tiger-secret"
    assert not [word for word in ("scott", "tiger", "hush", TOKEN) for body in bodies if word in body]


def test_nothing_is_sent_anywhere(pool, monkeypatch):
    """Every endpoint answers from memory: no socket is opened or written."""

    def forbidden(*_):
        raise AssertionError("an endpoint talks to somebody")

    endpoints = Endpoints(**ALL)
    for name in ("connect", "connect_ex", "send", "sendall", "sendto"):
        monkeypatch.setattr(socket.socket, name, forbidden)

    for path in (*READINGS, "/holders"):
        assert endpoints.answer("GET", path, None).status == 200


def test_the_token_is_compared_in_constant_time(monkeypatch):
    """How long a refusal takes does not tell how much of the token was right."""
    compared, compare = [], hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda *both: compared.append(both) or compare(*both))

    assert Endpoints(TOKEN).answer("GET", "/stats", b"Bearer wrong").status == 401
    assert compared == [(b"wrong", TOKEN.encode())]


@pytest.mark.parametrize("make", [asgi_app, wsgi_app])
@pytest.mark.parametrize("token", ["", " "])
def test_an_empty_token_is_no_token(make, token):
    """An environment variable that was forgotten does not open the door."""
    with pytest.raises(ValueError, match="token is empty"):
        make(token=token)


def test_two_tokens_are_none():
    """A request with two Authorization headers is refused: somebody in between may have checked the other."""
    sent = [(b"authorization", b"Bearer x"), (b"authorization", f"Bearer {TOKEN}".encode())]

    assert play(asgi_app(token=TOKEN), "/stats", headers=sent)[0]["status"] == 401


def test_says_what_it_has_and_no_token():
    """The repr has the paths, and whether there is a token, and not which."""
    assert repr(Endpoints(TOKEN)) == "<Endpoints /stats /health /ready /advice /config, behind a token>"
    assert repr(Endpoints(**ALL)).endswith("/config /holders /reset, open to all>")


def test_a_failure_of_ours_is_a_500_and_one_log_line(monkeypatch, caplog):
    """What goes wrong inside neither reaches the host nor fills its log, and the answer is plain."""
    monkeypatch.setattr(_guard, "loud", False)
    monkeypatch.setattr(otel_pools, "pools", lambda: 1 / 0)
    endpoints = Endpoints()
    with caplog.at_level(logging.WARNING, "otel_pools"):
        answers = [endpoints.answer(method, "/stats", None) for method in ("GET", "HEAD", "GET")]

    assert [answer.status for answer in answers] == [500] * 3
    assert list(json.loads(answers[0].body)) == ["error"]
    assert answers[1].body == b""
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("otel_pools lost a measurement (an endpoint: ZeroDivisionError")


@pytest.mark.parametrize("said", [float("nan"), float("inf")])
def test_what_is_no_json_is_not_sent(monkeypatch, said):
    """A number that JSON does not know is our mistake, not the client's parser's."""
    monkeypatch.setattr(_guard, "loud", False)
    monkeypatch.setitem(web.READINGS, "/stats", lambda: (200, {"number": said}))

    assert Endpoints().answer("GET", "/stats", None).status == 500


def test_of_strange_things_only_the_kind_is_told(monkeypatch):
    """An object among the settings of a pool is told by its class, as its text may have a secret in it."""
    monkeypatch.setitem(web.READINGS, "/config", lambda: (200, {"ssl": Secretive()}))

    assert get("/config") == {"ssl": "Secretive"}


class Secretive:
    def __repr__(self):
        return "tiger-secret"


# -- ASGI's other scopes -------------------------------------------------------------------


def play(app, path, root_path=None, *, kind="http", headers=(), events=()):
    """What the application sends for one scope."""
    sent, waiting = [], list(events)

    async def receive():
        return {"type": waiting.pop(0)}

    async def send(message):
        sent.append(message)

    scope = {"type": kind, "method": "GET", "path": path, "headers": list(headers)}
    asyncio.run(app(scope if root_path is None else {**scope, "root_path": root_path}, receive, send))
    return sent


@pytest.mark.parametrize(
    ("path", "root_path"),
    [
        ("/ready", None),
        ("/ready", ""),
        ("/pools/ready", "/pools"),  # as the specification has it
        ("/ready", "/pools"),  # as older servers and frameworks do it
        ("/api/pools/ready", "/api/pools"),
        ("/ready/ready", "/ready"),
        ("/ready", "/re"),
        ("/pools/ready", "/pools/"),
    ],
)
def test_finds_itself_under_any_mount(path, root_path):
    """Whether the path has the mount in it or not, the rest is what counts."""
    assert play(asgi_app(), path, root_path)[0]["status"] == 200


def test_lives_and_dies_with_its_server():
    """Started without a framework, it says yes to startup and shutdown."""
    sent = play(asgi_app(), "", kind="lifespan", events=("lifespan.startup", "lifespan.shutdown"))

    assert [message["type"] for message in sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


def test_takes_no_websocket():
    """A websocket is closed before it is accepted, which is a 403 to the client."""
    sent = play(asgi_app(), "/stats", kind="websocket", events=("websocket.connect",))

    assert sent == [{"type": "websocket.close", "code": 1000}]


def test_other_protocols_are_refused_as_asgi_wants():
    """What it does not speak is an error to the server, which the specification demands."""
    with pytest.raises(ValueError, match="speaks http"):
        play(asgi_app(), "/stats", kind="mqtt")


# -- the page and the examples -------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(blocks())))
def test_what_the_page_shows_is_python(number):
    """Every block of docs/endpoints.md compiles and, but for Django's, runs as it stands."""
    block = blocks()[number]
    code = compile(block, f"endpoints.md, block {number}", "exec")
    if "django" not in block:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("POOLS_TOKEN", TOKEN)
            exec(code, {"__name__": "page"})


@pytest.fixture
def example(monkeypatch, tmp_path):
    """Runs an example as a module, on a database of its own."""

    def run(name, scheme):
        monkeypatch.setenv("POOLS_TOKEN", TOKEN)
        monkeypatch.setenv("DATABASE_URL", f"{scheme}:///{tmp_path}/example.db")
        return runpy.run_path(str(ROOT / "examples" / name), run_name="example")

    return run


def test_the_fastapi_example_answers_503_and_is_not_ready(example, monkeypatch):
    """Exhausted, it refuses in time, its probe says so without a token, and its endpoints say why with one."""
    pytest.importorskip("aiosqlite")
    made = sqlalchemy.ext.asyncio.create_async_engine
    small = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.01}  # and not the two seconds that it says
    monkeypatch.setattr(sqlalchemy.ext.asyncio, "create_async_engine", lambda url, **asked: made(url, **asked | small))
    parts = example("fastapi_pools.py", "sqlite+aiosqlite")
    with serving_asgi(parts["app"]) as port, ThreadPoolExecutor(4) as callers:
        before = ask(port, "GET", "/ready")[0]
        answers = []
        while not {503}.issubset(status for status, *_ in answers):
            answers += callers.map(lambda _: ask(port, "GET", "/slow?seconds=0.2"), range(4))
        after, _, word = ask(port, "GET", "/ready")
        live = ask(port, "GET", "/live")[0]
        closed = ask(port, "GET", "/pools/health")[0]
        health = json.loads(ask(port, "GET", "/pools/health", f"Bearer {TOKEN}")[2])

    assert (before, after, json.loads(word), live, closed) == (200, 503, {"ready": False}, 200, 401)
    assert {status for status, *_ in answers} == {200, 503}
    assert {headers["retry-after"] for status, headers, _ in answers if status == 503} == {"2"}
    assert "got no connection in time" in health["pools"][0]["reasons"][0]


def test_the_flask_example_speaks_the_older_words(example):
    """The path and the names of the older dashboard are told from the statistics, and want the token too."""
    parts = example("flask_pools.py", "sqlite")
    with serving_wsgi(parts["app"]) as port:
        served = ask(port, "GET", "/items")[0]
        closed = ask(port, "GET", "/api/v1/health/pools")[0]
        older = json.loads(ask(port, "GET", "/api/v1/health/pools", f"Bearer {TOKEN}")[2])
        stats = json.loads(ask(port, "GET", "/pools/stats", f"Bearer {TOKEN}")[2])["pools"]
    parts["engine"].dispose()

    assert (served, closed) == (200, 401)
    assert older["example.db"] == {"status": "healthy", "pool_size": 5, "checked_out": 0, "checked_in": 1} | {
        "overflow": 0,
        "total_capacity": 15,
        "utilization_percent": 0.0,
    }
    assert [(pool["name"], pool["max"]) for pool in stats] == [("example.db", 15)]


def test_the_probes_ask_what_the_example_answers():
    """Every path in the Kubernetes example is a route of the FastAPI example, and readiness is one of its own."""
    yaml = pytest.importorskip("yaml")
    manifest = yaml.safe_load((ROOT / "examples" / "kubernetes-probes.yaml").read_text("utf-8"))
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    paths = {
        probe: container[probe]["httpGet"]["path"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")
    }

    assert paths == {"startupProbe": "/live", "livenessProbe": "/live", "readinessProbe": "/ready"}
    source = (ROOT / "examples" / "fastapi_pools.py").read_text("utf-8")
    assert all(f'@app.get("{path}")' in source for path in paths.values())
