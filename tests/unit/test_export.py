"""`eellm export`: a training run's checkpoint becomes a model directory that transformers reads, exits beside it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import eellm
from eellm.checkpoint import hf as hf_files
from eellm.checkpoint.export import find_checkpoint, load_checkpoint
from eellm.checkpoint.store import Store
from eellm.cli.main import main
from eellm.config.load import to_dict
from eellm.config.train import TextConfig, TrainConfig, TrainLoopConfig
from eellm.errors import CheckpointError
from tests.directories import assert_same_model, assert_same_weights, content, edit_json
from tests.models import tiny_config, tiny_model
from tests.ranks import run_on_ranks
from tests.worlds import tiny_tokenizer

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 500, 511]])


def trained(*, seed=0, **changes):
    """A model as a run has it: exits of every kind, no tokenizer, no ends of text."""
    return tiny_model(seed=seed, dtype="float32", vocab_size=512, **changes)


def save_checkpoint(out_dir, model, step, *, hold=lambda tensor: tensor, tokenizer=tiny_tokenizer):
    """What a run of `model` would leave: its optimizer's state too, and a tied matrix under one name."""
    recipe = TrainConfig(
        model=model.config, data=TextConfig(train=("text.txt",)), train=TrainLoopConfig(out_dir=Path("run"))
    )
    weights = {f"model.{name}": hold(parameter.detach()) for name, parameter in model.named_parameters()}
    moments = {f"optim.exp_avg.{name}": torch.ones_like(tensor) for name, tensor in weights.items()}
    files = {} if tokenizer is None else tokenizer().files()
    store = Store(out_dir / "checkpoints", keep=5)
    store.save(step, weights | moments, {"step": step, "recipe": json.loads(json.dumps(to_dict(recipe)))}, files)
    store.wait()
    return out_dir / "checkpoints" / f"step-{step:08d}"


def with_tokenizer(model):
    """The model as its export should be read back."""
    model.tokenizer, model.config = tiny_tokenizer(), replace(model.config, eos_token_ids=(0,))
    return model


@pytest.fixture
def run(capfd):
    """Runs a command; gives its exit code and what it wrote to stderr. Nothing may be on stdout."""

    def call(*args):
        code = main([str(arg) for arg in args])
        out, err = capfd.readouterr()
        assert out == ""
        return code, err

    return call


@pytest.mark.parametrize("tie", [False, True])
@torch.inference_mode()
def test_the_export_is_the_model_and_transformers_reads_it(tmp_path, run, tie):
    model = trained(tie_embeddings=tie)
    step = save_checkpoint(tmp_path / "run", model, 100)
    code, err = run("export", step, tmp_path / "out")
    assert code == 0
    assert err.count("\n") == 1
    assert "exits: 1, 2, 3, 5" in err
    assert not dist.is_initialized()

    found = eellm.load(tmp_path / "out")
    assert_same_model(found, with_tokenizer(model))
    assert found.tokenizer.files() == tiny_tokenizer().files()
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    expected = model(TOKENS)[6]
    assert expected.std() > 0.5
    torch.testing.assert_close(theirs(TOKENS).logits, expected, rtol=0, atol=1e-4)
    assert theirs.config.tie_word_embeddings == tie
    assert theirs.generation_config.eos_token_id == 0
    text = "for x in range(10)"
    assert hf.AutoTokenizer.from_pretrained(tmp_path / "out")(text).input_ids == tiny_tokenizer().encode(text)


def save_in_shards(out_dir, tie):
    mesh = init_device_mesh("cpu", (2,))
    save_checkpoint(out_dir, trained(tie_embeddings=tie), 7, hold=lambda t: distribute_tensor(t, mesh, [Shard(0)]))


@pytest.mark.parametrize("tie", [False, True])
def test_a_checkpoint_of_several_processes_is_exported_by_one(tmp_path, run, tie):
    run_on_ranks(2, save_in_shards, tmp_path / "run", tie)
    assert run("export", tmp_path / "run", tmp_path / "out")[0] == 0
    assert_same_model(eellm.load(tmp_path / "out"), with_tokenizer(trained(tie_embeddings=tie)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_are_written_in_the_dtype_that_was_asked_for(tmp_path, run, dtype):
    step = save_checkpoint(tmp_path / "run", trained(), 1)
    assert run("export", step, tmp_path / "out", "--dtype", dtype)[0] == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    found = eellm.load(tmp_path / "out", dtype=dtype)
    assert_same_weights(found.state_dict(), trained().to(getattr(torch, dtype)).state_dict())


def test_of_a_run_the_newest_checkpoint_is_taken(tmp_path):
    for step in (80, 100):
        save_checkpoint(tmp_path, trained(seed=step), step)
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-00000100"
    assert_same_weights(load_checkpoint(tmp_path).state_dict(), trained(seed=100).state_dict())
    old = tmp_path / "checkpoints" / "step-00000080"
    assert_same_weights(load_checkpoint(old).state_dict(), trained(seed=80).state_dict())


def test_a_checkpoint_may_have_moved_and_may_have_no_tokenizer(tmp_path, run):
    step = save_checkpoint(tmp_path / "run", trained(), 1, tokenizer=None)
    step.rename(tmp_path / "best")
    assert run("export", tmp_path / "best", tmp_path / "out")[0] == 0
    found = eellm.load(tmp_path / "out")
    assert found.tokenizer is None
    assert_same_model(found, trained())


def test_ends_of_text_that_the_recipe_names_stay(tmp_path):
    model = trained(eos_token_ids=(3, 4), bos_token_id=5)
    config = load_checkpoint(save_checkpoint(tmp_path, model, 1)).config
    assert (config.eos_token_ids, config.bos_token_id) == ((3, 4), 5)


# --- what is refused ---


def cut_a_file(step):
    (step / "__0_0.distcp").write_bytes((step / "__0_0.distcp").read_bytes()[:-1])


def cut_the_tokenizer(step):
    (step / "tokenizer.json").write_bytes(b"{}")


def cut_the_marker(step):
    (step / "checkpoint.json").write_text("{")


def touch_the_marker(step):
    edit_json(step / "checkpoint.json", step=2)


def remove_the_marker(step):
    (step / "checkpoint.json").unlink()


def remove_all(step):
    shutil.rmtree(step)


def replace_by_a_file(step):
    shutil.rmtree(step)
    step.write_text("a file")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (cut_a_file, "__0_0.distcp has"),
        (cut_the_tokenizer, "tokenizer.json has"),
        (cut_the_marker, "checkpoint.json is not JSON"),
        (touch_the_marker, "checkpoint.json is damaged"),
        (remove_the_marker, "not a checkpoint"),
        (remove_all, "no such checkpoint"),
        (replace_by_a_file, "not a checkpoint"),
    ],
)
def test_what_is_no_whole_checkpoint_is_refused_with_one_line_and_nothing_is_written(tmp_path, run, spoil, words):
    step = save_checkpoint(tmp_path / "run", trained(), 1)
    spoil(step)
    before = content(tmp_path)
    code, err = run("export", step, tmp_path / "out")
    assert (code, err.count("\n")) == (2, 1)
    assert words in err
    assert str(step) in err
    assert content(tmp_path) == before


def of_model(**changes):
    return {"recipe": {"model": to_dict(tiny_config(**changes))}}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({}, "holds no recipe"),
        ({"recipe": {"train": {}}}, "holds no recipe"),
        ({"recipe": {"model": {"num_layer": 2}}}, "'model.num_layer' (did you mean 'num_layers'?)"),
        (of_model(vocab_size=512, num_layers=7), "tensor 'model.decoder.layers.7."),
        (of_model(vocab_size=513), "has shape (512, 32), the model's is (513, 32)"),
    ],
)
def test_a_state_of_no_model_or_of_another_one_is_refused(tmp_path, run, state, words):
    store = Store(tmp_path / "checkpoints", keep=1)
    store.save(1, {f"model.{name}": p.detach() for name, p in trained().named_parameters()}, state)
    store.wait()
    code, err = run("export", tmp_path, tmp_path / "out")
    assert (code, err.count("\n")) == (2, 1)
    assert words in err
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_names_the_one_before_it(tmp_path):
    for step in (80, 100):
        newest = save_checkpoint(tmp_path, trained(), step)
    cut_a_file(newest)
    with pytest.raises(CheckpointError, match="the one before it is step 80"):
        load_checkpoint(tmp_path)


def test_the_checkpoint_s_own_directory_is_not_written_to(tmp_path, run):
    step = save_checkpoint(tmp_path / "run", trained(), 1)
    before = content(tmp_path)
    for args in ((step, step), (tmp_path / "run", tmp_path / "run"), (tmp_path / "run", step)):
        code, err = run("export", *args)
        assert code == 2
        assert "name another directory to write" in err
    assert content(tmp_path) == before


def test_a_full_disk_leaves_the_old_export(tmp_path, run, monkeypatch):
    step = save_checkpoint(tmp_path / "run", trained(), 1)
    assert run("export", step, tmp_path / "out")[0] == 0
    before = content(tmp_path)

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_files, "write_sharded", full)
    code, err = run("export", step, tmp_path / "out", "--dtype", "float16")
    assert code == 2
    assert "the disk is full; nothing was changed" in err
    assert content(tmp_path) == before
