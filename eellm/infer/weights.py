"""A weight matrix as decoding multiplies with it: few rows at a time, so that reading the matrix is the cost.

    weight (O, I), bias → `pack` → Matrix: (N, I) → (N, O)

On a CPU, float32 weights are kept in oneDNN's own order: it multiplies a few rows at the rate of memory, where the
plain product takes several times that (docs/log.md). Small matrices with few rows are quicker plain. All else is
plain. Quantised weights stay in 8 or 4 bits and are multiplied by torch's packed kernels; what these make of a row
doesn't depend on the rows beside it, to the last bit, up to `FEW_ROWS`.
Names of torch's that begin with `_`, and `torch.ops.onednn`, are used in this file alone; where a release lacks one,
weights stay as they are.
"""

from abc import ABC, abstractmethod
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from eellm.errors import ConfigError
from eellm.infer.quantize import GROUP_SIZE, Quantize, QuantizeCache, Rounded, round_weight

SMALL = 1 << 18
"""Elements times rows below which the plain product is quicker: a call of oneDNN's takes 20 µs whatever its size."""
ROWS_HINT = 8
"""oneDNN orders a weight for a number of rows; the order for 8 serves 1 to 64 well."""
LARGE = 1 << 20
"""Elements from which products of integers beat torch's simple kernel for 8 bits: they take 50 µs of preparation."""
FEW_ROWS = 16
"""With more rows the simple kernel is slower than one product with the weight in bfloat16, its making included."""


class Matrix(Protocol):
    num_bytes: int
    """What one product reads."""

    def __call__(self, x_NI: Tensor) -> Tensor:
        """(..., I) → (..., O), in x's dtype."""
        ...


def pack(
    weight_OI: Tensor,
    bias_O: Tensor | None = None,
    *,
    quantize: Quantize | None = None,
    is_head: bool = False,
    cache: QuantizeCache | None = None,
) -> Matrix:
    """The weight in the form that this machine multiplies fastest with.

    quantize: round it to so many bits. Weights that the kernels can't take stay as they are: under int4 those whose
    inputs aren't a multiple of 32 or whose outputs aren't of 16 (under int8 all fit, where the processor multiplies
    bytes). is_head: its outputs are logits. They suffer most from fewer bits, and tie where they are bfloat16: of a
    head the weight keeps 8 bits under int4 too, and products are of integers. cache: where rounded weights are looked
    up and kept.
    Raises ConfigError for `quantize` on another device than the CPU.
    """
    weight_OI = weight_OI.detach()
    bias_O = None if bias_O is None else bias_O.detach()
    if quantize is not None and weight_OI.device.type != "cpu":
        raise ConfigError(f"quantize = {quantize!r}: only on the CPU, and the model is on {weight_OI.device}")
    if quantize is not None and is_head:
        quantize = "int8"
    kind = None if quantize is None else _quantized_kind(weight_OI, quantize, is_head)
    if kind is not None and quantize is not None:
        rounded = round_weight(weight_OI, quantize) if cache is None else cache.rounded(weight_OI, quantize)
        return kind(rounded, bias_O)
    is_float32_here = weight_OI.device.type == "cpu" and weight_OI.dtype == torch.float32
    able = torch.backends.mkldnn.is_available() and _has("mkldnn", "_reorder_linear_weight", "_linear_pointwise")
    return OneDNN(weight_OI, bias_O) if is_float32_here and able else Plain(weight_OI, bias_O)


def _has(place: str, *names: str) -> bool:
    """Whether this release of torch still has these operators."""
    return all(hasattr(getattr(torch.ops, place), name) for name in names)


def _quantized_kind(weight_OI: Tensor, quantize: Quantize, is_head: bool) -> "type[Int4 | Int8 | Int8Simple] | None":
    """What multiplies with the rounded weight here. None: nothing can."""
    num_outputs, num_inputs = weight_OI.shape
    if quantize == "int4":
        fits = num_outputs % 16 == 0 and num_inputs % GROUP_SIZE == 0
        names = ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu")
        return Int4 if fits and _has("aten", *names) else None
    # NOTE the simple kernel reads inputs by 16, beyond the end of the weight where they aren't a multiple
    simple = num_inputs % 16 == 0 and _has("aten", "_weight_int8pack_mm")
    if _multiplies_bytes() and (weight_OI.numel() >= LARGE or is_head or not simple):
        return Int8
    return Int8Simple if simple else None


def _multiplies_bytes() -> bool:
    """NOTE without these instructions oneDNN adds pairs of 8-bit products in 16 bits, and they overflow."""
    able = torch.cpu.get_capabilities()
    has_instructions = able.get("avx512_vnni") or able.get("avx_vnni")
    return bool(has_instructions) and _has("onednn", "qlinear_prepack", "qlinear_pointwise")


class Plain:
    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        self.weight_OI, self.bias_O = weight_OI, bias_O
        self.num_bytes = weight_OI.nbytes

    def __call__(self, x_NI: Tensor) -> Tensor:
        return F.linear(x_NI, self.weight_OI, self.bias_O)


class OneDNN:
    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        self.num_bytes = weight_OI.nbytes
        self.small_OI = None
        if weight_OI.numel() < SMALL:
            # one row times a tall matrix is quicker where the matrix lies column by column
            is_tall = weight_OI.shape[0] >= weight_OI.shape[1]
            self.small_OI = weight_OI.t().contiguous().t() if is_tall else weight_OI.clone()
        self.bias_O = bias_O
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), ROWS_HINT)

    def __call__(self, x_NI: Tensor) -> Tensor:
        if self.small_OI is not None and len(x_NI) * self.small_OI.numel() < SMALL:
            return F.linear(x_NI, self.small_OI, self.bias_O)
        return torch.ops.mkldnn._linear_pointwise(x_NI, self.packed, self.bias_O, "none", [], "")


class Quantized(ABC):
    """What quantised matrices have in common: any leading dims, any dtype of x, a bias added at the end."""

    def __init__(self, rounded: Rounded, bias_O: Tensor | None) -> None:
        self.bias_O = bias_O
        self.num_bytes = rounded.codes.nbytes + rounded.scales.nbytes

    def __call__(self, x_NI: Tensor) -> Tensor:
        if x_NI.dim() != 2:
            return self(x_NI.reshape(-1, x_NI.shape[-1])).unflatten(0, x_NI.shape[:-1])
        y_NO = self.product(x_NI).to(x_NI.dtype)
        return y_NO if self.bias_O is None else y_NO.add_(self.bias_O)

    @abstractmethod
    def product(self, x_NI: Tensor) -> Tensor:
        """(N, I), of any floating dtype → (N, O), of any."""


class Int8(Quantized):
    """Products of integers, exact until they are scaled: weights of 8 bits, x of 16 as two rows of 8.

    x is rounded to 1/32512 of its row's largest magnitude: finer than bfloat16, but for values below 1/128 of that.
    v = 256 · high + low, both from -128 to 127, is multiplied as two rows of bytes with 128 added.
    """

    def __init__(self, rounded: Rounded, bias_O: Tensor | None) -> None:
        super().__init__(rounded, bias_O)
        self.packed = torch.ops.onednn.qlinear_prepack(rounded.codes, None)
        self.scale_O = rounded.scales / 32512
        self.zero_O = torch.zeros(len(self.scale_O), dtype=torch.int32)
        self.offset = torch.tensor(256 * 128 + 128 + 0.5, dtype=torch.float32)  # the conversion to integers cuts off

    def product(self, x_NI: Tensor) -> Tensor:
        num_rows = len(x_NI)
        x_NI = x_NI.float()
        largest_N1 = x_NI.abs().amax(-1, keepdim=True)
        # a row of zeros becomes NaN, then any integers, and is multiplied by 0 in the end
        v_NI = torch.add(self.offset, x_NI / largest_N1, alpha=32512).to(torch.uint16)
        bytes_2NI = v_NI.view(torch.uint8).unflatten(1, (-1, 2)).permute(2, 0, 1)
        if num_rows == 1:
            bytes_2NI = bytes_2NI.expand(2, 2, -1)  # four rows of bytes are quicker than two
        y_2NO = torch.ops.onednn.qlinear_pointwise(
            bytes_2NI.reshape(-1, x_NI.shape[1]),
            *(1.0, 128, self.packed, self.scale_O, self.zero_O, None),
            *(1.0, 0, torch.float32, "none", [], ""),
        )
        low_NO, high_NO = y_2NO.chunk(2)
        return torch.add(low_NO[:num_rows], high_NO[:num_rows], alpha=256).mul_(largest_N1)


class Int8Simple(Quantized):
    """Weights of 8 bits, x in bfloat16: little preparation, but slower from a few rows on."""

    def __init__(self, rounded: Rounded, bias_O: Tensor | None) -> None:
        super().__init__(rounded, bias_O)
        self.codes_OI, self.scale_O = rounded.codes, rounded.scales.bfloat16()

    def product(self, x_NI: Tensor) -> Tensor:
        x_NI = x_NI.bfloat16()
        if len(x_NI) > FEW_ROWS:
            return F.linear(x_NI, self.codes_OI.bfloat16()) * self.scale_O
        return torch.ops.aten._weight_int8pack_mm(x_NI, self.codes_OI, self.scale_O)


class Int4(Quantized):
    """x in bfloat16: with float32 the kernel is slower than a float32 weight."""

    def __init__(self, rounded: Rounded, bias_O: Tensor | None) -> None:
        super().__init__(rounded, bias_O)
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(rounded.unpacked(), 2)
        self.scales_GO2 = rounded.scales

    def product(self, x_NI: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x_NI.bfloat16(), self.packed, GROUP_SIZE, self.scales_GO2)
