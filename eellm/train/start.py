"""What a run's weights start from: random ones, or a model directory's, with copies for the exits that it lacks."""

import dataclasses
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from eellm.checkpoint.parts import ModelParts, read_model_config
from eellm.config.model import ModelConfig
from eellm.errors import CheckpointError, ConfigError
from eellm.model.init import initial_value
from eellm.pipeline.placed import PlacedModel, exit_source

FREE = {"exits", "max_seq_len", "init_std", "bos_token_id", "eos_token_ids"}
"""What a recipe may say otherwise than the directory that it starts from."""


def merged_model(recipe: ModelConfig, directory: Path) -> ModelConfig:
    """The recipe's model with the directory's exits too. Raises ConfigError where they aren't the same backbone."""
    found = read_model_config(directory)
    ours, theirs = _filled(recipe), _filled(found)
    for field in dataclasses.fields(ModelConfig):
        mine, other = getattr(ours, field.name), getattr(theirs, field.name)
        if field.name not in FREE and mine != other:
            raise ConfigError(f"model.{field.name} = {mine!r}, and {directory} has {other!r}; make them the same")
    for exit in found.exits:
        same = [e for e in recipe.exits if e.layer == exit.layer]
        if same and same[0] != exit:
            raise ConfigError(f"model.exits: {directory} has another exit at layer {exit.layer} than the recipe")
    new = [exit for exit in recipe.exits if exit.layer not in found.exit_layers]
    ends = {"bos_token_id": found.bos_token_id, "eos_token_ids": found.eos_token_ids}
    return replace(recipe, exits=(*found.exits, *new), **ends)  # pyrefly: ignore[bad-argument-type]


def start_at_random(placed: PlacedModel, *, seed: int) -> None:
    """Every matrix N(0, init_std), the same under every layout of processes."""
    std = placed.config.init_std
    placed.fill(lambda name, shape: initial_value(name, shape, std=std, seed=seed))


def start_from(placed: PlacedModel, directory: Path, *, seed: int) -> None:
    """The directory's weights; exits that it lacks are copies of its parts. Raises CheckpointError."""
    parts, config = ModelParts(directory), placed.config

    def value(name: str, shape: torch.Size) -> Tensor:
        found = find_value(parts, name, config)
        if found is None and name.startswith("exits."):
            found = initial_value(name, shape, std=config.init_std, seed=seed)
        if found is None or found.shape != shape:
            what = "is missing" if found is None else f"has shape {tuple(found.shape)}, not {tuple(shape)}"
            raise CheckpointError(f"{directory}: '{name}' {what}")
        return found

    placed.fill(value)


def find_value(parts: ModelParts, name: str, config: ModelConfig) -> Tensor | None:
    """The directory's parameter `name`; of an exit that it lacks, the part that the exit starts as a copy of."""
    found = parts.get(name)
    if found is None and name.startswith("exits."):
        source = exit_source(name, config)
        found = None if source is None else find_value(parts, source, config)
    if found is None and name == "decoder.output.weight" and config.tie_embeddings:
        found = parts.get("decoder.embed.weight")
    return found


def _filled(config: ModelConfig) -> ModelConfig:
    """With the numbers that stand for what is unset."""
    return replace(config, head_dim=config.head_size, num_kv_heads=config.kv_heads)
