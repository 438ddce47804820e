"""Random weights, the same for the same seed whatever the device: every matrix N(0, std), norms 1, biases 0."""

import hashlib

import torch
from torch import nn

from eellm.config.check import check_choice
from eellm.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def torch_dtype(name: str) -> torch.dtype:
    """`"bfloat16"` → torch.bfloat16. Raises ConfigError with the names that are known."""
    check_choice("dtype", name, DTYPES)
    return DTYPES[name]


def torch_device(name: str | torch.device) -> torch.device:
    """`"cuda"` → torch.device("cuda", 0). Raises ConfigError for one that this machine or torch doesn't have."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # the latter: torch was built without it
        raise ConfigError(f"device = {str(name)!r}: {str(error).splitlines()[0]}") from None


@torch.no_grad()
def init_weights(module: nn.Module, *, std: float, seed: int) -> None:
    """Fills the module's parameters. A shared parameter is drawn once, under its first name."""
    for name, parameter in module.named_parameters():
        parameter.copy_(initial_value(name, parameter.shape, std=std, seed=seed))


def initial_value(name: str, shape: torch.Size, *, std: float, seed: int) -> torch.Tensor:
    """What the parameter `name` starts from, float32 on the CPU: a function of (seed, name, shape) alone, so that
    whoever holds a part of a model draws the same weights as who holds all of it."""
    if len(shape) <= 1:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.float32)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.empty(shape, dtype=torch.float32).normal_(0, std, generator=generator)
