"""Who holds the connections of a pool, in words that a person on call can use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opentelemetry.trace import SpanContext, get_current_span

from ._leases import Lease, Loan, site, stack
from ._model import Holder

if TYPE_CHECKING:
    from ._registry import Registry
    from ._watch import Ledger


def holders_of(ledger: Ledger, registry: Registry, now: float) -> list[Holder]:
    """Those of one pool name, who has held longest first; *now* is on the clock of `_watch`."""
    return [_holder(ledger.identity.name, key, lease, registry, now) for key, lease in longest(ledger)]


def longest(ledger: Ledger) -> list[tuple[int, Lease]]:
    """The leases by the ids of what is held, who has held longest first."""
    # list() copies in one step: other threads go on writing.
    return sorted(list(ledger.leases.items()), key=lambda item: item[1][0])  # noqa: C414  # as said


def _holder(pool: str, key: int, lease: Lease, registry: Registry, now: float) -> Holder:
    loan, span, watch = Loan(*lease), span_of(lease), registry.owners.get(key)
    busy = None if watch is None else watch.busy_for(key, lease)
    return Holder(
        pool=pool,
        held_s=round(now - loan.since, 6),
        call_site=site(lease),
        via=None if loan.via is None else loan.via.co_name,
        trace_id=None if span is None else f"{span.trace_id:032x}",
        span_id=None if span is None else f"{span.span_id:016x}",
        task=loan.name,
        kind=registry.target.purpose(loan),
        busy_s=None if busy is None else round(busy, 6),
        stack=stack(loan),
    )


def span_of(lease: Lease) -> SpanContext | None:
    """The span that was current where the connection was borrowed."""
    context = Loan(*lease).context
    if context is None:
        return None
    span: SpanContext = context.copy().run(get_current_span).get_span_context()
    return span if span.is_valid else None


def told(holder: Holder) -> str:
    """One holder, for the log."""
    parts = (
        f"for {holder.held_s:.2f} s",
        holder.call_site and f"from {holder.call_site}",
        holder.via and f"by {holder.via}()",
        holder.task and f"in {holder.task}",
        holder.trace_id and f"trace {holder.trace_id}",
        holder.kind,
        holder.busy_s is not None and f"{holder.busy_s:.2f} s of that in the database",
    )
    return ", ".join(part for part in parts if part)
