"""What every decoding method is: it says where a sequence's newest row is tested, and what the answers mean.

The engine moves rows through layers. At an exit where the row is to be tested and is sure enough it calls `at_exit`;
at the end `at_end`. A method emits tokens and feeds the next ones through the sequence; it never touches hidden
states.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from eellm.infer.readout import Reading
    from eellm.infer.sequence import Sequence as Served


class Decode(Protocol):
    """One sequence's method, with its state."""

    exits_in_use: frozenset[int]
    """Layers of the exits that it may ever test: those with keys and values of their own keep them."""
    max_deferred: int
    """Most rows that may wait for their deeper layers before they are taken to the end."""

    def exits(self, seq: "Served") -> Mapping[int, float]:
        """Where the newest row is tested, and the score at which an exit is sure enough."""
        ...

    def at_exit(self, seq: "Served", reading: "Reading") -> bool:
        """An exit is sure of the newest row. Returns whether the row's journey is over for now; if so, tokens that
        enter next were fed."""
        ...

    def num_readings(self, seq: "Served") -> int:
        """How many of the newest rows the final exit must judge; 0: the row was answered before."""
        ...

    def at_end(self, seq: "Served", readings: "Sequence[Reading]") -> None:
        """The final exit's word on these rows. Tokens that enter next are fed, unless the sequence is over."""
        ...
