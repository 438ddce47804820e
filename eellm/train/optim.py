"""AdamW with decay on matrices only, and the learning rate as a pure function of the step."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from eellm.config.optim import OptimConfig

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
"""Where torch updates a whole parameter in one kernel."""


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """Matrices decay (embeddings and output matrices among them); norms and biases don't.

    Parameters are plain tensors or DTensors. NOTE the two never share a group: fused kernels refuse a mixture.
    """
    groups: dict[tuple[bool, type], list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault((parameter.dim() > 1, type(parameter)), []).append(parameter)
    fused = all(p.device.type in FUSED_DEVICES and p.is_floating_point() for group in groups.values() for p in group)
    return torch.optim.AdamW(
        [
            {"params": group, "weight_decay": config.weight_decay if is_matrix else 0.0}
            for (is_matrix, _), group in sorted(groups.items(), key=lambda item: not item[0][0])
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        fused=fused,
    )


def learning_rate(step: int, num_steps: int, config: OptimConfig) -> float:
    """At `step` (from 1): linear from 0 to `lr`, then as `schedule` says down to `min_lr` at the last step."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    start = float(config.warmup_steps)
    if config.schedule == "wsd":
        start = max(start, num_steps * (1 - config.decay_fraction))
    done = min((step - start) / (num_steps - start), 1.0) if step > start else 0.0
    left = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    lowest = config.lr / 10 if config.min_lr is None else config.min_lr
    return lowest + (config.lr - lowest) * left
