"""Decoding speeds on paper, against one that plays every token and every event, and against what must hold."""

import heapq
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eellm.config.model import ExitConfig, ModelConfig
from eellm.errors import ConfigError
from eellm.plan.decode import (
    ExitDistribution,
    PipelineStep,
    decode_speeds,
    draw_exits,
    full_step_s,
    passes_of_batch,
    pipeline_entries,
    rows_of_sequence,
)
from eellm.plan.decode_cost import DecodeCosts, DecodeOverheads, PartCost, decode_costs
from eellm.plan.hardware import find_hardware
from eellm.schedule.partition import partition

PLAIN_LAUNCHES = DecodeOverheads(layer_s=200e-6, head_s=40e-6, check_s=40e-6, step_s=300e-6)
NOTHING = PartCost()
EARLY_HEAVY = (0.6, 0.2, 0.2)


def paper_model(size):
    num_layers, hidden, inner, layers, head = {
        "1.3B": (24, 2048, 5504, (6, 12), "tied"),
        "7B": (32, 4096, 11008, (8, 16), "own"),
    }[size]
    exits = tuple(ExitConfig(layer=layer, head=head) for layer in layers)
    return ModelConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=num_layers,
        num_heads=32,
        exits=exits,
        tie_embeddings=head == "tied",
    )


def paper_speeds(size, shares, *, num_stages=1, tp=1, batch_size=1, **options):
    model = paper_model(size)
    costs = decode_costs(model, find_hardware("a100-40"), num_stages=num_stages, tp=tp, **options)
    exits = ExitDistribution(shares=dict(zip((*model.exit_layers, model.num_layers), shares, strict=True)))
    return decode_speeds(costs, exits, batch_size=batch_size, generator=np.random.default_rng(5))


def costs_of(num_layers, num_stages, exits, *, layer=None, head=NOTHING, hop=NOTHING, step_s=0.0):
    """A model of equal layers, each reading for a second where nothing else is said."""
    return DecodeCosts(
        stages=partition(num_layers, num_stages, exits),
        layers=(layer or PartCost(read_s=1.0),) * num_layers,
        final_head=head,
        exits=dict.fromkeys(exits, head),
        hop=hop,
        step_s=step_s,
    )


def speeds(costs, shares, **options):
    return decode_speeds(costs, ExitDistribution(shares=shares), generator=np.random.default_rng(3), **options)


@st.composite
def cases(draw, *, even=False):
    """(costs, shares). even: equal stages without hops, and exits at their ends only."""
    num_stages, per_stage = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    num_layers = num_stages * per_stage + (0 if even else draw(st.integers(0, 3)))
    places = range(per_stage, num_layers, per_stage) if even else range(1, num_layers)
    exits = tuple(sorted(draw(st.sets(st.sampled_from(places), max_size=4)))) if places else ()
    part = st.builds(PartCost, read_s=st.floats(0.1, 3), row_s=st.floats(0, 0.5), overhead_s=st.floats(0, 0.3))
    costs = costs_of(
        num_layers,
        num_stages,
        exits,
        layer=draw(part),
        head=draw(part),
        hop=NOTHING if even else PartCost(overhead_s=draw(st.floats(0, 1))),
        step_s=draw(st.floats(0, 1)),
    )
    weights = draw(st.lists(st.integers(0, 9), min_size=len(exits) + 1, max_size=len(exits) + 1))
    weights[draw(st.integers(0, len(exits)))] += 1
    return costs, {layer: w / sum(weights) for layer, w in zip((*exits, num_layers), weights, strict=True)}


def play_deferred_rows(stops, answers, max_deferred):
    """Rows that each pass takes through each segment, token by token: a list of who waits where."""
    waiting, passes = dict.fromkeys(stops, 0), []
    for answer in answers:
        rows, is_over, taken = 1, False, []
        for stop in stops:
            taken.append(0 if is_over else rows)
            if not is_over and stop >= answer and stop != stops[-1] and sum(waiting.values()) + rows <= max_deferred:
                waiting[stop] += rows
                is_over = True
            elif not is_over:
                rows, waiting[stop] = rows + waiting[stop], 0
        passes.append(taken)
    return np.array(passes)


def stationary_rows(shares, max_deferred):
    """For each segment, how likely 0, 1, … rows pass: the long run of the chain over who waits where."""
    stops = tuple(range(len(shares)))
    states, moves = [(0,) * (len(shares) - 1)], {}
    for state in states:
        for answer in stops:
            left, rows, is_over, taken = list(state), 1, False, []
            for stop in stops:
                taken.append(0 if is_over else rows)
                if is_over or stop == stops[-1]:
                    continue
                if stop >= answer and sum(left) + rows <= max_deferred:
                    left[stop] += rows
                    is_over = True
                else:
                    rows, left[stop] = rows + left[stop], 0
            moves[state, answer] = tuple(left), taken
            if tuple(left) not in states:
                states.append(tuple(left))
    chain = np.zeros((len(states), len(states)))
    for (state, answer), (after, _) in moves.items():
        chain[states.index(state), states.index(after)] += shares[answer]
    system = np.vstack([chain.T - np.eye(len(states)), np.ones(len(states))])
    long_run = np.linalg.lstsq(system, np.array([0.0] * len(states) + [1.0]), rcond=None)[0]
    found = np.zeros((len(shares), max_deferred + 2))
    for (state, answer), (_, taken) in moves.items():
        for segment, rows in enumerate(taken):
            found[segment, rows] += long_run[states.index(state)] * shares[answer]
    return found


@pytest.mark.parametrize("max_deferred", [1, 2, 5])
@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.3, 0.3, 0.4), (0.1, 0.5, 0.15, 0.25), (0.6, 0.39, 0.01)])
def test_rows_that_pass_are_those_of_the_chain_over_who_waits_where(shares, max_deferred):
    expected = stationary_rows(shares, max_deferred)
    for segment in range(len(shares)):
        found = rows_of_sequence(sum(shares[:segment]), shares[-1], max_deferred)
        assert found == pytest.approx(expected[segment], abs=1e-9)


@pytest.mark.parametrize("shares", [(0.3, 0.2, 0.5), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (0.55, 0.45, 0.0)])
def test_recomputation_takes_the_time_of_its_passes_one_by_one(shares):
    """With everything at once: a limit by compute from three rows on, heads, hops at an exit and between two."""
    layer, head = PartCost(read_s=2.0, row_s=0.7, message_s=0.1, overhead_s=0.3), PartCost(read_s=1.0, overhead_s=0.2)
    hop = PartCost(message_s=0.05, overhead_s=0.4)
    costs = costs_of(9, 3, (3, 5), layer=layer, head=head, hop=hop, step_s=0.6)
    stops, lengths = (3, 5, 9), (3, 2, 4)
    answers = np.random.default_rng(1).choice(stops, size=60_000, p=shares)
    rows = play_deferred_rows(stops, answers, max_deferred=4)
    total = 0.6 * len(answers)
    for segment, (stop, length) in enumerate(zip(stops, lengths, strict=True)):
        some = rows[rows[:, segment] > 0, segment]
        total += length * layer.seconds(some, np.ones(len(some))).sum()
        total += 1.2 * (answers >= stop).sum()
        num_hops = (0, 1, 1)[segment]  # behind layers 3 and 6
        total += num_hops * hop.seconds(some, np.ones(len(some))).sum() + 0.4 * len(some) * (segment == 1)
    found = speeds(costs, dict(zip(stops, shares, strict=True)), max_deferred=4)["recomputation"]
    assert found.step_s == pytest.approx(total / len(answers), rel=0.005)


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 30))
def test_every_row_passes_every_segment_once_and_no_more_wait_than_may(before, share, max_deferred):
    final = (1 - before) * share
    found = rows_of_sequence(before, final, max_deferred)
    assert len(found) == max_deferred + 2
    assert found.sum() == pytest.approx(1)
    assert found @ np.arange(len(found)) == pytest.approx(1)


def test_a_cap_forces_a_full_pass_and_a_higher_one_forces_fewer():
    costs = costs_of(8, 1, (2,))
    found = [speeds(costs, {2: 1.0}, max_deferred=cap)["recomputation"].step_s for cap in (1, 2, 5, 1000)]
    assert found == pytest.approx([2 + 6 / 2, 2 + 6 / 3, 2 + 6 / 6, 2 + 6 / 1001])


def test_a_batch_s_rows_are_those_of_its_sequences_together():
    rows = np.array([0.2, 0.5, 0.0, 0.3])
    part = PartCost(read_s=3.0, cache_s=0.4, row_s=0.8, overhead_s=0.1)
    expected = 0.0
    for case in product(range(4), repeat=3):
        if sum(case):
            seconds = part.seconds(np.array(sum(case)), np.array(sum(n > 0 for n in case)))
            expected += float(np.prod(rows[list(case)]) * seconds)
    found = passes_of_batch(rows, 3)
    assert found.seconds(part) == pytest.approx(expected)
    assert found.passing == pytest.approx(1 - 0.2**3)


def play_pipeline(steps, *, hop_s, back_s, between_s):
    """The same by events: stages that are free or busy, messages on their way, permits to enter."""
    num_stages, num_steps = len(steps[0].works_s), len(steps)
    clock, events, count = 0.0, [], 0
    queues, is_busy = [[] for _ in range(num_stages)], [False] * num_stages
    entries, permits, may_enter = [], num_stages, {0}

    def at(time, *event):
        nonlocal count
        count += 1
        heapq.heappush(events, (time, count, event))

    def go_on():
        nonlocal permits
        step = len(entries)
        if step < num_steps and step in may_enter and permits and not is_busy[0] and not queues[0]:
            permits -= 1
            entries.append(clock)
            queues[0].append(step)
        for stage in range(num_stages):
            if queues[stage] and not is_busy[stage]:
                step, is_busy[stage] = queues[stage].pop(0), True
                if steps[step].stage == stage:
                    at(clock + steps[step].answer_s, "answer", stage, step)
                at(clock + steps[step].works_s[stage], "done", stage, step)

    go_on()
    while events:
        clock = events[0][0]
        while events and events[0][0] == clock:
            _, _, (kind, stage, step) = heapq.heappop(events)
            if kind == "answer":
                at(clock + between_s + (back_s if stage > 0 else 0.0), "token", 0, step + 1)
            elif kind == "token":
                may_enter.add(step)
            elif kind == "arrival":
                queues[stage].append(step)
            elif kind == "permit":
                permits += 1
            else:
                is_busy[stage] = False
                if stage + 1 < num_stages:
                    at(clock + hop_s, "arrival", stage + 1, step)
                else:
                    at(clock + (back_s if num_stages > 1 else 0.0), "permit", 0, step)
        go_on()
    return entries


@st.composite
def pipelines(draw):
    num_stages = draw(st.integers(1, 5))
    seconds = st.floats(0.01, 4)
    steps = []
    for _ in range(draw(st.integers(1, 25))):
        works = draw(st.lists(seconds, min_size=num_stages, max_size=num_stages))
        stage = draw(st.integers(0, num_stages - 1))
        steps.append(PipelineStep(works_s=works, stage=stage, answer_s=works[stage] * draw(st.floats(0.1, 1))))
    times = {name: draw(st.floats(0, 2)) for name in ("hop_s", "back_s", "between_s")}
    return steps, times


@settings(max_examples=150, deadline=None)
@given(pipelines())
def test_the_pipeline_s_recurrence_is_that_of_the_events(case):
    steps, times = case
    entries = pipeline_entries(steps, **times)
    assert entries[:-1] == pytest.approx(play_pipeline(steps, **times))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_pipelined_step_goes_up_to_the_last_of_the_batch_s_exits_and_tests_no_more_heads(batch_size):
    head, hop = PartCost(overhead_s=0.25, message_s=0.5), PartCost(overhead_s=0.125)
    costs = costs_of(12, 4, (5,), head=head, hop=hop, step_s=3)  # so slow between steps that none waits
    shares, stops = {5: 0.75, 12: 0.25}, (5, 12)
    answers = draw_exits(ExitDistribution(shares=shares), stops, 200, np.random.default_rng(3)).reshape(-1, batch_size)
    both = 0.25 + 0.5 * batch_size
    early = 3 + 5 + both + 2 * 0.125
    total = 0.0
    for num_late in answers.sum(1):
        total += early if num_late == 0 else 3 + 12 + both + (0.25 + 0.5 * num_late) + 4 * 0.125
    found = speeds(costs, shares, batch_size=batch_size, num_steps=len(answers))["pipelined"]
    assert found.step_s == pytest.approx(total / len(answers))
    assert found.tokens_per_s == pytest.approx(batch_size / found.step_s)


def test_no_more_steps_are_in_flight_than_there_are_stages():
    steps = [PipelineStep(works_s=(1, 1, 9), stage=0, answer_s=1)] * 20  # answers come far faster than the end is free
    entries = pipeline_entries(steps, hop_s=0, back_s=0, between_s=0)
    ends = [11 + 9 * n for n in range(20)]
    assert max(sum(start <= at < end for start, end in zip(entries, ends, strict=False)) for at in entries[:-1]) == 3
    assert [b - a for a, b in pairwise(entries[5:])] == [9] * 15  # so the slowest stage sets the pace


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(("num_stages", "tp"), [(1, 1), (4, 1), (1, 4), (3, 2)])
@pytest.mark.parametrize("size", ["1.3B", "7B"])
def test_where_all_tokens_leave_at_the_end_a_step_is_full_depth_and_the_checks(size, num_stages, tp, batch_size):
    costs = decode_costs(paper_model(size), find_hardware("a100-40"), num_stages=num_stages, tp=tp)
    found = paper_speeds(size, (0, 0, 1), num_stages=num_stages, tp=tp, batch_size=batch_size)
    checks = sum(float(part.seconds(np.array(batch_size), np.array(batch_size))) for part in costs.exits.values())
    for method in ("recomputation", "pipelined"):
        assert found[method].step_s == pytest.approx(found["full"].step_s + checks, rel=1e-9)


@pytest.mark.parametrize("exit", [1, 3, 6, 12])
def test_where_all_tokens_leave_at_one_layer_only_the_layers_up_to_it_count(exit):
    costs = costs_of(24, 24, (exit,))  # no heads, no hops, and a stage for each layer
    found = speeds(costs, {exit: 1.0, 24: 0.0}, max_deferred=100_000)
    assert found["pipelined"].speedup == pytest.approx(24 / exit)
    assert found["recomputation"].speedup == pytest.approx(24 / exit, rel=1e-3)


@settings(max_examples=40, deadline=None)
@given(cases(), st.integers(1, 4))
def test_neither_method_takes_longer_than_full_depth_and_the_checks(case, batch_size):
    costs, shares = case
    found = speeds(costs, shares, batch_size=batch_size, num_steps=300)
    everyone = np.array(batch_size)
    checks = sum(float(costs.exits[layer].seconds(everyone, everyone)) for layer in shares if layer in costs.exits)
    assert found["pipelined"].step_s <= (found["full"].step_s + checks) * (1 + 1e-9)
    if batch_size == 1:  # the rows of several that happen to come together may be too many to read for
        assert found["recomputation"].step_s <= (found["full"].step_s + checks) * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(cases(), st.data())
def test_tokens_that_leave_earlier_make_no_method_slower(case, data):
    costs, shares = case
    layers = sorted(shares)
    if len(layers) < 2:
        return
    late = data.draw(st.integers(1, len(layers) - 1))
    early = data.draw(st.integers(0, late - 1))
    moved = shares[layers[late]] * data.draw(st.floats(0, 1))
    changed = shares | {layers[early]: shares[layers[early]] + moved, layers[late]: shares[layers[late]] - moved}
    before, after = (speeds(costs, each, num_steps=1000) for each in (shares, changed))
    if late < len(layers) - 1:  # who no longer goes to the end lets rows pile up until they are forced: see below
        assert after["recomputation"].step_s <= before["recomputation"].step_s * (1 + 1e-9)
    assert after["pipelined"].step_s <= before["pipelined"].step_s * 1.01  # up to where the time begins and ends


def test_fewer_tokens_that_go_to_the_end_can_cost_more_where_rows_are_forced():
    passes = []
    for shares in ((0.8, 0.0, 0.2), (0.8, 0.19, 0.01)):  # they leave behind the second segment instead
        found = rows_of_sequence(shares[0], shares[-1], 5)
        assert found == pytest.approx(stationary_rows(shares, 5)[1], abs=1e-9), "the chain says so too"
        passes.append(found[1:].sum())
    assert passes[1] > passes[0] * 1.1, "forced rows go through the second segment, whose exit they had left before"


@settings(max_examples=40, deadline=None)
@given(cases(even=True))
def test_with_exits_at_the_ends_of_equal_stages_the_pipeline_is_never_slower_than_recomputation(case):
    costs, shares = case
    if len(costs.stages) > 1:
        found = speeds(costs, shares)
        assert found["pipelined"].step_s <= found["recomputation"].step_s * 1.005


def test_an_exit_in_the_middle_of_a_stage_makes_the_pipeline_wait_for_the_stage():
    found = speeds(costs_of(24, 4, (2,)), {2: 1.0})
    assert found["pipelined"].step_s == pytest.approx(6)
    assert found["recomputation"].step_s == pytest.approx(2 + 22 / 17)


@pytest.mark.parametrize("overheads", [DecodeOverheads(), PLAIN_LAUNCHES], ids=["graphs", "launches"])
@pytest.mark.parametrize("shares", [(0.2, 0.2, 0.6), EARLY_HEAVY, (0.8, 0.1, 0.1)])
@pytest.mark.parametrize("size", ["1.3B", "7B"])
def test_the_paper_s_order_on_four_gpus(size, shares, overheads):
    """The pipeline beats recomputation on as many devices per stage; recomputation with TP 4 beats the pipeline."""
    pipeline = paper_speeds(size, shares, num_stages=4, overheads=overheads)
    tensor = paper_speeds(size, shares, tp=4, overheads=overheads)
    assert pipeline["pipelined"].step_s <= pipeline["recomputation"].step_s * 1.001
    assert tensor["recomputation"].tokens_per_s > 1.1 * pipeline["pipelined"].tokens_per_s


@pytest.mark.parametrize("size", ["1.3B", "7B"])
def test_most_tokens_leaving_at_a_quarter_make_the_paper_s_two_times_and_more(size):
    speedup = paper_speeds(size, (0.7, 0.2, 0.1), num_stages=4)["pipelined"].speedup
    assert 2.1 < speedup < 3
    assert 3.2 < paper_speeds(size, (1, 0, 0), num_stages=4)["pipelined"].speedup < 4


def test_full_depth_reads_the_weights_at_the_memory_s_bandwidth():
    nothing = DecodeOverheads(read_efficiency=1.0, layer_s=0, head_s=0, check_s=0, step_s=0)
    num_weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32000
    cache = 32 * 2 * 4096 * 1000
    found = paper_speeds("7B", EARLY_HEAVY, overheads=nothing, context=1000)["full"]
    assert found.step_s == pytest.approx(2 * (num_weights + cache) / 1.555e12)
    assert found.tokens_per_s == pytest.approx(1 / found.step_s)


def test_a_large_batch_is_limited_by_products_and_not_by_reading():
    nothing = DecodeOverheads(layer_s=0, head_s=0, check_s=0, step_s=0)
    hardware = find_hardware("a100-40")
    costs = decode_costs(paper_model("7B"), hardware, context=1, overheads=nothing)
    num_weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32000
    a_row = 2 * num_weights / hardware.flops_per_s("bfloat16")
    assert full_step_s(costs, 1024) == pytest.approx(1024 * a_row, rel=0.001)


@pytest.mark.parametrize(("context", "sizes"), [(1, (1, 2, 4, 8, 16, 32)), (1024, (1, 2, 4, 8))])
def test_a_larger_batch_leaves_less_to_gain(context, sizes):
    found = [paper_speeds("7B", EARLY_HEAVY, context=context, batch_size=size) for size in sizes]
    gains = [each["recomputation"].speedup for each in found]
    assert gains == sorted(gains, reverse=True)
    assert gains[0] > 2 > 1.3 > gains[-1]


def test_rows_that_waited_together_read_their_sequence_s_keys_and_values_once():
    """So recomputation gains again where these, and not the weights, are most of what is read."""
    gains = [paper_speeds("7B", EARLY_HEAVY, batch_size=size)["recomputation"].speedup for size in (8, 16, 32)]
    assert gains == sorted(gains)
    costs = costs_of(8, 1, (2,), layer=PartCost(cache_s=1.0))
    assert speeds(costs, {2: 1.0}, batch_size=4)["recomputation"].step_s == pytest.approx(4 * (2 + 6 / 17))


def test_tensor_parallelism_divides_reading_and_adds_messages():
    model, hardware = paper_model("7B"), find_hardware("a100-40")
    one, four = (decode_costs(model, hardware, tp=tp) for tp in (1, 4))
    assert four.layers[0].read_s == pytest.approx(one.layers[0].read_s / 4)
    assert four.final_head.read_s == pytest.approx(one.final_head.read_s / 4)
    assert four.layers[0].cache_s == pytest.approx(one.layers[0].cache_s / 4)
    assert four.layers[0].overhead_s == pytest.approx(one.layers[0].overhead_s + 4 * hardware.node_link.latency_s)
    assert four.layers[0].row_s == pytest.approx(one.layers[0].row_s / 4)
    assert four.layers[0].message_s == pytest.approx(2 * (2 * 3 / 4) * 4096 * 2 / hardware.node_link.bytes_per_s)
    assert one.layers[0].message_s == 0
    across_nodes = decode_costs(model, hardware, tp=16)
    assert across_nodes.layers[0].overhead_s > four.layers[0].overhead_s


def test_layers_under_a_window_read_no_more_than_the_window():
    model = ModelConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        sliding_window=128,
        sliding_layers=(2,),
    )
    long, short = (decode_costs(model, find_hardware("cpu"), context=n, dtype="float32") for n in (1024, 128))
    assert long.layers[0].cache_s == pytest.approx(8 * short.layers[0].cache_s)
    assert long.layers[1] == short.layers[1]
    assert short.layers[1].cache_s == pytest.approx(2 * 2 * 16 * 128 * 4 / (10e9 * 0.8))


def test_each_kind_of_exit_costs_its_body_and_its_head():
    kinds = {2: "embed", 4: "norm", 6: "mlp", 8: "layer"}
    exits = tuple(ExitConfig(layer=layer, kind=kind, head="own") for layer, kind in kinds.items())
    costs = decode_costs(paper_model("7B").with_exits(exits), find_hardware("h100"))
    reads = {layer: part.read_s - costs.final_head.read_s for layer, part in costs.exits.items()}
    assert reads[2] == reads[4] == 0
    assert reads[6] / reads[8] == pytest.approx(3 * 11008 / (3 * 11008 + 4 * 4096))
    assert reads[8] == pytest.approx(costs.layers[0].read_s)
    assert costs.exits[4].overhead_s == pytest.approx(costs.final_head.overhead_s + DecodeOverheads().check_s)


def test_a_hop_takes_the_slowest_link_between_the_stages():
    model, hardware = paper_model("7B"), find_hardware("a100-40")
    for num_stages, link in ((8, hardware.node_link), (16, hardware.network_link)):
        hop = decode_costs(model, hardware, num_stages=num_stages).hop
        assert float(hop.seconds(np.array(3), np.array(1))) == pytest.approx(link.seconds(3 * 4096 * 2))


def test_drawn_exits_have_the_shares_asked_for_and_come_from_the_generator():
    exits = ExitDistribution(shares={2: 0.25, 5: 0.5, 9: 0.25})
    first, again, other = (draw_exits(exits, (2, 5, 9), 400, np.random.default_rng(n)) for n in (1, 1, 2))
    assert np.bincount(first).tolist() == [100, 200, 100]
    assert first.tolist() == again.tolist() != other.tolist()


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({2: 0.5, 8: 0.4}, "add up to 0.9"),
        ({2: -0.5, 8: 1.5}, "layer 2 has -0.5"),
        ({2: float("nan"), 8: 1.0}, "layer 2 has nan"),
        ({}, "add up to 0"),
        ({3: 0.5, 8: 0.5}, "no exit at layer 3; it has 2, 8"),
    ],
)
def test_a_distribution_that_cannot_be_is_refused(shares, message):
    with pytest.raises(ConfigError, match=message):
        speeds(costs_of(8, 2, (2,)), shares)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tp": 3}, "tp = 3.*nearest that works is 2"),
        ({"tp": 0}, "tp = 0"),
        ({"context": 0}, "context = 0"),
        ({"num_stages": 33}, "33 stages for 32 layers"),
        ({"dtype": "float8"}, "dtype = 'float8'"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        decode_costs(paper_model("7B"), find_hardware("a100-40"), **options)


@pytest.mark.parametrize("name", ["batch_size", "max_deferred", "num_steps"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(ConfigError, match=f"{name} = 0"):
        speeds(costs_of(8, 2, (2,)), {2: 1.0}, **{name: 0})
