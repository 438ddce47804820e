"""Schedules as data: their orders are those that torch executes, and the checker finds what can't be run."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eellm.errors import ConfigError, ScheduleError
from eellm.pipeline.run import SCHEDULES
from eellm.schedule.action import Action, Schedule, Work, needs
from eellm.schedule.check import check, check_transfers, peak_in_flight, with_transfers
from eellm.schedule.generate import make_schedule
from eellm.schedule.partition import SINGLE, stages_of_ranks, takes

LOOPED = ("interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble")
MULTI = tuple(name for name in SCHEDULES if name not in SINGLE)


class RecordingStage:
    """What torch's schedules ask of a stage, without a model or other processes: it writes down what is computed."""

    device, submod = "cpu", None

    def __init__(self, index, num_stages, num_ranks, rank, record):
        self.stage_index, self.num_stages, self.group_size, self.group_rank = index, num_stages, num_ranks, rank
        self.is_first, self.is_last, self.record = index == 0, index == num_stages - 1, record
        self.args_recv_info, self.act_send_info = {0: ()}, {}

    def forward_one_chunk(self, microbatch, args, kwargs, save_forward_output):
        self.record.append(Action(self.stage_index, "F", microbatch))
        return torch.zeros(())

    def backward_one_chunk(self, microbatch, loss, last_backward, full_backward=True):
        self.record.append(Action(self.stage_index, "B" if full_backward else "I", microbatch))

    def backward_weight_one_chunk(self, microbatch, last_backward):
        self.record.append(Action(self.stage_index, "W", microbatch))

    def no_transfers(self, microbatch=0):
        return []

    def nothing(self, *args, **kwargs):
        return None

    get_fwd_recv_ops = get_fwd_send_ops = get_bwd_recv_ops = get_bwd_send_ops = no_transfers
    _get_init_p2p_neighbors_ops = no_transfers
    _prepare_forward_infra = _prepare_backward_infra = perform_reduce_grad = nothing
    set_local_fwd_input = set_local_bwd_input = get_local_bwd_output = nothing


def torch_schedule(name, num_ranks, num_microbatches, stages_per_rank, rank=0, record=None):
    placement = stages_of_ranks(name, num_ranks, stages_per_rank)
    num_stages = sum(map(len, placement))
    stages = [RecordingStage(index, num_stages, num_ranks, rank, record) for index in placement[rank]]
    part = stages[0] if name in SINGLE else stages
    return SCHEDULES[name](part, num_microbatches, loss_fn=lambda output, target: output, scale_grads=False)


def executed(name, num_ranks, num_microbatches, stages_per_rank=2):
    """The orders in which torch calls the stages of each rank."""
    orders = []
    for rank in range(num_ranks):
        record = []
        schedule = torch_schedule(name, num_ranks, num_microbatches, stages_per_rank, rank, record)
        none = [None] * num_microbatches
        schedule._step_microbatches([()] * num_microbatches, [{}] * num_microbatches, none, return_outputs=False)
        orders.append(tuple(record))
    return tuple(orders)


def listed(name, num_ranks, num_microbatches, stages_per_rank=2):
    """The lists that torch's runtime goes through, one for each rank, with transfers."""
    lists = torch_schedule(name, num_ranks, num_microbatches, stages_per_rank).pipeline_order_with_comms
    return tuple(
        tuple(
            Action(part.stage_index, part.computation_type.value, part.microbatch_index)
            for action in lists[rank]
            for part in action.sub_actions or (action,)
            if part.microbatch_index is not None  # else it is about parameters: gather, free, reduce
        )
        for rank in range(num_ranks)
    )


def computed(orders):
    return tuple(tuple(action for action in order if action.is_compute) for order in orders)


def of_torch(name, num_ranks, num_microbatches, stages_per_rank=2):
    if name in SINGLE:
        return executed(name, num_ranks, num_microbatches)
    return computed(listed(name, num_ranks, num_microbatches, stages_per_rank))


def assert_same_orders(schedule, expected):
    """`==` on them would do, but pytest takes minutes to print how thousands of actions differ."""
    assert schedule.num_ranks == len(expected)
    for rank, (order, other) in enumerate(zip(schedule.orders, expected, strict=True)):
        is_same = order == other
        assert is_same, f"rank {rank}: {' '.join(map(str, order))}, and torch: {' '.join(map(str, other))}"


@pytest.mark.parametrize("num_ranks", range(1, 9))
@pytest.mark.parametrize("name", SCHEDULES)
def test_orders_are_torch_s_and_it_takes_the_same_numbers_of_microbatches(name, num_ranks):
    num_taken = 0
    for num_microbatches in range(1, 33):
        try:
            expected = of_torch(name, num_ranks, num_microbatches)
        except ValueError:
            with pytest.raises(ConfigError, match="the nearest that work"):
                make_schedule(name, num_ranks, num_microbatches)
            continue
        assert_same_orders(make_schedule(name, num_ranks, num_microbatches), expected)
        num_taken += 1
    assert num_taken >= 8


@pytest.mark.parametrize("num_ranks", range(2, 9))
@pytest.mark.parametrize("stages_per_rank", [1, 3])
@pytest.mark.parametrize("name", LOOPED)
def test_orders_are_torch_s_with_other_numbers_of_stages_per_rank(name, stages_per_rank, num_ranks):
    for num_microbatches in (1, num_ranks - 1, num_ranks + 1, 2 * num_ranks, 2 * num_ranks + 2, 4 * num_ranks):
        if takes(name, num_ranks, num_microbatches):
            schedule = make_schedule(name, num_ranks, num_microbatches, stages_per_rank=stages_per_rank)
            assert schedule.num_stages == num_ranks * stages_per_rank
            assert_same_orders(schedule, of_torch(name, num_ranks, num_microbatches, stages_per_rank))


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("name", MULTI)
def test_what_torch_lists_it_executes_one_action_after_the_other(name, num_ranks):
    for num_microbatches in (2 * num_ranks, 4 * num_ranks):
        schedule = make_schedule(name, num_ranks, num_microbatches)
        assert_same_orders(schedule, computed(listed(name, num_ranks, num_microbatches)))
        assert_same_orders(schedule, executed(name, num_ranks, num_microbatches))


def test_an_unknown_schedule_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"parallel\.schedule = 'zvb': .*did you mean 'zbv'"):
        make_schedule("zvb", 2, 4)


@st.composite
def schedules(draw, names=tuple(SCHEDULES), min_ranks=1):
    name, num_ranks = draw(st.sampled_from(names)), draw(st.integers(min_ranks, 10))
    taken = [n for n in range(1, 41) if takes(name, num_ranks, n)]
    return make_schedule(name, num_ranks, draw(st.sampled_from(taken)), stages_per_rank=draw(st.integers(1, 3)))


@settings(deadline=None, max_examples=60)
@given(schedules())
def test_every_schedule_passes_the_checks_with_and_without_transfers(schedule):
    check(schedule)
    check_transfers(schedule, with_transfers(schedule))


@settings(deadline=None, max_examples=30)
@given(schedules())
def test_any_two_ranks_have_their_transfers_in_the_same_order(schedule):
    orders = with_transfers(schedule)
    between = {}  # (rank, other rank): (kind, the sending stage, microbatch) of their transfers in the rank's order
    for rank, order in enumerate(orders):
        for stage, kind, microbatch in order:
            if len(kind) == 1:
                continue
            other = stage + (1 if kind in ("SEND_F", "RECV_B") else -1)
            sender = stage if kind.startswith("SEND") else other
            between.setdefault((rank, schedule.ranks[other]), []).append((kind[-1], sender, microbatch))
    for rank, other in combinations(range(schedule.num_ranks), 2):
        assert between.get((rank, other)) == between.get((other, rank))
    apart = sum(one != other for one, other in zip(schedule.ranks, schedule.ranks[1:], strict=False))
    assert sum(map(len, between.values())) == 4 * apart * schedule.num_microbatches
    assert not [ranks for ranks in between if ranks[0] == ranks[1]], "a rank sends itself nothing"


@pytest.mark.parametrize("name", MULTI)
def test_torch_s_own_lists_with_transfers_pass(name):
    check_transfers(make_schedule(name, 4, 8), listed(name, 4, 8))


def test_transfers_of_partial_microbatches_go_as_far_as_their_work():
    """Beside two regular microbatches on three stages, 2 turns back at stage 1, and 3 ends on the last stage."""
    schedule = replace(
        make_schedule("gpipe", 3, 2),
        orders=orders("0F0 0F1 0F2 0F3 0B0 0B1 0B2", "1F0 1F1 1F2 1F3 1B2 1B0 1B1", "2F0 2F1 2F3 2B0 2B1 2B3"),
        extras=(Work(2, 2, 0, 2), Work(3, 3, 2, 3)),
    )
    check(schedule)
    found = with_transfers(schedule)
    check_transfers(schedule, found)
    partial = [[str(a) for a in order if a.microbatch >= 2 and not a.is_compute] for order in found]
    assert partial == [
        ["0SEND_F2", "0SEND_F3", "0RECV_B2"],
        ["1RECV_F2", "1RECV_F3", "1SEND_F3", "1SEND_B2"],
        ["2RECV_F3"],
    ]
    assert peak_in_flight(schedule) == (3, 3, 3), "3 is held on the last stage only"


def orders(*texts):
    return tuple(tuple(map(Action.parse, text.split())) for text in texts)


def edited(schedule, rank, order):
    return replace(schedule, orders=(*schedule.orders[:rank], tuple(order), *schedule.orders[rank + 1 :]))


@settings(deadline=None, max_examples=40)
@given(schedules(), st.data())
def test_a_missing_or_repeated_action_is_found(schedule, data):
    rank = data.draw(st.integers(0, schedule.num_ranks - 1))
    order = schedule.orders[rank]
    at = data.draw(st.integers(0, len(order) - 1))
    with pytest.raises(ScheduleError, match=f"rank {rank}: {order[at]} is missing"):
        check(edited(schedule, rank, order[:at] + order[at + 1 :]))
    with pytest.raises(ScheduleError, match=f"rank {rank}: {order[at]} is there twice"):
        check(edited(schedule, rank, (*order, order[at])))


@settings(deadline=None, max_examples=40)
@given(schedules(min_ranks=2), st.data())
def test_an_action_on_another_rank_than_its_stage_is_found(schedule, data):
    rank = data.draw(st.integers(0, schedule.num_ranks - 1))
    other = (rank + 1) % schedule.num_ranks
    action = data.draw(st.sampled_from(schedule.orders[rank]))
    moved = edited(schedule, rank, [a for a in schedule.orders[rank] if a != action])
    moved = edited(moved, other, (action, *schedule.orders[other]))
    with pytest.raises(ScheduleError, match=f"rank {other}: {action} belongs on rank {rank}"):
        check(moved)


@settings(deadline=None, max_examples=40)
@given(schedules(), st.data())
def test_an_action_before_what_it_needs_on_its_rank_is_found(schedule, data):
    rank = data.draw(st.integers(0, schedule.num_ranks - 1))
    order = schedule.orders[rank]
    action = data.draw(st.sampled_from([a for a in order if a.kind != "F"]))
    need = Action(action.stage, "I" if action.kind == "W" else "F", action.microbatch)
    others = [a for a in order if a != action]
    at = others.index(need)
    with pytest.raises(ScheduleError, match=f"rank {rank}: {action} stands before {need}, which it needs"):
        check(edited(schedule, rank, [*others[:at], action, *others[at:]]))


def test_ranks_that_wait_for_each_other_are_named_with_what_they_wait_for():
    """Rank 0 wants the backward of 0 before it does 1 at all, rank 1 the forward of 1 before any backward."""
    schedule = Schedule(
        name="stuck",
        ranks=(0, 1),
        num_microbatches=2,
        orders=orders("0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"),
    )
    for find in (check, with_transfers):
        with pytest.raises(ScheduleError, match="each other: rank 0 before 0B0 for 1B0; rank 1 before 1F1 for 0F1"):
            find(schedule)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"orders": orders("0F0 0B0", "1F0 1I0 1W0 1B0")}, "rank 1: no microbatch calls for 1B0"),
        ({"orders": orders("0F0 0B0 0F1", "1F0 1B0")}, "rank 0: no microbatch calls for 0F1"),
        ({"orders": orders("0F0 0SEND_F0 0B0", "1F0 1B0")}, "rank 0: no microbatch calls for 0SEND_F0"),
        ({"extras": (Work(2, 1, 0, 1),)}, "extra microbatch 2: its number should be the next one, 1"),
        ({"extras": (Work(1, 1, 0, 2),)}, "its backward must lie within its forward"),
        ({"extras": (Work(1, 3, 0, 2),)}, "and that within the stages"),
    ],
)
def test_what_no_microbatch_calls_for_is_found(changes, message):
    schedule = make_schedule("gpipe", 2, 1)
    check(schedule)
    with pytest.raises(ScheduleError, match=message):
        check(replace(schedule, **changes))


TRANSFERS = "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1", "1RECV_F0 1F0 1RECV_F1 1F1 1B0 1SEND_B0 1B1 1SEND_B1"


@pytest.mark.parametrize(
    ("rank", "old", "new", "message"),
    [
        (0, "0SEND_F1 ", "", "rank 0: 0SEND_F1 is missing"),
        (1, "1SEND_B1", "1SEND_B1 1SEND_B1", "rank 1: 1SEND_B1 is there twice"),
        (0, "0B1", "0B1 0SEND_B1", "rank 0: no microbatch calls for 0SEND_B1"),
        (0, "0F0 0SEND_F0", "0F0 1RECV_F0 0SEND_F0", "rank 0: 1RECV_F0 belongs on rank 1"),
        (1, "1B0 1SEND_B0", "1SEND_B0 1B0", "rank 1: 1SEND_B0 stands before 1B0"),
        (1, "1RECV_F1 1F1", "1F1 1RECV_F1", "rank 1: 1F1 stands before 1RECV_F1"),
        (1, "1RECV_F0 1F0 1RECV_F1", "1RECV_F1 1RECV_F0 1F0", "wait .*: rank 0 at 0SEND_F0; rank 1 at 1RECV_F1"),
        (0, "0RECV_B0 0B0 0RECV_B1", "0RECV_B1 0RECV_B0 0B0", "wait .*: rank 0 at 0RECV_B1; rank 1 at 1SEND_B0"),
        (1, "1B0 1SEND_B0 1B1", "1B1 1B0 1SEND_B0", "rank 1: computes in another order"),
    ],
)
def test_transfers_that_do_not_fit_are_found(rank, old, new, message):
    schedule = make_schedule("gpipe", 2, 2)
    check_transfers(schedule, orders(*TRANSFERS))
    texts = list(TRANSFERS)
    assert old in texts[rank]
    texts[rank] = texts[rank].replace(old, new)
    with pytest.raises(ScheduleError, match=message):
        check_transfers(schedule, orders(*texts))


def test_a_ring_of_ranks_that_all_send_before_they_receive_is_found():
    """Each receive just before its use: rank 0 is still at its sends to 1, 1 at its to 2, and 2 at its to 0."""
    schedule = make_schedule("looped_bfs", 3, 3)
    late = []
    for order in with_transfers(schedule):
        used_by = {Action(a.stage, f"RECV_{'F' if a.kind == 'F' else 'B'}", a.microbatch): a for a in order}
        receive_of = {used_by[a]: a for a in order if a.kind.startswith("RECV")}
        rest = [a for a in order if not a.kind.startswith("RECV")]
        late.append(tuple(b for a in rest for b in ((receive_of[a], a) if a in receive_of else (a,))))
    with pytest.raises(ScheduleError, match="rank 0 at 0SEND_F2; rank 1 at 1SEND_F1; rank 2 at 2SEND_F0"):
        check_transfers(schedule, late)


def expected_peak(name, P, M, stages):
    """Activations held by each of P ranks for M microbatches, a multiple of P, as the schedules' papers have them."""
    return {
        "gpipe": [M] * P,
        "1f1b": [P - rank for rank in range(P)],
        "interleaved_1f1b": [(stages - 1) * P + 2 * (P - 1 - rank) + 1 for rank in range(P)],
        "looped_bfs": [stages * M] * P,
        "interleaved_zero_bubble": [stages * P] * P,
        "zbv": [2 * P] * P,
        "dualpipev": [2 * P + 1] * P,
    }[name]


@pytest.mark.parametrize("stages_per_rank", [2, 3])
@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_peak_in_flight_is_what_the_papers_say(name, num_ranks, stages_per_rank):
    for num_microbatches in (3 * num_ranks, 5 * num_ranks):
        schedule = make_schedule(name, num_ranks, num_microbatches, stages_per_rank=stages_per_rank)
        expected = expected_peak(name, num_ranks, num_microbatches, stages_per_rank)
        assert list(peak_in_flight(schedule)) == expected


def idle(schedule):
    """(idle time of each rank, that part of it between its first and its last action); F, I and W take 1, B takes 2."""
    takes_time = {"F": 1, "B": 2, "I": 1, "W": 1}
    end, first, free = {}, {}, [0] * schedule.num_ranks
    to_do = [list(reversed(order)) for order in schedule.orders]
    while any(to_do):
        for rank, rest in enumerate(to_do):
            while rest:
                action = rest[-1]
                above = Action(action.stage + 1, "I", action.microbatch)
                is_apart = any(above in order for order in schedule.orders) if action.kind in ("B", "I") else False
                needed = needs(action, schedule.works[action.microbatch], is_apart)
                if not all(need in end for need in needed):
                    break
                start = max([free[rank], *(end[need] for need in needed)])
                first.setdefault(rank, start)
                free[rank] = end[action] = start + takes_time[action.kind]
                rest.pop()
    busy = [sum(takes_time[action.kind] for action in order) for order in schedule.orders]
    inside = [free[rank] - first[rank] - busy[rank] for rank in range(schedule.num_ranks)]
    return [max(free) - time for time in busy], inside


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_idle_time_is_what_the_docstrings_say(name, num_ranks):
    total, inside = idle(make_schedule(name, num_ranks, 4 * num_ranks))
    is_split = name in ("interleaved_zero_bubble", "zbv", "dualpipev")
    assert total == [(1 if is_split else 3) * (num_ranks - 1)] * num_ranks
    if name == "zbv":
        assert inside == [0] * num_ranks


def test_64_ranks_and_1024_microbatches_are_no_trouble():
    """A second; a look through all actions for each of the 131,072 would take hours."""
    schedule = make_schedule("1f1b", 64, 1024)
    check(schedule)
    assert max(peak_in_flight(schedule)) == 64
    assert sum(map(len, with_transfers(schedule))) == (64 * 2 + 63 * 4) * 1024
