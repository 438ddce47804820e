"""EE-Tuning over several processes gives the numbers of one, in fp64, and leaves its files; no stage holds more than
its own part."""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
import torch.distributed as dist

import eellm
from eellm.checkpoint.files import read_tensors
from eellm.checkpoint.parts import ModelParts
from eellm.cli.main import main
from eellm.config.load import from_dict
from eellm.config.tune import TuneConfig
from eellm.errors import ConfigError
from eellm.parallel.mesh import join
from eellm.pipeline.frozen import plan_frozen_stages
from eellm.train import tuner as tuner_module
from eellm.train.tune import Tuner, tune
from tests.models import tiny_config
from tests.ranks import run_on_ranks
from tests.worlds import tiny_tokenizer

ROOT = Path(__file__).parents[2]
EXITS = (
    {"layer": 1, "kind": "mlp", "gate_size": 4},
    {"layer": 2, "kind": "norm", "norm": "final", "head": "own"},
    {"layer": 5, "kind": "layer", "gate_size": 4},
)
"""None at layers 3 and 4. What the exits at 1 and 5 lack is the final head's."""
OBJECTIVES = {
    "text": {"beta": 0.0, "gate": False},
    "distilled": {"beta": 0.5, "gate": False, "temperature": 2.0},
    "gated": {"beta": 0.0, "gate": True},
    "both": {"beta": 0.5, "gate": True},
}
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
    """A base with tied embeddings, one without, and a text."""
    directory = tmp_path_factory.mktemp("tune")
    tokenizer = tiny_tokenizer()
    for tied in (False, True):
        sizes = {"vocab_size": tokenizer.vocab_size, "exits": (), "init_std": 0.2, "tie_embeddings": tied}
        model = eellm.build(tiny_config(**sizes), seed=1)
        model.tokenizer = tokenizer
        eellm.save(model, directory / ("tied" if tied else "base"))
    (directory / "text.jsonl").write_text(
        "".join(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics)[:8])
    )
    return directory


def recipe(world, objective="text", parallel=(), *, base="base", out_dir="run", **tables):
    data = {
        "model": {"base": str(world / base), "exits": list(EXITS), "dtype": "float64"},
        "data": {"train": [str(world / "text.jsonl")], "seq_len": 24, "validation_rows": 6},
        "train": {"out_dir": str(world / out_dir), "steps": 3, "batch_size": 4, "accumulate": 2},
        "objective": OBJECTIVES[objective] | {"chunk_size": 37},
        "optim": {"lr": 3e-3, "warmup_steps": 1, "clip": 0.05},
        "parallel": layout_of(objective, dict(parallel)),
    }
    for table, values in tables.items():
        data[table] |= values
    return from_dict(TuneConfig, data)


def layout_of(objective, parallel):
    """The last of `layers_per_stage` is what is left of the layers that run."""
    if "layers_per_stage" in parallel:
        counts = list(parallel["layers_per_stage"])
        parallel["layers_per_stage"] = [*counts, (5 if objective == "text" else 6) - sum(counts)]
    return parallel


def without_clock(row):
    return {key: value for key, value in row.items() if key != "tokens_per_s"}


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


# --- runs ---


class StoppedError(Exception):
    """In place of a kill."""


def tune_until(last, config, world=None):
    """A run that dies in the step after `last`."""
    step = tuner_module.Tuner.step

    def mortal(tuner, number):
        if number > last:
            raise StoppedError
        return step(tuner, number)

    tuner_module.Tuner.step = mortal
    try:
        tune(config, world)
        raise AssertionError("it didn't die")
    except StoppedError:
        pass
    finally:
        tuner_module.Tuner.step = step


def tune_on_ranks(last, config):
    world = join(config.parallel)
    if last < config.train.steps:
        tune_until(last, config, world)
    else:
        assert tune(config, world) == config.train.out_dir / "adapter"
    dist.barrier()


def rows_of(out_dir):
    return [without_clock(json.loads(line)) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def files_of(out_dir):
    return {str(path.relative_to(out_dir)) for path in out_dir.rglob("*") if "tensorboard" not in str(path)}


def test_a_run_goes_on_under_other_layouts_and_leaves_the_files_of_one_process(world):
    often = {"steps": 8, "save_every": 2, "evaluate_every": 4}
    tune(recipe(world, "both", out_dir="whole", train=often))
    for last, layout in ((3, {}), (5, {"pp": 2}), (7, {"dp_replicate": 2}), (8, {"pp": 2, "num_microbatches": 4})):
        config = recipe(world, "both", layout, out_dir="moved", train=often)
        if layout:
            run_on_ranks(2, tune_on_ranks, last, config)
        else:
            tune_until(last, config)
    whole, moved = world / "whole", world / "moved"
    assert [row["step"] for row in rows_of(moved)] == list(range(1, 9))
    for row, expected in zip(rows_of(moved), rows_of(whole), strict=True):
        assert row == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert files_of(moved) == files_of(whole)
    for file in ("state-000008/state.safetensors", "adapter/exits.safetensors"):
        found, expected = dict(read_tensors(moved / file)), dict(read_tensors(whole / file))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-9, msg=name)
    states = [json.loads((run / "state-000008" / "state.json").read_text()) for run in (whole, moved)]
    assert states[0] == states[1]
    assert eellm.load(world / "base", moved / "adapter").config.exit_layers == (1, 2, 5)


def refusals(config):
    """What each rank is told of a run whose directory is in use."""
    world = join(config.parallel)
    with pytest.raises(eellm.EellmError) as caught:
        tune(config, world)
    return str(caught.value)


def test_every_rank_is_told_that_a_directory_is_in_use(world):
    from eellm.train.run_dir import RunDir

    held = RunDir(world / "busy")
    told = run_on_ranks(2, refusals, recipe(world, "text", {"pp": 2}, out_dir="busy"))
    assert told == [f"{held.path} is in use by a run that is alive; wait for it, or set another out_dir"] * 2


@pytest.mark.parametrize(
    ("parallel", "words"),
    [
        ({"tp": 2}, "parallel.tp = 2: an exit is compared with the final one over the whole vocabulary"),
        ({"schedule": "zbv", "pp": 2}, "parallel.schedule = 'zbv': it means nothing where the layers run forward only"),
        ({"recompute": "full"}, "parallel.recompute = 'full'"),
        ({"exit_placement": "next_stage"}, "parallel.exit_placement = 'next_stage'"),
        ({"dp_replicate": 3}, "train.batch_size · accumulate = 8: must be a multiple of dp_replicate · dp_shard = 3"),
        ({"dp_shard": 2, "num_microbatches": 3}, "the 4 rows of a data-parallel rank don't divide into as many"),
    ],
)
def test_a_layout_that_has_no_meaning_in_tuning_is_refused(world, parallel, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        recipe(world, "text", parallel)


def test_more_stages_than_layers_that_run_are_refused(world):
    config = recipe(world, "text", {"pp": 6})
    model = tiny_config(exits=(eellm.ExitConfig(layer=5),))
    with pytest.raises(ConfigError, match="no layer behind the deepest exit, at 5, runs, and each stage needs one"):
        plan_frozen_stages(model, config.parallel, 24, is_taught=False)
    stages = plan_frozen_stages(model, config.parallel, 24, is_taught=True)
    assert [(stage.first, stage.last) for stage in stages] == [(n, n) for n in range(1, 7)]


def test_torchrun_starts_it(world, capsys):
    file = world / "recipe.toml"
    file.write_text(
        f'[model]\nbase = "{world / "base"}"\nexits = [{{ layer = 2 }}, {{ layer = 5, kind = "mlp" }}]\n'
        f'dtype = "float64"\n[data]\ntrain = ["{world / "text.jsonl"}"]\nseq_len = 24\nvalidation_rows = 2\n'
        f'[train]\nout_dir = "{world / "cli"}"\nsteps = 2\n'
    )
    assert main(["tune", str(file)]) == 0
    expected = rows_of(world / "cli")
    assert main(["tune", str(file), "--parallel.pp", "2"]) == 2
    assert "start it with torchrun --nproc_per_node 2" in capsys.readouterr().err
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "eellm"]
    done = subprocess.run(
        [*launcher, "tune", str(file), "--parallel.pp", "2", "--train.out-dir", str(world / "cli2")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("exits at 2, 5, after 2 steps") == 1
    for row, alone in zip(rows_of(world / "cli2"), expected, strict=True):
        assert row == pytest.approx(alone, rel=1e-9)
