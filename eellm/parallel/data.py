"""Data parallelism by FSDP2: parameters, gradients and optimizer state are sharded over dp_shard and replicated over
dp_replicate (HSDP). Gradients are summed, not averaged: losses are divided by the global number of targets.

Each layer is a group of its own. All else (embedding, norm, heads, exits) is the root's: an exit's head runs in the
backward of a node that FSDP doesn't know, and finds the root's parameters gathered from the forward to the last
backward.
"""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard


def shard(root: nn.Module, layers: nn.ModuleDict, mesh: DeviceMesh, *, dtype: torch.dtype, is_pipelined: bool) -> None:
    """Shards `root` and its `layers`, in place, over the 1- or 2-dimensional `mesh`.

    dtype: of the computation; gradients are reduced in float32 (float64) whatever it is. Under a pipeline, parameters
    stay gathered between microbatches.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    policy = MixedPrecisionPolicy() if dtype == wide else MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=wide)
    for layer in layers.values():
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=not is_pipelined)
    fully_shard(root, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def shard_frozen(layers: nn.ModuleDict, mesh: DeviceMesh) -> None:
    """Shards layers that run forward only, in place: each is gathered for its own forward, and only then."""
    for layer in layers.values():
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)


def mark_last(root: nn.Module, *, is_last: bool) -> None:
    """Before each backward without a pipeline: gradients are reduced after the step's last one only."""
    if isinstance(root, FSDPModule):
        root.set_is_last_backward(is_last)
        root.set_requires_gradient_sync(is_last)
        root.set_reshard_after_backward(is_last)
