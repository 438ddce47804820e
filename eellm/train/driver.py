"""Who runs the stages of this process in a step: a loop, a schedule of torch's, or ours that fills bubbles."""

from typing import Any

import torch

from eellm.config.train import TrainConfig
from eellm.errors import ConfigError
from eellm.log import log
from eellm.model.init import torch_dtype
from eellm.parallel.mesh import World
from eellm.pipeline.filled import FilledPipeline
from eellm.pipeline.measure import measure_stages
from eellm.pipeline.placed import PlacedModel
from eellm.pipeline.run import Driver, Loop, Pipeline
from eellm.pipeline.stage import shared_names
from eellm.pipeline.watched import Watch
from eellm.plan.simulate import StageCost, fill_bubbles
from eellm.schedule.action import Schedule
from eellm.schedule.fill import is_part_1
from eellm.schedule.generate import make_schedule

StageTimes = list[tuple[float, float]]
"""Seconds of a microbatch's forward and backward, by stage."""


def make_driver(
    config: TrainConfig, placed: PlacedModel, world: World, watch: Watch, times: StageTimes | None = None
) -> tuple[Driver, StageTimes | None]:
    """The driver of a run, and the times that its schedule is made for, where it needs any.

    times: measured before; else they are measured here. Raises ConfigError for what the schedule can't train.
    """
    parallel = config.parallel
    if parallel.pp == 1:
        return Loop(placed.modules[0], parallel, watch), None
    layout = _layout(config, world)
    if parallel.schedule != "filled_1f1b":
        return Pipeline(placed.modules, parallel, watch=watch, **layout), None
    _check_fillable(placed)
    if times is None:
        hidden, microbatch = layout["hidden"], layout["microbatch"]
        times = measure_stages(placed.modules[0], parallel, world, microbatch=microbatch, hidden=hidden)
    filled = fill(config, times)
    if world.is_main:
        log.info(describe_filling(filled))
    return FilledPipeline(placed.modules, parallel, filled, watch=watch, **layout), times


def fill(config: TrainConfig, times: StageTimes) -> Schedule:
    """1F1B with as many extra microbatches as fit at these times."""
    parallel = config.parallel
    assert parallel.num_microbatches is not None, "the recipe is resolved"
    costs = [StageCost(forward_s=forward, input_s=backward, weight_s=0.0) for forward, backward in times]
    return fill_bubbles(make_schedule("1f1b", parallel.pp, parallel.num_microbatches), costs)


def describe_filling(filled: Schedule) -> str:
    """What a filled schedule has room for, in words."""
    before_steady = sum(is_part_1(work) for work in filled.extras)
    at_the_end = len(filled.extras) - before_steady
    if not filled.extras:
        return "filled_1f1b: no idle time is long enough for an extra microbatch; this is plain 1f1b"
    return (
        f"filled_1f1b: {before_steady} extra microbatches before the steady state and {at_the_end} at the end, beside "
        f"{filled.num_microbatches} regular ones"
    )


def _layout(config: TrainConfig, world: World) -> dict[str, Any]:
    parallel, dtype = config.parallel, torch_dtype(config.train.dtype)
    assert parallel.num_microbatches is not None, "the recipe is resolved"
    num_rows = config.train.global_batch_size // parallel.dp // parallel.num_microbatches
    is_cast = dtype.itemsize == 2 and parallel.dp > 1  # by FSDP; autocast leaves the hidden state in float32
    return {
        "group": world.submesh("pp").get_group(),
        "microbatch": (num_rows, config.data.seq_len),
        "hidden": (config.model.hidden_size, dtype if is_cast or dtype.itemsize > 2 else torch.float32),
        "device": world.device,
    }


def _check_fillable(placed: PlacedModel) -> None:
    """Raises ConfigError for parameters that several stages hold."""
    shared = shared_names(placed.config, placed.stages)
    if shared:
        name, stages = next(iter(shared.items()))
        raise ConfigError(
            f"parallel.schedule = 'filled_1f1b': stages {' and '.join(map(str, stages))} share {name}, whose gradient "
            "would be biased; use tie_embeddings = false and exits with head = 'own' and a norm of their own, or 1f1b"
        )
