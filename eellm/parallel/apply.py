"""Parallelism is applied to a plain model from outside, in this order."""

from torch import nn

from eellm.config.parallel import ParallelConfig
from eellm.exits.lm import EarlyExitLM
from eellm.model.init import torch_dtype
from eellm.parallel.data import shard
from eellm.parallel.mesh import World
from eellm.parallel.recompute import recompute_layers
from eellm.parallel.tensor import apply_tensor_parallel


def parallelize(root: nn.Module, model: EarlyExitLM, config: ParallelConfig, world: World, *, dtype: str) -> None:
    """Lays `model` (a whole one, or a pipeline stage's part) out over the mesh, in place.

    root: the module whose forward is called: FSDP's hooks are on it. dtype: of the computation. Parameters may be on
    the meta device.
    """
    layers = model.decoder.layers
    if config.tp > 1:  # first: it changes parameters' shapes, and everything after wraps what it leaves
        apply_tensor_parallel(model, world.submesh("tp"))
        model.decoder.tie()  # parallelize_module has untied them
    if config.recompute != "none":  # before compile, so that the compiler sees what is computed twice
        recompute_layers(layers, config.recompute)
    if config.compile:  # layer by layer: they are alike and compiled once, and FSDP's hooks stay outside
        for layer in layers.values():
            layer.compile()
    if config.dp > 1:  # last: it gathers whole parameters, tensor-parallel ones included
        axes = ("dp_replicate", "dp_shard") if config.dp_replicate > 1 else ("dp_shard",)
        shard(root, layers, world.submesh(*axes), dtype=torch_dtype(dtype), is_pipelined=config.pp > 1)
