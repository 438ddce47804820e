"""What an exit says of a row: its likeliest token, how sure it is, and the logits to draw from.

Shapes: N rows, D hidden, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from eellm.infer.network import Network


@dataclass(frozen=True, slots=True)
class Reading:
    """One row's."""

    layer: int
    score: float
    """The policy's."""
    token: int
    """The one with the largest logit."""
    logprob: float
    """Its log-probability under the raw logits."""
    logits_V: Tensor
    """Raw, float32."""

    def logprob_of(self, token: int) -> float:
        """Under the raw logits."""
        return self.logprob if token == self.token else float(self.logits_V[token] - self.logits_V.logsumexp(-1))


def read(network: Network, layer: int, z_ND: Tensor, policies: Sequence[str]) -> list[Reading]:
    """Runs the output matrix of the exit at `layer` on normed hidden states.

    policies: each row's. Under `gate` the score isn't the logits' to tell; it is 1 (the final exit agrees with itself).
    """
    logits_NV = network.logits(layer, z_ND)
    named = sorted(set(policies) - {"gate"})
    readings = []
    rows = zip(policies, network.scores(logits_NV, named), logits_NV, strict=True)
    for policy, (token, logprob, scores), logits_V in rows:
        score = 1.0 if policy == "gate" else scores[named.index(policy)]
        readings.append(Reading(layer, score, token, logprob, logits_V))
    return readings
