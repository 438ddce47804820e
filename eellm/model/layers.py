"""The modules of a Llama-family layer: norm, attention, gated MLP, and the layer itself.

A pass moves T rows through a layer. `Rows` says where they stand (angles and masks, made once a pass by
`Decoder.rows`); an optional `LayerCache` holds the rows before them.
Shapes: B sequences, T rows, D hidden, H query heads, K key/value heads, E head width, S rows attended to.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eellm.config.model import ModelConfig
from eellm.model.cache import LayerCache
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


def side_by_side(x: Tensor, fused: Tensor | None, *linears: nn.Linear) -> tuple[Tensor, ...]:
    """Each of `linears` applied to x; by one product with `fused` where their weights are parts of its memory.

    Not while gradients are recorded: they belong to the parts.
    """
    if fused is None or torch.is_grad_enabled() or not _are_parts(fused, linears):
        return tuple(linear(x) for linear in linears)
    return F.linear(x, fused).split([linear.out_features for linear in linears], dim=-1)


def _are_parts(fused: Tensor, linears: tuple[nn.Linear, ...]) -> bool:
    """Whether no weight was replaced since `fused` (stored by column) was made of them."""
    address = fused.data_ptr()
    for linear in linears:
        if linear.weight.data_ptr() != address:
            return False
        address += linear.out_features * fused.element_size()
    return True


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
        self.fused: Tensor | None = None
        """The weights of q, k and v in one piece of memory, where `eellm.infer.layout` has put them so."""

    def forward(self, x_BTD: Tensor, rows: Rows, cache: LayerCache | None = None) -> Tensor:
        B, T, _ = x_BTD.shape
        q_BTD, k_BTD, v_BTD = side_by_side(x_BTD, self.fused, self.q, self.k, self.v)
        k_BKSE, v_BKSE = self._keys_values(k_BTD, v_BTD, rows)
        if cache is not None:
            k_BKSE, v_BKSE = cache.append(k_BKSE, v_BKSE)
        q_BHTE = self.q_norm(q_BTD.view(B, T, -1, self.head_size)).transpose(1, 2)
        q_BHTE = rotate(q_BHTE, rows.cos, rows.sin)
        mask = rows.masks[self.window]
        causal = mask is None and T > 1
        y_BHTE = F.scaled_dot_product_attention(
            q_BHTE, k_BKSE, v_BKSE, attn_mask=mask, is_causal=causal, enable_gqa=True
        )
        return self.out(y_BHTE.transpose(1, 2).reshape(B, T, -1))

    def keys_values(self, x_BTD: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Keys (rotated) and values of the rows, both (B, K, T, E)."""
        return self._keys_values(self.k(x_BTD), self.v(x_BTD), rows)

    def _keys_values(self, k_BTD: Tensor, v_BTD: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        B, T, _ = k_BTD.shape
        k_BKTE = self.k_norm(k_BTD.view(B, T, -1, self.head_size)).transpose(1, 2)
        v_BKTE = v_BTD.view(B, T, -1, self.head_size).transpose(1, 2)
        return rotate(k_BKTE, rows.cos, rows.sin), v_BKTE


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)): SwiGLU or GeGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, width, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate = nn.Linear(D, width, bias=bias)
        self.up = nn.Linear(D, width, bias=bias)
        self.down = nn.Linear(width, D, bias=bias)
        self.activation = ACTIVATIONS[config.activation]
        self.fused: Tensor | None = None
        """As in `Attention`, the weights of gate and up."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = side_by_side(x, self.fused, self.gate, self.up)
        return self.down(self.activation(gate) * up)


class Layer(nn.Module):
    """A pre-norm Transformer layer."""

    def __init__(self, config: ModelConfig, window: int | None) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config, window)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor, rows: Rows, cache: LayerCache | None = None) -> Tensor:
        h_BTD = x_BTD + self.attn(self.attn_norm(x_BTD), rows, cache)
        return h_BTD + self.mlp(self.mlp_norm(h_BTD))


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": _gelu_tanh}
