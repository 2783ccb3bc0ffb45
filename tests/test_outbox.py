"""The outbox: what is put into it is counted once, delivered once, and never too much."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import set_span_in_context

from otel_pools import _outbox
from otel_pools._leases import lend
from otel_pools._model import Tally, Timing
from otel_pools._outbox import Batch, Event, Histograms, Note, Outbox

NOBODY = Histograms(None, None, None, None)
IDENTITY = {"db.system.name": "postgresql", "db.client.connection.pool.name": "app"}


@pytest.fixture
def outbox():
    """An empty one."""
    return Outbox()


@pytest.fixture
def histograms(telemetry):
    """The SDK's, by the names of their fields."""
    meter = telemetry.meter_provider.get_meter("otel_pools")
    return Histograms(*map(meter.create_histogram, Histograms._fields))


@pytest.fixture
def alone(outbox):
    """Somebody else counts for as long as the test wants."""
    with outbox._folding:
        yield


def note(seconds=0.5, path="new", error=None, context=None, at=7.0):
    return Note(seconds, path, error, context, at)


def event(what):
    return Event(what, lend(0.0), 1.0)


def fill(outbox):
    """Two waits, and one, three, four and five of the rest."""
    outbox.waits += [0.1, 0.2]
    outbox.notes.append(note())
    outbox.uses += [1.0] * 3
    outbox.creates += [2.0] * 4
    outbox.lives += [3.0] * 5


# -- what is counted -------------------------------------------------------------------


def test_an_empty_outbox_has_counted_nothing(outbox):
    """Before anything happens every number is 0, and what nobody measures is unknown."""
    outbox.fold()

    assert outbox.tally() == Tally()
    assert outbox.tally().busy is None


def test_each_wait_is_a_checkout(outbox):
    """Waits of the common kind took an idle connection; the others say what they took, and what was wrong."""
    outbox.waits += [0.1, 0.2]
    outbox.queues += [0.1, 0.2]
    outbox.notes += [note(), note(error="timeout"), note(error="timeout"), note(path="queued")]
    outbox.fold()
    outbox.waits.append(0.3)
    outbox.queues.append(0.3)
    outbox.fold()

    tally = outbox.tally()

    told = {("idle", None): 3, ("new", None): 1, ("new", "timeout"): 2, ("queued", None): 4}
    assert (tally.checkouts, tally.timeouts) == (told, 2)


def test_without_waits_there_is_no_checkout(outbox):
    """Of a path that nobody took there is not even a 0."""
    outbox.uses.append(1.0)
    outbox.fold()

    assert outbox.tally().checkouts == {}


def test_what_is_opened_and_closed_is_counted(outbox):
    """Creations add up, closes by their reasons."""
    for _ in range(2):
        outbox.creates += [0.1, 0.2]
        outbox.closes += ["recycle", "dispose", "recycle"]
        outbox.fold()

    assert (outbox.tally().created, outbox.tally().closed) == (4, {"recycle": 4, "dispose": 2})


@pytest.mark.parametrize("one", ["waits", "queues", "notes", "uses", "creates", "closes", "lives", "busies", "events"])
def test_each_list_alone_is_reason_to_count(outbox, one):
    """Whatever has something in it is emptied."""
    samples = {"notes": note(), "closes": "recycle", "events": event("nested")}
    getattr(outbox, one).append(samples.get(one, 0.1))
    outbox.fold()

    assert getattr(outbox, one) == []


def test_what_the_server_worked_adds_up(outbox):
    """Seconds that the server worked are one sum."""
    outbox.busies += [1.0, 2.0]
    outbox.fold()
    outbox.busies.append(4.0)
    outbox.fold()

    assert outbox.tally().busy == 7.0


def test_events_are_counted_by_what_they_are(outbox):
    """Nested, inherited and collected ones are numbers, and all of them news."""
    told = ["nested", "inherited", "inherited", "collected", "collected", "collected", "late"]
    for _ in range(2):
        outbox.events += map(event, told)
        outbox.fold()

    tally = outbox.tally()

    assert (tally.nested, tally.inherited, tally.leaked) == (2, 4, {"collected": 6})
    assert [each.what for each in outbox.news] == told * 2


def test_of_too_many_events_the_last_are_told(outbox, monkeypatch):
    """Only so many wait to be said; all are counted."""
    outbox.events += [event("nested") for _ in range(_outbox.WORDS + 1)]
    outbox.fold()

    assert (outbox.tally().nested, len(outbox.news)) == (_outbox.WORDS + 1, _outbox.WORDS)


def test_connections_that_are_out_for_too_long_add_up(outbox):
    """Each that is overdue is one leak."""
    outbox.overdue()
    outbox.overdue()

    assert outbox.tally().leaked == {"overdue": 2}


def test_what_somebody_else_has_counted_has_no_path(outbox):
    """It adds to the checkouts, once; a failure among it is known to have been just now, and none is no failure."""
    outbox.counted(None, 5)
    outbox.counted("timeout", 2)
    outbox.counted("exhausted", 0)
    outbox.counted(None, 3)

    tallies = [outbox.tally(), outbox.tally()]

    assert [each.checkouts for each in tallies] == [{(None, None): 8, (None, "timeout"): 2, (None, "exhausted"): 0}] * 2
    assert tallies[1].timeouts == 2
    assert outbox.period.failures.keys() == {"timeout"}
    assert 0 <= outbox.period.ago()["timeout"] < 60


def test_what_waits_is_not_in_the_tally(outbox):
    """A tally says what has been counted; asking for it counts nothing."""
    outbox.waits.append(0.1)

    assert outbox.tally().checkouts == {}
    assert outbox.waits == [0.1]


# -- what the statistics get -----------------------------------------------------------


def test_the_period_has_each_sample(outbox):
    """Waits of both kinds, uses and creations are timed, in seconds."""
    fill(outbox)
    outbox.fold()

    tally, *timings = outbox.account()

    assert [(each.count, each.max_s) for each in timings] == [(3, 0.5), (3, 1.0), (4, 2.0)]
    assert tally == outbox.tally()


def test_a_restart_begins_anew(outbox):
    """What happened before, counted or still waiting, is not of the new period, and the counters go on."""
    fill(outbox)
    outbox.restart(4)
    before, peak = outbox.account(), outbox.period.peak()
    outbox.waits.append(0.1)
    outbox.fold()

    tally, waits, *_ = outbox.account()

    assert (before[0].created, [count for count in before[0].checkouts.values() if count]) == (0, [])
    assert (before[1:], peak) == ((Timing(), Timing(), Timing()), 4)
    assert (tally.checkouts["idle", None], waits.count, outbox.tally().checkouts["idle", None]) == (1, 1, 3)


def test_the_last_failure_of_a_kind_is_known(outbox):
    """Of each error the moment of the last one is kept; what went well leaves none."""
    outbox.notes += [note(error="timeout", at=3.0), note(at=9.0), note(error="cancelled", at=5.0)]
    outbox.notes.append(note(error="timeout", at=4.0))
    outbox.fold()
    outbox.notes.append(note(at=11.0))
    outbox.fold()
    outbox.notes.append(note(error="exhausted", at=12.0))
    outbox.fold()

    assert outbox.period.failures == {"timeout": 4.0, "cancelled": 5.0, "exhausted": 12.0}


@pytest.mark.parametrize("count", [1000, 1001, 3000])
def test_of_many_samples_the_timings_are_the_same(count, histograms):
    """Whether they are counted at a collection or before, one by one or sorted, makes no difference."""
    samples = [(each * 7919) % count / 128 for each in range(count)]
    looked, collected = Outbox(), Outbox()
    for outbox in (looked, collected):
        outbox.waits += samples
        outbox.queues += samples
        outbox.uses += samples
        outbox.creates += samples
    looked.fold()
    collected.deliver(histograms, IDENTITY)

    assert collected.account() == looked.account()
    assert collected.account()[1].count == 2 * count


# -- what the SDK gets -----------------------------------------------------------------


def _told(telemetry):
    """Each metric's points: attributes beyond the identity, count and sum."""
    return {
        name: sorted(
            (
                sorted(set(point.attributes.items()) - set(IDENTITY.items())),
                IDENTITY.items() <= point.attributes.items(),
                point.count,
                round(point.sum, 6),
            )
            for metric in metrics
            for point in metric.data.data_points
        )
        for name, metrics in telemetry.read().metrics.items()
    }


def test_everything_is_delivered_once(outbox, histograms, telemetry):
    """Each sample arrives under the pool's identity, those that were counted before as well, and never again."""
    fill(outbox)
    outbox.fold()
    fill(outbox)
    for _ in range(2):
        outbox.deliver(histograms, IDENTITY)

    assert _told(telemetry) == {
        "wait": [
            ([("otel_pools.checkout.path", "idle")], True, 4, 0.6),
            ([("otel_pools.checkout.path", "new")], True, 2, 1.0),
        ],
        "use": [([], True, 6, 6.0)],
        "create": [([], True, 8, 16.0)],
        "life": [([], True, 10, 30.0)],
    }


def test_a_story_is_told_in_the_attributes(outbox, histograms, telemetry):
    """A wait is told by its path and, if it failed, its error."""
    outbox.notes += [note(1.0), note(2.0, error="timeout"), note(4.0, "queued"), note(8.0, "queued", "timeout")]
    outbox.notes += [note(16.0), note(32.0, error="timeout")]
    outbox.queues += [64.0, 128.0]
    outbox.deliver(histograms, IDENTITY)

    path, error = "otel_pools.checkout.path", "error.type"
    assert _told(telemetry)["wait"] == [
        ([(error, "timeout"), (path, "new")], True, 2, 34.0),
        ([(error, "timeout"), (path, "queued")], True, 1, 8.0),
        ([(path, "new")], True, 2, 17.0),
        ([(path, "queued")], True, 3, 196.0),
    ]


def test_a_wait_with_a_context_has_its_trace(outbox, histograms, telemetry):
    """A wait that came with a context is told like the others, and its exemplar is of its trace."""
    span = TracerProvider().get_tracer("app").start_span("request")
    outbox.notes += [note(1.0, error="timeout"), note(2.0, error="timeout", context=set_span_in_context(span))]
    outbox.deliver(histograms, IDENTITY)

    (point,) = telemetry.points("wait", error__type="timeout", otel_pools__checkout__path="new", **IDENTITY)

    assert (point.count, point.sum) == (2, 3.0)
    assert [each.trace_id for each in point.exemplars] == [span.get_span_context().trace_id]


@pytest.mark.parametrize("missing", range(4))
def test_what_nobody_wants_is_not_recorded(outbox, histograms, telemetry, missing):
    """Where there is no histogram its samples are counted and let go; the others get theirs."""
    fill(outbox)
    outbox.deliver(histograms._replace(**{Histograms._fields[missing]: None}), IDENTITY)

    assert telemetry.read().metrics.keys() == set(Histograms._fields) - {Histograms._fields[missing]}
    assert repr(outbox) == "<Outbox [0 samples waiting, 0 dropped]>"
    assert outbox.tally().created == 4


def test_what_comes_while_it_is_delivered_stays(outbox, telemetry):
    """A sample that a finaliser appends inside the delivery is for the next one."""

    def record(*_):
        outbox.uses.append(9.0)

    outbox.uses.append(1.0)
    outbox.deliver(NOBODY._replace(use=SimpleNamespace(record=record)), {})

    assert outbox.uses == [9.0]


# -- who else is at it -----------------------------------------------------------------


@pytest.mark.usefixtures("alone")
def test_whoever_finds_it_being_counted_leaves_it(outbox, histograms, telemetry, monkeypatch):
    """If who counts does not come to an end, nobody hangs: nothing is counted twice, and all of it stays."""
    monkeypatch.setattr(_outbox, "PATIENCE", 0.01)
    fill(outbox)
    outbox.fold()
    outbox.deliver(histograms, IDENTITY)
    outbox.spill()

    assert repr(outbox) == "<Outbox [15 samples waiting, 0 dropped]>"
    assert telemetry.read().metrics == {}
    assert outbox._folding.locked()


def test_a_question_waits_no_longer_than_that(outbox, alone, monkeypatch):
    """A signal handler that has interrupted who counts gets an answer all the same."""
    monkeypatch.setattr(_outbox, "PATIENCE", 0.01)
    outbox.overdue()

    assert outbox.tally().leaked == {"overdue": 1}
    assert outbox.account()[0] == outbox.tally()


def test_a_restart_leaves_what_another_counts(outbox, alone, monkeypatch):
    """A signal handler that begins a new period does not empty the lists that it has interrupted somebody at."""
    monkeypatch.setattr(_outbox, "PATIENCE", 0.01)
    outbox.waits.append(0.1)
    outbox.restart(0)

    assert outbox.waits == [0.1]


def test_whoever_counts_ends_it(outbox, histograms):
    """After each of its verbs the next one finds it free."""
    fill(outbox)
    for verb in (outbox.fold, outbox.tally, outbox.account, outbox.overdue, outbox.spill, lambda: outbox.restart(0)):
        verb()
        assert not outbox._folding.locked()
    outbox.deliver(histograms, IDENTITY)
    assert not outbox._folding.locked()


def test_a_spill_that_fails_ends_it_too(outbox, monkeypatch):
    """A mistake on the request path does not stop all counting."""
    monkeypatch.setattr(Outbox, "_fold", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        outbox.spill()

    assert not outbox._folding.locked()


# -- never too much --------------------------------------------------------------------


@pytest.mark.parametrize("one", ["waits", "queues", "uses", "creates", "lives", "notes"])
def test_what_nobody_collects_is_bounded(outbox, monkeypatch, one):
    """Up to the limit samples are kept, of each kind; one more, and all are dropped and counted."""
    monkeypatch.setattr(_outbox, "LIMIT", 10)
    sample = note() if one == "notes" else 0.1
    getattr(outbox, one).extend([sample] * 10)
    outbox.closes.append("recycle")
    outbox.fold()
    kept = repr(outbox)
    getattr(outbox, one).append(sample)
    outbox.fold()
    dropped = repr(outbox)
    getattr(outbox, one).extend([sample] * 11)
    outbox.fold()

    assert kept == "<Outbox [10 samples waiting, 0 dropped]>"
    assert dropped == "<Outbox [0 samples waiting, 11 dropped]>"
    assert outbox.tally().dropped == 22


def test_a_spill_counts_what_it_drops(outbox):
    """What was kept, and what was just appended, are dropped, each told once, and in all other counters."""
    fill(outbox)
    outbox.fold()
    fill(outbox)
    outbox.spill()
    outbox.spill()

    tally = outbox.tally()

    assert repr(outbox) == "<Outbox [0 samples waiting, 30 dropped]>"
    assert (tally.dropped, tally.created, tally.checkouts["idle", None]) == (30, 8, 4)


def test_a_batch_and_another():
    """Both are in one, kind by kind, the first before the second."""
    one, other = (Batch(*([each + number] for number in range(6))) for each in (0, 10))

    both = one.plus(other)

    assert both == Batch([0, 10], [1, 11], [2, 12], [3, 13], [4, 14], [5, 15])
    assert Batch([1], [1] * 2, [1] * 3, [1] * 4, [1] * 5, [1] * 6).sizes() == [1, 2, 3, 4, 5, 6]


def test_time_is_told_in_the_order_it_was(outbox):
    """The clock of failures is the one on which ages are asked."""
    before = time.perf_counter()
    outbox.counted("timeout", 1)
    outbox.tally()

    assert before <= outbox.period.failures["timeout"] <= time.perf_counter()
