"""The statistics of a certificate, in plain numbers: Learn-then-Test with Hoeffding–Bentkus p-values. No torch.

    losses of n units at each step of a path → p-value of "the risk is above ε" → the last step with all p ≤ δ

Steps are tested in their order, from the safest on, and the first that fails ends it (fixed-sequence testing): so all
of them together are wrong with probability δ at the most, however many there are. The path must not be chosen by the
units that are tested. Losses lie in [0, 1], units are drawn independently from one source; nothing else is assumed.
Sources: Learn then Test (arXiv 2110.01052); for early exits, CALM (arXiv 2207.07061).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """A step of the path that passed."""

    index: int
    mean_loss: float
    p_value: float


def hoeffding_bentkus(losses: Sequence[float], risk: float) -> float:
    """How likely a mean loss as small as this one's is, at the most, where the expected loss is above `risk`."""
    num = len(losses)
    assert num > 0, "there are units to test"
    total = math.fsum(losses)
    assert -1e-9 <= total <= num * (1 + 1e-9), "losses lie in [0, 1]"
    below = min(max(total / num, 0.0), risk)
    hoeffding = math.exp(-num * _divergence(below, risk))
    bentkus = math.e * binomial_cdf(math.ceil(round(total, 9)), num, risk)
    return min(hoeffding, bentkus, 1.0)


def binomial_cdf(most: int, num: int, probability: float) -> float:
    """How likely at most `most` of `num` independent trials succeed, each with this probability in (0, 1)."""
    if most >= num:
        return 1.0
    log_p, log_q = math.log(probability), math.log1p(-probability)
    log_factorial = math.lgamma(num + 1)
    return min(
        1.0,
        math.fsum(
            math.exp(log_factorial - math.lgamma(i + 1) - math.lgamma(num - i + 1) + i * log_p + (num - i) * log_q)
            for i in range(most + 1)
        ),
    )


def last_safe_step(losses_by_step: Iterable[Sequence[float]], risk: float, confidence: float) -> Step | None:
    """The last of the path's first steps that all pass; None where the first one doesn't.

    losses_by_step: of the same units, from the safest step on; what comes after the first that fails isn't asked for.
    """
    safe = None
    for index, losses in enumerate(losses_by_step):
        p_value = hoeffding_bentkus(losses, risk)
        if p_value > 1 - confidence:
            break
        safe = Step(index, math.fsum(losses) / len(losses), p_value)
    return safe


def units_needed(risk: float, confidence: float) -> int:
    """Fewest units that can show anything: as many pass if none of them loses anything."""
    num = max(1, math.floor(math.log1p(-confidence) / math.log1p(-risk)))
    while hoeffding_bentkus([0.0] * num, risk) > 1 - confidence:
        num += 1
    return num


def _divergence(a: float, b: float) -> float:
    """Kullback–Leibler, of a coin that falls so with probability a from one with b."""
    first = a * math.log(a / b) if a > 0 else 0.0
    return first + ((1 - a) * math.log((1 - a) / (1 - b)) if a < 1 else 0.0)
