"""Model directories, read and written: a Hugging Face directory, plus exits beside it or in an adapter directory.

`load` takes a directory, an adapter directory (it names its base), a .gguf file, or the id of a model on the hub where
`huggingface_hub` is installed. `save` writes what any Hugging Face tool reads as the plain model; the exits stand
beside it and are ignored by those, for an index names the model's own files.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eellm.checkpoint.exits import EXITS_FILE, EXITS_JSON, base_of, load_exits, write_exits
from eellm.checkpoint.files import INDEX, read_json, read_tensors, replacing, weight_files, write_json, write_sharded
from eellm.checkpoint.gguf import read_gguf
from eellm.checkpoint.names import config_from_hf, config_to_hf, to_hf_name
from eellm.config.model import ModelConfig
from eellm.errors import CheckpointError, ConfigError
from eellm.exits.lm import EarlyExitLM
from eellm.model.decoder import Decoder
from eellm.model.init import torch_device, torch_dtype
from eellm.text.tokenizer import FILES as TOKENIZER_FILES
from eellm.text.tokenizer import Tokenizer

MAX_SHARD_BYTES = 5 * 10**9
_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", INDEX)
_OWNED = (*_WEIGHTS, "generation_config.json", EXITS_JSON, EXITS_FILE)


def load(
    path: str | Path,
    adapter: str | Path | None = None,
    *,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
) -> EarlyExitLM:
    """Reads a model with its exits; `model.tokenizer` is set where the directory has one.

    path: a model directory, an adapter directory, a .gguf file or a hub id. adapter: a directory with exits made for
    this model. dtype: of all weights, whatever they are stored in. Raises CheckpointError; ConfigError for a dtype or
    device that isn't there.
    """
    torch_dtype(dtype)
    device = torch_device(device)
    directory = _find(path)
    if directory.suffix == ".gguf":
        return _load_gguf(directory, adapter, dtype, device)
    if _is_adapter(directory):
        if adapter is not None:
            raise CheckpointError(f"{directory} is an adapter itself; name its base, or leave the second adapter out")
        return load(base_of(directory), directory, dtype=dtype, device=device)
    model = _load_backbone(directory, dtype, device)
    if (directory / EXITS_JSON).exists():
        load_exits(model, directory)
    if adapter is not None:
        load_exits(model, Path(adapter), base=directory)
    return model


def save(model: EarlyExitLM, path: str | Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Writes backbone, exits and tokenizer; the directory is replaced in one go or left as it was.

    A tokenizer that is there already stays where the model has none.

    Raises CheckpointError for a full disk, UnsupportedError for features that no known architecture combines.
    """
    directory = Path(path)
    config = config_to_hf(model.config, str(model.decoder.embed.weight.dtype).removeprefix("torch."))
    owned = _OWNED if model.tokenizer is None else (*_OWNED, *TOKENIZER_FILES)
    with replacing(directory, marker="config.json", owned=owned) as temporary:
        # vLLM takes every *.safetensors of a directory for the model's own, but for those that an index leaves out
        write_sharded(temporary, _named_for_hf(model.decoder), max_shard_bytes, indexed=bool(model.config.exits))
        eos = config["eos_token_id"]
        if eos is not None:
            write_json(
                temporary / "generation_config.json", {"eos_token_id": eos, "bos_token_id": config["bos_token_id"]}
            )
        if model.tokenizer is not None:
            for name, content in model.tokenizer.files().items():
                (temporary / name).write_bytes(content)
        if model.config.exits:
            write_exits(temporary, model, base=None)
        write_json(temporary / "config.json", config)


def stored_dtype(path: str | Path) -> str:
    """The dtype that a model directory, or an adapter's base, is stored in; float32 for GGUF files."""
    directory = _find(path)
    if directory.suffix == ".gguf":
        return "float32"
    if _is_adapter(directory):
        directory = base_of(directory)
    hf = read_json(directory / "config.json")
    return hf.get("dtype") or hf.get("torch_dtype") or "float32"


def exits_directory(path: str | Path, adapter: str | Path | None = None) -> Path:
    """The directory with the exits that `load` would read for these. Raises CheckpointError where there are none."""
    directory = _find(path) if adapter is None else Path(adapter)
    if not (directory / EXITS_JSON).exists():
        raise CheckpointError(f"{directory} has no {EXITS_JSON}: there are no exits; 'eellm tune' makes some")
    return directory


def _find(path: str | Path) -> Path:
    """A local path, or where the hub's client has put the model with this id."""
    local = Path(path)
    if local.exists():
        return local
    if str(path).count("/") != 1 or str(path).startswith((".", "/", "~")) or local.suffix == ".gguf":
        raise CheckpointError(f"{path}: no such model directory or .gguf file")
    try:
        from huggingface_hub import snapshot_download  # optional: extra eellm[hub]
    except ImportError:
        raise CheckpointError(
            f"{path}: no such directory; to fetch a model by its hub id, pip install 'eellm[hub]'"
        ) from None
    try:
        patterns = ["*.json", "*.safetensors", "*.jinja"]
        return Path(snapshot_download(str(path), allow_patterns=patterns))
    except Exception as error:  # the hub's client raises errors of many libraries
        raise CheckpointError(f"{path}: no such directory, and the hub didn't give it: {error}") from error


def _is_adapter(directory: Path) -> bool:
    return not (directory / "config.json").exists() and (directory / EXITS_JSON).exists()


def _load_backbone(directory: Path, dtype: str, device: str | torch.device) -> EarlyExitLM:
    if not (directory / "config.json").exists():
        raise CheckpointError(f"{directory} is not a model directory: it has no config.json")
    hf = read_json(directory / "config.json")
    if (directory / "generation_config.json").exists():  # a chat's end is often named there alone
        more = read_json(directory / "generation_config.json").get("eos_token_id")
        hf["eos_token_id"] = list(dict.fromkeys((*_listed(hf.get("eos_token_id")), *_listed(more))))
    tensors = ((name, t) for file in weight_files(directory) for name, t in read_tensors(file))
    model = _assemble(config_of(directory, hf), tensors, dtype, device, directory)
    model.tokenizer = Tokenizer.from_dir(directory)
    return model


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _load_gguf(file: Path, adapter: str | Path | None, dtype: str, device: str | torch.device) -> EarlyExitLM:
    if adapter is not None:
        raise CheckpointError(f"{file}: an adapter's base is a model directory; `eellm import {file} DIR` makes one")
    gguf = read_gguf(file)
    model = _assemble(config_of(file, gguf.config), gguf.tensors(), dtype, device, file)
    model.tokenizer = Tokenizer.from_files(gguf.tokenizer_files) if gguf.tokenizer_files else None
    return model


def config_of(path: Path, hf: dict[str, Any]) -> ModelConfig:
    """The content of the config.json at `path`. Raises CheckpointError."""
    try:
        return config_from_hf(hf)
    except (TypeError, ValueError, AttributeError, KeyError, ConfigError) as error:
        raise CheckpointError(f"{path}: config.json: {error}") from None


def _assemble(
    config: ModelConfig, tensors: Iterable[tuple[str, Tensor]], dtype: str, device: str | torch.device, source: Path
) -> EarlyExitLM:
    """A model whose backbone holds `tensors`, each cast and placed as it comes."""
    with torch.device("meta"):
        model = EarlyExitLM(config)
    ours = {to_hf_name(name): name for name, _ in model.decoder.named_parameters()}
    shapes = {name: parameter.shape for name, parameter in model.decoder.named_parameters()}
    state: dict[str, Tensor] = {}
    for theirs, tensor in tensors:
        name = ours.get(theirs)
        if name is None:
            if (theirs == "lm_head.weight" and config.tie_embeddings) or theirs.endswith("rotary_emb.inv_freq"):
                continue
            raise CheckpointError(f"{source}: unexpected tensor '{theirs}'; the weights don't fit config.json")
        if tensor.shape != shapes[name]:
            raise CheckpointError(
                f"{source}: '{theirs}' has shape {tuple(tensor.shape)}, config.json wants {tuple(shapes[name])}"
            )
        # NOTE a copy: safetensors maps the file, where tensors lie unaligned and end with it
        state[name] = tensor.to(device=device, dtype=torch_dtype(dtype), copy=True)
    missing = sorted(theirs for theirs, name in ours.items() if name not in state)
    if missing:
        raise CheckpointError(f"{source}: tensor '{missing[0]}' is missing ({len(missing)} in all)")
    model.decoder.load_state_dict(state, assign=True, strict=False)  # strict: checked above; tied ones aren't listed
    model.decoder.tie()
    return model.eval()


def _named_for_hf(decoder: Decoder) -> dict[str, Tensor]:
    """Parameters under their Hugging Face names; a tied output matrix is not listed."""
    return {to_hf_name(name): parameter for name, parameter in decoder.named_parameters()}
