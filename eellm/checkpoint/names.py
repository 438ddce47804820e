"""Hugging Face ↔ ours, as tables: parameter names and config.json. No I/O here.

A Hugging Face config of an architecture that isn't listed is refused by name; so is a feature that we'd get wrong
silently (quantised weights, partial rotary embeddings, other rope types).
"""

import re
from typing import Any

from eellm.config.model import ModelConfig, RopeConfig
from eellm.errors import ConfigError, UnsupportedError, did_you_mean

_TOP = {"embed": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.out": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
_SIZES = {  # ours: theirs
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_seq_len": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
    "bos_token_id": "bos_token_id",
}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        *("factor", "beta_fast", "beta_slow", "truncate", "original_max_position_embeddings"),
        *("attention_factor", "mscale", "mscale_all_dim"),
    ),
}
_DEFAULTS: dict[str, dict[str, Any]] = {  # what transformers assumes where a config.json is silent
    "mistral": {"sliding_window": 4096, "num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
}


def to_hf_name(name: str) -> str:
    """`layers.3.attn.q.weight` → `model.layers.2.self_attn.q_proj.weight` (theirs count from 0)."""
    module, _, leaf = name.rpartition(".")
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", module)
    if match is None:
        return f"{_TOP[module]}.{leaf}"
    return f"model.layers.{int(match[1]) - 1}.{_IN_LAYER[match[2]]}.{leaf}"


def config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Reads the content of a config.json. Raises UnsupportedError for what we don't know."""
    kind = _model_type(hf)
    silent: dict[str, Any] = {"num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6}
    known = silent | _DEFAULTS.get(kind, {}) | hf
    _refuse_silent_errors(known)
    missing = [theirs for theirs in _REQUIRED if theirs not in known]
    if missing:
        raise ConfigError(f"config.json has no '{missing[0]}'")
    sizes = {ours: known[theirs] for ours, theirs in _SIZES.items() if theirs in known}
    attention_bias = bool(known.get("attention_bias", False))
    return ModelConfig(
        **sizes,
        rope=_rope_from_hf(known),
        activation=_activation_from_hf(known.get("hidden_act", "silu")),
        qkv_bias=kind == "qwen2" or attention_bias,
        attention_out_bias=kind != "qwen2" and attention_bias,
        mlp_bias=bool(known.get("mlp_bias", False)),
        qk_norm=kind == "qwen3",
        tie_embeddings=bool(known.get("tie_word_embeddings", False)),
        eos_token_ids=_as_tuple(known.get("eos_token_id")),
        **_window_from_hf(kind, known),
    )


def config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The content of a config.json that transformers reads back as the same model.

    Raises UnsupportedError where no known architecture has this combination of features.
    """
    kind = _kind_of(config)
    slides = config.sliding_window is not None
    hf: dict[str, Any] = {"architectures": [ARCHITECTURES[kind]], "model_type": kind, "dtype": dtype}
    hf |= {theirs: getattr(config, ours) for ours, theirs in _SIZES.items()}
    hf |= {"num_key_value_heads": config.kv_heads, "head_dim": config.head_size}
    hf |= {"hidden_act": _ACTIVATIONS[config.activation], "tie_word_embeddings": config.tie_embeddings}
    hf |= {"rope_theta": config.rope.rope_theta, "rope_parameters": _rope_to_hf(config.rope), "attention_dropout": 0.0}
    eos = config.eos_token_ids
    hf["eos_token_id"] = list(eos) if len(eos) > 1 else eos[0] if eos else None
    if kind in ("llama", "qwen3"):
        hf["attention_bias"] = config.qkv_bias
    if kind == "llama":
        hf["mlp_bias"] = config.mlp_bias
    if kind == "mistral":
        hf["sliding_window"] = config.sliding_window
    if kind in ("qwen2", "qwen3"):
        hf |= {"use_sliding_window": slides, "sliding_window": config.sliding_window}
        types = ("full_attention", "sliding_attention")
        hf["layer_types"] = [types[config.window(n) is not None] for n in range(1, config.num_layers + 1)]
    return hf


def _kind_of(config: ModelConfig) -> str:
    """The architecture whose features are exactly those of `config`."""
    biases = (config.qkv_bias, config.attention_out_bias)
    slides = config.sliding_window is not None
    if config.qk_norm:
        kind, fits = "qwen3", biases[0] == biases[1] and not config.mlp_bias
    elif biases == (True, False):
        kind, fits = "qwen2", not config.mlp_bias
    elif slides:
        kind, fits = "mistral", biases == (False, False) and not config.mlp_bias and config.sliding_layers is None
    else:
        kind, fits = "llama", biases[0] == biases[1]
    if not fits:
        raise UnsupportedError(
            f"no Hugging Face architecture has this combination of features; the nearest is {kind}, which differs in "
            "its biases, q/k norm or sliding layers"
        )
    return kind


def _model_type(hf: dict[str, Any]) -> str:
    kind = hf.get("model_type")
    if kind not in ARCHITECTURES:
        named = (hf.get("architectures") or [kind])[0]
        known = ", ".join(ARCHITECTURES)
        raise UnsupportedError(f"architecture {named!r} is not supported; known are {known}")
    return kind


def _refuse_silent_errors(hf: dict[str, Any]) -> None:
    if hf.get("quantization_config"):
        method = hf["quantization_config"].get("quant_method", "unknown")
        raise UnsupportedError(f"weights quantised with {method!r} can't be read; use the unquantised model or a GGUF")
    partial = (hf.get("rope_parameters") or hf).get("partial_rotary_factor", 1.0)
    if partial not in (None, 1, 1.0):
        raise UnsupportedError(f"partial_rotary_factor = {partial}: only full rotary embeddings are supported")


def _rope_from_hf(hf: dict[str, Any]) -> RopeConfig:
    """Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    known = set(RopeConfig.__dataclass_fields__)
    types = ("default", "linear", "llama3", "yarn")
    if kind not in types:
        raise UnsupportedError(f"rope type {kind!r} is not supported; known are {', '.join(types)}")
    theta = rope.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0
    rope.pop("partial_rotary_factor", None)
    rope = {key: value for key, value in rope.items() if value is not None}
    for key in rope:
        if key not in known:
            raise UnsupportedError(f"rope parameter {key!r} is not supported{did_you_mean(key, known)}")
    return RopeConfig(rope_type=kind, rope_theta=float(theta), **rope)


def _rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    keys = _ROPE_KEYS[rope.rope_type]
    values = {key: getattr(rope, key) for key in keys}
    return {"rope_type": rope.rope_type, "rope_theta": rope.rope_theta} | {
        key: value for key, value in values.items() if value is not None
    }


def _activation_from_hf(name: str) -> Any:
    names = {theirs: ours for ours, theirs in _ACTIVATIONS.items()} | {"swish": "silu", "gelu_new": "gelu_tanh"}
    if name not in names:
        raise UnsupportedError(f"activation {name!r} is not supported; known are {', '.join(names)}")
    return names[name]


def _window_from_hf(kind: str, hf: dict[str, Any]) -> dict[str, Any]:
    window = hf.get("sliding_window")
    if kind == "llama" or (kind != "mistral" and not hf.get("use_sliding_window", False)):
        window = None
    if window is None or kind == "mistral":
        return {"sliding_window": window}
    types = hf.get("layer_types")
    if types is None:
        first = hf.get("max_window_layers", 28)
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(hf["num_hidden_layers"])]
    layers = tuple(n for n, name in enumerate(types, 1) if name == "sliding_attention")
    return {"sliding_window": window, "sliding_layers": layers} if layers else {}


def _as_tuple(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)
