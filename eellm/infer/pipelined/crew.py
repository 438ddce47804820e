"""The engine's workers: talking to them, noticing that one is lost, ending them.

A worker that dies is noticed at once, by a receive that nothing is ever sent to. One that hangs is noticed by a
question that all stages must answer in turn, asked when nothing has been heard for half of the time-out; on this
process's own stage by a sum that doesn't come within the time-out. Of the processes of a stage the one that doesn't
wait for the others is to blame. Either is named, and all are ended.
"""

import os
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta

from torch import Tensor

from eellm.errors import WorkerError
from eellm.exits.lm import EarlyExitLM
from eellm.infer.pipelined import entry as e
from eellm.infer.pipelined.life import waiting, watch_worker
from eellm.infer.pipelined.setup import Facts, Plan, receive_facts, send_plan, stage_weights
from eellm.infer.pipelined.team import Lead, StageTeam
from eellm.infer.pipelined.tensor import part_weights
from eellm.infer.pipelined.wire import Group, Inbox, Message, Outbox, PeerLostError
from eellm.schedule.partition import Stage

Process = subprocess.Popen[bytes]

SPIN_S = 0.002
"""How long a wait looks all the time; after that it sleeps in between."""
NAP_S = 0.0001
WAIT_S = 0.05
"""The longest wait of one step."""
END_S = 5.0
"""Until a worker that was told to stop is killed."""
LEAVE_S = 30.0
"""Until one that torchrun started is left alone."""


class Crew:
    """What the engine's process knows of its workers. Ranks count from 1; 0 is the engine itself."""

    def __init__(
        self,
        group: Group,
        team: StageTeam | None,
        processes: Mapping[int, Process],
        model: EarlyExitLM,
        stages: Sequence[Stage],
        plan: Plan,
        *,
        timeout_s: float,
    ) -> None:
        """team: of this process's stage. processes: by rank, the workers that were started here. stages: all, the
        engine's own first. plan: what the workers are told, but for their layers. timeout_s: without a word while one
        is owed."""
        self.stages, self.tp = tuple(stages), plan.tp
        self.timeout_s = timeout_s
        self._group, self._processes = group, processes
        self._facts: dict[int, Facts] = {}
        self._lost: list[int] = []
        """Ranks, in the order in which they were."""
        self._is_closing = False
        self._alive: set[int] | None = None
        """Who answered the question whether they are; None: it wasn't asked."""
        self._heard_at = self._asked_at = time.monotonic()
        self._watchers = [threading.Thread(target=self._watch, args=(rank,), daemon=True) for rank in self.ranks]
        for watcher in self._watchers:
            watcher.start()
        try:
            self._set_up(model, plan)
        except BaseException:
            self.kill()
            raise
        self._next = Outbox(self._group, self.tp) if self._speakers else None
        self._inboxes = {rank: Inbox(self._group, rank) for rank in self._speakers}
        self.lead = None if team is None else Lead(team, self._stage_lost)
        """To the other processes of this one's stage."""
        if team is not None:
            team.timeout = timedelta(seconds=timeout_s)

    @property
    def ranks(self) -> range:
        return range(1, len(self.stages) * self.tp)

    @property
    def _speakers(self) -> range:
        """The first process of each stage but the engine's: the others say nothing."""
        return range(self.tp, len(self.stages) * self.tp, self.tp)

    @property
    def weight_bytes(self) -> int:
        return sum(facts.weight_bytes for facts in self._facts.values())

    @property
    def pids(self) -> list[int]:
        """By rank; the workers' only."""
        return [self._facts[rank].pid for rank in self.ranks]

    def _set_up(self, model: EarlyExitLM, plan: Plan) -> None:
        weights = model.state_dict()
        rank = 0
        try:
            for rank in self.ranks:
                stage = self._stage(rank)
                plan = replace(plan, first=stage.first, last=stage.last)
                chosen = stage_weights(weights, stage.first, stage.last, model.config.num_layers)
                part = part_weights(chosen, rank % self.tp, self.tp)
                send_plan(self._group, rank, model.config, plan, part)
            for rank in self.ranks:
                self._facts[rank] = receive_facts(self._group, rank)
        except PeerLostError as error:
            raise self._failure(rank, "didn't get ready") from error

    def send(self, kind: int, values: Sequence[float], data: Tensor | None = None) -> int:
        """To the next stage, and from there on; returns the message's number. Raises WorkerError."""
        assert self._next is not None, "there is another stage"
        try:
            return self._next.send(kind, values, data)
        except PeerLostError as error:
            raise self._failure(self.tp, "is gone") from error

    def arrived(self, number: int) -> None:
        """The message with this number has been through all stages."""
        assert self._next is not None, "there is another stage"
        self._next.arrived(number)

    def owes(self) -> None:
        """From now on, an answer is due."""
        self._heard_at, self._alive = time.monotonic(), None

    def hear(self) -> Iterator[Message]:
        """What has come from workers. Raises WorkerError."""
        self._check()
        for rank, inbox in self._inboxes.items():
            while inbox.is_ready():
                try:
                    message = inbox.take(timedelta(seconds=self.timeout_s))
                except PeerLostError as error:
                    raise self._failure(rank, "broke off in a message") from error
                if message.kind == e.PROBE:
                    if self._alive is not None:  # None: an answer came in between
                        self._alive.add(rank)
                else:
                    self.owes()
                    yield message

    def wait(self) -> None:
        """Until something has come, or for a little while. Raises WorkerError when nothing does for too long."""
        start = now = time.monotonic()
        while now - start < WAIT_S:
            if any(inbox.is_ready() for inbox in self._inboxes.values()):
                return
            if now - start < SPIN_S:
                os.sched_yield()
            else:
                time.sleep(NAP_S)
            now = time.monotonic()
        self._check()
        if self._alive is None:
            if now - self._heard_at > self.timeout_s / 2:
                self._alive, self._asked_at = set(), now
                self.send(e.PROBE, ())
        elif len(self._alive) == len(self._speakers):
            self.owes()
        elif now - self._asked_at > self.timeout_s / 2:
            first = next(rank for rank in self._speakers if rank not in self._alive)
            raise self._hung(range(first, first + self.tp))

    def close(self) -> None:
        """Ends all workers. Never raises; takes `END_S`, or `LEAVE_S`, if one doesn't."""
        if self._is_closing:
            return
        self._is_closing = True
        seconds = END_S if self._processes else LEAVE_S  # torchrun takes it for a failure when we end before they do
        try:
            if self._next is not None:
                self._next.send(e.STOP, ())
            if self.lead is not None:
                self.lead.stop()
        except PeerLostError:
            end_processes(self._processes.values())
            seconds = END_S
        deadline = time.monotonic() + seconds
        for process in self._processes.values():
            try:
                process.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                break
        self._release(deadline)

    def kill(self) -> None:
        """Ends the workers that were started here, at once; the others find that the engine is gone."""
        self._is_closing = True
        self._release(time.monotonic() + END_S)

    def _release(self, deadline: float) -> None:
        end_processes(self._processes.values())
        for watcher in self._watchers:
            watcher.join(max(deadline - time.monotonic(), 0.1))

    def _watch(self, rank: int) -> None:
        watch_worker(self._group, rank)
        self._lost.append(rank)

    def _check(self) -> None:
        if self._lost:
            raise self._failure(self._lost[0], "is gone")

    def _stage_lost(self, error: PeerLostError) -> WorkerError:
        """The processes of this one's stage have come to no sum."""
        if self._await_loss():
            return self._failure(self._lost[0], "is gone")
        return self._hung(range(1, self.tp))

    def _hung(self, ranks: Sequence[int]) -> WorkerError:
        """One of these, all of a stage, keeps the others waiting."""
        patient = waiting(self._group, ranks) if len(ranks) > 1 else set()
        hung = next((rank for rank in ranks if rank not in patient), ranks[0])
        return self._failure(hung, f"has said nothing for {self.timeout_s:g} s", is_lost=False)

    def _await_loss(self) -> bool:
        """Whether a worker is lost. A broken connection may be seen elsewhere before its watcher sees it."""
        deadline = time.monotonic() + 0.5
        while not self._lost and time.monotonic() < deadline:
            time.sleep(NAP_S)
        return bool(self._lost)

    def _stage(self, rank: int) -> Stage:
        return self.stages[rank // self.tp]

    def _failure(self, rank: int, what: str, *, is_lost: bool = True) -> WorkerError:
        """Names the worker, or the one that was lost first if one was; ends all. is_lost: False for one that hangs:
        others may end of it."""
        if is_lost and self._await_loss():
            rank = self._lost[0]
        process, facts, stage = self._processes.get(rank), self._facts.get(rank), self._stage(rank)
        if is_lost and rank in self._lost and process is not None:
            try:
                process.wait(1.0)
                what = how_it_ended(process)
            except subprocess.TimeoutExpired:
                what = "closed its connection"
        where = f", part {rank % self.tp + 1} of {self.tp}" if self.tp > 1 else ""
        where += f", process {facts.pid} on {facts.host}" if facts is not None else ""
        self.kill()
        return WorkerError(
            f"worker {rank} of {len(self.ranks)} (layers {stage.first} to {stage.last}{where}) {what}; "
            "the requests that it served have failed: make a new engine"
        )


def how_it_ended(process: Process) -> str:
    code = process.returncode
    return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"


def end_processes(processes: Iterable[Process]) -> None:
    """At once."""
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
