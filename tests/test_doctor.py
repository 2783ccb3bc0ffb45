"""`otel-pools doctor`: in good and bad environments, on real endpoints, and where nothing is installed."""

from __future__ import annotations

import base64
import importlib.metadata
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import venv
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytest.importorskip("opentelemetry.proto")

from otel_pools import _doctor, _hooks, _probe
from otel_pools._doctor import Finding, as_json, as_text, examine
from otel_pools._grpc import GrpcDoor
from otel_pools._probe import Target, ask, target
from otel_pools._receiver import Receiver
from otel_pools.targets import LIBRARIES

ENOUGH = 60
SECRET = "s3cr3t"
PATIENCE = 10.0
HTTP_PATH = "/v1/metrics"


def bare(**environ):
    """Our environment without what somebody has said to OpenTelemetry or to us."""
    return {key: value for key, value in os.environ.items() if not key.startswith("OTEL_")} | environ


def doctor(*arguments, python=sys.executable, **environ):
    return subprocess.run(
        [python, "-m", "otel_pools", "doctor", *arguments],
        env=bare(**environ),
        capture_output=True,
        text=True,
        timeout=ENOUGH,
        check=False,
    )


def found(check, **environ):
    """What one check finds: level and sentence."""
    return [(level, what) for level, what, _ in check(environ)]


def problems(check, **environ):
    return [what for level, what in found(check, **environ) if level == _doctor.PROBLEM]


# -- as a whole -----------------------------------------------------------------------------


def test_a_good_environment_is_status_0():
    """With all there, and an endpoint that answers, there is no problem, and JSON says the same."""
    pytest.importorskip("opentelemetry.distro")
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    with Receiver() as receiver:
        told = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}
        ran = doctor("--json", OTEL_SERVICE_NAME="shop", **told)
    report = json.loads(ran.stdout)
    said = [(one["area"], one["what"]) for one in report["findings"] if one["level"] == "ok"]

    assert (ran.returncode, ran.stderr, report["ok"]) == (0, "", True)
    assert [one for one in report["findings"] if one["level"] == "problem"] == []
    assert ("endpoint", f"{receiver.endpoint} takes metrics over http/protobuf") in said
    assert ("loading", "otel_pools_sqlalchemy loads") in said
    assert any(area == "hooks" and what.startswith("sqlalchemy: all ") for area, what in said)
    assert receiver.exports == 1


def test_a_bad_environment_is_status_1_and_tells_no_secret():
    """Each mistake is one problem, with what to do; and whatever is in the variables stays in them."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    ran = doctor(
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://me:{SECRET}@127.0.0.1:{port}/{SECRET}?key={SECRET}",
        OTEL_EXPORTER_OTLP_HEADERS=f"authorization=Bearer {SECRET}",
        OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf",
        OTEL_POOLS_LEAK_TRESHOLD=SECRET,
        OTEL_POOLS_SPAN_THRESHOLD=SECRET,
        OTEL_POOLS_TARGETS=f"sqlalchmy,{SECRET}",
        OTEL_PYTHON_DISABLED_INSTRUMENTATIONS=f"{SECRET},otel_pools_redis",
        OTEL_RESOURCE_ATTRIBUTES=f"token={SECRET}",
        OTEL_METRIC_EXPORT_INTERVAL=SECRET,
    )

    assert (ran.returncode, ran.stderr) == (1, "")
    assert SECRET not in ran.stdout
    assert f"PROBLEM  http://127.0.0.1:{port} over http/protobuf: nobody listens there" in ran.stdout
    assert "PROBLEM  there is no setting OTEL_POOLS_LEAK_TRESHOLD: it does nothing" in ran.stdout
    assert "-> did you mean OTEL_POOLS_LEAK_THRESHOLD?" in ran.stdout
    assert "PROBLEM  OTEL_POOLS_SPAN_THRESHOLD is wrong and not used" in ran.stdout
    assert "-> did you mean sqlalchemy?" in ran.stdout
    assert "note     otel_pools_redis does not load: OTEL_PYTHON_DISABLED_INSTRUMENTATIONS says so" in ran.stdout
    assert "PROBLEM  OTEL_METRIC_EXPORT_INTERVAL is not a number of milliseconds" in ran.stdout


def demanded(name, known):
    """A distribution, and all that it demands, and so on."""
    known.add(name)
    for text in importlib.metadata.distribution(name).requires or ():
        wanted = Requirement(text)
        if wanted.name not in known and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
            demanded(wanted.name, known)
    return known


def copied(names, folder):
    """These distributions, file by file, as if they alone had been installed there."""
    for name in names:
        for file in importlib.metadata.distribution(name).files or ():
            if ".." not in file.parts and file.locate().is_file():
                place = folder / file
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file.locate(), place)


@pytest.fixture(scope="module")
def bare_venv(tmp_path_factory):
    """A virtual environment with us and what we demand, and nothing more."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    [site] = folder.glob("lib/python*/site-packages")
    copied(demanded("otel-pools", set()), site)
    if not (site / "otel_pools").exists():  # we are installed as a link
        shutil.copytree(Path(_doctor.__file__).parent, site / "otel_pools")
        for link in site.glob("_otel_pools*"):
            link.unlink()
    return folder / "bin" / "python"


def test_a_bare_environment_is_told_what_it_lacks(bare_venv):
    """Without SDK, exporter and library it still runs, and names what is missing and the command for it."""
    ran = doctor("--json", python=bare_venv)
    assert ran.stderr == ""
    report = json.loads(ran.stdout)
    said = {(one["level"], one["what"]): one["do"] for one in report["findings"]}

    assert (ran.returncode, report["ok"]) == (1, False)
    assert said["problem", "there is no opentelemetry-sdk: no meter provider, nothing is exported"] == _doctor.INSTALL
    assert ("problem", "none of our instrumentations would load") in said
    assert any(what.startswith("there is none of the libraries that can be watched: ") for _, what in said)
    assert not [what for _, what in said if "could not be looked at" in what]


def test_what_cannot_be_looked_at_is_a_note(monkeypatch):
    """A mistake of ours in one check leaves the others as they are."""

    def broken(environ):
        yield "ok", "so far", None
        raise RuntimeError(SECRET)

    monkeypatch.setattr(_doctor, "CHECKS", {"one": broken, "two": lambda environ: iter([("ok", "fine", None)])})

    assert examine({}) == [
        Finding("note", "one", "this could not be looked at (RuntimeError)"),
        Finding("ok", "two", "fine"),
    ]


def test_text_and_json_have_all_findings():
    """By area, with what to do below each, and the sum at the end."""
    told = [Finding("ok", "a", "fine"), Finding("problem", "a", "bad", "mend it"), Finding("note", "b", "well")]

    assert as_text(told).splitlines() == [
        "a",
        "  ok       fine",
        "  PROBLEM  bad",
        "           -> mend it",
        "b",
        "  note     well",
        "",
        "problems: 1, notes: 1",
    ]
    assert json.loads(as_json(told))["findings"][1] == {"level": "problem", "area": "a", "what": "bad", "do": "mend it"}


# -- what is installed ---------------------------------------------------------------------------


def test_a_library_that_is_too_old_is_a_problem(monkeypatch):
    """With the version that would do."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.3.0")
    [(what, do)] = [(what, do) for _, what, do in _doctor._libraries({}) if "sqlalchemy" in what]

    assert (what, do) == ("sqlalchemy 1.3.0 is too old to be watched", "pip install 'sqlalchemy>=1.4'")


def test_packages_that_do_not_fit_each_other_are_a_problem(monkeypatch):
    """As after an update of one of them alone."""
    monkeypatch.setattr(_doctor, "_version", lambda name: "0.1" if name == "opentelemetry-api" else "99999")
    said = [what for what in problems(_doctor._versions) if what.startswith("opentelemetry-sdk ")]

    assert any("wants opentelemetry-api" in what and what.endswith("and there is 0.1") for what in said)


# -- do our hooks fit --------------------------------------------------------------------------------


def test_a_hook_that_does_not_fit_is_a_problem():
    """It is named by its place; the others fit."""
    pytest.importorskip("sqlalchemy")
    from otel_pools.targets import sqlalchemy

    rows = (*sqlalchemy.TARGET.hooks["sqlalchemy"], _hooks.queue("sqlalchemy.pool.base:Pool.no_such", items=len))
    misfits = _doctor._dry_run(Rows("sqlalchemy", rows), "sqlalchemy", _doctor.Settings())

    assert misfits == ["sqlalchemy.pool.base:Pool.no_such"]


class Rows:
    """A table of these hooks."""

    def __init__(self, module, rows):
        self.name, self.hooks = module, {module: rows}


def test_looking_leaves_nothing_behind():
    """After the dry run each method is the very object that it was."""
    pytest.importorskip("sqlalchemy")
    from sqlalchemy.pool import Pool
    from sqlalchemy.pool.base import _ConnectionRecord

    before = Pool.connect, _ConnectionRecord.checkin

    assert problems(_doctor._hooks) == []
    assert (Pool.connect, _ConnectionRecord.checkin) == before


def test_what_is_being_watched_is_left_alone():
    """Hooks that are on stay on."""
    pytest.importorskip("sqlalchemy")
    import otel_pools

    otel_pools.instrument("sqlalchemy")

    assert ("ok", "sqlalchemy is being watched in this very process") in found(_doctor._hooks)


def test_a_library_that_cannot_be_imported_is_a_problem(tmp_path, monkeypatch):
    """With how to see why."""
    (tmp_path / "broken_library.py").write_text("raise RuntimeError('no')")
    monkeypatch.syspath_prepend(tmp_path)
    [(level, what, do)] = _doctor._fits("broken_library", "otel_pools.targets.redis", _doctor.Settings())

    assert (level, what) == ("problem", "broken_library cannot be imported (RuntimeError)")
    assert do == "python -c 'import broken_library' says why"


# -- what would load -------------------------------------------------------------------------------------


def test_all_disabled_is_a_problem():
    """One that is disabled is a wish; if it is all of them, nothing is watched."""
    one = found(_doctor._loading, OTEL_PYTHON_DISABLED_INSTRUMENTATIONS="otel_pools_sqlalchemy")
    everything = problems(_doctor._loading, OTEL_PYTHON_DISABLED_INSTRUMENTATIONS="*")

    assert ("note", "otel_pools_sqlalchemy does not load: OTEL_PYTHON_DISABLED_INSTRUMENTATIONS says so") in one
    assert everything == ["none of our instrumentations would load"]


def test_targets_that_are_not_chosen_do_nothing():
    """As the user said."""
    said = found(_doctor._loading, OTEL_POOLS_TARGETS="sqlalchemy")

    assert ("note", "otel_pools_redis does nothing: OTEL_POOLS_TARGETS does not name it") in said
    assert all(f"otel_pools_{name} is not registered" not in what for name in LIBRARIES for _, what in said)


class Point:
    """An entry point that does this when it is loaded."""

    name = "theirs"

    def __init__(self, error):
        self._error = error

    def load(self):
        raise self._error


@pytest.mark.parametrize(("error", "count"), [(RuntimeError(SECRET), 1), (ModuleNotFoundError("x"), 0)])
def test_an_instrumentation_that_breaks_stops_those_after_it(error, count):
    """Any error but that of an import is fatal for the others; unless it is disabled."""
    assert len(list(_doctor._breaks(Point(error), set()))) == count
    assert list(_doctor._breaks(Point(error), {"theirs"})) == []


def test_an_instrumentation_that_refuses_its_library_is_a_note():
    """As the official one for SQLAlchemy refuses 2.1; ours is not affected."""
    requires = ['sqlalchemy<1.0; extra == "instruments"', "wrapt"]

    [(level, what, _)] = _doctor._beside("sqlalchemy", "theirs 1.0", requires)
    [(fits, _, _)] = _doctor._beside("sqlalchemy", "theirs 1.0", ['sqlalchemy>=1.0; extra == "instruments"'])

    assert (level, fits) == ("note", "ok")
    assert what.startswith("theirs 1.0 refuses sqlalchemy ")


# -- would there be an SDK ------------------------------------------------------------------------------------


@pytest.fixture
def all_there(monkeypatch):
    """As if SDK, distro and both exporters were installed."""
    monkeypatch.setattr(_doctor, "_version", lambda name: "1.45.1")
    monkeypatch.setattr(_doctor, "_has_distro", lambda: True)
    monkeypatch.setattr(_doctor, "_metrics_exporters", lambda: {"otlp_proto_grpc", "otlp_proto_http", "prometheus"})


@pytest.mark.parametrize(
    ("environ", "problem"),
    [
        ({"OTEL_SDK_DISABLED": " True "}, "OTEL_SDK_DISABLED is true"),
        ({"OTEL_METRICS_EXPORTER": "none"}, "OTEL_METRICS_EXPORTER is none"),
        ({"OTEL_METRICS_EXPORTER": "promethius"}, "OTEL_METRICS_EXPORTER has a name that nothing here has"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}, "OTEL_EXPORTER_OTLP_PROTOCOL is none that the SDK knows"),
        ({"OTEL_CONFIG_FILE": "/no/such/file"}, "OTEL_CONFIG_FILE is set, and there is no such file"),
        ({"OTEL_METRIC_EXPORT_INTERVAL": "10s"}, "OTEL_METRIC_EXPORT_INTERVAL is not a number"),
    ],
)
def test_settings_of_the_sdk_under_which_nothing_comes(all_there, environ, problem):
    """Each is one problem."""
    [said] = problems(_doctor._sdk, **environ)

    assert said.startswith(problem)


@pytest.mark.parametrize(
    ("environ", "note"),
    [
        ({"OTEL_TRACES_EXPORTER": "none"}, "no spans are exported"),
        ({"OTEL_METRIC_EXPORT_INTERVAL": "300000"}, "metrics are exported every 300 s"),
        ({_doctor.HISTOGRAMS: "base2_exponential_bucket_histogram"}, "exponential histograms cost"),
    ],
)
def test_settings_of_the_sdk_that_are_worth_knowing(all_there, environ, note):
    """Something comes, but less, later or dearer."""
    assert problems(_doctor._sdk, **environ) == []
    assert any(level == "note" and what.startswith(note) for level, what in found(_doctor._sdk, **environ))


@pytest.mark.parametrize(("exporter", "name"), [(None, "otlp_proto_grpc"), ("prometheus,otlp", "prometheus")])
def test_exporters_that_are_there_are_fine(all_there, exporter, name):
    """The default is OTLP over gRPC, as that of the distro."""
    environ = {"OTEL_METRICS_EXPORTER": exporter} if exporter else {}

    assert ("ok", f"metrics go out by {name}") in found(_doctor._sdk, **environ)


def test_an_exporter_that_is_not_there_is_a_problem(all_there, monkeypatch):
    """The SDK would give up, and the app run uninstrumented."""
    monkeypatch.setattr(_doctor, "_metrics_exporters", set)

    assert problems(_doctor._sdk) == ["the exporter otlp_proto_grpc is not installed: the app runs uninstrumented"]


def test_the_exporter_of_the_other_protocol_would_do(all_there, monkeypatch):
    """If that is the one that is installed, it is offered."""
    monkeypatch.setattr(_doctor, "_metrics_exporters", lambda: {"otlp_proto_http"})
    [do] = [do for level, _, do in _doctor._sdk({}) if level == "problem"]

    assert do.endswith(", or OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf, which is installed")


def test_without_a_distro_nobody_configures(all_there, monkeypatch):
    """Which is a note, as the app may do it in code."""
    monkeypatch.setattr(_doctor, "_has_distro", lambda: False)

    assert [level for level, _ in found(_doctor._sdk)] == ["note"]


# -- does anybody answer -----------------------------------------------------------------------------------------


def test_an_endpoint_that_nobody_asked_for_is_a_note(all_there, monkeypatch):
    """At the default nobody need listen; where the user sends it, somebody must."""
    monkeypatch.setattr(_doctor, "ask", lambda target: "nobody listens there")
    [(level, _)] = found(_doctor._endpoint)
    [(asked_for, what)] = found(_doctor._endpoint, OTEL_EXPORTER_OTLP_ENDPOINT="http://localhost:9")

    assert (level, asked_for, what) == ("note", "problem", "http://localhost:9 over grpc: nobody listens there")


@pytest.mark.parametrize(("host", "count"), [("collector", 1), ("127.0.0.1", 0)])
def test_credentials_in_clear_are_a_note(all_there, monkeypatch, host, count):
    """Unless they stay on this machine."""
    monkeypatch.setattr(_doctor, "ask", lambda target: None)
    told = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{host}:4317", "OTEL_EXPORTER_OTLP_HEADERS": f"key={SECRET}"}
    said = found(_doctor._endpoint, **told)

    assert sum("in clear" in what for _, what in said) == count
    assert SECRET not in str(said)


@pytest.mark.parametrize(
    ("environ", "protocol", "url", "insecure"),
    [
        ({}, "grpc", "http://localhost:4317", True),
        ({}, "http/protobuf", "http://localhost:4318/v1/metrics", True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "https://c/otlp/"}, "http/protobuf", "https://c/otlp/v1/metrics", False),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://c/m"}, "http/protobuf", "http://c/m", True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "c:4317"}, "grpc", "c:4317", False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "c:4317", "OTEL_EXPORTER_OTLP_INSECURE": "True"}, "grpc", "c:4317", True),
    ],
)
def test_the_endpoint_is_that_of_the_exporter(environ, protocol, url, insecure):
    """Its default, the path it adds, and whether it speaks TLS."""
    one = target(environ, protocol)

    assert (one.url, one.insecure) == (url, insecure)


def test_a_target_shows_no_secret():
    """Neither its repr nor what is shown has more than scheme, host and port."""
    one = Target("grpc", f"https://me:{SECRET}@c:1/{SECRET}?{SECRET}", {"key": SECRET})

    assert repr(one) == "<Target https://c:1 over grpc>"


def test_real_endpoints_answer():
    """Ours, over HTTP and over gRPC; nothing is recorded but an empty export."""
    pytest.importorskip("grpc", reason="grpcio is not installed")
    with Receiver() as receiver, GrpcDoor(receiver) as door:
        http, grpc = Target("http/protobuf", receiver.endpoint + HTTP_PATH, {}), Target("grpc", door.endpoint, {}, True)

        assert (ask(http, PATIENCE), ask(grpc, PATIENCE)) == (None, None)
        assert (receiver.exports, receiver.series()) == (2, [])


def test_the_other_protocol_is_recognised(monkeypatch):
    """Each port asked in the other one's language: an answer with the commonest reason, and no traceback."""
    pytest.importorskip("grpc", reason="grpcio is not installed")
    with Receiver() as receiver, GrpcDoor(receiver) as door:
        monkeypatch.setattr(
            _probe, "OTHER", {"http/protobuf": door.port, "grpc": int(receiver.endpoint.rpartition(":")[2])}
        )
        over_http = ask(Target("http/protobuf", door.endpoint + HTTP_PATH, {}), 1.0)
        over_grpc = ask(Target("grpc", receiver.endpoint, {}, insecure=True), 1.0)

    assert over_http.startswith("it does not speak http/protobuf; port ")
    assert over_grpc.startswith("it ")
    assert over_grpc.endswith("is usually for the other protocol")


class Answer(BaseHTTPRequestHandler):
    """As the path says: a status, and whom it was that asked."""

    asked = []

    def do_POST(self):
        self.asked.append((self.path, self.headers["Authorization"]))
        self.send_response(int(self.path.strip("/").partition("/")[0]))
        self.send_header("Location", "/200/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        """Not to the terminal."""


@contextmanager
def serving(context=None):
    Answer.asked = []
    server = HTTPServer(("127.0.0.1", 0), Answer)
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *_: None  # a client that goes away at once, as it trusts nobody
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "why"),
    [
        (200, None),
        (401, "it wants credentials (HTTP 401); see OTEL_EXPORTER_OTLP_HEADERS"),
        (403, "it refuses our credentials (HTTP 403); see OTEL_EXPORTER_OTLP_HEADERS"),
        (404, "it has nothing at this path (HTTP 404); see the end of the endpoint"),
        (302, "it answers with HTTP 302"),
        (503, "it answers with HTTP 503"),
    ],
)
def test_what_a_server_answers_is_told(status, why):
    """In words; a redirection is not followed, as what we send is for this server alone."""
    with serving() as where:
        assert ask(Target("http/protobuf", f"http://{where}/{status}", {}), PATIENCE) == why
    assert len(Answer.asked) == 1


def test_credentials_are_sent_as_the_exporter_sends_them():
    """Those in the URL as basic authorization; those in headers as they are."""
    with serving() as where:
        ask(Target("http/protobuf", f"http://me:{SECRET}@{where}/200", {}), PATIENCE)
        one = target({"OTEL_EXPORTER_OTLP_HEADERS": f"Authorization=Bearer%20{SECRET}, x=y"}, "http/protobuf")
        ask(Target("http/protobuf", f"http://{where}/200", one.headers), PATIENCE)

    basic = base64.b64encode(f"me:{SECRET}".encode()).decode()
    assert [who for _, who in Answer.asked] == [f"Basic {basic}", f"Bearer {SECRET}"]


def test_tls_is_verified(tmp_path):
    """A certificate that nobody vouches for is told, and with the right file there is no complaint."""
    trustme = pytest.importorskip("trustme")
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(file))
    with serving(context) as where:
        url = f"https://{where}/200"
        untrusted = ask(Target("http/protobuf", url, {}), PATIENCE)
        trusted = ask(Target("http/protobuf", url, {}, certificate=str(file)), PATIENCE)
        missing = ask(Target("http/protobuf", url, {}, certificate=str(tmp_path / "none.pem")), PATIENCE)
    with serving() as where:
        in_clear = ask(Target("http/protobuf", f"https://{where}/200", {}), PATIENCE)

    assert untrusted.startswith("its certificate is not trusted (")
    assert trusted is None
    assert missing == "a file of OTEL_EXPORTER_OTLP_*CERTIFICATE or *KEY is not there"
    assert in_clear == "it does not speak TLS as we do; is it http:// and not https://?"


def test_tls_over_grpc(tmp_path):
    """A server with a certificate of its own authority, with that authority's file and without."""
    grpc = pytest.importorskip("grpc", reason="grpcio is not installed")
    trustme = pytest.importorskip("trustme")
    from concurrent.futures import ThreadPoolExecutor

    authority = trustme.CA()
    certificate, file = authority.issue_cert("localhost"), tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(file))
    server = grpc.server(ThreadPoolExecutor(1), options=[("grpc.so_reuseport", 0)])
    pair = (certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes())
    port = server.add_secure_port("localhost:0", grpc.ssl_server_credentials([pair]))
    server.start()
    try:
        url = f"https://localhost:{port}"
        trusted = ask(Target("grpc", url, {}, certificate=str(file)), PATIENCE)
        untrusted = ask(Target("grpc", url, {}), 1.0)
    finally:
        server.stop(0).wait()

    assert trusted == "it takes no metrics over gRPC"  # it has no such method, and so it has answered
    assert untrusted == "it cannot be reached over gRPC with TLS"


def test_without_a_scheme_it_is_tls():
    """Which is what few mean who write no scheme, and is said."""
    pytest.importorskip("grpc", reason="grpcio is not installed")
    with Receiver() as receiver, GrpcDoor(receiver) as door:
        said = ask(Target("grpc", f"127.0.0.1:{door.port}", {}), 1.0)

    assert said.startswith("it cannot be reached over gRPC with TLS, which is meant where no scheme is written")


def test_silence_is_told():
    """A server that takes the connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        where = f"http://127.0.0.1:{silent.getsockname()[1]}"

        assert ask(Target("http/protobuf", where, {}), 0.2) == "it does not answer in time"


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("ftp://c/", "it must begin with http:// or https://"),
        ("c:4318", "it must begin with http:// or https://"),
        (f"http://c:{SECRET}/", "it is no URL"),
        (f"http://[{SECRET}", "it must begin with http:// or https://"),
    ],
)
def test_what_is_no_url_is_told(url, why):
    """Without the URL."""
    one = Target("http/protobuf", url, {})

    assert ask(one, PATIENCE) == why
    assert SECRET not in one.shown


# -- what was said to us ----------------------------------------------------------------------------------------------


def test_right_settings_are_used():
    """Each that is given is named, and its value is not."""
    assert found(_doctor._given, OTEL_POOLS_SPAN_THRESHOLD="0.5", OTEL_POOLS_CALL_SITE="off", PATH="p") == [
        ("ok", "OTEL_POOLS_SPAN_THRESHOLD is used"),
        ("ok", "OTEL_POOLS_CALL_SITE is used"),
    ]


def test_a_metric_that_does_not_exist_cannot_be_excluded():
    """The nearest that does is offered."""
    name = "db.client.connection.use_tim"
    [(level, _, do)] = [one for one in _doctor._given({"OTEL_POOLS_METRICS_EXCLUDE": name}) if one[0] != "ok"]

    assert (level, do) == ("problem", f"did you mean {name}e?")


# -- of processes -----------------------------------------------------------------------------------


def test_prefork_servers_come_with_a_word(monkeypatch):
    """What a fork does to connections, to the name of a process, and to threads."""
    monkeypatch.setattr(_doctor, "_version", {"uwsgi": "2", "opentelemetry-sdk": "1.40.0"}.get)
    said = [what for _, what in found(_doctor._processes, OTEL_SERVICE_NAME="shop")]

    assert [what.partition(":")[0] for what in said] == [
        "with uwsgi, the workers of a service cannot be told apart",
        "uwsgi forks",
        "uWSGI runs no thread of Python without --enable-threads, and so exports nothing",
    ]


def test_a_given_instance_is_that_of_all_workers(monkeypatch):
    """So it had better be left out."""
    monkeypatch.setattr(_doctor, "_version", {"gunicorn": "23", "opentelemetry-sdk": "1.45.1"}.get)
    given = "service.name=shop,service.instance.id=one"
    said = [what for _, what in found(_doctor._processes, OTEL_RESOURCE_ATTRIBUTES=given)]

    assert said[0].startswith("with gunicorn, all workers have the one service.instance.id")
    assert not any("told apart" in what and "all workers" not in what for what in said)


def test_a_service_without_a_name_is_a_note():
    """As it would be one of many that are unknown."""
    assert ("note", "the service has no name, and will be unknown_service") in found(_doctor._processes)
