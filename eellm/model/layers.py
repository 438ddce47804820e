"""The modules of a Llama-family layer: norm, attention, gated MLP, and the layer itself.

A pass moves T rows through a layer. `Rows` says where they stand (angles and masks, made once a pass by
`Decoder.rows`). There is no cache here: decoding has layers of its own, made from these (`eellm.infer.network`).
Shapes: B sequences, T rows, D hidden, H query heads, K key/value heads, E head width, S rows attended to.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eellm.config.model import ModelConfig
from eellm.model.rope import rotate


@dataclass(frozen=True)
class Rows:
    """Where the rows of one pass stand."""

    cos: Tensor
    """(T, E/2), or (B, 1, T, E/2) where sequences differ."""
    sin: Tensor
    """As `cos`."""
    masks: dict[int | None, Tensor | None]
    """By sliding window: boolean, True where attended, broadcastable to (B, H, T, S). None: all rows up to oneself."""


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.size = (size,)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.size, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, optional biases, q/k norm and sliding window."""

    def __init__(self, config: ModelConfig, window: int | None) -> None:
        super().__init__()
        D, H, K, E = config.hidden_size, config.num_heads, config.kv_heads, config.head_size
        self.head_size = E
        self.window = window
        self.q = nn.Linear(D, H * E, bias=config.qkv_bias)
        self.k = nn.Linear(D, K * E, bias=config.qkv_bias)
        self.v = nn.Linear(D, K * E, bias=config.qkv_bias)
        self.out = nn.Linear(H * E, D, bias=config.attention_out_bias)
        self.q_norm = RMSNorm(E, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(E, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x_BTD: Tensor, rows: Rows) -> Tensor:
        B, T, _ = x_BTD.shape
        shape = (B, T, -1, self.head_size)
        q_BHTE = rotate(self.q_norm(self.q(x_BTD).view(shape)).transpose(1, 2), rows.cos, rows.sin)
        k_BKTE = rotate(self.k_norm(self.k(x_BTD).view(shape)).transpose(1, 2), rows.cos, rows.sin)
        v_BKTE = self.v(x_BTD).view(shape).transpose(1, 2)
        mask = rows.masks[self.window]
        y_BHTE = F.scaled_dot_product_attention(
            q_BHTE, k_BKTE, v_BKTE, attn_mask=mask, is_causal=mask is None and T > 1, enable_gqa=True
        )
        return self.out(y_BHTE.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)): SwiGLU or GeGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, width, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate = nn.Linear(D, width, bias=bias)
        self.up = nn.Linear(D, width, bias=bias)
        self.down = nn.Linear(width, D, bias=bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """A pre-norm Transformer layer."""

    def __init__(self, config: ModelConfig, window: int | None) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config, window)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor, rows: Rows) -> Tensor:
        h_BTD = x_BTD + self.attn(self.attn_norm(x_BTD), rows)
        return h_BTD + self.mlp(self.mlp_norm(h_BTD))


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": _gelu_tanh}
