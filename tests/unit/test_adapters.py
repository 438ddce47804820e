"""Adapter directories: they name their base and fit no other; exits.json and its weights belong together."""

import json
import shutil

import pytest
import torch

import eellm
from eellm.checkpoint import files
from eellm.errors import BaseMismatchError, CheckpointError, ConfigError, UnsupportedError
from tests.directories import assert_same_model, content, edit_json, spoil, with_adapter
from tests.models import tiny_model


def test_an_adapter_names_its_base_and_brings_it_along(tmp_path, monkeypatch):
    model = with_adapter(tmp_path)
    assert_same_model(eellm.load(tmp_path / "base", tmp_path / "adapter"), model)
    assert_same_model(eellm.load(tmp_path / "adapter"), model)
    monkeypatch.chdir(tmp_path / "adapter")
    assert_same_model(eellm.load("."), model)
    monkeypatch.chdir(tmp_path)
    assert_same_model(eellm.load("adapter"), model)
    assert eellm.load("base").config.exits == ()


def test_an_adapter_finds_its_base_after_both_moved_together(tmp_path):
    (tmp_path / "old" / "adapters").mkdir(parents=True)
    model = with_adapter(tmp_path / "old", adapter="adapters/mine")
    shutil.move(tmp_path / "old", tmp_path / "new")
    assert_same_model(eellm.load(tmp_path / "new" / "adapters" / "mine"), model)


def test_an_adapter_whose_base_is_gone_says_which_and_what_to_do(tmp_path):
    model = with_adapter(tmp_path)
    shutil.move(tmp_path / "base", tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"adapter.*base.*isn't there"):
        eellm.load(tmp_path / "adapter")
    assert_same_model(eellm.load(tmp_path / "elsewhere", tmp_path / "adapter"), model)


def test_an_adapter_is_refused_for_a_base_that_differs_by_a_seed_or_in_the_last_bit(tmp_path):
    with_adapter(tmp_path)
    eellm.save(tiny_model(dtype="float32", exits=(), seed=1), tmp_path / "other")
    nearly = eellm.load(tmp_path / "base")
    with torch.no_grad():
        weight = nearly.decoder.layers["4"].mlp.up.weight
        weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(1.0))
    eellm.save(nearly, tmp_path / "nearly")
    for wrong in ("other", "nearly"):
        with pytest.raises(BaseMismatchError, match="made for another base"):
            eellm.load(tmp_path / wrong, tmp_path / "adapter")
    shutil.rmtree(tmp_path / "base")
    (tmp_path / "nearly").rename(tmp_path / "base")
    with pytest.raises(BaseMismatchError):
        eellm.load(tmp_path / "adapter")


def test_an_adapter_is_taken_for_a_copy_of_its_base_in_other_shards_or_another_order(tmp_path):
    model = with_adapter(tmp_path)
    base = eellm.load(tmp_path / "base")
    for max_shard_bytes in (10_000, 50_000):
        eellm.save(base, tmp_path / "copy", max_shard_bytes=max_shard_bytes)
        assert_same_model(eellm.load(tmp_path / "copy", tmp_path / "adapter"), model)
    tensors = dict(files.read_tensors(tmp_path / "base" / "model.safetensors"))
    (tmp_path / "copy" / files.INDEX).unlink()
    files.write_tensors(
        tmp_path / "copy" / "model.safetensors", {name: tensors[name] for name in sorted(tensors)[::-1]}
    )
    assert_same_model(eellm.load(tmp_path / "copy", tmp_path / "adapter"), model)


def test_a_base_stored_in_another_dtype_is_another_base(tmp_path):
    with_adapter(tmp_path)
    eellm.save(eellm.load(tmp_path / "base", dtype="bfloat16"), tmp_path / "half")
    with pytest.raises(BaseMismatchError):
        eellm.load(tmp_path / "half", tmp_path / "adapter")


def test_an_adapter_keeps_to_the_dtype_asked_for(tmp_path):
    with_adapter(tmp_path)
    model = eellm.load(tmp_path / "adapter", dtype="bfloat16")
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}


def test_a_model_directory_is_no_adapter_for_another_model(tmp_path):
    eellm.save(tiny_model(dtype="float32"), tmp_path / "one")
    eellm.save(tiny_model(dtype="float32", exits=(), seed=1), tmp_path / "other")
    with pytest.raises(CheckpointError, match="names no base"):
        eellm.load(tmp_path / "other", tmp_path / "one")


def test_two_adapters_or_exits_at_the_same_layer_are_refused(tmp_path):
    with_adapter(tmp_path)
    with pytest.raises(CheckpointError, match="adapter itself"):
        eellm.load(tmp_path / "adapter", tmp_path / "adapter")
    model = eellm.load(tmp_path / "adapter")
    eellm.save(model, tmp_path / "whole")
    with pytest.raises(CheckpointError, match=r"adapter/exits\.json: exit at layer 1 is given twice"):
        eellm.load(tmp_path / "whole", tmp_path / "adapter")


def test_an_adapter_is_not_written_into_a_model_directory(tmp_path):
    model = with_adapter(tmp_path)
    before = content(tmp_path / "base")
    with pytest.raises(CheckpointError, match="is a model directory"):
        eellm.save_adapter(model, tmp_path / "base", base=tmp_path / "base")
    assert content(tmp_path / "base") == before


def test_an_adapter_holds_the_exits_that_its_base_lacks_and_no_others(tmp_path):
    model = tiny_model(dtype="float32")
    eellm.save(model, tmp_path / "base")
    eellm.add_exits(model, [eellm.ExitConfig(layer=4, kind="mlp")])
    eellm.save_adapter(model, tmp_path / "adapter", base=tmp_path / "base")
    assert_same_model(eellm.load(tmp_path / "adapter"), model)
    for layers, message in (((4, 5), "exit 5 is the base's own"), ((9,), "no exit at layer 9")):
        with pytest.raises(ConfigError, match=message):
            eellm.save_adapter(model, tmp_path / "wrong", base=tmp_path / "base", layers=layers)
    assert not (tmp_path / "wrong").exists()


# --- exits.json and exits.safetensors ---


def test_a_newer_format_is_refused_and_says_so(tmp_path):
    with_adapter(tmp_path)
    eellm.save(eellm.load(tmp_path / "adapter"), tmp_path / "model")
    for directory in (tmp_path / "adapter", tmp_path / "model"):
        edit_json(directory / "exits.json", format_version=2)
        with pytest.raises(UnsupportedError, match="has format 2, this release reads up to 1; upgrade"):
            eellm.load(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": ...}, "not an exits file"),
        ({"format_version": "1"}, "not an exits file"),
        ({"format_version": 0}, "not an exits file"),
        ({"exits": {}}, "not an exits file"),
        ({"base": "../base"}, "not an exits file"),
        ({"base": {"sha256": "ab"}}, "not an exits file"),
        (
            {"exits": [{"layer": 2, "kindd": "mlp"}]},
            r"exits\.json: unknown key 'exits\[0\]\.kindd' \(did you mean 'kind'",
        ),
        ({"exits": [{"layer": 6, "kind": "norm"}]}, r"exits\.json: exit at layer 6: the model has 6 layers"),
        ({"weights_sha256": ...}, "doesn't belong to the exits.json beside it"),
    ],
)
def test_a_malformed_exits_json_is_refused_with_its_name(tmp_path, changes, message):
    with_adapter(tmp_path)
    edit_json(tmp_path / "adapter" / "exits.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        eellm.load(tmp_path / "adapter")


def test_exits_weights_of_another_model_are_refused(tmp_path):
    model = with_adapter(tmp_path)
    with torch.no_grad():
        model.exit(3).norm.weight[0] += 1e-3
    eellm.save_adapter(model, tmp_path / "twin", base=tmp_path / "base")
    shutil.copy(tmp_path / "twin" / "exits.safetensors", tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"exits\.safetensors doesn't belong to the exits\.json beside it"):
        eellm.load(tmp_path / "adapter")


def test_exits_weights_that_do_not_fit_their_config_are_refused(tmp_path):
    with_adapter(tmp_path)
    exits = json.loads((tmp_path / "adapter" / "exits.json").read_text())["exits"]
    for changes in ({"gate_size": 16}, {"head": "own"}, {"gate_size": 0}):
        edit_json(tmp_path / "adapter" / "exits.json", exits=[*exits[:3], exits[3] | changes])
        with pytest.raises(CheckpointError, match="exit 5 doesn't fit"):
            eellm.load(tmp_path / "adapter")


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing"])
def test_damaged_exits_weights_are_refused_by_name(tmp_path, damage):
    with_adapter(tmp_path)
    file = tmp_path / "adapter" / "exits.safetensors"
    spoil(file, damage)
    with pytest.raises(CheckpointError, match=r"exits\.safetensors is (missing|truncated)"):
        eellm.load(tmp_path / "adapter")


def test_a_missing_adapter_is_named(tmp_path):
    with_adapter(tmp_path)
    with pytest.raises(CheckpointError, match=r"nowhere.*is missing"):
        eellm.load(tmp_path / "base", tmp_path / "nowhere")
