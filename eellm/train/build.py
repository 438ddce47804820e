"""From a recipe to what a tuning run works on: the model with its exits, and the rows of text."""

import dataclasses

from eellm.checkpoint.exits import load_exits
from eellm.checkpoint.hf import load
from eellm.config.tune import BaseConfig, DataConfig
from eellm.data.documents import read_documents
from eellm.data.packing import Rows, pack
from eellm.errors import ConfigError, DataError
from eellm.exits.lm import EarlyExitLM, add_exits


def build_model(config: BaseConfig, *, seed: int) -> tuple[EarlyExitLM, tuple[int, ...]]:
    """The model, frozen but for the exits to be tuned, and the layers of those.

    Exits that the base has of its own stay as they are. Raises ConfigError where nothing is left to train.
    """
    dtype = "float32" if config.dtype == "bfloat16" else config.dtype
    model = load(config.base, dtype=dtype, device=config.device)
    present = model.config.exit_layers
    if config.adapter is not None:
        load_exits(model, config.adapter, base=config.base)
    else:
        add_exits(model, config.exits, init=config.init, seed=seed)
    layers = tuple(layer for layer in model.config.exit_layers if layer not in present)
    model.requires_grad_(False)
    for layer in layers:
        model.exit(layer).requires_grad_(True)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("model.exits: none has weights of its own to train; choose another kind, or give a gate_size")
    return model, layers


def build_rows(config: DataConfig, model: EarlyExitLM) -> tuple[Rows, Rows]:
    """Training and validation rows."""
    if model.tokenizer is None:
        raise DataError("the base model has no tokenizer, which turns text into tokens; add its tokenizer.json")
    if config.seq_len > model.config.max_seq_len:
        raise ConfigError(f"data.seq_len = {config.seq_len}: the model's context is {model.config.max_seq_len}")
    train = pack(read_documents(config.train, model.tokenizer), config.seq_len)
    if config.validation:
        validation = pack(read_documents(config.validation, model.tokenizer), config.seq_len)
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
