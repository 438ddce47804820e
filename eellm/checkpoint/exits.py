"""Exits on disk: exits.json (what they are) and exits.safetensors (their weights), beside a model or on their own.

exits.json, format 1:
    {"format_version": 1,
     "base": {"path": "../base", "sha256": "…"},      of an adapter directory; null inside a model directory
     "weights_sha256": "…",                            of exits.safetensors, so that a half-replaced pair is refused
     "exits": [{"layer": 10, "kind": "mlp", "head": "tied", "norm": "own", "gate_size": 0}, …],
     "certificates": [{"metric": "disagreement", "risk": 0.02, …}, …]}    where `eellm calibrate` made some

Weights are named `<layer>.<parameter>`. What an exit shares with the final head isn't stored.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from eellm.checkpoint.files import (
    fingerprint,
    read_json,
    read_tensors,
    replace_json,
    replacing,
    weight_files,
    write_json,
    write_tensors,
)
from eellm.config.calibrate import Certificate
from eellm.config.load import from_dict, to_dict
from eellm.config.model import ExitConfig, ModelConfig
from eellm.errors import BaseMismatchError, CheckpointError, ConfigError, UnsupportedError
from eellm.exits.heads import Exit
from eellm.exits.lm import EarlyExitLM

EXITS_JSON = "exits.json"
EXITS_FILE = "exits.safetensors"
FORMAT_VERSION = 1


def write_exits(
    directory: Path, model: EarlyExitLM, *, base: dict[str, str] | None, layers: Sequence[int] | None = None
) -> None:
    """Writes both files into `directory`, which the caller replaces as a whole. layers: of the exits; None: all."""
    chosen = [e for e in model.config.exits if layers is None or e.layer in layers]
    ours = {e.layer for e in chosen}
    tensors = {f"{e.layer}.{name}": t for e in chosen for name, t in model.exit(e.layer).state_dict().items()}
    write_tensors(directory / EXITS_FILE, tensors)
    data = {
        "format_version": FORMAT_VERSION,
        "base": base,
        "weights_sha256": fingerprint([directory / EXITS_FILE]),
        "exits": [dataclasses.asdict(e) for e in chosen],
    }
    certificates = [c for c in model.certificates if ours & c.by_layer.keys()]
    write_json(directory / EXITS_JSON, _with_certificates(data, certificates))


def save_adapter(
    model: EarlyExitLM, directory: str | Path, *, base: str | Path, layers: Sequence[int] | None = None
) -> None:
    """Writes the model's exits as an adapter of the model directory `base`, which they were made for.

    layers: of the exits that belong to the adapter; None: all that the base doesn't have itself. Raises ConfigError for
    an exit that the model lacks or the base has, CheckpointError for a full disk or a model's directory.
    """
    directory, base = Path(directory), Path(base)
    if (directory / "config.json").exists():
        raise CheckpointError(f"{directory} is a model directory; name another one for the adapter")
    layers = _adapter_layers(model, base, layers)
    place = os.path.relpath(base.resolve(), directory.resolve())
    with replacing(directory, marker=EXITS_JSON) as temporary:
        named = {"path": place, "sha256": fingerprint(weight_files(base))}
        write_exits(temporary, model, base=named, layers=layers)


def load_exits(model: EarlyExitLM, directory: Path, *, base: Path | None = None) -> None:
    """Adds the exits stored in `directory` to `model`; `base` is the model's own directory, for adapters.

    Raises UnsupportedError for a newer format, BaseMismatchError for an adapter of another base, CheckpointError for
    weights that don't fit.
    """
    model.config, exits = add_stored_exits(model.config, directory, base=base)
    model.certificates += stored_certificates(directory)
    file = directory / EXITS_FILE
    tensors = dict(read_tensors(file))
    like = model.decoder.embed.weight
    for exit_config in exits:
        with torch.device("meta"):
            exit = Exit(model.config, exit_config)
        prefix = f"{exit_config.layer}."
        own = {n.removeprefix(prefix): t.to(like) for n, t in tensors.items() if n.startswith(prefix)}
        try:
            exit.load_state_dict(own, assign=True)
        except RuntimeError as error:
            raise CheckpointError(
                f"{file}: exit {exit_config.layer} doesn't fit: {' '.join(str(error).split())}"
            ) from None
        model.exits[str(exit_config.layer)] = exit.eval()


def add_stored_exits(
    config: ModelConfig, directory: Path, *, base: Path | None = None
) -> tuple[ModelConfig, tuple[ExitConfig, ...]]:
    """The model with the exits stored in `directory`, and those alone; the files are checked, their weights not loaded.

    base, errors: as for `load_exits`.
    """
    data = read_exits_json(directory)
    if base is not None:
        _check_base(directory, data["base"], base)
    try:
        exits = tuple(from_dict(ExitConfig, entry, f"exits[{i}]") for i, entry in enumerate(data["exits"]))
        config = config.with_exits((*config.exits, *exits))
    except ConfigError as error:
        raise CheckpointError(f"{directory / EXITS_JSON}: {error}") from None
    file = directory / EXITS_FILE
    next(read_tensors(file), None)  # refuses a file that is cut
    if fingerprint([file]) != data.get("weights_sha256"):
        raise CheckpointError(f"{file} doesn't belong to the {EXITS_JSON} beside it; write the exits again")
    return config, exits


def read_exits_json(directory: Path) -> dict[str, Any]:
    """The content of exits.json, with its version checked."""
    data = read_json(directory / EXITS_JSON)
    version, base = data.get("format_version"), data.get("base")
    if not isinstance(version, int) or version < 1:
        raise CheckpointError(f"{directory / EXITS_JSON} is not an exits file: format_version = {version!r}")
    if version > FORMAT_VERSION:
        raise UnsupportedError(
            f"{directory / EXITS_JSON} has format {version}, this release reads up to {FORMAT_VERSION}; upgrade eellm"
        )
    if not isinstance(data.get("exits"), list):
        raise CheckpointError(f"{directory / EXITS_JSON} is not an exits file: it lists no 'exits'")
    if base is not None and not (isinstance(base, dict) and isinstance(base.get("path"), str)):
        raise CheckpointError(f"{directory / EXITS_JSON} is not an exits file: base = {base!r}")
    return {**data, "base": base}


def stored_certificates(directory: Path) -> tuple[Certificate, ...]:
    """The certificates stored with the exits in `directory`."""
    entries = read_exits_json(directory).get("certificates", [])
    try:
        return tuple(from_dict(Certificate, entry, f"certificates[{i}]") for i, entry in enumerate(entries))
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{directory / EXITS_JSON}: {error}") from None


def store_certificate(directory: Path, certificate: Certificate) -> None:
    """Adds it to the exits in `directory`, in place of one for the same metric, risk and confidence; nothing else
    changes. Raises CheckpointError for a directory without exits or a full disk."""
    data = read_exits_json(directory)
    others = [c for c in stored_certificates(directory) if c.key != certificate.key]
    replace_json(directory / EXITS_JSON, _with_certificates(data, [*others, certificate]))


def _with_certificates(data: dict[str, Any], certificates: Sequence[Certificate]) -> dict[str, Any]:
    return data | ({"certificates": [to_dict(c) for c in certificates]} if certificates else {})


def base_of(adapter: Path) -> Path:
    """The model directory that an adapter directory names."""
    base = read_exits_json(adapter)["base"]
    if base is None:
        raise CheckpointError(f"{adapter} has exits but neither a model nor the name of its base")
    directory = adapter / base["path"]
    if not directory.exists():
        raise CheckpointError(f"{adapter} is an adapter of {directory}, which isn't there; name its base beside it")
    return directory


def _adapter_layers(model: EarlyExitLM, base: Path, layers: Sequence[int] | None) -> Sequence[int]:
    """Those asked for, checked; by default all that the base doesn't have itself."""
    own = [e.get("layer") for e in read_exits_json(base)["exits"]] if (base / EXITS_JSON).exists() else []
    if layers is None:
        return [layer for layer in model.config.exit_layers if layer not in own]
    for layer in layers:
        if layer not in model.config.exit_layers:
            raise ConfigError(f"layers: the model has no exit at layer {layer}")
        if layer in own:
            raise ConfigError(f"layers: exit {layer} is the base's own; an adapter holds what its base lacks")
    return layers


def _check_base(adapter: Path, named: dict[str, str] | None, base: Path) -> None:
    if named is None:
        raise CheckpointError(f"{adapter} names no base, so it is no adapter; load it by itself")
    found = fingerprint(weight_files(base))
    if found != named.get("sha256"):
        raise BaseMismatchError(
            f"the exits in {adapter} were made for another base ({named.get('path')}, sha256 "
            f"{str(named.get('sha256'))[:12]}…) than {base} ({found[:12]}…); use that base, or add exits to this one"
        )
