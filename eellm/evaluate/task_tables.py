"""What tasks found, as tables of text for the terminal and for a page.

In: the JSON form (`Report.as_json`), fresh or read back from a file.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from eellm.evaluate.tables import Cells


def score_cells(report: Mapping[str, Any]) -> dict[str, Cells]:
    """By title, a table for each task: one row per measure and rule. report: as JSON."""
    first = report["costs"][0]["rule"]
    tables = {}
    for task in dict.fromkeys(score["task"] for score in report["scores"]):
        scores = [score for score in report["scores"] if score["task"] == task]
        scores.sort(key=lambda score: score["metric"])  # stable: the rules stay in their order
        headers = ("measure", "depth", "value", "95%", "change", "95%")
        rows = tuple(_row(score, is_first=score["rule"] == first) for score in scores)
        tables[f"{task}, documents: {scores[0]['num_docs']}"] = Cells(headers, rows)
    return tables


def cost_cells(report: Mapping[str, Any]) -> dict[str, Cells]:
    """What each rule's answers took, with a title. report: as JSON."""
    first = report["costs"][0]["layers"]
    rows = []
    for cost in report["costs"]:
        total = sum(cost["exits"].values())
        exits = ", ".join(f"{layer}: {number / total:.0%}" for layer, number in cost["exits"].items())
        layers = "–" if cost["layers"] is None else f"{cost['layers'] / first:.0%}"
        rows.append((cost["rule"], layers, exits, str(cost["truncated"])))
    return {"What it took": Cells(("depth", "layers", "tokens by exit", "cut"), tuple(rows))}


LEGEND = (
    "95% = interval over documents. change = to full depth on the same documents: where its interval holds 0, none can "
    "be seen. layers = passes through a layer while generating, over full depth's. cut = requests that lost their "
    "beginning, being longer than the model's context."
)


def _row(score: Mapping[str, Any], *, is_first: bool) -> tuple[str, ...]:
    return (
        score["metric"],
        score["rule"],
        f"{score['value']:.3g}",
        _interval(score["interval"], ""),
        "" if is_first else f"{score['difference']:+.2g}",
        "" if is_first else _interval(score["difference_interval"], "+"),
    )


def _interval(ends: Sequence[float], sign: str) -> str:
    return f"{ends[0]:{sign}.2g}, {ends[1]:{sign}.2g}" if sign else f"{ends[0]:.3g}–{ends[1]:.3g}"
