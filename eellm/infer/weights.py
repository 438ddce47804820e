"""A weight matrix as decoding multiplies with it: few rows at a time, so that reading the matrix is the cost.

    weight (O, I), bias → `pack` → Matrix: (N, I) → (N, O)

On a CPU, float32 weights are kept in oneDNN's own order: it multiplies a few rows at the rate of memory, where the
plain product takes several times that (docs/log.md). Small matrices with one row are quicker plain. All else is
plain.
"""

from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Quantize = Literal["int8", "int4"]
SMALL = 1 << 16
"""Elements below which one row is multiplied plainly: a call of oneDNN's takes 20 µs whatever its size."""
ROWS_HINT = 8
"""oneDNN orders a weight for a number of rows; the order for 8 serves 1 to 64 well."""


class Matrix(Protocol):
    num_bytes: int
    """What one product reads."""

    def __call__(self, x_NI: Tensor) -> Tensor:
        """(..., I) → (..., O), in x's dtype."""
        ...


def pack(weight_OI: Tensor, bias_O: Tensor | None = None, *, quantize: Quantize | None = None) -> Matrix:
    """The weight in the form that this machine multiplies fastest with."""
    weight_OI = weight_OI.detach()
    bias_O = None if bias_O is None else bias_O.detach()
    if weight_OI.device.type == "cpu" and weight_OI.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return OneDNN(weight_OI, bias_O)
    return Plain(weight_OI, bias_O)


class Plain:
    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        self.weight_OI, self.bias_O = weight_OI, bias_O
        self.num_bytes = weight_OI.nbytes

    def __call__(self, x_NI: Tensor) -> Tensor:
        return F.linear(x_NI, self.weight_OI, self.bias_O)


class OneDNN:
    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        self.num_bytes = weight_OI.nbytes
        self.small_OI = weight_OI if weight_OI.numel() < SMALL else None
        self.bias_O = bias_O
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), ROWS_HINT)

    def __call__(self, x_NI: Tensor) -> Tensor:
        if self.small_OI is not None and len(x_NI) == 1:
            return F.linear(x_NI, self.small_OI, self.bias_O)
        return torch.ops.mkldnn._linear_pointwise(x_NI, self.packed, self.bias_O, "none", [], "")
