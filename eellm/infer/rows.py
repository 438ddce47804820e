"""Rows that wait between two ranges of layers: hidden states, kept where they stopped.

A pass that goes deeper takes a sequence's rows of each stop along as it gets there: their keys and values in the deeper
layers are then the true ones, and nothing is computed twice. Because a pass takes every earlier row along, rows further
to the left have never stopped earlier than those to their right. Shapes: N rows, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """Neighbouring rows of one sequence, where a pass has left them."""

    h_ND: Tensor
    """The whole pass's."""
    start: int
    end: int


def gather(pieces: Sequence[Piece]) -> Tensor:
    """The pieces' rows, side by side. No copy where one pass left all of them in this order."""
    first = pieces[0]
    end = first.start
    for piece in pieces:
        if piece.h_ND is not first.h_ND or piece.start != end:
            return torch.cat([piece.h_ND[piece.start : piece.end] for piece in pieces])
        end = piece.end
    return first.h_ND if (first.start, end) == (0, len(first.h_ND)) else first.h_ND[first.start : end]
