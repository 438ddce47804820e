"""Some prompts, or one, on an engine made for this call."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eellm.config.infer import GenerateConfig, generate_config
from eellm.exits.lm import EarlyExitLM
from eellm.infer.engine import Engine
from eellm.infer.handle import Handle
from eellm.infer.request import Prompt, check_prompts
from eellm.infer.result import Generation


def generate(
    model: EarlyExitLM,
    prompts: Sequence[Prompt],
    *,
    workers: int = 1,
    tp: int = 1,
    cache_dir: str | Path | None = None,
    **fields: Any,
) -> list[Generation]:
    """`Engine.generate` on an engine made for this call: the prompts are served together. workers, tp, cache_dir: as
    `Engine`'s; to start workers takes seconds each time.

    Raises ConfigError or RequestError before anything is generated.
    """
    max_batch = max(1, min(len(check_prompts(prompts)), 16))
    if "options" not in fields:
        generate_config(**fields)  # refuses what makes no sense before workers are started
    size = {"max_batch": max_batch, "max_tokens": model.config.max_seq_len}
    with Engine(model, **size, workers=workers, tp=tp, cache_dir=cache_dir) as engine:
        return engine.generate(prompts, **fields)


def stream(model: EarlyExitLM, prompt: Prompt, options: GenerateConfig = GenerateConfig()) -> Handle:
    """An iterator over the new tokens of one prompt; after it ended, `finish_reason` and `stats()` are there."""
    return Engine(model, max_batch=1, max_tokens=model.config.max_seq_len).submit(prompt, options)
