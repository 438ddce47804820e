"""Random weights, the same for the same seed whatever the device: every matrix N(0, std), norms 1, biases 0."""

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
    """Fills the module's parameters in the order of their names. A shared parameter is drawn once."""
    generator = torch.Generator("cpu").manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        if parameter.dim() > 1:
            values = torch.empty(parameter.shape, dtype=torch.float32).normal_(0, std, generator=generator)
            parameter.copy_(values)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
