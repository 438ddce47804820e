"""A model laid out over the processes of a run: this process's stages, their parameters by name, what is tied to what.

Nothing here depends on weights: stages are made without any (on the meta device), parallelised, and only then given
memory. `fill` then puts each process's part of each parameter there, one parameter at a time, so that no process ever
holds the whole model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from eellm.config.model import ExitConfig, ModelConfig
from eellm.config.parallel import ParallelConfig
from eellm.config.train import LossConfig
from eellm.model.init import torch_dtype
from eellm.parallel.apply import parallelize
from eellm.parallel.gradients import Tied
from eellm.parallel.mesh import World
from eellm.parallel.tensor import gather_rows
from eellm.pipeline.stage import StageModule, canonical_name, shared_names, stage_part
from eellm.plan.layout import plan_stages
from eellm.schedule.partition import SPLIT_BACKWARD, Stage, stages_of_ranks


@dataclass(frozen=True, eq=False)
class PlacedModel:
    """This process's part of a model."""

    config: ModelConfig
    stages: tuple[Stage, ...]
    """All stages of the pipeline."""
    modules: list[StageModule]
    """Those of this process."""
    parameters: dict[str, tuple[nn.Parameter, ...]]
    """By the whole model's name; several copies where this process runs several stages that share one."""
    tied: list[Tied]
    """Parameters that several stages hold."""
    counted: list[nn.Parameter]
    """Those that this process counts in the gradient's norm: of what several stages hold, the first stage counts."""

    @torch.no_grad()
    def fill(self, value: Callable[[str, torch.Size], Tensor]) -> None:
        """Gives every parameter its part of `value(name, shape)`, the whole one."""
        for name, copies in self.parameters.items():
            whole = value(name, copies[0].shape)
            for copy in copies:
                copy_part(copy, whole)

    def trainable(self) -> list[nn.Parameter]:
        """What an optimizer steps, each once."""
        return [copy for copies in self.parameters.values() for copy in copies if copy.requires_grad]


def place(
    config: ModelConfig, parallel: ParallelConfig, world: World, *, objective: LossConfig, dtype: str
) -> PlacedModel:
    """Makes this process's stages, with memory but without values. dtype: of the computation."""
    stages = plan_stages(config, parallel)
    mine = stages_of_ranks(parallel.schedule, parallel.pp, parallel.stages_per_rank) if parallel.pp > 1 else ((0,),)
    compute = torch_dtype(dtype)
    autocast = compute if compute.itemsize == 2 and parallel.dp == 1 else None  # else FSDP casts
    modules = []
    for index in mine[world.index("pp")]:
        part = stage_part(config, stages[index])
        if compute == torch.float64:
            part = part.double()
        wrap = partial(gather_rows, mesh=world.submesh("tp")) if parallel.tp > 1 else lambda head: head
        module = StageModule(
            part,
            stages[index],
            objective=objective,
            mode=parallel.exit_mode,
            autocast=autocast,
            is_split=parallel.pp > 1 and parallel.schedule in SPLIT_BACKWARD,
            wrap_head=wrap,
        )
        parallelize(module, part, parallel, world, dtype=dtype)
        modules.append(module.to_empty(device=world.device))
        part.decoder.tie()  # to_empty made two of them
    return _described(config, stages, modules, mine, world)


def _described(
    config: ModelConfig,
    stages: tuple[Stage, ...],
    modules: list[StageModule],
    stages_of: tuple[tuple[int, ...], ...],
    world: World,
) -> PlacedModel:
    parameters: dict[str, tuple[nn.Parameter, ...]] = {}
    counted: list[nn.Parameter] = []
    shared = shared_names(config, stages) if len(stages) > 1 else {}
    for module in modules:
        for name, parameter in module.model.named_parameters():
            name = canonical_name(name, config)
            parameters[name] = (*parameters.get(name, ()), parameter)
            if module.stage.index == shared.get(name, (module.stage.index,))[0]:
                counted.append(parameter)
    rank_of = {index: rank for rank, indices in enumerate(stages_of) for index in indices}
    ranks_of = {name: tuple(sorted({rank_of[index] for index in holders})) for name, holders in shared.items()}
    groups = {ranks: _group(ranks, world) for ranks in sorted(set(ranks_of.values())) if len(ranks) > 1}
    tied = [Tied(parameters.get(name, ()), groups.get(ranks)) for name, ranks in ranks_of.items()]
    return PlacedModel(config, stages, modules, parameters, tied, counted)


def _group(pipeline_ranks: tuple[int, ...], world: World) -> dist.ProcessGroup | None:
    """The processes of this pipeline at some of its ranks; None where we aren't among them.

    NOTE all processes call this, for the same ranks in the same order. torch names a group that only its members make
    by how many others each is in, and those at several stages' ranks are in more: they would wait for each other.
    """
    assert world.mesh is not None, "a single process has no pipeline"
    pipelines = world.mesh.mesh.flatten(1).T.tolist()
    group, _ = dist.new_subgroups_by_enumeration([[ranks[rank] for rank in pipeline_ranks] for ranks in pipelines])
    return group if isinstance(group, dist.ProcessGroup) else None


def copy_part(parameter: nn.Parameter, whole: Tensor) -> None:
    """Copies this process's part of `whole` into `parameter`."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(whole)
        return
    mesh = parameter.device_mesh
    names = mesh.mesh_dim_names or ()
    part = whole
    # NOTE tensor parallelism first: FSDP has cut what that left
    for dim in sorted(range(mesh.ndim), key=lambda dim: names[dim] != "tp"):
        placement = parameter.placements[dim]
        if placement.is_shard() or names[dim] == "dp_shard":
            chunks = part.chunk(mesh.size(dim), placement.dim)  # pyrefly: ignore[missing-attribute]
            index = mesh.get_local_rank(dim)
            part = chunks[index] if index < len(chunks) else chunks[0][:0]
    parameter.to_local().copy_(part)


def exit_source(name: str, config: ModelConfig) -> str | None:
    """The backbone's parameter that an exit's one starts as a copy of; None for those that start at random (gates).

    The pairs are those of `eellm.exits.lm.add_exits`.
    """
    _, layer, part = name.split(".", 2)
    exit: ExitConfig = next(exit for exit in config.exits if exit.layer == int(layer))
    if part.startswith("gate."):
        return None
    if not part.startswith("body."):
        return f"decoder.{part}"
    part = part.removeprefix("body.")
    if exit.kind == "layer":
        return f"decoder.layers.{config.num_layers}.{part}"
    return f"decoder.layers.{exit.layer + 1}.{'mlp_' if part.startswith('norm.') else ''}{part}"
