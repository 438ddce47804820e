"""A network whose passes have few fixed shapes, so that a GPU can play them as graphs.

    spans → FixedRows (`eellm.infer.cells`) → rows into static cells → layers, as a graph → rows out of them

It computes what `PackedNetwork` does, of which it is one: passes that fit no grid go that network's way, and so do
gates, and a head's norm apart from its matrix. In a walk past several exits the host waits for heads alone, and not
always before the next leg has started: see `walk`. Graphs never ran on a GPU; on a CPU the same work is done at once.
Shapes: N rows, D hidden, V vocabulary, C cells.
"""

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from eellm.exits.lm import EarlyExitLM
from eellm.infer.attention import PassRows, Span
from eellm.infer.cells import FixedRows, GridRows, Placed
from eellm.infer.graphs import CUDARecorder, Graphs
from eellm.infer.grid import MOST_CELLS, bucket
from eellm.infer.memory import Memory
from eellm.infer.network import Answer, Gone, Heard, Leg
from eellm.infer.packed import PackedLayer, PackedNetwork, answer_table, answers_from
from eellm.infer.packing import Packed
from eellm.infer.quantize import Quantize

LOOK_S = 15e-6
"""From a head's answer on the GPU to the next leg's start, where the host waits to hear it (`DecodeOverheads.check_s`):
assumed, never measured."""


class FixedNetwork(PackedNetwork):
    def __init__(
        self,
        model: EarlyExitLM,
        quantize: Quantize | None = None,
        layers: range | None = None,
        cache_dir: Path | None = None,
        packed: Packed | None = None,
        look_s: float = LOOK_S,
    ) -> None:
        """look_s: what waiting for a head's answer in a walk costs. Others as of `PackedNetwork`."""
        super().__init__(model, quantize, layers, cache_dir, packed)
        self.look_s = look_s
        self.graphs = Graphs(CUDARecorder(self.device) if self.device.type == "cuda" else None)
        self._lock = threading.Lock()
        """Engines in several threads may share the network, and its static tensors are filled, used and emptied by one
        pass at a time."""
        size, like = self.config.hidden_size, {"dtype": self.dtype, "device": self.device}
        with torch.inference_mode(False):  # NOTE what is made in that mode can't be written outside of it
            self._rows_CD, self._moved_CD, self._asked_CD = torch.zeros(3, MOST_CELLS, size, **like)
            self._positions_C = torch.zeros(MOST_CELLS, dtype=torch.int64, device=self.device)
            self._logits_CV = torch.zeros(MOST_CELLS, self.config.vocab_size, dtype=torch.float32, device=self.device)
            self._table_C = torch.zeros(MOST_CELLS, 8, dtype=torch.float64, device=self.device)

    def new_memory(self) -> Memory:
        return Memory(self.config, self.own_layer, self.held, dtype=self.dtype, device=self.device, num_spare=1)

    def rows(self, spans: Sequence[Span]) -> FixedRows:
        return FixedRows(spans, self.angles, self.config.kv_heads)

    def run(self, h_ND: Tensor, first: int, last: int, rows: PassRows, memory: Memory) -> Tensor:
        assert isinstance(rows, FixedRows), "rows are those of this network"
        placed = rows.placed(memory)
        if placed is None:
            return super().run(h_ND, first, last, rows.packed, memory)

        def through(x_CD: Tensor, rows: GridRows) -> Tensor:
            for n in range(first, last + 1):
                x_CD = self.layers[n](x_CD, rows, memory.layers[n])
            return x_CD

        return self._pass((first, last), through, h_ND, placed, memory) if last >= first else h_ND

    def attended(self, layer: int, h_ND: Tensor, rows: PassRows, memory: Memory) -> Tensor:
        assert isinstance(rows, FixedRows), "rows are those of this network"
        placed, body = rows.placed(memory), self.heads[layer].body
        if not isinstance(body, PackedLayer):
            return h_ND
        if placed is None:
            return super().attended(layer, h_ND, rows.packed, memory)
        return self._pass((layer,), lambda x_CD, rows: body(x_CD, rows, memory.exits[layer]), h_ND, placed, memory)

    def _pass(
        self,
        part: Hashable,
        through: Callable[[Tensor, GridRows], Tensor],
        h_ND: Tensor,
        placed: Placed,
        memory: Memory,
    ) -> Tensor:
        """part: which layers. through: them."""
        grid, num_cells = placed.grid, placed.grid.num_cells
        cos_PHE, sin_PHE = self.angles.tables

        def work() -> None:
            rows = GridRows(grid, self._positions_C[:num_cells], memory.capacity, cos_PHE, sin_PHE)
            self._moved_CD[:num_cells] = through(self._rows_CD[:num_cells], rows)

        with self._lock:
            self._positions_C[:num_cells] = placed.positions_C
            self._rows_CD.index_copy_(0, placed.cells_N, h_ND)
            self.graphs.run((part, grid, memory.generation, len(cos_PHE)), work)
            return self._moved_CD.index_select(0, placed.cells_N)

    def answers(self, layer: int, h_ND: Tensor, policies: Sequence[str]) -> tuple[Tensor, list[Answer]]:
        asked = self.ask(layer, h_ND, policies)
        return asked.logits_NV, asked.answers()

    def ask(self, layer: int, h_ND: Tensor, policies: Sequence[str]) -> "Asked":
        """As `answers`, without waiting for them."""
        num_rows, num_columns = len(h_ND), 2 + len(policies)
        num_cells = bucket(num_rows)
        if num_cells > MOST_CELLS:
            logits_NV = self.logits(layer, self.normed(layer, h_ND))
            return Asked(logits_NV, *_on_its_way(answer_table(logits_NV, policies)))

        def work() -> None:
            logits_CV = self._logits_CV[:num_cells]
            logits_CV.copy_(self.logits(layer, self.normed(layer, self._asked_CD[:num_cells])))
            self._table_C[:num_cells, :num_columns] = answer_table(logits_CV, policies)

        with self._lock:
            self._asked_CD[:num_rows] = h_ND
            self.graphs.run(("head", layer, tuple(policies), num_cells), work)
            table = self._table_C[:num_rows, :num_columns].clone()
            return Asked(self._logits_CV[:num_rows].clone(), *_on_its_way(table))

    def walk(
        self, h_ND: Tensor, done: int, legs: Sequence[Leg], span: Span, memory: Memory, policy: str
    ) -> tuple[Tensor, list[Gone]]:
        """The host waits for no leg without a head. Where an exit is hardly ever sure, the next leg starts before its
        answer is heard.

        A leg that was started in vain does no harm. It has written keys and values of rows that have not passed its
        layers yet, from their true hidden states; they wait, a later pass takes them through these layers, and writes
        the same again before any row attends to them there, for a row's pass takes all waiting rows before it along
        (`eellm.infer.rows`). In between nobody reads them: what is shared with other requests are rows that have passed
        every layer, and all passes follow each other in one stream.
        """
        gone = list[Gone]()
        ahead: _Started | None = None
        for leg, following in zip(legs, (*legs[1:], None), strict=True):
            started = ahead or self._start(h_ND, done, leg, span, memory, policy)
            h_ND, done, ahead = started.h_ND, leg.last, None
            if started.asked is None:
                gone.append(Gone(None, started.layers_s, 0.0))
                continue
            if following is not None and self._pays_ahead(leg, following, len(h_ND)):
                ahead = self._start(h_ND, done, following, span, memory, policy)
            looked_s = time.perf_counter()
            answers = started.asked.answers()
            head_s = started.head_s + time.perf_counter() - looked_s
            gone.append(Gone(Heard(started.asked.logits_NV, answers), started.layers_s, head_s))
            if answers[-1][2][0] >= leg.threshold:
                break
        return h_ND, gone

    def _start(self, h_ND: Tensor, done: int, leg: Leg, span: Span, memory: Memory, policy: str) -> "_Started":
        start_s, count = time.perf_counter(), len(h_ND) - leg.start
        rows = self.rows([Span(span.slot, span.end - count, count)])
        moved_ND = self.run(h_ND[leg.start :], done + 1, leg.last, rows, memory)
        h_ND = moved_ND if leg.start == 0 else torch.cat((h_ND[: leg.start], moved_ND))
        moved_s = time.perf_counter()
        asked = self.ask(leg.last, h_ND[-leg.num_asked :], [policy]) if leg.num_asked else None
        return _Started(h_ND, asked, moved_s - start_s, time.perf_counter() - moved_s)

    def _pays_ahead(self, leg: Leg, following: Leg, num_rows: int) -> bool:
        """Whether what the next leg takes in vain now and then is less than the waits that it saves otherwise."""
        if self.costs is None:
            return False
        in_vain_s = self.costs.pass_s(leg.last, following.last, num_rows - following.start)
        return leg.likely * in_vain_s < (1 - leg.likely) * self.look_s


@dataclass(frozen=True, slots=True)
class Asked:
    """What a head was asked, and says."""

    logits_NV: Tensor
    """Raw, float32."""
    table: Tensor
    """As `answer_table` makes it, on the host once the event has come."""
    event: torch.cuda.Event | None

    def answers(self) -> list[Answer]:
        """Waits for them; nothing else of a walk does."""
        if self.event is not None:
            self.event.synchronize()
        return answers_from(self.table)


def _on_its_way(table: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy on the host, and when it is there; None: it is."""
    if table.device.type != "cuda":
        return table, None
    host = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
    host.copy_(table, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(table.device))
    return host, event


@dataclass(frozen=True, slots=True)
class _Started:
    """A leg that was started."""

    h_ND: Tensor
    asked: Asked | None
    layers_s: float
    head_s: float
    """What starting them took; on a CPU, what they did."""
