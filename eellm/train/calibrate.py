"""What this machine can do, measured: `eellm plan --calibrate`.

    device → seconds of products, of layers, of a copy, of an optimizer's step, of a message → Hardware → a TOML file

A device is a GPU, or, on a CPU, a process with the threads that this one has: start it as a run's processes are started
(OMP_NUM_THREADS), and alone. Each number is the median of a few runs after one that isn't timed. This process measures
by itself; on a CPU, processes that compute side by side share its memory and get less.
A message goes between two new processes: over gloo on a CPU, over NCCL between two GPUs. With one GPU there is nothing
to send to, and a message is a copy. What connects machines can't be measured on one: it is taken to be 10 Gbit/s
Ethernet, or the link within a machine where that is slower. A container's memory limit isn't seen.
The GPU's way has not been run on a GPU yet.
"""

import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from eellm.config.check import check_choice
from eellm.config.load import to_dict
from eellm.config.model import ModelConfig
from eellm.config.optim import OptimConfig
from eellm.errors import ConfigError
from eellm.model.decoder import Decoder
from eellm.model.init import DTYPES, torch_device, torch_dtype
from eellm.parallel.gradients import scale_gradients, square_sum
from eellm.parallel.mesh import World
from eellm.plan.cost import layer_flops
from eellm.plan.hardware import Dtype, Hardware, Link, PeakFlops
from eellm.plan.times import OPTIMIZER_TRAFFIC
from eellm.train.link import measure_link
from eellm.train.memory import peak_memory_mb
from eellm.train.optim import make_optimizer
from eellm.train.timing import Clock, Timer

NUM_LAYERS = 2
"""Timed together."""
ETHERNET = Link(bytes_per_s=1.25e9, latency_s=100e-6)
"""10 Gbit/s, between machines."""
HEADER = "# Measured, except network_link, which no machine can measure by itself: put in what connects yours.\n"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is computed and moved: enough that starting it takes no part of the time that counts."""

    matrix: int
    """Rows and columns of a product's factors."""
    model: ModelConfig
    """Whose layers are timed. Narrow ones reach less of the peak, so a recipe's own model tells most about it."""
    num_rows: int
    """Sequences that go through the layers at a time."""
    seq_len: int
    """Tokens in each."""
    copied_bytes: int
    """More than fits into a cache."""
    optimizer_parameters: int
    message_bytes: int


def sizes_for(device: str) -> Sizes:
    """Sizes that take a CPU's thread or a GPU some seconds in all."""
    if device == "cuda":
        return Sizes(
            matrix=8192,
            model=_model(4096, 11008, num_heads=32),
            num_rows=2,
            seq_len=2048,
            copied_bytes=2**30,
            optimizer_parameters=2**28,
            message_bytes=2**28,
        )
    return Sizes(
        matrix=768,
        model=_model(512, 1536, num_heads=8),
        num_rows=2,
        seq_len=256,
        copied_bytes=2**28,
        optimizer_parameters=2**24,
        message_bytes=2**24,
    )


def _model(hidden_size: int, intermediate_size: int, *, num_heads: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=1,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=NUM_LAYERS,
        num_heads=num_heads,
    )


def calibrate(
    *,
    name: str,
    device: Literal["cpu", "cuda"] = "cpu",
    dtype: Dtype = "float32",
    sizes: Sizes | None = None,
    link: Link | None = None,
    clock: Clock = time.perf_counter,
) -> Hardware:
    """Measures this machine. Takes well under a minute on an idle one.

    name: of the profile. device: cpu or cuda. dtype: in which a layer's share of the peak and its backward are
    measured. sizes: unset, `sizes_for(device)`. link: between two devices of this machine, where it is known; unset,
    it is measured by two new processes. clock: seconds, of this process alone.
    Raises ConfigError for a device that isn't there, or has no products in `dtype`.
    """
    check_choice("device", device, ("cpu", "cuda"))
    check_choice("dtype", dtype, DTYPES)
    timer, sizes = Timer(torch_device(device), clock), sizes or sizes_for(device)
    reserved_bytes = _reserved_bytes(timer.device)  # first of all: before there are tensors
    peaks = {each: _products_per_s(sizes.matrix, torch_dtype(each), timer) for each in DTYPES}
    products_per_s = peaks[dtype]
    if products_per_s is None:
        known = ", ".join(each for each, peak in peaks.items() if peak)
        raise ConfigError(f"dtype = {dtype!r}: {device} has no matrix products of it here; use one of {known}")
    layers_per_s, backward_ratio = _layers(sizes, torch_dtype(dtype), timer)
    peaks[dtype] = peak = max(products_per_s, layers_per_s)
    copied_per_s = _copied_per_s(sizes.copied_bytes, timer)
    num_devices = _num_devices(device)
    if link is None and device == "cuda" and num_devices == 1:
        link = Link(bytes_per_s=copied_per_s / 2, latency_s=0.0)
    link = link or measure_link(device, message_bytes=sizes.message_bytes)
    return Hardware(
        name=name,
        device=device,
        peak_flops=PeakFlops(**peaks),
        efficiency=layers_per_s / peak,
        backward_ratio=backward_ratio,
        memory_bytes=_memory_bytes(timer.device) // (num_devices if device == "cpu" else 1),
        reserved_bytes=reserved_bytes,
        memory_bytes_per_s=copied_per_s,
        optimizer_bytes_per_s=_optimizer_per_s(sizes.optimizer_parameters, timer),
        devices_per_node=num_devices,
        node_link=link,
        network_link=min(link, ETHERNET, key=lambda each: each.bytes_per_s),
    )


def write_hardware(hardware: Hardware, path: Path) -> None:
    """As a file that `find_hardware` reads, whole or not at all. Raises ConfigError for another suffix than .toml."""
    if path.suffix != ".toml":
        raise ConfigError(f"{path}: a hardware profile is a .toml file; name it {path.with_suffix('.toml').name}")
    text = HEADER + _toml(to_dict(hardware))
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _toml(data: dict[str, Any]) -> str:
    """Numbers, strings and tables of them."""
    tables = {key: value for key, value in data.items() if isinstance(value, dict)}
    lines = [f"{key} = {_toml_value(value)}" for key, value in data.items() if key not in tables]
    for key, table in tables.items():
        lines += ["", f"[{key}]", *(f"{name} = {_toml_value(value)}" for name, value in table.items())]
    return "\n".join(lines) + "\n"


def _toml_value(value: str | float) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _products_per_s(size: int, dtype: torch.dtype, timer: Timer) -> float | None:
    """FLOP/s of square matrices; None where torch has no products of them on the device."""
    try:
        a, b = (torch.randn(size, size, device=timer.device).to(dtype) for _ in range(2))
        return 2 * size**3 / timer.seconds(lambda: a @ b)
    except RuntimeError:
        return None


def _layers(sizes: Sizes, dtype: torch.dtype, timer: Timer) -> tuple[float, float]:
    """FLOP/s of our layers' forward, and how many times as long their backward takes, as in a pipeline's stage without
    data parallelism: 16 bits are autocast, gradients are added to those before."""
    model = replace(sizes.model, num_layers=NUM_LAYERS, vocab_size=1, exits=())
    decoder = Decoder(model).to(device=timer.device, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    positions_BT = torch.arange(sizes.seq_len, device=timer.device).expand(sizes.num_rows, -1)
    h_BTD = torch.randn(*positions_BT.shape, model.hidden_size, device=timer.device, dtype=decoder.embed.weight.dtype)
    h_BTD.requires_grad_()
    rows, gradient_BTD = decoder.packed_rows(positions_BT, None), torch.randn_like(h_BTD)

    def forward_backward() -> tuple[float, float]:
        start = timer.now()
        with torch.autocast(timer.device.type, dtype=dtype, enabled=dtype.itemsize == 2):
            y_BTD = decoder.run(h_BTD, 1, NUM_LAYERS, rows)
        middle = timer.now()
        y_BTD.backward(gradient_BTD)
        return middle - start, timer.now() - middle

    forward_s, backward_s = timer.medians(forward_backward)
    per_token = sum(layer_flops(model, sizes.seq_len, model.window(n)) for n in range(1, NUM_LAYERS + 1))
    return per_token * positions_BT.numel() / forward_s, backward_s / forward_s


def _copied_per_s(num_bytes: int, timer: Timer) -> float:
    """Bytes read and written."""
    source, target = (torch.ones(num_bytes, dtype=torch.uint8, device=timer.device) for _ in range(2))
    return 2 * num_bytes / timer.seconds(lambda: target.copy_(source))


def _optimizer_per_s(num_parameters: int, timer: Timer) -> float:
    """Bytes that go through memory while gradients are measured and clipped and the optimizer steps, as the planner
    counts them."""
    parameter = nn.Parameter(torch.zeros(1, num_parameters, device=timer.device))
    parameter.grad = torch.zeros_like(parameter)
    optimizer, world = make_optimizer([parameter], OptimConfig()), World(device=timer.device)

    def update() -> None:
        square_sum([parameter], world).item()
        scale_gradients([parameter], 0.5)
        optimizer.step()

    return OPTIMIZER_TRAFFIC * parameter.nbytes / timer.seconds(update)


def _num_devices(device: str) -> int:
    """GPUs of this machine, or processes that its cores have threads for."""
    if device == "cuda":
        return torch.cuda.device_count()
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(num_cores // torch.get_num_threads(), 1)


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _reserved_bytes(device: torch.device) -> int:
    """Of a GPU, what isn't free and isn't torch's; of a CPU, this process."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free - torch.cuda.memory_reserved(device)
    return int(peak_memory_mb(World())[0] * 2**20)
