"""The model as decoding runs it: N rows of any sequences at once, through any range of layers.

What every network has in common. `PackedNetwork` computes with torch, on any device and in any dtype;
`NativeNetwork` in float32 on the CPU, with kernels of its own. `eellm.infer.prepare` chooses. A network's values are
those of `EarlyExitLM`, whose memory and names it leaves alone: it is made of copies.
Shapes: N rows, D hidden, V vocabulary.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eellm.errors import ConfigError
from eellm.exits.heads import MLPBlock
from eellm.exits.lm import EarlyExitLM
from eellm.infer.attention import PassRows, Span
from eellm.infer.costs import StepCosts
from eellm.infer.memory import Memory
from eellm.model.layers import Layer

BODIES = (MLPBlock, Layer)
"""Of exits, those that every network computes."""
Answer = tuple[int, float, list[float]]
"""The token with the largest logit, its log-probability, and the scores of the policies asked about, in their order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Leg:
    """Part of a sequence's way through the layers, and what is asked behind it."""

    last: int
    """Its last layer, and that of the head that is asked."""
    start: int
    """The first of the rows that take part; those before it join further in."""
    num_asked: int
    """Newest rows that the head is asked about; 0: it isn't."""
    threshold: float
    """The score of the newest row at which the way ends here."""
    likely: float = 1.0
    """How likely that is, as far as is known."""


@dataclass(frozen=True, slots=True)
class Heard:
    """What a head said behind a leg."""

    logits_NV: Tensor
    """Raw, float32, of the rows asked about."""
    answers: list[Answer]


@dataclass(frozen=True, slots=True)
class Gone:
    """A leg that was gone."""

    heard: Heard | None
    """None: the head wasn't asked."""
    layers_s: float
    """What its layers took; on a GPU, what starting them did."""
    head_s: float
    """What asking the head took."""


def check_bodies(model: EarlyExitLM) -> None:
    """Raises ConfigError for an exit whose body no network knows: decoding would leave it out."""
    for layer in model.config.exit_layers:
        body = model.exit(layer).body
        if body is not None and not isinstance(body, BODIES):
            raise ConfigError(
                f"the exit after layer {layer} has a body that decoding doesn't know, {type(body).__name__}: teach it "
                "to eellm.infer (docs/how-to/extend.md lists the files), or decode the model without this exit"
            )


class Network(ABC):
    def __init__(self, model: EarlyExitLM, layers: range | None = None) -> None:
        """layers: unset, all; of some, with their exits, the first comes with the embedding and the last with the final
        exit."""
        check_bodies(model)
        decoder = model.decoder
        self.config = model.config
        self.held = layers or range(1, self.config.num_layers + 1)
        self.embedding_VD = decoder.embed.weight.detach() if 1 in self.held else None
        self.exits = tuple(exit_config for exit_config in self.config.exits if exit_config.layer in self.held)
        self.gates = {e.layer: gate for e in self.exits if (gate := model.exit(e.layer).gate) is not None}
        norm_weight = decoder.layer(self.held[0]).attn_norm.weight
        self.device, self.dtype = norm_weight.device, norm_weight.dtype
        self.num_bytes = 0
        """What reading all matrices takes."""
        self.costs: StepCosts | None = None
        """What its parts take here, once somebody has measured it."""

    @property
    def own_layer(self) -> tuple[int, ...]:
        """Layers of the exits that keep keys and values of their own."""
        return tuple(exit_config.layer for exit_config in self.exits if exit_config.kind == "layer")

    def new_memory(self) -> Memory:
        """For keys and values of the layers that are held."""
        return Memory(self.config, self.own_layer, self.held, dtype=self.dtype, device=self.device)

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """(N, D)."""
        assert self.embedding_VD is not None, "tokens go in where the first layer is"
        if len(tokens) == 1:
            return self.embedding_VD[tokens[0] :][:1]
        return F.embedding(torch.tensor(tokens, device=self.device), self.embedding_VD)

    def walk(
        self, h_ND: Tensor, done: int, legs: Sequence[Leg], span: Span, memory: Memory, policy: str
    ) -> tuple[Tensor, list[Gone]]:
        """Moves one sequence's rows on, leg after leg, until a head is sure of the newest row or the last leg is gone.

        h_ND: all rows that take part in some leg. done: the layer that those of the first leg have passed. policy:
        whose score a head is asked for; not `gate`, nor may an exit that is asked have a layer of its own. Returns the
        rows where they are now, and what became of each leg that was gone.
        """
        gone = list[Gone]()
        for leg in legs:
            start_s = time.perf_counter()
            count = len(h_ND) - leg.start
            rows = self.rows([Span(span.slot, span.end - count, count)])
            moved_ND = self.run(h_ND[leg.start :], done + 1, leg.last, rows, memory)
            h_ND = moved_ND if leg.start == 0 else torch.cat((h_ND[: leg.start], moved_ND))
            done, asked_s = leg.last, time.perf_counter()
            if not leg.num_asked:
                gone.append(Gone(None, asked_s - start_s, 0.0))
                continue
            logits_NV, answers = self.answers(leg.last, h_ND[-leg.num_asked :], [policy])
            gone.append(Gone(Heard(logits_NV, answers), asked_s - start_s, time.perf_counter() - asked_s))
            if answers[-1][2][0] >= leg.threshold:
                break
        return h_ND, gone

    def gate(self, layer: int, z_ND: Tensor) -> Tensor:
        """Normed hidden states → (N,): how likely the exit agrees with the final one."""
        return self.gates[layer](z_ND).float().sigmoid()

    @abstractmethod
    def rows(self, spans: Sequence[Span]) -> PassRows:
        """The rows of one pass, for `run` and `attended`."""

    @abstractmethod
    def run(self, h_ND: Tensor, first: int, last: int, rows: PassRows, memory: Memory) -> Tensor:
        """Moves the rows through layers `first` to `last`, both included; their keys and values are kept."""

    @abstractmethod
    def attended(self, layer: int, h_ND: Tensor, rows: PassRows, memory: Memory) -> Tensor:
        """Hidden states → what the exit's own layer makes of them, for `normed`. All rows that pass the exit must."""

    @abstractmethod
    def normed(self, layer: int, h_ND: Tensor) -> Tensor:
        """What the exit after `layer` makes of hidden states, ready for its output matrix. Of exits with a layer of
        their own, `attended` comes before."""

    @abstractmethod
    def logits(self, layer: int, z_ND: Tensor) -> Tensor:
        """Normed hidden states → raw logits (N, V), float32."""

    @abstractmethod
    def answers(self, layer: int, h_ND: Tensor, policies: Sequence[str]) -> tuple[Tensor, list[Answer]]:
        """What the head after `layer` says of hidden states (not normed): raw logits (N, V), float32, and an answer for
        each row."""
