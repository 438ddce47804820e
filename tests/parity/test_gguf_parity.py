"""transformers reads the same GGUF files alike, and the directory made of one does what the original model did."""

import json
import pydoc_data.topics

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaTokenizer, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter, generate_merges
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from eellm.checkpoint.gguf import read_gguf
from eellm.checkpoint.gguf_tokenizer import convert_tokenizer

HEADS = {"q_proj": 4, "k_proj": 2}
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
}
ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0, "attention_factor": 1.25},
    "llama3": {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
VALUE = gguf.GGUFValueType
VALUE_TYPES = {int: VALUE.UINT32, float: VALUE.FLOAT32, str: VALUE.STRING}


def original(family, *, rope="default", **options):
    """A small random model of transformers' own."""
    torch.manual_seed(0)
    parameters = {"rope_type": rope, "rope_theta": 500000.0, **ROPES[rope]}
    config = getattr(transformers, f"{family}Config")(**SHAPE, rope_parameters=parameters, **options)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # norms and biases are constants otherwise
    return model


def write_gguf(path, model, kind=gguf.GGMLQuantizationType.F32):
    """As llama.cpp's convert_hf_to_gguf.py does it."""
    config = model.config
    arch, rope = config.model_type, config.rope_parameters
    metadata = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": rope["rope_theta"],
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
    }
    if rope["rope_type"] in ("linear", "yarn"):
        names = {
            "rope_type": "type",
            "factor": "factor",
            "original_max_position_embeddings": "original_context_length",
            "beta_fast": "yarn_beta_fast",
            "attention_factor": "yarn_attn_factor",
        }
        metadata |= {f"rope.scaling.{name}": rope[key] for key, name in names.items() if key in rope}
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("tiny")
    for key, value in metadata.items():
        writer.add_key_value(f"{arch}.{key}", value, VALUE_TYPES[type(value)])
    if rope["rope_type"] == "llama3":
        plain = rope["rope_theta"] ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq).numpy())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        values, heads = tensor.numpy(), HEADS.get(name.split(".")[-2])
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        if arch == "llama" and heads:
            halves = values.reshape(heads, 2, config.head_dim // 2, *values.shape[1:])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        used = kind if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        stored = gguf.quantize(np.ascontiguousarray(values), used)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), stored, raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_directory(path, model):
    path.mkdir()
    save_file(dict(model.tensors()), path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(model.config))


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_1"])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Llama", {"tie_word_embeddings": False}),
        ("Llama", {"tie_word_embeddings": True}),
        ("Llama", {"tie_word_embeddings": False, "attention_bias": True}),
        ("Qwen2", {"tie_word_embeddings": False}),
        ("Qwen3", {"tie_word_embeddings": False}),
    ],
)
def test_transformers_reads_the_same_weights_from_the_same_file(tmp_path, family, options, kind):
    model = original(family, **options)
    write_gguf(tmp_path / "model.gguf", model, gguf.GGMLQuantizationType[kind])
    # from_pretrained(gguf_file=...) calls this; itself it asks for the accelerate package
    theirs = load_gguf_checkpoint(tmp_path / "model.gguf", return_tensors=True, model_to_load=model)["tensors"]
    ours = dict(read_gguf(tmp_path / "model.gguf").tensors())
    assert ours.keys() == theirs.keys()
    assert len(ours) == len(model.state_dict()) - options["tie_word_embeddings"]
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Llama", {"rope": "default", "tie_word_embeddings": True}),
        ("Llama", {"rope": "linear"}),
        ("Llama", {"rope": "llama3", "attention_bias": True, "mlp_bias": True}),
        ("Qwen2", {"rope": "yarn", "tie_word_embeddings": True}),
        ("Qwen3", {"rope": "default"}),
        ("Qwen3", {"rope": "yarn", "attention_bias": True}),
    ],
)
@torch.no_grad()
def test_a_model_computes_the_same_after_the_way_through_gguf(tmp_path, family, options):
    model = original(family, **options)
    write_gguf(tmp_path / "model.gguf", model)
    write_directory(tmp_path / "model", read_gguf(tmp_path / "model.gguf"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(again) is type(model)
    assert again.config.rope_parameters == model.config.rope_parameters
    tokens = torch.randint(SHAPE["vocab_size"], (2, 200), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)


# --- tokenizers ---

TEXTS = ["Hello  world,\n\n it's 12345 DON'T", "naïve e\u0301 東京 😀", "<|im_start|>user\nHi<|im_end|>", " a  b "]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def corpus():
    return list(pydoc_data.topics.topics.values())[:20]


def byte_level(pre, pattern):
    """(a tokenizer that cuts words by `pattern`, its metadata). Its merges know no words: each cut tells."""
    tokenizer = Tokenizer(BPE())
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = whole
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=SPECIAL, initial_alphabet=alphabet)
    lines = [line for text in (*corpus(), *TEXTS * 50) for line in text.splitlines(keepends=True)]
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, whole])
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return tokenizer, {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}{% endfor %}",
    }


def load(path, metadata):
    """What transformers makes of the files."""
    for name, content in convert_tokenizer(metadata, 256).items():
        (path / name).write_bytes(content)
    return AutoTokenizer.from_pretrained(path)


def test_a_qwen2_tokenizer_is_that_of_transformers(tmp_path):
    _, metadata = byte_level("qwen2", transformers.models.qwen2.tokenization_qwen2.PRETOKENIZE_REGEX)
    tokens = metadata["tokenizer.ggml.tokens"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    reference = Qwen2Tokenizer(vocabulary, merges, additional_special_tokens=SPECIAL)
    ours = load(tmp_path, metadata)
    for text in [*TEXTS, *corpus()[:3]]:
        assert ours(text).input_ids == reference(text).input_ids, text


def test_a_llama_3_tokenizer_cuts_words_as_transformers_does(tmp_path):
    reference, metadata = byte_level("llama-bpe", TikTokenConverter().pattern)
    reference.model.ignore_merges = True
    ours = load(tmp_path, metadata)
    for text in [*TEXTS, *corpus()[:3]]:
        assert ours(text).input_ids == [1, *reference.encode(text).ids], text  # bos is Llama 3's default


def test_a_sentencepiece_tokenizer_is_that_of_transformers(tmp_path):
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=500))
    learnt = json.loads(trained.to_str())["model"]["vocab"]
    letters = [piece for piece in learnt if len(piece) == 1]
    joined = sorted((piece for piece in learnt if len(piece) > 1), key=learnt.__getitem__)
    control, in_bytes = ["<unk>", "<s>", "</s>"], [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = [*control, *in_bytes, *joined, *letters]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(joined) + len(letters))]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (len(pieces) - 259)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = generate_merges(vocabulary, zip(pieces, scores, strict=True), {*control, *in_bytes})
    reference = LlamaTokenizer(vocabulary, merges, add_bos_token=True)
    ours = load(tmp_path, metadata)
    for text in [
        *TEXTS[:2],
        "a  b ",
        *corpus()[:3],
    ]:  # of two spaces in front transformers 5 makes one; llama.cpp doesn't
        assert ours(text).input_ids == reference(text).input_ids, text
        assert ours.decode(ours(text).input_ids) == reference.decode(reference(text).input_ids)


def test_transformers_finds_the_special_tokens_and_the_chat_template(tmp_path):
    _, metadata = byte_level("llama-bpe", TikTokenConverter().pattern)
    tokenizer = load(tmp_path, metadata)
    assert (tokenizer.bos_token_id, tokenizer.eos_token, tokenizer.model_max_length) == (1, "<|im_end|>", 256)
    chat = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|im_start|>user: Hi"
    assert tokenizer.decode(tokenizer("Hi<|im_end|>").input_ids, skip_special_tokens=True) == "Hi"
