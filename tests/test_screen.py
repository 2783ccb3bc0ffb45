"""From series to rows, and from rows to a table."""

from __future__ import annotations

import io

import pytest

pytest.importorskip("rich")
pytest.importorskip("opentelemetry.proto")

from rich.console import Console

from otel_pools import _screen
from otel_pools import _vocabulary as words
from otel_pools._receiver import Distribution, Point, Series
from otel_pools._screen import LiveScreen, PlainScreen, PoolRow, Status, drawing, plain, rows

METRICS = {metric.name: metric for metric in words.METRICS}
STATUS = Status(3.0, "burst: many", "from somewhere")


OPEN, MOST, QUEUE = "http.client.open_connections", "otel_pools.connection.max", "http.client.request.time_in_queue"


def series(name, now, before=None, *, pool="shop", system="postgresql", source="one", seconds=2.0, **extra):
    """A series of one of our metrics, with points *seconds* apart."""
    identity = {METRICS[name].pool_key: pool, words.SYSTEM: system, words.ADDRESS: "db"}
    if system is None:
        del identity[words.SYSTEM]

    def point(value, moment):
        return Point(source, "app", name, {**identity, **extra}, value, moment)

    return Series(point(now, 100.0 + seconds), None if before is None else point(before, 100.0))


def http(name, now, host="db", state=None, **rest):
    """A series of a pool that speaks just HTTP, for one of its origins."""
    return series(
        name, now, system=None, **{words.ADDRESS: host}, **({words.HTTP_STATE: state} if state else {}), **rest
    )


def checkouts(now, before=None, path=words.IDLE, error=None):
    return series(_screen.CHECKOUTS, now, before, **{words.PATH: path}, **({words.ERROR: error} if error else {}))


def waits(*counts, before=None, name=words.WAIT.name, system="postgresql"):
    def distribution(counts):
        return Distribution(sum(counts), 0.0, (1.0, 2.0), tuple(counts))

    return series(name, distribution(counts), distribution(before) if before else None, system=system)


def test_both_names_of_a_pool_are_one_row():
    """What comes under semconv's key and what comes under ours are the same pool."""
    [row] = rows(
        [
            series(_screen.COUNT, 2, **{words.STATE: "used"}),
            series(_screen.COUNT, 3, **{words.STATE: "idle"}),
            series(_screen.MAX, 8),
            series(_screen.PEAK, 5),
            series(_screen.OVERFLOW, 1),
            series(_screen.PENDING, 4),
            series(_screen.OLDEST, 0.5),
            series(_screen.TIMEOUTS, 6),
            series(_screen.CREATED, 7),
        ]
    )

    assert row == PoolRow(
        "shop", "postgresql", 2, 3, 8, 1, 5, 4, oldest_wait=0.5, rates={}, timeouts=6, created=7, closed=None
    )


def test_pools_and_processes_have_rows_of_their_own():
    """Another name or another process is another row, in the order of names."""
    told = [series(_screen.MAX, 1, pool="b"), series(_screen.MAX, 2, pool="a"), series(_screen.MAX, 3, source="two")]

    assert [(row.name, row.max) for row in rows([*told, series(_screen.MAX, 4)])] == [
        ("a", 2),
        ("b", 1),
        ("shop", 4),
        ("shop", 3),
    ]


def test_an_http_pool_is_a_row_like_others():
    """Its own metrics stand in the columns of those that mean the same for databases."""
    [row] = rows(
        [
            http(OPEN, 2, state="active"),
            http(OPEN, 3, state="idle"),
            http(MOST, 8),
            http("otel_pools.connection.pending_requests", 4),
            http("otel_pools.connection.timeouts", 6),
            http(_screen.CREATED, 7),
            waits(100, 4, 0, before=(100, 0, 0), name=QUEUE, system=None),
            http(_screen.STREAMS, 9, **{words.STREAM_STATE: "used"}),
            http(_screen.STREAMS, 12, **{words.STREAM_STATE: "pending"}),
            http(_screen.STREAMS_MAX, 10),
        ]
    )

    assert (row.name, row.system, row.used, row.idle, row.max) == ("shop", "http", 2, 3, 8)
    assert (row.waiting, row.timeouts, row.created, row.p50) == (4, 6, 7, 1.5)
    assert (row.streams, row.streams_pending, row.streams_max) == (9, 12, 10)
    assert (row.overflow, row.peak) == (None, None)


def test_origins_of_an_http_pool_add_up():
    """A pool that goes to many servers is one row, whichever the first was."""
    told = [http(OPEN, n, host, state) for n, host in ((1, "a"), (2, "b")) for state in ("active", "idle")]
    [row] = rows([*told, http(MOST, 8)])

    assert (row.used, row.idle, row.max) == (3, 3, 8)


def test_an_origin_that_is_gone_has_no_connections():
    """Nothing is said of an origin any more after its last connection, and so there is none."""
    told = [http(OPEN, 1, "a", "active", seconds=1.0), http(OPEN, 2, "b", "active"), http(MOST, 8)]

    assert (rows(told)[0].used, rows(told[::2])[0].used) == (2, 0)


def test_pools_of_equal_names_and_other_systems_are_two_rows():
    """A database and an HTTP server may be called the same."""
    assert [row.system for row in rows([http(MOST, 1), series(_screen.MAX, 2)])] == ["http", "postgresql"]


def test_other_metrics_are_passed_over():
    """A series without the name of a pool is nobody's row."""
    assert rows([Series(Point("one", "app", "http.server.active_requests", {}, 1, 1.0))]) == []


def test_closed_connections_add_up_over_their_reasons():
    """The table has one number for all reasons."""
    told = [series(_screen.CLOSED, 2, **{words.REASON: "recycle"}), series(_screen.CLOSED, 3, **{words.REASON: "idle"})]

    assert rows(told)[0].closed == 5


def test_rates_are_per_second_of_the_last_interval():
    """Ten more in two seconds are five a second, path by path."""
    [row] = rows([checkouts(30, 20), checkouts(6, 2, path=words.QUEUED), checkouts(8, 4, words.QUEUED, words.TIMEOUT)])

    assert row.rates == {words.IDLE: 5.0, words.QUEUED: 2.0, words.TIMEOUT: 2.0}


def test_the_first_timeout_counts():
    """A series that is new in a known pool began at nothing."""
    [row] = rows([checkouts(30, 20), checkouts(4, path=words.QUEUED, error=words.TIMEOUT)])

    assert row.rates[words.TIMEOUT] == 2.0


def test_checkouts_of_no_path_have_a_name():
    """Where a library cannot tell the paths apart, there is one number, and no three that are always 0."""
    bare = series(_screen.CHECKOUTS, 30, 20)
    failed = series(_screen.CHECKOUTS, 6, 2, **{words.ERROR: words.OTHER})
    [row] = rows([bare, failed])

    assert "  5 served, 2 _OTHER  " in plain(STATUS, [row])
    assert " 0 idle" not in plain(STATUS, [row])


def test_harms_have_columns_of_their_own():
    """What is out for too long, was left to the collector or is lost; and how old the oldest checkout is."""
    told = [
        series(_screen.OVERDUE, 1),
        series(_screen.LEAKED, 2, **{words.LEAK: words.OVERDUE}),
        series(_screen.LEAKED, 3, **{words.LEAK: words.COLLECTED}),
        series(_screen.ORPHANED, 4),
        series(_screen.OLDEST_USE, 5.5),
    ]
    [row] = rows(told)

    assert (row.overdue, row.leaked, row.orphaned, row.oldest_use) == (1, 3, 4, 5.5)


@pytest.mark.parametrize(("before", "gave_up"), [(4, 2), (None, 0)])
def test_who_gave_up_is_known_from_the_second_word_on(before, gave_up):
    """What a pool counted before it was first heard of may be long ago."""
    assert rows([series(_screen.TIMEOUTS, 6, before)])[0].gave_up == gave_up


def test_a_row_says_whose_it_is():
    """The process, when it was heard of, and how often it speaks."""

    def point(heard):
        identity = {words.SEMCONV_POOL: "shop", words.SYSTEM: "redis"}
        return Point("one", "app", _screen.MAX, identity, 1, heard, pid="7", heard=heard)

    [row] = rows([Series(point(12.0), point(10.0))])

    assert (row.source, row.service, row.pid, row.heard, row.interval) == ("one", "app", "7", 12.0, 2.0)
    assert row.key[:3] == ("shop", "one", "redis")


def test_there_is_no_rate_before_there_is_an_interval():
    """One export alone says nothing about speed."""
    assert rows([checkouts(30)])[0].rates == {words.IDLE: 0.0}


def test_a_restarted_process_has_no_negative_rate():
    """A counter that fell was begun anew."""
    assert rows([checkouts(3, 20)])[0].rates == {words.IDLE: 0.0}


def test_waits_are_those_of_the_last_interval():
    """Old waits do not hide new ones: the quantiles come from what the buckets gained."""
    [row] = rows([waits(100, 4, 0, before=(100, 0, 0))])

    assert (row.p50, row.p95) == (1.5, 1.95)


def test_nonsense_numbers_do_not_break_the_table():
    """A NaN or an infinity from another process is shown as nothing."""
    told = [series(_screen.MAX, float("nan")), series(_screen.PEAK, float("inf")), checkouts(float("nan"), 1)]

    assert (rows(told)[0].max, rows(told)[0].peak) == (0, 0)


def test_the_plain_table_has_every_number():
    """The text has the phase, a heading, a line per pool and the origin."""
    row = PoolRow(
        "shop", "postgresql", 2, 3, 8, 0, 5, 4, 1.26, {words.IDLE: 5.0, "timeout": 2.0}, 0.0012, 0.25, 6, 7, 1
    )
    phase, headings, line, origin = plain(STATUS, [row]).splitlines()

    assert (phase, origin) == ("[  3.0 s] burst: many", "from somewhere")
    assert headings.split("  ")[0] == "pool"
    assert [cell.strip() for cell in line.split("  ") if cell.strip()] == [
        "shop",
        "postgresql",
        "2/3/8",
        "-",
        "0",
        "5",
        "4",
        "1.3 s",
        "5 idle, 0 new, 0 queued, 2 timeout",
        "1.2 ms/250 ms",
        "6",
        "7/1",
    ]


def test_what_is_not_known_is_a_dash():
    """An unlimited pool has no maximum to show."""
    assert "2/-/-" in plain(STATUS, [PoolRow("shop", "", 2)])


def test_streams_are_used_pending_and_max():
    """The streams of a pool stand in one cell; before there is a connection they have no limit."""
    assert "  4/12/4  " in plain(STATUS, [PoolRow("shop", "http", 1, streams=4, streams_pending=12, streams_max=4)])
    assert "  0/0/-  " in plain(STATUS, [PoolRow("shop", "http", 1, streams=0, streams_pending=0)])


def test_without_a_pool_it_says_so():
    """Before the first export there is a sentence instead of a table."""
    assert "no pool has been heard of yet" in plain(STATUS, [])


def test_control_characters_do_not_reach_the_terminal():
    """A hostile name cannot move the cursor or change the title."""
    [row] = rows([series(_screen.MAX, 1, pool="evil\x1b]0;title\x07\r\n")])

    assert row.name == "evil?]0;title???"


def drawn(row):
    out = io.StringIO()
    Console(file=out, width=200, force_terminal=False).print(drawing(STATUS, [row]))
    return out.getvalue()


def test_the_drawing_has_a_bar():
    """Used, idle and what may still be opened are shares of the bar."""
    assert "█" * 6 + "▒" * 6 + "·" * 12 in drawn(PoolRow("shop", "postgresql", used=2, idle=2, max=8))


@pytest.mark.parametrize(("pending", "colour"), [(0, ""), (3, "red")])
def test_requests_that_wait_for_a_stream_are_red(pending, colour):
    """They are what the bar does not show, as the pool has connections left."""
    _, table, _ = drawing(STATUS, [PoolRow("shop", "http", 1, 0, 2, streams=4, streams_pending=pending)]).renderables
    [streams] = [cell for column in table.columns for cell in column.cells if str(cell).startswith("4/")]

    assert (str(streams), streams.style) == (f"4/{pending}/-", colour)


def test_a_name_is_no_markup():
    """Square brackets in a name are shown as they are."""
    assert "[red]shop" in drawn(PoolRow("[red]shop", "postgresql"))


@pytest.mark.parametrize("kind", [PlainScreen, LiveScreen])
def test_a_screen_shows_and_says_how_often(kind):
    """Each screen writes the table to where it was told, and its repr counts."""
    out = io.StringIO()
    screen = kind(out)
    screen.show(STATUS, [PoolRow("shop", "postgresql", 2)])
    screen.close()

    assert "shop" in out.getvalue()
    assert repr(screen) == f"<{kind.__name__} [1 shown]>"
