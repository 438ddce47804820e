"""Which layers run next, for which sequences. Decides, never computes; no torch.

Every tick moves rows to one stop. New tokens are ready for the first one; rows that no exit has answered wait further
in. A deep pass reads its layers' weights once for all that wait, so it pays to let some gather while others, answered
by an exit, go on with their next token. Rows of a long prompt come a chunk at a time. No row waits for more than
`max_wait` ticks.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from eellm.infer.costs import StepCosts
from eellm.infer.drafts import Acceptance
from eellm.infer.guard import SplitRule
from eellm.infer.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """One tick."""

    stop: int
    """Index of the stop that rows move to."""
    sequences: list[Sequence]
    """By slot."""
    num_enter: list[int]
    """Of each, the tokens that enter layer 1 at the most (where stop is 0)."""
    goes_on: bool = False
    """Whether rows that no exit answers go on at once: there is one sequence, and nobody to wait for."""


class Scheduler:
    def __init__(self, costs: Callable[[], StepCosts], *, max_prompt_rows: int = 256, max_wait: int = 16) -> None:
        """costs: what passes take here; asked for when it first matters. max_prompt_rows: rows of prompts in a pass
        while others decode; alone they may be twice as many. max_wait: ticks."""
        self.max_prompt_rows = max_prompt_rows
        self.max_wait = max_wait
        self._costs = costs
        self._answered: dict[int, Acceptance] = {}
        self._rules: dict[int, SplitRule] = {}

    def plan(self, sequences: Iterable[Sequence], tick: int) -> StepPlan | None:
        """None: there is nothing to do."""
        ready: dict[int, list[Sequence]] = {}
        for seq in sequences:
            if seq.next_stop is not None:
                ready.setdefault(seq.next_stop, []).append(seq)
        if not ready:
            return None
        stop = self._stop(ready, tick)
        chosen = sorted(ready[stop], key=lambda seq: seq.slot)
        alone = len(ready) == 1
        if stop > 0:
            return StepPlan(stop=stop, sequences=chosen, num_enter=[0] * len(chosen), goes_on=_is_one(chosen, alone))
        return self._entering(chosen, alone=alone)

    def heard(self, stop: int, num_tested: int, num_answered: int) -> None:
        """What became of a pass's tests at the stop with that index."""
        known = self._answered.setdefault(stop, Acceptance(prior=0.5, memory=256))
        for number in range(num_tested):
            known.update(1, int(number < num_answered))

    def _stop(self, ready: dict[int, list[Sequence]], tick: int) -> int:
        """The deepest rows that have waited long enough, or whose going brings more tokens a second than letting the
        others go on alone."""
        *deep_first, shallowest = sorted(ready, reverse=True)
        for stop in deep_first:
            waited = tick - min(seq.ready_since for seq in ready[stop])
            num_ready = sum(len(ready[before]) for before in ready if before < stop)
            if not self._split_pays(stop, num_ready, len(ready[stop]), waited):
                return stop
        return shallowest

    def _split_pays(self, stop: int, num_ready: int, num_waiting: int, ticks_waited: int) -> bool:
        """Whether those ready for less go first."""
        if stop - 1 not in self._answered:  # none was tested there: none comes out of a shallow pass with a token
            return False
        if stop not in self._rules:
            costs = self._costs()
            self._rules[stop] = SplitRule(costs, costs.stops[stop - 1], max_wait=self.max_wait)
        return self._rules[stop].split_pays(
            self._answered[stop - 1].probability,
            num_ready=num_ready,
            num_waiting=num_waiting,
            ticks_waited=ticks_waited,
        )

    def _entering(self, chosen: list[Sequence], *, alone: bool) -> StepPlan:
        """All that decode enter; of prompts as many rows as the chunk has room for, the longest waiting first."""
        only_prompts = alone and all(self._in_prompt(seq) for seq in chosen)
        left = self.max_prompt_rows * (2 if only_prompts else 1)
        num_enter = {}
        for seq in sorted(chosen, key=lambda seq: seq.ready_since):
            num = len(seq.pending)
            if self._in_prompt(seq):
                num = min(num, left)
                left -= num
            num_enter[seq.slot] = num
        kept = [seq for seq in chosen if num_enter[seq.slot] > 0]
        return StepPlan(
            stop=0,
            sequences=kept,
            num_enter=[num_enter[seq.slot] for seq in kept],
            goes_on=_is_one(chosen, alone),
        )

    @staticmethod
    def _in_prompt(seq: Sequence) -> bool:
        return seq.passed[0] < len(seq.request.tokens)


def _is_one(chosen: list[Sequence], alone: bool) -> bool:
    return alone and len(chosen) == 1
