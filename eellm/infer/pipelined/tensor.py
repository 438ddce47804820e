"""Tensor parallelism inside a stage: a network of which every process of the stage has a part.

A layer's attention and MLP compute with a part of the heads and of the width on each process, and the parts are summed
after `out` and `down`; keys and values stay with their heads. Output matrices are cut by vocabulary, and the first
process gathers the logits. Norms and gates are on all, the embedding is the first's alone. Every product is the one of
`PackedNetwork`, which has a smaller model here. Only the first process is known to whoever has the network: it hands
the calls to the others, which serve them.
Source: Megatron-LM (arXiv 1909.08053). Shapes: N rows, D hidden, V vocabulary.
"""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from eellm.config.model import ModelConfig
from eellm.errors import ConfigError
from eellm.exits.lm import EarlyExitLM
from eellm.infer.attention import PassRows, Span
from eellm.infer.memory import Memory
from eellm.infer.network import Answer, Network
from eellm.infer.packed import PackedLayer, PackedMLP, PackedNetwork, answers_of
from eellm.infer.pipelined import team as t
from eellm.infer.pipelined.team import Lead, StageTeam
from eellm.infer.pipelined.wire import Inbox, Message
from eellm.infer.quantize import Quantize

CUT_OUTPUTS = ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up", "output")
CUT_INPUTS = ("attn.out", "mlp.down")
"""Modules, by the ends of their names. All others are whole on every process."""

# kinds of calls
RESERVE = t.FORGET + 1
COPY = RESERVE + 1
WIPE = COPY + 1
RUN = WIPE + 1
ATTEND = RUN + 1
NORM = ATTEND + 1
READ = NORM + 1


def check_parts(config: ModelConfig, tp: int) -> None:
    """Raises ConfigError, with the numbers that work, for sizes that `tp` processes can't share."""
    sizes = {
        "num_kv_heads": config.kv_heads,
        "num_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
    }
    for name, size in sizes.items():
        if size % tp:
            fits = [n for n in range(1, config.kv_heads + 1) if all(s % n == 0 for s in sizes.values())]
            raise ConfigError(f"tp = {tp}: {name} = {size} is not a multiple of it; this model takes tp in {fits}")


def part_config(config: ModelConfig, tp: int) -> ModelConfig:
    """Of the model that one of `tp` processes has; of the very model where `tp` is 1."""
    return replace(
        config,
        num_heads=config.num_heads // tp,
        num_kv_heads=config.kv_heads // tp,
        head_dim=config.head_size,
        intermediate_size=config.intermediate_size // tp,
        vocab_size=config.vocab_size // tp,
    )


def part_weights(weights: Mapping[str, Tensor], place: int, tp: int) -> dict[str, Tensor]:
    """Of one of `tp` processes."""
    return {name: _part(name, tensor.detach(), place, tp) for name, tensor in weights.items()}


def _part(name: str, tensor: Tensor, place: int, tp: int) -> Tensor:
    module, _, kind = name.rpartition(".")
    if module.endswith(CUT_OUTPUTS):
        return tensor.chunk(tp)[place]
    if not module.endswith(CUT_INPUTS):
        return tensor
    if kind == "bias":  # NOTE what is summed has it once
        return tensor if place == 0 else torch.zeros_like(tensor)
    return tensor.chunk(tp, dim=1)[place].contiguous()


class TensorParallelNetwork(Network):
    """The first process's."""

    def __init__(
        self,
        model: EarlyExitLM,
        layers: range,
        config: ModelConfig,
        lead: Lead,
        *,
        embedding_VD: Tensor | None = None,
        quantize: Quantize | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        """model: this process's part, of `part_config`. config: the whole model's. embedding_VD: on the first stage."""
        super().__init__(model, layers)
        self.part = PackedNetwork(model, quantize, layers, cache_dir, team=lead.team)
        self.config, self.embedding_VD, self.lead = config, embedding_VD, lead
        self.num_bytes = self.part.num_bytes

    def new_memory(self) -> "PartMemory":
        return PartMemory(self.part, self.lead)

    def rows(self, spans: Sequence[Span]) -> PassRows:
        return self.part.rows(spans)

    def run(self, h_ND: Tensor, first: int, last: int, rows: PassRows, memory: Memory) -> Tensor:
        if first > last:
            return h_ND
        with self.lead.call(RUN, (_number(memory), first, last, *_flat(rows)), h_ND):
            return self.part.run(h_ND, first, last, rows, memory)

    def attended(self, layer: int, h_ND: Tensor, rows: PassRows, memory: Memory) -> Tensor:
        if not isinstance(self.part.heads[layer].body, PackedLayer):
            return h_ND
        with self.lead.call(ATTEND, (_number(memory), layer, *_flat(rows)), h_ND):
            return self.part.attended(layer, h_ND, rows, memory)

    def normed(self, layer: int, h_ND: Tensor) -> Tensor:
        if not isinstance(self.part.heads[layer].body, PackedMLP):
            return self.part.normed(layer, h_ND)
        with self.lead.call(NORM, (layer,), h_ND):
            return self.part.normed(layer, h_ND)

    def logits(self, layer: int, z_ND: Tensor) -> Tensor:
        with self.lead.call(READ, (layer,), z_ND):
            return self.part.logits(layer, z_ND)

    def answers(self, layer: int, h_ND: Tensor, policies: Sequence[str]) -> tuple[Tensor, list[Answer]]:
        logits_NV = self.logits(layer, self.normed(layer, h_ND))
        return logits_NV, answers_of(logits_NV, policies)


class PartMemory(Memory):
    """Keys and values of the first process's heads; the others do with theirs what is done with it."""

    def __init__(self, part: PackedNetwork, lead: Lead) -> None:
        super().__init__(part.config, part.own_layer, part.held, dtype=part.dtype, device=part.device)
        self.lead = lead
        self.number = lead.num_memories
        lead.num_memories += 1
        weakref.finalize(self, lead.dropped.append, self.number)

    @property
    def num_bytes(self) -> int:
        """Of all processes of the stage."""
        return super().num_bytes * self.lead.team.size

    def reserve(self, num_slots: int, capacity: int) -> None:
        if num_slots > self.num_slots or capacity > self.capacity:
            with self.lead.call(RESERVE, (self.number, num_slots, capacity)):
                super().reserve(num_slots, capacity)

    def copy(self, source: int, target: int, num_rows: int) -> None:
        with self.lead.call(COPY, (self.number, source, target, num_rows)):
            super().copy(source, target, num_rows)

    def wipe(self, slot: int) -> None:
        with self.lead.call(WIPE, (self.number, slot)):
            super().wipe(slot)


def _number(memory: Memory) -> int:
    assert isinstance(memory, PartMemory), "a network's memory is made by it"
    return memory.number


def _flat(rows: PassRows) -> list[int]:
    return [value for span in rows.spans for value in span]


class Follower:
    """Any other process: serves the first one's calls."""

    def __init__(self, part: PackedNetwork, team: StageTeam) -> None:
        self.part, self.team = part, team
        self.inbox = Inbox(team.group, team.first)
        self.memories: dict[int, Memory] = {}

    @torch.inference_mode()
    def run(self) -> None:
        """Until it is told to stop. Raises PeerLostError."""
        while True:
            self.team.is_waiting = True
            message = self.inbox.take()
            self.team.is_waiting = False
            if message.kind == t.STOP:
                return
            self._serve(message, [int(value) for value in message.values])

    def _serve(self, message: Message, values: list[int]) -> None:
        part, kind = self.part, message.kind
        if kind == t.FORGET:
            self.memories.pop(values[0], None)
        elif kind == RESERVE:
            self.memories.setdefault(values[0], part.new_memory()).reserve(*values[1:])
        elif kind == COPY:
            self.memories[values[0]].copy(*values[1:])
        elif kind == WIPE:
            self.memories[values[0]].wipe(*values[1:])
        else:
            h_ND = message.tensor(part.dtype, part.config.hidden_size).to(part.device)
            if kind == RUN:
                memory, first, last, *spans = values
                part.run(h_ND, first, last, self._rows(spans), self.memories[memory])
            elif kind == ATTEND:
                memory, layer, *spans = values
                part.attended(layer, h_ND, self._rows(spans), self.memories[memory])
            elif kind == NORM:
                part.normed(values[0], h_ND)
            else:
                assert kind == READ, f"kind {kind} is no call"
                part.logits(values[0], h_ND)

    def _rows(self, values: Sequence[int]) -> PassRows:
        return self.part.rows([Span(*values[i : i + 3]) for i in range(0, len(values), 3)])
