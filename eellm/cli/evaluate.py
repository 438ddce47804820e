"""`eellm evaluate MODEL --text FILE [--curve] [--out DIR]`."""

import json
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from eellm.checkpoint.files import replacing, write_json
from eellm.checkpoint.hf import load
from eellm.cli.options import Layers, parse
from eellm.config.check import check_at_least
from eellm.config.infer import PolicyName
from eellm.data.packing import Rows
from eellm.errors import ConfigError
from eellm.evaluate.curve import Curve, CurveConfig, check_curve, cut_prompts, measure_curve
from eellm.evaluate.perplexity import Evaluation, evaluate, text_rows
from eellm.evaluate.plot import save_plot
from eellm.evaluate.report import Chapter, write_report
from eellm.evaluate.tables import CURVE_LEGEND, curve_cells, evaluation_cells
from eellm.exits.lm import EarlyExitLM
from eellm.infer.generate import generate
from eellm.infer.result import Generation
from eellm.log import log


@dataclass(frozen=True)
class Options:
    """Measures each exit on a text; with --curve, quality against speed over thresholds too."""

    model: tyro.conf.Positional[str]
    """A model directory, an adapter directory, a .gguf file or a hub id."""
    text: Path
    """A .txt file (one document) or a .jsonl file (`text`, or `messages` of a chat)."""
    adapter: Path | None = None
    """A directory with exits for this model."""
    curve: bool = False
    """Measure generation at ten thresholds, each between two runs at full depth."""
    out: Path | None = None
    """A directory for evaluation.json, report.html and, with --curve, curve.json and curve.svg."""
    policy: PolicyName = "max_prob"
    """The score in [0, 1] that says how sure an exit is."""
    exits: Layers = None
    """Layers of the exits in use on the curve. Default: all."""
    new_tokens: int = 32
    """Tokens that each run of the curve generates."""
    seq_len: int | None = None
    """Tokens in a row, into which documents are packed without seeing each other. Default: 512, or all that fit."""
    max_tokens: int = 20000
    """Most tokens of the text that are looked at, from its beginning."""
    batch_size: int = 4
    """Rows in a batch."""
    dtype: str = "float32"
    """Of the computation: float32, bfloat16, float16 or float64."""
    device: str = "cpu"
    """Where to compute."""
    json: bool = False
    """Print one JSON object instead of tables."""


def main(args: list[str]) -> None:
    options = parse(Options, args, verb="evaluate")
    check_at_least(options, 2, "seq_len", "max_tokens", "new_tokens")
    check_at_least(options, 1, "batch_size")
    model = load(options.model, options.adapter, dtype=options.dtype, device=options.device)
    seq_len = options.seq_len or min(512, model.config.max_seq_len)
    rows = text_rows(options.text, model, seq_len=seq_len, max_tokens=options.max_tokens)
    config = CurveConfig(policy=options.policy, exits=options.exits, new_tokens=options.new_tokens)
    if options.curve:
        check_curve(model, config)
    if options.out is None:
        evaluation, curve = _measure(options, model, rows, config)
    else:  # a place that can't be written is found before the work
        owned = ("curve.json", "curve.svg", "report.html")
        with replacing(options.out, marker="evaluation.json", owned=owned) as temporary:
            evaluation, curve = _measure(options, model, rows, config)
            _write(temporary, options, model, rows, evaluation, curve)
        log.info(f"{options.out}: evaluation.json, report.html{', curve.json' if curve else ''}")
    _print(options, evaluation, curve)


def _measure(options: Options, model: EarlyExitLM, rows: Rows, config: CurveConfig) -> tuple[Evaluation, Curve | None]:
    evaluation = evaluate(model, rows, batch_size=options.batch_size, policies=(config.policy,))
    return evaluation, measure_curve(model, rows, evaluation.table, config) if options.curve else None


def _print(options: Options, evaluation: Evaluation, curve: Curve | None) -> None:
    evaluation_json, curve_json = evaluation.as_json(), None if curve is None else curve.as_json()
    if options.json:
        print(json.dumps({"evaluation": evaluation_json, "curve": curve_json}, ensure_ascii=False))
        return
    out = Console()
    out.print(evaluation_cells(evaluation_json).as_rich(f"{options.text}, {evaluation.num_tokens} tokens"))
    if curve_json is not None:
        out.print(curve_cells(curve_json).as_rich(f"Quality against speed, {options.policy}"))
        out.print(CURVE_LEGEND, highlight=False)


def _write(
    directory: Path, options: Options, model: EarlyExitLM, rows: Rows, evaluation: Evaluation, curve: Curve | None
) -> None:
    write_json(directory / "evaluation.json", evaluation.as_json())
    if curve is not None:
        write_json(directory / "curve.json", curve.as_json())
        try:
            save_plot(curve.as_json(), directory / "curve.svg")
        except ConfigError as error:
            log.warning(f"no curve.svg: {error}")
    chapter = Chapter(
        title=f"Early exits of {Path(options.model).resolve().name}",
        notes=_notes(options, rows.tokens_NT.shape[1], evaluation, curve),
        generations=_samples(options, model, rows),
        table=evaluation.as_json(),
        curve=None if curve is None else curve.as_json(),
        num_layers=model.config.num_layers,
    )
    write_report(directory / "report.html", chapter)


def _samples(options: Options, model: EarlyExitLM, rows: Rows) -> list[tuple[str, str, Generation]]:
    """The beginning of the text continued at full depth and at two thresholds."""
    length = min(48, model.config.max_seq_len // 2)
    (prompt,) = cut_prompts(rows, num_prompts=1, prompt_tokens=length)
    assert model.tokenizer is not None, "text_rows refuses models without"
    text = model.tokenizer.decode(prompt)
    samples = [("full depth", text, generate(model, [prompt], method="full")[0])]
    for tau in (0.8, 0.5) if model.config.exits else ():
        (out,) = generate(model, [prompt], policy=options.policy, threshold=tau, exits=options.exits)
        samples.append((f"{options.policy}, τ = {tau}", text, out))
    return samples


def _notes(options: Options, seq_len: int, evaluation: Evaluation, curve: Curve | None) -> list[str]:
    """What the figures are, and what they aren't."""
    notes = [
        f"Measured on {options.text.name}: {evaluation.num_tokens} tokens in rows of {seq_len}. Each exit "
        "predicts every token from the true ones before it, so agreement with the final exit is what a threshold "
        "risks on this text, not on the model's own."
    ]
    if curve is not None:
        load, machine = curve.machine["load_average"], curve.machine
        notes.append(
            f"Speed is of one sequence at a time on this machine ({machine['device']}, {machine['dtype']}, "
            f"threads: {machine['num_threads']}, processors: {machine['num_cpus']}, load average {load[0]:.1f} before "
            f"and {load[1]:.1f} after), on {curve.num_prompts} prompts with {curve.config.new_tokens} new tokens each. "
            "Every run stands between two at full depth and is compared with those."
        )
    return notes
