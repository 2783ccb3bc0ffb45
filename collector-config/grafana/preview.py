"""
Draw what a dashboard asks: each panel from its JSON, with what a real Prometheus answers after the load of `stage.py`.

    pip install matplotlib; python collector-config/grafana/preview.py docs/img

Not Grafana, and says so on each picture.
"""

# ruff: noqa: INP001, T201  # a script

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
from PIL import Image
from stage import Played, played

mpl.use("Agg")
from matplotlib import pyplot as plt  # after the choice of how to draw

FOLDER = Path(__file__).parent
SECONDS = 24.0
ONE = "shop"  # the pool that is chosen where one must be
COLUMNS, ROW = 3, 2.6  # panels in a row, inches
MOST = 12  # lines that a legend has room for
UNITS = {"s": "seconds", "percentunit": "share", "cps": "per second", "short": ""}
LABEL = "Preview drawn by matplotlib from the dashboard's JSON and live Prometheus data of the test load. Not Grafana."


def draw(board: dict[str, Any], seen: Played) -> plt.Figure:
    """All panels but tables."""
    panels = [panel for panel in board["panels"] if panel["type"] in {"stat", "timeseries"}]
    rows = -(-len(panels) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(6 * COLUMNS, ROW * rows), squeeze=False)
    pool = (
        ONE if any(not choice["multi"] for choice in board["templating"]["list"] if choice["name"] == "pool") else ".*"
    )
    for ax, panel in zip(axes.flat, panels, strict=False):
        _panel(ax, panel, seen, pool)
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    figure.suptitle(f"{board['title']}\n{LABEL}", fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    return figure


def _panel(ax: Any, panel: dict[str, Any], seen: Played, pool: str) -> None:
    lines = [(target, line) for target in panel["targets"] for line in seen.lines(target["expr"], pool)]
    for target, line in lines:
        times, values = zip(*((float(at) - seen.start, float(value)) for at, value in line["values"]), strict=True)
        ax.plot(times, values, label=legend(target.get("legendFormat", ""), line["metric"]))
    if not lines:
        ax.text(0.5, 0.5, f"nothing for {pool}", ha="center")
    for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"][1:]:
        if step["value"] <= ax.get_ylim()[1]:
            ax.axhline(step["value"], color=step["color"], linestyle="--", linewidth=0.8)
    ax.set_title(panel["title"], fontsize=9, loc="left", fontweight="bold")
    ax.set_ylabel(UNITS[panel["fieldConfig"]["defaults"]["unit"]], fontsize=7)
    ax.tick_params(labelsize=7)
    ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
    ax.grid(alpha=0.3)
    if 1 < len(lines) <= MOST:
        ax.legend(fontsize=5.5, ncols=2, loc="upper left")


def legend(pattern: str, labels: dict[str, str]) -> str:
    """The name of a line, as Grafana fills it in."""
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda key: labels.get(key[1], ""), pattern).strip()


def main() -> None:
    """Play, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--boards", nargs="+", default=["overview", "pool", "streams", "servers"])
    chosen = parser.parse_args()
    with played(SECONDS) as seen:
        for name in chosen.boards:
            board = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
            figure = draw(board, seen)
            file = chosen.folder / f"dashboard-{name}-preview.png"
            figure.savefig(file, dpi=70)
            plt.close(figure)
            # A few colours do, at a fraction of the bytes.
            Image.open(file).convert("RGB").quantize(48).save(file, optimize=True)
            print(file)


if __name__ == "__main__":
    main()
