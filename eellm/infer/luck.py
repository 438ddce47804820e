"""A request's luck: for each place of its answer, one number per token of the vocabulary, the same whoever asks.

    seed, place → key;  key, token → 64 mixed bits → E ~ Exp(1);  argmin over tokens of E / p → the token

An exponential race: the first of independent events at rates p is event i with probability p(i), so the token has the
distribution p. Since the luck belongs to the seed and the place alone, two distributions at one place are drawn from
with the same luck, and mostly give the same token: with the probability (1 - d) / (1 + d) at least, d their total
variation (coupling without communication: Daliri, Musco, Suresh, arXiv 2408.07978).
The bits of a token are a hash of its id, not the next ones of a stream: only tokens that can be chosen are asked, and
the answer doesn't depend on which others can. SplitMix64 (Steele, Lea, Flood, 2014) mixes; whole numbers of 64 bits
are the same on every machine.
Shapes: V vocabulary, C tokens that can be chosen.
"""

from torch import Tensor

STEP = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio: what SplitMix64 counts in."""
FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
SHIFTS = (30, 27, 31)
BITS = 52
"""Of a number from (0, 1), so that it and its distance from 1 are exact in float64."""


def chosen(weights_V: Tensor, seed: int, place: int) -> int:
    """A token with probability in proportion to its weight, by the luck of that seed and place; never one of weight 0.

    weights_V: (V,), at least 0, one of them above. seed, place: whole numbers of 64 bits.
    """
    token_C = weights_V.nonzero().squeeze(1)
    if len(token_C) == 1:
        return int(token_C)
    arrival_C = arrivals(token_C, seed, place).div_(weights_V[token_C].double())
    return int(token_C[arrival_C.argmin()])


def arrivals(token_C: Tensor, seed: int, place: int) -> Tensor:
    """Each token's draw of Exp(1), above 0: (C,), float64. token_C: int64."""
    bits_C = token_C * _signed(STEP)
    bits_C += _signed(key_of(seed, place))
    for shift, factor in zip(SHIFTS, FACTORS, strict=False):
        bits_C ^= _shifted(bits_C, shift)
        bits_C *= _signed(factor)
    bits_C ^= _shifted(bits_C, SHIFTS[-1])
    uniform_C = _shifted(bits_C, 64 - BITS).double().add_(0.5).mul_(2.0**-BITS)
    return uniform_C.log_().neg_()


def key_of(seed: int, place: int) -> int:
    """Where the count of a place's tokens starts. Mixed twice, so that neighbouring seeds and places have nothing in
    common."""
    return mixed(mixed(seed + STEP) + STEP * (place + 1))


def mixed(bits: int) -> int:
    """SplitMix64's last step: every bit of the result depends on every bit given, and no two results are the same."""
    bits %= 2**64
    for shift, factor in zip(SHIFTS, FACTORS, strict=False):
        bits = (bits ^ bits >> shift) * factor % 2**64
    return bits ^ bits >> SHIFTS[-1]


def _shifted(bits: Tensor, shift: int) -> Tensor:
    """To the right, with zeros coming in; torch's shift of signed numbers brings in the sign."""
    return (bits >> shift).bitwise_and_((1 << (64 - shift)) - 1)


def _signed(bits: int) -> int:
    """The same 64 bits as a signed number. torch's products and sums of such wrap round."""
    return bits - 2**64 if bits >= 2**63 else bits
