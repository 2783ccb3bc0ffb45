"""What we emit is what the semantic conventions say, and what the README says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from opentelemetry.semconv._incubating.metrics import db_metrics, http_metrics

from otel_pools import _vocabulary as words
from otel_pools._model import Identity, Load, Origin, Reading, Snapshot, Tally

README = Path(__file__).parent.parent / "README.md"
CREATORS = {
    "db.client.connection.count": db_metrics.create_db_client_connection_count,
    "db.client.connection.max": db_metrics.create_db_client_connection_max,
    "db.client.connection.idle.max": db_metrics.create_db_client_connection_idle_max,
    "db.client.connection.idle.min": db_metrics.create_db_client_connection_idle_min,
    "db.client.connection.pending_requests": db_metrics.create_db_client_connection_pending_requests,
    "db.client.connection.timeouts": db_metrics.create_db_client_connection_timeouts,
    "db.client.connection.wait_time": db_metrics.create_db_client_connection_wait_time,
    "db.client.connection.use_time": db_metrics.create_db_client_connection_use_time,
    "db.client.connection.create_time": db_metrics.create_db_client_connection_create_time,
    "http.client.open_connections": http_metrics.create_http_client_open_connections,
    "http.client.active_requests": http_metrics.create_http_client_active_requests,
    "http.client.connection.duration": http_metrics.create_http_client_connection_duration,
}


class Meter:
    """Takes down what a semconv creator asks for."""

    def __getattr__(self, method):
        return lambda **asked: (method, asked)


@pytest.mark.parametrize(
    "row", [row for row in (*words.DB, *words.HTTP) if row.name in CREATORS], ids=lambda row: row.name
)
def test_what_the_conventions_have_is_theirs(row):
    """Name, unit, description and kind are those of the semantic conventions package."""
    method, asked = CREATORS[row.name](Meter())

    assert (row.name, row.unit) == (asked["name"], asked["unit"])
    assert row.description == asked["description"]
    assert (
        method
        == {
            words.Kind.COUNTER: "create_counter",
            words.Kind.UP_DOWN: "create_up_down_counter",
            words.Kind.HISTOGRAM: "create_histogram",
        }[row.kind]
    )


def test_nothing_else_has_a_name_of_the_conventions():
    """Of the names without our prefix only one is not the conventions': .NET's for the time in the queue."""
    others = {row.name for row in words.METRICS if not row.name.startswith("otel_pools.")} - set(CREATORS)

    assert others == {"http.client.request.time_in_queue"}


def test_a_pool_has_one_column():
    """A database's pool has no HTTP metrics, and an HTTP client's none of a database."""
    assert words.foreign(Identity("lib", "redis")) == {row.name for row in words.HTTP}
    assert words.foreign(Identity("lib")) == {row.name for row in words.DB}


@pytest.mark.parametrize(
    "row", [row for row in words.METRICS if row.name.startswith("otel_pools.")], ids=lambda row: row.name
)
def test_our_own_have_our_prefix(row):
    """What the conventions do not have is ours: prefixed, counted in braces, and no gauge of unit 1."""
    assert row.name.startswith("otel_pools.")
    assert re.fullmatch(r"s|\{[a-z]+\}", row.unit)
    assert row.pool_key == "otel_pools.pool.name"


def test_names_are_unique():
    """No metric has two rows."""
    assert len({row.name for row in words.METRICS}) == len(words.METRICS)


@pytest.mark.parametrize("row", words.METRICS, ids=lambda row: row.name)
def test_the_readme_has_the_row(row):
    """The README's table has each metric with its kind, unit and attributes."""
    keys = ", ".join(f"`{key}`" for key in row.keys) or "-"

    assert f"| `{row.name}` | {row.kind.value} | `{row.unit}` | {keys} | {row.description} |" in README.read_text()


def test_the_readme_has_no_other_metric():
    """Every name in the README's tables of metrics exists."""
    named = re.findall(r"^\| `((?:db|http|otel_pools)\.[a-z_.]+)` \| [A-Z]", README.read_text(), re.MULTILINE)

    assert sorted(named) == sorted(row.name for row in words.METRICS)


@pytest.mark.parametrize("row", [row for row in words.METRICS if row.points], ids=lambda row: row.name)
def test_points_carry_only_their_keys(row):
    """The attributes of a row's points are among those it declares."""
    tally = Tally({("new", "timeout"): 1}, 1, 1, {"recycle": 1}, 1)
    snapshot = Snapshot(1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, {Origin("https", "api", 443): Load(1, 1, 1)}, {"ready": 1})
    reading = Reading(snapshot, tally, 1, 1, 1.0, 1.0)

    points = list(row.points(reading))

    assert points
    assert all(set(extra) <= set(row.keys) for _, extra in points)


@pytest.mark.parametrize(
    ("identity", "name"),
    [
        (Identity("lib", "sys", "given", "ns", "host", 1), "given"),
        (Identity("lib", "sys", None, "ns", "host", 1), "ns"),
        (Identity("lib", "sys", None, None, "host", 1), "host:1"),
        (Identity("lib", "sys", None, None, "host"), "host"),
        (Identity("lib", "sys", None, "2", "host", 1), "host:1/2"),
        (Identity("lib", "sys", "given", "2", "host"), "given"),
        (Identity("lib", "sys", None, "2"), "2"),
        (Identity("lib", "sys"), "sys"),
        (Identity("lib", ""), "lib"),
    ],
)
def test_a_name_falls_back_in_the_order_of_the_conventions(identity, name):
    """Given name, namespace, server, system, library: semantic-conventions #4097; a number goes with its server."""
    assert identity.name == name


def test_unknown_is_left_out():
    """What a library cannot tell is no attribute."""
    assert words.attributes(Identity("lib", "sqlite"), words.OUR_POOL) == {
        "otel_pools.pool.name": "sqlite",
        "db.system.name": "sqlite",
    }


def test_snapshots_add_up():
    """Two pools together: numbers add, and a number only one can tell is that one's."""
    assert Snapshot(used=1, idle=2) + Snapshot(used=3, max=5) == Snapshot(used=4, idle=2, max=5)


def test_channels_add_up():
    """Two gRPC pools together have the channels of both, by state."""
    both = Snapshot(channels={"ready": 1, "idle": 2}) + Snapshot(channels={"ready": 1})

    assert both.channels == {"ready": 2, "idle": 2}


def test_checkouts_without_a_path_stand_alone():
    """Where nobody can tell how a checkout was served, no path is told, not even as zero."""
    reading = Reading(Snapshot(), Tally({(None, None): 3, (None, "_OTHER"): 1}))
    [row] = (row for row in words.METRICS if row.name == "otel_pools.checkouts")

    assert list(row.points(reading)) == [(3, {}), (1, {"error.type": "_OTHER"})]


def test_origins_add_up():
    """Two HTTP pools together have the connections and requests of both, by origin."""
    here, there = Origin("https", "here", 443), Origin("https", "there", 443)
    both = Snapshot(origins={here: Load(1, 2, 3)}) + Snapshot(origins={here: Load(1, 0, 1), there: Load(0, 1, 0)})

    assert both.origins == {here: Load(2, 2, 4), there: Load(0, 1, 0)}
