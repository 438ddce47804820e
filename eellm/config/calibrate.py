"""Calibration in plain numbers: how thresholds are learnt from data, and the certificate that comes of it. No torch.

A certificate says: with probability `confidence` over the draw of the data, the mean loss of a unit (a document or a
prompt) under these thresholds is at most `risk`, for units that come from where the data came from. It is stored with
the exits (`exits.json`) and names the weights that it was made for.
"""

from dataclasses import dataclass
from typing import Literal

from eellm.config.check import check_at_least, check_literals, check_numbers
from eellm.config.infer import Metric, PolicyName, check_risk
from eellm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """Thresholds, and what was shown of them."""

    metric: Metric
    """A unit's loss. `disagreement`: the share of its tokens for which the exit taken and the final one choose
    differently. `perplexity`: by how many nats a token its negative log-likelihood rises, from 0 to `clip`, over
    `clip`. `rouge_l`: how much of ROUGE-L the answer to the prompt loses."""
    risk: float
    """The bound on the mean loss."""
    confidence: float
    """How sure the bound is."""
    policy: PolicyName
    """The score that the thresholds are for."""
    thresholds: tuple[tuple[int, float], ...]
    """Layer and threshold of each exit; 1: the exit is off."""
    num_units: int
    """Units that the bound rests on; those that only chose the path aren't among them."""
    measured_risk: float
    """Their mean loss."""
    p_value: float
    """How likely so small a mean loss would be, were the risk larger than the bound."""
    mean_exit_layer: float
    """Of their tokens."""
    clip: float | None = None
    """Under `perplexity`: the largest rise that counts, in nats a token."""
    against: Literal["full", "reference"] = "full"
    """Under `rouge_l`: what answers are compared with."""
    max_new_tokens: int | None = None
    """Under `rouge_l`: the answers' length."""
    data_sha256: str
    """Of the file that the units came from."""
    weights_sha256: str
    """Of the backbone and these exits, as they were loaded."""
    dtype: str
    """They were loaded in."""

    def __post_init__(self) -> None:
        check_literals(self)
        check_risk(self)
        check_at_least(self, 0, "measured_risk", "p_value", "mean_exit_layer")
        check_at_least(self, 1, "num_units")
        check_confidence(self)

    @property
    def by_layer(self) -> dict[int, float]:
        """The thresholds."""
        return dict(self.thresholds)

    @property
    def key(self) -> tuple[str, float, float]:
        """What there is one certificate of, in a directory."""
        return self.metric, self.risk, self.confidence


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """What is to be certified, and how thresholds are sought."""

    risk: float
    """The bound on a unit's mean loss."""
    confidence: float = 0.95
    """How sure the bound is to be."""
    metric: Metric = "disagreement"
    """A unit's loss; see `Certificate.metric`."""
    policy: PolicyName = "max_prob"
    """The score that says how sure an exit is."""
    exits: tuple[int, ...] | None = None
    """Layers of the exits in use; unset, all that the model has."""
    clip: float = 1.0
    """Under `perplexity`: the largest rise that counts, in nats a token."""
    path_share: float = 0.2
    """Share of the units that choose the path of thresholds. The others are tested along it."""
    num_levels: int = 100
    """Steps of the path, from safe to risky. Under `rouge_l` each makes all prompts' answers anew."""
    max_new_tokens: int = 64
    """Under `rouge_l`: the answers' length."""
    seq_len: int = 512
    """Longer documents are read in pieces of so many tokens."""
    batch_size: int = 8
    """Units that are read side by side."""
    seed: int = 0
    """Decides which units choose the path."""

    def __post_init__(self) -> None:
        check_literals(self)
        check_risk(self)
        check_confidence(self)
        check_at_least(self, 1, "num_levels", "max_new_tokens", "batch_size")
        check_at_least(self, 2, "seq_len")
        check_at_least(self, 0, "seed")
        check_numbers(self, "clip", "path_share")
        if not 0 < self.clip < float("inf"):
            raise ConfigError(f"clip = {self.clip!r}: must be above 0 and finite")
        if not 0 < self.path_share < 1:
            raise ConfigError(f"path_share = {self.path_share!r}: must lie between 0 and 1")


def check_confidence(config: Certificate | CalibrateConfig) -> None:
    check_numbers(config, "confidence")
    if not 0 < config.confidence < 1:
        raise ConfigError(f"confidence = {config.confidence!r}: must lie between 0 and 1, as 0.95 does")
