"""Whether exits pay: which of them to use, and when those that they answered may go on alone. Without torch.

Early exit saves layers and costs heads; a pass for few sequences costs nearly as much as one for all. Both are settled
by seconds per token, from measured costs and from where tokens have left so far.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from eellm.infer.costs import Curve, StepCosts
from eellm.plan.decode import ExitDistribution, Passes, passes_of_batch, rows_of_sequence

_GRID = 32
"""Probabilities are rounded to multiples of a thirty-second."""


@dataclass(frozen=True, kw_only=True)
class EarlyPlan:
    """Which exits to use."""

    exits: tuple[int, ...]
    """Their layers; none: full depth."""
    seconds_per_token: float
    """That all sequences together take for one token."""


def early_pays(
    exits: ExitDistribution,
    costs: StepCosts,
    *,
    batch_size: int = 1,
    max_deferred: int = 16,
    margin: float = 0.03,
    gated: bool = False,
    whole: bool = False,
) -> EarlyPlan:
    """The exits whose use makes tokens fastest; none, unless they are faster than full depth by the margin.

    exits: where tokens leave when all of these exits are in use; no others are proposed. Taken to hold: a token that
    leaves at one which isn't used leaves at the next that is. Sequences make their steps together, as in
    `eellm.plan.decode`, whose formulas for the rows of a pass these are. gated: gates say whether an exit is sure.
    whole: all of these exits are used, or none. Found as shortest paths from exit to exit, for every last one.
    """
    layers = tuple(layer for layer in costs.stops[:-1] if layer in exits.shares)
    below = {layer: sum(share for at, share in exits.shares.items() if at <= layer) for layer in (0, *layers)}

    @cache
    def hop_s(start: int, end: int, final: float) -> float:
        """From one exit in use to the next, or to the end, and testing that."""
        passes = passes_of_batch(rows_of_sequence(below[start], final, max_deferred), batch_size)
        moved_s = _seconds(passes, costs.range_s(start, end))
        tested = passes_of_batch(np.array([below[start], 1 - below[start]]), batch_size)
        if not gated or end == costs.num_layers:
            return moved_s + _seconds(tested, costs.head_s[end])
        share = below[end] - below[start]
        answered = passes_of_batch(np.array([1 - share, share]), batch_size)
        return moved_s + _seconds(tested, costs.gate_s[end]) + _seconds(answered, costs.head_s[end])

    full_s = costs.full_s(batch_size)
    best_s, best = full_s / (1 + margin), ()
    for number, last in enumerate(layers, 1):
        final = max(1 - below[last], 0.0)
        paths: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
        if whole and number < len(layers):
            continue
        for layer in layers[:number]:
            before = [*paths.items()][-1:] if whole else paths.items()
            paths[layer] = min((s + hop_s(at, layer, final), (*used, layer)) for at, (s, used) in before)
        seconds, used = paths[last]
        seconds += hop_s(last, costs.num_layers, final)
        if seconds <= best_s:
            best_s, best = seconds, used
    return EarlyPlan(exits=best, seconds_per_token=(best_s if best else full_s) / batch_size)


class SplitRule:
    """Whether the sequences that an exit answered go on alone, or wait for the deep pass of those that it didn't.

    Every deep pass makes all ready again, and reads its weights once however many take part. So it is put off as long
    as that brings more tokens in its time than whole cycles, from deep pass to deep pass, do on average. Rows deferred
    earlier change nothing: they go through the deep layers sooner or later. Dynamic rebatching is DREX's (arXiv
    2512.15705), which compares one split with none.
    """

    def __init__(self, costs: StepCosts, layer: int, *, max_wait: int = 16) -> None:
        """layer: of the exit. max_wait: ticks that anyone waits at the most, whatever it costs the others."""
        self.costs = costs
        self.layer = layer
        self.max_wait = max_wait
        self._known: dict[tuple[int, int], tuple[bool, ...]] = {}

    def split_pays(self, exit_probability: float, *, num_ready: int, num_waiting: int, ticks_waited: int = 0) -> bool:
        """Whether the next pass is a shallow one, for those ready for a new token.

        exit_probability: of a token at the exit; rounded, so that what was worked out once serves again. num_waiting:
        sequences that the exit didn't answer. ticks_waited: by the one that waits longest.
        """
        assert num_ready + num_waiting > 0, "there is something to run"
        if num_waiting == 0 or num_ready == 0 or ticks_waited >= self.max_wait:
            return num_waiting == 0
        known = min(round(exit_probability * _GRID), _GRID - 1), num_ready + num_waiting
        if known not in self._known:
            self._known[known] = splits(self.costs, self.layer, known[0] / _GRID, known[1])
        return self._known[known][num_ready]


def splits(costs: StepCosts, layer: int, exit_probability: float, num_sequences: int) -> tuple[bool, ...]:
    """By how many of the sequences are ready for a new token, the others waiting: whether a shallow pass comes next.

    The best of all such rules in the long run, for tokens that leave independently of each other. A cycle's best course
    at a given price of a second is found backwards from few ready to all; the price is what a second of the last
    course brought, until that no longer rises (Dinkelbach's method).
    """
    assert 0 <= exit_probability < 1, "someone has to wait in the end"
    everyone = np.arange(num_sequences + 1)
    shallow_s = costs.range_s(0, layer).at_each(everyone) + costs.head_s[layer].at_each(everyone)
    deep_s = costs.range_s(layer, costs.num_layers).at_each(everyone) + costs.head_s[costs.num_layers].at_each(everyone)
    left = [np.ones(1)]  # how likely 0, 1, … of so many ready ones are answered
    for _ in range(num_sequences):
        left.append(np.convolve(left[-1], [1 - exit_probability, exit_probability]))
    rate, choices = 0.0, [False] * (num_sequences + 1)
    while True:
        course = np.zeros((num_sequences + 1, 2))  # by number of ready: tokens and seconds until the deep pass is over
        for ready in range(num_sequences + 1):
            waiting = num_sequences - ready
            deep = np.array([waiting, deep_s[waiting]])
            if ready == 0:
                course[ready] = deep
                continue
            shallow = np.array([ready * exit_probability, shallow_s[ready]]) + left[ready][:-1] @ course[:ready]
            shallow /= 1 - left[ready][-1]  # where all are answered, the same again
            choices[ready] = waiting == 0 or bool((shallow - deep) @ (1, -rate) > 0)
            course[ready] = shallow if choices[ready] else deep
        better = course[-1][0] / course[-1][1]
        if better <= rate * (1 + 1e-9):
            return tuple(choices)
        rate = better


def _seconds(passes: Passes, curve: Curve) -> float:
    """On average; none where there are no rows."""
    return float(passes.probability @ curve.at_each(passes.rows))
