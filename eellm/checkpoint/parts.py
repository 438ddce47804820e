"""A model directory, parameter by parameter: for whoever holds a part of the model and needs that part's weights.

Names are ours, of the whole model: `decoder.layers.3.attn.q.weight`, `exits.2.norm.weight`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from eellm.checkpoint.exits import EXITS_FILE, EXITS_JSON, read_exits_json
from eellm.checkpoint.files import read_json, weight_files
from eellm.checkpoint.names import config_from_hf, to_hf_name
from eellm.config.load import from_dict
from eellm.config.model import ExitConfig, ModelConfig
from eellm.errors import CheckpointError
from eellm.text.tokenizer import Tokenizer


class ModelParts:
    """A Hugging Face directory, with exits or without."""

    def __init__(self, directory: Path) -> None:
        """Raises CheckpointError for a directory that isn't a model's."""
        self.directory = directory
        self.config = read_model_config(directory)
        self.tokenizer = Tokenizer.from_dir(directory)
        files = weight_files(directory)
        if self.config.exits:
            files.append(directory / EXITS_FILE)
        self._files: dict[str, Any] = {}
        for path in files:
            file = safe_open(path, framework="pt")
            self._files |= dict.fromkeys(file.keys(), file)

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
    config = config_from_hf(read_json(directory / "config.json"))
    if not (directory / EXITS_JSON).exists():
        return config
    entries = read_exits_json(directory)["exits"]
    return replace(config, exits=tuple(from_dict(ExitConfig, entry) for entry in entries))
