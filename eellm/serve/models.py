"""The models of a server: each loaded, with an engine, a thread and a name of its own.

A base directory is loaded once for itself and all its adapters, and their engines share the matrices packed of it.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from eellm.checkpoint.exits import EXITS_JSON, base_of, load_exits
from eellm.checkpoint.hf import load
from eellm.config.serve import ServeConfig, ServedModel
from eellm.exits.lm import EarlyExitLM
from eellm.infer.engine import Engine
from eellm.infer.packing import Packed
from eellm.serve.forms import Names
from eellm.serve.worker import Worker


@dataclass(frozen=True, kw_only=True)
class Served:
    """One model, by name."""

    name: str
    engine: Engine
    worker: Worker
    names: Names
    created: int

    @property
    def model(self) -> EarlyExitLM:
        return self.engine.model


def serve_models(config: ServeConfig, *, cache_dir: Path | None) -> dict[str, Served]:
    """Loads all, and measures what their parts cost unless told not to. Raises CheckpointError, ConfigError."""
    loaded = load_models(config.served(), dtype=config.dtype, device=config.device)
    packed = Packed()
    return {
        name: make_served(name, model, config, cache_dir=cache_dir, packed=packed) for name, model in loaded.items()
    }


def make_served(
    name: str, model: EarlyExitLM, config: ServeConfig, *, cache_dir: Path | None = None, packed: Packed | None = None
) -> Served:
    """packed: of the other models' engines."""
    engine = Engine(
        model,
        max_batch=config.max_batch,
        max_tokens=config.max_tokens,
        quantize=config.quantize,
        compile=None if config.compile else False,
        cache_dir=cache_dir,
        workers=config.workers,
        shadow=config.shadow,
        recall=config.recall,
        packed=packed,
        tp=config.tp,
    )
    if config.warm_up:
        engine.generate([[0]], method="auto", max_new_tokens=2, ignore_eos=True)
    worker = Worker(engine, max_waiting=config.max_waiting, stream_s=config.stream_s, name=name)
    return Served(name=name, engine=engine, worker=worker, names=Names(model.tokenizer), created=int(time.time()))


def load_models(entries: Iterable[ServedModel], *, dtype: str, device: str) -> dict[str, EarlyExitLM]:
    models: dict[str, EarlyExitLM] = {}
    backbones: dict[Path, EarlyExitLM] = {}
    for entry in entries:
        path, adapter = Path(entry.path), entry.adapter
        if adapter is None and (path / EXITS_JSON).exists() and not (path / "config.json").exists():
            path, adapter = base_of(path), path
        if not path.is_dir():
            models[entry.name] = load(entry.path, adapter, dtype=dtype, device=device)
            continue
        base = path.resolve()
        if base not in backbones:
            backbones[base] = load(path, dtype=dtype, device=device)
        model = sharing(backbones[base])
        if adapter is not None:
            load_exits(model, adapter, base=base)
        models[entry.name] = model.eval()
    return models


def sharing(model: EarlyExitLM) -> EarlyExitLM:
    """A model of the same parameters, exits included, to which others can be added."""
    with torch.device("meta"):
        other = EarlyExitLM(replace(model.config, exits=()))
    other.config, other.decoder, other.tokenizer = model.config, model.decoder, model.tokenizer
    other.certificates = model.certificates
    for layer, exit in model.exits.items():
        other.exits[layer] = exit
    return other
