"""One step of a pipeline whose bubbles are filled, against a single process that computes the same partial losses.

The reference knows no pipeline: it takes each microbatch through the layers that its `Work` names, cuts the graph where
the backward ends, adds up the losses on the way, and scales them and the gradients as `fill_scales` says.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import eellm
from eellm.config.parallel import ParallelConfig
from eellm.config.train import LossConfig, TrainConfig
from eellm.data.loader import Batch
from eellm.exits.loss import IGNORE
from eellm.parallel.gradients import settle_placements
from eellm.parallel.mesh import join
from eellm.pipeline.filled import FilledPipeline
from eellm.pipeline.placed import place
from eellm.pipeline.record import Recorder
from eellm.pipeline.stage import StepLosses
from eellm.pipeline.watched import unwatched
from eellm.plan.layout import plan_stages
from eellm.plan.simulate import StageCost, fill_bubbles
from eellm.schedule.action import Schedule, Work
from eellm.schedule.fill import fill_scales, is_part_1
from eellm.schedule.generate import make_schedule
from eellm.schedule.partition import Stage
from eellm.schedule.timeline import Timeline
from eellm.train.trainer import Trainer
from tests.distributed.one_step import SEQ_LEN, batch, stepped_gradient, value, weights_of, whole_model


@dataclass(frozen=True)
class FilledStep:
    """What is computed, and how it is laid out."""

    model: eellm.ModelConfig
    parallel: ParallelConfig
    mistake: str | None = None

    @property
    def filled(self) -> Schedule:
        """The schedule of stages that are alike."""
        costs = [StageCost(forward_s=1.0, input_s=1.0, weight_s=1.0)] * self.parallel.pp
        return fill_bubbles(make_schedule("1f1b", self.parallel.pp, self.parallel.num_microbatches), costs)

    @property
    def num_rows(self) -> int:
        """Of all data-parallel ranks, one a microbatch."""
        return len(self.filled.works) * self.parallel.dp


@dataclass(frozen=True)
class FilledOutcome:
    """What one process has after the step."""

    errors: dict[str, float]
    """Largest difference to the reference, by parameter."""
    sums: dict[int, float]
    """Of the losses in training."""
    evaluated: dict[int, float]


def run_filled_steps(steps: list[FilledStep]) -> list[FilledOutcome]:
    """On each rank."""
    return [_run(step) for step in steps]


def _run(step: FilledStep) -> FilledOutcome:
    parallel, filled = step.parallel, step.filled
    world = join(parallel)
    placed = place(step.model, parallel, world, objective=LossConfig(chunk_size=5), dtype="float64")
    placed.fill(value)
    driver = FilledPipeline(
        placed.modules,
        parallel,
        filled,
        watch=unwatched,
        group=world.submesh("pp").get_group(),
        microbatch=(1, SEQ_LEN),
        hidden=(step.model.hidden_size, torch.float64),
        device=world.device,
    )
    if step.mistake == "gradients aren't scaled":
        driver.scale = type(driver.scale)(loss=driver.scale.loss, gradient=1.0)
    mine = part_of(step, world.dp_index)
    evaluated, losses = StepLosses(dict.fromkeys(weights_of(step.model), 1.0)), StepLosses(weights(step))
    driver.evaluate(mine.part(slice(filled.num_microbatches)), evaluated)
    driver.step(mine, losses)
    settle_placements(placed.trainable())
    expected, _ = reference(step)
    errors = {
        name: (stepped_gradient(copy) - expected[name]).abs().max().item()
        for name, (copy,) in placed.parameters.items()
        if copy.grad is not None
    }
    found = ({n: float(x) / parallel.tp for n, x in each.sums().items()} for each in (losses, evaluated))
    return FilledOutcome(errors, *found)


@dataclass(frozen=True)
class FilledRun:
    """What three optimizer steps show, after times were given with which extras fit."""

    measured: list[tuple[float, float]] | None
    num_extra: int
    before: dict[str, float]
    """Validation losses before the first step."""
    rows: list[dict[str, float]]
    num_rows_taken: int
    """Of the training data."""
    timeline: Timeline | None
    """Of the second step, on rank 0."""


def run_recipe(config: TrainConfig) -> FilledRun:
    """On each rank."""
    world = join(config.parallel)
    trainer = Trainer(config, world, unwatched)
    measured = trainer.stage_times
    trainer.restore(trainer.state() | {"stage_times": [[1.0, 2.0]] * config.parallel.pp})
    before, rows = trainer.evaluate(), []
    recorder = Recorder(world, num_microbatches=config.parallel.num_microbatches)
    for n in (1, 2, 3):
        row, _ = trainer.step(n, recorder if n == 2 else None)
        rows.append({key: x for key, x in row.items() if "loss" in key or key == "grad_norm"})
    (place,) = trainer.stream.state()["places"]
    return FilledRun(measured, trainer.driver.num_extra, before, rows, place["row"], recorder.timeline())


def part_of(step: FilledStep, dp_index: int) -> Batch:
    """The rows of one data-parallel rank."""
    each = len(step.filled.works)
    return batch(step.num_rows)[0].part(slice(dp_index * each, (dp_index + 1) * each))


def weights(step: FilledStep) -> dict[int, float]:
    """Of each exit's sum of losses: over the targets of the regular rows."""
    regular = [part_of(step, i).labels_BT[: step.filled.num_microbatches] for i in range(step.parallel.dp)]
    num_targets = sum(int((labels_BT != IGNORE).sum()) for labels_BT in regular)
    return {layer: weight / num_targets for layer, weight in weights_of(step.model).items()}


def reference(step: FilledStep) -> tuple[dict[str, torch.Tensor], dict[int, float]]:
    """Gradients by name, and the regular rows' sums of losses."""
    model, filled, stages = whole_model(step.model), step.filled, plan_stages(step.model, step.parallel)
    scales, sums = fill_scales(filled), {}
    for dp_index in range(step.parallel.dp):
        rows = part_of(step, dp_index)
        for work in filled.works:
            row = rows.part(slice(work.microbatch, work.microbatch + 1))
            total = 0.0
            for layer, (stage, loss) in partial_losses(model, stages, row, work).items():
                total = total + loss * weights(step)[layer] * (scales[stage].loss if is_part_1(work) else 1.0)
                if work.microbatch < filled.num_microbatches:
                    sums[layer] = sums.get(layer, 0.0) + loss.item()
            if isinstance(total, torch.Tensor):
                total.backward()
    for stage in stages:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and stage_of(name, stages, step.model) == stage.index:
                parameter.grad *= scales[stage.index].gradient
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, sums


def partial_losses(
    model: eellm.EarlyExitLM, stages: tuple[Stage, ...], row: Batch, work: Work
) -> dict[int, tuple[int, torch.Tensor]]:
    """The stage and the sum of losses of each exit that a microbatch learns from."""
    packed = model.decoder.packed_rows(row.positions_BT, row.documents_BT, torch.float64)
    h_BTD, found = model.decoder.embed(row.tokens_BT), {}
    final = model.config.num_layers

    def add(layer: int, stage: Stage) -> None:
        logits_NV = model.logits(layer, model.normed(layer, h_BTD, packed)).flatten(0, 1)
        loss = F.cross_entropy(logits_NV, row.labels_BT.flatten(), ignore_index=IGNORE, reduction="sum")
        found[layer] = (stage.index, loss)

    for stage in stages[: work.forward_end]:
        learns = work.backward_start <= stage.index < work.backward_end
        h_BTD = h_BTD.detach() if stage.index == work.backward_start and stage.index > 0 else h_BTD
        if learns and stage.first - 1 in stage.exits:
            add(stage.first - 1, stage)
        for n in range(stage.first, stage.last + 1):
            h_BTD = model.decoder.layer(n)(h_BTD, packed)
            if learns and (n in stage.exits or n == final):
                add(n, stage)
    return found


def stage_of(name: str, stages: tuple[Stage, ...], config: eellm.ModelConfig) -> int:
    """The stage that holds a parameter."""
    kind, number = name.split(".")[:2] if name.startswith("exits") else (name.split(".")[1], name.split(".")[2])
    if kind == "exits":
        return next(stage.index for stage in stages if int(number) in stage.exits)
    if kind == "layers":
        return next(stage.index for stage in stages if stage.first <= int(number) <= stage.last)
    return 0 if kind == "embed" else len(stages) - 1


def found_differences(step: FilledStep, outcomes: list[FilledOutcome]) -> list[str]:
    """What isn't equal to the reference."""
    grads, sums = reference(step)
    found = [f"no gradient of {name}" for name in grads if not any(name in outcome.errors for outcome in outcomes)]
    found += [f"gradient of {name}" for outcome in outcomes for name, e in outcome.errors.items() if not e <= 1e-10]
    for what in ("sums", "evaluated"):
        for layer, expected in sums.items():
            total = sum(getattr(outcome, what).get(layer, 0.0) for outcome in outcomes)
            if abs(total - expected) > 1e-10:
                found.append(f"{what} of exit {layer}")
    return found
