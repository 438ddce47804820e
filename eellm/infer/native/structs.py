"""What the kernels read: weights in panels of sixteen outputs, and the C structs that point at them.

The structs mirror those of product.h and kernels.cpp. Each keeps the tensors that it points at in `kept`.
Shapes: O outputs, P panels, I inputs, G groups of inputs.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_double, c_int64, c_void_p

import torch
from torch import Tensor

from eellm.infer.quantize import GROUP_SIZE, Quantize, QuantizeCache, Rounded, round_weight

PANEL = 16
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
_KINDS: dict[Quantize | None, int] = {None: 0, "int8": 1, "int4": 2}


class _Struct(ctypes.Structure):
    kept: Sequence[object] = ()


class Matrix(_Struct):
    _fields_ = [
        ("weight", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("num_outputs", c_int64),
        ("num_inputs", c_int64),
        ("kind", c_int64),
    ]
    num_bytes = 0
    """What one product reads."""


class MLP(_Struct):
    _fields_ = [("norm", c_void_p), ("gate_up", Matrix), ("down", Matrix), ("activation", c_int64), ("eps", c_double)]


class Layer(_Struct):
    _fields_ = [
        ("norm", c_void_p),
        ("qkv", Matrix),
        ("out", Matrix),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_size", c_int64),
        ("window", c_int64),
        ("mlp", MLP),
    ]


class Rows(_Struct):
    _fields_ = [
        ("num_rows", c_int64),
        ("slots", c_void_p),
        ("positions", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
    ]


class Head(_Struct):
    _fields_ = [("mlp", c_void_p), ("norm", c_void_p), ("output", c_void_p), ("eps", c_double)]


class Leg(_Struct):
    _fields_ = [
        ("layers", c_void_p),
        ("kv", c_void_p),
        ("num_layers", c_int64),
        ("first_row", c_int64),
        ("head", Head),
        ("num_asked", c_int64),
        ("score", c_int64),
        ("threshold", c_double),
        ("logits", c_void_p),
        ("table", c_void_p),
        ("layers_s", c_double),
        ("head_s", c_double),
    ]


def make_matrix(
    weight_OI: Tensor, bias_O: Tensor | None, order: Tensor, quantize: Quantize | None, cache: QuantizeCache | None
) -> Matrix:
    """order: which output comes where, (P · 16); O stands for one that is always 0."""
    num_inputs = weight_OI.shape[1]
    if quantize == "int4" and num_inputs % GROUP_SIZE:
        quantize = None
    rounded = None
    if quantize is not None:
        rounded = round_weight(weight_OI, quantize) if cache is None else cache.rounded(weight_OI, quantize)
    weight, scales = _panels(weight_OI, order) if rounded is None else _rounded_panels(rounded, order)
    bias = None if bias_O is None else _reordered(bias_O.float(), order)
    matrix = Matrix(
        weight=weight.data_ptr(),
        scales=None if scales is None else scales.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        num_outputs=len(order),
        num_inputs=num_inputs,
        kind=_KINDS[quantize],
    )
    matrix.kept = (weight, scales, bias)
    matrix.num_bytes = weight.nbytes + (0 if scales is None else scales.nbytes)
    return matrix


def in_turn(num_outputs: int) -> Tensor:
    """One output after another."""
    order = torch.full((-(-num_outputs // PANEL) * PANEL,), num_outputs)
    order[:num_outputs] = torch.arange(num_outputs)
    return order


def gate_and_up(width: int) -> Tensor:
    """A panel of the first half's outputs, one of the second's, and so on."""
    gate = in_turn(width)
    up = torch.where(gate == width, 2 * width, gate + width)
    gate = torch.where(gate == width, 2 * width, gate)
    return torch.stack((gate.view(-1, PANEL), up.view(-1, PANEL)), dim=1).flatten()


def _reordered(rows: Tensor, order: Tensor) -> Tensor:
    """(O, …) → (P · 16, …)."""
    return torch.cat((rows, rows.new_zeros(1, *rows.shape[1:])))[order]


def _panels(weight_OI: Tensor, order: Tensor) -> tuple[Tensor, None]:
    """(P, I, 16)."""
    return _reordered(weight_OI.detach().float(), order).unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous(), None


def _rounded_panels(rounded: Rounded, order: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (P, I or I / 2, 16) and scales: int8 (P, 16), int4 (P, G, 2, 16)."""
    codes = _reordered(rounded.codes, order).unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()
    if rounded.quantize == "int8":
        return codes, _reordered(rounded.scales, order)
    scale_OG, middle_OG = rounded.scales.float().transpose(0, 1).unbind(2)
    scales_OG2 = torch.stack((scale_OG, middle_OG - 8 * scale_OG), dim=-1)
    return codes, _reordered(scales_OG2, order).unflatten(0, (-1, PANEL)).permute(0, 2, 3, 1).contiguous()
