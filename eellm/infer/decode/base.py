"""What every decoding method is: a state that takes a sequence's next tokens and answers with the logits to draw from.

The engine calls `step` with the prompt, then with each token drawn. A method never draws: it says which exit answers,
how sure that exit was, and its raw logits. Shapes: V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """The exit that the rule chose for a row."""

    layer: int
    score: float
    logits_V: Tensor
    """Raw logits, float32."""


@dataclass
class Work:
    """What a method ran: one pass of any number of rows through a layer or an output matrix counts one."""

    layers: int = 0
    deep_passes: int = 0
    """Passes that reached the last layer."""
    heads: dict[int, int] = field(default_factory=dict)
    """Output matrix runs by exit layer."""

    def count_head(self, layer: int) -> None:
        self.heads[layer] = self.heads.get(layer, 0) + 1


class Decode(Protocol):
    """One sequence under one method."""

    work: Work

    def step(self, tokens: list[int]) -> Choice:
        """Takes the sequence's next tokens (at first the prompt) and chooses for the last of them."""
        ...
