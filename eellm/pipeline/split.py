"""What a stage's heads need under a schedule that takes the backward for inputs and for weights apart.

torch starts the second part at each node where a parameter meets the way from the stage's output to its input, and
runs each such part of the graph once. A matrix that two heads of a stage share would meet it twice, with layers in
between, and they would run twice: an error. So here the heads' parameters all join the way at one node, where the stage
begins. Their gradients are made in the first part and kept to the second, and no head runs twice.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Edges = Mapping[nn.Parameter, Tensor]


def join_at_start(h: Tensor, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, Edges]:
    """`h`, and what stands for each parameter in the graph behind it (see `exit_loss_node`)."""
    parameters = [p for p in parameters if p.requires_grad]
    h, *edges = _Join.apply(h, *parameters)
    return h, dict(zip(parameters, edges, strict=True))


class _Join(torch.autograd.Function):
    """Identity on all."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:  # pyrefly: ignore[bad-override]
        return grads
