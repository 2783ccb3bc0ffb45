"""The table of cycles as a picture for the docs: an SVG, written by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

WIDTH, LEFT, ROW, BAR = 860, 250, 46, 11
COLOURS = {"ours": "#2f7ed8", "full": "#8bbc21", "peer": "#b9b9b9"}
STYLE = "text{font:12px system-ui,sans-serif;fill:#777}.n{font-weight:600}"


def bars(parts: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, float]]]:
    """Each cycle on stubs or a server: its name, ours / bare, all on / bare, and that of what else there is."""
    for told in parts.values():
        for name, row in told["rows"].items():
            _, *ratios = [value for key, value in row.items() if key.endswith("/bare")]
            yield name, dict(zip(COLOURS, ratios, strict=False))


def svg(parts: Mapping[str, Any]) -> str:
    """Two or three bars a cycle, from 1 (bare) on."""
    rows = list(bars(parts))
    most = max(value for _, ratios in rows for value in ratios.values())
    height = ROW * len(rows) + 60
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">']
    lines += [f"<style>{STYLE}</style>", "<title>Time of a cycle, as a multiple of the bare one</title>"]
    for place, (name, ratios) in enumerate(rows):
        lines += _row(40 + ROW * place, name, ratios, (WIDTH - LEFT - 60) / (most - 1))
    return "\n".join([*lines, *_legend(), _bare(height), "</svg>", ""])


def _row(top: int, name: str, ratios: Mapping[str, float], scale: float) -> Iterator[str]:
    yield f'<text x="{LEFT - 12}" y="{top + 20}" text-anchor="end">{escape(name)}</text>'
    for place, (way, ratio) in enumerate(ratios.items()):
        yield from _bar(top + (BAR + 1) * place, way, ratio, scale)


def _bar(top: int, way: str, ratio: float, scale: float) -> Iterator[str]:
    # What is not slower than bare is noise, and has no length.
    length = max(ratio - 1, 0) * scale
    yield f'<rect x="{LEFT}" y="{top}" width="{length:.1f}" height="{BAR}" fill="{COLOURS[way]}"/>'
    yield f'<text x="{LEFT + length + 5:.1f}" y="{top + 10}">{ratio:.2f}</text>'


def _legend() -> Iterator[str]:
    names = {"ours": "holders off", "full": "all on", "peer": "official or native instrumentation"}
    for place, (way, name) in enumerate(names.items()):
        left = LEFT + 110 * place
        yield f'<rect x="{left}" y="12" width="{BAR}" height="{BAR}" fill="{COLOURS[way]}"/>'
        yield f'<text class="n" x="{left + 17}" y="22">{name}</text>'
    yield f'<text x="{LEFT - 12}" y="22" text-anchor="end">times of the bare cycle, from 1</text>'


def _bare(height: int) -> str:
    return f'<line x1="{LEFT}" x2="{LEFT}" y1="34" y2="{height - 12}" stroke="#777"/>'
