"""A run that starts from a model directory has its weights; exits that only the recipe has are copies of its parts."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import eellm
from eellm.config.parallel import ParallelConfig
from eellm.config.train import LossConfig
from eellm.errors import CheckpointError, ConfigError
from eellm.parallel.mesh import World, join
from eellm.pipeline.placed import place
from eellm.train.start import merged_model, start_at_random, start_from
from tests.distributed.layouts import full
from tests.models import EXITS, tiny_config, tiny_model
from tests.ranks import run_on_ranks

OTHERS = (
    eellm.ExitConfig(layer=4, kind="mlp", head="own", gate_size=3),
    eellm.ExitConfig(layer=3, kind="layer", head="own"),
    eellm.ExitConfig(layer=2, kind="norm", head="tied", norm="final"),
    eellm.ExitConfig(layer=1, kind="embed", head="own"),
)
NUMBERS = {"vocab_size": 32}


def saved(directory, *, exits=(), dtype="float32", **changes):
    """A model directory whose norms aren't all ones."""
    model = tiny_model(exits=exits, dtype=dtype, seed=3, **NUMBERS, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.linspace(0.5, 1.5, parameter.numel()) + len(name) / 100)
    eellm.save(model, directory)
    return directory


def expected_weights(directory, exits):
    """What `eellm.load` and `eellm.add_exits` make of the directory."""
    model = eellm.load(directory, dtype="float32")
    eellm.add_exits(model, [e for e in exits if e.layer not in model.config.exit_layers], init="copy")
    return model.state_dict()


def differing(directory, exits, layout=ParallelConfig(), *, world=None, **changes) -> tuple[set[str], list[str]]:
    """Names of this process's parameters, and of those that aren't as expected."""
    config = merged_model(tiny_config(exits=exits, **NUMBERS, **changes), directory)
    placed = place(config, layout, world or join(layout), objective=LossConfig(), dtype="float32")
    with torch.no_grad():
        for parameter in placed.trainable():
            parameter.fill_(torch.nan)
    start_from(placed, directory, seed=7)
    expected, wrong = expected_weights(directory, exits), []
    stored = {layer for layer in config.exit_layers if layer not in {e.layer for e in exits}}
    for name, copies in placed.parameters.items():
        is_drawn = name.split(".")[2] == "gate" and int(name.split(".")[1]) not in stored
        for copy in copies:
            found = full(copy)
            is_right = found.isfinite().all() if is_drawn else torch.equal(found, expected[name])
            wrong += [] if is_right else [name]
    return set(placed.parameters), wrong


@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_new_exits_are_copies_as_add_exits_makes_them(tmp_path, tie_embeddings, dtype):
    directory = saved(tmp_path / "base", tie_embeddings=tie_embeddings, dtype=dtype)
    names, wrong = differing(directory, OTHERS, world=World(), tie_embeddings=tie_embeddings)
    assert wrong == []
    expected = set(expected_weights(directory, OTHERS)) - ({"decoder.output.weight"} if tie_embeddings else set())
    assert names == expected


def test_the_directory_s_exits_are_taken_as_they_are_beside_the_recipe_s(tmp_path):
    directory = saved(tmp_path / "base", exits=EXITS)
    names, wrong = differing(directory, OTHERS[:1], world=World())
    assert wrong == []
    assert {name.split(".")[1] for name in names if name.startswith("exits")} == {"1", "2", "3", "4", "5"}


def all_differing(directories, layouts):
    results = []
    for directory, exits, tie_embeddings in directories:
        results += [differing(directory, exits, layout, tie_embeddings=tie_embeddings) for layout in layouts]
    return results


@pytest.mark.parametrize(
    "layouts",
    [
        [ParallelConfig(dp_shard=2), ParallelConfig(pp=2, schedule="zbv")],
        [ParallelConfig(pp=2, tp=2), ParallelConfig(dp_replicate=2, dp_shard=2)],
    ],
    ids=["two processes", "four processes"],
)
def test_every_layout_starts_from_the_same_weights(tmp_path, layouts):
    directories = [
        (saved(tmp_path / "tied", tie_embeddings=True), OTHERS, True),
        (saved(tmp_path / "exits", exits=EXITS), OTHERS[:1], False),
    ]
    ranks = run_on_ranks(layouts[0].world_size, all_differing, directories, layouts)
    for outcomes in zip(*ranks, strict=True):
        assert [wrong for _, wrong in outcomes] == [[]] * len(ranks)
    for case, (directory, exits, tie_embeddings) in enumerate(directories):
        every = set(expected_weights(directory, exits)) - ({"decoder.output.weight"} if tie_embeddings else set())
        for outcomes in list(zip(*ranks, strict=True))[case * len(layouts) : (case + 1) * len(layouts)]:
            assert set().union(*(names for names, _ in outcomes)) == every


def test_random_weights_are_those_of_build():
    config = tiny_config(tie_embeddings=True)
    placed = place(config, ParallelConfig(), World(), objective=LossConfig(), dtype="float32")
    start_at_random(placed, seed=5)
    expected = dict(eellm.build(config, seed=5).named_parameters())
    assert placed.parameters.keys() == expected.keys()
    for name, (parameter,) in placed.parameters.items():
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_size", 64), ("num_layers", 7), ("tie_embeddings", True), ("qkv_bias", True), ("num_kv_heads", 4)],
)
def test_another_backbone_is_refused_by_the_name_of_what_differs(tmp_path, field, value):
    directory = saved(tmp_path / "base")
    recipe = tiny_config(exits=(), **NUMBERS)
    with pytest.raises(ConfigError) as error:
        merged_model(replace(recipe, **{field: value}), directory)
    before = getattr(recipe, field)
    assert str(error.value) == f"model.{field} = {value!r}, and {directory} has {before!r}; make them the same"
    assert merged_model(recipe, directory).exits == ()


def test_what_says_nothing_about_weights_may_differ(tmp_path):
    directory = tmp_path / "base"
    model = tiny_model(exits=EXITS[:1], dtype="float32", eos_token_ids=(5,), bos_token_id=2, **NUMBERS)
    eellm.save(model, directory)
    recipe = tiny_config(exits=EXITS[1:], max_seq_len=17, init_std=0.5, eos_token_ids=(1,), **NUMBERS)
    merged = merged_model(recipe, directory)
    assert merged.exits == EXITS
    assert (merged.max_seq_len, merged.init_std) == (17, 0.5)
    assert (merged.eos_token_ids, merged.bos_token_id) == ((5,), 2), "the tokenizer is the directory's"


def test_an_exit_of_another_kind_at_the_same_layer_is_refused(tmp_path):
    directory = saved(tmp_path / "base", exits=EXITS)
    with pytest.raises(ConfigError, match="another exit at layer 2 than the recipe"):
        merged_model(tiny_config(exits=(replace(EXITS[1], kind="mlp"),), **NUMBERS), directory)
    assert merged_model(tiny_config(exits=(EXITS[1],), **NUMBERS), directory).exits == EXITS


def test_what_is_no_model_directory_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is not a model directory"):
        merged_model(tiny_config(), tmp_path)


def test_a_parameter_that_is_missing_or_has_another_shape_is_named(tmp_path):
    directory = saved(tmp_path / "base")
    config = merged_model(tiny_config(exits=(), **NUMBERS), directory)
    placed = place(config, ParallelConfig(), World(), objective=LossConfig(), dtype="float32")
    file = directory / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"model.norm.weight": torch.ones(3)}, file)
    with pytest.raises(CheckpointError, match=r"'decoder\.norm\.weight' has shape \(3,\), not \(32,\)"):
        start_from(placed, directory, seed=0)
    del tensors["model.norm.weight"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"'decoder\.norm\.weight' is missing"):
        start_from(placed, directory, seed=0)
