"""What an exit says of a row: its likeliest token, how sure it is, and the logits to draw from.

Shapes: N rows, D hidden, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eellm.exits.policy import SCORES
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
    tokens_N1 = logits_NV.max(dim=-1, keepdim=True).indices
    logprobs_N = logits_NV.log_softmax(-1).gather(-1, tokens_N1)[:, 0]
    columns = [logprobs_N.double(), tokens_N1[:, 0].double()]
    named = sorted(set(policies) - {"gate", "max_prob"})
    columns += [SCORES[policy](logits_NV).double() for policy in named]
    columns.append(logprobs_N.exp().clamp(max=1).double())
    table = torch.stack(columns, dim=-1).tolist()  # one look at the device's results
    readings = []
    for policy, row, logits_V in zip(policies, table, logits_NV, strict=True):
        score = 1.0 if policy == "gate" else row[-1] if policy == "max_prob" else row[2 + named.index(policy)]
        readings.append(Reading(layer, score, int(row[1]), row[0], logits_V))
    return readings
