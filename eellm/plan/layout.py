"""A recipe's layout: which stages there are, how many microbatches, and what can't be. Looked at before anything
starts; errors name the nearest values that work."""

from dataclasses import replace

from eellm.config.model import ExitConfig, ModelConfig
from eellm.config.parallel import ParallelConfig
from eellm.config.train import TrainConfig
from eellm.errors import ConfigError
from eellm.plan.parameters import head_parameters, layer_parameters, mlp_block_parameters
from eellm.schedule.partition import (
    SINGLE,
    SPLIT_BACKWARD,
    V_SHAPED,
    Stage,
    check_microbatches,
    partition,
    takes,
)

ENOUGH_MICROBATCHES_PER_STAGE = 4
"""With so many, a pipeline idles for a fifth of the time at most."""


def plan_stages(model: ModelConfig, parallel: ParallelConfig) -> tuple[Stage, ...]:
    """The stages of a recipe. Raises ConfigError for ones that can't be."""
    per_rank = 1 if parallel.schedule in SINGLE else 2 if parallel.schedule in V_SHAPED else parallel.stages_per_rank
    num_stages = parallel.pp * per_rank if parallel.pp > 1 else 1
    if parallel.exit_mode != "deferred" and parallel.pp > 1 and parallel.schedule in SPLIT_BACKWARD:
        raise ConfigError(
            f"parallel.exit_mode = {parallel.exit_mode!r}: schedule {parallel.schedule} takes the backward for inputs "
            "and for weights apart, and exits that share a matrix would get wrong gradients; use exit_mode = 'deferred'"
        )
    layer = layer_parameters(model)
    return partition(
        model.num_layers,
        num_stages,
        model.exit_layers,
        layers_per_stage=parallel.layers_per_stage,
        placement=parallel.exit_placement,
        head_cost=head_parameters(model) / layer,
        exit_costs={exit.layer: _products(model, exit) / layer for exit in model.exits},
    )


def _products(model: ModelConfig, exit: ExitConfig) -> int:
    """Parameters of the matrices that a row goes through at an exit, the output matrix among them."""
    body = {"mlp": mlp_block_parameters(model), "layer": layer_parameters(model)}.get(exit.kind, 0)
    return body + head_parameters(model)


def fit_layout(config: TrainConfig) -> TrainConfig:
    """The recipe with `num_microbatches` filled in. Raises ConfigError where its rows don't fit its layout."""
    parallel, rows = config.parallel, config.train.global_batch_size
    if rows % parallel.dp:
        raise ConfigError(
            f"train.global_batch_size = {rows}: must be a multiple of dp_replicate · dp_shard = {parallel.dp}; the "
            f"nearest are {_around(rows, parallel.dp)}"
        )
    fits = _fitting(config)
    if not fits:
        raise ConfigError(
            f"train.global_batch_size = {rows}: the rows of a data-parallel rank make too few microbatches for "
            f"{parallel.schedule} with pp = {parallel.pp}; use a multiple of "
            f"{parallel.dp * parallel.pp * (2 if parallel.schedule == 'dualpipev' else 1)}"
        )
    chosen = parallel.num_microbatches or _enough(fits, parallel.pp)
    if parallel.pp > 1:
        check_microbatches(parallel.schedule, parallel.pp, chosen, num_rows=rows // parallel.dp)
        _check_pipeline(config)
    if chosen not in fits:
        raise ConfigError(
            f"parallel.num_microbatches = {chosen}: the {rows // parallel.dp} rows of a data-parallel rank don't "
            f"divide into as many; use one of {fits}, or a global_batch_size of {_around(rows, parallel.dp * chosen)}"
        )
    return replace(config, parallel=replace(parallel, num_microbatches=chosen))


def _check_pipeline(config: TrainConfig) -> None:
    parallel = config.parallel
    splits = parallel.schedule in SPLIT_BACKWARD
    if splits and parallel.recompute == "selective":
        raise ConfigError(
            f"parallel.recompute = 'selective': schedule {parallel.schedule} takes the backward for inputs and for "
            "weights apart, and torch gives the activations kept to the first only; use full or none"
        )
    if splits and parallel.compile:
        raise ConfigError(
            f"parallel.compile = true: torch can't take a compiled backward apart, as schedule {parallel.schedule} "
            "does; use 1f1b or interleaved_1f1b, or don't compile"
        )
    if parallel.stages_per_rank != 2 and parallel.schedule in V_SHAPED:
        raise ConfigError(f"parallel.stages_per_rank = {parallel.stages_per_rank}: {parallel.schedule} has 2 on each")


def _enough(fits: list[int], pp: int) -> int:
    """The fewest microbatches that keep a pipeline busy, or as many as there can be."""
    enough = [n for n in fits if n >= ENOUGH_MICROBATCHES_PER_STAGE * pp]
    return 1 if pp == 1 else min(enough, default=max(fits))


def _fitting(config: TrainConfig) -> list[int]:
    """Numbers of microbatches that divide a data-parallel rank's rows and that the schedule takes."""
    parallel, rows = config.parallel, config.train.global_batch_size // config.parallel.dp
    divisors = [n for n in range(1, rows + 1) if rows % n == 0]
    return [n for n in divisors if parallel.pp == 1 or takes(parallel.schedule, parallel.pp, n)]


def _around(n: int, step: int) -> str:
    below = n // step * step
    return f"{below} and {below + step}" if below else str(step)
