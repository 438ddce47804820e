"""Early-exit large language models: tune, generate and measure models whose inner layers can answer too.

The public names are loaded when first used, so that `import eellm` is quick and what only thinks loads no torch.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "EarlyExitLM": "eellm.exits.lm",
    "Engine": "eellm.infer.engine",
    "EellmError": "eellm.errors",
    "ExitConfig": "eellm.config.model",
    "GenerateConfig": "eellm.config.infer",
    "Generation": "eellm.infer.result",
    "ModelConfig": "eellm.config.model",
    "RopeConfig": "eellm.config.model",
    "Sampling": "eellm.config.infer",
    "Token": "eellm.infer.result",
    "add_exits": "eellm.exits.lm",
    "build": "eellm.exits.lm",
    "generate": "eellm.infer.generate",
    "load": "eellm.checkpoint.hf",
    "save": "eellm.checkpoint.hf",
    "save_adapter": "eellm.checkpoint.exits",
    "stream": "eellm.infer.generate",
}
__all__ = list(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'eellm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
