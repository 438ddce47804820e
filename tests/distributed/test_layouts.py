"""Whole optimizer steps of `recipes/debug.toml` on real text: the same losses under every layout of processes.

Rows and sequences are shorter than the recipe's, its steps as many. One call of `run_on_ranks` takes all layouts of as
many processes, so that these are started once.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from eellm.config.load import from_toml
from eellm.config.parallel import ParallelConfig
from eellm.config.train import TrainConfig
from eellm.parallel.mesh import join
from eellm.parallel.tensor import local
from eellm.pipeline.watched import unwatched
from eellm.train.check import resolve
from eellm.train.scale import LossScale
from eellm.train.trainer import Trainer
from tests.ranks import run_on_ranks

RECIPE = Path(__file__).parents[2] / "recipes" / "debug.toml"
ONE = ParallelConfig()
LAYOUTS = {
    2: [ParallelConfig(dp_shard=2), ParallelConfig(tp=2), ParallelConfig(pp=2, num_microbatches=4)],
    4: [ParallelConfig(dp_shard=2, tp=2), ParallelConfig(pp=2, tp=2, num_microbatches=2)],
    8: [ParallelConfig(dp_shard=2, pp=2, tp=2, num_microbatches=2)],
}


def recipe(layout=ONE, *, steps=20, dtype="float32", **objective) -> TrainConfig:
    config = from_toml(TrainConfig, RECIPE)
    return resolve(
        replace(
            config,
            data=replace(config.data, seq_len=16, validation_rows=5),
            train=replace(config.train, global_batch_size=8, steps=steps, dtype=dtype),
            objective=replace(config.objective, **objective),
            parallel=layout,
        )
    )


def trainer_of(config: TrainConfig) -> Trainer:
    return Trainer(config, join(config.parallel), unwatched)


def run_all(configs: list[TrainConfig]) -> list[list[dict[str, float]]]:
    """Each recipe's rows: losses, norms, and validation losses after half of the steps and after all."""
    runs = []
    for config in configs:
        trainer, rows, steps = trainer_of(config), [], config.train.steps
        for step in range(1, steps + 1):
            row, _ = trainer.step(step)
            row |= trainer.evaluate() if step in (steps // 2, steps) else {}
            rows.append({key: x for key, x in row.items() if "loss" in key or key == "grad_norm"})
        runs.append(rows)
    return runs


def runs_on_ranks(num_processes: int, configs: list[TrainConfig]) -> list[list[dict[str, float]]]:
    first, *others = run_on_ranks(num_processes, run_all, configs, timeout_s=280)
    assert all(other == first for other in others), "all processes know the same numbers"
    return first


@cache
def alone(config: TrainConfig) -> list[dict[str, float]]:
    return run_all([config])[0]


def assert_equal_rows(found, expected, *, loss, grad_norm):
    """Every number of every row; the norm's tolerance is relative."""
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for step, (row, right) in enumerate(zip(found, expected, strict=True), start=1):
        for key, x in right.items():
            tolerance = grad_norm * x if key == "grad_norm" else loss
            is_equal = row[key] is None if x is None else abs(row[key] - x) <= tolerance
            assert is_equal, f"{key} of step {step} is {row[key]}, not {x}"


TOLERANCES = {"float32": {"loss": 1e-5, "grad_norm": 1e-4}, "float64": {"loss": 1e-9, "grad_norm": 1e-9}}


@pytest.mark.parametrize("num_processes", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_twenty_steps_have_the_losses_and_norms_of_one_process(num_processes):
    configs = [recipe(layout, dtype=dtype) for layout in LAYOUTS[num_processes] for dtype in TOLERANCES]
    for config, found in zip(configs, runs_on_ranks(num_processes, configs), strict=True):
        expected = alone(recipe(dtype=config.train.dtype))
        assert len(expected) == 20
        assert expected[-1]["loss"] < expected[0]["loss"] - 0.5
        assert_equal_rows(found, expected, **TOLERANCES[config.train.dtype])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_starts_as_float32_does_and_learns(dtype):
    expected = alone(recipe(steps=8))
    runs = [alone(recipe(dtype=dtype, steps=8))]
    runs += runs_on_ranks(2, [recipe(layout, dtype=dtype, steps=8) for layout in LAYOUTS[2]])
    runs += runs_on_ranks(4, [recipe(ParallelConfig(dp_shard=2, pp=2, num_microbatches=2), dtype=dtype, steps=8)])
    for rows in runs:
        for row, right in zip(rows[:3], expected[:3], strict=True):
            assert {key: row[key] for key in right} == pytest.approx(right, rel=0.02)
        assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert runs[0] != expected, "it is another precision"


OBJECTIVES = {
    "linear weights": {"weight_schedule": "linear", "weight_warmup_steps": 4, "initial_weights": (1.0, 0.0, 0.5)},
    "cosine weights": {"weight_schedule": "cosine", "weight_warmup_steps": 3},
    "rotational": {"curriculum": "rotational", "curriculum_period": 3},
    "gradual": {"curriculum": "gradual"},
    "layer dropout": {"layer_dropout": 0.5, "dropout_schedule": "exponential"},
    "confidence": {"confidence_weighting": True, "chunk_size": 7},
    "temperature": {"temperature": 2.0},
    "all": {"curriculum": "rotational", "layer_dropout": 0.3, "confidence_weighting": True, "temperature": 0.7},
}


def test_every_option_of_the_objective_is_the_same_in_a_pipeline_with_data_parallelism():
    schedules = ["1f1b", "interleaved_1f1b", "zbv"]
    wide = [
        ParallelConfig(dp_shard=2, pp=2, num_microbatches=2, schedule=schedules[i % 3]) for i in range(len(OBJECTIVES))
    ]
    configs = [
        recipe(layout, steps=5, dtype="float64", **options)
        for layout, options in zip(wide, OBJECTIVES.values(), strict=True)
    ]
    plain = alone(recipe(steps=5, dtype="float64"))
    for found, (name, options) in zip(runs_on_ranks(4, configs), OBJECTIVES.items(), strict=True):
        expected = alone(recipe(steps=5, dtype="float64", **options))
        assert expected != plain, name
        assert_equal_rows(found, expected, loss=1e-9, grad_norm=1e-9)


def test_whole_vocabulary_confidence_and_temperature_under_tensor_parallelism():
    options = {"confidence_weighting": True, "temperature": 0.7, "layer_dropout": 0.3, "chunk_size": 7}
    (found,) = runs_on_ranks(2, [recipe(ParallelConfig(tp=2), steps=5, dtype="float64", **options)])
    assert_equal_rows(found, alone(recipe(steps=5, dtype="float64", **options)), loss=1e-9, grad_norm=1e-9)


def idle_exits(configs: list[TrainConfig]) -> list[tuple[int, list[str]]]:
    """How often an exit took no part in five steps, and what changed about one that took none."""
    results = []
    for config in configs:
        trainer, num_idle, wrong = trainer_of(config), 0, []
        for step in range(1, 6):
            before = {name: local(copies[0]).clone() for name, copies in trainer.placed.parameters.items()}
            counts = {name: num_steps(trainer, name) for name in before}
            row, _ = trainer.step(step)
            idle = [n for n in config.model.exit_layers if row[f"loss/exit_{n}"] is None]
            num_idle += len(idle)
            for name, (parameter, *_) in trainer.placed.parameters.items():
                is_same = torch.equal(local(parameter), before[name])
                if name.split(".")[1] in map(str, idle) and name.startswith("exits."):
                    is_idle = parameter.grad is None and is_same and num_steps(trainer, name) == counts[name]
                    wrong += [] if is_idle else [f"{name} in step {step}"]
                elif parameter.grad is None or num_steps(trainer, name) != counts[name] + 1:
                    wrong.append(f"{name} stood still in step {step}")
        results.append((num_idle, wrong))
    return results


def num_steps(trainer: Trainer, name: str) -> float:
    """Steps that the optimizer has made with a parameter."""
    return float(trainer.optimizer.state[trainer.placed.parameters[name][0]].get("step", 0))


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_an_exit_that_takes_no_part_has_no_gradient_and_no_optimizer_step(num_processes):
    layouts = {
        1: [ONE],
        2: [ParallelConfig(dp_shard=2), ParallelConfig(tp=2), ParallelConfig(pp=2, schedule="zbv", num_microbatches=4)],
        4: [ParallelConfig(dp_shard=2, pp=2, num_microbatches=2), ParallelConfig(dp_shard=2, dp_replicate=2)],
    }
    configs = [
        recipe(layout, steps=5, curriculum="rotational", curriculum_period=3) for layout in layouts[num_processes]
    ]
    for results in run_on_ranks(num_processes, idle_exits, configs):
        assert results == [(10, [])] * len(configs), "of three exits, two rest in each step"


def scaled_steps(configs: list[TrainConfig], scales: tuple[float, float]) -> list[list[str]]:
    """Names of parameters whose gradients, after the division, differ between two loss scales."""
    return [_differing(*(_step_with_scale(config, scale) for scale in scales)) for config in configs]


def _step_with_scale(config: TrainConfig, scale: float) -> dict[str, torch.Tensor]:
    trainer = trainer_of(config)
    trainer.loss_scale = LossScale(scale=scale)
    row, bad_batch = trainer.step(1)
    assert bad_batch is None
    grads = {name: local(copies[0].grad).clone() for name, copies in trainer.placed.parameters.items()}
    return grads | {"the norm": torch.tensor(row["grad_norm"]), "the loss": torch.tensor(row["loss"])}


def _differing(ones: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> list[str]:
    """In float32 a power of two changes no digit; in half precision small numbers have fewer."""
    return [name for name, grad in ones.items() if not torch.equal(grad, others[name])]


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_the_loss_scale_covers_every_exit_and_is_divided_out_of_every_gradient(num_processes):
    layouts = LAYOUTS | {1: [ONE], 4: [ParallelConfig(dp_shard=2, pp=2, num_microbatches=2)]}
    configs = [recipe(layout) for layout in layouts[num_processes]]
    for differing in run_on_ranks(num_processes, scaled_steps, configs, (1.0, 2.0**12)):
        assert differing == [[]] * len(configs)


def overflow(configs: list[TrainConfig]) -> list[list[str]]:
    """What is wrong after a step whose scale is too large, by recipe."""
    return [_wrong_after_overflow(trainer_of(config)) for config in configs]


def _wrong_after_overflow(trainer: Trainer) -> list[str]:
    trainer.step(1)
    before = {name: local(tensor).clone() for name, tensor in trainer.tensors().items()}
    trainer.loss_scale = LossScale(scale=2.0**40)
    row, bad_batch = trainer.step(2)
    wrong = [name for name, tensor in trainer.tensors().items() if not torch.equal(local(tensor), before[name])]
    wrong += [] if bad_batch is not None else ["the step isn't skipped"]
    wrong += [] if row["loss_scale"] == trainer.loss_scale.scale == 2.0**39 else ["the scale isn't halved"]
    trainer.loss_scale = LossScale()
    row, bad_batch = trainer.step(3)
    wrong += [] if bad_batch is None else ["the step after it is skipped too"]
    changed = [name for name, tensor in trainer.tensors().items() if not torch.equal(local(tensor), before[name])]
    return wrong + ([] if len(changed) == len(before) else ["the step after it changes nothing"])


@pytest.mark.parametrize("num_processes", [1, 2])
def test_an_overflow_in_float16_skips_the_step_halves_the_scale_and_changes_no_weight(num_processes):
    layouts = [ONE] if num_processes == 1 else LAYOUTS[2]
    for wrong in run_on_ranks(num_processes, overflow, [recipe(layout, dtype="float16") for layout in layouts]):
        assert wrong == [[]] * len(layouts)
