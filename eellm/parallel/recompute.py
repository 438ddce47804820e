"""Activation checkpointing: a layer's activations are dropped and computed again in the backward.

`full` keeps a layer's input only; `selective` keeps what its matrix products put out, so that only norms, rotations,
attention and activations run twice. Exits need none: their heads run in the backward anyway. The layer's `forward` is
replaced, not the layer: names stay.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

KEPT = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


def recompute_layers(layers: nn.ModuleDict, mode: Literal["selective", "full"]) -> None:
    """Makes each layer's backward compute its activations again, in place."""
    context = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if mode == "selective" else {}
    for layer in layers.values():
        layer.forward = partial(_run_again, layer.forward, context)


def _run_again(forward: Callable[..., Any], context: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    # nothing in a layer draws random numbers: its dropout is decided outside
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **context, **kwargs)


def _policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
