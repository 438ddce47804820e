"""What the parts of one decoding step take: a layer, a head, a hop between stages, for any number of rows.

    model, hardware, layout, context → `DecodeCosts`

A pass reads a part's weights once whatever its rows, and a sequence's keys and values once for all rows of that
sequence; it computes every row. The slower of the two counts (the roofline model). What nothing hides comes on top:
launches, tensor parallelism's messages, the host's look at an exit's answer. At few rows reading is the slower one by
far, so that rows which are taken along cost next to nothing.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eellm.config.check import check_at_least, check_choice, check_fraction
from eellm.config.model import ExitConfig, ModelConfig
from eellm.errors import ConfigError
from eellm.plan.cost import attention_flops, head_flops, layer_flops, mlp_flops
from eellm.plan.hardware import Dtype, Hardware
from eellm.schedule.partition import Stage, partition

_BYTES: dict[Dtype, int] = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class PartCost:
    """Seconds of one pass through a part of the model, on each device of its tensor-parallel group."""

    read_s: float = 0.0
    """Reading its weights."""
    cache_s: float = 0.0
    """Reading one sequence's keys and values."""
    row_s: float = 0.0
    """Computing a row."""
    message_s: float = 0.0
    """A row's bytes in messages."""
    overhead_s: float = 0.0
    """Launches, and messages' latencies."""

    def seconds(self, rows: np.ndarray, sequences: np.ndarray) -> np.ndarray:
        """Of a pass with so many rows, which belong to so many sequences."""
        work = np.maximum(self.read_s + self.cache_s * sequences, self.row_s * rows)
        return work + self.message_s * rows + self.overhead_s


@dataclass(frozen=True, kw_only=True)
class DecodeOverheads:
    """What a decoding loop loses. The defaults are a CUDA graph per segment; plain launches cost several times that."""

    read_efficiency: float = 0.8
    """Share of the memory's bandwidth that products with few rows reach."""
    layer_s: float = 20e-6
    """A layer's launches."""
    head_s: float = 10e-6
    """A head's launches."""
    check_s: float = 15e-6
    """Until the host knows whether an early exit answered."""
    step_s: float = 50e-6
    """Once a step: embedding, drawing the tokens, the host's work."""

    def __post_init__(self) -> None:
        check_fraction(self, "read_efficiency")
        check_at_least(self, 0, "layer_s", "head_s", "check_s", "step_s")
        if self.read_efficiency == 0:
            raise ConfigError("read_efficiency = 0: must be above 0")


@dataclass(frozen=True, kw_only=True)
class DecodeCosts:
    """A model laid out over stages, with what each part takes."""

    stages: tuple[Stage, ...]
    """In order; each on a device, or a tensor-parallel group, of its own."""
    layers: tuple[PartCost, ...]
    """Layer 1 first."""
    final_head: PartCost
    exits: dict[int, PartCost]
    """By layer; each exit is tested where its layer is. A `layer` exit's keys and values of rows that it isn't tested
    on are left out."""
    hop: PartCost
    """A hidden state from stage to stage. Tokens go back to the first stage with its latency alone."""
    step_s: float
    """Once a step, under every method."""

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def head(self, layer: int) -> PartCost:
        """Of the exit at `layer`, be it early or the final one."""
        return self.final_head if layer == self.num_layers else self.exits[layer]

    def kinds(self, first: int, last: int) -> Counter[PartCost]:
        """Layers `first` to `last`, counting those that cost the same."""
        return Counter(self.layers[first - 1 : last])

    def stage_of(self, layer: int) -> Stage:
        return next(stage for stage in self.stages if stage.first <= layer <= stage.last)


def decode_costs(
    model: ModelConfig,
    hardware: Hardware,
    *,
    num_stages: int = 1,
    tp: int = 1,
    context: int = 1024,
    dtype: Dtype = "bfloat16",
    layers_per_stage: Sequence[int] | None = None,
    overheads: DecodeOverheads = DecodeOverheads(),
) -> DecodeCosts:
    """Parts of `model` on num_stages · tp devices.

    context: tokens that a new one attends to, on average. layers_per_stage: even, where not given. Raises ConfigError
    for layouts that cannot be, and for dtypes that the hardware has no products of.
    """
    _check_layout(model, tp, context)
    check_choice("dtype", dtype, _BYTES)
    stages = partition(model.num_layers, num_stages, model.exit_layers, layers_per_stage=layers_per_stage)
    parts = _Parts(model, hardware, tp, context, dtype, overheads)
    link = hardware.link(num_stages * tp)
    return DecodeCosts(
        stages=stages,
        layers=tuple(parts.layer(model.window(layer)) for layer in range(1, model.num_layers + 1)),
        final_head=parts.head(),
        exits={exit.layer: parts.exit(exit) for exit in model.exits},
        hop=PartCost(message_s=model.hidden_size * _BYTES[dtype] / link.bytes_per_s, overhead_s=link.latency_s),
        step_s=overheads.step_s + parts.all_reduce_s,  # the embedding is cut by vocabulary
    )


@dataclass(frozen=True)
class _Parts:
    model: ModelConfig
    hardware: Hardware
    tp: int
    context: int
    dtype: Dtype
    overheads: DecodeOverheads

    @property
    def all_reduce_s(self) -> float:
        """Of an empty message: a reduce-scatter and an all-gather. None on one device."""
        return 0.0 if self.tp == 1 else 2 * self.hardware.link(self.tp).latency_s

    def layer(self, window: int | None) -> PartCost:
        model, attended = self.model, min(window or self.context, self.context)
        attention = attention_flops(model, 1, None)  # of one attended token
        products = layer_flops(model, 1, None) - attention
        cache = 2 * model.kv_heads * model.head_size * attended
        return self._part(products, attention * attended, cache, all_reduces=2, launch_s=self.overheads.layer_s)

    def head(self) -> PartCost:
        """Its vocabulary is cut under tensor parallelism; the devices agree on the largest logit, a few numbers."""
        part = self._part(head_flops(self.model), launch_s=self.overheads.head_s)
        return _sum(part, PartCost(overhead_s=self.all_reduce_s))

    def exit(self, exit: ExitConfig) -> PartCost:
        body = PartCost()
        if exit.kind == "mlp":
            body = self._part(mlp_flops(self.model), all_reduces=1, launch_s=self.overheads.layer_s / 2)
        elif exit.kind == "layer":
            body = self.layer(self.model.window(self.model.num_layers))
        return _sum(body, self.head(), PartCost(overhead_s=self.overheads.check_s))

    def _part(
        self, products: float, attention: float = 0.0, cache: float = 0.0, *, all_reduces: int = 0, launch_s: float
    ) -> PartCost:
        """products, attention: FLOPs of a row; a weight makes two. cache: numbers read for a sequence."""
        size, link = _BYTES[self.dtype], self.hardware.link(self.tp)
        read_per_s = self.hardware.memory_bytes_per_s * self.overheads.read_efficiency * self.tp
        sent = 2 * (self.tp - 1) / self.tp * self.model.hidden_size * size  # of a row, by each device of a ring
        return PartCost(
            read_s=products / 2 * size / read_per_s,
            cache_s=cache * size / read_per_s,
            row_s=(products + attention) / (self.hardware.flops_per_s(self.dtype) * self.tp),
            message_s=all_reduces * sent / link.bytes_per_s,
            overhead_s=launch_s + all_reduces * self.all_reduce_s,
        )


def _sum(*parts: PartCost) -> PartCost:
    """Parts in one pass."""
    return PartCost(
        read_s=sum(part.read_s for part in parts),
        cache_s=sum(part.cache_s for part in parts),
        row_s=sum(part.row_s for part in parts),
        message_s=sum(part.message_s for part in parts),
        overhead_s=sum(part.overhead_s for part in parts),
    )


def _check_layout(model: ModelConfig, tp: int, context: int) -> None:
    for name, value in (("tp", tp), ("context", context)):
        if value < 1:
            raise ConfigError(f"{name} = {value}: must be at least 1")
    fits = [n for n in range(1, model.kv_heads + 1) if model.kv_heads % n == model.vocab_size % n == 0]
    if tp not in fits:
        near = min(fits, key=lambda n: abs(n - tp))
        raise ConfigError(
            f"tp = {tp}: {model.kv_heads} key/value heads and a vocabulary of {model.vocab_size} can't be shared by so "
            f"many; the nearest that works is {near}"
        )
