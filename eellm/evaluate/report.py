"""One self-contained page: each token in the colour of the exit it left at, what that saved, tables and the curve.

In: chapters, one for a model: generations, and an evaluation and a curve in their JSON forms, fresh or read back. Out:
an HTML file that asks the network for nothing. What comes from models and users is escaped.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from eellm.errors import ConfigError
from eellm.evaluate.plot import inline_svg
from eellm.evaluate.tables import CURVE_LEGEND, curve_cells, evaluation_cells
from eellm.exits.palette import colour
from eellm.infer.result import Generation, Stats
from eellm.log import log


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """What the page says of one model."""

    title: str
    notes: Sequence[str]
    """Paragraphs of plain text."""
    generations: Sequence[tuple[str, str, Generation]]
    """(label, prompt, what came of it)."""
    table: Mapping[str, Any]
    """`Evaluation.as_json()`."""
    curve: Mapping[str, Any] | None = None
    """`Curve.as_json()`; without matplotlib its picture is left out, with a warning in the log."""
    num_layers: int


def write_report(path: Path, *chapters: Chapter) -> None:
    """Writes the page, whole or not at all. Its title is the first chapter's."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(files("eellm.evaluate").joinpath("report.html.jinja").read_text("utf-8"))
    text = template.render(
        chapters=[_chapter(chapter, number) for number, chapter in enumerate(chapters, start=1)],
        curve_legend=CURVE_LEGEND,
    )
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _chapter(chapter: Chapter, number: int) -> dict[str, Any]:
    """What the template shows of it."""
    curve = chapter.curve
    return {
        "title": chapter.title,
        "notes": chapter.notes,
        "sections": [_section(label, prompt, out, chapter.num_layers) for label, prompt, out in chapter.generations],
        "evaluation": evaluation_cells(chapter.table),
        "curve": None if curve is None else curve_cells(curve),
        "picture": None if curve is None else _picture(curve, number),
    }


@dataclass(frozen=True)
class _Section:
    """One generation as the page shows it."""

    label: str
    prompt: str
    tokens: list["_Token"]
    bars: list["_Bar"]
    stats: str


@dataclass(frozen=True)
class _Token:
    text: str
    title: str
    colour: str | None
    mark: str
    """The layer of an early exit, on the first token of a run that left there."""
    is_blank: bool
    """It has no text of its own, and `text` stands for it."""


@dataclass(frozen=True)
class _Bar:
    """How many tokens left at one exit."""

    name: str
    colour: str | None
    text: str
    percent: float


def _section(label: str, prompt: str, out: Generation, num_layers: int) -> _Section:
    return _Section(label, prompt, _tokens(out, num_layers), _bars(out.exits, num_layers), _stats(out.stats))


def _tokens(out: Generation, num_layers: int) -> list[_Token]:
    tokens, before = [], num_layers
    for i, layer in enumerate(out.exits):
        text = out.pieces[i] if out.text is not None else f"{out.tokens[i]} "
        title = (
            f"{_name(layer, num_layers)} · confidence {out.confidences[i]:.2f} · "
            f"probability {math.exp(out.logprobs[i]):.2f} · token {out.tokens[i]}"
        )
        mark = str(layer) if layer not in (before, num_layers) else ""
        tokens.append(_Token(text or "·", title, colour(layer, num_layers), mark, not text))
        before = layer
    return tokens


def _bars(exits: Sequence[int], num_layers: int) -> list[_Bar]:
    bars = []
    for layer, count in sorted(Counter(exits).items()):
        share = count / len(exits)
        text = f"{count} token{'s' * (count != 1)} ({share:.0%})"
        bars.append(_Bar(_name(layer, num_layers), colour(layer, num_layers), text, 100 * share))
    return bars


def _name(layer: int, num_layers: int) -> str:
    return f"final exit, layer {layer}" if layer == num_layers else f"exit at layer {layer} of {num_layers}"


def _stats(stats: Stats) -> str:
    saved = 1 - stats.layers_run / stats.layers_full
    return (
        f"{stats.new_tokens} tokens · mean exit layer {stats.mean_exit_layer:.1f} · {stats.layers_run} of "
        f"{stats.layers_full} layer passes run ({saved:.0%} saved) · {stats.tokens_per_s:.1f} tokens/s"
    )


def _picture(curve: Mapping[str, Any], number: int) -> Markup | None:
    """number: the chapter's, which keeps the names within its picture apart from those in others."""
    try:
        svg = inline_svg(curve)  # numbers and our own words, escaped by matplotlib
    except ConfigError as error:
        log.warning(f"the report has no picture: {error}")
        return None
    return Markup(re.sub(r'( id="|url\(#|href="#)', rf"\g<1>chapter-{number}-", svg))
