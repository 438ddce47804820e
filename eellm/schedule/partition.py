"""Layers and exits → pipeline stages, and stages → ranks. Plain numbers, no torch.

Stages are contiguous, cover every layer once, and each has at least one. Costs are in units of one layer: the final
head and each exit count for what their output matrices cost. An exit behind a stage's last layer reads the same hidden
state as one in front of the next stage's first layer, so it may run there (EE-LLM, arXiv 2312.04916 §3, the second
optimisation): fewer microbatches are in flight there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from eellm.errors import ConfigError

ExitPlacement = Literal["stay", "next_stage", "auto"]
SINGLE = ("gpipe", "1f1b", "filled_1f1b")
V_SHAPED = ("zbv", "dualpipev")
SPLIT_BACKWARD = ("interleaved_zero_bubble", "zbv", "dualpipev")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A contiguous part of the model."""

    index: int
    """From 0."""
    num_stages: int
    first: int
    """Its first layer, from 1."""
    last: int
    """Its last layer."""
    exits: tuple[int, ...] = ()
    """Layers of the exits that run here, ascending; `first - 1` is one taken over from the stage before."""

    @property
    def is_first(self) -> bool:
        """Whether tokens come in here."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether the final head is here."""
        return self.index == self.num_stages - 1

    @property
    def num_layers(self) -> int:
        return self.last - self.first + 1


def partition(
    num_layers: int,
    num_stages: int,
    exits: Sequence[int] = (),
    *,
    layers_per_stage: Sequence[int] | None = None,
    placement: ExitPlacement = "stay",
    head_cost: float = 0.0,
    exit_costs: Mapping[int, float] | None = None,
) -> tuple[Stage, ...]:
    """The stages, in order.

    layers_per_stage: as given, or chosen so that the costliest stage costs least and the others are even.
    head_cost: the final head, in layers; exit_costs: each exit by its layer, head_cost where it isn't named.
    Raises ConfigError for more stages than layers, and for numbers of layers that don't add up.
    """
    costs = {layer: head_cost if exit_costs is None else exit_costs.get(layer, head_cost) for layer in exits}
    if num_stages > num_layers:
        raise ConfigError(
            f"parallel.pp and stages_per_rank make {num_stages} stages for {num_layers} layers, and each needs one; "
            f"use at most {num_layers} stages"
        )
    if layers_per_stage is None:
        layers_per_stage = _balanced(num_layers, num_stages, costs, head_cost)
    _check_counts(layers_per_stage, num_layers, num_stages)
    stages, first = [], 1
    for index, count in enumerate(layers_per_stage):
        last = first + count - 1
        here = tuple(layer for layer in sorted(exits) if first <= layer <= last)
        stages.append(Stage(index=index, num_stages=num_stages, first=first, last=last, exits=here))
        first = last + 1
    return _place_exits(stages, placement, costs, head_cost)


def stages_of_ranks(schedule: str, pp: int, stages_per_rank: int = 2) -> tuple[tuple[int, ...], ...]:
    """The indices of each rank's stages: one, every pp-th, or down and up again (V)."""
    if schedule in SINGLE:
        return tuple((rank,) for rank in range(pp))
    if schedule in V_SHAPED:
        return tuple((rank, 2 * pp - 1 - rank) for rank in range(pp))
    return tuple(tuple(range(rank, pp * stages_per_rank, pp)) for rank in range(pp))


def check_microbatches(schedule: str, pp: int, num_microbatches: int, *, num_rows: int | None = None) -> None:
    """Raises ConfigError, with the nearest numbers that work, for one that the schedule can't run.

    num_rows: those that are cut into microbatches; only numbers that divide them are offered.
    """
    if takes(schedule, pp, num_microbatches):
        return
    numbers = range(1, 4 * num_microbatches + 4 * pp) if num_rows is None else range(1, num_rows + 1)
    near = sorted(numbers, key=lambda n: (abs(n - num_microbatches), n))
    better = [n for n in near if takes(schedule, pp, n) and (num_rows is None or num_rows % n == 0)][:2]
    raise ConfigError(
        f"parallel.num_microbatches = {num_microbatches}: schedule {schedule} with pp = {pp} {_RULES[schedule]}; "
        f"the nearest that work: {' and '.join(map(str, sorted(better)))}"
    )


def takes(schedule: str, pp: int, num_microbatches: int) -> bool:
    """Whether the schedule can run that many microbatches."""
    if schedule in ("1f1b", "filled_1f1b"):
        return num_microbatches >= pp
    if schedule == "dualpipev":
        return num_microbatches >= 2 * pp
    if schedule in ("interleaved_1f1b", "interleaved_zero_bubble"):
        return num_microbatches % max(1, num_microbatches // pp) == 0
    return True


_RULES = {
    "1f1b": "needs at least pp of them",
    "filled_1f1b": "needs at least pp of them",
    "dualpipev": "needs at least 2 · pp of them",
    "interleaved_1f1b": "works in rounds of equal size, of at least pp of them",
    "interleaved_zero_bubble": "works in rounds of equal size, of at least pp of them",
}


def _check_counts(counts: Sequence[int], num_layers: int, num_stages: int) -> None:
    if len(counts) != num_stages or sum(counts) != num_layers or min(counts) < 1:
        raise ConfigError(
            f"parallel.layers_per_stage = {list(counts)}: must be {num_stages} numbers of at least 1 that add up to "
            f"the {num_layers} layers"
        )


def _balanced(num_layers: int, num_stages: int, costs: Mapping[int, float], head_cost: float) -> list[int]:
    """Number of layers per stage with the lowest maximum of costs, and then a low sum of squares."""
    total = [0.0]  # cost of layers 1 .. n with their exits
    for layer in range(1, num_layers + 1):
        total.append(total[-1] + 1 + costs.get(layer, 0.0))

    # best[n]: (maximum, sum of squares, counts) for the first n layers in the stages so far
    best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [])}
    for stage in range(1, num_stages + 1):
        is_last = stage == num_stages
        ends = [num_layers] if is_last else range(stage, num_layers - (num_stages - stage) + 1)
        found: dict[int, tuple[float, float, list[int]]] = {}
        for end in ends:
            options = []
            for start, (maximum, squares, counts) in best.items():
                if start < end:
                    cost = total[end] - total[start] + (head_cost if is_last else 0.0)
                    options.append((max(maximum, cost), squares + cost * cost, [*counts, end - start]))
            found[end] = min(options)
        best = found
    return best[num_layers][2]


def _place_exits(
    stages: list[Stage], placement: ExitPlacement, costs: Mapping[int, float], head_cost: float
) -> tuple[Stage, ...]:
    """Moves exits behind a stage's last layer to the next stage, where `placement` says so."""
    for index in range(len(stages) - 1):
        here, there = stages[index], stages[index + 1]
        if placement == "stay" or here.last not in here.exits:
            continue
        cheaper = _cost(there, costs, head_cost) + costs[here.last] <= _cost(here, costs, head_cost)
        if placement == "next_stage" or cheaper:
            stages[index] = replace(here, exits=tuple(layer for layer in here.exits if layer != here.last))
            stages[index + 1] = replace(there, exits=(here.last, *there.exits))
    return tuple(stages)


def _cost(stage: Stage, costs: Mapping[int, float], head_cost: float) -> float:
    return stage.num_layers + sum(costs[layer] for layer in stage.exits) + (head_cost if stage.is_last else 0.0)
