"""Tuning runs over several processes: the files of one process, taken up under any layout; refusals; torchrun."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import eellm
from eellm.checkpoint.files import read_tensors
from eellm.cli.main import main
from eellm.errors import ConfigError
from eellm.parallel.mesh import join
from eellm.pipeline.frozen import plan_frozen_stages
from eellm.train import tuner as tuner_module
from eellm.train.run_dir import RunDir
from eellm.train.tune import tune
from tests.distributed.tuning import make_world, recipe, rows_of
from tests.models import tiny_config
from tests.ranks import run_on_ranks

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("tune"))


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


def test_a_run_whose_gates_are_not_trained_is_taken_up_too(world):
    config = recipe(world, "text", out_dir="gateless", train={"save_every": 2})
    tune_until(2, config)
    tune(config)
    assert [row["step"] for row in rows_of(world / "gateless")] == [1, 2, 3]


def refusals(config):
    """What each rank is told of a run whose directory is in use."""
    world = join(config.parallel)
    with pytest.raises(eellm.EellmError) as caught:
        tune(config, world)
    return str(caught.value)


def test_every_rank_is_told_that_a_directory_is_in_use(world):
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
