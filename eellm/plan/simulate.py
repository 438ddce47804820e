"""What a schedule takes in time: each action starts when its rank is free and what it needs has come.

    schedule, cost of each stage, time between stages → timeline

Sends cost the sender nothing and reach the receiver later: transfers run beside computing. What comes before and
after a step (data, sums of gradients, the optimizer) is not in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from eellm.schedule.action import Action, Schedule, needs
from eellm.schedule.fill import fill
from eellm.schedule.timeline import Interval, Letter, Span, Timeline

ExitMode = Literal["deferred", "eager", "checkpoint"]


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """Seconds that one microbatch takes on a stage, by part."""

    forward_s: float
    """Layers, and the embedding on the first stage."""
    input_s: float
    """Their backward for inputs; with recomputation, the second forward too."""
    weight_s: float
    """Their backward for weights."""
    exit_forward_s: float = 0.0
    """Early exits here, with their losses."""
    exit_backward_s: float = 0.0
    final_forward_s: float = 0.0
    """The final head with its loss, on the last stage."""
    final_backward_s: float = 0.0
    exit_mode: ExitMode = "deferred"
    """When heads run: in the backward; forward and backward; forward, and both in the backward."""

    def parts(self, action: Action) -> list[tuple[Letter, float]]:
        """What an action consists of, in order, with seconds; parts that take no time are left out."""
        deferred, again = self.exit_mode == "deferred", self.exit_mode == "checkpoint"
        parts: list[tuple[Letter, float]]
        if action.kind == "F":
            heads = not deferred
            parts = [("F", self.forward_s), ("E", self.exit_forward_s * heads), ("H", self.final_forward_s * heads)]
        elif action.kind == "W":
            parts = [("W", self.weight_s)]
        else:
            once_more = deferred or again
            final = self.final_backward_s + self.final_forward_s * once_more
            exits = self.exit_backward_s + self.exit_forward_s * once_more
            layers = self.input_s + self.weight_s * (action.kind == "B")
            parts = [("H" if deferred else "h", final), ("D" if deferred else "e", exits)]
            parts.append(("B" if action.kind == "B" else "I", layers))
        return [(letter, seconds) for letter, seconds in parts if seconds > 0]

    def seconds(self, action: Action) -> float:
        """What an action takes."""
        return sum(seconds for _, seconds in self.parts(action))

    @property
    def total_s(self) -> float:
        """One microbatch, forward and backward."""
        again = self.exit_forward_s + self.final_forward_s if self.exit_mode == "checkpoint" else 0.0
        layers = self.forward_s + self.input_s + self.weight_s
        heads = self.exit_forward_s + self.exit_backward_s + self.final_forward_s + self.final_backward_s
        return layers + heads + again


def simulate(schedule: Schedule, costs: Sequence[StageCost], send_s: Sequence[float] | float = 0.0) -> Timeline:
    """Every action of the schedule, as early as can be.

    costs: of each stage. send_s: from each stage to the next one and back, or one number for all; stages on one rank
    need none.
    """
    times = action_times(schedule, costs, send_s)
    spans: list[Span] = []
    for rank, order in enumerate(schedule.orders):
        for action in order:
            start = times[action].start_s
            is_extra = action.microbatch >= schedule.num_microbatches
            for letter, seconds in costs[action.stage].parts(action):
                spans.append(Span(rank, action.stage, action.microbatch, letter, start, start + seconds, is_extra))
                start += seconds
    return Timeline(num_ranks=schedule.num_ranks, spans=tuple(spans))


def action_times(
    schedule: Schedule, costs: Sequence[StageCost], send_s: Sequence[float] | float = 0.0
) -> dict[Action, Interval]:
    """When each action runs; as `simulate`."""
    sends = _sends(schedule, send_s)
    works = schedule.works
    taken_apart = {(a.stage, a.microbatch) for order in schedule.orders for a in order if a.kind == "I"}
    times: dict[Action, Interval] = {}
    free, places = [0.0] * schedule.num_ranks, [0] * schedule.num_ranks
    waiting: dict[Action, list[int]] = {}  # which ranks wait for an action
    ready = list(range(schedule.num_ranks))
    while ready:
        rank = ready.pop()
        for action in schedule.orders[rank][places[rank] :]:
            needed = needs(action, works[action.microbatch], (action.stage + 1, action.microbatch) in taken_apart)
            missing = next((need for need in needed if need not in times), None)
            if missing is not None:
                waiting.setdefault(missing, []).append(rank)
                break
            start = free[rank]
            for need in needed:
                hop = 0.0 if schedule.ranks[need.stage] == rank else sends[min(need.stage, action.stage)]
                start = max(start, times[need].end_s + hop)
            free[rank] = start + costs[action.stage].seconds(action)
            times[action] = Interval(start, free[rank])
            places[rank] += 1
            ready += waiting.pop(action, ())
    stuck = [order[place] for order, place in zip(schedule.orders, places, strict=True) if place < len(order)]
    assert not stuck, f"{schedule.name} waits forever for what {', '.join(map(str, stuck))} need"
    return times


def fill_bubbles(schedule: Schedule, costs: Sequence[StageCost], send_s: Sequence[float] | float = 0.0) -> Schedule:
    """1F1B with extra microbatches in its gaps, as many as fit at these costs (see `eellm.schedule.fill`)."""
    times = action_times(schedule, costs, send_s)
    return fill(schedule, times, lambda action: costs[action.stage].seconds(action), _sends(schedule, send_s))


def _sends(schedule: Schedule, send_s: Sequence[float] | float) -> list[float]:
    return [float(send_s)] * (schedule.num_stages - 1) if isinstance(send_s, float | int) else list(send_s)
