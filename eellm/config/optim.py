"""`[optim]`: AdamW and its learning rate, for training and tuning alike."""

import math
from dataclasses import dataclass
from typing import Literal

from eellm.config.check import check_at_least, check_fraction, check_literals
from eellm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """`[optim]`: AdamW with linear warm-up and a decaying learning rate."""

    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float | None = None
    """Learning rate at the last step; unset, a tenth of `lr`."""
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    """How the rate goes from `lr` to `min_lr`: half a cosine, a line, or flat until the last `decay_fraction` of the
    steps and then a line (warm-up, stable, decay)."""
    decay_fraction: float = 0.2
    """wsd: share of all steps in which the rate decays."""
    warmup_steps: int = 10
    """Steps from 0 to `lr`."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.95
    """Decay of the mean of squared gradients."""
    weight_decay: float = 0.01
    """On matrices; norms and biases have none."""
    clip: float = 1.0
    """Largest norm of the gradient; 0: unlimited."""

    def __post_init__(self) -> None:
        check_literals(self)
        check_fraction(self, "decay_fraction")
        check_at_least(self, 0, "lr", "min_lr", "warmup_steps", "weight_decay", "clip")
        for name in ("lr", "weight_decay"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"{name} = {getattr(self, name)!r}: must be finite")
        if self.min_lr is not None and self.min_lr > self.lr:
            raise ConfigError(
                f"min_lr = {self.min_lr!r}: must be at most lr = {self.lr!r}; leave it out for a tenth of it"
            )
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ConfigError(f"beta1, beta2 = {self.beta1!r}, {self.beta2!r}: must lie in [0, 1)")
