"""A pipeline schedule as data: who computes what, in which order.

    2F0  forward of stage 2, microbatch 0        2B0  its backward, whole
    2I0  its backward for inputs                 2W0  its backward for weights
    2SEND_F0, 2RECV_F0, 2SEND_B0, 2RECV_B0       what goes between ranks: hidden states up, gradients down

Stages, ranks and microbatches count from 0. A regular microbatch runs forward through all stages and backward through
all of them; one that fills a bubble only through some (EE-LLM, arXiv 2312.04916 §3 and appendix C). The text form is
that of torch.distributed.pipelining.
"""

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast, get_args

from eellm.errors import ConfigError

Kind = Literal["F", "B", "I", "W", "SEND_F", "RECV_F", "SEND_B", "RECV_B"]
_TEXT = re.compile(r"(\d+)([A-Z_]+?)(\d+)")


class Action(NamedTuple):
    """One thing that a rank does."""

    stage: int
    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    @property
    def is_compute(self) -> bool:
        """Whether it computes, rather than sends or receives."""
        return len(self.kind) == 1

    @classmethod
    def parse(cls, text: str) -> "Action":
        """The inverse of `str`. Raises ConfigError for what isn't an action."""
        match = _TEXT.fullmatch(text.strip())
        if match is None or match[2] not in get_args(Kind):
            raise ConfigError(
                f"{text!r} is not an action; one is a stage, a kind of {get_args(Kind)}, a microbatch: 2F0"
            )
        return cls(int(match[1]), cast(Kind, match[2]), int(match[3]))


Order = tuple[Action, ...]
"""What one rank does, in order."""


class Work(NamedTuple):
    """What must be computed for one microbatch."""

    microbatch: int
    forward_end: int
    """Forward through stages 0 … forward_end - 1."""
    backward_start: int
    """Backward through stages backward_end - 1 down to backward_start."""
    backward_end: int


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The orders of all ranks for one step."""

    name: str
    ranks: tuple[int, ...]
    """The rank of each stage."""
    num_microbatches: int
    """Regular ones: 0 … num_microbatches - 1."""
    orders: tuple[Order, ...]
    """What each rank computes, in order; only compute actions."""
    extras: tuple[Work, ...] = ()
    """Microbatches beyond the regular ones, numbered on from them."""

    @property
    def num_stages(self) -> int:
        return len(self.ranks)

    @property
    def num_ranks(self) -> int:
        return len(self.orders)

    @property
    def is_split(self) -> bool:
        """Whether some backward is taken apart."""
        return any(action.kind == "I" for order in self.orders for action in order)

    @property
    def works(self) -> tuple[Work, ...]:
        """All microbatches, in the order of their numbers."""
        stages = self.num_stages
        return (*(Work(m, stages, 0, stages) for m in range(self.num_microbatches)), *self.extras)


def needs(action: Action, work: Work, is_split_above: bool) -> tuple[Action, ...]:
    """The compute actions that must be done before a compute action. is_split_above: whether the backward of the stage
    above is an I rather than a B."""
    stage, kind, microbatch = action
    if kind == "F":
        return (Action(stage - 1, "F", microbatch),) if stage else ()
    if kind == "W":
        return (Action(stage, "I", microbatch),)
    forward = Action(stage, "F", microbatch)
    if stage + 1 >= work.backward_end:
        return (forward,)
    return forward, Action(stage + 1, "I" if is_split_above else "B", microbatch)
