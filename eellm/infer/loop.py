"""The decode loop: one tick moves the rows of some sequences to one stop, and hears what the exit there says.

    Scheduler.plan → StepPlan → rows through layers → Readings → Decode.at_exit, at_end → tokens emitted and fed

All methods are the same loop: full depth tests no exit, early exit trusts an answer, speculation judges it at the
end. The rows that an exit answered wait where they are, those of all sequences alike, until a pass takes them on.
What a sequence gets never depends on its neighbours but for rounding.
Shapes: N rows of the pass, D hidden.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from eellm.infer.asking import ask, rows_of, through_own_layer
from eellm.infer.attention import PassRows, Span
from eellm.infer.drafts import Acceptance
from eellm.infer.memory import Memory
from eellm.infer.network import Heard, Leg, Network
from eellm.infer.readout import Reading, read, readings_of
from eellm.infer.rows import Piece, gather
from eellm.infer.scheduler import Scheduler, StepPlan
from eellm.infer.sequence import Sequence as Served


class Loop:
    def __init__(self, network: Network, memory: Memory, scheduler: Scheduler) -> None:
        self.network = network
        self.memory = memory
        self.scheduler = scheduler
        self.config = network.config
        self.stops = (*self.config.exit_layers, self.config.num_layers)
        self.own_layer = frozenset(network.own_layer)
        self.sure = {layer: Acceptance(prior=0.5, memory=256) for layer in self.config.exit_layers}
        """How often exits are sure in walks, whatever the request's threshold: it says when a leg may start early."""

    def step(self, sequences: Sequence[Served], tick: int) -> Sequence[Served] | None:
        """One tick. Returns the sequences that took part; None: there is nothing to do."""
        plan = self.scheduler.plan(sequences, tick)
        if plan is None:
            return None
        self.run(plan, tick)
        return plan.sequences

    @torch.inference_mode()
    def run(self, plan: StepPlan, tick: int) -> None:
        """One tick."""
        if plan.goes_on and self._can_walk(plan.sequences[0]):
            self._walk(plan.sequences[0], plan, tick)
        else:
            self._pass(plan, tick)

    def _pass(self, plan: StepPlan, tick: int) -> None:
        """Rows of any sequences, to one stop."""
        stop, sequences = plan.stop, plan.sequences
        if stop == 0:
            entering = [seq.enter(num) for seq, num in zip(sequences, plan.num_enter, strict=True)]
            counts = [len(tokens) for tokens in entering]
            h_ND = self.network.embed([token for tokens in entering for token in tokens])
        else:
            counts = [seq.num_waiting(stop - 1) for seq in sequences]
            h_ND = gather([piece for seq in sequences for piece in seq.waiting[stop - 1]])
            for seq in sequences:
                seq.waiting[stop - 1] = []
        last = self._through(stop, sequences)
        spans = [Span(seq.slot, seq.passed[stop], count) for seq, count in zip(sequences, counts, strict=True)]
        rows = self.network.rows(spans)
        done = 0 if stop == 0 else self.stops[stop - 1]
        h_ND = self.network.run(h_ND, done + 1, self.stops[last], rows, self.memory)
        start = 0
        for seq, count in zip(sequences, counts, strict=True):
            for i in range(stop, last + 1):
                seq.passed[i] += count
            seq.work.layers += self.stops[last] - done
            seq.ready_since = tick
            if last + 1 < len(self.stops):
                seq.waiting[last].append(Piece(h_ND, start, start + count))
                seq.frontier = last + 1
            else:
                seq.frontier = None
                seq.work.deep_passes += 1
            start += count
        if last + 1 < len(self.stops):
            self._at_exit(self.stops[last], h_ND, rows, sequences)
        else:
            self._at_end(h_ND, sequences, counts)

    def _can_walk(self, seq: Served) -> bool:
        return seq.request.policy != "gate" and not seq.decode.exits_in_use & self.own_layer

    def _walk(self, seq: Served, plan: StepPlan, tick: int) -> None:
        """A sequence's rows, until an exit answers the newest one or the end is reached; those that wait on the way
        join. The same as a pass to every stop, in one call of the network."""
        stop = plan.stop
        if stop == 0:
            moving_ND = self.network.embed(seq.enter(plan.num_enter[0]))
            moving = [Piece(moving_ND, 0, len(moving_ND))]
        else:
            moving, seq.waiting[stop - 1] = seq.waiting[stop - 1], []
        ends = self._ends_of_legs(stop, seq)
        waiting = [seq.waiting[end] for end in ends[:-1]]
        h_ND = gather([*(piece for pieces in reversed(waiting) for piece in pieces), *moving])
        end_row = seq.passed[stop] + sum(piece.end - piece.start for piece in moving)
        legs, span = self._legs(seq, ends, end_row), Span(seq.slot, end_row - len(h_ND), len(h_ND))
        done = 0 if stop == 0 else self.stops[stop - 1]
        h_ND, gone = self.network.walk(h_ND, done, legs, span, self.memory, seq.request.policy)
        last = ends[len(gone) - 1]
        for i in range(stop, last + 1):
            seq.passed[i] = end_row
        for end in ends[: len(gone) - 1]:
            seq.waiting[end] = []
        seq.ready_since = tick
        seq.work.layers += self.stops[last] - done
        if last + 1 < len(self.stops):
            seq.waiting[last].append(Piece(h_ND, legs[len(gone) - 1].start, len(h_ND)))
            seq.frontier = last + 1
        else:
            seq.frontier = None
            seq.work.deep_passes += 1
        for end, leg in zip(ends, gone, strict=False):
            if leg.heard is not None:
                self._take_answer(seq, end, leg.heard)

    def _legs(self, seq: Served, ends: Sequence[int], end_row: int) -> list[Leg]:
        legs, start = [], 0
        for end in reversed(ends):
            layer = self.stops[end]
            if layer == self.stops[-1]:
                is_cut = end_row < len(seq.request.tokens)
                num_asked, threshold, likely = 0 if is_cut else seq.decode.num_readings(seq), math.inf, 0.0
            else:
                start += sum(piece.end - piece.start for piece in seq.waiting[end])
                is_tested = self._is_tested(seq, layer)
                num_asked, threshold = (1, seq.decode.exits(seq)[layer]) if is_tested else (0, math.inf)
                likely = self.sure[layer].probability
            legs.append(Leg(last=layer, start=start, num_asked=num_asked, threshold=threshold, likely=likely))
        return legs[::-1]

    def _take_answer(self, seq: Served, end: int, said: Heard) -> None:
        """What the head at a stop said of the newest rows of a walk, which ended there if it is sure."""
        layer, policy = self.stops[end], seq.request.policy
        readings = readings_of(layer, said.logits_NV, said.answers, [policy] * len(said.answers))
        seq.work.count_head(layer)
        if end + 1 == len(self.stops):
            seq.at_end(readings)
            return
        is_sure = readings[0].score >= seq.decode.exits(seq)[layer]
        self.sure[layer].update(1, int(is_sure))
        if not is_sure:
            seq.unsure.append((layer, readings[0].score))
            self.scheduler.heard(end, 1, 0)
        else:
            self.scheduler.heard(end, 1, int(self._at_rest(seq, readings[0])))

    def _at_rest(self, seq: Served, reading: Reading) -> bool:
        """An exit is sure of a sequence's newest row: whether that puts off the rest of its way."""
        # the rest of the prompt's way, and of too many that wait, can't be put off
        can_rest = not seq.is_prompt and seq.num_deferred <= seq.decode.max_deferred
        if not (seq.at_exit(reading) and can_rest):
            return False
        seq.frontier = None
        return True

    def _ends_of_legs(self, stop: int, seq: Served) -> list[int]:
        """Indices of the stops on its way where it has business, and of the last one."""
        ends = [self._through(stop, (seq,))]
        while ends[-1] + 1 < len(self.stops):
            ends.append(self._through(ends[-1] + 1, (seq,)))
        return ends

    def _through(self, stop: int, sequences: Iterable[Served]) -> int:
        """The stop to run to: beyond `stop` where nobody has business there."""
        while stop + 1 < len(self.stops):
            layer = self.stops[stop]
            for seq in sequences:
                keeps = layer in self.own_layer and layer in seq.decode.exits_in_use
                if keeps or seq.num_waiting(stop) > 0 or self._is_tested(seq, layer):
                    return stop
            stop += 1
        return stop

    @staticmethod
    def _is_tested(seq: Served, layer: int) -> bool:
        return not seq.pending and layer in seq.decode.exits(seq)

    def _at_exit(self, layer: int, h_ND: Tensor, rows: PassRows, sequences: Sequence[Served]) -> None:
        """Asks the exit about the newest rows of those that test it."""
        ends = _ends(rows.spans)
        tested = [(seq, end - 1) for seq, end in zip(sequences, ends, strict=True) if self._is_tested(seq, layer)]
        if layer in self.own_layer:
            h_ND = self._through_own(layer, h_ND, rows, sequences)
        if not tested:
            return
        sure, asked, unsure = ask(
            self.network,
            layer,
            rows_of(h_ND, [row for _, row in tested]),
            [seq.request.policy for seq, _ in tested],
            [seq.decode.exits(seq)[layer] for seq, _ in tested],
        )
        for i in asked:
            tested[i][0].work.count_head(layer)
        for i, score in unsure.items():
            tested[i][0].unsure.append((layer, score))
        num_over = 0
        for i, reading in sure.items():
            num_over += self._at_rest(tested[i][0], reading)
        self.scheduler.heard(self.stops.index(layer), len(tested), num_over)

    def _through_own(self, layer: int, h_ND: Tensor, rows: PassRows, sequences: Sequence[Served]) -> Tensor:
        """Takes the rows of those that use the exit through its own layer."""
        spans, index = [], []
        for seq, span, end in zip(sequences, rows.spans, _ends(rows.spans), strict=True):
            if layer in seq.decode.exits_in_use:
                spans.append(span)
                index += range(end - span.count, end)
        return through_own_layer(self.network, layer, h_ND, rows, spans, index, self.memory)

    def _at_end(self, h_ND: Tensor, sequences: Sequence[Served], counts: Sequence[int]) -> None:
        """Asks the final exit about the rows that have no answer yet."""
        asked, index, start = [], [], 0
        for seq, count in zip(sequences, counts, strict=True):
            start += count
            # of a prompt that hasn't entered entirely, no row is asked about; a sequence cut off in between has no say
            num = 0 if seq.finish_reason is not None or self._is_cut(seq) else seq.decode.num_readings(seq)
            if num:
                asked.append((seq, num))
                index += range(start - num, start)
        if not asked:
            return
        layer = self.stops[-1]
        readings = self._read(layer, rows_of(h_ND, index), [seq for seq, num in asked for _ in range(num)])
        start = 0
        for seq, num in asked:
            seq.at_end(readings[start : start + num])
            start += num

    @staticmethod
    def _is_cut(seq: Served) -> bool:
        """Whether more of the prompt is to come."""
        return seq.passed[0] < len(seq.request.tokens)

    def _read(self, layer: int, h_ND: Tensor, sequences: Sequence[Served]) -> list[Reading]:
        for seq in dict.fromkeys(sequences):
            seq.work.count_head(layer)
        return read(self.network, layer, h_ND, [seq.request.policy for seq in sequences])


def _ends(spans: Iterable[Span]) -> list[int]:
    """One past each span's last row."""
    ends, end = [], 0
    for span in spans:
        end += span.count
        ends.append(end)
    return ends
