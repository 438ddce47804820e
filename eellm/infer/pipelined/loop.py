"""The decode loop of an engine with workers: its own process runs the first stage, the workers all layers behind it.

Within the first stage it is the loop of `eellm.infer.loop`: rows that an exit answered wait there until a pass takes
them on. Rows that reach the stage's end are sent on at once, answered or not. A token that an exit is sure of, here or
on any worker, comes back at once and the next one starts, while the workers fill in its keys and values: messages are
taken in order, so whatever comes later finds them (EE-LLM, arXiv 2312.04916 §4.2). To the first stage rows that were
sent have passed all layers. At most P passes of one sequence are on their way; other sequences fill the stages.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch

from eellm.config.model import ModelConfig
from eellm.infer.decode.speculative import Speculative
from eellm.infer.loop import Loop
from eellm.infer.memory import Memory
from eellm.infer.network import Network
from eellm.infer.pipelined import entry as e
from eellm.infer.pipelined.crew import Crew
from eellm.infer.pipelined.entry import Entry, EntryCode, Record
from eellm.infer.readout import Reading
from eellm.infer.rows import gather
from eellm.infer.scheduler import Scheduler
from eellm.infer.sequence import Sequence as Served


@dataclass(kw_only=True, slots=True)
class Flight:
    """Rows that were sent and haven't been through all stages."""

    seq: Served
    entry: Entry
    message: int
    """Number of the message that they went with."""
    is_heard: bool = False
    """Whether a worker's answer has come."""
    end: Record | None = None
    """The record of its end, while an answer that was given before it is still on its way."""
    readings: list[Reading] = field(default_factory=list)


@dataclass(slots=True)
class Progress:
    """Of one sequence."""

    in_flight: int = 0
    asked: int = 0
    """Readings that the last stage owes, or has given since the last `at_end`."""
    readings: list[Reading] = field(default_factory=list)


class PipelinedMemory:
    """The first stage's; the workers do with theirs what is done with it."""

    def __init__(self, own: Memory, config: ModelConfig, crew: Crew) -> None:
        """own: of the first stage's network."""
        self.own = own
        self.crew = crew
        self.num_parts = config.num_layers + len(own_layers(config))

    @property
    def num_slots(self) -> int:
        return self.own.num_slots

    @property
    def capacity(self) -> int:
        return self.own.capacity

    @property
    def num_bytes(self) -> int:
        """Of all stages: every layer, and every exit's own, takes the same."""
        here = len(self.own.layers) + len(self.own.exits)
        return self.own.num_bytes // here * self.num_parts

    def reserve(self, num_slots: int, capacity: int) -> None:
        if num_slots > self.num_slots or capacity > self.capacity:
            self.own.reserve(num_slots, capacity)
            self.crew.send(e.RESERVE, (self.num_slots, self.capacity))

    def copy(self, source: int, target: int, num_rows: int) -> None:
        self.own.copy(source, target, num_rows)
        self.crew.send(e.COPY, (source, target, num_rows))

    def wipe(self, slot: int) -> None:
        self.own.wipe(slot)
        self.crew.send(e.WIPE, (slot,))


def own_layers(config: ModelConfig) -> frozenset[int]:
    """Layers of the exits that keep keys and values of their own, on whatever stage."""
    return frozenset(exit_config.layer for exit_config in config.exits if exit_config.kind == "layer")


class PipelinedScheduler(Scheduler):
    """For the first stage alone: deeper rows go first unless they are the fewer."""

    def _split_pays(self, stop: int, num_ready: int, num_waiting: int, ticks_waited: int) -> bool:
        return ticks_waited < self.max_wait and num_ready > num_waiting


class PipelinedLoop(Loop):
    def __init__(self, network: Network, memory: Memory, scheduler: Scheduler, crew: Crew) -> None:
        """network, memory: of the first stage."""
        super().__init__(network, memory, scheduler)
        self.crew = crew
        self.boundary = crew.stages[0].last
        exits = self.config.exit_layers
        self.stops = (*(n for n in exits if n < self.boundary), self.boundary, self.config.num_layers)
        self.own_layer = own_layers(self.config)
        self.code = EntryCode(exits)
        self.num_tickets = 0
        self.flights: dict[int, Flight] = {}
        self.progress: WeakKeyDictionary[Served, Progress] = WeakKeyDictionary()

    @torch.inference_mode()
    def step(self, sequences: Sequence[Served], tick: int) -> Sequence[Served] | None:
        """Hears the answers that are there; without any, runs a pass of the first stage; without one to run, waits a
        little. Returns the sequences that may have changed; None: there is nothing to do. Raises WorkerError."""
        changed = self._hear(tick)
        if changed or not sequences:
            return changed or None
        plan = self.scheduler.plan(self._ready(sequences), tick)
        if plan is not None:
            self.run(plan, tick)
            self._send(plan.sequences)
            return plan.sequences
        self.crew.wait()
        return self._hear(tick)

    def _can_walk(self, seq: Served) -> bool:
        return False  # the first stage's passes end where the next one begins

    def _through(self, stop: int, sequences: Iterable[Served]) -> int:
        return min(super()._through(stop, sequences), len(self.stops) - 2)

    def _ready(self, sequences: Sequence[Served]) -> list[Served]:
        """Those that can go on now. Of those that no exit of the first stage can answer only so many begin at the same
        time that every stage has some."""
        num_plain = math.ceil(len(sequences) / len(self.crew.stages))
        ready = []
        for seq in sorted(sequences, key=lambda seq: seq.ready_since):
            if self._progress(seq).in_flight >= len(self.crew.stages) or not (seq.pending or seq.frontier is not None):
                continue
            if seq.frontier is None and not seq.decode.exits_in_use & set(self.stops):
                num_plain -= 1
                if num_plain < 0:
                    continue
            ready.append(seq)
        return ready

    def _progress(self, seq: Served) -> Progress:
        return self.progress.setdefault(seq, Progress())

    # --- to the workers ---

    def _send(self, sequences: Iterable[Served]) -> None:
        """The rows that have come to the end of the first stage."""
        end = len(self.stops) - 2
        sent = [seq for seq in sequences if seq.finish_reason is None and seq.num_waiting(end) > 0]
        if not sent:
            return
        h_ND = gather([piece for seq in sent for piece in seq.waiting[end]])
        if not self.flights:
            self.crew.owes()
        entries = [self._entry(seq, end) for seq in sent]
        number = self.crew.send(e.PASS, self.code.encode(entries), h_ND)
        for seq, entry in zip(sent, entries, strict=True):
            self.flights[entry.ticket] = Flight(seq=seq, entry=entry, message=number)

    def _entry(self, seq: Served, end: int) -> Entry:
        """The sequence's rows leave."""
        count, progress, options = seq.num_waiting(end), self._progress(seq), seq.request.options
        num_readings = 0 if self._is_cut(seq) else min(count, seq.decode.num_readings(seq) - progress.asked)
        tested = {} if seq.pending else seq.decode.exits(seq)
        is_judged = isinstance(seq.decode, Speculative)
        self.num_tickets += 1
        entry = Entry(
            ticket=self.num_tickets,
            slot=seq.slot,
            before=seq.passed[-1],
            count=count,
            policy=seq.request.policy,
            num_readings=num_readings,
            is_judged=is_judged,
            wants_logits=not seq.sampler.takes_likeliest or options.typical > 0 or options.top_logprobs > 0,
            exits={n: tested.get(n, e.NEVER) for n in seq.decode.exits_in_use if n > self.boundary},
        )
        seq.waiting[end] = []
        seq.passed[-1] += count
        seq.frontier = None
        seq.work.layers += self.stops[-1] - self.boundary
        seq.work.deep_passes += 1
        progress.in_flight += 1
        progress.asked += num_readings
        return entry

    # --- from the workers ---

    def _hear(self, tick: int) -> list[Served]:
        """Takes in all that has come."""
        changed: dict[Served, None] = {}
        for message in self.crew.hear():
            logits = None if message.data is None else iter(message.tensor(torch.float32, self.config.vocab_size))
            for record in self.code.decode_records(message.values):
                flight = self.flights[record.ticket]
                logits_V = torch.empty(0, dtype=torch.float32)
                if record.kind != e.END and flight.entry.wants_logits:
                    assert logits is not None, "logits come with every reading of those who want them"
                    logits_V = next(logits).to(self.network.device)
                if flight.seq.finish_reason is None:
                    flight.seq.ready_since = tick
                    changed[flight.seq] = None
                self._record(flight, record, logits_V)
        return list(changed)

    def _record(self, flight: Flight, record: Record, logits_V: torch.Tensor) -> None:
        seq = flight.seq
        reading = Reading(record.layer, record.score, record.token, record.logprob, logits_V)
        if record.kind == e.READING:
            flight.readings.append(reading)
        elif record.kind == e.END:
            flight.end = record
        else:
            flight.is_heard = True
            self._take_asked(seq, record)
            if not flight.entry.is_judged:
                self._progress(seq).asked -= flight.entry.num_readings
            if seq.finish_reason is None:
                seq.at_exit(reading)
        # NOTE the last stage's word can overtake the answer of a stage before it
        if flight.end is not None and (flight.is_heard or flight.end.layer == 0):
            self._end(flight, flight.end)

    def _end(self, flight: Flight, end: Record) -> None:
        """The rows have been through all stages."""
        seq, progress = flight.seq, self._progress(flight.seq)
        del self.flights[flight.entry.ticket]
        self.crew.arrived(flight.message)
        progress.in_flight -= 1
        if not flight.is_heard:
            self._take_asked(seq, end)
        if flight.readings:
            seq.work.count_head(self.stops[-1])
        progress.readings += flight.readings
        if seq.finish_reason is None and 0 < seq.decode.num_readings(seq) == len(progress.readings):
            readings = progress.readings
            progress.asked, progress.readings = 0, []
            seq.at_end(readings)

    def _take_asked(self, seq: Served, record: Record) -> None:
        """The exits that workers asked about the newest row."""
        for layer in self.code.heads(record.heads):
            seq.work.count_head(layer)
        seq.unsure += record.unsure.items()
