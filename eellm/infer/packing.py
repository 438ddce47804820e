"""From a model's linear modules to the matrices that decoding multiplies with."""

from pathlib import Path

import torch
from torch import Tensor, nn

from eellm.infer.quantize import Quantize, QuantizeCache
from eellm.infer.weights import Matrix, pack


class Packer:
    """Makes matrices, all of one kind."""

    def __init__(self, quantize: Quantize | None = None, cache_dir: Path | None = None) -> None:
        """cache_dir: where rounded weights are kept."""
        self.quantize: Quantize | None = quantize
        self.cache = None if cache_dir is None else QuantizeCache(cache_dir / "rounded")
        self.num_bytes = 0
        """What reading all matrices made so far takes."""

    @torch.no_grad()
    def pack(self, *linears: nn.Linear, is_head: bool = False) -> Matrix:
        """One matrix whose outputs are those of all `linears`, side by side. is_head: they are logits."""
        weight_OI = torch.cat([linear.weight for linear in linears]) if len(linears) > 1 else linears[0].weight
        biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
        assert len(biases) in (0, len(linears)), "all of them have biases, or none"
        bias_O = torch.cat(biases) if biases else None
        matrix = pack(weight_OI, bias_O, quantize=self.quantize, is_head=is_head, cache=self.cache)
        self.num_bytes += matrix.num_bytes
        return matrix
