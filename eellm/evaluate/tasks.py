"""Tasks of lm-eval, answered at full depth and under exit rules: what each rule scores, how surely, and what it loses.

    model, rules, names of tasks → lm-eval (its prompts, its measures) → per document a value → TaskScore per rule

Intervals are of a bootstrap over documents, 95%. A rule's difference to full depth is over the same documents, which
shows losses far smaller than either value's interval. Tasks of our own read local files (`local/*.yaml`), others what
lm-eval says, mostly from a hub.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eellm.errors import ConfigError, DataError, did_you_mean
from eellm.evaluate.rule import ExitRule
from eellm.exits.lm import EarlyExitLM
from eellm.infer.request import make_scoring
from eellm.log import log

if TYPE_CHECKING:
    from eellm.evaluate.harness import EellmLM

LOCAL = Path(__file__).parent / "local"
"""Where our task files are; lm-eval's --include_path takes it."""
NUM_RESAMPLES = 1000
Aggregate = Callable[[list[Any]], float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TasksConfig:
    """What is asked."""

    tasks: tuple[str, ...]
    """Their names: ours (`eellm_squad`, …), those in `include`, or lm-eval's."""
    data: Path
    """Where the files of our tasks are."""
    include: Path | None = None
    """A directory with more task files."""
    limit: int | None = None
    """Documents of each task; unset, all."""
    fewshot: int | None = None
    """Examples with answers in front of each question; unset, as many as the task says."""
    chat: bool = False
    """Questions go through the model's chat template."""
    batch_size: int = 16
    """Requests that are answered at the same time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskScore:
    """One measure of one task under one rule."""

    task: str
    metric: str
    rule: str
    num_docs: int
    value: float
    interval: tuple[float, float]
    """95%, of the value."""
    difference: float
    """To the first rule's, on the same documents."""
    difference_interval: tuple[float, float]
    """95%; it holds 0 where no loss can be seen."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuleCost:
    """What a rule's answers took, over all tasks."""

    rule: str
    exits: dict[str, int]
    """Tokens scored and generated, by their exit's layer."""
    layers: float | None
    """Passes through a layer while generating, over layers times tokens; None where nothing was generated. Prompts come
    on top, so that full depth has a little more than 1."""
    truncated: int
    """Requests that lost their beginning: they had more tokens than the model's context."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    scores: tuple[TaskScore, ...]
    costs: tuple[RuleCost, ...]
    """One for each rule."""
    samples: tuple[dict[str, Any], ...]
    """Every answer: task, rule, document's number, what was said, its measures."""

    def as_json(self) -> dict[str, Any]:
        """Without the samples."""
        return {
            "scores": [dataclasses.asdict(score) for score in self.scores],
            "costs": [dataclasses.asdict(cost) for cost in self.costs],
        }


def run_tasks(model: EarlyExitLM, rules: Sequence[ExitRule], config: TasksConfig) -> Report:
    """Asks every task under every rule; differences are to the first one.

    Raises ConfigError for tasks that aren't there and where lm-eval isn't installed, DataError for missing files.
    """
    harness = _harness()
    for rule in rules:
        check_rule(model, rule)
    manager, asked = load_tasks(config)
    found = []
    for rule in rules:
        log.info(f"{rule.name}: {', '.join(config.tasks)}")
        lm = harness.EellmLM(
            model,
            exit=rule.exit,
            threshold=rule.threshold,
            policy=rule.policy,
            exits=rule.exits,
            batch_size=config.batch_size,
        )
        found.append((rule.name, _ask(lm, manager, asked, config), _cost(rule.name, lm)))
    scores, samples = [], []
    for name, tasks, _ in found:
        for (task, aggregates, lines), (_, _, first_lines) in zip(tasks, found[0][1], strict=True):
            scores += _scores(task, name, aggregates, lines, first_lines)
            samples += [_sample(task, name, line) for line in lines]
    return Report(scores=tuple(scores), costs=tuple(cost for _, _, cost in found), samples=tuple(samples))


def check_rule(model: EarlyExitLM, rule: ExitRule) -> None:
    """Raises ConfigError for what the model doesn't have, before any work."""
    fields = rule.scoring()
    make_scoring(model, [0, 0], fields.pop("exit", None), fields)


def _harness() -> Any:
    """The module that needs lm-eval."""
    try:
        return import_module("eellm.evaluate.harness")
    except ImportError as error:
        raise ConfigError(f"tasks need one more package ({error.name}): pip install 'eellm[eval]'") from None


def _ask(
    lm: "EellmLM", manager: Any, tasks: Mapping[str, Any], config: TasksConfig
) -> list[tuple[str, dict[str, Aggregate], list[dict[str, Any]]]]:
    """Of each task its name, how each measure is made of the documents' values, and the documents' lines."""
    from lm_eval import simple_evaluate

    results = simple_evaluate(
        model=lm,
        tasks=list(tasks.values()),
        task_manager=manager,  # without it, lm-eval reads its own thousands of files each time
        limit=config.limit,
        num_fewshot=config.fewshot,
        apply_chat_template=config.chat,
        bootstrap_iters=0,  # ours are over the same documents for all rules
    )
    assert results is not None, "there is one process"
    return [(name, task.aggregation(), results["samples"][name]) for name, task in tasks.items()]


def load_tasks(config: TasksConfig) -> tuple[Any, dict[str, Any]]:
    """lm-eval's index of tasks, and the task objects by name. Raises ConfigError for unknown names, DataError for data
    that isn't there."""
    from lm_eval.tasks import TaskManager

    ours = {file.stem for file in LOCAL.glob("*.yaml")}
    paths: list[str | Path] = [LOCAL] if config.include is None else [LOCAL, config.include]
    manager = TaskManager(include_path=paths, include_defaults=False)
    unknown = [name for name in config.tasks if name not in manager.all_tasks]
    if unknown and not unknown[0].startswith("eellm_"):  # lm-eval's own are thousands of files
        manager = TaskManager(include_path=paths)
    for name in config.tasks:
        if name not in manager.all_tasks:
            raise ConfigError(
                f"no task {name!r}{did_you_mean(name, manager.all_tasks)}; ours are {', '.join(sorted(ours))}"
            )
    others = [name for name in config.tasks if name not in ours]
    changed = [_with_data(name, config.data) for name in config.tasks if name in ours]
    try:
        # in a group: lm-eval lets only a group's members be known by name and yet be changed
        found = manager.load({"group": "eellm", "task": changed})["tasks"] if changed else {}
        return manager, found | (manager.load(others)["tasks"] if others else {})
    except (OSError, ConnectionError, ValueError) as error:  # what `datasets` raises for files and hubs out of reach
        raise DataError(f"the data of {', '.join(config.tasks)} can't be loaded: {error}") from error


def _with_data(name: str, data: Path) -> dict[str, Any]:
    """One of our tasks, with its file where the user has it."""
    file = data / f"{FILES[name]}.jsonl"
    if not file.is_file():
        raise DataError(f"{file}: no such file; python examples/eval_data.py --out {data} fetches what our tasks ask")
    return {"task": name, "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(data / "cache")}}


FILES = {
    "eellm_squad": "squad",
    "eellm_xsum": "xsum",
    "eellm_news": "xsum",
    "eellm_social_iqa": "social_iqa",
    "eellm_wikihow_goals": "wikihow_goals",
}
"""By task, what `examples/eval_data.py` calls its data."""


def _scores(
    task: str,
    rule: str,
    aggregates: Mapping[str, Aggregate],
    lines: Sequence[Mapping[str, Any]],
    first_lines: Sequence[Mapping[str, Any]],
) -> list[TaskScore]:
    """Every measure of a task. Where lm-eval reads an answer in several ways (filters), each is a measure."""
    filters = list(dict.fromkeys(line["filter"] for line in lines))
    scores = []
    for filter_name in filters:
        here = [line for line in lines if line["filter"] == filter_name]
        first = [line for line in first_lines if line["filter"] == filter_name]
        for metric in (name for name in here[0]["metrics"] if name in aggregates):
            values, others = [line[metric] for line in here], [line[metric] for line in first]
            value, interval, difference, difference_interval = compare(values, others, aggregates[metric])
            scores.append(
                TaskScore(
                    task=task,
                    metric=metric if len(filters) == 1 else f"{metric}, {filter_name}",
                    rule=rule,
                    num_docs=len(here),
                    value=value,
                    interval=interval,
                    difference=difference,
                    difference_interval=difference_interval,
                )
            )
    return scores


def compare(
    values: Sequence[Any], others: Sequence[Any], aggregate: Aggregate, *, num_resamples: int = NUM_RESAMPLES
) -> tuple[float, tuple[float, float], float, tuple[float, float]]:
    """What the documents' values make together, its 95% interval, its difference to what `others` make of the same
    documents, and that one's interval: percentiles over resampled documents. The same for the same input."""
    assert len(values) == len(others), "the same documents"
    generator = np.random.default_rng(0)
    sums, differences = [], []
    for _ in range(num_resamples):
        chosen = generator.integers(len(values), size=len(values)).tolist()
        sums.append(aggregate([values[i] for i in chosen]))
        differences.append(sums[-1] - aggregate([others[i] for i in chosen]))
    value = float(aggregate(list(values)))
    return value, _middle(sums), value - float(aggregate(list(others))), _middle(differences)


def _middle(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _cost(rule: str, lm: "EellmLM") -> RuleCost:
    counts = lm.counts
    return RuleCost(
        rule=rule,
        exits={str(layer): counts.exits[layer] for layer in sorted(counts.exits)},
        layers=counts.layers_run / counts.layers_full if counts.layers_full else None,
        truncated=counts.truncated,
    )


def _sample(task: str, rule: str, line: Mapping[str, Any]) -> dict[str, Any]:
    said = [response[0] if len(response) == 1 else response for response in line["resps"]]
    measures = {metric: line[metric] for metric in line["metrics"]}
    return {"task": task, "rule": rule, "doc": line["doc_id"], "said": said, "right": line["target"], **measures}
