"""Layers and exits become stages, each once, whatever their numbers; what a schedule refuses is told with a way out."""

import re
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eellm.config.parallel import Schedule
from eellm.errors import ConfigError
from eellm.schedule.partition import (
    SINGLE,
    V_SHAPED,
    check_microbatches,
    partition,
    stages_of_ranks,
    takes,
)

SCHEDULES = Schedule.__args__
COSTS = st.floats(0, 20)


@st.composite
def models(draw, max_layers=40):
    """(number of layers, number of stages, exits, final head's cost, exits' costs)."""
    num_layers = draw(st.integers(1, max_layers))
    exits = draw(st.sets(st.integers(1, num_layers - 1))) if num_layers > 1 else set()
    costs = {layer: draw(COSTS) for layer in exits}
    return num_layers, draw(st.integers(1, num_layers)), tuple(sorted(exits)), draw(COSTS), costs


def cost(stage, head_cost, exit_costs):
    return stage.num_layers + sum(exit_costs[layer] for layer in stage.exits) + stage.is_last * head_cost


def stages_of(model, **options):
    num_layers, num_stages, exits, head_cost, exit_costs = model
    return partition(num_layers, num_stages, exits, head_cost=head_cost, exit_costs=exit_costs, **options)


@settings(deadline=None)
@given(models(), st.sampled_from(["stay", "next_stage", "auto"]))
def test_stages_hold_every_layer_and_every_exit_once_and_in_order(model, placement):
    stages = stages_of(model, placement=placement)
    num_layers, num_stages, exits, *_ = model
    assert [stage.index for stage in stages] == list(range(num_stages))
    assert [stage.is_first for stage in stages] == [True] + [False] * (num_stages - 1)
    assert [stage.is_last for stage in stages] == [False] * (num_stages - 1) + [True]
    assert [n for stage in stages for n in range(stage.first, stage.last + 1)] == list(range(1, num_layers + 1))
    assert all(stage.num_layers >= 1 for stage in stages)
    assert [layer for stage in stages for layer in stage.exits] == list(exits)
    assert all(stage.first - 1 <= layer <= stage.last for stage in stages for layer in stage.exits)


@settings(deadline=None)
@given(models())
def test_a_placement_moves_exits_behind_a_stage_s_last_layer_and_no_others(model):
    _, _, exits, head_cost, costs = model
    stay, moved, auto = (stages_of(model, placement=placement) for placement in ("stay", "next_stage", "auto"))
    assert [(s.first, s.last) for s in stay] == [(s.first, s.last) for s in moved] == [(s.first, s.last) for s in auto]
    assert all(stage.first <= layer for stage in stay for layer in stage.exits)
    boundaries = {stage.last for stage in stay[:-1]} & set(exits)
    assert {stage.first - 1 for stage in moved if stage.first - 1 in stage.exits} == boundaries
    for stage in auto:
        if stage.first - 1 in stage.exits:
            giver = auto[stage.index - 1]
            assert cost(stage, head_cost, costs) <= cost(giver, head_cost, costs) + costs[giver.last] + 1e-9
    assert max(cost(s, head_cost, costs) for s in auto) <= max(cost(s, head_cost, costs) for s in stay) + 1e-9


@settings(deadline=None, max_examples=60)
@given(models(max_layers=9))
def test_no_split_has_a_cheaper_costliest_stage(model):
    num_layers, num_stages, _, head_cost, costs = model
    chosen = max(cost(stage, head_cost, costs) for stage in stages_of(model))
    for cuts in combinations(range(1, num_layers), num_stages - 1):
        edges = (0, *cuts, num_layers)
        counts = [end - start for start, end in pairwise(edges)]
        other = stages_of(model, layers_per_stage=counts)
        assert [stage.num_layers for stage in other] == counts
        assert chosen <= max(cost(stage, head_cost, costs) for stage in other) + 1e-9


def test_equal_layers_are_split_evenly_and_a_heavy_head_gets_fewer_beside_it():
    assert [stage.num_layers for stage in partition(8, 4)] == [2, 2, 2, 2]
    assert sorted(stage.num_layers for stage in partition(10, 4)) == [2, 2, 3, 3]
    assert [stage.num_layers for stage in partition(8, 2, head_cost=4)] == [6, 2]
    assert [stage.num_layers for stage in partition(8, 2, (1,), head_cost=2, exit_costs={1: 4})] == [3, 5]


@pytest.mark.parametrize("counts", [(4, 5), (8,), (8, 0), (2, 3, 3)])
def test_numbers_of_layers_that_do_not_add_up_are_refused(counts):
    with pytest.raises(ConfigError, match=r"layers_per_stage = .* must be 2 numbers .* 8 layers") as error:
        partition(8, 2, layers_per_stage=counts)
    assert str(list(counts)) in str(error.value)


def test_more_stages_than_layers_are_refused_with_the_most_that_work():
    with pytest.raises(ConfigError, match="9 stages for 6 layers") as error:
        partition(6, 9)
    most = int(re.search(r"at most (\d+) stages", str(error.value)).group(1))
    assert len(partition(6, most)) == most == 6


@given(st.sampled_from(SCHEDULES), st.integers(2, 8), st.integers(2, 4))
def test_ranks_hold_every_stage_once(schedule, pp, stages_per_rank):
    ranks = stages_of_ranks(schedule, pp, stages_per_rank)
    each = 1 if schedule in SINGLE else 2 if schedule in V_SHAPED else stages_per_rank
    assert [len(stages) for stages in ranks] == [each] * pp
    assert sorted(index for stages in ranks for index in stages) == list(range(pp * each))
    if schedule in V_SHAPED:
        assert ranks[0] == (0, 2 * pp - 1), "the first and the last stage share a rank"
    else:
        assert all(index % pp == rank for rank, stages in enumerate(ranks) for index in stages)


@given(st.sampled_from(SCHEDULES), st.integers(2, 8), st.integers(1, 60), st.none() | st.integers(1, 96))
def test_numbers_of_microbatches_that_a_refusal_names_work(schedule, pp, num_microbatches, num_rows):
    divides = [n for n in range(1, (num_rows or 500) + 1) if num_rows is None or num_rows % n == 0]
    working = [n for n in divides if takes(schedule, pp, n)]
    if takes(schedule, pp, num_microbatches):
        check_microbatches(schedule, pp, num_microbatches, num_rows=num_rows)
        return
    with pytest.raises(ConfigError) as error:
        check_microbatches(schedule, pp, num_microbatches, num_rows=num_rows)
    message, _, named = str(error.value).partition("the nearest that work: ")
    assert message.startswith(f"parallel.num_microbatches = {num_microbatches}: schedule {schedule} with pp = {pp}")
    numbers = [int(n) for n in named.split(" and ") if n]
    assert numbers == sorted(sorted(working, key=lambda n: (abs(n - num_microbatches), n))[:2])
    for n in numbers:
        check_microbatches(schedule, pp, n, num_rows=num_rows)
