"""The engine's workers: talking to them, noticing that one is lost, ending them.

A worker that dies is noticed at once, by a receive that nothing is ever sent to; one that hangs by a question that all
of them must answer in turn, asked when nothing has been heard for half of the time-out. Either is named, and all are
ended.
"""

import os
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta

import torch
from torch import Tensor

from eellm.errors import WorkerError
from eellm.exits.lm import EarlyExitLM
from eellm.infer.pipelined import entry as e
from eellm.infer.pipelined.setup import (
    LIFE_TAG,
    Facts,
    Plan,
    receive_facts,
    send_plan,
    stage_weights,
)
from eellm.infer.pipelined.wire import FOREVER, Group, Inbox, Message, Outbox, PeerLostError, wait_for
from eellm.schedule.partition import Stage

Process = subprocess.Popen[bytes]

SPIN_S = 0.002
"""How long a wait looks all the time; after that it sleeps in between."""
NAP_S = 0.0001
WAIT_S = 0.05
"""The longest wait of one step."""
END_S = 5.0
"""Until a worker that was told to stop is killed."""


class Crew:
    """What the engine's process knows of its workers. Ranks count from 1; 0 is the engine itself."""

    def __init__(
        self,
        group: Group,
        processes: Mapping[int, Process],
        model: EarlyExitLM,
        stages: Sequence[Stage],
        plan: Plan,
        *,
        timeout_s: float,
    ) -> None:
        """processes: by rank, the workers that were started here. stages: all, the engine's own first. plan: what the
        workers are told, but for their layers. timeout_s: without a word while one is owed."""
        self.stages = tuple(stages)
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
        self._next = Outbox(self._group, 1)
        self._inboxes = {rank: Inbox(self._group, rank) for rank in self.ranks}

    @property
    def ranks(self) -> range:
        return range(1, len(self.stages))

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
                stage = self.stages[rank]
                plan = replace(plan, first=stage.first, last=stage.last)
                chosen = stage_weights(weights, stage.first, stage.last, model.config.num_layers)
                send_plan(self._group, rank, model.config, plan, chosen)
            for rank in self.ranks:
                self._facts[rank] = receive_facts(self._group, rank)
        except PeerLostError as error:
            raise self._failure(rank, "didn't get ready") from error

    def send(self, kind: int, values: Sequence[float], data: Tensor | None = None) -> int:
        """To the first worker, and from there on; returns the message's number. Raises WorkerError."""
        try:
            return self._next.send(kind, values, data)
        except PeerLostError as error:
            raise self._failure(1, "is gone") from error

    def arrived(self, number: int) -> None:
        """The message with this number has been through all stages."""
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
        elif len(self._alive) == len(self.ranks):
            self.owes()
        elif now - self._asked_at > self.timeout_s / 2:
            hung = next(rank for rank in self.ranks if rank not in self._alive)
            raise self._failure(hung, f"has said nothing for {self.timeout_s:g} s", is_lost=False)

    def close(self) -> None:
        """Ends all workers. Never raises; takes `END_S` if one doesn't."""
        if self._is_closing:
            return
        self._is_closing = True
        try:
            self._next.send(e.STOP, ())
        except PeerLostError:
            end_processes(self._processes.values())
        deadline = time.monotonic() + END_S
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
        try:
            wait_for(self._group.recv([torch.empty(1)], rank, LIFE_TAG), FOREVER)
        except PeerLostError:
            self._lost.append(rank)

    def _check(self) -> None:
        if self._lost:
            raise self._failure(self._lost[0], "is gone")

    def _failure(self, rank: int, what: str, *, is_lost: bool = True) -> WorkerError:
        """Names the worker that was lost first, if one was; ends all."""
        deadline = time.monotonic() + 0.5  # NOTE a broken connection may be seen here before the watcher sees it
        while is_lost and not self._lost and time.monotonic() < deadline:
            time.sleep(NAP_S)
        if self._lost:
            rank = self._lost[0]
        process, facts, stage = self._processes.get(rank), self._facts.get(rank), self.stages[rank]
        if rank in self._lost and process is not None:
            try:
                process.wait(1.0)
                what = how_it_ended(process)
            except subprocess.TimeoutExpired:
                what = "closed its connection"
        where = f", process {facts.pid} on {facts.host}" if facts is not None else ""
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
