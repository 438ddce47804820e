"""Where a model's answers come from while it is examined: full depth, one exit, or each token's own. Without torch."""

from dataclasses import dataclass
from typing import Any

from eellm.config.check import check_literals
from eellm.config.infer import PolicyName, Threshold
from eellm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ExitRule:
    """Full depth, unless an exit or a threshold is given."""

    exit: int | None = None
    """The layer of the one exit that answers everything."""
    threshold: Threshold | None = None
    """Each token leaves at the first exit that is as sure as this."""
    policy: PolicyName = "max_prob"
    """The score in [0, 1] that says how sure an exit is."""
    exits: tuple[int, ...] | None = None
    """Layers of the exits in use under a threshold; unset, all."""

    def __post_init__(self) -> None:
        check_literals(self)
        if self.exit is not None and self.threshold is not None:
            raise ConfigError(
                f"exit = {self.exit} takes one exit for all tokens, threshold = {self.threshold} each token's own; "
                "give one of them"
            )
        if self.exits is not None and self.threshold is None:
            raise ConfigError(f"exits = {self.exits}: needs a threshold; or give exit, for one layer")

    @property
    def name(self) -> str:
        """As tables say it."""
        if self.exit is not None:
            return f"exit {self.exit}"
        if self.threshold is None:
            return "full depth"
        tau = self.threshold if isinstance(self.threshold, float | int) else dict(self.threshold)
        return f"{self.policy} {tau}"

    def scoring(self) -> dict[str, Any]:
        """For `Engine.score`."""
        if self.exit is not None:
            return {"exit": self.exit}
        return {} if self.threshold is None else self._policy()

    def generating(self, num_layers: int) -> dict[str, Any]:
        """For `Engine.submit`, of a model with so many layers."""
        if self.threshold is not None:
            return {"method": "early", **self._policy()}
        if self.exit is None or self.exit == num_layers:
            return {"method": "full"}
        return {"method": "early", "exits": (self.exit,), "threshold": 0.0}

    def _policy(self) -> dict[str, Any]:
        return {"policy": self.policy, "threshold": self.threshold, "exits": self.exits}
