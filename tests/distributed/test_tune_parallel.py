"""EE-Tuning over several processes gives the numbers of one, in fp64; no stage holds more than its own part."""

import contextlib
import re

import pytest
import torch
import torch.nn.functional as F

import eellm
from eellm.checkpoint.parts import ModelParts
from eellm.exits.loss import IGNORE
from eellm.exits.metrics import exit_table
from eellm.parallel.mesh import join
from eellm.train.tune import Tuner, tune
from tests.distributed.tuning import OBJECTIVES, make_world, recipe, without_clock
from tests.ranks import run_on_ranks

LAYOUTS = {
    2: (
        {"pp": 2},
        {"pp": 2, "num_microbatches": 2},
        {"dp_replicate": 2},
        {"dp_shard": 2},
    ),
    3: ({"pp": 3, "layers_per_stage": (2, 1)},),  # the rest is the last stage's, see `layout_of`
    4: ({"pp": 2, "dp_replicate": 2}, {"pp": 2, "dp_shard": 2}, {"dp_replicate": 2, "dp_shard": 2}),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("tune"))


def outcome_of(config, world=None):
    """What three steps leave on this process."""
    asked = set()
    get = ModelParts.get

    def noted(parts, name):
        asked.add(name)
        return get(parts, name)

    ModelParts.get = noted
    try:
        tuner = Tuner(config, world)
        frozen = {n: p.clone() for n, p in held(tuner).items() if n.startswith("decoder.")}
        rows = [without_clock(tuner.step(step)) for step in (1, 2, 3)]
        asked_for = sorted(asked)
    finally:
        ModelParts.get = get
    rows += [tuner.evaluate() for _ in range(2)]
    changed = [name for name, before in frozen.items() if not torch.equal(held(tuner)[name], before)]
    exits = {name: (p.detach(), None if p.grad is None else p.grad) for name, p in tuner.parameters.items()}
    return {"rows": rows, "exits": exits, "changed": changed, "held": sorted(held(tuner)), "asked": asked_for}


def held(tuner):
    """Every parameter on this process, what it has of it."""
    return {n: p.to_local() if hasattr(p, "to_local") else p.detach() for n, p in tuner.model.named_parameters()}


def outcomes_of(configs):
    """On each rank: one outcome per recipe."""
    outcomes = []
    for config in configs:
        try:
            outcomes.append(outcome_of(config, join(config.parallel)))
        except Exception as error:
            raise RuntimeError(f"in {config.parallel}, {config.objective}") from error
    return outcomes


def assert_same(ranks, alone):
    """ranks: the outcome of each; alone: that of one process."""
    for row, expected in zip(ranks[0]["rows"], alone["rows"], strict=True):
        assert row == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert list(row) == list(expected)
    seen = set()
    for rank in ranks:
        assert rank["changed"] == []
        assert all(row == {} for row in rank["rows"][3:]) or rank is ranks[0]
        for name, tensors in rank["exits"].items():
            seen.add(name)
            for tensor, expected in zip(tensors, alone["exits"][name], strict=True):
                assert (tensor is None) == (expected is None), name
                if tensor is not None:
                    torch.testing.assert_close(tensor, expected, rtol=1e-9, atol=1e-9, msg=name)
    assert seen == alone["exits"].keys()


def on_the_whole_model(config, batch, validation):
    """The first step's losses and gradients by plain autograd, without clipping; and what `exit_table` says."""
    model = eellm.load(config.model.base, dtype="float64")
    eellm.add_exits(model, config.model.exits, seed=config.train.seed)
    table = exit_table(model, validation)
    rows = model.decoder.packed_rows(batch.positions_BT, batch.documents_BT)
    logits = {n: model.logits(n, model.normed(n, h, rows))[batch.labels_BT != IGNORE] for n, h in hiddens(model, batch)}
    labels, teacher = batch.labels_BT[batch.labels_BT != IGNORE], logits.pop(6).detach()
    beta, T, losses, total = config.objective.beta, config.objective.temperature, {}, 0.0
    for n, logits_NV in logits.items():
        entropy = F.cross_entropy(logits_NV, labels)
        p_NV, q_NV = ((x / T).softmax(-1) for x in (teacher, logits_NV))
        kl = T**2 * (p_NV * (p_NV / q_NV).log()).sum(-1).mean()
        losses |= {f"loss/exit_{n}": float(entropy.detach()), f"kl/exit_{n}": float(kl.detach())}
        losses[f"agreement/exit_{n}"] = float((logits_NV.argmax(-1) == teacher.argmax(-1)).double().mean())
        total = total + (1 - beta) * entropy + beta * kl
    total.backward()
    losses["loss"] = float(total.detach())
    return losses, {f"exits.{n}": p.grad for n, p in model.exits.named_parameters()}, table


def hiddens(model, batch):
    """The hidden states that exits read, cut off from what they came from."""
    rows = model.decoder.packed_rows(batch.positions_BT, batch.documents_BT)
    return [(layer, h_BTD.detach()) for layer, h_BTD in model.hiddens(batch.tokens_BT, rows)]


@pytest.mark.parametrize("objective", ["text", "distilled"])
def test_one_process_gives_what_plain_autograd_on_the_whole_model_gives(world, objective):
    config = recipe(world, objective, model={"fit_scale": False}, optim={"clip": 0.0})
    tuner = Tuner(config)
    other = Tuner(config)
    losses, grads, table = on_the_whole_model(config, other.loader.take(8), other.validation.batches)
    validated = tuner.evaluate()
    row = tuner.step(1)
    for name, value in losses.items():
        if name in row or objective == "distilled":
            assert row[name] == pytest.approx(value, rel=1e-12), name
    for name, parameter in tuner.parameters.items():
        if ".gate." not in name:
            torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-9, atol=1e-12, msg=name)
    assert validated["val_loss/final"] == pytest.approx(table.nll(6), rel=1e-12)
    for layer in (1, 2, 5):
        assert validated[f"val_loss/exit_{layer}"] == pytest.approx(table.nll(layer), rel=1e-12)
        assert validated[f"val_agreement/exit_{layer}"] == table.agreement(layer)
        precision = table.at_threshold(0.5, exits=(layer,)).agreement_by_exit[layer]
        assert validated[f"val_precision_0.5/exit_{layer}"] == precision


@pytest.mark.parametrize("num_ranks", sorted(LAYOUTS))
def test_losses_gradients_weights_and_validation_are_those_of_one_process(world, num_ranks):
    cases = [(objective, layout) for objective in OBJECTIVES for layout in LAYOUTS[num_ranks]]
    found = run_on_ranks(num_ranks, outcomes_of, [recipe(world, *case) for case in cases])
    alone = {objective: outcome_of(recipe(world, objective)) for objective in OBJECTIVES}
    for i, (objective, _) in enumerate(cases):
        assert alone[objective]["rows"][0]["grad_norm"] > 0.05, "clipping takes part"
        assert_same([rank[i] for rank in found], alone[objective])


def test_the_same_with_tied_embeddings_random_exits_and_an_adapter_to_start_from(world):
    adapter = tune(recipe(world, "both", out_dir="first", train={"steps": 2}))
    further = {"exits": (), "adapter": str(adapter)}
    configs = {
        layout: [
            recipe(world, "both", layout, base="tied"),
            recipe(world, "text", layout, base="tied", model={"init": "random"}),
            recipe(world, "both", layout, model=further),
        ]
        for layout in ((), (("pp", 2),))
    }
    found = run_on_ranks(2, outcomes_of, configs[(("pp", 2),)])
    for i, config in enumerate(configs[()]):
        assert_same([rank[i] for rank in found], outcome_of(config))


def test_in_bfloat16_hidden_states_pass_in_float32(world):
    configs = [recipe(world, "both", {"pp": pp}, model={"dtype": "bfloat16"}) for pp in (1, 2)]
    found, alone = run_on_ranks(2, outcomes_of, configs[1:]), outcome_of(configs[0])
    for row, expected in zip(found[0][0]["rows"], alone["rows"], strict=True):
        losses = [key for key in expected if "loss" in key]
        assert [row[key] for key in losses] == pytest.approx([expected[key] for key in losses], rel=2e-2)


def actions_of(config):
    """What this process did in a step, without waiting and sending."""
    actions = []

    def watch(action, *, waits=False):
        actions.append(action)
        return contextlib.nullcontext()

    tuner = Tuner(config, join(config.parallel), watch)
    actions.clear()
    tuner.step(1)
    return [action for action in actions if action.startswith(("forward", "exit"))]


def test_a_stage_goes_on_while_the_teacher_s_state_of_a_microbatch_is_on_its_way(world):
    parallel = {"pp": 3, "layers_per_stage": (2, 1), "num_microbatches": 4}
    first, middle, last = run_on_ranks(3, actions_of, recipe(world, "distilled", parallel))
    exits = [[f"exit {layer}, microbatch {i}" for layer in (1, 2)] for i in range(4)]
    forward = [f"forward of stage 0, microbatch {i}" for i in range(4)]
    assert first == [*forward[:3], *exits[0], forward[3], *exits[1], *exits[2], *exits[3]]
    assert middle == [f"forward of stage 1, microbatch {i}" for i in range(4)]
    assert last[:3] == ["forward of stage 2, microbatch 0", "exit 5, microbatch 0", "forward of stage 2, microbatch 1"]


# --- what is where ---


def layers_in(names):
    return {int(found[1]) for name in names if (found := re.match(r"decoder\.layers\.(\d+)\.", name))}


def heads_in(names):
    return {name for name in names if name in ("decoder.embed.weight", "decoder.norm.weight", "decoder.output.weight")}


EMBED, NORM, OUTPUT = "decoder.embed.weight", "decoder.norm.weight", "decoder.output.weight"


@pytest.mark.parametrize(
    ("objective", "layers", "heads"),
    [
        # the exit at 2 shares the final norm, those at 1 and 5 share the matrix
        ("text", [{1, 2}, {3}, {4, 5}], [{EMBED, NORM, OUTPUT}, set(), {OUTPUT}]),
        ("distilled", [{1, 2}, {3}, {4, 5, 6}], [{EMBED, NORM, OUTPUT}, set(), {NORM, OUTPUT}]),
    ],
)
def test_a_stage_holds_its_part_and_nothing_is_behind_the_deepest_exit(world, objective, layers, heads):
    config = recipe(world, objective, {"pp": 3, "layers_per_stage": (2, 1)})
    ranks = [rank[0] for rank in run_on_ranks(3, outcomes_of, [config])]
    assert [layers_in(rank["held"]) for rank in ranks] == layers
    assert [heads_in(rank["held"]) for rank in ranks] == heads
    exits = [{name for name in rank["held"] if name.startswith("exits.")} for rank in ranks]
    assert [{name.split(".")[1] for name in names} for names in exits] == [{"1", "2"}, set(), {"5"}]
    # what new exits are copies of is read too: the MLP behind exit 1, the last layer for exit 5
    expected = [mine | copied for mine, copied in zip(layers, [{2}, set(), {6}], strict=True)]
    assert [layers_in(rank["asked"]) for rank in ranks] == expected


def test_a_stage_whose_exits_have_heads_of_their_own_has_the_teacher_s_matrix_only_if_it_teaches(world):
    exits = {"exits": [{"layer": 2, "kind": "norm", "head": "own"}]}
    for objective, heads in (("text", {EMBED}), ("distilled", {EMBED, NORM, OUTPUT})):
        tuner = Tuner(recipe(world, objective, model=exits))
        assert heads_in(held(tuner)) == heads
        assert layers_in(held(tuner)) == set(range(1, 3 if objective == "text" else 7))


def local_sizes(config):
    tuner = Tuner(config, join(config.parallel))
    return {name: tensor.numel() for name, tensor in held(tuner).items()}


def test_under_dp_shard_each_process_holds_its_share_of_the_layers(world):
    whole = {name: tensor.numel() for name, tensor in held(Tuner(recipe(world))).items()}
    for rank in run_on_ranks(2, local_sizes, recipe(world, "text", {"dp_shard": 2})):
        assert rank.keys() == whole.keys()
        assert all(rank[n] == (whole[n] // 2 if "layers." in n and "exits" not in n else whole[n]) for n in whole)
