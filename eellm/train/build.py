"""From a recipe to what a tuning run works on: the weights of any part of the model, and the rows of text."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from eellm.checkpoint.parts import ModelParts, read_model_config
from eellm.config.model import ModelConfig
from eellm.config.tune import BaseConfig, DataConfig
from eellm.data.documents import read_documents
from eellm.data.packing import Rows, pack
from eellm.errors import CheckpointError, ConfigError, DataError
from eellm.exits.lm import EarlyExitLM
from eellm.model.init import initial_value, torch_dtype
from eellm.pipeline.placed import copy_part
from eellm.text.tokenizer import Tokenizer
from eellm.train.start import find_value


@dataclass(frozen=True, eq=False)
class Source:
    """The base's weights, and what the exits to be tuned start from. No process ever holds the whole model."""

    config: ModelConfig
    """The backbone with the exits to be tuned; exits that the base has of its own stay as they are, and out of it."""
    recipe: BaseConfig
    seed: int
    """Of random weights."""
    parts: ModelParts

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and of hidden states."""
        return torch_dtype("float32" if self.recipe.dtype == "bfloat16" else self.recipe.dtype)

    def load(self, part: EarlyExitLM, device: torch.device) -> EarlyExitLM:
        """Gives a part of the model, which has no weights yet (on the meta device), memory and values."""
        part = part.to_empty(device=device).eval()
        part.decoder.tie()  # to_empty made two of them
        with torch.no_grad():
            for name, parameter in part.named_parameters():
                copy_part(parameter, self._value(name, parameter.shape))
        return part

    def with_exits(self, weights: dict[str, Tensor]) -> EarlyExitLM:
        """The model with these weights of its exits, by name, and none of the backbone's: what an adapter is of."""
        with torch.device("meta"):
            model = EarlyExitLM(self.config)
        model.exits.load_state_dict({n.removeprefix("exits."): t for n, t in weights.items()}, assign=True)
        return model

    def _value(self, name: str, shape: torch.Size) -> Tensor:
        is_new = name.startswith("exits.") and self.recipe.adapter is None
        found = None if is_new and self.recipe.init == "random" else find_value(self.parts, name, self.config)
        if found is None and is_new:
            _, layer, own_name = name.split(".", 2)
            found = initial_value(own_name, shape, std=self.config.init_std, seed=self.seed + int(layer))
        if found is None or found.shape != shape:
            what = "is missing" if found is None else f"has shape {tuple(found.shape)}, not {tuple(shape)}"
            raise CheckpointError(f"{self.recipe.adapter or self.recipe.base}: '{name}' {what}")
        return found


def open_source(recipe: BaseConfig, *, seed: int) -> Source:
    """Raises CheckpointError, and ConfigError for exits that can't be added or have nothing to train."""
    parts = ModelParts(recipe.base, recipe.adapter)
    taken = read_model_config(recipe.base).exit_layers
    model = parts.config if recipe.adapter else parts.config.with_exits((*parts.config.exits, *recipe.exits))
    config = model.with_exits(tuple(exit for exit in model.exits if exit.layer not in taken))
    with torch.device("meta"):
        has_weights = any(True for _ in EarlyExitLM(config).exits.parameters())
    if not has_weights:
        raise ConfigError("model.exits: none has weights of its own to train; choose another kind, or give a gate_size")
    return Source(config, recipe, seed, parts)


def build_rows(config: DataConfig, tokenizer: Tokenizer | None, max_seq_len: int) -> tuple[Rows, Rows]:
    """Training and validation rows."""
    if tokenizer is None:
        raise DataError("the base model has no tokenizer, which turns text into tokens; add its tokenizer.json")
    if config.seq_len > max_seq_len:
        raise ConfigError(f"data.seq_len = {config.seq_len}: the model's context is {max_seq_len}")
    train = pack(read_documents(config.train, tokenizer), config.seq_len)
    if config.validation:
        validation = pack(read_documents(config.validation, tokenizer), config.seq_len)
        return train, _slice(validation, 0, config.validation_rows)
    cut = len(train) - config.validation_rows
    if cut < 1:
        raise DataError(
            f"data.train: {len(train)} rows of {config.seq_len} tokens leave none to learn from after "
            f"{config.validation_rows} for validation; give more text, or lower seq_len or validation_rows"
        )
    return _slice(train, 0, cut), _slice(train, cut, len(train))


def _slice(rows: Rows, start: int, stop: int) -> Rows:
    return Rows(**{field.name: getattr(rows, field.name)[start:stop] for field in dataclasses.fields(rows)})
