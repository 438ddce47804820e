"""What a worker gets when it starts: its part of the model, by name, size and value. No code, no files.

engine: send_plan → worker: receive_plan, makes its stage, send_facts → engine: receive_facts
"""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eellm.config.load import from_dict, to_dict
from eellm.config.model import ModelConfig
from eellm.infer.pipelined.wire import START_TIMEOUT, Group, wait_for
from eellm.infer.quantize import Quantize
from eellm.model.init import torch_dtype

SETUP_TAG = 10


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One worker's."""

    first: int
    """Its first layer."""
    last: int
    tp: int
    """Processes that share a stage."""
    quantize: Quantize | None
    compile: bool | None
    cache_dir: str | None
    device: str
    num_threads: int
    """0: as many as it has."""
    max_in_flight: int
    """Messages on their way from one process to another, at the most."""

    @property
    def layers(self) -> range:
        return range(self.first, self.last + 1)

    @property
    def directory(self) -> Path | None:
        """`cache_dir`."""
        return None if self.cache_dir is None else Path(self.cache_dir)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a worker says of itself when it is ready."""

    pid: int
    host: str
    weight_bytes: int


def stage_weights(weights: Mapping[str, Tensor], first: int, last: int, num_layers: int) -> dict[str, Tensor]:
    """What the layers and exits of a stage need, of a whole model's."""
    layers = range(first, last + 1)
    starts = tuple(f"{part}.{n}." for n in layers for part in ("decoder.layers", "exits"))
    chosen = {name: t for name, t in weights.items() if name.startswith(starts)}
    if last == num_layers or any(name.startswith("exits.") for name in chosen):
        chosen |= {name: t for name, t in weights.items() if name.startswith(("decoder.norm.", "decoder.output."))}
    return chosen


def send_plan(group: Group, peer: int, model: ModelConfig, plan: Plan, weights: Mapping[str, Tensor]) -> None:
    names = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in weights.items()]
    _send_json(group, peer, {"plan": asdict(plan), "model": to_dict(model), "weights": names})
    for tensor in weights.values():
        wait_for(group.send([tensor.detach().cpu().contiguous()], peer, SETUP_TAG), START_TIMEOUT)


def receive_plan(group: Group) -> tuple[ModelConfig, Plan, dict[str, Tensor]]:
    data = _receive_json(group, 0)
    weights = {}
    for name, dtype, shape in data["weights"]:
        weights[name] = torch.empty(shape, dtype=torch_dtype(dtype))
        wait_for(group.recv([weights[name]], 0, SETUP_TAG), START_TIMEOUT)
    return from_dict(ModelConfig, data["model"]), Plan(**data["plan"]), weights


def send_facts(group: Group, weight_bytes: int) -> None:
    _send_json(group, 0, {"pid": os.getpid(), "host": platform.node(), "weight_bytes": weight_bytes})


def receive_facts(group: Group, peer: int) -> Facts:
    return Facts(**_receive_json(group, peer))


def _send_json(group: Group, peer: int, value: Any) -> None:
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    wait_for(group.send([torch.tensor([len(data)])], peer, SETUP_TAG), START_TIMEOUT)
    wait_for(group.send([data], peer, SETUP_TAG), START_TIMEOUT)


def _receive_json(group: Group, peer: int) -> Any:
    size = torch.zeros(1, dtype=torch.int64)
    wait_for(group.recv([size], peer, SETUP_TAG), START_TIMEOUT)
    data = torch.empty(int(size), dtype=torch.uint8)
    wait_for(group.recv([data], peer, SETUP_TAG), START_TIMEOUT)
    return json.loads(data.numpy().tobytes())
