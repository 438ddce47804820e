"""Some prompts, or one, on an engine made for this call."""

from collections.abc import Sequence
from typing import Any

from eellm.config.infer import GenerateConfig
from eellm.exits.lm import EarlyExitLM
from eellm.infer.engine import Engine
from eellm.infer.handle import Handle
from eellm.infer.request import Prompt, check_prompts
from eellm.infer.result import Generation


def generate(
    model: EarlyExitLM, prompts: Sequence[Prompt], *, workers: int = 1, tp: int = 1, **fields: Any
) -> list[Generation]:
    """`Engine.generate` on an engine made for this call: the prompts are served together. workers, tp: as `Engine`'s;
    to start them takes seconds each time.

    Raises ConfigError or RequestError before anything is generated.
    """
    max_batch = max(1, min(len(check_prompts(prompts)), 16))
    with Engine(model, max_batch=max_batch, max_tokens=model.config.max_seq_len, workers=workers, tp=tp) as engine:
        return engine.generate(prompts, **fields)


def stream(model: EarlyExitLM, prompt: Prompt, options: GenerateConfig = GenerateConfig()) -> Handle:
    """An iterator over the new tokens of one prompt; after it ended, `finish_reason` and `stats()` are there."""
    return Engine(model, max_batch=1, max_tokens=model.config.max_seq_len).submit(prompt, options)
