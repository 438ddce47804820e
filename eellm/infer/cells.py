"""The rows of a pass in the cells of a grid, and what a layer does with them.

    spans → FixedRows → `placed`: grid, each cell's position, each row's cell → GridRows → `write`, `attend`

Idle cells don't change what is in any cell with a row: layers work row by row but for attention, and what idle cells
write goes into each slot's spare row, which no grid's keys reach: they end at the memory's capacity, where it is.
Shapes: N rows, C cells, R slots, T cells of each, L keys, H query heads, K key/value heads, E head width.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eellm.infer.angles import Angles
from eellm.infer.attention import PackedRows, PassRows, Span, additive_mask
from eellm.infer.grid import Grid, fit
from eellm.infer.memory import Memory

MOST_IDLE_BYTES = 64 << 20
"""Of a layer's memory, read for slots without a row: what takes a GPU about as long as it takes to start a layer's
operations one by one (25 of 4 µs, at 0.6 TB/s; none of it measured)."""


class FixedRows(PassRows):
    """The rows of a pass, for either way; what each needs is made when it is first needed."""

    def __init__(self, spans: Sequence[Span], angles: Angles, num_kv_heads: int) -> None:
        super().__init__(spans)
        self._angles, self._num_kv_heads = angles, num_kv_heads
        self._placed: Placed | None = None
        self._generation: object = None

    @cached_property
    def packed(self) -> PackedRows:
        return PackedRows(self.spans, self._angles, self._num_kv_heads)

    def placed(self, memory: Memory) -> "Placed | None":
        """The rows in a grid of the memory's slots; None: there is none for them."""
        if self._generation is not memory.generation:
            self._generation, self._placed = memory.generation, self._place(memory)
        return self._placed

    def _place(self, memory: Memory) -> "Placed | None":
        assert memory.num_spare > 0, "idle cells write somewhere"
        device, capacity = self._angles.device, memory.capacity
        kv_SKCE = next(iter(memory.layers.values()))
        row_bytes = kv_SKCE.shape[1] * kv_SKCE.shape[3] * kv_SKCE.itemsize
        most_idle_keys = MOST_IDLE_BYTES // row_bytes
        grid = fit(self.spans, num_slots=memory.num_slots, capacity=capacity, most_idle_keys=most_idle_keys)
        if grid is None:
            return None
        self._angles.reserve(capacity)
        # one copy, from pinned memory, which torch doesn't use again before the copy is done
        numbers = [*grid.positions(self.spans, capacity), *grid.cells(self.spans)]
        host = torch.tensor(numbers, pin_memory=device.type == "cuda")
        positions_C, cells_N = host.to(device, non_blocking=True).tensor_split((grid.num_cells,))
        return Placed(grid, positions_C, cells_N)


class Placed(NamedTuple):
    grid: Grid
    positions_C: Tensor
    """Of each cell's row; the memory's capacity, where the spare row is, of idle cells."""
    cells_N: Tensor
    """Each row's."""


class GridRows:
    """The cells of a grid, as layers take them (`eellm.infer.attention.LayerRows`)."""

    def __init__(self, grid: Grid, positions_C: Tensor, idle: int, cos_PHE: Tensor, sin_PHE: Tensor) -> None:
        """idle: the position of cells without a row."""
        self.grid, self.positions_C = grid, positions_C
        # an idle cell sees its slot's first row, whatever that is: a cell that sees none would be NaN
        self.seen_C = positions_C.masked_fill(positions_C == idle, 0)
        self.cos, self.sin = cos_PHE[self.seen_C], sin_PHE[self.seen_C]
        slots_R = torch.arange(grid.first, grid.first + grid.num_slots, device=positions_C.device)
        self.slots_C = slots_R[:, None].expand(-1, grid.num_rows).reshape(-1)
        self._masks: dict[tuple[int | None, int], Tensor] = {}

    def write(self, kv_SKCE: Tensor, rows_CKE: Tensor) -> None:
        kv_SKCE[self.slots_C, :, self.positions_C] = rows_CKE

    def attend(self, q_CHE: Tensor, kv_SKCE: Tensor, window: int | None) -> Tensor:
        """The heads that share keys stand side by side with a slot's cells: every key is read once for all of them."""
        grid, (H, E), K = self.grid, q_CHE.shape[1:], kv_SKCE.shape[1] // 2
        R, T, G = grid.num_slots, grid.num_rows, H // K
        kv_RKLE = kv_SKCE[grid.first : grid.first + R, :, : grid.num_keys]
        q_RKTE = q_CHE.view(R, T, K, G, E).transpose(1, 2).reshape(R, K, T * G, E)
        mask = self._mask(window, G, q_CHE.dtype)
        y_RKTE = F.scaled_dot_product_attention(q_RKTE, kv_RKLE[:, :K], kv_RKLE[:, K:], attn_mask=mask)
        return y_RKTE.reshape(R, K, T, G, E).transpose(1, 2).reshape(R * T, H * E)

    def _mask(self, window: int | None, num_shared: int, dtype: torch.dtype) -> Tensor:
        """(R, 1, T · heads that share keys, L). Kept: the next layer asks again."""
        if (window, num_shared) not in self._masks:
            R, T, L = self.grid.num_slots, self.grid.num_rows, self.grid.num_keys
            mask_R1TL = additive_mask(self.seen_C.view(R, T), 0, L, window, dtype)
            mask = mask_R1TL[:, :, :, None].expand(-1, -1, -1, num_shared, -1)
            self._masks[window, num_shared] = mask.reshape(R, 1, T * num_shared, L)
        return self._masks[window, num_shared]
