"""How the rows of any pass fill few fixed shapes. Without torch.

    spans (slot, rows before, rows now) → `fit` → Grid: R neighbouring slots of T cells each, keys up to L

What is recorded once and played again (`eellm.infer.graphs`) must not change its shape. So a sequence's rows stand in
its slot's cells, in order; cells that nobody needs are idle. R, T and L come in powers of two, and the first slot is a
multiple of R: a single sequence has its own slot for a grid, everyone together has all slots, and in between there are
few grids. Slots are neighbours in memory, so a grid's keys are a view of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eellm.infer.attention import Span

MOST_CELLS = 64
"""Rows beyond which starting operations one by one costs little beside running them."""
FEWEST_KEYS = 64


@dataclass(frozen=True, slots=True)
class Grid:
    """Cell (r, t) is number r · T + t, and stands for a row of slot `first` + r."""

    first: int
    num_slots: int
    """R."""
    num_rows: int
    """T."""
    num_keys: int
    """L: rows of each slot that can be attended to, from its first on."""

    @property
    def num_cells(self) -> int:
        return self.num_slots * self.num_rows

    def cells(self, spans: "Sequence[Span]") -> list[int]:
        """Each row's cell, in the order of the spans."""
        starts = [(span.slot - self.first) * self.num_rows for span in spans]
        return [start + turn for start, span in zip(starts, spans, strict=True) for turn in range(span.count)]

    def positions(self, spans: "Sequence[Span]", idle: int) -> list[int]:
        """Each cell's position in its slot; `idle` where no row stands in it."""
        positions = [idle] * self.num_cells
        rows = (position for span in spans for position in range(span.before, span.end))
        for cell, position in zip(self.cells(spans), rows, strict=True):
            positions[cell] = position
        return positions


def fit(spans: "Sequence[Span]", *, num_slots: int, capacity: int, most_idle_keys: int) -> Grid | None:
    """The smallest grid for the rows of a pass; None: they are too many, or too much would be read for nobody.

    num_slots, capacity: of the memory. most_idle_keys: rows of memory that may be read for slots without a row in the
    pass.
    """
    slots = {span.slot for span in spans}
    if len(slots) < len(spans):
        return None
    num = 1
    while min(slots) // num != max(slots) // num:
        num *= 2
    first = min(slots) // num * num
    grid = Grid(
        first,
        min(num, num_slots - first),
        bucket(max(span.count for span in spans)),
        min(max(bucket(max(span.end for span in spans)), FEWEST_KEYS), capacity),
    )
    idle_keys = (grid.num_slots - len(spans)) * grid.num_keys
    return grid if grid.num_cells <= MOST_CELLS and idle_keys <= most_idle_keys else None


def bucket(number: int) -> int:
    """The smallest power of two that isn't less."""
    return 1 << (number - 1).bit_length()
