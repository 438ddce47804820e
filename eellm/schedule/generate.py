"""The schedules by name: which rank computes what, in which order.

    name, number of ranks, number of microbatches → Schedule

Each is one pure function, which gives one rank's order and names its source. Orders are those that
torch.distributed.pipelining 2.13 executes. They say nothing of time: an action starts when its rank is free and what it
needs is there. An order is written as *slots*, what is done on which stage; each stage takes its microbatches in turn,
so counting gives them their numbers. What is said of idle time and of what is held goes for microbatches in rounds of
num_ranks, two rounds or more; the unit of time is a stage's F, which I and W take too, and B twice.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from eellm.config.check import check_choice
from eellm.schedule.action import Action, Kind, Order, Schedule
from eellm.schedule.partition import check_microbatches, stages_of_ranks


class Slot(NamedTuple):
    """A place in an order, before it is known for which microbatch."""

    stage: int
    kind: Kind


def make_schedule(name: str, num_ranks: int, num_microbatches: int, *, stages_per_rank: int = 2) -> Schedule:
    """The schedule of that name in `parallel.schedule`.

    stages_per_rank: under the schedules that leave it open; gpipe and 1f1b have 1, zbv and dualpipev have 2.
    Raises ConfigError for an unknown name, and for a number of microbatches that the schedule can't run.
    """
    check_choice("parallel.schedule", name, _ORDER_OF_RANK)
    check_microbatches(name, num_ranks, num_microbatches)
    stages = stages_of_ranks(name, num_ranks, stages_per_rank)
    rank_of = {stage: rank for rank, here in enumerate(stages) for stage in here}
    order_of_rank = _ORDER_OF_RANK[name]
    return Schedule(
        name=name,
        ranks=tuple(rank_of[stage] for stage in range(len(rank_of))),
        num_microbatches=num_microbatches,
        orders=tuple(order_of_rank(here, rank, num_ranks, num_microbatches) for rank, here in enumerate(stages)),
    )


def _gpipe(stages: Sequence[int], rank: int, num_ranks: int, num_microbatches: int) -> Order:
    """All forwards, then all backwards (GPipe, arXiv 1811.06965).

    Idle for 3 · (num_ranks - 1). All microbatches are in flight.
    """
    (stage,) = stages
    return _number([Slot(stage, "F")] * num_microbatches + [Slot(stage, "B")] * num_microbatches)


def _one_f_one_b(stages: Sequence[int], rank: int, num_ranks: int, num_microbatches: int) -> Order:
    """One forward, one backward (PipeDream-Flush, arXiv 2006.09503).

    A rank does a forward for each rank behind it, which can't send anything back before; then a forward and a backward
    in turn. GPipe's idle time, but only num_ranks - rank microbatches are in flight.
    """
    (stage,) = stages
    backwards = [[Slot(stage, "B")]] * num_microbatches
    return _number(_alternate([Slot(stage, "F")] * num_microbatches, backwards, num_ranks - 1 - rank))


def _interleaved_1f1b(stages: Sequence[int], rank: int, num_ranks: int, num_microbatches: int) -> Order:
    """1F1B with several stages on each rank (Megatron-LM, arXiv 2104.04473).

    A round of microbatches goes through the rank's first stage, through its second and so on, then comes the next
    round; backward alike from the last stage down. A rank is ahead by a round on each of its stages but one, and by two
    forwards for each rank behind it. As idle as 1F1B, but of smaller stages; it holds and sends more.
    Rounds may be larger than num_ranks, as in Llama 3 (arXiv 2407.21783 §3.3.2).
    """
    size = _round_size(num_ranks, num_microbatches)
    forwards = [Slot(stage, "F") for stage in _in_rounds(stages, size, num_microbatches)]
    backwards = [[Slot(stage, "B")] for stage in _in_rounds(stages[::-1], size, num_microbatches)]
    return _number(_alternate(forwards, backwards, (len(stages) - 1) * size + 2 * (num_ranks - 1 - rank)))


def _looped_bfs(stages: Sequence[int], rank: int, num_ranks: int, num_microbatches: int) -> Order:
    """Breadth first (arXiv 2211.05953): all microbatches go through a stage before the rank turns to its next one.

    The backward goes the same way back, so the last microbatch is its first. A stage's weights are needed for one
    stretch forward and one backward, which suits sharded weights. Idle as interleaved 1F1B is; all are in flight.
    """
    microbatches = range(num_microbatches)
    forwards = [Action(stage, "F", m) for stage in stages for m in microbatches]
    return (*forwards, *(Action(stage, "B", m) for stage in reversed(stages) for m in reversed(microbatches)))


def _interleaved_zero_bubble(stages: Sequence[int], rank: int, num_ranks: int, num_microbatches: int) -> Order:
    """Interleaved 1F1B with the backward taken apart (ZB-H1, arXiv 2401.10241 §2.1, on several stages per rank).

    The rank before waits for the inputs' gradients only. The weights' come `rank` backwards later, so that each rank
    has some left for the end, where it would be idle. Idle for num_ranks - 1, a third of 1F1B; every rank holds what
    1F1B's first does.
    """
    size = _round_size(num_ranks, num_microbatches)
    forwards = [Slot(stage, "F") for stage in _in_rounds(stages, size, num_microbatches)]
    back = _in_rounds(stages[::-1], size, num_microbatches)
    weights = [Slot(stage, "W") for stage in back]
    num_kept = min(rank, len(back))
    backwards = [[Slot(stage, "I")] for stage in back[:num_kept]]
    backwards += [[Slot(stage, "I"), weight] for stage, weight in zip(back[num_kept:], weights, strict=False)]
    last = weights[len(back) - num_kept :]
    return _number(_alternate(forwards, backwards, (len(stages) - 1) * size + num_ranks - 1 - rank) + last)


def _zbv(stages: Sequence[int], rank: int, num_ranks: int, num_microbatches: int) -> Order:
    """Zero bubble on a V: stages go down the ranks and up again (arXiv 2401.10241 §6).

    First and last stage are on the first rank, and the last rank hands itself what others send. Idle for num_ranks - 1,
    all of it before a rank's first action and after its last, where one step can run into the next; every rank holds
    what 1F1B's first does. With fewer than 2 · num_ranks - 1 microbatches, the slots of those that are lacking go.
    """
    down, up = stages
    num_below = num_ranks - 1 - rank
    num_places = max(num_microbatches, 2 * num_ranks - 1)
    f_down, i_down, w_down = Slot(down, "F"), Slot(down, "I"), Slot(down, "W")
    f_up, i_up, w_up = Slot(up, "F"), Slot(up, "I"), Slot(up, "W")
    slots: list[Slot] = [
        *[f_down] * (2 * num_below + 1),
        *[f_up, f_down] * rank,
        *[f_up, i_up, w_up] * (num_below + 1),  # the first backward is here
        *[f_down, i_down, w_down, f_up, i_up, w_up] * (num_places - 2 * num_ranks + 1 + rank),
        *[i_down, w_down, f_up, i_up, w_up] * num_below,  # no more microbatches come in
        *[i_down, i_up] * rank,  # the ranks above wait for these: weights come later
        *[i_down, w_down] * (num_below + 1),
        *[w_up] * rank,
        *[w_down] * rank,
    ]
    return tuple(action for action in _number(slots) if action.microbatch < num_microbatches)


def _dualpipev(stages: Sequence[int], rank: int, num_ranks: int, num_microbatches: int) -> Order:
    """DualPipe's half, on a V (DeepSeek-V3, arXiv 2412.19437 §3.2.1, and the code released with it).

    A forward on one arm of the V stands beside a backward on the other, so that a runtime can overlap the transfers of
    the one with the computing of the other; torch executes them one after the other. Backwards are taken apart only
    while the pipeline fills and drains. Idle as zbv is; holds one activation more.
    """
    down, up = stages
    num_below = num_ranks - 1 - rank
    f_down, b_down, i_down = Slot(down, "F"), Slot(down, "B"), Slot(down, "I")
    f_up, b_up, i_up, w_up = Slot(up, "F"), Slot(up, "B"), Slot(up, "I"), Slot(up, "W")
    last = [up, down] * (rank + 1)  # stages of the last backwards: no forward is left to stand beside them
    whole, apart = last[: rank + 1], last[rank + 1 :]
    weights: list[Slot] = [Slot(stage, "W") for stage in apart + [down] * num_below]
    slots: list[Slot] = [
        *[f_down] * (2 * num_below),
        *[f_down, f_up] * (rank + 1),
        *[i_up, w_up, f_up] * num_below,
        *[f_down, b_up, f_up, b_down] * (num_microbatches - 2 * num_ranks + rank + 1),
        *[b_up, f_up, b_down] * num_below,
        *[Slot(stage, "B") for stage in whole],
        *[Slot(stage, "I") for stage in apart],
        *[slot for weight in weights[:num_below] for slot in (weight, i_down)],
        *weights[num_below:],
    ]
    return _number(slots)


_ORDER_OF_RANK = {
    "gpipe": _gpipe,
    "1f1b": _one_f_one_b,
    "interleaved_1f1b": _interleaved_1f1b,
    "looped_bfs": _looped_bfs,
    "interleaved_zero_bubble": _interleaved_zero_bubble,
    "zbv": _zbv,
    "dualpipev": _dualpipev,
}


def _number(slots: Sequence[Slot]) -> Order:
    """Gives slots their microbatches: each stage takes them in order, forward, backward and for weights."""
    num_done: Counter[tuple[int, Kind]] = Counter()
    order = []
    for stage, kind in slots:
        parts: tuple[Kind, ...] = ("I", "W") if kind == "B" else (kind,)
        order.append(Action(stage, kind, num_done[stage, parts[0]]))
        for part in parts:
            num_done[stage, part] += 1
    return tuple(order)


def _alternate(forwards: list[Slot], backwards: list[list[Slot]], num_ahead: int) -> list[Slot]:
    """`num_ahead` forwards, then a forward and a backward in turn, then the backwards that are left."""
    num_ahead = min(num_ahead, len(forwards))
    num_pairs = len(forwards) - num_ahead
    pairs = zip(forwards[num_ahead:], backwards[:num_pairs], strict=True)
    slots = [*forwards[:num_ahead]]
    for forward, backward in pairs:
        slots += [forward, *backward]
    return slots + [slot for backward in backwards[num_pairs:] for slot in backward]


def _round_size(num_ranks: int, num_microbatches: int) -> int:
    """Microbatches of a round: all rounds have the same, at least num_ranks, and as few as that allows."""
    return num_microbatches // max(1, num_microbatches // num_ranks)


def _in_rounds(stages: Sequence[int], size: int, num_microbatches: int) -> list[int]:
    """Each microbatch's stages, in the order of their use: of every round, all on the first stage, on the second, …"""
    return [stage for _ in range(num_microbatches // size) for stage in stages for _ in range(size)]
