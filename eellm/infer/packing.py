"""From a model's linear modules to the matrices that decoding multiplies with.

Models that share parameters (adapters of one base) may share the matrices made of them: whoever makes their engines
hands each the same `Packed`. Under tensor parallelism a process holds a part of each. Where the inputs are cut a
product is a part of the sum, and the parts are added up; where logits are cut the first process gets all of them.
"""

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from eellm.infer.quantize import Quantize, QuantizeCache
from eellm.infer.weights import Matrix, pack
from eellm.model.fingerprint import states

T = TypeVar("T")


class Team(Protocol):
    """The processes that share every product, this one among them. All of them call the same, in the same order."""

    def sum(self, x_NO: Tensor) -> Tensor:
        """Adds up the processes' tensors; every process gets the sum. x_NO: may be overwritten."""
        ...

    def gather(self, x_NO: Tensor) -> Tensor:
        """The processes' columns side by side on the first; on the others, whatever they gave."""
        ...


class Packed:
    """Matrices by what they were made of. It keeps them, and the parameters, as long as it is kept itself."""

    def __init__(self) -> None:
        self._made: dict[Hashable, tuple[Sequence[Tensor], object]] = {}

    def matrix(self, way: Hashable, linears: Sequence[nn.Linear], make: Callable[[], T]) -> T:
        """What `make` has made of these parameters, as they are now. way: all else that it depends on; of one way all
        are of one type."""
        parameters = [p for linear in linears for p in linear.parameters()]
        key = (way, *map(id, parameters), *states(parameters))
        if key not in self._made:
            self._made[key] = (parameters, make())  # NOTE kept with them, so that no others get their ids
        return self._made[key][1]  # pyrefly: ignore[bad-return]


def once(packed: Packed | None, way: Hashable, linears: Sequence[nn.Linear], make: Callable[[], T]) -> T:
    """As `Packed.matrix`; where nobody shares, nothing is kept."""
    return make() if packed is None else packed.matrix(way, linears, make)


class Packer:
    """Makes matrices, all of one kind."""

    def __init__(
        self,
        quantize: Quantize | None = None,
        cache_dir: Path | None = None,
        packed: Packed | None = None,
        team: Team | None = None,
    ) -> None:
        """cache_dir: where rounded weights are kept. packed: matrices that others have made. team: those who hold the
        other parts of the matrices."""
        self.quantize: Quantize | None = quantize
        self.cache = None if cache_dir is None else QuantizeCache(cache_dir / "rounded")
        self.packed = packed
        self.team = team
        self.num_bytes = 0
        """What reading all matrices made so far takes."""

    def pack(self, *linears: nn.Linear, is_head: bool = False, is_summed: bool = False) -> Matrix:
        """One matrix whose outputs are those of all `linears`, side by side. is_head: they are logits. is_summed: in a
        team, its inputs are cut."""
        way = ("torch", self.quantize, is_head)
        matrix = once(self.packed, way, linears, lambda: self._matrix(linears, is_head))
        self.num_bytes += matrix.num_bytes
        if self.team is None:
            return matrix
        return Gathered(matrix, self.team) if is_head else Summed(matrix, self.team) if is_summed else matrix

    def _matrix(self, linears: Sequence[nn.Linear], is_head: bool) -> Matrix:
        weight_OI, bias_O = side_by_side(linears)
        return pack(weight_OI, bias_O, quantize=self.quantize, is_head=is_head, cache=self.cache)


class Summed:
    """A matrix whose inputs are cut over a team."""

    def __init__(self, part: Matrix, team: Team) -> None:
        self.part, self.team, self.num_bytes = part, team, part.num_bytes

    def __call__(self, x_NI: Tensor) -> Tensor:
        return self.team.sum(self.part(x_NI))


class Gathered:
    """A matrix whose outputs are cut over a team."""

    def __init__(self, part: Matrix, team: Team) -> None:
        self.part, self.team, self.num_bytes = part, team, part.num_bytes

    def __call__(self, x_NI: Tensor) -> Tensor:
        return self.team.gather(self.part(x_NI))


@torch.no_grad()
def side_by_side(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of all outputs of all."""
    weight_OI = torch.cat([linear.weight for linear in linears]) if len(linears) > 1 else linears[0].weight
    biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
    assert len(biases) in (0, len(linears)), "all of them have biases, or none"
    return weight_OI, torch.cat(biases) if biases else None
