"""Exit losses as most programs compute them, to measure the deferred node against.

`eager` makes an exit's logits in the forward and holds them until its backward; `checkpoint` makes them in the forward
and again in the backward. Both hold all rows' logits at a time. The gradients are the node's.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from eellm.exits.lm import ExitHead
from eellm.exits.loss import Objective


def eager_exit_loss(
    x_BTD: Tensor,
    head: ExitHead,
    objective: Objective,
    *,
    weight: float | Tensor,
    mode: str,
    report: Callable[[Tensor], None],
) -> Tensor:
    """`x_BTD`, unchanged, with the exit's loss behind it. Arguments are `exit_loss_node`'s; mode: `eager` or
    `checkpoint`."""

    def loss(x_BTD: Tensor) -> Tensor:
        z_ND = head.hidden(x_BTD).flatten(0, -2)
        return objective(z_ND, head.logits(z_ND), slice(0, len(z_ND)))

    total = checkpoint(loss, x_BTD, use_reentrant=False) if mode == "checkpoint" else loss(x_BTD)
    report(total.detach())
    return _AddLoss.apply(x_BTD, total, weight)


class _AddLoss(torch.autograd.Function):
    """Identity on x; weight · loss joins the objective."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, loss: Tensor, weight: float | Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        ctx.weight = weight
        return x_BTD.clone()  # NOTE not a view: zero-bubble schedules detach in place

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None]:  # pyrefly: ignore[bad-override]
        (loss,) = ctx.saved_tensors
        return grad_y, torch.ones_like(loss) * ctx.weight, None
