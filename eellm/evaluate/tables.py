"""An evaluation and a curve as tables of text, which the terminal and the report both show.

In: their JSON forms (`Evaluation.as_json`, `Curve.as_json`), fresh or read back from a file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table


@dataclass(frozen=True)
class Cells:
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def as_rich(self, title: str) -> Table:
        """For the terminal."""
        narrow = {"box": SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False, "show_edge": False}  # 80 columns
        table = Table(*self.headers, title=title, title_justify="left", **narrow)
        for column in table.columns:
            column.justify = "right"
            column.no_wrap = True
        for row in self.rows:
            table.add_row(*row)
        return table

    def as_markdown(self) -> str:
        """For a file."""
        lines = (self.headers, ("---",) * len(self.headers), *self.rows)
        return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def evaluation_cells(evaluation: Mapping[str, Any]) -> Cells:
    """One row per exit."""
    headers = ("exit", "kind", "perplexity", "bits/byte", "agrees with final", "right")
    rows = tuple(
        (
            str(exit["layer"]),
            exit["kind"],
            _number(exit["perplexity"], 2),
            _number(exit["bits_per_byte"], 3),
            _percent(exit["agreement"]),
            _percent(exit["accuracy"]),
        )
        for exit in evaluation["exits"]
    )
    return Cells(headers, rows)


def curve_cells(curve: Mapping[str, Any]) -> Cells:
    """One row per threshold: quality on the text, then what generation measured."""
    headers = ("τ", "early", "agree", "ppl", "tok/s", "speed", "range", "layers", "exit", "same")
    return Cells(headers, tuple(_curve_row(point, str(curve["num_layers"])) for point in curve["points"]))


CURVE_LEGEND = (
    "On the text: τ = threshold, early = share of tokens that leave early, agree = share whose exit makes the final "
    "exit's choice, ppl = perplexity of the exits taken. Generating: tok/s = tokens decoded a second, speed = speed-up "
    "over full depth, range = its range over the prompts, layers = share of layer passes run, exit = mean exit layer, "
    "same = share of tokens before the first that isn't full depth's."
)


def _curve_row(point: Mapping[str, Any], final: str) -> tuple[str, ...]:
    measured = point["measured"]
    low, high = measured["speedup_range"]
    return (
        f"{point['threshold']:g}",
        f"{1 - point['taken'][final]:.0%}",
        _percent(point["agreement"]),
        _number(point["perplexity"], 2),
        _number(measured["tokens_per_s"], 1),
        f"{measured['speedup']:.2f}×",
        f"{low:.2f}–{high:.2f}",
        f"{measured['layers_run'] / measured['layers_full']:.0%}",
        _number(measured["mean_exit_layer"], 1),
        f"{measured['same_prefix']:.0%}",
    )


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return "–"
    if value < 1e5:
        return f"{value:,.{digits if value < 1e4 else 0}f}"
    return f"{value:.1e}"


def _percent(share: float) -> str:
    return f"{share:.1%}"
