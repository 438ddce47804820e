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

import torch
from torch import Tensor

SAMPLE = 1024
State = tuple[int, int, int]
"""Where the values lie, how often they were written as far as torch knows, and the sum over the sample."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FACTOR = 6364136223846793005
"""Knuth's for random numbers modulo 2^64."""


@torch.no_grad()
def states(parameters: Iterable[Tensor]) -> tuple[State, ...]:
    """One look at the device's results for all of them."""
    parameters = tuple(parameters)
    if not parameters:
        return ()
    factors_N = _factors().to(parameters[0].device)
    sums = torch.stack([_sum(p, factors_N.to(p.device)) for p in parameters]).tolist()
    return tuple(
        (p.data_ptr(), 0 if p.is_inference() else p._version, total) for p, total in zip(parameters, sums, strict=True)
    )


def _sum(parameter: Tensor, factors_N: Tensor) -> Tensor:
    """Of the sample's bits, each times a factor of its own, so that neither order nor signs cancel out; int64, on the
    first parameter's device once they are stacked."""
    values = parameter.detach().reshape(-1)
    sample_N = values[:: max(1, -(-len(values) // SAMPLE))].contiguous()
    bits_N = sample_N.view(_INTEGERS[sample_N.itemsize]).long()
    bits_N = bits_N ^ (bits_N >> 17)  # the highest bit by itself, float64's sign, would cancel out of an even number
    return (bits_N * factors_N[: len(bits_N)]).sum()


def _factors() -> Tensor:
    """Odd ones, modulo 2^64."""
    return (torch.arange(1, SAMPLE + 1) * _FACTOR) | 1
