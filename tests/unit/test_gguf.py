"""Tiny GGUF files, written with the gguf package from known Hugging Face tensors, are read back."""

import json
import math
import sys

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from eellm.checkpoint.gguf import read_gguf
from eellm.errors import CheckpointError, UnsupportedError

KIND = gguf.GGMLQuantizationType
HIDDEN, MLP, HEADS, KV_HEADS, VOCAB, LAYERS = 256, 512, 8, 4, 40, 2  # K-quants need rows of a multiple of 256
HEAD_DIM = HIDDEN // HEADS
QUANTISED = ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1", "Q4_K", "Q6_K"]
VALUE = gguf.GGUFValueType
VALUE_TYPES = {bool: VALUE.BOOL, int: VALUE.UINT32, float: VALUE.FLOAT32, str: VALUE.STRING, list: VALUE.ARRAY}


# --- writing ---


def hf_tensors(arch, *, biases=(), tied=False):
    """Random float32 tensors under Hugging Face's names. `biases`: projections that have one."""
    rng = np.random.default_rng(0)
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    projections = {
        "self_attn.q_proj": (q, HIDDEN),
        "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, q),
        "mlp.gate_proj": (MLP, HIDDEN),
        "mlp.up_proj": (MLP, HIDDEN),
        "mlp.down_proj": (HIDDEN, MLP),
    }
    norms = {"input_layernorm": HIDDEN, "post_attention_layernorm": HIDDEN}
    if arch == "qwen3":
        norms |= {"self_attn.q_norm": HEAD_DIM, "self_attn.k_norm": HEAD_DIM}
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    shapes |= {} if tied else {"lm_head.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in projections.items()}
        shapes |= {f"model.layers.{layer}.{name}.weight": (size,) for name, size in norms.items()}
        shapes |= {f"model.layers.{layer}.{name}.bias": projections[name][:1] for name in biases}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def row_order(arch, name):
    """Which of Hugging Face's rows llama.cpp's converter stores first, second, and so on; None: as they are."""
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
    if arch != "llama" or heads is None:
        return None
    return np.arange(heads * HEAD_DIM).reshape(heads, 2, HEAD_DIM // 2).swapaxes(1, 2).ravel()


def encode(values, kind):
    """`values` as blocks of `kind`; random blocks where the gguf package only knows how to read them."""
    try:
        return gguf.quantize(values, kind)
    except NotImplementedError:
        block, num_bytes = gguf.GGML_QUANT_SIZES[kind]
        shape = (*values.shape[:-1], values.shape[-1] // block * num_bytes)
        return np.random.default_rng(1).integers(0, 60, shape).astype(np.uint8)  # below 60: no scale is infinite


def write_gguf(path, arch, tensors, kind=KIND.F32, *, metadata=None, add=None, endian=gguf.GGUFEndian.LITTLE):
    """Writes the file, with further `metadata` and tensors (`add`); returns what each tensor should be read as."""
    sizes = {
        "context_length": 128,
        "embedding_length": HIDDEN,
        "feed_forward_length": MLP,
        "block_count": LAYERS,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.dimension_count": HEAD_DIM,
        "rope.freq_base": 500000.0,
    }
    writer = gguf.GGUFWriter(path, arch, endianess=endian)
    for key, value in ({f"{arch}.{key}": value for key, value in sizes.items()} | (metadata or {})).items():
        if value is not None:
            writer.add_key_value(key, value, VALUE_TYPES[type(value)])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], LAYERS)
    expected = {}
    for name, values in tensors.items():
        order = row_order(arch, name)
        stored = values if order is None else values[order]
        used = kind if values.ndim == 2 else KIND.F32
        data = encode(stored, used)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), data, raw_dtype=used)
        read = gguf.dequantize(data, used).astype(np.float32)
        expected[name] = np.empty_like(read)
        expected[name][slice(None) if order is None else order] = read
    for name, values in (add or {}).items():
        writer.add_tensor(name, values)
    finish(writer)
    return expected


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "m.gguf"


def write_llama(path, **options):
    return write_gguf(path, "llama", hf_tensors("llama"), **options)


def assert_same(model, expected):
    got = dict(model.tensors())
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()
        torch.testing.assert_close(tensor, torch.from_numpy(expected[name]), rtol=0, atol=0)


# --- weights ---

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ATTENTION = (*QKV, "self_attn.o_proj")
ALL = (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("arch", "biases"), [("llama", ()), ("llama", ALL), ("qwen2", QKV), ("qwen3", ()), ("qwen3", ATTENTION)]
)
def test_float32_weights_come_back_exactly_as_hugging_face_has_them(file, arch, biases, tied):
    tensors = hf_tensors(arch, biases=biases, tied=tied)
    write_gguf(file, arch, tensors)
    assert_same(read_gguf(file), tensors)


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_other_types_come_back_as_their_dequantised_values(file, arch, kind):
    expected = write_gguf(file, arch, hf_tensors(arch), KIND[kind])
    assert_same(read_gguf(file), expected)


def test_a_tensor_is_dequantised_only_when_it_is_asked_for(file, monkeypatch):
    write_llama(file, kind=KIND.Q8_0)
    sizes = []
    dequantize = gguf.dequantize
    monkeypatch.setattr(gguf, "dequantize", lambda data, kind: sizes.append(data.size) or dequantize(data, kind))
    tensors = read_gguf(file).tensors()
    assert max(sizes) < VOCAB  # single blocks, to see whether their types are known
    sizes.clear()
    next(tensors)
    assert len(sizes) == 1


def test_changing_a_tensor_leaves_the_file_alone(file):
    tensors = hf_tensors("llama")
    write_gguf(file, "llama", tensors)
    model = read_gguf(file)
    for _, tensor in model.tensors():
        tensor.zero_()
    assert_same(model, tensors)


# --- config ---


def test_the_config_is_what_hugging_face_would_write(file):
    ids = {"bos": 1, "eos": 2, "eot": 5, "padding": 2}
    write_llama(file, metadata={f"tokenizer.ggml.{name}_token_id": index for name, index in ids.items()})
    assert read_gguf(file).config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": 500000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "bos_token_id": 1,
        "eos_token_id": [2, 5],
        "pad_token_id": 2,
    }


def test_biases_and_a_tied_head_are_known_by_the_tensors(file):
    write_gguf(file, "llama", hf_tensors("llama", biases=ATTENTION, tied=True))
    config = read_gguf(file).config
    assert (config["attention_bias"], config["mlp_bias"], config["tie_word_embeddings"]) == (True, False, True)


def test_heads_may_be_wider_than_the_hidden_size_allows(file):
    tensors = hf_tensors("qwen3")
    sizes = {"attention.key_length": HEAD_DIM, "attention.value_length": HEAD_DIM, "embedding_length": HIDDEN // 2}
    write_gguf(file, "qwen3", tensors, metadata={f"qwen3.{key}": value for key, value in sizes.items()})
    assert read_gguf(file).config["head_dim"] == HEAD_DIM


SCALINGS = {
    "none": ({"type": "none", "factor": 4.0}, {"rope_type": "default"}),
    "no type is linear": ({"factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "linear": ({"type": "linear", "factor": 2.5}, {"rope_type": "linear", "factor": 2.5}),
    "a factor of one": ({"type": "linear", "factor": 1.0}, {"rope_type": "default"}),
    "yarn": (
        {"type": "yarn", "factor": 4.0, "original_context_length": 32, "yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0,
         "yarn_attn_factor": 1.2},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0,
         "beta_slow": 2.0, "attention_factor": 1.2},
    ),
    "yarn of the context": (
        {"type": "yarn", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SCALINGS)
def test_rope_scaling_is_said_in_hugging_face_words(file, case):
    scaling, expected = SCALINGS[case]
    write_llama(file, metadata={f"llama.rope.scaling.{key}": value for key, value in scaling.items()})
    assert read_gguf(file).config["rope_parameters"] == {"rope_theta": 500000.0, **expected}


def llama3_divisors(factor, low=1.0, high=4.0, original=8192):
    """The tensor that llama.cpp's converter writes for Llama 3.1 and later."""
    divisors = []
    for i in range(0, HEAD_DIM, 2):
        turns = original * 500000.0 ** (-i / HEAD_DIM) / (2 * math.pi)
        smooth = (turns - low) / (high - low)
        divisors.append(1 if turns > high else factor if turns < low else 1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_rope_scaling_is_known_by_its_tensor(file, factor):
    write_llama(file, add={"rope_freqs.weight": llama3_divisors(factor)})
    model = read_gguf(file)
    bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    expected = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, **bands}
    assert model.config["rope_parameters"] == expected
    assert not any("rope" in name for name, _ in model.tensors())


@pytest.mark.parametrize(
    "divisors", [llama3_divisors(8.0, high=2.0), llama3_divisors(8.0)[:-1], np.full(HEAD_DIM // 2, 8, np.float32)]
)
def test_other_rope_tensors_are_refused(file, divisors):
    write_llama(file, add={"rope_freqs.weight": divisors})
    with pytest.raises(UnsupportedError, match=r"rope_freqs.weight"):
        read_gguf(file)


# --- errors ---


def assert_refused(path, error, *words):
    with pytest.raises(CheckpointError) as caught:
        read_gguf(path)
    message = str(caught.value)
    assert type(caught.value) is error
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_missing_file_is_said_to_be_missing(file):
    assert_refused(file, CheckpointError, "No such file")


@pytest.mark.parametrize("content", [b"", b"GG", b"a plain text", b"GGUF", b"\x80" * 99], ids=repr)
def test_a_file_that_is_no_gguf_is_refused(file, content):
    file.write_bytes(content)
    assert_refused(file, CheckpointError, "not a GGUF file")


def test_a_file_cut_anywhere_is_refused(file):
    write_llama(file, metadata=TOKENIZER)
    content, cut = file.read_bytes(), file.with_name("cut.gguf")
    for length in [*range(8, 400, 13), *range(400, len(content) - 1, len(content) // 20), len(content) - 1]:
        cut.write_bytes(content[:length])
        assert_refused(cut, CheckpointError)


def test_without_the_gguf_package_the_error_says_how_to_install_it(file, monkeypatch):
    write_llama(file)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert_refused(file, CheckpointError, "pip install 'eellm[gguf]'")


def test_an_unknown_architecture_is_named_with_the_nearest_one(file):
    finish(gguf.GGUFWriter(file, "qwen3moe"))
    assert_refused(file, UnsupportedError, "'qwen3moe'", "did you mean 'qwen3'")


def test_a_later_version_of_the_format_is_named(file):
    write_llama(file)
    content = file.read_bytes()
    file.write_bytes(b"GGUF" + (9).to_bytes(4, "little") + content[8:])
    assert_refused(file, UnsupportedError, "version 9")


def test_a_file_of_the_other_byte_order_is_refused(file):
    write_llama(file, endian=gguf.GGUFEndian.BIG)
    assert_refused(file, UnsupportedError, "byte order")


def test_a_tensor_type_that_the_package_cannot_dequantise_is_named(file):
    write_llama(file, add={"output.bias": np.zeros(8, np.float64)})
    assert_refused(file, UnsupportedError, "output.bias", "F64")


def test_a_tensor_type_that_the_package_does_not_know_is_named(file):
    write_llama(file)
    content = bytearray(file.read_bytes())
    place = content.index(b"output_norm.weight") + len(b"output_norm.weight") + 4 + 8  # after the only dimension
    content[place : place + 4] = (999).to_bytes(4, "little")
    file.write_bytes(content)
    assert_refused(file, UnsupportedError, "999")


@pytest.mark.parametrize("name", ["blk.1.ffn_gate_inp.weight", "blk.2.attn_norm.weight"])
def test_a_tensor_that_such_a_model_does_not_have_is_named(file, name):
    write_llama(file, add={name: np.zeros(HIDDEN, np.float32)})
    assert_refused(file, UnsupportedError, name, "llama")


@pytest.mark.parametrize(("name", "stored"), [("layers.1.mlp.up_proj", "blk.1.ffn_up"), ("embed_tokens", "token_embd")])
def test_a_tensor_that_is_missing_is_named(file, name, stored):
    tensors = hf_tensors("llama")
    del tensors[f"model.{name}.weight"]
    write_gguf(file, "llama", tensors)
    assert_refused(file, CheckpointError, f"{stored}.weight", "missing")


def test_heads_that_do_not_fit_the_rows_are_refused(file):
    write_llama(file, metadata={"llama.attention.head_count_kv": 2})
    assert_refused(file, CheckpointError, "blk.0.attn_k.weight", "128 rows")


@pytest.mark.parametrize(
    ("error", "key", "value"),
    [
        (UnsupportedError, "split.count", 2),
        (UnsupportedError, "llama.rope.scaling.type", "longrope"),
        (UnsupportedError, "llama.rope.scaling.yarn_ext_factor", 0.5),
        (UnsupportedError, "llama.rope.dimension_count", 16),
        (UnsupportedError, "llama.attention.sliding_window", 64),
        (UnsupportedError, "llama.attention.causal", False),
        (CheckpointError, "llama.feed_forward_length", [512, 256]),
        (CheckpointError, "llama.block_count", None),
    ],
)
def test_metadata_that_is_missing_or_would_change_the_result_is_named(file, error, key, value):
    write_llama(file, metadata={key: value})
    said = "llama-gguf-split --merge" if key == "split.count" else f"{key.removeprefix('llama.')} = {value!r}"
    assert_refused(file, error, said)


# --- tokenizer (its own tests are in test_gguf_tokenizer.py) ---

TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["h", "i", "1", "hi", "<end>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 1, 3],
    "tokenizer.ggml.merges": ["h i"],
    "tokenizer.ggml.eos_token_id": 4,
}


def test_the_tokenizer_comes_along(file):
    write_llama(file, metadata=TOKENIZER)
    files = read_gguf(file).tokenizer_files
    assert Tokenizer.from_str(files["tokenizer.json"].decode()).encode("hi11<end>").ids == [3, 2, 2, 4]
    assert json.loads(files["tokenizer_config.json"])["eos_token"] == "<end>"


def test_a_damaged_tokenizer_is_refused_with_the_name_of_the_file(file):
    write_llama(file, metadata=TOKENIZER | {"tokenizer.ggml.merges": ["no such"]})
    assert_refused(file, CheckpointError, "merges")
