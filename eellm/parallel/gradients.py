"""What is left to do between a backward and the optimizer: tied sums, the norm over the whole mesh, clipping.

A parameter that several pipeline stages hold (a tied matrix, a shared final norm) has a part of its gradient on each:
they are summed, so that every holder steps alike. In the norm, every value of the whole model counts once, however many
processes hold a copy.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from eellm.parallel.mesh import World
from eellm.parallel.tensor import local


@dataclass(frozen=True, eq=False)
class Tied:
    """A parameter that several stages hold."""

    copies: tuple[nn.Parameter, ...]
    """Those of this process: none, one, or several where it runs several of the stages."""
    group: dist.ProcessGroup | None
    """The processes that hold a copy; None where this one is alone or holds none."""


def settle_placements(parameters: Iterable[nn.Parameter]) -> None:
    """Finishes pending sums: a gradient gets the placements of its parameter. (Tensor parallelism leaves a norm's
    gradient as each process's part.)"""
    for parameter in parameters:
        grad = parameter.grad
        if isinstance(grad, DTensor) and isinstance(parameter, DTensor) and grad.placements != parameter.placements:
            parameter.grad = grad.redistribute(placements=parameter.placements)


@torch.no_grad()
def sum_tied(tied: Sequence[Tied]) -> None:
    """Gives every copy of a tied parameter the sum of the copies' gradients, once a step."""
    for entry in tied:
        if not entry.copies:
            continue
        grads = [local(copy.grad) for copy in entry.copies if copy.grad is not None]
        total = torch.zeros_like(local(entry.copies[0])) if not grads else grads[0].clone()
        for grad in grads[1:]:
            total += grad
        if entry.group is not None:
            dist.all_reduce(total, group=entry.group)
        for copy in entry.copies:
            if copy.grad is None:
                copy.grad = torch.zeros_like(copy)
            local(copy.grad).copy_(total)


def square_sum(parameters: Sequence[nn.Parameter], world: World) -> Tensor:
    """This process's share of the squared gradient norm, float64; the sum over all processes is the whole.

    parameters: those counted here: of a tied one, one copy in the whole run.
    """
    by_copies: dict[int, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_copies.setdefault(_num_copies(parameter, world), []).append(local(parameter.grad))
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for copies, grads in by_copies.items():
        total += nn.utils.get_total_norm(grads).double() ** 2 / copies
    return total


@torch.no_grad()
def scale_gradients(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiplies every gradient by `factor`."""
    grads = [local(p.grad) for p in parameters if p.grad is not None]
    if factor != 1.0:
        for grad in grads:
            grad.mul_(factor)


def _num_copies(parameter: nn.Parameter, world: World) -> int:
    """How many processes hold the same part of a parameter."""
    along = world.size // world.axis_size("pp")  # processes that share its stage
    if not isinstance(parameter, DTensor):
        return along
    mesh, parts = parameter.device_mesh, 1
    for dim, placement in enumerate(parameter.placements):
        parts *= 1 if isinstance(placement, Replicate) else mesh.size(dim)
    return along // parts
