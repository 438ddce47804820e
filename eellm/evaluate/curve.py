"""Quality against speed over thresholds.

Quality comes from the table of `evaluate`: the whole text, teacher-forced, any threshold. Speed is measured: the same
few prompts, cut out of the text, are continued at full depth and at each threshold. Machines change their speed under
one's hands, so every early run stands between two full ones (full, τ₁, full, τ₂, …, full) and is compared with those
two; what is reported is the median over the prompts, with the range.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import mean, median
from typing import Any, Literal

import numpy as np
import torch

from eellm.config.infer import GenerateConfig, Method, PolicyName
from eellm.data.packing import Rows
from eellm.errors import ConfigError
from eellm.evaluate.perplexity import finite, num_text_tokens
from eellm.exits.lm import EarlyExitLM
from eellm.exits.metrics import ExitTable, PolicyPoint
from eellm.infer.engine import Engine
from eellm.infer.generate import stream
from eellm.infer.request import make_request
from eellm.infer.result import Stats
from eellm.log import log

THRESHOLDS = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurveConfig:
    """What is measured. A threshold costs two runs a prompt."""

    thresholds: tuple[float, ...] = THRESHOLDS
    method: Literal["early", "pipelined"] = "early"
    """What generates; full depth is always this process alone."""
    workers: int = 1
    """Processes that `pipelined` spreads the layers over, this one among them."""
    policy: PolicyName = "max_prob"
    exits: tuple[int, ...] | None = None
    """Layers of the exits in use; None: all."""
    max_deferred: int = 16
    num_prompts: int = 3
    prompt_tokens: int = 64
    new_tokens: int = 32

    def __post_init__(self) -> None:
        if self.num_prompts < 1 or self.prompt_tokens < 1 or self.new_tokens < 2:
            raise ConfigError("the curve needs a prompt of a token or more, and 2 new tokens to tell their rate")
        if (self.method == "pipelined") != (self.workers > 1):
            raise ConfigError(
                f"method = {self.method!r}, workers = {self.workers}: 'pipelined' needs two or more, 'early' is one"
            )

    def options(self, threshold: float, method: Method | None = None) -> GenerateConfig:
        """One run's. method: unset, the curve's."""
        return GenerateConfig(
            method=method or self.method,
            threshold=threshold,
            policy=self.policy,
            exits=self.exits,
            max_deferred=self.max_deferred,
            max_new_tokens=self.new_tokens,
            ignore_eos=True,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """Generation at one threshold, over all prompts."""

    tokens_per_s: float
    """Median. Of decoding: the prompt's pass doesn't count."""
    speedup: float
    """Median ratio of that rate to the mean of the two full-depth runs beside it."""
    speedup_range: tuple[float, float]
    layers_run: int
    """Passes through a layer, the prompts' included."""
    layers_full: int
    mean_exit_layer: float
    same_prefix: float
    """Mean share of the new tokens before the first one that isn't full depth's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    config: CurveConfig
    num_layers: int
    num_prompts: int
    """As many, and as long, as the text had."""
    prompt_tokens: int
    machine: dict[str, Any]
    """Load averages before and after, threads, processors, device, dtype."""
    full_tokens_per_s: float
    """Median over all full-depth runs."""
    points: tuple[tuple[PolicyPoint, Measured], ...]
    """By falling threshold."""

    def as_json(self) -> dict[str, Any]:
        """Plain data, as JSON can hold it: what the plot and the report read."""
        return {
            "method": self.config.method,
            "workers": self.config.workers,
            "policy": self.config.policy,
            "exits": None if self.config.exits is None else list(self.config.exits),
            "max_deferred": self.config.max_deferred,
            "num_layers": self.num_layers,
            "num_prompts": self.num_prompts,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.config.new_tokens,
            "machine": self.machine,
            "full_tokens_per_s": self.full_tokens_per_s,
            "points": [_point_as_json(quality, measured) for quality, measured in self.points],
        }


def _point_as_json(quality: PolicyPoint, measured: Measured) -> dict[str, Any]:
    data = finite(dataclasses.asdict(quality))
    del data["policy"]
    precision = quality.agreement_by_exit
    data["taken"] = {str(layer): share for layer, share in quality.taken.items()}
    data["agreement_by_exit"] = {str(n): precision[n] if share else None for n, share in quality.taken.items()}
    return data | {"measured": dataclasses.asdict(measured) | {"speedup_range": list(measured.speedup_range)}}


def check_curve(model: EarlyExitLM, config: CurveConfig) -> None:
    """Raises ConfigError for what the model can't do, before any work."""
    if not model.config.exits:
        raise ConfigError("the model has no exits to draw a curve of; 'eellm add-exits' makes some")
    if config.new_tokens >= model.config.max_seq_len:
        raise ConfigError(f"new_tokens = {config.new_tokens}: the model's context is {model.config.max_seq_len}")
    for threshold in config.thresholds:
        make_request(model, [0], config.options(threshold))


def measure_curve(model: EarlyExitLM, rows: Rows, table: ExitTable, config: CurveConfig = CurveConfig()) -> Curve:
    """The curve of `model`: quality from `table`, speed on prompts cut out of `rows`. Raises ConfigError."""
    check_curve(model, config)
    thresholds = sorted(config.thresholds, reverse=True)
    room = model.config.max_seq_len - config.new_tokens
    prompts = cut_prompts(rows, num_prompts=config.num_prompts, prompt_tokens=min(config.prompt_tokens, room))
    load_before = os.getloadavg()
    options = [config.options(tau) for tau in thresholds]
    with _pipeline(model, config) as engine:
        full, early = _run_interleaved(model, prompts, options, config, engine)
    points = []
    for number, threshold in enumerate(thresholds):
        quality = table.at_threshold(threshold, config.policy, config.exits)
        points.append((quality, _compare([runs[number] for runs in early], [runs[number:][:2] for runs in full])))
    weight = model.decoder.embed.weight
    return Curve(
        config=config,
        num_layers=model.config.num_layers,
        num_prompts=len(prompts),
        prompt_tokens=len(prompts[0]),
        machine={
            "load_average": [load_before[0], os.getloadavg()[0]],
            "num_threads": torch.get_num_threads(),
            "num_cpus": os.cpu_count(),
            "device": str(weight.device),
            "dtype": str(weight.dtype).removeprefix("torch."),
        },
        full_tokens_per_s=median(run.stats.tokens_per_s for runs in full for run in runs),
        points=tuple(points),
    )


def cut_prompts(rows: Rows, *, num_prompts: int, prompt_tokens: int) -> list[list[int]]:
    """Prompts of equal length from evenly spaced places of the text; they overlap where it is short."""
    end = num_text_tokens(rows)
    length = min(prompt_tokens, end)
    starts = np.linspace(0, end - length, num_prompts).astype(int)
    tokens = rows.tokens_NT.reshape(-1)
    return [tokens[start : start + length].tolist() for start in starts]


@dataclasses.dataclass(frozen=True)
class _Sample:
    tokens: list[int]
    stats: Stats


@contextmanager
def _pipeline(model: EarlyExitLM, config: CurveConfig) -> Iterator[Engine | None]:
    """The engine with workers, where the curve's method has them."""
    if config.workers == 1:
        yield None
        return
    with Engine(model, max_batch=1, max_tokens=model.config.max_seq_len, workers=config.workers, recall=0) as engine:
        _run(model, [0], config.options(1.0), engine)  # the first run of a process is slower
        yield engine


def _run_interleaved(
    model: EarlyExitLM,
    prompts: list[list[int]],
    options: Sequence[GenerateConfig],
    config: CurveConfig,
    engine: Engine | None,
) -> tuple[list[list[_Sample]], list[list[_Sample]]]:
    """Per prompt, the full-depth runs and between them one run for each of `options`, by `engine` if there is one."""
    full_depth = config.options(1.0, method="full")
    _run(model, prompts[0], full_depth)  # the first run of a process is slower
    full, early = [], []
    for number, prompt in enumerate(prompts, start=1):
        log.info(f"curve: prompt {number} of {len(prompts)} at {len(options)} thresholds")
        full.append([_run(model, prompt, full_depth)])
        early.append([])
        for option in options:
            early[-1].append(_run(model, prompt, option, engine))
            full[-1].append(_run(model, prompt, full_depth))
    return full, early


def _run(model: EarlyExitLM, prompt: list[int], options: GenerateConfig, engine: Engine | None = None) -> _Sample:
    """engine: unset, one of its own. Either way no row of the prompt is there yet."""
    if engine is not None:
        engine.places.forget()
    run = stream(model, prompt, options) if engine is None else engine.submit(prompt, options)
    return _Sample([token.id for token in run], run.stats())


def _compare(early: list[_Sample], full: list[list[_Sample]]) -> Measured:
    """Runs at one threshold, one a prompt, with the full-depth runs before and after each."""
    ratios = [
        run.stats.tokens_per_s / mean(neighbour.stats.tokens_per_s for neighbour in neighbours)
        for run, neighbours in zip(early, full, strict=True)
    ]
    return Measured(
        tokens_per_s=median(run.stats.tokens_per_s for run in early),
        speedup=median(ratios),
        speedup_range=(min(ratios), max(ratios)),
        layers_run=sum(run.stats.layers_run for run in early),
        layers_full=sum(run.stats.layers_full for run in early),
        mean_exit_layer=mean(run.stats.mean_exit_layer for run in early),
        same_prefix=mean(
            _same_prefix(run.tokens, neighbours[0].tokens) for run, neighbours in zip(early, full, strict=True)
        ),
    )


def _same_prefix(tokens: list[int], others: list[int]) -> float:
    """Share of `tokens` before the first that differs."""
    same = [a == b for a, b in zip(tokens, others, strict=True)]
    return same.index(False) / len(same) if False in same else 1.0
