"""The report's pictures, as SVG and PNG: ratios with their ranges, curves of quality against speed, losses by step.

matplotlib's object API is used, so that no state outlives a call.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from suite_rows import Row, Status

COLOURS: dict[Status, str] = {"met": "#009e73", "missed": "#d55e00", "measured": "#0072b2"}
"""Okabe and Ito's, as those of lines."""
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
INK, FAINT = "#24292f", "#8c959f"
RATIOS = ("decode", "decode-exits", "serve", "peers")
"""Parts whose ratios are of rates: more is better."""


def draw(rows: Sequence[Row], directory: Path, found: Mapping[str, Path]) -> list[str]:
    """Those for which there is something to draw; their file names, the SVGs.

    found: by part, the JSON of those that are done.
    """
    pictures = {"ratios": ratios([row for row in rows if row.part in RATIOS and row.ratio is not None])}
    if "curves" in found:
        pictures["quality-speed"] = curves(_read(found["curves"])["curves"])
    if "exits" in found:
        pictures["exit-losses"] = losses(_read(found["exits"])["variants"])
    names = []
    for name, figure in pictures.items():
        if figure is not None:
            save(figure, directory / name)
            names.append(f"{name}.svg")
    return names


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def save(figure: Figure, path: Path) -> None:
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "eellm"}):
        figure.savefig(path.with_suffix(".svg"), facecolor="white", metadata={"Date": None})
        figure.savefig(path.with_suffix(".png"), facecolor="white", dpi=130)


def ratios(rows: Sequence[Row]) -> Figure | None:
    """One line a row: the ratio, how far it reaches, and the goal as a bar."""
    if not rows:
        return None
    figure = Figure(figsize=(8.5, 1.2 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(reversed(rows)):
        colour = COLOURS[row.status]
        if row.ratio_range is not None:
            axes.plot(row.ratio_range, (place, place), color=colour, linewidth=2, alpha=0.5)
        axes.plot([row.ratio], [place], "o", color=colour)
        if row.goal is not None:
            axes.plot([float(row.goal.split()[-1])], [place], "|", color=INK, markersize=13)
    axes.axvline(1, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_yticks(range(len(rows)), [row.name for row in reversed(rows)])
    axes.set_xlabel("ours over theirs (tokens/s); a bar is the goal; green: met, red: missed, blue: no goal")
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def curves(found: Mapping[str, Any]) -> Figure | None:
    """Agreement with the final exit, and perplexity, against measured speed-up."""
    if not found:
        return None
    figure = Figure(figsize=(7.5, 6.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    for colour, (name, curve) in zip(LINES, found.items(), strict=False):
        points = curve["points"]
        speeds = [point["measured"]["speedup"] for point in points]
        for axes, key, factor in ((top, "agreement", 100), (bottom, "perplexity", 1)):
            values = [None if point[key] is None else factor * point[key] for point in points]
            axes.plot(speeds, values, "o-", color=colour, label=name)
            for point, value in zip(points, values, strict=True):
                if value is not None:
                    axes.plot(point["measured"]["speedup_range"], (value, value), color=colour, alpha=0.35)
    for axes in (top, bottom):
        axes.axvline(1, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
        axes.spines[["top", "right"]].set_visible(False)
    top.set_ylabel("agrees with the final exit (%)")
    top.legend(frameon=False)
    bottom.set_ylabel("perplexity")
    bottom.set_xlabel("measured speed-up over full depth; a line is its range over prompts")
    return figure


def losses(variants: Mapping[str, Any]) -> Figure | None:
    """A panel a variant: each exit's loss by step, with the final one's of the run without exits behind."""
    if not variants:
        return None
    plain = variants["no exits"][0]["curve"]
    others = {name: runs[0]["curve"] for name, runs in variants.items() if name != "no exits"}
    columns = min(4, len(others))
    lines = -(-len(others) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.8 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, (name, curve) in zip(panels, others.items(), strict=False):
        axes.plot(*_series(plain, "final"), color=FAINT, linestyle="--", label="no exits")
        for colour, exit in zip(LINES, [key for key in curve[0] if key != "step"], strict=False):
            axes.plot(*_series(curve, exit), color=INK if exit == "final" else colour, label=exit.replace("_", " "))
        axes.set_title(name, fontsize=10)
        axes.legend(frameon=False, fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(others) :]:
        axes.set_visible(False)
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("loss of what is held back, nats a byte", fontsize=9)
    return figure


def _series(curve: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
    return [row["step"] for row in curve], [row[name] for row in curve]
