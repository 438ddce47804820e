"""Deferred rows: tokens that stopped early, as backbone hidden states kept at the layer where they stopped.

A pass that goes deeper takes the rows of each exit along as it gets there: their keys and values in the deeper layers
are then the true ones, and nothing is computed twice. Because a pass takes every earlier row along, rows further to
the left have never stopped earlier than those to their right; the rows waiting at one exit are neighbours, just left
of those that arrive. Shapes: T rows, D hidden.
"""

import torch
from torch import Tensor


class DeferredRows:
    """One sequence's deferred rows, by the layer where they stopped."""

    def __init__(self) -> None:
        self._waiting: dict[int, list[Tensor]] = {}

    def __len__(self) -> int:
        return sum(h_1TD.shape[1] for waiting in self._waiting.values() for h_1TD in waiting)

    def stop(self, layer: int, h_1TD: Tensor) -> None:
        """Keeps rows that have just passed `layer`, to the right of those that wait there already."""
        self._waiting.setdefault(layer, []).append(h_1TD)

    def resume(self, layer: int, h_1TD: Tensor) -> Tensor:
        """The rows that wait at `layer`, none any more, and to their right those that arrive."""
        waiting = self._waiting.pop(layer, [])
        return torch.cat((*waiting, h_1TD), dim=1) if waiting else h_1TD
