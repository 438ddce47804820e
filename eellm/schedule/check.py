"""Whether a schedule can be run, what its ranks send each other, and how much they hold.

    check            each action once, on its stage's rank, after what it needs, and no rank waits for ever
    with_transfers   orders with the sends and receives that they imply
    check_transfers  the same question for orders that have them
    peak_in_flight   activations held at once

Both runs below are without time: what counts is whether an order exists in which all can be done. Every function takes
time proportional to the number of actions.
"""

from collections.abc import Callable, Iterator, Sequence, Set

from eellm.errors import ScheduleError
from eellm.schedule.action import Action, Order, Schedule, Work, needs


def check(schedule: Schedule) -> None:
    """Raises ScheduleError if an action is missing, is there twice or on another rank than its stage, stands before
    what it needs on its own rank, or waits for one on another rank that waits for it."""
    _check_works(schedule)
    _check_each_once(_called_for(schedule), schedule.orders, schedule.ranks)
    for _ in _in_lockstep(schedule):
        pass


def with_transfers(schedule: Schedule) -> tuple[Order, ...]:
    """Each rank's order with what it sends and receives; between stages of one rank nothing is sent.

    A send and its receive get into the two ranks' orders at one moment of a run in which all ranks go forward action
    by action. So any two ranks have their mutual transfers in the same order, and all orders could be run even if each
    send waited for its receive. A receive comes early, before the action of its rank that needs it. Raises
    ScheduleError where `check` finds a rank that waits for ever.
    """
    works, ranks = schedule.works, schedule.ranks
    orders: list[list[Action]] = [[] for _ in schedule.orders]
    for rank, action in _in_lockstep(schedule):
        orders[rank].append(action)
        for transfer in _transfers(action, works[action.microbatch], ranks):
            orders[ranks[transfer.stage]].append(transfer)
    return tuple(map(tuple, orders))


def check_transfers(schedule: Schedule, orders: Sequence[Order]) -> None:
    """Raises ScheduleError if `orders` are not the schedule's with its transfers, each once, a send after what makes
    and a receive before what uses it, such that they can be run even if each send waits for its receive.

    The last is stricter than what a runtime with sends in the background needs. It includes that any two ranks have
    their mutual transfers in the same order.
    """
    works, ranks = schedule.works, schedule.ranks
    expected = {action for order in schedule.orders for action in order}
    expected |= {other for action in expected for other in _transfers(action, works[action.microbatch], ranks)}
    _check_each_once(expected, orders, ranks)
    for rank, order in enumerate(orders):
        if tuple(action for action in order if action.is_compute) != schedule.orders[rank]:
            raise ScheduleError(f"rank {rank}: computes in another order than the schedule's")
    _check_rendezvous(schedule, orders)


def peak_in_flight(schedule: Schedule) -> tuple[int, ...]:
    """Per rank, the most activations held at once: of one microbatch on one stage, from its forward to the end of its
    backward (to W where that is taken apart). Where no backward follows nothing is held."""
    works, peaks = schedule.works, []
    for order in schedule.orders:
        held = peak = 0
        for stage, kind, microbatch in order:
            work = works[microbatch]
            if kind == "F" and work.backward_start <= stage < work.backward_end:
                held += 1
                peak = max(peak, held)
            elif kind in ("B", "W"):
                held -= 1
        peaks.append(peak)
    return tuple(peaks)


def _check_works(schedule: Schedule) -> None:
    for number, work in enumerate(schedule.works):
        if work.microbatch != number:
            raise ScheduleError(f"extra microbatch {work.microbatch}: its number should be the next one, {number}")
        if not 0 <= work.backward_start <= work.backward_end <= work.forward_end <= schedule.num_stages:
            raise ScheduleError(f"{work}: its backward must lie within its forward, and that within the stages")


def _called_for(schedule: Schedule) -> set[Action]:
    """What the microbatches ask for; where there is an I or a W, the backward is taken for one in two parts."""
    actions = (action for order in schedule.orders for action in order)
    in_parts = {(stage, microbatch) for stage, kind, microbatch in actions if kind in ("I", "W")}
    called_for = set()
    for microbatch, forward_end, backward_start, backward_end in schedule.works:
        called_for |= {Action(stage, "F", microbatch) for stage in range(forward_end)}
        for stage in range(backward_start, backward_end):
            if (stage, microbatch) in in_parts:
                called_for |= {Action(stage, "I", microbatch), Action(stage, "W", microbatch)}
            else:
                called_for.add(Action(stage, "B", microbatch))
    return called_for


def _check_each_once(expected: Set[Action], orders: Sequence[Order], ranks: Sequence[int]) -> None:
    """The orders hold what is expected, each on its stage's rank, and nothing else."""
    seen: set[Action] = set()
    for rank, order in enumerate(orders):
        for action in order:
            if action not in expected:
                raise ScheduleError(f"rank {rank}: no microbatch calls for {action}")
            if ranks[action.stage] != rank:
                raise ScheduleError(f"rank {rank}: {action} belongs on rank {ranks[action.stage]}, where its stage is")
            if action in seen:
                raise ScheduleError(f"rank {rank}: {action} is there twice")
            seen.add(action)
    if len(seen) < len(expected):
        missing = min(expected - seen)
        raise ScheduleError(f"rank {ranks[missing.stage]}: {missing} is missing")


def _in_lockstep(schedule: Schedule) -> Iterator[tuple[int, Action]]:
    """(rank, action) as if all took equally long: round by round, every rank does its next action if all that it
    needs was done in earlier rounds. Raises ScheduleError when no rank can go on."""
    needs_of, orders = _needs_of(schedule), schedule.orders
    position = [0] * len(orders)
    done: set[Action] = set()
    waiting: dict[Action, int] = {}  # what a rank waits for: the rank; only one other rank needs any action
    turn = [rank for rank, order in enumerate(orders) if order]
    while turn:
        finished, following = [], []
        for rank in turn:
            action = orders[rank][position[rank]]
            missing = next((need for need in needs_of(action) if need not in done), None)
            if missing is not None:
                if schedule.ranks[missing.stage] == rank:
                    raise _too_early(rank, action, missing)
                waiting[missing] = rank
                continue
            yield rank, action
            finished.append(action)
            position[rank] += 1
            if position[rank] < len(orders[rank]):
                following.append(rank)
        done.update(finished)
        following += [waiting.pop(action) for action in finished if action in waiting]
        turn = sorted(following)
    if waiting:
        waits = sorted((rank, f"{orders[rank][position[rank]]} for {need}") for need, rank in waiting.items())
        each = "; ".join(f"rank {rank} before {what}" for rank, what in waits)
        raise ScheduleError(f"ranks wait for each other: {each}")


def _needs_of(schedule: Schedule) -> Callable[[Action], tuple[Action, ...]]:
    """What must be done before an action of the schedule, wherever."""
    works = schedule.works
    inputs = {action for order in schedule.orders for action in order if action.kind == "I"}

    def needs_of(action: Action) -> tuple[Action, ...]:
        above = Action(action.stage + 1, "I", action.microbatch)
        return needs(action, works[action.microbatch], above in inputs)

    return needs_of


def _too_early(rank: int, action: Action, need: Action) -> ScheduleError:
    return ScheduleError(f"rank {rank}: {action} stands before {need}, which it needs")


def _transfers(action: Action, work: Work, ranks: Sequence[int]) -> tuple[Action, ...]:
    """The send and the receive of what a compute action makes for a stage on another rank, if it does."""
    stage, kind, microbatch = action
    if kind == "F" and stage + 1 < work.forward_end and ranks[stage + 1] != ranks[stage]:
        return Action(stage, "SEND_F", microbatch), Action(stage + 1, "RECV_F", microbatch)
    if kind in ("B", "I") and stage > work.backward_start and ranks[stage - 1] != ranks[stage]:
        return Action(stage, "SEND_B", microbatch), Action(stage - 1, "RECV_B", microbatch)
    return ()


def _check_rendezvous(schedule: Schedule, orders: Sequence[Order]) -> None:
    """Runs orders in which a rank stops at each transfer until the other rank is at it too."""
    before = _before(schedule)
    position = [0] * len(orders)
    done: set[Action] = set()
    alone: dict[Action, int] = {}  # a send: the rank that is at it, or at its receive, and waits for the other
    to_run = list(range(len(orders)))
    while to_run:
        rank = to_run.pop()
        while position[rank] < len(orders[rank]):
            action = orders[rank][position[rank]]
            missing = next((need for need in before(action) if need not in done), None)
            if missing is not None:
                raise _too_early(rank, action, missing)
            if not action.is_compute:
                send = _send_of(action)
                other = alone.pop(send, None)
                if other is None:
                    alone[send] = rank
                    break
                done.add(orders[other][position[other]])
                position[other] += 1
                to_run.append(other)
            done.add(action)
            position[rank] += 1
    if alone:
        each = "; ".join(f"rank {rank} at {orders[rank][position[rank]]}" for rank in sorted(alone.values()))
        raise ScheduleError(f"ranks wait for each other in their transfers: {each}")


def _before(schedule: Schedule) -> Callable[[Action], list[Action]]:
    """What must stand before an action in its own rank's order, transfers included."""
    needs_of, ranks = _needs_of(schedule), schedule.ranks
    backwards = {(a.stage, a.microbatch): a for order in schedule.orders for a in order if a.kind in ("B", "I")}

    def before(action: Action) -> list[Action]:
        stage, kind, microbatch = action
        if kind == "SEND_F":
            return [Action(stage, "F", microbatch)]
        if kind == "SEND_B":
            return [backwards[stage, microbatch]]
        if not action.is_compute:
            return []
        receive = Action(stage, "RECV_F" if kind == "F" else "RECV_B", microbatch)
        return [need if ranks[need.stage] == ranks[stage] else receive for need in needs_of(action)]

    return before


def _send_of(transfer: Action) -> Action:
    """The send that a transfer is, or that it receives."""
    stage, kind, microbatch = transfer
    if kind == "RECV_F":
        return Action(stage - 1, "SEND_F", microbatch)
    return Action(stage + 1, "SEND_B", microbatch) if kind == "RECV_B" else transfer
