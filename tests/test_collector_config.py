"""Tests that the Collector files are valid in every combination, safe by default, and named as what we emit."""

from __future__ import annotations

import functools
import itertools
import re
import subprocess
import sys
from typing import Any

import pytest
import yaml
from pipelines import FOLDER, ROOT, in_prometheus, loaded, our_labels, ours

from otel_pools._vocabulary import METRICS

VALIDATOR = ROOT.parent / "shared" / "otelcol-schema" / "validate.py"
README = (FOLDER / "README.md").read_text(encoding="utf-8")

BACKENDS = sorted(path.name for path in (FOLDER / "backends").glob("*.yaml"))
SERVERS = sorted(path.name for path in (FOLDER / "servers").glob("*.yaml"))
# What a Collector is started with: these files one upon the other.
AGENTS = [("agent.yaml",), *(("agent.yaml", f"servers/{name}") for name in SERVERS)]
GATEWAYS = [("gateway.yaml", f"backends/{name}") for name in BACKENDS]
LARGE = [(*files, "fewer-series.yaml") for files in GATEWAYS]
EVERY = AGENTS + GATEWAYS + LARGE
FILES = sorted({name for files in EVERY for name in files})

# By its own name or by the one in Prometheus; `otel_pools` alone is the package, and no metric.
NAMES = re.compile(r"\b(?:(?:db|http)[._]client|otel_pools)[._][a-z_.]*[a-z]")
VARIABLE = re.compile(r"\$\{env:(\w+)(?::-([^}]*))?\}")


def upon(below: Any, above: Any) -> Any:
    """Two configurations as the Collector merges them: mappings are joined, anything else is replaced."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    both = {key: upon(below[key], value) if key in below else value for key, value in above.items()}
    return below | both


def joined(files: tuple[str, ...]) -> Any:
    return functools.reduce(upon, map(read, files))


@functools.cache
def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text("utf-8"))


@functools.cache
def merged(files: tuple[str, ...]) -> dict[str, Any]:
    """The configuration as the Collector sees it, when no variable of the environment is set."""
    text = VARIABLE.sub(lambda variable: variable[2] or "", yaml.safe_dump(joined(files)))
    return yaml.safe_load(text)


def blocks(language: str) -> list[str]:
    """The fenced blocks of the README in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def verdict(tmp_path_factory):
    """What the validator says, of all combinations at once."""
    pytest.importorskip("jsonschema")
    if not VALIDATOR.exists():
        pytest.skip("the Collector's schemas (../shared/otelcol-schema) are not beside this repository")
    folder = tmp_path_factory.mktemp("merged")
    for files in EVERY:
        (folder / name_of(files)).write_text(yaml.safe_dump(joined(files)))
    command = [sys.executable, VALIDATOR, *sorted(folder.iterdir())]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=100).stdout


def name_of(files: tuple[str, ...]) -> str:
    return "+".join(name.replace("/", "_").removesuffix(".yaml") for name in files) + ".yaml"


@pytest.mark.parametrize("files", EVERY, ids=name_of)
def test_schemas_accept_it(files, verdict):
    """Every component of every combination is configured as its upstream schema says."""
    said = [line for line in verdict.splitlines() if f"/{name_of(files)}: " in line]

    assert [line.endswith(": ok") for line in said] == [True], "\n".join(said)


@pytest.mark.parametrize("files", EVERY, ids=name_of)
@pytest.mark.parametrize("role", ["receivers", "processors", "exporters"])
def test_pipelines_and_components_fit(files, role):
    """A pipeline names only what is configured, and whatever is configured is in a pipeline."""
    config = merged(files)
    named = {name for pipeline in config["service"]["pipelines"].values() for name in pipeline[role]}

    assert set(config[role]) == named


@pytest.mark.parametrize("files", EVERY, ids=name_of)
def test_memory_is_limited_first_and_batched_last(files):
    """No pipeline keeps anything before it knows that there is room, and each sends in batches."""
    for pipeline in merged(files)["service"]["pipelines"].values():
        assert pipeline["processors"][0] == "memory_limiter"
        assert pipeline["processors"][-1] == "batch"


@pytest.mark.parametrize("files", EVERY, ids=name_of)
def test_what_cannot_be_sent_is_kept_and_tried_again(files):
    """Every exporter tries again, with a queue in a file that the Collector has; remote write's is in memory."""
    config = merged(files)
    for name, exporter in config["exporters"].items():
        if name == "prometheus":  # it is asked, and sends nothing
            continue
        assert True is exporter["retry_on_failure"]["enabled"]
        queue = exporter.get("remote_write_queue") or exporter["sending_queue"]
        assert True is queue["enabled"]
        assert name == "prometheusremotewrite" or queue["storage"] == "file_storage"
    assert set(config["extensions"]) == set(config["service"]["extensions"]) >= {"file_storage"}


@pytest.mark.parametrize("files", EVERY, ids=name_of)
def test_listens_on_loopback_by_default(files):
    """Nobody outside the machine can reach what was not opened on purpose."""
    config = merged(files)
    listeners = [config["extensions"]["health_check"], config["exporters"].get("prometheus")]
    listeners += [
        p for name, r in config["receivers"].items() if name.startswith("otlp") for p in r["protocols"].values()
    ]

    assert {"127.0.0.1"} == {where["endpoint"].partition(":")[0] for where in listeners if where}


@pytest.mark.parametrize("files", EVERY, ids=name_of)
def test_backend_is_asked_for_and_encrypted_by_default(files):
    """Nothing leaves the machine unless a backend is named, and then not in the clear unless that is said too."""
    exporters = merged(files)["exporters"].items()
    away = {name: exporter for name, exporter in exporters if not name.startswith(("prometheus", "loadbalancing"))}

    for name, exporter in away.items():
        assert not exporter["api"]["key"] if name == "datadog" else exporter["endpoint"] is None
        assert not exporter.get("tls", {}).get("insecure")


@pytest.mark.parametrize("files", GATEWAYS + LARGE, ids=name_of)
def test_gateway_has_two_tiers(files):
    """The first tier hands on to the second, traces by their id and metrics by process, and only the second sends."""
    config = merged(files)
    pipelines, exporters = config["service"]["pipelines"], config["exporters"]
    peer = config["receivers"]["otlp/peers"]["protocols"]["grpc"]["endpoint"].rpartition(":")[2]

    for signal, key in (("traces", "traceID"), ("metrics", "resource")):
        (balancer,) = pipelines[signal]["exporters"]
        assert key == exporters[balancer]["routing_key"]
        assert peer == exporters[balancer]["resolver"]["dns"]["port"]
    second = [name for name, pipeline in pipelines.items() if pipeline["receivers"] == ["otlp/peers"]]
    assert {"traces/decided", "metrics/owned"} == set(second)
    assert not [e for name in second for e in pipelines[name]["exporters"] if e.startswith("loadbalancing")]


def test_gateway_keeps_what_we_call_a_wait():
    """Tail sampling keeps traces by the name that our spans have, and decides when a pool's own timeout is over."""
    from otel_pools._model import Identity
    from otel_pools._vocabulary import span_name

    sampling = read("gateway.yaml")["processors"]["tail_sampling"]
    policy = next(policy for policy in sampling["policies"] if policy["name"] == "failed-or-slow-acquire")
    patterns = {
        re.search(r'IsMatch\(name, "([^"]+)"\)', condition)[1] for condition in policy["ottl_condition"]["span"]
    }

    assert all(re.search(pattern, span_name(Identity("sqlalchemy"))) for pattern in patterns)
    assert int(sampling["decision_wait"].removesuffix("s")) > 30


def test_several_conditions_are_alternatives():
    """A trace is kept if its acquire span failed or if it was slow: two conditions, not one with both."""
    policies = read("gateway.yaml")["processors"]["tail_sampling"]["policies"]
    failed, slow = next(p for p in policies if p["type"] == "ottl_condition")["ottl_condition"]["span"]

    assert "STATUS_CODE_ERROR" in failed
    assert "end_time_unix_nano - start_time_unix_nano >" in slow
    assert "STATUS_CODE_ERROR" not in slow


@pytest.mark.parametrize("name", [*FILES, "docker-compose.yaml", "kustomization.yaml", "README.md"])
def test_names_exist(name):
    """Each metric, series and attribute that a file mentions is one that we emit."""
    spoken = (FOLDER / name).read_text("utf-8")
    known = {metric.name for metric in METRICS} | ours() | our_labels()
    known |= {key for metric in METRICS for key in (metric.pool_key, *metric.keys)}

    assert set() == set(NAMES.findall(spoken)) - known


def test_fewer_series_keeps_the_identity():
    """What is added up for large fleets keeps all that tells one pool from another."""
    statements = read("fewer-series.yaml")["processors"]["transform/fewer-series"]["metric_statements"][0]["statements"]
    for statement in statements:
        name = re.search(r'name == "([^"]+)"', statement)[1]
        (metric,) = (metric for metric in METRICS if metric.name == name)
        kept = set(re.findall(r'"([^"]+)"', statement)) - {"sum", name}
        assert {metric.pool_key, "server.address", "server.port"} <= kept
        assert not kept & set(metric.keys)


@pytest.mark.parametrize("name", FILES)
def test_every_variable_is_explained_where_it_is_used(name):
    """Whoever reads the head of a file learns of every variable in it."""
    text = (FOLDER / name).read_text("utf-8")
    head = "".join(itertools.takewhile(lambda line: line.startswith("#"), text.splitlines(keepends=True)))

    assert set() == {variable for variable, _ in VARIABLE.findall(text) if variable not in head}


@pytest.mark.parametrize("name", SERVERS)
def test_servers_are_named_as_the_pools_name_them(name):
    """What a server says carries the address and the port under the names that the pools use, to stand beside them."""
    kind = name.removesuffix(".yaml")
    config = read(f"servers/{name}")
    statements = config["processors"][f"transform/{kind}"]["metric_statements"][0]["statements"]
    (pipeline,) = config["service"]["pipelines"].values()

    assert {"server.address", "server.port"} <= {re.search(r'attributes\["([^"]+)"\]', text)[1] for text in statements}
    assert f"transform/{kind}" in pipeline["processors"]


def test_postgresql_answers_the_query(postgres):
    """A real PostgreSQL answers what the Collector asks it, with the columns that become values and attributes."""
    psycopg = pytest.importorskip("psycopg")
    (query,) = read("servers/postgresql.yaml")["receivers"]["sqlquery/postgresql"]["queries"]
    wanted = {
        column for metric in query["metrics"] for column in (metric["value_column"], *metric["attribute_columns"])
    }
    url = postgres.url()

    with psycopg.connect(url, application_name="idler") as idler, psycopg.connect(url) as asker:
        idler.execute("SELECT 1")
        answer = asker.execute(query["sql"])
        columns = [column.name for column in answer.description]
        rows = [dict(zip(columns, row, strict=True)) for row in answer]

    assert wanted == set(columns)
    (row,) = (row for row in rows if row["application_name"] == "idler")
    assert (row["state"], row["connections"]) == ("idle in transaction", 1)
    assert row["oldest"] >= 0


def test_compose_starts_what_is_there():
    """Docker Compose mounts files that exist, opens ports on this machine only, and passes every variable on."""
    services = read("docker-compose.yaml")["services"]
    mounts = [mount.split(":") for service in services.values() for mount in service["volumes"]]
    backends = "".join((FOLDER / "backends" / name).read_text("utf-8") for name in BACKENDS)
    used = {variable for variable, _ in VARIABLE.findall(backends)}

    assert [mount for mount in mounts if mount[0].startswith(".") and not (FOLDER / mount[0]).exists()] == []
    assert all(port.startswith("127.0.0.1:") for service in services.values() for port in service.get("ports", ()))
    assert set() == used - set(services["gateway"]["environment"])


def test_two_variables_are_enough():
    """With two variables the gateway has all it needs, for any OTLP backend and for Datadog."""
    assert {"OTLP_ENDPOINT", "OTLP_AUTHORIZATION"} == required("backends/otlp.yaml")
    assert {"DD_API_KEY"} == required("backends/datadog.yaml")
    assert set() == required("gateway.yaml")
    assert {"GATEWAY"} == required("agent.yaml")
    secret = (FOLDER / "backend.env").read_text().splitlines()
    assert required("backends/otlp.yaml") == {line.rstrip("=") for line in secret if line.endswith("=")}


def required(name: str) -> set[str]:
    """The variables of a file that have no default; an empty one counts."""
    text = (FOLDER / name).read_text("utf-8")
    return set(re.findall(r"\$\{env:(\w+)\}", text))


def test_kubernetes_files_fit_each_other():
    """What one Kubernetes file names, another one or the kustomization defines."""
    kustomization = read("kustomization.yaml")
    documents = [
        document
        for path in sorted((FOLDER / "kubernetes").glob("*.yaml"))
        for document in yaml.safe_load_all(path.read_text("utf-8"))
    ]
    by_kind = {(document["kind"], document["metadata"]["name"]): document for document in documents}
    gateway = by_kind["StatefulSet", "otel-gateway"]["spec"]
    (container,) = gateway["template"]["spec"]["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    (configs,), (secrets,) = kustomization["configMapGenerator"], kustomization["secretGenerator"]

    assert all((FOLDER / path).exists() for path in kustomization["resources"])
    assert all((FOLDER / entry.rpartition("=")[2]).exists() for entry in configs["files"] + secrets["envs"])
    assert {f"--config=/etc/otelcol/{entry.partition('=')[0]}" for entry in configs["files"]} == set(container["args"])
    assert configs["name"] == gateway["template"]["spec"]["volumes"][0]["configMap"]["name"]
    assert secrets["name"] == container["envFrom"][0]["secretRef"]["name"]
    peers = environment["GATEWAY_PEERS"].partition(".")[0]
    assert by_kind["Service", peers]["spec"]["clusterIP"] == "None"
    assert peers == gateway["serviceName"]
    ports = {port["containerPort"] for port in container["ports"]}
    services = [document for (kind, _), document in by_kind.items() if kind == "Service"]
    assert ports == {port["port"] for service in services for port in service["spec"]["ports"]}


def test_instrumentation_exports_as_it_says():
    """The operator's resource sends OTLP over HTTP to the port on which the gateway takes that in."""
    spec = loaded(FOLDER / "kubernetes" / "instrumentation.yaml")["spec"]
    environment = {entry["name"]: entry["value"] for entry in spec["python"]["env"]}
    http = merged(GATEWAYS[0])["receivers"]["otlp"]["protocols"]["http"]["endpoint"]

    assert environment["OTEL_EXPORTER_OTLP_PROTOCOL"] == "http/protobuf"
    assert http.rpartition(":")[2] == spec["exporter"]["endpoint"].rpartition(":")[2]
    assert spec["exporter"]["endpoint"].startswith("http://otel-gateway.observability.")


def test_readme_names_every_file():
    """Whoever reads the README learns of every file that a Collector is started with."""
    assert [name for name in FILES if name not in README] == []


def test_readme_table_pairs_metrics_with_their_series():
    """Each row of the table names exactly the series that its metric becomes in Prometheus."""
    metrics = {metric.name: metric for metric in METRICS}
    rows = re.findall(r"^\| `((?:db|http|otel_pools)\.\S+)` \| (.+) \|$", README, re.MULTILINE)

    assert rows
    assert {name: in_prometheus(metrics[name]) for name, _ in rows} == {
        name: set(re.findall(r"`(\S+)`", series)) for name, series in rows
    }
