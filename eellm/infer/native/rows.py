"""The rows of a pass, the angles of their positions, and where their keys and values lie, as the kernels read them."""

import ctypes
from array import array
from collections.abc import Sequence
from ctypes import c_void_p

import torch
from torch import Tensor

from eellm.infer.angles import Tables
from eellm.infer.attention import PassRows, Span
from eellm.infer.memory import Memory
from eellm.infer.native import structs
from eellm.model.rope import Rope


class NativeRows(PassRows):
    """Slots and positions of the rows of a pass."""

    def __init__(self, spans: Sequence[Span], angles: "NativeAngles") -> None:
        super().__init__(spans)
        cos, sin = angles.reserve(max(span.end for span in self.spans))
        slots, positions = array("i"), array("i")
        for slot, before, count in self.spans:
            slots.extend([slot] * count)
            positions.extend(range(before, before + count))
        self.kept = slots, positions, cos, sin
        self.struct = structs.Rows(
            num_rows=len(slots),
            slots=slots.buffer_info()[0],
            positions=positions.buffer_info()[0],
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
        )


class NativeAngles(Tables):
    """(P, E / 2), float32 on the CPU."""

    def __init__(self, rope: Rope) -> None:
        super().__init__(torch.float32, torch.device("cpu"))
        self.rope = rope

    def _made(self, num_positions: int) -> tuple[Tensor, Tensor]:
        cos, sin = self.rope(torch.arange(num_positions), self.dtype)
        return cos.contiguous(), sin.contiguous()


class NativeMemory(Memory):
    """With the addresses of its layers' keys and values, layer after layer. Each memory has a list of its own: engines
    in several threads may share the network."""

    addresses: "ctypes.Array[c_void_p]" = (c_void_p * 0)()
    _listed: object = None
    """The generation that the list is of."""

    def address(self) -> int:
        """Where the list stands, as long as the tensors stay where they are."""
        if self._listed is not self.generation:
            self.addresses = (c_void_p * len(self.layers))(*(kv.data_ptr() for kv in self.layers.values()))
            self._listed = self.generation  # last: an interrupt in between leaves no list that seems to be right
        return ctypes.addressof(self.addresses)
