"""How weights lie in memory while decoding on a CPU.

A matrix times one row is bound by reading the matrix. MKL reads a tall matrix (more outputs than inputs) stored column
by column at up to twice the rate of row by row, a wide one slightly slower (docs/log.md has the figures); with many
rows there is no difference. Only strides change: values, shapes and what is saved stay as they are.
"""

import torch
from torch import nn


@torch.no_grad()
def lay_out_for_decoding(model: nn.Module) -> None:
    """Stores tall linear weights on the CPU column by column, in place. Does nothing the second time."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.out_features >= module.in_features:
            weight = module.weight
            if weight.device.type == "cpu" and weight.is_contiguous():
                weight.data = weight.data.t().contiguous().t()
