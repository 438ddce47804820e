"""Rotary position embedding: default, linear, llama3 and yarn frequencies.

In: positions (any shape, integer). Out: cos and sin, which `rotate` applies to queries and keys. Frequencies and angles
are float32 whatever the model's dtype, as in the models' own training code. Half-split ("rotate half") layout, which
is Hugging Face's; GGUF files store the interleaved one and are permuted when read.

Sources: RoPE (arXiv 2104.09864), linear (2306.15595), yarn (2309.00071), llama3 (the Llama 3.1 reference code).
Shapes: T rows, E head width.
"""

import math

import torch
from torch import Tensor

from eellm.config.model import ModelConfig, RopeConfig


class Rope:
    """Angles by position. Not a module: its frequencies must neither be cast with the model nor be saved."""

    def __init__(self, config: ModelConfig) -> None:
        self.frequencies_E = rope_frequencies(config.rope, config.head_size, config.max_seq_len)  # E/2 of them
        self.magnitude = rope_magnitude(config.rope)

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin for `positions`: shape positions.shape + (E/2,), in `dtype`."""
        if self.frequencies_E.device != positions.device:
            self.frequencies_E = self.frequencies_E.to(positions.device)
        angles = positions[..., None].float() * self.frequencies_E
        return (angles.cos() * self.magnitude).to(dtype), (angles.sin() * self.magnitude).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (x[i], x[i + E/2]) by its row's angle. x: (..., T, E); cos, sin: (..., T, E/2)."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


def rope_frequencies(rope: RopeConfig, head_size: int, max_seq_len: int) -> Tensor:
    """Radians per position for each of the E/2 pairs, float32, on the CPU."""
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device="cpu") / head_size
    plain = 1.0 / rope.rope_theta**exponents
    if rope.rope_type == "linear":
        return plain / rope.factor
    if rope.rope_type == "llama3":
        return _llama3(rope, plain)
    if rope.rope_type == "yarn":
        return _yarn(rope, plain, head_size, rope.original_max_position_embeddings or max_seq_len)
    return plain


def rope_magnitude(rope: RopeConfig) -> float:
    """The factor on cos and sin: 1 but for yarn, where it makes up for the flatter attention over long contexts."""
    if rope.rope_type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor

    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def _llama3(rope: RopeConfig, plain: Tensor) -> Tensor:
    """Long waves are slowed by `factor`, short ones kept, those between blended by their wavelength."""
    original = rope.original_max_position_embeddings
    assert original is not None, "RopeConfig checks this"
    turns = original * plain / (2 * math.pi)  # within the original context
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = keep.clamp(0, 1)
    return (1 - keep) * plain / rope.factor + keep * plain


def _yarn(rope: RopeConfig, plain: Tensor, head_size: int, original: int) -> Tensor:
    """Frequencies that turn often are kept, slow ones divided by `factor`, with a linear ramp between by index."""

    def index_of(turns: float) -> float:
        return head_size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = index_of(rope.beta_fast), index_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_size - 1)
    ramp = (torch.arange(head_size // 2, dtype=torch.float32, device="cpu") - low) / max(high - low, 0.001)
    keep = 1 - ramp.clamp(0, 1)
    return (1 - keep) * plain / rope.factor + keep * plain
