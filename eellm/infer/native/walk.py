"""A walk of one sequence as the kernels take it: the C structs of its legs, and room for what heads say behind them.

Shapes: N rows asked about, V vocabulary.
"""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from ctypes import c_double

import torch
from torch import Tensor

from eellm.infer.native import structs
from eellm.infer.network import Answer, Gone, Heard, Leg

COLUMNS = {"max_prob": 2, "margin": 3, "entropy": 4}
"""Of the policies' scores among the five numbers that the kernel says of a row."""

Table = ctypes.Array[c_double]


class Walk:
    def __init__(
        self,
        legs: Sequence[Leg],
        done: int,
        policy: str,
        *,
        addresses: Callable[[int], tuple[int, int]],
        heads: Mapping[int, structs.Head],
        vocab_size: int,
    ) -> None:
        """addresses: from a layer on, of the layers and of their keys and values. Others as in `Network.walk`."""
        self.column = COLUMNS[policy]
        self.structs = (structs.Leg * len(legs))()
        self.num_asked = max(leg.num_asked for leg in legs)
        self._rooms: list[tuple[Tensor, Table] | None] = []
        for struct, leg in zip(self.structs, legs, strict=True):
            struct.layers, struct.kv = addresses(done + 1)
            struct.num_layers, struct.first_row, done = leg.last - done, leg.start, leg.last
            if not leg.num_asked:
                self._rooms.append(None)
                continue
            logits_NV, table = torch.empty(leg.num_asked, vocab_size, dtype=torch.float32), make_table(leg.num_asked)
            self._rooms.append((logits_NV, table))
            struct.head, struct.num_asked = heads[leg.last], leg.num_asked
            struct.score, struct.threshold = self.column, leg.threshold
            struct.logits, struct.table = logits_NV.data_ptr(), ctypes.addressof(table)

    def gone(self, num_gone: int) -> list[Gone]:
        """What became of the legs that were gone."""
        legs = zip(self._rooms, self.structs, range(num_gone), strict=False)
        return [Gone(self._heard(room), struct.layers_s, struct.head_s) for room, struct, _ in legs]

    def _heard(self, room: tuple[Tensor, Table] | None) -> Heard | None:
        return None if room is None else Heard(room[0], answers_in(room[1], [self.column]))


def make_table(num_rows: int) -> Table:
    return (c_double * (5 * num_rows))()


def answers_in(table: Table, columns: Sequence[int]) -> list[Answer]:
    """columns: of the scores wanted; the same of each row."""
    rows = range(0, len(table), 5)
    return [(int(table[at]), table[at + 1], [table[at + column] for column in columns]) for at in rows]
