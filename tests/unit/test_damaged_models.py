"""Model directories that are damaged, incomplete or of a kind that we don't know: each is refused by name."""

import pytest
import torch

import eellm
from eellm.checkpoint import files
from eellm.errors import CheckpointError, ConfigError, UnsupportedError
from tests.directories import edit_json, spoil
from tests.models import tiny_model


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "cut in its header", "something else"])
@pytest.mark.parametrize("max_shard_bytes", [30_000, 10**9])
def test_damaged_weights_are_refused_by_name(tmp_path, damage, max_shard_bytes):
    eellm.save(tiny_model(dtype="float32"), tmp_path, max_shard_bytes=max_shard_bytes)
    file = max(tmp_path.glob("model*.safetensors"))
    spoil(file, damage)
    with pytest.raises(CheckpointError, match=rf"{file.name} is (missing|truncated or not a safetensors file)"):
        eellm.load(tmp_path)


def test_a_model_in_pytorch_s_own_format_is_refused(tmp_path):
    eellm.save(tiny_model(dtype="float32"), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="fetch the model again, as safetensors"):
        eellm.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.2.mlp.up_proj.weight"),
            r"'model\.layers\.2\.mlp\.up_proj\.weight' is missing \(1",
        ),
        (lambda t: t.pop("lm_head.weight"), r"tensor 'lm_head\.weight' is missing"),
        (lambda t: t.update(surplus=torch.ones(1)), "unexpected tensor 'surplus'"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(33)}),
            r"'model\.norm\.weight' has shape \(33,\), config\.json wants \(32,\)",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.k_proj.weight": torch.ones(32, 16)}),
            r"k_proj\.weight' has shape \(32, 16\), config\.json wants \(16, 32\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_named(tmp_path, change, message):
    eellm.save(tiny_model(dtype="float32"), tmp_path)
    tensors = dict(files.read_tensors(tmp_path / "model.safetensors"))
    change(tensors)
    files.write_tensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=message):
        eellm.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
            "architecture 'GPT2LMHeadModel' is not supported",
        ),
        ({"model_type": "mamba", "architectures": ...}, "architecture 'mamba' is not supported; known are llama,"),
        ({"model_type": ..., "architectures": ...}, "architecture None is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised with 'gptq'"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope type 'longrope' is not supported"),
        ({"rope_parameters": ..., "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        (
            {"rope_parameters": {"rope_type": "linear", "factr": 2.0}},
            r"rope parameter 'factr' is not supported \(did you mean 'factor'",
        ),
        ({"partial_rotary_factor": 0.5, "rope_parameters": ...}, r"partial_rotary_factor = 0\.5"),
        ({"hidden_act": "relu"}, "activation 'relu' is not supported"),
    ],
)
def test_configs_that_we_would_get_wrong_are_refused_by_name(tmp_path, changes, message):
    eellm.save(tiny_model(dtype="float32"), tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    with pytest.raises(UnsupportedError, match=message):
        eellm.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": ...}, r"config\.json has no 'hidden_size'"),
        ({"num_attention_heads": ...}, r"config\.json has no 'num_attention_heads'"),
        ({"intermediate_size": ...}, r"config\.json has no 'intermediate_size'"),
        ({"num_hidden_layers": "six"}, r"num_layers = 'six'"),
        ({"vocab_size": None}, r"vocab_size = None"),
        ({"num_attention_heads": 5}, "num_heads = 5: must be a multiple of num_kv_heads = 2"),
    ],
)
def test_a_malformed_config_is_refused_with_the_field_s_name(tmp_path, changes, message):
    eellm.save(tiny_model(dtype="float32"), tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        eellm.load(tmp_path)


def test_what_is_no_model_directory_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text("hello")
    for path, message in ((tmp_path / "nowhere", "no such model directory"), (tmp_path, r"has no config\.json")):
        with pytest.raises(CheckpointError, match=message):
            eellm.load(path)
    with pytest.raises(CheckpointError, match="not a model directory"):
        eellm.load(tmp_path / "text.txt")
    (tmp_path / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        eellm.load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json is not a JSON object"):
        eellm.load(tmp_path)


@pytest.mark.parametrize("device", ["cuda:77", "tpu", "cpu:x"])
def test_a_device_that_is_not_there_is_refused(tmp_path, device):
    eellm.save(tiny_model(dtype="float32"), tmp_path)
    with pytest.raises(ConfigError, match=f"device = '{device}'"):
        eellm.load(tmp_path, device=device)
    with pytest.raises(ConfigError, match=r"dtype = 'fp32': must be one of .* \(did you mean 'float32'"):
        eellm.load(tmp_path, dtype="fp32")


def test_features_that_no_architecture_combines_are_refused_before_anything_is_written(tmp_path):
    model = tiny_model(dtype="float32", qk_norm=True, mlp_bias=True)
    with pytest.raises(UnsupportedError, match="no Hugging Face architecture"):
        eellm.save(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
