"""Model directories: what is saved is read back bit for bit, and exits are added without touching what is there."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import eellm
from eellm.checkpoint import files
from eellm.checkpoint.names import to_hf_name
from eellm.errors import ConfigError
from tests.directories import TOKENS, assert_same_model, assert_same_weights, content
from tests.models import EXITS, tiny_model
from tests.worlds import sentencepiece_tokenizer, tiny_tokenizer

MODELS = Path(__file__).parents[2] / "models"
MORE_EXITS = (
    eellm.ExitConfig(layer=3, kind="layer", head="own", gate_size=4),
    eellm.ExitConfig(layer=4, kind="mlp"),
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_a_saved_model_with_exits_of_all_kinds_is_read_back_bit_for_bit(tmp_path, dtype):
    model = tiny_model(dtype=dtype, tie_embeddings=dtype == "float16")
    eellm.save(model, tmp_path / "model")
    assert_same_model(eellm.load(tmp_path / "model", dtype=dtype), model)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == dtype


def test_weights_stored_in_bfloat16_are_read_as_the_same_values_in_float32(tmp_path):
    model = tiny_model(dtype="bfloat16")
    eellm.save(model, tmp_path / "model")
    assert_same_model(eellm.load(tmp_path / "model"), model.float())


def test_a_sharded_model_is_the_same_model(tmp_path):
    model = tiny_model(dtype="float32")
    eellm.save(model, tmp_path / "model", max_shard_bytes=30_000)
    shards = sorted((tmp_path / "model").glob("model-*-of-*.safetensors"))
    assert len(shards) > 2
    assert all(shard.stat().st_size < 32_000 for shard in shards)
    assert not (tmp_path / "model" / "model.safetensors").exists()
    assert_same_model(eellm.load(tmp_path / "model"), model)


def test_saving_with_other_shards_over_a_model_leaves_no_shard_of_the_old_one(tmp_path):
    old, new = tiny_model(dtype="float32", seed=1), tiny_model(dtype="float32", seed=2)
    for first, second in ((30_000, 10**9), (10**9, 30_000), (30_000, 60_000)):
        eellm.save(old, tmp_path / "model", max_shard_bytes=first)
        eellm.save(new, tmp_path / "model", max_shard_bytes=second)
        assert_same_model(eellm.load(tmp_path / "model"), new)
        eellm.save(new, tmp_path / "fresh", max_shard_bytes=second)
        assert content(tmp_path / "model") == content(tmp_path / "fresh")
        shutil.rmtree(tmp_path / "fresh")


def test_ends_of_text_the_bos_token_and_the_tokenizer_are_read_back(tmp_path):
    model = tiny_model(dtype="float32", vocab_size=512, bos_token_id=1, eos_token_ids=(0, 5))
    model.tokenizer = tiny_tokenizer()
    eellm.save(model, tmp_path / "model")
    found = eellm.load(tmp_path / "model")
    assert (found.config.bos_token_id, found.config.eos_token_ids) == (1, (0, 5))
    assert found.tokenizer.files() == tiny_tokenizer().files()
    assert eellm.load(tmp_path / "model").tokenizer.encode("for x in y") == tiny_tokenizer().encode("for x in y")


def test_a_model_can_be_saved_over_the_directory_that_it_was_read_from(tmp_path):
    model = tiny_model(dtype="float32")
    eellm.save(model, tmp_path / "model")
    before = content(tmp_path / "model")
    eellm.save(eellm.load(tmp_path / "model"), tmp_path / "model")
    assert content(tmp_path / "model") == before


def test_what_is_saved_after_generating_is_what_was_saved_before(tmp_path):
    model = tiny_model(dtype="float32", tie_embeddings=True)
    eellm.save(model, tmp_path / "before")
    eellm.generate(model, [[1, 2, 3]], max_new_tokens=3, threshold=0.3)
    eellm.save(model, tmp_path / "after")
    assert content(tmp_path / "after") == content(tmp_path / "before")


def test_a_model_can_be_saved_into_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    model = tiny_model(dtype="float32")
    eellm.save(model, ".")
    assert_same_model(eellm.load("."), model)
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_files_of_others_in_the_directory_stay(tmp_path):
    (tmp_path / "model").mkdir()
    others = {"README.md": b"mine", "model_card.safetensors": b"mine too"}
    for name, data in others.items():
        (tmp_path / "model" / name).write_bytes(data)
    eellm.save(tiny_model(dtype="float32"), tmp_path / "model")
    assert content(tmp_path / "model").items() >= others.items()


def test_saving_a_model_without_exits_over_one_with_exits_removes_the_exits_files(tmp_path):
    eellm.save(tiny_model(dtype="float32"), tmp_path / "model")
    plain = tiny_model(dtype="float32", exits=(), seed=1)
    eellm.save(plain, tmp_path / "model")
    assert not list((tmp_path / "model").glob("exits*"))
    assert_same_model(eellm.load(tmp_path / "model"), plain)


def files_for_vllm(directory):
    """As `filter_duplicate_safetensors_files` of vllm/model_executor/model_loader/weight_utils.py (vLLM 0.32) leaves
    them; all of them go into the model, and an unknown name is an error there."""
    index = directory / "model.safetensors.index.json"
    named = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else None
    found = {path.name for path in directory.glob("*.safetensors")}
    assert named is None or named <= found, "vLLM raises FileNotFoundError"
    return found if named is None else found & named


def assert_only_the_base_s_weights_are_for_vllm(directory):
    names = [name for file in files_for_vllm(directory) for name, _ in files.read_tensors(directory / file)]
    assert sorted(names) == sorted(to_hf_name(n) for n, _ in eellm.load(directory).decoder.named_parameters())


def test_vllm_s_rule_leaves_the_base_s_weights_alone_of_a_directory_with_exits(tmp_path):
    for num, max_shard_bytes in enumerate((10**9, 30_000)):
        eellm.save(tiny_model(dtype="float32"), tmp_path / str(num), max_shard_bytes=max_shard_bytes)
        assert (tmp_path / str(num) / "exits.safetensors").exists()
        assert_only_the_base_s_weights_are_for_vllm(tmp_path / str(num))
    index = json.loads((tmp_path / "0" / files.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for _, t in files.read_tensors(tmp_path / "0" / "model.safetensors")
    )
    eellm.save(tiny_model(dtype="float32", exits=()), tmp_path / "0")
    assert not (tmp_path / "0" / files.INDEX).exists(), "one file alone needs none"


@pytest.mark.parametrize("name", ["english", "english-bytes"])
def test_vllm_s_rule_leaves_the_base_s_weights_alone_of_the_models_here(name):
    assert_only_the_base_s_weights_are_for_vllm(MODELS / name)


def test_saving_another_tokenizer_over_one_with_a_chat_template_removes_the_template(tmp_path):
    model = tiny_model(dtype="float32", vocab_size=512)
    for tokenizer in (tiny_tokenizer(), sentencepiece_tokenizer()):
        model.tokenizer = tokenizer
        eellm.save(model, tmp_path / "model")
    found = eellm.load(tmp_path / "model").tokenizer
    assert found.chat_template is None
    assert found.files() == sentencepiece_tokenizer().files()


# --- adding exits ---


def test_adding_exits_changes_nothing_that_was_there_in_memory_or_on_disk(tmp_path):
    first = (EXITS[0], EXITS[3])
    model = tiny_model(dtype="float32", exits=first)
    eellm.save(model, tmp_path / "model")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.inference_mode():
        logits = model(TOKENS)
    files_before = content(tmp_path / "model")
    eellm.add_exits(model, [EXITS[1], EXITS[2]], init="copy")
    assert model.config.exit_layers == (1, 2, 3, 5)
    assert_same_weights({name: model.state_dict()[name] for name in before}, before)
    with torch.inference_mode():
        assert all(torch.equal(model(TOKENS)[layer], logits[layer]) for layer in (1, 5, 6))
    eellm.save_adapter(model, tmp_path / "adapter", base=tmp_path / "model", layers=(2, 3))
    assert content(tmp_path / "model") == files_before
    assert_same_model(eellm.load(tmp_path / "adapter"), model)
    stored = dict(files.read_tensors(tmp_path / "model" / "exits.safetensors"))
    eellm.save(model, tmp_path / "model")
    again = dict(files.read_tensors(tmp_path / "model" / "exits.safetensors"))
    assert stored
    assert_same_weights({name: again[name] for name in stored}, stored)


def test_exits_that_can_not_be_added_leave_the_model_as_it_was():
    model = tiny_model(dtype="float32", exits=EXITS[:2])
    config, before = model.config, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for wrong in ([EXITS[2], EXITS[0]], [eellm.ExitConfig(layer=6)], [EXITS[2], EXITS[2]]):
        with pytest.raises(ConfigError):
            eellm.add_exits(model, wrong)
        assert model.config == config
        assert_same_weights(model.state_dict(), before)


def test_copied_exits_start_from_the_model_s_own_parts():
    model = tiny_model(exits=())
    with torch.no_grad():
        for name, parameter in model.decoder.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    eellm.add_exits(model, [*MORE_EXITS, eellm.ExitConfig(layer=5, kind="norm", head="own")])
    weights, own = model.decoder.state_dict(), model.exits.state_dict()
    for layer in (3, 5):
        assert torch.equal(own[f"{layer}.output.weight"], weights["output.weight"])
    for layer in (3, 4, 5):
        assert torch.equal(own[f"{layer}.norm.weight"], weights["norm.weight"])
    for part in ("attn.q", "mlp.down", "attn_norm"):
        assert torch.equal(own[f"3.body.{part}.weight"], weights[f"layers.6.{part}.weight"])
    assert torch.equal(own["4.body.mlp.up.weight"], weights["layers.5.mlp.up.weight"]), "the next layer's"
    assert torch.equal(own["4.body.norm.weight"], weights["layers.5.mlp_norm.weight"])
    assert own["5.output.weight"].data_ptr() != weights["output.weight"].data_ptr(), "a copy, not the matrix itself"


def test_random_exits_are_the_same_for_the_same_seed_and_no_two_layers_are_alike():
    exits = [eellm.ExitConfig(layer=n, kind="mlp") for n in (2, 4)]
    states = []
    for seed in (1, 1, 2):
        model = tiny_model(exits=())
        eellm.add_exits(model, exits, init="random", seed=seed)
        states.append(model.exits.state_dict())
    assert_same_weights(states[0], states[1])
    name = "2.body.mlp.up.weight"
    assert not torch.equal(states[0][name], states[2][name])
    assert not torch.equal(states[0][name], states[0][name.replace("2", "4", 1)])


@torch.inference_mode()
def test_layerskip_exits_have_no_parameters_and_are_the_logit_lens(tmp_path):
    exits = tuple(eellm.ExitConfig(layer=n, kind="norm", norm="final", head="tied") for n in (2, 4))
    model = tiny_model(dtype="float32", exits=exits)
    assert list(model.exits.parameters()) == []
    eellm.save(model, tmp_path / "model")
    found = eellm.load(tmp_path / "model")
    assert_same_model(found, model)
    decoder, hidden = model.decoder, model.decoder.embed(TOKENS)
    rows = decoder.rows(TOKENS.shape[1])
    for layer in range(1, 7):
        hidden = decoder.layers[str(layer)](hidden, rows)
        if layer in (2, 4, 6):
            assert torch.equal(found(TOKENS)[layer], decoder.output(decoder.norm(hidden)))


def test_whoever_may_read_a_new_file_may_read_the_weights(tmp_path):
    (tmp_path / "plain").touch()
    files.write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2)})
    files.write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(2)})  # over itself, too
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
