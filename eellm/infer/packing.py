"""From a model's linear modules to the matrices that decoding multiplies with."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from eellm.infer.weights import Matrix, Quantize, pack


class Packer:
    """Makes matrices, all of one kind."""

    def __init__(self, quantize: Quantize | None = None) -> None:
        self.quantize: Quantize | None = quantize
        self.num_bytes = 0
        """What reading all matrices made so far takes."""

    @torch.no_grad()
    def pack(self, linears: Sequence[nn.Linear], name: str) -> Matrix:
        """One matrix whose outputs are those of all `linears`, side by side. name: of what is made, in the cache."""
        weight_OI = torch.cat([linear.weight for linear in linears]) if len(linears) > 1 else linears[0].weight
        biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
        assert len(biases) in (0, len(linears)), "all of them have biases, or none"
        matrix = pack(weight_OI, torch.cat(biases) if biases else None, quantize=self.quantize)
        self.num_bytes += matrix.num_bytes
        return matrix
