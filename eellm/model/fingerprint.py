"""Whether parameters are still those that something was made of, without reading all of them.

    parameters → `states` → one State each, equal as long as nothing has changed

torch counts what is written into a tensor, but not what goes through `.data` (`p.data.mul_(2)`), NumPy or another
process, and tensors that were made in inference mode have no counter. So a state also has where the values lie and a
sum over a sample of their bits: of up to `SAMPLE` values all, of more as many at even distances. What changes a tensor
as a whole (a merge, other weights, a scale) changes those; a few single values, changed behind torch's back, may be
missed.
Shapes: N values of a sample.
"""

from collections.abc import Iterable
from itertools import accumulate

import torch
from torch import Tensor

SAMPLE = 256
State = tuple[int, int, int]
"""Where the values lie, how often they were written as far as torch knows, and the sum over the sample."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FACTOR = 6364136223846793005
"""Knuth's for random numbers modulo 2^64."""


@torch.no_grad()
def states(parameters: Iterable[Tensor]) -> tuple[State, ...]:
    """One look at the device's results for all, few operations for each: every call of `generate` asks."""
    parameters = tuple(parameters)
    if not parameters:
        return ()
    samples = [_sample(parameter) for parameter in parameters]
    bits_N = torch.cat([sample.to(samples[0].device) for sample in samples]).long()
    bits_N ^= bits_N >> 17  # the highest bit by itself, float64's sign, would cancel out of an even number
    factors = _factors().to(bits_N.device)
    bits_N *= torch.cat([factors[: len(sample)] for sample in samples])
    ends = torch.tensor([0, *accumulate(len(sample) for sample in samples)], device=bits_N.device)
    up_to = torch.cat((bits_N.new_zeros(1), bits_N.cumsum(0)))[ends].tolist()
    return tuple(
        (p.data_ptr(), 0 if p.is_inference() else p._version, (total - before) % 2**64)
        for p, before, total in zip(parameters, up_to, up_to[1:], strict=False)
    )


def _sample(parameter: Tensor) -> Tensor:
    """The bits of up to SAMPLE values at even distances, as whole numbers. They are summed with a factor each, so that
    neither order nor signs cancel out."""
    values = parameter.detach().reshape(-1)
    return values[:: max(1, -(-len(values) // SAMPLE))].view(_INTEGERS[values.itemsize])


def _factors() -> Tensor:
    """Odd ones, modulo 2^64."""
    return (torch.arange(1, SAMPLE + 1) * _FACTOR) | 1
