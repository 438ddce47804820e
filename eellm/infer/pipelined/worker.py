"""A process with one stage: takes what comes from the stage before, answers the engine, sends the rows on.

    python -m eellm.infer.pipelined.worker FILE RANK SIZE TP

It ends when it is told to, or at once when the engine's process is gone. Passes that have come while it was busy are
run as one. Of the processes that share a stage the first does this, and the others serve its network's calls.
"""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from eellm.config.model import ModelConfig
from eellm.exits.lm import EarlyExitLM
from eellm.infer.network import Network
from eellm.infer.packed import PackedNetwork
from eellm.infer.pipelined import entry as e
from eellm.infer.pipelined.entry import Entry, EntryCode, Record
from eellm.infer.pipelined.life import live_with_engine
from eellm.infer.pipelined.setup import Plan, receive_plan, send_facts
from eellm.infer.pipelined.stage import Stage, StagePass, merged
from eellm.infer.pipelined.team import Lead, StageTeam, meet
from eellm.infer.pipelined.tensor import Follower, TensorParallelNetwork, part_config
from eellm.infer.pipelined.wire import Group, Inbox, Message, Outbox, PeerLostError
from eellm.infer.prepare import make_network
from eellm.infer.readout import Reading

MERGED_ROWS = 64
"""Of passes that are run as one, at the most."""
MERGED_ENTRIES = 256


def main() -> None:
    path, rank, size, tp = sys.argv[1], *map(int, sys.argv[2:5])
    store = dist.FileStore(path, size)
    store.set(f"here/{rank}", str(os.getpid()))
    group, team = meet(store, rank, size, tp)
    store.set(f"met/{rank}", "")
    serve(group, team, rank)


def serve(group: Group, team: StageTeam | None, rank: int) -> NoReturn:
    """Until the engine says stop; then ends the process."""
    is_waiting = (lambda: False) if team is None else (lambda: team.is_waiting)
    threading.Thread(target=live_with_engine, args=(group, is_waiting), daemon=True).start()
    try:
        config, plan, tensors = receive_plan(group)
        if plan.num_threads:
            torch.set_num_threads(plan.num_threads)
        device = (
            torch.device("cuda", rank % torch.cuda.device_count()) if plan.device == "cuda" else torch.device("cpu")
        )
        model = stage_model(part_config(config, plan.tp), tensors, device)
        if team is not None and team.place > 0:
            _follow(group, team, model, plan)
        else:
            _work(group, team, rank, model, config, plan)
    except PeerLostError:
        time.sleep(1)  # the engine hears of the one that is lost before it hears of us
        os._exit(1)
    # NOTE not by way of the interpreter's end: a thread that gloo wakes then, of a connection that closes, aborts all
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _follow(group: Group, team: StageTeam, model: EarlyExitLM, plan: Plan) -> None:
    part = PackedNetwork(model, plan.quantize, plan.layers, plan.directory, team=team)
    follower = Follower(part, team)
    send_facts(group, part.num_bytes)
    follower.run()


def _work(group: Group, team: StageTeam | None, rank: int, model: EarlyExitLM, config: ModelConfig, plan: Plan) -> None:
    """config: the whole model's."""
    lead = None if team is None else Lead(team)
    layers, quantize, cache_dir = plan.layers, plan.quantize, plan.directory
    network: Network
    if lead is None:
        network = make_network(model, quantize=quantize, layers=layers, cache_dir=cache_dir, compile=plan.compile)
    else:
        network = TensorParallelNetwork(model, layers, config, lead, quantize=quantize, cache_dir=cache_dir)
    worker = Worker(group, rank, plan.tp, network, plan.max_in_flight)
    send_facts(group, network.num_bytes)
    worker.run()
    if lead is not None:
        lead.stop()
        lead.flush()


class Worker:
    def __init__(self, group: Group, rank: int, step: int, network: Network, max_in_flight: int) -> None:
        """step: from a stage's rank to the next one's."""
        config = network.config
        memory = network.new_memory()
        self.stage = Stage(network, memory)
        self.code = EntryCode(config.exit_layers)
        self.max_in_flight = max_in_flight
        self.inbox = Inbox(group, rank - step)
        self.next = None if self.stage.is_last else Outbox(group, rank + step)
        self.engine = Outbox(group, 0)
        self.held: deque[Message] = deque()
        """What was taken from the inbox and couldn't be merged."""

    def run(self) -> None:
        while True:
            message = self.held.popleft() if self.held else self.inbox.take()
            if message.kind == e.PASS:
                self._run(self._merge(message))
                continue
            if message.kind == e.COPY:
                self.stage.memory.copy(*map(int, message.values))
            elif message.kind == e.WIPE:
                self.stage.memory.wipe(*map(int, message.values))
            elif message.kind == e.RESERVE:
                self.stage.memory.reserve(*map(int, message.values))
            elif message.kind == e.PROBE:
                self.engine.send(e.PROBE, message.values)
            if self.next is not None:
                self.next.send(message.kind, message.values)
            if message.kind == e.STOP:
                if self.next is not None:
                    self.next.flush()
                return

    def _merge(self, message: Message) -> StagePass:
        passes = [self._pass(message)]
        ends = {entry.slot: entry.before + entry.count for entry in passes[0].entries}
        num_rows, num_entries = len(passes[0].h_ND), len(passes[0].entries)
        while self.inbox.is_ready() and num_rows < MERGED_ROWS:
            message = self.inbox.take()
            if message.kind != e.PASS:
                self.held.append(message)
                break
            more = self._pass(message)
            num_rows, num_entries = num_rows + len(more.h_ND), num_entries + len(more.entries)
            # NOTE rows that a sequence took back are written again: not in the same pass
            goes_on = all(ends.get(entry.slot, entry.before) == entry.before for entry in more.entries)
            if not goes_on or num_rows > MERGED_ROWS or num_entries > MERGED_ENTRIES:
                self.held.append(message)
                break
            passes.append(more)
            ends |= {entry.slot: entry.before + entry.count for entry in more.entries}
        return merged(passes)

    def _pass(self, message: Message) -> StagePass:
        network = self.stage.network
        h_ND = message.tensor(network.dtype, network.config.hidden_size)
        return StagePass(self.code.decode(message.values), h_ND)

    def _run(self, rows: StagePass) -> None:
        h_ND = self.stage.run(rows, self._answer)
        if self.next is not None:
            self.next.keep(self.max_in_flight)
            self.next.send(e.PASS, self.code.encode(rows.entries), h_ND)
            return
        self._end(rows.entries, self.stage.final(h_ND, rows))

    def _answer(self, answers: list[tuple[Entry, Reading]]) -> None:
        records = [self._record(e.ANSWER, entry, reading) for entry, reading in answers]
        self._reply(records, [reading.logits_V for entry, reading in answers if entry.wants_logits])

    def _end(self, entries: Sequence[Entry], readings: dict[int, list[Reading]]) -> None:
        """All readings of an entry come before its end."""
        records, logits = [], []
        for entry in entries:
            for reading in readings.get(entry.ticket, ()):
                records.append(self._record(e.READING, entry, reading))
                if entry.wants_logits:
                    logits.append(reading.logits_V)
            heads = self.code.mask(entry.heads_run)
            end = Record(kind=e.END, ticket=entry.ticket, layer=entry.answered, heads=heads, unsure=entry.unsure)
            records.append(end)
        self._reply(records, logits)

    def _record(self, kind: int, entry: Entry, reading: Reading) -> Record:
        return Record(
            kind=kind,
            ticket=entry.ticket,
            layer=reading.layer,
            heads=self.code.mask(entry.heads_run),
            token=reading.token,
            logprob=reading.logprob,
            score=reading.score,
            unsure=entry.unsure if kind == e.ANSWER else {},
        )

    def _reply(self, records: list[Record], logits: list[Tensor]) -> None:
        self.engine.keep(self.max_in_flight)
        self.engine.send(e.REPLY, self.code.encode_records(records), torch.stack(logits) if logits else None)


def stage_model(config: ModelConfig, tensors: Mapping[str, Tensor], device: torch.device) -> EarlyExitLM:
    """A model with these weights; the rest of it takes no memory."""
    with torch.device("meta"):
        model = EarlyExitLM(config).eval()
    model.load_state_dict({name: t.to(device) for name, t in tensors.items()}, strict=False, assign=True)
    return model


if __name__ == "__main__":
    main()
