"""`eellm suit MODEL --text FILE [--tune-steps N] [--out DIR]`."""

import json
from dataclasses import dataclass, fields
from pathlib import Path

import tyro
from rich.console import Console

from eellm.checkpoint.files import replacing, write_json
from eellm.checkpoint.hf import load
from eellm.cli.options import parse
from eellm.config.check import check_at_least
from eellm.data.packing import Rows
from eellm.errors import ConfigError, DataError
from eellm.evaluate.perplexity import text_rows
from eellm.evaluate.suit import Suitability, SuitConfig, suit
from eellm.evaluate.suit_page import BOUNDS_LEGEND, LEGEND, bound_cells, layer_cells, page, save_picture
from eellm.exits.lm import EarlyExitLM
from eellm.log import log


@dataclass(frozen=True)
class Options:
    """Says whether a model suits early exits on this machine, and after which layers they would go."""

    model: tyro.conf.Positional[str]
    """A model directory, an adapter directory, a .gguf file or a hub id; with or without exits."""
    text: Path
    """A .txt file (one document) or a .jsonl file (`text`, or `messages` of a chat), of the kind that it will write."""
    adapter: Path | None = None
    """A directory with exits for this model, which are looked at too."""
    out: Path | None = None
    """A directory for suit.json, suit.md and suit.svg."""
    tune_steps: int = 0
    """Tune small exits for so many steps first, on the text behind what is measured. Default: none."""
    tune_lr: float = 1e-3
    """Their learning rate."""
    precision: float = 0.98
    """Share of right choices that must be kept among the tokens that leave."""
    seq_len: int | None = None
    """Tokens in a row. Default: 512, or all that fit."""
    max_tokens: int = 8192
    """Most tokens of the text that are measured, from its beginning."""
    batch_size: int = 4
    """Rows in a batch."""
    dtype: str = "float32"
    """Of the computation: float32, bfloat16, float16 or float64."""
    device: str = "cpu"
    """Where to compute."""
    json: bool = False
    """Print one JSON object instead of tables."""


def main(args: list[str]) -> None:
    options = parse(Options, args, verb="suit")
    check_at_least(options, 2, "seq_len", "max_tokens")
    config = SuitConfig(
        batch_size=options.batch_size,
        precision=options.precision,
        tune_steps=options.tune_steps,
        tune_lr=options.tune_lr,
    )
    model = load(options.model, options.adapter, dtype=options.dtype, device=options.device)
    rows, tune_rows = _rows(options, model)
    if options.out is None:
        found = suit(model, rows, config, tune_rows=tune_rows)
    else:  # a place that can't be written is found before the work
        with replacing(options.out, marker="suit.json", owned=("suit.md", "suit.svg")) as temporary:
            found = suit(model, rows, config, tune_rows=tune_rows)
            _write(temporary, options, found)
        log.info(f"{options.out}: suit.json, suit.md")
    _print(options, found)


def _rows(options: Options, model: EarlyExitLM) -> tuple[Rows, Rows | None]:
    """The text that is measured, and what comes behind it for tuning."""
    seq_len = options.seq_len or min(512, model.config.max_seq_len)
    more = options.tune_steps * options.batch_size * seq_len
    rows = text_rows(options.text, model, seq_len=seq_len, max_tokens=options.max_tokens + more)
    num_measured = -(-options.max_tokens // seq_len) if more else len(rows)
    if more and num_measured >= len(rows):
        raise DataError(
            f"{options.text}: all of it is measured, nothing is left to tune on; give more text, or lower max_tokens"
        )
    first, second = (
        Rows(**{field.name: getattr(rows, field.name)[part] for field in fields(rows)})
        for part in (slice(num_measured), slice(num_measured, None))
    )
    return first, second if more else None


def _write(directory: Path, options: Options, found: Suitability) -> None:
    data = found.as_json()
    picture: str | None = "suit.svg"
    try:
        save_picture(data, directory / "suit.svg")
    except ConfigError as error:
        log.warning(f"no suit.svg: {error}")
        picture = None
    name = Path(options.model).resolve().name
    (directory / "suit.md").write_text(page(data, name, picture), encoding="utf-8")
    write_json(directory / "suit.json", {"model": options.model, **data})


def _print(options: Options, found: Suitability) -> None:
    data = found.as_json()
    if options.json:
        print(json.dumps(data, ensure_ascii=False))
        return
    out = Console()
    for title, cells in layer_cells(data).items():
        out.print(cells.as_rich(title))
    out.print(LEGEND, highlight=False)
    out.print(bound_cells(data).as_rich("What exits could give; exit and gate in layers"))
    out.print(BOUNDS_LEGEND, highlight=False)
    out.print(f"\n{data['advice']['text']}", highlight=False)
