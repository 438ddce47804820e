"""How weights lie in memory while decoding on a CPU.

A matrix times one row is bound by reading the matrix. MKL reads a tall matrix (more outputs than inputs) stored column
by column at up to twice the rate of row by row, a wide one slightly slower (docs/log.md has the figures); with many
rows there is no difference. Matrices that read the same row lie side by side and are read by one product. Only strides
change: values, shapes and what is saved stay as they are.
"""

import torch
from torch import Tensor, nn

from eellm.model.layers import MLP, Attention


@torch.no_grad()
def lay_out_for_decoding(model: nn.Module) -> None:
    """Lays the linear weights that are on the CPU out anew, in place. Does nothing the second time."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.fused = _fuse(module.fused, module.q, module.k, module.v)
        elif isinstance(module, MLP):
            module.fused = _fuse(module.fused, module.gate, module.up)
        elif isinstance(module, nn.Linear) and module.out_features >= module.in_features and _is_plain(module):
            module.weight.data = _by_column(module.weight.data)


def _fuse(fused: Tensor | None, *linears: nn.Linear) -> Tensor | None:
    """One matrix whose rows are those of all `linears`, which become parts of it; biases have no such form."""
    if not all(_is_plain(linear) and linear.bias is None for linear in linears):
        return fused
    fused = _by_column(torch.cat([linear.weight.data for linear in linears]))
    parts = fused.split([linear.out_features for linear in linears])
    for linear, part in zip(linears, parts, strict=True):
        linear.weight.data = part
    return fused


def _by_column(weight: Tensor) -> Tensor:
    return weight.t().contiguous().t()


def _is_plain(linear: nn.Linear) -> bool:
    """On the CPU, row by row: as loaded, not laid out yet."""
    return linear.weight.device.type == "cpu" and linear.weight.is_contiguous()
