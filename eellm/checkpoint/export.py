"""From a training run's checkpoint to a model: what `eellm export` writes as a Hugging Face directory with exits.

The checkpoint says what model it is of (its recipe) and brings the tokenizer; its weights may have been saved under any
layout of processes. A tied output matrix is stored under the embedding's name only, and the optimizer's part is not
read. One process, no process group.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from eellm.checkpoint.steps import MARKER, check_files, list_steps, read_marker, step_dir
from eellm.checkpoint.store import load_tensors
from eellm.config.load import from_dict
from eellm.config.model import ModelConfig
from eellm.errors import CheckpointError, ConfigError
from eellm.exits.lm import EarlyExitLM
from eellm.model.init import torch_dtype
from eellm.text.tokenizer import FILES, PIPELINE, Tokenizer


def find_checkpoint(path: Path) -> Path:
    """`path` itself, where it is a checkpoint, or the newest one of the run whose `out_dir` it is.

    Raises CheckpointError where there is none.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint")
    if (path / MARKER).is_file():
        return path
    steps = list_steps(path / "checkpoints")
    if not steps:
        raise CheckpointError(
            f"{path}: not a checkpoint: it has neither {MARKER} nor checkpoints/step-…; name a run's out_dir, or one "
            "of the directories in its checkpoints/"
        )
    return step_dir(path / "checkpoints", steps[-1])


def load_checkpoint(path: Path, *, dtype: str = "float32") -> EarlyExitLM:
    """The model of a checkpoint, with its exits; `tokenizer` is set where the checkpoint has one.

    path: see `find_checkpoint`. dtype: of the weights, whatever they were trained in. Raises CheckpointError for a
    damaged checkpoint.
    """
    path = find_checkpoint(path)
    marker = read_marker(path)
    tokenizer = _tokenizer(path, marker)
    with torch.device("meta"):
        model = EarlyExitLM(_config(path, marker, tokenizer))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}  # a tied matrix once
    tensors = {f"model.{name}": torch.empty(shape, dtype=torch_dtype(dtype)) for name, shape in shapes.items()}
    load_tensors(path, tensors)
    model.load_state_dict({name: tensors[f"model.{name}"] for name in shapes}, assign=True, strict=False)
    model.decoder.tie()
    model.tokenizer = tokenizer
    return model.eval()


def _config(path: Path, marker: dict[str, Any], tokenizer: Tokenizer | None) -> ModelConfig:
    """The recipe's model; the tokenizer says how texts begin and end where the recipe doesn't."""
    recipe = marker["state"].get("recipe")
    if not isinstance(recipe, dict) or "model" not in recipe:
        raise CheckpointError(f"{path}: holds no recipe, so it isn't of a training run")
    try:
        config = from_dict(ModelConfig, recipe["model"], "model")
    except ConfigError as error:
        raise CheckpointError(f"{path}: its recipe isn't one of this eellm: {error}") from None
    if tokenizer is None:
        return config
    if not config.eos_token_ids and tokenizer.eos_id is not None:
        config = replace(config, eos_token_ids=(tokenizer.eos_id,))
    if config.bos_token_id is None:
        config = replace(config, bos_token_id=tokenizer.bos_id)
    return config


def _tokenizer(path: Path, marker: dict[str, Any]) -> Tokenizer | None:
    names = [name for name in FILES if name in marker["files"]]
    if PIPELINE not in names:
        return None
    check_files(path, marker, names)
    return Tokenizer.from_files({name: (path / name).read_bytes() for name in names})
