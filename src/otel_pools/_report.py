"""What a board has heard, as one HTML page that needs nothing else: plots as inline SVG, no script, no link."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from html import escape

from ._board import Moment, Track, advice, holders
from ._screen import NOTHING, duration

WIDTH, HEIGHT = 640, 120  # of a plot
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem;color:#222}"
    "h2{margin:2rem 0 .2rem}svg{width:100%;height:auto;background:#fafafa}table{border-collapse:collapse}"
    "td,th{padding:.1rem .8rem .1rem 0;text-align:left;font-weight:normal}th{color:#666}"
    "code{overflow-wrap:anywhere}.wrong{color:#a30}.quiet{color:#666}"
    ".used{fill:#2a78c2}.idle{fill:#bcd8f0}.max{stroke:#888;stroke-dasharray:4}.waiting{stroke:#c22;stroke-width:2}"
    "polyline,line{fill:none}text{font-size:11px;fill:#666}"
)
# The browser, too, is told that there is nothing to fetch and nothing to run.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(tracks: Sequence[Track], now: float, date: float) -> str:
    """
    The page.

    Args:
        tracks: The pools, in the order in which they are told.
        now: On the clock of the tracks.
        date: In seconds since the epoch.
    """
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(date))
    title = f"{len(tracks)} connection pools, {when}"
    body = "\n".join(_section(track, now) for track in tracks) or "<p>No pool has been heard of.</p>"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f'<p class="quiet">In use (dark), idle (light), allowed (dashed), waiting for a connection or a stream (red),'
        f" of each pool while `otel-pools watch` listened.</p>\n{body}\n</body>\n</html>\n"
    )


def _section(track: Track, now: float) -> str:
    row = track.row
    gone = f" gone: not a word for {track.silent(now):.0f} s" if track.gone(now) else ""
    return "\n".join(
        (
            f'<section>\n<h2>{escape(row.name)} <span class="quiet">{escape(row.system)}</span></h2>',
            f'<p class="quiet">{escape(track.process)}{gone}</p>',
            *(f'<p class="wrong">{escape(text)}</p>' for text in advice(track)),
            *(f"<p><code>{escape(text)}</code></p>" for text in holders(track)),
            _plot(track),
            _table(track),
            "</section>",
        )
    )


def _table(track: Track) -> str:
    row = track.row
    numbers = {
        "in use": row.used,
        "idle": row.idle,
        "allowed": row.max,
        "waiting": row.waiting,
        "timeouts": row.timeouts,
        "created": row.created,
        "closed": row.closed,
        "overflow": row.overflow,
        "overdue": row.overdue,
        "leaked": row.leaked,
        "orphaned": row.orphaned,
        "streams in use": row.streams,
        "streams waited for": row.streams_pending,
        "streams allowed": row.streams_max,
    }
    times = {"oldest wait": row.oldest_wait, "oldest use": row.oldest_use, "wait p50": row.p50, "wait p95": row.p95}
    cells = {name: NOTHING if value is None else str(value) for name, value in numbers.items()}
    cells |= {name: duration(value) for name, value in times.items()}
    lines = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in cells.items() if value != NOTHING)
    return f"<table>{lines}</table>"


# -- the plot --------------------------------------------------------------------------------


def _plot(track: Track) -> str:
    moments, most = track.moments, track.row.max
    first, last = moments[0].heard, moments[-1].heard
    top = max(most or 0, *(max(one.used + one.idle, one.waiting) for one in moments), 1)

    def x(heard: float) -> float:
        return WIDTH * (heard - first) / (last - first) if last > first else 0.0

    def y(number: float) -> float:
        return HEIGHT * (1 - number / top)

    def line(value: Callable[[Moment], int]) -> list[tuple[float, float]]:
        return _steps([(x(one.heard), y(value(one))) for one in moments])

    ground = [(float(WIDTH), y(0)), (0.0, y(0))]
    limit = f'<line class="max" x1="0" x2="{WIDTH}" y1="{y(most):.1f}" y2="{y(most):.1f}"/>' if most else ""
    return (
        f'<svg viewBox="-30 -12 {WIDTH + 40} {HEIGHT + 30}" role="img">'
        f"<title>{escape(track.row.name)}: in use, idle, waiting</title>"
        f'<polygon class="idle" points="{_points([*line(lambda one: one.used + one.idle), *ground])}"/>'
        f'<polygon class="used" points="{_points([*line(lambda one: one.used), *ground])}"/>'
        f'{limit}<polyline class="waiting" points="{_points(line(lambda one: one.waiting))}"/>'
        f'<text x="-28" y="8">{top}</text><text x="-28" y="{HEIGHT}">0</text>'
        f'<text x="0" y="{HEIGHT + 14}">{duration(last - first)} in all</text></svg>'
    )


def _steps(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """What was said holds until something else is said; the last word to the edge."""
    ends = [x for x, _ in points[1:]] + [float(WIDTH)]
    return [corner for (x, y), end in zip(points, ends, strict=True) for corner in ((x, y), (end, y))]


def _points(corners: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
