"""The loss scale of fp16 training, as plain data.

The loss is multiplied by the scale before the backward and the gradients are divided by it after, so that small ones
don't vanish in fp16. Too large a scale makes infinities: then the step is skipped and the scale halved.
Source: Mixed precision training (arXiv 1710.03740), §3.2.
"""

from dataclasses import dataclass
from typing import Any, Self


@dataclass(kw_only=True)
class LossScale:
    """Dynamic, as fp16 needs it; `LossScale.fixed()` for every other dtype."""

    scale: float = 2.0**16
    """What the loss is multiplied by."""
    growth_interval: int = 2000
    """Good steps in a row after which the scale doubles; 0: it never changes."""
    good_steps: int = 0
    """Good steps since it last changed."""

    @classmethod
    def fixed(cls) -> Self:
        """A scale of 1 that stays."""
        return cls(scale=1.0, growth_interval=0)

    @property
    def can_shrink(self) -> bool:
        """Whether gradients that aren't finite may be the scale's fault, and the next step do better."""
        return self.growth_interval > 0 and self.scale > 1

    def update(self, finite: bool) -> None:
        """After each step. finite: whether all gradients of all ranks were."""
        if self.growth_interval == 0:
            return
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale = max(self.scale / 2, 1.0)
        elif self.good_steps == self.growth_interval:
            self.scale, self.good_steps = self.scale * 2, 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from `state`; a fixed scale stays."""
        if self.growth_interval > 0:
            self.scale, self.good_steps = state["scale"], state["good_steps"]
