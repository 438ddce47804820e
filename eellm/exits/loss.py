"""The exit as an autograd node: identity forward, and in its backward the exit's loss joins the gradient.

    y = exit_loss_node(x, head, objective, weight=w)      y == x;      ∂L/∂x = ∂L/∂y + ∂(w · L_e)/∂x

The gradient is that of EE-LLM's auxiliary loss w · L_e + ⟨∂L/∂y, x⟩ (arXiv 2312.04916 §3), and whoever runs forward and
backward (a loop, a pipeline schedule, FSDP) need not know that there is an exit. The head runs in the backward only
(deferred) and over chunks of rows: of the logits, one chunk is alive at a time.
Shapes: B sequences, T rows, N = B·T flattened rows or a chunk of them, D hidden, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eellm.exits.lm import ExitHead

IGNORE = -100
"""The label of rows without a target, as in torch's cross entropy."""


class Objective(Protocol):
    """The loss of a chunk of rows."""

    def __call__(self, z_ND: Tensor, logits_NV: Tensor, rows: slice) -> Tensor:
        """Sum of the loss over the rows, a scalar; `rows` says which of the flattened rows the chunk holds."""
        ...


@dataclass(frozen=True, eq=False)
class CrossEntropy:
    """Masked cross entropy of logits / T, optionally weighted by the detached confidence of each row."""

    labels_N: Tensor
    """Next-token ids, IGNORE where there is no target."""
    temperature: float = 1.0
    """T. The losses are not rescaled by T²."""
    confidence_weighting: bool = False
    """Multiplies each row's loss by its largest softmax probability, held constant."""

    def __call__(self, z_ND: Tensor, logits_NV: Tensor, rows: slice) -> Tensor:
        logits_NV = upcast(logits_NV)
        loss_N = cross_entropy(logits_NV / self.temperature, self.labels_N[rows])
        if self.confidence_weighting:
            loss_N = loss_N * confidence(logits_NV.detach())
        return loss_N.sum()

    def gradient_(self, logits_NV: Tensor, rows: slice, weight: float | Tensor) -> Tensor:
        """The same sum, without autograd; the logits (float32 or float64) become the gradient of weight · sum.

        Autograd's way holds three tensors of their size at a time: logits, log-probabilities, gradient.
        """
        labels_N1 = self.labels_N[rows, None]
        index_N1, factor_N1 = labels_N1.clamp(min=0), (labels_N1 != IGNORE).to(logits_NV)
        if self.confidence_weighting:
            factor_N1 = factor_N1 * confidence(logits_NV)[:, None]
        if self.temperature != 1:
            logits_NV.div_(self.temperature)
        logits_NV.sub_(logits_NV.amax(-1, keepdim=True))
        target_N1 = logits_NV.gather(-1, index_N1)
        total_N1 = logits_NV.exp_().sum(-1, keepdim=True)
        loss = (factor_N1 * (total_N1.log() - target_N1)).sum()
        factor_N1 = factor_N1 * weight / self.temperature
        logits_NV.mul_(factor_N1 / total_N1).scatter_add_(-1, index_N1, -factor_N1)
        return loss


def cross_entropy(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Per row, (N,); 0 where the label is IGNORE."""
    return F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORE, reduction="none")


def confidence(logits_NV: Tensor) -> Tensor:
    """The largest softmax probability per row, (N,).

    NOTE not `softmax` or `logsumexp`: of logits sharded over the vocabulary they gather all, `amax` and `sum` don't.
    """
    return 1 / (logits_NV - logits_NV.amax(-1, keepdim=True)).exp().sum(-1)


def upcast(logits: Tensor) -> Tensor:
    """Half precision → float32; float32 and float64 stay."""
    return logits if logits.dtype == torch.float64 else logits.float()


def count_targets(labels: Tensor) -> Tensor:
    """Number of rows with a target, at least 1; a float64 scalar."""
    return (labels != IGNORE).sum().clamp(min=1).double()


def exit_loss_node(
    x_BTD: Tensor,
    head: ExitHead,
    objective: Objective,
    *,
    weight: float | Tensor,
    chunk_size: int = 1024,
    more_parameters: Sequence[nn.Parameter] = (),
    report: Callable[[Tensor], None] | None = None,
    edges: Mapping[nn.Parameter, Tensor] | None = None,
) -> Tensor:
    """`x_BTD`, unchanged, with the exit's loss behind it.

    weight: what the objective's sum is multiplied with, such as exit weight / number of target tokens of the whole
    batch. chunk_size: rows whose logits exist at a time. more_parameters: those that the objective itself reads (a
    gate). report: called in the backward with the detached, unweighted sum; a split backward calls it twice, with the
    same value. edges: tensors that get the gradients of some parameters instead of these.
    """
    parameters = tuple(p for p in (*head.parameters, *more_parameters) if p.requires_grad)
    call = _Call(head, objective, weight, chunk_size, report, parameters)
    return _ExitLoss.apply(x_BTD, call, *((edges or {}).get(p, p) for p in parameters))


@torch.no_grad()
def chunked_loss(x_BTD: Tensor, head: ExitHead, objective: Objective, *, chunk_size: int) -> Tensor:
    """The objective's sum over all rows, a detached scalar; of the logits, one chunk exists at a time."""
    z_ND = head.hidden(x_BTD).flatten(0, -2)
    starts = range(0, len(z_ND), chunk_size)
    chunks = (slice(start, min(start + chunk_size, len(z_ND))) for start in starts)
    return sum(objective(z_ND[rows], head.logits(z_ND[rows]), rows) for rows in chunks)  # pyrefly: ignore[bad-return]


def nothing(y: Tensor) -> Tensor:
    """A zero whose backward runs that of `y` with zeros: where every loss is a node, this is all that is left to call
    `backward` on."""
    return _Nothing.apply(y)


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.like = (y.shape, y.dtype, y.device)
        return y.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        shape, dtype, device = ctx.like
        return torch.zeros((), dtype=dtype, device=device).expand(shape)


@dataclass(frozen=True, eq=False)
class _Call:
    head: ExitHead
    objective: Objective
    weight: float | Tensor
    chunk_size: int
    report: Callable[[Tensor], None] | None
    parameters: tuple[nn.Parameter, ...]


class _ExitLoss(torch.autograd.Function):
    """Parameters are inputs of the node, so that autograd's hooks on them (DDP, FSDP) fire as for any other.

    The backward is a pure function of what was saved and touches no `.grad`: a zero-bubble schedule may run it once for
    x and again for the parameters. (It does all the work both times; torch doesn't tell a Python node what is wanted.)
    """

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, call: _Call, *edges: Tensor) -> Tensor:
        ctx.call = call
        device = x_BTD.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        y_BTD = x_BTD.clone()  # NOTE not a view: zero-bubble schedules detach in place
        ctx.save_for_backward(y_BTD)  # not x: y is kept anyway, by the next layer or as the stage's output
        return y_BTD

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        (x_BTD,) = ctx.saved_tensors
        needs_x, _, *needs = ctx.needs_input_grad
        wanted = [p for p, need in zip(ctx.call.parameters, needs, strict=True) if need]
        device, dtype, enabled = ctx.autocast
        with torch.enable_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
            loss, grad_x, grads = chunked_gradients(x_BTD, ctx.call, wanted, needs_x=needs_x)
        if ctx.call.report is not None:
            ctx.call.report(loss)
        found = dict(zip(wanted, grads, strict=True))
        return None if grad_x is None else grad_y + grad_x, None, *(found.get(p) for p in ctx.call.parameters)


def chunked_gradients(
    x_BTD: Tensor, call: _Call, parameters: Sequence[Tensor], *, needs_x: bool
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """The loss (unweighted sum) and the gradients of weight · loss for x and each parameter."""
    x_BTD = x_BTD.detach().requires_grad_(needs_x)
    z_BTD = call.head.hidden(x_BTD)
    z_ND = z_BTD.detach().flatten(0, -2)
    grad_ND = torch.empty_like(z_ND)
    of_chunk = _of_plain_chunk if _is_plain(call, z_ND) else _of_chunk
    totals: list[Tensor | None] = [None] * len(parameters)
    loss_sum = torch.zeros(
        (), dtype=torch.float64 if z_ND.dtype == torch.float64 else torch.float32, device=x_BTD.device
    )
    for start in range(0, len(z_ND), call.chunk_size):
        rows = slice(start, min(start + call.chunk_size, len(z_ND)))
        loss, grad_ND[rows] = of_chunk(call, z_ND[rows], rows, parameters, totals)
        loss_sum = loss_sum + loss  # NOTE not in place: under tensor parallelism losses are DTensors
    inputs = [x_BTD] * needs_x + list(parameters)
    if z_BTD.requires_grad and inputs:
        grads = torch.autograd.grad(z_BTD, inputs, grad_ND.view_as(z_BTD), allow_unused=True)
        grad_x = grads[0] if needs_x else None
        totals = [_add(total, grad) for total, grad in zip(totals, grads[needs_x:], strict=True)]
        return loss_sum, grad_x, totals
    return loss_sum, None, totals


def _is_plain(call: _Call, z_ND: Tensor) -> bool:
    """Whether a chunk needs no autograd: a cross entropy over a whole matrix that nothing casts."""
    matrix = call.head.matrix
    is_whole = type(z_ND) is Tensor and type(matrix.detach()) is Tensor  # no DTensor: all of the vocabulary is here
    is_cast = matrix.dtype != z_ND.dtype or torch.is_autocast_enabled(z_ND.device.type)
    return isinstance(call.objective, CrossEntropy) and is_whole and not is_cast


@torch.no_grad()
def _of_plain_chunk(
    call: _Call, chunk_ND: Tensor, rows: slice, parameters: Sequence[Tensor], totals: list[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """As `_of_chunk`. The matrix's gradient is added up by the product itself: no chunk has one of its own."""
    assert isinstance(call.objective, CrossEntropy), "see `_is_plain`"
    matrix_VD = call.head.matrix
    logits_NV = call.head.logits(chunk_ND)
    values_NV = upcast(logits_NV)  # float32: the same memory
    loss = call.objective.gradient_(values_NV, rows, call.weight)
    grad_NV = values_NV.to(logits_NV.dtype)
    for i, parameter in enumerate(parameters):
        if parameter is matrix_VD:
            total = torch.zeros_like(matrix_VD) if totals[i] is None else totals[i]
            totals[i] = total.addmm_(grad_NV.T, chunk_ND)  # pyrefly: ignore[missing-attribute]
    return loss, grad_NV @ matrix_VD


def _of_chunk(
    call: _Call, chunk_ND: Tensor, rows: slice, parameters: Sequence[Tensor], totals: list[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """The loss (unweighted sum) of a chunk and the gradient of weight · loss for its rows; the gradients for the
    parameters join `totals`."""
    chunk_ND = chunk_ND.requires_grad_()
    logits_NV = call.head.logits(chunk_ND)
    if isinstance(call.objective, CrossEntropy) and type(logits_NV) is Tensor:
        values_NV = upcast(logits_NV.detach())  # float32: the same memory, which no backward reads
        loss = call.objective.gradient_(values_NV, rows, call.weight)
        output, grad = logits_NV, values_NV.to(logits_NV.dtype)
    else:
        loss = call.objective(chunk_ND, logits_NV, rows)
        output, grad = loss * call.weight, None
    grad_ND, *grads = torch.autograd.grad(output, (chunk_ND, *parameters), grad, allow_unused=True)
    totals[:] = [_add(total, grad) for total, grad in zip(totals, grads, strict=True)]
    return loss.detach(), grad_ND


def _add(total: Tensor | None, grad: Tensor | None) -> Tensor | None:
    if total is None or grad is None:
        return grad if total is None else total
    return total.add_(grad)
