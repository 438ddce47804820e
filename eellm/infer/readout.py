"""What an exit says of a row: its likeliest token, how sure it is, and the logits to draw from.

Shapes: N rows, D hidden, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from eellm.infer.network import Answer, Network


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

    def top(self, num_tokens: int) -> tuple[tuple[int, float], ...]:
        """The likeliest tokens, each with its log-probability under the raw logits."""
        return likeliest(self.logits_V.log_softmax(-1), num_tokens)

    def logprob_of(self, token: int) -> float:
        """Under the raw logits."""
        return self.logprob if token == self.token else float(self.logits_V[token] - self.logits_V.logsumexp(-1))


def likeliest(logprobs_V: Tensor, num_tokens: int) -> tuple[tuple[int, float], ...]:
    """As many tokens with their log-probabilities, likeliest first."""
    top = logprobs_V.topk(min(num_tokens, len(logprobs_V)))
    return tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))


def read(network: Network, layer: int, h_ND: Tensor, policies: Sequence[str]) -> list[Reading]:
    """Asks the exit after `layer` about hidden states (not normed).

    policies: each row's. Under `gate` the score isn't the logits' to tell; it is 1 (the final exit agrees with itself).
    """
    named = [policy for policy in dict.fromkeys(policies) if policy != "gate"]
    logits_NV, answers = network.answers(layer, h_ND, named)
    return readings_of(layer, logits_NV, answers, policies)


def readings_of(layer: int, logits_NV: Tensor, answers: Sequence[Answer], policies: Sequence[str]) -> list[Reading]:
    """A head's answers as readings. policies: each row's; answers have the scores of those that aren't `gate`, each
    once, in their order."""
    named = [policy for policy in dict.fromkeys(policies) if policy != "gate"]
    readings = []
    for policy, (token, logprob, scores), logits_V in zip(policies, answers, logits_NV, strict=True):
        score = 1.0 if policy == "gate" else scores[named.index(policy)]
        readings.append(Reading(layer, score, token, logprob, logits_V))
    return readings
