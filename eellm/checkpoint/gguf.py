"""A GGUF file (llama.cpp's format) → what a Hugging Face directory would hold.

In: one file of the architecture llama (Llama, Mistral, SmolLM2), qwen2 or qwen3. Out: the content of config.json, the
tokenizer's files, and the weights in float32 by their Hugging Face names. The file stays mapped and a tensor is
dequantised when it is asked for, so about one of them is in memory.

Invariant: what comes out computes what llama.cpp computes. Tensors and metadata that would change the result and that
config.json can't say are refused by name, never skipped.

Two things are stored differently. llama.cpp turns neighbouring rows (2i, 2i + 1) of a head where Hugging Face turns
(i, i + E/2), so the q and k rows of `llama` files are permuted; `qwen2` and `qwen3` files keep them. And Llama 3's rope
scaling is no metadata but a tensor, `rope_freqs.weight`: the divisor of each frequency.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eellm.checkpoint.gguf_tokenizer import convert_tokenizer, token_ids
from eellm.config.model import RopeConfig
from eellm.errors import CheckpointError, UnsupportedError, did_you_mean
from eellm.model.rope import rope_frequencies


def _named(suffix: str, **names: str) -> dict[str, str]:
    return {f"{gguf}.{suffix}": f"{hf}.{suffix}" for gguf, hf in names.items()}


_QKV = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
_ATTENTION = _QKV | {"attn_output": "self_attn.o_proj"}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_LAYER = _named("weight", **_NORMS, **_ATTENTION, **_MLP)
_MODEL = _named("weight", token_embd="model.embed_tokens", output_norm="model.norm", output="lm_head")
_ATTENTION_BIAS = {"attention_bias": _named("bias", **_ATTENTION)}
_MLP_BIAS = {"mlp_bias": _named("bias", **_MLP)}


@dataclass(frozen=True)
class _Architecture:
    hf_class: str
    layer: Mapping[str, str]
    """Tensors of every layer: GGUF's name → Hugging Face's."""
    biases: Mapping[str, Mapping[str, str]]
    """Key of config.json → further tensors of every layer where it is true."""
    is_permuted: bool = False
    """Whether the rows of q and k are permuted."""


_ARCHITECTURES = {
    "llama": _Architecture("LlamaForCausalLM", _LAYER, _ATTENTION_BIAS | _MLP_BIAS, is_permuted=True),
    "qwen2": _Architecture("Qwen2ForCausalLM", _LAYER | _named("bias", **_QKV), {}),
    "qwen3": _Architecture("Qwen3ForCausalLM", _LAYER | _named("weight", **_QK_NORMS), _ATTENTION_BIAS),
}
_SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_ROPE_TYPES = {
    "none": {},
    "linear": {"rope.scale_linear": "factor", "rope.scaling.factor": "factor"},
    "yarn": {
        "rope.scaling.factor": "factor",
        "rope.scaling.original_context_length": "original_max_position_embeddings",
        "rope.scaling.yarn_attn_factor": "attention_factor",
        "rope.scaling.yarn_beta_fast": "beta_fast",
        "rope.scaling.yarn_beta_slow": "beta_slow",
    },
}
_MUST_BE = {  # where it is there at all: another value changes what the model computes
    "attention.causal": True,
    "attention.sliding_window": 0,
    "rope.scaling.attn_factor": 1,
    "rope.scaling.yarn_ext_factor": 1,
    "rope.scaling.yarn_log_multiplier": 0,
}


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    dequantise: Callable[[], np.ndarray]
    num_permuted_heads: int = 0

    def load(self) -> torch.Tensor:
        values = self.dequantise()
        tensor = torch.from_numpy(values if values.flags.writeable else np.array(values))  # F32 is the file, mapped
        if not self.num_permuted_heads:
            return tensor
        return tensor.unflatten(0, (self.num_permuted_heads, -1, 2)).transpose(1, 2).reshape(self.shape)


@dataclass(frozen=True)
class GGUFModel:
    """A model read from a GGUF file, which must stay where it is for as long as `tensors` is used."""

    config: dict[str, Any]
    """The content of config.json."""
    tokenizer_files: dict[str, bytes]
    """tokenizer.json and tokenizer_config.json; empty where the tokenizer is none that we can convert."""
    _tensors: dict[str, _Tensor] = field(repr=False)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face's name, float32 values) of each weight, made as it is asked for. A tied head isn't repeated."""
        for name, tensor in self._tensors.items():
            yield name, tensor.load()


def read_gguf(path: Path) -> GGUFModel:
    """Opens the file and reads all but its weights.

    Errors: CheckpointError if it is missing, truncated or no GGUF file, or if the `gguf` package isn't installed;
    UnsupportedError for an architecture, a tensor, a tensor's type or a piece of metadata that we don't know.
    """
    try:
        return _convert(*_open(path))
    except CheckpointError as error:
        raise type(error)(f"{path}: {error}") from None


def _open(path: Path) -> tuple[dict[str, Any], dict[str, _Tensor]]:
    """The file's metadata as plain Python values, and its tensors by GGUF's names."""
    try:
        import gguf
    except ImportError:
        raise CheckpointError("GGUF files need one more package: pip install 'eellm[gguf]'") from None
    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: value.contents() for key, value in reader.fields.items()}
    except OSError as error:
        raise CheckpointError(error.strerror) from None
    except Exception as error:  # whatever comes of reading past the end, or of taking garbage for lengths
        if "GGMLQuantizationType" in str(error) or "file appears to be version" in str(error):
            raise UnsupportedError(f"newer than the installed gguf package: {error}") from None
        raise CheckpointError("not a GGUF file, or one that is cut short or damaged") from None
    if reader.byte_order != "I":
        raise UnsupportedError("of the other byte order than this machine's")
    tensors = {}
    for tensor in reader.tensors:
        kind = tensor.tensor_type
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            raise UnsupportedError(f"tensor '{tensor.name}' is of type {kind.name}: it can't be dequantised") from None
        shape = tuple(reversed(tensor.shape.tolist()))  # GGUF counts dimensions from the inmost
        tensors[tensor.name] = _Tensor(shape, partial(gguf.dequantize, tensor.data, kind))
    return metadata, tensors


def _convert(metadata: dict[str, Any], tensors: dict[str, _Tensor]) -> GGUFModel:
    name = str(metadata.get("general.architecture"))
    architecture = _ARCHITECTURES.get(name)
    if architecture is None:
        known = f"must be one of {', '.join(_ARCHITECTURES)}{did_you_mean(name, _ARCHITECTURES)}"
        raise UnsupportedError(f"architecture '{name}': {known}")
    if metadata.get("split.count", 1) > 1:
        raise UnsupportedError("one part of a split file: join the parts with llama-gguf-split --merge")
    fields = {key.removeprefix(f"{name}."): value for key, value in metadata.items()}
    config: dict[str, Any] = {"architectures": [architecture.hf_class], "model_type": name, "dtype": "float32"}
    config |= _shape(fields, tensors) | token_ids(metadata)
    config["rope_parameters"] = _rope(fields, config, tensors.pop("rope_freqs.weight", None))
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    config |= {flag: f"blk.0.{next(iter(names))}" in tensors for flag, names in architecture.biases.items()}
    weights = _renamed(architecture, config, tensors)
    return GGUFModel(config, convert_tokenizer(metadata, config["max_position_embeddings"]), weights)


def _shape(fields: dict[str, Any], tensors: dict[str, _Tensor]) -> dict[str, Any]:
    """What config.json says of sizes and tying."""
    config: dict[str, Any] = {name: _number(fields, key) for key, name in _SIZES.items()}
    num_heads = config["num_attention_heads"]
    head_dim = _number(fields, "attention.key_length", config["hidden_size"] // num_heads)
    for key, needed in {**_MUST_BE, "attention.value_length": head_dim, "rope.dimension_count": head_dim}.items():
        if fields.get(key, needed) != needed:
            raise UnsupportedError(f"metadata {key} = {fields[key]!r}: only {needed!r} is supported")
    if "token_embd.weight" not in tensors:
        raise CheckpointError("tensor 'token_embd.weight' is missing")
    return config | {
        "num_key_value_heads": _number(fields, "attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
    }


def _number(fields: dict[str, Any], key: str, default: float | None = None) -> Any:
    value = fields.get(key, default)
    if type(value) not in (int, float) or not value > 0:  # a list, where layers differ
        raise CheckpointError(f"metadata {key} = {value!r}: must be one positive number")
    return float(str(np.float32(value))) if type(value) is float else value  # 1e-05, not 9.999999747378752e-06


def _rope(fields: dict[str, Any], config: dict[str, Any], divisors: _Tensor | None) -> dict[str, Any]:
    """The content of `rope_parameters`."""
    kind = fields.get("rope.scaling.type", "linear")  # llama.cpp's default; without a factor it is plain rope
    if kind not in _ROPE_TYPES:
        raise UnsupportedError(f"metadata rope.scaling.type = {kind!r}: must be one of {', '.join(_ROPE_TYPES)}")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(_number(fields, "rope.freq_base", 10000.0))}
    scaling = {name: _number(fields, key) for key, name in _ROPE_TYPES[kind].items() if key in fields}
    if scaling.get("factor", 1) != 1:
        original = {"original_max_position_embeddings": config["max_position_embeddings"]} if kind == "yarn" else {}
        rope |= {"rope_type": kind, **original, **scaling}
    return rope if divisors is None else _llama3(rope, divisors.load(), config["head_dim"])


def _llama3(rope: dict[str, Any], divisors: torch.Tensor, head_dim: int) -> dict[str, Any]:
    """Llama 3.1, 3.2 and 3.3 differ in `factor` only, which divides the longest waves; all else must then follow."""
    bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    llama3 = rope | {"rope_type": "llama3", "factor": float(divisors.max()), **bands}
    plain = rope_frequencies(RopeConfig(rope_theta=rope["rope_theta"]), head_dim, 0)
    expected = plain / rope_frequencies(RopeConfig(**llama3), head_dim, 0)
    same = divisors.shape == expected.shape and torch.allclose(divisors, expected, rtol=1e-4)
    if rope["rope_type"] != "default" or not same:
        raise UnsupportedError("tensor 'rope_freqs.weight' holds a rope scaling other than Llama 3's")
    return llama3


def _renamed(arch: _Architecture, config: dict[str, Any], tensors: dict[str, _Tensor]) -> dict[str, _Tensor]:
    """The tensors by Hugging Face's names: all that such a model has, and no other."""
    layer = dict(arch.layer)
    for flag, biases in arch.biases.items():
        layer |= biases if config[flag] else {}
    names = {gguf: hf for gguf, hf in _MODEL.items() if gguf in tensors or gguf != "output.weight"}
    for i in range(min(config["num_hidden_layers"], len(tensors))):  # a damaged count mustn't fill the memory
        names |= {f"blk.{i}.{gguf}": f"model.layers.{i}.{hf}" for gguf, hf in layer.items()}
    if unknown := tensors.keys() - names.keys():
        raise UnsupportedError(f"tensor '{min(unknown)}': no part of a {config['model_type']} model that we know")
    if missing := names.keys() - tensors.keys():
        raise CheckpointError(f"tensor '{min(missing)}' is missing")
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    renamed = {}
    for name, tensor in tensors.items():
        num_heads = heads.get(name.split(".")[-2], 0) if arch.is_permuted else 0
        rows = num_heads * config["head_dim"]
        if num_heads and tensor.shape[0] != rows:
            raise CheckpointError(f"tensor '{name}' has {tensor.shape[0]} rows, but its heads make {rows}")
        renamed[names[name]] = replace(tensor, num_permuted_heads=num_heads)
    return renamed
