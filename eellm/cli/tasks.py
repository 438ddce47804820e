"""`eellm tasks MODEL --tasks eellm_squad,… [--threshold 0.9,0.8] [--exit 6] [--out DIR]`."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from eellm.checkpoint.files import replacing, write_json
from eellm.checkpoint.hf import load
from eellm.cli.options import Layers, Names, Numbers, parse
from eellm.config.check import check_at_least
from eellm.config.infer import PolicyName
from eellm.errors import ConfigError
from eellm.evaluate.rule import ExitRule
from eellm.evaluate.task_tables import LEGEND, cost_cells, score_cells
from eellm.evaluate.tasks import Report, TasksConfig, run_tasks
from eellm.exits.lm import EarlyExitLM
from eellm.log import log


@dataclass(frozen=True)
class Options:
    """Asks lm-eval's tasks, at full depth and under exit rules; each measure with its interval, and with its change to
    full depth on the same documents."""

    model: tyro.conf.Positional[str]
    """A model directory, an adapter directory, a .gguf file or a hub id."""
    tasks: Names
    """Separated by commas: eellm_squad, eellm_xsum, eellm_news, eellm_social_iqa, eellm_wikihow_goals, or lm-eval's."""
    data: Path = Path("evaluation")
    """The directory that examples/eval_data.py wrote, for the tasks named eellm_…."""
    include: Path | None = None
    """A directory with more task files (lm-eval's YAML)."""
    adapter: Path | None = None
    """A directory with exits for this model."""
    exit: Numbers = ()
    """Layers, separated by commas: all tokens at this exit, each layer a row of its own."""
    threshold: Numbers = ()
    """Thresholds, separated by commas: each token at its own exit, each threshold a row of its own."""
    policy: PolicyName = "max_prob"
    """The score in [0, 1] that says how sure an exit is."""
    exits: Layers = None
    """Layers of the exits in use under a threshold."""
    limit: int | None = None
    """Documents of each task, from the beginning. Default: all."""
    fewshot: int | None = None
    """Examples with answers in front of each question."""
    chat: bool = False
    """Put questions through the model's chat template."""
    batch_size: int = 16
    """Answers generated at the same time."""
    out: Path | None = None
    """A directory for tasks.json, tasks.md and samples.jsonl (every answer)."""
    dtype: str = "float32"
    """Of the computation: float32, bfloat16, float16 or float64."""
    device: str = "cpu"
    """Where to compute."""
    json: bool = False
    """Print one JSON object instead of a table."""


def main(args: list[str]) -> None:
    options = parse(Options, args, verb="tasks")
    check_at_least(options, 1, "limit", "batch_size")
    check_at_least(options, 0, "fewshot")
    rules = _rules(options)
    config = TasksConfig(
        tasks=options.tasks,
        data=options.data,
        include=options.include,
        limit=options.limit,
        fewshot=options.fewshot,
        chat=options.chat,
        batch_size=options.batch_size,
    )
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    model = load(options.model, options.adapter, dtype=options.dtype, device=options.device)
    if options.out is None:
        report = run_tasks(model, rules, config)
    else:  # a place that can't be written is found before the work
        with replacing(options.out, marker="tasks.json", owned=("tasks.md", "samples.jsonl")) as temporary:
            report = run_tasks(model, rules, config)
            _write(temporary, options, model, report)
        log.info(f"{options.out}: tasks.json, tasks.md, samples.jsonl")
    if options.json:
        print(json.dumps(report.as_json(), ensure_ascii=False))
    else:
        out = Console()
        for title, cells in (score_cells(report.as_json()) | cost_cells(report.as_json())).items():
            out.print(cells.as_rich(title))
        out.print(LEGEND, highlight=False)


def _rules(options: Options) -> list[ExitRule]:
    """Full depth, which the others are compared with, and what was asked for."""
    rules = [ExitRule()]
    for layer in options.exit:
        if layer != int(layer):
            raise ConfigError(f"exit = {layer}: a layer is a whole number")
        rules.append(ExitRule(exit=int(layer)))
    if options.exits is not None and not options.threshold:
        raise ConfigError("exits: give a threshold too; for one exit that answers everything, --exit")
    rules += [ExitRule(threshold=tau, policy=options.policy, exits=options.exits) for tau in options.threshold]
    return rules


def _write(directory: Path, options: Options, model: EarlyExitLM, report: Report) -> None:
    data: dict[str, Any] = {
        "model": options.model,
        "adapter": None if options.adapter is None else str(options.adapter),
        "num_layers": model.config.num_layers,
        "exits": list(model.config.exit_layers),
        "limit": options.limit,
        "fewshot": options.fewshot,
        "chat": options.chat,
        **report.as_json(),
    }
    found = score_cells(data) | cost_cells(data)
    tables = "\n".join(f"## {title}\n\n{cells.as_markdown()}" for title, cells in found.items())
    (directory / "tasks.md").write_text(f"# {Path(options.model).name}\n\n{tables}\n{LEGEND}\n", encoding="utf-8")
    lines = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in report.samples)
    (directory / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
    write_json(directory / "tasks.json", data)
