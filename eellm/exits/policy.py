"""How sure an exit is: scores in [0, 1], larger is surer, from raw logits in float32.

`gate` is the one policy that doesn't read logits: its score comes from the exit's own gate, before the output matrix
runs. The final exit under `gate` scores 1: it agrees with itself. Shapes: V vocabulary.
"""

import math
from collections.abc import Callable

from torch import Tensor


def max_prob(logits_V: Tensor) -> Tensor:
    """The largest softmax probability (EE-LLM's confidence). (..., V) → (...)."""
    logits_V = logits_V.float()
    return (logits_V.amax(-1) - logits_V.logsumexp(-1)).exp().clamp(max=1)


def margin(logits_V: Tensor) -> Tensor:
    """The largest minus the second largest softmax probability (CALM). (..., V) → (...)."""
    top_2 = logits_V.float().log_softmax(-1).topk(min(2, logits_V.shape[-1]), dim=-1).values.exp()
    return top_2[..., 0] - (top_2[..., 1] if top_2.shape[-1] > 1 else 0)


def entropy(logits_V: Tensor) -> Tensor:
    """One minus the softmax's entropy over log V: 1 is certain, 0 is uniform. (..., V) → (...)."""
    logp_V = logits_V.float().log_softmax(-1)
    size = logits_V.shape[-1]
    if size == 1:
        return logp_V[..., 0].exp()
    # -inf logits (masked tokens) have probability 0 and add nothing
    return (1 + (logp_V.exp() * logp_V.nan_to_num(neginf=0)).sum(-1) / math.log(size)).clamp(0, 1)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {"max_prob": max_prob, "margin": margin, "entropy": entropy}
