"""Rotary angles of all positions, as a pass multiplies with them.

A row of a pass has its queries, keys and values side by side: x · cos + swapped(x) · sin turns all of them at once,
where `swapped` exchanges the halves of each head, sin is negative in the first half, and values have cos 1 and sin 0.
Shapes: P positions, H query heads, K key/value heads, E head width.
"""

import threading
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from eellm.config.model import ModelConfig
from eellm.model.rope import Rope


class Tables(ABC):
    """cos and sin for positions 0 .. P - 1, which grow by doubling; engines in several threads may share them."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        empty = torch.zeros(0, dtype=dtype, device=device)
        self.tables = empty, empty
        """Another pair when they have grown, for other threads may be reading these."""
        self._lock = threading.Lock()

    def reserve(self, num_positions: int) -> tuple[Tensor, Tensor]:
        """Tables of at least so many positions; they never get shorter."""
        if num_positions > len(self.tables[0]):
            with self._lock:  # tables that another thread has made longer meanwhile stay
                known = len(self.tables[0])
                if num_positions > known:
                    self.tables = self._made(max(num_positions, 2 * known, 64))
        return self.tables

    @abstractmethod
    def _made(self, num_positions: int) -> tuple[Tensor, Tensor]:
        """The tables of so many positions."""


class Angles(Tables):
    """(P, H + 2K, E)."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(dtype, device)
        self.rope = Rope(config)
        self.num_turned = config.num_heads + config.kv_heads
        self.num_heads = self.num_turned + config.kv_heads
        self.reserve(64)

    def _made(self, num_positions: int) -> tuple[Tensor, Tensor]:
        cos, sin = self.rope(torch.arange(num_positions, device=self.device), self.dtype)
        shape = (num_positions, self.num_heads, 2 * cos.shape[-1])
        cos_PHE = torch.ones(shape, dtype=self.dtype, device=self.device)
        sin_PHE = torch.zeros(shape, dtype=self.dtype, device=self.device)
        cos_PHE[:, : self.num_turned] = torch.cat((cos, cos), dim=-1)[:, None]
        sin_PHE[:, : self.num_turned] = torch.cat((-sin, sin), dim=-1)[:, None]
        return cos_PHE, sin_PHE

    def slice(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """cos and sin (T, H + 2K, E) of neighbouring positions."""
        self.reserve(end)
        cos_PHE, sin_PHE = self.tables
        return cos_PHE[start:end], sin_PHE[start:end]

    def select(self, positions_N: Tensor) -> tuple[Tensor, Tensor]:
        """As `slice`, of any positions; the caller has reserved them."""
        cos_PHE, sin_PHE = self.tables
        return cos_PHE[positions_N], sin_PHE[positions_N]
