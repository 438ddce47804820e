"""What leaving early costs in quality and gives in speed, on text and questions that the model never learnt.

    python benchmarks/quality.py MODEL [--adapter DIR] --text FILE [--tasks eellm_squad,eellm_xsum --chat --limit 100]

Perplexity is of the text, teacher-forced, in one pass for all thresholds; its units are stretches of `--seq-len`
tokens. Tasks (`eellm tasks`; `python examples/eval_data.py` fetches their data) are answered anew under each threshold;
their units are documents. Intervals are 95%, of a bootstrap over units; a change is to full depth on the same units.
Speed is of generation, each run between two at full depth. *No measurable loss*: no change's interval lies wholly on
the worse side, at a threshold under which everything was asked.
"""

import argparse
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from rich.console import Console

import eellm
from eellm.checkpoint.files import write_json
from eellm.config.infer import PolicyName
from eellm.data.packing import Rows
from eellm.evaluate.curve import CurveConfig, check_curve, measure_curve
from eellm.evaluate.perplexity import evaluate, text_rows
from eellm.evaluate.rule import ExitRule
from eellm.evaluate.tables import Cells
from eellm.evaluate.tasks import TasksConfig, compare, run_tasks
from eellm.exits.lm import EarlyExitLM
from eellm.exits.loss import IGNORE
from eellm.exits.metrics import ExitTable

ROOT = Path(__file__).parents[1]
LOWER_IS_BETTER = {"perplexity"}
FULL_DEPTH = "full depth"
Measure = dict[str, Any]


def main() -> None:
    options = _options()
    load = os.getloadavg()
    model = eellm.load(str(options.model), options.adapter)
    config = CurveConfig(
        thresholds=options.thresholds,
        policy=options.policy,
        num_prompts=options.num_prompts,
        new_tokens=options.new_tokens,
    )
    check_curve(model, config)
    rows = text_rows(options.text, model, seq_len=options.seq_len, max_tokens=options.max_tokens)
    answered = task_measures(model, options) if options.tasks else {}
    evaluation = evaluate(model, rows, batch_size=4)
    found = perplexities(rows, evaluation.table, options.thresholds, options.policy)
    for name, measures in answered.items():
        found[name] += measures
    curve = measure_curve(model, rows, evaluation.table, config).as_json()
    points = [
        judged(point, found[rule_name(options.policy, point["threshold"])], len(found[FULL_DEPTH]))
        for point in curve["points"]
    ]
    result = {
        "model": str(options.model),
        "adapter": None if options.adapter is None else str(options.adapter),
        "text": str(options.text),
        "policy": options.policy,
        "num_tokens": evaluation.num_tokens,
        "full_depth": found[FULL_DEPTH],
        "full_tokens_per_s": curve["full_tokens_per_s"],
        "points": points,
        "no_loss": max((p for p in points if p["no_loss"]), key=lambda p: p["speedup"], default=None),
        "exits": evaluation.as_json()["exits"],
        "versions": {"eellm": eellm.__version__, "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "load_average": [load, os.getloadavg()],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, result)
    show(result)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--text", type=Path, required=True, help=".txt or .jsonl, held out from training")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens in a unit of the text")
    parser.add_argument("--max-tokens", type=int, default=20_000, help="of the text")
    parser.add_argument("--policy", default="max_prob", choices=get_args(PolicyName))
    parser.add_argument("--thresholds", type=_floats, default=(0.95, 0.9, 0.8, 0.7, 0.6, 0.5))
    parser.add_argument("--tasks", type=_names, default=(), help="names, separated by commas")
    parser.add_argument("--task-thresholds", type=_floats, help="fewer of them, for the tasks")
    parser.add_argument("--data", type=Path, default=ROOT / "evaluation")
    parser.add_argument("--limit", type=int, default=100, help="documents of a task")
    parser.add_argument("--chat", action="store_true", help="questions go through the chat template")
    parser.add_argument("--num-prompts", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=ROOT / "bench-out/quality.json")
    options = parser.parse_args()
    if more := set(options.task_thresholds or ()) - set(options.thresholds):
        parser.error(f"--task-thresholds: {sorted(more)} are not among --thresholds")
    return options


def _floats(text: str) -> tuple[float, ...]:
    return tuple(float(word) for word in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def rule_name(policy: PolicyName, threshold: float) -> str:
    return ExitRule(threshold=threshold, policy=policy).name


def perplexities(
    rows: Rows, table: ExitTable, thresholds: Sequence[float], policy: PolicyName
) -> dict[str, list[Measure]]:
    """By rule, full depth among them."""
    lengths = (rows.labels_NT != IGNORE).sum(axis=1)
    starts = np.concatenate(([0], lengths.cumsum()[:-1]))[lengths > 0]

    def units(nll_N: torch.Tensor) -> list[tuple[float, int]]:
        sums = np.add.reduceat(nll_N.double().numpy(), starts).tolist()
        return list(zip(sums, lengths[lengths > 0].tolist(), strict=True))

    full = units(table.exits[table.final].nll_N)
    found = {FULL_DEPTH: [_measure("perplexity", len(full), compare(full, full, _perplexity))]}
    for threshold in thresholds:
        _, nll_N = table.answers(table.exit_taken(threshold, policy))
        early = units(nll_N)
        found[rule_name(policy, threshold)] = [_measure("perplexity", len(early), compare(early, full, _perplexity))]
    return found


def _perplexity(units: list[tuple[float, int]]) -> float:
    return math.exp(sum(nll for nll, _ in units) / sum(count for _, count in units))


def _measure(name: str, num_units: int, compared: tuple[Any, ...]) -> Measure:
    value, interval, change, change_interval = compared
    return {
        "measure": name,
        "units": num_units,
        "value": value,
        "interval": interval,
        "change": change,
        "change_interval": change_interval,
    }


def task_measures(model: EarlyExitLM, options: argparse.Namespace) -> dict[str, list[Measure]]:
    """By rule."""
    thresholds = options.task_thresholds or options.thresholds
    rules = [ExitRule(), *(ExitRule(threshold=tau, policy=options.policy) for tau in thresholds)]
    config = TasksConfig(tasks=options.tasks, data=options.data, limit=options.limit, chat=options.chat)
    found: dict[str, list[Measure]] = {rule.name: [] for rule in rules}
    for score in run_tasks(model, rules, config).scores:
        compared = (score.value, score.interval, score.difference, score.difference_interval)
        found[score.rule].append(_measure(f"{score.task} {score.metric}", score.num_docs, compared))
    return found


def judged(point: dict[str, Any], measures: list[Measure], num_measures: int) -> dict[str, Any]:
    """A point of the curve with what was measured there. num_measures: that full depth has; where fewer were taken
    there may be a loss."""
    early = 1 - list(point["taken"].values())[-1]
    return {
        "threshold": point["threshold"],
        "early": early,
        "agreement": point["agreement"],
        "speedup": point["measured"]["speedup"],
        "speedup_range": point["measured"]["speedup_range"],
        "measures": measures,
        "no_loss": len(measures) == num_measures and not any(is_worse(measure) for measure in measures),
    }


def is_worse(measure: Measure) -> bool:
    """Whether the change's interval lies wholly on the worse side."""
    low, high = measure["change_interval"]
    return low > 0 if measure["measure"] in LOWER_IS_BETTER else high < 0


def show(result: dict[str, Any]) -> None:
    names = [measure["measure"] for measure in result["full_depth"]]
    headers = ("τ", "early", "agree", "speed", *names)
    rows = [(FULL_DEPTH, "", "", "", *(_value(measure) for measure in result["full_depth"]))]
    for point in result["points"]:
        low, high = point["speedup_range"]
        speed = f"{point['speedup']:.2f} ({low:.2f}–{high:.2f})"
        changes = {measure["measure"]: _change(measure) for measure in point["measures"]}
        shares = (f"{point['early']:.0%}", f"{point['agreement']:.1%}", speed)
        rows.append((f"{point['threshold']:g}", *shares, *(changes.get(name, "") for name in names)))
    console = Console(width=140)
    console.print(Cells(headers, tuple(rows)).as_rich(f"{Path(result['model']).name}, {result['policy']}"))
    best = result["no_loss"]
    words = "no threshold was shown to be without a loss"
    if best is not None:
        low, high = best["speedup_range"]
        words = f"speed-up at no measurable loss: {best['speedup']:.2f} ({low:.2f} to {high:.2f})"
        words += f", at τ = {best['threshold']:g}"
    console.print(f"{words}; load {result['load_average'][0][0]:.1f} → {result['load_average'][1][0]:.1f}")
    console.print(json.dumps(result["versions"]))


def _value(measure: Measure) -> str:
    low, high = measure["interval"]
    return f"{measure['value']:.3g} ({low:.3g}–{high:.3g})"


def _change(measure: Measure) -> str:
    low, high = measure["change_interval"]
    return f"{measure['change']:+.2g} ({low:+.2g}, {high:+.2g})"


if __name__ == "__main__":
    main()
