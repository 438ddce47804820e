"""A pipeline schedule in one file: 1F1B with twice the warm-up, which hides transfers (arXiv 2211.05322, "eager 1F1B").

    an order of actions per rank → checked → costed → drawn → trained with, by `eellm.pipeline.filled.FilledPipeline`

A schedule is data, so whatever reads one takes this one as it is. docs/how-to/extend.md says how it gets a name.
"""

from eellm.plan.simulate import StageCost, simulate
from eellm.schedule.action import Action, Order, Schedule
from eellm.schedule.check import check, peak_in_flight
from eellm.schedule.generate import make_schedule
from eellm.schedule.render_text import as_text


def eager_1f1b(num_ranks: int, num_microbatches: int) -> Schedule:
    """One stage on each rank, which is ahead by two forwards for each rank behind it."""
    orders = tuple(_order(rank, num_ranks, num_microbatches) for rank in range(num_ranks))
    return Schedule(name="eager_1f1b", ranks=tuple(range(num_ranks)), num_microbatches=num_microbatches, orders=orders)


def _order(rank: int, num_ranks: int, num_microbatches: int) -> Order:
    num_ahead = min(2 * (num_ranks - 1 - rank), num_microbatches)
    order = [Action(rank, "F", n) for n in range(num_ahead)]
    for n in range(num_microbatches):
        if num_ahead + n < num_microbatches:
            order.append(Action(rank, "F", num_ahead + n))
        order.append(Action(rank, "B", n))
    return tuple(order)


def main() -> None:
    costs = [StageCost(forward_s=1.0, input_s=1.0, weight_s=1.0)] * 4
    for schedule in (make_schedule("1f1b", 4, 8), eager_1f1b(4, 8)):
        check(schedule)  # every action once, and no rank waits for ever
        timeline = simulate(schedule, costs, 0.5)  # half a forward for a transfer
        print(f"{schedule.name}: {timeline.end_s:.1f} s, microbatches in flight {peak_in_flight(schedule)}")
        print(as_text(timeline))


if __name__ == "__main__":
    main()
