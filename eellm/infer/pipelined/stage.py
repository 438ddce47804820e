"""A worker's part of the model: some layers, their exits, their keys and values, and the rows that pass through.

Shapes: N rows of the pass, D hidden.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from eellm.infer.asking import ask, rows_of, through_own_layer
from eellm.infer.attention import PassRows, Span
from eellm.infer.memory import Memory
from eellm.infer.network import Network
from eellm.infer.pipelined.entry import Entry
from eellm.infer.readout import Reading, read

Heard = Callable[[list[tuple[Entry, Reading]]], None]


class StagePass:
    """Entries in the order of their rows; a sequence's side by side."""

    def __init__(self, entries: Sequence[Entry], h_ND: Tensor) -> None:
        self.entries = entries
        self.h_ND = h_ND
        self.ends: list[int] = []
        """One past each entry's last row."""
        end = 0
        for entry in entries:
            end += entry.count
            self.ends.append(end)
        assert end == len(h_ND), f"{end} rows were announced and {len(h_ND)} came"

    def spans(self, used: Sequence[bool] | None = None) -> list[Span]:
        """One for each sequence; of those entries only that are used."""
        spans: list[Span] = []
        for index, entry in enumerate(self.entries):
            if used is not None and not used[index]:
                continue
            if spans and spans[-1].slot == entry.slot and spans[-1].end == entry.before:
                spans[-1] = spans[-1]._replace(count=spans[-1].count + entry.count)
            else:
                spans.append(Span(entry.slot, entry.before, entry.count))
        return spans


def merged(passes: Sequence[StagePass]) -> StagePass:
    """Several passes as one: layers' weights are then read once for all."""
    if len(passes) == 1:
        return passes[0]
    parts = [
        (entry, one.h_ND[end - entry.count : end])
        for one in passes
        for entry, end in zip(one.entries, one.ends, strict=True)
    ]
    parts.sort(key=lambda part: part[0].slot)  # stable: a sequence's rows stay in order
    return StagePass([entry for entry, _ in parts], torch.cat([h_TD for _, h_TD in parts]))


class Stage:
    def __init__(self, network: Network, memory: Memory) -> None:
        self.network = network
        self.memory = memory
        self.first, self.last = network.held[0], network.held[-1]
        config = network.config
        self.is_last = self.last == config.num_layers
        self.exits = tuple(layer for layer in config.exit_layers if self.first <= layer <= self.last)
        self.own_layer = frozenset(network.own_layer)

    @torch.inference_mode()
    def run(self, rows: StagePass, answered: Heard) -> Tensor:
        """Takes the rows through the stage. Whenever an exit is sure of some, `answered` hears it at once."""
        h_ND = rows.h_ND.to(self.network.device)
        together = self.network.rows(rows.spans())
        done = self.first - 1
        for layer in self.exits:
            if any(entry.is_tested(layer) or self._keeps(layer, entry) for entry in rows.entries):
                h_ND = self.network.run(h_ND, done + 1, layer, together, self.memory)
                done = layer
                sure = self._ask(layer, self._through_own(layer, h_ND, rows, together), rows)
                if sure:
                    answered(sure)
        return self.network.run(h_ND, done + 1, self.last, together, self.memory)

    @torch.inference_mode()
    def final(self, h_ND: Tensor, rows: StagePass) -> dict[int, list[Reading]]:
        """What the final exit says of the rows that need it, by ticket."""
        index: list[int] = []
        asked = [(entry, entry.num_final) for entry in rows.entries]
        for (_, num), end in zip(asked, rows.ends, strict=True):
            index += range(end - num, end)
        if not index:
            return {}
        layer = self.network.config.num_layers
        readings = iter(
            read(self.network, layer, h_ND[index], [entry.policy for entry, num in asked for _ in range(num)])
        )
        return {entry.ticket: [next(readings) for _ in range(num)] for entry, num in asked if num}

    def _keeps(self, layer: int, entry: Entry) -> bool:
        """Whether the exit must have keys and values of the rows, asked or not."""
        return layer in self.own_layer and layer in entry.exits

    def _through_own(self, layer: int, h_ND: Tensor, rows: StagePass, together: PassRows) -> Tensor:
        """Takes the rows of those that use the exit through its own layer."""
        if layer not in self.own_layer:
            return h_ND
        used = [layer in entry.exits for entry in rows.entries]
        index: list[int] = []
        for entry, end, is_used in zip(rows.entries, rows.ends, used, strict=True):
            index += range(end - entry.count, end) if is_used else ()
        return through_own_layer(self.network, layer, h_ND, together, rows.spans(used), index, self.memory)

    def _ask(self, layer: int, h_ND: Tensor, rows: StagePass) -> list[tuple[Entry, Reading]]:
        """The entries that the exit answers."""
        tested = [(e, end - 1) for e, end in zip(rows.entries, rows.ends, strict=True) if e.is_tested(layer)]
        if not tested:
            return []
        entries = [entry for entry, _ in tested]
        h_nD = rows_of(h_ND, [row for _, row in tested])
        sure, asked, unsure = ask(
            self.network, layer, h_nD, [x.policy for x in entries], [x.exits[layer] for x in entries]
        )
        for i in asked:
            entries[i].heads_run.add(layer)
        for i, score in unsure.items():
            entries[i].unsure[layer] = score
        for i in sure:
            entries[i].answered = layer
        return [(entries[i], reading) for i, reading in sure.items()]
