"""A suitability report for the eye: tables for the terminal, a Markdown page, and a picture.

In: the JSON form (`Suitability.as_json`), fresh or read back from a file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eellm.errors import ConfigError
from eellm.evaluate.plot import BLUE, FAINT, INK, VERMILION, settings
from eellm.evaluate.tables import Cells

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEGEND = (
    "agrees = share of tokens whose choice is the final one. sure = share that an exit there may answer, going by its "
    "largest probability, and keep the precision asked for. first, settled = share of tokens that are right for the "
    "first time, or from then on at every layer (of those listed), at this layer and none before."
)
BOUNDS_LEGEND = (
    "by layers = every token leaves at its first right layer, tests cost nothing, nothing is caught up. bound = the "
    "best exits, if they always knew when they are right, at this machine's costs. expected = exits that go by their "
    "own sureness, at that precision, with thresholds chosen on this text."
)


def layer_cells(data: Mapping[str, Any]) -> dict[str, Cells]:
    """By title, a table for each kind of probe: one row per layer."""
    tables = {}
    for probe in data["probes"]:
        sure = [*probe["surely_right"], None]
        columns = zip(probe["layers"], probe["agreement"], sure, probe["first_right"], probe["settled"], strict=True)
        rows = tuple(
            (
                str(layer),
                f"{agrees:.1%}",
                "–" if known is None else f"{known:.1%}",
                f"{first:.1%}",
                f"{settled:.1%}",
            )
            for layer, agrees, known, first, settled in columns
        )
        title = f"{probe['name']}, {data['num_tokens']} tokens"
        tables[title] = Cells(("layer", "agrees", "sure", "first", "settled"), rows)
    return tables


def bound_cells(data: Mapping[str, Any]) -> Cells:
    """One row per kind of probe: what exits cost here and what they could give."""
    rows = []
    for probe in data["probes"]:
        costs, advice = probe["costs_s"], probe["advice"]
        layer = costs["layer"]
        rows.append(
            (
                probe["name"],
                f"{1e6 * layer:.0f} µs",
                f"{costs['exit'] / layer:.2f}",
                f"{costs['gate'] / layer:.2f}",
                f"{advice['by_layers']:.2f}×",
                _placed(advice["bound"]),
                _placed(advice["expected"]),
            )
        )
    headers = ("probe", "layer", "exit", "gate", "by layers", "bound", "expected")
    return Cells(headers, tuple(rows))


def page(data: Mapping[str, Any], name: str, picture: str | None) -> str:
    """Markdown. picture: its file's name, where there is one."""
    machine = data["machine"]
    parts = [f"# Does {name} suit early exits?", data["advice"]["text"]]
    if picture is not None:
        parts.append(f"![Agreement with the final choice, and where tokens settle, by layer]({picture})")
    parts += ["## What exits could give", bound_cells(data).as_markdown() + f"\n{BOUNDS_LEGEND}"]
    for title, cells in layer_cells(data).items():
        parts.append(f"## {title}\n\n{cells.as_markdown()}")
    parts.append(LEGEND)
    load = machine["load_average"]
    parts.append(
        f"Timed on {machine['device']}, {machine['dtype']}, threads: {machine['num_threads']}, processors: "
        f"{machine['num_cpus']}, load {load[0]:.1f} before and {load[1]:.1f} after; one sequence at a time."
    )
    return "\n\n".join(parts) + "\n"


def save_picture(data: Mapping[str, Any], path: Path) -> None:
    """Agreement by layer, and below it where tokens settle. Raises ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("pictures need one more package: pip install 'eellm[plot]'") from None
    figure = Figure(figsize=(6.4, 5.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    for probe, colour in zip(data["probes"], (BLUE, VERMILION, INK), strict=False):
        percent = {key: [100 * share for share in probe[key]] for key in ("agreement", "settled")}
        top.plot(probe["layers"], percent["agreement"], color=colour, marker="o", markersize=4, label=probe["name"])
        top.plot(
            probe["layers"][:-1],
            [100 * share for share in probe["surely_right"]],
            color=colour,
            linestyle=(0, (4, 3)),
            label=f"{probe['name']}, sure",
        )
        bottom.plot(probe["layers"], percent["settled"], color=colour, drawstyle="steps-mid")
    for layer in data["advice"]["exits"]:
        top.axvline(layer, color=FAINT, linewidth=1)
    _style(top, "tokens (%)")
    _style(bottom, "settled here (%)")
    top.legend(frameon=False, labelcolor=INK, fontsize=8.5)
    bottom.set_xlabel("layer", color=INK)
    with settings():
        figure.savefig(path, facecolor="white", dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)


def _style(axes: "Axes", name: str) -> None:
    axes.set_ylabel(name, color=INK)
    axes.set_ylim(bottom=0)
    axes.tick_params(which="both", colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)


def _placed(placed: Mapping[str, Any]) -> str:
    exits = ", ".join(map(str, placed["exits"])) or "none"
    return f"{placed['speedup']:.2f}× ({exits})"
