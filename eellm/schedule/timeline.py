"""When what was computed: what a simulation predicts, what a run measures, and what is drawn of both."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

Letter = Literal["F", "B", "I", "W", "E", "e", "D", "H", "h"]
"""F forward, B backward, I backward for inputs, W for weights: of layers. E, e: an exit's forward and backward where it
runs in the forward (eager). D: a deferred exit, forward and backward together. H, h: the final head, likewise
(deferred: H alone)."""


class Interval(NamedTuple):
    """From when to when, in seconds from a step's start."""

    start_s: float
    end_s: float


class Span(NamedTuple):
    """A time during which a rank does one thing."""

    rank: int
    stage: int
    microbatch: int
    letter: Letter
    start_s: float
    end_s: float
    is_extra: bool = False
    """Whether the microbatch fills a bubble."""


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """One step of all ranks."""

    num_ranks: int
    spans: tuple[Span, ...]
    """By rank, and in the order of their starts."""

    @property
    def end_s(self) -> float:
        """When the last rank is done; the first starts at 0."""
        return max((span.end_s for span in self.spans), default=0.0)

    def busy_s(self, rank: int) -> float:
        """Seconds that a rank computes."""
        return sum(span.end_s - span.start_s for span in self.spans if span.rank == rank)

    @property
    def bubble(self) -> float:
        """Share of all ranks' time in which they compute nothing."""
        total = self.num_ranks * self.end_s
        busy = sum(span.end_s - span.start_s for span in self.spans)
        return 1 - busy / total if total else 0.0
