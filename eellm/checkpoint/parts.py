"""A model directory, parameter by parameter: for whoever holds a part of the model and needs that part's weights.

Names are ours, of the whole model: `decoder.layers.3.attn.q.weight`, `exits.2.norm.weight`.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from eellm.checkpoint.exits import EXITS_FILE, EXITS_JSON, add_stored_exits, read_exits_json
from eellm.checkpoint.files import read_json, weight_files
from eellm.checkpoint.hf import config_of
from eellm.checkpoint.names import to_hf_name
from eellm.config.load import from_dict
from eellm.config.model import ExitConfig, ModelConfig
from eellm.errors import CheckpointError
from eellm.model.decoder import Decoder
from eellm.text.tokenizer import Tokenizer


class ModelParts:
    """A Hugging Face directory, with exits or without, and those of an adapter if one is named."""

    def __init__(self, directory: Path, adapter: Path | None = None) -> None:
        """Raises CheckpointError for a directory that isn't a model's, and for an adapter of another one."""
        self.directory = directory
        self.config = read_model_config(directory)
        self.tokenizer = Tokenizer.from_dir(directory)
        self._files = _open_all(weight_files(directory))
        _refuse_unexpected(directory, self._files, self.config)
        if self.config.exits:
            self._files |= _open_all([directory / EXITS_FILE])
        if adapter is not None:
            self.config, _ = add_stored_exits(self.config, adapter, base=directory)
            self._files |= _open_all([adapter / EXITS_FILE])

    def get(self, name: str) -> Tensor | None:
        """The parameter `name`, as stored; None where the directory doesn't have it."""
        if name.startswith("decoder."):
            stored = to_hf_name(name.removeprefix("decoder."))
        else:
            stored = name.removeprefix("exits.")
        return self._files[stored].get_tensor(stored) if stored in self._files else None


def read_model_config(directory: Path) -> ModelConfig:
    """What a model directory says of itself, its exits included. Raises CheckpointError."""
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory} is not a model directory: it has no config.json")
    config = config_of(directory, read_json(directory / "config.json"))
    if not (directory / EXITS_JSON).exists():
        return config
    entries = read_exits_json(directory)["exits"]
    return replace(config, exits=tuple(from_dict(ExitConfig, entry) for entry in entries))


def _open_all(paths: list[Path]) -> dict[str, Any]:
    """The file that each stored tensor is in."""
    files: dict[str, Any] = {}
    for path in paths:
        try:
            file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise CheckpointError(f"{path} is truncated or not a safetensors file ({error}); fetch it again") from None
        files |= dict.fromkeys(file.keys(), file)
    return files


def _refuse_unexpected(directory: Path, names: Iterable[str], config: ModelConfig) -> None:
    """Weights that the config doesn't know (biases, say) would be left out in silence."""
    with torch.device("meta"):
        known = {to_hf_name(name) for name, _ in Decoder(config).named_parameters()} | {"lm_head.weight"}
    for name in names:
        if name not in known and not name.endswith("rotary_emb.inv_freq"):
            raise CheckpointError(f"{directory}: unexpected tensor '{name}'; the weights don't fit config.json")
