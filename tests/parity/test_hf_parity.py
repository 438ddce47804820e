"""Logits against transformers, for seeded random models of every family and feature; greedy decoding too."""

import json

import pytest
import torch
import transformers as hf

import eellm

SIZES = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0, "beta_slow": 1.0}

FAMILIES = {
    "llama": hf.LlamaConfig(**SIZES),
    "llama, all biases": hf.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama, tied, geglu": hf.LlamaConfig(**SIZES, tie_word_embeddings=True, hidden_act="gelu"),
    "llama, tanh geglu, wide heads": hf.LlamaConfig(**SIZES, hidden_act="gelu_pytorch_tanh", head_dim=24),
    "smollm2": hf.LlamaConfig(**(SIZES | {"num_key_value_heads": 1}), tie_word_embeddings=True, rope_theta=100000.0),
    "llama, linear rope": hf.LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    ),
    "llama 3.1 rope": hf.LlamaConfig(**SIZES, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}),
    "llama, yarn": hf.LlamaConfig(**SIZES, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, **YARN}),
    "llama, yarn with mscale": hf.LlamaConfig(
        **SIZES,
        rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, **YARN, "mscale": 0.7, "mscale_all_dim": 1.2},
    ),
    "mistral": hf.MistralConfig(**SIZES, sliding_window=7),
    "mistral, no window": hf.MistralConfig(**SIZES, sliding_window=None),
    "qwen2": hf.Qwen2Config(**SIZES),
    "qwen2, sliding": hf.Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "qwen3": hf.Qwen3Config(**SIZES, head_dim=32),
    "qwen3, biases, tied": hf.Qwen3Config(**SIZES, head_dim=16, attention_bias=True, tie_word_embeddings=True),
}


@pytest.fixture(params=FAMILIES)
def saved(request, tmp_path):
    """A transformers model with random norms and biases as well, and the directory that it was saved in."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(FAMILIES[request.param], attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.2 + (0.0 if name.endswith("bias") else 1.0))
    model.save_pretrained(tmp_path / "hf")
    return model, tmp_path / "hf"


def tokens(num=200):
    return torch.randint(0, 101, (2, num), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def test_logits_equal_transformers_to_1e_4(saved):
    theirs, directory = saved
    ours = eellm.load(directory)
    expected = theirs(tokens()).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(ours(tokens())[3], expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.decoder(tokens()), expected, rtol=0, atol=1e-4)


@torch.inference_mode()
def test_transformers_reads_what_we_save_as_the_same_model(saved, tmp_path):
    theirs, directory = saved
    eellm.save(eellm.load(directory), tmp_path / "ours", max_shard_bytes=60_000)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 1
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    torch.testing.assert_close(again(tokens()).logits, theirs(tokens()).logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(eellm.load(tmp_path / "ours")(tokens())[3], theirs(tokens()).logits, rtol=0, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("max_shard_bytes", [10**9, 60_000])
def test_transformers_reads_a_directory_with_exits_as_the_base_alone(tmp_path, max_shard_bytes):
    torch.manual_seed(0)
    theirs = hf.AutoModelForCausalLM.from_config(FAMILIES["llama"]).eval()
    theirs.save_pretrained(tmp_path / "hf")
    model = eellm.load(tmp_path / "hf")
    eellm.add_exits(model, [eellm.ExitConfig(layer=1, kind="mlp", head="own")])
    eellm.save(model, tmp_path / "ours", max_shard_bytes=max_shard_bytes)
    again, report = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert again.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in theirs.state_dict().items())


def test_full_depth_generation_equals_transformers_greedy_generate(saved):
    theirs, directory = saved
    prompt = tokens(17)[0].tolist()
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0, len(prompt) :].tolist()
    (out,) = eellm.generate(eellm.load(directory), [prompt], max_new_tokens=40, method="full")
    assert out.tokens == expected


def test_an_end_of_text_token_ends_the_text_and_the_generation_config_knows_all_of_them(tmp_path):
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**(SIZES | {"eos_token_id": 2}))).eval()
    model.save_pretrained(tmp_path)
    prompt = [5, 6, 7]
    ours = eellm.load(tmp_path)
    (free,) = eellm.generate(ours, [prompt], max_new_tokens=20, method="full", ignore_eos=True)
    end = free.tokens[7]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, end]}))
    ours = eellm.load(tmp_path)
    assert ours.config.eos_token_ids == (2, end)
    for ends, expected in (([end], (2, end)), (end, (2, end)), (None, (2,)), ([end, 2], (2, end))):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        assert eellm.load(tmp_path).config.eos_token_ids == expected, "those of config.json end a text too"
    (out,) = eellm.generate(ours, [prompt], max_new_tokens=20, method="full")
    assert out.tokens == free.tokens[: free.tokens.index(end) + 1]
    assert out.finish_reason == "eos"
