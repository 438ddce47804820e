"""Losses, the gradient's norm and every gradient under every layout equal those of one process, in fp64 to 1e-10.

One call of `run_on_ranks` takes many steps: processes are started once for all of them.
"""

from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch.nn.functional as F

from eellm import ExitConfig
from eellm.parallel.mesh import World
from eellm.pipeline.run import SCHEDULES
from eellm.schedule.partition import SINGLE, SPLIT_BACKWARD, V_SHAPED, takes
from tests.distributed.one_step import SIZES, batch, differences, reference, run_step, run_steps, step_of, whole_model
from tests.ranks import run_on_ranks

KINDS = [
    {"kind": "norm"},
    {"kind": "layer"},
    {"kind": "mlp", "gate_size": 3},
    {"kind": "embed"},
    {"kind": "norm", "norm": "final"},
]
BACKBONES = [
    {"qk_norm": True},  # Qwen3
    {"qkv_bias": True, "attention_out_bias": True, "mlp_bias": True},  # Qwen2 and more
    {"sliding_window": 3, "sliding_layers": (1, 4, 6), "num_kv_heads": 4},  # Mistral
]
HEADS = list(product(("tied", "own"), (True, False)))
"""An exit's output matrix; whether the final one is the embedding matrix."""


def exits_at(layers, head="tied", shift=0):
    """Exits of all kinds in turn, from the `shift`-th on."""
    return [
        ExitConfig(layer=layer, head=head, **KINDS[(i + shift) % len(KINDS)]) for i, layer in enumerate(sorted(layers))
    ]


def slow_but(*names):
    """All schedules; `make test` has those of these names, `make test-all` the others too."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in SCHEDULES]


MIXED = [*exits_at([1, 4, 5]), *exits_at([6, 7], "own", shift=2)]


def exits_on(num_stages):
    """Layers of exits, by where they are in a pipeline of stages with as many layers each."""
    each, last = SIZES["num_layers"] // num_stages, SIZES["num_layers"]
    return {
        "one on each stage": [layer for layer in range(1, last + 1, each) if layer < last],
        "two on one stage": [each + 1 - num_stages % 2, each + 2],
        "on the first stage": [each],
        "on the last stage": [last - 1],
        "none": [],
    }


def assert_all_equal(num_processes, steps):
    ranks = run_on_ranks(num_processes, run_steps, steps, timeout_s=280)
    found = {str(step): differences(step, list(outcomes)) for step, *outcomes in zip(steps, *ranks, strict=True)}
    assert not {step: wrong for step, wrong in found.items() if wrong}


def num_stages_of(schedule, pp=2):
    return pp if schedule in SINGLE else 2 * pp


@pytest.mark.parametrize("backbone", BACKBONES, ids=lambda backbone: next(iter(backbone)))
def test_the_reference_reads_each_document_by_itself(backbone):
    config = step_of(MIXED, model=backbone).model
    model, (rows, _), sums = whole_model(config), batch(), Counter()
    for tokens_T, labels_T, documents_T in zip(rows.tokens_BT, rows.labels_BT, rows.documents_BT, strict=True):
        for document in documents_T.unique():
            place = documents_T == document
            for layer, logits_BTV in model(tokens_T[None, place]).items():
                sums[layer] += F.cross_entropy(logits_BTV[0], labels_T[place], reduction="sum").item()
    _, _, expected = reference(config, False)
    assert dict(sums) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_with_exits_anywhere(schedule):
    num_stages = num_stages_of(schedule)
    even = (SIZES["num_layers"] // num_stages,) * num_stages
    layout = {"pp": 2, "schedule": schedule, "num_microbatches": 4, "layers_per_stage": even}
    places = exits_on(num_stages).values()
    steps = [
        step_of(exits_at(layers, head, shift), tie_embeddings=tied, **layout)
        for shift, (layers, (head, tied)) in enumerate(product(places, HEADS))
    ]
    assert_all_equal(2, steps)


@pytest.mark.parametrize("schedule", slow_but("1f1b", "zbv"))
def test_a_schedule_with_every_other_option(schedule):
    num_stages = num_stages_of(schedule)
    layout = {"pp": 2, "schedule": schedule, "num_microbatches": 4}
    boundaries = [stage * SIZES["num_layers"] // num_stages for stage in range(1, num_stages)]
    steps = [
        step_of(exits_at(boundaries, head, shift), tie_embeddings=tied, exit_placement=placement, **layout)
        for shift, ((head, tied), placement) in enumerate(product(HEADS, ("next_stage", "auto")))
    ]
    uneven = (5, 3) if num_stages == 2 else (1, 4, 1, 2)
    steps += [step_of(MIXED, layers_per_stage=uneven, **layout)]
    steps += [step_of(MIXED, is_dropped=True, **layout), step_of(MIXED, recompute="full", **layout)]
    fewest = min(n for n in (1, 2, 4, 8) if takes(schedule, 2, n))
    steps += [step_of(MIXED, **layout | {"num_microbatches": n}) for n in (fewest, 8)]
    steps += [step_of(MIXED, model=model, tie_embeddings=True, **layout) for model in BACKBONES]
    if schedule not in SPLIT_BACKWARD:
        steps += [step_of(MIXED, recompute="selective", **layout)]
        steps += [
            step_of(exits_at([2, 3, 6], head), tie_embeddings=tied, exit_mode=mode, **layout)
            for mode, (head, tied) in product(("eager", "checkpoint"), HEADS)
        ]
    if schedule not in (*SINGLE, *V_SHAPED):
        steps += [step_of(MIXED, stages_per_rank=3, tie_embeddings=True, **layout)]
    assert_all_equal(2, steps)


def variety(**layout):
    """One layout, without and with each option."""
    steps = [step_of(exits_at([2, 4, 6], head, 1), tie_embeddings=tied, **layout) for head, tied in HEADS]
    steps += [step_of(MIXED, is_dropped=True, model=model, **layout) for model in BACKBONES]
    steps += [step_of(**layout), step_of(MIXED, recompute="full", **layout)]
    steps += [step_of(MIXED, recompute="selective", **layout)] if layout.get("schedule") not in SPLIT_BACKWARD else []
    return steps


def few(**layout):
    """One layout, with all options in as few steps as can be: those with tensor parallelism take long."""
    everything = {name: value for backbone in BACKBONES[:2] for name, value in backbone.items()}
    return [
        step_of(exits_at([2, 4, 6], "tied", 1), tie_embeddings=True, **layout),
        step_of(exits_at([2, 4, 6], "own", 1), model=everything, **layout),
        step_of(MIXED, is_dropped=True, recompute="full", model=BACKBONES[2], **layout),
    ]


@pytest.mark.parametrize("mode", ["deferred", "eager", "checkpoint"])
def test_one_process(mode):
    steps = [step for num in (1, 4) for step in variety(num_microbatches=num, exit_mode=mode)]
    assert_all_equal(1, steps)


@pytest.mark.parametrize("axis", ["dp_shard", "dp_replicate", "tp"])
def test_two_processes_along_one_axis(axis):
    steps = [*variety(**{axis: 2}), *few(num_microbatches=2, **{axis: 2})]
    steps += [
        step_of(exits_at([2, 4], head), exit_mode=mode, tie_embeddings=tied, **{axis: 2})
        for mode, (head, tied) in zip(("eager", "checkpoint") * 2, HEADS, strict=True)
    ]
    assert_all_equal(2, steps)


@pytest.mark.parametrize("schedule", slow_but("1f1b"))
def test_pp4(schedule):
    layout = {"pp": 4, "schedule": schedule, "num_microbatches": 8 if schedule == "dualpipev" else 4}
    places = exits_on(num_stages_of(schedule, 4)).values()
    steps = [
        step_of(exits_at(layers, shift=shift), tie_embeddings=shift % 2 == 0, **layout)
        for shift, layers in enumerate(places)
    ]
    steps += [
        # the final norm on stages 1 and 3, the matrix on 0 and 3: groups of processes that overlap
        step_of([ExitConfig(layer=4, head="own", norm="final")], tie_embeddings=True, **layout)
    ]
    assert_all_equal(4, steps)


@pytest.mark.parametrize(
    "layout",
    [
        {"dp_replicate": 2, "dp_shard": 2},
        {"dp_shard": 2, "tp": 2},
        pytest.param({"dp_replicate": 2, "tp": 2}, marks=pytest.mark.slow),
        {"pp": 2, "tp": 2, "num_microbatches": 4},
        pytest.param(
            {"pp": 2, "tp": 2, "num_microbatches": 4, "schedule": "interleaved_zero_bubble"}, marks=pytest.mark.slow
        ),
        {"pp": 2, "dp_shard": 2, "num_microbatches": 4},
        pytest.param({"pp": 2, "dp_shard": 2, "num_microbatches": 4, "schedule": "dualpipev"}, marks=pytest.mark.slow),
        {"pp": 2, "dp_replicate": 2, "num_microbatches": 4, "schedule": "zbv"},
    ],
    ids=lambda layout: " ".join(f"{axis} {size}" for axis, size in layout.items()),
)
def test_four_processes_along_two_axes(layout):
    assert_all_equal(4, few(**layout) if "tp" in layout else variety(**layout))


def test_eight_processes_along_three_axes():
    layout = {"dp_shard": 2, "pp": 2, "tp": 2, "num_microbatches": 4}
    schedules = ("1f1b", "interleaved_1f1b", "zbv")
    steps = [step_of(MIXED, tie_embeddings=True, schedule=schedule, **layout) for schedule in schedules]
    steps += [step_of(exits_at([4], "own"), exit_placement="next_stage", **layout)]
    steps += [step_of(MIXED, tie_embeddings=True, dp_replicate=2, dp_shard=2, tp=2, num_microbatches=2)]
    assert_all_equal(8, steps)


MISTAKES = {
    "an exit's weight is off by 1%": ({"pp": 2, "num_microbatches": 4}, "gradient of exits.2.norm.weight on rank 0"),
    "tied gradients aren't summed": (
        {"pp": 2, "num_microbatches": 4},
        "gradient of decoder.embed.weight on rank 0",
    ),
    "tied copies count twice": ({"pp": 2, "num_microbatches": 4}, "norm on rank 0"),
    "gradients keep their pending sums": ({"tp": 2}, "gradient of decoder.layers.1.attn_norm.weight on rank 1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_comparison_finds(mistake):
    layout, difference = MISTAKES[mistake]
    right = step_of(exits_at([2, 6]), tie_embeddings=True, **layout)
    wrong = replace(right, mistake=mistake)
    ranks = run_on_ranks(2, run_steps, [right, wrong])
    assert differences(right, [outcomes[0] for outcomes in ranks]) == []
    assert difference in differences(wrong, [outcomes[1] for outcomes in ranks])


@pytest.mark.parametrize("what", ["sums", "evaluated", "norm", "errors"])
def test_the_comparison_finds_a_wrong_or_missing_number(what):
    step = step_of(exits_at([2, 6]))
    outcome = run_step(step, World())
    assert differences(step, [outcome]) == []
    right = getattr(outcome, what)
    changed = right * (1 + 1e-9) if what == "norm" else right | {next(iter(right)): 1e-9}
    assert len(differences(step, [replace(outcome, **{what: changed})])) == 1
    if what != "norm":
        without_one = dict(list(right.items())[1:])
        assert len(differences(step, [replace(outcome, **{what: without_one})])) == 1
