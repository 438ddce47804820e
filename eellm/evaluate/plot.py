"""The curve as a picture: agreement, and below it perplexity, against measured speed-up.

In: a curve's JSON form. Out: a file (.png, .svg), or SVG text for a page. matplotlib is an optional extra; its
object API is used, so that no state outlives a call.
"""

import io
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
NEAR = 0.06
"""Points nearer than this, as a share of the panel, have one label."""


def save_plot(curve: Mapping[str, Any], path: Path) -> None:
    """Writes the picture; the suffix chooses the format. Raises ConfigError without matplotlib."""
    figure = _draw(curve)
    with _settings():
        figure.savefig(path, facecolor="white", dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)


def inline_svg(curve: Mapping[str, Any]) -> str:
    """The picture as an <svg> element in the colours of the page that it is put into.

    It refers to nothing outside of itself. Raises ConfigError without matplotlib.
    """
    figure, buffer = _draw(curve), io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with _settings():
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"| (width|height)="[\d.]+pt"', "", text)
    return text.replace("<svg", '<svg role="img" aria-label="Agreement and perplexity against speed-up"', 1)


def _settings() -> Any:
    import matplotlib

    return matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "eellm"})


def _draw(curve: Mapping[str, Any]) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("pictures need one more package: pip install 'eellm[plot]'") from None
    figure = Figure(figsize=(6.4, 6.0), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    points = curve["points"]
    _panel(top, points, [100 * point["agreement"] for point in points], BLUE, "agrees with the final exit (%)")
    _panel(bottom, points, [point["perplexity"] for point in points], VERMILION, "perplexity")
    bottom.set_xlabel(f"measured speed-up over full depth ({curve['policy']}, batch 1)", color=INK)
    return figure


def _panel(
    axes: "Axes", points: Sequence[Mapping[str, Any]], ys: Sequence[float | None], colour: str, name: str
) -> None:
    shown = [(point, y) for point, y in zip(points, ys, strict=True) if y is not None]
    places = [(point["measured"]["speedup"], y) for point, y in shown]
    axes.axvline(1, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    for point, y in shown:  # how far the prompts' ratios reach
        axes.plot(point["measured"]["speedup_range"], (y, y), color=colour, linewidth=1, alpha=0.35)
    axes.plot(*zip(*places, strict=True), color=colour, linewidth=1.5, marker="o", markersize=5)
    axes.margins(0.08, 0.12)
    axes.set_ylabel(name, color=INK)
    axes.tick_params(colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    _label(axes, places, [point["threshold"] for point, _ in shown])


def _label(axes: "Axes", places: Sequence[tuple[float, float]], thresholds: Sequence[float]) -> None:
    """Writes thresholds beside their points; neighbours that lie together share a label."""
    in_panel = (axes.transData + axes.transAxes.inverted()).transform(places)
    groups: list[list[int]] = []
    for number, place in enumerate(in_panel):
        if groups and max(abs(place - in_panel[groups[-1][0]])) < NEAR:
            groups[-1].append(number)
        else:
            groups.append([number])
    for group in groups:
        first, last = thresholds[group[0]], thresholds[group[-1]]
        text = f"τ {first:g}" if len(group) == 1 else f"τ {first:g} … {last:g}"
        axes.annotate(text, places[group[0]], (6, 5), textcoords="offset points", color=INK, fontsize=8.5)
