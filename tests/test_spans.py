"""A span for each wait worth seeing, where it belongs in the trace, and none for the others."""

from __future__ import annotations

import time

import pytest
from opentelemetry.trace import SpanKind, StatusCode
from sqlalchemy import create_engine
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import QueuePool

import otel_pools
from otel_pools import _guard
from otel_pools._spans import Spans


@pytest.fixture
def slow():
    """An engine whose connections take 20 ms to open, and are one."""

    def create():
        import sqlite3

        time.sleep(0.02)
        return sqlite3.connect(":memory:", check_same_thread=False)

    engine = create_engine(
        "sqlite://", creator=create, poolclass=QueuePool, pool_size=1, max_overflow=0, pool_timeout=0.02
    )
    yield engine
    engine.dispose()


def watch(telemetry, **options):
    otel_pools.instrument(meter_provider=telemetry.meter_provider, tracer_provider=telemetry.tracer_provider, **options)


def test_a_slow_wait_is_a_span_of_the_caller(telemetry, slow):
    """Back-dated to when the wait began, a child of the span that waited."""
    watch(telemetry)
    with telemetry.tracer_provider.get_tracer("app").start_as_current_span("request") as request:
        slow.raw_connection().close()
    wait = telemetry.spans[0]

    assert (wait.name, wait.kind, wait.status.status_code) == ("acquire sqlite", SpanKind.INTERNAL, StatusCode.UNSET)
    assert wait.parent.span_id == request.get_span_context().span_id
    assert wait.attributes["otel_pools.checkout.path"] == "new"
    assert wait.attributes["db.system.name"] == "sqlite"
    assert wait.end_time - wait.start_time >= 0.02e9
    assert request.start_time <= wait.start_time
    assert wait.instrumentation_scope.name == "otel_pools.sqlalchemy"


def test_a_quick_wait_is_none(telemetry, slow):
    """Below the threshold nothing is written."""
    watch(telemetry)
    slow.raw_connection().close()
    slow.raw_connection().close()

    assert len(telemetry.spans) == 1


def test_a_context_is_kept_only_for_a_sampled_trace(telemetry, slow):
    """A slow wait outside any trace has nothing to point at, and is delivered with the others."""
    watch(telemetry, span_threshold=0)
    slow.raw_connection().close()
    with telemetry.tracer_provider.get_tracer("app").start_as_current_span("request"):
        slow.raw_connection().close()
    (ledger,) = otel_pools.SQLAlchemyPoolInstrumentor._registry.ledgers.values()

    assert [note.context is None for note in ledger.outbox.notes] == [True, False]


def test_threshold_zero_is_every_wait(telemetry, slow):
    """With `span_threshold=0` each checkout has a span."""
    watch(telemetry, span_threshold=0)
    slow.raw_connection().close()
    slow.raw_connection().close()

    assert [span.attributes["otel_pools.checkout.path"] for span in telemetry.spans] == ["new", "idle"]


def test_a_failed_wait_is_an_error(telemetry, slow):
    """A timeout has a span with ERROR and its error type, and no message that could quote a secret."""
    watch(telemetry, span_threshold=60)
    held = slow.raw_connection()
    with pytest.raises(PoolTimeout):
        slow.raw_connection()
    held.close()
    (span,) = telemetry.spans

    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, None)
    assert span.attributes["error.type"] == "timeout"


def test_a_broken_tracer_costs_only_the_span(telemetry, slow, monkeypatch, caplog):
    """If writing the span fails, one line says so; the checkout works and is counted."""
    monkeypatch.setattr(_guard, "loud", False)
    watch(telemetry)
    monkeypatch.setattr("otel_pools._spans.Spans._write", lambda *_: 1 / 0)
    slow.raw_connection().close()

    assert "a span: ZeroDivisionError" in caplog.text
    assert telemetry.value("otel_pools.checkouts") == 1


def test_repr(telemetry):
    """The threshold says it all."""
    tracer = telemetry.tracer_provider.get_tracer("t")

    assert repr(Spans(tracer, 0.01)) == "<Spans of waits over 0.01 s>"
