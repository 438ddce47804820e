"""The rows of a pass, the angles of their positions, and where their keys and values lie, as the kernels read them."""

import ctypes
from array import array
from collections.abc import Sequence
from ctypes import c_void_p

import torch
from torch import Tensor

from eellm.infer.attention import PassRows, Span
from eellm.infer.memory import Memory
from eellm.infer.native import structs
from eellm.model.rope import Rope


class NativeRows(PassRows):
    """Slots and positions of the rows of a pass."""

    def __init__(self, spans: Sequence[Span], angles: "Angles") -> None:
        super().__init__(spans)
        angles.reserve(max(span.end for span in self.spans))
        slots, positions = array("i"), array("i")
        for slot, before, count in self.spans:
            slots.extend([slot] * count)
            positions.extend(range(before, before + count))
        self.kept = slots, positions, angles.cos, angles.sin
        self.struct = structs.Rows(
            num_rows=len(slots),
            slots=slots.buffer_info()[0],
            positions=positions.buffer_info()[0],
            cos=angles.cos.data_ptr(),
            sin=angles.sin.data_ptr(),
        )


class Angles:
    """cos and sin of all positions, (positions, E / 2); they grow by doubling."""

    def __init__(self, rope: Rope) -> None:
        self.rope = rope
        self.cos = self.sin = torch.zeros(0)

    def reserve(self, num_positions: int) -> None:
        if num_positions > len(self.cos):
            num_positions = max(num_positions, 2 * len(self.cos), 64)
            self.cos, self.sin = (x.contiguous() for x in self.rope(torch.arange(num_positions), torch.float32))


class KVList:
    """The addresses of a memory's keys and values, layer after layer, as long as they stay where they are."""

    def __init__(self) -> None:
        self._first: Tensor | None = None
        self._list = (c_void_p * 0)()

    def address(self, memory: Memory) -> int:
        """Where the list stands."""
        first = next(iter(memory.layers.values()))
        if self._first is not first:
            self._list = (c_void_p * len(memory.layers))(*(kv.data_ptr() for kv in memory.layers.values()))
            self._first = first  # last: an interrupt in between leaves no list that seems to be this memory's
        return ctypes.addressof(self._list)
