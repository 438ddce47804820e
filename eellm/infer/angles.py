"""Rotary angles of all positions, as a pass multiplies with them.

A row of a pass has its queries, keys and values side by side: x · cos + swapped(x) · sin turns all of them at once,
where `swapped` exchanges the halves of each head, sin is negative in the first half, and values have cos 1 and sin 0.
Shapes: P positions, H query heads, K key/value heads, E head width.
"""

import torch
from torch import Tensor

from eellm.config.model import ModelConfig
from eellm.model.rope import Rope


class Angles:
    """Tables for positions 0 .. P - 1, which grow by doubling."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        self.rope = Rope(config)
        self.num_turned = config.num_heads + config.kv_heads
        self.num_heads = self.num_turned + config.kv_heads
        self.dtype = dtype
        self.device = device
        self.cos_PHE = self.sin_PHE = torch.zeros(0)
        self.reserve(64)

    def reserve(self, num_positions: int) -> None:
        if num_positions <= len(self.cos_PHE):
            return
        num_positions = max(num_positions, 2 * len(self.cos_PHE))
        cos, sin = self.rope(torch.arange(num_positions, device=self.device), self.dtype)
        shape = (num_positions, self.num_heads, 2 * cos.shape[-1])
        self.cos_PHE = torch.ones(shape, dtype=self.dtype, device=self.device)
        self.sin_PHE = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self.cos_PHE[:, : self.num_turned] = torch.cat((cos, cos), dim=-1)[:, None]
        self.sin_PHE[:, : self.num_turned] = torch.cat((-sin, sin), dim=-1)[:, None]

    def slice(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """cos and sin (T, H + 2K, E) of neighbouring positions."""
        self.reserve(end)
        return self.cos_PHE[start:end], self.sin_PHE[start:end]

    def select(self, positions_N: Tensor) -> tuple[Tensor, Tensor]:
        """As `slice`, of any positions; the caller has reserved them."""
        return self.cos_PHE[positions_N], self.sin_PHE[positions_N]
