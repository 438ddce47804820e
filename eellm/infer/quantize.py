"""Weights rounded to 8 or 4 bits; what takes long to round is kept on disk and found again by its content.

    weight (O, I) → `round_weight` → Rounded → eellm.infer.weights

int8: w ≈ code · scale with one scale per output, codes -127 .. 127. int4: w ≈ (code - 8) · scale + middle with a scale
and a middle per 32 inputs, codes 0 .. 15. Scale and middle of a group are fitted to its codes by least squares, for
several ranges of which the one with the least squared error is kept; they are bfloat16, as the kernel reads them.
A file of the cache is named after the SHA-256 of the weight's dtype, shape and bytes: a weight that was changed or
tuned, wherever it came from, is another weight. Every file carries the hash of its own tensors.
Shapes: O outputs, I inputs, G groups.
"""

import hashlib
import os
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from eellm.log import log

Quantize = Literal["int8", "int4"]
GROUP_SIZE = 32
"""Inputs that share a scale under int4: a weight's inputs must be a multiple."""
FORMAT = "eellm-rounded-1"
"""Changes with the files' layout or the way of rounding."""
_RANGES = (1.0, 0.92, 0.84, 0.76)
"""Parts of a group's range that are tried: a narrower one has finer steps and cuts off the ends."""
_BLOCK = 1 << 19
"""Elements rounded at a time: enough for all threads, and little memory."""


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """A rounded weight matrix, in no kernel's order."""

    quantize: Quantize
    codes: Tensor
    """int8: (O, I) int8. int4: (O, I / 2) uint8, two codes to a byte, that of the even input in the low half."""
    scales: Tensor
    """int8: (O,) float32. int4: (G, O, 2) bfloat16, scale and middle."""

    def unpacked(self) -> Tensor:
        """int4's codes one by one: (O, I) int32."""
        codes = torch.empty(len(self.codes), 2 * self.codes.shape[1], dtype=torch.int32)
        codes[:, ::2] = self.codes & 15
        codes[:, 1::2] = self.codes >> 4
        return codes

    def values(self) -> Tensor:
        """What the codes stand for: (O, I) float32."""
        if self.quantize == "int8":
            return self.codes * self.scales[:, None]
        codes_OGi = (self.unpacked() - 8).unflatten(1, (-1, GROUP_SIZE))
        scale_OG1, middle_OG1 = self.scales.float().transpose(0, 1)[..., None].unbind(2)
        return (codes_OGi * scale_OG1 + middle_OG1).flatten(1)


@torch.no_grad()
def round_weight(weight_OI: Tensor, quantize: Quantize) -> Rounded:
    """A weight on the CPU, of any floating dtype, in 8 or 4 bits a value. int4: I is a multiple of GROUP_SIZE."""
    rows = max(1, _BLOCK // weight_OI.shape[1])
    blocks = [_ROUND[quantize](block.float()) for block in weight_OI.split(rows)]
    codes, scales = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    if quantize == "int4":
        codes = codes[:, ::2] | codes[:, 1::2] << 4
        scales = scales.transpose(0, 1).contiguous()
    return Rounded(quantize=quantize, codes=codes, scales=scales)


def _round_int8(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (O, I) and scales (O,)."""
    scale_O1 = weight_OI.abs().amax(1, keepdim=True) / 127
    codes = (weight_OI / _nonzero(scale_O1)).round_().to(torch.int8)
    return codes, scale_O1.squeeze(1)


def _round_int4(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (O, I) and scales and middles (O, G, 2)."""
    values = weight_OI.unflatten(1, (-1, GROUP_SIZE))
    best, *others = (_fitted(values, part) for part in _RANGES)
    for other in others:
        better = other[-1] < best[-1]
        best = tuple(torch.where(better, new, old) for new, old in zip(other, best, strict=True))
    codes, scale, middle, _ = best
    return (codes + 8).to(torch.uint8).flatten(1), torch.cat((scale, middle), dim=-1).bfloat16()


def _fitted(values: Tensor, part: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes from -8 to 7 (O, G, i), scale, middle and squared error (O, G, 1) of groups, from a part of their range."""
    low, high = values.aminmax(dim=-1, keepdim=True)
    scale = (high - low) * part / 15
    codes = _codes(values, scale, (low + high + scale) / 2)
    mean = codes.mean(-1, keepdim=True)
    spread = (codes - mean).square().sum(-1, keepdim=True)
    slope = ((codes - mean) * values).sum(-1, keepdim=True) / _nonzero(spread)
    scale = torch.where(spread > 0, slope, scale).bfloat16().float()
    middle = (values.mean(-1, keepdim=True) - scale * mean).bfloat16().float()
    codes = _codes(values, scale, middle)
    return codes, scale, middle, (codes * scale + middle - values).square().sum(-1, keepdim=True)


def _codes(values: Tensor, scale: Tensor, middle: Tensor) -> Tensor:
    return ((values - middle) / _nonzero(scale)).round_().clamp_(-8, 7)


def _nonzero(divisor: Tensor) -> Tensor:
    """1 in place of 0: what is divided by it is 0 as well."""
    return torch.where(divisor == 0, 1.0, divisor)


_ROUND = {"int8": _round_int8, "int4": _round_int4}


class QuantizeCache:
    """Weights rounded to 4 bits in a directory, one file each. Models that share a weight share its file; any file may
    be deleted at any time. A file that is damaged, or is not what its name says, is made anew.

    8 bits are never kept: rounding to them takes no longer than to hash the weight.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def rounded(self, weight_OI: Tensor, quantize: Quantize) -> Rounded:
        """As `round_weight`; from the directory where it is there, else made and left there.

        A directory that can't be written is logged and does no other harm.
        """
        if quantize == "int8":
            return round_weight(weight_OI, quantize)
        weight_OI = weight_OI.detach().contiguous()
        identity = f"{FORMAT} {quantize} {weight_OI.dtype} {tuple(weight_OI.shape)} {_sha256(weight_OI)}"
        path = self.directory / f"{hashlib.sha256(identity.encode()).hexdigest()}.safetensors"
        rounded = _read(path, identity, quantize)
        if rounded is None:
            rounded = round_weight(weight_OI, quantize)
            _write(path, identity, rounded)
        return rounded


def _read(path: Path, identity: str, quantize: Quantize) -> Rounded | None:
    try:
        with safe_open(path, framework="pt") as file:
            known = file.metadata() or {}
            codes, scales = file.get_tensor("codes"), file.get_tensor("scales")
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError) as error:
        log.warning("%s can't be read (%s): made anew", path, error)
        return None
    if known != {"identity": identity, "sha256": _sha256(codes, scales)}:
        log.warning("%s is damaged: made anew", path)
        return None
    return Rounded(quantize=quantize, codes=codes, scales=scales)


def _write(path: Path, identity: str, rounded: Rounded) -> None:
    tensors = {"codes": rounded.codes, "scales": rounded.scales}
    temporary = path.with_name(f".{path.stem}.tmp-{os.getpid()}-{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata={"identity": identity, "sha256": _sha256(*tensors.values())})
        temporary.replace(path)
    except (SafetensorError, OSError) as error:
        log.warning("%s can't be written (%s): weights are rounded anew each time", path, error)
        with suppress(OSError):  # whatever kept us from writing may keep us from this
            temporary.unlink()


def _sha256(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().view(torch.uint8).numpy())  # pyrefly: ignore[bad-argument-type]
    return digest.hexdigest()
