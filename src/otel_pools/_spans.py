"""A span for a wait worth seeing, written when it is over, and what is said when a pool has nothing left."""

from __future__ import annotations

from time import time_ns
from typing import TYPE_CHECKING

from opentelemetry.context import Context, get_current
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, get_current_span

from . import _vocabulary as words
from ._guard import logger, lost
from ._holders import holders_of, longest, span_of, told
from ._watch import clock

if TYPE_CHECKING:
    from ._leases import Lease
    from ._watch import Watch

# A span has at most so many links and events: those who hold longest.
MOST = 8
# Seconds between two words about one pool that has nothing left.
AGAIN = 60.0


class Spans:
    """
    Writes one INTERNAL span per wait that was slow or failed, or that had to open an overflow connection.

    Back-dated, so a quick wait costs a comparison and no call; a child of
    whatever span is current in the caller. It links to the spans that hold the
    connections now, and if the wait failed it says of each since when and from
    where.

    Attributes:
        threshold: Seconds from which on a wait is worth a span; 0 means every wait.
    """

    __slots__ = ("_said", "_tracer", "threshold")

    def __init__(self, tracer: Tracer, threshold: float) -> None:
        self._tracer = tracer
        self._said: dict[str, float] = {}  # of which pool it was said when that it has nothing left
        self.threshold = threshold

    def __repr__(self) -> str:
        return f"<Spans of waits over {self.threshold:g} s>"

    def waited(self, watch: Watch, seconds: float, path: str, error: str | None) -> Context | None:
        """Write the span; return the caller's context if an exemplar could point at its trace."""
        try:
            self._write(watch, seconds, path, error)
            context = get_current()
            return context if get_current_span(context).get_span_context().trace_flags.sampled else None
        except Exception as mistake:
            lost("a span", mistake)
            return None

    def exhausted(self, watch: Watch, seconds: float) -> None:
        """Say that somebody got none, and who holds them; once a minute for each pool."""
        name, now = watch.ledger.identity.name, clock()
        if now - self._said.get(name, -AGAIN) < AGAIN:
            return
        self._said[name] = now
        state = watch.state()
        holders = holders_of(watch.ledger, watch.registry, now)
        lines = "".join(f"\n  held {told(holder)}" for holder in holders[:MOST])
        logger.warning(
            "otel_pools: pool %s is exhausted: %s of %s connections in use%s, %s waiting, none came in %.2f s%s",
            name,
            *(_or_unknown(number) for number in (state.used, state.max)),
            f" ({stray} more in nobody's hands)" if (stray := (state.orphaned or 0) + len(watch.orphans)) else "",
            _or_unknown(state.pending),
            seconds,
            lines,
        )

    def _write(self, watch: Watch, seconds: float, path: str, error: str | None) -> None:
        end, identity = time_ns(), watch.ledger.identity
        span = self._tracer.start_span(
            words.span_name(identity),
            kind=SpanKind.INTERNAL,
            attributes={**words.attributes(identity, words.pool_key(identity)), words.PATH: path},
            start_time=end - int(seconds * 1e9),
        )
        if span.is_recording():
            _tell(span, watch, error)
        span.end(end)


def _tell(span: Span, watch: Watch, error: str | None) -> None:
    """How full the pool is, and who holds it; only of a span that somebody will see."""
    span.set_attributes(words.state(watch.state()))
    for _, lease in longest(watch.ledger)[:MOST]:
        _link(span, lease)
    if error is not None:
        span.set_attribute(words.ERROR, error)
        # No description: the message of a driver's error may quote a URL.
        span.set_status(Status(StatusCode.ERROR))
        for holder in holders_of(watch.ledger, watch.registry, clock())[:MOST]:
            span.add_event(words.HOLDER, words.held(holder))


def _link(span: Span, lease: Lease) -> None:
    holder = span_of(lease)
    # The connection that the caller itself has just got, or had before, leads nowhere.
    if holder is not None and holder.span_id != get_current_span().get_span_context().span_id:
        span.add_link(holder)


def _or_unknown(number: int | None) -> str:
    return "?" if number is None else str(number)
