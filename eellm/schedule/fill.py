"""Bubble filling: extra microbatches in the idle time of 1F1B, which nobody waits for (EE-LLM, arXiv 2312.04916, §3.3
and appendix C).

    1F1B, seconds of each stage → the same order with extras in its gaps, and by what to scale losses and gradients

Part 1 fills the gap between warm-up and steady state: an extra runs forward through the first k stages and backward
through the same ones, for the losses of the exits it reached. Part 2 fills the gap at the end: an extra runs forward
through all stages and backward through the last k only. An extra is put in whole or not at all, into gaps that are
there anyway: nothing of the regular microbatches moves.

Gradients stay unbiased. Take the loss at stage s, the parameters of stage j ≤ s, B regular microbatches, n1(s) extras
of Part 1 that reach stage s and n2(j) of Part 2 whose backward reaches stage j. With g the expected gradient of one
microbatch, and losses of regular and Part-1 microbatches scaled by B / (B + n1(s)) at stage s,

    (B + n1(s)) · B / (B + n1(s)) · g + n2(j) · g = (B + n2(j)) · g

whatever s is: so the sum over all losses has one factor too many, and the gradient of stage j's parameters times
B / (B + n2(j)) has the plain one's expectation B · g. No such factor exists for a matrix that several stages hold.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from eellm.schedule.action import Action, Order, Schedule, Work, needs
from eellm.schedule.timeline import Interval

Seconds = Callable[[Action], float]


@dataclass(frozen=True, kw_only=True)
class FillScale:
    """Factors of one stage that keep its gradients unbiased."""

    loss: float
    """On losses here, of regular microbatches and of Part 1's; Part 2's stay as they are."""
    gradient: float
    """On the gradients of parameters here, after all backwards."""


class _Placed(NamedTuple):
    start_s: float
    end_s: float
    action: Action


def max_extras(num_ranks: int, backward_ratio: float) -> int:
    """K = ⌊(P - 1) · r / (1 + r)⌋: how many extras of each part even stages have room for.

    backward_ratio: r, how many forwards a backward takes.
    """
    return int((num_ranks - 1) * backward_ratio / (1 + backward_ratio) + 1e-9)


def fill(schedule: Schedule, times: Mapping[Action, Interval], seconds: Seconds, send_s: Sequence[float]) -> Schedule:
    """1F1B with as many extras as fit: of Part 1 and of Part 2 at most one for each number of stages, deepest first.

    times: when each action of `schedule` runs. seconds: what an action takes. send_s: from each stage to the next.
    Microbatches are numbered on from the regular ones, Part 2's first: they reach the last stage in that order.
    """
    assert all(rank == stage for stage, rank in enumerate(schedule.ranks)), "one stage on each rank"
    room = _Room(schedule, times, seconds, send_s)
    stages = schedule.num_stages
    part_1 = [room.place(0, depth, depth) for depth in range(stages - 1, 0, -1)]
    part_2 = [room.place(stages - depth, stages, stages) for depth in range(stages - 1, 0, -1)]
    found = [placed for placed in (*part_2, *part_1) if placed is not None]
    numbers = {placed.microbatch: schedule.num_microbatches + i for i, placed in enumerate(found)}
    orders = [
        tuple(a._replace(microbatch=numbers.get(a.microbatch, a.microbatch)) for _, _, a in busy) for busy in room.busy
    ]
    extras = tuple(work._replace(microbatch=numbers[work.microbatch]) for work in found)
    return replace(schedule, name="filled_1f1b", orders=tuple(orders), extras=extras)


def fill_scales(schedule: Schedule) -> tuple[FillScale, ...]:
    """The factors of each stage."""
    regular, stages = schedule.num_microbatches, schedule.num_stages
    part_1 = [work for work in schedule.extras if is_part_1(work)]
    part_2 = [work for work in schedule.extras if not is_part_1(work)]
    reaching = [sum(work.forward_end > stage for work in part_1) for stage in range(stages)]
    reached = [sum(work.backward_start <= stage for work in part_2) for stage in range(stages)]
    return tuple(
        FillScale(loss=regular / (regular + n1), gradient=regular / (regular + n2))
        for n1, n2 in zip(reaching, reached, strict=True)
    )


def is_part_1(work: Work) -> bool:
    """Whether a microbatch runs its backward down to the first stage: Part 1's extras do, and regular ones."""
    return work.backward_start == 0


class _Room:
    """The gaps of a timeline, and what has been put into them."""

    def __init__(
        self, schedule: Schedule, times: Mapping[Action, Interval], seconds: Seconds, send_s: Sequence[float]
    ) -> None:
        self.seconds, self.send_s = seconds, send_s
        self.end_s = max(interval.end_s for interval in times.values())
        self.tolerance_s = 1e-9 * self.end_s
        self.busy = [[_Placed(*times[action], action) for action in order] for order in schedule.orders]
        # Part 1 is done before a stage's first regular backward, or it would be held in memory until the end
        self.before_s = [min(p.start_s for p in busy if p.action.kind == "B") for busy in self.busy]
        # Part 2 begins behind a stage's last regular forward; so hidden states arrive in the order of the numbers
        self.behind_s = [max(p.end_s for p in busy if p.action.kind == "F") for busy in self.busy]
        self.num_placed = 0

    def place(self, backward_start: int, forward_end: int, backward_end: int) -> Work | None:
        """Puts one extra in, if all of it fits."""
        work = Work(-1 - self.num_placed, forward_end, backward_start, backward_end)  # numbered for good later
        placed = self._try(work)
        if placed is None:
            return None
        for entry in placed:
            insort(self.busy[entry.action.stage], entry)
            if backward_start > 0 and entry.action.kind == "F":
                self.behind_s[entry.action.stage] = entry.end_s
        self.num_placed += 1
        return work

    def _try(self, work: Work) -> list[_Placed] | None:
        ends: dict[Action, float] = {}
        entries: list[_Placed] = []
        for action in _actions(work):
            ready = 0.0 if is_part_1(work) or action.kind != "F" else self.behind_s[action.stage]
            for need in needs(action, work, is_split_above=False):
                hop = 0.0 if need.stage == action.stage else self.send_s[min(need.stage, action.stage)]
                ready = max(ready, ends[need] + hop)
            latest = self.before_s[action.stage] if is_part_1(work) else self.end_s
            start = self._start(self.busy[action.stage], ready, latest, self.seconds(action))
            if start is None:
                return None
            ends[action] = start + self.seconds(action)
            entries.append(_Placed(start, ends[action], action))
        return entries

    def _start(self, busy: list[_Placed], ready_s: float, latest_s: float, seconds: float) -> float | None:
        """When something that is ready at `ready_s` can start, in the first gap that is long enough; it must end by
        `latest_s`."""
        start = ready_s
        first = max(0, bisect_left(busy, (ready_s,)) - 1)  # all before it has ended
        for placed in busy[first:]:
            if start + seconds <= placed.start_s + self.tolerance_s:
                break
            start = max(start, placed.end_s)
        return start if start + seconds <= latest_s + self.tolerance_s else None


def _actions(work: Work) -> Order:
    forwards = (Action(stage, "F", work.microbatch) for stage in range(work.forward_end))
    backwards = (
        Action(stage, "B", work.microbatch) for stage in range(work.backward_end - 1, work.backward_start - 1, -1)
    )
    return (*forwards, *backwards)
