"""Keys and values of the rows that each layer has seen, in memory laid out once.

Every layer has a length of its own: in early-exit decoding, inner layers run ahead of the deeper ones, whose rows are
deferred. A layer's rows always arrive in the order of their positions, so its length says where the next one belongs.
Shapes: B sequences, K key/value heads, S capacity in tokens, T new rows, E head width.
"""

import torch
from torch import Tensor

from eellm.config.model import ModelConfig


class LayerCache:
    """One layer's keys and values; rows 0 .. length-1 are true."""

    def __init__(self, keys_BKSE: Tensor, values_BKSE: Tensor) -> None:
        self.keys_BKSE = keys_BKSE
        self.values_BKSE = values_BKSE
        self.length = 0

    def append(self, k_BKTE: Tensor, v_BKTE: Tensor) -> tuple[Tensor, Tensor]:
        """Writes T rows behind the present ones; returns views of all keys and values so far."""
        start, self.length = self.length, self.length + k_BKTE.shape[2]
        assert self.length <= self.keys_BKSE.shape[2], "the caller sizes the cache"
        self.keys_BKSE[:, :, start : self.length] = k_BKTE
        self.values_BKSE[:, :, start : self.length] = v_BKTE
        return self.keys_BKSE[:, :, : self.length], self.values_BKSE[:, :, : self.length]


class KVCache:
    """The layers' caches, by layer number from 1. `layer` exits keep theirs in a KVCache of their own."""

    def __init__(
        self,
        config: ModelConfig,
        layers: tuple[int, ...],
        *,
        capacity: int,
        batch_size: int = 1,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (2, batch_size, config.kv_heads, capacity, config.head_size)
        self._layers = {n: LayerCache(*torch.zeros(shape, dtype=dtype, device=device)) for n in layers}

    def __getitem__(self, layer: int) -> LayerCache:
        return self._layers[layer]
