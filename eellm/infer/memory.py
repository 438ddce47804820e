"""Keys and values of all sequences that are being served, in static memory.

A *slot* holds one sequence's rows from position 0 on. Every layer has one tensor for all slots, so that a pass over
many sequences reads their keys without a copy; `layer` exits have tensors of their own. How many rows of a slot are
true at a layer is the sequence's to know: this is memory only. It grows by doubling, up to what the engine allows.
*Spare* rows behind a slot's own are written by rows of a pass that nobody needs, and never read.
Shapes: S slots, K key/value heads, C rows a slot can hold, E head width.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from eellm.config.model import ModelConfig


class Memory:
    def __init__(
        self,
        config: ModelConfig,
        own_layer: Iterable[int] = (),
        layers: Iterable[int] | None = None,
        *,
        dtype: torch.dtype,
        device: torch.device,
        num_spare: int = 0,
    ) -> None:
        """own_layer: layers of the exits that attend with a Transformer layer of their own. layers: unset, all.
        num_spare: rows behind those of each slot."""
        empty = torch.zeros(0, 2 * config.kv_heads, 0, config.head_size, dtype=dtype, device=device)
        self._empty = empty
        self.layers: dict[int, Tensor] = dict.fromkeys(layers or range(1, config.num_layers + 1), empty)
        """Keys, then values, along the heads: (S, 2K, C + spare rows, E), by layer."""
        self.exits: dict[int, Tensor] = dict.fromkeys(own_layer, empty)
        """As `layers`, of the exits."""
        self.num_slots = 0
        self.capacity = 0
        self.num_spare = num_spare
        self.generation = object()
        """Another one whenever the tensors are others."""

    @property
    def num_bytes(self) -> int:
        return sum(kv.nbytes for part in (self.layers, self.exits) for kv in part.values())

    @torch.inference_mode(False)  # NOTE what is made in that mode can't be written outside of it
    def reserve(self, num_slots: int, capacity: int) -> None:
        """Makes room for at least so many slots of at least so many rows; what is there stays."""
        if num_slots <= self.num_slots and capacity <= self.capacity:
            return
        C = self.capacity
        self.num_slots, self.capacity = max(num_slots, self.num_slots), max(capacity, self.capacity)
        self.generation = object()
        for part in (self.layers, self.exits):
            for layer, kv in part.items():
                S, KV, _, E = kv.shape
                # NOTE zeros: rows beyond a sequence's own are read under a mask, where 0 · NaN would be NaN
                part[layer] = kv.new_zeros(self.num_slots, KV, self.capacity + self.num_spare, E)
                part[layer][:S, :, :C] = kv[:, :, :C]  # not the spare rows, which may hold anything

    def clear(self) -> None:
        """Gives all of it back."""
        self.num_slots = self.capacity = 0
        self.generation = object()
        for part in (self.layers, self.exits):
            part.update(dict.fromkeys(part, self._empty))

    def copy(self, source: int, target: int, num_rows: int) -> None:
        """The first rows of one slot into another."""
        for part in (self.layers, self.exits):
            for kv in part.values():
                kv[target, :, :num_rows] = kv[source, :, :num_rows]

    def wipe(self, slot: int) -> None:
        """Zeros in all rows of a slot. Rows that are no numbers would make those that attend beside them NaN, even
        under a mask."""
        for part in (self.layers, self.exits):
            for kv in part.values():
                kv[slot] = 0
