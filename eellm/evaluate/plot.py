"""The curve as a picture: agreement, and below it perplexity, against measured speed-up.

In: a curve's JSON form. Out: a file (.png, .svg), or SVG text for a page. matplotlib is an optional extra; its
object API is used, so that no state outlives a call.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eellm.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT = "#24292f", "#8c959f"
BLUE, VERMILION = "#0072b2", "#d55e00"  # Okabe and Ito's
LABEL = (0.09, 0.06)
"""A label's width and height, as shares of the curve's."""
WIDE = 10
"""From this ratio of the largest to the smallest perplexity, the axis is logarithmic."""


def save_plot(curve: Mapping[str, Any], path: Path) -> None:
    """Writes the picture; the suffix chooses the format. Raises ConfigError without matplotlib."""
    figure = _draw(curve)
    with settings():
        figure.savefig(path, facecolor="white", dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)


def inline_svg(curve: Mapping[str, Any]) -> str:
    """The picture as an <svg> element in the colours of the page that it is put into.

    It refers to nothing outside of itself. Raises ConfigError without matplotlib.
    """
    figure, buffer = _draw(curve), io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with settings():
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r' xmlns(:\w+)?="[^"]*"| (width|height)="[\d.]+pt"', "", text)
    return text.replace("<svg", '<svg role="img" aria-label="Agreement and perplexity against speed-up"', 1)


def settings() -> Any:
    """matplotlib's, for text that stays text and files that are the same each time."""
    import matplotlib

    return matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "eellm"})


def _draw(curve: Mapping[str, Any]) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("pictures need one more package: pip install 'eellm[plot]'") from None
    figure = Figure(figsize=(6.4, 6.0), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    agreement = [(point, 100 * point["agreement"]) for point in curve["points"]]
    perplexity = [(point, point["perplexity"]) for point in curve["points"] if point["perplexity"] is not None]
    values = [y for _, y in perplexity]
    if values and max(values) > WIDE * min(values):
        bottom.set_yscale("log")
    _panel(top, agreement, BLUE, "agrees with the final exit (%)")
    _panel(bottom, perplexity, VERMILION, "perplexity")
    bottom.set_xlabel(f"measured speed-up over full depth ({curve['policy']}, batch 1)", color=INK)
    return figure


def _panel(axes: "Axes", points: Sequence[tuple[Mapping[str, Any], float]], colour: str, name: str) -> None:
    """Draws a curve through (point, y)."""
    axes.axvline(1, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    for point, y in points:  # how far the prompts' ratios reach
        axes.plot(point["measured"]["speedup_range"], (y, y), color=colour, linewidth=1, alpha=0.5)
    places = [(point["measured"]["speedup"], y) for point, y in points]
    axes.plot([x for x, _ in places], [y for _, y in places], color=colour, linewidth=1.5, marker="o", markersize=5)
    axes.margins(0.08, 0.12)
    axes.set_ylabel(name, color=INK)
    axes.tick_params(which="both", colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    if places:
        _label(axes, places, [point["threshold"] for point, _ in points])


def _label(axes: "Axes", places: Sequence[tuple[float, float]], thresholds: Sequence[float]) -> None:
    """Writes thresholds beside their points, on the outer side of the curve; neighbours share a label."""
    falls = places[0][1] >= places[-1][1]
    style = {"textcoords": "offset points", "color": INK, "fontsize": 8.5, "ha": "left" if falls else "right"}
    for group in _neighbours(places, is_log=axes.get_yscale() == "log"):
        first, last = thresholds[group[0]], thresholds[group[-1]]
        text = f"τ {first:g}" if len(group) == 1 else f"τ {first:g} … {last:g}"
        axes.annotate(text, places[group[0]], (6 if falls else -6, 5), **style)


def _neighbours(places: Sequence[tuple[float, float]], *, is_log: bool) -> list[list[int]]:
    """The points' numbers, in groups whose labels would lie upon each other."""
    points = [(x, math.log(y) if is_log else y) for x, y in places]
    width, height = (max(values) - min(values) or 1.0 for values in zip(*points, strict=True))
    groups: list[list[int]] = []
    for number, (x, y) in enumerate(points):
        near = groups and abs(x - points[groups[-1][0]][0]) < LABEL[0] * width
        if near and abs(y - points[groups[-1][0]][1]) < LABEL[1] * height:
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups
