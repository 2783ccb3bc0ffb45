"""A span for a wait worth seeing, written when it is over."""

from __future__ import annotations

from time import time_ns

from opentelemetry.context import Context, get_current
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer, get_current_span

from . import _vocabulary as words
from ._guard import lost
from ._model import Identity


class Spans:
    """
    Writes one INTERNAL span per wait that was slow or failed.

    Back-dated, so a quick wait costs a comparison and no call; a child of
    whatever span is current in the caller.

    Attributes:
        threshold: Seconds from which on a wait is worth a span; 0 means every wait.
    """

    __slots__ = ("_tracer", "threshold")

    def __init__(self, tracer: Tracer, threshold: float) -> None:
        self._tracer = tracer
        self.threshold = threshold

    def __repr__(self) -> str:
        return f"<Spans of waits over {self.threshold:g} s>"

    def waited(self, identity: Identity, seconds: float, path: str, error: str | None) -> Context | None:
        """Write the span; return the caller's context if an exemplar could point at its trace."""
        try:
            self._write(identity, seconds, path, error)
            context = get_current()
            return context if get_current_span(context).get_span_context().trace_flags.sampled else None
        except Exception as mistake:
            lost("a span", mistake)
            return None

    def _write(self, identity: Identity, seconds: float, path: str, error: str | None) -> None:
        end = time_ns()
        span = self._tracer.start_span(
            words.span_name(identity),
            kind=SpanKind.INTERNAL,
            attributes={**words.attributes(identity, words.pool_key(identity)), words.PATH: path},
            start_time=end - int(seconds * 1e9),
        )
        if error is not None:
            span.set_attribute(words.ERROR, error)
            # No description: the message of a driver's error may quote a URL.
            span.set_status(Status(StatusCode.ERROR))
        span.end(end)
